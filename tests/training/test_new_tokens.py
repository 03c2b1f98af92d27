# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Rows of new tokens learn in a frozen embedding matrix, and no other row of it changes."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import Trainer, TrainingArguments

from casa_hf import CasaForConditionalGeneration, convert_checkpoint
from casa_hf.training import (
    CasaDataCollator,
    CasaTrainer,
    checkpoint_activations,
    freeze,
    parameter_groups,
    parts_table,
)
from examples.tiny_source import build_tiny_helium, build_tiny_source
from tests.conversion.helpers import load_weights
from tests.training.helpers import CONVERSATIONS, assert_close, load_model, load_processor, loss_and_gradients

EMBEDDINGS = "model.language_model.embed_tokens.weight"
ROWS = "model.language_model.embed_tokens.new_tokens.weight"
GISTS = 3


@pytest.fixture(scope="module")
def folders(source_folder, tmp_path_factory):
    """Checkpoints with new tokens: tied and untied heads, and a text-only source with a placeholder of its own."""
    folder = tmp_path_factory.mktemp("gists")
    tied = build_tiny_source(folder / "tied", tie_word_embeddings=True)
    helium = build_tiny_helium(folder / "helium")
    return {
        "untied": convert_checkpoint(source_folder, folder / "a", num_gist_tokens=GISTS).output,
        "tied": convert_checkpoint(tied, folder / "b", num_gist_tokens=GISTS).output,
        "helium": convert_checkpoint(helium, folder / "c", vision_from=source_folder, num_gist_tokens=GISTS).output,
    }


def embeddings(model):
    return model.state_dict()[EMBEDDINGS].clone()


def changed_rows(before, after):
    """Rows that aren't the same bit for bit."""
    return (before.view(torch.int32) != after.view(torch.int32)).any(-1).nonzero().flatten().tolist()


OPTIMIZERS = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=1e-2),
    # As nobody should build them: without our groups, with decay and with updates where the gradient is zero.
    "adamw, plain": lambda groups: torch.optim.AdamW([p for g in groups for p in g["params"]], 1e-2, weight_decay=0.3),
    "rprop": lambda groups: torch.optim.Rprop([p for g in groups for p in g["params"]], lr=1e-2),
    "sgd": lambda groups: torch.optim.SGD([p for g in groups for p in g["params"]], lr=1e-1, weight_decay=0.3),
}


