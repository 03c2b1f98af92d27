# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""A repository that has a card already: what somebody wrote there is kept, what was generated follows the model."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from casa_hf import CasaConfig, CasaForConditionalGeneration, PublishingError, convert_checkpoint, push_checkpoint
from casa_hf.cli import main
from casa_hf.hub import Origin, origin_records
from tests.hub.helpers import fine_tuned
from tests.hub.loopback import Hub

NAME = "me/tiny-casa"


@pytest.fixture
def trained(casa_folder: Path, tmp_path: Path) -> Path:
    """A checkpoint as training leaves it, without a card."""
    fine_tuned(casa_folder, tmp_path / "trained", steps=1)
    return tmp_path / "trained"


@pytest.fixture
def converted(casa_folder: Path, tmp_path: Path) -> Path:
    """A checkpoint with the converter's card."""
    return Path(shutil.copytree(casa_folder, tmp_path / "converted"))


def card(hub: Hub, branch: str = "main") -> ModelCard:
    return ModelCard(hub.files(NAME, branch)["README.md"].decode())


def titles(hub: Hub) -> list[str]:
    return re.findall("^## (.*)$", card(hub).text, re.MULTILINE)


def edit(hub: Hub, old: str, new: str, branch: str = "main") -> None:
    """Change the card on the website."""
    text = hub.files(NAME, branch)["README.md"].decode()
    assert old in text
    hub.edit(NAME, branch, README=text.replace(old, new))


def set_origin(folder: Path, name: str, license: str) -> None:
    config = CasaConfig.from_pretrained(folder)
    config.source_origins = origin_records([(Origin(name, True), {"license": license})])
    config.save_pretrained(folder)


# ---------------------------------------------------------------- a folder without a card


def test_edits_on_the_hub_are_kept(hub: Hub, trained: Path) -> None:
    """Text in every place, metadata, and words around the generated code."""
    push_checkpoint(trained, NAME, datasets=["my data"])
    edit(hub, "---\n\n#", "extra_gated_prompt: Promise.\nlanguage: fr\n---\n\n#")
    edit(hub, "\n## Usage\n", "\nIt dreams.\n\n## Gallery\n\nPictures.\n\n## Usage\n\nAsk it nicely.\n")
    edit(hub, "- my data", "- my data, all of 2025")
    before = hub.files(NAME)["README.md"].decode()
    report = push_checkpoint(trained, NAME)
    assert hub.files(NAME)["README.md"].decode() == before and not report.changed and not report.card_changes
    push_checkpoint(trained, NAME, datasets=["someone/more"])
    assert card(hub).data.extra_gated_prompt == "Promise." and card(hub).data.language == "fr"
    for words in (
        "It dreams.",
        "## Gallery\n\nPictures.",
        "Ask it nicely.\n\nAfter `pip install casa_hf`:\n\n```python",
        "- my data, all of 2025\n- [s",
    ):
        assert words in card(hub).text
    assert card(hub).data.datasets == ["someone/more"]


def test_training_data_stay_known(hub: Hub, trained: Path) -> None:
    push_checkpoint(trained, NAME, datasets=["my data"])
    push_checkpoint(trained, NAME)
    assert "## Training data\n\n- my data\n" in card(hub).text
    report = push_checkpoint(trained, NAME, datasets=["my", "my data"])
    assert "## Training data\n\n- my data\n- my\n" in card(hub).text and report.card_changes == ("Training data",)


def test_what_was_generated_follows_the_model(hub: Hub, source_folder: Path, trained: Path, tmp_path: Path) -> None:
    """Another source, another design, code: the statements that nobody has edited follow."""
    set_origin(trained, "someone/first", "apache-2.0")
    push_checkpoint(trained, NAME, with_code=True)
    assert card(hub).data.base_model == "someone/first" and "custom_code" in card(hub).data.tags
    other = convert_checkpoint(source_folder, tmp_path / "other", "ca").output
    (other / "README.md").unlink()
    set_origin(other, "someone/second", "mit")
    push_checkpoint(other, NAME)
    text = hub.files(NAME)["README.md"].decode()
    assert "someone/first" not in text and "apache-2.0" not in text and "trust_remote_code" not in text
    assert card(hub).data.base_model == "someone/second" and card(hub).data.license == "mit"
    assert "Inherited from `someone/second`: mit" in text and "Variant `ca`" in text and "Variant `casa`" not in text
    assert card(hub).data.tags == ["casa"]
    assert titles(hub) == ["Usage", "Licence", "Citation"]


