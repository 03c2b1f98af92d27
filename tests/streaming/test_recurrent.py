# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Streams of a model with linear attention, whose recurrent state nothing can be taken out of."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch

from casa_hf import CasaProcessor, cache_nbytes
from tests.reference import Qwen3_5Block, reference_logits
from tests.streaming.helpers import CONTROLS, OFF, Transcript, emitted, say
from tests.streaming.test_batch import (
    PROMPTS,
    SETTINGS,
    batch_of,
    by_stream,
    test_frames_that_come_while_other_streams_speak,
    test_streams_that_come_and_go_equal_separate_sessions,
    untimed,
)
from tests.streaming.test_bounded import ROOM, as_sample, forgotten
from tests.streaming.test_session import OPENING, PICTURES, QUESTION, RESUMPTION, forwards, stream_of

OPENING = OPENING[OPENING.index("<|im_start|>user") :]  # this family's template has no system message of its own
Pair = tuple[Any, CasaProcessor]

# Imported to be called here with this model; as tests of their own they run elsewhere.
equal_to_separate_sessions = test_streams_that_come_and_go_equal_separate_sessions
equal_while_others_speak = test_frames_that_come_while_other_streams_speak
del test_streams_that_come_and_go_equal_separate_sessions, test_frames_that_come_while_other_streams_speak


@pytest.fixture(scope="module")
def pair(family: Callable[..., Pair]) -> Pair:
    return family("qwen3_5")


@pytest.mark.parametrize("controls", [pytest.param({}, marks=pytest.mark.slow), CONTROLS], ids=["plain", "controlled"])
def test_tokens_are_those_of_one_call_on_the_whole_sequence(pair, controls):
    """Frames, questions, a reset, and forks that go their own way."""
    model, processor = pair
    stream = stream_of(model, processor, **({} if controls else OFF))
    say(stream, PICTURES[:2])
    stream.reset()
    transcript = Transcript(model, processor)
    transcript.text(OPENING)
    for index, shown in enumerate(PICTURES[:7]):
        fork = stream.fork()
        say(fork, PICTURES[7:])
        if index in (0, 3):
            transcript.text(QUESTION)
            transcript.answer(emitted(stream.ask("Who is it?", max_new_tokens=6)))
            transcript.text(RESUMPTION)
        transcript.frame(shown)
        transcript.caption(emitted(stream.push(shown)))
    transcript.check(**controls)
    assert len(set(transcript.captions)) > 8, "a model that always says the same would prove nothing"


@torch.no_grad()
@pytest.mark.parametrize("sinks", [pytest.param(None, marks=pytest.mark.slow), 3])
def test_what_is_forgotten_stays_in_the_recurrent_state(pair, sinks):
    """Tokens are those of a dense reference that masks forgotten text in attention, and lets linear attention read
    all of it."""
    model, processor = pair
    transcript = Transcript(model, processor)
    transcript.text(OPENING)
    first = len(transcript.ids) if sinks is None else sinks
    settings: dict[str, Any] = {"max_text_tokens": first + ROOM, "num_sink_tokens": sinks, **OFF}
    sizes = set()
    with stream_of(model, processor, **settings) as stream, forwards(model) as seen:
        for shown in PICTURES:
            tokens = emitted(stream.push(shown))
            transcript.frame(shown)
            transcript.caption(tokens)
            assert stream.num_text_tokens <= first + ROOM + len(tokens) + 4
            sizes.add(stream.nbytes["recurrent"])
        calls = [inputs["input_ids"].shape[1] for inputs in seen]
    assert len(sizes) == 1
    evictions = forgotten(calls, first + ROOM, first)
    assert len(evictions) >= 2
    samples = [as_sample(transcript, evictions), as_sample(transcript, [])]
    forgetting, remembering = reference_logits(model.config, model.state_dict(), samples, Qwen3_5Block)
    said = [(place, token) for place, token, *_ in transcript.said]
    assert all(token == int(forgetting[place - 1].argmax()) for place, token in said)
    late = [(place, token) for place, token in said if place >= evictions[0].before]
    assert any(token != int(remembering[place - 1].argmax()) for place, token in late), "nothing needed forgetting"


def test_a_saved_stream_resumes(pair):
    model, processor = pair
    settings: dict[str, Any] = {"max_text_tokens": 90, "num_sink_tokens": 4}
    stream = stream_of(model, processor, **settings)
    say(stream, PICTURES[:5])
    file = io.BytesIO()
    torch.save(stream.state_dict(), file)
    file.seek(0)
    resumed = stream_of(model, processor, **settings)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.nbytes == stream.nbytes and resumed.nbytes["recurrent"] > 0
    assert say(resumed, PICTURES[5:]) == say(stream, PICTURES[5:])


