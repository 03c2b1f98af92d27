# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The benchmarks of speed: what they count against PyTorch's counters, their rivals against other ways to the same
numbers, and each program at toy size."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from benchmarks import (
    captions,
    forever,
    layer,
    prefill,
    preprocessing,
    soak,
    streaming,
    streams,
    train_step,
    training_cost,
    vllm_engines,
)
from benchmarks.common import (
    TINY_TEXT,
    TINY_VISION,
    Stream,
    allocated_bytes,
    casa_model,
    let_stop,
    random_source,
    source_config,
    weight_bytes,
)
from benchmarks.counting import (
    Dimensions,
    cache_bytes,
    head_flops,
    image_flops,
    language_parameters,
    step_bytes,
    text_flops,
    tower_flops,
)
from benchmarks.prefill import Prompt
from benchmarks.streaming import SIZES, Camera, CasaContender, InsertionContender
from benchmarks.variants import Contestant
from casa_hf import CasaConfig, CasaForConditionalGeneration, CasaProcessor, CasaStream, cache_nbytes, loss_casa
from tests.tiny_world.reader import areas

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
TINY = SIZES["tiny"]
clips = streams.clips
SEEN = TINY.frame_tokens
# The last one keeps image keys that only updates of image states read.
DESIGNS = [*((name, {}) for name in ("casa", "ca", "casa-shared", "ca-shared", "casa-ffn", "exact"))]
DESIGNS += [("ca-shared", {"casa_image_updates": "full"})]


@pytest.fixture(scope="module")
def source():
    """The source model on plain matrix products, which PyTorch's counter sees; no two of its tensors are alike."""
    model = random_source(source_config(TINY_TEXT, TINY_VISION), attn_implementation="eager")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def camera() -> Camera:
    return Camera(TINY)


