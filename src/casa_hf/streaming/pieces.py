# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Text from tokens as they arrive, in whole characters.

`tokenizers.decoders.DecodeStream` does the same for a text that is never saved and always valid: it can't be written
to a file, resumes wrongly within a character, and raises where byte tokens form none.
"""

from __future__ import annotations

from typing import Any

# What decoders write for bytes that are no character, or not yet one.
_NO_CHARACTER = "\N{REPLACEMENT CHARACTER}"
# Tokens that may wait for the rest of a character; four bytes make any.
_LONGEST_WAIT = 8


class TextPieces:
    """Decodes a text token by token; its pieces, joined, are what decoding all tokens at once gives.

    A token of a byte-level tokenizer may end within a character. The character is given out once it is whole. Each
    piece is decoded together with the tokens of the one before it, since some tokenizers write a space before a word
    only where something precedes it.

    Args:
        tokenizer: tokenizer that decodes; special tokens are left out.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self._special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.reset()

    def reset(self) -> None:
        """Start a new text."""
        self._before: list[int] = []  # tokens of the last piece
        self._waiting: list[int] = []  # tokens since then

    def add(self, token_id: int) -> tuple[str, tuple[int, ...]]:
        """The text that this token completes and the tokens that it was decoded from; both empty for none."""
        if token_id in self._special or self.tokenizer.convert_ids_to_tokens(token_id) is None:
            return "", ()  # no text, nor is an id beyond those that the tokenizer knows
        self._waiting.append(token_id)
        before = self._decode(self._before)
        text = self._decode([*self._before, *self._waiting])
        unfinished = text.endswith(_NO_CHARACTER) and len(self._waiting) < _LONGEST_WAIT
        if unfinished or len(text) <= len(before):
            return "", ()
        piece, tokens = text[len(before) :], tuple(self._waiting)
        self._before, self._waiting = self._waiting, []
        return piece, tokens

    def state(self) -> dict[str, list[int]]:
        """What `load` resumes from."""
        return {"before": list(self._before), "waiting": list(self._waiting)}

    def load(self, state: dict[str, list[int]]) -> None:
        """Resume where another one stopped, whose `state` this is."""
        self._before, self._waiting = list(state["before"]), list(state["waiting"])

    def _decode(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
