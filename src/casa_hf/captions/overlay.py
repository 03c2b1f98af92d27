# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""A video with its captions drawn into its frames.

The file is written under a temporary name and moved when it is closed. MP4 and MOV are written in fragments, Matroska
in clusters, of a second each, and the encoder holds no frame back: so what a killed process leaves under the temporary
name can be played up to its last seconds, however few frames a second has.
"""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Generator, Iterator
from fractions import Fraction
from typing import Any, NamedTuple

from PIL.Image import Image

from ..frames_casa import ffmpeg_path, pyav
from ..media_casa import rgb_image
from ..streaming import CaptionEvent
from ..video import Frame, MediaInput, VideoInput, VideoProblem
from .drawing import captioned, check_font, fitted, missing_letters
from .sound import Sound
from .subtitles import Caption, CaptionCollector, check_output

# FFmpeg's name of the container by the file's ending.
FORMATS = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska"}
# How much is held back before it is written; also how long images wait for sound, and sound for images. If that
# were less, fragments of sound alone would come between images that are farther apart, and displace them.
_KEPT_SECONDS = 1
_FLUSHED = {"flush_packets": "1", "max_interleave_delta": str(_KEPT_SECONDS * 1_000_000)}
_FRAGMENTS = {
    "movflags": "frag_keyframe+empty_moov+default_base_moof",
    "frag_duration": str(_KEPT_SECONDS * 1_000_000),
}
_CLUSTERS = {"cluster_time_limit": str(_KEPT_SECONDS * 1_000)}
# The first one that there is. None of them looks ahead.
_ENCODERS = {
    "libx264": {"preset": "veryfast", "crf": "23", "tune": "zerolatency"},
    "mpeg4": {"flags": "+qscale", "global_quality": str(4 * 118)},  # a scale of 4, in FFmpeg's units
}
_TIME_BASE = Fraction(1, 60_000)  # MPEG-4 allows denominators up to 65,535
_NOMINAL_FPS = 25
_KEYFRAME_SECONDS = 2
# Encoders count frames, whatever time they take; these are more than come in the seconds above.
_MAX_FRAMES_BETWEEN_KEYFRAMES = 600
_MAX_TOLD = 10


class _Undrawable(NamedTuple):
    """A frame that isn't an image."""

    timestamp: float
    reason: str


