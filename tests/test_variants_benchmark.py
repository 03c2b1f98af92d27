# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The benchmark of the variants: its formulas against real models and caches, its gate, its document."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2_5_VLForConditionalGeneration

from benchmarks import variants as benchmark
from benchmarks.counting import Dimensions
from benchmarks.variants import TINY, Contestant
from casa_hf import CasaConfig, CasaForConditionalGeneration, cache_nbytes
from casa_hf.design_space import VARIANTS

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "variants.md"

# Points of the design space that no named variant has.
UNNAMED = (
    {"casa_gate": "tanh", "casa_layers": [0, 2]},
    {"casa_placement": "after", "casa_share_projections": True},
    {"casa_placement": "after", "casa_keys": "image", "casa_image_updates": "full"},
    {"casa_share_projections": True, "casa_image_updates": "full", "casa_layers": [1], "casa_gate": "tanh"},
    {"casa_keys": "image", "casa_share_projections": True, "casa_image_updates": "full", "casa_layers": [1, 2]},
    {"casa_keys": "context", "casa_share_projections": True, "casa_image_updates": "full", "casa_layers": [0]},
    {"casa_keys": "context", "casa_share_projections": True, "casa_layers": [2], "casa_image_history": "all"},
)
DESIGNS = [*((name, {}) for name in VARIANTS), *(("casa", overrides) for overrides in UNNAMED)]


@pytest.fixture(scope="module")
def source() -> Contestant:
    """The source model on plain matrix products, which PyTorch's counter sees."""
    model = build(Qwen2_5_VLForConditionalGeneration, TINY.source_config())
    stream = benchmark.Stream(TINY, model)
    return Contestant(model, stream, stream.source, stream.source_text)


def build(model_class, config):
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    return model_class(config).eval()


def flops(stage) -> int:
    """What PyTorch counts, without the rotary tables, which it makes by a matrix product."""
    counter = FlopCounterMode(display=False)
    with counter:
        stage()
    counts = counter.get_flop_counts()
    rotary = sum(sum(ops.values()) for name, ops in counts.items() if name.endswith("rotary_emb"))
    return counter.get_total_flops() - rotary


@pytest.mark.parametrize(("name", "overrides"), DESIGNS)
def test_formulas_give_what_the_model_does(name, overrides, source):
    config = CasaConfig.from_source(TINY.source_config(), name, **overrides)
    model = build(CasaForConditionalGeneration, config)
    added = model.num_parameters() - source.model.num_parameters()
    assert benchmark.added_parameters(config) == added

    contestant = Contestant(model, source.stream, source.stream.casa, torch.arange)
    expected = benchmark.stage_flops(config, TINY)
    assert {stage: flops(getattr(contestant, stage)) for stage in expected} == expected

    entries, size = benchmark.kv_entries(config), Dimensions.of(config)
    words, past = TINY.last_words - 1, TINY.frames * TINY.image_tokens
    held = {part: count // (2 * 4 * size.key) for part, count in cache_nbytes(contestant.cache).items()}
    assert held == {
        "text": entries.text * source.stream.end + entries.window * words,
        "image": entries.image * TINY.image_tokens + entries.past_image * past,
    }


def test_insertions_formulas_are_the_sources(source):
    expected = benchmark.stage_flops(benchmark.casa_config(TINY, "insertion"), TINY)
    assert {stage: flops(getattr(source, stage)) for stage in expected} == expected


@pytest.mark.parametrize(("name", "overrides"), DESIGNS)
def test_formula_of_added_parameters_is_the_number(name, overrides):
    config = CasaConfig.from_source(TINY.source_config(), name, **overrides)
    size = Dimensions.of(config)
    formula = re.sub(r"(\d)([Ad])", r"\1 * \2", benchmark.added_formula(config)).replace("f ", "f * ")
    values = {"A": size.attention, "d": size.width, "f": size.fused}
    assert eval(formula, values) == benchmark.added_parameters(config)


def test_another_model_is_not_measured():
    models = benchmark.contestants(TINY)
    assert benchmark.check(models) < 1e-5
    head = models["insertion"].model.lm_head
    head.weight = nn.Parameter(1.01 * head.weight)  # another one: the models share their tensors
    with pytest.raises(RuntimeError, match=r"insertion differs from the source by \S+ \(bar"):
        benchmark.check(models)


def test_peaks_are_what_tensors_take_above_the_start_of_their_stage():
    held = []

    def first():
        one = torch.ones(1000, 1000)
        two = one + 1
        del one
        held.append(two * 2)

    def refill():
        held.append(torch.zeros(1000, 1000))
        held.pop(0)

    peaks = benchmark.peak_bytes({"first": first, "second": refill, "third": refill})
    assert {name: round(peak / 1e6) for name, peak in peaks.items()} == {"first": 8, "second": 4, "third": 4}


def test_disagreements_need_a_difference_on_both_sides():
    paper = {"a": 1.0, "b": 2.0, "c": 2.05}
    measured = {"a": 1.5, "b": 1.0, "c": 1.52}
    assert benchmark.order(measured) == "`b` < `a` < `c`"
    assert "both: `a` and `b`." in benchmark.disagreements(paper, measured)
    assert "No pair" in benchmark.disagreements(paper, paper)


def test_document_is_up_to_date():
    text = DOCUMENT.read_text(encoding="utf-8")
    assert benchmark.FORMULAS in text
    assert benchmark.EXPLANATION in text
    assert benchmark.counted_table(benchmark.LARGE) in text


@pytest.mark.slow
def test_command(tmp_path):
    output = tmp_path / "variants.md"
    command = [sys.executable, "-m", "benchmarks.variants", "--tiny", "--rounds", "1", "--write", str(output)]
    result = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    figures = json.loads(result.stdout.splitlines()[-1])
    for name in VARIANTS:
        assert set(figures["time"][name]) == set(benchmark.STAGES)
        assert min(figures["time"][name].values()) > 0
    assert figures["memory"]["exact"]["cache"] < figures["memory"]["insertion"]["cache"] == 1
    assert figures["counted"]["ca-shared"]["added_parameters"] == 0
    tables = [line for line in output.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    assert sum(line.startswith("| `casa` |") for line in tables) == 3
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.slow
def test_command_refuses_before_any_work(tmp_path):
    command = [sys.executable, "-m", "benchmarks.variants", "--write", str(tmp_path / "no" / "variants.md")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert f"there is no folder {tmp_path / 'no'}; make it first." in result.stderr
