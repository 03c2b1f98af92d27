# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""What every row of `backbones.BACKBONES` has to prove; it needs no more than a row in `tiny.FAMILIES`.

The stock model says what a family computes, in text and with images inserted; the dense reference, first shown to be
the stock model, says what fusion makes of it. Everything is float64 unless said. Mistakes in fusion alone, which no
test of text notices, are made in the reference to see that each is far outside the tolerance.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, StaticCache

from casa_hf import CasaConfig, CasaForConditionalGeneration
from casa_hf.backbones import BACKBONES
from casa_hf.conversion import convert_checkpoint, convert_to_source
from casa_hf.training.parameters import RECIPES
from examples.tiny_source import IMAGE_PROCESSOR, build_text_tokenizer, build_tokenizer
from tests.conversion.helpers import (
    Tensors,
    altered,
    assert_same,
    converted,
    in_memory_layout,
    load_weights,
    older_layout,
)
from tests.helpers_generation import relative_error
from tests.reference import Block, Image, Sample, reference_logits
from tests.sources import GRIDS, ONE_GROUP, SEVERAL, Case, make_case, randomised
from tests.test_design_space import AXES, ROWS
from tests.test_reference import compare, image_inputs, model_of, random_turns, run
from tests.tiny import END, FAMILIES, START, random_tensor, random_weights, sample

TOLERANCE = 1e-5
NOTICED = 1e-3

DESIGNS: dict[str, dict[str, Any]] = {
    "casa": {},
    "ca": {"casa_keys": "image"},
    "casa-shared": {"casa_share_projections": True},
    "ca-shared": {"casa_keys": "image", "casa_share_projections": True, "casa_gate": "tanh"},
    "casa-before": {"casa_placement": "before", "casa_gate": "tanh", "casa_image_positions": "before"},
    "casa-replace": {"casa_placement": "replace", "casa_layers": [0, 1], "casa_text_windows": True},
}
RANDOM_DESIGNS = 6

families = pytest.mark.parametrize("family", sorted(BACKBONES))
# Tests that take seconds are quick ones without the rows whose parts other rows have: linear attention and experts;
# the attention of a language model that others of its family have beside a vision tower.
OF_KNOWN_PARTS = ("qwen3_5_moe_text", "qwen2", "qwen3")
quick_families = pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in OF_KNOWN_PARTS)) for name in sorted(BACKBONES)],
)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def test_every_row_has_a_tiny_configuration() -> None:
    assert FAMILIES.keys() == BACKBONES.keys()
    assert {backbone.recipe for backbone in BACKBONES.values()} <= set(RECIPES)


# ------------------------------------------------------------------------------------- the source model


@families
@pytest.mark.parametrize("variant", ["exact", "casa-shared", "casa", "casa-before"])
def test_text_alone_is_the_source(family: str, variant: str) -> None:
    case = make_case(family, variant)
    ids = torch.tensor([[5, 6, 7, 8, 9, START, END, 10]])
    assert torch.equal(case.model(ids).logits, case.source(ids).logits)


@families
def test_insertion_is_the_source_for_any_number_of_images(family: str) -> None:
    case = make_case(family, "insertion")
    assert relative_error(case.casa(SEVERAL), case.insertion(SEVERAL)) < TOLERANCE
    # `exact` hides earlier groups, so that the test can fail.
    assert relative_error(make_case(family, "exact").casa(SEVERAL), case.insertion(SEVERAL)) > 1e-2


@families
def test_exact_is_the_source_for_one_group(family: str) -> None:
    case = make_case(family, "exact")
    assert relative_error(case.casa(ONE_GROUP), case.insertion(ONE_GROUP)) < TOLERANCE


