# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Calls with images in a form that `torch.export` and `torch.onnx.export` can trace.

A CASA model reads sizes of images, and which text sees which image, from values of its inputs while it plans a call.
A graph can't do that. So the call is planned here, from an example, before it is traced: the graph is that of the
tower and the blocks alone, and the plan is a constant in it. It holds for all calls with the same plan: other pixels
and other words, but the same sizes of images at the same places.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from .modeling_casa import CasaForConditionalGeneration


class FixedCall(nn.Module):
    """A CASA model for calls with images that are planned as an example is.

    The example's weights stay the model's; its plan is on the device of the model, and isn't moved with it.

    Args:
        model: model in evaluation mode.
        **inputs: the example, as `CasaProcessor` returns it: `input_ids`, `pixel_values`, `image_grid_thw`, and what
            else `forward` takes besides a cache.

    Raises:
        ValueError: for an example without images or ids, with a cache, or for a model in training mode.
    """

    def __init__(self, model: CasaForConditionalGeneration, **inputs: Any):
        super().__init__()
        missing = [name for name in ("input_ids", "pixel_values", "image_grid_thw") if inputs.get(name) is None]
        if missing:
            raise ValueError(
                f"The example has no {' and no '.join(missing)}. Pass what CasaProcessor returns for text and images; "
                "a call with text alone is exported without FixedCall."
            )
        if model.training:
            raise ValueError("The model is in training mode, in which calls aren't fixed. Call model.eval() first.")
        if inputs.pop("use_cache", False) or inputs.get("cache") is not None:
            raise ValueError("A cache can't be exported. Leave cache and use_cache out.")
        self.model = model
        self._special = self._places(inputs["input_ids"])
        self._tower = model.model.tower_for(inputs["image_grid_thw"].cpu(), inputs["pixel_values"].device)
        calls: list[Any] = []
        first = model.model.language_model.layers[0]
        hook = first.register_forward_pre_hook(lambda _, arguments: calls.append(arguments[2]))
        try:
            with torch.no_grad():
                model(**inputs, use_cache=False)
        finally:
            hook.remove()
        self._call = replace(calls[0], tables=None, image_tables=None)  # of fused projections, which aren't traced

    def forward(self, input_ids: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
        """Logits of a call.

        Args:
            input_ids: (batch, tokens) ids, with the delimiters and placeholders of the example at their places.
            pixel_values: (patches, patch dim) pixels of images of the example's sizes.

        Returns:
            (batch, tokens, vocabulary) logits.

        Raises:
            ValueError: for delimiters or placeholders at other places; a graph can't tell.
        """
        if not torch.compiler.is_exporting() and not torch.equal(self._places(input_ids), self._special):
            raise ValueError(
                "input_ids have delimiters or image placeholders at other places than the example's, so that the call "
                "is planned otherwise. Make a FixedCall of these inputs."
            )
        body = self.model.model
        text = body.language_model
        states = body.get_input_embeddings()(input_ids)
        features = self._tower(pixel_values).to(states.dtype)
        image_states, *deepstack = features.split(body.config.text_config.hidden_size, dim=-1)
        for index, layer in enumerate(text.layers):
            states, image_states, *_ = layer(states, image_states, self._call)
            if index < len(deepstack):
                image_states = image_states + deepstack[index]
        return self.model.lm_head(text.norm(states))

    def _places(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(batch, tokens) the ids that plans are made from, at their places; 0 elsewhere."""
        config = self.model.config
        special = (*config.delimiter_token_ids, config.image_token_id, *(config.gist_token_ids or ()))
        named = torch.isin(input_ids, torch.tensor(special, device=input_ids.device))
        return torch.where(named, input_ids, 0)


__all__ = ["FixedCall"]
