# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Frames of a video: which go into a prompt, when each appears, and the image that it shows.

CASA knows no videos, only images in sequence: a video is sampled, and each frame stands in the prompt as an image of
its own. A file is read twice: first its packets, for the time of every frame, which costs little and trusts no header;
then the frames, of which only the chosen ones are kept. Frames have square pixels and are upright.

`transformers.video_utils` can't serve: its reader takes the number of frames from the header (Matroska and WebM state
none, and nothing is read), fetches URLs without limits, shows frames as they are stored rather than upright with
square pixels, and ends at the first packet that is damaged.
"""

from __future__ import annotations

import math
import os
import struct
import time
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from io import BytesIO
from itertools import chain
from typing import Any, NamedTuple

from PIL import Image

from .checks import check_count, check_positive, is_number, shown
from .media_casa import DEFAULT_POLICY, MediaPolicy, contents_of, elements_of, name_of, on_white, reason_of
from .timestamps_casa import ASSUMED_FPS

DEFAULT_FPS = 2.0
SHORT_VIDEO_SECONDS = 10.0
SHORT_VIDEO_FRAMES = 20
# Containers round times to their time base; a frame that starts this much late still counts as on time.
TOLERANCE_SECONDS = 1e-3
# A device or network that is silent for so long has ended.
SILENCE_SECONDS = 10.0
RAW_STREAM_FPS = 25  # which FFmpeg assumes where none is stated
_BUSY_SECONDS = 0.005
# How much of the end may be missing before that is reported; headers aren't exact.
_MISSING_SECONDS = 0.5

# FFmpeg would follow the names in a playlist, to files and over the network.
_CONTENTS_ONLY = {"protocol_whitelist": "none"}
_LOCAL_FILES_ONLY = {"protocol_whitelist": "file,crypto,data"}


class VideoWarning(UserWarning):
    """A part of a video could not be used."""


@dataclass(frozen=True)
class VideoProblem:
    """Something in a video that could not be used.

    Attributes:
        timestamp: position in the video, in seconds; after the last frame where nothing more is known.
        message: description of the problem and its reason.
    """

    timestamp: float
    message: str


class DecodedFrame(NamedTuple):
    """A frame that is decoded, but not yet an image.

    Attributes:
        timestamp: seconds at which it appears.
        duration: seconds for which it is stated to last; None if nothing states it.
        image: function that gives its image.
    """

    timestamp: Fraction | float
    duration: Fraction | float | None
    image: Callable[[], Any]

    def lasts_beyond(self, moment: float) -> bool:
        """Whether it is on screen at a moment, as the last frame of a video."""
        shown = max(self.duration or 0.0, 2 * TOLERANCE_SECONDS)
        return self.timestamp + shown > moment + TOLERANCE_SECONDS


class Frames(NamedTuple):
    """The frames of a video that go into the prompt, in order of time.

    Attributes:
        images: image of each; where nothing was decoded, its (width, height).
        times: seconds at which each appears, from the first frame of the video on.
        timed: whether they are known; else the frames are taken for `ASSUMED_FPS` frames per second.
        period: seconds from frame to frame as they were sampled, which times of a file are near; None where only the
            times tell.
    """

    images: list[Any]
    times: list[float]
    timed: bool = True
    period: float | None = None

    @property
    def seconds_apart(self) -> float:
        """Seconds from frame to frame."""
        if self.period is not None:
            return self.period
        steps = len(self.times) - 1
        return (self.times[-1] - self.times[0]) / steps if steps > 0 else 1 / DEFAULT_FPS


# -------------------------------------------------------------------- frames for a prompt


def check_sampling(fps: float | None, num_frames: int | None, sample: bool = True) -> None:
    """Check the sampling options of a video, which `load_frames` describes.

    Raises:
        ValueError: if options exclude each other, or `fps` or `num_frames` isn't a positive number.
    """
    if fps is not None:
        check_positive("fps", fps, "a positive number")
    if num_frames is not None:
        check_count("num_frames", num_frames)
    if fps is not None and num_frames is not None:
        raise ValueError(f"fps={fps} and num_frames={num_frames} can't be combined; pass one of them.")
    given = "fps" if fps is not None else "num_frames" if num_frames is not None else None
    if given and not sample:
        raise ValueError(f"{given} can't be combined with do_sample_frames=False, which takes every frame; remove it.")


def load_frames(
    video: Any,
    *,
    fps: float | None = None,
    num_frames: int | None = None,
    sample: bool = True,
    policy: MediaPolicy = DEFAULT_POLICY,
) -> list[Any]:
    """The frames of a video that go into the prompt.

    Args:
        video: path or URL of a video file, or its contents as base64, a data URL or bytes; or the decoded frames, as
            an array or tensor (frames, height, width, channels) or (frames, channels, height, width), or as a list of
            images of any form.
        fps: frames per second; only for files, since decoded frames don't tell their rate.
        num_frames: number of frames in all, evenly spaced.
        sample: whether frames are sampled; False takes every frame, without `fps` and `num_frames`.
        policy: limits of what may be read, and of its size.

    Without `fps` and `num_frames`, a file of 10 seconds or more gives 2 frames per second, a shorter one 20 evenly
    spaced frames (all of them if it has fewer), as in training; of decoded frames all are taken.

    Returns:
        The frames in order of time: PIL images for files, the elements of `video` otherwise. Where a part of a file
        can't be decoded, a `VideoWarning` says so, and a moment has the frame that is on screen then, none twice.

    Raises:
        ValueError: if the file can't be read or none of its frames can be decoded, there are fewer than `num_frames`
            frames, `fps` is given for decoded frames, or options exclude each other.
        ImportError: for files, without PyAV.
    """
    return read_frames(video, fps=fps, num_frames=num_frames, sample=sample, policy=policy).images


def read_frames(
    video: Any,
    *,
    fps: float | None = None,
    num_frames: int | None = None,
    sample: bool = True,
    policy: MediaPolicy = DEFAULT_POLICY,
    metadata: Any = None,
) -> Frames:
    """The frames of a video that go into the prompt, with their times.

    Args:
        video, fps, num_frames, sample, policy: arguments of `load_frames`.
        metadata: what is known of decoded frames, as Transformers' `VideoMetadata` or a dictionary with its fields:
            `fps` of the video that they are from, by which the argument `fps` can be applied to them, and
            `frames_indices`, their numbers in it; None for nothing.

    Raises:
        ValueError: as `load_frames`, and for metadata that don't fit the frames, or that are given for a file.
        ImportError: for files, without PyAV.
    """
    check_sampling(fps, num_frames, sample)
    if not isinstance(video, (str, os.PathLike, bytes)):
        return _sampled(list(video), fps, num_frames, metadata)
    _check_no_metadata(video, metadata)
    plan = _plan(video, fps, num_frames, sample, policy)
    frames, problems = _read(video, plan, policy)
    messages = [problem.message for problem in problems] + ([plan.missing] if plan.missing else [])
    if messages:
        others = f" (and {len(messages) - 1} more)" if len(messages) > 1 else ""
        warnings.warn(f"The video {name_of(video)}: {messages[0]}{others}", VideoWarning, stacklevel=3)
    return frames._replace(period=plan.period)


def measure_frames(
    video: Any,
    *,
    fps: float | None = None,
    num_frames: int | None = None,
    sample: bool = True,
    policy: MediaPolicy = DEFAULT_POLICY,
    metadata: Any = None,
) -> Frames:
    """What `read_frames` would give, without decoding anything.

    Args:
        video, fps, num_frames, sample, policy, metadata: arguments of `read_frames`.

    Returns:
        For files, the (width, height) of each frame, in square pixels and not yet turned upright; the elements of
        `video` otherwise. Damaged frames count like others.

    Raises:
        ValueError, ImportError: as `read_frames`, but for frames that can't be decoded.
    """
    check_sampling(fps, num_frames, sample)
    if not isinstance(video, (str, os.PathLike, bytes)):
        return _sampled(list(video), fps, num_frames, metadata)
    _check_no_metadata(video, metadata)
    plan = _plan(video, fps, num_frames, sample, policy)
    if 0 in plan.size:  # a container that doesn't state it
        return read_frames(video, fps=fps, num_frames=num_frames, sample=sample, policy=policy)
    return Frames([plan.size] * len(plan.moments), plan.moments, period=plan.period)


def sample_indices(
    times: list[float], duration: float, *, fps: float | None = None, num_frames: int | None = None
) -> list[int]:
    """Which frames of a video to take.

    Args:
        times: times at which frames appear, in seconds from the first one, ascending.
        duration: length of the video, in seconds.
        fps: frames per second: what is on screen at 0, 1/fps, 2/fps, ... is taken.
        num_frames: number of frames in all, evenly spaced.

    Returns:
        Ascending indices into `times`, none of them twice.

    Raises:
        ValueError: if `num_frames` is more than there are.
    """
    if fps is None and num_frames is None and duration < SHORT_VIDEO_SECONDS:
        num_frames = min(SHORT_VIDEO_FRAMES, len(times))
    if num_frames is not None:
        return _evenly_spaced(len(times), num_frames)
    moments = _moments(duration, DEFAULT_FPS if fps is None else fps)
    return sorted({bisect_right(times, moment + TOLERANCE_SECONDS) - 1 for moment in moments})


def _moments(duration: float, fps: float) -> list[float]:
    """The times at which a video of so many seconds is looked at."""
    return [step / fps for step in range(max(1, int((duration + TOLERANCE_SECONDS) * fps)))]


def _sampled(frames: list[Any], fps: float | None, num_frames: int | None, metadata: Any) -> Frames:
    """Those of the decoded frames that go into the prompt."""
    times, timed = _decoded_times(len(frames), metadata)
    given = Frames(frames, times, timed)
    if fps is not None and not timed:
        raise ValueError(
            f"fps={fps} can't be applied to a video of {len(frames)} decoded frames, whose rate isn't known; pass it "
            "as video_metadata, or num_frames instead, or the path of the file."
        )
    if fps is None and num_frames is None:
        return given
    since = [moment - times[0] for moment in times]
    duration = max(since, default=0.0) + given.seconds_apart
    chosen = sample_indices(since, duration, fps=fps, num_frames=num_frames)
    return Frames([frames[index] for index in chosen], [times[index] for index in chosen], timed)


def _decoded_times(number: int, metadata: Any) -> tuple[list[float], bool]:
    """When decoded frames appear in their video, in seconds, and whether that is known."""
    rate, indices = (None, None) if metadata is None else _known(metadata)
    if indices is None:
        indices = range(number)
    numbers = indices.tolist() if hasattr(indices, "tolist") else elements_of(indices)
    if not all(is_number(index) and index >= 0 for index in numbers) or numbers != sorted(numbers):
        raise ValueError(
            f"video_metadata has frames_indices={shown(numbers)}; expected the numbers of the frames in the video "
            "that they are from, 0 or more and ascending."
        )
    if len(numbers) != number:
        raise ValueError(
            f"video_metadata has frames_indices of {len(numbers)} frames for a video of {number} decoded frames; give "
            "the number of each frame in the video that it is from."
        )
    if rate is None:
        return [float(index) / ASSUMED_FPS for index in numbers], False
    check_positive("video_metadata.fps", rate, "a positive number of frames per second")
    return [float(index) / float(rate) for index in numbers], True


def _known(metadata: Any) -> tuple[Any, Any]:
    """`fps` and `frames_indices` of video metadata; None for what isn't known."""
    field = metadata.get if isinstance(metadata, Mapping) else partial(getattr, metadata)
    found = metadata if isinstance(metadata, Mapping) else dir(metadata)
    if "fps" not in found and "frames_indices" not in found:
        raise ValueError(
            f"video_metadata of a video is {shown(metadata)}; expected a VideoMetadata of Transformers, a dictionary "
            "with `fps` and `frames_indices`, or None."
        )
    return field("fps", None), field("frames_indices", None)


