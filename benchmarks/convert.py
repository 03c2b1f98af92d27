# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Conversion against a plain copy: time and anonymous memory on the true shapes of Qwen2.5-VL-3B.

Makes a checkpoint of random bfloat16 weights (7.5 GB, or as `--size` says), then alternates
`cp --reflink=never` and the converter, both until the bytes are on the disk. The converter runs in a process of its
own; its time is taken twice: the call alone, and the whole process with the start of Python and all imports.
Everything that was written is removed. The last line is JSON.

    python -m benchmarks.convert
    python -m benchmarks.convert --size 1.5GB --runs 5
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from benchmarks.common import LARGE_TEXT, LARGE_VISION
from casa_hf.conversion import convert_checkpoint
from examples.tiny_source import CHAT_TEMPLATE, IMAGE_PROCESSOR, build_tokenizer

ROOT = Path(__file__).parents[1]
TIME_BAR = 1.5
MEMORY_BAR = 1.5e9

TINY_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 1024,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
}
TINY_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "fullatt_block_indexes": [1],
    "out_hidden_size": 64,
}
# What differs from Qwen2.5-VL-3B, in text and vision tower: nothing in 7.5 GB, only the number of blocks in 1.5 GB.
SIZES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "7.5GB": ({}, {}),
    "1.5GB": ({"num_hidden_layers": 3}, {"depth": 8, "fullatt_block_indexes": [7]}),
    "tiny": (TINY_TEXT, TINY_VISION),
}


