# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The fusion layers: text attends to the image tokens of its window, and to the window's text.

Two forms with one interface. `CasaAttention` has projections of its own, copied from self-attention at conversion;
`CasaSharedAttention` has no parameters and computes both attentions from the projections of self-attention. Both go
through Transformers' attention interface, so the back end is `config._attn_implementation`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_casa import CasaConfig
from .windows import WindowPlan


@dataclass(frozen=True)
class FusionInputs:
    """What every fusion layer of one forward needs besides the states.

    Attributes:
        plan: the windows of the call.
        mask: (batch, 1, tokens, keys) boolean, or additive for the eager back end.
        image_rotary: cos and sin for the new image tokens, each (1, num_image_tokens, head_dim); None for keys
            without positions or when the call has no new image.
    """

    plan: WindowPlan
    mask: torch.Tensor
    image_rotary: tuple[torch.Tensor, torch.Tensor] | None

    def to(self, device: torch.device | str | int, **kwargs: Any) -> FusionInputs:
        """The inputs on another device; Accelerate calls this when decoder blocks live on several devices."""
        rotary = self.image_rotary
        return replace(
            self,
            plan=self.plan.to(device),
            mask=self.mask.to(device),
            image_rotary=None if rotary is None else (rotary[0].to(device), rotary[1].to(device)),
        )


@dataclass(frozen=True)
class Projected:
    """Queries, keys and values of text, each (batch, heads, tokens, head_dim), before rotation."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


def project(projections: Any, hidden_states: torch.Tensor, head_dim: int) -> Projected:
    """Queries, keys and values of `hidden_states` (batch, tokens, hidden), with the backbone's norms where it has any.

    `projections` is a module with the children q_proj, k_proj, v_proj and optionally q_norm, k_norm.
    """
    shape = (*hidden_states.shape[:-1], -1, head_dim)
    query = projections.q_proj(hidden_states).view(shape)
    key, value = _project_keys(projections, hidden_states, head_dim)
    if hasattr(projections, "q_norm"):
        query = projections.q_norm(query)
    return Projected(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))


def _project_keys(projections: Any, states: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of `states` (..., hidden), each (..., kv_heads, head_dim)."""
    shape = (*states.shape[:-1], -1, head_dim)
    key, value = projections.k_proj(states).view(shape), projections.v_proj(states).view(shape)
    if hasattr(projections, "k_norm"):
        key = projections.k_norm(key)
    return key, value


