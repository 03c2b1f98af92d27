# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""What README and docs/publishing.md tell to run does run, in their order, against a Hub on this machine."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from casa_hf.cli import main
from tests.hub.loopback import Hub

ROOT = Path(__file__).parents[2]


def push(command: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(shlex.split(command)[1:])
    assert not ended.value.code


def test_publishing(hub: Hub, casa_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(casa_folder, tmp_path / "my-casa-model")
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "publishing.md").read_text("utf-8")
    blocks = re.findall(r"^```(python)?\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    assert [language for language, _ in blocks] == ["python", "", "python", "python", "", "python"]
    names: dict = {}
    for language, block in blocks:
        if language:
            exec(compile(block, "publishing.md", "exec"), names)
        else:
            for command in block.splitlines():
                push(command)
    assert hub.repositories["me/my-secret-model"].private
    assert hub.commits("me/my-finetuned-model", "v2")[-1].message == "Trained for longer"
    assert "modeling_casa.py" in hub.files("me/my-portable-model")


def test_readme(hub: Hub, casa_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(casa_folder, tmp_path / "qwen-casa")
    monkeypatch.chdir(tmp_path)
    (command,) = re.findall(r"^casa-hf push .*$", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE)
    push(command)
    assert list(hub.repositories) == ["me/qwen-casa"]
