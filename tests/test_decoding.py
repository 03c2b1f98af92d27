# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""A decoding step reads what is stored, without a copy; caches never write into memory that another one holds."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

from casa_hf.cache_casa import cache_nbytes
from tests.helpers_generation import Image, batch, greedy, new_model, one_shot, relative_error, shared_model, words
from tests.ledger import Ledger

VARIANTS = ("casa", "ca", "casa-shared", "ca-shared", "exact", "casa-before", "casa-replace")
OWN_TEXT = ("casa", "casa-before", "casa-replace")
TOLERANCE = 1e-6
A, B, C = Image(2, 3, 1), Image(1, 2, 2), Image(3, 1, 3)
LARGE = Image(16, 32, 4)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def new_cache(model: Any, static: bool) -> Any:
    return StaticCache(config=model.config, max_cache_len=40) if static else DynamicCache()


def step(model: Any, cache: Any, *tokens: int) -> torch.Tensor:
    """(rows, vocabulary) logits after one more token in every row."""
    return model(input_ids=torch.tensor(tokens)[:, None], cache=cache).logits[:, -1]


def images_in(cache: Any) -> list[torch.Tensor]:
    return [t for layer in cache.layers for name, kv in layer.fusion.items() if name != "window" for t in kv]


def places(tensors: list[torch.Tensor]) -> list[tuple[int, int, tuple[int, ...]]]:
    return [(t.untyped_storage().data_ptr(), t.storage_offset(), tuple(t.shape)) for t in tensors]


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("variant", ["casa", "ca", "casa-shared", "ca-shared"])
def test_a_gated_step_of_rows_with_and_without_images(variant: str, static: bool) -> None:
    """A row that sees nothing gets nothing through an open gate."""
    model = new_model(variant, casa_gate="tanh")
    rows: list[Any] = [[*words(3, 1), A, *words(2, 2)], words(7, 3), [B, 5]]
    cache = new_cache(model, static)
    model(**batch(*rows), cache=cache)
    for tokens in ((7, 8, 9), (11, 12, 13)):
        logits = step(model, cache, *tokens)
        rows = [[*row, token] for row, token in zip(rows, tokens, strict=True)]
        for row, actual in zip(rows, logits, strict=True):
            assert relative_error(actual, one_shot(model, row)[-1]) < TOLERANCE


# ------------------------------------------------------------------------------------ what a step costs


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_neither_copies_nor_recomputes_images(variant: str, rows: int, static: bool) -> None:
    model = new_model(variant, casa_static_image_tokens=512)
    cache = new_cache(model, static)
    # In the second row a smaller image, so that its columns are padded.
    model(**batch(*[[*words(3, 1), LARGE, 5], [A, *words(2, 2)]][:rows]), cache=cache)
    before = places(images_in(cache))
    one_image = images_in(cache)[0].numel()
    assert one_image >= rows * 512 * 2 * 16
    projected: list[int] = []

    def watch(module: Any, args: Any) -> None:
        projected.append(args[0].shape[:-1].numel())

    for layer in model.model.language_model.layers:
        if hasattr(layer.casa_attn, "image_norm"):
            layer.casa_attn.image_norm.register_forward_pre_hook(lambda *_: pytest.fail("images are normalised again"))
        for module in (layer.self_attn, layer.casa_attn):
            for name in ("k_proj", "v_proj"):
                if hasattr(module, name):
                    getattr(module, name).register_forward_pre_hook(watch)
    for token in (7, 8, 9):
        with Ledger() as ledger:
            step(model, cache, *[token] * rows)
        # Scores of all heads over all columns are the largest, a fraction of the keys.
        assert ledger.largest < one_image / 2, ledger.largest_operator
        assert places(images_in(cache)) == before
    assert projected and set(projected) == {rows}