@families
def test_latest_is_the_source_with_earlier_images_evicted(family: str) -> None:
    case = make_case(family, "exact", casa_image_history="latest")
    _, owners = case.inserted(SEVERAL)
    # From the first token of an image on, tokens of earlier images are gone.
    entered = [max((o for o in owners[: q + 1] if o is not None), default=-1) for q in range(len(owners))]
    mask = torch.tensor(
        [[k <= q and owners[k] in (None, entered[q]) for k in range(len(owners))] for q in range(len(owners))]
    )
    assert relative_error(case.casa(SEVERAL), case.insertion(SEVERAL, mask[None, None])) < TOLERANCE
    assert relative_error(case.casa(SEVERAL), case.insertion(SEVERAL)) > 1e-2


@families
@pytest.mark.parametrize("variant", ["exact", "insertion"])
def test_attentions_are_the_sources(family: str, variant: str) -> None:
    """Of text to text as `attentions`, of text to images as `cross_attentions`: one softmax in the source."""
    case = make_case(family, variant)
    case.model.set_attn_implementation("eager"), case.source.set_attn_implementation("eager")
    ours = case.model(input_ids=torch.tensor([ONE_GROUP]), **case.images, output_attentions=True)
    is_text = case.is_text(ONE_GROUP)
    theirs = case.source_outputs(ONE_GROUP, output_attentions=True).attentions
    fused = FAMILIES[family].fusable
    assert len(ours.attentions) == len(ours.cross_attentions) == case.model.config.text_config.num_hidden_layers
    for block, weights in enumerate(zip(ours.attentions, ours.cross_attentions, strict=True)):
        assert [part is None for part in weights] == [block not in fused] * 2
    for block, both in zip(fused, theirs, strict=True):
        to_text, to_images = ours.attentions[block], ours.cross_attentions[block]
        assert relative_error(to_text, both[:, :, is_text][..., is_text]) < TOLERANCE
        assert relative_error(to_images, both[:, :, is_text][..., ~is_text]) < TOLERANCE


@families
def test_exact_generates_what_the_source_generates(family: str) -> None:
    """Token for token, in float32."""
    case = make_case(family, "exact")
    case.source.float(), case.model.float()
    case.pixels = case.pixels.float()
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": -1}
    ours = case.model.generate(torch.tensor([ONE_GROUP]), **case.images, **options)
    inputs = case.source_inputs(ONE_GROUP)
    theirs = case.source.generate(**inputs, **options)
    assert ours[0, len(ONE_GROUP) :].tolist() == theirs[0, -12:].tolist()


# ------------------------------------------------------------------------------------- the reference

# What a family states of its blocks, stated wrongly.
MISTAKES: dict[str, Callable[[Block], dict[str, Any]]] = {
    "one block rotates, or doesn't": lambda block: {"rotates": block.rotates != (block.index == 1)},
    "other dimensions rotate together": lambda block: {"neighbours": not block.neighbours},
    "queries and keys aren't normalised": lambda block: {"head_norms": False},
    "norms multiply by their weights alone": lambda block: {"norm_offset": 0.0},
    "attention has no gates": lambda block: {"has_gate": False},
    "linear attention remembers nothing": lambda block: {"remembers": False},
    "images don't enter linear attention": lambda block: {"images_enter": False},
    "tokens pass one expert more": lambda block: {"chosen": block.chosen + 1},
    "no expert is shared": lambda block: {"shared": False},
}
# What blocks must have for some of them.
NEEDED = {
    "queries and keys aren't normalised": "head_norms",
    "norms multiply by their weights alone": "norm_offset",
    "attention has no gates": "has_gate",
    "linear attention remembers nothing": "remembers",
    "images don't enter linear attention": "images_enter",
    "tokens pass one expert more": "has_experts",
    "no expert is shared": "shared",
}
OUTSIDE_FUSION = {
    "linear attention remembers nothing",
    "images don't enter linear attention",
    "tokens pass one expert more",
    "no expert is shared",
}
# The same in fusion alone, and what else can go wrong there.
FUSION_MISTAKES: dict[str, Callable[[Block], dict[str, Any]]] = {
    **MISTAKES,
    "one block rotates, or doesn't": lambda block: {"fusion_rotates": block.fusion_rotates != (block.index == 1)},
    "a wrong scale": lambda block: {"scale": 1.2 * block.scale},
}


