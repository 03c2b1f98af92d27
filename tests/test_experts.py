# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Families with experts: the routers' logits and loss, implementations, layouts of files, heads, adapters, numbers.

That images and text pass the experts as in the source, for every design, is shown over rows in test_conformance.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3_5MoeForConditionalGeneration, Qwen3VLMoeForConditionalGeneration, StaticCache

from benchmarks.counting import Dimensions, language_parameters, step_bytes
from casa_hf import CasaConfig, CasaForConditionalGeneration, CasaModel, CheckpointError
from casa_hf.backbones import BACKBONES
from casa_hf.conversion import convert_checkpoint, convert_to_source, inspect_checkpoint
from casa_hf.hub.publishable import check_checkpoint
from casa_hf.training import trainable_parts
from casa_hf.training.adapters import add_adapters
from examples.tiny_source import build_tiny_source
from tests.command_line import Cli
from tests.conversion.helpers import altered, load_weights, older_layout
from tests.helpers_generation import relative_error
from tests.sources import GRIDS, ONE_GROUP, SEVERAL, make_case, randomised
from tests.test_reference import image_inputs
from tests.tiny import FAMILIES, casa_config, random_tensor, sample

# Blocks with experts, of the tiny models.
WITH_EXPERTS = {"qwen3_vl_moe_text": (0, 2), "qwen3_5_moe_text": (0, 1, 2, 3)}
IMAGE_TOKENS = sum(height * width for height, width in GRIDS)

families = pytest.mark.parametrize("family", WITH_EXPERTS)


@pytest.fixture(autouse=True)
def no_gradients(request: pytest.FixtureRequest) -> Iterator[None]:
    with torch.set_grad_enabled("gradients" in request.node.name):
        yield


# ------------------------------------------------------------------------------------- the loss of the routers


def balance(logits: list[Tensor], chosen: int) -> Tensor:
    """The loss of Switch Transformer (arXiv 2101.03961, equations 4 to 6) over all rows of all blocks, by its
    definition: the number of experts times the sum, over experts, of the part of choices and the mean probability."""
    rows = torch.cat(logits)
    probabilities, experts = rows.softmax(-1), rows.shape[-1]
    choices = torch.zeros(experts)
    for row in probabilities:
        for expert in row.argsort(descending=True)[:chosen]:
            choices[expert] += 1
    return experts * (choices / len(rows) * probabilities.mean(0)).sum()


@families
def test_loss_of_text_is_the_sources(family: str) -> None:
    """To the last bit; where rows are padded, padding doesn't count."""
    case = make_case(family, "casa")
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11], [0, 0, 0, 20, 21, 22, 23]])
    inputs: dict[str, Any] = {"labels": ids, "output_router_logits": True}
    ours, theirs = case.model(ids, **inputs), case.source(ids, **inputs)
    assert torch.equal(ours.aux_loss, theirs.aux_loss) and torch.equal(ours.loss, theirs.loss)
    assert len(ours.router_logits) == len(theirs.router_logits) == len(WITH_EXPERTS[family])
    assert all(map(torch.equal, ours.router_logits, theirs.router_logits))

    inputs["attention_mask"] = (ids != 0).long()
    ours, theirs = case.model(ids, **inputs), case.source(ids, **inputs)
    assert relative_error(ours.aux_loss, theirs.aux_loss) < 1e-6 and relative_error(ours.loss, theirs.loss) < 1e-6
    kept = [torch.cat([logits[:7], logits[10:]]) for logits in ours.router_logits]
    assert relative_error(ours.aux_loss, balance(kept, chosen=2)) < 1e-6
    assert relative_error(ours.aux_loss, balance(list(ours.router_logits), chosen=2)) > 1e-3
    plain = case.model(**{**inputs, "output_router_logits": False}, input_ids=ids)
    assert plain.router_logits is None and plain.aux_loss is None
    assert relative_error(ours.loss - plain.loss, 0.3 * ours.aux_loss) < 1e-5
    alone = case.model(ids, **inputs, skip_logits=True)
    assert alone.logits is None and relative_error(alone.loss, ours.loss) < 1e-6


