# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""How often the host waits for a CUDA device: exact numbers, which may only fall.

A call with a new image waits once, before the tower has work that it would wait for: for all that windows are planned
from and that only the device knows. What the caller has kept on the CPU costs nothing. A decoding step waits for
nothing, but where rows are padded Transformers looks whether any padding is in the mask.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, StaticCache

from casa_hf import CasaForConditionalGeneration, CasaProcessor, CasaStream, CasaStreamBatch, Conversation
from casa_hf.configuration_casa import VARIANTS
from casa_hf.torch_varlen import TORCH_VARLEN
from casa_hf.transformers_versions import is_older_than
from tests.cuda.test_model import DTYPES, in_all, put
from tests.helpers_generation import Image, batch, new_model
from tests.kernels import KERNELS, reference_kernels, register_torch_kernel, use_backend
from tests.labelled_device import Labelled, LabelledDevices
from tests.streaming.conftest import FRAME_PIXELS, randomised
from tests.streaming.helpers import emitted, picture

TOKENS = 6
QUICK = {("casa", "sdpa"), ("casa", TORCH_VARLEN), ("ca-shared", "flash_attention_2"), ("insertion", "sdpa")}


def waits(devices: LabelledDevices) -> tuple[int, int]:
    """Reads and copies since the last time."""
    counted = devices.reads.total(), devices.copies.total()
    print(dict(devices.reads), dict(devices.copies))  # told where a number isn't the expected one
    devices.forget()
    return counted


@pytest.mark.parametrize("variant, backend", in_all(VARIANTS, ("sdpa", *KERNELS), QUICK))
def test_a_frame_and_a_step_of_one_row(variant: str, backend: str, devices: LabelledDevices) -> None:
    """As in a stream: the frame's pixels are on the device, its size and place on the CPU."""
    if backend == TORCH_VARLEN and not register_torch_kernel():
        pytest.skip("this torch has no such kernel")
    model = use_backend(new_model(variant, DTYPES.get(backend, torch.float64)), backend).to("cuda")
    model.model.name_tower_backend()
    step = torch.tensor([[8]], device="cuda")
    for static in (False, True):
        cache = StaticCache(model.config.get_text_config(), max_cache_len=32) if static else DynamicCache()
        for number in range(3):
            inputs = put(batch([5, Image(2, 3, number)]), "cuda", model.dtype, "cpu")
            del inputs["attention_mask"]
            inputs["image_positions"] = torch.tensor([[0, 2]])
            with reference_kernels(devices.uncounted), torch.no_grad():
                devices.forget()
                model(**inputs, cache=cache)
                # A new static cache brings Transformers' counts of text to the device, one for each layer.
                frame = waits(devices) if number else devices.forget()
                model(input_ids=step, cache=cache)
        static_layers = 3 * (static and backend == "flash_attention_2")
        assert frame == (1, 0)
        assert waits(devices)[0] <= 2 * static_layers and not devices.copies


@pytest.mark.parametrize("given", ["ids", "positions", "all on the device", "padding"])
def test_what_a_prompt_of_several_rows_waits_for(given: str, devices: LabelledDevices) -> None:
    model = new_model("casa").to("cuda")
    inputs = put(batch([5, Image(2, 3, 1), 6], [7, Image(1, 2, 2), 8]), "cuda", torch.float64, "cpu")
    mask = inputs.pop("attention_mask")
    if given == "positions":
        inputs["image_positions"] = torch.tensor([[0, 2], [1, 2]])
    if given == "all on the device":
        inputs["image_grid_thw"] = inputs["image_grid_thw"].cuda()
    if given == "padding":
        mask[1, 0] = 0
        inputs["attention_mask"] = mask
    devices.forget()
    with torch.no_grad():
        model(**inputs, cache=DynamicCache())
    assert waits(devices) == (1, 0)


