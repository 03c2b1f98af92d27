# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Conversations from files: JSON lines or parquet beside their images, or a data set that `datasets` can load."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_SUFFIXES = (".jsonl", ".parquet")


def load_conversations(data: str | os.PathLike, split: str = "train") -> Sequence[Mapping[str, Any]]:
    """Read conversations; their images are opened when they are used.

    Args:
        data: a .jsonl or .parquet file, a folder with such files, or the Hub id of a data set (needs the package
            `datasets`, as parquet does). Paths of images and videos are relative to the folder of the file.
        split: of a data set on the Hub.

    Returns:
        A sequence of examples as `Dialogue.of` takes them.

    Raises:
        ValueError: if the path has no such files, or a line isn't a JSON object.
        ImportError: if `datasets` is needed and not installed.
    """
    path = Path(data)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES)
        if not files:
            raise ValueError(f"{path} has no {' or '.join(_SUFFIXES)} file; put the conversations there.")
    elif path.is_file():
        files = [path]
    elif path.suffix or path.is_absolute() or str(data).count("/") != 1:
        raise ValueError(f"There is no file or folder {str(path)!r} with conversations, and it is no Hub id either.")
    else:
        return _datasets().load_dataset(str(data), split=split)
    rows: list[Mapping[str, Any]] = []
    parquet = [file for file in files if file.suffix == ".parquet"]
    for file in files:
        if file.suffix not in _SUFFIXES:
            raise ValueError(f"{file} is neither {' nor '.join(_SUFFIXES)}; convert it to one of them.")
        if file.suffix == ".jsonl":
            rows += _read_json_lines(file)
    if parquet and rows:
        raise ValueError(f"{path} has both kinds of files, {' and '.join(_SUFFIXES)}; keep one of them.")
    if parquet:
        read = _datasets().Dataset.from_parquet([str(file) for file in parquet])
        return _Located(read, files[0].parent)
    return _Located(rows, files[0].parent)


class _Located(Sequence):
    """Examples whose relative paths start at a folder."""

    def __init__(self, rows: Any, folder: Path):
        self._rows = rows
        self._folder = folder

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        return {name: self._locate(value) for name, value in self._rows[index].items()}

    def _locate(self, value: Any) -> Any:
        """The value with each text that is the path of a file below the folder made absolute."""
        if isinstance(value, Mapping):
            kept = ("text", "role", "content", "type")
            return {
                name: item if name in kept and isinstance(item, str) else self._locate(item)
                for name, item in value.items()
            }
        if isinstance(value, list):
            return [self._locate(item) for item in value]
        if isinstance(value, str) and len(value) < 4096 and (file := self._folder / value).is_file():
            return str(file)
        return value


def _read_json_lines(file: Path) -> list[Mapping[str, Any]]:
    rows = []
    with open(file, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{file}, line {number} isn't valid JSON ({error}).") from error
            if not isinstance(row, Mapping):
                raise ValueError(f"{file}, line {number} is a {type(row).__name__}; expected an object with messages.")
            rows.append(row)
    return rows


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            'Parquet files and data sets from the Hub need the package datasets: pip install "casa_hf[train]".'
        ) from error
    return datasets
