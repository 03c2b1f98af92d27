# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Results of lmms-eval beside the authors' figures: `python -m casa_hf.serving.lmms_eval.results FOLDER`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .figures import BENCHMARKS, PAPER, RELEASED, Benchmark

_SUFFIX = "_results.json"


class Score(NamedTuple):
    """What one model has in one benchmark.

    Attributes:
        value: score, as the authors write it.
        asked: number of questions that were asked.
        all: number of questions of the benchmark.
    """

    value: float
    asked: int
    all: int


def read_results(files: Iterable[str | Path]) -> dict[str, dict[str, Score]]:
    """The scores of each model and benchmark.

    Args:
        files: results as lmms-eval writes them (`--output_path`), and folders that have such files anywhere below.
            Of a task that was run several times, the latest run counts.

    Returns:
        Scores by the name of the checkpoint, then by benchmark; only of benchmarks all of whose tasks were run.

    Raises:
        ValueError: if there is no such file, or one isn't of lmms-eval.
    """
    paths = [path for name in files for path in _results_in(Path(name))]
    if not paths:
        raise ValueError(f"There is no file *{_SUFFIX} of lmms-eval in {', '.join(map(str, files))}.")
    tasks: dict[str, dict[str, Any]] = {}
    for path in sorted(paths, key=lambda path: path.name):  # a name begins with the date
        model, scored = _read(path)
        tasks.setdefault(model, {}).update(scored)
    return {
        model: {name: score for name, each in BENCHMARKS.items() if (score := _score(each, scored)) is not None}
        for model, scored in tasks.items()
    }


def table(models: Mapping[str, Mapping[str, Score]]) -> str:
    """The scores in Markdown, beside those that the authors report for the same benchmarks.

    Args:
        models: scores, as `read_results` gives them.
    """
    columns = [name for name in BENCHMARKS if any(name in scores for scores in models.values())]
    if not columns:
        return "None of the benchmarks of the paper was run."
    rows = [
        [f"**{model}**", *(_measured(name, scores.get(name)) for name in columns)] for model, scores in models.items()
    ]
    for figures, origin in ((RELEASED, "README"), (PAPER, "paper")):
        for model, reported in figures.items():
            if any(name in reported for name in columns):
                rows.append([f"{model} ({origin})", *(_reported(name, reported.get(name)) for name in columns)])
    lines = [["", *columns], ["---"] + ["---:"] * len(columns), *rows]
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    partly = any(score.asked < score.all for scores in models.values() for score in scores.values())
    return text + ("\n\n*: not all questions were asked." if partly else "")


def print_table(files: Iterable[str | Path]) -> None:
    """Print the table of some results.

    Args:
        files: as for `read_results`.

    Raises:
        SystemExit: if there is no such file, or one isn't of lmms-eval, with the reason.
    """
    try:
        scores = read_results(files)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    print(table(scores))


def _results_in(path: Path) -> list[Path]:
    return sorted(path.rglob(f"*{_SUFFIX}")) if path.is_dir() else [path] if path.is_file() else []


def _read(path: Path) -> tuple[str, dict[str, Any]]:
    """The checkpoint of a run, and by task its metrics and numbers of questions."""
    try:
        content = json.loads(path.read_text("utf-8"))
        counts = content["n-samples"]
        scored = {
            task: (metrics, counts[task]["effective"], counts[task]["original"])
            for task, metrics in content["results"].items()
            if task in counts  # a group has none
        }
        return _checkpoint(content["config"]["model_args"] or content["config"]["model"]), scored
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} isn't a results file of lmms-eval ({type(error).__name__}: {error}).") from error


def _checkpoint(model_args: str | Mapping[str, Any]) -> str:
    """The name of the checkpoint in the arguments of a model."""
    if isinstance(model_args, Mapping):
        return str(model_args.get("pretrained", model_args))
    given = dict(part.partition("=")[::2] for part in model_args.split(","))
    return given.get("pretrained", model_args)


def _score(benchmark: Benchmark, scored: Mapping[str, Any]) -> Score | None:
    if not all(task in scored for task in benchmark.tasks):
        return None
    values = []
    for task in benchmark.tasks:
        metrics = {key.partition(",")[0]: value for key, value in scored[task][0].items()}
        found = [value for name in benchmark.metrics if isinstance(value := metrics.get(name), (int, float))]
        if len(found) < len(benchmark.metrics):  # lmms-eval writes N/A where nothing was asked
            return None
        values.append(sum(found) * benchmark.scale)
    asked, questions = (sum(scored[task][place] for task in benchmark.tasks) for place in (1, 2))
    return Score(sum(values) / len(values), asked, questions)


def _measured(name: str, score: Score | None) -> str:
    if score is None:
        return ""
    return f"{score.value:.{BENCHMARKS[name].digits}f}{'*' if score.asked < score.all else ''}"


def _reported(name: str, value: float | None) -> str:
    return "" if value is None else f"{value:.{BENCHMARKS[name].digits}f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table of some results."""
    parser = argparse.ArgumentParser(description="Results of lmms-eval beside the figures of the authors.")
    parser.add_argument("results", nargs="+", help="results files of lmms-eval, and folders that have such files")
    print_table(parser.parse_args(arguments).results)


if __name__ == "__main__":
    main()
