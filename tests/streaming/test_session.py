# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""A stream says what one call on everything it was told and has said would say."""

from __future__ import annotations

import gc
import math
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from itertools import zip_longest
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from casa_hf import CaptionEvent, CasaStream, CasaStreamBatch, MediaPolicy, cache_nbytes
from casa_hf.design_space import VARIANTS
from casa_hf.streaming.drawing import History
from tests.streaming.helpers import CONTROLS, OFF, Transcript, emitted, naive_scores, picture, say

PROMPT = "What do you see?"
OPENING = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    f"{PROMPT}<|im_end|>\n<|im_start|>assistant\n"
)
QUESTION = "<|im_end|>\n<|im_start|>user\nWho is it?<|im_end|>\n<|im_start|>assistant\n"
RESUMPTION = "<|im_end|>\n<|im_start|>assistant\n"
# Of different sizes, as when a camera is turned or a source changes its resolution.
PICTURES = [picture(seed, width, height) for seed, (width, height) in enumerate([(84, 56), (56, 112), (84, 84)] * 3)]


def stream_of(model: Any, processor: Any, **settings: Any) -> CasaStream:
    return CasaStream(model, processor, **{"prompt": PROMPT, "max_new_tokens_per_frame": 8, **settings})


@contextmanager
def forwards(model: Any) -> Iterator[list[dict[str, Any]]]:
    """The inputs of every forward."""
    seen: list[dict[str, Any]] = []
    handle = model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


# ------------------------------------------------------------------------------------ one call


@pytest.mark.parametrize(
    ("variant", "controls"),
    [*((variant, CONTROLS) for variant in VARIANTS), ("casa", {}), ("ca", {}), ("exact", {})],
    ids=[*VARIANTS, "casa plain", "ca plain", "exact plain"],
)
def test_tokens_are_those_of_one_call_on_the_whole_sequence(model, processor, variant, controls):
    model = model(variant)
    transcript = Transcript(model, processor)
    transcript.text(OPENING)
    waiting = list(transcript.ids)
    mark = processor.tokenizer("<|vision_start|><|vision_end|>")["input_ids"]
    ends = set()
    with stream_of(model, processor, **({} if controls else OFF)) as stream, forwards(model) as seen:
        for shown in PICTURES:
            seen.clear()
            tokens = emitted(stream.push(shown))
            transcript.frame(shown)
            transcript.caption(tokens)
            # One forward for the frame, into which the very token that ended the last one is folded, and one for
            # each further token; none for the token that ends it.
            fed = [inputs["input_ids"][0].tolist() for inputs in seen]
            assert fed == [waiting + mark, *([token] for token in tokens[:-1])]
            assert not set(tokens[:-1]) & set(transcript.stops)
            assert tokens[-1] in transcript.stops or len(tokens) == 8
            ends.add((tokens[-1] in transcript.stops, len(tokens) > 1))
            waiting = [tokens[-1]]
        assert stream.num_text_tokens == len(transcript.ids) - 1
        assert stream.num_frames == len(PICTURES)
    transcript.check(**controls)
    assert (True, True) in ends, "no text ended with a stop token"
    assert len(set(transcript.captions)) > 8, "a model that always says the same would prove nothing"


@pytest.mark.parametrize(
    ("name", "gists"), [("qwen2_vl", 0), ("qwen2_5_vl", 2), ("qwen3_vl", 1), ("helium", 0), ("helium", 2)]
)
def test_every_family_is_told_what_its_template_says(family, name, gists):
    model, processor = family(name, gists)
    default = "" if name == "qwen3_vl" else "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    opening = default + OPENING[OPENING.index("<|im_start|>user") :]
    question, resumption = QUESTION, RESUMPTION
    if name == "helium":
        opening = f"<s>User: {PROMPT}\nAssistant:"
        question, resumption = "</s>\nUser: Who is it?\nAssistant:", "</s>\nAssistant:"
    transcript = Transcript(model, processor)
    transcript.text(opening)
    with stream_of(model, processor, prefix="In this video") as stream:
        for index, shown in enumerate(PICTURES[:4]):
            if index == 2:
                transcript.text(question)
                transcript.answer(emitted(stream.ask("Who is it?", max_new_tokens=6)))
                transcript.text(resumption)
            transcript.frame(shown, prefix="In this video" if index == 0 else "")
            transcript.caption(emitted(stream.push(shown)))
        assert stream.num_text_tokens == len(transcript.ids) - 1
    transcript.check(**CONTROLS)


def test_a_system_message_comes_first(model, processor):
    model = model("casa")
    transcript = Transcript(model, processor)
    transcript.text(OPENING.replace("You are a helpful assistant.", "Be brief."))
    stream = stream_of(model, processor, system="Be brief.")
    transcript.frame(PICTURES[0])
    transcript.caption(emitted(stream.push(PICTURES[0])))
    transcript.check(**CONTROLS)


@pytest.mark.parametrize("variant", ["casa", "exact"])
def test_questions_before_between_and_after_one_another(model, processor, variant):
    """Also before the first frame, twice in a row, and after a text that was cut rather than ended."""
    model = model(variant)
    transcript = Transcript(model, processor)
    transcript.text(OPENING)
    # A bias that would end answers early, were it theirs too.
    stream = stream_of(model, processor, max_new_tokens_per_frame=4, stop_bias=3.0)
    endings = set()
    for index, asks in enumerate([2, 0, 1, 1, 1, 1, 1, 2]):
        for _ in range(asks):
            endings.add(transcript.ids[-1] in transcript.stops)
            transcript.text(QUESTION)
            transcript.answer(emitted(stream.ask("Who is it?", max_new_tokens=5)))
        if asks:
            transcript.text(RESUMPTION)
        transcript.frame(PICTURES[index])
        transcript.caption(emitted(stream.push(PICTURES[index])))
    assert endings == {False, True}, "turns must be closed after a stop token and without one"
    transcript.check(**{**CONTROLS, "bias": 3.0})


def test_a_question_before_the_first_frame_follows_the_whole_prompt(new_model, processor):
    """Also where the prompt ends with a token that would end a caption: nobody has said it."""
    model = new_model("casa")
    prompt, question = (processor.tokenizer(text)["input_ids"] for text in (OPENING, QUESTION))
    model.generation_config.eos_token_id = prompt[-1]
    with forwards(model) as seen:
        list(stream_of(model, processor).ask("Who is it?", max_new_tokens=1))
    assert [inputs["input_ids"][0].tolist() for inputs in seen] == [prompt + question]


