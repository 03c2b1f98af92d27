# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Blocks of linear attention in CASA models: what enters their state, and in which order.

That the computation is the stock model's and the dense reference's for every design is test_conformance.py's; what
their state is in a cache, test_linear_cache.py's.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from benchmarks.counting import Dimensions, added_parameters, cache_bytes, language_parameters
from casa_hf import CasaConfig, CasaForConditionalGeneration, cache_nbytes
from casa_hf.conversion import convert_checkpoint, convert_to_source
from casa_hf.recurrence import token_order
from casa_hf.transformers_versions import CACHE
from casa_hf.windows import ImagePlacement
from examples.tiny_source import build_tiny_source
from tests.conversion.helpers import assert_same, load_weights
from tests.helpers_generation import relative_error
from tests.reference import reference_logits
from tests.sources import SEVERAL, make_case, randomised
from tests.test_conformance import packed
from tests.test_eviction import in_calls
from tests.test_eviction import run as run_evicting
from tests.test_reference import compare, image_inputs, model_of, random_turns, run
from tests.tiny import END, FAMILIES, START, random_weights, sample

FAMILY = FAMILIES["qwen3_5_text"]
LINEAR = (0, 2)
# The delta rule computes in float32. A wrong state is off by 1e-2.
TOLERANCE = 1e-5
NOTICED = 1e-3


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


# ------------------------------------------------------------------------------------- the order of tokens


def random_call(random: Random) -> tuple[Tensor, Tensor | None, ImagePlacement | None]:
    """Validity of tokens, samples that they are packed in, and places of images."""
    batch_size, num_tokens = random.randint(1, 3), random.randint(1, 7)
    valid = torch.tensor([[random.random() < 0.7 for _ in range(num_tokens)] for _ in range(batch_size)])
    samples = None
    if random.random() < 0.5:
        samples = torch.tensor([[random.random() < 0.3 for _ in range(num_tokens)] for _ in range(batch_size)])
        samples = samples.long().cumsum(1)
        samples = samples - samples[:, :1]
    places = [place for place in valid.nonzero().tolist() for _ in range(random.choice([0, 0, 1, 2]))]
    if not places:
        return valid, samples, None
    grids = torch.tensor([[random.randint(1, 2), random.randint(1, 3)] for _ in places])
    rows, indices = torch.tensor(places).T
    tokens = grids.prod(-1)
    most = max(int(tokens[rows == row].sum()) for row in range(batch_size))
    placement = ImagePlacement(
        rows, indices, grids, torch.zeros(len(places), dtype=torch.bool), int(tokens.sum()), most
    )
    return valid, samples, placement


def sequences_of(valid: Tensor, samples: Tensor | None, images: ImagePlacement | None) -> list[list[int]]:
    """The numbers of what each sequence reads: text tokens from 0 on, row after row, image tokens behind them."""
    batch_size, num_tokens = valid.shape
    sizes = [] if images is None else images.num_tokens.tolist()
    sequences: list[list[int]] = []
    for row in range(batch_size):
        for token in range(num_tokens):
            if token == 0 or (samples is not None and samples[row, token] != samples[row, token - 1]):
                sequences.append([])
            for number, size in enumerate(sizes):
                if images is not None and (images.rows[number], images.indices[number]) == (row, token):
                    first = batch_size * num_tokens + sum(sizes[:number])
                    sequences[-1] += range(first, first + size)
            if valid[row, token]:
                sequences[-1].append(row * num_tokens + token)
    return sequences


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("continues", [False, True])
def test_tokens_are_read_in_order(seed: int, continues: bool) -> None:
    valid, samples, images = random_call(Random(seed))
    expected = sequences_of(valid, samples, images)
    padded = not bool(valid.all())
    order = token_order(valid, padded=padded, continues=continues, samples=samples, images=images)
    text = torch.arange(valid.numel()).view(*valid.shape, 1)
    of_images = None if images is None else torch.arange(images.total_tokens)[:, None] + valid.numel()
    if order is None:
        assert not padded and samples is None and images is None
        return
    found, num_places = [], 0
    for batch, mask in zip(order.join(text, of_images), order.valid, strict=True):
        num_places += batch[..., 0].numel()
        for row, kept in zip(batch[..., 0], torch.ones(batch.shape[:2]).bool() if mask is None else mask, strict=True):
            found.append(row[kept].tolist())
            assert kept.tolist() == kept.sort(descending=continues).values.tolist()  # padding at one end
    assert sorted(found) == sorted(expected)
    assert samples is not None or found == expected
    assert samples is None or num_places < 2 * (valid.numel() + (0 if of_images is None else len(of_images)))
    text_again, images_again = order.split(order.join(text, of_images), like=text)
    assert torch.equal(text_again[valid], text[valid])
    assert (images_again is None) == (images is None)
    assert images_again is None or torch.equal(images_again, of_images)


