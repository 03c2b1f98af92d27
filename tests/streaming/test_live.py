# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Live captions: what happens to frames that come while the model is busy.

A clock that the tests turn stands for the time that the model takes, so every decision can be foretold.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import numpy as np
import pytest

from casa_hf import CaptionEvent, CasaStream
from casa_hf.streaming import LiveCaptions
from casa_hf.video import Frame, FrameIterator, VideoInput, VideoProblem, open_video
from tests.clips import picture

FPS = 10


class Clock:
    """Seconds, which pass when somebody says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def stream(model: Any, processor: Any) -> Iterator[CasaStream]:
    with CasaStream(model("casa"), processor, fps=FPS, max_new_tokens_per_frame=1) as opened:
        yield opened


def recorded(count: int) -> VideoInput:
    """Frames at 0, 0.1, 0.2, ... seconds."""
    return open_video([picture(index) for index in range(count)], rate=FPS)


def ticks(seconds: float) -> int:
    return round(seconds * FPS)


def run(captions: LiveCaptions, clock: Clock, busy: dict[int, float]) -> list[tuple[str, int]]:
    """Kinds and places of the events but texts; `busy` says how many seconds the model takes for a frame."""
    found = []
    for event in captions:
        if event.kind == "end":
            clock.now += busy.get(ticks(event.start), 0.0)
        if event.kind != "text":
            found.append((event.kind, ticks(event.start)))
    return found


BUSY = {2: 0.35, 7: 0.95}


def foretold(late: str, max_waiting: int, count: int) -> list[tuple[str, int]]:
    """What the policies mean, tick by tick: frame i is there at i; the model is busy for so many ticks."""
    found: list[tuple[str, int]] = []
    waiting: list[int] = []
    now, arrived = 0.0, 0
    while arrived < count or waiting:
        while arrived < count and arrived <= now + 1e-9:
            waiting.append(arrived)
            arrived += 1
            if late != "wait" and len(waiting) > max_waiting:
                found.append(("dropped", waiting.pop(0)))
        if not waiting:
            now = float(arrived)
            continue
        shown = waiting if late == "merge" else waiting[:1]
        waiting = waiting[len(shown) :]
        found += [("merged", index) for index in shown[:-1]] + [("end", shown[-1])]
        now += FPS * BUSY.get(shown[-1], 0.0)
    return found


@pytest.mark.parametrize(
    ("late", "max_waiting"), [("drop", 1), ("drop", 3), ("merge", 4), ("merge", 2), ("wait", 8), ("wait", 2)]
)
def test_late_frames_of_a_video_that_plays_at_its_own_speed(stream, late, max_waiting):
    clock = Clock()
    captions = LiveCaptions(
        stream, recorded(14), late=late, max_waiting=max_waiting, real_time=True, clock=clock, sleep=clock.sleep
    )
    expected = foretold(late, max_waiting, 14)
    assert run(captions, clock, BUSY) == expected
    kinds = {kind for kind, _ in expected}
    assert kinds == {"drop": {"end", "dropped"}, "merge": {"end", "merged", "dropped"}, "wait": {"end"}}[late]
    assert stream.num_frames == 14, "every frame is accounted for"
    assert clock.now >= 1000.0 + 1.3


def test_without_a_clock_nothing_is_lost_and_the_texts_are_those_of_the_stream_alone(model, processor):
    def events(of: Any) -> list[Any]:
        return [(event.kind, event.frame_index, event.start, event.token_ids) for event in of]

    frames = [picture(index) for index in range(6)]
    alone = CasaStream(model("casa"), processor, fps=FPS, max_new_tokens_per_frame=6)
    expected = [event for index, frame in enumerate(frames) for event in events(alone.push(frame, index / FPS))]
    captions = LiveCaptions(
        CasaStream(model("casa"), processor, fps=FPS, max_new_tokens_per_frame=6), open_video(frames, rate=FPS)
    )
    assert captions.late == "wait" and not captions.real_time
    assert events(captions) == expected
    assert sum(kind == "text" for kind, *_ in expected) > 4


def test_lag_is_how_late_the_newest_frame_was(stream):
    clock = Clock()
    captions = LiveCaptions(stream, recorded(5), late="wait", real_time=True, clock=clock, sleep=clock.sleep)
    lags = []
    for event in captions:
        if event.kind == "end":
            lags.append(round(captions.lag, 6))
            clock.now += 0.25
    assert lags == [0, 0.15, 0.3, 0.45, 0.6]


class Camera:
    """A live video in the hands of a test: `show` returns when the frame has arrived."""

    def __init__(self) -> None:
        self._shown, self._taken = threading.Semaphore(0), threading.Semaphore(0)
        self._items: list[Any] = []
        self._first = True

    def show(self, *indices: int) -> None:
        for index in indices:
            self._items.append((index / FPS, picture(index)))
            self._shown.release()
            # The next one is asked for when this one has been put.
            assert self._taken.acquire(timeout=30)

    def end(self) -> None:
        self._items.append(None)
        self._shown.release()

    def __iter__(self) -> Iterator[Any]:
        while True:
            if not self._first:
                self._taken.release()
            self._first = False
            self._shown.acquire()
            item = self._items.pop(0)
            if item is None:
                return
            yield item


def live(camera: Camera) -> VideoInput:
    return FrameIterator(camera, live=True)


@pytest.mark.parametrize(
    ("late", "max_waiting", "expected"),
    [
        ("drop", 1, [("end", 0), ("dropped", 1), ("dropped", 2), ("end", 3), ("end", 4)]),
        ("drop", 2, [("end", 0), ("dropped", 1), ("end", 2), ("end", 3), ("end", 4)]),
        ("merge", 4, [("end", 0), ("merged", 1), ("merged", 2), ("end", 3), ("end", 4)]),
        ("merge", 2, [("end", 0), ("dropped", 1), ("merged", 2), ("end", 3), ("end", 4)]),
    ],
)
def test_late_frames_of_a_camera(stream, late, max_waiting, expected):
    camera = Camera()
    captions = LiveCaptions(stream, live(camera), late=late, max_waiting=max_waiting)
    found = []
    feeder = threading.Thread(target=camera.show, args=(0,))
    feeder.start()
    for event in captions:
        if event.kind == "text":
            continue
        found.append((event.kind, ticks(event.start)))
        if found[-1] == ("end", 0):
            feeder.join()
            camera.show(1, 2, 3)  # while the model is still at frame 0
        if found[-1] == ("end", 3):
            camera.show(4)
            camera.end()
    assert found == expected
    assert stream.num_frames == 5


def test_a_pause_holds_a_recorded_video_and_passes_over_a_live_one(stream):
    clock = Clock()
    captions = LiveCaptions(stream, recorded(6), real_time=True, clock=clock, sleep=clock.sleep)
    found = []
    for event in captions:
        if event.kind == "end":
            found.append((ticks(event.start), round(clock.now - 1000, 6)))
            if ticks(event.start) == 2:
                captions.pause()
                assert captions.paused
                clock.now += 60
                captions.resume()
    assert found == [(0, 0), (1, 0.1), (2, 0.2), (3, 60.3), (4, 60.4), (5, 60.5)]

    camera = Camera()
    captions = LiveCaptions(stream.fork(), live(camera))
    captions.stream.reset()
    feeder = threading.Thread(target=camera.show, args=(0,))
    feeder.start()
    found = []
    for event in captions:
        if event.kind == "end":
            found.append(ticks(event.start))
            if found == [0]:
                feeder.join()
                captions.pause()
                camera.show(1, 2, 3)
                threading.Timer(0.05, lambda: (captions.resume(), camera.show(4), camera.end())).start()
        assert event.kind != "dropped", "what passes during a pause isn't late"
    assert found == [0, 4]


@pytest.mark.parametrize(("late", "max_waiting"), [("wait", 2), ("drop", 1), ("merge", 2)])
def test_after_a_pause_of_a_camera_nothing_is_late(stream, late, max_waiting):
    """Also where the thread that iterates is held between two events during the pause."""
    camera = Camera()
    captions = LiveCaptions(stream, live(camera), late=late, max_waiting=max_waiting)
    feeder = threading.Thread(target=camera.show, args=(0,))
    feeder.start()
    found = []
    for event in captions:
        if event.kind == "text":
            continue
        found.append((event.kind, ticks(event.start)))
        if found == [("end", 0)]:
            feeder.join()
            camera.show(1)  # waits when the pause begins
            captions.pause()
            camera.show(2, 3, 4, 5, 6)
            captions.resume()
            camera.show(7)
            camera.end()
    assert found == [("end", 0), ("end", 7)]


def test_questions_are_answered_between_frames_and_during_a_pause(stream):
    captions = LiveCaptions(stream, recorded(4))
    kinds = []
    for event in captions:
        kinds.append(event.kind)
        if event.kind == "end" and kinds.count("end") == 2:
            captions.pause()
            captions.ask("What is it?", max_new_tokens=3)
            captions.ask("What \ud83d is it?")
        if event.kind == "error":
            captions.resume()
    assert [kind for kind in kinds if kind not in ("text", "answer")] == [
        *["end"] * 2,
        "answered",
        "error",
        *["end"] * 2,
    ]


def test_what_cannot_be_asked_is_an_event_and_never_the_end(stream, monkeypatch):
    captions = LiveCaptions(stream, open_video([picture(0), picture(1)], rate=FPS))
    templates = iter(["{{ 1 / 0 }}", "{% for m in messages %}{% endfor %}"])
    kept = stream.processor.chat_template
    said = []
    for question in ("\ud83d", 5, "a template that fails", "a template that loses it", "fine"):
        if str(question).startswith("a template"):
            monkeypatch.setattr(stream.processor, "chat_template", next(templates))
        said += captions.answer(question, 1)
        monkeypatch.setattr(stream.processor, "chat_template", kept)
    errors = [event for event in said if event.kind == "error"]
    assert said[:4] == errors and said[-1].kind == "answered"
    for event, expected in zip(errors, ("half a char", "a string", "ZeroDivisionError: ", "0 times"), strict=True):
        assert expected in event.message
    assert [event.kind for event in captions].count("end") == 2


def test_times_that_the_stream_cannot_tell_apart_are_an_event_and_never_the_end(stream):
    """So late that half a second more is the same number."""
    list(stream.push(picture(0), 1e17))
    captions = LiveCaptions(stream, open_video([picture(1), picture(2)], rate=FPS), late="wait")
    kinds = [event.kind for event in captions]
    assert kinds and set(kinds) == {"error"}


def test_too_many_questions_are_refused_and_so_is_one_that_nobody_would_answer(stream):
    captions = LiveCaptions(stream, recorded(2))
    with pytest.raises(ValueError, match="16 questions wait"):
        for _ in range(17):
            captions.ask("And now?", max_new_tokens=1)
    events = list(captions)
    assert sum(event.kind == "answered" for event in events) == 16
    broken_off, stopped = (LiveCaptions(stream, recorded(2)) for _ in range(2))
    iterator = iter(broken_off)
    next(iterator)
    broken_off.ask("And now?")
    iterator.close()
    stopped.stop()
    for ended in (captions, broken_off, stopped):
        with pytest.raises(RuntimeError, match=r"have ended.* answer\(\)"):
            ended.ask("And now?")
    *_, event = captions.answer("And now?", 1)
    assert (event.kind, event.question, ticks(event.start)) == ("answered", "And now?", 1)


def test_a_question_after_the_last_frame_is_still_answered(stream):
    captions = LiveCaptions(stream, recorded(2))
    kinds = []
    for event in captions:
        kinds.append(event.kind)
        if kinds.count("end") == 2 and "answered" not in kinds:
            captions.ask("And now?", max_new_tokens=1)
            kinds.append("answered")
    assert kinds.count("answered") == 2


@pytest.mark.parametrize(
    ("late", "options"), [("wait", {}), ("merge", {"max_waiting": 2}), ("drop", {"max_waiting": 1})]
)
def test_a_further_source_runs_on_in_the_stream_and_keeps_its_own_times(stream, late, options):
    """After a first video, and in a stream that was saved and restored; also where the video begins later."""

    def told(of: CasaStream, video: VideoInput) -> tuple[LiveCaptions, list[tuple[str, int, float, float]]]:
        clock = Clock()
        captions = LiveCaptions(of, video, late=late, real_time=True, clock=clock, sleep=clock.sleep, **options)
        events = []
        for event in captions:
            if event.kind == "end":
                clock.now += BUSY.get(ticks(event.start), 0.0)
                if ticks(event.start) == 7:
                    captions.ask("What is it?", 1)
            if event.kind not in ("text", "answer"):
                events.append((event.kind, event.frame_index, event.start, event.end))
        return captions, events

    first, expected = told(stream, recorded(14))
    assert first.shift == 0.0 and stream.last_timestamp == 1.3
    assert {"end", "answered"} < {kind for kind, *_ in expected} or late == "wait"
    restored = CasaStream(stream.model, stream.processor, fps=FPS, max_new_tokens_per_frame=1)
    restored.load_state_dict(stream.state_dict())
    second, events = told(restored, recorded(14))
    assert events == [(kind, index + 14, start, end) for kind, index, start, end in expected], "times to the last bit"
    assert second.shift == pytest.approx(1.4) and restored.last_timestamp == pytest.approx(2.7)
    third, events = told(restored, open_video([picture(index) for index in range(14)], rate=FPS, start=0.5))
    assert ticks(events[0][2]) == 5 and third.shift == pytest.approx(2.3)
    assert restored.last_timestamp == pytest.approx(2.3 + 1.3)
    with pytest.raises(ValueError, match="later than"):
        restored.push(picture(0), 1.4)


def test_a_source_that_stalls_holds_up_neither_its_last_frame_nor_a_question(stream):
    """A recorded one in real time: what comes next decides, but doesn't come until both are done."""
    done = threading.Event()
    in_time = []

    def frames() -> Iterator[Any]:
        yield picture(0)
        in_time.append(done.wait(20))
        yield picture(1)

    captions = LiveCaptions(stream, open_video(frames(), rate=FPS), real_time=True, late="wait")
    found = []
    for event in captions:
        if event.kind not in ("end", "answered"):
            continue
        found.append((event.kind, ticks(event.start)))
        if len(found) == 1:
            threading.Timer(0.3, captions.ask, ("What is it?", 2)).start()
        if len(found) == 2:
            done.set()
    assert in_time == [True] and found == [("end", 0), ("answered", 0), ("end", 1)]


