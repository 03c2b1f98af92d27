# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The fusion layers: text attends to the image tokens of its window, and to the window's text.

| class | projections | what it computes |
|---|---|---|
| `CasaAttention` | its own | fusion alone, beside, before, after or in place of self-attention |
| `CasaBorrowedAttention` | self-attention's | the same, before or after self-attention |
| `CasaSharedAttention` | self-attention's, computed once | self-attention and fusion, summed before one o_proj |
| `CasaContextAttention` | self-attention's, computed once | one softmax over images and all text: both in one |

A query of the text comes from the family's projections (`backbone.Projections`), finds its keys in the cache's layer
(`extend`), and goes to `windowed_attention`, which hands it to the backend that `config._attn_implementation` names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers import initialization as init
from transformers.cache_utils import Cache

from .attention_backends import BackendWindows, StepWindows, attend, step_with_self_attention, windowed_attention
from .backbone import FULL_ATTENTION, AttentionModule, DecoderBlock, Projections, SelfAttention
from .cache_layers import FusionKeys, KeysValues
from .configuration_casa import CasaConfig
from .fused_projections import Projected, Wanted
from .own_copies import own_copy
from .positions import Rotary
from .recurrence import TokenOrder
from .transfers import moved
from .windows import WindowPlan


@dataclass(frozen=True)
class Call:
    """What every block of one forward needs besides the states.

    Attributes:
        rotary: cos and sin of the text's positions, each (batch, tokens, head_dim).
        masks: masks of the text's own attention by kind of block, in the form that the backend takes.
        cache: cache prepared by `prepare_cache`; None without.
        arguments: further arguments of the attention interface.
        order: in which order blocks of linear attention read the tokens; None if the rows are read as they stand.
        plan: image tokens and text that each token sees in fusion layers; None if nothing is seen.
        fusion: the same in the form that the backend takes; None if no token sees anything.
        all_see: whether it is known that every token sees something.
        image_rotary: cos and sin of the new image tokens, each (1, num_image_tokens, head_dim); None without any.
        updates: keys that image states attend to, in the same form; None without new images, or if attention doesn't
            update them.
        router_logits: whether blocks with experts return the logits of their routers.
        tables, image_tables: what `Projections.tables` makes of `rotary` and `image_rotary`, where fused projections
            may be used; None elsewhere.
    """

    rotary: Rotary
    masks: dict[str, torch.Tensor | None]
    cache: Cache | None
    arguments: dict[str, Any]
    order: TokenOrder | None = None
    plan: WindowPlan | None = None
    fusion: BackendWindows | None = None
    all_see: bool = False
    image_rotary: Rotary | None = None
    updates: BackendWindows | None = None
    router_logits: bool = False
    tables: Rotary | None = None
    image_tables: Rotary | None = None

    def to(self, device: torch.device | str | int, **kwargs: Any) -> Call:
        """The call on another device; Accelerate asks for it when decoder blocks live on several devices."""
        return moved(self, torch.device(device))

    def extend(
        self, layer_idx: int, images: KeysValues | None, text: KeysValues | None, name: str = "image"
    ) -> FusionKeys:
        """All keys/values of a block's fusion layer: these new ones and those that its cache layer holds."""
        if self.cache is None:
            return FusionKeys(images, text)
        assert self.plan is not None
        return self.cache.layers[layer_idx].extend(images, text, self.plan, name)


@dataclass(frozen=True)
class BlockModules:
    """Modules of a block that its fusion layer uses: not data, so hooks that move arguments between devices pass by.

    Attributes:
        self_attn: the block's self-attention; None in a block without.
        input_layernorm: the block's input norm.
    """

    self_attn: SelfAttention | None
    input_layernorm: nn.Module

    @property
    def attention(self) -> SelfAttention:
        """Self-attention of a block that has it."""
        assert self.self_attn is not None, "the block's self-attention is replaced"
        return self.self_attn


