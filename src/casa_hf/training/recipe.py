# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""A whole training run from one configuration, with the paper's recipe as defaults."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..checkpoint_files.config import read_casa_config
from ..checkpoint_files.disk import disk_is_full
from ..checkpoint_files.download import SMALL_FILES, WEIGHT_FILES, download, hub_id
from ..checks import counted, one_line
from ..modeling_casa import CasaForConditionalGeneration
from ..processing_casa import CasaProcessor
from .adapters import add_adapters, lora_arguments
from .arguments import check_arguments, is_first_process, training_arguments
from .checkpoints import last_checkpoint
from .collator import CasaDataCollator, PackedDataset
from .config import TrainingConfig
from .data import load_mixture
from .parameters import Part, checkpoint_activations, freeze, trainable_parts
from .results import copy_kept, save_trained, write_metrics
from .resuming import check_folders, check_settings, run_settings, write_settings

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from .trainer import CasaTrainer

logger = logging.getLogger(__name__)

OnLog = Callable[[dict[str, float]], None]


@dataclass(frozen=True)
class TrainingReport:
    """What a run has done.

    Attributes:
        output: folder with the result.
        parts: trained parameters, by part of the model.
        steps: number of optimizer steps in all.
        sequences: number of packed sequences in the training data.
        dropped: number of conversations left out for their length.
        metrics: metrics of the training and, with evaluation data, of the last evaluation.
    """

    output: Path
    parts: list[Part]
    steps: int
    sequences: int
    dropped: int
    metrics: dict[str, float]


def train(
    config: TrainingConfig,
    on_log: OnLog | None = None,
    on_start: Callable[[list[Part], PackedDataset], None] | None = None,
) -> TrainingReport:
    """Train a CASA model.

    One process per device, as `accelerate launch` or `torchrun` start them; all call this. The trained model is saved
    before it is evaluated or published; errors from then on have a note of where it is.

    Args:
        config: settings of the run.
        on_log: function that receives losses, rates and metrics as they come, in the first process.
        on_start: function that receives what trains and the training data before the first step, in the first process.

    Raises:
        ValueError: if settings or data don't fit; before anything is computed or written.
        ImportError: if Accelerate isn't installed, or PEFT where `lora` needs it, or what `report_to` names.
        FloatingPointError: if losses, gradients or weights are no longer finite; see `CasaTrainer.train`.
        InterruptedError: if the process was told to end and `enable_jit_checkpoint` has written a checkpoint.
    """
    _check_packages(config)
    from .progress import shown_progress

    run = _prepare(config)
    model = _load_model(config, run)
    parts = trainable_parts(model)
    trainer = _make_trainer(config, run, model)
    if on_start is not None and trainer.is_world_process_zero():
        on_start(parts, run.data)
    with shown_progress(trainer, on_log):
        with _explained(run):
            metrics = _fit(trainer, run)
        with _noted(f"The model is trained and saved in {run.output}."):
            metrics = _evaluate(trainer, run, metrics)
            if run.arguments.push_to_hub:
                trainer.push_to_hub()
    steps, sequences, dropped = trainer.state.global_step, len(run.data), run.data.num_dropped
    return TrainingReport(run.output, parts, steps, sequences, dropped, metrics)


# ---------------------------------------------------------------- before anything is computed or written


@dataclass(frozen=True)
class _Run:
    """What a run trains on, after all checks.

    Attributes:
        output: folder to create.
        checkpoints: folder of checkpoints.
        resumed: checkpoint to resume from; None to start from scratch.
        repository: Hub id of the model; None for a folder.
        folder: folder of the model's files; of a repository, without weights yet.
        processor: processor of the training and evaluation data.
        saved_processor: processor that is saved with the model.
        data, eval_data: packed conversations.
        settings: settings that mustn't change when the run is resumed.
        arguments: arguments of the Trainer.
    """

    output: Path
    checkpoints: Path
    resumed: Path | None
    repository: str | None
    folder: Path
    processor: CasaProcessor
    saved_processor: CasaProcessor
    data: PackedDataset
    eval_data: PackedDataset | None
    settings: dict[str, Any]
    arguments: TrainingArguments