def mistaken(block: type[Block], mistake: Callable[[Block], dict[str, Any]], methods: tuple[str, ...]) -> type[Block]:
    """Blocks in which some methods make a mistake."""

    def wrong(name: str) -> Callable:
        def method(self: Block, *args: Any) -> Any:
            other = copy.copy(self)
            other.__class__ = block  # type: ignore[assignment]
            vars(other).update(mistake(self))
            return getattr(other, name)(*args)

        return method

    return type("Mistaken", (block,), {name: wrong(name) for name in methods})


def features(case: Case) -> list[Image]:
    """The images of `SEVERAL` as the stock tower sees them; for a text-only source there is none but the model's."""
    positions = [index for index, token in enumerate(SEVERAL) if token == END]
    if case.family.text_only:
        merged, deepstack = case.model.get_image_features(**case.images).pooler_output, ()
    else:
        output = case.source.model.visual(case.pixels, grid_thw=case.grids)
        sizes = [height * width for height, width in GRIDS]
        merged = output.pooler_output.split(sizes)
        deepstack = [level.split(sizes) for level in getattr(output, "deepstack_features", None) or ()]
    return [
        Image(position, grid, merged[j], deepstack=tuple(level[j] for level in deepstack))
        for j, (position, grid) in enumerate(zip(positions, GRIDS, strict=True))
    ]


@families
def test_the_reference_is_the_source(family: str) -> None:
    """So the table of the tests states the family's blocks as they are, and each statement is needed."""
    case = make_case(family, "insertion")
    expected, block = case.insertion(SEVERAL), FAMILIES[family].block
    inputs = (case.model.config, case.model.state_dict(), [Sample(SEVERAL, tuple(features(case)))])
    assert relative_error(reference_logits(*inputs, block)[0], expected) < TOLERANCE
    for name, mistake in MISTAKES.items():
        if name in needless(block):
            continue
        wrong = mistaken(block, mistake, ("__call__",))
        assert relative_error(reference_logits(*inputs, wrong)[0], expected) > NOTICED, name


def needless(block: type[Block]) -> set[str]:
    """Mistakes that blocks of a family can't make."""
    return {name for name, attribute in NEEDED.items() if not getattr(block, attribute, False)}


# ------------------------------------------------------------------------------------- fusion


def config_of(family: str, design: str) -> CasaConfig:
    """Layers of designs count those that can be there."""
    made, fields = FAMILIES[family], dict(DESIGNS[design])
    if "casa_layers" in fields:
        fields["casa_layers"] = [made.fusable[number] for number in fields["casa_layers"]]
    return made.casa_config(**fields)


def samples_of(family: str) -> list[Sample]:
    return [sample(script, seed, FAMILIES[family].num_deepstack) for seed, script in enumerate(ROWS)]


@families
@pytest.mark.parametrize("design", DESIGNS)
def test_fusion_is_the_references(family: str, design: str) -> None:
    """Padded on either side, in turns that pad rows inside, token by token, on a static cache, and packed."""
    config, samples = config_of(family, design), samples_of(family)
    expected = reference_logits(config, random_weights(config), samples, FAMILIES[family].block)
    model, tolerance = model_of(config), FAMILIES[family].tolerance
    lengths = [len(one.input_ids) for one in samples]
    by_token = [[0] * (max(lengths) - length) + [1] * length for length in lengths]
    compare(run(model, samples, side="left"), expected, tolerance)
    compare(run(model, samples, side="right", turns=random_turns(samples, 4, Random(design))), expected, tolerance)
    cache = StaticCache(config=config.text_config, max_cache_len=128)
    compare(run(model, samples, turns=by_token, cache=cache), expected, tolerance)
    compare(packed(model, samples).split(lengths), expected, tolerance)


