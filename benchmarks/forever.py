# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""A stream that doesn't end: whether memory and time per frame stay what they are, by the slopes of straight lines.

A turn is one frame and a few greedy tokens on a persistent cache, as in benchmarks/streaming.py; the text per frame is
short and the frames are small, because what grows, if anything does, is the text.

| contender | turns | |
|---|---|---|
| `bounded` | all | CASA; text beyond `--max-text-tokens` tokens is evicted, and positions are counted from scratch |
| `insertion-last-4` | half | token insertion; keys/values of all but the last 4 frames are dropped, the text stays |
| `insertion` | 256 | token insertion |
| `unbounded` | all | CASA; all text stays |

What lies beyond the turns of a contender is a line through them, and marked so. They run one after the other, each in
a process of its own, so that nobody's memory is another's (with `--tiny` in this one). Slopes are least squares over
the means of blocks of turns: neighbouring turns share the state of the machine, and text reaches its limit and is
evicted many times in a block. Intervals are those of Student's t at 95 %; what must be flat is judged by wider ones,
which hold together at 95 %. The first turns, before the text reaches its limit, are no part of a slope. Nothing is
measured before the streams have given the logits of one call on everything, and the keys that an eviction moved are
those of a cache that never held more. The memory that is measured is what the process has in use; with `--device cuda`
what PyTorch has allocated on the GPU (`torch.cuda.memory_allocated`). The exit code is 1 if something doesn't hold
that must; `--tiny`, which is a try, judges bytes but no slopes. The last line is JSON.

    python -m benchmarks.forever --plot docs/images/forever-cpu.svg
"""

from __future__ import annotations

import math
import multiprocessing
import statistics
import sys
from array import array
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from benchmarks.common import (
    LARGE_TEXT,
    LARGE_VISION,
    SMALL_TEXT,
    SMALL_VISION,
    TINY_TEXT,
    TINY_VISION,
    WORDS,
    allocated_bytes,
    begin,
    gate,
    legend_below,
    plot_name,
    positive,
    process_bytes,
    report,
    save_figure,
    start,
    table,
)
from benchmarks.counting import cache_bytes
from benchmarks.streaming import Camera, CasaContender, Contender, check, contenders, run_turn
from benchmarks.streaming import Sizes as StreamSizes
from casa_hf import CasaConfig, CasaForConditionalGeneration, cache_nbytes

CHECKED_TURNS = 6
KEPT_FRAMES = 4
IMAGES = 8  # shown in turn
# What must be level in a bounded stream, judged by slopes.
FLAT = {"turn_ms": "time per turn", "cache": "cache", "allocated": "cache with its room"}
# Of a process's memory, which is taken from the system in steps: a single one, early or late, makes a slope.
MAX_RISE = 0.01
MAX_SLOWER = 0.2  # an interval that reaches further is no evidence that time is flat
SPARE_SLOTS = 64  # that growing keys and values have behind them, or a quarter of their own


@dataclass(frozen=True)
class Sizes(StreamSizes):
    """As in benchmarks/streaming.py, and:

    Attributes:
        insertion_turns: turns of token insertion.
        windowed_turns: turns of token insertion that drops old frames.
        max_text_tokens: text tokens of the bounded stream, prompt included.
        blocks: number of means that a line is laid through.
    """

    insertion_turns: int = 256
    windowed_turns: int = 5_000
    max_text_tokens: int = 512
    blocks: int = 50

    def turns_of(self, name: str) -> int:
        """Turns of a contender."""
        fewer = {"insertion": self.insertion_turns, f"insertion-last-{KEPT_FRAMES}": self.windowed_turns}
        return min(self.turns, fewer.get(name, self.turns))

    @property
    def settled(self) -> int:
        """The first turn that is part of a slope: the window has been full and was emptied for the first time."""
        return min(self.turns // 4, 2 * self.max_text_tokens // self.turn_text)


# A sixth of the parameters of the other benchmarks' small model: what grows is read again for each of 40,000 tokens.
_TEXT = SMALL_TEXT | {
    "hidden_size": 256,
    "intermediate_size": 792,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SIZES = {
    "cpu": Sizes(_TEXT, SMALL_VISION | {"out_hidden_size": 256}, frame=224, turns=10_000, answer=3),
    "cuda": Sizes(LARGE_TEXT, LARGE_VISION, frame=448, turns=10_000, answer=5, max_text_tokens=1024),
    "tiny": Sizes(
        TINY_TEXT,
        TINY_VISION,
        frame=32,
        turns=60,
        prompt=5,
        answer=3,
        insertion_turns=12,
        max_text_tokens=40,
        blocks=10,
    ),
}


class BoundedContender(CasaContender):
    """A CASA model that forgets old text before a frame, by blocks of a quarter of what isn't the prompt."""

    def __init__(self, model: CasaForConditionalGeneration, sizes: Sizes):
        super().__init__(model, sizes)
        self.window = sizes.max_text_tokens

    def frame(self, token: Tensor, pixels: Tensor) -> Tensor:
        if self.kv_tokens() > self.window:
            keep = self.window - (self.window - self.sizes.prompt) // 4
            self.model.evict_text(self.cache, keep, self.sizes.prompt)
        return super().frame(token, pixels)


