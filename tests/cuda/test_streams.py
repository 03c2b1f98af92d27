# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Conversations, streams, and what is done to caches, on a CUDA device: word for word what they are on the CPU."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from casa_hf import CasaForConditionalGeneration, CasaProcessor, CasaStream, CasaStreamBatch, Conversation
from casa_hf.streaming import StreamSettings
from tests.cuda.test_model import close, in_all, put
from tests.helpers_generation import Image, batch, new_model, words
from tests.labelled_device import LabelledDevices
from tests.streaming.conftest import FRAME_PIXELS, randomised
from tests.streaming.helpers import emitted, picture, say

PICTURES = [picture(seed) for seed in range(6)]


@pytest.fixture(scope="module")
def processor(source_folder: Path) -> CasaProcessor:
    return CasaProcessor.from_source(source_folder, max_pixels=4 * FRAME_PIXELS, frame_max_pixels=FRAME_PIXELS)


def converse(model: Any, processor: CasaProcessor) -> list[Any]:
    conversation = Conversation(model, processor)
    said: list[Any] = [conversation.ask("What is this?", [PICTURES[0], PICTURES[1]], max_new_tokens=4)]
    said.append(conversation.ask("Why?", max_new_tokens=4))
    said.append(conversation.ask("And this?", [PICTURES[2]], max_new_tokens=4, do_sample=False))
    # A turn whose cache can't be gone on with.
    said.append(conversation.ask("And now?", [PICTURES[3]], max_new_tokens=3, do_sample=False, num_beams=2))
    return said


def stream(model: Any, processor: CasaProcessor, **settings: Any) -> list[Any]:
    """Frames one by one and several at once, a question, a fork, and a session that another stream goes on with."""
    with CasaStream(model, processor, max_new_tokens_per_frame=6, **settings) as own:
        said: list[Any] = say(own, PICTURES[:2])
        said.append(emitted(own.push(PICTURES[2:4])))
        said.append(emitted(own.ask("What is this?", max_new_tokens=4)))
        file = io.BytesIO()
        torch.save(own.state_dict(), file)
        file.seek(0)
        said += say(own.fork(), PICTURES[4:])
        later = CasaStream(model, processor, max_new_tokens_per_frame=6, **settings)
        later.load_state_dict(torch.load(file, weights_only=True))
        said += [say(later, PICTURES[4:]), own.nbytes, own.num_text_tokens]
        own.reset()
        return said + say(own, PICTURES[:1])


def bounded(model: Any, processor: CasaProcessor) -> list[Any]:
    return stream(model, processor, max_text_tokens=40, num_sink_tokens=4)


def sampled(model: Any, processor: CasaProcessor) -> list[Any]:
    return stream(model, processor, do_sample=True, seed=3)


def streams(model: Any, processor: CasaProcessor) -> list[Any]:
    """Rows that come and go, with frames in some and questions in others, within a window of text."""
    said: list[Any] = []

    def events(given: Iterator[Any]) -> None:
        said.extend((row, event.kind, event.text, event.token_ids) for row, event in given)

    # Padding is closed up at other times if steps are compiled, which `nbytes` counts.
    settings = {"max_text_tokens": 48, "num_sink_tokens": 4, "compile": False}
    with CasaStreamBatch(model, processor, max_new_tokens_per_frame=5, **settings) as rows:
        first, second = rows.add(prompt="Say what there is."), rows.add()
        events(rows.push({first: PICTURES[0], second: PICTURES[1]}))
        third = rows.fork(first)
        events(rows.push({second: PICTURES[2:4]}))
        events(rows.ask({third: "What is this?"}, max_new_tokens=4))
        rows.reset(first)
        events(rows.push({first: PICTURES[4], third: PICTURES[5]}))
        rows.remove(second)
        events(rows.push({third: PICTURES[0]}))
        return [*said, rows.nbytes, rows.num_text_tokens(third)]


TOLD = {"Conversation": converse, "CasaStream": stream, "bounded": bounded, "sampled": sampled, "batch": streams}
QUICK = {("casa", "Conversation"), ("casa", "CasaStream"), ("casa", "batch"), ("casa-shared", "bounded")}


@pytest.mark.parametrize("variant, what", in_all(("casa", "casa-shared", "exact"), TOLD, QUICK))
def test_what_is_told(
    variant: str, what: str, source_folder: Path, processor: CasaProcessor, devices: LabelledDevices
) -> None:
    model = randomised(CasaForConditionalGeneration.from_pretrained(source_folder, casa_variant=variant))
    expected = TOLD[what](model, processor)
    assert any(expected)
    assert TOLD[what](model.to("cuda"), processor) == expected


def test_repetition_control_in_generate(devices: LabelledDevices) -> None:
    model = new_model("casa")
    inputs = batch([*words(3, 1), Image(2, 3, 1), *words(3, 2)])

    def generated() -> Tensor:
        processors = StreamSettings().repetition_control([3, 5], prompt_ignore_length=8)
        own = put(inputs, model.device.type, torch.float64)
        return model.generate(**own, max_new_tokens=12, do_sample=False, logits_processor=processors).cpu()

    expected = generated()
    model.to("cuda")
    assert torch.equal(generated(), expected)


# ---------------------------------------------------------------- caches

ROWS = ([*words(3, 1), Image(2, 3, 1), *words(3, 2)], [*words(2, 2), Image(1, 2, 2), *words(4, 3)])
STEP = {"input_ids": torch.tensor([[8], [9]])}


def reorder(cache: Any, model: Any, device: str) -> None:
    cache.reorder_cache(torch.tensor([1, 0], device=device))


def select(cache: Any, model: Any, device: str) -> None:
    cache.batch_select_indices(torch.tensor([1, 1], device=device))


def repeat_and_select(cache: Any, model: Any, device: str) -> None:
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 3]))


def crop(cache: Any, model: Any, device: str) -> None:
    cache.crop(-2)


def reset(cache: Any, model: Any, device: str) -> None:
    cache.reset()


def evict(cache: Any, model: Any, device: str) -> None:
    assert model.evict_text(cache, 6, 2) is not None


def evict_by_row(cache: Any, model: Any, device: str) -> None:
    # Numbers for each row may come from either device.
    assert model.evict_text(cache, torch.tensor([5, 7]), torch.tensor([2, 3], device=device)) is not None


ON_DYNAMIC: list[Callable] = [reorder, select, repeat_and_select, crop, reset, evict, evict_by_row]
ON_STATIC: list[Callable] = [reorder, crop, reset, evict, evict_by_row]
CHANGES = [(DynamicCache, change) for change in ON_DYNAMIC] + [(StaticCache, change) for change in ON_STATIC]


@pytest.mark.parametrize("variant", ["casa", pytest.param("exact", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind, change", CHANGES, ids=lambda value: value.__name__)
def test_caches_are_changed(variant: str, kind: Any, change: Callable, devices: LabelledDevices) -> None:
    model = new_model(variant)

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
