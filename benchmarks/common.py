# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""What the benchmarks share: models and their inputs, the machine, clocks, memory, and how results are written."""

from __future__ import annotations

import argparse
import gc
import io
import itertools
import json
import os
import platform
import statistics
import textwrap
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import (
    Cache,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
)
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from casa_hf import CasaConfig, CasaForConditionalGeneration, CasaProcessor
from casa_hf.cache_layers import KeysValues
from examples.tiny_source import CHAT_TEMPLATE, CORPUS, SPECIAL_TOKENS, train_tokenizer

START, END, IMAGE_PAD, VIDEO_PAD, WORDS = 0, 1, 2, 3, 4  # token ids; words are all from WORDS on
SILENT = "<|endoftext|>"  # ends the text of a frame, in which random models never choose it


# ---------------------------------------------------------------- models


def rope(*sections: int) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 1e6, "mrope_section": list(sections)}


# Qwen2.5-VL-3B.
LARGE_TEXT = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128000,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": True,
    "rope_parameters": rope(16, 24, 24),
}
LARGE_VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "patch_size": 14,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "out_hidden_size": 2048,
}
# The same architecture with 35 million parameters.
SMALL_TEXT = LARGE_TEXT | {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1584,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "rope_parameters": rope(8, 12, 12),
}
SMALL_VISION = LARGE_VISION | {
    "depth": 4,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_heads": 4,
    "fullatt_block_indexes": [1, 3],
    "out_hidden_size": 512,
}
TINY_TEXT = LARGE_TEXT | {
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_parameters": rope(2, 3, 3),
}
TINY_VISION = LARGE_VISION | {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 4,
    "window_size": 16,
    "fullatt_block_indexes": [1],
    "out_hidden_size": 64,
}


def source_config(text: dict[str, Any], vision: dict[str, Any]) -> Qwen2_5_VLConfig:
    """Configuration of a source model from the fields of its parts."""
    return Qwen2_5_VLConfig(
        text_config=dict(text),
        vision_config=dict(vision),
        tie_word_embeddings=True,
        image_token_id=IMAGE_PAD,
        video_token_id=VIDEO_PAD,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )


def random_source(
    config: Qwen2_5_VLConfig,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    attn_implementation: str = "sdpa",
) -> Qwen2_5_VLForConditionalGeneration:
    """A stock source model of random weights, made on its device."""
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen2_5_VLForConditionalGeneration._from_config(
            config, dtype=dtype, attn_implementation=attn_implementation
        )
    return model.eval()


def random_processor(vocab_size: int, patch_size: int, max_pixels: int) -> CasaProcessor:
    """The processor of a random model, in whose tokenizer every id below `vocab_size` is whole characters or special.

    It reads English.

    Args:
        vocab_size: of the model, at least 320.
        patch_size: of its vision tower.
        max_pixels: of an image or frame; larger ones are scaled down.
    """
    learned = train_tokenizer(CORPUS.splitlines(), 270)
    images = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")  # with the ids START, END, ...
    english = [piece for piece in learned.get_vocab() if piece.replace("Ġ", "").replace("Ċ", "").isascii()]
    pieces = [*images, *(piece for piece in english if piece not in images)]
    pieces += [f"{number:06}" for number in range(vocab_size - len(pieces))]  # no text has these, but tokens do
    tokenizer = Qwen2Tokenizer(
        vocab={piece: index for index, piece in enumerate(pieces)},
        merges=[tuple(merge) for merge in json.loads(learned.backend_tokenizer.to_str())["model"]["merges"]],
        eos_token=SILENT,
        extra_special_tokens=list(SPECIAL_TOKENS),
        chat_template=CHAT_TEMPLATE,
    )
    image_processor = Qwen2VLImageProcessor(patch_size=patch_size, min_pixels=1, max_pixels=max_pixels)
    return CasaProcessor(image_processor, tokenizer, frame_max_pixels=max_pixels)


@torch.no_grad()
def let_stop(model: PreTrainedModel, processor: CasaProcessor) -> None:
    """Give a random model with tied embeddings a stop token, and let it choose only text: every frame gets all of it.

    The logits of special tokens are 0, and of thousands of random ones the largest isn't.
    """
    model.get_input_embeddings().weight[processor.tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))] = 0
    model.generation_config.eos_token_id = processor.tokenizer.convert_tokens_to_ids(SILENT)


