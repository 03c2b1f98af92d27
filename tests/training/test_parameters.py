# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""What trains: recipes, what is kept for the backward pass, rates, checkpointed activations."""

from __future__ import annotations

import pytest
import torch

from casa_hf import convert_checkpoint
from casa_hf.training import (
    CasaDataCollator,
    checkpoint_activations,
    freeze,
    parameter_groups,
    parts_table,
    trainable_parts,
)
from examples.tiny_source import build_tiny_helium, build_tiny_source
from tests.training.helpers import CONVERSATIONS, assert_close, load_model, loss_and_gradients


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.fixture(scope="module")
def deep_folder(tmp_path_factory):
    """With six vision blocks, so that the last four are a part of them."""
    folder = tmp_path_factory.mktemp("deep")
    return convert_checkpoint(build_tiny_source(folder / "source", vision_depth=6), folder / "casa").output


def test_recipes_train_what_they_say(deep_folder):
    model = load_model(deep_folder)
    names = {name for name, _ in model.named_parameters()}
    fusion = {name for name in names if ".casa_attn." in name}
    last_blocks = {name for name in names if any(f"visual.blocks.{index}." in name for index in (2, 3, 4, 5))}
    text = {name for name in names if "visual" not in name}
    assert len(fusion) == 3 * 8 and len(last_blocks) > 20
    freeze(model, "paper-qwen")
    assert trained(model) == fusion | last_blocks
    freeze(model, "fusion-only")
    assert trained(model) == fusion
    freeze(model, "paper-helium")
    assert trained(model) == text | last_blocks
    freeze(model, [r"layers\.0\.mlp", "lm_head"])
    assert trained(model) == {name for name in names if "language_model.layers.0.mlp" in name or "lm_head" in name}


def test_a_projector_trains_in_every_recipe(source_folder, tmp_path):
    helium = build_tiny_helium(tmp_path / "helium", hidden_size=32)
    model = load_model(convert_checkpoint(helium, tmp_path / "casa", vision_from=source_folder).output)
    for recipe in ("paper-qwen", "paper-helium", "fusion-only"):
        freeze(model, recipe)
        assert {"model.multi_modal_projector.weight", "model.multi_modal_projector.bias"} <= trained(model)


@pytest.mark.parametrize("recipe", ["fusion-only", "paper-qwen"])
def test_fusion_layers_without_parameters_cannot_be_trained_alone(converted, recipe):
    model = load_model(converted("casa-shared"))
    with pytest.raises(ValueError, match=r"self-attention.*paper-helium"):
        freeze(model, recipe)
    assert trained(model) == {name for name, _ in model.named_parameters()}
    gated = load_model(converted("casa-shared", casa_gate="tanh"))
    freeze(gated, "fusion-only")
    assert trained(gated) == {f"model.language_model.layers.{index}.casa_attn.gate" for index in range(3)}


def test_patterns_that_match_nothing_are_refused(casa_folder):
    model = load_model(casa_folder)
    with pytest.raises(ValueError, match=r"trainable='casa_atn' is neither a recipe nor .*paper-qwen.*model\.visual"):
        freeze(model, ["lm_head", "casa_atn"])
    with pytest.raises(ValueError, match=r"trainable='fuson' is .*; did you mean 'fusion-only'\?"):
        freeze(model, "fuson")
    with pytest.raises(ValueError, match=r"'\(' is not a valid regular expression: .*unterminated"):
        freeze(model, ["casa_attn", "("])
    with pytest.raises(ValueError, match=r"trainable=\[\] is empty"):
        freeze(model, [])


