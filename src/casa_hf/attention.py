# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The fusion layers: text attends to the image tokens of its window, and to the window's text.

| class | projections | what it computes |
|---|---|---|
| `CasaAttention` | its own | fusion alone, beside, before, after or in place of self-attention |
| `CasaBorrowedAttention` | self-attention's | the same, before or after self-attention |
| `CasaSharedAttention` | self-attention's, computed once | self-attention and fusion, summed before one o_proj |
| `CasaContextAttention` | self-attention's, computed once | one softmax over images and all text: both in one |

All go through Transformers' attention interface, so the back end is `config._attn_implementation`; `routes.py` says
how each of them computes the attention of windows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .cache_casa import KeysValues
from .configuration_casa import CasaConfig
from .routes import Route, StepRoute
from .windows import WindowPlan

Rotary = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class FusionInputs:
    """What every layer of one forward needs besides the states.

    Attributes:
        plan: the windows of the call.
        route: how fusion layers attend; None if no token sees anything.
        all_see: whether it is known that every token sees something.
        update_route: how image states attend; None if they aren't updated by attention or the call has no new image.
        image_rotary: cos and sin of the new image tokens, each (1, num_image_tokens, head_dim); None without any.
    """

    plan: WindowPlan
    route: Route | None
    all_see: bool = False
    update_route: Route | None = None
    image_rotary: Rotary | None = None

    def to(self, device: torch.device | str | int, **kwargs: Any) -> FusionInputs:
        """The inputs on another device; Accelerate calls this when decoder blocks live on several devices."""
        rotary, device = self.image_rotary, torch.device(device)
        return replace(
            self,
            plan=self.plan.to(device),
            route=None if self.route is None else self.route.to(device),
            update_route=None if self.update_route is None else self.update_route.to(device),
            image_rotary=None if rotary is None else (rotary[0].to(device), rotary[1].to(device)),
        )


@dataclass(frozen=True)
class TextInputs:
    """Arguments of self-attention that a block passes on.

    Attributes:
        position_embeddings: cos and sin of the text positions.
        cache: cache prepared by `prepare_cache`, or None.
        attention_mask: causal mask in the form that the back end takes.
        kwargs: further arguments of the attention interface.
    """

    position_embeddings: Rotary
    cache: Cache | None
    attention_mask: torch.Tensor | None
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class BlockParts:
    """Modules of a block that its fusion layer uses: not data, so hooks that move arguments between devices pass by.

    Attributes:
        self_attn: the block's self-attention; None in a block without.
        input_layernorm: the block's input norm.
    """

    self_attn: Any
    input_layernorm: nn.Module


class Attended(NamedTuple):
    """What an attention gives to its block.

    Attributes:
        output: (batch, tokens, hidden).
        self_weights, fusion_weights: (batch, heads, tokens, keys) attention weights, where there are any.
        text: keys/values of all text of self-attention, where they were computed here.
        images: rotated keys/values of all image columns by self-attention's projections, where computed here.
    """

    output: torch.Tensor
    self_weights: torch.Tensor | None = None
    fusion_weights: torch.Tensor | None = None
    text: KeysValues | None = None
    images: KeysValues | None = None