class _Fusion(nn.Module):
    """What both forms share: image keys/values, the joint softmax and the zeros outside windows."""

    is_causal = False

    def __init__(self, config: CasaConfig, layer_idx: int, self_attn: Any):
        super().__init__()
        self.config: PreTrainedConfig = config.text_config
        self.layer_idx = layer_idx
        self.with_text = config.casa_keys == "window"
        self.head_dim: int = self_attn.head_dim
        self.num_key_value_groups: int = self_attn.num_key_value_groups
        self.scaling: float = self_attn.scaling
        self.attention_dropout: float = self_attn.attention_dropout
        self._apply_rotary: Callable = config.backbone.load("apply_rotary")
        self._eager_attention: Callable = config.backbone.load("eager_attention")

    def _rotate(
        self, query: torch.Tensor, key: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._apply_rotary(query, key, *rotary)

    def _image_keys(
        self, projections: Any, image_states: torch.Tensor | None, fusion: FusionInputs, cache_layer: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All image keys/values of the call, each (batch, kv_heads, image columns, head_dim)."""
        key = value = None
        if image_states is not None:
            key, value = _project_keys(projections, image_states, self.head_dim)
            if fusion.image_rotary is not None:
                heads_first = key.transpose(0, 1)[None]  # (1, kv_heads, num_image_tokens, head_dim)
                key = self._rotate(heads_first, heads_first, fusion.image_rotary)[1][0].transpose(0, 1)
            key, value = fusion.plan.place(key), fusion.plan.place(value)
        if cache_layer is not None:
            return cache_layer.update_images(key, value, fusion.plan)
        assert key is not None and value is not None
        return key, value

    def _attend(
        self,
        query: torch.Tensor,
        image: tuple[torch.Tensor, torch.Tensor],
        text: tuple[torch.Tensor, torch.Tensor] | None,
        fusion: FusionInputs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One softmax over [image tokens ; window text]; (batch, tokens, heads * head_dim) and the weights."""
        key, value = image
        if text is not None:
            key, value = torch.cat([key, text[0]], dim=2), torch.cat([value, text[1]], dim=2)
        output, weights = attention(self, query, key, value, fusion.mask, self._eager_attention, is_causal=False)
        if weights is not None:
            weights = weights.masked_fill(~fusion.plan.sees[:, None, :, None], 0)
        return output, weights


class CasaAttention(_Fusion):
    """Fusion layer with projections of its own (axis D1, `casa_share_projections=False`).

    Tensors: {q,k,v,o}_proj, {q,k}_norm where the backbone has them, and image_norm, which normalises image states
    before their keys and values are made.
    """

    def __init__(self, config: CasaConfig, layer_idx: int, self_attn: Any, norm: nn.Module):
        super().__init__(config, layer_idx, self_attn)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            copy.deepcopy(projection)
            for projection in (self_attn.q_proj, self_attn.k_proj, self_attn.v_proj, self_attn.o_proj)
        )
        if hasattr(self_attn, "q_norm"):
            self.q_norm, self.k_norm = copy.deepcopy(self_attn.q_norm), copy.deepcopy(self_attn.k_norm)
        self.image_norm = copy.deepcopy(norm)

    def forward(
        self,
        hidden_states: torch.Tensor,
        image_states: torch.Tensor | None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        past_key_values: Cache | None,
        fusion: FusionInputs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend to images, and to the window's text if `casa_keys="window"`.

        Args:
            hidden_states: (batch, tokens, hidden) normalised text states.
            image_states: (num_image_tokens, hidden) states of the call's new images; None without any.
            position_embeddings: cos and sin of the text positions.
            past_key_values: cache prepared by `prepare_cache`, or None.
            fusion: windows, mask and image rotary tables of the call.

        Returns:
            (batch, tokens, hidden), exactly 0 where a token sees no image, and the attention weights or None.
        """
        cache_layer = None if past_key_values is None else past_key_values.layers[self.layer_idx]
        text = project(self, hidden_states, self.head_dim)
        query, text_keys = text.query, None
        if self.with_text:
            query, key = self._rotate(text.query, text.key, position_embeddings)
            text_keys = (key, text.value)
            if cache_layer is not None:
                text_keys = cache_layer.update_window(*text_keys, fusion.plan)
        if image_states is not None:
            image_states = self.image_norm(image_states)
        image = self._image_keys(self, image_states, fusion, cache_layer)
        output, weights = self._attend(query, image, text_keys, fusion)
        return self.o_proj(output).masked_fill(~fusion.plan.sees[..., None], 0), weights


class CasaSharedAttention(_Fusion):
    """Self-attention and fusion from the same projections (axis D1, `casa_share_projections=True`); no parameters.

    Projections are computed once; one o_proj (with its bias) is applied to the sum of both attentions.
    """

    def forward(
        self,
        hidden_states: torch.Tensor,
        image_states: torch.Tensor | None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        past_key_values: Cache | None,
        fusion: FusionInputs,
        self_attn: Any,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Both attentions of a block.

        Args:
            hidden_states: (batch, tokens, hidden) normalised text states.
            image_states: (num_image_tokens, hidden) normalised states of new images; None without any.
            position_embeddings, past_key_values, fusion: as in `CasaAttention.forward`.
            self_attn: the block's self-attention, whose projections are used.
            attention_mask: causal mask of self-attention in the form its back end takes.
            **kwargs: further arguments of the attention interface.

        Returns:
            (batch, tokens, hidden) sum of both attentions, and the weights of self-attention and fusion or None.
        """
        cache_layer = None if past_key_values is None else past_key_values.layers[self.layer_idx]
        text = project(self_attn, hidden_states, self.head_dim)
        query, key = self._rotate(text.query, text.key, position_embeddings)
        keys, values = key, text.value
        if past_key_values is not None:
            keys, values = past_key_values.update(keys, values, self.layer_idx)
        self_output, self_weights = attention(
            self_attn, query, keys, values, attention_mask, self._eager_attention, **kwargs
        )

        image = self._image_keys(self_attn, image_states, fusion, cache_layer)
        window = None
        if self.with_text:
            slots = slice(fusion.plan.state.text_start, fusion.plan.next_state.length)
            window = (keys[:, :, slots], values[:, :, slots])
        fused, weights = self._attend(query if self.with_text else text.query, image, window, fusion)
        fused = fused.masked_fill(~fusion.plan.sees[..., None], 0)
        return self_attn.o_proj(self_output + fused), self_weights, weights


def attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    eager_attention: Callable,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention through the back end that `module.config` names; heads are merged in the output."""
    interface = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, eager_attention)
    output, weights = interface(
        module,
        query,
        key,
        value,
        mask,
        dropout=module.attention_dropout if module.training else 0.0,
        scaling=module.scaling,
        **kwargs,
    )
    return output.flatten(2).contiguous(), weights


def back_end_mask(mask: torch.Tensor, implementation: str, dtype: torch.dtype) -> torch.Tensor:
    """A boolean mask in the form that the back end takes: additive for eager, boolean for the others."""
    if implementation != "eager":
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
