# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Videos as lists of still frames.

CASA knows no videos, only images in sequence: a clip is sampled, and each frame stands in the prompt as an image of
its own. A file is read twice: first its packets, for the time of every frame, which costs little and trusts no header;
then the frames, of which only the chosen ones are kept.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Sequence
from io import BytesIO
from typing import Any
from urllib.request import urlopen

DEFAULT_FPS = 2.0
SHORT_CLIP_SECONDS = 10.0
SHORT_CLIP_FRAMES = 20
# Containers round times to their time base; a frame that starts this much late still counts as on time.
_TOLERANCE_SECONDS = 1e-3
_TIMEOUT_SECONDS = 60


def check_sampling(fps: float | None, num_frames: int | None, sample: bool = True) -> None:
    """Check the sampling options of a video, which `load_frames` describes.

    Raises:
        ValueError: if options exclude each other, or `fps` or `num_frames` isn't a positive number.
    """
    given = {name: value for name, value in (("fps", fps), ("num_frames", num_frames)) if value is not None}
    for name, value in given.items():
        if not isinstance(value, int if name == "num_frames" else (int, float)) or value <= 0:
            raise ValueError(f"{name}={value!r} must be a positive {'integer' if name == 'num_frames' else 'number'}.")
    if len(given) > 1:
        raise ValueError(f"fps={fps} and num_frames={num_frames} exclude each other; give one of them.")
    if given and not sample:
        raise ValueError(f"do_sample_frames=False takes every frame of a video; leave out {next(iter(given))}.")


def load_frames(
    video: Any, *, fps: float | None = None, num_frames: int | None = None, sample: bool = True
) -> list[Any]:
    """The frames of a video that go into the prompt.

    Args:
        video: path or URL of a video file, or its contents as bytes; or the decoded frames, as an array or tensor
            (frames, height, width, channels) or (frames, channels, height, width), or as a list of PIL images, of
            arrays or of image files.
        fps: frames per second of the clip; only for files, since decoded frames don't tell their rate.
        num_frames: frames in all, at even spacing.
        sample: False takes every frame; then the others must be None.

    Without `fps` and `num_frames`, a file of 10 seconds or more gives 2 frames per second, a shorter one 20 frames at
    even spacing (all of them if it has fewer), as in training; of decoded frames all are taken.

    Returns:
        The frames in order of time: PIL images for files, the elements of `video` otherwise.

    Raises:
        ValueError: if the file can't be read, there are fewer than `num_frames` frames, `fps` is given for decoded
            frames, or options exclude each other.
        ImportError: for files, without PyAV.
    """
    check_sampling(fps, num_frames, sample)
    if isinstance(video, (str, os.PathLike, bytes)):
        return _read_file(_file(video), fps, num_frames, sample)
    return _choose(list(video), fps, num_frames)


def measure_frames(
    video: Any, *, fps: float | None = None, num_frames: int | None = None, sample: bool = True
) -> list[Any]:
    """What `load_frames` would give, without decoding anything.

    Args:
        video, fps, num_frames, sample: as for `load_frames`.

    Returns:
        For files, the (width, height) in pixels of each frame, as the container states it and not yet turned upright;
        the elements of `video` otherwise. Damaged pictures count like others.

    Raises:
        ValueError, ImportError: as `load_frames`, but for frames that can't be decoded.
    """
    check_sampling(fps, num_frames, sample)
    if isinstance(video, (str, os.PathLike, bytes)):
        _, chosen, size = _scan_file(_file(video), fps, num_frames, sample)
        if 0 in size:  # a container that doesn't state it
            return _read_file(_file(video), fps, num_frames, sample)
        return [size] * len(chosen)
    return _choose(list(video), fps, num_frames)


def _choose(frames: list[Any], fps: float | None, num_frames: int | None) -> list[Any]:
    """Decoded frames that go into the prompt."""
    if fps is not None:
        raise ValueError(
            f"fps={fps} can't be applied to a video of {len(frames)} decoded frames, whose rate isn't known. Give "
            "num_frames, or the path of the file."
        )
    if num_frames is None:
        return frames
    return [frames[index] for index in _evenly_spaced(len(frames), num_frames)]


