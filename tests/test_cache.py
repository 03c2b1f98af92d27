# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""All decoding state lives in the cache: any way to feed a stream gives the one-shot answer, nothing else stays."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import pickle
import random
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, Qwen2_5_VLForConditionalGeneration, StaticCache
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, QuantizedCache

from casa_hf import cache_nbytes
from casa_hf.cache_casa import cache_snapshot
from casa_hf.cache_layers import GrowingMemory
from casa_hf.design_space import VARIANTS as ALL_VARIANTS
from casa_hf.transformers_versions import CACHE
from tests.helpers_generation import (
    MAIN,
    VARIANTS,
    Image,
    Row,
    batch,
    greedy,
    image_inputs,
    image_places,
    images_of,
    new_model,
    one_shot,
    relative_error,
    shared_model,
    token_ids,
    words,
)
from tests.tiny import END, PAD, START, source_config

# Different shapes of the same products round differently; a wrong key or position moves answers by 1e-2 and more.
TOLERANCE = 1e-9
A, B, C, D = Image(2, 3, 1), Image(1, 2, 2), Image(3, 1, 3), Image(2, 2, 4)
ROW: Row = [*words(3, 1), A, *words(4, 2), B, C, *words(5, 3), D]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def feed(model: Any, row: Row, cache: Any = None, start: int = 0, **inputs: Any) -> Any:
    """One call with the tokens of `row` from `start` on, and the images before them; rows of one."""
    ids = token_ids(row)[start:]
    marked = list(zip(image_places(row), images_of([row]), strict=True))
    new = [(place - start, image) for place, image in marked if place >= start]
    images = image_inputs([image for _, image in new])
    if new:
        images["image_positions"] = torch.tensor([[0, place] for place, _ in new])
    return model(input_ids=torch.tensor([ids]), cache=cache, use_cache=True, **images, **inputs)


def in_chunks(model: Any, row: Row, sizes: Sequence[int], cache: Any = None) -> torch.Tensor:
    """(tokens, vocabulary) logits of a row fed in chunks of these sizes, over and over."""
    ids, marked = token_ids(row), list(zip(image_places(row), images_of([row]), strict=True))
    logits, start, turn = [], 0, 0
    while start < len(ids):
        end = min(start + sizes[turn % len(sizes)], len(ids))
        images = image_inputs([image for place, image in marked if start <= place < end])
        if images:
            images["image_positions"] = torch.tensor([[0, p - start] for p, _ in marked if start <= p < end])
        output = model(input_ids=torch.tensor([ids[start:end]]), cache=cache, use_cache=True, **images)
        cache = output.cache
        logits.append(output.logits[0])
        start, turn = end, turn + 1
    return torch.cat(logits)


def snapshot(cache: Any) -> list[Any]:
    """Everything that a cache holds, by value."""

    def kept(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: kept(part) for name, part in value.items()}
        if isinstance(value, GrowingMemory):  # the room behind what is used holds whatever stood there before
            return copy.deepcopy(list(value.tensors.between(0, value.used)))
        return value.clone() if isinstance(value, torch.Tensor) else copy.deepcopy(value)

    return [kept(dict(sorted(vars(layer).items()))) for layer in cache.layers]


def same(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    if hasattr(first, "__dict__"):
        return type(first) is type(second) and same(vars(first), vars(second))
    return first == second


# ------------------------------------------------------------------------------------ any chunking


@pytest.mark.parametrize("sizes", [[1], [2], [3], [7], [1, 5], [64]], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_chunks_of_any_size_equal_one_call(variant, sizes):
    model = shared_model(variant)
    expected = one_shot(model, ROW)
    for cache in (DynamicCache(), StaticCache(config=model.config, max_cache_len=40)):
        assert relative_error(in_chunks(model, ROW, sizes, cache), expected) < TOLERANCE


DESIGNS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in ALL_VARIANTS if name not in VARIANTS},
    "casa, gated": ("casa", {"casa_gate": "tanh", "casa_image_positions": "before"}),
    "casa after, text windows": ("casa", {"casa_placement": "after", "casa_text_windows": True}),
    "ca, full updates, all images": ("ca", {"casa_image_updates": "full", "casa_image_history": "all"}),
    "casa-shared, insertion positions": ("casa-shared", {"casa_positions": "insertion"}),
    "casa in the first block": ("casa", {"casa_layers": [0], "casa_image_history": "latest"}),
    "exact, latest": ("exact", {"casa_image_history": "latest"}),
}


