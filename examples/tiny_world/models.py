# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The source model: Qwen2.5-VL's architecture at about a million parameters, with a tokenizer for the tasks' texts."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from transformers import (
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
)

from examples.tiny_source import IMAGE_PROCESSOR, SPECIAL_TOKENS, TURNS_TEMPLATE, train_tokenizer

from .drawing import TILE
from .world import LESSONS, TASKS

_LEARNED_TOKENS = 512
_INITIALIZER_RANGE = 0.05  # narrow matrices need larger entries


def build_tokenizer() -> Qwen2Tokenizer:
    """A byte-level BPE tokenizer that has learned the texts of all tasks, with Qwen's special tokens behind."""
    return train_tokenizer(_texts(), _LEARNED_TOKENS, TURNS_TEMPLATE, min_frequency=1)


def _texts() -> list[str]:
    """Every word that a conversation can have, many times."""
    texts = ["user\n", "assistant\n", "system\n"] * 50
    for task in (*TASKS.values(), *(LESSONS[name] for name in ("name", "describe", "recite"))):  # others add no words
        for size in task.sizes:
            for example in (task.example(size, "train", index, seed=-1, turns=9) for index in range(40)):
                texts += [part for part in example.lead if part is not None]
                texts += [text for turn in example.turns for text in turn]
    return texts


def source_config(tokenizer: Qwen2Tokenizer, **overrides: Any) -> Qwen2_5_VLConfig:
    """The configuration of the source model.

    Args:
        tokenizer: gives the ids of special tokens and the size of the vocabulary.
        **overrides: fields of the text configuration, or, with the prefix `vision_`, of the vision configuration.
    """
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    vision = {key.removeprefix("vision_"): value for key, value in overrides.items() if key.startswith("vision_")}
    text = {key: value for key, value in overrides.items() if not key.startswith("vision_")}
    text = {
        "vocab_size": -(-len(tokenizer) // 64) * 64,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "tie_word_embeddings": True,
        "initializer_range": _INITIALIZER_RANGE,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [4, 6, 6]},
        **text,
    }
    depth = vision.get("depth", 3)
    return Qwen2_5_VLConfig(
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
        text_config={"max_window_layers": text["num_hidden_layers"], **text},
        vision_config={
            "depth": depth,
            "initializer_range": _INITIALIZER_RANGE,
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_heads": 4,
            "patch_size": TILE // 2,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 4 * TILE,
            "fullatt_block_indexes": [depth - 1],
            "out_hidden_size": text["hidden_size"],
            **vision,
        },
    )


def write_source(
    folder: str | os.PathLike, model: Qwen2_5_VLForConditionalGeneration, tokenizer: Qwen2Tokenizer
) -> Path:
    """Write a complete Qwen2.5-VL checkpoint."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config.text_config
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=[config.eos_token_id, config.bos_token_id],
        pad_token_id=config.pad_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(IMAGE_PROCESSOR, indent=2) + "\n", encoding="utf-8")
    return folder
