# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Windows as blocks: which queries and which keys make up each small attention of a fusion layer.

Consecutive tokens of a row that see the same images and the same start of their window form a block; its keys are
these image tokens, followed by the text of the window up to the block's last token. The queries are the last tokens of
that text, so a block is causal attention aligned at the bottom right. No block knows of the others: time and memory
grow with the number of windows, not with its square. Updates of image states (axis D4 "full") are blocks too, one per
image.

Lengths of blocks have to be known on the host, and all here are small tensors of integers. So they are computed there,
from `WindowPlan.on_host`, and brought to the device without waiting for it.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from .windows import WindowPlan, pinned_before


@dataclass(frozen=True)
class Blocks:
    """The blocks of one call, as indices into flattened queries and keys.

    Attributes:
        query_index: (num_queries,) queries of all blocks, block after block.
        key_index: (num_keys,) keys of all blocks; first come the image columns of all rows, row after row, then the
            text slots of all rows.
        cu_seqlens_q, cu_seqlens_k: (num_blocks + 1,) int32, where each block starts in these.
        max_q, max_k: length of the longest block.
        total_keys: number of image columns and text slots that `key_index` points into.
        causal: whether the last query of a block sees all its keys, the one before all but the last, and so on; else
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

    def to(self, device: torch.device) -> Blocks:
        """The blocks with their tensors on `device`."""
        return _moved(self, device)

    @property
    def takes_all_keys(self) -> bool:
        """Whether the keys are those of the call as they stand, so that nothing has to be gathered."""
        return len(self.cu_seqlens_q) == 2 and len(self.key_index) == self.total_keys

    def padded(self, num_queries: int) -> tuple[PaddedBlocks, ...]:
        """The blocks in batches of similar size, padded to the longest of each batch.

        Args:
            num_queries: number of queries that `query_index` points into.
        """
        lengths = torch.stack([self.cu_seqlens_q.diff(), self.cu_seqlens_k.diff()]).tolist()
        batches: dict[tuple[int, int], list[int]] = defaultdict(list)
        for block, (q_length, k_length) in enumerate(zip(*lengths, strict=True)):
            batches[(q_length - 1).bit_length(), (k_length - 1).bit_length()].append(block)
        return tuple(self._padded(blocks, lengths, num_queries) for blocks in batches.values())

    def _padded(self, blocks: list[int], lengths: list[list[int]], num_queries: int) -> PaddedBlocks:
        device = self.query_index.device
        chosen = torch.tensor(blocks, device=device)
        q_lengths, k_lengths = self.cu_seqlens_q.diff()[chosen], self.cu_seqlens_k.diff()[chosen]
        queries = torch.arange(max(lengths[0][block] for block in blocks), device=device)
        keys = torch.arange(max(lengths[1][block] for block in blocks), device=device)
        is_query, is_key = queries < q_lengths[:, None], keys < k_lengths[:, None]
        query_places = (self.cu_seqlens_q[chosen, None] + queries).clamp(max=len(self.query_index) - 1)
        key_places = (self.cu_seqlens_k[chosen, None] + keys).clamp(max=len(self.key_index) - 1)
        mask = is_key[:, None].expand(-1, len(queries), -1)
        if self.causal:
            mask = mask & (keys <= (k_lengths - q_lengths)[:, None, None] + queries[:, None])
        needs_mask = (self.causal and len(queries) > 1) or len({lengths[1][block] for block in blocks}) > 1
        return PaddedBlocks(
            query_index=torch.where(is_query, self.query_index[query_places], num_queries),
            key_index=torch.where(is_key, self.key_index[key_places], 0),
            # Rows of padding see all keys, so that no softmax is empty; they are thrown away.
            mask=(mask | ~is_query[..., None])[:, None] if needs_mask else None,
        )


@dataclass(frozen=True)
class PaddedBlocks:
    """Blocks of similar size as one batch.

    Attributes:
        query_index: (blocks, queries); padding points behind the last query.
        key_index: (blocks, keys).
        mask: boolean (blocks, 1, queries, keys); None if every query sees every key.
    """

    query_index: torch.Tensor
    key_index: torch.Tensor
    mask: torch.Tensor | None

    def to(self, device: torch.device) -> PaddedBlocks:
        """The batch with its tensors on `device`."""
        return _moved(self, device)


def fusion_blocks(plan: WindowPlan) -> Blocks | None:
    """The blocks of text queries; None if no token sees anything.

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
        # A token that reads images alone sees all of them, so it can't share a causal block with its neighbours; and
        # queries aren't aligned with keys across a token that is a key without being a query.
        alone = text_end == 0
        count = plan.next_state.valid[:, -num_tokens:].flatten().cumsum(0)[queries]
        starts = starts | alone
        starts[1:] = starts[1:] | alone[:-1] | (count.diff() != 1)
    first = starts.nonzero()[:, 0]
    last = torch.nn.functional.pad(first[1:], (0, 1), value=len(queries)) - 1
    rows, image_start, image_end = features[:3, first]
    pinned_start = None if plan.pinned_start is None else plan.pinned_start.flatten()[queries[first]]
    return _blocks(
        plan,
        queries,
        last - first + 1,
        rows,
        _image_columns(plan, rows, image_start, image_end, pinned_start),
        _text_slots(plan, rows, features[3, first], text_end[last], plan.text_slots) if plan.rules.with_text else None,
        text_slots=plan.text_slots if plan.rules.with_text else (0, 0),
        causal=plan.rules.with_text,
    )


