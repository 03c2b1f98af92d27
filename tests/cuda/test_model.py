# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""What `forward` and `generate` compute on a CUDA device is what they compute on the CPU.

Everywhere the first run is the CPU's; for what that is worth, see the tests against the dense reference.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from casa_hf.configuration_casa import VARIANTS
from casa_hf.torch_varlen import TORCH_VARLEN
from tests.helpers_generation import Image, batch, embedded, new_model, relative_error, words
from tests.kernels import KERNELS, calls, reference_kernels, register_torch_kernel, use_backend
from tests.labelled_device import LabelledDevices, values
from tests.sources import GRIDS, make_case
from tests.tiny import FAMILIES

ROWS = (
    [*words(3, 1), Image(2, 3, 1), *words(3, 2)],
    [Image(1, 2, 2), *words(2, 2), Image(3, 4, 3), 5],
    [*words(4, 3)],
)
NEXT = ([*words(2, 5), Image(1, 3, 4), 4], [*words(5, 6)], [Image(2, 2, 5), 8])
BACKENDS = ("sdpa", "eager", *KERNELS)
# On a CUDA device these take half precision only; eager attention with padding is NaN in float64.
DTYPES = {"eager": torch.float32, **dict.fromkeys(KERNELS, torch.bfloat16)}
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
QUICK = {("casa", "sdpa"), ("exact", "sdpa"), ("casa-replace", "eager"), ("casa-shared", TORCH_VARLEN)}
QUICK |= {("ca", "flash_attention_2")}


def put(inputs: dict[str, Tensor], device: str, dtype: torch.dtype, grids: str | None = None) -> dict[str, Tensor]:
    """Inputs on a device; grids and positions may stay on another."""
    moved = {name: x.to(device, dtype if x.is_floating_point() else x.dtype) for name, x in inputs.items()}
    apart = ("image_grid_thw", "image_positions", "mm_token_type_ids")
    return {name: x.to(grids) if grids and name in apart else x for name, x in moved.items()}


def close(actual: Any, expected: Tensor) -> bool:
    return relative_error(values(actual), expected) < TOLERANCES[expected.dtype]


@torch.no_grad()
def conversation(model: Any, device: str, cache: Any, grids: str | None = None) -> list[Tensor]:
    """Logits of a prompt with padding and images in some rows, a step, more images and text, and a step."""
    step = {"input_ids": torch.tensor([[8], [9], [7]])}
    logits = []
    for inputs in (batch(*ROWS), step, batch(*NEXT), step):
        logits.append(model(**put(inputs, device, model.dtype, grids), cache=cache).logits)
        assert logits[-1].device.type == device
    return logits


def in_all(variants: Any, others: Any, quick: set[Any]) -> list[Any]:
    """All pairs, of which some are in the quick tests."""
    pairs = itertools.product(variants, others)
    return [pytest.param(*pair, marks=() if pair in quick else pytest.mark.slow) for pair in pairs]


@pytest.mark.parametrize("variant, backend", in_all(VARIANTS, BACKENDS, QUICK))
def test_calls_on_caches(variant: str, backend: str, devices: LabelledDevices) -> None:
    if backend == TORCH_VARLEN and not register_torch_kernel():
        pytest.skip("this torch has no such kernel")
    with reference_kernels(devices.uncounted):
        model = use_backend(new_model(variant, DTYPES.get(backend, torch.float64)), backend)
        makers: list[Callable[[], Any]] = [DynamicCache]
        makers.append(lambda: StaticCache(config=model.config.get_text_config(), max_cache_len=48))
        expected = [conversation(model, "cpu", make()) for make in makers]
        model.to("cuda")
        calls.clear()
        for make, logits in zip(makers, expected, strict=True):
            for grids in ("cpu", "cuda"):
                for actual, other in zip(conversation(model, "cuda", make(), grids), logits, strict=True):
                    assert close(actual, other)
        assert bool(calls) == (backend in KERNELS)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backend", ["sdpa", TORCH_VARLEN, pytest.param(KERNELS[1], marks=pytest.mark.slow)])
