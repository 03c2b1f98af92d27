# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""From one CASA checkpoint to another: what it holds is kept, what it lacks starts as in a source."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from casa_hf import CasaForConditionalGeneration, CasaProcessor
from casa_hf.conversion import convert_checkpoint, convert_to_source, plan_to_source
from casa_hf.folder_files import CheckpointError
from examples.tiny_source import build_tiny_helium, build_tiny_source
from tests.conversion.helpers import assert_refused, assert_same, converted, in_memory_layout, load_weights

BLOCK = "model.language_model.layers"


@pytest.fixture
def trained(source_folder, tmp_path):
    """Makes a CASA checkpoint of which every tensor differs from the source's."""

    def make(variant, **design):
        folder = convert_checkpoint(source_folder, tmp_path / "trained", variant, **design).output
        generator = torch.Generator().manual_seed(0)
        tensors = {
            name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
            for name, tensor in sorted(load_weights(folder).items())
        }
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder, tensors

    return make


def logits(folder):
    model = CasaForConditionalGeneration.from_pretrained(folder).eval()
    processor = CasaProcessor.from_pretrained(folder)
    image = Image.linear_gradient("L").resize((84, 56)).convert("RGB")
    inputs = processor(text="What is <|vision_start|><|vision_end|> here?", images=image, return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits


def test_shared_projections_become_own_ones(trained, tmp_path):
    """The same function, now with fusion layers that can be trained apart."""
    folder, tensors = trained("casa-shared")
    report = convert_checkpoint(folder, tmp_path / "casa", "casa")
    assert_same(load_weights(tmp_path / "casa"), converted(tensors, [0, 1, 2]))
    assert report.config.variant == "casa" and report.added_parameters == 37_440
    torch.testing.assert_close(logits(tmp_path / "casa"), logits(folder), rtol=0, atol=1e-4)


def test_the_same_tensors_under_other_settings(trained, tmp_path):
    folder, tensors = trained("casa")
    report = convert_checkpoint(folder, tmp_path / "ca", "ca", casa_image_history="latest")
    assert_same(load_weights(tmp_path / "ca"), tensors)
    assert (report.config.casa_keys, report.config.casa_image_history) == ("image", "latest")
    assert report.added == {} and report.added_parameters == 0
    assert "another design" in report.note
    _, info = CasaForConditionalGeneration.from_pretrained(tmp_path / "ca", output_loading_info=True)
    assert not any(info.values()), info


def test_the_design_stays_by_default(trained, tmp_path):
    folder, tensors = trained("ca", casa_layers=[1], casa_gate="tanh", num_gist_tokens=2)
    report = convert_checkpoint(folder, tmp_path / "half", dtype="bfloat16")
    assert_same(load_weights(tmp_path / "half"), {name: tensor.bfloat16() for name, tensor in tensors.items()})
    config = report.config
    assert (config.casa_keys, config.casa_layers, config.casa_gate) == ("image", [1], "tanh")
    assert "what the CASA model that" in report.note
    assert CasaProcessor.from_pretrained(tmp_path / "half").gist_token_ids == config.gist_token_ids
    # The way back is still open.
    back = convert_to_source(tmp_path / "half", tmp_path / "back").output
    assert not (back / "source_tokenizer.json").exists()


@pytest.mark.parametrize("max_pixels", [None, 112 * 112])
def test_image_sizes_are_those_of_a_direct_conversion(source_folder, tmp_path, max_pixels):
    """The source's, wherever a design keeps them; those that were chosen before stay with a design that has them."""
    convert_checkpoint(source_folder, tmp_path / "shared", "casa-shared")
    for folder, name in ((source_folder, "direct"), (tmp_path / "shared", "by way")):
        convert_checkpoint(folder, tmp_path / name, "exact", max_pixels=max_pixels)
    direct, by_way = (CasaProcessor.from_pretrained(tmp_path / name) for name in ("direct", "by way"))
    assert dict(by_way.image_processor.size) == dict(direct.image_processor.size)
    assert by_way.frame_max_pixels is direct.frame_max_pixels is None
    assert by_way.image_processor.size["longest_edge"] != 952 * 952
    convert_checkpoint(tmp_path / "by way", tmp_path / "insertion", "insertion")
    again = CasaProcessor.from_pretrained(tmp_path / "insertion")
    assert dict(again.image_processor.size) == dict(direct.image_processor.size)


def test_a_norm_and_gates_are_added(trained, tmp_path):
    folder, tensors = trained("casa", casa_layers=[0, 2])
    report = convert_checkpoint(folder, tmp_path / "before", casa_placement="before", casa_gate="tanh")
    norms = {f"{BLOCK}.{i}.casa_layernorm.weight": tensors[f"{BLOCK}.{i}.input_layernorm.weight"] for i in (0, 2)}
    gates = {f"{BLOCK}.{i}.casa_attn.gate": torch.zeros(1) for i in (0, 2)}
    assert_same(load_weights(tmp_path / "before"), tensors | norms | gates)
    assert report.config.casa_layers == [0, 2]


def test_norms_of_images_are_added(trained, tmp_path):
    """They start as the block's; the way back would lose them. Loading with the setting gives the same model."""
    folder, tensors = trained("ca", casa_image_norm="none")
    assert not any("image_norm" in name for name in tensors)
    convert_checkpoint(folder, tmp_path / "normed", casa_image_norm="input")
    norms = {
        f"{BLOCK}.{i}.casa_attn.image_norm.weight": tensors[f"{BLOCK}.{i}.input_layernorm.weight"] for i in range(3)
    }
    assert_same(load_weights(tmp_path / "normed"), tensors | norms)
    loaded = CasaForConditionalGeneration.from_pretrained(folder, casa_image_norm="input").state_dict()
    assert all(torch.equal(loaded[name], norm) for name, norm in norms.items())
    assert_refused(tmp_path / "normed", tmp_path / "casa", "image_norm", "lost", casa_image_norm="none")


def test_shared_projections_can_be_replaced(trained, tmp_path):
    """Self-attention goes on as the fusion layer, so nothing is lost."""
    folder, tensors = trained("ca-shared")
    convert_checkpoint(folder, tmp_path / "replace", "ca-replace")
    expected = {k: t for k, t in converted(tensors, [1]).items() if not k.startswith(f"{BLOCK}.1.self_attn")}
    assert_same(load_weights(tmp_path / "replace"), expected)


@pytest.mark.parametrize(
    ("variant", "design", "target", "words"),
    [
        ("casa", {}, {"variant": "casa-shared"}, ["casa_attn", "24 tensors", "lost"]),
        ("casa", {}, {"casa_layers": [0, 1]}, [f"{BLOCK}.2.casa_attn", "lost"]),
        ("casa", {}, {"variant": "casa-replace"}, ["self_attn", "lost"]),
        ("casa-before", {}, {"variant": "casa"}, ["casa_layernorm", "3 tensors", "lost"]),
        ("casa", {"casa_gate": "tanh"}, {"variant": "casa"}, ["gate", "lost"]),
        ("casa-replace", {}, {"variant": "casa"}, [f"{BLOCK}.1.self_attn", "no longer"]),
        ("casa", {"num_gist_tokens": 2}, {"num_gist_tokens": 0}, ["num_gist_tokens=0", "the 2 gist tokens"]),
    ],
)
def test_what_would_be_lost_is_refused(trained, tmp_path, variant, design, target, words):
    folder, _ = trained(variant, **design)
    assert_refused(folder, tmp_path / "casa", *words, **target)


def test_what_was_trained_goes_back(trained, source_folder, tmp_path):
    folder, tensors = trained("casa", casa_gate="tanh", num_gist_tokens=60)
    report = convert_to_source(folder, tmp_path / "back")
    source = in_memory_layout(load_weights(source_folder))
    expected = {name: tensors[name] for name in source}
    spare = CasaProcessor.from_pretrained(folder).gist_token_ids[0]
    for name in ("lm_head.weight", "model.language_model.embed_tokens.weight"):
        expected[name] = torch.cat([tensors[name][:spare], source[name][spare:]])
    assert_same(in_memory_layout(load_weights(tmp_path / "back")), expected)
    assert load_weights(tmp_path / "back").keys() == load_weights(source_folder).keys()
    assert report.config.text_config.vocab_size == 768
    assert f"{BLOCK}.0.casa_attn.gate" in report.dropped
    assert report.left_out == [
        "rows of 2 tensors (tokens that the source doesn't have)",
        "27 tensors (fusion layers, which the source doesn't have)",
    ]
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (source_folder / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("tied", [False, True])
def test_spare_rows_that_gist_tokens_took_come_back(tmp_path, tied):
    """By way of another design too, with rows that a trainer has changed."""
    source = build_tiny_source(tmp_path / "source", tie_word_embeddings=tied)
    original = load_weights(source)
    report = convert_checkpoint(source, tmp_path / "gists", num_gist_tokens=2)
    first, second = report.config.gist_token_ids
    assert second < report.config.text_config.vocab_size - 1 == 767
    convert_checkpoint(tmp_path / "gists", tmp_path / "casa", "ca")
    tensors = load_weights(tmp_path / "casa")
    matrices = ["model.language_model.embed_tokens.weight"] + ([] if tied else ["lm_head.weight"])
    for name in matrices:
        assert not torch.equal(tensors[name][first], in_memory_layout(original)[name][first])
        tensors[name][[first, second]] += 1
    save_file(tensors, tmp_path / "casa" / "model.safetensors", metadata={"format": "pt"})
    assert load_file(tmp_path / "casa" / "source_rows.safetensors").keys() == set(matrices)

    report = convert_to_source(tmp_path / "casa", tmp_path / "back")
    assert_same(load_weights(tmp_path / "back"), original)
    assert f"{matrices[-1]}, rows {first}, {second}" in report.dropped
    assert not list((tmp_path / "back").glob("source_*"))
    convert_to_source(tmp_path / "casa", tmp_path / "half", dtype="bfloat16")
    assert_same(load_weights(tmp_path / "half"), {name: tensor.bfloat16() for name, tensor in original.items()})

    (tmp_path / "casa" / "source_rows.safetensors").unlink()
    with pytest.raises(ValueError, match=r"not the source's values of these rows \(source_rows.safetensors\)"):
        convert_to_source(tmp_path / "casa", tmp_path / "other")


def test_no_rows_are_kept_where_none_are_taken(casa_folder, tmp_path):
    assert not (casa_folder / "source_rows.safetensors").exists()
    helium = build_tiny_helium(tmp_path / "helium")
    convert_checkpoint(helium, tmp_path / "casa", vision_from=build_tiny_source(tmp_path / "vision"))
    assert not (tmp_path / "casa" / "source_rows.safetensors").exists()


def test_what_has_no_way_back(trained, source_folder, tmp_path):
    folder, _ = trained("casa-replace")
    with pytest.raises(ValueError, match="casa_placement='replace'") as error:
        convert_to_source(folder, tmp_path / "back")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"is not a CASA checkpoint\. Convert it first"):
        convert_to_source(source_folder, tmp_path / "back")
    with pytest.raises(CheckpointError, match="max_shard_size='0GB' is not a size"):
        plan_to_source(folder, max_shard_size="0GB")
    with pytest.raises(ValueError, match="would replace the source"):
        convert_to_source(folder, folder, overwrite=True)
    assert not (tmp_path / "back").exists()


def test_a_checkpoint_cant_name_files_elsewhere(source_folder, tmp_path):
    convert_checkpoint(source_folder, tmp_path / "casa")
    file = tmp_path / "casa" / "processor_config.json"
    content = json.loads(file.read_text())
    content["source_config"]["../../elsewhere.json"] = {}
    file.write_text(json.dumps(content))
    convert_to_source(tmp_path / "casa", tmp_path / "back")
    assert (tmp_path / "back" / "preprocessor_config.json").is_file()
    assert not list(tmp_path.rglob("elsewhere.json"))


def test_no_way_back_without_the_sources_tokenizer(trained, tmp_path):
    """As where a trainer has saved model and processor into a folder of its own."""
    folder, _ = trained("casa", num_gist_tokens=2)
    for file in folder.glob("source_*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"not the source's tokenizer \(source_\*\)"):
        convert_to_source(folder, tmp_path / "back")
