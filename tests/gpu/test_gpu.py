# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""On a CUDA device: every backend in half precision against the dense float64 reference, and decoding by CUDA graphs.

The bodies that need no CUDA kernel also run on a CPU, for a few settings, so that they are known to work.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.torch_version import TorchVersion
from transformers import DynamicCache, StaticCache
from transformers.utils import is_flash_attn_2_available

from casa_hf import CasaForConditionalGeneration
from casa_hf.torch_varlen import TORCH_VARLEN
from tests.helpers_generation import Image, batch, new_model, words
from tests.test_attention_backends import Case, wide_config, wide_sample

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
gpu = [pytest.mark.gpu, cuda]

# Differences relative to the largest value, after two blocks; the reference's weights are rounded to the type first.
TOLERANCES = {torch.float64: 1e-6, torch.bfloat16: 5e-2, torch.float16: 8e-3}
GRADIENT_TOLERANCES = {torch.float64: 1e-5, torch.bfloat16: 1e-1, torch.float16: 2e-2}
BACKENDS = ("sdpa", TORCH_VARLEN, "flash_attention_2")
VARIANTS = ("casa", "ca", "casa-shared", "ca-shared", "exact")
HEADS = [(4, 2, 64), (4, 1, 64), (2, 1, 128), (4, 4, 128)]
DESIGNS: dict[str, dict[str, Any]] = {
    "window": {"casa_keys": "window"},
    "image": {"casa_keys": "image"},
    "window shared": {"casa_keys": "window", "casa_share_projections": True},
    "context full": {"casa_keys": "context", "casa_share_projections": True, "casa_image_updates": "full"},
}
SCRIPTS = ("3 2x3 2 1x2 3x1 1 f2x2 1", "b2x2 4 b1x3 1", "6", "1 2x1 b1x1 b2x2 1 2x2 2")
IMAGES = Image(2, 3, 1), Image(1, 2, 2), Image(3, 4, 3)


def skip_without(backend: str) -> None:
    if backend == "flash_attention_2" and not is_flash_attn_2_available():
        pytest.skip("the package flash-attn isn't installed")
    if backend == TORCH_VARLEN and TorchVersion(torch.__version__) < "2.11":
        pytest.skip("torch_varlen needs torch 2.11 or newer")


def rounded_case(heads: tuple[int, int, int], fields: dict[str, Any], dtype: torch.dtype, *scripts: str) -> Case:
    """A case whose weights and features have values of the type, so that the reference computes with the same."""
    config = wide_config(*heads, **fields)
    samples = [wide_sample(script, config, seed) for seed, script in enumerate(scripts)]

    class Rounded(Case):
        def _reference(self, rows: Any) -> Any:
            self.weights = {name: weight.to(dtype).double() for name, weight in self.weights.items()}
            self.features = [x.to(dtype).double() for x in self.features]
            return super()._reference(rows)

    return Rounded(config, [[one] for one in samples])


def check(case: Case, device: str, dtype: torch.dtype, backend: str) -> None:
    """Logits and all gradients of the model on a device against the reference's."""
    model = CasaForConditionalGeneration(case.config).eval()
    loaded = model.load_state_dict(case.weights, strict=False)
    assert not loaded.unexpected_keys
    model = model.to(device, dtype)
    model.set_attn_implementation(backend)
    features = [x.to(device, dtype).requires_grad_() for x in case.features]
    inputs = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in case.inputs.items()}
    output = model(**inputs, image_embeds=features).logits.double().cpu()
    logits = [output[row, span] for row, span in case.spans]
    for actual, expected in zip(logits, case.logits, strict=True):
        assert (actual - expected).abs().max() < TOLERANCES[dtype] * expected.abs().max()
    case._loss(logits).backward()
    named = {name: p for name, p in model.named_parameters() if not name.startswith("model.visual.")}
    named |= {f"image {i}": x for i, x in enumerate(features)}
    largest = max(float(gradient.abs().max()) for gradient in case.gradients.values())
    for name, tensor in named.items():
        expected = case.gradients[name]
        gradient = torch.zeros_like(expected) if tensor.grad is None else tensor.grad.double().cpu()
        # By norm: single elements of a gradient in half precision are far from exact.
        floor = 1e-2 * largest * expected.numel() ** 0.5
        error = float((gradient - expected).norm()) / max(float(expected.norm()), floor)
        assert error < GRADIENT_TOLERANCES[dtype], (name, error)


def on_both(on_cpu: list[tuple[Any, ...]], on_gpu: Iterable[tuple[Any, ...]]) -> list[Any]:
    """Parameters that begin with the device."""
    return [*(("cpu", *case) for case in on_cpu), *(pytest.param("cuda", *case, marks=gpu) for case in on_gpu)]


