# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""To a CASA checkpoint, file to file: from a token-insertion checkpoint, or from a CASA checkpoint of another design.

Everything is read and checked first: configuration, processor, and the header of every weight file. Then the new
checkpoint is written into a temporary folder beside its destination and moved there in one step. No model is ever
filled with weights.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig

from ..backbones import BACKBONES, SOURCE_BACKBONES
from ..checkpoint_files.config import is_of_authors, read_config
from ..checkpoint_files.destination import check_destination, new_folder
from ..checkpoint_files.names import (
    CARRIED_FILES,
    OTHER_FILES,
    PROCESSOR_FILES,
    RELEASED_NAMES_FILE,
    SOURCE_PREFIX,
    SOURCE_ROWS_FILE,
    TOKENIZER_FILES,
    kept_files,
    template_files,
)
from ..checkpoint_files.shards import Progress, StoredTensor, write_checkpoint
from ..checks import one_line
from ..configuration_casa import CasaConfig
from ..folder_files import CheckpointError, own_file
from ..hub.origins import license_files, licensed, origin_records
from ..hub.remote_code import add_code
from ..processing_casa import CasaProcessor
from .authors import delimiter_ids, make_processor, read_released
from .card import model_card, untrained_effect
from .design import resolve_design
from .mapping import VISION, map_tensors, stock_shapes
from .plan import ConversionPlan, ConversionReport, make_plan
from .processor import keep_normalization, load_processor
from .request import MAX_SHARD_SIZE, ConversionRequest
from .source import Source, read_vision_config, stock_config


@dataclass(frozen=True)
class _Prepared:
    """A conversion that has been checked.

    Attributes:
        request: Request of the caller.
        plan: Plan of the weights to be written.
        config: Configuration of the new checkpoint.
        processor: Processor of the new checkpoint.
        source: Checkpoint that is converted.
        vision: Checkpoint that gives a text-only source its vision tower.
        own: Configuration of the source if it is a CASA checkpoint.
        names: Table of what each tensor has become, if the source is a checkpoint of the method's authors.
    """

    request: ConversionRequest
    plan: ConversionPlan
    config: CasaConfig
    processor: CasaProcessor
    source: Source
    vision: Source | None
    own: CasaConfig | None
    names: str | None = None

    @property
    def sources(self) -> list[Source]:
        return [self.source] if self.vision is None else [self.source, self.vision]


