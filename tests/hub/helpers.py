# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""What the tests of publishing share: inputs, a few steps of training, logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature

from casa_hf import CasaForConditionalGeneration, CasaProcessor
from casa_hf.hub.card_parts import BEGIN, END

SAMPLES = (((200, 30, 30), "red"), ((30, 200, 30), "green"), ((30, 30, 200), "blue"), ((90, 90, 90), "grey"))


def sample(processor: Any, colour: tuple[int, int, int], answer: str) -> BatchFeature:
    """A question about an image with its answer, and labels for all of it."""
    question = [{"type": "image", "image": Image.new("RGB", (84, 56), colour)}, {"type": "text", "text": "Colour?"}]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    inputs["labels"] = inputs["input_ids"].clone()
    return inputs


def fine_tuned(checkpoint: Path, folder: Path, steps: int = 3) -> torch.Tensor:
    """Train the fusion layers for a few steps, save model and processor, and give the logits of a sample."""
    processor = CasaProcessor.from_pretrained(checkpoint)
    model = CasaForConditionalGeneration.from_pretrained(checkpoint).train()
    fusion = [parameter for name, parameter in model.named_parameters() if "casa_attn" in name]
    optimizer = torch.optim.AdamW(fusion, lr=1e-2)
    for step in range(steps):
        model(**sample(processor, *SAMPLES[step % len(SAMPLES)])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return logits(model, processor)


def with_words(readme: str, *, before: str = "", after: str = "", fields: str = "") -> str:
    """A card as somebody edits it: words before and after our part, lines of front matter."""
    assert readme.count(BEGIN) == readme.count(END) == 1
    edited = readme.replace(BEGIN, f"{before}\n\n{BEGIN}").replace(END, f"{END}\n\n{after}")
    return edited.replace("---\n", f"---\n{fields}", 1)


@torch.no_grad()
def logits(model: Any, processor: Any) -> torch.Tensor:
    return model.eval()(**sample(processor, *SAMPLES[0])).logits