def test_rows_without_padding_are_read_as_they_stand() -> None:
    valid = torch.ones(2, 3, dtype=torch.bool)
    assert token_order(valid, padded=False, continues=True) is None
    assert token_order(valid, padded=True, continues=True) is None  # a mask of ones


# ------------------------------------------------------------------------------------- text


def test_a_batch_that_begins_with_padding_is_the_source() -> None:
    """Bit for bit, where the stock model is right: it reads padding as nothing as long as there is no state."""
    case = make_case("qwen3_5_text", "casa")
    rows = ([5, 6, 7, 8, 9, 10], [11, 12, 13])
    ids = torch.tensor([rows[0], [0, 0, 0, *rows[1]]])
    mask = (ids != 0).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0).expand(3, -1, -1)
    ours = case.model(ids, attention_mask=mask, position_ids=positions).logits
    theirs = case.source(ids, attention_mask=mask, position_ids=positions).logits
    assert torch.equal(ours[mask.bool()], theirs[mask.bool()])
    for row, logits in zip(rows, ours, strict=True):
        assert relative_error(logits[-len(row) :], case.source(torch.tensor([row])).logits[0]) < TOLERANCE


@pytest.mark.parametrize("step", [1, 3])
def test_padding_inside_a_row_is_not_read(step: int) -> None:
    """The stock model reads it, which is seen beside."""
    case = make_case("qwen3_5_text", "casa")
    row = [5, 6, 7, 8, 9, 10, 11]
    expected = case.source(torch.tensor([row])).logits[0]

    def logits(model: Any) -> Tensor:
        cache, mask, parts = DynamicCache(config=FAMILY.source_config().text_config), [], []
        for begin in range(0, len(row), step):
            new = row[begin : begin + step]
            ids, mask = torch.tensor([[0, *new, 0]]), [*mask, 0, *[1] * len(new), 0]
            positions = torch.arange(begin - 1, begin + len(new) + 1).clamp(min=0).expand(3, 1, -1)
            output = model(ids, attention_mask=torch.tensor([mask]), position_ids=positions, **{CACHE: cache})
            parts.append(output.logits[0, 1:-1])
        return torch.cat(parts)

    assert relative_error(logits(case.model), expected) < TOLERANCE
    assert relative_error(logits(case.source), expected) > NOTICED


# ------------------------------------------------------------------------------------- images

# Images of different sizes, a group, one before any text, and none.
ROWS = ("3 2x3 2 1x2 3x1 2", "b2x2 4 b1x3 2", "6", "1 2x1 s2x1 3")
UPDATED: dict[str, dict[str, Any]] = {
    "insertion": {},
    "exact": {},
    "casa": {"casa_image_updates": "full"},
    "ca": {"casa_image_updates": "full"},
}


