# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Preallocated caches: the same tokens as growing ones, and one compiled decoding step for all of a stream."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig, DynamicCache, StaticCache

from casa_hf.cache_casa import cache_nbytes
from tests.helpers_generation import (
    Image,
    Row,
    batch,
    greedy,
    new_model,
    one_shot,
    relative_error,
    shared_model,
    token_ids,
    words,
)
from tests.tiny import GISTS

VARIANTS = ("casa", "ca", "casa-shared", "ca-shared", "exact", "insertion", "casa-before", "casa-replace", "casa-ffn")
TOLERANCE = 1e-6
A, B, C = Image(2, 3, 1), Image(1, 2, 2), Image(3, 1, 3)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def static_cache(model: Any, length: int = 96) -> StaticCache:
    return StaticCache(config=model.config, max_cache_len=length)


def random_turn(generator: random.Random, max_side: int) -> Row:
    """Text, or one to three images with or without text between them, and text."""
    row: Row = words(generator.randint(0, 2), generator.randrange(1000))
    for _ in range(generator.choice([0, 1, 1, 2, 3])):
        sides = generator.randint(1, max_side), generator.randint(1, max_side)
        row = [*row, Image(*sides, generator.randrange(1000)), *words(generator.choice([0, 0, 2]), 5)]
    return [*row, *words(generator.randint(1, 3), generator.randrange(1000))]


# ------------------------------------------------------------------------------------ the same tokens