class OverlayWriter:
    """Encodes frames with captions drawn at their lower edge.

    Args:
        path: file name of the video, ending in .mp4, .mov or .mkv.
        audio: video file, URL or video input whose sound is copied, packet by packet, if its format can be in such a
            file; see `close` for how much of it. An input is opened once more, in the same way; if its sound can't be
            opened, the video is silent, see `note`.
        start: seconds in the input at which the video begins; a frame that is on screen by then begins with it.
        font: file of the font of the captions, see `captioned`.
        overwrite: whether to replace a file that exists.

    Attributes:
        written: whether the video was written: once closed, unless it had no frame.

    Raises:
        ValueError: if the name has another ending or is that of `audio`, the file exists and isn't to be replaced, its
            folder doesn't exist, or the font can't be used.
        ImportError: without PyAV.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        audio: str | MediaInput | None = None,
        start: float = 0.0,
        font: str | os.PathLike[str] | None = None,
        overwrite: bool = False,
    ):
        read = audio.files if isinstance(audio, MediaInput) else () if audio is None else (audio,)
        self.path = check_output(path, FORMATS, overwrite, read)
        try:
            pyav()
        except ImportError as error:
            raise ImportError(f"The video {str(self.path)!r} can't be written: {error}") from error
        if font is not None:
            check_font(font)
        self.written = False
        self._start, self._last_pts = start, -1
        self._last_keyframe = -math.inf
        self._duration = round(1 / _NOMINAL_FPS / _TIME_BASE)  # of the last frame
        # What another run has left, or is writing, has another name.
        name = f".{self.path.stem}.{secrets.token_hex(4)}.incomplete{self.path.suffix}"
        self._temporary = self.path.with_name(name)
        self._container: Any = None
        self._video: Any = None
        self._sound: Sound | None = None
        self._audio = audio
        self._font = None if font is None else os.fspath(font)
        self._silence = ""
        self._missing: dict[str, None] = {}  # in the order in which they came

    @property
    def note(self) -> str:
        """What the video lacks, and why: sound, characters that the font doesn't have. Empty if nothing."""
        notes = [self._silence] if self._silence else []
        if self._missing:
            some = " ".join(list(self._missing)[:_MAX_TOLD]) + (" ..." if len(self._missing) > _MAX_TOLD else "")
            notes.append(f"the font lacks some characters of the captions ({some}); give another font")
        return "; ".join(notes)

    def write(self, frame: Frame, text: str) -> None:
        """Add a frame.

        Args:
            frame: frame that is later than the one before; it is fitted into the size of the first one.
            text: caption that is drawn into it; nothing if empty.

        Raises:
            ValueError: if the frame isn't an image, as `casa_hf.media_casa.rgb_image` says.
        """
        image = rgb_image(frame.image)
        if self._video is None:
            self._open(image)
        width, height = self._video.width, self._video.height
        if image.size != (width, height):
            image = fitted(image, width, height)
        pts = max(0, int((Fraction(frame.timestamp) - Fraction(self._start)) / _TIME_BASE + Fraction(1, 2)))
        if pts <= self._last_pts:
            return
        if self._last_pts >= 0:
            self._duration = pts - self._last_pts
        self._last_pts = pts
        if text:
            image = captioned(image, text, self._font)
            self._missing |= dict.fromkeys(missing_letters(image, text, self._font))
        if self._sound is not None:
            self._sound.copy_until(pts * _TIME_BASE)
        self._encode(image, pts)

    def close(self, sound_until: float | None = None) -> None:
        """Finish the video and give it its name; without any frame there will be none.

        Args:
            sound_until: seconds in the input at which the sound ends, infinity for all of it. None for the end of the
                last frame, which is taken to be as long as the one before.
        """
        if self._container is None:
            return
        container, self._container = self._container, None
        begun = self._last_pts >= 0
        try:
            if begun:
                container.mux(self._video.encode())
                if self._sound is not None:
                    last = (self._last_pts + self._duration) * _TIME_BASE
                    self._sound.copy_until(last if sound_until is None else sound_until - self._start)
        finally:
            if self._sound is not None:
                self._sound.close()
            container.close()
        if begun:
            os.replace(self._temporary, self.path)
            self.written = True
        else:  # the first frame couldn't be written
            self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> OverlayWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _encode(self, image: Image, pts: int) -> None:
        from av.video.frame import PictureType

        encoded = pyav().VideoFrame.from_image(image)
        encoded.pts, encoded.time_base = pts, _TIME_BASE
        if (pts - self._last_keyframe) * _TIME_BASE >= _KEYFRAME_SECONDS:
            self._last_keyframe, encoded.pict_type = pts, PictureType.I
        self._container.mux(self._video.encode(encoded))

    def _open(self, image: Image) -> None:
        """Begin the file, with frames of the size of the first one."""
        av = pyav()
        format = FORMATS[self.path.suffix.lower()]
        flags = _FLUSHED | (_CLUSTERS if format == "matroska" else _FRAGMENTS)
        self._container = av.open(ffmpeg_path(self._temporary), "w", format=format, container_options=flags)
        codec = next(name for name in _ENCODERS if name in av.codecs_available)
        self._video = self._container.add_stream(codec, rate=_NOMINAL_FPS, options=_ENCODERS[codec])
        # Half as many pixels of colour need even sides.
        self._video.width, self._video.height = (side + side % 2 for side in image.size)
        self._video.pix_fmt = "yuv420p"
        self._video.codec_context.time_base = self._video.time_base = _TIME_BASE
        # B-frames, and threads that each encode a whole frame, would hold frames back.
        self._video.codec_context.max_b_frames = 0
        self._video.codec_context.thread_type = "SLICE"
        self._video.codec_context.gop_size = _MAX_FRAMES_BETWEEN_KEYFRAMES
        if self._audio is not None:
            self._sound, self._silence = Sound.open(self._audio, self._container, self._start)