def convert_checkpoint(
    source: str | Path,
    output: str | Path,
    variant: str | None = None,
    *,
    vision_from: str | Path | None = None,
    image_delimiters: str | Sequence[str] | None = None,
    mapping: str | Path | None = None,
    video_timestamps: str | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    max_pixels: int | None = None,
    overwrite: bool = False,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    with_code: bool = False,
    progress: Progress | None = None,
    **design: Any,
) -> ConversionReport:
    """Write the CASA form of a token-insertion checkpoint, or of a CASA checkpoint of another design or format.

    Weights are streamed from safetensors to safetensors; a few megabytes of them are in memory at a time. Pickled
    weights are never loaded. From one design to another only what the new one lacks is made, as from a source; a
    conversion that would lose trained tensors is refused.

    Of a checkpoint in the format of the method's authors the design is read from its names and files; `variant` and
    `design` say of it what these don't (docs/authors.md).

    Args:
        source: Local folder, or Hub id, which is downloaded into the Hub's cache.
        output: Folder to make.
        variant: Key of `VARIANTS`, such as "ca" or "casa-shared"; None for "casa", or for the design that a CASA
            checkpoint has.
        vision_from: Folder or Hub id of the checkpoint whose vision tower a text-only source gets; for those only.
        image_delimiters: Tokens that stand around an image in a text-only source: the one before it and the one that
            it stands before, as a sequence or with a comma between them, or the latter alone. Those that the source's
            vocabulary lacks are added. None for `<|vision_start|>` and `<|vision_end|>`.
        mapping: Path of a file that says what the tensors of a checkpoint of the method's authors are, where rules on
            names don't; for those only.
        video_timestamps: Time of each video frame, written before it: "native" as the source writes it, "text" in
            plain text, or "none". None for "native" where the source has it, else "none"; or for what a CASA
            checkpoint has.
        dtype: Number format to cast the weights to, such as "float32" or "bfloat16"; None to keep each as it is.
        revision: Branch, tag or commit of a Hub id.
        max_pixels: Largest number of pixels of an image; None for the design's default.
        overwrite: Whether an existing checkpoint at `output` may be replaced. It stays until the new one is complete.
        max_shard_size: Largest size of a weight file, as a number of bytes or a string such as "5GB".
        with_code: Whether the checkpoint carries the code that it runs with, so that `trust_remote_code=True` loads it
            where casa_hf isn't installed.
        progress: Function that is called with (bytes of weights written so far, bytes in all).
        **design: Design fields of `CasaConfig` that differ from the variant, such as `casa_keys="image"`;
            `casa_layers` may be a list, or as in `layer_indices` "every:2", "4,8,12", "last:8" or "all".

    Raises:
        CheckpointError: for a source that can't be converted, an output that can't be written, both the same, or an
            option that can't be used. The message is one line that says what to do.
        ValueError: for an unknown variant or design, or a source whose settings CASA has no form for.
    """
    request = ConversionRequest(
        source=source,
        variant=variant,
        vision_from=vision_from,
        image_delimiters=image_delimiters,
        video_timestamps=video_timestamps,
        dtype=dtype,
        revision=revision,
        max_pixels=max_pixels,
        max_shard_size=max_shard_size,
        design=design,
        mapping=mapping,
    )
    destination = check_destination(output, overwrite, source, vision_from)
    prepared = _prepare(request)
    card = _card(prepared, str(output), with_code)
    _record_origins(prepared)
    with new_folder(destination, prepared.plan.num_bytes) as new:
        prepared.config.save_pretrained(new)
        GenerationConfig.from_model_config(prepared.config).save_pretrained(new)
        prepared.processor.save_pretrained(new)
        for file, name in _copied_files(prepared):
            (new / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, new / name)
        (new / "README.md").write_text(card, encoding="utf-8")
        write_checkpoint(new, prepared.plan.files, progress)
        if prepared.plan.source_rows:
            write_checkpoint(new, {SOURCE_ROWS_FILE: list(prepared.plan.source_rows)})
        if prepared.names:
            (new / RELEASED_NAMES_FILE).write_text(prepared.names, encoding="utf-8")
        if with_code:
            add_code(new)
        for read in prepared.sources:
            read.check_unchanged()
    return ConversionReport.of(prepared.plan, Path(os.path.abspath(output)))


def plan_conversion(
    source: str | Path,
    variant: str | None = None,
    *,
    vision_from: str | Path | None = None,
    image_delimiters: str | Sequence[str] | None = None,
    mapping: str | Path | None = None,
    video_timestamps: str | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    max_pixels: int | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    **design: Any,
) -> ConversionPlan:
    """What `convert_checkpoint` would write; nothing is written, but a Hub id is downloaded.

    Args:
        source, variant, ...: Arguments of `convert_checkpoint`.

    Raises:
        CheckpointError, ValueError: as `convert_checkpoint`.
    """
    request = ConversionRequest(
        source=source,
        variant=variant,
        vision_from=vision_from,
        image_delimiters=image_delimiters,
        video_timestamps=video_timestamps,
        dtype=dtype,
        revision=revision,
        max_pixels=max_pixels,
        max_shard_size=max_shard_size,
        design=design,
        mapping=mapping,
    )
    return _prepare(request).plan


# ---------------------------------------------------------------- preparation


def _prepare(request: ConversionRequest) -> _Prepared:
    source = Source.open(request.source, request.revision, CARRIED_FILES)
    if request.mapping is not None or is_of_authors(source.folder):
        return _prepare_released(request, source)
    source_config = read_config(source.folder)
    vision = _open_vision(request, source.folder, source_config)
    own = source_config if isinstance(source_config, CasaConfig) else None
    config, num_gist_tokens = _checked_config(request, source.folder, source_config, vision)
    processor = load_processor(
        source.folder,
        config,
        vision_folder=None if vision is None else vision.folder,
        image_delimiters=request.image_delimiters,
        max_pixels=request.max_pixels,
        num_gist_tokens=num_gist_tokens,
        own=own,
    )
    processor.video_timestamps = config.video_timestamps
    keep_normalization(config, processor)
    new_token_ids = _set_tokens(config, processor) if own is None else ()
    stored = source.tensors()
    if vision is not None:
        stored |= _vision_tensors(vision, config)
    tensor_map = map_tensors(
        config,
        stored={name: tensor.shape for name, tensor in stored.items()},
        stock=stock_shapes(source_config if own is None else stock_config(own, keep_tokens=True), config),
        own=own,
    )
    plan = make_plan(
        config,
        tensor_map,
        stored,
        new_token_ids,
        dtype=request.dtype_code,
        max_shard_size=request.max_shard_size,
        note=untrained_effect(config, own),
    )
    return _Prepared(request, plan, config, processor, source, vision, own)