class Attended(NamedTuple):
    """What an attention gives to its block.

    Attributes:
        output: (batch, tokens, hidden).
        self_weights, fusion_weights: (batch, heads, tokens, keys) attention weights, where there are any.
        text: keys/values of all text of self-attention, where they were computed here.
        images: rotated keys/values of all image columns by self-attention's projections, where computed here.
        of_images: (num_image_tokens, hidden) output for image states, where these were mixed together with the text.
    """

    output: torch.Tensor
    self_weights: torch.Tensor | None = None
    fusion_weights: torch.Tensor | None = None
    text: KeysValues | None = None
    images: KeysValues | None = None
    of_images: torch.Tensor | None = None

    def updated(self, other: Attended) -> Attended:
        """This with all that `other` has."""
        return Attended._make(own if part is None else part for own, part in zip(self, other, strict=True))


def all_text(self_attn: SelfAttention, text: Projected, call: Call) -> KeysValues:
    """Keys/values of self-attention for all text, of which the cache keeps those of the call's."""
    key, value = text.key, text.value
    if call.cache is not None:
        key, value = call.cache.update(key, value, self_attn.layer_idx)
    return KeysValues(key, value)


def self_attention(projections: Projections, self_attn: SelfAttention, text: Projected, call: Call) -> Attended:
    """What the stock module computes of the text that it has projected, with its keys."""
    keys = all_text(self_attn, text, call)
    output, weights = attend(self_attn, text.rotated, keys, call.masks[FULL_ATTENTION], **call.arguments)
    return Attended(projections.output(self_attn, output, text.gate), self_weights=weights, text=keys)


def image_keys(
    projections: Projections, owner: AttentionModule, normed: torch.Tensor | None, call: Call, *, rotate: bool
) -> KeysValues | None:
    """Keys/values of the call's new images, each (batch, kv_heads, new columns, head_dim).

    Args:
        projections: the family's projections.
        owner: module that has them.
        normed: (num_image_tokens, hidden) normalised image states; None without new images.
        call: windows and rotary tables.
        rotate: whether keys have positions.
    """
    if normed is None:
        return None
    assert call.plan is not None
    key, value = projections.keys(owner, normed[None])
    if rotate:
        key = _rotated_images(projections, key, call)
    return KeysValues(*(call.plan.place(x[0].transpose(0, 1)).transpose(1, 2) for x in (key, value)))


def _rotated_images(projections: Projections, states: torch.Tensor, call: Call) -> torch.Tensor:
    """Queries or keys of new images, (1, heads, num_image_tokens, head_dim), at their positions."""
    if call.image_tables is not None and projections.rotates:
        return projections.rotate_together(states.transpose(1, 2), call.image_tables).transpose(1, 2)
    assert call.image_rotary is not None
    return projections.rotate_one(states, call.image_rotary)


def image_attention(
    projections: Projections, block: BlockModules, states: torch.Tensor, of_text: Attended, call: Call
) -> torch.Tensor:
    """What self-attention adds to (num_image_tokens, hidden) states of new images (axis D4, "full").

    Args:
        projections: the family's projections.
        block: modules of the block.
        states: image states.
        of_text: output of the block's text attention.
        call: windows, and what images attend to.
    """
    self_attn, plan = block.attention, call.plan
    assert plan is not None and call.image_rotary is not None and of_text.text is not None
    normed = block.input_layernorm(states)
    query, gate = projections.query(self_attn, normed[None])
    query = _rotated_images(projections, query, call)
    images = of_text.images
    if images is None:
        new = image_keys(projections, self_attn, normed, call, rotate=True)
        images = call.extend(self_attn.layer_idx, new, None, name="update").images
    keys = FusionKeys(images, of_text.text.between(0, plan.text_range[1]))
    output, _ = windowed_attention(self_attn, query, keys, call.updates)
    return projections.output(self_attn, output, gate)[0]


