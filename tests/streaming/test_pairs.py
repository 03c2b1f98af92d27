# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Streams that show two frames as one image: what waits, what is shown when, and that it is what one call says."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from PIL import Image

from casa_hf import CaptionEvent, CasaProcessor, CasaStream, CasaStreamBatch
from casa_hf.streaming import LiveCaptions
from casa_hf.video import open_video
from tests.streaming.helpers import CONTROLS, Transcript, emitted, picture
from tests.streaming.test_session import OPENING, PROMPT, QUESTION, RESUMPTION, stream_of

FRAMES = [picture(seed) for seed in range(12)]
OTHER = [picture(seed, 56, 112) for seed in range(20, 24)]


class PairTranscript(Transcript):
    """What a stream was told, in images of two frames, or of one, which fills both places."""

    def pair(self, *frames: Image.Image) -> None:
        self.frame(frames[0])
        self.pictures[-1] = frames  # type: ignore[call-overload]

    def pixels(self) -> dict[str, torch.Tensor]:
        stock = self.processor.image_processor
        size = {"shortest_edge": stock.size["shortest_edge"], "longest_edge": self.processor.frame_max_pixels}
        patches, grids = [], []
        for frames in self.pictures:
            first, last = (stock(images=[frame], size=size, return_tensors="pt") for frame in (frames[0], frames[-1]))
            halves = [each["pixel_values"].reshape(-1, 3, 2, 14 * 14) for each in (first, last)]
            halves[0][:, :, 1] = halves[1][:, :, 1]
            patches.append(halves[0].reshape(-1, 3 * 2 * 14 * 14))
            grids.append(first["image_grid_thw"])
        return {"pixel_values": torch.cat(patches), "image_grid_thw": torch.cat(grids)}


def paired(model: Any, processor: CasaProcessor, **settings: Any) -> CasaStream:
    return stream_of(model, processor, frames_per_image=2, **settings)


def told(events: Iterable[CaptionEvent]) -> list[tuple[str, int]]:
    """Kinds and frames of the events but texts."""
    return [(event.kind, event.frame_index) for event in events if event.kind != "text"]


def contents(events: Iterable[CaptionEvent]) -> list[tuple[Any, ...]]:
    """All but latencies."""
    return [(e.kind, e.frame_index, e.start, e.end, e.text, e.token_ids, e.message) for e in events]


@pytest.mark.parametrize("variant", ["casa", "ca", "exact", "insertion"])
def test_tokens_are_those_of_one_call_on_pairs(model, processor, variant):
    model = model(variant)
    transcript = PairTranscript(model, processor)
    transcript.text(OPENING)
    with paired(model, processor) as stream:
        for number in range(0, 10, 2):
            assert list(stream.push(FRAMES[number])) == [] and stream.waiting_frames == (number,)
            events = list(stream.push(FRAMES[number + 1]))
            assert told(events) == [("merged", number), ("end", number + 1)] and stream.waiting_frames == ()
            assert [event.start for event in events] == [number / 2] + [(number + 1) / 2] * (len(events) - 1)
            transcript.pair(*FRAMES[number : number + 2])
            transcript.caption(emitted(events))
        # One that is left over.
        assert list(stream.push(FRAMES[10])) == []
        events = list(stream.flush())
        assert told(events) == [("end", 10)] and events[-1].start == 5.0
        transcript.pair(FRAMES[10])
        transcript.caption(emitted(events))
        assert list(stream.flush()) == [] and stream.num_frames == 11
    transcript.check(**CONTROLS)
    # Frames of their own say something else, so that the test can fail.
    alone = stream_of(model, processor)
    assert list(alone.push(FRAMES[0])) and alone.waiting_frames == ()
    doubled = PairTranscript(model, processor)
    doubled.text(OPENING), doubled.pair(FRAMES[0]), doubled.pair(FRAMES[0], FRAMES[1])
    first, second = doubled.pixels()["pixel_values"].chunk(2)
    assert not torch.equal(first, second)


