# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Answers of vLLM beside those of `casa_hf`, engine after engine in one process: `python -m
tests.serving.vllm_engine`.

It reads a list of engines as JSON from the standard input and writes what came out as JSON into the file that is its
argument. A test starts it: importing vLLM takes longer than most engines do.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

import numpy as np
import torch

from casa_hf import CasaForConditionalGeneration, CasaProcessor
from tests.serving.vllm_checkpoints import quantise, requests, save_adapter, save_checkpoint, single_images, videos

NUM_TOKENS = 12


def reference(
    folder: str, prompts: list[Any], num_tokens: int, adapters: dict[str, Path], chosen: list[str | None]
) -> list[dict[str, Any]]:
    """What `casa_hf` answers, greedily, with the chosen adapter of each prompt."""
    model: Any = CasaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    if adapters:
        from peft import PeftModel

        for name, path in adapters.items():
            if isinstance(model, PeftModel):
                model.load_adapter(path, name)
            else:
                model = PeftModel.from_pretrained(model, path, name)
    processor = CasaProcessor.from_pretrained(folder)
    found = []
    for (prompt, visuals), adapter in zip(prompts, chosen, strict=True):
        is_video = bool(visuals) and isinstance(visuals[0], np.ndarray)
        given = {"videos": visuals, "do_sample_frames": False} if is_video else {"images": visuals or None}
        inputs = processor(text=prompt, **given, return_tensors="pt")
        if adapter is not None:
            model.set_adapter(adapter)
        with model.disable_adapter() if adapters and adapter is None else nullcontext():
            output = model.generate(
                **inputs,
                max_new_tokens=num_tokens,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
                eos_token_id=-1,
            )
        number = inputs["input_ids"].shape[1]
        ids = output.sequences[0, number:].tolist()
        scores = [logits[0].log_softmax(-1) for logits in output.logits]
        best = [score.topk(2).values for score in scores]
        found.append(
            {
                "prompt": inputs["input_ids"][0].tolist(),
                "ids": ids,
                "scores": [float(score[token]) for score, token in zip(scores, ids, strict=True)],
                "margins": [float(first - second) for first, second in best],
            }
        )
    return found


def difference(ids: list[int], scores: list[float], wanted: dict[str, Any], tolerance: float) -> float | None:
    """The largest difference of log-probabilities, up to a token that the tolerance may have changed; None if another
    one has changed."""
    worst = 0.0
    for place, (token, score) in enumerate(zip(ids, scores, strict=True)):
        if token != wanted["ids"][place]:
            return worst if wanted["margins"][place] < 2 * tolerance else None
        worst = max(worst, abs(score - wanted["scores"][place]))
    return worst


def count_preemptions() -> list[int]:
    """A count that goes up whenever a request is preempted."""
    from vllm.v1.core.sched.scheduler import Scheduler

    count, preempt = [0], Scheduler._preempt_request

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        return preempt(self, *args, **kwargs)

    Scheduler._preempt_request = counted
    return count


def run_engine(case: dict[str, Any], preemptions: list[int]) -> dict[str, Any]:
    """Serve the prompts of a case, twice unless it says otherwise, and compare."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    folder = case["folder"]
    if not Path(folder, "config.json").exists():
        save_checkpoint(Path(folder), **case.get("checkpoint", {}))
        if "quantise" in case:
            quantise(Path(folder), case["quantise"])
    prompts: list[Any] = single_images() if case.get("single_images") else requests()
    if case.get("videos"):
        prompts = prompts[:3] + videos()
    num_tokens = case.get("num_tokens", NUM_TOKENS)
    adapters = {
        name: save_adapter(Path(folder), Path(folder) / name, **arguments)
        for name, arguments in case.get("adapters", {}).items()
    }
    chosen = [[None, *adapters][number % (1 + len(adapters))] for number in range(len(prompts))]
    expected = reference(folder, prompts, num_tokens, adapters, chosen)
    options = {
        "dtype": "float32",
        "max_model_len": 512,
        "enforce_eager": True,
        "max_num_seqs": 8,
        "limit_mm_per_prompt": {"image": 4, "video": 2},
        "additional_config": {"casa_max_image_tokens": 128},
        "disable_log_stats": False,
        **case.get("engine", {}),
    }
    engine = LLM(model=folder, **options)
    scheduler = engine.llm_engine.engine_core.engine_core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    free = pool.get_num_free_blocks()
    before = preemptions[0]
    given = [
        {
            "prompt": prompt,
            "multi_modal_data": {
                "video" if isinstance(visual, np.ndarray) else "image": visuals for visual in visuals
            },
        }
        for prompt, visuals in prompts
    ]
    sampling = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, logprobs=1)
    loras: Any = None
    if adapters:
        from vllm.lora.request import LoRARequest

        known = {
            name: LoRARequest(name, 1 + number, str(path)) for number, (name, path) in enumerate(adapters.items())
        }
        loras = [None if name is None else known[name] for name in chosen]
    wrong, worst, cached, equal = [], 0.0, 0, 0
    for _ in range(case.get("rounds", 2)):
        outputs = engine.generate(given, sampling, use_tqdm=False, lora_request=loras)
        for number, (output, wanted) in enumerate(zip(outputs, expected, strict=True)):
            ids = list(output.outputs[0].token_ids)
            scores = [row[token].logprob for row, token in zip(output.outputs[0].logprobs, ids, strict=True)]
            differs = difference(ids, scores, wanted, case.get("tolerance", 0))
            if list(output.prompt_token_ids) != wanted["prompt"] or differs is None:
                wrong.append([number, ids, wanted["ids"]])
            else:
                worst = max(worst, differs)
            equal += sum(a == b for a, b in zip(ids, wanted["ids"], strict=True))
            cached += output.num_cached_tokens or 0
    result = {
        "name": case["name"],
        "requests": len(prompts),
        "answers": [wanted["ids"] for wanted in expected],
        "wrong": wrong,
        "worst": worst,
        "equal": equal,
        "cached": cached,
        "preemptions": preemptions[0] - before,
        "blocks_not_freed": free - pool.get_num_free_blocks(),
        "windows_not_freed": len(scheduler._windows),
        "stores_not_freed": sum(len(blocks) for blocks in scheduler._fusion.req_to_blocks.values()),
    }
    engine.llm_engine.engine_core.shutdown()
    del engine
    gc.collect()
    cleanup_dist_env_and_memory()
    return result


def main() -> None:
    torch.set_num_threads(1)
    cases = json.load(sys.stdin)
    preemptions = count_preemptions()
    results = []
    for case in cases:
        results.append(run_engine(case, preemptions))
        shown = {key: value for key, value in results[-1].items() if key not in ("answers", "wrong")}
        print(f"RESULT {shown} wrong: {len(results[-1]['wrong'])} {results[-1]['wrong'][:2]}", flush=True)
        Path(sys.argv[1]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
