# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Conversations from datasets: JSON lines or parquet beside their images, or what `datasets` loads.

Several datasets make a mixture, in which each has a share of the conversations. JSON lines are read here rather than
by `datasets`, which wants one type per column: contents are strings in one line and lists of parts in another.
"""

from __future__ import annotations

import json
import math
import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from ..checkpoint_files.names import is_hub_id
from ..checks import is_positive
from .settings import typed

Example = Mapping[str, Any]

_SUFFIXES = (".jsonl", ".parquet")
# A name that ends so is a file that isn't there, not a dataset on the Hub.
_OTHER_SUFFIXES = (".json", ".csv", ".tsv", ".txt")


def load_conversations(
    data: str | os.PathLike, split: str | None = None, name: str | None = None
) -> Sequence[Example]:
    """Read the conversations of a dataset; their images are opened when they are used.

    Args:
        data: .jsonl or .parquet file, folder with such files, or Hub id of a dataset (needs the package `datasets`,
            as parquet does). Paths of images and videos are relative to the folder of the file.
        split: split as `datasets.load_dataset` takes it: "train", also "train[:1000]"; None for "train". Files, and
            folders without a `name`, have none and are read whole.
        name: configuration (subset) of the dataset, as `datasets.load_dataset` takes it. In a folder, README.md says
            which files belong to which configuration.

    Returns:
        A sequence of examples as `Dialogue.of` takes them.

    Raises:
        ValueError: if there are no such files, dataset, configuration or split, a line isn't a JSON object, or a
            split or a name is given for what has none.
        ImportError: if `datasets` is needed and not installed.
    """
    path = Path(data)
    if name is not None and path.is_file():
        raise ValueError(f"name={name!r} is for datasets with configurations, but {path} is a file; leave it out.")
    if split is not None and not _has_splits(path, name):
        kind = "file" if path.is_file() else "folder without a name (of a configuration)"
        raise ValueError(f"split={split!r} is for datasets with splits, but {path} is a {kind}; leave it out.")
    split = split or "train"
    if path.is_dir() and name is not None:
        return _Located(_load_dataset(str(path), name, split), path)
    if path.exists():
        return _read_files(path)
    if not is_hub_id(path) or path.suffix in (*_SUFFIXES, *_OTHER_SUFFIXES):
        raise ValueError(
            f"{str(path)!r} is not a file, a folder or a Hub id. Give the path of conversations, or a Hub id such as "
            "me/conversations."
        )
    return _load_dataset(str(data), name, split)


def _read_files(path: Path) -> Sequence[Example]:
    """The conversations of a file, or of all files of a folder."""
    files = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path} has no {' or '.join(_SUFFIXES)} file; put the conversations there.")
    suffixes = {file.suffix for file in files}
    if not suffixes <= set(_SUFFIXES):
        raise ValueError(f"{path} is not a {' or '.join(_SUFFIXES)} file; convert it to one.")
    if len(suffixes) > 1:
        raise ValueError(f"{path} has both {' and '.join(_SUFFIXES)} files; keep one kind.")
    folder = files[0].parent
    if suffixes == {".parquet"}:
        return _Located(_undecoded(_datasets().Dataset.from_parquet([str(file) for file in files])), folder)
    rows: list[Example] = []
    lines: list[tuple[Path, int]] = []
    for file in files:
        found = _read_json_lines(file)
        rows += found.values()
        lines += [(file, number) for number in found]
    return _Located(rows, folder, lines)


@dataclass(frozen=True)
class DatasetEntry:
    """A dataset in a mixture.

    Attributes:
        path: file, folder or Hub id; see `load_conversations`.
        name: configuration of the dataset.
        split: split of the dataset; None for the mixture's.
        weight: part of the mixture's conversations, in proportion to the other datasets' weights.
    """

    path: str
    name: str | None = None
    split: str | None = None
    weight: float | None = None

    @classmethod
    def of(cls, given: Any) -> DatasetEntry:
        """Read a path, or a mapping of the attributes.

        Raises:
            ValueError: if it is anything else, has unknown attributes, or a weight that isn't a positive number.
        """
        if isinstance(given, str | os.PathLike):
            return cls(str(given))
        known = [field.name for field in fields(cls)]
        if not isinstance(given, Mapping) or not given.get("path") or not given.keys() <= set(known):
            raise ValueError(
                f"A dataset is {given!r:.200}; expected a path, or a mapping with path and optionally "
                f"{', '.join(known[1:])}."
            )
        weight = given.get("weight")
        if isinstance(weight, str):
            weight = typed(f"The weight of {given['path']}", weight, float)
        if weight is not None and not is_positive(weight):
            raise ValueError(f"The weight of {given['path']} is {weight!r}; expected a positive number.")
        return cls(**{**given, "path": str(given["path"]), "weight": weight})


def load_mixture(
    data: Any, split: str | None = None, seed: int = 0, default_split: str = "train"
) -> Sequence[Example]:
    """Read the conversations of one or several datasets, shuffled into one sequence.

    Args:
        data: dataset or list of datasets; see `DatasetEntry.of`. Without weights, every conversation occurs once. With
            weights (every dataset has one then), `weight / sum of weights` of all conversations, to the nearest whole
            number, come from a dataset; each occurs at least once, and where a dataset is too small for its share,
            its conversations are repeated, in full rounds except for the last one.
        split: split of the datasets that don't name their own; None for `default_split`.
        seed: seed of the order, and of which conversations are in the last round. The same seed, datasets and weights
            give the same sequence.
        default_split: default of `split`; it may be given where no dataset has splits.

    Raises:
        ValueError: if a dataset can't be read, is empty though it has a weight, or only some have weights, or there
            is a `split` but no dataset that uses it.
        ImportError: as `load_conversations`.
    """
    entries = [DatasetEntry.of(given) for given in (data if isinstance(data, list | tuple) else [data])]
    _check_weights(entries)
    use_split = [each.split is None and _has_splits(Path(each.path), each.name) for each in entries]
    if split is not None and not any(use_split):
        raise ValueError(
            f"The split {split!r} is for datasets that don't name their own, but there are none: files, and "
            "folders without a name (of a configuration), are read whole. Leave it out."
        )
    found = [
        load_conversations(each.path, (split or default_split) if uses else each.split, each.name)
        for each, uses in zip(entries, use_split, strict=True)
    ]
    return Mixture(found, _shuffled([len(examples) for examples in found], entries, seed))


def _check_weights(entries: Sequence[DatasetEntry]) -> None:
    if not entries:
        raise ValueError("The list of datasets is empty; name at least one.")
    weighted = [each.weight is not None for each in entries]
    if any(weighted) and not all(weighted):
        raise ValueError(
            f"{entries[weighted.index(False)].path} has no weight, but {entries[weighted.index(True)].path} has "
            "one; give every dataset a weight, or none."
        )


def _shuffled(sizes: Sequence[int], entries: Sequence[DatasetEntry], seed: int) -> torch.Tensor:
    """(number of examples,) the order of a mixture: indices into all datasets, one after another."""
    weights = [each.weight for each in entries if each.weight is not None]
    counts = list(sizes)
    if weights:
        if 0 in sizes:
            raise ValueError(f"{entries[sizes.index(0)].path} has a weight but no conversations; leave it out.")
        counts = shares(sizes, weights)
    generator = torch.Generator().manual_seed(seed)
    taken = []
    for start, size, count in zip(accumulate(sizes, initial=0), sizes, counts, strict=False):
        while count > 0:
            taken.append(start + torch.randperm(size, generator=generator)[:count])
            count -= size
    order = torch.cat(taken) if taken else torch.zeros(0, dtype=torch.long)
    return order[torch.randperm(len(order), generator=generator)]


def shares(sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """How many conversations to take of each dataset, so that none is left out and the weights hold.

    Args:
        sizes: positive number of conversations of each dataset.
        weights: positive weight of each dataset.

    Returns:
        Numbers in proportion to the weights, to the nearest whole ones, none below its size.
    """
    exact = [Fraction(str(weight)) for weight in weights]  # 0.1 as it is written
    parts = [weight / sum(exact) for weight in exact]
    total = max(math.ceil(size / part) for size, part in zip(sizes, parts, strict=True))
    counts = [math.floor(total * part) for part in parts]
    by_remainder = sorted(range(len(parts)), key=lambda index: counts[index] - total * parts[index])
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    return counts


def describe(examples: Sequence[Example], index: int) -> str:
    """Name of an example in an error: its number and, if known, the place that it comes from."""
    place = getattr(examples, "describe", None)
    return f"Example {index}" if place is None else place(index)


class Mixture(Sequence):
    """Examples of several datasets in one order.

    Args:
        parts: examples of each dataset.
        order: (number of examples,) indices into all datasets, one after another.
    """

    def __init__(self, parts: Sequence[Sequence[Example]], order: torch.Tensor):
        self._parts = parts
        self._order = order
        self._starts = list(accumulate(map(len, parts), initial=0))[:-1]

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        examples, place = self._find(index)
        return examples[place]

    def original(self, index: int) -> int:
        """Number that all occurrences of one conversation share."""
        return int(self._order[index])

    def describe(self, index: int) -> str:
        """See `describe`."""
        return describe(*self._find(index))

    def _find(self, index: int) -> tuple[Sequence[Example], int]:
        place = self.original(index)
        number = bisect_right(self._starts, place) - 1
        return self._parts[number], place - self._starts[number]


class _Located(Sequence):
    """Examples with paths relative to a folder.

    Args:
        rows: examples.
        folder: folder that paths are relative to.
        lines: file and line of each example; None for tables.
    """

    def __init__(self, rows: Any, folder: Path, lines: Sequence[tuple[Path, int]] | None = None):
        self._rows = rows
        self._folder = folder
        self._lines = lines

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        return {name: self._locate(value) for name, value in self._rows[index].items()}

    def describe(self, index: int) -> str:
        """See `describe`."""
        if self._lines is None:
            return f"Example {index} of {self._folder}"
        file, number = self._lines[index]
        return f"{file}, line {number}"

    def _locate(self, value: Any) -> Any:
        """The value, with absolute paths in place of strings that are the path of a file in the folder."""
        if isinstance(value, Mapping):
            kept = ("text", "role", "content", "type")
            return {
                name: item if name in kept and isinstance(item, str) else self._locate(item)
                for name, item in value.items()
            }
        if isinstance(value, list):
            return [self._locate(item) for item in value]
        # Any string, also those that can't be the name of a file.
        if isinstance(value, str) and os.path.isfile(file := self._folder / value):
            return str(file)
        return value


def _has_splits(path: Path, name: str | None) -> bool:
    """Whether `datasets` reads this by split; other files and folders are read whole."""
    return name is not None or not path.exists()


def _read_json_lines(file: Path) -> dict[int, Example]:
    """The objects by number of their line."""
    rows: dict[int, Example] = {}
    with open(file, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{file}, line {number} isn't valid JSON ({error}). Correct or remove it.") from error
            if not isinstance(row, Mapping):
                raise ValueError(
                    f"{file}, line {number} is a {type(row).__name__}; expected a JSON object with messages."
                )
            rows[number] = row
    return rows


def _load_dataset(path: str, name: str | None, split: str) -> Any:
    try:
        return _undecoded(_datasets().load_dataset(path, name, split=split))
    except (ValueError, OSError) as error:
        raise ValueError(
            f"The dataset {path!r} can't be read with name={name!r} and split={split!r}: {error}"
        ) from error


def _undecoded(dataset: Any) -> Any:
    """The dataset with its images and videos as they are stored, {"bytes", "path"}, wherever in its columns."""
    datasets = _datasets()
    media = tuple(getattr(datasets, name) for name in ("Image", "Video") if hasattr(datasets, name))

    def change(feature: Any) -> Any:
        if isinstance(feature, media):
            return replace(feature, decode=False)
        if isinstance(feature, Mapping):
            return {name: change(item) for name, item in feature.items()}
        if isinstance(feature, list):
            return [change(item) for item in feature]
        if hasattr(feature, "feature"):  # a list of any kind
            return replace(feature, feature=change(feature.feature))
        return feature

    # Not `cast`, which would copy all of it where the images are in lists: what is stored stays the same.
    features = type(dataset.features)(change(dataset.features))
    info = dataset.info.copy()
    info.features = features
    return type(dataset)(dataset.data, info=info, split=dataset.split)


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            'Parquet files and datasets from the Hub need the package datasets: pip install "casa_hf[train]".'
        ) from error
    return datasets