def _check_no_metadata(video: Any, metadata: Any) -> None:
    if metadata is not None:
        raise ValueError(
            f"video_metadata was given for the video {name_of(video)}, a file, which tells the times of its frames "
            "itself; leave it out, or give None for this video."
        )


def _evenly_spaced(available: int, num_frames: int) -> list[int]:
    if num_frames > available:
        raise ValueError(f"num_frames={num_frames} is more than the {available} frames that the video has")
    return [index * available // num_frames for index in range(num_frames)]


# -------------------------------------------------------------------- reading a file twice


@dataclass(frozen=True)
class _Plan:
    """What to read of a file, by what its packets say.

    Attributes:
        media: file or contents that PyAV opens.
        options: options for FFmpeg.
        moments: times at which the chosen frames appear, in seconds from the first one, ascending.
        origin: seconds of the first stamp; None if packets have none.
        size: width and height of a frame in square pixels, not turned upright.
        missing: message about an end that is missing; empty if none is.
        period: seconds from one chosen frame to the next, as they are sampled.
    """

    media: str | BytesIO
    options: dict[str, str]
    moments: list[float]
    origin: Fraction | None
    size: tuple[int, int]
    missing: str
    period: float


def _plan(
    video: str | os.PathLike[str] | bytes,
    fps: float | None,
    num_frames: int | None,
    sample: bool,
    policy: MediaPolicy,
) -> _Plan:
    """Which frames of a file to take, from its packets alone."""
    with _named_errors(video):
        media, options = _openable(video, policy)
        with open_media(media, options=options) as container:
            stream = container.streams.video[0]
            packets, broken = _packets(container)
            times, duration, origin = _frame_times(stream, packets)
            stated = float(stream.duration * stream.time_base) if stream.duration else 0.0
            size = square_size(stream.codec_context.width, stream.codec_context.height, pixel_aspect(stream))
            missing = broken or missing_end(stated, duration, float(frame_period(stream)))
        policy.check_size(*size)
        chosen = range(len(times)) if not sample else sample_indices(times, duration, fps=fps, num_frames=num_frames)
        moments = [times[index] for index in chosen]
        rate = fps or (DEFAULT_FPS if sample and num_frames is None and duration >= SHORT_VIDEO_SECONDS else None)
        if rate is not None and len(moments) < len(_moments(duration, rate)):
            rate = None  # more than the video has
        period = 1 / rate if rate is not None else duration / len(moments)
        return _Plan(media, options, moments, origin, size, missing, period)


def _read(
    video: str | os.PathLike[str] | bytes, plan: _Plan, policy: MediaPolicy
) -> tuple[Frames, list[VideoProblem]]:
    """The planned frames of a file, and what couldn't be decoded."""
    with _named_errors(video):
        # Threads that each decode a frame are faster, but lose good ones beside one that is damaged, even silently.
        for threads in ("AUTO", "SLICE"):
            frames, problems = _read_once(plan, policy, threads)
            if not problems and len(frames.images) == len(plan.moments):
                break
        if not frames.images:
            raise ValueError("none of its frames can be decoded")
        return frames, problems


def _read_once(plan: _Plan, policy: MediaPolicy, threads: str) -> tuple[Frames, list[VideoProblem]]:
    if isinstance(plan.media, BytesIO):
        plan.media.seek(0)
    read = Frames([], [])
    problems: list[VideoProblem] = []
    moments = iter(plan.moments)
    with open_media(plan.media, options=plan.options) as container:
        stream = container.streams.video[0]
        stream.thread_type = threads
        frames = timed_frames(decoded(container), stream, policy=policy, origin=plan.origin)
        for item in frames_on_screen(frames, lambda reached: next(moments, None)):
            if isinstance(item, VideoProblem):
                problems.append(item)
            else:
                read.images.append(item.image())
                read.times.append(float(item.timestamp))
    return read, problems


@contextmanager
def _named_errors(video: Any) -> Iterator[None]:
    """Whatever fails within is an error with the name of the video."""
    try:
        pyav()
        yield
    except ImportError as error:
        raise ImportError(f"The video {name_of(video)} can't be read: {error}") from error
    except reading_errors() as error:
        raise ValueError(f"The video {name_of(video)} can't be used: {reason_of(error)}.") from error


def _openable(video: str | os.PathLike[str] | bytes, policy: MediaPolicy) -> tuple[str | BytesIO, dict[str, str]]:
    """What PyAV opens, and its options."""
    found = contents_of(video, policy)
    if isinstance(found, bytes):
        return BytesIO(found), _CONTENTS_ONLY
    return ffmpeg_path(found), _LOCAL_FILES_ONLY


def _packets(container: Any) -> tuple[list[tuple[int | None, int]], str]:
    """Stamps and durations of the packets of the first video stream, in ticks, and why reading ended too early.

    The reason is empty at the end of the file.
    """
    packets: list[tuple[int | None, int]] = []  # without what is coded in them, which may take gigabytes
    broken = ""
    try:
        for packet in container.demux(container.streams.video[0]):
            if packet.size and not packet.is_discard:
                packets.append((packet.pts, packet.duration or 0))
    except reading_errors() as error:
        broken = _ended_early(error)
    if not packets:
        raise ValueError("it has no frames")
    return packets, broken


def _frame_times(stream: Any, packets: list[tuple[int | None, int]]) -> tuple[list[float], float, Fraction | None]:
    """When each frame of a stream appears, how long the video is, and its first stamp, all in seconds."""
    stamps = sorted(stamp for stamp, _ in packets if stamp is not None)
    if len(stamps) < len(packets):  # raw streams carry no times
        period = frame_period(stream)
        return [float(index * period) for index in range(len(packets))], float(len(packets) * period), None
    times = [float((stamp - stamps[0]) * stream.time_base) for stamp in stamps]
    _, length = max((stamp, length) for stamp, length in packets if stamp is not None)
    return times, times[-1] + float(length * stream.time_base), stamps[0] * stream.time_base


# -------------------------------------------------------------------- what every reader of videos does


def pyav() -> Any:
    """The package `av`.

    Raises:
        ImportError: with the command that installs it, to be said of a video.
    """
    # Code that a checkpoint carries is refused by Transformers for imports outside `try` that aren't installed.
    try:
        import av
    except ImportError as error:
        raise ImportError("it needs PyAV: pip install casa_hf[video]") from error
    return av


def reading_errors() -> tuple[type[Exception], ...]:
    """The errors of what PyAV does."""
    return OSError, ValueError, pyav().error.FFmpegError


def ffmpeg_path(path: str | os.PathLike[str]) -> str:
    """The absolute path of a file: FFmpeg takes what stands before a colon in a relative one for a protocol."""
    return os.path.abspath(path)


def open_media(media: str | BytesIO, **options: Any) -> Any:
    """A container of PyAV with a video stream that can be decoded; the caller's to close.

    Args:
        media: path, URL, device or contents.
        **options: options of `av.open`.

    Raises:
        OSError, ValueError, av.error.FFmpegError: if it can't be opened, or has no such stream.
        ImportError: without PyAV.
    """
    container = pyav().open(media, **options)
    if not container.streams.video:
        reason = "it has no video stream"
    elif container.streams.video[0].codec_context is None:
        reason = "its codec isn't known; convert it to H.264 or another usual codec"
    else:
        return container
    container.close()
    raise ValueError(reason)


def frame_period(stream: Any) -> Fraction:
    """Seconds from frame to frame, on average."""
    return 1 / Fraction(stream.average_rate or RAW_STREAM_FPS)


def decoded(container: Any) -> Iterator[Any]:
    """Frames of the first video stream of a container; a run of packets that can't be decoded is one problem.

    The times of problems are the container's, or NaN where that says nothing.
    """
    stream = container.streams.video[0]
    broken = False
    silent = 0.0
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets)
            silent = 0.0
        except StopIteration:
            return
        except BlockingIOError:  # a device that has nothing yet
            if silent > SILENCE_SECONDS:
                yield VideoProblem(math.nan, f"nothing came for {SILENCE_SECONDS:g} s")
                return
            time.sleep(_BUSY_SECONDS)
            silent += _BUSY_SECONDS
            packets = container.demux(stream)
            continue
        except reading_errors() as error:
            yield from chain(_flushed(stream), [VideoProblem(math.nan, _ended_early(error))])
            return
        try:
            frames = packet.decode()
        except reading_errors() as error:
            if not broken:
                stamp = packet.dts if packet.pts is None else packet.pts
                place = math.nan if stamp is None else float(stamp * packet.time_base)
                yield VideoProblem(place, f"a part can't be decoded: {reason_of(error)}")
            broken = True
            continue
        broken = broken and not frames
        yield from frames


