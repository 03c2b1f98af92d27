# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints in the format of the method's authors: synthetic ones, compared with a forward of their description."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from casa_hf import CasaConfig, CasaForConditionalGeneration, CasaProcessor, CheckpointError
from casa_hf.conversion import convert_checkpoint, convert_to_source, inspect_checkpoint, names_report
from casa_hf.hub.publishable import check_checkpoint
from casa_hf.training.results import copy_kept
from examples.tiny_source import build_tokenizer
from tests.command_line import Cli
from tests.conversion import authors_layouts, authors_reference
from tests.conversion.authors_layouts import FIRST, IMAGE_TOKENS, SECOND, Layout, write
from tests.conversion.authors_reference import PATCH, Spec, Weights, merge_order
from tests.conversion.helpers import assert_refused
from tests.conversion.test_download import COMMIT, REPOSITORY, hub

QWEN = Spec(
    vocabulary=authors_layouts.vocabulary(True),
    sections=(2, 3, 3),
    biases=True,
    fusion_biases=True,
    tied=True,
    eps=1e-6,
)
HELIUM = Spec(vocabulary=authors_layouts.vocabulary(False))

MHA = {"q": "in_proj_q", "k": "in_proj_k", "v": "in_proj_v", "o": "out_proj"}
SHORT = {"q": "wq", "k": "wk", "v": "wv", "o": "wo"}

# name -> (model, names, what is written, what is said of the design).
CASES: dict[str, tuple[Spec, Layout, dict[str, Any], dict[str, Any]]] = {
    "qwen, second generation": (QWEN, Layout(), {}, {}),
    "qwen, first generation, everything in one tensor": (
        replace(QWEN, with_text=True, text_before=True, image_norm="input", tied=False),
        Layout(
            decoder="language_model.model.",
            outer="language_model.",
            fusion="self_attn.casa_attn.",
            patch="two frames",
            joined=((r".*\.{part}\.(weight|bias)", ("q_proj", "k_proj", "v_proj"), "qkv_proj"),),
        ),
        {"code": FIRST, "nested": True},
        {"casa_image_norm": "input", "casa_image_positions": "at", "casa_text_windows": True},
    ),
    "qwen, first generation, another geometry": (
        replace(QWEN, with_text=True, before=True, image_norm=None),
        Layout(fusion="casa."),
        {"code": FIRST},
        {"casa_image_norm": "none", "casa_image_positions": "before", "casa_text_windows": False},
    ),
    "qwen, no biases in fusion, gates": (
        replace(QWEN, fusion_biases=False, gated=True),
        Layout(fusion="ca_attn.", fusion_norm="norm_image", gate="gate.alpha"),
        {"tensors": lambda all: {k: t[None, None] if "alpha" in k else t for k, t in all.items()}},
        {"casa_gate": "tanh"},
    ),
    "qwen, shared": (
        replace(QWEN, shared=True, image_norm="input"),
        Layout(decoder="model.language_model."),
        {},
        {"casa_image_norm": "input"},
    ),
    "qwen, some blocks": (replace(QWEN, fused=(0, 2)), Layout(), {}, {}),
    "qwen, replaced": (replace(QWEN, fused=(1,), replaced=True), Layout(fusion="cross_attn."), {}, {}),
    "helium, second generation, moshivis' names": (
        replace(HELIUM, image_norm="tower"),
        Layout(
            decoder="",
            tower="image_prefix.enc.visual.",
            fusion="cross_attention.mha.",
            fusion_names=MHA,
            patch="one frame",
            joined=(
                (r".*\.{part}\.weight", ("in_proj_k", "in_proj_v"), "in_proj_kv"),
                (r"layers.*\.{part}\.weight", ("gate_proj", "up_proj"), "gate_up_proj"),
            ),
            rename=lambda name: name.replace("in_proj_q.weight", "in_proj_weight_q").replace(
                "in_proj_kv.weight", "in_proj_weight_kv"
            ),
        ),
        {},
        {},
    ),
    "helium, first generation": (
        replace(HELIUM, with_text=True, fused=(1, 2)),
        Layout(
            decoder="llm.model.",
            outer="llm.",
            tower="image_prefix.enc.visual.",
            blocks="blocks",
            norms=("norm1", "norm2"),
            attention="attention.",
            attention_names=SHORT,
            fusion="xa.",
            fusion_names=SHORT,
            fusion_norm="img_norm",
        ),
        {"code": FIRST, "nested": True},
        {"casa_image_positions": "at", "casa_text_windows": False},
    ),
    "helium, shared": (
        replace(HELIUM, shared=True, image_norm=None),
        Layout(tower="image_prefix.enc.visual."),
        {"code": None},
        {"casa_image_norm": "none", "casa_keys": "image"},
    ),
    "helium, a list of fusion layers": (
        HELIUM,
        Layout(fusion="model.ca_layers.{block}.", tower="image_prefix.enc.visual."),
        {},
        {},
    ),
    "helium, before self-attention, a tower of another width": (
        replace(HELIUM, placement="before", tower_out=48),
        Layout(tower="image_prefix.enc.visual."),
        {},
        {"casa_placement": "before"},
    ),
    "helium, after self-attention, a norm behind the projection": (
        replace(HELIUM, placement="after", tower_out=80, image_norm="tower", gated=True),
        Layout(tower="image_prefix.enc.visual.", projection="image_prefix.proj_extra"),
        {},
        {"casa_placement": "after", "casa_gate": "tanh"},
    ),
    "helium, insertion": (
        replace(HELIUM, inserted=True, image_norm=None),
        Layout(tower="image_prefix.enc.visual."),
        {"code": "", "name": "Helium1_VL_2B"},
        {},
    ),
}


