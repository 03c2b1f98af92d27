# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Copies between host and device keep every number, and need nothing that a device may lack."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from casa_hf.transfers import to_host
from tests.labelled_device import Labelled, LabelledDevices

FLOATS = [0.0, -0.0, 1 / 3, -1e-40, 3e38, float("inf"), float("-inf"), float("nan")]
NUMBERS = {
    "bool": torch.tensor([[True], [False]]),
    "uint8": torch.tensor([0, 255], dtype=torch.uint8),
    "int32": torch.tensor([-(2**31), 2**31 - 1], dtype=torch.int32),
    "int64": torch.tensor([[-(2**63), 2**53 + 1, 2**63 - 1]]),
    "none": torch.zeros(0, 3, dtype=torch.long),
    "scalar": torch.tensor(7.25),
    **{str(dtype): torch.tensor(FLOATS, dtype=dtype) for dtype in (torch.float16, torch.bfloat16, torch.float32)},
}


class WithoutFloat64(LabelledDevices):
    """Devices like Apple's: float64 is only known to the CPU."""

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        made = super().run(func, args, kwargs)
        if isinstance(made, Labelled) and made.dtype == torch.float64:
            raise TypeError("This device has no float64.")
        return made


def check_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found.signbit() & ~found.isnan(), expected.signbit() & ~expected.isnan())


def test_numbers_come_back_as_they_were_in_one_copy() -> None:
    with WithoutFloat64() as devices:
        with pytest.raises(TypeError, match="no float64"):
            torch.ones(2, device="cuda").double()
        there = {name: tensor.to("cuda") for name, tensor in NUMBERS.items()}
        devices.forget()
        here = to_host(there)
        assert devices.waits == 1
    for name, tensor in NUMBERS.items():
        check_same(here[name], tensor)


def test_float64_stays_exact() -> None:
    """Where a device has it."""
    tensor = torch.tensor([1 / 3, 5e-324, 1e308, float("nan")], dtype=torch.float64)
    with LabelledDevices():
        here = to_host((tensor.to("cuda"), torch.ones(1)))
    check_same(here[0], tensor)
