# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""A whole training run from one configuration, with the paper's recipe as defaults."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from importlib.util import find_spec
from numbers import Real
from pathlib import Path
from typing import Any, get_type_hints

import torch
from transformers.utils import is_torch_bf16_gpu_available

from ..checkpoint_files.destination import move_finished
from ..checkpoint_files.errors import disk_is_full, one_line
from ..checks import check_count, check_number, check_positive
from ..configuration_casa import CasaConfig
from ..conversion.source import SMALL_FILES, WEIGHT_FILES, download, hub_id
from ..folder_files import own_file, read_json
from ..hub_client import hub_token
from ..modeling_casa import CasaForConditionalGeneration
from ..processing_casa import CasaProcessor
from .checkpoints import NO_OPTIMIZER, STATE, last_checkpoint, warn_of_skipped
from .collator import CasaDataCollator, PackedDataset
from .data import load_mixture
from .parameters import LORA_TARGETS, Part, checkpoint_activations, freeze, trainable_parts
from .refusals import TOKEN_IS_SAVED, refuse_several_gpus
from .settings import check_name, read_yaml_file, typed

logger = logging.getLogger(__name__)

# Beside the weights: what a conversion back needs, and under which terms they stand.
_KEPT_FILES = ("source_*", "LICENSE*", "NOTICE*")
_DTYPES = ("float32", "bfloat16")  # in float16 the second moments of AdamW underflow, and weights jump
_PAPER_STEPS = 25_000
_SCHEDULE = "warmup_stable_decay"
_DECAY = 0.1

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
    "output_dir": "output (and checkpoints)",
    "learning_rate": "lr_new and lr_existing",
    "gradient_accumulation_steps": "sequences_per_update",
    "auto_find_batch_size": "sequences_per_update",
    "gradient_checkpointing_kwargs": "gradient_checkpointing",
    "activation_checkpointing": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing",
    "resume_from_checkpoint": "resume",
}

