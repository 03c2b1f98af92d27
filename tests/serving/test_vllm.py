# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""vLLM gives the tokens and log-probabilities of `casa_hf`, and frees what it has taken: `make test-vllm`.

Needs vLLM, which has an environment of its own; skipped without it. Each test starts engines in one process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

ROOT = Path(__file__).parents[2]

# Log-probabilities in float32 may differ by the order of sums.
TOLERANCE = 1e-4

# In bfloat16 and with quantised activations they may differ by this; tokens are compared up to the first that is as
# likely as another one but for twice as much.
LOW_PRECISION = 0.25


def serve(cases: list[dict[str, Any]], folder: Path) -> dict[str, dict[str, Any]]:
    """Run `vllm_engine` with these cases; what came out, by name."""
    for case in cases:
        case["folder"] = str(folder / case.get("model", case["name"]))
        case["engine"] = {"block_size": 32, **case.get("engine", {})}
    output = folder / "output.json"
    program = [sys.executable, "-m", "tests.serving.vllm_engine", str(output)]
    log = folder / "log.txt"
    with log.open("w") as file:
        done = subprocess.run(
            program,
            input=json.dumps(cases),
            text=True,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=os.environ,
        )
    assert done.returncode == 0, log.read_text()[-4000:]
    return {result["name"]: result for result in json.loads(output.read_text())}


def check(result: dict[str, Any], tolerance: float = TOLERANCE) -> None:
    """Every answer is the reference's, and nothing is left of any request."""
    assert not result["wrong"], result["wrong"][:3]
    assert result["worst"] < tolerance
    assert (result["blocks_not_freed"], result["windows_not_freed"], result["stores_not_freed"]) == (0, 0, 0)


def test_smoke(tmp_path: Path) -> None:
    """Three engines: prefix caching; chunks of 24 tokens and preemption in a small cache; image keys alone."""
    results = serve(
        [
            {"name": "casa", "checkpoint": {"variant": "casa"}, "rounds": 2},
            {
                "name": "small",
                "model": "casa",
                "engine": {
                    "max_num_batched_tokens": 64,
                    "num_gpu_blocks_override": 40,
                    "scheduler_reserve_full_isl": False,
                },
                "num_tokens": 40,
                "rounds": 1,
            },
            {"name": "ca", "checkpoint": {"variant": "ca-shared"}, "rounds": 1},
        ],
        tmp_path,
    )
    for result in results.values():
        check(result)
    assert results["casa"]["cached"] > 0
    assert results["small"]["preemptions"] > 0
    assert results["casa"]["answers"] != results["ca"]["answers"]


DESIGNS: dict[str, dict[str, Any]] = {
    "ca": {"variant": "ca"},
    "casa-shared": {"variant": "casa-shared"},
    "latest": {"variant": "casa", "casa_image_history": "latest"},
    "all": {"variant": "casa", "casa_image_history": "all", "casa_video_history": "all"},
    "ca-all": {"variant": "ca", "casa_image_history": "all", "casa_video_history": "all"},
    "insertion positions": {"variant": "casa", "casa_positions": "insertion"},
    "before": {"variant": "casa", "casa_image_positions": "before"},
    "gate, one layer": {"variant": "casa", "casa_gate": "tanh", "casa_layers": [1]},
    "shared gate": {"variant": "casa-shared", "casa_gate": "tanh"},
    "two layers, plain images": {"variant": "ca-shared", "casa_layers": [0, 2], "casa_image_norm": "none"},
    "gists": {"variant": "casa", "num_gist_tokens": 2},
    "ca gists": {"variant": "ca", "num_gist_tokens": 2},
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"family": "qwen2_vl"},
    "qwen3_vl": {"family": "qwen3_vl"},
    "qwen3_vl ca-shared": {"family": "qwen3_vl", "variant": "ca-shared"},
    "qwen3_vl before": {"family": "qwen3_vl", "casa_image_positions": "before"},
    "llama": {"family": "llama"},
    "qwen2_5_vl videos": {"family": "qwen2_5_vl"},
    "qwen3_vl group videos": {"family": "qwen3_vl", "casa_video_history": "group"},
    "qwen3 before": {"family": "qwen3", "casa_image_positions": "before"},
}


