# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Frames with their times, from files, URLs, cameras, folders of images, or whatever yields images.

Times are seconds from the first frame, exact as the container states them: its integer stamps times its time base,
rounded once to a float. What goes wrong on the way (a packet that can't be decoded, a file whose end is missing) is
reported, and what can be had is delivered.
"""

from __future__ import annotations

import math
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple, Self

from ..checks import is_number, is_positive, shown
from ..media_casa import (
    DEFAULT_FPS,
    UNREAD_FORMATS,
    VideoProblem,
    VideoWarning,
    decoded,
    frame_image,
    missing_end,
    pixel_aspect,
    reason_of,
    rgb_image,
    shown_url,
    square_size,
    video_stream,
)
from .read_ahead import ReadAhead

# Containers round times to their time base; a frame that starts this much late still counts as on time.
TOLERANCE_SECONDS = 1e-3
# How many decoded frames wait for the consumer.
READ_AHEAD = 8
# Times that jump back by more than this begin anew; frames that come back by less are duplicates or out of order.
_RESTART_SECONDS = 1.0
# A network that is silent for so long has ended.
_SILENCE_SECONDS = 10.0
# An HTTP camera that nobody has read for so long, as while a model is loaded, is connected to anew: what waits is old,
# and small cameras hang up after a few seconds.
_FRESH_SECONDS = 1.0
# With them, and a format that is known, FFmpeg opens a stream with its first packet, rather than read some seconds of
# it to find out more. (Its flag nobuffer would throw these packets away, and with them a keyframe.)
_OPEN_AT_ONCE = {"probesize": "32", "analyzeduration": "1"}
_CONTAINER_TICKS = 1_000_000  # per second, in which FFmpeg states the duration of a container
_RAW_STREAM_FPS = 25

# Names of FFmpeg's input devices that can stand before a colon in a source.
_DEVICES = ("v4l2", "avfoundation", "dshow", "gdigrab", "x11grab", "lavfi", "decklink", "fbdev")
# FFmpeg's name of what HTTP cameras send: pictures without end, as multipart/x-mixed-replace.
_HTTP_CAMERA = "mpjpeg"
_LIVE_SCHEMES = ("rtsp", "rtsps", "rtmp", "rtmps", "rtp", "udp", "srt", "tcp", "mms")


class Frame(NamedTuple):
    """A picture of a video.

    Attributes:
        timestamp: when it appears, in seconds.
        image: a PIL image, upright; from an iterator, whatever that yields.
    """

    timestamp: float
    image: Any


class _Shown(NamedTuple):
    """A frame that is decoded, but not yet a picture."""

    timestamp: Fraction | float
    duration: Fraction | float | None
    image: Callable[[], Any]


class VideoInput:
    """Frames of one video. Iterating decodes ahead in a thread that ends with the iteration.

    A problem that doesn't end the video is a `VideoWarning`; `read` hands it over as an item instead.

    Args:
        name: for messages.
        fps: what is on screen at `start`, `start` + 1/fps, `start` + 2/fps, ... is taken, none of it twice; of a live
            video what comes first from then on, as soon as it comes. None takes every frame.
        start: seconds; the first frame is the one that is on screen then.
        end: seconds; frames that appear then or later are left out.
        live: whether frames come when they come, so that one that isn't taken in time is lost.
        read_ahead: decoded frames that wait at most.

    Attributes:
        duration: of the video, in seconds, before `start` and `end` are applied; None if not known.
        files: that are read; none of a device, a network or an iterator.

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
            raise ValueError(f"end={end!r} must be a number of seconds above start={start}.")
        if not (is_number(read_ahead, Integral) and read_ahead >= 1):
            raise ValueError(f"read_ahead={read_ahead!r} must be a number of frames, at least 1.")
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
                f"start={self.start:g}: {self.name} is live and has no past to start in; leave out start."
            )
        self.live = True

    def read(self) -> Iterator[Frame | VideoProblem]:
        """Frames and problems in order, decoded in the calling thread.

        Raises:
            ValueError: if there are no frames at all, or none in the range.
        """
        num_frames = 0
        for item in self._picked():
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
        """Let go of what was opened and not read."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _frames(self) -> Iterator[_Shown | VideoProblem]:
        """All frames from `start` or earlier, ascending in time."""
        raise NotImplementedError

    def _picked(self) -> Iterator[_Shown | VideoProblem]:
        """The frames that `fps`, `start` and `end` choose.

        Which frame is on screen at a moment is known when the next one appears.
        """
        if self.live:
            yield from self._picked_live()
            return
        held: _Shown | None = None
        step = 0

        def moment() -> float:
            assert self.fps is not None
            return self.start + step / self.fps + TOLERANCE_SECONDS

        def wanted(until: float) -> bool:
            """Whether the held frame, on screen until then, is taken; moves on to the next moment if so."""
            nonlocal step
            if self.fps is None:
                return until > self.start + TOLERANCE_SECONDS
            if until <= moment():
                return False
            # The first guess avoids counting through a long pause step by step.
            step = max(step, int((until - TOLERANCE_SECONDS - self.start) * self.fps) - 1)
            while moment() < until:
                step += 1
            return True

        for item in self._frames():
            if isinstance(item, VideoProblem):
                yield item
                continue
            if self.end is not None and item.timestamp >= self.end:
                if held is not None and wanted(self.end):
                    yield held
                return
            if held is not None and wanted(float(item.timestamp)):
                yield held
            held = item
            if self.fps is None and held.timestamp >= self.start:
                yield held
                held = None
                continue
        if held is not None:
            # The last frame is on screen at least at the moment of its appearance.
            shown = max(held.duration or 0.0, 2 * TOLERANCE_SECONDS)
            if wanted(float(held.timestamp + shown)):
                yield held

    def _picked_live(self) -> Iterator[_Shown | VideoProblem]:
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
            # On average one per period, also where the camera's own is no part of it; after a gap without haste.
            due = max(due + period, item.timestamp + (period if due == -math.inf else period / 2))
            yield item


class _Timeline:
    """Lets the times of frames ascend.

    Times that jump back run on from where they were: if they jump by a second or more, or if a second frame ascends
    from there. A frame that comes back alone is a duplicate, or out of order, and left out.

    Args:
        period: seconds between frames, where the times don't say.

    Attributes:
        last: the time of the last frame that was taken; None before the first.
        end: when that one ends.
    """

    def __init__(self, period: Fraction | float):
        self._period = period
        self._offset: Fraction | float = 0
        self.last: Fraction | float | None = None
        self.end: Fraction | float = 0

    def follow(self, items: Iterable[_Shown | VideoProblem]) -> Iterator[_Shown | VideoProblem]:
        """Frames and problems with ascending times; every change and every run of frames left out is a problem."""
        doubtful: _Shown | None = None
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

    def _taken(self, item: _Shown) -> _Shown:
        self.last = item.timestamp + self._offset
        self.end = self.last + (item.duration or self._period)
        return _Shown(float(self.last), None if item.duration is None else float(item.duration), item.image)

    def _run_on(self, item: _Shown) -> VideoProblem:
        assert self.last is not None
        jump = self.last - item.timestamp - self._offset
        self._offset += jump + self._period
        return VideoProblem(float(self.last), f"times jump back by {float(jump):.3f} s; they run on instead")

    def _skipped(self, number: int) -> VideoProblem:
        assert self.last is not None
        frames = "1 frame whose time isn't" if number == 1 else f"{number} frames whose times aren't"
        return VideoProblem(float(self.last), f"{frames} after that of the one before; left out")


class MediaInput(VideoInput):
    """A file, a URL or a device that PyAV reads; URLs are streamed, not downloaded first.

    Times are those of the container. What comes live over the network in a format that has none, such as the JPEG
    pictures of an HTTP camera (`multipart/x-mixed-replace`), gets the times at which its frames come.

    Args:
        url: what FFmpeg is to open.
        format: of a device, as FFmpeg calls it, such as v4l2; None finds it out.
        options: for FFmpeg, such as {"video_size": "640x480", "framerate": "30"}; it ignores those that it doesn't
            know.
        live: see `VideoInput`. None: true of devices, of URLs of the kind of rtsp://, and over the network of the
            pictures of HTTP cameras and of what has neither times nor a length.
        **selection: for `VideoInput`.

    Attributes:
        url: what FFmpeg opens: of a file, its absolute path. `name`, which messages have, is as it was given, without
            user, password and query.
        size: width and height of a frame in square pixels, before any turning.
        rate: frames per second on average, as stated; None if not known.

    Raises:
        ValueError: if it can't be opened, has no video, or is live and has a `start`.
        ImportError: without PyAV.
    """

    def __init__(
        self,
        url: str,
        *,
        format: str | None = None,
        options: dict[str, str] | None = None,
        live: bool | None = None,
        **selection: Any,
    ):
        local = url if os.path.isfile(url) else url.removeprefix("file:")
        is_file = format is None and os.path.isfile(local)
        scheme = "" if is_file else url.partition("://")[0]
        known_live = format is not None or scheme in _LIVE_SCHEMES
        name = shown_url(url) if format is None else f"{format}:{url}"
        super().__init__(name, live=known_live if live is None else live, **selection)
        # What stands before a colon in a relative name, such as that of a time, FFmpeg would take for a protocol.
        self.url = os.path.abspath(local) if is_file else url
        self.files = [Path(local)] if is_file else []
        self._format = format
        self._options = dict(options or {})
        if scheme.startswith("rtsp"):
            self._options.setdefault("rtsp_transport", "tcp")  # over UDP lost packets are lost pictures
        if format is None and "://" not in url and not is_file:
            raise ValueError(f"The video {url!r} doesn't exist; give the path of a file, a URL or a camera.")
        self._opened_at = time.monotonic()
        self._opened = self.open_container()
        untimed = format is None and not is_file and _has_no_times(self._opened)
        if live is None and untimed and (self._opened.format.name == _HTTP_CAMERA or self._opened.size < 0):
            try:
                self._go_live()
            except ValueError:
                self.close()
                raise
        self._stamped_on_arrival = untimed and self.live
        self._untimed_format = self._opened.format.name
        stream = self._opened.streams.video[0]
        self._aspect = pixel_aspect(stream)
        self.size = square_size(stream.codec_context.width, stream.codec_context.height, self._aspect)
        stated_rate = None if self._stamped_on_arrival else stream.average_rate
        self.rate = float(stated_rate) if stated_rate else None
        # Of several streams, the longest one makes the duration of the container.
        self._stated = float(stream.duration * stream.time_base) if stream.duration else None
        if not self.live:
            self.duration = self._stated
            if self.duration is None and self._opened.duration:
                # Matroska states when it ends, the others how long they are.
                begin = self._opened.start_time or 0 if "matroska" in self._opened.format.name else 0
                self.duration = (self._opened.duration - begin) / _CONTAINER_TICKS
                self._stated = self.duration if len(self._opened.streams) == 1 else None

    def every_frame(self) -> MediaInput:
        """The same video in the same range, opened once more, with every frame of it."""
        return MediaInput(
            self.url, format=self._format, options=self._options, start=self.start, end=self.end, live=self.live
        )

    def close(self) -> None:
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    def open_container(self) -> Any:
        """A container of PyAV, opened as this source is; the caller's to close.

        Raises:
            ValueError: if it can't be opened, or has no video.
        """
        return self._open(self._format, self._options)

    def _open(self, format: str | None, options: dict[str, str]) -> Any:
        try:
            import av
        except ImportError as error:
            raise ImportError(f"Reading the video {self.name!r} needs PyAV: pip install casa_hf[video]") from error
        timeout = _SILENCE_SECONDS if "://" in self.url else None
        try:
            container = av.open(self.url, format=format, options=options, timeout=timeout)
        except (OSError, ValueError, av.error.FFmpegError) as error:
            reason = reason_of(error)
            raise ValueError(f"The video {self.name!r} can't be used: {reason}.{self._way_out()}") from error
        try:
            video_stream(container)
        except ValueError as error:
            container.close()
            raise ValueError(f"The video {self.name!r} can't be used: {error}.") from error
        # Threads work on slices of a frame, PyAV's default: those that each decode a whole one would hold frames back,
        # and lose good ones beside one that is damaged.
        return container

    def _way_out(self) -> str:
        if self._format is None or self._format == "lavfi":
            return ""
        from av.device import enumerate_input_devices

        try:
            found = [f"{device.name} ({device.description})" for device in enumerate_input_devices(self._format)]
        except (OSError, ValueError):
            return f" This build of FFmpeg doesn't know the device {self._format!r}."
        return f" Devices here: {', '.join(found) or 'none that FFmpeg lists'}."

    def _frames(self) -> Iterator[_Shown | VideoProblem]:
        container, self._opened = self._opened, None
        if self._stamped_on_arrival and self.url.startswith("http"):
            waited = time.monotonic() - self._opened_at > _FRESH_SECONDS
            # To know these formats, FFmpeg has read dozens of frames, which would all get the time of the first one.
            if container is not None and (waited or self._untimed_format != _HTTP_CAMERA):
                container.close()  # first: many cameras have but one connection
                container = None
            container = container or self._open(self._untimed_format, _OPEN_AT_ONCE | self._options)
        opened = [container or self.open_container()]
        try:
            yield from self._timed(self._from_start(opened))
        finally:
            for each in opened:
                each.close()

    def _from_start(self, opened: list[Any]) -> Iterator[Any]:
        """Decoded frames from the first one on, or from one that isn't after `start`, behind the first one.

        The first frame says what time 0 is. Whether seeking has led to the right place is seen by its result; where
        it has not, everything is decoded.
        """
        frames = decoded(opened[0])
        if not self.start:
            yield from frames
            return
        before = []
        for first in frames:
            before.append(first)
            if not isinstance(first, VideoProblem):
                break
        else:
            yield from before
            return
        yield from before
        if first.pts is not None and self._seek(opened[0], first):
            sought = decoded(opened[0])
            landed = next((frame for frame in sought if not isinstance(frame, VideoProblem)), None)
            tolerance = self.start + TOLERANCE_SECONDS
            if landed is not None and landed.pts is not None and _seconds(landed, first.pts) <= tolerance:
                if landed.pts > first.pts:
                    yield landed
                yield from sought
                return
        opened.append(self.open_container())
        again = decoded(opened[-1])
        for frame in again:
            if not isinstance(frame, VideoProblem):
                break
        yield from again

    def _seek(self, container: Any, first: Any) -> bool:
        import av

        target = first.pts + int(Fraction(self.start) / Fraction(first.time_base))
        try:
            container.seek(target, stream=container.streams.video[0])
        except (OSError, av.error.FFmpegError):
            return False
        return True

    def _timed(self, frames: Iterable[Any]) -> Iterator[_Shown | VideoProblem]:
        """Frames with ascending times from 0, and a word about an end that is missing."""
        period = Fraction(1) / Fraction(self.rate or _RAW_STREAM_FPS).limit_denominator(1001000)
        timeline = _Timeline(period)
        if self._stamped_on_arrival:
            yield from timeline.follow(self._arriving(frames))
            return
        yield from timeline.follow(self._counted(frames, period))
        if timeline.last is not None and self._stated is not None:
            missing = missing_end(self._stated, float(timeline.end), float(period))
            if missing:
                yield VideoProblem(float(timeline.last), missing)

    def _counted(self, frames: Iterable[Any], period: Fraction) -> Iterator[_Shown | VideoProblem]:
        """Frames with the times of the container, counted from the first one."""
        origin: Fraction | None = None
        count = 0
        for frame in frames:
            if isinstance(frame, VideoProblem):
                yield frame if origin is None else VideoProblem(frame.timestamp - float(origin), frame.message)
                continue
            stamp = count * period if frame.pts is None else frame.pts * Fraction(frame.time_base)
            count += 1
            origin = stamp if origin is None else origin
            length = frame.duration * Fraction(frame.time_base) if frame.duration else period
            yield _Shown(stamp - origin, length, partial(frame_image, frame, self._aspect))

    def _arriving(self, frames: Iterable[Any]) -> Iterator[_Shown | VideoProblem]:
        """Frames with the times at which they come, counted from the first one.

        FFmpeg's own clock (use_wallclock_as_timestamps) is too coarse: ticks of 1/25 s, as a format without times has.
        """
        begin: float | None = None
        for frame in frames:
            if isinstance(frame, VideoProblem):
                yield VideoProblem(math.nan, frame.message)
                continue
            now = time.monotonic()
            begin = now if begin is None else begin
            yield _Shown(now - begin, None, partial(frame_image, frame, self._aspect))


class ImageFolder(VideoInput):
    """The images of a folder in natural order ("frame 9" before "frame 10").

    Args:
        folder: holds images that Pillow reads; other files are left out. One that is damaged, or has more than 8 bits
            per channel (depth), is a problem of its own frame.
        rate: images per second; `fps`, or 2, unless given.
        **selection: for `VideoInput`.

    Raises:
        ValueError: if the folder holds no images, or `rate` isn't positive.
    """

    def __init__(self, folder: str | Path, *, rate: float | None = None, **selection: Any):
        super().__init__(str(folder), **selection)
        self.rate = _rate(rate, self.fps)
        endings = _image_endings()
        files = [file for file in Path(folder).iterdir() if file.is_file() and not file.name.startswith(".")]
        self.files = sorted((file for file in files if file.suffix.lower() in endings), key=_natural)
        if not self.files:
            raise ValueError(f"The folder {str(folder)!r} holds no images; give one with JPEG, PNG or WebP files.")
        self.duration = len(self.files) / self.rate

    def _frames(self) -> Iterator[_Shown | VideoProblem]:
        for index, file in enumerate(self.files):
            yield _Shown(index / self.rate, 1 / self.rate, partial(rgb_image, file))


class FrameIterator(VideoInput):
    """Frames that an iterator yields: images, or pairs (timestamp in seconds, image).

    It can be iterated once if the iterator can. The iterator is asked from another thread, ahead of time.

    Times of a live iterator are counted from its first frame, whatever its clock counts from. Where they don't ascend,
    that is reported, and the stream goes on.

    Args:
        frames: yields images of any kind that the image processor takes.
        rate: of images without times, in frames per second; `fps`, or 2, unless given. Of a live iterator they get the
            time of their arrival.
        clock: seconds, for these times.
        **selection: for `VideoInput`.

    Raises:
        ValueError: if `rate` isn't positive; while iterating, if timestamps of one that isn't live don't ascend, or
            aren't 0 or more.
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
        self.rate = _rate(rate, self.fps)
        self._source, self._clock = frames, clock

    def _frames(self) -> Iterator[_Shown | VideoProblem]:
        if self.live:
            yield from _Timeline(1 / self.rate).follow(self._arriving())
            return
        last = -math.inf
        for index, item in enumerate(self._source):
            duration = None
            if isinstance(item, tuple) and len(item) == 2:
                timestamp, image = item
            else:
                timestamp, image, duration = index / self.rate, item, 1 / self.rate
            seconds = _time(timestamp)
            if not 0 <= seconds < math.inf:
                raise ValueError(
                    f"Frame {index} of {self.name} is at {shown(timestamp)}, which must be a number of seconds, 0 or "
                    "more; with live=True times are counted from the first frame."
                )
            if seconds <= last:
                raise ValueError(f"Frame {index} of {self.name} is at {timestamp} s, which isn't after {last} s.")
            last = seconds
            yield _Shown(seconds, duration, partial(_given, image))

    def _arriving(self) -> Iterator[_Shown | VideoProblem]:
        """Frames of a live iterator, with times from the first one."""
        begin: float | None = None
        for index, item in enumerate(self._source):
            stamped = isinstance(item, tuple) and len(item) == 2
            timestamp, image = item if stamped else (self._clock(), item)
            seconds = _time(timestamp)
            if not math.isfinite(seconds):
                yield VideoProblem(math.nan, f"frame {index} is at {shown(timestamp)}, which is no time")
                continue
            begin = seconds if begin is None else begin
            yield _Shown(seconds - begin, None, partial(_given, image))


