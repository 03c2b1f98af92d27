# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""How many kernels a frame of a stream launches, and a prefill of `generate`, and how often the host waits: numbers
that may only fall.

Counted on labelled devices: operators that run there, views and copies from the host aside. A frame is the forward of
the next image of a stream, with a few tokens around it, on a filled cache.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, StaticCache

from casa_hf import CasaForConditionalGeneration
from tests.helpers_generation import Image, batch, new_model
from tests.labelled_device import _FREE, LabelledDevices
from tests.tiny import FAMILIES, random_tensor


class Counted(NamedTuple):
    """What a forward cost.

    Attributes:
        tower, language_model: kernels of the tower, and of all else.
        waits: how often the host waited, Transformers' own code in `generate` aside.
    """

    tower: int
    language_model: int
    waits: int


def own_waits(devices: LabelledDevices) -> int:
    """Waits but for those below our call of Transformers' `generate`, which bear the name of that line."""
    return sum(
        number
        for places in (devices.reads, devices.copies)
        for place, number in places.items()
        if not place.startswith("generation_casa.py")
    )


def counted(model: Any, devices: LabelledDevices, cache: Any = None, ids: str = "cuda") -> Counted:
    """The third frame of a stream, two decoding steps after the second; a prefill where there is no cache."""
    marks: list[int] = []
    tower = model.model.visual
    handles = [
        tower.register_forward_pre_hook(lambda *_: marks.append(devices.kernels.total())),
        tower.register_forward_hook(lambda *_: marks.append(devices.kernels.total())),
    ]
    dtype, patch_dim = tower.patch_embed.proj.weight.dtype, tower.patch_embed.proj.weight[0].numel()
    for number in range(3 if cache is not None else 1):
        inputs: dict[str, Any] = batch([5, 6, 7, Image(2, 3, number)])
        pixels = random_tensor(f"pixels {number}", (24, patch_dim)).to(dtype)
        inputs |= {"pixel_values": pixels.to("cuda"), "input_ids": inputs["input_ids"].to(ids)}
        del inputs["attention_mask"]
        marks.clear()
        devices.forget()
        with torch.no_grad():
            if cache is None:
                model.generate(**inputs, max_new_tokens=1, do_sample=False)
            else:
                model(**inputs, image_positions=torch.tensor([[0, 4]]), cache=cache)
            of_tower = marks[1] - marks[0]
            print(dict(devices.reads), dict(devices.copies), dict(devices.kernels))
            result = Counted(of_tower, devices.kernels.total() - of_tower, own_waits(devices))
            for _ in range(0 if cache is None else 2):
                model(input_ids=torch.tensor([[8]], device=ids), cache=cache)
    for handle in handles:
        handle.remove()
    return result


def with_blocks(variant: str, number: int) -> Any:
    source = FAMILIES["qwen2_5_vl_text"].source_config(num_hidden_layers=number, max_window_layers=number)
    config = FAMILIES["qwen2_5_vl_text"].casa_config(variant, source=source, source_config=None)
    return CasaForConditionalGeneration._from_config(config).float().eval()


@pytest.mark.parametrize(
    "variant, per_block, beside",
    [("casa", 59, 47), ("ca", 51, 41), ("casa-shared", 55, 47), ("ca-shared", 49, 41), ("exact", 90, 47)],
)
def test_a_frame(variant: str, per_block: int, beside: int, devices: LabelledDevices) -> None:
    """Kernels grow by a number per block; below 2,200 for `casa` in the 36 blocks of Qwen2.5-VL-3B."""
    few, more = (counted(with_blocks(variant, number).to("cuda"), devices, DynamicCache()) for number in (2, 4))
    found = (more.language_model - few.language_model) / 2
    assert found <= per_block
    assert few.language_model - 2 * found <= beside
    assert few.waits == more.waits == 1
    if variant == "casa":
        assert 36 * per_block + beside < 2_200


class Operators(TorchDispatchMode):
    """Counts operators on the CPU that have a result and are no views."""

    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = any(isinstance(x, torch.Tensor) and x.numel() for x in tree_leaves(result))
        self.number += made and not func.is_view and func.overloadpacket.__name__ not in _FREE
        return result


@pytest.mark.parametrize("variant, per_block", [("casa", 57), ("ca", 52), ("casa-shared", 56), ("exact", 94)])
def test_a_frame_in_bfloat16_with_fused_projections(variant: str, per_block: int) -> None:
    """On the CPU, where planning is counted too, but not once for each block. The norms of a block take two kernels
    more than in float32."""
    totals = []
    for number in (2, 4):
        model = with_blocks(variant, number).bfloat16()
        model.fuse_projections()
        cache = DynamicCache()
        for image in range(2):
            inputs: dict[str, Any] = batch([5, 6, 7, Image(2, 3, image)])
            del inputs["attention_mask"]
            inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
            with Operators() as operators, torch.no_grad():
                model(**inputs, cache=cache)
            with torch.no_grad():
                model(input_ids=torch.tensor([[8]]), cache=cache)
        totals.append(operators.number)
    assert (totals[1] - totals[0]) / 2 <= per_block
    assert variant != "casa" or 36 * per_block + 55 < 2_200


@pytest.mark.parametrize("variant", ["casa", "ca", "casa-shared", "exact"])
def test_a_frame_of_which_the_caller_keeps_all_on_the_host(variant: str, devices: LabelledDevices) -> None:
    """Ids, too: then nothing at all is waited for, though two tokens have been decoded since the last frame."""
    model = new_model(variant, torch.float32).to("cuda")
    assert counted(model, devices, DynamicCache(), ids="cpu").waits == 0


@pytest.mark.parametrize("variant, beside", [("casa", 88), ("ca", 80), ("casa-shared", 72), ("exact", 88)])
def test_a_frame_on_a_static_cache(variant: str, beside: int, devices: LabelledDevices) -> None:
    model = with_blocks(variant, 2).to("cuda")
    grown = counted(model, devices, DynamicCache())
    frame = counted(model, devices, StaticCache(model.config.get_text_config(), max_cache_len=64))
    assert frame.language_model <= grown.language_model + beside and frame.waits == 1


@pytest.mark.parametrize("variant", ["casa", "ca", "casa-shared", "exact"])
def test_a_prefill_of_generate(variant: str, devices: LabelledDevices) -> None:
    """Waits once to find the images and once for the windows; beside the model `generate` launches its own kernels."""
    model = with_blocks(variant, 2).to("cuda")
    frame, prefill = counted(model, devices, DynamicCache()), counted(model, devices)
    assert prefill.waits == 2
    assert prefill.language_model <= frame.language_model + 40


@pytest.mark.parametrize(
    "family, tower, language_model",
    [
        ("qwen2_vl_text", 59, 224),
        ("qwen2_5_vl_text", 91, 224),
        ("qwen3_vl_text", 107, 319),
        ("qwen3_5_text", 59, 450),
        ("helium", 91, 234),
    ],
)
def test_towers_are_told_what_they_would_read(
    family: str, tower: int, language_model: int, devices: LabelledDevices
) -> None:
    """Each kind of tower gets positions, lengths, window indices and interpolation from the CPU, and reads nothing."""
    config = FAMILIES[family].casa_config("casa", source_config=None)
    model = CasaForConditionalGeneration._from_config(config).float().eval().to("cuda")
    frame = counted(model, devices, DynamicCache())
    assert frame.tower <= tower and frame.language_model <= language_model
    assert frame.waits == 1
    assert counted(model, devices).waits == 2
