# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Train a text model, a source that sees, and the CASA form of the source; measure them on held-out images."""

from __future__ import annotations

import argparse
import importlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from casa_hf import CasaForConditionalGeneration, CasaProcessor

from .batches import Batcher
from .protocols import ADAPTATION, SOURCE, TEXT, Recipe, adapt, train_source
from .training import Partner, Progress, Scores, chance, evaluate, in_two_processes
from .world import standard_questions


def main(arguments: list[str] | None = None) -> None:
    """Make `source`, `text`, `casa` and `results.json` in a folder."""
    parser = argparse.ArgumentParser(prog="python -m examples.tiny_world", description=__doc__)
    parser.add_argument("folder", type=Path, help="receives source/, text/, casa/ and results.json")
    parser.add_argument("--keep", action="store_true", help="take the source and the text model that are there")
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of steps, to try the command")
    parser.add_argument("--questions", type=int, default=400, help="test questions of each task and size")
    options = parser.parse_args(arguments)
    disable_progress_bar()
    seconds: dict[str, float] = {}
    folder, scale = options.folder, options.scale
    for name, recipes in {"text": TEXT, "source": SOURCE}.items():
        if not (options.keep and (folder / name).exists()):
            started = time.monotonic()
            in_two_processes(_train, folder / name, [_scaled(recipe, scale) for recipe in recipes])
            seconds[name] = round(time.monotonic() - started)
    started = time.monotonic()
    in_two_processes(_adapt, folder / "source", folder / "casa", _scaled(ADAPTATION, scale))
    seconds["casa"] = round(time.monotonic() - started)

    results = measure(folder, options.questions)
    print(table(results))
    content = {"questions": results["chance"].questions, "seconds": seconds}
    for name, scores in results.items():
        by_size = {f"{task} {size}": round(score, 4) for (task, size), score in scores.by_size.items()}
        content[name] = {"overall": round(scores.overall, 4), **by_size}
    (folder / "results.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _scaled(recipe: Recipe, scale: float) -> Recipe:
    return replace(recipe, steps=max(1, round(scale * recipe.steps)))


def _train(partner: Partner, folder: Path, recipes: list[Recipe]) -> None:
    name = folder.name
    with _destination(partner, folder) as written:
        how: Any = {"blind": True} if name == "text" else {"text": folder.parent / "text", "seed": len(TEXT)}
        train_source(written, recipes, report=_printer(partner, name), partner=partner, **how)


def _adapt(partner: Partner, source: Path, folder: Path, recipe: Recipe) -> None:
    with _destination(partner, folder) as written:
        adapt(source, written, recipe=recipe, report=_printer(partner, "casa"), partner=partner)


@contextmanager
def _destination(partner: Partner, folder: Path) -> Iterator[Path]:
    """The folder for the first process; one that is thrown away for the second, which ends with the same model."""
    disable_progress_bar()
    if partner.rank == 0:
        yield folder
    else:
        with tempfile.TemporaryDirectory(prefix="tiny-world-") as place:
            yield Path(place, "same")


def measure(folder: Path, questions: int) -> dict[str, Scores]:
    """The scores on test images of guessing, of the text model, of the source without and with images, and of the
    adapted model."""
    examples = standard_questions(questions)
    blind = [example.blind for example in examples]
    batcher = Batcher(CasaProcessor.from_pretrained(folder / "casa"))
    text, source = (
        CasaForConditionalGeneration.from_pretrained(folder / name, casa_variant="insertion")
        for name in ("text", "source")
    )
    return {
        "chance": chance(examples),
        "text only": evaluate(text, batcher, blind),
        "source, blind": evaluate(source, batcher, blind),
        "source": evaluate(source, batcher, examples),
        "casa": evaluate(CasaForConditionalGeneration.from_pretrained(folder / "casa"), batcher, examples),
    }


def table(results: dict[str, Scores]) -> str:
    """The scores as a Markdown table, in percent."""
    sizes = results["chance"].by_size
    lines = [["task", "size", *results], ["---"] * (2 + len(results))]
    for task, size in sizes:
        lines.append([task, str(size), *(f"{100 * scores.by_size[task, size]:.1f}" for scores in results.values())])
    lines.append(["all tasks", "", *(f"{100 * scores.overall:.1f}" for scores in results.values())])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _printer(partner: Partner, name: str) -> Callable[[Progress], None]:
    def show(progress: Progress) -> None:
        if partner.rank == 0:
            print(
                f"{name}: step {progress.step:,} of {progress.steps:,}, loss {progress.loss:.3f}, "
                f"{progress.seconds_left / 60:.0f} min left",
                flush=True,
            )

    return show


if __name__ == "__main__":
    # Under its full name, since spawned processes look for the functions there: none of them runs as `__main__`.
    importlib.import_module("examples.tiny_world.__main__").main()
