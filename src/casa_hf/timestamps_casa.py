# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The time of a video frame as it is written before the frame, in ordinary text.

Qwen3-VL and its successors were trained with it: their processor writes `<0.5 seconds>` before each temporal patch of
a video, the mean of the times of its frames. What is written here belongs to the delimiters of the frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .design_space import unknown_value

# Kinds of timestamps, and what each means.
VIDEO_TIMESTAMPS: dict[str | None, str] = {
    None: "none",
    "native": "as the source writes them: `<0.5 seconds>` in Qwen3-VL and its successors",
    "text": "the same words in plain text: `[0.5 seconds]`",
}
# Kinds in which a further pair of delimiters stands around all of a video, as Transformers writes it from 5.10 on.
ENCLOSED = ("native",)
_FORMS = {"native": "<{:.1f} seconds>", "text": "[{:.1f} seconds]"}

# Frames per second of which the stock processors assume frames to be that come without times.
ASSUMED_FPS = 24.0


def check_video_timestamps(kind: Any) -> None:
    """Check a kind of timestamps.

    Raises:
        ValueError: if there is no such kind.
    """
    if kind not in VIDEO_TIMESTAMPS:
        raise ValueError(f"video_timestamps={kind!r} is unknown; {unknown_value(kind, VIDEO_TIMESTAMPS)}")


def timestamp_text(kind: str | None, seconds: float) -> str:
    """What is written before a frame; nothing without timestamps.

    Args:
        kind: key of `VIDEO_TIMESTAMPS`.
        seconds: time of the frame; the mean of those of several in one image.
    """
    return "" if kind is None else _FORMS[kind].format(seconds)


def num_common_last(ids: Sequence[int], others: Sequence[int]) -> int:
    """How many ids at the end of two sequences are the same."""
    number = 0
    while number < min(len(ids), len(others)) and ids[-1 - number] == others[-1 - number]:
        number += 1
    return number
