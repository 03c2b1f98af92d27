# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Transformers' Trainer: its checkpoints hold the processor, and `push_to_hub=True` publishes both."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

from casa_hf import CasaForConditionalGeneration, CasaProcessor, CheckpointError, push_checkpoint
from casa_hf.training import CasaDataCollator, CasaTrainer
from tests.hub.conftest import empty_cache
from tests.hub.helpers import SAMPLES, logits, sample, with_words
from tests.hub.loopback import BLIND, WRITER, Hub
from tests.training.helpers import CONVERSATIONS, load_processor

pytest.importorskip("accelerate")


def test_push_to_hub(hub: Hub, casa_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processor = CasaProcessor.from_pretrained(casa_folder)
    model = CasaForConditionalGeneration.from_pretrained(casa_folder)
    batches = [sample(processor, *example) for example in SAMPLES[:2]]

    def collate(batch: list[Any]) -> dict[str, torch.Tensor]:
        return dict(batch[0])

    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=2,
        save_steps=1,
        learning_rate=1e-2,
        per_device_train_batch_size=1,
        remove_unused_columns=False,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        push_to_hub=True,
        hub_model_id="me/trained",
        hub_strategy="end",
    )
    trainer = Trainer(
        model=model, args=arguments, train_dataset=batches, data_collator=collate, processing_class=processor
    )
    trainer.train()
    trainer.push_to_hub()
    expected = logits(model, processor)

    for folder in ("checkpoint-1", "checkpoint-2"):
        AutoProcessor.from_pretrained(tmp_path / "out" / folder)
    resumed = CasaForConditionalGeneration.from_pretrained(tmp_path / "out" / "checkpoint-2")
    assert torch.equal(logits(resumed, CasaProcessor.from_pretrained(tmp_path / "out" / "checkpoint-2")), expected)

    empty_cache(tmp_path / "empty", monkeypatch)
    loaded = AutoModelForImageTextToText.from_pretrained("me/trained")
    assert torch.equal(logits(loaded, AutoProcessor.from_pretrained("me/trained")), expected)

    # The command completes the Trainer's card, and leaves optimizer states at home.
    report = push_checkpoint(tmp_path / "out" / "checkpoint-2", "me/from-checkpoint")
    assert "optimizer.pt" in report.left_out and "trainer_state.json" in report.left_out
    assert torch.equal(logits(AutoModelForImageTextToText.from_pretrained("me/from-checkpoint"), processor), expected)
    push_checkpoint(tmp_path / "out", "me/trained")
    card = ModelCard(hub.files("me/trained")["README.md"].decode())
    assert {"generated_from_trainer", "casa"} <= set(card.data.tags)
    assert "learning_rate: 0.01" in card.text and 'from_pretrained("me/trained")' in card.text
    assert "as a CASA model: images stay out" in card.text
    assert not push_checkpoint(tmp_path / "out", "me/trained").changed


def test_casa_trainer(hub: Hub, casa_folder: Path, tmp_path: Path) -> None:
    """Its card is one of a CASA model; a second run brings its figures, and leaves what somebody wrote."""
    name = "me/trained"
    push_checkpoint(casa_folder, name)

    def run(rate: float, **options: Any) -> ModelCard:
        trainer = casa_trainer(casa_folder, tmp_path / "out", learning_rate=rate, **options)
        trainer.train()
        trainer.push_to_hub()
        return ModelCard(hub.files(name)["README.md"].decode())

    card = run(0.01)
    assert {"generated_from_trainer", "casa"} <= set(card.data.tags) and card.data.pipeline_tag == "image-text-to-text"
    for part in ("learning_rate: 0.01", f'from_pretrained("{name}")', "Variant `casa`", "eprint = {2512.19535}"):
        assert part in card.text
    assert "ntrained" not in card.text and "from scratch" not in card.text
    written = hub.files(name)["README.md"].decode()
    words = {"after": "## Gallery\n\nPictures.", "fields": "extra_gated_prompt: Promise.\n"}
    hub.edit(name, README=with_words(written, **words))
    card = run(0.02)
    assert "learning_rate: 0.02" in card.text and "learning_rate: 0.01" not in card.text
    assert "Pictures." in card.text and card.data.extra_gated_prompt == "Promise."
    titles = re.findall("^## (.*)$", card.text, re.MULTILINE)
    assert len(titles) == len(set(titles))
    # What it leaves in its folder is published as it is.
    report = push_checkpoint(tmp_path / "out", name)
    assert not report.changed


