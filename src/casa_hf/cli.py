# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The command `casa-hf`: convert a checkpoint, look at one, train it, ask it about images and videos, publish it.

Thin wrappers of library functions, which are imported when a command runs. Answers and results go to standard output,
everything else to standard error. What goes wrong ends in one line and exit code 1; wrong usage in exit code 2.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .cli_caption import caption
from .cli_options import (
    AttnOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    MaxNewTokensOption,
    ModelArgument,
    load_model,
    quiet_unless_terminal,
)

if TYPE_CHECKING:
    from PIL.Image import Image

    from .conversation import Conversation
    from .conversion import CheckpointSummary, ConversionPlan
    from .training import PackedDataset
    from .training.parameters import Part

app = typer.Typer(
    help="Vision-language models that keep image tokens out of the sequence and the KV cache.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

CHAT_HELP = "/image FILE adds an image to the next message, /reset starts anew, /quit ends."

# Their messages say what to do; any other exception is a mistake of the program.
_EXPLAINED = (ValueError, OSError, ImportError, NotImplementedError)


@app.command()
def convert(
    source: Annotated[
        str, typer.Argument(help="Folder or Hub id, such as of a Qwen2.5-VL checkpoint.", show_default=False)
    ],
    output: Annotated[
        Path | None, typer.Argument(help="Folder to make; not needed with --dry-run.", show_default=False)
    ] = None,
    variant: Annotated[
        str | None, typer.Option(help="Such as ca, casa-shared or exact. Default: casa, or a CASA checkpoint's own.")
    ] = None,
    keys: Annotated[str | None, typer.Option(help="image, window or context.")] = None,
    layers: Annotated[str | None, typer.Option(help="Fused blocks: every:2, 4,8,12, last:8 or all.")] = None,
    placement: Annotated[str | None, typer.Option(help="parallel, replace, before or after.")] = None,
    image_updates: Annotated[str | None, typer.Option(help="none, ffn or full.")] = None,
    image_history: Annotated[str | None, typer.Option(help="latest, group or all.")] = None,
    video_history: Annotated[str | None, typer.Option(help="The same for video frames.")] = None,
    positions: Annotated[str | None, typer.Option(help="contiguous or insertion.")] = None,
    image_positions: Annotated[str | None, typer.Option(help="at or before.")] = None,
    text_windows: Annotated[
        bool | None, typer.Option(help="Whether text before the first image is a window.", show_default=False)
    ] = None,
    share_projections: Annotated[
        bool | None, typer.Option(help="Whether to fuse with self-attention's projections.", show_default=False)
    ] = None,
    gate: Annotated[str | None, typer.Option(help="tanh or none.")] = None,
    gist_tokens: Annotated[int | None, typer.Option(min=0, help="Gist tokens after each image.")] = None,
    vision_from: Annotated[
        str | None, typer.Option(help="Folder or Hub id that gives a text-only source its vision tower.")
    ] = None,
    max_pixels: Annotated[int | None, typer.Option(min=1, help="Pixels of an image at most.")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Cast the weights. Default: keep the source's.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing checkpoint.")] = False,
    max_shard_size: Annotated[str, typer.Option(help="Size of a weight file at most.")] = "5GB",
    with_code: Annotated[
        bool, typer.Option("--with-code", help="Add the code, for trust_remote_code=True without casa_hf.")
    ] = False,
    to_source: Annotated[
        bool, typer.Option("--to-source", help="Take a CASA checkpoint back to the form of its source.")
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
        raise typer.BadParameter("name the folder to make, or look first with --dry-run.", param_hint="OUTPUT")
    quiet_unless_terminal()
    from .conversion import convert_checkpoint, convert_to_source, plan_conversion, plan_to_source

    weights: dict[str, Any] = {"dtype": dtype, "revision": revision, "max_shard_size": max_shard_size}
    design: dict[str, Any] = {
        "casa_keys": keys,
        "casa_layers": layers,
        "casa_placement": placement,
        "casa_image_updates": image_updates,
        "casa_image_history": image_history,
        "casa_video_history": video_history,
        "casa_positions": positions,
        "casa_image_positions": image_positions,
        "casa_text_windows": text_windows,
        "casa_share_projections": share_projections,
        "casa_gate": gate,
        "num_gist_tokens": gist_tokens,
    }
    design = {name: value for name, value in design.items() if value is not None}
    if gate == "none":
        design["casa_gate"] = None
    form: dict[str, Any] = {"vision_from": vision_from, "max_pixels": max_pixels, **design}
    if to_source and (design or with_code or any(value is not None for value in (variant, vision_from, max_pixels))):
        raise ValueError("--to-source takes no design: leave out --variant and what describes a CASA model.")
    if output is None or dry_run:
        _print_plan(
            plan_to_source(source, **weights) if to_source else plan_conversion(source, variant, **form, **weights)
        )
        return
    with _progress_bar("Writing weights") as progress:
        weights |= {"overwrite": overwrite, "progress": progress}
        if to_source:
            report = convert_to_source(source, output, **weights)
        else:
            report = convert_checkpoint(source, output, variant, with_code=with_code, **form, **weights)
    if to_source:
        typer.echo(
            f"Wrote {report.output}: {report.source_parameters:,} parameters of the CASA checkpoint, without "
            f"{len(report.dropped)} tensors that the source has no place for."
        )
        for name, reason in report.dropped.items():
            typer.echo(f"left out: {name} ({reason})")
        return
    typer.echo(
        f"Wrote {report.output}: {report.config.variant or 'a design of its own'}, "
        f"{report.source_parameters:,} parameters of the source and {report.added_parameters:,} new ones."
    )
    for name, start in report.initialised.items():
        typer.echo(f"new: {name} ({start})")
    typer.echo(report.note)


def _print_plan(plan: ConversionPlan) -> None:
    for file, tensors in plan.files.items():
        typer.echo(f"{file}: {len(tensors)} tensors, {sum(tensor.nbytes for tensor in tensors):,} bytes")
        for tensor in tensors:
            size = f"{tensor.dtype} {list(tensor.shape)} {tensor.nbytes:,} bytes"
            typer.echo(f"  {tensor.name} {size} <- {tensor.origin}")
    for name, reason in plan.dropped.items():
        typer.echo(f"left out: {name} ({reason})")
    typer.echo(
        f"{plan.num_bytes:,} bytes in {len(plan.files)} files: {plan.source_parameters:,} parameters taken over, "
        f"{plan.added_parameters:,} new. Nothing was written."
    )


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="Folder of a checkpoint.", show_default=False)],
) -> None:
    """Show what a CASA checkpoint is made of and what it costs to run, without loading its weights."""
    from rich.filesize import decimal

    from .conversion import inspect_checkpoint

    summary = inspect_checkpoint(path)
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
        "parameters": f"{summary.source_parameters:,} of the source, {summary.added_parameters:,} added",
        "weights": f"{decimal(summary.num_bytes)}, {summary.dtype}",
        **_image_rows(summary),
        "text token": text_token,
    }
    for label, value in rows.items():
        typer.echo(f"{label:<15}{value}")


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


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="Folder of a CASA checkpoint.", show_default=False)],
    repository: Annotated[str, typer.Argument(help="Such as namespace/name.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to publish on, made if need be.")] = None,
    with_code: Annotated[
        bool, typer.Option("--with-code", help="Add the code, for trust_remote_code=True without casa_hf.")
    ] = False,
    dataset: Annotated[
        list[str] | None,
        typer.Option(help="What it was trained on, for the card; repeat for several.", show_default=False),
    ] = None,
    card: Annotated[
        Literal["folder", "hub"] | None,
        typer.Option(help="The model card that counts where folder and repository differ.", show_default=False),
    ] = None,
    message: Annotated[str | None, typer.Option(help="Of the commit.", show_default=False)] = None,
) -> None:
    """Publish a checkpoint on the Hub: checked, with its model card, in one commit."""
    quiet_unless_terminal()
    from rich.filesize import decimal

    from .publishing import PublishingError, push_checkpoint

    try:
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
    except PublishingError:
        _close_progress_bars()
        raise
    except KeyboardInterrupt as error:
        _close_progress_bars()
        raise OSError(
            f"The push to {repository} was interrupted. The same command again sends only what is missing."
        ) from error
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


