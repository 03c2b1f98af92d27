# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Streams in one batch say what sessions of their own say, whoever joins, leaves or waits beside them."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig

from casa_hf import CaptionEvent, CasaStreamBatch, StreamSettings
from casa_hf.cache_layers import CasaStaticLayer
from tests.streaming.helpers import OFF, emitted, say
from tests.streaming.test_session import PICTURES, forwards, stream_of

PROMPTS = ("What do you see?", "Say it.", "Describe all that moves, and nothing else.")
SETTINGS: dict[str, Any] = {"max_new_tokens_per_frame": 8}
# Designs, and text windows.
SCENARIOS = [
    ("casa", None),
    ("casa", 70),
    pytest.param("ca-shared", None, marks=pytest.mark.slow),
    pytest.param("casa-shared", 70, marks=pytest.mark.slow),
    pytest.param("casa-replace", 70, marks=pytest.mark.slow),
    ("exact", 70),
    ("insertion", None),
]


def batch_of(model: Any, processor: Any, **settings: Any) -> CasaStreamBatch:
    # Frames that are pushed together are shown together, however long a busy machine takes for them.
    return CasaStreamBatch(model, processor, **{"collect_seconds": 60.0, **SETTINGS, **settings})


def by_stream(events: Any) -> dict[int, list[CaptionEvent]]:
    taken: dict[int, list[CaptionEvent]] = {}
    for stream, event in events:
        taken.setdefault(stream, []).append(event)
    return taken


def untimed(events: Any) -> list[CaptionEvent]:
    return [replace(event, latency=0.0) for event in events]


@pytest.mark.parametrize(("variant", "window"), SCENARIOS)
def test_streams_that_come_and_go_equal_separate_sessions(model, processor, variant, window):
    """Frames at different turns, several at once, a broken one, questions, a stream that joins late, one that goes."""
    model = model(variant)
    settings = {"max_text_tokens": window, "num_sink_tokens": 4}
    batch = batch_of(model, processor, **settings)
    alone = {}

    def add(number: int) -> int:
        stream = batch.add(prompt=PROMPTS[number])
        alone[stream] = stream_of(model, processor, prompt=PROMPTS[number], **SETTINGS, **settings)
        return stream

    def push(frames: dict[int, Any]) -> None:
        events = by_stream(batch.push(frames))
        assert events.keys() == frames.keys()
        for stream, frame in frames.items():
            expected = alone[stream].push(*(frame if isinstance(frame, tuple) else (frame,)))
            assert untimed(events[stream]) == untimed(expected)
            assert batch.num_text_tokens(stream) == alone[stream].num_text_tokens
            assert batch.num_frames(stream) == alone[stream].num_frames

    first, second = add(0), add(1)
    push({first: PICTURES[0]})
    push({first: (PICTURES[1], 1.5), second: [PICTURES[2], PICTURES[3]]})
    third = add(2)
    push({second: PICTURES[4]})
    push({third: PICTURES[5], first: [PICTURES[6], "no picture"]})
    answers = by_stream(batch.ask({second: "Who is it?", third: "Where?"}, max_new_tokens=5))
    assert untimed(answers[second]) == untimed(alone[second].ask("Who is it?", 5))
    assert untimed(answers[third]) == untimed(alone[third].ask("Where?", 5))
    push({first: PICTURES[7], second: PICTURES[8], third: PICTURES[0]})
    batch.remove(first)
    assert batch.streams == (second, third)
    for shown in PICTURES[1:4]:
        push({third: shown})
    fourth = add(0)
    push({fourth: PICTURES[1], second: PICTURES[2], third: "no picture"})
    push({fourth: PICTURES[3], second: PICTURES[4], third: PICTURES[5]})


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_frames_that_come_while_other_streams_speak(model, processor, sampled):
    """Each stream is given its next frame two events after the last one's end, whatever the others are at."""
    model = model("casa")
    settings: dict[str, Any] = {**SETTINGS, "do_sample": sampled}
    batch = batch_of(model, processor, **settings)
    streams = [batch.add(prompt=prompt, seed=number) for number, prompt in enumerate(PROMPTS)]
    taken: dict[int, list[CaptionEvent]] = {stream: [] for stream in streams}
    shown = {stream: PICTURES[stream : stream + 4] for stream in streams}
    idle = {stream: stream for stream in streams}  # and for how many events
    events = batch.push({})
    together = set()
    while any(shown.values()) or batch._steps or batch._events:
        ready = {stream: shown[stream].pop(0) for stream in idle if not idle[stream] and shown[stream]}
        idle = {stream: max(0, left - 1) for stream, left in idle.items() if stream not in ready}
        events = batch.push(ready) if ready else events
        together.add(frozenset(batch._forwards))
        if (pair := next(events, None)) is None:
            events = batch.push({})
            continue
        taken[pair[0]].append(pair[1])
        if pair[1].kind == "end":
            idle[pair[0]] = 2
    assert {len(streams) for streams in together} >= {1, 2}
    for number, stream in enumerate(streams):
        alone = stream_of(model, processor, prompt=PROMPTS[number], seed=number, **settings)
        expected = [event for shown in PICTURES[stream : stream + 4] for event in alone.push(shown)]
        assert untimed(taken[stream]) == untimed(expected)


