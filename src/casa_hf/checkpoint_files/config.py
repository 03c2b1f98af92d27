# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The configuration of a checkpoint: a CASA checkpoint's, or one that can be converted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from ..backbones import SOURCE_BACKBONES, convert_first, supported_sources
from ..checks import listed, one_line
from ..configuration_casa import CasaConfig, is_released
from ..folder_files import CheckpointError, WrongKindError, own_file, read_json


def read_config(folder: Path, name: str | None = None) -> PreTrainedConfig:
    """The configuration of a checkpoint that can be converted: the stock one, or a `CasaConfig`.

    Args:
        folder: Folder of the checkpoint.
        name: Name of the checkpoint in messages; None for the folder.

    Raises:
        CheckpointError: if there is none, if it is invalid, or if it says that the checkpoint can't be converted, or
            is one of the method's authors.
    """
    name = name or str(folder)
    content = _read(folder, name)
    model_type = content.get("model_type")
    if is_released(content):
        raise WrongKindError(
            f"{name} (model_type {model_type!r}) is a CASA checkpoint in the format of the method's authors. "
            f"Convert it first: `casa-hf convert {name} OUTPUT`."
        )
    is_casa = model_type == CasaConfig.model_type
    if not is_casa and model_type not in SOURCE_BACKBONES:
        raise WrongKindError(
            f"{name} has model_type {model_type!r}, which is not that of a CASA checkpoint and can't be converted to "
            f"one. Give a CASA checkpoint, or one of: {supported_sources()}."
        )
    _check_not_quantized(name, content)
    try:
        return (CasaConfig if is_casa else CONFIG_MAPPING[model_type]).from_dict(content)
    except Exception as error:  # whatever a configuration class runs into
        raise CheckpointError(
            f"{folder / 'config.json'} is not a valid {model_type} configuration ({one_line(error)}). Use the one "
            "that belongs to the weights."
        ) from error


def is_of_authors(folder: Path) -> bool:
    """Whether a checkpoint is in the format of the method's authors, by its config.json.

    Raises:
        CheckpointError: if there is none, or it isn't JSON.
    """
    return is_released(_read(folder))


def read_authors_config(folder: Path) -> dict[str, Any]:
    """The content of config.json of a checkpoint in the format of the method's authors, or of an unknown one.

    Raises:
        CheckpointError: if there is none, or the checkpoint is quantized.
    """
    content = _read(folder)
    _check_not_quantized(str(folder), content)
    return content


def _read(folder: Path, name: str | None = None) -> dict[str, Any]:
    file = own_file(folder, "config.json")
    if not file.is_file():
        raise WrongKindError(f"{name or folder} {_in_place_of_config(folder)}")
    content = read_json(file)
    model_type = content.get("model_type")
    if not isinstance(model_type, str | None):
        raise CheckpointError(f"{file} has model_type {model_type!r}, which must be a string. Download it again.")
    return content


def _in_place_of_config(folder: Path) -> str:
    """What a folder without config.json holds, and what to give in its place, for error messages."""
    adapter = own_file(folder, "adapter_config.json")
    if adapter.is_file():
        base = read_json(adapter).get("base_model_name_or_path")
        return (
            f"holds a PEFT adapter of {base!r:.200}, not a whole model. Merge it into that model "
            "(PeftModel.from_pretrained(model, folder).merge_and_unload().save_pretrained(...)), and give the result."
        )
    inside = sorted(file.parent.name for file in folder.glob("*/config.json"))
    if inside:
        return f"has no config.json; there is one in: {listed(inside)}. Give the path of one of these folders."
    return "has no config.json. Give the folder of a complete Transformers checkpoint."


def _check_not_quantized(name: str, content: dict[str, Any]) -> None:
    parts = [content, *(value for value in content.values() if isinstance(value, dict))]
    if any(part.get("quantization_config") for part in parts):
        raise CheckpointError(f"{name} is quantized (quantization_config). Convert the unquantized original.")


def read_casa_config(folder: Path, name: str | None = None) -> CasaConfig:
    """The configuration of a CASA checkpoint.

    Args:
        folder: Folder of the checkpoint.
        name: Name of the checkpoint in messages; None for the folder.

    Raises:
        CheckpointError: as `read_config`, and if it is a checkpoint of another kind.
    """
    name = name or str(folder)
    config = read_config(folder, name)
    if not isinstance(config, CasaConfig):
        raise WrongKindError(
            f"{name} has model_type {config.model_type!r}, so it is not a CASA checkpoint. "
            f"{convert_first(name, config.model_type)}"
        )
    return config
