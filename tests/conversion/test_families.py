# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The files of every family, there and back; the text-only one with a vision tower."""

from __future__ import annotations

import json

import pytest
import torch
from huggingface_hub import metadata_load
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from casa_hf import CasaForConditionalGeneration, CasaProcessor
from casa_hf.conversion import convert_checkpoint, convert_to_source, inspect_checkpoint, plan_conversion
from casa_hf.hub.publishable import check_checkpoint
from examples.tiny_source import FAMILIES, build_tiny_helium, build_tiny_source
from tests.conversion.helpers import (
    altered,
    assert_refused,
    assert_same,
    converted,
    in_memory_layout,
    load_weights,
    older_layout,
)

LAYERS = [0, 1, 2]
LAYERS_OF = {"qwen3_5": [1], "qwen3_5_moe": [1]}  # the blocks of full attention, where not all are
MATRICES = ("model.language_model.embed_tokens.weight", "lm_head.weight")
PROJECTOR = "model.multi_modal_projector."


@pytest.mark.parametrize("family", FAMILIES)
def test_all_files_there_and_back(tmp_path, family):
    """With the files of a downloaded checkpoint; tests/test_conformance.py has the tensors in every layout."""
    source = build_tiny_source(tmp_path / "source", family=family)
    tensors = load_weights(source)
    convert_checkpoint(source, tmp_path / "casa")
    assert inspect_checkpoint(tmp_path / "casa").source_parameters == sum(t.numel() for t in tensors.values())

    report = convert_to_source(tmp_path / "casa", tmp_path / "back")
    added = converted(tensors, LAYERS_OF.get(family, LAYERS)).keys() - in_memory_layout(tensors).keys()
    assert report.dropped.keys() == added
    assert {file.name for file in (tmp_path / "back").iterdir()} == {
        "README.md",
        *(file.name for file in source.iterdir()),
    }
    for file in source.glob("*.json"):
        if file.name != "config.json":
            assert json.loads((tmp_path / "back" / file.name).read_text()) == json.loads(file.read_text()), file.name


def test_heads_that_predict_further_tokens_are_dropped_by_name(tmp_path, caplog):
    """Published Qwen3.5 checkpoints have them; the stock class doesn't read them either."""
    further = {"mtp.fc.weight": torch.ones(2, 2), "mtp.layers.0.self_attn.q_proj.weight": torch.ones(2, 2)}
    plain = build_tiny_source(tmp_path / "plain", family="qwen3_5")
    source = altered(plain, tmp_path / "source", weights=lambda tensors: tensors | further)
    report = convert_checkpoint(source, tmp_path / "casa")
    assert report.dropped.keys() == further.keys()
    convert_to_source(tmp_path / "casa", tmp_path / "back")
    assert_same(load_weights(tmp_path / "back"), load_weights(plain))
    loaded, info = CasaForConditionalGeneration.from_pretrained(source, output_loading_info=True)
    assert not info["unexpected_keys"] and not any("mtp" in record.getMessage() for record in caplog.records)
    assert_same(loaded.state_dict(), CasaForConditionalGeneration.from_pretrained(tmp_path / "casa").state_dict())

    other = altered(
        build_tiny_source(tmp_path / "other", family="qwen3_vl"),
        tmp_path / "strange",
        weights=lambda tensors: tensors | further,
    )
    assert_refused(other, tmp_path / "refused", "2 tensors that Qwen3-VL doesn't: mtp.fc.weight")


# -------------------------------------------------------------------- Helium


@pytest.fixture(scope="module")
def helium(tmp_path_factory):
    return build_tiny_helium(tmp_path_factory.mktemp("helium") / "text")


def expected_helium(text, vision, new_tokens):
    """Tensors of Helium and a tower with rows for further tokens."""
    expected = converted(load_weights(text), LAYERS)
    for name in MATRICES:
        rows, width = expected[name].shape
        assert new_tokens == [*range(rows, rows + len(new_tokens))]
        mean = expected[name].mean(0, dtype=torch.float64).float()
        expected[name] = torch.cat([expected[name], mean.expand(len(new_tokens), width)])
    tower = in_memory_layout(load_weights(vision))
    return expected | {name: tensor for name, tensor in tower.items() if name.startswith("model.visual.")}


