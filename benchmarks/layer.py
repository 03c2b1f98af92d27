# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The fusion layer alone, against its roofline and against self-attention.

The layers are timed where they stand: in forwards of a whole model, in the calls of a module and of its projections,
over all blocks and several rounds; medians count. (Queries and keys of fusion and self-attention are rotated together,
outside of both, which isn't counted.) The floor is the larger of two times: that of the FLOPs that are needed
at the speed of a large matrix product, and that of the bytes that must be moved (weights, states, keys and values) at
the speed of a large copy, both measured here first. The rival is the self-attention of the source model with image
tokens inserted.

| stage | one call with |
|---|---|
| prefill | all windows: an image and a few words each |
| decode | one token |
| frame | another image and a few words |

The last line is JSON.

    python -m benchmarks.layer
    python -m benchmarks.layer --device cuda --backends torch_varlen
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.common import (
    Sizes,
    Stream,
    begin,
    choices,
    design,
    legend_below,
    plot_name,
    positive,
    random_source,
    report,
    save_figure,
    source_config,
    start,
    synchronize,
    table,
    timed,
)
from benchmarks.counting import Dimensions
from benchmarks.prefill import BACKENDS, SIZES, Prompt, contenders
from benchmarks.variants import Contestant
from casa_hf import CasaConfig
from casa_hf.design_space import VARIANTS

STAGES = ("prefill", "decode", "frame")
OWN = [name for name in VARIANTS if not CasaConfig.from_variant(name).casa_share_projections]


def fusion_cost(config: CasaConfig, sizes: Sizes, stage: str, itemsize: int) -> tuple[int, int]:
    """FLOPs and bytes that a fusion layer with projections of its own needs in one call.

    A window's text begins at the token that the image precedes; the delimiter before that still sees the image before.
    """
    size, tokens = Dimensions.of(config), sizes.image_tokens
    with_text = config.casa_keys == "window"
    # Calls by window: queries, text keys before them, image tokens they see, image tokens that are new.
    if stage == "decode":
        windows = [(1, sizes.words - 1 + sizes.decoded // 2, tokens, 0)]
    else:
        new = sizes.frames if stage == "prefill" else 1
        words = sizes.words if stage == "prefill" else sizes.last_words
        windows = [(words - 1, 0, tokens, tokens)] * new
    flops = moved = 0
    for queries, before, seen, new_tokens in windows:
        text_keys = queries * before + queries * (queries + 1) // 2 if with_text else 0
        flops += queries * (size.query_output + size.attend(seen)) + size.attend(text_keys)
        flops += (queries * with_text + new_tokens) * size.key_value
        keys = seen + (before + queries) * with_text
        moved += 2 * queries * size.width + new_tokens * size.width + 2 * size.key * keys
    return flops, (moved + size.attention + size.width) * itemsize


def insertion_cost(config: CasaConfig, sizes: Sizes, stage: str, itemsize: int) -> tuple[int, int]:
    """The same for self-attention of the source model, image tokens inserted."""
    size, window = Dimensions.of(config), sizes.words + sizes.image_tokens
    prompt = sizes.frames * window
    before, queries = {
        "prefill": (0, prompt),
        "decode": (prompt + sizes.decoded // 2, 1),
        "frame": (prompt + sizes.decoded, sizes.last_words + sizes.image_tokens),
    }[stage]
    flops = queries * (size.query_output + size.key_value) + size.attend(
        queries * before + queries * (queries + 1) // 2
    )
    moved = 2 * queries * size.width + 2 * size.key * (before + queries) + size.attention
    return flops, moved * itemsize


@contextmanager
def layer_seconds(modules: list[nn.Module], device: torch.device) -> Iterator[list[float]]:
    """Time one forward's calls of each of these modules and of its submodules, also where those are called without it;
    the list is complete when the context has been left. Modules that aren't called are left out."""
    seconds: list[float] = []
    marks: list[list[Any]] = [[] for _ in modules]
    depths = [0] * len(modules)

    def mark(number: int, step: int) -> None:
        if depths[number] + step == (step > 0):  # the outermost call begins or has ended
            if device.type == "cuda":
                event = torch.cuda.Event(enable_timing=True)
                event.record()
                marks[number].append(event)
            else:
                marks[number].append(time.perf_counter())
        depths[number] += step

    hooks = []
    for number, module in enumerate(modules):
        for part in module.modules():
            hooks.append(part.register_forward_pre_hook(lambda *_, number=number: mark(number, 1)))
            hooks.append(part.register_forward_hook(lambda *_, number=number: mark(number, -1)))
    try:
        yield seconds
    finally:
        for hook in hooks:
            hook.remove()
        synchronize(device)
        for own in marks:
            pairs = list(zip(own[::2], own[1::2], strict=True))
            if device.type == "cuda":
                times = [first.elapsed_time(second) / 1e3 for first, second in pairs]
            else:
                times = [second - first for first, second in pairs]
            seconds += [sum(times)] if times else []


def speeds(device: torch.device, dtype: torch.dtype, tiny: bool) -> tuple[float, float]:
    """FLOPs per second of a large matrix product and bytes per second of a large copy, the best of several."""
    side = 64 if tiny else 8192 if device.type == "cuda" else 2048
    square = torch.randn(side, side, device=device, dtype=dtype)
    large = torch.zeros(2**14 if tiny else 2**28, dtype=torch.uint8, device=device)
    product = min(timed(lambda: square @ square, device)[1] for _ in range(10))
    other = torch.empty_like(large)
    copied = min(timed(lambda: other.copy_(large), device)[1] for _ in range(10))
    return 2 * side**3 / product, 2 * large.nbytes / copied


def layers_of(prompt: Prompt) -> dict[str, list[nn.Module]]:
    """The modules to be timed, by kind."""
    blocks = prompt.model.model.language_model.layers
    if not prompt.is_casa:
        return {"self-attention": [block.self_attn for block in blocks]}
    return {"fusion": [block.casa_attn for block in blocks if block.casa_attn is not None]}


def measure(prompt: Prompt, stream: Stream, rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds of a call, by kind of layer and stage.

    Raises:
        RuntimeError: if the model didn't call its layers.
    """
    contestant = Contestant(prompt.model, stream, stream.casa if prompt.is_casa else stream.source, torch.arange)
    seconds: dict[str, dict[str, list[float]]] = {}
    for number in range(rounds + 1):
        for stage in STAGES:
            with ExitStack() as stack:
                found = {
                    kind: stack.enter_context(layer_seconds(modules, stream.ids.device))
                    for kind, modules in layers_of(prompt).items()
                }
                getattr(contestant, stage)()
            for kind, values in found.items():
                if not values:
                    raise RuntimeError(f"{prompt.backend}: the model called none of its {kind} layers in {stage}.")
                if number:  # the first round warms up
                    seconds.setdefault(kind, {}).setdefault(stage, []).extend(values)
    return {kind: {stage: statistics.median(values) for stage, values in own.items()} for kind, own in seconds.items()}


def floors(
    found: dict[str, Prompt], source: Any, sizes: Sizes, speed: tuple[float, float]
) -> dict[str, dict[str, dict[str, float]]]:
    """FLOPs, bytes and the least seconds of a call, by contender and stage."""
    insertion = design(source, "insertion")
    results: dict[str, dict[str, dict[str, float]]] = {}
    for name, prompt in found.items():
        results[name] = {}
        for stage in STAGES:
            if prompt.is_casa:
                flops, moved = fusion_cost(prompt.model.config, sizes, stage, source.dtype.itemsize)
            else:
                flops, moved = insertion_cost(insertion, sizes, stage, source.dtype.itemsize)
            results[name][stage] = {
                "flops": flops,
                "bytes": moved,
                "seconds": max(flops / speed[0], moved / speed[1]),
            }
    return results


def results_table(
    measured: dict[str, dict[str, dict[str, float]]], floor: dict[str, dict[str, dict[str, float]]], absolute: bool
) -> str:
    """By contender and stage: measured time (on a CPU as a multiple of the source's self-attention) and its floor."""
    rows = []
    for name, kinds in measured.items():
        main = "fusion" if "fusion" in kinds else "self-attention"
        for stage in STAGES:
            own, least = kinds[main][stage], floor[name][stage]
            rival = measured["insertion"]["self-attention"][stage]
            rows.append(
                [
                    f"{name}: {main}",
                    stage,
                    f"{1e6 * own:.0f} us" if absolute else f"{own / rival:.2f}",
                    f"{least['flops'] / 1e6:,.1f}",
                    f"{least['bytes'] / 1e6:,.2f}",
                    f"{least['seconds'] / own:.0%}",
                ]
            )
    unit = "" if absolute else ", source's self-attention = 1"
    return table(
        [
            "layer",
            "stage",
            f"time{unit}",
            "MFLOP needed",
            "MB needed",
            "of roofline",
        ],
        rows,
    )


def plot(
    measured: dict[str, dict[str, dict[str, float]]],
    floor: dict[str, dict[str, dict[str, float]]],
    speed: tuple[float, float],
    path: Path,
) -> None:
    """Reached FLOPs per second over FLOPs per byte, under the roofline, as parts of the fastest product."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 6), layout="constrained")
    panel = figure.subplots()
    intensity = [2.0**power for power in range(-3, 12)]
    roof = [min(1.0, x * speed[1] / speed[0]) for x in intensity]
    panel.plot(intensity, roof, color="black", linewidth=1, label="what the machine can do")
    markers = dict(zip(STAGES, "o^s", strict=True))
    colours = {name: f"C{number}" for number, name in enumerate(measured)}
    for name, kinds in measured.items():
        own = kinds["fusion" if "fusion" in kinds else "self-attention"]
        x = [floor[name][stage]["flops"] / floor[name][stage]["bytes"] for stage in STAGES]
        y = [floor[name][stage]["flops"] / own[stage] / speed[0] for stage in STAGES]
        for stage, *place in zip(STAGES, x, y, strict=True):
            label = f"{plot_name(name)}: {stage}"
            panel.scatter(*place, label=label, s=30, color=colours[name], marker=markers[stage], alpha=0.8)
    panel.set(xscale="log", yscale="log", xlabel="FLOPs per byte", ylabel="FLOPs per second, large product = 1")
    legend_below(figure)
    panel.grid(alpha=0.3)
    save_figure(figure, path)


def main() -> None:
    parser = start(__doc__)
    parser.add_argument("--variants", default="casa,ca", help="variants with own projections (default: %(default)s)")
    parser.add_argument("--backends", default="sdpa", help="attention backends (default: %(default)s)")
    parser.add_argument("--windows", type=positive, default=8, help="windows of the prefill (default: %(default)s)")
    parser.add_argument("--rounds", type=positive, default=5, help="rounds of timing (default: %(default)s)")
    arguments = parser.parse_args()
    variants = choices(parser, "--variants", arguments.variants, OWN)
    backends = choices(parser, "--backends", arguments.backends, BACKENDS)
    device = begin(parser, arguments)

    sizes = SIZES["tiny" if arguments.tiny else arguments.device]
    sizes = replace(sizes, frames=arguments.windows, decoded=8, last_words=sizes.words)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    source = random_source(source_config(sizes.text, sizes.vision), device, dtype)
    speed = speeds(device, dtype, arguments.tiny)
    print(f"large matrix product {speed[0] / 1e9:,.0f} GFLOP/s, large copy {speed[1] / 1e9:,.1f} GB/s")
    print(f"{sizes.frames} windows of {sizes.image_tokens} image tokens and {sizes.words} text tokens")
    stream = Stream(sizes, source)
    found, missing = contenders(source, variants, backends, stream)
    for name, reason in missing.items():
        print(f"{name}: not here: {reason}")
    measured = {name: measure(prompt, stream, arguments.rounds) for name, prompt in found.items()}
    floor = floors(found, source, sizes, speed)
    print(results_table(measured, floor, arguments.device == "cuda"))
    if arguments.plot:
        plot(measured, floor, speed, arguments.plot)
    speed_of = {"flops_per_second": speed[0], "bytes_per_second": speed[1]}
    report("layer", device, sizes, **speed_of, seconds=measured, needed=floor, missing=missing)


if __name__ == "__main__":
    main()
