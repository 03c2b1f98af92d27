# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""What a call is given as text: its tokens, by id or embedded, and which of them are padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache

from .cache_casa import window_state
from .transfers import moved, to_host
from .window_state import WindowState


@dataclass(frozen=True)
class NewText:
    """The new tokens of a call, one row per sequence.

    Attributes:
        ids: (batch, tokens); None where only embeddings are known.
        embeds: (batch, tokens, hidden); None where nothing has been embedded yet.
        embedding: the input embedding.
        mask: mask in any form, or None; one of (batch, tokens or more) says which tokens are padding.
        cache: prepared cache with the earlier text, or None.
        state: what the cache remembers about its windows; None if it doesn't yet.
        found: what `are` gives for embedded text that has been read from its device, by the ids looked for.
    """

    ids: torch.Tensor | None
    embeds: torch.Tensor | None
    embedding: Any
    mask: Any = None
    cache: Cache | None = None
    state: WindowState | None = None
    found: dict[tuple[int, ...], torch.Tensor] | None = None

    @property
    def past(self) -> int:
        """Number of text tokens that the cache holds in each row. One that counts on a device is waited for."""
        return cached_length(self.cache) if self.state is None else int(self.state.length)

    @property
    def shape(self) -> torch.Size:
        """(batch, tokens)."""
        return self._tokens.shape[:2]

    @property
    def device(self) -> torch.device:
        """The device of the states, where the text is embedded."""
        return self._tokens.device

    @property
    def is_on_host(self) -> bool:
        """Whether the ids are on the CPU."""
        return self.ids is not None and self.ids.device.type == "cpu"

    @property
    def valid(self) -> torch.Tensor | None:
        """(batch, tokens) False for padding, on the device of the mask; None if nothing says what is padding."""
        if not isinstance(self.mask, torch.Tensor) or self.mask.ndim != 2:
            return None
        return self.mask[:, -self.shape[1] :].bool()

    @property
    def _tokens(self) -> torch.Tensor:
        tokens = self.ids if self.embeds is None else self.embeds
        assert tokens is not None
        return tokens

    def are(self, token_ids: Sequence[int]) -> torch.Tensor:
        """(batch, tokens) whether each token is one of `token_ids`, by its id or else its embedding; on their device.

        Args:
            token_ids: ids to look for, at least one.
        """
        if self.found is not None:
            return self.found[tuple(token_ids)]
        if self.ids is not None:
            # Compared one by one: a tensor of ids would have to be copied to the device in every step.
            found = self.ids == token_ids[0]
            for token_id in token_ids[1:]:
                found = found | (self.ids == token_id)
            return found
        tokens = self._tokens
        # Not where the weights are, which may be nowhere: hooks of placement bring the ids there.
        embedded = self.embedding(torch.tensor(token_ids, device=tokens.device)).to(tokens.device)
        return (tokens[:, :, None] == embedded).all(-1).any(-1)

    def on_host(self, looked_for: Sequence[Sequence[int]], *others: Any) -> tuple[NewText, tuple[Any, ...]]:
        """The text on the CPU, without its states, and whatever else describes the call; a device is waited for once.

        Args:
            looked_for: ids that `are` will be asked for, for text of which only embeddings are known.
            *others: tensors, or None.
        """
        found = None if self.ids is not None else {tuple(ids): self.are(ids) for ids in looked_for if ids}
        mask = self.mask if isinstance(self.mask, torch.Tensor) and self.mask.ndim == 2 else None
        ids, mask, state, found, others = to_host((self.ids, mask, self.state, found, others))
        return NewText(
            ids,
            torch.empty(*self.shape, 0) if ids is None else None,
            self.embedding,
            self.mask if mask is None else mask,
            self.cache,
            None if state is None else state.settled(),
            found,
        ), others


def embed_text(input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, embedding: Any) -> torch.Tensor:
    """(batch, tokens, hidden) the new text of a forward.

    Args:
        input_ids: (batch, tokens); exactly one of `input_ids` and `inputs_embeds`.
        inputs_embeds: (batch, tokens, hidden).
        embedding: the input embedding.

    Raises:
        ValueError: for both inputs or none, ids of another shape, and no tokens.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("Pass exactly one of input_ids and inputs_embeds.")
    if input_ids is not None and input_ids.ndim != 2:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}; expected (batch, tokens).")
    if inputs_embeds is not None:
        states = inputs_embeds
    else:
        weights = getattr(embedding, "weight", None)
        if weights is not None and weights.device.type == "cuda":
            input_ids = moved(input_ids, weights.device)
        states = embedding(input_ids)
    if 0 in states.shape[:2]:
        raise ValueError(
            f"The input has {states.shape[0]} rows of {states.shape[1]} tokens; pass at least one row and one new "
            "token."
        )
    return states


def text_masks(
    attention_mask: torch.Tensor | dict | None,
    token_mask: torch.Tensor | None,
    text: NewText,
    on_host: bool = False,
) -> tuple[torch.Tensor | dict | None, torch.Tensor]:
    """The mask of self-attention over all text, and the validity of the new tokens, on the device of the text.

    Args:
        attention_mask: (batch, all tokens so far) or (batch, tokens), 0 for padding; or a prepared mask, or None.
        token_mask: (batch, tokens) False for padding; None where `attention_mask` says it.
        text: new text.
        on_host: whether they are wanted on the CPU, where no mask is given.

    Returns:
        `attention_mask` for all tokens so far, a prepared one as it is; and (batch, tokens).

    Raises:
        ValueError: if `attention_mask` fits neither all tokens nor the new ones.
    """
    device, (batch_size, num_tokens) = torch.device("cpu") if on_host else text.device, text.shape
    if attention_mask is None:
        attention_mask = token_mask
    elif token_mask is not None:
        return attention_mask, token_mask.to(device, torch.bool, non_blocking=True)
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2:
        return attention_mask, torch.ones(batch_size, num_tokens, dtype=torch.bool, device=device)
    attention_mask = attention_mask.to(device, non_blocking=True)
    state = text.state
    if state is not None and state.capacity is not None and num_tokens == 1:
        # A decoding step on a static cache doesn't ask the device how much text there is: the state knows which of
        # the earlier tokens are padding.
        return state.valid_with(attention_mask[:, -1:].bool()), attention_mask[:, -1:].bool()
    past = text.past
    if attention_mask.shape[0] != batch_size or attention_mask.shape[1] not in (num_tokens, past + num_tokens):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; expected ({batch_size}, {past + num_tokens}) "
            f"for all tokens including {past} cached ones, or ({batch_size}, {num_tokens}) for the new ones."
        )
    token_mask = attention_mask[:, -num_tokens:].bool()
    if attention_mask.shape[1] == num_tokens and past:
        earlier = window_state(text.cache, batch_size, device, held=state).growing().valid
        attention_mask = torch.cat([earlier.to(attention_mask.dtype), attention_mask], dim=1)
    return attention_mask, token_mask


def without_padding(attention_mask: torch.Tensor | dict | None) -> torch.Tensor | dict | None:
    """A mask on the CPU, or None if it is one of two dimensions that masks nothing."""
    is_known = isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2
    return None if is_known and bool(attention_mask.all()) else attention_mask  # type: ignore[union-attr]


def cached_length(cache: Cache | None) -> int:
    """Number of text tokens that a cache holds in each row. A static cache counts on its device, and is asked."""
    return 0 if cache is None else int(cache.get_seq_length())
