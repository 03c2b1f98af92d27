# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Whether a folder can be published: it is read as by its users, except for the values of its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GenerationConfig

from ..checkpoint_files.config import read_casa_config
from ..checkpoint_files.names import (
    LICENSE_FILES,
    PROCESSOR_FILES,
    RELEASED_NAMES_FILE,
    SOURCE_PREFIX,
    SOURCE_ROWS_FILE,
    TEMPLATE_FILES,
    TEMPLATE_FOLDER,
    TOKENIZER_FILES,
)
from ..checkpoint_files.shards import INDEX_FILE, SINGLE_FILE, read_checkpoint
from ..checks import listed, one_line
from ..configuration_casa import CasaConfig
from ..folder_files import CheckpointError, check_json, own_file, read_json
from ..modeling_casa import CasaForConditionalGeneration
from ..processing_casa import CasaProcessor
from ..temporal_patches import ALL_FRAMES
from .remote_code import has_code, modelling_files
from .repositories import CARD

# What belongs to a checkpoint besides its weights; optimizer states, logs and the like stay at home.
CHECKPOINT_FILES = (
    "config.json",
    "generation_config.json",
    *PROCESSOR_FILES,
    *TOKENIZER_FILES,
    *TEMPLATE_FILES,
    f"{TEMPLATE_FOLDER}/*.jinja",
    *(SOURCE_PREFIX + name for name in (*TOKENIZER_FILES, *TEMPLATE_FILES, f"{TEMPLATE_FOLDER}/*.jinja")),
    SOURCE_ROWS_FILE,
    RELEASED_NAMES_FILE,
)


@dataclass(frozen=True)
class PublishableCheckpoint:
    """A folder that has been checked.

    Attributes:
        folder: Folder of the checkpoint.
        config: Configuration of the model.
        files: Files by name in the repository, without the model card.
        left_out: Names of what else is in the folder.
        num_bytes: Size of `files` in bytes.
    """

    folder: Path
    config: CasaConfig
    files: dict[str, Path]
    left_out: tuple[str, ...]
    num_bytes: int


