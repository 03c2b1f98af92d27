# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""What can be done with static caches beside decoding: saved and restored, copied, taken back to an earlier moment,
and their rows chosen; all in place, and with the same tokens as a growing cache."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import DynamicCache, StaticCache

from casa_hf.cache_casa import CacheMoment, cache_nbytes, cache_snapshot, cache_state, restore_cache, select_rows
from tests.helpers_generation import Image, Row, batch, new_model, one_shot, relative_error, words
from tests.tiny import GISTS

VARIANTS = ("casa", "ca", "casa-shared", "ca-shared", "exact", "insertion", "casa-before", "casa-replace", "casa-ffn")
TOLERANCE = 1e-6
A, B, C, D = Image(2, 3, 1), Image(1, 2, 2), Image(3, 1, 3), Image(2, 2, 4)
ROOM = 60


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def static(model: Any, rows: int = 1, columns: int = 8) -> StaticCache:
    return model.model.language_model.static_cache(ROOM, columns, rows)


def plain(model: Any, rows: int = 1) -> StaticCache:
    return StaticCache(config=model.config, max_cache_len=ROOM)


def growing(model: Any, rows: int = 1) -> DynamicCache:
    return DynamicCache(config=model.config)


KINDS: dict[str, Callable[..., Any]] = {"growing": growing, "static": static, "plain": plain}


def run(model: Any, cache: Any, *rows: Row) -> torch.Tensor:
    inputs = batch(*rows)
    if len({len(row) for row in inputs["attention_mask"].tolist()}) == 1 and bool(inputs["attention_mask"].all()):
        del inputs["attention_mask"]
    return model(**inputs, cache=cache).logits


def check(model: Any, cache: Any, *pasts: Row) -> None:
    """The rows of the cache hold these pasts: each continues as it would alone, through text, an image, and text."""
    rows = [list(past) for past in pasts]
    for new in ([7, 8], [9], [D, 5], [6], [4]):
        logits = run(model, cache, *([new] * len(rows)))
        for number, row in enumerate(rows):
            row += new
            expected = one_shot(model, row)[-logits.shape[1] :]
            assert relative_error(logits[number], expected) < TOLERANCE, (new, number)


def saved(model: Any, cache: Any) -> dict[str, Any]:
    return cache_state(cache, model.model.language_model.window_rules)


def restored(model: Any, state: dict[str, Any], make: Callable[..., Any]) -> Any:
    cache = make(model)
    kept = model.model.language_model.kept_by_blocks
    restore_cache(cache, state, [torch.device("cpu")] * len(kept), kept)
    return cache


def addresses(cache: Any) -> list[int]:
    found = []
    for layer in cache.layers:
        tensors = [layer.keys, layer.values, *(t for stored in layer.fusion.values() for t in stored)]
        if layer.window_state is not None:
            tensors += [value for value in vars(layer.window_state).values() if isinstance(value, torch.Tensor)]
        found += [tensor.data_ptr() for tensor in tensors if tensor is not None]
    return found


PASTS: list[Row] = [
    [*words(3, 1), A, *words(4, 2), B, *words(3, 3)],
    words(6, 4),
    [*words(2, 5), Image(3, 4, 6), 5],
]


# ------------------------------------------------------------------------------------ before the first image