def flops(function) -> int:
    """What PyTorch counts, without the rotary tables, which are made by a matrix product."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        function()
    counts = counter.get_flop_counts()
    rotary = sum(sum(ops.values()) for name, ops in counts.items() if name.endswith("rotary_emb"))
    return counter.get_total_flops() - rotary


@torch.no_grad()
def advance(contender, camera: Camera, turns: int) -> None:
    """Run so many turns of random words."""
    generator = torch.Generator().manual_seed(2)
    words = torch.randint(4, 64, (1, TINY.prompt + turns * TINY.answer), generator=generator)
    contender.begin(words[:, : TINY.prompt])
    position = TINY.prompt - 1
    for turn in range(turns):
        contender.frame(words[:, position : position + 1], camera.pixels(camera.jpeg(turn)))
        for index in range(1, TINY.answer):
            contender.step(words[:, position + index : position + index + 1])
        position += TINY.answer


# ---------------------------------------------------------------- counted


def test_tower_flops(source, camera):
    pixels = camera.pixels(camera.jpeg(0))
    counted = flops(lambda: source.get_image_features(pixels, camera.grid))
    assert counted == tower_flops(source.config.vision_config, TINY.patches, TINY.patches)


@pytest.mark.parametrize(("variant", "overrides"), DESIGNS)
def test_bytes_and_flops_of_a_stream(variant, overrides, source, camera):
    model = casa_model(source, variant, "eager", **overrides)
    contender = CasaContender(model, TINY)
    advance(contender, camera, turns=2)
    text = TINY.prompt - 1 + 2 * TINY.turn_text
    assert contender.kv_tokens() == text

    held = sum(cache_nbytes(contender.cache).values())
    assert cache_bytes(model.config, 4, text, TINY.answer, SEEN) == held
    language = weight_bytes(model.model.language_model)
    assert 4 * language_parameters(model.config) == language
    unread = cache_nbytes(contender.cache)["image"] // 2 if overrides else 0
    assert step_bytes(model.config, 4, text, TINY.answer, SEEN) == language + held - unread
    assert contender.predict(2)["decode_bytes"] == language + held - unread

    counted = flops(lambda: contender.step(torch.tensor([[9]])))
    expected = text_flops(model.config, text + 1, TINY.answer + 1, SEEN) + head_flops(model.config)
    assert counted == expected


def test_memory_with_its_room_is_counted_once(source):
    """Windows are joined with their images, in one piece of memory with room for more; so is text."""
    model = casa_model(source, "casa")
    layers, cache = model.config.text_config.num_hidden_layers, DynamicCache()
    with torch.no_grad():
        model(input_ids=torch.full((1, 7), 9), cache=cache)
        text = cache_nbytes(cache)["text"] // 7  # of one token
        assert allocated_bytes(cache) == text * (7 + 64)  # and not the queries that were made with the keys
        model(input_ids=torch.full((1, 1), 9), cache=cache)
    assert cache_nbytes(cache)["text"] == 8 * text
    assert allocated_bytes(cache) == text * (7 + 64)
    assert text == layers * 2 * 4 * cache.layers[0].keys.shape[1] * cache.layers[0].keys.shape[3]


def test_insertions_stream_is_counted(source, camera):
    for window, seen in ((None, 3), (2, 2)):
        contender = InsertionContender(source, TINY, window)
        advance(contender, camera, turns=3)
        text = TINY.prompt - 1 + 3 * TINY.turn_text
        assert contender.kv_tokens() == text + seen * SEEN
        held = sum(cache_nbytes(contender.cache).values())
        assert contender.predict(3)["decode_bytes"] == weight_bytes(source.model.language_model) + held

        text, seen = text + 3, seen + (window is None)
        config = CasaConfig.from_source(source_config(TINY_TEXT, TINY_VISION), "insertion")
        expected = 3 * text_flops(config, text, 0, seen * SEEN) + image_flops(config, SEEN, text, seen * SEEN)
        expected += head_flops(config) + tower_flops(config.vision_config, TINY.patches, TINY.patches)
        assert contender.predict(4)["frame_flops"] == expected
        assert flops(partial(contender.frame, torch.tensor([[9]]), camera.pixels(camera.jpeg(3)))) == expected


@pytest.mark.parametrize("variant", ["casa", "ca"])
def test_layers_flops_and_bytes(variant, source):
    sizes = replace(prefill.SIZES["tiny"], frames=2, decoded=1, last_words=2)
    model = casa_model(source, variant, "eager")
    stream = Stream(sizes, source)
    contestant = Contestant(model, stream, stream.casa, torch.arange)
    contestant.prefill()
    counter = FlopCounterMode(display=False)
    with counter:
        contestant.decode()
    counts = counter.get_flop_counts()
    # Queries, keys and values of text are made beside self-attention's, before the layer is called.
    parts = ("casa_attn", "casa_attn.q_proj", "casa_attn.k_proj", "casa_attn.v_proj")
    own = sum(sum(ops.values()) for name, ops in counts.items() for part in parts if name.endswith(f"layers.0.{part}"))
    needed, moved = layer.fusion_cost(model.config, sizes, "decode", 4)
    assert needed == own
    fusion = model.model.language_model.layers[0].casa_attn
    layers = contestant.cache.layers
    text = sum(tensor.nbytes for held in layers for tensor in (held.keys, held.values))
    keys = (sum(cache_nbytes(contestant.cache).values()) - text) // len(layers)
    assert moved == weight_bytes(fusion) + keys + 2 * 4 * sizes.text["hidden_size"]

    with FlopCounterMode(display=False) as counter:
        Contestant(source, stream, stream.source, stream.source_text).prefill()
    (own,) = (
        sum(ops.values()) for name, ops in counter.get_flop_counts().items() if name.endswith("layers.0.self_attn")
    )
    config = CasaConfig.from_source(source_config(TINY_TEXT, TINY_VISION), "insertion")
    size, queries = Dimensions.of(config), 2 * (sizes.words + sizes.image_tokens)
    needed, _ = layer.insertion_cost(config, sizes, "prefill", 4)
    assert needed == own - size.attend(queries * (queries - 1) // 2)  # pairs above the diagonal aren't needed


@pytest.mark.parametrize("variant", ["casa", "ca-ffn", "insertion"])
def test_prefill_flops(variant, source):
    sizes = replace(prefill.SIZES["tiny"], frames=1)
    config = CasaConfig.from_source(source_config(TINY_TEXT, TINY_VISION), variant)
    size, text, tokens = Dimensions.of(config), sizes.words, sizes.image_tokens
    # All pairs of a single window as the plain reference computes them, and without half of the text's.
    everything = text * text_flops(config, text, text, tokens) + image_flops(config, tokens, text, tokens)
    run = Prompt(casa_model(source, variant, "eager"), "eager").run
    assert flops(lambda: run(Stream(sizes, source))) == everything + head_flops(config)
    needed = prefill.prefill_flops(config, 1, tokens, text)
    pairs = size.blocks * size.attend((text + tokens) ** 2)
    assert everything - 2 * pairs <= needed <= everything + head_flops(config)
    many = prefill.prefill_flops(config, 8, tokens, text)
    assert 8 * (needed - head_flops(config)) <= many - head_flops(config)


# ---------------------------------------------------------------- rivals


def test_streams_equal_one_call(source, camera):
    models = {
        "all": InsertionContender(source, TINY),
        "last": InsertionContender(source, TINY, 2),
        "casa": CasaContender(casa_model(source, "casa"), TINY),
    }
    errors = streaming.check(models, TINY, camera, turns=4)
    assert max(errors.values()) < 1e-5


def test_a_wrong_stream_is_not_measured(source, camera):
    contender = InsertionContender(source, TINY)
    contender.offsets = contender.offsets.clone()
    contender.offsets[1:, :, 2:-1] = contender.offsets[1:, :, 2:-1].flip(-1)
    with pytest.raises(RuntimeError, match=r"insertion, 2 turns against one call, differs .* by \S+ of the largest"):
        streaming.check({"insertion": contender}, TINY, camera, turns=2)


@pytest.mark.slow
def test_compiled_insertion_outgrows_its_static_cache(source, camera):
    """Compiled for the length at hand, moved to a longer cache when that is full."""
    sizes = replace(TINY, turns=2)
    contender = InsertionContender(random_source(source.config), sizes, compiled=True)
    assert streaming.check({"insertion": contender}, sizes, camera, turns=3)["insertion"] < 1e-5
    assert contender.kv_tokens() == sizes.prompt - 1 + 3 * (sizes.turn_text + SEEN)
    assert contender.cache.get_max_length() == 4 * (sizes.prompt - 1 + sizes.turn_text + SEEN)


def test_a_stream_says_what_one_call_finds_likeliest(source, camera, monkeypatch):
    """Unless it isn't given the frame that was taken."""
    model = casa_model(source, "casa")
    let_stop(model, camera.processor)
    runner = streaming.StreamRunner(model, camera)
    assert streaming.check_stream("casa", runner, turns=3) < 1e-5
    assert runner.kv_tokens() == runner.contender.sizes.prompt - 1 + 3 * TINY.turn_text
    held = cache_bytes(model.config, 4, runner.kv_tokens(), TINY.answer, SEEN)
    assert runner.cache_bytes() == held
    turn = runner.turn
    monkeypatch.setattr(runner, "turn", lambda content: turn(camera.jpeg(9)))
    with pytest.raises(RuntimeError, match=r"casa, 3 turns: a token of the stream is \S+ of the largest logit below"):
        streaming.check_stream("casa", runner, turns=3)