class AttentionMath:
    """Projections, rotation and attention of one block, for the backbone at hand."""

    def __init__(self, config: CasaConfig, layer_idx: int, self_attn: Any):
        self.layer_idx = layer_idx
        self.head_dim: int = self_attn.head_dim
        self.has_norms = hasattr(self_attn, "q_norm")
        # Queries and keys (batch, heads, tokens, head_dim) and cos, sin; both at their positions.
        self.rotate_both: Callable = config.backbone.load("apply_rotary")
        self._eager: Callable = config.backbone.load("eager_attention")

    def query(self, projections: Any, states: torch.Tensor) -> torch.Tensor:
        """(batch, heads, tokens, head_dim) queries of (batch, tokens, hidden) states, not rotated."""
        query = self._heads(projections.q_proj(states))
        return (projections.q_norm(query) if self.has_norms else query).transpose(1, 2)

    def keys(self, projections: Any, states: torch.Tensor) -> KeysValues:
        """Keys, not rotated, and values of (batch, tokens, hidden) states."""
        key, value = self._heads(projections.k_proj(states)), self._heads(projections.v_proj(states))
        if self.has_norms:
            key = projections.k_norm(key)
        return KeysValues(key.transpose(1, 2), value.transpose(1, 2))

    def _heads(self, states: torch.Tensor) -> torch.Tensor:
        return states.view(*states.shape[:-1], -1, self.head_dim)

    def rotate(self, states: torch.Tensor, rotary: Rotary) -> torch.Tensor:
        """Queries or keys (batch, heads, tokens, head_dim) at their positions."""
        return self.rotate_both(states, states[:, :0], *rotary)[0]

    def attend(
        self, module: Any, query: torch.Tensor, keys: KeysValues, mask: torch.Tensor | None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(batch, tokens, heads * head_dim) and the weights or None, by the back end that `module.config` names."""
        interface = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, self._eager)
        output, weights = interface(
            module,
            query,
            *keys,
            mask,
            dropout=module.attention_dropout if module.training else 0.0,
            scaling=module.scaling,
            **kwargs,
        )
        return output.flatten(2).contiguous(), weights

    def self_attention(
        self, self_attn: Any, states: torch.Tensor, text: TextInputs
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, KeysValues]:
        """What the stock module computes, up to the output projection, with its parts.

        Returns:
            Attention output (batch, tokens, heads * head_dim), queries (not rotated), weights or None, and the
            keys/values of all text including the cache's.
        """
        query = self.query(self_attn, states)
        rotated, keys = self.rotated_text(self_attn, query, states, text)
        output, weights = self.attend(self_attn, rotated, keys, text.attention_mask, **text.kwargs)
        return output, query, weights, keys

    def rotated_text(
        self, self_attn: Any, query: torch.Tensor, states: torch.Tensor, text: TextInputs
    ) -> tuple[torch.Tensor, KeysValues]:
        """Rotated queries, and self-attention's keys/values of all text; the new ones are added to the cache."""
        key, value = self.keys(self_attn, states)
        query, key = self.rotate_both(query, key, *text.position_embeddings)
        keys = KeysValues(key, value)
        if text.cache is not None:
            keys = KeysValues(*text.cache.update(*keys, self.layer_idx))
        return query, keys

    def image_keys(
        self,
        projections: Any,
        normed: torch.Tensor | None,
        fusion: FusionInputs,
        text: TextInputs,
        *,
        rotate: bool,
        store: str = "image",
    ) -> KeysValues | None:
        """Keys/values of all image columns of the call, each (batch, kv_heads, columns, head_dim).

        Args:
            projections: module with k_proj and v_proj.
            normed: (num_image_tokens, hidden) normalised states of new images; None without any.
            fusion: windows and rotary tables.
            text: says which cache.
            rotate: whether keys have positions.
            store: the name under which the cache keeps them.
        """
        new = None
        if normed is not None:
            key, value = self.keys(projections, normed[None])
            if rotate:
                assert fusion.image_rotary is not None
                key = self.rotate(key, fusion.image_rotary)
            new = KeysValues(*(fusion.plan.place(x[0].transpose(0, 1)).transpose(1, 2) for x in (key, value)))
        if text.cache is not None:
            return text.cache.layers[self.layer_idx].update_images(store, new, fusion.plan)
        return new


class FusionBase(nn.Module):
    """What all forms share: the joint softmax, the gate and the zeros outside windows."""

    is_causal = False

    def __init__(self, config: CasaConfig, layer_idx: int, self_attn: Any):
        super().__init__()
        self.config: PreTrainedConfig = config.text_config
        self.layer_idx = layer_idx
        self.with_text = config.casa_keys != "image"
        self.math = AttentionMath(config, layer_idx, self_attn)
        self.gated = config.casa_gate is not None
        if self.gated:
            self.gate = nn.Parameter(torch.zeros(1))

    def reset_gate(self) -> None:
        """Close the gate, if there is one."""
        if self.gated:
            init.zeros_(self.gate)

    def _attend(
        self,
        projections: Any,
        query: torch.Tensor,
        images: KeysValues | None,
        text: KeysValues | None,
        fusion: FusionInputs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One softmax over [image tokens ; text]: (batch, tokens, heads * head_dim) and the weights or None.

        `projections` is what the query comes from: back ends look there for the data type and the dropout.
        """
        if fusion.route is None:
            return query.new_zeros(query.shape[0], query.shape[2], query.shape[1] * query.shape[3]), None
        output, weights = fusion.route.attend(self.math.attend, projections, query, images, text)
        if weights is not None:
            weights = weights.masked_fill(~fusion.plan.sees[:, None, :, None], 0)
        return output, weights

    def _finish(self, output: torch.Tensor, fusion: FusionInputs) -> torch.Tensor:
        """Exactly 0 where a token sees nothing, and through the gate elsewhere."""
        if self.gated:
            output = output * self.gate.tanh()
        return output if fusion.all_see else output.masked_fill(~fusion.plan.sees[..., None], 0)


class CasaBorrowedAttention(FusionBase):
    """Fusion with self-attention's projections on states of its own (axis D3 "before" or "after", D1 shared)."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        image_states: torch.Tensor | None,
        fusion: FusionInputs,
        text: TextInputs,
        block: BlockParts,
    ) -> Attended:
        """Attend to images, and to the window's text if `casa_keys="window"`.

        Args:
            hidden_states: (batch, tokens, hidden) normalised text states.
            image_states: (num_image_tokens, hidden) states of the call's new images; None without any.
            fusion: windows, masks and image rotary tables of the call.
            text: positions and cache.
            block: self-attention and input norm of the block.

        Returns:
            The output, exactly 0 where a token sees nothing, and `fusion_weights`.
        """
        projections, image_norm = self._borrow(block)
        query, window = self.math.query(projections, hidden_states), None
        if self.with_text:
            key, value = self.math.keys(projections, hidden_states)
            query, key = self.math.rotate_both(query, key, *text.position_embeddings)
            window = KeysValues(key, value)
        cache_layer = None if text.cache is None else text.cache.layers[self.layer_idx]
        if window is not None and cache_layer is not None and isinstance(fusion.route, StepRoute):
            images, window = cache_layer.update_step(window, fusion.plan)
        else:
            if window is not None and cache_layer is not None:
                window = cache_layer.update_window(window, fusion.plan)
            normed = None if image_states is None else image_norm(image_states)
            images = self.math.image_keys(projections, normed, fusion, text, rotate=self.with_text)
        output, weights = self._attend(projections, query, images, window, fusion)
        return Attended(self._finish(projections.o_proj(output), fusion), fusion_weights=weights)

    def _borrow(self, block: BlockParts) -> tuple[Any, nn.Module]:
        return block.self_attn, block.input_layernorm


class CasaAttention(CasaBorrowedAttention):
    """Fusion layer with projections of its own (axis D1, `casa_share_projections=False`).

    Tensors: {q,k,v,o}_proj, {q,k}_norm where the backbone has them, image_norm, which normalises image states before
    their keys and values are made, and gate where the configuration has one.
    """

    def __init__(self, config: CasaConfig, layer_idx: int, self_attn: Any, norm: nn.Module):
        super().__init__(config, layer_idx, self_attn)
        self.num_key_value_groups: int = self_attn.num_key_value_groups
        self.scaling: float = self_attn.scaling
        self.attention_dropout: float = self_attn.attention_dropout
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            copy.deepcopy(projection)
            for projection in (self_attn.q_proj, self_attn.k_proj, self_attn.v_proj, self_attn.o_proj)
        )
        if hasattr(self_attn, "q_norm"):
            self.q_norm, self.k_norm = copy.deepcopy(self_attn.q_norm), copy.deepcopy(self_attn.k_norm)
        self.image_norm = copy.deepcopy(norm)

    def _borrow(self, block: BlockParts) -> tuple[Any, nn.Module]:
        return self, self.image_norm


