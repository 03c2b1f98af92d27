# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The settings of a training run, and which values they may have."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from numbers import Real
from pathlib import Path
from types import NoneType
from typing import Any, get_type_hints

from ..checks import check_count, check_number, check_positive, shown
from ..media_casa import MediaPolicy
from ..modeling_casa import CasaForConditionalGeneration
from .settings import check_name, read_yaml_file, typed

_DTYPES = ("float32", "bfloat16")  # in float16 the second moments of AdamW underflow, and weights jump
_PAPER_STEPS = 25_000

_COUNTS = (
    "sequences_per_update",
    "max_steps",
    "max_text_tokens",
    "max_image_tokens",
    "max_pixels",
    "frame_max_pixels",
)

# Arguments of `TrainingArguments` -> the settings that they follow from.
_FOLLOWING = {
    "output_dir": "output and checkpoints",
    "learning_rate": "lr_new and lr_existing",
    "gradient_accumulation_steps": "sequences_per_update",
    "auto_find_batch_size": "sequences_per_update",
    "gradient_checkpointing_kwargs": "gradient_checkpointing",
    "activation_checkpointing": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing",
    "resume_from_checkpoint": "resume",
}

# Of `generate`, whose arguments have no types to read.
_GENERATE_TYPES: dict[str, type] = {
    **dict.fromkeys(("max_new_tokens", "max_length", "min_new_tokens", "min_length", "num_beams", "top_k"), int),
    **dict.fromkeys(("temperature", "top_p", "min_p", "repetition_penalty", "length_penalty", "max_time"), float),
    **dict.fromkeys(("do_sample", "use_cache", "return_dict_in_generate"), bool),
    "num_return_sequences": int,
}


@dataclass(kw_only=True)
class TrainingConfig:
    """What to train, on what, and how; defaults are those of the paper for Qwen2.5-VL-3B.

    Numbers and truth values may be strings ("3", "1e-4", "no"), as a file or a command line gives them.

    Attributes:
        model: folder or Hub id of a CASA checkpoint.
        data: conversations to train on: a dataset or a list of them, with weights or without; see `load_mixture`.
        output: folder to create, with the trained model and its processor, or the adapter; and `all_results.json` (the
            last metrics) and `trainer_state.json` (those of every log).
        eval_data: conversations to evaluate on, likewise.
        split, eval_split: split of the datasets that don't name their own; None for "train" and "validation".
        trainable: recipe of `freeze`, or patterns; None for that of the backbone: "paper-qwen" where the source could
            see already, "paper-helium" where it was a text model.
        lora: arguments of PEFT's `LoraConfig`, to train adapters instead of weights; its `target_modules` may also be
            a key of `LORA_TARGETS`.
        max_text_tokens, max_image_tokens: budget of a packed sequence.
        over_long: treatment of conversations that exceed the budget, "raise" or "drop".
        max_pixels, frame_max_pixels: limits of images and video frames in this run; None for the processor's.
        frames_per_image: number of video frames that make an image, likewise; 1, 2 or "all".
        media_policy: fields of `MediaPolicy`: what images and videos may be read from, and how large they may be.
        keep_limits: whether the processor that is saved has these limits too, rather than those that the model's had.
        sequences_per_update: number of packed sequences per optimizer step, over all processes; the last step of an
            epoch has what is left.
        max_steps: number of optimizer steps; None for the paper's 25,000, or where `num_train_epochs` says how long.
        num_train_epochs: number of epochs, instead of `max_steps`.
        lr_new, lr_existing: learning rates of what conversion has added and of the rest.
        warmup_steps: number of steps in which rates rise from 0, linearly; below 1 it is a share of all steps. At
            least one step has the full rate.
        decay_steps: number of steps in which they fall to 0 at the end, likewise; None for a tenth of all. Only the
            schedule "warmup_stable_decay" (`lr_scheduler_type`) has them.
        gradient_checkpointing: whether to recompute activations in the backward pass.
        dtype: type of the weights, "float32" or "bfloat16".
        bf16: whether to compute in bfloat16; None: where a GPU can.
        attn_implementation: attention backend; None for Transformers' choice.
        generate: arguments of `generate`, to have evaluation compare answers; None for the loss alone.
        seed: seed of the order of the data, before packing and after it, and of adapters.
        checkpoints: folder for checkpoints; None for the output's name with "-checkpoints".
        resume: whether to resume from the last checkpoint.
        trainer: further arguments of `TrainingArguments`, except those that follow from a setting above. In a file
            they stand beside the others.

    Raises:
        ValueError: if a setting is unknown, of the wrong type or out of range, or contradicts another one.
    """

    model: str
    data: str | dict[str, Any] | list[Any]
    output: str
    eval_data: str | dict[str, Any] | list[Any] | None = None
    split: str | None = None
    eval_split: str | None = None
    trainable: str | list[str] | None = None
    lora: dict[str, Any] | None = None
    max_text_tokens: int = 2_048
    max_image_tokens: int = 20_480
    over_long: str = "raise"
    max_pixels: int | None = None
    frame_max_pixels: int | None = None
    frames_per_image: int | str | None = None
    media_policy: dict[str, Any] | None = None
    keep_limits: bool = False
    sequences_per_update: int = 128
    max_steps: int | None = None
    num_train_epochs: float | None = None
    lr_new: float = 1e-4
    lr_existing: float = 1e-5
    warmup_steps: float = 0.02
    decay_steps: float | None = None
    gradient_checkpointing: bool = True
    dtype: str = "float32"
    bf16: bool | None = None
    attn_implementation: str | None = None
    generate: dict[str, Any] | None = None
    seed: int = 0
    checkpoints: str | None = None
    resume: bool = False
    trainer: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for name, hint in hints.items():
            setattr(self, name, typed(name, getattr(self, name), hint))
        self.trainer = _trainer_arguments(self.trainer, hints)
        if self.generate is not None:
            self.generate = _generate_arguments(self.generate)
        self._check_numbers()
        MediaPolicy.of(self.media_policy)  # or says what is wrong with it
        if self.max_steps is not None and self.num_train_epochs is not None:
            raise ValueError(
                f"max_steps={self.max_steps} and num_train_epochs={self.num_train_epochs:g} contradict each other; "
                "leave out one of them."
            )
        if self.max_steps is None and self.num_train_epochs is None:
            self.max_steps = _PAPER_STEPS
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype={self.dtype!r} is unknown; choose one of {', '.join(_DTYPES)}.")
        if Path(self.output).name in ("", ".."):
            raise ValueError(
                f"output={self.output!r} is not the path of a folder to create. Use one such as my-trained-model."
            )
        if self.trainable is not None and not (self.trainable and all(self.trainable)):
            raise ValueError(f"trainable={self.trainable!r} is empty; give a recipe, or patterns of parameter names.")
        if self.lora is not None and self.trainable is not None:
            raise ValueError(
                f"trainable={self.trainable!r} can't be used with lora, which trains adapters only; leave out one of "
                "them."
            )

    def _check_numbers(self) -> None:
        for name in _COUNTS:
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        check_number("seed", self.seed, int, lambda number: 0 <= number < 2**32, "an integer from 0 to 4294967295")
        for name in ("lr_new", "lr_existing", "num_train_epochs"):
            if getattr(self, name) is not None:
                check_positive(name, getattr(self, name))
        for name in ("warmup_steps", "decay_steps"):
            if getattr(self, name) is not None:
                expected = "a number of steps, or a share of them below 1"
                check_number(name, getattr(self, name), Real, lambda number: 0 <= number < math.inf, expected)

    @property
    def checkpoint_folder(self) -> Path:
        """Folder of the checkpoints that the run writes while it trains."""
        return Path(self.checkpoints or f"{Path(self.output)}-checkpoints")  # without a slash at its end

    @classmethod
    def from_dict(cls, content: Any) -> TrainingConfig:
        """Read a mapping as a YAML file holds it: settings and arguments of `TrainingArguments` side by side.

        Raises:
            ValueError: if a setting is missing, and as `TrainingConfig`.
        """
        _check_mapping(content, "The training configuration")
        own = {f.name: f for f in fields(cls) if f.name != "trainer"}
        if "trainer" in content:
            raise ValueError(
                "'trainer' is not a setting; expected its settings at the top level. Move them up one level."
            )
        required = [f.name for f in own.values() if f.default is MISSING]
        if missing := [name for name in required if content.get(name) is None]:
            settings, verb = ("setting", "is") if len(missing) == 1 else ("settings", "are")
            raise ValueError(
                f"The {settings} {' and '.join(missing)} {verb} missing; expected {', '.join(required)}. Add what is "
                "missing."
            )
        given = {name: value for name, value in content.items() if name in own and value is not None}
        return cls(**given, trainer={name: value for name, value in content.items() if name not in own})

    @classmethod
    def from_yaml(cls, file: str | os.PathLike) -> TrainingConfig:
        """Read a YAML file; see `from_dict`.

        Raises:
            ValueError: if it isn't valid YAML, and as `from_dict`.
            OSError: if it can't be read.
        """
        content = read_yaml_file(file)
        _check_mapping(content, str(file))
        return cls.from_dict(content)


