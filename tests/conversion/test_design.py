# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Axes chosen one by one, and what they add to a source: gates, norms, gist tokens."""

from __future__ import annotations

import filecmp

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoTokenizer

from casa_hf import CasaForConditionalGeneration, CasaProcessor, CheckpointError
from casa_hf.conversion import convert_checkpoint, convert_to_source, inspect_checkpoint
from casa_hf.conversion.design import layer_indices
from examples.tiny_source import build_tiny_source
from tests.conversion.helpers import assert_refused, assert_same, converted, in_memory_layout, load_weights

BLOCK = "model.language_model.layers"
EMBEDDINGS = "model.language_model.embed_tokens.weight"


def load(folder):
    """A checkpoint that holds exactly what its model needs."""
    model, info = CasaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


@pytest.mark.parametrize(
    ("text", "indices"),
    [
        ("every:2", [1, 3, 5, 7, 9, 11]),
        ("every:5", [4, 9]),
        ("last:3", [9, 10, 11]),
        ("last:12", list(range(12))),
        ("4,8,11", [4, 8, 11]),
        ("0", [0]),
        ("all", None),
    ],
)
def test_blocks_in_words(text, indices):
    assert layer_indices(text, range(12)) == indices


@pytest.mark.parametrize("text", ["every:0", "last:13", "some", "1, 2", "-1", "", "every:x"])
def test_blocks_that_cant_be_read(text):
    with pytest.raises(CheckpointError, match="layers"):
        layer_indices(text, range(12))


def test_every_axis_by_its_own_option(source_folder, tmp_path):
    design = {
        "casa_keys": "image",
        "casa_layers": "every:2",
        "casa_placement": "after",
        "casa_image_updates": "ffn",
        "casa_image_history": "latest",
        "casa_video_history": "all",
        "casa_positions": "insertion",
        "casa_image_positions": "before",
        "casa_share_projections": True,
        "casa_image_norm": "none",
        "casa_gate": "tanh",
    }
    report = convert_checkpoint(source_folder, tmp_path / "casa", **design)
    config = load(tmp_path / "casa").config
    assert {name: getattr(config, name) for name in design} == design | {"casa_layers": [1]}
    tensors = in_memory_layout(load_weights(source_folder))
    expected = tensors | {
        f"{BLOCK}.1.casa_layernorm.weight": tensors[f"{BLOCK}.1.input_layernorm.weight"],
        f"{BLOCK}.1.casa_attn.gate": torch.zeros(1),
    }
    assert_same(load_weights(tmp_path / "casa"), expected)
    assert report.initialised == {f"{BLOCK}.1.casa_attn.gate": "0"}
    assert report.added_parameters == 64 + 1


@pytest.mark.parametrize(
    ("variant", "told"),
    [("insertion", "text, still images and videos it"), ("exact", "still images, or of text and one video, it")],
)
def test_the_layout_of_videos(source_folder, tmp_path, variant, told):
    """A setting of model and processor, which can be changed, and which nothing of the source is lost by."""
    report = convert_checkpoint(source_folder, tmp_path / "native", variant, casa_video_layout="native")
    assert report.config.variant is None and told in report.note
    assert CasaProcessor.from_pretrained(tmp_path / "native").frames_per_image == "all"
    model = load(tmp_path / "native")
    assert model.config.casa_video_layout == "native" and model.config.has_whole_videos
    loaded = CasaForConditionalGeneration.from_pretrained(
        source_folder, casa_variant=variant, casa_video_layout="native"
    )
    assert loaded.config.has_whole_videos

    convert_checkpoint(tmp_path / "native", tmp_path / "again")
    assert CasaProcessor.from_pretrained(tmp_path / "again").frames_per_image == "all"
    report = convert_checkpoint(tmp_path / "native", tmp_path / "frames", casa_video_layout=None)
    assert report.config.variant == variant
    assert CasaProcessor.from_pretrained(tmp_path / "frames").frames_per_image == 1
    convert_checkpoint(tmp_path / "frames", tmp_path / "back", casa_video_layout="native")
    assert CasaProcessor.from_pretrained(tmp_path / "back").frames_per_image == "all"
    with pytest.raises(ValueError, match=r"casa_video_layout='native' of Qwen2\.5-VL has positions in time"):
        convert_checkpoint(tmp_path / "native", tmp_path / "casa", "casa", casa_video_layout="native")

    for name, made_from in (("from native", "native"), ("from frames", "frames")):
        convert_to_source(tmp_path / made_from, tmp_path / name)
    for file in (tmp_path / "from native").iterdir():
        if file.name != "README.md":
            assert file.read_bytes() == (tmp_path / "from frames" / file.name).read_bytes(), file.name


def test_frames_that_a_checkpoint_takes_together_stay_so(source_folder, tmp_path):
    """Also where its design is another one now."""
    convert_checkpoint(source_folder, tmp_path / "casa")
    CasaProcessor.from_pretrained(tmp_path / "casa", frames_per_image=2).save_pretrained(tmp_path / "casa")
    convert_checkpoint(tmp_path / "casa", tmp_path / "ca", "ca")
    assert CasaProcessor.from_pretrained(tmp_path / "ca").frames_per_image == 2


def test_an_axis_wins_over_the_variant(source_folder, tmp_path):
    report = convert_checkpoint(source_folder, tmp_path / "casa", "ca-shared", casa_share_projections=False)
    assert report.config.variant == "ca"
    report = convert_checkpoint(source_folder, tmp_path / "windows", casa_text_windows=True, casa_layers=[2])
    assert report.config.casa_text_windows and report.config.casa_layers == [2]


