# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""What `torch.export` and ONNX can make of a CASA model, and what they are refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import StaticCache

from casa_hf import CasaForConditionalGeneration, CasaProcessor
from casa_hf.samples import PHOTOGRAPHS


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


def test_images_are_refused(model: CasaForConditionalGeneration, casa_folder: Path) -> None:
    processor = CasaProcessor.from_pretrained(casa_folder)
    text = f"{processor.image_placeholder}What?"
    inputs: dict[str, Any] = dict(processor(text=text, images=PHOTOGRAPHS / "cat.jpg", return_tensors="pt"))
    with pytest.raises(NotImplementedError, match=r"call with images .* values of image_grid_thw"):
        torch.export.export(model, (), {**inputs, "use_cache": False}, strict=False)


def test_a_decoding_step_is_refused(model: CasaForConditionalGeneration) -> None:
    class Step(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return model(input_ids=input_ids, past_key_values=cache).logits

    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=16)
    model(input_ids=torch.arange(4)[None], past_key_values=cache)
    with pytest.raises(NotImplementedError, match=r"a decoding step, .* use_cache=False"):
        torch.export.export(Step(), (torch.ones((1, 1), dtype=torch.long),), strict=False)