@pytest.mark.parametrize("layout", [older_layout, in_memory_layout])
def test_helium_with_a_tower_of_its_width(helium, source_folder, tmp_path, layout):
    vision = altered(source_folder, tmp_path / "vision", weights=layout)
    report = convert_checkpoint(helium, tmp_path / "casa", vision_from=vision)
    config = report.config
    start = len(AutoTokenizer.from_pretrained(helium))
    assert config.new_tokens == {"<|vision_start|>": start, "<|vision_end|>": start + 1}
    assert [config.vision_start_token_id, config.vision_end_token_id] == [*config.new_token_ids]
    assert config.image_token_id == config.vision_end_token_id
    assert_same(load_weights(tmp_path / "casa"), expected_helium(helium, vision, [*config.new_token_ids]))
    assert report.initialised.keys() == set(MATRICES)
    assert (
        report.added_parameters == sum(load_weights(tmp_path / "casa")[name].numel() for name in report.added) + 4 * 64
    )


def test_helium_with_a_tower_of_another_width(helium, tmp_path):
    vision = build_tiny_source(tmp_path / "vision", hidden_size=32)
    for name in ("first", "second"):
        report = convert_checkpoint(helium, tmp_path / name, "ca-shared", vision_from=vision)
    tensors = load_weights(tmp_path / "first")
    assert_same(load_weights(tmp_path / "second"), tensors)
    weight, bias = tensors.pop(f"{PROJECTOR}weight"), tensors.pop(f"{PROJECTOR}bias")
    assert weight.shape == (64, 32) and not bias.any() and bias.shape == (64,)
    assert abs(weight.std() / 0.02 - 1) < 0.1 and abs(weight.mean()) < 0.002
    expected = expected_helium(helium, vision, [*report.config.new_token_ids])
    assert_same(tensors, {name: tensor for name, tensor in expected.items() if ".casa_attn." not in name})
    assert report.initialised.keys() == {*MATRICES, f"{PROJECTOR}weight", f"{PROJECTOR}bias"}
    assert report.added_parameters == 4 * 64 + 64 * 32 + 64
    summary = inspect_checkpoint(tmp_path / "first")
    assert (summary.backbone, summary.added_parameters) == ("Helium", report.added_parameters)

    model, info = CasaForConditionalGeneration.from_pretrained(tmp_path / "first", output_loading_info=True)
    assert not any(info.values()), info
    stock = AutoModelForCausalLM.from_pretrained(helium)
    ids = torch.arange(5, 40)[None]
    assert torch.equal(model(ids).logits[..., :-2], stock(ids).logits)
    processor = CasaProcessor.from_pretrained(tmp_path / "first")
    inputs = processor(
        text=f"A {processor.image_placeholder} B", images=Image.new("RGB", (56, 56)), return_tensors="pt"
    )
    assert model(**inputs).logits.isfinite().all()


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "qwen2_5_vl"])
def test_helium_gets_any_tower(helium, family, tmp_path):
    vision = build_tiny_source(tmp_path / "vision", family=family, vision_depth=3)
    report = convert_checkpoint(helium, tmp_path / "casa", vision_from=vision)
    deepstack = {name for name in load_weights(vision) if "deepstack" in name}
    assert report.dropped.keys() == deepstack and bool(deepstack) == family.startswith("qwen3_vl")
    plan = plan_conversion(helium, vision_from=vision)
    assert plan.left_out == report.left_out and len(plan.left_out) == bool(deepstack)
    for kind in plan.left_out:
        assert kind.startswith("12 tensors (deepstack features")
        assert f"Left out: {kind}." in (tmp_path / "casa" / "README.md").read_text()
    model, info = CasaForConditionalGeneration.from_pretrained(tmp_path / "casa", output_loading_info=True)
    assert not any(info.values()), info
    assert model.config.tower.model_type == f"{family}_vision" and model.config.num_deepstack == 0
    assert not any("deepstack" in name for name, _ in model.named_parameters())
    processor = CasaProcessor.from_pretrained(tmp_path / "casa")
    inputs = processor(
        text=f"A {processor.image_placeholder} B", images=Image.new("RGB", (64, 64), "red"), return_tensors="pt"
    )
    others = processor(
        text=f"A {processor.image_placeholder} B", images=Image.new("RGB", (64, 64), "blue"), return_tensors="pt"
    )
    assert not torch.equal(model(**inputs).logits[:, -1], model(**others).logits[:, -1])


def test_helium_goes_back_without_its_tower(helium, source_folder, tmp_path):
    convert_checkpoint(helium, tmp_path / "casa", vision_from=source_folder, casa_gate="tanh", num_gist_tokens=3)
    report = convert_to_source(tmp_path / "casa", tmp_path / "back")
    assert_same(load_weights(tmp_path / "back"), load_weights(helium))
    assert any("visual" in name for name in report.dropped) and any("rows" in name for name in report.dropped)
    kinds = " ".join(report.left_out)
    assert len(report.left_out) == 3 and all(kind in kinds for kind in ("fusion layers", "vision tower", "rows of"))
    stock, info = AutoModelForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info.values()), info
    for file in helium.iterdir():
        if file.suffix == ".json" and file.name != "config.json":
            assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes()
    assert stock.config.to_dict() == AutoModelForCausalLM.from_pretrained(helium).config.to_dict() | {
        "_name_or_path": stock.config._name_or_path
    }


