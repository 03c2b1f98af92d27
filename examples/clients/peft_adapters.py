# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""LoRA in fusion layers with PEFT, merged at the end: python -m examples.clients.peft_adapters my-casa-model output"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from casa_hf import CasaForConditionalGeneration, CasaProcessor
from casa_hf.samples import PHOTOGRAPHS
from casa_hf.training import LORA_TARGETS, CasaDataCollator

ANSWERS = {"cat": "A cat.", "coffee": "A cup of coffee.", "rocket": "A rocket."}


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """Train adapters, save them in output/adapter and the merged model in output/merged; returns the losses."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder or Hub id of a CASA checkpoint")
    parser.add_argument("output", help="folder for the adapters and the merged model")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args(arguments)
    processor = CasaProcessor.from_pretrained(options.model, max_pixels=84 * 84)
    model = get_peft_model(
        CasaForConditionalGeneration.from_pretrained(options.model, dtype=torch.float32),
        LoraConfig(r=8, target_modules=LORA_TARGETS["fusion"]),
    )
    conversations = [
        {
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": answer}]},
            ],
            "images": [str(PHOTOGRAPHS / f"{name}.jpg")],
        }
        for name, answer in ANSWERS.items()
    ]
    batch = CasaDataCollator(processor)(conversations)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
    losses = []
    for _ in range(options.steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.save_pretrained(f"{options.output}/adapter")

    source = CasaForConditionalGeneration.from_pretrained(options.model, dtype=torch.float32)
    merged = PeftModel.from_pretrained(source, f"{options.output}/adapter").merge_and_unload()
    merged.save_pretrained(f"{options.output}/merged")
    processor.save_pretrained(f"{options.output}/merged")
    print(f"The loss fell from {losses[0]:.3f} to {losses[-1]:.3f}.")
    return losses


if __name__ == "__main__":
    main()
