# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Tiny configurations, weights and samples of every family, on which a wrong computation shows.

Three blocks of width 64 with 4 query heads on 2 key/value heads. All parameters are random, biases, norms and gates
too, and fusion layers have projections that differ from self-attention's, so nothing agrees by being 0, 1 or a copy.
Names and shapes of parameters are those of the stock modules and of docs/architecture.md: a tensor that a model has
lost, or given another name, can't be loaded.
"""

from __future__ import annotations

import json
import re
import zlib
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    HeliumConfig,
    HeliumForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from casa_hf import CasaConfig
from tests.reference import (
    Block,
    HeliumBlock,
    Image,
    Qwen3_5Block,
    Qwen3_5ExpertBlock,
    Qwen3Block,
    Qwen3ExpertBlock,
    Sample,
    SmolLM3Block,
)

PAD, START, END = 0, 60, 61  # padding and the pair of delimiters; an image stands immediately before END
IMAGE_PAD, VIDEO_PAD = 62, 63  # the source's expanded placeholders
GISTS = [58, 59]
VOCABULARY = 64
HIDDEN = 64

TOKENS = {
    "image_token_id": IMAGE_PAD,
    "video_token_id": VIDEO_PAD,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}

TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": PAD,
    "tie_word_embeddings": False,
}
ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
SECTIONS = {**ROPE, "mrope_section": [2, 3, 3]}
VISION: dict[str, Any] = {
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

QWEN2_VL_VISION: dict[str, Any] = {
    "depth": 2,
    "embed_dim": 32,
    "hidden_size": HIDDEN,
    "num_heads": 2,
    "patch_size": 4,
    "mlp_ratio": 2,
}
QWEN3_VL_VISION: dict[str, Any] = {
    "depth": 4,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": HIDDEN,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0, 2],
}
QWEN3_5_VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": HIDDEN,
    "num_position_embeddings": 64,
}

QWEN3_5_TEXT: dict[str, Any] = {
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "head_dim": 24,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "rope_parameters": {
        **ROPE,
        "mrope_section": [3, 2, 1],
        "mrope_interleaved": True,
        "partial_rotary_factor": 0.5,
    },
}


@dataclass(frozen=True)
class Family:
    """A family of source models at a tiny size; nothing in it comes from the package's own table.

    Attributes:
        config, source: the stock classes.
        text: what its text configuration has beside `TEXT`. Mistakes show where `head_dim` isn't the width divided by
            the number of heads, if the family allows that.
        vision: its vision configuration; for a text-only family that of a tower it is given, of another width.
        block: the dense reference's reading of its decoder blocks.
        fusable: decoder blocks that can have a fusion layer.
        tolerance: relative error of float64 models that compute a part of their blocks in float32.
        text_only: whether the source has no tower.
    """

    config: type[PreTrainedConfig]
    source: type[PreTrainedModel]
    text: dict[str, Any]
    vision: dict[str, Any] = field(default_factory=lambda: VISION)
    block: type[Block] = Block
    fusable: tuple[int, ...] = (0, 1, 2)
    tolerance: float = 1e-6
    text_only: bool = False

    def source_config(self, **text: Any) -> PreTrainedConfig:
        """Configuration of the source; further settings are the text configuration's."""
        text = {**TEXT, **self.text, **text}
        if self.text_only:
            return self.config(**text)
        return self.config(text_config=text, vision_config=dict(self.vision), **TOKENS)

    def casa_config(self, variant: str = "casa", source: PreTrainedConfig | None = None, **fields: Any) -> CasaConfig:
        """Configuration of the CASA form, of `source` if given; fields override the variant's."""
        if self.text_only:
            tokens = {"image_token_id": END, "vision_start_token_id": START, "vision_end_token_id": END}
            fields = {**tokens, "vision_config": dict(self.vision), **fields}
        # Token ids here are numbers without text, so that frames have no times unless a test gives them some.
        fields = {"video_timestamps": None, **fields}
        return CasaConfig.from_source(source or self.source_config(), variant, **fields)

    @property
    def num_deepstack(self) -> int:
        """Number of features per token that are added after the first decoder blocks."""
        return 0 if self.text_only else len(self.vision.get("deepstack_visual_indexes", ()))


