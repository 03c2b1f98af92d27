# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""A checkpoint that carries the code it runs with, for places where casa_hf isn't installed.

Transformers loads such a checkpoint with `trust_remote_code=True`: it copies the modules that `auto_map` names, and
those that they import as `from .module import name`, into one flat folder. What has to be carried is therefore found
by following these imports.
"""

from __future__ import annotations

import ast
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..folder_files import CheckpointError, read_json

PACKAGE = Path(__file__).parents[1]

# Auto class -> the class that it is to load, as "module.Class".
AUTO_MAP = {
    "AutoConfig": "configuration_casa.CasaConfig",
    "AutoModel": "modeling_casa.CasaModel",
    "AutoModelForImageTextToText": "modeling_casa.CasaForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_casa.CasaForConditionalGeneration",
    "AutoProcessor": "processing_casa.CasaProcessor",
}

# The files of a checkpoint that name its classes, and what the Auto classes look up in them.
_NAMED_IN = {"config.json": tuple(AUTO_MAP), "processor_config.json": ("AutoProcessor",)}


def modelling_files(package: Path = PACKAGE) -> list[Path]:
    """The modules that a checkpoint needs to load and run, sorted by name.

    Args:
        package: Folder of the modules.

    Raises:
        ValueError: if one of them has an import that doesn't work in a flat folder, or that Transformers can't follow.
    """
    pending = {reference.partition(".")[0] for reference in AUTO_MAP.values()}
    found: dict[str, Path] = {}
    while pending:
        name = pending.pop()
        found[name] = package / f"{name}.py"
        pending |= _imported(found[name]) - found.keys()
    return [found[name] for name in sorted(found)]


def code_files(folder: Path) -> dict[str, bytes]:
    """What makes the checkpoint in `folder` self-contained; nothing is written.

    Args:
        folder: Folder of a CASA checkpoint with config.json and processor_config.json.

    Returns:
        Contents by file name: the modules, and both configuration files with `auto_map`.
    """
    files = {file.name: file.read_bytes() for file in modelling_files()}
    return files | {name: with_auto_map(folder / name) for name in _NAMED_IN}


def add_code(folder: str | Path) -> list[Path]:
    """Make the CASA checkpoint in a folder self-contained, so that `trust_remote_code=True` loads it.

    Args:
        folder: Folder of a checkpoint with its processor. Code that is there already is replaced.

    Returns:
        The files that were written.

    Raises:
        CheckpointError: if the folder holds no checkpoint with a processor.
    """
    folder = Path(folder)
    missing = [name for name in _NAMED_IN if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} has no {' and no '.join(missing)}. Give the folder of a CASA checkpoint with its processor."
        )
    files = code_files(folder)
    # The configurations name the modules, so they come last.
    for name in sorted(files, key=lambda name: name in _NAMED_IN):
        _replace(folder / name, files[name])
    return [folder / name for name in files]


def has_code(folder: Path) -> bool:
    """Whether a checkpoint's config.json names the classes of its code, and its folder holds the modules."""
    if not names_code(read_json(folder / "config.json")):
        return False
    try:
        return all(file.is_file() for file in modelling_files(folder))
    except (OSError, ValueError, SyntaxError):
        return False


def names_code(config: Mapping[str, Any]) -> bool:
    """Whether a config.json names the classes of code in the checkpoint."""
    stated = config.get("auto_map")
    return isinstance(stated, Mapping) and AUTO_MAP.items() <= stated.items()


def with_auto_map(file: Path) -> bytes:
    """The content of a configuration file, with the names of the classes in the checkpoint's code."""
    return _written(read_json(file) | {"auto_map": {name: AUTO_MAP[name] for name in _NAMED_IN[file.name]}})


def without_auto_map(file: Path) -> bytes:
    """The content of a configuration file, without names of classes in code."""
    return _written({key: value for key, value in read_json(file).items() if key != "auto_map"})


def _imported(module: Path) -> set[str]:
    """Names of the sibling modules that a module imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(module.read_text("utf-8"), str(module))):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module and "." not in node.module:
            names.add(node.module)
            continue
        absolute = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        relative = isinstance(node, ast.ImportFrom) and node.level > 0
        if relative or any(name.partition(".")[0] == PACKAGE.name for name in absolute):
            raise ValueError(
                f"{module.name}, line {node.lineno}: `{ast.unparse(node)}` can't be exported with a checkpoint. Write "
                "`from .module import name`, with a module of the same folder."
            )
    return names


def _written(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _replace(file: Path, content: bytes) -> None:
    """Write a file in one step: at any moment it has its old content or the new one."""
    temporary = file.with_name(f".{file.name}.incomplete")
    try:
        with open(temporary, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