class FusionLayer(nn.Module):
    """What all forms share: the family's projections, the gate, and the zeros outside windows.

    Args:
        config: configuration of the model.
        layer_idx: index of the block.
        stock: the family's own decoder block.
        projections: the family's projections in this block.
    """

    is_causal = False

    def __init__(self, config: CasaConfig, layer_idx: int, stock: DecoderBlock, projections: Projections):
        super().__init__()
        self.config: PreTrainedConfig = config.text_config
        self.layer_idx = layer_idx
        self.projections = projections
        self.with_text = config.casa_keys != "image"
        self.normalises_images = config.casa_image_norm != "none"
        self.gated = config.casa_gate is not None
        if self.gated:
            self.gate = nn.Parameter(torch.zeros(1))

    def owner(self, block: BlockModules) -> AttentionModule:
        """The module with the projections that queries of text and keys of images are made by."""
        return block.attention

    def wanted(self, block: BlockModules) -> Wanted:
        """What `forward` takes of the text."""
        return Wanted(self.owner(block), True)

    @property
    def gives_images(self) -> bool:
        """Whether updates of image states attend to the keys that this layer stores."""
        return False

    def reset_gate(self) -> None:
        """Close the gate, if there is one."""
        if self.gated:
            init.zeros_(self.gate)

    def _normed(self, norm: nn.Module, images: torch.Tensor | None) -> torch.Tensor | None:
        """Image states as keys and values are made of them; None without any."""
        return norm(images) if self.normalises_images and images is not None else images

    def _finish(self, output: torch.Tensor, call: Call) -> torch.Tensor:
        """(batch, tokens, width) through the gate, and exactly 0 where a token sees nothing."""
        if self.gated:
            output = output * self.gate.tanh()
        if call.all_see:
            return output
        assert call.plan is not None
        return output.masked_fill(~call.plan.sees[..., None], 0)


class CasaAttention(FusionLayer):
    """Fusion with projections of its own (axis D1, `casa_share_projections=False`).

    Tensors: {q,k,v,o}_proj, {q,k}_norm where the backbone has them, image_norm, which normalises image states before
    their keys and values are made, unless `casa_image_norm="none"`, and gate where the configuration has one.
    """

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module
    q_norm: nn.Module
    k_norm: nn.Module
    num_key_value_groups: int
    scaling: float
    attention_dropout: float

    def __init__(self, config: CasaConfig, layer_idx: int, stock: DecoderBlock, projections: Projections):
        super().__init__(config, layer_idx, stock, projections)
        self._add_projections(stock)

    def forward(self, text: Projected, image_states: torch.Tensor | None, call: Call, block: BlockModules) -> Attended:
        """Attend to images, and to the window's text if `casa_keys="window"`.

        Args:
            text: the call's text, projected as `wanted` says.
            image_states: (num_image_tokens, hidden) states of the call's new images; None without any.
            call: windows, positions and cache.
            block: self-attention and input norm of the block.

        Returns:
            The output, exactly 0 where a token sees nothing, and `fusion_weights`.
        """
        owner, project = self.owner(block), self.projections
        normed = self._normed(self._image_norm(block), image_states)
        images = image_keys(project, owner, normed, call, rotate=self.with_text)
        keys = call.extend(self.layer_idx, images, KeysValues(text.key, text.value) if self.with_text else None)
        output, weights = windowed_attention(owner, text.rotated, keys, call.fusion)
        return Attended(self._finish(project.output(owner, output, text.gate), call), fusion_weights=weights)

    def owner(self, block: BlockModules) -> AttentionModule:
        return self

    def wanted(self, block: BlockModules) -> Wanted:
        return Wanted(self.owner(block), self.with_text)

    def _add_projections(self, stock: DecoderBlock) -> None:
        self_attn = stock.self_attn
        self.num_key_value_groups = self_attn.num_key_value_groups
        self.scaling = self_attn.scaling
        self.attention_dropout = self_attn.attention_dropout
        for name in self.projections.modules:
            setattr(self, name, own_copy(getattr(self_attn, name)))
        self.image_norm = own_copy(stock.input_layernorm) if self.normalises_images else nn.Identity()

    def _image_norm(self, block: BlockModules) -> nn.Module:
        return self.image_norm


class CasaBorrowedAttention(CasaAttention):
    """Fusion with self-attention's projections on states of its own (axis D3 "before" or "after", D1 shared)."""

    def _add_projections(self, stock: DecoderBlock) -> None:
        pass

    def owner(self, block: BlockModules) -> AttentionModule:
        return block.attention

    def _image_norm(self, block: BlockModules) -> nn.Module:
        return block.input_layernorm


