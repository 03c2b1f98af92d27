# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The recurrent state of linear attention in prepared caches, held against Transformers' own model and cache.

The stock Qwen3.5 text model runs here; CASA models with linear blocks have their own tests.
"""

from __future__ import annotations

import contextlib
import copy
from functools import cache
from typing import Any

import pytest
import torch
from transformers import DynamicCache, Qwen3_5ForCausalLM, Qwen3_5TextConfig, StaticCache
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    QuantizedCache,
)

from casa_hf import cache_nbytes
from casa_hf.cache_casa import cache_snapshot, cache_state, home_layer, prepare_cache, restore_cache, select_rows
from casa_hf.transformers_versions import CACHE
from casa_hf.window_state import WindowState
from tests.helpers_generation import relative_error, words
from tests.tiny import ROPE, TEXT, random_tensor

KEPT = ["recurrent", "text", "recurrent", "text"]
# The delta rule computes in float32, one token in another order than several. A wrong state is off by 1e-2.
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@cache
def model() -> Any:
    config = Qwen3_5TextConfig(
        **{**TEXT, "num_hidden_layers": 4, "head_dim": 24},
        layer_types=["linear_attention" if kept == "recurrent" else "full_attention" for kept in KEPT],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=8,
        rope_parameters={**ROPE, "mrope_section": [1, 1, 1], "mrope_interleaved": True, "partial_rotary_factor": 0.25},
    )
    made = Qwen3_5ForCausalLM._from_config(config, attn_implementation="sdpa")
    for name, parameter in made.named_parameters():
        parameter.copy_(random_tensor(name, tuple(parameter.shape)))
    return made.double().eval()


def run(ids: Any, cache: Any) -> torch.Tensor:
    """(rows, tokens, vocabulary) logits."""
    return model()(input_ids=torch.tensor(ids), use_cache=True, **{CACHE: cache}).logits


def prepared(held: Any = None) -> Any:
    held = DynamicCache(config=model().config) if held is None else held
    prepare_cache(held, KEPT)
    return held


def static() -> Any:
    return StaticCache(config=model().config, max_cache_len=24)


def states(cache: Any) -> list[torch.Tensor]:
    layers = [layer for layer in cache.layers if isinstance(layer, LinearAttentionLayer)]
    assert len(layers) == KEPT.count("recurrent")
    return [layer.conv_states[0] for layer in layers] + [layer.recurrent_states[0] for layer in layers]


ROWS = [words(9, 1), words(9, 2), words(9, 3)]
NEXT = [words(3, seed) for seed in range(4, 10)]


def check(cache: Any, rows: list[int]) -> None:
    """The rows of the cache continue these of `ROWS`, one token at a time and several in one call."""
    for sizes in ((3,), (1, 1, 1)):
        trial, start = copy.deepcopy(cache), 0
        for size in sizes:
            given = [NEXT[place][start : start + size] for place in range(len(rows))]
            logits = run(given, trial)
            for place, row in enumerate(rows):
                whole = [*ROWS[row], *NEXT[place][: start + size]]
                expected = run([whole], None)[0, -size:]
                assert relative_error(logits[place], expected) < TOLERANCE
            start += size


# ---------------------------------------------------------------- what the layers hold


@pytest.mark.parametrize("sizes", [(9, 1, 1), (2, 7, 1), (1, 1, 4), (1, 3, 1, 1)], ids=str)
@pytest.mark.parametrize("make", [lambda: DynamicCache(config=model().config), static], ids=["growing", "static"])
def test_prepared_caches_give_bit_for_bit_what_stock_ones_give(make, sizes):
    stock, own = make(), prepared(make())
    start = 0
    for size in sizes:
        ids = [[*row, *following][start : start + size] for row, following in zip(ROWS, NEXT[:3], strict=True)]
        assert torch.equal(run(ids, own), run(ids, stock))
        start += size
    assert all(map(torch.equal, states(own), states(stock)))


def test_a_cache_that_the_stock_model_has_filled_is_taken_over():
    for held in (DynamicCache(config=model().config), static()):
        run(ROWS, held)
        check(prepared(held), [0, 1, 2])


def test_layers_of_a_cache_made_without_a_configuration_become_what_their_blocks_need():
    caches = [DynamicCache(), DynamicCache(config=model().config)]
    with contextlib.suppress(ValueError):  # in versions without one that runs here
        caches.append(QuantizedCache(backend="fp8", config=model().config))
    expected = run(ROWS, None)
    for held in caches[:2]:
        assert torch.equal(run(ROWS, prepared(held)), expected)
        assert held.get_seq_length() == 9 and home_layer(held) is held.layers[1]
        check(held, [0, 1, 2])
    for held in caches[2:]:
        run(ROWS, prepared(held))
        assert [state.dtype for state in states(held)] == [torch.float64] * 2 + [torch.float32] * 2


@pytest.mark.parametrize(
    "layer, message",
    [
        (lambda: DynamicSlidingWindowLayer(sliding_window=4), "DynamicSlidingWindowLayer; CASA needs full-attention"),
        (LinearAttentionLayer, "LinearAttentionLayer; CASA needs full-attention"),
    ],
    ids=["sliding", "linear"],
)
def test_what_a_block_of_attention_cannot_use_is_refused(layer, message):
    held = DynamicCache(config=model().config)
    held.layers[1] = layer()
    with pytest.raises(TypeError, match=message):
        prepare_cache(held, KEPT)


def test_keys_of_another_model_in_a_linear_block_are_refused():
    held = DynamicCache(config=model().config)
    held.layers[2] = DynamicLayer()
    held.layers[2].update(*torch.ones(2, 1, 2, 3, 24))
    with pytest.raises(
        TypeError, match="filled DynamicLayer where the model has linear attention: another model, or a"
    ):
        prepare_cache(held, KEPT)


# ---------------------------------------------------------------- verbs


@pytest.mark.parametrize(
    "change, rows",
    [
        (lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda cache: cache.reorder_cache(torch.tensor([1, 1, 0])), [1, 1, 0]),
    ],
    ids=["select", "repeat", "reorder"],
)
def test_rows_go_where_their_text_goes(change, rows):
    held = prepared()
    run(ROWS, held)
    untouched = [cache_snapshot(held), copy.deepcopy(held)]
    change(held)
    check(held, rows)
    for other in untouched:
        check(other, [0, 1, 2])


def test_static_rows_are_reordered_where_they_are():
    held = prepared(static())
    run(ROWS, held)
    addresses = [state.data_ptr() for state in states(held)]
    held.reorder_cache(torch.tensor([1, 1, 0]))
    check(held, [1, 1, 0])
    held.reset()
    assert torch.equal(run(ROWS, held), run(ROWS, static()))
    check(held, [0, 1, 2])
    assert [state.data_ptr() for state in states(held)] == addresses


def test_a_reset_cache_takes_other_rows():
    held = prepared()
    run(ROWS, held)
    held.reset()
    assert cache_nbytes(held) == {"text": 0, "image": 0, "recurrent": 0}
    assert torch.equal(run(ROWS[:1], held), run(ROWS[:1], None))


def test_a_snapshot_stays_as_it_is():
    held = prepared()
    run(ROWS, held)
    first = cache_snapshot(held)
    second = cache_snapshot(first)
    expected = [state.clone() for state in states(held)]
    run([[5], [6], [7]], held)  # writes into the state of the convolution
    run([[8], [9], [10]], second)
    assert all(map(torch.equal, states(first), expected))
    assert not any(map(torch.equal, states(held), states(second)))
    check(first, [0, 1, 2])


@pytest.mark.parametrize("tokens", [1, 2])
def test_an_empty_row_joins_and_begins_from_scratch(tokens):
    """Its text begins while the others continue; what pads it meanwhile isn't looked at in full attention."""
    held = prepared()
    run(ROWS[:2], held)
    for layer in held.layers:
        layer.append_empty_rows(1)
    new = NEXT[2][:tokens]
    past = torch.tensor([[1] * 9, [1] * 9, [0] * 9])
    positions = torch.stack([torch.arange(9, 9 + tokens), torch.arange(9, 9 + tokens), torch.arange(tokens)])
    logits = model()(
        input_ids=torch.tensor([new, new, new]),
        attention_mask=torch.cat([past, torch.ones(3, tokens, dtype=torch.long)], dim=1),
        position_ids=positions,
        **{CACHE: held},
    ).logits
    assert relative_error(logits[2], run([new], None)[0]) < TOLERANCE
    assert relative_error(logits[1], run([[*ROWS[1], *new]], None)[0, -tokens:]) < TOLERANCE


