# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""What the files of a released checkpoint say, weights aside: language model, vision tower, delimiters, generation."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from ...backbones import BACKBONES
from ...checkpoint_files.config import read_authors_config
from ...checkpoint_files.download import CODE_FILES
from ...checks import listed, one_line
from ...folder_files import CheckpointError, own_file

# What code beside the weights says which generation it is of (kyutai-labs/casa, scripts).
GENERATIONS = {
    "image": ("start_ca_streaming_states", "reset_ca_streaming_states"),
    "window": ("reset_casa_streaming_states", "reinit_casa_handler"),
}
_MAX_CODE_BYTES = 2_000_000

# (pattern of the name of the whole model, type of its language model). Helium-1 has Llama's blocks.
_FAMILIES = ((r"qwen_?2[._]?5_?vl", "qwen2_5_vl_text"), (r"helium", "llama"))
_TYPES = {"qwen2_5_vl": "qwen2_5_vl_text"}
_TEXT_CONFIGS = ("text_config", "llm_config", "language_config", "lm_config")

# Numbers that shapes don't confirm, or that say which shapes there are: never the defaults of a class.
_NEEDED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "rms_norm_eps"),
)
_ROPE = ("rope_theta", "rope_parameters", "rope_scaling")
_VISION_NEEDED = ("depth", "hidden_size", "num_heads", "out_hidden_size")

TEMPORAL_PATCH_SIZE = 2


@dataclass(frozen=True)
class Facts:
    """What is known of a released checkpoint before its tensors are looked at.

    Attributes:
        name: its `model_type`, or its architecture.
        text: configuration of the language model.
        vision: settings of the vision tower.
        tied: whether the head repeats the embeddings; None if config.json doesn't say.
        fusion: whether its name says that it has fusion layers.
        code: what in its code says so, or in the name of that; None if nothing does.
        keys: value of `casa_keys` by the generation of its code, and how that is known; None if it isn't.
        delimiters: ids of the tokens before and after an image; None if config.json doesn't say.
        content: content of config.json.
        findings: what was concluded, and from what, in sentences.
    """

    name: str
    text: PreTrainedConfig
    vision: dict[str, Any]
    tied: bool | None
    fusion: bool
    code: str | None
    keys: tuple[str, str] | None
    delimiters: tuple[int | None, int] | None
    content: Mapping[str, Any]
    findings: tuple[str, ...]

    @classmethod
    def read(cls, folder: Path) -> Facts:
        """The facts of a folder.

        Raises:
            CheckpointError: naming what is missing or contradictory.
        """
        content = read_authors_config(folder)
        named = [content.get("model_type"), *(content.get("architectures") or [])]
        name = " ".join(str(part) for part in named if part)
        text, findings = _text_config(folder, content, name)
        return cls(
            name=name,
            text=text,
            vision=_vision_config(folder, content),
            tied=_tied(content),
            fusion="casa" in name.lower(),
            code=_code_of_fusion(folder, content),
            keys=_generation(folder),
            delimiters=_delimiters(folder, content),
            content=content,
            findings=tuple(findings),
        )

    @property
    def display_name(self) -> str:
        """Family of the language model."""
        return BACKBONES[self.text.model_type].display_name


def _text_config(folder: Path, content: Mapping[str, Any], name: str) -> tuple[PreTrainedConfig, list[str]]:
    nested = next((field for field in _TEXT_CONFIGS if isinstance(content.get(field), dict)), None)
    given = dict(content[nested] if nested else content)
    stated = given.get("model_type") if nested else None
    text_type = _TYPES.get(str(stated), stated)
    findings = []
    if text_type not in BACKBONES:
        if text_type in CONFIG_MAPPING:
            raise CheckpointError(
                f"{folder / 'config.json'} has {nested}.model_type {stated!r}, a language model that CASA models here "
                "can't have. Convert another checkpoint."
            )
        text_type = next((type for pattern, type in _FAMILIES if re.search(pattern, name.lower())), None)
        if text_type is None:
            raise CheckpointError(
                f"{folder / 'config.json'} doesn't say what language model {name or 'the model'} has: expected a name "
                "with Qwen2_5_VL or Helium in model_type, or text_config.model_type. Add the latter."
            )
        findings.append(f"language model {BACKBONES[text_type].display_name}: from the name {name!r}")
    missing = [field for field in _NEEDED if given.get(field) is None]
    missing += [] if any(given.get(field) for field in _ROPE) else ["rope_theta"]
    if missing:
        raise CheckpointError(
            f"{folder / 'config.json'} lacks {listed(missing)} of the language model; expected them "
            f"{f'in {nested}' if nested else 'at its top level'}. Add those of the model that it was trained from."
        )
    config_class = CONFIG_MAPPING[text_type]
    known = set(config_class().to_dict())
    known -= {"model_type", "architectures", "auto_map", "dtype", "transformers_version", "tie_word_embeddings"}
    fields = {field: value for field, value in given.items() if field in known and field not in _ROPE}
    try:
        rope, assumed = _rope(given, BACKBONES[text_type].multimodal_rope)
        return config_class(**fields, rope_parameters=rope), findings + assumed
    except Exception as error:  # whatever a configuration class runs into
        raise CheckpointError(
            f"{folder / 'config.json'} doesn't describe a {BACKBONES[text_type].display_name} language model "
            f"({one_line(error)}). Use the config.json that belongs to the weights."
        ) from error


