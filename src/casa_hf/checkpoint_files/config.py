# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The configuration of a checkpoint: a CASA checkpoint's, or one that can be converted."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import CONFIG_MAPPING, PreTrainedConfig

from ..backbones import SOURCE_BACKBONES, supported_sources
from ..checks import one_line
from ..configuration_casa import CasaConfig
from ..folder_files import CheckpointError, own_file, read_json


def read_config(folder: Path) -> PreTrainedConfig:
    """The configuration of a checkpoint that can be converted: the stock one, or a `CasaConfig`.

    Raises:
        CheckpointError: if there is none, if it is invalid, or if it says that the checkpoint can't be converted.
    """
    file = own_file(folder, "config.json")
    if not file.is_file():
        raise CheckpointError(f"{folder} has no config.json. Give the folder of a complete Transformers checkpoint.")
    content = read_json(file)
    model_type = content.get("model_type")
    if not isinstance(model_type, str | None):
        raise CheckpointError(f"{file} has model_type {model_type!r}, which must be a string. Download it again.")
    is_casa = model_type == CasaConfig.model_type
    if (
        not is_casa
        and "casa" in json.dumps([model_type, content.get("architectures"), content.get("auto_map")]).lower()
    ):
        raise CheckpointError(
            f"{folder} (model_type {model_type!r}) is a CASA checkpoint in the format of the method's authors, which "
            "isn't documented. Run it with their code, or convert the model that it was made from."
        )
    parts = [content, *(value for value in content.values() if isinstance(value, dict))]
    if any(part.get("quantization_config") for part in parts):
        raise CheckpointError(f"{folder} is quantised (quantization_config). Convert the unquantised original.")
    if not is_casa and model_type not in SOURCE_BACKBONES:
        raise CheckpointError(
            f"{folder} has model_type {model_type!r}, which can't be converted to a CASA model. Give a checkpoint "
            f"of: {supported_sources()}."
        )
    try:
        return (CasaConfig if is_casa else CONFIG_MAPPING[model_type]).from_dict(content)
    except Exception as error:  # whatever a configuration class runs into
        raise CheckpointError(
            f"{file} is not a valid {model_type} configuration ({one_line(error)}). Use the one that belongs to the "
            "weights."
        ) from error


def read_casa_config(folder: Path) -> CasaConfig:
    """The configuration of a CASA checkpoint.

    Raises:
        CheckpointError: as `read_config`, and if it is a checkpoint of another kind.
    """
    config = read_config(folder)
    if not isinstance(config, CasaConfig):
        raise CheckpointError(
            f"{folder} has model_type {config.model_type!r}, so it is not a CASA checkpoint. Convert it first "
            "(`casa-hf convert`)."
        )
    return config
