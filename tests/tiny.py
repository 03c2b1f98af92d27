# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Tiny configurations, weights and samples on which a wrong computation shows.

Three blocks of width 64 with 4 query heads on 2 key/value heads. All parameters are random, biases, norms and gates
too, and fusion layers have projections that differ from self-attention's, so nothing agrees by being 0, 1 or a copy.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2_5_VLConfig

from casa_hf import CasaConfig
from tests.reference import Image, Sample

PAD, START, END = 0, 60, 61  # padding and the pair of delimiters; an image stands immediately before END
IMAGE_PAD, VIDEO_PAD = 62, 63  # the source's expanded placeholders
GISTS = [58, 59]
VOCABULARY = 64
HIDDEN = 64

TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "max_window_layers": 3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": PAD,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]},
}
VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 16,
    "fullatt_block_indexes": [1],
    "out_hidden_size": HIDDEN,
}


def source_config() -> Qwen2_5_VLConfig:
    """Configuration of a token-insertion model."""
    return Qwen2_5_VLConfig(
        text_config=dict(TEXT),
        vision_config=dict(VISION),
        image_token_id=IMAGE_PAD,
        video_token_id=VIDEO_PAD,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )


def casa_config(variant: str = "casa", **overrides: Any) -> CasaConfig:
    """Configuration of that model's CASA form."""
    return CasaConfig.from_source(source_config(), variant, **overrides)


def random_weights(config: CasaConfig, seed: int = 0) -> dict[str, Tensor]:
    """Parameters of the language model and its fusion layers by checkpoint name, float64.

    Args:
        config: says which tensors there are.
        seed: of the random numbers; a tensor's values depend on the seed and its name alone, so that two designs have
            the same values in the tensors that both have.
    """
    text = config.text_config
    width, inner = text.hidden_size, text.intermediate_size
    heads, key_heads = text.num_attention_heads, text.num_key_value_heads
    head_dim = width // heads
    projections = {
        **{f"q_proj.{kind}": shape for kind, shape in _linear(heads * head_dim, width).items()},
        **{f"{p}_proj.{kind}": shape for p in "kv" for kind, shape in _linear(key_heads * head_dim, width).items()},
        "o_proj.weight": (width, heads * head_dim),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "model.language_model.embed_tokens.weight": (text.vocab_size, width),
        "model.language_model.norm.weight": (width,),
        "lm_head.weight": (text.vocab_size, width),
    }
    for index in range(text.num_hidden_layers):
        fused = index in config.fusion_layers
        block: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (width,),
            "post_attention_layernorm.weight": (width,),
            "mlp.gate_proj.weight": (inner, width),
            "mlp.up_proj.weight": (inner, width),
            "mlp.down_proj.weight": (width, inner),
        }
        if not (fused and config.casa_placement == "replace"):
            block |= {f"self_attn.{name}": shape for name, shape in projections.items()}
        if fused and not config.casa_share_projections:
            block |= {f"casa_attn.{name}": shape for name, shape in projections.items()}
            block["casa_attn.image_norm.weight"] = (width,)
        if fused and config.casa_gate:
            block["casa_attn.gate"] = (1,)
        if fused and config.casa_placement in ("before", "after"):
            block["casa_layernorm.weight"] = (width,)
        shapes |= {f"model.language_model.layers.{index}.{name}": shape for name, shape in block.items()}
    return {name: random_tensor(name, shape, seed) for name, shape in shapes.items()}


def _linear(outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
    return {"weight": (outputs, inputs), "bias": (outputs,)}


def random_tensor(name: str, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """A float64 tensor of the size that the parameter of this name would have in a trained model, roughly."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    if "embed_tokens" in name or name.endswith("gate"):
        return noise
    if name.endswith("bias"):
        return 0.3 * noise
    if len(shape) == 1:
        return 1 + 0.3 * noise
    return 1.5 * noise / (noise[0].numel() ** 0.5)


def features(height: int, width: int, seed: int) -> Tensor:
    """(height * width, hidden) image features in the merged grid."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(height * width, HIDDEN, generator=generator, dtype=torch.float64)


def sample(script: str, seed: int = 0) -> Sample:
    """A sample from a script: words separated by blanks.

    `5` is five random text tokens, `2x3` an image of 2 x 3 merged tokens between its delimiters, `f2x3` a frame of a
    video. More letters before the size: `g` gist tokens follow the image; `e` only the closing delimiter is written;
    `b` no delimiter at all, the image stands before whatever comes next; `s` the same features as the last image of
    that size. The word `gists` is the gist tokens alone.
    """
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    images: list[Image] = []
    for word in script.split():
        if word.isdigit():
            ids += torch.randint(3, 50, (int(word),), generator=generator).tolist()
            continue
        if word == "gists":
            ids += GISTS
            continue
        letters = word.rstrip("0123456789x")
        height, width = map(int, word[len(letters) :].split("x"))
        ids += [START] if not set(letters) & set("eb") else []
        content = features(height, width, 1_000 * seed + len(images))
        if "s" in letters:
            content = next(image.features for image in reversed(images) if image.grid == (height, width))
        images.append(Image(len(ids), (height, width), content, is_frame="f" in letters))
        ids += [END] if "b" not in letters else []
        ids += GISTS if "g" in letters else []
    return Sample(ids, tuple(images))
