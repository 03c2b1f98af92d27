# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""What commands that run a model share: their options, and how it is loaded."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .terminal import quiet_unless_terminal

if TYPE_CHECKING:
    import torch

    from ..modeling_casa import CasaForConditionalGeneration
    from ..processing_casa import CasaProcessor


class Dtype(StrEnum):
    """Number formats of weights."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


ModelArgument = Annotated[str, typer.Argument(help="Folder or Hub id of a CASA checkpoint.", show_default=False)]
MaxNewTokensOption = Annotated[int, typer.Option(min=1, help="Length of an answer at most, in tokens.")]
DeviceOption = Annotated[
    str | None, typer.Option(help="Where to run, such as cpu or cuda:0. Default: a GPU if there is one.")
]
DtypeOption = Annotated[Dtype | None, typer.Option(help="Number format to run in. Default: the checkpoint's.")]
AttnOption = Annotated[
    str | None, typer.Option(help="Attention back end, such as sdpa or eager. Default: chosen by Transformers.")
]


def load_model(
    name: str, device: str | None, dtype: Dtype | None, attn: str | None
) -> tuple[CasaForConditionalGeneration, CasaProcessor]:
    """The model of a checkpoint, ready to generate, and its processor.

    Args:
        name: folder or Hub id.
        device: where to run; None for an accelerator if there is one.
        dtype: None for the checkpoint's.
        attn: attention back end; None for what Transformers chooses.

    Raises:
        ValueError: if the device isn't there, or there is no such checkpoint, or it is damaged.
    """
    quiet_unless_terminal()
    from safetensors import SafetensorError

    from .. import CasaForConditionalGeneration, CasaProcessor
    from ..conversion.source import SMALL_FILES, WEIGHT_FILES, download, hub_id

    where = _device(device)
    repository = hub_id(name, revision=None)
    folder = Path(name) if repository is None else download(repository, None, (*SMALL_FILES, *WEIGHT_FILES))
    processor = CasaProcessor.from_pretrained(folder)
    try:
        model = CasaForConditionalGeneration.from_pretrained(folder, dtype=dtype or "auto", attn_implementation=attn)
    except SafetensorError as error:
        raise ValueError(f"The weights in {name} are damaged ({error}); convert or download them again.") from error
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
    raise ValueError(f"--device {name!r} is not available here; choose one of {', '.join(map(str, here))}.")
