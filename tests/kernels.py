# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Reference kernels for attention of sequences of different lengths, behind the real dispatchers, on any device.

What stands above a kernel runs as it is: PyTorch's operator with its own autograd wiring for "torch_varlen",
Transformers' choice between padded, packed and plain calls for "flash_attention_2". The kernels themselves are a loop
over sequences, refuse what a real kernel would misread, and write down what they were called with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, wraps
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import modeling_flash_attention_utils as flash_utils

from casa_hf import CasaForConditionalGeneration
from casa_hf.torch_varlen import TORCH_VARLEN

KERNELS = (TORCH_VARLEN, "flash_attention_2")

# What Transformers' dispatcher has loaded, or loads with.
_LOADED = {
    "_lazy_imports",
    "_loaded_implementation",
    "_flash_fn",
    "_flash_varlen_fn",
    "_flash_with_kvcache_fn",
    "_pad_fn",
    "_unpad_fn",
    "_process_flash_kwargs_fn",
    "_process_with_kvcache_kwargs_fn",
}


@dataclass(frozen=True)
class Call:
    """One call of a kernel.

    Attributes:
        causal: whether it was causal, aligned at the last query and the last key.
        q_lengths, k_lengths: of its sequences.
        heads, kv_heads: of queries and of keys.
    """

    causal: bool
    q_lengths: tuple[int, ...]
    k_lengths: tuple[int, ...]
    heads: int
    kv_heads: int


# What the kernels were called with since a test last cleared it.
calls: list[Call] = []


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """Attention of each sequence by itself, (queries, heads, head_dim), and the logarithms of its softmax's sums."""
    for states, cu_seqlens, longest in ((query, cu_seqlens_q, max_seqlen_q), (key, cu_seqlens_k, max_seqlen_k)):
        assert states.ndim == 3 and states.stride(-1) == 1, "a kernel reads heads as contiguous rows"
        assert cu_seqlens.dtype == torch.int32 and cu_seqlens.is_contiguous()
        # Keys may be left over: the empty slots of a static cache.
        covers = cu_seqlens[-1] <= len(states) if states is key else cu_seqlens[-1] == len(states)
        assert cu_seqlens[0] == 0 and covers, "the sequences don't cover the states"
        assert isinstance(longest, int) and longest == int(cu_seqlens.diff().max())
        assert int(cu_seqlens.diff().min()) >= 0
    assert len(cu_seqlens_q) == len(cu_seqlens_k) and key.shape == value.shape
    outputs, sums = [], []
    for queries, keys in _sequences(cu_seqlens_q, cu_seqlens_k):
        scores = _scores(query[queries], key[keys], causal, scale)
        outputs.append((scores.softmax(-1) @ _grouped(query, value[keys])).transpose(0, 1))
        sums.append(scores.logsumexp(-1))
    return torch.cat(outputs), torch.cat(sums, dim=1)


def attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    sums: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value from that of the output, by the formulas of flash attention."""
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    grads = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    for queries, keys in _sequences(cu_seqlens_q, cu_seqlens_k):
        q, g, out = (x[queries].transpose(0, 1) for x in (query, grad, output))
        k, v = (_grouped(query, x[keys]) for x in (key, value))
        weights = (_scores(query[queries], key[keys], causal, scale) - sums[:, queries, None]).exp()
        of_scores = weights * (g @ v.transpose(1, 2) - (g * out).sum(-1, keepdim=True)) * factor
        grads[0][queries] = (of_scores @ k).transpose(0, 1)
        for target, heads in ((grads[1], of_scores.transpose(1, 2) @ q), (grads[2], weights.transpose(1, 2) @ g)):
            target[keys] = heads.unflatten(0, (key.shape[1], -1)).sum(1).transpose(0, 1)
    return grads


def _sequences(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Iterator[tuple[slice, slice]]:
    bounds = zip(pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True)
    return ((slice(*of_queries), slice(*of_keys)) for of_queries, of_keys in bounds)


def _grouped(query: Tensor, keys: Tensor) -> Tensor:
    """Keys or values (length, kv_heads, head_dim) as (heads, length, head_dim)."""
    return keys.transpose(0, 1).repeat_interleave(query.shape[1] // keys.shape[1], dim=0)


def _scores(query: Tensor, key: Tensor, causal: bool, scale: float | None) -> Tensor:
    """(heads, queries, keys) of one sequence; causal means that the last query sees all keys."""
    scores = query.transpose(0, 1) @ _grouped(query, key).transpose(1, 2)
    scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        seen = torch.ones_like(scores[0], dtype=torch.bool).tril(scores.shape[2] - scores.shape[1])
        scores = scores.masked_fill(~seen, -torch.inf)
    return scores


def _write_down(query: Tensor, key: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, causal: bool) -> None:
    lengths = (tuple(cu_seqlens.diff().tolist()) for cu_seqlens in (cu_seqlens_q, cu_seqlens_k))
    calls.append(Call(causal, *lengths, query.shape[1], key.shape[1]))


@cache
def register_torch_kernel() -> bool:
    """Give PyTorch's operator a kernel for CPUs; False where this torch has no such operator."""
    try:
        from torch.nn.attention.varlen import _varlen_attn, _varlen_attn_backward
    except ImportError:
        return False

    @_varlen_attn.register_kernel("cpu")
    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        is_causal: bool = False,
        scale: float | None = None,
        window_size: Any = None,
        *others: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert list(window_size) == [-1, 0 if is_causal else -1] and others[1:] in ((), (None, None, None))
        _write_down(query, key, cu_seq_q, cu_seq_k, is_causal)
        output, sums = attention(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal, scale)
        return output, sums, torch.zeros(2, dtype=torch.uint64)

    @_varlen_attn_backward.register_kernel("cpu")
    def backward(
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        is_causal: bool,
        rng_state: Tensor,
        scale: float | None = None,
        window_size: Any = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return attention_backward(grad, query, key, value, out, lse, cu_seq_q, cu_seq_k, is_causal, scale)

    return True


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = False,
) -> Tensor:
    """As in the package flash-attn, by the reference kernel."""
    assert dropout_p == 0
    _write_down(q, k, cu_seqlens_q, cu_seqlens_k, causal)
    return attention(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, softmax_scale)[0]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = False,
) -> Tensor:
    """As in the package flash-attn: rows of equal length."""
    (rows, length), keys = q.shape[:2], k.shape[1]
    starts = torch.arange(rows + 1, dtype=torch.int32, device=q.device)
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    options = dropout_p, softmax_scale, causal, deterministic
    output = flash_attn_varlen_func(*flat, starts * length, starts * keys, length, keys, *options)
    return output.unflatten(0, (rows, length))


def _within(around: Callable[[], Any], kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(kernel)
    def run(*args: Any, **kwargs: Any) -> Tensor:
        with around():
            return kernel(*args, **kwargs)

    return run


@contextmanager
def reference_kernels(around: Callable[[], Any] = nullcontext) -> Iterator[None]:
    """Both dispatchers with these kernels behind them; those of flash-attn run within `around()`."""
    register_torch_kernel()
    calls.clear()
    loaded = {name: value for name, value in vars(flash_utils).items() if name in _LOADED}
    # Newer versions of Transformers also load a function for paged caches.
    paged = (None,) * ("_flash_with_kvcache_fn" in loaded)
    kernels = (_within(around, kernel) for kernel in (flash_attn_func, flash_attn_varlen_func))
    functions = (*kernels, *paged, flash_utils._pad_input, flash_utils._unpad_input)
    flash_utils._lazy_imports = lambda *args, **kwargs: functions
    flash_utils._loaded_implementation = None
    try:
        yield
    finally:
        for name, value in loaded.items():
            setattr(flash_utils, name, value)


def use_backend(model: CasaForConditionalGeneration, name: str) -> CasaForConditionalGeneration:
    """The model with another backend; by name alone for flash attention, which refuses to be chosen on a CPU."""
    if name != "flash_attention_2":
        model.set_attn_implementation(name)
    else:
        for config in (model.config, model.model.visual.config, model.model.language_model.config):
            config._attn_implementation_internal = name
    return model