def _ended_early(error: Exception) -> str:
    return f"reading ended early: {reason_of(error)}"


def _flushed(stream: Any) -> Iterable[Any]:
    """The frames that the decoder still holds."""
    try:
        frames = stream.decode(None)
    except reading_errors():
        return []
    for frame in frames:
        frame.time_base = stream.time_base  # which they have from the packet that they come of, and here is none
    return frames


def timed_frames(
    frames: Iterable[Any], stream: Any, *, policy: MediaPolicy = DEFAULT_POLICY, origin: Fraction | None = None
) -> Iterator[DecodedFrame | VideoProblem]:
    """Frames with the times of the container, counted from the first one; the times of problems alike.

    Args:
        frames: result of `decoded`.
        stream: the video stream that they are from.
        policy: limits of the size of images.
        origin: time 0, in seconds of the container; None for the first frame.
    """
    period, aspect = frame_period(stream), pixel_aspect(stream)
    count = 0
    for frame in frames:
        if isinstance(frame, VideoProblem):
            yield frame if origin is None else VideoProblem(frame.timestamp - float(origin), frame.message)
            continue
        stamp = count * period if frame.pts is None else frame.pts * Fraction(frame.time_base)
        count += 1
        origin = stamp if origin is None else origin
        length = frame.duration * Fraction(frame.time_base) if frame.duration else period
        yield DecodedFrame(stamp - origin, length, partial(frame_image, frame, aspect, policy))


