# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Short runs of TRL's trainers; a process without casa_hf uses them too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import trl
from PIL import Image

QUESTIONS = (("What is red?", "A rose."), ("What is blue?", "The sky."))
SAMPLED = {"num_generations": 2, "max_completion_length": 4, "beta": 0.1}


def reward(completions: list[Any], **columns: Any) -> list[float]:
    """Other values for all completions of one prompt, so that there is something to learn."""
    return [float(index) for index in range(len(completions))]


# Kind -> (trainer, its arguments, columns of the data beside the images, whether it has a reference).
KINDS: dict[str, tuple[str, dict[str, Any], tuple[str, ...], bool]] = {
    "SFT": ("SFTTrainer", {"max_length": None}, ("messages",), False),
    "DPO": ("DPOTrainer", {"max_length": None}, ("prompt", "chosen", "rejected"), True),
    "KTO": ("KTOTrainer", {"max_length": None}, ("prompt", "completion", "label"), True),
    "GRPO": ("GRPOTrainer", SAMPLED, ("prompt",), True),
    "RLOO": ("RLOOTrainer", SAMPLED, ("prompt",), True),
    "Distillation": ("DistillationTrainer", {"max_completion_length": 4}, ("prompt",), False),
}


def rows(columns: tuple[str, ...], with_images: bool) -> Any:
    """A dataset in the form that a kind of trainer wants."""
    examples = []
    for index, (question, answer) in enumerate(QUESTIONS):
        prompt = [{"role": "user", "content": question}]
        said = [{"role": "assistant", "content": answer}]
        known = {
            "messages": prompt + said,
            "prompt": prompt,
            "chosen": said,
            "completion": said,
            "rejected": [{"role": "assistant", "content": "Nothing."}],
            "label": index == 0,
        }
        example = {name: known[name] for name in columns}
        if with_images:
            example["images"] = [Image.new("RGB", (84, 56), ("red", "blue")[index])]
        examples.append(example)
    found = datasets.Dataset.from_list(examples)
    return found.cast_column("images", datasets.List(datasets.Image())) if with_images else found


def trainer_of(kind: str, model: Any, output: Path, with_images: bool = True, **options: Any) -> Any:
    name, arguments, columns, _ = KINDS[kind]
    extra = {key: options.pop(key) for key in ("peft_config", "processing_class") if key in options}
    if "num_generations" in arguments:
        extra["reward_funcs"] = reward
    if kind == "Distillation":
        extra["teacher_model"] = model
    config = getattr(trl, f"{name.removesuffix('Trainer')}Config")(
        output_dir=str(output),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        **{**arguments, **options},
    )
    return getattr(trl, name)(model=model, args=config, train_dataset=rows(columns, with_images), **extra)
