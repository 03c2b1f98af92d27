# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Queries, keys and values of a block's text: each projection by itself, or all of them by one product.

A decoding step is bound by the number of kernels that it launches. `FusedProjections` makes the parameters of all
query, key and value projections of a block views of one buffer, so that one product computes them, and one rotation
what has positions. The parameters stay the same objects with the same names: whatever reads them, or writes into them,
goes on as before. What puts something else in their place (adapters such as LoRA, quantization, offloading,
`load_state_dict(assign=True)`) is noticed, and the projections are called one by one again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from .backbone import AttentionModule, Projections
from .own_copies import is_split
from .positions import Rotary

_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class Wanted(NamedTuple):
    """What is to be projected.

    Attributes:
        owner: module with the projections.
        keys: whether keys and values are wanted too; without keys, queries have no positions.
    """

    owner: AttentionModule
    keys: bool


class Projected(NamedTuple):
    """Text as an attention takes it, each (batch, heads or kv_heads, tokens, head_dim).

    Attributes:
        query: queries without positions.
        rotated: queries with positions; without keys, the same as `query`.
        key, value: keys with positions, and values; of no tokens where none are wanted.
        gate: argument of `Projections.output`.
    """

    query: torch.Tensor
    rotated: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    gate: torch.Tensor | None


def project(
    projections: Projections, wanted: Sequence[Wanted], states: torch.Tensor, rotary: Rotary
) -> list[Projected]:
    """What several modules make of (batch, tokens, hidden) normalised states, by a product for each projection.

    Args:
        projections: the family's projections.
        wanted: modules, and what is wanted of each.
        states: normalised states.
        rotary: cos and sin of the text, each (batch, tokens, head_dim).
    """
    made = []
    for owner, with_keys in wanted:
        query, gate = projections.query(owner, states)
        key, value = projections.keys(owner, states) if with_keys else (query[:, :, :0], query[:, :, :0])
        made.append(Projected(query, query, key, value, gate))
    if projections.rotates:
        _turn(made, wanted, lambda heads: projections.rotate_one(heads.transpose(1, 2), rotary).transpose(1, 2))
    return made


