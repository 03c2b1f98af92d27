# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""What `casa-hf generate` and `casa-hf chat` share: images that are named, and a conversation to show them to."""

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
