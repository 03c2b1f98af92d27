# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""A running server for tests, and clients of it that use nothing but the standard library."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import av
from PIL import Image, ImageDraw

from casa_hf.web import CaptionServer

TIMEOUT = 60.0


class Message(NamedTuple):
    """A server-sent event."""

    id: str
    name: str
    data: dict[str, Any]


class Listener:
    """A page as the server sees it: listens to the events.

    Attributes:
        messages: everything that has been heard.
    """

    def __init__(self, url: str, last: str | None = None):
        self._connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=TIMEOUT)
        self._connection.request("GET", "/events", headers={} if last is None else {"Last-Event-ID": last})
        self._response = self._connection.getresponse()
        assert self._response.status == 200
        assert self._response.headers["content-type"].startswith("text/event-stream")
        self.messages: list[Message] = []

    def __iter__(self) -> Iterator[Message]:
        fields: dict[str, str] = {}
        while line := self._response.readline().decode():
            name, _, value = line.rstrip("\n").partition(": ")
            if name in ("id", "event", "data"):
                fields[name] = value
            elif not name and "event" in fields:
                message = Message(fields.get("id", ""), fields["event"], json.loads(fields["data"]))
                self.messages.append(message)
                fields = {}
                yield message

    def until(self, wanted: Callable[[Message], bool]) -> list[Message]:
        """What comes up to the first message that is wanted, that one included."""
        heard = []
        for message in self:
            heard.append(message)
            if wanted(message):
                return heard
        raise AssertionError(f"the server ended the events with {self.messages[-3:]}")

    def until_state(self, state: str) -> list[Message]:
        return self.until(lambda message: message.name in ("state", "session") and message.data["state"] == state)

    def until_answer(self) -> list[Message]:
        return self.until(lambda message: message.name == "answer" and message.data["kind"] in ("answered", "error"))

    def close(self) -> None:
        self._response.close()
        self._connection.close()


def events(messages: list[Message], *names: str) -> list[dict[str, Any]]:
    """The content of messages with these names, as `CaptionEvent` has it, but for what time
    makes different in each run."""
    kept = [message for message in messages if message.name in (names or ("caption",))]
    return [{key: value for key, value in message.data.items() if key not in ("latency", "cut")} for message in kept]


@contextmanager
def serving(
    stream: Any, source: Any, raises: type[Exception] | None = None, **options: Any
) -> Iterator[CaptionServer]:
    """A server on a free port of this machine; when the block ends, so has everything that it started.

    Args:
        raises: what `run` is to raise.
    """
    before = set(threading.enumerate())
    server = CaptionServer(stream, source, port=0, **options)
    errors: list[Exception] = []

    def run() -> None:
        try:
            server.run()
        except Exception as error:
            errors.append(error)

    runner = threading.Thread(target=run, daemon=True)
    runner.start()
    try:
        yield server
    finally:
        server.stop()
        runner.join(TIMEOUT)
    started = {thread.name for thread in threading.enumerate() if thread not in before}
    # Threads that prepare frames are the stream's, which may stay open.
    left = [name for name in started if "casa" in name and not name.startswith("casa-frames")]
    assert not runner.is_alive()
    assert not left
    assert [type(error) for error in errors] == ([] if raises is None else [raises])


def request(url: str, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any, bytes]:
    """Status, headers and body of an answer. Paths are sent as they are; bodies other than bytes become JSON."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=TIMEOUT)
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    if body is not None and not isinstance(body, bytes):
        body = json.dumps(body).encode()
        sent.setdefault("content-type", "application/json")
    try:
        connection.request(method, path, body, sent)
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()


def draw_clip(file: Path, num_frames: int, rate: int = 10) -> Path:
    """A film of a ball that rolls from left to right below a number."""
    images = []
    for index in range(num_frames):
        image = Image.new("RGB", (320, 180), (20, 30, 60))
        draw = ImageDraw.Draw(image)
        left = 270 * index // num_frames
        draw.ellipse((left, 60, left + 50, 110), fill=(240, 120, 40))
        draw.text((10, 10), str(index), fill="white", font_size=24)
        images.append(image)
    return encode(file, images, rate)


def encode(file: Path, images: Sequence[Image.Image], rate: int) -> Path:
    """A film of images that browsers play."""
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libvpx", rate=rate, options={"b": "4M", "crf": "4"})
        stream.width, stream.height = images[0].size
        stream.pix_fmt = "yuv420p"
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())
    return file
