# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""`CasaTrainer`: Transformers' Trainer with two learning rates and evaluation by generated answers.

CASA models also train in the plain `Trainer` and in TRL's `SFTTrainer`; this adds what they have no argument for.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import EvalLoopOutput, TrainOutput, get_last_checkpoint, has_length

from .checkpoints import last_checkpoint, warn_of_skipped
from .collator import CasaDataCollator
from .evaluation import exact_match, generate_answers
from .parameters import parameter_groups
from .publishing import PublishingTrainer
from .refusals import TOKEN_IS_SAVED, refuse_several_gpus
from .samples import IGNORED, Dialogue

logger = logging.getLogger(__name__)


class CasaTrainer(PublishingTrainer):
    """Trainer of CASA models.

    Args:
        *args, **kwargs: arguments of `Trainer`. `processing_class` is the model's `CasaProcessor`. Datasets hold
            conversations (see `casa_hf.training.Dialogue.of`), or rows of them (`PackedDataset`), or are iterables of
            these. If the `data_collator` has another processor, that one makes the inputs of training and evaluation,
            and `processing_class`, by default the same, is saved.
        lr_new, lr_existing: learning rates; see `parameter_groups`. `weight_decay` is that of the arguments.
        generate: arguments of `generate` with which evaluation asks the model for the last answer of each conversation
            of the evaluation dataset; None for the loss alone.
        score: function of answers and references that returns metrics by name, logged beside the loss.

    Raises:
        ValueError: if the arguments hold a token, which the Trainer would publish with them; if the repository to push
            to holds another model; if there is neither a processor nor a collator; and if one process would train on
            several GPUs.
    """

    _resumed: TrainerState | None = None
    _has_length = True
    _loss_is_finite: torch.Tensor | None = None
    _num_eval_batches: dict[str, int]
    _config_before: dict[str, Any] | None = None
    eval_dataset: Any
    optimizer: torch.optim.Optimizer | None
    compute_loss_func: Callable[..., torch.Tensor] | None
    _signature_columns: list[str] | None

    def __init__(
        self,
        *args: Any,
        lr_new: float = 1e-4,
        lr_existing: float = 1e-5,
        generate: Mapping[str, Any] | None = None,
        score: Callable[[Sequence[str], Sequence[str]], dict[str, float]] = exact_match,
        **kwargs: Any,
    ):
        given = inspect.signature(Trainer.__init__).bind_partial(self, *args, **kwargs).arguments
        del given["self"]
        collator, processor = given.get("data_collator"), given.get("processing_class")
        if collator is None:
            if processor is None:
                raise ValueError("CasaTrainer has no processor; pass the model's as processing_class=processor.")
            given["data_collator"] = CasaDataCollator(processor)
        elif processor is None and isinstance(collator, CasaDataCollator):
            given["processing_class"] = collator.processor
        if getattr(given.get("args"), "hub_token", None) is not None:
            raise ValueError(f"hub_token {TOKEN_IS_SAVED}")
        self._remember_config(given.get("model"))
        super().__init__(**given)
        config, before = getattr(self.model, "config", None), self._config_before or {}
        if config is not None and vars(config).pop("use_cache", None) is not None and "use_cache" in before:
            # The Trainer switches it off, also for those who generate with what is saved; `compute_loss` does without.
            config.use_cache = before["use_cache"]
        if self.accelerator.device.type in ("cpu", "mps"):
            self.args.dataloader_pin_memory = False  # there it does nothing but warn
        self.lr_new, self.lr_existing = lr_new, lr_existing
        self.generate_kwargs, self.score = generate, score
        self._num_eval_batches = {}
        if self.label_smoother is not None and self.compute_loss_func is None:
            self.compute_loss_func = self._smoothed_loss

    def create_accelerator_and_postprocess(self) -> None:
        """As in Transformers, which calls it first, and again for each trial of a search; batches aren't split."""
        if self.model is not None:  # else `model_init` makes it later
            self._refuse_several_gpus(self.model)
        super().create_accelerator_and_postprocess()
        # Else one process would read batches of an iterable, and split them for all by rows, pixels too.
        self.accelerator.dataloader_config.dispatch_batches = False

    def call_model_init(self, *args: Any, **kwargs: Any) -> Any:
        """As in Transformers; several GPUs are refused unless the model is spread over them."""
        model = super().call_model_init(*args, **kwargs)
        self._refuse_several_gpus(model)
        self._remember_config(model)
        return model

    def _refuse_several_gpus(self, model: Any) -> None:
        placed = (getattr(model, "hf_device_map", None) or {}).values()
        elsewhere = {torch.device(place) for place in placed if place not in ("cpu", "disk")} - {self.args.device}
        if not elsewhere:  # else layers are on several GPUs, as the Trainer sees it, and batches stay whole
            refuse_several_gpus(self.args.n_gpu)

    def _remember_config(self, model: Any) -> None:
        config = getattr(model, "config", None)
        self._config_before = None if config is None else dict(vars(config))

    def _smoothed_loss(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        """The loss with `label_smoothing_factor`; the base class shifts labels for causal models of its own list only,
        and would have this one learn to repeat each token."""
        mean = self.label_smoother(outputs, labels, shift_labels=True)
        if num_items_in_batch is None:
            return mean
        return mean * (labels[:, 1:] != IGNORED).sum() / num_items_in_batch

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As in Transformers; from a checkpoint of a finished run no step is taken, and a warning says so.

        Args:
            resume_from_checkpoint: folder of a checkpoint, or True for the last complete one in the output folder; a
                warning names those that are skipped.
            *args, **kwargs: further arguments of Transformers.

        Raises:
            FloatingPointError: if a loss, gradient norm, weight or evaluation loss isn't finite. The weights stay as
                they were before that step, and nothing is saved.
        """
        if resume_from_checkpoint is True and not self.args.save_only_model:
            resume_from_checkpoint = self._last_checkpoint() or True
        is_last = resume_from_checkpoint is True
        folder: Any = get_last_checkpoint(self.args.output_dir) if is_last else resume_from_checkpoint
        state = Path(folder) / TRAINER_STATE_NAME if folder else None
        is_there = state is not None and state.is_file()
        self._resumed = TrainerState.load_from_json(str(state)) if is_there else None
        self._loss_is_finite = None
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _last_checkpoint(self) -> str | None:
        last, skipped = last_checkpoint(Path(self.args.output_dir))
        if self.is_world_process_zero():
            warn_of_skipped(last, skipped)
        return None if last is None else str(last)

    def set_initial_training_values(self, args: TrainingArguments, dataloader: Any, *rest: Any) -> tuple[Any, ...]:
        """As in Transformers; with no pass over the data if all steps are done, which it sees only after one more."""
        self._has_length = has_length(dataloader)
        values = super().set_initial_training_values(args, dataloader, *rest)
        max_steps = values[-1]
        if self._resumed is None or self._resumed.global_step < max_steps:
            return values
        if self.is_world_process_zero():
            logger.warning(
                "The checkpoint has %d of %d steps, so this run is finished and nothing is trained. Raise "
                "max_steps or num_train_epochs to continue, or start from its weights.",
                self._resumed.global_step,
                max_steps,
            )
        return (0, *values[1:])

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """As in Transformers, which takes data without a length for a single pass, so that a run that is resumed in a
        later one would begin with data that were due in another."""
        passes, batches = super()._init_training_state(*args, **kwargs)
        if self._resumed is None or self._has_length or self._resumed.epoch is None:
            return passes, batches
        # The state counts passes and, as part of as many batches as the whole run has, those of the current one.
        passes = max(math.ceil(self._resumed.epoch) - 1, 0)
        part = (self._resumed.epoch - passes) * self._resumed.max_steps * self.args.gradient_accumulation_steps
        return passes, 0 if self.args.ignore_data_skip else round(part)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As in Transformers; with the learning rates that the schedule has now, if the run has been made longer."""
        super()._load_optimizer_and_scheduler(checkpoint)
        schedule = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)  # Accelerate may have wrapped it
        if checkpoint is None or not isinstance(schedule, LambdaLR) or self.is_deepspeed_enabled:
            return
        rates = [
            rate * share(schedule.last_epoch)
            for rate, share in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
        ]
        for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        schedule._last_lr = rates

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As in Transformers; whether losses are finite is remembered until the gradients are complete."""
        loss = super().training_step(*args, **kwargs)
        is_finite = loss.isfinite().all()
        self._loss_is_finite = is_finite if self._loss_is_finite is None else self._loss_is_finite & is_finite
        return loss

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        """As in Transformers, before each step of the optimizer.

        Raises:
            FloatingPointError: if the norm, or a loss since the last step, isn't finite.
        """
        norm = super()._get_grad_norm(*args, **kwargs)
        loss_is_finite, self._loss_is_finite = self._loss_is_finite, None
        if loss_is_finite is not None and not loss_is_finite:
            raise FloatingPointError(self._diverged("The loss"))
        # With float16, steps with such gradients are left out, and the scale of the loss is lowered.
        if norm is not None and not math.isfinite(norm) and self.accelerator.scaler is None:
            raise FloatingPointError(self._diverged("The norm of the gradients"))
        return norm

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in Transformers, for checkpoints too.

        Raises:
            FloatingPointError: if weights that are trained aren't finite; nothing is written then.
        """
        for parameter in self.model.parameters():
            # Sharded, it is this process's part.
            part = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            if part.requires_grad and not part.isfinite().all():
                raise FloatingPointError(self._diverged("A weight"))
        super().save_model(output_dir, _internal_call)

    def _diverged(self, what: str) -> str:
        last, _ = last_checkpoint(Path(self.args.output_dir))
        steps = f"{self.state.global_step} of {self.state.max_steps} steps"
        way = "There is no checkpoint with finite weights" if last is None else f"The last finite checkpoint is {last}"
        return (
            f"{what} is not finite (nan or inf) after {steps}, so the run is stopped and nothing is saved. {way}; "
            "lower the learning rates."
        )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer that the arguments name, with the groups of `parameter_groups`."""
        if self.optimizer is None:
            model = self.model if model is None else model
            optimizer, kwargs = self.get_optimizer_cls_and_kwargs(self.args, model)
            groups = parameter_groups(model, self.lr_new, self.lr_existing, self.args.weight_decay)
            self.optimizer = optimizer(groups, **kwargs)
        return self.optimizer

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        """The model's loss; without a cache, which it would fill for nothing, and without logits that nobody reads."""
        inputs = {**inputs, "use_cache": False} | ({} if return_outputs else self._loss_alone(inputs))
        return super().compute_loss(model, inputs, return_outputs, *args, **kwargs)

    def _loss_alone(self, inputs: Mapping[str, Any]) -> dict[str, bool]:
        """What asks the model for its own loss without logits, if that is the loss and there are labels."""
        is_its_own = self.label_smoother is None and self.compute_loss_func is None
        return {"skip_logits": True} if is_its_own and inputs.get("labels") is not None else {}

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """As in Transformers; an iterable is read into memory if need be, see `_at_hand`."""
        if isinstance(eval_dataset, str):  # that of several in a mapping
            self.eval_dataset = {**self.eval_dataset, eval_dataset: self._at_hand(self.eval_dataset[eval_dataset])}
        elif eval_dataset is None and not isinstance(self.eval_dataset, dict):
            self.eval_dataset = self._at_hand(self.eval_dataset)
        return super().get_eval_dataloader(self._at_hand(eval_dataset))

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """As in Transformers; an iterable is read into memory if need be, see `_at_hand`."""
        return super().get_test_dataloader(self._at_hand(test_dataset))

    def _at_hand(self, dataset: Any) -> Any:
        """The dataset, as a list if it is an iterable and the work is shared by index.

        Of an iterable, each of several processes would see its own part only, in which the last batches differ in
        number, or repeat rows of the first ones.
        """
        is_shared = self.generate_kwargs is not None or self.accelerator.num_processes > 1
        is_iterable = isinstance(dataset, IterableDataset) or not has_length(dataset)
        return list(dataset) if dataset is not None and is_shared and is_iterable else dataset

    def evaluation_loop(
        self, dataloader: Any, description: str, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """The loss, a mean over all answer tokens whatever the batches, and the score of generated answers.

        Raises:
            FloatingPointError: if the loss isn't finite while the model trains.
        """
        self._evaluated = torch.zeros(2, dtype=torch.float64)
        output = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        total, tokens = self._evaluated.tolist()
        if tokens:
            output.metrics[f"{metric_key_prefix}_loss"] = total / tokens
            if self.is_in_train and not math.isfinite(total):
                raise FloatingPointError(self._diverged("The loss of the evaluation"))
        conversations = getattr(dataloader.dataset, "num_conversations", output.num_samples)
        if self.generate_kwargs is not None:
            answers, references = self._answers(_examples(dataloader.dataset))
            conversations = len(answers)
            scores = self.score(answers, references)
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in scores.items()})
        num_batches = math.ceil(output.num_samples / (self.args.eval_batch_size * self.args.world_size))
        self._num_eval_batches = {metric_key_prefix: num_batches}
        return output._replace(num_samples=conversations)  # of which the Trainer makes samples per second

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As in Transformers; the steps of an evaluation are batches, though its samples are conversations."""
        for prefix, number in self._num_eval_batches.items():
            if logs.get(f"{prefix}_runtime"):
                logs[f"{prefix}_steps_per_second"] = round(number / logs[f"{prefix}_runtime"], 3)
        self._num_eval_batches = {}
        super().log(logs, *args, **kwargs)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor | None, Any, Any]:
        """As in Transformers, which takes the mean of the batches' means; this sums up losses and answer tokens."""
        if prediction_loss_only:
            inputs = {**inputs, **self._loss_alone(inputs)}
        found = super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)
        loss, labels = found[0], inputs.get("labels")
        if loss is not None and labels is not None:
            tokens = (labels[:, 1:] != IGNORED).sum()
            # By rows, since those that a process was given twice to fill its last batch are left out again.
            total = torch.where(tokens > 0, loss * tokens, 0)  # without any, the mean is nan
            parts = torch.stack([total, tokens]).float().expand(len(labels), 2) / len(labels)
            gathered = self.accelerator.gather_for_metrics(parts.contiguous())
            self._evaluated += gathered.sum(0).cpu()
        return found

    def _answers(self, examples: list[Mapping[str, Any]]) -> tuple[list[str], list[str]]:
        """Answers and references; processes share the work equally, since a sharded model needs all of them."""
        from accelerate.utils import gather_object

        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        mine = list(range(rank, len(examples), processes))
        while len(mine) < -(-len(examples) // processes):
            mine.append(0)
        processor: Any = getattr(self.data_collator, "processor", self.processing_class)
        answers = generate_answers(
            self.accelerator.unwrap_model(self.model),
            processor,
            [examples[index] for index in mine],
            batch_size=self.args.eval_batch_size,
            **{"synced_gpus": processes > 1, **(self.generate_kwargs or {})},
        )
        by_index = dict(gather_object(list(zip(mine, answers, strict=True))))
        references = [Dialogue.of(example).question()[1] for example in examples]
        return [by_index[index] for index in range(len(examples))], references

    def _set_signature_columns_if_needed(self) -> None:
        # What the collator reads; the Trainer would drop columns that the model's forward doesn't name.
        super()._set_signature_columns_if_needed()
        self._signature_columns = [*(self._signature_columns or []), "messages", "images", "image", "videos", "video"]


def _examples(dataset: Any) -> list[Mapping[str, Any]]:
    """The conversations of a dataset, packed or not."""
    features = [dataset[index] for index in range(len(dataset))]
    return [example for feature in features for example in ([feature] if isinstance(feature, Mapping) else feature)]
