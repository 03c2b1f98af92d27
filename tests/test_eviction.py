# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Evicted text against the dense reference, which masks it and counts positions from scratch, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb

from casa_hf.eviction import KeyRotation, TextEviction, plan_eviction
from tests import tiny
from tests.reference import Block, Eviction, Sample, reference_logits
from tests.test_reference import error, image_inputs, model_of, random_design, random_sample

# Float32 angles of a key's first position and of the rotation don't add up to those of its new position exactly.
TOLERANCE = 5e-6

# Frames with text before, between and after; a long text in an open window; no image; an image first.
SCRIPTS = ("6 f2x3 9 f1x2 7 f3x1 24", "3 f1x3 30 f2x2 9", "41", "ef2x2 13 f1x2 2 f2x1 20")


class Row:
    """A sample on its way into the model."""

    def __init__(self, sample: Sample):
        self.sample = sample
        self.begin = 0
        self.held: list[int] = []
        self.evictions: list[Eviction] = []
        self.logits: list[torch.Tensor] = []

    def evict(self, kept: Sequence[int], text: Sequence[int | None]) -> None:
        """Take note of what the model says it keeps."""
        stays = [text[cache_position] for cache_position in kept if cache_position >= 0]
        assert None not in stays
        self.evictions.append(Eviction(self.begin, [t for t in self.held if t not in stays]))
        self.held = list(stays)

    @property
    def done(self) -> Sample:
        return replace(self.sample, evictions=self.evictions)


def run(
    model: Any,
    samples: Sequence[Sample],
    lengths: Sequence[Sequence[int]],
    evictions: dict[int, tuple[int, int]],
    cache: Any = None,
) -> list[Row]:
    """Feed samples in several calls, with evictions in between.

    Args:
        model: the model under test.
        samples: the rows.
        lengths: for each row the numbers of tokens that it receives in each call.
        evictions: (keep, sinks) after the calls with these numbers.
        cache: a new one if None.
    """
    cache = DynamicCache(config=model.config) if cache is None else cache
    rows = [Row(sample) for sample in samples]
    texts: list[list[int | None]] = [[] for _ in rows]  # the text at each cache position
    for call, widths in enumerate(zip(*lengths, strict=True)):
        width = max(widths)
        ids = torch.full((len(rows), width), tiny.PAD)
        mask, types = torch.zeros_like(ids), torch.zeros_like(ids)
        images, places = [], []
        for number, (row, length) in enumerate(zip(rows, widths, strict=True)):
            first = width - length if call % 2 else 0
            new = range(row.begin, row.begin + length)
            ids[number, first : first + length] = torch.tensor([row.sample.input_ids[t] for t in new])
            mask[number, first : first + length] = 1
            for image in row.sample.images:
                if image.position in new:
                    places.append([number, first + image.position - row.begin])
                    types[number, places[-1][1]] = 2 if image.is_frame else 1
                    images.append(image)
            texts[number] += [None] * first + list(new) + [None] * (width - length - first)
            row.held += new
            row.begin += length
        call_inputs: dict[str, Any] = {"input_ids": ids, "mm_token_type_ids": types, **features(images)}
        if not bool(mask.all()):
            call_inputs["attention_mask"] = mask
        if images:
            call_inputs["image_positions"] = torch.tensor(places)
        logits = model(**call_inputs, cache=cache).logits
        for row, own, kept in zip(rows, logits, mask.bool(), strict=True):
            row.logits.append(own[kept])
        if call in evictions:
            keep, sinks = evictions[call]
            held = [list(row.held) for row in rows]
            kept = model.evict_text(cache, keep, sinks)
            if kept is None:
                assert all(len(own) <= keep for own in held)
                continue
            for number, (row, own) in enumerate(zip(rows, kept.tolist(), strict=True)):
                row.evict(own, texts[number])
                texts[number] = [None if place < 0 else texts[number][place] for place in own]
            assert int(cache.get_seq_length()) == max(len(row.held) for row in rows)
    assert all(row.begin == len(row.sample.input_ids) for row in rows)
    return rows