def test_a_batch_that_says_something_else_is_not_reported(source, camera, monkeypatch):
    let_stop(source, camera.processor)
    model = casa_model(source, "casa")
    let_stop(model, camera.processor)
    found = streams.fleets(TINY, camera, 2, source, model)
    assert {len(own) for own in streams.run(found, camera, 2, torch.device("cpu")).values()} == {TINY.turns}
    turn = found["batch"].turn
    monkeypatch.setattr(found["batch"], "turn", lambda frames: turn(frames[::-1]))
    with pytest.raises(RuntimeError, match=r"In turn \d+ the batch says other tokens than single streams"):
        streams.run(found, camera, 2, torch.device("cpu"))


def test_a_batch_that_is_late_drops_frames(source, camera):
    """Faster cameras than any machine, and slower ones; of each frame one knows what has become of it."""
    let_stop(source, camera.processor)
    model = casa_model(source, "casa")
    let_stop(model, camera.processor)
    slow = streams.watch_random(model, camera, 2, fps=1.0, seconds=2)
    assert slow.frames == len(slow.latency) == 4 and slow.tokens == 4 * TINY.answer and not slow.dropped
    fast = streams.watch_random(model, camera, 2, fps=2_000.0, seconds=0.05)
    assert fast.frames == 200 and fast.dropped == 200 - len(fast.latency) > 100 and not fast.keeps_up
    assert replace(slow, latency=[0.4] * 90 + [0.6] * 10).keeps_up is False
    assert replace(slow, latency=[0.4] * 96 + [0.6] * 4).keeps_up is True


def test_a_camera_knows_what_is_to_be_said(monkeypatch):
    watched = streams.watch_captioner(2, 4.0, 1.0, torch.device("cpu"))
    assert watched.frames - watched.dropped == len(watched.latency) and watched.wrong <= watched.dropped
    monkeypatch.setattr(streams, "clips", lambda stream: ((content, "no such thing") for content, _ in clips(stream)))
    watched = streams.watch_captioner(1, 4.0, 0.5, torch.device("cpu"))
    assert watched.wrong == len(watched.latency) > 0


