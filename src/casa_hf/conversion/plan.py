# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""What a conversion will write, and where every value comes from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cache, partial
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from ..backbones import BACKBONES
from ..checkpoint_files.shards import (
    DTYPES,
    ComputedTensor,
    PlannedTensor,
    StoredTensor,
    row_statistics,
    same_values,
    split_files,
)
from ..configuration_casa import CasaConfig
from ..folder_files import CheckpointError
from .mapping import EMBEDDINGS, PROJECTOR, TIED, TOKEN_ROWS, TensorMap

PROJECTOR_SEED = 0
GIST_SEED = 1

# Gist tokens start around the mean embedding, so far apart that they can learn different things, and so near that they
# say nothing yet: this part of the standard deviation of the matrix.
GIST_SPREAD = 0.1


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What is known of a conversion before and after it.

    Attributes:
        config: Configuration of the new checkpoint.
        source_parameters: Number of parameters taken over.
        added_parameters: Number of new parameters.
        added: Name of each new tensor -> name of the tensor that it starts as a copy of.
        initialised: Name of each tensor that is new, or has new rows, and copies nothing -> how these start.
        dropped: Name of each source tensor that is left out -> why.
        note: Text on what the new model computes before any training, in sentences.
        findings: What was concluded or assumed about a source that doesn't say all of its design, in sentences.
    """

    config: PreTrainedConfig
    source_parameters: int
    added_parameters: int
    added: dict[str, str]
    initialised: dict[str, str]
    dropped: dict[str, str]
    note: str
    findings: tuple[str, ...] = ()

    @property
    def left_out(self) -> list[str]:
        """What is left out of the source: a line for each reason, with how many tensors."""
        kinds: dict[tuple[str, bool], set[str]] = {}
        for part, reason in self.dropped.items():
            name, rows, _ = part.partition(", row")
            kinds.setdefault((reason, bool(rows)), set()).add(name)
        return [
            f"{'rows of ' if rows else ''}{len(names)} tensor{'' if len(names) == 1 else 's'} ({reason})"
            for (reason, rows), names in kinds.items()
        ]


@dataclass(frozen=True, kw_only=True)
class ConversionPlan(Conversion):
    """What a conversion will write; see `Conversion` for the rest.

    Attributes:
        files: Tensors of each weight file, by file name.
        source_rows: Rows of the source that new tokens take, in order of their ids, by the name of the matrix.
    """

    files: dict[str, list[PlannedTensor]]
    source_rows: tuple[PlannedTensor, ...] = ()

    @property
    def tensors(self) -> Iterator[PlannedTensor]:
        """All tensors of all files."""
        return (tensor for group in self.files.values() for tensor in group)

    @property
    def num_bytes(self) -> int:
        """Size of all weights in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def active_parameters(self) -> int:
        """Number of parameters that compute a token; all but those of experts that it isn't sent to."""
        text_config = self.config.get_text_config()
        sizes = {tensor.name: tensor.numel for tensor in self.tensors}
        return BACKBONES[text_config.model_type].active_parameters(text_config, sizes)


@dataclass(frozen=True, kw_only=True)
class ConversionReport(Conversion):
    """What a conversion has written; see `Conversion` for the rest.

    Attributes:
        output: Folder of the new checkpoint.
        num_bytes: Size of all weights in bytes.
        active_parameters: Number of parameters that compute a token; all but those of experts that it isn't sent to.
    """

    output: Path
    num_bytes: int
    active_parameters: int

    @classmethod
    def of(cls, plan: ConversionPlan, output: Path) -> ConversionReport:
        """The report of a plan that has been carried out."""
        shared = {field.name: getattr(plan, field.name) for field in fields(Conversion)}
        return cls(output=output, num_bytes=plan.num_bytes, active_parameters=plan.active_parameters, **shared)


def active_note(active_parameters: int, parameters: int) -> str:
    """How many of all parameters compute a token, at the end of a sentence that tells how many there are; nothing
    where all do."""
    return "" if active_parameters == parameters else f"; {active_parameters:,} active per token"


def make_plan(
    config: CasaConfig,
    tensor_map: TensorMap,
    stored: dict[str, StoredTensor],
    new_token_ids: Sequence[int],
    *,
    dtype: str | None,
    max_shard_size: int | str,
    note: str,
) -> ConversionPlan:
    """The plan of a conversion to a CASA checkpoint; its configuration gets the dtype of the weights.

    Args:
        config: Configuration of the new checkpoint.
        tensor_map: Outcome for each source tensor.
        stored: Source tensors by name.
        new_token_ids: Ids of the tokens that the source didn't have.
        dtype: Key of `DTYPES` to cast to; None to keep each as it is.
        max_shard_size: Largest size of a weight file, as a number of bytes or a string such as "5GB".
        note: Text on what the new model computes before any training.

    Raises:
        CheckpointError: if a tied head has values of its own.
    """
    _check_tied_head(stored, tensor_map)
    planned, initialised = _plan_tensors(config, tensor_map, stored, new_token_ids, dtype)
    set_dtype(config, planned, dtype)
    new = tensor_map.added.keys() | tensor_map.computed.keys()
    added_parameters = sum(tensor.numel for tensor in planned if tensor.name in new)
    grown = sum(name in TOKEN_ROWS for name in initialised)
    added_parameters += grown * len(new_token_ids) * config.text_config.hidden_size
    return ConversionPlan(
        config=config,
        files=split_files(planned, max_shard_size),
        source_parameters=sum(tensor.numel for tensor in planned) - added_parameters,
        added_parameters=added_parameters,
        added=tensor_map.added,
        initialised=initialised,
        dropped=tensor_map.dropped,
        note=note,
        source_rows=_source_rows(tensor_map, stored, new_token_ids),
    )


