# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The source of a conversion: its files, which must not change meanwhile, and its configuration."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from ..backbones import SOURCE_BACKBONES, VISION_TOWERS
from ..checkpoint_files.config import read_config
from ..checkpoint_files.download import CODE_FILES, SMALL_FILES, WEIGHT_FILES, download, hub_id
from ..checkpoint_files.shards import StoredTensor, read_checkpoint
from ..checkpoint_files.unchanged import FileState, check_unchanged, folder_state
from ..checks import one_line
from ..configuration_casa import SOURCE_MODEL_TYPE, CasaConfig
from ..folder_files import CheckpointError, check_json

_CONTROL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Source:
    """A checkpoint that is converted.

    Attributes:
        folder: Local folder, or the one in the Hub's download cache.
        repository: Hub id; None for a local folder.
        small_files: States of the files other than weights, before anything was read.
    """

    folder: Path
    repository: str | None
    small_files: dict[Path, FileState]

    @classmethod
    def open(cls, name: str | Path, revision: str | None, json_files: Iterable[str]) -> Source:
        """The checkpoint of a name; of a Hub id, all but the weights is downloaded.

        Args:
            name: Folder or Hub id.
            revision: Branch, tag or commit of a Hub id.
            json_files: Names of files that are checked to be JSON, where they exist.

        Raises:
            CheckpointError: if there is no such checkpoint, or a file can't be read.
        """
        repository = hub_id(name, revision)
        folder = Path(name) if repository is None else download(repository, revision, SMALL_FILES)
        source = cls(folder, repository, folder_state(folder, SMALL_FILES))
        check_json(folder, json_files)
        return source

    def fetch_code(self) -> None:
        """Download the code beside the weights of a Hub id; it is only read."""
        if self.repository is not None:
            download(self.repository, self.folder.name, CODE_FILES)

    def tensors(self) -> dict[str, StoredTensor]:
        """Where each tensor is stored; downloads the weights of a Hub id."""
        if self.repository is not None:
            download(self.repository, self.folder.name, WEIGHT_FILES)
        return read_checkpoint(self.folder)

    def check_unchanged(self) -> None:
        """Compare the small files with those that were there in the beginning.

        Raises:
            CheckpointError: if one has changed; names it.
        """
        check_unchanged(self.small_files, folder_state(self.folder, SMALL_FILES))


def read_vision_config(folder: Path, config: PreTrainedConfig) -> PreTrainedConfig:
    """The vision configuration of the checkpoint that is to give a text-only source its vision tower.

    Deepstack features are left out: blocks of a text model were never trained to take them.

    Args:
        folder: Folder of that checkpoint.
        config: Configuration of the text-only source.

    Raises:
        CheckpointError: if there is no such configuration, or if it is of another family than the source can be given.
    """
    backbone = SOURCE_BACKBONES[config.model_type]
    content = read_config(folder)
    vision = getattr(content, "vision_config", None)
    if isinstance(content, CasaConfig) or vision is None or vision.model_type not in backbone.towers:
        raise CheckpointError(
            f"vision_from={folder} has model_type {content.model_type!r}, but {backbone.display_name} takes the "
            f"vision tower of a source checkpoint: {' or '.join(backbone.towers)}. Give a checkpoint that has one."
        )
    if (deepstack := VISION_TOWERS[vision.model_type].deepstack_field) is not None:
        setattr(vision, deepstack, [])
    return vision


def stock_config(config: CasaConfig, *, keep_tokens: bool = False) -> PreTrainedConfig:
    """The configuration of the source, with the language model and the vision tower of a CASA checkpoint.

    Args:
        config: Configuration of the CASA checkpoint.
        keep_tokens: Whether the vocabulary keeps the tokens that the source doesn't have.

    Raises:
        CheckpointError: if the checkpoint doesn't tell what its source was.
    """
    if not config.source_config:
        raise CheckpointError(
            "config.json has no source_config, so the form of the source isn't known. Convert the source again."
        )
    kept = dict(config.source_config)
    model_type = kept.pop(SOURCE_MODEL_TYPE, config.backbone.source_model_type)
    text = {name: value for name, value in config.text_config.to_dict().items() if name != "model_type"}
    vocab_size = kept.pop("vocab_size", text["vocab_size"])
    if not keep_tokens:
        text["vocab_size"] = vocab_size
    fields: dict[str, Any] = {"text_config": text, "vision_config": config.vision_config.to_dict()}
    if config.backbone.text_only:
        # Its tokenizer goes back as it was; training adapts these to that of the CASA checkpoint.
        fields = text | {name: kept[name] for name in _CONTROL_TOKENS if name in kept}
    fields |= {"tie_word_embeddings": config.tie_word_embeddings, "dtype": config.dtype}
    fields["architectures"] = kept.get("architectures") or [config.backbone.source_class]
    try:
        return CONFIG_MAPPING[model_type](**kept | fields)
    except Exception as error:  # whatever a configuration class runs into
        raise CheckpointError(
            f"source_config in config.json is not a valid {model_type!r} configuration ({one_line(error)}). Get the "
            "config.json that the conversion wrote."
        ) from error
