# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""In which order blocks of linear attention read the tokens of a call.

Such a block knows no masks: whatever it is given enters its recurrent state. So it gets *sequences*, each with the
tokens of one row, or of one packed sample, and with padding at one end only. Where attention updates image states
(axis D4 "full"), the tokens of an image stand in the sequence before the text token that the image precedes, as in the
source; otherwise they never enter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from .windows import ImagePlacement


@dataclass(frozen=True)
class TokenOrder:
    """The tokens of a call as sequences, in batches of similar length.

    Attributes:
        valid: for each batch (sequences, length) False for padding; None if there is none.
        index: for each batch (sequences, length) number of each token among [text tokens, row after row ; image
            tokens], any number at padding; None if the rows are the sequences as they stand.
        places: (text tokens and image tokens,) where each of these is among the places of all batches.
    """

    valid: tuple[torch.Tensor | None, ...]
    index: tuple[torch.Tensor, ...] | None = None
    places: torch.Tensor | None = None

    def join(self, text: torch.Tensor, images: torch.Tensor | None) -> list[torch.Tensor]:
        """(sequences, length, hidden) of each batch, of text (batch, tokens, hidden) and, if they are in the order,
        image tokens (num_image_tokens, hidden)."""
        if self.index is None:
            return [text]
        tokens = text.flatten(0, 1)
        if images is not None:
            tokens = torch.cat([tokens, images])
        return [tokens[index] for index in self.index]

    def split(self, states: Sequence[torch.Tensor], like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Inverse of `join`: text in the shape of `like`, and image tokens; None if they aren't in the order."""
        if self.places is None:
            return states[0], None
        everything = torch.cat([batch.flatten(0, 1) for batch in states])
        tokens, num_text = everything[self.places], like.shape[:2].numel()
        text = tokens[:num_text].view_as(like)
        return text, tokens[num_text:] if len(tokens) > num_text else None


def token_order(
    token_mask: torch.Tensor,
    *,
    padded: bool,
    continues: bool,
    samples: torch.Tensor | None = None,
    images: ImagePlacement | None = None,
) -> TokenOrder | None:
    """The order of a call's tokens.

    Args:
        token_mask: (batch, tokens) False for padding.
        padded: whether there may be padding.
        continues: whether the blocks have read earlier tokens. Padding then comes last, where it is easily told apart
            from what is stored; else it comes first, where it can't be told from there being nothing.
        samples: (batch, tokens) number of each token's packed sample in its row; None without packing.
        images: places of the new images; None if none is to enter.

    Returns:
        None if the rows are the sequences as they stand, without padding.
    """
    if images is None and samples is None:
        if not padded:
            return None
        if token_mask.shape[1] == 1:  # a decoding step doesn't ask the device
            return TokenOrder((token_mask,))
        if not torch.compiler.is_compiling() and bool(token_mask.all()):
            return None
    sequence, step, valid = _tokens(token_mask, samples, images)
    step = torch.where(valid, step, 2 * token_mask.shape[1] if continues else -1)
    order = (sequence * (2 * token_mask.shape[1] + 2) + step + 1).argsort(stable=True)
    layout = _layout(token_mask, samples, images, sequence)
    counts = torch.zeros_like(layout.starts).index_add(0, sequence, torch.ones_like(sequence))
    offset = layout.starts - (counts.cumsum(0) - counts)
    if not continues:
        offset = offset + layout.lengths - counts
    place = torch.arange(len(order), device=order.device) + offset[sequence[order]]
    places = torch.empty_like(order).index_put((order,), place)
    sizes = [sequences * length for sequences, length in layout.batches]
    index = torch.zeros(sum(sizes), dtype=torch.long, device=order.device)
    in_place = torch.zeros_like(index, dtype=torch.bool).index_put((places,), valid)
    index = index.index_put((places,), torch.arange(len(places), device=order.device))
    batches = list(zip(layout.batches, in_place.split(sizes), index.split(sizes), strict=True))
    return TokenOrder(
        tuple(None if shape[0] == 1 and not padded else kept.view(shape) for shape, kept, _ in batches),
        tuple(numbers.view(shape) for shape, _, numbers in batches),
        places,
    )


def _tokens(
    token_mask: torch.Tensor, samples: torch.Tensor | None, images: ImagePlacement | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of [text tokens ; image tokens]: sequence, place in reading order, and whether it isn't padding; (tokens,) each.

    Images come directly before their token; those before the same token are in reading order already.
    """
    batch_size, num_tokens = token_mask.shape
    device = token_mask.device
    if samples is None:
        sequence = torch.arange(batch_size, device=device)[:, None].expand(-1, num_tokens)
    else:
        begins = nn.functional.pad(samples.diff(dim=1) != 0, (1, 0), value=True)
        sequence = begins.flatten().cumsum(0).view_as(samples) - 1
    step = 2 * torch.arange(num_tokens, device=device).repeat(batch_size) + 1
    valid = token_mask.flatten()
    if images is None:
        return sequence.flatten(), step, valid
    of_image = images.token_images
    return (
        torch.cat([sequence.flatten(), sequence[images.rows, images.indices][of_image]]),
        torch.cat([step, 2 * images.indices[of_image]]),
        torch.cat([valid, torch.ones_like(of_image, dtype=torch.bool)]),
    )


class _Layout(NamedTuple):
    """Where sequences stand among the places of all batches.

    Attributes:
        batches: number of sequences, and length, of each batch.
        starts: (sequences,) first place of each sequence.
        lengths: (sequences,) length of its batch.
    """

    batches: list[tuple[int, int]]
    starts: torch.Tensor
    lengths: torch.Tensor


def _layout(
    token_mask: torch.Tensor, samples: torch.Tensor | None, images: ImagePlacement | None, sequence: torch.Tensor
) -> _Layout:
    """The rows in one batch. Packed samples, of any lengths, in one for each power of two, so that less than half of
    all places are padding; for them the device is asked."""
    if samples is None:
        batch_size, num_tokens = token_mask.shape
        length = num_tokens + (0 if images is None else images.max_row_tokens)
        rows = torch.arange(batch_size, device=sequence.device)
        return _Layout([(batch_size, length)], rows * length, torch.full_like(rows, length))
    counts = sequence.bincount().tolist()
    similar: dict[int, list[int]] = {}
    for number, count in enumerate(counts):
        similar.setdefault(count.bit_length(), []).append(number)
    batches, starts, lengths = [], [0] * len(counts), [0] * len(counts)
    first = 0
    for numbers in similar.values():
        length = max(counts[number] for number in numbers)
        batches.append((len(numbers), length))
        for number in numbers:
            starts[number], lengths[number] = first, length
            first += length
    return _Layout(batches, *torch.tensor([starts, lengths], device=sequence.device))
