# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Text models that get eyes, from the command line: converted, asked, trained, converted back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from casa_hf import CasaForConditionalGeneration, CasaProcessor, CasaStream
from casa_hf.chat import Conversation
from casa_hf.samples import PHOTOGRAPHS
from tests.command_line import Cli
from tests.conversion.helpers import load_weights
from tests.text_sources import TEXT_SOURCES

CAT = PHOTOGRAPHS / "cat.jpg"
IMAGE = "<|vision_start|><|vision_end|>"
QUICK = ("llama-instruct", "qwen3-instruct", "helium-base")
# How each writes a question about an image.
TURNS = {
    "llama-instruct": f"<|start_header_id|>user<|end_header_id|>\n\n{IMAGE}What?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "qwen3-instruct": f"<|im_start|>user\n{IMAGE}What?<|im_end|>\n<|im_start|>assistant\n",
    "smollm3-instruct": f"<|im_start|>user\n{IMAGE}What?<|im_end|>\n<|im_start|>assistant\n",
}
MATRICES = {"model.embed_tokens.weight", "lm_head.weight"}
BASE_TURN = f"User: {IMAGE}What?\nAssistant:"


def write_run(folder: Path, model: Path) -> Path:
    """The settings of a run of one step, with data."""
    rows = [
        {
            "messages": [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": answer}],
            "image": str(CAT),
        }
        for answer in ("A small cat.", "It looks into the camera.")
    ]
    (folder / "data.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    settings = {
        "model": str(model),
        "data": str(folder / "data.jsonl"),
        "output": str(folder / "trained"),
        "max_text_tokens": 200,
        "max_steps": 1,
        "warmup_steps": 0,
        "lr_new": 1e-2,
        "sequences_per_update": 1,
        "use_cpu": True,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    return folder / "run.yaml"


def assert_same_files(back: Path, source: Path, trained: bool) -> None:
    """All but the weights; training gives `generate` the tokenizer's padding."""
    for file in source.iterdir():
        if file.name not in ("config.json", "model.safetensors", *["generation_config.json"] * trained):
            assert (back / file.name).read_bytes() == file.read_bytes(), file.name
    configs = [AutoModelForCausalLM.from_pretrained(folder).config.to_dict() for folder in (back, source)]
    assert configs[0] | {"_name_or_path": ""} == configs[1] | {"_name_or_path": ""}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in TEXT_SOURCES]
)
def test_from_a_text_model_to_one_that_sees_and_back(cli: Cli, source_folder: Path, tmp_path: Path, name: str) -> None:
    source = TEXT_SOURCES[name].build(tmp_path / "text")
    casa = tmp_path / "casa"
    outcome = cli("convert", source, casa, "--vision-from", source_folder, "--max-pixels", "7056")
    assert outcome.code == 0, outcome.err
    stock_tokenizer, processor = AutoTokenizer.from_pretrained(source), CasaProcessor.from_pretrained(casa)
    has_pair = "qwen" in name
    new = {} if has_pair else {"<|vision_start|>": len(stock_tokenizer), "<|vision_end|>": len(stock_tokenizer) + 1}
    assert outcome.out.count(": the mean of all") == (0 if has_pair else len(load_weights(source).keys() & MATRICES))

    # Text alone.
    model, stock = CasaForConditionalGeneration.from_pretrained(casa), AutoModelForCausalLM.from_pretrained(source)
    assert model.config.new_tokens == new
    text = "What is in this picture? 12345 Größe\n\n"
    ids = torch.tensor([stock_tokenizer(text)["input_ids"]])
    assert processor(text=text)["input_ids"] == ids.tolist()
    with torch.no_grad():
        known = slice(len(stock_tokenizer))  # of rows behind these, new tokens may have taken some
        assert torch.equal(model(ids).logits[..., known], stock(ids).logits[..., known])

    if stock_tokenizer.chat_template is not None:
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What?"}]
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
        stock_ids = stock_tokenizer.apply_chat_template(messages, **options)["input_ids"]
        assert processor.apply_chat_template(messages, **options)["input_ids"] == [stock_ids]

    # Asked about an image, in the source's own turns.
    question = {"role": "user", "content": [{"type": "image", "image": str(CAT)}, {"type": "text", "text": "What?"}]}
    prompt = processor.apply_chat_template([question], add_generation_prompt=True)
    assert prompt.endswith(TURNS.get(name, BASE_TURN))
    asked = cli("generate", casa, "--image", CAT, "--prompt", "What?", "--max-new-tokens", "4")
    inputs = processor.apply_chat_template(
        [question], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    answer = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    expected = processor.decode(answer, skip_special_tokens=True).strip()
    assert (asked.code, asked.out.strip()) == (0, expected), asked.err
    answers = Conversation(model, processor).ask("What?", [str(CAT)], max_new_tokens=4, do_sample=False)
    assert answers.strip() == expected
    stream = CasaStream(model, processor, prompt="What happens?", max_new_tokens_per_frame=2)
    captions = [event.kind for _ in range(2) for event in stream.push(str(CAT))]
    assert captions.count("end") == 2 and "error" not in captions
    assert cli("inspect", casa).code == 0

    # Trained for a step, which reaches the new tokens, and converted back.
    outcome = cli("train", write_run(tmp_path, casa))
    assert outcome.code == 0, outcome.err
    for folder, changed in ((casa, False), (tmp_path / "trained", True)):
        back = tmp_path / f"back-{folder.name}"
        outcome = cli("convert", folder, back, "--to-source")
        assert outcome.code == 0, outcome.err
        assert_same_files(back, source, changed)
        before, after = load_weights(source), load_weights(back)
        assert before.keys() == after.keys() and all(before[key].shape == after[key].shape for key in before)
        assert all(torch.equal(before[key], after[key]) for key in before) is not changed
