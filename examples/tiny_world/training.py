# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Training and evaluation on the tasks: one loop for all models."""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import count, islice
from typing import Any

import torch
import torch.distributed as dist
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
    partner: Partner | None = None,
) -> None:
    """Train on a stream of examples; no image comes twice.

    The rate rises linearly during `warmup`, a share of the steps, stays, and falls linearly to zero during `decay`.

    Args:
        model: a CASA model; parameters that need no gradient stay as they are.
        batcher: of the model's processor.
        stream: examples, at least `steps * batch_size`.
        optimizers: over the parameters, at the highest rate.
        steps: of the optimizers.
        batch_size: examples per step.
        on_progress: called after each `every` steps.
        partner: the other process, if two train together.
    """
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: trapezoid(step, steps, warmup, decay))
        for optimizer in optimizers
    ]
    model.train()
    with partner.together() if partner else nullcontext():
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
    """Set the gradients of the mean loss over all answer tokens; their number and the sum of their losses."""
    device = next(model.parameters()).device
    answered = sum(label != IGNORED for example in examples for label in batcher.encode(example)[1])
    examples = sorted(examples, key=lambda example: len(batcher.encode(example)[0]))
    if dist.is_initialized():
        examples = examples[dist.get_rank() :: dist.get_world_size()]
    first, second = cuts([len(batcher.encode(example)[0]) for example in examples])
    parts = [part for part in (examples[:first], examples[first:second], examples[second:]) if part]
    total = torch.zeros(1)
    for part in parts:
        batch = {name: tensor.to(device) for name, tensor in batcher(part).items()}
        loss = model(**batch, use_cache=False, num_items_in_batch=answered).loss
        loss.backward()
        total += float(loss.detach()) * answered
    if dist.is_initialized():
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
        together = torch.cat([total, *(gradient.flatten() for gradient in gradients)])
        dist.all_reduce(together)
        total, *shared = together.split([1, *(gradient.numel() for gradient in gradients)])
        for parameter, gradient in zip(trained, shared, strict=True):
            parameter.grad = gradient.view_as(parameter)
    return answered, float(total)


def cuts(lengths: Sequence[int]) -> tuple[int, int]:
    """Where to cut conversations of rising length into three batches, since padding costs as much as text.

    Returns:
        Where the second and the third batch begin, so that the padded batches together are as small as can be.
    """
    number = len(lengths)

    def padded(start: int, stop: int) -> int:
        return (stop - start) * lengths[stop - 1] if stop > start else 0

    places = [(first, second) for first in range(number + 1) for second in range(first, number + 1)]
    return min(places, key=lambda cut: padded(0, cut[0]) + padded(*cut) + padded(cut[1], number))


@dataclass(frozen=True)
class Partner:
    """One of two processes that train a model together.

    Attributes:
        rank: 0 or 1.
        store: where they meet, as `torch.distributed` takes it.
    """

    rank: int
    store: str
    _meetings: Iterator[int] = field(default_factory=count, repr=False)

    @contextmanager
    def together(self) -> Iterator[None]:
        """While this is open, gradients are shared."""
        # A meeting place serves once.
        place = f"{self.store}-{next(self._meetings)}"
        dist.init_process_group("gloo", init_method=place, rank=self.rank, world_size=2)
        try:
            yield
            dist.barrier()
        finally:
            dist.destroy_process_group()


def in_two_processes(function: Callable[..., Any], *arguments: Any) -> None:
    """Run a function that trains in two processes of one thread each, which share each step's examples.

    Matrices of this size gain little from threads. Both draw the same examples and end with the same weights.

    Args:
        function: importable; called with a `Partner` for `fit`, and the arguments.
    """
    with tempfile.TemporaryDirectory(prefix="tiny-world-") as place:
        torch.multiprocessing.spawn(_process, args=(f"file://{place}/store", function, arguments), nprocs=2)


def _process(rank: int, store: str, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
    torch.set_num_threads(1)
    function(Partner(rank, store), *arguments)


@torch.no_grad()
def answers_right(
    model: Any, batcher: Callable[..., Any], examples: Iterable[Example], batch_size: int = 64
) -> list[bool]:
    """Whether greedy decoding would give the answer of each example, to its end.

    A model says what it is asked to say exactly if each token of the answer is the most likely one after those before
    it; so one pass over question and answer tells, without decoding.

    Args:
        examples: with one question each.
    """
    model.eval()
    device = next(model.parameters()).device
    right: list[bool] = []
    examples = iter(examples)
    while chunk := list(islice(examples, batch_size)):
        batch = {name: tensor.to(device) for name, tensor in batcher(chunk).items()}
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
