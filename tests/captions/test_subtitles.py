# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Subtitle files: read back by FFmpeg, which shares no code with the writers, at every moment of their making."""

from __future__ import annotations

import html
import json
import multiprocessing
import re
import signal
import sys
from dataclasses import asdict
from decimal import ROUND_HALF_UP, Decimal
from itertools import count, pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from casa_hf import CaptionEvent
from casa_hf.captions import subtitles
from casa_hf.captions.subtitles import SrtWriter, VttWriter, caption_writer

av = pytest.importorskip("av")

FPS = 2
# Frames come at their own times: a little early, a little late, with a pause, and hours later.
STARTS = [0.0, 0.4807, 1.0004999, 1.5015, 1.968633, 4.5, 7200.0005, 7200.9]
TEXTS = [
    "A cat & a <b>dog</b>",
    "is --> here\r\n\r\n\r\nand 1 < 2,\x00 {\\an8}too",
    "",
    "  42  ",
    "漢字 → naïve",
    "\n\n",
    "one\u2028two\x85three",
    "the end &amp; more",
]


def frame(index: int, start: float, text: str) -> list[CaptionEvent]:
    """The events of a frame; its text comes in two pieces."""
    end = start + 1 / FPS
    middle = len(text) // 2
    pieces = [piece for piece in (text[:middle], text[middle:]) if piece]
    return [
        *(CaptionEvent("text", index, start, end, 0.1, piece, (5,)) for piece in pieces),
        CaptionEvent("end", index, start, end, 0.2, text, (5, 6)),
    ]


def read_back(path: Path) -> list[tuple[int, int, str]]:
    """Start and end in milliseconds and text of every cue, as FFmpeg reads the file."""
    cues = []
    with av.open(str(path)) as container:
        for packet in container.demux(container.streams.subtitles[0]):
            if packet.size:
                base = packet.time_base * 1000
                cues.append(
                    (int(packet.pts * base), int((packet.pts + packet.duration) * base), bytes(packet).decode())
                )
    return cues


def shown(text: str, name: str = "captions.vtt") -> str:
    """What a viewer sees of a cue."""
    return text.replace("\u2060", "") if name.endswith("srt") else html.unescape(re.sub(r"<[\d:.]+>", "", text))


def milliseconds(seconds: float) -> int:
    return int((Decimal(seconds) * 1000).to_integral_value(ROUND_HALF_UP))


def expected_cues(starts: list[float], texts: list[str], arrow: str) -> list[tuple[int, int, str]]:
    cues = []
    for index, (start, text) in enumerate(zip(starts, texts, strict=True)):
        lines = [re.sub(r"[\x00-\x1f]", " ", line).strip() for line in re.split(r"[\r\n\u2028\x85]+", text)]
        visible = "\n".join(line for line in lines if line).replace("-->", arrow)
        after = starts[index + 1] if index + 1 < len(starts) else float("inf")
        if visible:
            cues.append((milliseconds(start), milliseconds(min(start + 1 / FPS, after)), visible))
    return cues


@pytest.mark.parametrize(("name", "arrow"), [("captions.srt", "→"), ("captions.vtt", "-->")])
def test_cues_are_right_to_the_millisecond_and_at_every_moment(tmp_path, name, arrow):
    path = tmp_path / name
    with caption_writer(path) as writer:
        for index, (start, text) in enumerate(zip(STARTS, TEXTS, strict=True)):
            for event in frame(index, start, text):
                writer.write(event)
            so_far = expected_cues(STARTS[: index + 1], TEXTS[: index + 1], arrow)
            found = read_back(path) if so_far else []
            assert [(begin, end, shown(said, name)) for begin, end, said in found] == so_far
    cues = read_back(path)
    assert len(cues) == 6
    assert all(begin < end for begin, end, _ in cues)
    assert all(one[1] <= other[0] for one, other in pairwise(cues))
    assert cues[0][1] == 481, "the next frame came before 0.5 s"


@pytest.mark.parametrize("name", ["captions.srt", "captions.vtt"])
def test_markup_in_a_caption_styles_nothing(tmp_path, name):
    """FFmpeg's own decoder turns markup into styles and strips them: what is left is the whole text."""
    text = "a <b>c</b> & <i>d 1 < 2"
    with caption_writer(tmp_path / name) as writer:
        for event in frame(0, 0.0, text):
            writer.write(event)
    with av.open(str(tmp_path / name)) as container:
        stream = container.streams.subtitles[0]
        (packet,) = [packet for packet in container.demux(stream) if packet.size]
        (line,) = [rect.ass.decode() for rect in packet.decode()]
    assert line.split(",", 8)[8].replace("\u2060", "") == text


