# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The dense reference against the stock source models, then the model against the dense reference.

Errors are max|difference| / max|expected|.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    Cache,
    DynamicCache,
    PreTrainedModel,
    Qwen2_5_VLForConditionalGeneration,
)

from casa_hf import CasaConfig, CasaForConditionalGeneration
from casa_hf.design_space import CHOICES, VARIANTS
from tests import tiny
from tests.reference import Image, Sample, reference_logits
from tests.sources import in_float64

TOLERANCE = 1e-6
LAYER = "model.language_model.layers.{}."

# Words of `tiny.sample`: images of different sizes, a group of two, text before, between and after.
SEVERAL = "4 2x3 5 3x1 2x2 6 1x4 3"


def error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual - expected).abs().max() / expected.abs().max())


class Insertion:
    """A sample as the source sees it: image tokens inserted into the text."""

    def __init__(self, source: PreTrainedModel, sample: Sample) -> None:
        self.source, self.sample = source, sample
        self.ids: list[int] = []
        self.owners: list[int | None] = []  # the image that a token belongs to, None for text
        for t, token in enumerate(sample.input_ids):
            for j, image in enumerate(sample.images):
                if image.position == t:
                    self.ids += [tiny.IMAGE_PAD] * len(image.features)
                    self.owners += [j] * len(image.features)
            self.ids.append(token)
            self.owners.append(None)
        self.is_text = torch.tensor([owner is None for owner in self.owners])

    def embeds(self) -> Tensor:
        embeds = self.source.get_input_embeddings()(torch.tensor(self.ids))
        embeds[~self.is_text] = torch.cat([image.features for image in self.sample.images])
        return embeds[None]

    def inputs(self) -> dict[str, Tensor]:
        positions, _ = self.source.model.get_rope_index(
            input_ids=torch.tensor([self.ids]),
            image_grid_thw=torch.tensor([[1, 2 * h, 2 * w] for h, w in (i.grid for i in self.sample.images)]),
            mm_token_type_ids=(~self.is_text)[None].int(),
        )
        return {"inputs_embeds": self.embeds(), "position_ids": positions}

    def text_logits(self, **inputs: Any) -> Tensor:
        """The source's logits at the text tokens."""
        return self.source(**(self.inputs() | inputs)).logits[0, self.is_text]


