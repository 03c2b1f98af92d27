# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""A training run of one or several processes, started by test_distributed.py with torchrun's environment.

Usage: python -m tests.training.distributed CHECKPOINT OUTPUT MODE
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import IterableDataset
from transformers import TrainingArguments

from casa_hf.training import CasaDataCollator, CasaTrainer, freeze, generate_answers, parameter_groups
from casa_hf.training.results import save_trained
from tests.training.helpers import CONVERSATIONS, ask, load_model, load_processor

# In each step of two processes the second one gets a conversation without images.
EXAMPLES = [
    CONVERSATIONS[0],
    CONVERSATIONS[1],
    CONVERSATIONS[2],
    ask("How many people are in the second image?", "There are three people: two of them are sitting."),
]


class Stream(IterableDataset):
    """The same examples without a length."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(EXAMPLES)


STEPS = 4
RATE = 1e-2
GENERATE = {"max_new_tokens": 4, "do_sample": False}


def train_with_trainer(
    model: Any, processor: Any, output: Path, data: Any = EXAMPLES
) -> tuple[list[float], list[str], str]:
    """Losses of the steps, answers after them, and what the model was wrapped in."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    trainer = CasaTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(output / "checkpoints"),
            max_steps=STEPS,
            per_device_train_batch_size=2 // processes,
            per_device_eval_batch_size=2 // processes,
            train_sampling_strategy="sequential",
            optim="sgd",
            max_grad_norm=1.0,
            lr_scheduler_type="constant",
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            logging_steps=1,
            use_cpu=True,
            ddp_find_unused_parameters=False,
        ),
        train_dataset=data,
        eval_dataset=data,
        processing_class=processor,
        lr_new=RATE,
        lr_existing=RATE,
        generate=GENERATE,
        score=lambda answers, references: {"answers": answers},
    )
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model(str(output / "trained"))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, metrics["eval_answers"], type(trainer.model_wrapped).__name__


def train_on_stream(model: Any, processor: Any, output: Path) -> tuple[list[float], list[str], str]:
    """As `train_with_trainer`, on an iterable."""
    return train_with_trainer(model, processor, output, Stream())


def train_sharded(model: Any, processor: Any, output: Path) -> tuple[list[float], list[str], str]:
    """The same by hand on PyTorch's FSDP2, which Accelerate leaves to accelerators."""
    dist.init_process_group("gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()
    blocks = [module for module in model.modules() if type(module).__name__ in model._no_split_modules]
    mesh = init_device_mesh("cpu", (processes,))
    for module in (*blocks, model):
        fully_shard(module, mesh=mesh)
    optimizer = torch.optim.SGD(parameter_groups(model, RATE, RATE), lr=RATE)
    collator = CasaDataCollator(processor)
    losses = []
    model.train()
    for step in range(STEPS):
        batch = collator([EXAMPLES[(step * processes + rank) % len(EXAMPLES)]])
        items = (batch["labels"][:, 1:] != -100).sum()
        dist.all_reduce(items)
        loss = model(**batch, num_items_in_batch=items).loss
        (loss * processes).backward()  # gradients are averaged over the processes
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item())
    answers = generate_answers(model, processor, EXAMPLES, batch_size=2, synced_gpus=True, **GENERATE)
    wrapped = type(model).__name__
    save_sharded(model, processor, output)
    dist.barrier()
    return losses, answers, wrapped


def save_sharded(model: Any, processor: Any, output: Path) -> None:
    """Save as a run of `train` does under `accelerate launch` with FSDP2."""
    arguments = TrainingArguments(str(output / "checkpoints"), use_cpu=True, report_to="none")
    trainer = CasaTrainer(model=model, args=arguments, train_dataset=EXAMPLES, processing_class=processor)
    state = trainer.accelerator.state  # what Accelerate sets up on accelerators
    state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, FullyShardedDataParallelPlugin(fsdp_version=2)
    trainer.is_fsdp_enabled = True
    assert "SHARDED_STATE_DICT" in str(state.fsdp_plugin.state_dict_type)
    save_trained(trainer, output / "trained", output)


def main(checkpoint: Path, output: Path, mode: str) -> None:
    """Train, answer, save; the first process writes what happened too."""
    model = load_model(checkpoint, torch.float32)
    freeze(model, "paper-qwen" if model.config.new_token_ids else "paper-helium")
    train = {"trainer": train_with_trainer, "stream": train_on_stream, "fsdp2": train_sharded}[mode]
    losses, answers, wrapped = train(model, load_processor(checkpoint), output)
    if not int(os.environ.get("RANK", 0)):
        (output / "run.json").write_text(json.dumps({"losses": losses, "answers": answers, "wrapped": wrapped}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
    # Not Python's own way out: threads of gloo that are still there now and then abort it.
    sys.stdout.flush()
    os._exit(0)
