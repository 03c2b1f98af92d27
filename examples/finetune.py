# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Fine-tune a CASA checkpoint by the recipe of the paper (arXiv 2512.19535), stage by stage.

    python -m examples.finetune image my-casa-model conversations/ trained
    python -m examples.finetune video trained "[{path: images, weight: 3}, {path: clips, weight: 1}]" trained-on-video
    accelerate launch -m examples.finetune image my-casa-model conversations/ trained

Each stage is a `TrainingConfig`; further settings, and arguments of Transformers' TrainingArguments, are given as
NAME=VALUE, such as `max_steps=1000`.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from casa_hf.training import TrainingConfig, parts_table, train
from casa_hf.training.arguments import is_first_process
from casa_hf.training.settings import read_yaml

# Text and image tokens per packed sequence; 128 of these per update, 1e-4 for new and 1e-5 for existing parameters.
# The tower is frozen where frames come in; frames of 504 x 504 pixels are 324 tokens, of 448 x 448 they are 256.
STAGES: dict[str, dict[str, Any]] = {
    "image": {"max_text_tokens": 2_048, "max_image_tokens": 20_480, "max_steps": 25_000},
    "image-helium": {
        "max_text_tokens": 2_048,
        "max_image_tokens": 20_480,
        "max_steps": 40_000,
        "trainable": "paper-helium",
    },
    # For images and clips of up to 3 minutes, 3 to 1: weights of `data`.
    "video": {
        "max_text_tokens": 3_072,
        "max_image_tokens": 46_080,
        "max_steps": 15_000,
        "trainable": "fusion-only",
        "frame_max_pixels": 504 * 504,
    },
    "live-captions": {
        "max_text_tokens": 3_072,
        "max_image_tokens": 30_720,
        "max_steps": 20_000,
        "trainable": "fusion-only",
        "frame_max_pixels": 448 * 448,
        "keep_limits": True,
    },
}


def configuration(stage: str, model: str, data: str, output: str, settings: list[str]) -> TrainingConfig:
    """The stage's settings with those of the command line.

    Raises:
        ValueError: for a setting that isn't NAME=VALUE or that doesn't exist.
    """
    datasets = read_yaml(data, "DATA") if data.startswith(("[", "{")) else data
    content: dict[str, Any] = {"model": model, "data": datasets, "output": output, **STAGES[stage]}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals:
            raise ValueError(f"{setting!r} is not a setting; write NAME=VALUE.")
        content[name] = read_yaml(value, setting)
    if content.get("num_train_epochs") is not None and not any(
        setting.startswith("max_steps=") for setting in settings
    ):
        del content["max_steps"]  # the stage's own
    return TrainingConfig.from_dict(content)


def main(arguments: list[str] | None = None) -> None:
    """Train one stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("model", help="folder or Hub id of a CASA checkpoint")
    parser.add_argument("data", help="folder or file of conversations, Hub id of a dataset, or a YAML list")
    parser.add_argument("output", help="folder to create")
    parser.add_argument("settings", nargs="*", metavar="NAME=VALUE")
    given = parser.parse_args(arguments)
    try:
        config = configuration(given.stage, given.model, given.data, given.output, given.settings)
        report = train(config, on_log=print, on_start=lambda parts, data: print(parts_table(parts)))
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        sys.exit(" ".join([f"error: {error}", *getattr(error, "__notes__", [])]))
    if is_first_process():
        print(f"Wrote {report.output} after {report.steps} steps.")


if __name__ == "__main__":
    main()