@pytest.fixture(scope="module", autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def source() -> PreTrainedModel:
    """A stock Qwen2.5-VL with `tiny.random_weights` in its language model."""
    model = Qwen2_5_VLForConditionalGeneration(tiny.source_config()).double().eval()
    loaded = model.load_state_dict(tiny.random_weights(tiny.casa_config("insertion")), strict=False)
    assert not loaded.unexpected_keys
    assert all(name.startswith("model.visual.") for name in loaded.missing_keys)
    for name, parameter in model.model.visual.named_parameters():
        parameter.copy_(tiny.random_tensor(name, tuple(parameter.shape)))
    return model


@pytest.mark.parametrize("variant", ["casa", "ca-shared", "casa-before", "exact"])
def test_reference_on_text_is_the_source(source: PreTrainedModel, variant: str) -> None:
    config = tiny.casa_config(variant)
    sample = tiny.sample("30")
    [logits] = reference_logits(config, tiny.random_weights(config), [sample])
    assert error(logits, source(input_ids=torch.tensor([sample.input_ids])).logits[0]) < TOLERANCE


@pytest.mark.parametrize("script", [SEVERAL, "b2x2 3 f1x2 f1x2 4 1x1", "2x3 4 2x3"])
def test_reference_insertion_is_the_source(source: PreTrainedModel, script: str) -> None:
    config = tiny.casa_config("insertion")
    sample = tiny.sample(script)
    [logits] = reference_logits(config, source.state_dict(), [sample])
    assert error(logits, Insertion(source, sample).text_logits()) < TOLERANCE


def test_reference_insertion_is_the_source_from_pixels_on(source: PreTrainedModel) -> None:
    config = tiny.casa_config("insertion")
    sample, pixels, grids = with_pixels(source, tiny.sample(SEVERAL))
    inserted = Insertion(source, sample)
    logits = source(
        input_ids=torch.tensor([inserted.ids]),
        pixel_values=pixels,
        image_grid_thw=grids,
        mm_token_type_ids=(~inserted.is_text)[None].int(),
    ).logits[0, inserted.is_text]
    assert error(reference_logits(config, source.state_dict(), [sample])[0], logits) < TOLERANCE


def with_pixels(model: PreTrainedModel, sample: Sample) -> tuple[Sample, Tensor, Tensor]:
    """The sample with features that the vision tower of `model` makes of random pixels, the pixels and their grids."""
    grids = torch.tensor([[1, 2 * height, 2 * width] for height, width in (image.grid for image in sample.images)])
    pixels = tiny.random_tensor("pixels", (int(grids.prod(-1).sum()), 3 * 2 * 4 * 4))
    merged = model.model.visual(pixels, grid_thw=grids).pooler_output.split((grids.prod(-1) // 4).tolist())
    images = tuple(replace(image, features=new) for image, new in zip(sample.images, merged, strict=True))
    return replace(sample, images=images), pixels, grids


@pytest.mark.parametrize("script", ["4 2x3 7", "4 2x3 3x1 1x2 7", "f2x3 f2x3 7"])
def test_reference_exact_is_the_source_for_one_group(source: PreTrainedModel, script: str) -> None:
    config = tiny.casa_config("exact", casa_video_history="group")
    sample = tiny.sample(script)
    [logits] = reference_logits(config, source.state_dict(), [sample])
    assert error(logits, Insertion(source, sample).text_logits()) < TOLERANCE
    [two_groups] = reference_logits(config, source.state_dict(), [tiny.sample(script + " " + script)])
    assert error(two_groups, Insertion(source, tiny.sample(script + " " + script)).text_logits()) > 1e-2


def test_reference_latest_is_the_source_with_evicted_images(source: PreTrainedModel) -> None:
    config = tiny.casa_config("exact", casa_image_history="latest")
    sample = tiny.sample(SEVERAL)
    inserted = Insertion(source, sample)
    length = len(inserted.owners)
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    for query in range(length):
        newest = max((owner for owner in inserted.owners[: query + 1] if owner is not None), default=None)
        for key, owner in enumerate(inserted.owners):
            if owner is not None and owner != newest:
                mask[query, key] = False
    [logits] = reference_logits(config, source.state_dict(), [sample])
    assert error(logits, inserted.text_logits(attention_mask=mask[None, None])) < TOLERANCE
    assert error(logits, inserted.text_logits()) > 1e-2


def copied_from_self_attention(weights: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Weights whose fusion layers are copies of self-attention, as right after a conversion."""
    copied = dict(weights)
    for index in range(layers):
        prefix = LAYER.format(index)
        for name, tensor in weights.items():
            if name.startswith(prefix + "self_attn."):
                copied[name.replace("self_attn", "casa_attn")] = tensor
        copied[prefix + "casa_attn.image_norm.weight"] = weights[prefix + "input_layernorm.weight"]
        copied[prefix + "casa_layernorm.weight"] = weights[prefix + "input_layernorm.weight"]
    return copied


@pytest.mark.parametrize(
    ("fields", "other"),
    [
        pytest.param({}, {"casa_share_projections": True}, id="copied projections are shared ones"),
        pytest.param({"casa_keys": "image"}, {"casa_keys": "image", "casa_share_projections": True}, id="image keys"),
        pytest.param(
            {"casa_placement": "before"},
            {"casa_placement": "before", "casa_share_projections": True},
            id="shared projections applied twice",
        ),
        pytest.param({"casa_layers": [1]}, {"casa_layers": [1], "casa_share_projections": True}, id="one block"),
    ],
)
def test_reference_designs_that_must_agree(fields: dict[str, Any], other: dict[str, Any]) -> None:
    weights = copied_from_self_attention(tiny.random_weights(tiny.casa_config("insertion")), 3)
    sample = tiny.sample(SEVERAL)
    [one] = reference_logits(tiny.casa_config(**fields), weights, [sample])
    [two] = reference_logits(tiny.casa_config(**other), weights, [sample])
    assert error(one, two) < TOLERANCE


def test_reference_replaced_by_a_copy_is_the_source_before_images(source: PreTrainedModel) -> None:
    config = tiny.casa_config("casa-replace")
    weights = copied_from_self_attention(tiny.random_weights(tiny.casa_config("insertion")), 3)
    sample = tiny.sample("6 2x2 3")
    [logits] = reference_logits(config, weights, [sample])
    before_image = source(input_ids=torch.tensor([sample.input_ids])).logits[0, :7]
    assert error(logits[:7], before_image) < TOLERANCE


def test_reference_before_is_insertion_geometry_where_no_text_precedes(source: PreTrainedModel) -> None:
    sample = tiny.sample("b2x3 9")
    config = tiny.casa_config("exact", casa_positions="contiguous", casa_image_positions="before")
    [logits] = reference_logits(config, source.state_dict(), [sample])
    # Positions of the two differ by a constant; float32 angles feel it.
    expected = Insertion(source, sample).text_logits()
    assert error(logits, expected) < 1e-5
    [at] = reference_logits(tiny.casa_config("exact", casa_positions="contiguous"), source.state_dict(), [sample])
    assert error(at, expected) > 1e-2


@pytest.mark.parametrize(
    ("histories", "images", "window_start"),
    [
        (("latest", "latest"), [3], 9),
        (("group", "latest"), [3], 9),
        (("latest", "group"), [2, 3], 7),
        (("group", "group"), [1, 2, 3], 5),
        (("all", "latest"), [0, 1, 3], 9),
        (("latest", "all"), [2, 3], 9),
        (("all", "all"), [0, 1, 2, 3], 9),
    ],
)
def test_reference_histories(histories: tuple[str, str], images: list[int], window_start: int) -> None:
    """What the last token sees, measured by changing one image or one token at a time in a model of one block."""
    source = tiny.source_config(num_hidden_layers=1)
    config = tiny.casa_config("casa", source, casa_image_history=histories[0], casa_video_history=histories[1])
    weights = tiny.random_weights(config)
    # Without self-attention the last token depends on the others through the fusion layer alone.
    weights[LAYER.format(0) + "self_attn.o_proj.weight"] = torch.zeros(tiny.HIDDEN, tiny.HIDDEN).double()
    sample = tiny.sample("1 1x1 1 1x1 f1x1 f1x1 1")
    assert [image.position for image in sample.images] == [2, 5, 7, 9]

    def last(sample: Sample) -> Tensor:
        return reference_logits(config, weights, [sample])[0][-1]

    seen_images = [j for j in range(4) if not torch.equal(last(with_image_changed(sample, j)), last(sample))]
    seen_text = [t for t in range(10) if not torch.equal(last(with_token_changed(sample, t)), last(sample))]
    assert seen_images == images
    assert seen_text == list(range(window_start, 10))


def with_image_changed(sample: Sample, j: int) -> Sample:
    images = list(sample.images)
    images[j] = replace(images[j], features=-images[j].features)
    return replace(sample, images=tuple(images))


def with_token_changed(sample: Sample, t: int) -> Sample:
    """Another token of the same kind (delimiter or text), so that groups stay what they are."""
    ids = list(sample.input_ids)
    ids[t] = {tiny.START: tiny.END, tiny.END: tiny.START}.get(ids[t], ids[t] + 1)
    return replace(sample, input_ids=ids)


GISTS: dict[str, Any] = {"num_gist_tokens": 2, "gist_token_ids": tiny.GISTS}
DESIGN_CHANGES: list[tuple[str, dict[str, Any]]] = [
    ("casa", {"casa_share_projections": True}),
    ("casa", {"casa_keys": "image"}),
    ("casa-shared", {"casa_keys": "context"}),
    ("casa", {"casa_layers": [0, 1]}),
    ("casa", {"casa_placement": "before"}),
    ("casa", {"casa_placement": "after"}),
    ("casa-before", {"casa_placement": "after"}),
    ("casa-before", {"casa_share_projections": True}),
    ("casa", {"casa_placement": "replace", "casa_text_windows": True}),
    ("casa", {"casa_image_updates": "ffn"}),
    ("casa-ffn", {"casa_image_updates": "full"}),
    ("casa", {"casa_image_history": "latest"}),
    ("casa", {"casa_image_history": "all"}),
    ("casa", {"casa_video_history": "group"}),
    ("casa", {"casa_video_history": "all"}),
    ("exact", {"casa_positions": "contiguous"}),
    ("casa", {"casa_image_positions": "before"}),
    ("casa", {"casa_text_windows": True}),
    ("casa", {"casa_image_norm": "none"}),
    ("ca-shared", {"casa_image_norm": "none"}),
    ("casa", {"casa_gate": "tanh"}),
    ("casa", GISTS),
]


@pytest.mark.parametrize(
    ("variant", "change"), DESIGN_CHANGES, ids=[f"{variant} {change}" for variant, change in DESIGN_CHANGES]
)
def test_reference_feels_every_choice(variant: str, change: dict[str, Any]) -> None:
    """No choice of the design space is lost on these weights and samples, so a model that ignored one would show."""
    sample = tiny.sample("4 g2x3 5 3x1 2x2 6 f1x4 f2x2 3")
    one, other = (tiny.casa_config(variant, **fields) for fields in ({}, change))
    [expected] = reference_logits(one, tiny.random_weights(one), [sample])
    [changed] = reference_logits(other, tiny.random_weights(other), [sample])
    assert error(changed, expected) > 1e-2


# The four in which histories, layers and backends are crossed; other tests run every named variant.
CROSSED = ["casa", "ca", "casa-shared", "ca-shared"]
HISTORIES = [("group", "latest"), ("latest", "group"), ("group", "group"), ("latest", "latest")]

# Rows of one batch.
ROWS = {
    "several images": SEVERAL,
    "no image": "9",
    "adjacent images, one group": "2 2x1 1x3 2x2 7",
    "image first": "e2x3 6 1x2 2",
    "image last": "5 1x4 8 3x2",
    "equal pixels twice": "3 2x2 4 s2x2 5",
    "frames": "3 f2x2 f1x3 4 2x2 f2x1 f1x2 3x1 1x1 2",
    "images with their times": "2 d2 f2x2 d1 f1x3 d3 4 d2 2x2 d2 3x1 3 f1x1 d1 f2x1 1 d2",
}


def rows() -> list[Sample]:
    return [tiny.sample(script, seed) for seed, script in enumerate(ROWS.values())]


def design(variant: str, histories: tuple[str, str], layers: list[int] | None = None) -> CasaConfig:
    return tiny.casa_config(
        variant, casa_image_history=histories[0], casa_video_history=histories[1], casa_layers=layers
    )


def model_of(config: CasaConfig, attention: str = "sdpa") -> CasaForConditionalGeneration:
    """The model with `tiny.random_weights`, float64; every tensor of the contract has its place in it."""
    config._attn_implementation = attention
    model = in_float64(CasaForConditionalGeneration(config))
    loaded = model.load_state_dict(tiny.random_weights(config), strict=False)
    assert not loaded.unexpected_keys
    assert all(name.startswith(("model.visual.", "model.multi_modal_projector.")) for name in loaded.missing_keys)
    assert model.model.language_model.config._attn_implementation == attention
    return model


def run(
    model: CasaForConditionalGeneration,
    samples: list[Sample],
    *,
    side: str = "left",
    turns: list[list[int]] | None = None,
    cache: Cache | None = None,
    by_marks: bool = True,
    **inputs: Any,
) -> list[Tensor]:
    """The logits of samples that share a batch, each without its padding.

    Args:
        model: the model under test.
        samples: the rows.
        side: where shorter rows are padded.
        turns: for each row the numbers of tokens that it receives in each call; one call without a cache if None.
        cache: what calls are continued with; a growing cache if None.
        by_marks: whether the model finds the images' places in the text or is told them.
        **inputs: further inputs of every call.
    """
    if turns is not None and cache is None:
        cache = DynamicCache()
    turns = [[len(sample.input_ids)] for sample in samples] if turns is None else turns
    logits: list[list[Tensor]] = [[] for _ in samples]
    begins = [0] * len(samples)
    masks = torch.zeros(len(samples), 0, dtype=torch.long)
    for lengths in zip(*turns, strict=True):
        width = max(lengths)
        ids = torch.full((len(samples), width), tiny.PAD)
        mask, types = torch.zeros_like(ids), torch.zeros_like(ids)
        images, places = [], []
        for row, (sample, begin, length) in enumerate(zip(samples, begins, lengths, strict=True)):
            first = width - length if side == "left" else 0
            ids[row, first : first + length] = torch.tensor(list(sample.input_ids[begin : begin + length]))
            mask[row, first : first + length] = 1
            for index in sample.delimiters:
                if begin <= index < begin + length:
                    types[row, first + index - begin] = 3
            for image in sample.images:
                if begin <= image.position < begin + length:
                    places.append([row, first + image.position - begin])
                    types[row, places[-1][1]] = 2 if image.is_frame else 1
                    images.append(image)
        masks = torch.cat([masks, mask], dim=1)
        call: dict[str, Any] = {"input_ids": ids, "mm_token_type_ids": types, **image_inputs(images), **inputs}
        if not bool(masks.all()):
            call["attention_mask"] = masks
        if images and not by_marks:
            call["image_positions"] = torch.tensor(places)
        output = model(**call, cache=cache, use_cache=cache is not None).logits
        for row, kept in enumerate(mask.bool()):
            logits[row].append(output[row, kept])
        begins = [begin + length for begin, length in zip(begins, lengths, strict=True)]
    assert begins == [len(sample.input_ids) for sample in samples]
    return [torch.cat(parts) for parts in logits]


def random_turns(samples: list[Sample], calls: int, random: Random) -> list[list[int]]:
    """For each sample, how many of its tokens each call brings: at least one call brings something to some row."""
    turns = []
    for sample in samples:
        length = len(sample.input_ids)
        cuts = [0, *sorted(random.choices(range(length + 1), k=calls - 1)), length]
        turns.append([end - begin for begin, end in pairwise(cuts)])
    used = [call for call, lengths in enumerate(zip(*turns, strict=True)) if any(lengths)]
    return [[row[call] for call in used] for row in turns]


def image_inputs(images: list[Image]) -> dict[str, Tensor]:
    if not images:
        return {}
    return {
        "image_embeds": torch.cat([torch.cat([image.features, *image.deepstack], dim=-1) for image in images]),
        "image_grid_thw": torch.tensor([[1, 2 * image.grid[0], 2 * image.grid[1]] for image in images]),
    }


def check(actual: list[Tensor], config: CasaConfig, samples: list[Sample]) -> None:
    """The model's logits against those of each sample by itself."""
    compare(actual, reference_logits(config, tiny.random_weights(config), samples))


def compare(actual: list[Tensor], expected: list[Tensor], tolerance: float = TOLERANCE) -> None:
    errors = [error(one.double(), other) for one, other in zip(actual, expected, strict=True)]
    assert all(e < tolerance for e in errors), errors


@pytest.mark.parametrize(
    ("histories", "layers"),
    [*((names, None) for names in HISTORIES), (HISTORIES[0], [1])],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else str(value),
)
@pytest.mark.parametrize("variant", CROSSED)
def test_model_on_a_mixed_batch(variant: str, histories: tuple[str, str], layers: list[int] | None) -> None:
    """In one call, and in turns in which rows receive different parts of their text and images, or nothing."""
    config, samples = design(variant, histories, layers), rows()
    expected = reference_logits(config, tiny.random_weights(config), samples)
    turns = random_turns(samples, 6, Random(f"{variant} {histories}"))
    model = model_of(config)
    compare(run(model, samples, side="left"), expected)
    compare(run(model, samples, side="right"), expected)
    compare(run(model, samples, side="right", turns=turns), expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant(variant: str) -> None:
    config, samples, random = tiny.casa_config(variant), rows(), Random(variant)
    expected = reference_logits(config, tiny.random_weights(config), samples)
    model = model_of(config)
    compare(run(model, samples, side="left"), expected)
    compare(run(model, samples, side="right"), expected)
    compare(run(model, samples, side="left", turns=random_turns(samples, 5, random)), expected)
    compare(run(model, samples, side="right", turns=random_turns(samples, 3, random)), expected)
    model = model_of(config, "eager")
    compare(run(model, samples, side="right"), expected)
    # Stock eager attention turns a query without keys, such as left padding, into NaN in float64, but not in float32.
    compare(run(model.float(), samples, side="left"), expected, tolerance=2e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_model_with_images_before_any_token(variant: str) -> None:
    config, sample = tiny.casa_config(variant), tiny.sample("b2x3 5 b1x2 b3x1 4 b2x1 1")
    check(run(model_of(config), [sample], by_marks=False), config, [sample])


def test_model_without_padding_mask_and_with_embedded_text() -> None:
    config, sample = tiny.casa_config("casa"), tiny.sample(SEVERAL)
    model = model_of(config)
    embeds = model.get_input_embeddings()(torch.tensor([sample.input_ids]))
    places = torch.tensor([[0, image.position] for image in sample.images])
    output = model(inputs_embeds=embeds, image_positions=places, **image_inputs(list(sample.images)))
    check([output.logits[0]], config, [sample])


@pytest.mark.parametrize(
    ("variant", "attention"), [(variant, "sdpa") for variant in (*CROSSED, "exact")] + [("casa", "eager")]
)
def test_model_token_by_token(variant: str, attention: str) -> None:
    config, sample = tiny.casa_config(variant), tiny.sample(ROWS["frames"] + " 2x2 1x3 2")
    turns = [[1] * len(sample.input_ids)]
    check(run(model_of(config, attention), [sample], turns=turns), config, [sample])


def test_model_with_dozens_of_images() -> None:
    config = tiny.casa_config("casa")
    sample = tiny.sample("2 " + "1x2 1 2x1 2x3 3 " * 12)
    assert len(sample.images) == 36
    check(run(model_of(config), [sample]), config, [sample])


COMBINATIONS: list[tuple[str, dict[str, Any]]] = [
    ("casa", GISTS | {"casa_text_windows": True}),
    ("exact", GISTS),
    ("casa-replace", GISTS),
    ("casa-shared", {"casa_gate": "tanh", "casa_text_windows": True}),
    ("casa-shared", {"casa_placement": "after", "casa_gate": "tanh"}),
    ("casa-shared", {"casa_placement": "before", "casa_image_norm": "none"}),
    ("ca-ffn", {"casa_image_norm": "none"}),
    ("ca-shared", {"casa_placement": "before", "casa_image_updates": "full"}),
    ("casa", {"casa_placement": "after", "casa_image_updates": "full", "casa_image_positions": "before"}),
    ("exact", {"casa_layers": [1], "casa_positions": "contiguous", "casa_image_positions": "before"}),
]


@pytest.mark.parametrize(
    ("variant", "change"),
    DESIGN_CHANGES + COMBINATIONS,
    ids=[f"{variant} {change}" for variant, change in DESIGN_CHANGES + COMBINATIONS],
)
def test_model_at_every_choice(variant: str, change: dict[str, Any]) -> None:
    config, random = tiny.casa_config(variant, **change), Random(variant)
    samples = [tiny.sample("3 gists 2 g2x3 3x1 4 f1x2 gf2x2 2 g2x1 3"), tiny.sample("gists 2 f1x2 1x1 gists 3")]
    expected = reference_logits(config, tiny.random_weights(config), samples)
    model = model_of(config)
    compare(run(model, samples), expected)
    compare(run(model, samples, side="right", turns=random_turns(samples, 4, random)), expected)
    compare(run(model_of(config, "eager"), samples, side="right"), expected)


@pytest.mark.parametrize("seed", range(25))
def test_model_at_random(seed: int) -> None:
    """Any point of the design space, delimiters anywhere, images before any token and several before the same one."""
    random = Random(seed)
    config = random_design(random)
    samples = [random_sample(random) for _ in range(random.randint(1, 4))]
    turns = random_turns(samples, seed % 5, random) if seed % 5 else None
    side = random.choice(["left", "right"])
    check(run(model_of(config), samples, side=side, turns=turns, by_marks=False), config, samples)


def random_design(random: Random) -> CasaConfig:
    while True:
        fields: dict[str, Any] = {field: random.choice(values) for field, values in CHOICES.items()}
        fields["casa_share_projections"] = random.random() < 0.5
        fields["casa_text_windows"] = random.random() < 0.5
        fields["casa_layers"] = random.choice([None, [1], [0, 2]])
        if random.random() < 0.4:
            fields |= {"num_gist_tokens": 2, "gist_token_ids": tiny.GISTS}
        try:
            return tiny.casa_config(**fields)
        except ValueError:  # a combination that has no meaning
            continue


def random_sample(random: Random) -> Sample:
    choices = [tiny.START, tiny.END, *tiny.GISTS, *range(10, 14)]
    tokens = random.choices(choices, k=random.randint(1, 22))
    images: list[Image] = []
    for position in sorted(random.choices(range(len(tokens)), k=random.choice([0, 1, 2, 3, 5]))):
        grid = random.randint(1, 3), random.randint(1, 3)
        # Whether images are frames is said per token.
        is_frame = images[-1].is_frame if images and images[-1].position == position else random.random() < 0.4
        images.append(Image(position, grid, tiny.features(*grid, seed=random.randrange(10**6)), is_frame))
    others = [index for index in range(len(tokens)) if all(index != image.position for image in images)]
    delimiters = [index for index in others if random.random() < 0.3]
    return Sample(tokens, tuple(images), delimiters=delimiters)


def test_model_reads_marks_without_images_as_text() -> None:
    config, sample, later = tiny.casa_config("casa"), tiny.sample("4 2x3 5"), tiny.sample("2 1x1 3", seed=1)
    model, cache = model_of(config), DynamicCache()
    model(input_ids=torch.tensor([sample.input_ids]), cache=cache, **image_inputs(list(sample.images)))
    logits = model(input_ids=torch.tensor([later.input_ids]), cache=cache).logits[0]
    whole = replace(sample, input_ids=[*sample.input_ids, *later.input_ids])
    [expected] = reference_logits(config, tiny.random_weights(config), [whole])
    assert error(logits, expected[len(sample.input_ids) :]) < TOLERANCE


def test_model_from_pixels_on() -> None:
    config = tiny.casa_config("casa")
    model = model_of(config)
    for name, parameter in model.model.visual.named_parameters():
        parameter.copy_(tiny.random_tensor(name, tuple(parameter.shape)))
    sample, pixels, grids = with_pixels(model, tiny.sample(SEVERAL))
    output = model(input_ids=torch.tensor([sample.input_ids]), pixel_values=pixels, image_grid_thw=grids)
    check([output.logits[0]], config, [sample])


# In the first row an image ends a sample and another begins the next: no group reaches over the border.
PACKED = [["4 2x3 d1 3x1", "e2x2 6", "7"], ["5", "e1x2 3 d2 f2x2 d1 f1x1 3", "2 2x2 d2 1x1 4"]]


def packed_rows(positions: str) -> tuple[list[list[Sample]], dict[str, Tensor]]:
    """Rows of several samples each, and their input ids and position ids.

    Under "4 rows" the rotary positions aren't the text index, so that each must be used in its place.
    """
    packed = [[tiny.sample(script, seed=7 * row + i) for i, script in enumerate(PACKED[row])] for row in range(2)]
    lengths = [sum(len(sample.input_ids) for sample in row) for row in packed]
    packed[lengths.index(min(lengths))].append(tiny.sample(str(max(lengths) - min(lengths)), seed=50))
    index = torch.stack([torch.cat([torch.arange(len(sample.input_ids)) for sample in row]) for row in packed])
    ids = torch.tensor([[token for sample in row for token in sample.input_ids] for row in packed])
    if positions == "2-D":
        return packed, {"input_ids": ids, "position_ids": index}
    packed = [[replace(sample, positions=jumping_positions(sample)) for sample in row] for row in packed]
    rotary = torch.stack([torch.cat([sample.positions for sample in row], dim=1) for row in packed], dim=1)
    return packed, {"input_ids": ids, "position_ids": torch.cat([index[None], rotary])}


def jumping_positions(sample: Sample) -> Tensor:
    """(3, T) positions that aren't the text index: steps of 1 to 3, different on each axis."""
    generator = torch.Generator().manual_seed(len(sample.input_ids))
    return torch.randint(1, 4, (3, len(sample.input_ids)), generator=generator).cumsum(-1)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("positions", ["2-D", "4 rows"])
@pytest.mark.parametrize("masked", [False, True])
def test_model_on_packed_samples(variant: str, positions: str, masked: bool) -> None:
    config = tiny.casa_config(variant)
    packed, text = packed_rows(positions)
    samples = [sample for row in packed for sample in row]
    images = [image for sample in samples for image in sample.images]
    types = torch.zeros_like(text["input_ids"])
    frames = torch.tensor([2 if image.is_frame else 1 for image in images])
    types[text["input_ids"] == tiny.END] = frames
    delimiters = [index in sample.delimiters for sample in samples for index in range(len(sample.input_ids))]
    types[torch.tensor(delimiters).view_as(types)] = 3
    if masked:
        text["attention_mask"] = torch.ones_like(types)
    output = model_of(config)(**text, **image_inputs(images), mm_token_type_ids=types, use_cache=False).logits
    lengths = [len(sample.input_ids) for sample in samples]
    check(list(output.flatten(0, 1).split(lengths)), config, samples)


@pytest.mark.parametrize("variant", ["casa", "casa-shared", "insertion"])
def test_model_with_given_positions(variant: str) -> None:
    config, plain = tiny.casa_config(variant), tiny.sample(SEVERAL)
    sample = replace(plain, positions=jumping_positions(plain))
    index = torch.arange(len(sample.input_ids))[None, None]
    for position_ids in (sample.positions[:, None], torch.cat([index, sample.positions[:, None]])):
        logits = run(model_of(config), [sample], position_ids=position_ids)
        check(logits, config, [sample])
        assert error(logits[0], reference_logits(config, tiny.random_weights(config), [plain])[0]) > 1e-2


def test_reference_feels_every_mistake() -> None:
    """Mistakes that a model could make, made in the sample: each is far outside the tolerance."""
    config, sample = design("casa", ("group", "group")), tiny.sample("4 2x3 5 3x2 2x3 6 f1x4 3")
    weights = tiny.random_weights(config)
    [expected] = reference_logits(config, weights, [sample])
    first, second, third, fourth = sample.images
    exchanged = replace(first, features=third.features), second, replace(third, features=first.features), fourth
    mistakes = {
        "two images exchanged": exchanged,
        "an image lost": (first, second, third),
        "an image moved by one token": (replace(first, position=first.position - 1), second, third, fourth),
        "image tokens in the wrong order": (first, replace(second, features=second.features.flip(0)), third, fourth),
        "height and width exchanged": (first, replace(second, grid=(2, 3)), third, fourth),
    }
    for name, images in mistakes.items():
        [wrong] = reference_logits(config, weights, [replace(sample, images=images)])
        assert error(wrong, expected) > 1e-2, name
    stretched = replace(sample, positions=2 * torch.arange(len(sample.input_ids)).expand(3, -1))
    assert error(reference_logits(config, weights, [stretched])[0], expected) > 1e-2
