# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Files that are read for minutes, and must be the same at the end as in the beginning."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..folder_files import CheckpointError, own_file

# Device, inode, size and time of the last change in nanoseconds.
FileState = tuple[int, int, int, int]


def file_state(file: Path | int) -> FileState:
    """What distinguishes a file from another of the same name, and from itself with other contents.

    Args:
        file: Path or descriptor.
    """
    status = os.stat(file)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def folder_state(folder: Path, patterns: Iterable[str]) -> dict[Path, FileState]:
    """The states of a folder's own files whose names match a pattern.

    Raises:
        CheckpointError: if one of them leads out of the folder.
    """
    files = {file for pattern in patterns for file in folder.glob(pattern)}
    return {own_file(folder, file.name): file_state(file) for file in files if file.is_file()}


def check_unchanged(states: Mapping[Path, FileState], now: Mapping[Path, FileState] | None = None) -> None:
    """Compare the states of files with those that they had before.

    Args:
        states: States before.
        now: States now, including those of new files; None to read those of the same files.

    Raises:
        CheckpointError: naming a file that has changed.
    """
    for file, before in states.items():
        try:
            after = file_state(file) if now is None else now.get(file)
        except OSError:
            after = None
        if after != before:
            raise changed(file)
    for file in (now or {}).keys() - states.keys():
        raise changed(file)


def changed(file: Path) -> CheckpointError:
    """The error for a file that has changed."""
    return CheckpointError(
        f"{file} was changed while it was read, so old and new contents would be mixed. Try again when nothing writes "
        "there."
    )
