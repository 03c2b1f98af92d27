# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Stock source models of every family beside their CASA forms with the same weights, from pixels to logits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from casa_hf import CasaForConditionalGeneration
from tests.tiny import END, FAMILIES, IMAGE_PAD, START, Family, random_tensor

GRIDS = [(2, 3), (3, 1), (2, 2)]
ONE_GROUP = [5, 6, START, END, START, END, START, END, 7, 8, 9]
SEVERAL = [5, START, END, 7, 8, START, END, START, END, 9, 10, 11]


@dataclass
class Case:
    """A source, its CASA form with the same weights, and pixels of three images."""

    family: Family
    source: Any
    model: Any
    pixels: Tensor = field(init=False)
    grids: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.grids = torch.tensor([[1, 2 * h, 2 * w] for h, w in GRIDS])
        self.pixels = random_tensor("pixels", (int(self.grids.prod(-1).sum()), 3 * 2 * 4 * 4))

    @property
    def images(self) -> dict[str, Tensor]:
        return {"pixel_values": self.pixels, "image_grid_thw": self.grids}

    def casa(self, ids: list[int], **kwargs: Any) -> Tensor:
        """Logits of the CASA form."""
        return self.model(input_ids=torch.tensor([ids]), **self.images, **kwargs).logits[0]

    def inserted(self, ids: list[int]) -> tuple[list[int], list[int | None]]:
        """The ids with placeholders, and the image that each belongs to."""
        tokens: list[int] = []
        owners: list[int | None] = []
        image = 0
        for token in ids:
            if token == END:
                count = GRIDS[image][0] * GRIDS[image][1]
                tokens += [IMAGE_PAD] * count
                owners += [image] * count
                image += 1
            tokens.append(token)
            owners.append(None)
        return tokens, owners

    def is_text(self, ids: list[int]) -> Tensor:
        """Which of the ids with placeholders are text."""
        return torch.tensor([owner is None for owner in self.inserted(ids)[1]])

    def insertion(self, ids: list[int], mask: Tensor | None = None) -> Tensor:
        """Logits of the source with image tokens inserted, at the text tokens."""
        return self.source_outputs(ids, attention_mask=mask).logits[0, self.is_text(ids)]

    def source_outputs(self, ids: list[int], **kwargs: Any) -> Any:
        """What the source gives for the ids with image tokens inserted."""
        inputs = self.source_inputs(ids)
        if not self.family.text_only:
            named = {name: inputs[name] for name in ("input_ids", "image_grid_thw", "mm_token_type_ids")}
            inputs["position_ids"], _ = self.source.model.get_rope_index(**named)
        return self.source(**inputs, **kwargs)

    def source_inputs(self, ids: list[int]) -> dict[str, Tensor]:
        """What the source, or its `generate`, is given for the ids with image tokens inserted."""
        tokens, is_text = torch.tensor([self.inserted(ids)[0]]), self.is_text(ids)
        if self.family.text_only:
            embeds = self.source.get_input_embeddings()(tokens)
            embeds[0, ~is_text] = torch.cat(self.model.get_image_features(**self.images).pooler_output)
            return {"inputs_embeds": embeds}
        return {"input_ids": tokens, "mm_token_type_ids": (~is_text)[None].int(), **self.images}


def make_case(family: str, variant: str, text: dict[str, Any] | None = None, **fields: Any) -> Case:
    """A case in float64 with random parameters everywhere.

    Args:
        family: a key of `tiny.FAMILIES`.
        variant: of the CASA form.
        text: further settings of the text configuration.
        **fields: override the variant's.
    """
    made = FAMILIES[family]
    source = randomised(made.source(made.source_config(**(text or {}))))
    model = randomised(CasaForConditionalGeneration(made.casa_config(variant, source.config, **fields)))
    weights = source.state_dict()
    if made.text_only:
        weights = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in weights.items()}
    loaded = model.load_state_dict(weights, strict=False)
    assert not loaded.unexpected_keys
    new = ("casa_", *(("visual", "projector") if made.text_only else ()))
    assert all(any(part in name for part in new) for name in loaded.missing_keys)
    return Case(made, source, model)


@torch.no_grad()
def randomised(model: Any) -> Any:
    """The model in float64 with `tiny.random_tensor`s."""
    for name, parameter in model.named_parameters():
        parameter.copy_(random_tensor(name, tuple(parameter.shape)))
    return in_float64(model)


def in_float64(model: Any) -> Any:
    """The model in float64, which the default implementation of experts doesn't compute in."""
    if model._can_set_experts_implementation():
        model.set_experts_implementation("batched_mm")
    return model.double().eval()