@families
@pytest.mark.parametrize(("variant", "ids"), [("exact", ONE_GROUP), ("insertion", SEVERAL)])
def test_loss_with_images_is_the_sources(family: str, variant: str, ids: list[int]) -> None:
    """Image tokens pass the experts, and count, as in the source's one sequence."""
    case = make_case(family, variant)
    is_text = case.is_text(ids)
    theirs = case.source_outputs(ids, output_router_logits=True)
    ours = case.model(torch.tensor([ids]), **case.images, output_router_logits=True)
    routed = zip(ours.router_logits, ours.image_router_logits, theirs.router_logits, strict=True)
    for of_text, of_images, other in routed:
        assert relative_error(of_text, other[is_text]) < 1e-5 and relative_error(of_images, other[~is_text]) < 1e-5
    assert relative_error(ours.aux_loss, theirs.aux_loss) < 1e-5
    labels = torch.where(is_text, torch.tensor(case.inserted(ids)[0]), -100)[None]
    theirs_with_labels = case.source_outputs(ids, output_router_logits=True, labels=labels)
    added = theirs_with_labels.loss - case.source_outputs(ids, labels=labels).loss
    assert relative_error(0.3 * ours.aux_loss, added) < 1e-5


@families
@pytest.mark.parametrize(("updates", "routed"), [("none", 0), ("ffn", IMAGE_TOKENS), ("full", IMAGE_TOKENS)])
def test_image_states_count_where_they_pass_the_experts(family: str, updates: str, routed: int) -> None:
    case = make_case(family, "casa", casa_image_updates=updates)
    rows = torch.tensor([[0, *ONE_GROUP], [0] * (len(ONE_GROUP) - 2) + [7, 8, 9]])
    mask = torch.tensor([[False, *(True for _ in ONE_GROUP)], [False] * (len(ONE_GROUP) - 2) + [True] * 3])
    outputs = case.model(rows, attention_mask=mask.long(), **case.images, output_router_logits=True)
    counted = [logits[mask.flatten()] for logits in outputs.router_logits]
    of_images = list(outputs.image_router_logits or ())
    assert {len(logits) for logits in of_images} == ({routed} if routed else set())
    expected = balance([*counted, *of_images], chosen=2)
    assert relative_error(outputs.aux_loss, expected) < 1e-5


@families
@pytest.mark.parametrize("reentrant", [False, True])
def test_loss_has_gradients_under_gradient_checkpointing(family: str, reentrant: bool) -> None:
    config = FAMILIES[family].casa_config(casa_image_updates="full")
    config.text_config.output_router_logits = True  # where Trainer and TRL look for it
    model = randomised(CasaForConditionalGeneration(config)).train()
    one = sample("2 2x3 3 1x2 2", 0, FAMILIES[family].num_deepstack)
    ids, images = torch.tensor([one.input_ids]), image_inputs(list(one.images))

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        outputs = model(ids, use_cache=False, **images)
        outputs.aux_loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    for name in ("layers.0.mlp.gate.weight", "layers.2.mlp.gate.weight", "layers.0.mlp.experts.down_proj"):
        assert plain[f"model.language_model.{name}"].abs().sum() > 0
    # The newer of the two names that Transformers has had for it.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    checkpointed = gradients()
    assert all(torch.equal(checkpointed.pop(name), gradient) for name, gradient in plain.items())
    assert not any(gradient.any() for gradient in checkpointed.values())


@families
def test_batches_of_an_update_share_the_loss_of_routers(family: str) -> None:
    """As they share the targets: Trainer adds up the losses of batches, and doesn't divide the sum."""
    case = make_case(family, "casa")
    labels = torch.tensor([[5, -100, 7, 8, 9]]), torch.tensor([[5, 6, -100, -100, 9]])
    losses = []
    for targets in labels:
        outputs = case.model(
            torch.tensor([[5, 6, 7, 8, 9]]), labels=targets, output_router_logits=True, num_items_in_batch=5
        )
        plain = case.model(torch.tensor([[5, 6, 7, 8, 9]]), labels=targets, num_items_in_batch=5)
        losses.append((outputs.loss - plain.loss) / outputs.aux_loss)
    assert relative_error(torch.stack(losses), 0.3 * torch.tensor([3 / 5, 2 / 5])) < 1e-5


