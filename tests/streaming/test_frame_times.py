# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Streams that tell the model when each frame was taken, in the text before it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from casa_hf import CasaStream, CasaStreamBatch
from tests.streaming.helpers import OFF, Transcript, emitted, say
from tests.streaming.test_session import OPENING, PICTURES, PROMPT, QUESTION, RESUMPTION, forwards, stream_of

TIMES = [0.25, 1.0, 2.5, 3.75, 12.04, 3600.0]


@pytest.fixture(scope="module")
def timed(processor: Any) -> Any:
    """The processor, which now writes times."""
    made = copy.copy(processor)
    made.video_timestamps = "text"
    return made


@pytest.fixture(scope="module")
def reader(new_model: Any) -> Any:
    """Frames with nothing but their times between them are seen together, so that a time that closed their group
    would show."""
    return new_model("casa", casa_video_history="group", video_timestamps="text")


def test_tokens_are_those_of_one_call_on_the_whole_sequence(reader: Any, timed: Any) -> None:
    """With several frames in one forward, and a question in between."""
    transcript = Transcript(reader, timed)
    transcript.text(OPENING)
    stream = stream_of(reader, timed, max_new_tokens_per_frame=4, **OFF)
    for shown in ([0], [1, 2, 3], [4]):
        tokens = emitted(stream.push([PICTURES[index] for index in shown], [TIMES[index] for index in shown]))
        for index in shown:
            transcript.frame(PICTURES[index], seconds=TIMES[index])
        transcript.caption(tokens)
    transcript.text(QUESTION)
    transcript.answer(emitted(stream.ask("Who is it?", max_new_tokens=5)))
    transcript.text(RESUMPTION)
    transcript.frame(PICTURES[5], seconds=TIMES[5])
    transcript.caption(emitted(stream.push(PICTURES[5], TIMES[5])))
    assert stream.num_text_tokens == len(transcript.ids) - 1
    transcript.check()
    said = timed.decode(transcript.ids)
    assert all(f"[{time} seconds]<|vision_start|><|vision_end|>" in said for time in ("0.2", "1.0", "2.5", "3600.0"))
    # Were the times text like any other, the three frames of one forward would be three groups.
    logits = transcript.logits()
    transcript.times = []
    reader.config.video_timestamps = None
    assert float((transcript.logits() - logits).abs().max() / logits.abs().max()) > 1e-3
    reader.config.video_timestamps = "text"


def test_each_frame_is_fed_its_time_its_delimiters_and_their_types(reader: Any, timed: Any) -> None:
    with forwards(reader) as seen:
        list(stream_of(reader, timed, max_new_tokens_per_frame=1, fps=4).push(PICTURES[:2]))
    fed = seen[0]["input_ids"][0].tolist()
    expected = f"{OPENING}[0.0 seconds]<|vision_start|><|vision_end|>[0.2 seconds]<|vision_start|><|vision_end|>"
    assert fed == timed.tokenizer(expected)["input_ids"]
    types = seen[0]["mm_token_type_ids"][0].tolist()
    assert "".join(map(str, types)).strip("0").replace("3", "") == "0202"
    assert timed.decode([token for token, type in zip(fed, types, strict=True) if type == 3]) == (
        "[0.0 seconds][0.2 seconds]"
    )


def test_frames_that_share_an_image_have_the_mean_of_their_times(reader: Any, timed: Any) -> None:
    same = [PICTURES[0], PICTURES[3], PICTURES[6]]
    with forwards(reader) as seen:
        stream = stream_of(reader, timed, max_new_tokens_per_frame=1, frames_per_image=2)
        list(stream.push(same, [1.0, 2.5, 9.0]))
        list(stream.flush())
    said = [timed.decode(inputs["input_ids"][0]) for inputs in seen]
    assert "[1.8 seconds]<|vision_start|>" in said[0] and "[9.0 seconds]<|vision_start|>" in said[1]


def test_streams_of_a_batch_and_saved_streams(reader: Any, timed: Any) -> None:
    settings: dict[str, Any] = {"prompt": PROMPT, "max_new_tokens_per_frame": 5, "max_text_tokens": 90}
    alone = [CasaStream(reader, timed, **settings), CasaStream(reader, timed, **settings, fps=1)]
    expected = [say(alone[0], PICTURES[:5]), say(alone[1], PICTURES[2:7])]
    batch = CasaStreamBatch(reader, timed, **settings)
    streams = [batch.add(), batch.add(fps=1)]
    said: dict[int, list[Any]] = {stream: [] for stream in streams}
    for index in range(5):
        for stream, event in batch.push({streams[0]: PICTURES[index], streams[1]: PICTURES[index + 2]}):
            said[stream] += [event.token_ids] if event.kind == "end" else []
    assert list(said.values()) == expected

    stream = CasaStream(reader, timed, **settings)
    say(stream, PICTURES[:3])
    state = stream.state_dict()
    other = CasaStream(reader, timed, **settings)
    other.load_state_dict(state)
    assert say(other, PICTURES[3:5]) == expected[0][3:]
    native = copy.copy(timed)
    native.video_timestamps = "native"
    with pytest.raises(ValueError, match="with video_timestamps='text'; this one has video_timestamps='native'"):
        CasaStream(reader, native, **settings).load_state_dict(state)


def test_a_model_that_reads_times_is_given_them(reader: Any, processor: Any) -> None:
    for make in (CasaStream, CasaStreamBatch):
        with pytest.raises(ValueError, match=r"video_timestamps='text'.* the processor writes none\. Set processor"):
            make(reader, processor)


@torch.no_grad()
def test_the_familys_own_form(family: Any) -> None:
    model, processor = family("qwen3_vl")
    assert model.config.video_timestamps == processor.video_timestamps == "native"
    with forwards(model) as seen:
        list(stream_of(model, processor, max_new_tokens_per_frame=1).push(PICTURES[0], 7.5))
    fed = processor.decode(seen[0]["input_ids"][0])
    assert fed.endswith("<7.5 seconds><|vision_start|><|vision_end|>")
