# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Which of a CASA checkpoint's tensors each tensor of a released one is: by rules, or as a mapping file says."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod

from ...checkpoint_files.headers import Header
from ...checkpoint_files.shards import StoredTensor
from ..mapping import DROPPED, GATE, LAYER, TIED, VISION, Shape
from .mapping_file import DROP, ORDERS, UNKNOWN, Line, MappingFile, Meaning
from .names import ANY_BLOCK, candidates, is_fusion_list

PATCH_EMBEDDING = f"{VISION}patch_embed.proj.weight"
IMAGE_NORM = LAYER + "casa_attn.image_norm.weight"

_FUSION = re.compile(r"model\.language_model\.layers\.(\d+)\.casa_attn\.[qkvo]_proj\.")


@dataclass(frozen=True)
class Piece:
    """A stored tensor, or some of its rows.

    Attributes:
        name: name in the released checkpoint.
        rows: first row, and the one behind the last; None for all.
        order: axes of the numbers of a patch embedding, but for the first; None for the usual ones.
        remark: where it deserves one.
    """

    name: str
    rows: tuple[int, int] | None = None
    order: str | None = None
    remark: str = ""

    def __str__(self) -> str:
        return self.name if self.rows is None else f"{self.name}[{self.rows[0]}:{self.rows[1]}]"


@dataclass
class Assignment:
    """The outcome for every tensor.

    Attributes:
        found: name in the CASA checkpoint -> what is stored of it.
        dropped: stored name -> why it isn't needed.
        left: stored name -> why it isn't known what it is, or what it may be.
    """

    found: dict[str, Piece] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    @property
    def fused(self) -> tuple[int, ...]:
        """Blocks that have projections of a fusion layer."""
        return tuple(sorted({int(match[1]) for name in self.found if (match := _FUSION.match(name))}))

    def lines(self, stored: Mapping[str, Header] | Mapping[str, StoredTensor]) -> Iterator[Line]:
        """Lines of the table, by stored name."""
        becomes: dict[str, list[tuple[Piece, str]]] = {}
        for target, piece in self.found.items():
            becomes.setdefault(piece.name, []).append((piece, target))
        for name, tensor in stored.items():
            shape = "x".join(map(str, tensor.shape))
            if name in self.left:
                yield Line(name, UNKNOWN, tensor.dtype, shape, self.left[name])
            elif name in self.dropped:
                yield Line(name, DROP, tensor.dtype, shape, self.dropped[name])
            whole = [target for piece, target in becomes.get(name, ()) if piece.rows is None]
            for piece, target in becomes.get(name, ()):
                if piece.rows is None and len(whole) > 1:
                    continue
                order = f" {piece.order}" if piece.order else ""
                yield Line(str(piece), target + order, tensor.dtype, shape, piece.remark)
            if len(whole) > 1:
                every = re.sub(r"(?<=layers\.)\d+(?=\.)", ANY_BLOCK, whole[0])
                yield Line(name, every, tensor.dtype, shape, "in every block with a fusion layer")


def assign(
    stored: Mapping[str, Shape], possible: Mapping[str, Shape], *, tied: bool, mapping: MappingFile | None = None
) -> Assignment:
    """Find out what every tensor is.

    Args:
        stored: names and shapes of the released checkpoint.
        possible: names and shapes of all tensors that a CASA checkpoint of this backbone can have.
        tied: whether the head repeats the embeddings, so that it isn't needed.
        mapping: what a file says; its word counts more than the rules.
    """
    result = Assignment()
    pieces: list[tuple[str, Piece]] = []
    for name, shape in stored.items():
        meanings = None if mapping is None else mapping.meanings(name)
        if meanings is None:
            meanings, problem = _by_rules(name, shape, stored, possible, tied)
        else:
            problem = _row_problem(meanings, shape)
        if problem:
            result.left[name] = problem
            continue
        for meaning in meanings:
            if meaning.target is None:
                result.dropped[name] = _reason_to_drop(name, tied) or "as the mapping says"
            else:
                pieces.append((meaning.target, Piece(name, meaning.rows, meaning.order)))
    everywhere = [(target, piece) for target, piece in pieces if ANY_BLOCK in target]
    _place(result, [(target, piece) for target, piece in pieces if ANY_BLOCK not in target])
    for target, piece in everywhere:
        targets = [target.replace(ANY_BLOCK, str(index)) for index in result.fused]
        if not targets:
            result.left[piece.name] = f"{target}, but no block has projections of a fusion layer"
        _place(result, [(target, piece) for target in targets])
    _check_shapes(result, stored, possible)
    return result


def _reason_to_drop(name: str, tied: bool) -> str | None:
    """Why a tensor isn't needed, by its name; None if it is."""
    if tied and (name.endswith(TIED[0]) or (TIED[0],) in candidates(name)):
        return f"tied to {TIED[1]}"
    return next((reason for pattern, reason in DROPPED if re.search(pattern, name)), None)