def _turn(made: list[Projected], wanted: Sequence[Wanted], rotate: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Give queries and keys their positions, those of all modules in one call of `rotate`.

    Args:
        made: what the modules have projected, without positions; changed in place.
        wanted: which of them have keys.
        rotate: function of (batch, tokens, all heads, head_dim).
    """
    turning = [index for index, (_, with_keys) in enumerate(wanted) if with_keys]
    if not turning:
        return
    parts = [part for index in turning for part in (made[index].query, made[index].key)]
    # Joined head by head, so that the query heads of a key head come out one behind the other.
    joined = torch.cat(parts, dim=1).transpose(1, 2)
    turned = iter(rotate(joined).transpose(1, 2).split([part.shape[1] for part in parts], dim=1))
    for index in turning:
        made[index] = made[index]._replace(rotated=next(turned), key=next(turned))


class FusedProjections:
    """The query, key and value projections of some modules, as one product.

    Args:
        projections: the family's projections.
        owners: modules with the projections, which `can_be_fused`.

    Attributes:
        owners: the modules.
        weight: (rows, hidden) buffer: for each module the rows of queries, keys and values.
        bias: (rows,) likewise; None in families without.
    """

    def __init__(self, projections: Projections, owners: Sequence[AttentionModule]):
        self.owners = tuple(owners)
        self._places = {id(owner): place for place, owner in enumerate(self.owners)}
        self._projections = projections
        linears = _linears(owners)
        self._rows = [linear.out_features for linear in linears]
        self.weight = _joined([linear.weight for linear in linears])
        self.bias = None if linears[0].bias is None else _joined([linear.bias for linear in linears])
        # What `is_intact` compares, looked up beforehand: it is asked about every block in every step.
        self._modules = [
            (vars(owner)["_modules"], name, getattr(owner, name)) for owner in owners for name in _PROJECTIONS
        ]
        self._parameters = [
            (held._parameters, name, parameter, parameter.data_ptr())
            for held in linears
            for name, parameter in held.named_parameters()
        ]
        self._unhooked = [hooks for linear in linears for hooks in _hooks(linear)]
        self._attributes = [vars(linear) for linear in linears]

    def is_intact(self) -> bool:
        """Whether the modules still project with the rows of the buffer, and do nothing else."""
        return (
            all(modules.get(name) is linear for modules, name, linear in self._modules)
            and all(
                held.get(name) is parameter and parameter.data_ptr() == address
                for held, name, parameter, address in self._parameters
            )
            and not any(self._unhooked)
            and not any("forward" in attributes for attributes in self._attributes)
        )

    def release(self) -> None:
        """Give every parameter that is still a view of the buffer memory of its own again."""
        with torch.inference_mode(False):
            for _, _, parameter, address in self._parameters:
                if parameter.data_ptr() == address:
                    parameter.data = parameter.data.clone()

    def serves(self, wanted: Sequence[Wanted]) -> bool:
        """Whether the rows of these modules stand one behind the other."""
        places = [self._places.get(id(owner), -1) for owner, _ in wanted]
        return places[0] >= 0 and places == list(range(places[0], places[0] + len(places)))

    def project(self, wanted: Sequence[Wanted], states: torch.Tensor, tables: Rotary) -> list[Projected]:
        """As the function `project`, by one product.

        Args:
            wanted: modules, as `serves` takes them; only the last may be wanted without keys.
            states: (batch, tokens, hidden) normalised states.
            tables: what `Projections.tables` makes of cos and sin.
        """
        first, projections = 3 * self._places[id(wanted[0].owner)], self._projections
        rows = self._rows[first : first + 3 * len(wanted) - (0 if wanted[-1].keys else 2)]
        start = sum(self._rows[:first])
        taken = slice(start, start + sum(rows))
        product = nn.functional.linear(states, self.weight[taken], None if self.bias is None else self.bias[taken])
        if projections.are_heads:
            return self._heads(product, rows, wanted, tables)
        made, columns = [], product.split(rows, dim=-1)
        for place, (owner, with_keys) in zip(range(0, len(columns), 3), wanted, strict=True):
            query, gate = projections.split_query(owner, columns[place])
            key = value = query[:, :, :0]
            if with_keys:
                key, value = projections.split_keys(owner, columns[place + 1], columns[place + 2])
            made.append(Projected(query, query, key, value, gate))
        if projections.rotates:
            _turn(made, wanted, lambda heads: projections.rotate_together(heads, tables))
        return made

    def _heads(
        self, product: torch.Tensor, rows: Sequence[int], wanted: Sequence[Wanted], tables: Rotary
    ) -> list[Projected]:
        """The same of a product that consists of heads as they stand: what is rotated is a part of it, in which the
        values between are rotated too and not looked at."""
        width = self._projections.head_dim
        heads = product.view(*product.shape[:2], -1, width)  # (batch, tokens, all heads, head_dim)
        sizes = [count // width for count in rows]
        parts = turned = heads.transpose(1, 2).split_with_sizes(sizes, dim=1)
        num_keyed = sum(with_keys for _, with_keys in wanted)
        if num_keyed and self._projections.rotates:
            sizes = sizes[: 3 * num_keyed - 1]
            heads = self._projections.rotate_together(heads[:, :, : sum(sizes)], tables)
            turned = heads.transpose(1, 2).split_with_sizes(sizes, dim=1)
        made = []
        for place, (_, with_keys) in zip(range(0, len(parts), 3), wanted, strict=True):
            query = parts[place]
            if with_keys:
                made.append(Projected(query, turned[place], turned[place + 1], parts[place + 2], None))
            else:
                made.append(Projected(query, query, query[:, :, :0], query[:, :, :0], None))
        return made


def can_be_fused(owners: Sequence[AttentionModule]) -> bool:
    """Whether the projections of these modules are plain linear layers with all their parameters at hand: neither
    adapters nor quantized, split between processes, shared with others or offloaded, and without hooks."""
    linears = _linears(owners)
    if not all(type(linear) is nn.Linear and not any(_hooks(linear)) for linear in linears):
        return False
    if any("forward" in vars(linear) for linear in linears) or len({linear.bias is None for linear in linears}) > 1:
        return False
    parameters = [parameter for linear in linears for parameter in linear.parameters()]
    return (
        all(type(parameter) is nn.Parameter and not is_split(parameter) for parameter in parameters)
        and len(set(map(id, parameters))) == len(parameters)
        and len({(p.device, p.dtype) for p in parameters}) == 1
        and not parameters[0].is_meta
        and not any(parameter.device.type == "cpu" and parameter.is_shared() for parameter in parameters)
    )


def _linears(owners: Sequence[AttentionModule]) -> list[Any]:
    return [getattr(owner, name) for owner in owners for name in _PROJECTIONS]


def _hooks(linear: nn.Linear) -> tuple[Any, ...]:
    return linear._forward_hooks, linear._forward_pre_hooks


def _joined(parameters: Sequence[nn.Parameter]) -> torch.Tensor:
    """A buffer with the rows of all parameters, which become views of it."""
    with torch.inference_mode(False), torch.no_grad():
        buffer = torch.cat([parameter.detach() for parameter in parameters])
        for parameter, part in zip(parameters, buffer.split([len(p) for p in parameters]), strict=True):
            parameter.data = part
    torch._dynamo.mark_static_address(buffer)
    return buffer
