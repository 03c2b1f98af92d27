# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""A repository's card when something is pushed there: our part is written anew, the rest of it stays."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from casa_hf import CasaConfig, CheckpointError, convert_checkpoint, push_checkpoint
from casa_hf.cli import main
from casa_hf.hub.origins import Origin, origin_records
from tests.hub.helpers import fine_tuned, with_words
from tests.hub.loopback import Hub

NAME = "me/tiny-casa"
WORDS = {"before": "It dreams.", "after": "## Gallery\n\nPictures.", "fields": "extra_gated_prompt: Promise.\n"}


@pytest.fixture
def trained(casa_folder: Path, tmp_path: Path) -> Path:
    """A checkpoint as training leaves it, without a card."""
    fine_tuned(casa_folder, tmp_path / "trained", steps=1)
    return tmp_path / "trained"


@pytest.fixture
def converted(casa_folder: Path, tmp_path: Path) -> Path:
    """A checkpoint with the converter's card."""
    return Path(shutil.copytree(casa_folder, tmp_path / "converted"))


def readme(hub: Hub, branch: str = "main") -> str:
    return hub.files(NAME, branch)["README.md"].decode()


def card(hub: Hub, branch: str = "main") -> ModelCard:
    return ModelCard(readme(hub, branch))


def titles(hub: Hub) -> list[str]:
    return re.findall("^## (.*)$", card(hub).text, re.MULTILINE)


def set_origin(folder: Path, name: str, license: str) -> None:
    config = CasaConfig.from_pretrained(folder)
    config.source_origins = origin_records([(Origin(name, True), {"license": license})])
    config.save_pretrained(folder)


def assert_has_words(found: ModelCard) -> None:
    assert "It dreams." in found.text and found.text.rstrip().endswith("## Gallery\n\nPictures.")
    assert found.data.extra_gated_prompt == "Promise."


@pytest.mark.parametrize("kind", ["trained", "converted"])
def test_what_people_write_stays(hub: Hub, request: pytest.FixtureRequest, kind: str) -> None:
    """Text around our part and metadata, whether the folder has a card or not; the same again is no commit."""
    folder = request.getfixturevalue(kind)
    push_checkpoint(folder, NAME, datasets=["my data"])
    hub.edit(NAME, README=with_words(readme(hub), **WORDS))
    push_checkpoint(folder, NAME)
    assert_has_words(card(hub))
    report = push_checkpoint(folder, NAME)
    assert not report.changed and not report.card_changes
    push_checkpoint(folder, NAME, datasets=["someone/more"])
    assert_has_words(card(hub))
    assert "## Training data\n\n- [someone/more](https://huggingface.co/datasets/someone/more)\n" in card(hub).text
    assert card(hub).data.datasets == ["someone/more"] and "ntrained" not in card(hub).text


