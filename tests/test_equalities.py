# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Three settings of CASA are the source model itself, for every family, in float64, from pixels to logits.

1. `insertion`: the source with image tokens inserted, for any number of images.
2. `exact`: the same where all images form one group, with no training.
3. `exact` with the history "latest": the source whose earlier images are evicted before each new one enters.
"""

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from transformers import (
    HeliumConfig,
    HeliumForCausalLM,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from casa_hf import CasaConfig, CasaForConditionalGeneration
from tests.tiny import END, IMAGE_PAD, START, TEXT, VIDEO_PAD, VISION, random_tensor, source_config

TOLERANCE = 1e-5
GRIDS = [(2, 3), (3, 1), (2, 2)]
ONE_GROUP = [5, 6, START, END, START, END, START, END, 7, 8, 9]
SEVERAL = [5, START, END, 7, 8, START, END, START, END, 9, 10, 11]
TOKENS = {
    "image_token_id": IMAGE_PAD,
    "video_token_id": VIDEO_PAD,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
TEXT_ONLY_TOKENS = {"image_token_id": END, "vision_start_token_id": START, "vision_end_token_id": END}


def qwen2_vl() -> Qwen2VLForConditionalGeneration:
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2}
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=dict(TEXT), vision_config=vision, **TOKENS))


def qwen2_5_vl() -> Qwen2_5_VLForConditionalGeneration:
    return Qwen2_5_VLForConditionalGeneration(source_config())


def qwen3_vl() -> Qwen3VLForConditionalGeneration:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 4, 4], "mrope_interleaved": True}
    text = {**TEXT, "head_dim": 24, "rope_parameters": rope}
    del text["max_window_layers"]
    vision = {
        "depth": 4,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": 4,
        "out_hidden_size": 64,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 2],
    }
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **TOKENS))


def helium() -> HeliumForCausalLM:
    text = {**TEXT, "head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    del text["max_window_layers"]
    return HeliumForCausalLM(HeliumConfig(**text))


FAMILIES = (qwen2_vl, qwen2_5_vl, qwen3_vl, helium)


@dataclass
class Case:
    """A source, its CASA form with the same weights, and pixels."""

    source: torch.nn.Module
    model: CasaForConditionalGeneration
    pixels: Tensor = field(init=False)
    grids: Tensor = field(init=False)

    def __post_init__(self):
        self.grids = torch.tensor([[1, 2 * h, 2 * w] for h, w in GRIDS])
        self.pixels = random_tensor("pixels", (int(self.grids.prod(-1).sum()), 3 * 2 * 4 * 4))

    def casa(self, ids, **kwargs) -> Tensor:
        """Logits of the CASA form."""
        images = {"pixel_values": self.pixels, "image_grid_thw": self.grids}
        return self.model(input_ids=torch.tensor([ids]), **images, **kwargs).logits[0]

    def inserted(self, ids) -> tuple[list[int], list[int | None]]:
        """The ids with placeholders, and the image that each belongs to."""
        tokens, owners, image = [], [], 0
        for token in ids:
            if token == END:
                count = GRIDS[image][0] * GRIDS[image][1]
                tokens += [IMAGE_PAD] * count
                owners += [image] * count
                image += 1
            tokens.append(token)
            owners.append(None)
        return tokens, owners

    def insertion(self, ids, mask=None) -> Tensor:
        """Logits of the source with image tokens inserted, at the text tokens."""
        is_text = torch.tensor([owner is None for owner in self.inserted(ids)[1]])
        return self.source_outputs(ids, attention_mask=mask).logits[0, is_text]

    def source_outputs(self, ids, **kwargs):
        """What the source gives for the ids with image tokens inserted."""
        tokens, owners = self.inserted(ids)
        is_text = torch.tensor([owner is None for owner in owners])
        if isinstance(self.source, HeliumForCausalLM):
            embeds = self.source.get_input_embeddings()(torch.tensor([tokens]))
            features = self.model.get_image_features(self.pixels, self.grids).pooler_output
            embeds[0, ~is_text] = torch.cat(features)
            inputs = {"inputs_embeds": embeds}
        else:
            inputs = {"input_ids": torch.tensor([tokens]), "image_grid_thw": self.grids}
            types = (~is_text)[None].int()
            inputs["position_ids"], _ = self.source.model.get_rope_index(**inputs, mm_token_type_ids=types)
            inputs |= {"pixel_values": self.pixels, "mm_token_type_ids": types}
        return self.source(**inputs, **kwargs)


def make_case(family, variant, **overrides) -> Case:
    source = randomised(family())
    if isinstance(source, HeliumForCausalLM):
        overrides |= {**TEXT_ONLY_TOKENS, "vision_config": {**VISION, "out_hidden_size": 48}}
    config = CasaConfig.from_source(source.config, variant, **overrides)
    model = randomised(CasaForConditionalGeneration(config))
    renamed = source.state_dict()
    if isinstance(source, HeliumForCausalLM):
        renamed = {k.replace("model.", "model.language_model.", 1): v for k, v in renamed.items()}
    loaded = model.load_state_dict(renamed, strict=False)
    assert not loaded.unexpected_keys
    text_only = isinstance(source, HeliumForCausalLM)
    new = ("casa_", *(("visual", "projector") if text_only else ()))
    assert all(any(part in name for part in new) for name in loaded.missing_keys)
    return Case(source, model)


def randomised(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(random_tensor(name, tuple(parameter.shape)))
    return model.double().eval()


def error(actual, expected) -> float:
    assert actual.shape == expected.shape
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("family", FAMILIES)
def test_insertion_is_the_source_for_any_number_of_images(family):
    case = make_case(family, "insertion")
    assert error(case.casa(SEVERAL), case.insertion(SEVERAL)) < TOLERANCE
    # `exact` hides earlier groups, so that the test can fail.
    assert error(make_case(family, "exact").casa(SEVERAL), case.insertion(SEVERAL)) > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_is_the_source_for_one_group(family):
    case = make_case(family, "exact")
    assert error(case.casa(ONE_GROUP), case.insertion(ONE_GROUP)) < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_latest_is_the_source_with_earlier_images_evicted(family):
    case = make_case(family, "exact", casa_image_history="latest")
    _, owners = case.inserted(SEVERAL)
    # From the first token of an image on, tokens of earlier images are gone.
    entered = [max((o for o in owners[: q + 1] if o is not None), default=-1) for q in range(len(owners))]
    mask = torch.tensor(
        [[k <= q and owners[k] in (None, entered[q]) for k in range(len(owners))] for q in range(len(owners))]
    )
    assert error(case.casa(SEVERAL), case.insertion(SEVERAL, mask[None, None])) < TOLERANCE
    assert error(case.casa(SEVERAL), case.insertion(SEVERAL)) > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", ["exact", "casa-shared", "casa", "casa-before"])
def test_text_alone_is_the_source(family, variant):
    case = make_case(family, variant)
    ids = torch.tensor([[5, 6, 7, 8, 9, START, END, 10]])
    assert torch.equal(case.model(ids).logits, case.source(ids).logits)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", ["exact", "insertion"])
def test_attentions_are_the_sources(family, variant):
    """Of text to text as `attentions`, of text to images as `cross_attentions`: one softmax in the source."""
    case = make_case(family, variant)
    case.model.set_attn_implementation("eager"), case.source.set_attn_implementation("eager")
    ours = case.model(
        input_ids=torch.tensor([ONE_GROUP]),
        pixel_values=case.pixels,
        image_grid_thw=case.grids,
        output_attentions=True,
    )
    is_text = torch.tensor([owner is None for owner in case.inserted(ONE_GROUP)[1]])
    theirs = case.source_outputs(ONE_GROUP, output_attentions=True).attentions
    assert len(ours.attentions) == len(ours.cross_attentions) == len(theirs)
    for to_text, to_images, both in zip(ours.attentions, ours.cross_attentions, theirs, strict=True):
        assert error(to_text, both[:, :, is_text][..., is_text]) < TOLERANCE
        assert error(to_images, both[:, :, is_text][..., ~is_text]) < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_generates_what_the_source_generates(family):
    """Token for token, in float32."""
    case = make_case(family, "exact")
    case.source.float(), case.model.float()
    case.pixels = case.pixels.float()
    tokens, owners = case.inserted(ONE_GROUP)
    is_text = torch.tensor([owner is None for owner in owners])
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": -1}
    images = {"pixel_values": case.pixels, "image_grid_thw": case.grids}
    ours = case.model.generate(torch.tensor([ONE_GROUP]), **images, **options)[0, len(ONE_GROUP) :]
    if isinstance(case.source, HeliumForCausalLM):
        embeds = case.source.get_input_embeddings()(torch.tensor([tokens]))
        embeds[0, ~is_text] = torch.cat(case.model.get_image_features(**images).pooler_output)
        theirs = case.source.generate(inputs_embeds=embeds, **options)[0]
    else:
        types = (~is_text)[None].int()
        theirs = case.source.generate(torch.tensor([tokens]), mm_token_type_ids=types, **images, **options)
        theirs = theirs[0, len(tokens) :]
    assert ours.tolist() == theirs.tolist()
