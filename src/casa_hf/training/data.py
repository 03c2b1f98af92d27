# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Conversations from files: JSON lines or parquet beside their images, or a data set that `datasets` can load.

Several sources make a mixture, in which each has a share of the conversations.
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

from ..checks import is_positive
from .settings import typed

Example = Mapping[str, Any]

_SUFFIXES = (".jsonl", ".parquet")
# A name that ends so is a file that isn't there, not a data set on the Hub.
_OTHER_SUFFIXES = (".json", ".csv", ".tsv", ".txt")


def load_conversations(
    data: str | os.PathLike, split: str | None = None, name: str | None = None
) -> Sequence[Example]:
    """Read conversations; their images are opened when they are used.

    Args:
        data: a .jsonl or .parquet file, a folder with such files, or the Hub id of a data set (needs the package
            `datasets`, as parquet does). Paths of images and videos are relative to the folder of the file.
        split: of a data set, as `datasets.load_dataset` takes it: "train", also "train[:1000]"; None for "train".
            Files, and folders without a `name`, have none and are read whole.
        name: of a data set's configuration (its subset), as `datasets.load_dataset` takes it. A folder with a name is
            a data set too: its README.md says which files belong to which configuration.

    Returns:
        A sequence of examples as `Dialogue.of` takes them.

    Raises:
        ValueError: if the path has no such files, a line isn't a JSON object, there is no such data set,
            configuration or split, or one of these is given for what has none.
        ImportError: if `datasets` is needed and not installed.
    """
    path = Path(data)
    if name is not None and path.is_file():
        raise ValueError(f"name={name!r} is that of a data set's configuration, but {path} is a file; leave it out.")
    if split is not None and not _has_splits(path, name):
        kind = "file" if path.is_file() else "folder without a name (of a configuration)"
        raise ValueError(f"split={split!r} is that of a data set, but {path} is a {kind}, read whole; leave it out.")
    split = split or "train"
    if path.is_dir() and name is not None:
        return _Located(_load_dataset(str(path), name, split), path)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES)
        if not files:
            raise ValueError(f"{path} has no {' or '.join(_SUFFIXES)} file; put the conversations there.")
    elif path.is_file():
        files = [path]
    elif not _is_hub_id(str(data)):
        raise ValueError(f"There is no file or folder {str(path)!r} with conversations, and it is no Hub id either.")
    else:
        return _load_dataset(str(data), name, split)
    rows: list[Example] = []
    lines: list[tuple[Path, int]] = []
    parquet = [file for file in files if file.suffix == ".parquet"]
    for file in files:
        if file.suffix not in _SUFFIXES:
            raise ValueError(f"{file} is neither {' nor '.join(_SUFFIXES)}; convert it to one of them.")
        if file.suffix == ".jsonl":
            found = _read_json_lines(file)
            rows += found.values()
            lines += [(file, number) for number in found]
    if parquet and rows:
        raise ValueError(f"{path} has both kinds of files, {' and '.join(_SUFFIXES)}; keep one of them.")
    if parquet:
        read = _datasets().Dataset.from_parquet([str(file) for file in parquet])
        return _Located(_undecoded(read), files[0].parent)
    return _Located(rows, files[0].parent, lines)