def test_the_table_counts_every_parameter_once(deep_folder):
    model = load_model(deep_folder)
    parts = freeze(model, "paper-qwen")
    assert parts == trainable_parts(model)
    assert sum(part.parameters for part in parts) == model.num_parameters()
    assert sum(part.trainable for part in parts) == model.num_parameters(only_trainable=True)
    by_name = {part.name: part for part in parts}
    assert by_name["fusion layers"].parameters == by_name["fusion layers"].trainable > 0
    assert 0 < by_name["vision tower, blocks"].trainable < by_name["vision tower, blocks"].parameters
    assert by_name["MLPs"].trainable == 0 and "rest" not in by_name
    assert f"{model.num_parameters(only_trainable=True):,}" in parts_table(parts).splitlines()[-1]


def test_groups_have_the_rate_and_decay_of_their_parameters(converted):
    model = load_model(converted("casa-before", casa_gate="tanh"))
    freeze(model, "paper-helium")
    groups = parameter_groups(model, lr_new=3e-4, lr_existing=2e-5, weight_decay=0.1)
    settings = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    expected = {
        "model.language_model.layers.0.casa_attn.q_proj.weight": (3e-4, 0.1),
        "model.language_model.layers.0.casa_attn.q_proj.bias": (3e-4, 0.0),
        "model.language_model.layers.0.casa_attn.gate": (3e-4, 0.0),
        "model.language_model.layers.2.casa_layernorm.weight": (3e-4, 0.0),
        "model.language_model.layers.2.self_attn.q_proj.weight": (2e-5, 0.1),
        "model.language_model.layers.1.input_layernorm.weight": (2e-5, 0.0),
        "lm_head.weight": (2e-5, 0.1),
    }
    parameters = dict(model.named_parameters())
    assert {name: settings[id(parameters[name])] for name in expected} == expected
    assert settings.keys() == {id(parameters[name]) for name in trained(model)}
    with pytest.raises(ValueError, match="freeze"):
        parameter_groups(model.requires_grad_(False))


# ---------------------------------------------------------------- what is kept for the backward pass


def saved_bytes(model, batch):
    """Bytes that the forward pass keeps for the backward pass, parameters aside."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(**batch)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_frozen_parts_keep_no_graph(deep_folder, processor):
    model = load_model(deep_folder)
    batch = CasaDataCollator(processor)(CONVERSATIONS[:1])
    tower = model.model.visual
    images = {"hidden_states": batch["pixel_values"].double(), "grid_thw": batch["image_grid_thw"]}
    freeze(model, "fusion-only")
    assert not model.get_input_embeddings()(batch["input_ids"]).requires_grad
    assert saved_bytes(tower, images) == 0
    with_tower = {}
    for blocks in ((5,), (2, 3, 4, 5), range(6)):
        freeze(model, [rf"visual\.blocks\.{index}\." for index in blocks])
        with_tower[len(blocks)] = saved_bytes(tower, images)
    assert 0 < with_tower[1] < with_tower[4] < with_tower[6]


@pytest.mark.parametrize("recipe", ["paper-qwen", "paper-helium"])
def test_checkpointed_activations_change_no_gradient(deep_folder, processor, recipe):
    model = load_model(deep_folder).train()
    freeze(model, recipe)
    batch = CasaDataCollator(processor, packing=True)(CONVERSATIONS)
    loss, expected = loss_and_gradients(model, batch)
    plain = saved_bytes(model, batch)
    checkpoint_activations(model)
    assert saved_bytes(model, batch) < 0.7 * plain
    again, gradients = loss_and_gradients(model, batch)
    assert again == loss
    assert_close(gradients, expected, 1e-12)


def test_blocks_before_the_first_trained_one_are_not_recomputed(converted, processor):
    model = load_model(converted("casa", casa_layers=[2])).train()
    freeze(model, "fusion-only")
    checkpoint_activations(model)
    calls = []
    for index, block in enumerate(model.model.language_model.layers):
        block.input_layernorm.register_forward_hook(lambda *_, index=index: calls.append(index))
    loss_and_gradients(model, CasaDataCollator(processor)(CONVERSATIONS))
    assert calls == [0, 1, 2, 2]
