# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""What `casa-hf generate` and `casa-hf chat` share: images and videos that are named, and a conversation to show them
to."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from .loading import load_model
from .options import wrong_value

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..chat import Conversation


def open_image(name: str) -> Image:
    """The image of a file or URL.

    Raises:
        ValueError: if there is none.
    """
    from ..media_casa import rgb_image

    return rgb_image(os.path.expanduser(name))


def open_clip(name: str, **sampling: Any) -> str | bytes:
    """The video of a file or URL as the processor takes it, after a look at its container; nothing is decoded.

    Args:
        name: the file or URL.
        **sampling: `fps` or `num_frames`.

    Raises:
        ValueError: if there is none, or it can't be sampled so.
        ImportError: without PyAV.
    """
    from ..frames_casa import measure_frames
    from ..media_casa import DEFAULT_POLICY, contents_of, name_of, reason_of

    try:
        video = contents_of(os.path.expanduser(name), DEFAULT_POLICY)  # fetches a URL, once
    except (ValueError, OSError) as error:
        raise ValueError(f"The video {name_of(name)} can't be used: {reason_of(error)}.") from error
    measure_frames(video, **sampling)
    return video


def load_conversation(
    name: str,
    device: str | None,
    dtype: str | None,
    attn: str | None,
    sanitize_control_tokens: bool,
    chat_template_kwargs: dict[str, Any] | None,
) -> Conversation:
    """A conversation with the model of a checkpoint; see `load_model`."""
    from ..chat import Conversation

    model, processor = load_model(name, device, dtype, attn)
    check_template_option(processor, chat_template_kwargs)
    return Conversation(
        model,
        processor,
        sanitize_control_tokens=sanitize_control_tokens,
        chat_template_kwargs=chat_template_kwargs,
    )


def check_template_option(processor: Any, chat_template_kwargs: dict[str, Any] | None) -> None:
    """Refuse variables that a model's chat template doesn't have.

    Raises:
        BadParameter: naming them.
    """
    from ..chat_text import check_template_kwargs

    with wrong_value(chat_template_kwargs="--chat-template-kwargs"):
        check_template_kwargs(processor, chat_template_kwargs)


def streamer(conversation: Conversation) -> Any:
    """Prints an answer while it is generated."""
    from transformers import TextStreamer

    return TextStreamer(conversation.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
