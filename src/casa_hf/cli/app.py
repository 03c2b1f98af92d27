# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The command `casa-hf`: convert a checkpoint, look at one, train it, ask it about images and videos, publish it.

Thin wrappers of library functions. Nothing here and in the modules of the commands imports the library before a
command runs: options are read, and wrong ones refused, at once. Answers and results go to standard output, everything
else to standard error.

What is wrong with the command line ends in exit code 2: an option or argument whose value can't be, or that names
something which isn't there, is of another kind (a checkpoint that isn't a CASA checkpoint), or can't be read (an
image, a video, a file of questions or settings). All else that goes wrong ends in exit code 1: a checkpoint that is
incomplete or damaged, the Hub, the disk, the work itself. Either way the reason stands in one line.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from ..folder_files import WrongKindError
from ..version import __version__
from .caption import caption
from .chat import CHAT_HELP, chat
from .convert import convert
from .generate import generate
from .inspect import inspect
from .push import push
from .serve import serve
from .terminal import complain
from .train import train

app = typer.Typer(
    help="Vision-language models that keep image tokens out of the sequence and the KV cache.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


class _Command(TyperCommand):
    """A command that loads the library when its options have been read."""

    def invoke(self, context: Any) -> Any:
        package = sys.modules["casa_hf"]
        if not hasattr(package, "__version__") and package.__spec__ and package.__spec__.loader:
            package.__spec__.loader.exec_module(package)  # see casa_hf_command
        return super().invoke(context)


def _add(command: Callable[..., None], epilog: str | None = None) -> None:
    app.command(cls=_Command, epilog=epilog)(command)


_add(convert)
_add(inspect)
_add(push)
_add(generate)
_add(chat, epilog=CHAT_HELP)
_add(caption)
_add(serve)
_add(train)


def _print_versions(wanted: bool) -> None:
    if not wanted:
        return
    found = [f"casa_hf {__version__}"]
    for package in ("transformers", "torch"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} not installed")
    typer.echo(", ".join([*found, f"Python {sys.version.split()[0]}"]))
    raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_versions, is_eager=True, help="Show the versions and exit."),
    ] = False,
) -> None:
    pass


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit.

    Args:
        arguments: words of the command line without the program's name; None for those of the process.
    """
    try:
        app(arguments)
    except Exception as error:
        if sys.flags.dev_mode:
            raise
        complain(error)
        sys.exit(2 if isinstance(error, WrongKindError) else 1)
