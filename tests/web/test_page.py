# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The page's server: a real one, over real connections, with a real stream."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from PIL import Image

from casa_hf import CasaForConditionalGeneration, CasaProcessor
from casa_hf.streaming import CasaStream
from casa_hf.video import open_video
from casa_hf.web import CaptionServer
from tests.clips import every_kind, numbers

from .pages import TIMEOUT, Listener, draw_clip, events, request, serving

pytestmark = pytest.mark.integration

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

NUM_FRAMES = 6


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_clip(tmp_path_factory.mktemp("videos") / "ball.webm", 30)


@pytest.fixture(scope="module")
def make_stream(casa_folder: Path) -> Callable[[], CasaStream]:
    """Streams that say the same; drawn at random, so that they say something else from frame to frame."""
    model = CasaForConditionalGeneration.from_pretrained(casa_folder).eval()
    processor = CasaProcessor.from_pretrained(casa_folder)
    limits = {"max_new_tokens_per_frame": 5, "max_new_tokens_per_answer": 4}
    return lambda: CasaStream(model, processor, fps=2, do_sample=True, seed=1, **limits)


def pictures(number: int = NUM_FRAMES) -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [
        Image.fromarray(random.integers(0, 256, (56, 84, 3), dtype=np.uint8)).resize((84, 56)) for _ in range(number)
    ]


def plain(event: Any) -> dict[str, Any]:
    """An event as it arrives, but for its latency."""
    content = asdict(event) | {"token_ids": list(event.token_ids)}
    del content["latency"]
    return content


@pytest.fixture(scope="module")
def idle(make_stream: Callable[[], CasaStream]) -> Iterator[CaptionServer]:
    """A server whose stream nobody has started."""
    with serving(make_stream(), open_video(pictures(), fps=2)) as running:
        yield running


@pytest.fixture
def server(make_stream: Callable[[], CasaStream]) -> Iterator[CaptionServer]:
    with serving(make_stream(), open_video(pictures(), fps=2)) as running:
        yield running


def test_a_page_hears_the_events_of_the_stream(make_stream: Callable[[], CasaStream], clip: Path) -> None:
    reference = make_stream()
    expected, memory = [], []
    for frame in open_video(clip, fps=2):
        expected += map(plain, reference.push(frame.image, frame.timestamp))
        memory.append({"frame_index": reference.num_frames - 1, **reference.nbytes})
    assert len(memory) == NUM_FRAMES and sum(event["kind"] == "text" for event in expected) > NUM_FRAMES

    with serving(make_stream(), open_video(clip, fps=2), real_time=False) as server:
        heard = Listener(server.url).until_state("finished")
    session, *rest = heard
    assert session.name == "session" and session.data["title"] == "ball.webm" and session.data["video"] is True
    assert events(rest) == expected
    assert events(rest, "memory") == memory
    assert [message.data["state"] for message in rest if message.name == "state"] == ["running", "finished"]
    run = session.data["run"]
    assert [message.id for message in rest] == [f"{run}-{number}" for number in range(1, len(rest) + 1)]
    latencies = [message.data["latency"] for message in rest if message.name == "caption"]
    assert all(latency > 0 for latency in latencies)


def test_the_video_is_played_at_its_own_speed_and_waits_for_the_model(
    make_stream: Callable[[], CasaStream], clip: Path
) -> None:
    with serving(make_stream(), open_video(clip, fps=10, end=1.0)) as server:
        heard = Listener(server.url).until_state("finished")
    # With ten frames a second this model is late on a slow machine; no frame is lost to that.
    ends = [message.data for message in heard if message.name == "caption" and message.data["kind"] == "end"]
    assert [end["start"] for end in ends] == pytest.approx([index / 10 for index in range(10)])


def test_several_pages_hear_the_same(server: CaptionServer) -> None:
    first, second = Listener(server.url), Listener(server.url)
    everything = first.until_state("finished")[1:]
    assert [message for message in second.until_state("finished") if message.id] == everything
    late = Listener(server.url)
    assert next(iter(late)).data["state"] == "finished"
    assert late.until(lambda message: message.id == everything[-1].id) == everything


