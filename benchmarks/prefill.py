# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Prefill of 1 to 64 windows in one call, with every attention backend, against token insertion.

A window is an image and a few words. Image features are made beforehand for all, so language models are compared.
Each number of windows is run by the source model and by every CASA contender in turn, several rounds; medians count.
A backend that can't run here is named with its reason. Nothing is measured before all backends of a variant have
given the logits of the first. What must be linear is checked: but for `eager`, the plain reference, 64 windows take at
most 9 times the time and memory of 8. Beside the times stand the FLOPs that are needed (pairs outside windows left
out). The last line is JSON.

    python -m benchmarks.prefill
    python -m benchmarks.prefill --device cuda --backends sdpa,flex_attention,torch_varlen
"""

from __future__ import annotations

import functools
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import (
    LARGE_TEXT,
    LARGE_VISION,
    SMALL_TEXT,
    SMALL_VISION,
    TINY_TEXT,
    TINY_VISION,
    Sizes,
    Stream,
    begin,
    casa_model,
    choices,
    design,
    gate,
    legend_below,
    numbers,
    peak_bytes,
    plot_name,
    positive,
    random_source,
    report,
    save_figure,
    source_config,
    start,
    table,
    timed,
    with_peak,
)
from benchmarks.counting import head_flops, image_flops, text_flops
from casa_hf import CasaConfig
from casa_hf.design_space import VARIANTS

BACKENDS = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "torch_varlen")
LINEAR_BAR = 9


def stream_sizes(text: dict[str, Any], vision: dict[str, Any], side: int, words: int) -> Sizes:
    """A conversation; the number of its images is set later."""
    return Sizes(text, vision, frames=1, train_frames=0, side=side, words=words, decoded=0, last_words=2)


SIZES = {
    "cpu": stream_sizes(SMALL_TEXT, SMALL_VISION, side=16, words=16),
    "cuda": stream_sizes(LARGE_TEXT, LARGE_VISION, side=32, words=16),
    "tiny": stream_sizes(TINY_TEXT, TINY_VISION, side=4, words=5),
}


def prefill_flops(config: CasaConfig, windows: int, tokens: int, words: int) -> int:
    """FLOPs of a prompt, output head of one token included: the mean token sees half of the text.

    Args:
        config: of the variant; `insertion` for the source.
        windows: images in the prompt.
        tokens: of an image.
        words: text tokens of a window.
    """
    text = windows * words
    everything = config.casa_image_history == "all"
    seen = windows * tokens // 2 if everything else tokens
    of_text = text * text_flops(config, text // 2, words // 2, seen)
    return of_text + windows * image_flops(config, tokens, text // 2, seen) + head_flops(config)


class Prompt:
    """A contender and its prompts.

    Args:
        model: the source or a CASA model.
        backend: its `attn_implementation`.
    """

    def __init__(self, model: Any, backend: str):
        self.model = model
        self.backend = backend
        self.is_casa = isinstance(model.config, CasaConfig)

    @torch.no_grad()
    def run(self, stream: Stream) -> Tensor:
        """The logits after the prompt."""
        inputs = (stream.casa if self.is_casa else stream.source)(0, stream.prompt)
        return self.model(**inputs, use_cache=True, logits_to_keep=1).logits


def contenders(
    source: Any, variants: list[str], backends: list[str], stream: Stream
) -> tuple[dict[str, Prompt], dict[str, str]]:
    """The source, and each variant with each backend that runs here; the others with the reason.

    Raises:
        RuntimeError: if a backend's logits differ from the first's by more than its dtype explains.
    """
    found, missing = {"insertion": Prompt(source, "sdpa")}, {}
    for variant in variants:
        expected = None
        for backend in backends:
            name = f"{variant} {backend}"
            try:
                found[name] = Prompt(casa_model(source, variant, backend), backend)
                logits = found[name].run(stream).float()
            except (ImportError, NotImplementedError, RuntimeError, ValueError) as error:
                missing[name] = str(error).split(". ")[0]
                found.pop(name, None)
                continue
            if expected is not None:
                gate(name, logits, expected, source.dtype)
            expected = logits if expected is None else expected
    return found, missing


def measure(
    source: Any, found: dict[str, Prompt], sizes: Sizes, counts: list[int], rounds: int
) -> dict[str, dict[int, dict[str, float]]]:
    """Seconds, peak bytes and needed FLOPs by contender and number of windows."""
    results: dict[str, dict[int, dict[str, float]]] = {name: {} for name in found}
    device, insertion = source.device, design(source, "insertion")
    for count in counts:
        stream = Stream(replace(sizes, frames=count), source)
        seconds: dict[str, list[float]] = {name: [] for name in found}
        for number in range(rounds + 1):
            for name, prompt in found.items():
                _, taken = timed(functools.partial(prompt.run, stream), device)
                if number:  # the first round warms up
                    seconds[name].append(taken)
        for name, prompt in found.items():
            run = functools.partial(prompt.run, stream)
            peak = with_peak(run, device)[1] if device.type == "cuda" else peak_bytes({"prompt": run})["prompt"]
            config = prompt.model.config if prompt.is_casa else insertion
            results[name][count] = {
                "seconds": statistics.median(seconds[name]),
                "peak_bytes": peak,
                "flops": prefill_flops(config, count, sizes.image_tokens, sizes.words),
            }
        print(f"{count} windows: insertion {1e3 * results['insertion'][count]['seconds']:.1f} ms", flush=True)
    return results


def linearity(results: dict[str, dict[int, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Time and memory of 64 windows divided by those of 8, of what must be linear."""
    return {
        name: {key: by_count[64][key] / by_count[8][key] for key in ("seconds", "peak_bytes")}
        for name, by_count in results.items()
        if name != "insertion" and not name.endswith(" eager") and {8, 64} <= by_count.keys()
    }