def _check_mapping(content: Any, name: str) -> None:
    if not isinstance(content, Mapping):
        kinds = {str: "text", list: "a list", NoneType: "nothing"}
        raise ValueError(
            f"{name} holds {kinds.get(type(content), shown(content))}; expected lines such as "
            "'model: my-casa-model'. See docs/training.md."
        )


def _trainer_arguments(given: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `TrainingArguments`, typed; those that follow from a setting are refused."""
    from transformers import TrainingArguments

    hints = get_type_hints(TrainingArguments)
    arguments = {}
    for name, value in given.items():
        check_name(name, {*hints, *settings} - {"trainer"}, f"The setting {name!r} is unknown")
        if name in _FOLLOWING or name in settings:
            origin = _FOLLOWING.get(name, name)
            those = "those" if " and " in origin else "that"
            raise ValueError(f"{name} can't be set; expected {origin}, which it follows from. Set {those}.")
        arguments[name] = typed(name, value, hints[name])
    return arguments


def _generate_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `generate`, typed and checked as far as that is possible without a model."""
    from transformers import GenerationConfig

    known = [*vars(GenerationConfig()), *inspect.signature(CasaForConditionalGeneration.generate).parameters]
    arguments = {}
    for name, value in given.items():
        check_name(name, known, f"generate.{name} is not an argument of generate")
        arguments[name] = typed(f"generate.{name}", value, _GENERATE_TYPES.get(name, Any) | None)
    if arguments.get("num_return_sequences", 1) != 1 or arguments.get("return_dict_in_generate"):
        raise ValueError(
            f"generate={arguments} gives more than one answer each, but evaluation compares one; leave out "
            "num_return_sequences and return_dict_in_generate."
        )
    for name in ("max_new_tokens", "max_length", "num_beams"):
        if arguments.get(name) is not None:
            check_count(f"generate.{name}", arguments[name])
    try:
        GenerationConfig().update(**arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"generate={arguments} isn't possible: {error}") from error
    return arguments