@pytest.mark.slow
@pytest.mark.parametrize("matrix", [DESIGNS, FAMILIES], ids=["designs", "families"])
def test_matrix(matrix: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    """Every design and family; no two designs have the same answers, so that one can't stand in for another."""
    cases = [
        {
            "name": name,
            "checkpoint": checkpoint,
            "rounds": 1,
            "single_images": name == "gists",
            "videos": "videos" in name,
            "engine": {"max_num_batched_tokens": 40},
        }
        for name, checkpoint in matrix.items()
    ]
    results = serve(cases, tmp_path)
    for result in results.values():
        check(result)
    answers = [json.dumps(result["answers"]) for result in results.values()]
    assert len(set(answers)) == len(answers)


@pytest.mark.slow
def test_adapters(tmp_path: Path) -> None:
    """Requests with adapters by PEFT and without, in one batch: of fusion layers, and of all blocks."""
    pytest.importorskip("peft", reason="adapters are written by PEFT")
    # On a CPU vLLM 0.32 gives requests without an adapter that of the last slot, so that one stays empty.
    engine = {"enable_lora": True, "max_loras": 3, "max_lora_rank": 8, "max_num_batched_tokens": 64}
    results = serve(
        [
            {
                "name": name,
                "checkpoint": {"variant": name},
                "adapters": {
                    "fusion": {"targets": "self-attention" if "shared" in name else "fusion", "rank": 4},
                    "all": {"targets": "language-model", "rank": 8},
                },
                "engine": engine,
                "rounds": 1,
            }
            for name in ("casa", "ca-shared")
        ],
        tmp_path,
    )
    for result in results.values():
        check(result)


@pytest.mark.slow
def test_weights(tmp_path: Path) -> None:
    """bfloat16, and quantised projections, against `casa_hf` in float32 with the same weights."""
    half = {"dtype": "bfloat16"}
    cases: list[dict[str, Any]] = [
        {"name": "bfloat16", "engine": half},
        {"name": "W8A8", "quantise": "W8A8"},
        {"name": "W4A16", "quantise": "W4A16", "engine": half},
        {"name": "W4A16_ASYM", "quantise": "W4A16_ASYM", "engine": half},
    ]
    rest = {"checkpoint": {"variant": "casa"}, "rounds": 1, "tolerance": LOW_PRECISION}
    results = serve([{**case, **rest} for case in cases], tmp_path)
    for result in results.values():
        check(result, LOW_PRECISION)
        assert result["equal"] > 0.4 * 12 * result["requests"]
    assert len({json.dumps(result["answers"]) for result in results.values()}) == len(cases)


def run_module(name: str, folder: Path) -> dict[str, Any]:
    """Run a program of this folder; what it has found."""
    output, log = folder / "output.json", folder / "log.txt"
    with log.open("w") as file:
        program = [sys.executable, "-m", f"tests.serving.{name}", str(output)]
        done = subprocess.run(program, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=os.environ)
    assert done.returncode == 0, log.read_text()[-4000:]
    return json.loads(output.read_text())


@pytest.mark.slow
def test_a_day_of_an_engine(tmp_path: Path) -> None:
    """Sessions say what a `CasaStream` says; after sessions, requests that were cut off and 1,000 pictures, nothing of
    them is left, and 800 pictures more have taken no more memory."""
    result = run_module("vllm_live", tmp_path)
    assert result["sessions"] == result["expected"]
    assert len({json.dumps(said) for said in result["expected"]}) == 3
    assert result["usage"] == 0
    assert result["bytes_after"] - result["bytes_before"] < 100e6


@pytest.mark.slow
def test_the_command_of_live_video(tmp_path: Path) -> None:
    """`examples/vllm_live.py` prints what the captioner says to a folder of frames, when it says something."""
    from casa_hf import CasaForConditionalGeneration, CasaProcessor
    from examples.tiny_world.live import CHECKPOINT, PROMPT, clip, new_stream

    frames, folder = clip(0, 8).frames, tmp_path / "frames"
    folder.mkdir()
    for number, frame in enumerate(frames):
        frame.save(folder / f"{number:03}.png")
    command = [sys.executable, "examples/vllm_live.py", str(CHECKPOINT), str(folder), "--prompt", PROMPT]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"} | os.environ
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    processor = CasaProcessor.from_pretrained(CHECKPOINT)
    expected = []
    with new_stream(CasaForConditionalGeneration.from_pretrained(CHECKPOINT).eval(), processor) as stream:
        for number, frame in enumerate(frames):
            ids = list(stream.push(frame))[-1].token_ids
            if text := processor.tokenizer.decode(ids, skip_special_tokens=True).strip():
                expected.append(f"{folder} {number / 2:7.2f} s  {text}")
    assert 0 < len(expected) < len(frames)
    assert [line for line in done.stdout.splitlines() if line.startswith(str(folder))] == expected


@pytest.mark.slow
def test_the_client_of_openai(tmp_path: Path) -> None:
    """`vllm serve`: pictures by URL and base64, two turns, streaming, windows that are too large, of new pictures and
    of one that was seen before; answers are `casa_hf`'s, after these too."""
    result = run_module("vllm_client", tmp_path)
    for name, (answer, expected) in result["answers"].items():
        assert answer == expected, name
    assert result["prompt_tokens"] == result["expected_prompt_tokens"]
    assert result["refused"][0] == 400
    assert "casa_max_image_tokens" in result["refused"][1]
    assert result["crowded"][0] == 500


@pytest.mark.slow
def test_tensor_parallel(tmp_path: Path) -> None:
    """Two processes with half of the heads each."""
    for case in (
        {"name": "casa", "checkpoint": {"variant": "casa"}},
        {"name": "ca-shared", "checkpoint": {"variant": "ca-shared"}},
    ):
        [result] = serve([{**case, "engine": {"tensor_parallel_size": 2}, "rounds": 1}], tmp_path).values()
        check(result)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"variant": "exact"}, r"casa_keys='context'.*--to-source"),
        ({"variant": "casa-before"}, "casa_placement='before'"),
        ({"variant": "casa-ffn"}, "casa_image_updates='ffn'"),
        ({"variant": "casa", "casa_text_windows": True}, "casa_text_windows=True"),
        (
            {"variant": "casa", "casa_image_history": "all"},
            "casa_image_history='all' with casa_video_history",
        ),
    ],
)
def test_designs_that_are_not_served_are_refused_by_name(fields: dict[str, Any], message: str) -> None:
    from casa_hf.serving.vllm.support import check_design
    from tests.serving.vllm_checkpoints import configuration

    with pytest.raises(ValueError, match=message):
        check_design(configuration(**fields))
    check_design(configuration())