def test_a_licence_that_somebody_chose_stays(hub: Hub, trained: Path) -> None:
    set_origin(trained, "someone/first", "apache-2.0")
    push_checkpoint(trained, NAME)
    edit(hub, "license: apache-2.0", "license: other\nlicense_name: mine\nlicense_link: TERMS.md")
    hub.edit(NAME, TERMS="Ask me.\n")
    set_origin(trained, "someone/second", "mit")
    push_checkpoint(trained, NAME)
    data = card(hub).data.to_dict()
    assert data["license_name"] == "mine" and data["license_link"] == "TERMS.md"
    assert data["base_model"] == "someone/second"


def test_the_card_of_the_branch_counts(hub: Hub, trained: Path) -> None:
    """Of a new one, that of the branch it starts from; and the code names the branch."""
    push_checkpoint(trained, NAME)
    edit(hub, "\n## Usage", "\nOn main.\n\n## Usage")
    push_checkpoint(trained, NAME, revision="v2/beta")
    assert "On main." in card(hub, "v2/beta").text and 'revision="v2/beta"' in card(hub, "v2/beta").text
    edit(hub, "On main.", "On the branch.", "v2/beta")
    push_checkpoint(trained, NAME, revision="v2/beta", datasets=["my data"])
    assert "On the branch." in card(hub, "v2/beta").text and "On main." not in card(hub, "v2/beta").text
    assert "On main." in card(hub).text and "revision" not in card(hub).text


def test_what_is_untrained_ends_with_training(hub: Hub, converted: Path, trained: Path) -> None:
    """Where the weights have changed; what is saved without training keeps it."""
    push_checkpoint(converted, NAME)
    untrained = converted.with_name("saved")
    shutil.copytree(trained, untrained)
    shutil.copy(converted / "model.safetensors", untrained)
    assert not push_checkpoint(untrained, NAME).card_changes and "What is untrained" in titles(hub)
    report = push_checkpoint(trained, NAME)
    assert report.card_changes == ("What is untrained",) and "ntrained" not in card(hub).text


# ---------------------------------------------------------------- a folder with a card


def test_the_converters_card_takes_nothing_back(hub: Hub, converted: Path) -> None:
    """A model that was trained and saved into the folder of its conversion."""
    push_checkpoint(converted, NAME)
    fine_tuned(converted, converted, steps=1)
    push_checkpoint(converted, NAME, datasets=["my data"])
    edit(hub, "\n## Usage", "\n## Gallery\n\nIt dreams.\n\n## Usage")
    push_checkpoint(converted, NAME)
    assert "- my data" in card(hub).text and "ntrained" not in card(hub).text and "It dreams." in card(hub).text


def test_the_converters_card_is_older_than_trained_weights(hub: Hub, converted: Path) -> None:
    push_checkpoint(converted, NAME)
    fine_tuned(converted, converted, steps=1)
    assert push_checkpoint(converted, NAME).card_changes == ("What is untrained",)
    with pytest.raises(PublishingError, match=r"different things \(What is untrained\)"):
        push_checkpoint(converted, NAME)


@pytest.mark.parametrize("choice", ["hub", "folder"])
def test_another_conversion_is_untrained_too(hub: Hub, source_folder: Path, tmp_path: Path, choice: str) -> None:
    """Of a source whose weights have changed: the section is the same, and true."""
    source = Path(shutil.copytree(source_folder, tmp_path / "source"))
    push_checkpoint(convert_checkpoint(source, tmp_path / "first").output, NAME)
    weights = load_file(source / "model.safetensors")
    for tensor in weights.values():
        tensor += 0.1
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    push_checkpoint(convert_checkpoint(source, tmp_path / "second").output, NAME, card=choice)
    assert "What is untrained" in titles(hub)