def update_blocks(plan: WindowPlan) -> Blocks:
    """One block per new image for updates of image states: the earlier images and the text that it sees, then itself.

    Queries are the new image tokens in reading order. Keys point into all text slots of a row.
    """
    update = plan.update
    assert update is not None and plan.token_rows is not None
    own_end = update.first_column + update.num_tokens
    rows, slots = update.rows, (0, plan.text_slots[1])
    earlier = _image_columns(plan, rows, update.image_start, update.first_column, update.pinned_start)
    text = _text_slots(plan, rows, update.text_start, update.text_end, slots)
    own = _image_columns(plan, rows, update.first_column, own_end, None, pinned=False)
    queries = torch.arange(len(plan.token_rows), device=rows.device)
    return _blocks(plan, queries, update.num_tokens, rows, earlier, text, own, text_slots=slots, causal=True)


@dataclass(frozen=True)
class _KeyLists:
    """For each block a list of flat key indices, as a range of one long list.

    Attributes:
        index: (n,) the long list.
        start, length: (num_blocks,) the block's range in it.
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
    block, column = visible.nonzero(as_tuple=True)
    length = visible.sum(-1)
    return _KeyLists(rows[block] * plan.num_columns + column, length.cumsum(0) - length, length)


def _text_slots(
    plan: WindowPlan, rows: torch.Tensor, start: torch.Tensor, end: torch.Tensor, slots: tuple[int, int]
) -> _KeyLists:
    """Text slots from `start` to `end` that aren't padding; keys are given for the range `slots` of each row."""
    valid = plan.next_state.valid[:, slots[0] : slots[1]]
    num_slots = valid.shape[1]
    before = torch.nn.functional.pad(valid.flatten().cumsum(0), (1, 0))
    first = before[rows * num_slots + (start - slots[0]).clamp(0, num_slots)]
    past = before[rows * num_slots + (end - slots[0]).clamp(0, num_slots)]
    return _KeyLists(
        plan.num_columns * len(valid) + valid.flatten().nonzero()[:, 0], first, (past - first).clamp(min=0)
    )


def _blocks(
    plan: WindowPlan,
    queries: torch.Tensor,
    q_lengths: torch.Tensor,
    rows: torch.Tensor,
    *keys: _KeyLists | None,
    text_slots: tuple[int, int],
    causal: bool,
) -> Blocks:
    """Blocks whose keys are the given lists one after the other."""
    lists = [part for part in keys if part is not None]
    lengths = torch.stack([part.length for part in lists])
    k_lengths = lengths.sum(0)
    totals = torch.stack([k_lengths.sum(), k_lengths.max(), q_lengths.max()]).tolist()
    num_keys, max_k, max_q = totals
    # Every block is made of `len(lists)` pieces; the key index runs through them piece by piece.
    pieces = lengths.T.flatten()
    piece = torch.repeat_interleave(pieces, output_size=num_keys)
    offsets = torch.arange(num_keys, device=rows.device) - (pieces.cumsum(0) - pieces)[piece]
    shifts = [0]
    for part in lists[:-1]:
        shifts.append(shifts[-1] + len(part.index))
    starts = torch.stack([part.start + shift for part, shift in zip(lists, shifts, strict=True)]).T.flatten()
    index = torch.cat([part.index for part in lists]) if len(lists) > 1 else lists[0].index
    batch_size = plan.sees.shape[0]
    return Blocks(
        query_index=queries,
        key_index=index[starts[piece] + offsets],
        cu_seqlens_q=_cumulative(q_lengths),
        cu_seqlens_k=_cumulative(k_lengths),
        max_q=max_q,
        max_k=max_k,
        total_keys=batch_size * (plan.num_columns + text_slots[1] - text_slots[0]),
        causal=causal,
    )


def _cumulative(lengths: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def _moved(indices: Any, device: torch.device) -> Any:
    tensors = {f.name: getattr(indices, f.name) for f in fields(indices)}
    return replace(
        indices,
        **{name: t.to(device, non_blocking=True) for name, t in tensors.items() if isinstance(t, torch.Tensor)},
    )
