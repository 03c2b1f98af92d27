# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""What lmms-eval isn't needed for: the authors' settings, what a task asks of `generate`, the table of results."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from casa_hf.serving.lmms_eval import PAPER_TASKS
from casa_hf.serving.lmms_eval.__main__ import main as evaluate
from casa_hf.serving.lmms_eval.__main__ import read_arguments
from casa_hf.serving.lmms_eval.answers import (
    FirstLetter,
    WithoutFinalStop,
    lettered_question,
    question,
    share_right,
    stripped_question,
)
from casa_hf.serving.lmms_eval.figures import BENCHMARKS, PAPER, RELEASED
from casa_hf.serving.lmms_eval.generation import read_generation
from casa_hf.serving.lmms_eval.results import main, read_results, table

FUNCTIONS = "casa_hf.serving.lmms_eval.answers."
SHORT = "\nAnswer the question using a single word or phrase."

# What the authors do: task of lmms-eval, question, what follows it, clean-up of answers.
AUTHORS = {
    "casa_chartqa": ("chartqa/chartqa.yaml", "question", SHORT, "WithoutFinalStop"),
    "casa_docvqa_val": ("docvqa/docvqa_val.yaml", "question", SHORT, "WithoutFinalStop"),
    "casa_infovqa_val": ("infovqa/infovqa_val.yaml", "question", SHORT, "WithoutFinalStop"),
    "casa_ocrbench": (
        "ocrbench/ocrbench.yaml",
        "question",
        "\nPlease directly answer the question.",
        "WithoutFinalStop",
    ),
    "casa_textvqa_val": ("textvqa/textvqa_val.yaml", "question", SHORT, None),
    "casa_realworldqa": ("realworldqa/realworldqa.yaml", "question", SHORT, "WithoutFinalStop"),
    "casa_ai2d": ("ai2d/ai2d.yaml", "lettered_question", "\nAnswer with the letter.", "FirstLetter"),
    "casa_gqa": ("gqa/gqa.yaml", "question", SHORT, None),
    "casa_mme": ("mme/mme.yaml", "stripped_question", SHORT, None),
}


class _Names(yaml.SafeLoader):
    """Reads the names of functions, and imports nothing."""


_Names.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def settings(name: str) -> dict[str, Any]:
    return yaml.load((PAPER_TASKS / f"{name}.yaml").read_text("utf-8"), _Names)


@pytest.mark.parametrize("name", AUTHORS)
def test_settings(name: str) -> None:
    """Each benchmark as the authors evaluate it; decoding is left to the checkpoint."""
    extends, asked, suffix, clean_up = AUTHORS[name]
    given = settings(name)
    assert given["task"] == name and given["extends"] == extends
    assert given["doc_to_text"] == FUNCTIONS + asked
    assert given["lmms_eval_specific_kwargs"] == {"default": {"post_prompt": suffix}}
    assert given["generation_kwargs"] == {"max_new_tokens": 128, "until": []}
    filters = [step["function"] for each in given.get("filter_list", []) for step in each["filter"]]
    assert filters == ([] if clean_up is None else ["take_first", FUNCTIONS + clean_up])


def test_groups() -> None:
    """Nine image benchmarks, and every task that a column of the table is made of."""
    images, videos = (settings(name)["task"] for name in ("casa_images", "casa_videos"))
    assert sorted(images) == sorted(AUTHORS)
    assert {path.stem for path in PAPER_TASKS.glob("*.yaml")} == {*AUTHORS, "casa_images", "casa_videos"}
    of_columns = {task for each in BENCHMARKS.values() for task in each.tasks}
    assert of_columns == {*images, *(task for task in videos if task != "mvbench")} | {
        task for task in of_columns if task.startswith("mvbench_")
    }


def test_command_line() -> None:
    """896 x 896 pixels, batches of 16, all nine benchmarks, unless something else is said."""
    _, options = read_arguments(["kyutai/model"])
    assert options == (
        f"--model casa_hf --model_args pretrained=kyutai/model,max_pixels=802816 --tasks casa_images --include_path "
        f"{PAPER_TASKS} --batch_size 16 --output_path evaluation"
    ).split(" ")
    words = "m --tasks casa_mme --limit 8 --batch-size 2 --max-pixels 3136 --model-args fps=1 --output o --log_samples"
    _, options = read_arguments(words.split())
    assert options == (
        "--model casa_hf --model_args pretrained=m,max_pixels=3136,fps=1 --tasks casa_mme --include_path "
        f"{PAPER_TASKS} --batch_size 2 --output_path o --limit 8.0 --log_samples"
    ).split(" ")