def test_the_folders_card_to_prefer_is_of_its_weights(hub: Hub, converted: Path, trained: Path) -> None:
    """Also where it was converted by the same command."""
    push_checkpoint(converted, NAME)
    shutil.copy(trained / "model.safetensors", converted / "model.safetensors")
    push_checkpoint(converted, NAME, card="folder")
    assert "What is untrained" in titles(hub)
    push_checkpoint(trained, NAME, card="folder")
    assert "What is untrained" in titles(hub)  # the weights are the same
    with (trained / "README.md").open("w") as file:
        file.write("# Trained\n")
    fine_tuned(trained, trained, steps=2)
    push_checkpoint(trained, NAME, card="folder")
    assert "What is untrained" not in titles(hub)


def test_sections_of_one_title(hub: Hub, converted: Path) -> None:
    """All are kept; those that only one of the cards has are paired in order."""
    readme = converted / "README.md"
    first, second = "## Example\n\nFirst.\n", "## Example\n\nSecond.\n"
    card_text = readme.read_text()
    hub.create(NAME, files={"README.md": b"---\nlicense: mit\n---\n# x\n\nHand.\n"})
    readme.write_text(f"{card_text}\n{first}\n{second}")
    push_checkpoint(converted, NAME, card="folder")
    assert f"{first}\n{second}" in card(hub).text
    assert not push_checkpoint(converted, NAME, card="folder").changed
    third = first.replace("First", "Third")
    readme.write_text(f"{card_text}\n{second}\n{third}")
    with pytest.raises(PublishingError, match=r"\(Example\)"):
        push_checkpoint(converted, NAME)
    report = push_checkpoint(converted, NAME, card="folder")
    assert f"{third}\n{second}" in card(hub).text and "First." not in card(hub).text
    assert report.card_changes == ("Example",)


def test_both_cards_are_kept_where_they_agree(hub: Hub, converted: Path) -> None:
    """Something new on each side; the same again is no commit."""
    push_checkpoint(converted, NAME)
    edit(hub, "\n## Usage", "\n## Gallery\n\nPictures.\n\n## Usage")
    readme = (converted / "README.md").read_text()
    (converted / "README.md").write_text(readme.replace("tags:\n", "language: fr\ntags:\n- dreams\n"))
    push_checkpoint(converted, NAME)
    assert "Pictures." in card(hub).text and card(hub).data.language == "fr" and "dreams" in card(hub).data.tags
    assert not push_checkpoint(converted, NAME).changed


CHANGES = {
    "section": ("## How it was made\n", "## How it was made\n\nAt night.\n", "## How it was made\n\nBy day.\n"),
    "introduction": ("\n## What", "\nAt night.\n\n## What", "\nBy day.\n\n## What"),
    "field": ("library_name", "language: fr\nlibrary_name", "language: en\nlibrary_name"),
}


def words(change: str) -> str:
    return next(word for word in ("At night.", "By day.", "language: fr", "language: en") if word in change)