# By `model_type` of the text configuration.
FAMILIES = {
    "qwen2_vl_text": Family(
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        text={"max_window_layers": 3, "rope_parameters": SECTIONS},
        vision=QWEN2_VL_VISION,
    ),
    "qwen2_5_vl_text": Family(
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        text={"max_window_layers": 3, "rope_parameters": SECTIONS},
    ),
    "qwen3_vl_text": Family(
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        text={
            "head_dim": 24,
            "rope_parameters": {**ROPE, "mrope_section": [4, 4, 4], "mrope_interleaved": True},
        },
        vision=QWEN3_VL_VISION,
        block=Qwen3Block,
    ),
    "qwen3_vl_moe_text": Family(
        Qwen3VLMoeConfig,
        Qwen3VLMoeForConditionalGeneration,
        text={
            "head_dim": 24,
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 40,
            "mlp_only_layers": [1],
            "router_aux_loss_coef": 0.3,
            "rope_parameters": {**ROPE, "mrope_section": [4, 4, 4], "mrope_interleaved": True},
        },
        vision=QWEN3_VL_VISION,
        block=Qwen3ExpertBlock,
    ),
    "qwen3_5_text": Family(
        Qwen3_5Config,
        Qwen3_5ForConditionalGeneration,
        text=QWEN3_5_TEXT,
        vision=QWEN3_5_VISION,
        block=Qwen3_5Block,
        fusable=(1, 3),
        tolerance=1e-5,
    ),
    "qwen3_5_moe_text": Family(
        Qwen3_5MoeConfig,
        Qwen3_5MoeForConditionalGeneration,
        text={
            **QWEN3_5_TEXT,
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 40,
            "shared_expert_intermediate_size": 32,
            "router_aux_loss_coef": 0.3,
        },
        vision=QWEN3_5_VISION,
        block=Qwen3_5ExpertBlock,
        fusable=(1, 3),
        tolerance=1e-4,
    ),
    "helium": Family(
        HeliumConfig,
        HeliumForCausalLM,
        text={"head_dim": 16, "rope_parameters": ROPE},
        vision={**VISION, "out_hidden_size": 48},
        block=HeliumBlock,
        text_only=True,
    ),
    "llama": Family(
        LlamaConfig,
        LlamaForCausalLM,
        text={"head_dim": 24, "attention_bias": True, "mlp_bias": True, "rope_parameters": ROPE},
        vision={**VISION, "out_hidden_size": 48},
        text_only=True,
    ),
    "qwen2": Family(
        Qwen2Config,
        Qwen2ForCausalLM,
        text={"max_window_layers": 3, "rope_parameters": ROPE},
        vision={"model_type": "qwen2_vl_vision", **QWEN2_VL_VISION, "hidden_size": 48},
        text_only=True,
    ),
    "qwen3": Family(
        Qwen3Config,
        Qwen3ForCausalLM,
        text={"head_dim": 24, "rope_parameters": ROPE},
        vision={"model_type": "qwen3_vl_vision", **QWEN3_VL_VISION, "out_hidden_size": 48},
        block=Qwen3Block,
        text_only=True,
    ),
    "smollm3": Family(
        SmolLM3Config,
        SmolLM3ForCausalLM,
        text={"attention_bias": True, "mlp_bias": True, "no_rope_layers": [1, 0, 1], "rope_parameters": ROPE},
        vision={**VISION, "out_hidden_size": 48},
        block=SmolLM3Block,
        text_only=True,
    ),
}


# Of the family in tests that aren't about families.
source_config = FAMILIES["qwen2_5_vl_text"].source_config
casa_config = FAMILIES["qwen2_5_vl_text"].casa_config


