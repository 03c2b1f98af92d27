# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""What a training step costs: text tokens per second and peak memory, against the source with image tokens inserted.

All models train the same parameters (the language model and the last four vision blocks; CASA its fusion layers too),
recompute activations in the backward pass, and see the same batch: conversations of one image and as many words
each, no padding, so that nobody computes for nothing. A step is forward, backward and AdamW in bfloat16 autocast
(float32 on a CPU). Models are measured one after the other, several rounds, and the median of the ratios within a
round is reported. Nothing is measured before the variant `insertion` has given the stock class's loss on small shapes.

    python -m benchmarks.train_step --size qwen2.5-vl-3b         # a GPU; see --conversations for its memory
    python -m benchmarks.train_step --size qwen2.5-vl-3b --check # and fails where a bar is missed
    python -m benchmarks.train_step --size tiny                  # tries the program, on a CPU

The last line is JSON. The bars are 1.2 times insertion's tokens per second for `ca` and 1.04 for `casa`, at 0.55 times
its memory or less. On a GPU the paper (arXiv 2512.19535, table 1) has 1.21 times insertion's tokens per second for
`ca` and 1.04 for `casa`, at 0.52 and 0.53 times its memory.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from casa_hf import CasaConfig, CasaForConditionalGeneration
from casa_hf.training import checkpoint_activations, freeze, parameter_groups

START, END, IMAGE_PAD, VIDEO_PAD, WORDS = 0, 1, 2, 3, 4  # token ids; words are all from WORDS on
GATE = 1e-5
SOURCE = "source"
# At least so many times the source's tokens per second, at most so many times its memory.
SPEED_BARS, MEMORY_BAR = {"ca": 1.2, "casa": 1.04}, 0.55


@dataclass(frozen=True)
class Size:
    """Shapes of a model and of its images.

    Attributes:
        text, vision: settings of the two configurations.
        side: of an image, in merged patches.
        words: text tokens of a conversation, the two delimiters of its image among them.
        conversations: of a batch.
    """

    text: dict[str, Any]
    vision: dict[str, Any]
    side: int
    words: int
    conversations: int

    def config(self) -> Qwen2_5_VLConfig:
        """Configuration of the source model."""
        return Qwen2_5_VLConfig(
            text_config=dict(self.text),
            vision_config=dict(self.vision),
            image_token_id=IMAGE_PAD,
            video_token_id=VIDEO_PAD,
            vision_start_token_id=START,
            vision_end_token_id=END,
            tie_word_embeddings=True,
        )


def _rope(*sections: int) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 1e6, "mrope_section": list(sections)}


SIZES = {
    "tiny": Size(
        text={
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_window_layers": 3,
            "rope_parameters": _rope(2, 3, 3),
        },
        vision={
            "depth": 5,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "window_size": 112,
            "fullatt_block_indexes": [4],
            "out_hidden_size": 64,
        },
        side=8,
        words=24,
        conversations=2,
    ),
    # 20 images of 1,024 tokens and 2,040 text tokens: a packed sequence of the paper.
    "qwen2.5-vl-3b": Size(
        text={
            "vocab_size": 151_936,
            "hidden_size": 2_048,
            "intermediate_size": 11_008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "max_window_layers": 36,
            "rope_parameters": _rope(16, 24, 24),
        },
        vision={
            "depth": 32,
            "hidden_size": 1_280,
            "intermediate_size": 3_420,
            "num_heads": 16,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "out_hidden_size": 2_048,
        },
        side=32,
        words=102,
        conversations=20,
    ),
}


@dataclass(frozen=True)
class Batch:
    """The same conversations as inputs of the source model and of CASA models; loss on the words after the image."""

    source: dict[str, torch.Tensor]
    casa: dict[str, torch.Tensor]
    text_tokens: int

    @classmethod
    def make(cls, size: Size, conversations: int, device: torch.device) -> Batch:
        """Random words and pixels."""
        generator = torch.Generator().manual_seed(0)
        config = size.config()
        merge, patch = config.vision_config.spatial_merge_size, config.vision_config.patch_size
        ids = torch.randint(WORDS, size.text["vocab_size"], (conversations, size.words), generator=generator)
        ids[:, 0], ids[:, 1] = START, END
        image = torch.full((conversations, size.side**2), IMAGE_PAD)
        inserted = torch.cat([ids[:, :1], image, ids[:, 1:]], dim=1)
        dimensions = 3 * config.vision_config.temporal_patch_size * patch**2
        patches = conversations * (size.side * merge) ** 2
        images = {
            "pixel_values": torch.randn(patches, dimensions, generator=generator).to(device),
            "image_grid_thw": torch.tensor([[1, size.side * merge, size.side * merge]] * conversations, device=device),
        }
        labels = ids.masked_fill(ids < WORDS, -100)
        inserted_labels = inserted.masked_fill(inserted < WORDS, -100)
        return cls(
            source={
                "input_ids": inserted.to(device),
                "labels": inserted_labels.to(device),
                "mm_token_type_ids": (inserted == IMAGE_PAD).int().to(device),
                **images,
            },
            casa={"input_ids": ids.to(device), "labels": labels.to(device), **images},
            text_tokens=ids.numel(),
        )


