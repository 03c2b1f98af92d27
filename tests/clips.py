# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Clips whose frames show their number, eight bars, white for a bit that is set; an HTTP camera that sends them."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
from PIL import Image


def picture(number: int, width: int = 64, height: int = 48) -> np.ndarray:
    """The frame with this number, (height, width, 3)."""
    bits = np.array([number >> bit & 1 for bit in range(8)], np.uint8)
    columns = np.arange(width) * 8 // width
    return np.ascontiguousarray(np.broadcast_to(255 * bits[columns][None, :, None], (height, width, 3)))


def every_kind(number: int, file: Path) -> dict[str, Any]:
    """The frame with this number, in each form in which a stream takes frames; one of them is a file."""
    import torch
    from PIL import Image

    pixels = picture(number)
    ones = torch.tensor(pixels) / 255
    Image.fromarray(pixels).save(file)
    return {
        "uint8": pixels,
        "int64": pixels.astype(np.int64),
        "channels first": pixels.transpose(2, 0, 1),
        "float": ones.numpy(),  # of only 0.0 and 1.0
        "double, channels first": ones.permute(2, 0, 1).double(),
        "float16": ones.numpy().astype(np.float16),
        "bfloat16": ones.bfloat16(),
        "with a gradient": ones.clone().requires_grad_(),
        "resized": ones + 1e-3,  # has left [0, 1] by less than half a step
        "PIL image": Image.fromarray(pixels),
        "palette": Image.fromarray(pixels).convert("P"),
        "path": file,
        "name of a file": str(file),
    }


def numbers(frames: list[Any]) -> list[int]:
    """Which frames of a written clip these are."""
    found = []
    for frame in frames:
        columns = np.asarray(frame).mean(axis=(0, 2))
        centres = columns[[(2 * bar + 1) * len(columns) // 16 for bar in range(8)]] > 128
        found.append(sum(1 << bit for bit in range(8) if centres[bit]))
    return found


def write_clip(
    path: Path,
    count: int,
    rate: int,
    codec: str = "libx264",
    times: list[int] | None = None,
    size: tuple[int, int] = (64, 48),
    sound: str | None = None,
    header: dict[str, str] | None = None,
    aspect: Fraction | None = None,
    **options: str,
) -> Path:
    """A clip of `count` frames at `rate` frames per second, or with frames at these multiples of 1/rate seconds.

    `sound` is the codec of a tone beside it, `aspect` that of the pixels, `header` are options of the container,
    `options` those of the encoder.
    """
    import av

    with av.open(str(path), "w", options=header or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p" if not (size[0] % 2 or size[1] % 2) else "yuv444p"
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        audio = container.add_stream(sound, rate=48_000, layout="mono") if sound else None
        for index in range(count):
            frame = av.VideoFrame.from_ndarray(picture(index, *size), format="rgb24")
            frame.pts = index if times is None else times[index]
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if audio is not None:
            wave = np.sin(np.arange(48_000 * count // rate) * 440 * 2 * np.pi / 48_000)
            tone = av.AudioFrame.from_ndarray((8_000 * wave).astype(np.int16)[None], format="s16", layout="mono")
            tone.rate = 48_000
            container.mux(audio.encode(tone))
            container.mux(audio.encode())
    return path


def write_turned_clip(
    path: Path, matrix: tuple[int, int, int, int] = (0, 1, -1, 0), frame: np.ndarray | None = None
) -> Path:
    """One frame with a display matrix: a point (x, y) is to be seen at (a x + c y, b x + d y), moved into view.

    Without a `frame`, its left half is white. With the matrix given it is filmed with the camera upright: shown as it
    should be, the top is white.
    """
    import av

    if frame is None:
        frame = np.zeros((48, 64, 3), np.uint8)
        frame[:, :32] = 255
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.height, stream.width, stream.pix_fmt = *frame.shape[:2], "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    data = bytearray(path.read_bytes())
    place = data.index(b"tkhd") + 4 + 4 + 20 + 16  # name; version and flags; times, track, duration; layer, volume
    identity = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    assert data[place : place + 36] == identity
    a, b, c, d = (number * (1 << 16) for number in matrix)
    data[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path


def damage_packets(path: Path, numbers: list[int]) -> Path:
    """The same clip with zeros for these packets of it."""
    import av

    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(container.streams.video[0]) if packet.size]
    data = bytearray(path.read_bytes())
    for start, size in (packets[number] for number in numbers):
        data[start : start + size] = b"\xff" * size
    damaged = path.with_name(f"damaged-{path.name}")
    damaged.write_bytes(data)
    return damaged


def jpeg_part(number: int) -> bytes:
    """An image as HTTP cameras send it, larger than what FFmpeg reads before it hands on the first one."""
    image = BytesIO()
    Image.fromarray(picture(number, 640, 480)).save(image, "jpeg")
    head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {image.tell()}\r\n\r\n"
    return head.encode() + image.getvalue() + b"\r\n"


@contextmanager
def http_camera(
    parts: Callable[[], Iterable[bytes]], kind: str = "multipart/x-mixed-replace; boundary=frame"
) -> Iterator[str]:
    """A server that sends these parts to whoever comes, each as soon as it is there, without a length; its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Connection", "close")
            self.end_headers()
            try:
                for part in parts():
                    self.wfile.write(part)
            except OSError:
                pass  # the reader has gone

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/stream"
        finally:
            server.shutdown()
