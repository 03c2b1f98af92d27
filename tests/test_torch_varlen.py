# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Kernels for sequences of different lengths beyond one prefill: caches, generation, vision towers, refusals.

The kernels are references behind the real dispatchers (`tests/kernels.py`); "sdpa" is the truth here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache

from casa_hf import torch_varlen
from tests import kernels
from tests.helpers_generation import Image, batch, image_inputs, new_model, relative_error, token_ids, words
from tests.sources import make_case
from tests.test_attention_backends import needs
from tests.test_design_space import ROWS, run
from tests.tiny import FAMILIES, sample

TOLERANCE = 1e-6
VARIANTS = ("casa", "ca", "casa-shared", "ca-shared", "exact", "insertion", "casa-replace", "casa-before", "casa-ffn")
A, B, C = Image(2, 3, 1), Image(1, 2, 2), Image(3, 1, 3)


@pytest.fixture(autouse=True)
def reference_kernels() -> Iterator[None]:
    with kernels.reference_kernels(), torch.no_grad():
        yield


def model_for(variant: str, backend: str, **fields: Any) -> Any:
    needs(backend)
    return kernels.use_backend(new_model(variant, **fields), backend)


@pytest.mark.parametrize("backend", kernels.KERNELS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_in_pieces_with_a_cache(variant: str, backend: str) -> None:
    """One boundary falls inside a group, rows receive images in different pieces, one piece is a single token."""
    samples = [sample(script, seed) for seed, script in enumerate(ROWS)]
    expected = run(new_model(variant), samples, ())
    for bounds in ((5, 9), (6, 7, 14)):
        for actual, row in zip(run(model_for(variant, backend), samples, bounds), expected, strict=True):
            assert relative_error(actual, row) < TOLERANCE


@pytest.mark.parametrize("backend", kernels.KERNELS)
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("variant", ["casa", "ca-shared", "exact"])
def test_rows_padded_in_the_middle(variant: str, static: bool, backend: str) -> None:
    """Rows that bring different numbers of tokens to each call, on both kinds of cache."""
    model, truth = model_for(variant, backend), new_model(variant)
    cache = StaticCache(config=model.config, max_cache_len=40) if static else DynamicCache()
    turns = ([[*words(4, 1), A, 3], [7]], [[5], [B, *words(2, 2), C]], [[8], [9]], [[C, 4], [*words(3, 5)]])
    past: list[list[Any]] = [[], []]
    for turn in turns:
        inputs = batch(*turn, side="right")
        masks = inputs["attention_mask"].bool()
        logits = model(**inputs, cache=cache).logits
        for number, row in enumerate(turn):
            past[number] += row
            expected = truth(input_ids=torch.tensor([token_ids(past[number])]), **images_of(past[number])).logits[0]
            actual = logits[number, masks[number]]
            assert relative_error(actual, expected[-len(actual) :]) < TOLERANCE


@pytest.mark.parametrize("backend", kernels.KERNELS)
@pytest.mark.parametrize("variant", ["casa", "ca-shared"])
def test_empty_slots_of_a_static_cache_are_not_seen(variant: str, backend: str) -> None:
    model, truth, row = model_for(variant, backend), new_model(variant), [*words(4, 1), A, 3]
    cache = StaticCache(config=model.config, max_cache_len=40)
    model(input_ids=torch.tensor([token_ids(row)]), cache=cache, **images_of(row))
    for token in (7, 8):
        row.append(token)
        logits = model(input_ids=torch.tensor([[token]]), cache=cache).logits[0]
        expected = truth(input_ids=torch.tensor([token_ids(row)]), **images_of(row)).logits[0, -1:]
        assert relative_error(logits, expected) < TOLERANCE


def images_of(row: list[Any]) -> dict[str, torch.Tensor]:
    return image_inputs([part for part in row if isinstance(part, Image)])


@pytest.mark.parametrize("backend", kernels.KERNELS)
@pytest.mark.parametrize("variant", ["casa", "ca-shared", "exact", "casa-replace"])
def test_generation(variant: str, backend: str) -> None:
    model = model_for(variant, backend)
    inputs = batch([*words(3, 1), A, *words(4, 2), B, C, 7], words(6, 4), [B, *words(3, 5)])
    settings = {"max_new_tokens": 6, "do_sample": False}
    expected = new_model(variant).generate(**inputs, **settings)
    assert torch.equal(model.generate(**inputs, **settings), expected)
    assert torch.equal(model.generate(**inputs, **settings, cache_implementation="static"), expected)


@pytest.mark.parametrize("backend", kernels.KERNELS)
@pytest.mark.parametrize("family", FAMILIES)
def test_vision_tower(family: str, backend: str) -> None:
    """All images of a call, of different sizes, in one call of the kernel per block of the tower."""
    needs(backend)
    case = make_case(family, "casa")
    expected = case.model.get_image_features(case.pixels, case.grids).pooler_output
    model = kernels.use_backend(case.model, backend)
    if backend == torch_varlen.TORCH_VARLEN:
        model.set_attn_implementation(backend)  # a second time: the tower keeps the name that it understands
        assert model.model.visual.config._attn_implementation == torch_varlen.TORCH_VARLEN_TOWER
        assert type(model)(model.config).config._attn_implementation == backend
    kernels.calls.clear()
    features = model.get_image_features(case.pixels, case.grids).pooler_output
    for actual, other in zip(features, expected, strict=True):
        assert relative_error(actual, other) < TOLERANCE
    assert len(kernels.calls) == len(model.model.visual.blocks)
    assert not any(call.causal for call in kernels.calls)
    model.set_attn_implementation("sdpa")
    assert torch.equal(model.get_image_features(case.pixels, case.grids).pooler_output[0], expected[0])


def test_dropout_is_refused() -> None:
    model = model_for("casa", torch_varlen.TORCH_VARLEN)
    for layer in model.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(ValueError, match=r"no dropout, but attention_dropout=0\.1"):
        model.train()(torch.tensor([[5, 6, 7]]))


def test_causal_is_aligned_at_the_last_key() -> None:
    """What the kernel is asked for, on lengths that differ: the last query sees all keys, none sees a neighbour's."""
    needs(torch_varlen.TORCH_VARLEN)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, n, 16, generator=generator) for heads, n in ((4, 5), (2, 9), (2, 9)))
    lengths = {"cu_seq_lens_q": torch.tensor([0, 2, 5]), "cu_seq_lens_k": torch.tensor([0, 6, 9])}
    module = torch.nn.Identity()
    actual, _ = torch_varlen.torch_varlen_forward(
        module, query, key, value, None, scaling=0.3, is_causal=True, **lengths, max_length_q=3, max_length_k=6
    )
    for q, seen in enumerate(([0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5], [6], [6, 7], [6, 7, 8])):
        for head in range(4):
            scores = key[0, head // 2, seen] @ query[0, head, q] * 0.3
            expected = scores.softmax(0) @ value[0, head // 2, seen]
            assert relative_error(actual[0, q, head], expected) < 1e-5


@pytest.mark.parametrize("has_option", [True, False])
def test_keys_are_not_repeated_for_the_heads_of_queries(has_option: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with the kernel of torch 2.11, which takes fewer heads of keys without being told."""
    model, truth = model_for("casa", torch_varlen.TORCH_VARLEN), new_model("casa")
    kernel, _ = torch_varlen._kernel()

    def earlier(*args: Any, scale: float, window_size: tuple[int, int]) -> torch.Tensor:
        return kernel(*args, scale=scale, window_size=window_size, enable_gqa=True)

    if not has_option:
        monkeypatch.setattr(torch_varlen, "_kernel", lambda: (earlier, False))
    kernels.calls.clear()
    row = [*words(3, 1), A, *words(4, 2)]
    inputs = {"input_ids": torch.tensor([token_ids(row)]), **images_of(row)}
    assert relative_error(model(**inputs).logits, truth(**inputs).logits) < TOLERANCE
    of_text = [call for call in kernels.calls if call.heads == 4]
    assert len(of_text) >= 6 and {call.kv_heads for call in of_text} == {2}


class Waits(TorchDispatchMode):
    """Counts operators whose result the host has to wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += str(operator) in (
            "aten.nonzero.default",
            "aten._local_scalar_dense.default",
            "aten.item.default",
        )
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("backend", ["sdpa", *kernels.KERNELS])
@pytest.mark.parametrize("variant", ["casa", "casa-shared"])
def test_blocks_never_wait_for_the_device(variant: str, backend: str, static: bool) -> None:
    """One row: several windows, a new image, and a step (but for flash attention on a static cache, where Transformers
    looks for the filled slots in every block). Reference kernels wait; they aren't counted."""
    model = model_for(variant, backend) if backend != "sdpa" else new_model(variant)
    cache = StaticCache(config=model.config, max_cache_len=40) if static else DynamicCache()
    waits, kernel = Waits(), kernels.attention

    def uncounted(*args: Any, **kwargs: Any) -> Any:
        before = waits.count
        result = kernel(*args, **kwargs)
        waits.count = before
        return result

    kernels.attention = uncounted
    for layer in model.model.language_model.layers:
        layer.register_forward_pre_hook(lambda *_: waits.__enter__() and None)
        layer.register_forward_hook(lambda *_: waits.__exit__(None, None, None))
    try:
        for row in ([*words(3, 1), A, 4, B, *words(2, 2)], [5, C, 6]):
            inputs = batch(row)
            inputs.pop("attention_mask")
            model(**inputs, cache=cache)
        if not (static and backend == "flash_attention_2"):
            model(torch.tensor([[7]]), cache=cache)
    finally:
        kernels.attention = kernel
    assert waits.count == 0


@pytest.mark.parametrize("variant", ["casa", "ca-shared"])
def test_the_kernel_gets_one_data_type_under_autocast(variant: str) -> None:
    model = model_for(variant, "torch_varlen", dtype=torch.float32)
    inputs = batch([*words(3, 1), A, *words(3, 2)])
    inputs["pixel_values"] = inputs["pixel_values"].float()
    seen: set[tuple[torch.dtype, ...]] = set()
    attend = torch_varlen._attend

    def watched(states: list[torch.Tensor], *args: Any) -> torch.Tensor:
        seen.add(tuple(state.dtype for state in states))
        return attend(states, *args)

    torch_varlen._attend = watched
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(**inputs).logits
    finally:
        torch_varlen._attend = attend
    assert seen == {(torch.bfloat16,) * 3}
    assert relative_error(logits.float(), model(**inputs).logits) < 0.1


def test_a_compiled_step_takes_a_mask_of_everything() -> None:
    model = new_model("casa", dtype=torch.float32)
    step = torch.compile(model, fullgraph=True, backend="eager")
    rows = ([*words(3, 1), A, 3], [B, 4])
    inputs = batch(*rows)
    inputs["pixel_values"] = inputs["pixel_values"].float()
    mask = inputs.pop("attention_mask")
    caches = StaticCache(config=model.config, max_cache_len=30), DynamicCache()
    for cache in caches:
        model(**inputs, attention_mask=mask, cache=cache)
    for token in (7, 8, 9):
        mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
        ids = torch.tensor([[token], [token + 1]])
        logits = step(ids, attention_mask=mask, cache=caches[0]).logits
        assert relative_error(logits, model(ids, attention_mask=mask, cache=caches[1]).logits) < 1e-5