def model_type(spec: Spec) -> str:
    return "CASA_Helium1_VL_2B" if spec.sections is None else "CASA_Qwen2_5_VL_3B"


def released(folder: Path, case: str, **changes: Any) -> Path:
    spec, layout, written, _ = CASES[case]
    return write(folder, spec, layout, **{"name": model_type(spec), **written, **changes})


@cache
def images() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    small, large = (torch.randn(h, w, PATCH, generator=generator, dtype=torch.float64) for h, w in ((2, 4), (4, 4)))
    return small, large


def prompt(start: int, end: int) -> tuple[list[int], list[tuple[int, Tensor]]]:
    """Text, and images before its tokens `end`."""
    small, large = images()
    ids = [5, 6, 7, start, end, 8, 9, 10, 11, start, end, 12, 13, 14]
    return ids, [(4, small), (10, large)]


def casa_logits(folder: Path, ids: list[int], pictures: list[tuple[int, Tensor]], dtype=torch.float64) -> Tensor:
    """What the converted model makes of the same images, as Qwen's processor would give them: two equal frames."""
    model = CasaForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()
    pixels, grids = [], []
    for _, image in pictures:
        height, width, _ = image.shape
        patches = torch.stack([image[i, j] for i, j in merge_order(height, width)]).view(-1, 3, 1, 14, 14)
        pixels.append(patches.expand(-1, -1, 2, -1, -1).flatten(1))
        grids.append([1, height, width])
    with torch.no_grad():
        return model(
            torch.tensor([ids]), pixel_values=torch.cat(pixels).to(dtype), image_grid_thw=torch.tensor(grids)
        ).logits[0]


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


def truth(spec: Spec, config: Any, weights: Weights | None = None) -> tuple[Tensor, list[int], list]:
    """Logits of the description for the prompt of a configuration, and the prompt."""
    ids, pictures = prompt(config.vision_start_token_id, config.image_token_id)
    return authors_reference.logits(spec, weights or spec.weights(), ids, pictures), ids, pictures


def assert_is(folder: Path, spec: Spec, weights: Weights | None = None) -> None:
    """The converted checkpoint computes what the description does."""
    expected, ids, pictures = truth(spec, CasaConfig.from_pretrained(folder), weights)
    assert error(casa_logits(folder, ids, pictures), expected) < 1e-5


# -------------------------------------------------------------------- by rules


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_description(tmp_path, case):
    spec, _, _, said = CASES[case]
    report = convert_checkpoint(released(tmp_path / "released", case), tmp_path / "casa", **said)
    assert_is(tmp_path / "casa", spec)
    config = report.config
    assert config.fusion_layers == ((0, 1, 2) if spec.inserted else spec.fused)
    assert config.casa_share_projections == (spec.shared or spec.inserted)
    assert (config.variant == "insertion") == spec.inserted
    assert (config.casa_keys == "window") == spec.with_text
    assert report.added_parameters == 0 and "never been compared" in report.note
    stored = {line.split("\t")[0] for line in (tmp_path / "casa" / "released_names.tsv").read_text().splitlines()}
    assert {re.sub(r"(?<=\.)\d+(?=\.)", "{i}", name.partition("[")[0], count=1) for name in tensors_of(tmp_path)} <= {
        re.sub(r"(?<=\.)\d+(?=\.)", "{i}", name.partition("[")[0], count=1) for name in stored
    }


def tensors_of(tmp_path: Path) -> Weights:
    return load_file(tmp_path / "released" / "model.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        {"with_text": True},
        {"image_norm": "input"},
        {"image_norm": None},
        {"placement": "before"},
        {"placement": "after"},
        {"fused": (0, 1)},
        {"eps": 1e-2},
        {"theta": 1000.0},
        {"swap": ("fusion.q", "fusion.o")},
        {"swap": ("fusion.k", "fusion.v")},
        {"swap": ("self.q", "self.o")},
        {"swap": ("norm1", "norm2")},
        {"swap": ("mlp.gate", "mlp.up")},
    ],
    ids=str,
)
def test_the_description_feels_every_choice(change):
    """Else a conversion that takes one tensor for another of its shape, or another design, would go unnoticed."""
    weights, other = HELIUM.weights(), dict(HELIUM.weights())
    spec = HELIUM
    if "swap" in change:
        for name in weights:
            for one, another in (change["swap"], change["swap"][::-1]):
                if re.search(rf"block\.\d\.{one}\b", name):
                    other[name] = weights[name.replace(one, another)]
    else:
        spec = replace(spec, **change)
        other = spec.weights()  # the same where both have a tensor
    ids, pictures = prompt(3, 4)
    expected = authors_reference.logits(HELIUM, weights, ids, pictures)
    assert error(authors_reference.logits(spec, other, ids, pictures), expected) > 1e-2


