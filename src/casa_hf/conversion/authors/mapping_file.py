# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The table of a checkpoint's tensors and of what they become, as text that a person can mend.

Lines have columns with tabs in between; those after the second are for the reader. Lines that begin with # are
comments.

| tensor | becomes |
|---|---|
| `lm.layers.{i}.xa.query.weight` | `model.language_model.layers.{i}.casa_attn.q_proj.weight` |
| `lm.layers.{i}.xa.joined.weight[0:2048]` | `model.language_model.layers.{i}.casa_attn.k_proj.weight` |
| `image_prefix.scale.weight` | `model.language_model.layers.{i}.casa_attn.image_norm.weight` |
| `image_prefix.visual.patch_embed.proj.weight` | `model.visual.patch_embed.proj.weight chw` |
| `lm.something.inv_freq` | `drop` |
| `lm.unknown.weight` | `?` |

`{i}` is any number. Where the tensor has none, the same tensor is that of every block with a fusion layer. `[a:b]`
takes rows a to b (exclusive). A letter for each axis says in which order the numbers of a patch embedding lie, where
it is flattened or turned: c (channels), t (frames), h, w. `?` leaves a tensor to the rules.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from ...folder_files import CheckpointError
from .names import ANY_BLOCK

COLUMNS = ("tensor", "becomes", "numbers", "dtype", "shape", "remark")
UNKNOWN, DROP = "?", "drop"

_ROWS = re.compile(r"(.+)\[(\d+):(\d+)\]")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
ORDERS = ("chw", "hwc", "cthw", "thwc")


@dataclass(frozen=True)
class Meaning:
    """What a tensor, or some of its rows, becomes.

    Attributes:
        target: name in the CASA checkpoint, with `ANY_BLOCK` for all blocks with a fusion layer; None to leave it out.
        rows: first row, and the one behind the last; None for all.
        order: axes of the numbers of a patch embedding, but for the first; None for the usual ones.
    """

    target: str | None
    rows: tuple[int, int] | None = None
    order: str | None = None


class MappingFile:
    """What a file says about the tensors of a checkpoint.

    Args:
        file: path of the file.

    Raises:
        CheckpointError: if it can't be read; names the line.
    """

    def __init__(self, file: str | Path):
        self.file = Path(file)
        self._exact: dict[str, list[Meaning]] = {}
        self._patterns: dict[str, list[Meaning]] = {}
        self._lines: dict[str, int] = {}
        try:
            lines = self.file.read_text(encoding="utf-8-sig").splitlines()  # some editors put a mark at the start
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(
                f"mapping={str(self.file)!r} can't be read ({error}). Give the file that `casa-hf inspect SOURCE "
                "--names` has printed, mended."
            ) from error
        for number, line in enumerate(lines, 1):
            if line.strip() and not line.startswith("#"):
                self._add(number, [column.strip() for column in line.split("\t")])

    def check(self, stored: Collection[str], possible: Collection[str]) -> None:
        """Compare with a checkpoint.

        Args:
            stored: names of its tensors.
            possible: names of all tensors that a CASA checkpoint can have.

        Raises:
            CheckpointError: for a line that names none of the tensors, or something that no CASA checkpoint has.
        """
        for name, meanings in (*self._exact.items(), *self._patterns.items()):
            if not any(_numbers(name, other) is not None for other in stored):
                raise self._error(name, f"names no tensor of the checkpoint: {name}", "Remove or correct the line.")
            for meaning in meanings:
                target = meaning.target
                if target is not None and not any(_numbers(target, other) is not None for other in possible):
                    near = get_close_matches(target, {_generalised(other) for other in possible}, n=1)
                    raise self._error(
                        name,
                        f"has {target!r}, which no CASA checkpoint of this backbone has",
                        f"Did you mean {near[0]}?" if near else "Write such as model.language_model.norm.weight.",
                    )

    def meanings(self, name: str) -> list[Meaning] | None:
        """What a tensor becomes; None if the file leaves it to the rules."""
        if name in self._exact:
            return self._exact[name]
        for pattern, meanings in self._patterns.items():
            if (number := _numbers(pattern, name)) is not None:
                return [
                    Meaning(meaning.target and meaning.target.replace(ANY_BLOCK, number), meaning.rows, meaning.order)
                    for meaning in meanings
                ]
        return None

    def _add(self, number: int, columns: list[str]) -> None:
        if columns[:2] == list(COLUMNS[:2]):
            return
        if len(columns) < 2 or not all(columns[:2]):
            raise CheckpointError(
                f"mapping={str(self.file)!r}: line {number} must have a tensor, a tab, and what it becomes. Correct "
                "the line, or put # before it."
            )
        name, becomes = columns[:2]
        if becomes == UNKNOWN:
            return
        rows = None
        if match := _ROWS.fullmatch(name):
            name, rows = match[1], (int(match[2]), int(match[3]))
        target, _, order = becomes.partition(" ")
        if order and order not in ORDERS:
            raise CheckpointError(
                f"mapping={str(self.file)!r}: line {number} has {order!r} behind the name; expected one of "
                f"{', '.join(ORDERS)}, or nothing. Correct the line."
            )
        self._lines[name] = number
        table = self._patterns if ANY_BLOCK in name else self._exact
        meaning = Meaning(None if target == DROP else target, rows, order or None)
        if meaning not in table.setdefault(name, []):
            table[name].append(meaning)

    def _error(self, name: str, fault: str, way_out: str) -> CheckpointError:
        return CheckpointError(f"mapping={str(self.file)!r}: line {self._lines[name]} {fault}. {way_out}")