def test_lists_of_frames_and_what_is_broken_among_them(model, processor):
    model = model("casa")
    transcript = PairTranscript(model, processor)
    transcript.text(OPENING)
    stream = paired(model, processor)
    assert told(stream.push(["no picture", FRAMES[0]])) == [("error", 0)] and stream.waiting_frames == (1,)
    assert told(stream.push("no picture")) == [("error", 2)] and stream.waiting_frames == (1,)
    events = list(stream.push([FRAMES[1], "no picture", FRAMES[2], FRAMES[3], FRAMES[4]]))
    assert told(events) == [("merged", 1), ("merged", 3), ("error", 4), ("merged", 5), ("end", 6)]
    transcript.pair(*FRAMES[:2]), transcript.pair(*FRAMES[2:4]), transcript.caption(emitted(events))
    assert stream.waiting_frames == (7,)
    stream.drop(stream.last_timestamp + 1, "busy", count=3)
    events = list(stream.push(FRAMES[5]))
    assert told(events) == [("merged", 7), ("end", 11)]
    transcript.pair(*FRAMES[4:6]), transcript.caption(emitted(events))
    transcript.check(**CONTROLS)


def test_a_frame_of_another_size_begins_a_new_pair(model, processor):
    model = model("casa")
    transcript = PairTranscript(model, processor)
    transcript.text(OPENING)
    stream = paired(model, processor)
    assert told(stream.push(FRAMES[0])) == []
    events = list(stream.push(OTHER[0]))
    assert told(events) == [("end", 0)] and stream.waiting_frames == (1,)
    transcript.pair(FRAMES[0]), transcript.caption(emitted(events))
    events = list(stream.push([OTHER[1], FRAMES[1], OTHER[2], OTHER[3], FRAMES[2]]))
    assert told(events) == [("merged", 1), ("merged", 2), ("merged", 3), ("merged", 4), ("end", 5)]
    transcript.pair(*OTHER[:2]), transcript.pair(FRAMES[1]), transcript.pair(*OTHER[2:])
    transcript.caption(emitted(events))
    assert told(stream.flush()) == [("end", 6)]
    transcript.check(**CONTROLS)


def test_a_question_is_about_what_is_shown_and_the_frame_waits_on(model, processor):
    model = model("casa")
    transcript = PairTranscript(model, processor)
    transcript.text(OPENING)
    stream = paired(model, processor)
    events = list(stream.push(FRAMES[:3]))
    transcript.pair(*FRAMES[:2]), transcript.caption(emitted(events))
    transcript.text(QUESTION)
    transcript.answer(emitted(stream.ask("Who is it?", max_new_tokens=5)))
    transcript.text(RESUMPTION)
    assert stream.waiting_frames == (2,)
    events = list(stream.push(FRAMES[3]))
    transcript.pair(*FRAMES[2:4]), transcript.caption(emitted(events))
    # To ask about it, it is shown before.
    assert told(stream.push(FRAMES[4])) == []
    events = list(stream.flush())
    transcript.pair(FRAMES[4]), transcript.caption(emitted(events))
    transcript.text(QUESTION)
    transcript.answer(emitted(stream.ask("Who is it?", max_new_tokens=5)))
    transcript.check(**CONTROLS)


def test_events_that_are_not_taken_show_nothing(model, processor):
    stream = paired(model("casa"), processor)
    stream.push(FRAMES[0])
    assert told(stream.push(FRAMES[1])) == [] and stream.waiting_frames == (1,), "the first frame was never looked at"
    events = stream.push(FRAMES[2])
    assert next(events).kind == "merged"
    assert told(stream.flush()) == [] and stream.waiting_frames == (), "ended before the model saw them"
    assert told(stream.push(FRAMES[3])) == []
    stream.reset()
    assert stream.waiting_frames == () and told(stream.flush()) == []


