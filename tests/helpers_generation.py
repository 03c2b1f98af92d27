# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Small random models, prompts and streams for the tests of generation and caching.

A prompt is written as a list of rows; a row is a list of token ids and `Image`s, and an image stands for its two
marks. `batch` turns rows into the model's inputs. `one_shot` and `greedy` are the truth to compare with: one row at a
time, in one call, without a cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from casa_hf import CasaForConditionalGeneration
from tests.tiny import END, PAD, START, VISION, casa_config, random_tensor

VARIANTS = ("casa", "ca", "casa-shared", "ca-shared")
# The two that differ in everything: projections of their own and text keys, or neither.
MAIN = ("casa", "ca-shared")
PATCH_DIM = 3 * VISION["temporal_patch_size"] * VISION["patch_size"] ** 2


def new_model(variant: str, dtype: torch.dtype = torch.float64, seed: int = 0, **fields: Any) -> Any:
    """A model whose every parameter is random, fusion layers included; fields override the configuration's.

    No id is a placeholder of the source and none ends a sequence, so that every token may be generated.
    """
    attention = fields.pop("attn_implementation", "sdpa")
    config = casa_config(variant, **{"source_config": None, **fields})
    model = CasaForConditionalGeneration._from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(random_tensor(name, tuple(parameter.shape), seed))
    model.generation_config.eos_token_id = None
    return model.to(dtype).eval()


@cache
def shared_model(variant: str) -> Any:
    """`new_model` in float64, made once; tests must not change it."""
    return new_model(variant)


@dataclass(frozen=True)
class Image:
    """An image of `height` x `width` merged-grid units with random patches, the same for the same seed."""

    height: int
    width: int
    seed: int

    @property
    def grid(self) -> list[int]:
        return [1, 2 * self.height, 2 * self.width]

    @property
    def pixels(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(4 * self.height * self.width, PATCH_DIM, generator=generator, dtype=torch.float64)


Row = Sequence["int | Image"]


def words(count: int, seed: int) -> list[int]:
    """`count` random tokens that aren't marks."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 50, (count,), generator=generator).tolist()


def token_ids(row: Row) -> list[int]:
    return [i for part in row for i in ([START, END] if isinstance(part, Image) else [part])]


def images_of(rows: Iterable[Row]) -> list[Image]:
    return [part for row in rows for part in row if isinstance(part, Image)]


def image_inputs(images: Sequence[Image]) -> dict[str, torch.Tensor]:
    if not images:
        return {}
    return {
        "pixel_values": torch.cat([image.pixels for image in images]),
        "image_grid_thw": torch.tensor([image.grid for image in images]),
    }


def batch(*rows: Row, side: str = "left") -> dict[str, torch.Tensor]:
    """Inputs of `forward` and `generate` for rows of different lengths."""
    longest = max(len(token_ids(row)) for row in rows)
    ids, mask = [], []
    for row in map(token_ids, rows):
        padding = longest - len(row)
        ids.append([PAD] * padding + row if side == "left" else row + [PAD] * padding)
        mask.append([0] * padding + [1] * len(row) if side == "left" else [1] * len(row) + [0] * padding)
    return {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.tensor(mask),
        **image_inputs(images_of(rows)),
    }


def embedded(model: Any, *rows: Row) -> dict[str, torch.Tensor]:
    """The same as `batch`, with `inputs_embeds` in place of ids."""
    inputs = batch(*rows)
    ids = inputs.pop("input_ids")
    places = [[r, i + ids.shape[1] - len(token_ids(row))] for r, row in enumerate(rows) for i in image_places(row)]
    if places:
        inputs["image_positions"] = torch.tensor(places)
    return {**inputs, "inputs_embeds": model.get_input_embeddings()(ids).detach()}


def image_places(row: Row) -> list[int]:
    """Index of the token that each image precedes; ids in the row that look like marks don't count."""
    places, length = [], 0
    for part in row:
        length += 2 if isinstance(part, Image) else 1
        if isinstance(part, Image):
            places.append(length - 1)
    return places


@torch.no_grad()
def one_shot(model: Any, row: Row, **inputs: Any) -> torch.Tensor:
    """(tokens, vocabulary) logits of one row in one call, without padding, neighbours or cache."""
    places = image_places(row)
    images = image_inputs(images_of([row]))
    if places:
        images["image_positions"] = torch.tensor([[0, place] for place in places])
    return model(input_ids=torch.tensor([token_ids(row)]), use_cache=False, **images, **inputs).logits[0]


def greedy(
    model: Any, row: Row, steps: int, forced: dict[int, int] | None = None, banned: Sequence[int] = ()
) -> list[int]:
    """Greedy decoding of one row by one `one_shot` per token; `forced` says which steps produce which token."""
    row, forced = list(row), forced or {}
    for step in range(steps):
        logits = one_shot(model, row)[-1].index_fill(0, torch.tensor(banned, dtype=torch.long), -torch.inf)
        row.append(forced[step] if step in forced else int(logits.argmax()))
    return row[-steps:]


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """max|d| / max|ref|."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return float(((actual - expected).abs().max() / expected.abs().max()).detach())
