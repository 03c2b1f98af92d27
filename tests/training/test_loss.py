# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The loss in chunks is the loss of all logits at once, with the same gradients; its memory doesn't grow."""

from __future__ import annotations

import itertools
import math
import os
from importlib.util import find_spec

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile
from transformers.loss.loss_utils import ForCausalLMLoss

from casa_hf import convert_checkpoint, loss_casa
from casa_hf.loss_casa import chunk_tokens, chunked_loss
from casa_hf.training import CasaDataCollator, checkpoint_activations, freeze
from examples.tiny_source import build_tiny_source
from tests.training.helpers import CONVERSATIONS, assert_close, load_model, load_processor, loss_and_gradients

# PEFT still uses the name that Transformers has replaced.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing` is deprecated:FutureWarning")

CHUNK = 7


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """A batch of the tests is several chunks, the last of which is smaller."""
    monkeypatch.setattr(loss_casa, "chunk_tokens", lambda vocab_size: CHUNK)


@pytest.fixture(scope="module")
def tied_folder(tmp_path_factory):
    """A checkpoint with a tied head and gist tokens, the rows of which can train apart from it."""
    folder = tmp_path_factory.mktemp("tied")
    source = build_tiny_source(folder / "source", tie_word_embeddings=True)
    return convert_checkpoint(source, folder / "casa", num_gist_tokens=3).output


@pytest.fixture(scope="module")
def batch(processor):
    return CasaDataCollator(processor)(CONVERSATIONS)


def alone(model, batch, **arguments):
    """Loss and gradients without logits, as `loss_and_gradients` returns them."""
    model.zero_grad(set_to_none=True)
    output = model(**batch, **arguments, skip_logits=True)
    assert output.logits is None
    output.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return output.loss.item(), {name: None if grad is None else grad.clone() for name, grad in gradients.items()}


def rows_of_the_head(model, calls):
    """Have the output head note how many tokens it is called with."""
    return model.lm_head.register_forward_pre_hook(lambda head, args: calls.append(args[0].shape[:-1].numel()))


def compare(model, batch, tolerance=1e-6):
    """Compare with a loss that is computed in the test, in float64."""
    labelled = int((batch["labels"][:, 1:] != -100).sum())
    assert labelled > 2 * CHUNK and labelled % CHUNK and labelled < batch["labels"].numel() / 2
    expected, gradients = loss_and_gradients(model, batch)
    found, others = alone(model, batch)
    assert found == pytest.approx(expected, rel=1e-6)
    assert_close(others, gradients, tolerance)


@pytest.mark.parametrize("packing", [False, True])
def test_loss_and_gradients_are_those_of_all_logits(casa_folder, processor, packing):
    """Of an untied head, trained and frozen, of padded and of packed rows; with recomputed activations."""
    model, batch = load_model(casa_folder), CasaDataCollator(processor, packing=packing)(CONVERSATIONS)
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    compare(model, batch)
    freeze(model, "paper-qwen")
    checkpoint_activations(model)
    compare(model.train(), batch)


@pytest.mark.parametrize("trainable", [".", "new_tokens"])
def test_a_tied_head_and_rows_of_new_tokens_in_it(tied_folder, trainable):
    """The gradient of a tied matrix has a part of the embedding and one of the head, those of new rows too."""
    model, batch = load_model(tied_folder), CasaDataCollator(load_processor(tied_folder))(CONVERSATIONS)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    freeze(model, [trainable])
    with torch.no_grad():  # far from what lies in the matrix
        for name, parameter in model.named_parameters():
            if name.endswith("new_tokens.weight"):
                parameter.add_(torch.randn_like(parameter))
    compare(model, batch)


