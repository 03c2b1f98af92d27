# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The processor of a released checkpoint, whose own comes with code, which is never run: tokenizer and sizes."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.models.auto.tokenization_auto import AutoTokenizer

from ...checkpoint_files.names import PROCESSOR_FILES, TEMPLATE_FILES, TOKENIZER_FILES, template_files
from ...checks import one_line
from ...configuration_casa import CasaConfig
from ...folder_files import CheckpointError, own_file, read_json
from ...placeholders import delimiters_of
from ...processing_casa import CasaProcessor

# The authors evaluate at this size (kyutai-labs/casa, scripts); the rest are the settings of Qwen2.5-VL's processor.
IMAGE_SIZE = 896
MIN_PIXELS = 56 * 56
MEAN = [0.48145466, 0.4578275, 0.40821073]
STD = [0.26862954, 0.26130258, 0.27577711]

# As Qwen2.5-VL's: turns between <|im_start|> and <|im_end|>, and a system message in any case.
_CHATML = """\
{%- if messages[0].role != 'system' -%}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' -}}
    {%- if message.content is string -%}
        {{- message.content -}}
    {%- else -%}
        {%- for part in message.content -%}
            {%- if part.type == 'image' or 'image' in part or 'image_url' in part -%}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
            {%- elif part.type == 'video' or 'video' in part -%}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
            {%- elif 'text' in part -%}
                {{- part.text -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{{- '<|im_start|>assistant\\n' if add_generation_prompt -}}
"""


def delimiter_ids(folder: Path, given: str | Sequence[str]) -> tuple[int | None, int]:
    """Ids of the tokens before and after an image.

    Args:
        folder: folder with the tokenizer.
        given: these tokens, see `placeholders.delimiters_of`.

    Raises:
        CheckpointError: if the tokenizer can't be loaded, or lacks them.
        ValueError: if they are no delimiters.
    """
    tokens = delimiters_of(given)
    vocabulary = _tokenizer(folder).get_vocab()
    missing = [token for token in tokens if token not in vocabulary]
    if missing:
        raise CheckpointError(
            f"image_delimiters={given!r}: the tokenizer of {folder} has no {' and no '.join(missing)}. Give tokens "
            "that the model was trained with."
        )
    *start, end = (vocabulary[token] for token in tokens)
    return (start[0] if start else None), end


def make_processor(folder: Path, config: CasaConfig, max_pixels: int | None) -> tuple[CasaProcessor, list[str]]:
    """The processor of a CASA checkpoint made from a released one, and what was assumed for it, in sentences.

    Args:
        folder: folder of the released checkpoint, with a tokenizer.
        config: configuration of the CASA checkpoint.
        max_pixels: largest number of pixels of an image; None for what the files or the authors' scripts say.

    Raises:
        CheckpointError: if the tokenizer is missing or lacks the delimiters.
    """
    tokenizer = _tokenizer(folder)
    settings, findings = _image_settings(folder, config, max_pixels)
    ids = (config.vision_start_token_id, config.image_token_id)
    delimiters = [tokenizer.convert_ids_to_tokens(token) for token in ids if token is not None]
    if None in delimiters:
        raise CheckpointError(
            f"The tokenizer of {folder} has no token with the id {ids[delimiters.index(None)]}, which stands at an "
            "image. Get the tokenizer that belongs to the checkpoint."
        )
    has_template = bool(tokenizer.chat_template)
    with _tokenizer_files(folder) as temporary:
        (temporary / PROCESSOR_FILES[0]).write_text(json.dumps(settings), encoding="utf-8")
        if not has_template and not config.backbone.text_only:
            (temporary / TEMPLATE_FILES[0]).write_text(_CHATML, encoding="utf-8")
        try:
            if config.backbone.text_only:
                processor = CasaProcessor.from_text_source(
                    temporary, temporary, image_delimiters=delimiters, max_pixels=None
                )
            else:
                processor = CasaProcessor.from_source(temporary, max_pixels=None)  # it stands in the settings
        except Exception as error:  # tokenizers raises plain exceptions
            raise CheckpointError(
                f"The tokenizer in {folder} can't be used ({one_line(error)}). Get the files that belong to the "
                "checkpoint."
            ) from error
    _check_delimiters(processor, delimiters)
    if not has_template:
        kind = "a line per turn" if config.backbone.text_only else "Qwen's"
        findings.append(f"chat template: assumed, {kind}; the checkpoint has none")
    return processor, findings


