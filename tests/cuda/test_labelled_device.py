# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The labelled devices themselves: they refuse and count what a GPU would, and change no number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.labelled_device import LabelledDevices, values


def there() -> Any:
    return torch.tensor([1, 2, 3], device="cuda")


MIXED: dict[str, Callable[[], Any]] = {
    "two devices": lambda: there() + there().to("cuda:1"),
    "with the CPU": lambda: torch.ones(3) * there(),
    "joined": lambda: torch.cat([there(), torch.ones(3, dtype=torch.long)]),
    "indices of a tensor on the CPU": lambda: torch.ones(3)[there()],
    "written": lambda: torch.zeros(3, dtype=torch.long).index_copy_(0, torch.arange(3), there()),
    "a third device": lambda: torch.zeros(1, device="cuda:2"),
}


@pytest.mark.parametrize("what", MIXED)
def test_devices_do_not_mix(what: str, devices: LabelledDevices) -> None:
    with pytest.raises(RuntimeError, match="device"):
        MIXED[what]()


def test_what_may_come_from_the_cpu(devices: LabelledDevices) -> None:
    """Numbers, indices, copies; and everything made on the device says so."""
    x = there()
    results = [x + torch.tensor(2), x[torch.tensor([0, 2])], torch.where(x > 1, x, 0), x.new_zeros(2)]
    results += [
        torch.zeros_like(x),
        torch.full((2,), 1, device="cuda"),
        x.clone().copy_(torch.ones(3)),
        x.expand(2, 3),
    ]
    results += [torch.as_tensor(3, device="cuda"), nn.Linear(2, 2).to("cuda").weight, x.cpu().cuda()]
    assert all(result.is_cuda and result.device == torch.device("cuda:0") for result in results)
    assert not x.cpu().is_cuda and not torch.zeros_like(x, device="cpu").is_cuda
    with pytest.raises(TypeError):
        x.numpy()


READS: dict[str, Callable[[Any], Any]] = {
    "item": lambda x: x[0].item(),
    "truth": lambda x: bool((x > 0).all()),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu"),
    "copy": lambda x: torch.zeros(3, dtype=torch.long).copy_(x),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 1],
    "repeat": lambda x: torch.repeat_interleave(x),
    "unique": lambda x: torch.unique_consecutive(x),
    "equal": lambda x: torch.equal(x, x),
}
COPIES: dict[str, Callable[[Any], Any]] = {
    "tensor": lambda x: torch.tensor([1], device="cuda"),
    "to": lambda x: torch.ones(3).to("cuda"),
    "copy": lambda x: x.copy_(torch.ones(3)),
    "index": lambda x: x[torch.tensor([1])],
}
FREE: dict[str, Callable[[Any], Any]] = {
    "shapes": lambda x: (x.shape, len(x), x.dtype, x.nbytes),
    "sums": lambda x: x.cumsum(0).max() + x.argsort(),
    "masked": lambda x: x.masked_fill(x > 1, 0),
    "filled": lambda x: x.index_put((x > 1,), torch.tensor(0)),
    "known size": lambda x: torch.repeat_interleave(x, output_size=6),
    "not waiting": lambda x: torch.ones(3).to("cuda", non_blocking=True),
    "made there": lambda x: torch.arange(3, device=x.device),
}


@pytest.mark.parametrize("what", READS)
def test_reads_are_counted(what: str, devices: LabelledDevices) -> None:
    x = there()
    devices.forget()
    READS[what](x)
    assert (devices.reads.total(), devices.copies.total()) == (1, 0), devices.reads
    with pytest.raises(RuntimeError, match="waits"), devices.as_gpu():
        torch.cuda.set_sync_debug_mode("error")
        READS[what](x)


@pytest.mark.parametrize("what", COPIES)
def test_copies_are_counted(what: str, devices: LabelledDevices) -> None:
    x = there()
    devices.forget()
    COPIES[what](x)
    assert (devices.reads.total(), devices.copies.total()) == (0, 1), devices.copies


@pytest.mark.parametrize("what", FREE)
def test_the_rest_waits_for_nothing(what: str, devices: LabelledDevices) -> None:
    x = there()
    devices.forget()
    FREE[what](x)
    assert not devices.waits, (devices.reads, devices.copies)


def test_gradients_cross_devices(devices: LabelledDevices) -> None:
    layer, x = nn.Linear(3, 2), torch.randn(4, 3)
    layer(x).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in layer.named_parameters()}
    layer.zero_grad()
    same = list(layer.parameters())
    layer.to("cuda")
    assert [id(p) for p in layer.parameters()] == [id(p) for p in same]
    layer(x.to("cuda")).to("cuda:1").cpu().square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.is_cuda
        assert torch.equal(values(parameter.grad), expected[name])
