# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints that a run leaves on its way, and which of them a run can go on from."""

from __future__ import annotations

import json
from pathlib import Path
from zipfile import is_zipfile

from safetensors import SafetensorError, safe_open

_PREFIX = "checkpoint-"
_LAST_FILE = "trainer_state.json"
_MARK = "checkpoint-is-incomplete.txt"  # there while `enable_jit_checkpoint` writes

# Of a model or its adapters; of a model sharded by FSDP or DeepSpeed.
_WEIGHTS = ("*.safetensors", "*/*.safetensors", "pytorch_model*", "global_step*")

# What `save_only_model` leaves out, and without which Transformers' Trainer goes on from other states without a word.
# FSDP has names of its own for the optimizer's; DeepSpeed's folder may have the schedule too.
_STATES = {
    "optimizer.pt": ("optimizer*", "global_step*"),
    "scheduler.pt": ("scheduler.pt", "global_step*"),
    "rng_state.pth": ("rng_state*.pth",),
}
NO_OPTIMIZER = "without optimizer.pt"


def last_checkpoint(folder: Path) -> tuple[Path | None, dict[Path, str]]:
    """The last complete checkpoint of a run.

    Args:
        folder: with the checkpoints of Transformers' Trainer; it needn't exist.

    Returns:
        The checkpoint, or None if there is none; and later ones that are incomplete -> what is wrong with each.
    """
    found = [path for path in folder.glob(f"{_PREFIX}*") if path.is_dir() and _step(path) is not None]
    incomplete: dict[Path, str] = {}
    for path in sorted(found, key=lambda path: _step(path) or 0, reverse=True):
        fault = _fault(path)
        if fault is None:
            return path, incomplete
        incomplete[path] = fault
    return None, incomplete


def _step(checkpoint: Path) -> int | None:
    step = checkpoint.name.removeprefix(_PREFIX)
    return int(step) if step.isdecimal() else None


def _fault(checkpoint: Path) -> str | None:
    """What a checkpoint lacks, in words; None if nothing."""
    if (checkpoint / _MARK).exists():
        return f"marked so by {_MARK}"
    try:
        if not isinstance(json.loads((checkpoint / _LAST_FILE).read_text("utf-8")), dict):
            return f"{_LAST_FILE} is damaged"
    except FileNotFoundError:
        return f"without {_LAST_FILE}, which is written last"
    except ValueError:
        return f"{_LAST_FILE} is damaged"
    if not any(any(checkpoint.glob(pattern)) for pattern in _WEIGHTS):
        return "without weights"
    for name, patterns in _STATES.items():
        if not any(any(checkpoint.glob(pattern)) for pattern in patterns):
            return f"without {name}"
    for file in sorted(checkpoint.rglob("*")):
        if file.suffix == ".safetensors" and not _is_whole(file):
            return f"{file.name} is cut off"
        if file.suffix in (".pt", ".pth", ".bin") and not is_zipfile(file):  # as torch.save writes them
            return f"{file.name} is cut off"
        if file.name.endswith(".safetensors.index.json") and (missing := _missing_shards(file)):
            return f"without {missing}"
    return None


def _is_whole(file: Path) -> bool:
    try:
        with safe_open(file, framework="pt"):  # reads the header, which tells the size
            return True
    except (SafetensorError, OSError):
        return False


def _missing_shards(index: Path) -> str | None:
    try:
        names = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"a usable {index.name}"
    return next((name for name in sorted(names) if not (index.parent / name).is_file()), None)