def _check_delimiters(processor: CasaProcessor, delimiters: Sequence[str]) -> None:
    """Prompts must have the delimiters that the model has; those of a vision-language backbone are its own."""
    ids = (processor.vision_start_token_id, processor.image_token_id)
    written = processor.tokenizer.convert_ids_to_tokens([token for token in ids if token is not None])
    if written != delimiters:
        raise CheckpointError(
            f"An image has {' and '.join(delimiters)} around it in this checkpoint, but models with its backbone have "
            f"{' and '.join(written)} here, the backbone's own. Give these as image_delimiters if config.json is "
            "wrong, or convert another checkpoint."
        )


@contextmanager
def _tokenizer_files(folder: Path) -> Iterator[Path]:
    """A temporary folder with the tokenizer alone: no configuration that stock classes don't know, and no code."""
    with tempfile.TemporaryDirectory() as temporary:
        for name in (*TOKENIZER_FILES, *template_files(folder)):
            if not (folder / name).is_file():
                continue
            own = own_file(folder, name)
            Path(temporary, name).parent.mkdir(exist_ok=True)
            if name == "tokenizer_config.json":
                content = {key: value for key, value in read_json(own).items() if key != "auto_map"}
                Path(temporary, name).write_text(json.dumps(content), encoding="utf-8")
            else:
                shutil.copyfile(own, Path(temporary, name))
        yield Path(temporary)


def _tokenizer(folder: Path) -> Any:
    with _tokenizer_files(folder) as temporary:
        try:
            return AutoTokenizer.from_pretrained(temporary)
        except Exception as error:  # tokenizers raises plain exceptions
            raise CheckpointError(
                f"The tokenizer in {folder} can't be loaded ({one_line(error)}). Get the files that belong to the "
                "checkpoint."
            ) from error


def _image_settings(folder: Path, config: CasaConfig, max_pixels: int | None) -> tuple[dict[str, Any], list[str]]:
    """Settings of Qwen's image processor, with what the checkpoint's files say."""
    stated: dict[str, Any] = {}
    for name in PROCESSOR_FILES:
        if (folder / name).is_file():
            stated |= read_json(own_file(folder, name))
    side = IMAGE_SIZE
    origin = "assumed, the authors evaluate so"
    if isinstance(stated.get("image_size"), int) and stated["image_size"] > 0:
        side, origin = stated["image_size"], "its processor"
    largest = f"up to {max_pixels:,} pixels: given" if max_pixels else f"up to {side} x {side} pixels: {origin}"
    findings = [f"images of {largest}; they are resized as by Qwen's processor, which may not be the authors' way"]
    settings = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": config.vision_config.patch_size,
        "merge_size": config.vision_config.spatial_merge_size,
        "temporal_patch_size": config.vision_config.temporal_patch_size,
        "min_pixels": MIN_PIXELS,
        "max_pixels": max_pixels or side * side,
        "image_mean": _three(stated, "image_mean", MEAN, findings),
        "image_std": _three(stated, "image_std", STD, findings),
    }
    if settings["max_pixels"] < MIN_PIXELS:
        raise CheckpointError(
            f"max_pixels={settings['max_pixels']} is below {MIN_PIXELS}, the pixels of the smallest image. Give "
            f"{MIN_PIXELS} or more."
        )
    return settings, findings


def _three(stated: dict[str, Any], name: str, default: list[float], findings: list[str]) -> list[float]:
    value = stated.get(name)
    if isinstance(value, list) and len(value) == 3 and all(isinstance(part, int | float) for part in value):
        return value
    findings.append(f"{name} {default}: assumed, Qwen2.5-VL's")
    return default