def test_families_that_are_not_served_are_refused_by_name() -> None:
    from casa_hf.serving.vllm.support import check_design
    from tests.tiny import FAMILIES as TINY

    for family in ("qwen3_5_text", "smollm3", "helium", "qwen3_vl_moe_text"):
        with pytest.raises(ValueError, match=rf"doesn't serve CASA models of .*{family}"):
            check_design(TINY[family].casa_config())
    with pytest.raises(ValueError, match="a projector"):
        check_design(TINY["qwen2"].casa_config())


FOUR_BITS = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"all": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "symmetric": True}}},
    "ignore": ["lm_head"],
}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"enable_lora": True, "enable_tower_connector_lora": True}, "LoRA adapters of the vision tower"),
        ({"enable_lora": True, "fully_sharded_loras": True}, "sharded LoRA adapters"),
        ({"pipeline_parallel_size": 2}, "pipeline parallelism"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype='fp8"),
        ({"disable_hybrid_kv_cache_manager": True}, "disable_hybrid_kv_cache_manager"),
        ({"mm_processor_cache_type": "shm"}, "mm_processor_cache_type='shm'"),
        ({"hf_overrides": {"quantization_config": FOUR_BITS}}, "weights of 4 bits with float32; use --dtype bfloat16"),
        ({"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"}, "a scheduler of another class"),
        ({"additional_config": {"casa_max_image_tokens": 0}}, "casa_max_image_tokens=0.*must be a positive integer"),
    ],
)
def test_options_that_fusion_layers_do_not_work_with_are_refused_by_name(
    options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.engine.arg_utils import EngineArgs

    from tests.serving.vllm_checkpoints import TINY_WORLD

    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    arguments = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512, **options}
    with pytest.raises(ValueError, match=message):
        EngineArgs(model=str(TINY_WORLD / "checkpoints" / "casa"), **arguments).create_engine_config()


