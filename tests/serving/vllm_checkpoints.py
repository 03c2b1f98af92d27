# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Small random checkpoints that vLLM can serve, of every family and design, with the tokenizer of
`examples/tiny_world`.

Heads are 32 wide, the least that vLLM's kernels for CPUs take. All parameters are random, so that a wrong window,
place or projection gives other tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from casa_hf import CasaConfig, CasaForConditionalGeneration, CasaProcessor
from casa_hf.training.parameters import LORA_TARGETS
from tests.tiny import random_tensor

TINY_WORLD = Path(__file__).parents[2] / "examples" / "tiny_world"
PAD = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"

_TEXT: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "vocab_size": 512,
    "bos_token_id": 475,
    "eos_token_id": 477,
    "pad_token_id": 475,
    "head_dim": 32,
    "tie_word_embeddings": False,
}
_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
_MROPE = {**_ROPE, "mrope_section": [4, 6, 6]}
_QWEN2_5_VISION: dict[str, Any] = {
    "model_type": "qwen2_5_vl_vision",
    "depth": 2,
    "fullatt_block_indexes": [1],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_heads": 2,
    "out_hidden_size": 128,
    "window_size": 112,
}
_QWEN2_VISION: dict[str, Any] = {
    "model_type": "qwen2_vl_vision",
    "depth": 2,
    "embed_dim": 64,
    "hidden_size": 128,
    "num_heads": 2,
    "mlp_ratio": 2,
}
_QWEN3_VISION: dict[str, Any] = {
    "model_type": "qwen3_vl_vision",
    "depth": 3,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_heads": 2,
    "patch_size": 14,
    "out_hidden_size": 128,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0, 1],
}

# Text and vision configurations by family.
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qwen2_5_vl": ({"model_type": "qwen2_5_vl_text", "rope_parameters": _MROPE}, _QWEN2_5_VISION),
    "qwen2_vl": ({"model_type": "qwen2_vl_text", "rope_parameters": _MROPE}, _QWEN2_VISION),
    "qwen3_vl": (
        {"model_type": "qwen3_vl_text", "rope_parameters": {**_MROPE, "mrope_interleaved": True}},
        _QWEN3_VISION,
    ),
    "llama": ({"model_type": "llama", "rope_parameters": _ROPE}, _QWEN2_5_VISION),
    "qwen3": ({"model_type": "qwen3", "rope_parameters": _ROPE}, _QWEN2_5_VISION),
}


def configuration(family: str = "qwen2_5_vl", variant: str = "casa", **fields: Any) -> CasaConfig:
    """The configuration of a small model; fields override the variant's."""
    text, vision = FAMILIES[family]
    ids = {"image_token_id": 485, "vision_start_token_id": 484, "vision_end_token_id": 485}  # of the tokenizer
    return CasaConfig.from_variant(variant, text_config={**_TEXT, **text}, vision_config=vision, **{**ids, **fields})


