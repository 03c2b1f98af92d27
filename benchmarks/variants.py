# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""What each named variant costs: counted from its configuration, and measured against the source model.

Counted: parameters, cache entries and FLOPs, by functions that are short enough to be read as formulas. Measured: time
and peak memory of prefill, decoding, one more frame and a training step, of the source model with image tokens
inserted (the stock Transformers class) and of every variant made from the same weights, one after the other in one
process on one thread, several rounds; a round's figures are divided by the source's in that round, and the median is
reported. Time is that of the processor, which other programs disturb less than that of the clock.
Nothing is measured before the variant `insertion` has given the source's logits. Image features are made beforehand
for all models, so language models are compared and vision towers are not. The last line is JSON.

    python -m benchmarks.variants --write docs/variants.md
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from benchmarks.common import (
    LARGE_TEXT,
    LARGE_VISION,
    TINY_TEXT,
    Sizes,
    Stream,
    casa_model,
    paragraph,
    peak_bytes,
    random_source,
    rope,
    table,
    versions,
    write,
)
from benchmarks.counting import (
    added_formula,
    added_parameters,
    head_flops,
    image_flops,
    kv_entries,
    text_flops,
)
from casa_hf import CasaConfig, cache_nbytes
from casa_hf.design_space import VARIANTS
from casa_hf.transformers_versions import CACHE

STAGES = ("prefill", "decode", "frame", "train")
GATE = 1e-3

# Table 1 of arXiv 2512.19535 (Helium1-2B, one GPU): training text tokens/s and GB, streaming frames/s and GB.
PAPER = {
    "ca": ("CA", 1817, 32.9, 6.8, 6.1, "kT + N"),
    "ca-shared": ("CA shared", 1845, 32.0, 7.7, 5.7, "kT + N"),
    "casa": ("CA t+v", 1560, 33.1, 5.6, 6.1, "kT + (T+N)"),
    "ca-replace": ("CA replace", 1995, 29.0, 7.6, 5.7, "kT or N"),
    "casa-ffn": ("CA + FFNs", 1504, 57.8, 6.6, 6.1, "kT + kN"),
    "insertion": ("insertion", 1501, 62.8, 1.2, 29.5, "kT + kN"),
}


SIZES = Sizes(
    text={
        "vocab_size": 4096,
        "hidden_size": 512,
        "intermediate_size": 2304,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "bos_token_id": None,
        "eos_token_id": None,
        "rope_parameters": rope(8, 12, 12),
    },
    vision={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 1, "out_hidden_size": 512},
    frames=12,
    train_frames=4,
    side=16,
    words=16,
    decoded=16,
    last_words=8,
)
TINY = Sizes(
    text=TINY_TEXT,
    vision={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 1, "out_hidden_size": 64},
    frames=3,
    train_frames=2,
    side=4,
    words=5,
    decoded=2,
    last_words=4,
)
# Qwen2.5-VL-3B, for the counted table.
LARGE = Sizes(
    text=LARGE_TEXT,
    vision=LARGE_VISION,
    frames=64,
    train_frames=0,
    side=16,
    words=16,
    decoded=0,
    last_words=0,
)


@dataclass
class Contestant:
    """A model and how to feed it.

    Attributes:
        model: any of them, in evaluation mode.
        inputs: makes its inputs for a range of the stream's text.
        text: indices of the first so many text tokens among its own tokens.
    """

    model: Any
    stream: Stream
    inputs: Callable[[int, int], dict[str, Any]]
    text: Callable[[int], Tensor]
    cache: Any = field(default=None, init=False)

    def prefill(self) -> Tensor:
        """The prompt in one call."""
        self.cache = DynamicCache(config=self.model.config)
        return self._forward(0, self.stream.prompt)

    def decode(self) -> Tensor:
        """Further tokens, one call each."""
        outputs = [self._forward(i, i + 1) for i in range(self.stream.prompt, self.stream.decoded)]
        return torch.cat(outputs)

    def frame(self) -> Tensor:
        """One more image and its words in one call, as in a stream of frames."""
        return self._forward(self.stream.decoded, self.stream.end)

    def train(self) -> Tensor:
        """Forward and backward pass of a training step over all parameters of the language model."""
        ids = self.stream.ids[0, : self.stream.train]
        logits = self.model(**self.inputs(0, len(ids)), use_cache=False, logits_to_keep=self.text(len(ids))).logits
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], ids[1:])
        loss.backward()
        self.model.zero_grad()
        return loss.detach()

    @torch.no_grad()
    def _forward(self, start: int, end: int) -> Tensor:
        inputs = {**self.inputs(start, end), CACHE: self.cache}
        return self.model(**inputs, use_cache=True, logits_to_keep=1).logits


