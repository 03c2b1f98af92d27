# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""A video with its captions drawn into the image.

The file is written under a temporary name and moved when it is closed. MP4 and MOV are written in fragments, Matroska
in clusters, of a second each, and the encoder holds no frame back: so what a killed process leaves under the temporary
name can be played up to its last seconds, however few frames a second has.
"""

from __future__ import annotations

import math
import os
import secrets
import unicodedata
from bisect import bisect_right
from collections.abc import Generator, Iterator
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from ..media_casa import rgb_image
from ..streaming import CaptionEvent
from ..video import Frame, MediaInput, VideoInput, VideoProblem
from .subtitles import Caption, CaptionCollector, check_output

if TYPE_CHECKING:
    from PIL.Image import Image

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
# Of the image's height.
_LETTER_HEIGHT = 1 / 18
_MIN_LETTER_PIXELS = 10
_MAX_LINES = 3
# Looked for in the system's folders of fonts: the letters of many languages, then Chinese, Japanese and Korean too.
_FONTS = (
    "DejaVuSans.ttf",
    "NotoSans-Regular.ttf",
    "LiberationSans-Regular.ttf",
    "arial.ttf",
    "Arial.ttf",
    "Arial Unicode.ttf",
    "NotoSansCJK-Regular.ttc",
    "wqy-zenhei.ttc",
    "msyh.ttc",
    "YuGothM.ttc",
    "malgun.ttf",
    "Hiragino Sans GB.ttc",
    "AppleSDGothicNeo.ttc",
)
# No character, so that no font has an image of it but the one for what is missing.
_NO_CHARACTER = "\U0010ffff"
_MAX_TOLD = 10


class _Undrawable(NamedTuple):
    """A frame that is no image."""

    timestamp: float
    reason: str


class OverlayWriter:
    """Encodes frames with captions drawn at their lower edge.

    Args:
        path: of the video, ending in .mp4, .mov or .mkv.
        audio: a video file, a URL or a source whose sound is copied, packet by packet, if its format can be in such a
            file; see `close` for how much of it. A source is opened once more, in the same way; a video whose sound
            can't be opened is without it, see `note`.
        start: seconds in the source at which the video begins; a frame that is on screen by then begins with it.
        font: file of the font of the captions, see `captioned`.
        overwrite: whether to replace a file that exists.

    Attributes:
        written: whether the video is there: once closed, unless it had no frame.

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
            import av  # noqa: F401
        except ImportError as error:
            raise ImportError("Writing a video needs PyAV: pip install casa_hf[video]") from error
        if font is not None:
            _check_font(font)
        self.written = False
        self._start, self._last_pts = start, -1
        self._last_keyframe = -math.inf
        self._duration = round(1 / _NOMINAL_FPS / _TIME_BASE)  # of the last frame
        # What another run has left, or is writing, has another name.
        name = f".{self.path.stem}.{secrets.token_hex(4)}.incomplete{self.path.suffix}"
        self._temporary = self.path.with_name(name)
        self._container: Any = None
        self._video: Any = None
        self._sound: _Sound | None = None
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
            notes.append(f"the font has no image of some characters of the captions ({some}); give another font")
        return "; ".join(notes)

    def write(self, frame: Frame, text: str) -> None:
        """Add a frame.

        Args:
            frame: later than the one before; an image of another size than the first one is fitted into that size.
            text: drawn into it; nothing if empty.

        Raises:
            ValueError: if the frame is no image, as `casa_hf.media_casa.rgb_image` says.
        """
        import av
        from av.video.frame import PictureType

        image = rgb_image(frame.image)
        if self._video is None:
            self._open(image)
        width, height = self._video.width, self._video.height
        if image.size != (width, height):
            image = _fitted(image, width, height)
        pts = max(0, int((Fraction(frame.timestamp) - Fraction(self._start)) / _TIME_BASE + Fraction(1, 2)))
        if pts <= self._last_pts:
            return
        if self._last_pts >= 0:
            self._duration = pts - self._last_pts
        self._last_pts = pts
        if text:
            image = captioned(image, text, self._font)
            self._missing |= dict.fromkeys(_font(text, _letter_size(image), self._font)[1])
        encoded = av.VideoFrame.from_image(image)
        encoded.pts, encoded.time_base = pts, _TIME_BASE
        if (pts - self._last_keyframe) * _TIME_BASE >= _KEYFRAME_SECONDS:
            self._last_keyframe, encoded.pict_type = pts, PictureType.I
        if self._sound is not None:
            self._sound.copy_until(pts * _TIME_BASE)
        self._container.mux(self._video.encode(encoded))

    def close(self, sound_until: float | None = None) -> None:
        """Finish the video and give it its name; without any frame there will be none.

        Args:
            sound_until: seconds in the source at which the sound ends, infinity for all of it. None for the end of the
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

    def _open(self, image: Image) -> None:
        """Begin the file, with frames of the size of the first one."""
        import av

        format = FORMATS[self.path.suffix.lower()]
        flags = _FLUSHED | (_CLUSTERS if format == "matroska" else _FRAGMENTS)
        # Of a relative name, FFmpeg takes what stands before a colon for a protocol.
        path = os.path.abspath(self._temporary)
        self._container = av.open(path, "w", format=format, container_options=flags)
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
            self._sound, self._silence = _Sound.open(self._audio, self._container, self._start)


class Overlay:
    """The frames of a source with the captions that a stream gives them.

    Of a recorded source every frame is drawn, also those that the model doesn't look at: the source is read once more,
    and a caption is drawn into the frames from its own one on until it ends. Of a live source, which can't be read
    again, it is the frames that `show` is given, but for those that the stream couldn't use. The sound of a recorded
    source goes on to its end, or that of the range, also where that is later than the last frame.

    Args:
        source: what is captioned.
        path: of the video, ending in .mp4, .mov or .mkv.
        font: file of the font of the captions, see `captioned`.
        overwrite: whether to replace a file that exists; never the source itself.

    Raises:
        ValueError: for a path or font as `OverlayWriter` says, and if the path is that of the source.
    """

    def __init__(
        self,
        source: VideoInput,
        path: str | os.PathLike[str],
        *,
        font: str | os.PathLike[str] | None = None,
        overwrite: bool = False,
    ):
        check_output(path, FORMATS, overwrite, source.files)
        recorded = source if isinstance(source, MediaInput) and not source.live else None
        self._writer = OverlayWriter(path, audio=recorded, start=source.start, font=font, overwrite=overwrite)
        self._frames = None if recorded is None else _images(recorded)
        self._end = math.inf if source.end is None else source.end
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
        """Whether the video is there: once closed, unless it had no frame."""
        return self._writer.written

    def show(self, frame: Frame) -> None:
        """A frame that the model is about to see: its file, or its buffer, may hold the next one when it is drawn."""
        if self._frames is None:
            self._held.append(_drawable(frame))

    def write(self, event: CaptionEvent) -> None:
        """Take one event of the stream; draws what has become certain by it."""
        if event.kind == "error":
            if event.frame_index >= 0:  # else a problem of the source, not of a frame
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
            interrupted: whether the video ends where the captions do, sound included, rather than with the source.
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
        """Write the frames before a moment; None for all. What is no image is left out, and noted."""
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


def captioned(image: Image, text: str, font: str | os.PathLike[str] | None = None) -> Image:
    """An image with a caption at its lower edge, on a dark ground.

    Long captions are broken into lines; of more than three lines the last three are drawn.

    Args:
        image: of any size.
        text: of the caption.
        font: file of a TrueType or OpenType font. None for the first of some usual ones that is installed and has all
            characters of the text; where there is none, the one that has the most of them. Pillow brings the last one.

    Raises:
        OSError: if the font can't be read.
    """
    from PIL import Image, ImageDraw

    size = _letter_size(image)
    letters, _ = _font(text, size, None if font is None else os.fspath(font))
    margin = size // 2
    lines = _lines(text, image.width - 4 * margin, letters.getlength)[-_MAX_LINES:]
    block = "\n".join(lines)
    drawn = image.convert("RGBA")
    ground = Image.new("RGBA", image.size, (0, 0, 0, 0))
    draw = ImageDraw.Draw(ground)
    x, y = image.width / 2, image.height - 2 * margin
    left, top, right, bottom = draw.multiline_textbbox((x, y), block, font=letters, anchor="md", align="center")
    draw.rectangle((left - margin, top - margin, right + margin, bottom + margin), fill=(0, 0, 0, 160))
    draw.multiline_text((x, y), block, font=letters, anchor="md", align="center", fill=(255, 255, 255, 255))
    return Image.alpha_composite(drawn, ground).convert("RGB")


def _letter_size(image: Image) -> int:
    return max(_MIN_LETTER_PIXELS, round(image.height * _LETTER_HEIGHT))


def _lines(text: str, width: float, length: Any) -> list[str]:
    """Text broken so that each line is at most so long, between words where they aren't longer themselves."""
    lines: list[str] = []
    for paragraph in text.splitlines():
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}".strip()
            if line and length(longer) > width:
                lines.append(line)
                line = word
            else:
                line = longer
            while len(line) > 1 and length(line) > width:
                fits = bisect_right(range(1, len(line)), width, key=lambda count: length(line[:count])) or 1
                lines.append(line[:fits])
                line = line[fits:]
        lines += [line] if line else []
    return lines


