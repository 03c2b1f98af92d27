# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Parameters, cache entries, FLOPs and bytes of a design, counted from its configuration.

The functions are short enough to be read as formulas. A multiplication with its addition is two FLOPs; only matrix
products count. The source model is the design `insertion`. The tests compare them with the parameters of real models,
the bytes of real caches, and PyTorch's own FLOP counter.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from transformers import AutoConfig

from casa_hf import CasaConfig
from casa_hf.backbone import Backbone


@dataclass(frozen=True)
class Dimensions:
    """The numbers that the formulas are made of.

    Attributes:
        width: d, of text and image states.
        query, key: q and k, width of all query heads and of all key heads together.
        query_projected: output width of the query projection: q, or 2 q with gates.
        mlps: parameters of the MLPs of all blocks; of a dense one 3 d m, m being its inner width.
        active_mlps: those of them that compute a token: all, or with experts the routers and the chosen experts.
        attention: A, all parameters of one self-attention: projections, biases, query and key norms.
        vocabulary: V.
        blocks: L, decoder blocks.
        attending: those with self-attention in the source; the others have linear attention.
        linear: parameters of all linear attention.
        state: numbers in the recurrent states of a row; what a convolution remembers comes to a few more.
        fused: f, blocks with a fusion layer.
    """

    width: int
    query: int
    key: int
    query_projected: int
    mlps: int
    active_mlps: int
    attention: int
    vocabulary: int
    blocks: int
    attending: int
    linear: int
    state: int
    fused: int

    @classmethod
    def of(cls, config: CasaConfig) -> Dimensions:
        """The dimensions of a configuration; those of its attention and its MLPs are read off the stock modules."""
        text, blocks = config.text_config, _stock_blocks(config)
        attending = config.backbone.fusable_blocks(text)
        attention = blocks[attending[0]].self_attn
        linear = [getattr(b, config.backbone.block.recurrent_module or "", None) for b in blocks]
        linear = [module for module in linear if module is not None]
        mlps = [
            (parameter.numel(), parameter.numel() * config.backbone.block.active_part(text, name))
            for block in blocks
            for name, parameter in block.named_parameters(prefix="block")
            if ".mlp." in name
        ]
        return cls(
            width=text.hidden_size,
            query=attention.o_proj.in_features,
            key=attention.k_proj.out_features,
            query_projected=attention.q_proj.out_features,
            mlps=sum(count for count, _ in mlps),
            active_mlps=round(sum(active for _, active in mlps)),
            attention=sum(parameter.numel() for parameter in attention.parameters()),
            vocabulary=text.vocab_size,
            blocks=text.num_hidden_layers,
            attending=len(attending),
            linear=sum(parameter.numel() for module in linear for parameter in module.parameters()),
            state=sum(module.value_dim * module.head_k_dim for module in linear),
            fused=len(config.fusion_layers),
        )

    @property
    def query_output(self) -> int:
        """FLOPs of the query and output projections per token."""
        return 2 * self.width * (self.query_projected + self.query)

    @property
    def key_value(self) -> int:
        """FLOPs of the key and value projections per token."""
        return 4 * self.width * self.key

    @property
    def mlp(self) -> int:
        """FLOPs of the MLPs of all blocks per token."""
        return 2 * self.active_mlps

    @property
    def linear_attention(self) -> int:
        """FLOPs of all linear attention per token: projections, and reading and writing the states."""
        return 2 * self.linear + 6 * self.state

    def attend(self, keys: int) -> int:
        """FLOPs of one query's scores and their weighted sum of values."""
        return 4 * self.query * keys


def _stock_blocks(config: CasaConfig) -> list[Any]:
    """The family's own decoder blocks, without memory for their parameters."""
    return _blocks_of(config.backbone, config.text_config.to_json_string())


@cache
def _blocks_of(backbone: Backbone, text_config: str) -> list[Any]:
    config = AutoConfig.for_model(**json.loads(text_config))
    with torch.device("meta"):
        return [backbone.load("decoder_layer")(config, index) for index in range(config.num_hidden_layers)]


def _attending(config: CasaConfig) -> int:
    """Blocks that have self-attention in the source."""
    return len(config.backbone.fusable_blocks(config.text_config))


def computes_projections_once(config: CasaConfig) -> bool:
    """Whether self-attention's queries, keys and values also serve the fusion layer."""
    return config.casa_share_projections and config.casa_placement == "parallel"


def added_terms(config: CasaConfig) -> dict[str, int]:
    """How often A (an attention), d (a norm) and 1 (a gate) are added per fusion layer."""
    own, replaces = not config.casa_share_projections, config.casa_placement == "replace"
    return {
        "A": int(own) - int(replaces),
        "d": int(own) + int(config.casa_placement in ("before", "after")),
        "1": int(config.casa_gate is not None),
    }


def added_parameters(config: CasaConfig) -> int:
    """Parameters that a variant has more than its source, projector and gist rows aside."""
    size, terms = Dimensions.of(config), added_terms(config)
    return size.fused * (terms["A"] * size.attention + terms["d"] * size.width + terms["1"])


def added_formula(config: CasaConfig) -> str:
    """The same as a formula."""
    terms = [name if count == 1 else f"{count}{name}" for name, count in added_terms(config).items() if count]
    if not terms:
        return "0"
    return f"f {terms[0]}" if len(terms) == 1 else f"f ({' + '.join(terms)})"


