# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""A model with blocks of linear attention: whatever is done to its cache, the answer is that of one call from scratch.

Transformers' Qwen3.5 computes the state in float32, one token in another order than several; a wrong state moves
answers by 1e-2 and more.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Sequence
from functools import cache
from random import Random
from typing import Any

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, StaticCache
from transformers.cache_utils import LinearAttentionLayer

from casa_hf import CasaForConditionalGeneration, cache_nbytes
from casa_hf.cache_casa import CacheMoment, cache_snapshot, cache_state, restore_cache, select_rows
from casa_hf.transformers_versions import CACHE
from tests.helpers_generation import (
    Image,
    Row,
    batch,
    greedy,
    image_inputs,
    image_places,
    images_of,
    one_shot,
    relative_error,
    shared_model,
    token_ids,
    words,
)
from tests.sources import make_case
from tests.tiny import FAMILIES, PAD, random_tensor

FAMILY = "qwen3_5_text"
TOLERANCE = 1e-5
VARIANTS = ("casa", "ca-shared", "exact", "casa-replace")
A, B, C, D = Image(2, 3, 1), Image(1, 2, 2), Image(3, 1, 3), Image(2, 2, 4)
ROW: Row = [*words(3, 1), A, *words(4, 2), B, C, *words(5, 3), D, 6]
# Of different lengths; a padded row, one without an image.
ROWS: list[Row] = [[*words(3, 1), A, *words(4, 2)], [*words(2, 3), B, C, *words(6, 4)], words(5, 5)]
TURN: list[Row] = [[*words(2, 6), D, 7], [*words(1, 7)], [*words(2, 8), A, *words(3, 9)]]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@cache
def model_of(variant: str, family: str = FAMILY, **fields: Any) -> Any:
    """In float64, every parameter random; no token ends a text."""
    config = FAMILIES[family].casa_config(variant, source_config=None, **fields)
    model = CasaForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    for name, parameter in model.named_parameters():
        parameter.copy_(random_tensor(name, tuple(parameter.shape)))
    model.generation_config.eos_token_id = None
    if "moe" in family:
        model.set_experts_implementation("eager")  # others take no float64
    return model.double().eval()


def turn(model: Any, held: Any, *rows: Row, side: str = "left") -> list[torch.Tensor]:
    """Feed new text and images to the rows of a cache, with padding of the new text on one side; logits of each."""
    new = batch(*rows, side=side)
    width = new["input_ids"].shape[1]
    places = []
    for number, row in enumerate(rows):
        first = width - len(token_ids(row)) if side == "left" else 0
        places += [[number, first + place] for place in image_places(row)]
    if places:
        new["image_positions"] = torch.tensor(places)
    logits = model(**new, cache=held).logits
    return [own[kept.bool()] for own, kept in zip(logits, new["attention_mask"], strict=True)]


def new_cache(model: Any, kind: str) -> Any:
    makers = {
        "growing": lambda: DynamicCache(config=model.config),
        "without configuration": DynamicCache,
        "static": lambda: StaticCache(config=model.config, max_cache_len=48),
        "with room": lambda: model.model.language_model.static_cache(48, 8, 3),
    }
    return makers[kind]()


def check(model: Any, held: Any, texts: Sequence[Row], turns: Sequence[Row] | None = None) -> None:
    """The rows of the cache continue these texts: in a turn with padding inside rows, then by single tokens."""
    texts, turns = list(texts), [TURN[number % 3] for number in range(len(texts))] if turns is None else turns
    logits = turn(model, held, *turns)
    for token in (9, 11):
        texts = [[*text, *new] for text, new in zip(texts, turns, strict=True)]
        for text, own, new in zip(texts, logits, turns, strict=True):
            assert relative_error(own, one_shot(model, text)[-len(token_ids(new)) :]) < TOLERANCE
        turns = [[token]] * len(texts)
        logits = list(model(input_ids=torch.tensor(turns), cache=held).logits)


def filled(model: Any, held: Any = None) -> Any:
    held = DynamicCache(config=model.config) if held is None else held
    model(**batch(*ROWS), cache=held)
    return held


# ---------------------------------------------------------------- calls