def open_video(
    source: Any,
    *,
    fps: float | None = None,
    start: float = 0.0,
    end: float | None = None,
    rate: float | None = None,
    live: bool | None = None,
    options: dict[str, str] | None = None,
    read_ahead: int = READ_AHEAD,
) -> VideoInput:
    """A video of any kind.

    Args:
        source: path of a video file or of a folder of images; URL; a camera, as "camera", "camera:1" or "/dev/video0";
            any other device of FFmpeg as "FORMAT:DEVICE", such as "v4l2:/dev/video2", "dshow:video=Webcam" or
            "lavfi:testsrc"; or an iterable of images or of pairs (timestamp, image).
        fps: what is on screen at `start`, `start` + 1/fps, ... is taken, of a live video what comes first from then
            on; None takes every frame.
        start: seconds; the first frame is the one that is on screen then. Times stay those of the whole video.
        end: seconds; frames that appear then or later are left out.
        rate: images per second of a folder, or of an iterable without times; asked of a camera. Default: of folders
            and iterables `fps`, or 2.
        live: whether a frame that isn't taken in time is lost. Default: true of cameras, of devices, of URLs of the
            kind of rtsp://, and of what comes over the network in a format without times, as from HTTP cameras: see
            `MediaInput`.
        options: for FFmpeg, such as {"video_size": "640x480"}.
        read_ahead: decoded frames that wait at most.

    Raises:
        ValueError: if the source can't be used, or a number is out of its range.
        ImportError: if it needs PyAV, which isn't installed.
    """
    selection: dict[str, Any] = {"fps": fps, "start": start, "end": end, "read_ahead": read_ahead}
    if isinstance(source, VideoInput):
        raise ValueError(f"{source.name!r} is an open video already; give its path or iterate it.")
    is_name = isinstance(source, str | os.PathLike)
    if not is_name and not isinstance(source, Iterable):
        raise ValueError(f"{source!r} is no video; give a path, a URL, a camera, or an iterable of images.")
    name = os.fspath(source) if is_name else "frames"
    if not is_name or os.path.isdir(name):
        if options:
            raise ValueError(f"options={options!r} are for FFmpeg, which doesn't read {name!r}; leave options out.")
        if not is_name:
            return FrameIterator(source, rate=rate, live=bool(live), **selection)
        return ImageFolder(name, rate=rate, live=bool(live), **selection)
    _check_options(options or {})
    device = _device(name)
    if device is not None:
        format, name = device
        asked = {} if rate is None else {"framerate": f"{_rate(rate, fps):g}"}
        return MediaInput(name, format=format, options=asked | (options or {}), live=live, **selection)
    if rate is not None:
        raise ValueError(
            f"rate={rate} is asked of devices and of folders of images; {shown_url(name)!r} is neither: leave it out."
        )
    return MediaInput(name, options=options, live=live, **selection)


