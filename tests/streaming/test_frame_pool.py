# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Frames are decoded and resized by a pool of threads: the model's thread goes on with other texts meanwhile, and what
a stream says is the same, in 8 bits or not."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from casa_hf import CasaProcessor, CasaStream, CasaStreamBatch
from casa_hf.streaming import LiveCaptions, frame_pool
from casa_hf.streaming.steps import on_device
from casa_hf.video import open_video
from tests.labelled_device import LabelledDevices
from tests.streaming.helpers import emitted, picture

PICTURES = [picture(seed) for seed in range(4)]


@pytest.fixture
def casa(model: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model whose texts end where they are as long as they may be."""
    made = model("casa")
    monkeypatch.setattr(made.generation_config, "eos_token_id", None)
    return made


@contextmanager
def held_back(processor: CasaProcessor) -> Iterator[tuple[threading.Event, list[str]]]:
    """Let no frame be made before the event is set; the names of the threads that make them."""
    released, threads = threading.Event(), []
    own = CasaProcessor.frame_pixels

    def late(self: CasaProcessor, *args: Any) -> Any:
        threads.append(threading.current_thread().name)
        assert released.wait(30)
        return own(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CasaProcessor, "frame_pixels", late)
        yield released, threads
        released.set()


def test_streams_get_8_bit_pixels(casa: Any, processor: CasaProcessor) -> None:
    """Also of a prepared frame; a model that normalises otherwise gets the processor's own, and says the same."""
    stream = CasaStream(casa, processor)
    assert casa.model.visual.patch_embed.folded_frame is not None
    expected = emitted(stream.push(PICTURES[0])), emitted(stream.push(PICTURES[1]))
    assert stream.turns.pixels(PICTURES[0])["pixel_values"].dtype == torch.uint8
    stream.reset()
    prepared = [stream.prepare(frame) for frame in PICTURES[:2]]
    assert stream.prepare(prepared[0]) is prepared[0]
    assert (emitted(stream.push(prepared[0])), emitted(stream.push(prepared[1]))) == expected
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(casa.config, "image_mean", [0.1, 0.2, 0.3])
        other = CasaStream(casa, processor)
    assert other.turns.pixels(PICTURES[0])["pixel_values"].dtype == torch.float32
    assert (emitted(other.push(PICTURES[0])), emitted(other.push(PICTURES[1]))) == expected


def test_a_broken_frame_that_was_prepared_is_an_error_of_its_stream(casa: Any, processor: CasaProcessor) -> None:
    stream = CasaStream(casa, processor)
    [event] = stream.push(stream.prepare(b"no image"))
    assert event.kind == "error" and "can't be used" in event.message
    stream.close()
    with pytest.raises(RuntimeError, match="closed"):
        stream.prepare(PICTURES[0])


def test_frames_in_the_making_do_not_hold_up_other_texts(casa: Any, processor: CasaProcessor) -> None:
    """While the pixels of a stream's frame aren't there, another stream's text goes on to its end; with them, the
    stream says what it would have said."""
    batch = CasaStreamBatch(casa, processor, max_new_tokens_per_frame=5)
    first, second = batch.add(), batch.add()
    events = batch.push({first: PICTURES[0]})
    begun = [next(events)]
    with held_back(processor) as (released, threads):
        later = batch.push({second: PICTURES[1]})
        while begun[-1][1].kind != "end":
            begun.append(next(later))
        assert {stream for stream, _ in begun} == {first} and not released.is_set()
        released.set()
        rest = list(later)
    assert {stream for stream, _ in rest} == {second}
    assert threads and all(name.startswith("casa-frames") for name in threads)
    alone = CasaStream(casa, processor, max_new_tokens_per_frame=5)
    assert [event.text for _, event in rest] == [event.text for event in alone.push(PICTURES[1])]


def test_a_question_does_not_wait_for_frames_of_others(casa: Any, processor: CasaProcessor) -> None:
    batch = CasaStreamBatch(casa, processor, max_new_tokens_per_frame=3)
    first, second = batch.add(), batch.add()
    list(batch.push({first: PICTURES[0]}))
    with held_back(processor) as (released, _):
        batch.push({second: PICTURES[1]})
        events = batch.ask({first: "What is this?"}, max_new_tokens=4)
        answered = [next(events)]
        while answered[-1][1].kind != "answered":
            answered.append(next(events))
        assert {stream for stream, _ in answered} == {first} and not released.is_set()
        released.set()
        assert {stream for stream, _ in events} == {second}


def test_a_frame_takes_an_eighth_of_the_bytes(processor: CasaProcessor, casa: Any) -> None:
    frame = np.zeros((56, 56, 3), np.uint8)
    ours = CasaStream(casa, processor).turns.pixels(frame)["pixel_values"]
    stock = processor(videos=[[[frame]]], frames_per_image=1, return_tensors="pt")["pixel_values"]
    assert ours.nbytes == 56 * 56 * 3 and stock.nbytes == 8 * ours.nbytes


def test_pixels_are_pinned_once_and_copied_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the pool; in the model's thread only what isn't yet. Each image is copied by itself and joined there."""
    pins: list[int] = []
    pinned: set[int] = set()
    kept: list[torch.Tensor] = []

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        copy = tensor.clone()
        pins.append(tensor.nbytes)
        pinned.add(copy.data_ptr())
        kept.append(copy)
        return copy

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: tensor.data_ptr() in pinned)
    patches = [torch.full((4, 48), value, dtype=torch.uint8) for value in (1, 2)]
    device = torch.device("cuda")
    made = frame_pool.FramePool().prepare(0, lambda frame: {"pixel_values": patches[frame]}, device).pixels()
    assert pins == [4 * 48]
    with LabelledDevices() as devices:
        inputs = {"input_ids": torch.tensor([[1]]), "pixel_values": [made["pixel_values"], patches[1]]}
        moved = on_device(inputs, torch.device("cuda:0"))
        assert pins == [4 * 48, 4 * 48] and devices.waits == 0
        assert moved["pixel_values"].device.type == "cuda" and moved["pixel_values"].shape == (8, 48)


def test_frames_of_one_and_of_two_are_joined() -> None:
    """The still's frame is doubled where others have two."""
    single, pair = torch.arange(48, dtype=torch.uint8)[None], torch.arange(96, dtype=torch.uint8)[None]
    joined = on_device({"input_ids": torch.tensor([[1]]), "pixel_values": [single, pair]}, torch.device("cpu"))
    doubled = single.view(3, 1, 16).expand(3, 2, 16).reshape(1, 96)
    assert torch.equal(joined["pixel_values"], torch.cat([doubled, pair]))


def test_frames_of_a_video_are_prepared_as_they_come(casa: Any, processor: CasaProcessor) -> None:
    """Not in the thread of the model, which may still be busy with the frame before."""
    expected = [emitted(CasaStream(casa, processor).push(PICTURES[0]))]
    stream = CasaStream(casa, processor)
    with held_back(processor) as (released, threads):
        events = iter(LiveCaptions(stream, open_video(PICTURES, rate=2)))
        released.set()
        said = [event.token_ids for event in events if event.kind == "end"]
    assert said[:1] == expected and len(said) == len(threads) == len(PICTURES)
    assert all(thread.startswith("casa-frames") for thread in threads)


def test_frames_that_are_dropped_are_not_prepared(casa: Any, processor: CasaProcessor) -> None:
    """A second of video passes while the model looks at one frame: what is made is what is shown."""
    now = [0.0]

    def shown(_: Any) -> None:
        now[0] += 1.0

    def sleep(seconds: float) -> None:
        now[0] += seconds

    stream = CasaStream(casa, processor, max_new_tokens_per_frame=2)
    video = open_video([PICTURES[number % len(PICTURES)] for number in range(40)], rate=10)
    own, made = CasaProcessor.frame_pixels, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CasaProcessor, "frame_pixels", lambda *given: made.append(given) or own(*given))
        live = LiveCaptions(
            stream, video, late="drop", real_time=True, clock=lambda: now[0], sleep=sleep, on_frame=shown
        )
        kinds = [event.kind for event in live for _ in range(event.count)]
    assert kinds.count("dropped") > 30 and kinds.count("dropped") + kinds.count("end") == 40
    assert len(made) == kinds.count("end")


def test_a_frame_that_will_not_be_shown_is_not_made() -> None:
    released, made = threading.Event(), []
    pool, device = frame_pool.FramePool(), torch.device("cpu")

    def pixels(frame: int) -> dict[str, torch.Tensor]:
        released.wait(60)
        made.append(frame)
        return {"pixel_values": torch.zeros(1)}

    busy = [pool.prepare(number, pixels, device) for number in range(frame_pool._MAX_WORKERS)]
    pool.prepare(-1, pixels, device).cancel()
    last = pool.prepare(-2, pixels, device)
    released.set()
    for frame in (*busy, last):
        frame.pixels()
    assert sorted(made) == [-2, *range(frame_pool._MAX_WORKERS)]
