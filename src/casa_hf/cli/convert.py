# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The command `casa-hf convert`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..checks import counted
from ..design_space import CHOICES, SETTINGS, VARIANTS
from ..timestamps_casa import VIDEO_TIMESTAMPS
from .options import checkpoint, dtype_option, existing_file, one_of, wrong_value
from .terminal import progress_bar, quiet_unless_terminal

if TYPE_CHECKING:
    from ..conversion import ConversionPlan, ConversionReport

_SETTINGS = {setting.field: setting for setting in SETTINGS}
# What the library calls an option -> the option.
_OPTIONS = {
    **{setting.field: setting.option for setting in SETTINGS},
    "vision_from": "--vision-from",
    "image_delimiters": "--image-delimiters",
    "mapping": "--mapping",
    "video_timestamps": "--video-timestamps",
    "max_pixels": "--max-pixels",
    "max_shard_size": "--max-shard-size",
    "revision": "--revision",
    "dtype": "--dtype",
    "overwrite": "--overwrite",
}


def _setting(field: str) -> Any:
    """The option of a setting of the design space."""
    setting = _SETTINGS[field]
    if setting.choices:
        return one_of([choice or "none" for choice in setting.choices], setting.meaning)
    return typer.Option(help=setting.meaning, show_default=False)


def convert(
    context: typer.Context,
    source: Annotated[
        str,
        typer.Argument(
            parser=checkpoint, help="Folder or Hub id, such as of a Qwen2.5-VL checkpoint.", show_default=False
        ),
    ],
    output: Annotated[
        Path | None, typer.Argument(help="Folder to make; not needed with --dry-run.", show_default=False)
    ] = None,
    variant: Annotated[
        str | None,
        one_of(list(VARIANTS), f"{', '.join(VARIANTS)}. Default: casa, or a CASA checkpoint's own.", "VARIANT"),
    ] = None,
    keys: Annotated[str | None, _setting("casa_keys")] = None,
    layers: Annotated[str | None, _setting("casa_layers")] = None,
    placement: Annotated[str | None, _setting("casa_placement")] = None,
    image_updates: Annotated[str | None, _setting("casa_image_updates")] = None,
    image_history: Annotated[str | None, _setting("casa_image_history")] = None,
    video_history: Annotated[str | None, _setting("casa_video_history")] = None,
    positions: Annotated[str | None, _setting("casa_positions")] = None,
    image_positions: Annotated[str | None, _setting("casa_image_positions")] = None,
    text_windows: Annotated[bool | None, _setting("casa_text_windows")] = None,
    share_projections: Annotated[bool | None, _setting("casa_share_projections")] = None,
    video_layout: Annotated[str | None, _setting("casa_video_layout")] = None,
    image_norm: Annotated[str | None, _setting("casa_image_norm")] = None,
    gate: Annotated[str | None, _setting("casa_gate")] = None,
    gist_tokens: Annotated[
        int | None, typer.Option(min=0, help=_SETTINGS["num_gist_tokens"].meaning, show_default=False)
    ] = None,
    vision_from: Annotated[
        str | None,
        typer.Option(parser=checkpoint, help="Folder or Hub id that gives a text-only source its vision tower."),
    ] = None,
    image_delimiters: Annotated[
        str | None,
        typer.Option(
            metavar="START,END",
            help="Tokens before and after an image in a text-only source, or the one after it. "
            "Default: <|vision_start|>,<|vision_end|>. Those that it lacks are added.",
            show_default=False,
        ),
    ] = None,
    mapping: Annotated[
        Path | None,
        existing_file(
            "What tensors of a checkpoint in the format of the method's authors are; `casa-hf inspect --names` prints "
            "such a file."
        ),
    ] = None,
    video_timestamps: Annotated[
        str | None,
        one_of(
            [kind or "none" for kind in VIDEO_TIMESTAMPS],
            "Time of each video frame, written before it. Default: native where the source has it, else none; or a "
            "CASA checkpoint's own.",
        ),
    ] = None,
    max_pixels: Annotated[int | None, typer.Option(min=1, help="Largest number of pixels of an image.")] = None,
    dtype: Annotated[str | None, dtype_option("Cast the weights. Default: keep the source's.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing checkpoint.")] = False,
    max_shard_size: Annotated[str, typer.Option(help="Largest size of a weight file.")] = "5GB",
    with_code: Annotated[
        bool, typer.Option("--with-code", help="Add the code, for trust_remote_code=True without casa_hf.")
    ] = False,
    to_source: Annotated[
        bool, typer.Option("--to-source", help="Convert a CASA checkpoint back to the form of its source.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print what would be written; write nothing. The weights of a Hub id are downloaded."
        ),
    ] = False,
) -> None:
    """Write the CASA form of a checkpoint, another design of a CASA checkpoint, or its source's form."""
    if output is None and not dry_run:
        raise typer.BadParameter(
            "it is missing. Name the folder to make, or see what would be written with --dry-run.", param_hint="OUTPUT"
        )
    # The parameters of the design are read here, all at once.
    values = {setting.field: context.params[setting.parameter] for setting in SETTINGS}
    design = {
        name: None if value == "none" and None in CHOICES.get(name, ()) else value
        for name, value in values.items()
        if value is not None
    }
    given = {
        "--variant": variant,
        "--vision-from": vision_from,
        "--image-delimiters": image_delimiters,
        "--mapping": mapping,
        "--video-timestamps": video_timestamps,
        "--max-pixels": max_pixels,
    }
    named = [_OPTIONS[field] for field in design] + [name for name, value in given.items() if value is not None]
    named += ["--with-code"] if with_code else []
    if to_source and named:
        raise typer.BadParameter(
            f"it can't be used with {', '.join(named)}: the source's form has no CASA design. Leave these out.",
            param_hint="--to-source",
        )
    quiet_unless_terminal()
    from ..checkpoint_files.destination import OutputError
    from ..conversion import convert_checkpoint, convert_to_source, plan_conversion, plan_to_source

    weights: dict[str, Any] = {"dtype": dtype, "revision": revision, "max_shard_size": max_shard_size}
    form: dict[str, Any] = {
        "vision_from": vision_from,
        "image_delimiters": image_delimiters,
        "mapping": mapping,
        "video_timestamps": video_timestamps,
        "max_pixels": max_pixels,
        **design,
    }
    if output is None or dry_run:
        with wrong_value(**_OPTIONS):
            _print_plan(
                plan_to_source(source, **weights) if to_source else plan_conversion(source, variant, **form, **weights)
            )
        return
    refused = wrong_value(**_OPTIONS), wrong_value("OUTPUT", OutputError, **_OPTIONS)
    with refused[0], refused[1], progress_bar("Writing weights") as progress:
        weights |= {"overwrite": overwrite, "progress": progress}
        if to_source:
            report = convert_to_source(source, output, **weights)
        else:
            report = convert_checkpoint(source, output, variant, with_code=with_code, **form, **weights)
    _print_report(report, to_source)


