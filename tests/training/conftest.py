# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""A processor with small images, and checkpoints of further designs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from casa_hf import CasaProcessor, convert_checkpoint
from tests.training.helpers import load_processor


@pytest.fixture(scope="session")
def processor(casa_folder: Path) -> CasaProcessor:
    return load_processor(casa_folder)


@pytest.fixture(scope="session")
def converted(source_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Variant and options -> folder of a checkpoint, made once."""
    made: dict[str, Path] = {}

    def convert(variant: str, **options: object) -> Path:
        key = f"{variant} {sorted(options.items())}"
        if key not in made:
            folder = tmp_path_factory.mktemp("variants") / "checkpoint"
            made[key] = convert_checkpoint(source_folder, folder, variant, **options).output
        return made[key]

    return convert
