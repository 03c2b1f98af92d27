# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Transformers' own `push_to_hub` of model and processor: the card says what the model is, and stays what it is."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.integrations.peft import MIN_PEFT_VERSION

import casa_hf
from casa_hf import CasaForConditionalGeneration, CasaProcessor, CheckpointError, push_checkpoint
from casa_hf.hub.origins import Origin, origin_records
from casa_hf.publishing_hook import PublishingHook
from tests.hub.helpers import fine_tuned, logits, with_words
from tests.hub.loopback import Hub, Refused

NAME = "me/by-hand"


@pytest.fixture
def model(casa_folder: Path) -> Any:
    """Of a source on the Hub."""
    model = CasaForConditionalGeneration.from_pretrained(casa_folder)
    model.config.source_origins = origin_records([(Origin("Qwen/source", True), {"license": "apache-2.0"})])
    return model


@pytest.fixture
def processor(casa_folder: Path) -> Any:
    return CasaProcessor.from_pretrained(casa_folder)


def readme(hub: Hub, branch: str = "main") -> str:
    return hub.files(NAME, branch)["README.md"].decode()


def assert_says_what_it_is(text: str) -> None:
    card = ModelCard(text)
    assert card.data.base_model == "Qwen/source" and card.data.base_model_relation == "finetune"
    assert card.data.license == "apache-2.0" and card.data.pipeline_tag == "image-text-to-text"
    assert "casa" in card.data.tags and "Variant `casa`" in card.text and "eprint = {2512.19535}" in card.text
    assert "More Information Needed" not in card.text


def test_the_public_classes_are_those_of_the_auto_classes(casa_folder: Path, processor: Any) -> None:
    assert type(AutoModelForImageTextToText.from_pretrained(casa_folder)) is CasaForConditionalGeneration
    assert type(AutoProcessor.from_pretrained(casa_folder)) is CasaProcessor is type(processor)
    assert CasaForConditionalGeneration is casa_hf.modeling_casa.CasaForConditionalGeneration
    assert CasaProcessor is casa_hf.processing_casa.CasaProcessor
    assert CasaForConditionalGeneration.__doc__ and CasaProcessor.__doc__


