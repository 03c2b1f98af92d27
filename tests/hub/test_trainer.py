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

from casa_hf import CasaForConditionalGeneration, CasaProcessor, push_checkpoint
from casa_hf.training import CasaDataCollator, CasaTrainer
from tests.hub.conftest import empty_cache
from tests.hub.helpers import SAMPLES, logits, sample
from tests.hub.loopback import Hub
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
    assert "from scratch" not in card.text and "as a CASA model: images stay out" in card.text
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
    assert "ntrained" not in card.text and "## How it was made" in card.text and "from scratch" not in card.text
    written = hub.files(name)["README.md"].decode().replace("\n## Usage", "\n## Gallery\n\nPictures.\n\n## Usage")
    hub.edit(name, README=written.replace("tags:", "extra_gated_prompt: Promise.\ntags:", 1))
    card = run(0.02)
    assert "learning_rate: 0.02" in card.text and "learning_rate: 0.01" not in card.text
    assert "Pictures." in card.text and card.data.extra_gated_prompt == "Promise."
    titles = re.findall("^## (.*)$", card.text, re.MULTILINE)
    assert len(titles) == len(set(titles))
    # What it leaves in its folder is published as it is.
    report = push_checkpoint(tmp_path / "out", name)
    assert not report.changed


def casa_trainer(checkpoint: Path, output: Path, **options: Any) -> CasaTrainer:
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=1,
        remove_unused_columns=False,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        push_to_hub=True,
        hub_model_id="me/trained",
        hub_strategy="end",
        save_strategy="no",
        **options,
    )
    processor = load_processor(checkpoint)
    return CasaTrainer(
        model=CasaForConditionalGeneration.from_pretrained(checkpoint),
        args=arguments,
        train_dataset=CONVERSATIONS[:2],
        data_collator=CasaDataCollator(processor),
        processing_class=processor,
    )