@pytest.mark.parametrize("design", DESIGNS)
def test_every_design_keeps_its_state_in_the_cache(design):
    """Chunks, crops, reordered rows and beams in all designs; the tests below look at the main ones more closely."""
    variant, fields = DESIGNS[design]
    model = new_model(variant, **fields)
    expected = one_shot(model, ROW)
    for cache in (None, StaticCache(config=model.config, max_cache_len=40)):
        assert relative_error(in_chunks(model, ROW, [1, 5], cache), expected) < TOLERANCE
    cache = feed(model, [*words(3, 1), A, *words(4, 2)]).cache
    cache.crop(-2)
    rest: Row = [*words(2, 9), B, *words(2, 10)]
    whole: Row = [*words(3, 1), A, *words(4, 2)[:2], *rest]
    assert relative_error(feed(model, rest, cache).logits[0], one_shot(model, whole)[-6:]) < TOLERANCE
    cache = model(**batch(*ROWS)).cache
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    forked = copy.deepcopy(cache)
    continued(model, cache, [2, 0, 0])
    forked.batch_repeat_interleave(2)
    continued(model, forked, [2, 2, 0, 0, 0, 0])
    cache.reset()
    model(**batch(*ROWS), cache=cache)
    continued(model, cache, [0, 1, 2])
    settings = {"max_new_tokens": 4, "do_sample": False}
    tokens = model.generate(**batch(*ROWS), **settings, cache_implementation="static")[:, -4:]
    assert tokens.tolist() == [greedy(model, row, 4) for row in ROWS]
    beams = model.generate(**batch(*ROWS), **settings, num_beams=3)
    assert torch.equal(beams, model.generate(**batch(*ROWS), **settings, num_beams=3, use_cache=False))


OPEN_ROWS: dict[str, tuple[Row, int]] = {
    "between two images": ([*words(2, 1), A, B, *words(2, 2)], 4),
    "inside the delimiters of the second": ([*words(2, 1), A, B, *words(2, 2)], 5),
    "three images, two of them stored": ([A, B, C, *words(2, 2)], 4),
    "delimiters without an image between": ([A, START, END, START, B, *words(2, 2)], 4),
    "text between, so not one group": ([*words(2, 1), A, 9, B, *words(2, 2)], 5),
    "text before the boundary": ([*words(2, 1), A, 9, 8, B, *words(2, 2)], 6),
    "image as first token of all": ([A, B, *words(2, 2)], 2),
}


@pytest.mark.parametrize("history", ["group", "latest"])
@pytest.mark.parametrize("case", OPEN_ROWS)
def test_groups_stay_open_over_calls(case, history):
    model = new_model("casa", casa_image_history=history)
    row, boundary = OPEN_ROWS[case]
    expected = one_shot(model, row)
    assert relative_error(in_chunks(model, row, [boundary, 64]), expected) < TOLERANCE
    assert relative_error(in_chunks(model, row, [boundary - 1, 1, 64]), expected) < TOLERANCE
    other = one_shot(new_model("casa", casa_image_history="latest" if history == "group" else "group"), row)
    is_group = "text" not in case
    assert (relative_error(other[-1], expected[-1]) > 1e-2) == is_group, "the case shows whether images are grouped"


def random_row(rng: random.Random) -> Row:
    row: list[Any] = []
    for _ in range(rng.randint(1, 6)):
        if rng.random() < 0.5:
            row.append(Image(rng.randint(1, 3), rng.randint(1, 3), rng.randint(0, 999)))
        else:
            row += words(rng.randint(1, 4), rng.randint(0, 999))
    return row


def in_ragged_turns(
    model: Any, rows: list[Row], rng: random.Random, masks: str, side: str, cache: Any, frames: bool
) -> list[torch.Tensor]:
    """Logits of rows that receive different numbers of tokens and images at each turn, with padding between."""
    ids, queues = [token_ids(row) for row in rows], [iter(images_of([row])) for row in rows]
    fed, logits = [0] * len(rows), [[] for _ in rows]
    seen = torch.zeros(len(rows), 0, dtype=torch.long)
    while any(start < len(row) for start, row in zip(fed, ids, strict=True)):
        counts = [min(rng.choice([0, 1, 2, 3, 5, 8]), len(row) - start) for start, row in zip(fed, ids, strict=True)]
        width = max(counts) + rng.choice([0, 0, 1])
        if not any(counts):
            continue
        tokens, mask, types = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(3))
        new: list[Image] = []
        for r, count in enumerate(counts):
            place = slice(width - count, width) if side == "left" else slice(0, count)
            tokens[r, place] = torch.tensor(ids[r][fed[r] : fed[r] + count], dtype=torch.long)
            mask[r, place] = 1
            for index in (tokens[r] == END).nonzero()[:, 0].tolist():
                new.append(next(queues[r]))
                types[r, index] = kind(new[-1], frames)
        seen = torch.cat([seen, mask], 1)
        inputs = {**image_inputs(new), "attention_mask": seen if masks == "all tokens" else mask}
        if frames and new:
            inputs["mm_token_type_ids"] = types
        output = model(input_ids=tokens, cache=cache, use_cache=True, **inputs)
        cache = output.cache
        for r, count in enumerate(counts):
            logits[r].append(output.logits[r, mask[r].bool()])
            fed[r] += count
    return [torch.cat(parts) for parts in logits]


