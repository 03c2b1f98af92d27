# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Small checkpoints with random weights, of every family that CASA is built on.

`build_tiny_source` writes a folder with everything that a downloaded Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Qwen3-VL-MoE,
Qwen3.5 or Qwen3.5-MoE folder has: weights and configuration as the stock classes save them, a byte-level BPE tokenizer
with Qwen's special tokens, the image processor's settings and a chat template. `build_tiny_helium` does the same for
the text-only Helium. They answer nothing sensible, but they take every path that trained checkpoints take, in seconds
and without a network.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    GenerationConfig,
    HeliumConfig,
    HeliumForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

# What the tokenizer learns its merges from.
CORPUS = """\
The picture shows a small cat with amber eyes. The cat looks straight into the camera; its whiskers catch the light.
What is in this picture? Describe the image in one sentence. Which of the two pictures was taken first, and why?
A cup of coffee stands on a wooden table. Next to the cup there is a spoon, and behind it a glass of water.
How many people are in the second image? There are three people: two of them are sitting, one of them is walking away.
The first frame of the video shows a rocket before its launch; in the next frames smoke and fire fill the screen.
You are a helpful assistant. The user asks questions about pictures and videos, and the assistant answers them.
The system reads text from left to right, one token after another. An image stands between two words of the text.
What changed between the first and the last frame? The sky was dark at the beginning and bright at the end.
Read the sign on the left: it says "Open from 9 to 17, closed on Sunday". The other sign can't be read from here.
In 2024 the house was painted white, in 2025 it was painted blue. The windows weren't changed, nor was the door.
Say something about the colours: the grass is green, the roof is red, the flowers are yellow and the road is grey.
I don't know what the person in the middle is holding. It's either a book or a box, and they're showing it to us.
Write a short caption for this image. Compare this photograph with the previous one and list three differences.
def answer(question, image):
    return model.generate(processor(text=question, images=image))
"""

# Same output as the templates that Qwen checkpoints ship; the older ones begin with a default system message.
_DEFAULT_SYSTEM = """\
{%- if messages[0].role != 'system' -%}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
"""
TURNS_TEMPLATE = """\
{%- set seen = namespace(images=0, videos=0) -%}
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' -}}
    {%- if message.content is string -%}
        {{- message.content -}}
    {%- else -%}
        {%- for part in message.content -%}
            {%- if part.type == 'image' or 'image' in part or 'image_url' in part -%}
                {%- set seen.images = seen.images + 1 -%}
                {{- 'Picture ' ~ seen.images ~ ': ' if add_vision_id -}}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
            {%- elif part.type == 'video' or 'video' in part -%}
                {%- set seen.videos = seen.videos + 1 -%}
                {{- 'Video ' ~ seen.videos ~ ': ' if add_vision_id -}}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
            {%- elif 'text' in part -%}
                {{- part.text -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{{- '<|im_start|>assistant\\n' if add_generation_prompt -}}
"""

CHAT_TEMPLATE = _DEFAULT_SYSTEM + TURNS_TEMPLATE

IMAGE_PROCESSOR = {
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2_5_VLProcessor",
}
_QWEN3_PROCESSOR = {
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "Qwen3VLProcessor",
}


@dataclass(frozen=True)
class Family:
    """What differs between families of vision-language models.

    Attributes:
        config, model: the stock classes.
        text: (blocks, pairs of a rotary head) -> settings of the text configuration.
        vision: (blocks, output width) -> settings of the vision configuration.
        chat_template: Jinja template of conversations.
        processor_files: content of the processor's files by file name.
    """

    config: type[PreTrainedConfig]
    model: type[PreTrainedModel]
    text: Callable[[int, int], dict[str, Any]]
    vision: Callable[[int, int], dict[str, Any]]
    chat_template: str
    processor_files: dict[str, dict[str, Any]]


def _qwen2_text(num_hidden_layers: int, rotary_pairs: int) -> dict[str, Any]:
    time = rotary_pairs // 4
    height = (rotary_pairs - time) // 2
    return {
        "max_window_layers": num_hidden_layers,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1_000_000.0,
            "mrope_section": [time, height, rotary_pairs - time - height],
        },
    }


def _qwen3_text(num_hidden_layers: int, rotary_pairs: int) -> dict[str, Any]:
    side = rotary_pairs // 3  # interleaved sections can't be longer
    return {
        "head_dim": 2 * rotary_pairs,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5_000_000.0,
            "mrope_section": [rotary_pairs - 2 * side, side, side],
            "mrope_interleaved": True,
        },
    }


_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40}


def _qwen3_moe_text(num_hidden_layers: int, rotary_pairs: int) -> dict[str, Any]:
    return {**_qwen3_text(num_hidden_layers, rotary_pairs), **_EXPERTS, "mlp_only_layers": [1]}