def test_several_frames_in_one_turn(model, processor):
    model = model("casa")
    transcript = Transcript(model, processor)
    transcript.text(OPENING)
    stream = stream_of(model, processor)
    for shown in ([0], [1, 2, 3], [4, 5]):
        with forwards(model) as seen:
            events = list(stream.push([PICTURES[index] for index in shown]))
        assert [len(inputs.get("image_grid_thw", ())) for inputs in seen if "pixel_values" in inputs] == [len(shown)]
        merged = [event for event in events if event.kind == "merged"]
        assert [event.frame_index for event in merged] == shown[:-1]
        assert [event.start for event in merged] == [index / 2 for index in shown[:-1]]
        assert all(event.frame_index == shown[-1] for event in events if event.kind != "merged")
        for index in shown:
            transcript.frame(PICTURES[index])
        transcript.caption(emitted(events))
    assert stream.num_frames == 6
    transcript.check(**CONTROLS)


def test_marks_that_the_model_writes_are_text(new_model, processor):
    """Its delimiters are folded into the next frame's forward as any other token is."""
    model = new_model("casa")
    ids = [model.config.vision_start_token_id, model.config.image_token_id]
    with torch.no_grad():  # a head that knows nothing but delimiters
        others = torch.ones(len(model.lm_head.weight), dtype=torch.bool)
        others[ids] = False
        model.lm_head.weight[others] = 1e-3 * model.lm_head.weight[others]
    transcript = Transcript(model, processor)
    transcript.text(OPENING)
    stream = stream_of(model, processor, max_new_tokens_per_frame=3, **OFF)
    for shown in PICTURES[:5]:
        transcript.frame(shown)
        tokens = emitted(stream.push(shown))
        transcript.caption(tokens)
    assert model.config.image_token_id in transcript.captions
    transcript.check()


# ------------------------------------------------------------------------------------ events


def test_events_report_text_as_it_comes(model, processor):
    model = model("casa")
    stream = stream_of(model, processor, fps=4, max_new_tokens_per_frame=20)
    tokenizer, texts, every = processor.tokenizer, [], []
    for index, shown in enumerate(PICTURES):
        events = list(stream.push(shown, timestamp=10 + index))
        *pieces, end = events
        assert [event.kind for event in events] == ["text"] * len(pieces) + ["end"]
        assert {(event.frame_index, event.start, event.end) for event in events} == {
            (index, 10 + index, 10.25 + index)
        }
        assert end.text == "".join(event.text for event in pieces)
        assert all(event.text and event.token_ids for event in pieces)
        latencies = [event.latency for event in events]
        assert latencies == sorted(latencies) and latencies[0] > 0
        texts.append(end.text)
        every += [token for token in end.token_ids if token not in stream.stop_token_ids]
    whole = tokenizer.decode(every, skip_special_tokens=True)
    assert whole.startswith("".join(texts)) and len(whole) - len("".join(texts)) <= 1
    assert any(texts)


@contextmanager
def saying(model: Any, token_ids: Iterator[int]) -> Iterator[None]:
    """Streams of the model say these tokens, one in each forward."""

    def script(module: Any, args: Any, logits: torch.Tensor) -> torch.Tensor:
        return torch.full_like(logits, -1.0).index_fill(-1, torch.tensor([next(token_ids)]), 1.0)

    handle = model.lm_head.register_forward_hook(script)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("asked", [False, True])
def test_a_character_that_a_frame_ends_within_is_in_the_text_of_the_next(model, processor, asked):
    first, second, third = processor.tokenizer("木", add_special_tokens=False)["input_ids"]
    [letter] = processor.tokenizer("a", add_special_tokens=False)["input_ids"]
    model = model("casa")
    stream = stream_of(model, processor, max_new_tokens_per_frame=2)
    with saying(model, iter([first, second])):
        texts = [list(stream.push(PICTURES[0]))[-1].text]
    if asked:
        list(stream.ask("Who is it?", max_new_tokens=2))
    with saying(model, iter([letter if asked else third, letter])):
        texts.append(list(stream.push(PICTURES[1]))[-1].text)
    assert texts == ["", "aa" if asked else "木a"]


def test_a_silent_answer_has_an_end_of_its_own(new_model, processor):
    model = new_model("casa")
    model.generation_config.eos_token_id = list(range(model.config.get_text_config().vocab_size))
    stream = stream_of(model, processor)
    events = [*stream.push(PICTURES[0]), *stream.ask("Who is it?"), *stream.push(PICTURES[1])]
    assert [(event.kind, event.frame_index, event.text, event.question) for event in events] == [
        ("end", 0, "", None),
        ("answered", 0, "", "Who is it?"),
        ("end", 1, "", None),
    ]
    assert stream.last_timestamp == 0.5


def test_silence_is_possible(new_model, processor):
    """A frame whose first token is a stop token has no text and costs one forward."""
    model = new_model("casa")
    model.generation_config.eos_token_id = list(range(model.config.get_text_config().vocab_size))
    stream = stream_of(model, processor)
    with forwards(model) as seen:
        events = [list(stream.push(shown)) for shown in PICTURES[:3]]
    assert [[(event.kind, event.text, len(event.token_ids)) for event in frame] for frame in events] == [
        [("end", "", 1)]
    ] * 3
    assert [inputs["input_ids"].shape[1] for inputs in seen][1:] == [3, 3], "the stop token and two delimiters"


BROKEN = [b"no picture", None, np.zeros((2, 3, 4, 3), np.uint8), np.zeros((8, 0, 3), np.uint8), "missing.jpg"]


@pytest.mark.parametrize(
    "broken", BROKEN, ids=lambda broken: type(broken).__name__ + str(getattr(broken, "shape", ""))
)
def test_a_broken_frame_changes_nothing(model, processor, broken):
    model = model("casa")
    disturbed, undisturbed = stream_of(model, processor), stream_of(model, processor)
    assert say(disturbed, PICTURES[:1]) == say(undisturbed, PICTURES[:1])
    before = disturbed.nbytes
    [event] = disturbed.push(broken, timestamp=1.0)
    assert (event.kind, event.frame_index, event.start, event.text) == ("error", 1, 1.0, "")
    assert event.message
    assert disturbed.nbytes == before
    events = list(disturbed.push([PICTURES[1], broken, PICTURES[2], broken], timestamp=2.0))
    assert [(event.kind, event.frame_index) for event in events if event.kind in ("error", "merged")] == [
        ("merged", 2),
        ("error", 3),
        ("error", 5),
    ]
    assert events[-1].frame_index == 4 and events[-1].start == pytest.approx(1.75)
    assert emitted(events) == emitted(undisturbed.push([PICTURES[1], PICTURES[2]]))
    assert say(disturbed, PICTURES[3:5]) == say(undisturbed, PICTURES[3:5])
    assert disturbed.num_frames == 8