@pytest.mark.parametrize("variant", UPDATED)
def test_updated_images_are_read_before_their_token(variant: str) -> None:
    """In one call and in several, which bring images to rows that others are padded beside, token by token, on a
    static cache, and packed."""
    config = FAMILY.casa_config(variant, **UPDATED[variant])
    samples = [sample(script, seed) for seed, script in enumerate(ROWS)]
    model, lengths = model_of(config), [len(one.input_ids) for one in samples]
    expected = reference_logits(config, random_weights(config), samples, FAMILY.block)
    by_token = [[0] * (max(lengths) - length) + [1] * length for length in lengths]
    compare(run(model, samples), expected, TOLERANCE)
    for seed, side in enumerate(("left", "right")):
        compare(run(model, samples, side=side, turns=random_turns(samples, 4, Random(seed))), expected, TOLERANCE)
    cache = StaticCache(config=config.text_config, max_cache_len=128)
    compare(run(model, samples, turns=by_token, cache=cache), expected, TOLERANCE)
    compare(packed(model, samples).split(lengths), expected, TOLERANCE)


@pytest.mark.parametrize("variant", ["insertion", "casa"])
def test_texts_longer_than_a_chunk_of_the_delta_rule(variant: str) -> None:
    """It is computed 64 tokens at a time, the last chunk filled up with zeros."""
    config = FAMILY.casa_config(variant)
    samples = [sample("60 4x5 70 2x2 7", 0), sample("3 5x5 40", 1), sample("130", 2)]
    expected = reference_logits(config, random_weights(config), samples, FAMILY.block)
    model = model_of(config)
    compare(run(model, samples), expected, TOLERANCE)
    turns = [[64, 65, 12], [1, 0, 44], [0, 128, 2]]
    assert [sum(row) for row in turns] == [len(one.input_ids) for one in samples]
    compare(run(model, samples, side="right", turns=turns), expected, TOLERANCE)


def test_offloaded_weights_are_there() -> None:
    """Also those that are used without a call of their module, where padding continues a state."""
    accelerate = pytest.importorskip("accelerate")
    case = make_case("qwen3_5_text", "exact")

    def logits() -> Tensor:
        cache = DynamicCache(config=case.model.config)
        case.model(torch.tensor([SEVERAL]), cache=cache, **case.images)
        mask = torch.tensor([[1] * len(SEVERAL) + [1, 1, 0]])
        return case.model(torch.tensor([[5, 6, 0]]), cache=cache, attention_mask=mask).logits[:, :2]

    expected = logits()
    accelerate.cpu_offload(case.model, execution_device=torch.device("cpu"))
    of_block = case.model.model.language_model.layers[0].linear_attn
    assert of_block.A_log.is_meta and of_block.conv1d.weight.is_meta
    assert torch.equal(logits(), expected)
    assert of_block.A_log.is_meta and of_block.conv1d.weight.is_meta


@pytest.mark.parametrize("updates", ["none", "ffn"])
def test_other_images_never_enter(updates: str) -> None:
    """With them, the state is that of the text alone as long as fusion layers are silent."""
    config = FAMILY.casa_config("casa", casa_image_updates=updates, casa_gate="tanh")
    model, ids = randomised(CasaForConditionalGeneration(config)), torch.tensor([[5, START, END, 6, 7]])
    for name, parameter in model.named_parameters():
        if name.endswith("casa_attn.gate"):
            parameter.zero_()
    images = image_inputs(list(sample("1 2x3").images))
    alone = model(ids, use_cache=True)
    beside = model(ids, use_cache=True, **images)
    for block in LINEAR:
        one, other = (output.cache.layers[block].recurrent_states[0] for output in (alone, beside))
        assert torch.equal(one, other) and one.abs().max() > 0
    assert beside.cache.layers[1].fusion["image"].keys.shape[2] == 6  # the images were there


# ------------------------------------------------------------------------------------- eviction


def evicted_mask(length: int, before: int, gone: range) -> dict[str, Tensor | None]:
    """A mask for the stock model: from a token on, attention doesn't see what is gone; the state has read it."""
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    mask[before:, gone.start : gone.stop] = False
    return {"full_attention": mask[None, None], "linear_attention": None}