def jpeg(side: int, number: int) -> bytes:
    """A picture of so many pixels in each direction as a camera compresses it: soft shapes and some noise."""
    random = np.random.default_rng(number)
    shapes = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize(
        (side, side), Image.Resampling.BICUBIC
    )
    noisy = np.asarray(shapes, np.float32) + random.normal(0, 6, (side, side, 3))
    content = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(content, "JPEG", quality=85)
    return content.getvalue()


def design(source: Qwen2_5_VLForConditionalGeneration, variant: str, **overrides: Any) -> CasaConfig:
    """Configuration of a source model's variant."""
    return CasaConfig.from_source(source.config, variant, **overrides)


def casa_model(
    source: Qwen2_5_VLForConditionalGeneration, variant: str, attn_implementation: str = "sdpa", **overrides: Any
) -> CasaForConditionalGeneration:
    """The variant that `from_pretrained` makes of a source model; it shares the source's tensors where it can."""
    model = CasaForConditionalGeneration.from_pretrained(
        None,
        config=design(source, variant, **overrides),
        state_dict=source.state_dict(),
        dtype=source.dtype,
        attn_implementation=attn_implementation,
    )
    return model.to(source.device).eval()


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of a model's parameters."""
    return sum(parameter.nbytes for parameter in model.parameters())


@dataclass(frozen=True)
class Sizes:
    """The model and the conversation that are measured.

    Attributes:
        text: fields of the text configuration.
        vision: fields of the vision configuration; the tower is there but never runs.
        frames: images of the prompt.
        train_frames: images of the training step.
        side: height and width of an image in tokens.
        words: text tokens after each image, its delimiters included.
        decoded: tokens decoded one by one after the prompt.
        last_words: text tokens that come with the frame after those.
    """

    text: dict[str, Any]
    vision: dict[str, Any]
    frames: int
    train_frames: int
    side: int
    words: int
    decoded: int
    last_words: int

    @property
    def image_tokens(self) -> int:
        return self.side**2

    def source_config(self) -> Qwen2_5_VLConfig:
        """Configuration of the source model."""
        return source_config(self.text, self.vision)


class Stream:
    """A conversation of images and words, as inputs of CASA models and of the source model.

    Positions are those of the text without images; `prompt` is where the prompt ends, `decoded` where the tokens end
    that are decoded one by one, and `end` where the last frame's text ends.
    """

    def __init__(self, sizes: Sizes, source: Qwen2_5_VLForConditionalGeneration):
        generator, device = torch.Generator().manual_seed(0), source.device
        self.sizes = sizes
        self.prompt = sizes.frames * sizes.words
        self.decoded = self.prompt + sizes.decoded
        self.end = self.decoded + sizes.last_words
        self.train = sizes.train_frames * sizes.words
        starts = [*range(0, self.prompt, sizes.words), self.decoded]
        self.ids = torch.randint(WORDS, sizes.text["vocab_size"], (1, self.end), generator=generator)
        self.ids[0, starts] = START
        self.placeholders = torch.tensor(starts) + 1
        self.ids[0, self.placeholders] = END
        self.features = (
            torch.randn(len(starts) * sizes.image_tokens, sizes.text["hidden_size"], generator=generator)
            * source.get_input_embeddings().weight.std().item()
        )
        merge = source.config.vision_config.spatial_merge_size
        self.ids, self.features = self.ids.to(device), self.features.to(device, source.dtype)
        self.grids = torch.tensor([[1, sizes.side * merge, sizes.side * merge]] * len(starts))
        self._insert(source)

    @torch.no_grad()
    def _insert(self, source: Qwen2_5_VLForConditionalGeneration) -> None:
        """Make the source's inputs, in which an image's tokens stand before its placeholder."""
        before = (torch.arange(self.end)[:, None] >= self.placeholders).sum(-1)
        self.places = torch.arange(self.end) + before * self.sizes.image_tokens
        inserted = torch.full((1, int(self.places[-1]) + 1), IMAGE_PAD, device=source.device)
        inserted[0, self.places.to(source.device)] = self.ids[0]
        is_image = inserted == IMAGE_PAD
        self.embeds = source.get_input_embeddings()(inserted)
        self.embeds[is_image] = self.features
        self.positions, _ = source.model.get_rope_index(
            inserted, image_grid_thw=self.grids, mm_token_type_ids=is_image.int()
        )

    def casa(self, start: int, end: int) -> dict[str, Any]:
        """Inputs of a CASA model for text from `start` to `end` and the images in it."""
        inside = ((self.placeholders >= start) & (self.placeholders < end)).nonzero()[:, 0]
        inputs: dict[str, Any] = {"input_ids": self.ids[:, start:end]}
        if len(inside):
            features = self.features.unflatten(0, (len(self.placeholders), -1))[inside].flatten(0, 1)
            inputs |= {"image_embeds": features, "image_grid_thw": self.grids[inside]}
        return inputs

    def source(self, start: int, end: int) -> dict[str, Any]:
        """Inputs of the source model for the same."""
        inserted = slice(int(self.places[start - 1]) + 1 if start else 0, int(self.places[end - 1]) + 1)
        return {"inputs_embeds": self.embeds[:, inserted], "position_ids": self.positions[..., inserted]}

    def source_text(self, end: int) -> Tensor:
        """Where the first `end` text tokens stand in the source's sequence."""
        return self.places[:end]


