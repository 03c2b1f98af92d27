# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""One product for queries, keys and values gives what separate ones give, and stays true to its parameters."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_model
from torch import nn
from transformers import DynamicCache

from casa_hf import CasaForConditionalGeneration
from tests.helpers_generation import Image, batch, new_model, relative_error, words
from tests.tiny import FAMILIES, random_tensor

ROWS: list[Any] = [[*words(3, 1), Image(2, 3, 1), *words(4, 2)], [Image(1, 2, 2), *words(2, 3)]]
VARIANTS = ("casa", "ca", "casa-shared", "ca-shared", "exact", "casa-before", "casa-replace", "insertion")


def family_model(family: str, variant: str, **fields: Any) -> Any:
    config = FAMILIES[family].casa_config(variant, source_config=None, **fields)
    model = CasaForConditionalGeneration._from_config(
        config, attn_implementation="sdpa", experts_implementation="eager"
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(random_tensor(name, tuple(parameter.shape)))
    return model.double().eval()


@torch.no_grad()
def answers(model: Any, rows: list[Any] = ROWS) -> torch.Tensor:
    """Logits of a prompt and of two steps."""
    cache = DynamicCache()
    logits = [model(**batch(*rows), cache=cache).logits.flatten(0, 1)]
    for token in (7, 8):
        logits.append(model(input_ids=torch.full((len(rows), 1), token), cache=cache).logits[:, 0])
    return torch.cat(logits)


def num_fused(model: Any) -> int:
    return sum(block.fused is not None for block in model.model.language_model.layers)


def num_products(model: Any) -> int:
    """How often a step multiplies by the weight of a query, key or value projection of its own."""
    cache, calls = DynamicCache(), []
    with torch.no_grad():
        model(**batch(*ROWS), cache=cache)
        for name, module in model.named_modules():
            if name.rsplit(".", 1)[-1] in ("q_proj", "k_proj", "v_proj") and ".layers." in name:
                module._call_impl = lambda *args, run=module._call_impl: (calls.append(1), run(*args))[1]
        model(input_ids=torch.full((2, 1), 7), cache=cache)
        for module in model.modules():
            vars(module).pop("_call_impl", None)
    return len(calls)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant(variant: str) -> None:
    model = new_model(variant)
    expected = answers(model)
    assert num_products(model) > 0
    blocks = len(model.model.language_model.layers)
    assert model.fuse_projections() == num_fused(model) == blocks
    assert num_products(model) == 0
    assert relative_error(answers(model), expected) < 1e-12
    model.unfuse_projections()
    assert num_fused(model) == 0 and num_products(model) > 0
    assert torch.equal(answers(model), expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", ["casa", pytest.param("casa-shared", marks=pytest.mark.slow)])
def test_every_family(family: str, variant: str) -> None:
    """Norms of heads, gates, rotated neighbours, channels without positions, blocks without positions."""
    model = family_model(family, variant)
    row = [[*words(3, 1), *words(4, 2)]] if FAMILIES[family].text_only else ROWS
    expected = answers(model, row)
    assert model.fuse_projections() > 0
    assert relative_error(answers(model, row), expected) < 1e-12
    assert num_fused(model) > 0


def test_parameters_are_views_of_one_buffer_under_their_own_names(tmp_path: Path) -> None:
    model = new_model("casa")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    objects = dict(model.named_parameters())
    model.save_pretrained(tmp_path / "before")
    model.fuse_projections()
    assert all(parameter is objects[name] for name, parameter in model.named_parameters())
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    block = model.model.language_model.layers[0]
    owners = (block.self_attn, block.casa_attn)
    linears = [getattr(owner, f"{name}_proj") for owner in owners for name in "qkv"]
    for kind in ("weight", "bias"):
        storages = {getattr(linear, kind).untyped_storage().data_ptr() for linear in linears}
        assert len(storages) == 1
        bytes_there = getattr(linears[0], kind).untyped_storage().nbytes()
        assert bytes_there == sum(getattr(linear, kind).nbytes for linear in linears)
    model.save_pretrained(tmp_path / "after")
    files = [sorted((tmp_path / name).glob("*.safetensors")) for name in ("before", "after")]
    for one, other in zip(*files, strict=True):
        assert one.read_bytes() == other.read_bytes()
        assert load_file(one).keys() == load_file(other).keys()


def test_writing_into_a_parameter_is_seen() -> None:
    """By `load_state_dict`, and by an optimizer."""
    model, other = new_model("casa"), new_model("casa", seed=1)
    model.fuse_projections()
    model.load_state_dict(other.state_dict())
    assert num_fused(model) == 3
    assert relative_error(answers(model), answers(other)) < 1e-12
    with torch.no_grad():
        for changed in (model, other):
            changed.model.language_model.layers[1].casa_attn.v_proj.weight.mul_(2)
    assert relative_error(answers(model), answers(other)) < 1e-12
    assert num_products(model) == 0


def test_gradients_take_the_separate_products() -> None:
    model, other = new_model("casa"), new_model("casa")
    model.fuse_projections()
    for trained in (model, other):
        trained.train()
        trained(**batch(*ROWS)).logits.logsumexp(-1).sum().backward()
    for (name, parameter), (_, expected) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        if expected.grad is not None:
            assert torch.equal(parameter.grad, expected.grad), name
    assert answers(model.eval()).requires_grad is False and num_products(model) == 0


def test_moving_fuses_again() -> None:
    model = new_model("casa")
    model.fuse_projections()
    address = model.model.language_model.layers[0].fused.weight.data_ptr()
    assert model.to("cpu").model.language_model.layers[0].fused.weight.data_ptr() == address  # nothing has moved
    model.float().double()
    plain = new_model("casa").float().double()
    assert num_fused(model) == 3 and num_products(model) == 0
    assert relative_error(answers(model), answers(plain)) < 1e-12
    assert num_fused(model.to("meta")) == 0


def pickled(model: Any) -> Any:
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    return torch.load(stored, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_copies_have_parameters_of_their_own(copied: Callable[[Any], Any]) -> None:
    model = new_model("casa")
    expected = answers(model)
    model.fuse_projections()
    other = copied(model)
    weight = other.model.language_model.layers[0].self_attn.q_proj.weight
    assert weight.untyped_storage().nbytes() == weight.nbytes
    with torch.no_grad():
        model.model.language_model.layers[0].self_attn.k_proj.weight.zero_()
    assert num_fused(other) == 0 and torch.equal(answers(other), expected)
    other.fuse_projections()
    assert num_fused(other) == 3 and relative_error(answers(other), expected) < 1e-12


class Doubled(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return 2 * self.inner(states)


def wrap(attention: Any) -> None:
    attention.q_proj = Doubled(attention.q_proj)


def assign_parameter(attention: Any) -> None:
    attention.k_proj.weight = nn.Parameter(2 * attention.k_proj.weight.detach())


def assign_data(attention: Any) -> None:
    attention.v_proj.bias.data = 2 * attention.v_proj.bias.data


def assign_state(attention: Any) -> None:
    attention.load_state_dict({name: 2 * tensor for name, tensor in attention.state_dict().items()}, assign=True)


def hook(attention: Any) -> None:
    attention.q_proj.register_forward_hook(lambda module, args, output: 2 * output)


def pre_hook(attention: Any) -> None:
    attention.v_proj.register_forward_pre_hook(lambda module, args: (2 * args[0],))


def replace_forward(attention: Any) -> None:
    run = attention.k_proj.forward
    attention.k_proj.forward = lambda states: 2 * run(states)


@pytest.mark.parametrize("of", ["self_attn", "casa_attn"])
@pytest.mark.parametrize(
    "change", [wrap, assign_parameter, assign_data, assign_state, hook, pre_hook, replace_forward]
)
def test_what_takes_the_place_of_a_projection_is_noticed(change: Callable[[Any], None], of: str) -> None:
    model, plain = new_model("casa"), new_model("casa")
    unchanged = answers(plain)
    model.fuse_projections()
    for changed in (model, plain):
        change(getattr(changed.model.language_model.layers[1], of))
    expected = answers(plain)
    assert relative_error(expected, unchanged) > 1e-3
    assert relative_error(answers(model), expected) < 1e-12
    assert num_fused(model) == 2
    # Values that have only been exchanged can be fused again; what does more than multiply can't.
    again = change in (assign_parameter, assign_data, assign_state)
    assert model.fuse_projections() == (3 if again else 2)
    assert relative_error(answers(model), expected) < 1e-12


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters() -> None:
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(target_modules=r".*layers\.1\.casa_attn\.q_proj", init_lora_weights=False, r=2)
    torch.manual_seed(0)
    model = new_model("casa")
    model.fuse_projections()
    adapted = peft.get_peft_model(model, settings).double().eval()
    fused = answers(adapted)
    assert num_fused(model) == 2
    model.unfuse_projections()
    assert relative_error(fused, answers(adapted)) < 1e-12
    assert adapted.fuse_projections() == 2
    merged = adapted.merge_and_unload()
    assert merged.fuse_projections() == 3
    assert relative_error(answers(merged), fused) < 1e-9


def test_autocast_takes_the_separate_products() -> None:
    model = new_model("casa", dtype=torch.float32)
    inputs = batch(*ROWS)
    inputs["pixel_values"] = inputs["pixel_values"].float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(**inputs).logits
        model.fuse_projections()
        assert torch.equal(model(**inputs).logits, expected)


def test_fusing_in_inference_mode_leaves_a_model_that_can_be_trained() -> None:
    model = new_model("casa")
    with torch.inference_mode():
        model.fuse_projections()
        model.unfuse_projections()
        model.fuse_projections()
    model.train()(**batch(*ROWS)).logits.sum().backward()
    assert model.model.language_model.layers[0].self_attn.q_proj.weight.grad is not None


@pytest.mark.parametrize("save", ["accelerate", "safetensors"])
def test_what_saves_states_finds_all_parameters(tmp_path: Path, save: str) -> None:
    """Accelerate drops tensors of which several are parts of one buffer, and safetensors refuses them."""
    model = new_model("casa")
    model.fuse_projections()
    expected = answers(model)
    if save == "accelerate":
        accelerate = pytest.importorskip("accelerate")
        accelerate.Accelerator(cpu=True).save_model(model, tmp_path)
    else:
        save_model(model, str(tmp_path / "model.safetensors"))
    saved = {name: tensor for file in tmp_path.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert saved.keys() == dict(model.named_parameters()).keys()
    other = new_model("casa", seed=1)
    other.load_state_dict(saved)
    assert relative_error(answers(other), expected) < 1e-12
    assert model.fuse_projections() == 3


def test_what_is_given_up_leaves_no_views() -> None:
    model = new_model("casa")
    model.fuse_projections()
    attention = model.model.language_model.layers[1].self_attn
    wrap(attention)
    answers(model)
    for weight in (attention.q_proj.inner.weight, attention.k_proj.weight):
        assert weight.untyped_storage().nbytes() == weight.nbytes


def test_shared_memory_stays_shared() -> None:
    model = new_model("casa")
    model.fuse_projections()
    expected = answers(model)
    model.share_memory()
    assert all(parameter.is_shared() for parameter in model.parameters())
    assert model.fuse_projections() == 0
    assert relative_error(answers(model), expected) < 1e-12


def test_a_compiled_block_can_be_stored() -> None:
    model = new_model("casa")
    expected = answers(model)
    model.model.language_model.layers[0].compile()
    assert torch.equal(answers(pickled(model)), expected)


def test_a_model_without_numbers_runs() -> None:
    """On the meta device, as tools that count operations and memory run models; torch knows no autocast there."""
    model, inputs = new_model("casa"), batch(*ROWS)
    model.fuse_projections()
    expected = answers(model).shape
    model.to("meta")
    with torch.no_grad():
        logits = model(**inputs | {"pixel_values": inputs["pixel_values"].to("meta")}).logits
    assert logits.is_meta and logits.shape[-1] == expected[-1]
