# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Recurrent states of linear attention on a CUDA device, and on two: as on the CPU, and never waited for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from casa_hf import CasaForConditionalGeneration, CasaProcessor, convert_checkpoint
from examples.tiny_source import build_tiny_source
from tests.cuda.test_host_reads import waits
from tests.cuda.test_model import close, conversation, put
from tests.cuda.test_streams import (
    ROWS,
    STEP,
    TOLD,
    evict,
    evict_by_row,
    reorder,
    repeat_and_select,
    reset,
    select,
)
from tests.helpers_generation import Image, batch, words
from tests.labelled_device import LabelledDevices
from tests.streaming.conftest import randomised
from tests.tiny import FAMILIES, random_tensor


def new_model(**fields: Any) -> Any:
    """In float64, every parameter random."""
    config = FAMILIES["qwen3_5_text"].casa_config("casa", source_config=None, **fields)
    model = CasaForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(random_tensor(name, tuple(parameter.shape)))
    model.generation_config.eos_token_id = None
    return model.double().eval()


@pytest.mark.parametrize(
    "what", ["batch", *(pytest.param(x, marks=pytest.mark.slow) for x in ("Conversation", "CasaStream", "bounded"))]
)
def test_what_is_told(what: str, tmp_path: Path, devices: LabelledDevices) -> None:
    build_tiny_source(tmp_path / "source", family="qwen3_5", num_hidden_layers=4)
    convert_checkpoint(tmp_path / "source", tmp_path / "casa", max_pixels=65536)
    processor = CasaProcessor.from_pretrained(tmp_path / "casa")
    model = randomised(CasaForConditionalGeneration.from_pretrained(tmp_path / "casa"))
    expected = TOLD[what](model, processor)
    assert any(expected)
    assert TOLD[what](model.to("cuda"), processor) == expected


CHANGES = [(DynamicCache, change) for change in (reorder, select, repeat_and_select, reset, evict, evict_by_row)]
CHANGES += [(StaticCache, change) for change in (reorder, reset, evict)]


@pytest.mark.parametrize("kind, change", CHANGES, ids=lambda value: value.__name__)
def test_caches_are_changed(kind: Any, change: Callable, devices: LabelledDevices) -> None:
    model = new_model()

    @torch.no_grad()
    def logits(device: str) -> list[Tensor]:
        cache = StaticCache(model.config.get_text_config(), max_cache_len=32) if kind is StaticCache else kind()
        outputs = [model(**put(batch(*ROWS), device, torch.float64), cache=cache).logits]
        change(cache, model, device)
        for inputs in (STEP, batch([*words(1, 7), Image(2, 1, 5)], [*words(3, 8)]), STEP):
            outputs.append(model(**put(inputs, device, torch.float64), cache=cache).logits)
        return outputs

    expected = logits("cpu")
    model.to("cuda")
    for actual, other in zip(logits("cuda"), expected, strict=True):
        assert close(actual, other)


def test_states_stay_with_their_blocks(devices: LabelledDevices) -> None:
    """As `device_map` spreads a model; also saved, resumed and given a further row."""
    accelerate = pytest.importorskip("accelerate")
    model = new_model()
    settings = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2}
    expected = conversation(model, "cpu", DynamicCache()), model.generate(**batch(*ROWS), **settings)
    language = "model.language_model"
    places = {"model.visual": 1, f"{language}.embed_tokens": 1, f"{language}.rotary_emb": 0, f"{language}.norm": 0}
    places |= {f"{language}.layers.{number}": number // 2 for number in range(4)} | {"lm_head": 1}
    spread = accelerate.dispatch_model(model, places, main_device=0, skip_keys=model._skip_keys_device_placement)
    cache = DynamicCache()
    for actual, other in zip(conversation(spread, "cuda", cache), expected[0], strict=True):
        assert close(actual, other)
    states = [cache.layers[number].recurrent_states[0] for number in (0, 2)]
    assert [state.device.index for state in states] == [0, 1]
    inputs = put(batch(*ROWS), "cuda", torch.float64)
    assert torch.equal(spread.generate(**inputs, **settings).cpu(), expected[1])


@pytest.mark.parametrize("static", [False, True])
@torch.no_grad()
def test_a_step_waits_for_nothing(static: bool, devices: LabelledDevices) -> None:
    """A frame waits as often as in other families: for its tokens and its windows, on a static cache for the length of
    the text besides."""
    model, step = new_model().to("cuda"), torch.tensor([[8]], device="cuda")
    cache = StaticCache(model.config.get_text_config(), max_cache_len=32) if static else DynamicCache()
    for number in range(3):
        inputs = put(batch([5, Image(2, 3, number)]), "cuda", torch.float64, "cpu")
        del inputs["attention_mask"]
        inputs["image_positions"] = torch.tensor([[0, 2]])
        devices.forget()
        model(**inputs, cache=cache)
        frame = waits(devices) if number else devices.forget()
        model(input_ids=step, cache=cache)
        assert waits(devices) == (0, 0)
    assert frame == (1, 0)
