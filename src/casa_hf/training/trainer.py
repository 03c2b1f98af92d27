# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""`CasaTrainer`: Transformers' Trainer with two learning rates and evaluation by generated answers.

CASA models train in the plain `Trainer` and in TRL's `SFTTrainer` too; this adds what these have no argument for.
"""

from __future__ import annotations

import inspect
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import EvalLoopOutput, HubStrategy, TrainOutput, get_last_checkpoint, has_length

from ..checkpoint_files.errors import PublishingError
from ..configuration_casa import CasaConfig
from ..folder_files import own_file
from ..hub.card import published_card, training_procedure
from ..hub.card_parts import Card, decode_card, union
from ..hub.push import explained
from ..hub.repositories import (
    CARD,
    check_branch_name,
    client,
    new_branch,
    present_card,
    refuse_foreign,
    repository_info,
)
from .checkpoints import last_checkpoint, warn_of_skipped
from .collator import CasaDataCollator
from .evaluation import exact_match, generate_answers
from .parameters import parameter_groups
from .refusals import TOKEN_IS_SAVED, refuse_several_gpus
from .samples import IGNORED, Dialogue

logger = logging.getLogger(__name__)

# Of every card that a Trainer makes.
_TAG = "generated_from_trainer"


class CasaTrainer(Trainer):
    """Trainer of CASA models.

    Args:
        *args, **kwargs: as for `Trainer`; `processing_class` is the model's `CasaProcessor`, and data sets hold
            conversations (see `casa_hf.training.Dialogue.of`), or rows of them (`PackedDataset`), or are iterables of
            these. A `data_collator` with a processor of its own has that one make the pictures, of evaluation too;
            `processing_class` is saved, by default the collator's processor.
        lr_new, lr_existing: learning rates; see `parameter_groups`. `weight_decay` is that of the arguments.
        generate: arguments of `generate` with which evaluation asks the model for the last answer of each conversation
            of the evaluation set; None for the loss alone.
        score: (answers, references) -> metrics by name, logged beside the loss.

    Raises:
        ValueError: if the arguments hold a token, which the Trainer would publish with them; and, when it looks
            for the repository, if that holds another model; if there is neither a processor nor a collator; and if
            one process would train on several GPUs.
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
                raise ValueError("CasaTrainer has no processor. Give it the model's: processing_class=processor.")
            given["data_collator"] = CasaDataCollator(processor)
        elif processor is None and isinstance(collator, CasaDataCollator):
            given["processing_class"] = collator.processor
        if getattr(given.get("args"), "hub_token", None) is not None:
            raise ValueError(f"hub_token: {TOKEN_IS_SAVED}")
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
        """As in Transformers, which comes here first, and anew for each trial of a search; data aren't cut by rows."""
        if self.model is not None:  # else `model_init` makes it later
            self._refuse_several_gpus(self.model)
        super().create_accelerator_and_postprocess()
        # Else one process would read batches of an iterable, and cut them for all by rows, pixels too.
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
            resume_from_checkpoint: a folder, or True for the last complete one of the output folder; a warning names
                those that are skipped.
            *args, **kwargs: as in Transformers.

        Raises:
            FloatingPointError: at the first loss, gradient norm, weight or evaluation loss that isn't finite. The
                weights stay as they were before that step, and nothing is saved.
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
                "max_steps or num_train_epochs to go on, or start from its weights.",
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
        way = "No checkpoint with finite weights is there" if last is None else f"The last finite checkpoint is {last}"
        return (
            f"{what} is not finite (nan or inf) after {steps}, so the run is stopped and nothing is saved. {way}; "
            "start with lower learning rates."
        )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer that the arguments name, with the groups of `parameter_groups`."""
        if self.optimizer is None:
            model = self.model if model is None else model
            optimizer, kwargs = self.get_optimizer_cls_and_kwargs(self.args, model)
            groups = parameter_groups(model, self.lr_new, self.lr_existing, self.args.weight_decay)
            self.optimizer = optimizer(groups, **kwargs)
        return self.optimizer

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The model's loss; without a cache, which it would fill for nothing."""
        return super().compute_loss(model, {**inputs, "use_cache": False}, *args, **kwargs)

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
        """The data set, as a list if it is an iterable and the work is shared by index.

        Of an iterable, each of several processes would see its own part alone, of which the last batches differ in
        number, or have rows of the first ones again.
        """
        is_shared = self.generate_kwargs is not None or self.accelerator.num_processes > 1
        is_iterable = isinstance(dataset, IterableDataset) or not has_length(dataset)
        return list(dataset) if dataset is not None and is_shared and is_iterable else dataset

    def evaluation_loop(
        self, dataloader: Any, description: str, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """The loss, a mean over all answer tokens whatever the batches, and the score of generated answers.

        Raises:
            FloatingPointError: while the model trains, if the loss isn't finite.
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
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor | None, Any, Any]:
        """As in Transformers, which takes the mean of the batches' means; this sums up losses and answer tokens."""
        found = super().prediction_step(model, inputs, *args, **kwargs)
        loss, labels = found[0], inputs.get("labels")
        if loss is not None and labels is not None:
            tokens = (labels[:, 1:] != IGNORED).sum()
            # By rows, since those that a process has been given twice to fill its last batch are cut off again.
            total = torch.where(tokens > 0, loss * tokens, 0)  # without any, the mean is nan
            parts = torch.stack([total, tokens]).float().expand(len(labels), 2) / len(labels)
            gathered = self.accelerator.gather_for_metrics(parts.contiguous())
            self._evaluated += gathered.sum(0).to(self._evaluated)
        return found

    def _answers(self, examples: list[Mapping[str, Any]]) -> tuple[list[str], list[str]]:
        """Answers and references; processes share the work, equally, since a sharded model needs all of them."""
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

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """As in Transformers; what people wrote into the card of the branch it goes to stays, see `create_model_card`.

        A branch that doesn't exist is made, and removed if the push is refused.
        """
        # The base class waits for it between making the card and sending it, which is time for edits.
        self._finish_current_push()
        if self.hub_model_id is None:
            private = args[0] if args else kwargs.get("private")  # from Transformers 5.24 on
            self.init_hf_repo(token, revision=revision, **({} if private is None else {"private": private}))
        # It hands on what it doesn't know itself to `create_model_card`.
        kwargs |= {"hub_token": token, "hub_revision": revision}
        with self._branch(token, revision):
            return super().push_to_hub(commit_message, blocking, token, revision, *args, **kwargs)

    @contextmanager
    def _branch(self, token: str | None = None, revision: str | None = None) -> Iterator[None]:
        """Where a push goes, made if need be: the base class would fail without it, at the end of the training.

        The base class sends all that is in the output folder; a link there that leads elsewhere is refused.
        """
        revision = self.args.hub_revision if revision is None else revision
        if self.is_world_process_zero():
            folder = Path(self.args.output_dir)
            for file in folder.rglob("*"):
                own_file(folder, file.relative_to(folder), PublishingError)
        if revision is None or not self.is_world_process_zero():
            yield
            return
        api = client(self.args.hub_token if token is None else token)
        info, is_new = repository_info(api, self.hub_model_id, revision)
        with new_branch(api, self.hub_model_id, revision, str(info.sha)) if is_new else nullcontext():
            yield

    def init_hf_repo(self, token: str | None = None, *args: Any, revision: str | None = None, **kwargs: Any) -> None:
        """As in Transformers, before the training: what would have the push refused after it ends it here.

        Raises:
            PublishingError: if the token is unusable, the Hub can't be asked, doesn't accept the token, or doesn't let
                it write there; if the repository holds another model; or if a card, there or in the output folder,
                can't be read.
        """
        name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        if not self.is_world_process_zero():
            return super().init_hf_repo(token, *args, **kwargs)
        file = Path(self.args.output_dir) / CARD  # the base class reads it for its own
        if file.is_file():
            Card.read(decode_card(file.read_bytes(), str(file)), str(file))
        revision = self.args.hub_revision if revision is None else revision
        check_branch_name(revision)
        api = client(self.args.hub_token if token is None else token)
        with explained(name, f"Preparing {name}"):
            super().init_hf_repo(token, *args, **kwargs)
            info, _ = repository_info(api, self.hub_model_id, revision)
            refuse_foreign(api, self.hub_model_id, info, suits_adapters=hasattr(self.model, "peft_config"))
            present_card(api, self.hub_model_id, info)

    def create_model_card(
        self, *args: Any, hub_token: str | None = None, hub_revision: str | None = None, **kwargs: Any
    ) -> None:
        """As in Transformers; where it goes to the Hub, with what the card of a CASA checkpoint says.

        Transformers' card is about this run alone and takes the place of the repository's one, also of what somebody
        wrote there. Here the run's procedure and results go into our part of that card.

        Args:
            *args, **kwargs: as in Transformers.
            hub_token, hub_revision: token, and branch of the repository whose card counts; None for those of the
                training arguments.
        """
        super().create_model_card(*args, **kwargs)
        config = getattr(self.model, "config", None)
        if self.hub_model_id is None or not self.is_world_process_zero() or not isinstance(config, CasaConfig):
            return
        file = Path(self.args.output_dir) / CARD
        card = Card.read(file.read_text("utf-8"), CARD)
        card.data["tags"] = union(card.data.get("tags"), [_TAG])  # PEFT replaces those of the Trainer
        _drop_folder(card, config.name_or_path)
        procedure, card.text = training_procedure(card.text), ""
        api = client(self.args.hub_token if hub_token is None else hub_token)
        revision = self.args.hub_revision if hub_revision is None else hub_revision
        info, _ = repository_info(api, self.hub_model_id, revision)
        readme = published_card(
            card.write(),
            config,
            self.hub_model_id,
            revision=revision,
            present=present_card(api, self.hub_model_id, info),
            procedure=procedure,
            needs_origin=False,
        )
        file.write_text(readme, "utf-8")

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As in Transformers, without the model card that an earlier push has left in the output folder.

        The whole folder goes to the Hub, and that card would undo what has been written there since. The push at the
        end of the run makes a new one. A README.md that somebody has written stays, and goes to the Hub.
        """
        file = Path(self.args.output_dir) / CARD
        sends = self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END
        if sends and file.is_file() and f"\n- {_TAG}\n" in file.read_text("utf-8", "replace"):
            file.unlink()
        with self._branch() if sends else nullcontext():
            super()._push_from_checkpoint(checkpoint_folder)

    def _set_signature_columns_if_needed(self) -> None:
        # What the collator reads; the Trainer would drop columns that the model's forward doesn't name.
        super()._set_signature_columns_if_needed()
        self._signature_columns = [*(self._signature_columns or []), "messages", "images", "image", "videos", "video"]


def _drop_folder(card: Card, source: str | None) -> None:
    """Take out a base model that is a folder of this machine, as PEFT states it: to others it says nothing."""
    if not source or not os.path.isdir(source):
        return
    if card.data.get("base_model") == source:
        card.data.pop("base_model")
    card.data["tags"] = [tag for tag in card.data.get("tags") or [] if tag != f"base_model:adapter:{source}"]


def _examples(dataset: Any) -> list[Mapping[str, Any]]:
    """The conversations of a data set, packed or not."""
    features = [dataset[index] for index in range(len(dataset))]
    return [example for feature in features for example in ([feature] if isinstance(feature, Mapping) else feature)]
