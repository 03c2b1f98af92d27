# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Sources of video: every kind, every odd form of it, which frames are taken and when they are said to appear."""

from __future__ import annotations

import math
import re
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from casa_hf.video import Frame, ReadAhead, VideoInput, VideoProblem, VideoWarning, load_frames, media, open_video
from tests.clips import http_camera, jpeg_part, numbers, picture, write_clip, write_turned_clip

av = pytest.importorskip("av")

BUNNY = Path(__file__).parents[2] / "examples" / "assets" / "bunny.mp4"
# A live input that comes with FFmpeg: frames are made as time goes by.
LIVE = "lavfi:testsrc=size=64x48:rate=100,realtime"


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    left = [thread for thread in threading.enumerate() if thread.name == "casa-read-ahead" and thread not in before]
    assert not left


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 seconds, 120 frames; a key frame every 2 seconds."""
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", 120, 10, g="20")


def seen(source: VideoInput) -> list[tuple[float, int]]:
    """Times and numbers of the frames."""
    return [(timestamp, numbers([image])[0]) for timestamp, image in source]


def on_screen(
    times: list[Fraction], length: Fraction, fps: float | None, start: float, end: float | None
) -> list[int]:
    """Which frames are taken, moment by moment: what is on screen at `start`, `start` + 1/fps, ..., none twice."""
    times = [*times, length]
    stop = min(length, length if end is None else Fraction(end))
    if fps is None:
        return [index for index, (t, after) in enumerate(pairwise(times)) if after > start and t < stop]
    taken: list[int] = []
    for step in count():
        moment = Fraction(start) + step / Fraction(fps)
        if moment >= stop:
            return taken
        index = max(index for index, time in enumerate(times[:-1]) if time <= moment)
        taken += [index] if index not in taken else []


# ------------------------------------------------------------------------------------ which frames, and when


@pytest.mark.parametrize(
    ("fps", "start", "end"),
    [
        (None, 0, None),
        (2, 0, None),
        (2.5, 0, 4),
        (1000, 11, None),
        (0.25, 0, None),
        (3, 3.15, 9.05),
        (None, 5.05, 5.35),
        (2, 11.95, None),
    ],
)
def test_frames_and_times_of_a_file(clip, fps, start, end):
    times = [Fraction(index, 10) for index in range(120)]
    expected = on_screen(times, Fraction(12), fps, start, end)
    assert seen(open_video(clip, fps=fps, start=start, end=end)) == [(float(times[i]), i) for i in expected]


def test_frames_come_at_their_own_times_where_the_rate_varies(tmp_path):
    stamps = [0, 2, 4, 6, 8, 10, 50, 100]
    clip = write_clip(tmp_path / "clip.mp4", 8, 10, times=stamps)
    assert seen(open_video(clip)) == [(stamp / 10, index) for index, stamp in enumerate(stamps)]
    # What stays on screen for seconds is taken once.
    assert seen(open_video(clip, fps=2)) == [(0.0, 0), (0.4, 2), (1.0, 5), (5.0, 6), (10.0, 7)]
    assert seen(open_video(clip, fps=2, start=7)) == [(5.0, 6), (10.0, 7)]


def test_times_are_those_of_the_container_rounded_once(tmp_path):
    """NTSC: 1001/30000 seconds are no decimal fraction; Matroska rounds them to milliseconds."""
    for name in ("clip.mp4", "clip.mkv"):
        with av.open(str(tmp_path / name), "w") as container:
            stream = container.add_stream("libx264", rate=Fraction(30000, 1001))
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            for index in range(40):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(index), format="rgb24")))
            container.mux(stream.encode())
        exact = [index * Fraction(1001, 30000) for index in range(40)]
        if name.endswith("mkv"):
            exact = [Fraction(int(time * 1000 + Fraction(1, 2)), 1000) for time in exact]
        assert [frame.timestamp for frame in open_video(tmp_path / name)] == [float(time) for time in exact]


def test_a_file_that_begins_late_begins_at_0(tmp_path):
    clip = write_clip(tmp_path / "clip.mkv", 6, 10, times=[30, 32, 33, 35, 36, 40])
    assert seen(open_video(clip)) == [(0, 0), (0.2, 1), (0.3, 2), (0.5, 3), (0.6, 4), (1.0, 5)]
    assert seen(open_video(clip, start=0.5)) == [(0.5, 3), (0.6, 4), (1.0, 5)]


@pytest.mark.parametrize(
    ("name", "codec"),
    [("clip.mkv", "libx264"), ("clip.webm", "libvpx-vp9"), ("clip.avi", "mpeg4"), ("clip.h264", "libx264"),
     ("clip.ts", "libx264"), ("clip.gif", "gif")],
)  # fmt: skip
def test_containers(tmp_path, name, codec):
    """With and without an index, times, or a stated length; a range of each is what is cut from the whole."""
    if codec == "gif":
        frames = [Image.fromarray(picture(index)) for index in range(50)]
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], duration=40)
    else:
        write_clip(tmp_path / name, 50, 25, codec)
    assert seen(open_video(tmp_path / name)) == [(index / 25, index) for index in range(50)]
    assert seen(open_video(tmp_path / name, fps=5, start=1.0, end=1.7)) == [
        (index / 25, index) for index in (25, 30, 35, 40)
    ]


def test_the_same_frames_as_for_a_prompt(clip):
    """Sampling agrees with `load_frames`, which has the whole clip before it."""
    streamed = [np.asarray(frame.image) for frame in open_video(clip, fps=2)]
    loaded = [np.asarray(image) for image in load_frames(clip, fps=2)]
    assert len(streamed) == len(loaded) == 24
    assert all(np.array_equal(one, other) for one, other in zip(streamed, loaded, strict=True))


def test_odd_sizes_and_turned_cameras(tmp_path):
    odd = write_clip(tmp_path / "odd.mp4", 3, 10, size=(65, 49), qp="0")
    assert [frame.image.size for frame in open_video(odd)] == [(65, 49)] * 3
    assert [number for _, number in seen(open_video(odd))] == [0, 1, 2]
    (frame,) = open_video(write_turned_clip(tmp_path / "turned.mp4"))
    assert frame.image.size == (48, 64)
    assert np.asarray(frame.image)[:24].mean() > 250 and np.asarray(frame.image)[40:].mean() < 5


def test_a_size_that_changes_on_the_way(tmp_path):
    parts = [write_clip(tmp_path / f"{width}.ts", 15, 10, size=(width, 48)) for width in (64, 96)]
    (tmp_path / "both.ts").write_bytes(b"".join(part.read_bytes() for part in parts))
    with pytest.warns(VideoWarning, match="times jump back"):
        frames = list(open_video(tmp_path / "both.ts"))
    assert [frame.image.size for frame in frames] == [(64, 48)] * 15 + [(96, 48)] * 15
    assert numbers([frame.image for frame in frames]) == list(range(15)) * 2
    assert all(one.timestamp < other.timestamp for one, other in pairwise(frames))


def test_a_short_clip_that_begins_anew_loses_no_frame(tmp_path):
    """Less than a second back: what tells it from a duplicate is that times ascend from there."""
    parts = [write_clip(tmp_path / f"{index}.ts", 8, 10) for index in range(2)]
    (tmp_path / "both.ts").write_bytes(b"".join(part.read_bytes() for part in parts))
    items = list(open_video(tmp_path / "both.ts").read())
    frames = [item for item in items if isinstance(item, Frame)]
    assert numbers([frame.image for frame in frames]) == [*range(8), *range(8)]
    assert [frame.timestamp for frame in frames] == pytest.approx([index / 10 for index in range(16)])
    (problem,) = [item for item in items if isinstance(item, VideoProblem)]
    assert "times jump back by 0.700 s" in problem.message and problem.timestamp == pytest.approx(0.7)


def test_a_real_film():
    source = open_video(BUNNY, fps=2)
    frames = list(source)
    assert source.size == (320, 180) and source.rate == 25 and source.duration == pytest.approx(5.28, abs=0.1)
    assert [frame.timestamp for frame in frames] == [math.floor(step * 12.5) / 25 for step in range(len(frames))]
    colours = np.asarray(frames[0].image).mean(axis=(0, 1))
    assert colours.argmax() == 1, "a meadow is green"
    assert all(
        np.abs(np.asarray(one.image, int) - np.asarray(other.image)).mean() > 2 for one, other in pairwise(frames)
    )


# ------------------------------------------------------------------------------------ what is damaged


@pytest.mark.filterwarnings("ignore:.*can't be decoded")  # the packet that is cut through
@pytest.mark.parametrize("sound", [None, "libopus"])
def test_a_missing_end_is_reported_after_what_is_there(tmp_path, sound):
    clip = write_clip(tmp_path / "clip.mp4", 100, 10, sound=sound, header={"movflags": "faststart"}, bf="0")
    whole = clip.read_bytes()
    media = whole.index(b"mdat")
    assert whole.index(b"moov") < media
    clip.write_bytes(whole[: (media + len(whole)) // 2])
    with pytest.warns(VideoWarning, match=r"ends after .* of the 10\.000 s that its header states"):
        frames = seen(open_video(clip))
    assert 10 < len(frames) < 90
    assert frames == [(index / 10, index) for index in range(len(frames))]


def test_a_whole_file_gives_no_warning(tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", 30, 10, sound="libopus")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(list(open_video(clip))) == 30


def test_a_damaged_part_is_reported_once_and_the_rest_is_read(tmp_path):
    clip = write_clip(tmp_path / "clip.avi", 60, 10, "mpeg4", g="10")
    data = bytearray(clip.read_bytes())
    packets = [index for index in range(len(data) - 4) if data[index : index + 4] == b"00dc"][:60]
    for packet in packets[20:24]:
        data[packet + 8 : packet + 24] = bytes(16)
    clip.write_bytes(data)
    items = list(open_video(clip).read())
    problems = [item for item in items if isinstance(item, VideoProblem)]
    frames = [item for item in items if isinstance(item, Frame)]
    assert len(problems) == 1 and "can't be decoded" in problems[0].message
    assert problems[0].timestamp == pytest.approx(2.0, abs=0.15)
    # The decoder holds one frame back, which goes with the damaged one.
    assert [frame.timestamp for frame in frames][:19] == [index / 10 for index in range(19)]
    assert numbers([frame.image for frame in frames][-30:]) == list(range(30, 60))


def test_a_name_may_hold_a_colon(tmp_path, monkeypatch):
    """As the names of recordings that hold their time: no protocol, also where one is called so."""
    (tmp_path / "elsewhere").mkdir()
    for name in ("2026-11-21T10:30:00.mp4", "http:1.mp4", "file:a.mp4", "rtsp-10:30.mp4"):
        clip = write_clip(tmp_path / name, 12, 10)
        monkeypatch.chdir(tmp_path)
        source = open_video(name)
        assert source.name == name and [path.resolve() for path in source.files] == [clip]
        assert seen(source) == [(index / 10, index) for index in range(12)]
        assert [len(load_frames(given)) for given in (name, f"./{name}", clip)] == [12] * 3
        monkeypatch.chdir(tmp_path / "elsewhere")
        assert len(seen(source)) == 12, "it was that file when it was opened"
        clip.write_bytes(b"")
        monkeypatch.chdir(tmp_path)
        for read in (open_video, load_frames):
            with pytest.raises(ValueError, match=rf"^The video '{name}' can't be used: [\w ]+\.$"):
                read(name)


def test_files_that_hold_no_video(tmp_path, clip, serve):
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "cut.mp4").write_bytes(clip.read_bytes()[:400])
    with av.open(str(tmp_path / "none.mkv"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.start_encoding()
    for name in ("empty.mp4", "text.mp4", "cut.mp4"):
        with pytest.raises(ValueError, match=rf"{name}' can't be used: .*Invalid data"):
            open_video(tmp_path / name)
    with pytest.raises(ValueError, match=r"none\.mkv' (can't be used|has no frames)"):
        list(open_video(tmp_path / "none.mkv"))
    with pytest.raises(ValueError, match=r"nowhere\.mp4' doesn't exist"):
        open_video(tmp_path / "nowhere.mp4")
    with pytest.raises(ValueError, match="has no frames between 20 s and its end"):
        list(open_video(clip, start=20))
    with pytest.raises(
        ValueError, match=r"^The video 'http://.*' can't be opened \(Input/output error\): the address"
    ):
        open_video("http://nowhere.invalid/clip.mp4")
    with pytest.raises(ValueError, match=r"missing\.mp4' can't be used: .*404"):
        open_video(f"{serve(tmp_path)}/missing.mp4")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fps": 0}, "fps=0 must be a positive number"),
        ({"fps": math.nan}, "fps=nan must be a positive number"),
        ({"fps": True}, "fps=True must be a positive number"),
        ({"fps": "2"}, "fps='2' must be a positive number"),
        ({"start": -1}, "start=-1 must be a number of seconds"),
        ({"start": False}, "start=False must be a number of seconds"),
        ({"end": "3"}, "end='3' must be a number of seconds"),
        ({"start": 2, "end": 2}, "end=2 must be a number of seconds greater than start=2"),
        ({"read_ahead": 0}, "read_ahead=0 must be a positive integer"),
        ({"read_ahead": 1.5}, "read_ahead=1.5 must be a positive integer"),
        ({"read_ahead": "x"}, "read_ahead='x' must be a positive integer"),
        ({"read_ahead": True}, "read_ahead=True must be a positive integer"),
        ({"rate": 5}, "rate=5 can't be used with .*clip.*, which has times of its own; leave it out"),
        ({"live": True, "start": 1}, "start=1 can't be used with .*, which is live and has no past; leave out start"),
        ({"options": {"probesize": 5000}}, r"options=\{'probesize': 5000\} must have strings as keys and values"),
    ],
)
def test_wrong_options(clip, options, message):
    with pytest.raises(ValueError, match=message):
        open_video(clip, **options)


def test_numbers_of_any_kind_are_taken_as_float64(clip):
    """In float32 the frames of a third of a second would drift."""
    expected = seen(open_video(clip, fps=1 / 3, start=0.5, end=6.5))
    third = Fraction(1, 3)
    assert (
        seen(open_video(clip, fps=third, start=Fraction(1, 2), end=np.float32(6.5), read_ahead=np.int64(2)))
        == expected
    )
    source = open_video([picture(0)], rate=np.float32(2), fps=np.int64(2))
    assert (type(source.fps), type(source.rate), type(source.start)) == (float, float, float)


def test_names_have_no_secrets(tmp_path, serve):
    """They stand in messages and on pages."""
    write_clip(tmp_path / "clip.mp4", 10, 10)
    address = serve(tmp_path).replace("://", "://admin:p@ss,word@")
    source = open_video(f"{address}/clip.mp4?token=secret#part")
    assert source.name == address.replace("admin:p@ss,word@", "") + "/clip.mp4"
    assert len(list(source)) == 10 and "p@ss,word" in source.url
    for url in (f"{address}/no.mp4?token=secret", "rtsp://admin:p@ss,word@127.0.0.1:1/no.mp4?token=secret"):
        with pytest.raises(ValueError, match=r"://127\.0\.0\.1:\d+/no\.mp4' can't be used: \w+") as refusal:
            open_video(url)
        assert not any(part in str(refusal.value) for part in ("admin", "word", "secret"))
    with pytest.raises(ValueError, match=r"rate=5 can't be used with 'http://127\.0\.0\.1/a\.mp4'"):
        open_video("http://admin:p@ss,word@127.0.0.1/a.mp4?token=secret", rate=5)
    file = tmp_path / "what?@.mp4"
    (tmp_path / "clip.mp4").rename(file)
    assert open_video(file).name == str(file), "a path has none"


def test_things_that_are_no_video(clip):
    with pytest.raises(ValueError, match="17 isn't a video; expected a path"):
        open_video(17)
    with open_video(clip) as source, pytest.raises(ValueError, match="is already open; iterate over it"):
        open_video(source)


def test_without_pyav_the_extra_is_named(monkeypatch, clip):
    monkeypatch.setitem(sys.modules, "av", None)  # makes importing it fail
    with pytest.raises(ImportError, match=r"needs PyAV: pip install casa_hf\[video\]"):
        open_video(clip)


# ------------------------------------------------------------------------------------ other kinds


class _Server(ThreadingHTTPServer):
    """Serves one file, in ranges too, and sends no more of it than `allowed` bytes until it is released."""

    daemon_threads = True

    def __init__(self, file: Path, allowed: int):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.data, self.allowed = file.read_bytes(), allowed
        self.begins: list[int] = []
        self.released = threading.Event()
        self.address = f"http://127.0.0.1:{self.server_port}/{file.name}"


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        data = self.server.data
        begin = int(self.headers.get("Range", "bytes=0-")[6:].partition("-")[0])
        self.server.begins.append(begin)
        self.send_response(206)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data) - begin))
        self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        try:
            for place in range(begin, len(data), 8192):
                if place >= self.server.allowed:
                    self.server.released.wait()
                self.wfile.write(data[place : place + 8192])
        except OSError:
            pass  # the reader has gone elsewhere

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def served(file: Path, allowed: int = sys.maxsize) -> Iterator[_Server]:
    with _Server(file, allowed) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield server
        finally:
            server.released.set()
            server.shutdown()


@pytest.fixture(scope="module")
def large_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """25 seconds of noise, more than a megabyte."""
    path = tmp_path_factory.mktemp("clips") / "large.mkv"
    random = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(250):
            noise = random.integers(0, 256, (48, 64, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(noise, format="rgb24")))
        container.mux(stream.encode())
    assert path.stat().st_size > 1_000_000
    return path


def test_a_url_is_streamed(large_clip):
    """The first frames are there while the server still withholds nine tenths of the file."""
    with served(large_clip, allowed=large_clip.stat().st_size // 10) as server:
        frames = iter(open_video(server.address, read_ahead=1))
        times = [next(frames).timestamp, next(frames).timestamp]
        server.released.set()
        times += [frame.timestamp for frame in frames]
    assert times == [index / 10 for index in range(250)]


def test_a_range_of_a_url_is_sought(large_clip):
    with served(large_clip) as server:
        found = [frame.timestamp for frame in open_video(server.address, fps=2, start=23.5)]
        assert found == [23.5, 24.0, 24.5]
        assert max(server.begins) > large_clip.stat().st_size * 3 // 4


def read_in_step(items: Iterator[Any], pauses: list[float], told: threading.Semaphore) -> list[Frame]:
    """The frames of a camera that was told to send the first one, and is told to send each next one after a pause.

    Each must have come between the moment at which it was sent at the earliest and that at which it was there.
    """
    earliest, latest, frames = [time.monotonic()], [], []
    for pause in [*pauses, 0]:
        item = next(items)
        latest.append(time.monotonic())
        assert isinstance(item, Frame)
        frames.append(item)
        time.sleep(pause)
        earliest.append(time.monotonic())
        told.release()
    for frame, sent, there in list(zip(frames, earliest, latest, strict=False))[1:]:
        assert sent - latest[0] <= frame.timestamp <= there - earliest[0]
    return frames


def test_an_http_camera_is_live_and_its_frames_are_stamped_when_they_come(monkeypatch):
    """It sends an image when it is told to, far from evenly; FFmpeg's stamps are 0.04 s apart whatever it does."""
    monkeypatch.setattr(media, "_FRESH_SECONDS", math.inf)
    told = threading.Semaphore(0)
    pauses = [0.3, 0.05, 0.2, 0.01, 0.3]

    def parts() -> Iterator[bytes]:
        for number in range(len(pauses) + 1):
            assert told.acquire(timeout=30)
            yield jpeg_part(number)

    with http_camera(parts) as address:
        told.release()
        with open_video(address) as source:
            assert source.live and source.rate is None and source.duration is None
            assert source.size == (640, 480)
            items = source.read()
            frames = read_in_step(items, pauses, told)
            (end,) = items
    assert isinstance(end, VideoProblem) and end.timestamp == frames[-1].timestamp
    assert "reading ended early" in end.message
    assert numbers([frame.image for frame in frames]) == list(range(6))
    assert frames[0].timestamp == 0
    assert frames[-1].timestamp >= sum(pauses)


