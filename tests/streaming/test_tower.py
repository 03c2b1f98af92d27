# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Frames through the compiled tower: the features that the model itself would give, from few graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from casa_hf.streaming.tower import FrameTower
from tests.sources import make_case
from tests.test_tower import TOWERS

SIZES = [(1, 4, 6), (1, 8, 4), (1, 6, 6)]


pytestmark = pytest.mark.usefixtures("fresh_compiler")


def frames(case: Any, sizes: list[tuple[int, int, int]], seed: int) -> dict[str, torch.Tensor]:
    grids, generator = torch.tensor(sizes), torch.Generator().manual_seed(seed)
    shape = int(grids.prod(-1).sum()), case.pixels.shape[1]
    return {"pixel_values": torch.randn(shape, dtype=case.pixels.dtype, generator=generator), "image_grid_thw": grids}


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.parametrize("family", TOWERS)
def test_features_are_those_of_the_model(family):
    """Frames of several sizes in any order, deepstack features among them."""
    model = make_case(family, "casa").model
    case, tower = make_case(family, "casa"), FrameTower(model, {"backend": "eager"})
    a, b, _ = SIZES
    for turn in range(3):
        images = frames(case, [a, b, a, a, b], turn)
        expected = torch.cat(model.get_image_features(**images).pooler_output)
        inputs = tower.inputs({**images, "image_positions": torch.zeros(5, 2)})
        assert inputs.keys() == {"image_embeds", "image_grid_thw", "image_positions"}
        assert torch.allclose(inputs["image_embeds"], expected, rtol=1e-10, atol=1e-12)
        assert graphs() == (3 if turn else 0), "three and two frames: groups of 2, 1 and 2"
    assert FrameTower(model).inputs(images) is images


def test_few_graphs_for_any_number_of_frames():
    case = make_case("qwen2_5_vl_text", "casa")
    tower = FrameTower(case.model, {"backend": "eager"})
    for number in (*range(1, 12), 32, 21):
        images = frames(case, [SIZES[0]] * number, number)
        expected = torch.cat(case.model.get_image_features(**images).pooler_output)
        assert torch.allclose(tower.features(**rename(images)), expected, rtol=1e-10, atol=1e-12)
    assert graphs() == 4


def rename(images: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"pixel_values": images["pixel_values"], "grids": images["image_grid_thw"]}


@torch._dynamo.config.patch(recompile_limit=2)
def test_sizes_that_have_not_come_for_long_are_forgotten(monkeypatch):
    """The graph of a size that comes again after two others is made again; no limit of the compiler is met."""
    monkeypatch.setattr("casa_hf.streaming.tower._MAX_SIZES", 2)
    case = make_case("qwen2_5_vl_text", "casa")
    tower = FrameTower(case.model, {"backend": "eager"})
    made = []
    for size in (0, 0, 1, 1, 0, 2, 2, 1, 1, 0, 0):
        images = frames(case, [SIZES[size]], size)
        expected = torch.cat(case.model.get_image_features(**images).pooler_output)
        assert torch.allclose(tower.features(**rename(images)), expected, rtol=1e-10, atol=1e-12)
        made.append(graphs())
    assert made == [0, 1, 1, 2, 2, 2, 3, 3, 4, 4, 5]


@pytest.mark.slow
def test_the_default_compiler_gives_the_same_features():
    case = make_case("qwen2_5_vl_text", "casa")
    tower = FrameTower(case.model.float(), {})
    for turn in range(2):
        images = frames(case, [SIZES[0]] * 2, turn)
        images["pixel_values"] = images["pixel_values"].float()
        expected = torch.cat(case.model.get_image_features(**images).pooler_output)
        assert torch.allclose(tower.features(**rename(images)), expected, rtol=1e-4, atol=1e-5)
    assert graphs() == 1