def features(images: Sequence[Any]) -> dict[str, torch.Tensor]:
    inputs = image_inputs(list(images))
    if images and images[0].deepstack:
        whole = [torch.cat([image.features, *image.deepstack], dim=-1) for image in images]
        inputs["image_embeds"] = torch.cat(whole)
    return inputs


def regular(length: int, size: int) -> list[int]:
    """A length as calls of a size, and what is left."""
    return [min(size, length - begin) for begin in range(0, length, size)]


def in_calls(samples: Sequence[Sample], sizes: Sequence[int]) -> list[list[int]]:
    calls = [regular(len(sample.input_ids), size) for sample, size in zip(samples, sizes, strict=True)]
    return [own + [0] * (max(map(len, calls)) - len(own)) for own in calls]


def check(
    rows: Sequence[Row], config: Any, weights: Any, tolerance: float = TOLERANCE, block: type[Block] = Block
) -> None:
    expected = reference_logits(config, weights, [row.done for row in rows], block)
    errors = [error(torch.cat(row.logits), logits) for row, logits in zip(rows, expected, strict=True)]
    assert all(e < tolerance for e in errors), errors


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


DESIGNS: list[tuple[str, dict[str, Any]]] = [
    ("casa", {}),
    ("ca", {}),
    ("casa-shared", {}),
    ("ca-shared", {}),
    ("exact", {"casa_image_history": "latest"}),
    ("casa-replace", {}),
    ("casa-before", {}),
    ("casa", {"casa_image_updates": "full", "casa_image_positions": "before"}),
    ("casa", {"casa_positions": "insertion", "casa_text_windows": True, "casa_gate": "tanh"}),
]


@pytest.mark.parametrize(("variant", "fields"), DESIGNS, ids=[f"{name} {fields}" for name, fields in DESIGNS])
def test_rows_forget_by_their_own_tokens(variant, fields):
    """Four rows of different lengths, in calls of different sizes, through several evictions."""
    config = tiny.casa_config(variant, **fields)
    samples = [tiny.sample(script, seed) for seed, script in enumerate(SCRIPTS)]
    calls = in_calls(samples, (6, 7, 3, 5))
    evictions = {3: (14, 4), 5: (12, 3), 6: (40, 4), 9: (9, 4)}
    rows = run(model_of(config), samples, calls, evictions)
    check(rows, config, tiny.random_weights(config))
    assert all(len([e for e in row.evictions if e.text]) >= 2 for row in rows)
    assert len({len(eviction.text) for row in rows for eviction in row.evictions}) > 5


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family(family):
    """M-RoPE in sections and interleaved, 1-D rotary of neighbours; with text keys of their own, and shared ones."""
    for fields in (
        {"casa_video_history": "latest"},
        {"casa_video_history": "latest", "casa_keys": "context", "casa_share_projections": True}
        | {"casa_image_updates": "full", "casa_positions": "insertion"},
    ):
        made = tiny.FAMILIES[family]
        config = made.casa_config(**fields)
        samples = [tiny.sample(script, seed, made.num_deepstack) for seed, script in enumerate(SCRIPTS[:2])]
        rows = run(model_of(config), samples, in_calls(samples, (6, 5)), {2: (12, 3), 4: (11, 4), 7: (8, 4)})
        check(rows, config, tiny.random_weights(config), 2e-5, made.block)


@pytest.mark.parametrize("seed", range(20))
def test_any_design_and_any_text(seed):
    """Groups of images, images before any token, several before the same one, evictions after any call."""
    random = Random(seed)
    config = random_design(random)
    while "all" in (config.casa_image_history, config.casa_video_history):
        config = random_design(random)
    samples = [random_sample(random) for _ in range(random.randint(1, 3))]
    calls = in_calls(samples, [random.randint(1, 4) for _ in samples])
    evictions = {}
    for call in range(len(calls[0])):
        if random.random() < 0.5:
            sinks = random.randint(0, 3)
            evictions[call] = (sinks + random.randint(1, 6), sinks)
    rows = run(model_of(config), samples, calls, evictions)
    check(rows, config, tiny.random_weights(config))


