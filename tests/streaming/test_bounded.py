# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""A stream that forgets old text: what it says is what a dense reference says that masks what was forgotten."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from casa_hf import CasaStream
from tests.reference import Eviction, Image, Sample, reference_logits
from tests.streaming.helpers import OFF, Transcript, emitted, picture, say
from tests.streaming.test_session import OPENING, PICTURES, forwards, stream_of

ROOM = 30  # text tokens besides the sinks


def forgotten(calls: list[int], window: int, sinks: int) -> list[Eviction]:
    """What goes before calls of so many tokens each: beyond the window, the oldest quarter of what is no sink."""
    held: list[int] = []
    begin, evictions = 0, []
    for tokens in calls:
        if len(held) > window:
            last = window - (window - sinks) // 4 - sinks
            evictions.append(Eviction(begin, held[sinks:-last]))
            held = held[:sinks] + held[-last:]
        held += range(begin, begin + tokens)
        begin += tokens
    return evictions


def as_sample(transcript: Transcript, evictions: list[Eviction]) -> Sample:
    """A transcript as the dense reference takes it."""
    model, inputs = transcript.model, transcript.pixels()
    features = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
    grids = (inputs["image_grid_thw"][:, 1:] // model.config.vision_config.spatial_merge_size).tolist()
    images = [
        Image(place, (height, width), own, is_frame=True)
        for place, (height, width), own in zip(transcript.places, grids, features, strict=True)
    ]
    return Sample(transcript.ids, images, evictions=evictions)


@pytest.mark.parametrize(
    ("variant", "sinks"), [("casa", None), ("casa", 3), ("ca", 3), ("casa-shared", None), ("exact", 3)]
)
@torch.no_grad()
def test_tokens_are_those_of_a_dense_reference_that_forgets(model, processor, variant, sinks):
    model = model(variant)
    transcript = Transcript(model, processor)
    transcript.text(OPENING)
    first = len(transcript.ids) if sinks is None else sinks
    calls: list[int] = []
    settings: dict[str, Any] = {"max_text_tokens": first + ROOM, "num_sink_tokens": sinks, **OFF}
    with stream_of(model, processor, **settings) as stream, forwards(model) as seen:
        for shown in PICTURES[:8]:
            tokens = emitted(stream.push(shown))
            transcript.frame(shown)
            transcript.caption(tokens)
            assert stream.num_text_tokens <= first + ROOM + len(tokens) + 4
        calls = [inputs["input_ids"].shape[1] for inputs in seen]
    evictions = forgotten(calls, first + ROOM, first)
    assert len(evictions) >= (2 if sinks is None else 3)
    weights = model.state_dict()
    sample = as_sample(transcript, evictions)
    forgetting, remembering = reference_logits(model.config, weights, [sample, as_sample(transcript, [])])
    said = [(place, token) for place, token, *_ in transcript.said]
    assert all(token == int(forgetting[place - 1].argmax()) for place, token in said)
    late = [(place, token) for place, token in said if place >= evictions[0].before]
    assert any(token != int(remembering[place - 1].argmax()) for place, token in late), "nothing needed forgetting"


@pytest.mark.parametrize(("variant", "advance"), [("casa", 0), ("exact", 3)])
def test_memory_and_positions_stay_the_same_for_hundreds_of_frames(model, processor, variant: str, advance: int):
    """`advance`: positions that a frame, of 3 x 2 tokens, takes beside those of its text."""
    model = model(variant)
    shown = picture(0, 84, 56)
    settings = {"prompt": "Say it.", "max_new_tokens_per_frame": 1, "max_text_tokens": 80}
    held, text_bytes, positions = [], [], []
    with stream_of(model, processor, **settings) as stream:
        for _ in range(200):
            say(stream, [shown])
            held.append(stream.num_text_tokens)
            text_bytes.append(stream.nbytes["text"])
            positions.append(int(stream._cache.layers[0].window_state.next_position))
        image_bytes = stream.nbytes["image"]
    added = held[1] - held[0]  # tokens of a frame
    assert max(held) <= 80 + added
    # The frames whose text is kept, and at most one whose text is cut through.
    frames = [-(-(tokens - held[0] + added) // added) for tokens in held]
    for tokens, position, kept in zip(held, positions, frames, strict=True):
        assert max(0, kept - 1) * advance <= position - tokens <= kept * advance
    for values in (held, text_bytes, positions):
        early, late = values[40:120], values[120:200]
        assert max(early) == max(late) and min(early) == min(late)
    with stream_of(model, processor, **settings) as stream:
        say(stream, [shown])
        assert stream.nbytes["image"] == image_bytes


def test_a_long_answer_is_forgotten_while_it_is_given(new_model, processor):
    model = new_model("casa")
    model.generation_config.eos_token_id = model.config.get_text_config().eos_token_id
    stream = stream_of(model, processor, max_text_tokens=90, **OFF)
    say(stream, PICTURES[:1])
    held, events = [], []
    for event in stream.ask("Who is it?", max_new_tokens=200):
        held.append(stream.num_text_tokens)
        events.append(event)
    assert len(events[-1].token_ids) > 90, "too short to be forgotten"
    assert max(held) <= 91
    layer, layers = stream._cache.layers[0], len(stream._cache.layers)
    # Keys and values of self-attention and of the window's text.
    assert stream.nbytes["text"] <= 91 * layer.keys[0, :, 0].nbytes * 2 * 2 * layers


def test_a_saved_stream_goes_on_where_it_forgot(model, processor):
    model = model("casa")
    settings: dict[str, Any] = {"max_text_tokens": len(processor.tokenizer(OPENING)["input_ids"]) + ROOM}
    stream = stream_of(model, processor, **settings)
    say(stream, PICTURES[:6])
    other = stream_of(model, processor, **settings)
    other.load_state_dict(stream.state_dict())
    assert say(other, PICTURES[6:]) == say(stream.fork(), PICTURES[6:]) == say(stream, PICTURES[6:])


def test_models_that_cannot_forget_are_refused(new_model, processor):
    with pytest.raises(ValueError, match='is "all"'):
        CasaStream(new_model("insertion"), processor, max_text_tokens=500)
    model = new_model("casa")
    rope = model.model.language_model.rotary_emb
    rope.rope_type = "dynamic"
    with pytest.raises(ValueError, match="rope_type='dynamic'"):
        CasaStream(model, processor, max_text_tokens=500)
