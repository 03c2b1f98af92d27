# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Evaluate a checkpoint on the benchmarks of the paper: `python -m casa_hf.serving.lmms_eval CHECKPOINT`.

On several GPUs: `accelerate launch -m casa_hf.serving.lmms_eval CHECKPOINT`.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from . import MODEL_ID, PAPER_TASKS
from .results import print_table

MAX_PIXELS = 896 * 896
BATCH_SIZE = 16


def read_arguments(arguments: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """What was asked for, and the arguments of lmms-eval for it.

    Args:
        arguments: of the command line; None for those of this process.
    """
    parser = argparse.ArgumentParser(
        prog="python -m casa_hf.serving.lmms_eval",
        description="Evaluate a checkpoint on the benchmarks of the paper, with the settings of its authors.",
        epilog="Further options, after the model, are those of lmms-eval, such as --log_samples.",
        allow_abbrev=False,  # or lmms-eval's --model would be --model-args
    )
    parser.add_argument("model", help="folder or Hub id of a CASA checkpoint, or of a token-insertion one")
    parser.add_argument("--tasks", default="casa_images", help="tasks, with commas between; default: %(default)s")
    parser.add_argument("--limit", type=float, help="number of questions of each task; default: all")
    # Options of lmms-eval by its own names too: given twice, the second would replace all of the first.
    parser.add_argument("--batch-size", "--batch_size", type=int, default=BATCH_SIZE, help="default: %(default)s")
    parser.add_argument(
        "--max-pixels", type=int, default=MAX_PIXELS, help="largest number of pixels of an image; default: %(default)s"
    )
    parser.add_argument(
        "--model-args",
        "--model_args",
        default="",
        help="further arguments of the model, as dtype=bfloat16,max_frames=64",
    )
    parser.add_argument(
        "--output",
        "--output_path",
        type=Path,
        default=Path("evaluation"),
        help="folder of results; default: %(default)s",
    )
    given, further = parser.parse_known_args(arguments)
    model_args = [f"pretrained={given.model}", f"max_pixels={given.max_pixels}"]
    model_args += [given.model_args] if given.model_args else []
    options = {
        "--model": MODEL_ID,
        "--model_args": ",".join(model_args),
        "--tasks": given.tasks,
        "--include_path": str(PAPER_TASKS),
        "--batch_size": str(given.batch_size),
        "--output_path": str(given.output),
    }
    if given.limit is not None:
        options["--limit"] = str(given.limit)
    return given, [word for option in options.items() for word in option] + further


def main(arguments: Sequence[str] | None = None) -> None:
    """Run lmms-eval, and print the table of all results of the folder."""
    given, options = read_arguments(arguments)
    try:
        from lmms_eval.__main__ import cli_evaluate
    except ModuleNotFoundError as error:
        raise SystemExit(f"{error}. Install lmms-eval with: pip install 'casa_hf[lmms-eval]'") from error
    began = time.time()
    sys.argv = ["lmms-eval", *options]
    cli_evaluate()
    if int(os.environ.get("RANK", 0)) != 0:
        return
    # lmms-eval prints an error and ends as if nothing had happened.
    if not any(file.stat().st_mtime >= began for file in given.output.rglob("*_results.json")):
        raise SystemExit("lmms-eval wrote no results; see its messages above.")
    print_table([given.output])


if __name__ == "__main__":
    main()