def test_a_page_that_comes_back_hears_the_rest(server: CaptionServer) -> None:
    page = Listener(server.url)
    known = page.until(lambda message: message.name == "memory")[-1]
    page.close()
    everything = [message for message in Listener(server.url).until_state("finished") if message.id]
    where = everything.index(known)
    back = Listener(server.url, last=known.id).until(lambda message: message.id == everything[-1].id)
    assert back[0].name == "session"
    assert back[1:] == everything[where + 1 :]


def test_a_page_of_another_server_begins_anew(server: CaptionServer) -> None:
    for last in ("0123456789abcdef-5", "x", "-1", "5", ""):
        assert Listener(server.url, last=last).until(lambda message: bool(message.id))[-1].id.endswith("-1")


def test_history_is_bounded_and_a_gap_is_told(make_stream: Callable[[], CasaStream]) -> None:
    with serving(make_stream(), open_video(pictures(), fps=2), max_history=7) as server:
        last = Listener(server.url).until_state("finished")[-1]
        number = int(last.id.rpartition("-")[2])
        late = Listener(server.url).until(lambda message: message.id == last.id)
    assert [message.name for message in late[:2]] == ["session", "gap"]
    assert late[1].data == {"lost": number - 7}
    assert [int(message.id.rpartition("-")[2]) for message in late[2:]] == list(range(number - 6, number + 1))


def test_pause_stops_the_model_and_questions_are_answered_between_frames(
    make_stream: Callable[[], CasaStream],
) -> None:
    questions = ["What is in this picture?", "And now <b>what</b>?", "At the end?"]
    images = pictures(9)
    with serving(make_stream(), open_video(images, fps=2)) as server:
        page = Listener(server.url)
        page.until(lambda message: message.name == "memory")
        assert request(server.url, "POST", "/pause", {})[0] == 202
        page.until_state("paused")
        assert request(server.url, "POST", "/pause", {})[0] == 202
        assert request(server.url, "POST", "/ask", {"question": questions[0]})[0] == 202
        page.until_answer()
        assert request(server.url, "POST", "/ask", {"question": f"  {questions[1]}\n"})[0] == 202
        between = page.until_answer()
        assert request(server.url, "POST", "/resume", {})[0] == 202
        page.until_state("finished")
        for path in ("/pause", "/resume"):
            assert request(server.url, "POST", path, {})[0] == 409
        assert request(server.url, "POST", "/ask", {"question": questions[2]})[0] == 202
        page.until_answer()
        heard = page.messages

    # What happened between the two answers, if the model was stopped: nothing.
    assert {message.name for message in between} == {"memory", "question", "answer"}
    assert [message.data["text"] for message in heard if message.name == "question"] == questions

    # The same by hand, with the questions where they were answered.
    asked = next(index for index, message in enumerate(heard) if message.name == "question")
    before = sum(message.name == "caption" and message.data["kind"] == "end" for message in heard[:asked])
    assert 1 <= before < len(images)
    stream = make_stream()
    expected = []
    for index, image in enumerate(images):
        if index == before:
            expected += [plain(event) for text in questions[:2] for event in stream.ask(text)]
        expected += map(plain, stream.push(image, index / 2))
    expected += map(plain, stream.ask(questions[2]))
    assert events(heard, "caption", "answer") == expected


def test_frames_are_shown_as_the_model_saw_them(make_stream: Callable[[], CasaStream]) -> None:
    images = [Image.new("RGB", (84, 56), colour) for colour in ("red", "green", "blue", "white", "gray", "red")] * 2
    images[-1] = Image.new("RGB", (1400, 210), "yellow")
    with serving(make_stream(), open_video(images, fps=2)) as server:
        heard = Listener(server.url).until_state("finished")
        run = heard[0].data["run"]
        assert heard[0].data["video"] is False
        answers = [request(server.url, "GET", f"/frames/{run}/{index}.jpg") for index in range(len(images) + 1)]
        assert request(server.url, "GET", "/frames/0123/11.jpg")[0] == 404
        assert request(server.url, "GET", "/video")[0] == 404
    assert [status for status, _, _ in answers] == [404] * 4 + [200] * 8 + [404]
    for image, (_, headers, content) in list(zip(images, answers, strict=False))[4:]:
        assert headers["content-type"] == "image/jpeg"
        shown = Image.open(BytesIO(content))
        assert shown.size == ((84, 56) if image.width == 84 else (960, 144))
        colours = np.asarray(shown, dtype=float).reshape(-1, 3)
        assert np.abs(colours - image.getpixel((0, 0))).max() < 8


