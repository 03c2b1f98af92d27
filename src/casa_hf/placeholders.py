# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""How images and videos are written in a prompt, and how a prompt is rewritten before it is tokenized.

Images never enter the token sequence: an image stands between `<|vision_start|>` and `<|vision_end|>`, immediately
before the latter. Qwen's chat templates write a pad token there, `<|image_pad|>` or `<|video_pad|>`. It is taken out,
and for a video the empty pair is repeated once per frame, so that every frame is an image of its own.

The tokenizer of a text-only source has no such pair. There an image stands before the one token `<|image|>`, and the
chat template writes `<|video|>`, not a token, for a video. Gist tokens, where a model has any, follow the token
that an image precedes; they are added here.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from itertools import accumulate
from typing import Any, NamedTuple

from .checks import check_text
from .image_inputs import FRAME_TYPE, IMAGE_TYPE

VISION_START = "<|vision_start|>"
VISION_END = "<|vision_end|>"
IMAGE_PAD = "<|image_pad|>"
VIDEO_PAD = "<|video_pad|>"

# Without delimiters: the token that an image precedes, and what stands for a video.
IMAGE_TOKEN = "<|image|>"
VIDEO_PLACEHOLDER = "<|video|>"

# Transformers puts this character before a control token that a user typed (`sanitize_control_tokens`): it is text.
_NOT_TYPED = "(?<!\U000f0000)"
_PAD = re.compile(f"{_NOT_TYPED}(?:{re.escape(IMAGE_PAD)}|{re.escape(VIDEO_PAD)})")


class Notation(NamedTuple):
    """How images and videos are written in the prompts of a model.

    Attributes:
        image: image placeholder, as a user writes it.
        video: video placeholder, as a user writes it.
        pattern: pattern of either, with the gist tokens after it if the text has them (group `gists`). Group `pad` is
            what isn't tokenized and gives way to the frames of a video.
        video_pad: the same part of a video placeholder.
        next_frame: text from the image token of a frame, with it, to that of the next one.
        last_frame: text in place of the pad of a video, behind all frames but the last.
        gists: gist tokens.
    """

    image: str
    video: str
    pattern: re.Pattern[str]
    video_pad: str
    next_frame: str
    last_frame: str
    gists: str

    @classmethod
    def of(cls, image_token: str, gists: str) -> Notation:
        """The notation of a model: with delimiters if `image_token` is the second of them, else without."""
        token = _NOT_TYPED + re.escape(image_token)
        written_gists = f"(?P<gists>{re.escape(gists)})?"
        if image_token != VISION_END:
            return cls(
                image=image_token,
                video=VIDEO_PLACEHOLDER,
                pattern=re.compile(f"(?:(?P<pad>{re.escape(VIDEO_PLACEHOLDER)})|{token}){written_gists}"),
                video_pad=VIDEO_PLACEHOLDER,
                next_frame=image_token + gists,
                last_frame=image_token,
                gists=gists,
            )
        pads = f"{re.escape(IMAGE_PAD)}|{re.escape(VIDEO_PAD)}"
        opening = f"(?:{_NOT_TYPED}{re.escape(VISION_START)}(?P<pad>{pads}))?"
        return cls(
            image=VISION_START + VISION_END,
            video=VISION_START + VIDEO_PAD + VISION_END,
            pattern=re.compile(opening + token + written_gists),
            video_pad=VIDEO_PAD,
            next_frame=VISION_END + gists + VISION_START,
            last_frame="",
            gists=gists,
        )

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
        stray = len(_PAD.findall(text)) - sum(pad in (IMAGE_PAD, VIDEO_PAD) for pad in pads)
        if stray:
            raise ValueError(
                f"The text has {IMAGE_PAD} or {VIDEO_PAD} outside of a placeholder, {stray} times. Write an image as "
                f"{self.image} and a video as {self.video}; CASA repeats neither for every image token."
            )
        return [FRAME_TYPE if pad == self.video_pad else IMAGE_TYPE for pad in pads]


class Prompt(NamedTuple):
    """A prompt as it is tokenized, and where its pieces come from.

    Attributes:
        text: prompt without pads, with the placeholder of a video repeated once per frame, and with gist tokens.
        starts: index at which each piece starts in `text`.
        spans: (start, end) of each piece in the given text.
        copied: whether each piece is what the given text has there.
    """

    text: str
    starts: list[int]
    spans: list[tuple[int, int]]
    copied: list[bool]

    @classmethod
    def write(cls, text: str, counts: list[int], notation: Notation) -> Prompt:
        """Rewrite a prompt.

        Args:
            text: prompt as it was given.
            counts: number of images that each of its placeholders stands for.
            notation: the model's.
        """
        pieces, end = [], 0
        for match, count in zip(notation.pattern.finditer(text), counts, strict=True):
            if match["pad"] is not None:
                start, stop = match.span("pad")
                frames = notation.next_frame * (count - 1) + notation.last_frame
                pieces += [(text[end:start], end, start), (frames, start, stop)]
                end = stop
            if not match["gists"]:
                # They refer to the last character of the placeholder: an empty span would seem to begin what follows.
                pieces += [(text[end : match.end()], end, match.end()), (notation.gists, match.end() - 1, match.end())]
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
        """The span in the given text of a span in `text`; what was added has that of what it stands for."""
        if end == 0:  # padding, and what the tokenizer adds
            return 0, 0
        first, last = (bisect_right(self.starts, place) - 1 for place in (start, max(start, end - 1)))
        begin, stop = self.spans[first][0], self.spans[last][1]
        if self.copied[first]:
            begin += start - self.starts[first]
        if self.copied[last]:
            stop = self.spans[last][0] + end - self.starts[last]
        return begin, stop
