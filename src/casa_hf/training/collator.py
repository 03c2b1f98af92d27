# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""From conversations to batches, padded or packed.

A *row* of a batch holds one conversation, or several that are packed one after another. Packed conversations don't see
each other: `position_ids` count the text tokens of each from 0, and where they restart the model starts from scratch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset, IterableDataset

from .data import Mixture, describe
from .samples import IGNORED, Sample, encode, measure, unseen_image

if TYPE_CHECKING:
    from ..processing_casa import CasaProcessor

logger = logging.getLogger(__name__)

Example = Mapping[str, Any]

# Rows that stay open while samples are packed: more fill better, and draw samples from farther apart.
_OPEN_ROWS = 64


@dataclass(frozen=True)
class Budget:
    """What a row may hold; None for no limit.

    Attributes:
        text_tokens: number of text tokens of all samples together.
        image_tokens: number of image tokens of all samples together, after merging.
    """

    text_tokens: int | None = None
    image_tokens: int | None = None

    def __post_init__(self) -> None:
        for name, limit in (("max_text_tokens", self.text_tokens), ("max_image_tokens", self.image_tokens)):
            if limit is not None and limit < 1:
                raise ValueError(f"{name}={limit} must be positive, or None for no limit.")

    def holds(self, text_tokens: int, image_tokens: int) -> bool:
        """Whether that many tokens fit into a row."""
        return (self.text_tokens is None or text_tokens <= self.text_tokens) and (
            self.image_tokens is None or image_tokens <= self.image_tokens
        )

    def refusal(self, text_tokens: int, image_tokens: int) -> str:
        """Message of the error for a conversation of this size."""
        over = []
        if not self.holds(text_tokens, 0):
            over.append((f"{text_tokens} text tokens", self.text_tokens, "max_text_tokens"))
        if not self.holds(0, image_tokens):
            over.append((f"{image_tokens} image tokens", self.image_tokens, "max_image_tokens"))
        found = " and ".join(tokens for tokens, _, _ in over)
        expected = " and ".join(f"{limit} ({name})" for _, limit, name in over)
        raised = " and ".join(name for _, _, name in over)
        lower = "" if self.holds(0, image_tokens) else "lower max_pixels, "
        return (
            f"A conversation has {found}; expected at most {expected}. Raise {raised}, {lower}or set over_long: drop."
        )


def pack(sizes: Iterable[tuple[int, int]], budget: Budget) -> list[list[int]]:
    """Distribute samples over rows: each into the first open row that still has room, in the order given.

    Args:
        sizes: numbers of text and image tokens of each sample; each alone must fit the budget.
        budget: budget of a row.

    Returns:
        Indices of the samples of each row.
    """
    rows: list[list[int]] = []
    used: dict[int, tuple[int, int]] = {}  # of the open rows
    for index, (text, images) in enumerate(sizes):
        roomy = (row for row, (t, i) in used.items() if budget.holds(t + text, i + images))
        row = next(roomy, None)
        if row is None:
            row = len(rows)
            rows.append([])
            used[row] = (0, 0)
            if len(used) > _OPEN_ROWS:
                del used[min(used)]
        rows[row].append(index)
        used[row] = (used[row][0] + text, used[row][1] + images)
    return rows


def _check_over_long(over_long: str) -> None:
    if over_long not in ("raise", "drop"):
        raise ValueError(f'over_long={over_long!r} is unknown; choose "raise" or "drop".')


