# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""What `from_pretrained` refuses, and what it goes on loading as Transformers does."""

from __future__ import annotations

import json
import shutil

import peft
import pytest
import torch
from packaging import version
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.integrations.peft import MIN_PEFT_VERSION

from casa_hf import CasaConfig, CasaForConditionalGeneration, CasaModel, convert_checkpoint
from casa_hf.design_space import VARIANTS
from casa_hf.modeling_casa import CasaPreTrainedModel
from tests.conversion.helpers import INDEX, altered

FUSION = "model.language_model.layers.1.casa_attn."


@pytest.fixture
def without(casa_folder, tmp_path):
    """A copy of the checkpoint without the tensors whose names hold a part."""

    def copy(part, folder=casa_folder):
        return altered(
            folder, tmp_path / "altered", lambda weights: {n: w for n, w in weights.items() if part not in n}
        )

    return copy


def refused(folder, *words, **options):
    for load in (CasaForConditionalGeneration, AutoModelForImageTextToText):
        with pytest.raises(ValueError) as error:
            load.from_pretrained(folder, **options)
        assert "\n" not in str(error.value)
        for word in (str(folder), *words):
            assert word in str(error.value)


@pytest.mark.parametrize("part", [f"{FUSION}q_proj", "layers.0.mlp.up_proj", "lm_head", "visual.patch_embed"])
def test_missing_tensors(without, part):
    refused(without(part), part, "ignore_mismatched_sizes")


def test_renamed_tensors(casa_folder, tmp_path):
    def rename(weights):
        return {name.replace("casa_attn", "cross_attn"): tensor for name, tensor in weights.items()}

    refused(
        altered(casa_folder, tmp_path / "renamed", rename), "lacks 24 tensors", "layers.0.casa_attn", "0.cross_attn"
    )


def test_no_fusion_layers_at_all(casa_folder, source_folder, tmp_path):
    """Weights of the source beside a converted configuration aren't an unconverted source."""
    folder = altered(casa_folder, tmp_path / "casa")
    shutil.copyfile(source_folder / "model.safetensors", folder / "model.safetensors")
    refused(folder, "lacks 24 tensors", "casa_attn")


def test_missing_tensors_of_the_base_model(without):
    with pytest.raises(ValueError, match=r"lacks 2 tensors.*casa_attn\.q_proj"):
        CasaModel.from_pretrained(without(f"{FUSION}q_proj"))


def test_missing_tensors_of_a_source(source_folder, without):
    folder = without("layers.1.self_attn.q_proj", source_folder)
    with pytest.raises(ValueError, match=r"lacks \d tensors.*layers\.1\.self_attn\.q_proj"):
        CasaForConditionalGeneration.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"lacks \d tensors.*layers\.1\.casa_attn\.q_proj"):
        CasaForConditionalGeneration.from_pretrained(folder, casa_variant="ca-replace")


def test_asked_for(without):
    folder = without(f"{FUSION}q_proj")
    CasaForConditionalGeneration.from_pretrained(folder, ignore_mismatched_sizes=True)
    _, info = CasaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert info["missing_keys"] == {f"{FUSION}q_proj.{name}" for name in ("weight", "bias")}
    weights = load_file(folder / "model.safetensors")
    CasaForConditionalGeneration.from_pretrained(None, config=CasaConfig.from_pretrained(folder), state_dict=weights)


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_unconverted_source(source_folder, variant):
    config = CasaForConditionalGeneration.from_pretrained(source_folder, casa_variant=variant).config
    assert config.variant == variant


def test_tensors_that_a_setting_adds(source_folder, casa_folder, tmp_path, without):
    """They start as a conversion starts them."""
    gated = CasaForConditionalGeneration.from_pretrained(casa_folder, casa_gate="tanh")
    gates = [tensor for name, tensor in gated.named_parameters() if name.endswith("gate")]
    assert len(gates) == 3 and not torch.cat(gates).any()

    expected = CasaForConditionalGeneration.from_pretrained(casa_folder).state_dict()
    some = convert_checkpoint(source_folder, tmp_path / "some", casa_layers=[1]).output
    shared = convert_checkpoint(source_folder, tmp_path / "shared", "casa-shared").output
    config = CasaConfig.from_pretrained(shared)
    config.casa_share_projections = False
    for model in (
        CasaForConditionalGeneration.from_pretrained(some, casa_layers=None),
        CasaForConditionalGeneration.from_pretrained(some, casa_layers=[0, 1, 2]),
        CasaForConditionalGeneration.from_pretrained(shared, casa_share_projections=False),
        CasaForConditionalGeneration.from_pretrained(shared, config=config),
    ):
        torch.testing.assert_close(model.state_dict(), expected, rtol=0, atol=0)
    # What was there before the setting is still missed.
    refused(
        without("image_norm", some),
        "lacks 1 tensors",
        f"{FUSION}image_norm.weight",
        casa_layers=None,
    )