@pytest.mark.parametrize("rows", [1, 2])
def test_a_step_that_copied_images_would_be_noticed(rows: int) -> None:
    """The plain backend joins images and text in every step."""
    model = new_model("casa", attn_implementation="eager", dtype=torch.float32)
    cache = DynamicCache()
    inputs = batch(*[[3, LARGE, 5]] * rows)
    model(**{**inputs, "pixel_values": inputs["pixel_values"].float()}, cache=cache)
    with Ledger() as ledger:
        step(model, cache, *[7] * rows)
    assert ledger.largest >= images_in(cache)[0].numel()


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_text_is_stored_once_unless_the_fusion_layer_has_keys_of_its_own(variant: str, static: bool) -> None:
    model = shared_model(variant)
    cache = new_cache(model, static)
    model(**batch([LARGE, *words(9, 1)]), cache=cache)
    step(model, cache, 5)
    fused = model.config.fusion_layers
    with_text = 3 - len(fused) if variant == "casa-replace" else 3
    slot_bytes = 2 * 2 * 16 * 8  # keys and values, heads, width, float64
    # The first mark stands before the window.
    of_text, of_windows = (40, 40) if static else (12, 11)
    own = of_windows * len(fused) if variant in OWN_TEXT else 0
    assert cache_nbytes(cache, allocated=True)["text"] == slot_bytes * (of_text * with_text + own)
    for index, layer in enumerate(cache.layers):
        assert ("window" in layer.fusion) == (variant in OWN_TEXT and index in fused)
        # Nor is an image stored twice.
        assert set(layer.fusion) - {"window"} <= {"image"}


def test_text_does_not_move_from_step_to_step() -> None:
    """But for the few times that memory runs out."""
    model, cache = shared_model("casa"), DynamicCache()
    model(**batch([A, *words(3, 1)]), cache=cache)
    found = []
    for token in words(100, 2):
        step(model, cache, token)
        layer = cache.layers[0]
        found.append(tuple(t.data_ptr() for t in (layer.keys, layer.values, *layer.fusion["window"])))
    assert len(set(found)) <= 3


# ------------------------------------------------------------------------------------ memory that caches share


def crop_and_continue(model: Any, cache: Any) -> Any:
    fork = copy.deepcopy(cache)
    fork.crop(-2)
    step(model, fork, 11)
    step(model, fork, 12)
    return fork


def copy_of_the_layers(model: Any, cache: Any) -> Any:
    """A second cache that starts with the very tensors of the first."""
    fork = DynamicCache()
    fork.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in fork.layers:
        layer.fusion = dict(layer.fusion)
    return fork


FORKS: dict[str, Callable[[Any, Any], Any]] = {
    "deepcopy": lambda model, cache: copy.deepcopy(cache),
    "layers": copy_of_the_layers,
    "cropped": crop_and_continue,
}


@pytest.mark.parametrize("fork", FORKS)
@pytest.mark.parametrize("variant", ["casa", "casa-shared", "exact"])
def test_forked_caches_go_their_own_ways(variant: str, fork: str) -> None:
    """Two caches with one past, extended in turns by different tokens."""
    model = shared_model(variant)
    cache, row = DynamicCache(), [*words(3, 1), A, *words(4, 2)]
    model(**batch(row), cache=cache)
    step(model, cache, 7)  # from here on there is room behind the text
    step(model, cache, 8)
    other = FORKS[fork](model, cache)
    rows = [[*row, 7, 8], [*row, *((11, 12) if fork == "cropped" else (7, 8))]]
    for first, second in ((21, 31), (22, 32), (23, 33)):
        for one, past, token in ((cache, rows[0], first), (other, rows[1], second)):
            past.append(token)
            assert relative_error(step(model, one, token)[0], one_shot(model, past)[-1]) < TOLERANCE


@pytest.mark.parametrize("variant", ["casa", "exact"])
def test_what_somebody_holds_is_never_overwritten(variant: str) -> None:
    """Views of the keys, taken before a crop, keep their values."""
    model, cache = shared_model(variant), DynamicCache()
    model(**batch([A, *words(4, 2)]), cache=cache)
    for token in (7, 8, 9):
        step(model, cache, token)
    held = [t for layer in cache.layers for kv in ((layer.keys, layer.values), *layer.fusion.values()) for t in kv]
    values = [tensor.clone() for tensor in held]
    cache.crop(-2)
    for token in (31, 32, 33, 34):
        logits = step(model, cache, token)
    assert all(torch.equal(tensor, value) for tensor, value in zip(held, values, strict=True))
    assert relative_error(logits[0], one_shot(model, [A, *words(4, 2), 7, 31, 32, 33, 34])[-1]) < TOLERANCE