def test_stop_ends_after_the_frame_and_leaves_no_thread(stream):
    captions = LiveCaptions(stream, open_video("lavfi:testsrc=size=64x48:rate=100,realtime", fps=50))
    ends = 0
    for event in captions:
        ends += event.kind == "end"
        if ends == 2:
            captions.stop()
    assert ends == 2
    assert not [thread for thread in threading.enumerate() if thread.name == "casa-read-ahead"]


def test_a_broken_place_is_an_error_event_and_the_stream_goes_on(stream, tmp_path):
    from PIL import Image

    for index in range(4):
        Image.fromarray(picture(index)).save(tmp_path / f"{index}.png")
    (tmp_path / "1.png").write_bytes(b"broken")
    events = [event for event in LiveCaptions(stream, open_video(tmp_path, rate=FPS)) if event.kind != "text"]
    assert [(event.kind, ticks(event.start)) for event in events] == [("end", 0), ("error", 1), ("end", 2), ("end", 3)]
    assert "1.png" in events[1].message
    assert [event.frame_index for event in events] == [0, -1, 1, 2], "the video's error isn't a frame's"


def test_an_image_that_is_none_is_an_error_of_the_stream(stream):
    frames = [picture(0), np.full((2, 2), np.nan), picture(2)]
    events = [event for event in LiveCaptions(stream, open_video(frames, rate=FPS)) if event.kind != "text"]
    assert [(event.kind, event.frame_index) for event in events] == [("end", 0), ("error", 1), ("end", 2)]


