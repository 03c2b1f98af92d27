# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Files of a checkpoint folder: which of them are its own, and what the JSON among them holds."""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .checks import one_line

# Configurations are a few levels deep; what is much deeper ends in a RecursionError, if not here then in a copy.
_MAX_DEPTH = 100


class CheckpointError(ValueError):
    """A checkpoint that can't be read, converted or published as asked; the message is one line with what to do."""


class WrongKindError(CheckpointError):
    """What was named is there, or could be, but isn't of the kind that it was named for."""


def own_file(folder: str | os.PathLike, name: str | os.PathLike) -> Path:
    """A file of a folder, which needn't exist, by a name that may come from elsewhere, such as an index of shards.

    A name or a symbolic link that leads out of the folder is refused. The Hub's download cache counts as one folder:
    its snapshots are links to files in its `blobs`.

    Args:
        folder: Folder of a checkpoint.
        name: Name of the file, relative to the folder.

    Raises:
        CheckpointError: if the file is outside the folder, or the name can't be one.
    """
    file = Path(folder, name)
    try:
        real, root = Path(os.path.realpath(file)), Path(os.path.realpath(folder))
    except ValueError as unusable:  # a null character, half a surrogate pair
        raise CheckpointError(
            f"{os.fspath(name)!r} is not a valid file name ({unusable}). Download the files of {folder} again."
        ) from None
    in_cache = real.parent.name == "blobs" and real.parent.parent.name.startswith("models--")
    if not real.is_relative_to(root) and not in_cache:
        raise CheckpointError(
            f"{os.fspath(name)!r} leads out of {folder}, to {real}, but only files inside a checkpoint's folder "
            "belong to it. If you trust the file, copy it into the folder."
        )
    return file


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        file: Path of the file.

    Raises:
        CheckpointError: if it can't be read or doesn't hold a JSON object in UTF-8; names the file.
    """
    try:
        content = file.read_bytes()
    except OSError as failed:
        raise CheckpointError(
            f"{file} can't be read ({failed.strerror}). Check the file and its permissions."
        ) from failed
    return parse_json(content, str(file))


def check_json(folder: Path, names: Iterable[str]) -> None:
    """Read those JSON files of a folder that others will read or copy.

    Args:
        folder: Folder of a checkpoint.
        names: Names of files; those that aren't JSON files, or don't exist, are skipped.

    Raises:
        CheckpointError: as `own_file` and `read_json`.
    """
    for name in names:
        if name.endswith(".json") and (folder / name).is_file():
            read_json(own_file(folder, name))


def parse_json(content: bytes, name: str) -> dict[str, Any]:
    """The object in a JSON text.

    Args:
        content: Text in UTF-8.
        name: Name of the text, for messages.

    Raises:
        CheckpointError: as `read_json`.
    """
    if content.startswith(codecs.BOM_UTF8):
        raise CheckpointError(
            f"{name} begins with a byte-order mark, which JSON doesn't allow. Save it as UTF-8 without one."
        )
    try:
        parsed = json.loads(content.decode("utf-8"))
    except RecursionError:
        parsed = None
    except UnicodeDecodeError as undecodable:
        raise CheckpointError(
            f"{name} is not UTF-8 text ({undecodable}). Download or write it again."
        ) from undecodable
    except ValueError as invalid:
        raise CheckpointError(
            f"{name} is not valid JSON ({one_line(invalid)}). Download or write it again."
        ) from invalid
    else:
        if not isinstance(parsed, dict):
            raise CheckpointError(
                f"{name} must hold a JSON object, but holds a {type(parsed).__name__}. Download or write it again."
            )
    if parsed is None or _is_deep(parsed):
        raise CheckpointError(
            f"{name} is nested deeper than {_MAX_DEPTH} levels, which no checkpoint needs. Download or write it again."
        )
    return parsed


def _is_deep(content: Any) -> bool:
    level = [content]
    for _ in range(_MAX_DEPTH):
        level = [
            part
            for container in level
            for part in (container.values() if isinstance(container, dict) else container)
            if isinstance(part, dict | list)
        ]
        if not level:
            return False
    return True
