# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""How the attention of a fusion layer is computed: one route per forward, the same for all layers.

| route | back end | what it does |
|---|---|---|
| `DenseRoute` | "eager", and back ends of the user's own | one mask over all tokens and keys: the plain reference |
| `BlockRoute` | "sdpa" | windows of similar size as one padded batch |
| `VarlenRoute` | "flash_attention_2" and its kin, "torch_varlen" | one call of the kernel over all windows |
| `StepRoute` | all but the first row's, in decoding steps | reads keys where they are stored, without a copy |

Every route takes the same queries and keys and returns the same numbers, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers.utils.generic import is_flash_attention_requested

from .blocks import Blocks, PaddedBlocks, fusion_blocks, update_blocks
from .cache_casa import KeysValues
from .varlen import TORCH_VARLEN
from .windows import WindowPlan

# (module, query, keys, mask, **arguments of the attention interface) -> (batch, tokens, heads * head_dim), weights
Attend = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


def is_varlen(implementation: str | None) -> bool:
    """Whether a back end takes sequences of different lengths in one call, without a mask."""
    return implementation == TORCH_VARLEN or is_flash_attention_requested(
        requested_attention_implementation=implementation
    )


class Route:
    """The way from queries and keys to attention outputs."""

    def attend(
        self, interface: Attend, module: Any, query: torch.Tensor, images: KeysValues | None, text: KeysValues | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One softmax over [image tokens ; text].

        Args:
            interface: the attention interface of the back end.
            module: has `config`, `scaling`, `attention_dropout`, `num_key_value_groups` and `training`.
            query: (batch, heads, tokens, head_dim); for updates of image states (1, heads, num_image_tokens,
                head_dim).
            images: keys/values of all image columns of the call.
            text: keys/values of the text slots of the call.

        Returns:
            The output, (batch, tokens, heads * head_dim), and the weights where the back end gives any. Where a token
            sees nothing the output means nothing.
        """
        raise NotImplementedError

    def to(self, device: torch.device) -> Route:
        """The route with its tensors on `device`."""
        raise NotImplementedError


@dataclass(frozen=True)
class DenseRoute(Route):
    """One call of the back end with a mask over all tokens and keys.

    Attributes:
        mask: (batch, 1, tokens, keys), boolean, or additive for "eager".
        plan: for updates of image states, says where the new image tokens go; None for fusion.
    """

    mask: torch.Tensor
    plan: WindowPlan | None = None

    def attend(
        self, interface: Attend, module: Any, query: torch.Tensor, images: KeysValues | None, text: KeysValues | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.plan is not None:
            query = self.plan.place(query[0].transpose(0, 1)).transpose(1, 2)
        output, weights = interface(module, query, _joined(images, text), self.mask, is_causal=False)
        return output if self.plan is None else self.plan.collect(output)[None], weights

    def to(self, device: torch.device) -> DenseRoute:
        return DenseRoute(self.mask.to(device), None if self.plan is None else self.plan.to(device))


@dataclass(frozen=True)
class BlockRoute(Route):
    """One call of the back end for all blocks of similar size.

    Attributes:
        batches: padded blocks.
        in_place: whether the keys of the only block are those of the call as they stand.
    """

    batches: tuple[PaddedBlocks, ...]
    in_place: bool

    def attend(
        self, interface: Attend, module: Any, query: torch.Tensor, images: KeysValues | None, text: KeysValues | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        shape, queries = query.shape, _flat(query)
        queries = nn.functional.pad(queries, (0, 0, 0, 0, 0, 1))  # padding reads and writes a row of its own
        keys = None if self.in_place else _flat_keys(images, text)
        output: torch.Tensor | None = None
        for batch in self.batches:
            if keys is None:
                gathered = _joined(images, text)
            else:
                gathered = KeysValues(*(part[batch.key_index].transpose(1, 2) for part in keys))
            attended, _ = interface(
                module, queries[batch.query_index].transpose(1, 2), gathered, batch.mask, is_causal=False
            )
            if output is None:
                output = attended.new_zeros(len(queries), attended.shape[-1])
            output = output.index_copy(0, batch.query_index.flatten(), attended.flatten(0, 1))
        assert output is not None
        return output[:-1].view(shape[0], shape[2], -1), None

    def to(self, device: torch.device) -> BlockRoute:
        return replace(self, batches=tuple(batch.to(device) for batch in self.batches))


@dataclass(frozen=True)
class VarlenRoute(Route):
    """One call of a kernel that takes blocks of different lengths."""

    blocks: Blocks

    def attend(
        self, interface: Attend, module: Any, query: torch.Tensor, images: KeysValues | None, text: KeysValues | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        blocks, shape, queries = self.blocks, query.shape, _flat(query)
        if blocks.takes_all_keys:
            keys = _joined(images, text)
        else:
            keys = KeysValues(*(part[blocks.key_index].transpose(0, 1)[None] for part in _flat_keys(images, text)))
        attended, _ = interface(
            module,
            queries[blocks.query_index].transpose(0, 1)[None],
            keys,
            None,
            is_causal=blocks.causal,
            cu_seq_lens_q=blocks.cu_seqlens_q,
            cu_seq_lens_k=blocks.cu_seqlens_k,
            max_length_q=blocks.max_q,
            max_length_k=blocks.max_k,
        )
        output = attended.new_zeros(len(queries), attended.shape[-1])
        output = output.index_copy(0, blocks.query_index, attended[0])
        return output.view(shape[0], shape[2], -1), None

    def to(self, device: torch.device) -> VarlenRoute:
        return VarlenRoute(self.blocks.to(device))


@dataclass(frozen=True)
class StepRoute(Route):
    """Few tokens against stored keys, without a copy of these: one softmax over two products.

    Attributes:
        mask: boolean (batch, 1, tokens, image columns [+ text slots]); None if every token sees every key.
        first_slot: the text slot that the mask's text begins with.
    """

    mask: torch.Tensor | None
    first_slot: int = 0

    def attend(
        self, interface: Attend, module: Any, query: torch.Tensor, images: KeysValues | None, text: KeysValues | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        parts = [part for part in (images, text) if part is not None]
        if len(parts) == 1 and self.mask is None:
            return interface(module, query, parts[0], None, is_causal=False)
        grouped = _grouped(query, parts[0].keys.shape[1], module)
        scores = [_scores(grouped, part.keys) for part in parts]
        weights = _softmax(torch.cat(scores, dim=-1) if len(scores) > 1 else scores[0], self.mask, module)
        split = weights.split([part.keys.shape[2] for part in parts], dim=-1)
        return _weighted(list(zip(split, (part.values for part in parts), strict=True)), query), None

    def attend_with_self(
        self,
        module: Any,
        query: torch.Tensor,
        images: KeysValues | None,
        text: KeysValues,
        self_mask: torch.Tensor | None,
        fusion_scale: torch.Tensor | None,
    ) -> torch.Tensor:
        """Self-attention plus fusion, of the same queries and text keys: the text is read once for both.

        Args:
            module: as in `attend`.
            query: (batch, heads, tokens, head_dim), rotated.
            images: keys/values of all image columns.
            text: keys/values of all text, of which fusion takes the slots from `first_slot` on.
            self_mask: boolean (batch or 1, 1, tokens, text slots) of self-attention; None if all is visible.
            fusion_scale: (batch, tokens) or (1,) factor of the fusion output, 0 where a token sees nothing; None
                for 1.
        """
        grouped = _grouped(query, text.keys.shape[1], module)
        of_text = _scores(grouped, text.keys)
        weights = _softmax(of_text, self_mask, module)
        scores, window = [], of_text[..., self.first_slot :]
        if images is not None:
            scores.append(_scores(grouped, images.keys))
        fused = _softmax(torch.cat([*scores, window], dim=-1), self.mask, module)
        if fusion_scale is not None and fusion_scale.ndim == 2:
            # (batch, tokens) for (batch, kv_heads, groups * tokens, keys)
            groups = grouped.shape[2] // query.shape[2]
            fusion_scale = fusion_scale.repeat(1, groups)[:, None, :, None]
        if fusion_scale is not None:
            fused = fused * fusion_scale.to(fused.dtype)
        num_window = window.shape[-1]
        weights = weights + nn.functional.pad(fused[..., -num_window:], (self.first_slot, 0))
        parts = [(weights, text.values)]
        if images is not None:
            parts.append((fused[..., :-num_window], images.values))
        return _weighted(parts, query)

    def to(self, device: torch.device) -> StepRoute:
        return replace(self, mask=None if self.mask is None else self.mask.to(device))


def fusion_route(
    plan: WindowPlan, implementation: str, dtype: torch.dtype, everything_visible: bool
) -> tuple[Route | None, bool]:
    """The route of a call's fusion layers, None if no token sees anything; and whether it is known that all see.

    Args:
        plan: the windows of the call.
        implementation: name of the back end.
        dtype: of the states.
        everything_visible: whether all that is stored is visible to a token without an image of its own, as in a
            single row without padding.
    """
    varlen = is_varlen(implementation)
    if not (varlen or implementation == "sdpa"):
        return DenseRoute(_back_end_mask(plan.mask(), implementation, dtype)), False
    if plan.sees.shape[1] == 1 and not plan.new_columns:
        return StepRoute(None if everything_visible else plan.mask(), plan.text_slots[0]), everything_visible
    blocks, device = fusion_blocks(plan.on_host), plan.sees.device
    if blocks is None:
        return None, False
    all_see = len(blocks.query_index) == plan.sees.numel()
    if varlen:
        return VarlenRoute(blocks).to(device), all_see
    return BlockRoute(blocks.padded(plan.sees.numel()), blocks.takes_all_keys).to(device), all_see


def update_route(plan: WindowPlan, implementation: str, dtype: torch.dtype) -> Route:
    """The route of updates of image states by attention; arguments as in `fusion_route`."""
    varlen = is_varlen(implementation)
    if not (varlen or implementation == "sdpa"):
        return DenseRoute(_back_end_mask(plan.update_mask(), implementation, dtype), plan)
    blocks, device = update_blocks(plan.on_host), plan.sees.device
    if varlen:
        return VarlenRoute(blocks).to(device)
    return BlockRoute(blocks.padded(len(blocks.query_index)), blocks.takes_all_keys).to(device)


def single_row_lengths(num_queries: int, num_keys: int, device: torch.device) -> dict[str, Any]:
    """Arguments that make self-attention of one row take the first `num_keys` slots of a static cache, without a mask
    from which every layer would have to find that out."""
    return {
        # Made there: a copy would wait for the device.
        "cu_seq_lens_q": torch.arange(2, dtype=torch.int32, device=device) * num_queries,
        "cu_seq_lens_k": torch.arange(2, dtype=torch.int32, device=device) * num_keys,
        "max_length_q": num_queries,
        "max_length_k": num_keys,
    }


def packed_lengths(samples: torch.Tensor, token_mask: torch.Tensor) -> dict[str, Any]:
    """Arguments that make self-attention keep packed samples apart where the back end takes no mask.

    Args:
        samples: (batch, tokens) index of each token's sample in its row.
        token_mask: (batch, tokens) False for padding, which becomes sequences of its own.
    """
    starts = torch.ones_like(token_mask)
    starts[:, 1:] = (samples.diff(dim=1) != 0) | (token_mask[:, 1:] != token_mask[:, :-1])
    cu_seqlens = nn.functional.pad(starts.flatten().nonzero()[:, 0], (0, 1), value=starts.numel()).to(torch.int32)
    longest = int(cu_seqlens.diff().max())
    return {
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def _back_end_mask(mask: torch.Tensor, implementation: str, dtype: torch.dtype) -> torch.Tensor:
    """A boolean mask in the form that the back end takes: additive for eager, boolean for the others."""
    if implementation != "eager":
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def _joined(images: KeysValues | None, text: KeysValues | None) -> KeysValues:
    """[image columns ; text slots] of each row."""
    if images is None or text is None:
        keys = images if text is None else text
        assert keys is not None
        return keys
    return images.append(text)


def _flat(states: torch.Tensor) -> torch.Tensor:
    """(batch, heads, length, head_dim) to (batch * length, heads, head_dim)."""
    return states.transpose(1, 2).flatten(0, 1)


def _flat_keys(images: KeysValues | None, text: KeysValues | None) -> KeysValues:
    """Image columns of all rows, then text slots of all rows, each (columns and slots, kv_heads, head_dim)."""
    parts = [part for part in (images, text) if part is not None]
    return KeysValues(*(torch.cat([_flat(tensor) for tensor in tensors]) for tensors in zip(*parts, strict=True)))


def _grouped(query: torch.Tensor, kv_heads: int, module: Any) -> torch.Tensor:
    """(batch, heads, tokens, head_dim) to (batch, kv_heads, groups * tokens, head_dim), scaled: scores that are scaled
    afterwards leave the range of float16."""
    batch_size, _, _, head_dim = query.shape
    return query.reshape(batch_size, kv_heads, -1, head_dim) * module.scaling


def _scores(grouped: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    return torch.matmul(grouped, keys.transpose(2, 3))


def _softmax(scores: torch.Tensor, mask: torch.Tensor | None, module: Any) -> torch.Tensor:
    """Weights (batch, kv_heads, groups * tokens, keys), by a softmax in at least float32."""
    if mask is not None:
        groups = scores.shape[2] // mask.shape[2]
        scores = scores.masked_fill(~mask.repeat(1, 1, groups, 1), torch.finfo(scores.dtype).min)
    dtype = scores.dtype if scores.dtype == torch.float64 else torch.float32
    weights = torch.softmax(scores, dim=-1, dtype=dtype).to(scores.dtype)
    return nn.functional.dropout(weights, module.attention_dropout, module.training)


def _weighted(parts: list[tuple[torch.Tensor, torch.Tensor]], query: torch.Tensor) -> torch.Tensor:
    """Sum of weights times values of all parts: (batch, tokens, heads * head_dim)."""
    output = sum(torch.matmul(weights, values) for weights, values in parts)
    assert isinstance(output, torch.Tensor)
    return output.reshape(query.shape).transpose(1, 2).flatten(2)