def test_words_one_after_the_other_in_srt(tmp_path):
    path = tmp_path / "captions.srt"
    with caption_writer(path, words=True) as writer:
        for index, (start, text) in enumerate([(0.0, "one two\nthree"), (0.48, "four"), (0.98, "five six")]):
            for event in frame(index, start, text):
                writer.write(event)
    cues = [(begin, end, shown(text, path.name)) for begin, end, text in read_back(path)]
    assert cues == [
        (0, 160, "one"),
        (160, 320, "one two"),
        (320, 480, "one two\nthree"),
        (480, 980, "four"),
        (980, 1230, "five"),
        (1230, 1480, "five six"),
    ]
    assert re.findall(r"^\d+$", path.read_text("utf-8"), re.MULTILINE) == list("123456")


def test_words_one_after_the_other_in_vtt(tmp_path):
    path = tmp_path / "captions.vtt"
    with caption_writer(path, words=True) as writer:
        for index, (start, text) in enumerate([(0.0, "one & two\nthree"), (0.48, "four")]):
            for event in frame(index, start, text):
                writer.write(event)
    assert read_back(path) == [
        (0, 480, "one <00:00:00.120>&amp; <00:00:00.240>two\n<00:00:00.360>three"),
        (480, 980, "four"),
    ]


@pytest.mark.parametrize("name", ["captions.srt", "captions.vtt"])
def test_more_words_than_milliseconds(tmp_path, name):
    """The next frame comes after 3 ms: words that have no time left appear with the one before."""
    with caption_writer(tmp_path / name, words=True) as writer:
        for index, (start, text) in enumerate([(0.0, "a b c d e f g h"), (0.003, "x"), (0.0031, "y")]):
            for event in frame(index, start, text):
                writer.write(event)
    cues = read_back(tmp_path / name)
    assert all(begin < end for begin, end, _ in cues)
    assert all(one[1] <= other[0] for one, other in pairwise(cues))
    assert cues[0][0] == 0 and cues[-1][1] == 503
    texts = [shown(text) for _, _, text in cues]
    assert texts[-2:] == ["x", "y"] and texts[-3] == "a b c d e f g h"


def test_interrupted_frames_answers_and_frames_without_captions(tmp_path):
    """An answer is no caption; what was said before an interruption is."""
    events: list[CaptionEvent] = [
        *frame(0, 0.0, "first")[:-1],  # no end: the frame was cut short
        CaptionEvent("answer", 0, 0.0, 0.5, 0.1, "an answer", question="What?"),
        CaptionEvent("answered", 0, 0.0, 0.5, 0.1, "an answer", question="What?"),
        CaptionEvent("dropped", 1, 0.5, 1.0, 0.0, message="late"),
        CaptionEvent("error", 2, 1.0, 1.5, 0.0, message="broken"),
        *frame(3, 1.5, "second")[:-1],
        *frame(4, 1.75, "third")[:-1],
    ]
    for kind in (SrtWriter, VttWriter):
        with kind(tmp_path / kind.__name__) as writer:
            for event in events:
                writer.write(event)
        (tmp_path / kind.__name__).rename(path := tmp_path / f"{kind.__name__}.{kind.__name__[:3].lower()}")
        assert read_back(path) == [(0, 500, "first"), (1500, 1750, "second"), (1750, 2250, "third")]
    with caption_writer(tmp_path / "events.jsonl") as writer:
        for event in events:
            writer.write(event)
    lines = (tmp_path / "events.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        asdict(event) | {"token_ids": list(event.token_ids)} for event in events
    ]


@pytest.mark.parametrize("name", ["captions.srt", "captions.vtt"])
def test_only_a_frame_ends_the_caption_before_it(tmp_path, name):
    """Not a problem of the source, nor an answer; but a frame that wasn't looked at, or couldn't be."""
    for event, end in (
        (CaptionEvent("error", -1, 10.1, 10.6, 0.0, message="a part can't be decoded"), 10_500),
        (CaptionEvent("answer", 0, 10.1, 10.6, 0.0, "yes", question="Is it?"), 10_500),
        (CaptionEvent("error", -1, 10.1, 10.6, 0.0, message="a mark of an image", question="Is it?"), 10_500),
        (CaptionEvent("error", 1, 10.1, 10.6, 0.0, message="no picture"), 10_100),
        (CaptionEvent("dropped", 1, 10.1, 10.6, 0.0, message="the model was busy"), 10_100),
    ):
        with caption_writer(tmp_path / name, overwrite=True) as writer:
            for each in (*frame(0, 10.0, "hello"), event):
                writer.write(each)
        assert [cue[:2] for cue in read_back(tmp_path / name)] == [(10_000, end)], event


