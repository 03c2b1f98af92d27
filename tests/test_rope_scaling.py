# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Rotary embeddings that a configuration scales: CASA models are the source model then too, in every family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from tests.helpers_generation import relative_error
from tests.sources import ONE_GROUP, SEVERAL, Case, make_case
from tests.tiny import END, FAMILIES, START

TOLERANCE = 1e-5
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 3.0},
    "dynamic": {"factor": 3.0},
    "yarn": {"factor": 3.0, "original_max_position_embeddings": 8},
    "llama3": {
        "factor": 3.0,
        "original_max_position_embeddings": 8,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
}
# Images stand at positions below the longest of the source's training, text behind them above: "dynamic" frequencies
# are those of the longest, for both.
LONGEST = 20
EARLY = [START, END, START, END, START, END, *range(5, 35)]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def case_of(family: str, rope_type: str, variant: str) -> Case:
    """A source of the family with scaled positions, and its CASA form."""
    rope = {**FAMILIES[family].text["rope_parameters"], "rope_type": rope_type, **SCALINGS[rope_type]}
    return make_case(family, variant, {"max_position_embeddings": LONGEST, "rope_parameters": rope})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rope_type", SCALINGS)
def test_scaled_sources_are_equalled(rope_type, family):
    case = case_of(family, rope_type, "insertion")
    assert case.model.model.language_model.rotary_emb.rope_type == rope_type
    for ids in (SEVERAL, EARLY):
        assert relative_error(case.casa(ids), case.insertion(ids)) < TOLERANCE
    assert relative_error(make_case(family, "insertion").casa(EARLY), case.insertion(EARLY)) > 1e-2, "without scaling"
    text = torch.tensor([EARLY])
    for variant in ("exact", "casa", "ca-shared"):
        case = case_of(family, rope_type, variant)
        assert torch.equal(case.model(text).logits, case.source(text).logits)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rope_type", SCALINGS)
def test_scaled_sources_are_equalled_step_by_step(rope_type, family):
    case, new_tokens = case_of(family, rope_type, "exact"), 14
    options = {
        "max_new_tokens": new_tokens,
        "do_sample": False,
        "eos_token_id": -1,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    ours = case.model.generate(torch.tensor([ONE_GROUP]), **case.images, **options).logits
    theirs = case.source.generate(**case.source_inputs(ONE_GROUP), **options).logits
    assert len(ours) == len(theirs) == new_tokens
    for actual, expected in zip(ours, theirs, strict=True):
        assert relative_error(actual, expected) < TOLERANCE


@pytest.mark.parametrize("variant", ["casa", "casa-shared", "exact"])
@pytest.mark.parametrize("rope_type", ["linear", "yarn", "llama3"])
def test_scaled_positions_in_calls_of_any_size(rope_type, variant):
    """A cache continues them. Dynamic frequencies are those of the longest text so far, in the source model too."""
    case = case_of("qwen2_5_vl_text", rope_type, variant)
    expected = case.casa(SEVERAL)
    cache, logits, image = DynamicCache(config=case.model.config), [], 0
    patches = case.pixels.split(case.grids.prod(-1).tolist())
    for token in SEVERAL:
        inputs: dict[str, Any] = {}
        if token == END:
            inputs = {"pixel_values": patches[image], "image_grid_thw": case.grids[image : image + 1]}
            image += 1
        logits.append(case.model(torch.tensor([[token]]), cache=cache, **inputs).logits[0])
    assert relative_error(torch.cat(logits), expected) < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_images_have_the_frequencies_of_their_text(family):
    """Each call of a rotary embedding with dynamic frequencies sets them, and a short one sets them back."""
    case = case_of(family, "dynamic", "casa")
    rotary, seen = case.model.model.language_model.rotary_emb, []
    rotary.register_forward_hook(lambda module, args, output: seen.append(module.inv_freq.clone()))
    case.casa(EARLY)
    assert all(torch.equal(own, seen[0]) for own in seen)
    case.casa([START, END, START, END, START, END, 5])
    assert not torch.equal(seen[-1], seen[0])


def test_text_at_dynamic_positions_isnt_evicted():
    """Its stored keys can't be moved to other positions."""
    case = case_of("qwen2_5_vl_text", "dynamic", "casa")
    cache = DynamicCache(config=case.model.config)
    expected = case.model(torch.tensor([range(5, 35)]), cache=cache).logits
    with pytest.raises(ValueError, match=r"rope_type='dynamic'.*keep all text"):
        case.model.evict_text(cache, 8)
    assert int(cache.get_seq_length()) == expected.shape[1]