def kind(image: Image, frames: bool) -> int:
    return 2 if frames and image.seed % 2 else 1


@pytest.mark.parametrize("seed", range(24))
def test_rows_that_receive_images_at_different_turns_equal_each_row_alone(seed):
    rng = random.Random(seed)
    histories = {"casa_image_history": rng.choice(["latest", "group"]), "casa_video_history": "group"}
    model = new_model(VARIANTS[seed % len(VARIANTS)], **histories)
    rows, frames = [random_row(rng) for _ in range(3)], seed % 3 == 0
    expected = []
    for row in rows:
        types = torch.zeros(1, len(token_ids(row)), dtype=torch.long)
        for place, image in zip(image_places(row), images_of([row]), strict=True):
            types[0, place] = kind(image, frames)
        expected.append(one_shot(model, row, **({"mm_token_type_ids": types} if frames else {})))
    cache = StaticCache(config=model.config, max_cache_len=120) if rng.random() < 0.3 else None
    masks, side = rng.choice(["all tokens", "new tokens"]), rng.choice(["left", "right"])
    for actual, wanted in zip(in_ragged_turns(model, rows, rng, masks, side, cache, frames), expected, strict=True):
        assert relative_error(actual, wanted) < TOLERANCE


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("later_mask", ["none", "new tokens", "all tokens"])
def test_padding_of_the_first_call_is_remembered(later_mask, side, static):
    model = shared_model("casa")
    rows = [[*words(4, 1), A, *words(3, 2)], [B, *words(1, 4)]]
    later = [[C, *words(3, 3)], [*words(3, 5), D]]
    cache = StaticCache(config=model.config, max_cache_len=40) if static else DynamicCache()
    first = batch(*rows, side=side)
    model(**first, cache=cache)
    second = batch(*later)
    mask = second.pop("attention_mask")
    if later_mask != "none":
        second["attention_mask"] = mask
    if later_mask == "all tokens":
        second["attention_mask"] = torch.cat([first["attention_mask"], mask], 1)
    logits = model(**second, cache=cache).logits
    for actual, row, more in zip(logits, rows, later, strict=True):
        assert relative_error(actual, one_shot(model, [*row, *more])[-5:]) < TOLERANCE


def test_positions_continue_and_may_be_given():
    model, row = shared_model("casa"), [*words(3, 1), A, *words(2, 2), B, *words(2, 3)]
    expected = one_shot(model, row)[-4:]
    for positions in (None, torch.arange(7, 11)[None], torch.arange(7, 11).expand(3, 1, -1)):
        cache = feed(model, row[:6]).cache
        logits = feed(model, row, cache, start=7, position_ids=positions).logits[0]
        assert relative_error(logits, expected) < TOLERANCE
    cache = feed(model, row[:6]).cache
    assert (
        relative_error(feed(model, row, cache, start=7, position_ids=torch.arange(4)[None]).logits[0], expected) > 1e-2
    )


# ------------------------------------------------------------------------------------ memory


def states(holder: Any) -> Iterator[torch.Tensor]:
    """All keys, values and other states that a cache holds, wherever it keeps them."""
    if isinstance(holder, torch.Tensor):
        if holder.is_floating_point():
            yield holder
    elif isinstance(holder, dict):
        for value in holder.values():
            yield from states(value)
    elif isinstance(holder, list | tuple):
        for value in holder:
            yield from states(value)
    elif hasattr(holder, "__dict__"):
        yield from states(vars(holder))


def storages(cache: Any) -> int:
    """Bytes of memory behind a cache, each piece counted once."""
    pieces = {state.untyped_storage().data_ptr(): state.untyped_storage().nbytes() for state in states(cache.layers)}
    return sum(pieces.values())