@torch.no_grad()
def test_texts_that_are_ended_by_the_next_frame(model, processor):
    """Frames come faster than texts end. What each row was fed, in one call, is what its tokens follow from."""
    model = model("casa")
    batch = batch_of(model, processor, **OFF)
    streams = [batch.add(prompt=prompt) for prompt in PROMPTS]
    with forwards(model) as seen:
        for turn in range(9):
            events = batch.push({streams[n]: PICTURES[turn] for n in range(3) if (turn + n) % 3 or turn == 0})
            for _ in range(2 + turn):
                next(events, None)
        list(batch.push({}))
    for row in range(3):
        ids, generated, places, pixels, grids = [], [], [], [], []
        for inputs in seen:
            mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))[row].bool()
            own = inputs["input_ids"][row, mask].tolist()
            marks = inputs.get("image_positions", torch.zeros(0, 2, dtype=torch.long))
            parts = inputs["pixel_values"].split(inputs["image_grid_thw"].prod(-1).tolist()) if len(marks) else ()
            for (number, place), part, grid in zip(
                marks.tolist(), parts, inputs.get("image_grid_thw", ()), strict=True
            ):
                if number == row:
                    places.append([0, len(ids) + place - int((~mask).sum())])
                    pixels.append(part)
                    grids.append(grid)
            if own and ids:
                generated.append(len(ids))
            ids += own
        types = torch.zeros(1, len(ids), dtype=torch.long)
        types[0, [place for _, place in places]] = 2
        logits = model(
            input_ids=torch.tensor([ids]),
            pixel_values=torch.cat(pixels),
            image_grid_thw=torch.stack(grids),
            image_positions=torch.tensor(places),
            mm_token_type_ids=types,
            use_cache=False,
        ).logits[0]
        assert all(ids[place] == int(logits[place - 1].argmax()) for place in generated)
        assert 3 < len(places) < len(generated) and len(ids) == batch.num_text_tokens(streams[row])


def test_waiting_streams_do_not_pile_up_padding(model, processor, monkeypatch):
    """Streams that take turns: each has a row full of padding."""
    monkeypatch.setattr("casa_hf.streaming.batch._SPARE_POSITIONS", 8)
    model, settings = model("casa"), {"max_new_tokens_per_frame": 5}
    batch = batch_of(model, processor, **settings)
    streams = [batch.add(prompt=PROMPTS[0]) for _ in range(3)]
    alone = [stream_of(model, processor, prompt=PROMPTS[0], **settings) for _ in streams]
    lengths = []
    for turn in range(6):
        for number, stream in enumerate(streams):
            shown = PICTURES[turn + number]
            assert emitted(event for _, event in batch.push({stream: shown})) == emitted(alone[number].push(shown))
            longest = max(map(batch.num_text_tokens, streams))
            lengths.append(batch._cache.get_seq_length())
            assert longest <= lengths[-1]
            assert turn == 0 or lengths[-1] <= longest * 5 // 4 + 8 + 3
    assert any(after < before for before, after in pairwise(lengths)), "nothing was closed up"


@pytest.mark.parametrize("variant", ["casa", "exact"])
def test_a_fork_goes_its_own_way_and_a_reset_stream_begins_anew(model, processor, variant):
    model = model(variant)
    batch = batch_of(model, processor)
    first, second = batch.add(prompt=PROMPTS[0]), batch.add(prompt=PROMPTS[1])
    alone = stream_of(model, processor, prompt=PROMPTS[0], **SETTINGS)
    beginning = say(alone, PICTURES[:2])
    for shown in PICTURES[:2]:
        list(batch.push({first: shown, second: shown}))
    other, alone_other = batch.fork(first), alone.fork()
    for left, right in zip(PICTURES[2:5], PICTURES[5:8], strict=True):
        events = by_stream(batch.push({first: left, other: right}))
        assert emitted(events[first]) == emitted(alone.push(left))
        assert emitted(events[other]) == emitted(alone_other.push(right))
    batch.reset(first)
    assert batch.num_text_tokens(first) == batch.num_frames(first) == 0
    assert [emitted(event for _, event in batch.push({first: shown})) for shown in PICTURES[:2]] == beginning
    assert emitted(event for _, event in batch.push({other: PICTURES[8]})) == emitted(alone_other.push(PICTURES[8]))


def test_the_last_stream_frees_the_memory_when_it_leaves(model, processor):
    batch = batch_of(model("casa"), processor)
    stream = batch.add()
    list(batch.push({stream: PICTURES[0]}))
    assert sum(batch.nbytes.values()) > 0
    batch.remove(stream)
    assert batch.nbytes == {"text": 0, "image": 0} and batch.streams == ()
    assert batch.add() != stream