# ---------------------------------------------------------------- measuring

GATES = {torch.float32: 1e-3, torch.bfloat16: 0.1}


def machine(device: torch.device) -> dict[str, Any]:
    """What the measurement runs on."""
    found: dict[str, Any] = {
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
    }
    if device.type == "cuda":
        found["cuda"] = torch.version.cuda
    return found


def versions() -> dict[str, str]:
    """Versions of what the measurement depends on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def quantile(values: Sequence[float], percent: int) -> float:
    """The value that so many percent of them don't exceed."""
    return float(np.percentile(values, percent))


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(function: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """The function's result and the seconds until the device had it."""
    synchronize(device)
    start = time.perf_counter()
    result = function()
    synchronize(device)
    return result, time.perf_counter() - start


def gate(name: str, actual: Tensor, expected: Tensor, dtype: torch.dtype) -> float:
    """The largest difference of two results, divided by the largest expected value.

    Raises:
        RuntimeError: if it is larger than rounding in this dtype explains.
    """
    error = float((actual.float() - expected.float()).abs().max() / expected.float().abs().max())
    if not error <= GATES[dtype]:  # NaN fails too
        raise RuntimeError(
            f"{name} differs from what it must equal by {error:.1e} of the largest value (bar {GATES[dtype]}); "
            "nothing is measured."
        )
    return error


def allocated_bytes(cache: Cache) -> int:
    """Bytes of the memory that a cache holds, room for further tokens included; what is viewed twice counts once."""
    held = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values) if tensor is not None]
    for layer in cache.layers:
        parts: list[KeysValues] = list(getattr(layer, "fusion", {}).values())
        parts += [memory.tensors for memory in getattr(layer, "memory", {}).values()]
        held += [tensor for part in parts for tensor in part]
    storages = {storage.data_ptr(): storage.nbytes() for storage in (tensor.untyped_storage() for tensor in held)}
    return sum(storages.values())


def process_bytes() -> int:
    """Memory of this process; 0 where the system has no /proc."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


def with_peak(function: Callable[[], Any], device: torch.device) -> tuple[Any, int]:
    """The function's result, and the most that was allocated on a GPU meanwhile above what was before."""
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    returned = function()
    synchronize(device)
    return returned, torch.cuda.max_memory_allocated(device) - before


def peak_bytes(stages: dict[str, Callable[[], Any]]) -> dict[str, int]:
    """For each stage, run in turn, the most that PyTorch's allocator holds above what it held when the stage began.

    The profiler knows the size of what is freed only if it saw it allocated, so one session covers all stages.
    """
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for name, stage in stages.items():
            with record_function(name):
                stage()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    peaks = {}
    for begin, end, name in ((e.start_ns(), e.end_ns(), e.name()) for e in events if e.name() in stages):
        held = itertools.accumulate(change for moment, change in changes if begin <= moment <= end)
        peaks[name] = max(held, default=0)
    return peaks


# ---------------------------------------------------------------- command line


