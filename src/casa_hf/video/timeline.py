# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Times of frames that ascend, whatever the times of an input do."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from fractions import Fraction

from ..frames_casa import DecodedFrame, VideoProblem

# Times that jump back by more than this begin from scratch; frames that come back by less are duplicates or out of
# order.
_RESTART_SECONDS = 1.0


class Timeline:
    """Lets the times of frames ascend.

    Times that jump back run on from where they were: if they jump by a second or more, or if a second frame ascends
    from there. A frame that comes back alone is a duplicate, or out of order, and left out.

    Args:
        period: seconds between frames, for frames whose duration isn't stated.

    Attributes:
        last: time of the last frame that was taken; None before the first.
        end: time at which that one ends.
    """

    def __init__(self, period: Fraction | float):
        self._period = period
        self._offset: Fraction | float = 0
        self.last: Fraction | float | None = None
        self.end: Fraction | float = 0

    def follow(self, items: Iterable[DecodedFrame | VideoProblem]) -> Iterator[DecodedFrame | VideoProblem]:
        """Frames and problems with ascending times; every change and every run of frames left out is a problem."""
        doubtful: DecodedFrame | None = None
        num_skipped = 0
        for item in items:
            if isinstance(item, VideoProblem):
                known = self.last is not None and math.isfinite(item.timestamp)
                where = max(0.0, float(item.timestamp + self._offset)) if known else float(self.last or 0)
                yield VideoProblem(where, item.message)
                continue
            behind = -1.0 if self.last is None else self.last - item.timestamp - self._offset
            if behind >= 0:
                if behind >= _RESTART_SECONDS:
                    first = item
                elif doubtful is not None and doubtful.timestamp < item.timestamp:
                    first, doubtful = doubtful, None
                else:
                    num_skipped += doubtful is not None
                    doubtful = item
                    continue
                yield self._run_on(first)
                if first is not item:
                    yield self._taken(first)
            num_skipped += doubtful is not None
            doubtful = None
            if num_skipped:
                yield self._skipped(num_skipped)
                num_skipped = 0
            yield self._taken(item)
        num_skipped += doubtful is not None
        if num_skipped:
            yield self._skipped(num_skipped)

    def _taken(self, item: DecodedFrame) -> DecodedFrame:
        self.last = item.timestamp + self._offset
        self.end = self.last + (item.duration or self._period)
        return DecodedFrame(float(self.last), None if item.duration is None else float(item.duration), item.image)

    def _run_on(self, item: DecodedFrame) -> VideoProblem:
        assert self.last is not None
        jump = self.last - item.timestamp - self._offset
        self._offset += jump + self._period
        return VideoProblem(float(self.last), f"times jump back by {float(jump):.3f} s; they run on instead")

    def _skipped(self, number: int) -> VideoProblem:
        assert self.last is not None
        frames = "1 frame whose time isn't" if number == 1 else f"{number} frames whose times aren't"
        return VideoProblem(float(self.last), f"{frames} after that of the one before; left out")
