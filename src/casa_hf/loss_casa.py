# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The loss without the logits of a whole batch.

Logits and what their loss is made of take 13 bytes per token and entry of the vocabulary: 4 GB for 2,040 tokens of
Qwen2.5-VL. Here the output head sees tokens with a label only, some of them at a time, and again in the backward pass.
It is called as the module that it is, so adapters, quantized weights, rows of new tokens and weights spread over
devices work as in a plain call. Where Liger's kernel is installed and can take its place, that one runs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint
from transformers.loss.loss_utils import ForCausalLMLoss

# Of a logit and its part of the loss: itself, float32, its logarithm, and the gradient of these.
_BYTES_PER_LOGIT = 13
_CHUNK_BYTES = 2**28
_LIGER_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def chunk_tokens(vocab_size: int) -> int:
    """Number of tokens, a power of two, whose logits and loss take a quarter of a GiB at most.

    Args:
        vocab_size: number of logits of a token.
    """
    return 1 << max(_CHUNK_BYTES // (_BYTES_PER_LOGIT * vocab_size), 1).bit_length() - 1


def chunked_loss(
    head: nn.Module,
    states: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    **_: Any,
) -> torch.Tensor:
    """What Transformers' `ForCausalLMLoss` gives for the logits of `head`, which are never held all at once.

    Args:
        head: output head, from (1, tokens, hidden) to (1, tokens, vocabulary).
        states: (batch, tokens, hidden) last hidden states.
        labels: (batch, tokens) target ids, shifted here.
        vocab_size: number of logits of a token.
        num_items_in_batch: what the sum over tokens is divided by; None for the number of those with a label.
        ignore_index: label of tokens that have no part in the loss.
        shift_labels: (batch, tokens) labels that are shifted already, in place of `labels`.
        **_: what `ForCausalLMLoss` doesn't read either.

    Returns:
        The loss, in float32.

    Raises:
        ValueError: if labels have another shape than the states.
    """
    targets = pad(labels, (0, 1), value=ignore_index)[..., 1:] if shift_labels is None else shift_labels
    if targets.shape != states.shape[:-1]:
        raise ValueError(
            f"labels have the shape {tuple(targets.shape)}, but the states are of {tuple(states.shape[:-1])} tokens. "
            "Pass a label for each token that logits_to_keep leaves, -100 where no loss is wanted."
        )
    states, targets = states.flatten(0, 1), targets.flatten().to(states.device)
    labelled = (targets != ignore_index).nonzero().squeeze(-1)
    items = len(labelled) if num_items_in_batch is None else num_items_in_batch
    if not len(labelled):  # one token without a loss: no kernel need know what none at all is
        labelled = labelled.new_zeros(1)
    states, targets = states[labelled], targets[labelled]
    fused = _liger(head, states)
    if fused is not None:
        total = fused(states, head.weight, targets, bias=head.bias, ignore_index=ignore_index, reduction="sum")
        return total / (items.to(total.device) if isinstance(items, torch.Tensor) else items)

    def part(
        call: Callable[[torch.Tensor], torch.Tensor], states: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        return ForCausalLMLoss(
            call(states[None]), None, vocab_size, items, ignore_index=ignore_index, shift_labels=targets
        )

    def chunks(call: Callable[[torch.Tensor], torch.Tensor], states: torch.Tensor) -> torch.Tensor:
        size = chunk_tokens(vocab_size)
        parts = list(zip(states.split(size), targets.split(size), strict=True))
        if len(parts) == 1 or not torch.is_grad_enabled():
            return torch.stack([part(call, *chunk) for chunk in parts]).sum()
        return torch.stack([checkpoint(part, call, *chunk, use_reentrant=False) for chunk in parts]).sum()

    if not _gathers_weights(head):
        return chunks(head, states)
    return _call_once(head, chunks, states) if _gathers_in_hooks(head) else part(head, states, targets)


def _gathers_weights(head: nn.Module) -> bool:
    """Whether calls gather weights from all processes, as under ZeRO-3, and where FSDP wraps the head by itself.

    Processes then have to call it equally often, whatever labels their batches have: once.
    """
    is_wrapped = hasattr(head, "unshard") or hasattr(head, "_fsdp_wrapped_module")
    return is_wrapped or any(hasattr(parameter, "ds_id") for parameter in head.parameters())


def _gathers_in_hooks(head: nn.Module) -> bool:
    """Whether all weights are gathered in the head's own hooks, and no further hook does something to logits."""
    hooks = [*head._forward_pre_hooks.values(), *head._forward_hooks.values()]
    known = all(getattr(hook, "__module__", "").startswith(("torch.distributed.", "deepspeed.")) for hook in hooks)
    return known and not any(head.children())


def _call_once(
    head: nn.Module,
    chunks: Callable[[Callable[[torch.Tensor], torch.Tensor], torch.Tensor], torch.Tensor],
    states: torch.Tensor,
) -> torch.Tensor:
    """Compute the loss of all chunks within one call of the head, in whose hooks its weights are gathered."""
    forward, is_changed = head.forward, "forward" in vars(head)
    head.forward = partial(chunks, forward)
    try:
        return head(states)
    finally:
        if is_changed:
            head.forward = forward
        else:
            del head.forward


def _liger(head: nn.Module, states: torch.Tensor) -> Callable[..., torch.Tensor] | None:
    """Liger's loss of states and weights, if it can stand for a call of the head; else None."""
    if not _runs_liger(states.device.type) or type(head) is not nn.Linear:
        return None
    changed = "forward" in vars(head) or head._forward_hooks or head._forward_pre_hooks
    weight = head.weight
    is_plain = type(weight) in (torch.Tensor, nn.Parameter) and not hasattr(weight, "ds_id")
    is_known = weight.device == states.device and {weight.dtype, states.dtype} <= {*_LIGER_DTYPES}
    # It computes no gradient of the weights where the states need none.
    has_gradients = states.requires_grad or not weight.requires_grad
    if changed or not is_plain or not is_known or not has_gradients:
        return None
    # Not an import statement: checkpoints carry this file, and those who load them needn't have the package.
    return import_module("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy


@cache
def _runs_liger(device_type: str) -> bool:
    return device_type in ("cuda", "xpu") and all(map(find_spec, ("triton", "liger_kernel")))
