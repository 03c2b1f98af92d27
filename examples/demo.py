# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The whole way from a trained Qwen2.5-VL checkpoint to answers about pictures, in seconds and without a network.

The checkpoint is a small one that ships with the repository (examples/tiny_world): it knows coloured shapes, arrows
and characters, and nothing else. A large checkpoint takes the same steps.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from transformers.utils.logging import disable_progress_bar

from casa_hf import CasaForConditionalGeneration, CasaProcessor, cache_nbytes, convert_checkpoint
from casa_hf.training import Dialogue, generate_answers, load_conversations
from examples.tiny_world.asking import Source

TINY_WORLD = Path(__file__).parent / "tiny_world"
SOURCE = TINY_WORLD / "checkpoints" / "source"
ADAPTED = TINY_WORLD / "checkpoints" / "casa"
PHOTOGRAPH = Path(__file__).parent / "assets" / "cat.jpg"


def main() -> None:
    """Convert, ask, compare; then a photograph."""
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        print("1. Convert a small Qwen2.5-VL checkpoint to CASA")
        report = convert_checkpoint(SOURCE, Path(folder, "casa"))
        print(f"   variant {report.config.variant}: {report.source_parameters:,} parameters of the source are kept,")
        print(f"   {report.added_parameters:,} are added in {len(report.config.fusion_layers)} fusion layers")
        exact = convert_checkpoint(SOURCE, Path(folder, "exact"), "exact").output

        print("2. Ask about pictures that none of the models was trained on (* = wrong)")
        questions = load_conversations(TINY_WORLD / "held_out")
        said = {
            "source": Source(SOURCE).answers(questions),
            "exact": _answers(exact, questions),
            "converted": _answers(report.output, questions),
            "trained": _answers(ADAPTED, questions),
        }
        right = [Dialogue.of(question).question()[1] for question in questions]
        print(f"   {''.join(f'{name:<26}' for name in said)}".rstrip())
        for index, question in enumerate(questions):
            print(f"   {_text(question)} {right[index]}.")
            answers = [given[index] + (" *" if given[index] != right[index] else "") for given in said.values()]
            print(f"   {''.join(f'{answer:<26}' for answer in answers)}".rstrip())
        for name, given in said.items():
            count = sum(answer == expected for answer, expected in zip(given, right, strict=True))
            print(f"   {name}: {count} of {len(right)} right")
        print("   `exact` needs no training to equal the source on single pictures, not on several;")
        print("   `converted` is `casa` as converted, `trained` the same with its fusion layers trained.")
        print("   docs/results.md has the scores on thousands of questions.")

    print("3. A photograph takes the same steps")
    model = CasaForConditionalGeneration.from_pretrained(ADAPTED).eval()
    processor = CasaProcessor.from_pretrained(ADAPTED)
    image = Image.open(PHOTOGRAPH)
    question = [{"type": "image", "image": image}, {"type": "text", "text": "What shape is red?"}]
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
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    answer = processor.batch_decode(output.sequences[:, prompt_length:], skip_special_tokens=True)[0]
    held = cache_nbytes(output.cache)
    print(f"   {answer!r}, which means nothing: it has never seen a photograph.")
    print(f"   The cache holds {output.cache.get_seq_length()} text tokens ({held['text']:,} bytes)")
    print(f"   and the keys and values of the current image ({held['image']:,} bytes).")


def _answers(folder: str | Path, questions: Sequence) -> list[str]:
    model = CasaForConditionalGeneration.from_pretrained(folder)
    return generate_answers(model, CasaProcessor.from_pretrained(folder), questions, max_new_tokens=8, do_sample=False)


def _text(example: dict) -> str:
    """The last question, without its pictures."""
    dialogue, _ = Dialogue.of(example).question()
    return next(part["text"] for part in reversed(dialogue.messages[-1]["content"]) if part["type"] == "text")


if __name__ == "__main__":
    main()
