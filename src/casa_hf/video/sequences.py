# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Frames that come as images: the files of a folder, or what an iterator yields."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ..checks import is_positive, shown
from ..frames_casa import DEFAULT_FPS, DecodedFrame, VideoProblem
from ..media_casa import UNREAD_FORMATS, rgb_image
from .inputs import VideoInput
from .timeline import Timeline


class ImageFolder(VideoInput):
    """The images of a folder in natural order ("frame 9" before "frame 10").

    Args:
        folder: folder with images that Pillow reads; other files are left out. An image that is damaged, or has more
            than 8 bits per channel (depth), is a problem of its own frame.
        rate: images per second; None for `fps`, or 2 without that.
        **selection: arguments of `VideoInput`.

    Raises:
        ValueError: if the folder holds no images, or `rate` isn't positive.
    """

    def __init__(self, folder: str | Path, *, rate: float | None = None, **selection: Any):
        super().__init__(str(folder), **selection)
        self.rate = checked_rate(rate, self.fps)
        endings = _image_endings()
        files = [file for file in Path(folder).iterdir() if file.is_file() and not file.name.startswith(".")]
        self.files = sorted((file for file in files if file.suffix.lower() in endings), key=_natural)
        if not self.files:
            raise ValueError(f"The folder {str(folder)!r} holds no images; give one with JPEG, PNG or WebP files.")
        self.duration = len(self.files) / self.rate

    def _frames(self) -> Iterator[DecodedFrame | VideoProblem]:
        for index, file in enumerate(self.files):
            yield DecodedFrame(index / self.rate, 1 / self.rate, partial(rgb_image, file))


class FrameIterator(VideoInput):
    """Frames that an iterator yields: images, or pairs (timestamp in seconds, image).

    It can be iterated once if the iterator can. The iterator is read ahead, in another thread.

    Times of a live iterator are counted from its first frame, whatever its clock counts from. Where they don't ascend,
    that is reported, and the stream continues.

    Args:
        frames: iterable of images of any form, or of pairs.
        rate: frames per second of images without times; None for `fps`, or 2 without that. In a live iterator such
            images get the time of their arrival.
        clock: function that gives the time of arrival, in seconds.
        name: name in messages.
        **selection: arguments of `VideoInput`.

    Raises:
        ValueError: if `rate` isn't positive; while iterating, if timestamps don't ascend or aren't 0 or more, unless
            the iterator is live.
    """

    def __init__(
        self,
        frames: Iterable[Any],
        *,
        rate: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        name: str = "frames",
        **selection: Any,
    ):
        super().__init__(name, **selection)
        self.rate = checked_rate(rate, self.fps)
        self._items, self._clock = frames, clock

    def _frames(self) -> Iterator[DecodedFrame | VideoProblem]:
        if self.live:
            yield from Timeline(1 / self.rate).follow(self._arriving())
            return
        last = -math.inf
        for index, item in enumerate(self._items):
            duration = None
            if isinstance(item, tuple) and len(item) == 2:
                timestamp, image = item
            else:
                timestamp, image, duration = index / self.rate, item, 1 / self.rate
            seconds = _time(timestamp)
            if not 0 <= seconds < math.inf:
                raise ValueError(
                    f"Frame {index} of {self.name} has the timestamp {shown(timestamp)}, which must be a number of "
                    "seconds, 0 or more. Use live=True to count times from the first frame."
                )
            if seconds <= last:
                raise ValueError(
                    f"Frame {index} of {self.name} has the timestamp {timestamp}, which must be greater than the one "
                    f"before ({last}). Sort the frames, or use live=True."
                )
            last = seconds
            yield DecodedFrame(seconds, duration, partial(_itself, image))

    def _arriving(self) -> Iterator[DecodedFrame | VideoProblem]:
        """Frames of a live iterator, with times from the first one."""
        begin: float | None = None
        for index, item in enumerate(self._items):
            stamped = isinstance(item, tuple) and len(item) == 2
            timestamp, image = item if stamped else (self._clock(), item)
            seconds = _time(timestamp)
            if not math.isfinite(seconds):
                yield VideoProblem(
                    math.nan, f"frame {index} has the timestamp {shown(timestamp)}, which isn't a number of seconds"
                )
                continue
            begin = seconds if begin is None else begin
            yield DecodedFrame(seconds - begin, None, partial(_itself, image))


def _itself(image: Any) -> Any:
    return image


def _image_endings() -> set[str]:
    """Endings of files that Pillow reads by itself: it knows others that it only writes or recognises."""
    from PIL import Image, ImageFile

    formats = Image.registered_extensions()  # loads all of them
    readable = {"MPO"}  # opened as JPEG
    for name, (factory, _) in Image.OPEN.items():
        stub = isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile)
        if not stub and name not in UNREAD_FORMATS:
            readable.add(name)
    return {ending for ending, name in formats.items() if name in readable}


def _natural(file: Path) -> list[tuple[int, int, str]]:
    """Sorts numbers in a name by their value."""
    parts = re.split(r"(\d+)", file.name)
    return [(1, int(part), "") if part.isdigit() else (2, 0, part.lower()) for part in parts]


def _time(given: Any) -> float:
    """A timestamp as a number; NaN for anything else."""
    try:
        return math.nan if isinstance(given, bool | str | bytes) else float(given)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def checked_rate(rate: float | None, fps: float | None) -> float:
    """The images per second that are asked for, or those that `fps` implies.

    Raises:
        ValueError: if `rate` isn't positive.
    """
    rate = rate if rate is not None else fps if fps is not None else DEFAULT_FPS
    if not is_positive(rate):
        raise ValueError(f"rate={rate!r} must be a positive number of images per second.")
    return float(rate)
