# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The page of coverage, from a measurement that is made here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.coverage_page import page

PROGRAM = """\
def sign(number):
    if number < 0:
        return -1
    return 1

sign(2)
"""


@pytest.fixture
def report(tmp_path: Path) -> dict:
    folder = tmp_path / "src" / "casa_hf" / "streaming"
    folder.mkdir(parents=True)
    (folder / "signs.py").write_text(PROGRAM, "utf-8")
    (folder.parent / "__init__.py").write_text("LIMIT = 3", "utf-8")
    # Where `make coverage` runs this test, its own measurement isn't taken up.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("COVERAGE")}
    for arguments in (
        ("run", "--branch", "--source", "src", "src/casa_hf/streaming/signs.py"),
        ("json", "-o", "report.json"),
    ):
        command = [sys.executable, "-m", "coverage", *arguments]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, env=environment)
    return json.loads((tmp_path / "report.json").read_text("utf-8"))


def test_each_part_counts_its_files(report: dict) -> None:
    text = page(report, date="2030-01-31", commit="abc1234", python="3.11.7")
    # Five statements of which one isn't reached, two branches of which one isn't taken: 5 of 7.
    assert "| casa_hf/streaming/ | 5 | 1 | 2 | 1 | 71.4 % |" in text
    assert "| flat modules | 1 | 1 | 0 | 0 | 0.0 % |" in text
    assert "| all | 6 | 2 | 2 | 1 | 62.5 % |" in text
    assert "**62.5 %**" in text and "2030-01-31 at commit abc1234, with Python 3.11.7" in " ".join(text.split())