@pytest.mark.parametrize("name", ["visual.blocks.0.attn.qkv.lora_A", "language_model.embed_tokens.lora_embedding_A"])
def test_adapters_that_would_be_ignored_are_refused_by_name(name: str) -> None:
    from vllm.lora.utils import parse_fine_tuned_lora_name

    from casa_hf.serving.vllm.model import CasaForConditionalGeneration

    mapper = CasaForConditionalGeneration.hf_to_vllm_mapper.get_rename_mapper()
    served = "layers.1.casa_attn.q_proj"
    known = parse_fine_tuned_lora_name(f"base_model.model.model.language_model.{served}.lora_B.weight", mapper)
    assert known == (f"language_model.{served}", False)
    with pytest.raises(ValueError, match=rf"this one has model.{name}.*merge_and_unload"):
        parse_fine_tuned_lora_name(f"base_model.model.model.{name}.weight", mapper)
    assert mapper.apply_list(["model.visual.blocks.0.attn.qkv"]) == ["visual.blocks.0.attn.qkv"]


def test_images_that_the_encoder_has_not_given_are_not_seen() -> None:
    """Of two images that a step should have, only the first has come."""
    import torch

    from casa_hf.serving.vllm.model import CasaForConditionalGeneration

    rows = torch.arange(7 * 8.0).view(7, 8)
    rows[0] = torch.tensor([0, 2, 0, 3, 1, 0, 0, 0])  # height 2 and width 3, a frame
    mask = torch.tensor([False, True, False, True])
    images, features = CasaForConditionalGeneration._read_images(None, rows, mask)  # type: ignore[arg-type]
    assert images == [(1, (2, 3), True)]
    assert torch.equal(features, rows[1:])


def test_what_is_used_of_this_vllm_is_there() -> None:
    import vllm

    from tools.vllm_names import problems

    assert problems(Path(vllm.__file__).parents[1]) == []


def test_prompts_with_windows_that_are_too_large_are_refused_with_their_numbers() -> None:
    from casa_hf.serving.vllm.support import check_windows
    from casa_hf.serving.vllm.windows import PlacedImage
    from tests.serving.vllm_checkpoints import configuration

    config = configuration()
    config.casa_max_image_tokens = 20
    images = [PlacedImage(1, 16), PlacedImage(3, 16)]
    check_windows(config, images, [484, 485, 9, 485])  # text closes the first window
    with pytest.raises(ValueError, match="2 images with 32 image tokens in one window, which may have 20"):
        check_windows(config, images, [484, 485, 484, 485])
    config.casa_max_image_tokens = 32
    check_windows(config, images, [484, 485, 484, 485])
    gists = configuration(num_gist_tokens=1, gist_token_ids=[490])
    gists.casa_max_image_tokens = 32
    with pytest.raises(ValueError, match="2 images without text between them"):
        check_windows(gists, images, [484, 485, 490, 485])