def test_a_wrong_backend_is_not_measured(source):
    def wrong(module, query, key, value, mask, **kwargs):
        output, weights = sdpa_attention_forward(module, query, key, value, mask, **kwargs)
        return 1.1 * output, weights

    AttentionInterface.register("wrong", wrong)
    AttentionMaskInterface.register("wrong", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    stream = Stream(replace(prefill.SIZES["tiny"], frames=2), source)
    with pytest.raises(RuntimeError, match="casa wrong differs from what it must equal by"):
        prefill.contenders(source, ["casa"], ["sdpa", "wrong"], stream)


def test_speedups_compare_turn_by_turn():
    # A machine that slows down to half in the middle of the first three turns: medians alone would give 10 / 24.
    rival = [10.0, 10.0, 20.0] + [30.0] * 24 + [90.0, 90.0, 180.0]
    own = [12.0, 24.0, 24.0] + [30.0] * 24 + [45.0, 60.0, 90.0]
    assert streaming.speedups(rival, own) == (10 / 12, 2.0)


def test_bars_are_judged_on_the_side_they_stand(source):
    models = {"insertion": InsertionContender(source, TINY), "casa": CasaContender(casa_model(source, "casa"), TINY)}
    figures = {
        "insertion": {"ttft_ms": [100.0, 800.0], "decode_ms": [10.0, 30.0]},
        "casa": {
            "ttft_ms": [80.0, 100.0],
            "decode_ms": [12.0, 14.0],
            "ttft_speedup": [1.25, 8.0],
            "decode_speedup": [1 / 1.2, 30 / 14],
        },
    }
    found = {bar.what: (round(bar.measured, 3), bar.met) for bar in streaming.bars(models, figures, "cpu")}
    assert found == {
        "TTFT, times faster than insertion, last 10 %": (8.0, True),
        "decoding, times faster, last 10 %": (2.143, True),
        "decoding time / insertion's, first 10 %": (1.2, True),
        "TTFT, last / first 10 %": (1.25, False),
        "decoding time, last / first 10 %": (1.167, False),
    }


# ---------------------------------------------------------------- a stream without an end


def test_a_line_is_that_of_least_squares_with_student_s_interval():
    """Against the normal equations, and tables of Student's t."""
    values = [
        3.0 + 0.25 * turn + noise for turn, noise in enumerate([0.5, -1.0, 0.25, 2.0, -0.5, 1.0, -2.0, 0.75] * 5)
    ]
    found = forever.line(values, blocks=20)
    means = torch.tensor(values, dtype=torch.float64).view(20, 2).mean(1)
    places = torch.stack([torch.arange(20, dtype=torch.float64) * 2 + 1, torch.ones(20, dtype=torch.float64)], dim=1)
    solution = torch.linalg.lstsq(places, means[:, None]).solution[:, 0]
    variance = float((means - places @ solution).pow(2).sum()) / 18
    error = float((variance * torch.linalg.inv(places.T @ places))[0, 0]) ** 0.5
    assert found.slope == pytest.approx(float(solution[0]))
    half = pytest.approx(2.101 * error, rel=1e-3)
    assert found.high - found.slope == half and found.slope - found.low == half
    assert not found.flat and forever.line([1.0, 2.0, 1.0, 2.0, 1.0, 2.0, 1.0], 7).flat
    for freedom, quantile in ((1, 12.706), (2, 4.303), (3, 3.182), (8, 2.306), (48, 2.011)):
        assert forever.student_t(freedom) == pytest.approx(quantile, rel=5e-3)
    for freedom, quantile in ((1, 63.657), (2, 9.925), (8, 3.355), (48, 2.682)):
        assert forever.student_t(freedom, 0.01) == pytest.approx(quantile, rel=5e-3)


def test_lines_that_are_judged_together_have_wider_intervals():
    values = [0.0, 1.0, 0.5, 2.0, 1.0, 2.5, 0.0, 3.0]
    alone, one_of_ten = (forever.line(values, 8, judged) for judged in (1, 10))
    error = (alone.high - alone.slope) / forever.student_t(6)
    assert one_of_ten.high == alone.high and alone.widest == pytest.approx(alone.high - alone.slope)
    assert one_of_ten.widest == pytest.approx(forever.student_t(6, 0.005) * error)


def test_bounded_text_stays_and_unbounded_text_grows_as_predicted():
    sizes = replace(forever.SIZES["tiny"], turns=30)
    bounded, unbounded = (
        forever.run(forever.contender(name, "casa", sizes, torch.device("cpu"), "sdpa"), sizes, sizes.turns)
        for name in ("bounded", "unbounded")
    )
    assert unbounded.cache[-1] == unbounded.predicted
    assert unbounded.kv_tokens == sizes.prompt + 30 * sizes.turn_text - 1
    assert max(bounded.cache[8:]) == max(bounded.cache[-8:]) < unbounded.cache[-1] / 2
    assert bounded.kv_tokens <= sizes.max_text_tokens + sizes.turn_text
    for record in (bounded, unbounded):
        assert all(held < own for held, own in zip(record.cache[1:], record.allocated[1:], strict=True))
        assert max(record.allocated) <= record.most
    assert bounded.most < unbounded.most


def test_what_must_hold_is_judged_and_memory_of_an_unbounded_stream_is_not():
    level = forever.Record([2.0, 1.0] * 15, [6, 7] * 15, [8, 9] * 15, [20, 21] * 15, predicted=7, most=9)
    rising = replace(level, resident=list(range(20, 50)), cache=[*range(29), 7])
    sizes = replace(forever.SIZES["tiny"], turns=30)

    def broken(**records: forever.Record) -> list[str]:
        given = {"bounded": level, "unbounded": level, **records}
        judged = forever.judgements(given, forever.lines(given, sizes), slopes=True)
        assert len(judged) == 8 - (not records.get("bounded", level).resident[0])
        return [what.split(":")[0] for _, what, holds in judged if not holds]

    assert broken() == broken(unbounded=rising) == broken(bounded=replace(level, resident=[0] * 30)) == []
    assert broken(bounded=rising) == ["cache", "memory"]
    slower = replace(level, turn_ms=[1.0 + turn / 10 for turn in range(30)])
    assert broken(bounded=slower) == ["time per turn", "time per turn"]
    noise = replace(level, turn_ms=[1.0, 9.0, 1.0, 30.0, 2.0] * 6)  # too much of it to tell
    assert broken(bounded=noise) == ["time per turn"]
    assert broken(bounded=replace(level, most=8)) == ["at most 9 bytes allocated"]
    assert broken(unbounded=replace(level, predicted=8)) == ["cache of 7 bytes"]


def test_an_endless_clip_is_silent_while_its_object_stays():
    shown = list(islice(captions.endless(), 4 * captions.CLIP))
    names = [f"{area.colour} {area.shape}" for frame, _ in shown for area in areas(frame)]
    before = ["", *names[:-1]]
    expected = ["" if name == last else name for name, last in zip(names, before, strict=True)]
    assert [caption for _, caption in shown] == expected


def test_captions_that_become_worse_or_dearer_are_noticed():
    sizes = captions.Sizes(frames=400)
    level, rising = [1.0, 2.0] * 200, [float(frame) for frame in range(400)]
    memory = [1_000.0] * 200 + [1_001.0] * 200  # a step
    record = captions.Record(level, level, memory, [1.0, 1.0, 0.0, 1.0] * 100)

    def broken(**figures: list[float]) -> list[str]:
        judged = captions.judgements(captions.lines(replace(record, **figures), sizes), sizes)
        return [what.split(":")[0] for what, holds in judged.items() if not holds]

    assert broken() == broken(right=rising) == []
    assert broken(latency_ms=rising) == ["latency", "latency"] and broken(cache=rising) == ["cache"]
    assert broken(memory=rising) == ["memory"] and broken(right=rising[::-1]) == ["captions"]


def test_a_run_in_which_something_does_not_hold_ends_with_1(monkeypatch, capsys):
    monkeypatch.setattr(forever, "most_bytes", lambda *_: 1)
    monkeypatch.setattr("sys.argv", ["benchmark", "--tiny", "--turns", "24"])
    with pytest.raises(SystemExit) as ended:
        forever.main()
    assert ended.value.code == 1
    judged = json.loads(capsys.readouterr().out.splitlines()[-1])["judged"]
    assert [own["holds"] for own in judged] == [True, False, False]


# ---------------------------------------------------------------- programs

PROGRAMS = {
    streaming: ["--turns", "3", "--variants", "casa,ca-shared", "--windows", "1"],
    prefill: ["--variants", "casa", "--backends", "eager,sdpa", "--windows", "1,8,64", "--rounds", "1"],
    layer: ["--rounds", "1", "--windows", "2"],
    streams: ["--streams", "2", "--turns", "3", "--cameras", "3", "--seconds", "2"],
    forever: ["--turns", "24"],
    captions: ["--frames", "100"],
}
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NEEDS_CUDA])]