def contestants(sizes: Sizes) -> dict[str, Contestant]:
    """The source model, of random weights, under the name "source", and each variant made from it."""
    source = random_source(sizes.source_config())
    stream = Stream(sizes, source)
    models = {"source": Contestant(source, stream, stream.source, stream.source_text)}
    for name in VARIANTS:
        models[name] = Contestant(casa_model(source, name), stream, stream.casa, torch.arange)
    return models


def check(models: dict[str, Contestant]) -> float:
    """Compare the logits of `insertion` with the source's, in every stage.

    Returns:
        The largest difference divided by the largest logit.

    Raises:
        RuntimeError: if it is too large for what float32 explains.
    """
    errors = []
    for stage in STAGES:
        expected, actual = (getattr(models[name], stage)() for name in ("source", "insertion"))
        errors.append(float((actual - expected).abs().max() / expected.abs().max()))
    if max(errors) > GATE:
        raise RuntimeError(
            f"insertion differs from the source by {max(errors):.1e} (bar {GATE}); nothing is measured."
        )
    return max(errors)


def round_seconds(models: dict[str, Contestant]) -> dict[str, dict[str, float]]:
    """Processor seconds of every stage of every model, one model after the other."""
    seconds: dict[str, dict[str, float]] = {}
    for name, contestant in models.items():
        gc.collect()
        seconds[name] = {}
        for stage in STAGES:
            start = time.process_time()
            getattr(contestant, stage)()
            seconds[name][stage] = time.process_time() - start
    return seconds


def memory(contestant: Contestant) -> dict[str, int]:
    """Peak bytes of the stages, and bytes of the cache at the end."""
    contestant.cache = None
    cached = {stage: getattr(contestant, stage) for stage in ("prefill", "decode", "frame")}
    figures = peak_bytes(cached)
    figures["cache"] = sum(cache_nbytes(contestant.cache).values())
    contestant.cache = None
    return figures | peak_bytes({"train": contestant.train})


