# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The configuration of a checkpoint, CASA's or one that can be converted."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import CONFIG_MAPPING, PreTrainedConfig

from ..backbones import SOURCE_BACKBONES, supported_sources
from ..configuration_casa import CasaConfig
from ..folder_files import read_json
from .errors import ConversionError, one_line


def read_source_config(folder: Path) -> PreTrainedConfig:
    """The configuration of a checkpoint that can be converted: the stock one, or a `CasaConfig`.

    Raises:
        ConversionError: if there is none, if it is invalid, or if it says that the checkpoint can't be converted.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise ConversionError(f"{folder} has no config.json. Give the folder of a complete Transformers checkpoint.")
    content = read_json(file, ConversionError)
    model_type = content.get("model_type")
    if not isinstance(model_type, str | None):
        raise ConversionError(f"{file} should have a string as model_type, got {model_type!r}. Download it again.")
    is_casa = model_type == CasaConfig.model_type
    if (
        not is_casa
        and "casa" in json.dumps([model_type, content.get("architectures"), content.get("auto_map")]).lower()
    ):
        raise ConversionError(
            f"{folder} (model_type {model_type!r}) is a CASA checkpoint by the method's authors, whose tensor names "
            "aren't documented. Run it with their code, or convert the model that it was made from."
        )
    parts = [content, *(value for value in content.values() if isinstance(value, dict))]
    if any(part.get("quantization_config") for part in parts):
        raise ConversionError(f"{folder} is quantised (quantization_config). Convert the unquantised original.")
    if not is_casa and model_type not in SOURCE_BACKBONES:
        raise ConversionError(
            f"{folder} has model_type {model_type!r}, which can't become a CASA model. Give a checkpoint of: "
            f"{supported_sources()}."
        )
    try:
        return (CasaConfig if is_casa else CONFIG_MAPPING[model_type]).from_dict(content)
    except Exception as error:  # whatever a configuration class runs into
        raise ConversionError(f"{file} is not a valid {model_type} configuration: {one_line(error)}") from error