@pytest.mark.parametrize("side, reserved", [("left", 4), ("right", 64)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_streams_equal_one_shot(variant: str, side: str, reserved: int) -> None:
    """Three rows that receive text and images at different turns, then decode a few tokens; slots may have to grow."""
    model = new_model(variant, casa_static_image_tokens=reserved)
    generator = random.Random(f"{variant} {side} {reserved}")
    cache = static_cache(model, 120)
    past: list[list[Any]] = [[], [], []]
    for _ in range(4):
        turn = [random_turn(generator, 3) for _ in past]
        inputs = batch(*turn, side=side)
        logits = model(**inputs, cache=cache).logits
        for number, row in enumerate(turn):
            past[number] += row
            kept = logits[number, inputs["attention_mask"][number].bool()]
            assert relative_error(kept, one_shot(model, past[number])[-len(kept) :]) < TOLERANCE
        for _ in range(2):
            tokens = [generator.randrange(3, 50) for _ in past]
            logits = model(input_ids=torch.tensor(tokens)[:, None], cache=cache).logits[:, -1]
            for number, token in enumerate(tokens):
                past[number].append(token)
                assert relative_error(logits[number], one_shot(model, past[number])[-1]) < TOLERANCE


@pytest.mark.parametrize("variant", ["casa", "exact"])
def test_reserved_slots_stay_and_double(variant: str) -> None:
    model = new_model(variant, casa_static_image_tokens=4)
    cache = static_cache(model)

    def slots_after(*images: Image) -> tuple[int, set[int]]:
        model(**batch([*images, 5]), cache=cache)
        found = {layer.fusion["image"].keys.shape[2] for layer in cache.layers}
        assert len(found) == 1
        return found.pop(), {layer.fusion["image"].keys.data_ptr() for layer in cache.layers}

    four, places = slots_after(Image(1, 1, 1))
    assert four == 4 and slots_after(Image(2, 2, 2)) == (4, places) == slots_after(Image(1, 3, 3))
    sixteen, places = slots_after(Image(3, 3, 4))
    assert sixteen == 16 and slots_after(Image(1, 1, 5)) == (16, places) == slots_after(Image(4, 4, 6))
    assert slots_after(Image(2, 2, 7), Image(4, 4, 8))[0] == 32


@pytest.mark.parametrize("variant", VARIANTS)
def test_reset_and_reuse(variant: str) -> None:
    """What an earlier use left in the slots isn't seen, even by a batch of smaller images or of text alone."""
    model = new_model(variant, casa_static_image_tokens=8)
    cache = static_cache(model)
    for rows in (
        [[*words(3, 1), A, *words(4, 2), C, 5], [B, *words(2, 3)]],
        [words(4, 4), words(2, 5)],
        [[B, 7], [4, B, 8]],
        [[*words(6, 6), Image(4, 3, 6), 9], words(3, 7)],
    ):
        inputs = batch(*rows)
        logits = [model(**inputs, cache=cache).logits[:, -1]]
        logits += [model(input_ids=torch.full((2, 1), t), cache=cache).logits[:, -1] for t in (11, 12)]
        held = cache_nbytes(cache, allocated=True)
        for number, row in enumerate(rows):
            for count, actual in enumerate(logits):
                expected = one_shot(model, [*row, 11, 12][: len(row) + count])[-1]
                assert relative_error(actual[number], expected) < TOLERANCE
        cache.reset()
        assert cache_nbytes(cache, allocated=True) == held, "the memory is kept for the next use"


@pytest.mark.parametrize("variant", VARIANTS)
def test_generation_equals_a_growing_cache(variant: str) -> None:
    model = shared_model(variant)
    for rows in (
        [[*words(3, 1), A, *words(4, 2), B, C, *words(2, 3)], words(6, 4), [B, *words(3, 5)]],
        [words(5, 1), words(2, 2)],
    ):
        for more in ({}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}):
            settings = {**batch(*rows), "max_new_tokens": 6, "do_sample": False, **more}
            expected = model.generate(**settings)
            assert torch.equal(model.generate(**settings, cache_implementation="static"), expected)


@pytest.mark.parametrize("variant", ["casa", "exact", "insertion"])
def test_a_conversation_through_generate(variant: str) -> None:
    """Several turns of `generate` on one preallocated cache, with windows of different sizes."""
    model, past = shared_model(variant), []
    cache = static_cache(model)
    for row in ([*words(3, 1), A, 5], [Image(4, 4, 5), *words(2, 2)], words(3, 3), [B, C, 6]):
        past += row
        inputs = batch(past)
        new = model.generate(**inputs, cache=cache, max_new_tokens=4, do_sample=False)[0, -4:].tolist()
        assert new == greedy(model, past, 4)
        past += new


def test_gist_tokens() -> None:
    model = new_model("casa", num_gist_tokens=2, gist_token_ids=GISTS, casa_text_windows=True)
    row: Row = [*words(3, 1), A, *GISTS, *words(2, 2), B, *GISTS]
    caches = static_cache(model), DynamicCache()
    for cache in caches:
        model(**batch(row), cache=cache)
    past = list(row)
    for token in (GISTS[0], 7, GISTS[1], 8):
        past.append(token)
        for cache in caches:
            logits = model(input_ids=torch.tensor([[token]]), cache=cache).logits[0, -1]
            assert relative_error(logits, one_shot(model, past)[-1]) < TOLERANCE


@pytest.mark.parametrize("variant", ["casa", "casa-shared", "ca-shared", "exact", "casa-replace"])
def test_a_cache_too_small_is_named_and_left_as_it_was(variant: str) -> None:
    model = shared_model(variant)
    with pytest.raises(ValueError, match=r"8 tokens.*has 11 now.*max_cache_len"):
        model(**batch([*words(8, 1), A, 5]), cache=static_cache(model, 8))
    cache, row = static_cache(model, 8), [A, *words(4, 1)]
    model(**batch(row), cache=cache)
    for later in ([B, *words(3, 3)], words(5, 2)):
        with pytest.raises(ValueError, match=r"8 tokens.*has 11 now.*max_cache_len"):
            model(input_ids=torch.tensor([token_ids(later)]), cache=cache, **images(later))
    logits = model(input_ids=torch.tensor([[7]]), cache=cache).logits[0]
    assert relative_error(logits, one_shot(model, [*row, 7])[-1:]) < TOLERANCE


def images(row: Row) -> dict[str, torch.Tensor]:
    return {name: value for name, value in batch(row).items() if name not in ("input_ids", "attention_mask")}


@pytest.mark.parametrize(
    "variant, layers", [("casa", None), ("ca-replace", [0]), ("casa-replace", [0, 1]), ("casa-replace", None)]
)
@pytest.mark.parametrize("settings", [{}, {"prefill_chunk_size": 3}], ids=str)
def test_generate_makes_a_static_cache(variant: str, layers: list[int] | None, settings: dict[str, Any]) -> None:
    """It has room for text in every block, also where self-attention is replaced and no text comes."""
    model = new_model(variant, casa_layers=layers)
    row: Row = [*words(3, 1), A, *words(4, 2), B, *words(3, 3)]
    inputs = {**batch(row), **settings, "cache_implementation": "static", "return_dict_in_generate": True}
    output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    produced = output.sequences[0, -6:].tolist()
    assert produced == greedy(model, row, 6)
    output.cache.crop(-2)
    length = len(token_ids(row)) + 3
    assert int(output.cache.get_seq_length()) == length
    for block, layer in zip(model.model.language_model.layers, output.cache.layers, strict=True):
        assert int(layer.cumulative_length) == (0 if block.self_attn is None else length)
    logits = model(torch.tensor([[5, 6]]), cache=output.cache).logits[0]
    assert relative_error(logits, one_shot(model, [*row, *produced[:3], 5, 6])[-2:]) < TOLERANCE


# ------------------------------------------------------------------------------------ one compiled step


def stream(model: Any, step: Any, cache: Any, turns: Sequence[Sequence[Row]], tokens: int, once: Any = None) -> None:
    """Feed turns of images and text, decode greedily with `step`, and compare every token with a growing cache."""
    growing = DynamicCache()
    for turn in turns:
        inputs = batch(*turn)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        if len(turn) == 1:
            del inputs["attention_mask"]
        model(**inputs, cache=cache)
        expected = model(**inputs, cache=growing).logits[:, -1]
        for _ in range(tokens):
            ids = expected.argmax(-1, keepdim=True)
            actual = step(input_ids=ids, cache=cache).logits[:, -1]
            expected = model(input_ids=ids, cache=growing).logits[:, -1]
            assert relative_error(actual, expected) < (TOLERANCE if model.dtype == torch.float64 else 1e-4)
            if once is not None:
                once()


@pytest.mark.parametrize("variant", ["casa", "ca-shared"])
def test_a_compiled_step_goes_on_after_tokens_were_taken_back(fresh_compiler: None, variant: str) -> None:
    """In the same graph: what is taken back changes no address."""
    model, row = new_model(variant, dtype=torch.float32), [A, *words(3, 1)]
    cache = static_cache(model)
    model(**batch(row), cache=cache)
    step = torch.compile(model, backend="eager", fullgraph=True)
    for turn in range(3):
        for token in (7 + turn, 8, 9):
            step(input_ids=torch.tensor([[token]]), cache=cache)
        addresses = addresses_of(cache.layers[0].window_state)
        cache.crop(-2)
        assert addresses_of(cache.layers[0].window_state) == addresses
        row = [*row, 7 + turn, 5]
        logits = step(input_ids=torch.tensor([[5]]), cache=cache).logits
        assert relative_error(logits[0], one_shot(model, row)[-1:]) < 1e-5
    assert counters["stats"]["unique_graphs"] == 1


def addresses_of(state: Any) -> dict[str, int]:
    return {name: value.data_ptr() for name, value in vars(state).items() if isinstance(value, torch.Tensor)}


def turns_for(rows: int) -> list[list[Row]]:
    """Windows of several sizes; with two rows, frames that arrive at different turns and padding."""
    alone: list[Row] = [[A, *words(3, 1)], [Image(3, 4, 2), *words(3, 2)], [Image(1, 2, 3), Image(2, 1, 4), 5], [7, 8]]
    other: list[Row] = [[*words(4, 5), B, 6], words(2, 6), [Image(4, 4, 6), 9], [C, 5]]
    return [list(turn) for turn in zip(*(alone, other)[:rows], strict=True)]


def quick(*cases: Any, slow: Sequence[Any]) -> list[Any]:
    """Parameters of which the last ones run in the slow suite."""
    late = (case if isinstance(case, tuple) else (case,) for case in slow)
    return [*cases, *(pytest.param(*case, marks=pytest.mark.slow) for case in late)]


@pytest.mark.parametrize(
    "variant, rows",
    quick(
        ("casa", 2),
        ("exact", 1),
        slow=[
            *((variant, rows) for variant in ("casa-shared", "ca", "insertion", "casa-before") for rows in (1, 2)),
            *((variant, rows) for variant in ("ca-shared", "casa-replace") for rows in (1, 2)),
            ("casa", 1),
            ("exact", 2),
        ],
    ),
)
def test_one_graph_for_all_tokens_windows_and_sizes(variant: str, rows: int, fresh_compiler: None) -> None:
    model = new_model(variant, casa_static_image_tokens=64)
    step = torch.compile(model, fullgraph=True, backend="eager")
    graphs = []
    stream(model, step, static_cache(model), turns_for(rows), 3, lambda: graphs.append(_graphs()))
    # After the first token at the latest, whatever follows.
    assert graphs[0] >= 1 and set(graphs[1:]) == {graphs[0]}, graphs


def _graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.slow
def test_a_reset_cache_meets_the_same_graph(fresh_compiler: None) -> None:
    model = new_model("casa", casa_static_image_tokens=64)
    step, cache = torch.compile(model, fullgraph=True, backend="eager"), static_cache(model)
    stream(model, step, cache, turns_for(1)[:2], 2)
    graphs = _graphs()
    cache.reset()
    stream(model, step, cache, turns_for(1)[1:], 2)
    assert _graphs() == graphs


@pytest.mark.slow
def test_a_stream_that_starts_with_text_adds_one_graph(fresh_compiler: None) -> None:
    """Where no room for images was made beforehand, there is nothing to fuse before the first one."""
    model = new_model("casa", casa_static_image_tokens=64)
    step = torch.compile(model, fullgraph=True, backend="eager")
    stream(model, step, static_cache(model), [[words(4, 1)], *turns_for(1)], 2)
    assert _graphs() == 2


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["casa", "exact"])
def test_inductor(variant: str, fresh_compiler: None) -> None:
    model = new_model(variant, dtype=torch.float32, casa_static_image_tokens=64)
    step = torch.compile(model, fullgraph=True)
    graphs: list[int] = []
    stream(model, step, static_cache(model), turns_for(1), 3, lambda: graphs.append(_graphs()))
    assert set(graphs[1:]) == {graphs[0]}