def save_checkpoint(folder: Path, family: str = "qwen2_5_vl", variant: str = "casa", **fields: Any) -> Path:
    """A random checkpoint with processor; fields override the variant's."""
    processor = CasaProcessor.from_pretrained(TINY_WORLD / "checkpoints" / "casa", max_pixels=112 * 112)
    tokenizer = processor.tokenizer
    gists = [f"<|gist_{index}|>" for index in range(fields.get("num_gist_tokens", 0))]
    if gists:
        tokenizer.add_special_tokens({"extra_special_tokens": gists}, replace_extra_special_tokens=False)
        processor = CasaProcessor(
            processor.image_processor, tokenizer, processor.chat_template, num_gist_tokens=len(gists)
        )
        fields["gist_token_ids"] = processor.gist_token_ids
        fields["new_tokens"] = dict(zip(gists, processor.gist_token_ids, strict=True))
    config = configuration(family, variant, **fields)
    config.architectures = ["CasaForConditionalGeneration"]
    model = CasaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(random_tensor(name, tuple(parameter.shape)))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def quantise(folder: Path, scheme: str) -> None:
    """Quantise the projections of the language model's blocks in a checkpoint, as llm-compressor does by rounding;
    `scheme` is a name in `compressed_tensors`."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
        preset_name_to_scheme,
    )
    from compressed_tensors.quantization.utils import calculate_qparams

    model = CasaForConditionalGeneration.from_pretrained(folder)
    chosen: QuantizationScheme = preset_name_to_scheme(scheme, ["Linear"])
    assert chosen.weights is not None
    if chosen.weights.group_size:
        chosen.weights.group_size = 32  # an inner size of 192 is no multiple of 128
    config = QuantizationConfig(config_groups={"projections": chosen}, ignore=["lm_head", "re:.*visual.*"])
    apply_quantization_config(model, config)
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            rows = module.weight.data.unflatten(1, (-1, chosen.weights.group_size or module.in_features))
            scale, zero = calculate_qparams(rows.amin(-1), rows.amax(-1), chosen.weights)
            module.weight_scale.data.copy_(scale.view_as(module.weight_scale))
            if hasattr(module, "weight_zero_point"):
                module.weight_zero_point.data.copy_(zero.view_as(module.weight_zero_point))
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))


def save_adapter(checkpoint: Path, folder: Path, targets: str, rank: int) -> Path:
    """A random LoRA adapter of a checkpoint, written by PEFT; `targets` is a name in `LORA_TARGETS`."""
    from peft import LoraConfig, get_peft_model

    model = CasaForConditionalGeneration.from_pretrained(checkpoint)
    adapted = get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=LORA_TARGETS[targets]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(random_tensor(f"{folder.name} {name}", tuple(parameter.shape)) / 2)
    adapted.save_pretrained(folder)
    return folder


def chat(*turns: tuple[str, str]) -> str:
    """A conversation as the chat template writes it."""
    text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
    return text + "<|im_start|>assistant\n"


def requests() -> list[tuple[str, list[Image.Image]]]:
    """Prompts and their images: groups, several turns, one after another, none, odd sizes, long text around images and
    common beginnings with other pictures."""
    found: list[tuple[str, list[Image.Image]]] = []
    pictures: list[Image.Image] = []
    for line in (TINY_WORLD / "held_out" / "questions.jsonl").read_text().splitlines()[::3]:
        question = json.loads(line)
        images = [Image.open(TINY_WORLD / "held_out" / name).convert("RGB") for name in question["images"]]
        turns = []
        for message in question["messages"][:-1]:
            content = message["content"]
            if not isinstance(content, str):
                content = "".join(PAD if part["type"] == "image" else part["text"] for part in content)
            turns.append((message["role"], content.replace("<image>", PAD)))
        found.append((chat(*turns), images))
        pictures += images
    a, b, c = pictures[0], pictures[2], pictures[4]
    filler = (
        "The picture shows a small cat with amber eyes. The cat looks straight into the camera; it is not afraid. "
    )
    first = [
        ("user", "You are a helpful assistant. " + filler + PAD + filler + "What is this?"),
        ("assistant", filler),
    ]
    found += [
        (chat(("user", PAD + PAD + "What changed?")), [a, b]),
        (chat(("user", PAD + "What is this?"), ("assistant", "red square"), ("user", PAD + "And this?")), [a, c]),
        (
            chat(("user", f"First {PAD} then {PAD}{PAD} what is it?"), ("assistant", "blue"), ("user", "Sure?")),
            [c, a, b],
        ),
        (chat(("user", "What is a square?")), []),
        (chat(("user", PAD + "What is this?")), [b.resize((112, 56))]),
        (chat(("user", PAD + "What is this?")), [b.resize((56, 140))]),
        (chat(*first, ("user", "And what else?")), [a]),
        (chat(*first, ("user", "And what else?")), [b]),
        (chat(*first, ("user", PAD + "And this?"), ("assistant", filler), ("user", "Hm?")), [a, b]),
        (chat(*first, ("user", PAD + PAD + "Compare.")), [a, b, c]),
        (chat(*first, ("user", PAD + PAD + "Compare.")), [a, c, b]),
    ]
    return found


def single_images() -> list[tuple[str, list[Image.Image]]]:
    """Those of `requests` in which no image follows another without text in between."""
    return [(prompt, images) for prompt, images in requests() if PAD + PAD not in prompt]


def videos() -> list[tuple[str, list[Any]]]:
    """Prompts and their videos, arrays of frames: one, two, of one frame, and with text before and after."""
    frames = [image.resize((112, 84)) for _, images in requests() for image in images]
    clips = [np.stack([np.asarray(frame) for frame in frames[start : start + 4]]) for start in (0, 3, 5)]
    return [
        (chat(("user", VIDEO + "What happens?")), clips[:1]),
        (chat(("user", f"Look. {VIDEO}What happens? {VIDEO}And here?")), clips[1:3]),
        (chat(("user", VIDEO + "What is this?"), ("assistant", "a square"), ("user", "Sure?")), [clips[0][:1]]),
        (chat(("user", VIDEO + VIDEO)), [clips[2], clips[1][:3]]),
    ]
