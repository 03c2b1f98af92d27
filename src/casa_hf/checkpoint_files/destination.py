# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Where a new checkpoint goes: checked before any work, written beside its place, and moved there in one step.

What appears at the place meanwhile stays: a folder is moved by calls that can't replace anything, and only the
checkpoint that was there in the beginning may be overwritten. A new one that can't go to its place is kept beside it.
"""

from __future__ import annotations

import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from ..checks import listed, one_line
from ..folder_files import CheckpointError
from .disk import disk_is_full

if os.name == "posix":
    import fcntl

_UNFINISHED = ".incomplete-"

# In a folder that is being written: the destination. Locked by the process that writes it, as long as that lives.
_OWNER = "owner"


class OutputError(CheckpointError):
    """An output folder that can't be used, found before any work."""


@dataclass(frozen=True)
class Destination:
    """A place for a checkpoint.

    Attributes:
        target: Folder to make.
        parent: Nearest existing folder above, where the checkpoint is written first.
        replaces: State of the folder that may be replaced; None if there is none.
    """

    target: Path
    parent: Path
    replaces: tuple[int, int, int] | None = None


def check_destination(output: str | os.PathLike, overwrite: bool, *sources: str | os.PathLike | None) -> Destination:
    """Check a place for a checkpoint, and remove what a process that was killed has left there.

    Of a symbolic link the destination is the place that it leads to; the link stays.

    Args:
        output: Folder to make.
        overwrite: Whether a checkpoint there may be replaced.
        *sources: Folders that mustn't be replaced; Hub ids and None are ignored.

    Raises:
        OutputError: if it can't be written, or mustn't be.
    """
    target = Path(os.path.abspath(output))
    for source in sources:
        if source is not None and os.path.isdir(source):
            resolved = Path(source).resolve()
            if target.resolve() in (resolved, *resolved.parents):
                raise OutputError(f"{target} would replace the source {source}. Choose another output folder.")
    if target.is_symlink():
        target = Path(os.path.realpath(target))
    parent = next(parent for parent in target.parents if os.path.lexists(parent))
    if not parent.is_dir():
        raise OutputError(f"{parent} is not a folder, so {target} can't be made. Choose another output folder.")
    _remove_leftovers(target, parent)
    replaces = None
    if os.path.lexists(target):
        if not _is_empty_or_checkpoint(target):
            kind = "is not a checkpoint folder" if target.is_dir() else "is a file"
            raise OutputError(f"{target} exists and {kind}; expected a new folder. Choose another name.")
        if not overwrite:
            raise OutputError(f"{target} exists; expected a new folder. Choose another, or add overwrite=True.")
        replaces = _state(target)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{parent} can't be written to, so {target} can't be made. Choose another output folder.")
    return Destination(target, parent, replaces)


@contextmanager
def new_folder(destination: Destination, num_bytes: int) -> Iterator[Path]:
    """A folder that becomes the destination when the block ends, and vanishes if it fails.

    Args:
        destination: Place of the folder.
        num_bytes: Size of the weights in bytes.

    Raises:
        CheckpointError: if there isn't enough space, if a file can't be written, or if something else is at the
            destination by now; then the message says where the finished folder is.
    """
    target, parent = destination.target, destination.parent
    with ExitStack() as owner, _explained(target):
        _check_space(destination, num_bytes)
        temporary = Path(tempfile.mkdtemp(prefix=f"{target.name}{_UNFINISHED}", dir=parent))
        new, old = temporary / "new", temporary / "old"
        place: Path | None = None
        try:
            owner.enter_context(_owned(temporary, target))
            new.mkdir()
            yield new
            for path in (*new.iterdir(), new):
                _sync(path)
            try:
                _publish(new, old, destination)
            except OSError as error:
                place = _keep(new, target)
                raise _displaced(destination, error, place) from error
        finally:
            if new.exists() and (place == new or os.path.lexists(old)):
                # Nowhere else to go; and what nobody owns is never removed.
                (temporary / _OWNER).unlink(missing_ok=True)
            else:
                shutil.rmtree(temporary, ignore_errors=True)


def _displaced(destination: Destination, error: OSError, place: Path) -> CheckpointError:
    target = destination.target
    if not os.path.lexists(target):
        obstacle = f"{target} can't be made ({one_line(error)})."
    elif destination.replaces is None:
        obstacle = f"{target} was made by another process meanwhile, and stays as it is."
    else:
        obstacle = f"{target} was changed by another process meanwhile, and stays as it is."
    return CheckpointError(f"{obstacle} The finished checkpoint is {place}; move it where you want it.")


def _is_empty_or_checkpoint(path: Path) -> bool:
    if not path.is_dir():
        return False
    return not any(path.iterdir()) or ((path / "config.json").is_file() and any(path.glob("*.safetensors")))


def _state(path: Path) -> tuple[int, int, int]:
    """What distinguishes a folder from others, and from itself with other files."""
    status = os.lstat(path)
    return status.st_dev, status.st_ino, status.st_mtime_ns