@pytest.mark.parametrize("kind", ["float", "bfloat16", "with a gradient", "resized", "path"])
def test_frames_of_every_kind_are_shown(make_stream: Callable[[], CasaStream], tmp_path: Path, kind: str) -> None:
    images = [every_kind(index, tmp_path / f"{index}.png")[kind] for index in (5, 202)]
    with serving(make_stream(), open_video(images, fps=2)) as server:
        run = Listener(server.url).until_state("finished")[0].data["run"]
        answers = [request(server.url, "GET", f"/frames/{run}/{index}.jpg") for index in range(2)]
    assert [status for status, _, _ in answers] == [200, 200]
    assert numbers([Image.open(BytesIO(content)) for _, _, content in answers]) == [5, 202]


@pytest.mark.parametrize("kind", ["array", "file"])
def test_a_frame_that_cannot_be_used_is_an_event(make_stream: Callable[[], CasaStream], kind: str) -> None:
    images: list[Any] = pictures(3)
    whole = BytesIO()
    images[0].save(whole, "JPEG")
    # Pillow decodes a file when its pixels are asked for, and sees then that it isn't whole.
    images[1] = torch.zeros(7) if kind == "array" else Image.open(BytesIO(whole.getvalue()[:700]))
    with serving(make_stream(), open_video(images, fps=2)) as server:
        heard = Listener(server.url).until_state("finished")
        run = heard[0].data["run"]
        assert request(server.url, "GET", f"/frames/{run}/1.jpg")[0] == 404
        assert request(server.url, "GET", f"/frames/{run}/2.jpg")[0] == 200
    kinds = [(event["kind"], event["frame_index"]) for event in events(heard) if event["kind"] != "text"]
    assert kinds == [("end", 0), ("error", 1), ("end", 2)]


def test_what_is_asked_is_checked(server: CaptionServer) -> None:
    def answer(path: str, body: Any, **headers: str) -> tuple[int, str]:
        status, _, content = request(server.url, "POST", path, body, **headers)
        return status, content.decode()

    status, text = answer("/ask", {"question": "Too early?"})
    assert (status, json.loads(text)) == (409, {"error": "The question can't be answered: the stream is waiting."})
    page = Listener(server.url)
    page.until_state("finished")
    for question in ("", "  ", 5, None, "x" * 1001):
        status, text = answer("/ask", {"question": question})
        assert (status, "1 to 1000 characters" in text) == (400, True)
    assert answer("/ask", {})[0] == 400
    assert answer("/ask", [1])[0] == 400
    assert answer("/ask", b"{", content_type="application/json")[0] == 400
    assert answer("/ask", {"question": "x" * 9000})[0] == 413
    # What another site may send without asking first.
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        assert answer("/ask", b'{"question": "Hello?"}', content_type=kind)[0] == 415
        assert answer("/pause", b"{}", content_type=kind)[0] == 415
    # Image placeholders are text.
    assert answer("/ask", {"question": "What is <|vision_end|>?"})[0] == 202
    assert page.until_answer()[-1].data["kind"] == "answered"
    assert not any(message.name == "question" and "x" * 1001 in message.data["text"] for message in page.messages)


def test_waiting_questions_are_bounded(make_stream: Callable[[], CasaStream]) -> None:
    stream = make_stream()
    goes_on = threading.Event()
    goes_on.set()
    hook = stream.model.register_forward_pre_hook(lambda *_: goes_on.wait() and None)
    try:
        with serving(stream, open_video(pictures(), fps=2)) as server:
            page = Listener(server.url)
            page.until_state("finished")
            goes_on.clear()
            answers = [request(server.url, "POST", "/ask", {"question": f"{number}?"})[0] for number in range(10)]
            assert answers == [202] * 8 + [409] * 2
            goes_on.set()
            asked = [message for _ in range(8) for message in page.until_answer() if message.name == "question"]
            assert [message.data["text"] for message in asked] == [f"{number}?" for number in range(8)]
            assert request(server.url, "POST", "/ask", {"question": "Again?"})[0] == 202
            page.until_answer()
    finally:
        goes_on.set()
        hook.remove()


