# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Rotary positions of text and image tokens.

Positions have one axis (1-D RoPE) or three (M-RoPE: time, height, width) in their first dimension. Under "contiguous"
positions images don't advance the text; under "insertion" they do as in the source model, where they stand in the
sequence: by max(height, width) of the merged grid under M-RoPE, by their number of tokens under 1-D RoPE. The temporal
patches of a whole video, where it is one image, have positions of their own on the time axis, which don't advance the
text either.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .windows import ImagePlacement, first_of_run

# cos and sin by which queries and keys are rotated, each (batch, tokens, head_dim).
Rotary = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class PositionRules:
    """How positions are counted.

    Attributes:
        axes: 3 with M-RoPE, else 1.
        insertion: whether images advance the text's positions.
        before: whether an image stands at the positions before the token that it precedes, as in the source model;
            else at that token's position.
    """

    axes: int
    insertion: bool
    before: bool

    def text(
        self,
        position_ids: torch.Tensor | None,
        token_mask: torch.Tensor,
        next_position: torch.Tensor,
        images: ImagePlacement | None,
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Positions of new text tokens.

        Args:
            position_ids: None, (batch, tokens) text index, (axes, batch, tokens) positions, or (1 + axes, batch,
                tokens) with the text index in row 0 and positions in the others.
            token_mask: (batch, tokens) False for padding.
            next_position: (batch,) position that follows the cached text.
            images: new images, which advance the text under "insertion".

        Returns:
            The text index (batch, tokens) for masks, None if it wasn't given, and positions (axes, batch, tokens).

        Raises:
            ValueError: if `position_ids` has another shape.
        """
        batch_size, num_tokens = expected = tuple(token_mask.shape)
        if position_ids is None:
            index = next_position[:, None] + token_mask.long().cumsum(-1) - 1
            positions = self._advanced(index, token_mask, images).masked_fill(~token_mask, 0)
            return None, positions.expand(self.axes, -1, -1)
        shape = tuple(position_ids.shape)
        if shape in ((1, num_tokens), expected):
            index = position_ids.expand(expected)
            return index, self._advanced(index, token_mask, images).expand(self.axes, -1, -1)
        if shape == (self.axes, *expected):
            return None, position_ids
        if shape == (1 + self.axes, *expected):
            return position_ids[0], position_ids[1:]
        raise ValueError(
            f"position_ids has shape {shape}; expected {expected}, ({self.axes}, {batch_size}, {num_tokens}) or "
            f"({1 + self.axes}, {batch_size}, {num_tokens}) with the text index of each sample in row 0."
        )

    def images(self, text_positions: torch.Tensor, images: ImagePlacement) -> torch.Tensor:
        """(axes, num_image_tokens) positions of new image tokens.

        Args:
            text_positions: (axes, batch, tokens) positions of the new text.
            images: placement of the images.
        """
        of_token = text_positions[:, images.rows, images.indices]  # (axes, num_images)
        if self.insertion:
            start = of_token - self._advance_up_to_token(images)
        else:
            start = of_token - self._advance(images) if self.before else of_token
        start = start[:, images.token_images]
        if self.axes == 3:
            time = start[:1] if images.token_times is None else start[:1] + images.token_times
            return torch.cat([time, start[1:] + images.token_grid])
        return start + images.token_offsets if self.insertion or self.before else start

    def _advance(self, images: ImagePlacement) -> torch.Tensor:
        """(num_images,) by how much each image advances positions."""
        return images.grids[:, 1:].amax(-1) if self.axes == 3 else images.num_tokens

    def _advance_up_to_token(self, images: ImagePlacement) -> torch.Tensor:
        """(num_images,) by how much each image and those between it and its token advance positions."""
        advance = self._advance(images)
        before = advance.cumsum(0) - advance
        first = first_of_run(images.rows, images.indices)  # of the images before the same token
        of_run = torch.zeros_like(advance).index_add(0, first, advance)
        return of_run[first] - (before - before[first])

    def _advanced(self, index: torch.Tensor, token_mask: torch.Tensor, images: ImagePlacement | None) -> torch.Tensor:
        """`index` advanced by the new images that stand before each token, in its sample."""
        if images is None or not self.insertion:
            return index
        place = (images.rows, images.indices)
        at_token = torch.zeros_like(index).index_put(place, self._advance(images), accumulate=True)
        so_far = at_token.cumsum(-1)
        # Where a text index doesn't continue that before it, a sample begins, which earlier images don't advance.
        begins = token_mask & (torch.diff(index, dim=-1, prepend=index[:, :1] - 1) != 1)
        before_sample = torch.where(begins, so_far - at_token, 0).cummax(-1).values
        return index + so_far - before_sample


def packed_samples(text_index: torch.Tensor, token_mask: torch.Tensor) -> torch.Tensor | None:
    """Find the samples that are packed into one row each.

    Args:
        text_index: (batch, tokens) index of each token in its sample.
        token_mask: (batch, tokens) False for padding.

    Returns:
        (batch, tokens) number of each token's sample, counted up where the index doesn't follow that of the text token
        before; None if that happens nowhere.

    Raises:
        ValueError: if the index jumps forward, which is not an index: positions with jumps belong in further rows.
    """
    order = torch.arange(text_index.shape[1], device=text_index.device)
    last_text = torch.where(token_mask, order, -1).cummax(dim=1).values
    before = nn.functional.pad(last_text[:, :-1], (1, 0), value=-1)
    previous = text_index.gather(1, before.clamp(min=0))
    breaks = token_mask & (before >= 0) & (text_index != previous + 1)
    if not breaks.any():
        return None
    if (breaks & (text_index > previous)).any():
        raise ValueError(
            "position_ids of shape (batch, tokens) are the index of each token in its sample, but they jump forward. "
            "Pass positions with jumps as (axes, batch, tokens), or below the index as (1 + axes, batch, tokens)."
        )
    return breaks.cumsum(dim=1)
