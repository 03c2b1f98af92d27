# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Videos: which frames are taken from real files, and that a frame is an image of its own.

The frames of a written clip show their number.
"""

from __future__ import annotations

import base64
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.video_utils import VideoMetadata

from casa_hf import CasaProcessor
from casa_hf.frames_casa import measure_frames, read_frames
from casa_hf.video import load_frames, sample_indices
from tests.clips import numbers, write_clip, write_turned_clip

av = pytest.importorskip("av")

VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"


@pytest.fixture(scope="module")
def long_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 seconds, 120 frames."""
    return write_clip(tmp_path_factory.mktemp("clips") / "long.mp4", 120, 10)


@pytest.fixture(scope="module")
def short_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 seconds, 60 frames."""
    return write_clip(tmp_path_factory.mktemp("clips") / "short.mp4", 60, 20)


def test_two_frames_per_second_by_default(long_clip):
    assert numbers(load_frames(long_clip)) == list(range(0, 120, 5))


def test_twenty_frames_of_a_short_clip(short_clip):
    assert numbers(load_frames(short_clip)) == list(range(0, 60, 3))


def test_all_frames_of_a_very_short_clip(tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", 7, 10)
    assert numbers(load_frames(clip)) == list(range(7))


def test_frames_per_second_and_number_of_frames(long_clip):
    assert numbers(load_frames(long_clip, fps=1)) == list(range(0, 120, 10))
    assert numbers(load_frames(long_clip, fps=0.25)) == [0, 40, 80]
    assert numbers(load_frames(long_clip, fps=1000)) == list(range(120))
    assert numbers(load_frames(long_clip, num_frames=5)) == [0, 24, 48, 72, 96]
    assert numbers(load_frames(long_clip, num_frames=1)) == [0]
    assert numbers(load_frames(long_clip, sample=False)) == list(range(120))


@pytest.mark.parametrize(
    ("name", "codec"),
    [("clip.mkv", "libx264"), ("clip.webm", "libvpx-vp9"), ("clip.avi", "mpeg4"), ("clip.h264", "libx264")],
)
def test_containers_that_do_not_tell_the_number_of_frames_or_their_times(tmp_path, name, codec):
    clip = write_clip(tmp_path / name, 50, 25, codec)
    with av.open(str(clip)) as container:
        assert codec == "mpeg4" or container.streams.video[0].frames == 0
    assert numbers(load_frames(clip, fps=5)) == list(range(0, 50, 5))


def test_frames_are_taken_by_their_time_not_their_number(tmp_path):
    """Five frames in the first second, one that stays for four, one that stays for five, and a last one."""
    clip = write_clip(tmp_path / "clip.mp4", 8, 10, times=[0, 2, 4, 6, 8, 10, 50, 100])
    assert numbers(load_frames(clip, fps=2)) == [0, 2, 5, 6]


def test_frames_have_the_times_at_which_they_appear(tmp_path, long_clip, short_clip):
    """Those of the container, also where frames don't come at an even rate, and where nothing is decoded."""
    uneven = write_clip(tmp_path / "clip.mp4", 8, 10, times=[0, 2, 4, 6, 8, 10, 50, 100])
    expected = {
        (uneven, ("fps", 2)): [0.0, 0.4, 1.0, 5.0],
        (uneven, ("sample", False)): [0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 5.0, 10.0],
        (long_clip, ("num_frames", 3)): [0.0, 4.0, 8.0],
        (short_clip, ("fps", 1.0)): [0.0, 1.0, 2.0],
    }
    for (clip, option), times in expected.items():
        for read in (read_frames, measure_frames):
            frames = read(clip, **dict([option]))
            assert frames.timed and frames.times == pytest.approx(times) and len(frames.images) == len(times)
    raw = write_clip(tmp_path / "clip.h264", 50, 25, "libx264")
    assert read_frames(raw, fps=5).times == pytest.approx([index / 5 for index in range(10)])


def test_decoded_frames_have_the_times_that_metadata_tell(long_clip):
    images = load_frames(long_clip, num_frames=4)
    for metadata in (
        {"fps": 10.0, "frames_indices": [0, 30, 60, 90]},
        VideoMetadata(120, 10.0, frames_indices=[0, 30, 60, 90]),
    ):
        assert read_frames(images, metadata=metadata)[1:3] == ([0.0, 3.0, 6.0, 9.0], True)
        assert read_frames(images, num_frames=2, metadata=metadata).times == [0.0, 6.0]
    assert measure_frames(images, metadata={"fps": 2}).times == [0.0, 0.5, 1.0, 1.5]
    assert read_frames(images)[:3] == (images, [0.0, 1 / 24, 2 / 24, 3 / 24], False)  # as the stock processors assume
    assert read_frames(images, metadata={"frames_indices": [0, 12, 24, 36]})[1:3] == ([0.0, 0.5, 1.0, 1.5], False)
    with pytest.raises(ValueError, match=r"frames_indices of 2 frames for a video of 4 decoded frames"):
        read_frames(images, metadata={"fps": 10, "frames_indices": [0, 30]})
    with pytest.raises(ValueError, match=r"video_metadata.fps=0 must be a positive number of frames per second"):
        read_frames(images, metadata={"fps": 0})
    for read in (read_frames, measure_frames):
        with pytest.raises(ValueError, match=r"long.mp4.*, a file, which tells the times of its frames.*leave it out"):
            read(long_clip, metadata={"fps": 10})


