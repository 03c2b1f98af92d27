# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The whole way from a trained Qwen2.5-VL checkpoint to answers about images, in seconds and without a network.

The checkpoint is a small one that ships with the repository (examples/tiny_world): it knows coloured shapes, arrows
and characters, and nothing else. A large checkpoint takes the same steps.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from transformers.utils.logging import disable_progress_bar

from casa_hf import CasaForConditionalGeneration, CasaProcessor, cache_nbytes, convert_checkpoint
from casa_hf.samples import CAT, COFFEE, ROCKET
from casa_hf.training import Dialogue, generate_answers, load_conversations
from casa_hf.transformers_versions import CACHE
from examples.tiny_world.asking import Source

TINY_WORLD = Path(__file__).parent / "tiny_world"
SOURCE = TINY_WORLD / "checkpoints" / "source"
ADAPTED = TINY_WORLD / "checkpoints" / "casa"


def main() -> None:
    """Convert, ask, compare; then what stays in the cache."""
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        print("1. Convert a small Qwen2.5-VL checkpoint to CASA")
        report = convert_checkpoint(SOURCE, Path(folder, "casa"))
        print(f"   variant {report.config.variant}: {report.source_parameters:,} parameters of the source are kept,")
        print(f"   {report.added_parameters:,} are added in {len(report.config.fusion_layers)} fusion layers")
        print("   (Transformers' own processor of such a source needs torchvision; CasaProcessor does without.)")
        exact = convert_checkpoint(SOURCE, Path(folder, "exact"), "exact").output

        print("2. Ask about images that none of the models was trained on (* = wrong)")
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
        print("   `exact` needs no training to equal the source on single images, not on several;")
        print("   `converted` is `casa` as converted, `trained` the same with its fusion layers trained.")
        print("   docs/results.md has the scores on thousands of questions.")

    print("3. What stays in the cache: a chat about photographs, one after the other")
    print("   images   text tokens   CASA's cache               the source's cache")
    for row in _caches((1, 4, 16)):
        print(f"   {row.images:8}   {row.tokens:11}   {row.casa:12,} bytes   {row.source:15,} bytes")
    print("   CASA's grows with the text alone: of the images it holds the current one.")
    print("   What these models say of photographs means nothing: they have never seen one.")


class _Caches(NamedTuple):
    """What a chat about some images leaves in the caches: CASA's and the source's."""

    images: int
    tokens: int
    casa: int
    source: int


def _caches(counts: Sequence[int]) -> Iterator[_Caches]:
    """Chats with one photograph in each turn, the same for both models."""
    model = CasaForConditionalGeneration.from_pretrained(ADAPTED).eval()
    processor = CasaProcessor.from_pretrained(ADAPTED)
    source = Source(SOURCE)
    question = [{"type": "image"}, {"type": "text", "text": "What shape is red?"}]
    turn = [{"role": "user", "content": question}, {"role": "assistant", "content": "square."}]
    for count in counts:
        photographs = [_photograph(path) for path in islice(cycle((CAT, COFFEE, ROCKET)), count)]
        asked = (turn * count)[:-1]
        text = processor.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        inputs = processor(text=text, images=photographs, add_special_tokens=False, return_tensors="pt")
        with torch.inference_mode():
            casa = model(**inputs, use_cache=True).cache
            stock = source.model(**source.inputs({"messages": turn * count, "images": photographs}), use_cache=True)
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in getattr(stock, CACHE).layers)
        yield _Caches(count, inputs["input_ids"].shape[1], sum(cache_nbytes(casa).values()), held)


def _photograph(path: str) -> Image.Image:
    """Small enough that sixteen fit into the source's context."""
    photograph = Image.open(path)
    photograph.thumbnail((336, 336))
    return photograph


def _answers(folder: str | Path, questions: Sequence) -> list[str]:
    model = CasaForConditionalGeneration.from_pretrained(folder)
    return generate_answers(model, CasaProcessor.from_pretrained(folder), questions, max_new_tokens=8, do_sample=False)


def _text(example: dict) -> str:
    """The last question, without its images."""
    dialogue, _ = Dialogue.of(example).question()
    return next(part["text"] for part in reversed(dialogue.messages[-1]["content"]) if part["type"] == "text")


if __name__ == "__main__":
    main()