def test_a_reset_stream_reports_nothing_of_before(model, processor):
    batch = batch_of(model("casa"), processor)
    first, second = batch.add(), batch.add()
    frames = [PICTURES[0], PICTURES[1], PICTURES[2]]
    assert next(batch.push({first: frames, second: frames}))[0] == first
    batch.reset(first)
    events = by_stream(batch.push({first: PICTURES[3]}))
    assert [event.kind for event in events[second]][:2] == ["merged", "merged"]
    alone = stream_of(model("casa"), processor, prompt=StreamSettings().prompt, **SETTINGS)
    assert untimed(events[first]) == untimed(alone.push(PICTURES[3]))


@contextmanager
def failing_for(
    model: Any, row: int | None, error: BaseException, most_tokens: float = math.inf
) -> Iterator[list[int]]:
    """Every forward in which this row has new tokens, or any row if None, fails in its midst.

    Forwards in which it has more than `most_tokens` don't. Gives the numbers of rows that failed together.
    """
    rows: dict[int, int] = {}

    def note(module: Any, args: Any, kwargs: Any) -> None:
        mask = kwargs.get("attention_mask", torch.ones_like(kwargs["input_ids"]))
        rows.clear()
        rows.update({row: count for row, count in enumerate(mask.sum(1).tolist()) if count})

    def fail(module: Any, *_: Any) -> None:
        if row is None or 0 < rows.get(row, 0) <= most_tokens:
            failed.append(len(rows))
            raise error

    failed: list[int] = []
    handles = [
        model.register_forward_pre_hook(note, with_kwargs=True),
        model.model.language_model.layers[1].register_forward_hook(fail),
    ]
    try:
        yield failed
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize(
    ("moment", "variant", "window", "sampled"),
    [
        ("frame", "casa", 60, True),
        ("word", "casa", 60, False),
        ("word", "exact", None, True),
        ("question", "casa", 60, False),
    ],
)
def test_a_failing_forward_ends_the_text_of_the_row_that_it_fails_for(
    model, processor, variant, window, moment, sampled
):
    """The others say what they say without it, and the row goes on with its next frame as if it hadn't been asked."""
    model = model(variant)
    settings = {"max_text_tokens": window, "num_sink_tokens": 4, "do_sample": sampled}
    batch = batch_of(model, processor, **settings)
    alone = {}
    for number, prompt in enumerate((*PROMPTS, PROMPTS[0])):
        stream = batch.add(prompt=prompt, seed=number)
        alone[stream] = stream_of(model, processor, prompt=prompt, seed=number, **SETTINGS, **settings)

    def check(events: dict[int, list[CaptionEvent]], expected: dict[int, Any]) -> None:
        for stream, own in expected.items():
            assert untimed(events[stream]) == untimed(own)

    for turn in range(3):
        check(
            by_stream(batch.push({stream: PICTURES[turn + stream] for stream in alone})),
            {stream: own.push(PICTURES[turn + stream]) for stream, own in alone.items()},
        )
    lengths = {stream: len(emitted(each.fork().push(PICTURES[stream]))) for stream, each in alone.items()}
    bad = max(lengths, key=lengths.__getitem__)
    with failing_for(model, bad, OSError("out of memory"), 1 if moment == "word" else math.inf) as failed:
        if moment == "question":
            events = batch.ask(dict.fromkeys(alone, "Who is it?"), 6)
            own = {stream: each.ask("Who is it?", 6) for stream, each in alone.items() if stream != bad}
        else:
            events = batch.push({stream: PICTURES[stream] for stream in alone})
            own = {stream: each.push(PICTURES[stream]) for stream, each in alone.items() if stream != bad}
        said = by_stream(events)
    check(said, own)
    assert failed and max(failed) > 1, "it failed for several at first"
    last = said[bad][-1]
    assert (last.kind, last.message) == ("error", "OSError: out of memory")
    assert last.question == ("Who is it?" if moment == "question" else None)
    if moment == "word":  # its second one: as if the text had ended after the first
        alone[bad].settings = replace(alone[bad].settings, max_new_tokens_per_frame=1)
        assert untimed(said[bad][:-1]) == untimed(alone[bad].push(PICTURES[bad]))[:-1]
        alone[bad].settings = replace(alone[bad].settings, **SETTINGS)
    else:
        assert len(said[bad]) == 1
    if moment == "frame":
        alone[bad].drop(last.start, "never seen")
    for turn in range(2, 5):
        expected = {stream: own.push(PICTURES[turn + stream]) for stream, own in alone.items()}
        check(by_stream(batch.push({stream: PICTURES[turn + stream] for stream in alone})), expected)
        for stream, each in alone.items():
            assert batch.num_text_tokens(stream) == each.num_text_tokens
            assert batch.num_frames(stream) == each.num_frames


