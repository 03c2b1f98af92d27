# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""When frames were taken, from what callers know of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from ..checks import is_number, shown


def frame_timestamps(
    given: float | Sequence[float] | None, count: int, last: float | None, period: float
) -> list[float]:
    """The timestamps of several frames, in seconds.

    Args:
        given: timestamps of all frames, or that of the last one: the others lie evenly before it. None for one
            `period` after another.
        count: number of frames.
        last: timestamp of the frame before them; None if there was none.
        period: seconds between two frames of which nothing else is known.

    Raises:
        ValueError: if there isn't one timestamp for each frame, or they are negative, aren't finite or don't ascend.
    """
    seconds = [] if given is None else _seconds(given)
    if given is None:
        begin = 0.0 if last is None else last + period
        timestamps = [begin + number * period for number in range(count)]
    elif isinstance(seconds, float):
        step = period if last is None else (seconds - last) / count
        timestamps = [seconds - number * step for number in reversed(range(count))]
    else:
        timestamps = seconds
        if len(timestamps) != count:
            raise ValueError(f"timestamp has {len(timestamps)} values for {count} frames; give one for each.")
    if isinstance(seconds, float) and timestamps[0] < 0 <= seconds:
        raise ValueError(
            f"timestamp={shown(given)} of the last of {count} frames puts the first one at {timestamps[0]}, before 0. "
            "Give a list with the timestamp of each."
        )
    previous = last
    for timestamp in timestamps:
        if not 0 <= timestamp < math.inf or (previous is not None and timestamp <= previous):
            later = "" if previous is None else f", later than {previous} of the frame before"
            raise ValueError(f"timestamp={shown(given)} must be a finite number of seconds, 0 or more{later}.")
        previous = timestamp
    return timestamps


def _seconds(given: Any) -> float | list[float]:
    """A timestamp or several, as numbers; anything else becomes NaN, which is refused as timestamps are."""
    if is_number(given) or getattr(given, "ndim", None) == 0:
        return float(given)
    if isinstance(given, bool | str | bytes) or not isinstance(given, Iterable):
        return math.nan
    several = [_seconds(timestamp) for timestamp in given]
    return [timestamp if isinstance(timestamp, float) else math.nan for timestamp in several]
