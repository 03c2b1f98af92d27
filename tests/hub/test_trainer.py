# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Transformers' Trainer: its checkpoints hold the processor, and `push_to_hub=True` publishes both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

from casa_hf import CasaForConditionalGeneration, CasaProcessor, push_checkpoint
from tests.hub.conftest import empty_cache
from tests.hub.helpers import SAMPLES, logits, sample
from tests.hub.loopback import Hub

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


def test_push_to_hub_of_model_and_processor(hub: Hub, casa_folder: Path, tmp_path: Path) -> None:
    """Transformers' own methods, one commit each."""
    model = CasaForConditionalGeneration.from_pretrained(casa_folder)
    processor = CasaProcessor.from_pretrained(casa_folder)
    model.push_to_hub("me/by-hand")
    processor.push_to_hub("me/by-hand")
    loaded = AutoModelForImageTextToText.from_pretrained("me/by-hand")
    assert torch.equal(logits(loaded, AutoProcessor.from_pretrained("me/by-hand")), logits(model, processor))
    assert {"README.md", "generation_config.json", "processor_config.json"} <= hub.files("me/by-hand").keys()
