# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Weights of 8 and 4 bits on a CPU, by the libraries that Transformers uses: what is converted, and what it gives."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from casa_hf import CasaForConditionalGeneration, CasaModel, CasaProcessor
from casa_hf.loading_casa import QUANTIZATION_SKIPS, _with_skips
from casa_hf.samples import PHOTOGRAPHS

# bitsandbytes' own: it computes in half precision, and says so.
pytestmark = [
    pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:bitsandbytes"),
]


def bitsandbytes(**settings: Any) -> Callable[[], Any]:
    def configuration() -> Any:
        pytest.importorskip("bitsandbytes")
        return transformers.BitsAndBytesConfig(**settings)

    return configuration


def torchao() -> Any:
    quantization = pytest.importorskip("torchao.quantization")
    return transformers.TorchAoConfig(quantization.Int8WeightOnlyConfig())


# How a configuration is made, and the error that is allowed: mean of the logits' differences, in parts of their mean.
LIBRARIES: dict[str, tuple[Callable[[], Any], float]] = {
    "bitsandbytes-8": (bitsandbytes(load_in_8bit=True), 0.1),
    "bitsandbytes-nf4": (bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"), 0.6),
    "torchao-8": (torchao, 0.1),
}
OF_THE_LANGUAGE_MODEL = re.compile(r"(model\.)?language_model\.layers\.\d+\.(self_attn|casa_attn|mlp)\.\w+_proj")


def converted(model: nn.Module) -> set[str]:
    """Names of linear layers whose weights a library has made its own."""
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {
        name
        for name, module in linear.items()
        if type(module) is not nn.Linear or type(module.weight.data) is not torch.Tensor
    }


@pytest.fixture(scope="module")
def inputs(casa_folder: Path) -> Any:
    """A prompt with two images."""
    processor = CasaProcessor.from_pretrained(casa_folder)
    images = [{"type": "image", "path": str(PHOTOGRAPHS / f"{name}.jpg")} for name in ("cat", "rocket")]
    return processor.apply_chat_template(
        [{"role": "user", "content": [*images, {"type": "text", "text": "What is it?"}]}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        processor_kwargs={"max_pixels": 7056},
    )


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_language_model_is_converted_and_nothing_else(
    casa_folder: Path, inputs: Any, tmp_path: Path, library: str
) -> None:
    """By default, also where the tower is too narrow for the library; it computes, generates, and is saved."""
    configuration, allowed = LIBRARIES[library]
    model = CasaForConditionalGeneration.from_pretrained(casa_folder, dtype=torch.float32)
    quantized = CasaForConditionalGeneration.from_pretrained(
        casa_folder, dtype=torch.float32, quantization_config=configuration()
    )
    quantized.save_pretrained(tmp_path)  # before it computes, in which bitsandbytes 0.50 turns the scales of 4 bits
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert converted(quantized) == set(filter(OF_THE_LANGUAGE_MODEL.fullmatch, linear))
    assert any("casa_attn" in name for name in converted(quantized))
    assert {"lm_head", "model.visual.blocks.0.attn.qkv"} <= linear - converted(quantized)
    features = [
        each.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
        for each in (model, quantized)
    ]
    assert all(torch.equal(one, other) for one, other in zip(*features, strict=True))
    with torch.no_grad():
        expected, found = model(**inputs).logits, quantized(**inputs).logits
    assert 0 < (found - expected).abs().mean() < allowed * expected.abs().mean()
    if library == "bitsandbytes-nf4":  # whose error is large in weights at random; it is that of the weights alone
        rounded = CasaForConditionalGeneration.from_pretrained(
            casa_folder, dtype=torch.float32, quantization_config=configuration()
        ).dequantize()
        assert not converted(rounded)
        with torch.no_grad():
            computed = rounded(**inputs).logits  # where the library rounds inputs to half precision too
        assert (found - computed).abs().mean() < 0.05 * computed.abs().mean()
    assert quantized.generate(**inputs, max_new_tokens=4, do_sample=False).shape[1] > inputs["input_ids"].shape[1]
    again = CasaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    assert converted(again) == converted(quantized)
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, found)


@pytest.mark.parametrize("library", LIBRARIES)
def test_without_the_head(casa_folder: Path, library: str) -> None:
    """The names of its modules begin otherwise."""
    model = CasaModel.from_pretrained(casa_folder, quantization_config=LIBRARIES[library][0]())
    assert converted(model) and all(OF_THE_LANGUAGE_MODEL.fullmatch(name) for name in converted(model))


def test_what_the_configuration_says_counts() -> None:
    """It stays as it was given, and one that doesn't say anything isn't changed for others."""
    given = transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["mlp"])
    assert _with_skips(given) is given and given.llm_int8_skip_modules == ["mlp"]
    silent = transformers.QuantoConfig(weights="int8")
    assert _with_skips(silent).modules_to_not_convert == list(QUANTIZATION_SKIPS)
    assert silent.modules_to_not_convert is None
    written = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    assert _with_skips(written).llm_int8_skip_modules == list(QUANTIZATION_SKIPS)
    assert written == {"quant_method": "bitsandbytes", "load_in_4bit": True}
