# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""A stream as the chat template writes it: one long assistant turn in which frames stand between pieces of text.

    [system] [user: prompt] [assistant:] frame (prefix) text stop frame text stop frame ...

where a frame is its delimiters, behind its time if the processor writes timestamps.
Token ids of everything that isn't generated come from rendering the processor's chat template, so that every family's
format is kept and none is written down here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..chat_text import SAID, ChatText, message, render_chat, token_ids
from ..checks import check_asks, check_text
from ..image_inputs import DELIMITER_TYPE, FRAME_TYPE
from ..media_casa import MediaPolicy, rgb_image
from ..temporal_patches import join_frames, middle
from .steps import ShownFrame

if TYPE_CHECKING:
    from ..processing_casa import CasaProcessor
    from .settings import StreamSettings


class StreamTurns:
    """Token ids and pixels of what a stream is told.

    Args:
        processor: processor of the model.
        settings: system message, prompt, prefix, and how their control tokens and frames are read.
        uint8_pixels: whether the model normalises 8-bit pixels as the processor would.

    Attributes:
        opening: ids before the first frame.
        prefix: ids of the prefix.
        resumption: ids from the end of an answer to where captions resume.

    Raises:
        ValueError: if a text has image placeholders and isn't sanitized.
    """

    def __init__(self, processor: CasaProcessor, settings: StreamSettings, uint8_pixels: bool = False):
        self.processor = processor
        self._uint8_pixels = uint8_pixels
        self._settings = settings
        system, prompt, prefix = settings.system, settings.prompt, settings.prefix
        self._user = message("user", prompt)
        first = [self._user] if system is None else [message("system", system), self._user]
        for text in (system or "", prompt, prefix):
            self._check_placeholders(text)
        self.opening = self._ids(self._render(first))
        placeholder = self._ids(ChatText(processor.image_placeholder, {}))
        self._frame = [*placeholder, *processor.gist_token_ids]
        self._frame_types = [FRAME_TYPE if token == processor.image_token_id else 0 for token in self._frame]
        # Tokenized behind an image placeholder, where it will stand: some tokenizers treat the start of a text
        # specially.
        typed = {"\0": prefix} if settings.sanitize_control_tokens else {}
        behind = processor.image_placeholder + ("\0" if typed else prefix)
        self.prefix = self._ids(ChatText(behind, typed))[len(placeholder) :]
        self.resumption = self._ids(self._after_said([]))

    def image(self, timestamps: Sequence[float]) -> tuple[list[int], list[int]]:
        """Ids of an image, its time before it where the processor writes times, gist tokens included; and their types.

        Args:
            timestamps: times of its frames, in seconds.
        """
        time = self.processor.timestamp_ids(middle(timestamps))
        return time + self._frame, [DELIMITER_TYPE] * len(time) + self._frame_types

    def question(self, text: str) -> list[int]:
        """Ids from the end of what was said, over a question, to where its answer begins.

        Raises:
            ValueError: if it is blank, isn't valid Unicode, or has image placeholders and isn't sanitized.
        """
        check_text("question", text)
        check_asks("question", text)
        self._check_placeholders(text)
        return self._ids(self._after_said([message("user", text)]))

    def pixels(self, frame: Any) -> dict[str, torch.Tensor]:
        """`pixel_values` and `image_grid_thw` of one frame, at the size of video frames; from any thread.

        Args:
            frame: image of any kind that `casa_hf.media_casa.rgb_image` takes.

        Raises:
            ValueError: if the frame can't be used.
        """
        given = self._settings.media_policy
        policy = MediaPolicy.of(self.processor.media_policy if given is None else given)
        if self._uint8_pixels:
            return self.processor.frame_pixels(frame, policy)
        shown = rgb_image(frame, policy)
        return dict(self.processor(videos=[[[shown]]], media_policy=policy, frames_per_image=1, return_tensors="pt"))

    def joined(self, frames: list[ShownFrame]) -> dict[str, torch.Tensor]:
        """`pixel_values` and `image_grid_thw` of the image of some frames of one size."""
        first, size = frames[0].images, self.processor.image_processor.temporal_patch_size
        return {**first, "pixel_values": join_frames([frame.images["pixel_values"] for frame in frames], size)}

    def _after_said(self, messages: list[dict[str, Any]]) -> ChatText:
        """What the template puts behind what the assistant has said, with the new messages, up to its next turn."""
        return self._render([self._user, message("assistant", SAID), *messages])

    def _render(self, messages: list[dict[str, Any]]) -> ChatText:
        return render_chat(self.processor, messages, sanitize_control_tokens=self._settings.sanitize_control_tokens)

    def _ids(self, text: ChatText) -> list[int]:
        return token_ids(self.processor.tokenizer, text, text.typed)

    def _check_placeholders(self, text: str) -> None:
        if not self._settings.sanitize_control_tokens and self.processor.count_placeholders(text):
            raise ValueError(
                f"The text {text!r} holds image or video placeholders, such as {self.processor.image_placeholder}. "
                "Remove them; frames are given to push()."
            )
