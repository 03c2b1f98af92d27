# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""A whole training run from one configuration, with the paper's recipe as defaults."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..checkpoint_files.destination import move_finished
from ..checkpoint_files.download import SMALL_FILES, WEIGHT_FILES, download, hub_id
from ..checkpoint_files.errors import disk_is_full, one_line
from ..configuration_casa import CasaConfig
from ..folder_files import own_file, read_json
from ..modeling_casa import CasaForConditionalGeneration
from ..processing_casa import CasaProcessor
from .arguments import check_arguments, is_first_process, lora_arguments, training_arguments
from .checkpoints import NO_OPTIMIZER, STATE, last_checkpoint, warn_of_skipped
from .collator import CasaDataCollator, PackedDataset
from .config import TrainingConfig
from .data import load_mixture
from .parameters import LORA_TARGETS, Part, checkpoint_activations, freeze, trainable_parts

logger = logging.getLogger(__name__)

# Beside the weights: what a conversion back needs, and under which terms they stand.
_KEPT_FILES = ("source_*", "LICENSE*", "NOTICE*")
# What may be another when a run goes on. Of the data it counts what was made of it, and a run can be made longer.
_FREE_TO_CHANGE = {
    *("data", "split", "output", "checkpoints", "resume", "keep_limits", "trainer", "max_steps", "num_train_epochs"),
    *("eval_data", "eval_split", "generate", "gradient_checkpointing", "attn_implementation", "media_policy"),
}
# Of further arguments, what may not.
_KEPT_ARGUMENTS = (
    *("weight_decay", "optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
    *("lr_scheduler_type", "lr_scheduler_kwargs", "label_smoothing_factor", "neftune_noise_alpha"),
    *("fp16", "data_seed"),
)
# In the folder of checkpoints; the Trainer publishes nothing whose name begins so.
_SETTINGS = "_settings.json"


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

    check_arguments(config)
    training_arguments(config, config.max_steps or sys.maxsize)  # what Transformers refuses, before the data are read
    output, checkpoints = Path(config.output), config.checkpoint_folder
    resumed = _check_folders(output, checkpoints, config.resume)
    repository = hub_id(config.model, revision=None)
    folder = Path(config.model) if repository is None else download(repository, None, SMALL_FILES)
    _check_model(config.model, folder)
    limits = {"max_pixels": config.max_pixels, "frame_max_pixels": config.frame_max_pixels}
    limits = {name: limit for name, limit in limits.items() if limit is not None}
    processor = CasaProcessor.from_pretrained(folder, media_policy=config.media_policy, **limits)
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
    arguments = training_arguments(config, steps)

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
    try:
        before = read_json(file) if file.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{error} Remove the file to resume without comparing the settings.") from error
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


def _pack(config: TrainingConfig, processor: CasaProcessor, examples: Sequence[Mapping[str, Any]]) -> PackedDataset:
    return PackedDataset(
        examples,
        processor,
        max_text_tokens=config.max_text_tokens,
        max_image_tokens=config.max_image_tokens,
        over_long=config.over_long,
    )


def _with_adapters(model: Any, settings: dict[str, Any]) -> Any:
    from peft import LoraConfig, get_peft_model

    settings = lora_arguments(settings)
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