def test_a_head_that_is_not_tied_any_more(casa_folder, tmp_path):
    config = CasaConfig.from_pretrained(casa_folder)
    config.tie_word_embeddings = True
    CasaForConditionalGeneration(config).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert CasaForConditionalGeneration.from_pretrained(tmp_path).config.tie_word_embeddings
    model = CasaForConditionalGeneration.from_pretrained(tmp_path, tie_word_embeddings=False)
    assert model.lm_head.weight is not model.get_input_embeddings().weight


class CasaForScores(CasaPreTrainedModel):
    """A class of somebody else's, with a head of its own."""

    def __init__(self, config):
        super().__init__(config)
        self.model = CasaModel(config)
        self.score = torch.nn.Linear(config.text_config.hidden_size, 1)
        self.post_init()


def test_heads(casa_folder, tmp_path, without):
    """Another class's head is new, as everywhere in Transformers; one's own is not."""
    CasaModel.from_pretrained(casa_folder).save_pretrained(tmp_path / "base")
    CasaForConditionalGeneration.from_pretrained(tmp_path / "base")
    CasaForScores.from_pretrained(casa_folder).save_pretrained(tmp_path / "scores")
    CasaForScores.from_pretrained(tmp_path / "scores")
    CasaForConditionalGeneration.from_pretrained(tmp_path / "scores")
    with pytest.raises(ValueError, match=r"lacks 2 tensors.*score\.bias"):
        CasaForScores.from_pretrained(without("score", tmp_path / "scores"))


# PEFT's own.
@pytest.mark.skipif(
    version.parse(peft.__version__) < version.parse(MIN_PEFT_VERSION), reason="Transformers wants a newer PEFT"
)
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters(casa_folder, tmp_path, without):
    base = without("nothing")
    model = peft.get_peft_model(
        CasaForConditionalGeneration.from_pretrained(base), peft.LoraConfig(target_modules=["q_proj"])
    )
    model.save_pretrained(tmp_path / "adapter")
    loaded = CasaForConditionalGeneration.from_pretrained(tmp_path / "adapter")
    assert loaded.active_adapters() == ["default"]
    weights = load_file(base / "model.safetensors")
    del weights[f"{FUSION}k_proj.weight"]
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 tensors.*k_proj\.weight"):
        CasaForConditionalGeneration.from_pretrained(tmp_path / "adapter")


def test_shards_on_a_device(casa_folder, tmp_path):
    CasaForConditionalGeneration.from_pretrained(casa_folder).save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / INDEX).is_file()
    model = CasaForConditionalGeneration.from_pretrained(tmp_path, device_map="cpu", dtype="bfloat16")
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["../outside.safetensors", "sub/../../outside.safetensors", "absolute"])
def test_weights_outside_the_folder(casa_folder, tmp_path, name):
    folder = altered(casa_folder, tmp_path / "casa")
    (folder / "sub").mkdir()
    outside = (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    name = str(outside) if name == "absolute" else name
    (folder / INDEX).write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(load_file(outside), name)})
    )
    refused(folder, "leads out of", str(outside))
    (folder / INDEX).unlink()
    (folder / "model.safetensors").symlink_to(outside)
    refused(folder, "leads out of", str(outside))


def test_the_download_cache_is_one_folder(casa_folder, tmp_path, monkeypatch):
    snapshot = tmp_path / "models--me--casa" / "snapshots" / "0123"
    (snapshot.parents[1] / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(casa_folder.iterdir())):
        blob = shutil.copyfile(file, snapshot.parents[1] / "blobs" / f"{number:040x}")
        (snapshot / file.name).symlink_to(blob)
    CasaForConditionalGeneration.from_pretrained(snapshot)
    (tmp_path / "link").symlink_to(casa_folder)
    CasaForConditionalGeneration.from_pretrained(tmp_path / "link")
    monkeypatch.chdir(tmp_path)
    CasaForConditionalGeneration.from_pretrained("link")


def test_a_stock_class_takes_no_part_for_the_whole(casa_folder, tmp_path):
    """It doesn't build a model of its defaults, 80 blocks of 8,192 channels, and knows what it was given."""
    stock = Qwen2_5_VLForConditionalGeneration.from_pretrained(casa_folder)
    assert stock.config.text_config.num_hidden_layers == 3
    content = json.loads((casa_folder / "config.json").read_text())
    assert content["source_config"]["source_model_type"] == Qwen2_5_VLConfig.model_type
    assert "model_type" not in content["source_config"]
    # Earlier versions wrote the bare name.
    old = altered(
        casa_folder,
        tmp_path / "old",
        config=lambda content: content["source_config"].update(
            model_type=content["source_config"].pop("source_model_type")
        ),
    )
    assert CasaConfig.from_pretrained(old).source_config == CasaConfig.from_pretrained(casa_folder).source_config