def test_halves_of_a_summed_patch_embedding_are_exact(tmp_path):
    """In bfloat16 too: together they are the stored one, bit for bit, and what one image gives is the same."""
    folder = released(tmp_path / "released", "helium, a list of fusion layers", dtype=torch.bfloat16)
    convert_checkpoint(folder, tmp_path / "casa")
    stored = tensors_of(tmp_path)["image_prefix.enc.visual.patch_embed.proj.weight"]
    converted = load_file(tmp_path / "casa" / "model.safetensors")["model.visual.patch_embed.proj.weight"]
    assert converted.dtype == torch.bfloat16 and converted.shape == (32, 3, 2, 14, 14)
    assert torch.equal(converted[:, :, 0], converted[:, :, 1])
    assert torch.equal(converted.sum(2), stored) and torch.equal(2 * converted[:, :, 0], stored)
    weights = {name: tensor.bfloat16() for name, tensor in HELIUM.weights().items()}
    assert_is(tmp_path / "casa", HELIUM, weights)


def test_other_tensors_are_taken_over_bit_for_bit(tmp_path):
    folder = released(tmp_path / "released", "qwen, second generation", dtype=torch.bfloat16)
    convert_checkpoint(folder, tmp_path / "casa")
    stored, converted = tensors_of(tmp_path), load_file(tmp_path / "casa" / "model.safetensors")
    same = {name: torch.equal(stored[name], converted[target]) for name, target in QWEN_NAMES.items()}
    assert len(same) == 5 and all(same.values())
    assert converted.keys() == CasaForConditionalGeneration.from_pretrained(tmp_path / "casa").state_dict().keys() - {
        "lm_head.weight"
    }


QWEN_NAMES = {
    f"model.layers.2.{name}": f"model.language_model.layers.2.{target}"
    for name, target in {
        "casa_attn.q_proj.weight": "casa_attn.q_proj.weight",
        "casa_attn.o_proj.weight": "casa_attn.o_proj.weight",
        "casa_attn.norm_kv.weight": "casa_attn.image_norm.weight",
        "self_attn.v_proj.bias": "self_attn.v_proj.bias",
        "mlp.down_proj.weight": "mlp.down_proj.weight",
    }.items()
}


# -------------------------------------------------------------------- refusals

BLOCK = "model.layers.1."


def without(*names: str) -> Callable[[Weights], Weights]:
    return lambda all: {name: tensor for name, tensor in all.items() if name not in names}


def added(**tensors: Tensor) -> Callable[[Weights], Weights]:
    return lambda all: all | {name.replace("__", "."): tensor for name, tensor in tensors.items()}


def renamed(old: str, new: str) -> Callable[[Weights], Weights]:
    return lambda all: {name.replace(old, new): tensor for name, tensor in all.items()}


def swapped(one: str, other: str) -> Callable[[Weights], Weights]:
    def swap(all: Weights) -> Weights:
        return {name.replace(one, "#").replace(other, one).replace("#", other): t for name, t in all.items()}

    return swap