def test_ranges_of_the_file(make_stream: Callable[[], CasaStream], clip: Path) -> None:
    content = clip.read_bytes()
    size = len(content)

    with serving(make_stream(), open_video(clip, fps=2)) as server:

        def ask(method: str = "GET", **headers: str) -> tuple[int, Any, bytes]:
            return request(server.url, method, "/video", **headers)

        status, headers, body = ask()
        assert (status, body, headers["accept-ranges"], headers["content-type"]) == (
            200,
            content,
            "bytes",
            "video/webm",
        )
        for text, first, last in (
            ("bytes=0-", 0, size - 1),
            ("bytes=0-0", 0, 0),
            ("bytes=100-299", 100, 299),
            (f"bytes=200-{size + 50}", 200, size - 1),
            ("bytes=-100", size - 100, size - 1),
        ):
            status, headers, body = ask(Range=text)
            assert (status, headers["content-range"]) == (206, f"bytes {first}-{last}/{size}")
            assert body == content[first : last + 1]
        assert ask(Range=f"bytes={size}-")[0] == 416
        status, headers, body = ask("HEAD")
        assert (status, headers["content-length"], body) == (200, str(size), b"")


def test_the_page_needs_nothing_from_elsewhere(idle: CaptionServer) -> None:
    status, headers, page = request(idle.url, "GET", "/")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    linked = re.findall(r'(?:src|href)="([^"#]+)"', page.decode())
    assert sorted(linked) == ["/icon.svg", "/page.js", "/style.css"]
    for path in linked:
        status, headers, content = request(idle.url, "GET", path)
        assert status == 200 and headers["x-content-type-options"] == "nosniff"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert set(re.findall(r"https?://[\w./]+", content.decode())) <= {"http://www.w3.org/2000/svg"}
        # Captions are a model's words, and may be anything.
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", content.decode())


def test_a_question_of_half_a_character_is_refused_and_ends_nothing(server: CaptionServer) -> None:
    Listener(server.url).until_state("finished")
    status, _, content = request(
        server.url, "POST", "/ask", b'{"question": "What \\ud83d?"}', content_type="application/json"
    )
    assert status == 400 and "half a character" in json.loads(content)["error"]
    assert request(server.url, "POST", "/ask", {"question": "What <|im_start|>\U0001f600?"})[0] == 202
    assert Listener(server.url).until_answer()[-1].data["kind"] == "answered"


@pytest.mark.parametrize(
    "path",
    [
        "/../../../../etc/passwd",
        "/..%2f..%2f..%2fetc%2fpasswd",
        "//etc/passwd",
        "/static/index.html",
        "/index.html",
        "/frames/x/../../page.js",
        "/frames/%2e%2e/1.jpg",
        "/frames/0/%2fetc%2fpasswd.jpg",
        "/video/../server.py",
    ],
)
def test_a_path_is_never_a_file(idle: CaptionServer, path: str) -> None:
    assert request(idle.url, "GET", path)[0] == 404


def test_other_methods_and_hosts_are_refused(idle: CaptionServer) -> None:
    for path in ("/pause", "/resume", "/ask"):
        assert request(idle.url, "GET", path)[0] == 405
    for path in ("/", "/events", "/page.js"):
        assert request(idle.url, "POST", path, {})[0] == 405
    # A name of somebody else's that leads to this machine.
    for host in (
        "attacker.example",
        "attacker.example:80",
        "127.0.0.1.attacker.example",
        "127.0.0.1@attacker.example",
    ):
        for method, path in (("GET", "/"), ("GET", "/events"), ("POST", "/pause")):
            assert request(idle.url, method, path, Host=host)[0] == 400
    assert request(idle.url, "GET", "/", Host="localhost:1234")[0] == 200


ROUTES = [("GET", "/"), ("GET", "/events"), ("GET", "/events.js"), ("GET", "/frames/x/0.jpg"), ("POST", "/pause")]