def compile_config() -> CompileConfig:
    """For `generate`, which else compiles on accelerators only."""
    config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    config._compile_all_devices = True
    return config


PROMPTS: list[list[Row]] = [
    [[*words(3, 1), A, *words(3, 2)], [B, *words(2, 2)]],
    [[*words(5, 1), Image(4, 3, 1), *words(3, 2)], [B, *words(2, 2), Image(1, 1, 4), 3]],
    [words(5, 1), words(4, 2)],
]


@pytest.mark.parametrize(
    "variant, prompts",
    quick(("ca", 1), slow=[(variant, 3) for variant in ("casa", "ca", "casa-shared", "ca-shared", "exact")]),
)
def test_generate_compiles_its_steps(variant: str, prompts: int, fresh_compiler: None) -> None:
    model = new_model(variant)
    for rows in PROMPTS[:prompts]:
        settings = {**batch(*rows), "max_new_tokens": 6, "do_sample": False}
        tokens = model.generate(**settings, cache_implementation="static", compile_config=compile_config())
        assert torch.equal(tokens, model.generate(**settings))
        assert _graphs() >= 1, "nothing was compiled"


@pytest.mark.parametrize("more", [{"num_beams": 2}, {"num_return_sequences": 2, "num_beams": 2}])
def test_beams_with_a_compile_config(more: dict[str, Any], fresh_compiler: None) -> None:
    """Transformers doesn't compile the steps of beam search; the config does no harm."""
    model = shared_model("casa")
    settings = {**batch(*PROMPTS[0]), "max_new_tokens": 6, "do_sample": False, **more}
    tokens = model.generate(**settings, cache_implementation="static", compile_config=compile_config())
    assert torch.equal(tokens, model.generate(**settings))