REFUSED: dict[str, tuple[Callable[[Weights], Weights], list[str]]] = {
    "no query": (without(f"{BLOCK}casa_attn.q_proj.weight"), ["lacks 1 tensor", "layers.1.casa_attn.q_proj.weight"]),
    "no bias in one block": (without(f"{BLOCK}casa_attn.q_proj.bias"), ["layers.1.casa_attn.q_proj.bias", "lacks"]),
    "no norm in one block": (without(f"{BLOCK}casa_attn.norm_kv.weight"), ["layers.1.casa_attn.image_norm", "lacks"]),
    "no norm of a block": (without(f"{BLOCK}input_layernorm.weight"), ["layers.1.input_layernorm", "lacks"]),
    "no embeddings": (without("model.embed_tokens.weight"), ["embed_tokens", "lacks"]),
    "no part of the tower": (
        without("image_prefix.visual.blocks.0.attn.proj.bias"),
        ["visual.blocks.0.attn.proj.bias"],
    ),
    "no patches": (without("image_prefix.visual.patch_embed.proj.weight"), ["patch_embed", "lacks"]),
    "an unknown tensor": (
        added(model__layers__0__casa_attn__scale=torch.ones(3)),
        ["layers.0.casa_attn.scale (no rule knows this name)", "inspect SOURCE --names", "mapping"],
    ),
    "an unknown part": (added(adapter__weight=torch.ones(3)), ["adapter.weight (no rule knows this name)"]),
    "one tensor twice": (
        lambda all: all | {"language_model.norm.weight": all["model.norm.weight"].clone()},
        ["2 tensors", "model.norm.weight", "language_model.norm.weight", "but so is"],
    ),
    "an ambiguous norm": (
        renamed("casa_attn.norm_kv", "norm_cross"),
        ["norm_cross.weight (ambiguous: ", "image_norm.weight or ", "casa_layernorm.weight"],
    ),
    "q for o and o for q": (
        swapped("casa_attn.q_proj", "casa_attn.o_proj"),
        ["casa_attn.o_proj.bias", "no rule knows this name"],
    ),
    "too wide": (
        lambda all: all | {f"{BLOCK}casa_attn.k_proj.weight": torch.ones(64, 64)},
        ["layers.1.casa_attn.k_proj.weight", "[64, 64] instead of [32, 64]"],
    ),
    "patches of another size": (
        lambda all: all | {"image_prefix.visual.patch_embed.proj.weight": torch.ones(32, 3, 16, 16)},
        ["patch_embed.proj.weight", "[32, 3, 16, 16] instead of [32, 3, 2, 14, 14]"],
    ),
    "patches in an order that isn't known": (
        lambda all: all | {"image_prefix.visual.patch_embed.proj.weight": torch.ones(32, 588)},
        ["flattened", "chw, hwc"],
    ),
    "rows of another number": (
        lambda all: (
            without(f"{BLOCK}casa_attn.q_proj.weight", f"{BLOCK}casa_attn.k_proj.weight")(all)
            | {f"{BLOCK}casa_attn.qkv_proj.weight": torch.ones(100, 64)}
        ),
        ["100 rows", "64 + 32 + 32"],
    ),
    "biases that the backbone doesn't have": (
        lambda all: all | {f"{BLOCK}casa_attn.o_proj.bias": torch.ones(64)},
        ["casa_attn.o_proj.bias", "no rule"],
    ),
    **{
        f"another head than the embeddings, {name}": (
            lambda all, name=name: all | {name: torch.ones(QWEN.vocabulary, 64)},
            [f"{name} has other values than the embeddings", "tied"],
        )
        for name in ("lm_head.weight", "text_linear.weight", "wrapped.lm_head.weight")
    },
    "a list of fusion layers of another length": (
        renamed("layers.1.casa_attn.", "ca_layers.0."),
        ["ca_layers.0.k_proj.bias", "a list of 1 fusion layers in 3 blocks"],
    ),
    "self-attention missing in one block": (
        lambda all: {name: t for name, t in all.items() if not name.startswith(f"{BLOCK}self_attn")},
        ["Blocks [1] have a fusion layer in place of self-attention"],
    ),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_isnt_understood_is_refused(tmp_path, fault):
    change, words = REFUSED[fault]
    folder = released(tmp_path / "released", "qwen, second generation", tensors=change)
    assert_refused(folder, tmp_path / "casa", *words)


def test_a_tied_head_that_is_the_embeddings_is_left_out(tmp_path):
    folder = released(
        tmp_path / "released",
        "qwen, second generation",
        tensors=lambda all: all | {"lm_head.weight": all["model.embed_tokens.weight"].clone()},
    )
    report = convert_checkpoint(folder, tmp_path / "casa")
    assert report.dropped == {"lm_head.weight": "tied to model.language_model.embed_tokens.weight"}
    assert_is(tmp_path / "casa", QWEN)


@pytest.mark.parametrize("stored", [True, False])
def test_whether_the_head_is_tied_follows_from_the_tensors(tmp_path, stored):
    spec = replace(HELIUM, tied=not stored)
    folder = write(
        tmp_path / "released",
        spec,
        CASES["helium, a list of fusion layers"][1],
        name="CASA_Helium1_VL_2B",
        config=lambda content: content.pop("tie_word_embeddings"),
    )
    config = convert_checkpoint(folder, tmp_path / "casa").config
    assert config.tie_word_embeddings is not stored
    assert_is(tmp_path / "casa", spec)


# -------------------------------------------------------------------- the design


def test_what_isnt_known_is_asked_for_at_once(tmp_path):
    case = "qwen, first generation, everything in one tensor"
    folder = released(tmp_path / "first", case, delimiters=False)
    message = assert_refused(folder, tmp_path / "casa", "casa_image_norm", "casa_image_positions", "casa_text_windows")
    assert "image_delimiters" in message and "casa_keys" not in message
    for code in (None, FIRST + SECOND, "class Model: ..."):
        folder = released(tmp_path / f"{code}"[:5], case, code=code)
        assert_refused(folder, tmp_path / "casa", "casa_keys ('image' or 'window')", "December 2025")
    gated = released(tmp_path / "gated", "qwen, no biases in fusion, gates")
    assert_refused(gated, tmp_path / "casa", "casa_gate ('tanh')")


CALLS_ITSELF_CASA = {"auto_map": {"AutoModel": "modeling_helium1_casa.Model"}}


@pytest.mark.parametrize(
    ("code", "changes"), [("", CALLS_ITSELF_CASA), (FIRST, {}), (SECOND, {})], ids=["map", "1", "2"]
)
def test_an_insertion_model_with_code_of_fusion_layers_is_asked_about(tmp_path, code, changes):
    """Both kinds of model have the same tensors where fusion layers share projections."""
    case = "helium, insertion"
    folder = released(tmp_path / "released", case, code=code, config=lambda content: content.update(changes))
    assert_refused(folder, tmp_path / "casa", "casa_keys ('context', 'image' or 'window')", "no CASA in it")
    for name, given in {"variant": {"variant": "insertion"}, "keys": {"casa_keys": "context"}}.items():
        assert convert_checkpoint(folder, tmp_path / name, **given).config.variant == "insertion"
        assert_is(tmp_path / name, CASES[case][0])
    shared = convert_checkpoint(folder, tmp_path / "shared", casa_keys="image", casa_image_norm="none")
    assert shared.config.casa_share_projections and shared.config.casa_keys == "image"
    assert_is(tmp_path / "shared", replace(HELIUM, shared=True, image_norm=None))


def test_images_side_by_side_are_seen_one_at_a_time(tmp_path):
    """Only the latest is looked at, also where nothing but delimiters stands between two of them."""
    small, large = images()
    for case in ("qwen, second generation", "qwen, first generation, another geometry"):
        spec, _, _, said = CASES[case]
        config = convert_checkpoint(
            released(tmp_path / case / "released", case), tmp_path / case / "casa", **said
        ).config
        start, end = config.vision_start_token_id, config.image_token_id
        ids, pictures = [5, 6, start, end, start, end, 8, 9, 10], [(3, small), (5, large)]
        expected = authors_reference.logits(spec, spec.weights(), ids, pictures)
        assert error(casa_logits(tmp_path / case / "casa", ids, pictures), expected) < 1e-5


def test_what_is_given_wins(tmp_path):
    """Over the code's generation and over assumptions; the model is another one then."""
    folder = released(tmp_path / "released", "qwen, second generation")
    given = {"casa_keys": "window", "casa_image_positions": "at", "casa_text_windows": True}
    report = convert_checkpoint(folder, tmp_path / "casa", casa_image_history="group", **given)
    assert report.config.casa_image_history == "group"
    assert_is(tmp_path / "casa", replace(QWEN, with_text=True, text_before=True))
    report = convert_checkpoint(folder, tmp_path / "named", "ca", casa_image_history="group")
    assert report.config.variant == "ca"
    shared = released(tmp_path / "shared", "qwen, shared")
    report = convert_checkpoint(shared, tmp_path / "some", "ca-shared", casa_image_norm="input", casa_layers="every:2")
    assert_is(tmp_path / "some", replace(CASES["qwen, shared"][0], fused=(1,)))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"casa_share_projections": True}, ["casa_share_projections=True contradicts the tensors"]),
        ({"variant": "ca-shared"}, ["casa_share_projections=True contradicts"]),
        ({"casa_layers": [0, 1]}, ["casa_layers=[0, 1] contradicts"]),
        ({"casa_placement": "replace"}, ["casa_placement='replace' contradicts"]),
        ({"casa_image_norm": "none"}, ["casa_image_norm='none' contradicts", "norm_kv"]),
        ({"casa_gate": "tanh"}, ["casa_gate='tanh' contradicts"]),
        ({"variant": "exact"}, ["casa_keys='context' contradicts the tensors", "3 blocks"]),
        ({"num_gist_tokens": 2}, ["num_gist_tokens=2"]),
        ({"vision_from": "me/model"}, ["vision_from='me/model'", "has a vision tower"]),
        ({"image_delimiters": "<|no|>"}, ["image_delimiters='<|no|>'", "has no <|no|>"]),
        ({"video_timestamps": "text"}, ["video_timestamps='text'", "no times"]),
        ({"max_pixels": 100}, ["max_pixels=100", "3136"]),
        ({"mapping": "nowhere.tsv"}, ["mapping='nowhere.tsv' can't be read"]),
    ],
    ids=str,
)
def test_what_contradicts_the_checkpoint_is_refused(tmp_path, given, words):
    folder = released(tmp_path / "released", "qwen, second generation")
    assert_refused(folder, tmp_path / "casa", *words, **given)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.pop("rms_norm_eps"), ["lacks rms_norm_eps", "at its top level"]),
        (lambda c: (c.pop("rope_theta"), c.pop("rope_scaling")), ["lacks rope_theta"]),
        (lambda c: c.pop("vision_config"), ["lacks vision_config.depth"]),
        (lambda c: c.update(model_type="CASA_3B", architectures=["CASA"]), ["what language model CASA_3B CASA has"]),
        (lambda c: c.update(pre_image_tokens=[1, 2]), ["pre_image_tokens=[1, 2]"]),
        (lambda c: c.update(post_image_tokens="x"), ["post_image_tokens='x'"]),
        (lambda c: c.update(post_image_tokens=[9999]), ["9999", "outside the vocabulary"]),
        (lambda c: c.update(quantization_config={"bits": 4}), ["quantization_config"]),
        (lambda c: c.update(hidden_size="wide"), ["doesn't describe a Qwen2.5-VL language model"]),
        (lambda c: c.update(text_config={**c, "model_type": "mistral"}), ["text_config.model_type 'mistral'"]),
    ],
    ids=range(10),
)
def test_configurations_that_dont_do(tmp_path, change, words):
    folder = released(tmp_path / "released", "qwen, second generation", config=change)
    try:
        assert_refused(folder, tmp_path / "casa", *words)
    except ValueError as error:  # of the configuration itself
        assert all(word in str(error) for word in words) and not (tmp_path / "casa").exists()


