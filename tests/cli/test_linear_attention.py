# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""A checkpoint with blocks of linear attention on the command line: conversion there and back, answers, captions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from casa_hf import CasaForConditionalGeneration, CasaProcessor, CasaStream, Conversation
from casa_hf.samples import CAT, COFFEE, ROCKET
from casa_hf.streaming import LiveCaptions
from casa_hf.video import open_video
from examples.tiny_source import build_tiny_source
from tests.command_line import Cli
from tests.conversion.helpers import Tensors, altered, assert_same, load_weights

SHORT = ("--max-new-tokens", "6", "--device", "cpu")
BUNNY = str(Path(__file__).parents[2] / "examples" / "assets" / "bunny.mp4")
# As published checkpoints have them.
MTP: Tensors = {
    "mtp.fc.weight": torch.ones(64, 128),
    "mtp.layers.0.self_attn.q_proj.weight": torch.ones(128, 64),
    "mtp.norm.weight": torch.ones(64),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen3_5")
    plain = build_tiny_source(folder / "plain", family="qwen3_5", num_hidden_layers=4)
    return altered(plain, folder / "source", weights=lambda tensors: {**tensors, **MTP})


@pytest.fixture
def casa(cli: Cli, source: Path, tmp_path: Path) -> Path:
    outcome = cli("convert", source, tmp_path / "casa", "--max-pixels", "65536")
    assert outcome.code == 0, outcome.err
    assert "left out: 3 tensors (mtp.*, which predict further tokens in speculative decoding)" in outcome.out
    return tmp_path / "casa"


def test_a_checkpoint_goes_there_and_back_without_its_further_heads(
    cli: Cli, source: Path, casa: Path, tmp_path: Path
) -> None:
    plan = cli("convert", source, "--dry-run")
    assert "left out: 3 tensors (mtp.*, which predict" in plan.out
    shown = dict(line.split(maxsplit=1) for line in cli("inspect", casa).out.splitlines() if "  " in line)
    assert shown["fusion"] == "layers  2 of 4 blocks: 1, 3" and shown["backbone"] == "Qwen3.5"
    # Two blocks: 4 inputs of 2 * 2 * 16 + 4 * 16 channels and 4 heads of 16 x 16, in float32.
    assert (
        shown["recurrent"] == f"{2 * 4 * (4 * 128 + 4 * 16 * 16) / 1000:.1f} kB for each sequence, however long it is"
    )
    assert cli("convert", casa, tmp_path / "back", "--to-source").code == 0
    assert_same(load_weights(tmp_path / "back"), {n: t for n, t in load_weights(source).items() if n not in MTP})
    model, report = AutoModelForImageTextToText.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert type(model).__name__ == "Qwen3_5ForConditionalGeneration" and not any(report.values())


def test_text_is_answered_as_by_the_source(source: Path, casa: Path) -> None:
    """Both as converted, and as loaded from the source itself."""
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
    stock = AutoModelForImageTextToText.from_pretrained(source)
    expected = stock.generate(ids, max_new_tokens=8, do_sample=False)
    for folder in (casa, source):
        model = CasaForConditionalGeneration.from_pretrained(folder)
        assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), expected)


def test_rows_of_a_batch_are_answered_as_one_by_one(cli: Cli, casa: Path) -> None:
    questions = {
        "What?": CAT,
        "A longer question, so that rows of the batch differ: what colour?": COFFEE,
        "Why?": ROCKET,
    }
    given = [x for prompt, image in questions.items() for x in ("--prompt", prompt, "--image", image)]
    outcome = cli("generate", casa, *given, *SHORT)
    assert outcome.code == 0, outcome.err
    model, processor = CasaForConditionalGeneration.from_pretrained(casa).eval(), CasaProcessor.from_pretrained(casa)
    answers = [json.loads(line)["answer"] for line in outcome.out.splitlines()]
    assert answers == [
        Conversation(model, processor).ask(prompt, image, max_new_tokens=6) for prompt, image in questions.items()
    ]
    assert len(set(answers)) == 3


def test_captions_are_those_of_a_stream_that_forgets(cli: Cli, casa: Path, tmp_path: Path) -> None:
    pytest.importorskip("av")
    file = tmp_path / "captions.jsonl"
    cut = ("--start", "1", "--end", "4", "--max-new-tokens", "4", "--max-text-tokens", "60", "--device", "cpu")
    outcome = cli("caption", BUNNY, "--model", casa, "--out", file, *cut)
    assert outcome.code == 0, outcome.err
    found = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    model, processor = CasaForConditionalGeneration.from_pretrained(casa).eval(), CasaProcessor.from_pretrained(casa)
    stream = CasaStream(model, processor, fps=2, max_new_tokens_per_frame=4, max_text_tokens=60)
    expected = list(LiveCaptions(stream, open_video(BUNNY, fps=2, start=1, end=4)))
    assert stream.num_text_tokens <= 60 + 8
    assert [(event["kind"], event["text"]) for event in found] == [(event.kind, event.text) for event in expected]


def test_equal_variants_say_that_they_are(cli: Cli, source: Path, tmp_path: Path) -> None:
    """Fusion in all blocks that can have it is enough: images pass the others in the sequence."""
    notes = {}
    for variant in ("insertion", "exact", "casa"):
        outcome = cli("convert", source, tmp_path / variant, "--variant", variant)
        assert outcome.code == 0, outcome.err
        notes[variant] = outcome.out.splitlines()[-1]
    assert "untrained" in notes["casa"]
    assert "prompts of text and still images" in notes["insertion"] and "untrained" not in notes["insertion"]
    assert "one group of still images" in notes["exact"] and "untrained" not in notes["exact"]
