# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""What `casa-hf generate` and `casa-hf chat` share: pictures that are named, and a conversation to show them to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .loading import load_model

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..conversation import Conversation


def open_image(name: str) -> Image:
    """The picture of a file or URL.

    Raises:
        ValueError: if there is none.
    """
    from PIL import Image
    from transformers.image_utils import load_image

    from ..checks import check_pixel_mode

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


def load_conversation(name: str, device: str | None, dtype: str | None, attn: str | None) -> Conversation:
    """A conversation with the model of a checkpoint; see `load_model`."""
    from ..conversation import Conversation

    return Conversation(*load_model(name, device, dtype, attn))


def streamer(conversation: Conversation) -> Any:
    """Prints an answer while it is generated."""
    from transformers import TextStreamer

    return TextStreamer(conversation.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