def test_nothing_is_taken_back_and_a_refused_crop_changes_nothing():
    for held in (prepared(), prepared(static())):
        run(ROWS, held)
        held.crop(0)
        untouched = [state.clone() for state in states(held)]
        assert not held.is_croppable
        with pytest.raises(NotImplementedError, match="crop isn't possible with blocks of linear attention"):
            held.crop(-2)
        for layer in held.layers:  # none goes ahead of the one that can't
            with pytest.raises(NotImplementedError):
                layer.crop(-1)
        assert all(map(torch.equal, states(held), untouched))
        check(held, [0, 1, 2])


@pytest.mark.parametrize(
    "change",
    [
        lambda cache: cache.batch_select_indices(torch.tensor([1])),
        lambda cache: cache.batch_repeat_interleave(2),
        lambda cache: [layer.append_empty_rows(1) for layer in cache.layers],
        cache_state,
        lambda cache: select_rows(cache, [0, None]),
    ],
    ids=["select", "repeat", "append", "save", "rows"],
)
@pytest.mark.parametrize("kind", ["static", "of another kind"])
def test_what_a_cache_refuses_leaves_its_recurrent_states(kind, change, request):
    """They stand in the first layer, which mustn't go ahead of the one that can't."""
    if kind == "static" and request.node.callspec.id.endswith(("save", "rows")):
        pytest.skip("a static cache can do that")

    class Other(DynamicLayer):  # as quantized layers are
        pass

    held = prepared(static() if kind == "static" else Cache(layer_class_to_replicate=Other))
    run(ROWS, held)
    untouched = [state.clone() for state in states(held)]
    with pytest.raises(NotImplementedError, match=r"Linear\w+, a layer of a static or quantized cache"):
        change(held)
    assert all(map(torch.equal, states(held), untouched))


