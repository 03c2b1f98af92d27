# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""What a training step costs: text tokens per second and peak memory, against the source with image tokens inserted.

All models train the same parameters (the language model and the last four vision blocks; CASA its fusion layers too),
recompute activations in the backward pass, and see the same batch: conversations of one image and as many words
each, no padding, so that nobody computes for nothing. The loss of all is that of chunks of tokens with a label, the
source's too, whose class holds the logits of every image token (`--source-loss all-logits`). A step is forward,
backward and AdamW in bfloat16 autocast (float32 on a CPU). FLOPs and memory are counted by part beforehand
(benchmarks/training_cost.py); without `--conversations` the batch is the largest that fits by that count. Models are
measured one after the other, several rounds, and the median of the ratios within a round is reported. Nothing is
measured before the variant `insertion` has given the stock class's loss on small shapes.

    python -m benchmarks.train_step --size qwen2.5-vl-3b         # a GPU
    python -m benchmarks.train_step --size qwen2.5-vl-3b --count # only counts, for a card of 80 GB; anywhere
    python -m benchmarks.train_step --size qwen2.5-vl-3b --check # and fails where a bar is missed
    python -m benchmarks.train_step --size tiny                  # tries the program, on a CPU

The last line is JSON. The bars are 1.2 times insertion's tokens per second for `ca` and 1.04 for `casa`, at 1.1 times
its memory or less. On a GPU the paper (arXiv 2512.19535, table 1) has 1.21 times insertion's tokens per second for
`ca` and 1.04 for `casa`, at 0.52 and 0.53 times its memory. By count the latter can't be here, whatever fusion layers
do: weights, gradients and moments in float32 are 53 of the source's 63 GB, CASA trains 0.34 billion parameters more,
and all have their peak in the vision tower.
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from benchmarks.training_cost import Shape, step_bytes, step_flops
from casa_hf import CasaConfig, CasaForConditionalGeneration
from casa_hf.loss_casa import chunked_loss
from casa_hf.training import checkpoint_activations, freeze, parameter_groups

START, END, IMAGE_PAD, VIDEO_PAD, WORDS = 0, 1, 2, 3, 4  # token ids; words are all from WORDS on
GATE = 1e-5
SOURCE = "source"
# At least so many times the source's tokens per second, at most so many times its memory.
SPEED_BARS, MEMORY_BAR = {"ca": 1.2, "casa": 1.04}, 1.1
SHARE_OF_MEMORY = 0.95  # of a card's; the rest is for CUDA, kernels and gaps


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
        found = loss_of(insertion, batch.casa).item()
        chunks = loss_of(source, batch.source).item()
    if not abs(chunks - expected) / abs(expected) <= GATE:
        raise SystemExit(
            f"The source's loss in chunks {chunks} differs from its own {expected}; nothing was measured."
        )
    difference = abs(found - expected) / abs(expected)
    if not difference <= GATE:
        raise SystemExit(f"insertion's loss {found} differs from the source's {expected}; nothing was measured.")
    return difference


def loss_of(model: Any, inputs: dict[str, torch.Tensor], all_logits: bool = False) -> torch.Tensor:
    """The loss, in chunks of tokens with a label unless the model is to compute all logits."""
    if all_logits:
        return model(**inputs, use_cache=False).loss
    if isinstance(model, CasaForConditionalGeneration):
        return model(**inputs, use_cache=False, skip_logits=True).loss
    labels, vocab_size = inputs["labels"], model.config.text_config.vocab_size
    others = {name: value for name, value in inputs.items() if name != "labels"}
    return chunked_loss(model.lm_head, model.model(**others, use_cache=False).last_hidden_state, labels, vocab_size)


def step(
    model: Any, inputs: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer, all_logits: bool = False
) -> None:
    """One update."""
    on_gpu = inputs["input_ids"].is_cuda
    with torch.autocast("cuda", torch.bfloat16) if on_gpu else contextlib.nullcontext():
        loss = loss_of(model, inputs, all_logits)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def measure(
    size: Size, name: str, batch: Batch, steps: int, device: torch.device, all_logits: bool = False
) -> dict[str, float]:
    """Seconds per step (the fastest of them) and peak bytes of a step, model and optimizer included."""
    model = build(size, name, device)
    inputs = batch.source if name == SOURCE else batch.casa
    optimizer = torch.optim.AdamW(parameter_groups(model))
    step(model, inputs, optimizer, all_logits)  # makes the optimizer's state
    held = sum(p.nbytes for p in model.parameters())
    held += sum(v.nbytes for state in optimizer.state.values() for v in state.values())
    peak = _peak_bytes(lambda: step(model, inputs, optimizer, all_logits), held, device)
    seconds = []
    for _ in range(steps):
        _wait(device)
        begin = time.perf_counter()
        step(model, inputs, optimizer, all_logits)
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


