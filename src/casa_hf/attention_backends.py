# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""How each attention backend computes the attention of windows.

A forward hands the windows of its plan to all fusion layers in the form that the backend takes: which queries meet
which keys. `fusion_windows` and `update_windows` choose the form once per forward; `windowed_attention` runs it in
every layer.

| form | backend | what runs |
|---|---|---|
| `MaskedWindows` | "eager", and custom backends | one mask over all tokens and keys: the plain reference |
| `DenseWindows` | "sdpa", in calls of few tokens with one new image per row | one mask over all tokens and keys |
| `PaddedWindows` | "sdpa" | windows of similar size as one padded batch |
| `VarlenWindows` | "flash_attention_2" and similar ones, "torch_varlen" | one call over all windows |
| `StepWindows` | all but "eager" and custom backends, in decoding steps | keys are read where they are stored |

All take the same queries and keys and return the same numbers, up to rounding.

Windows become *segments*: consecutive tokens of a row that see the same images and the same start of their window.
The keys of a segment are these image tokens, followed by the text of the window up to the segment's last token. Its
queries are the last tokens of that text, so that a segment is causal attention aligned at the bottom right. No segment
knows of the others: time and memory grow with the number of windows, not with its square. Updates of image states
(axis D4 "full") are segments too, one per image.

Lengths of segments have to be known on the host, and all of these tensors are small and hold integers. So they are
computed there, from a plan that is there, and copied to the device without waiting for it.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward
from transformers.utils.generic import is_flash_attention_requested

from .backbone import AttentionModule
from .cache_layers import FusionKeys, KeysValues
from .torch_varlen import TORCH_VARLEN
from .transfers import moved
from .windows import WindowPlan, pinned_before

# Numbers that a `PackedMask` has at most.
_DENSE_MASK = 2**21
# Numbers that the mask of one segment has at most; queries of longer ones attend one part after the other.
_LARGEST_MASK = 2**24
# Kernels copy a mask, in every layer, whose rows don't begin at multiples of so many numbers.
_MASK_ALIGNMENT = 8


def is_varlen(implementation: str | None) -> bool:
    """Whether a backend takes sequences of different lengths in one call, without a mask."""
    return implementation == TORCH_VARLEN or is_flash_attention_requested(
        requested_attention_implementation=implementation
    )