def random_weights(config: CasaConfig, seed: int = 0) -> dict[str, Tensor]:
    """Parameters of the language model and its fusion layers by checkpoint name, float64.

    Args:
        config: says which tensors there are.
        seed: of the random numbers; a tensor's values depend on the seed and its name alone, so that two designs have
            the same values in the tensors that both have.
    """
    source = _source_shapes(config.text_config.to_json_string())
    attending = {_block(name) for name in source if ".self_attn." in name}
    fused = attending if config.casa_layers is None else set(config.casa_layers)
    placement, own = config.casa_placement, not config.casa_share_projections
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in source.items():
        is_attention, is_norm = ".self_attn." in name, ".input_layernorm." in name
        if _block(name) not in fused or not (is_attention and placement == "replace"):
            shapes[name] = shape
        if _block(name) not in fused:
            continue
        if is_attention and own:
            shapes[name.replace("self_attn", "casa_attn")] = shape
        if is_norm and own and config.casa_image_norm == "input":
            shapes[name.replace("input_layernorm", "casa_attn.image_norm")] = shape
        if is_norm and placement in ("before", "after"):
            shapes[name.replace("input_layernorm", "casa_layernorm")] = shape
        if is_norm and config.casa_gate:
            shapes[name.replace("input_layernorm.weight", "casa_attn.gate")] = (1,)
        if is_norm and _block(name) not in attending:  # projections are like those of another block
            for other, of_other in source.items():
                if f".{min(attending)}.self_attn." in other:
                    part = other.partition("self_attn.")[2]
                    shapes[name.replace("input_layernorm.weight", f"casa_attn.{part}")] = of_other
    return {name: random_tensor(name, shape, seed) for name, shape in shapes.items()}


def _block(name: str) -> int | None:
    """Index of the decoder block that a tensor belongs to."""
    found = re.search(r"\.layers\.(\d+)\.", name)
    return None if found is None else int(found.group(1))


@cache
def _source_shapes(text_config: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of the stock language model by their names in memory."""
    fields = json.loads(text_config)
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.for_model(**fields))
    shapes = {f"model.language_model.{name}": tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return {**shapes, "lm_head.weight": (fields["vocab_size"], fields["hidden_size"])}


def random_tensor(name: str, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """A float64 tensor of the size that the parameter of this name would have in a trained model, roughly."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    if "embed_tokens" in name or name.endswith("gate"):
        return noise
    if name.endswith("bias"):
        return 0.3 * noise
    if name.endswith("A_log"):
        return noise - 2  # so that a state is remembered for some tokens
    if len(shape) == 1:
        return 1 + 0.3 * noise
    fan_in = shape[-1] if len(shape) == 3 else noise[0].numel()  # of a matrix per expert, or one of any other form
    return 1.5 * noise / fan_in**0.5


def features(height: int, width: int, seed: int) -> Tensor:
    """(height * width, hidden) image features in the merged grid."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(height * width, HIDDEN, generator=generator, dtype=torch.float64)


def sample(script: str, seed: int = 0, num_deepstack: int = 0) -> Sample:
    """A sample from a script: words separated by blanks.

    `5` is five random text tokens, `2x3` an image of 2 x 3 merged tokens between its delimiters, `f2x3` a frame of a
    video. More letters before the size: `g` gist tokens follow the image; `e` only the closing delimiter is written;
    `b` no delimiter at all, the image stands before whatever comes next; `s` the same features as the last image of
    that size. The word `gists` is the gist tokens alone, `d5` five text tokens that belong to the delimiters. Images
    have `num_deepstack` further features per token.
    """
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    images: list[Image] = []
    delimiters: list[int] = []
    for word in script.split():
        if word.removeprefix("d").isdigit():
            number = int(word.removeprefix("d"))
            delimiters += range(len(ids), len(ids) + number) if word.startswith("d") else ()
            ids += torch.randint(3, 50, (number,), generator=generator).tolist()
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
        deepstack = tuple(features(height, width, 10_000 + 100 * len(images) + n) for n in range(num_deepstack))
        images.append(Image(len(ids), (height, width), content, "f" in letters, deepstack))
        ids += [END] if "b" not in letters else []
        ids += GISTS if "g" in letters else []
    return Sample(ids, tuple(images), delimiters=tuple(delimiters))