def packed(model: Any, samples: list[Sample]) -> Tensor:
    """Logits of all samples one after the other in one row."""
    images = [image for one in samples for image in one.images]
    ids = torch.tensor([[token for one in samples for token in one.input_ids]])
    starts = [sum(len(one.input_ids) for one in samples[:number]) for number in range(len(samples))]
    places = [start + image.position for start, one in zip(starts, samples, strict=True) for image in one.images]
    types = torch.zeros_like(ids)
    types[0, places] = torch.tensor([2 if image.is_frame else 1 for image in images])
    types[0, [start + index for start, one in zip(starts, samples, strict=True) for index in one.delimiters]] = 3
    index = torch.cat([torch.arange(len(one.input_ids)) for one in samples])[None]
    inputs = {"input_ids": ids, "position_ids": index, "mm_token_type_ids": types, "use_cache": False}
    return model(**inputs, **image_inputs(images)).logits[0]


@quick_families
def test_fusion_is_the_references_in_designs_at_random(family: str) -> None:
    random, samples, block = Random(family), samples_of(family), FAMILIES[family].block
    for config in (random_design(family, random) for _ in range(RANDOM_DESIGNS)):
        expected = reference_logits(config, random_weights(config), samples, block)
        model, tolerance = model_of(config), FAMILIES[family].tolerance
        compare(run(model, samples), expected, tolerance)
        compare(run(model, samples, turns=random_turns(samples, 4, random)), expected, tolerance)


def random_design(family: str, random: Random) -> CasaConfig:
    while True:
        fields = {axis: random.choice(values) for axis, values in AXES.items()}
        try:
            return FAMILIES[family].casa_config(**fields)
        except ValueError:  # a combination that has no meaning
            continue


@families
@pytest.mark.parametrize("design", DESIGNS)
def test_mistakes_in_fusion_are_noticed(family: str, design: str) -> None:
    config, block = config_of(family, design), FAMILIES[family].block
    weights, [one, *_] = random_weights(config), samples_of(family)
    [expected] = reference_logits(config, weights, [one], block)

    def assert_noticed(name: str, one: Sample, block: type[Block], config: CasaConfig = config) -> None:
        assert relative_error(reference_logits(config, weights, [one], block)[0], expected) > NOTICED, name

    others = tuple(replace(image, features=-image.features) for image in one.images)
    assert_noticed("other images", replace(one, images=others), block)
    without_positions = {"other dimensions rotate together"} if config.casa_keys == "image" else set()
    for name, mistake in FUSION_MISTAKES.items():
        if name not in needless(block) | OUTSIDE_FUSION | without_positions:
            assert_noticed(name, one, mistaken(block, mistake, ("fusion",)))
    if config.casa_keys != "image":
        moved = config_of(family, design)
        moved.casa_image_positions = "at" if config.casa_image_positions == "before" else "before"
        assert_noticed("images elsewhere", one, block, moved)
        if "mrope_section" in config.text_config.rope_parameters:
            turned = tuple(replace(image, grid=image.grid[::-1]) for image in one.images)
            assert_noticed("height and width exchanged", replace(one, images=turned), block)


# ------------------------------------------------------------------------------------- generation, training


@quick_families
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_generation_equals_generation_without_a_cache(family: str, attention: str) -> None:
    """Greedy and beams, on growing and static caches, for a padded batch with 0, 1 and 2 images in a row."""
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
    for config in (FAMILIES[family].casa_config(), random_design(family, Random(f"{family} {attention}"))):
        model = randomised(CasaForConditionalGeneration._from_config(config, attn_implementation=attention)).float()
        for beams in (1, 3):
            expected = model.generate(**inputs, num_beams=beams, use_cache=False)
            for kind in ("dynamic", "static"):
                actual = model.generate(**inputs, num_beams=beams, cache_implementation=kind)
                assert torch.equal(actual, expected), (config, beams, kind)