@pytest.mark.parametrize("variant, batch_size", [*((variant, 1) for variant in VARIANTS), ("casa", 2)])
def test_memory_of_images_and_windows_stays_constant_over_many_turns(variant, batch_size):
    model, cache, sizes, dead = shared_model(variant), DynamicCache(), [], []
    text_config = model.config.text_config
    head_dim = text_config.hidden_size // text_config.num_attention_heads
    per_token = 2 * 8 * text_config.num_hidden_layers * text_config.num_key_value_heads * head_dim * batch_size
    for turn in range(50):
        inputs = batch(*[[Image(2, 3, turn + row), *words(3, turn)] for row in range(batch_size)])
        inputs.pop("attention_mask")
        model(**inputs, cache=cache)
        dead.append([weakref.ref(state) for state in states(cache.layers)])
        sizes.append(cache_nbytes(cache))
        # Text has room for more: 64 slots or a quarter of it, in self-attention and in the window. Nothing else does.
        room = max(64, 5 * turn // 4) + (64 if variant == "casa" else 0)
        assert storages(cache) <= sum(sizes[-1].values()) + room * per_token
    assert {size["image"] for size in sizes} == {6 * per_token}
    # Self-attention keeps all text; the fusion layers of `casa` keep the window's: the delimiter and three words.
    window = 4 * per_token if variant == "casa" else 0
    assert [size["text"] for size in sizes] == [5 * turn * per_token + window for turn in range(1, 51)]
    gc.collect()
    held = {id(state) for state in states(cache.layers)}
    left = [state for references in dead[:-1] for reference in references if (state := reference()) is not None]
    assert all(id(state) in held for state in left), "only the memory of text lives on"
    assert all(reference() is not None for reference in dead[-1])


def test_memory_follows_the_largest_window_of_the_batch():
    model = shared_model("ca")
    small, large = Image(1, 1, 1), Image(4, 4, 2)
    cache = feed(model, [large, 5]).cache
    bytes_of_large = cache_nbytes(cache)["image"]
    feed(model, [small, 5], cache)
    assert cache_nbytes(cache)["image"] * 16 == bytes_of_large
    feed(model, [large, small], cache)
    assert cache_nbytes(cache)["image"] * 16 == bytes_of_large * 17, "the group is kept as a whole"
    feed(model, words(2, 1), cache)
    assert cache_nbytes(cache)["image"] * 16 == bytes_of_large * 17
    # Two rows: the small window costs as many columns as the large one next to it.
    inputs = batch([large, 5], [small, 5])
    cache = model(**inputs).cache
    assert cache_nbytes(cache)["image"] == 2 * bytes_of_large
    inputs = batch([small, 5], words(3, 1))
    cache = model(**{**inputs, "attention_mask": None}, cache=cache).cache
    assert cache_nbytes(cache)["image"] * 8 == bytes_of_large


def test_decoding_adds_text_only():
    model = shared_model("casa")
    cache = feed(model, ROW).cache
    sizes = []
    for token in words(5, 8):
        feed(model, [token], cache)
        sizes.append(cache_nbytes(cache))
    assert len({size["image"] for size in sizes}) == 1
    assert len({later["text"] - earlier["text"] for earlier, later in itertools.pairwise(sizes)}) == 1


# ------------------------------------------------------------------------------------ crop


def empty_cache(model: Any, static: bool) -> Any:
    return StaticCache(config=model.config, max_cache_len=60) if static else DynamicCache()


STATIC = pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])