@pytest.mark.parametrize("variant", ["casa", "exact"])
def test_evicted_text_stays_in_the_state(variant: str) -> None:
    """As in the stock model with the text masked in blocks of attention. It isn't forgotten there, which is what
    eviction can't do, so that the model without this text is another one."""
    case = make_case("qwen3_5_text", variant)
    first, later = [5, 6, 7, 8, 9, 10, 11, 12], [13, 14]
    cache = DynamicCache(config=case.model.config)
    case.model(torch.tensor([first]), cache=cache)
    case.model.evict_text(cache, keep=5, num_sink_tokens=0)
    logits = case.model(torch.tensor([later]), cache=cache).logits[0]
    everything, mask = torch.tensor([first + later]), evicted_mask(10, 8, range(3))
    assert relative_error(logits, case.source(everything, attention_mask=mask).logits[0, 8:]) < TOLERANCE
    assert relative_error(logits, case.source(everything).logits[0, 8:]) > NOTICED
    assert relative_error(logits, case.source(everything[:, 3:]).logits[0, 5:]) > NOTICED


# ------------------------------------------------------------------------------------- where fusion can stand


def test_fusion_stands_in_blocks_of_attention() -> None:
    source = FAMILY.source_config(num_hidden_layers=8, layer_types=None)
    assert FAMILY.casa_config("casa", source).fusion_layers == (3, 7)
    assert FAMILY.casa_config("casa-replace", source).fusion_layers == (7,)
    assert FAMILY.casa_config("ca-replace", source).variant == "ca-replace"
    assert FAMILY.casa_config("casa", source, casa_layers=[3]).fusion_layers == (3,)
    with pytest.raises(ValueError, match=r"names block 2; .* blocks \(3, 7\) can have a fusion layer;"):
        FAMILY.casa_config("casa", source, casa_layers=[2, 3])
    with pytest.raises(ValueError, match=r"None of the 3 blocks has full attention.*layer_types"):
        FAMILY.casa_config("casa", FAMILY.source_config(num_hidden_layers=3, layer_types=None))


EXPERIMENTS: dict[str, dict[str, Any]] = {
    "casa": {},
    "ca": {"casa_keys": "image"},
    "casa-before": {"casa_placement": "before", "casa_image_updates": "full"},
    "ca-after": {"casa_placement": "after", "casa_keys": "image", "casa_image_updates": "ffn"},
    "casa-full": {"casa_image_updates": "full"},
}


def experiment(layers: tuple[int, ...] = (0, 1, 2), **fields: Any) -> CasaConfig:
    return FAMILY.casa_config(casa_layers=list(layers), casa_gate="tanh", **fields)


@pytest.mark.parametrize("design", EXPERIMENTS)
def test_fusion_beside_linear_attention(design: str) -> None:
    config = experiment(**EXPERIMENTS[design])
    samples = [sample(script, seed) for seed, script in enumerate(ROWS)]
    expected = reference_logits(config, random_weights(config), samples, FAMILY.block)
    elsewhere = experiment((1,), **EXPERIMENTS[design])
    assert (
        relative_error(reference_logits(elsewhere, random_weights(elsewhere), samples, FAMILY.block)[0], expected[0])
        > NOTICED
    )
    model, lengths = model_of(config), [len(one.input_ids) for one in samples]
    by_token = [[0] * (max(lengths) - length) + [1] * length for length in lengths]
    compare(run(model, samples, turns=random_turns(samples, 4, Random(design))), expected, TOLERANCE)
    cache = StaticCache(config=config.text_config, max_cache_len=128)
    compare(run(model, samples, turns=by_token, cache=cache), expected, TOLERANCE)
    compare(packed(model, samples).split(lengths), expected, TOLERANCE)