@pytest.mark.filterwarnings("ignore:.*reading ended early")
@pytest.mark.parametrize(("seconds", "expected"), [(-1.0, [3, 4, 5]), (math.inf, [0, 1, 2])])
def test_an_http_camera_that_had_to_wait_is_connected_to_anew(monkeypatch, seconds, expected):
    """So that its first frame is of now, and one that has hung up meanwhile is there again; a first read waits not."""
    monkeypatch.setattr(media, "_FRESH_SECONDS", seconds)
    connections = count()

    def parts() -> Iterator[bytes]:
        first = 3 * next(connections)
        yield from map(jpeg_part, range(first, first + 3))

    with http_camera(parts) as address:
        source = open_video(address)
        assert [number for _, number in seen(source)] == expected
        assert [number for _, number in seen(source)] == [number + 3 for number in expected], "as any later reading"


@pytest.mark.filterwarnings("ignore:.*reading ended early")
def test_an_http_camera_can_be_declared_recorded_and_has_no_past():
    def parts() -> Iterator[bytes]:
        yield from map(jpeg_part, range(5))

    with http_camera(parts) as address:
        source = open_video(address, live=False)
        assert not source.live
        assert seen(source) == [(index / 25, index) for index in range(5)], "as FFmpeg has it"
        with pytest.raises(
            ValueError, match=r"start=1 can't be used with http://.*/stream, which is live and has no past"
        ):
            open_video(address, start=1)