@pytest.mark.parametrize("kind", ["untied", "tied", "helium"])
@pytest.mark.parametrize("recipe", ["paper-qwen", "fusion-only"])
def test_new_rows_learn_and_all_others_stay(folders, kind, recipe):
    model, processor = load_model(folders[kind], torch.float32), load_processor(folders[kind])
    ids = list(model.config.new_token_ids)
    assert len(ids) == GISTS + 2 * (kind == "helium")
    names, before = list(model.state_dict()), embeddings(model)
    head = model.lm_head.weight.detach().clone()
    freeze(model, recipe)
    checkpoint_activations(model.train())
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-2, 1e-2, weight_decay=0.1))
    collator = CasaDataCollator(processor)
    for _ in range(2):
        for example in (CONVERSATIONS[2], CONVERSATIONS[1]):  # accumulated; the second has no image
            model(**collator([example])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert list(model.state_dict()) == names
    assert changed_rows(before, embeddings(model)) == ids
    assert changed_rows(head, model.state_dict()["lm_head.weight"]) == (ids if kind == "tied" else [])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_no_optimizer_changes_another_row(folders, optimizer):
    model = load_model(folders["tied"], torch.float32)
    before = embeddings(model)
    freeze(model, "paper-qwen")
    step = OPTIMIZERS[optimizer](parameter_groups(model, 1e-2, 1e-2))
    batch = CasaDataCollator(load_processor(folders["tied"]))(CONVERSATIONS)
    for _ in range(3):
        model(**batch).loss.backward()
        step.step()
        step.zero_grad()
    assert changed_rows(before, embeddings(model)) == list(model.config.new_token_ids)


@pytest.mark.parametrize("kind", ["untied", "tied", "helium"])
def test_gradients_are_those_of_the_whole_matrix(folders, kind):
    model = load_model(folders[kind])
    ids = list(model.config.new_token_ids)
    batch = CasaDataCollator(load_processor(folders[kind]), packing=True)(CONVERSATIONS)
    freeze(model, ["embed_tokens", "casa_attn"])
    assert ROWS not in dict(model.named_parameters())
    expected_loss, expected = loss_and_gradients(model, batch)
    freeze(model, ["new_tokens", "casa_attn"])
    loss, found = loss_and_gradients(model, batch)
    assert loss == pytest.approx(expected_loss, rel=1e-12)
    expected[ROWS] = expected.pop(EMBEDDINGS)[ids]
    assert_close(found, expected, 1e-12)
    assert len({tuple(row) for row in found[ROWS].tolist()}) == len(ids)


def test_a_batch_without_images_gives_gradients_of_zeros(folders):
    model = load_model(folders["untied"])
    freeze(model, "paper-qwen")
    batch = CasaDataCollator(load_processor(folders["untied"]), always_image=False)(CONVERSATIONS[1:2])
    _, gradients = loss_and_gradients(model, batch)
    assert gradients[ROWS].shape == (GISTS, 64) and not gradients[ROWS].any()


@pytest.mark.parametrize("kind", ["untied", "tied"])
def test_what_is_saved_and_loaded_computes_the_same(folders, kind, tmp_path):
    """Weights after training: as they are, in a file, in a copy, in a model that was frozen first, freed again."""
    model = load_model(folders[kind], torch.float32).eval()
    freeze(model, "paper-qwen")
    batch = CasaDataCollator(load_processor(folders[kind]))(CONVERSATIONS)
    with torch.no_grad():
        untrained = model(**batch).logits
        dict(model.named_parameters())[ROWS].normal_(generator=torch.Generator().manual_seed(0))
        copied = copy.deepcopy(model)
        model.save_pretrained(tmp_path)  # before any forward pass
        expected = model(**batch).logits
        assert torch.equal(model.get_input_embeddings().weight, load_weights(tmp_path)[EMBEDDINGS])
    assert not torch.allclose(untrained, expected, atol=1e-3)
    assert load_weights(tmp_path).keys() == load_weights(folders[kind]).keys()
    loaded, info = CasaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    resumed = load_model(folders[kind], torch.float32, seed=2)
    freeze(resumed, "paper-qwen")
    resumed.load_state_dict(model.state_dict(), strict=True)
    for other in (loaded, copied, resumed):
        with torch.no_grad():
            torch.testing.assert_close(other.eval()(**batch).logits, expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():  # the copy has hooks of its own
        dict(copied.named_parameters())[ROWS].zero_()
        assert torch.equal(model(**batch).logits, expected)
        assert not torch.allclose(copied(**batch).logits, expected, atol=1e-3)
    freeze(model, "paper-helium")
    assert ROWS not in dict(model.named_parameters())
    assert model.get_input_embeddings().weight.requires_grad
    assert not model.get_input_embeddings()._forward_hooks and not model.lm_head._forward_hooks
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-5, atol=1e-5)


def test_a_model_that_was_on_the_meta_device_gets_its_rows_from_the_matrix(folders):
    """As Accelerate loads a model that it has sharded."""
    model = load_model(folders["tied"], torch.float32)
    freeze(model, "paper-qwen")
    batch = CasaDataCollator(load_processor(folders["tied"]))(CONVERSATIONS)
    buffers = dict(model.named_buffers())
    with torch.no_grad():
        dict(model.named_parameters())[ROWS].normal_(generator=torch.Generator().manual_seed(0))
        expected = model(**batch).logits
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.to("meta").tie_weights()
    assert model.state_dict().keys() == state.keys()
    model.load_state_dict(state, assign=True)
    for name, buffer in buffers.items():
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._buffers[leaf] = buffer
    model.tie_weights()
    rows = dict(model.named_parameters())[ROWS]
    assert rows.requires_grad and torch.equal(rows, state[EMBEDDINGS][list(model.config.new_token_ids)])
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, expected)


