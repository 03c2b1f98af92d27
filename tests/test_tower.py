# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Vision towers: the patch embedding as a matrix product equals the stock convolution, and towers can be compiled."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from casa_hf import tower_attention
from casa_hf.patch_embedding import PatchProjection
from casa_hf.tower_attention import SDPA_TOWER
from casa_hf.vision_tower import tower_inputs
from tests.helpers_generation import relative_error
from tests.sources import make_case
from tests.tiny import FAMILIES

TOWERS = [name for name, family in FAMILIES.items() if not family.text_only]


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


@pytest.mark.parametrize("size", [(1, 12, 20), (2, 10, 18), (1, 8, 8)], ids=str)
@pytest.mark.parametrize("family", TOWERS)
def test_sequences_of_one_length_attend_together(family: str, size: tuple[int, int, int]) -> None:
    """Windows at all edges, temporal patches, one image, several of a size, and several sizes: as one by one."""
    case = make_case(family, "casa")
    tower = case.model.model.visual
    assert tower.config._attn_implementation == SDPA_TOWER
    for sizes in ([size], [size] * 3, [size, (1, 6, 14), size, size]):
        grids = torch.tensor(sizes)
        generator = torch.Generator().manual_seed(len(sizes))
        shape = int(grids.prod(-1).sum()), case.pixels.shape[1]
        pixels = torch.randn(shape, dtype=case.pixels.dtype, generator=generator)
        results = []
        for name in (SDPA_TOWER, "sdpa"):
            tower.config._attn_implementation_internal = name
            with torch.no_grad():
                results.append(features(tower(pixels, grid_thw=grids, **tower_inputs(tower, grids, pixels.device))))
        assert relative_error(*results) < 1e-12


def test_windows_of_a_frame_attend_in_a_few_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside, at two edges and in the corner: whatever the number of windows and images."""
    case, calls = make_case("qwen2_5_vl_text", "casa"), []
    stock = tower_attention.sdpa_attention_forward

    def counted(module: nn.Module, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(tuple(query.shape[::2]))
        return stock(module, query, *args, **kwargs)

    monkeypatch.setattr(tower_attention, "sdpa_attention_forward", counted)
    grids = torch.tensor([[1, 12, 20]] * 3)
    tower = case.model.model.visual
    case.model.get_image_features(torch.randn(3 * 240, case.pixels.shape[1], dtype=case.pixels.dtype), grids)
    side = tower.window_size // tower.patch_size
    (rows, last_row), (columns, last_column) = divmod(12, side), divmod(20, side)
    lengths = [side * side] * rows * columns + [side * last_column] * rows + [last_row * side] * columns
    windows = Counter(length for length in [*lengths, last_row * last_column] if length)
    full = len(tower.fullatt_block_indexes)
    expected = Counter({(3, 240): full})
    for length, count in windows.items():
        expected[(3 * count, length)] += len(tower.blocks) - full
    assert Counter(calls) == expected


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_the_configuration_of_a_model_makes_another_one(backend: str) -> None:
    """With the backends of the first one, as elsewhere in Transformers."""
    case = make_case("qwen2_5_vl_text", "casa")
    case.model.set_attn_implementation(backend)
    other = type(case.model)(case.model.config).double()
    other.load_state_dict(case.model.state_dict())
    names = {each.model.visual.config._attn_implementation for each in (case.model, other)}
    assert names == {SDPA_TOWER if backend == "sdpa" else "eager"}
    assert other.config._attn_implementation == backend
    outputs = [
        torch.cat(each.get_image_features(case.pixels, case.grids).pooler_output) for each in (case.model, other)
    ]
    assert torch.equal(*outputs)