@pytest.mark.filterwarnings("ignore:.*reading ended early")
@pytest.mark.parametrize("live", [None, True, False])
def test_raw_video_of_a_network_is_live_where_it_has_no_length(tmp_path, serve, live):
    clip = write_clip(tmp_path / "clip.h264", 30, 10)
    times = [index / 25 for index in range(30)]
    with http_camera(lambda: [clip.read_bytes()], "video/h264") as address:
        source = open_video(address, live=live)
        assert source.live == (live is not False)
        found = seen(source)
    assert [number for _, number in found] == list(range(30))
    # All of it comes at once.
    assert ([time for time, _ in found] == times) == (live is False)
    whole = open_video(f"{serve(tmp_path)}/clip.h264")
    assert not whole.live and [time for time, _ in seen(whole)] == times


@pytest.fixture(scope="module")
def raw_packets(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Raw H.264, frame by frame, each of 200 bytes or more."""
    clip = write_clip(tmp_path_factory.mktemp("raw") / "clip.h264", 60, 25, size=(320, 240), tune="zerolatency", g="1")
    with av.open(str(clip)) as container:
        return [bytes(packet) for packet in container.demux(video=0) if packet.size]


def test_frames_of_raw_video_are_not_held_back_to_know_the_format(raw_packets):
    """A frame is whole when the next one begins; FFmpeg, left to itself, reads 2 s before it hands one on."""
    told = threading.Semaphore(0)
    connections = count()
    pauses = [0.2, 0.05, 0.3, 0.01]

    def parts() -> Iterator[bytes]:
        begun = next(connections)
        for packet in raw_packets[: len(raw_packets) if not begun else len(pauses) + 2]:
            assert not begun or told.acquire(timeout=30)
            yield packet

    with http_camera(parts, "video/h264") as address, open_video(address) as source:
        assert source.live and source.size == (320, 240)
        items = source.read()
        told.release(2)
        frames = read_in_step(items, pauses, told)
        assert numbers([item.image for item in items if isinstance(item, Frame)]) == [len(frames)]
    assert numbers([frame.image for frame in frames]) == list(range(len(frames)))
    assert frames[-1].timestamp >= sum(pauses)


@pytest.mark.filterwarnings("ignore:.*reading ended early")
def test_options_of_the_user_count_also_when_a_camera_is_connected_to_anew(raw_packets, monkeypatch):
    opened = []
    open_media = av.open

    def spy(*args: Any, **settings: Any) -> Any:
        opened.append(settings)
        return open_media(*args, **settings)

    monkeypatch.setattr(av, "open", spy)
    with http_camera(lambda: raw_packets, "video/h264") as address:
        seen(open_video(address, options={"probesize": "100000"}))
    first, anew = opened
    assert first["format"] is None and first["options"] == {"probesize": "100000"}
    assert anew["format"] == "h264" and anew["options"]["probesize"] == "100000"
    assert anew["options"]["analyzeduration"] == "1"


@pytest.mark.filterwarnings("ignore:.*reading ended early")
def test_raw_video_over_tcp_is_opened_after_some_frames_where_ffmpeg_is_told_to(raw_packets):
    """By the option that docs/streaming.md has; without it, opening would wait for frames that don't come."""
    opened = threading.Event()
    in_time = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def send() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"".join(raw_packets[:24]))  # FFmpeg takes 2 kB to know the format
                in_time.append(opened.wait(5))
                connection.sendall(b"".join(raw_packets[24:]))

        sender = threading.Thread(target=send)
        sender.start()
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        source = open_video(address, options={"analyzeduration": "1"})
        opened.set()
        assert source.live and source.size == (320, 240)
        assert [number for _, number in seen(source)] == list(range(60))
        sender.join()
    assert in_time == [True]