class CasaSharedAttention(FusionLayer):
    """Self-attention and fusion in parallel from the same projections (axis D1, `casa_share_projections=True`).

    Projections are computed once; one o_proj (with its bias) is applied to the sum of both attentions.
    """

    @property
    def gives_images(self) -> bool:
        return self.with_text

    def forward(self, text: Projected, image_states: torch.Tensor | None, call: Call, block: BlockModules) -> Attended:
        """Both attentions of a block; arguments as in `CasaAttention.forward`."""
        self_attn, project, plan = block.attention, self.projections, call.plan
        assert plan is not None
        text_keys = all_text(self_attn, text, call)
        normed = self._normed(block.input_layernorm, image_states)
        images = image_keys(project, self_attn, normed, call, rotate=self.with_text)
        keys = call.extend(self.layer_idx, images, None)
        mask = call.masks[FULL_ATTENTION]
        if self.with_text and isinstance(call.fusion, StepWindows) and _is_boolean(mask):
            output = self._step(self_attn, text.rotated, keys.images, text_keys, mask, call)
            return Attended(project.output(self_attn, output, text.gate))
        own, self_weights = attend(self_attn, text.rotated, text_keys, mask, **call.arguments)
        query = text.query
        if self.with_text:
            query, keys = text.rotated, keys._replace(text=text_keys.between(*plan.text_range))
        fused, weights = windowed_attention(self_attn, query, keys, call.fusion)
        output = project.output(self_attn, own + self._finish(fused, call), text.gate)
        return Attended(output, self_weights, weights, text_keys, keys.images if self.gives_images else None)

    def _step(
        self,
        self_attn: SelfAttention,
        query: torch.Tensor,
        images: KeysValues | None,
        text: KeysValues,
        mask: torch.Tensor | None,
        call: Call,
    ) -> torch.Tensor:
        """A decoding step: both softmaxes on one product with the text's keys, both sums in one with its values."""
        assert call.plan is not None and isinstance(call.fusion, StepWindows)
        scale = None if call.all_see else call.plan.sees.to(query.dtype)
        if self.gated:
            scale = self.gate.tanh() if scale is None else scale * self.gate.tanh()
        text = text.between(0, call.plan.text_range[1])
        return step_with_self_attention(self_attn, query, images, text, call.fusion, mask, scale)


class CasaContextAttention(FusionLayer):
    """One softmax over the visible images and all text (axis D2 "context"); self-attention and fusion are one."""

    gives_images = True

    def forward(self, text: Projected, image_states: torch.Tensor | None, call: Call, block: BlockModules) -> Attended:
        """The attention of a block; arguments as in `CasaAttention.forward`."""
        self_attn, project, plan = block.attention, self.projections, call.plan
        assert plan is not None
        text_keys = all_text(self_attn, text, call)
        normed = None if image_states is None else block.input_layernorm(image_states)
        images = image_keys(project, self_attn, normed, call, rotate=True)
        keys = call.extend(self.layer_idx, images, None)
        keys = keys._replace(text=text_keys.between(0, plan.text_range[1]))
        output, weights = windowed_attention(self_attn, text.rotated, keys, call.fusion)
        attended = Attended(project.output(self_attn, output, text.gate), text=text_keys, images=keys.images)
        if weights is None:
            return attended
        num_columns = 0 if keys.images is None else keys.images.keys.shape[2]
        return attended._replace(self_weights=weights[..., num_columns:], fusion_weights=weights[..., :num_columns])


def fusion_layer(config: CasaConfig, layer_idx: int, stock: DecoderBlock, projections: Projections) -> FusionLayer:
    """The fusion layer of a block; `stock` is the family's own block, whose parameters it starts from or uses."""
    if not config.casa_share_projections:
        return CasaAttention(config, layer_idx, stock, projections)
    if config.casa_keys == "context":
        return CasaContextAttention(config, layer_idx, stock, projections)
    if config.casa_placement == "parallel":
        return CasaSharedAttention(config, layer_idx, stock, projections)
    return CasaBorrowedAttention(config, layer_idx, stock, projections)


def _is_boolean(attention_mask: torch.Tensor | None) -> bool:
    """Whether there is a mask of self-attention that is boolean for queries and keys. Without a mask, backends have a
    kernel that is faster than one product for both attentions."""
    return attention_mask is not None and attention_mask.ndim == 4 and attention_mask.dtype == torch.bool