@pytest.mark.parametrize("ours", [True, False])
def test_a_resumed_run_ends_where_an_unbroken_one_does(folders, tmp_path, ours):
    processor = load_processor(folders["tied"])

    def trainer(folder, steps):
        model = load_model(folders["tied"], torch.float32)
        freeze(model, "paper-qwen")
        return (CasaTrainer if ours else Trainer)(
            model=model,
            args=TrainingArguments(
                str(folder),
                max_steps=steps,
                save_steps=2,
                weight_decay=0.1,
                learning_rate=1e-2,
                lr_scheduler_type="constant",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                remove_unused_columns=False,
            ),
            train_dataset=CONVERSATIONS,
            data_collator=CasaDataCollator(processor),
            processing_class=processor,
        )

    unbroken = trainer(tmp_path / "a", 4)
    before = embeddings(unbroken.model)
    unbroken.train()
    trainer(tmp_path / "b", 2).train()
    resumed = trainer(tmp_path / "b", 4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))
    expected = embeddings(unbroken.model)
    assert changed_rows(before, expected) == list(unbroken.model.config.new_token_ids)
    assert torch.equal(embeddings(resumed.model), expected)
    assert torch.equal(load_weights(tmp_path / "b" / "checkpoint-4")[EMBEDDINGS], expected)


def test_a_head_that_is_tied_to_other_embeddings_predicts_from_these(folders):
    model = load_model(folders["tied"], torch.float32)
    freeze(model, "paper-qwen")
    hidden = torch.randn(2, model.lm_head.weight.shape[1])
    torch.testing.assert_close(model.lm_head(hidden), hidden @ model.lm_head.weight.T)
    model.set_input_embeddings(torch.nn.Embedding(*model.lm_head.weight.shape))
    model.tie_weights()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    torch.testing.assert_close(model.lm_head(hidden), hidden @ model.lm_head.weight.T)


@pytest.mark.parametrize("left_out", [EMBEDDINGS, "lm_head.weight"])
def test_a_shared_matrix_is_loaded_under_either_name(folders, left_out):
    model, other = load_model(folders["tied"], torch.float32), load_model(folders["tied"], torch.float32, seed=2)
    freeze(model, "paper-qwen")
    freeze(other, "paper-qwen")
    expected = torch.randn(GISTS, model.config.text_config.hidden_size)
    with torch.no_grad():
        dict(model.named_parameters())[ROWS].copy_(expected)
    state = {name: tensor for name, tensor in model.state_dict().items() if name != left_out}
    assert other.load_state_dict(state, strict=False).missing_keys == [left_out]
    assert torch.equal(dict(other.named_parameters())[ROWS], expected)
    assert torch.equal(embeddings(other), embeddings(model))
    assert torch.equal(other.lm_head.state_dict()["weight"], embeddings(model))


def test_the_table_and_the_groups_tell_of_new_tokens(folders):
    model = load_model(folders["untied"])
    whole = model.num_parameters()
    parts = freeze(model, "paper-qwen")
    by_name = {part.name: part for part in parts}
    assert (by_name["new tokens"].parameters, by_name["new tokens"].trainable) == (GISTS * 64, GISTS * 64)
    assert by_name["embeddings"].trainable == 0
    assert sum(part.parameters for part in parts) == whole
    assert "new tokens" in parts_table(parts)
    rows = dict(model.named_parameters())[ROWS]
    [group] = [group for group in parameter_groups(model) if any(p is rows for p in group["params"])]
    assert group["lr"] == 1e-4
    freeze(model, ["casa_attn"])
    assert ROWS not in dict(model.named_parameters())
    with pytest.raises(ValueError, match="embed_tokns"):
        freeze(model, "embed_tokns")


def test_a_matrix_that_is_loaded_where_it_lies_keeps_its_rows(folders):
    """As sharded checkpoints are: they are read into the tensors of a state dict, which is then loaded."""
    model = load_model(folders["tied"], torch.float32)
    freeze(model, "paper-qwen")
    state = model.state_dict()
    expected = torch.randn(state[EMBEDDINGS].shape)
    for name in (EMBEDDINGS, "lm_head.weight"):
        state[name].copy_(expected)
    model.load_state_dict(state)
    assert torch.equal(embeddings(model), expected)
    rows = dict(model.named_parameters())[ROWS]
    assert torch.equal(rows, expected[list(model.config.new_token_ids)])
    model.load_state_dict({}, strict=False)  # nor does a state dict without it change anything
    assert torch.equal(embeddings(model), expected) and torch.equal(rows, expected[list(model.config.new_token_ids)])