def test_options_by_the_names_of_lmms_eval() -> None:
    """They mean the same; what lmms-eval alone has is passed on, whatever it begins with."""
    ours, theirs = (
        read_arguments(f"m {words} --model other".split())
        for words in (
            "--model-args fps=1 --batch-size 2 --output o",
            "--model_args fps=1 --batch_size 2 --output_path o",
        )
    )
    assert ours == theirs
    assert ours[1][-2:] == ["--model", "other"] and ours[0].model_args == "fps=1"


def test_without_lmms_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    with pytest.raises(SystemExit, match=r"pip install 'casa_hf\[lmms-eval\]'"):
        evaluate(["m"])


# -------------------------------------------------------------------- questions and answers


def test_questions() -> None:
    """As the datasets have them: neither capitalised nor without their own instructions."""
    told = {"post_prompt": "\nBriefly."}
    assert question({"question": "what is it? "}, told) == "what is it? \nBriefly."
    assert stripped_question({"question": " Is it red? Please answer yes or no. "}, told) == (
        "Is it red? Please answer yes or no.\nBriefly."
    )
    doc = {"question": "Which part eats", "options": ["root", "leaf"]}
    written = "Question: Which part eats?\nChoices:\nA. root\nB. leaf\nBriefly."
    assert lettered_question(doc, told) == written
    for ending in ("?", "."):
        assert lettered_question({**doc, "question": f"Which part eats{ending}"}, told).startswith(
            f"Question: Which part eats{ending}\n"
        )


def test_clean_up() -> None:
    assert WithoutFinalStop().apply(["Blue.", "3.5", "No...", " a b . ", ""], None) == [
        "Blue",
        "3.5",
        "No",
        "a b .",
        "",
    ]
    assert FirstLetter().apply(["Answer: B", "C. red", "", "answer: B", "Dog"], None) == ["B", "C", "", "a", "D"]
    assert share_right([{"score": 1}, {"score": 0}, {"score": 1}, {"score": 1}]) == 0.75


# -------------------------------------------------------------------- what a task asks of `generate`


def test_greedy_and_sampling() -> None:
    """A temperature decides; without one, the checkpoint does."""
    assert read_generation({"max_new_tokens": 5}).options == {"max_new_tokens": 5}
    assert read_generation({}).options == {"max_new_tokens": 128}
    greedy = {"do_sample": False, **dict.fromkeys(("temperature", "top_p", "top_k", "min_p", "typical_p"))}
    for given in (
        {"temperature": 0.0},
        {"do_sample": False, "temperature": 0.7},
        {"temperature": 0, "do_sample": True},
    ):
        assert read_generation({**given, "top_p": 0.5}).options == {"max_new_tokens": 128, **greedy}
    assert read_generation({"temperature": 0.5, "top_p": None}).options == {
        "max_new_tokens": 128,
        "temperature": 0.5,
        "do_sample": True,
    }


def test_names_of_other_harnesses() -> None:
    """Names that `generate` knows are passed on, the rest is told."""
    read = read_generation({"max_gen_toks": 7, "num_beams": 2, "image_aspect_ratio": "pad", "modality": "video"})
    assert read.options == {"max_new_tokens": 7, "num_beams": 2}
    assert read.unknown == ("image_aspect_ratio", "modality")


@pytest.mark.parametrize(
    ("until", "answer", "expected"),
    [
        (["\n", "###"], "red ### blue\nno", "red "),
        ("blue", "red blue", "red "),
        (["\n\n"], "one\n\ntwo", "one\n\ntwo"),  # what lmms-eval adds by itself
        ([], "red", "red"),
        (None, "red", "red"),
        (["red", ""], "red", ""),
    ],
)
def test_ends(until: Any, answer: str, expected: str) -> None:
    assert read_generation({"until": until}).ended(answer) == expected


def test_ends_that_are_not_text() -> None:
    with pytest.raises(ValueError, match=r"until=\[3\] must be"):
        read_generation({"until": [3]})


# -------------------------------------------------------------------- the table


