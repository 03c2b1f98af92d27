# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""One vLLM engine in a process of its own, through what a day may bring: `python -m tests.serving.vllm_live OUTPUT`.

Sessions that are given a frame at a time, against `CasaStream`; requests that are cut off in mid-stream; many pictures
one after the other. What the engine holds afterwards is read from its metrics and from the size of its process.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

from PIL import Image

from casa_hf import CasaForConditionalGeneration, CasaProcessor, StreamSettings
from examples.tiny_world.live import CHECKPOINT, PROMPT, clip, new_stream
from examples.vllm_live import captions
from tests.serving.vllm_checkpoints import PAD, chat

NUM_FRAMES, NUM_PICTURES = 10, 1000


def streamed(number: int) -> list[list[int]]:
    """What a `CasaStream` says to each frame of a clip."""
    model = CasaForConditionalGeneration.from_pretrained(CHECKPOINT).eval()
    processor = CasaProcessor.from_pretrained(CHECKPOINT)
    with new_stream(model, processor) as stream:
        return [list(list(stream.push(frame))[-1].token_ids) for frame in clip(number, NUM_FRAMES).frames]


def engine_bytes() -> int:
    """Memory of all processes that this one has started."""
    total = 0
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        except OSError:
            continue
        if int(lines["PPid"]) == os.getpid() and "VmRSS" in lines:
            total += int(lines["VmRSS"].split()[0]) * 1024
    return total


def cache_usage() -> float:
    """Share of the key/value cache in use, by the engine's metrics."""
    from prometheus_client import REGISTRY

    values = [
        sample.value
        for metric in REGISTRY.collect()
        for sample in metric.samples
        if sample.name == "vllm:kv_cache_usage_perc"
    ]
    return max(values)


async def run() -> dict[str, Any]:
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    options: dict[str, Any] = {"dtype": "float32", "max_model_len": 1024, "enforce_eager": True, "max_num_seqs": 8}
    options |= {"mm_processor_cache_gb": 0}  # which would keep the pixels of 4 GB of pictures
    options |= {"block_size": 32, "additional_config": {"casa_max_image_tokens": 128}}
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(model=str(CHECKPOINT), **options))
    processor = CasaProcessor.from_pretrained(CHECKPOINT)
    settings = StreamSettings(prompt=PROMPT, max_new_tokens_per_frame=6)
    stops = [processor.tokenizer.eos_token_id]
    result: dict[str, Any] = {}

    async def session(number: int) -> list[list[int]]:
        frames = [(index / settings.fps, frame) for index, frame in enumerate(clip(number, NUM_FRAMES).frames)]
        return [ids async for _, ids in captions(engine, processor, frames, settings, stops, f"clip {number}")]

    result["sessions"] = await asyncio.gather(*(session(number) for number in range(3)))

    prompt, size = chat(("user", PAD + "What is this?")), (56, 56)
    sampling = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)

    async def cut_off(number: int) -> None:
        given = {"prompt": prompt, "multi_modal_data": {"image": Image.new("RGB", (112, 112), (number, 0, 0))}}
        async for output in engine.generate(given, sampling, request_id=f"cut off {number}"):
            if len(output.outputs[0].token_ids) > number % 5:
                break  # leaving the loop aborts the request

    await asyncio.gather(*(cut_off(number) for number in range(12)))

    short = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    four = chat(("user", f"{PAD}one {PAD}two {PAD}three {PAD}four"))

    async def ask(first: int) -> None:
        images = [Image.new("RGB", size, (n % 256, n // 256, 9)) for n in range(first, first + 4)]
        given = {"prompt": four, "multi_modal_data": {"image": images}}
        async for _ in engine.generate(given, short, request_id=f"pictures {first}"):
            pass

    async def pictures(first: int, past: int) -> None:
        for start in range(first, past, 32):
            await asyncio.gather(*(ask(number) for number in range(start, min(start + 32, past), 4)))

    await pictures(0, 200)
    result["bytes_before"] = engine_bytes()
    await pictures(200, NUM_PICTURES)
    result["bytes_after"] = engine_bytes()
    async for _ in engine.generate({"prompt": chat(("user", "Hello"))}, short, request_id="last"):
        pass
    await asyncio.sleep(1)
    await engine.do_log_stats()
    result["usage"] = cache_usage()
    engine.shutdown()
    return result


def main() -> None:
    result = asyncio.run(run())
    result["expected"] = [streamed(number) for number in range(3)]
    shown = {key: value for key, value in result.items() if key not in ("sessions", "expected")}
    print("RESULT", shown, result["sessions"] == result["expected"], flush=True)
    Path(sys.argv[1]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
