# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The code in docs/streaming.md that needs nothing but a model runs as it stands."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import fields
from pathlib import Path

from casa_hf import CasaStream, StreamSettings

ROOT = Path(__file__).parents[2]
SECTIONS = (
    "A first stream",
    "Controls",
    "When the model is late",
    "Questions",
    "For ever",
    "Many streams",
    "Fork, save, start over",
)


def test_code_of_the_first_sections(casa_folder, tmp_path, monkeypatch, capsys):
    document = (ROOT / "docs" / "streaming.md").read_text("utf-8")
    sections = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", document, flags=re.MULTILINE | re.DOTALL))
    shutil.copytree(casa_folder, tmp_path / "my-casa-model")
    settings = json.loads((tmp_path / "my-casa-model" / "processor_config.json").read_text("utf-8"))
    settings["frame_max_pixels"] = 56 * 112  # small frames are as good here, and quick
    (tmp_path / "my-casa-model" / "processor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for title in SECTIONS:
        blocks = re.findall(r"^```python\n(.*?)^```", sections[title], flags=re.MULTILINE | re.DOTALL)
        assert blocks, title
        for block in blocks:
            exec(compile(block, "streaming.md", "exec"), names)
    assert names["events"][-1].kind == "end"
    assert [event.kind for event in names["events"]][:2] == ["merged", "merged"]
    assert names["story"].shape[1] > names["inputs"]["input_ids"].shape[1]
    assert isinstance(names["later"], CasaStream) and names["later"].num_frames == names["stream"].num_frames == 18
    assert names["answer"] and "the model is late" in capsys.readouterr().out


def test_every_control_is_documented():
    """By the name and with the default that the code has."""
    document = (ROOT / "docs" / "streaming.md").read_text("utf-8")
    [controls] = re.findall(r"^## Controls\n(.*?)(?=^## )", document, flags=re.MULTILINE | re.DOTALL)
    for field in fields(StreamSettings):
        default = "..." if field.name == "prompt" else f'"{field.default}"' if field.default == "" else field.default
        assert f"`{field.name}={default}`" in controls, field.name