def test_delimiters_can_be_given(tmp_path):
    folder = released(tmp_path / "released", "helium, shared", delimiters=False)
    said = CASES["helium, shared"][3]
    report = convert_checkpoint(folder, tmp_path / "casa", image_delimiters=",".join(IMAGE_TOKENS), **said)
    assert report.config.new_token_ids == () and report.config.delimiter_token_ids == (838, 839)
    assert_is(tmp_path / "casa", CASES["helium, shared"][0])


OTHERS = ("<|im_start|>", "<|im_end|>")


@pytest.mark.parametrize("stated", [OTHERS, OTHERS[1:], ("<|vision_end|>",)], ids=str)
@pytest.mark.parametrize("given", [True, False])
def test_a_vision_language_backbone_has_delimiters_of_its_own(tmp_path, stated, given):
    """Else its prompts would have other tokens around an image than its model knows."""
    *before, after = build_tokenizer().convert_tokens_to_ids(list(stated))
    in_config = {} if given else {"pre_image_tokens": before, "post_image_tokens": [after]}
    folder = released(tmp_path / "released", "qwen, second generation", config=lambda all: all.update(in_config))
    options = {"image_delimiters": stated} if given else {}
    assert_refused(folder, tmp_path / "casa", *stated, "<|vision_start|> and <|vision_end|> here", **options)
    convert_checkpoint(folder, tmp_path / "casa", image_delimiters="<|vision_start|>,<|vision_end|>")
    assert_is(tmp_path / "casa", QWEN)


