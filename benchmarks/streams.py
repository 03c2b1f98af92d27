# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Many streams at once: each row of a batch has windows of its own, and frames arrive in different turns.

In a turn every stream decodes some tokens; every PERIOD turns it gets a frame before them.

| contender | |
|---|---|
| `one by one` | the streams in a CASA model one after the other |
| `together` | one batch in which all frames arrive in the same turns: the best that a batch can do |
| `staggered` | one batch in which each turn brings frames to a part of the rows; the others continue their text |
| `insertion together` | the source model of the same weights, its best case |

All do the same work, turn by turn in one process. Nothing is measured before `staggered` has given the logits of `one
by one`. A stream keeps up with a camera if its frames per second are at least the camera's. Beside the times stand the
bytes that a decoding step must read. Times on a CPU are for ratios; the last line is JSON.

    python -m benchmarks.streams
    python -m benchmarks.streams --device cuda --attn torch_varlen
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import (
    WORDS,
    begin,
    casa_model,
    choices,
    design,
    gate,
    legend_below,
    plot_name,
    positive,
    random_source,
    report,
    save_figure,
    source_config,
    start,
    table,
    timed,
)
from benchmarks.counting import language_parameters
from benchmarks.streaming import SIZES, Camera, CasaContender, InsertionContender, Sizes, greedy
from casa_hf import CasaConfig, cache_nbytes
from casa_hf.design_space import VARIANTS

RATE_BAR = 2.0  # frames per second and stream, 32 streams on one GPU
IMAGES = 4


class StaggeredContender(CasaContender):
    """A batch of streams whose frames needn't arrive in the same turn."""

    def mixed(self, token: Tensor, pixels: Tensor, rows: list[int]) -> Tensor:
        """One more token of every stream, and frames for some of them.

        Args:
            token: (streams, 1) the last tokens.
            pixels: of the frames, one after the other.
            rows: the streams that they belong to, ascending.
        """
        padding = torch.zeros(len(token), 2, dtype=token.dtype, device=token.device)
        ids, mask = torch.cat([padding, token], dim=1), torch.cat([padding, torch.ones_like(token)], dim=1)
        ids[rows] = torch.cat([token[rows], self.delimiters.expand(len(rows), -1)], dim=1)
        mask[rows] = 1
        return self._forward(
            input_ids=ids,
            attention_mask=mask,
            pixel_values=pixels,
            image_grid_thw=self.grid.expand(len(rows), -1),
            image_positions=torch.tensor([[row, 2] for row in rows]),
        )


