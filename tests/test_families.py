# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Every family of backbones against the dense reference, in settings drawn from the whole design space."""

import random
from dataclasses import replace

import pytest
import torch

from casa_hf import CasaConfig, CasaForConditionalGeneration
from tests.reference import Sample, reference_logits
from tests.test_design_space import ROWS, TOLERANCE, product, run
from tests.test_equalities import FAMILIES, TEXT_ONLY_TOKENS, helium, randomised
from tests.tiny import END, START, VISION, random_tensor, sample

SETTINGS = 8


def family_config(family, fields):
    source = family().config
    if family is helium:
        fields = {**fields, **TEXT_ONLY_TOKENS, "vision_config": {**VISION, "out_hidden_size": 48}}
    return CasaConfig.from_source(source, "casa", **fields)


def with_deepstack(config, one: Sample, seed: int) -> Sample:
    """The sample with the further features that the family's tower gives."""
    count = config.backbone.vision.num_deepstack(config.vision_config)
    images = []
    for index, image in enumerate(one.images):
        shape = tuple(image.features.shape)
        deepstack = tuple(random_tensor(f"deepstack {seed} {index} {layer}", shape) for layer in range(count))
        images.append(replace(image, deepstack=deepstack))
    return replace(one, images=tuple(images))


@pytest.mark.parametrize("family", FAMILIES)
def test_settings_from_the_whole_space(family):
    seed = FAMILIES.index(family)
    for fields in random.Random(seed).sample(product(), SETTINGS):
        config = family_config(family, fields)
        model = randomised(CasaForConditionalGeneration(config))
        samples = [with_deepstack(config, sample(script, row), row) for row, script in enumerate(ROWS)]
        expected = reference_logits(config, model.state_dict(), samples)
        with torch.no_grad():
            for bounds in ((), (5, 9)):
                for actual, reference in zip(run(model, samples, bounds), expected, strict=True):
                    error = (actual - reference).abs().max() / reference.abs().max()
                    assert error < TOLERANCE, (error, bounds, fields)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_generation_equals_generation_without_a_cache(family, attn):
    """Greedy and beams, on growing and preallocated caches, for a padded batch with 0, 1 and 2 images in a row."""
    rows = ([5, START, END, 6, START, END, 7, 8], [9, 10, START, END, 11], [12, 13, 14])
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long(), "do_sample": False, "eos_token_id": -1}
    grids = torch.tensor([[1, 4, 6], [1, 2, 4], [1, 6, 2]])
    inputs |= {
        "pixel_values": random_tensor("pixels", (int(grids.prod(-1).sum()), 3 * 2 * 4 * 4)).float(),
        "image_grid_thw": grids,
        "max_new_tokens": 6,
    }
    for fields in random.Random(FAMILIES.index(family) + 10).sample(product(), 2):
        config = family_config(family, fields)
        model = randomised(CasaForConditionalGeneration._from_config(config, attn_implementation=attn)).float()
        for beams in (1, 3):
            expected = model.generate(**inputs, num_beams=beams, use_cache=False)
            for cache in ("dynamic", "static"):
                actual = model.generate(**inputs, num_beams=beams, cache_implementation=cache)
                assert torch.equal(actual, expected), (fields, beams, cache)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("updates", ["none", "ffn", "full"])
def test_gradient_checkpointing_changes_no_gradient(family, updates):
    """Updated image states are inputs and outputs of every block, so their gradients must pass through checkpoints."""
    config = family_config(family, {"casa_image_updates": updates})
    config.validate_design()
    model = randomised(CasaForConditionalGeneration(config)).train()
    one = with_deepstack(config, sample("2 2x3 3 1x2 2"), 0)
    ids = torch.tensor([one.input_ids])
    images = {
        "image_grid_thw": torch.tensor([[1, 2 * i.grid[0], 2 * i.grid[1]] for i in one.images]),
        "image_positions": torch.tensor([[0, i.position] for i in one.images]),
    }
    features = torch.cat([torch.cat([i.features, *i.deepstack], dim=-1) for i in one.images]).requires_grad_()

    def gradients():
        model.zero_grad()
        features.grad = None
        model(ids, image_embeds=features, labels=ids, use_cache=False, **images).loss.backward()
        own = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return {**own, "features": features.grad.clone()}

    plain = gradients()
    # The newer of the two names that Transformers has had for it.
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    checkpointed = gradients()
    assert plain.keys() == checkpointed.keys()
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)
    assert plain["features"].abs().sum() > 0
    assert any("casa_attn" in name and grad.abs().sum() > 0 for name, grad in plain.items())