@pytest.mark.integration
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__.split(".")[-1])
def test_program(program, device, monkeypatch, capsys, tmp_path):
    drawing = tmp_path / "drawing.svg"
    arguments = ["--tiny", "--device", device, *PROGRAMS[program], "--plot", str(drawing)]
    monkeypatch.setattr("sys.argv", ["benchmark", *arguments])
    program.main()
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert results["benchmark"] == program.__name__.split(".")[-1]
    assert {"machine", "versions", "sizes"} <= results.keys()
    assert "<svg" in drawing.read_text(encoding="utf-8")
    assert list(tmp_path.iterdir()) == [drawing]


def test_preprocessing_compares_the_same_patches(monkeypatch, capsys):
    """In an eighth of the bytes; a contender that makes others isn't measured."""
    monkeypatch.setattr("sys.argv", ["benchmark", "--tiny"])
    preprocessing.main()
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert results["benchmark"] == "preprocessing" and len(results["frames"]) == 4
    for frame in results["frames"]:
        assert frame["bytes"]["stock"] == 8 * frame["bytes"]["uint8"] and frame["steps"] < 2.01
    dark = {**preprocessing.CONTENDERS, "uint8": lambda *given: [0 * one for one in preprocessing.uint8(*given)]}
    monkeypatch.setattr(preprocessing, "CONTENDERS", dark)
    with pytest.raises(RuntimeError, match="steps of 255"):
        preprocessing.main()


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        (streaming, ["--variants", "caza"], "--variants: unknown name 'caza'; choose from"),
        (streaming, ["--windows", "4,none"], "--windows '4,none': 'none' must be a whole number of at least 1"),
        (prefill, ["--backends", "sdpb"], "--backends: unknown name 'sdpb'; choose from eager"),
        (layer, ["--variants", "ca-shared"], "--variants: unknown name 'ca-shared'; choose from casa"),
        (forever, ["--turns", "8"], "--turns 8 must be at least 12"),
        (
            forever,
            ["--max-text-tokens", "9"],
            "--max-text-tokens 9 must be at least 10: the prompt and the text of a turn.",
        ),
        (captions, ["--frames", "99"], "--frames 99 must be at least 100, for lines with intervals."),
        (streams, ["--turns", "1"], "--turns 1 must be at least 2: the first one warms up"),
        (streams, ["--live-only", "--plot", "drawing.svg"], "--plot draws what --live-only leaves out"),
        (streams, ["--plot", "no/drawing.svg"], "there is no folder no; make it first."),
        (streams, ["--plot", "drawing.png"], "the name must end in .svg"),
    ],
)
def test_bad_arguments_are_refused(program, arguments, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["benchmark", "--tiny", *arguments])
    with pytest.raises(SystemExit, match="2"):
        program.main()
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_missing_device_is_said(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["benchmark", "--device", "cuda"])
    with pytest.raises(SystemExit, match="2"):
        streaming.main()
    assert "--device cuda: this torch sees no CUDA device" in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow  # in real time: how many accidents there are depends on the machine
