# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""What a forward returns, what training sees, and models that are spread, saved or resized give the same answers."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import DynamicCache, Qwen2_5_VLForConditionalGeneration, StaticCache

from casa_hf import CasaForConditionalGeneration
from tests.helpers_generation import (
    MAIN,
    VARIANTS,
    Image,
    Row,
    batch,
    new_model,
    one_shot,
    relative_error,
    shared_model,
    token_ids,
    words,
)
from tests.tiny import VOCABULARY, source_config

A, B, C = Image(2, 3, 1), Image(1, 2, 2), Image(3, 1, 3)
ONE: Row = [*words(3, 1), A, *words(4, 2), B, C, *words(5, 3)]
ROWS: list[Row] = [ONE, words(6, 4), [B, *words(3, 5)], [*words(9, 6), C, A]]


def labelled(*rows: Row) -> dict[str, torch.Tensor]:
    inputs = batch(*rows, side="right")
    return {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}


# ------------------------------------------------------------------------------------ outputs


@pytest.mark.parametrize("variant", VARIANTS)
def test_attentions_of_the_eager_backend(variant):
    model = new_model(variant, attn_implementation="eager")
    inputs = batch(ONE, words(18, 7))
    with torch.no_grad():
        output = model(**inputs, output_attentions=True)
    assert relative_error(output.logits, shared_model(variant)(**inputs).logits) < 1e-6
    assert len(output.attentions) == len(output.cross_attentions) == 3
    tokens = inputs["input_ids"].shape[1]
    for attention in output.attentions:
        assert attention.shape == (2, 4, tokens, tokens)
        assert torch.allclose(attention.sum(-1), torch.ones(()).double(), atol=1e-6)
        assert attention.triu(1).abs().max() == 0
    # Columns: A, B and C, then the text from the first window on. A token sees the images of its group only.
    images = [slice(0, 6), slice(6, 8), slice(8, 11)]
    visible_at = [()] * 4 + [(0,)] * 6 + [(1,)] * 2 + [(1, 2)] * 6
    for attention in output.cross_attentions:
        assert attention.shape[:3] == (2, 4, tokens)
        assert attention[1].abs().max() == 0, "a row without images"
        for place, visible in enumerate(visible_at):
            weights = attention[0, :, place]
            for index, columns in enumerate(images):
                assert (weights[:, columns].min() > 0) if index in visible else (weights[:, columns].max() == 0)
            assert torch.allclose(weights.sum(-1), torch.tensor(float(bool(visible))).double(), atol=1e-6)
            text = weights[:, 11:]
            assert (text.shape[-1] > 0 and text.max() > 0) == (model.config.casa_keys == "window" and bool(visible))


def test_attentions_are_counted_by_block():
    model = new_model("casa", casa_layers=[1], attn_implementation="eager")
    output = model(**batch(ONE), output_attentions=True)
    assert len(output.attentions) == 3
    assert [attention is not None for attention in output.cross_attentions] == [False, True, False]
    assert not model(**batch(ONE)).cross_attentions


