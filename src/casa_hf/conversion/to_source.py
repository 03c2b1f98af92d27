# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Back from a CASA checkpoint to the token-insertion checkpoint that it was made from, with what it has learned.

Language model and vision tower go back under the names that the source's files have; fusion layers and new tokens are
left out. Where nothing was trained every tensor is the original one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..checkpoint_files.config import read_casa_config
from ..checkpoint_files.destination import check_destination, new_folder
from ..checkpoint_files.names import (
    CARRIED_FILES,
    OTHER_FILES,
    SOURCE_PREFIX,
    SOURCE_ROWS_FILE,
    TEMPLATE_FOLDER,
    TOKENIZER_FILES,
    kept_files,
    template_files,
)
from ..checkpoint_files.shards import (
    PlannedTensor,
    Progress,
    StoredTensor,
    read_tensors,
    shard_bytes,
    split_files,
    write_checkpoint,
)
from ..configuration_casa import CasaConfig
from ..folder_files import CheckpointError, own_file
from ..hub.origins import license_files
from .card import source_card
from .convert import changed_files
from .mapping import (
    ADDED,
    PROJECTOR,
    TOKEN_ROWS,
    VISION,
    casa_shapes,
    match_tensors,
    shapes_in_file,
    stock_shapes,
)
from .plan import ConversionPlan, ConversionReport, overwritten_rows, set_dtype
from .processor import source_processor_files
from .request import MAX_SHARD_SIZE, dtype_code
from .source import Source, stock_config


