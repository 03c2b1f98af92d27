# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""To a CASA checkpoint, file to file: from a token-insertion checkpoint, or from a CASA checkpoint of another design.

Everything is read and checked first: configuration, processor, and the header of every weight file. Then the new
checkpoint is written into a temporary folder beside its destination and moved there in one step. No model is ever
filled with weights.
"""

from __future__ import annotations

import copy
import os
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig

from ..backbones import BACKBONES
from ..checkpoint_files.config import read_source_config
from ..checkpoint_files.destination import check_output, new_folder
from ..checkpoint_files.download import SMALL_FILES, WEIGHT_FILES, download, hub_id
from ..checkpoint_files.errors import ConversionError, one_line
from ..checkpoint_files.names import (
    CARRIED_FILES,
    KEPT,
    OTHER_FILES,
    PROCESSOR_FILES,
    SOURCE_ROWS_FILE,
    TEMPLATE_FILES,
    TOKENIZER_FILES,
)
from ..checkpoint_files.shards import DTYPE_CODES, DTYPES, Progress, StoredTensor, read_checkpoint, write_checkpoint
from ..checkpoint_files.unchanged import FileState, check_unchanged, folder_state
from ..configuration_casa import CasaConfig
from ..design_space import SETTINGS, Setting
from ..folder_files import check_json
from ..hub.card import Origin, license_files, model_card, origin_records, read_license, untrained_effect
from ..hub.remote_code import add_code
from ..processing_casa import CasaProcessor
from .design import resolve_design
from .mapping import VISION, in_memory_name, map_tensors, stock_shapes
from .plan import ConversionPlan, kinds_of_dropped, make_plan
from .source import load_processor, read_vision_config, stock_config

MAX_SHARD_SIZE = "5GB"


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion has made.

    Attributes:
        output: folder of the new checkpoint.
        config: its configuration.
        source_parameters: number of parameters taken over.
        added_parameters: number of new parameters.
        num_bytes: size of all weights.
        added: name of each new tensor -> name of the tensor that it starts as a copy of.
        initialised: name of each tensor that is new, or has new rows, and copies nothing -> how these start.
        dropped: name of each source tensor that is left out -> why.
        note: what the new model does before any training, in sentences.
    """

    output: Path
    config: PreTrainedConfig
    source_parameters: int
    added_parameters: int
    num_bytes: int
    added: dict[str, str]
    initialised: dict[str, str]
    dropped: dict[str, str]
    note: str

    @property
    def left_out(self) -> list[str]:
        """What was left out of the source, a line for each kind of tensors."""
        return kinds_of_dropped(self.dropped)

    @classmethod
    def of(cls, plan: ConversionPlan, output: Path) -> ConversionReport:
        """The report of a plan that has been carried out."""
        return cls(
            output=output,
            config=plan.config,
            source_parameters=plan.source_parameters,
            added_parameters=plan.added_parameters,
            num_bytes=plan.num_bytes,
            added=plan.added,
            initialised=plan.initialised,
            dropped=plan.dropped,
            note=plan.note,
        )


@dataclass(frozen=True)
class _Prepared:
    """A conversion that has been checked.

    Attributes:
        plan: what will be written as weights.
        config: of the new checkpoint.
        processor: of the new checkpoint.
        folder: of the source.
        vision_folder: of the checkpoint that gives a text-only source its vision tower.
        from_casa: whether the source is a CASA checkpoint.
        new_tokens: tokens that the source's tokenizer hasn't.
        small_files: states of what else than weights was read.
    """

    plan: ConversionPlan
    config: CasaConfig
    processor: CasaProcessor
    folder: Path
    vision_folder: Path | None
    from_casa: bool
    new_tokens: tuple[str, ...]
    small_files: dict[Path, dict[Path, FileState]]