class Overlay:
    """The frames of a video with the captions that a stream gives them.

    Of a recorded video every frame is drawn, also those that the model doesn't look at: it is read once more, and a
    caption is drawn into the frames from its own one on until it ends. A live video can't be read again: the frames
    that `show` is given are drawn, but for those that the stream couldn't use. The sound of a recorded video continues
    to its end, or that of the range, also where that is later than the last frame.

    Args:
        video: video that is captioned.
        path: file name of the video to write, ending in .mp4, .mov or .mkv.
        font: file of the font of the captions, see `captioned`.
        overwrite: whether to replace a file that exists; never the video that is captioned.

    Raises:
        ValueError: for a path or font as `OverlayWriter` says, and if the path is that of the video.
    """

    def __init__(
        self,
        video: VideoInput,
        path: str | os.PathLike[str],
        *,
        font: str | os.PathLike[str] | None = None,
        overwrite: bool = False,
    ):
        check_output(path, FORMATS, overwrite, video.files)
        recorded = video if isinstance(video, MediaInput) and not video.live else None
        self._writer = OverlayWriter(path, audio=recorded, start=video.start, font=font, overwrite=overwrite)
        self._frames = None if recorded is None else _every_frame(recorded)
        self._end = math.inf if video.end is None else video.end
        self._held: list[Frame | _Undrawable] = []
        self._captions = CaptionCollector()
        self._caption: Caption | None = None
        self._latest = -math.inf
        self._num_undrawn = 0
        self._first_undrawn = ""

    @property
    def note(self) -> str:
        """What the video lacks, and why: frames that couldn't be drawn, and what `OverlayWriter.note` says."""
        notes = [self._writer.note] if self._writer.note else []
        if self._num_undrawn:
            frames = "1 frame" if self._num_undrawn == 1 else f"{self._num_undrawn} frames"
            notes.append(f"{frames} couldn't be drawn; the first was {self._first_undrawn}")
        return "; ".join(notes)

    @property
    def written(self) -> bool:
        """Whether the video was written: once closed, unless it had no frame."""
        return self._writer.written

    def show(self, frame: Frame) -> None:
        """A frame that the model is about to see: its file, or its buffer, may hold the next one when it is drawn."""
        if self._frames is None:
            self._held.append(_drawable(frame))

    def write(self, event: CaptionEvent) -> None:
        """Take one event of the stream; draws what has become certain by it."""
        if event.kind == "error":
            if event.frame_index >= 0:  # else a problem of the input, not of a frame
                self._leave_out(event.start)
            return
        caption = self._captions.add(event)
        if event.kind != "end":
            return
        # Up to this frame it is the caption before that counts.
        self._draw(event.start)
        self._latest, self._caption = event.start, caption

    def close(self, *, interrupted: bool = False) -> None:
        """Draw what is left and finish the video.

        Args:
            interrupted: whether the video ends where the captions do, sound included, rather than with the input.
        """
        sound_until: float | None = None  # if anything fails, that of the frames that are there
        try:
            caption = self._captions.finish()
            if caption is not None:
                self._draw(caption.start)
                self._caption = caption
            last = self._latest if self._caption is None else self._caption.end
            self._draw(last if interrupted else None)
            sound_until = min(last, self._end) if interrupted else self._end
        finally:
            if self._frames is not None:
                self._frames.close()
            self._writer.close(sound_until)

    def _leave_out(self, start: float) -> None:
        """A frame that was shown couldn't be used; frames before it wait for nothing any more."""
        if self._frames is None:
            self._draw(start)
            if self._held and self._held[0].timestamp == start:
                self._held.pop(0)

    def _draw(self, until: float | None) -> None:
        """Write the frames before a moment; None for all. A frame that isn't an image is left out, and noted."""
        for frame in self._frames_until(until):
            if isinstance(frame, _Undrawable):
                self._first_undrawn = self._first_undrawn or f"that at {frame.timestamp:.3f} s ({frame.reason})"
                self._num_undrawn += 1
                continue
            caption = self._caption
            shown = caption is not None and caption.start <= frame.timestamp < caption.end
            self._writer.write(frame, caption.text if shown and caption is not None else "")

    def _frames_until(self, until: float | None) -> Iterator[Frame | _Undrawable]:
        while True:
            if not self._held and self._frames is not None:
                self._held = [_drawable(frame)] if (frame := next(self._frames, None)) is not None else []
            if not self._held or (until is not None and self._held[0].timestamp >= until):
                return
            yield self._held.pop(0)


def _every_frame(video: MediaInput) -> Generator[Frame, None, None]:
    """All frames of a video, read once more; problems were reported when the captions were made."""
    with video.every_frame() as again:
        yield from (item for item in again.read() if not isinstance(item, VideoProblem))


def _drawable(frame: Frame) -> Frame | _Undrawable:
    """A frame with an image of its own, or why there is none."""
    try:
        return frame._replace(image=rgb_image(frame.image))
    except Exception as error:  # of many kinds
        return _Undrawable(frame.timestamp, f"{type(error).__name__}: {error}")
