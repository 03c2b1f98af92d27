# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""PEFT adapters, TRL's SFTTrainer and torchao's 8-bit weights."""

from __future__ import annotations

import re

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import TrainingArguments

from casa_hf import CasaForConditionalGeneration, convert_checkpoint
from casa_hf.training import (
    LORA_TARGETS,
    CasaDataCollator,
    CasaTrainer,
    checkpoint_activations,
    freeze,
    parameter_groups,
    trainable_parts,
)
from examples.tiny_source import build_tiny_source
from tests.helpers_generation import relative_error
from tests.tiny import FAMILIES
from tests.training.helpers import CONVERSATIONS, load_model, load_processor, loss_and_gradients

# PEFT and TRL still use the name that Transformers has replaced.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing` is deprecated:FutureWarning")


def lora(model, targets, **options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=LORA_TARGETS[targets], init_lora_weights=False, **options)
    return peft.get_peft_model(model, config)


def adapted(model):
    return {name.split(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("targets", "projections"),
    [
        ("fusion", r"\.casa_attn\.[qkvo]_proj$"),
        ("self-attention", r"language_model\.layers\.\d\.self_attn\.[qkvo]_proj$"),
        ("language-model", r"language_model\.layers\.\d\.(self_attn\.[qkvo]|mlp\.(gate|up|down))_proj$"),
    ],
)
def test_targets_catch_what_they_name(casa_folder, targets, projections):
    model = load_model(casa_folder)
    expected = {name for name, _ in model.named_modules() if re.search(projections, name)}
    assert len(expected) == 3 * (7 if targets == "language-model" else 4)
    assert {name.removeprefix("base_model.model.") for name in adapted(lora(model, targets))} == expected
    assert [group["name"] for group in parameter_groups(model)] == ["new, decayed"]


def test_targets_reach_linear_attention():
    config = FAMILIES["qwen3_5_text"].casa_config()
    with torch.device("meta"):
        names = [name for name, _ in CasaForConditionalGeneration(config).named_modules()]
    target = re.compile(LORA_TARGETS["language-model"])
    found = {name.split("layers.")[1] for name in names if target.fullmatch(name) and "linear_attn" in name}
    parts = ("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj")
    assert found == {f"{block}.linear_attn.{part}" for block in (0, 2) for part in parts}


def test_an_adapter_is_trained_saved_loaded_and_merged(casa_folder, processor, tmp_path):
    peft = pytest.importorskip("peft")
    model = lora(load_model(casa_folder, torch.float32), "fusion")
    checkpoint_activations(model)
    trainer = CasaTrainer(
        model=model,
        args=TrainingArguments(
            str(tmp_path / "run"), max_steps=2, report_to="none", disable_tqdm=True, use_cpu=True, save_strategy="no"
        ),
        train_dataset=CONVERSATIONS,
        processing_class=processor,
        lr_new=1e-2,
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    batch = CasaDataCollator(processor)(CONVERSATIONS)
    with torch.no_grad():
        expected = model.eval()(**batch).logits
        with model.disable_adapter():
            untouched = model(**batch).logits
    assert torch.equal(untouched, load_model(casa_folder, torch.float32).eval()(**batch).logits)
    assert not torch.allclose(untouched, expected, atol=1e-2)

    loaded = peft.PeftModel.from_pretrained(load_model(casa_folder, torch.float32), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, expected)
    loaded.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = CasaForConditionalGeneration.from_pretrained(tmp_path / "merged")
    assert not any("lora" in name for name, _ in merged.named_parameters())
    with torch.no_grad():
        assert relative_error(merged(**batch).logits, expected) < 1e-4


# ---------------------------------------------------------------- TRL


def test_gist_tokens_of_peft_learn_at_the_rate_of_new_parameters(tmp_path):
    source = build_tiny_source(tmp_path / "source", tie_word_embeddings=True)
    folder = convert_checkpoint(source, tmp_path / "casa", num_gist_tokens=3).output
    model, gists = load_model(folder, torch.float32), load_processor(folder).gist_token_ids
    matrix = model.get_input_embeddings().weight
    before, size = {part.name: part.parameters for part in trainable_parts(model)}, matrix.shape[1]
    model = lora(model, "fusion", trainable_token_indices={"embed_tokens": list(gists)})
    groups = {id(p): group["lr"] for group in parameter_groups(model, 3e-4, 2e-5) for p in group["params"]}
    rows = [p for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name]
    assert [(p.shape, groups[id(p)]) for p in rows] == [((3, size), 3e-4)]
    assert set(groups.values()) == {3e-4}
    parts = {part.name: part for part in trainable_parts(model)}
    assert parts["adapters"].trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (parts["embeddings"].parameters, parts["embeddings"].trainable) == (before["embeddings"], 0)


def table():
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([CONVERSATIONS[0], CONVERSATIONS[2]])
    return rows.cast_column("images", datasets.List(datasets.Image()))


def sft_trainer(model, processor, folder, **options):
    trl = pytest.importorskip("trl")
    config = {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "max_length": None,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
    }
    extra = {name: options.pop(name) for name in ("data_collator", "peft_config") if name in options}
    return trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**{**config, **options}),
        train_dataset=table(),
        processing_class=processor,
        **extra,
    )


