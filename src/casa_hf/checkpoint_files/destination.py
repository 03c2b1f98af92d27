# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Where a new checkpoint goes: checked before any work, and filled in one step."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import ConversionError


def check_distinct(source: Path, target: Path) -> None:
    resolved = source.resolve()
    if target.resolve() in (resolved, *resolved.parents):
        raise ConversionError(f"The output {target} would replace the source {source}. Choose another output folder.")


def check_target(target: Path, overwrite: bool) -> Path:
    """Refuse a destination that can't be written, or mustn't be; the nearest existing folder above it."""
    if os.path.lexists(target):
        if not overwrite:
            raise ConversionError(
                f"{target} exists. Choose another output folder, or overwrite it (overwrite=True, --overwrite)."
            )
        if not _is_empty_or_checkpoint(target):
            raise ConversionError(
                f"{target} is not a checkpoint folder, so it isn't overwritten. Choose another output folder."
            )
    parent = next(parent for parent in target.parents if os.path.lexists(parent))
    if not parent.is_dir():
        raise ConversionError(f"{parent} is not a folder, so {target} can't be made. Choose another output folder.")
    return parent


@contextmanager
def new_folder(target: Path, parent: Path, num_bytes: int) -> Iterator[Path]:
    """A folder that becomes `target` when the block ends, and vanishes if it fails.

    Args:
        target: where it goes.
        parent: an existing folder above, see `check_target`.
        num_bytes: about how large it will be.

    Raises:
        ConversionError: if there isn't enough space.
    """
    _check_space(parent, num_bytes)
    with tempfile.TemporaryDirectory(prefix=f"{target.name}.incomplete-", dir=parent) as temporary:
        new = Path(temporary, "new")
        new.mkdir()
        yield new
        _publish(new, target, Path(temporary, "old"))


def _is_empty_or_checkpoint(path: Path) -> bool:
    if not path.is_dir():
        return False
    return not any(path.iterdir()) or ((path / "config.json").is_file() and any(path.glob("*.safetensors")))


def _check_space(parent: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(parent).free
    if free < num_bytes:
        raise ConversionError(
            f"The weights need {num_bytes / 1e9:.1f} GB, but {parent} has {free / 1e9:.1f} GB left. Free some space, "
            "or choose an output folder on another disk."
        )


def _publish(new: Path, target: Path, old: Path) -> None:
    """Move the complete folder `new` to `target`; what was there goes to `old`, and comes back if that fails.

    An interrupt may come before, between and after the two moves; only between them is there something to put back.
    """
    for path in (*new.iterdir(), new):
        _sync(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        if target.exists():
            os.rename(target, old)
        os.rename(new, target)
    except BaseException:
        if old.exists() and not target.exists():
            os.rename(old, target)
        raise
    _sync(target.parent)


def _sync(path: Path) -> None:
    """Wait until a file or the entries of a folder are on the disk."""
    if path.is_dir():
        if os.name == "posix":
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        return
    with open(path, "r+b") as stream:
        os.fsync(stream.fileno())