@pytest.mark.parametrize("options", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_adapters_of_the_head(casa_folder, batch, options):
    peft = pytest.importorskip("peft")
    options = {"target_modules": ["o_proj"], "r": 2, "init_lora_weights": False, **options}
    model = peft.get_peft_model(load_model(casa_folder), peft.LoraConfig(**options))
    assert any("lm_head" in name for name, p in model.named_parameters() if p.requires_grad)
    compare(model, batch)


def test_a_quantized_head(casa_folder, batch):
    quantization = pytest.importorskip("torchao.quantization")
    model = load_model(casa_folder, torch.float32)
    freeze(model, "paper-qwen")
    quantization.quantize_(model.lm_head, quantization.Int8WeightOnlyConfig())
    assert type(model.lm_head.weight.data) is not torch.Tensor
    compare(model, batch, 1e-4)


def test_bfloat16_autocast(casa_folder, batch):
    model = load_model(casa_folder, torch.float32)
    freeze(model, "paper-qwen")
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(**batch).loss
        found, _ = alone(model, batch)
    assert found == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("items", [None, 11, torch.tensor(11)], ids=["mean", "number", "tensor"])
def test_every_argument_of_the_loss(items):
    """The function beside Transformers' own: number of items, another ignored label, shifted labels."""
    torch.manual_seed(0)
    head = nn.Linear(8, 30, bias=True)
    states, labels = torch.randn(2, 17, 8), torch.randint(0, 30, (2, 17))
    labels[:, ::3] = -5
    for shifted in (None, labels.roll(2, 1)):
        given = {"num_items_in_batch": items, "ignore_index": -5, "shift_labels": shifted}
        expected = ForCausalLMLoss(head(states), labels, 30, **given)
        torch.testing.assert_close(chunked_loss(head, states, labels, 30, **given), expected)


def test_the_head_sees_tokens_with_a_label_only(casa_folder, batch):
    """In chunks, once more in the backward pass; a single chunk isn't computed again, nor is one without gradients."""
    model, calls = load_model(casa_folder), []
    rows_of_the_head(model, calls)
    labelled = int((batch["labels"][:, 1:] != -100).sum())
    chunks = [CHUNK] * (labelled // CHUNK) + [labelled % CHUNK]
    alone(model, batch)
    assert calls == chunks + chunks[::-1]
    calls.clear()
    with torch.no_grad():
        model(**batch, skip_logits=True)
    assert calls == chunks
    calls.clear()
    few = {**batch, "labels": batch["labels"].clone().index_fill_(0, torch.tensor([0, 2, 3]), -100)}
    labelled = int((few["labels"][:, 1:] != -100).sum())
    assert labelled > 0
    loss_casa.chunk_tokens = lambda vocab_size: labelled  # put back by `small_chunks`
    alone(model, few)
    assert calls == [labelled]


def test_a_batch_without_any_label(casa_folder, batch):
    """As of all logits: nan for the mean of nothing, 0 for the share of a larger batch, gradients that are zeros."""
    masked = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    model, calls = load_model(casa_folder), []
    rows_of_the_head(model, calls)
    for items in (None, torch.tensor(9)):
        model.zero_grad()
        expected = model(**masked, num_items_in_batch=items).loss
        expected.backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        calls.clear()
        found, others = alone(model, masked, num_items_in_batch=items)
        assert found == expected.item() or (math.isnan(found) and math.isnan(expected.item()))
        assert math.isnan(found) == (items is None)
        assert calls == [1]  # kernels of other heads may refuse none at all
        assert others.keys() == gradients.keys() and not any(grad.any() for grad in others.values())


@pytest.mark.parametrize("kept", [20, torch.tensor([1, 3, 8, 30])], ids=["number", "indices"])
def test_logits_to_keep(casa_folder, batch, kept):
    """Labels are those of the tokens that are kept, as without `skip_logits`."""
    labels = batch["labels"][:, -kept:] if isinstance(kept, int) else torch.full((len(batch["labels"]), 4), 5)
    given = {**batch, "labels": labels, "logits_to_keep": kept}
    model = load_model(casa_folder)
    with torch.no_grad():
        expected = model(**given)
        found = model(**given, skip_logits=True).loss.item()
        assert found == pytest.approx(expected.loss.item(), rel=1e-6)
        shifted, logits = labels[:, 1:].flatten(), expected.logits[:, :-1].flatten(0, 1)
        assert found == pytest.approx(cross_entropy(logits, shifted).item(), rel=1e-6)
        with pytest.raises(ValueError, match=r"labels have the shape .* Pass a label for each"):
            model(**{**given, "labels": batch["labels"]}, skip_logits=True)


def test_the_loss_alone_needs_labels(casa_folder, batch):
    model = load_model(casa_folder)
    with pytest.raises(ValueError, match="no labels"):
        model(**{**batch, "labels": None}, skip_logits=True)
    assert model(**batch, skip_logits=False).logits is not None


def test_another_loss_function_gets_all_logits(casa_folder, batch):
    model = load_model(casa_folder)
    model.loss_function = lambda logits, labels, vocab_size, **_: logits.sum() + vocab_size
    output = model(**batch, skip_logits=True)
    assert output.loss == output.logits.sum() + model.config.text_config.vocab_size


# ---------------------------------------------------------------- Liger


@pytest.fixture
def runs_liger(monkeypatch):
    """As on a GPU with Liger's kernels: its conditions hold but for those of the call."""
    monkeypatch.setattr(loss_casa, "_runs_liger", lambda device_type: True)


@pytest.mark.skipif(
    not find_spec("liger_kernel") or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs liger_kernel, and TRITON_INTERPRET=1 where there is no GPU",
)
@pytest.mark.parametrize("tied", [False, True])
def test_ligers_kernel(casa_folder, tied_folder, runs_liger, monkeypatch, tied):
    """The kernel itself, interpreted; the head isn't called."""
    folder = tied_folder if tied else casa_folder
    model, calls, forward = load_model(folder, torch.float32), [], nn.Linear.forward
    batch = CasaDataCollator(load_processor(folder))(CONVERSATIONS)
    for items in (None, torch.tensor(11)):
        expected, gradients = loss_and_gradients(model, batch)
        share = 1 if items is None else int((batch["labels"][:, 1:] != -100).sum()) / 11
        with monkeypatch.context() as patch:  # a hook on the head would keep it from the kernel
            patch.setattr(nn.Linear, "forward", lambda linear, x: calls.append(linear) or forward(linear, x))
            found, others = alone(model, batch, num_items_in_batch=items)
        assert calls and model.lm_head not in calls
        assert found == pytest.approx(share * expected, rel=1e-5)
        assert_close(others, {name: share * gradient for name, gradient in gradients.items()}, 1e-4)
    masked = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    found, others = alone(model, masked, num_items_in_batch=9)
    assert found == 0 and not any(grad.any() for grad in others.values())


def changed_heads():
    """Heads that do more than their class says, or whose weights aren't there as such."""
    hooked, frozen, placed = (nn.Linear(4, 9, bias=False) for _ in range(3))
    hooked.register_forward_hook(lambda head, args, logits: logits * 2)
    placed.forward = lambda states: states  # as Accelerate places modules
    split = nn.Linear(4, 9, bias=False)
    split.weight.ds_id = 0  # as ZeRO-3 marks parameters
    adapted = nn.Sequential(nn.Linear(4, 9, bias=False))
    double = nn.Linear(4, 9, bias=False, dtype=torch.float64)
    return {
        "hook": hooked,
        "forward": placed,
        "ZeRO-3": split,
        "adapter": adapted,
        "float64": double,
        "frozen": frozen,
    }


@pytest.mark.parametrize("kind", changed_heads())
def test_liger_takes_no_head_that_it_would_misread(runs_liger, kind):
    head = changed_heads()[kind]
    states = torch.randn(3, 4, requires_grad=kind != "frozen")  # it has no gradient of weights alone
    assert loss_casa._liger(head, states) is None


def test_liger_is_for_gpus():
    loss_casa._runs_liger.cache_clear()
    assert not loss_casa._runs_liger("cpu")
    assert loss_casa._runs_liger("cuda") == all(map(find_spec, ("triton", "liger_kernel")))


# ---------------------------------------------------------------- memory


def test_a_chunk_takes_a_quarter_of_a_gib_at_most():
    for vocab_size in (2, 512, 32_000, 48_000, 151_936, 262_144):
        tokens = chunk_tokens(vocab_size)
        assert tokens & (tokens - 1) == 0
        assert tokens * vocab_size * 13 <= 2**28 < 2 * tokens * vocab_size * 13
    assert chunk_tokens(151_936) == 128 and chunk_tokens(2**30) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_that_of_a_chunk(monkeypatch, dtype):
    """Bytes at the peak of forward and backward; of all logits they grow with the tokens."""
    monkeypatch.setattr(loss_casa, "chunk_tokens", lambda vocab_size: 16)
    head = nn.Linear(16, 4_000, bias=False, dtype=dtype).requires_grad_(False)
    per_chunk = 16 * 4_000

    def peak(loss, tokens):
        states = torch.randn(1, tokens, 16, dtype=dtype, requires_grad=True)
        labels = torch.randint(0, 4_000, (1, tokens))
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            loss(states, labels).backward()
        events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
        changes = sorted((event.start_ns(), event.nbytes()) for event in events)
        return max(itertools.accumulate(change for _, change in changes)) - 3 * states.nbytes

    for tokens in (64, 256):
        assert peak(lambda s, y: ForCausalLMLoss(head(s), y, 4_000), tokens) > 11.9 * tokens * 4_000
        assert peak(lambda s, y: chunked_loss(head, s, y, 4_000), tokens) < 13 * per_chunk + 400 * tokens
