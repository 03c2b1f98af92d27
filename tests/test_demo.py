# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""`make demo` goes the whole way, says what it does, and says the same each time."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from examples import demo
from examples.tiny_world.held_out import held_out


def test_demo(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    demo.main()
    shown = capsys.readouterr().out
    assert [line[:2] for line in shown.splitlines() if line[0].isdigit()] == ["1.", "2.", "3."]
    # 28 x 28 pixels make one image token.
    width, height = Image.open(demo.PHOTOGRAPH).size
    assert f"{round(width / 28) * round(height / 28)} image tokens" in shown
    # Each model's answers are counted, and wrong ones are marked: both say the same.
    counts = [tuple(map(int, found)) for found in re.findall(r"(\d+) of (\d+) right", shown)]
    assert len(counts) == 4 and {total for _, total in counts} == {len(held_out())}
    assert shown.count(" *") == sum(total - right for right, total in counts)
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"

    demo.main()
    assert capsys.readouterr().out == shown