@pytest.mark.parametrize("make", [DynamicCache, static], ids=["growing", "static"])
@pytest.mark.parametrize("first", [0, 2, 6])
@pytest.mark.parametrize("numbers", [[0, 1, 5], [3, 5, 2], [0, 0, 0]], ids=str)
def test_inputs_of_the_convolution_skip_padding(make, first, numbers):
    """What is kept of a row is what it would have kept alone, without the padding behind its tokens."""
    layer = prepared(make()).layers[0]
    alone = [prepared(make()).layers[0] for _ in numbers]
    generator = torch.Generator().manual_seed(first)
    given = torch.randn(3, 6, first + 5, generator=generator)
    if first:
        layer.update_conv_state(given[..., :first], conv_kernel_size=4)
    joined = layer.update_conv_state(given[..., first:], conv_kernel_size=4, num_tokens=torch.tensor(numbers))
    assert torch.equal(joined[..., -5:], given[..., first:])
    for row, (number, own) in enumerate(zip(numbers, alone, strict=True)):
        if first + number:
            own.update_conv_state(given[row : row + 1, :, : first + number], conv_kernel_size=4)
            assert torch.equal(layer.conv_states[0][row], own.conv_states[0][0])
        else:
            assert not layer.conv_states[0][row].any()


def test_a_state_of_inference_mode_continues_outside_it():
    held = prepared()
    with torch.inference_mode():
        run(ROWS, held)
    prepare_cache(held, KEPT)  # as every forward does
    logits = run([new[:1] for new in NEXT[:3]], held)
    assert relative_error(logits[0], run([[*ROWS[0], NEXT[0][0]]], None)[0, -1:]) < TOLERANCE