def _check_packages(config: TrainingConfig) -> None:
    for package, needed in (("accelerate", True), ("peft", config.lora is not None)):
        if needed and find_spec(package) is None:
            raise ImportError(f'Training needs the package {package}: pip install "casa_hf[train]".')


def _prepare(config: TrainingConfig) -> _Run:
    """Check everything that can be checked without the weights, the cheap things first."""
    check_arguments(config)
    if config.lora is not None:
        lora_arguments(config.lora)
    training_arguments(config, config.max_steps or sys.maxsize)  # what Transformers refuses, before the data are read
    output, checkpoints = Path(config.output), config.checkpoint_folder
    resumed = check_folders(output, checkpoints, config.resume)
    repository = hub_id(config.model, revision=None)
    folder = Path(config.model) if repository is None else download(repository, None, SMALL_FILES)
    read_casa_config(folder, config.model)  # what isn't converted has no fusion layers to train
    processor, saved_processor = _load_processors(config, folder)
    data, eval_data = _load_data(config, processor)
    steps = _num_steps(config, data)
    settings = run_settings(config, data, steps)
    if resumed is not None:
        check_settings(settings, checkpoints, resumed)
    return _Run(
        output=output,
        checkpoints=checkpoints,
        resumed=resumed,
        repository=repository,
        folder=folder,
        processor=processor,
        saved_processor=saved_processor,
        data=data,
        eval_data=eval_data,
        settings=settings,
        arguments=training_arguments(config, steps),
    )


def _load_processors(config: TrainingConfig, folder: Path) -> tuple[CasaProcessor, CasaProcessor]:
    """The processor of this run's data, and the one to save."""
    names = ("max_pixels", "frame_max_pixels", "frames_per_image")
    settings: dict[str, Any] = {name: value for name in names if (value := getattr(config, name)) is not None}
    processor = CasaProcessor.from_pretrained(folder, media_policy=config.media_policy, **settings)
    if config.keep_limits or not settings.keys() & {"max_pixels", "frame_max_pixels"}:
        return processor, processor
    # How frames share images is what the model has learned, unlike the limits.
    learned = {name: value for name, value in settings.items() if name == "frames_per_image"}
    return processor, CasaProcessor.from_pretrained(folder, **learned)


def _load_data(config: TrainingConfig, processor: CasaProcessor) -> tuple[PackedDataset, PackedDataset | None]:
    """Training and evaluation data, packed."""
    data = _pack(config, processor, load_mixture(config.data, config.split, config.seed))
    if len(data) < config.sequences_per_update and is_first_process():
        logger.warning(
            "The data has only %s, which is what each step has rather than sequences_per_update=%d.",
            counted(len(data), "packed sequence"),
            config.sequences_per_update,
        )
    if config.eval_data is None:
        return data, None
    examples = load_mixture(config.eval_data, config.eval_split, config.seed, default_split="validation")
    eval_data = _pack(config, processor, examples)
    if eval_data.num_dropped and is_first_process():
        logger.warning(
            "%d of %d conversations of eval_data are dropped as too long.", eval_data.num_dropped, len(examples)
        )
    return data, eval_data


def _pack(config: TrainingConfig, processor: CasaProcessor, examples: Sequence[Mapping[str, Any]]) -> PackedDataset:
    return PackedDataset(
        examples,
        processor,
        max_text_tokens=config.max_text_tokens,
        max_image_tokens=config.max_image_tokens,
        over_long=config.over_long,
    )


def _num_steps(config: TrainingConfig, data: PackedDataset) -> int:
    if config.num_train_epochs is None:
        assert config.max_steps is not None
        return config.max_steps
    return math.ceil(config.num_train_epochs * math.ceil(len(data) / config.sequences_per_update))


# ---------------------------------------------------------------- the run