def test_which_moments_are_sampled():
    times = [index / 30 for index in range(600)]
    assert sample_indices(times, 20.0) == list(range(0, 600, 15))
    assert sample_indices(times[:299], 299 / 30) == [index * 299 // 20 for index in range(20)]
    assert len(sample_indices(times[:300], 10.0)) == 20
    assert sample_indices([0.0, 5.0, 6.0], 12.0, fps=1) == [0, 1, 2]
    ntsc = [index * 1001 / 30000 for index in range(900)]
    chosen = sample_indices(ntsc, 30.03)
    assert len(chosen) == 60
    assert all(ntsc[index] <= second / 2 + 1e-3 < ntsc[index + 1] for second, index in enumerate(chosen))


def test_a_clip_filmed_upright_is_turned(tmp_path):
    clip = write_turned_clip(tmp_path / "clip.mp4")
    (frame,) = load_frames(clip)
    assert frame.size == (48, 64)
    assert np.asarray(frame)[:24].mean() > 250 and np.asarray(frame)[40:].mean() < 5


def test_the_frames_of_a_file_are_images_of_their_own(processor, stock_pixels, long_clip):
    with av.open(str(long_clip)) as container:
        every_fifth = [frame.to_image() for frame in list(container.decode(video=0))[::5]]
    inputs = processor(videos=str(long_clip), text=f"What happens? {VIDEO}", return_tensors="pt")
    expected = [stock_pixels([frame], 140**2 // 4) for frame in every_fifth]
    assert torch.equal(inputs["pixel_values"], torch.cat([each["pixel_values"] for each in expected]))
    assert inputs["image_grid_thw"].tolist() == [each["image_grid_thw"][0].tolist() for each in expected]
    assert (inputs["image_grid_thw"][:, 0] == 1).all() and len(every_fifth) == 24
    assert inputs["input_ids"][0].tolist().count(processor.image_token_id) == 24


def test_a_still_frame_fills_the_temporal_patch(processor, short_clip):
    pixels = processor(videos=short_clip, text=VIDEO, return_tensors="pt")["pixel_values"]
    first, second = pixels.unflatten(1, (3, 2, 14, 14)).unbind(2)
    assert torch.equal(first, second)


def test_one_video_in_all_its_forms(processor, long_clip, serve):
    options: dict[str, Any] = {"text": VIDEO, "return_tensors": "pt", "num_frames": 4}
    expected = processor(videos=str(long_clip), **options)
    frames = load_frames(long_clip, num_frames=4)
    array = np.stack([np.asarray(frame) for frame in frames])
    contents = base64.b64encode(long_clip.read_bytes()).decode()
    files = []
    for index, frame in enumerate(frames):
        files.append(long_clip.parent / f"{index}.png")
        frame.save(files[-1])
    forms = {
        "path": long_clip,
        "url": f"{serve(long_clip.parent)}/{long_clip.name}",
        "data URL": f"data:video/mp4;base64,{contents}",
        "base64": contents,
        "list of paths": [long_clip],
        "list of images": frames,
        "list of arrays": list(array),
        "array": array,
        "tensor": torch.tensor(array),
        "channels first": torch.tensor(array).permute(0, 3, 1, 2),
        "five dimensions": array[None],
        "nested": [[frames]],
        "image files": [[files]],
    }
    for name, form in forms.items():
        inputs = processor(videos=form, **options)
        assert all(torch.equal(inputs[key], expected[key]) for key in expected), name


def test_two_videos_of_different_length_in_a_batch(processor, long_clip, short_clip):
    texts = [f"{VIDEO} What?", f"And {VIDEO} this one?"]
    batch = processor(videos=[long_clip, short_clip], text=texts, fps=1, return_tensors="pt")
    assert batch["mm_token_type_ids"].sum(dim=1).tolist() == [2 * 12, 2 * 3]
    singles = [
        processor(videos=clip, text=text, fps=1, return_tensors="pt")
        for clip, text in zip((long_clip, short_clip), texts, strict=True)
    ]
    assert torch.equal(batch["pixel_values"], torch.cat([single["pixel_values"] for single in singles]))
    short = singles[1]["input_ids"][0]
    assert torch.equal(batch["input_ids"][1, -len(short) :], short)


def test_the_limit_of_frames_is_theirs_alone(processor, photos, short_clip):
    def sizes(**options: Any) -> list[int]:
        text = f"{VIDEO}<|vision_start|><|vision_end|>"
        grid = processor(
            videos=short_clip, images=photos["cat"], text=text, num_frames=2, return_tensors="pt", **options
        )["image_grid_thw"]
        return (14 * 14 * grid.prod(dim=1)).tolist()

    usual, narrow, free = sizes(), sizes(frame_max_pixels=56 * 56), sizes(frame_max_pixels=None, min_pixels=120**2)
    assert usual[0] == usual[1] <= 140**2 // 4 < usual[2] <= 140**2
    assert narrow[:2] == [56 * 56] * 2 and narrow[2] == usual[2]
    assert 120**2 <= free[0] <= 140**2
    assert sizes(videos_kwargs={"frame_max_pixels": 56 * 56}) == narrow


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fps": 2, "num_frames": 4}, "fps=2 and num_frames=4 can't be combined"),
        ({"fps": 0}, "fps=0 must be a positive number"),
        ({"fps": "2"}, "fps='2' must be a positive number"),
        ({"num_frames": -3}, "num_frames=-3 must be a positive integer"),
        ({"num_frames": 2.5}, r"num_frames=2\.5 must be a positive integer"),
        (
            {"do_sample_frames": False, "fps": 1},
            "fps can't be combined with do_sample_frames=False, which takes every frame",
        ),
        ({"num_frames": 61}, "short.mp4' can't be used: num_frames=61 is more than the 60 frames"),
        ({"frame_max_pixels": 1000}, "frame_max_pixels=1000 is below min_pixels=3136"),
        ({"images": "cat.jpg"}, r"number of images \(1\) must be .* placeholders in the text \(0\)"),
    ],
    ids=str,
)
def test_wrong_options(processor, short_clip, options, message):
    with pytest.raises(ValueError, match=message):
        processor(videos=short_clip, text=VIDEO, **options)


@pytest.mark.parametrize(
    "metadata", [{"fps": 10}, VideoMetadata(30, 10.0), {"fps": 30, "frames_indices": torch.arange(0, 90, 3)}]
)
def test_decoded_frames_of_a_known_rate_are_sampled_by_it(long_clip, metadata):
    """As a file of these 30 frames of 3 seconds would be."""
    frames = load_frames(long_clip, num_frames=30)
    for fps, taken in ((2, range(0, 30, 5)), (4, [0, 2, 5, 7, 10, 12, 15, 17, 20, 22, 25, 27]), (50, range(30))):
        for read in (read_frames, measure_frames):
            found = read(frames, fps=fps, metadata=metadata)
            assert found.images == [frames[index] for index in taken]
            assert found.times == pytest.approx([index / 10 for index in taken]) and found.timed


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("x", r"video_metadata of a video is 'x'; expected a VideoMetadata"),
        ({"rate": 2}, r"video_metadata of a video is \{'rate': 2\}; expected a VideoMetadata"),
        ({"fps": 1, "frames_indices": [3, 1, 2]}, r"frames_indices=\[3, 1, 2\]; expected .* 0 or more and ascending"),
        (
            {"fps": 1, "frames_indices": [-1, 0, 1]},
            r"frames_indices=\[-1, 0, 1\]; expected .* 0 or more and ascending",
        ),
        (
            {"fps": 1, "frames_indices": ["a", 1, 2]},
            r"frames_indices=\['a', 1, 2\]; expected the numbers of the frames",
        ),
        ({"fps": 1, "frames_indices": 5}, r"frames_indices of 1 frames? for a video of 3 decoded frames"),
    ],
    ids=str,
)
def test_metadata_that_tell_nothing_are_refused(photos, metadata, message):
    with pytest.raises(ValueError, match=message):
        read_frames([photos["cat"]] * 3, metadata=metadata)


