# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The page in a real browser, from the video on the screen to the captions of the bundled captioner."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from PIL import Image

from casa_hf import CaptionEvent, CasaForConditionalGeneration, CasaProcessor
from casa_hf.streaming import CasaStream
from casa_hf.video import FrameIterator, open_video
from examples.tiny_world import live

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from .browser import PROGRAMS, Browser, Tab, find
from .pages import Listener, encode, events, serving

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(find() is None, reason=f"no browser here: none of {', '.join(PROGRAMS)}"),
]

QUESTION = "Is <img src=x onerror=alert(1)> shown?"
FRAME_SECONDS = 0.25
RATE = 8  # frames per second of the video
FRAMES = 480  # long enough to be in the middle of the video however slow the machine


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as running:
        yield running


@pytest.fixture(scope="module")
def make_stream() -> Callable[[], CasaStream]:
    model = CasaForConditionalGeneration.from_pretrained(live.CHECKPOINT).eval()
    processor = CasaProcessor.from_pretrained(live.CHECKPOINT)
    return lambda: live.new_stream(model, processor, fps=1 / FRAME_SECONDS)


def shown_captions(tab: Tab) -> list[str]:
    return tab.evaluate("[...document.querySelectorAll('#captions li p')].map((line) => line.textContent)")


def points(tab: Tab, plot: str, line: str) -> int:
    path = tab.evaluate(f"document.querySelector('#{plot} path.{line}')?.getAttribute('d') ?? ''")
    return len(re.findall(r"[ML]", path))


def assert_tidy(tab: Tab, url: str) -> None:
    """Nothing went wrong, nothing came from elsewhere, nothing is wider than the screen, everything has a name."""
    assert not tab.complaints
    assert {urlsplit(asked)[:2] for asked in tab.requests} == {urlsplit(url)[:2]}
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    nodes = tab.call("Accessibility.getFullAXTree")["nodes"]
    widgets = [node for node in nodes if node.get("role", {}).get("value") in ("button", "textbox", "Video", "list")]
    assert len(widgets) >= 4
    assert all(node["name"]["value"] for node in widgets if not node.get("ignored"))


def test_a_video_with_its_captions(browser: Browser, make_stream: Callable[[], CasaStream], tmp_path: Path) -> None:
    content = live.clip(200, FRAMES)
    repeats = int(RATE * FRAME_SECONDS)
    clip = encode(tmp_path / "things.webm", [frame for frame in content.frames for _ in range(repeats)], RATE)
    source = open_video(clip, fps=1 / FRAME_SECONDS)
    with serving(make_stream(), source) as server:
        tab = browser.open(server.url)
        tab.wait("document.title === 'things.webm'")

        # Captions appear while the video plays; both plots grow.
        tab.wait("document.querySelectorAll('#captions li').length >= 5 && video.currentTime > 0.2")
        tab.wait("document.querySelector('#subtitle').textContent")
        before = [points(tab, "latency-plot", "first"), points(tab, "memory-plot", "second")]
        tab.wait(f"Number(document.querySelector('#count-end').textContent) >= {max(before) + 2}")
        assert points(tab, "latency-plot", "first") > before[0]
        assert points(tab, "memory-plot", "second") > before[1]

        # A press on the button stops model and video.
        tab.click("#pause")
        tab.wait("document.querySelector('#status').dataset.state === 'paused' && video.paused")
        assert tab.evaluate("document.querySelector('#pause').textContent") == "Resume"

        # A question, written on the keyboard, is answered during the pause; what looks like HTML stays text.
        tab.click("#question")
        tab.type(QUESTION)
        tab.press("Enter", "Enter", "\r")
        tab.wait(
            "document.querySelector('#answers .answer')?.textContent && "
            "!document.querySelector('#asked').textContent && video.paused"
        )
        assert tab.evaluate("document.querySelector('#answers .question').textContent") == QUESTION
        assert tab.evaluate("document.querySelectorAll('#answers img').length") == 0

        # What is shown is what was generated.
        heard = Listener(server.url).until_answer()
        captions: dict[int, str] = {}
        for event in events(heard):
            captions[event["frame_index"]] = captions.get(event["frame_index"], "") + event["text"] * (
                event["kind"] == "text"
            )
        seen = [text for text in captions.values() if text]
        assert len(seen) > 2
        assert shown_captions(tab) == seen
        # And it is what the video shows, within one frame; the model is silent while nothing changes.
        changes = {frame: name for frame, name in enumerate(content.captions[: max(captions)]) if name}
        right = [
            any(captions.get(frame + late, "").strip() == name for late in (0, 1)) for frame, name in changes.items()
        ]
        assert sum(right) >= 0.9 * len(changes) > 2
        assert len(seen) <= len(changes) + 1
        answer = "".join(event["text"] for event in events(heard, "answer") if event["kind"] == "answer")
        assert tab.evaluate("document.querySelector('#answers .answer').textContent") == answer
        # The video isn't ahead of the captions.
        stopped = tab.evaluate("video.currentTime")
        assert stopped <= events(heard)[-1]["end"] + 0.1

        # A page that is loaded again knows what happened; so does another one, on a dark telephone.
        tab.call("Page.reload")
        tab.wait("document.querySelector('#answers .answer')?.textContent && !video.hidden")
        assert shown_captions(tab) == seen
        phone = browser.open(server.url, width=360, height=740, features={"prefers-color-scheme": "dark"})
        phone.wait("document.querySelector('#answers .answer')?.textContent && !video.hidden")
        assert shown_captions(phone) == seen
        assert phone.evaluate("document.querySelector('#status').dataset.state") == "paused"
        for name, page, width in (("wide", tab, 1280), ("narrow", phone, 360)):
            assert_tidy(page, server.url)
            page.screenshot(tmp_path / f"{name}.png")
            assert Image.open(tmp_path / f"{name}.png").width == width

        # The space bar goes on; a caption's time leads back to its moment.
        tab.call("Page.bringToFront")
        tab.press(" ", "Space", " ")
        tab.wait(f"document.querySelectorAll('#captions li').length > {len(seen)} && video.currentTime > {stopped}")
        tab.click("#captions li button")
        tab.wait(f"video.currentTime < {stopped}")
        assert_tidy(tab, server.url)