class CasaSharedAttention(FusionBase):
    """Self-attention and fusion in parallel from the same projections (axis D1, `casa_share_projections=True`).

    Projections are computed once; one o_proj (with its bias) is applied to the sum of both attentions.
    """

    def forward(
        self,
        hidden_states: torch.Tensor,
        image_states: torch.Tensor | None,
        fusion: FusionInputs,
        text: TextInputs,
        block: BlockParts,
    ) -> Attended:
        """Both attentions of a block; arguments as in `CasaBorrowedAttention.forward`."""
        self_attn = block.self_attn
        normed = None if image_states is None else block.input_layernorm(image_states)
        if self.with_text and isinstance(fusion.route, StepRoute) and _takes_masks(text.attention_mask):
            return self._step(hidden_states, fusion.route, fusion, text, self_attn)
        self_output, query, self_weights, keys = self.math.self_attention(self_attn, hidden_states, text)
        window = None
        if self.with_text:
            query = self.math.rotate(query, text.position_embeddings)
            window = keys.slots(*fusion.plan.text_slots)
        images = self.math.image_keys(self_attn, normed, fusion, text, rotate=self.with_text)
        fused, weights = self._attend(self_attn, query, images, window, fusion)
        output = self_attn.o_proj(self_output + self._finish(fused, fusion))
        return Attended(output, self_weights, weights, text=keys, images=images if self.with_text else None)

    def _step(
        self,
        hidden_states: torch.Tensor,
        route: StepRoute,
        fusion: FusionInputs,
        text: TextInputs,
        self_attn: Any,
    ) -> Attended:
        """A decoding step: both softmaxes on one product with the text's keys, both sums in one with its values."""
        query = self.math.query(self_attn, hidden_states)
        query, keys = self.math.rotated_text(self_attn, query, hidden_states, text)
        images = self.math.image_keys(self_attn, None, fusion, text, rotate=True)
        scale = None if fusion.all_see else fusion.plan.sees.to(query.dtype)
        if self.gated:
            scale = self.gate.tanh() if scale is None else scale * self.gate.tanh()
        keys = keys.slots(0, fusion.plan.text_slots[1])
        output = route.attend_with_self(self_attn, query, images, keys, text.attention_mask, scale)
        return Attended(self_attn.o_proj(output), text=keys)


