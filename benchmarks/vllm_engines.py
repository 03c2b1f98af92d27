# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""CASA and token insertion in vLLM: the same shapes, the same engine, requests with pictures that come all at once.

    python -m benchmarks.vllm_engines            # in an environment with vLLM, as `make test-vllm` makes it

A Qwen2.5-VL with random weights and its CASA form answer 1 to 32 requests with 1 to 16 pictures each: in float32 on a
CPU, in bfloat16 and with vLLM's compiled graphs on a GPU. All of it counts: pictures are made patches, encoded and
read; neither has seen a picture before. What is measured is named as in `vllm bench serve`: requests per second, the
median time to a request's first token (TTFT), and the median time of its other tokens (TPOT), in which others are read
too. Time on a CPU is that of the processor, which other programs disturb less, and that of the clock on a GPU. Each
case is run until it has taken `--seconds`, at most three times, and counts by its median.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

import numpy as np
import torch
from PIL import Image

from benchmarks.common import LARGE_TEXT, LARGE_VISION, machine, rope, table, versions, write

CHECKPOINTS = Path(__file__).parents[1] / "examples" / "tiny_world" / "checkpoints"
PAD = "<|vision_start|><|image_pad|><|vision_end|>"
SOURCE, CASA = "insertion", "casa"
MAX_RUNS = 3


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        text, vision: fields of the configurations; others are those of `examples/tiny_world`.
        edge: edge of a picture in pixels; 28 x 28 of them are a token.
        tokens: new tokens of a request.
        requests, pictures: numbers of requests and of pictures in each.
    """

    text: dict[str, Any]
    vision: dict[str, Any]
    edge: int
    tokens: int
    requests: tuple[int, ...] = (1, 8, 32)
    pictures: tuple[int, ...] = (1, 4, 16)


_SMALL_TEXT = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "num_hidden_layers": 12,
    "num_key_value_heads": 2,
    "rope_parameters": rope(8, 12, 12),
}
_TINY_TEXT = {"num_hidden_layers": 2, "num_key_value_heads": 2}
SIZES = {
    "tiny": Sizes(_TINY_TEXT, {}, 112, 4, (1, 2), (1, 2)),
    "small": Sizes(_SMALL_TEXT, {"out_hidden_size": 512}, 224, 16),
    "3b": Sizes(LARGE_TEXT, LARGE_VISION, 896, 64),
}


def make_models(folder: Path, sizes: Sizes) -> dict[str, Path]:
    """Configurations and processors of the source and of its CASA form, by name; vLLM makes the weights."""
    models = {}
    for name, origin in ((SOURCE, "source"), (CASA, "casa")):
        models[name] = folder / name
        shutil.copytree(CHECKPOINTS / origin, models[name], ignore=shutil.ignore_patterns("*.safetensors"))
        settings = json.loads((models[name] / "config.json").read_text())
        text = settings["text_config"] | sizes.text
        layers = text["num_hidden_layers"]
        text |= {"layer_types": ["full_attention"] * layers, "max_window_layers": layers}
        settings |= {"text_config": text, "vision_config": settings["vision_config"] | sizes.vision}
        (models[name] / "config.json").write_text(json.dumps(settings))
    return models


def make_pictures(edge: int, seed: int) -> Iterator[Image.Image]:
    """Pictures that are all different."""
    generator = np.random.default_rng(seed)
    while True:
        yield Image.fromarray(generator.integers(0, 256, (edge, edge, 3), dtype=np.uint8))


def measure(model: Path, sizes: Sizes, seconds: float, tell: Callable[[dict[str, Any]], None]) -> list[dict[str, Any]]:
    """Medians for each number of requests and pictures.

    Args:
        model: folder of the configuration.
        sizes: what is measured.
        seconds: time after which a case isn't run again.
        tell: function that is given each case when it is over.
    """
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    on_cpu = not torch.cuda.is_available()
    engine = LLM(
        model=str(model),
        load_format="dummy",
        dtype="float32" if on_cpu else "bfloat16",
        max_model_len=max(4096, 1024 + max(sizes.pictures) * (sizes.edge // 28) ** 2),
        max_num_seqs=32,
        enforce_eager=on_cpu,
        block_size=32 if on_cpu else None,
        enable_prefix_caching=False,
        mm_processor_cache_gb=0,
        limit_mm_per_prompt={"image": max(sizes.pictures), "video": 0},
        mm_processor_kwargs={"max_pixels": sizes.edge**2, "min_pixels": 56 * 56},
    )
    delta = RequestOutputKind.DELTA
    sampling = SamplingParams(temperature=0, max_tokens=sizes.tokens, ignore_eos=True, output_kind=delta)
    clock = time.process_time if on_cpu else time.perf_counter
    llm = engine.llm_engine
    pictures = make_pictures(sizes.edge, 1)

    def run(requests: int, number: int) -> dict[str, float]:
        prompt = f"<|im_start|>user\n{(PAD + ' and ') * number}what is this?<|im_end|>\n<|im_start|>assistant\n"
        given: list[Any] = [
            {"prompt": prompt, "multi_modal_data": {"image": [next(pictures) for _ in range(number)]}}
            for _ in range(requests)
        ]
        start = clock()
        for index, each in enumerate(given):
            llm.add_request(str(index), each, sampling)
        first: dict[str, float] = {}
        last: dict[str, float] = {}
        while llm.has_unfinished_requests():
            for output in llm.step():
                first.setdefault(output.request_id, clock())
                last[output.request_id] = clock()
        taken = clock() - start
        return {
            "requests_per_s": requests / taken,
            "ttft_s": statistics.median(each - start for each in first.values()),
            "tpot_s": statistics.median((last[name] - first[name]) / (sizes.tokens - 1) for name in first),
            "seconds": taken,
        }

    run(1, 1)
    rows = []
    for requests in sizes.requests:
        for number in sizes.pictures:
            runs: list[dict[str, float]] = []
            while not runs or (len(runs) < MAX_RUNS and sum(each["seconds"] for each in runs) < seconds):
                runs.append(run(requests, number))
            medians = {name: statistics.median(each[name] for each in runs) for name in runs[0]}
            rows.append({"requests": requests, "pictures": number, "runs": len(runs), **medians})
            tell(rows[-1])
    engine.llm_engine.engine_core.shutdown()
    return rows


def release() -> None:
    """Free what an engine has left."""
    from vllm.distributed import cleanup_dist_env_and_memory

    gc.collect()
    cleanup_dist_env_and_memory()


def ratios(found: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """What CASA's figures are, divided by insertion's, for the cases that both have."""
    both = zip(found.get(CASA, []), found.get(SOURCE, []), strict=False)
    kept = ("requests", "pictures")
    figures = ("requests_per_s", "ttft_s", "tpot_s")
    return [{k: own[k] for k in kept} | {k: own[k] / other[k] for k in figures} for own, other in both]


def written(found: dict[str, list[dict[str, Any]]]) -> str:
    """The ratios as a table, with what the source's figures were."""
    rows = [
        [
            str(ratio["requests"]),
            str(ratio["pictures"]),
            *(f"{ratio[name]:.2f}" for name in ("requests_per_s", "ttft_s", "tpot_s")),
            f"{other['requests_per_s']:.2f} / {1e3 * other['ttft_s']:.0f} / {1e3 * other['tpot_s']:.1f}",
        ]
        for ratio, other in zip(ratios(found), found.get(SOURCE, []), strict=False)
    ]
    header = ["requests", "pictures each", "requests/s", "TTFT", "TPOT", "insertion: requests/s / TTFT ms / TPOT ms"]
    return table(header, rows)


