# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""A released checkpoint as a CASA checkpoint: its configuration, and where each of its tensors is stored."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig

from ...backbones import BACKBONES
from ...checkpoint_files.shards import (
    ComputedTensor,
    PlannedTensor,
    StoredTensor,
    same_values,
    split_files,
    values_of,
)
from ...checks import counted, listed, one_line
from ...configuration_casa import CasaConfig
from ...folder_files import CheckpointError
from ..mapping import EMBEDDINGS, GATE, TIED, Shape, casa_shapes, stock_shapes
from ..plan import ConversionPlan, set_dtype
from .facts import TEMPORAL_PATCH_SIZE, Facts
from .inference import Design, given_design, infer_design
from .mapping_file import MappingFile, table_of
from .tensors import PATCH_EMBEDDING, Assignment, Piece, assign

# Whatever was learned there was learned there; whether it was read rightly only its authors' code can tell.
NOTE = (
    "It was made by rules on names from a checkpoint in the format of the method's authors, and these rules have "
    "never been compared with their files. Compare its answers with those of their code before you rely on it."
)


@dataclass(frozen=True)
class Released:
    """A released checkpoint that has been understood.

    Attributes:
        config: configuration of the CASA checkpoint.
        tensors: tensors to be written, in the number format of the released checkpoint.
        dropped: name of each stored tensor that is left out -> why.
        table: outcome for each stored tensor, as text.
        findings: what was concluded or assumed, and from what, in sentences.
    """

    config: CasaConfig
    tensors: tuple[PlannedTensor, ...]
    dropped: dict[str, str]
    table: str
    findings: tuple[str, ...]

    def plan(self, dtype: str | None, max_shard_size: int | str, findings: Sequence[str]) -> ConversionPlan:
        """What is written; the configuration gets the dtype of the weights.

        Args:
            dtype: key of `DTYPES` to cast to; None to keep each as it is.
            max_shard_size: largest size of a weight file, as a number of bytes or a string such as "5GB".
            findings: further ones.
        """
        tensors = [replace(tensor, dtype=dtype or tensor.dtype) for tensor in self.tensors]
        set_dtype(self.config, tensors, dtype)
        return ConversionPlan(
            config=self.config,
            files=split_files(tensors, max_shard_size),
            source_parameters=sum(tensor.numel for tensor in tensors),
            added_parameters=0,
            added={},
            initialised={},
            dropped=self.dropped,
            note=NOTE,
            findings=(*self.findings, *findings),
        )


@dataclass(frozen=True)
class Names:
    """Names of a checkpoint's tensors, and what is known of them.

    Attributes:
        facts: what its files say.
        assignment: outcome for each tensor.
        possible: names and shapes of all tensors that a CASA checkpoint of this backbone can have.
        stock: the same of the stock model.
        tied: whether the head repeats the embeddings.
    """

    facts: Facts
    assignment: Assignment
    possible: dict[str, Shape]
    stock: dict[str, Shape]
    tied: bool


def read_names(folder: Path, stored: Mapping[str, Shape], mapping: str | Path | None = None) -> Names:
    """What each tensor of a checkpoint is, as far as that is known.

    Args:
        folder: folder with all files but the weights.
        stored: names and shapes of the checkpoint.
        mapping: path of a mapping file.

    Raises:
        CheckpointError: if the files don't tell what the backbone is, or the mapping file can't be used.
    """
    facts = Facts.read(folder)
    tied = facts.tied
    if tied is None:  # a head that isn't stored can only be the embeddings
        tied = not any(name.endswith(("lm_head.weight", "text_linear.weight")) for name in stored)
    widest = {"casa_share_projections": False, "casa_placement": "before", "casa_gate": "tanh"}
    config = _config(folder, facts, tied, widest, (None, 0))
    stock = stock_shapes(_stock_config(facts, tied, (None, 0)), config)
    possible = casa_shapes(config, stock)
    file = None if mapping is None else MappingFile(mapping)
    if file is not None:
        file.check(stored, possible)
    return Names(facts, assign(stored, possible, tied=tied, mapping=file), possible, stock, tied)


