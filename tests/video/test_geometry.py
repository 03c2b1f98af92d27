# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Videos as they are to be seen, with square pixels and upright, by both who read them, and damaged ones by both."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from casa_hf import CaptionEvent, CasaProcessor
from casa_hf.captions.overlay import Overlay
from casa_hf.frames_casa import frame_image, measure_frames
from casa_hf.media_casa import MediaPolicy
from casa_hf.video import Frame, VideoWarning, load_frames, open_video
from tests.clips import damage_packets, numbers, picture, write_clip, write_turned_clip

av = pytest.importorskip("av")

VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"


def streamed(clip: Path, **selection: Any) -> list[Any]:
    return [item.image for item in open_video(clip, **selection).read() if isinstance(item, Frame)]


@pytest.mark.parametrize("aspect", [Fraction(4, 3), Fraction(1, 2), Fraction(8, 9)])
def test_pixels_that_are_not_square(tmp_path, casa_folder, aspect):
    """The frames, the tokens that are counted before, and the video with captions have the shape that is seen."""
    clip = write_clip(tmp_path / "clip.mp4", 6, 2, size=(128, 96), aspect=aspect)
    width = round(128 * aspect)
    frames = load_frames(clip)
    assert [frame.size for frame in frames] == [(width, 96)] * 6 == measure_frames(clip).images
    assert numbers(frames) == numbers(streamed(clip)) == list(range(6))
    assert [frame.tobytes() for frame in frames] == [frame.tobytes() for frame in streamed(clip)]
    assert load_frames(clip.read_bytes())[0].size == (width, 96)

    processor = CasaProcessor.from_pretrained(casa_folder, min_pixels=28**2)
    inputs = processor(text=VIDEO, videos=[str(clip)], return_tensors="pt")
    as_frames = processor(text=VIDEO, videos=[[frames]], return_tensors="pt")
    assert inputs["image_grid_thw"].tolist() == as_frames["image_grid_thw"].tolist()
    tokens = int(inputs["image_grid_thw"].prod(-1).sum()) // 4
    assert processor.measure(VIDEO, videos=[str(clip)]) == (inputs["input_ids"].shape[1], tokens)
    stored = processor(text=VIDEO, videos=[[[frame.resize((128, 96)) for frame in frames]]], return_tensors="pt")
    assert stored["image_grid_thw"].tolist() != inputs["image_grid_thw"].tolist()  # or this would prove nothing

    with open_video(clip) as source:
        assert source.size == (width, 96)
        overlay = Overlay(source, tmp_path / "out.mp4")
        for index in range(6):
            overlay.write(CaptionEvent("end", index, index / 2, index / 2 + 0.5, 0.1, ""))
        overlay.close()
    with av.open(str(tmp_path / "out.mp4")) as container:
        shown = container.streams.video[0]
        assert shown.sample_aspect_ratio in (None, 0, 1)
        assert (shown.codec_context.width, shown.codec_context.height) == (width + width % 2, 96)
        assert numbers([frame.to_image() for frame in container.decode(video=0)]) == list(range(6))


def test_a_size_that_only_its_pixels_make_too_large(tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", 2, 2, aspect=Fraction(10, 1))
    policy = MediaPolicy(max_decoded_pixels=20_000)
    for read in (load_frames, measure_frames):
        with pytest.raises(ValueError, match=r"clip\.mp4' can't be used: it has 640 x 48 pixels, more than max_dec"):
            read(clip, policy=policy)
    with av.open(str(clip)) as container, pytest.raises(ValueError, match="it has 640 x 48 pixels"):
        frame_image(next(container.decode(video=0)), 10.0, policy)


@pytest.mark.parametrize("a", [1, -1])
@pytest.mark.parametrize("d", [1, -1])
@pytest.mark.parametrize("turned", [False, True])
def test_all_ways_to_hold_a_camera(tmp_path, a, d, turned):
    """Turned and mirrored, point by point as the display matrix says."""
    stored = np.zeros((48, 64, 3), np.uint8)
    stored[:24, :32], stored[:24, 32:] = (255, 255, 255), (128, 128, 128)
    matrix = (0, a, d, 0) if turned else (a, 0, 0, d)
    clip = write_turned_clip(tmp_path / "clip.mp4", matrix, stored)
    rows, columns = np.mgrid[:48, :64]
    across, down = (matrix[index] * columns + matrix[index + 2] * rows for index in (0, 1))
    seen = np.zeros((64, 48, 3) if turned else (48, 64, 3), np.uint8)
    seen[down - down.min(), across - across.min()] = stored
    for [frame] in (load_frames(clip), streamed(clip)):
        assert np.abs(np.asarray(frame).astype(int) - seen).max(axis=2).mean() < 4
    assert sorted(measure_frames(clip).images[0]) == sorted(frame.size)


def test_frames_that_are_not_opaque_are_on_white(tmp_path):
    """As an image of the same file is."""
    colours = np.zeros((48, 64, 4), np.uint8)
    colours[..., 0], colours[:24, :, 3] = 200, 255
    with av.open(str(tmp_path / "clip.mov"), "w") as container:
        stream = container.add_stream("qtrle", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "argb"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(colours, format="rgba").reformat(format="argb")))
        container.mux(stream.encode())
    Image.fromarray(colours).save(tmp_path / "clip.gif")
    seen = np.full((48, 64, 3), 255, np.uint8)
    seen[:24] = (200, 0, 0)
    for name in ("clip.mov", "clip.gif"):
        for [frame] in (load_frames(tmp_path / name), streamed(tmp_path / name)):
            assert np.abs(np.asarray(frame).astype(int) - seen).max() < 3, name