MISTAKES = {
    "keys stay rotated": ("eviction.KeyRotation.rotate", lambda self, layer_idx, keys, tables: keys),
    "image keys stay rotated": (
        "eviction.KeyRotation.rotate",
        lambda self, layer_idx, keys, tables, rotate=KeyRotation.rotate: (
            keys if tables[0].shape[1] == 1 else rotate(self, layer_idx, keys, tables)
        ),
    ),
    "rotated the wrong way": (
        "eviction.KeyRotation.tables",
        lambda self, shift, tables=KeyRotation.tables: tables(self, -shift),
    ),
    "one sink too many": (
        "eviction.plan_eviction",
        lambda state, rules, keep, sinks: plan_eviction(state, rules, keep, sinks + 1),
    ),
    "positions continue as before": (
        "eviction.TextEviction.state",
        lambda self, state, after=TextEviction.state: replace(after(self, state), next_position=state.next_position),
    ),
    "windows begin one token later": (
        "eviction.TextEviction.state",
        lambda self, state, after=TextEviction.state: replace(
            after(self, state), window_start=after(self, state).window_start + 1
        ),
    ),
    "fusion layers keep other text": (
        "eviction.TextEviction.window",
        lambda self, stored, window=TextEviction.window: window(
            replace(self, old_text_start=self.old_text_start + 1), stored
        ),
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_would_show(mistake, monkeypatch):
    name, wrong = MISTAKES[mistake]
    monkeypatch.setattr(f"casa_hf.{name}", wrong)
    config, one = tiny.casa_config("casa"), tiny.sample("6 f2x3 30 f1x2 8")
    rows = run(model_of(config), [one], in_calls([one], [5]), {4: (14, 4), 6: (12, 4)})
    held = [t for t in range(25) if t < 4 or t >= 15]
    if rows[0].evictions[0].text != [t for t in range(25) if t not in held]:
        return  # what stays isn't what was asked for
    [expected] = reference_logits(config, tiny.random_weights(config), [rows[0].done])
    assert error(torch.cat(rows[0].logits), expected) > 1e-3


def test_what_stays_are_the_first_tokens_and_the_last():
    model = model_of(tiny.casa_config("casa"))
    for length, keep, sinks in ((20, 8, 3), (5, 8, 3), (9, 9, 0), (10, 9, 0)):
        cache = DynamicCache(config=model.config)
        model(torch.arange(3, 3 + length)[None], cache=cache)
        kept = model.evict_text(cache, keep, sinks)
        if length <= keep:
            assert kept is None
        else:
            assert kept.tolist() == [[*range(sinks), *range(length - keep + sinks, length)]]
            assert cache.layers[0].window_state.positions.tolist() == [list(range(keep))]
            assert cache.layers[0].window_state.next_position.tolist() == [keep]
            assert not cache.layers[0].window_state.padded


@pytest.mark.parametrize("variant", ["casa", "ca-shared", "casa-replace", "exact"])
def test_a_static_cache_forgets_in_place(variant):
    config = tiny.casa_config(variant, casa_static_image_tokens=8)
    samples = [tiny.sample(script, seed) for seed, script in enumerate(SCRIPTS[:2])]
    model, calls = model_of(config), in_calls(samples, (6, 7))
    cache = StaticCache(config=config.get_text_config(), max_cache_len=32)
    model(torch.tensor([[5], [6]]), cache=cache)
    cache.reset()
    addresses = [layer.keys.data_ptr() for layer in cache.layers if layer.keys is not None]
    rows = run(model, samples, calls, {2: (11, 3), 4: (12, 4), 6: (9, 4)}, cache)
    check(rows, config, tiny.random_weights(config))
    assert addresses == [layer.keys.data_ptr() for layer in cache.layers if layer.keys is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rope_type", ["linear", "yarn", "llama3"])
def test_moved_keys_are_those_of_their_new_position(rope_type, dtype):
    """In the first block a key depends on its token and its position alone: on a cache that never held more, it is the
    same. With an attention scaling that isn't 1, for images too."""
    config = tiny.casa_config("casa")
    scaled = {"factor": 3.0, "original_max_position_embeddings": 32}
    scaled |= {"attention_factor": 1.3} if rope_type == "yarn" else {}
    scaled |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if rope_type == "llama3" else {}
    rope = config.text_config.rope_parameters
    config.text_config.rope_parameters = {**rope, "rope_type": rope_type, **scaled}
    model = model_of(config).to(dtype)
    images = {"image_grid_thw": torch.tensor([[1, 4, 6]])}
    images["image_embeds"] = tiny.features(2, 3, seed=1).to(dtype)
    ids = torch.tensor([[*range(3, 43), tiny.START, tiny.END, *range(10, 20)]])
    moved, fresh = DynamicCache(config=config), DynamicCache(config=config)
    model(ids, cache=moved, **images)
    kept = model.evict_text(moved, 40, 4)
    kept = kept[0, model.evict_text(moved, 30, 4)[0]]
    model(ids[:, kept], cache=fresh, **images)
    bar = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for name in ("image", "window"):
        assert error(moved.layers[0].fusion[name].keys, fresh.layers[0].fusion[name].keys) < bar
    assert error(moved.layers[0].keys, fresh.layers[0].keys) < bar
    stayed = model_of(config).to(dtype)(ids, cache=DynamicCache(config=config), **images).cache
    assert error(stayed.layers[0].keys[:, :, kept], fresh.layers[0].keys) > 10 * bar


def test_a_key_that_moves_through_a_window_loses_little():
    """As in a stream: every eviction moves it by a quarter of the window, so four times at most."""
    frequencies = 1e6 ** -(torch.arange(0, 128, 2).double() / 128)
    rotary = torch.nn.Module()
    rotary.inv_freq = frequencies.float()
    rotation = KeyRotation(rotary, [lambda keys, tables: apply_rotary_pos_emb(keys, keys[:, :0], *tables)[0]])
    keys = torch.randn(1, 1, 512, 128, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def rotated(positions, keys, dtype):
        """As the model forms keys: float32 angles, the rest in its own type; or all in float64."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        angles = positions[:, None].to(wide) * rotary.inv_freq.to(wide)
        cos, sin = (f(torch.cat([angles, angles], -1))[None].to(dtype) for f in (torch.cos, torch.sin))
        return apply_rotary_pos_emb(keys.to(dtype), keys[:, :0].to(dtype), cos, sin)[0]

    positions = torch.arange(3584, 4096)
    loss = {}
    for dtype in (torch.float32, torch.bfloat16):
        stored = rotated(positions, keys, dtype)
        at = [stored]
        for _ in range(4):
            stored = rotation.rotate(0, stored, rotation.tables(torch.full((1, 512), 896)))
            at.append(stored)
        true = [rotated(positions - 896 * times, keys, torch.float64) for times in range(5)]
        loss[dtype] = [
            float((own.double() - expected).norm() / expected.norm()) for own, expected in zip(at, true, strict=True)
        ]
    # Of what a float32 angle loses where the key was made, nothing is added; bfloat16 is rounded four times more.
    assert loss[torch.float32][4] < 1.01 * loss[torch.float32][0] < 3e-5
    assert loss[torch.bfloat16][4] < 2 * loss[torch.bfloat16][0] < 8e-3
    assert loss[torch.bfloat16][4] > loss[torch.bfloat16][0]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_why_positions_must_stay_small(family):
    """The rotary tables of a stream that has counted to 2,000,000, against float64."""
    made = tiny.FAMILIES[family]
    model = made.source(made.source_config()).model
    rotary = getattr(model, "language_model", model).rotary_emb
    true_frequencies = 1e6 ** -(torch.arange(0, 128, 2).double() / 128)
    rotary.inv_freq = true_frequencies.float()
    rotary.mrope_section = [16, 24, 24]
    loss = {}
    for position in (1_000, 2_000_000):
        places = torch.full((3, 1, 1) if hasattr(model, "language_model") else (1, 1), position)
        cos, _ = rotary(torch.zeros(1, 1, 1), places)
        angles = torch.cat([position * true_frequencies] * 2)
        loss[position] = float((cos.double() - angles.cos()).abs().max())
    assert loss[1_000] < 1e-4
    assert loss[2_000_000] > 2e-2


def test_generate_and_crop_go_on_after_an_eviction():
    """`generate` is given the ids that are there now; its tokens are those of steps by hand."""
    config, one = tiny.casa_config("casa"), tiny.sample("6 f2x3 30")
    model = model_of(config)
    model.generation_config.eos_token_id = None

    def filled() -> tuple[DynamicCache, torch.Tensor]:
        cache = DynamicCache(config=config)
        ids = torch.tensor([one.input_ids])
        types = torch.where(ids == tiny.END, 2, 0)
        model(ids, cache=cache, mm_token_type_ids=types, **features(one.images))
        return cache, ids[:, model.evict_text(cache, 16, 4)[0]]

    cache, _ = filled()
    token, by_hand = 7, []
    for _ in range(5):
        token = int(model(torch.tensor([[token]]), cache=cache).logits[0, -1].argmax())
        by_hand.append(token)
    cache, ids = filled()
    output = model.generate(
        torch.cat([ids, torch.tensor([[7]])], dim=1), cache=cache, max_new_tokens=5, do_sample=False
    )
    assert output[0, -5:].tolist() == by_hand
    cache.crop(-4)  # the 7 and what followed it, the last token having never been fed
    cache.crop(-1)
    again = model(torch.tensor([[7]]), cache=cache).logits[0, -1].argmax()
    assert int(again) == by_hand[0]


@pytest.mark.parametrize(
    ("script", "keep", "sinks", "crop", "joins"),
    [
        # What closed the image's window has gone: it stays closed, also where nothing after it is left.
        ("0 2x3 9", 5, 2, 3, False),
        ("0 2x3 9", 5, 2, 1, False),
        # It is still there: only without it the next image joins the group.
        ("6 2x3 4", 7, 1, 4, True),
        ("6 2x3 4", 7, 1, 3, False),
    ],
)
@pytest.mark.parametrize("variant", ["casa", "ca-shared"])
def test_a_window_stays_closed_after_an_eviction_unless_what_closed_it_is_cropped(
    variant, script, keep, sinks, crop, joins
):
    """A new image that joins the group of the stored one is seen with it, as under "group"; else alone, as under
    "latest"."""
    one, other = tiny.sample(script, 1), tiny.sample("3x1 4", 2)
    logits = []
    for history in ("group", "latest"):
        model = model_of(tiny.casa_config(variant, casa_image_history=history))
        cache = DynamicCache(config=model.config)
        model(torch.tensor([one.input_ids]), cache=cache, **features(one.images))
        assert model.evict_text(cache, keep, sinks) is not None
        cache.crop(-crop)
        logits.append(model(torch.tensor([other.input_ids]), cache=cache, **features(other.images)).logits)
    group, latest = logits
    assert (error(group, latest) > 1e-2) == joins
    assert joins or torch.equal(group, latest)


@pytest.mark.parametrize(
    ("keep", "sinks", "stays"),
    [
        # Tokens 5 to 7 are the group's: the tokens that its two images precede, and the delimiter between them.
        (10, 6, [*range(8), *range(12, 16)]),  # sinks that would end within it end behind it
        (13, 3, [*range(3), *range(5, 16)]),  # what is recent and would begin within it begins with it
        (10, 3, [*range(3), *range(9, 16)]),  # both outside: it goes as a whole
    ],
)
def test_delimiters_between_the_images_of_a_group_stay_or_go_together(keep, sinks, stays):
    model, one = model_of(tiny.casa_config("casa")), tiny.sample("4 2x3 1x2 8", 1)
    assert [image.position for image in one.images] == [5, 7] and len(one.input_ids) == 16
    cache = DynamicCache(config=model.config)
    model(torch.tensor([one.input_ids]), cache=cache, **features(one.images))
    assert model.evict_text(cache, keep, sinks).tolist() == [stays]


@pytest.mark.parametrize("variant", ["casa", "ca"])
def test_an_image_that_joins_a_group_after_an_eviction_sees_its_images_where_they_are_now(variant):
    """In updates of image states, whose keys have positions even where those of fusion layers have none."""
    config = tiny.casa_config(variant, casa_image_updates="full")
    one = tiny.sample("12 2x3 1x2 6", 1)
    assert [image.position for image in one.images] == [13, 15]
    rows = run(model_of(config), [one], [[14, 8]], {0: (8, 2)})
    check(rows, config, tiny.random_weights(config))


@pytest.mark.parametrize("variant", ["casa", "ca-shared", "exact"])
def test_rows_without_padding_have_some_when_they_have_forgotten_different_numbers(variant):
    """Nobody passes a mask, before or after."""
    model = model_of(tiny.casa_config(variant, casa_image_history="latest"))
    ids, more = torch.randint(3, 50, (2, 20)), torch.randint(3, 50, (2, 3))
    cache, keep = DynamicCache(config=model.config), (7, 12)
    model(ids, cache=cache)
    assert (model.evict_text(cache, torch.tensor(keep), 2) < 0).sum() == 5
    together = model(more, cache=cache).logits
    for row, number in enumerate(keep):
        alone = DynamicCache(config=model.config)
        model(ids[row : row + 1], cache=alone)
        model.evict_text(alone, number, 2)
        assert error(together[row], model(more[row : row + 1], cache=alone).logits[0]) < TOLERANCE


def test_a_row_without_an_image_has_none_after_an_eviction():
    """So the other row's image alone says how far the cache can be cropped."""
    model, one = model_of(tiny.casa_config("casa")), tiny.sample("1 2x3 17", 1)
    width = len(one.input_ids)
    ids, mask = torch.tensor([one.input_ids, [9] * width]), torch.ones(2, width, dtype=torch.long)
    mask[1, :-3] = 0
    cache = DynamicCache(config=model.config)
    places = torch.tensor([[0, one.images[0].position]])
    model(ids, attention_mask=mask, image_positions=places, cache=cache, **features(one.images))
    assert model.evict_text(cache, 12, 4) is not None
    cache.crop(-5)  # more than the text of the second row, which is padded by 9, and not the image of the first
    assert cache.get_seq_length() == 7


def test_what_cannot_be_evicted_is_refused_and_left_alone():
    model = model_of(tiny.casa_config("casa"))
    cache = DynamicCache(config=model.config)
    with pytest.raises(TypeError, match="a CASA model has filled, but this DynamicCache isn't one"):
        model.evict_text(cache, 8)
    model(torch.arange(3, 23)[None].repeat(2, 1), cache=cache)
    for arguments, message in (
        ((4, 4), "keep=4 must be larger than num_sink_tokens=4"),
        ((4, -1), "num_sink_tokens=-1 must be 0 or more"),
        ((torch.tensor([9, 9, 9]), 4), r"keep has shape \(3,\); expected a number, or one for each of 2 rows"),
        ((torch.tensor([9, 4]), torch.tensor([0, 4])), "keep=4 must be larger than num_sink_tokens=4"),
    ):
        with pytest.raises(ValueError, match=message):
            model.evict_text(cache, *arguments)
    assert cache.get_seq_length() == 20
    kept = model.evict_text(cache, torch.tensor([9, 6]), torch.tensor([0, 4]))
    assert kept.tolist() == [list(range(11, 20)), [-1, -1, -1, 0, 1, 2, 3, 18, 19]]
    insertion = model_of(tiny.casa_config("insertion"))
    cache = DynamicCache(config=insertion.config)
    insertion(torch.arange(3, 23)[None], cache=cache)
    with pytest.raises(ValueError, match='is "all"'):
        insertion.evict_text(cache, 8)
    model.model.language_model.rotary_emb.rope_type = "longrope"
    with pytest.raises(ValueError, match="rope_type='longrope'"):
        model.evict_text(cache, 8)