def build_source(folder: Path, size: str = "7.5GB") -> None:
    """Write the synthetic checkpoint of this size, in the layout and with the shard size of the one on the Hub."""
    text, vision = SIZES[size]
    folder.mkdir()
    tokenizer = build_tokenizer()
    config = Qwen2_5_VLConfig(
        text_config=LARGE_TEXT | text | {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id},
        vision_config=LARGE_VISION | vision,
        tie_word_embeddings=True,
        architectures=["Qwen2_5_VLForConditionalGeneration"],
        dtype="bfloat16",
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    )
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(IMAGE_PROCESSOR))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)

    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    weights = {
        name.replace("model.visual.", "visual.").replace("model.language_model.", "model."): tensor.to(torch.bfloat16)
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    split = split_state_dict_into_shards_factory(
        weights,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size="4GB",
    )
    for file, names in split.filename_to_tensors.items():
        shard = {name: torch.empty_like(weights[name], device="cpu").normal_() for name in names}
        save_file(shard, folder / file, metadata={"format": "pt"})
        del shard
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def cpu_seconds(who: int = resource.RUSAGE_SELF) -> float:
    """Time that this process, or its children, have had of a CPU: what other programs of the machine change little."""
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime


def copy(source: Path, output: Path) -> dict[str, float]:
    """Seconds for a plain copy that ends on the disk."""
    start, cpu = time.perf_counter(), cpu_seconds(resource.RUSAGE_CHILDREN)
    subprocess.run(["cp", "--reflink=never", "-r", source, output], check=True)
    subprocess.run(["sync", *output.iterdir(), output], check=True)
    return {"call_s": time.perf_counter() - start, "cpu_s": cpu_seconds(resource.RUSAGE_CHILDREN) - cpu}


def convert(source: Path, output: Path) -> dict[str, float]:
    """Seconds and peak anonymous bytes of a conversion in a process of its own."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.convert", "--worker", source.resolve(), output.resolve()]
    result = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(result.stdout) | {"process_s": time.perf_counter() - start}


@contextmanager
def peak_anonymous_bytes() -> Iterator[list[int]]:
    """Sample this process' memory; the one element of the list is the peak so far."""
    peak = [0]
    stop = threading.Event()

    def sample() -> None:
        while not stop.wait(0.01):
            peak[0] = max(peak[0], anonymous_bytes())

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        yield peak
    finally:
        stop.set()
        sampler.join()


def work(source: str, output: str) -> None:
    """What the process of `convert` does."""
    start, cpu = time.perf_counter(), cpu_seconds()
    with peak_anonymous_bytes() as peak:
        convert_checkpoint(source, output)
    seconds = {"call_s": time.perf_counter() - start, "cpu_s": cpu_seconds() - cpu}
    print(json.dumps(seconds | {"peak_anonymous_bytes": peak[0]}))


def anonymous_bytes() -> int:
    """Resident memory of this process that no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon; this benchmark needs Linux.")


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def run(work_folder: Path, runs: int, size: str) -> dict[str, Any]:
    """Make the source, alternate copies and conversions, print what comes out, and return it."""
    print(f"{platform.platform()}, {os.cpu_count()} CPUs, Python {platform.python_version()}")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, safetensors {safetensors.__version__}")
    source, output = work_folder / "source", work_folder / "output"
    build_source(source, size)
    source_bytes = folder_bytes(source)
    print(f"source: {source_bytes / 1e9:.3f} GB of which {len(list(source.glob('*.safetensors')))} weight files")
    copies, conversions = [], []
    for number in range(1, runs + 1):
        copies.append(copy(source, output))
        shutil.rmtree(output)
        conversions.append(convert(source, output))
        output_bytes = folder_bytes(output)
        shutil.rmtree(output)
        copied, converted = copies[-1], conversions[-1]
        print(
            f"run {number}: cp {copied['call_s']:.2f} s ({copied['cpu_s']:.2f} s of a CPU), conversion "
            f"{converted['call_s']:.2f} s ({converted['cpu_s']:.2f} s of a CPU; whole process "
            f"{converted['process_s']:.2f} s), peak anonymous memory "
            f"{converted['peak_anonymous_bytes'] / 1e9:.3f} GB",
            flush=True,
        )
    cp, cp_cpu = (statistics.median(run[key] for run in copies) for key in ("call_s", "cpu_s"))
    cpu = statistics.median(run["cpu_s"] for run in conversions)
    call = statistics.median(run["call_s"] for run in conversions)
    process = statistics.median(run["process_s"] for run in conversions)
    peak = max(run["peak_anonymous_bytes"] for run in conversions)
    print(f"output: {output_bytes / 1e9:.3f} GB, {output_bytes / source_bytes:.3f} times the source")
    print(f"median: cp {cp:.2f} s, conversion {call:.2f} s = {call / cp:.2f} times cp (bar {TIME_BAR})")
    print(f"        of a CPU: cp {cp_cpu:.2f} s, conversion {cpu:.2f} s = {cpu / cp_cpu:.2f} times")
    print(f"        whole process {process:.2f} s = {process / cp:.2f} times cp")
    print(f"peak anonymous memory {peak / 1e9:.3f} GB (bar {MEMORY_BAR / 1e9})")
    return {
        "source_bytes": source_bytes,
        "output_bytes": output_bytes,
        "cp_s": round(cp, 3),
        "convert_s": round(call, 3),
        "process_s": round(process, 3),
        "ratio": round(call / cp, 3),
        "cpu_ratio": round(cpu / cp_cpu, 3),
        "process_ratio": round(process / cp, 3),
        "peak_anonymous_bytes": peak,
        "passed": call / cp <= TIME_BAR and peak < MEMORY_BAR,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="where to work; needs 16 GB (default: here)")
    parser.add_argument("--runs", type=int, default=3, help="number of alternating runs (default: 3)")
    parser.add_argument("--size", choices=SIZES, default="7.5GB", help="of the source (default: %(default)s)")
    parser.add_argument("--worker", nargs=2, metavar=("SOURCE", "OUTPUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(*arguments.worker)
        return
    with tempfile.TemporaryDirectory(prefix="convert-benchmark-", dir=arguments.folder) as folder:
        print(json.dumps(run(Path(folder), arguments.runs, arguments.size)))


if __name__ == "__main__":
    main()