@pytest.mark.parametrize("live", [None, True])
def test_what_has_times_of_its_own_keeps_them(large_clip, live):
    """Not each URL is a camera, and one that is declared live isn't stamped anew for that."""
    with http_camera(lambda: [large_clip.read_bytes()], "video/x-matroska") as address:
        source = open_video(address, live=live)
        assert source.live == bool(live)
        found = [item.timestamp for item in source.read() if isinstance(item, Frame)]
        assert found == [index / 10 for index in range(250)]


def test_a_device_is_live():
    source = open_video(LIVE, fps=10, end=0.25)
    assert source.live and source.duration is None
    assert [frame.timestamp for frame in source] == [0.0, 0.1, 0.2]
    frames = iter(open_video(LIVE))
    assert next(frames).image.size == (64, 48)
    frames.close()  # a camera has no end: the thread ends with its consumer


def test_what_is_asked_of_a_camera_is_checked_before():
    for rate in (0, -5, math.nan, "30"):
        with pytest.raises(ValueError, match=f"rate={rate!r} must be a positive number"):
            open_video("camera:63", rate=rate)


def test_cameras_that_are_not_there():
    with pytest.raises(ValueError, match="x11grab:nowhere:0' can't be used"):
        open_video("x11grab:nowhere:0")
    if sys.platform == "linux":
        for name in ("camera:63", "/dev/video63", "v4l2:/dev/video63"):
            with pytest.raises(ValueError, match=r"v4l2:/dev/video63' can't be used: .*Devices here: "):
                open_video(name)


