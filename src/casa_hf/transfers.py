# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Copies between the host and a device: those to the device aren't waited for, those to the host are made at once."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch


def pinned(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the CPU in memory that a GPU copies from by itself, so that nobody has to wait for the copy."""
    if device.type != "cuda" or not torch.cuda.is_available() or tensor.device.type != "cpu" or tensor.is_pinned():
        return tensor
    return tensor.pin_memory()


def moved(value: Any, device: torch.device) -> Any:
    """A value whose tensors are on `device`: in tuples, dictionaries and records; whatever else is in it stays."""
    if isinstance(value, torch.Tensor):
        return pinned(value, device).to(device, non_blocking=device.type != "cpu")
    if isinstance(value, tuple):
        return tuple(moved(part, device) for part in value)
    if isinstance(value, dict):
        return {name: moved(part, device) for name, part in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: moved(getattr(value, f.name), device) for f in fields(value)})
    return value


def to_host(value: Any) -> Any:
    """The same on the CPU. Whatever is on a device, integers, booleans and floating point numbers, is copied together,
    so that the host waits once."""
    found: dict[int, torch.Tensor] = {}
    _find(value, found)
    apart = [tensor for tensor in found.values() if tensor.device.type != "cpu"]
    if not apart:
        return value
    home = apart[0].device
    bits = torch.cat([_as_integers(tensor).flatten().to(home) for tensor in apart]).cpu()
    parts = bits.split([tensor.numel() for tensor in apart])
    copies = {id(tensor): _from_integers(part, tensor) for tensor, part in zip(apart, parts, strict=True)}
    return _replaced(value, copies)


def _as_integers(tensor: torch.Tensor) -> torch.Tensor:
    """Integers that keep every number exactly, made without float64, which not every device has."""
    if tensor.dtype == torch.float64:
        return tensor.view(torch.long)
    return (tensor.float().view(torch.int32) if tensor.is_floating_point() else tensor).long()


def _from_integers(integers: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """What `_as_integers` has made integers of, as it was."""
    numbers = integers
    if like.dtype == torch.float64:
        numbers = integers.view(torch.float64)
    elif like.is_floating_point():
        numbers = integers.int().view(torch.float32)
    return numbers.to(like.dtype).view(like.shape)


def _find(value: Any, found: dict[int, torch.Tensor]) -> None:
    """Collect the tensors of a value, each once."""
    if isinstance(value, torch.Tensor):
        found[id(value)] = value
    elif isinstance(value, tuple | dict):
        for part in value.values() if isinstance(value, dict) else value:
            _find(part, found)
    elif is_dataclass(value):
        for field in fields(value):
            _find(getattr(value, field.name), found)


def _replaced(value: Any, copies: dict[int, torch.Tensor]) -> Any:
    """The value with other tensors, by the identity of its own."""
    if isinstance(value, torch.Tensor):
        return copies.get(id(value), value)
    if isinstance(value, tuple):
        return tuple(_replaced(part, copies) for part in value)
    if isinstance(value, dict):
        return {name: _replaced(part, copies) for name, part in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _replaced(getattr(value, f.name), copies) for f in fields(value)})
    return value
