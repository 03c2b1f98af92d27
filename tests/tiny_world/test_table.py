# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The table of designs: what it says is what was measured, and nothing is measured twice."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
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

pytestmark = pytest.mark.integration

SIZES = [f"{task.name} {size}" for task in TASKS.values() for size in task.sizes]


def _cells(text: str) -> list[list[str]]:
    """A Markdown text's lines, those of tables cut into cells."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]


def test_tables_show_means_and_paired_differences():
    first = [{name: 0.5 for name in SIZES}, {name: 0.7 for name in SIZES}]
    second = [{name: 0.4 for name in SIZES}, {name: 0.5 for name in SIZES}]
    second[0]["pairs 32"] = 0.0  # no size that is trained on: in the curve, not in the mean
    designs = {
        "insertion": {"rate": 2e-3, "trials": {"0.001": 0.3, "0.002": 0.4}, "seconds": 1_800, "runs": first},
        "casa": {"rate": 4e-3, "trials": {"0.001": 0.2, "0.002": 0.1}, "seconds": 5_400, "runs": second},
    }
    text = table.tables({"A": designs})
    assert "took 2.0 hours" in text
    lines = _cells(text)
    assert ["insertion", "0.002", *["60.0"] * (len(TASKS) + 1), ""] in lines
    assert ["casa", "0.004", *["45.0"] * (len(TASKS) + 1), "-15.0 ± 5.0"] in lines
    pairs = lines.index(["pairs", "**4**", "**8**", "16", "24", "32"])
    assert lines[pairs + 2] == ["chance", *["10.0"] * 5]
    assert lines[pairs + 4] == ["casa", *["45.0"] * 4, "25.0"]
    trials = lines.index(["design", "0.001", "0.002"])
    assert lines[trials + 2 : trials + 4] == [["insertion", "30.0", "40.0"], ["casa", "20.0", "10.0"]]


def test_differences_that_are_seen_stand_out():
    ca = [{name: 0.5 + 0.01 * seed for name in SIZES} for seed in range(5)]
    casa = [{name: score + 0.1 for name, score in scores.items()} for scores in ca]
    for scores, other, more in zip(casa, ca, (0.2, -0.2, 0.2, -0.2, 0.0), strict=True):
        for size in TASKS["rule"].standard:
            scores[f"rule {size}"] += more  # what the seeds vary by
        for size in TASKS["place"].standard:
            scores[f"place {size}"] = other[f"place {size}"] + 0.019  # told by the seeds, but too small
    designs = {
        name: {"rate": 1e-3, "trials": {}, "seconds": 0, "runs": runs}
        for name, runs in {"ca": ca, "casa": casa}.items()
    }

    def row(seeds: int) -> dict[str, str]:
        some = {name: {**design, "runs": design["runs"][:seeds]} for name, design in designs.items()}
        rows = _cells(table.tables({"B": some}))
        header = rows.index(["first minus second", *TASKS, "all", "all but rule"])
        assert rows[header + 2][0] == "casa minus ca" and rows[header + 3] == [""]
        return dict(zip(rows[header], rows[header + 2], strict=True))

    found = row(5)
    assert found["pairs"] == "**+10.0 ± 0.0**" and found["rule"] == "+10.0 ± 8.9" and found["place"] == "+1.9 ± 0.0"
    assert found["all"] == "**+9.1 ± 1.0**" and found["all but rule"] == "**+9.0 ± 0.0**"
    assert row(4)["pairs"] == "+10.0 ± 0.0"


@pytest.mark.parametrize(
    ("mean", "error", "seeds", "seen"),
    [
        (0.03, 0.01, 5, True),
        (0.03, 0.011, 5, False),
        (-0.03, 0.01, 5, True),
        (0.019, 0.0, 5, False),
        (0.5, 0.01, 4, False),
        (0.5, math.nan, 1, False),
    ],
)
def test_what_counts_as_seen(mean: float, error: float, seeds: int, seen: bool):
    assert table.is_seen(mean, error, seeds) is seen


def test_the_error_of_paired_differences():
    mean, error = table.difference([0.9, 0.8, 0.7], [0.8, 0.5, 0.5])
    assert mean == pytest.approx(0.2) and error == pytest.approx(0.1 / math.sqrt(3))
    assert math.isnan(table.difference([0.9], [0.8])[1])


def test_tables_replace_those_of_the_page():
    page = f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n"
    once = table.insert_tables(page, "new\n")
    assert once == table.insert_tables(once, "new\n")
    assert once.startswith("before\n") and once.endswith("\nafter\n") and "new" in once and "old" not in once
    with pytest.raises(ValueError, match="lost the comments"):
        table.insert_tables("no marks", "new\n")


def test_a_run_is_named_by_all_that_matters():
    run = table.Run("A", "casa, 4 gists", 1, Recipe(steps=5, lr=2e-3))
    assert run.file == "A-casa-4-gists-1-5x48-0.002-test.json"


def test_a_result_is_made_of_recipe_design_questions_and_models(models: Path, tmp_path: Path):
    laboratory = table.Laboratory(tmp_path, models, 1, "cpu")
    run = table.Run("A", "casa", 1, Recipe(steps=5))
    others = [
        replace(run, protocol="B"),
        replace(run, design="casa, 1 gist"),
        replace(run, design="casa, local tower"),
        replace(run, seed=2),
        replace(run, split="validation"),
        *(replace(run, recipe=replace(run.recipe, **{name: 0.7})) for name in ("names", "warmup", "decay")),
        replace(run, recipe=replace(run.recipe, taught=("recall",))),
        replace(run, recipe=replace(run.recipe, tasks=("pairs",))),
    ]
    made_of = [laboratory.made_of(each) for each in (run, *others)]
    made_of.append(table.Laboratory(tmp_path, models, 2, "cpu").made_of(run))
    for name in ("source", "text"):
        exchanged = tmp_path / f"other-{name}"
        shutil.copytree(models, exchanged)
        shutil.copytree(models / ({"source", "text"} - {name}).pop(), exchanged / name, dirs_exist_ok=True)
        made_of.append(table.Laboratory(tmp_path, exchanged, 1, "cpu").made_of(run))
    assert len(set(made_of)) == len(made_of)
    assert laboratory.made_of(run) == made_of[0]


def test_the_page_of_results_shows_the_scores_beside_it():
    page = table.RESULTS.read_text("utf-8")
    results = json.loads(table.RESULTS.with_suffix(".json").read_text("utf-8"))
    assert page == table.insert_tables(page, table.tables(results))


def test_a_local_tower_sees_each_image_token_by_itself(tmp_path: Path):
    tokenizer = build_tokenizer()
    towers = {}
    for name, fields in table.TOWERS.items():
        torch.manual_seed(0)
        towers[name] = Qwen2_5_VLForConditionalGeneration(source_config(tokenizer, **fields)).eval()
    folder = write_source(tmp_path, next(iter(towers.values())), tokenizer)
    inputs = Batcher(CasaProcessor.from_source(folder)).pixels(TASKS["place"].example(3, "train", 0).images)
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


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make tiny-world` makes, of random weights."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = build_tokenizer()
    for seed, name in enumerate(("source", "text")):
        torch.manual_seed(seed)
        write_source(folder / name, Qwen2_5_VLForConditionalGeneration(source_config(tokenizer)), tokenizer)
    return folder


def test_protocol_a_starts_with_the_text_model_and_the_tower_of_the_source(models: Path, tmp_path: Path):
    laboratory = table.Laboratory(tmp_path, models, 1, "cpu")
    assert laboratory.start_of("B", "global") == models / "source"
    weights = {
        folder: Qwen2_5_VLForConditionalGeneration.from_pretrained(folder).state_dict()
        for folder in (models / "source", models / "text", laboratory.start_of("A", "global"))
    }
    source, text, start = weights.values()
    for name, tensor in start.items():
        assert torch.equal(tensor, (source if ".visual." in name else text)[name]), name
    assert not torch.equal(source["lm_head.weight"], text["lm_head.weight"])


@pytest.mark.parametrize(
    ("protocol", "design", "still"),
    [
        ("A", "insertion", r"visual\.(patch_embed|blocks)"),
        ("A", "casa-replace", r"visual\.(patch_embed|blocks)"),
        ("B", "insertion", r"language_model|lm_head|visual\.(patch_embed|merger)"),
        ("B", "casa-ffn", r"language_model(?!.*casa_attn)|lm_head|visual\.(patch_embed|merger)"),
    ],
)
def test_what_trains(models: Path, tmp_path: Path, protocol: str, design: str, still: str):
    laboratory = table.Laboratory(tmp_path, models, 1, "cpu")
    run = table.Run(protocol, design, 0, Recipe(steps=2, batch_size=12, warmup=0.0, lr=1e-3))
    model, batcher = laboratory.model_of(run)
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    laboratory.train(run, model, batcher)
    moved = {name for name, tensor in model.named_parameters() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if not re.search(still, name)}


@pytest.mark.parametrize("jobs", [1, 2])
def test_runs_are_resumed(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], jobs: int):
    page = tmp_path / "page.md"
    page.write_text(f"{table.BEGIN}\n{table.END}\n", encoding="utf-8")
    arguments = [str(tmp_path / "lab"), "--models", str(models), "--protocols", "A"]
    arguments += ["--designs", "insertion", "casa, 4 gists", "--seeds", "1", "--steps", "1", "1", "--questions", "1"]
    arguments += ["--lr", "0.001", "--device", "cpu", "--jobs", str(jobs), "--page", str(page)]
    table.main(arguments)
    assert ": 2 of 2, about 0 min left" in capsys.readouterr().out
    written = page.read_text("utf-8")
    results = json.loads(page.with_suffix(".json").read_text("utf-8"))
    assert [len(design["runs"]) for design in results["A"].values()] == [1, 1]
    assert written == table.insert_tables(written, table.tables(results))
    assert "### Protocol A" in written and "casa, 4 gists" in written
    files = sorted((tmp_path / "lab" / "runs").iterdir())
    assert len(files) == 2
    # A result that is there is taken as it is.
    content = json.loads(files[0].read_text("utf-8"))
    memory = {f"memory {size}{cut}" for size in (2, 3, 4) for cut in ("", " without gists", " without window")}
    assert set(content["scores"]) == set(SIZES) | memory
    assert "| 2 frames, nothing cut | 2 frames, cut: gists | 2 frames, cut: window | 3 frames" in written
    content["scores"] = dict.fromkeys(SIZES, 1.0)
    files[0].write_text(json.dumps(content), encoding="utf-8")
    table.main(arguments)
    assert "| 100.0 |" in page.read_text("utf-8") and "of 2" not in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"another recipe or number of questions.*remove it"):
        table.main([*arguments, "--questions", "2"])


def test_a_protocol_that_is_not_run_stays_on_the_page(models: Path, tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(f"{table.BEGIN}\n{table.END}\n", encoding="utf-8")
    runs = [dict.fromkeys(SIZES, 0.5)]
    kept = {"casa": {"rate": 1e-3, "trials": {}, "seconds": 0, "runs": runs}}
    page.with_suffix(".json").write_text(json.dumps({"B": kept}), encoding="utf-8")
    arguments = [str(tmp_path / "lab"), "--models", str(models), "--protocols", "A", "--designs", "insertion"]
    arguments += ["--seeds", "1", "--steps", "1", "1", "--questions", "1", "--lr", "0.001", "--device", "cpu"]
    table.main([*arguments, "--jobs", "1", "--page", str(page)])
    assert list(json.loads(page.with_suffix(".json").read_text("utf-8"))) == ["A", "B"]
    assert "### Protocol A" in page.read_text("utf-8") and "### Protocol B" in page.read_text("utf-8")


def test_designs_that_are_not_run_stay_if_they_can_be_compared(models: Path, tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(f"{table.BEGIN}\n{table.END}\n", encoding="utf-8")
    common = [str(tmp_path / "lab"), "--models", str(models), "--protocols", "A", "--seeds", "1", "--jobs", "1"]
    common += ["--questions", "1", "--lr", "0.001", "--device", "cpu", "--page", str(page), "--designs"]

    def run(*arguments: str) -> dict[str, dict[str, object]]:
        table.main([*common, *arguments])
        return json.loads(page.with_suffix(".json").read_text("utf-8"))["A"]

    first = run("casa", "--steps", "1", "1")
    both = run("insertion", "--steps", "1", "1")
    assert list(both) == ["insertion", "casa"]  # in the order of the designs
    assert both["casa"] == first["casa"]
    assert "minus insertion" in page.read_text("utf-8")
    # A design's own rate doesn't set it apart, other steps do.
    assert list(run("ca", "--steps", "1", "1", "--lr", "0.002")) == ["insertion", "casa", "ca"]
    assert list(run("ca", "--steps", "2", "1")) == ["ca"]


def test_the_published_results_are_of_the_models_that_ship(tmp_path: Path):
    laboratory = table.Laboratory(tmp_path, table.MODELS, 340, "cpu")
    results = json.loads(table.RESULTS.with_suffix(".json").read_text("utf-8"))
    for protocol, designs in results.items():
        seeds = range(100, 105)
        shared = laboratory.shared(protocol, table.RECIPES[protocol], seeds)
        assert {(design["of"], len(design["runs"])) for design in designs.values()} == {(shared, len(seeds))}


def test_models_that_are_missing_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        table.main([str(tmp_path / "lab"), "--models", str(tmp_path / "none")])
    assert "no source model in" in capsys.readouterr().err


def test_the_rate_of_the_best_trial_is_taken(models: Path, tmp_path: Path):
    laboratory = table.Laboratory(tmp_path, models, 1, "cpu")
    recipe = Recipe(steps=6)
    trials = laboratory.trials("B", "casa", recipe)
    assert {(run.recipe.steps, run.split) for run in trials.values()} == {(3, "validation")}
    for lr, run in trials.items():
        content = {"scores": dict.fromkeys(SIZES, 0.9 if lr == 2e-3 else 0.5), "made_of": laboratory.made_of(run)}
        (tmp_path / "runs" / run.file).write_text(json.dumps(content), encoding="utf-8")
    assert laboratory.rate("B", "casa", recipe) == 2e-3
