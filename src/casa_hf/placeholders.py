# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""How images and videos are written in a prompt, and how a prompt is rewritten before it is tokenized.

Images never enter the token sequence: an image stands between two delimiters, such as `<|vision_start|>` and
`<|vision_end|>`, immediately before the latter; or before a single one. Qwen's chat templates write a pad token
between the two, `<|image_pad|>` or `<|video_pad|>`. It isn't tokenized, and neither is what stands for a video where
there is one delimiter, `<|video|>`. A video's placeholder gives way to the delimiters of its frames, each of which is
an image of its own. Gist tokens, where a model has any, follow the token that an image precedes; they are added here.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

from .checks import check_text
from .image_inputs import FRAME_TYPE, IMAGE_TYPE

VISION_START = "<|vision_start|>"
VISION_END = "<|vision_end|>"
IMAGE_PAD = "<|image_pad|>"
VIDEO_PAD = "<|video_pad|>"

# What stands for a video where there is one delimiter.
VIDEO_PLACEHOLDER = "<|video|>"

# Transformers puts this character before a control token that a user typed (`sanitize_control_tokens`): it is text.
_NOT_TYPED = "(?<!\U000f0000)"
_PADS = f"{re.escape(IMAGE_PAD)}|{re.escape(VIDEO_PAD)}"
_STRAY = re.compile(f"{_NOT_TYPED}(?:{_PADS})")


class DelimiterError(ValueError):
    """Tokens that can't stand around an image."""


def delimiters_of(given: str | Sequence[str]) -> tuple[str, ...]:
    """The tokens around an image: the one before it, if any, and the one that it stands before.

    Args:
        given: one or two tokens, or a string of them with a comma in between.

    Raises:
        DelimiterError: if these are no one or two different tokens, or pads, which aren't tokenized.
    """
    tokens = tuple(given.split(",") if isinstance(given, str) else given)
    named = [token for token in tokens if isinstance(token, str) and token and token == token.strip()]
    if not 0 < len(tokens) == len(set(named)) < 3 or {IMAGE_PAD, VIDEO_PAD, VIDEO_PLACEHOLDER}.intersection(tokens):
        raise DelimiterError(
            f"image_delimiters={given!r} must name the token before an image and the one after it, such as "
            f"'{VISION_START},{VISION_END}', or the one after it alone, such as '<|image|>'; without pads and blanks."
        )
    return tokens


@dataclass(frozen=True)
class Notation:
    """How images and videos are written in the prompts of a model.

    Attributes:
        start: token before an image; empty for none.
        end: token that an image stands before.
        gists: gist tokens.
    """

    start: str
    end: str
    gists: str = ""

    @property
    def image(self) -> str:
        """Image placeholder, as a user writes it."""
        return self.start + self.end

    @property
    def video(self) -> str:
        """Video placeholder, as a user writes it."""
        return self.start + VIDEO_PAD + self.end if self.start else VIDEO_PLACEHOLDER

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Matches either, with the gist tokens after it if the text has them; group `pad` is what isn't tokenized."""
        end = _NOT_TYPED + re.escape(self.end)
        if self.start:
            placeholder = f"(?:{_NOT_TYPED}{re.escape(self.start)}(?P<pad>{_PADS})?)?{end}"
        else:
            placeholder = f"(?:(?P<pad>{re.escape(VIDEO_PLACEHOLDER)})|{end})"
        return re.compile(f"{placeholder}(?:{re.escape(self.gists)})?")

    def types(self, text: Any) -> list[int]:
        """`IMAGE_TYPE` or `FRAME_TYPE` for each placeholder of a prompt, in reading order.

        Raises:
            ValueError: if the prompt isn't a string, or has pad tokens outside of a placeholder.
        """
        if not isinstance(text, str):
            raise ValueError(
                f"text must be a string or a list of strings; got an element of type {type(text).__name__}."
            )
        check_text("text", text)
        pads = [match["pad"] for match in self.pattern.finditer(text)]
        stray = len(_STRAY.findall(text)) - sum(pad in (IMAGE_PAD, VIDEO_PAD) for pad in pads)
        if stray:
            raise ValueError(
                f"The text has {IMAGE_PAD} or {VIDEO_PAD} outside of a placeholder, {stray} times. Write an image as "
                f"{self.image} and a video as {self.video}; CASA repeats neither for every image token."
            )
        return [FRAME_TYPE if pad in (VIDEO_PAD, VIDEO_PLACEHOLDER) else IMAGE_TYPE for pad in pads]

    def written(self, times: Sequence[str], enclosed: bool = False) -> str:
        """What is tokenized for an image, or for a video.

        Args:
            times: what stands before each image: the time of a frame, or nothing.
            enclosed: whether a further pair of delimiters stands around them all.
        """
        images = "".join(time + self.start + self.end + self.gists for time in times)
        return self.start + images + self.end if enclosed else images


class Prompt(NamedTuple):
    """A prompt as it is tokenized, and where its pieces come from.

    Attributes:
        text: prompt with what is tokenized in place of its placeholders.
        starts: index at which each piece starts in `text`.
        spans: (start, end) of each piece in the given text.
        copied: whether each piece is what the given text has there.
    """

    text: str
    starts: list[int]
    spans: list[tuple[int, int]]
    copied: list[bool]

    @classmethod
    def write(cls, text: str, written: Sequence[str], notation: Notation) -> Prompt:
        """Rewrite a prompt.

        Args:
            text: prompt as it was given.
            written: what is tokenized for each of its placeholders.
            notation: the model's.
        """
        pieces, end = [], 0
        for match, content in zip(notation.pattern.finditer(text), written, strict=True):
            pieces += [(text[end : match.start()], end, match.start()), (content, *match.span())]
            end = match.end()
        pieces.append((text[end:], end, len(text)))
        starts = list(accumulate((len(piece) for piece, _, _ in pieces), initial=0))[:-1]
        return cls(
            text="".join(piece for piece, _, _ in pieces),
            starts=starts,
            spans=[(start, stop) for _, start, stop in pieces],
            copied=[piece == text[start:stop] for piece, start, stop in pieces],
        )

    def origin(self, start: int, end: int) -> tuple[int, int]:
        """The span in the given text of a span in `text`; what was rewritten has that of its placeholder."""
        if end == 0:  # padding, and what the tokenizer adds
            return 0, 0
        first, last = (bisect_right(self.starts, place) - 1 for place in (start, max(start, end - 1)))
        begin, stop = self.spans[first][0], self.spans[last][1]
        if self.copied[first]:
            begin += start - self.starts[first]
        if self.copied[last]:
            stop = self.spans[last][0] + end - self.starts[last]
        return begin, stop
