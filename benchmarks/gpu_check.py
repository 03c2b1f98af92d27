# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""One check of a GPU that fits into the time for which one is lent, the most valuable steps first.

Runs with the Python that has torch and Transformers, without an installation or a network; models are random weights
in the shapes of Qwen2.5-VL-3B, made on the device, in bfloat16. The first pass takes at most 300 seconds; other steps
are named. Each step has a time limit; results are in `gpu-check.json` as soon as it is over, so that a cut loses only
what wasn't reached. In the end there is a table of figures with their bars.

| step | first pass | |
|---|---|---|
| `machine` | x | versions; how fast a large copy and a large product are |
| `tests` | x | the tests of a CUDA device, in several processes, one shape for every kernel first |
| `eager` | x | streams of `casa` and the source at 896 x 896, first turns and those at turn 256; launches |
| `compiled` | x | a compiled stream of `casa`: tokens per second at 4,600 and 8,000 keys of text |
| `streams` | | 32 cameras of 448 x 448 at 2 frames per second in a `CasaStreamBatch`, from JPEG |
| `prefill` | | 1, 8 and 64 windows in one call |
| `training` | | a training step of `casa`, then of the source |
| `vllm` | | answers of vLLM beside those of `casa_hf`, and its speed beside the source's, where it is installed |

    PYTHONPATH=src:. python3 -m benchmarks.gpu_check
    PYTHONPATH=src:. python3 -m benchmarks.gpu_check --only streams --only prefill
    python -m benchmarks.gpu_check --device cpu --tiny    # a rehearsal