@pytest.mark.parametrize("name", ["captions.srt", "captions.vtt"])
def test_an_interruption_at_any_line_of_code_loses_no_caption(tmp_path, name):
    """The second frame comes so early that the words of the first one no longer have cues of their own.

    Ctrl-C comes before each line that the writer runs for the second frame, one after the other. What is in the file
    then is what a killed process leaves; what is there after `close` is what an interrupted one does.
    """
    path = tmp_path / name

    def captions_after(num_lines: int) -> bool:
        """Whether Ctrl-C came before the second frame was done."""
        left = num_lines
        interrupted = False

        def trace(stack: FrameType, event: str, _: Any) -> Any:
            nonlocal left, interrupted
            if stack.f_code.co_filename != subtitles.__file__:
                return None
            left -= event == "line"
            if left < 0 and not interrupted:
                interrupted = True
                check(path)
                raise KeyboardInterrupt
            return trace

        with caption_writer(path, words=True, overwrite=True) as writer:
            for event in frame(0, 1.0, "a b c d e f g h"):
                writer.write(event)
            for number, event in enumerate(frame(1, 1.004, "x y")):
                before = sys.gettrace()
                sys.settrace(trace)
                try:
                    writer.write(event)
                except KeyboardInterrupt:
                    # Also to a program that catches it and goes on.
                    for last in frame(2, 1.5, "z") if number else []:
                        writer.write(last)
                    break
                finally:
                    sys.settrace(before)
        check(path)
        return interrupted

    def check(path: Path) -> None:
        assert b"\0" not in path.read_bytes()
        cues = read_back(path)
        assert cues[0][0] == 1000 and all(one[1] <= other[0] for one, other in pairwise(cues))
        texts = [shown(text) for _, _, text in cues]
        first = [text for text in texts if text.startswith("a")]
        assert first[-1] == "a b c d e f g h"
        assert set(texts[len(first) :]) <= {"x", "x y", "z"}, "and nothing that is half"

    assert captions_after(20)
    interruptions = 0
    while captions_after(interruptions):
        interruptions += 1
    assert interruptions > 60


def write_for_ever(paths: list[str], go: Connection) -> None:
    writers = [caption_writer(path, words="words" in path) for path in paths]
    for index in count():
        for kind in ("text", "end"):
            for writer in writers:
                start = index / 4
                writer.write(CaptionEvent(kind, index, start, start + 0.3, 0.0, f"caption number {index}"))
        if index == 200:
            go.send("go")


def test_a_process_that_is_killed_leaves_whole_files(tmp_path):
    paths = [tmp_path / name for name in ("a.srt", "a.vtt", "a.jsonl", "words.srt")]
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=write_for_ever, args=([*map(str, paths)], there))
    process.start()
    assert here.recv() == "go"
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    for path in paths[:2]:
        cues = read_back(path)
        assert len(cues) >= 200
        for index, (begin, end, text) in enumerate(cues):
            assert (begin, text) == (250 * index, f"caption number {index}")
            assert end == begin + (250 if index + 1 < len(cues) else 300) or index + 1 == len(cues)
    lines = paths[2].read_bytes().splitlines(keepends=True)
    assert len(lines) >= 400
    assert [json.loads(line)["frame_index"] for line in lines[:-1]] == [index // 2 for index in range(len(lines) - 1)]
    assert [text for _, _, text in read_back(paths[3])][:3] == ["caption", "caption number", "caption number 0"]


def test_files_are_not_replaced_by_mistake(tmp_path):
    path = tmp_path / "captions.srt"
    path.write_text("hours of work")
    with pytest.raises(ValueError, match=r"captions\.srt' exists; expected a new name"):
        caption_writer(path)
    assert path.read_text() == "hours of work"
    with caption_writer(path, overwrite=True):
        assert path.read_bytes() == b""
    with pytest.raises(ValueError, match=r"nowhere' for 'a\.srt' doesn't exist"):
        caption_writer(tmp_path / "nowhere" / "a.srt")
    with pytest.raises(ValueError, match=r"a\.txt' must end in \.srt or \.vtt or \.jsonl"):
        caption_writer(tmp_path / "a.txt")
    with pytest.raises(ValueError, match=r"exists; expected a new name\. Choose another\.$"):
        (tmp_path / "folder.srt").mkdir()
        caption_writer(tmp_path / "folder.srt", overwrite=True)