@dataclass(frozen=True)
class PackedMask:
    """A mask for "sdpa" in a call of few tokens: the query heads of each key head are further tokens of it, so that no
    key is repeated, and the mask is made once for all layers.

    Attributes:
        additive: (batch or 1, 1, groups * tokens, keys), of which rows begin at addresses that kernels can read from.
    """

    additive: torch.Tensor

    @classmethod
    def of(cls, mask: torch.Tensor, dtype: torch.dtype, groups: int) -> PackedMask:
        """Of a boolean mask (batch or 1, 1, tokens, keys)."""
        mask = mask.repeat(1, 1, groups, 1)
        width = -(-mask.shape[-1] // _MASK_ALIGNMENT) * _MASK_ALIGNMENT
        additive = torch.zeros(*mask.shape[:-1], width, dtype=dtype, device=mask.device)[..., : mask.shape[-1]]
        return cls(additive.masked_fill_(~mask, -torch.inf))

    @classmethod
    def of_text(cls, mask: torch.Tensor | None, dtype: torch.dtype, groups: int) -> PackedMask | torch.Tensor | None:
        """Of a mask of self-attention, where that is boolean and small; else the mask as it is."""
        if mask is None or mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[2] == 1:
            return mask
        return mask if mask.numel() * groups > _DENSE_MASK else cls.of(mask, dtype, groups)


@dataclass(frozen=True)
class MaskedWindows:
    """One call of the backend with a mask over all tokens and keys.

    Attributes:
        mask: (batch, 1, tokens, keys), boolean, or additive for "eager".
        sees: (batch, tokens) whether a token sees anything.
    """

    mask: torch.Tensor
    sees: torch.Tensor


@dataclass(frozen=True)
class MaskedUpdate:
    """The same for updates of image states, which are distributed over their rows and collected again.

    Attributes:
        mask: (batch, 1, new image columns, keys), boolean, or additive for "eager".
        plan: windows of the call.
    """

    mask: torch.Tensor
    plan: WindowPlan


@dataclass(frozen=True)
class DenseWindows:
    """One call over all tokens and keys, as for a frame of a stream: there are few tokens, of at most two windows in
    each row, so that the launches of segments would cost more than the keys that a mask hides.

    Attributes:
        mask: mask over all keys.
    """

    mask: PackedMask


@dataclass(frozen=True)
class PaddedWindows:
    """One call of the backend for each batch of segments of similar size.

    Attributes:
        batches: padded segments.
        in_place: whether the keys of the only segment are those of the call as they stand.
    """

    batches: tuple[PaddedSegments, ...]
    in_place: bool


@dataclass(frozen=True)
class VarlenWindows:
    """One call of a backend that takes segments of different lengths."""

    segments: Segments


@dataclass(frozen=True)
class StepWindows:
    """One token per row against stored keys, without a copy of these: one softmax over two products.

    Attributes:
        mask: boolean (batch, 1, tokens, image columns [+ cache positions]); None if every token sees every key.
        first_text: cache position that the mask's text begins with.
    """

    mask: torch.Tensor | None
    first_text: int = 0


BackendWindows = MaskedWindows | MaskedUpdate | DenseWindows | PaddedWindows | VarlenWindows | StepWindows


def fusion_windows(
    plan: WindowPlan,
    implementation: str,
    dtype: torch.dtype,
    device: torch.device,
    groups: int,
    everything_visible: bool,
) -> tuple[BackendWindows | None, bool]:
    """The windows of a call's fusion layers, None if no token sees anything; and whether it is known that all see.

    Args:
        plan: windows of the call; on the CPU, unless it is a decoding step.
        implementation: name of the backend.
        dtype: data type of the states.
        device: their device.
        groups: number of query heads for each key head.
        everything_visible: whether a token of a decoding step sees all that is stored, as in a single row without
            padding.
    """
    varlen = is_varlen(implementation)
    if not (varlen or implementation == "sdpa"):
        plan = plan.on(device)
        return MaskedWindows(_backend_mask(plan.mask(), implementation, dtype), plan.sees), False
    if plan.sees.shape[1] == 1 and not plan.new_columns:
        mask = None if everything_visible else plan.on(device).mask()
        return StepWindows(mask, plan.text_range[0]), everything_visible
    if not varlen and _is_short(plan, groups):
        if not plan.sees.any():
            return None, False
        return DenseWindows(PackedMask.of(plan.on(device).mask(), dtype, groups)), bool(plan.sees.all())
    segments = fusion_segments(plan)
    if segments is None:
        return None, False
    all_see = len(segments.query_index) == plan.sees.numel()
    if varlen:
        return moved(VarlenWindows(segments), device), all_see
    padded = PaddedWindows(segments.padded(plan.sees.numel()), segments.takes_all_keys)
    return moved(padded, device), all_see


def _is_short(plan: WindowPlan, groups: int) -> bool:
    """Whether the tokens of each row, of a plan on the host, are in at most two windows, and their mask is small."""
    batch_size, num_tokens = plan.sees.shape
    first, past = plan.text_range if plan.rules.with_text else (0, 0)
    if batch_size * groups * num_tokens * (plan.num_columns + past - first) > _DENSE_MASK:
        return False
    windows = (plan.image_start.diff(dim=1) != 0).sum(1) + 1
    return int(windows.max()) <= 2


def update_windows(plan: WindowPlan, implementation: str, dtype: torch.dtype, device: torch.device) -> BackendWindows:
    """What image states attend to in updates by attention; arguments as in `fusion_windows`."""
    varlen = is_varlen(implementation)
    if not (varlen or implementation == "sdpa"):
        plan = plan.on(device)
        return MaskedUpdate(_backend_mask(plan.update_mask(), implementation, dtype), plan)
    segments = update_segments(plan)
    if varlen:
        return moved(VarlenWindows(segments), device)
    padded = PaddedWindows(segments.padded(len(segments.query_index)), segments.takes_all_keys)
    return moved(padded, device)


def windowed_attention(
    module: AttentionModule, query: torch.Tensor, keys: FusionKeys, windows: BackendWindows | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One softmax over [image tokens ; text] that each query sees.

    Args:
        module: module that projected the query; has `config`, `scaling`, `attention_dropout`,
            `num_key_value_groups` and `training`.
        query: (batch, heads, tokens, head_dim); for updates of image states (1, heads, num_image_tokens, head_dim).
        keys: keys/values of all image columns of the call and of its text.
        windows: form of the windows that the backend takes; None if no token sees anything.

    Returns:
        The output, (batch, tokens, heads * head_dim), and the weights where the backend gives any. Where a token sees
        nothing the output means nothing, and weights are 0.
    """
    batch_size, num_heads, num_tokens, head_dim = query.shape
    match windows:
        case MaskedWindows(mask, sees):
            output, weights = attend(module, query, keys.joined(), mask, is_causal=False)
            return output, None if weights is None else weights.masked_fill(~sees[:, None, :, None], 0)
        case MaskedUpdate(mask, plan):
            query = plan.place(query[0].transpose(0, 1)).transpose(1, 2)
            return plan.collect(attend(module, query, keys.joined(), mask, is_causal=False)[0])[None], None
        case DenseWindows(mask):
            return _attend_packed(module, query, keys.joined(), mask), None
        case StepWindows(mask):
            return _step_attention(module, query, keys, mask), None
        case PaddedWindows(batches, in_place):
            queries = nn.functional.pad(_flat(query), (0, 0, 0, 0, 0, 1))  # padding reads and writes a row of its own
            stored = keys.joined() if in_place else _flat_keys(keys)
            flat: torch.Tensor | None = None  # (queries, heads * head_dim), in the dtype of the backend's output
            for batch in batches:
                part = queries[batch.query_index].transpose(1, 2)  # (segments, heads, queries, head_dim)
                seen = stored if in_place else KeysValues(*(x[batch.key_index].transpose(1, 2) for x in stored))
                if batch.queries_at_once is None:
                    output, _ = attend(module, part, seen, batch.mask, is_causal=False)
                else:
                    output = _causal_in_parts(module, part, seen, batch.queries_at_once)
                if flat is None:
                    flat = output.new_zeros(len(queries), num_heads * head_dim)
                flat = flat.index_copy(0, batch.query_index.flatten(), output.flatten(0, 1))
            assert flat is not None
            return flat[:-1].view(batch_size, num_tokens, -1), None
        case VarlenWindows(segments):
            part = _flat(query)[segments.query_index].transpose(0, 1)[None]
            if segments.takes_all_keys:
                seen = keys.joined()
            else:
                seen = KeysValues(*(x[segments.key_index].transpose(0, 1)[None] for x in _flat_keys(keys)))
            output, _ = attend(module, part, seen, None, **segments.arguments())
            flat = output.new_zeros(batch_size * num_tokens, num_heads * head_dim)
            return flat.index_copy(0, segments.query_index, output[0]).view(batch_size, num_tokens, -1), None
        case _:
            return query.new_zeros(batch_size, num_tokens, num_heads * head_dim), None


def attend(
    module: AttentionModule,
    query: torch.Tensor,
    keys: KeysValues,
    mask: torch.Tensor | PackedMask | None,
    **arguments: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(batch, tokens, heads * head_dim) and the weights or None, by the backend that `module.config` names."""
    if isinstance(mask, PackedMask):
        return _attend_packed(module, query, keys, mask), None
    implementation = module.config._attn_implementation
    if implementation in ("sdpa", TORCH_VARLEN) and query.shape[2] == 1 and mask is not None:
        # Kernels that take a mask go through all keys of a head one after the other, and Transformers repeats keys for
        # them in compiled steps.
        return _step_attention(module, query, FusionKeys(None, keys), _of_keys(mask)), None
    backend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
    dropout = module.attention_dropout if module.training else 0.0
    output, weights = backend(module, query, *keys, mask, dropout=dropout, scaling=module.scaling, **arguments)
    return output.flatten(2).contiguous(), weights


def _causal_in_parts(module: AttentionModule, query: torch.Tensor, keys: KeysValues, size: int) -> torch.Tensor:
    """(batch, tokens, heads * head_dim) of queries of which the last one sees all keys, the one before all but the
    last, and so on: `size` queries at a time, so that no mask is larger than that many rows."""
    num_queries, outputs = query.shape[2], []
    before = keys.keys.shape[2] - num_queries
    for first in range(0, num_queries, size):
        part = query[:, :, first : first + size]
        past = before + first + part.shape[2]
        mask = torch.ones(part.shape[2], past, dtype=torch.bool, device=query.device).tril(before + first)
        outputs.append(attend(module, part, keys.between(0, past), mask[None, None], is_causal=False)[0])
    return torch.cat(outputs, dim=1)


def _attend_packed(module: AttentionModule, query: torch.Tensor, keys: KeysValues, mask: PackedMask) -> torch.Tensor:
    """(batch, tokens, heads * head_dim) by "sdpa"; arguments as in `attend`."""
    batch_size, kv_heads, _, head_dim = keys.keys.shape
    output = nn.functional.scaled_dot_product_attention(
        query.reshape(batch_size, kv_heads, -1, head_dim),
        *keys,
        attn_mask=mask.additive,
        dropout_p=module.attention_dropout if module.training else 0.0,
        scale=module.scaling,
    )
    return output.reshape(query.shape).transpose(1, 2).flatten(2)


def step_with_self_attention(
    module: AttentionModule,
    query: torch.Tensor,
    images: KeysValues | None,
    text: KeysValues,
    windows: StepWindows,
    self_mask: torch.Tensor | None,
    fusion_scale: torch.Tensor | None,
) -> torch.Tensor:
    """Self-attention plus fusion of a step, of the same queries and text keys: the text is read once for both.

    Args:
        module: module that projected the query.
        query: (batch, heads, tokens, head_dim), rotated.
        images: keys/values of all image columns; None without any.
        text: keys/values of all text, of which fusion takes those from `windows.first_text` on.
        windows: windows that fusion layers attend to.
        self_mask: boolean (batch or 1, 1, tokens, cache positions) of self-attention; None if all is visible.
        fusion_scale: (batch, tokens) or (1,) factor of the fusion output, 0 where a token sees nothing; None for 1.
    """
    grouped = _grouped(query, text.keys.shape[1])
    of_text = _scores(grouped, text.keys, module)
    weights = _softmax(of_text, self_mask, module)
    window = of_text[..., windows.first_text :]
    of_images = [] if images is None else [_scores(grouped, images.keys, module)]
    fused = _softmax(torch.cat([*of_images, window], dim=-1), windows.mask, module)
    if fusion_scale is not None and fusion_scale.ndim == 2:
        # (batch, tokens) for (batch, kv_heads, groups * tokens, keys)
        fusion_scale = fusion_scale.repeat(1, grouped.shape[2] // query.shape[2])[:, None, :, None]
    if fusion_scale is not None:
        fused = fused * fusion_scale.to(fused.dtype)
    num_window = window.shape[-1]
    weights = weights + nn.functional.pad(fused[..., -num_window:], (windows.first_text, 0))
    parts = [(weights, text.values)]
    if images is not None:
        parts.append((fused[..., :-num_window], images.values))
    return _weighted(parts, query)


def _step_attention(
    module: AttentionModule, query: torch.Tensor, keys: FusionKeys, mask: torch.Tensor | None
) -> torch.Tensor:
    parts = keys.parts()
    if len(parts) == 1 and mask is None:
        return attend(module, query, parts[0], None, is_causal=False)[0]
    grouped = _grouped(query, parts[0].keys.shape[1])
    scores = [_scores(grouped, part.keys, module) for part in parts]
    weights = _softmax(torch.cat(scores, dim=-1) if len(scores) > 1 else scores[0], mask, module)
    split = weights.split([part.keys.shape[2] for part in parts], dim=-1)
    return _weighted(list(zip(split, (part.values for part in parts), strict=True)), query)


def single_row_lengths(num_queries: int, num_keys: int, device: torch.device) -> dict[str, Any]:
    """Arguments that make self-attention of one row take the first `num_keys` positions of a static cache, without a
    mask from which every layer would have to find that out."""
    return {
        # Made there: a copy would wait for the device.
        "cu_seq_lens_q": torch.arange(2, dtype=torch.int32, device=device) * num_queries,
        "cu_seq_lens_k": torch.arange(2, dtype=torch.int32, device=device) * num_keys,
        "max_length_q": num_queries,
        "max_length_k": num_keys,
    }


def packed_lengths(samples: torch.Tensor, token_mask: torch.Tensor) -> dict[str, Any]:
    """Arguments that make self-attention keep packed samples apart where the backend takes no mask.

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


def _backend_mask(mask: torch.Tensor, implementation: str, dtype: torch.dtype) -> torch.Tensor:
    """A boolean mask in the form that the backend takes: additive for eager, boolean for the others."""
    if implementation != "eager":
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def _flat(states: torch.Tensor) -> torch.Tensor:
    """(batch, heads, length, head_dim) to (batch * length, heads, head_dim)."""
    return states.transpose(1, 2).flatten(0, 1)


def _flat_keys(keys: FusionKeys) -> KeysValues:
    """Image columns of all rows, then text of all rows, each (columns and text, kv_heads, head_dim)."""
    parts = [part for part in (keys.images, keys.text) if part is not None]
    return KeysValues(*(torch.cat([_flat(x) for x in tensors]) for tensors in zip(*parts, strict=True)))


def _of_keys(mask: torch.Tensor) -> torch.Tensor:
    """The mask of one query per row, (batch, 1, 1, keys), of one that may be (batch, keys)."""
    return mask[:, None, None].bool() if mask.ndim == 2 else mask


def _grouped(query: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """(batch, heads, tokens, head_dim) to (batch, kv_heads, groups * tokens, head_dim)."""
    batch_size, _, _, head_dim = query.shape
    return query.reshape(batch_size, kv_heads, -1, head_dim)


def _scores(grouped: torch.Tensor, keys: torch.Tensor, module: AttentionModule) -> torch.Tensor:
    """Scaled scores (batch, kv_heads, groups * tokens, keys). Scaled by the product itself: products of float16 that
    are scaled afterwards leave its range."""
    if torch.compiler.is_compiling():  # which scales queries where they are made
        return torch.matmul(grouped * module.scaling, keys.transpose(2, 3))
    scores = torch.baddbmm(
        grouped.new_empty(1), grouped.flatten(0, 1), keys.transpose(2, 3).flatten(0, 1), beta=0, alpha=module.scaling
    )
    return scores.view(*grouped.shape[:3], -1)


def _softmax(scores: torch.Tensor, mask: torch.Tensor | None, module: AttentionModule) -> torch.Tensor:
    """Weights (batch, kv_heads, groups * tokens, keys). The softmax of half precision is computed in float32."""
    if mask is not None:
        if mask.shape[2] > 1:
            mask = mask.repeat(1, 1, scores.shape[2] // mask.shape[2], 1)
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return nn.functional.dropout(torch.softmax(scores, dim=-1), module.attention_dropout, module.training)


def _weighted(parts: list[tuple[torch.Tensor, torch.Tensor]], query: torch.Tensor) -> torch.Tensor:
    """Sum of weights times values of all parts: (batch, tokens, heads * head_dim)."""
    (weights, values), *others = [(part.flatten(0, 1), of_part.flatten(0, 1)) for part, of_part in parts]
    output = torch.bmm(weights, values)
    for weights, values in others:
        output = torch.baddbmm(output, weights, values)
    return output.reshape(query.shape).transpose(1, 2).flatten(2)


@dataclass(frozen=True)
class Segments:
    """The segments of one call, as indices into flattened queries and keys.

    Attributes:
        query_index: (num_queries,) queries of all segments, segment after segment.
        key_index: (num_keys,) keys of all segments; first come the image columns of all rows, row after row, then the
            text of all rows.
        cu_seqlens_q, cu_seqlens_k: (num_segments + 1,) int32, where each segment starts in these.
        max_q, max_k: length of the longest segment.
        total_keys: number of image columns and cache positions of text that `key_index` points into.
        causal: whether the last query of a segment sees all its keys, the one before all but the last, and so on; else
            all queries see all keys.
    """

    query_index: torch.Tensor
    key_index: torch.Tensor
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_q: int
    max_k: int
    total_keys: int
    causal: bool

    def arguments(self) -> dict[str, Any]:
        """Arguments of the attention interface."""
        return {
            "is_causal": self.causal,
            "cu_seq_lens_q": self.cu_seqlens_q,
            "cu_seq_lens_k": self.cu_seqlens_k,
            "max_length_q": self.max_q,
            "max_length_k": self.max_k,
        }

    @property
    def takes_all_keys(self) -> bool:
        """Whether the keys are those of the call as they stand, so that nothing has to be gathered."""
        return len(self.cu_seqlens_q) == 2 and len(self.key_index) == self.total_keys

    def padded(self, num_queries: int) -> tuple[PaddedSegments, ...]:
        """The segments in batches of similar size, padded to the longest of each batch.

        A causal one whose mask would be very large is a batch by itself, without a mask; not where gradients are
        computed, since every layer would keep masks of its own for the backward pass.

        Args:
            num_queries: number of queries that `query_index` points into.
        """
        lengths = torch.stack([self.cu_seqlens_q.diff(), self.cu_seqlens_k.diff()]).tolist()
        batches: dict[tuple[int, int], list[int]] = defaultdict(list)
        long: list[int] = []
        for segment, (q_length, k_length) in enumerate(zip(*lengths, strict=True)):
            if self.causal and q_length * k_length > _LARGEST_MASK and not torch.is_grad_enabled():
                long.append(segment)
            else:
                batches[(q_length - 1).bit_length(), (k_length - 1).bit_length()].append(segment)
        padded = [self._padded(members, lengths, num_queries) for members in batches.values()]
        return (*padded, *map(self._long, long))

    def _long(self, segment: int) -> PaddedSegments:
        queries, keys = (
            index[int(starts[segment]) : int(starts[segment + 1])]
            for index, starts in ((self.query_index, self.cu_seqlens_q), (self.key_index, self.cu_seqlens_k))
        )
        return PaddedSegments(queries[None], keys[None], None, max(1, _LARGEST_MASK // len(keys)))

    def _padded(self, members: list[int], lengths: list[list[int]], num_queries: int) -> PaddedSegments:
        device = self.query_index.device
        chosen = torch.tensor(members, device=device)
        q_lengths, k_lengths = self.cu_seqlens_q.diff()[chosen], self.cu_seqlens_k.diff()[chosen]
        queries = torch.arange(max(lengths[0][segment] for segment in members), device=device)
        keys = torch.arange(max(lengths[1][segment] for segment in members), device=device)
        is_query, is_key = queries < q_lengths[:, None], keys < k_lengths[:, None]
        query_places = (self.cu_seqlens_q[chosen, None] + queries).clamp(max=len(self.query_index) - 1)
        key_places = (self.cu_seqlens_k[chosen, None] + keys).clamp(max=len(self.key_index) - 1)
        mask = is_key[:, None]
        if self.causal:
            mask = mask & (keys <= (k_lengths - q_lengths)[:, None, None] + queries[:, None])
            # Rows of padding see all keys, so that no softmax is empty; they are thrown away.
            mask = mask | ~is_query[..., None]
        needs_mask = (self.causal and len(queries) > 1) or len({lengths[1][segment] for segment in members}) > 1
        return PaddedSegments(
            query_index=torch.where(is_query, self.query_index[query_places], num_queries),
            key_index=torch.where(is_key, self.key_index[key_places], 0),
            mask=mask[:, None] if needs_mask else None,
        )


@dataclass(frozen=True)
class PaddedSegments:
    """Segments of similar size as one batch.

    Attributes:
        query_index: (segments, queries); padding points behind the last query.
        key_index: (segments, keys).
        mask: boolean (segments, 1, queries or 1, keys); None if every query sees every key, or with `queries_at_once`.
        queries_at_once: number of queries that attend at a time where the mask of the only segment, which is causal,
            would be too large; None where all do.
    """

    query_index: torch.Tensor
    key_index: torch.Tensor
    mask: torch.Tensor | None
    queries_at_once: int | None = None


def fusion_segments(plan: WindowPlan) -> Segments | None:
    """The segments of text queries; None if no token sees anything.

    Queries are those of the call, flattened from (batch, tokens).
    """
    num_tokens = plan.sees.shape[1]
    queries = plan.sees.flatten().nonzero()[:, 0]
    if not len(queries):
        return None
    rows = queries // num_tokens
    ranges = [plan.image_start, plan.image_end]
    if plan.rules.with_text:
        ranges.append(plan.text_start)
    if plan.pinned_start is not None:
        ranges.append(plan.pinned_start)
    features = torch.stack([rows, *(values.flatten()[queries] for values in ranges)])
    starts = torch.ones_like(queries, dtype=torch.bool)
    starts[1:] = (features[:, 1:] != features[:, :-1]).any(0)
    if plan.rules.with_text:
        text_end = plan.text_end.flatten()[queries]
        # A token that reads images alone sees all of them, so it can't share a causal segment with its neighbours; and
        # queries aren't aligned with keys across a token that is a key without being a query.
        alone = text_end == 0
        count = plan.next_state.valid[:, -num_tokens:].flatten().cumsum(0)[queries]
        starts = starts | alone
        starts[1:] = starts[1:] | alone[:-1] | (count.diff() != 1)
    first = starts.nonzero()[:, 0]
    last = torch.nn.functional.pad(first[1:], (0, 1), value=len(queries)) - 1
    rows, image_start, image_end = features[:3, first]
    pinned_start = None if plan.pinned_start is None else plan.pinned_start.flatten()[queries[first]]
    return _segments(
        plan,
        queries,
        last - first + 1,
        rows,
        _image_columns(plan, rows, image_start, image_end, pinned_start),
        _text_keys(plan, rows, features[3, first], text_end[last], plan.text_range) if plan.rules.with_text else None,
        text_range=plan.text_range if plan.rules.with_text else (0, 0),
        causal=plan.rules.with_text,
    )


def update_segments(plan: WindowPlan) -> Segments:
    """One segment per new image for updates of image states: the earlier images and text that it sees, then itself.

    Queries are the new image tokens in reading order. Keys point into all text of a row.
    """
    update = plan.update
    assert update is not None and plan.token_rows is not None
    own_end = update.first_column + update.num_tokens
    rows, text_range = update.rows, (0, plan.text_range[1])
    earlier = _image_columns(plan, rows, update.image_start, update.first_column, update.pinned_start)
    text = _text_keys(plan, rows, update.text_start, update.text_end, text_range)
    own = _image_columns(plan, rows, update.first_column, own_end, None, pinned=False)
    queries = torch.arange(len(plan.token_rows), device=rows.device)
    return _segments(plan, queries, update.num_tokens, rows, earlier, text, own, text_range=text_range, causal=True)


@dataclass(frozen=True)
class _KeyLists:
    """For each segment a list of flat key indices, as a range of one long list.

    Attributes:
        index: (n,) the long list.
        start, length: (num_segments,) the segment's range in it.
    """

    index: torch.Tensor
    start: torch.Tensor
    length: torch.Tensor


def _image_columns(
    plan: WindowPlan,
    rows: torch.Tensor,
    start: torch.Tensor,
    end: torch.Tensor,
    pinned_start: torch.Tensor | None,
    *,
    pinned: bool = True,
) -> _KeyLists:
    """Image columns from `start` to `end`, and the pinned ones before `end`."""
    columns = torch.arange(plan.num_columns * plan.sees.shape[0], device=rows.device)
    if plan.pinned is None or not pinned:
        return _KeyLists(columns, rows * plan.num_columns + start, end - start)
    in_row = columns[: plan.num_columns]
    visible = (in_row >= start[:, None]) & (in_row < end[:, None])
    sample_start = None if pinned_start is None else pinned_start[:, None]
    visible = visible | pinned_before(plan.pinned[rows], sample_start, in_row, end[:, None])[:, 0]
    segment, column = visible.nonzero(as_tuple=True)
    length = visible.sum(-1)
    return _KeyLists(rows[segment] * plan.num_columns + column, length.cumsum(0) - length, length)


def _text_keys(
    plan: WindowPlan, rows: torch.Tensor, start: torch.Tensor, end: torch.Tensor, text_range: tuple[int, int]
) -> _KeyLists:
    """Text from `start` to `end` that isn't padding; keys are given for the range `text_range` of each row."""
    valid = plan.next_state.valid[:, text_range[0] : text_range[1]]
    num_positions = valid.shape[1]
    before = torch.nn.functional.pad(valid.flatten().cumsum(0), (1, 0))
    first = before[rows * num_positions + (start - text_range[0]).clamp(0, num_positions)]
    past = before[rows * num_positions + (end - text_range[0]).clamp(0, num_positions)]
    return _KeyLists(
        plan.num_columns * len(valid) + valid.flatten().nonzero()[:, 0], first, (past - first).clamp(min=0)
    )


def _segments(
    plan: WindowPlan,
    queries: torch.Tensor,
    q_lengths: torch.Tensor,
    rows: torch.Tensor,
    *keys: _KeyLists | None,
    text_range: tuple[int, int],
    causal: bool,
) -> Segments:
    """Segments whose keys are the given lists one after the other."""
    lists = [part for part in keys if part is not None]
    lengths = torch.stack([part.length for part in lists])
    k_lengths = lengths.sum(0)
    totals = torch.stack([k_lengths.sum(), k_lengths.max(), q_lengths.max()]).tolist()
    num_keys, max_k, max_q = totals
    # Every segment is made of `len(lists)` pieces; the key index runs through them piece by piece.
    pieces = lengths.T.flatten()
    piece = torch.repeat_interleave(pieces, output_size=num_keys)
    offsets = torch.arange(num_keys, device=rows.device) - (pieces.cumsum(0) - pieces)[piece]
    shifts = [0]
    for part in lists[:-1]:
        shifts.append(shifts[-1] + len(part.index))
    starts = torch.stack([part.start + shift for part, shift in zip(lists, shifts, strict=True)]).T.flatten()
    index = torch.cat([part.index for part in lists]) if len(lists) > 1 else lists[0].index
    batch_size = plan.sees.shape[0]
    return Segments(
        query_index=queries,
        key_index=index[starts[piece] + offsets],
        cu_seqlens_q=_cumulative(q_lengths),
        cu_seqlens_k=_cumulative(k_lengths),
        max_q=max_q,
        max_k=max_k,
        total_keys=batch_size * (plan.num_columns + text_range[1] - text_range[0]),
        causal=causal,
    )


def _cumulative(lengths: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