def _qwen3_5_text(num_hidden_layers: int, rotary_pairs: int) -> dict[str, Any]:
    pairs = rotary_pairs // 2
    side = pairs // 3
    kinds = ["linear_attention", "full_attention"]  # three of four are linear in published models
    return {
        "head_dim": 2 * rotary_pairs,
        "layer_types": [kinds[number % 2] for number in range(num_hidden_layers)],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000_000.0,
            "mrope_section": [pairs - 2 * side, side, side],
            "mrope_interleaved": True,
            "partial_rotary_factor": 0.5,
        },
    }


def _qwen3_5_moe_text(num_hidden_layers: int, rotary_pairs: int) -> dict[str, Any]:
    return {**_qwen3_5_text(num_hidden_layers, rotary_pairs), **_EXPERTS, "shared_expert_intermediate_size": 32}


def _qwen2_vision(depth: int, out_hidden_size: int) -> dict[str, Any]:
    return {
        "depth": depth,
        "embed_dim": 32,
        "mlp_ratio": 2,
        "num_heads": 2,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "hidden_size": out_hidden_size,
    }


def _qwen2_5_vision(depth: int, out_hidden_size: int) -> dict[str, Any]:
    return {
        "depth": depth,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [depth - 1],
        "out_hidden_size": out_hidden_size,
    }


def _qwen3_vision(depth: int, out_hidden_size: int) -> dict[str, Any]:
    return {
        "depth": depth,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": list(range(depth - 1)),
        "out_hidden_size": out_hidden_size,
    }


def _qwen3_5_vision(depth: int, out_hidden_size: int) -> dict[str, Any]:
    vision = _qwen3_vision(depth, out_hidden_size)
    del vision["deepstack_visual_indexes"]
    return vision


_QWEN3_PROCESSOR_FILES = {
    "preprocessor_config.json": {
        "size": {"longest_edge": 16777216, "shortest_edge": 65536},
        **_QWEN3_PROCESSOR,
        "image_processor_type": "Qwen2VLImageProcessorFast",
    },
    "video_preprocessor_config.json": {
        "size": {"longest_edge": 25165824, "shortest_edge": 4096},
        **_QWEN3_PROCESSOR,
        "video_processor_type": "Qwen3VLVideoProcessor",
    },
}

FAMILIES = {
    "qwen2_vl": Family(
        config=Qwen2VLConfig,
        model=Qwen2VLForConditionalGeneration,
        text=_qwen2_text,
        vision=_qwen2_vision,
        chat_template=CHAT_TEMPLATE,
        processor_files={"preprocessor_config.json": {**IMAGE_PROCESSOR, "processor_class": "Qwen2VLProcessor"}},
    ),
    "qwen2_5_vl": Family(
        config=Qwen2_5_VLConfig,
        model=Qwen2_5_VLForConditionalGeneration,
        text=_qwen2_text,
        vision=_qwen2_5_vision,
        chat_template=CHAT_TEMPLATE,
        processor_files={"preprocessor_config.json": IMAGE_PROCESSOR},
    ),
    "qwen3_vl": Family(
        config=Qwen3VLConfig,
        model=Qwen3VLForConditionalGeneration,
        text=_qwen3_text,
        vision=_qwen3_vision,
        chat_template=TURNS_TEMPLATE,
        processor_files=_QWEN3_PROCESSOR_FILES,
    ),
    "qwen3_vl_moe": Family(
        config=Qwen3VLMoeConfig,
        model=Qwen3VLMoeForConditionalGeneration,
        text=_qwen3_moe_text,
        vision=_qwen3_vision,
        chat_template=TURNS_TEMPLATE,
        processor_files=_QWEN3_PROCESSOR_FILES,
    ),
    "qwen3_5": Family(
        config=Qwen3_5Config,
        model=Qwen3_5ForConditionalGeneration,
        text=_qwen3_5_text,
        vision=_qwen3_5_vision,
        chat_template=TURNS_TEMPLATE,
        processor_files=_QWEN3_PROCESSOR_FILES,
    ),
    "qwen3_5_moe": Family(
        config=Qwen3_5MoeConfig,
        model=Qwen3_5MoeForConditionalGeneration,
        text=_qwen3_5_moe_text,
        vision=_qwen3_5_vision,
        chat_template=TURNS_TEMPLATE,
        processor_files=_QWEN3_PROCESSOR_FILES,
    ),
}