def test_the_same_picture_in_every_kind_of_numbers(model, processor):
    """Floating values are in [0, 1], of 16 bits, too."""
    turns = stream_of(model("casa"), processor).turns
    pixels = np.asarray(PICTURES[0])
    expected = turns.pixels(PICTURES[0])["pixel_values"]
    floats = torch.tensor(pixels) / 255
    kinds = {
        "uint8": pixels,
        "channels first": pixels.transpose(2, 0, 1),
        "reversed BGR": pixels[..., ::-1].copy()[..., ::-1],
        "int64": pixels.astype(np.int64),
        "tensor": torch.tensor(pixels),
        **{str(kind): (pixels / 255).astype(kind) for kind in (np.float16, np.float32, np.float64)},
        **{str(kind): floats.to(kind) for kind in (torch.float16, torch.bfloat16, torch.float32)},
        "floats, channels first": floats.permute(2, 0, 1),
        "with a gradient": floats.clone().requires_grad_(),
        "resized": floats + torch.tensor([-1e-3, 0.0, 1e-3]),  # has left [0, 1] by less than half a step
    }
    assert pixels.min() == 0 and pixels.max() == 255
    for name, given in kinds.items():
        assert torch.equal(turns.pixels(given)["pixel_values"], expected), name


@pytest.mark.parametrize(
    ("pixels", "found"),
    [
        (np.full((28, 28, 3), 200.0, np.float32), "float32 from 200 to 200"),
        (np.linspace(-1, 1, 2352).reshape(28, 28, 3), "float64 from -1 to 1"),
        (np.full((28, 28, 3), np.nan), "float64 from nan"),
        (torch.full((28, 28, 3), torch.inf), "float32 from inf"),
        (np.ones((28, 28, 3), complex), "complex128"),
        (np.full((28, 28, 3), 256, np.uint16), "its values are uint16"),
        (torch.full((28, 28, 3), -1), "int64 from -1 to -1"),
    ],
    ids=str,
)
def test_numbers_that_are_no_pixels_are_an_error(model, processor, pixels, found):
    [event] = stream_of(model("casa"), processor).push(pixels)
    assert event.kind == "error" and found in event.message
    assert "integers from 0 to 255, floating-point values from 0 to 1" in event.message


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I", "F"])
def test_pictures_of_more_than_8_bits_are_an_error(model, processor, tmp_path, mode):
    """Depth, say: Pillow would clip it at 255 without a word. In 8 bits, and in colours of 16, it is a picture."""
    depth = Image.new("I;16", (28, 28), 300) if mode.startswith("I;16") else Image.new(mode, (28, 28), 300)
    if mode == "I;16B":
        depth = Image.frombytes(mode, (28, 28), bytes([1, 44]) * 28 * 28)
    stream = stream_of(model("casa"), processor)
    depth.save(tmp_path / "depth.tiff")
    for frame in (depth, tmp_path / "depth.tiff", str(tmp_path / "depth.tiff")):
        [event] = stream.push(frame)
        assert event.kind == "error" and f"its mode is {mode!r}" in event.message
        assert event.message.endswith("convert it to 8 bits.")
    grey = Image.fromarray((np.asarray(depth) / 600 * 255).astype(np.uint8))
    expected = stream.turns.pixels(grey.convert("RGB"))["pixel_values"]
    assert torch.equal(stream.turns.pixels(grey)["pixel_values"], expected)
    assert emitted(stream.push(grey))


def test_a_stream_reads_what_its_policy_allows(model, processor, tmp_path):
    PICTURES[0].save(tmp_path / "frame.png")
    contents = (tmp_path / "frame.png").read_bytes()
    expected = emitted(stream_of(model("casa"), processor).push(contents))
    assert expected
    policy = {"network": False, "local_files": False}
    batch = CasaStreamBatch(model("casa"), processor, max_new_tokens_per_frame=8, media_policy=policy)
    single = stream_of(model("casa"), processor, media_policy=policy)
    for stream in (single, single.fork()):
        for frame in (tmp_path / "frame.png", str(tmp_path / "frame.png"), "http://127.0.0.1:9/frame.png"):
            [event] = stream.push(frame)
            assert event.kind == "error" and "MediaPolicy." in event.message
        assert emitted(stream.push(contents)) == expected
    member = batch.add(prompt=PROMPT)
    [(_, event)] = batch.push({member: tmp_path / "frame.png"})
    assert event.kind == "error" and "MediaPolicy.local_files=False" in event.message
    assert emitted(event for _, event in batch.push({member: contents})) == expected
    small = stream_of(model("casa"), processor, media_policy=MediaPolicy(max_decoded_pixels=10))
    assert [event.kind for event in small.push(PICTURES[0])] == ["error"]
    with pytest.raises(ValueError, match="media_policy=3 must be a MediaPolicy"):
        stream_of(model("casa"), processor, media_policy=3)


def test_a_truncated_file_is_a_broken_frame(model, processor, tmp_path):
    PICTURES[0].save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:600])
    stream = stream_of(model("casa"), processor)
    assert [event.kind for event in stream.push(tmp_path / "cut.jpg")] == ["error"]
    assert emitted(stream.push(tmp_path / "whole.jpg"))


def test_a_spent_budget_cuts_the_text_which_goes_on_with_the_next_frame(model, processor):
    model = model("casa")
    transcript = Transcript(model, processor)
    transcript.text(OPENING)
    stream = stream_of(model, processor, frame_budget=1e-9)
    for shown in PICTURES[:6]:
        tokens = emitted(stream.push(shown))
        assert len(tokens) == 1
        transcript.frame(shown)
        transcript.caption(tokens)
    transcript.check(**CONTROLS)
    unhurried = [say(stream_of(model, processor, frame_budget=budget), PICTURES[:3]) for budget in (None, 1e6)]
    assert unhurried[0] == unhurried[1]


def test_a_budget_can_be_extended(model, processor):
    """In the midst of a frame, for this one alone."""
    model = model("casa")
    expected = emitted(stream_of(model, processor).push(PICTURES[0]))
    assert len(expected) > 1
    stream = stream_of(model, processor, frame_budget=1e-9)
    events = []
    for event in stream.push(PICTURES[0]):
        events.append(event)
        stream.extend_budget(1e6)
    assert events[0].token_ids == expected[:1], "the budget was extended before it was looked at"
    assert emitted(events) == expected
    assert len(emitted(stream.push(PICTURES[1]))) == 1
    for seconds in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"seconds={seconds}"):
            stream.extend_budget(seconds)


@pytest.mark.parametrize("end", ["push", "ask", "close", "forget", "drop it"])
def test_events_that_are_not_taken_are_not_generated(model, processor, end):
    """The text ends where it is, and the stream is in a state to go on from."""
    model = model("casa")
    transcript = Transcript(model, processor)
    transcript.text(OPENING)
    stream = stream_of(model, processor)
    transcript.frame(PICTURES[0])
    events = stream.push(PICTURES[0])
    transcript.caption(next(event.token_ids for event in events if event.kind == "text"))
    if end == "close":
        events.close()
    elif end == "forget":
        del events
    elif end == "drop it":
        stream.drop(0.25, "late")
    if end == "ask":
        transcript.text(QUESTION)
        answer = stream.ask("Who is it?", max_new_tokens=6)
        transcript.answer(next(event.token_ids for event in answer if event.kind == "answer"))
        transcript.text(RESUMPTION)
    transcript.frame(PICTURES[1])
    transcript.caption(emitted(stream.push(PICTURES[1])))
    transcript.check(**CONTROLS)
    if end in ("push", "ask"):
        assert list(events) == [], "what a later call has ended stays ended"