def test_words_inside_our_part_go(hub: Hub, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As its comments say; the command names what has changed."""
    push_checkpoint(trained, NAME)
    before = readme(hub)
    hub.edit(NAME, README=before.replace("\n## Usage\n", "\n## Usage\n\nAsk it nicely.\n").replace("# tiny", "# Tiny"))
    with pytest.raises(SystemExit) as ended:
        main(["push", str(trained), NAME])
    assert not ended.value.code
    assert readme(hub) == before.replace("# tiny", "# Tiny")
    assert "changed in the model card: Usage\n" in capsys.readouterr().out


def test_training_data_are_those_of_the_push(hub: Hub, trained: Path) -> None:
    push_checkpoint(trained, NAME, datasets=["my data"])
    assert "## Training data\n\n- my data\n" in card(hub).text
    report = push_checkpoint(trained, NAME, datasets=["my", "data"])
    assert "## Training data\n\n- my\n- data\n" in card(hub).text and report.card_changes == ("Training data",)
    report = push_checkpoint(trained, NAME)
    assert "Training data" not in card(hub).text and report.card_changes == ("Training data",)


def test_our_part_follows_the_model(hub: Hub, source_folder: Path, trained: Path, tmp_path: Path) -> None:
    """Another source, another design, code; the front matter stays, and `--card folder` replaces that too."""
    set_origin(trained, "someone/first", "apache-2.0")
    push_checkpoint(trained, NAME, with_code=True)
    assert card(hub).data.base_model == "someone/first" and "custom_code" in card(hub).data.tags
    other = convert_checkpoint(source_folder, tmp_path / "other", "ca").output
    (other / "README.md").unlink()
    set_origin(other, "someone/second", "mit")
    push_checkpoint(other, NAME)
    text = card(hub).text
    assert "someone/first" not in text and "apache-2.0" not in text and "trust_remote_code" not in text
    assert "Inherited from `someone/second`: mit" in text and "Variant `ca`" in text and "Variant `casa`" not in text
    assert card(hub).data.base_model == "someone/first" and card(hub).data.tags == ["casa"]
    assert titles(hub) == ["Usage", "Licence", "Citation"]
    push_checkpoint(other, NAME, card="folder")
    assert card(hub).data.base_model == "someone/second" and card(hub).data.license == "mit"


def test_a_licence_that_somebody_chose_stays(hub: Hub, trained: Path) -> None:
    set_origin(trained, "someone/first", "apache-2.0")
    push_checkpoint(trained, NAME)
    chosen = "license: other\nlicense_name: mine\nlicense_link: TERMS.md"
    hub.edit(NAME, README=readme(hub).replace("license: apache-2.0", chosen), TERMS="Ask me.\n")
    set_origin(trained, "someone/second", "mit")
    push_checkpoint(trained, NAME)
    data = card(hub).data.to_dict()
    assert data["license_name"] == "mine" and data["license_link"] == "TERMS.md"
    assert data["base_model"] == "someone/first"


def test_the_card_of_the_branch_counts(hub: Hub, trained: Path) -> None:
    """Of a new one, that of the branch it starts from; and the code names the branch."""
    push_checkpoint(trained, NAME)
    hub.edit(NAME, README=with_words(readme(hub), before="On main."))
    push_checkpoint(trained, NAME, revision="v2/beta")
    assert "On main." in card(hub, "v2/beta").text and 'revision="v2/beta"' in card(hub, "v2/beta").text
    hub.edit(NAME, "v2/beta", README=readme(hub, "v2/beta").replace("On main.", "On the branch."))
    push_checkpoint(trained, NAME, revision="v2/beta", datasets=["my data"])
    assert "On the branch." in card(hub, "v2/beta").text and "On main." not in card(hub, "v2/beta").text
    assert "On main." in card(hub).text and "revision" not in card(hub).text


def test_what_is_untrained_ends_with_training(hub: Hub, converted: Path, trained: Path) -> None:
    """Only the folder's card knows: in a folder that a model was saved to, it doesn't say so any more."""
    push_checkpoint(converted, NAME)
    assert {"What is untrained", "How it was made"} <= set(titles(hub))
    report = push_checkpoint(trained, NAME)
    assert report.card_changes == ("What is untrained", "How it was made") and "ntrained" not in card(hub).text
    push_checkpoint(converted, NAME)
    assert "What is untrained" in titles(hub)
    fine_tuned(converted, converted, steps=1)
    push_checkpoint(converted, NAME)
    assert "ntrained" not in card(hub).text


def test_the_folders_card_replaces_all(
    hub: Hub, converted: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its own, or one that is made for it where it has none."""
    push_checkpoint(trained, NAME, datasets=["my data"])
    hub.edit(NAME, README=with_words(readme(hub), **WORDS))
    written = (converted / "README.md").read_text()
    (converted / "README.md").write_text(with_words(written, after="## Mine\n\nBy hand.", fields="language: fr\n"))
    push_checkpoint(converted, NAME)
    assert "By hand." not in card(hub).text and card(hub).data.language == "fr"  # which the other card lacked
    with pytest.raises(SystemExit) as ended:
        main(["push", str(converted), NAME, "--card", "folder"])
    assert not ended.value.code
    assert "the text around our part" in capsys.readouterr().out
    text = readme(hub)
    assert "dreams" not in text and "Promise" not in text and "my data" not in text and "By hand." in text
    assert "What is untrained" in titles(hub)
    report = push_checkpoint(trained, NAME, card="folder")
    assert "By hand." not in readme(hub) and titles(hub) == ["Usage", "Licence", "Citation"]
    assert {"language", "What is untrained", "How it was made"} <= set(report.card_changes)


def test_a_card_to_prefer_that_is_none(hub: Hub, converted: Path) -> None:
    with pytest.raises(CheckpointError, match=r"card='hub' is unknown. Give 'folder'"):
        push_checkpoint(converted, NAME, card="hub")  # type: ignore[arg-type]
    assert hub.requests == []


def test_a_broken_card_on_the_hub(hub: Hub, trained: Path) -> None:
    """Is refused, unless it gives way."""
    hub.create(NAME, files={"README.md": b"---\nlicense: [\n---\n"})
    with pytest.raises(CheckpointError, match=rf"front matter of the README.md of {NAME}.*Correct it"):
        push_checkpoint(trained, NAME)
    push_checkpoint(trained, NAME, card="folder")
    assert titles(hub) == ["Usage", "Licence", "Citation"]


def test_a_card_on_the_hub_that_is_not_utf8(hub: Hub, trained: Path) -> None:
    hub.create(NAME, files={"README.md": b"# Ma\xe7on\n"})
    with pytest.raises(CheckpointError, match=rf"the README.md of {NAME} is not UTF-8 text") as caught:
        push_checkpoint(trained, NAME)
    assert "connection" not in str(caught.value) and not hub.uploaded
    assert hub.files(NAME)["README.md"] == b"# Ma\xe7on\n"


def test_somebody_edits_the_card_meanwhile(hub: Hub, trained: Path) -> None:
    push_checkpoint(trained, NAME)

    def edit_now() -> None:
        hub.before_commit = None
        hub.edit(NAME, README=with_words(readme(hub), before="It dreams."))

    hub.before_commit = edit_now
    with pytest.raises(CheckpointError, match="was changed during the upload"):
        push_checkpoint(trained, NAME, datasets=["my data"])
    push_checkpoint(trained, NAME, datasets=["my data"])
    assert "It dreams." in card(hub).text and "my data" in card(hub).text