# What may be another when a run goes on. Of the data it counts what was made of it, and a run can be made longer.
_FREE_TO_CHANGE = {
    *("data", "split", "output", "checkpoints", "resume", "keep_limits", "trainer", "max_steps", "num_train_epochs"),
    *("eval_data", "eval_split", "generate", "gradient_checkpointing", "attn_implementation"),
}
# Of further arguments, what may not.
_KEPT_ARGUMENTS = (
    *("weight_decay", "optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
    *(
        "lr_scheduler_type",
        "lr_scheduler_kwargs",
        "label_smoothing_factor",
        "neftune_noise_alpha",
        "fp16",
        "data_seed",
    ),
)
# In the folder of checkpoints; the Trainer publishes nothing whose name begins so.
_SETTINGS = "_settings.json"

# Of `generate`, whose arguments have no types to read.
_GENERATE_TYPES: dict[str, type] = {
    **dict.fromkeys(("max_new_tokens", "max_length", "min_new_tokens", "min_length", "num_beams", "top_k"), int),
    **dict.fromkeys(("temperature", "top_p", "min_p", "repetition_penalty", "length_penalty", "max_time"), float),
    **dict.fromkeys(("do_sample", "use_cache", "return_dict_in_generate"), bool),
    "num_return_sequences": int,
}
# Where `report_to` sends metrics -> the package that does it.
_REPORTERS = {
    **{name: name for name in ("tensorboard", "wandb", "trackio", "mlflow", "clearml", "codecarbon", "swanlab")},
    "comet_ml": "comet-ml",
}


@dataclass(kw_only=True)
class TrainingConfig:
    """What to train, on what, and how; defaults are those of the paper for Qwen2.5-VL-3B.

    Numbers and truth values may be strings ("3", "1e-4", "no"), as a file or a command line gives them.

    Attributes:
        model: folder or Hub id of a CASA checkpoint.
        data: conversations to train on: a source or a list of them, with weights or without; see `load_mixture`.
        output: folder to make, with the trained model and its processor, or the adapter; and `all_results.json` (the
            last metrics) and `trainer_state.json` (those of every log).
        eval_data: conversations to evaluate on, likewise.
        split, eval_split: of data sets that don't name their own; None for "train" and "validation".
        trainable: a recipe of `freeze`, or patterns; None for "paper-qwen", with a text-only source "paper-helium".
        lora: train adapters in place of weights: arguments of PEFT's `LoraConfig`; its `target_modules` may also be a
            key of `LORA_TARGETS`.
        max_text_tokens, max_image_tokens: budget of a packed sequence.
        over_long: "raise" or "drop", for conversations that exceed the budget.
        max_pixels, frame_max_pixels: limits of images and video frames in this run; None for the processor's.
        keep_limits: whether the processor that is saved has these limits too, rather than those that the model's had.
        sequences_per_update: packed sequences per step of the optimizer, over all processes; the last step of a pass
            over the data has what is left.
        max_steps: steps of the optimizer; None for the paper's 25,000, or where `num_train_epochs` says how long.
        num_train_epochs: passes over the data, in place of `max_steps`.
        lr_new, lr_existing: learning rates of what conversion has added and of the rest.
        warmup_steps: steps in which rates rise from 0, linearly; below 1 it is a share of all steps. At least one step
            has the full rate.
        decay_steps: steps in which they fall to 0 in the end, likewise; None for a tenth of all. Other schedules than
            "warmup_stable_decay" (`lr_scheduler_type`) have none.
        gradient_checkpointing: whether to recompute activations in the backward pass.
        dtype: of the weights.
        bf16: whether to compute in bfloat16; None: where a GPU can.
        attn_implementation: attention back end; None for Transformers' choice.
        generate: arguments of `generate`, to have evaluation compare answers; None for the loss alone.
        seed: of the order of the data, before packing and after it, and of adapters.
        checkpoints: folder for checkpoints on the way; None for the output's name with "-checkpoints".
        resume: whether to go on from the last one there.
        trainer: further arguments of `TrainingArguments`, except those that follow from a setting above. In a file
            they stand beside the others.

    Raises:
        ValueError: for settings that are unknown, of the wrong type or out of range, or that contradict each other.
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
        self._type_arguments(hints)
        for name in _COUNTS:
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        check_number("seed", self.seed, int, lambda number: number >= 0, "an integer of 0 or more")
        for name in ("lr_new", "lr_existing", "num_train_epochs"):
            if getattr(self, name) is not None:
                check_positive(name, getattr(self, name))
        for name in ("warmup_steps", "decay_steps"):
            if getattr(self, name) is not None:
                expected = "a number of steps, or below 1 a share of them"
                check_number(name, getattr(self, name), Real, lambda number: 0 <= number < math.inf, expected)
        if self.max_steps is not None and self.num_train_epochs is not None:
            raise ValueError(
                f"max_steps={self.max_steps} and num_train_epochs={self.num_train_epochs}: leave out one of them."
            )
        if self.max_steps is None and self.num_train_epochs is None:
            self.max_steps = _PAPER_STEPS
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype={self.dtype!r} is unknown; choose one of {', '.join(_DTYPES)}.")
        if Path(self.output).name in ("", ".."):
            raise ValueError(
                f"output={str(self.output)!r} names no folder to make. Give a path such as my-casa-model."
            )
        if self.trainable is not None and not (self.trainable and all(self.trainable)):
            raise ValueError(f"trainable={self.trainable!r} must be a recipe, or patterns that aren't empty.")
        if self.lora is not None and self.trainable is not None:
            raise ValueError("lora trains adapters alone; leave out trainable, or lora to train weights.")

    def _type_arguments(self, settings: Iterable[str]) -> None:
        """Type the arguments for other libraries, and refuse those that they don't know or that follow from a setting.

        Those for PEFT are typed when it is known to be there.
        """
        from transformers import GenerationConfig, TrainingArguments

        hints = get_type_hints(TrainingArguments)
        arguments = {}
        for name, value in self.trainer.items():
            check_name(name, {*hints, *settings} - {"trainer"}, f"The setting {name!r} is unknown")
            if name in _FOLLOWING or name in settings:
                raise ValueError(f"{name} follows from {_FOLLOWING.get(name, name)}; set that instead.")
            arguments[name] = typed(name, value, hints[name])
        self.trainer = arguments
        if self.generate is not None:
            own = inspect.signature(CasaForConditionalGeneration.generate).parameters
            for name in self.generate:
                check_name(name, [*vars(GenerationConfig()), *own], f"generate.{name} is no argument of generate")
            self.generate = {
                name: typed(f"generate.{name}", value, _GENERATE_TYPES.get(name, Any) | None)
                for name, value in self.generate.items()
            }

    @property
    def checkpoint_folder(self) -> Path:
        """Where checkpoints on the way are."""
        return Path(self.checkpoints or f"{Path(self.output)}-checkpoints")  # without a slash at its end

    @classmethod
    def from_dict(cls, content: Any) -> TrainingConfig:
        """From a mapping such as a YAML file gives: settings and arguments of `TrainingArguments` side by side.

        Raises:
            ValueError: for unknown or missing settings, and as `TrainingConfig`.
        """
        if not isinstance(content, Mapping):
            raise ValueError(f"A training configuration is {type(content).__name__}; expected a mapping of settings.")
        own = {f.name: f for f in fields(cls) if f.name != "trainer"}
        if "trainer" in content:
            raise ValueError("The setting 'trainer' is unknown; write what it holds beside the other settings.")
        required = [f.name for f in own.values() if f.default is MISSING]
        if missing := [name for name in required if content.get(name) is None]:
            raise ValueError(f"The training configuration doesn't say {', '.join(missing)}.")
        given = {name: value for name, value in content.items() if name in own and value is not None}
        return cls(**given, trainer={name: value for name, value in content.items() if name not in own})

    @classmethod
    def from_yaml(cls, file: str | os.PathLike) -> TrainingConfig:
        """From a YAML file; see `from_dict`.

        Raises:
            ValueError: if it isn't YAML, or for unknown or missing settings.
            OSError: if it can't be read.
        """
        return cls.from_dict(read_yaml_file(file))


@dataclass(frozen=True)
class TrainingReport:
    """What a run has done.

    Attributes:
        output: the folder with the result.
        parts: what was trained, by part of the model.
        steps: steps of the optimizer in all.
        sequences: packed sequences of the training data.
        dropped: conversations left out for their length.
        metrics: of the training and, with evaluation data, of the last evaluation.
    """

    output: Path
    parts: list[Part]
    steps: int
    sequences: int
    dropped: int
    metrics: dict[str, float]


def train(
    config: TrainingConfig,
    on_log: Callable[[dict[str, float]], None] | None = None,
    on_start: Callable[[list[Part], PackedDataset], None] | None = None,
) -> TrainingReport:
    """Train a CASA model.

    One process per device, as `accelerate launch` or `torchrun` start them; all call this. The trained model is saved
    before it is evaluated or published; errors from then on have a note of where it is.

    Args:
        config: of the run.
        on_log: receives losses, rates and metrics as they come, in the first process.
        on_start: receives what trains and on what before the first step, in the first process.

    Raises:
        ValueError: for settings or data that don't fit; before anything is computed or written.
        ImportError: without Accelerate, or without PEFT where `lora` asks for it, or what `report_to` names.
        FloatingPointError: if losses, gradients or weights are no longer finite; see `CasaTrainer.train`.
        InterruptedError: if the process was told to end and `enable_jit_checkpoint` has written a checkpoint.
    """
    for package, needed in (("accelerate", True), ("peft", config.lora is not None)):
        if needed and find_spec(package) is None:
            raise ImportError(f'Training needs the package {package}: pip install "casa_hf[train]".')
    from transformers import PrinterCallback, ProgressCallback

    from .progress import LogCallback, StepsProgress
    from .trainer import CasaTrainer

    _check_arguments(config)
    _arguments(config, config.max_steps or sys.maxsize)  # what Transformers refuses, before the data are read
    output, checkpoints = Path(config.output), config.checkpoint_folder
    resumed = _check_folders(output, checkpoints, config.resume)
    repository = hub_id(config.model, revision=None)
    folder = Path(config.model) if repository is None else download(repository, None, SMALL_FILES)
    _check_model(config.model, folder)
    limits = {"max_pixels": config.max_pixels, "frame_max_pixels": config.frame_max_pixels}
    limits = {name: limit for name, limit in limits.items() if limit is not None}
    processor = CasaProcessor.from_pretrained(folder, **limits)
    saved = CasaProcessor.from_pretrained(folder) if limits and not config.keep_limits else processor
    data = _pack(config, processor, load_mixture(config.data, config.split, config.seed))
    eval_data = None
    if config.eval_data is not None:
        examples = load_mixture(config.eval_data, config.eval_split, config.seed, default_split="validation")
        eval_data = _pack(config, processor, examples)
        if eval_data.num_dropped and is_first_process():
            logger.warning(
                "%d of %d conversations of eval_data are dropped as too long.", eval_data.num_dropped, len(examples)
            )
    if len(data) < config.sequences_per_update and is_first_process():
        logger.warning(
            "The data has only %d packed sequences, so each step has these rather than sequences_per_update=%d.",
            len(data),
            config.sequences_per_update,
        )
    steps = config.max_steps
    if steps is None:
        assert config.num_train_epochs is not None
        steps = math.ceil(config.num_train_epochs * math.ceil(len(data) / config.sequences_per_update))
    settings = _settings(config, data, steps)
    if resumed is not None:
        _check_settings(settings, checkpoints, resumed)
    arguments = _arguments(config, steps)

    if repository is not None:
        download(repository, folder.name, WEIGHT_FILES)
    model: Any = CasaForConditionalGeneration.from_pretrained(
        folder, dtype=getattr(torch, config.dtype), attn_implementation=config.attn_implementation
    )
    # Adapters and model cards refer to the model by this: not to a folder in this machine's cache.
    model.name_or_path = model.config.name_or_path = str(config.model)
    if config.lora is None:
        recipe = "paper-helium" if model.config.backbone.text_only else "paper-qwen"
        freeze(model, config.trainable or recipe)
    else:
        torch.manual_seed(config.seed)
        model = _with_adapters(model, config.lora)
    if config.gradient_checkpointing:
        checkpoint_activations(model)
    parts = trainable_parts(model)

    trainer = CasaTrainer(
        model=model,
        args=arguments,
        train_dataset=data,
        eval_dataset=eval_data,
        processing_class=saved,
        data_collator=CasaDataCollator(processor),
        lr_new=config.lr_new,
        lr_existing=config.lr_existing,
        generate=config.generate,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    progress = StepsProgress()
    if not arguments.disable_tqdm:
        trainer.add_callback(progress)
    trainer.add_callback(LogCallback(on_log))
    if on_start is not None and trainer.is_world_process_zero():
        on_start(parts, data)
    try:
        if trainer.is_world_process_zero():
            _write_settings(settings, checkpoints)
            if arguments.push_to_hub:
                _copy_kept(folder, checkpoints)  # the folder that the Trainer publishes
        metrics = dict(trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed)).metrics)
        if trainer.state.global_step < steps:  # as `enable_jit_checkpoint` has it end
            raise InterruptedError(_stopped(trainer.state.global_step, steps, checkpoints))
        _save(trainer, output, folder, metrics)
    except Exception as error:  # those who write tensors have kinds of their own
        if disk_is_full(error):
            raise OSError(_full_disk(error, checkpoints)) from error
        _refuse_data(error)
        raise
    finally:
        progress.close()
    try:
        if eval_data is not None:
            metrics |= trainer.evaluate()
            if not math.isfinite(metrics["eval_loss"]):
                raise FloatingPointError(f"The loss of the evaluation is not finite: {metrics['eval_loss']}.")
            if trainer.is_world_process_zero():
                _write_results(trainer, output, metrics)
        if arguments.push_to_hub:
            trainer.push_to_hub()
    except Exception as error:
        error.add_note(f"The model is trained and saved in {output}.")
        raise
    finally:
        progress.close()
    return TrainingReport(output, parts, trainer.state.global_step, len(data), data.num_dropped, metrics)


def _check_arguments(config: TrainingConfig) -> None:
    """Refuse arguments for other libraries that these would refuse late, or take in part."""
    from transformers import GenerationConfig

    if config.trainer.get("train_sampling_strategy") == "group_by_length":
        raise ValueError(
            "train_sampling_strategy='group_by_length': sequences are packed to the same length; leave it out."
        )
    if config.resume and config.trainer.get("save_only_model"):
        raise ValueError(
            "resume needs the states that save_only_model leaves out of checkpoints; leave out one of them."
        )
    if config.trainer.get("hub_token") is not None:
        raise ValueError(f"hub_token: {TOKEN_IS_SAVED}")
    if config.trainer.get("push_to_hub") and is_first_process() and hub_token() is None:
        raise ValueError("push_to_hub: there is no token for the Hub. Log in with `hf auth login`, or set HF_TOKEN.")
    kind = _schedule_type(config)
    if config.decay_steps is not None and kind != _SCHEDULE:
        raise ValueError(
            f"decay_steps={config.decay_steps} is for lr_scheduler_type={_SCHEDULE!r}, not {kind!r}; leave out one."
        )
    _check_reporters(config.trainer.get("report_to"))
    _check_precision(config)
    if "WORLD_SIZE" not in os.environ and not config.trainer.get("use_cpu"):
        refuse_several_gpus(torch.cuda.device_count())
    if config.lora is not None:
        _typed_lora(config.lora)
    if config.generate is not None:
        if config.generate.get("num_return_sequences", 1) != 1 or config.generate.get("return_dict_in_generate"):
            raise ValueError(
                f"generate={config.generate}: evaluation compares one answer each; leave out "
                "num_return_sequences and return_dict_in_generate."
            )
        for name in ("max_new_tokens", "max_length", "num_beams"):
            if config.generate.get(name) is not None:
                check_count(f"generate.{name}", config.generate[name])
        try:
            GenerationConfig().update(**config.generate)
        except (TypeError, ValueError) as error:
            raise ValueError(f"generate={config.generate} isn't possible: {error}") from error


def _check_reporters(report_to: str | list[str] | None) -> None:
    from transformers.integrations import get_available_reporting_integrations
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    names = [report_to] if isinstance(report_to, str) else report_to or []
    for name in names:
        check_name(name, ("none", "all", *INTEGRATION_TO_CALLBACK), f"report_to={name!r} is unknown")
        if name in _REPORTERS and name not in get_available_reporting_integrations():
            package = _REPORTERS[name]
            raise ImportError(f"report_to={name!r} needs the package {package}: pip install {package}")


def _check_precision(config: TrainingConfig) -> None:
    """Refuse to compute in half precision on a device that can't, by the name of the setting."""
    on_cpu = config.trainer.get("use_cpu") or not torch.accelerator.is_available()
    if config.trainer.get("fp16") and on_cpu:
        raise ValueError("fp16=True needs a GPU, and this run has none. Leave it out; on a CPU there is bf16.")
    if config.bf16 and not config.trainer.get("use_cpu") and not is_torch_bf16_gpu_available():
        raise ValueError(
            "bf16=True: there is no GPU here that computes in bfloat16. Leave it out, or set use_cpu to compute in "
            "bfloat16 on the CPU."
        )


def _typed_lora(given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of PEFT's `LoraConfig`, typed."""
    from peft import LoraConfig

    hints = get_type_hints(LoraConfig)
    for name in given:
        check_name(name, [f.name for f in fields(LoraConfig)], f"lora.{name} is no argument of PEFT's LoraConfig")
    return {name: typed(f"lora.{name}", value, hints[name] | None) for name, value in given.items()}


def _check_model(model: str, folder: Path) -> None:
    """Refuse a model that isn't converted: its fusion layers would start at random."""
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"model={model} has no config.json; give a CASA checkpoint.")
    model_type = read_json(file).get("model_type")
    if model_type != CasaConfig.model_type:
        raise ValueError(
            f"model={model} has the model_type {model_type!r}, so it is no CASA checkpoint. "
            f"`casa-hf convert {model} FOLDER` makes one from it; set model to that folder."
        )


def _check_folders(output: Path, checkpoints: Path, resume: bool) -> Path | None:
    """Refuse folders that hold something or each other; the checkpoint to go on from, if there is one."""
    on_the_way = checkpoints.resolve()
    for folder in (output.resolve(), _partial(output).resolve()):
        if on_the_way.is_relative_to(folder) or folder.is_relative_to(on_the_way):
            raise ValueError(
                f"checkpoints={checkpoints} and output={output} (written as {_partial(output).name} first) must "
                "not be one folder or lie in each other. Set checkpoints to a folder beside the output, or leave it "
                "out."
            )
    if output.exists():
        longer = f" (to make a finished run longer, with checkpoints={checkpoints})" if resume else ""
        raise ValueError(f"The output {output} exists; choose another folder{longer}, or remove it.")
    last, skipped = last_checkpoint(checkpoints)
    weights_alone = [folder for folder, fault in skipped.items() if fault == NO_OPTIMIZER]
    if last is None and weights_alone:
        raise ValueError(
            f"{weights_alone[0]} is {NO_OPTIMIZER}, as with save_only_model, so no run can go on from it. To "
            "start with its weights, set model to it and checkpoints to another folder; to start anew, remove "
            f"{checkpoints}."
        )
    if not resume and (last is not None or skipped):
        raise ValueError(
            f"{checkpoints} holds checkpoints of an earlier run; set resume to go on from "
            f"{'the start' if last is None else last.name}, choose another folder, or remove it."
        )
    if is_first_process():
        warn_of_skipped(last, skipped)
    return last


def _settings(config: TrainingConfig, data: PackedDataset, steps: int) -> dict[str, Any]:
    """What a run has begun with and has to go on with."""
    settings = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in _FREE_TO_CHANGE}
    settings |= {name: config.trainer[name] for name in _KEPT_ARGUMENTS if name in config.trainer}
    folder = Path(config.model)
    settings["model"] = str(folder.resolve() if folder.is_dir() else config.model)
    settings["rows of data"] = hashlib.sha256(
        json.dumps([data.rows, data.num_text_tokens, data.num_image_tokens]).encode()
    ).hexdigest()[:16]
    settings["max_steps"] = steps  # those of `num_train_epochs` too
    return json.loads(json.dumps(settings, default=str))