@app.command()
def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Option(help="The question or instruction.", show_default=False)],
    image: Annotated[
        list[str] | None, typer.Option(help="File or URL of an image; repeat for several.", show_default=False)
    ] = None,
    max_new_tokens: MaxNewTokensOption = 256,
    stream: Annotated[bool, typer.Option("--stream", help="Print the answer while it is generated.")] = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    attn: AttnOption = None,
) -> None:
    """Answer one prompt, with or without images."""
    images = [_open_image(name) for name in image or []]
    conversation = _conversation(model, device, dtype, attn)
    if stream:
        conversation.ask(prompt, images, max_new_tokens=max_new_tokens, streamer=_streamer(conversation))
    else:
        typer.echo(conversation.ask(prompt, images, max_new_tokens=max_new_tokens))


@app.command(epilog=CHAT_HELP)
def chat(
    model: ModelArgument,
    max_new_tokens: MaxNewTokensOption = 256,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    attn: AttnOption = None,
) -> None:
    """Talk in several turns, one line each; an image may come with any of them."""
    conversation = _conversation(model, device, dtype, attn)
    interactive = sys.stdin.isatty()
    if interactive:
        typer.echo(CHAT_HELP, err=True)
    pending: list[Image] = []
    for line in _lines("> " if interactive else ""):
        command, _, argument = line.partition(" ")
        try:
            if command == "/quit":
                return
            if command == "/reset":
                conversation.reset()
                pending = []
            elif command == "/image":
                pending.append(_open_image(argument.strip()))
            elif command.startswith("/"):
                raise ValueError(f"{command} is not a command. {CHAT_HELP}")
            else:
                images, pending = pending, []
                conversation.ask(line, images, max_new_tokens=max_new_tokens, streamer=_streamer(conversation))
        except _EXPLAINED as error:
            # A person can try again; a script must not go on with half of its input.
            if not interactive:
                raise
            _complain(error)


