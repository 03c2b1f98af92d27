# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The questions of `casa-hf generate`: from its options or from a file of JSON lines, and back with their answers."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer

from ..checks import check_asks, check_text
from .options import clip_name, image_name, is_url


@dataclass(frozen=True)
class Row:
    """One question.

    Attributes:
        prompt: the message.
        images, videos: files and URLs.
        given: the line of the file that it comes from.
    """

    prompt: str
    images: tuple[str, ...] = ()
    videos: tuple[str, ...] = ()
    given: dict[str, Any] = field(default_factory=dict)

    def answered(self, **result: str) -> str:
        """A JSON line: what was given, and its result in place of an earlier one."""
        videos = {"videos": list(self.videos)} if self.videos else {}
        given = self.given or {"prompt": self.prompt, "images": list(self.images), **videos}
        given = {name: value for name, value in given.items() if name not in ("answer", "error")}
        return json.dumps({**given, **result}, ensure_ascii=False)


def rows_of_options(
    prompts: Sequence[str], images: Sequence[str], each: bool, videos: Sequence[str] = ()
) -> list[Row]:
    """The questions that options ask.

    Args:
        prompts, images, videos: values of the options, in the order of the command line.
        each: whether the one prompt is asked about each image and then each video by itself.

    Raises:
        BadParameter: if it isn't clear which images and videos belong to which prompt.
    """
    if not prompts:
        raise typer.BadParameter(
            "it is missing; give a question, or a file of questions with --input.", param_hint="--prompt"
        )
    for prompt in prompts:
        try:
            check_asks("it", prompt, bool(images or videos))
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--prompt") from error
    if each and (len(prompts) > 1 or not (images or videos)):
        raise typer.BadParameter(
            "it needs one --prompt and the images or videos to ask it about.", param_hint="--each"
        )
    if each:
        stills = [Row(prompts[0], (image,)) for image in images]
        return stills + [Row(prompts[0], videos=(video,)) for video in videos]
    if len(prompts) == 1:
        return [Row(prompts[0], tuple(images), tuple(videos))]
    shown = zip(_by_prompt("image", images, len(prompts)), _by_prompt("video", videos, len(prompts)), strict=True)
    return [Row(prompt, *visuals) for prompt, visuals in zip(prompts, shown, strict=True)]


def _by_prompt(kind: str, names: Sequence[str], num_prompts: int) -> list[tuple[str, ...]]:
    """The images or the videos of each of several prompts."""
    if len(names) not in (0, 1, num_prompts):
        raise typer.BadParameter(
            f"{len(names)} {kind}s for {num_prompts} prompts: give none, one for all of them, or one for each. Other "
            "combinations can be written as JSON lines (--input).",
            param_hint=f"--{kind}",
        )
    return [tuple(names)] * num_prompts if len(names) < 2 else [(name,) for name in names]


def rows_of_file(file: Path) -> list[Row]:
    """The questions of a file, one JSON object a line: `prompt`, and `images` or `image`, `videos` or
    `video`.

    Args:
        file: path of the file; paths in it are relative to its folder.

    Raises:
        ValueError: for a line that is not a question, or an image or a video that doesn't exist.
    """
    try:
        lines = file.read_text("utf-8-sig").split("\n")  # rather than `splitlines`: JSON may hold U+2028
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} is not UTF-8 text ({error.reason} at byte {error.start}). Save it as UTF-8."
        ) from error
    rows = [_row(f"{file}, line {number}", line, file.parent) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise ValueError(f"{file} is empty; write one JSON object per line, with `prompt` and `images` or `videos`.")
    return rows


def _row(place: str, line: str, folder: Path) -> Row:
    try:
        given = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not valid JSON ({error}). Write one JSON object per line.") from error
    if not isinstance(given, dict) or not isinstance(given.get("prompt"), str):
        raise ValueError(f'{place} must be an object with a string as `prompt`, such as {{"prompt": "..."}}.')
    check_text(place, json.dumps(given, ensure_ascii=False))  # all of it is written again, with the answer
    images, videos = (_names(place, given, kind) for kind in ("image", "video"))
    check_asks(f"{place}: `prompt`", given["prompt"], bool(images or videos))
    try:
        return Row(
            given["prompt"],
            tuple(_located(image, folder, image_name) for image in images),
            tuple(_located(video, folder, clip_name) for video in videos),
            given,
        )
    except typer.BadParameter as error:
        raise ValueError(f"{place}: {error.message}") from error


def _names(place: str, given: dict[str, Any], kind: str) -> list[str]:
    """The images or the videos that a line names."""
    one, several = kind, f"{kind}s"
    if one in given and several in given:
        raise ValueError(f"{place} has both `{one}` and `{several}`; keep one.")
    names = [given[one]] if one in given else given.get(several, [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{place}: `{several}` must be a list of paths or URLs.")
    return names


def _located(name: str, folder: Path, existing: Callable[[str], str]) -> str:
    return name if is_url(name) else existing(str(folder / os.path.expanduser(name)))


def batches(rows: Sequence[Row], size: int) -> Iterator[Sequence[Row]]:
    """The rows in their order, so many at a time."""
    return (rows[start : start + size] for start in range(0, len(rows), size))
