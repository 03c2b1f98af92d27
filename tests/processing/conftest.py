# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""A processor made from a small Qwen2.5-VL checkpoint, its stock parts to compare with, real photographs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import AutoTokenizer
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from casa_hf import CasaProcessor
from casa_hf.samples import PHOTOGRAPHS
from examples.tiny_source import build_tiny_source

SIDE = 140


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_source(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="session")
def processor(source: Path) -> CasaProcessor:
    """With small images, which are as good as large ones here and faster."""
    return CasaProcessor.from_source(source, max_pixels=SIDE**2, frame_max_pixels=SIDE**2 // 4)


@pytest.fixture(scope="session")
def stock_pixels(source: Path) -> Any:
    """The stock image processor as a function (images, max_pixels) -> features."""
    stock = AutoImageProcessor.from_pretrained(source)

    def process(images: list[Any], max_pixels: int = SIDE**2) -> Any:
        size = {"shortest_edge": 3136, "longest_edge": max_pixels}
        return stock(images=images, size=size, return_tensors="pt")

    return process


@pytest.fixture(scope="session")
def tokenizer(source: Path) -> Any:
    return AutoTokenizer.from_pretrained(source)


@pytest.fixture(scope="session")
def photos() -> dict[str, Image.Image]:
    return {name: Image.open(PHOTOGRAPHS / f"{name}.jpg").convert("RGB") for name in ("cat", "coffee", "rocket")}