@dataclass(frozen=True)
class Fleet:
    """Streams and who runs them.

    Attributes:
        contenders: each runs as many of the streams, in order.
        staggered: whether a stream's frames come in turns of its own, or in the same as the others'.
    """

    contenders: list[Any]
    staggered: bool

    def begin(self, prompts: Tensor) -> None:
        """Start new streams, one for each of the (streams, tokens) prompts."""
        for contender, rows in self._rows(len(prompts)):
            contender.begin(prompts[rows])

    def run_turn(
        self, turn: int, period: int, tokens: Tensor, pixels: list[Tensor], answer: int, words: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """A turn of all streams.

        Args:
            turn: its number.
            period: turns from a stream's frame to its next.
            tokens: (streams, 1) the last token of each.
            pixels: of the frames that the turns can bring.
            answer: tokens to decode.
            words: (streams, answer) tokens to decode in place of the likeliest.

        Returns:
            The last tokens, and the logits that they were chosen from.
        """
        last, logits = [], []
        for contender, rows in self._rows(len(tokens)):
            token = tokens[rows]
            arrivals = [row for row in rows if (turn + row * self.staggered) % period == 0]
            for index in range(answer):
                if index or not arrivals:
                    scores = contender.step(token)
                else:
                    frames = torch.cat([pixels[(turn + row) % len(pixels)] for row in arrivals])
                    everyone = len(arrivals) == len(rows)
                    places = [row - rows[0] for row in arrivals]
                    scores = contender.frame(token, frames) if everyone else contender.mixed(token, frames, places)
                token = greedy(scores) if words is None else words[rows, index : index + 1]
            last.append(token)
            logits.append(scores)
        return torch.cat(last), torch.cat(logits)

    def _rows(self, streams: int) -> list[tuple[Any, list[int]]]:
        each = streams // len(self.contenders)
        return [(c, list(range(i * each, (i + 1) * each))) for i, c in enumerate(self.contenders)]


@torch.no_grad()
def run(
    fleets: dict[str, Fleet],
    sizes: Sizes,
    streams: int,
    period: int,
    device: torch.device,
    dtype: torch.dtype,
    forced: bool = False,
) -> dict[str, tuple[list[float], Tensor]]:
    """Run the streams of all fleets.

    Args:
        fleets: by name.
        sizes: of model and streams.
        streams: how many.
        period: turns from a stream's frame to its next.
        device, dtype: of the models.
        forced: whether all streams decode random words.

    Returns:
        By fleet, seconds of every turn and the last logits.
    """
    generator = torch.Generator().manual_seed(0)

    def random_words(count: int) -> Tensor:
        return torch.randint(WORDS, sizes.text["vocab_size"], (streams, count), generator=generator).to(device)

    camera, prompts = Camera(sizes), random_words(sizes.prompt)
    pixels = [camera.pixels(camera.image(number)).to(device, dtype) for number in range(IMAGES)]
    tokens = dict.fromkeys(fleets, prompts[:, -1:])
    seconds: dict[str, list[float]] = {name: [] for name in fleets}
    logits = {}
    for fleet in fleets.values():
        fleet.begin(prompts)
    for turn in range(sizes.turns):
        words = random_words(sizes.answer) if forced else None
        for name, fleet in fleets.items():
            action = _turn(fleet, turn, period, tokens[name], pixels, sizes.answer, words)
            (tokens[name], logits[name]), taken = timed(action, device)
            seconds[name].append(taken)
    return {name: (seconds[name], logits[name]) for name in fleets}


def _turn(fleet: Fleet, *arguments: Any) -> Callable[[], tuple[Tensor, Tensor]]:
    return lambda: fleet.run_turn(*arguments)


def step_bytes(contender: Any, turn: int, streams: int) -> int:
    """Bytes that a decoding step of a batch must read: weights once, and every stream's cache."""
    config = contender.model.config
    if not isinstance(config, CasaConfig):
        config = design(contender.model, "insertion")
    weights = language_parameters(config) * contender.model.dtype.itemsize
    return weights + streams * (contender.predict(turn)["decode_bytes"] - weights)


def summary(
    fleets: dict[str, Fleet], results: dict[str, tuple[list[float], Tensor]], sizes: Sizes, streams: int, period: int
) -> dict[str, dict[str, float]]:
    """The figures of every fleet; the first period of turns warms up."""
    found = {}
    for name, (seconds, _) in results.items():
        counted = seconds[period:]
        batch = streams // len(fleets[name].contenders)
        caches = [cache_nbytes(contender.cache) for contender in fleets[name].contenders]
        found[name] = {
            "tokens_per_s": streams * sizes.answer * len(counted) / sum(counted),
            "frames_per_s_and_stream": len(counted) / period / sum(counted),
            "cache_bytes": sum(sum(held.values()) for held in caches),
            "predicted_step_bytes": step_bytes(fleets[name].contenders[0], max(1, sizes.turns // period), batch),
        }
    return found


def results_table(figures: dict[str, dict[str, float]], absolute: bool) -> str:
    """Throughput as a multiple of one by one's if not absolute."""
    unit = 1.0 if absolute else figures["one by one"]["tokens_per_s"]
    rows = [
        [
            name,
            f"{own['tokens_per_s'] / unit:,.2f}",
            f"{own['frames_per_s_and_stream']:.2f}" if absolute else "",
            f"{own['cache_bytes'] / 1e6:,.1f}",
            f"{own['predicted_step_bytes'] / 1e6:,.0f}",
        ]
        for name, own in figures.items()
    ]
    header = "tokens/s" if absolute else "throughput, one by one = 1"
    return table(["contender", header, "frames/s of each stream", "caches, MB", "MB read per step, predicted"], rows)


def plot(results: dict[str, tuple[list[float], Tensor]], period: int, absolute: bool, path: Path) -> None:
    """Median and longest time of a turn, for each way to serve the streams."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    panel = figure.subplots()
    first = results["one by one"][0][period:]
    unit = 1e-3 if absolute else sum(first) / len(first)
    turns = {plot_name(name): [value / unit for value in seconds[period:]] for name, (seconds, _) in results.items()}
    places = range(len(turns))
    panel.barh(
        [place - 0.2 for place in places], [statistics.median(own) for own in turns.values()], 0.4, label="median turn"
    )
    panel.barh([place + 0.2 for place in places], [max(own) for own in turns.values()], 0.4, label="longest turn")
    panel.set_yticks(places, turns)
    panel.invert_yaxis()
    panel.set_xlabel("ms" if absolute else "mean turn, one by one = 1")
    panel.grid(alpha=0.3, axis="x")
    legend_below(figure)
    save_figure(figure, path)


def main() -> None:
    parser = start(__doc__)
    parser.add_argument("--streams", type=positive, help="how many (default: 8, on a GPU 32)")
    parser.add_argument("--period", type=positive, default=2, help="turns from frame to frame (default: %(default)s)")
    parser.add_argument("--turns", type=positive, default=12, help="turns (default: %(default)s)")
    parser.add_argument("--answer", type=positive, default=5, help="tokens per turn (default: %(default)s)")
    parser.add_argument("--variant", default="casa", help="CASA model (default: %(default)s)")
    parser.add_argument("--attn", default="sdpa", help="attn_implementation of CASA (default: %(default)s)")
    parser.add_argument("--source-attn", default="sdpa", help="and of the source (default: %(default)s)")
    arguments = parser.parse_args()
    (variant,) = choices(parser, "--variant", arguments.variant, VARIANTS)
    period, turns = arguments.period, arguments.turns
    if turns <= period:
        parser.error(f"--turns {turns} must be more than --period {period}: the first period warms up.")
    device = begin(parser, arguments)

    streams = arguments.streams or (32 if arguments.device == "cuda" else 8)
    sizes = replace(SIZES["tiny" if arguments.tiny else arguments.device], turns=turns, answer=arguments.answer)
    if arguments.device == "cuda" and not arguments.tiny:
        sizes = replace(sizes, frame=448)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    source = random_source(source_config(sizes.text, sizes.vision), device, dtype, arguments.source_attn)
    model = casa_model(source, variant, arguments.attn)
    fleets = {
        "one by one": Fleet([CasaContender(model, sizes) for _ in range(streams)], staggered=True),
        "together": Fleet([CasaContender(model, sizes)], staggered=False),
        "staggered": Fleet([StaggeredContender(model, sizes)], staggered=True),
        "insertion together": Fleet([InsertionContender(source, sizes)], staggered=False),
    }
    print(
        f"{streams} streams, {turns} turns of {sizes.answer} tokens, a frame of {sizes.frame_tokens} tokens every "
        f"{period} turns; {variant}"
    )
    checked = replace(sizes, turns=period + 1)
    forced = run(
        {name: fleets[name] for name in ("one by one", "staggered")}, checked, streams, period, device, dtype, True
    )
    error = gate("staggered", forced["staggered"][1], forced["one by one"][1], dtype)
    print(f"staggered = one by one, largest difference: {error:.1e}")
    results = run(fleets, sizes, streams, period, device, dtype)
    figures = summary(fleets, results, sizes, streams, period)
    absolute = arguments.device == "cuda"
    print(results_table(figures, absolute))
    if absolute and not arguments.tiny:
        rate = figures["staggered"]["frames_per_s_and_stream"]
        verdict = "met" if rate >= RATE_BAR else "not met"
        print(f"frames/s of each of {streams} streams: {rate:.2f} (bar {RATE_BAR}): {verdict}")
    if arguments.plot:
        plot(results, period, absolute, arguments.plot)
    report(
        "streams",
        device,
        sizes,
        streams={"number": streams, "period": period, "variant": variant},
        attn={"casa": arguments.attn, "source": arguments.source_attn},
        difference=error,
        figures=figures,
        turns={name: seconds for name, (seconds, _) in results.items()},
    )


if __name__ == "__main__":
    main()