def test_a_frame_whose_events_nobody_takes_is_not_looked_at(model, processor):
    model = model("casa")
    stream = stream_of(model, processor)
    with forwards(model) as seen:
        stream.push(PICTURES[5])
        tokens = say(stream, PICTURES[:3])
    assert len(seen) == sum(map(len, tokens))
    assert tokens == say(stream_of(model, processor), PICTURES[:3])
    assert stream.num_frames == 4


def test_a_dropped_frame_is_counted(model, processor):
    model = model("casa")
    stream = stream_of(model, processor)
    tokens = say(stream, PICTURES[:1])
    event = stream.drop(0.75, "the model is late")
    assert isinstance(event, CaptionEvent)
    assert (event.kind, event.frame_index, event.start, event.end) == ("dropped", 1, 0.75, 1.25)
    assert event.message == "the model is late"
    events = list(stream.push(PICTURES[1]))
    assert (events[-1].frame_index, events[-1].start) == (2, 1.25)
    assert [*tokens, emitted(events)] == say(stream_of(model, processor), PICTURES[:2])
    assert stream.num_frames == 3


def test_several_dropped_frames_are_counted_by_one_event(model, processor):
    """The event is that of the last of them; a stream that was restored counts on from there."""
    model = model("casa")
    stream = stream_of(model, processor)
    tokens = say(stream, PICTURES[:1])
    event = stream.drop(2.5, "the model is late", 5)
    assert (event.kind, event.count, event.frame_index, event.start, event.end) == ("dropped", 5, 5, 2.5, 3.0)
    assert (stream.num_frames, stream.last_timestamp) == (6, 2.5)
    for count in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match=f"count={count} must be a positive integer"):
            stream.drop(3.0, "late", count)
    assert stream.num_frames == 6
    restored = stream_of(model, processor)
    restored.load_state_dict(stream.state_dict())
    for each in (stream, restored):
        events = list(each.push(PICTURES[1]))
        assert {(event.count, event.frame_index, event.start) for event in events} == {(1, 6, 3.0)}
        assert [*tokens, emitted(events)] == say(stream_of(model, processor), PICTURES[:2])


# ------------------------------------------------------------------------------------ state


def test_interleaved_sessions_equal_separate_ones(model, processor):
    """With other settings, questions and random numbers, on one model."""
    model = model("casa")
    settings = [{}, {"do_sample": True, "seed": 3, "temperature": 1.0}, {"prompt": "Say it all.", **OFF}]

    def turn(stream: CasaStream, index: int, shift: int) -> list[tuple[int, ...]]:
        said = say(stream, [PICTURES[index + shift]])
        if (index + shift) % 3 == 1:
            said.append(emitted(stream.ask("Who is it?", max_new_tokens=5)))
        return said

    separate = []
    for shift, chosen in enumerate(settings):
        stream = stream_of(model, processor, **chosen)
        separate.append([turn(stream, index, shift) for index in range(5)])
    streams = [stream_of(model, processor, **chosen) for chosen in settings]
    interleaved: list[Any] = [[], [], []]
    for index in range(5):
        for shift, stream in enumerate(streams):
            interleaved[shift].append(turn(stream, index, shift))
    assert interleaved == separate
    assert len({str(said) for said in separate}) == 3


def test_two_sessions_may_be_open_at_once(model, processor):
    model = model("casa")
    first, second = stream_of(model, processor), stream_of(model, processor, prompt="Say it all.")
    expected = [say(first.fork(), PICTURES[:1]), say(second.fork(), PICTURES[1:2])]
    both = zip_longest_events(first.push(PICTURES[0]), second.push(PICTURES[1]))
    assert [[emitted(events)] for events in both] == expected


def zip_longest_events(*streams: Iterator[CaptionEvent]) -> list[list[CaptionEvent]]:
    """All events, one of each stream in turn."""
    taken: list[list[CaptionEvent]] = [[] for _ in streams]
    for events in zip_longest(*streams):
        for kept, event in zip(taken, events, strict=True):
            kept += [] if event is None else [event]
    return taken


@pytest.mark.parametrize(
    ("variant", "sampled"),
    [("casa", False), ("casa", True), ("ca-shared", False), ("casa-replace", True), ("exact", False)],
)
def test_a_fork_and_its_original_go_their_own_ways(model, processor, variant, sampled):
    model = model(variant)
    settings = {"do_sample": True, "seed": 0} if sampled else {}
    stream = stream_of(model, processor, **settings)
    unforked = stream_of(model, processor, **settings)
    assert say(stream, PICTURES[:3]) == say(unforked, PICTURES[:3])
    fork = stream.fork()
    early = unforked.fork()
    assert tensors_of(stream).isdisjoint(tensors_of(fork))
    assert fork.nbytes == stream.nbytes and fork.num_frames == 3
    # In turns, so that each would meet what the other has written.
    others = PICTURES[6:9]
    first = [say(stream, [one]) + say(fork, [other]) for one, other in zip(PICTURES[3:6], others, strict=True)]
    assert [said[0] for said in first] == say(unforked, PICTURES[3:6])
    assert [said[1] for said in first] == say(early, others)
    assert [said[0] for said in first] != [said[1] for said in first]


def tensors_of(stream: CasaStream) -> set[int]:
    """Where the memory of all tensors of the cache begins."""
    layers = stream._cache.layers
    kept = [tensor for layer in layers for stored in layer.fusion.values() for tensor in stored]
    kept += [tensor for layer in layers for tensor in (layer.keys, layer.values) if tensor is not None]
    kept += [tensor for layer in layers for memory in layer.memory.values() for tensor in memory.tensors]
    return {tensor.untyped_storage().data_ptr() for tensor in kept if tensor.numel()}


def test_a_fork_can_be_made_while_text_comes(model, processor):
    model = model("casa")
    stream, calm = stream_of(model, processor), stream_of(model, processor)
    events = stream.push(PICTURES[0])
    taken = [next(events)]
    fork = stream.fork()
    taken += events
    assert [emitted(taken), *say(stream, PICTURES[1:3])] == say(calm, PICTURES[:3])
    transcript = Transcript(model, processor)
    transcript.text(OPENING)
    transcript.frame(PICTURES[0])
    transcript.caption(taken[0].token_ids)
    transcript.frame(PICTURES[3])
    transcript.caption(emitted(fork.push(PICTURES[3])))
    transcript.check(**CONTROLS)