def ratios(figures: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Every variant's figures divided by the source's."""
    source = figures["source"]
    return {
        name: {key: value / source[key] for key, value in own.items()}
        for name, own in figures.items()
        if name != "source"
    }


def median_ratios(divided: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Median over rounds of every variant's ratios."""
    return {
        name: {stage: statistics.median(one[name][stage] for one in divided) for stage in STAGES}
        for name in divided[0]
    }


def spread(divided: list[dict[str, dict[str, float]]], medians: dict[str, dict[str, float]]) -> dict[str, float]:
    """For each stage, how far half of all single ratios are from their median at most, as a part of it."""
    return {
        stage: statistics.median(
            abs(one[name][stage] / own[stage] - 1) for one in divided for name, own in medians.items()
        )
        for stage in STAGES
    }


def stage_flops(config: CasaConfig, sizes: Sizes) -> dict[str, int]:
    """FLOPs of the stages without gradients as they are computed: all keys of a call, masked ones included."""
    size, prompt = sizes.image_tokens, sizes.frames * sizes.words
    seen = size * (sizes.frames if kv_entries(config).past_image else 1)
    window = sizes.words - 1  # the delimiter before the last image isn't in its window
    end = prompt + sizes.decoded + sizes.last_words

    def call(tokens: int, text: int, window: int, new: int, image: int) -> int:
        of_text = tokens * text_flops(config, text, window, image)
        return of_text + image_flops(config, new, text, image) + head_flops(config)

    return {
        "prefill": call(prompt, prompt, prompt, sizes.frames * size, sizes.frames * size),
        "decode": sum(call(1, prompt + i, window + i, 0, seen) for i in range(1, sizes.decoded + 1)),
        # Keys of the window before the frame are still there in the call that closes it.
        "frame": call(sizes.last_words, end, window + end - prompt, size, seen + size),
    }


def measure(sizes: Sizes, rounds: int) -> dict[str, Any]:
    """Check, measure memory once and time in rounds, printing as it goes; return all that the document needs."""
    models = contestants(sizes)
    parameters = sum(p.numel() for p in models["source"].model.model.language_model.parameters())
    print(
        f"language model of {parameters / 1e6:.1f} million parameters; {sizes.frames} images of "
        f"{sizes.image_tokens} tokens, {sizes.words} words each; {sizes.decoded} tokens decoded"
    )
    error = check(models)
    print(f"insertion = source: largest difference {error:.1e} of the largest logit")
    held = ratios({name: memory(contestant) for name, contestant in models.items()})
    timed = []
    for number in range(1, rounds + 1):
        timed.append(round_seconds(models))
        print(f"round {number}: source " + ", ".join(f"{s} {timed[-1]['source'][s]:.3f} s" for s in STAGES))
    divided = [ratios(seconds) for seconds in timed]
    medians = median_ratios(divided)
    return {
        "language_model_parameters": parameters,
        "difference": error,
        "rounds": rounds,
        "time": medians,
        "spread": spread(divided, medians),
        "memory": held,
    }


# ---------------------------------------------------------------- written

FORMULAS = """\
Symbols: `L` decoder blocks, `f` of them with a fusion layer; `d` hidden size, `q` and `k` the widths of all query
heads and of all key heads together, `m` the inner size of the MLP, `A` the parameters of one self-attention
(projections, biases, query and key norms). A token looks at `T` text tokens in self-attention, `W` text tokens and
`I` image tokens in a fusion layer; an image has `N` tokens. A multiplication with its addition is two FLOPs; only
matrix products count; the output head and the vision tower, the same for all variants, are left out.

| FLOPs per text token | |
|---|---|
| MLP, in each of the `L` blocks | `6dm` |
| self-attention, in each block that has one | `4d(q + k) + 4qT` |
| fusion layer on images, in each of the `f` blocks | `4qI` |
| ... its own queries and output | `4dq`, unless shared in parallel |
| ... text of the window among its keys | `4qW` |
| ... and keys and values of that text | `4dk`, unless shared in parallel |

| FLOPs per image | |
|---|---|
| keys and values, in each of the `f` fusion layers | `4dkN` |
| MLP, in each of the `L` blocks, if image states are updated | `6dmN` |
| attention of image tokens, in each of the `L` blocks, if updates are `full` | `(4dq + 4q(T + I))N` |
| ... and keys and values for it, where the fusion layer's can't serve | `4dkN` |

| cache entries (the key and the value of one token in one block) | |
|---|---|
| per text token | `L`; in a replaced block none |
| ... more while it is in the current window, if fusion layers have text keys | `f`, unless shared in parallel |
| per image token, while later text can see it | `f` |
| ... more if updates are `full` | 1 per block where the fusion layer's can't serve |
| per image token of earlier windows | none; with the history `all` the same |"""

EXPLANATION = """\
Read a figure's two columns by their order, not by their size. The paper measures whole models of two billion
parameters, vision tower included, in bfloat16 on a GPU, and frames with a long stream behind them. Here small
language models run alone, in float32 on one CPU core, with few frames behind them: without the tower, ratios are
further apart, and what grows with history is small. What else can change an order:

- **Image tokens in MLPs.** A frame's tokens pass the MLPs of `ca-ffn` and `casa-ffn` side by side. In the paper,
  on a GPU with one frame to work on, that hardly shows; a CPU core pays for every product.
- **Masked pairs.** A fusion layer with `sdpa` computes the scores of all keys of a call and masks those outside the
  window. The source's mask in a single call is plainly causal, and the scores above the diagonal are skipped. That is
  why `insertion` and `exact` take more time and memory than the source in prefill, for the same numbers.
- **Memory in training.** The paper's figure is that of training on a device. Here it is what one forward and backward
  pass allocates, gradients included; weights and an optimiser's states aren't in it.
- **Memory in streaming.** The paper's figure includes the weights; here it is the cache alone.
- **What is cached of an image.** The paper counts `N` entries for an image: its states, the same in every block.
  `casa_hf` keeps the keys and values that the fusion layers made of them, `f` entries per image token, so that they
  are computed once, and keeps those of the current window alone.
- **Small calls.** Decoding a token, or a frame with a few words, is many small operations. Each has a price that
  FLOPs don't show, so the gain is smaller than the number in parentheses, and near ties can fall either way."""


def casa_config(sizes: Sizes, name: str) -> CasaConfig:
    """Configuration of a variant of the sizes' source model."""
    return CasaConfig.from_source(sizes.source_config(), name)


def counted_table(sizes: Sizes) -> str:
    """Parameters, cache entries and FLOPs of every variant."""
    text = sizes.frames * sizes.words
    rows = []
    source = casa_config(sizes, "insertion")
    all_images = sizes.frames * sizes.image_tokens
    source_text = text_flops(source, text, 0, all_images)
    source_image = image_flops(source, sizes.image_tokens, text, all_images)
    for name in VARIANTS:
        config = casa_config(sizes, name)
        entries = kv_entries(config)
        seen = all_images if entries.past_image else sizes.image_tokens
        per_text = text_flops(config, text, sizes.words, seen)
        per_image = image_flops(config, sizes.image_tokens, text, seen)
        rows.append(
            [
                f"`{name}`",
                f"`{added_formula(config)}`",
                f"{added_parameters(config) / 1e6:,.2f} M",
                f"{entries.text}" + (f" + {entries.window}" if entries.window else ""),
                f"{entries.image * sizes.image_tokens:,}",
                f"{entries.past_image * sizes.image_tokens:,}",
                f"{per_text / 1e9:.2f} G ({per_text / source_text:.2f})",
                f"{per_image / 1e9:,.1f} G ({per_image / source_image:.3f})",
            ]
        )
    return table(
        [
            "variant",
            "added parameters",
            "",
            "entries per text token",
            "entries per image, seen",
            "entries per image, past",
            "FLOPs per text token",
            "FLOPs per image",
        ],
        rows,
    )


def measured_table(results: dict[str, Any], sizes: Sizes) -> str:
    """Times and memory of every variant as ratios to the source."""
    source = stage_flops(casa_config(sizes, "insertion"), sizes)
    rows = []
    for name, seconds in results["time"].items():
        flops = stage_flops(casa_config(sizes, name), sizes)
        held = results["memory"][name]
        rows.append(
            [f"`{name}`"]
            + [f"{seconds[stage]:.2f} ({flops[stage] / source[stage]:.2f})" for stage in flops]
            + [f"{seconds['train']:.2f}"]
            + [f"{held[key]:.2f}" for key in ("prefill", "frame", "train", "cache")]
        )
    header = [
        "variant",
        *(f"time: {stage}" for stage in STAGES),
        "peak: prefill",
        "peak: frame",
        "peak: train",
        "cache",
    ]
    return table(header, rows)


def comparison_tables(results: dict[str, Any]) -> str:
    """Paper and measurement side by side, both as ratios to insertion, each figure with its rank."""
    ours = {name: (results["time"][name], results["memory"][name]) for name in PAPER}
    base = PAPER["insertion"]
    figures: list[tuple[str, dict[str, float], dict[str, float]]] = [
        (
            "training time per text token",
            {name: base[1] / row[1] for name, row in PAPER.items()},
            {name: times["train"] for name, (times, _) in ours.items()},
        ),
        (
            "training memory",
            {name: row[2] / base[2] for name, row in PAPER.items()},
            {name: held["train"] for name, (_, held) in ours.items()},
        ),
        (
            "time per frame",
            {name: base[3] / row[3] for name, row in PAPER.items()},
            {name: times["frame"] for name, (times, _) in ours.items()},
        ),
        (
            "streaming memory",
            {name: row[4] / base[4] for name, row in PAPER.items()},
            {name: held["cache"] for name, (_, held) in ours.items()},
        ),
    ]
    rows = []
    for name, row in PAPER.items():
        cells = [f"`{name}`", row[0], row[5]]
        for _, paper, measured in figures:
            cells += [f"{paper[name]:.2f}", f"{measured[name]:.2f}"]
        rows.append(cells)
    header = ["variant", "in the paper", "KV entries there"]
    for title, _, _ in figures:
        header += [f"{title}: paper", "here"]
    orders = [
        f"- {title}: paper {order(paper)}; here {order(measured)}. {disagreements(paper, measured)}"
        for title, paper, measured in figures
    ]
    return table(header, rows) + "\n\nFrom the cheapest to the dearest:\n\n" + "\n".join(orders)


def order(figures: dict[str, float]) -> str:
    return " < ".join(f"`{name}`" for name in sorted(figures, key=lambda name: figures[name]))


def disagreements(paper: dict[str, float], measured: dict[str, float], margin: float = 0.05) -> str:
    """Pairs that the paper and the measurement order differently, each by more than `margin`."""
    pairs = [
        f"`{a}` and `{b}`"
        for a in paper
        for b in paper
        if paper[a] * (1 + margin) < paper[b] and measured[b] * (1 + margin) < measured[a]
    ]
    if not pairs:
        return f"No pair that differs by more than {margin:.0%} in both is in another order."
    return f"In another order, by more than {margin:.0%} in both: {', '.join(pairs)}."


def document(results: dict[str, Any], sizes: Sizes) -> str:
    """docs/variants.md."""
    tokens, text = sizes.image_tokens, sizes.frames * sizes.words
    large_text, fields, used = LARGE.frames * LARGE.words, sizes.text, results["versions"]
    setting = paragraph(f"""\
For Qwen2.5-VL-3B after {LARGE.frames} images of {LARGE.image_tokens} tokens with {LARGE.words} text tokens each:
`T` = {large_text:,}, `W` = {LARGE.words}, `N` = {LARGE.image_tokens}, `I` = {LARGE.image_tokens} where only the
current image is seen and {LARGE.frames * LARGE.image_tokens:,} where all are. Of `a + b` entries per text token, `b`
are there only while the token is in the current window. In parentheses: divided by the source's, which are those of
`insertion`.""")
    spreads = ", ".join(f"{part:.0%} ({stage})" for stage, part in results["spread"].items())
    method = paragraph(f"""\
A Qwen2.5-VL language model of {results["language_model_parameters"] / 1e6:.1f} million parameters with random weights
({fields["num_hidden_layers"]} blocks, hidden size {fields["hidden_size"]}, {fields["num_attention_heads"]} query heads
on {fields["num_key_value_heads"]} key heads), and each variant made from the same weights; float32, `sdpa`, batch size
1, one CPU thread, torch {used["torch"]}, transformers {used["transformers"]}. Image features are made
beforehand for all, so this compares language models alone. The source is `Qwen2_5_VLForConditionalGeneration` with the
image tokens inserted. All models run in one process, one after the other, in {results["rounds"]} rounds. A processor
time is divided by the source's of the same round; the tables show medians. Half of the single ratios are
within {spreads} of their median. Before that, `insertion` gave the source's logits in every stage (largest difference
{results["difference"]:.0e} of the largest logit).""")
    return f"""\
# What each variant costs

Written by `python -m benchmarks.variants --write docs/variants.md`; change that program, not this file. The variants
are explained in [architecture.md](architecture.md).

## Counted

{FORMULAS}

The functions in [benchmarks/counting.py](../benchmarks/counting.py) compute these; the tests compare them with the
parameters of real models, the bytes of real caches, and PyTorch's own FLOP counter.

{setting}

{counted_table(LARGE)}

## Measured

{method}

| stage | |
|---|---|
| prefill | one call: {sizes.frames} images of {tokens} tokens, {sizes.words} text tokens each ({text} in all) |
| decode | {sizes.decoded} further tokens, one call each |
| frame | one call: another image with {sizes.last_words} text tokens, into the cache of the above |
| train | forward and backward pass over {sizes.train_frames} images with their text, logits at text tokens |

Peaks are the most that PyTorch's allocator holds during a stage, above what it held before it (weights are not in it,
new cache entries and gradients are); `cache` is the bytes of keys and values after the last stage with a cache. All
figures are ratios to the source; below 1 is cheaper. In parentheses: the ratio of FLOPs, counted with masked pairs.

{measured_table(results, sizes)}

## Beside the paper's Table 1

The paper's figures (arXiv 2512.19535, Table 1: Helium1-2B on a GPU) divided by its own for insertion, and the measured
ratios from above. Time per frame is `frame`, training memory is `peak: train`, streaming memory is `cache`.

{comparison_tables(results)}

{EXPLANATION}
"""


def counted(sizes: Sizes) -> dict[str, Any]:
    """The counted figures that don't depend on a context, by variant."""
    configs = {name: casa_config(sizes, name) for name in VARIANTS}
    return {
        name: {"added_parameters": added_parameters(config), "entries": asdict(kv_entries(config))}
        for name, config in configs.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the document, docs/variants.md")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of timing (default: 7)")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try the program")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f"--rounds {arguments.rounds} must be at least 1.")
    if arguments.write and not arguments.write.parent.is_dir():
        parser.error(f"--write {arguments.write}: there is no folder {arguments.write.parent}; make it first.")

    torch.set_num_threads(1)
    disable_progress_bar()
    set_verbosity_error()
    sizes = TINY if arguments.tiny else SIZES
    load = os.getloadavg()[0]
    print(f"{platform.platform()}, {os.cpu_count()} CPUs, load {load:.1f}, 1 thread; {versions()}")
    results = measure(sizes, arguments.rounds) | {"versions": versions()}
    print(measured_table(results, sizes))
    if arguments.write:
        write(arguments.write, document(results, sizes))
    print(json.dumps(results | {"counted": counted(sizes)}))


if __name__ == "__main__":
    main()
