# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Which design learns what: protocols A and B over variants and seeds, into the tables of docs/results.md.

    python -m examples.tiny_world.table FOLDER

Every run leaves a file in FOLDER/runs and is not repeated; stop the command at any time and start it again. Runs are
made seed by seed, so that with fewer `--seeds` there are tables of what is done. They go to docs/results.md, and the
scores that they are made of to docs/results.json; what is there of designs that aren't asked for stays, if it is of
the same recipe, seeds, questions and models.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from casa_hf import CasaForConditionalGeneration, CasaProcessor, convert_checkpoint
from casa_hf.training import freeze

from .batches import Batcher
from .cutting import CUTS, FRAMES, memory, questions_of_memory
from .drawing import TILE
from .protocols import ADAPTATION, SOURCE, TEXT, Recipe, adapt_model, give_sight, train_source, train_unfrozen
from .training import evaluate
from .world import TASKS, Example, all_questions, standard_questions

RESULTS = Path(__file__).parents[2] / "docs" / "results.md"
MODELS = Path(__file__).parent / "checkpoints"
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
        "casa, 1 gist": {"variant": "casa", "num_gist_tokens": 1},
        "casa, 4 gists": {"variant": "casa", "num_gist_tokens": 4},
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
    },
}
# Overrides of the source's configuration. In the local tower no attention goes beyond an image token's own patches, so
# that image tokens can mix in the language model alone.
TOWERS: dict[str, dict[str, Any]] = {
    "global": {},
    "local": {"vision_window_size": TILE, "vision_fullatt_block_indexes": []},
}
# Pairs of which the tables show the first minus the second, by task; each says something about an axis of the design.
COMPARISONS: dict[str, list[tuple[str, str]]] = {
    "A": [
        ("casa", "ca"),
        ("casa-shared", "casa"),
        ("ca-shared", "ca"),
        ("casa-replace", "casa"),
        ("ca-replace", "ca"),
        ("casa, 1 gist", "casa"),
        ("casa, 4 gists", "casa"),
        ("casa, full updates", "casa"),
        ("casa, full updates, local tower", "casa, local tower"),
    ],
    "B": [("casa", "ca"), ("casa-before", "casa"), ("casa-ffn", "casa"), ("ca-ffn", "ca")],
}
# By protocol and design: the learning rate, the scores of its trials, the scores of each seed's run, the time, and a
# digest of what designs must share to be compared.
Results = dict[str, dict[str, Any]]
RATES = {"A": (2e-3, 4e-3, 8e-3), "B": (1e-3, 2e-3, 4e-3, 8e-3)}
# How they learn; `--steps` says how long.
RECIPES = {
    "A": Recipe(
        steps=700,
        batch_size=24,
        names=0.03,
        lessons=(0.7, 0.1),
        taught=("describe", "recite", "describe"),
        warmup=0.05,
        decay=0.6,
    ),
    "B": replace(ADAPTATION, steps=350, batch_size=24),
}
_OTHERS = 4  # for so many questions of a standard size, one of another size, and one to choose a learning rate
_FIRST_SEED = 100  # source and text model, which all starts with, have learned from the data of lower ones
_TRIAL_SEED = 1_000  # of the runs that choose a learning rate: none of the seeds that count
# Student's t at 95 % by the number of seeds: what a mean must be, in standard errors, to be told from zero. Of fewer
# seeds nothing is told.
_STUDENT = {5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
_CLAIMED = 0.02  # no smaller difference is told
_VISION_BLOCKS = r"visual\.blocks\."
_ALL_BUT_TOWER = r"^(?!.*visual\.(patch_embed|blocks)\.)"


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        protocol: "A" or "B".
        design: a key of `DESIGNS[protocol]`.
        seed: of the data.
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
        """Name of its result; what else the result depends on is in `Laboratory.made_of`."""
        design = self.design.replace(", ", "-").replace(" ", "-")
        recipe = f"{self.recipe.steps}x{self.recipe.batch_size}-{self.recipe.lr:g}"
        return f"{self.protocol}-{design}-{self.seed}-{recipe}-{self.split}.json"


class Laboratory:
    """Runs trainings and keeps their results.

    Args:
        folder: of the results.
        models: folder of the trained source, and of the text model, that protocols start from.
        questions: of each task and standard size.
        device: to train on.
    """

    def __init__(self, folder: Path, models: Path, questions: int, device: str):
        self.folder, self.models, self.questions, self.device = folder, models, questions, device
        (folder / "runs").mkdir(parents=True, exist_ok=True)

    def start_of(self, protocol: str, tower: str) -> Path:
        """The checkpoint that a protocol starts from: the source, or the text model with a tower that sees."""
        if protocol == "B":
            return self.models / "source"
        text, seeing, origins = self.models / "text", self.models / "source", self._origins(protocol, tower)
        if tower != "global":
            # Its tower learns what is in a tile, which is all that it will ever see.
            seeing = self._made(
                f"source-{tower}",
                origins,
                lambda to: train_source(to, SOURCE[:1], text=text, seed=len(TEXT), **TOWERS[tower]),
            )
        return self._made(f"start-{tower}", origins, lambda to: give_sight(text, seeing, to))

    def _origins(self, protocol: str, tower: str) -> list[Any]:
        """What the start of a protocol is made of."""
        if protocol == "B":
            return [_weights_of(self.models / "source")]
        text = _weights_of(self.models / "text")
        if tower == "global":
            return [text, _weights_of(self.models / "source")]
        return [text, TOWERS[tower], asdict(SOURCE[0])]

    def made_of(self, run: Run) -> str:
        """What a result depends on beside the code, as a digest: a run with another recipe is another run."""
        variant, tower, design = _design(run)
        origins = self._origins(run.protocol, tower)
        return _digest(
            [run.protocol, variant, design, run.seed, asdict(run.recipe), run.split, self.questions, origins]
        )

    def shared(self, protocol: str, recipe: Recipe, seeds: Sequence[int]) -> str:
        """What the results of designs must have in common to stand in one table, as a digest.

        Args:
            protocol: of the designs.
            recipe: with any rate, since each design has its own.
            seeds: of the runs.
        """
        origins = self._origins(protocol, "global")
        return _digest([protocol, asdict(recipe.at(0.0)), list(seeds), self.questions, origins])

    def _made(self, name: str, of: Any, make: Callable[[Path], Any]) -> Path:
        folder = self.folder / f"{name}-{_digest(of)}"
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=self.folder) as place:
                make(Path(place, folder.name))
                os.replace(Path(place, folder.name), folder)
        return folder

    def measure(self, run: Run) -> dict[str, float]:
        """The share of right answers by task and size; from the run's file if there is one.

        Raises:
            ValueError: if the file is of other models, of another recipe or of another number of questions.
        """
        return self._result(run)["scores"]

    def seconds(self, runs: Iterable[Run]) -> int:
        """How long runs took, one after the other."""
        return sum(self._result(run)["seconds"] for run in runs)

    def _result(self, run: Run) -> dict[str, Any]:
        file, made_of = self.folder / "runs" / run.file, self.made_of(run)
        if not file.exists():
            started = time.monotonic()
            scores = self._scores(run)
            content = {"made_of": made_of, "seconds": round(time.monotonic() - started), "scores": scores}
            _write(file, json.dumps(content, indent=2))
        content = json.loads(file.read_text("utf-8"))
        if content["made_of"] != made_of:
            raise ValueError(
                f"{file} was measured with another recipe or number of questions, or with other models than those in "
                f"{self.models}; remove it, or use another folder."
            )
        return content

    def measure_all(self, runs: Sequence[Run], jobs: int) -> None:
        """Make the runs that aren't done yet, several at a time in a process each if there are several jobs."""
        missing = [run for run in runs if not (self.folder / "runs" / run.file).exists()]
        for tower in {_design(run)[1] for run in missing if run.protocol == "A"}:
            self.start_of("A", tower)  # once, before all need it at the same time
        started = time.monotonic()
        with _workers(jobs) as measured:
            for done, run in enumerate(measured(partial(_measure, self), missing), start=1):
                left = (time.monotonic() - started) / done * (len(missing) - done)
                print(f"{run.file}: {done} of {len(missing)}, about {left / 60:.0f} min left", flush=True)

    def trials(self, protocol: str, design: str, recipe: Recipe) -> dict[float, Run]:
        """The runs that choose a design's learning rate: half of the steps, on validation images."""
        short = replace(recipe, steps=max(1, recipe.steps // 2))
        return {lr: Run(protocol, design, _TRIAL_SEED, short.at(lr), "validation") for lr in RATES[protocol]}

    def tried(self, protocol: str, design: str, recipe: Recipe) -> dict[float, float]:
        """The score of each learning rate's trial."""
        return {lr: overall(self.measure(run)) for lr, run in self.trials(protocol, design, recipe).items()}

    def rate(self, protocol: str, design: str, recipe: Recipe) -> float:
        """The learning rate whose trial was best."""
        scores = self.tried(protocol, design, recipe)
        return max(scores, key=lambda lr: scores[lr])

    def model_of(self, run: Run) -> tuple[Any, Batcher]:
        """The model that a run starts with, and what makes its batches."""
        variant, tower, design = _design(run)
        with tempfile.TemporaryDirectory(prefix="tiny-world-") as place:
            start = self.start_of(run.protocol, tower)
            folder = convert_checkpoint(start, Path(place, "model"), variant, **design).output
            model: Any = CasaForConditionalGeneration.from_pretrained(folder).to(self.device)
            return model, Batcher(CasaProcessor.from_pretrained(folder))

    def train(self, run: Run, model: Any, batcher: Batcher) -> None:
        """Train a model as the protocol of the run says."""
        if run.protocol == "A":
            freeze(model, _ALL_BUT_TOWER)
            train_unfrozen(model, batcher, run.recipe, seed=run.seed)
        else:
            # The control has no fusion layers: its vision tower is trained on as long as the others'.
            freeze(model, _VISION_BLOCKS if run.design == "insertion" else "paper-qwen")
            adapt_model(model, batcher, run.recipe, seed=run.seed)

    def _scores(self, run: Run) -> dict[str, float]:
        model, batcher = self.model_of(run)
        self.train(run, model, batcher)
        scores = evaluate(model, batcher, _asked(self.questions, run.split))
        found = {f"{task} {size}": score for (task, size), score in scores.by_size.items()}
        # Where images are updated, images carry what no cut reaches.
        if run.split == "test" and model.config.casa_image_updates != "full":
            for size in FRAMES:
                questions = _asked_of_memory(self.questions, size)
                found |= {_memory(size, cut): memory(model, batcher, questions, cut) for cut in (None, *CUTS)}
        return found


@cache
def _asked(number: int, split: str) -> list[Example]:
    """The same questions for all runs of a process. To choose a learning rate, fewer do, of standard sizes."""
    some = -(-number // _OTHERS)
    return all_questions(number, some) if split == "test" else standard_questions(some, split)


@cache
def _asked_of_memory(number: int, size: int) -> list[tuple[Example, int]]:
    return questions_of_memory(number, size)


def _design(run: Run) -> tuple[str, str, dict[str, Any]]:
    """The variant of a run, its tower, and overrides of its configuration."""
    fields = dict(DESIGNS[run.protocol][run.design])
    return fields.pop("variant", run.design), fields.pop("tower", "global"), fields


def _measure(laboratory: Laboratory, run: Run) -> Run:
    laboratory.measure(run)
    return run


@contextmanager
def _workers(jobs: int) -> Iterator[Callable[[Callable[[Run], Run], Sequence[Run]], Iterator[Run]]]:
    """Maps over runs, in so many processes of one thread each, or, with a single job, in this one."""
    if jobs == 1:
        yield map
    else:
        with multiprocessing.get_context("spawn").Pool(jobs, _begin_worker) as pool:
            yield pool.imap_unordered


def _begin_worker() -> None:
    torch.set_num_threads(1)
    disable_progress_bar()


def overall(scores: Mapping[str, float], *, without: str | None = None) -> float:
    """The mean over tasks, all or all but one, of the mean over their standard sizes."""
    return statistics.mean(task_score(scores, task) for task in TASKS if task != without)


def task_score(scores: Mapping[str, float], task: str) -> float:
    """The mean over the standard sizes of a task."""
    return statistics.mean(scores[f"{task} {size}"] for size in TASKS[task].standard)


def difference(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error of paired differences; the error of a single pair is not known (nan)."""
    pairs = [one - other for one, other in zip(first, second, strict=True)]
    error = statistics.stdev(pairs) / len(pairs) ** 0.5 if len(pairs) > 1 else float("nan")
    return statistics.mean(pairs), error


def is_seen(mean: float, error: float, seeds: int) -> bool:
    """Whether a difference is told: of five seeds at least, two points at least, and more than seeds vary by."""
    return seeds in _STUDENT and abs(mean) >= _CLAIMED and abs(mean) > _STUDENT[seeds] * error


def tables(results: Results) -> str:
    """Markdown of all results, by task and by size. Designs are compared with the first one of their protocol."""
    lines = []
    for protocol, own in results.items():
        designs = {name: design["runs"] for name, design in own.items()}
        first = next(iter(designs))
        seeds = len(designs[first])
        hours = sum(design["seconds"] for design in own.values()) / 3_600
        lines += [f"### Protocol {protocol}", "", f"Percent of right answers, mean of {seeds} paired seeds."]
        lines += [f"One after the other, the runs and their trials took {hours:.1f} hours.", ""]
        lines += _table(["design", "rate", *TASKS, "all", f"minus {first}"])
        base = [overall(scores) for scores in designs[first]]
        for design, runs in designs.items():
            by_task = [_percent(statistics.mean(task_score(scores, task) for scores in runs)) for task in TASKS]
            mine = [overall(scores) for scores in runs]
            apart = "" if design == first else _apart(mine, base, emphasis=False)
            lines.append(_row([design, f"{own[design]['rate']:g}", *by_task, _percent(statistics.mean(mine)), apart]))
        lines += ["", *_comparison_table(protocol, designs), *_trial_table(own)]
        lines += ["By size; models train on the sizes in bold.", ""]
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


def _apart(first: Sequence[float], second: Sequence[float], *, emphasis: bool = True) -> str:
    mean, error = difference(first, second)
    text = f"{100 * mean:+.1f} ± {100 * error:.1f}"
    return f"**{text}**" if emphasis and is_seen(mean, error, len(first)) else text


def _comparison_table(protocol: str, designs: Mapping[str, Sequence[Mapping[str, float]]]) -> list[str]:
    """Differences by task between designs that an axis tells apart."""
    pairs = [pair for pair in COMPARISONS[protocol] if set(pair) <= set(designs)]
    if not pairs:
        return []
    lines = ["Differences in points with their standard errors; in bold what is seen.", ""]
    lines += _table(["first minus second", *TASKS, "all", "all but rule"])
    for pair in pairs:
        first, second = (designs[name] for name in pair)
        cells = [
            _apart(*([task_score(scores, task) for scores in runs] for runs in (first, second))) for task in TASKS
        ]
        for without in (None, "rule"):
            cells.append(_apart(*([overall(scores, without=without) for scores in runs] for runs in (first, second))))
        lines.append(_row([" minus ".join(pair), *cells]))
    return [*lines, ""]


def _trial_table(designs: Mapping[str, Any]) -> list[str]:
    """What each learning rate gave in half of the steps."""
    rates = list(next(iter(designs.values()))["trials"])
    if not rates:
        return []
    lines = ["Trials of the learning rate: all tasks, validation images, one run each.", ""]
    lines += _table(["design", *rates])
    for name, design in designs.items():
        lines.append(_row([name, *(_percent(score) for score in design["trials"].values())]))
    return [*lines, ""]


def _memory_table(designs: Mapping[str, Sequence[Mapping[str, float]]]) -> list[str]:
    """What is left of earlier frames when self-attention to them is cut."""
    shown = [(size, cut) for size in FRAMES for cut in (None, *CUTS)]
    with_memory = {name: runs for name, runs in designs.items() if _memory(*shown[0]) in runs[0]}
    if not with_memory:
        return []
    names = [f"{size} frames, {'nothing cut' if cut is None else f'cut: {cut}'}" for size, cut in shown]
    lines = [
        "Questions about any frame but the last, with self-attention cut to the frame's gists or its whole window:",
        "the mean of the seeds, the lowest and the highest.",
        "",
    ]
    lines += _table(["design", *names])
    lines.append(_row(["chance", *(_percent(TASKS["frames"].chance(size)) for size, _ in shown)]))
    for name, runs in with_memory.items():
        cells = []
        for size, cut in shown:
            scores = [run[_memory(size, cut)] for run in runs]
            cells.append(f"{_percent(statistics.mean(scores))} ({100 * min(scores):.0f} to {100 * max(scores):.0f})")
        lines.append(_row([name, *cells]))
    return [*lines, ""]


def _memory(size: int, cut: str | None) -> str:
    return f"memory {size}" if cut is None else f"memory {size} without {cut}"


def insert_tables(page: str, text: str) -> str:
    """The page with the text in place of what stands between its comments.

    Raises:
        ValueError: if the page has no such comments.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"The page of results has lost the comments {BEGIN} and {END} between which tables stand.")
    return f"{before}{BEGIN}\n\n{text}\n{END}{after}"


def main(arguments: list[str] | None = None) -> None:
    """Run what is missing and write the tables."""
    parser = argparse.ArgumentParser(prog="python -m examples.tiny_world.table", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="keeps the results of runs")
    parser.add_argument(
        "--models", type=Path, default=MODELS, help="has source/ and text/; those that ship by default"
    )
    parser.add_argument("--protocols", nargs="+", choices=tuple(DESIGNS), default=list(DESIGNS))
    parser.add_argument("--designs", nargs="+", help="those of each protocol by default")
    parser.add_argument("--seeds", type=int, default=5)
    steps = [recipe.steps for recipe in RECIPES.values()]
    parser.add_argument("--steps", type=int, nargs=2, default=steps, help="of the protocols A and B")
    parser.add_argument("--questions", type=int, default=340, help="of each task and size that models train on")
    parser.add_argument("--lr", type=float, help="of all designs; by default each has three trials")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--jobs", type=int, help="runs at the same time; as many as cores, but 1 on a GPU")
    parser.add_argument("--page", type=Path, default=RESULTS, help="receives the tables")
    options = parser.parse_args(arguments)
    disable_progress_bar()
    page = insert_tables(options.page.read_text("utf-8"), "")  # refused before any work
    for name in ("source", "text"):
        if not (options.models / name / "config.json").is_file():
            parser.error(f"There is no {name} model in {options.models}; make it with `make tiny-world`.")
    jobs = options.jobs or (1 if options.device.startswith("cuda") else os.cpu_count() or 1)
    laboratory = Laboratory(options.folder, options.models, options.questions, options.device)
    recipes = {
        protocol: replace(recipe, steps=steps)
        for (protocol, recipe), steps in zip(RECIPES.items(), options.steps, strict=True)
    }
    plan = [
        (protocol, design)
        for protocol in options.protocols
        for design in DESIGNS[protocol]
        if options.designs is None or design in options.designs
    ]
    if options.lr is None:
        tried = [laboratory.trials(protocol, design, recipes[protocol]) for protocol, design in plan]
        laboratory.measure_all([run for trials in tried for run in trials.values()], jobs)
    rates = {
        (protocol, design): options.lr or laboratory.rate(protocol, design, recipes[protocol])
        for protocol, design in plan
    }
    seeds = range(_FIRST_SEED, _FIRST_SEED + options.seeds)
    runs = [
        Run(protocol, design, seed, recipes[protocol].at(rates[protocol, design]))
        for seed in seeds
        for protocol, design in plan
    ]
    laboratory.measure_all(runs, jobs)
    found: Results = {protocol: {} for protocol in options.protocols}
    for protocol, name in plan:
        own = [run for run in runs if (run.protocol, run.design) == (protocol, name)]
        trials = {} if options.lr else laboratory.trials(protocol, name, recipes[protocol])
        found[protocol][name] = {
            "of": laboratory.shared(protocol, recipes[protocol], seeds),
            "rate": rates[protocol, name],
            "trials": {f"{lr:g}": round(overall(laboratory.measure(run)), 4) for lr, run in trials.items()},
            "seconds": laboratory.seconds([*own, *trials.values()]),
            "runs": [{at: round(score, 4) for at, score in laboratory.measure(run).items()} for run in own],
        }
    file = options.page.with_suffix(".json")
    results = together(json.loads(file.read_text("utf-8")) if file.exists() else {}, found)
    _write(file, json.dumps(results) + "\n")
    _write(options.page, insert_tables(page, tables(results)))


def together(published: Results, found: Results) -> Results:
    """New results with those of other designs that are published already and can be compared with them."""
    results: Results = {}
    for protocol, designs in DESIGNS.items():
        old, new = published.get(protocol, {}), found.get(protocol, {})
        shared = {design["of"] for design in new.values()}
        alike = {name: design for name, design in old.items() if not new or design.get("of") in shared}
        all_designs = alike | new
        if all_designs:
            results[protocol] = {name: all_designs[name] for name in designs if name in all_designs}
    return results


@cache
def _weights_of(folder: Path) -> str:
    """Digest of a checkpoint's weights."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def _digest(what: Any) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


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
