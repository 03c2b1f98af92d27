# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The questions of `casa-hf generate`: from its options or from a file of JSON lines, and back with their answers."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer

from ..checks import check_asks, check_text
from .options import image_name, is_url


@dataclass(frozen=True)
class Row:
    """One question.

    Attributes:
        prompt: the message.
        images: files and URLs.
        given: the line of the file that it comes from.
    """

    prompt: str
    images: tuple[str, ...] = ()
    given: dict[str, Any] = field(default_factory=dict)

    def answered(self, **result: str) -> str:
        """A JSON line: what was given, and its result in place of an earlier one."""
        given = self.given or {"prompt": self.prompt, "images": list(self.images)}
        given = {name: value for name, value in given.items() if name not in ("answer", "error")}
        return json.dumps({**given, **result}, ensure_ascii=False)


def rows_of_options(prompts: Sequence[str], images: Sequence[str], each: bool) -> list[Row]:
    """The questions that options ask.

    Args:
        prompts, images: values of the options, in the order of the command line.
        each: whether the one prompt is asked about each image by itself.

    Raises:
        BadParameter: if it isn't clear which images belong to which prompt.
    """
    if not prompts:
        raise typer.BadParameter(
            "it is missing; give a question, or a file of questions with --input.", param_hint="--prompt"
        )
    for prompt in prompts:
        try:
            check_asks("it", prompt, bool(images))
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--prompt") from error
    if each and (len(prompts) > 1 or not images):
        raise typer.BadParameter("it needs one --prompt and the images to ask it about.", param_hint="--each")
    if each:
        return [Row(prompts[0], (image,)) for image in images]
    if len(prompts) == 1:
        return [Row(prompts[0], tuple(images))]
    if len(images) not in (0, 1, len(prompts)):
        raise typer.BadParameter(
            f"{len(images)} images for {len(prompts)} prompts: give none, one for all of them, or one for each. Other "
            "combinations can be written as JSON lines (--input).",
            param_hint="--image",
        )
    if len(images) < 2:
        return [Row(prompt, tuple(images)) for prompt in prompts]
    return [Row(prompt, (image,)) for prompt, image in zip(prompts, images, strict=True)]


def rows_of_file(file: Path) -> list[Row]:
    """The questions of a file, one JSON object a line: `prompt`, and `images` or `image`.

    Args:
        file: path of the file; paths in it are relative to its folder.

    Raises:
        ValueError: for a line that is not a question, or an image that doesn't exist.
    """
    try:
        lines = file.read_text("utf-8-sig").split("\n")  # rather than `splitlines`: JSON may hold U+2028
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} is not UTF-8 text ({error.reason} at byte {error.start}). Save it as UTF-8."
        ) from error
    rows = [_row(f"{file}, line {number}", line, file.parent) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise ValueError(f"{file} is empty; write one JSON object per line, with `prompt` and `images`.")
    return rows


def _row(place: str, line: str, folder: Path) -> Row:
    try:
        given = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not valid JSON ({error}). Write one JSON object per line.") from error
    if not isinstance(given, dict) or not isinstance(given.get("prompt"), str):
        raise ValueError(f'{place} must be an object with a string as `prompt`, such as {{"prompt": "..."}}.')
    check_text(place, json.dumps(given, ensure_ascii=False))  # all of it is written again, with the answer
    if "image" in given and "images" in given:
        raise ValueError(f"{place} has both `image` and `images`; keep one.")
    images = [given["image"]] if "image" in given else given.get("images", [])
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise ValueError(f"{place}: `images` must be a list of paths or URLs.")
    check_asks(f"{place}: `prompt`", given["prompt"], bool(images))
    try:
        return Row(given["prompt"], tuple(_located(image, folder) for image in images), given)
    except typer.BadParameter as error:
        raise ValueError(f"{place}: {error.message}") from error


def _located(image: str, folder: Path) -> str:
    return image if is_url(image) else image_name(str(folder / os.path.expanduser(image)))


def batches(rows: Sequence[Row], size: int) -> Iterator[Sequence[Row]]:
    """The rows in their order, so many at a time."""
    return (rows[start : start + size] for start in range(0, len(rows), size))
