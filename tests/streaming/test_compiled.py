# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Streams with compiled steps on a static cache: word for word what eager ones say, in one graph."""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig, DynamicCache, StaticCache

from casa_hf import CasaStream
from casa_hf.cache_casa import cache_nbytes
from casa_hf.streaming.tower import FrameTower
from tests.streaming.helpers import OFF, emitted, picture, say
from tests.streaming.test_session import OPENING, PICTURES, PROMPT, stream_of

# From 1 x 1 to the processor's limit of 4 x 3 image tokens.
SIZES = [(28, 28), (84, 56), (112, 84), (56, 84), (84, 112)]


pytestmark = pytest.mark.usefixtures("fresh_compiler")


def graphs() -> int:
    assert not counters["graph_break"], dict(counters["graph_break"])
    return counters["stats"]["unique_graphs"]


def towers(model: Any) -> int:
    """How many sizes and numbers of frames the tower is compiled for."""
    held = getattr(model, "_FrameTower", None)
    return 0 if held is None else sum(each is not None for kind in held._compiled.values() for each in kind.values())


def steps(model: Any) -> int:
    """How many graphs there are beside those of the tower."""
    return graphs() - towers(model)


def with_config(model: Any, **settings: Any) -> Any:
    """The model, whose steps are compiled as a whole or not at all."""
    model.generation_config.compile_config = CompileConfig(
        **{"fullgraph": True, "backend": "eager", "mode": None, **settings}
    )
    return model


def frames(count: int) -> list[Any]:
    return [picture(seed, *SIZES[seed % len(SIZES)]) for seed in range(count)]


def told(model: Any, processor: Any, compile: bool, other: bool | None = None, **settings: Any) -> list[Any]:
    """A question before the first frame; frames of many sizes, one by one and together; questions, a fork, a session
    that is saved, resumed by a stream that compiles like the `other` one, saved there and resumed; a reset."""
    shown, said = frames(12), []
    settings = {"prompt": PROMPT, "max_new_tokens_per_frame": 6, **settings}
    with CasaStream(model, processor, compile=compile, **settings) as stream:
        said.append(emitted(stream.ask("Who are you?", max_new_tokens=4)))
        said += say(stream, shown[:4])
        said.append(emitted(stream.push(shown[4:6])))
        said.append(emitted(stream.ask("What is this?", max_new_tokens=5)))
        fork = stream.fork()
        said += say(fork, shown[6:8])
        said += say(stream, shown[8:10])
        said.append(stream.num_text_tokens)
        second = CasaStream(model, processor, compile=compile if other is None else other, **settings)
        second.load_state_dict(read(written(stream.state_dict())))
        third = CasaStream(model, processor, compile=compile, **settings)
        third.load_state_dict(read(written(second.state_dict())))
        for one in (second, third, stream):
            said += say(one, shown[10:])
            said.append((one.num_text_tokens, one.nbytes["image"]))
        stream.reset()
        said += say(stream, shown[:2])
    return said


def written(state: dict[str, Any]) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


def read(file: io.BytesIO) -> dict[str, Any]:
    return torch.load(file, weights_only=True)


def room(processor: Any) -> dict[str, Any]:
    return {"max_text_tokens": len(processor.tokenizer(OPENING)["input_ids"]) + 40}


VARIANTS = ("casa", "ca", "casa-shared", "ca-shared", "exact", "casa-replace", "casa-before")


@pytest.mark.parametrize(
    "variant", [v if v in ("casa", "exact") else pytest.param(v, marks=pytest.mark.slow) for v in VARIANTS]
)
def test_one_graph_says_the_same(new_model: Callable[..., Any], processor: Any, variant: str) -> None:
    """Over tokens, sizes of images, evictions, silence, questions, forks, saved sessions and resets."""
    model = with_config(new_model(variant))
    expected = told(model, processor, compile=False, **room(processor))
    assert graphs() == 0
    assert told(model, processor, compile=True, **room(processor)) == expected
    assert towers(model) == len(SIZES) and steps(model) == 1
    assert told(model, processor, compile=True, other=False, **room(processor)) == expected
    assert told(model, processor, compile=False, other=True, **room(processor)) == expected
    assert graphs() == 1 + len(SIZES), "other streams of the same room have the same graph, and the same tower"
    lengths = {len(part) for part in expected if isinstance(part, list | tuple)}
    assert len(lengths) > 2, "frames end at different lengths"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) for name in ("qwen2_vl", "qwen3_vl", "qwen2_5_vl")]
)
def test_families(family: Callable[..., Any], name: str) -> None:
    model, processor = family(name)
    processor.frame_max_pixels *= 2  # above what small frames are enlarged to, which is rounded up
    with_config(model)
    expected = told(model, processor, compile=False, **room(processor))
    assert told(model, processor, compile=True, **room(processor)) == expected
    assert steps(model) == 1


