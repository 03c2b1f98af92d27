# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""A processor made from a small Qwen2.5-VL checkpoint, its stock parts to compare with, real photographs, a server."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from PIL import Image
from transformers import AutoTokenizer
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from casa_hf.processing_casa import CasaProcessor
from examples.tiny_source import build_tiny_source

PHOTOS = Path(__file__).parents[2] / "examples" / "assets"
SIDE = 140


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_source(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="session")
def processor(source: Path) -> CasaProcessor:
    """With small pictures, which are as good as large ones here and faster."""
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
    return {name: Image.open(PHOTOS / f"{name}.jpg").convert("RGB") for name in ("cat", "coffee", "rocket")}


class _QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def serve() -> Iterator[Any]:
    """Serve a folder over HTTP on this machine: folder -> address of the folder."""
    servers = []

    def start(folder: Path) -> str:
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_QuietHandler, directory=str(folder)))
        servers.append(server)
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