def sample_indices(
    times: list[float], duration: float, *, fps: float | None = None, num_frames: int | None = None
) -> list[int]:
    """Which frames of a clip to take.

    Args:
        times: when each frame appears, in seconds from the first one, ascending.
        duration: of the clip, in seconds.
        fps: frames per second: what is on screen at 0, 1/fps, 2/fps, ... is taken.
        num_frames: frames in all, at even spacing.

    Returns:
        Ascending indices into `times`, none of them twice.

    Raises:
        ValueError: if `num_frames` is more than there are.
    """
    if fps is None and num_frames is None and duration < SHORT_CLIP_SECONDS:
        num_frames = min(SHORT_CLIP_FRAMES, len(times))
    if num_frames is not None:
        return _evenly_spaced(len(times), num_frames)
    fps = DEFAULT_FPS if fps is None else fps
    moments = [step / fps for step in range(max(1, int((duration + _TOLERANCE_SECONDS) * fps)))]
    return sorted({bisect_right(times, moment + _TOLERANCE_SECONDS) - 1 for moment in moments})


def _evenly_spaced(available: int, num_frames: int) -> list[int]:
    if num_frames > available:
        raise ValueError(f"num_frames={num_frames} is more than the {available} frames that the video has")
    return [index * available // num_frames for index in range(num_frames)]


def _file(video: str | os.PathLike | bytes) -> str | bytes:
    return video if isinstance(video, bytes) else str(video)


def _name(source: str | bytes) -> str:
    return f"of {len(source)} bytes" if isinstance(source, bytes) else repr(source)


def _pyav(source: str | bytes) -> Any:
    # Code that a checkpoint carries is refused by Transformers for imports outside `try` that aren't installed.
    try:
        import av
    except ImportError as error:
        raise ImportError(f"Reading the video {_name(source)} needs PyAV: pip install casa_hf[video]") from error
    return av


def _read_file(source: str | bytes, fps: float | None, num_frames: int | None, sample: bool) -> list[Any]:
    media, chosen, _ = _scan_file(source, fps, num_frames, sample)
    av = _pyav(source)
    try:
        if isinstance(media, BytesIO):
            media.seek(0)
        with av.open(media) as container:
            return _decode(container, chosen)
    except (OSError, ValueError, av.error.FFmpegError) as error:
        raise ValueError(f"The video {_name(source)} can't be used: {error}.") from error


def _scan_file(
    source: str | bytes, fps: float | None, num_frames: int | None, sample: bool
) -> tuple[str | BytesIO, Sequence[int], tuple[int, int]]:
    """A file or its contents, which of its frames to take, and their width and height; from its packets alone."""
    av = _pyav(source)
    is_url = isinstance(source, str) and source.startswith(("http://", "https://"))
    if isinstance(source, str) and not is_url and not os.path.isfile(source):
        raise ValueError(f"The video {source!r} doesn't exist; give the path of a file or a URL.")
    try:
        # What stands before a colon in a relative name, such as that of a time, FFmpeg would take for a protocol.
        contents = _download(str(source)) if is_url else source
        media = BytesIO(contents) if isinstance(contents, bytes) else os.path.abspath(contents)
        with av.open(media) as container:
            times, duration = _frame_times(container)
            codec = container.streams.video[0].codec_context
            size = codec.width, codec.height
        chosen = range(len(times)) if not sample else sample_indices(times, duration, fps=fps, num_frames=num_frames)
        return media, chosen, size
    except (OSError, ValueError, av.error.FFmpegError) as error:
        reason = getattr(error, "strerror", None) or error  # without the name that those of FFmpeg end with
        raise ValueError(f"The video {_name(source)} can't be used: {reason}.") from error


def _download(url: str) -> bytes:
    with urlopen(url, timeout=_TIMEOUT_SECONDS) as response:
        return response.read()


def _frame_times(container: Any) -> tuple[list[float], float]:
    """When each frame of the first video stream appears, and how long the clip is, in seconds."""
    if not container.streams.video:
        raise ValueError("it has no video stream")
    stream = container.streams.video[0]
    packets = [packet for packet in container.demux(stream) if packet.size and not packet.is_discard]
    if not packets:
        raise ValueError("it has no frames")
    stamps = sorted(packet.pts for packet in packets if packet.pts is not None)
    if len(stamps) < len(packets):  # raw streams carry no times
        period = 1 / stream.average_rate
        return [float(index * period) for index in range(len(packets))], float(len(packets) * period)
    times = [float((stamp - stamps[0]) * stream.time_base) for stamp in stamps]
    last = max(packets, key=lambda packet: packet.pts)
    return times, times[-1] + float(last.duration * stream.time_base)


def _decode(container: Any, indices: Sequence[int]) -> list[Any]:
    """The frames with these ascending indices, as PIL images, turned as the camera says."""
    container.streams.video[0].thread_type = "AUTO"
    wanted, last = set(indices), indices[-1]
    frames = []
    for index, frame in enumerate(container.decode(video=0)):
        if index in wanted:
            frames.append(frame.to_image().rotate(frame.rotation, expand=True))
        if index == last:
            break
    if not frames:
        raise ValueError("none of its frames can be decoded")
    return frames
