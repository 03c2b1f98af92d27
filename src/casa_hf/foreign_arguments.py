# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Arguments of `forward` and `generate` that CASA models don't have.

`forward` takes any keyword, since trainers, adapters and the attention interface pass more than a model names. So that
none is lost silently, what changes the result is refused by its meaning, and what nobody reads is named once.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_flash_attention_utils import _flash_attention_forward
from transformers.utils import TransformersKwargs, logging

from .varlen import torch_varlen_forward

logger = logging.get_logger(__name__)

_READERS = (
    ForCausalLMLoss,
    flash_attention_forward,
    _flash_attention_forward,
    sdpa_attention_forward,
    torch_varlen_forward,
)

# What `Trainer`, TRL, PEFT and processors pass to every model; a CASA model has no use for it.
_PASSED_TO_ALL = {
    "image_position_ids",
    "image_sizes",
    "pixel_attention_mask",
    "skip_logits",
    "spatial_shapes",
    "task_ids",
    "token_type_ids",
}

_READ = (
    {
        parameter.name
        for reader in _READERS
        for parameter in inspect.signature(reader).parameters.values()
        if parameter.default is not parameter.empty
    }
    | set(TransformersKwargs.__annotations__)
    | {"debug_io", "debug_io_dir", "prune_layers", "return_dict"}
)

_VIDEO = "A video's frames are images to a CASA model: pass the pixel_values and image_grid_thw of CasaProcessor."

# Argument -> what to do instead.
_REFUSED = {
    "pixel_values_videos": _VIDEO,
    "video_grid_thw": _VIDEO,
    "encoder_hidden_states": "Images come in as pixel_values, or as image_embeds once they are encoded.",
}


def refuse_foreign(arguments: Mapping[str, Any]) -> None:
    """Refuse what would change the result and that nobody reads.

    Args:
        arguments: keyword arguments beyond those of the model's own.

    Raises:
        TypeError: for a cache under another name than `cache` or `past_key_values`.
        ValueError: for images, videos or states in another model's form.
    """
    for name, value in arguments.items():
        if isinstance(value, Cache):
            raise TypeError(
                f"{name} is a {type(value).__name__}, but a CASA model has no argument of this name for its cache. "
                "Pass it as `cache` or `past_key_values`."
            )
        if name in _REFUSED and value is not None:
            raise ValueError(f"CASA models don't take {name}. {_REFUSED[name]}")


def check_foreign(arguments: Mapping[str, Any]) -> None:
    """Refuse what `refuse_foreign` refuses, and name once each other argument that nobody is known to read."""
    refuse_foreign(arguments)
    unread = {name for name, value in arguments.items() if value is not None} - _READ - _PASSED_TO_ALL
    if unread and not torch.compiler.is_compiling():
        for name in sorted(unread):
            logger.warning_once(
                f"The argument {name!r} is unknown to CASA models and to the losses and attention functions of "
                "Transformers. It is passed on to the attention function and has no effect unless that one reads it."
            )