def _check_settings(settings: dict[str, Any], checkpoints: Path, last: Path) -> None:
    """Refuse to go on with other settings: what a checkpoint holds would count in part, without a word."""
    file = checkpoints / _SETTINGS
    before = read_json(file) if file.is_file() else {}
    if before and before.get("max_steps", 0) < settings["max_steps"]:
        before["max_steps"] = settings["max_steps"]  # the run is made longer
    changed = [
        f"{name}={settings.get(name)!r} (was {before.get(name)!r})"
        for name in dict.fromkeys([*before, *(settings if before else ())])
        if settings.get(name) != before.get(name)
    ]
    if changed:
        raise ValueError(
            f"resume goes on with the settings that the run in {checkpoints} began with, but now there are "
            f"{', '.join(changed)}. Give these as they were; or start anew with other checkpoints and model={last}."
        )


def _write_settings(settings: dict[str, Any], checkpoints: Path) -> None:
    checkpoints.mkdir(parents=True, exist_ok=True)
    _write_json(checkpoints / _SETTINGS, settings)


def _write_results(trainer: Any, folder: Path, metrics: dict[str, float]) -> None:
    """The last metrics and those of every log, in files of the names that Transformers gives them."""
    _write_json(folder / "all_results.json", metrics)
    _write_json(folder / STATE, asdict(trainer.state))