@dataclass(frozen=True)
class Entries:
    """Entries in the cache; an entry is the key and the value of one token in one block.

    Attributes:
        text: per text token.
        window: more per text token of the current window.
        image: per image token that later text can see.
        past_image: per image token of earlier windows.
    """

    text: int
    window: int
    image: int
    past_image: int


def separate_updates(config: CasaConfig) -> int:
    """Blocks in which updates of image states need image keys/values beside those of fusion layers."""
    if config.casa_image_updates != "full":
        return 0
    blocks, fused = _attending(config), len(config.fusion_layers)
    serve = computes_projections_once(config) and config.casa_keys != "image"
    return blocks - fused if serve else blocks


def kv_entries(config: CasaConfig) -> Entries:
    """Cache entries per token."""
    blocks, fused = _attending(config), len(config.fusion_layers)
    own_text = config.casa_keys == "window" and not computes_projections_once(config)
    image = fused + separate_updates(config)
    return Entries(
        text=blocks - fused if config.casa_placement == "replace" else blocks,
        window=fused if own_text else 0,
        image=image,
        past_image=image if config.casa_image_history == "all" else 0,
    )


def text_flops(config: CasaConfig, text: int, window: int, image: int) -> int:
    """FLOPs of the decoder blocks for one text token.

    Args:
        config: of the variant.
        text: text tokens that self-attention looks at.
        window: text tokens that the fusion layer looks at.
        image: image tokens that the fusion layer looks at.
    """
    size = Dimensions.of(config)
    attention = size.query_output + size.key_value
    fusion = size.attend(image)
    if config.casa_keys == "window":
        fusion += size.attend(window)
    if not computes_projections_once(config):
        fusion += size.query_output + (size.key_value if config.casa_keys == "window" else 0)
    replaced = size.fused if config.casa_placement == "replace" else 0
    everywhere = size.mlp + size.linear_attention
    return everywhere + (size.attending - replaced) * (attention + size.attend(text)) + size.fused * fusion


def image_flops(config: CasaConfig, tokens: int, text: int, image: int) -> int:
    """FLOPs of the decoder blocks for one image, vision tower aside.

    Args:
        config: of the variant.
        tokens: of the image.
        text: text tokens that an update of image states looks at.
        image: image tokens that it looks at, the image's own included.
    """
    size = Dimensions.of(config)
    each = size.fused * size.key_value
    if config.casa_image_updates != "none":
        each += size.mlp
    if config.casa_image_updates == "full":
        each += size.linear_attention + size.attending * (size.query_output + size.attend(text + image))
        each += separate_updates(config) * size.key_value
    return tokens * each


def head_flops(config: CasaConfig) -> int:
    """FLOPs of the output head for one token."""
    return 2 * config.text_config.hidden_size * config.text_config.vocab_size


# ---------------------------------------------------------------- whole models


def language_parameters(config: CasaConfig) -> int:
    """Parameters of decoder blocks, last norm, embedding (tied with the output head) and fusion layers."""
    size = Dimensions.of(config)
    mixers = size.attending * size.attention + size.linear
    others = size.mlps + (2 * size.blocks + size.vocabulary + 1) * size.width
    return mixers + others + added_parameters(config)


def cache_bytes(config: CasaConfig, itemsize: int, text: int, window: int, image: int) -> int:
    """Bytes of keys and values in a cache; linear attention has `Dimensions.state` numbers in float32 beside them.

    Args:
        config: of the variant.
        itemsize: bytes of a number.
        text: text tokens in the cache.
        window: those of the current window, from the token that the image precedes on.
        image: image tokens that later text can see.
    """
    entries = kv_entries(config)
    held = entries.text * text + entries.window * window + entries.image * image
    return 2 * Dimensions.of(config).key * itemsize * held


def step_bytes(config: CasaConfig, itemsize: int, text: int, window: int, image: int) -> int:
    """Bytes that decoding one token must read: every weight of the language model but experts that it isn't sent to,
    and the cache.

    Keys and values that only updates of image states need aren't read. Arguments as in `cache_bytes`.
    """
    size = Dimensions.of(config)
    unread = 2 * size.key * itemsize * separate_updates(config) * image
    unread += (size.mlps - size.active_mlps) * itemsize
    return language_parameters(config) * itemsize + cache_bytes(config, itemsize, text, window, image) - unread


def tower_flops(vision: Any, height: int, width: int) -> int:
    """FLOPs of a Qwen2.5-VL vision tower for one image.

    Args:
        vision: configuration of the tower.
        height, width: of the image in patches; multiples of the attention windows' side.
    """
    size, patches = vision.hidden_size, height * width
    in_window = (vision.window_size // vision.patch_size) ** 2
    full = len(vision.fullatt_block_indexes)
    keys = full * patches + (vision.depth - full) * min(in_window, patches)
    embed = 2 * size * vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    block = 8 * size**2 + 6 * size * vision.intermediate_size
    joined = size * vision.spatial_merge_size**2
    merger = 2 * joined * (joined + vision.out_hidden_size)
    attended = 4 * size * keys
    return patches * (embed + vision.depth * block + attended) + patches // vision.spatial_merge_size**2 * merger
