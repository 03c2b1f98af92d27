# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Counting what operators write, so that costs can be tested without a clock."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Ledger(TorchDispatchMode):
    """While active, writes down every tensor that an operator makes or writes into another; views cost nothing.

    Attributes:
        written: bytes in all.
        largest: elements of the largest.
        largest_operator: which operator wrote that.
    """

    def __init__(self) -> None:
        super().__init__()
        self.written, self.largest, self.largest_operator = 0, 0, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = _tensors((args, kwargs))
        outputs = func(*args, **(kwargs or {}))
        known = {tensor.untyped_storage().data_ptr() for tensor in inputs}
        made = [tensor for tensor in _tensors(outputs) if tensor.untyped_storage().data_ptr() not in known]
        if func._schema.is_mutable:  # what is written in place has the size of its source
            made += inputs[1:] or inputs
        for tensor in made:
            self.written += tensor.nbytes
            if tensor.numel() > self.largest:
                self.largest, self.largest_operator = tensor.numel(), str(func)
        return outputs


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class Launches(TorchDispatchMode):
    """While active, counts operators that would launch a kernel on a GPU: all but views, allocations, and what has
    no elements.

    Attributes:
        number: how many there were.
        operators: how often each.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()

    @property
    def number(self) -> int:
        return self.operators.total()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        known = {tensor.untyped_storage().data_ptr() for tensor in _tensors((args, kwargs))}
        made = _tensors(outputs)
        is_view = not func._schema.is_mutable and all(t.untyped_storage().data_ptr() in known for t in made)
        if not is_view and any(tensor.numel() for tensor in made) and "empty" not in str(func):
            self.operators[str(func)] += 1
        return outputs