def test_loading_without_conversion_tells_the_way(tmp_path):
    for case in ("qwen, second generation", "helium, insertion"):
        with pytest.raises(ValueError, match=r"format of the method's authors\. Convert it first: `casa-hf convert "):
            CasaForConditionalGeneration.from_pretrained(released(tmp_path / case, case))


# -------------------------------------------------------------------- mapping files

STRANGE = Layout(fusion="glue.", fusion_names={"q": "a", "k": "c", "v": "b", "o": "d"}, fusion_norm="e")


def test_a_mended_table_says_what_the_rules_dont(tmp_path):
    folder = write(tmp_path / "released", QWEN, STRANGE, name="CASA_Qwen2_5_VL_3B")
    assert_refused(folder, tmp_path / "casa", "24 tensors", "layers.0.glue.a.bias (no rule knows this name)")
    table = names_report(folder)
    assert "# 92 tensors: 68 understood, 24 not" in table
    assert "# the design is told when all tensors are understood" in table and "casa_" not in table.partition("?")[0]
    for old, new in {"a": "q_proj", "b": "v_proj", "c": "k_proj", "d": "o_proj", "e": "image_norm"}.items():
        for leaf in ("weight", "bias"):
            line = f"model.layers.{{i}}.glue.{old}.{leaf}\t?\t0-2"
            assert (line in table) == (leaf == "weight" or old in "abc")
            table = table.replace(f"glue.{old}.{leaf}\t?", f"glue.{old}.{leaf}\t{TARGET}casa_attn.{new}.{leaf}")
    (tmp_path / "names.tsv").write_text(table)
    convert_checkpoint(folder, tmp_path / "casa", mapping=tmp_path / "names.tsv")
    assert_is(tmp_path / "casa", QWEN)
    # What was written is a mapping file too, and the whole table says the same as these lines alone.
    convert_checkpoint(folder, tmp_path / "again", mapping=tmp_path / "casa" / "released_names.tsv")
    lines = [line for line in table.splitlines() if "glue" in line]
    short = "\n".join(["\t".join(line.split("\t")[:2]) for line in lines])
    (tmp_path / "short.tsv").write_text(f"{short}\n", encoding="utf-8-sig", newline="\r\n")  # as some editors do
    convert_checkpoint(folder, tmp_path / "short", mapping=tmp_path / "short.tsv")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("casa", "again", "short")]
    assert files[0] == files[1] == files[2]
    assert "0 not" in names_report(folder, mapping=tmp_path / "short.tsv")


TARGET = "model.language_model.layers.{i}."


def test_tables_of_contradictory_and_incomplete_checkpoints(tmp_path):
    """A report says what is wrong, instead of failing with it."""
    change, [words] = REFUSED["self-attention missing in one block"]
    table = names_report(released(tmp_path / "missing", "qwen, second generation", tensors=change))
    assert f"# contradictory: {words}" in table and "model.layers.{i}.casa_attn.q_proj.weight\t" in table
    table = names_report(released(tmp_path / "unsaid", "qwen, shared", delimiters=False))
    assert "# to be given: casa_image_norm" in table and "# to be given: image_delimiters" in table


def test_rows_orders_and_one_tensor_for_all_blocks(tmp_path):
    """Values before keys in one tensor, patches with their channels last, one norm for all, a tensor left out."""
    spec = replace(HELIUM, image_norm="tower")
    layout = Layout(
        tower="image_prefix.enc.visual.",
        fusion="glue.",
        tower_norm="scale",
        patch="hwc",
        joined=((r".*glue\.{part}\.weight", ("v_proj", "k_proj"), "vk"),),
    )
    folder = write(tmp_path / "released", spec, layout, name="CASA_Helium1_VL_2B", tensors=added(step=torch.ones(1)))
    lines = {
        "model.layers.{i}.glue.vk.weight[0:32]": f"{TARGET}casa_attn.v_proj.weight",
        "model.layers.{i}.glue.vk.weight[32:64]": f"{TARGET}casa_attn.k_proj.weight",
        "model.layers.{i}.glue.q_proj.weight": f"{TARGET}casa_attn.q_proj.weight",
        "model.layers.{i}.glue.o_proj.weight": f"{TARGET}casa_attn.o_proj.weight",
        "scale.weight": f"{TARGET}casa_attn.image_norm.weight",
        "image_prefix.enc.visual.patch_embed.proj.weight": "model.visual.patch_embed.proj.weight hwc",
        "step": "drop",
    }
    file = tmp_path / "names.tsv"
    file.write_text("\n".join(f"{name}\t{target}" for name, target in lines.items()))
    report = convert_checkpoint(folder, tmp_path / "casa", mapping=file)
    assert report.dropped == {"step": "as the mapping says"}
    assert_is(tmp_path / "casa", spec)
    convert_checkpoint(folder, tmp_path / "again", mapping=tmp_path / "casa" / "released_names.tsv")
    assert_is(tmp_path / "again", spec)


