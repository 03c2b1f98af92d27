# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""CASA and token insertion in vLLM: the same weights, the same engine, requests with pictures.

    python -m benchmarks.vllm_engines            # in an environment with vLLM, as `make test-vllm` makes it

A random Qwen2.5-VL of 60 million parameters and its CASA form answer 1 to 32 requests with 1 to 16 pictures each. Time
is that of the processor cores on a CPU, which other programs don't disturb, and that of the clock on a GPU. All of
it counts: pictures are made patches, encoded and read. Neither has seen a picture before.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

import numpy as np
import torch
from PIL import Image
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from casa_hf import CasaProcessor, convert_checkpoint

SOURCE = Path(__file__).parents[1] / "examples" / "tiny_world" / "checkpoints" / "source"
PAD = "<|vision_start|><|image_pad|><|vision_end|>"
SIZE = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "num_hidden_layers": 12,
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
}
NUM_TOKENS = 16


def make_models(folder: Path, variant: str) -> dict[str, Path]:
    """The source and its CASA form, with random weights."""
    settings = json.loads((SOURCE / "config.json").read_text())
    settings["text_config"] |= SIZE
    settings["text_config"]["layer_types"] = ["full_attention"] * SIZE["num_hidden_layers"]
    settings["text_config"]["max_window_layers"] = SIZE["num_hidden_layers"]
    settings["vision_config"] |= {"out_hidden_size": SIZE["hidden_size"]}
    torch.manual_seed(0)
    source, casa = folder / "source", folder / variant
    Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**settings)).save_pretrained(source)
    for file in SOURCE.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            shutil.copy(file, source)
    convert_checkpoint(source, casa, variant=variant)
    CasaProcessor.from_source(source).save_pretrained(casa)
    return {"insertion": source, variant: casa}


def make_pictures(edge: int, seed: int) -> Iterator[Image.Image]:
    """Pictures that are all different."""
    generator = np.random.default_rng(seed)
    while True:
        yield Image.fromarray(generator.integers(0, 256, (edge, edge, 3), dtype=np.uint8))


def measure(name: str, model: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time of prefill and of decoding for each number of requests and pictures."""
    from vllm import LLM, SamplingParams

    on_cpu = not torch.cuda.is_available()
    engine = LLM(
        model=str(model),
        dtype="float32" if on_cpu else "bfloat16",
        max_model_len=4096,
        max_num_seqs=32,
        enforce_eager=on_cpu,
        block_size=32,
        enable_prefix_caching=False,
        mm_processor_cache_gb=0,
        limit_mm_per_prompt={"image": 16, "video": 0},
        mm_processor_kwargs={"max_pixels": options.edge**2, "min_pixels": 56 * 56},
    )
    clock = time.process_time if on_cpu else time.perf_counter
    pictures = make_pictures(options.edge, 1)

    def seconds(requests: int, number: int, tokens: int) -> float:
        prompt = f"<|im_start|>user\n{(PAD + ' and ') * number}what is this?<|im_end|>\n<|im_start|>assistant\n"
        given = [
            {"prompt": prompt, "multi_modal_data": {"image": [next(pictures) for _ in range(number)]}}
            for _ in range(requests)
        ]
        start = clock()
        engine.generate(given, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True), use_tqdm=False)
        return clock() - start

    seconds(1, 1, 2)
    rows = []
    for requests in options.requests:
        for number in options.pictures:
            first, all_of_it = seconds(requests, number, 1), seconds(requests, number, 1 + NUM_TOKENS)
            row = {"model": name, "requests": requests, "pictures": number, "first": first, "all": all_of_it}
            row["token"] = max(all_of_it - first, 0) / (requests * NUM_TOKENS)
            rows.append(row)
            print(json.dumps(row), flush=True)
    engine.llm_engine.engine_core.shutdown()
    return rows


def release() -> None:
    """Free what an engine has left."""
    from vllm.distributed import cleanup_dist_env_and_memory

    gc.collect()
    cleanup_dist_env_and_memory()


def main() -> None:
    """Measure, and print a table of ratios."""
    parser = argparse.ArgumentParser(description="CASA and token insertion in vLLM.")
    parser.add_argument("--variant", default="casa")
    parser.add_argument("--edge", type=int, default=224, help="edge of a picture in pixels")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--pictures", type=int, nargs="+", default=[1, 4, 16])
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        models = make_models(Path(folder), options.variant)
        found = {}
        for name, model in models.items():
            found[name] = measure(name, model, options)
            release()
    print("requests | pictures | requests/s | time to the first token | tokens/s of decoding (insertion = 1)")
    for own, other in zip(found[options.variant], found["insertion"], strict=True):
        token = other["token"] / own["token"] if own["token"] else float("nan")
        print(
            f"{own['requests']} | {own['pictures']} | {other['all'] / own['all']:.2f} | "
            f"{own['first'] / other['first']:.2f} | {token:.2f}"
        )


if __name__ == "__main__":
    main()
