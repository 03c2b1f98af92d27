# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""What a run writes: the trained model with its processor, and the metrics."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint_files.destination import move_finished
from ..checkpoint_files.names import LICENSE_FILES, kept_files
from ..folder_files import own_file
from .checkpoints import STATE

if TYPE_CHECKING:
    from .trainer import CasaTrainer


def incomplete(path: Path) -> Path:
    """Where a file or folder is written before it gets its name."""
    return path.with_name(f"{path.name}.incomplete")


def write_json(file: Path, content: Any) -> None:
    """Write a JSON file in one step."""
    incomplete(file).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    os.replace(incomplete(file), file)


def write_metrics(trainer: CasaTrainer, folder: Path, metrics: dict[str, float]) -> None:
    """Write the last metrics and those of every log, into files with the names that Transformers uses."""
    write_json(folder / "all_results.json", metrics)
    write_json(folder / STATE, asdict(trainer.state))


def copy_kept(model: Path, target: Path) -> None:
    """Copy what a conversion back needs, and licenses.

    Args:
        model: folder of the model that is trained.
        target: folder to copy to.
    """
    target.mkdir(parents=True, exist_ok=True)
    licenses = [file.name for pattern in LICENSE_FILES for file in model.glob(pattern) if file.is_file()]
    for name in (*kept_files(model), *licenses):
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copy(own_file(model, name), target / name)


def save_trained(trainer: CasaTrainer, output: Path, model: Path, metrics: dict[str, float] | None = None) -> None:
    """Write model, processor and metrics under another name, then move the folder to its place.

    Args:
        trainer: trainer of the run; all processes call this.
        output: folder to create.
        model: folder of the model that was trained.
        metrics: metrics of the training; None to write none.
    """
    first = trainer.is_world_process_zero()
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is not None:
        plugin.set_state_dict_type("FULL_STATE_DICT")  # `save_model` writes nothing in any other form
    if first:
        shutil.rmtree(incomplete(output), ignore_errors=True)  # of a run that was killed
    trainer.accelerator.wait_for_everyone()
    is_complete = False
    try:
        if first:
            copy_kept(model, incomplete(output))
        # Publishing what was trained, as `save_model` would do here too, comes when it is safe.
        trainer.save_model(str(incomplete(output)), _internal_call=True)
        is_complete = True
        if first:
            (incomplete(output) / "training_args.bin").unlink(missing_ok=True)
            if metrics is not None:
                write_metrics(trainer, incomplete(output), metrics)
            move_finished(incomplete(output), output)
    finally:
        if first and not is_complete:
            shutil.rmtree(incomplete(output), ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
