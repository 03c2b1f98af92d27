# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""FLOPs and bytes of the training step of benchmarks/train_step.py, by part, counted from shapes.

In that step the language model and the last vision blocks train, blocks recompute their activations, and the loss is
computed in chunks of tokens with a label, for all models alike. Weights, gradients and AdamW's moments are float32; on
a GPU matrix products are in bfloat16. The tests compare the counts with PyTorch's FLOP counter and with memory that
was measured.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from benchmarks.counting import Dimensions, head_flops, image_flops, text_flops, tower_flops
from casa_hf import CasaConfig, CasaForConditionalGeneration
from casa_hf.loss_casa import chunk_tokens
from casa_hf.training import freeze
from casa_hf.training.parameters import NUM_VISION_BLOCKS

# Times the FLOPs of a forward pass: alone; with the gradient of its inputs; recomputed, with all gradients.
_FORWARD, _WITH_INPUTS, _TRAINED = 1, 2, 4


@dataclass(frozen=True)
class Shape:
    """A batch: conversations of one image each.

    Attributes:
        conversations: their number.
        words: text tokens of each, two of which stand around its image.
        side: of an image, in merged patches.
    """

    conversations: int
    words: int
    side: int

    @property
    def text(self) -> int:
        return self.conversations * self.words

    @property
    def images(self) -> int:
        return self.conversations * self.side**2

    @property
    def labelled(self) -> int:
        """Tokens with a label: the words after each image."""
        return self.conversations * (self.words - 2)


def _tower(vision: Any, side: int, first: int, last: int) -> int:
    """FLOPs of some blocks of the vision tower for one image; of none, those of the rest of it."""
    part = copy.copy(vision)
    part.depth = last - first
    part.fullatt_block_indexes = [index for index in vision.fullatt_block_indexes if first <= index < last]
    edge = side * vision.spatial_merge_size
    return tower_flops(part, edge, edge) - (_tower(vision, side, 0, 0) if last > first else 0)


def step_flops(config: CasaConfig, shape: Shape) -> dict[str, int]:
    """FLOPs of forward, recomputation and backward, by part; attention as kernels compute it that skip masked keys."""
    vision, images = config.vision_config, shape.conversations
    frozen = max(0, vision.depth - NUM_VISION_BLOCKS)
    tokens, words = shape.side**2, shape.words
    # A token's FLOPs are a constant and terms proportional to its keys, so that keys can be summed up first.
    positions = words * (words - 1) // 2
    keys = text_flops(config, text=positions + words, window=positions, image=(words - 1) * tokens)
    text = keys + (words - 1) * text_flops(config, text=0, window=0, image=0)
    image = image_flops(config, tokens, text=1, image=(tokens + 1) // 2)
    # Recomputation ends before what a block's last product gives, which nothing needs.
    saved_text = config.text_config.num_hidden_layers * 2 * Dimensions.of(config).width
    saved_text *= config.text_config.intermediate_size
    saved_image = tokens * saved_text if config.casa_image_updates != "none" else 0
    patches = tokens * vision.spatial_merge_size**2
    saved_tower = (vision.depth - frozen) * patches * 2 * vision.hidden_size * vision.intermediate_size
    head = _TRAINED if shape.labelled > chunk_tokens(config.text_config.vocab_size) else _TRAINED - 1
    return {
        "vision tower, frozen": images * (_FORWARD * _tower(vision, shape.side, 0, frozen)),
        "vision tower, trained": images * (_TRAINED * _tower(vision, shape.side, frozen, vision.depth) - saved_tower),
        "vision tower, rest": images * _WITH_INPUTS * _tower(vision, shape.side, 0, 0),
        "text tokens": images * (_TRAINED * text - words * saved_text),
        "image tokens": images * (_TRAINED * image - saved_image),
        "output head": head * shape.labelled * head_flops(config),
    }


def step_bytes(config: CasaConfig, shape: Shape, itemsize: int = 2, all_logits: bool = False) -> dict[str, int]:
    """Bytes that a step holds, by part, and "peak", the most of them at one time.

    Args:
        config: of the variant; `insertion` is the source.
        shape: of the batch.
        itemsize: bytes of a number in matrix products: 2 in bfloat16, for which autocast copies the weights; 4 where
            they are in float32.
        all_logits: whether logits of all tokens are computed at once, as the source's own class does.
    """
    weights, trained = _parameters(config.to_json_string())
    text, vision = Dimensions.of(config), config.vision_config
    patches = shape.images * vision.spatial_merge_size**2
    updates = config.casa_image_updates != "none"
    rows = shape.text + (shape.images if updates else 0)
    blocks = min(NUM_VISION_BLOCKS, vision.depth)
    kept = {
        "inputs of language blocks": 4 * text.width * (rows * text.blocks + (0 if updates else shape.images)),
        "inputs of vision blocks": 4 * vision.hidden_size * patches * blocks,
    }
    language = rows * _block(text.width, text.query, text.key, config.text_config.intermediate_size, itemsize)
    if not updates:  # keys and values of images: the norm, and the projections
        language += shape.images * ((12 + itemsize) * text.width + 2 * 2 * itemsize * text.key)
        language += shape.text * _attention(text.width, text.query, text.key, itemsize)
    tower = patches * _block(*3 * (vision.hidden_size,), vision.intermediate_size, itemsize)
    vocabulary = config.text_config.vocab_size
    head = 4 * text.vocabulary * text.width
    chunk = rows if all_logits else min(shape.labelled, chunk_tokens(vocabulary))
    parts_now = {
        "weights": 4 * weights,
        "gradients": 4 * trained,
        "moments of AdamW": 8 * trained,
        **kept,
        "weights in bfloat16": itemsize * weights if itemsize < 4 else 0,
        "loss": 13 * chunk * vocabulary,
        "a language block, recomputed": language,
        "a vision block, recomputed": tower,
    }
    held = parts_now["weights"] + parts_now["moments of AdamW"]
    # A head that trains has gradients of one chunk and of all so far.
    begins = held + sum(kept.values()) + max(parts_now["weights in bfloat16"], 2 * head) + parts_now["loss"]
    first_block = held + sum(kept.values()) + language + head
    ends = held + parts_now["gradients"] + kept["inputs of vision blocks"] + tower
    return {**parts_now, "peak": max(begins, first_block, ends)}


@cache
def _parameters(config: str) -> tuple[int, int]:
    """Numbers of all parameters and of those that train."""
    with torch.device("meta"):
        parts = freeze(CasaForConditionalGeneration(CasaConfig.from_dict(json.loads(config))), "paper-helium")
    return sum(part.parameters for part in parts), sum(part.trainable for part in parts)


def _attention(width: int, query: int, key: int, itemsize: int) -> int:
    """Bytes that a norm and the attention behind it keep per token for their backward pass.

    The norm: its input, that normalised, and its output, in float32, and for products; queries and keys before their
    rotation and after it, values, and the weighted sum; and what the output adds to.
    """
    return (12 + itemsize) * width + itemsize * (3 * query + 3 * key) + 4 * width


def _block(width: int, query: int, key: int, inner: int, itemsize: int) -> int:
    """Bytes that a decoder block keeps per token, and the gradients of the MLP's widest tensors beside it."""
    mlp = (12 + itemsize) * width + itemsize * 4 * inner
    return _attention(width, query, key, itemsize) + mlp + itemsize * 2 * inner
