# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Arguments of `forward` and `generate` that CASA models don't have.

`forward` takes any keyword, since trainers, adapters and the attention interface pass more than a model names. So that
none is lost silently, what changes the result is refused by its meaning, and what is not read is named once.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_flash_attention_utils import _flash_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import TransformersKwargs, logging
from transformers.utils.generic import is_flash_attention_requested

logger = logging.get_logger(__name__)

# What `Trainer`, TRL, PEFT and `generate` (the tokenizer of its `stop_strings`) pass to every model; a CASA model has
# no use for it.
_PASSED_TO_ALL = {"image_sizes", "logits_to_keep", "task_ids", "token_type_ids", "tokenizer"}

# What the decorators of `forward` read, and what every model of Transformers is documented to take.
_READ_ALWAYS = {"debug_io", "debug_io_dir", "prune_layers", "return_dict", *TransformersKwargs.__annotations__}

_VIDEO = "A video's frames are images to a CASA model: pass the pixel_values and image_grid_thw of CasaProcessor."

# Argument -> what to do instead.
_REFUSED = {
    "pixel_values_videos": _VIDEO,
    "video_grid_thw": _VIDEO,
    "encoder_hidden_states": "Images come in as pixel_values, or as image_embeds once they are encoded.",
    "mm_encoder_outputs": "Pass image_embeds=output.pooler_output of get_image_features, and image_grid_thw.",
}


def refuse_foreign(arguments: Mapping[str, Any]) -> None:
    """Refuse arguments that would change the result but are not read.

    Args:
        arguments: keyword arguments beyond those of the model's own.

    Raises:
        TypeError: for a cache under another name than `cache` or `past_key_values`.
        ValueError: for images, videos or states in another model's form.
    """
    for name, value in arguments.items():
        if _is_cache(value):
            raise TypeError(
                f"{name} is a {type(value).__name__}, but CASA models take their cache under another name. "
                "Pass it as `cache` or `past_key_values`."
            )
        if name in _REFUSED and value is not None:
            raise ValueError(f"CASA models don't take {name}. {_REFUSED[name]}")


def check_foreign(arguments: Mapping[str, Any], attn_implementation: str) -> None:
    """Refuse what `refuse_foreign` refuses, and name once each other argument that nothing is known to read.

    A compiled call names none: logging would break its graph.

    Args:
        arguments: keyword arguments beyond those of the model's own.
        attn_implementation: backend of attention, which gets them.
    """
    refuse_foreign(arguments)
    if not arguments or torch.compiler.is_compiling():
        return
    given = {name for name, value in arguments.items() if value is not None}
    for name in sorted(given - _PASSED_TO_ALL - _READ_ALWAYS - _read_by(attn_implementation)):
        logger.warning_once(
            f"The argument {name!r} is unknown to CASA models, to the loss and to the attention function "
            f"{attn_implementation!r}. It is passed on to both and has no effect unless one of them reads it."
        )


def refuse_export(with_images: bool, with_cache: bool) -> None:
    """Refuse to be traced by `torch.export`, and so by ONNX, where the graph would hold for its example alone.

    Args:
        with_images: whether the call has images.
        with_cache: whether it has a cache that a graph can't take, or makes one.

    Raises:
        NotImplementedError: naming what can't be exported, and why.
    """
    if with_images:
        raise NotImplementedError(
            "Exporting a call with images (torch.export, ONNX) isn't supported by CASA models: how many patches and "
            "windows there are, and where, are values of image_grid_thw and of the ids, which are read to plan it. "
            "Export casa_hf.exporting.FixedCall(model, **inputs), which plans it before, for images of these sizes."
        )
    if with_cache:
        raise NotImplementedError(
            "Exporting a call with this cache (torch.export, ONNX) isn't supported by CASA models: lengths and "
            "windows of caches that grow, and of calls with several tokens, are read on the host to plan the call. "
            "Pass use_cache=False; or, for a decoding step, one token and a filled StaticCache as an input."
        )


@cache
def _read_by(attn_implementation: str) -> frozenset[str]:
    """Optional arguments of the loss and of a backend of attention."""
    readers = [ForCausalLMLoss]
    if attn_implementation in ALL_ATTENTION_FUNCTIONS:
        readers.append(ALL_ATTENTION_FUNCTIONS[attn_implementation])
    if is_flash_attention_requested(requested_attention_implementation=attn_implementation):
        readers.append(_flash_attention_forward)
    parameters = [parameter for reader in readers for parameter in inspect.signature(reader).parameters.values()]
    return frozenset(parameter.name for parameter in parameters if parameter.default is not parameter.empty)


def _is_cache(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(map(_is_cache, value))
    return isinstance(value, Cache | PagedAttentionCache)
