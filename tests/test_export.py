# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""What `torch.export` and ONNX can make of a CASA model, and what they are refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

from casa_hf import CasaForConditionalGeneration, CasaProcessor
from casa_hf.exporting import FixedCall
from casa_hf.samples import PHOTOGRAPHS
from tests.helpers_generation import words
from tests.sources import randomised
from tests.tiny import FAMILIES


class Logits(torch.nn.Module):
    """Logits of text alone."""

    def __init__(self, model: CasaForConditionalGeneration):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


@pytest.fixture(scope="module")
def model(casa_folder: Path) -> CasaForConditionalGeneration:
    return CasaForConditionalGeneration.from_pretrained(casa_folder).eval()


def other_ids() -> torch.Tensor:
    """Another text than the one that a graph is traced with."""
    return torch.arange(40, 52)[None]


def test_text_alone(model: CasaForConditionalGeneration) -> None:
    exported = torch.export.export(Logits(model), (torch.arange(12)[None],), strict=False)
    with torch.no_grad():
        torch.testing.assert_close(exported.module()(other_ids()), Logits(model)(other_ids()))


@pytest.mark.filterwarnings("ignore")  # of the exporter, about itself
def test_text_alone_by_onnx(model: CasaForConditionalGeneration, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    file = tmp_path / "model.onnx"
    torch.onnx.export(Logits(model), (torch.arange(12)[None],), str(file), dynamo=True, verbose=False)
    session = runtime.InferenceSession(str(file))
    (found,) = session.run(None, {session.get_inputs()[0].name: other_ids().numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), Logits(model)(other_ids()), rtol=1e-4, atol=1e-4)


FORMS = {
    "casa": ("qwen2_5_vl_text", "casa"),
    "ca": ("qwen2_5_vl_text", "ca"),
    "casa-shared": ("qwen2_vl_text", "casa-shared"),
    "exact": ("qwen2_5_vl_text", "exact"),
    "deepstack": ("qwen3_vl_text", "casa"),
    "linear attention": ("qwen3_5_text", "casa"),
    "projector": ("helium", "casa"),
}


def with_images(form: str) -> tuple[CasaForConditionalGeneration, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A random model, a text with two images of two windows, and another text with others of these sizes."""
    family, variant = FORMS[form]
    model = randomised(CasaForConditionalGeneration(FAMILIES[family].casa_config(variant))).eval()
    config, vision = model.config, model.config.vision_config
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    start = [] if config.vision_start_token_id is None else [config.vision_start_token_id]

    def inputs(seed: int) -> dict[str, torch.Tensor]:
        image = [*start, config.image_token_id]
        ids = [*words(3, seed), *image, *words(4, seed + 1), *image, *words(2, seed + 2)]
        pixels = torch.randn(24 + 16, width, generator=torch.Generator().manual_seed(seed))
        grids = torch.tensor([[1, 4, 6], [1, 4, 4]])
        return {"input_ids": torch.tensor([ids]), "pixel_values": pixels, "image_grid_thw": grids}

    return model, inputs(1), inputs(11)


@pytest.mark.parametrize("form", FORMS)
def test_images_of_fixed_sizes(form: str) -> None:
    """Other words and other pixels than those that the graph is traced with."""
    model, inputs, others = with_images(form)
    with torch.no_grad():
        expected, before = (model(**given, use_cache=False).logits for given in (others, inputs))
    assert (expected - before).abs().max() > 0.1
    fixed = FixedCall(model, **inputs)
    exported: Any = torch.export.export(fixed, (inputs["input_ids"], inputs["pixel_values"]), strict=False).module()
    with torch.no_grad():
        for call in (exported, fixed):
            found = call(others["input_ids"], others["pixel_values"])
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # of the exporter, about itself
def test_images_of_fixed_sizes_by_onnx(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, inputs, others = with_images("casa")
    model.float()  # which onnxruntime computes all of
    given, file = (inputs["input_ids"], inputs["pixel_values"]), str(tmp_path / "model.onnx")
    torch.onnx.export(FixedCall(model, **inputs), given, file, dynamo=True, verbose=False)
    session = runtime.InferenceSession(file)
    names = [each.name for each in session.get_inputs()]
    (found,) = session.run(
        None, dict(zip(names, (others["input_ids"].numpy(), others["pixel_values"].numpy()), strict=True))
    )
    with torch.no_grad():
        expected = model(**others, use_cache=False).logits
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-3, atol=1e-3)


def test_what_is_planned_otherwise_is_refused() -> None:
    model, inputs, others = with_images("casa")
    fixed = FixedCall(model, **inputs)
    elsewhere = others["input_ids"].roll(1, dims=1)
    with pytest.raises(ValueError, match="at other places than the example's"):
        fixed(elsewhere, others["pixel_values"])
    with pytest.raises(ValueError, match="has no pixel_values and no image_grid_thw"):
        FixedCall(model, input_ids=inputs["input_ids"])
    with pytest.raises(ValueError, match="A cache can't be exported"):
        FixedCall(model, **inputs, use_cache=True)
    with pytest.raises(ValueError, match="training mode"):
        FixedCall(model.train(), **inputs)


def test_images_are_refused(model: CasaForConditionalGeneration, casa_folder: Path) -> None:
    processor = CasaProcessor.from_pretrained(casa_folder)
    text = f"{processor.image_placeholder}What?"
    inputs: dict[str, Any] = dict(processor(text=text, images=PHOTOGRAPHS / "cat.jpg", return_tensors="pt"))
    with pytest.raises(NotImplementedError, match=r"call with images .* Export casa_hf.exporting.FixedCall"):
        torch.export.export(model, (), {**inputs, "use_cache": False}, strict=False)


def filled(model: CasaForConditionalGeneration, inputs: dict[str, torch.Tensor]) -> StaticCache:
    """A static cache with a text and its images."""
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=32)
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
    return cache


@pytest.mark.parametrize("form", ["casa", "ca", "exact", "deepstack", "projector"])
def test_decoding_steps_on_a_static_cache(form: str) -> None:
    """One graph for all of them, behind images: it takes the cache and returns it."""
    exporters = pytest.importorskip("transformers.exporters.exporter_dynamo")
    model, inputs, others = with_images(form)
    exporters.register_cache_pytrees_for_model(model)
    given = {"input_ids": torch.tensor([[9]]), "past_key_values": filled(model, inputs)}
    exported: Any = torch.export.export(model, (), given, strict=False).module()
    cache, expected_cache = filled(model, others), filled(model, others)
    with torch.no_grad():
        for token in words(6, 21):
            step = torch.tensor([[token]])
            expected = model(input_ids=step, past_key_values=expected_cache).logits
            found = exported(input_ids=step, past_key_values=cache)
            torch.testing.assert_close(found.logits, expected, rtol=1e-5, atol=1e-5)
            cache = found.past_key_values


@pytest.mark.parametrize("kind", ["captured", "growing", "prompt"])
def test_other_calls_with_a_cache_are_refused(kind: str) -> None:
    """A cache that isn't an input, one that grows, several tokens at once."""
    model, inputs, _ = with_images("casa")
    cache: Any = filled(model, inputs)
    if kind == "growing":
        cache = DynamicCache()
        with torch.no_grad():
            model(**inputs, past_key_values=cache)

    class Step(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return model(input_ids=input_ids, past_key_values=cache).logits

    ids = torch.ones((1, 2 if kind == "prompt" else 1), dtype=torch.long)
    with pytest.raises(NotImplementedError, match=r"with this cache .* a filled StaticCache as an input"):
        torch.export.export(Step(), (ids,), strict=False)
