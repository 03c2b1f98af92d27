# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Live captions in the tiny world: clips in which an object becomes another one, and a model that says so.

    python -m examples.tiny_world.live FOLDER    # train the captioner from the bundled `casa` checkpoint

A clip shows one object, somewhere else in every frame; now and then it is another one. The captioner names the object
in the first frame and whenever it has changed, and is silent otherwise. Of what it saw before it knows what it has
said. As in the paper's last stage for live captions, the vision tower stays as it is; unlike there, the whole language
model trains.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers.utils.logging import disable_progress_bar

from casa_hf import CasaForConditionalGeneration, CasaProcessor, CasaStream, StreamSettings
from casa_hf.streaming.turns import StreamTurns

from .batches import IGNORED, Batcher
from .drawing import any_thing, scatter
from .protocols import optimizers
from .training import trapezoid
from .world import Camera

PROMPT = "Say what there is when it changes."
CHECKPOINT = Path(__file__).parent / "checkpoints" / "live"
_START = Path(__file__).parent / "checkpoints" / "casa"
_LR = 2e-3
_CHANGES = 0.3  # share of frames in which the object is another one


@dataclass(frozen=True)
class Clip:
    """Frames, and what is to be said to each of them: the name of the object, or nothing."""

    frames: tuple[Image.Image, ...]
    captions: tuple[str, ...]


def clip(index: int, frames: int, split: str = "test") -> Clip:
    """A clip; the same arguments give the same one. Splits share no frame."""
    rng = Random(f"clip {split} {index}")
    camera = Camera(rng, split)
    thing = any_thing(rng)
    images, captions = [], []
    for number in range(frames):
        before = thing
        while number and thing == before and rng.random() < _CHANGES:
            thing = any_thing(rng)
        captions.append(str(thing) if number == 0 or thing != before else "")
        images.append(camera.take(lambda rng, thing=thing: scatter(thing, rng)))
    return Clip(tuple(images), tuple(captions))


def new_stream(model: Any, processor: CasaProcessor, **settings: Any) -> CasaStream:
    """A stream with the captioner's prompt. Its names come again and again, so repetition isn't controlled."""
    off: dict[str, Any] = {"repetition_penalty": None, "no_repeat_ngram_size": None, "stop_bias": None}
    return CasaStream(model, processor, prompt=PROMPT, max_new_tokens_per_frame=6, **off, **settings)


class StreamBatcher:
    """Makes batches of clips, token for token what a `CasaStream` would have in its cache."""

    def __init__(self, processor: CasaProcessor):
        settings = StreamSettings(prompt=PROMPT)
        self.turns, self.fps = StreamTurns(processor, settings), settings.fps
        self.tokenizer = processor.tokenizer
        self.pixels = Batcher(processor).pixels

    def __call__(self, clips: Sequence[Clip]) -> dict[str, torch.Tensor]:
        """A batch padded on the right, with labels on captions and on the tokens that end them."""
        rows = [self._encode(one) for one in clips]
        width = max(len(ids) for ids, _, _ in rows)

        def padded(lists: Sequence[Sequence[int]], value: int) -> torch.Tensor:
            return torch.tensor([[*row, *[value] * (width - len(row))] for row in lists])

        ids, labels, types = (list(part) for part in zip(*rows, strict=True))
        return {
            "input_ids": padded(ids, self.tokenizer.pad_token_id),
            "attention_mask": padded([[1] * len(row) for row in ids], 0),
            "labels": padded(labels, IGNORED),
            "mm_token_type_ids": padded(types, 0),
            **self.pixels([frame for one in clips for frame in one.frames]),
        }

    def _encode(self, one: Clip) -> tuple[list[int], list[int], list[int]]:
        ids = list(self.turns.opening)
        labels, types = [IGNORED] * len(ids), [0] * len(ids)
        for index, caption in enumerate(one.captions):
            frame, its_types = self.turns.image([index / self.fps])
            said = self.tokenizer(f"{caption}{self.tokenizer.eos_token}", add_special_tokens=False)["input_ids"]
            ids += [*frame, *said]
            labels += [*[IGNORED] * len(frame), *said]
            types += [*its_types, *[0] * len(said)]
        return ids, labels, types


def train(folder: Path, steps: int = 600, frames: int = 256, lengths: Sequence[int] = (8, 8, 16, 32)) -> Path:
    """Train the captioner from the bundled `casa` checkpoint and write it.

    Args:
        folder: to write.
        steps: of the optimizers.
        frames: of all clips of a step together.
        lengths: of the clips, in turn: short ones say more often how to begin, long ones how to continue.
    """
    model: Any = CasaForConditionalGeneration.from_pretrained(_START)
    processor = CasaProcessor.from_pretrained(_START)
    for parameter in model.model.visual.parameters():
        parameter.requires_grad_(False)
    made = optimizers(model, _LR)
    schedulers = [torch.optim.lr_scheduler.LambdaLR(one, lambda s: trapezoid(s, steps, 0.05, 0.6)) for one in made]
    batcher, numbers = StreamBatcher(processor), count()
    model.train()
    for step in range(1, steps + 1):
        length = lengths[step % len(lengths)]
        clips = [clip(next(numbers), length, "train") for _ in range(max(1, frames // length))]
        loss = model(**batcher(clips), use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0)
        for optimizer, scheduler in zip(made, schedulers, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        if step % 50 == 0 or step == steps:
            print(f"step {step} of {steps}, loss {loss.item():.3f}", flush=True)
    with tempfile.TemporaryDirectory(prefix="tiny-world-") as place:
        written = Path(place, "live")
        model.eval().save_pretrained(written)
        processor.save_pretrained(written)
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(written, folder)
    return folder


def scores(model: Any, processor: CasaProcessor, number: int, frames: int, split: str = "test") -> dict[str, float]:
    """How a stream captions clips.

    Returns:
        "frames": share of frames with the right caption, silence included; "changes": share of changed frames (the
        first one included) that got the right name at once; "false": share of unchanged frames that got a caption.
    """
    right = named = false = changes = 0
    for index in range(number):
        one = clip(index, frames, split)
        with new_stream(model, processor) as stream:
            said = [list(stream.push(frame))[-1].text.strip() for frame in one.frames]
        for caption, wanted in zip(said, one.captions, strict=True):
            right += caption == wanted
            changes += bool(wanted)
            named += bool(wanted) and caption == wanted
            false += bool(caption) and not wanted
    total = number * frames
    return {"frames": right / total, "changes": named / changes, "false": false / (total - changes)}


def main(arguments: list[str] | None = None) -> None:
    """Train and measure."""
    parser = argparse.ArgumentParser(prog="python -m examples.tiny_world.live", description="Train the captioner.")
    parser.add_argument("folder", type=Path, help="to write")
    parser.add_argument("--steps", type=int, default=600)
    options = parser.parse_args(arguments)
    disable_progress_bar()
    folder = train(options.folder, options.steps)
    model = CasaForConditionalGeneration.from_pretrained(folder).eval()
    processor = CasaProcessor.from_pretrained(folder)
    for frames in (8, 32):
        found = scores(model, processor, 50, frames)
        print(f"50 clips of {frames} frames: " + ", ".join(f"{name} {share:.1%}" for name, share in found.items()))


if __name__ == "__main__":
    main()
