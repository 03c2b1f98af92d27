# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The command `casa-hf`: convert a checkpoint, look at one, train it, ask it about images and videos, publish it.

Thin wrappers of library functions, which are imported when a command runs. Answers and results go to standard output,
everything else to standard error. What goes wrong ends in one line and exit code 1; wrong usage in exit code 2.
"""

from __future__ import annotations

import sys

import typer

from .caption import caption
from .chat import CHAT_HELP, chat
from .convert import convert
from .generate import generate
from .inspect import inspect
from .push import push
from .terminal import complain
from .train import train

app = typer.Typer(
    help="Vision-language models that keep image tokens out of the sequence and the KV cache.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

app.command()(convert)
app.command()(inspect)
app.command()(push)
app.command()(generate)
app.command(epilog=CHAT_HELP)(chat)
app.command()(caption)
app.command()(train)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit.

    Args:
        arguments: without the program's name; None for those of the process.
    """
    try:
        app(arguments)
    except Exception as error:
        if sys.flags.dev_mode:
            raise
        complain(error)
        sys.exit(1)
