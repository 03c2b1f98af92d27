# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""`make demo` goes the whole way, says what it does, and says the same each time."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from examples import demo
from examples.tiny_world.held_out import held_out


def test_demo(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    demo.main()
    shown = capsys.readouterr().out
    assert [line[:2] for line in shown.splitlines() if line[0].isdigit()] == ["1.", "2.", "3."]
    # Of images, CASA holds the current one: every third is the cat, so only the text makes a difference.
    rows = re.findall(r"^ +(\d+) +(\d+) +([\d,]+) bytes +([\d,]+) bytes$", shown, flags=re.M)
    images, tokens, casa, source = zip(*([int(cell.replace(",", "")) for cell in row] for row in rows), strict=True)
    assert images == (1, 4, 16)
    text = 4 * 4 * 2 * 2 * 32  # bytes of one token: 4 layers, float32, keys and values, 2 heads of 32
    assert casa[2] - casa[1] == text * (tokens[2] - tokens[1])
    assert source[2] - source[1] > 12 * text * 60 and source[2] > 4 * casa[2]
    # Each model's answers are counted, and wrong ones are marked: both say the same.
    counts = [tuple(map(int, found)) for found in re.findall(r"(\d+) of (\d+) right", shown)]
    assert len(counts) == 4 and {total for _, total in counts} == {len(held_out())}
    assert shown.count(" *") == sum(total - right for right, total in counts)
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"

    demo.main()
    assert capsys.readouterr().out == shown
