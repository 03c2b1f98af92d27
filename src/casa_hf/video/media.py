# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Files, URLs and devices that PyAV reads.

Times are seconds from the first frame, exact as the container states them: its integer stamps times its time base,
rounded once to a float. What goes wrong on the way (a packet that can't be decoded, a file whose end is missing) is
reported, and the rest is delivered.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Iterator
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

from ..frames_casa import (
    SILENCE_SECONDS,
    TOLERANCE_SECONDS,
    DecodedFrame,
    VideoProblem,
    decoded,
    ffmpeg_path,
    frame_image,
    frame_period,
    missing_end,
    open_media,
    pixel_aspect,
    pyav,
    reading_errors,
    square_size,
    timed_frames,
)
from ..media_casa import reason_of, shown_url
from .inputs import VideoInput
from .timeline import Timeline

# An HTTP camera that nobody has read for so long, as while a model is loaded, is connected to from scratch: what waits
# is old, and small cameras hang up after a few seconds.
_FRESH_SECONDS = 1.0
# With them, and a format that is known, FFmpeg opens a stream with its first packet, rather than read some seconds of
# it to find out more. (Its flag nobuffer would throw these packets away, and with them a keyframe.)
_OPEN_AT_ONCE = {"probesize": "32", "analyzeduration": "1"}
_CONTAINER_TICKS = 1_000_000  # per second, in which FFmpeg states the duration of a container
# FFmpeg's name of what HTTP cameras send: images without end, as multipart/x-mixed-replace.
_HTTP_CAMERA = "mpjpeg"
# All that FFmpeg says of an address that nothing answers at.
_UNREACHABLE = "Input/output error"
_LIVE_SCHEMES = ("rtsp", "rtsps", "rtmp", "rtmps", "rtp", "udp", "srt", "tcp", "mms")


class MediaInput(VideoInput):
    """A file, a URL or a device that PyAV reads; URLs are streamed, not downloaded first.

    Times are those of the container. What comes live over the network in a format that has none, such as the JPEG
    images of an HTTP camera (`multipart/x-mixed-replace`), gets the times at which its frames come.

    Args:
        url: path, URL or device for FFmpeg to open.
        format: FFmpeg's name of the kind of device, such as v4l2; None for a file or URL.
        options: options for FFmpeg, such as {"video_size": "640x480", "framerate": "30"}; it ignores those that it
            doesn't know.
        live: whether it is live, see `VideoInput`. None for devices, URLs of the kind of rtsp://, and over the
            network of the images of HTTP cameras and of what has neither times nor a length.
        **selection: arguments of `VideoInput`.

    Attributes:
        url: path, URL or device that FFmpeg opens; the path of a file is absolute. `name`, which stands in messages,
            is as it was given, without user, password and query.
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
        if format is None and "://" not in url and not is_file:
            raise ValueError(f"The video {url!r} doesn't exist; give the path of a file, a URL or a camera.")
        self.url = ffmpeg_path(local) if is_file else url
        self.files = [Path(local)] if is_file else []
        self._format = format
        self._options = dict(options or {})
        if scheme.startswith("rtsp"):
            self._options.setdefault("rtsp_transport", "tcp")  # over UDP lost packets are lost frames
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
        self._note_what_is_stated(self._opened)

    def _note_what_is_stated(self, container: Any) -> None:
        stream = container.streams.video[0]
        self._format_found = container.format.name
        self._aspect = pixel_aspect(stream)
        self.size = square_size(stream.codec_context.width, stream.codec_context.height, self._aspect)
        stated_rate = None if self._stamped_on_arrival else stream.average_rate
        self.rate = float(stated_rate) if stated_rate else None
        self._stated = float(stream.duration * stream.time_base) if stream.duration else None
        if self.live:
            return
        self.duration = self._stated
        if self.duration is None and container.duration:
            # Matroska states when it ends, the others how long they are.
            begin = container.start_time or 0 if "matroska" in container.format.name else 0
            self.duration = (container.duration - begin) / _CONTAINER_TICKS
            # Of several streams, the longest one makes the duration of the container.
            self._stated = self.duration if len(container.streams) == 1 else None

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
        """A new container of PyAV for the same input; the caller's to close.

        Raises:
            ValueError: if it can't be opened, or has no video.
        """
        return self._open(self._format, self._options)

    def _open(self, format: str | None, options: dict[str, str]) -> Any:
        # Threads work on slices of a frame, PyAV's default: those that each decode a whole one would hold frames back,
        # and lose good ones beside one that is damaged.
        timeout = SILENCE_SECONDS if "://" in self.url else None
        try:
            pyav()
            return open_media(self.url, format=format, options=options, timeout=timeout)
        except ImportError as error:
            raise ImportError(f"The video {self.name!r} can't be read: {error}") from error
        except reading_errors() as error:
            reason = reason_of(error)
            if "://" in self.url and reason == _UNREACHABLE:
                raise ValueError(
                    f"The video {self.name!r} can't be opened ({reason}): the address can't be reached. Check it and "
                    "the connection."
                ) from error
            raise ValueError(f"The video {self.name!r} can't be used: {reason}.{self._known_devices()}") from error

    def _known_devices(self) -> str:
        """What to add to a message about a device that can't be opened."""
        if self._format is None or self._format == "lavfi":
            return ""
        from av.device import enumerate_input_devices

        try:
            found = [f"{device.name} ({device.description})" for device in enumerate_input_devices(self._format)]
        except (OSError, ValueError):
            return f" This build of FFmpeg doesn't know the device {self._format!r}."
        return f" Devices here: {', '.join(found) or 'none that FFmpeg lists'}."

    def _frames(self) -> Iterator[DecodedFrame | VideoProblem]:
        container, self._opened = self._opened, None
        if self._stamped_on_arrival and self.url.startswith("http"):
            waited = time.monotonic() - self._opened_at > _FRESH_SECONDS
            # To know these formats, FFmpeg has read dozens of frames, which would all get the time of the first one.
            if container is not None and (waited or self._format_found != _HTTP_CAMERA):
                container.close()  # first: many cameras have but one connection
                container = None
            container = container or self._open(self._format_found, _OPEN_AT_ONCE | self._options)
        opened = [container or self.open_container()]
        try:
            yield from self._ascending(self._from_start(opened), opened[0].streams.video[0])
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
        for first in frames:
            yield first
            if not isinstance(first, VideoProblem):
                break
        else:
            return
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
        target = first.pts + int(Fraction(self.start) / Fraction(first.time_base))
        try:
            container.seek(target, stream=container.streams.video[0])
        except reading_errors():
            return False
        return True

    def _ascending(self, frames: Iterable[Any], stream: Any) -> Iterator[DecodedFrame | VideoProblem]:
        """Frames with ascending times from 0, and a problem about an end that is missing."""
        period = frame_period(stream)
        timeline = Timeline(period)
        if self._stamped_on_arrival:
            yield from timeline.follow(self._arriving(frames))
            return
        yield from timeline.follow(timed_frames(frames, stream))
        if timeline.last is not None and self._stated is not None:
            missing = missing_end(self._stated, float(timeline.end), float(period))
            if missing:
                yield VideoProblem(float(timeline.last), missing)

    def _arriving(self, frames: Iterable[Any]) -> Iterator[DecodedFrame | VideoProblem]:
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
            yield DecodedFrame(now - begin, None, partial(frame_image, frame, self._aspect))


def _has_no_times(container: Any) -> bool:
    """Whether the format carries no times, so that FFmpeg makes up those of 25 frames per second."""
    from av.format import Flags

    return bool(container.format.flags & Flags.no_timestamps.value)


def _seconds(frame: Any, first_pts: int) -> float:
    return float((frame.pts - first_pts) * Fraction(frame.time_base))
