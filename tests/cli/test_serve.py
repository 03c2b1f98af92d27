# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""`casa-hf serve` before it serves; tests/serving has the server."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from casa_hf.serving import transformers_serve
from tests.command_line import Cli


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the environment has."""
    monkeypatch.setattr(transformers_serve, "is_serve_available", lambda: True)


def test_what_is_missing(cli: Cli, casa_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers_serve, "is_serve_available", lambda: False)
    assert cli("serve", casa_folder).failed_with_one_line("FastAPI", "pip install casa_hf[serving]")


def test_wrong_values(cli: Cli, casa_folder: Path, source_folder: Path) -> None:
    assert cli("serve", source_folder).refused("is not a CASA checkpoint")
    assert cli("serve", casa_folder, "--timeout", "0").refused("--timeout 0", "positive number of seconds")
    assert cli("serve", casa_folder, "--max-bytes", "0").refused("--max-bytes 0")
    assert cli("serve", casa_folder, "--max-decoded-pixels", "-1").refused("--max-decoded-pixels -1")


def test_a_taken_port(cli: Cli, casa_folder: Path) -> None:
    """Before the model is loaded."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert cli("serve", casa_folder, "--port", port).failed_with_one_line(
            f"can't be served at 127.0.0.1:{port}", "choose another host or port"
        )