def test_a_damaged_state_is_refused_and_the_stream_stays_as_it_was(pair):
    model, processor = pair
    stream, other = stream_of(model, processor), stream_of(model, processor)
    say(stream, PICTURES[:2])
    say(other, PICTURES[2:4])
    state = stream.state_dict()
    layers = state["cache"]["layers"]
    linear, full = (next(n for n, x in enumerate(layers) if ("recurrent" in x) == wanted) for wanted in (True, False))
    assert len(layers) == 3
    convolution, memory = layers[linear]["recurrent"]
    conv, broken = {"recurrent": [convolution[..., 1:], memory]}, {"recurrent": [convolution, memory * float("nan")]}
    damages = [
        (linear, conv, "the recurrent state of layer"),
        (linear, broken, "has numbers that aren't finite"),
        (linear, {"recurrent": []}, "a part too few or too many"),
        (linear, layers[full], "a part too few or too many"),
        (full, layers[linear], "a part too few or too many"),
    ]
    before = other.fork()
    for place, change, message in damages:
        changed = [{**x, **change} if n == place else x for n, x in enumerate(layers)]
        if change in layers:
            changed[place] = change
        with pytest.raises(ValueError, match=message):
            other.load_state_dict({**state, "cache": {**state["cache"], "layers": changed}})
    assert say(other, PICTURES[4:6]) == say(before, PICTURES[4:6])
    geometry = {**state["design"], "linear_num_value_heads": 8}
    with pytest.raises(ValueError, match="linear_num_value_heads=8; this one has linear_num_value_heads=4"):
        other.load_state_dict({**state, "design": geometry})


@pytest.mark.parametrize("window", [pytest.param(None, marks=pytest.mark.slow), 60])
def test_streams_of_a_batch_are_those_of_sessions(pair, window):
    model, processor = pair
    equal_to_separate_sessions(lambda variant: model, processor, "casa", window)


@pytest.mark.slow
def test_streams_of_a_batch_speak_side_by_side(pair):
    model, processor = pair
    equal_while_others_speak(lambda variant: model, processor, False)


def test_a_failed_forward_of_one_stream_leaves_the_recurrent_state_of_all(pair):
    """The forward is run again for the others; the one that it fails for continues as it was before."""
    model, processor = pair
    batch = batch_of(model, processor)
    streams = [batch.add(prompt=prompt) for prompt in PROMPTS]
    alone = [stream_of(model, processor, prompt=prompt, **SETTINGS) for prompt in PROMPTS]

    def fail(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        if kwargs.get("images") is not None and 1 in kwargs["images"].rows:
            raise RuntimeError("no memory for this image")

    for turn, fails in enumerate((False, True, False)):
        language_model = model.model.language_model
        # After all blocks have run: their states have changed by then.
        handle = language_model.register_forward_hook(fail, with_kwargs=True) if fails else None
        events = by_stream(batch.push({stream: PICTURES[turn + number] for number, stream in enumerate(streams)}))
        if handle is not None:
            handle.remove()
        for number, own in enumerate(alone):
            if fails and number == 1:
                assert [event.kind for event in events[streams[1]]] == ["error"]
                own.drop(own.last_timestamp + 0.5, "as the batch counted it")
                continue
            expected = own.push(PICTURES[turn + number])
            assert [event.text for event in untimed(events[streams[number]])] == [event.text for event in expected]
    fork = batch.fork(streams[0])
    batch.reset(streams[1])
    pushed = by_stream(batch.push({fork: PICTURES[5], streams[0]: PICTURES[6], streams[1]: PICTURES[7]}))
    again = stream_of(model, processor, prompt=PROMPTS[1], **SETTINGS)
    assert emitted(pushed[fork]) == emitted(alone[0].fork().push(PICTURES[5]))
    assert emitted(pushed[streams[0]]) == emitted(alone[0].push(PICTURES[6]))
    assert emitted(pushed[streams[1]]) == emitted(again.push(PICTURES[7]))


def test_recurrent_memory_is_counted_from_the_beginning(pair):
    model, processor = pair
    stream = stream_of(model, processor)
    assert stream.nbytes == {"text": 0, "image": 0, "recurrent": 0}
    say(stream, PICTURES[:1])
    assert stream.nbytes == cache_nbytes(stream._cache) and stream.nbytes["recurrent"] > 0
    stream.close()
    assert stream.nbytes == {"text": 0, "image": 0, "recurrent": 0}
    batch = batch_of(model, processor)
    assert batch.nbytes == {"text": 0, "image": 0, "recurrent": 0}