@pytest.mark.parametrize(
    ("variant", "moment"),
    [
        *(("casa", moment) for moment in ("new", "cut", "frames", "answer")),
        ("ca", "cut"),
        ("casa-replace", "frames"),
        ("exact", "answer"),
        ("insertion", "frames"),
    ],
)
def test_a_saved_session_continues_with_identical_tokens(model, processor, variant, moment, tmp_path):
    model = model(variant)
    settings = {"do_sample": True, "seed": 5, "temperature": 1.0}
    stream = stream_of(model, processor, **settings)
    if moment != "new":
        say(stream, PICTURES[:3])
    if moment == "answer":
        emitted(stream.ask("Who is it?", max_new_tokens=5))
    if moment == "cut":
        next(stream.push(PICTURES[3]))
    torch.save(stream.state_dict(), tmp_path / "session.pt")
    size = (tmp_path / "session.pt").stat().st_size
    assert size < sum(stream.nbytes.values()) + 60_000, "the room behind growing keys/values isn't saved"
    loaded = stream_of(model, processor, **{**settings, "seed": 6})
    say(loaded, PICTURES[4:5])
    loaded.load_state_dict(torch.load(tmp_path / "session.pt", weights_only=True))
    assert (loaded.num_frames, loaded.num_text_tokens, loaded.nbytes) == (
        stream.num_frames,
        stream.num_text_tokens,
        stream.nbytes,
    )
    assert told(loaded) == told(stream)


def told(stream: CasaStream) -> list[tuple[Any, ...]]:
    """All that further events say, but for their latency."""
    events = [event for shown in PICTURES[4:8] for event in stream.push(shown)]
    return [(event.kind, event.frame_index, event.start, event.text, event.token_ids) for event in events]


def test_a_state_is_a_copy(model, processor):
    model = model("casa")
    stream = stream_of(model, processor)
    say(stream, PICTURES[:2])
    state = stream.state_dict()
    expected = say(stream, PICTURES[2:4])
    for _ in range(2):
        loaded = stream_of(model, processor)
        loaded.load_state_dict(state)
        assert say(loaded, PICTURES[2:4]) == expected


def test_states_of_other_models_are_refused(new_model, model, processor, family):
    states = {
        "casa_keys='image'": stream_of(model("ca"), processor).state_dict(),
        "dtype='torch.float32'": stream_of(new_model("casa").float(), processor).state_dict(),
        "casa_layers": stream_of(new_model("casa", casa_layers=[0, 2]), processor).state_dict(),
        "model_type='qwen2_vl_text'": stream_of(*family("qwen2_vl")).state_dict(),
        "not a stream's": {"pending": []},
    }
    stream = stream_of(model("casa"), processor)
    say(stream, PICTURES[:2])
    expected = say(stream.fork(), PICTURES[2:4])
    for message, state in states.items():
        with pytest.raises(ValueError, match=message):
            stream.load_state_dict(state)
    assert say(stream, PICTURES[2:4]) == expected
    sampled = stream_of(model("casa"), processor, do_sample=True)
    with pytest.raises(ValueError, match="do_sample"):
        sampled.load_state_dict(stream.state_dict())


def without(state: dict[str, Any], *names: str) -> dict[str, Any]:
    """The state without what these names lead to."""
    *outer, last = names
    rest = {name: value for name, value in state.items() if name != (outer[0] if outer else last)}
    return {**rest, outer[0]: without(state[outer[0]], *outer[1:], last)} if outer else rest


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": "Say it."}, "begins with '.*What do you see.*'; this one begins with '.*Say it"),
        ({"system": "Be brief."}, "Be brief.*the system message and the prompt"),
        (
            {"max_text_tokens": 80},
            "max_text_tokens=None; this one has max_text_tokens=80. Make it with max_text_tokens=None",
        ),
        ({"num_sink_tokens": 4}, "num_sink_tokens=[0-9]+; this one has num_sink_tokens=4"),
    ],
    ids=str,
)
def test_states_of_streams_with_other_settings_are_refused(model, processor, settings, message):
    state = stream_of(model("casa"), processor).state_dict()
    with pytest.raises(ValueError, match=message):
        stream_of(model("casa"), processor, **settings).load_state_dict(state)


