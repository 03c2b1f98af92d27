# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The backend "torch_varlen": PyTorch's own flash attention for sequences of different lengths.

It needs a CUDA device and torch 2.11 or newer, and no further package. Importing this module registers it with
Transformers under `TORCH_VARLEN`, for self-attention, fusion layers and vision towers alike. In decoding steps
self-attention is PyTorch's ordinary one, so that they can be compiled as a whole.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import flash_attention_mask
from transformers.modeling_flash_attention_utils import _pad_input, _unpad_input, _upad_input

TORCH_VARLEN = "torch_varlen"

# The same for vision towers: by this name they hand all images to one call instead of going through them one by one.
TORCH_VARLEN_TOWER = "torch_varlen_flash"


@cache
def _kernel() -> tuple[Any, bool]:
    """The kernel, and whether it has to be told that several heads of queries share one of keys. Earlier ones hand the
    heads on as they are, to the same flash attention, which always groups them."""
    try:
        from torch.nn.attention.varlen import varlen_attn

        parameters = set(inspect.signature(varlen_attn).parameters)
    except ImportError:
        parameters = set()
    if not {"scale", "window_size"} <= parameters:
        raise ImportError(
            f'attn_implementation="{TORCH_VARLEN}" needs torch 2.11 or newer, this is {torch.__version__}. Use '
            '"sdpa", or "flash_attention_2" with the package flash-attn.'
        )
    return varlen_attn, "enable_gqa" in parameters


def torch_varlen_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention in the form of Transformers' attention interface.

    Args:
        module: gives `is_causal` where the argument doesn't.
        query: (batch, heads, queries, head_dim), in float16 or bfloat16.
        key, value: (batch, kv_heads, keys, head_dim).
        attention_mask: (batch, keys) 0 for padding, or None.
        dropout: must be 0; the kernel has none.
        scaling: factor of the scores.
        is_causal: whether the last query sees all keys, the one before all but the last, and so on.
        cu_seq_lens_q, cu_seq_lens_k: (sequences + 1,) int32, where sequences start in the flattened queries and keys;
            None: every row is a sequence.
        max_length_q, max_length_k: length of the longest.

    Returns:
        (batch, queries, heads, head_dim), and None for the weights.

    Raises:
        ImportError: if torch is too old.
        RuntimeError: if the device has no such kernel.
        ValueError: if dropout is wanted, or the data type isn't one of the kernel's.
    """
    if dropout:
        raise ValueError(
            f'attn_implementation="{TORCH_VARLEN}" has no dropout, but attention_dropout={dropout}. Set it to 0 '
            'or use another backend, such as "sdpa".'
        )
    query, key, value = _in_one_dtype(query, key, value)
    if query.is_cuda and query.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(
            f'attn_implementation="{TORCH_VARLEN}" takes float16 and bfloat16, not {query.dtype}. Load the model with '
            'dtype="bfloat16", train under autocast, or use "sdpa".'
        )
    batch_size, _, num_queries, _ = query.shape
    if num_queries == 1 and cu_seq_lens_q is None:
        # A decoding step has nothing to gain from the kernel, and unpadding would wait for the device.
        mask = None if attention_mask is None else attention_mask[:, None, None].bool()
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, is_causal=False)
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    states = [tensor.transpose(1, 2) for tensor in (query, key, value)]
    if attention_mask is not None:
        *unpadded, indices, lengths, longest = _upad_input(*states, attention_mask, num_queries, _unpad_input)
        output = _attend(unpadded, lengths, longest, causal, scaling)
        return _pad_input(output, indices, batch_size, num_queries), None
    if cu_seq_lens_q is None or cu_seq_lens_k is None:
        rows = torch.arange(batch_size + 1, dtype=torch.int32, device=query.device)
        cu_seq_lens_q, cu_seq_lens_k = rows * num_queries, rows * key.shape[2]
        max_length_q, max_length_k = num_queries, key.shape[2]
    flat = [tensor.flatten(0, 1) for tensor in states]
    output = _attend(flat, (cu_seq_lens_q, cu_seq_lens_k), (max_length_q, max_length_k), causal, scaling)
    return output.unflatten(0, (batch_size, -1)), None


def _in_one_dtype(*states: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values in the data type that autocast asks for; rotation, or norms kept in float32, leave some
    of them in float32 where the others aren't."""
    device_type = states[0].device.type
    if torch.is_autocast_enabled(device_type):
        return tuple(tensor.to(torch.get_autocast_dtype(device_type)) for tensor in states)
    dtypes = {tensor.dtype for tensor in states}
    half = dtypes & {torch.float16, torch.bfloat16}
    if len(dtypes) > 1 and len(half) == 1:
        (dtype,) = half
        return tuple(tensor.to(dtype) for tensor in states)
    return states


def _attend(
    states: list[torch.Tensor],
    cu_seqlens: tuple[torch.Tensor, torch.Tensor],
    longest: tuple[Any, Any],
    causal: bool,
    scaling: float | None,
) -> torch.Tensor:
    """Attention of flattened states (total length, heads, head_dim)."""
    kernel, groups_heads = _kernel()
    query, key, value = states
    options: dict[str, Any] = {"scale": scaling, "window_size": (-1, 0) if causal else (-1, -1)}
    if groups_heads and query.shape[1] != key.shape[1]:
        options["enable_gqa"] = True
    cu_q, cu_k = (lengths.to(torch.int32) for lengths in cu_seqlens)
    try:
        return kernel(query, key, value, cu_q, cu_k, int(longest[0]), int(longest[1]), **options)
    except NotImplementedError as error:
        raise RuntimeError(
            f'attn_implementation="{TORCH_VARLEN}" needs a CUDA device, but the model is on {query.device}. Move it '
            'there, or use "sdpa".'
        ) from error


for _name in (TORCH_VARLEN, TORCH_VARLEN_TOWER):
    AttentionInterface.register(_name, torch_varlen_forward)
    AttentionMaskInterface.register(_name, flash_attention_mask)