# ---------------------------------------------------------------- saving, memory


def saved() -> tuple[Any, dict[str, Any]]:
    held = prepared()
    run(ROWS, held)
    home_layer(held).store_state(WindowState.empty(3, torch.device("cpu"), length=9))
    return held, cache_state(held)


def test_a_saved_cache_resumes_and_shares_nothing():
    held, state = saved()
    resumed = DynamicCache(config=model().config)
    restore_cache(resumed, state, [torch.device("cpu")] * 4, KEPT)
    kept = copy.deepcopy(state["layers"][0]["recurrent"])
    run([[5], [6], [7]], held)
    check(resumed, [0, 1, 2])
    assert all(map(torch.equal, state["layers"][0]["recurrent"], kept))


DAMAGES: dict[str, tuple[Any, str]] = {
    "none": (lambda parts: [], "layer 2 has a part too few or too many"),
    "one": (lambda parts: parts[:1], "layer 2 has a part too few or too many"),
    "three": (lambda parts: [*parts, parts[0]], "layer 2 has a part too few or too many"),
    "rows": (lambda parts: [parts[0][:2], parts[1]], "the recurrent state of layer 2 is torch.float64 of shape"),
    "channels": (
        lambda parts: [parts[0][:, 1:], parts[1]],
        "the recurrent state of layer 2 is torch.float64 of shape",
    ),
    "heads": (lambda parts: [parts[0], parts[1][:, 1:]], "the recurrent state of layer 2 is torch.float32 of shape"),
    "precision": (lambda parts: [parts[0], parts[1].half()], "the recurrent state of layer 2 is torch.float16 of"),
    "swapped": (lambda parts: parts[::-1], "the recurrent state of layer 2 is torch.float32 of shape"),
    "not finite": (lambda parts: [parts[0], parts[1] / 0], "the recurrent state of layer 2 has numbers that aren't"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_refused(damage):
    change, message = DAMAGES[damage]
    _, state = saved()
    state["layers"][2]["recurrent"] = change(state["layers"][2]["recurrent"])
    with pytest.raises(ValueError, match=f"The saved state is damaged: {message}"):
        restore_cache(DynamicCache(config=model().config), state, [torch.device("cpu")] * 4, KEPT)


def test_a_state_of_rows_that_are_too_few_everywhere_is_refused():
    _, state = saved()
    for layer in (state["layers"][0], state["layers"][2]):
        layer["recurrent"] = [part[:2] for part in layer["recurrent"]]
    with pytest.raises(ValueError, match="the recurrent state of layer 0 is"):
        restore_cache(DynamicCache(config=model().config), state, [torch.device("cpu")] * 4, KEPT)


def test_the_memory_of_recurrent_states_is_counted_and_does_not_grow():
    held = prepared()
    assert cache_nbytes(held)["recurrent"] == 0
    run(ROWS, held)
    # Two blocks, three rows: 4 inputs of 2 * 2 * 16 + 4 * 8 channels in float64, 4 heads of 16 x 8 in float32.
    recurrent = 2 * 3 * (4 * 96 * 8 + 4 * 16 * 8 * 4)
    assert cache_nbytes(held) == {"text": 2 * 3 * 9 * 2 * 2 * 24 * 8, "image": 0, "recurrent": recurrent}
    run(NEXT[:3], held)
    assert cache_nbytes(held)["recurrent"] == recurrent
    assert "recurrent" not in cache_nbytes(DynamicCache())
    # Nothing of the text that went by is kept behind what is counted.
    assert sum(state.untyped_storage().nbytes() for state in states(held)) == recurrent