@dataclass(frozen=True)
class Line:
    """A line of the table about one tensor, or rows of one.

    Attributes:
        tensor, becomes: as in the file.
        dtype, shape, remark: for the reader.
    """

    tensor: str
    becomes: str
    dtype: str
    shape: str
    remark: str = ""


def table_of(lines: Iterable[Line]) -> str:
    """The table as text, with one line for all blocks where these differ by their number alone."""
    groups: dict[Line, list[str]] = {}
    alone: list[Line] = []
    for line in lines:
        number = _NUMBER.search(line.tensor)
        if number is None:
            alone.append(line)
            continue
        becomes = re.sub(rf"(?<=\.){number[0]}(?=\.)", ANY_BLOCK, line.becomes, count=1)
        remark = re.sub(rf"(?<=\.){number[0]}(?=\.)", ANY_BLOCK, line.remark)
        tensor = _NUMBER.sub(ANY_BLOCK, line.tensor, count=1)
        groups.setdefault(Line(tensor, becomes, line.dtype, line.shape, remark), []).append(number[0])
    names = [line.tensor for line in groups]
    rows = [_row(line, "") for line in alone]
    for line, numbers in groups.items():
        if names.count(line.tensor) == 1:
            rows.append(_row(line, _ranges(numbers)))
        else:  # blocks differ
            rows += [_row(_of_block(line, number), number) for number in numbers]
    return "\n".join(["\t".join(COLUMNS), *rows]) + "\n"


def _of_block(line: Line, number: str) -> Line:
    tensor, becomes, remark = (part.replace(ANY_BLOCK, number) for part in (line.tensor, line.becomes, line.remark))
    return Line(tensor, becomes, line.dtype, line.shape, remark)


def _row(line: Line, numbers: str) -> str:
    return "\t".join((line.tensor, line.becomes, numbers, line.dtype, line.shape, line.remark)).rstrip()


def _ranges(numbers: list[str]) -> str:
    """Numbers such as 0-35 or 1,3,5."""
    found = sorted(map(int, numbers))
    if len(found) > 2 and found == list(range(found[0], found[-1] + 1)):
        return f"{found[0]}-{found[-1]}"
    return ",".join(map(str, found))


def _numbers(pattern: str, name: str) -> str | None:
    """The number that `ANY_BLOCK` stands for in a name, "" where a pattern without it is the name; else None."""
    before, found, after = pattern.partition(ANY_BLOCK)
    if not found:
        return "" if pattern == name else None
    middle = name[len(before) : len(name) - len(after)]
    matches = name.startswith(before) and name.endswith(after) and middle.isdecimal()
    return middle if matches else None


def _generalised(name: str) -> str:
    return _NUMBER.sub(ANY_BLOCK, name, count=1)
