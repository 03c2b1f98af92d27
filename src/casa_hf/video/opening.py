# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""`open_video`: a video of any kind, by what it is given as."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from typing import Any

from ..media_casa import shown_url
from .inputs import READ_AHEAD, VideoInput
from .media import MediaInput
from .sequences import FrameIterator, ImageFolder, checked_rate

# Names of FFmpeg's input devices that can stand before a colon.
_DEVICES = ("v4l2", "avfoundation", "dshow", "gdigrab", "x11grab", "lavfi", "decklink", "fbdev")


def open_video(
    video: Any,
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
        video: path of a video file or of a folder of images; URL; camera, as "camera", "camera:1" or "/dev/video0";
            any other device of FFmpeg as "FORMAT:DEVICE", such as "v4l2:/dev/video2", "dshow:video=Webcam" or
            "lavfi:testsrc"; or an iterable of images or of pairs (timestamp, image).
        fps: frames per second: what is on screen at `start`, `start` + 1/fps, ... is taken, of a live video the first
            frame from each of these moments on; None takes every frame.
        start: seconds at which to begin, with the frame that is on screen then. Times stay those of the whole video.
        end: seconds at which to end; frames that appear then or later are left out.
        rate: images per second of a folder, of an iterable without times, or requested from a camera. None for `fps`,
            or 2 without that; a camera then chooses for itself.
        live: whether a frame that isn't taken in time is lost. None: true of cameras, of devices, of URLs of the kind
            of rtsp://, and of what comes over the network in a format without times, as from HTTP cameras: see
            `MediaInput`.
        options: options for FFmpeg, such as {"video_size": "640x480"}.
        read_ahead: largest number of decoded frames that wait.

    Raises:
        ValueError: if the video can't be used, or a number is out of its range.
        ImportError: if it needs PyAV, which isn't installed.
    """
    selection: dict[str, Any] = {"fps": fps, "start": start, "end": end, "read_ahead": read_ahead}
    if isinstance(video, VideoInput):
        raise ValueError(f"The video {video.name!r} is already open; iterate over it, or give its path.")
    is_name = isinstance(video, str | os.PathLike)
    if not is_name and not isinstance(video, Iterable):
        raise ValueError(f"{video!r} isn't a video; expected a path, a URL, a camera, or an iterable of images.")
    name = os.fspath(video) if is_name else "frames"
    if not is_name or os.path.isdir(name):
        if options:
            raise ValueError(f"options={options!r} are for FFmpeg, which doesn't read {name!r}; leave them out.")
        if not is_name:
            return FrameIterator(video, rate=rate, live=bool(live), **selection)
        return ImageFolder(name, rate=rate, live=bool(live), **selection)
    _check_options(options or {})
    device = _device(name)
    if device is not None:
        format, name = device
        asked = {} if rate is None else {"framerate": f"{checked_rate(rate, fps):g}"}
        return MediaInput(name, format=format, options=asked | (options or {}), live=live, **selection)
    if rate is not None:
        raise ValueError(
            f"rate={rate} can't be used with {shown_url(name)!r}, which has times of its own; leave it out. It is for "
            "cameras, folders of images and iterables."
        )
    return MediaInput(name, options=options, live=live, **selection)


def _check_options(options: dict[str, str]) -> None:
    for key, value in options.items():
        if not (isinstance(key, str) and isinstance(value, str)):
            raise ValueError(
                f"options={{{key!r}: {value!r}}} must have strings as keys and values, as FFmpeg reads them."
            )


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
        raise ValueError(f"There is no camera:{index}; the cameras here are: {', '.join(names) or 'none'}.")
    return f"video={names[index]}"
