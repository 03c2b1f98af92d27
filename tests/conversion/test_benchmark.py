# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The conversion benchmark runs, measures and cleans up."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import convert as benchmark
from casa_hf.checkpoint_files.shards import read_checkpoint
from casa_hf.conversion import convert_checkpoint

ROOT = Path(__file__).parents[2]


def test_source_has_the_hubs_layout_and_converts(tmp_path):
    benchmark.build_source(tmp_path / "source", "tiny")
    names = read_checkpoint(tmp_path / "source")
    assert {name.split(".")[0] for name in names} == {"visual", "model"}
    assert {tensor.dtype for tensor in names.values()} == {"BF16"}
    convert_checkpoint(tmp_path / "source", tmp_path / "casa")


@pytest.mark.slow
def test_command(tmp_path):
    command = [sys.executable, "-m", "benchmarks.convert", "--size", "tiny", "--runs", "1", "--folder", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    figures = json.loads(result.stdout.splitlines()[-1])
    assert figures["output_bytes"] > figures["source_bytes"] > 0
    assert 0 < figures["convert_s"] < figures["process_s"]
    assert 0 < figures["peak_anonymous_bytes"] < benchmark.MEMORY_BAR
    assert list(tmp_path.iterdir()) == []
