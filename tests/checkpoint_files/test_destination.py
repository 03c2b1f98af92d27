# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""New folders take no other's place, nothing finished is lost, and what was killed leaves nothing."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

from casa_hf import CheckpointError, convert_checkpoint
from casa_hf.checkpoint_files.destination import Destination, check_destination, move_new, new_folder


def fill(destination: Destination, text: str, meanwhile=lambda: None) -> None:
    with new_folder(destination, 0) as folder:
        (folder / "config.json").write_text(text)
        (folder / "model.safetensors").write_text(text)
        meanwhile()


def content(folder: Path) -> str:
    return (folder / "config.json").read_text()


def listing(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*"))


COMING = {
    "file": lambda target: target.write_text("mine"),
    "folder": lambda target: (target.mkdir(), (target / "config.json").write_text("mine")),
    "empty folder": lambda target: target.mkdir(),
    "link to nothing": lambda target: target.symlink_to("nowhere"),
}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", COMING)
def test_what_comes_meanwhile_stays(tmp_path, kind, overwrite):
    target = tmp_path / "casa"
    COMING[kind](tmp_path / "copy")
    before = listing(tmp_path)
    with pytest.raises(CheckpointError, match=rf"{target} was made by another process.*checkpoint is {target}-2;"):
        fill(check_destination(target, overwrite), "new", lambda: COMING[kind](target))
    assert content(tmp_path / "casa-2") == "new"
    shutil.rmtree(tmp_path / "casa-2")
    assert listing(tmp_path) == sorted(before + [name.replace("copy", "casa") for name in before])


def test_a_conversion_keeps_its_result(source_folder, casa_folder, tmp_path):
    target = tmp_path / "casa"

    def save_mine(done, total):
        target.mkdir(exist_ok=True)
        (target / "hours_of_work.txt").write_text("mine")

    with pytest.raises(CheckpointError, match=f"The finished checkpoint is {target}-2;"):
        convert_checkpoint(source_folder, target, progress=save_mine)
    assert listing(target) == ["hours_of_work.txt"]
    assert listing(tmp_path / "casa-2") == listing(casa_folder)


@pytest.mark.parametrize("overwrite", [False, True])
def test_two_at_once(tmp_path, overwrite):
    """The first one to finish has the place, whether it was free or another's before."""
    target = tmp_path / "casa"
    if overwrite:
        fill(check_destination(target, False), "old")
    first, second = check_destination(target, overwrite), check_destination(target, overwrite)
    with pytest.raises(CheckpointError, match=f"{target} .*meanwhile.*The finished checkpoint is {target}-2;"):
        fill(second, "second", lambda: fill(first, "first"))
    assert (content(target), content(tmp_path / "casa-2")) == ("first", "second")
    assert len(list(tmp_path.iterdir())) == 2


def test_a_second_one_is_refused_before_any_work(source_folder, tmp_path):
    refused = []

    def again(done, total):
        with pytest.raises(CheckpointError, match="Another process is writing") as error:
            convert_checkpoint(source_folder, tmp_path / "casa")
        refused.append(str(error.value))

    convert_checkpoint(source_folder, tmp_path / "casa", progress=again)
    assert refused and [file.name for file in tmp_path.iterdir()] == ["casa"]


@pytest.mark.parametrize("empty", [False, True])
def test_files_that_come_into_a_folder_to_overwrite(tmp_path, empty):
    target = tmp_path / "casa"
    target.mkdir()
    if not empty:
        (target / "config.json").write_text("old")
        (target / "model.safetensors").write_text("old")
    with pytest.raises(CheckpointError, match=f"{target} was changed by another process.*{target}-2;"):
        fill(check_destination(target, True), "new", lambda: (target / "mine").write_text("mine"))
    assert (target / "mine").read_text() == "mine" and content(tmp_path / "casa-2") == "new"
    fill(check_destination(target, True), "newer") if not empty else None
    assert empty or content(target) == "newer"


def test_a_link_stays_and_its_place_is_filled(tmp_path):
    """Once where nothing is yet, then in place of what is there; as the link says it, relative to where it is."""
    (tmp_path / "disk").mkdir()
    link, place = tmp_path / "casa", tmp_path / "disk" / "casa"
    link.symlink_to("disk/casa")
    fill(check_destination(link, False), "old")
    with pytest.raises(CheckpointError, match=f"{place} exists"):
        check_destination(link, False)
    fill(check_destination(link, True), "new")
    assert link.is_symlink() and not place.is_symlink() and content(place) == "new"
    assert [file.name for file in (tmp_path / "disk").iterdir()] == ["casa"], "it was filled there"


def test_names_that_are_taken(tmp_path):
    fill(check_destination(tmp_path / "casa-2", False), "another")
    with pytest.raises(CheckpointError, match="casa-3;"):
        fill(check_destination(tmp_path / "casa", False), "new", (tmp_path / "casa").mkdir)
    assert content(tmp_path / "casa-2") == "another" and content(tmp_path / "casa-3") == "new"


def test_a_place_that_is_gone(tmp_path):
    """Where it can't be put beside its place either, the folder stays where it was filled, also later."""
    destination = Destination(tmp_path / "file" / "casa", tmp_path)
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(CheckpointError, match=r"can't be made .*The finished .* is .*casa\.incomplete-.*/new;"):
        fill(destination, "new")
    (kept,) = tmp_path.glob("casa.incomplete-*/new")
    (tmp_path / "file").unlink()
    fill(check_destination(destination.target, False), "newer")
    assert (content(kept), content(destination.target)) == ("new", "newer")


def test_moving_replaces_nothing(tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "file").write_text("new")
    for name, come in COMING.items():
        come(tmp_path / name)
        with pytest.raises(FileExistsError):
            move_new(tmp_path / "new", tmp_path / name)
    move_new(tmp_path / "new", tmp_path / "free")
    assert listing(tmp_path / "free") == ["file"]


# -------------------------------------------------------------------- processes that are killed


def fill_and_die(target: Path, when: str) -> None:
    """In a process of its own, which is killed."""
    process = os.fork()
    if process:
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
        return
    rename = os.rename

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def killed(old: Path, new: Path) -> None:
        if when == "before":
            die()
        rename(old, new)
        if when == "between" or new == target:
            die()

    os.rename = killed
    try:
        fill(check_destination(target, True), "new", die if when == "filling" else lambda: None)
    finally:
        os._exit(1)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize(
    ("when", "left"), [("filling", "old"), ("before", "old"), ("between", "old"), ("after", "new")]
)
def test_the_next_one_puts_in_order_what_a_killed_one_left(tmp_path, when, left):
    target = tmp_path / "casa"
    fill(check_destination(target, False), "old")
    fill_and_die(target, when)
    assert len(list(tmp_path.glob("casa.incomplete-*"))) == 1
    assert target.exists() == (when != "between")
    # Another output's is left alone.
    fill(check_destination(tmp_path / "other", False), "other")
    assert len(list(tmp_path.glob("casa.incomplete-*"))) == 1
    with pytest.raises(CheckpointError, match="exists"):
        check_destination(target, False)
    assert content(target) == left
    assert sorted(file.name for file in tmp_path.iterdir()) == ["casa", "other"]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_what_was_left_of_another_output_of_the_same_name(tmp_path):
    fill_and_die(tmp_path / "first" / "casa", "filling")
    fill(check_destination(tmp_path / "second" / "casa", False), "second")
    assert len(list(tmp_path.glob("casa.incomplete-*"))) == 1
    fill(check_destination(tmp_path / "first" / "casa", False), "first")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["first", "second"]


def test_another_folder_at_the_last_moment(tmp_path, monkeypatch):
    target = tmp_path / "casa"
    fill(check_destination(target, False), "old")
    rename = os.rename

    def late(old, new):
        if new.name == "old":
            shutil.rmtree(old)
            old.mkdir()
            (old / "mine").write_text("mine")
        rename(old, new)

    monkeypatch.setattr(os, "rename", late)
    with pytest.raises(CheckpointError, match=f"{target} was changed by another process.*{target}-2;"):
        fill(check_destination(target, True), "new")
    assert listing(target) == ["mine"] and content(tmp_path / "casa-2") == "new"


# -------------------------------------------------------------------- disks


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="becomes somebody else for a moment")
def test_a_folder_of_somebody_else(tmp_path):
    destination = check_destination(tmp_path / "casa", False)
    os.seteuid(65534)
    try:
        with pytest.raises(CheckpointError, match=rf"^{tmp_path / 'casa'} can't be written \(.*Permission denied"):
            fill(destination, "new")
    finally:
        os.seteuid(0)


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A disk of 64 KB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", disk], capture_output=True).returncode:
        pytest.skip("needs the right to mount a disk")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_read_only_disk(small_disk):
    """Looked at before any work."""
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(CheckpointError, match=f"^{small_disk} can't be written to, so .*Choose another"):
        check_destination(small_disk / "casa", False)


def test_a_full_disk(small_disk):
    def write(text: str) -> None:
        with new_folder(check_destination(small_disk / "casa", False), 0) as folder:
            (folder / "fits").write_text("a" * 60_000)
            if text:
                (folder / "more").write_text(text)
            else:
                Tokenizer(models.WordLevel({f"word {index}": index for index in range(1000)})).save(f"{folder}/file")

    for text in ("more" * 1000, ""):
        with pytest.raises(CheckpointError, match=f"^{small_disk / 'casa'} can't be written: the disk is full"):
            write(text)
        assert listing(small_disk) == []
