# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""What the tests of training share: small models whose fusion layers are no copies, conversations, comparisons."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from casa_hf import CasaForConditionalGeneration, CasaProcessor
from casa_hf.samples import PHOTOGRAPHS
from examples.tiny_source import _randomize


def load_model(folder: Path, dtype: torch.dtype = torch.float64, seed: int = 1, **kwargs: Any) -> Any:
    """The model of a converted checkpoint with other weights, so that no two of its modules agree."""
    model = CasaForConditionalGeneration.from_pretrained(folder, dtype=dtype, **kwargs)
    _randomize(model, seed)
    return model


def load_processor(folder: Path, **kwargs: Any) -> CasaProcessor:
    """The processor, with small images."""
    return CasaProcessor.from_pretrained(folder, min_pixels=28**2, max_pixels=84**2, frame_max_pixels=56**2, **kwargs)


def ask(question: str, answer: str, *images: str) -> dict[str, Any]:
    """A conversation of one question about photographs, in the common form of messages and images."""
    content = [{"type": "image"} for _ in images] + [{"type": "text", "text": question}]
    return {
        "messages": [
            {"role": "user", "content": content},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ],
        "images": [str(PHOTOGRAPHS / f"{name}.jpg") for name in images],
    }


CONVERSATIONS = [
    ask("What is in this picture?", "A small cat with amber eyes.", "cat"),
    ask("Say something about the colours.", "The grass is green."),
    ask("Compare this photograph with the previous one.", "A cup of coffee, and a rocket.", "coffee", "rocket"),
    {
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "And this?"}]},
            {"role": "assistant", "content": "A rocket before its launch."},
            {"role": "user", "content": [{"type": "text", "text": "And here:"}, {"type": "image"}]},
            {"role": "assistant", "content": "A glass of water."},
        ],
        "images": [str(PHOTOGRAPHS / "rocket.jpg"), str(PHOTOGRAPHS / "coffee.jpg")],
    },
]


def loss_and_gradients(model: Any, batch: dict[str, torch.Tensor]) -> tuple[float, dict[str, Any]]:
    """The loss of a batch and the gradient of every trainable parameter, None where there is none.

    The loss is computed here, since the model's own rounds to float32; both must agree.
    """
    model.zero_grad(set_to_none=True)
    output = model(**batch)
    loss = cross_entropy(output.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    torch.testing.assert_close(output.loss, loss.to(output.loss.dtype), rtol=1e-6, atol=0)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return loss.item(), {name: None if grad is None else grad.clone() for name, grad in gradients.items()}


def assert_close(actual: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-5) -> None:
    """The same tensors up to rounding, relative to the largest value of each; and none of them is all zero.

    Only the bias of keys that aren't rotated has no gradient: it moves all scores of a query alike.
    """
    assert actual.keys() == expected.keys() and expected
    for name, reference in expected.items():
        scale = reference.abs().max()
        if name.endswith("casa_attn.k_proj.bias"):
            scale = max(scale, 1e-6 * expected[name.replace("bias", "weight")].abs().max())
        assert scale > 0, name
        assert (actual[name] - reference).abs().max() <= tolerance * scale, name
