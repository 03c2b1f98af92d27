# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Training and evaluation on the tasks: one loop for all models."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import nn

from .batches import IGNORED, Batcher
from .world import TASKS, Example


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Attributes:
        step, steps: steps of the optimizer, done and in all.
        loss: mean over the answer tokens of the last steps.
        seconds_left: estimate.
    """

    step: int
    steps: int
    loss: float
    seconds_left: float


def fit(
    model: nn.Module,
    batcher: Batcher,
    stream: Iterator[Example],
    optimizers: Sequence[torch.optim.Optimizer],
    *,
    steps: int,
    batch_size: int = 64,
    warmup: float = 0.03,
    decay: float = 0.5,
    on_progress: Callable[[Progress], None] | None = None,
    every: int = 50,
) -> None:
    """Train on a stream of examples; no picture comes twice.

    The rate rises linearly during `warmup`, a share of the steps, stays, and falls linearly to zero during `decay`.

    Args:
        model: a CASA model; parameters that need no gradient stay as they are.
        batcher: of the model's processor.
        stream: examples, at least `steps * batch_size`.
        optimizers: over the parameters, at the highest rate.
        steps: of the optimizers.
        batch_size: examples per step.
        on_progress: called after each `every` steps.
    """
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: trapezoid(step, steps, warmup, decay))
        for optimizer in optimizers
    ]
    model.train()
    started, total, tokens = time.monotonic(), 0.0, 0
    for step in range(1, steps + 1):
        answered, loss = _gradients(model, batcher, list(islice(stream, batch_size)))
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        total, tokens = total + loss, tokens + answered
        if on_progress is not None and (step % every == 0 or step == steps):
            left = (time.monotonic() - started) / step * (steps - step)
            on_progress(Progress(step, steps, total / tokens, left))
            total, tokens = 0.0, 0
    model.eval()


def trapezoid(step: int, steps: int, warmup: float, decay: float) -> float:
    """The share of the highest rate."""
    rise = (step + 1) / max(1, round(warmup * steps))
    fall = (steps - step) / max(1, round(decay * steps))
    return min(1.0, rise, fall)


def _gradients(model: Any, batcher: Batcher, examples: list[Example]) -> tuple[int, float]:
    """Add the gradients of the mean loss over all answer tokens; their number and the sum of their losses."""
    # Short and long conversations apart, since padding costs as much as text.
    examples = sorted(examples, key=lambda example: len(batcher.encode(example)[0]))
    middle = len(examples) // 2
    batches = [batcher(half) for half in (examples[:middle], examples[middle:]) if half]
    answered = sum(int((batch["labels"] != IGNORED).sum()) for batch in batches)
    total = 0.0
    for batch in batches:
        loss = model(**batch, use_cache=False, num_items_in_batch=answered).loss
        loss.backward()
        total += float(loss.detach()) * answered
    return answered, total


@torch.no_grad()
def answers_right(model: Any, batcher: Batcher, examples: Iterable[Example], batch_size: int = 64) -> list[bool]:
    """Whether greedy decoding would give the answer of each example, to its end.

    A model says what it is asked to say exactly if each token of the answer is the most likely one after those before
    it; so one pass over question and answer tells, without decoding.

    Args:
        examples: with one question each.
    """
    model.eval()
    right: list[bool] = []
    examples = iter(examples)
    while chunk := list(islice(examples, batch_size)):
        batch = batcher(chunk)
        labels = batch.pop("labels")[:, 1:]
        predicted = model(**batch, use_cache=False).logits[:, :-1].argmax(-1)
        right += ((predicted == labels) | (labels == IGNORED)).all(-1).tolist()
    return right


@dataclass(frozen=True)
class Scores:
    """Shares of right answers.

    Attributes:
        by_size: of each task and size.
        questions: number of questions in all.
    """

    by_size: dict[tuple[str, int], float]
    questions: int

    @classmethod
    def of(cls, examples: Sequence[Example], right: Sequence[bool]) -> Scores:
        """From questions and whether they were answered rightly."""
        found: dict[tuple[str, int], list[bool]] = defaultdict(list)
        for example, is_right in zip(examples, right, strict=True):
            found[example.task, example.size].append(is_right)
        return cls({key: sum(values) / len(values) for key, values in found.items()}, len(examples))

    @property
    def by_task(self) -> dict[str, float]:
        """The mean over the sizes of each task."""
        found: dict[str, list[float]] = defaultdict(list)
        for (task, _), score in self.by_size.items():
            found[task].append(score)
        return {task: sum(scores) / len(scores) for task, scores in found.items()}

    @property
    def overall(self) -> float:
        """The mean over the tasks."""
        return sum(self.by_task.values()) / len(self.by_task)


def evaluate(model: Any, batcher: Batcher, examples: Sequence[Example]) -> Scores:
    """Ask a model and count."""
    return Scores.of(examples, answers_right(model, batcher, examples))


def chance(examples: Sequence[Example]) -> Scores:
    """What guessing gives."""
    sizes = {(example.task, example.size) for example in examples}
    return Scores({(task, size): TASKS[task].chance(size) for task, size in sorted(sizes)}, len(examples))