class CasaContextAttention(FusionBase):
    """One softmax over the visible images and all text (axis D2 "context"); self-attention and fusion are one."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        image_states: torch.Tensor | None,
        fusion: FusionInputs,
        text: TextInputs,
        block: BlockParts,
    ) -> Attended:
        """The attention of a block; arguments as in `CasaBorrowedAttention.forward`."""
        self_attn = block.self_attn
        query = self.math.query(self_attn, hidden_states)
        query, keys = self.math.rotated_text(self_attn, query, hidden_states, text)
        normed = None if image_states is None else block.input_layernorm(image_states)
        images = self.math.image_keys(self_attn, normed, fusion, text, rotate=True)
        output, weights = self._attend(self_attn, query, images, keys.slots(0, fusion.plan.text_slots[1]), fusion)
        attended = Attended(self_attn.o_proj(output), text=keys, images=images)
        if weights is None:
            return attended
        num_columns = 0 if images is None else images.keys.shape[2]
        return attended._replace(self_weights=weights[..., num_columns:], fusion_weights=weights[..., :num_columns])


def _takes_masks(attention_mask: torch.Tensor | None) -> bool:
    """Whether the mask of self-attention is one that a step can use: none, or boolean for queries and keys."""
    return attention_mask is None or (attention_mask.ndim == 4 and attention_mask.dtype == torch.bool)