def test_families(family: str, backend: str, devices: LabelledDevices) -> None:
    """From pixels to logits; a tower gets its grids on the CPU and on the device."""
    if backend == TORCH_VARLEN and not register_torch_kernel():
        pytest.skip("this torch has no such kernel")
    case = make_case(family, "casa")
    dtype = DTYPES.get(backend, torch.float64)
    inputs = {"input_ids": torch.tensor([[5, 60, 61, 7, 60, 61, 60, 61, 9, 10]])}
    inputs |= {"pixel_values": case.pixels, "image_grid_thw": case.grids}
    with reference_kernels(devices.uncounted), torch.no_grad():
        model = use_backend(case.model.to(dtype), backend)
        model.model.name_tower_backend()
        expected = model(**put(inputs, "cpu", dtype)).logits
        model.to("cuda")
        for grids in ("cpu", "cuda"):
            calls.clear()
            assert close(model(**put(inputs, "cuda", dtype, grids)).logits, expected)
            assert bool(calls) == (backend in KERNELS)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tower_waits_for_nothing(family: str, devices: LabelledDevices) -> None:
    """With grids on the CPU; with all of its images in one call of a kernel, or one after the other."""
    case = make_case(family, "casa")
    model = case.model.to("cuda").float()
    pixels, tokens = case.pixels.float().cuda(), [height * width for height, width in GRIDS]
    for backend in ("sdpa", "flash_attention_2"):
        with reference_kernels(devices.uncounted), torch.no_grad():
            use_backend(model, backend)
            devices.forget()
            features = model.get_image_features(pixels, case.grids).pooler_output
        assert [len(x) for x in features] == tokens and features[0].is_cuda
        assert not devices.waits, (backend, devices.reads, devices.copies)


@pytest.mark.parametrize("variant", ["casa", "insertion"])
def test_features_and_positions_are_taken_from_either_device(variant: str, devices: LabelledDevices) -> None:
    model = new_model(variant)
    inputs = batch(*ROWS)
    inputs["image_positions"] = (inputs["input_ids"] == model.config.image_token_id).nonzero()
    inputs["mm_token_type_ids"] = 2 * (inputs["input_ids"] == model.config.image_token_id).long()
    with torch.no_grad():
        expected = model(**inputs).logits
        embeds = embedded(model, *ROWS) | {"mm_token_type_ids": inputs["mm_token_type_ids"]}
        model.to("cuda")
        for grids in ("cpu", "cuda"):
            own = put(inputs, "cuda", torch.float64, grids)
            features = model.get_image_features(own.pop("pixel_values"), own["image_grid_thw"]).pooler_output
            for given in (features, torch.cat(features), torch.cat(features).cpu()):
                assert close(model(**own, image_embeds=given).logits, expected)
            assert close(model(**put(embeds, "cuda", torch.float64, grids)).logits, expected)


SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "without a cache": {"use_cache": False},
    "in chunks": {"prefill_chunk_size": 3},
    "beams on a static cache": {"num_beams": 2, "cache_implementation": "static", "disable_compile": True},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("variant", ["casa", pytest.param("exact", marks=pytest.mark.slow)])
def test_generate(variant: str, setting: str, devices: LabelledDevices) -> None:
    """A padded batch; what needs a batch of one gets one."""
    model = new_model(variant)
    rows = ROWS[:1] if "lookup" in setting else ROWS
    settings = {"max_new_tokens": 5, "do_sample": False, **SETTINGS[setting]}
    expected = model.generate(**batch(*rows), **settings)
    model.to("cuda")
    for grids in ("cpu", "cuda"):
        actual = model.generate(**put(batch(*rows), "cuda", torch.float64, grids), **settings)
        assert actual.is_cuda and torch.equal(values(actual), expected)