def test_the_table_of_names_stays_with_what_is_made_of_the_checkpoint(tmp_path):
    """Another design, or another training; a source made of it has no use for it."""
    folder = released(tmp_path / "released", "qwen, second generation")
    convert_checkpoint(folder, tmp_path / "casa")
    table = (tmp_path / "casa" / "released_names.tsv").read_bytes()
    convert_checkpoint(tmp_path / "casa", tmp_path / "group", casa_image_history="group")
    copy_kept(tmp_path / "group", tmp_path / "trained")
    for name in ("group", "trained"):
        assert (tmp_path / name / "released_names.tsv").read_bytes() == table
    convert_to_source(tmp_path / "group", tmp_path / "back")
    assert not (tmp_path / "back" / "released_names.tsv").exists()


PATCHES = "image_prefix.visual.patch_embed.proj.weight"


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("order", ["chw", "hwc", "cthw", "thwc"])
def test_patches_with_their_axes_in_any_order(tmp_path, order, flat):
    """As one row of numbers for each output or with an axis for each letter; two frames may differ."""

    def turned(all: Weights) -> Weights:
        two = authors_layouts.two_frames(all[PATCHES])
        patches = two if "t" in order else all[PATCHES]
        axes = "cthw" if "t" in order else "chw"
        patches = patches.permute(0, *(1 + axes.index(axis) for axis in order))
        return all | {PATCHES: (patches.flatten(1) if flat else patches).contiguous()}

    folder = released(tmp_path / "released", "qwen, second generation", tensors=turned)
    (tmp_path / "names.tsv").write_text(f"{PATCHES}\tmodel.visual.patch_embed.proj.weight {order}\n")
    convert_checkpoint(folder, tmp_path / "casa", mapping=tmp_path / "names.tsv")
    assert_is(tmp_path / "casa", QWEN)
    stored = load_file(tmp_path / "casa" / "model.safetensors")["model.visual.patch_embed.proj.weight"]
    assert torch.equal(stored[:, :, 0], stored[:, :, 1]) == ("t" not in order)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("model.norm.weight", ["line 1", "a tab"]),
        ("model.nrm.weight\tmodel.language_model.norm.weight", ["line 1 names no tensor", "model.nrm.weight"]),
        ("model.norm.weight\tmodel.language_model.nrm.weight", ["Did you mean model.language_model.norm.weight?"]),
        ("model.norm.weight\tmodel.language_model.norm.weight wh", ["line 1 has 'wh'", "chw, hwc"]),
        ("model.norm.weight[0:3]\tmodel.language_model.norm.weight", ["each of 64 rows once", "(0, 3)"]),
        (
            "model.norm.weight[0:40]\tmodel.language_model.norm.weight\nmodel.norm.weight[39:64]\tdrop",
            ["each of 64 rows once"],
        ),
        ("model.norm.weight\tdrop", ["lacks 1 tensor", "model.language_model.norm.weight"]),
        ("model.norm.weight\tlm_head.weight", ["lm_head.weight", "no CASA checkpoint of this backbone has"]),
        (
            "model.norm.weight\tmodel.language_model.layers.0.input_layernorm.weight",
            ["model.norm.weight", "model.layers.0.input_layernorm.weight", "but so is"],
        ),
        (f"model.layers.{{i}}.casa_attn.q_proj.weight\t{TARGET}casa_attn.k_proj.weight", ["but so is"]),
        (f"model.layers.{{i}}.casa_attn.norm_kv.weight\t{TARGET}casa_layernorm.weight", ["casa_placement", "before"]),
        (
            f"{PATCHES}\tmodel.visual.patch_embed.proj.weight hwc",
            ["[32, 3, 14, 14] in the order hwc instead of [32, 3,"],
        ),
        (f"{PATCHES}\tmodel.visual.patch_embed.proj.weight cthw", ["[32, 3, 14, 14] in the order cthw"]),
        ("model.norm.weight\tmodel.language_model.norm.weight chw", ["only a patch embedding has an order"]),
    ],
    ids=range(14),
)
def test_mapping_files_that_dont_do(tmp_path, line, words):
    folder = released(tmp_path / "released", "qwen, second generation")
    (tmp_path / "names.tsv").write_text(f"{line}\n")
    assert_refused(folder, tmp_path / "casa", *words, mapping=tmp_path / "names.tsv")


def test_a_mapping_for_a_checkpoint_of_known_names_is_refused(source_folder, tmp_path):
    (tmp_path / "names.tsv").write_text("")
    assert_refused(source_folder, tmp_path / "casa", "names of", "are known", mapping=tmp_path / "names.tsv")
    with pytest.raises(CheckpointError, match="whose names of tensors are known"):
        names_report(source_folder)


# -------------------------------------------------------------------- what comes of it