@pytest.mark.parametrize(
    "variant",
    [
        "casa",
        "exact",
        *(
            pytest.param(variant, marks=pytest.mark.slow)
            for variant in ("ca-shared", "casa-before", "casa-replace", "insertion")
        ),
    ],
)
def test_weights_of_attention_are_kept_only_where_they_are_asked_for(variant):
    """Those of each block are freed before the next block begins."""
    model = new_model(variant, attn_implementation="eager")
    kept: list[list[int]] = []
    made: list[Any] = []

    def bytes_kept() -> int:
        gc.collect()
        return sum(weights.nbytes for reference in made if (weights := reference()) is not None)

    def before(module: Any, args: Any) -> None:
        kept[-1].append(bytes_kept())

    def after(module: Any, args: Any, output: Any) -> None:
        made.extend(weakref.ref(weights) for weights in output[2:] if weights is not None)

    language_model = model.model.language_model
    hooks = [layer.register_forward_pre_hook(before) for layer in [*language_model.layers, language_model.norm]]
    hooks += [layer.register_forward_hook(after) for layer in language_model.layers]
    for asked in (False, True):
        kept.append([])
        made.clear()
        with torch.no_grad():
            output = model(**batch(ONE), output_attentions=asked)
        assert len(made) >= 3, "the backend gives them in any case"
        # At the start of each block and at the end: nothing, or what all blocks before have made.
        assert kept[-1][0] == 0
        assert not any(kept[-1]) if not asked else 0 < kept[-1][1] < kept[-1][2] < kept[-1][3]
        assert (output.attentions is not None) == asked
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("variant", ["exact", "insertion"])
def test_attentions_of_steps_on_a_cache_are_rows_of_the_whole(variant, static):
    """Of one softmax over images and text, also where a row of the batch is padded or has no image."""
    model = new_model(variant, attn_implementation="eager")
    inputs = batch([*words(3, 1), A, *words(6, 2)], [*words(1, 3), B, *words(4, 5)], words(7, 4))
    tokens, split = inputs["input_ids"].shape[1], 8
    cache = StaticCache(config=model.config, max_cache_len=tokens) if static else DynamicCache()
    with torch.no_grad():
        whole = model(**inputs, output_attentions=True)
        ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
        first = model(ids[:, :split], attention_mask=mask[:, :split], cache=cache, **inputs)
        steps = [
            model(ids[:, i : i + 1], attention_mask=mask[:, : i + 1], cache=first.cache, output_attentions=True)
            for i in range(split, tokens)
        ]
    images = whole.cross_attentions[0].shape[-1]
    assert [step.attentions[0].shape[-1] for step in steps] == [
        tokens if static else i + 1 for i in range(split, tokens)
    ]
    for block in range(3):
        to_text, to_images = whole.attentions[block], whole.cross_attentions[block]
        text = mask.bool()[:, None].expand(-1, 4, -1)
        assert torch.allclose((to_text.sum(-1) + to_images.sum(-1))[text], torch.ones(()).double(), atol=1e-6)
        assert to_text.triu(1).abs().max() == 0 and to_images[2].abs().max() == 0
        assert to_images[0, :, 5:].amin() >= 0 and to_images[0, :, 5:, :6].sum(-1).amin() > 0
        for i, step in zip(range(split, tokens), steps, strict=True):
            assert relative_error(step.attentions[block][..., : i + 1], to_text[:, :, i : i + 1, : i + 1]) < 1e-6
            # Stored image columns are right-aligned, those of a call left-aligned.
            sums = step.cross_attentions[block].sum(-1), to_images[:, :, i : i + 1].sum(-1)
            assert relative_error(*sums) < 1e-6 and step.cross_attentions[block].shape[-1] >= images


def test_attentions_of_other_backends_are_as_in_the_source_model():
    source = Qwen2_5_VLForConditionalGeneration._from_config(source_config(), attn_implementation="sdpa").double()
    assert not source(torch.tensor([words(4, 1)]), output_attentions=True).attentions
    output = shared_model("casa")(**batch(ONE), output_attentions=True)
    assert not output.attentions
    assert not output.cross_attentions


@pytest.mark.parametrize("variant", VARIANTS)
def test_hidden_states_are_those_between_blocks(variant):
    model = shared_model(variant)
    inputs, seen = batch(*ROWS), []
    language_model = model.model.language_model
    hooks = [
        layer.register_forward_pre_hook(lambda module, args: seen.append(args[0])) for layer in language_model.layers
    ]
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    assert len(output.hidden_states) == 4
    for actual, expected in zip(output.hidden_states, seen, strict=False):
        assert torch.equal(actual, expected)
    assert torch.equal(output.hidden_states[0], model.get_input_embeddings()(inputs["input_ids"]))
    assert torch.equal(model.lm_head(output.hidden_states[-1]), output.logits)
    assert relative_error(language_model.norm(output.hidden_states[-1]), output.hidden_states[-1]) > 1e-3


def test_tuples_hold_what_outputs_hold():
    model, inputs = shared_model("casa"), labelled(*ROWS)
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=True)
        loss, logits, cache, hidden_states, images = model(**inputs, output_hidden_states=True, return_dict=False)
        inner = model.model(**batch(*ROWS, side="right"), return_dict=False)
    assert torch.equal(loss, output.loss)
    assert torch.equal(logits, output.logits)
    assert int(cache.get_seq_length()) == inputs["input_ids"].shape[1]
    assert all(torch.equal(one, other) for one, other in zip(hidden_states, output.hidden_states, strict=True))
    assert isinstance(images, tuple) and torch.equal(images[0], output.image_outputs.last_hidden_state)
    assert torch.equal(inner[0], output.hidden_states[-1])