def frames_on_screen(
    frames: Iterable[DecodedFrame | VideoProblem], next_moment: Callable[[float], float | None]
) -> Iterator[DecodedFrame | VideoProblem]:
    """The frames that are on screen at some moments, none twice, and the problems up to the last of them.

    A frame is on screen until the next one, the last one for its duration. One that appears at a moment is given at
    once, any other when the next one tells that it was the last before the moment.

    Args:
        frames: frames in order of time, and problems.
        next_moment: function that gives the moments in seconds, ascending, and then None. It gets the time of the
            frame that is reached; moments that are more than `TOLERANCE_SECONDS` before that may be left out.
    """
    moment = next_moment(0.0)
    held: DecodedFrame | None = None  # the frame on screen, unless it was given
    for item in frames:
        if isinstance(item, VideoProblem):
            yield item
            continue
        while moment is not None and item.timestamp > moment + TOLERANCE_SECONDS:
            if held is not None:
                yield held
                held = None
            moment = next_moment(float(item.timestamp))
        held = item
        if moment is not None and item.timestamp >= moment - TOLERANCE_SECONDS:
            yield item
            held = None
            moment = next_moment(float(item.timestamp))
        if moment is None:
            return
    if held is not None and moment is not None and held.lasts_beyond(moment):
        yield held