def test_what_is_reported_is_bounded(stream):
    """A model that sleeps for an hour costs a bounded number of reports, which still count every frame."""
    clock = Clock()
    frames = ((index / 100, picture(0)) for index in range(5000))
    captions = LiveCaptions(stream, open_video(frames), late="drop", real_time=True, clock=clock, sleep=clock.sleep)
    events = []
    for event in captions:
        events.append(event)
        if event.kind == "end":
            clock.now += 3600
    assert accounted(events) == list(range(5000)) and len(events) < 1010
    assert sum(event.count for event in events if event.kind == "dropped") == 4998
    assert [(event.frame_index, event.start) for event in events if event.kind == "end"] == [(0, 0.0), (4999, 49.99)]
    several = [event for event in events if event.count > 1]
    assert [(event.kind, event.frame_index, event.start) for event in several] == [("dropped", 4998, 49.98)]
    assert stream.num_frames == 5000 and stream.last_timestamp == 49.99


class Script(VideoInput):
    """A video that gives what it is told, and runs what is in between, when it is asked for it."""

    def __init__(self, *items: Frame | VideoProblem | Callable[[], Any], live: bool = True):
        super().__init__("script", live=live)
        self._items = items

    def read(self) -> Iterator[Frame | VideoProblem]:
        for item in self._items:
            if callable(item):
                item()
            else:
                yield item