def convert_checkpoint(
    source: str | Path,
    output: str | Path,
    variant: str | None = None,
    *,
    vision_from: str | Path | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    max_pixels: int | None = None,
    overwrite: bool = False,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    with_code: bool = False,
    progress: Progress | None = None,
    **design: Any,
) -> ConversionReport:
    """Write the CASA form of a token-insertion checkpoint, or of a CASA checkpoint of another design.

    Weights are streamed from safetensors to safetensors; a few megabytes of them are in memory at a time. Pickled
    weights are never loaded. From one design to another only what the new one lacks is made, as from a source; a
    conversion that would lose trained tensors is refused.

    Args:
        source: a local folder, or a Hub id, which is downloaded into the Hub's cache.
        output: folder to make.
        variant: a key of `VARIANTS`, such as "ca" or "casa-shared"; None for "casa", or for the design that a CASA
            checkpoint has.
        vision_from: folder or Hub id of the checkpoint whose vision tower a text-only source gets; for those only.
        dtype: "float32", "bfloat16", ... to cast the weights to; None to keep each as it is.
        revision: branch, tag or commit of a Hub id.
        max_pixels: largest number of pixels of an image; None for the design's default.
        overwrite: whether an existing checkpoint at `output` may be replaced. It stays until the new one is complete.
        max_shard_size: bytes of weights per file, as a number or such as "5GB".
        with_code: whether the checkpoint carries the code that it runs with, so that `trust_remote_code=True` loads it
            where casa_hf isn't installed.
        progress: called with (bytes of weights written so far, bytes in all).
        **design: design fields of `CasaConfig` that differ from the variant, such as `casa_keys="image"`;
            `casa_layers` may be a list, or as in `layer_indices` "every:2", "4,8,12", "last:8" or "all".

    Raises:
        ConversionError: for a source that can't be converted, an output that can't be written, both the same, or an
            option that can't be used. The message is one line that says what to do.
        ValueError: for an unknown variant or design, or a source whose settings CASA has no form for.
    """
    destination = check_output(output, overwrite, source, vision_from)
    prepared = _prepare(source, variant, design, vision_from, dtype, revision, max_pixels, max_shard_size)
    plan, config = prepared.plan, prepared.config
    code = dtype_code(dtype)
    if not prepared.from_casa:
        variant = variant or "casa"
    card = model_card(
        config,
        variant=variant or "casa",
        origin=Origin.of(prepared.folder.absolute()),
        folder=prepared.folder,
        vision_origin=None if prepared.vision_folder is None else Origin.of(prepared.vision_folder.absolute()),
        vision_folder=prepared.vision_folder,
        from_casa=prepared.from_casa,
        note=plan.note,
        command=_command(
            source, output, variant, vision_from, code, revision, max_pixels, max_shard_size, with_code, design
        ),
        model=str(output),
        source_parameters=plan.source_parameters,
        added_parameters=plan.added_parameters,
        initialised=plan.initialised,
        new_tokens=prepared.new_tokens,
        cast_to=None if code is None else _dtype_name(code),
        with_code=with_code,
    )
    _record_origins(config, prepared)
    with new_folder(destination, plan.num_bytes) as new:
        config.save_pretrained(new)
        GenerationConfig.from_model_config(config).save_pretrained(new)
        prepared.processor.save_pretrained(new)
        for file, name in _copied_files(prepared):
            shutil.copyfile(file, new / name)
        (new / "README.md").write_text(card, encoding="utf-8")
        write_checkpoint(new, plan.files, progress)
        if plan.source_rows:
            write_checkpoint(new, {SOURCE_ROWS_FILE: list(plan.source_rows)})
        if with_code:
            add_code(new)
        check_small_files(prepared.small_files)
    return ConversionReport.of(plan, Path(os.path.abspath(output)))


def plan_conversion(
    source: str | Path,
    variant: str | None = None,
    *,
    vision_from: str | Path | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    max_pixels: int | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    **design: Any,
) -> ConversionPlan:
    """What `convert_checkpoint` would write; nothing is written, but a Hub id is downloaded.

    Args:
        source, variant, ...: see `convert_checkpoint`.

    Raises:
        ConversionError, ValueError: as `convert_checkpoint`.
    """
    return _prepare(source, variant, design, vision_from, dtype, revision, max_pixels, max_shard_size).plan


# ---------------------------------------------------------------- preparation