def test_families_without_experts_have_no_such_loss() -> None:
    outputs = CasaForConditionalGeneration(casa_config())(torch.tensor([[5, 6, 7]]), output_router_logits=True)
    assert outputs.router_logits is None and outputs.aux_loss is None


# ------------------------------------------------------------------------------------- making a model


@families
def test_new_models_have_experts_of_the_stock_size(family: str) -> None:
    """Transformers leaves parameters that it doesn't know as they lie in memory."""
    model = CasaForConditionalGeneration(FAMILIES[family].casa_config())
    parts = re.compile(r"\.mlp\.(experts\.|gate\.weight)")
    found = {name: parameter for name, parameter in model.named_parameters() if parts.search(name)}
    assert len(found) == 3 * len(WITH_EXPERTS[family])
    for name, parameter in found.items():
        assert abs(parameter.std() / 0.02 - 1) < 0.2 and abs(parameter.mean()) < 0.005, name


@families
def test_implementations_of_experts(family: str, tmp_path: Path) -> None:
    """Each is reached from the outermost class, by a call and at loading, and computes the same."""
    model = randomised(CasaForConditionalGeneration(FAMILIES[family].casa_config("exact"))).float()
    model.save_pretrained(tmp_path)
    one = sample("2 2x3 3", 0, FAMILIES[family].num_deepstack)
    ids = torch.tensor([one.input_ids])
    images = {name: x.float() if x.is_floating_point() else x for name, x in image_inputs(list(one.images)).items()}
    model.set_experts_implementation("eager")
    expected = model(ids, **images).logits
    for name in ("batched_mm", "grouped_mm"):
        model.set_experts_implementation(name)
        loaded = CasaForConditionalGeneration.from_pretrained(tmp_path, experts_implementation=name)
        for one_of_two in (model, loaded):
            assert one_of_two.model.language_model.layers[0].mlp.experts.config._experts_implementation == name
            assert relative_error(one_of_two(ids, **images).logits, expected) < 1e-5
    loaded = CasaForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.model.language_model.config._experts_implementation == "grouped_mm"  # the stock default
    with pytest.raises(ValueError, match="fastest"):
        model.set_experts_implementation("fastest")
    with pytest.raises(ValueError, match="does not support setting experts implementation"):
        CasaForConditionalGeneration(casa_config()).set_experts_implementation("grouped_mm")


