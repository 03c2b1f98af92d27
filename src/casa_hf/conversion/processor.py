# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The processor of a new checkpoint, made from that of the source."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.models.auto.image_processing_auto import AutoImageProcessor

from ..checkpoint_files.names import PROCESSOR_FILES
from ..checks import one_line
from ..configuration_casa import CasaConfig
from ..folder_files import CheckpointError, read_json
from ..patches_casa import normalization_of
from ..placeholders import DelimiterError
from ..processing_casa import CasaProcessor
from ..temporal_patches import ALL_FRAMES


def load_processor(
    folder: Path,
    config: CasaConfig,
    *,
    vision_folder: Path | None = None,
    image_delimiters: str | Sequence[str] | None = None,
    max_pixels: int | None = None,
    num_gist_tokens: int = 0,
    own: CasaConfig | None = None,
) -> CasaProcessor:
    """The processor of the CASA form of the checkpoint in `folder`.

    Args:
        folder: Folder of the checkpoint.
        config: Configuration of its CASA form.
        vision_folder: Folder of the checkpoint whose image processor a text-only source gets.
        image_delimiters: Tokens around an image in a text-only source; None for the default.
        max_pixels: Largest number of pixels of an image; None for the design's default.
        num_gist_tokens: Number of gist tokens to add to the tokenizer.
        own: Configuration of the checkpoint if it is a CASA checkpoint, whose processor is taken over.

    Raises:
        CheckpointError: if the files of tokenizer or image processor are missing or unusable, or if `max_pixels` is
            below the smallest image.
        DelimiterError: if the source's texts or turns have these delimiters already.
    """
    _check_files(folder, vision_folder or folder)
    frames_per_image = native_frames(config)
    options: dict[str, Any] = {"num_gist_tokens": num_gist_tokens, **processor_limits(config)}
    if max_pixels is not None:
        options["max_pixels"] = None  # the design's default mustn't stand in the way
    restored = {} if own is None else _restored_sizes(folder, config, own)
    if own is not None and config.casa_video_layout != own.casa_video_layout:
        restored["frames_per_image"] = frames_per_image
    try:
        if own is not None:
            processor = CasaProcessor.from_pretrained(folder, **restored)
        elif vision_folder is not None:
            options |= {} if image_delimiters is None else {"image_delimiters": image_delimiters}
            processor = CasaProcessor.from_text_source(folder, vision_folder, **options)
        else:
            processor = CasaProcessor.from_source(folder, frames_per_image=frames_per_image, **options)
    except DelimiterError:
        raise
    except Exception as error:  # tokenizers raises plain exceptions
        raise CheckpointError(
            f"The tokenizer or image processor in {folder} can't be loaded ({one_line(error)}). Get the files that "
            "belong to the checkpoint."
        ) from error
    if max_pixels is not None:
        _limit_pixels(processor, max_pixels)
    return processor


def _check_files(folder: Path, vision_folder: Path) -> None:
    has_vocabulary = (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    if not has_vocabulary and not (folder / "tokenizer.json").is_file():
        raise CheckpointError(
            f"{folder} has no tokenizer (tokenizer.json, or vocab.json and merges.txt). Add the files that belong to "
            "the checkpoint."
        )
    if not any((vision_folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        raise CheckpointError(
            f"{vision_folder} has no image processor (preprocessor_config.json). Add the file that belongs to the "
            "checkpoint."
        )


def source_processor_files(file: Path) -> dict[str, dict]:
    """The contents of the source's processor files by file name, from `processor_config.json` of a CASA checkpoint.

    Other names are ignored: these files are written, and a name from a download mustn't lead out of their folder.
    """
    kept = read_json(file).get("source_config") or {}
    if not isinstance(kept, dict) or not all(isinstance(kept.get(name, {}), dict) for name in PROCESSOR_FILES):
        raise CheckpointError(
            f"{file} must hold the source's processor files in source_config, but holds something else. Copy it from "
            "the checkpoint that the conversion made."
        )
    return {name: kept[name] for name in PROCESSOR_FILES if name in kept}


def native_frames(config: CasaConfig) -> int | str:
    """Number of video frames of an image in the layout that a configuration names."""
    if config.has_whole_videos:
        return ALL_FRAMES
    return config.vision_config.temporal_patch_size if config.casa_video_layout == "native" else 1


def processor_limits(config: CasaConfig) -> dict[str, None]:
    """Options of `CasaProcessor.from_source`: a variant that is to equal its source keeps the source's image sizes."""
    return {"max_pixels": None, "frame_max_pixels": None} if config.casa_positions == "insertion" else {}


def keep_normalization(config: CasaConfig, processor: CasaProcessor) -> None:
    """Let a configuration say how the processor normalises, where that isn't what its tower's published checkpoints
    do; the model does it to 8-bit pixels."""
    stated = normalization_of(processor.image_processor)
    if stated is not None and stated != config.normalization:
        config.image_mean, config.image_std = map(list, stated)


def _limit_pixels(processor: CasaProcessor, max_pixels: int) -> None:
    images = processor.image_processor
    smallest = images.size["shortest_edge"]
    if max_pixels < smallest:
        raise CheckpointError(
            f"max_pixels={max_pixels} is below {smallest}, the pixels of the smallest image that the source's image "
            f"processor makes. Give {smallest} or more."
        )
    size = {"shortest_edge": smallest, "longest_edge": max_pixels}
    processor.image_processor = type(images).from_dict(images.to_dict(), size=size)


def _restored_sizes(folder: Path, config: CasaConfig, own: CasaConfig) -> dict[str, Any]:
    """Options of `CasaProcessor.from_pretrained`: the source's sizes where `config` keeps them and `own` doesn't."""
    if not processor_limits(config) or processor_limits(own):
        return {}
    file = folder / "processor_config.json"
    files = source_processor_files(file) if file.is_file() else {}
    if not files:
        raise CheckpointError(
            f"{file} has no source_config, so the image sizes of the source, which this design keeps, aren't known. "
            "Convert the source that the checkpoint was made from."
        )
    with tempfile.TemporaryDirectory() as temporary:
        for name, content in files.items():
            Path(temporary, name).write_text(json.dumps(content), encoding="utf-8")
        size = AutoImageProcessor.from_pretrained(temporary).size
    return {"size": {edge: size[edge] for edge in ("shortest_edge", "longest_edge")}, "frame_max_pixels": None}