def _rope(given: Mapping[str, Any], multimodal: bool) -> tuple[dict[str, Any], list[str]]:
    """Rotary settings in the form of Transformers 5, and what was assumed for them."""
    stated = {**(given.get("rope_scaling") or {}), **(given.get("rope_parameters") or {})}
    kind = stated.pop("type", None)
    kind = stated.get("rope_type") or kind or "default"
    rope = {"rope_theta": given.get("rope_theta"), **stated, "rope_type": "default" if kind == "mrope" else kind}
    if not multimodal or "mrope_section" in rope:
        return rope, []
    pairs = given["hidden_size"] // given["num_attention_heads"] // 2
    time = pairs // 4
    height = (pairs - time) // 2
    rope["mrope_section"] = [time, height, pairs - time - height]
    return rope, [
        f"mrope_section {rope['mrope_section']}: assumed, in Qwen2.5-VL's proportions (it counts for image positions)"
    ]


def _vision_config(folder: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    vision = content.get("vision_config")
    missing = [field for field in _VISION_NEEDED if not isinstance(vision, dict) or vision.get(field) is None]
    if missing:
        raise CheckpointError(
            f"{folder / 'config.json'} lacks {listed([f'vision_config.{field}' for field in missing])}. Add those of "
            "the vision tower, a Qwen2.5-VL one."
        )
    assert isinstance(vision, dict)
    return {**vision, "model_type": "qwen2_5_vl_vision", "temporal_patch_size": TEMPORAL_PATCH_SIZE}


def _tied(content: Mapping[str, Any]) -> bool | None:
    parts = [content, *(content[field] for field in _TEXT_CONFIGS if isinstance(content.get(field), dict))]
    return next((part["tie_word_embeddings"] for part in parts if "tie_word_embeddings" in part), None)


def _generation(folder: Path) -> tuple[str, str] | None:
    """The value of `casa_keys` that the code of a checkpoint speaks for."""
    found = _words(folder)
    return next(iter(found.items())) if len(found) == 1 else None


def _code_of_fusion(folder: Path, content: Mapping[str, Any]) -> str | None:
    """What in the code of a checkpoint, or in the name of that, speaks of fusion layers."""
    classes = content.get("auto_map")
    if "casa" in json.dumps(classes).lower():
        return f"auto_map is {json.dumps(classes)}"
    return next(iter(_words(folder).values()), None)


def _words(folder: Path) -> dict[str, str]:
    """Generation -> where a word of it stands in the code of a checkpoint. The code is searched, and never run."""
    found: dict[str, str] = {}
    for file in sorted(file for pattern in CODE_FILES for file in folder.glob(pattern)):
        own = own_file(folder, file.name)
        text = own.read_bytes()[:_MAX_CODE_BYTES].decode("utf-8", errors="replace")
        for keys, words in GENERATIONS.items():
            for word in words:
                if word in text:
                    found.setdefault(keys, f"{file.name} has {word}")
    return found


def _delimiters(folder: Path, content: Mapping[str, Any]) -> tuple[int | None, int] | None:
    lists = [content.get("pre_image_tokens"), content.get("post_image_tokens")]
    if lists == [None, None]:
        return None
    before, after = ([] if tokens is None else tokens for tokens in lists)
    ids = [*before, *after] if isinstance(before, list) and isinstance(after, list) else [None]
    if any(type(token) is not int for token in ids) or len(before) > 1 or len(after) != 1:
        raise CheckpointError(
            f"{folder / 'config.json'} has pre_image_tokens={before!r} and post_image_tokens={after!r}; expected "
            "lists of ids, of one token before an image at most and of one after it, the only form that CASA models "
            "here have. Convert another checkpoint."
        )
    return (before[0] if before else None), after[0]