"""

from __future__ import annotations

import argparse
import faulthandler
import functools
import gc
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from benchmarks import prefill, streams, train_step, vllm_engines
from benchmarks.common import Stream as Prompt
from benchmarks.common import (
    let_stop,
    machine,
    quantile,
    random_source,
    source_config,
    versions,
    write,
)
from benchmarks.layer import speeds
from benchmarks.streaming import (
    PROMPT,
    SIZES,
    Bar,
    Camera,
    InsertionContender,
    LoopRunner,
    Sizes,
    StreamRunner,
    bars_table,
)
from casa_hf import CasaConfig, CasaForConditionalGeneration
from casa_hf.streaming import StreamSettings
from casa_hf.streaming.turns import StreamTurns

ROOT = Path(__file__).parents[1]
RESULTS, TABLE = "gpu-check.json", "gpu-check.md"
FIRST_PASS_SECONDS = 300.0
REHEARSAL = 6  # times as long as on a GPU
GRACE_SECONDS = 10.0  # that a step has to end by itself
_ENDED = re.compile(r"(\S+::.*) (PASSED|FAILED|ERROR|SKIPPED)(?: .*)?\[ *\d+%\]$")  # of a test, in pytest's output
TURN_256, LONG_TEXT = 4_600, 8_000  # text tokens of a stream


@dataclass
class Check:
    """What the steps share.

    Attributes:
        device: to be checked.
        tiny: whether shapes are small, to rehearse.
        attention: attention backend of CASA.
        results: what is known so far, by step.
        save: function that writes the results; called when a step has more to tell.
    """

    device: torch.device
    tiny: bool
    attention: str
    results: dict[str, dict[str, Any]]
    save: Callable[[], None]

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.on_gpu else torch.float32

    def sizes(self, frame: int, turns: int = 10, answer: int = 16) -> Sizes:
        """Shapes of models, and frames of so many pixels in each direction."""
        if self.tiny:
            return replace(SIZES["tiny"], turns=3)
        return replace(SIZES["cuda"], frame=frame, turns=turns, answer=answer)

    def text(self, tokens: int) -> int:
        """Tokens of a long text."""
        return tokens // 40 if self.tiny else tokens

    def casa(self, camera: Camera) -> CasaForConditionalGeneration:
        """A model of the variant `casa`."""
        torch.manual_seed(0)
        config = CasaConfig.from_source(source_config(camera.sizes.text, camera.sizes.vision), "casa")
        with torch.device(self.device):
            model = CasaForConditionalGeneration._from_config(
                config, dtype=self.dtype, attn_implementation=self.attention
            )
        model.config.casa_static_image_tokens = camera.sizes.frame_tokens
        let_stop(model, camera.processor)
        return model.eval()

    def source(self, sizes: Sizes) -> Any:
        """A model of the source's class."""
        return random_source(source_config(sizes.text, sizes.vision), self.device, self.dtype)

    def peak_gib(self) -> float:
        """The most that was allocated since the last `free`."""
        return torch.cuda.max_memory_allocated(self.device) / 2**30 if self.on_gpu else 0.0

    def free(self) -> None:
        """Give back what nobody holds."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)


@dataclass
class Findings:
    """Of a step: figures by name, and those among them that have a bar."""

    figures: dict[str, Any] = field(default_factory=dict)
    bars: list[Bar] = field(default_factory=list)

    def judge(self, what: str, measured: float, bar: float, at_least: bool = False) -> None:
        self.bars.append(Bar("casa", what, measured, bar, at_least))


# ---------------------------------------------------------------- steps


def check_machine(check: Check, found: Findings) -> None:
    """Versions, memory, and ceilings."""
    flops, moved = speeds(check.device, check.dtype, check.tiny)
    found.figures |= machine(check.device) | versions()
    if check.on_gpu:
        found.figures["memory_gib"] = torch.cuda.get_device_properties(check.device).total_memory / 2**30
    found.figures |= {"product_tflops": flops / 1e12, "copy_gb_per_s": moved / 1e9}


def check_tests(check: Check, found: Findings) -> None:
    """The tests that are marked `gpu`; on a CPU some of their twins."""
    on_gpu = check.on_gpu
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-o", "filterwarnings=default"]
    marked = ["-m", "gpu" if on_gpu else "not gpu and not slow"]
    collected = subprocess.run(
        [*pytest, *marked, "--collect-only", "-q", "tests/gpu"], cwd=ROOT, capture_output=True, text=True
    ).stdout
    names = in_order([line for line in collected.splitlines() if "::" in line])
    if not on_gpu:
        names = [name for name in names if "logits_processors" in name]
    if not names:
        raise RuntimeError(f"No tests were found:\n{collected[-2000:]}")
    processes = max(1, min(8, (os.cpu_count() or 1) - 1, len(names))) if on_gpu else 1
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / str(number) for number in range(processes)]
        running = []
        for number, log in enumerate(logs):
            with log.open("wb") as stream:
                command = [*pytest, *marked, "-v", "--tb=line", "--color=no", *names[number::processes]]
                running.append(subprocess.Popen(command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT))
        try:
            for process in running:
                process.wait()
        finally:
            for process in running:
                process.kill()
                process.wait()
            found.figures |= outcomes([log.read_text(errors="replace") for log in logs], len(names))
    found.judge("tests that failed or weren't reached", found.figures["failed"] + found.figures["not reached"], 0)


def in_order(names: list[str]) -> list[str]:
    """Tests with one of each kind first: what follows differs from an earlier one in its shapes alone."""
    seen: dict[str, int] = {}
    ranked = []
    for name in names:
        kind, _, parameters = name.partition("[")
        kernels = [known for known in ("sdpa", "torch_varlen", "flash_attention_2", "bfloat16") if known in parameters]
        key = f"{kind} {kernels}"
        seen[key] = seen.get(key, 0) + 1
        ranked.append((seen[key], name))
    return [name for _, name in sorted(ranked, key=lambda each: each[0])]


def outcomes(logs: list[str], tests: int) -> dict[str, Any]:
    """How many tests passed, failed, were skipped and weren't reached, and what failed, from pytest's output."""
    counted: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0}
    kinds = {"PASSED": "passed", "FAILED": "failed", "ERROR": "failed", "SKIPPED": "skipped"}
    failures, reasons = [], []
    for log in logs:
        for line in log.splitlines():
            if ended := _ENDED.match(line):
                name, kind = ended[1], kinds[ended[2]]
                counted[kind] += 1
                failures += [name] * (kind == "failed")
            elif line.startswith(("E ", "/")) and ": " in line:
                reasons.append(line[:300])
    reached = sum(counted.values())
    return {**counted, "not reached": tests - reached, "failures": failures[:40], "reasons": reasons[:40]}


def check_eager(check: Check, found: Findings) -> None:
    """Streams of `casa` and of the source, not compiled."""
    sizes = check.sizes(896)
    camera = Camera(sizes)
    model = check.casa(camera)
    runner = StreamRunner(model, camera, compile=False)
    casa = _turns(runner, camera)
    found.figures["casa"] = casa | {"peak_gib": check.peak_gib()}
    found.judge("peak memory of an eager stream, GiB", check.peak_gib(), 8.1)
    short = StreamRunner(model, camera, max_new_tokens_per_frame=4, compile=False)
    found.figures["casa"] |= _launches(runner, short, camera, sizes.answer)
    check.save()
    long = _long_stream(check, model, camera, TURN_256, compile=False)
    found.figures["casa at turn 256"] = _turns(long, camera, warm=1, turns=4)
    del model, runner, short, long
    check.free()
    check.save()

    source = check.source(sizes)
    let_stop(source, camera.processor)
    opening = StreamTurns(camera.processor, StreamSettings(prompt=PROMPT)).opening
    contender = InsertionContender(source, replace(sizes, prompt=len(opening)))
    loop = LoopRunner(contender, camera, opening)
    insertion = _turns(loop, camera)
    found.figures["insertion"] = insertion | {"peak_gib": check.peak_gib()}
    found.judge(
        "decoding time / insertion's, first turns, both eager", casa["decode_ms"] / insertion["decode_ms"], 1.15
    )
    found.figures["insertion"] |= _launches(loop, LoopRunner(contender, camera, opening, 4), camera, sizes.answer)
    check.save()
    loop.begin()
    contender.fill(256 if not check.tiny else 4)
    found.figures["insertion at turn 256"] = _turns(loop, camera, warm=1, turns=3)


def check_compiled(check: Check, found: Findings) -> None:
    """A compiled stream whose text has room for the longest of these."""
    sizes = check.sizes(896)
    camera = Camera(sizes)
    model = check.casa(camera)
    room = check.text(LONG_TEXT) + 64 * sizes.turn_text
    decoded = {}
    for name, tokens in (("", TURN_256), (" at 8,000 keys", LONG_TEXT), (" in the first turns", 0)):
        runner = _long_stream(check, model, camera, tokens, max_text_tokens=room, compile=True)
        start = time.perf_counter()
        runner.turn(camera.jpeg(0))
        figures = {"first_turn_s": time.perf_counter() - start} | _turns(runner, camera, warm=2, turns=6)
        decoded[tokens] = figures["decode_ms"]
        found.figures[f"casa{name or ' at 4,600 keys'}"] = figures | {"tokens_per_s": 1e3 / figures["decode_ms"]}
        if tokens == TURN_256:
            for bar in (200, 300):
                found.judge("decoding, compiled, 4,600 keys, tokens/s", 1e3 / figures["decode_ms"], bar, True)
            for bar in (35, 20):
                found.judge("TTFT from JPEG, 4,600 keys, ms", figures["ttft_ms"], bar)
        elif tokens == LONG_TEXT:
            found.judge("decoding, compiled, 8,000 keys, tokens/s", 1e3 / figures["decode_ms"], 200, True)
            found.judge("peak memory of a compiled stream, GiB", check.peak_gib(), 8.1)
        else:
            found.judge("decoding time, 4,600 keys / first turns", decoded[TURN_256] / decoded[0], 1.03)
            first = check.results.get("eager", {}).get("figures", {}).get("insertion", {}).get("decode_ms")
            if first:
                found.judge("compiled decoding time / eager insertion's, first turns", decoded[0] / first, 1.15)
        del runner
        check.save()


def check_streams(check: Check, found: Findings) -> None:
    """Cameras in real time, preprocessing included."""
    sizes = check.sizes(448, answer=5)
    camera = Camera(sizes)
    model = check.casa(camera)
    cameras, seconds = (3, 2.0) if check.tiny else (32, 15.0)
    live = streams.watch_random(model, camera, cameras, 2.0, seconds)
    found.figures |= live.figures() | {"peak_gib": check.peak_gib()}
    found.judge(f"{cameras} cameras at 2 frames/s: frames dropped", live.dropped, 0)
    found.judge(f"{cameras} cameras at 2 frames/s: p95 of latency, ms", 1e3 * quantile(live.latency, 95), 250)


def check_prefill(check: Check, found: Findings) -> None:
    """Windows in one call."""
    sizes = prefill.SIZES["tiny" if check.tiny else "cuda"]
    source = random_source(source_config(sizes.text, sizes.vision), check.device, check.dtype)
    prompt = Prompt(replace(sizes, frames=3), source)
    contenders, missing = prefill.contenders(source, ["casa"], ["sdpa", "torch_varlen"], prompt)
    found.figures["not here"] = missing
    for count in (1, 8, 64):
        measured = prefill.measure(source, contenders, sizes, [count], rounds=2)
        for name, by_count in measured.items():
            found.figures.setdefault(name, {})[f"{count} windows"] = by_count[count]
        check.save()
    for name in contenders:
        if name != "insertion":
            own = found.figures[name]
            ratio = own["64 windows"]["seconds"] / own["8 windows"]["seconds"]
            found.judge(f"prefill, {name}: 64 windows / 8 windows, time", ratio, prefill.LINEAR_BAR)


def check_training(check: Check, found: Findings) -> None:
    """A step of `casa`, then of the source."""
    size = train_step.SIZES["tiny" if check.tiny else "qwen2.5-vl-3b"]
    itemsize, memory = (2, torch.cuda.get_device_properties(check.device).total_memory) if check.on_gpu else (4, 2**40)
    names = ("casa", train_step.SOURCE)

    def counted(conversations: int) -> list[train_step.Count]:
        return [train_step.count(size, name, conversations, itemsize) for name in names]

    conversations = train_step.largest(size, counted, train_step.SHARE_OF_MEMORY * memory)
    if conversations is None:
        raise RuntimeError(f"By count no batch fits into {memory / 1e9:.0f} GB.")
    batch = train_step.Batch.make(size, conversations, check.device)
    for name in names:
        figures = train_step.measure(size, name, batch, 2, check.device)
        found.figures[name] = figures | {
            "text_tokens_per_s": batch.text_tokens / figures["seconds"],
            "conversations": conversations,
        }
        check.free()
        check.save()
    casa, source = (found.figures[name] for name in names)
    found.judge("training, tokens/s / the source's", source["seconds"] / casa["seconds"], 1.04, True)
    found.judge("training, peak memory / the source's", casa["bytes"] / source["bytes"], train_step.MEMORY_BAR)


def check_vllm(check: Check, found: Findings) -> None:
    """vLLM in processes of its own: whether it gives the tokens of `casa_hf`, then `benchmarks.vllm_engines`."""
    if find_spec("vllm") is None:
        raise Skipped("this Python has no vLLM")
    low = "bfloat16" if check.on_gpu else "float32"
    options = {"dtype": low, "block_size": 32, "enforce_eager": not check.on_gpu}
    if check.on_gpu:
        options["gpu_memory_utilization"] = 0.3
    tolerance = 0.25 if check.on_gpu else 1e-4
    with tempfile.TemporaryDirectory() as folder:
        cases = [
            {
                "name": name,
                "folder": str(Path(folder) / name),
                "checkpoint": {"variant": name},
                "engine": options,
                "tolerance": tolerance,
                "rounds": 1,
            }
            for name in (["casa"] if check.tiny else ["casa", "ca-shared"])
        ]
        answers, speed = Path(folder) / "answers.json", Path(folder) / "speed.json"
        _program("tests.serving.vllm_engine", str(answers), given=json.dumps(cases))
        for result in json.loads(answers.read_text()):
            name = result.pop("name")
            wrong = len(result.pop("wrong"))
            del result["answers"]
            found.figures[name] = result | {"wrong": wrong}
            found.judge(f"vLLM, {name}: requests with other tokens than casa_hf", wrong, 0)
            found.judge(f"vLLM, {name}: difference of log-probabilities", result["worst"], tolerance)
        check.save()
        size = ["--size", "tiny" if check.tiny else "3b", "--requests", "1", "8", "--pictures", "1", "4"]
        try:
            _program("benchmarks.vllm_engines", *size, "--output", str(speed))
        finally:
            if speed.exists():
                results = json.loads(speed.read_text())
                found.figures["speed"] = {"vllm": results["versions"]["vllm"], **results["cases"]}
                found.figures["casa / insertion"] = vllm_engines.ratios(results["cases"])


def _program(module: str, *arguments: str, given: str = "") -> None:
    """Run a program of this repository.

    Raises:
        RuntimeError: if it fails, with the end of what it has said.
    """
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=ROOT, input=given, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        raise RuntimeError(f"{module} ended with {done.returncode}: {done.stdout[-2000:]}")


@dataclass(frozen=True)
class Step:
    """A step, and how many seconds it may take."""

    run: Callable[[Check, Findings], None]
    seconds: float
    first_pass: bool = False


STEPS = {
    "machine": Step(check_machine, 20, True),
    "tests": Step(check_tests, 85, True),
    "eager": Step(check_eager, 70, True),
    "compiled": Step(check_compiled, 110, True),
    "streams": Step(check_streams, 90),
    "prefill": Step(check_prefill, 60),
    "training": Step(check_training, 75),
    "vllm": Step(check_vllm, 150),
}


# ---------------------------------------------------------------- what steps measure


def _turns(runner: Any, camera: Camera, warm: int = 2, turns: int | None = None) -> dict[str, float]:
    """Medians over turns, without those that warm up."""
    taken = [runner.turn(camera.jpeg(number)) for number in range(warm + (turns or camera.sizes.turns))][warm:]
    return {
        "ttft_ms": statistics.median(turn.ttft_ms for turn in taken),
        "decode_ms": statistics.median(turn.decode_ms for turn in taken),
        "ttft_p95_ms": quantile([turn.ttft_ms for turn in taken], 95),
    }


def _long_stream(
    check: Check, model: CasaForConditionalGeneration, camera: Camera, tokens: int, **settings: Any
) -> StreamRunner:
    """A stream that has so many tokens of text before its first frame."""
    word = " a"
    length = len(camera.processor.tokenizer(word * 64)["input_ids"]) / 64
    prompt = PROMPT + word * round(check.text(tokens) / length)
    return StreamRunner(model, camera, prompt=prompt, **settings)


def _launches(runner: Any, short: Any, camera: Camera, answer: int) -> dict[str, dict[str, float]]:
    """Kernels and waits of a frame and of a decoding step, from a turn of many tokens and one of four."""
    many, few = (_counted(functools.partial(each.turn, camera.jpeg(0))) for each in (runner, short))
    steps = answer - 4
    of_step = {name: (many[name] - few[name]) / max(1, steps) for name in many}
    return {"a step": of_step, "a frame": {name: few[name] - 3 * of_step[name] for name in few}}


def _counted(function: Callable[[], Any]) -> dict[str, int]:
    """Kernels that a GPU was given meanwhile, copies from it, and calls that wait for it."""
    function()
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        function()
    counted = {"kernels": 0, "copies to the host": 0, "waits": 0}
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            counted["kernels"] += not event.name.startswith(("Memcpy", "Memset"))
            counted["copies to the host"] += event.name.startswith("Memcpy DtoH")
        elif event.name in ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"):
            counted["waits"] += 1
    return counted


# ---------------------------------------------------------------- running them


class Skipped(Exception):
    """A step can't be run here, and needn't be."""


class TimeUp(BaseException):
    """A step has had its time; nothing in it is to go on."""


def work(arguments: argparse.Namespace) -> None:
    """Run the steps, in this process."""
    disable_progress_bar()
    set_verbosity_error()
    path = arguments.output / RESULTS
    results: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}
    device = torch.device(arguments.device)
    check = Check(device, arguments.tiny, arguments.attn, results, lambda: None)

    def time_up(*_: Any) -> None:
        raise TimeUp

    signal.signal(signal.SIGALRM, time_up)
    for name in arguments.worker:
        left = arguments.until - time.time()
        seconds = min(STEPS[name].seconds * (1 if check.on_gpu else REHEARSAL), left)
        results[name] = {"state": "began"}
        if seconds < 5:
            results[name] = {"state": "no time was left for it"}
            write(path, json.dumps(results))
            continue
        _run_step(check, name, seconds, path)
    write(path, json.dumps(results))


def _run_step(check: Check, name: str, seconds: float, path: Path) -> None:
    found = Findings()
    started = time.monotonic()

    def save(state: str = "not at its end") -> None:
        bars = [asdict(bar) | {"met": bar.met} for bar in found.bars]
        taken = round(time.monotonic() - started, 1)
        check.results[name] = {"state": state, "seconds": taken, "figures": found.figures, "bars": bars}
        write(path, json.dumps(check.results))

    check.save = save
    save()
    # Where Python isn't reached, in a compiler say, the process ends, and the next one continues with the next step.
    faulthandler.dump_traceback_later(seconds + GRACE_SECONDS, exit=True)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        check.free()
        STEPS[name].run(check, found)
        state = "done"
    except TimeUp:
        state = f"stopped after {seconds:.0f} s"
    except Skipped as reason:
        state = f"skipped: {reason}"
    except Exception as error:
        traceback.print_exc()
        state = f"failed: {type(error).__name__}: {str(error)[:500]}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
    save(state)
    print(f"{name}: {state}, {check.results[name]['seconds']} s; {json.dumps(found.figures)[:1500]}", flush=True)


def supervise(
    arguments: argparse.Namespace, steps: list[str], until: float, program: str = "benchmarks.gpu_check"
) -> dict[str, dict[str, Any]]:
    """Run the steps in a process that is started again behind a step that has ended it.

    Args:
        arguments: of this program.
        steps: names of the steps, in order.
        until: when all must be over, in seconds since 1970.
        program: module that calls `work`.

    Returns:
        The results, by step.
    """
    path = arguments.output / RESULTS
    results: dict[str, dict[str, Any]] = {}
    left = steps
    while left:
        command = [sys.executable, "-m", program, "--device", arguments.device]
        command += ["--attn", arguments.attn, "--output", str(arguments.output), "--until", str(until)]
        command += ["--tiny"] * arguments.tiny
        code = subprocess.run([*command, "--worker", *left], cwd=ROOT).returncode
        results = json.loads(path.read_text()) if path.exists() else {}
        reached = [name for name in left if name in results]
        if code == 0:
            break
        last = reached[-1] if reached else left[0]
        results[last] = results.get(last, {}) | {"state": f"ended its process ({code})"}
        write(path, json.dumps(results))
        left = left[left.index(last) + 1 :]
    return results


def summary(results: dict[str, dict[str, Any]], on_gpu: bool) -> str:
    """Steps and bars as tables."""
    lines = [f"- `{name}`: {own.get('state')}, {own.get('seconds', 0)} s" for name, own in results.items()]
    bars = [
        Bar(f"{name}: {bar['contender']}", bar["what"], bar["measured"], bar["bar"], bar["at_least"])
        for name, own in results.items()
        for bar in own.get("bars", [])
    ]
    note = [] if on_gpu else ["The bars are for one H100 or H200 and full size; elsewhere they say nothing.", ""]
    return "\n".join([*lines, "", *note, bars_table(bars), ""])


def parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="to check (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to rehearse")
    parser.add_argument(
        "--only", action="append", choices=STEPS, help="a step, or several, in place of the first pass"
    )
    parser.add_argument("--attn", default="sdpa", help="attention backend of CASA (default: %(default)s)")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(os.environ.get("OUT", "gpu-check-output")),
        help="folder of the results (default: $OUT, or gpu-check-output)",
    )
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    return parser


def main() -> None:
    options = parser()
    arguments = options.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        options.error("--device cuda: this torch sees no CUDA device; use --device cpu --tiny to rehearse.")
    arguments.output = arguments.output.absolute()
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.worker:
        work(arguments)
        return
    (arguments.output / RESULTS).unlink(missing_ok=True)
    steps = [name for name in STEPS if (name in arguments.only if arguments.only else STEPS[name].first_pass)]
    seconds = sum(STEPS[name].seconds + GRACE_SECONDS for name in steps)
    seconds = seconds if arguments.only else FIRST_PASS_SECONDS - GRACE_SECONDS
    until = time.time() + seconds * (1 if arguments.device == "cuda" else REHEARSAL)
    results = supervise(arguments, steps, until)
    written = summary(results, arguments.device == "cuda" and not arguments.tiny)
    write(arguments.output / TABLE, written)
    print(written)
    if not all(results.get(name, {}).get("state", "").startswith(("done", "skipped")) for name in steps):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