def start(description: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark.

    Args:
        description: the benchmark's docstring.
        **defaults: of these options, where others than here are wanted.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to run (default: cpu)")
    parser.add_argument("--threads", type=positive, help="threads of the CPU (default: torch's choice)")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try the program")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the figures into this SVG file")
    parser.set_defaults(**defaults)
    return parser


def positive(text: str) -> int:
    """A number of things, as an argument."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return number


def numbers(parser: argparse.ArgumentParser, option: str, value: str) -> list[int]:
    """The numbers of a comma-separated option; an empty one has none."""
    try:
        return [positive(number) for number in value.split(",") if value]
    except argparse.ArgumentTypeError as error:
        parser.error(f"{option} {value!r}: {error}.")


def begin(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> torch.device:
    """Check the common options, settle torch and Transformers, print the machine; return the device."""
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no CUDA device; use --device cpu, or a machine that has one.")
    if arguments.plot:
        if not arguments.plot.parent.is_dir():
            parser.error(f"--plot {arguments.plot}: there is no folder {arguments.plot.parent}; make it first.")
        if arguments.plot.suffix != ".svg":
            parser.error(f"--plot {arguments.plot}: the name must end in .svg.")
        if find_spec("matplotlib") is None:
            parser.error("--plot needs matplotlib; install it with `pip install 'casa_hf[bench]'`.")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    disable_progress_bar()
    set_verbosity_error()
    device = torch.device(arguments.device)
    print(", ".join(f"{name} {value}" for name, value in {**machine(device), **versions()}.items()))
    return device


def choices(parser: argparse.ArgumentParser, option: str, value: str, known: Iterable[str]) -> list[str]:
    """The names of a comma-separated option, which must be known ones."""
    names, known = value.split(","), list(known)
    for name in names:
        if name not in known:
            parser.error(f"{option}: unknown name {name!r}; choose from {', '.join(known)}.")
    return names


# ---------------------------------------------------------------- written


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def paragraph(text: str) -> str:
    """The text in lines of at most 120 characters."""
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def write(path: Path, text: str) -> None:
    """Write under a temporary name, then move."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def report(benchmark: str, device: torch.device, sizes: Any, **results: Any) -> None:
    """Print the last line: all results as JSON, with what they were measured on.

    Args:
        benchmark: its name.
        device: where it ran.
        sizes: dataclass of what was measured.
        **results: by name, anything that JSON can hold.
    """
    setting = {"machine": machine(device), "versions": versions(), "sizes": asdict(sizes)}
    print(json.dumps({"benchmark": benchmark, **setting, **results}))


# What plots call contenders, so that a stranger knows which they are.
_CONTENDERS = {
    "insertion": "the source: image tokens in the sequence",
    "bounded": "CASA, text bounded too",
    "unbounded": "CASA",
    "one by one": "CASA, streams one by one",
    "batch": "CASA, one batch",
}


def plot_name(name: str) -> str:
    """What a plot calls a contender."""
    if name in _CONTENDERS:
        return _CONTENDERS[name]
    kind, _, backend = name.partition(" ")
    last = kind.removeprefix("insertion-last-")
    shown = _CONTENDERS.get(kind) or (
        f"CASA, variant {kind}" if last == kind else f"the source, its last {last} images"
    )
    return f"{shown}, {backend}" if backend else shown


def legend_below(figure: Any) -> None:
    """One legend for all panels, under them, where it hides nothing."""
    labels: dict[str, Any] = {}
    for panel in figure.axes:
        handles, names = panel.get_legend_handles_labels()
        labels |= {name: handle for name, handle in zip(names, handles, strict=True) if name not in labels}
    columns = 2 if len(figure.axes) > 1 else 1
    figure.legend(labels.values(), labels, loc="outside lower center", ncols=columns, frameon=False, fontsize="small")


def running_median(values: Sequence[float], width: int = 5) -> list[float]:
    """The median of so many values around each, which one disturbed measurement doesn't move."""
    half = width // 2
    return [statistics.median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def save_figure(figure: Any, path: Path) -> None:
    """Write a matplotlib figure as SVG under a temporary name, then move. The same figure gives the same bytes."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "casa_hf"}):
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    write(path, text.getvalue())