def accounted(events: list[CaptionEvent]) -> list[int]:
    """The indices of the frames that events stand for, in their order."""
    frames = [event for event in events if event.kind in ("end", "dropped", "merged")]
    return [index for event in frames for index in range(event.frame_index - event.count + 1, event.frame_index + 1)]


def test_problems_and_frames_that_a_stall_costs_are_counted_apart(stream):
    """The times of problems follow no order with frames; the next frame must fit into the stream nevertheless."""
    clock = Clock()
    script: list[Any] = [Frame(0.0, picture(0))]
    for index in range(1, 1500):
        script.append(Frame(index / 100, picture(0)))
        if index >= 1100:  # all of them beyond what is told one by one; both before and after the frame
            script.append(VideoProblem(index / 100 + (-0.05, 0.05)[index % 2], f"part {index} is broken"))
    video = Script(*script, Frame(15.0, picture(0)), live=False)
    captions = LiveCaptions(stream, video, late="drop", real_time=True, clock=clock, sleep=clock.sleep)
    events = []
    for event in captions:
        events.append(event)
        if event.kind == "end":
            clock.now += 3600
    assert accounted(events) == list(range(1501)) and stream.num_frames == 1501
    assert [event.start for event in events if event.kind == "end"] == [0.0, 15.0]
    (error,) = (event for event in events if event.kind == "error")
    assert (error.count, error.frame_index, error.start) == (400, -1, 14.99 + 0.05)
    assert "part 1499 is broken" in error.message and "400" in error.message
    assert len(events) < 1010


