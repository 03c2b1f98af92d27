# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints that a run writes while it trains, and which of them it can be resumed from."""

from __future__ import annotations

import logging
from pathlib import Path
from zipfile import BadZipFile, ZipFile

import torch
from safetensors import SafetensorError, safe_open
from transformers import TrainerState

from ..folder_files import own_file, read_json

logger = logging.getLogger(__name__)

_PREFIX = "checkpoint-"
STATE = "trainer_state.json"  # written last
_UNFINISHED = "checkpoint-is-incomplete.txt"  # exists while `enable_jit_checkpoint` writes

# Of a model or its adapters; of a model sharded by FSDP or DeepSpeed.
_WEIGHTS = ("*.safetensors", "*/*.safetensors", "pytorch_model*", "global_step*")

# What `save_only_model` leaves out, and without which Transformers' Trainer silently resumes with other states.
# FSDP has names of its own for the optimizer's; DeepSpeed's folder may have the schedule too.
_STATES = {
    "optimizer.pt": ("optimizer*", "global_step*"),
    "scheduler.pt": ("scheduler.pt", "global_step*"),
    "rng_state.pth": ("rng_state*.pth",),
}
NO_OPTIMIZER = "without optimizer.pt"


def last_checkpoint(folder: Path, reads_all: bool = True) -> tuple[Path | None, dict[Path, str]]:
    """The last complete checkpoint of a run.

    Args:
        folder: folder with the checkpoints of Transformers' Trainer; it needn't exist.
        reads_all: whether to read files to their end, which finds damaged ones and weights that aren't finite too;
            otherwise only missing and truncated files are found, quickly.

    Returns:
        The checkpoint, or None if there is none; and later, incomplete ones, with what is wrong with each.
    """
    found = [path for path in folder.glob(f"{_PREFIX}*") if path.is_dir() and _step(path) is not None]
    incomplete: dict[Path, str] = {}
    for path in sorted(found, key=lambda path: _step(path) or 0, reverse=True):
        fault = _fault(path, reads_all)
        if fault is None:
            return path, incomplete
        incomplete[path] = fault
    return None, incomplete


def warn_of_skipped(last: Path | None, skipped: dict[Path, str]) -> None:
    """Log which checkpoints are skipped, and which one is used; both as `last_checkpoint` returns them."""
    for folder, fault in skipped.items():
        way = "starting from scratch" if last is None else f"resuming from {last.name}"
        logger.warning("%s is incomplete (%s); %s.", folder, fault, way)


def _step(checkpoint: Path) -> int | None:
    step = checkpoint.name.removeprefix(_PREFIX)
    return int(step) if step.isdecimal() else None


def _fault(checkpoint: Path, reads_all: bool) -> str | None:
    """What a checkpoint lacks, in words; None if nothing."""
    if (checkpoint / _UNFINISHED).exists():
        return f"with {_UNFINISHED}"
    if not (checkpoint / STATE).is_file():
        return f"without {STATE}, which is written last"
    if not _is_state(checkpoint):
        return f"{STATE} is damaged"
    if not any(any(checkpoint.glob(pattern)) for pattern in _WEIGHTS):
        return "without weights"
    for name, patterns in _STATES.items():
        if not any(any(checkpoint.glob(pattern)) for pattern in patterns):
            return f"without {name}"
    for file in sorted(checkpoint.rglob("*")):
        fault = None
        if file.suffix == ".safetensors":
            fault = _fault_of_weights(file, reads_all)
        elif file.suffix in (".pt", ".pth", ".bin"):  # as torch.save writes them
            fault = _fault_of_archive(file, reads_all)
        elif file.name.endswith(".safetensors.index.json") and (missing := _missing_shards(file)):
            return f"without {missing}"
        elif file.suffix == ".distcp":  # of a model or an optimizer sharded by FSDP
            fault = _fault_of_shards(file.parent)
        if fault is not None:
            return f"{file.name} {fault}"
    return None


def _is_state(checkpoint: Path) -> bool:
    """Whether the Trainer can read the state."""
    try:
        return isinstance(TrainerState.load_from_json(str(checkpoint / STATE)).global_step, int)
    except (ValueError, TypeError, AttributeError, RecursionError):
        return False


def _fault_of_weights(file: Path, reads_all: bool) -> str | None:
    try:
        with safe_open(file, framework="pt") as tensors:  # reads the header, which tells the size
            if reads_all and not all(_is_finite(tensors.get_tensor(name)) for name in tensors.keys()):  # noqa: SIM118
                return "has values that aren't finite"
    except (SafetensorError, OSError):
        return "is truncated"
    return None


def _is_finite(tensor: torch.Tensor) -> bool:
    return tensor.itemsize < 2 or not tensor.is_floating_point() or bool(tensor.isfinite().all())


def _fault_of_archive(file: Path, reads_all: bool) -> str | None:
    try:
        archive = ZipFile(file)  # reads the directory at its end
    except (BadZipFile, OSError):
        return "is truncated"
    with archive:
        try:
            return "is damaged" if reads_all and archive.testzip() is not None else None
        except (BadZipFile, OSError, EOFError, ValueError, NotImplementedError):
            return "is damaged"


def _fault_of_shards(folder: Path) -> str | None:
    from torch.distributed.checkpoint import FileSystemReader

    try:
        parts = FileSystemReader(folder).read_metadata().storage_data.values()
    except Exception:  # a pickle, damaged in any way
        return "has no readable .metadata beside it"
    for part in parts:
        file = folder / part.relative_path
        if not file.is_file() or file.stat().st_size < part.offset + part.length:
            return f"is incomplete: {file.name} is missing or truncated"
    return None


def _missing_shards(index: Path) -> str | None:
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
        return next((name for name in names if not own_file(index.parent, name).is_file()), None)
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"a readable {index.name}"