def test_saves_do_not_undo_edits(hub: Hub, casa_folder: Path, tmp_path: Path) -> None:
    """With the default strategy each save of a second run in the same folder goes to the Hub."""
    name, options = "me/trained", {"hub_strategy": "every_save", "save_strategy": "steps", "save_steps": 1}
    trainer = casa_trainer(casa_folder, tmp_path / "out", **options)
    trainer.train()
    trainer.push_to_hub()
    edited = with_words(hub.files(name)["README.md"].decode(), after="## Gallery\n\nPictures.")
    hub.edit(name, README=edited)
    trainer = casa_trainer(casa_folder, tmp_path / "out", **options, max_steps=2)
    trainer.train(resume_from_checkpoint=True)
    trainer._finish_current_push()
    assert hub.commits(name)[-1].message == "Training in progress, step 2"
    assert hub.files(name)["README.md"].decode() == edited
    trainer.push_to_hub()
    assert "Pictures." in hub.files(name)["README.md"].decode()


@pytest.mark.parametrize("strategy", ["every_save", "end"])
@pytest.mark.parametrize("written", ["# Mine\n", "---\ntags:\n- generated_from_trainer\n---\n\n# Earlier\n"])
def test_a_card_in_the_folder(hub: Hub, casa_folder: Path, tmp_path: Path, strategy: str, written: str) -> None:
    """A save removes what an earlier run has left, and only where it sends the folder."""
    (tmp_path / "out").mkdir()
    file = tmp_path / "out" / "README.md"
    file.write_text(written)
    saving = {"hub_strategy": strategy, "save_strategy": "steps", "save_steps": 1}
    trainer = casa_trainer(casa_folder, tmp_path / "out", **saving)
    trainer.train()
    trainer._finish_current_push()
    stays = strategy == "end" or written == "# Mine\n"
    assert (file.read_text() == written) if stays else not file.exists()
    sent = hub.files("me/trained")
    assert ("config.json" in sent) == (strategy == "every_save")
    assert ("README.md" in sent) == (stays and strategy == "every_save")