def test_a_problem_after_a_long_stall_of_a_camera_does_not_end_the_captions(stream):
    """The newest report is a problem later than the next frame, which comes only when it was told."""
    busy, over, told = threading.Event(), threading.Event(), threading.Event()
    broken = VideoProblem(55.05, "a part can't be decoded")
    script = [Frame(index / 20, picture(index % 4)) for index in range(1100)]
    video = Script(
        *(script[0], lambda: busy.wait(30), *script[1:], broken),
        *(over.set, lambda: told.wait(30), Frame(55.0, picture(2))),
    )
    events = []
    for event in LiveCaptions(stream, video):
        events.append(event)
        if event.kind == "error":
            told.set()
        if event.kind == "end" and event.start == 0.0:
            busy.set()
            assert over.wait(30)
    assert accounted(events) == list(range(1101)) and stream.num_frames == 1101
    errors = [(event.count, event.start, event.message) for event in events if event.kind == "error"]
    assert errors == [(1, 55.05, "a part can't be decoded")]
    assert [event.start for event in events if event.kind == "end"] == [0.0, 54.95, 55.0]


@pytest.mark.parametrize(
    ("late", "max_waiting", "expected"),
    [
        ("drop", 1, [("dropped", 1), ("end", 2)]),
        ("drop", 2, [("end", 1), ("end", 2)]),
        ("merge", 2, [("merged", 1), ("end", 2)]),
    ],
)
def test_problems_take_no_place_of_frames_that_wait(stream, late, max_waiting, expected):
    """They come while the model is still at frame 0."""
    busy, over = threading.Event(), threading.Event()
    broken = VideoProblem(0.15, "a part can't be decoded")
    frames = [Frame(index / FPS, picture(index)) for index in range(3)]
    video = Script(
        *(frames[0], lambda: busy.wait(30), broken, frames[1], broken, broken, frames[2], broken, broken, over.set),
        live=True,
    )
    captions = LiveCaptions(stream, video, late=late, max_waiting=max_waiting)
    events = []
    for event in captions:
        events.append(event)
        if event.kind == "end" and event.frame_index == 0:
            busy.set()
            assert over.wait(30)
    found = [(event.kind, ticks(event.start)) for event in events if event.kind not in ("text", "error")]
    assert found == [("end", 0), *expected]
    assert sum(event.count for event in events if event.kind == "error") == 5