def test_what_a_browser_asks_for_another_site_is_refused(idle: CaptionServer) -> None:
    own = f"http://{urlsplit(idle.url).netloc}"
    port = urlsplit(idle.url).port
    foreign: list[dict[str, str]] = [
        {"Origin": "https://attacker.example"},
        {"Origin": "null"},
        {"Origin": f"http://127.0.0.1:{port + 1}"},
        {"Origin": f"{own}.attacker.example"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
        {"Sec_Fetch_Site": "cross-site", "Origin": own},
    ]
    for headers in foreign:
        for method, path in ROUTES:
            status, answered, content = request(idle.url, method, path, {} if method == "POST" else None, **headers)
            assert status == 403 and "Other web sites" in json.loads(content)["error"]
            assert "access-control-allow-origin" not in answered
    # A link to the page is none of that, and its own requests aren't.
    assert request(idle.url, "GET", "/", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="navigate")[0] == 200
    assert request(idle.url, "GET", "/events.js", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="navigate")[0] == 403
    for headers in ({}, {"Origin": own}, {"Sec_Fetch_Site": "same-origin", "Origin": own}, {"Sec_Fetch_Site": "none"}):
        assert request(idle.url, "GET", "/page.js", **headers)[0] == 200
        assert request(idle.url, "POST", "/resume", {}, **headers)[0] == 409


def test_connections_that_send_nothing_or_half_a_request_hold_up_nobody(
    make_stream: Callable[[], CasaStream], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("casa_hf.web.server._REQUEST_SECONDS", 600.0)  # or their time would be up meanwhile
    monkeypatch.setattr("casa_hf.web.server._MAX_CONNECTIONS", 20)
    with ExitStack() as held, serving(make_stream(), open_video(pictures(), fps=2)) as server:
        place = urlsplit(server.url)
        page = Listener(server.url)
        for number in range(60):
            connection = held.enter_context(socket.create_connection((place.hostname, place.port), TIMEOUT))
            connection.sendall((b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n")[number % 3])
        assert request(server.url, "GET", "/page.js")[0] == 200
        page.until_state("finished")  # those that were served are served on


def test_half_a_request_is_given_up(make_stream: Callable[[], CasaStream], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("casa_hf.web.server._REQUEST_SECONDS", 0.2)
    monkeypatch.setattr("casa_hf.web.application._BODY_SECONDS", 0.2)
    whole = b"GET /icon.svg HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    head = b"POST /pause HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n"
    with serving(make_stream(), open_video(pictures(), fps=2)) as server:
        page = Listener(server.url)
        page.until_state("finished")
        place = urlsplit(server.url)
        for sent, answered in ((b"", b""), (b"GET / HT", b""), (whole + b"GET /", b"200 OK"), (head, b"408 ")):
            with socket.create_connection((place.hostname, place.port), TIMEOUT) as connection:
                connection.sendall(sent)
                received = b""
                try:
                    while chunk := connection.recv(1 << 16):
                        received += chunk
                        if b"408 " in received:
                            break
                except ConnectionResetError:
                    pass
            assert answered in received and bool(answered) == bool(received)
        # One that listens isn't given up, however long nothing happens.
        assert request(server.url, "POST", "/ask", {"question": "Still there?"})[0] == 202
        assert page.until_answer()[-1].data["kind"] == "answered"


def test_a_request_that_is_broken_off_is_no_error(
    make_stream: Callable[[], CasaStream], capfd: pytest.CaptureFixture[str]
) -> None:
    """A page that is closed while it asks."""
    head = b"POST /ask HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
    with serving(make_stream(), open_video(pictures(), fps=2)) as server:
        place = urlsplit(server.url)
        with socket.create_connection((place.hostname, place.port), TIMEOUT) as connection:
            connection.sendall(head)
            assert request(server.url, "GET", "/page.js")[0] == 200  # by now the server waits for the rest
        for _ in range(2):
            assert request(server.url, "GET", "/page.js")[0] == 200
    assert "Traceback" not in capfd.readouterr().err


def test_a_video_comes_in_pieces(
    make_stream: Callable[[], CasaStream], clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A browser holds one that it has all of the rest of a file for as long as the page is open."""
    monkeypatch.setattr("casa_hf.web.application._PIECE_BYTES", 1000)
    content = clip.read_bytes()
    with serving(make_stream(), open_video(clip, fps=2)) as server:
        assert request(server.url, "GET", "/video")[2] == content
        assert request(server.url, "GET", "/video", Range="bytes=5-2499")[2] == content[5:2500]
        received = b""
        while len(received) < len(content):
            status, headers, piece = request(server.url, "GET", "/video", Range=f"bytes={len(received)}-")
            end = min(len(received) + 1000, len(content)) - 1
            assert status == 206 and headers["content-range"] == f"bytes {len(received)}-{end}/{len(content)}"
            received += piece
        assert received == content
        assert request(server.url, "GET", "/video", Range=f"bytes={len(content)}-")[0] == 416


def test_pages_are_told_which_texts_go_on(make_stream: Callable[[], CasaStream]) -> None:
    """A caption that was cut goes on with the next frame's, maybe in the midst of a word; others begin anew."""
    stream = make_stream()
    stream.model.generation_config, kept = deepcopy(stream.model.generation_config), stream.model.generation_config
    try:
        vocabulary = stream.model.config.get_text_config().vocab_size
        stream.model.generation_config.eos_token_id = list(range(0, vocabulary, 5))
        stream = make_stream()
    finally:
        stream.model.generation_config = kept
    with serving(stream, open_video(pictures(8), fps=2)) as server:
        heard = Listener(server.url).until_state("finished")
    ends = [message.data for message in heard if message.name == "caption" and message.data["kind"] == "end"]
    assert [end["cut"] for end in ends] == [end["token_ids"][-1] % 5 != 0 for end in ends]
    assert {end["cut"] for end in ends} == {True, False}


def test_a_server_for_others_answers_to_any_name(make_stream: Callable[[], CasaStream]) -> None:
    with serving(make_stream(), open_video(pictures(), fps=2), host="0.0.0.0") as server:
        assert re.fullmatch(r"http://localhost:\d+/", server.url)
        assert request(server.url, "GET", "/", Host="robot.example:1")[0] == 200


def test_the_end_of_the_server_is_the_end_of_everything(make_stream: Callable[[], CasaStream]) -> None:
    made: list[CasaStream] = []
    remaining = []

    def make() -> CasaStream:
        made.append(make_stream())
        return made[0]

    def forever() -> Iterator[Image.Image]:
        while True:
            yield from pictures(1)

    with serving(make, open_video(forever(), fps=2)) as server:
        page = Listener(server.url)
        heard = page.until(lambda message: message.name == "memory")
        server.stop()
        remaining = list(page)  # ends, though the source doesn't
    assert [message.data["state"] for message in heard if message.name == "state"] == ["loading", "running"]
    assert remaining[-1].data["state"] == "closed"
    assert made[0].closed


def test_a_download_that_stands_still_does_not_hold_up_the_end(
    make_stream: Callable[[], CasaStream], clip: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    long = tmp_path / "long.webm"
    shutil.copy(clip, long)
    with long.open("r+b") as file:
        file.truncate(64 << 20)  # more than the buffers on the way hold
    with ExitStack() as held, serving(make_stream(), open_video(long, fps=2)) as server:
        host, port = urlsplit(server.url).netloc.split(":")
        connection = held.enter_context(socket.create_connection((host, int(port)), TIMEOUT))
        connection.sendall(f"GET /video HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")
    assert "Traceback" not in capfd.readouterr().err


def test_a_stream_that_was_given_stays_open(make_stream: Callable[[], CasaStream]) -> None:
    stream = make_stream()
    with serving(stream, open_video(pictures(2), fps=2)) as server:
        Listener(server.url).until_state("finished")
    assert not stream.closed
    with serving(stream, open_video(pictures(), fps=2)):
        pass  # nobody has opened the page
    assert stream.num_frames == 2


def test_an_error_is_shown_and_raised(make_stream: Callable[[], CasaStream]) -> None:
    def broken() -> Iterator[Image.Image]:
        yield from pictures(2)
        raise OSError("the camera was unplugged")

    with serving(make_stream(), open_video(broken(), fps=2), raises=OSError) as server:
        heard = Listener(server.url).until_state("failed")
        assert request(server.url, "POST", "/ask", {"question": "Why?"})[0] == 409
    assert heard[-1].data["message"] == "OSError: the camera was unplugged"
    assert any(event["kind"] == "end" for event in events(heard))


def test_a_page_is_told_no_password(make_stream: Callable[[], CasaStream], clip: Path, serve: Any) -> None:
    source = open_video(serve(clip.parent).replace("://", "://admin:word@") + "/ball.webm?token=secret", fps=2)
    with serving(make_stream(), source) as server:
        heard = Listener(server.url).until_state("finished")
    assert heard[0].data["title"] == "ball.webm" and not heard[0].data["video"]
    assert not any(part in json.dumps(message.data) for message in heard for part in ("admin", "word", "secret"))


def test_the_command(casa_folder: Path, clip: Path, tmp_path: Path) -> None:
    out = tmp_path / "ball.jsonl"
    command = [sys.executable, "-m", "casa_hf", "caption", str(clip), "--model", str(casa_folder), "--out", str(out)]
    with subprocess.Popen(
        [*command, "--fps", "2", "--end", "1.5", "--web", "--port", "0"],
        stderr=subprocess.PIPE,
        text=True,
        # A shell that starts it in the background would have it ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        assert process.stderr is not None
        try:
            said = next(line for line in process.stderr if "http" in line)
            url = re.search(r"http://127\.0\.0\.1:\d+/", said)
            assert url is not None
            page = Listener(url[0])
            heard = page.until_state("finished")
            assert request(url[0], "POST", "/ask", {"question": "What was it?"})[0] == 202
            heard += page.until_answer()
            process.send_signal(signal.SIGINT)
            assert process.wait(TIMEOUT) == 0
            assert "Traceback" not in process.stderr.read()
        finally:
            process.kill()
    written = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert [event["kind"] for event in written] == [event["kind"] for event in events(heard, "caption", "answer")]
    assert [event["text"] for event in written] == [event["text"] for event in events(heard, "caption", "answer")]
    assert {event["start"] for event in written} == {0.0, 0.5, 1.0}


def test_the_command_refuses_options_that_do_not_go_together(casa_folder: Path, clip: Path) -> None:
    from typer.testing import CliRunner

    from casa_hf.cli.app import app

    for arguments, expected in (
        (["--web", "--ask", "What?"], "the page takes questions"),
        (["--web", "--overlay", "out.mp4"], "--overlay"),
        (["--port", "80"], "are for the page. Add --web"),
        (["--host", "::1"], "are for the page. Add --web"),
    ):
        result = CliRunner().invoke(app, ["caption", str(clip), "--model", str(casa_folder), *arguments])
        assert result.exit_code == 2
        assert expected in " ".join(result.output.replace("│", " ").split())


def test_arguments_are_checked_before_any_work(make_stream: Callable[[], CasaStream], clip: Path) -> None:
    stream = make_stream()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"127\.0\.0\.1:{port} .*choose another host or port"):
            CaptionServer(stream, open_video(clip), port=port)
    for port in (-1, 70_000):
        with pytest.raises(ValueError, match=f"port={port} must be from 0 to 65535"):
            CaptionServer(stream, open_video(clip), port=port)
    with pytest.raises(ValueError, match="max_history=0 must be a positive integer"):
        CaptionServer(stream, open_video(clip), port=0, max_history=0)
    with pytest.raises(ValueError, match="late='sometimes'"):
        CaptionServer(stream, open_video(clip), port=0, late="sometimes")
    with pytest.raises(ValueError, match="real_time"):
        CaptionServer(stream, open_video(pictures()), port=0, late="drop")


@pytest.mark.parametrize("missing", ["uvicorn", "starlette.applications"])
def test_missing_packages_are_named(
    make_stream: Callable[[], CasaStream], monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "casa_hf.web.application", raising=False)
    with pytest.raises(ImportError, match=r"pip install casa_hf\[web\]"):
        CaptionServer(make_stream(), open_video(pictures()), port=0)
