# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The model of a checkpoint, as commands that run one load it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from .terminal import quiet_unless_terminal

if TYPE_CHECKING:
    import torch

    from ..modeling_casa import CasaForConditionalGeneration
    from ..processing_casa import CasaProcessor


def load_model(
    name: str, device: str | None, dtype: str | None, attn: str | None
) -> tuple[CasaForConditionalGeneration, CasaProcessor]:
    """The model of a checkpoint, ready to generate, and its processor.

    Args:
        name: folder or Hub id.
        device: device to run on; None for an accelerator if there is one.
        dtype: number format to run in; None for the checkpoint's.
        attn: attention backend; None for the one that Transformers chooses.

    Raises:
        BadParameter: if the device or the backend isn't there, or it isn't a CASA checkpoint.
        ValueError: if there is no such checkpoint, or it is damaged.
    """
    quiet_unless_terminal()
    from safetensors import SafetensorError

    from ..checkpoint_files.config import read_casa_config
    from ..checkpoint_files.download import SMALL_FILES, WEIGHT_FILES, download, hub_id
    from ..modeling_casa import CasaForConditionalGeneration
    from ..processing_casa import CasaProcessor

    where = _device(device)
    _check_attention(attn, where)
    repository = hub_id(name, revision=None)
    if repository is None:
        folder = Path(name)
    else:
        read_casa_config(download(repository, None, SMALL_FILES), name)  # before the weights, which are large
        folder = download(repository, None, (*SMALL_FILES, *WEIGHT_FILES))
    processor = CasaProcessor.from_pretrained(folder)
    try:
        model = CasaForConditionalGeneration.from_pretrained(folder, dtype=dtype or "auto", attn_implementation=attn)
    except SafetensorError as error:
        raise ValueError(f"The weights in {name} are damaged ({error}). Convert or download them again.") from error
    return model.to(where).eval(), processor


def _device(name: str | None) -> torch.device:
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    here = [torch.device("cpu")]
    if accelerator is not None:
        here = [torch.device(accelerator.type, i) for i in range(torch.accelerator.device_count())] + here
    if name is None:
        return here[0]
    for device in here:
        if name in (str(device), device.type):
            return device
    raise typer.BadParameter(
        f"{name!r} is not available here; choose one of {', '.join(map(str, here))}.", param_hint="--device"
    )


def _check_attention(name: str | None, device: torch.device) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from ..attention_backends import is_varlen
    from ..design_space import unknown_value
    from ..torch_varlen import TORCH_VARLEN, TORCH_VARLEN_TOWER

    flash = [key for key in ALL_ATTENTION_FUNCTIONS.valid_keys() if is_varlen(key) and "|" not in key]
    known = ["eager", "sdpa", *sorted(key for key in flash if key != TORCH_VARLEN_TOWER)]
    if name is not None and name not in known and "/" not in name:  # a kernel of the Hub has a slash
        raise typer.BadParameter(f"{name!r} is unknown; {unknown_value(name, known)}", param_hint="--attn")
    if name == TORCH_VARLEN and device.type != "cuda":
        raise typer.BadParameter(
            f"{name!r} needs a CUDA device, but the model would run on {device}. Use sdpa, or another --device.",
            param_hint="--attn",
        )