def _by_rules(
    name: str, shape: Shape, stored: Mapping[str, Shape], possible: Mapping[str, Shape], tied: bool
) -> tuple[list[Meaning], str | None]:
    """What a tensor is by its name; a reason if that isn't known."""
    if _reason_to_drop(name, tied):
        return [Meaning(None)], None
    found = [targets for targets in candidates(name) if all(_can_be(target, possible) for target in targets)]
    if not found:
        return [], "no rule knows this name"
    if len(found) > 1:
        return [], f"ambiguous: {' or '.join(' and '.join(targets) for targets in found)}"
    if is_fusion_list(name) and (problem := _list_problem(stored, possible)):
        return [], problem
    [targets] = found
    if len(targets) == 1:
        order = _order_problem(targets[0], shape)
        return [Meaning(targets[0])], order
    rows = [possible[target][0] for target in targets]
    if not shape or sum(rows) != shape[0]:
        number = shape[0] if shape else 0
        return [], f"{number} rows, but {' and '.join(targets)} have {' + '.join(map(str, rows))}"
    meanings, start = [], 0
    for target, number in zip(targets, rows, strict=True):
        meanings.append(Meaning(target, (start, start + number)))
        start += number
    return meanings, None


def _can_be(target: str, possible: Mapping[str, Shape]) -> bool:
    return target in possible or (ANY_BLOCK in target and target.replace(ANY_BLOCK, "0") in possible)


def _list_problem(stored: Mapping[str, Shape], possible: Mapping[str, Shape]) -> str | None:
    """A list of fusion layers that isn't as long as that of blocks may count in its own way."""
    numbers = {targets[0].split(".")[3] for name in stored if is_fusion_list(name) for targets in candidates(name)}
    blocks = {name.split(".")[3] for name in possible if name.startswith("model.language_model.layers.")}
    if numbers == blocks:
        return None
    return f"a list of {len(numbers)} fusion layers in {len(blocks)} blocks: which block has which isn't known"


def _order_problem(target: str, shape: Shape) -> str | None:
    if target != PATCH_EMBEDDING or len(shape) != 2:
        return None
    return f"{target}, flattened: in which order isn't known; write one of {', '.join(ORDERS)} behind the name"


def _row_problem(meanings: list[Meaning], shape: Shape) -> str | None:
    """Whether what a mapping file makes of a tensor takes every row once."""
    ranges = sorted(meaning.rows for meaning in meanings if meaning.rows is not None)
    if not ranges:
        return None
    whole = any(meaning.rows is None for meaning in meanings)
    ends = [0, *(stop for _, stop in ranges)]
    if not shape or whole or [start for start, _ in ranges] != ends[:-1] or ends[-1] != shape[0]:
        return f"the mapping must take each of {shape[0] if shape else 0} rows once, and takes {ranges}"
    return None


def _place(result: Assignment, pieces: list[tuple[str, Piece]]) -> None:
    """Record what has been found; two tensors for one place are left."""
    taken: dict[str, list[Piece]] = {}
    for target, piece in pieces:
        taken.setdefault(target, [result.found[target]] if target in result.found else []).append(piece)
    for target, found in taken.items():
        if len(found) == 1:
            result.found[target] = found[0]
            continue
        for piece in found:
            others = ", ".join(str(other) for other in found if other is not piece)
            result.left[piece.name] = f"{target}, but so is {others}"
    result.found = {target: piece for target, piece in result.found.items() if piece.name not in result.left}


def _check_shapes(result: Assignment, stored: Mapping[str, Shape], possible: Mapping[str, Shape]) -> None:
    for target, piece in list(result.found.items()):
        shape, expected = stored[piece.name], possible[target]
        if piece.rows is not None:
            shape = (piece.rows[1] - piece.rows[0], *shape[1:])
        if piece.order is None:
            if shape == expected or (target.endswith(GATE.rpartition(".")[2]) and prod(shape) == 1):
                continue
        elif target != PATCH_EMBEDDING:
            result.left[piece.name] = f"{target} {piece.order}, but only a patch embedding has an order of axes"
            continue
        if target == PATCH_EMBEDDING and (remark := _patch_remark(shape, expected, piece.order)):
            result.found[target] = replace(piece, remark=remark)
            continue
        order = f" in the order {piece.order}" if piece.order else ""
        result.left[piece.name] = f"{target}, but {list(shape)}{order} instead of {list(expected)}"
    result.found = {target: piece for target, piece in result.found.items() if piece.name not in result.left}


def _patch_remark(shape: Shape, expected: Shape, order: str | None) -> str | None:
    """How a patch embedding of another shape is taken over; None if it can't be."""
    out, channels, frames, height, width = expected
    if order is None:
        frame = (out, channels, height, width)
        one_frame = shape in (frame, (*frame[:2], 1, *frame[2:]))
        return f"summed over {frames} frames: half of it for each" if one_frame else None
    sizes = {"c": channels, "t": frames, "h": height, "w": width}
    axes = tuple(sizes[axis] for axis in order)
    if shape not in ((out, *axes), (out, prod(axes))):
        return None
    return f"axes {order}" + ("" if "t" in order else f", summed over {frames} frames: half of it for each")
