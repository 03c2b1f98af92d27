# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Fixtures that several test files use: a small source checkpoint of random weights and its CASA form."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers.utils.logging import disable_progress_bar

from casa_hf import convert_checkpoint
from examples.tiny_source import build_tiny_source

disable_progress_bar()

PHOTOGRAPHS = Path(__file__).parents[1] / "examples" / "assets"


@pytest.fixture(scope="session")
def source_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete Qwen2.5-VL checkpoint; read only."""
    return build_tiny_source(tmp_path_factory.mktemp("checkpoints") / "source")


@pytest.fixture(scope="session")
def casa_folder(source_folder: Path) -> Path:
    """The same as a CASA checkpoint of the variant `casa`; read only."""
    return convert_checkpoint(source_folder, source_folder.with_name("casa")).output