def read_released(
    folder: Path,
    read_tensors: Callable[[], Mapping[str, StoredTensor]],
    *,
    variant: str | None,
    design: Mapping[str, Any],
    mapping: str | Path | None,
    delimiters: tuple[int | None, int] | None,
) -> Released:
    """Understand a released checkpoint, or say what is missing for that.

    Args:
        folder: folder with all files but the weights.
        read_tensors: function that gives its tensors; called when the other files have been understood.
        variant, design: what the caller knows of its design.
        mapping: path of a mapping file.
        delimiters: ids of the tokens before and after an image, for a checkpoint that doesn't say.

    Raises:
        CheckpointError: naming every tensor that isn't understood, or every setting that must be given.
        ValueError: for settings that have no meaning together.
    """
    facts = Facts.read(folder)
    given = given_design(variant, design, range(facts.text.num_hidden_layers))
    stored = read_tensors()
    names = read_names(folder, {name: tensor.shape for name, tensor in stored.items()}, mapping)
    assignment = names.assignment
    _check_all_known(folder, assignment)
    inferred = infer_design(facts, assignment, given)
    delimiters = delimiters or facts.delimiters
    _check_all_answered(folder, open_questions(inferred, delimiters))
    assert delimiters is not None
    config = _config(folder, facts, names.tied, inferred.fields, delimiters)
    expected = casa_shapes(config, names.stock)
    _complete(assignment, expected, config)
    _check_complete(config, assignment, expected)
    _check_tied_head(stored, assignment)
    findings = (*facts.findings, *inferred.findings, *_of_tensors(assignment))
    return Released(
        config=config,
        tensors=tuple(_planned(name, assignment.found[name], stored, shape) for name, shape in expected.items()),
        dropped=assignment.dropped,
        table="".join(f"# found: {finding}\n" for finding in findings) + table_of(assignment.lines(stored)),
        findings=findings,
    )


# ---------------------------------------------------------------- configuration


def _stock_config(facts: Facts, tied: bool, delimiters: tuple[int | None, int]) -> PreTrainedConfig:
    backbone = BACKBONES[facts.text.model_type]
    text = copy.deepcopy(facts.text)
    text.tie_word_embeddings = tied
    if backbone.text_only:
        return text
    ids = {
        field: facts.content[field]
        for field in backbone.placeholder_id_fields
        if type(facts.content.get(field)) is int
    }
    ids |= {"vision_start_token_id": delimiters[0] or 0, "vision_end_token_id": delimiters[1]}
    settings = {name: value for name, value in text.to_dict().items() if name != "model_type"}
    return CONFIG_MAPPING[backbone.source_model_type](
        text_config=settings, vision_config=dict(facts.vision), tie_word_embeddings=tied, **ids
    )


def _config(
    folder: Path, facts: Facts, tied: bool, design: Mapping[str, Any], delimiters: tuple[int | None, int]
) -> CasaConfig:
    start, end = delimiters
    try:
        config = CasaConfig.from_source(
            _stock_config(facts, tied, delimiters),
            vision_config=dict(facts.vision),
            image_token_id=end,
            vision_start_token_id=start,
            vision_end_token_id=end,
            new_tokens={},
            **design,
        )
    except Exception as error:  # whatever a configuration class runs into
        if isinstance(error, ValueError) and "\n" not in str(error):
            raise
        raise CheckpointError(
            f"{folder / 'config.json'} has a setting that can't be used ({type(error).__name__}: {one_line(error)}). "
            "Use the config.json that belongs to the weights."
        ) from error
    config.architectures = ["CasaForConditionalGeneration"]
    return config


# ---------------------------------------------------------------- tensors


def _complete(assignment: Assignment, expected: Iterable[str], config: CasaConfig) -> None:
    """Add what isn't stored because it needn't be: norms that are the block's, and biases that no block has."""
    stored_kinds = {name.rpartition("layers.")[2].partition(".")[2] for name in assignment.found}
    for target in expected:
        if target in assignment.found:
            continue
        kind = target.rpartition("layers.")[2].partition(".")[2]
        if kind == "casa_attn.image_norm.weight" and kind not in stored_kinds:
            original = assignment.found.get(target.replace("casa_attn.image_norm", "input_layernorm"))
            if original is not None:
                assignment.found[target] = replace(original, remark="also the norm of image states")
        elif kind.startswith("casa_attn.") and kind.endswith(".bias") and kind not in stored_kinds:
            assignment.found[target] = Piece("", remark="not stored in any block: 0")