@STATIC
@pytest.mark.parametrize("removed", [1, 2, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_cropping_within_the_window_equals_never_having_fed_the_tokens(variant, removed, static):
    model = shared_model(variant)
    row: Row = [*words(3, 1), A, *words(4, 2)]
    rest: Row = [*words(2, 9), B, *words(2, 10)]
    cache = feed(model, row, empty_cache(model, static)).cache
    cache.crop(-removed)
    assert int(cache.get_seq_length()) == len(token_ids(row)) - removed
    expected = one_shot(model, [*row[:-removed], *rest])[-6:]
    assert relative_error(feed(model, rest, cache).logits[0], expected) < TOLERANCE


@STATIC
@pytest.mark.parametrize("variant", VARIANTS)
def test_tokens_decoded_one_by_one_can_be_taken_back(variant, static):
    """As assisted decoding does: several at once, a few of them back, over and over."""
    model = shared_model(variant)
    row: Row = [*words(3, 1), A, *words(2, 2)]
    cache = feed(model, row, empty_cache(model, static)).cache
    for turn in range(4):
        feed(model, words(4, 20 + turn), cache)
        cache.crop(-3)
        row = [*row, words(4, 20 + turn)[0]]
        token = words(1, 30 + turn)
        logits = feed(model, token, cache).logits[0]
        row = [*row, *token]
        assert relative_error(logits, one_shot(model, row)[-1:]) < TOLERANCE


@STATIC
def test_cropping_reopens_the_group(static):
    """Once the text after an image is taken back, the next image joins its group again."""
    model = shared_model("casa")
    start: Row = [*words(2, 1), A]
    for removed, before in ((1, [*start, words(2, 2)[0]]), (2, start)):
        cache = feed(model, [*start, *words(2, 2)], empty_cache(model, static)).cache
        for _ in range(removed):
            cache.crop(-1)
        expected = one_shot(model, [*before, B, 5])[-3:]
        assert relative_error(feed(model, [B, 5], cache).logits[0], expected) < TOLERANCE


@STATIC
def test_cropping_gives_positions_back_in_padded_rows(static):
    model = shared_model("casa")
    rows = [[A, *words(4, 2)], [B, *words(2, 4)]]
    cache = model(**batch(*rows, side="right"), cache=empty_cache(model, static)).cache
    cache.crop(-2)
    logits = model(**{**batch([C, 7], [D, 7]), "attention_mask": None}, cache=cache).logits
    for actual, row, more in zip(logits, ([A, *words(4, 2)[:2]], rows[1]), ([C, 7], [D, 7]), strict=True):
        assert relative_error(actual, one_shot(model, [*row, *more])[-3:]) < TOLERANCE


@STATIC
def test_text_before_any_image_can_be_cropped(static):
    model, text = shared_model("casa"), words(6, 1)
    cache = feed(model, text, empty_cache(model, static)).cache
    cache.crop(-4)
    assert relative_error(feed(model, [A, 5], cache).logits[0], one_shot(model, [*text[:2], A, 5])[-3:]) < TOLERANCE
    cache = feed(model, text, empty_cache(model, static)).cache
    untouched = snapshot(cache)
    with pytest.raises(ValueError, match="Can't crop 7 of 6 tokens") as error:
        cache.crop(-7)
    assert "image" not in str(error.value), "there is none"
    assert same(snapshot(cache), untouched)


@STATIC
@pytest.mark.parametrize("variant", VARIANTS)
def test_cropping_past_the_start_of_the_window_raises_and_changes_nothing(variant, static):
    model = shared_model(variant)
    cache = feed(model, [*words(3, 1), A, *words(4, 2)], empty_cache(model, static)).cache
    untouched = snapshot(cache)
    for removed in (5, 6, 9, 99):
        message = f"Can't crop {removed} of 9 tokens.*at most 4 can be removed.*copy of the cache made before"
        with pytest.raises(ValueError, match=message):
            cache.crop(-removed)
        assert same(snapshot(cache), untouched)
    cache.crop(0)
    assert same(snapshot(cache), untouched)
    cache.crop(-4)


@STATIC
@pytest.mark.parametrize("layers", [[1], [0, 1]])
def test_a_length_to_crop_to_is_refused_as_a_whole(layers, static):
    """Only a number of tokens to take back means the same in blocks with and without self-attention."""
    model, row = new_model("casa-replace", casa_layers=layers), [*words(3, 1), A, *words(4, 2)]
    cache = feed(model, row, empty_cache(model, static)).cache
    untouched = snapshot(cache)
    with pytest.raises(ValueError, match=r"crop\(6\) must get the number of tokens to remove as a negative number"):
        cache.crop(6)
    assert same(snapshot(cache), untouched)
    cache.crop(-2)
    assert relative_error(feed(model, [5, 6], cache).logits[0], one_shot(model, [*row[:-2], 5, 6])[-2:]) < TOLERANCE


def quantized_cache(model: Any) -> Any:
    try:
        return QuantizedCache(backend="fp8", config=model.config)
    except ValueError:
        pytest.skip("this version of Transformers has no quantized cache that runs here")


def test_a_custom_layer_keeps_the_text_in_its_own_way():
    class Counting(DynamicLayer):
        def update(self, *args: Any, **kwargs: Any) -> Any:
            updates.append(self)
            return super().update(*args, **kwargs)

    updates: list[Any] = []
    model, row = shared_model("casa"), [*words(3, 1), A, *words(4, 2)]
    for cache in (Cache(layers=[Counting() for _ in range(3)]), Cache(layer_class_to_replicate=Counting)):
        updates.clear()
        feed(model, row, cache)
        logits = feed(model, [5], cache).logits[0, -1]
        assert relative_error(logits, one_shot(model, [*row, 5])[-1]) < TOLERANCE
        assert len(updates) == 2 * 3


def test_a_snapshot_of_a_quantized_cache_stays_as_it_is():
    model, row = shared_model("casa"), [*words(3, 1), A, *words(4, 2)]
    cache = quantized_cache(model)
    feed(model, row, cache)
    snapshot = cache_snapshot(cache)
    expected = feed(model, [5], cache).logits
    feed(model, [6, 7], cache)
    assert snapshot.get_seq_length() == len(token_ids(row))
    assert torch.equal(feed(model, [5], snapshot).logits, expected)


def test_a_cache_of_a_smaller_model_is_refused():
    model, small = new_model("casa"), new_model("casa")
    small.model.language_model.layers = small.model.language_model.layers[:2]
    small.model.language_model.kept_by_blocks = ["text", "text"]
    cache = Cache(layers=[DynamicLayer(), DynamicLayer()])
    feed(small, words(3, 1), cache)
    with pytest.raises(ValueError, match=r"2 layers.*3"):
        feed(model, words(3, 1), cache)


def test_caches_say_whether_they_can_be_cropped():
    """`generate` asks them before it relies on it."""
    model = shared_model("casa")
    for cache, croppable in (
        (lambda: empty_cache(model, True), True),
        (lambda: empty_cache(model, False), True),
        (lambda: quantized_cache(model), False),
    ):
        assert feed(model, [A, 5], cache()).cache.is_croppable == croppable


@pytest.mark.parametrize(
    "kind_of_cache, change",
    [
        ("static", "batch_repeat_interleave"),
        ("static", "batch_select_indices"),
        ("quantized", "crop"),
        ("quantized", "batch_repeat_interleave"),
        ("quantized", "batch_select_indices"),
    ],
)
def test_what_a_cache_cannot_do_is_refused_before_anything_changes(kind_of_cache, change):
    model = shared_model("casa")
    cache = empty_cache(model, True) if kind_of_cache == "static" else quantized_cache(model)
    feed(model, [*words(3, 1), A, *words(4, 2)], cache)
    feed(model, words(1, 1), cache)
    untouched = snapshot(cache)
    argument = {"crop": -2, "batch_repeat_interleave": 2, "batch_select_indices": torch.tensor([0, 0])}[change]
    with pytest.raises((NotImplementedError, AttributeError, ValueError)) as error:
        getattr(cache, change)(argument)
    assert change in str(error.value)
    assert same(snapshot(cache), untouched)


# ------------------------------------------------------------------------------------ rows


ROWS: list[Row] = [[*words(4, 1), A, *words(2, 2)], words(5, 3), [B, C, *words(1, 4)]]
MORE: list[Row] = [[D, *words(2, 6)], [*words(1, 7), A, 9], words(4, 8)]


def continued(model: Any, cache: Any, order: Sequence[int]) -> None:
    """The rows of the cache are `ROWS` in this order; each continues with its part of `MORE`."""
    inputs = batch(*[MORE[row] for row in order])
    inputs.pop("attention_mask")
    for actual, row in zip(model(**inputs, cache=cache).logits, order, strict=True):
        assert relative_error(actual, one_shot(model, [*ROWS[row], *MORE[row]])[-len(actual) :]) < TOLERANCE


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_can_be_reordered_repeated_and_selected(variant):
    model = shared_model(variant)
    changes: list[tuple[Callable[[Any], None], list[int]]] = [
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
        (lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
    ]
    for change, order in changes:
        cache = model(**batch(*ROWS)).cache
        change(cache)
        continued(model, cache, order)


def test_static_rows_can_be_reordered():
    model = shared_model("casa")
    cache = StaticCache(config=model.config, max_cache_len=40)
    model(**batch(*ROWS), cache=cache)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    continued(model, cache, [2, 0, 0])


@pytest.mark.parametrize("variant", MAIN)
@pytest.mark.parametrize("static", [False, True])
def test_a_reset_cache_is_a_new_one(variant, static):
    model = shared_model(variant)
    cache = StaticCache(config=model.config, max_cache_len=60) if static else DynamicCache()
    expected = model(**batch(*ROWS)).logits
    for _ in range(2):
        assert torch.equal(model(**batch(*ROWS), cache=cache).logits, expected)
        continued(model, cache, [0, 1, 2])
        cache.reset()
        assert int(cache.get_seq_length()) == 0
        assert bool(cache_nbytes(cache, allocated=True)["image"]) == static, (
            "a static cache keeps its memory for the next use"
        )
    if not static:
        feed(model, ROWS[0], cache)
        assert int(cache.get_seq_length()) == len(token_ids(ROWS[0])), "another batch size is fine after a reset"


@pytest.mark.parametrize("variant", MAIN)
@pytest.mark.parametrize("fork", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_of_a_cache_forks_the_stream(variant, fork):
    model = shared_model(variant)
    cache = model(**batch(*ROWS)).cache
    if fork == "deepcopy":
        other = copy.deepcopy(cache)
    elif fork == "pickle":
        other = pickle.loads(pickle.dumps(cache))
    else:
        buffer = io.BytesIO()
        torch.save(cache, buffer)
        other = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    model(**{**batch([D, 4], [D, 4], [D, 4]), "attention_mask": None}, cache=cache)
    continued(model, other, [0, 1, 2])


# ------------------------------------------------------------------------------------ caches from elsewhere


def stock_model(model: Any) -> Any:
    """The source model with the same weights."""
    source = Qwen2_5_VLForConditionalGeneration._from_config(source_config()).double().eval()
    source.load_state_dict({k: v for k, v in model.state_dict().items() if "casa_attn" not in k})
    return source


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("static", [False, True])
def test_a_prefix_that_the_source_model_cached_is_continued(static, padding):
    model, prefix = shared_model("casa"), words(6, 7)
    cache = StaticCache(config=model.config, max_cache_len=40) if static else DynamicCache()
    mask = torch.tensor([[0] * padding + [1] * 6])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    ids = torch.tensor([[PAD] * padding + prefix])
    stock_model(model)(ids, attention_mask=mask, position_ids=positions, **{CACHE: cache})
    masks = {"attention_mask": torch.nn.functional.pad(mask, (0, 6), value=1)} if padding else {}
    logits = feed(model, [A, *words(4, 9)], cache, **masks).logits[0]
    expected = one_shot(model, [*prefix, A, *words(4, 9)])
    assert relative_error(logits, expected[-6:]) < TOLERANCE
    logits = feed(model, [B, 5], cache).logits[0]
    assert relative_error(logits, one_shot(model, [*prefix, A, *words(4, 9), B, 5])[-3:]) < TOLERANCE


def test_tokens_that_another_model_added_in_between_are_noticed():
    model = shared_model("casa")
    cache = feed(model, [A, *words(2, 1)]).cache
    stock_model(model)(torch.tensor([words(3, 2)]), **{CACHE: cache})
    with pytest.raises(ValueError, match="another model has extended the cache"):
        feed(model, words(2, 3), cache)


@pytest.mark.parametrize("masks", [None, 1, 17])
def test_another_batch_size_is_refused(masks):
    model = shared_model("casa")
    cache = feed(model, [*words(10, 1), A, *words(4, 2)]).cache
    untouched = snapshot(cache)
    inputs = {} if masks is None else {"attention_mask": torch.ones(2, masks)}
    with pytest.raises(ValueError, match=r"input has 2 rows but the cache holds 1.*batch_repeat_interleave"):
        model(torch.tensor([[5], [6]]), cache=cache, **inputs)
    assert same(snapshot(cache), untouched)


@pytest.mark.parametrize(
    "cache, error, message",
    [
        (((torch.zeros(1), torch.zeros(1)),), TypeError, "The cache is a tuple, which.*pass.*DynamicCache"),
        (
            EncoderDecoderCache(DynamicCache(), DynamicCache()),
            TypeError,
            "EncoderDecoderCache, which.*pass.*StaticCache",
        ),
        (
            Cache(layers=[DynamicSlidingWindowLayer(sliding_window=4) for _ in range(3)]),
            TypeError,
            r"DynamicSlidingWindowLayer; CASA needs full-attention layers.*DynamicCache\(config=model.config\)",
        ),
        (Cache(layers=[DynamicLayer() for _ in range(2)]), (TypeError, ValueError), "2 layers.*3"),
    ],
    ids=["tuple", "encoder-decoder", "sliding", "too few layers"],
)
def test_caches_that_cannot_be_used(cache, error, message):
    with pytest.raises(error, match=message):
        shared_model("casa")(torch.tensor([[5, 6]]), cache=cache)


def test_packed_samples_have_no_cache():
    model = shared_model("casa")
    ids, positions = torch.tensor([words(6, 1)]), torch.tensor([[0, 1, 2, 0, 1, 2]])
    with pytest.raises(ValueError, match=r"position_ids restart.*packed samples.*Leave the cache out"):
        model(ids, position_ids=positions, cache=DynamicCache())
    assert model(ids, position_ids=positions, use_cache=True).cache is None


BAD_CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "too few patches": (
        {"pixel_values": image_inputs([B])["pixel_values"][1:], "image_grid_thw": torch.tensor([B.grid])},
        r"7 patches, but image_grid_thw \[\[1, 2, 4\]\] needs 8",
    ),
    "two images for one placeholder": (image_inputs([A, B]), "1 image placeholder .token 61.; expected 2"),
    "no image": ({"image_grid_thw": torch.tensor([B.grid])}, "image_grid_thw was given without images"),
    "places only": ({"image_positions": torch.tensor([[0, 1]])}, "image_positions was given without images"),
    "short mask": (
        {"attention_mask": torch.ones(1, 3)},
        r"\(1, 3\); expected \(1, 13\) for all.*\(1, 4\) for the new",
    ),
    "wrong positions": ({"position_ids": torch.zeros(3, 3, dtype=torch.long)}, r"position_ids has shape \(3, 3\)"),
    "wrong types": (
        {**image_inputs([B]), "mm_token_type_ids": torch.ones(1, 3)},
        r"mm_token_type_ids has shape \(1, 3\); expected \(1, 4\)",
    ),
    "place outside": (
        {**image_inputs([B]), "image_positions": torch.tensor([[0, 4]])},
        r"image_positions contains \(0, 4\).*1 rows of 4 tokens",
    ),
    "places in another order": (
        {**image_inputs([B, C]), "image_positions": torch.tensor([[0, 3], [0, 1]])},
        "must be in reading order",
    ),
    "places of another shape": (
        {**image_inputs([B]), "image_positions": torch.tensor([0, 1])},
        r"image_positions has shape \(2,\); expected \(1, 2\)",
    ),
    "grid of a clip": (
        {"pixel_values": torch.zeros(16, 96), "image_grid_thw": torch.tensor([[2, 2, 4]])},
        "2 temporal patches; expected 1.*image of its own",
    ),
    "grid of odd size": (
        {"pixel_values": torch.zeros(3, 96), "image_grid_thw": torch.tensor([[1, 1, 3]])},
        r"\[1, 1, 3\] must have.*multiples of spatial_merge_size=2",
    ),
    "grid of another shape": (
        {"pixel_values": torch.zeros(8, 96), "image_grid_thw": torch.tensor([1, 2, 4])},
        r"image_grid_thw has shape \(3,\); expected \(num_images, 3\)",
    ),
    "no grid": ({"pixel_values": torch.zeros(8, 96)}, "without image_grid_thw"),
    "pixels and features": (
        {**image_inputs([B]), "image_embeds": torch.zeros(2, 64)},
        "pixel_values and image_embeds were both given",
    ),
    "features of another size": (
        {"image_embeds": torch.zeros(3, 64), "image_grid_thw": torch.tensor([B.grid])},
        r"image_embeds has shape \(3, 64\).*needs \(2, 64\).*get_image_features",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_are_named_and_leave_the_cache_as_it_was(case):
    model = shared_model("casa")
    cache = feed(model, [*words(3, 1), A, *words(4, 2)]).cache
    untouched = snapshot(cache)
    inputs, message = BAD_CALLS[case]
    with pytest.raises(ValueError, match=message):
        model(torch.tensor([token_ids([B, *words(2, 3)])]), cache=cache, **inputs)
    assert same(snapshot(cache), untouched)


def test_either_ids_or_embeddings():
    model = shared_model("casa")
    for inputs in ({}, {"input_ids": torch.tensor([[5]]), "inputs_embeds": torch.zeros(1, 1, 64)}):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            model(**inputs)
    with pytest.raises(ValueError, match=r"images beside inputs_embeds.*0 such rows; expected 1, .*image_positions"):
        model(inputs_embeds=torch.zeros(1, 2, 64).double(), **image_inputs([B]))


def test_images_may_not_stand_in_padding():
    model = shared_model("casa")
    inputs = batch([A, *words(3, 1)], [B])
    for places in ([[0, 1], [1, 1]], [[0, 1], [2, 1]]):
        with pytest.raises(ValueError, match=r"image_positions contains \([12], 1\), which is not a text token"):
            model(**inputs, image_positions=torch.tensor(places))


def test_batches_without_images_may_carry_empty_image_tensors():
    """What a collator makes of a text-only batch."""
    model, ids = shared_model("casa"), torch.tensor([words(4, 1)])
    empty = {"pixel_values": torch.zeros(0, 96).double(), "image_grid_thw": torch.zeros(0, 3, dtype=torch.long)}
    assert torch.equal(model(ids, **empty).logits, model(ids).logits)


def test_integers_of_any_width_place_images():
    model, inputs = shared_model("casa"), batch([*words(2, 1), A, 5])
    expected = model(**inputs).logits
    narrow = {name: inputs[name].int() for name in ("input_ids", "attention_mask", "image_grid_thw")}
    places = torch.tensor([[0, 3]], dtype=torch.int32)
    assert torch.equal(model(**{**inputs, **narrow}).logits, expected)
    assert torch.equal(model(**{**inputs, **narrow}, image_positions=places).logits, expected)


def test_packed_positions_may_be_shared_by_rows():
    model = shared_model("casa")
    ids = torch.tensor([token_ids([A, 5, B, 6]), token_ids([C, 7, D, 8])])
    images, positions = image_inputs([A, B, C, D]), torch.tensor([[0, 1, 2, 0, 1, 2]])
    shared = model(ids, position_ids=positions, **images).logits
    assert torch.equal(shared, model(ids, position_ids=positions.expand(2, -1), **images).logits)
    assert relative_error(shared[1, 3:], one_shot(model, [D, 8])) < TOLERANCE


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_row_that_is_added_sees_nothing_of_what_was_before_it(variant):
    """Nobody passes a mask: the first row never had padding, all that the second one has is padding."""
    model = new_model(variant)
    ids, more = torch.randint(5, 50, (1, 9)), torch.randint(5, 50, (2, 4))
    cache = DynamicCache(config=model.config)
    model(ids, cache=cache)
    for layer in cache.layers:
        layer.append_empty_rows(1)
    together = model(more, cache=cache).logits
    assert relative_error(together[1], model(more[1:]).logits[0]) < TOLERANCE
    assert relative_error(together[0], model(torch.cat([ids, more[:1]], dim=1)).logits[0, -4:]) < TOLERANCE