@pytest.mark.parametrize("updates", ["none", "full"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_room_for_images_changes_nothing(variant: str, updates: str) -> None:
    """Room is there before the first image; an image that is larger than that gets more."""
    if updates == "full" and variant in ("insertion", "casa-replace", "casa-ffn"):
        pytest.skip("says how it updates image states")
    more = {"casa_image_updates": updates} if updates == "full" else {}
    model = new_model(variant, **more)
    cache = static(model)
    first = run(model, cache, PASTS[1])
    assert relative_error(first[0], one_shot(model, PASTS[1])) < TOLERANCE
    check(model, cache, PASTS[1])
    cache, row = static(model), [*PASTS[1], Image(3, 4, 6), 5]
    assert relative_error(run(model, cache, row)[0], one_shot(model, row)) < TOLERANCE
    check(model, cache, row)


@pytest.mark.parametrize("history", ["group", "all"])
def test_room_for_images_with_other_histories(history: str) -> None:
    model = new_model("casa", casa_image_history=history, casa_video_history=history)
    for past in PASTS:
        cache = static(model)
        run(model, cache, past)
        check(model, cache, past)


@pytest.mark.parametrize("variant", ["casa", "ca-shared", "exact"])
def test_one_graph_from_the_first_text_on(variant: str, fresh_compiler: None) -> None:
    """Before the first image, after it, after a larger one, in another cache, and after a reset."""
    model = new_model(variant, dtype=torch.float32)
    step = torch.compile(model, fullgraph=True, backend="eager")
    for cache in (static(model), static(model)):
        past: Row = []
        for turn in (words(4, 1), [A, 5], [Image(2, 4, 3), 6], [7, 8], [B, 9]):
            run(model, cache, turn)
            past = [*past, *turn]
            for token in (11, 12):
                past = [*past, token]
                logits = step(input_ids=torch.tensor([[token]]), cache=cache).logits[0]
                assert relative_error(logits, one_shot(model, past)[-1:]) < 1e-4
            assert counters["stats"]["unique_graphs"] == 1
    cache.reset()
    run(model, cache, words(4, 1))
    step(input_ids=torch.tensor([[11]]), cache=cache)
    assert counters["stats"]["unique_graphs"] == 1


# ------------------------------------------------------------------------------------ saved and restored


@pytest.mark.parametrize("target", KINDS)
@pytest.mark.parametrize("kind", ["static", "plain"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_state_is_restored_by_either_kind(variant: str, kind: str, target: str) -> None:
    model = new_model(variant)
    for past in PASTS:
        cache = KINDS[kind](model)
        run(model, cache, past)
        run(model, cache, [3])
        state = saved(model, cache)
        before = copy.deepcopy(state)
        other = restored(model, state, KINDS[target])
        check(model, other, [*past, 3])
        assert str(state) == str(before), "what was saved shares nothing with a cache"
        check(model, cache, [*past, 3])


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_growing_state_is_restored_by_a_static_cache(variant: str) -> None:
    model = new_model(variant)
    for past in PASTS:
        cache = growing(model)
        run(model, cache, past)
        run(model, cache, [3])
        for target in ("static", "plain"):
            check(model, restored(model, saved(model, cache), KINDS[target]), [*past, 3])


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_static_state_is_that_of_a_growing_cache(variant: str) -> None:
    """Number for number, with nothing of the room behind it."""
    model = new_model(variant)
    for past in PASTS:
        states = []
        for make in (growing, static):
            cache = make(model)
            run(model, cache, past)
            run(model, cache, [3])
            states.append(saved(model, cache))
        expected, actual = states
        windows = {name: value for name, value in expected["windows"].items()}
        for name, value in actual["windows"].items():
            same = torch.equal(value, windows[name]) if isinstance(value, torch.Tensor) else value == windows[name]
            assert same, (name, value, windows[name])
        for own, other in zip(actual["layers"], expected["layers"], strict=True):
            assert own["fusion"].keys() == other["fusion"].keys()
            parts = [own["text"], *(own["fusion"][name] for name in own["fusion"])]
            others = [other["text"], *(other["fusion"][name] for name in own["fusion"])]
            for part, like in zip(parts, others, strict=True):
                for tensor, reference in zip(part, like, strict=True):
                    assert relative_error(tensor, reference) < TOLERANCE if reference.numel() else not tensor.numel()


def test_several_rows_are_saved_with_their_padding() -> None:
    model = new_model("casa")
    cache = static(model, 3)
    run(model, cache, *PASTS)
    for target in KINDS:
        other = restored(model, saved(model, cache), lambda m, target=target: KINDS[target](m, 3))
        check(model, other, *PASTS)


def test_a_state_without_room_for_it_is_refused() -> None:
    model = new_model("casa")
    cache = growing(model)
    run(model, cache, words(ROOM + 1, 1))
    with pytest.raises(ValueError, match=r"room for 60 tokens.*has 61"):
        restored(model, saved(model, cache), static)
    with pytest.raises(ValueError, match="rules"):
        cache_state(run_static(model))


def run_static(model: Any) -> Any:
    cache = static(model)
    run(model, cache, PASTS[0])
    return cache


def test_bytes_are_those_of_the_content() -> None:
    model = new_model("casa")
    for past in PASTS:
        caches = [make(model) for make in (growing, static)]
        for cache in caches:
            run(model, cache, past)
        if past is not PASTS[1]:  # before the first image, a static cache may count text of windows
            assert cache_nbytes(caches[1]) == cache_nbytes(caches[0])
        assert cache_nbytes(caches[1])["image"] == cache_nbytes(caches[0])["image"]
        allocated = cache_nbytes(caches[1], allocated=True)
        length = int(caches[1].get_seq_length())
        of_token = sum(t.nbytes for layer in caches[1].layers for t in (layer.keys, layer.values)) // ROOM
        assert allocated["text"] >= of_token * ROOM > of_token * length
        assert cache_nbytes(caches[0], allocated=True) == cache_nbytes(caches[0])


# ------------------------------------------------------------------------------------ copies and moments


@pytest.mark.parametrize("copied", [copy.deepcopy, cache_snapshot])
@pytest.mark.parametrize("variant", ["casa", "casa-shared", "exact", "casa-replace"])
def test_copies_go_their_own_way(variant: str, copied: Callable[[Any], Any]) -> None:
    model = new_model(variant)
    cache = run_static(model)
    other = copied(cache)
    run(model, cache, [B, *words(5, 9)])
    check(model, other, PASTS[0])
    check(model, cache, [*PASTS[0], B, *words(5, 9)])


def failing(model: Any, at: int) -> Any:
    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    return model.model.language_model.layers[at].register_forward_hook(fail)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_failed_forward_leaves_nothing_behind(variant: str, kind: str) -> None:
    """In the first forward and in later ones, with an image, without, and with a larger one than there is room for."""
    model = new_model(variant)
    cache, past = KINDS[kind](model), []
    for turn in (PASTS[0], [7], [C, 5], [Image(4, 4, 8), 6], [8], words(3, 3)):
        for at in (0, 1):
            moment = CacheMoment(cache)
            handle = failing(model, at)
            with pytest.raises(RuntimeError, match="out of memory"):
                run(model, cache, turn)
            handle.remove()
            moment.restore()
        if past:
            check(model, copy.deepcopy(cache), past)
        past = [*past, *turn]
        logits = run(model, cache, turn)[0]
        assert relative_error(logits, one_shot(model, past)[-len(logits) :]) < TOLERANCE
    check(model, cache, past)


def test_a_moment_may_be_returned_to_twice_and_keeps_addresses() -> None:
    model = new_model("casa")
    cache = run_static(model)
    before = addresses(cache)
    moment = CacheMoment(cache)
    for turn in ([B, *words(3, 3)], [7, 8]):
        run(model, cache, turn)
        moment.restore()
        assert addresses(cache) == before
    moment = CacheMoment(cache, images=False)
    run(model, cache, [7, 8])
    moment.restore()
    check(model, cache, PASTS[0])


# ------------------------------------------------------------------------------------ rows


@pytest.mark.parametrize(
    "rows", [[0, 1, 2], [2, 0, 0], [1], [2, 1, 0, 0], [0, None, 2], [None, 1], [None, 0, None, 2]]
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", ["casa", "ca-shared", "exact", "casa-replace"])
def test_rows_are_chosen(variant: str, kind: str, rows: Sequence[int | None]) -> None:
    model = new_model(variant)
    cache = KINDS[kind](model, 3)
    run(model, cache, *PASTS)
    before = addresses(cache)
    select_rows(cache, rows)
    if kind != "growing" and len(rows) == 3:
        assert addresses(cache) == before
    check(model, cache, *([] if row is None else PASTS[row] for row in rows))


def test_rows_that_are_not_there_are_refused() -> None:
    model = new_model("casa")
    cache = run_static(model)
    for rows in ([1], [-1], []):
        with pytest.raises(ValueError, match="1 rows that the cache holds"):
            select_rows(cache, rows)
    check(model, cache, PASTS[0])


def test_rows_join_and_leave_in_the_same_graph(fresh_compiler: None) -> None:
    model = new_model("casa", dtype=torch.float32, num_gist_tokens=2, gist_token_ids=GISTS)
    step = torch.compile(model, fullgraph=True, backend="eager")
    cache, rows = static(model, 3), [list(row) for row in PASTS]
    run(model, cache, *rows)
    for change in ([0, 1, 2], [0, None, 2], [2, 1, 0], [0, 1, 0]):
        select_rows(cache, change)
        rows = [[] if number is None else list(rows[number]) for number in change]
        for token in (7, 8):
            logits = step(input_ids=torch.full((3, 1), token), cache=cache).logits
            for number, row in enumerate(rows):
                row.append(token)
                assert relative_error(logits[number], one_shot(model, row)[-1:]) < 1e-4
    assert counters["stats"]["unique_graphs"] == 1
