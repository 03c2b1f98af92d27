# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Which design learns what: protocols A and B over variants and seeds, into the tables of docs/results.md.

    python -m examples.tiny_world.table FOLDER

Every run leaves a file in FOLDER/runs and is not repeated; stop the command at any time and start it again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from casa_hf import CasaForConditionalGeneration, CasaProcessor, convert_checkpoint
from casa_hf.training import freeze

from .batches import Batcher
from .cutting import CUTS, memory, questions_of_memory
from .drawing import TILE
from .protocols import Recipe, adapt_model, train_source, train_unfrozen
from .training import evaluate
from .world import TASKS, all_questions

RESULTS = Path(__file__).parents[2] / "docs" / "results.md"
BEGIN, END = "<!-- tables begin: make tiny-world-table -->", "<!-- tables end -->"

DESIGNS: dict[str, dict[str, dict[str, Any]]] = {
    "A": {
        "insertion": {},
        "casa": {},
        "ca": {},
        "casa-shared": {},
        "ca-shared": {},
        "casa-replace": {},
        "ca-replace": {},
        "casa, full updates": {"variant": "casa", "casa_image_updates": "full"},
        "insertion, local tower": {"variant": "insertion", "tower": "local"},
        "casa, local tower": {"variant": "casa", "tower": "local"},
        "casa, full updates, local tower": {"variant": "casa", "casa_image_updates": "full", "tower": "local"},
    },
    "B": {
        "insertion": {},
        "casa": {},
        "ca": {},
        "casa-before": {},
        "ca-ffn": {},
        "casa-ffn": {},
        "casa, 4 gists": {"variant": "casa", "num_gist_tokens": 4},
    },
}
# Overrides of the source's configuration. In the local tower no attention goes beyond an image token's own patches, so
# that image tokens can mix in the language model alone.
TOWERS: dict[str, dict[str, Any]] = {
    "global": {},
    "local": {"vision_window_size": TILE, "vision_fullatt_block_indexes": []},
}
RATES = (1e-3, 2e-3, 4e-3)
_TRIAL_SEED = 1_000  # of the runs that choose a learning rate: none of the seeds that count
_VISION_BLOCKS = r"visual\.blocks\."


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        protocol: "A" or "B".
        design: a key of `DESIGNS[protocol]`.
        seed: of the data; of the weights too where they start at random.
        recipe: how.
        split: that it is measured on: "test", or "validation" to choose a learning rate.
    """

    protocol: str
    design: str
    seed: int
    recipe: Recipe
    split: str = "test"

    @property
    def file(self) -> str:
        """Name of its result: a run with another recipe is another run."""
        design = self.design.replace(", ", "-").replace(" ", "-")
        recipe = f"{self.recipe.steps}x{self.recipe.batch_size}-{self.recipe.lr:g}"
        return f"{self.protocol}-{design}-{self.seed}-{recipe}-{self.split}.json"


class Laboratory:
    """Runs trainings and keeps their results.

    Args:
        folder: of the results.
        source: the trained source that protocol B starts from.
        questions: of each task and size.
        device: to train on.
    """

    def __init__(self, folder: Path, source: Path, questions: int, device: str):
        self.folder, self.source, self.questions, self.device = folder, source, questions, device
        (folder / "runs").mkdir(parents=True, exist_ok=True)

    def start_of(self, protocol: str, tower: str) -> Path:
        """The checkpoint that a protocol starts from: the source, or a model that has only seen text."""
        if protocol == "B":
            return self.source
        folder = self.folder / f"text-{tower}-tower"
        if not folder.exists():
            train_source(folder, [Recipe(steps=300, lr=4e-3)], blind=True, **TOWERS[tower])
        return folder

    def measure(self, run: Run) -> dict[str, float]:
        """The share of right answers by task and size; from the run's file if there is one."""
        file = self.folder / "runs" / run.file
        if not file.exists():
            started = time.monotonic()
            scores = self._train(run)
            content = {"scores": scores, "questions": self.questions, "seconds": round(time.monotonic() - started)}
            _write(file, json.dumps(content, indent=2))
        content = json.loads(file.read_text("utf-8"))
        if content["questions"] < self.questions:
            raise ValueError(
                f"{file} was measured with {content['questions']} questions per size, not {self.questions}; remove it."
            )
        return content["scores"]

    def rate(self, protocol: str, design: str, recipe: Recipe) -> float:
        """The learning rate that is best on validation pictures after a third of the steps."""
        short = replace(recipe, steps=max(1, recipe.steps // 3))
        trials = {
            lr: self.measure(Run(protocol, design, _TRIAL_SEED, replace(short, lr=lr), "validation")) for lr in RATES
        }
        return max(trials, key=lambda lr: overall(trials[lr]))

    def _train(self, run: Run) -> dict[str, float]:
        design = dict(DESIGNS[run.protocol][run.design])
        variant, tower = design.pop("variant", run.design), design.pop("tower", "global")
        with tempfile.TemporaryDirectory(prefix="tiny-world-") as place:
            start = self.start_of(run.protocol, tower)
            folder = convert_checkpoint(start, Path(place, "model"), variant, **design).output
            model: Any = CasaForConditionalGeneration.from_pretrained(folder).to(self.device)
            batcher = Batcher(CasaProcessor.from_pretrained(folder))
        if run.protocol == "A":
            train_unfrozen(model, batcher, run.recipe, seed=run.seed)
        else:
            # The control has no fusion layers: its vision tower is trained on as long as the others'.
            freeze(model, _VISION_BLOCKS if run.design == "insertion" else "paper-qwen")
            adapt_model(model, batcher, run.recipe, seed=run.seed)
        scores = evaluate(model, batcher, all_questions(self.questions, run.split))
        found = {f"{task} {size}": score for (task, size), score in scores.by_size.items()}
        if model.config.casa_image_updates != "full":  # else pictures carry what no cut reaches
            for size in TASKS["frames"].standard:
                questions = questions_of_memory(self.questions, size, run.split)
                found |= {_memory(size, cut): memory(model, batcher, questions, cut) for cut in (None, *CUTS)}
        return found


def overall(scores: Mapping[str, float]) -> float:
    """The mean over tasks of the mean over their standard sizes."""
    return statistics.mean(task_score(scores, task) for task in TASKS)


def task_score(scores: Mapping[str, float], task: str) -> float:
    """The mean over the standard sizes of a task."""
    return statistics.mean(scores[f"{task} {size}"] for size in TASKS[task].standard)


def difference(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error of paired differences; the error of a single pair is not known (nan)."""
    pairs = [one - other for one, other in zip(first, second, strict=True)]
    error = statistics.stdev(pairs) / len(pairs) ** 0.5 if len(pairs) > 1 else float("nan")
    return statistics.mean(pairs), error


def tables(results: Mapping[str, Mapping[str, Sequence[Mapping[str, float]]]]) -> str:
    """Markdown of all results: by task, and by size.

    Args:
        results: of each protocol, the scores of each design, one per seed; the first design is compared with.
    """
    lines = []
    for protocol, designs in results.items():
        first = next(iter(designs))
        seeds = len(designs[first])
        lines += [f"### Protocol {protocol}", "", f"Percent of right answers, mean of {seeds} paired seeds.", ""]
        lines += _table(["design", *TASKS, "all", f"minus {first}"])
        base = [overall(scores) for scores in designs[first]]
        for design, runs in designs.items():
            by_task = [_percent(statistics.mean(task_score(scores, task) for scores in runs)) for task in TASKS]
            mine = [overall(scores) for scores in runs]
            mean, error = difference(mine, base)
            apart = "" if design == first else f"{100 * mean:+.1f} ± {100 * error:.1f}"
            lines.append(_row([design, *by_task, _percent(statistics.mean(mine)), apart]))
        lines += ["", "By size; models train on the sizes in bold.", ""]
        for task in TASKS.values():
            names = [f"**{size}**" if size in task.standard else str(size) for size in task.sizes]
            lines += _table([task.name, *names])
            lines.append(_row(["chance", *(_percent(task.chance(size)) for size in task.sizes)]))
            for design, runs in designs.items():
                curve = [statistics.mean(scores[f"{task.name} {size}"] for scores in runs) for size in task.sizes]
                lines.append(_row([design, *map(_percent, curve)]))
            lines.append("")
        lines += _memory_table(designs)
    return "\n".join(lines).rstrip() + "\n"


def _memory_table(designs: Mapping[str, Sequence[Mapping[str, float]]]) -> list[str]:
    """What is left of earlier frames when self-attention to them is cut."""
    shown = [(size, cut) for size in TASKS["frames"].standard for cut in (None, *CUTS)]
    with_memory = {name: runs for name, runs in designs.items() if _memory(*shown[0]) in runs[0]}
    if not with_memory:
        return []
    names = [f"{size} frames, {'nothing cut' if cut is None else f'cut: {cut}'}" for size, cut in shown]
    lines = [
        "Questions about any frame but the last, with self-attention cut to the frame's gists or its whole window.",
        "",
    ]
    lines += _table(["design", *names])
    lines.append(_row(["chance", *(_percent(TASKS["frames"].chance(size)) for size, _ in shown)]))
    for name, runs in with_memory.items():
        scores = [statistics.mean(run[_memory(size, cut)] for run in runs) for size, cut in shown]
        lines.append(_row([name, *map(_percent, scores)]))
    return [*lines, ""]


def _memory(size: int, cut: str | None) -> str:
    return f"memory {size}" if cut is None else f"memory {size} without {cut}"


def insert_tables(page: str, text: str) -> str:
    """The page with the text in place of what stands between its marks.

    Raises:
        ValueError: if the page has no marks.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"The page of results has lost the marks {BEGIN} and {END} between which tables stand.")
    return f"{before}{BEGIN}\n\n{text}\n{END}{after}"


def main(arguments: list[str] | None = None) -> None:
    """Run what is missing and write the tables."""
    parser = argparse.ArgumentParser(prog="python -m examples.tiny_world.table", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="keeps the results of runs")
    parser.add_argument("--source", type=Path, default=Path("tiny-world-output", "source"), help="for protocol B")
    parser.add_argument("--protocols", nargs="+", choices=tuple(DESIGNS), default=list(DESIGNS))
    parser.add_argument("--designs", nargs="+", help="those of each protocol by default")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, nargs=2, default=(1_500, 500), help="of the protocols A and B")
    parser.add_argument("--questions", type=int, default=160, help="test questions of each task and size")
    parser.add_argument("--lr", type=float, help="of all designs; by default each has three trials")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--page", type=Path, default=RESULTS, help="receives the tables")
    options = parser.parse_args(arguments)
    disable_progress_bar()
    page = insert_tables(options.page.read_text("utf-8"), "")  # refused before any work
    if "B" in options.protocols and not (options.source / "config.json").is_file():
        parser.error(f"There is no source in {options.source}; train one with `make tiny-world`, or give --source.")
    laboratory = Laboratory(options.folder, options.source, options.questions, options.device)
    steps = dict(zip(DESIGNS, options.steps, strict=True))
    started = time.monotonic()
    plan = [
        (protocol, design)
        for protocol in options.protocols
        for design in DESIGNS[protocol]
        if options.designs is None or design in options.designs
    ]
    results: dict[str, dict[str, list[dict[str, float]]]] = {}
    for done, (protocol, design) in enumerate(plan, start=1):
        recipe = Recipe(steps=steps[protocol], names=0.1 if protocol == "A" else 0.0)
        lr = options.lr or laboratory.rate(protocol, design, recipe)
        runs = [Run(protocol, design, seed, replace(recipe, lr=lr)) for seed in range(options.seeds)]
        results.setdefault(protocol, {})[design] = [laboratory.measure(run) for run in runs]
        left = (time.monotonic() - started) / done * (len(plan) - done)
        print(f"{protocol}, {design}: {done} of {len(plan)} designs, about {left / 60:.0f} min left", flush=True)
    _write(options.page, insert_tables(page, tables(results)))


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _table(header: Sequence[str]) -> list[str]:
    return [_row(header), _row(["---"] * len(header))]


def _write(file: Path, text: str) -> None:
    """Write under another name, then give the file its own."""
    partial = file.with_name(f"{file.name}.incomplete")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, file)


if __name__ == "__main__":
    main()