def _prepare_released(request: ConversionRequest, source: Source) -> _Prepared:
    """As `_prepare`, for a checkpoint in the format of the method's authors."""
    _refuse_for_released(request, source.folder)
    source.fetch_code()
    given = request.image_delimiters
    delimiters = None if given is None else delimiter_ids(source.folder, given)
    released = read_released(
        source.folder,
        source.tensors,
        variant=request.variant,
        design=request.design,
        mapping=request.mapping,
        delimiters=delimiters,
    )
    processor, findings = make_processor(source.folder, released.config, request.max_pixels)
    keep_normalization(released.config, processor)
    plan = released.plan(request.dtype_code, request.max_shard_size, findings)
    return _Prepared(request, plan, released.config, processor, source, None, released.config, released.table)


def _refuse_for_released(request: ConversionRequest, folder: Path) -> None:
    if request.vision_from is not None:
        raise CheckpointError(
            f"vision_from={str(request.vision_from)!r} is for text-only sources, but {folder} has a vision tower. "
            "Leave out vision_from."
        )
    if request.video_timestamps not in (None, "none"):
        raise CheckpointError(
            f"video_timestamps={request.video_timestamps!r} would be new to a model of the method's authors, whose "
            "frames have no times. Leave it out."
        )
    if request.mapping is not None and not is_of_authors(folder) and _is_known(folder):
        raise CheckpointError(
            f"mapping={str(request.mapping)!r} is for checkpoints in the format of the method's authors, but the "
            f"names of {folder} are known. Leave out mapping."
        )


def _is_known(folder: Path) -> bool:
    try:
        read_config(folder)
    except CheckpointError:
        return False
    return True


def _open_vision(request: ConversionRequest, folder: Path, source_config: PreTrainedConfig) -> Source | None:
    """The checkpoint that gives a text-only source its vision tower."""
    backbone = SOURCE_BACKBONES.get(source_config.model_type)  # None for a CASA checkpoint
    text_only = backbone is not None and backbone.text_only
    if text_only and request.vision_from is None:
        raise CheckpointError(
            f"{folder} (model_type {source_config.model_type!r}) is text-only. Give the checkpoint whose vision tower "
            "it gets as vision_from."
        )
    if not text_only and request.vision_from is not None:
        raise CheckpointError(
            f"vision_from={str(request.vision_from)!r} is for text-only sources, but {folder} (model_type "
            f"{source_config.model_type!r}) has a vision tower. Leave out vision_from."
        )
    if not text_only and request.image_delimiters is not None:
        raise CheckpointError(
            f"image_delimiters={request.image_delimiters!r} is for text-only sources, but {folder} (model_type "
            f"{source_config.model_type!r}) has delimiters. Leave out image_delimiters."
        )
    return None if request.vision_from is None else Source.open(request.vision_from, None, PROCESSOR_FILES)


def _checked_config(
    request: ConversionRequest, folder: Path, source_config: PreTrainedConfig, vision: Source | None
) -> tuple[CasaConfig, int]:
    """As `_new_config`; what a configuration class runs into is explained."""
    try:
        return _new_config(request, source_config, vision)
    except Exception as error:
        if isinstance(error, ValueError) and "\n" not in str(error):
            raise  # of the design, or of what CASA has no form for
        raise CheckpointError(
            f"{folder / 'config.json'} has a setting that can't be used ({type(error).__name__}: {one_line(error)}). "
            "Use the config.json that belongs to the weights."
        ) from error


