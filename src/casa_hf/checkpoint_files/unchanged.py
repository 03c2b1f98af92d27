# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Files that are read for minutes, and must be the same at the end as in the beginning."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..folder_files import own_file
from .errors import ConversionError

# Device, inode, size and time of the last change in nanoseconds.
FileState = tuple[int, int, int, int]


def file_state(file: Path | int) -> FileState:
    """What tells a file from another one of its name, and from itself with other contents.

    Args:
        file: path or descriptor.
    """
    status = os.stat(file)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def folder_state(folder: Path, patterns: Iterable[str]) -> dict[Path, FileState]:
    """The states of a folder's own files whose names match a pattern.

    Raises:
        ConversionError: if one of them leads out of the folder.
    """
    files = {file for pattern in patterns for file in folder.glob(pattern)}
    return {own_file(folder, file.name, ConversionError): file_state(file) for file in files if file.is_file()}


def check_unchanged(states: Mapping[Path, FileState], now: Mapping[Path, FileState] | None = None) -> None:
    """Compare the states of files with those that they had before.

    Args:
        states: of the files, before.
        now: of the files, including those that have come; None to look.

    Raises:
        ConversionError: naming a file that isn't the same.
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


def changed(file: Path) -> ConversionError:
    """That a file isn't the one it was."""
    return ConversionError(
        f"{file} was changed while it was read, so old and new would be mixed. Try again when nobody writes there."
    )