@pytest.mark.parametrize("compiled", [False, True])
def test_streams(source_folder: Path, devices: LabelledDevices, compiled: bool) -> None:
    """Each token is read once, whatever the number of rows, and a frame waits for its windows; on the static cache of
    steps that would be compiled too."""
    processor = CasaProcessor.from_source(source_folder, max_pixels=4 * FRAME_PIXELS, frame_max_pixels=FRAME_PIXELS)
    model = randomised(CasaForConditionalGeneration.from_pretrained(source_folder, casa_variant="casa")).to("cuda")
    model.generation_config.eos_token_id = None
    for drawn in (False, True):
        settings = {"max_new_tokens_per_frame": TOKENS, "do_sample": drawn, "seed": 1, "compile": compiled}
        stream = CasaStream(model, processor, **settings)
        emitted(stream.push(picture(0)))
        devices.forget()
        emitted(stream.push(picture(1)))
        assert waits(devices) == (1 + TOKENS, 0)

    with CasaStreamBatch(model, processor, max_new_tokens_per_frame=TOKENS, compile=False, collect_seconds=60) as rows:
        first, second = rows.add(), rows.add()
        list(rows.push({first: picture(0), second: picture(1)}))
        devices.forget()
        list(rows.push({first: picture(2), second: picture(3)}))
        assert waits(devices) == (1 + TOKENS, 0)
        list(rows.push({second: picture(4)}))
        assert waits(devices) == (1 + TOKENS, 0), "nor is the mask of padded rows read"


class Operators(TorchDispatchMode):
    """Counts what runs on a device: operators that are no views, and copies to it."""

    def __init__(self, devices: LabelledDevices):
        super().__init__()
        self.seen: list[str] = []
        self.counting = True
        self._moved = devices.moved

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.counting and not func.is_view and any(isinstance(x, Labelled) for x in tree_leaves((args, result))):
            self.seen.append(str(func))
        return result

    def moved(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        moved = self._moved(func, args, kwargs)
        if self.counting and moved.device != args[0].device:
            self.seen.append("copy")
        return moved


@pytest.mark.parametrize("drawn", [False, True], ids=["greedy", "sampled"])
def test_a_step_of_32_streams(
    drawn: bool, source_folder: Path, devices: LabelledDevices, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has rules and a seed of its own; the host waits once, and at most 40 kernels run beside the model."""
    processor = CasaProcessor.from_source(source_folder, max_pixels=4 * FRAME_PIXELS, frame_max_pixels=FRAME_PIXELS)
    model = randomised(CasaForConditionalGeneration.from_pretrained(source_folder, casa_variant="casa")).to("cuda")
    model.generation_config.eos_token_id = [3]
    settings: dict[str, Any] = {"max_new_tokens_per_frame": TOKENS, "stop_bias": 0.5, "compile": False}
    with CasaStreamBatch(model, processor, collect_seconds=60, **settings) as rows:
        streams = [
            rows.add(
                do_sample=drawn and number % 4 != 1,
                seed=number,
                temperature=0.5 + number / 32,
                top_k=8 * (number % 3),
                repetition_penalty=1 + number / 100,
                no_repeat_ngram_size=number % 5,
            )
            for number in range(32)
        ]
        list(rows.push(dict.fromkeys(streams, picture(0))))
        events = rows.push(dict.fromkeys(streams, picture(1)))
        next(events)
        rows._events.clear()
        assert len(rows._forwards) > 16, "most of them have not ended"
        operators = Operators(devices)
        monkeypatch.setattr(devices, "moved", operators.moved)
        handles = [
            model.register_forward_pre_hook(lambda *_: setattr(operators, "counting", False)),
            model.register_forward_hook(lambda *_: setattr(operators, "counting", True)),
        ]
        devices.forget()
        with operators, torch.no_grad():
            rows._run(dict(rows._forwards))
        for handle in handles:
            handle.remove()
        print(Counter(operators.seen))
        assert waits(devices) == (1, 0)
        assert len(operators.seen) <= (40 if drawn else 26)


def test_turns_of_a_conversation(source_folder: Path, devices: LabelledDevices) -> None:
    processor = CasaProcessor.from_source(source_folder, max_pixels=4 * FRAME_PIXELS)
    model = randomised(CasaForConditionalGeneration.from_pretrained(source_folder, casa_variant="casa")).to("cuda")
    model.generation_config.eos_token_id = None
    settings: dict[str, Any] = {"max_new_tokens": TOKENS, "do_sample": False}
    conversation = Conversation(model, processor)
    for question in ("What is this?", "And this?"):
        devices.forget()
        conversation.ask(question, [picture(0)], **settings)
    reads, copies = waits(devices)
    # `generate` looks after each token whether all rows have ended; older versions also whether the mask is all ones.
    assert reads <= TOKENS + 9 + (TOKENS - 1) * is_older_than(5, 24) and copies <= 6
