# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The thread that runs a page's model, without a page."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from casa_hf import CaptionEvent, CasaForConditionalGeneration, CasaProcessor, CasaStream
from casa_hf.video import FrameIterator, open_video
from casa_hf.web.player import Player
from tests import clips
from tests.streaming.test_live import FPS, Camera, picture, ticks

TIMEOUT = 30.0


def test_what_a_camera_shows_during_a_pause_in_the_midst_of_a_frame_is_not_late(
    casa_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread is held between two tokens of a frame, and can't look at what the camera gives.

    Nor does the pause make the frame slow or use up its budget: while it lasts, a clock jumps by an hour.
    """
    camera = Camera()
    clock, skipped = time.perf_counter, [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + skipped[0])
    paused, ended = threading.Event(), threading.Event()
    seen: list[tuple[str, int]] = []

    def on_event(event: CaptionEvent) -> None:
        seen.append((event.kind, ticks(event.start)))
        if len(seen) == 1:
            player.pause()
            paused.set()
        if seen[-1] == ("end", 4):
            ended.set()

    model = CasaForConditionalGeneration.from_pretrained(casa_folder).eval()
    processor = CasaProcessor.from_pretrained(casa_folder)
    settings: dict[str, Any] = {"real_time": True, "late": "drop", "max_history": 100}
    said: dict[str, Any] = {
        "max_new_tokens_per_frame": 6,
        "max_new_tokens_per_answer": 4,
        "do_sample": True,
        "seed": 1,
    }
    with CasaStream(model, processor, fps=FPS, frame_budget=1800.0, **said) as stream:
        undisturbed = list(CasaStream(model, processor, fps=FPS, **said).push(picture(0)))
        player = Player(stream, FrameIterator(camera, live=True), on_event=on_event, **settings)
        player.start()
        player.begin()
        try:
            camera.show(0)
            assert paused.wait(TIMEOUT)
            camera.show(1, 2, 3)
            assert len(seen) == 1 and seen[0] == ("text", 0), "in the midst of a frame"
            skipped[0] = 3600.0
            player.resume()
            camera.show(4)
            assert ended.wait(TIMEOUT)
        finally:
            player.hang_up()
            camera.end()
            player.close()
    told = [json.loads(entry.data) for entry in player.history.since(0) if entry.name == "caption"]
    assert [(event["kind"], ticks(event["start"])) for event in told if event["kind"] != "text"] == [
        ("end", 0),
        ("end", 4),
    ]
    assert all(0 < event["latency"] < 1800 for event in told)
    whole = next(event for event in told if event["kind"] == "end")
    assert tuple(whole["token_ids"]) == undisturbed[-1].token_ids
    assert len(whole["token_ids"]) == 6, "or a frame that is cut after its first tokens would pass"


@pytest.mark.parametrize("kind", ["file", "array"])
def test_pictures_are_those_that_were_shown(casa_folder: Path, tmp_path: Path, kind: str) -> None:
    """Also where the next one comes into the same file or buffer."""
    file, buffer = tmp_path / "latest.png", np.zeros_like(clips.picture(0))
    counted, done = threading.Semaphore(0), threading.Event()

    def camera() -> Iterator[Any]:
        for number in (3, 5):
            buffer[:] = clips.picture(number)
            Image.fromarray(buffer).save(file)
            yield file if kind == "file" else buffer
            assert counted.acquire(timeout=TIMEOUT)
        yield tmp_path / "nowhere.png"

    def on_event(event: CaptionEvent) -> None:
        if event.kind == "end":
            counted.release()
        if event.kind == "error":
            done.set()

    model = CasaForConditionalGeneration.from_pretrained(casa_folder).eval()
    processor = CasaProcessor.from_pretrained(casa_folder)
    settings: dict[str, Any] = {"real_time": True, "late": "wait", "max_history": 100}
    with CasaStream(model, processor, fps=FPS, max_new_tokens_per_frame=2, max_new_tokens_per_answer=4) as stream:
        player = Player(stream, FrameIterator(camera(), live=True), on_event=on_event, **settings)
        player.start()
        player.begin()
        try:
            assert done.wait(TIMEOUT)
            pictures = [player.image(index) for index in range(3)]
        finally:
            player.close()
    assert pictures[2] is None and player.error is None
    assert clips.numbers([Image.open(BytesIO(picture)) for picture in pictures[:2] if picture]) == [3, 5]


def test_a_question_that_comes_just_after_the_last_frame_is_answered(casa_folder: Path) -> None:
    """The captions have ended, but the player hasn't noticed yet."""
    answered = threading.Event()
    said: list[CaptionEvent] = []

    def on_event(event: CaptionEvent) -> None:
        said.append(event)
        if event.kind == "answered":
            answered.set()

    model = CasaForConditionalGeneration.from_pretrained(casa_folder).eval()
    processor = CasaProcessor.from_pretrained(casa_folder)
    settings: dict[str, Any] = {"real_time": False, "late": None, "max_history": 100}
    with CasaStream(model, processor, max_new_tokens_per_frame=1, max_new_tokens_per_answer=2) as stream:
        player = Player(stream, open_video([picture(0)], rate=FPS), on_event=on_event, **settings)
        assert player._captions is not None
        list(player._captions)
        player._set_state("running")
        player.ask("And now?")
        player.start()
        player.begin()
        try:
            assert answered.wait(TIMEOUT)
        finally:
            player.close()
    assert [event.question for event in said] == ["And now?"] * len(said) and said[-1].frame_index == 0
    assert not player._questions