# -------------------------------------------------------------------- damage


@pytest.mark.parametrize(("name", "codec"), [("clip.mp4", "libx264"), ("clip.avi", "mpeg4")])
@pytest.mark.parametrize("at_the_end", [False, True])
def test_both_readers_go_on_behind_damage_with_the_same_frames(tmp_path, name, codec, at_the_end):
    whole = write_clip(tmp_path / name, 60, 10, codec, g="10", bf="0")
    clip = damage_packets(whole, [21, 22, 23, 40, *(range(55, 60) if at_the_end else ())])
    for selection in ({}, {"fps": 2}, {"fps": 5}):
        sample = {"sample": False} if not selection else {}
        with pytest.warns(VideoWarning, match=f"The video '.*{clip.name}': a part can't be decoded: Invalid data"):
            frames = load_frames(clip, **selection, **sample)
        assert [frame.tobytes() for frame in frames] == [frame.tobytes() for frame in streamed(clip, **selection)]
        assert 0 < len(frames) <= len(measure_frames(clip, **selection, **sample).images)
    # What is behind it has its own time.
    assert numbers(frames)[-2:] == ([52, 54] if at_the_end else [56, 58])


def test_a_coding_that_is_not_known_is_named(tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", 4, 2)
    clip.write_bytes(clip.read_bytes().replace(b"avc1", b"xyz1"))
    for read in (load_frames, measure_frames, streamed):
        with pytest.raises(ValueError, match=r"clip\.mp4' can't be used: its codec isn't known; convert it"):
            read(clip)


def test_a_file_without_its_end_is_read_up_to_there(tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", 60, 10, header={"movflags": "faststart"}, g="10")
    clip.write_bytes(clip.read_bytes()[:-600])
    with pytest.warns(VideoWarning, match=r"The video .*(ends after .* of the 6\.000 s|and [12] more)"):
        frames = load_frames(clip, sample=False)
    assert [frame.tobytes() for frame in frames] == [frame.tobytes() for frame in streamed(clip)]
    assert 20 < len(frames) < 60


def test_a_container_that_breaks_off_is_read_up_to_there(tmp_path):
    """In reading, not in decoding: what comes behind it isn't found again."""
    frames = [np.concatenate([picture(index)[..., 0].ravel(), np.full(48 * 64 // 2, 128)]) for index in range(12)]
    parts = [b"FRAME\n" + frame.astype(np.uint8).tobytes() for frame in frames]
    parts[8] = b"SHAME" + parts[8][5:]
    clip = tmp_path / "clip.y4m"
    clip.write_bytes(b"YUV4MPEG2 W64 H48 F10:1 Ip A1:1 C420jpeg\n" + b"".join(parts))
    with pytest.warns(VideoWarning, match=r"clip\.y4m': reading ended early: "):
        loaded = load_frames(clip)
    assert numbers(loaded) == numbers(streamed(clip)) == list(range(8))
    assert len(measure_frames(clip).images) == 8


def test_a_file_of_which_nothing_can_be_decoded_is_refused_by_name(tmp_path):
    clip = damage_packets(write_clip(tmp_path / "clip.mp4", 10, 10), list(range(10)))
    with pytest.raises(ValueError, match=r"damaged-clip\.mp4' can't be used: none of its frames can be decoded"):
        load_frames(clip)
    with pytest.raises(ValueError, match=r"damaged-clip\.mp4' has no frames that can be decoded"):
        streamed(clip)


def test_contents_do_not_lead_to_other_files(tmp_path, monkeypatch):
    """FFmpeg follows the names in a playlist; a prompt could name any file of a server."""
    write_clip(tmp_path / "clip.ts", 10, 10)
    monkeypatch.chdir(tmp_path)
    playlist = b"ffconcat version 1.0\nfile clip.ts\n"
    with av.open("concat.txt" if (tmp_path / "concat.txt").write_bytes(playlist) else "", format="concat") as opened:
        assert len(list(opened.decode(video=0))) == 10
    with pytest.raises(ValueError, match=r"The video of \d+ bytes can't be used"):
        load_frames(playlist)