def main() -> None:
    """Measure, and print a table of ratios."""
    parser = argparse.ArgumentParser(description="CASA and token insertion in vLLM.")
    parser.add_argument("--size", choices=SIZES, default="small", help="of the models (default: %(default)s)")
    parser.add_argument("--edge", type=int, help="edge of a picture in pixels")
    parser.add_argument("--requests", type=int, nargs="+", help="numbers of requests")
    parser.add_argument("--pictures", type=int, nargs="+", help="numbers of pictures in each")
    parser.add_argument("--seconds", type=float, default=10, help="time of a case (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="file for all results as JSON, kept up to date")
    options = parser.parse_args()
    given = {name: getattr(options, name) for name in ("edge", "requests", "pictures")}
    sizes = Sizes(**{**asdict(SIZES[options.size]), **{name: value for name, value in given.items() if value}})
    torch.set_num_threads(1 if not torch.cuda.is_available() else torch.get_num_threads())
    import vllm

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results: dict[str, Any] = {
        "benchmark": "vllm_engines",
        "machine": machine(device),
        "versions": versions() | {"vllm": vllm.__version__},
        "sizes": asdict(sizes),
        "cases": {},
    }
    found = results["cases"]

    def tell(row: dict[str, Any]) -> None:
        found[name].append(row)
        print(name, json.dumps(row), flush=True)
        if options.output is not None:
            write(options.output, json.dumps(results))

    with tempfile.TemporaryDirectory() as folder:
        for name, model in make_models(Path(folder), sizes).items():
            found[name] = []
            measure(model, sizes, options.seconds, tell)
            release()
    print(json.dumps(results))
    print(written(found))


if __name__ == "__main__":
    main()
