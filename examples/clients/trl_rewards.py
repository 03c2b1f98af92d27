# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""TRL's trainers on questions about images: python -m examples.clients.trl_rewards grpo my-casa-model output

`sft` and `dpo` learn from answers, `grpo` and `rloo` from a reward that looks at the image.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import datasets
import trl
from PIL import Image, ImageStat

import casa_hf  # noqa: F401 (makes the classes known to TRL)

COLOURS = ("red", "lime", "blue")
QUESTION = "Which colour is this?"
TRAINERS = {
    "sft": (trl.SFTTrainer, trl.SFTConfig, {"max_length": None}),
    "dpo": (trl.DPOTrainer, trl.DPOConfig, {"max_length": None}),
    "grpo": (trl.GRPOTrainer, trl.GRPOConfig, {"num_generations": 3, "max_completion_length": 8}),
    "rloo": (trl.RLOOTrainer, trl.RLOOConfig, {"num_generations": 3, "max_completion_length": 8}),
}


def name_of(image: Image.Image) -> str:
    """The colour that an image has most of."""
    means = ImageStat.Stat(image.convert("RGB")).mean
    return COLOURS[means.index(max(means))]


def names_the_colour(completions: list[Any], images: list[list[Image.Image]], **columns: Any) -> list[float]:
    """1 for an answer that names the colour of its image; of others, a little for each letter that they share."""
    rewards = []
    for completion, (image,) in zip(completions, images, strict=True):
        answer, name = completion[0]["content"].lower(), name_of(image)
        rewards.append(1.0 if name in answer else 0.1 * len(set(name) & set(answer)))
    return rewards


def questions(kind: str) -> datasets.Dataset:
    """One image of each colour, in the columns that a kind of trainer reads."""
    rows = []
    for index, colour in enumerate(COLOURS):
        prompt = [{"role": "user", "content": QUESTION}]
        right, wrong = ([{"role": "assistant", "content": COLOURS[(index + step) % 3]}] for step in (0, 1))
        of_kind: dict[str, Any] = {"prompt": prompt}
        if kind == "sft":
            of_kind = {"messages": prompt + right}
        elif kind == "dpo":
            of_kind = {"prompt": prompt, "chosen": right, "rejected": wrong}
        rows.append({**of_kind, "images": [Image.new("RGB", (84, 84), colour)]})
    return datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image()))


def main(arguments: Sequence[str] | None = None) -> Any:
    """Train, save, and return the trainer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trainer", choices=TRAINERS)
    parser.add_argument("model", help="folder or Hub id of a CASA checkpoint")
    parser.add_argument("output", help="folder for the trained model")
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args(arguments)
    trainer_class, config_class, settings = TRAINERS[options.trainer]
    rewards = {"reward_funcs": names_the_colour} if options.trainer in ("grpo", "rloo") else {}
    trainer = trainer_class(
        model=options.model,
        args=config_class(
            options.output,
            max_steps=options.steps,
            per_device_train_batch_size=3,
            learning_rate=1e-3,
            save_strategy="no",
            report_to="none",
            bf16=False,
            **settings,
        ),
        train_dataset=questions(options.trainer),
        **rewards,
    )
    trainer.train()
    trainer.save_model(options.output)
    return trainer


if __name__ == "__main__":
    main()
