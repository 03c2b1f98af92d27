# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Where the memory of an earlier image is: self-attention is cut, and what can still be answered tells.

In a window a fusion layer lets text see the window's image; later text can know of it only through self-attention to
text that saw it. Cutting that to the *gists* (the token that the image precedes, and gist tokens) shows how much of
the memory they carry; cutting it to all text of the window must leave nothing, so that answers are guesses.

    python -m examples.tiny_world.cutting    # of the bundled `casa`
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from casa_hf import CasaForConditionalGeneration, CasaProcessor

from .batches import Batcher
from .training import answers_right
from .world import NUMBERS, TASKS, Example

CUTS = ("gists", "window")
FRAMES = (2, 3, 4)
CHECKPOINT = Path(__file__).parent / "checkpoints" / "casa"


def window_of(ids: Sequence[int], placeholder: int, image: int) -> range:
    """The tokens of an image's window.

    Args:
        ids: of the conversation.
        placeholder: the token that an image precedes.
        image: number of the image, from 0; not the last one, whose window is still open.

    Raises:
        ValueError: if there is no such image with another one after it.
    """
    placeholders = [index for index, token in enumerate(ids) if token == placeholder]
    if not 0 <= image < len(placeholders) - 1:
        raise ValueError(f"image={image}: of {len(placeholders)} images, those before the last have a closed window.")
    return range(placeholders[image], placeholders[image + 1])


def cut_mask(ids: Sequence[int], config: Any, image: int, what: str) -> torch.Tensor:
    """The mask of self-attention in which text after an image's window doesn't see a part of it.

    Args:
        ids: of the conversation.
        config: of the CASA model.
        image: see `window_of`.
        what: "gists", or "window" for all its text.

    Returns:
        (tokens, tokens), boolean: whether a query (first) sees a key.

    Raises:
        ValueError: for another `what`, or if images are updated by attention: then a later image carries what its
            tokens have read in the text before it.
    """
    if what not in CUTS:
        raise ValueError(f"what={what!r} can't be cut; choose one of {CUTS}.")
    if config.casa_image_updates == "full":
        raise ValueError(
            "casa_image_updates='full' lets images read earlier text, which no cut reaches; take another."
        )
    window = window_of(ids, config.image_token_id, image)
    gists = {config.image_token_id, *(config.gist_token_ids or ())}
    keys = [index for index in window if what == "window" or ids[index] in gists]
    mask = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    mask[window.stop :, keys] = False
    return mask


def questions_of_memory(number: int, size: int, split: str = "test", *, seed: int = 0) -> list[tuple[Example, int]]:
    """Questions of the task "frames" about any frame but the last, and the number of that frame, from 0."""
    found: list[tuple[Example, int]] = []
    index = 0
    while len(found) < number:
        example = TASKS["frames"].example(size, split, index, seed=seed)
        asked = next(NUMBERS.index(word) - 1 for word in NUMBERS if example.turns[0][0].endswith(f" {word}?"))
        if asked < size - 1:
            found.append((example, asked))
        index += 1
    return found


def memory(
    model: Any,
    batcher: Batcher,
    questions: Sequence[tuple[Example, int]],
    cut: str | None = None,
    batch_size: int = 64,
) -> float:
    """The share of right answers to questions about earlier images.

    Args:
        model: a CASA model.
        batcher: of its processor.
        questions: examples with one question each, and the number of the image that it is about.
        cut: one of `CUTS`, or None.
        batch_size: questions per call.
    """
    images = {id(example): image for example, image in questions}

    def cut_batch(chunk: Sequence[Example]) -> dict[str, torch.Tensor]:
        batch = batcher(chunk)
        width = batch["input_ids"].shape[1]
        seen = torch.ones(len(chunk), 1, width, width, dtype=torch.bool).tril()
        for row, example in enumerate(chunk):
            ids = batcher.encode(example)[0]
            seen[row, 0, : len(ids), : len(ids)] = cut_mask(ids, model.config, images[id(example)], cut)
        floor = torch.finfo(model.dtype).min
        return {**batch, "attention_mask": torch.zeros(seen.shape, dtype=model.dtype).masked_fill(~seen, floor)}

    examples = [example for example, _ in questions]
    return sum(answers_right(model, cut_batch if cut else batcher, examples, batch_size)) / len(questions)


def main(arguments: list[str] | None = None) -> None:
    """Print what a model knows of earlier images, uncut and cut."""
    parser = argparse.ArgumentParser(prog="python -m examples.tiny_world.cutting", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=CHECKPOINT, help="folder of a CASA checkpoint")
    parser.add_argument("--questions", type=int, default=1_000, help="of each number of frames")
    options = parser.parse_args(arguments)
    disable_progress_bar()
    model = CasaForConditionalGeneration.from_pretrained(options.model)
    batcher = Batcher(CasaProcessor.from_pretrained(options.model))
    print("| frames | nothing cut | gists cut | window cut | chance |\n|---|---|---|---|---|")
    for size in FRAMES:
        questions = questions_of_memory(options.questions, size)
        shares = [memory(model, batcher, questions, cut) for cut in (None, *CUTS)]
        cells = [f"{100 * share:.1f}" for share in (*shares, TASKS["frames"].chance(size))]
        print(f"| {size} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
