# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Every allowed combination of the design axes against the dense reference, at once and in pieces, in float64.

The full product runs in the slow suite; the quick one takes settings until every pair of values that is allowed
together has occurred.
"""

import itertools
import random
from functools import cache

import pytest
import torch

from casa_hf import CasaForConditionalGeneration
from tests.reference import reference_logits
from tests.tiny import GISTS, casa_config, random_weights, sample

AXES = {
    "casa_share_projections": (False, True),
    "casa_keys": ("image", "window", "context"),
    "casa_placement": ("parallel", "replace", "before", "after"),
    "casa_layers": (None, [1]),
    "casa_image_updates": ("none", "ffn", "full"),
    "casa_image_history": ("latest", "group", "all"),
    "casa_video_history": ("latest", "group", "all"),
    "casa_positions": ("contiguous", "insertion"),
    "casa_image_positions": ("at", "before"),
    "casa_text_windows": (False, True),
    "casa_image_norm": ("input", "none"),
    "casa_gate": (None, "tanh"),
}
TOLERANCE = 1e-6
SHARDS = 24

# Images of different sizes, groups, stills beside frames, an image before any text, a row without images.
ROWS = ("3 2x3 2 1x2 d1 3x1 2 d2 f2x2 d2 f2x2 1", "b2x2 4 b1x3 2", "6", "1 2x1 s2x1 3 f1x2 2x2 2")
ROWS_WITH_GISTS = ("3 g2x3 2 g1x2 d1 g3x1 2 f2x2 1", "bg2x2 4 g1x3 2", "6", "1 g2x1 2x1 3 gf1x2 d1 f2x2 2")


@cache
def product():
    """All allowed settings."""
    config, settings = casa_config("casa"), []
    for values in itertools.product(*AXES.values()):
        fields = dict(zip(AXES, values, strict=True))
        for field, value in fields.items():
            setattr(config, field, value)
        try:
            config.validate_design()
        except ValueError:
            continue
        settings.append(fields)
    return settings


def pairs(fields):
    items = [(axis, str(value)) for axis, value in fields.items()]
    return set(itertools.combinations(items, 2))


@cache
def pairwise():
    """Settings in which every allowed pair of values occurs."""
    candidates = list(product())
    random.Random(0).shuffle(candidates)
    wanted = set().union(*map(pairs, candidates))
    chosen = []
    while wanted:
        best = max(candidates[:200], key=lambda fields: len(pairs(fields) & wanted))
        if not pairs(best) & wanted:
            best = next(fields for fields in candidates if pairs(fields) & wanted)
        chosen.append(best)
        wanted -= pairs(best)
    return chosen


def build(config):
    weights = random_weights(config)
    model = CasaForConditionalGeneration(config).double().eval()
    loaded = model.load_state_dict(weights, strict=False)
    assert not loaded.unexpected_keys
    assert all(name.startswith("model.visual.") for name in loaded.missing_keys)
    return model, weights


def run(model, samples, bounds):
    """Logits of each sample in a left-padded batch, fed in pieces that end at `bounds`."""
    length = max(len(s.input_ids) for s in samples)
    ids = torch.zeros(len(samples), length, dtype=torch.long)
    mask, types = torch.zeros_like(ids), torch.zeros_like(ids)
    places, features, grids = [], [], []
    for row, one in enumerate(samples):
        start = length - len(one.input_ids)
        ids[row, start:], mask[row, start:] = torch.tensor(one.input_ids), 1
        types[row, [start + index for index in one.delimiters]] = 3
        for image in one.images:
            places.append((row, start + image.position))
            types[places[-1]] = 2 if image.is_frame else 1
            features.append(torch.cat([image.features, *image.deepstack], dim=-1))
            grids.append([1, 2 * image.grid[0], 2 * image.grid[1]])
    outputs, past = [], None
    for begin, end in itertools.pairwise((0, *bounds, length)):
        new = [j for j, (_, index) in enumerate(places) if begin <= index < end]
        images = {}
        if new:
            images = {
                "image_embeds": [features[j] for j in new],
                "image_grid_thw": torch.tensor([grids[j] for j in new]),
                "image_positions": torch.tensor([(places[j][0], places[j][1] - begin) for j in new]),
            }
        output = model(
            ids[:, begin:end],
            attention_mask=mask[:, :end],
            mm_token_type_ids=types[:, begin:end],
            cache=past,
            use_cache=bool(bounds),
            **images,
        )
        past = output.cache
        outputs.append(output.logits)
    logits = torch.cat(outputs, dim=1)
    return [logits[row, length - len(one.input_ids) :] for row, one in enumerate(samples)]


def compare(fields, rows=ROWS, attn="sdpa"):
    config = casa_config("casa", **fields)
    config._attn_implementation = attn
    model, weights = build(config)
    samples = [sample(script, seed) for seed, script in enumerate(rows)]
    expected = reference_logits(config, weights, samples)
    with torch.no_grad():
        # In three pieces one boundary falls inside a group, and rows receive images in different pieces.
        for bounds in ((), (5, 9)):
            for actual, reference in zip(run(model, samples, bounds), expected, strict=True):
                error = (actual - reference).abs().max() / reference.abs().max()
                assert error < TOLERANCE, (error, bounds, fields)


def test_the_quick_set_is_complete():
    assert set().union(*map(pairs, pairwise())) == set().union(*map(pairs, product()))
    assert len(product()) == 13608


@pytest.mark.parametrize("shard", range(4))
def test_all_pairs_of_values(shard):
    more = random.Random(1).sample(product(), 24)
    for fields in [*pairwise(), *more][shard::4]:
        compare(fields)


def test_eager_attention():
    """One row at a time: in float64 the stock eager attention gives NaN at padding."""
    for fields in pairwise()[::4]:
        compare(fields, ROWS[:1], attn="eager")


@pytest.mark.parametrize("keys", ["image", "window", "context"])
@pytest.mark.parametrize("text_windows", [False, True])
def test_gist_tokens(keys, text_windows):
    fields = {"num_gist_tokens": 2, "gist_token_ids": GISTS, "casa_keys": keys, "casa_text_windows": text_windows}
    fields["casa_share_projections"] = keys == "context"
    if text_windows and keys != "window":
        pytest.skip("text windows belong to window keys")
    for history in ("latest", "group", "all"):
        compare({**fields, "casa_image_history": history}, ROWS_WITH_GISTS)


@pytest.mark.slow
@pytest.mark.parametrize("shard", range(SHARDS))
def test_full_product(shard):
    for fields in product()[shard::SHARDS]:
        compare(fields)