@pytest.mark.parametrize("gists", [0, 2])
def test_recurrent_states_and_gist_tokens(family: Callable[..., Any], gists: int) -> None:
    """Qwen3.5, whose blocks of linear attention keep states; and a text model with a tower from elsewhere."""
    model, processor = family("helium", gists) if gists else family("qwen3_5")
    processor.frame_max_pixels *= 2
    with_config(model)
    expected = told(model, processor, compile=False, **(room(processor) if gists else {}))
    assert told(model, processor, compile=True, other=False, **(room(processor) if gists else {})) == expected
    assert steps(model) == 1


@pytest.mark.parametrize("history", ["group", "all"])
def test_frames_that_stay(new_model: Callable[..., Any], processor: Any, history: str) -> None:
    """Where frames stay visible, there is a further graph for each doubling of the room for them."""
    model = with_config(new_model("casa", casa_image_history=history, casa_video_history=history))
    expected = told(model, processor, compile=False)
    assert told(model, processor, compile=True, other=False) == expected
    assert steps(model) <= (2 if history == "group" else 5)


def test_unbounded_text_doubles_the_room(
    new_model: Callable[..., Any], processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_config(new_model("casa"))
    monkeypatch.setattr("casa_hf.streaming.compiled._FIRST_TOKENS", 64)
    settings = {"max_new_tokens_per_frame": 6, **OFF}
    expected = say(stream_of(model, processor, compile=False, **settings), frames(24))
    with stream_of(model, processor, compile=True, **settings) as stream:
        assert say(stream, frames(24)) == expected
        rooms = stream._cache.get_max_length() if hasattr(stream._cache, "get_max_length") else 0
        assert stream.num_text_tokens > 128
    assert rooms in (0, 256) and steps(model) == 3, "64, 128, 256"


def test_a_question_longer_than_the_room_is_answered(new_model: Callable[..., Any], processor: Any) -> None:
    model = with_config(new_model("casa"))
    question = " ".join(["Who is it?"] * 60)
    said = []
    for compile in (False, True):
        with stream_of(model, processor, compile=compile, **room(processor)) as stream:
            said.append([say(stream, PICTURES[:1]), emitted(stream.ask(question)), *say(stream, PICTURES[1:3])])
    assert said[0] == said[1]


def test_streams_in_threads_of_their_own(new_model: Callable[..., Any], processor: Any) -> None:
    """One reads frames while the other one is compiled."""
    model = with_config(new_model("casa"))
    shown = [frames(9), frames(9)[::-1]]
    expected = [say(stream_of(model, processor, compile=False), each) for each in shown]
    streams = [stream_of(model, processor, compile=True) for _ in shown]
    said: dict[int, Any] = {}
    start = threading.Barrier(len(streams))

    def run(number: int) -> None:
        start.wait()
        said[number] = say(streams[number], shown[number])

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(streams))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [said.get(0), said.get(1)] == expected
    made = graphs()  # what both needed first at the same time may have been compiled twice
    assert say(stream_of(model, processor, compile=True), shown[0]) == expected[0]
    assert graphs() == made and towers(model) == len(SIZES)


def test_a_copy_of_the_model_has_a_tower_of_its_own(new_model: Callable[..., Any], processor: Any) -> None:
    model = with_config(new_model("casa"))
    say(stream_of(model, processor, compile=True), [PICTURES[0]] * 2)
    assert towers(model) == 1
    other = copy.deepcopy(model)
    assert towers(other) == 0
    with torch.no_grad():
        for parameter in other.model.visual.parameters():
            parameter.mul_(1.5)
    expected = say(stream_of(other, processor, compile=False), [PICTURES[0]] * 3)
    assert say(stream_of(other, processor, compile=True), [PICTURES[0]] * 3) == expected
    assert expected != say(stream_of(model, processor, compile=False), [PICTURES[0]] * 3)
    tower = FrameTower.of(other, other._FrameTower._options)
    assert tower is other._FrameTower and tower._model is other and towers(other) == 1


