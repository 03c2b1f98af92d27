# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""From the settings of a run to Transformers' `TrainingArguments`; what those would refuse late, or accept in part."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import is_torch_bf16_gpu_available

from ..checkpoint_files.hub_client import hub_token
from ..checks import check_count, one_line
from ..design_space import unknown_value
from .config import TrainingConfig
from .refusals import TOKEN_IS_SAVED, refuse_several_gpus

if TYPE_CHECKING:
    from transformers import TrainingArguments

_SCHEDULE = "warmup_stable_decay"
_DECAY = 0.1

# What `report_to` can name that needs a package of the same name.
_REPORTERS = ("tensorboard", "wandb", "trackio", "mlflow", "clearml", "codecarbon", "swanlab", "comet_ml")

# Unless the settings say otherwise.
_DEFAULTS = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "save_total_limit": 2,
    "logging_steps": 10,
    "logging_first_step": True,
    "remove_unused_columns": False,
    "prediction_loss_only": True,
    "ddp_find_unused_parameters": False,
}


def is_first_process() -> bool:
    """Whether this is the one of several processes that logs and publishes."""
    return not int(os.environ.get("RANK", 0))


def check_arguments(config: TrainingConfig) -> None:
    """Refuse arguments that Transformers would refuse late, or accept in part.

    Raises:
        ValueError: if an argument can't be used; the message names it.
        ImportError: if `report_to` names a package that isn't installed.
    """
    given = config.trainer
    if given.get("train_sampling_strategy") == "group_by_length":
        raise ValueError(
            "train_sampling_strategy='group_by_length' can't be used, since sequences are packed to the same length; "
            "leave it out."
        )
    if config.resume and given.get("save_only_model"):
        raise ValueError(
            "resume and save_only_model can't be used together, since checkpoints then lack the states that resuming "
            "needs; leave out one of them."
        )
    if given.get("hub_token") is not None:
        raise ValueError(f"hub_token {TOKEN_IS_SAVED}")
    if given.get("push_to_hub") and is_first_process() and hub_token() is None:
        raise ValueError("push_to_hub needs a token for the Hub. Log in with `hf auth login`, or set HF_TOKEN.")
    if config.decay_steps is not None and _schedule_type(config) != _SCHEDULE:
        raise ValueError(
            f"decay_steps={config.decay_steps:g} is only for lr_scheduler_type={_SCHEDULE!r}, not for "
            f"{_schedule_type(config)!r}; leave out one of them."
        )
    _check_reporters(given.get("report_to"))
    _check_precision(config)
    if "WORLD_SIZE" not in os.environ and not given.get("use_cpu"):
        refuse_several_gpus(torch.cuda.device_count())


def _check_reporters(report_to: str | list[str] | None) -> None:
    from transformers.integrations import get_available_reporting_integrations
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    known = ("none", "all", *INTEGRATION_TO_CALLBACK)
    for name in [report_to] if isinstance(report_to, str) else report_to or []:
        if name not in known:
            raise ValueError(f"report_to={name!r} is unknown; {unknown_value(name, known)}")
        if name in _REPORTERS and name not in get_available_reporting_integrations():
            raise ImportError(f"report_to={name!r} needs the package {name}: pip install {name}")


def _check_precision(config: TrainingConfig) -> None:
    on_cpu = config.trainer.get("use_cpu") or not torch.accelerator.is_available()
    if config.trainer.get("fp16") and on_cpu:
        raise ValueError("fp16=True needs a GPU, and this run uses none. Leave it out, or use bf16 on the CPU.")
    if config.bf16 and not config.trainer.get("use_cpu") and not is_torch_bf16_gpu_available():
        raise ValueError(
            "bf16=True needs a GPU that computes in bfloat16, and there is none. Leave it out, or set use_cpu to "
            "compute in bfloat16 on the CPU."
        )


def _schedule_type(config: TrainingConfig) -> str:
    return config.trainer.get("lr_scheduler_type", _SCHEDULE)


def _schedule(config: TrainingConfig, steps: int) -> dict[str, Any]:
    """Arguments for the learning rate's schedule over this many steps."""

    def counted(given: float) -> int:
        return math.ceil(given * steps) if given < 1 else round(given)

    decays = _schedule_type(config) == _SCHEDULE
    warmup, decay = config.warmup_steps, _DECAY if config.decay_steps is None else config.decay_steps
    # Shares are rounded up, together to more than all steps.
    fits = warmup + decay <= 1 if max(warmup, decay) < 1 else counted(warmup) + counted(decay) <= steps
    if decays and not fits:
        raise ValueError(
            f"warmup_steps={warmup:g} and decay_steps={decay:g} are more than all {steps} steps; lower one of them."
        )
    # The first step of the warm-up has the rate 0, so it mustn't be the only one.
    warmup_steps = min(counted(warmup), steps - 1)
    arguments: dict[str, Any] = {"lr_scheduler_type": _schedule_type(config), "warmup_steps": warmup_steps}
    if decays:
        decay_steps = min(counted(decay), steps - warmup_steps)
        shape = {"num_decay_steps": decay_steps, "warmup_type": "linear", "decay_type": "linear"}
        arguments["lr_scheduler_kwargs"] = {**shape, **(config.trainer.get("lr_scheduler_kwargs") or {})}
    return arguments


def _accumulation(config: TrainingConfig) -> int:
    """Batches per update of each process."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    per_device = config.trainer.get("per_device_train_batch_size", 1)
    check_count("per_device_train_batch_size", per_device)
    accumulation, rest = divmod(config.sequences_per_update, per_device * processes)
    if rest:
        raise ValueError(
            f"sequences_per_update={config.sequences_per_update} must be a multiple of {per_device * processes}: "
            f"{processes} processes, each with {per_device} sequences (per_device_train_batch_size). Change one of "
            "them."
        )
    return accumulation


def training_arguments(config: TrainingConfig, steps: int) -> TrainingArguments:
    """`TrainingArguments` of a run.

    Args:
        config: settings of the run.
        steps: number of optimizer steps.

    Raises:
        ValueError: if Transformers refuses them, or the schedule or the batches don't fit.
    """
    from transformers import TrainingArguments

    use_bf16 = config.bf16
    if use_bf16 is None:
        use_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported() and not config.trainer.get("fp16")
    arguments: dict[str, Any] = {**_DEFAULTS, "disable_tqdm": not sys.stderr.isatty()}
    if config.trainer.get("push_to_hub"):
        arguments["hub_model_id"] = Path(config.output).name  # rather than the name of the folder of checkpoints
    arguments |= config.trainer
    arguments |= {
        "report_to": config.trainer.get("report_to") or "none",
        "output_dir": str(config.checkpoint_folder),
        "max_steps": steps,
        "gradient_accumulation_steps": _accumulation(config),
        "bf16": use_bf16,
        "seed": config.seed,
        **_schedule(config, steps),
    }
    try:
        return TrainingArguments(**arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"Transformers' TrainingArguments refuse the settings: {one_line(error)}") from error