def test_a_device_that_has_gone_ends_every_text_and_loses_nothing(model, processor):
    model = model("casa")
    batch = batch_of(model, processor)
    alone = {batch.add(): stream_of(model, processor, prompt=StreamSettings().prompt, **SETTINGS) for _ in range(3)}
    list(batch.push(dict.fromkeys(alone, PICTURES[0])))
    with failing_for(model, None, OSError("the device has gone")):
        events = by_stream(batch.push({stream: [PICTURES[1], PICTURES[2]] for stream in alone}))
    assert all([event.kind for event in events[stream]] == ["merged", "error"] for stream in alone)
    said = by_stream(batch.push(dict.fromkeys(alone, PICTURES[3])))
    for stream, each in alone.items():
        list(each.push(PICTURES[0]))
        each.drop(0.5, "never seen", 2)
        each._last_timestamp = 1.0
        assert untimed(said[stream]) == untimed(each.push(PICTURES[3]))


def test_an_interrupt_during_a_forward_loses_nothing(model, processor):
    model = model("casa")
    batch = batch_of(model, processor)
    first, second = batch.add(), batch.add()
    alone = stream_of(model, processor, prompt=StreamSettings().prompt, **SETTINGS)
    list(batch.push({first: PICTURES[0], second: PICTURES[0]}))
    say(alone, PICTURES[:1])
    with failing_for(model, None, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        list(batch.push({first: PICTURES[1], second: PICTURES[1]}))
    assert list(batch.push({})) == []
    alone.drop(0.5, "never seen")
    for stream in (first, second):
        twin = alone.fork()
        assert untimed(by_stream(batch.push({stream: PICTURES[2]}))[stream]) == untimed(twin.push(PICTURES[2]))


def test_a_stream_that_cannot_read_its_token_begins_anew_alone(model, processor, monkeypatch):
    model = model("casa")
    batch = batch_of(model, processor)
    first, second = batch.add(), batch.add()
    alone = stream_of(model, processor, prompt=StreamSettings().prompt, **SETTINGS)
    list(batch.push({first: PICTURES[0], second: PICTURES[0]}))
    beginning = say(alone, PICTURES[:1])

    def broken(token: int) -> None:
        raise KeyError("no such token")

    monkeypatch.setattr(batch._rows[first]._pieces, "add", broken)
    events = by_stream(batch.push({first: PICTURES[1], second: PICTURES[1]}))
    assert untimed(events[second]) == untimed(alone.push(PICTURES[1]))
    assert [event.kind for event in events[first]] == ["error"]
    assert events[first][0].message == "KeyError: 'no such token' (the stream has been reset)"
    monkeypatch.undo()
    assert [emitted(by_stream(batch.push({first: PICTURES[0]}))[first])] == beginning
    assert emitted(by_stream(batch.push({second: PICTURES[2]}))[second]) == emitted(alone.push(PICTURES[2]))


def test_another_thread_is_refused_during_a_forward(model, processor):
    model = model("casa")
    batch = batch_of(model, processor)
    first, second = batch.add(), batch.add()
    alone = stream_of(model, processor, prompt=StreamSettings().prompt, **SETTINGS)
    taken = batch.push({second: PICTURES[0]})
    calls: list[Callable[[], Any]] = [
        batch.add,
        batch.close,
        lambda: batch.push({second: PICTURES[1]}),
        lambda: batch.ask({second: "Who is it?"}),
        lambda: batch.remove(second),
        lambda: batch.reset(first),
        lambda: batch.fork(first),
        lambda: batch.drop(first, 9.0, "late"),
        lambda: next(taken),
    ]
    refused: list[str] = []

    def call_all() -> None:
        for call in calls:
            try:
                call()
            except RuntimeError as error:
                refused.append(str(error))

    def from_a_thread(*_: Any) -> None:
        handle.remove()  # once
        thread = threading.Thread(target=call_all)
        thread.start()
        thread.join()

    handle = model.model.language_model.layers[1].register_forward_hook(from_a_thread)
    events = by_stream(batch.push({first: PICTURES[0]}))
    assert len(refused) == len(calls)
    assert all(message.startswith("The batch is being used by another thread") for message in refused)
    expected = untimed(alone.push(PICTURES[0]))
    assert untimed(events[first]) == untimed(events[second]) == expected
    # And in turns they may.
    thread = threading.Thread(target=lambda: events.update(by_stream(batch.push({first: PICTURES[1]}))))
    thread.start()
    thread.join()
    assert untimed(events[first]) == untimed(alone.push(PICTURES[1]))


def test_what_cannot_be_asked_leaves_all_other_texts_as_they_are(model, processor):
    model = model("casa")
    expected, said = {}, {}
    for refused in (False, True):
        batch = batch_of(model, processor)
        first, second = batch.add(prompt=PROMPTS[0]), batch.add(prompt=PROMPTS[1])
        third = batch.add()
        events = batch.push({first: PICTURES[0], second: PICTURES[1]})
        taken = [next(events)]
        if refused:
            for questions, limit, message in (
                ({first: "Who is it?", 7: "Who is it?"}, 5, "stream=7 must be one of the batch"),
                ({first: "Who is it?"}, 0, "max_new_tokens=0"),
            ):
                with pytest.raises(ValueError, match=message):
                    batch.ask(questions, max_new_tokens=limit)
        questions = {third: "Who is it?"} | ({second: "Who \ud83d?"} if refused else {})
        asked = list(batch.ask(questions, max_new_tokens=5))
        errors = [pair for pair in asked if pair[1].kind == "error"]
        assert [(stream, error.question) for stream, error in errors] == [(second, "Who \ud83d?")] * refused
        assert all("half a character" in error.message for _, error in errors)
        taken += [pair for pair in asked if pair not in errors]
        taken += batch.push({first: PICTURES[2], second: PICTURES[3]})
        said = {stream: untimed(own) for stream, own in by_stream(taken).items()}
        expected = expected or said
    assert said == expected and said.keys() == {first, second, third}
    assert max(len(event.token_ids) for event in said[first]) > 1


class Interrupting:
    """A frame during whose preparation Ctrl-C is pressed."""

    @property
    def shape(self) -> Any:
        raise KeyboardInterrupt


@pytest.mark.parametrize("told", ["frame", "question"])
def test_an_interrupt_before_a_forward_changes_nothing(model, processor, told):
    model = model("casa")
    batch = batch_of(model, processor)
    first, second = batch.add(prompt=PROMPTS[0], prefix="In this video"), batch.add()
    if told == "frame":
        batch.push({first: PICTURES[0]})
    else:
        batch.ask({first: "Who is it?"})
    with pytest.raises(KeyboardInterrupt):
        list(batch.push({second: Interrupting()}))
    said = [emitted(by_stream(batch.push({first: shown}))[first]) for shown in PICTURES[1:3]]
    alone = stream_of(model, processor, prompt=PROMPTS[0], prefix="In this video", **SETTINGS)
    assert said == say(alone, PICTURES[1:3])


def test_only_prompts_of_streams_need_room_in_the_window(model, processor):
    batch = batch_of(model("casa"), processor, max_text_tokens=45)  # the default prompt has more tokens
    assert batch.add(prompt="Say it.") == 0
    with pytest.raises(ValueError, match="max_text_tokens=45 must be larger"):
        batch.add()
    assert batch.streams == (0,)
    for settings in (
        {"max_text_tokens": 0},
        {"max_text_tokens": 50, "num_sink_tokens": 50},
        {"max_text_tokens": 45.5},
    ):
        with pytest.raises(ValueError, match="max_text_tokens="):
            batch_of(model("casa"), processor, **settings)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ((PICTURES[0], math.nan), "timestamp=nan"),
        ((PICTURES[0], 0.0), "later than 0.0"),
        ((PICTURES[0], 10**400), "timestamp=10"),
        ((PICTURES[0], "soon"), "timestamp='soon'"),
        (([PICTURES[0], PICTURES[1]], [1.0]), "1 values for 2 frames"),
        ((PICTURES[0], 1.0, 2.0), "a tuple of 3"),
        ([], "empty list"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_wrong_with_one_frame_refuses_that_one_alone(model, processor, bad, message):
    model = model("casa")
    batch = batch_of(model, processor)
    streams = [batch.add() for _ in range(3)]
    alone = stream_of(model, processor, prompt=StreamSettings().prompt, **SETTINGS)
    first = by_stream(batch.push(dict.fromkeys(streams, (PICTURES[0], 0.0))))
    assert untimed(first[0]) == untimed(alone.push(PICTURES[0], 0.0))
    events = by_stream(batch.push({0: PICTURES[1], 1: bad, 2: PICTURES[1]}))
    expected = untimed(alone.fork().push(PICTURES[1]))
    assert untimed(events[0]) == untimed(events[2]) == expected
    [error] = events[1]
    assert (error.kind, error.frame_index) == ("error", -1) and message in error.message
    assert batch.num_frames(1) == 1
    assert untimed(by_stream(batch.push({1: PICTURES[1]}))[1]) == expected


def test_each_stream_may_have_settings_of_its_own(model, processor):
    """Those of the batch hold for what `add` doesn't say."""
    model = model("casa")
    shared: dict[str, Any] = {"prompt": PROMPTS[1], "seed": 3, "do_sample": True, "fps": 4, "max_text_tokens": 80}
    own: list[dict[str, Any]] = [
        {},
        {"prompt": PROMPTS[0], "seed": 5, "prefix": "In this video"},
        {"max_new_tokens_per_frame": 2, "fps": 1, "max_new_tokens_per_answer": 3},
        {"do_sample": False, "stop_bias": None},
        {"repetition_penalty": 3.0, "max_text_tokens": None, "no_repeat_ngram_size": 0},
    ]
    batch = batch_of(model, processor, **shared)
    alone = {batch.add(**each): stream_of(model, processor, **{**SETTINGS, **shared, **each}) for each in own}
    for shown in PICTURES[:4]:
        events = by_stream(batch.push(dict.fromkeys(alone, shown)))
        assert {stream: untimed(own) for stream, own in events.items()} == {
            stream: untimed(single.push(shown)) for stream, single in alone.items()
        }
    answers = by_stream(batch.ask(dict.fromkeys(alone, "Who is it?")))
    for stream, single in alone.items():
        assert untimed(answers[stream]) == untimed(single.ask("Who is it?"))
    assert len(emitted(answers[2])) <= 3


def test_what_cannot_be_is_refused_and_changes_nothing(model, processor):
    model = model("casa")
    batch = batch_of(model, processor)
    first, second = batch.add(), batch.add()
    for frames, message in (
        ({first: PICTURES[0], 7: PICTURES[0]}, "stream=7 must be one of the batch"),
        ([PICTURES[0], PICTURES[1]], "frames is a list; give a dictionary"),
        (PICTURES[0], "frames is a Image; give a dictionary"),
    ):
        with pytest.raises(ValueError, match=message):
            batch.push(frames)
        assert batch.num_frames(first) == batch.num_frames(second) == 0
    with pytest.raises(ValueError, match="questions is a str; give a dictionary with the question of each stream"):
        batch.ask("What do you see?")
    for call in (batch_of, lambda model, processor, **settings: batch.add(**settings)):
        with pytest.raises(TypeError, match="'promt' is not a setting of a stream; did you mean 'prompt'"):
            call(model, processor, promt="What?")
    with pytest.raises(ValueError, match="fps=0"):
        batch_of(model, processor, fps=0)
    batch.close()
    for call in (batch.add, lambda: batch.push({}), lambda: batch.ask({}), lambda: batch.remove(first)):
        with pytest.raises(RuntimeError, match="closed"):
            call()


def test_dropped_frames_are_counted_by_their_stream(model, processor):
    batch = batch_of(model("casa"), processor)
    first, second = batch.add(), batch.add()
    assert (batch.drop(first, 0.0, "late").count, batch.num_frames(first)) == (1, 1)
    event = batch.drop(first, 2.0, "late", 4)
    assert (event.kind, event.count, event.frame_index, event.start) == ("dropped", 4, 4, 2.0)
    assert (batch.num_frames(first), batch.num_frames(second)) == (5, 0)
    events = by_stream(batch.push({first: PICTURES[0], second: PICTURES[0]}))
    assert (events[first][-1].frame_index, events[second][-1].frame_index) == (5, 0)


# ------------------------------------------------------------------------------------ compiled


@pytest.fixture
def compiled_model(new_model: Any, fresh_compiler: None) -> Callable[..., Any]:
    """variant -> a model whose streams compile, with the quickest compiler."""

    def make(variant: str, backend: str = "eager") -> Any:
        return compiling(new_model(variant), backend)

    return make


def compiling(model: Any, backend: str = "eager") -> Any:
    model.generation_config.compile_config = CompileConfig(backend=backend, mode=None)
    return model


def compile_steps(batch: CasaStreamBatch) -> int:
    """How many graphs of one-token forwards there are."""
    assert batch._one_token is not None
    return len(batch._one_token._steps)


@pytest.mark.parametrize(
    ("variant", "window", "backend"),
    [
        ("casa", 70, "eager"),
        pytest.param("casa", None, "aot_eager", marks=pytest.mark.slow),
        pytest.param("exact", 70, "eager", marks=pytest.mark.slow),
        pytest.param("ca-shared", 70, "eager", marks=pytest.mark.slow),
        pytest.param("insertion", None, "eager", marks=pytest.mark.slow),
    ],
)
def test_compiled_streams_equal_separate_sessions(compiled_model, processor, variant, window, backend):
    """They join, leave, wait, fork and are reset, over frames of all sizes; a graph for each number of rows."""
    model = compiled_model(variant, backend)
    settings: dict[str, Any] = {"max_text_tokens": window, "num_sink_tokens": 4, "do_sample": True}
    batch = batch_of(model, processor, compile=True, **settings)
    alone: dict[int, Any] = {}
    evicted = 0

    def add(number: int) -> int:
        stream = batch.add(prompt=PROMPTS[number % 3], seed=number)
        own = {**SETTINGS, **settings, "prompt": PROMPTS[number % 3], "seed": number, "compile": False}
        alone[stream] = stream_of(model, processor, **own)
        return stream

    def push(*streams: int) -> None:
        nonlocal evicted
        frames = {stream: PICTURES[(3 * stream + alone[stream].num_frames) % len(PICTURES)] for stream in streams}
        before = {stream: batch.num_text_tokens(stream) for stream in streams}
        events = by_stream(batch.push(frames))
        for stream, frame in frames.items():
            assert untimed(events[stream]) == untimed(alone[stream].push(frame))
            assert batch.num_text_tokens(stream) == alone[stream].num_text_tokens
            evicted += batch.num_text_tokens(stream) < before[stream]

    first = add(0)
    push(first)
    sizes = {1}
    second, third = add(1), add(2)
    for _ in range(2):
        push(first, third)
        push(second)
    sizes.add(4)
    fourth = batch.fork(third)
    alone[fourth] = alone[third].fork()
    for _ in range(2):
        push(first, second, third, fourth)
    answers = by_stream(batch.ask({second: "Who is it?", fourth: "Where?"}, max_new_tokens=5))
    assert untimed(answers[second]) == untimed(alone[second].ask("Who is it?", 5))
    assert untimed(answers[fourth]) == untimed(alone[fourth].ask("Where?", 5))
    batch.remove(first)
    batch.reset(third)
    alone[third].reset()
    fifth = add(4)
    for _ in range(2):
        push(second, third, fourth, fifth)
    sixth = add(5)
    sizes.add(8)
    push(sixth, second)
    for stream in (second, third, fourth, fifth):
        batch.remove(stream)
    assert len(batch._places) == 2, "a row to spare"
    sizes.add(2)
    push(sixth)
    push(sixth)
    assert batch._compiled is not None and compile_steps(batch) >= len(sizes)
    if window is not None:
        assert evicted > 0 and compile_steps(batch) == len(sizes)
    # The tower's graphs are for one, two or four frames of three sizes.
    towers = sum(each is not None for size in batch._tower._compiled.values() for each in size.values())
    assert counters["stats"]["unique_graphs"] == compile_steps(batch) + towers


def test_batches_of_a_model_share_their_steps(compiled_model, processor):
    """A second one compiles none, and the two take turns; a copy of the model has its own."""
    model = compiled_model("casa")

    def batch_and_streams(of: Any, compile: bool) -> tuple[CasaStreamBatch, list[int]]:
        batch = batch_of(of, processor, compile=compile, max_text_tokens=70)
        return batch, [batch.add(prompt=prompt) for prompt in PROMPTS[:2]]

    def said(batch: CasaStreamBatch, streams: list[int], number: int) -> Any:
        events = by_stream(batch.push({stream: PICTURES[number + stream] for stream in streams}))
        return [untimed(events[stream]) for stream in streams]

    plain = batch_and_streams(model, compile=False)
    expected = [said(*plain, number) for number in range(4)]
    first, second = (batch_and_streams(model, compile=True) for _ in range(2))
    assert [said(*first, number) for number in range(3)] == expected[:3]
    made = counters["stats"]["unique_graphs"]
    assert [said(*second, number) for number in range(3)] == expected[:3]
    assert said(*first, 3) == said(*second, 3) == expected[3]
    assert compile_steps(first[0]) == 1 and counters["stats"]["unique_graphs"] == made
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.neg_()
    alone = batch_and_streams(other, compile=True)
    assert compile_steps(alone[0]) == 0
    assert said(*alone, 0) == said(*batch_and_streams(other, compile=False), 0) != expected[0]


def test_unbounded_text_of_compiled_streams_doubles_the_room(compiled_model, processor, monkeypatch):
    """Each size is a graph; no text is lost."""
    monkeypatch.setattr("casa_hf.streaming.batch._FIRST_TOKENS", 64)
    model = compiled_model("casa")
    batch = batch_of(model, processor, compile=True)
    prompt = PROMPTS[0]
    stream = batch.add(prompt=prompt)
    alone = stream_of(model, processor, prompt=prompt, compile=False, **SETTINGS)
    rooms = []
    for number in range(3):
        frame, question = PICTURES[number], " ".join(["Who is it?"] * 50 * number)
        assert untimed(by_stream(batch.push({stream: frame}))[stream]) == untimed(alone.push(frame))
        question = question or "Where?"
        answer = by_stream(batch.ask({stream: question}, max_new_tokens=3))[stream]
        assert untimed(answer) == untimed(alone.ask(question, 3))
        rooms.append(batch._shape[1])
    assert rooms == [256, 512, 2048] and batch.num_text_tokens(stream) == alone.num_text_tokens
    assert compile_steps(batch) == len(rooms)


def test_a_failing_forward_of_compiled_streams_loses_nothing(compiled_model, processor):
    """Of a cache that is written in place: a forward that fails for one, and one that is interrupted."""
    model = compiled_model("casa")
    settings = {"max_text_tokens": 60, "num_sink_tokens": 4}
    batch = batch_of(model, processor, compile=True, **settings)
    alone = {
        batch.add(prompt=prompt): stream_of(model, processor, prompt=prompt, compile=False, **SETTINGS, **settings)
        for prompt in PROMPTS
    }

    def push(number: int) -> dict[int, list[CaptionEvent]]:
        return by_stream(batch.push({stream: PICTURES[number + stream] for stream in alone}))

    def check(number: int, streams: Any) -> None:
        events = push(number)
        for stream in streams:
            assert untimed(events[stream]) == untimed(alone[stream].push(PICTURES[number + stream]))

    for number in range(3):
        check(number, alone)
    with failing_for(model, 1, OSError("out of memory")) as failed:
        said = push(3)
    assert max(failed) > 1 and said[1][-1].message == "OSError: out of memory"
    for stream in (0, 2):
        assert untimed(said[stream]) == untimed(alone[stream].push(PICTURES[3 + stream]))
    alone[1].drop(said[1][-1].start, "never seen")
    check(4, alone)
    with failing_for(model, None, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        push(5)
    for each in alone.values():
        each.drop(each.last_timestamp + 0.5, "never seen")
    for number in range(3):
        check(number, alone)


KINDS = ("qwen3_5", "gist tokens", "pairs", "exact", "insertion")
SLOW_KINDS = ("qwen3_vl", "ca", "casa-shared", "ca-shared", "casa-replace", "casa-before")


@pytest.mark.parametrize("kind", [*KINDS, *(pytest.param(kind, marks=pytest.mark.slow) for kind in SLOW_KINDS)])
def test_every_kind_of_stream_is_compiled(compiled_model, family, processor, kind):
    """Recurrent states, gist tokens, frames in pairs, and images that are updated or inserted: streams that join,
    leave, wait, forget, fork and are reset say what they would say alone."""
    settings: dict[str, Any] = {**SETTINGS, "num_sink_tokens": 4}
    if kind in ("qwen3_5", "qwen3_vl", "gist tokens"):
        model, processor = family("helium", 2) if kind == "gist tokens" else family(kind)
        model = compiling(model)
        processor.frame_max_pixels *= 2  # above what small frames are enlarged to, which is rounded up
    elif kind == "pairs":
        model, settings["frames_per_image"] = compiled_model("casa"), 2
    else:
        model = compiled_model(kind)
    opening = len(stream_of(model, processor, **settings).turns.opening)
    if kind != "insertion":  # which keeps all images
        settings["max_text_tokens"] = opening + 30
    batch = batch_of(model, processor, compile=True, **settings)
    alone: dict[int, Any] = {}
    evictions = 0

    def add() -> int:
        stream = batch.add(prompt=PROMPTS[0])
        alone[stream] = stream_of(model, processor, prompt=PROMPTS[0], compile=False, **settings)
        return stream

    def push(*streams: int) -> None:
        nonlocal evictions
        frames = {stream: PICTURES[(3 * stream + alone[stream].num_frames // 2) % len(PICTURES)] for stream in streams}
        before = {stream: batch.num_text_tokens(stream) for stream in streams}
        events = by_stream(batch.push(frames))
        for stream, frame in frames.items():
            assert untimed(events.get(stream, [])) == untimed(alone[stream].push(frame))
            assert batch.num_text_tokens(stream) == alone[stream].num_text_tokens
            evictions += batch.num_text_tokens(stream) < before[stream]

    first, second = add(), add()
    for _ in range(3):
        push(first, second)
        push(second)
    third = add()
    push(third)
    answers = by_stream(batch.ask({second: "Who is it?", third: "Where?"}, max_new_tokens=5))
    assert untimed(answers[second]) == untimed(alone[second].ask("Who is it?", 5))
    assert untimed(answers[third]) == untimed(alone[third].ask("Where?", 5))
    for _ in range(2):
        push(first, second, third)
    batch.remove(first)
    fork = batch.fork(second)
    alone[fork] = alone[second].fork()
    batch.reset(third)
    alone[third].reset()
    for _ in range(3):
        push(third, second)
        push(fork)
    assert {rows for rows, *_ in batch._one_token._steps} == {2, 4}
    # Where all images are kept, room for them doubles from time to time, which is another shape.
    assert kind == "insertion" or compile_steps(batch) == 2
    assert (evictions > 0) == (kind != "insertion")


@pytest.mark.parametrize("error", [OSError("out of memory"), KeyboardInterrupt()], ids=["fails", "is interrupted"])
def test_an_eviction_of_compiled_streams_is_taken_back(compiled_model, processor, monkeypatch, error):
    """Of a cache that is written in place: one layer has forgotten already. If it fails, it is tried again."""
    model = compiled_model("casa")
    settings = {"max_text_tokens": 60, "num_sink_tokens": 4, "max_new_tokens_per_frame": 1}
    batch = batch_of(model, processor, compile=True, **settings)
    alone = {
        batch.add(prompt=prompt): stream_of(model, processor, prompt=prompt, compile=False, **settings)
        for prompt in PROMPTS
    }
    replaced, moved = CasaStaticLayer.replace_text, []

    def replace_text(layer: Any, *args: Any) -> None:
        replaced(layer, *args)
        moved.append(layer)
        if len(moved) == 2:
            raise error

    monkeypatch.setattr(CasaStaticLayer, "replace_text", replace_text)
    interrupts = 0
    for number in range(24):
        frames = {stream: PICTURES[(number + stream) % len(PICTURES)] for stream in alone}
        try:
            events = by_stream(batch.push(frames))
        except KeyboardInterrupt:
            interrupts += 1
            for each in alone.values():
                each.drop(each.last_timestamp + 0.5, "never seen")
            continue
        for stream, frame in frames.items():
            assert untimed(events[stream]) == untimed(alone[stream].push(frame))
            assert batch.num_text_tokens(stream) == alone[stream].num_text_tokens
    assert len(moved) > 2 and interrupts == isinstance(error, KeyboardInterrupt)
    assert compile_steps(batch) <= 1