# ------------------------------------------------------------------------------------ the cache


def test_the_cache_has_room_for_budget_and_frame_and_stays_where_it_is(
    new_model: Callable[..., Any], processor: Any
) -> None:
    model = with_config(new_model("casa"))
    with stream_of(model, processor, compile=True, max_text_tokens=90) as stream:
        say(stream, PICTURES[:1])
        cache, first = stream._cache, stream._cache.layers[0]
        assert isinstance(cache, StaticCache) and first.max_cache_len == 90 + 64
        assert first.fusion["image"].keys.shape[2] == 4 * 3
        before = [first.keys.data_ptr(), first.fusion["image"].keys.data_ptr(), first.fusion["window"].keys.data_ptr()]
        say(stream, frames(12))
        layer = stream._cache.layers[0]
        after = [layer.keys.data_ptr(), layer.fusion["image"].keys.data_ptr(), layer.fusion["window"].keys.data_ptr()]
        assert stream._cache is cache and after == before
        assert sum(cache_nbytes(cache, allocated=True).values()) > sum(stream.nbytes.values()) > 0
    with stream_of(model, processor, compile=False) as stream:
        say(stream, PICTURES[:1])
        assert isinstance(stream._cache, DynamicCache)


def test_a_stream_in_inference_mode_continues_outside_it(new_model: Callable[..., Any], processor: Any) -> None:
    model = with_config(new_model("casa"))
    expected = say(stream_of(model, processor), PICTURES[:4])
    stream = stream_of(model, processor, compile=True)
    with torch.inference_mode():
        said = say(stream, PICTURES[:2])
    assert said + say(stream, PICTURES[2:4]) == expected
    assert steps(model) == 1


def test_a_failed_step_resets(new_model: Callable[..., Any], processor: Any) -> None:
    model = with_config(new_model("casa"))
    stream = stream_of(model, processor, compile=True)
    expected = say(stream, PICTURES[:2])
    events = stream.push(PICTURES[2])
    with pytest.raises(KeyboardInterrupt) as error:
        handle = model.get_decoder().layers[1].register_forward_pre_hook(_interrupt)
        try:
            list(events)
        finally:
            handle.remove()
    assert any("has been reset" in note for note in error.value.__notes__)
    assert say(stream, PICTURES[:2]) == expected


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


# ------------------------------------------------------------------------------------ what is compiled


def test_what_cannot_be_compiled_is_refused_by_name(new_model: Callable[..., Any], processor: Any) -> None:
    model = new_model("casa")
    with pytest.raises(ValueError, match=r"compile='yes' must be True, False or None"):
        CasaStream(model, processor, compile="yes")
    model.generation_config.disable_compile = True
    with pytest.raises(ValueError, match="disable_compile"):
        CasaStream(model, processor, compile=True)
    with stream_of(model, processor) as stream:
        say(stream, PICTURES[:1])
    model.generation_config.disable_compile = False
    model.config.text_config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"compile=True.*flash_attention_2.*sdpa"):
        CasaStream(model, processor, compile=True)
    assert graphs() == 0


def test_nothing_is_compiled_on_a_cpu_unless_it_is_asked_for(new_model: Callable[..., Any], processor: Any) -> None:
    model = with_config(new_model("casa"))
    with stream_of(model, processor) as stream:
        say(stream, PICTURES[:2])
        assert isinstance(stream._cache, DynamicCache)
    assert graphs() == 0


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["casa", "casa-shared"])
def test_inductor(new_model: Callable[..., Any], processor: Any, variant: str) -> None:
    """As on an accelerator, but for CUDA graphs."""
    model = with_config(new_model(variant), backend="inductor")
    expected = told(model, processor, compile=False, **room(processor))
    assert told(model, processor, compile=True, other=False, **room(processor)) == expected
    assert steps(model) == 1
