# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The source of a conversion: its parts, refused early, in one line, if they can't be converted."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from ..backbones import SOURCE_BACKBONES
from ..checkpoint_files.config import read_source_config
from ..checkpoint_files.errors import ConversionError, one_line
from ..checkpoint_files.names import PROCESSOR_FILES
from ..configuration_casa import SOURCE_MODEL_TYPE, CasaConfig
from ..folder_files import read_json
from ..processing_casa import CasaProcessor


def read_vision_config(folder: Path, config: PreTrainedConfig) -> PreTrainedConfig:
    """The vision configuration of the checkpoint that is to give a text-only source its vision tower.

    Args:
        folder: of that checkpoint.
        config: of the text-only source.

    Raises:
        ConversionError: if there is no such configuration, or if it is of another family than the source can be given.
    """
    backbone = SOURCE_BACKBONES[config.model_type]
    content = read_source_config(folder)
    vision = getattr(content, "vision_config", None)
    if isinstance(content, CasaConfig) or vision is None or vision.model_type not in backbone.towers:
        raise ConversionError(
            f"{folder} has model_type {content.model_type!r}; {backbone.display_name} takes the vision tower "
            f"of a source checkpoint, {' or '.join(backbone.towers)}. Give such a one."
        )
    return vision


def stock_config(config: CasaConfig, *, keep_tokens: bool = False) -> PreTrainedConfig:
    """The configuration of the source, with the language model and the vision tower of a CASA checkpoint.

    Args:
        config: of the CASA checkpoint.
        keep_tokens: whether the vocabulary keeps the tokens that the source hasn't.

    Raises:
        ConversionError: if the checkpoint doesn't tell what its source was.
    """
    if not config.source_config:
        raise ConversionError("config.json has no source_config, so the source's form isn't known; convert it anew.")
    kept = dict(config.source_config)
    model_type = kept.pop(SOURCE_MODEL_TYPE, config.backbone.source_model_type)
    text = {name: value for name, value in config.text_config.to_dict().items() if name != "model_type"}
    vocab_size = kept.pop("vocab_size", text["vocab_size"])
    if not keep_tokens:
        text["vocab_size"] = vocab_size
    fields: dict[str, Any] = {"text_config": text, "vision_config": config.vision_config.to_dict()}
    if config.backbone.text_only:
        fields = text
    fields |= {"tie_word_embeddings": config.tie_word_embeddings, "dtype": config.dtype}
    fields["architectures"] = kept.get("architectures") or [config.backbone.source_class]
    try:
        return CONFIG_MAPPING[model_type](**kept | fields)
    except Exception as error:  # whatever a configuration class runs into
        raise ConversionError(
            f"source_config in config.json makes no valid {model_type!r} configuration: {one_line(error)}. Get the "
            "config.json that the conversion wrote."
        ) from error


def load_processor(
    folder: Path,
    config: CasaConfig,
    *,
    vision_folder: Path | None = None,
    max_pixels: int | None = None,
    num_gist_tokens: int = 0,
    own: CasaConfig | None = None,
) -> CasaProcessor:
    """The processor of the CASA form of the checkpoint in `folder`.

    Args:
        folder: of the checkpoint.
        config: of its CASA form.
        vision_folder: for a text-only source, the checkpoint whose image processor it gets.
        max_pixels: largest number of pixels of an image; None for the design's default.
        num_gist_tokens: gist tokens to add to the tokenizer.
        own: configuration of the checkpoint if it is a CASA checkpoint, whose processor is taken over.

    Raises:
        ConversionError: if the files of tokenizer or image processor are missing or unusable, or if `max_pixels` is
            below the smallest image.
    """
    has_vocabulary = (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    if not has_vocabulary and not (folder / "tokenizer.json").is_file():
        raise ConversionError(
            f"{folder} has no tokenizer (tokenizer.json, or vocab.json and merges.txt). Add the files that belong to "
            "the checkpoint."
        )
    pixels_folder = vision_folder or folder
    if not any((pixels_folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        raise ConversionError(
            f"{pixels_folder} has no image processor (preprocessor_config.json). Add the file that belongs to the "
            "checkpoint."
        )
    options: dict[str, Any] = {"num_gist_tokens": num_gist_tokens, **processor_limits(config)}
    if max_pixels is not None:
        options["max_pixels"] = None  # the design's default mustn't stand in the way
    restored = {} if own is None else _restored_sizes(folder, config, own)
    try:
        if own is not None:
            processor = CasaProcessor.from_pretrained(folder, **restored)
        elif vision_folder is not None:
            processor = CasaProcessor.from_text_source(folder, vision_folder, **options)
        else:
            processor = CasaProcessor.from_source(folder, **options)
    except Exception as error:  # tokenizers raises plain exceptions
        raise ConversionError(
            f"The tokenizer or image processor in {folder} is unusable: {one_line(error)}"
        ) from error
    if max_pixels is not None:
        _limit_pixels(processor, max_pixels)
    return processor


def source_processor_files(file: Path) -> dict[str, dict]:
    """The contents of the source's processor files by file name, from `processor_config.json` of a CASA checkpoint.

    Other names are passed over: these files are written, and a name from a download mustn't lead out of their folder.
    """
    kept = read_json(file, ConversionError).get("source_config") or {}
    if not isinstance(kept, dict) or not all(isinstance(kept.get(name, {}), dict) for name in PROCESSOR_FILES):
        raise ConversionError(
            f"{file} should hold the source's processor files in source_config. Copy it from the checkpoint that the "
            "conversion made."
        )
    return {name: kept[name] for name in PROCESSOR_FILES if name in kept}


def processor_limits(config: CasaConfig) -> dict[str, None]:
    """Options of `CasaProcessor.from_source`: a variant that is to equal its source keeps the source's image sizes."""
    return {"max_pixels": None, "frame_max_pixels": None} if config.casa_positions == "insertion" else {}


def _limit_pixels(processor: CasaProcessor, max_pixels: int) -> None:
    images = processor.image_processor
    smallest = images.size["shortest_edge"]
    if max_pixels < smallest:
        raise ConversionError(
            f"max_pixels={max_pixels} is below {smallest}, the pixels of the smallest image that the "
            "source's image processor makes. Give at least that many."
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
        raise ConversionError(
            f"{file} has no source_config, so the image sizes of the source, which this design keeps, aren't known. "
            "Convert the source that the checkpoint was made from."
        )
    with tempfile.TemporaryDirectory() as temporary:
        for name, content in files.items():
            Path(temporary, name).write_text(json.dumps(content), encoding="utf-8")
        size = AutoImageProcessor.from_pretrained(temporary).size
    return {"size": {edge: size[edge] for edge in ("shortest_edge", "longest_edge")}, "frame_max_pixels": None}
