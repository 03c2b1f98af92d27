# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Overlay videos: which frames carry which caption, the sound, and what an interruption leaves."""

from __future__ import annotations

import math
import multiprocessing
import shutil
import sys
import weakref
from collections.abc import Iterator
from fractions import Fraction
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from casa_hf import CaptionEvent
from casa_hf.captions import overlay as overlay_module
from casa_hf.captions.drawing import _font, _lines, _loaded, captioned
from casa_hf.captions.overlay import _ENCODERS, Overlay, OverlayWriter
from casa_hf.video import Frame, open_video
from tests.clips import every_kind, numbers, picture, write_clip

av = pytest.importorskip("av")

BUNNY = Path(__file__).parents[2] / "examples" / "assets" / "bunny.mp4"
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


def mux_silence(container: Any, sound: Any, seconds: int) -> None:
    """All of a stream of sound at 48 kHz."""
    tone = av.AudioFrame.from_ndarray(np.zeros((1, 48_000 * seconds), np.float32), format="fltp", layout="mono")
    tone.rate = 48_000
    container.mux(sound.encode(tone))
    container.mux(sound.encode())


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
        mux_silence(container, sound, 3)
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


def test_a_source_is_opened_for_its_sound_as_for_its_images(tmp_path):
    """Neither a device nor raw pixels can be opened by their names alone."""
    tone = "lavfi:testsrc=size=64x48:rate=10:duration=2[out0];sine=duration=2[out1]"
    overlay = Overlay(open_video(tone, fps=2, live=False), tmp_path / "tone.mkv")
    overlay.close()
    assert overlay.note == ""
    with av.open(str(tmp_path / "tone.mkv")) as container:
        assert len(list(container.decode(video=0))) == 20
    with av.open(str(tmp_path / "tone.mkv")) as container:
        assert sum(frame.samples for frame in container.decode(audio=0)) == 2 * 44_100
    grey = [np.full(64 * 48 * 3 // 2, 20 * index, np.uint8) for index in range(10)]
    (tmp_path / "raw.yuv").write_bytes(np.concatenate(grey).tobytes())
    source = open_video(tmp_path / "raw.yuv", fps=2, options={"video_size": "64x48", "framerate": "4"})
    overlay = Overlay(source, tmp_path / "raw.mp4")
    overlay.close()
    assert [time for time, _ in decoded(tmp_path / "raw.mp4")] == [index / 4 for index in range(10)]


def test_sound_that_cannot_be_opened_is_left_out_and_said(tmp_path):
    with OverlayWriter(tmp_path / "out.mp4", audio=str(tmp_path / "nowhere.mp4")) as writer:
        for index in range(3):
            writer.write(Frame(index / 2, picture(index)), "")
    assert writer.note.startswith("the sound can't be read: The video '") and "nowhere.mp4" in writer.note
    assert writer.note.endswith("; the video is without sound")
    assert numbers([image for _, image in decoded(tmp_path / "out.mp4")]) == [0, 1, 2]


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


def test_frames_that_are_no_images_are_left_out_and_not_kept(tmp_path):
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
    assert overlay.note.startswith("1 frame couldn't be drawn; the first was that at 0.800 s (ValueError: The image")


def test_frames_of_every_kind_are_drawn_as_the_model_sees_them(tmp_path):
    """A camera's frames are what an iterator yields."""
    (tmp_path / "frames").mkdir()
    kinds = [list(every_kind(index, tmp_path / "frames" / f"{index}.png").values()) for index in range(20)]
    shown = [frames[index % len(frames)] for index, frames in enumerate(kinds)]
    overlay = Overlay(open_video(iter(shown), live=True), tmp_path / "out.mp4")
    for index, image in enumerate(shown):
        overlay.show(Frame(index / 10, image))
        tell(overlay, index, index / 10, "", fps=10)
    overlay.close()
    assert overlay.written and overlay.note == ""
    assert numbers([image for _, image in decoded(tmp_path / "out.mp4")]) == list(range(20))


def test_frames_are_drawn_as_they_were_when_they_were_shown(tmp_path):
    """Also where the next one has come into the same file or buffer by the time its captions are done."""
    for kind in ("file", "array"):
        file, buffer = tmp_path / "latest.png", np.zeros_like(picture(0))
        overlay = Overlay(open_video([buffer], live=True), tmp_path / f"{kind}.mp4")
        for index in range(4):
            buffer[:] = picture(index)
            Image.fromarray(buffer).save(file)
            overlay.show(Frame(index / 2, file if kind == "file" else buffer))
            tell(overlay, index, index / 2, "")
        overlay.show(Frame(2.0, tmp_path / "later.png"))
        Image.fromarray(picture(9)).save(tmp_path / "later.png")
        overlay.close()
        (tmp_path / "later.png").unlink()
        assert numbers([image for _, image in decoded(tmp_path / f"{kind}.mp4")]) == [0, 1, 2, 3]
        assert overlay.note.startswith("1 frame couldn't be drawn; the first was that at 2.000 s")


def test_frames_that_cannot_be_drawn_are_counted_and_the_first_one_is_explained(tmp_path):
    overlay = Overlay(open_video([picture(0)]), tmp_path / "out.mp4")
    for index, image in enumerate((picture(1), "nowhere.png", picture(3), np.full((4, 4, 3), -1), None)):
        overlay.show(Frame(index / 2, image))
        tell(overlay, index, index / 2, "")
    overlay.close()
    assert numbers([image for _, image in decoded(tmp_path / "out.mp4")]) == [1, 3]
    assert overlay.note.startswith("3 frames couldn't be drawn; the first was that at 0.500 s (ValueError: The image")
    assert "nowhere.png" in overlay.note
    nothing = Overlay(open_video([picture(0)]), tmp_path / "none.mp4")
    nothing.show(Frame(0.0, None))
    tell(nothing, 0, 0.0, "words")
    nothing.close()
    assert not nothing.written and "1 frame couldn't be drawn" in nothing.note


def test_long_captions_are_broken_into_lines_inside_the_image():
    image = Image.new("RGB", (320, 180), (200, 0, 0))
    short, long = (np.asarray(captioned(image, text)) for text in ("word", "many words one after the other " * 9))
    changed = [np.nonzero((drawn != np.asarray(image)).any(axis=2)) for drawn in (short, long)]
    heights = [rows.max() - rows.min() for rows, _ in changed]
    assert heights[1] > 2 * heights[0] and heights[1] < 90
    assert changed[1][1].min() >= 0 and changed[1][1].max() < 319
    assert np.array_equal(short[:100], np.asarray(image)[:100])


FONTS = Path(pytest.importorskip("matplotlib").get_data_path()) / "fonts" / "ttf"
PLAIN = Image.new("RGB", (320, 180), (200, 0, 0))


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The system's only folder of fonts; empty."""
    if not sys.platform.startswith("linux"):
        pytest.skip("other systems say with no variable where their fonts are")
    for variable in ("XDG_DATA_HOME", "XDG_DATA_DIRS"):
        monkeypatch.setenv(variable, str(tmp_path / "share"))
    folder = tmp_path / "share" / "fonts" / "truetype"
    folder.mkdir(parents=True)
    for cache in (_font, _loaded):
        cache.cache_clear()
    yield folder
    for cache in (_font, _loaded):
        cache.cache_clear()


def write_one(path: Path, text: str, **options: Any) -> str:
    """A video of one frame; the note about it."""
    with OverlayWriter(path, **options) as writer:
        writer.write(Frame(0.0, PLAIN), text)
    return writer.note


def test_letters_of_any_language_are_drawn_with_an_installed_font(installed, tmp_path):
    text = "Жизнь • déjà vu"
    note = write_one(tmp_path / "a.mp4", text)
    assert "Ж и з н ь • é à" in note and "give another font" in note, "Pillow's own font has few letters"
    shutil.copy(FONTS / "DejaVuSans.ttf", installed / "LiberationSans-Regular.ttf")
    shutil.copy(FONTS / "cmr10.ttf", installed / "DejaVuSans.ttf")  # looked for earlier, and without these letters
    _font.cache_clear()
    _loaded.cache_clear()
    assert write_one(tmp_path / "b.mp4", text) == ""
    with_file = np.asarray(captioned(PLAIN, text, FONTS / "DejaVuSans.ttf"))
    assert np.array_equal(np.asarray(captioned(PLAIN, text)), with_file)
    assert not np.array_equal(
        np.asarray(captioned(PLAIN, "Hello")), captioned(PLAIN, "Hello", FONTS / "DejaVuSans.ttf")
    )
    # What no font has: the one that has the most.
    assert "(漢 字)" in write_one(tmp_path / "c.mp4", text + " 漢字漢\u200d\n")
    mixed = text + "漢"
    assert np.array_equal(np.asarray(captioned(PLAIN, mixed)), captioned(PLAIN, mixed, FONTS / "DejaVuSans.ttf"))


def test_a_font_that_was_asked_for_is_the_one_that_is_used(tmp_path):
    drawn = [np.asarray(captioned(PLAIN, text, FONTS / "DejaVuSans.ttf")) for text in ("é•Ж", "ü→Я")]
    assert not np.array_equal(*drawn), "or both would be boxes"
    assert "Ж" in write_one(tmp_path / "a.mp4", "Ж", font=FONTS / "cmr10.ttf")
    assert write_one(tmp_path / "b.mp4", "Ж", font=str(FONTS / "DejaVuSans.ttf")) == ""
    with pytest.raises(ValueError, match=r"test_overlay\.py' can't be used .*TrueType"):
        OverlayWriter(tmp_path / "c.mp4", font=__file__)
    with pytest.raises(ValueError, match=r"nowhere\.ttf' can't be used"):
        Overlay(open_video([picture(0)]), tmp_path / "c.mp4", font="nowhere.ttf")


def test_text_without_blanks_is_broken_inside_the_image():
    def size(text: str) -> tuple[int, int, int]:
        """First and last column and height of what is drawn."""
        rows, columns = np.nonzero((np.asarray(captioned(PLAIN, text)) != np.asarray(PLAIN)).any(axis=2))
        return columns.min(), columns.max(), rows.max() - rows.min()

    left, right, one_line = size("字")
    left, right, height = size("字" * 60)
    assert left > 0 and right < 319 and height > 1.5 * one_line
    lines = _lines(f"a {'b' * 45} c\n{'d' * 20}", 20, len)
    assert lines == ["a", "b" * 20, "b" * 20, "b" * 5 + " c", "d" * 20]
    assert _lines("ab", 0.5, len) == ["a", "b"], "a letter is never broken"


@pytest.mark.parametrize("ending", ["mp4", "mkv"])
def test_a_start_between_two_frames_begins_with_the_one_on_screen(tmp_path, ending):
    source = open_video(write_clip(tmp_path / "clip.mp4", 40, 25), fps=5, start=1.01)
    overlay = Overlay(source, tmp_path / f"out.{ending}")
    assert not overlay.written
    overlay.close()
    assert overlay.written
    frames = decoded(tmp_path / f"out.{ending}")
    assert numbers([image for _, image in frames]) == list(range(25, 40))
    assert [round(time, 3) for time, _ in frames] == [0.0] + [round(0.03 + index / 25, 3) for index in range(14)]


def test_the_source_is_never_replaced(tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", 10, 10)
    whole = clip.read_bytes()
    (tmp_path / "link.mkv").symlink_to(clip)
    for source in (open_video(clip), open_video(f"file://{clip}"), open_video(clip, live=True)):
        for path in (clip, tmp_path / "link.mkv", tmp_path / ".." / tmp_path.name / "clip.mp4"):
            with source, pytest.raises(ValueError, match="is the input itself; expected a new name"):
                Overlay(source, path, overwrite=True)
    with pytest.raises(ValueError, match="is the input itself"):
        OverlayWriter(clip, audio=str(clip), overwrite=True)
    assert clip.read_bytes() == whole
    with open_video(clip) as source, pytest.raises(ValueError, match="exists; expected a new name"):
        Overlay(source, tmp_path / write_clip(tmp_path / "other.mp4", 2, 10))


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
    assert left.name.startswith(".out.") and left.name.endswith(".incomplete.mp4")
    with OverlayWriter(tmp_path / "out.mp4") as again, OverlayWriter(tmp_path / "out.mp4", overwrite=True) as beside:
        for index in range(3):
            again.write(Frame(index / 10, picture(index)), "")
            beside.write(Frame(index / 10, picture(index + 3)), "")
    assert sorted(path.name for path in tmp_path.iterdir()) == [left.name, "out.mp4"]
    assert numbers([image for _, image in decoded(tmp_path / "out.mp4")]) == [0, 1, 2], "that of the last one to close"
    frames = decoded(left)
    assert len(frames) > 280, "what a killed process has left is its own, all but the last two seconds"
    assert numbers([image for _, image in frames[:250]]) == list(range(250))


def left_by_now(folder: Path) -> list[int]:
    """The frames that would be left if the process were killed at this moment."""
    (unfinished,) = folder.glob(".*.incomplete.*")
    copied = folder / f"copy{unfinished.suffix}"
    shutil.copy(unfinished, copied)
    try:
        return numbers([image for _, image in decoded(copied)])
    finally:
        copied.unlink()


@pytest.mark.parametrize("ending", ["mp4", "mov", "mkv"])
@pytest.mark.parametrize("fps", [0.5, 2, 25, 120])
def test_at_every_moment_all_but_the_last_seconds_play(tmp_path, fps, ending):
    with OverlayWriter(tmp_path / f"out.{ending}") as writer:
        for index in range(200):
            writer.write(Frame(index / fps, picture(index)), "")
            if index in (29, 40, 77, 110, 199) and index / fps > 1.5:
                left = left_by_now(tmp_path)
                assert left == list(range(len(left)))
                # A second that isn't whole yet, and the frame whose length isn't known; but for rounding.
                assert (index + 1 - len(left)) / fps <= 1 + 2 / fps
    assert [image for _, image in decoded(tmp_path / f"out.{ending}")][-1].shape == (48, 64, 3)


def test_without_x264_it_is_mpeg4(tmp_path, monkeypatch):
    monkeypatch.setattr(overlay_module, "_ENCODERS", {"mpeg4": _ENCODERS["mpeg4"]})
    with OverlayWriter(tmp_path / "out.mp4") as writer:
        for index in range(60):
            writer.write(Frame(index / 30, picture(index)), "")
        assert len(left_by_now(tmp_path)) >= 60 - 32
    frames = decoded(tmp_path / "out.mp4")
    assert numbers([image for _, image in frames]) == list(range(60))
    assert [time for time, _ in frames] == pytest.approx([index / 30 for index in range(60)], abs=1e-4)
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert container.streams.video[0].codec_context.name == "mpeg4"


@pytest.mark.parametrize("ending", ["mp4", "mkv"])
@pytest.mark.parametrize("fps", [2, 25])
def test_images_do_not_wait_for_sound_that_has_ended(tmp_path, fps, ending):
    clip = write_clip(tmp_path / "clip.mp4", 10, 10, sound="aac")
    with OverlayWriter(tmp_path / f"out.{ending}", audio=str(clip)) as writer:
        for index in range(200):
            writer.write(Frame(index / fps, picture(index)), "")
            if index in (75, 100, 111, 150, 199):
                left = left_by_now(tmp_path)
                assert left == list(range(len(left)))
                # A second for which they do wait, and one that isn't whole yet.
                assert (index + 1 - len(left)) / fps <= 2 + 2 / fps


@pytest.mark.parametrize("ending", ["mp4", "mov", "mkv"])
@pytest.mark.parametrize("fps", [0.2, 0.7, 1.1])
def test_images_that_are_far_apart_keep_their_times_beside_sound(tmp_path, fps, ending):
    clip = write_clip(tmp_path / "clip.mp4", 100, 10, sound="aac")
    with OverlayWriter(tmp_path / f"out.{ending}", audio=str(clip)) as writer:
        for index in range(int(10 * fps)):
            writer.write(Frame(index / fps, picture(index)), "")
    times = [time for time, _ in decoded(tmp_path / f"out.{ending}")]
    assert times == pytest.approx([index / fps for index in range(int(10 * fps))], abs=1e-3)


@pytest.mark.parametrize("fps", [0.25, 2, 120])
def test_keyframes_come_by_time(tmp_path, fps):
    with OverlayWriter(tmp_path / "out.mp4") as writer:
        for index in range(int(8 * fps) + 2):
            writer.write(Frame(index / fps, picture(5)), "")  # nothing changes: no other reason for one
    with av.open(str(tmp_path / "out.mp4")) as container:
        keys = [frame.time for frame in container.decode(video=0) if frame.key_frame]
    assert keys[:3] == pytest.approx([0, max(2, 1 / fps), 2 * max(2, 1 / fps)], abs=1e-3)


def test_names_with_a_colon(tmp_path, monkeypatch):
    """FFmpeg takes what is before it for a protocol."""
    monkeypatch.chdir(tmp_path)
    name, sound = "2026-11-21T10:30:00-out.mp4", "10:29.mp4"
    write_clip(tmp_path / "clip.mp4", 10, 10, sound="aac").rename(sound)
    with OverlayWriter(name, audio=sound) as writer:
        for index in range(10):
            writer.write(Frame(index / 10, picture(index)), "")
    assert writer.written and sorted(path.name for path in tmp_path.iterdir()) == [sound, name]
    assert numbers([image for _, image in decoded(tmp_path / name)]) == list(range(10))
    with av.open(str(tmp_path / name)) as container:
        assert sum(packet.size > 0 for packet in container.demux(audio=0)) > 40


def write_slides(path: Path) -> Path:
    """Images at 0, 2 and 4 s, and 10 s of sound."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base, stream.codec_context.max_b_frames = Fraction(1, 1000), 0
        sound = container.add_stream("aac", rate=48_000, layout="mono")
        for index in range(3):
            frame = av.VideoFrame.from_ndarray(picture(index), format="rgb24")
            frame.pts, frame.time_base = 2000 * index, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        mux_silence(container, sound, 10)
    return path


@pytest.mark.parametrize(
    ("given", "selection", "interrupted", "expected"),
    [
        ((), {}, False, 10.0),
        ((), {"start": 1.0}, False, 9.0),
        ((), {"end": 7.0}, False, 7.0),
        ((), {"start": 1.0, "end": 3.0}, False, 2.0),
        ((0.0, 0.5), {}, True, 1.0),  # up to where the captions end
        ((2.0,), {"end": 2.25}, True, 2.25),
    ],
)
def test_the_sound_ends_where_the_range_does(tmp_path, given, selection, interrupted, expected):
    overlay = Overlay(open_video(write_slides(tmp_path / "in.mp4"), fps=2, **selection), tmp_path / "out.mp4")
    for index, start in enumerate(given):
        tell(overlay, index, start, "words")
    overlay.close(interrupted=interrupted)
    with av.open(str(tmp_path / "out.mp4")) as container:
        packets = [packet for packet in container.demux(audio=0) if packet.size]
    # A packet of AAC is 21 ms; the encoder begins one before the first.
    assert float(packets[-1].pts * packets[-1].time_base) == pytest.approx(expected, abs=0.045)


def test_without_a_word_the_sound_of_a_writer_ends_with_its_last_frame(tmp_path):
    slides = write_slides(tmp_path / "in.mp4")
    for limit, expected in ((None, 4.0), (2.5, 2.5), (math.inf, 10.0)):
        writer = OverlayWriter(tmp_path / "out.mp4", audio=str(slides), overwrite=True)
        for index in range(2):
            writer.write(Frame(2.0 * index, picture(index)), "")
        writer.close(limit)
        with av.open(str(tmp_path / "out.mp4")) as container:
            packets = [packet for packet in container.demux(audio=0) if packet.size]
        assert float(packets[-1].pts * packets[-1].time_base) == pytest.approx(expected, abs=0.045)


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
