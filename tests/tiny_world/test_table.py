# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The table of designs: what it says is what was measured, and nothing is measured twice."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from casa_hf import CasaProcessor
from examples.tiny_world import table
from examples.tiny_world.batches import Batcher
from examples.tiny_world.models import build_tokenizer, source_config, write_source
from examples.tiny_world.protocols import Recipe
from examples.tiny_world.world import TASKS

SIZES = [f"{task.name} {size}" for task in TASKS.values() for size in task.sizes]


def test_tables_show_means_and_paired_differences():
    first = [{name: 0.5 for name in SIZES}, {name: 0.7 for name in SIZES}]
    second = [{name: 0.4 for name in SIZES}, {name: 0.5 for name in SIZES}]
    second[0]["pairs 32"] = 0.0  # no size that is trained on: in the curve, not in the mean
    text = table.tables({"A": {"insertion": first, "casa": second}})
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert ["insertion", *["60.0"] * (len(TASKS) + 1), ""] in lines
    assert ["casa", *["45.0"] * (len(TASKS) + 1), "-15.0 ± 5.0"] in lines
    pairs = lines.index(["pairs", "**4**", "**8**", "16", "24", "32"])
    assert lines[pairs + 2] == ["chance", *["10.0"] * 5]
    assert lines[pairs + 4] == ["casa", *["45.0"] * 4, "25.0"]


def test_the_error_of_paired_differences():
    mean, error = table.difference([0.9, 0.8, 0.7], [0.8, 0.5, 0.5])
    assert mean == pytest.approx(0.2) and error == pytest.approx(0.1 / math.sqrt(3))
    assert math.isnan(table.difference([0.9], [0.8])[1])


def test_tables_replace_those_of_the_page():
    page = f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n"
    once = table.insert_tables(page, "new\n")
    assert once == table.insert_tables(once, "new\n")
    assert once.startswith("before\n") and once.endswith("\nafter\n") and "new" in once and "old" not in once
    with pytest.raises(ValueError, match="lost the marks"):
        table.insert_tables("no marks", "new\n")


def test_a_run_is_named_by_all_that_matters():
    run = table.Run("B", "casa, 4 gists", 1, Recipe(steps=5, lr=2e-3))
    assert run.file == "B-casa-4-gists-1-5x48-0.002-test.json"


def test_the_page_of_results_has_the_marks():
    page = table.RESULTS.read_text("utf-8")
    table.insert_tables(page, "")


def test_a_local_tower_sees_each_image_token_by_itself(tmp_path: Path):
    tokenizer = build_tokenizer()
    towers = {}
    for name, fields in table.TOWERS.items():
        torch.manual_seed(0)
        towers[name] = Qwen2_5_VLForConditionalGeneration(source_config(tokenizer, **fields)).eval()
    folder = write_source(tmp_path, next(iter(towers.values())), tokenizer)
    inputs = Batcher(CasaProcessor.from_source(folder)).pixels(TASKS["place"].example(3, "train", 0).pictures)
    changed = inputs["pixel_values"].clone()
    changed[:4] += 1  # the patches of the first image token

    for name, model in towers.items():
        with torch.no_grad():
            before, after = (
                model.model.get_image_features(pixels, inputs["image_grid_thw"]).pooler_output[0]
                for pixels in (inputs["pixel_values"], changed)
            )
        moved = (before != after).any(-1).tolist()
        assert moved == ([True] * 9 if name == "global" else [True] + [False] * 8)


def test_runs_are_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    page = tmp_path / "page.md"
    page.write_text(f"{table.BEGIN}\n{table.END}\n", encoding="utf-8")
    tokenizer = build_tokenizer()
    stock = Qwen2_5_VLForConditionalGeneration(source_config(tokenizer))
    source = write_source(tmp_path / "source", stock, tokenizer)
    arguments = [
        str(tmp_path / "lab"),
        "--source",
        str(source),
        "--protocols",
        "B",
        "--designs",
        "insertion",
        "casa, 4 gists",
    ]
    arguments += ["--seeds", "1", "--steps", "1", "1", "--questions", "1", "--lr", "0.001", "--device", "cpu"]
    arguments += ["--page", str(page)]
    table.main(arguments)
    assert "2 of 2 designs" in capsys.readouterr().out
    written = page.read_text("utf-8")
    assert "### Protocol B" in written and "casa, 4 gists" in written
    files = sorted((tmp_path / "lab" / "runs").iterdir())
    assert len(files) == 2
    # A result that is there is taken as it is.
    content = json.loads(files[0].read_text("utf-8"))
    memory = {f"memory {size}{cut}" for size in (2, 3) for cut in ("", " without gists", " without window")}
    assert set(content["scores"]) == set(SIZES) | memory
    assert "| 2 frames, nothing cut | 2 frames, cut: gists | 2 frames, cut: window | 3 frames" in written
    content["scores"] = dict.fromkeys(SIZES, 1.0)
    files[0].write_text(json.dumps(content), encoding="utf-8")
    table.main(arguments)
    assert "| 100.0 |" in page.read_text("utf-8")
    with pytest.raises(SystemExit):
        table.main([*arguments, "--source", str(tmp_path / "none")])
    assert "make tiny-world" in capsys.readouterr().err
    with pytest.raises(ValueError, match="1 questions per size, not 2; remove it"):
        table.main([*arguments, "--questions", "2"])