def test_an_image_folder(tmp_path):
    for index in (1, 2, 10):
        Image.fromarray(picture(index)).save(tmp_path / f"frame {index}.png")
    (tmp_path / "notes.txt").write_text("no image")
    source = open_video(tmp_path, fps=4)
    assert source.duration == 0.75
    assert seen(source) == [(0.0, 1), (0.25, 2), (0.5, 10)]
    assert seen(open_video(tmp_path, rate=4, fps=2)) == [(0.0, 1), (0.5, 10)]
    (tmp_path / "frame 2.png").write_bytes(b"broken")
    with pytest.warns(VideoWarning, match=r"at 0\.250 s: the frame can't be read: .*frame 2\.png"):
        assert seen(open_video(tmp_path, fps=4)) == [(0.0, 1), (0.5, 10)]
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="none' holds no images"):
        open_video(tmp_path / "none")
    for given in (tmp_path, [picture(0)]):
        with pytest.raises(ValueError, match=r"options=.*are for FFmpeg, which doesn't read"):
            open_video(given, options={"video_size": "64x48"})


@pytest.mark.parametrize("ending", ["png", "tiff"])
def test_depth_images_of_a_folder_are_refused(tmp_path, ending):
    """Pillow would clip them at 255 without a word. 16-bit colours it scales, as they should be."""
    ramp = np.linspace(0, 65535, 64 * 48).astype(np.uint16).reshape(48, 64)
    for index in (0, 2):
        Image.fromarray(picture(index)).save(tmp_path / f"{index}.png")
    Image.fromarray(ramp).save(tmp_path / f"1.{ending}")
    Image.fromarray(ramp.astype(np.int32)).save(tmp_path / "3.tiff")
    Image.fromarray(ramp.astype(np.float32) / 65535).save(tmp_path / "4.tiff")
    items = list(open_video(tmp_path, rate=2).read())
    frames = [item for item in items if isinstance(item, Frame)]
    assert [frame.timestamp for frame in frames] == [0.0, 1.0]
    assert numbers([frame.image for frame in frames]) == [0, 2]
    problems = [item for item in items if isinstance(item, VideoProblem)]
    assert [problem.timestamp for problem in problems] == [0.5, 1.5, 2.0]
    for problem, name, mode in zip(problems, (f"1.{ending}", "3.tiff", "4.tiff"), ("I;16", "I", "F"), strict=True):
        assert f"{name}' can't be used: its mode is '{mode}', with more than 8 bits" in problem.message
        assert "scale its values to 0 to 255" in problem.message