def missing_end(stated: float, end: float, period: float) -> str:
    """The message about a video that ends before its header says; empty if it doesn't.

    Args:
        stated: seconds in the header.
        end: seconds at which the last frame ends.
        period: seconds from frame to frame.
    """
    if stated - end <= max(_MISSING_SECONDS, 2 * period):
        return ""
    return f"the video ends after {end:.3f} s of the {stated:.3f} s that its header states; the end is missing"


def pixel_aspect(stream: Any) -> float:
    """Width of the pixels of a video stream divided by their height; 1.0 where it isn't stated."""
    return float(stream.sample_aspect_ratio or 0) or 1.0


def square_size(width: int, height: int, aspect: float) -> tuple[int, int]:
    """The size in square pixels of a frame of pixels with this aspect; its height stays, as in players."""
    return (max(1, round(width * aspect)) if width else 0), height


def frame_image(frame: Any, aspect: float = 1.0, policy: MediaPolicy = DEFAULT_POLICY) -> Image.Image:
    """A decoded frame as it is to be seen: on white, with square pixels, turned and mirrored by its display matrix.

    Args:
        frame: frame of PyAV.
        aspect: aspect of its pixels, see `pixel_aspect`.
        policy: limits of its size.

    Raises:
        ValueError: if it is larger.
    """
    size = square_size(frame.width, frame.height, aspect)
    policy.check_size(frame.width, frame.height)
    policy.check_size(*size)
    if any(component.is_alpha for component in frame.format.components):
        image = on_white(Image.fromarray(frame.to_ndarray(format="rgba")))
    else:
        image = frame.to_image()
    if image.size != size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    matrix = next((bytes(data) for data in frame.side_data if data.type.name == "DISPLAYMATRIX"), None)
    return image if matrix is None else _displayed(image, matrix)


def _displayed(image: Image.Image, matrix: bytes) -> Image.Image:
    """The image turned and mirrored as a display matrix says: (x, y) is to be seen at (a x + c y, b x + d y)."""
    a, b, _, c, d, *_ = struct.unpack("=9i", matrix)
    if abs(b) > abs(a):
        image = image.transpose(Image.Transpose.TRANSPOSE)
        a, d = c, b
    if a < 0:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image.transpose(Image.Transpose.FLIP_TOP_BOTTOM) if d < 0 else image


__all__ = ["Frames", "VideoProblem", "VideoWarning", "load_frames", "measure_frames", "read_frames"]