def test_fusion_beside_linear_attention_starts_from_the_next_attention(tmp_path: Path) -> None:
    """With a closed gate, so that a converted model is the source."""
    source = build_tiny_source(tmp_path / "source", family="qwen3_5")
    options: dict[str, Any] = {"casa_layers": [0, 2], "casa_gate": "tanh"}
    report = convert_checkpoint(source, tmp_path / "casa", **options)
    converted = CasaForConditionalGeneration.from_pretrained(tmp_path / "casa")
    tensors, blocks = converted.state_dict(), "model.language_model.layers."
    for name in ("q_proj.weight", "o_proj.weight", "k_norm.weight"):
        for block in (0, 2):  # of three blocks, the one in the middle has attention
            assert torch.equal(tensors[f"{blocks}{block}.casa_attn.{name}"], tensors[f"{blocks}1.self_attn.{name}"])
    for block in (0, 2):
        norms = (tensors[f"{blocks}{block}.{norm}.weight"] for norm in ("casa_attn.image_norm", "input_layernorm"))
        assert torch.equal(*norms)
    loaded = CasaForConditionalGeneration.from_pretrained(source, **options).state_dict()
    assert loaded.keys() == tensors.keys() and all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    image = {"image_embeds": torch.randn(6, 64), "image_grid_thw": torch.tensor([[1, 4, 6]])}
    ids = torch.tensor([[5, 6, converted.config.image_token_id, 7, 8]])
    stock = FAMILY.source.from_pretrained(source)
    assert torch.equal(converted(ids, **image).logits, stock(ids).logits)
    convert_to_source(tmp_path / "casa", tmp_path / "back")
    assert report.added_parameters == added_parameters(converted.config) > 0
    assert_same(load_weights(tmp_path / "back"), load_weights(source))


def test_text_is_evicted_beside_linear_attention() -> None:
    config = experiment()
    samples = [sample("6 2x3 9"), sample("4 1x2 12", 1)]
    rows = run_evicting(model_of(config), samples, in_calls(samples, [6, 7]), {1: (8, 2)})
    expected = reference_logits(config, random_weights(config), [row.done for row in rows], FAMILY.block)
    compare([torch.cat(row.logits) for row in rows], expected, TOLERANCE)


@pytest.mark.parametrize("fields", [{}, {"casa_gate": "tanh", "casa_share_projections": True}])
def test_the_experiment_must_be_asked_for(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r'linear attention only as an experiment, with casa_gate="tanh"'):
        FAMILY.casa_config(casa_layers=[0, 1], **fields)
    assert FAMILY.casa_config(casa_gate="tanh").fusion_layers == (1, 3)


def test_text_passes_where_all_attention_is_replaced_by_images() -> None:
    """Blocks of linear attention still mix the text, so that this design has a meaning."""
    config = FAMILY.casa_config("ca", casa_placement="replace")
    samples = [sample(script, seed) for seed, script in enumerate(ROWS)]
    expected = reference_logits(config, random_weights(config), samples, FAMILY.block)
    model = model_of(config)
    compare(run(model, samples, turns=random_turns(samples, 4, Random(0))), expected, TOLERANCE)


@pytest.mark.parametrize("variant", ["casa", "ca-replace", "exact"])
def test_what_is_counted_is_there(variant: str) -> None:
    """Text has keys and values in blocks of attention alone; the state doesn't grow."""
    model = model_of(FAMILY.casa_config(variant))
    language = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("model.visual."))
    head = model.lm_head.weight.numel()
    assert language_parameters(model.config) == language - head
    one = sample("9 2x3 4")
    ids, held = torch.tensor([one.input_ids]), []
    for begin, end in ((0, 9), (9, 15)):
        images = image_inputs(list(one.images)) if begin else {}
        cache = held[-1][0] if held else DynamicCache(config=model.config)
        model(ids[:, begin:end], cache=cache, **images)
        held.append((cache, cache_nbytes(cache)))
    assert held[0][1]["recurrent"] == held[1][1]["recurrent"]
    states = sum(cache.layers[block].recurrent_states[0].nbytes for block in LINEAR)
    assert states == 4 * Dimensions.of(model.config).state
    window = int(cache.get_seq_length()) - one.images[0].position
    expected = cache_bytes(model.config, 8, text=15, window=window, image=6)
    assert held[1][1]["text"] + held[1][1]["image"] == expected