def _write_json(file: Path, content: Any) -> None:
    _partial(file).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    os.replace(_partial(file), file)


def is_first_process() -> bool:
    """Whether this is the one of several processes that speaks and publishes."""
    return not int(os.environ.get("RANK", 0))


def _pack(config: TrainingConfig, processor: CasaProcessor, examples: Sequence[Mapping[str, Any]]) -> PackedDataset:
    return PackedDataset(
        examples,
        processor,
        max_text_tokens=config.max_text_tokens,
        max_image_tokens=config.max_image_tokens,
        over_long=config.over_long,
    )


def _schedule_type(config: TrainingConfig) -> str:
    return config.trainer.get("lr_scheduler_type", _SCHEDULE)


def _schedule(config: TrainingConfig, steps: int) -> dict[str, Any]:
    """Arguments of the learning rate's course over this many steps."""

    def counted(given: float) -> int:
        return math.ceil(given * steps) if given < 1 else round(given)

    decays = _schedule_type(config) == _SCHEDULE
    warmup, decay = config.warmup_steps, _DECAY if config.decay_steps is None else config.decay_steps
    # Shares are rounded up, together to more than all steps.
    fits = warmup + decay <= 1 if max(warmup, decay) < 1 else counted(warmup) + counted(decay) <= steps
    if decays and not fits:
        raise ValueError(f"warmup_steps={warmup} and decay_steps={decay} are more than all {steps} steps; lower one.")
    # The first step of the warm-up has the rate 0, so it mustn't be the only one.
    warmup_steps = min(counted(warmup), steps - 1)
    arguments: dict[str, Any] = {"lr_scheduler_type": _schedule_type(config), "warmup_steps": warmup_steps}
    if decays:
        decay_steps = min(counted(decay), steps - warmup_steps)
        shape = {"num_decay_steps": decay_steps, "warmup_type": "linear", "decay_type": "linear"}
        arguments["lr_scheduler_kwargs"] = {**shape, **(config.trainer.get("lr_scheduler_kwargs") or {})}
    return arguments