def test_the_towers_outputs_come_with_the_models():
    """Under the name that outputs of other models have for them."""
    model, inputs = new_model("casa", attn_implementation="eager"), batch(*ROWS)
    images = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
    asked = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        features = model.get_image_features(**images, **asked)
        outputs = [each(**inputs, **asked).image_outputs for each in (model, model.model)]
        for output in outputs:
            for name in ("pooler_output", "hidden_states", "attentions"):
                pairs = zip(output[name], features[name], strict=True)
                assert all(torch.equal(actual, expected) for actual, expected in pairs), name
        assert len(outputs[0].pooler_output) == 6 and len(outputs[0].hidden_states) >= 2
        plain = model(**inputs).image_outputs
        assert torch.equal(torch.cat(plain.pooler_output), torch.cat(features.pooler_output))
        assert plain.hidden_states is None and plain.attentions is None
        embedded = {"image_embeds": features.pooler_output, "image_grid_thw": images["image_grid_thw"]}
        assert model(input_ids=inputs["input_ids"], **embedded).image_outputs is None
        assert model(**batch(words(4, 1))).image_outputs is None
    assert "image_outputs" in model.config.keys_to_ignore_at_inference


def test_logits_to_keep():
    model, inputs = shared_model("casa"), batch(*ROWS)
    with torch.no_grad():
        logits = model(**inputs).logits
        assert torch.equal(model(**inputs, logits_to_keep=3).logits, logits[:, -3:])
        assert torch.equal(model(**inputs, logits_to_keep=torch.tensor([0, 5, 9])).logits, logits[:, [0, 5, 9]])


def test_loss_is_the_mean_cross_entropy_of_the_next_token():
    model, inputs = shared_model("casa"), labelled(*ROWS)
    with torch.no_grad():
        loss = model(**inputs).loss
        share = model(**inputs, num_items_in_batch=torch.tensor(10)).loss
        terms = [
            -one_shot(model, row)[index].log_softmax(-1)[token]
            for row in ROWS
            for index, token in enumerate(token_ids(row)[1:])
        ]
    assert abs(loss - sum(terms) / len(terms)) < 1e-5
    assert abs(share - sum(terms) / 10) < 1e-4


# ------------------------------------------------------------------------------------ training


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.train()
    model(**labelled(*ROWS)).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def recompute(model: Any, reentrant: bool) -> None:
    # The name in newer versions of Transformers, and the one in older.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    "variant, frozen", [*((variant, False) for variant in VARIANTS), ("casa", True), ("ca", True)]
)
def test_gradient_checkpointing_changes_no_gradient(variant, frozen, reentrant):
    """`frozen`: only fusion layers are trained."""
    results = []
    for checkpointing in (False, True):
        model = new_model(variant)
        if frozen:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_("casa_attn" in name)
            model.enable_input_require_grads()
        if checkpointing:
            recompute(model, reentrant)
        results.append(gradients(model))
    plain, checkpointed = results
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        assert gradient is not None and gradient.abs().max() > 0, name
        assert torch.equal(gradient, checkpointed[name]), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_those_of_the_loss(variant):
    """Every parameter of tower, fusion layers and language model has the gradient that differences show."""
    model = new_model(variant)
    computed = gradients(model)
    inputs, step = labelled(*ROWS), 1e-4
    generator = torch.Generator().manual_seed(0)
    for part in ("visual.patch_embed", "visual.merger", "casa_attn", "self_attn.k_proj", "embed_tokens", "lm_head"):
        direction = {
            name: torch.randn(gradient.shape, generator=generator, dtype=gradient.dtype)
            for name, gradient in computed.items()
            if part in name
        }
        if not direction:
            assert variant.endswith("shared")
            continue
        expected = sum((computed[name] * change).sum() for name, change in direction.items())
        losses = []
        parameters = dict(model.named_parameters())
        for sign in (1, -2, 1):
            with torch.no_grad():
                for name, change in direction.items():
                    parameters[name] += sign * step * change
                losses.append(float(next_token_loss(model, inputs)))
        assert abs((losses[0] - losses[1]) / (2 * step) - expected) < 1e-3 * max(1, abs(expected)), part


def next_token_loss(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss in float64; the model's own rounds to float32."""
    logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())


@pytest.mark.parametrize("variant", VARIANTS)
def test_dropout_acts_in_training_only(variant):
    model, expected = new_model(variant), shared_model(variant)(**batch(ONE)).logits
    assert torch.equal(model.train()(**batch(ONE)).logits, expected), "without dropout training changes nothing"
    shared = model.config.casa_share_projections
    for layer in model.model.language_model.layers:
        # Fusion layers with self-attention's projections have its dropout.
        (layer.self_attn if shared else layer.casa_attn).attention_dropout = 0.5
    torch.manual_seed(0)
    first, second = model(**batch(ONE)).logits[0], model(**batch(ONE)).logits[0]
    if not shared:
        assert torch.equal(first[:4], expected[0, :4]), "tokens before the first image have no fusion to drop"
    assert relative_error(first[4:], second[4:]) > 1e-2
    assert torch.equal(model.eval()(**batch(ONE)).logits, expected)


