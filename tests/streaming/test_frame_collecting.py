# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The collecting window: what is ready at nearly the same time comes together, and nobody waits long."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from casa_hf.streaming.frame_collecting import FrameCollector
from casa_hf.streaming.frame_pool import FramePool
from tests.streaming.helpers import emitted
from tests.streaming.test_batch import PROMPTS, SETTINGS, batch_of, by_stream, untimed
from tests.streaming.test_session import PICTURES, stream_of


class Gates:
    """Frames that are ready when their gate is opened."""

    def __init__(self) -> None:
        self.opened = {name: threading.Event() for name in "abc"}

    def pixels(self, name: str) -> Any:
        assert self.opened[name].wait(30)
        return {"pixel_values": name}


@pytest.fixture
def gates() -> Any:
    made = Gates()
    yield made
    for event in made.opened.values():
        event.set()


CPU = torch.device("cpu")


def test_what_is_ready_is_held_back_for_a_while_only(gates):
    frames, pool = FrameCollector(collect_seconds=0.2), FramePool()
    first, second = (pool.prepare(name, gates.pixels, CPU) for name in "ab")
    frames.add(1, [first])
    frames.add(2, [second])
    assert frames.held_back(wait=False) == {1, 2}
    gates.opened["a"].set()
    assert first.pixels()["pixel_values"] == "a"
    assert frames.held_back(wait=False) == {1, 2}, "the other one may come soon"
    assert frames.held_back(wait=True) == {2}
    frames.remove(1)
    assert 1 not in frames and 2 in frames
    gates.opened["b"].set()
    assert frames.held_back(wait=True) == set() and second.pixels()["pixel_values"] == "b"


def test_frames_that_come_together_are_shown_together(gates):
    frames, pool = FrameCollector(collect_seconds=30), FramePool()
    for number, name in enumerate("abc"):
        frames.add(number, [pool.prepare(name, gates.pixels, CPU)])
    timer = threading.Timer(0.1, lambda: [event.set() for event in gates.opened.values()])
    gates.opened["b"].set()
    timer.start()
    assert frames.held_back(wait=True) == set()


def test_a_slow_frame_does_not_stop_the_texts_of_others(model, processor):
    """A camera that takes long for its frame: another stream says all of its text before that is there."""
    model = model("casa")
    batch = batch_of(model, processor, collect_seconds=0.0)
    slow, quick = batch.add(prompt=PROMPTS[0]), batch.add(prompt=PROMPTS[1])
    alone = [stream_of(model, processor, prompt=prompt, **SETTINGS) for prompt in PROMPTS[:2]]
    opened, pixels = threading.Event(), batch._rows[slow].turns.pixels

    def late(frame: Any) -> Any:
        assert opened.wait(120)
        return pixels(frame)

    batch._rows[slow].turns.pixels = late  # type: ignore[method-assign]
    events, said = batch.push({slow: PICTURES[0], quick: PICTURES[1]}), []
    while not said or said[-1].kind != "end":
        stream, event = next(events)
        assert stream == quick
        said.append(event)
    assert untimed(said) == untimed(alone[1].push(PICTURES[1]))
    opened.set()
    assert emitted(by_stream(events)[slow]) == emitted(alone[0].push(PICTURES[0]))
    batch.close()


def test_frames_of_texts_that_have_ended_are_not_prepared(model, processor, monkeypatch):
    """Frames come faster than they are prepared: what waits for that is each stream's newest alone."""
    monkeypatch.setattr("casa_hf.streaming.frame_pool._MAX_WORKERS", 1)
    batch = batch_of(model("casa"), processor, collect_seconds=0.0)
    slow, quick = batch.add(prompt=PROMPTS[0]), batch.add(prompt=PROMPTS[1])
    opened, made = threading.Event(), []
    for stream in (slow, quick):
        pixels = batch._rows[stream].turns.pixels

        def noted(frame: Any, stream: int = stream, pixels: Any = pixels) -> Any:
            assert opened.wait(120)
            made.append(stream)
            return pixels(frame)

        batch._rows[stream].turns.pixels = noted  # type: ignore[method-assign]
    batch.push({slow: PICTURES[0]})
    for shown in PICTURES[1:6]:
        batch.push({quick: shown})
    opened.set()
    events = by_stream(batch.push({}))
    assert made == [slow, quick] and events[quick][-1].frame_index == 4
    opened.clear()
    batch.push({slow: PICTURES[0], quick: PICTURES[0]})
    batch.close()  # waits for none of them
    opened.set()
    assert made.count(quick) == 1


@pytest.mark.parametrize("given", [-1, float("inf"), "soon"])
def test_what_is_no_time_is_refused(model, processor, given):
    with pytest.raises(ValueError, match="collect_seconds="):
        batch_of(model("casa"), processor, collect_seconds=given)