def contender(name: str, variant: str, sizes: Sizes, device: torch.device, attention: str) -> Contender:
    """A contender by its name, on random weights that all share."""
    variants = [] if name.startswith("insertion") else [variant]
    found = contenders(sizes, variants, [KEPT_FRAMES], device, attention, "sdpa")
    if name == "bounded":
        return BoundedContender(found[variant].model, sizes)
    return found[variant if name == "unbounded" else name]


# ---------------------------------------------------------------- measured


@dataclass
class Record:
    """What is measured of one contender, by turn.

    Attributes:
        turn_ms: milliseconds from a frame's pixels to the last of its tokens.
        cache: bytes of the cache's content after the turn.
        allocated: bytes of the memory that holds it, room for more included.
        resident: bytes of memory in use: of the process, or allocated on the GPU; 0 where the system doesn't say.
        kv_tokens: tokens in the sequence after the last turn.
        predicted: bytes of content that the cache must have after the last turn, all text kept; 0 for insertion.
        most: bytes that may be allocated after any turn, room included; 0 for insertion.
    """

    turn_ms: list[float]
    cache: list[int]
    allocated: list[int]
    resident: list[int]
    kv_tokens: int = 0
    predicted: int = 0
    most: int = 0


def resident_bytes(device: torch.device) -> int:
    """Memory that is in use: allocated on the GPU, or of this process; 0 where /proc doesn't tell."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return process_bytes()


def most_bytes(config: CasaConfig, itemsize: int, text: int, window: int, image: int) -> int:
    """Bytes that a growing cache may allocate for so many tokens: a quarter more, or room for 64.

    Arguments as in `cache_bytes`.
    """
    spare = cache_bytes(config, itemsize, SPARE_SLOTS, SPARE_SLOTS, 0)
    return cache_bytes(config, itemsize, text, window, image) * 5 // 4 + spare


@torch.no_grad()
def run(contender: Contender, sizes: Sizes, turns: int) -> Record:
    """Run the stream."""
    generator = torch.Generator().manual_seed(1)
    model, camera = contender.model, Camera(sizes)
    prompt = torch.randint(WORDS, sizes.text["vocab_size"], (1, sizes.prompt), generator=generator)
    pixels = [camera.pixels(camera.jpeg(turn)).to(model.device, model.dtype) for turn in range(IMAGES)]
    contender.begin(prompt.to(model.device))
    token = prompt[:, -1:].to(model.device)
    # Places that are there from the start: what is measured is the memory of the stream, not of its record.
    turn_ms, cache, allocated, resident = (array("d", [1.0]) * turns for _ in range(4))
    for turn in range(turns):
        token, first, per_token = run_turn(contender, token, pixels[turn % IMAGES], sizes.answer)
        turn_ms[turn] = first + (sizes.answer - 1) * per_token
        cache[turn] = sum(cache_nbytes(contender.cache).values())
        allocated[turn] = allocated_bytes(contender.cache)
        resident[turn] = resident_bytes(model.device)
    record = Record(list(turn_ms), *([int(held) for held in counted] for counted in (cache, allocated, resident)))
    record.kv_tokens = contender.kv_tokens()
    if isinstance(contender, CasaContender):
        text = sizes.prompt + turns * sizes.turn_text - 1
        rest = (sizes.answer, sizes.frame_tokens)
        record.predicted = cache_bytes(model.config, model.dtype.itemsize, text, *rest)
        if isinstance(contender, BoundedContender):
            text = min(text, sizes.max_text_tokens + sizes.turn_text)
        record.most = most_bytes(model.config, model.dtype.itemsize, text, *rest)
    return record


def run_alone(name: str, variant: str, sizes: Sizes, device: str, attention: str, threads: int) -> Record:
    """Run a contender in a process of its own."""
    torch.set_num_threads(threads)
    disable_progress_bar()
    set_verbosity_error()
    return run(contender(name, variant, sizes, torch.device(device), attention), sizes, sizes.turns_of(name))


@torch.no_grad()
def check_eviction(model: CasaForConditionalGeneration, sizes: Sizes) -> float:
    """Compare the keys that an eviction leaves in the first block, which depend on token and position alone, with
    those of a cache that was only given what stays."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(WORDS, sizes.text["vocab_size"], (1, sizes.max_text_tokens), generator=generator).to(
        model.device
    )
    moved, fresh = DynamicCache(config=model.config), DynamicCache(config=model.config)
    model(ids, cache=moved)
    kept = model.evict_text(moved, (sizes.max_text_tokens + sizes.prompt) // 2, sizes.prompt)
    model(ids[:, kept[0]], cache=fresh)
    return gate("keys after an eviction", moved.layers[0].keys, fresh.layers[0].keys, model.dtype)


# ---------------------------------------------------------------- judged


@dataclass(frozen=True)
class Line:
    """A straight line through values, by least squares over the means of blocks.

    Attributes:
        slope: per turn.
        low, high: ends of its 95 % interval.
        widest: half the width of an interval by which several lines are judged that together hold at 95 %.
        mean: of the values.
        turns: that the values cover.
    """

    slope: float
    low: float
    high: float
    widest: float
    mean: float
    turns: int

    @property
    def flat(self) -> bool:
        """Whether the slope isn't different from 0."""
        return abs(self.slope) <= self.widest

    def level(self, turns: int, most: float) -> bool:
        """Whether the values, by the upper end of the interval, rise by less than a share in so many turns."""
        return self.over(turns)[2] < most

    def over(self, turns: int) -> tuple[float, float, float]:
        """What the line and the ends of its interval rise by over so many turns, in parts of the mean."""
        return tuple(value * turns / self.mean if self.mean else 0.0 for value in (self.slope, self.low, self.high))


def line(values: list[float] | list[int], blocks: int, judged: int = 1) -> Line:
    """The line through values by turn.

    Args:
        values: by turn.
        blocks: number of means that the line is laid through.
        judged: number of lines whose intervals are to hold together at 95 %.

    Raises:
        ValueError: if there are fewer than three blocks.
    """
    size = max(1, len(values) // blocks)
    means = [statistics.fmean(values[i : i + size]) for i in range(0, len(values) - size + 1, size)]
    if len(means) < 3:
        raise ValueError(f"{len(values)} turns give {len(means)} blocks; a line with an interval needs 3.")
    places = [size * (index + 0.5) for index in range(len(means))]
    slope, intercept = statistics.linear_regression(places, means)
    residual = sum((mean - intercept - slope * place) ** 2 for place, mean in zip(places, means, strict=True))
    spread = sum((place - statistics.fmean(places)) ** 2 for place in places)
    freedom = len(means) - 2
    error = math.sqrt(residual / freedom / spread)
    half, widest = (student_t(freedom, 0.05 / tests) * error for tests in (1, judged))
    return Line(slope, slope - half, slope + half, widest, statistics.fmean(means), len(values))


def student_t(freedom: int, outside: float = 0.05) -> float:
    """The point of Student's t beyond which, on both sides together, a share of `outside` lies.

    Exact for 1 and 2 degrees of freedom, else by the expansion around the normal one (Abramowitz and Stegun, 26.7.5).
    """
    if freedom == 1:
        return math.tan(math.pi * (1 - outside) / 2)
    if freedom == 2:
        return (1 - outside) * math.sqrt(2 / (1 - (1 - outside) ** 2))
    z = statistics.NormalDist().inv_cdf(1 - outside / 2)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))