def _planned(target: str, piece: Piece, stored: Mapping[str, StoredTensor], shape: Shape) -> PlannedTensor:
    """A tensor to be written, from what is stored of it."""
    if not piece.name:
        zeros = ComputedTensor(shape, partial(torch.zeros, shape))
        return PlannedTensor(target, (zeros,), next(tensor.dtype for tensor in stored.values()), piece.remark)
    tensor = stored[piece.name] if piece.rows is None else stored[piece.name].rows(*piece.rows)
    part: StoredTensor | ComputedTensor = tensor
    origin = f"{piece} ({piece.remark})" if piece.remark else str(piece)
    if tensor.shape != shape:
        if target == PATCH_EMBEDDING:
            part = ComputedTensor(shape, partial(_patch_embedding, tensor, piece.order, shape))
        else:
            assert target.endswith(GATE.rpartition(".")[2])
            part = replace(tensor, shape=shape)
    return PlannedTensor(target, (part,), tensor.dtype, origin)


def _patch_embedding(tensor: StoredTensor, order: str | None, shape: Shape) -> torch.Tensor:
    """The patch embedding in Qwen's shape (out, channels, frames, height, width).

    One that was summed over frames becomes half of it for each of two: what an image of two equal frames gives is the
    same, halving is exact in floating point (but for subnormal numbers), and two different frames count alike.
    """
    values = values_of(tensor)
    out, channels, frames, height, width = shape
    sizes = {"c": channels, "t": frames, "h": height, "w": width}
    order = order or "chw"
    values = values.view(out, *(sizes[axis] for axis in order))
    values = values.permute(0, *(1 + order.index(axis) for axis in "cthw" if axis in order))
    if "t" not in order:
        assert frames == TEMPORAL_PATCH_SIZE
        values = (values / frames)[:, :, None].expand(shape)
    return values.contiguous()


# ---------------------------------------------------------------- refusals


def _check_all_known(folder: Path, assignment: Assignment) -> None:
    if not assignment.left:
        return
    left = [f"{name} ({reason})" for name, reason in assignment.left.items()]
    raise CheckpointError(
        f"{folder} has {counted(len(left), 'tensor')} of unknown meaning: {listed(left)}. Get the table of all with "
        "`casa-hf inspect SOURCE --names > names.tsv`, say there what these become, and give it as mapping "
        "(`--mapping names.tsv`)."
    )


def open_questions(design: Design, delimiters: tuple[int | None, int] | None) -> list[str]:
    """What has to be given to convert a checkpoint, with the reasons.

    Args:
        design: what is known of its design.
        delimiters: ids of the tokens before and after an image; None if they aren't known.
    """
    questions = list(design.questions)
    if delimiters is None:
        questions.append(
            "image_delimiters (the token before an image and the one after it): config.json has no pre_image_tokens "
            "and post_image_tokens"
        )
    return questions


def _check_all_answered(folder: Path, questions: Sequence[str]) -> None:
    if questions:
        raise CheckpointError(
            f"{folder} doesn't tell all of its design. Give what its authors' code says: {'; '.join(questions)}."
        )


def _check_complete(config: CasaConfig, assignment: Assignment, expected: Mapping[str, Shape]) -> None:
    extra = [f"{piece} ({target})" for target, piece in assignment.found.items() if target not in expected]
    if extra:
        raise CheckpointError(
            f"The checkpoint has {counted(len(extra), 'tensor')} that its design doesn't have: {listed(extra)}. "
            "Correct the settings of the design, or the mapping."
        )
    missing = [target for target in expected if target not in assignment.found]
    if missing:
        raise CheckpointError(
            f"The checkpoint lacks {counted(len(missing), 'tensor')} of {config.backbone.display_name} with "
            f"{'a custom design' if config.variant is None else repr(config.variant)}: {listed(missing)}. Download "
            "the complete checkpoint, or correct the mapping or the settings of the design."
        )


def _check_tied_head(stored: Mapping[str, StoredTensor], assignment: Assignment) -> None:
    """A head that is left out must be the embeddings."""
    embeddings = assignment.found[EMBEDDINGS]
    for name, reason in assignment.dropped.items():
        if reason.endswith(TIED[1]) and not same_values(stored[name], stored[embeddings.name]):
            raise CheckpointError(
                f"{name} has other values than the embeddings, but config.json says that they are tied "
                "(tie_word_embeddings). Set tie_word_embeddings to false there to keep both."
            )


def _of_tensors(assignment: Assignment) -> Sequence[str]:
    """Remarks on tensors that weren't taken over one to one, each once."""
    remarks: dict[str, list[str]] = {}
    for target, piece in assignment.found.items():
        if piece.remark or piece.rows is not None:
            remark = piece.remark or "some rows of a tensor, in the order that its name says"
            remarks.setdefault(remark, []).append(target)
    return [f"{listed(targets)}: {remark}" for remark, targets in remarks.items()]