def _arguments(config: TrainingConfig, steps: int) -> Any:
    """`TrainingArguments` of a run of this many steps."""
    from transformers import TrainingArguments

    processes = int(os.environ.get("WORLD_SIZE", 1))
    per_device = config.trainer.get("per_device_train_batch_size", 1)
    check_count("per_device_train_batch_size", per_device)
    accumulation, rest = divmod(config.sequences_per_update, per_device * processes)
    if rest:
        raise ValueError(
            f"sequences_per_update={config.sequences_per_update} isn't a multiple of {processes} processes times "
            f"{per_device} sequences (per_device_train_batch_size)."
        )
    use_bf16 = config.bf16
    if use_bf16 is None:
        use_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported() and not config.trainer.get("fp16")
    given = {
        "per_device_train_batch_size": per_device,
        "per_device_eval_batch_size": 1,
        "save_total_limit": 2,
        "logging_steps": 10,
        "logging_first_step": True,
        "report_to": "none",
        "disable_tqdm": not sys.stderr.isatty(),
        "remove_unused_columns": False,
        "prediction_loss_only": True,
        "ddp_find_unused_parameters": False,
        # Rather than by the folder of checkpoints.
        **({"hub_model_id": Path(config.output).name} if config.trainer.get("push_to_hub") else {}),
        **config.trainer,
        **_schedule(config, steps),
        "output_dir": str(config.checkpoint_folder),
        "max_steps": steps,
        "gradient_accumulation_steps": accumulation,
        "bf16": use_bf16,
        "seed": config.seed,
    }
    try:
        return TrainingArguments(**given)
    except (TypeError, ValueError) as error:
        _blame(config.trainer)
        raise ValueError(f"These settings aren't possible together: {one_line(error)}") from error


