# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""What `casa-hf generate` and `casa-hf chat` share: images and videos that are named, and a conversation to show them
to."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from .loading import load_model

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
    name: str, device: str | None, dtype: str | None, attn: str | None, sanitize_control_tokens: bool
) -> Conversation:
    """A conversation with the model of a checkpoint; see `load_model`."""
    from ..chat import Conversation

    return Conversation(*load_model(name, device, dtype, attn), sanitize_control_tokens=sanitize_control_tokens)


def streamer(conversation: Conversation) -> Any:
    """Prints an answer while it is generated."""
    from transformers import TextStreamer

    return TextStreamer(conversation.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
