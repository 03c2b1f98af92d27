# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""What a conversion to a CASA checkpoint is asked for, and the command line that asks for it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoint_files.shards import DTYPE_CODES, DTYPES, shard_bytes
from ..configuration_casa import variant_overrides
from ..design_space import SETTINGS, unknown_value
from ..folder_files import CheckpointError
from ..placeholders import delimiters_of
from ..timestamps_casa import VIDEO_TIMESTAMPS
from .design import check_fields

MAX_SHARD_SIZE = "5GB"


@dataclass(frozen=True)
class ConversionRequest:
    """What `convert_checkpoint` is asked for, except for where and how it is written; see there.

    Attributes:
        source: Folder or Hub id.
        variant: Name of a variant; None for the default one.
        vision_from: Folder or Hub id of the checkpoint that gives a vision tower.
        image_delimiters: Tokens around an image in a text-only source; None for the default.
        video_timestamps: Kind of timestamps before video frames, or "none"; None for the default.
        dtype: Number format to cast to.
        revision: Branch, tag or commit of a Hub id.
        max_pixels: Largest number of pixels of an image.
        max_shard_size: Largest size of a weight file.
        design: Design fields that differ from the variant.
        mapping: Path of a mapping file for a checkpoint of the method's authors.

    Raises:
        CheckpointError: if the dtype, the kind of timestamps or a design field is unknown, or the size of a weight
            file isn't one.
        ValueError: if the variant, or the value of a design field that is a choice, is unknown, or if these are no
            delimiters.
    """

    source: str | Path
    variant: str | None
    vision_from: str | Path | None
    image_delimiters: str | Sequence[str] | None
    video_timestamps: str | None
    dtype: str | torch.dtype | None
    revision: str | None
    max_pixels: int | None
    max_shard_size: int | str
    design: Mapping[str, Any]
    mapping: str | Path | None = None

    def __post_init__(self) -> None:
        if self.variant is not None:
            variant_overrides(self.variant, ())
        check_fields(self.design)
        dtype_code(self.dtype)
        kinds = [kind or "none" for kind in VIDEO_TIMESTAMPS]
        if self.video_timestamps not in (None, *kinds):
            raise CheckpointError(
                f"video_timestamps={self.video_timestamps!r} is unknown; {unknown_value(self.video_timestamps, kinds)}"
            )
        if self.image_delimiters is not None:
            delimiters_of(self.image_delimiters)
        shard_bytes(self.max_shard_size)

    @property
    def dtype_code(self) -> str | None:
        """Key of `DTYPES` to cast to."""
        return dtype_code(self.dtype)

    @property
    def dtype_name(self) -> str | None:
        """PyTorch's name of the number format to cast to."""
        return None if self.dtype_code is None else _name(self.dtype_code)

    @property
    def _written_delimiters(self) -> str | None:
        return None if self.image_delimiters is None else ",".join(delimiters_of(self.image_delimiters))

    def command(self, output: str, variant: str | None, with_code: bool) -> str:
        """The command line that makes the same checkpoint.

        Args:
            output: Folder to make.
            variant: Name of the variant; None to leave the option out.
            with_code: Whether the checkpoint carries its code.
        """
        options = {
            "--vision-from": self.vision_from,
            "--image-delimiters": self._written_delimiters,
            "--mapping": self.mapping,
            "--video-timestamps": self.video_timestamps,
            "--dtype": self.dtype_name,
            "--revision": self.revision,
            "--max-pixels": self.max_pixels,
            "--max-shard-size": None if self.max_shard_size == MAX_SHARD_SIZE else self.max_shard_size,
        }
        words = ["casa-hf", "convert", str(self.source), output]
        words += [] if variant is None else ["--variant", variant]
        for setting in SETTINGS:
            if setting.field in self.design:
                words += _design_words(setting.option, self.design[setting.field])
        for option, value in options.items():
            words += [] if value is None else [option, str(value)]
        return shlex.join(words + ["--with-code"] * with_code)


def dtype_code(dtype: str | torch.dtype | None) -> str | None:
    """The key of `DTYPES` of a dtype or its name; None for None.

    Raises:
        CheckpointError: if weights can't have it.
    """
    if dtype is None:
        return None
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if resolved not in DTYPE_CODES:
        known = ", ".join(map(_name, DTYPES))
        raise CheckpointError(f"dtype={dtype!r} is unknown. Choose one of {known}, or None to keep the source's.")
    return DTYPE_CODES[resolved]


def _name(code: str) -> str:
    return str(DTYPES[code]).removeprefix("torch.")


def _design_words(option: str, value: Any) -> list[str]:
    """An option of the command line that sets a design field to a value."""
    if isinstance(value, bool):
        return [option if value else option.replace("--", "--no-", 1)]
    if option == "--layers" and not isinstance(value, str):
        value = "all" if value is None else ",".join(map(str, value))
    return [option, "none" if value is None else str(value)]