def test_files_beside_the_images_of_a_folder_are_no_frames(tmp_path):
    """Pillow has names for their endings, and can't read them."""
    endings = ("png", "jpg", "mpo", "webp", "tiff")
    for index, ending in enumerate(endings):
        format = "jpeg" if ending == "mpo" else None
        Image.fromarray(picture(index)).save(tmp_path / f"{index}.{ending}", format=format)
    for ending in ("pdf", "mpg", "mpeg", "h5", "hdf", "grib", "wmf", "eps", "palm"):
        (tmp_path / f"0.{ending}").write_bytes(b"no image")
    source = open_video(tmp_path, rate=4)
    assert [file.name for file in source.files] == [f"{index}.{ending}" for index, ending in enumerate(endings)]
    assert [time for time, _ in seen(source)] == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_iterators_of_images_and_of_pairs():
    images = [Image.fromarray(picture(index)) for index in range(6)]
    assert seen(open_video(images, fps=4)) == [(index / 4, index) for index in range(6)]
    assert seen(open_video(iter(images), rate=4, fps=2)) == [(0.0, 0), (0.5, 2), (1.0, 4)]
    stamped = list(zip([0.0, 0.3, 0.9, 1.2, 2.0, 2.6], images, strict=True))
    assert seen(open_video(iter(stamped), fps=1)) == [(0.0, 0), (0.9, 2), (2.0, 4)]
    arrays = [(0.5, picture(3))]
    (frame,) = open_video(arrays)
    assert frame.image is arrays[0][1], "what comes is handed on as it is"
    with pytest.raises(
        ValueError,
        match=r"Frame 1 of frames has the timestamp 1\.0, which must be greater than the one before \(1\.0\)",
    ):
        list(open_video([(1.0, images[0]), (1.0, images[1])]))


