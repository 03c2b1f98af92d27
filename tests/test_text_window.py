# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Evicted text against the dense reference, which masks it and counts positions anew, in float64, without a cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

from casa_hf import CasaForConditionalGeneration
from tests import tiny
from tests.reference import Eviction, Sample, reference_logits
from tests.test_equalities import FAMILIES, randomised
from tests.test_families import family_config, with_deepstack
from tests.test_reference import error, image_inputs, model_of, random_design, random_sample

# Float32 angles of a key's first position and of the turn don't add up to those of its new position exactly.
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

    def evict(self, slots: Sequence[int], old_slots: Sequence[int | None]) -> None:
        """Take note of what the model says it keeps."""
        kept = [old_slots[slot] for slot in slots if slot >= 0]
        assert None not in kept
        self.evictions.append(Eviction(self.begin, [t for t in self.held if t not in kept]))
        self.held = list(kept)

    @property
    def done(self) -> Sample:
        return replace(self.sample, evictions=self.evictions)


def run(
    model: Any,
    samples: Sequence[Sample],
    turns: Sequence[Sequence[int]],
    evictions: dict[int, tuple[int, int]],
    cache: Any = None,
) -> list[Row]:
    """Feed samples in turns, with evictions in between.

    Args:
        model: the model under test.
        samples: the rows.
        turns: for each row the numbers of tokens that it receives in each call.
        evictions: (keep, sinks) after the calls with these numbers.
        cache: a new one if None.
    """
    cache = DynamicCache(config=model.config) if cache is None else cache
    rows = [Row(sample) for sample in samples]
    slots: list[list[int | None]] = [[] for _ in rows]  # the text in each slot
    for call, lengths in enumerate(zip(*turns, strict=True)):
        width = max(lengths)
        ids = torch.full((len(rows), width), tiny.PAD)
        mask, types = torch.zeros_like(ids), torch.zeros_like(ids)
        images, places = [], []
        for number, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            first = width - length if call % 2 else 0
            new = range(row.begin, row.begin + length)
            ids[number, first : first + length] = torch.tensor([row.sample.input_ids[t] for t in new])
            mask[number, first : first + length] = 1
            for image in row.sample.images:
                if image.position in new:
                    places.append([number, first + image.position - row.begin])
                    types[number, places[-1][1]] = 2 if image.is_frame else 1
                    images.append(image)
            slots[number] += [None] * first + list(new) + [None] * (width - length - first)
            row.held += new
            row.begin += length
        call_inputs: dict[str, Any] = {"input_ids": ids, "mm_token_type_ids": types, **features(images)}
        if not bool(mask.all()):
            call_inputs["attention_mask"] = mask
        if images:
            call_inputs["image_positions"] = torch.tensor(places)
        logits = model(**call_inputs, past_key_values=cache).logits
        for row, own, kept in zip(rows, logits, mask.bool(), strict=True):
            row.logits.append(own[kept])
        if call in evictions:
            keep, sinks = evictions[call]
            held = [list(row.held) for row in rows]
            kept_slots = model.evict_text(cache, keep, sinks)
            if kept_slots is None:
                assert all(len(own) <= keep for own in held)
                continue
            for number, (row, own) in enumerate(zip(rows, kept_slots.tolist(), strict=True)):
                row.evict(own, slots[number])
                slots[number] = [None if slot < 0 else slots[number][slot] for slot in own]
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
    """A length as turns of a size, and what is left."""
    return [min(size, length - begin) for begin in range(0, length, size)]


def in_turns(samples: Sequence[Sample], sizes: Sequence[int]) -> list[list[int]]:
    turns = [regular(len(sample.input_ids), size) for sample, size in zip(samples, sizes, strict=True)]
    return [own + [0] * (max(map(len, turns)) - len(own)) for own in turns]


def check(rows: Sequence[Row], config: Any, weights: Any, tolerance: float = TOLERANCE) -> None:
    expected = reference_logits(config, weights, [row.done for row in rows])
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
    """Four rows of different lengths, in turns of different sizes, through several evictions."""
    config = tiny.casa_config(variant, **fields)
    samples = [tiny.sample(script, seed) for seed, script in enumerate(SCRIPTS)]
    turns = in_turns(samples, (6, 7, 3, 5))
    evictions = {3: (14, 4), 5: (12, 3), 6: (40, 4), 9: (9, 4)}
    rows = run(model_of(config), samples, turns, evictions)
    check(rows, config, tiny.random_weights(config))
    assert all(len([e for e in row.evictions if e.text]) >= 2 for row in rows)
    assert len({len(eviction.text) for row in rows for eviction in row.evictions}) > 5


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family):
    """M-RoPE in sections and interleaved, 1-D rotary of neighbours; with text keys of their own, and shared ones."""
    for fields in (
        {"casa_video_history": "latest"},
        {"casa_video_history": "latest", "casa_keys": "context", "casa_share_projections": True}
        | {"casa_image_updates": "full", "casa_positions": "insertion"},
    ):
        config = family_config(family, fields)
        model = randomised(CasaForConditionalGeneration(config))
        samples = [with_deepstack(config, tiny.sample(script, seed), seed) for seed, script in enumerate(SCRIPTS[:2])]
        rows = run(model, samples, in_turns(samples, (6, 5)), {2: (12, 3), 4: (11, 4), 7: (8, 4)})
        check(rows, config, model.state_dict(), 2e-5)


@pytest.mark.parametrize("seed", range(20))
def test_any_design_and_any_text(seed):
    """Groups of images, images before any token, several before the same one, evictions after any call."""
    random = Random(seed)
    config = random_design(random)
    while "all" in (config.casa_image_history, config.casa_video_history):
        config = random_design(random)
    samples = [random_sample(random) for _ in range(random.randint(1, 3))]
    turns = in_turns(samples, [random.randint(1, 4) for _ in samples])
    evictions = {}
    for call in range(len(turns[0])):
        if random.random() < 0.5:
            sinks = random.randint(0, 3)
            evictions[call] = (sinks + random.randint(1, 6), sinks)
    rows = run(model_of(config), samples, turns, evictions)
    check(rows, config, tiny.random_weights(config))