@lru_cache(maxsize=8)  # a caption is drawn into many frames
def _font(text: str, size: int, file: str | None) -> tuple[Any, str]:
    """The font for a text, as `captioned` says, and the characters that it has no image of."""
    best: tuple[Any, str] | None = None
    for name in (*_FONTS, None) if file is None else (file,):
        font = _loaded(name, size)
        if font is None:
            continue
        missing = "".join(dict.fromkeys(letter for letter in text if not _has(font, letter)))
        if best is None or len(missing) < len(best[1]):
            best = font, missing
        if not missing:
            break
    if best is None:
        raise OSError(f"The font {file!r} can't be read any more.")
    return best


@lru_cache(maxsize=2 * len(_FONTS))
def _loaded(name: str | None, size: int) -> Any:
    """A font by its file, or its name in the system's folders; None stands for the one that Pillow brings.

    None if there is none.
    """
    from PIL import ImageFont

    try:
        return ImageFont.load_default(size) if name is None else ImageFont.truetype(name, size)
    except OSError:
        return None


def _has(font: Any, letter: str) -> bool:
    """Whether a font has an image of a character, if one is needed."""
    if unicodedata.category(letter)[0] in "CZ":
        return True
    return bytes(font.getmask(letter)) != bytes(font.getmask(_NO_CHARACTER))


