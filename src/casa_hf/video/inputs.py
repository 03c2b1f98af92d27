# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""What every kind of video input does: frames one after another, each with its time, in a range and at a rate."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple, Self

from ..checks import is_number, is_positive
from ..frames_casa import TOLERANCE_SECONDS, DecodedFrame, VideoProblem, VideoWarning, frames_on_screen
from .read_ahead import ReadAhead

# How many decoded frames wait for the consumer.
READ_AHEAD = 8


class Frame(NamedTuple):
    """An image of a video.

    Attributes:
        timestamp: time at which it appears, in seconds.
        image: PIL image, upright; from an iterator, whatever that yields.
    """

    timestamp: float
    image: Any


class VideoInput:
    """Frames of one video. Iterating decodes ahead in a thread that ends with the iteration.

    A problem that doesn't end the video is a `VideoWarning`; `read` hands it over as an item instead.

    Args:
        name: name in messages.
        fps: frames per second: what is on screen at `start`, `start` + 1/fps, `start` + 2/fps, ... is taken, none of
            it twice; of a live video the first frame from each of these moments on, as soon as it comes. None takes
            every frame.
        start: seconds at which the range begins, with the frame that is on screen then.
        end: seconds at which the range ends; frames that appear then or later are left out. None for no end.
        live: whether a frame that isn't taken in time is lost, as with a camera.
        read_ahead: largest number of decoded frames that wait.

    Attributes:
        duration: length of the whole video, in seconds; None if not known.
        files: files that are read; none for a device, a URL or an iterator.

    Raises:
        ValueError: if a number is out of its range.
    """

    files: Sequence[Path] = ()

    def __init__(
        self,
        name: str,
        *,
        fps: float | None = None,
        start: float = 0.0,
        end: float | None = None,
        live: bool = False,
        read_ahead: int = READ_AHEAD,
    ):
        if fps is not None and not is_positive(fps):
            raise ValueError(f"fps={fps!r} must be a positive number of frames per second, or None for every frame.")
        if not (is_number(start) and 0 <= start < math.inf):
            raise ValueError(f"start={start!r} must be a number of seconds, 0 or more.")
        if end is not None and not (is_number(end) and end > start):
            raise ValueError(f"end={end!r} must be a number of seconds greater than start={start}.")
        if not (is_number(read_ahead, Integral) and read_ahead >= 1):
            raise ValueError(f"read_ahead={read_ahead!r} must be a positive integer (frames that may wait).")
        # Times are counted in float64, whatever kind of number these are.
        self.fps = None if fps is None else float(fps)
        self.start = float(start)
        self.end = None if end is None else float(end)
        self.name, self.live, self.read_ahead = name, False, int(read_ahead)
        self.duration: float | None = None
        if live:
            self._go_live()

    def _go_live(self) -> None:
        if self.start:
            raise ValueError(
                f"start={self.start:g} can't be used with {self.name}, which is live and has no past; leave out start."
            )
        self.live = True

    def read(self) -> Iterator[Frame | VideoProblem]:
        """Frames and problems in order, decoded in the calling thread.

        Raises:
            ValueError: if there are no frames at all, or none in the range.
        """
        num_frames = 0
        for item in self._chosen():
            if isinstance(item, VideoProblem):
                yield item
                continue
            try:
                frame = Frame(float(item.timestamp), item.image())
            except Exception as error:
                yield VideoProblem(float(item.timestamp), f"the frame can't be read: {error}")
                continue
            num_frames += 1
            yield frame
        if not num_frames:
            until = "its end" if self.end is None else f"{self.end:g} s"
            between = f" between {self.start:g} s and {until}" if self.start or self.end is not None else ""
            raise ValueError(f"The video {self.name!r} has no frames{between} that can be decoded.")

    def __iter__(self) -> Iterator[Frame]:
        with ReadAhead(self.read, self.read_ahead) as items:
            for item in items:
                if isinstance(item, VideoProblem):
                    warnings.warn(f"{self.name} at {item.timestamp:.3f} s: {item.message}", VideoWarning, stacklevel=2)
                else:
                    yield item

    def close(self) -> None:
        """Close what was opened and not read."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _frames(self) -> Iterator[DecodedFrame | VideoProblem]:
        """All frames from `start` or earlier, ascending in time."""
        raise NotImplementedError

    def _chosen(self) -> Iterator[DecodedFrame | VideoProblem]:
        """The frames that `fps`, `start` and `end` choose, and the problems on the way."""
        if self.live:
            return self._chosen_live()
        if self.fps is None:
            return self._chosen_every()
        return frames_on_screen(self._frames(), self._moments(self.fps))

    def _moments(self, fps: float) -> Callable[[float], float | None]:
        """The moments in the range, one after the other, as `frames_on_screen` asks for them."""
        step = -1

        def next_moment(reached: float) -> float | None:
            nonlocal step
            # The first guess avoids counting through a long pause step by step.
            step = max(step + 1, int((reached - TOLERANCE_SECONDS - self.start) * fps) - 1)
            moment = self.start + step / fps
            return moment if self.end is None or moment + TOLERANCE_SECONDS < self.end else None

        return next_moment

    def _chosen_every(self) -> Iterator[DecodedFrame | VideoProblem]:
        """The frame that is on screen at `start`, and all that appear later."""
        held: DecodedFrame | None = None  # the last one before the start
        for item in self._frames():
            if isinstance(item, VideoProblem):
                yield item
                continue
            if held is not None and item.timestamp > self.start + TOLERANCE_SECONDS:
                yield held
            held = None
            if self.end is not None and item.timestamp >= self.end:
                return
            if item.timestamp >= self.start:
                yield item
            else:
                held = item
        if held is not None and held.lasts_beyond(self.start):
            yield held

    def _chosen_live(self) -> Iterator[DecodedFrame | VideoProblem]:
        """The same of a live video, without waiting for what comes next."""
        period = 0.0 if self.fps is None else 1 / self.fps
        due = -math.inf
        for item in self._frames():
            if isinstance(item, VideoProblem):
                yield item
                continue
            if self.end is not None and item.timestamp >= self.end:
                return
            if item.timestamp < due - TOLERANCE_SECONDS:
                continue
            # On average one per period, even if the camera's own doesn't divide it; a gap isn't made up for.
            due = max(due + period, item.timestamp + (period if due == -math.inf else period / 2))
            yield item
