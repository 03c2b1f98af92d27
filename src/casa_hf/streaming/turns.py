# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""A stream as the chat template writes it: one long assistant turn in which frames stand between pieces of text.

    [system] [user: prompt] [assistant:] frame (prefix) text stop frame text stop frame ...

Token ids of everything that isn't generated come from rendering the processor's chat template, so that every family's
format is kept and none is written down here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..media_casa import MediaPolicy, rgb_picture

if TYPE_CHECKING:
    from ..processing_casa import CasaProcessor

# Stands for what the assistant has said while the template is rendered; no message contains it.
_SAID = "\0said\0"


class StreamTurns:
    """Token ids and pixels of what a stream is told.

    Args:
        processor: the model's.
        system: the system message; None for what the template writes without one.
        prompt: the user's message before the first frame.
        prefix: text that the captions begin with, behind the first frame.
        media_policy: what frames may be read from, and how large they may be; None for the processor's.

    Attributes:
        opening: ids before the first frame.
        frame: ids of one frame, gist tokens included.
        image_index: index in `frame` of the token that the image precedes.
        prefix: ids of the prefix.
        resumption: ids from the end of an answer to where captions go on.

    Raises:
        ValueError: if a text holds marks of images or videos.
    """

    def __init__(
        self,
        processor: CasaProcessor,
        system: str | None,
        prompt: str,
        prefix: str = "",
        media_policy: MediaPolicy | None = None,
    ):
        self.processor = processor
        self.media_policy = media_policy
        for text in (system or "", prompt, prefix):
            self._check(text)
        self._user = _message("user", prompt)
        first = [self._user] if system is None else [_message("system", system), self._user]
        self.opening = self._ids(self._render(first))
        mark = self._ids(processor.image_mark)
        self.frame = [*mark, *processor.gist_token_ids]
        self.image_index = self.frame.index(processor.image_token_id)
        # Tokenized behind a mark, where it will stand: some tokenizers treat the start of a text specially.
        self.prefix = self._ids(processor.image_mark + prefix)[len(mark) :]
        self.resumption = self._ids(self._after_said([]))

    def question(self, text: str) -> list[int]:
        """Ids from the end of what was said, over a question, to where its answer begins.

        Raises:
            ValueError: if the question holds marks of images or videos.
        """
        self._check(text)
        return self._ids(self._after_said([_message("user", text)]))

    def pixels(self, frame: Any) -> dict[str, torch.Tensor]:
        """`pixel_values` and `image_grid_thw` of one frame, at the size of video frames.

        Args:
            frame: of any kind that `casa_hf.media_casa.rgb_picture` takes.

        Raises:
            ValueError: if the frame can't be used.
        """
        policy = MediaPolicy.of(self.processor.media_policy if self.media_policy is None else self.media_policy)
        shown = rgb_picture(frame, policy)
        return dict(self.processor(videos=[[[shown]]], media_policy=policy, return_tensors="pt"))

    def _after_said(self, messages: list[dict[str, Any]]) -> str:
        """What the template puts behind what the assistant has said, with the new messages, up to its next turn."""
        return self._render([self._user, _message("assistant", _SAID), *messages]).rpartition(_SAID)[2]

    def _render(self, messages: list[dict[str, Any]]) -> str:
        return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def _ids(self, text: str) -> list[int]:
        return list(self.processor.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _check(self, text: str) -> None:
        marks = self.processor.count_marks(text)
        if marks:
            raise ValueError(
                f"The text {text!r} has {marks} marks of images or videos ({self.processor.image_mark}). Frames are "
                "given to push(); take the marks out."
            )


def _message(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}