def _check_font(file: str | os.PathLike[str]) -> None:
    from PIL import ImageFont

    try:
        ImageFont.truetype(os.fspath(file), _MIN_LETTER_PIXELS)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The font {os.fspath(file)!r} can't be used ({error}); give the file of a TrueType or OpenType font."
        ) from error


class _Sound:
    """Packets of the first audio stream of a file, copied into another."""

    def __init__(self, container: Any, output: Any, target: Any, start: float):
        self._container, self._output, self._target = container, output, target
        self._stream = container.streams.audio[0]
        first = container.streams.video[0].start_time
        base = container.streams.video[0].time_base
        # Time 0 is the first frame.
        self._zero = (Fraction(first * base) if first is not None else Fraction(0)) + Fraction(start)
        self._packets = container.demux(self._stream)
        self._next: Any = None

    @classmethod
    def open(cls, audio: str | MediaInput, output: Any, start: float) -> tuple[_Sound | None, str]:
        """The sound of a file or source, or why it can't be copied (nothing if there is none)."""
        import av

        try:
            if isinstance(audio, MediaInput):
                container = audio.open_container()
            else:
                with MediaInput(audio, live=False) as source:
                    container = source.open_container()
        except ValueError as error:
            return None, f"the sound can't be read: {error}; the video is without sound"
        if not container.streams.audio:
            container.close()
            return None, ""
        stream = container.streams.audio[0]
        codec = stream.codec_context.codec.canonical_name  # decoders of one format have several names
        if codec not in output.supported_codecs:
            container.close()
            return None, f"the sound is {codec}, which {output.format.name} can't hold; the video is without sound"
        try:
            target = output.add_stream_from_template(stream)
        except (ValueError, av.error.FFmpegError) as error:
            container.close()
            return None, f"the sound ({codec}) can't be copied: {error}; the video is without sound"
        return cls(container, output, target, start), ""

    def copy_until(self, moment: Fraction | float) -> None:
        """Copy the packets before a moment, in seconds of the output; infinity for all that are left."""
        import av

        while True:
            if self._next is None:
                try:
                    self._next = next(self._packets, None)
                except (OSError, av.error.FFmpegError):
                    return  # the end is missing, as is that of the image
            packet = self._next
            if packet is None or packet.dts is None:
                return
            base = Fraction(packet.time_base)
            if packet.pts * base - self._zero >= moment:
                return
            self._next = None
            if packet.pts * base < self._zero:
                continue
            shift = int(self._zero / base)
            packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
            packet.stream = self._target
            self._output.mux(packet)

    def close(self) -> None:
        self._container.close()


def _images(source: MediaInput) -> Generator[Frame, None, None]:
    """All frames of a source, read once more; problems were reported when the captions were made."""
    with source.every_frame() as again:
        yield from (item for item in again.read() if not isinstance(item, VideoProblem))


def _drawable(frame: Frame) -> Frame | _Undrawable:
    """A frame with an image of its own, or why there is none."""
    try:
        return frame._replace(image=rgb_image(frame.image))
    except Exception as error:  # of many kinds
        return _Undrawable(frame.timestamp, f"{type(error).__name__}: {error}")


def _fitted(image: Image, width: int, height: int) -> Image:
    """An image in the middle of a frame of this size."""
    from PIL import Image

    scale = min(width / image.width, height / image.height)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    # One more row or column, for an even size, is no reason to scale.
    if 0 <= width - image.width <= 1 and 0 <= height - image.height <= 1:
        size = image.size
    canvas = Image.new("RGB", (width, height))
    scaled = image if size == image.size else image.resize(size)
    canvas.paste(scaled, ((width - size[0]) // 2, (height - size[1]) // 2))
    return canvas
