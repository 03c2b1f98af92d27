# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Rules that hold for every CASA model, whatever its numbers: what text without images gives, what nothing changes."""

import itertools
import re

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from casa_hf import CasaForConditionalGeneration
from casa_hf.backbones import BACKBONES
from casa_hf.transformers_versions import CACHE
from tests.tiny import END, FAMILIES, START, casa_config, random_tensor, source_config

VARIANTS = ("casa", "ca", "casa-shared", "ca-shared")
MERGE = 2


def randomised(model, dtype=torch.float64):
    """The model with weights of which none is 0, 1 or a copy of another."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(random_tensor(name, tuple(parameter.shape)))
    return model.to(dtype).eval()


def casa(variant="casa", attn="sdpa", dtype=torch.float64, **overrides):
    config = casa_config(variant, **overrides)
    return randomised(CasaForConditionalGeneration._from_config(config, attn_implementation=attn), dtype)


def text(*shape, seed=0):
    return torch.randint(3, 50, shape, generator=torch.Generator().manual_seed(seed))


def with_marks(ids, *places):
    """`ids` with an image mark whose closing delimiter is at each (row, index)."""
    ids = ids.clone()
    for row, index in places:
        ids[row, index - 1], ids[row, index] = START, END
    return ids


def pixels(grids, seed=0, dtype=torch.float64):
    """Random patches for images of these merged grids, and their `image_grid_thw`."""
    grid = torch.tensor([[1, MERGE * h, MERGE * w] for h, w in grids])
    generator = torch.Generator().manual_seed(seed)
    return {
        "pixel_values": torch.randn(int(grid.prod(-1).sum()), 3 * 2 * 4 * 4, generator=generator, dtype=dtype),
        "image_grid_thw": grid,
    }


@pytest.mark.parametrize("variant, attn", list(itertools.product(VARIANTS, ("sdpa", "eager"))))
def test_text_alone_gives_the_source_model_bit_for_bit(variant, attn):
    model = casa(variant, attn, torch.float32)
    source = Qwen2_5_VLForConditionalGeneration._from_config(source_config(), attn_implementation=attn)
    weights = {name: tensor for name, tensor in model.state_dict().items() if "casa_attn" not in name}
    source.load_state_dict(weights)
    source.eval()
    ids = text(2, 9)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for kwargs in (
        {},
        {"position_ids": torch.arange(9).expand(2, -1)},
        {"attention_mask": mask, "position_ids": positions},
        {"attention_mask": mask, "position_ids": positions.expand(3, -1, -1)},
    ):
        expected = source(ids, **kwargs)
        assert torch.equal(model(ids, **kwargs).logits, expected.logits)
    # Marks without images are ordinary text.
    ids = with_marks(ids, (0, 4))
    ours, theirs = model(ids), source(ids)
    assert torch.equal(ours.logits, theirs.logits)
    # Queries behind a cache share their keys in one product, which some processors round otherwise.
    ours = model(ids[:, :3], cache=ours.cache).logits
    theirs = source(ids[:, :3], **{CACHE: theirs[CACHE]}).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_without_images_are_the_source_model_too(variant):
    """In a batch where another row has an image, a row without one gets exactly zero from fusion layers."""
    model = casa(variant)
    ids = with_marks(text(2, 9), (0, 4))
    with_image = model(ids, **pixels([(2, 3)])).logits
    assert torch.equal(with_image[1], model(ids).logits[1])
    assert torch.equal(with_image[0, :4], model(ids).logits[0, :4])
    assert (with_image[0, 4:] - model(ids).logits[0, 4:]).abs().amax(-1).min() > 1e-2


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_later_changes_anything_earlier(variant):
    model = casa(variant)
    ids = with_marks(text(1, 16), (0, 3), (0, 9))
    images = pixels([(2, 3), (3, 2)])
    reference = model(ids, **images).logits

    changed = with_marks(text(1, 16, seed=1), (0, 3), (0, 9))
    changed[:, :12] = ids[:, :12]
    later_text = model(changed, **images).logits
    assert torch.equal(later_text[:, :12], reference[:, :12])
    assert (later_text[:, 12:] - reference[:, 12:]).abs().amax(-1).min() > 1e-2

    other = pixels([(2, 3), (3, 2)], seed=1)
    first = images["image_grid_thw"][0].prod()
    other["pixel_values"][:first] = images["pixel_values"][:first]
    later_image = model(ids, **other).logits
    assert torch.equal(later_image[:, :9], reference[:, :9])
    assert (later_image[:, 9:] - reference[:, 9:]).abs().amax(-1).min() > 1e-2


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_image_matters_where_it_stands(variant):
    model = casa(variant)
    ids = with_marks(text(1, 14), (0, 3), (0, 8))
    images = pixels([(2, 2), (2, 2)])
    reference = model(ids, **images).logits
    swapped = {**images, "pixel_values": images["pixel_values"].view(2, 16, -1).flip(0).reshape(32, -1)}
    difference = (model(ids, **swapped).logits - reference).abs().amax(-1)[0]
    assert torch.equal(difference[:3], torch.zeros(3, dtype=torch.float64))
    assert difference[3:].min() > 1e-2
    # Equal pixels twice: the second image is still a window of its own.
    twice = {**images, "pixel_values": images["pixel_values"][:16].repeat(2, 1)}
    one = {"pixel_values": images["pixel_values"][:16], "image_grid_thw": images["image_grid_thw"][:1]}
    first_only = model(ids, **one, image_positions=torch.tensor([[0, 3]])).logits
    again = (model(ids, **twice).logits - first_only).abs().amax(-1)[0]
    assert torch.equal(again[:8], torch.zeros(8, dtype=torch.float64))
    # Under `image` keys a token can't tell the same image seen twice from the image seen once.
    assert (again[8:].max() > 1e-2) == (variant in ("casa", "casa-shared"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_pixels_and_features_give_the_same(variant):
    model = casa(variant)
    ids = with_marks(text(2, 10), (0, 3), (0, 7), (1, 5))
    images = pixels([(2, 3), (4, 1), (1, 2)])
    reference = model(ids, **images).logits
    features = model.get_image_features(**images).pooler_output
    assert [len(feature) for feature in features] == [6, 4, 2]
    for embeds in (features, list(features), torch.cat(features)):
        assert torch.equal(model(ids, image_embeds=embeds, image_grid_thw=images["image_grid_thw"]).logits, reference)
    positions = torch.tensor([[0, 3], [0, 7], [1, 5]])
    assert torch.equal(model(ids, **images, image_positions=positions).logits, reference)
    embedded = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embedded, **images, image_positions=positions).logits, reference)


def test_dozens_of_images_in_one_prompt_equal_one_call_each():
    model = casa()
    turns, length = 40, 6
    ids = text(1, turns * length)
    ids = with_marks(ids, *((0, turn * length + 2) for turn in range(turns)))
    grids = [(1 + turn % 3, 1 + turn % 4) for turn in range(turns)]
    images = pixels(grids)
    reference = model(ids, **images).logits
    patches = images["pixel_values"].split(images["image_grid_thw"].prod(-1).tolist())
    cache, logits = None, []
    for turn in range(turns):
        output = model(
            ids[:, turn * length : (turn + 1) * length],
            pixel_values=patches[turn],
            image_grid_thw=images["image_grid_thw"][turn : turn + 1],
            cache=cache,
        )
        cache = output.cache
        logits.append(output.logits)
    difference = (torch.cat(logits, dim=1) - reference).abs().max() / reference.abs().max()
    assert difference < 1e-7


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_smaller_number_formats_run_and_stay_close(variant, dtype):
    ids = with_marks(text(2, 10), (0, 3), (1, 5))
    images = pixels([(2, 3), (4, 1)])
    reference = casa(variant)(ids, **images).logits
    logits = casa(variant, dtype=dtype)(ids, **images).logits
    assert logits.dtype == dtype
    error = (logits.double() - reference).norm() / reference.norm()
    assert error < {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]


def test_a_token_that_pads_learns_where_it_is_text():
    """Many tokenizers pad with the token that ends an answer; where it pads it is masked, and has no gradient."""
    gradients = []
    for pad in (None, 5):
        config = casa_config(source=source_config(pad_token_id=pad))
        model = randomised(CasaForConditionalGeneration(config))
        ids = text(2, 12)
        ids[0, 4] = ids[1, :3] = 5
        labels = ids.masked_fill(torch.arange(12) < 5, -100)
        attention_mask = torch.ones_like(ids)
        attention_mask[1, :3] = 0
        model(input_ids=ids, attention_mask=attention_mask, labels=labels).loss.backward()
        gradients.append(model.get_input_embeddings().weight.grad)
    assert gradients[0][5].any() and torch.equal(*gradients)


def test_an_index_that_jumps_forward_is_refused():
    """It would be read as packing, and cut attention; positions with jumps have rows of their own."""
    model, ids = casa(), text(1, 6)
    with pytest.raises(ValueError, match=r"jump forward.*axes, batch, tokens"):
        model(ids, position_ids=torch.tensor([[0, 1, 5, 6, 7, 8]]))
    jumping = torch.tensor([0, 1, 5, 6, 7, 8]).expand(3, 1, -1)
    assert model(ids, position_ids=jumping).logits.shape == (1, 6, 64)


def test_parallel_plans_are_declared():
    model = casa()
    plan = model.tp_plan
    for attention in ("self_attn", "casa_attn"):
        for name in ("q_proj", "k_proj", "v_proj"):
            assert plan[f"model.language_model.layers.*.{attention}.{name}"] == "colwise"
        assert plan[f"model.language_model.layers.*.{attention}.o_proj"] == "rowwise"
    assert {"CasaDecoderLayer", "Qwen2_5_VLVisionBlock"} <= set(model._no_split_modules)
    assert {"cache", "past_key_values"} <= set(model._skip_keys_device_placement)


@pytest.mark.parametrize("family", sorted(BACKBONES))
@pytest.mark.parametrize(
    "variant, overrides",
    [
        *((variant, {}) for variant in VARIANTS),
        ("ca-replace", {}),
        ("casa-replace", {"casa_layers": None}),
        ("exact", {}),
    ],
)
def test_parallel_plans_name_what_exists(variant, overrides, family):
    """Transformers logs a warning for each rule that fits no tensor."""
    config = FAMILIES[family].casa_config(variant, **overrides)
    with torch.device("meta"):
        model = CasaForConditionalGeneration(config)
    names = {re.sub(r"\d+", "*", name) for name in model.state_dict()}
    tensors = {name.rsplit(".", 1)[0] for name in names}
    plan = model.tp_plan
    assert plan.keys() <= tensors | names
    for of_model, kind in ((plan, "tp"), (getattr(model, "ep_plan", None), "ep")):  # older versions have one plan
        stated = getattr(config.text_config, f"base_model_{kind}_plan", None) or {}
        experts = {f"model.language_model.{name}" for name in stated if ".mlp.experts." in name}
        assert of_model is None or {name for name in of_model if ".mlp.experts." in name} == experts & names
    attentions = {name.split(".")[-2] for name in plan if re.search(r"(self|casa)_attn\.", name)}
    stock = config.text_config.base_model_tp_plan or {}
    own = {name.split(".")[-2] for name in tensors if "_attn.q_proj" in name}
    assert attentions == (own if "layers.*.self_attn.q_proj" in stock else set())
    norms = {name for name in tensors if re.search(r"language_model.*_attn\.[qk]_norm$", name)}
    assert not attentions or {name for name in norms if "allreduce" not in plan.get(name, "")} == set()


def test_tables_of_backbones_name_what_exists():
    for backbone in BACKBONES.values():
        for field in ("decoder_layer", "rotary_embedding", "rms_norm", "source_class", "apply_rotary"):
            assert backbone.load(field).__name__ == getattr(backbone, field)
        assert backbone.vision.load().__name__ == backbone.vision.tower
