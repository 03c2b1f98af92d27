# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The command line, as a fixture."""

import pytest

from tests.command_line import Cli


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    return Cli(monkeypatch, capsys)