def _print_report(report: ConversionReport, to_source: bool) -> None:
    from ..conversion.plan import active_note

    active = active_note(report.active_parameters, report.source_parameters + report.added_parameters)
    if to_source:
        typer.echo(
            f"Wrote {report.output}: {report.source_parameters:,} parameters of the CASA checkpoint, without what the "
            f"source has no place for{active}."
        )
        for kind in report.left_out:
            typer.echo(f"left out: {kind}")
        typer.echo(report.note)
        return
    typer.echo(
        f"Wrote {report.output}: {report.config.variant or 'a custom design'}, "
        f"{report.source_parameters:,} parameters taken over and {report.added_parameters:,} new ones{active}."
    )
    for name, start in report.initialised.items():
        typer.echo(f"new: {name} ({start})")
    for kind in report.left_out:
        typer.echo(f"left out: {kind}")
    for finding in report.findings:
        typer.echo(f"found: {finding}")
    typer.echo(report.note)


def _print_plan(plan: ConversionPlan) -> None:
    from ..conversion.plan import active_note

    active = active_note(plan.active_parameters, plan.source_parameters + plan.added_parameters)
    for file, tensors in plan.files.items():
        typer.echo(f"{file}: {counted(len(tensors), 'tensor')}, {sum(tensor.nbytes for tensor in tensors):,} bytes")
        for tensor in tensors:
            size = f"{tensor.dtype} {list(tensor.shape)} {tensor.nbytes:,} bytes"
            typer.echo(f"  {tensor.name} {size} <- {tensor.origin}")
    for kind in plan.left_out:
        typer.echo(f"left out: {kind}")
    for finding in plan.findings:
        typer.echo(f"found: {finding}")
    typer.echo(
        f"{plan.num_bytes:,} bytes in {counted(len(plan.files), 'file')}: {plan.source_parameters:,} parameters "
        f"taken over, {plan.added_parameters:,} new{active}. Nothing was written."
    )