def results_table(results: dict[str, dict[int, dict[str, float]]], absolute: bool) -> str:
    """Time (as a multiple of insertion's if not absolute), memory, and FLOPs in parentheses."""
    counts = list(results["insertion"])
    rows = []
    for name, by_count in results.items():
        cells = [name]
        for count in counts:
            own, rival = by_count[count], results["insertion"][count]
            figure = f"{1e3 * own['seconds']:.1f} ms" if absolute else f"{own['seconds'] / rival['seconds']:.2f}"
            cells.append(f"{figure}, {own['peak_bytes'] / 1e6:,.0f} MB ({own['flops'] / rival['flops']:.2f})")
        rows.append(cells)
    unit = "ms" if absolute else "insertion = 1"
    return table([f"time ({unit}), peak, (FLOPs / insertion's)", *(f"{count} windows" for count in counts)], rows)


def plot(results: dict[str, dict[int, dict[str, float]]], absolute: bool, path: Path) -> None:
    """Time and memory by number of windows."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axes = figure.subplots(1, 2)
    smallest = min(results["insertion"])
    for panel, key, title in zip(axes, ("seconds", "peak_bytes"), ("time", "peak memory"), strict=True):
        unit = 1.0 if absolute or key == "peak_bytes" else results["insertion"][smallest]["seconds"]
        scale = 1e6 if key == "peak_bytes" else unit
        for name, by_count in results.items():
            panel.plot(
                list(by_count), [own[key] / scale for own in by_count.values()], label=plot_name(name), marker="."
            )
        panel.set(title=title, xlabel="windows", xscale="log", yscale="log")
        seconds = "s" if absolute else f"source, {smallest} window = 1"
        panel.set_ylabel("MB" if key == "peak_bytes" else seconds)
        panel.grid(alpha=0.3)
    legend_below(figure)
    save_figure(figure, path)


def main() -> None:
    parser = start(__doc__)
    parser.add_argument("--variants", default="casa,ca", help="CASA contenders (default: %(default)s)")
    parser.add_argument("--backends", default=",".join(BACKENDS), help="attention backends (default: all)")
    parser.add_argument("--windows", default="1,2,4,8,16,32,64", help="numbers of windows (default: %(default)s)")
    parser.add_argument("--rounds", type=positive, default=5, help="rounds of timing (default: %(default)s)")
    arguments = parser.parse_args()
    variants = choices(parser, "--variants", arguments.variants, VARIANTS)
    backends = choices(parser, "--backends", arguments.backends, BACKENDS)
    counts = numbers(parser, "--windows", arguments.windows)
    device = begin(parser, arguments)

    sizes = SIZES["tiny" if arguments.tiny else arguments.device]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    source = random_source(source_config(sizes.text, sizes.vision), device, dtype)
    print(
        f"windows of an image of {sizes.image_tokens} tokens and {sizes.words} text tokens, {arguments.rounds} rounds"
    )
    found, missing = contenders(source, variants, backends, Stream(replace(sizes, frames=3), source))
    for name, reason in missing.items():
        print(f"{name}: not here: {reason}")
    results = measure(source, found, sizes, counts, arguments.rounds)
    absolute = arguments.device == "cuda"
    print(results_table(results, absolute))
    linear = linearity(results)
    for name, ratios in linear.items():
        met = max(ratios.values()) <= LINEAR_BAR
        print(
            f"{name}: 64 windows / 8 windows: time {ratios['seconds']:.2f}, memory {ratios['peak_bytes']:.2f} "
            f"(bar {LINEAR_BAR}): {'met' if met else 'not met'}"
        )
    if arguments.plot:
        plot(results, absolute, arguments.plot)
    report("prefill", device, sizes, results=results, missing=missing, linearity=linear)


if __name__ == "__main__":
    main()