def _load_model(config: TrainingConfig, run: _Run) -> Any:
    """The model with the parameters that train, or adapters."""
    if run.repository is not None:
        download(run.repository, run.folder.name, WEIGHT_FILES)
    model: Any = CasaForConditionalGeneration.from_pretrained(
        run.folder, dtype=getattr(torch, config.dtype), attn_implementation=config.attn_implementation
    )
    # Adapters and model cards refer to the model by this: not to a folder in this machine's cache.
    model.name_or_path = model.config.name_or_path = str(config.model)
    if config.lora is None:
        freeze(model, config.trainable or model.config.backbone.recipe)
    else:
        torch.manual_seed(config.seed)
        model = add_adapters(model, config.lora)
    if config.gradient_checkpointing:
        checkpoint_activations(model)
    return model


def _make_trainer(config: TrainingConfig, run: _Run, model: Any) -> CasaTrainer:
    from .trainer import CasaTrainer

    return CasaTrainer(
        model=model,
        args=run.arguments,
        train_dataset=run.data,
        eval_dataset=run.eval_data,
        processing_class=run.saved_processor,
        data_collator=CasaDataCollator(run.processor),
        lr_new=config.lr_new,
        lr_existing=config.lr_existing,
        generate=config.generate,
    )


def _fit(trainer: CasaTrainer, run: _Run) -> dict[str, float]:
    """Train and save; returns the metrics."""
    if trainer.is_world_process_zero():
        write_settings(run.settings, run.checkpoints)
        if run.arguments.push_to_hub:
            copy_kept(run.folder, run.checkpoints)  # the folder that the Trainer publishes
    resumed = None if run.resumed is None else str(run.resumed)
    metrics = dict(trainer.train(resume_from_checkpoint=resumed).metrics)
    if trainer.state.global_step < run.arguments.max_steps:  # as `enable_jit_checkpoint` has it end
        raise InterruptedError(_stopped(trainer.state.global_step, run))
    save_trained(trainer, run.output, run.folder, metrics)
    return metrics


def _evaluate(trainer: CasaTrainer, run: _Run, metrics: dict[str, float]) -> dict[str, float]:
    """Evaluate the trained model; returns these metrics beside the others, and writes all of them."""
    if run.eval_data is None:
        return metrics
    metrics = metrics | trainer.evaluate()
    if not math.isfinite(metrics["eval_loss"]):
        raise FloatingPointError(
            f"eval_loss={metrics['eval_loss']}; expected a finite number. Lower lr_new and lr_existing, or check "
            "eval_data."
        )
    if trainer.is_world_process_zero():
        write_metrics(trainer, run.output, metrics)
    return metrics


# ---------------------------------------------------------------- what ends it early


@contextmanager
def _explained(run: _Run) -> Iterator[None]:
    """Say what a full disk leaves, and which example a process that loads data couldn't use."""
    try:
        yield
    except Exception as error:  # those who write tensors have kinds of their own
        if disk_is_full(error):
            raise OSError(_full_disk(error, run.checkpoints)) from error
        # Torch puts the traceback of a process that loads data into its message.
        name = type(error).__name__
        if isinstance(error, ValueError) and str(error).startswith(f"Caught {name} in DataLoader worker"):
            raise ValueError(str(error).rpartition(f"\n{name}: ")[2].strip()) from error
        raise


@contextmanager
def _noted(note: str) -> Iterator[None]:
    """Add a note to errors."""
    try:
        yield
    except Exception as error:
        error.add_note(note)
        raise


def _full_disk(error: Exception, checkpoints: Path) -> str:
    last, _ = last_checkpoint(checkpoints)
    if last is None:
        found, way = f"No checkpoint in {checkpoints}", "start from scratch"
    else:
        found, way = f"{last.name} in {checkpoints}", "continue from it"
    return (
        f"The disk is full or has too little room ({one_line(error)}). {found} is complete; free some space, and set "
        f"resume (--resume) to {way}."
    )


def _stopped(step: int, run: _Run) -> str:
    last, _ = last_checkpoint(run.checkpoints, reads_all=False)
    way = "There is no checkpoint" if last is None else f"Set resume (--resume) to continue from {last}"
    return f"The training was stopped from outside after {step} of {run.arguments.max_steps} steps. {way}."