@dataclass(frozen=True)
class Count:
    """FLOPs and bytes of a model's step by part, as benchmarks/training_cost.py counts them."""

    flops: dict[str, int]
    bytes: dict[str, int]


def count(size: Size, name: str, conversations: int, itemsize: int, all_logits: bool = False) -> Count:
    """What a step of the model of this name costs; arguments as in `step_bytes`."""
    config = CasaConfig.from_source(size.config(), "insertion" if name == SOURCE else name)
    shape = Shape(conversations, size.words, size.side)
    return Count(step_flops(config, shape), step_bytes(config, shape, itemsize, all_logits))


def largest(size: Size, counted: Callable[[int], Sequence[Count]], room: float) -> int | None:
    """The largest number of conversations, up to the size's, with which all these steps fit; None if there is none."""
    numbers = range(size.conversations, 0, -1)
    return next((n for n in numbers if all(each.bytes["peak"] <= room for each in counted(n))), None)


def table(counts: dict[str, Count]) -> str:
    """TFLOPs and GB by part and model."""
    lines = []
    for title, unit, field in (("TFLOPs", 1e12, "flops"), ("GB", 1e9, "bytes")):
        lines.append(f"{title:<32}" + "".join(f"{name:>14}" for name in counts))
        by_model = [getattr(each, field) for each in counts.values()]
        if field == "flops":
            by_model = [{**parts, "all": sum(parts.values())} for parts in by_model]
        for part in by_model[0]:
            lines.append(f"  {part:<30}" + "".join(f"{parts[part] / unit:>14.3f}" for parts in by_model))
    return "\n".join(lines)


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
    parser.add_argument(
        "--conversations", type=int, help="of a batch, one image each (default: the size's, or as many as fit)"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a round")
    parser.add_argument("--source-loss", choices=["chunks", "all-logits"], default="chunks")
    parser.add_argument("--count", action="store_true", help="only count FLOPs and memory, for a GPU")
    parser.add_argument("--memory", type=float, help="of the GPU, in GB (default: this one's, or 80)")
    parser.add_argument(
        "--check", action="store_true", help="exit with 1 if a bar is missed; on a GPU, above size tiny"
    )
    arguments = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    if arguments.check and (arguments.size == "tiny" or not on_gpu):
        parser.error("--check is for a GPU and a size other than tiny: the bars are for these.")
    size = SIZES[arguments.size]
    given = [arguments.rounds, arguments.steps]
    given += [] if arguments.conversations is None else [arguments.conversations]
    if min(given) < 1:
        parser.error("--conversations, --rounds and --steps must be at least 1.")

    device = torch.device("cuda" if on_gpu else "cpu")
    names, itemsize = (SOURCE, *arguments.variants), 2 if on_gpu or arguments.count else 4
    stock = {name: name == SOURCE and arguments.source_loss == "all-logits" for name in names}

    def counted(conversations: int) -> dict[str, Count]:
        return {name: count(size, name, conversations, itemsize, stock[name]) for name in names}

    memory = arguments.memory or (torch.cuda.get_device_properties(device).total_memory / 1e9 if on_gpu else 80.0)
    fitting = largest(size, lambda number: list(counted(number).values()), SHARE_OF_MEMORY * memory * 1e9)
    conversations = arguments.conversations or fitting
    if conversations is None:
        raise SystemExit(f"By count no batch fits into {memory:g} GB:\n{table(counted(1))}")
    counts = counted(conversations)
    print(f"Counted for {conversations} conversations of one image:\n{table(counts)}")
    fits = [name for name in names if counts[name].bytes["peak"] <= SHARE_OF_MEMORY * memory * 1e9]
    print(f"{', '.join(fits) or 'None'} of {', '.join(names)} fit into {memory:g} GB.")
    if arguments.count:
        return

    machine = torch.cuda.get_device_name(device) if on_gpu else platform.platform()
    print(f"{machine}; torch {torch.__version__}, transformers {transformers.__version__}")
    difference = check(Batch.make(SIZES["tiny"], 2, device), device)
    print(f"insertion's loss is the source's: difference {difference:.1e}")
    batch = Batch.make(size, conversations, device)
    print(f"{conversations} images of {size.side**2} tokens, {batch.text_tokens} text tokens a step")
    rounds = []
    for _ in range(arguments.rounds):
        figures = {}
        for name in (SOURCE, *arguments.variants):
            figures[name] = measure(size, name, batch, arguments.steps, device, stock[name])
            gc.collect()
        rounds.append(figures)
    for name in names:
        peak = statistics.median(r[name]["bytes"] for r in rounds)
        print(f"{name}: {peak / 1e9:.3f} GB at the peak, {peak / counts[name].bytes['peak']:.2f} times the count")
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