def lines(records: dict[str, Record], sizes: Sizes) -> dict[str, dict[str, Line]]:
    """By contender and figure, its line."""
    found = {}
    for name, record in records.items():
        skipped = min(sizes.settled, len(record.turn_ms) // 4)
        figures = {name: getattr(record, name) for name in ("turn_ms", "cache", "allocated", "resident")}
        found[name] = {key: line(values[skipped:], sizes.blocks, len(FLAT)) for key, values in figures.items()}
    return found


def judgements(
    records: dict[str, Record], found: dict[str, dict[str, Line]], slopes: bool
) -> list[tuple[str, str, bool]]:
    """What must hold: contender, what, and whether it does.

    Args:
        records: by contender.
        found: their lines.
        slopes: whether the streams were long enough to judge slopes. Memory in use is judged where it was measured,
            and of `unbounded`, which may grow, never.
    """
    bounded, unbounded = found["bounded"], records["unbounded"]
    last = unbounded.cache[-1]
    judged = []
    if slopes:
        turns = len(records["bounded"].turn_ms)
        judged += [("bounded", f"{what}: slope not different from 0", bounded[key].flat) for key, what in FLAT.items()]
        slower = bounded["turn_ms"].level(turns, MAX_SLOWER)
        judged.append(("bounded", f"time per turn: rises by less than {MAX_SLOWER:.0%}", slower))
    if slopes and bounded["resident"].mean:
        level = bounded["resident"].level(turns, MAX_RISE)
        judged.append(("bounded", f"memory: rises by less than {MAX_RISE:.0%}", level))
    judged.append(
        ("unbounded", f"cache of {last:,} bytes: {unbounded.predicted:,} predicted", last == unbounded.predicted)
    )
    for name in ("bounded", "unbounded"):
        most, allowed = max(records[name].allocated), records[name].most
        judged.append((name, f"at most {most:,} bytes allocated: {allowed:,} allowed", most <= allowed))
    return judged


def lines_table(records: dict[str, Record], found: dict[str, dict[str, Line]], turns: int, absolute: bool) -> str:
    """Slopes, as rises over the whole stream; times as multiples of the bounded stream's if not absolute."""
    unit = 1.0 if absolute else found["bounded"]["turn_ms"].mean
    rows = []
    for name, own in found.items():
        record = records[name]
        extrapolated = ", extrapolated" if len(record.turn_ms) < turns else ""
        rises = [
            f"{rise:+.1%} [{low:+.1%}, {high:+.1%}]{extrapolated}"
            for rise, low, high in (own[key].over(turns) for key in ("turn_ms", "cache", "allocated", "resident"))
        ]
        first, last = own["turn_ms"].mean / unit, own["turn_ms"].slope / unit
        speed = [f"{len(record.cache):,}", f"{first:.2f}", f"{1000 * last:+.4f}"]
        rows.append([f"`{name}`", *speed, f"{record.kv_tokens:,}", f"{record.cache[-1] / 1e6:,.2f}", *rises])
    what = "ms" if absolute else "CASA, bounded text = 1"
    over = f"rise over {turns:,} turns, part of the mean [95 %]"
    header = ["contender", "turns", f"time per turn, {what}", "per 1,000 turns", "KV tokens", "cache, MB"]
    memory = "allocated on the GPU" if absolute else "process"
    return table([*header, f"time: {over}", "cache", "cache with its room", memory], rows)


def plot(
    records: dict[str, Record], found: dict[str, dict[str, Line]], sizes: Sizes, absolute: bool, path: Path
) -> None:
    """Time per turn and bytes of the cache by turn; lines beyond what was run are dashed."""
    from matplotlib.figure import Figure

    unit = 1.0 if absolute else found["bounded"]["turn_ms"].mean
    figure = Figure(figsize=(9, 4.4), layout="constrained")
    panels = zip(figure.subplots(1, 2), ("turn_ms", "cache"), (unit, 1e6), strict=True)
    for panel, key, scale in panels:
        for name, record in records.items():
            values = getattr(record, key)
            size = max(1, len(values) // (4 * sizes.blocks))
            blocks = [values[i : i + size] for i in range(0, len(values), size)]
            places = [size * (index + 0.5) for index in range(len(blocks))]
            medians = [statistics.median(block) / scale for block in blocks]
            [drawn] = panel.plot(places, medians, label=plot_name(name), linewidth=1.2)
            if len(values) < sizes.turns:
                own = found[name][key]
                begin = own.mean - own.slope * own.turns / 2 - own.slope * (len(values) - own.turns)
                ends = [len(values), sizes.turns]
                panel.plot(
                    ends,
                    [(begin + own.slope * end) / scale for end in ends],
                    color=drawn.get_color(),
                    linestyle="--",
                    linewidth=1.0,
                    label=f"{plot_name(name)}, extrapolated",
                )
        panel.set(xlabel="turn", xscale="log", yscale="log", xlim=(1, None))
        panel.grid(alpha=0.3)
    figure.axes[0].set(title="time per turn", ylabel="ms" if absolute else "bounded = 1")
    figure.axes[1].set(title="keys and values", ylabel="MB")
    legend_below(figure)
    save_figure(figure, path)


def main() -> None:
    parser = start(__doc__)
    parser.add_argument("--turns", type=positive, help="turns of the stream (default: 10,000)")
    parser.add_argument("--max-text-tokens", type=positive, help="text tokens that the bounded stream keeps")
    parser.add_argument("--variant", choices=("casa", "casa-shared", "ca", "ca-shared"), default="casa")
    parser.add_argument("--attn", default="sdpa", help="attn_implementation of CASA (default: %(default)s)")
    arguments = parser.parse_args()
    sizes = SIZES["tiny" if arguments.tiny else arguments.device]
    given = {"turns": arguments.turns, "max_text_tokens": arguments.max_text_tokens}
    sizes = replace(sizes, **{name: value for name, value in given.items() if value})
    least = sizes.prompt + sizes.turn_text
    if sizes.max_text_tokens < least:
        parser.error(
            f"--max-text-tokens {sizes.max_text_tokens} must be at least {least}: the prompt and the text of a turn."
        )
    if sizes.turns < 12:
        parser.error(f"--turns {sizes.turns} must be at least 12, for lines with intervals.")
    device = begin(parser, arguments)

    models = contenders(sizes, [arguments.variant], [KEPT_FRAMES], device, arguments.attn, "sdpa")
    errors = check(models, sizes, Camera(sizes), CHECKED_TURNS)
    errors["bounded"] = check_eviction(models[arguments.variant].model, sizes)
    print("largest difference from one call, and of keys: " + ", ".join(f"{n} {e:.1e}" for n, e in errors.items()))
    del models
    records = {}
    for name in ("bounded", f"insertion-last-{KEPT_FRAMES}", "insertion", "unbounded"):
        settings = (name, arguments.variant, sizes, arguments.device, arguments.attn, torch.get_num_threads())
        if arguments.tiny:
            records[name] = run_alone(*settings)
        else:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                records[name] = pool.apply(run_alone, settings)
        print(f"{name}: {len(records[name].cache):,} turns", flush=True)
    found = lines(records, sizes)
    absolute = arguments.device == "cuda"
    print(lines_table(records, found, sizes.turns, absolute))
    judged = judgements(records, found, slopes=not arguments.tiny)
    print(table(["contender", "must hold", ""], [[f"`{n}`", what, "yes" if ok else "no"] for n, what, ok in judged]))
    if arguments.plot:
        plot(records, found, sizes, absolute, arguments.plot)
    report(
        "forever",
        device,
        sizes,
        variant=arguments.variant,
        attn=arguments.attn,
        difference=errors,
        lines={name: {key: asdict(own) for key, own in figures.items()} for name, figures in found.items()},
        kv_tokens={name: record.kv_tokens for name, record in records.items()},
        cache_bytes={name: record.cache[-1] for name, record in records.items()},
        allocated_bytes={name: max(record.allocated) for name, record in records.items()},
        memory="torch.cuda.memory_allocated" if absolute else "resident",
        predicted_bytes=records["unbounded"].predicted,
        judged=[{"contender": name, "what": what, "holds": ok} for name, what, ok in judged],
    )
    if not all(ok for _, _, ok in judged):
        sys.exit(1)


if __name__ == "__main__":
    main()
