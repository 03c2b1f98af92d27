# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""What commands print on the terminal: errors in one line, and progress bars."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer

# Their messages say what to do; any other exception is a mistake of the program.
EXPLAINED = (ValueError, OSError, ImportError, NotImplementedError, FloatingPointError)


# The exit code that shells have for a process that Ctrl-C has ended.
INTERRUPTED = 130


def complain(error: Exception) -> None:
    """Say on standard error, in one line, what went wrong."""
    message = " ".join(" ".join([str(error), *getattr(error, "__notes__", ())]).split())
    if not isinstance(error, EXPLAINED):
        message = f"{type(error).__name__}: {message} (`python -X dev -m casa_hf ...` shows where)"
    typer.echo(f"error: {message}", err=True)


def quiet_unless_terminal() -> None:
    """Switch off the progress bars of the libraries where standard error is not a terminal."""
    if not sys.stderr.isatty():
        from huggingface_hub.utils import disable_progress_bars
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bars()
        disable_progress_bar()


@contextmanager
def progress_bar(label: str, unit: str = "bytes") -> Iterator[Callable[[int, int], None] | None]:
    """A bar on the terminal, advanced by (units done, units in all); None where there is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    count = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), count, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
