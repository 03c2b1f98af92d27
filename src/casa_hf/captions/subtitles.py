# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Captions as subtitle files (SRT, WebVTT) and as JSON lines.

A file is valid at every moment: each cue is appended whole. When the next frame comes before a cue was expected to
end, that cue's end is set in place, as times have a fixed width. So a process that is killed leaves all that was
captioned.
"""

from __future__ import annotations

import html
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from fractions import Fraction
from io import FileIO
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from ..streaming import CaptionEvent

_LINE_BREAKS = re.compile(r"[\r\n\v\f\x1c-\x1e\x85\u2028\u2029]+")
_CONTROLS = re.compile(r"[\x00-\x09\x0e-\x1b\x1f\x7f]")
# SRT has no way to write this; a reader would take it for styling.
_SRT_MARKUP = re.compile(r"<(?=[/A-Za-z])")
_WORD_JOINER = "\u2060"
_SHORTEST = Fraction(1, 1000)


class Caption(NamedTuple):
    """What was said about one frame.

    Attributes:
        start: time of the frame, in seconds.
        end: time at which the next frame is due, in seconds.
        text: caption, not empty.
    """

    start: float
    end: float
    text: str


class CaptionCollector:
    """Puts the events of a stream together to captions, one per frame that has text.

    Answers to questions are no captions.
    """

    def __init__(self) -> None:
        self._pieces = ""
        self._latest: CaptionEvent | None = None

    def add(self, event: CaptionEvent) -> Caption | None:
        """Take one event; the caption that it completes, if any."""
        if event.kind == "text":
            interrupted = self._latest is not None and self._latest.frame_index != event.frame_index
            before = self.finish() if interrupted else None
            self._pieces += event.text
            self._latest = event
            return before
        return self.finish() if event.kind == "end" else None

    def finish(self) -> Caption | None:
        """The caption of a frame that was interrupted, if it has any text."""
        event, text = self._latest, self._pieces.strip()
        self._latest, self._pieces = None, ""
        return Caption(event.start, event.end, text) if event is not None and text else None


class CaptionWriter(ABC):
    """Writes the events of a stream to a file while they come.

    Args:
        path: name of the file.
        overwrite: whether to replace a file that exists.

    Raises:
        ValueError: if the file exists and isn't to be replaced, or its folder doesn't exist.
    """

    def __init__(self, path: str | os.PathLike[str], *, overwrite: bool = False):
        self.path = check_output(path, (Path(path).suffix.lower(),), overwrite)
        self._file = FileIO(self.path, "wb")

    @abstractmethod
    def write(self, event: CaptionEvent) -> None:
        """Take one event; what it completes is in the file when this returns."""

    def close(self) -> None:
        """Write what was said about a frame that was interrupted, and close the file."""
        self._file.close()

    def __enter__(self) -> CaptionWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class JsonLinesWriter(CaptionWriter):
    """All events, one JSON object per line, with the fields of `CaptionEvent`; times are exact."""

    def write(self, event: CaptionEvent) -> None:
        self._file.write(json.dumps(asdict(event), ensure_ascii=False).encode() + b"\n")


class _CueWriter(CaptionWriter):
    """Captions as cues; see `VttWriter`."""

    _header = ""

    def __init__(self, path: str | os.PathLike[str], *, words: bool = False, overwrite: bool = False):
        super().__init__(path, overwrite=overwrite)
        self.words = words
        self._captions = CaptionCollector()
        # The last caption, whose end may change; what comes before it in the file stays.
        self._last: _Placed | None = None
        self._file.write(self._header.encode())

    def write(self, event: CaptionEvent) -> None:
        caption = self._captions.add(event)
        if caption is not None:
            self._append(caption)
        if event.question is None and event.frame_index >= 0:  # else a problem of the input, not a frame
            self._cut(Fraction(event.start))

    def close(self) -> None:
        if not self._file.closed:
            self._store()
            caption = self._captions.finish()
            if caption is not None:
                self._append(caption)
        super().close()

    def _append(self, caption: Caption) -> None:
        lines = (_CONTROLS.sub(" ", line).strip() for line in _LINE_BREAKS.split(caption.text))
        text = "\n".join(line for line in lines if line)
        if not text:
            return
        start = Fraction(caption.start)
        self._cut(start)
        self._store()  # what an interruption may have kept from the file
        last = self._last
        if last is None:
            position, num_before = len(self._header), 0
        else:
            position, num_before = last.position + len(last.data), last.num_before + last.num_cues
            start = max(start, last.timed.end)
        timed = _Timed(start, max(Fraction(caption.end), start + _SHORTEST), text)
        self._last = self._placed(timed, position, num_before)
        self._store()

    def _cut(self, moment: Fraction) -> None:
        """Let the last caption end when the next frame comes."""
        if self._last is None or moment <= self._last.timed.start:
            return
        timed = self._last.timed
        moment = max(moment, timed.start + _SHORTEST)
        if moment >= timed.end:
            return
        self._last = self._placed(timed._replace(end=moment), self._last.position, self._last.num_before)
        self._store()

    def _store(self) -> None:
        """Bring the last caption into the file as it is known now; harmless when repeated.

        A caption that has become shorter, as fewer cues have room, is written with blank lines in place of the rest,
        which are cut off then: so there is no moment at which the file lacks it or has it by half.
        """
        if self._last is None:
            return
        _, position, _, data, _ = self._last
        size = self._file.seek(0, os.SEEK_END)
        self._file.seek(position)
        self._file.write(data.ljust(size - position, b"\n"))
        self._file.truncate(position + len(data))

    def _placed(self, timed: _Timed, position: int, num_before: int) -> _Placed:
        cues = list(self._cues(timed))
        data = "".join(self._cue(num_before + number, cue) for number, cue in enumerate(cues, 1)).encode()
        return _Placed(timed, position, num_before, data, len(cues))

    @abstractmethod
    def _cues(self, timed: _Timed) -> Iterator[_Timed]:
        """The cues of a caption; their texts are as they stand in the file."""

    @abstractmethod
    def _cue(self, number: int, cue: _Timed) -> str:
        """One cue as it stands in the file."""


class SrtWriter(_CueWriter):
    """SubRip subtitles; the arguments are those of `VttWriter`. Words appear as cues of their own."""

    def _cues(self, timed: _Timed) -> Iterator[_Timed]:
        # A reader would take the arrow for a line of times. Markup has no escape; an invisible character breaks it.
        text = _SRT_MARKUP.sub(lambda match: match[0] + _WORD_JOINER, timed.text.replace("-->", "→"))
        if not self.words:
            yield timed._replace(text=text)
            return
        words, shown = _words(text), ""
        moments = [*_word_times(timed, len(words)), timed.end]
        cues: list[_Timed] = []
        for word, (start, end) in zip(words, pairwise(moments), strict=True):
            shown += word
            if _milliseconds(start) < _milliseconds(end):
                cues.append(_Timed(start, end, shown.rstrip()))
        # Words that have no time of their own appear with the next one, the last ones with the one before.
        yield from cues[:-1]
        yield cues[-1]._replace(text=text)

    def _cue(self, number: int, cue: _Timed) -> str:
        return f"{number}\n{_clock(cue.start, ',')} --> {_clock(cue.end, ',')}\n{cue.text}\n\n"


class VttWriter(_CueWriter):
    """WebVTT subtitles, the form that browsers play.

    A cue begins with its frame and ends when the next one is due, or earlier if one comes earlier.

    Args:
        path: name of the file.
        words: whether the words of a caption appear one after the other, evenly spaced over its time.
        overwrite: whether to replace a file that exists.

    Raises:
        ValueError: if the file exists and isn't to be replaced, or its folder doesn't exist.
    """

    _header = "WEBVTT\n\n"

    def _cues(self, timed: _Timed) -> Iterator[_Timed]:
        words = [html.escape(word, quote=False) for word in _words(timed.text)]
        if self.words:
            moments = _word_times(timed, len(words))
            # A time inside a cue has to be later than the ones before it.
            words = [
                f"<{_clock(moment, '.')}>{word}" if _milliseconds(moment) > _milliseconds(before) else word
                for word, moment, before in zip(words, moments, [timed.start, *moments], strict=False)
            ]
        yield timed._replace(text="".join(words))

    def _cue(self, number: int, cue: _Timed) -> str:
        return f"{_clock(cue.start, '.')} --> {_clock(cue.end, '.')}\n{cue.text}\n\n"


WRITERS: dict[str, type[CaptionWriter]] = {".srt": SrtWriter, ".vtt": VttWriter, ".jsonl": JsonLinesWriter}


def caption_writer(path: str | os.PathLike[str], *, words: bool = False, overwrite: bool = False) -> CaptionWriter:
    """The writer for a file name that ends in .srt, .vtt or .jsonl.

    Args:
        path: name of the file.
        words: whether the words of a caption appear one after the other; in subtitles only.
        overwrite: whether to replace a file that exists.

    Raises:
        ValueError: if the name has another ending, the file exists and isn't to be replaced, or its folder doesn't
            exist.
    """
    kind = WRITERS[check_output(path, WRITERS, overwrite).suffix.lower()]
    if issubclass(kind, _CueWriter):
        return kind(path, words=words, overwrite=overwrite)
    return kind(path, overwrite=overwrite)


def check_output(
    path: str | os.PathLike[str],
    endings: Iterable[str],
    overwrite: bool,
    inputs: Iterable[str | os.PathLike[str]] = (),
) -> Path:
    """Check that a file can be made.

    Args:
        path: name of the file.
        endings: endings that its name may have.
        overwrite: whether to replace a file that exists.
        inputs: files that are read meanwhile, which are never replaced; names of anything else are ignored.

    Raises:
        ValueError: if its name has none of these endings, it is one of the inputs, it exists and isn't to be replaced,
            or its folder doesn't exist.
    """
    path = Path(path)
    if path.suffix.lower() not in endings:
        raise ValueError(f"The file name {str(path)!r} must end in {' or '.join(endings)}.")
    if path.exists() and any(os.path.exists(file) and path.samefile(file) for file in inputs):
        raise ValueError(f"{str(path)!r} is the input itself; expected a new name. Choose another.")
    if path.exists() and not (overwrite and path.is_file()):
        way_out = "Choose another." if path.is_dir() else "Choose another, or add overwrite=True."
        raise ValueError(f"{str(path)!r} exists; expected a new name. {way_out}")
    if not path.parent.is_dir():
        raise ValueError(f"The folder {str(path.parent)!r} for {path.name!r} doesn't exist; make it first.")
    return path


class _Timed(NamedTuple):
    """A text with its exact time, in seconds."""

    start: Fraction
    end: Fraction
    text: str


class _Placed(NamedTuple):
    """A caption in a file.

    Attributes:
        timed: text and time.
        position: index of its first byte in the file.
        num_before: number of cues before it.
        data: its own cues as they stand in the file.
        num_cues: number of its cues.
    """

    timed: _Timed
    position: int
    num_before: int
    data: bytes
    num_cues: int


def _milliseconds(seconds: Fraction) -> int:
    """Halves are rounded up; times before 0 are 0."""
    return max(0, int(seconds * 1000 + Fraction(1, 2)))


def _clock(time: Fraction, point: str) -> str:
    seconds, milliseconds = divmod(_milliseconds(time), 1000)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{seconds:02}{point}{milliseconds:03}"


def _words(text: str) -> list[str]:
    """Words with the white space behind them."""
    return re.findall(r"\S+\s*", text)


def _word_times(timed: _Timed, count: int) -> list[Fraction]:
    """When each of `count` words appears."""
    return [timed.start + index * (timed.end - timed.start) / count for index in range(count)]