def _plan_tensors(
    config: CasaConfig,
    tensor_map: TensorMap,
    stored: dict[str, StoredTensor],
    new_token_ids: Sequence[int],
    dtype: str | None,
) -> tuple[list[PlannedTensor], dict[str, str]]:
    """The tensors, and how those start that are new, or have new rows, and copy nothing."""
    planned = []
    initialised = {}
    tokens = {index: token for token, index in (config.new_tokens or {}).items()}
    for name, source in tensor_map.written():
        parts: tuple[StoredTensor | ComputedTensor, ...] = (stored[source],)
        origin = f"new, copy of {source}" if name in tensor_map.added else source
        if name in TOKEN_ROWS and new_token_ids:
            # An untied head's rows needn't differ: nothing is trained to say a gist token.
            gists = config.gist_token_ids or () if name == EMBEDDINGS else ()
            parts = _with_new_rows(stored[source], new_token_ids, gists, config.text_config.vocab_size)
            rows = ", ".join(f"{index} ({tokens[index]})" for index in new_token_ids)
            initialised[name] = f"new rows {rows}: the mean of all"
            initialised[name] += f", gist tokens with noise of {GIST_SPREAD:g} of their spread" if gists else ""
            origin += f"; {initialised[name]}"
        planned.append(PlannedTensor(name, parts, dtype or stored[source].dtype, origin))
    usual = dtype or _usual_dtype(planned)
    for name, shape in tensor_map.computed.items():
        compute, initialised[name] = _initial_values(name, shape, config)
        planned.append(PlannedTensor(name, (ComputedTensor(shape, compute),), usual, f"new, {initialised[name]}"))
    return planned, initialised


def overwritten_rows(new_token_ids: Iterable[int], num_rows: int) -> list[int]:
    """Ids of those new tokens that take spare rows of a source's matrix with `num_rows` rows, in order."""
    return sorted(index for index in new_token_ids if index < num_rows)


def _source_rows(
    tensor_map: TensorMap, stored: dict[str, StoredTensor], new_token_ids: Sequence[int]
) -> tuple[PlannedTensor, ...]:
    matrices = {name: stored[tensor_map.found[name]] for name in TOKEN_ROWS if name in tensor_map.found}
    rows = {
        name: tuple(matrix.rows(index, index + 1) for index in overwritten_rows(new_token_ids, matrix.shape[0]))
        for name, matrix in matrices.items()
    }
    return tuple(PlannedTensor(name, parts, matrices[name].dtype) for name, parts in rows.items() if parts)


def _usual_dtype(tensors: Iterable[PlannedTensor]) -> str:
    """The dtype that most parameters have."""
    parameters: Counter[str] = Counter()
    for tensor in tensors:
        parameters[tensor.dtype] += tensor.numel
    return parameters.most_common(1)[0][0]


def set_dtype(config: PreTrainedConfig, planned: Sequence[PlannedTensor], dtype: str | None) -> None:
    """Set the dtype in which a configuration has its weights loaded."""
    if dtype is None and config.dtype is not None:
        return
    for part in (config, *(getattr(config, name) for name in config.sub_configs)):
        part.dtype = DTYPES[_usual_dtype(planned)]


def _initial_values(name: str, shape: tuple[int, ...], config: CasaConfig) -> tuple[partial[torch.Tensor], str]:
    """How a tensor that copies nothing is made, and how it starts in words."""
    if name == f"{PROJECTOR}weight":
        std = config.text_config.initializer_range
        return partial(_normal, shape, std), f"random, of standard deviation {std:g}"
    return partial(torch.zeros, shape), "0"


def _normal(shape: tuple[int, ...], std: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(PROJECTOR_SEED)
    return std * torch.randn(shape, generator=generator)


def _with_new_rows(
    stored: StoredTensor, ids: Sequence[int], gists: Sequence[int], num_rows: int
) -> tuple[StoredTensor | ComputedTensor, ...]:
    """A matrix of `num_rows` rows: the stored ones, but the mean of them at `ids` and beyond the last.

    At `gists` noise is added, the same in every conversion of this matrix.
    """
    statistics = cache(partial(row_statistics, stored))

    def new_row(index: int) -> torch.Tensor:
        mean, spread = statistics()
        return mean + GIST_SPREAD * spread * noise()[gists.index(index)] if index in gists else mean

    @cache
    def noise() -> torch.Tensor:
        generator = torch.Generator().manual_seed(GIST_SEED)
        return torch.randn(len(gists), stored.shape[1], generator=generator, dtype=torch.float64)

    def new_rows(indices: Sequence[int]) -> ComputedTensor:
        return ComputedTensor(
            (len(indices), *stored.shape[1:]), lambda: torch.stack([new_row(index) for index in indices])
        )

    parts: list[StoredTensor | ComputedTensor] = []
    start, old_rows = 0, stored.shape[0]
    for index in overwritten_rows(ids, old_rows):
        parts += [stored.rows(start, index), new_rows([index])]
        start = index + 1
    parts += [stored.rows(start, old_rows), new_rows(range(old_rows, num_rows))]
    return tuple(part for part in parts if part.shape[0])


def _check_tied_head(stored: dict[str, StoredTensor], tensor_map: TensorMap) -> None:
    head, embedding = TIED
    if head in tensor_map.dropped and not same_values(stored[head], stored[tensor_map.found[embedding]]):
        raise CheckpointError(
            f"The source has other values for {head} than for the embeddings, but its config.json says that they are "
            "tied (tie_word_embeddings). Set tie_word_embeddings to false there to keep both."
        )