def test_the_card_of_the_branch_that_is_asked_for(
    hub: Hub, casa_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the token that is asked for: the environment's can't read the repository."""
    name = "me/trained"
    push_checkpoint(casa_folder, name)
    push_checkpoint(casa_folder, name, revision="v2")
    text = hub.files(name, "v2")["README.md"].decode()
    hub.edit(name, "v2", README=with_words(text, before="On the branch."))
    hub.repositories[name].private = True
    monkeypatch.setenv("HF_TOKEN", BLIND)
    before = hub.files(name)["README.md"]
    trainer = casa_trainer(casa_folder, tmp_path / "out", push_to_hub=False)
    trainer.train()
    trainer.push_to_hub(token=WRITER, revision="v2", tags=["asked"])
    text = hub.files(name, "v2")["README.md"].decode()
    assert "On the branch." in text and 'revision="v2"' in text and "### Training hyperparameters" in text
    assert "asked" in ModelCard(text).data.tags and hub.files(name)["README.md"] == before


def test_the_figures_of_a_run_are_in_our_part(hub: Hub, casa_folder: Path, tmp_path: Path) -> None:
    """Those of the next run take their place, in the front matter too; what stands around them stays."""
    name = "me/trained"

    def run(folder: str, rate: float, score: float | None) -> str:
        trainer = casa_trainer(casa_folder, tmp_path / folder, learning_rate=rate)
        trainer.train()
        if score is not None:
            at = {"epoch": 1.0, "step": 1}
            trainer.state.log_history[:0] = [{"loss": 1.5, **at}, {"eval_loss": score, **at}]
        trainer.push_to_hub()
        return hub.files(name)["README.md"].decode()

    first = run("first", 0.01, 0.75)
    assert "- Loss: 0.75\n" in first and "- learning_rate: 0.01\n" in first and first.count("0.75") == 2
    assert re.search(r"^\| 1\.5 .*\| 0\.75 +\|$", first, re.MULTILINE)
    # Nothing of what the Trainer leaves to be filled in.
    assert "More information needed" not in first and "This model was trained" not in first
    hub.edit(name, README=with_words(first, before="My own words.", after="Loss: 0.75, says the Trainer."))
    second = run("second", 0.02, 0.5)
    assert "My own words." in second and second.rstrip().endswith("Loss: 0.75, says the Trainer.")
    assert "- Loss: 0.5\n" in second and "- learning_rate: 0.02\n" in second and second.count("0.75") == 1
    assert re.findall("^- name: (.*)", second, re.MULTILINE) == ["trained"]  # in model-index
    third = run("third", 0.03, None)
    assert "It achieves" not in third and "- learning_rate: 0.03\n" in third and "My own words." in third
    # A push of the folder knows nothing newer.
    assert not push_checkpoint(tmp_path / "third", name).changed


@pytest.mark.parametrize("strategy", ["every_save", "end"])
def test_a_link_out_of_the_output_folder_is_not_sent(
    hub: Hub, casa_folder: Path, tmp_path: Path, strategy: str
) -> None:
    saves = {"save_strategy": "steps", "save_steps": 1} if strategy == "every_save" else {}
    trainer = casa_trainer(casa_folder, tmp_path / "out", hub_strategy=strategy, **saves)
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / "notes.txt").symlink_to(tmp_path / "secret")
    push = trainer.train if saves else trainer.push_to_hub
    with pytest.raises(CheckpointError, match=r"'notes\.txt' leads out of"):
        push()
    assert "notes.txt" not in hub.files("me/trained")


def test_another_model_stays(hub: Hub, casa_folder: Path, tmp_path: Path) -> None:
    hub.create("me/trained", files={"config.json": b'{"model_type": "llama"}'})
    with pytest.raises(ValueError, match="me/trained is taken: it holds a model of type 'llama'"):
        casa_trainer(casa_folder, tmp_path / "out")
    assert not hub.commits("me/trained")


@pytest.mark.parametrize(
    ("token", "name", "said"),
    [
        ("hf_unknown", "me/trained", "doesn't accept the token .*hf auth login"),
        (WRITER, "somebody/trained", "doesn't let you write to somebody/trained .*a token with write access"),
    ],
)
def test_what_the_hub_refuses_is_one_line(
    hub: Hub, casa_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str, name: str, said: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(CheckpointError, match=said) as caught:
        casa_trainer(casa_folder, tmp_path / "out", hub_model_id=name)
    assert "\n" not in str(caught.value) and not hub.repositories


def test_a_token_in_the_arguments_is_refused(hub: Hub, casa_folder: Path, tmp_path: Path) -> None:
    """They are saved whole, in a file that goes to the Hub."""
    with pytest.raises(ValueError, match=r"hub_token was given; expected none.*training_args\.bin.*HF_TOKEN"):
        casa_trainer(casa_folder, tmp_path / "out", hub_token=WRITER)
    assert hub.requests == [] and not (tmp_path / "out").exists()


def casa_trainer(checkpoint: Path, output: Path, **options: Any) -> CasaTrainer:
    defaults = {
        "max_steps": 1,
        "push_to_hub": True,
        "hub_model_id": "me/trained",
        "hub_strategy": "end",
        "save_strategy": "no",
    }
    arguments = TrainingArguments(
        output_dir=str(output),
        remove_unused_columns=False,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **{**defaults, **options},
    )
    processor = load_processor(checkpoint)
    return CasaTrainer(
        model=CasaForConditionalGeneration.from_pretrained(checkpoint),
        args=arguments,
        train_dataset=CONVERSATIONS[:2],
        data_collator=CasaDataCollator(processor),
        processing_class=processor,
    )