# ------------------------------------------------------------------------------------- new models, training


def test_a_new_model_starts_as_the_stock_one() -> None:
    model = CasaForConditionalGeneration(FAMILY.casa_config("casa-before"))
    parameters = dict(model.model.language_model.named_parameters())
    for name, parameter in parameters.items():
        if name.endswith("A_log"):
            assert parameter.exp().min() > 0 and parameter.exp().max() <= 16 and parameter.std() > 0
        elif name.endswith(("dt_bias", "linear_attn.norm.weight")):
            assert bool((parameter == 1).all()), name
        elif name.endswith("norm.weight"):
            assert bool((parameter == 0).all()), name  # the factor is 1 + weight
    stock = FAMILY.source(FAMILY.source_config()).model.language_model.state_dict()
    for name, parameter in stock.items():
        assert torch.equal(parameters[name], parameter) == bool((parameter == parameter.flatten()[0]).all()), name


def test_gradients_pass_the_state_between_calls() -> None:
    case = make_case("qwen3_5_text", "casa")
    ids = torch.tensor([SEVERAL])

    def gradients(*cuts: int) -> dict[str, Tensor]:
        case.model.zero_grad()
        with torch.enable_grad():
            cache, parts = DynamicCache(config=case.model.config), []
            for begin, end in zip((0, *cuts), (*cuts, len(SEVERAL)), strict=True):
                images = case.images if begin == 0 else {}
                parts.append(case.model(ids[:, begin:end], cache=cache, **images).logits)
            torch.cat(parts, dim=1).square().sum().backward()
        return {n: p.grad.clone() for n, p in case.model.named_parameters() if p.grad is not None}

    whole, in_calls = gradients(), gradients(9, 10)
    assert whole.keys() == in_calls.keys()
    for name, expected in whole.items():
        assert relative_error(in_calls[name], expected) < 1e-4, name


@pytest.mark.parametrize("padded", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_compiled_step_is_one_graph(padded: bool) -> None:
    kinds = ["linear_attention", "full_attention"]
    source = FAMILY.source_config(num_hidden_layers=2, layer_types=kinds)
    config = FAMILY.casa_config("casa", source)
    model = randomised(CasaForConditionalGeneration(config)).float()
    one = sample("3 2x3 2 1x2 2")
    rows = 2
    ids = torch.tensor([list(one.input_ids)] * rows)
    images = image_inputs(list(one.images) * rows)
    images["image_embeds"] = images["image_embeds"].float()
    mask = torch.ones_like(ids)
    if padded:
        mask[1, 0] = 0
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(model.forward, backend=backend, fullgraph=True)
    logits = {}
    for name, forward in (("compiled", compiled), ("plain", model.forward)):
        cache = StaticCache(config=model.config.text_config, max_cache_len=64)
        all_ids, all_valid, parts = ids, mask, []
        inputs: dict[str, Any] = {"attention_mask": mask} if padded else {}
        model(ids, cache=cache, **images, **inputs)
        for step in range(4):
            new = torch.tensor([[20 + step], [30 + step]])
            all_ids = torch.cat([all_ids, new], dim=1)
            # A row may get nothing while the other goes on.
            all_valid = torch.cat([all_valid, torch.tensor([[1], [int(step != 1 or not padded)]])], dim=1)
            prepared = model.prepare_inputs_for_generation(
                all_ids,
                next_sequence_length=1,
                attention_mask=all_valid if padded else None,
                **{CACHE: cache},
            )
            prepared = {key: value for key, value in prepared.items() if key not in ("cache", "past_key_values")}
            parts.append(forward(**{**prepared, "input_ids": new}, cache=cache).logits)
        logits[name] = torch.cat(parts, dim=1)
    assert relative_error(logits["compiled"], logits["plain"]) < TOLERANCE
    # That there was padding before is one fact more that the first step notes.
    assert len(graphs) <= 2