app.command()(caption)


@app.command()
def train(
    config: Annotated[
        Path, typer.Argument(help="YAML file; docs/training.md lists its settings.", show_default=False)
    ],
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
) -> None:
    """Fine-tune a CASA checkpoint on conversations with images."""
    quiet_unless_terminal()
    from dataclasses import replace

    from .training import TrainingConfig, parts_table
    from .training import train as run
    from .training.recipe import is_first_process

    settings = TrainingConfig.from_yaml(config)
    if resume:
        settings = replace(settings, resume=True)

    def announce(parts: list[Part], data: PackedDataset) -> None:
        typer.echo(parts_table(parts))
        typer.echo(
            f"{len(data.examples) - data.num_dropped} conversations in {len(data)} packed sequences, "
            f"{data.num_dropped} dropped as too long."
        )

    speaks = is_first_process()
    output = Path(settings.output)
    existed = output.exists()
    try:
        report = run(settings, on_log=lambda logs: typer.echo(_logged(logs), err=True), on_start=announce)
    except KeyboardInterrupt as error:
        if not speaks:
            raise
        raise OSError(_interrupted(config, output, settings.checkpoint_folder, existed)) from error
    if speaks:
        typer.echo(f"{report.steps} steps: {_logged(report.metrics)}")
        typer.echo(f"Wrote {report.output}.")


def _interrupted(config: Path, output: Path, checkpoints: Path, existed: bool) -> str:
    """What is left of an interrupted training, and how to go on; `existed` is whether the output did before."""
    from .training.checkpoints import last_checkpoint

    if existed:
        return f"The training was interrupted before it began; {output} is not of this run."
    if output.exists():
        return f"The training was interrupted when the model was trained; it is saved in {output}."
    last, skipped = last_checkpoint(checkpoints)
    if last is None and skipped:
        folder, fault = next(iter(skipped.items()))
        way = f"Remove {checkpoints} to start anew."
        return f"The training was interrupted, and {folder} is incomplete ({fault}). {way}"
    if last is None:
        return "The training was interrupted before its first checkpoint. The same command starts it anew."
    return f"The training was interrupted. `casa-hf train {config} --resume` goes on from {last}."


def _logged(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.6g}" for name, value in values.items() if isinstance(value, int | float))


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
        _complain(error)
        sys.exit(1)


def _complain(error: Exception) -> None:
    message = " ".join(" ".join([str(error), *getattr(error, "__notes__", ())]).split())
    if not isinstance(error, _EXPLAINED):
        message = f"{type(error).__name__}: {message} (`python -X dev -m casa_hf ...` shows where)"
    typer.echo(f"error: {message}", err=True)


def _lines(prompt: str) -> Iterator[str]:
    """The non-empty lines of standard input."""
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return
        if line:
            yield line


def _open_image(name: str) -> Image:
    from PIL import Image
    from transformers.image_utils import load_image

    from .checks import check_pixel_mode

    is_url = name.startswith(("http://", "https://"))
    if not is_url:
        file = Path(name).expanduser()
        if not file.is_file():
            raise ValueError(f"There is no image file {name!r}; give the path or URL of one.")
        name = str(file)
    try:
        if not is_url:
            with Image.open(name) as opened:  # the loader turns it into RGB without a word
                check_pixel_mode(f"The image {name!r}", opened)
        return load_image(name)
    except OSError as error:
        raise ValueError(f"{name!r} can't be read as an image ({error}); give a JPEG, PNG or WebP file.") from error


def _conversation(name: str, device: str | None, dtype: Dtype | None, attn: str | None) -> Conversation:
    from .conversation import Conversation

    return Conversation(*load_model(name, device, dtype, attn))


def _streamer(conversation: Conversation) -> Any:
    from transformers import TextStreamer

    return TextStreamer(conversation.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)


@contextmanager
def _progress_bar(label: str) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on the terminal, advanced by (bytes done, bytes in all); None where there is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
