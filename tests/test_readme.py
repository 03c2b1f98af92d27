# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The README's code runs as it stands, from top to bottom, on a tiny checkpoint in place of the large one."""

import re
import shutil
from pathlib import Path

import pytest

from casa_hf import CasaForConditionalGeneration
from casa_hf.samples import CAT
from examples.tiny_source import build_tiny_source

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
COMMANDS = re.findall(r"^casa-hf (.*)$", README, flags=re.MULTILINE)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty folder but for what would be downloaded; the checkpoint's name is that of the real one."""
    build_tiny_source(tmp_path / "Qwen" / "Qwen2.5-VL-3B-Instruct")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_python_blocks(workplace, capsys):
    assert len(BLOCKS) == 7
    names: dict = {}
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), names)
    nbytes = names["casa_hf"].cache_nbytes(names["output"].cache)
    assert nbytes["image"] > 0
    assert str(nbytes) in capsys.readouterr().out
    # The first answer came from pixels, this one from features of the same picture.
    new = names["inputs"]["input_ids"].shape[1]
    assert names["answer"][0].tolist() == names["output"].sequences[0].tolist()
    assert len(names["answer"][0]) > new
    assert (names["event"].kind, names["stream"].num_frames, names["stream"].closed) == ("end", 3, True)
    assert CasaForConditionalGeneration.from_pretrained("my-finetuned-model").config.variant == "casa"


def test_no_link_needs_the_repository():
    """The page is shown where the package is published, too."""
    links = re.findall(r"\]\(([^)]*)\)", README)
    assert links and all(link.startswith("https://") for link in links)
    named = set(re.findall(r"`([\w/-]+\.md)`", README))
    assert {"docs/README.md", "docs/training.md"} <= named and all((ROOT / name).is_file() for name in named)
    listed = set(re.findall(r"\]\(([\w-]+\.md)\)", (ROOT / "docs" / "README.md").read_text("utf-8")))
    assert listed == {file.name for file in (ROOT / "docs").glob("*.md")} - {"README.md"}


def test_commands(workplace, monkeypatch):
    from typer.testing import CliRunner

    from casa_hf.cli.app import app

    shutil.copy(CAT, "cat.jpg")
    shutil.copy(ROOT / "examples" / "assets" / "bunny.mp4", "clip.mp4")
    others = ["inspect", "generate", "generate", "chat", "caption", "serve", "push"]
    assert [command.split()[0] for command in COMMANDS] == ["convert"] * 4 + others
    for command in COMMANDS[:-2]:  # tests of serving and hub run the others
        arguments = re.findall(r'"([^"]*)"|(\S+)', command)
        result = CliRunner().invoke(app, [quoted or plain for quoted, plain in arguments], input="Hello\n/quit\n")
        assert result.exit_code == 0, result.output
    made = {path.name for path in workplace.iterdir() if (path / "config.json").is_file()}
    assert {"qwen-casa", "qwen-gated", "qwen-again"} <= made
    assert "not-written" not in made
    assert (workplace / "captions.srt").read_text("utf-8").startswith("1\n00:00:00,000 --> ")
    assert (workplace / "captioned.mp4").is_file()