@pytest.mark.parametrize("change", ["reorder_cache", "batch_select_indices", "batch_repeat_interleave", "reset"])
@pytest.mark.parametrize("variant", ["casa", "casa-shared", "exact"])
def test_changed_rows_have_memory_of_their_own(variant: str, change: str) -> None:
    """A copy that is taken before rows change goes on unharmed, and so does the changed cache."""
    model, cache = shared_model(variant), DynamicCache()
    rows = [[*words(3, 1), A, *words(4, 2)], [B, *words(2, 3)]]
    model(**batch(*rows), cache=cache)
    step(model, cache, 7, 8)
    rows = [[*rows[0], 7], [*rows[1], 8]]
    other = copy_of_the_layers(model, cache)
    if change == "reset":
        cache.reset()
        changed = [[C, 4], [C, 4]]
        model(**batch(*changed), cache=cache)
    elif change == "batch_repeat_interleave":
        cache.batch_repeat_interleave(2)
        changed = [rows[0], rows[0], rows[1], rows[1]]
    else:
        getattr(cache, change)(torch.tensor([1, 1]))
        changed = [rows[1], rows[1]]
    for token in (21, 22):
        for one, past in ((cache, changed), (other, rows)):
            tokens = [token + number for number in range(len(past))]
            logits = step(model, one, *tokens)
            past[:] = [[*row, new] for row, new in zip(past, tokens, strict=True)]
            for actual, row in zip(logits, past, strict=True):
                assert relative_error(actual, one_shot(model, row)[-1]) < TOLERANCE


@pytest.mark.parametrize("variant", ["casa", "casa-shared", "exact"])
def test_from_inference_mode_to_no_grad_and_back(variant: str) -> None:
    """Tensors made in inference mode can't be changed outside of it; text that is appended there must go elsewhere."""
    model, cache = shared_model(variant), DynamicCache()
    row = [A, *words(4, 2)]
    with torch.inference_mode():
        model(**batch(row), cache=cache)
        step(model, cache, 7)
    step(model, cache, 8)
    with torch.inference_mode():
        step(model, cache, 9)
    logits = step(model, cache, 10)
    assert relative_error(logits[0], one_shot(model, [*row, 7, 8, 9, 10])[-1]) < TOLERANCE


@pytest.mark.parametrize(
    "variant, trained",
    [
        *((variant, part) for variant in ("casa", "casa-shared", "exact", "ca") for part in ("", "q_proj")),
        *((variant, "casa_attn.q_proj") for variant in ("casa", "ca")),
    ],
)
def test_gradients_through_several_calls_on_one_cache(variant: str, trained: str) -> None:
    """Keys that nothing trains are still read in the backward pass, so later calls must not write behind them."""
    model = new_model(variant)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name)
    row = [A, *words(4, 2)]
    tokens = [7, 8, 9]

    def gradients(logits: torch.Tensor) -> list[torch.Tensor]:
        model.zero_grad()
        logits.logsumexp(-1).sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    cache = DynamicCache()
    model(**batch(row), cache=cache)
    step(model, cache, tokens[0])
    with torch.enable_grad():
        actual = gradients(torch.cat([step(model, cache, token) for token in tokens[1:]]))
    fresh = DynamicCache()
    model(**batch([*row, tokens[0]]), cache=fresh)
    with torch.enable_grad():
        expected = gradients(model(input_ids=torch.tensor([tokens[1:]]), cache=fresh).logits[0])
    assert len(actual) == len(expected) > 0
    largest = max(float(gradient.abs().max()) for gradient in expected)
    for one, other in zip(actual, expected, strict=True):
        assert (one - other).abs().max() < TOLERANCE * largest


def test_lookup_decoding_crops_and_continues() -> None:
    """Rejected proposals are cropped and overwritten again and again; the tokens stay those of greedy decoding."""
    model = shared_model("casa")
    row = [A, *words(3, 1) * 4, B, *words(3, 1) * 2]
    tokens = model.generate(**batch(row), max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3)
    assert tokens[0, -12:].tolist() == greedy(model, row, 12)
