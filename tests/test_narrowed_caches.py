# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Caches whose rows were selected, repeated or taken back keep each row's own windows."""

from __future__ import annotations

import pytest
import torch
from transformers import StaticCache

from casa_hf.attention_backends import StepWindows, windowed_attention
from casa_hf.cache_layers import FusionKeys, KeysValues
from tests.helpers_generation import Image, batch, one_shot, relative_error, shared_model, token_ids, words

TOLERANCE = 1e-9
VARIANTS = ("casa", "ca", "casa-shared", "ca-shared", "exact")
# Images of different sizes, windows that start at different places, and a row without an image; equal lengths.
ROWS = (
    [*words(1, 1), Image(2, 3, 1), *words(5, 2)],
    [*words(4, 3), Image(1, 2, 2), *words(2, 4)],
    words(8, 5),
)


def filled(model):
    inputs = batch(*ROWS)
    assert inputs.pop("attention_mask").all()
    return model(**inputs, use_cache=True).cache


def step(model, cache, token=7):
    return model(torch.tensor([[token]]), cache=cache).logits[0, -1]


@pytest.mark.parametrize("row", range(3))
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_one_row_of_several_goes_on_alone(variant, row):
    model = shared_model(variant)
    cache = filled(model)
    cache.batch_select_indices(torch.tensor([row]))
    for count in (1, 2):
        expected = one_shot(model, [*ROWS[row], *[7] * count])[-1]
        assert relative_error(step(model, cache), expected) < TOLERANCE


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_a_repeated_row_goes_its_own_way(variant):
    model, image = shared_model(variant), Image(3, 3, 9)
    cache = model(**batch(ROWS[1])).cache
    cache.batch_repeat_interleave(2)
    inputs = batch([image, 5], words(3, 6))
    inputs.pop("attention_mask")
    model(**inputs, cache=cache)
    cache.batch_select_indices(torch.tensor([1]))
    assert relative_error(step(model, cache), one_shot(model, [*ROWS[1], *words(3, 6), 7])[-1]) < TOLERANCE


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_a_row_without_an_image_is_taken_back_further_than_the_window(variant):
    model = shared_model(variant)
    cache = filled(model)
    cache.batch_select_indices(torch.tensor([2]))
    cache.crop(-6)
    assert relative_error(step(model, cache), one_shot(model, [*ROWS[2][:-6], 7])[-1]) < TOLERANCE


@pytest.mark.parametrize("variant", ["casa", "casa-before"])
def test_text_that_was_taken_back_is_never_read_again(variant):
    model, row = shared_model(variant), ROWS[0]
    with torch.no_grad():
        cache = model(**batch(row)).cache
        step(model, cache, token=11)
        cache.crop(-1)
    step(model, cache, token=12)  # with gradients: the window is a tensor of its own, as long as it was
    with torch.no_grad():
        assert relative_error(step(model, cache), one_shot(model, [*row, 12, 7])[-1]) < TOLERANCE


def test_scores_of_a_step_stay_in_the_range_of_float16():
    class Module:
        scaling, attention_dropout, training = 128**-0.5, 0.0, False

    generator = torch.Generator().manual_seed(0)
    query, keys, values = (torch.randn(1, 2, n, 128, generator=generator) for n in (1, 9, 9))
    query, keys = 60 * query.sign(), 25 * keys.sign()
    keys[:, :, 3] = 25 * query[:, :, 0].sign()
    expected = torch.nn.functional.scaled_dot_product_attention(query, keys, values)
    half = KeysValues(keys.half(), values.half())
    windows = StepWindows(torch.ones(1, 1, 1, 9, dtype=torch.bool))
    output, _ = windowed_attention(Module, query.half(), FusionKeys(half, None), windows)
    assert (query.half() @ keys.half().transpose(2, 3)).isinf().any(), "or this proves nothing"
    assert relative_error(output.float(), expected.transpose(1, 2).flatten(2)) < 2e-2


def test_rows_have_equal_lengths():
    assert len({len(token_ids(row)) for row in ROWS}) == 1


def test_more_tokens_than_a_static_cache_has_slots_for_are_refused_before_any_work():
    model = shared_model("casa")
    cache = StaticCache(config=model.config, max_cache_len=20)
    with pytest.raises(ValueError, match=r"room for 20 tokens, but 21 may have to be kept.*max_cache_len"):
        model.generate(**batch(ROWS[0]), cache=cache, max_new_tokens=14)
    output = model.generate(**batch(ROWS[0]), cache=cache, max_new_tokens=13)
    assert torch.equal(output, model.generate(**batch(ROWS[0]), max_new_tokens=13))