def test_a_problem_is_told_while_no_frame_comes_and_before_an_error_that_ends_the_source(stream):
    told = threading.Event()

    def fail() -> None:
        raise OSError("the cable is out")

    video = Script(
        *(Frame(0.0, picture(0)), VideoProblem(0.1, "first"), lambda: told.wait(30) or fail()),
        *(VideoProblem(0.2, "second"), fail),
    )
    messages = []
    with pytest.raises(OSError, match="the cable is out"):
        for event in LiveCaptions(stream, video):
            if event.kind == "error":
                messages.append(event.message)
                told.set()
    assert messages == ["first", "second"]


def test_a_source_that_gives_no_frame_any_more_leaves_no_thread(stream):
    """Neither with problems without an end nor during a pause is there a frame at which the thread could end."""

    class Endless(VideoInput):
        def read(self) -> Iterator[Frame | VideoProblem]:
            yield Frame(0.0, picture(0))
            for index in count(1):
                time.sleep(0.001)
                yield Frame(index / FPS, picture(0)) if self.name == "good" else VideoProblem(0.5, "it is dark")

    for name in ("broken", "good"):
        captions = LiveCaptions(stream, Endless(name, live=True))
        events = iter(captions)
        assert any(event.kind == "end" for event in events)
        if name == "good":
            captions.pause()
        events.close()
        assert not [thread for thread in threading.enumerate() if thread.name == "casa-read-ahead"]
        stream.reset()


def test_an_error_of_the_source_comes_after_what_it_gave(stream):
    def frames() -> Iterator[Any]:
        yield picture(0)
        raise OSError("the cable is out")

    for real_time in (False, True):
        clock = Clock()
        events: list[CaptionEvent] = []
        stream.reset()
        captions = LiveCaptions(
            stream, open_video(frames(), rate=FPS), real_time=real_time, clock=clock, sleep=clock.sleep
        )
        with pytest.raises(OSError, match="the cable is out"):
            for event in captions:
                events.append(event)
        assert [event.kind for event in events if event.kind != "text"] == ["end"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"late": "never"}, "late='never' must be one of 'drop', 'merge', 'wait'"),
        ({"late": "drop"}, "late='drop' needs real_time=True"),
        ({"max_waiting": 0}, "max_waiting=0 must be a positive integer"),
        ({"max_waiting": 1.5}, "max_waiting=1.5 must be a positive integer"),
    ],
)
def test_wrong_options(stream, options, message):
    with pytest.raises(ValueError, match=message):
        LiveCaptions(stream, recorded(1), **options)
    with pytest.raises(ValueError, match=r"real_time=False is for recorded videos, and .* is live"):
        LiveCaptions(stream, live(Camera()), real_time=False)