def _prepare(
    source: str | Path,
    variant: str | None,
    design: Mapping[str, Any],
    vision_from: str | Path | None,
    dtype: str | torch.dtype | None,
    revision: str | None,
    max_pixels: int | None,
    max_shard_size: int | str,
) -> _Prepared:
    code = dtype_code(dtype)
    folder, load_weights = open_source(source, revision)
    small_files = {folder: folder_state(folder, SMALL_FILES)}
    source_config = read_source_config(folder)
    check_json(folder, CARRIED_FILES, ConversionError)
    text_only = not isinstance(source_config, CasaConfig) and getattr(source_config, "vision_config", None) is None
    if text_only != (vision_from is not None):
        needs = "is text-only and needs" if text_only else "isn't text-only and takes no"
        raise ConversionError(
            f"{folder} (model_type {source_config.model_type!r}) {needs} vision_from, the checkpoint "
            "that gives its vision tower."
        )
    vision_folder, load_vision = (None, None) if vision_from is None else open_source(vision_from, None)
    if vision_folder is not None:
        small_files[vision_folder] = folder_state(vision_folder, SMALL_FILES)
        check_json(vision_folder, PROCESSOR_FILES, ConversionError)

    try:
        config, num_gist_tokens = _new_config(source_config, variant, design, vision_folder)
    except Exception as error:
        if isinstance(error, ValueError) and "\n" not in str(error):
            raise  # of the design, or of what CASA has no form for
        raise ConversionError(
            f"{folder / 'config.json'} has a setting that can't be used ({type(error).__name__}: {one_line(error)}). "
            "Use the config.json that belongs to the weights."
        ) from error
    own = source_config if isinstance(source_config, CasaConfig) else None
    processor = load_processor(
        folder,
        config,
        vision_folder=vision_folder,
        max_pixels=max_pixels,
        num_gist_tokens=num_gist_tokens,
        own=own,
    )
    new_token_ids = _set_tokens(config, processor) if own is None else []

    load_weights()
    stored = read_checkpoint(folder)
    if vision_folder is not None and load_vision is not None:
        load_vision()
        stored |= _vision_tensors(vision_folder, config)
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
        dtype=code,
        max_shard_size=max_shard_size,
        note=untrained_effect(config, own),
    )
    new_tokens = tuple(processor.tokenizer.convert_ids_to_tokens(new_token_ids))
    return _Prepared(plan, config, processor, folder, vision_folder, own is not None, new_tokens, small_files)


def open_source(source: str | Path, revision: str | None) -> tuple[Path, Any]:
    """The folder with the small files of a checkpoint, and a function that makes sure of its weights."""
    repository = hub_id(source, revision)
    if repository is None:
        return Path(source), lambda: None
    folder = download(repository, revision, SMALL_FILES)
    return folder, lambda: download(repository, folder.name, WEIGHT_FILES)


def check_small_files(states: Mapping[Path, dict[Path, FileState]]) -> None:
    """Compare the small files of folders with what was there in the beginning.

    Raises:
        ConversionError: naming one that has changed.
    """
    for folder, before in states.items():
        check_unchanged(before, folder_state(folder, SMALL_FILES))


def _new_config(
    source_config: PreTrainedConfig, variant: str | None, design: Mapping[str, Any], vision_folder: Path | None
) -> tuple[CasaConfig, int]:
    """The new configuration, still without new tokens, and how many gist tokens it is to have."""
    own = source_config if isinstance(source_config, CasaConfig) else None
    text_config = getattr(source_config, "text_config", source_config)
    blocks = BACKBONES[text_config.model_type].fusable_blocks(text_config)
    fields = resolve_design(variant, design, blocks, own)
    num_gist_tokens = fields.pop("num_gist_tokens")
    source_config = copy.deepcopy(source_config)
    if isinstance(source_config, CasaConfig):
        if "num_gist_tokens" in design and num_gist_tokens != source_config.num_gist_tokens:
            raise ConversionError(
                f"num_gist_tokens={num_gist_tokens}, but the checkpoint has {source_config.num_gist_tokens}. Gist "
                "tokens come with the conversion of a source; leave the option out."
            )
        config = CasaConfig.from_dict(source_config.to_dict() | fields)
        num_gist_tokens = config.num_gist_tokens
    elif vision_folder is not None:
        vision_config = read_vision_config(vision_folder, source_config)
        # The id of the image token is known only when the tokenizer has it.
        config = CasaConfig.from_source(source_config, vision_config=vision_config, image_token_id=0, **fields)
    else:
        config = CasaConfig.from_source(source_config, **fields)
    config.architectures = ["CasaForConditionalGeneration"]
    return config, num_gist_tokens