def _check_space(destination: Destination, num_bytes: int) -> None:
    parent = destination.parent
    free = shutil.disk_usage(parent).free
    if free < num_bytes:
        left = sorted(folder.name for folder in _unfinished(destination.target, parent))
        unfinished = f" (unfinished ones are {listed(left)})" if left else ""
        raise CheckpointError(
            f"The weights need {num_bytes / 1e9:.1f} GB, but {parent} has {free / 1e9:.1f} GB left{unfinished}. Free "
            "some space, or choose an output folder on another disk."
        )


@contextmanager
def _explained(target: Path) -> Iterator[None]:
    """Explain errors of writing files, and what libraries that write files make of them.

    Raises:
        CheckpointError: for such an error inside.
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # tokenizers raises plain exceptions
        if disk_is_full(error):
            raise CheckpointError(
                f"{target} can't be written: the disk is full, or a file is too large for it ({one_line(error)}). "
                "Free some space, or choose an output folder on another disk."
            ) from error
        if isinstance(error, OSError):
            raise CheckpointError(
                f"{target} can't be written ({one_line(error)}). Choose another output folder."
            ) from error
        raise


# ---------------------------------------------------------------- moving


def move_new(folder: Path, target: Path) -> None:
    """Move a folder to a path that doesn't exist, in one step.

    Raises:
        OSError: if something is there.
    """
    if os.name != "posix":
        os.rename(folder, target)  # never replaces
        return
    # A folder takes the place of no other than an empty one, and only one process can have made that.
    os.mkdir(target)
    try:
        os.rename(folder, target)
    except BaseException:
        with suppress(OSError):  # an interrupt may come when it has been moved
            os.rmdir(target)
        raise


def move_finished(folder: Path, target: Path) -> None:
    """As `move_new`, for a folder that mustn't get lost.

    Raises:
        CheckpointError: if something is there; the message says where the folder is kept.
    """
    try:
        move_new(folder, target)
    except OSError as error:
        raise _displaced(Destination(target, target.parent), error, _keep(folder, target)) from error


def _publish(new: Path, old: Path, destination: Destination) -> None:
    """Move the complete folder `new` to its destination; what was there moves to `old`, and back if that fails.

    An interrupt may come before, between and after the two moves; only between them is there something to put back.

    Raises:
        OSError: if the destination isn't as it was, or can't be made.
    """
    target = destination.target
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        if destination.replaces is not None and os.path.lexists(target):
            if _state(target) != destination.replaces:
                raise FileExistsError(f"{target} has changed")
            os.rename(target, old)
            if _state(old)[:2] != destination.replaces[:2] or not _is_empty_or_checkpoint(old):
                raise FileExistsError(f"{target} has changed")
        move_new(new, target)
    except BaseException:
        if new.exists() and os.path.lexists(old):
            try:
                os.rename(old, target)
            except OSError:
                _keep(old, target)
        raise
    _sync(target.parent)


def _keep(folder: Path, target: Path) -> Path:
    """Move a folder beside the place that is taken; returns its path."""
    for number in count(2):
        place = target.with_name(f"{target.name}-{number}")
        try:
            move_new(folder, place)
        except FileExistsError:
            continue
        except OSError:
            return folder
        return place
    raise AssertionError


def _sync(path: Path) -> None:
    """Wait until a file, or the list of a folder's files, is on the disk."""
    if path.is_dir():
        if os.name == "posix":
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        return
    with open(path, "r+b") as stream:
        os.fsync(stream.fileno())


# ---------------------------------------------------------------- whose it is


@contextmanager
def _owned(temporary: Path, target: Path) -> Iterator[None]:
    """Mark a folder as being written, as long as the block lasts and the process lives."""
    if os.name != "posix":
        yield
        return
    with open(temporary / _OWNER, "x", encoding="utf-8", errors="surrogateescape") as stream:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(stream, fcntl.LOCK_EX)
            # Only now: a folder without a destination in this file is left alone.
            stream.write(str(target))
            stream.flush()
        yield


def _unfinished(target: Path, parent: Path) -> Iterator[Path]:
    """Folders that processes write, or have left, for a target of this name."""
    return parent.glob(f"{glob.escape(target.name)}{_UNFINISHED}*")


def _remove_leftovers(target: Path, parent: Path) -> None:
    """Remove what processes have left that were killed while they wrote or moved a folder for the same target.

    Raises:
        OutputError: if another process is writing it.
    """
    if os.name == "posix":
        for folder in _unfinished(target, parent):
            with suppress(OSError):  # without an owner, of another user, or gone
                _remove_leftover(folder, target)


def _remove_leftover(folder: Path, target: Path) -> None:
    with open(folder / _OWNER, "r+", encoding="utf-8", errors="surrogateescape") as stream:
        if stream.read() != str(target):
            return
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(
                f"Another process is writing {target} (in {folder}). Wait for it, or choose another output folder."
            ) from error
        new, old = folder / "new", folder / "old"
        if new.exists() and os.path.lexists(old):
            # Killed between the two moves: what was there comes back, unless another one was made.
            os.rename(old, target)
        shutil.rmtree(folder, ignore_errors=True)
