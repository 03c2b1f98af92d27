# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Overlay videos: which frames carry which caption, the sound, and what an interruption leaves."""

from __future__ import annotations

import multiprocessing
import weakref
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from casa_hf import CaptionEvent
from casa_hf.overlay import Overlay, OverlayWriter, captioned
from casa_hf.video import Frame, open_video
from tests.clips import numbers, picture, write_clip

av = pytest.importorskip("av")

BUNNY = Path(__file__).parents[1] / "examples" / "assets" / "bunny.mp4"
SIZE = (160, 120)


def tell(overlay: Overlay, index: int, start: float, text: str, fps: float = 2) -> None:
    """The events of a frame."""
    end = start + 1 / fps
    if text:
        overlay.write(CaptionEvent("text", index, start, end, 0.1, text))
    overlay.write(CaptionEvent("end", index, start, end, 0.1, text))


def decoded(path: Path) -> list[tuple[float, np.ndarray]]:
    with av.open(str(path)) as container:
        return [(frame.time, np.asarray(frame.to_image())) for frame in container.decode(video=0)]


def has_caption(image: np.ndarray) -> bool:
    """A caption is white letters on a dark ground in the lower third; the clips are red there."""
    lower = image[image.shape[0] * 2 // 3 :].astype(int)
    return bool((lower.min(axis=2) > 150).sum() > 20)


@pytest.fixture(scope="module")
def red(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 seconds at 10 frames per second with sound, all red."""
    path = tmp_path_factory.mktemp("clips") / "red.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
        sound = container.add_stream("aac", rate=48_000, layout="mono")
        for _ in range(30):
            plain = np.broadcast_to(np.array([200, 0, 0], np.uint8), (SIZE[1], SIZE[0], 3))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(plain), format="rgb24")))
        container.mux(stream.encode())
        tone = av.AudioFrame.from_ndarray(np.zeros((1, 144_000), np.float32), format="fltp", layout="mono")
        tone.rate = 48_000
        container.mux(sound.encode(tone))
        container.mux(sound.encode())
    return path


@pytest.mark.parametrize("ending", ["mp4", "mkv"])
def test_every_frame_is_there_and_carries_the_caption_of_its_time(red, tmp_path, ending):
    source = open_video(red, fps=2, start=0.5)
    overlay = Overlay(source, tmp_path / f"out.{ending}")
    texts = {0.5: "first words", 1.0: "", 1.5: "then more", 2.0: "and", 2.5: ""}
    for index, frame in enumerate(source):
        tell(overlay, index, frame.timestamp, texts[frame.timestamp])
        assert not (tmp_path / f"out.{ending}").exists(), "there is no file before it is whole"
    overlay.close()
    assert overlay.note == "" and [path.name for path in tmp_path.iterdir()] == [f"out.{ending}"]
    frames = decoded(tmp_path / f"out.{ending}")
    assert [round(time, 2) for time, _ in frames] == [round(index / 10, 2) for index in range(25)]
    # 0.5 s of the source is where this one begins.
    assert [has_caption(image) for _, image in frames] == [True] * 5 + [False] * 5 + [True] * 10 + [False] * 5


def test_the_sound_is_copied_packet_by_packet(red, tmp_path):
    def packets(path: Path) -> list[tuple[float, bytes]]:
        with av.open(str(path)) as container:
            found = container.demux(container.streams.audio[0])
            return [(float(packet.pts * packet.time_base), bytes(packet)) for packet in found if packet.size]

    for source, begin in ((red, 0.0), (BUNNY, 2.0)):
        out = tmp_path / f"{source.stem}.mp4"
        Overlay(open_video(source, fps=2, start=begin), out).close()
        original, copied = packets(source), packets(out)
        assert len(copied) > 90
        expected = [(time - begin, data) for time, data in original if time >= begin][: len(copied)]
        assert [data for _, data in copied] == [data for _, data in expected]
        # The first packet of a fragmented file begins at 0.
        assert np.allclose([time for time, _ in copied], [time for time, _ in expected], atol=0.01)


def test_sound_that_does_not_fit_is_left_out_and_said(tmp_path):
    clip = write_clip(tmp_path / "clip.avi", 10, 10, "mpeg4", sound="pcm_mulaw")
    overlay = Overlay(open_video(clip, fps=2), tmp_path / "out.mp4")
    overlay.close()
    assert "pcm_mulaw" in overlay.note and "without sound" in overlay.note
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert not container.streams.audio
    assert numbers([image for _, image in decoded(tmp_path / "out.mp4")]) == list(range(10))


def test_an_interruption_ends_the_video_with_its_captions(red, tmp_path):
    overlay = Overlay(open_video(red, fps=2), tmp_path / "out.mp4")
    tell(overlay, 0, 0.0, "words")
    overlay.write(CaptionEvent("text", 1, 0.5, 1.0, 0.1, "cut sh"))
    overlay.close(interrupted=True)
    frames = decoded(tmp_path / "out.mp4")
    assert len(frames) == 10 and all(has_caption(image) for _, image in frames)
    empty = Overlay(open_video(red, fps=2), tmp_path / "none.mp4")
    empty.close(interrupted=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"], "nothing was captioned"


def test_frames_of_a_live_source_are_those_that_were_shown(tmp_path):
    source = open_video("lavfi:testsrc=size=160x120:rate=50,realtime", fps=10)
    with source:
        overlay = Overlay(source, tmp_path / "out.mp4")
        images = [picture(1, 159, 121), picture(3, 320, 100), picture(5, 159, 121)]
        for index, image in enumerate(images):
            overlay.show(Frame(index / 10, image))
            tell(overlay, index, index / 10, "words" if index == 1 else "", fps=10)
        overlay.close()
    frames = decoded(tmp_path / "out.mp4")
    assert [round(time, 2) for time, _ in frames] == [0.0, 0.1, 0.2]
    assert [image.shape for _, image in frames] == [(122, 160, 3)] * 3, "even sides; later sizes are fitted"
    assert numbers([frames[2][1][:121, :159]]) == [5]


def test_frames_that_are_no_pictures_are_left_out_and_not_kept(tmp_path):
    source = open_video([picture(0)], fps=10)
    overlay = Overlay(source, tmp_path / "out.mp4")
    kept = []

    def corrupt(index: int) -> None:
        frame = Frame(index / 10, np.full((2, 2), np.nan))
        kept.append(weakref.ref(frame.image))
        overlay.show(frame)
        overlay.write(CaptionEvent("error", index, frame.timestamp, frame.timestamp + 0.1, 0.1, message="no picture"))

    corrupt(0)
    overlay.show(Frame(0.1, picture(1)))
    tell(overlay, 1, 0.1, "words", fps=10)
    # A problem of the source, which may be later than the next frame.
    overlay.write(CaptionEvent("error", -1, 0.3, 0.4, 0.0, message="a part can't be decoded"))
    for index in range(2, 8):
        corrupt(index)
        assert [reference() for reference in kept] == [None] * index
    overlay.show(Frame(0.8, np.full((2, 2), np.nan)))  # whatever the stream makes of it
    tell(overlay, 8, 0.8, "", fps=10)
    overlay.show(Frame(0.9, picture(9)))
    tell(overlay, 9, 0.9, "", fps=10)
    overlay.close()
    frames = decoded(tmp_path / "out.mp4")
    # A fragmented file begins at 0.
    assert [round(time, 2) for time, _ in frames] == [0.0, 0.8]
    assert numbers([frames[1][1]]) == [9]


def test_long_captions_are_broken_into_lines_inside_the_picture():
    image = Image.new("RGB", (320, 180), (200, 0, 0))
    short, long = (np.asarray(captioned(image, text)) for text in ("word", "many words one after the other " * 9))
    changed = [np.nonzero((drawn != np.asarray(image)).any(axis=2)) for drawn in (short, long)]
    heights = [rows.max() - rows.min() for rows, _ in changed]
    assert heights[1] > 2 * heights[0] and heights[1] < 90
    assert changed[1][1].min() >= 0 and changed[1][1].max() < 319
    assert np.array_equal(short[:100], np.asarray(image)[:100])


def write_for_ever(path: str, go: Connection) -> None:
    writer = OverlayWriter(path)
    for index in count():
        writer.write(Frame(index / 10, picture(index % 256)), "")
        if index == 300:
            go.send("go")


def test_a_process_that_is_killed_leaves_a_video_that_plays(tmp_path):
    here, there = multiprocessing.Pipe()
    target = multiprocessing.get_context("fork").Process(
        target=write_for_ever, args=(str(tmp_path / "out.mp4"), there)
    )
    target.start()
    assert here.recv() == "go"
    target.kill()
    target.join()
    (left,) = tmp_path.iterdir()
    assert left.name == ".out.incomplete.mp4"
    frames = decoded(left)
    assert len(frames) > 100
    assert numbers([image for _, image in frames[:100]]) == list(range(100))


@pytest.mark.parametrize(
    ("name", "message"), [("a.avi", r"must end in \.mp4 or \.mov or \.mkv"), ("no/a.mp4", "doesn't exist")]
)
def test_wrong_names(tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        OverlayWriter(tmp_path / name)
    (tmp_path / "old.mp4").write_text("old")
    with pytest.raises(ValueError, match=r"old\.mp4' exists"):
        OverlayWriter(tmp_path / "old.mp4")
    OverlayWriter(tmp_path / "old.mp4", overwrite=True).close()
    assert (tmp_path / "old.mp4").read_text() == "old", "without a frame there is no video"
    assert [path.name for path in tmp_path.iterdir()] == ["old.mp4"]
