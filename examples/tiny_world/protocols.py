# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""How the models come about: a source that learns to read, then to see, and CASA models made from it.

- A text model learns, from scratch, to look things up in a text, and the tasks without their images.
- The source is this model with a vision tower, and learns to see with token insertion: the variant `insertion` is the
  stock model, with the same parameters.
- Protocol B (the paper's Table 3) takes the source, keeps its language model as it is, and trains the fusion layers
  and the last blocks of the vision tower.
- Protocol A (the paper's Table 2) gives the text model the tower of a model that sees, and trains each variant with
  the language model unfrozen. The tower's blocks stay as they are.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import nn
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from casa_hf import CasaForConditionalGeneration, CasaProcessor, convert_checkpoint
from casa_hf.training import freeze, parameter_groups

from .batches import Batcher
from .models import build_tokenizer, source_config, write_source
from .muon import Muon
from .training import Partner, Progress, fit
from .world import TASKS, Example, examples

Report = Callable[[Progress], None]


@dataclass(frozen=True)
class Recipe:
    """How long and how fast a model learns.

    Attributes:
        steps: of the optimizer.
        batch_size: conversations per step.
        lr: of what is trained from scratch, or of fusion layers.
        lr_existing: of trained parameters that are trained on.
        names: share of the conversations, the first ones, that ask for the name of a single object.
        lessons: share of the conversations that are lessons, at first and at last.
        taught: names of these lessons.
        tasks: names of the tasks, in turn; one that stands there twice comes twice as often.
        warmup, decay: see `fit`.
    """

    steps: int
    batch_size: int = 48
    lr: float = 2e-3
    lr_existing: float = 2e-3
    names: float = 0.0
    lessons: tuple[float, float] = (0.5, 0.1)
    taught: tuple[str, ...] = ("name", "describe", "recite")
    tasks: tuple[str, ...] = tuple(TASKS)
    warmup: float = 0.03
    decay: float = 0.5

    def at(self, lr: float) -> Recipe:
        """The same with all rates at one value."""
        return replace(self, lr=lr, lr_existing=lr)


# Looking things up in a text is learned from nothing else at first: among other lessons it doesn't come about. Then
# come the tasks without their images, for what answers look like.
TEXT = (
    Recipe(
        steps=650,
        lr=4e-3,
        lessons=(1.0, 1.0),
        taught=("recall all",),
        warmup=0.05,
        decay=0.0,
    ),
    Recipe(
        steps=900,
        lr=4e-3,
        lessons=(0.7, 0.4),
        taught=("recall all", "recall", "recall more"),
        warmup=0.04,
        decay=0.5,
    ),
)
# What the text model knows already is soon seen to be in images too; tasks that are learnt slowly come more often.
SOURCE = (
    Recipe(
        steps=1_000,
        lr=4e-3,
        names=0.06,
        lessons=(0.5, 0.25),
        taught=("describe", "recite", "recall"),
        tasks=(*TASKS, "arrows", "count", "change"),
        warmup=0.06,
        decay=0.0,
    ),
    Recipe(
        steps=1_800,
        lr=4e-3,
        lessons=(0.2, 0.05),
        taught=("describe", "recall", "colours", "seek"),
        tasks=(*TASKS, "arrows", "count", "change", "count", "change"),
        warmup=0.02,
        decay=0.7,
    ),
    Recipe(
        steps=1_200,
        lr=4e-3,
        lessons=(0.06, 0.06),
        taught=("recall", "colours", "describe"),
        tasks=(*TASKS, "count", "change", "count", "arrows", "change", "count"),
        warmup=0.02,
        decay=0.7,
    ),
)
ADAPTATION = Recipe(
    steps=1_200,
    lr=3e-3,
    lr_existing=2e-3,
    lessons=(0.25, 0.05),
    taught=("describe",),
    tasks=(*TASKS, "place", "arrows", "change", "place", "arrows", "change"),
    warmup=0.05,
    decay=0.7,
)


def curriculum(recipe: Recipe, seed: int) -> Iterator[Example]:
    """Conversations to learn from: one object at first, then tasks and, less and less often, lessons."""
    rng = Random(f"{seed} curriculum")
    tasks, lessons, names = (
        examples("train", tasks=names, seed=seed) for names in (recipe.tasks, recipe.taught, ("name",))
    )
    total = recipe.steps * recipe.batch_size
    for index in range(total):
        first, last = recipe.lessons
        share = first + (last - first) * index / total
        if index < recipe.names * total:
            yield next(names)
        else:
            yield next(lessons if rng.random() < share else tasks)


def train_source(
    folder: str | os.PathLike,
    recipes: Sequence[Recipe] = SOURCE,
    *,
    text: str | os.PathLike | None = None,
    seed: int = 0,
    blind: bool = False,
    report: Report | None = None,
    partner: Partner | None = None,
    **config: Any,
) -> Path:
    """Train the source model and write it as a Qwen2.5-VL checkpoint.

    Args:
        folder: to write.
        recipes: how, one after the other.
        text: checkpoint whose language model it starts with; from scratch by default, as its vision tower.
        seed: of the weights and of the data of the first recipe; later ones count on from it.
        blind: whether to leave out all images, for a model that knows text alone.
        report: called now and then.
        partner: the other process, if two train together.
        **config: overrides for `source_config`.
    """
    tokenizer = build_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        stock = Qwen2_5_VLForConditionalGeneration(source_config(tokenizer, **config))
    if text is not None:
        _take_language_model(stock, text)
    with tempfile.TemporaryDirectory(prefix="tiny-world-") as start:
        write_source(start, stock, tokenizer)
        model = CasaForConditionalGeneration.from_pretrained(start, casa_variant="insertion")
        batcher = Batcher(CasaProcessor.from_source(start))
    for stage, recipe in enumerate(recipes):
        train_unfrozen(model, batcher, recipe, seed=seed + stage, blind=blind, report=report, partner=partner)
    stock.load_state_dict(model.state_dict())
    return write_source(folder, stock, tokenizer)


def give_sight(text: str | os.PathLike, seeing: str | os.PathLike, folder: str | os.PathLike) -> Path:
    """Put a text model behind the vision tower of another model.

    Args:
        text: checkpoint with the language model.
        seeing: checkpoint with the vision tower.
        folder: to write; a complete Qwen2.5-VL checkpoint.
    """
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(seeing)
    _take_language_model(model, text)
    return write_source(folder, model, Qwen2Tokenizer.from_pretrained(text))


def _take_language_model(model: Qwen2_5_VLForConditionalGeneration, text: str | os.PathLike) -> None:
    reader = Qwen2_5_VLForConditionalGeneration.from_pretrained(text)
    model.model.language_model.load_state_dict(reader.model.language_model.state_dict())


def train_unfrozen(
    model: Any,
    batcher: Batcher,
    recipe: Recipe,
    *,
    seed: int = 0,
    blind: bool = False,
    report: Report | None = None,
    partner: Partner | None = None,
) -> None:
    """Train all parameters that aren't frozen, as the source and in protocol A.

    Runs of one seed see the same data in the same order.

    Args:
        model: a CASA model.
        batcher: of its processor.
        recipe: how.
        seed: of the data.
        blind, report, partner: see `train_source`.
    """
    stream = curriculum(recipe, seed)
    if blind:
        stream = (example.blind for example in stream)
    _fit(model, batcher, stream, recipe, optimizers(model, recipe.lr), report, partner)


def adapt_model(
    model: Any,
    batcher: Batcher,
    recipe: Recipe = ADAPTATION,
    *,
    seed: int = 1,
    report: Report | None = None,
    partner: Partner | None = None,
) -> None:
    """Protocol B: train what is not frozen, at two rates.

    Args:
        model: a CASA model after `casa_hf.training.freeze`.
        batcher: of its processor.
        recipe, seed, report, partner: see `train_unfrozen`.
    """
    groups = parameter_groups(model, lr_new=recipe.lr, lr_existing=recipe.lr_existing, weight_decay=0.01)
    _fit(
        model,
        batcher,
        curriculum(recipe, seed),
        recipe,
        [torch.optim.AdamW(groups, betas=(0.9, 0.98))],
        report,
        partner,
    )


def _fit(
    model: Any,
    batcher: Batcher,
    stream: Iterator[Example],
    recipe: Recipe,
    optimizers: list[torch.optim.Optimizer],
    report: Report | None,
    partner: Partner | None,
) -> None:
    fit(
        model,
        batcher,
        stream,
        optimizers,
        steps=recipe.steps,
        batch_size=recipe.batch_size,
        warmup=recipe.warmup,
        decay=recipe.decay,
        on_progress=report,
        partner=partner,
    )


def optimizers(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, which learns in fewer steps, and AdamW for the rest of what trains."""
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        (matrices if parameter.ndim == 2 and "embed_tokens" not in name else rest).append(parameter)
    return [
        Muon(matrices, lr, weight_decay=0.02),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def adapt(
    source: str | os.PathLike,
    folder: str | os.PathLike,
    variant: str = "casa",
    recipe: Recipe = ADAPTATION,
    *,
    seed: int = 1,
    report: Report | None = None,
    partner: Partner | None = None,
) -> Path:
    """Convert a trained source, and adapt the result by protocol B.

    Args:
        source: folder of the source.
        folder: to write; a complete CASA checkpoint.
        variant: a variant with fusion layers of its own.
        recipe, seed, report, partner: see `train_unfrozen`.
    """
    with tempfile.TemporaryDirectory(prefix="tiny-world-") as place:
        converted = convert_checkpoint(source, Path(place, "casa"), variant).output
        model = CasaForConditionalGeneration.from_pretrained(converted)
        freeze(model, "paper-qwen")
        adapt_model(
            model, Batcher(CasaProcessor.from_pretrained(converted)), recipe, seed=seed, report=report, partner=partner
        )
        model.save_pretrained(converted)
        (converted / "README.md").unlink()  # describes a model that has just been converted
        folder = Path(folder)
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(converted, folder)
    return folder