def _check_options(options: dict[str, str]) -> None:
    for key, value in options.items():
        if not (isinstance(key, str) and isinstance(value, str)):
            raise ValueError(f"options={{{key!r}: {value!r}}}: keys and values must be texts, as FFmpeg reads them.")


def _device(name: str) -> tuple[str, str] | None:
    """FFmpeg's format and name of a camera or device; None for anything else."""
    kind, _, rest = name.partition(":")
    if kind in _DEVICES and rest:
        return kind, rest
    if re.fullmatch(r"/dev/video\d+", name):
        return "v4l2", name
    numbered = re.fullmatch(r"camera(?::(\d+))?", name)
    if numbered is None:
        return None
    index = int(numbered[1] or 0)
    if sys.platform == "darwin":
        return "avfoundation", str(index)
    if sys.platform == "win32":
        return "dshow", _windows_camera(index)
    return "v4l2", f"/dev/video{index}"


def _windows_camera(index: int) -> str:
    # DirectShow knows its cameras by name only.
    from av.device import enumerate_input_devices

    names = [device.description for device in enumerate_input_devices("dshow") if "video" in device.media_types]
    if index >= len(names):
        raise ValueError(f"There is no camera:{index}; cameras here: {', '.join(names) or 'none'}.")
    return f"video={names[index]}"


def _has_no_times(container: Any) -> bool:
    """Whether the format carries no times, so that FFmpeg makes up those of 25 frames per second."""
    from av.format import Flags

    return bool(container.format.flags & Flags.no_timestamps.value)


def _seconds(frame: Any, first_pts: int) -> float:
    return float((frame.pts - first_pts) * Fraction(frame.time_base))


def _given(image: Any) -> Any:
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
    """A timestamp as a number; NaN for what is none."""
    try:
        return math.nan if isinstance(given, bool | str | bytes) else float(given)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _rate(rate: float | None, fps: float | None) -> float:
    rate = rate if rate is not None else fps if fps is not None else DEFAULT_FPS
    if not is_positive(rate):
        raise ValueError(f"rate={rate!r} must be a positive number of images per second.")
    return float(rate)