def test_generate_goes_on_with_new_images(devices: LabelledDevices) -> None:
    """With the ids and the pixels of all, or the pixels of the new ones."""
    model = new_model("casa-shared")
    first, second = [*words(3, 1), Image(2, 3, 1), 4], [*words(2, 2), Image(1, 2, 2), 5]

    def turns(device: str) -> list[Tensor]:
        said = []
        for given in ([*first], [Image(2, 3, 1), Image(1, 2, 2)]), ([*first], [Image(1, 2, 2)]):
            inputs, again = batch(given[0]), batch(given[1])
            settings = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
            output = model.generate(**put(inputs, device, torch.float64, "cpu"), **settings)
            ids = torch.cat([output.sequences, batch(second)["input_ids"].to(device)], dim=1)
            images = {name: again[name] for name in ("pixel_values", "image_grid_thw")}
            images = put(images, device, torch.float64, "cpu")
            mask = torch.ones_like(ids)
            output = model.generate(
                input_ids=ids, attention_mask=mask, cache=output.past_key_values, **images, **settings
            )
            said.append(output.sequences)
        return said

    expected = turns("cpu")
    assert torch.equal(*expected)
    model.to("cuda")
    for actual, other in zip(turns("cuda"), expected, strict=True):
        assert torch.equal(values(actual), other)


# ---------------------------------------------------------------- several devices

LANGUAGE = "model.language_model"
MAPS = {
    "tower apart": {"model.visual": 1, LANGUAGE: 0, "lm_head": 0},
    "blocks apart": {
        "model.visual": 0,
        f"{LANGUAGE}.embed_tokens": 0,
        f"{LANGUAGE}.rotary_emb": 0,
        f"{LANGUAGE}.layers.0": 0,
        f"{LANGUAGE}.layers.1": 1,
        f"{LANGUAGE}.layers.2": 1,
        f"{LANGUAGE}.norm": 1,
        "lm_head": 1,
    },
    "there and back": {
        "model.visual": 1,
        f"{LANGUAGE}.embed_tokens": 1,
        f"{LANGUAGE}.rotary_emb": 0,
        f"{LANGUAGE}.layers.0": 0,
        f"{LANGUAGE}.layers.1": 1,
        f"{LANGUAGE}.layers.2": 0,
        f"{LANGUAGE}.norm": 0,
        "lm_head": 1,
    },
}


@pytest.mark.parametrize(
    "variant, placement",
    in_all(
        ("casa", "exact", "casa-shared"),
        MAPS,
        {("casa", "tower apart"), ("exact", "blocks apart"), ("casa", "there and back")},
    ),
)
def test_a_model_on_two_devices(variant: str, placement: str, devices: LabelledDevices) -> None:
    """As `device_map` spreads it: caches, windows and images follow their block."""
    accelerate = pytest.importorskip("accelerate")
    model = new_model(variant)
    settings = {"max_new_tokens": 4, "do_sample": False}
    makers: list[Callable[[], Any]] = [DynamicCache]
    makers.append(lambda: StaticCache(config=model.config.get_text_config(), max_cache_len=48))
    expected = [conversation(model, "cpu", make()) for make in makers]
    generated = [model.generate(**batch(*ROWS), **settings, num_beams=beams) for beams in (1, 2)]
    spread = accelerate.dispatch_model(
        model, MAPS[placement], main_device=0, skip_keys=model._skip_keys_device_placement
    )
    for make, logits in zip(makers, expected, strict=True):
        cache = make()
        for actual, other in zip(conversation(spread, "cuda", cache), logits, strict=True):
            assert close(actual, other)
    for beams, other in zip((1, 2), generated, strict=True):
        inputs = put(batch(*ROWS), "cuda", torch.float64)
        assert torch.equal(values(spread.generate(**inputs, **settings, num_beams=beams)), other)
