# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The command `casa-hf push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from .options import existing, valid_text, wrong_value
from .terminal import INTERRUPTED, complain, quiet_unless_terminal

# Name that the library has for an option -> the option.
_OPTIONS = {name: f"--{name}" for name in ("private", "revision", "card")} | {"datasets": "--dataset"}


def push(
    folder: Annotated[Path, existing("folder", help="Folder of a CASA checkpoint.", show_default=False)],
    repository: Annotated[str, typer.Argument(help="Name on the Hub, such as namespace/name.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to publish on; made if it doesn't exist.")] = None,
    with_code: Annotated[
        bool, typer.Option("--with-code", help="Add the code, for trust_remote_code=True without casa_hf.")
    ] = False,
    dataset: Annotated[
        list[str] | None,
        typer.Option(help="What it was trained on, for the card; repeat for several.", show_default=False),
    ] = None,
    card: Annotated[
        Literal["folder"] | None,
        typer.Option(
            metavar="folder",
            help="The word folder: replace the repository's card by the folder's. Default: keep what people wrote.",
            show_default=False,
        ),
    ] = None,
    message: Annotated[
        str | None, typer.Option(help="Message of the commit.", show_default=False, callback=valid_text)
    ] = None,
) -> None:
    """Publish a checkpoint on the Hub: checked, with its model card, in one commit."""
    quiet_unless_terminal()
    from rich.filesize import decimal

    from ..hub.push import push_checkpoint

    try:
        with wrong_value(**_OPTIONS):
            report = push_checkpoint(
                folder,
                repository,
                private=private,
                revision=revision,
                with_code=with_code,
                datasets=dataset or (),
                card=card,
                message=message,
            )
    except (ValueError, typer.BadParameter):
        _close_progress_bars()
        raise
    except KeyboardInterrupt:
        _close_progress_bars()
        complain(
            InterruptedError(f"The push to {repository} was interrupted. Try again: only what is missing is sent.")
        )
        raise typer.Exit(INTERRUPTED) from None
    size = f"{len(report.files)} files, {decimal(report.num_bytes)}"
    typer.echo(f"Published {report.url}: {size}, one commit." if report.changed else f"{report.url} holds it already.")
    for name in report.removed:
        typer.echo(f"removed there: {name}")
    if report.card_changes:
        typer.echo(f"changed in the model card: {', '.join(report.card_changes)}")
    for name in report.left_out:
        typer.echo(f"left out: {name}")


def _close_progress_bars() -> None:
    """End the lines of bars that the Hub's client leaves open when an upload fails, before something else is shown."""
    from huggingface_hub.utils import tqdm

    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()
