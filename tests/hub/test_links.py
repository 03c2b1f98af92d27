# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""No file from outside a checkpoint's folder is published, though a link in the folder leads to it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from casa_hf import CasaForConditionalGeneration, CheckpointError
from casa_hf.hub.push import push_checkpoint
from tests.hub.loopback import Hub


def linked(casa_folder: Path, tmp_path: Path, name: str) -> Path:
    """A copy of a checkpoint, in which a file is a link to one outside."""
    folder = shutil.copytree(casa_folder, tmp_path / "casa")
    if (folder / name).exists():
        (folder / name).rename(tmp_path / "secret")
    else:
        (tmp_path / "secret").write_text("secret")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).symlink_to(tmp_path / "secret")
    return folder


@pytest.mark.parametrize(
    "name", ["LICENSE", "README.md", "tokenizer.json", "model.safetensors", "additional_chat_templates/more.jinja"]
)
def test_push(hub: Hub, casa_folder: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' leads out of {tmp_path / 'casa'}, to {tmp_path / 'secret'}"):
        push_checkpoint(linked(casa_folder, tmp_path, name), "me/casa")
    assert hub.repositories == {}


def test_a_folder_of_links(hub: Hub, casa_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'additional_chat_templates/more\.jinja' leads out"):
        folder = shutil.copytree(casa_folder, tmp_path / "casa")
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "more.jinja").write_text("secret")
        (folder / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
        push_checkpoint(folder, "me/casa")


@pytest.mark.parametrize("name", ["README.md"])
def test_save_pretrained(hub: Hub, casa_folder: Path, tmp_path: Path, name: str) -> None:
    model = CasaForConditionalGeneration.from_pretrained(casa_folder)
    with pytest.raises(ValueError, match=f"'{name}' leads out of"):
        model.save_pretrained(linked(casa_folder, tmp_path, name), push_to_hub=True, repo_id="me/casa")
    assert "me/casa" not in hub.repositories