@pytest.mark.slow
@families
def test_a_decoding_step_compiles_as_a_whole(family: str) -> None:
    torch._dynamo.reset()
    text: dict[str, Any] = {"num_hidden_layers": 1}
    if (kinds := FAMILIES[family].text.get("layer_types")) is not None:
        text = {"num_hidden_layers": 2, "layer_types": kinds[:2]}
    case = make_case(family, "casa", text=text)
    cache = StaticCache(config=case.model.config.text_config, max_cache_len=32)
    case.casa(ONE_GROUP, cache=cache)
    graphs = []

    def counting(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    step = torch.compile(case.model, backend=counting, fullgraph=True)
    ids = [*ONE_GROUP, 10, 11]
    for token in ids[-2:]:
        logits = step(torch.tensor([[token]]), cache=cache).logits
    assert len(graphs) == 1
    assert relative_error(logits[0, -1], case.casa(ids)[-1]) < 1e-5
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------- files


def test_a_part_of_the_experts_is_read_in_either_layout() -> None:
    """What a process has of them under expert or tensor parallelism, which is cut out before it is turned."""
    with torch.device("meta"):
        model = CasaForConditionalGeneration(FAMILIES["qwen3_vl_moe_text"].casa_config())
    converters = BACKBONES["qwen3_vl_moe_text"].block.weight_converters()
    names = {"gate_up_proj": (5, 80, 64), "down_proj": (5, 64, 40)}
    for converter, (name, whole) in zip(converters, names.items(), strict=True):
        full_name = f"model.language_model.layers.0.mlp.experts.{name}"
        assert model.get_parameter(full_name).shape == whole
        of_three, half = (3, *whole[1:]), tuple(n // 2 if n != 64 else n for n in whole[1:])
        for shape in (whole, of_three, (5, *half)):
            found = random_tensor(name, shape)
            options = {"model": model, "full_layer_name": full_name}
            for stored in (found, found.mT) if shape != (5, *half) else (found,):
                [read] = converter.operations[0].convert({name: [stored]}, [name], [full_name], **options).values()
                assert torch.equal(read, found)


def together(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Experts that are stored one by one, in one tensor for each projection of all, as they are in memory."""
    experts = re.compile(r"(.*\.mlp\.experts\.)(\d+)\.(gate|up|down)_proj\.weight")
    stacked: dict[str, Tensor] = {name: tensor for name, tensor in tensors.items() if not experts.fullmatch(name)}
    for block in sorted({found[1] for name in tensors if (found := experts.fullmatch(name))}):
        by_part = {
            part: torch.stack([tensors[f"{block}{expert}.{part}_proj.weight"] for expert in range(6)])
            for part in ("gate", "up", "down")
        }
        stacked[f"{block}gate_up_proj"] = torch.cat([by_part["gate"], by_part["up"]], dim=1)
        stacked[f"{block}down_proj"] = by_part["down"]
    return stacked


def test_experts_one_by_one_and_together(tmp_path: Path) -> None:
    """Qwen3.5-MoE is published with all experts in a tensor; the stock class saves them one by one. Files stay as they
    are, and loading reads both."""
    saved = build_tiny_source(tmp_path / "saved", family="qwen3_5_moe")
    published = altered(saved, tmp_path / "published", weights=together)
    names = "model.language_model.layers.0.mlp.experts.4.up_proj.weight", "mlp.experts.gate_up_proj"
    assert names[0] in load_weights(saved) and any(name.endswith(names[1]) for name in load_weights(published))
    stock = Qwen3_5MoeForConditionalGeneration.from_pretrained(saved).state_dict()
    for source in (saved, published):
        stored = load_weights(source)
        casa, back = tmp_path / f"casa-{source.name}", tmp_path / f"back-{source.name}"
        report = convert_checkpoint(source, casa)
        assert report.source_parameters == sum(tensor.numel() for tensor in stored.values())
        check_checkpoint(casa)
        convert_to_source(casa, back)
        again = load_weights(back)
        assert again.keys() == stored.keys() and all(torch.equal(again[name], stored[name]) for name in stored)
        for folder in (source, casa):
            model, info = CasaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
            weights = model.state_dict()
            assert not (info["unexpected_keys"] or info["mismatched_keys"])
            assert all(torch.equal(weights[name], tensor) for name, tensor in stock.items())
        loaded = Qwen3_5MoeForConditionalGeneration.from_pretrained(back).state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in stock.items())
        summaries = inspect_checkpoint(casa)
        assert summaries.active_parameters == sum(
            tensor.numel() // (3 if ".mlp.experts." in name else 1) for name, tensor in weights.items()
        )


@pytest.mark.parametrize(("expert", "part"), [(0, "down"), (3, "down"), (3, "up")])
def test_a_missing_expert_is_named(tmp_path: Path, expert: int, part: str) -> None:
    """By a conversion and by loading, of a source and of a CASA checkpoint."""
    saved = build_tiny_source(tmp_path / "saved", family="qwen3_5_moe")
    lost = f"model.language_model.layers.2.mlp.experts.{expert}.{part}_proj.weight"
    kept = {name: tensor for name, tensor in load_weights(saved).items() if name != lost}
    broken = altered(saved, tmp_path / "broken", weights=lambda _: kept)
    with pytest.raises(CheckpointError, match=rf"lacks 1 tensors of Qwen3.5-MoE: {re.escape(lost)}"):
        convert_checkpoint(broken, tmp_path / "casa")
    convert_checkpoint(saved, tmp_path / "whole")
    kept = {name: tensor for name, tensor in load_weights(tmp_path / "whole").items() if name != lost}
    for folder in (broken, altered(tmp_path / "whole", tmp_path / "broken-casa", weights=lambda _: kept)):
        for kind in (CasaForConditionalGeneration, CasaModel):
            with pytest.raises(ValueError, match=rf"{folder} lacks 1 tensors of .*: {re.escape(lost)}\. Download"):
                kind.from_pretrained(folder)


def in_the_layout_of_the_hub(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(zip(tensors, older_layout(tensors).values(), strict=True))


def test_the_layout_of_the_hub_goes_through_all_files(tmp_path: Path) -> None:
    """Its matrices of experts are transposed in memory. Files hold them as they were found, and loading turns them:
    of the source, of the conversion, and of the way back."""
    saved = build_tiny_source(tmp_path / "saved", family="qwen3_vl_moe")
    hub = altered(saved, tmp_path / "hub", weights=in_the_layout_of_the_hub)
    stored = load_weights(hub)
    name = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    assert stored[name].shape == (6, 64, 80)
    assert load_weights(saved)[name].shape == (6, 80, 64)

    casa, back = tmp_path / "casa", tmp_path / "back"
    report = convert_checkpoint(hub, casa)
    assert torch.equal(load_weights(casa)[name], stored[name])
    assert report.source_parameters == sum(tensor.numel() for tensor in stored.values())
    convert_to_source(casa, back)
    assert all(torch.equal(tensor, stored[key]) for key, tensor in load_weights(back).items())

    stock = Qwen3VLMoeForConditionalGeneration.from_pretrained(saved).state_dict()
    assert torch.equal(Qwen3VLMoeForConditionalGeneration.from_pretrained(back).state_dict()[name], stock[name])
    for folder in (saved, hub, casa):
        model, info = CasaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
        weights = model.state_dict()
        assert not (info["unexpected_keys"] or info["mismatched_keys"])
        assert all(torch.equal(weights[key], tensor) for key, tensor in stock.items())
    check_checkpoint(casa)

    # What a model writes is in the layout of memory, like what the stock class writes.
    model.save_pretrained(tmp_path / "trained")
    assert load_file(tmp_path / "trained" / "model.safetensors")[name].shape == (6, 80, 64)
    again = CasaForConditionalGeneration.from_pretrained(tmp_path / "trained").state_dict()
    assert all(torch.equal(again[key], tensor) for key, tensor in weights.items())


def test_the_head_is_tied_as_the_stock_model_ties_it(tmp_path: Path) -> None:
    """The text configuration of Qwen3-VL-MoE says by default that it is; the stock model looks at the whole one."""
    family = FAMILIES["qwen3_vl_moe_text"]
    for tied in (False, True):
        source = family.source_config(tie_word_embeddings=True)
        source.tie_word_embeddings = tied
        stock = family.source(source)
        assert (stock.lm_head.weight is stock.get_input_embeddings().weight) == tied
        folder = tmp_path / str(tied)
        CasaForConditionalGeneration(CasaConfig.from_source(source)).save_pretrained(folder)
        config = CasaConfig.from_pretrained(folder)
        assert config.tie_word_embeddings == tied and config.text_config.tie_word_embeddings
        model = CasaForConditionalGeneration.from_pretrained(folder)
        assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    # As the Hub's files have it: nothing in the text configuration.
    content = json.loads(family.source_config().to_json_string())
    del content["text_config"]["tie_word_embeddings"]
    assert not CasaConfig.from_source(content).tie_word_embeddings


def test_inspection_and_conversion_tell_what_a_token_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    convert_checkpoint(build_tiny_source(tmp_path / "source", family="qwen3_vl_moe"), tmp_path / "casa")
    summary = inspect_checkpoint(tmp_path / "casa")
    model = CasaForConditionalGeneration.from_pretrained(tmp_path / "casa")
    idle = sum(p[0].numel() * 4 for name, p in model.named_parameters() if ".mlp.experts." in name)  # 4 of 6
    assert summary.backbone == "Qwen3-VL-MoE"
    assert summary.active_parameters == summary.source_parameters + summary.added_parameters - idle
    run = Cli(monkeypatch, capsys)
    active = f"{summary.active_parameters:,}"
    assert f"{summary.added_parameters:,} added; {active} active per token\n" in run("inspect", tmp_path / "casa").out
    # Conversion says so before, after, and in the card.
    command = "convert", tmp_path / "source", tmp_path / "again"
    assert f"{summary.added_parameters:,} new; {active} active per token. Nothing" in run(*command, "--dry-run").out
    assert f"{summary.added_parameters:,} new ones; {active} active per token.\n" in run(*command).out
    assert f" {active} are active per token. " in (tmp_path / "again" / "README.md").read_text()
    back = run("convert", tmp_path / "casa", tmp_path / "back", "--to-source").out
    assert f"; {summary.source_parameters - idle:,} active per token.\n" in back


@families
@pytest.mark.parametrize("updates", ["none", "ffn"])
def test_counted_sizes_and_work(family: str, updates: str) -> None:
    """The formulas of the benchmarks, against the parameters of a model and PyTorch's own count of FLOPs."""
    model = randomised(CasaForConditionalGeneration(FAMILIES[family].casa_config(casa_image_updates=updates)))
    config = model.config
    language = sum(p.numel() for name, p in model.named_parameters() if ".language_model." in name)
    assert language_parameters(config) == language
    experts = [p for name, p in model.named_parameters() if ".mlp.experts." in name]
    idle = sum(p[0].numel() * 3 for p in experts)  # 3 of 5
    assert step_bytes(config, 8, 0, 0, 0) == 8 * (language - idle)

    one = sample("1 2x3 2", 0, FAMILIES[family].num_deepstack)
    ids, images = torch.tensor([one.input_ids]), image_inputs(list(one.images))
    with FlopCounterMode(display=False) as counter:
        model(ids, logits_to_keep=1, **images)
    mlps = sum(
        sum(of_module.values())
        for name, of_module in counter.get_flop_counts().items()
        if re.fullmatch(r"CasaForConditionalGeneration\.model\.language_model\.layers\.\d\.mlp", name)
    )
    assert mlps == (ids.numel() + (6 if updates == "ffn" else 0)) * Dimensions.of(config).mlp


# ------------------------------------------------------------------------------------- adapters


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's name for it
def test_adapters_reach_the_experts(tmp_path: Path) -> None:
    """By default where the whole language model gets them; they are saved, loaded and merged."""
    peft = pytest.importorskip("peft")
    folder = convert_checkpoint(
        build_tiny_source(tmp_path / "source", family="qwen3_vl_moe"), tmp_path / "casa"
    ).output
    ids = torch.tensor([[5, 6, 7, 8, 9]])

    def model() -> Any:
        return CasaForConditionalGeneration.from_pretrained(folder)

    before = model()(ids).logits
    adapted = add_adapters(model(), {"r": 2, "target_modules": "language-model", "init_lora_weights": "no"})
    trained = {name.split(".lora_")[0] for name, p in adapted.named_parameters() if p.requires_grad}
    layers = "base_model.model.model.language_model.layers"
    assert {f"{layers}.{index}.mlp.experts" for index in (0, 2)} <= trained  # around the outer matrix
    assert {f"{layers}.{index}.mlp.experts.base_layer" for index in (0, 2)} <= trained  # and the inner one
    assert f"{layers}.1.mlp.gate_proj" in trained and f"{layers}.0.self_attn.q_proj" in trained
    assert {part.name for part in trainable_parts(adapted)} >= {"experts", "routers", "MLPs", "adapters"}
    after = adapted(ids).logits
    assert not torch.allclose(before, after, atol=1e-2)
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(model(), tmp_path / "adapter")
    assert torch.equal(loaded(ids).logits, after)
    assert relative_error(loaded.merge_and_unload()(ids).logits, after) < 1e-4

    without = add_adapters(model(), {"r": 2, "target_modules": "language-model", "target_parameters": []})
    assert not any(".mlp.experts." in name for name, p in without.named_parameters() if p.requires_grad)
    with pytest.raises(ValueError, match=r"lora_dropout=0\.1 can't be used with adapters of experts"):
        add_adapters(model(), {"target_modules": "language-model", "lora_dropout": 0.1})
