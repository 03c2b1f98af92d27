# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The benchmarks and the tests of a CUDA device, run on one that isn't there: what is measured means nothing, but
nothing in them is new to the machine that they are meant for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import captions, forever, gpu_check, layer, prefill, streaming, streams
from casa_hf.torch_varlen import TORCH_VARLEN
from tests import test_benchmarks
from tests.gpu import test_gpu, test_streams
from tests.kernels import reference_kernels, register_torch_kernel
from tests.labelled_device import LabelledDevices

pytestmark = pytest.mark.integration


@pytest.fixture
def gpu(devices: LabelledDevices, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`torch.cuda` knows the devices; kernels are there, and nothing is compiled."""
    if not register_torch_kernel():
        pytest.skip("this torch has no kernel for sequences of different lengths")
    monkeypatch.setattr(torch, "compile", lambda function, **kwargs: function)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: None)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    with devices.as_gpu(), reference_kernels(devices.uncounted):
        yield


# As in `make bench-gpu`.
KERNEL = ["--attn", TORCH_VARLEN]
BENCHMARKS: dict[str, tuple[Any, list[str]]] = {
    "streaming": (streaming, [*KERNEL, "--source-attn", TORCH_VARLEN]),
    "streaming, compiled": (streaming, [*KERNEL, "--compile", "--variants", "casa"]),
    "prefill": (prefill, []),
    "layer": (layer, ["--backends", f"sdpa,{TORCH_VARLEN}"]),
    "streams": (streams, [*KERNEL, "--source-attn", TORCH_VARLEN]),
    "forever": (forever, []),
    "captions": (captions, []),
}
QUICK = ("streaming, compiled",)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in BENCHMARKS])
def test_benchmarks_run(
    name: str,
    gpu: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    tmp_path: Path,
) -> None:
    program, arguments = BENCHMARKS[name]
    monkeypatch.setitem(test_benchmarks.PROGRAMS, program, [*test_benchmarks.PROGRAMS[program], *arguments])
    test_benchmarks.test_program(program, "cuda", monkeypatch, capsys, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["eager", "streams", "prefill"])
def test_steps_of_the_gpu_check(name: str, gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "_counted", lambda function: {"kernels": 0})  # there is no such device to profile
    found = gpu_check.Findings()
    check = gpu_check.Check(torch.device("cuda"), True, "sdpa", {}, lambda: None)
    check.free()
    gpu_check.STEPS[name].run(check, found)
    assert check.dtype == torch.bfloat16 and found.figures
    assert "casa torch_varlen" in found.figures or name != "prefill"


@pytest.mark.parametrize("backend", ["sdpa", TORCH_VARLEN])
@pytest.mark.parametrize("design", ["window", pytest.param("context full", marks=pytest.mark.slow)])
def test_gpu_forward_and_gradients(backend: str, design: str, gpu: None) -> None:
    test_gpu.test_forward_and_gradients("cuda", (4, 1, 64), torch.bfloat16, backend, design)


@pytest.mark.parametrize("backend", ["sdpa", TORCH_VARLEN])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(
    "variant",
    [
        "casa",
        "exact",
        *(pytest.param(v, marks=pytest.mark.slow) for v in ("ca", "casa-shared", "ca-shared", "casa-ffn")),
    ],
)
def test_gpu_layers_never_wait(variant: str, static: bool, backend: str, gpu: None) -> None:
    test_gpu.test_layers_never_wait_for_the_device("cuda", variant, static, backend)


def test_gpu_logits_processors_never_wait(gpu: None) -> None:
    test_streams.test_logits_processors_do_not_wait_for_the_device("cuda")


@pytest.mark.parametrize("sampled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_gpu_streams(sampled: bool, gpu: None, source_folder: Path, tmp_path: Path) -> None:
    test_streams.test_a_stream_and_its_saved_state("cuda", sampled, source_folder, tmp_path)