@pytest.mark.parametrize("part", CHANGES)
@pytest.mark.parametrize("choice", ["hub", "folder"])
def test_cards_that_contradict_each_other(
    hub: Hub, converted: Path, part: str, choice: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused before anything is sent; whoever says which counts gets that, and the rest of the other."""
    old, theirs, mine = CHANGES[part]
    push_checkpoint(converted, NAME)
    edit(hub, old, theirs)
    edit(hub, "\n## Usage", "\n## Gallery\n\nPictures.\n\n## Usage")
    file = converted / "README.md"
    file.write_text(file.read_text().replace(old, mine))
    before, uploads = hub.files(NAME), len(hub.uploaded)
    fine_tuned(converted, converted, steps=1)
    named = {"section": "How it was made", "introduction": "before the first section", "field": "language"}[part]
    with pytest.raises(PublishingError, match="--card folder") as caught:
        push_checkpoint(converted, NAME, revision="new")
    assert named in str(caught.value) and "\n" not in str(caught.value)
    assert hub.files(NAME) == before and len(hub.uploaded) == uploads
    assert list(hub.repositories[NAME].branches) == ["main"]

    with pytest.raises(SystemExit) as ended:
        main(["push", str(converted), NAME, "--card", choice])
    assert not ended.value.code
    kept, lost = (theirs, mine) if choice == "hub" else (mine, theirs)
    text = hub.files(NAME)["README.md"].decode()
    assert words(kept) in text and words(lost) not in text
    assert "Pictures." in text
    shown = capsys.readouterr().out
    assert (named in shown) == (choice == "folder")
    # Both cards say that, so the command can't tell whether it is older than the weights, unless it is told.
    assert ("What is untrained" in shown) == (choice == "hub")


def test_a_section_that_was_removed_on_the_hub_does_not_come_back(hub: Hub, converted: Path) -> None:
    """The command of the conversion may show paths that nobody is to see."""
    push_checkpoint(converted, NAME)
    text = hub.files(NAME)["README.md"].decode()
    hub.edit(NAME, README=re.sub(r"## How it was made\n.*?(?=## Usage)", "", text, flags=re.DOTALL))
    with pytest.raises(PublishingError, match="How it was made"):
        push_checkpoint(converted, NAME)
    push_checkpoint(converted, NAME, card="hub")
    assert "How it was made" not in card(hub).text


def test_a_card_to_prefer_that_is_none(hub: Hub, converted: Path) -> None:
    with pytest.raises(PublishingError, match=r"card='mine'.*\"folder\" or \"hub\""):
        push_checkpoint(converted, NAME, card="mine")  # type: ignore[arg-type]
    assert hub.requests == []


def test_a_broken_card_on_the_hub(hub: Hub, trained: Path) -> None:
    hub.create(NAME, files={"README.md": b"---\nlicense: [\n---\n"})
    with pytest.raises(PublishingError, match=rf"front matter of the README.md of {NAME}.*Correct it"):
        push_checkpoint(trained, NAME)


def test_a_card_on_the_hub_that_is_not_utf8(hub: Hub, trained: Path) -> None:
    hub.create(NAME, files={"README.md": b"# Ma\xe7on\n"})
    with pytest.raises(PublishingError, match=rf"the README.md of {NAME} isn't encoded as UTF-8") as caught:
        push_checkpoint(trained, NAME)
    assert "connection" not in str(caught.value) and not hub.uploaded
    assert hub.files(NAME)["README.md"] == b"# Ma\xe7on\n"


def test_somebody_edits_the_card_meanwhile(hub: Hub, trained: Path) -> None:
    push_checkpoint(trained, NAME)

    def edit_now() -> None:
        hub.before_commit = None
        edit(hub, "\n## Usage", "\nIt dreams.\n\n## Usage")

    hub.before_commit = edit_now
    with pytest.raises(PublishingError, match="was changed during the upload"):
        push_checkpoint(trained, NAME, datasets=["my data"])
    push_checkpoint(trained, NAME, datasets=["my data"])
    assert "It dreams." in card(hub).text and "my data" in card(hub).text


# ---------------------------------------------------------------- Transformers' own card


def test_transformers_template_says_nothing(hub: Hub, trained: Path) -> None:
    """What other objects' push_to_hub leaves gives way, except for its metadata."""
    model = CasaForConditionalGeneration.from_pretrained(trained)
    model.generation_config.push_to_hub(NAME, tags=["own"])
    assert "More Information Needed" in card(hub).text
    push_checkpoint(trained, NAME)
    assert "More Information Needed" not in card(hub).text and titles(hub) == ["Usage", "Licence", "Citation"]
    assert card(hub).data.tags == ["own", "casa"]