def test_a_conversion_of_an_earlier_version_goes_back(helium, tmp_path):
    """One with `<|image|>` and gist tokens, whose configuration doesn't name its new tokens, and with deepstack
    features in its files."""
    vision = build_tiny_source(tmp_path / "vision", family="qwen3_vl", vision_depth=3)
    options = {"vision_from": vision, "image_delimiters": "<|image|>", "num_gist_tokens": 2}
    casa = convert_checkpoint(helium, tmp_path / "casa", **options).output
    rows = len(AutoTokenizer.from_pretrained(helium))
    content = json.loads((casa / "config.json").read_text())
    assert content.pop("new_tokens") == {"<|gist_0|>": rows + 1, "<|gist_1|>": rows + 2, "<|image|>": rows}
    content["vision_config"]["deepstack_visual_indexes"] = [0, 1]
    (casa / "config.json").write_text(json.dumps(content))
    weights = {name: tensor for name, tensor in in_memory_layout(load_weights(vision)).items() if "deepstack" in name}
    save_file({**load_weights(casa), **weights}, casa / "model.safetensors", metadata={"format": "pt"})

    model, info = CasaForConditionalGeneration.from_pretrained(casa, output_loading_info=True)
    assert not any(info.values()), info
    assert model.config.new_token_ids == (rows, rows + 1, rows + 2)
    processor = CasaProcessor.from_pretrained(casa)
    inputs = processor(text="A <|image|> B", images=Image.new("RGB", (64, 64)), return_tensors="pt")
    assert model(**inputs).logits.isfinite().all()
    convert_to_source(casa, tmp_path / "back")
    assert_same(load_weights(tmp_path / "back"), load_weights(helium))


def test_all_chat_templates_there_and_back(helium, source_folder, tmp_path):
    """Each takes images; a redesign takes over all, and the way back leads to the source's own files."""
    text = altered(helium, tmp_path / "text")
    tokenizer = AutoTokenizer.from_pretrained(text)
    tokenizer.chat_template = {"default": "{{ messages[0].content }}", "other": "({{ messages[0].content }})"}
    tokenizer.save_pretrained(text)
    names = {"chat_template.jinja", "additional_chat_templates/other.jinja"}
    assert all((text / name).is_file() for name in names)
    convert_checkpoint(text, tmp_path / "casa", vision_from=source_folder)
    convert_checkpoint(tmp_path / "casa", tmp_path / "ca", "ca")
    for folder in (tmp_path / "casa", tmp_path / "ca"):
        processor = CasaProcessor.from_pretrained(folder)
        shown = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]
        told = processor.apply_chat_template(shown, chat_template=processor.chat_template["other"])
        assert told == f"({processor.image_placeholder}?)"
        assert check_checkpoint(folder).files.keys() >= names | {f"source_{name}" for name in names}
    convert_to_source(tmp_path / "ca", tmp_path / "back")
    for file in text.rglob("*"):
        if file.is_file() and file.name not in ("config.json", "model.safetensors"):
            assert (tmp_path / "back" / file.relative_to(text)).read_bytes() == file.read_bytes(), file


def test_card_names_both_sources(helium, source_folder, tmp_path):
    text, vision = altered(helium, tmp_path / "words"), altered(source_folder, tmp_path / "eyes")
    (text / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    (vision / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (vision / "LICENSE").write_text("Look here.\n")
    output = convert_checkpoint(text, tmp_path / "casa", vision_from=vision).output
    card = (output / "README.md").read_text()
    assert metadata_load(output / "README.md")["license"] == "other"
    assert "`words`: cc-by-4.0" in card and "`eyes`: apache-2.0" in card
    assert "vision tower of `eyes`" in card and "`<|vision_start|>`, `<|vision_end|>`" in card
    assert (output / "LICENSE-vision").read_text() == "Look here.\n"


def test_towers_that_dont_fit(helium, source_folder, casa_folder, tmp_path):
    assert_refused(helium, tmp_path / "casa", "text-only", "vision_from")
    assert_refused(source_folder, tmp_path / "casa", "is for text-only sources", vision_from=source_folder)
    for vision in (helium, casa_folder):
        assert_refused(helium, tmp_path / "casa", "qwen2_5_vl_vision", "qwen3_vl_vision", vision_from=vision)
    assert_refused(helium, tmp_path / "casa", "is not a folder", vision_from=tmp_path / "nowhere")