def _set_tokens(config: CasaConfig, processor: CasaProcessor) -> list[int]:
    """Make a configuration know the tokens of its processor; the ids of those that the source didn't have."""
    new = list(processor.gist_token_ids)
    if config.backbone.text_only:
        config.image_token_id = processor.image_token_id
        new.insert(0, processor.image_token_id)
    config.gist_token_ids = processor.gist_token_ids or None
    config.num_gist_tokens = len(processor.gist_token_ids)
    if new:
        text = config.text_config
        config.source_config = {**(config.source_config or {}), "vocab_size": text.vocab_size}
        text.vocab_size = max(text.vocab_size, *(index + 1 for index in new))
    config.validate_design()
    return new


def _vision_tensors(folder: Path, config: CasaConfig) -> dict[str, StoredTensor]:
    """The vision tower's tensors of a checkpoint, by in-memory name."""
    named = {in_memory_name(name, config.backbone): tensor for name, tensor in read_checkpoint(folder).items()}
    return {name: tensor for name, tensor in named.items() if name.startswith(VISION)}


def _record_origins(config: CasaConfig, prepared: _Prepared) -> None:
    """Let the configuration tell where the source comes from; one from an unpublished CASA model knows already."""
    folders = [folder for folder in (prepared.folder, prepared.vision_folder) if folder is not None]
    origins = [(Origin.of(folder.absolute()), read_license(folder)) for folder in folders]
    if not (prepared.from_casa and config.source_origins and not origins[0][0].on_hub):
        config.source_origins = origin_records(origins)


def _copied_files(prepared: _Prepared) -> list[tuple[Path, str]]:
    """Files that the new checkpoint takes over byte for byte, and their names there."""
    changed = changed_files(prepared.config) if prepared.new_tokens else ()
    folder = prepared.folder
    files = [
        (folder / name, KEPT + name if name in changed else name)
        for name in (*TOKENIZER_FILES, *TEMPLATE_FILES, *OTHER_FILES)
    ]
    if prepared.from_casa:
        files += [(file, file.name) for file in sorted(folder.glob(f"{KEPT}*"))]
    files += [(file, file.name) for file in license_files(folder)]
    if prepared.vision_folder is not None:
        files += [(file, f"{file.stem}-vision{file.suffix}") for file in license_files(prepared.vision_folder)]
    return [(file, name) for file, name in files if file.is_file()]


def changed_files(config: CasaConfig) -> tuple[str, ...]:
    """The tokenizer's files that are no longer the source's if there are new tokens."""
    return TOKENIZER_FILES + TEMPLATE_FILES if config.backbone.text_only else TOKENIZER_FILES


# ---------------------------------------------------------------- options


def dtype_code(dtype: str | torch.dtype | None) -> str | None:
    """The key of `DTYPES` that a dtype or its name has, None for None.

    Raises:
        ConversionError: if it is no number format of weights.
    """
    if dtype is None:
        return None
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if resolved not in DTYPE_CODES:
        known = ", ".join(map(_dtype_name, DTYPES))
        raise ConversionError(f"dtype={dtype!r} is unknown; choose one of {known}, or None to keep the source's.")
    return DTYPE_CODES[resolved]


def _dtype_name(code: str) -> str:
    return str(DTYPES[code]).removeprefix("torch.")


def _command(
    source: str | Path,
    output: str | Path,
    variant: str | None,
    vision_from: str | Path | None,
    code: str | None,
    revision: str | None,
    max_pixels: int | None,
    max_shard_size: int | str,
    with_code: bool,
    design: Mapping[str, Any],
) -> str:
    options = {
        "vision-from": vision_from,
        "dtype": None if code is None else _dtype_name(code),
        "revision": revision,
        "max-pixels": max_pixels,
        "max-shard-size": None if max_shard_size == MAX_SHARD_SIZE else max_shard_size,
    }
    words = ["casa-hf", "convert", str(source), str(output)]
    if variant is not None:
        words += ["--variant", variant]
    for setting in SETTINGS:
        if setting.field in design:
            words += _design_words(setting, design[setting.field])
    for option, value in options.items():
        if value is not None:
            words += [f"--{option}", str(value)]
    if with_code:
        words.append("--with-code")
    return shlex.join(words)


def _design_words(setting: Setting, value: Any) -> list[str]:
    """The command line's option for a design field."""
    if isinstance(value, bool):
        return [setting.option if value else setting.option.replace("--", "--no-", 1)]
    if setting.field == "casa_layers" and not isinstance(value, str):
        value = "all" if value is None else ",".join(map(str, value))
    return [setting.option, "none" if value is None else str(value)]