def build_tiny_source(
    folder: str | Path,
    *,
    family: str = "qwen2_5_vl",
    seed: int = 0,
    tie_word_embeddings: bool = False,
    hidden_size: int = 64,
    num_hidden_layers: int = 3,
    num_attention_heads: int = 4,
    num_key_value_heads: int = 2,
    vision_depth: int = 2,
    dtype: torch.dtype = torch.float32,
    max_shard_size: int | str = "5GB",
) -> Path:
    """Write a complete vision-language checkpoint of random weights.

    Args:
        folder: where to write; made if absent.
        family: a key of `FAMILIES`.
        seed: of the weights. The global random state is neither used nor changed.
        tie_word_embeddings: whether the output head is the embedding matrix.
        hidden_size: width of the language model; the width of a head is `hidden_size / num_attention_heads`.
        num_hidden_layers: decoder blocks.
        num_attention_heads: query heads of a decoder block.
        num_key_value_heads: key and value heads of a decoder block.
        vision_depth: blocks of the vision tower. In Qwen2.5-VL the last one has full attention, the others windows of
            112 pixels; in Qwen3-VL all but the last one give deepstack features, so at most `num_hidden_layers + 1`.
        dtype: of the saved weights.
        max_shard_size: size above which the weights are split over several files.

    Returns:
        The folder.
    """
    made = FAMILIES[family]
    tokenizer = build_tokenizer()
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    text = {
        "vocab_size": -(-len(tokenizer) // 64) * 64,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": num_key_value_heads,
        "max_position_embeddings": 4096,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "tie_word_embeddings": tie_word_embeddings,
        **made.text(num_hidden_layers, hidden_size // num_attention_heads // 2),
    }
    config = made.config(
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=tie_word_embeddings,
        text_config=text,
        vision_config=made.vision(vision_depth, hidden_size),
    )
    model = _build_model(made.model, config, seed)
    model.generation_config = GenerationConfig(
        bos_token_id=ids["<|endoftext|>"],
        eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"]],
        pad_token_id=ids["<|endoftext|>"],
    )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(folder)
    for name, content in made.processor_files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(made.chat_template, encoding="utf-8")
    return folder


def build_tiny_helium(
    folder: str | Path,
    *,
    seed: int = 0,
    tie_word_embeddings: bool = False,
    hidden_size: int = 64,
    num_hidden_layers: int = 3,
    num_attention_heads: int = 4,
    num_key_value_heads: int = 2,
    dtype: torch.dtype = torch.float32,
    max_shard_size: int | str = "5GB",
) -> Path:
    """Write a complete Helium checkpoint of random weights; every row of its embeddings belongs to a token.

    Args:
        folder, seed, ...: see `build_tiny_source`.

    Returns:
        The folder.
    """
    tokenizer = build_text_tokenizer()
    config = HeliumConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_key_value_heads,
        head_dim=hidden_size // num_attention_heads,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=tie_word_embeddings,
    )
    model = _build_model(HeliumForCausalLM, config, seed)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def build_tokenizer() -> Qwen2Tokenizer:
    """The tokenizer of the small checkpoints."""
    return train_tokenizer(CORPUS.splitlines(), 1024)


def train_tokenizer(texts: list[str], vocab_size: int, chat_template: str | None = None, **training) -> Qwen2Tokenizer:
    """A byte-level BPE tokenizer with Qwen's pre-tokenisation and special tokens, which follow the learned ones.

    Args:
        texts: to learn from.
        vocab_size: number of learned tokens.
        chat_template: of the tokenizer.
        **training: further arguments of the trainer.
    """
    learned = Qwen2Tokenizer().train_new_from_iterator(texts, vocab_size=vocab_size, show_progress=False, **training)
    bpe = json.loads(learned.backend_tokenizer.to_str())["model"]
    pieces = [piece for piece in bpe["vocab"] if piece not in SPECIAL_TOKENS]
    return Qwen2Tokenizer(
        vocab={piece: index for index, piece in enumerate((*pieces, *SPECIAL_TOKENS))},
        merges=[tuple(merge) for merge in bpe["merges"]],
        eos_token="<|im_end|>",
        extra_special_tokens=list(SPECIAL_TOKENS),
        model_max_length=4096,
        chat_template=chat_template,
    )


def build_text_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer in the style of SentencePiece, with `<s>` before every text and bytes for unknown characters."""
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    learned.train_from_iterator(CORPUS.splitlines(), trainers.BpeTrainer(vocab_size=700, show_progress=False))
    bpe = json.loads(learned.to_str())["model"]
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *bpe["vocab"]]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=[tuple(merge) for merge in bpe["merges"]],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    tokenizer.pre_tokenizer = learned.pre_tokenizer
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def _build_model(model_class: type[PreTrainedModel], config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        model = model_class(config)
    _randomize(model, seed)
    return model


@torch.no_grad()
def _randomize(model: nn.Module, seed: int) -> None:
    # The stock initialisation leaves biases at 0 and norms at 1, which would hide mistakes in either. Matrices that
    # double the size of what they multiply make answers vary from token to token and from image to image.
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            fan_in = parameter.shape[-1] if parameter.ndim == 3 else parameter[0].numel()  # of a matrix per expert
            parameter.copy_(2 * noise / fan_in**0.5)
        elif name.endswith("bias"):
            parameter.copy_(0.3 * noise)
        elif name.endswith("A_log"):
            parameter.copy_(noise - 3)  # so that linear attention remembers some tokens
        else:
            parameter.copy_(1 + 0.3 * noise)
