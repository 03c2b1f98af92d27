# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The command `casa-hf chat`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from io import TextIOWrapper
from typing import TYPE_CHECKING, Any

import typer

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
    sampling,
)
from .talking import load_conversation, open_clip, open_image, streamer
from .terminal import EXPLAINED, complain

if TYPE_CHECKING:
    from PIL.Image import Image

CHAT_HELP = "/image FILE or /video FILE adds one to the next message, /reset starts from scratch, /quit ends."


def chat(
    model: ModelArgument,
    max_new_tokens: MaxNewTokensOption = 256,
    fps: FpsOption = None,
    num_frames: NumFramesOption = None,
    sanitize_control_tokens: ControlTokensOption = True,
    chat_template_kwargs: TemplateKwargsOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    attn: AttnOption = None,
) -> None:
    """Talk in several turns, one line each; images and videos may come with any of them."""
    frames = sampling(fps, num_frames)
    conversation = load_conversation(model, device, dtype, attn, sanitize_control_tokens, chat_template_kwargs)
    interactive = sys.stdin.isatty()
    if interactive:
        typer.echo(CHAT_HELP, err=True)
    images: list[Image] = []
    videos: list[Any] = []
    for line in _lines("> " if interactive else ""):
        command, _, argument = line.partition(" ")
        try:
            if command == "/quit":
                return
            if command == "/reset":
                conversation.reset()
                images, videos = [], []
            elif command == "/image":
                images.append(open_image(argument.strip()))
            elif command == "/video":
                videos.append(open_clip(argument.strip(), **frames))
            elif command.startswith("/"):
                raise ValueError(f"{command!r} is not a command. {CHAT_HELP}")
            else:
                conversation.ask(
                    line,
                    images,
                    videos,
                    max_new_tokens=max_new_tokens,
                    streamer=streamer(conversation),
                    **frames,
                )
                images, videos = [], []  # now that they are part of what was said
        except EXPLAINED as error:
            # A person can try again; a script must not continue with half of its input.
            if not interactive:
                raise
            complain(error)


def _lines(prompt: str) -> Iterator[str]:
    """The non-empty lines of standard input; where bytes aren't UTF-8, the conversation refuses the line by name."""
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return
        if line:
            yield line