def test_what_waits_is_saved_and_forked(model, processor, tmp_path):
    model = model("casa")
    stream = paired(model, processor)
    list(stream.push(FRAMES[:3]))
    torch.save(stream.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    fork, restored = stream.fork(), paired(model, processor)
    restored.load_state_dict(state)
    expected = contents(stream.push(FRAMES[3]))
    assert {"merged", "end"} <= {kind for kind, *_ in expected}
    for other in (fork, restored):
        assert other.waiting_frames == (2,)
        assert contents(other.push(FRAMES[3])) == expected
    with pytest.raises(ValueError, match="with frames_per_image=2; this one has frames_per_image=1"):
        stream_of(model, processor).load_state_dict(state)
    frame = state["waiting"][0]
    for waiting, message in [
        ([frame, frame], "its waiting can't be"),
        ([{**frame, "index": 7}], "its waiting can't be"),
        ([{**frame, "timestamp": float("nan")}], "its waiting can't be"),
        ([{**frame, "pixel_values": frame["pixel_values"][1:]}], "its waiting can't be"),
        ([{"index": 2}], "damaged .KeyError"),
        (5, "damaged .TypeError"),
    ]:
        with pytest.raises(ValueError, match=message):
            restored.load_state_dict({**copy.deepcopy(state), "waiting": waiting})


def test_a_batch_says_what_streams_of_their_own_say(model, processor):
    """Pairs beside single frames, frames that come at different times, and what is left over."""
    model = model("casa")
    batch = CasaStreamBatch(model, processor, prompt=PROMPT, max_new_tokens_per_frame=8)
    streams = [batch.add(frames_per_image=2), batch.add(), batch.add(frames_per_image=2, prompt="And here?")]
    alone = [paired(model, processor), stream_of(model, processor), paired(model, processor, prompt="And here?")]

    def check(events: Iterable[tuple[int, CaptionEvent]], expected: dict[int, Any]) -> None:
        found: dict[int, list[CaptionEvent]] = {number: [] for number in expected}
        for stream, event in events:
            found[streams.index(stream)].append(event)
        for number, of_stream in expected.items():
            assert contents(found[number]) == contents(of_stream)

    def push(frames: dict[int, Any]) -> None:
        events = batch.push({streams[number]: frame for number, frame in frames.items()})
        check(events, {number: alone[number].push(frame) for number, frame in frames.items()})

    push({0: FRAMES[0], 1: FRAMES[1], 2: FRAMES[2]})
    push({0: FRAMES[3], 1: FRAMES[4]})
    push({0: FRAMES[5], 2: [FRAMES[6], FRAMES[7]]})
    push({2: "no picture"})
    check(batch.ask({streams[0]: "Who is it?"}, 4), {0: alone[0].ask("Who is it?", 4)})
    check(batch.flush(streams), {number: alone[number].flush() for number in range(3)})
    push({0: [FRAMES[8], FRAMES[9]], 1: FRAMES[10], 2: FRAMES[11]})
    with pytest.raises(ValueError, match="stream=9 must be one of the batch"):
        batch.flush([9])


@pytest.mark.parametrize("number", [6, 7])
def test_live_captions_show_what_is_left_over(model, processor, number):
    """With the video's times, also where the stream's run on from an earlier video."""
    model = model("casa")
    alone = paired(model, processor, fps=10)
    events = [event for index, frame in enumerate(FRAMES[:number]) for event in alone.push(frame, index / 10)]
    expected = contents([*events, *alone.flush()])
    live = paired(model, processor, fps=10)
    assert contents(LiveCaptions(live, open_video(FRAMES[:number], rate=10))) == expected
    assert live.waiting_frames == ()
    again = [event.start for event in LiveCaptions(live, open_video(FRAMES[:number], rate=10)) if event.kind == "end"]
    assert again == [start for kind, _, start, *_ in expected if kind == "end"]
    assert len(again) == 3 + number % 2


def test_the_setting_is_the_processors_unless_the_stream_has_its_own(model, processor):
    model, other = model("casa"), copy.copy(processor)
    other.frames_per_image = 2
    assert stream_of(model, other).frames_per_image == 2
    assert stream_of(model, other, frames_per_image=1).frames_per_image == 1
    assert stream_of(model, processor).frames_per_image == 1
    other.frames_per_image = "all"
    with pytest.raises(ValueError, match=r"frames_per_image='all' is none of 1, 2.* a stream never ends"):
        stream_of(model, other)
    assert stream_of(model, other, frames_per_image=2).frames_per_image == 2
    for refused in (0, 2.0, True, "all"):
        with pytest.raises(ValueError, match="frames_per_image="):
            stream_of(model, processor, frames_per_image=refused)
    with pytest.raises(ValueError, match="frames_per_image=3 is none of 1, 2"):
        stream_of(model, processor, frames_per_image=3)
    with pytest.raises(ValueError, match="frames_per_image=3 is none of 1, 2"):
        CasaStreamBatch(model, processor, prompt=PROMPT).add(frames_per_image=3)