def write_run(
    folder: Path,
    date: str,
    scores: dict[str, dict[str, Any]],
    model_args: Any = "pretrained=small/model,max_pixels=802816",
    asked: int = 10,
) -> None:
    """Results as lmms-eval writes them."""
    content = {
        "results": {"casa_images": {"alias": "casa_images"}, **scores},
        "n-samples": {task: {"original": 10, "effective": asked} for task in scores},
        "config": {"model": "casa_hf", "model_args": model_args},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{date}_results.json").write_text(json.dumps(content))


def test_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Scores as the authors write them; the latest run of a task counts; what was asked in part is marked."""
    write_run(
        tmp_path / "m", "20260101_010101", {"casa_chartqa": {"relaxed_overall,no_final_stop": 0.1, "alias": "x"}}
    )
    mme = {"mme_perception_score,none": 1200.4, "mme_cognition_score,none": 300.3, "alias": "casa_mme"}
    write_run(
        tmp_path / "m",
        "20260102_010101",
        {
            "casa_chartqa": {"relaxed_overall,no_final_stop": 0.8176, "relaxed_overall_stderr,no_final_stop": 0.5},
            "casa_mme": mme,
        },
    )
    write_run(
        tmp_path / "n", "20260103_010101", {"casa_ocrbench": {"ocrbench_accuracy,x": 0.5}}, {"pretrained": "n"}, 4
    )
    assert {model: list(scores) for model, scores in read_results([tmp_path]).items()} == {
        "small/model": ["ChartQA", "MME"],
        "n": ["OCRBench"],
    }
    main([str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:5] == [
        "|  | ChartQA | OCRBench | MME |",
        "| --- | ---: | ---: | ---: |",
        "| **small/model** | 81.8 |  | 1501 |",
        "| **n** |  | 500* |  |",
        "| Helium1-VL-2B (README) | 79.2 | 746 | 1665 |",
    ]
    assert "| CASA-Qwen2_5-VL-3B (README) | 81.8 | 796 | 1971 |" in lines
    assert "| Helium, CA t+v (paper) | 75.3 |  |  |" in lines
    assert not any("VideoMME" in line or "window" in line for line in lines)
    assert lines[-1] == "*: not all questions were asked."


def test_table_of_videos(tmp_path: Path) -> None:
    """Means over the tasks of a benchmark, once all of them were run; scores in percent already."""
    compass = {
        f"tempcompass_{kind}": {"avg_accuracy,none": score}
        for kind, score in (("multi_choice", 50.0), ("yes_no", 70.0), ("caption_matching", 61.5))
    }
    write_run(
        tmp_path,
        "20260101_010101",
        {
            "videomme": {"videomme_perception_score,none": 57.25},
            "mvbench_action_count": {"mvbench_accuracy,none": 40},
            **compass,
        },
    )
    (scores,) = read_results([tmp_path]).values()
    assert {name: score.value for name, score in scores.items()} == {"VideoMME": 57.25, "TempCompass": 60.5}
    assert (scores["TempCompass"].asked, scores["TempCompass"].all) == (30, 30)
    assert "| Qwen2.5-VL, CA t+v, a window for each frame (paper) | 56.9 |  |" in table(read_results([tmp_path]))


def test_other_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="There is no file"):
        read_results([tmp_path / "nowhere"])
    (tmp_path / "x_results.json").write_text('{"results": {}}')
    with pytest.raises(ValueError, match=r"x_results\.json isn't a results file"):
        read_results([tmp_path])
    with pytest.raises(SystemExit, match=r"x_results\.json isn't a results file"):
        main([str(tmp_path)])
    write_run(tmp_path / "other", "20260101_010101", {"pope": {"accuracy,none": 1.0}})
    assert "None of the benchmarks" in table(read_results([tmp_path / "other"]))
    # A category of which nothing was asked.
    half = {"casa_mme": {"mme_perception_score,none": 100.0, "mme_cognition_score,none": "N/A"}}
    write_run(tmp_path / "half", "20260101_010101", half)
    assert read_results([tmp_path / "half"]) == {"small/model": {}}


def test_figures() -> None:
    """The mean of eight benchmarks, OCRBench in tenths of a percent, is what docs/results.md says."""
    eight = [name for name in RELEASED["Qwen2.5-VL-3B"] if name != "MME"]
    means = {
        model: round(sum(scores[name] / (10 if name == "OCRBench" else 1) for name in eight) / 8, 1)
        for model, scores in RELEASED.items()
    }
    assert list(means.values()) == [69.4, 68.5, 67.6, 77.3, 72.7, 72.6]
    assert all(name in BENCHMARKS for scores in (*RELEASED.values(), *PAPER.values()) for name in scores)