def test_a_short_soak_has_every_accident_and_a_good_verdict():
    verdict = soak.main(["--seconds", "10", "--trouble", "12", "--max-text-tokens", "150", "--seed", "1"])
    assert verdict["ok"] and all(verdict["checks"].values()) and len(verdict["checks"]) == 6, verdict
    seen = verdict["camera"] | verdict["events"] | verdict["errors"]
    assert all(seen.get(name) for name in (*soak.ACCIDENTS, *soak.CORRUPT_KINDS)), seen
    assert sum(verdict["errors"].values()) == verdict["events"]["error"]
    assert verdict["text_tokens_at_most"] > 100, "text was evicted"


@pytest.mark.parametrize("kind", soak.CORRUPT_KINDS)
def test_each_corrupt_frame_of_a_soak_is_an_error_and_the_stream_goes_on(kind, casa_folder, tmp_path):
    """What is cut off looks whole until it is decoded."""
    camera = soak.Camera(1, 20, seed=0, trouble=1, folder=tmp_path)
    frames = [camera.corrupt_frame(kind, index, size) for index, size in enumerate(soak.SIZES)]
    if kind == "truncated image":
        assert [frame.size for frame in frames] == list(soak.SIZES)
    elif kind == "truncated file":
        with Image.open(frames[0]) as opened:
            assert opened.size == soak.SIZES[0]
    model = CasaForConditionalGeneration.from_pretrained(casa_folder).eval()
    processor = CasaProcessor.from_pretrained(casa_folder)
    disturbed, undisturbed = (CasaStream(model, processor, max_new_tokens_per_frame=3) for _ in range(2))
    said = []
    for index, frame in enumerate(frames):
        good = np.full((48, 64, 3), 60 * index, np.uint8)
        (error,) = disturbed.push(frame)
        assert error.kind == "error" and ("float64 from nan" if kind == "no image" else "truncated") in error.message
        said.append([event.token_ids for event in disturbed.push(good) if event.kind == "end"])
        assert said[-1] == [event.token_ids for event in undisturbed.push(good) if event.kind == "end"]
    assert all(tokens for [tokens] in said)


