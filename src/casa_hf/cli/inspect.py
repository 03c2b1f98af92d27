# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The command `casa-hf inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..timestamps_casa import timestamp_text
from .options import check_is_casa, checkpoint, existing_file, wrong_value
from .terminal import quiet_unless_terminal

if TYPE_CHECKING:
    from ..conversion import CheckpointSummary

_OPTIONS = {"revision": "--revision", "mapping": "--mapping"}


def inspect(
    path: Annotated[
        str, typer.Argument(parser=checkpoint, help="Folder or Hub id of a CASA checkpoint.", show_default=False)
    ],
    names: Annotated[
        bool,
        typer.Option(
            "--names",
            help="Print the tensors of a checkpoint in the format of the method's authors, and what each becomes.",
        ),
    ] = False,
    mapping: Annotated[Path | None, existing_file("With --names: what a mapping file makes of them.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")] = None,
) -> None:
    """Show what a CASA checkpoint is made of and what it costs to run, without its weights."""
    if mapping is not None and not names:
        raise typer.BadParameter("it is for --names. Add --names.", param_hint="--mapping")
    if not names and Path(path).is_dir():
        try:
            check_is_casa(Path(path), path)
        except typer.BadParameter as error:
            error.param_hint = "PATH"
            raise
    quiet_unless_terminal()
    from rich.filesize import decimal

    from ..conversion import inspect_checkpoint, names_report

    if names:
        with wrong_value(**_OPTIONS):
            typer.echo(names_report(path, revision=revision, mapping=mapping), nl=False)
        return
    with wrong_value(**_OPTIONS):
        summary = inspect_checkpoint(path, revision)
    blocks = f"{len(summary.fusion_layers)} of {summary.num_layers} blocks"
    if len(summary.fusion_layers) < summary.num_layers:
        blocks += f": {', '.join(map(str, summary.fusion_layers))}"
    text_token = decimal(summary.text_token_bytes)
    if summary.window_text_bytes:
        text_token += f", and {decimal(summary.window_text_bytes)} more while its window is open"
    rows = {
        "variant": summary.variant or "none of the named ones",
        "backbone": summary.backbone,
        "fusion layers": blocks,
        "parameters": _parameters(summary),
        "weights": f"{decimal(summary.num_bytes)}, {summary.dtype}",
        **_image_rows(summary),
        "text token": text_token,
    }
    if summary.video_layout is not None:
        layout = "a whole video is one image" if summary.whole_videos else "two frames share an image"
        rows["video layout"] = f"{layout} ({summary.video_layout})"
    if summary.video_timestamps is not None:
        kind = summary.video_timestamps
        rows["video times"] = f"{timestamp_text(kind, 0.5)} before a frame ({kind})"
    if summary.recurrent_bytes:
        rows["recurrent"] = f"{decimal(summary.recurrent_bytes)} for each sequence, however long it is"
    for label, value in rows.items():
        typer.echo(f"{label:<15}{value}")


def _parameters(summary: CheckpointSummary) -> str:
    """How many there are, and how many of them compute a token where experts share the work."""
    from ..conversion.plan import active_note

    source, added = summary.source_parameters, summary.added_parameters
    return f"{source:,} of the source, {added:,} added{active_note(summary.active_parameters, source + added)}"


def _image_rows(summary: CheckpointSummary) -> dict[str, str]:
    """What the keys and values of images take: until the next window, or for good."""
    from rich.filesize import decimal

    size = f"{decimal(summary.image_bytes)} for an image of {summary.image_tokens:,} tokens, the largest"
    images_stay, frames_stay = summary.image_history == "all", summary.video_history == "all"
    rows = {"per image": f"{size}; never freed"} if images_stay else {"window": size}
    if frames_stay != images_stay:
        rows["video frame"] = (
            f"in proportion to its tokens; {'never freed' if frames_stay else 'freed with its window'}"
        )
    return rows