def test_frames_where_there_is_no_video_to_play(browser: Browser, make_stream: Callable[[], CasaStream]) -> None:
    images = [Image.new("RGB", (84, 56), colour) for colour in ("navy", "olive", "teal")]
    with serving(make_stream(), open_video(images, fps=4), title="Camera") as server:
        tab = browser.open(server.url)
        tab.wait("document.querySelector('#status').dataset.state === 'finished'")
        tab.wait("image.alt === 'Frame at 0:00' && image.complete && image.dataset.frame === '2'")
        assert tab.evaluate("[image.naturalWidth, image.naturalHeight, video.hidden]") == [84, 56, True]
        assert tab.evaluate("document.querySelector('h1').textContent") == "Camera"
        assert_tidy(tab, server.url)

    # The server has ended; the page says so.
    tab.wait("['closed', 'lost'].includes(document.querySelector('#status').dataset.state)")


def test_more_pages_than_a_browser_has_connections(
    browser: Browser, make_stream: Callable[[], CasaStream], tmp_path: Path
) -> None:
    """A browser opens six to a server; pages that come when the others have heard all know as much as these."""
    content = live.clip(3, 24)
    repeats = int(RATE * FRAME_SECONDS)
    clip = encode(tmp_path / "things.webm", [frame for frame in content.frames for _ in range(repeats)], RATE)
    source = open_video(clip, fps=1 / FRAME_SECONDS)
    with serving(make_stream(), source, real_time=False) as server:
        tabs = [browser.open(server.url) for _ in range(7)]
        for tab in tabs:
            tab.call("Page.bringToFront")  # pages behind others aren't drawn
            tab.wait("document.querySelector('#status').dataset.state === 'finished'")
        tabs += [browser.open(server.url) for _ in range(2)]
        shown = shown_captions(tabs[0])
        assert len(shown) > 2
        for tab in tabs:
            tab.call("Page.bringToFront")
            tab.wait("document.querySelector('#status').dataset.state === 'finished' && !video.hidden")
            assert shown_captions(tab) == shown
        # The last one asks, and all hear the answer.
        tabs[-1].click("#question")
        tabs[-1].type(QUESTION)
        tabs[-1].press("Enter", "Enter", "\r")
        for tab in tabs:
            tab.call("Page.bringToFront")
            tab.wait("document.querySelector('#answers .answer')?.textContent")
        for tab in tabs[:7]:
            tab.call("Page.close")
        late = browser.open(server.url)
        late.wait("document.querySelector('#answers .answer')?.textContent && !video.hidden")
        assert shown_captions(late) == shown
        assert_tidy(late, server.url)


def test_captions_of_different_frames_are_different_words(
    browser: Browser, make_stream: Callable[[], CasaStream], tmp_path: Path
) -> None:
    content = live.clip(3, 24)
    clip = encode(tmp_path / "things.webm", [frame for frame in content.frames for _ in range(2)], RATE)
    with serving(make_stream(), open_video(clip, fps=1 / FRAME_SECONDS), real_time=False) as server:
        tab = browser.open(server.url)
        tab.wait("document.querySelector('#status').dataset.state === 'finished' && !video.hidden")
        said = [text.strip() for text in shown_captions(tab)]
        assert len(said) > 2
        tab.evaluate("video.pause(), video.currentTime = video.duration")
        tab.wait("document.querySelector('#subtitle').textContent && video.currentTime > 5")
        subtitle = tab.wait("document.querySelector('#subtitle').textContent")
        assert " ".join(said).endswith(subtitle.lstrip("…"))
        assert subtitle.count(" ") >= 1


def test_frames_that_are_reported_together_are_counted_one_by_one(
    browser: Browser, make_stream: Callable[[], CasaStream], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A camera whose frames come all at once, much faster than any model."""
    monkeypatch.setattr("casa_hf.streaming.live._MAX_REPORTS", 0)
    camera = ((index / 10, Image.new("RGB", (84, 56), "navy")) for index in range(200))
    told: list[CaptionEvent] = []
    source = FrameIterator(camera, live=True)
    with serving(make_stream(), source, late="drop", on_event=told.append) as server:
        tab = browser.open(server.url)
        tab.wait("document.querySelector('#status').dataset.state === 'finished'")
        kinds = Counter(event.kind for event in told)
        tab.wait(f"document.querySelector('#count-end').textContent === '{kinds['end']}'")
        assert tab.evaluate("document.querySelector('#count-dropped').textContent") == str(200 - kinds["end"])
        assert 0 < 10 * kinds["dropped"] < 200 - kinds["end"]