def check_checkpoint(folder: str | Path) -> PublishableCheckpoint:
    """Read a checkpoint folder as its users will, except for the values of its weights.

    Args:
        folder: Folder of a CASA checkpoint, as `convert_checkpoint`, `save_pretrained` of model and processor, or a
            Trainer with `processing_class=processor` writes it.

    Raises:
        CheckpointError: if something is missing, broken, or doesn't fit together.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder. Give the folder of a CASA checkpoint.")
    if not (folder / "config.json").is_file() and (folder / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{folder} holds a PEFT adapter without its model. Merge it (`merge_and_unload`) and save the result with "
            "save_pretrained, or push the adapter itself with PEFT."
        )
    config = read_casa_config(folder)
    _check_generation_config(folder)
    check_json(folder, CHECKPOINT_FILES)
    processor = _load_processor(folder)
    _check_chat_template(folder, processor)
    _check_tokens(folder, config, processor)
    files = _files(folder, _check_weights(folder, config))
    sent = {name.split("/")[0] for name in files} | {CARD}
    others = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir() if entry.name not in sent)
    num_bytes = sum(file.stat().st_size for file in files.values())
    return PublishableCheckpoint(folder, config, files, tuple(others), num_bytes)


def _check_generation_config(folder: Path) -> None:
    file = folder / "generation_config.json"
    if not file.is_file():
        raise CheckpointError(f"{folder} has no {file.name}. Write it with model.generation_config.save_pretrained.")
    read_json(file)
    try:
        GenerationConfig.from_pretrained(folder)
    except Exception as error:  # of values that don't go together
        raise CheckpointError(
            f"{file.name} in {folder} can't be used ({one_line(error)}). Write it again with "
            "model.generation_config.save_pretrained."
        ) from error


def _load_processor(folder: Path) -> CasaProcessor:
    for name in ("processor_config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{folder} has no processor ({name} is missing). Write it there with processor.save_pretrained, or "
                "give the Trainer processing_class=processor."
            )
    try:
        return CasaProcessor.from_pretrained(folder)
    except Exception as error:  # tokenizers raises plain exceptions
        raise CheckpointError(
            f"The processor in {folder} can't be loaded ({one_line(error)}). Write it again with "
            "processor.save_pretrained."
        ) from error


def _check_chat_template(folder: Path, processor: CasaProcessor) -> None:
    if processor.chat_template is None:
        return
    try:
        processor.apply_chat_template([{"role": "user", "content": [{"type": "text", "text": "Hello"}]}])
    except Exception as error:  # of Jinja, or whatever the template runs into
        raise CheckpointError(
            f"The chat template in {folder} fails on a user's text ({one_line(error)}). Correct it, or write the "
            "source's with processor.save_pretrained."
        ) from error


def _check_tokens(folder: Path, config: CasaConfig, processor: CasaProcessor) -> None:
    """Refuse a model and a processor that have different tokens."""
    pairs = {
        "image_token_id": (config.image_token_id, processor.image_token_id),
        "vision_start_token_id": (config.vision_start_token_id, processor.vision_start_token_id),
        "gist_token_ids": (config.gist_token_ids or [], processor.gist_token_ids),
        "video_timestamps": (config.video_timestamps, processor.video_timestamps),
        "whether a whole video is one image": (config.has_whole_videos, processor.frames_per_image == ALL_FRAMES),
    }
    for name, (of_model, of_processor) in pairs.items():
        if of_model != of_processor:
            raise CheckpointError(
                f"Model and processor in {folder} don't belong together: {name} is {of_model} in config.json and "
                f"{of_processor} in the processor. Save both from the same checkpoint."
            )
    if len(processor.tokenizer) > config.text_config.vocab_size:
        raise CheckpointError(
            f"Model and processor in {folder} don't belong together: the tokenizer has {len(processor.tokenizer)} "
            f"tokens, the model embeds {config.text_config.vocab_size}. Save both from the same checkpoint."
        )


def _check_weights(folder: Path, config: CasaConfig) -> set[str]:
    """Names of the weight files, whose tensors are those of the model."""
    stored = read_checkpoint(folder)
    if (folder / SINGLE_FILE).is_file() and (folder / INDEX_FILE).is_file():
        raise CheckpointError(
            f"{folder} holds weights twice, as {SINGLE_FILE} and as shards with {INDEX_FILE}. Remove the older ones."
        )
    try:
        with torch.device("meta"):
            model = CasaForConditionalGeneration(config)
    except Exception as error:  # such as the KeyError of an unknown rope_type
        raise CheckpointError(
            f"No model can be built from config.json in {folder} ({type(error).__name__}: {one_line(error)}). Save "
            "the model again with save_pretrained."
        ) from error
    found = {name: list(tensor.shape) for name, tensor in stored.items()}
    in_memory = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    in_file = config.backbone.as_stored(in_memory, {name: tensor.shape for name, tensor in stored.items()})
    wanted = {name: list(shape) for name, shape in in_file.items()}
    tied = model.all_tied_weights_keys if config.tie_word_embeddings else ()
    wrong = sorted(
        f"{name} ({found.get(name, 'none')} instead of {wanted.get(name, 'none')})"
        for name in found.keys() | wanted.keys()
        if found.get(name) != wanted.get(name) and not (name in tied and name not in found)
    )
    if wrong:
        raise CheckpointError(
            f"The weights in {folder} aren't those of the model that config.json describes: {listed(wrong)}. Save the "
            "model again with save_pretrained."
        )
    names = {tensor.file.name for tensor in stored.values()}
    return names if SINGLE_FILE in names else names | {INDEX_FILE}


def _files(folder: Path, weights: set[str]) -> dict[str, Path]:
    patterns = (*CHECKPOINT_FILES, *LICENSE_FILES)
    names = weights | {
        file.relative_to(folder).as_posix() for pattern in patterns for file in folder.glob(pattern) if file.is_file()
    }
    if has_code(folder):
        names |= {file.name for file in modelling_files(folder)}
    return {name: own_file(folder, name) for name in sorted(names)}