def test_the_camera_of_a_soak_knows_which_of_its_frames_are_corrupt(monkeypatch, tmp_path):
    """By their times from the first frame on, which events have; here that isn't the frame of time 0."""
    monkeypatch.setattr(soak.time, "sleep", lambda seconds: None)
    camera = soak.Camera(20, 20, seed=31, trouble=5, folder=tmp_path)
    frames = list(camera)
    first = frames[0][0]
    known = [camera.corrupt_at(timestamp - first) for timestamp, _ in frames]
    kinds = {np.ndarray: "no image", type(tmp_path): "truncated file"}
    found = [
        "" if isinstance(frame, np.ndarray) and frame.ndim == 3 else kinds.get(type(frame), "truncated image")
        for _, frame in frames
    ]
    assert known == found and set(found) == {"", *soak.CORRUPT_KINDS} and first > 0
    assert len(frames) - found.count("") == camera.given["corrupt"]


def test_a_soak_counts_frames_that_are_reported_together(monkeypatch):
    monkeypatch.setattr("casa_hf.streaming.live._MAX_REPORTS", 0)
    verdict = soak.main(["--seconds", "0.5", "--fps", "400", "--trouble", "0"])
    assert verdict["camera"] == {"frames": 200, "corrupt": 0}
    assert verdict["ok"] and verdict["checks"]["every_frame_accounted_for"], verdict
    assert verdict["events"]["dropped"] > verdict["events"]["end"] > 0


def test_a_soak_tells_a_leak_from_noise():
    seconds = np.arange(600.0)
    noise = np.random.default_rng(0).normal(0, 2**20, 600)
    assert soak.is_level(seconds, noise) and not soak.is_level(seconds[:2], noise[:2])
    assert not soak.is_level(seconds, noise + seconds * 2 * soak.MAX_GROWTH / 3600)