# ------------------------------------------------------------------------------------ models on disk and devices


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_saving_and_loading(variant, tied, tmp_path):
    model = new_model(variant, tie_word_embeddings=tied)
    model.tie_weights()
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    names = {name for file in tmp_path.glob("*.safetensors") for name in safe_open(file, "pt").keys()}  # noqa: SIM118
    assert names == model.state_dict().keys() - ({"lm_head.weight"} if tied else set())
    loaded, info = CasaForConditionalGeneration.from_pretrained(
        tmp_path, dtype=torch.float64, output_loading_info=True
    )
    assert not any(info.values())
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied
    assert torch.equal(loaded(**batch(*ROWS)).logits, model(**batch(*ROWS)).logits)


@pytest.mark.parametrize("placement", ["blocks on disk", "small memory"])
@pytest.mark.parametrize("variant", MAIN)
def test_models_spread_over_devices_give_the_same(variant, placement, tmp_path: Path):
    pytest.importorskip("accelerate")
    model, inputs = shared_model(variant), batch(*ROWS)
    model.save_pretrained(tmp_path / "model", max_shard_size="100KB")
    language_model = "model.language_model"
    memory = {"device_map": "auto", "max_memory": {"cpu": "450KB"}}
    if placement == "blocks on disk":
        parts = ("model.visual", "lm_head", *(f"{language_model}.{p}" for p in ("embed_tokens", "rotary_emb", "norm")))
        blocks = {f"{language_model}.layers.{i}": "disk" if i else "cpu" for i in range(3)}
        memory = {"device_map": dict.fromkeys(parts, "cpu") | blocks}
    spread = CasaForConditionalGeneration.from_pretrained(
        tmp_path / "model", dtype=torch.float64, offload_folder=tmp_path / "disk", **memory
    )
    spread.generation_config.eos_token_id = None
    assert "disk" in spread.hf_device_map.values()
    with torch.no_grad():
        assert torch.equal(spread(**inputs).logits, model(**inputs).logits)
    settings = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(spread.generate(**inputs, **settings), model.generate(**inputs, **settings))


def test_resized_embeddings():
    model, inputs = new_model("casa"), batch(*ROWS)
    before = model(**inputs).logits
    model.resize_token_embeddings(VOCABULARY + 16)
    assert model.config.text_config.vocab_size == VOCABULARY + 16
    after = model(**inputs).logits
    assert after.shape[-1] == VOCABULARY + 16
    assert relative_error(after[..., :VOCABULARY], before) < 1e-12
    added = inputs["input_ids"].clone()
    added[:3, -1] = VOCABULARY + 3
    assert torch.isfinite(model(**{**inputs, "input_ids": added}, labels=added).loss)


def test_backends_can_be_changed_and_unusable_ones_are_refused():
    model, inputs = new_model("casa"), batch(ONE)
    model.set_attn_implementation("eager")
    output = model(**inputs, output_attentions=True)
    assert len(output.cross_attentions) == 3
    assert relative_error(output.logits, shared_model("casa")(**inputs).logits) < 1e-6
    for name in ("flash_attention_2", "nonsense"):
        with pytest.raises((ValueError, ImportError)):
            model.set_attn_implementation(name)


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_language_model_itself_recomputes_without_a_cache(reentrant):
    model = new_model("casa").train()
    language_model, ids = model.model.language_model, torch.tensor([words(6, 1)])

    def gradient(**cache: Any) -> torch.Tensor:
        embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
        everything = torch.ones(ids.shape, dtype=torch.bool)
        language_model(embeds, everything, everything, **cache).last_hidden_state.square().sum().backward()
        return embeds.grad

    expected = gradient(use_cache=False)
    recompute(model, reentrant)
    cache = DynamicCache()
    assert torch.equal(gradient(cache=cache, use_cache=False), expected) and cache.get_seq_length() == 0
    assert torch.equal(gradient(use_cache=True), expected)


def test_a_token_mask_alone_is_a_mask():
    model, row = new_model("casa"), words(4, 1)
    ids, mask = torch.tensor([[0, 0, *row]]), torch.tensor([[False, False, True, True, True, True]])
    expected = model(torch.tensor([row])).logits
    assert relative_error(model(ids, token_mask=mask).logits[:, 2:], expected) < 1e-6


@pytest.mark.parametrize("width", [5, 6, 8])
def test_a_prepared_mask_for_another_number_of_keys_is_refused(width):
    model = new_model("casa")
    causal = torch.ones(7, width, dtype=torch.bool).tril()[None, None]
    with torch.no_grad(), pytest.raises(RuntimeError):
        model(input_ids=torch.tensor([[7, 8, 9, 10, 11, 7, 8]]), attention_mask=causal, use_cache=False)
