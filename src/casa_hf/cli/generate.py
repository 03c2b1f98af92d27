# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The command `casa-hf generate`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from .loading import load_model
from .options import (
    AttnOption,
    ControlTokensOption,
    DeviceOption,
    DtypeOption,
    FpsOption,
    MaxNewTokensOption,
    ModelArgument,
    NumFramesOption,
    TemplateKwargsOption,
    clip_name,
    image_name,
    sampling,
    valid_text,
    wrong_value,
)
from .rows import Row, batches, rows_of_file, rows_of_options
from .talking import check_template_option, load_conversation, open_clip, open_image, streamer
from .terminal import progress_bar

if TYPE_CHECKING:
    from ..answers import Question


def generate(
    model: ModelArgument,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            callback=valid_text, help="The question or instruction; repeat for several answers.", show_default=False
        ),
    ] = None,
    image: Annotated[
        list[str] | None,
        typer.Option(
            parser=image_name,
            help="File or URL of an image; repeat for several. With several prompts: one for each, or one for all.",
            show_default=False,
        ),
    ] = None,
    video: Annotated[
        list[str] | None,
        typer.Option(
            parser=clip_name, help="File or URL of a video; as for images, which it comes after.", show_default=False
        ),
    ] = None,
    fps: FpsOption = None,
    num_frames: NumFramesOption = None,
    each: Annotated[bool, typer.Option("--each", help="Ask the prompt about each image and video by itself.")] = False,
    input: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help='File of questions, a JSON object a line: {"prompt": "...", "images": ["..."], "videos": ["..."]}.',
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="File for the answers, as JSON lines. Default: standard output.", show_default=False),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file of --output.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions that are answered at the same time.")] = 8,
    max_new_tokens: MaxNewTokensOption = 256,
    stream: Annotated[bool, typer.Option("--stream", help="Print the answer while it is generated.")] = False,
    sanitize_control_tokens: ControlTokensOption = True,
    chat_template_kwargs: TemplateKwargsOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    attn: AttnOption = None,
) -> None:
    """Answer one prompt or many, with or without images and videos.

    One prompt gives its answer as text. Several give JSON lines: what was asked, and `answer`, or `error` for a
    question whose images or videos can't be used.
    """
    if input is not None and (prompt or image or video or each):
        raise typer.BadParameter(
            "it can't be combined with --prompt, --image, --video and --each; the file has the prompts, images and "
            "videos.",
            param_hint="--input",
        )
    with wrong_value("--input"):
        rows = rows_of_options(prompt or [], image or [], each, video or []) if input is None else rows_of_file(input)
    frames = sampling(fps, num_frames)
    single = len(rows) == 1 and input is None and output is None
    if stream and not single:
        raise typer.BadParameter(
            "it needs one prompt, and no --input and --output: it prints the answer while it is generated.",
            param_hint="--stream",
        )
    if output is not None:
        from ..captions.subtitles import check_output

        with wrong_value("--output", overwrite="--overwrite"):
            check_output(output, (output.suffix.lower(),), overwrite, [] if input is None else [input])
    if single:
        with wrong_value("--image"):
            images = [open_image(name) for name in rows[0].images]
        with wrong_value("--video", fps="--fps", num_frames="--num-frames"):
            videos = [open_clip(name, **frames) for name in rows[0].videos]
        conversation = load_conversation(model, device, dtype, attn, sanitize_control_tokens, chat_template_kwargs)
        if stream:
            frames["streamer"] = streamer(conversation)
        answer = conversation.ask(rows[0].prompt, images, videos, max_new_tokens=max_new_tokens, **frames)
        if not stream:
            typer.echo(answer)
        return
    loaded = load_model(model, device, dtype, attn)
    check_template_option(loaded[1], chat_template_kwargs)
    options = {
        "max_new_tokens": max_new_tokens,
        "sanitize_control_tokens": sanitize_control_tokens,
        "chat_template_kwargs": chat_template_kwargs,
    }
    _answer_all(rows, loaded, output, batch_size, frames, options)


def _answer_all(
    rows: Sequence[Row],
    model: tuple[Any, Any],
    output: Path | None,
    batch_size: int,
    frames: dict[str, Any],
    options: dict[str, Any],
) -> None:
    """Answer batch by batch; what is answered is written at once."""
    done = failed = 0
    try:
        with _lines_to(output) as lines, progress_bar("Answering", unit="questions") as progress:
            for batch in batches(rows, batch_size):
                opened = [_opened(row, frames) for row in batch]
                questions = [each for each in opened if not isinstance(each, ValueError)]
                answers = iter(_answers(model, questions, {**frames, **options}))
                for row, question in zip(batch, opened, strict=True):
                    answer = question if isinstance(question, ValueError) else next(answers)
                    is_fault = isinstance(answer, ValueError)
                    lines.write(row.answered(**{"error" if is_fault else "answer": str(answer)}) + "\n")
                    failed += is_fault
                lines.flush()
                done += len(batch)
                if progress is not None:
                    progress(done, len(rows))
    except KeyboardInterrupt:
        typer.echo(f"Interrupted: {done} of {len(rows)} questions are answered{_in(output)}.", err=True)
        raise
    if failed:
        raise ValueError(f"{failed} of {len(rows)} questions could not be asked; see `error` of each{_in(output)}.")


def _in(output: Path | None) -> str:
    return "" if output is None else f" in {output}"


def _opened(row: Row, frames: dict[str, Any]) -> Question | ValueError:
    """The question with its images and videos, or what is wrong with them."""
    from ..answers import Question

    try:
        images = [open_image(name) for name in row.images]
        return Question(row.prompt, images, [open_clip(name, **frames) for name in row.videos])
    except ValueError as error:
        return error


def _answers(
    model: tuple[Any, Any], questions: Sequence[Question], options: dict[str, Any]
) -> Sequence[str | ValueError]:
    """The answer to each question, or why it can't be asked: of a video, decoding may be what tells."""
    from ..answers import answer_batch

    try:
        return answer_batch(*model, questions, **options)
    except ValueError as error:
        if len(questions) == 1:
            return [error]
        return [answer for question in questions for answer in _answers(model, [question], options)]


@contextmanager
def _lines_to(output: Path | None) -> Iterator[TextIO]:
    """Where lines go; those of a file are there as soon as they are written."""
    if output is None:
        yield sys.stdout
        return
    with output.open("w", encoding="utf-8") as lines:
        yield lines