def test_a_burst_is_held_back_and_comes_at_once(monkeypatch, tmp_path):
    """By a clock that only sleeping moves."""
    now = [0.0]
    monkeypatch.setattr(soak.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(soak.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    for name in ("MISSING", "CORRUPT", "RESIZE"):
        monkeypatch.setattr(soak, name, 0.0)
    camera = soak.Camera(10, 20, seed=0, trouble=20, folder=tmp_path)
    late = [now[0] - timestamp for timestamp, _ in camera]
    assert camera.given["bursts"] > 3 and min(late) > -1e-9
    assert max(late) > 0.2 and sum(each < 1e-9 for each in late) > 20


@pytest.fixture
def middling() -> train_step.Size:
    """A size between tiny and real, at which attention and norms are a small part."""
    size = train_step.SIZES["tiny"]
    text = {"hidden_size": 128, "intermediate_size": 512, "vocab_size": 2_048, "num_hidden_layers": 6}
    text |= {"rope_parameters": {**size.text["rope_parameters"], "mrope_section": [4, 6, 6]}}
    vision = {"depth": 6, "hidden_size": 64, "intermediate_size": 256, "out_hidden_size": 128}
    return replace(size, text=size.text | text, vision=size.vision | vision, words=66, conversations=4)


@pytest.mark.parametrize("name", ["source", "ca", "casa"])
def test_a_training_step_costs_what_is_counted(middling: train_step.Size, name: str, monkeypatch) -> None:
    """FLOPs as PyTorch counts them, with attention of all keys, and memory as it is measured."""
    monkeypatch.setattr(training_cost, "chunk_tokens", lambda vocab_size: 64)
    monkeypatch.setattr(loss_casa, "chunk_tokens", lambda vocab_size: 64)
    device = torch.device("cpu")
    batch = train_step.Batch.make(middling, 4, device)
    counted = train_step.count(middling, name, 4, itemsize=4)
    model = train_step.build(middling, name, device)
    model.set_attn_implementation("eager")
    inputs = batch.source if name == "source" else batch.casa
    with FlopCounterMode(display=False) as counter:
        train_step.loss_of(model, inputs).backward()
    assert counter.get_total_flops() == pytest.approx(sum(counted.flops.values()), rel=0.04)
    measured = train_step.measure(middling, name, batch, 1, device)["bytes"]
    assert measured == pytest.approx(counted.bytes["peak"], rel=0.05)
    held = sum(p.nbytes + 3 * p.nbytes * p.requires_grad for p in model.parameters())
    assert held == sum(counted.bytes[part] for part in ("weights", "gradients", "moments of AdamW"))


def test_both_contenders_of_a_training_step_fit_a_card(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """At the size of Qwen2.5-VL-3B; the source with its own loss only with half of the batch."""
    for options, conversations in (([], 20), (["--source-loss", "all-logits"], 10), (["--memory", "40"], None)):
        argv = ["train_step", "--size", "qwen2.5-vl-3b", "--count", *options]
        monkeypatch.setattr(sys, "argv", argv)
        if conversations is None:
            with pytest.raises(SystemExit, match="no batch fits into 40 GB"):
                train_step.main()
            continue
        train_step.main()
        said = capsys.readouterr().out
        assert f"Counted for {conversations} conversations" in said
        assert "source, ca, casa of source, ca, casa fit into 80 GB." in said


def test_bars_of_a_training_step() -> None:
    good = {"ca": {"speed": 1.2, "memory": 1.1}, "casa": {"speed": 1.04, "memory": 0.3}}
    assert train_step.missed_bars(good) == []
    found = train_step.missed_bars({"ca": {"speed": 1.19, "memory": 0.5}, "casa": {"speed": 1.1, "memory": 1.12}})
    assert [line.split(":")[0] for line in found] == ["ca", "casa"]
    assert "1.19 times" in found[0] and "1.12 times" in found[1] and len(found) == 2


def test_bars_of_a_training_step_are_for_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["train_step", "--check"])
    with pytest.raises(SystemExit) as ended:
        train_step.main()
    assert ended.value.code == 2 and "--check is for a GPU and a size other than tiny" in capsys.readouterr().err


@pytest.mark.parametrize("size", vllm_engines.SIZES)
def test_engines_get_the_same_shapes(size: str, tmp_path) -> None:
    sizes = vllm_engines.SIZES[size]
    models = vllm_engines.make_models(tmp_path, sizes)
    source, casa = (AutoConfig.from_pretrained(models[name]) for name in ("insertion", "casa"))
    assert (source.model_type, casa.model_type, casa.variant) == ("qwen2_5_vl", "casa", "casa")
    for field, value in sizes.text.items():
        if field != "rope_parameters":
            assert getattr(source.text_config, field) == getattr(casa.text_config, field) == value
    assert len(casa.fusion_layers) == source.text_config.num_hidden_layers
    assert source.vision_config.depth == casa.vision_config.depth
    assert casa.vision_config.out_hidden_size == casa.text_config.hidden_size
    with torch.device("meta"):
        CasaForConditionalGeneration(casa)  # its shapes fit together


def test_engines_are_compared_case_by_case() -> None:
    case = {"requests": 8, "pictures": 4, "requests_per_s": 2.0, "ttft_s": 1.0, "tpot_s": 0.02}
    quick = case | {"requests_per_s": 3.0, "ttft_s": 0.25, "tpot_s": 0.03}
    found = {"insertion": [case, case], "casa": [quick]}  # the second case was cut off
    expected = {"requests": 8, "pictures": 4, "requests_per_s": 1.5, "ttft_s": 0.25, "tpot_s": 1.5}
    assert vllm_engines.ratios(found) == [expected]
    assert vllm_engines.written(found).splitlines()[-1] == "| 8 | 4 | 1.50 | 0.25 | 1.50 | 2.00 / 1000 / 20.0 |"