def test_bad_designs(source_folder, tmp_path):
    assert_refused(source_folder, tmp_path / "casa", "'casa_key'", "casa_keys", casa_key="image")
    assert_refused(source_folder, tmp_path / "casa", "'most'", casa_layers="most")
    assert_refused(source_folder, tmp_path / "casa", "num_gist_tokens=-1", num_gist_tokens=-1)
    for design in ({"casa_keys": "words"}, {"casa_layers": [3]}, {"casa_keys": "context"}):
        with pytest.raises(ValueError, match=next(iter(design))):
            convert_checkpoint(source_folder, tmp_path / "casa", **design)
    assert list(tmp_path.iterdir()) == []


def test_unknown_names_are_found_before_anything_else(source_folder, tmp_path):
    """Whatever is at the output, and whether or not there is a source."""
    (tmp_path / "casa").mkdir()
    (tmp_path / "casa" / "file").touch()
    for source in (source_folder, tmp_path / "nowhere"):
        for design, words in (
            ({"variant": "cassa"}, "variant 'cassa' is unknown; did you mean 'casa'"),
            ({"casa_keys": "words"}, "casa_keys='words' is unknown"),
            ({"casa_key": "image"}, "'casa_key' is not a design option"),
        ):
            with pytest.raises(ValueError, match=words):
                convert_checkpoint(source, tmp_path / "casa", **design)


def test_closed_gates_show_nothing(source_folder, tmp_path):
    """Logits are the source's for text, whatever the image; an open gate changes them."""
    report = convert_checkpoint(source_folder, tmp_path / "casa", dtype="float64", casa_gate="tanh")
    assert "gates are closed" in report.note
    assert all(load_weights(tmp_path / "casa")[f"{BLOCK}.{i}.casa_attn.gate"].dtype == torch.float64 for i in range(3))
    model, processor = load(tmp_path / "casa"), CasaProcessor.from_pretrained(tmp_path / "casa")
    inputs = processor(
        text="What is <|vision_start|><|vision_end|> here?",
        images=Image.new("RGB", (56, 56), "red"),
        return_tensors="pt",
    )
    source = AutoModelForImageTextToText.from_pretrained(source_folder, dtype=torch.float64)
    with torch.no_grad():
        expected = source(input_ids=inputs["input_ids"]).logits
        assert torch.allclose(model(**inputs).logits, expected, atol=1e-9)
        model.model.language_model.layers[1].casa_attn.gate.fill_(1)
        assert not torch.allclose(model(**inputs).logits, expected, atol=1e-3)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("number", [2, 60])
def test_gist_tokens(tmp_path, tied, number):
    """Ids within spare rows of the matrix, and beyond its last row."""
    source = build_tiny_source(tmp_path / "source", tie_word_embeddings=tied)
    report = convert_checkpoint(source, tmp_path / "casa", dtype="float64", num_gist_tokens=number)
    processor = CasaProcessor.from_pretrained(tmp_path / "casa")
    first = len(AutoTokenizer.from_pretrained(source))
    ids = processor.gist_token_ids
    assert ids == report.config.gist_token_ids == list(range(first, first + number))
    rows = max(first + number, 768)
    assert (rows > 768) is (number == 60)
    assert report.config.text_config.vocab_size == rows

    expected = {name: t.double() for name, t in converted(load_weights(source), [0, 1, 2]).items()}
    matrices = [EMBEDDINGS] if tied else [EMBEDDINGS, "lm_head.weight"]
    for name in matrices:
        mean = expected[name].mean(0, keepdim=True)
        grown = torch.cat([expected[name], mean.expand(rows - 768, -1)])
        grown[ids] = mean
        found = load_weights(tmp_path / "casa")[name]
        if name == EMBEDDINGS:  # around the mean, each elsewhere
            noise = found[ids] - mean
            spread = (expected[name] - mean).square().mean().sqrt()
            assert 0.08 * spread < noise.std() < 0.12 * spread
            distances = torch.cdist(noise, noise) + torch.eye(number) * spread
            assert distances.min() > 0.05 * spread * 64**0.5
            grown[ids] += noise
        torch.testing.assert_close(found, grown, rtol=0, atol=1e-14)
        expected[name] = found
    assert_same(load_weights(tmp_path / "casa"), expected)
    assert report.initialised.keys() == set(matrices)
    assert report.added_parameters == 37_440 + number * 64 * len(matrices)

    model = load(tmp_path / "casa")
    summary = inspect_checkpoint(tmp_path / "casa")
    assert (summary.source_parameters, summary.added_parameters) == (
        report.source_parameters,
        report.added_parameters,
    )
    assert summary.source_parameters + summary.added_parameters == model.num_parameters()
    inputs = processor(
        text="<|vision_start|><|vision_end|> What?", images=Image.new("RGB", (56, 56)), return_tensors="pt"
    )
    assert all(index in inputs["input_ids"][0] for index in ids)
    assert model(**inputs).logits.shape[-1] == rows
    card = (tmp_path / "casa" / "README.md").read_text()
    assert "`<|gist_1|>`" in card and "mean of all rows" in card and "`num_gist_tokens=" in card
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert filecmp.cmp(source / name, tmp_path / "casa" / f"source_{name}", shallow=False)


def test_image_size(source_folder, tmp_path):
    convert_checkpoint(source_folder, tmp_path / "casa", max_pixels=112 * 112)
    assert CasaProcessor.from_pretrained(tmp_path / "casa").image_processor.size["longest_edge"] == 112 * 112
    assert inspect_checkpoint(tmp_path / "casa").image_tokens == 16
    assert_refused(source_folder, tmp_path / "other", "max_pixels", max_pixels=1)
