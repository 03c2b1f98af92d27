# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The command `casa-hf generate`."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import (
    AttnOption,
    ControlTokensOption,
    DeviceOption,
    DtypeOption,
    MaxNewTokensOption,
    ModelArgument,
    picture_name,
    valid_text,
)
from .talking import load_conversation, open_image, streamer


def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Option(help="The question or instruction.", show_default=False, callback=valid_text)],
    image: Annotated[
        list[str] | None,
        typer.Option(parser=picture_name, help="File or URL of an image; repeat for several.", show_default=False),
    ] = None,
    max_new_tokens: MaxNewTokensOption = 256,
    stream: Annotated[bool, typer.Option("--stream", help="Print the answer while it is generated.")] = False,
    sanitize_control_tokens: ControlTokensOption = True,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    attn: AttnOption = None,
) -> None:
    """Answer one prompt, with or without images."""
    images = [open_image(name) for name in image or []]
    conversation = load_conversation(model, device, dtype, attn, sanitize_control_tokens)
    if stream:
        conversation.ask(prompt, images, max_new_tokens=max_new_tokens, streamer=streamer(conversation))
    else:
        typer.echo(conversation.ask(prompt, images, max_new_tokens=max_new_tokens))