@pytest.mark.parametrize("time", [-3, -1e-9, math.inf, math.nan, "0.5", None, True, np.datetime64("2026-01-01")])
@pytest.mark.parametrize("fps", [None, 2])
def test_times_of_an_iterator_are_numbers_of_seconds_from_0_on(time, fps):
    for before in ([], [(0.0, picture(0))]):
        frames = [*before, (time, picture(1)), (1.0, picture(2))]
        with pytest.raises(
            ValueError, match=rf"Frame {len(before)} of frames has the timestamp {re.escape(repr(time))}, which must"
        ):
            list(open_video(frames, fps=fps))


def test_what_is_no_time_does_not_end_a_live_iterator():
    times = [0.0, "0.5", None, math.inf, True, np.datetime64("2026-01-01"), 10**5000, 1.0]
    items = list(open_video([(time, picture(index)) for index, time in enumerate(times)], live=True).read())
    assert [item.timestamp for item in items if isinstance(item, Frame)] == [0.0, 1.0]
    problems = [item.message for item in items if isinstance(item, VideoProblem)]
    told = [*map(repr, times[1:6]), "an integer of 16610 bits"]
    assert problems == [
        f"frame {index} has the timestamp {time}, which isn't a number of seconds"
        for index, time in enumerate(told, start=1)
    ]


def test_times_of_an_iterator_may_be_numbers_of_any_kind():
    times = [Fraction(1, 4), np.float32(0.5), np.array(0.75), torch.tensor(1.0), Decimal("1.25"), 2]
    frames = [(time, picture(index)) for index, time in enumerate(times)]
    assert seen(open_video(frames)) == [(float(time), index) for index, time in enumerate(times)]