def test_without_the_hook_transformers_publishes(
    hub: Hub, model: Any, processor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the classes do that a checkpoint carries, and the model without its head."""
    assert type(casa_hf.CasaModel.publishing_hook) is PublishingHook
    for pushed in (model, processor):
        assert type(pushed.publishing_hook) is not PublishingHook
        monkeypatch.setattr(type(pushed), "publishing_hook", PublishingHook())
    model.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id=NAME)
    processor.push_to_hub(NAME)
    assert "automatically generated" in readme(hub) and "Variant `casa`" not in readme(hub)
    assert {"model.safetensors", "processor_config.json"} <= hub.files(NAME).keys()


def test_arguments_by_position(hub: Hub, model: Any, processor: Any, tmp_path: Path) -> None:
    """The repository is looked at first then too."""
    hub.create("me/taken", files={"config.json": b'{"model_type": "llama"}'})
    for save in (
        lambda: model.save_pretrained(tmp_path / "taken", True, None, True),
        lambda: processor.save_pretrained(str(tmp_path / "taken"), True),
    ):
        with pytest.raises(CheckpointError, match="taken is taken"):
            save()
    assert not (tmp_path / "taken").exists()


@pytest.mark.parametrize("first", ["model", "processor"])
def test_push_to_hub(hub: Hub, model: Any, processor: Any, first: str, capsys: pytest.CaptureFixture[str]) -> None:
    """In any order, with one commit each; the usage in the card runs as it is written."""
    for pushed in (model, processor) if first == "model" else (processor, model):
        pushed.push_to_hub(NAME)
    assert len(hub.commits(NAME)) == 2
    assert_says_what_it_is(readme(hub))
    assert {"generation_config.json", "processor_config.json", "tokenizer.json"} <= hub.files(NAME).keys()
    (usage,) = re.findall(r"^```python\n(.*?)^```", readme(hub), flags=re.MULTILINE | re.DOTALL)
    names: dict = {}
    exec(compile(usage, "README.md", "exec"), names)
    assert torch.equal(logits(names["model"], names["processor"]), logits(model, processor))
    assert names["output"].shape[1] > names["inputs"]["input_ids"].shape[1] and capsys.readouterr().out.strip()


def test_what_somebody_wrote_on_the_hub_stays(hub: Hub, model: Any, processor: Any) -> None:
    model.push_to_hub(NAME)
    words = {"before": "It dreams.", "after": "## Gallery\n\nPictures.", "fields": "extra_gated_prompt: Promise.\n"}
    hub.edit(NAME, README=with_words(readme(hub), **words))
    before = readme(hub)
    for pushed in (model, processor):
        pushed.push_to_hub(NAME)
        # Behind other words our part has a heading.
        assert ModelCard(readme(hub)).text.replace("## Architecture\n\n", "") == ModelCard(before).text
        assert ModelCard(readme(hub)).data.to_dict() == ModelCard(before).data.to_dict()
    model.push_to_hub(NAME, tags=["dreams"])
    assert ModelCard(readme(hub)).data.tags == ["casa", "dreams"] and "It dreams." in readme(hub)


def test_the_card_of_the_branch_counts(hub: Hub, model: Any, processor: Any) -> None:
    model.push_to_hub(NAME)
    hub.edit(NAME, README=with_words(readme(hub), before="On main."))
    model.push_to_hub(NAME, revision="v2")
    assert "On main." in readme(hub, "v2") and f'from_pretrained("{NAME}", revision="v2")' in readme(hub, "v2")
    hub.edit(NAME, "v2", README=readme(hub, "v2").replace("On main.", "On the branch."))
    hub.edit(NAME, README=readme(hub).replace("tags:", "tags:\n- main-only"))
    before = readme(hub, "v2")
    for pushed in (processor, model):
        pushed.push_to_hub(NAME, revision="v2")
        assert readme(hub, "v2") == before
    assert "On main." in readme(hub)


def test_save_pretrained_with_push(hub: Hub, model: Any, processor: Any, tmp_path: Path) -> None:
    """The folder keeps its card, what that says goes to the Hub; one without a card gets the published one."""
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "README.md").write_text("# Mine\n")
    processor.save_pretrained(str(folder), push_to_hub=True, repo_id=NAME)
    assert (folder / "README.md").read_text() == "# Mine\n" and "README.md" not in hub.files(NAME)
    model.save_pretrained(folder, push_to_hub=True, repo_id=NAME)
    assert_says_what_it_is(readme(hub))
    assert (folder / "README.md").read_text() == "# Mine\n" and "# Mine\n" in readme(hub)
    hub.edit(NAME, README=readme(hub).replace("# Mine", "# Theirs"))
    model.save_pretrained(folder, push_to_hub=True, repo_id=NAME)
    assert (folder / "README.md").read_text() == "# Mine\n" and "# Theirs\n" in readme(hub)
    model.save_pretrained(tmp_path / "other", push_to_hub=True, repo_id=NAME)
    assert (tmp_path / "other" / "README.md").read_text() == readme(hub)


def test_a_card_that_is_not_utf8(hub: Hub, model: Any, processor: Any, tmp_path: Path) -> None:
    """Neither replaced letter by letter nor overwritten, in the folder or on the Hub."""
    (tmp_path / "README.md").write_bytes(b"# Ma\xe7on\n")
    with pytest.raises(ValueError, match=r"README\.md is not UTF-8 text \(at byte 4\)"):
        model.save_pretrained(tmp_path, push_to_hub=True, repo_id=NAME)
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["README.md"]
    assert hub.requests == []
    hub.create(NAME, files={"README.md": b"# Ma\xe7on\n"})
    for push in (model.push_to_hub, processor.push_to_hub):
        with pytest.raises(CheckpointError, match=f"the README.md of {NAME} is not UTF-8 text"):
            push(NAME)
    assert hub.files(NAME)["README.md"] == b"# Ma\xe7on\n" and not hub.commits(NAME)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"README.md": b"# Ma\xe7on\n"}, f"the README.md of {NAME} is not UTF-8 text"),
        ({"config.json": b'{"model_type": "llama"}'}, f"{NAME} is taken"),
    ],
)
def test_a_name_without_a_namespace(
    hub: Hub, model: Any, processor: Any, tmp_path: Path, files: dict[str, bytes], said: str
) -> None:
    """Is one of the user's own, and looked at before anything is saved too."""
    name = NAME.rpartition("/")[2]
    hub.create(NAME, files=files)
    both, folder = (model, processor), tmp_path / name
    pushes: list[Any] = [lambda each=each: each.push_to_hub(name) for each in both]
    pushes += [lambda each=each: each.save_pretrained(folder, push_to_hub=True) for each in both]
    for push in pushes:
        with pytest.raises(CheckpointError, match=said):
            push()
    assert not folder.exists() and not hub.commits(NAME)
    hub.repositories.clear()
    for push in pushes[:2]:
        push()
    assert_says_what_it_is(readme(hub))


@pytest.mark.parametrize("broken", [b"# Ma\xe7on\n", b"---\ntags: [\n---\n"])
def test_a_broken_card_on_the_default_branch(hub: Hub, model: Any, processor: Any, broken: bytes) -> None:
    """Which Transformers reads for any branch."""
    model.push_to_hub(NAME, revision="v2")
    hub.files(NAME)["README.md"] = broken
    for each in (model, processor):
        with pytest.raises(CheckpointError, match=f"the README.md of {NAME} (is not UTF-8|can't be read)"):
            each.push_to_hub(NAME, revision="v2")


@pytest.mark.parametrize("sizes", [("50GB", "500KB"), ("500KB", "50GB")], ids=["one file first", "shards first"])
def test_weights_of_an_earlier_push_go(hub: Hub, model: Any, processor: Any, sizes: tuple[str, str]) -> None:
    """Else Transformers might load them; files of others, and weights beside a processor, stay."""
    model.push_to_hub(NAME, max_shard_size=sizes[0])
    hub.files(NAME)["adapter_model.safetensors"] = b"x"
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    model.push_to_hub(NAME, max_shard_size=sizes[1])
    processor.push_to_hub(NAME)
    loaded = CasaForConditionalGeneration.from_pretrained(NAME)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert ("model.safetensors" in hub.files(NAME)) != ("model.safetensors.index.json" in hub.files(NAME))
    assert "adapter_model.safetensors" in hub.files(NAME)


def test_pull_requests(hub: Hub, model: Any, processor: Any) -> None:
    """To a repository of somebody else, which stays as it is; another push goes on with the request."""
    theirs = "somebody/casa"
    hub.create(theirs, files={"README.md": b"# Theirs\n"})
    model.push_to_hub(theirs, create_pr=True)
    assert not hub.commits(theirs) and "model.safetensors" not in hub.files(theirs)
    card = hub.files(theirs, "refs/pr/1")["README.md"].decode()
    assert "# Theirs" in card and "Variant `casa`" in card
    model.push_to_hub(NAME)
    before = hub.files(NAME)
    processor.push_to_hub(NAME, create_pr=True)
    model.push_to_hub(NAME, revision="refs/pr/1", tags=["new"])
    assert hub.files(NAME) == before
    proposed = hub.files(NAME, "refs/pr/1")
    assert "processor_config.json" in proposed and "new" in ModelCard(proposed["README.md"].decode()).data.tags


def test_save_pretrained_into_the_converters_folder(hub: Hub, model: Any, casa_folder: Path, tmp_path: Path) -> None:
    """What its card says goes on, except for what isn't known to be true any more; the repository's card counts."""
    folder = shutil.copytree(casa_folder, tmp_path / "casa")
    written = (folder / "README.md").read_text()
    assert "## How it was made" in written and "## What is untrained" in written

    def refuse() -> None:
        raise Refused(403, "No more commits today")

    hub.before_commit = refuse
    with pytest.raises(HfHubHTTPError, match="No more commits today"):
        model.save_pretrained(folder, push_to_hub=True, repo_id=NAME)
    assert (folder / "README.md").read_text() == written
    hub.before_commit = None
    for _ in range(2):
        model.save_pretrained(folder, push_to_hub=True, repo_id=NAME)
        assert_says_what_it_is(readme(hub))
        assert "## How it was made\n\n```bash\ncasa-hf convert" in readme(hub) and "ntrained" not in readme(hub)
        kept = (folder / "README.md").read_text()
        assert kept == re.sub(r"## What is untrained\n.*?(?=## )", "", written, flags=re.DOTALL)


def test_a_folders_card_says_no_longer_what_is_untrained(model: Any, casa_folder: Path, tmp_path: Path) -> None:
    """Once a model is saved there, which may be trained; one that nobody can read is left as it is."""
    folder = shutil.copytree(casa_folder, tmp_path / "casa")
    written = (folder / "README.md").read_text()
    model.save_pretrained(folder)
    assert (folder / "README.md").read_text() == re.sub(
        r"## What is untrained\n.*?(?=## )", "", written, flags=re.DOTALL
    )
    for content in (b"# Ma\xe7on\n", b"---\nlicense: [\n---\n", b"# Mine\n\n## What is untrained\n\nAll of it.\n"):
        (folder / "README.md").write_bytes(content)
        model.save_pretrained(folder)
        assert (folder / "README.md").read_bytes() == content


def test_tags_on_a_branch(hub: Hub, model: Any) -> None:
    """Those that are asked for, whether the default branch has them or not; not its others."""
    model.push_to_hub(NAME, tags=["x", "main-only"])
    model.model_tags = None  # Transformers may remember those of a call
    model.push_to_hub(NAME, revision="v2")
    hub.edit(NAME, "v2", README=readme(hub, "v2").replace("- x\n", "").replace("- main-only\n", ""))
    model.push_to_hub(NAME, revision="v2", tags=["x"])
    assert ModelCard(readme(hub, "v2")).data.tags == ["casa", "x"]
    model.model_tags = None
    model.push_to_hub(NAME, revision="v2")
    assert ModelCard(readme(hub, "v2")).data.tags == ["casa", "x"]


@pytest.mark.parametrize("branch", ["main", "v2"])
def test_somebody_edits_the_card_meanwhile(hub: Hub, model: Any, branch: str) -> None:
    """In the last moment before the commit, which is refused; the next one keeps it, and sends the weights once."""
    revision = None if branch == "main" else branch
    model.push_to_hub(NAME, revision=revision)

    def edit() -> None:
        hub.before_commit = None
        hub.edit(NAME, branch, README=f"{readme(hub, branch)}\n## Late\n\nWritten meanwhile.\n")

    hub.before_commit = edit
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    uploads = len(hub.uploaded)
    with pytest.raises(HfHubHTTPError, match="A commit has happened since"):
        model.push_to_hub(NAME, revision=revision, tags=["new"])
    assert "- new" not in readme(hub, branch)
    model.push_to_hub(NAME, revision=revision, tags=["new"])
    text = readme(hub, branch)
    assert "## Late\n\nWritten" in text and "new" in ModelCard(text).data.tags
    assert len(hub.uploaded) == uploads + 1


@pytest.mark.parametrize("beside", [False, True])
def test_adapters(hub: Hub, casa_folder: Path, model: Any, processor: Any, beside: bool) -> None:
    """Transformers' own, which come without a configuration: the usage loads the model that they adapt, and them.

    Beside a model with its code that code stays usable, so the card goes on to say how.
    """
    peft = pytest.importorskip("peft", minversion=MIN_PEFT_VERSION)
    if beside:
        push_checkpoint(casa_folder, NAME, with_code=True)
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    model.push_to_hub(NAME)
    processor.push_to_hub(NAME)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= hub.files(NAME).keys()
    assert ("config.json" in hub.files(NAME)) == beside == ("trust_remote_code" in readme(hub))
    assert "Variant `casa`" in readme(hub) and "More Information Needed" not in readme(hub)
    if not beside:
        usage = re.findall(r"^```python\n(.*?)^```", readme(hub), flags=re.MULTILINE | re.DOTALL)[0]
        names: dict = {}
        exec(compile(usage, "README.md", "exec"), names)
        torch.testing.assert_close(logits(names["model"], names["processor"]), logits(model, processor))


def test_a_model_of_unknown_origin(hub: Hub, model: Any) -> None:
    """The method doesn't refuse it, as push does: what isn't known is left out."""
    model.config.source_origins = None
    model.push_to_hub(NAME)
    card = ModelCard(readme(hub))
    assert card.data.get("license") is None and "Variant `casa`" in card.text and "## Usage" in card.text


def test_after_the_command(hub: Hub, casa_folder: Path, tmp_path: Path) -> None:
    """What the conversion was said to lack ends with training; the rest of the command's card stays."""
    push_checkpoint(casa_folder, NAME, with_code=True)
    fine_tuned(casa_folder, tmp_path / "trained", steps=1)
    CasaForConditionalGeneration.from_pretrained(tmp_path / "trained").push_to_hub(NAME)
    assert "ntrained" not in readme(hub) and "## How it was made" not in readme(hub)


def test_the_configuration_decides(hub: Hub, model: Any, casa_folder: Path) -> None:
    """Beside code that is there, what the installed classes save doesn't name it, so the card doesn't either."""
    push_checkpoint(casa_folder, NAME, with_code=True)
    assert "trust_remote_code=True" in readme(hub)
    CasaForConditionalGeneration.from_pretrained(NAME).push_to_hub(NAME)
    assert b"auto_map" not in hub.files(NAME)["config.json"]
    assert "trust_remote_code" not in readme(hub) and "custom_code" not in ModelCard(readme(hub)).data.tags
