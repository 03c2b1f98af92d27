# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""A run whose losses, gradients or weights are no longer finite stops, and saves nothing of that."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback, TrainingArguments

from casa_hf.training import CasaTrainer, freeze
from casa_hf.training.checkpoints import last_checkpoint
from tests.conversion.helpers import load_weights
from tests.training.helpers import CONVERSATIONS, load_model


class RateAt(TrainerCallback):
    """Sets the learning rate before the step after this many."""

    def __init__(self, steps, rate):
        self.steps, self.rate = steps, rate

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        if state.global_step == self.steps:
            for group in optimizer.param_groups:
                group["lr"] = self.rate


def trainer(casa_folder, processor, folder, callback=None, **options):
    model = load_model(casa_folder, torch.float32)
    freeze(model, "paper-qwen")
    return CasaTrainer(
        model=model,
        args=TrainingArguments(
            **{
                "output_dir": str(folder),
                "max_steps": 6,
                "per_device_train_batch_size": 1,
                "lr_scheduler_type": "constant",
                "report_to": "none",
                "disable_tqdm": True,
                "save_steps": 2,
                "save_total_limit": 1,
                "logging_steps": 1,
                **options,
            }
        ),
        train_dataset=CONVERSATIONS,
        eval_dataset=CONVERSATIONS[:1],
        processing_class=processor,
        callbacks=[callback] if callback else None,
    )


def assert_stopped(run, folder, words, steps, checkpoint):
    with pytest.raises(FloatingPointError) as stopped:
        run.train()
    said = str(stopped.value)
    assert said.startswith(words) and f"after {steps} of 6 steps" in said
    assert f"The last finite checkpoint is {checkpoint};" in said
    assert [path.name for path in folder.iterdir()] == [checkpoint.name]
    assert all(tensor.isfinite().all() for tensor in load_weights(checkpoint).values())
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert len(losses) == steps and all(0 < loss < 100 for loss in losses)


@pytest.mark.parametrize("options", [{}, {"logging_nan_inf_filter": False}, {"gradient_accumulation_steps": 3}])
def test_the_first_loss_that_is_not_finite_ends_a_run(casa_folder, processor, tmp_path, options):
    """The third step makes weights so large, though finite, that the fourth has no loss; it leaves them alone."""
    run = trainer(casa_folder, processor, tmp_path, RateAt(2, 1e30), **options)
    assert_stopped(run, tmp_path, "The loss is not finite", 3, tmp_path / "checkpoint-2")
    assert all(parameter.isfinite().all() for parameter in run.model.parameters())


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_the_first_gradient_that_is_not_finite_ends_a_run(casa_folder, processor, tmp_path, max_grad_norm):
    run = trainer(casa_folder, processor, tmp_path, max_grad_norm=max_grad_norm)
    parameter = next(parameter for parameter in run.model.parameters() if parameter.requires_grad)
    parameter.register_hook(lambda gradient: gradient / 0 if run.state.global_step == 2 else gradient)
    assert_stopped(run, tmp_path, "The norm of the gradients is not finite", 2, tmp_path / "checkpoint-2")
    assert all(parameter.isfinite().all() for parameter in run.model.parameters())


def test_weights_that_are_not_finite_are_never_saved(casa_folder, processor, tmp_path):
    """They become so in the fourth step, behind which a checkpoint is due; the one before isn't rotated away."""
    run = trainer(casa_folder, processor, tmp_path / "run", RateAt(3, 1e39))
    with pytest.raises(FloatingPointError, match=r"A weight is not finite .*after 4 of 6 steps.*checkpoint-2;"):
        run.train()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-2"]
    with pytest.raises(FloatingPointError, match="A weight is not finite"):
        run.save_model(str(tmp_path / "saved"))
    assert not (tmp_path / "saved").exists()


def test_an_evaluation_that_is_not_finite_ends_a_run(casa_folder, processor, tmp_path):
    run = trainer(casa_folder, processor, tmp_path, RateAt(3, 1e30), eval_strategy="steps", eval_steps=1)
    assert_stopped(run, tmp_path, "The loss of the evaluation is not finite", 4, tmp_path / "checkpoint-2")


def test_a_checkpoint_with_weights_that_are_not_finite_is_no_checkpoint_to_resume_from(
    casa_folder, processor, tmp_path, caplog
):
    from safetensors.torch import load_file, save_file

    run = trainer(casa_folder, processor, tmp_path, max_steps=4, save_total_limit=2)
    run.train()
    file = tmp_path / "checkpoint-4" / "model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[-1] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    last, skipped = last_checkpoint(Path(tmp_path))
    assert last == tmp_path / "checkpoint-2" and "aren't finite" in skipped[tmp_path / "checkpoint-4"]
    assert last_checkpoint(Path(tmp_path), reads_all=False) == (tmp_path / "checkpoint-4", {})
    again = trainer(casa_folder, processor, tmp_path, max_steps=5, save_total_limit=2)
    assert again.train(resume_from_checkpoint=True).global_step == 5
    assert "checkpoint-4 is incomplete" in caplog.text and "resuming from checkpoint-2" in caplog.text
