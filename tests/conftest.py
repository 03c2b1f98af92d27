# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Fixtures that several test files use: a small source checkpoint of random weights, its CASA form, a web server."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from transformers.utils.logging import disable_progress_bar

from casa_hf import convert_checkpoint, foreign_arguments, image_inputs
from examples.tiny_source import build_tiny_source

disable_progress_bar()


@pytest.fixture(scope="session")
def source_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete Qwen2.5-VL checkpoint; read only."""
    return build_tiny_source(tmp_path_factory.mktemp("checkpoints") / "source")


@pytest.fixture(scope="session")
def casa_folder(source_folder: Path) -> Path:
    """The same as a CASA checkpoint of the variant `casa`; read only."""
    return convert_checkpoint(source_folder, source_folder.with_name("casa")).output


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """A compiler that has compiled and counted nothing yet."""
    from torch._dynamo.utils import counters  # here, since most tests can do without its import

    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class KeptMessages(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.fixture(autouse=True)
def every_argument_is_read(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever runs in the tests passes no argument that nobody reads, unless that is what is tested."""
    handler = KeptMessages()
    foreign_arguments.logger.addHandler(handler)
    yield
    foreign_arguments.logger.removeHandler(handler)
    assert not handler.messages or "logged" in request.fixturenames, handler.messages


@pytest.fixture
def said() -> Iterator[list[str]]:
    """Messages about images; each is said once, so it is forgotten before."""
    image_inputs.logger.warning_once.cache_clear()
    handler = KeptMessages()
    image_inputs.logger.addHandler(handler)
    yield handler.messages
    image_inputs.logger.removeHandler(handler)


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