@dataclass(frozen=True)
class Source:
    """A source of a mixture.

    Attributes:
        path, split, name: the `data` and further arguments of `load_conversations`; without a split, the mixture's.
        weight: this source's part of the conversations of the mixture, in proportion to the other sources' weights.
    """

    path: str
    name: str | None = None
    split: str | None = None
    weight: float | None = None

    @classmethod
    def of(cls, given: Any) -> Source:
        """From a path, or a mapping of the attributes.

        Raises:
            ValueError: for anything else, unknown attributes, or a weight that isn't a positive number.
        """
        if isinstance(given, str | os.PathLike):
            return cls(str(given))
        known = [field.name for field in fields(cls)]
        if not isinstance(given, Mapping) or not given.get("path") or not given.keys() <= set(known):
            raise ValueError(
                f"A source of conversations is {given!r:.200}; expected a path, or a mapping with path and optionally "
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
    """Read conversations from one or several sources, shuffled into one sequence.

    Args:
        data: a source, or a list of them; see `Source.of`. Without weights, every conversation occurs once. With
            weights (each source has one then), `weight / sum of weights` of all conversations, to the nearest whole
            number, come from a source; each occurs at least once, and where a source is too small for its share, all
            of its conversations come again, in full rounds but for the last one.
        split: of data sets that don't name their own; None for `default_split`.
        seed: of the order, and of which conversations are in the last round. The same seed, sources and weights give
            the same sequence.
        default_split: of these data sets; unlike `split` it may be given where there are none.

    Raises:
        ValueError: if a source can't be read, is empty though it has a weight, or only some have weights, or no source
            takes the `split`.
        ImportError: as `load_conversations`.
    """
    sources = [Source.of(given) for given in (data if isinstance(data, list | tuple) else [data])]
    weighted = [source.weight is not None for source in sources]
    if not sources:
        raise ValueError("The list of sources of conversations is empty; name at least one.")
    if any(weighted) and not all(weighted):
        raise ValueError(
            f"{sources[weighted.index(False)].path} has no weight, but {sources[weighted.index(True)].path} has one; "
            "give every source a weight, or none."
        )
    takes = [source.split is None and _has_splits(Path(source.path), source.name) for source in sources]
    if split is not None and not any(takes):
        raise ValueError(
            f"The split {split!r} is for data sets that don't name their own, but no source is one: files, and "
            "folders without a name (of a configuration), are read whole. Leave it out."
        )
    found = [
        load_conversations(source.path, (split or default_split) if taken else source.split, source.name)
        for source, taken in zip(sources, takes, strict=True)
    ]
    sizes = counts = [len(examples) for examples in found]
    if all(weighted):
        if 0 in sizes:
            raise ValueError(f"{sources[sizes.index(0)].path} has no conversations to take a share of; leave it out.")
        counts = shares(sizes, [source.weight for source in sources if source.weight is not None])
    generator = torch.Generator().manual_seed(seed)
    taken = []
    for start, size, count in zip(accumulate(sizes, initial=0), sizes, counts, strict=False):
        while count > 0:
            taken.append(start + torch.randperm(size, generator=generator)[:count])
            count -= size
    order = torch.cat(taken) if taken else torch.zeros(0, dtype=torch.long)
    return Mixture(found, order[torch.randperm(len(order), generator=generator)])


def shares(sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """How many conversations to take of each source, so that none is left out and the weights hold.

    Args:
        sizes: of the sources, positive.
        weights: of the sources, positive.

    Returns:
        Numbers in proportion to the weights to the nearest whole ones, none below its size.
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
    """What to call an example in an error: its number and, if known, the place that it comes from."""
    place = getattr(examples, "describe", None)
    return f"Example {index}" if place is None else place(index)


class Mixture(Sequence):
    """Examples of several sources in one order.

    Args:
        sources: the examples of each.
        order: (number of examples,) indices into all sources, one after another.
    """

    def __init__(self, sources: Sequence[Sequence[Example]], order: torch.Tensor):
        self._sources = sources
        self._order = order
        self._starts = list(accumulate(map(len, sources), initial=0))[:-1]

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        source, place = self._find(index)
        return source[place]

    def original(self, index: int) -> int:
        """A number that all occurrences of one conversation share."""
        return int(self._order[index])

    def describe(self, index: int) -> str:
        """See `describe`."""
        return describe(*self._find(index))

    def _find(self, index: int) -> tuple[Sequence[Example], int]:
        place = self.original(index)
        source = bisect_right(self._starts, place) - 1
        return self._sources[source], place - self._starts[source]


class _Located(Sequence):
    """Examples whose relative paths start at a folder.

    Args:
        rows: the examples.
        folder: where paths start.
        lines: file and line of each example, where they come from lines.
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
        return f"Example {index} ({file}, line {number})"

    def _locate(self, value: Any) -> Any:
        """The value with each text that is the path of a file below the folder made absolute."""
        if isinstance(value, Mapping):
            kept = ("text", "role", "content", "type")
            return {
                name: item if name in kept and isinstance(item, str) else self._locate(item)
                for name, item in value.items()
            }
        if isinstance(value, list):
            return [self._locate(item) for item in value]
        # Any text, which may be no possible name of a file.
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
                raise ValueError(f"{file}, line {number} isn't valid JSON ({error}).") from error
            if not isinstance(row, Mapping):
                raise ValueError(f"{file}, line {number} is a {type(row).__name__}; expected an object with messages.")
            rows[number] = row
    return rows


def _is_hub_id(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if name.count("/") != 1 or name.endswith((*_SUFFIXES, *_OTHER_SUFFIXES)):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _load_dataset(path: str, name: str | None, split: str) -> Any:
    try:
        return _undecoded(_datasets().load_dataset(path, name, split=split))
    except (ValueError, OSError) as error:
        raise ValueError(f"The data set {path!r} can't be read with name={name!r} and split={split!r}: {error}") from (
            error
        )


def _undecoded(dataset: Any) -> Any:
    """The data set with its images and videos as they are stored, {"bytes", "path"}, wherever in its columns."""
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

    # Not `cast`, which would write all of it anew where the images are in lists: what is stored stays the same.
    features = type(dataset.features)(change(dataset.features))
    info = dataset.info.copy()
    info.features = features
    return type(dataset)(dataset.data, info=info, split=dataset.split)


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            'Parquet files and data sets from the Hub need the package datasets: pip install "casa_hf[train]".'
        ) from error
    return datasets
