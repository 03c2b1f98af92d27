# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Where a run starts: from scratch in folders that are free, or from a checkpoint, with the settings it began with."""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..folder_files import read_json
from .arguments import is_first_process
from .checkpoints import NO_OPTIMIZER, last_checkpoint, warn_of_skipped
from .collator import PackedDataset
from .config import TrainingConfig
from .results import incomplete, write_json

# What may change when a run is resumed. Of the data it counts what was made of it, and a run can be made longer.
_FREE_TO_CHANGE = {
    *("data", "split", "output", "checkpoints", "resume", "keep_limits", "trainer", "max_steps", "num_train_epochs"),
    *("eval_data", "eval_split", "generate", "gradient_checkpointing", "attn_implementation", "media_policy"),
}
# Of further arguments, what may not.
_KEPT_ARGUMENTS = (
    *("weight_decay", "optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
    *("lr_scheduler_type", "lr_scheduler_kwargs", "label_smoothing_factor", "neftune_noise_alpha"),
    *("fp16", "data_seed"),
)
# In the folder of checkpoints; the Trainer publishes nothing whose name begins so.
_SETTINGS = "_settings.json"


def check_folders(output: Path, checkpoints: Path, resume: bool) -> Path | None:
    """Refuse folders that hold something or each other.

    Args:
        output: folder to create.
        checkpoints: folder of checkpoints, which may exist if the run is resumed.
        resume: whether it is.

    Returns:
        The checkpoint to resume from; None to start from scratch.

    Raises:
        ValueError: if a folder can't be used.
    """
    _check_apart(output, checkpoints)
    if output.exists():
        longer = f" (to make a finished run longer, with checkpoints={checkpoints})" if resume else ""
        raise ValueError(f"The output {output} exists; choose another folder{longer}, or remove it.")
    last, skipped = last_checkpoint(checkpoints)
    weights_only = [folder for folder, fault in skipped.items() if fault == NO_OPTIMIZER]
    if last is None and weights_only:
        raise ValueError(
            f"{weights_only[0]} is {NO_OPTIMIZER}, as save_only_model writes it, so no run can be resumed from it. To "
            "start with its weights, set model to it and checkpoints to another folder; to start from scratch, remove "
            f"{checkpoints}."
        )
    if not resume and (last is not None or skipped):
        raise ValueError(
            f"{checkpoints} holds checkpoints of an earlier run; set resume to continue from "
            f"{'the start' if last is None else last.name}, choose another folder, or remove it."
        )
    if is_first_process():
        warn_of_skipped(last, skipped)
    return last


def _check_apart(output: Path, checkpoints: Path) -> None:
    on_the_way = checkpoints.resolve()
    for folder in (output.resolve(), incomplete(output).resolve()):
        if on_the_way.is_relative_to(folder) or folder.is_relative_to(on_the_way):
            raise ValueError(
                f"checkpoints={checkpoints} and output={output} (written as {incomplete(output).name} first) must "
                "not be one folder or lie in each other. Set checkpoints to a folder beside the output, or leave it "
                "out."
            )


def run_settings(config: TrainingConfig, data: PackedDataset, steps: int) -> dict[str, Any]:
    """The settings that mustn't change when the run is resumed.

    Args:
        config: settings of the run.
        data: training data.
        steps: number of optimizer steps.
    """
    settings = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in _FREE_TO_CHANGE}
    settings |= {name: config.trainer[name] for name in _KEPT_ARGUMENTS if name in config.trainer}
    folder = Path(config.model)
    settings["model"] = str(folder.resolve() if folder.is_dir() else config.model)
    settings["rows of data"] = hashlib.sha256(
        json.dumps([data.rows, data.num_text_tokens, data.num_image_tokens]).encode()
    ).hexdigest()[:16]
    settings["max_steps"] = steps  # those of `num_train_epochs` too
    return json.loads(json.dumps(settings, default=str))


def write_settings(settings: dict[str, Any], checkpoints: Path) -> None:
    """Write the settings that the run begins with into the folder of its checkpoints."""
    checkpoints.mkdir(parents=True, exist_ok=True)
    write_json(checkpoints / _SETTINGS, settings)


def check_settings(settings: dict[str, Any], checkpoints: Path, last: Path) -> None:
    """Refuse to resume with other settings: the states in a checkpoint would silently override a part of them.

    Args:
        settings: settings of this run, by `run_settings`.
        checkpoints: folder with those that the run began with.
        last: checkpoint to resume from.

    Raises:
        ValueError: if settings differ; the message names them with both values.
    """
    file = checkpoints / _SETTINGS
    try:
        before = read_json(file) if file.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{error} Remove the file to resume without comparing the settings.") from error
    if before and before.get("max_steps", 0) < settings["max_steps"]:
        before["max_steps"] = settings["max_steps"]  # the run is made longer
    changed = [
        f"{name}={settings.get(name)!r} (was {before.get(name)!r})"
        for name in dict.fromkeys([*before, *(settings if before else ())])
        if settings.get(name) != before.get(name)
    ]
    if changed:
        raise ValueError(
            f"The run in {checkpoints} can't be resumed with other settings than it began with, but now there are "
            f"{', '.join(changed)}. Change them back, or start from scratch with other checkpoints and model={last}."
        )