@pytest.mark.parametrize(
    "device, heads, dtype, backend, design",
    on_both(
        [
            ((4, 1, 64), torch.float64, "sdpa", "window"),
            ((2, 1, 128), torch.bfloat16, "sdpa", "context full"),
            ((4, 2, 64), torch.float16, "sdpa", "window shared"),
        ],
        itertools.product(HEADS, (torch.bfloat16, torch.float16), BACKENDS, DESIGNS),
    ),
    ids=str,
)
def test_forward_and_gradients(
    device: str, heads: tuple[int, int, int], dtype: torch.dtype, backend: str, design: str
) -> None:
    skip_without(backend)
    check(rounded_case(heads, DESIGNS[design], dtype, *SCRIPTS), device, dtype, backend)


@pytest.mark.gpu
@cuda
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_windows_of_4096_image_tokens(dtype: torch.dtype, backend: str) -> None:
    skip_without(backend)
    check(rounded_case((2, 1, 128), {}, dtype, "2 64x64 2 1x2 3", "3 2x2 1"), "cuda", dtype, backend)


# ------------------------------------------------------------------------------------ no waiting inside the layers


@contextmanager
def no_waiting_in(layers: Any) -> Iterator[list[int]]:
    """Inside of the layers' forward passes, waiting for the device is an error."""
    passed: list[int] = []

    def enter(*_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("error")

    def leave(*_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("default")
        passed.append(1)

    hooks = [layer.register_forward_pre_hook(enter) for layer in layers]
    hooks += [layer.register_forward_hook(leave, always_call=True) for layer in layers]
    try:
        yield passed
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize(
    "device, variant, static, backend",
    on_both([("casa", True, "sdpa")], itertools.product((*VARIANTS, "casa-ffn"), (False, True), BACKENDS)),
)
def test_layers_never_wait_for_the_device(device: str, variant: str, static: bool, backend: str) -> None:
    """In prefill, at a new image, and in decoding steps, of a single row without padding. A static cache has had its
    memory before: making it waits."""
    skip_without(backend)
    if static and backend == "flash_attention_2":
        pytest.skip("its self-attention finds the empty slots of a static cache by waiting, in every layer")
    model = half_model(variant, device)
    model.set_attn_implementation(backend)
    rows = ([*words(3, 1), IMAGES[0], 5, IMAGES[1], *words(2, 2)], [IMAGES[2], *words(3, 3)], [7])
    calls = [on(device, batch(row), model.dtype) for row in rows]
    cache: Any = StaticCache(model.config.get_text_config(), max_cache_len=32) if static else DynamicCache()
    with torch.no_grad():
        if static:
            model(**calls[0], cache=cache)
            cache.reset()
        with no_waiting_in(model.model.language_model.layers) as passed:
            for inputs in calls:
                del inputs["attention_mask"]
                model(**inputs, cache=cache)
    assert len(passed) == 3 * 3


def half_model(variant: str, device: str) -> Any:
    """A tiny model in bfloat16, on a CPU in float64."""
    model = new_model(variant, casa_static_image_tokens=64)
    return model.to(device, torch.float64 if device == "cpu" else torch.bfloat16)


def on(device: str, inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: x.to(device, dtype if x.is_floating_point() else x.dtype) for name, x in inputs.items()}


# ------------------------------------------------------------------------------------ CUDA graphs


@pytest.mark.parametrize("device, variant", on_both([("casa",)], [(variant,) for variant in VARIANTS]))
def test_static_decoding_equals_growing(device: str, variant: str) -> None:
    """On CUDA `generate` compiles its steps by itself, into CUDA graphs; in float64, so that tokens agree."""
    model = new_model(variant, casa_static_image_tokens=64).to(device)
    torch._dynamo.utils.counters.clear()
    for rows in (
        [[*words(3, 1), IMAGES[0], *words(3, 2)], [IMAGES[1], *words(2, 2)]],
        [[*words(5, 1), IMAGES[2], *words(3, 2)], [IMAGES[1], *words(2, 2), IMAGES[0], 3]],
    ):
        inputs = on(device, batch(*rows), torch.float64)
        settings = {"max_new_tokens": 12 if device == "cuda" else 4, "do_sample": False}
        expected = model.generate(**inputs, **settings)
        assert torch.equal(model.generate(**inputs, **settings, cache_implementation="static"), expected)
    if device == "cuda":
        counted = torch._dynamo.utils.counters
        assert counted["stats"]["unique_graphs"] and not counted["inductor"]["cudagraph_skips"]
