# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Small models of random weights for streams, each with its processor."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from casa_hf import CasaForConditionalGeneration, CasaProcessor, convert_checkpoint
from examples.tiny_source import build_tiny_helium, build_tiny_source
from tests.tiny import random_tensor

FRAME_PIXELS = 112 * 84


def randomised(model: Any) -> Any:
    """In float64, with fusion layers that are no copies, and so many stop tokens that frames end at all lengths."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "casa_" in name:
                parameter.copy_(random_tensor(name, tuple(parameter.shape)))
    vocabulary = model.config.get_text_config().vocab_size
    model.generation_config.eos_token_id = [*range(3, vocabulary, 8), model.config.get_text_config().eos_token_id]
    return model.double().eval()


@pytest.fixture(scope="session")
def processor(source_folder: Path) -> CasaProcessor:
    return CasaProcessor.from_source(source_folder, max_pixels=4 * FRAME_PIXELS, frame_max_pixels=FRAME_PIXELS)


@pytest.fixture(scope="session")
def new_model(source_folder: Path) -> Callable[..., Any]:
    """(variant, design fields) -> model on Qwen2.5-VL, made anew."""

    def make(variant: str, **fields: Any) -> Any:
        return randomised(CasaForConditionalGeneration.from_pretrained(source_folder, casa_variant=variant, **fields))

    return make


@pytest.fixture(scope="session")
def model(new_model: Callable[..., Any]) -> Callable[[str], Any]:
    """variant -> model on Qwen2.5-VL, made once; tests must not change it."""
    return cache(new_model)


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory, source_folder: Path) -> Callable[..., tuple[Any, CasaProcessor]]:
    """(family, gist tokens) -> a `casa` model of this family and its processor."""

    def make(name: str, num_gist_tokens: int = 0) -> tuple[Any, CasaProcessor]:
        folder = tmp_path_factory.mktemp(name)
        vision = {"vision_from": source_folder} if name == "helium" else {}
        if name == "helium":
            build_tiny_helium(folder / "source")
        else:
            build_tiny_source(folder / "source", family=name)
        casa = convert_checkpoint(folder / "source", folder / "casa", num_gist_tokens=num_gist_tokens, **vision).output
        made = CasaProcessor.from_pretrained(casa)
        made.frame_max_pixels = max(FRAME_PIXELS, made.image_processor.size["shortest_edge"])
        return randomised(CasaForConditionalGeneration.from_pretrained(casa)), made

    return make