def test_decoded_frames_have_no_rate(processor, photos):
    with pytest.raises(ValueError, match=r"fps=1 can't be applied to a video of 3 decoded frames.*num_frames"):
        processor(videos=[[photos["cat"]] * 3], text=VIDEO, fps=1)
    with pytest.raises(ValueError, match="num_frames=4 is more than the 3 frames"):
        processor(videos=[[photos["cat"]] * 3], text=VIDEO, num_frames=4)


def test_files_that_are_no_videos(processor, tmp_path, long_clip, serve):
    text, cut, silent = tmp_path / "text.mp4", tmp_path / "cut.mp4", tmp_path / "sound.wav"
    text.write_text("no video")
    cut.write_bytes(long_clip.read_bytes()[:400])
    with av.open(str(silent), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        stream.layout = "mono"
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        sound.rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    for video, message in (
        (tmp_path / "missing.mp4", "missing.mp4' can't be used: there is no such file"),
        (tmp_path, "it is a folder; expected a file. Name a file in it"),
        (text, "text.mp4' can't be used: .*Invalid data"),
        (cut, "cut.mp4' can't be used: "),
        (silent, "sound.wav' can't be used: it has no video stream"),
        (f"{serve(tmp_path)}/missing.mp4", "missing.mp4' can't be used: .*404"),
        ("http://127.0.0.1:9/clip.mp4", "clip.mp4' can't be used: "),
    ):
        with pytest.raises(ValueError, match=message):
            processor(videos=[video], text=VIDEO)


def test_without_pyav_the_extra_is_named(processor, monkeypatch, short_clip, photos):
    monkeypatch.setitem(sys.modules, "av", None)  # makes importing it fail
    with pytest.raises(ImportError, match=r"needs PyAV: pip install casa_hf\[video\]"):
        processor(videos=short_clip, text=VIDEO)
    assert len(processor(videos=[[photos["cat"]] * 2], text=VIDEO, return_tensors="pt")["image_grid_thw"]) == 2


def test_sampling_options_are_checked_before_anything_is_read(processor):
    with pytest.raises(ValueError, match="can't be combined"):
        processor(videos=["missing.mp4"], text=VIDEO, fps=1, num_frames=2)


def test_the_frame_limit_is_a_setting(source, tmp_path, stock_pixels, photos):
    saved = CasaProcessor.from_source(source, frame_max_pixels=56 * 56)
    saved.save_pretrained(tmp_path)
    loaded = CasaProcessor.from_pretrained(tmp_path)
    grid = loaded(videos=[[photos["cat"]]], text=VIDEO, return_tensors="pt")["image_grid_thw"]
    assert torch.equal(grid, stock_pixels([photos["cat"]], 56 * 56)["image_grid_thw"])


# -------------------------------------------------------------------- measured without decoding


def damage_pictures(clip: Path) -> Path:
    """The same container with zeros for all that is coded in it."""
    data = bytearray(clip.read_bytes())
    start = data.index(b"mdat")
    length = int.from_bytes(data[start - 4 : start], "big") - 8
    assert length > 100
    data[start + 4 : start + 4 + length] = bytes(length)
    damaged = clip.with_name("damaged.mp4")
    damaged.write_bytes(data)
    return damaged


@pytest.mark.parametrize("options", [{}, {"fps": 1}, {"num_frames": 7}, {"do_sample_frames": False}])
def test_what_a_clip_takes_is_told_by_its_container(processor, long_clip, options):
    text = f"{VIDEO} What?"
    inputs = processor(text=text, videos=[str(long_clip)], return_tensors="pt", **options)
    expected = inputs["input_ids"].shape[1], int(inputs["image_grid_thw"].prod(-1).sum()) // 4
    damaged = damage_pictures(long_clip)
    with pytest.raises(ValueError, match="can't be used"):
        load_frames(damaged)
    for clip in (long_clip, damaged):
        assert processor.measure(text, videos=[str(clip)], **options) == expected


@pytest.mark.parametrize("size", [(64, 176), (176, 64), (90, 62)])
def test_clips_of_any_form_are_measured_as_they_are_read(processor, tmp_path, size):
    clip = write_clip(tmp_path / "clip.mp4", 4, 2, size=size)
    inputs = processor(text=VIDEO, videos=[str(clip)], return_tensors="pt")
    tokens = int(inputs["image_grid_thw"].prod(-1).sum()) // 4
    assert processor.measure(VIDEO, videos=[str(clip)]) == (inputs["input_ids"].shape[1], tokens)


def test_a_turned_clip_is_measured_as_it_is_read(processor, tmp_path):
    clip = str(write_turned_clip(tmp_path / "turned.mp4"))
    inputs = processor(text=VIDEO, videos=[clip], return_tensors="pt")
    tokens = int(inputs["image_grid_thw"].prod(-1).sum()) // 4
    assert processor.measure(VIDEO, videos=[clip]) == (inputs["input_ids"].shape[1], tokens)


def test_what_cannot_be_measured_is_refused(processor, tmp_path, long_clip):
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(ValueError, match=r"text\.mp4' can't be used"):
        processor.measure(VIDEO, videos=[str(tmp_path / "text.mp4")])
    with pytest.raises(ValueError, match="num_frames=200 is more than the 120"):
        processor.measure(VIDEO, videos=[str(long_clip)], num_frames=200)
