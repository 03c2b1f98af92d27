# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""How many kernels a decoding step launches. Each figure here is a bar: a test fails when a step needs one more.

Kernels are counted on a CPU, in bfloat16, as operators that aren't views; those of one decoder block are what a model
with more blocks needs more. A stock block needs 40, of which its two norms are 16, its MLP 5 and residual sums 2.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._inductor.graph import GraphLowering
from transformers import DynamicCache, Qwen2_5_VLForConditionalGeneration, StaticCache

from casa_hf import CasaConfig, CasaForConditionalGeneration
from casa_hf.transformers_versions import CACHE
from tests.helpers_generation import Image, batch, words
from tests.ledger import Launches
from tests.tiny import casa_config, source_config

# Per block, with fused projections and with separate ones.
EAGER = {
    "casa": (36, 44),
    "ca": (34, 40),
    "casa-shared": (38, 43),
    "ca-shared": (33, 38),
    "exact": (36, 41),
    "insertion": (36, 41),
}
# What a step needs beside the blocks: windows, positions, embedding, last norm, head.
BESIDE = 60


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def model_of(variant: str, num_blocks: int, dtype: torch.dtype) -> Any:
    fields = casa_config(variant, source_config=None).to_dict()
    text = fields["text_config"] | {"num_hidden_layers": num_blocks, "layer_types": ["full_attention"] * num_blocks}
    config = CasaConfig.from_dict({**fields, "text_config": text})
    return CasaForConditionalGeneration._from_config(config, attn_implementation="sdpa").to(dtype).eval()


def prefill(model: Any, cache: Any) -> None:
    inputs = batch([*words(3, 1), Image(4, 4, 1), *words(2, 2)])
    del inputs["attention_mask"]
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    model(**inputs, cache=cache)


def launches(variant: str, num_blocks: int, fused: bool) -> Launches:
    """What the third token after a prompt needs."""
    model, cache = model_of(variant, num_blocks, torch.bfloat16), DynamicCache()
    prefill(model, cache)
    if fused:
        assert model.fuse_projections() == num_blocks
    for token in (5, 6):
        model(input_ids=torch.tensor([[token]]), cache=cache)
    with Launches() as counted:
        model(input_ids=torch.tensor([[7]]), cache=cache)
    return counted


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("variant", EAGER)
def test_a_step(variant: str, fused: bool) -> None:
    few, more = (launches(variant, num_blocks, fused) for num_blocks in (3, 5))
    of_two_blocks = more.operators - few.operators
    assert of_two_blocks.total() <= 2 * EAGER[variant][0 if fused else 1], of_two_blocks
    assert few.number - 3 * of_two_blocks.total() / 2 <= BESIDE, few.operators


def test_a_stock_step() -> None:
    """The figure that the others are compared with is counted in the same way."""
    numbers = []
    for num_blocks in (3, 5):
        config = source_config()
        config.text_config.num_hidden_layers = num_blocks
        config.text_config.layer_types = ["full_attention"] * num_blocks
        model = Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation="sdpa")
        model = model.to(torch.bfloat16).eval()
        cache = DynamicCache()
        model(input_ids=torch.tensor([[3, 4, 5]]), **{CACHE: cache})
        with Launches() as counted:
            model(input_ids=torch.tensor([[7]]), **{CACHE: cache})
        numbers.append(counted.number)
    assert (numbers[1] - numbers[0]) / 2 == 40


# ------------------------------------------------------------------------------------ compiled

TEXT_ROOM = 512


class _Written(Exception):
    pass


def generated_code(variant: str, num_blocks: int, monkeypatch: pytest.MonkeyPatch) -> str:
    """What TorchInductor writes for a compiled step on a static cache; nothing of it is run."""
    written: list[str] = []

    def keep(code: str) -> None:
        written.append(code)
        raise _Written

    monkeypatch.setattr(GraphLowering, "save_output_code", staticmethod(keep))
    torch._dynamo.reset()
    model = model_of(variant, num_blocks, torch.float32)
    cache = StaticCache(config=model.config, max_cache_len=TEXT_ROOM)
    prefill(model, cache)
    model.fuse_projections()
    with torch._inductor.config.patch(fx_graph_cache=False), pytest.raises(Exception, match="_Written"):
        torch.compile(model, fullgraph=True)(input_ids=torch.tensor([[7]]), cache=cache)
    (code,) = written
    return code[code.index("def call(") :]


def kernel_calls(code: str) -> int:
    return len(re.findall(r"(?:cpp_fused_\w+|extern_kernels\.\w+|torch\.ops\.[\w.]+)\(", code))


@pytest.mark.slow
@pytest.mark.parametrize("variant, most", [("casa", 19), ("casa-shared", 15)])
def test_a_compiled_step(variant: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls of kernels in the code generated for a CPU; and no buffer in it is as large as the keys of the text,
    let alone keys that are repeated for every head."""
    few, more = (generated_code(variant, num_blocks, monkeypatch) for num_blocks in (2, 3))
    assert kernel_calls(more) - kernel_calls(few) <= most
    shapes = re.findall(r"empty_strided_cpu\(\(([\d, ]+)\),", more)
    assert len(shapes) > 30
    largest = max(math.prod(int(length) for length in re.findall(r"\d+", shape)) for shape in shapes)
    assert largest < 2 * TEXT_ROOM * 16  # heads, text, width