def _new_config(
    request: ConversionRequest, source_config: PreTrainedConfig, vision: Source | None
) -> tuple[CasaConfig, int]:
    """The new configuration, still without new tokens, and how many gist tokens it is to have."""
    own = source_config if isinstance(source_config, CasaConfig) else None
    text_config = getattr(source_config, "text_config", source_config)
    blocks = BACKBONES[text_config.model_type].fusable_blocks(text_config)
    fields = resolve_design(request.variant, request.design, blocks, own)
    num_gist_tokens = fields.pop("num_gist_tokens")
    if request.video_timestamps is not None:
        fields["video_timestamps"] = None if request.video_timestamps == "none" else request.video_timestamps
    if own is not None:
        if num_gist_tokens != own.num_gist_tokens and "num_gist_tokens" in request.design:
            raise CheckpointError(
                f"num_gist_tokens={num_gist_tokens} differs from the {own.num_gist_tokens} gist tokens that the CASA "
                "checkpoint has. Leave out num_gist_tokens, or convert the source with it."
            )
        config = CasaConfig.from_dict(copy.deepcopy(own).to_dict() | fields)
        num_gist_tokens = own.num_gist_tokens
    elif vision is not None:
        vision_config = read_vision_config(vision.folder, source_config)
        # The id of the image token is known only when the tokenizer has it.
        fields |= {"vision_config": vision_config, "image_token_id": 0}
        config = CasaConfig.from_source(copy.deepcopy(source_config), **fields)
    else:
        config = CasaConfig.from_source(copy.deepcopy(source_config), **fields)
    config.architectures = ["CasaForConditionalGeneration"]
    return config, num_gist_tokens


def _set_tokens(config: CasaConfig, processor: CasaProcessor) -> tuple[int, ...]:
    """Tell a configuration the tokens of its processor; the ids of those that the source didn't have."""
    if config.backbone.text_only:
        config.image_token_id = processor.image_token_id
        config.vision_start_token_id = processor.vision_start_token_id
        config.vision_end_token_id = None if config.vision_start_token_id is None else config.image_token_id
    config.new_tokens = processor.new_tokens
    config.gist_token_ids = processor.gist_token_ids or None
    config.num_gist_tokens = len(processor.gist_token_ids)
    new = config.new_token_ids
    if new:
        text = config.text_config
        config.source_config = {**(config.source_config or {}), "vocab_size": text.vocab_size}
        text.vocab_size = max(text.vocab_size, *(index + 1 for index in new))
    config.validate_design()
    return new


def _vision_tensors(vision: Source, config: CasaConfig) -> dict[str, StoredTensor]:
    """The vision tower's tensors of a checkpoint, by in-memory name."""
    named = {config.backbone.in_memory_name(name): tensor for name, tensor in vision.tensors().items()}
    return {name: tensor for name, tensor in named.items() if name.startswith(VISION)}


# ---------------------------------------------------------------- what is written besides weights


def _card(prepared: _Prepared, output: str, with_code: bool) -> str:
    request = prepared.request
    variant = request.variant or (None if prepared.own else "casa")
    return model_card(
        prepared.config,
        prepared.plan,
        variant=variant or "casa",
        origins=[licensed(source.folder) for source in prepared.sources],
        from_casa=prepared.own is not None,
        command=request.command(output, variant, with_code),
        model=output,
        new_tokens=() if prepared.own else tuple(prepared.processor.new_tokens),
        cast_to=request.dtype_name,
        with_code=with_code,
    )


def _record_origins(prepared: _Prepared) -> None:
    """Record in the configuration where the source comes from; one from an unpublished CASA model knows already."""
    origins = [licensed(source.folder) for source in prepared.sources]
    if not (prepared.own and prepared.config.source_origins and not origins[0][0].on_hub):
        prepared.config.source_origins = origin_records(origins)


def _copied_files(prepared: _Prepared) -> list[tuple[Path, str]]:
    """Files that the new checkpoint takes over byte for byte, and their names there."""
    folder = prepared.source.folder
    templates = template_files(folder)
    changed = () if prepared.own else changed_files(prepared.config, templates)
    names = []
    if prepared.names is None:  # else the tokenizer's may ask for code
        names = [(name, SOURCE_PREFIX + name if name in changed else name) for name in (*TOKENIZER_FILES, *templates)]
    if prepared.own is not None:
        names += [(name, name) for name in kept_files(folder)]
    files = [(own_file(folder, name), new) for name, new in (*names, *((name, name) for name in OTHER_FILES))]
    files += [(file, file.name) for file in license_files(folder)]
    if prepared.vision is not None:
        files += [(file, f"{file.stem}-vision{file.suffix}") for file in license_files(prepared.vision.folder)]
    return [(file, name) for file, name in files if file.is_file()]


def changed_files(config: CasaConfig, templates: tuple[str, ...]) -> tuple[str, ...]:
    """Those of the tokenizer's files, and of the source's chat templates, that are no longer the source's."""
    if config.backbone.text_only:
        return TOKENIZER_FILES + templates
    return TOKENIZER_FILES if config.new_token_ids else ()