@families
@pytest.mark.parametrize("updates", ["none", "ffn", "full"])
def test_gradient_checkpointing_changes_no_gradient(family: str, updates: str) -> None:
    """Updated image states are inputs and outputs of every block, so their gradients must pass through checkpoints."""
    config = FAMILIES[family].casa_config(casa_image_updates=updates)
    model = randomised(CasaForConditionalGeneration(config)).train()
    one = sample("2 2x3 3 1x2 2", 0, FAMILIES[family].num_deepstack)
    ids, images = torch.tensor([one.input_ids]), image_inputs(list(one.images))
    features = images["image_embeds"].requires_grad_()

    def gradients() -> Tensors:
        model.zero_grad()
        features.grad = None
        with torch.enable_grad():
            model(ids, labels=ids, use_cache=False, **images).loss.backward()
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


# ------------------------------------------------------------------------------------- files


@cache
def tokenizer(text_only: bool) -> Any:
    return build_text_tokenizer() if text_only else build_tokenizer()


def write_source(folder: Path, family: str, tied: bool) -> Path:
    """A checkpoint of the family as the stock class saves it, with the files of a processor."""
    made = FAMILIES[family]
    words = tokenizer(made.text_only)
    config = made.source_config(vocab_size=len(words))
    config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = tied
    if not made.text_only:
        config.image_token_id, config.video_token_id, config.vision_start_token_id, config.vision_end_token_id = (
            words.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"])
        )
    randomised(made.source(config)).float().save_pretrained(folder)
    words.save_pretrained(folder)
    if not made.text_only:
        (folder / "preprocessor_config.json").write_text(json.dumps({**IMAGE_PROCESSOR, "patch_size": 4}))
    return folder


@families
@pytest.mark.parametrize("tied", [False, True])
def test_conversion_and_back(family: str, tied: bool, tmp_path: Path) -> None:
    """Bit for bit, from either layout of the names; a source that is loaded without conversion is the same model."""
    source, vision = write_source(tmp_path / "source", family, tied), None
    if FAMILIES[family].text_only:
        vision = write_source(tmp_path / "vision", tower_owner(family), tied)
    tensors = load_weights(source)
    rows = len(tokenizer(FAMILIES[family].text_only))

    def of_source(tensors: Tensors) -> Tensors:
        """Without the tower that a text-only source is given, and rows of tokens that are added for it."""
        if vision is None:
            return tensors
        by_token, added = ("embed_tokens.weight", "lm_head.weight"), ("model.visual.", "model.multi_modal_projector.")
        own = {name: x for name, x in tensors.items() if not name.startswith(added)}
        return {name: x[:rows] if name.endswith(by_token) else x for name, x in own.items()}

    for layout in (older_layout, in_memory_layout):
        folder = altered(source, tmp_path / layout.__name__, weights=layout)
        output = convert_checkpoint(folder, tmp_path / "casa", vision_from=vision, overwrite=True).output
        assert_same(of_source(load_weights(output)), converted(layout(tensors), list(FAMILIES[family].fusable)))
        convert_to_source(output, tmp_path / "back", overwrite=True)
        stored = dict(zip(tensors, layout(tensors).values(), strict=True))  # experts as they were found
        assert_same(load_weights(tmp_path / "back"), stored)
    stock, info = FAMILIES[family].source.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info.values()), info
    original = FAMILIES[family].source.from_pretrained(source).config.to_dict()
    assert {**stock.config.to_dict(), "_name_or_path": str(source)} == original

    # What config.json of a text-only source doesn't tell.
    towers = (
        {} if vision is None else {"config": FAMILIES[family].casa_config(source=AutoConfig.from_pretrained(source))}
    )
    loaded = CasaForConditionalGeneration.from_pretrained(source, **towers)
    expected = CasaForConditionalGeneration.from_pretrained(output)
    assert_same(of_source(loaded.state_dict()), of_source(expected.state_dict()))


def tower_owner(family: str) -> str:
    """A family whose tower a text-only one can be given."""
    kind = FAMILIES[family].casa_config().vision_config.model_type
    return next(
        name
        for name, other in FAMILIES.items()
        if not other.text_only and other.source_config().vision_config.model_type == kind
    )
