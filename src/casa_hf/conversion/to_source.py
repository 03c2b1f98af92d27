# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Back from a CASA checkpoint to the token-insertion checkpoint that it was made from, with what it has learned.

Language model and vision tower go back under the names that the source's files have; fusion layers and new tokens are
left out. Where nothing was trained every tensor is the original one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from ..checkpoint_files.config import read_source_config
from ..checkpoint_files.destination import check_output, new_folder
from ..checkpoint_files.download import SMALL_FILES
from ..checkpoint_files.errors import ConversionError
from ..checkpoint_files.names import (
    CARRIED_FILES,
    KEPT,
    OTHER_FILES,
    SOURCE_ROWS_FILE,
    TEMPLATE_FILES,
    TOKENIZER_FILES,
)
from ..checkpoint_files.shards import (
    PlannedTensor,
    Progress,
    StoredTensor,
    read_checkpoint,
    read_tensors,
    split_files,
    write_checkpoint,
)
from ..checkpoint_files.unchanged import FileState, folder_state
from ..configuration_casa import CasaConfig
from ..folder_files import check_json
from ..hub.card import Origin, license_files, source_card
from .convert import (
    MAX_SHARD_SIZE,
    ConversionReport,
    changed_files,
    check_small_files,
    dtype_code,
    open_source,
)
from .mapping import ADDED, PROJECTOR, TOKEN_ROWS, VISION, casa_shapes, match_tensors, source_name, stock_shapes
from .plan import ConversionPlan, overwritten_rows, set_dtype
from .source import source_processor_files, stock_config


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
        casa: folder or Hub id of a CASA checkpoint in which no self-attention was replaced.
        output, dtype, revision, overwrite, max_shard_size, progress: see `convert_checkpoint`.

    Raises:
        ConversionError: for a checkpoint that has no such form, an output that can't be written, or an option that
            can't be used.
    """
    target = Path(os.path.abspath(output))
    destination = check_output(target, overwrite, casa)
    plan, folder, config, small_files = _prepare(casa, dtype, revision, max_shard_size)
    with new_folder(destination, plan.num_bytes) as new:
        plan.config.save_pretrained(new)
        for file, name in _copied_files(folder, config):
            shutil.copyfile(file, new / name)
        for name, content in _processor_files(folder, config).items():
            (new / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        card = source_card(config, Origin.of(folder.absolute()), folder, plan.dropped, plan.note, target.name)
        (new / "README.md").write_text(card, encoding="utf-8")
        write_checkpoint(new, plan.files, progress)
        check_small_files(small_files)
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
        casa, dtype, revision, max_shard_size: see `convert_to_source`.

    Raises:
        ConversionError: as `convert_to_source`.
    """
    return _prepare(casa, dtype, revision, max_shard_size)[0]


def _prepare(
    casa: str | Path, dtype: str | torch.dtype | None, revision: str | None, max_shard_size: int | str
) -> tuple[ConversionPlan, Path, CasaConfig, dict[Path, dict[Path, FileState]]]:
    code = dtype_code(dtype)
    folder, load_weights = open_source(casa, revision)
    small_files = {folder: folder_state(folder, SMALL_FILES)}
    config = read_source_config(folder)
    check_json(folder, CARRIED_FILES, ConversionError)
    if not isinstance(config, CasaConfig):
        raise ConversionError(
            f"{folder} has model_type {config.model_type!r}. Give a CASA checkpoint; only those can be taken back."
        )
    if config.casa_placement == "replace":
        raise ConversionError(
            f"{folder} has fusion layers in place of self-attention (casa_placement='replace'), which the source's "
            "form needs. Only designs that keep self-attention in every block can be taken back."
        )
    if config.new_token_ids and not (folder / f"{KEPT}tokenizer_config.json").is_file():
        raise ConversionError(
            f"{folder} has tokens of its own, but not the source's tokenizer ({KEPT}*). Copy these files from the "
            "checkpoint that the conversion made."
        )
    source_config = stock_config(config)
    load_weights()
    stored = read_checkpoint(folder)
    source_rows = source_config.get_text_config().vocab_size
    rows = config.text_config.vocab_size
    taken = overwritten_rows(config.new_token_ids, source_rows)
    originals = _read_source_rows(folder) if taken else {}
    stock = stock_shapes(stock_config(config, keep_tokens=True), config)
    found, dropped = match_tensors(
        config, casa_shapes(config, stock), {name: tensor.shape for name, tensor in stored.items()}
    )
    planned = []
    for name, stored_name in found.items():
        if reason := _drop_reason(name, config):
            dropped[stored_name] = reason
            continue
        part = stored[stored_name]
        origin = stored_name
        if name in TOKEN_ROWS and rows > source_rows:
            part = part.rows(0, source_rows)
            origin += f", rows 0 to {source_rows - 1}"
            dropped[f"{stored_name}, rows {source_rows} to {rows - 1}"] = "tokens that the source hasn't"
        parts: tuple[StoredTensor, ...] = (part,)
        if name in TOKEN_ROWS and taken:
            parts = _with_rows(part, taken, originals.get(name))
            numbers = f"rows {', '.join(map(str, taken))}"
            origin += f"; {numbers} of the source"
            dropped[f"{stored_name}, {numbers}"] = "tokens that the source hasn't"
        planned.append(PlannedTensor(source_name(name, config.backbone), parts, code or part.dtype, origin))
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
    return plan, folder, config, small_files


def _note(config: CasaConfig) -> str:
    """What the new checkpoint is, in sentences, with what may be wrong with it."""
    if config.backbone.text_only:
        return (
            "Its language model is that of the CASA checkpoint. If it was trained there, it was trained to read text "
            "beside fusion layers that see images, which it hasn't any more."
        )
    return (
        "Its language model and vision tower are those of the CASA checkpoint. If blocks of the tower were trained "
        "there, as the paper's recipes do, they were trained for CASA's fusion layers: with image tokens in its "
        "sequence the source's form may see worse than the original source."
    )


def _read_source_rows(folder: Path) -> dict[str, StoredTensor]:
    file = folder / SOURCE_ROWS_FILE
    if not file.is_file():
        raise ConversionError(
            f"{folder} has new tokens in rows of the source's embeddings, but not what was there ({file.name}). Copy "
            "this file from the checkpoint that the conversion made."
        )
    return read_tensors(file)


def _with_rows(matrix: StoredTensor, indices: Sequence[int], rows: StoredTensor | None) -> tuple[StoredTensor, ...]:
    """The parts of a matrix whose rows at the ascending `indices` are `rows`."""
    shape = (len(indices), *matrix.shape[1:])
    if rows is None or rows.shape != shape:
        found = "nothing" if rows is None else list(rows.shape)
        raise ConversionError(
            f"{SOURCE_ROWS_FILE} should hold {list(shape)} numbers for each matrix with a row per token, got {found}. "
            "Copy the file from the checkpoint that the conversion made."
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
        return "projector of image features, which the source hasn't"
    if ADDED.search(name):
        return "fusion layers, which the source hasn't"
    if config.backbone.text_only and name.startswith(VISION):
        return "vision tower, which the source hasn't"
    return None


def _copied_files(folder: Path, config: CasaConfig) -> list[tuple[Path, str]]:
    """Files that go back as the source had them, and their names there."""
    kept = {file.name.removeprefix(KEPT): file for file in folder.glob(f"{KEPT}*")}
    changed = changed_files(config) if kept else ()
    files = [
        (kept.get(name, folder / name), name)
        for name in (*TOKENIZER_FILES, *TEMPLATE_FILES, *OTHER_FILES)
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
