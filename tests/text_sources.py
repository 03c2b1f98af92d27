# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Small text checkpoints as people have them: instruct models with turns of their own, and base models without any.

Their tokenizers have the classes, the pre-tokenisation and the kinds of control tokens that the families' have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GenerationConfig,
    HeliumConfig,
    HeliumForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from examples.tiny_source import CORPUS, build_text_tokenizer, build_tokenizer

# Headers, trimmed contents, the system message taken out of the messages.
LLAMA_TEMPLATE = """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = '' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' + system_message + '<|eot_id|>' }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim }}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
# ChatML in which only strings are contents, and what isn't one is left out without a word.
CHATML_TEMPLATE = """\
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == 'assistant' and '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def llama3_tokenizer(*control: str) -> PreTrainedTokenizerFast:
    """A tokenizer like those of Llama 3: bytes, numbers in threes, control tokens behind, the first one before all."""
    special = ["<|begin_of_text|>", "<|end_of_text|>", *control]
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS.splitlines(), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    begin = (special[0], tokenizer.token_to_id(special[0]))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{begin[0]} $A", special_tokens=[begin])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=special[0], eos_token=special[1])


@dataclass(frozen=True)
class TextSource:
    """A small text checkpoint.

    Attributes:
        config, model: the stock classes.
        tokenizer: makes its tokenizer.
        template: its chat template; None for a base model.
        stop: the token that ends an answer, where that isn't the tokenizer's.
        spare_rows: rows of the embeddings behind the tokenizer's.
        settings: of its configuration.
    """

    config: type[PreTrainedConfig]
    model: type[PreTrainedModel]
    tokenizer: Callable[[], Any]
    template: str | None = None
    stop: str | None = None
    spare_rows: int = 0
    settings: dict[str, Any] | None = None

    def build(self, folder: Path) -> Path:
        """Write the checkpoint with random weights."""
        tokenizer = self.tokenizer()
        if self.stop is not None:
            tokenizer.eos_token = self.stop
        tokenizer.chat_template = self.template
        config = self.config(
            vocab_size=len(tokenizer) + self.spare_rows,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **self.settings or {},
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.model(config)
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, float(parameter.ndim == 1), 0.2)
        model.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id
        )
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder


_LLAMA_TOKENS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", *(f"<|reserved_{i}|>" for i in range(3)))
TEXT_SOURCES = {
    "llama-instruct": TextSource(
        LlamaConfig,
        LlamaForCausalLM,
        lambda: llama3_tokenizer(*_LLAMA_TOKENS),
        LLAMA_TEMPLATE,
        "<|eot_id|>",
        settings={"tie_word_embeddings": True},
    ),
    "qwen3-instruct": TextSource(
        Qwen3Config, Qwen3ForCausalLM, build_tokenizer, CHATML_TEMPLATE, spare_rows=50, settings={"use_cache": True}
    ),
    "smollm3-instruct": TextSource(
        SmolLM3Config,
        SmolLM3ForCausalLM,
        lambda: llama3_tokenizer("<|im_start|>", "<|im_end|>", "<think>", "</think>"),
        CHATML_TEMPLATE,
        "<|im_end|>",
        spare_rows=1,
        settings={"no_rope_layers": [1, 1, 0], "tie_word_embeddings": True},
    ),
    "llama-base": TextSource(LlamaConfig, LlamaForCausalLM, build_text_tokenizer),
    "qwen2-base": TextSource(Qwen2Config, Qwen2ForCausalLM, build_tokenizer, spare_rows=3),
    "helium-base": TextSource(HeliumConfig, HeliumForCausalLM, build_text_tokenizer),
}