def build(size: Size, name: str, device: torch.device) -> Any:
    """The model of this name with random weights, as it trains."""
    torch.manual_seed(0)
    with device:
        if name == SOURCE:
            model: Any = Qwen2_5_VLForConditionalGeneration(size.config())
        else:
            model = CasaForConditionalGeneration(CasaConfig.from_source(size.config(), name))
    freeze(model, "paper-helium")
    checkpoint_activations(model)
    return model.train()


def check(batch: Batch, device: torch.device) -> float:
    """The relative difference in loss between the stock class and the variant `insertion`.

    Args:
        batch: of the size "tiny".
        device: where to compute.

    Raises:
        SystemExit: if it is above the gate.
    """
    size = SIZES["tiny"]
    source, insertion = build(size, SOURCE, device), build(size, "insertion", device)
    with torch.no_grad():
        for parameter in source.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)  # as initialised, every prediction is near uniform
        insertion.load_state_dict(source.state_dict())
        expected = source(**batch.source, use_cache=False).loss.item()
        found = insertion(**batch.casa, use_cache=False).loss.item()
    difference = abs(found - expected) / abs(expected)
    if not difference <= GATE:
        raise SystemExit(f"insertion's loss {found} differs from the source's {expected}; nothing was measured.")
    return difference


def step(model: Any, inputs: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> None:
    """One update."""
    on_gpu = inputs["input_ids"].is_cuda
    with torch.autocast("cuda", torch.bfloat16) if on_gpu else contextlib.nullcontext():
        loss = model(**inputs, use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def measure(size: Size, name: str, batch: Batch, steps: int, device: torch.device) -> dict[str, float]:
    """Seconds per step (the fastest of them) and peak bytes of a step, model and optimizer included."""
    model = build(size, name, device)
    inputs = batch.source if name == SOURCE else batch.casa
    optimizer = torch.optim.AdamW(parameter_groups(model))
    step(model, inputs, optimizer)  # makes the optimizer's state
    held = sum(p.nbytes for p in model.parameters())
    held += sum(v.nbytes for state in optimizer.state.values() for v in state.values())
    peak = _peak_bytes(lambda: step(model, inputs, optimizer), held, device)
    seconds = []
    for _ in range(steps):
        _wait(device)
        begin = time.perf_counter()
        step(model, inputs, optimizer)
        _wait(device)
        seconds.append(time.perf_counter() - begin)
    return {"seconds": min(seconds), "bytes": peak}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_bytes(run: Callable[[], None], held: int, device: torch.device) -> int:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return held + max(itertools.accumulate(change for _, change in changes))


def missed_bars(results: dict[str, dict[str, float]]) -> list[str]:
    """What is below a bar, in words.

    Args:
        results: ratios to the source, "speed" and "memory", by variant; variants without a bar are left out.
    """
    missed = []
    for name in SPEED_BARS.keys() & results.keys():
        speed, memory = results[name]["speed"], results[name]["memory"]
        if speed < SPEED_BARS[name]:
            missed.append(f"{name}: {speed:.2f} times the source's tokens per second, below {SPEED_BARS[name]}.")
        if memory > MEMORY_BAR:
            missed.append(f"{name}: {memory:.2f} times the source's memory, above {MEMORY_BAR}.")
    return sorted(missed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--variants", nargs="+", default=["ca", "casa"], help="beside the source (default: ca casa)")
    parser.add_argument("--conversations", type=int, help="of a batch, one image each (default: the size's)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a round")
    parser.add_argument(
        "--check", action="store_true", help="exit with 1 if a bar is missed; on a GPU, above size tiny"
    )
    arguments = parser.parse_args()
    if arguments.check and (arguments.size == "tiny" or not torch.cuda.is_available()):
        parser.error("--check is for a GPU and a size other than tiny: the bars are for these.")
    size = SIZES[arguments.size]
    conversations = size.conversations if arguments.conversations is None else arguments.conversations
    if min(conversations, arguments.rounds, arguments.steps) < 1:
        parser.error("--conversations, --rounds and --steps must be at least 1.")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.platform()
    print(f"{machine}; torch {torch.__version__}, transformers {transformers.__version__}")
    difference = check(Batch.make(SIZES["tiny"], 2, device), device)
    print(f"insertion's loss is the source's: difference {difference:.1e}")
    batch = Batch.make(size, conversations, device)
    print(f"{conversations} images of {size.side**2} tokens, {batch.text_tokens} text tokens a step")
    rounds = []
    for _ in range(arguments.rounds):
        figures = {}
        for name in (SOURCE, *arguments.variants):
            figures[name] = measure(size, name, batch, arguments.steps, device)
            gc.collect()
        rounds.append(figures)
    results = {}
    for name in arguments.variants:
        speed = statistics.median(r[SOURCE]["seconds"] / r[name]["seconds"] for r in rounds)
        memory = statistics.median(r[name]["bytes"] / r[SOURCE]["bytes"] for r in rounds)
        tokens = statistics.median(batch.text_tokens / r[name]["seconds"] for r in rounds)
        results[name] = {"tokens_per_second": tokens, "speed": speed, "memory": memory}
        print(f"{name}: {tokens:.0f} text tokens/s, {speed:.2f} times the source's; {memory:.2f} times its memory")
    print(json.dumps({"size": arguments.size, "machine": machine, "results": results}))
    if arguments.check and (missed := missed_bars(results)):
        raise SystemExit("\n".join(missed))


if __name__ == "__main__":
    main()
