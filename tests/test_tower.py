# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Vision towers: the patch embedding as a matrix product equals the stock convolution, and towers can be compiled."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from casa_hf.patch_embedding import PatchProjection
from tests.helpers_generation import relative_error
from tests.sources import make_case
from tests.tiny import FAMILIES

TOWERS = [name for name, family in FAMILIES.items() if not family.text_only]


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def features(outputs: Any) -> torch.Tensor:
    return torch.cat([outputs.pooler_output, *(getattr(outputs, "deepstack_features", None) or ())], dim=-1)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("family", TOWERS)
def test_the_patch_embedding_is_the_stock_convolution(family: str, dtype: torch.dtype, tolerance: float) -> None:
    """In the tower with the stock's weights: the embedding's outputs, the tower's outputs, and all gradients."""
    case = make_case(family, "casa")
    ours, stock = case.model.model.visual.to(dtype), case.source.model.visual.to(dtype)
    assert type(stock.patch_embed.proj) is nn.Conv3d and isinstance(ours.patch_embed.proj, PatchProjection)
    assert ours.state_dict().keys() == stock.state_dict().keys()
    results = []
    for tower in (ours, stock):
        pixels = case.pixels.to(dtype).requires_grad_()
        embedded = tower.patch_embed(pixels)
        output = features(tower(pixels, grid_thw=case.grids))
        weights = torch.linspace(-1, 1, output.numel(), dtype=dtype).view_as(output)
        (output * weights).sum().backward()
        results.append([embedded, output, pixels.grad, *(p.grad for p in tower.patch_embed.parameters())])
    for actual, expected in zip(*results, strict=True):
        assert relative_error(actual, expected) < tolerance * 100


def test_a_convolution_that_is_no_matrix_product_stays_one() -> None:
    """Inputs larger than the kernel slide, as in the stock module."""
    stock = nn.Conv3d(3, 8, (2, 4, 4), stride=(2, 4, 4))
    ours, patches = PatchProjection.like(stock), torch.randn(2, 3, 4, 8, 4)
    assert ours.weight is stock.weight and ours.bias is stock.bias
    assert torch.equal(ours(patches), stock(patches))
    one = torch.randn(5, 3, 2, 4, 4)
    assert ours(one).shape == stock(one).shape and relative_error(ours(one), stock(one)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("family", TOWERS)
def test_a_tower_can_be_compiled(family: str, fresh_compiler: None) -> None:
    """With the same result, for other images too. The stock towers read the images' sizes off the device (`tolist`,
    `repeat_interleave`), which breaks the graph there, so not with `fullgraph=True`."""
    case = make_case(family, "casa")
    grids = case.grids.flip(0)
    with torch.no_grad():
        expected = [features(case.model.model.visual(case.pixels, grid_thw=g)) for g in (case.grids, grids)]
        whole = torch.cat(case.model.get_image_features(case.pixels, case.grids).pooler_output)
        case.model.model.visual.compile(backend="eager")
        actual = [features(case.model.model.visual(case.pixels, grid_thw=g)) for g in (case.grids, grids)]
        through_model = torch.cat(case.model.get_image_features(case.pixels, case.grids).pooler_output)
    assert counters["stats"]["unique_graphs"] >= 1
    for one, other in zip([*actual, through_model], [*expected, whole], strict=True):
        assert relative_error(one, other) < 1e-12
