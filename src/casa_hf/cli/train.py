# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The command `casa-hf train`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import existing, wrong_value
from .terminal import INTERRUPTED, complain, quiet_unless_terminal

if TYPE_CHECKING:
    from ..training import PackedDataset
    from ..training.parameters import Part


def train(
    config: Annotated[
        Path, existing("file", help="YAML file; docs/training.md lists its settings.", show_default=False)
    ],
    resume: Annotated[bool, typer.Option("--resume", help="Resume from the last checkpoint.")] = False,
) -> None:
    """Fine-tune a CASA checkpoint on conversations with images."""
    quiet_unless_terminal()
    from dataclasses import replace

    from ..checks import counted
    from ..training import TrainingConfig, parts_table
    from ..training import train as run
    from ..training.arguments import is_first_process

    with wrong_value("CONFIG"):
        settings = TrainingConfig.from_yaml(config)
    if resume:
        settings = replace(settings, resume=True)

    def announce(parts: list[Part], data: PackedDataset) -> None:
        typer.echo(parts_table(parts))
        typer.echo(
            f"{counted(data.num_conversations, 'conversation')} in {counted(len(data), 'packed sequence')}, "
            f"{data.num_dropped} dropped as too long."
        )

    speaks = is_first_process()
    output = Path(settings.output)
    existed = output.exists()
    try:
        report = run(settings, on_log=_log, on_start=announce)
    except KeyboardInterrupt:
        if speaks:
            complain(InterruptedError(_interrupted(config, output, settings.checkpoint_folder, existed)))
        raise typer.Exit(INTERRUPTED) from None
    if speaks:
        typer.echo(f"{report.steps} steps: {_logged(report.metrics)}")
        typer.echo(f"Wrote {report.output}.")


def _interrupted(config: Path, output: Path, checkpoints: Path, existed: bool) -> str:
    """What is left of an interrupted training, and how to continue.

    Args:
        config: YAML file of the run.
        output: folder that the run creates.
        checkpoints: folder of its checkpoints.
        existed: whether the output existed before the run.
    """
    from ..training.checkpoints import last_checkpoint

    if existed:
        return f"The training was interrupted before it began; {output} belongs to another run."
    if output.exists():
        return f"The training was interrupted after the model was trained; it is saved in {output}."
    last, skipped = last_checkpoint(checkpoints, reads_all=False)
    if last is None and skipped:
        folder, fault = next(iter(skipped.items()))
        way = f"Remove {checkpoints} to start from scratch."
        return f"The training was interrupted, and {folder} is incomplete ({fault}). {way}"
    if last is None:
        return "The training was interrupted before its first checkpoint. The same command starts it from scratch."
    return f"The training was interrupted. `casa-hf train {config} --resume` continues from {last}."


def _log(values: dict[str, float]) -> None:
    """Write losses and metrics as a line to standard error, above the bars that are shown."""
    from tqdm import tqdm

    tqdm.write(_logged(values), file=sys.stderr)


def _logged(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.6g}" for name, value in values.items() if isinstance(value, int | float))