def convert_to_source(
    casa: str | Path,
    output: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    progress: Progress | None = None,
) -> ConversionReport:
    """Write the token-insertion checkpoint in the source's form, with a CASA checkpoint's language model and tower.

    Args:
        casa: Folder or Hub id of a CASA checkpoint in which no self-attention was replaced.
        output, dtype, revision, overwrite, max_shard_size, progress: Arguments of `convert_checkpoint`.

    Raises:
        CheckpointError: for a checkpoint that has no such form, an output that can't be written, or an option that
            can't be used.
    """
    target = Path(os.path.abspath(output))
    destination = check_destination(target, overwrite, casa)
    plan, source, config = _prepare(casa, dtype, revision, max_shard_size)
    with new_folder(destination, plan.num_bytes) as new:
        plan.config.save_pretrained(new)
        for file, name in _copied_files(source.folder, config):
            (new / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, new / name)
        for name, content in _processor_files(source.folder, config).items():
            (new / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        (new / "README.md").write_text(source_card(config, source.folder, plan, target.name), encoding="utf-8")
        write_checkpoint(new, plan.files, progress)
        source.check_unchanged()
    return ConversionReport.of(plan, target)


def plan_to_source(
    casa: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> ConversionPlan:
    """What `convert_to_source` would write; nothing is written, but a Hub id is downloaded.

    Args:
        casa, dtype, revision, max_shard_size: Arguments of `convert_to_source`.

    Raises:
        CheckpointError: as `convert_to_source`.
    """
    return _prepare(casa, dtype, revision, max_shard_size)[0]


def _prepare(
    casa: str | Path, dtype: str | torch.dtype | None, revision: str | None, max_shard_size: int | str
) -> tuple[ConversionPlan, Source, CasaConfig]:
    code = dtype_code(dtype)
    shard_bytes(max_shard_size)
    source = Source.open(casa, revision, CARRIED_FILES)
    config = read_casa_config(source.folder)
    _check_way_back(source.folder, config)
    source_config = stock_config(config)
    stored = source.tensors()
    rows = _TokenRows.of(source.folder, config, source_config.get_text_config().vocab_size)
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    stock = stock_shapes(stock_config(config, keep_tokens=True), config)
    stock = shapes_in_file(config.backbone, stock, shapes)
    found, dropped = match_tensors(config, casa_shapes(config, stock), shapes)
    planned = []
    for name, stored_name in found.items():
        if reason := _drop_reason(name, config):
            dropped[stored_name] = reason
            continue
        tensor = stored[stored_name]
        parts: tuple[StoredTensor, ...] = (tensor,)
        origin = stored_name
        if name in TOKEN_ROWS:
            parts, origin = rows.restored(name, stored_name, tensor)
            dropped |= rows.dropped(stored_name)
        planned.append(PlannedTensor(config.backbone.source_name(name), parts, code or tensor.dtype, origin))
    set_dtype(source_config, planned, code)
    plan = ConversionPlan(
        config=source_config,
        files=split_files(planned, max_shard_size),
        source_parameters=sum(tensor.numel for tensor in planned),
        added_parameters=0,
        added={},
        initialised={},
        dropped=dropped,
        note=_note(config),
    )
    return plan, source, config


def _check_way_back(folder: Path, config: CasaConfig) -> None:
    """Refuse a checkpoint that can't be converted back."""
    if config.casa_placement == "replace":
        raise CheckpointError(
            f"{folder} has fusion layers in place of self-attention (casa_placement='replace'), but the source's form "
            "needs all of it. Give a checkpoint of a design that keeps self-attention in every block."
        )
    if config.new_token_ids and not (folder / f"{SOURCE_PREFIX}tokenizer_config.json").is_file():
        raise CheckpointError(
            f"{folder} has added tokens, but not the source's tokenizer ({SOURCE_PREFIX}*). Copy these files from the "
            "checkpoint that the conversion made."
        )


@dataclass(frozen=True)
class _TokenRows:
    """How the matrices with a row per token get the source's rows back.

    Attributes:
        kept: Number of rows that the source has.
        all: Number of rows that the CASA checkpoint has.
        taken: Indices of rows of the source that new tokens have taken.
        originals: Values of these rows by the name of the matrix.
    """

    kept: int
    all: int
    taken: list[int]
    originals: Mapping[str, StoredTensor]

    @classmethod
    def of(cls, folder: Path, config: CasaConfig, num_rows: int) -> _TokenRows:
        taken = overwritten_rows(config.new_token_ids, num_rows)
        return cls(num_rows, config.text_config.vocab_size, taken, _read_source_rows(folder) if taken else {})

    @property
    def _numbers(self) -> str:
        return f"rows {', '.join(map(str, self.taken))}"

    def restored(self, name: str, stored_name: str, matrix: StoredTensor) -> tuple[tuple[StoredTensor, ...], str]:
        """The parts of a source matrix, and where they come from in words."""
        origin = stored_name
        if self.all > self.kept:
            matrix = matrix.rows(0, self.kept)
            origin += f", rows 0 to {self.kept - 1}"
        if not self.taken:
            return (matrix,), origin
        return _with_rows(matrix, self.taken, self.originals.get(name)), f"{origin}; {self._numbers} of the source"

    def dropped(self, stored_name: str) -> dict[str, str]:
        """Which rows of a matrix are left out, and why."""
        rows = [f"rows {self.kept} to {self.all - 1}"] * (self.all > self.kept) + [self._numbers] * bool(self.taken)
        return {f"{stored_name}, {numbers}": "tokens that the source doesn't have" for numbers in rows}


def _note(config: CasaConfig) -> str:
    """What the new checkpoint is, in sentences, with what may be wrong with it."""
    if config.backbone.text_only:
        return (
            "Its language model is that of the CASA checkpoint. If it was trained there, it was trained to read text "
            "beside fusion layers that see images, which it no longer has."
        )
    return (
        "Its language model and vision tower are those of the CASA checkpoint. If blocks of the tower were trained "
        "there, as the paper's recipes do, they were trained for CASA's fusion layers: with image tokens in its "
        "sequence the source's form may see worse than the original source."
    )


def _read_source_rows(folder: Path) -> dict[str, StoredTensor]:
    file = folder / SOURCE_ROWS_FILE
    if not file.is_file():
        raise CheckpointError(
            f"{folder} has added tokens in rows of the source's embeddings, but not the source's values of these rows "
            f"({file.name}). Copy this file from the checkpoint that the conversion made."
        )
    return read_tensors(file)


def _with_rows(matrix: StoredTensor, indices: Sequence[int], rows: StoredTensor | None) -> tuple[StoredTensor, ...]:
    """The parts of a matrix whose rows at the ascending `indices` are `rows`."""
    shape = (len(indices), *matrix.shape[1:])
    if rows is None or rows.shape != shape:
        found = "nothing" if rows is None else list(rows.shape)
        raise CheckpointError(
            f"{SOURCE_ROWS_FILE} must hold {list(shape)} numbers for each matrix with a row per token, but holds "
            f"{found}. Copy the file from the checkpoint that the conversion made."
        )
    parts, start = [], 0
    for number, index in enumerate(indices):
        parts += [matrix.rows(start, index), rows.rows(number, number + 1)]
        start = index + 1
    parts.append(matrix.rows(start, matrix.shape[0]))
    return tuple(part for part in parts if part.shape[0])


def _drop_reason(name: str, config: CasaConfig) -> str | None:
    """Why the source has no such tensor; None if it has."""
    if name.startswith(PROJECTOR):
        return "projector of image features, which the source doesn't have"
    if ADDED.search(name):
        return "fusion layers, which the source doesn't have"
    if config.backbone.text_only and name.startswith(VISION):
        return "vision tower, which the source doesn't have"
    return None


def _copied_files(folder: Path, config: CasaConfig) -> list[tuple[Path, str]]:
    """Files that go back as the source had them, and their names there."""
    kept = {name.removeprefix(SOURCE_PREFIX): name for name in kept_files(folder) if name.startswith(SOURCE_PREFIX)}
    templates = template_files(folder)
    changed = changed_files(config, templates) if kept else ()
    further = [name for name in kept if name.startswith(f"{TEMPLATE_FOLDER}/") and name not in templates]
    files = [
        (own_file(folder, kept.get(name, name)), name)
        for name in (*TOKENIZER_FILES, *templates, *further, *OTHER_FILES)
        if name in kept or name not in changed
    ]
    files += [(file, file.name) for file in license_files(folder)]
    return [(file, name) for file, name in files if file.is_file()]


def _processor_files(folder: Path, config: CasaConfig) -> dict[str, dict]:
    """Contents of the source's processor files by file name."""
    file = folder / "processor_config.json"
    if config.backbone.text_only or not file.is_file():
        return {}
    return source_processor_files(file)