class PackedDataset(Dataset):
    """Conversations grouped into rows of a fixed budget, planned once; an element is the list of a row's examples.

    Args:
        examples: conversations; see `casa_hf.training.Dialogue.of`. They are packed in this order, so shuffle them
            before (`load_mixture` does).
        processor: processor of the model; it measures conversations without making pixels.
        max_text_tokens, max_image_tokens: budget of a row; None for no limit.
        over_long: treatment of a conversation that alone exceeds the budget, "raise" or "drop"; none is ever cut.

    Attributes:
        rows: indices of the examples of each row.
        num_dropped: number of conversations left out for their length.
        num_conversations: number of the other conversations.
        num_text_tokens, num_image_tokens: numbers of tokens in all rows together.

    Raises:
        ValueError: if there are no conversations, they are an iterable, one is unusable, or too long
            and `over_long="raise"`, or no row is left. Images and videos are checked to exist and to have a size; a
            damaged one is found when it is used.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        processor: CasaProcessor,
        *,
        max_text_tokens: int | None = 2_048,
        max_image_tokens: int | None = 20_480,
        over_long: str = "raise",
    ):
        _check_over_long(over_long)
        budget = Budget(max_text_tokens, max_image_tokens)
        if not isinstance(examples, Sized) or isinstance(examples, IterableDataset):
            raise ValueError(
                f"The examples are an iterable, a {type(examples).__name__}, but PackedDataset plans rows ahead. "
                "Give it a list of them, or give the iterable to the trainer, with CasaDataCollator(packing=True)."
            )
        if not len(examples):
            raise ValueError("There are no conversations in the data; name files or datasets that have some.")
        self.examples = examples
        kept, sizes = [], []
        measured: dict[int, tuple[int, int]] = {}  # a conversation that occurs again is read once
        for index in range(len(examples)):
            original = examples.original(index) if isinstance(examples, Mixture) else index
            if original not in measured:
                measured[original] = _measure(processor, examples, index)
            size = measured[original]
            if budget.holds(*size):
                kept.append(index)
                sizes.append(size)
            elif over_long == "raise":
                raise ValueError(f"{describe(examples, index)}: {budget.refusal(*size)}")
        if not kept:
            raise ValueError(
                f"None of the {len(examples)} examples fits into a row. Raise max_text_tokens={max_text_tokens} or "
                f"max_image_tokens={max_image_tokens}."
            )
        self.rows = [[kept[place] for place in row] for row in pack(sizes, budget)]
        self.num_dropped, self.num_conversations = len(examples) - len(kept), len(kept)
        self.num_text_tokens, self.num_image_tokens = (sum(counts) for counts in zip(*sizes, strict=True))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> list[Example]:
        return [self._named(place) for place in self.rows[index]]

    def _named(self, index: int) -> _NamedExample:
        name = describe(self.examples, index)
        with _naming(lambda: name):
            return _NamedExample(self.examples[index], name)


def _measure(processor: CasaProcessor, examples: Sequence[Example], index: int) -> tuple[int, int]:
    with _naming(lambda: describe(examples, index)):
        return measure(processor, examples[index])


@contextmanager
def _naming(name: Callable[[], str]) -> Iterator[None]:
    """Have errors say which example they are about.

    Raises:
        ValueError: if there is an error of any kind: chat templates, decoders and tokenizers have their own.
        ImportError: if a package is missing; unchanged, since it isn't about the example.
    """
    try:
        yield
    except ImportError:
        raise
    except Exception as error:
        kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
        raise ValueError(f"{name()}: {kind}{error}") from error


class _NamedExample(dict):
    """An example, and its name in errors."""

    def __init__(self, example: Example, name: str):
        super().__init__(example)
        self.name = name

    def __reduce__(self) -> Any:  # between processes
        return type(self), (dict(self), self.name)


@dataclass
class CasaDataCollator:
    """Conversations to a batch with labels on the answers.

    Args:
        processor: processor of the model.
        packing: whether to pack the conversations of a call into as few rows as the budget allows, instead of one
            each. Elements of a `PackedDataset` are rows already and stay as they are.
        max_text_tokens, max_image_tokens: budget of a row; None for no limit.
        over_long: treatment of a conversation that alone exceeds the budget, "raise" or "drop" (with a logged count);
            none is ever cut.
        always_image: whether a batch without images gets one that no text sees (see `unseen_image`), so that every
            trainable parameter has a gradient. Its few tokens come on top of the budget.
        pad_to_multiple_of: number that the length of the batch is a multiple of.
    """

    processor: CasaProcessor
    packing: bool = False
    max_text_tokens: int | None = None
    max_image_tokens: int | None = None
    over_long: str = "raise"
    always_image: bool = True
    pad_to_multiple_of: int = 1

    def __post_init__(self) -> None:
        _check_over_long(self.over_long)
        self._budget = Budget(self.max_text_tokens, self.max_image_tokens)

    def __call__(self, features: Sequence[Example | Sequence[Example]]) -> dict[str, torch.Tensor]:
        """Make a batch.

        Args:
            features: conversations (see `casa_hf.training.Dialogue.of`), or lists of conversations, each packed into
                a row.

        Returns:
            `input_ids`, `attention_mask`, `labels` and `mm_token_type_ids`, each (rows, tokens), padded on the right;
            `position_ids` (rows, tokens), the index of each token in its conversation, where a row holds several;
            `pixel_values` and `image_grid_thw` where there are images, and `second_per_grid_ts` where a whole video is
            one.

        Raises:
            ValueError: if a conversation is unusable, or too long and `over_long="raise"`, or none is left.
        """
        rows = self._rows([encode_all(self.processor, feature) for feature in features])
        if self.always_image and not any(sample.num_image_tokens for row in rows for sample in row):
            min(rows, key=_length).append(self._unseen)
        width = max(map(_length, rows))
        width += -width % self.pad_to_multiple_of
        batch = {
            "input_ids": _pad(rows, width, self.processor.tokenizer.pad_token_id, lambda s: s.input_ids),
            "attention_mask": _pad(rows, width, 0, lambda s: torch.ones_like(s.input_ids)),
            "labels": _pad(rows, width, IGNORED, lambda s: s.labels),
            "mm_token_type_ids": _pad(rows, width, 0, lambda s: s.mm_token_type_ids),
        }
        if any(len(row) > 1 for row in rows):
            batch["position_ids"] = _pad(rows, width, 0, lambda s: torch.arange(s.num_tokens))
        seen = [sample for row in rows for sample in row if sample.pixel_values is not None]
        for name in ("pixel_values", "image_grid_thw", "second_per_grid_ts"):
            if not seen or getattr(seen[0], name) is None:  # all are of one processor
                continue
            batch[name] = torch.cat([getattr(sample, name) for sample in seen])
        return batch

    @cached_property
    def _unseen(self) -> Sample:
        return unseen_image(self.processor)

    def _rows(self, given: list[list[Sample]]) -> list[list[Sample]]:
        """The samples of each row, within the budget."""
        rows, dropped = [], 0
        for samples in given:
            sizes = [(sample.num_tokens, sample.num_image_tokens) for sample in samples]
            fits = [self._budget.holds(*size) for size in sizes]
            if not all(fits) and self.over_long == "raise":
                raise ValueError(self._budget.refusal(*sizes[fits.index(False)]))
            dropped += fits.count(False)
            rows.append([sample for sample, fit in zip(samples, fits, strict=True) if fit])
        rows = [row for row in rows if row]
        if dropped:
            logger.warning("Dropped %d of %d conversations of a batch as too long.", dropped, sum(map(len, given)))
        if not rows:
            raise ValueError(
                f"All {sum(map(len, given))} conversations of a batch are too long for a row. Use PackedDataset, "
                "which drops them before training, or raise max_text_tokens and max_image_tokens."
            )
        if not self.packing or any(len(samples) > 1 for samples in given):
            return rows
        samples = [sample for row in rows for sample in row]
        packed = pack(((sample.num_tokens, sample.num_image_tokens) for sample in samples), self._budget)
        return [[samples[index] for index in row] for row in packed]


def encode_all(processor: CasaProcessor, feature: Example | Sequence[Example]) -> list[Sample]:
    """Encode a row: one conversation, or a list of them.

    Raises:
        ValueError: if one is unusable; the message says which.
    """
    examples = [feature] if isinstance(feature, Mapping) else feature
    return [_encode(processor, example) for example in examples]


def _encode(processor: CasaProcessor, example: Example) -> Sample:
    def name() -> str:
        return getattr(example, "name", None) or f"The example with the messages {example.get('messages')!r:.200}"

    with _naming(name):
        return encode(processor, example)


def _length(row: Sequence[Sample]) -> int:
    return sum(sample.num_tokens for sample in row)


def _pad(rows: list[list[Sample]], width: int, value: int, of: Any) -> torch.Tensor:
    padded = torch.full((len(rows), width), value)
    for index, row in enumerate(rows):
        joined = torch.cat([of(sample) for sample in row])
        padded[index, : len(joined)] = joined
    return padded