@pytest.mark.parametrize("kind", ["growing", "without configuration", "static"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_chunks_of_any_size_equal_one_call(variant, kind):
    model = model_of(variant)
    expected, ids = one_shot(model, ROW), token_ids(ROW)
    marked = list(zip(image_places(ROW), images_of([ROW]), strict=True))
    for sizes in ([1], [2], [3, 1], [7]):
        held, logits, start = new_cache(model, kind), [], 0
        while start < len(ids):
            end = min(start + sizes[len(logits) % len(sizes)], len(ids))
            images = image_inputs([image for place, image in marked if start <= place < end])
            if images:
                images["image_positions"] = torch.tensor([[0, p - start] for p, _ in marked if start <= p < end])
            logits.append(model(input_ids=torch.tensor([ids[start:end]]), cache=held, **images).logits[0])
            start = end
        assert relative_error(torch.cat(logits), expected) < TOLERANCE


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["growing", "static"])
def test_turns_of_different_lengths_pad_rows_inside(kind, side):
    """Also rows that receive nothing in a turn, and one that begins only in the second."""
    model = model_of("casa")
    turns: list[list[Row]] = [
        [[*words(3, 1), A, *words(4, 2)], [], [B, *words(2, 3)]],
        [[5], [*words(4, 4), C, 6, 7], []],
        [[*words(3, 5), D, 8], [9], [*words(6, 6)]],
        [[], [10], []],
        [[11], [12], [13]],
    ]
    held, logits = new_cache(model, kind), [[], [], []]
    for rows in turns:
        for own, new in zip(logits, turn(model, held, *rows, side=side), strict=True):
            own.append(new)
    for number, own in enumerate(logits):
        whole = [part for rows in turns for part in rows[number]]
        assert relative_error(torch.cat(own), one_shot(model, whole)) < TOLERANCE
    # What a state that has read padding would be off by.
    wrong = one_shot(model, [*turns[0][0], PAD, *turns[1][0]])[-1]
    assert relative_error(wrong, one_shot(model, [*turns[0][0], *turns[1][0]])[-1]) > 1e-2


# ---------------------------------------------------------------- verbs


@pytest.mark.parametrize(
    "change, rows",
    [
        (lambda held: held.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
        (lambda held: held.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda held: held.reorder_cache(torch.tensor([1, 1, 0])), [1, 1, 0]),
    ],
    ids=["select", "repeat", "reorder"],
)
@pytest.mark.parametrize("variant", ["casa", "exact"])
def test_rows_go_where_their_text_goes(variant, change, rows):
    model = model_of(variant)
    held = filled(model)
    others = [cache_snapshot(held), copy.deepcopy(held)]
    change(held)
    check(model, held, [ROWS[row] for row in rows])
    for other in others:
        check(model, other, ROWS)


def test_a_static_cache_is_reordered_and_used_again():
    model = model_of("casa")
    held = filled(model, new_cache(model, "static"))
    held.reorder_cache(torch.tensor([2, 0, 0]))
    check(model, held, [ROWS[2], ROWS[0], ROWS[0]])
    held.reset()
    check(model, filled(model, held), ROWS)


def test_a_reset_cache_begins_from_scratch_with_any_rows():
    model = model_of("casa")
    held = filled(model)
    held.reset()
    assert held.get_seq_length() == 0 and sum(cache_nbytes(held).values()) == 0
    model(**batch(ROWS[1]), cache=held)
    check(model, held, [ROWS[1]])


def test_rows_join_empty_and_begin_when_they_like():
    model = model_of("casa")
    held = filled(model)
    for layer in held.layers:
        layer.append_empty_rows(2)
    texts = [*ROWS, [], []]
    turns: list[Row] = [[5, 6], [7], [B, 8], [*words(3, 1), A, 9], []]
    logits = turn(model, held, *turns)
    texts = [[*text, *new] for text, new in zip(texts, turns, strict=True)]
    for text, own, new in zip(texts[:4], logits, turns, strict=False):
        assert relative_error(own, one_shot(model, text)[-len(token_ids(new)) :]) < TOLERANCE
    check(model, held, texts, [[1], [2], [3], [4], [*words(4, 2), C, 5]])


def test_a_saved_cache_resumes():
    model = model_of("casa")
    state = cache_state(filled(model))
    for _ in range(2):  # the state isn't changed by what resumes from it
        held = DynamicCache(config=model.config)
        restore_cache(held, state, [torch.device("cpu")] * len(state["layers"]), model.get_decoder().kept_by_blocks)
        check(model, held, ROWS)


STATIC = pytest.mark.parametrize("kind", ["static", "with room"])


@pytest.mark.parametrize("target", ["growing", "static", "with room"])
@STATIC
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_saved_static_cache_resumes_as_either_kind(variant, kind, target):
    model = model_of(variant)
    for given, wanted in ((kind, target), ("growing", kind)):
        state = cache_state(filled(model, new_cache(model, given)), model.get_decoder().window_rules)
        held, kept = new_cache(model, wanted), model.get_decoder().kept_by_blocks
        restore_cache(held, state, [torch.device("cpu")] * len(kept), kept)
        check(model, held, ROWS)


@pytest.mark.parametrize("rows", [[2, 1, 0], [0, None, 1], [1], [None, 2, 0, 0]], ids=str)
@pytest.mark.parametrize("kind", ["growing", "static", "with room"])
def test_rows_are_chosen(kind, rows):
    model = model_of("casa")
    held = filled(model, new_cache(model, kind))
    layer = next(layer for layer in held.layers if isinstance(layer, LinearAttentionLayer))
    addresses = [state.data_ptr() for state in layer.states]
    select_rows(held, rows)
    if kind != "growing":
        assert (addresses == [state.data_ptr() for state in layer.states]) == (len(rows) == 3)
    check(model, held, [[] if row is None else ROWS[row] for row in rows])


@pytest.mark.parametrize("kind", ["growing", "static", "with room"])
def test_a_failed_forward_leaves_no_trace(kind):
    """Neither the first one nor a later one, wherever it fails."""
    model = model_of("casa")
    held, texts = new_cache(model, kind), []
    for rows in (ROWS, TURN):
        for at in range(4):
            moment = CacheMoment(held)

            def fail(*_: Any) -> None:
                raise RuntimeError("out of memory")

            handle = model.get_decoder().layers[at].register_forward_hook(fail)
            with pytest.raises(RuntimeError, match="out of memory"):
                turn(model, held, *rows)
            handle.remove()
            moment.restore()
        texts = [[*text, *row] for text, row in zip(texts or [[]] * 3, rows, strict=True)]
        logits = turn(model, held, *rows)
        for text, own in zip(texts, logits, strict=True):
            assert relative_error(own, one_shot(model, text)[-len(own) :]) < TOLERANCE
    check(model, held, texts)


def test_states_of_fixed_size_are_all_that_linear_blocks_keep():
    model = model_of("casa")
    held = DynamicCache(config=model.config)
    model(**batch([*words(10, 1), A, *words(5, 2)]), cache=held)
    before = cache_nbytes(held)
    model(input_ids=torch.tensor([words(20, 3)]), cache=held)
    after = cache_nbytes(held)
    assert after["recurrent"] == before["recurrent"] > 0 and after["image"] == before["image"]
    # Keys and values of self-attention in two blocks of four, and of the window's text in their fusion layers.
    assert after["text"] - before["text"] == 20 * 2 * 2 * (2 * 2 * 24 * 8)


def test_what_the_stock_model_has_read_is_continued():
    """A batch with padding, by images and text."""
    case = make_case(FAMILY, "casa")
    texts, held = [words(5, 1), words(8, 2), words(3, 3)], DynamicCache(config=case.source.config)
    given = batch(*texts)
    positions = (given["attention_mask"].cumsum(-1) - 1).clamp(min=0).expand(3, -1, -1)
    case.source(**given, position_ids=positions, use_cache=True, **{CACHE: held})
    new, width = batch(*TURN), max(len(token_ids(row)) for row in TURN)
    places = [[n, width - len(token_ids(row)) + place] for n, row in enumerate(TURN) for place in image_places(row)]
    new["image_positions"] = torch.tensor(places)
    mask = torch.cat([given["attention_mask"], new.pop("attention_mask")], dim=1)
    logits = case.model(**new, attention_mask=mask, cache=held).logits
    for text, turns, own in zip(texts, TURN, logits, strict=True):
        count = len(token_ids(turns))
        assert relative_error(own[-count:], one_shot(case.model, [*text, *turns])[-count:]) < TOLERANCE


def test_a_cache_is_written_to_a_file_and_read():
    model = model_of("casa")
    file = io.BytesIO()
    torch.save(filled(model), file)
    file.seek(0)
    check(model, torch.load(file, weights_only=False), ROWS)


def some(random: Random) -> Row:
    """A few pieces of text and images, or nothing."""
    row: Row = []
    for _ in range(random.randint(0, 3)):
        new: Row = words(random.randint(1, 3), random.randint(0, 999))
        row = [*row, *(new if random.random() < 0.7 else [random.choice([A, B, C, D]), random.randint(3, 40)])]
    return row


# Among them: fusion layers beside linear attention, whose cache layers then hold images and text of windows too.
DESIGNS: list[dict[str, Any]] = [
    {"variant": "casa", "casa_gate": "tanh", "casa_layers": (0, 1, 2), "casa_text_windows": True},
    {"variant": "casa"},
    {"variant": "exact", "family": "qwen3_5_moe_text"},
    {"variant": "casa-replace"},
    {"variant": "insertion"},
    {"variant": "ca", "casa_gate": "tanh", "casa_layers": (0, 2), "family": "qwen3_5_moe_text"},
    {"variant": "casa-before", "family": "qwen3_5_moe_text"},
    {"variant": "ca-shared"},
]


@pytest.mark.parametrize("seed", range(len(DESIGNS)))
def test_verbs_in_any_order(seed):
    """Rows are compared with one call from scratch in every turn, whatever was done to the cache before."""
    random = Random(seed)
    model = model_of(**DESIGNS[seed])
    texts: list[Row] = [[*some(random), 5] for _ in range(random.randint(1, 3))]
    held = model(**batch(*texts), use_cache=True).cache
    kept: list[tuple[Any, list[Row]]] = [(cache_snapshot(held), list(texts))]
    for _ in range(10):
        verb = random.choice(["turn"] * 4 + ["select", "repeat", "reorder", "join", "keep", "return", "save"])
        if verb == "turn":
            rows = [some(random) for _ in texts]
            if not any(rows):
                continue
            texts = [[*text, *row] for text, row in zip(texts, rows, strict=True)]
            logits = turn(model, held, *rows, side=random.choice(["left", "right"]))
            for text, row, own in zip(texts, rows, logits, strict=True):
                if row:
                    expected = one_shot(model, text)[-len(token_ids(row)) :]
                    assert relative_error(own, expected) < 2 * TOLERANCE
        elif verb in ("select", "reorder"):
            number = len(texts) if verb == "reorder" else random.randint(1, 3)
            chosen = [random.randrange(len(texts)) for _ in range(number)]
            (held.batch_select_indices if verb == "select" else held.reorder_cache)(torch.tensor(chosen))
            texts = [texts[row] for row in chosen]
        elif verb == "repeat" and len(texts) < 3:
            held.batch_repeat_interleave(2)
            texts = [text for text in texts for _ in range(2)]
        elif verb == "join" and len(texts) < 4:
            for layer in held.layers:
                layer.append_empty_rows(1)
            texts = [*texts, []]
        elif verb == "keep":
            kept.append((cache_snapshot(held), list(texts)))
        elif verb == "return":
            earlier, texts = random.choice(kept)
            held, texts = random.choice([cache_snapshot, copy.deepcopy])(earlier), list(texts)
        elif verb == "save":
            state, held = cache_state(held), DynamicCache()
            restore_cache(
                held, state, [torch.device("cpu")] * len(state["layers"]), model.get_decoder().kept_by_blocks
            )


# ---------------------------------------------------------------- text that is forgotten


@pytest.mark.parametrize("kind", ["growing", "static"])
def test_evicted_text_is_masked_in_attention_and_stays_in_the_recurrent_state(kind):
    """What the stock model answers with a mask for its blocks of full attention alone."""
    case = make_case(FAMILY, "casa")
    text, new = words(12, 1), words(4, 2)
    held = StaticCache(config=case.model.config, max_cache_len=24) if kind == "static" else None
    held = case.model(torch.tensor([text]), cache=held, use_cache=True).cache
    states = [layer.recurrent_states[0].clone() for layer in held.layers if isinstance(layer, LinearAttentionLayer)]
    # No sinks: then all that stays keeps its distances, and the stock model needs no other positions.
    kept = case.model.evict_text(held, 5, 0)
    assert kept.tolist() == [[7, 8, 9, 10, 11]] and int(held.get_seq_length()) == 5
    for layer, state in zip([x for x in held.layers if isinstance(x, LinearAttentionLayer)], states, strict=True):
        assert torch.equal(layer.recurrent_states[0], state)
    logits = case.model(torch.tensor([new]), cache=held).logits[0]
    ids = torch.tensor([[*text, *new]])
    mask = torch.ones(16, 16, dtype=torch.bool).tril()
    mask[12:, :7] = False
    masks = {"full_attention": mask[None, None], "linear_attention": None}
    assert relative_error(logits, case.source(ids, attention_mask=masks).logits[0, 12:]) < TOLERANCE
    # Neither all of it nor what stays alone.
    assert relative_error(logits, case.source(ids).logits[0, 12:]) > 1e-2
    assert relative_error(logits, case.source(ids[:, 7:]).logits[0, 5:]) > 1e-2


@pytest.mark.parametrize("design", DESIGNS[:2], ids=["fusion beside linear attention", "casa"])
def test_rows_that_forget_join_leave_and_are_padded(design):
    """A batch whose rows are treated differently, against one row of its own for each."""
    model = model_of(**design)
    held, alone = filled(model), [DynamicCache(config=model.config) for _ in ROWS]
    for row, own in zip(ROWS, alone, strict=True):
        model(**batch(row), cache=own)
    logits = turn(model, held, *TURN)
    expected = [turn(model, own, row)[0] for own, row in zip(alone, TURN, strict=True)]
    model.evict_text(held, torch.tensor([6, 5, 30]), torch.tensor([2, 1, 0]))
    for own, (keep, sinks) in zip(alone[:2], ((6, 2), (5, 1)), strict=False):
        model.evict_text(own, keep, sinks)
    assert [relative_error(*pair) < TOLERANCE for pair in zip(logits, expected, strict=True)] == [True] * 3
    held.batch_select_indices(torch.tensor([1, 2]))
    for layer in held.layers:
        layer.append_empty_rows(1)
    alone = [*alone[1:], DynamicCache(config=model.config)]
    for turns in ([[5, B, 6, 7], [8], [*words(3, 1), A, 9]], [[1], [2], [3]], [[4, 5, 6], [], [7]]):
        logits = turn(model, held, *turns)
        for row, own, new in zip(turns, alone, logits, strict=True):
            if row:
                assert relative_error(new, turn(model, own, row)[0]) < TOLERANCE


# ---------------------------------------------------------------- generate


STEPS = 5


def generate(model: Any, inputs: dict[str, Any], **settings: Any) -> torch.Tensor:
    return model.generate(**inputs, **{"max_new_tokens": STEPS, "do_sample": False, **settings})[:, -STEPS:]


@pytest.mark.parametrize("settings", [{}, {"cache_implementation": "static"}, {"prefill_chunk_size": 3}], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_generate_is_greedy_decoding_from_scratch(variant, settings):
    model = model_of(variant)
    assert generate(model, batch(*ROWS), **settings).tolist() == [greedy(model, row, STEPS) for row in ROWS]


@pytest.mark.parametrize("kind", ["growing", "static"])
def test_beams_and_several_samples_are_those_without_a_cache(kind):
    model, inputs = model_of("casa"), batch(*ROWS)
    for settings in ({"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}):
        plain = model.generate(**inputs, max_new_tokens=STEPS, do_sample=False, use_cache=False, **settings)
        cached = {} if kind == "growing" else {"cache_implementation": "static"}
        assert torch.equal(
            model.generate(**inputs, max_new_tokens=STEPS, do_sample=False, **settings, **cached), plain
        )
    settings = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": STEPS, "top_k": 0}
    drawn = []
    for cached in ({"use_cache": False}, {} if kind == "growing" else {"cache_implementation": "static"}):
        torch.manual_seed(0)
        drawn.append(model.generate(**inputs, **settings, **cached))
    assert torch.equal(*drawn)
    assert len({tuple(row) for row in drawn[0][:3].tolist()}) > 1


@pytest.mark.parametrize("kind", ["growing", "static"])
def test_a_conversation_continues_with_new_images(kind):
    model = model_of("casa")
    held, row = new_cache(model, kind), list(ROWS[0])
    for new in ([], [*words(2, 6), D, 7], [8, B, C, 9]):
        row += new
        inputs = batch(row)
        if kind == "static":
            inputs |= {CACHE: held}
        answer = generate(model, {**inputs, CACHE: held})[0].tolist()
        assert answer == greedy(model, row, STEPS)
        row += answer


ASSISTED: dict[str, Any] = {
    "lookup": {"prompt_lookup_num_tokens": 2},
    "lookup by configuration": {"generation_config": GenerationConfig(prompt_lookup_num_tokens=2, max_new_tokens=3)},
    "an assistant": {"assistant_model": "casa"},
    "an assistant of its own kind": {"assistant_model": "own"},
    "lookup on a cache": {"prompt_lookup_num_tokens": 2, "cache": "filled"},
}


@pytest.mark.parametrize("settings", ASSISTED.values(), ids=ASSISTED)
def test_assisted_decoding_is_refused_before_anything_is_computed(settings):
    model, row = model_of("casa"), words(4, 1)
    models = {"casa": shared_model("casa"), "own": model}
    settings = dict(settings)
    if "assistant_model" in settings:
        settings["assistant_model"] = models[settings["assistant_model"]]
    calls: list[Any] = []
    held = filled(model)
    if "cache" in settings:
        held = model(input_ids=torch.tensor([row]), use_cache=True).cache
        settings["cache"], row = held, [*row, 5]
    before = copy.deepcopy(cache_state(held))
    hook = model.model.register_forward_pre_hook(lambda *args: calls.append(args))
    try:
        with pytest.raises(NotImplementedError, match=r"this model has blocks of linear attention \(Qwen3\.5\)"):
            model.generate(input_ids=torch.tensor([row]), **settings)
    finally:
        hook.remove()
    assert not calls
    after = cache_state(held)
    for layer, other in zip(before["layers"], after["layers"], strict=True):
        assert all(map(torch.equal, layer.get("recurrent", []), other.get("recurrent", [])))


def test_an_assistant_with_a_recurrent_state_is_refused_before_anything_is_computed():
    """Also by a model that is no CASA model and asks nothing."""
    model, assistant, calls = shared_model("casa"), model_of("casa"), []
    hooks = [m.model.register_forward_pre_hook(lambda *args: calls.append(args)) for m in (model, assistant)]
    stock = make_case("llama", "casa").source
    try:
        for main, inputs in ((model, batch(ROWS[0])), (stock, batch(words(5, 1)))):
            with pytest.raises(NotImplementedError, match=r"the assistant has blocks of linear attention \(Qwen3\.5"):
                main.generate(**inputs, assistant_model=assistant, max_new_tokens=3)
    finally:
        for hook in hooks:
            hook.remove()
    assert not calls
    assert not model._is_stateful and assistant._is_stateful


def test_states_of_a_static_cache_stay_where_they_are():
    """From token to token, window to window and use to use, as compiled steps need it."""
    model = model_of("casa")
    held = StaticCache(config=model.config, max_cache_len=48)
    addresses = set()
    for _ in range(2):
        for new in ([*words(3, 1), A], [7], [*words(2, 2), B, 5], [8], [C, 6]):
            turn(model, held, new)
            layers = [layer for layer in held.layers if isinstance(layer, LinearAttentionLayer)]
            addresses |= {state.data_ptr() for x in layers for state in (x.conv_states[0], x.recurrent_states[0])}
        held.reset()
    assert len(addresses) == 4