def _blame(given: Mapping[str, Any]) -> None:
    """Find the argument that `TrainingArguments` refuses by itself, if there is one.

    Raises:
        ValueError: with its name.
    """
    from transformers import TrainingArguments

    always = {"output_dir": "unused", "use_cpu": given.get("use_cpu", False)}
    for name, value in given.items():
        try:
            TrainingArguments(**{**always, name: value})
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}={value!r} isn't possible: {one_line(error)}") from error


def _with_adapters(model: Any, settings: dict[str, Any]) -> Any:
    from peft import LoraConfig, get_peft_model

    settings = _typed_lora(settings)
    given = "fusion" if settings.get("target_modules") is None else settings["target_modules"]
    targets = LORA_TARGETS.get(given, given) if isinstance(given, str) else given
    # PEFT knows "all-linear" by name.
    if given != "all-linear" and not any(_is_target(name, targets) for name, _ in model.named_modules()):
        known = [name for name in LORA_TARGETS if name != given]
        raise ValueError(
            f"lora.target_modules={given!r} names no layer of this model (variant {model.config.variant}). "
            f"Choose {' or '.join(known)}, or a regular expression of whole names, or a list of their last parts."
        )
    return get_peft_model(model, LoraConfig(**{**_beside_adapters(model), **settings, "target_modules": targets}))


