# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The whole way from a Qwen2.5-VL checkpoint to an answer about a photograph, in seconds and without a network.

The checkpoint is small and its weights are random, so the answer is noise: what this shows is that every step works.
Put the folder or Hub id of a trained checkpoint in place of `source` for an answer that means something.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from PIL import Image
from transformers.utils.logging import disable_progress_bar

from casa_hf import CasaForConditionalGeneration, CasaProcessor, cache_nbytes, convert_checkpoint
from examples.tiny_source import build_tiny_source

PHOTOGRAPH = Path(__file__).parent / "assets" / "cat.jpg"
QUESTION = "What is in this picture?"


def main() -> None:
    """Build, convert, load, ask."""
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        print("1. Build a small Qwen2.5-VL checkpoint with random weights")
        source = build_tiny_source(Path(folder, "source"))
        print(f"   {', '.join(sorted(file.name for file in source.iterdir()))}")

        print("2. Convert it to CASA")
        report = convert_checkpoint(source, Path(folder, "casa"))
        print(f"   variant {report.config.variant}: {report.source_parameters:,} parameters of the source are kept,")
        print(f"   {report.added_parameters:,} are added in {len(report.config.fusion_layers)} fusion layers")

        print("3. Load model and processor")
        model = CasaForConditionalGeneration.from_pretrained(report.output).eval()
        processor = CasaProcessor.from_pretrained(report.output)

        print(f"4. Ask about a photograph: {QUESTION}")
        image = Image.open(PHOTOGRAPH)
        question = [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        prompt_length = inputs["input_ids"].shape[1]
        merge = model.config.vision_config.spatial_merge_size
        image_tokens = int(inputs["image_grid_thw"].prod()) // merge**2
        print(f"   {PHOTOGRAPH.name}, {image.width} x {image.height} pixels: {image_tokens} image tokens beside a")
        print(f"   sequence of {prompt_length} text tokens, none of them a placeholder")

        print("5. Generate")
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=24, do_sample=False, return_dict_in_generate=True)
        answer = processor.batch_decode(output.sequences[:, prompt_length:], skip_special_tokens=True)[0]
        held = cache_nbytes(output.past_key_values)
        print(f"   {answer!r}")
        print(f"   The cache holds {output.past_key_values.get_seq_length()} text tokens ({held['text']:,} bytes)")
        print(f"   and the keys and values of the current image ({held['image']:,} bytes).")
    print("The weights are random, so the answer is noise. A trained checkpoint takes the same steps.")


if __name__ == "__main__":
    main()