def test_processor_and_generation(tmp_path):
    """Images of the authors' size, two equal frames to the tower, the delimiters that were stated, all stop ids."""
    for case in ("qwen, second generation", "helium, a list of fusion layers"):
        folder = released(tmp_path / case / "released", case)
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8, 9]}))
        config = convert_checkpoint(folder, tmp_path / case / "casa").config
        processor = CasaProcessor.from_pretrained(tmp_path / case / "casa")
        assert processor.image_processor.size["longest_edge"] == 896 * 896
        assert (processor.vision_start_token_id, processor.image_token_id) == config.delimiter_token_ids
        content = [
            {"type": "image", "image": Image.new("RGB", (84, 56), "red")},
            {"type": "text", "text": "What is this?"},
        ]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        assert (inputs["input_ids"] == config.image_token_id).sum() == 1
        frames = inputs["pixel_values"].view(-1, 3, 2, 14 * 14)
        assert torch.equal(frames[:, :, 0], frames[:, :, 1]) and inputs["image_grid_thw"].tolist() == [[1, 4, 6]]
        model = CasaForConditionalGeneration.from_pretrained(tmp_path / case / "casa", dtype=torch.float32).eval()
        assert model.generation_config.eos_token_id == [7, 8, 9]
        assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] > inputs["input_ids"].shape[1]
        card = (tmp_path / case / "casa" / "README.md").read_text()
        assert "never been compared" in card and "cc-by-nc-sa-4.0" in card and "no new ones" in card


def test_way_back_is_the_stock_form_of_the_backbone(tmp_path):
    """With the language model and the tower that were released; the format of the authors isn't written."""
    for case, model_type in (("qwen, second generation", "qwen2_5_vl"), ("helium, a list of fusion layers", "llama")):
        convert_checkpoint(released(tmp_path / case / "released", case), tmp_path / case / "casa")
        report = convert_to_source(tmp_path / case / "casa", tmp_path / case / "back")
        assert report.config.model_type == model_type and report.added_parameters == 0
        spec = CASES[case][0]
        assert AutoTokenizer.from_pretrained(tmp_path / case / "back").decode([5, 6]) == AutoTokenizer.from_pretrained(
            tmp_path / case / "casa"
        ).decode([5, 6])
        assert not check_checkpoint(tmp_path / case / "casa").left_out
        ids = torch.tensor([[5, 6, 7, 8]])
        stock = (AutoModelForCausalLM if model_type == "llama" else AutoModelForImageTextToText).from_pretrained(
            tmp_path / case / "back", dtype=torch.float64
        )
        expected = authors_reference.logits(spec, spec.weights(), ids[0].tolist(), [])
        with torch.no_grad():
            assert error(stock(ids).logits[0], expected) < 1e-5


# -------------------------------------------------------------------- Hub and command line


@pytest.fixture
def cli(monkeypatch, capsys):
    return Cli(monkeypatch, capsys)


def test_names_of_a_hub_id_need_no_weights(tmp_path, use_hub):
    folder = released(tmp_path / "released", "qwen, second generation")
    with hub(folder) as (address, _):
        use_hub(address)
        table = names_report(REPOSITORY)
        assert f"{REPOSITORY} at commit {COMMIT}" in table and "casa_keys='image': modeling.py has" in table
        local = names_report(folder)
        assert table.splitlines()[1:] == local.splitlines()[1:]
        assert not list((tmp_path / "cache").rglob("*.safetensors"))
        with pytest.raises(
            CheckpointError, match=f"^{REPOSITORY} .*Convert it first: `casa-hf convert {REPOSITORY} OUT"
        ):
            inspect_checkpoint(REPOSITORY)
        convert_checkpoint(REPOSITORY, tmp_path / "casa")
    assert_is(tmp_path / "casa", QWEN)


def test_command_line(tmp_path, cli):
    folder = write(tmp_path / "released", QWEN, STRANGE, name="CASA_Qwen2_5_VL_3B", code=None)
    table = cli("inspect", folder, "--names")
    assert table.code == 0 and "model.layers.{i}.glue.a.weight\t?" in table.out
    mended = table.out
    for old, new in {"a": "q_proj", "b": "v_proj", "c": "k_proj", "d": "o_proj", "e": "image_norm"}.items():
        mended = re.sub(rf"(glue\.{old}\.(\w+))\t\?", rf"\1\t{TARGET}casa_attn.{new}.\2", mended)
    (tmp_path / "names.tsv").write_text(mended)
    command = ["convert", folder, tmp_path / "casa", "--mapping", tmp_path / "names.tsv"]
    assert cli(*command).refused("--keys ('image' or 'window')")
    shown = cli(*command, "--keys", "image", "--dry-run")
    assert (
        shown.code == 0 and "<- model.layers.1.glue.a.weight" in shown.out and "found: casa_keys='image'" in shown.out
    )
    done = cli(*command, "--keys", "image")
    assert done.code == 0 and "found: casa_share_projections=False" in done.out
    assert_is(tmp_path / "casa", QWEN)
    assert cli("inspect", folder).refused("CASA_Qwen2_5_VL_3B")
    outcome = cli("inspect", tmp_path / "casa", "--names")
    assert outcome.code == 2 and "names of tensors are known" in outcome.err
    assert cli("inspect", tmp_path / "casa", "--mapping", tmp_path / "names.tsv").refused("--names")