def test_a_live_iterator_is_stamped_on_arrival():
    from casa_hf.video import FrameIterator

    clock = iter([100.0, 100.25, 101.5])
    source = FrameIterator([picture(0), picture(1), picture(2)], live=True, clock=lambda: next(clock))
    assert seen(source) == [(0.0, 0), (0.25, 1), (1.5, 2)]


def test_a_frame_of_a_live_iterator_is_taken_when_it_comes():
    """Not when the next one does; on average at the rate that was asked for, whatever the camera's is."""
    given: list[int] = []

    def camera(rate: int, count: int) -> Iterator[Any]:
        given.clear()
        for index in range(count):
            given.append(index)
            yield (index / rate, picture(index))

    for rate, fps, expected in (
        (4, 2, [0, 2, 4, 6]),
        (1, 2, [0, 1, 2, 3, 4, 5, 6, 7]),  # slower than asked for
        (3, 2, [0, 2, 3, 5, 6]),
        (4, None, [0, 1, 2, 3, 4, 5, 6, 7]),
    ):
        found = []
        for frame in open_video(camera(rate, 8), fps=fps, live=True).read():
            assert isinstance(frame, Frame) and frame.timestamp == given[-1] / rate
            found.append(given[-1])
        assert found == expected
    stamps = [0.0, 0.9, 1.0, 1.1, 1.4]
    late = open_video([(stamp, picture(0)) for stamp in stamps], fps=2, live=True)
    assert [frame.timestamp for frame in late] == [0.0, 0.9, 1.4], "after a gap there is no haste"


def test_times_of_a_live_iterator_count_from_its_first_frame_and_may_be_wrong():
    epoch = 1_700_000_000
    stamps = [0.0, 0.5, 0.5, 0.25, 1.0, math.nan, 1.5, -60.0, -59.5]
    source = open_video([(epoch + stamp, picture(index)) for index, stamp in enumerate(stamps)], rate=2, live=True)
    items = list(source.read())
    frames = [(item.timestamp, numbers([item.image])[0]) for item in items if isinstance(item, Frame)]
    assert frames == [(0.0, 0), (0.5, 1), (1.0, 4), (1.5, 6), (2.0, 7), (2.5, 8)]
    problems = [item for item in items if isinstance(item, VideoProblem)]
    assert [problem.timestamp for problem in problems] == [0.5, 1.0, 1.5]
    for problem, part in zip(
        problems, ["2 frames whose times", "frame 5 has the timestamp nan,", "back by 61.500 s"], strict=True
    ):
        assert part in problem.message


# ------------------------------------------------------------------------------------ the thread


def test_decoding_runs_ahead_by_so_many_frames_and_no_more():
    taken: list[int] = []
    reached = threading.Semaphore(0)

    def images() -> Iterator[Any]:
        for index in range(50):
            taken.append(index)
            reached.release()
            yield index

    items = ReadAhead(images, 3)
    for _ in range(4):  # three that wait and one that has no room yet
        assert reached.acquire(timeout=10)
    assert not reached.acquire(timeout=0.05) and taken == [0, 1, 2, 3]
    assert next(items) == 0
    assert reached.acquire(timeout=10) and not reached.acquire(timeout=0.05)
    assert list(items) == list(range(1, 50))
    items.close()


def test_a_consumer_that_stops_ends_the_thread_and_the_iterator():
    closed = []

    def endless() -> Iterator[Any]:
        try:
            yield from count()
        finally:
            closed.append(True)

    with ReadAhead(endless, 2) as items:
        assert [next(items), next(items)] == [0, 1]
    assert closed == [True]
    assert next(items, "end") == "end"
    items.close()


def test_an_error_surfaces_where_the_item_would_have_been():
    def failing() -> Iterator[int]:
        yield 1
        raise OSError("the cable is out")

    with ReadAhead(failing, 5) as items:
        assert next(items) == 1
        with pytest.raises(OSError, match="the cable is out"):
            next(items)
        assert next(items, None) is None
    source = open_video(failing())
    with pytest.raises(OSError, match="the cable is out"):
        list(source)


def test_the_oldest_makes_room_where_nothing_may_wait():
    dropped: list[int] = []
    with ReadAhead(lambda: iter(range(10)), 3, on_drop=dropped.append) as items:
        while not items.ended:
            pass
        assert dropped == list(range(7)) and len(items) == 3
        assert items.take(2) == [7, 8] and items.take(5) == [9] and items.take(5) == []
    with pytest.raises(ValueError, match="size=0 must be a positive integer"):
        ReadAhead(lambda: iter([]), 0)