def template_of_answers():
    """The template of Qwen2.5-VL with tags around answers, as TRL has it."""
    return pytest.importorskip("trl.chat_template_utils").qwen2_5_vl_training_chat_template


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.18"), reason="TRL's assistant-only loss needs Transformers 5.18"
)
def test_trl_and_the_collator_find_the_same_answers(casa_folder, tmp_path):
    processor = load_processor(casa_folder)
    processor.chat_template = template_of_answers()
    model = load_model(casa_folder, torch.float32)
    freeze(model, "paper-qwen")
    trainer = sft_trainer(model, processor, tmp_path, assistant_only_loss=True)
    rows = [CONVERSATIONS[0], CONVERSATIONS[2]]
    theirs = trainer.data_collator([dict(row) for row in table()])
    ours = CasaDataCollator(load_processor(casa_folder))(rows)
    newline = processor.tokenizer("\n")["input_ids"][0]
    assert torch.equal(theirs["input_ids"], ours["input_ids"])
    assert torch.equal(theirs["pixel_values"], ours["pixel_values"])
    # TRL trains on the line break after an answer too, which nobody generates.
    assert torch.equal(theirs["labels"].masked_fill(theirs["labels"] == newline, -100), ours["labels"])
    before = model.model.language_model.layers[0].casa_attn.q_proj.weight.detach().clone()
    trainer.train()
    assert not torch.equal(model.model.language_model.layers[0].casa_attn.q_proj.weight, before)


def test_trl_with_its_own_labels_and_with_the_collator_and_adapters(casa_folder, tmp_path):
    peft = pytest.importorskip("peft")
    processor = load_processor(casa_folder)
    plain = sft_trainer(load_model(casa_folder, torch.float32), processor, tmp_path / "plain")
    batch = plain.data_collator([dict(row) for row in table()])
    ours = CasaDataCollator(processor)([CONVERSATIONS[0], CONVERSATIONS[2]])
    assert all(torch.equal(batch[name], ours[name]) for name in ("input_ids", "attention_mask", "pixel_values"))
    # TRL's are on every token, those of prompts too; both have the answers.
    expected = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    assert torch.equal(batch["labels"], expected) and not torch.equal(batch["labels"], ours["labels"])
    assert torch.equal(batch["labels"].where(ours["labels"] != -100, -100), ours["labels"])
    plain.train()
    assert plain.state.log_history[-1]["train_loss"] > 0
    trainer = sft_trainer(
        load_model(casa_folder, torch.float32),
        processor,
        tmp_path / "adapters",
        data_collator=CasaDataCollator(processor),
        peft_config=peft.LoraConfig(r=2, target_modules=LORA_TARGETS["fusion"]),
        learning_rate=1e-2,
    )
    trainer.train()
    changed = {
        name for name, p in trainer.model.named_parameters() if p.requires_grad and ".lora_B" in name and p.any()
    }
    assert len(changed) == 12


# ---------------------------------------------------------------- 8-bit weights


def test_eight_bit_weights_with_adapters(casa_folder, processor, tmp_path):
    torchao = pytest.importorskip("torchao.quantization")
    model = load_model(casa_folder, torch.float32)
    model.save_pretrained(tmp_path)
    quantization = transformers.TorchAoConfig(torchao.Int8WeightOnlyConfig())
    quantized = CasaForConditionalGeneration.from_pretrained(
        tmp_path, dtype=torch.float32, quantization_config=quantization
    )
    plain = {name for name, p in quantized.named_parameters() if type(p.data) is torch.Tensor}
    eight_bit = {name for name, _ in quantized.named_parameters()} - plain
    assert {name.split(".")[1] for name in eight_bit} == {"language_model"}
    assert len(eight_bit) == 3 * (4 + 4 + 3)
    batch = CasaDataCollator(processor)(CONVERSATIONS)
    features = quantized.get_image_features(batch["pixel_values"], batch["image_grid_thw"]).pooler_output
    assert features[0].dtype == torch.float32
    with torch.no_grad():
        expected, found = model(**batch).logits, quantized(**batch).logits
    assert 0 < (found - expected).abs().mean() < 0.1 * expected.abs().mean()
    adapters = lora(quantized, "fusion")
    _, gradients = loss_and_gradients(adapters, batch)
    assert len(gradients) == 24 and all(gradient.any() for gradient in gradients.values())
