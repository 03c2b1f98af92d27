# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""From the settings of a run to the arguments of the libraries that it uses."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import torch
from transformers.utils import is_torch_bf16_gpu_available

from ..checkpoint_files.errors import one_line
from ..checkpoint_files.hub_client import hub_token
from ..checks import check_count
from .config import TrainingConfig
from .refusals import TOKEN_IS_SAVED, refuse_several_gpus
from .settings import check_name, typed

_SCHEDULE = "warmup_stable_decay"
_DECAY = 0.1

# Where `report_to` sends metrics -> the package that does it.
_REPORTERS = {
    **{name: name for name in ("tensorboard", "wandb", "trackio", "mlflow", "clearml", "codecarbon", "swanlab")},
    "comet_ml": "comet-ml",
}


def is_first_process() -> bool:
    """Whether this is the one of several processes that speaks and publishes."""
    return not int(os.environ.get("RANK", 0))


def check_arguments(config: TrainingConfig) -> None:
    """Refuse arguments for other libraries that these would refuse late, or take in part.

    Raises:
        ValueError: with the name of the setting.
        ImportError: if `report_to` names what isn't installed.
    """
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
        lora_arguments(config.lora)
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


def lora_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of PEFT's `LoraConfig`, typed.

    Raises:
        ValueError: for one that it doesn't have, or of the wrong type.
    """
    from peft import LoraConfig

    hints = get_type_hints(LoraConfig)
    for name in given:
        check_name(name, [f.name for f in fields(LoraConfig)], f"lora.{name} is no argument of PEFT's LoraConfig")
    return {name: typed(f"lora.{name}", value, hints[name] | None) for name, value in given.items()}


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


def training_arguments(config: TrainingConfig, steps: int) -> Any:
    """`TrainingArguments` of a run of this many steps.

    Raises:
        ValueError: if Transformers refuses them, or the schedule or the batches don't fit.
    """
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
        "disable_tqdm": not sys.stderr.isatty(),
        "remove_unused_columns": False,
        "prediction_loss_only": True,
        "ddp_find_unused_parameters": False,
        # Rather than by the folder of checkpoints.
        **({"hub_model_id": Path(config.output).name} if config.trainer.get("push_to_hub") else {}),
        **config.trainer,
        "report_to": config.trainer.get("report_to") or "none",
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