def test_a_state_that_is_not_whole_changes_nothing(model, processor):
    stream = stream_of(model("casa"), processor, do_sample=True, seed=3)
    say(stream, PICTURES[:2])
    events = stream.push(PICTURES[2])
    taken = [next(events)]
    other = stream_of(model("casa"), processor, do_sample=True, seed=4)
    say(other, PICTURES[5:7])
    state = other.state_dict()
    layers, windows = state["cache"]["layers"], state["cache"]["windows"]
    damaged = [
        ({**state, "version": 0}, "version 0; this release of casa_hf reads version 4"),
        (without(state, "version"), "version None"),
        *((without(state, name), f"has no {name}") for name in state if name not in ("version", "design")),
        ({**state, "cache": {**state["cache"], "layers": layers[:-1]}}, f"{len(layers) - 1} layers"),
        ({**state, "cache": {**state["cache"], "layers": [*layers[:-1], {}]}}, "damaged .KeyError: 'text'"),
        (without(state, "cache", "windows", "valid"), "damaged .TypeError"),
        (without(state, "pieces", "waiting"), "damaged .KeyError: 'waiting'"),
        ({**state, "history": None}, "damaged .AttributeError"),
        *(({**state, name: None}, "damaged .AttributeError") for name in ("design", "settings")),
        ({**state, "cache": {}}, "damaged .KeyError: 'layers'"),
        ({**state, "cache": None}, "its cache can't be None"),
        ({**state, "random": 5}, "damaged .AttributeError"),
        ({**state, "cache": {**state["cache"], "layers": None}}, "damaged .TypeError"),
        *(
            ({**state, name: value}, f"damaged: its {name} can't be")
            for name, value in {
                "num_frames": "x",
                "last_timestamp": 10**400,
                "begun": 1,
                "answered": None,
                "pieces": {"before": [0], "waiting": ["a"]},
                "history": state["history"].float(),
            }.items()
        ),
        *(
            ({**state, "last_timestamp": value}, "damaged: its last_timestamp can't be")
            for value in (math.nan, math.inf, "1", True)
        ),
        *(({**state, "num_frames": value}, "damaged: its num_frames can't be") for value in (math.nan, -1, 2.0, True)),
        *(
            ({**state, "settings": {**state["settings"], "num_sink_tokens": value}}, "num_sink_tokens=")
            for value in (math.nan, math.inf, "4")
        ),
        *(({**state, "pending": value}, "damaged: its pending can't be") for value in (["a"], [], [10**6], [-1])),
        *(
            ({**state, "cache": {**state["cache"], "windows": {**windows, name: value}}}, f"damaged: {name} of its")
            for name, value in {
                "length": 1,
                "padded": 0,
                "image_columns": math.nan,
                "text_start": -1,
                "next_position": windows["next_position"] - 10**6,
                "positions": windows["positions"][:, 1:],
                "pinned": windows["is_frame"],
                "capacity": 5,
                "image_tokens": windows["image_tokens"] + 10**6,
                "last_image": windows["last_image"] + 10**6,
                "window_start": windows["window_start"] - 10**6,
            }.items()
        ),
        *(
            (
                {**state, "cache": {**state["cache"], "layers": [layers[0], {**layers[1], **part}, *layers[2:]]}},
                message,
            )
            for part, message in [
                ({"text": []}, "layer 1 has a part too few or too many"),
                ({"fusion": {}}, "layer 1 has a part too few or too many"),
                ({"text": [tensor[:, :, 1:] for tensor in layers[1]["text"]]}, "text of layer 1 is torch.float64 of"),
                ({"text": [tensor.float() for tensor in layers[1]["text"]]}, "text of layer 1 is torch.float32 of"),
                *(
                    ({"text": [layers[1]["text"][0], torch.full_like(layers[1]["text"][1], value)]}, "aren't finite")
                    for value in (math.nan, math.inf)
                ),
                ({"text": layers[1]["text"][:1]}, "damaged .TypeError"),
                ({"fusion": {**layers[1]["fusion"], "image": layers[1]["fusion"]["window"]}}, "image of layer 1 is"),
                ({"fusion": {**layers[1]["fusion"], "sound": []}}, "damaged .TypeError"),
            ]
        ),
        (
            {**state, "cache": {**state["cache"], "layers": [{**layer, "fusion": {}} for layer in layers]}},
            "layer 0 has a part too few or too many",
        ),
    ]
    for given, message in damaged:
        with pytest.raises(ValueError, match=message):
            stream.load_state_dict(given)
    taken += events
    twin = stream_of(model("casa"), processor, do_sample=True, seed=3)
    assert [emitted(taken), *say(stream, PICTURES[3:5])] == say(twin, PICTURES[:5])[2:]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing` is deprecated:FutureWarning")  # in PEFT
def test_a_stream_of_a_model_with_adapters_may_bound_its_text(new_model, model, processor):
    """PEFT's model is one around ours; adapters that haven't been trained change nothing."""
    peft = pytest.importorskip("peft")
    settings = {"max_text_tokens": 60, "num_sink_tokens": 4}
    adapted = peft.get_peft_model(new_model("casa"), peft.LoraConfig(target_modules=["o_proj", "v_proj"])).eval()
    stream, plain = (stream_of(each, processor, **settings) for each in (adapted, model("casa")))
    for turn in range(6):
        assert emitted(stream.push(PICTURES[turn])) == emitted(plain.push(PICTURES[turn]))
    assert emitted(stream.ask("Who is it?", 4)) == emitted(plain.ask("Who is it?", 4))
    later = stream_of(adapted, processor, **settings)
    later.load_state_dict(stream.state_dict())
    assert emitted(later.push(PICTURES[7])) == emitted(plain.push(PICTURES[7]))
    batch = CasaStreamBatch(adapted, processor, max_new_tokens_per_frame=8, **settings)
    twin, number = stream_of(model("casa"), processor, **settings), batch.add(prompt=PROMPT)
    for turn in range(6):
        assert emitted(event for _, event in batch.push({number: PICTURES[turn]})) == emitted(
            twin.push(PICTURES[turn])
        )
    assert max(stream.num_text_tokens, batch.num_text_tokens(number)) < 60 + 30, "text was evicted"


def test_a_reset_stream_is_a_new_one(model, processor):
    model = model("casa")
    stream = stream_of(model, processor, do_sample=True, seed=2)
    first = say(stream, PICTURES[:3])
    emitted(stream.ask("Who is it?", max_new_tokens=4))
    stream.reset()
    assert (stream.num_frames, stream.num_text_tokens) == (0, 0)
    assert say(stream, PICTURES[:3]) == first
    assert list(stream.push(PICTURES[3]))[-1].start == 1.5


@contextmanager
def during_forwards(model: Any, happens: Callable[[], Any]) -> Iterator[None]:
    """Something that happens within every forward."""
    handle = model.model.language_model.layers[1].register_forward_hook(lambda *_: happens() and None)
    try:
        yield
    finally:
        handle.remove()


def failing(error: BaseException) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


@pytest.mark.parametrize("error", [OSError("the device has gone"), KeyboardInterrupt()], ids=repr)
def test_what_ends_a_forward_resets_and_says_so(model, processor, error):
    model = model("casa")
    stream = stream_of(model, processor)
    first = say(stream, PICTURES[:3])
    with during_forwards(model, failing(error)), pytest.raises(type(error)) as caught:
        list(stream.push(PICTURES[3]))
    assert "the stream has been reset" in caught.value.__notes__[0]
    assert stream.num_frames == 0
    assert say(stream, PICTURES[:3]) == first


def test_an_interrupt_while_the_token_is_read_resets(model, processor):
    """By then the cache holds what the stream would feed again: on a GPU, reading waits for the forward."""
    stream = stream_of(model("casa"), processor)
    first = say(stream, PICTURES[:2])
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(History, "add", lambda self, tokens: failing(KeyboardInterrupt())())
        list(stream.push(PICTURES[2]))
    assert stream.num_text_tokens == 0
    assert say(stream, PICTURES[:2]) == first


def test_an_interrupt_between_forwards_changes_nothing(model, processor):
    stream, twin = (stream_of(model("casa"), processor) for _ in range(2))
    assert emitted(stream.push(PICTURES[0])) == emitted(twin.push(PICTURES[0]))
    events, own = stream.push(PICTURES[1]), twin.push(PICTURES[1])
    with pytest.raises(KeyboardInterrupt):
        for event in events:
            assert event.kind == "text" and next(own).text == event.text
            raise KeyboardInterrupt
    assert say(stream, PICTURES[2:4]) == say(twin, PICTURES[2:4])


def test_another_thread_is_refused_during_a_forward(model, processor):
    model = model("casa")
    stream = stream_of(model, processor)
    expected = say(stream_of(model, processor), PICTURES[:2])
    state = stream.state_dict()
    calls: list[Callable[[], Any]] = [
        lambda: stream.push(PICTURES[2]),
        lambda: stream.ask("Who is it?"),
        stream.reset,
        stream.fork,
        stream.state_dict,
        lambda: stream.load_state_dict(state),
        stream.close,
    ]
    refused: list[str] = []

    def call_all() -> None:
        for call in calls:
            with pytest.raises(RuntimeError, match="being read by another thread"):
                call()
            refused.append("")

    def from_a_thread() -> None:
        thread = threading.Thread(target=call_all)
        thread.start()
        thread.join()

    with during_forwards(model, from_a_thread):
        said = say(stream, PICTURES[:1])
    assert len(refused) == len(calls) * len(said[0])
    assert said + say(stream, PICTURES[1:2]) == expected


def test_closing_frees_the_cache(model, processor):
    model = model("casa")
    with stream_of(model, processor) as stream:
        say(stream, PICTURES[:2])
        assert sum(stream.nbytes.values()) > 0
        keys = weakref.ref(stream._cache.layers[0].keys)
        open_events = stream.push(PICTURES[2])
        next(open_events)
    gc.collect()
    assert keys() is None
    assert stream.closed and stream.nbytes == {"text": 0, "image": 0} and stream.num_text_tokens == 0
    assert list(open_events) == []
    stream.close()
    calls = {
        "push": lambda: stream.push(PICTURES[0]),
        "ask": lambda: stream.ask("Who is it?"),
        "drop": lambda: stream.drop(9.0, "late"),
        "reset": stream.reset,
        "fork": stream.fork,
        "state_dict": stream.state_dict,
        "load_state_dict": lambda: stream.load_state_dict({}),
        "with": stream.__enter__,
    }
    for call in calls.values():
        with pytest.raises(RuntimeError, match="closed"):
            call()


def test_a_forgotten_stream_is_freed_at_once(model, processor):
    stream = stream_of(model("casa"), processor)
    say(stream, PICTURES[:2])
    next(stream.push(PICTURES[2]))
    cache = weakref.ref(stream._cache)
    gc.disable()
    try:
        del stream
        assert cache() is None, "streams and their events must not keep each other"
    finally:
        gc.enable()


def test_nothing_stays_on_model_and_processor(model, processor):
    model = model("casa")

    def held() -> dict[str, Any]:
        modules = {name: {**vars(module)} for name, module in model.named_modules()}
        return {name: {key: repr(value) for key, value in values.items()} for name, values in modules.items()}

    before, random = held(), torch.get_rng_state()
    stream = stream_of(model, processor, do_sample=True)
    say(stream, PICTURES[:3])
    assert held() == before
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled()


def test_memory_is_that_of_the_text_and_one_image(model, processor):
    model = model("casa")
    stream = stream_of(model, processor)
    shown = PICTURES[0]
    images = set()
    for _ in range(4):
        say(stream, [shown])
        assert stream.nbytes == cache_nbytes(stream._cache)
        images.add(stream.nbytes["image"])
    assert len(images) == 1 and images.pop() > 0


# ------------------------------------------------------------------------------------ random numbers


def test_drawn_tokens_are_among_the_likeliest_and_follow_the_seed(model, processor):
    model = model("casa")
    settings = {"do_sample": True, "temperature": 2.0, "top_k": 3, "max_new_tokens_per_frame": 20}
    said = [say(stream_of(model, processor, seed=seed, **settings), PICTURES[:5]) for seed in (0, 0, 1)]
    assert said[0] == said[1] != said[2]
    transcript = Transcript(model, processor)
    transcript.text(OPENING)
    for shown, tokens in zip(PICTURES[:5], said[0], strict=True):
        transcript.frame(shown)
        transcript.caption(tokens)
    ranks = set()
    logits = transcript.logits()
    for place, token, history, _ in transcript.said:
        scores = naive_scores(logits[place - 1].tolist(), history, transcript.stops, **CONTROLS)
        ranks.add(sum(score > scores[token] for score in scores))
    assert ranks == {0, 1, 2}
    one = {"do_sample": True, "top_k": 1}
    assert say(stream_of(model, processor, **one), PICTURES[:3]) == say(stream_of(model, processor), PICTURES[:3])


# ------------------------------------------------------------------------------------ arguments


@pytest.mark.parametrize(
    "timestamps", [(1.0, 1.0), (1.0, 0.5), (0.0, math.nan), (0.0, math.inf), (2.0, None, 2.5), (-0.5,)]
)
def test_timestamps_must_ascend(model, processor, timestamps):
    stream = stream_of(model("casa"), processor)
    *good, bad = timestamps
    for timestamp in good:
        list(stream.push(PICTURES[0], timestamp))
    frames = stream.num_frames
    for call in (lambda: stream.push(PICTURES[1], bad), lambda: stream.drop(bad, "late")):
        with pytest.raises(ValueError, match=f"timestamp={bad}"):
            call()
    assert stream.num_frames == frames


def test_timestamps_of_several_frames(model, processor):
    stream = stream_of(model("casa"), processor, max_new_tokens_per_frame=1)

    def starts(count: int, timestamp: Any) -> list[float]:
        events = stream.push(PICTURES[:count], timestamp)
        return [event.start for event in events if event.kind in ("merged", "end")]

    assert starts(2, None) == [0.0, 0.5]
    assert starts(2, 2.5) == [1.5, 2.5]
    assert starts(3, [3, 5, 5.5]) == [3.0, 5.0, 5.5]
    assert starts(1, [7.0]) == [7.0]
    stream.reset()
    with pytest.raises(
        ValueError, match=r"timestamp=0.0 of the last of 2 frames puts the first one at -0.5, before 0"
    ):
        stream.push(PICTURES[:2], 0.0)
    assert starts(2, np.array([0.5, 1.0])) == [0.5, 1.0]
    assert starts(2, torch.tensor([2.0, 3.0])) == [2.0, 3.0]
    assert [*starts(1, Fraction(7, 2)), *starts(1, np.float32(4.0))] == [3.5, 4.0]
    assert starts(1, torch.tensor(5.0)) == [5.0]
    starts(1, 1e17)
    with pytest.raises(ValueError, match=r"timestamp=None must be .* later than 1e\+17"):
        stream.push(PICTURES[0])
    stream.reset()
    starts(1, 0.0)
    for bad, message in (
        ([1.0], "1 values for 2"),
        ([2.0, 1.0], "timestamp"),
        ([-1.0, 1.0], "0 or more, later than 0.0"),
        ("12", "timestamp='12' must be a finite number of seconds"),
        (["1", "2"], "must be a finite number of seconds"),
        (True, "timestamp=True must be"),
        ([[1.0], [2.0]], "must be a finite"),
        (10**400, "timestamp=1000"),
        (10**5000, "timestamp=an integer of 16610 bits must be a finite number of seconds"),
        ([1.0, Fraction(10**400)], "must be a finite"),
    ):
        with pytest.raises(ValueError, match=message):
            stream.push(PICTURES[:2], bad)
    with pytest.raises(ValueError, match="empty list"):
        stream.push([])


def test_numbers_of_all_kinds(model, processor):
    kinds = {"fps": Fraction(5, 2), "max_new_tokens_per_frame": np.int64(3), "max_text_tokens": np.int32(80)}
    kinds |= {"do_sample": True, "temperature": Fraction(1, 2), "top_k": np.int16(9), "seed": np.uint8(4)}
    kinds |= {"repetition_penalty": Fraction(6, 5), "repetition_clamp": math.inf, "stop_bias": np.float32(0.5)}
    kinds |= {"no_repeat_ngram_size": np.int8(2), "no_repeat_ngram_lookback": np.int64(7)}
    stream = stream_of(model("casa"), processor, **kinds)
    plain = {name: int(value) if isinstance(value, np.integer) else float(value) for name, value in kinds.items()}
    twin = stream_of(model("casa"), processor, **{**plain, "do_sample": True})
    ends = [list(own.push(PICTURES[0]))[-1] for own in (stream, twin)]
    assert ends[0] == replace(ends[1], latency=ends[0].latency)
    assert type(ends[0].end) is float
    twin.load_state_dict(stream.state_dict())


MARK = "<|vision_start|><|vision_end|>"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fps": 0}, "fps=0"),
        ({"fps": math.nan}, "fps=nan"),
        ({"max_new_tokens_per_frame": 0}, "max_new_tokens_per_frame=0"),
        ({"max_new_tokens_per_frame": 2.5}, "max_new_tokens_per_frame=2.5"),
        ({"frame_budget": 0}, "frame_budget=0"),
        ({"frame_budget": -1.0}, "frame_budget=-1.0"),
        ({"repetition_penalty": -1.0}, "repetition_penalty=-1.0"),
        ({"repetition_decay": 1.5}, "repetition_decay=1.5"),
        ({"repetition_clamp": 0}, "repetition_clamp=0"),
        ({"no_repeat_ngram_size": 5, "no_repeat_ngram_lookback": 4}, "no_repeat_ngram_lookback=4"),
        ({"stop_bias": 0.0}, "stop_bias=0.0"),
        ({"do_sample": True, "temperature": 0.0}, "temperature"),
        ({"do_sample": True, "top_k": -1}, "top_k"),
        ({"top_k": True}, "top_k=True"),
        ({"top_k": 2.5}, "top_k=2.5 must be an integer"),
        ({"temperature": "a"}, "temperature='a' must be a positive number"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"do_sample": "yes"}, "do_sample='yes' must be True or False"),
        ({"seed": "x"}, "seed='x' must be an integer"),
        ({"seed": 1.5}, "seed=1.5"),
        ({"seed": 2**64}, "seed=18446744073709551616"),
        ({"no_repeat_ngram_size": 2.5}, "no_repeat_ngram_size=2.5"),
        ({"no_repeat_ngram_size": True}, "no_repeat_ngram_size=True"),
        ({"no_repeat_ngram_lookback": 60.5}, "no_repeat_ngram_lookback=60.5"),
        ({"repetition_penalty": "a"}, "repetition_penalty='a'"),
        ({"repetition_penalty": math.inf}, "repetition_penalty=inf"),
        ({"repetition_decay": "a"}, "repetition_decay='a'"),
        ({"stop_bias": "a"}, "stop_bias='a'"),
        ({"stop_bias": math.inf}, "stop_bias=inf"),
        ({"max_text_tokens": 5}, "max_text_tokens=5"),
        ({"max_text_tokens": 100, "num_sink_tokens": 100}, "max_text_tokens=100"),
        ({"num_sink_tokens": -1}, "num_sink_tokens=-1"),
        ({"num_sink_tokens": 3.0}, "num_sink_tokens=3.0 must be an integer"),
        ({"num_sink_tokens": True}, "num_sink_tokens=True"),
        ({"max_text_tokens": 99.5}, "max_text_tokens=99.5 must be a positive integer"),
        ({"max_text_tokens": "99"}, "max_text_tokens='99' must be a positive integer"),
        ({"fps": True}, "fps=True"),
        ({"fps": "2"}, "fps='2'"),
        ({"max_new_tokens_per_frame": True}, "max_new_tokens_per_frame=True"),
        ({"prompt": f"What is {MARK}?", "sanitize_control_tokens": False}, "holds image or video placeholders"),
        ({"system": MARK, "sanitize_control_tokens": False}, "holds image or video placeholders"),
        ({"prefix": MARK, "sanitize_control_tokens": False}, "holds image or video placeholders"),
        ({"prompt": None}, "must be a string"),
        ({"prompt": "<|video_pad|>", "sanitize_control_tokens": False}, "outside of a placeholder"),
        ({"fps": 10**400}, "fps=10"),
        ({"fps": Fraction(1, 10**400)}, "fps=Fraction"),
        ({"frame_budget": 10**400}, "frame_budget=10"),
        ({"do_sample": True, "temperature": 10**400}, "temperature=10"),
        ({"repetition_penalty": 10**400}, "repetition_penalty=10"),
        ({"repetition_clamp": 10**400}, "repetition_clamp=10"),
        ({"num_sink_tokens": 10**400}, "num_sink_tokens=10"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_named(model, processor, settings, message):
    with pytest.raises(ValueError, match=message.replace("(", "\\(")):
        stream_of(model("casa"), processor, **settings)


def test_questions_that_cannot_be_leave_the_stream_as_it_was(model, processor):
    model = model("casa")
    stream = stream_of(model, processor)
    events = stream.push(PICTURES[0])
    taken = [next(events)]
    faults = (("\ud83d", 5, "half a character"), (" ", 5, "asks nothing"), ("Who?", 0, "max_new_tokens=0"))
    for question, limit, message in faults:
        with pytest.raises(ValueError, match=message):
            stream.ask(question, max_new_tokens=limit)
    with pytest.raises(ValueError, match="timestamp"):
        stream.push(PICTURES[1], timestamp=0.0)
    taken += events
    assert [emitted(taken)] == say(stream_of(model, processor), PICTURES[:1]), "the open events are still open"


def test_a_processor_of_another_model_is_refused(model, family):
    _, other = family("qwen2_5_vl", 2)
    with pytest.raises(ValueError, match="gist tokens"):
        CasaStream(model("casa"), other)


def test_a_model_of_another_kind_is_refused(processor, source_folder):
    from transformers import AutoModelForImageTextToText

    source = AutoModelForImageTextToText.from_pretrained(source_folder)
    with pytest.raises(ValueError, match="CasaForConditionalGeneration"):
        CasaStream(source, processor)


def test_what_is_no_model_and_no_processor_is_named(model, processor):
    model = model("casa")
    for given, message in (
        ((None, processor), "model is a NoneType; a stream needs a CasaForConditionalGeneration"),
        ((processor, model), "model is a CasaProcessor"),
        ((model.model, processor), "model is a CasaModel"),
        ((model, None), "processor is a NoneType; a stream needs the CasaProcessor"),
        ((model, processor.tokenizer), "processor is a .*Tokenizer"),
    ):
        with pytest.raises(ValueError, match=message):
            CasaStream(*given)