def _is_target(module: str, targets: Any) -> bool:
    """Whether PEFT takes this module for one of `target_modules`."""
    if not isinstance(targets, str):
        return any(module == target or module.endswith(f".{target}") for target in targets)
    try:
        return re.fullmatch(targets, module) is not None
    except re.error as error:
        raise ValueError(f"lora.target_modules={targets!r} is no regular expression: {error}.") from error


def _beside_adapters(model: Any) -> dict[str, Any]:
    """Arguments of `LoraConfig` for what nobody has trained yet: the projector of a text-only source, new tokens."""
    beside: dict[str, Any] = {}
    if any("multi_modal_projector." in name for name, _ in model.named_parameters()):
        beside["modules_to_save"] = ["multi_modal_projector"]
    if model.config.new_token_ids:
        beside["trainable_token_indices"] = {"embed_tokens": list(model.config.new_token_ids)}
    return beside


def _save(trainer: Any, output: Path, source: Path, metrics: dict[str, float] | None = None) -> None:
    """Write model, processor and metrics under another name, then give the folder its own."""
    partial = _partial(output)
    first = trainer.is_world_process_zero()
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is not None:
        plugin.set_state_dict_type("FULL_STATE_DICT")  # `save_model` writes nothing in any other form
    if first:
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    trainer.accelerator.wait_for_everyone()
    is_complete = False
    try:
        if first:
            _copy_kept(source, partial)
        # Publishing what was trained, as `save_model` would do here too, comes when it is safe.
        trainer.save_model(str(partial), _internal_call=True)
        is_complete = True
        if first:
            (partial / "training_args.bin").unlink(missing_ok=True)
            if metrics is not None:
                _write_results(trainer, partial, metrics)
            move_finished(partial, output)
    finally:
        if first and not is_complete:
            shutil.rmtree(partial, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()


def _refuse_data(error: Exception) -> None:
    """Raise an error of a process that loads data by itself: torch puts that process's traceback into its words."""
    name = type(error).__name__
    if isinstance(error, ValueError) and str(error).startswith(f"Caught {name} in DataLoader worker"):
        raise ValueError(str(error).rpartition(f"\n{name}: ")[2].strip()) from error


def _full_disk(error: Exception, checkpoints: Path) -> str:
    """What to do when there was no room for a checkpoint or the output."""
    last, _ = last_checkpoint(checkpoints)
    if last is None:
        way = f"No checkpoint in {checkpoints} is complete; free some space, and set resume (--resume) to start anew."
    else:
        way = f"{last.name} in {checkpoints} is complete; free some space, and set resume (--resume) to go on from it."
    return f"The disk is full, it seems ({one_line(error)}). {way}"


def _stopped(step: int, steps: int, checkpoints: Path) -> str:
    last, _ = last_checkpoint(checkpoints, reads_all=False)
    way = "There is no checkpoint" if last is None else f"Set resume (--resume) to go on from {last}"
    return f"The training was stopped from outside after {step} of {steps} steps. {way}."


def _partial(output: Path) -> Path:
    """Where a file or folder is written before it has its name."""
    return output.with_name(f"{output.name}.incomplete")


def _copy_kept(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for pattern in _KEPT_FILES:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copy(own_file(source, file.name), target / file.name)
