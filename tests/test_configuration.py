# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Every field of the configuration is checked, and every setting survives saving."""

import json

import pytest
import torch
from transformers import AutoConfig, MistralConfig, Qwen2_5_VLConfig

from casa_hf import CasaConfig, CasaForConditionalGeneration
from casa_hf.design_space import CHOICES, VARIANTS

TEXT = {
    "model_type": "qwen2_5_vl_text",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "bos_token_id": None,
    "eos_token_id": 3,
    "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1000000.0},
}
VISION = {
    "depth": 2,
    "hidden_size": 32,
    "num_heads": 2,
    "intermediate_size": 48,
    "out_hidden_size": 64,
    "fullatt_block_indexes": [1],
}
TOKENS = {"image_token_id": 11, "vision_start_token_id": 10, "vision_end_token_id": 11}


def config(**fields):
    return CasaConfig(text_config=TEXT, vision_config=VISION, **{**TOKENS, **fields})


def source_config(**fields):
    ids = {"image_token_id": 12, "video_token_id": 13, "vision_start_token_id": 10, "vision_end_token_id": 11}
    return Qwen2_5_VLConfig(text_config=TEXT, vision_config=VISION, **{**ids, **fields})


# What the table of named variants says, written out a second time.
TABLE = {
    "casa": {},
    "ca": {"casa_keys": "image"},
    "ca-shared": {"casa_keys": "image", "casa_share_projections": True},
    "casa-shared": {"casa_share_projections": True},
    "ca-replace": {"casa_keys": "image", "casa_placement": "replace", "casa_layers": [1, 3]},
    "casa-replace": {"casa_placement": "replace", "casa_layers": [1, 3], "casa_text_windows": True},
    "casa-before": {"casa_placement": "before"},
    "ca-ffn": {"casa_keys": "image", "casa_image_updates": "ffn"},
    "casa-ffn": {"casa_image_updates": "ffn"},
    "exact": {
        "casa_share_projections": True,
        "casa_keys": "context",
        "casa_image_updates": "full",
        "casa_positions": "insertion",
    },
    "insertion": {
        "casa_share_projections": True,
        "casa_keys": "context",
        "casa_image_updates": "full",
        "casa_positions": "insertion",
        "casa_image_history": "all",
        "casa_video_history": "all",
    },
}
DEFAULTS = {
    "casa_share_projections": False,
    "casa_keys": "window",
    "casa_layers": None,
    "casa_placement": "parallel",
    "casa_image_updates": "none",
    "casa_image_history": "group",
    "casa_video_history": "latest",
    "casa_positions": "contiguous",
    "casa_image_positions": "at",
    "casa_text_windows": False,
    "casa_image_norm": "input",
    "casa_gate": None,
    "num_gist_tokens": 0,
}


@pytest.mark.parametrize("name", TABLE)
def test_named_variants(name, tmp_path):
    made = CasaConfig.from_variant(name, text_config=TEXT, vision_config=VISION, **TOKENS)
    assert {field: getattr(made, field) for field in DEFAULTS} == {**DEFAULTS, **TABLE[name]}
    assert made.variant == name

    made.save_pretrained(tmp_path)
    for loaded in (CasaConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is CasaConfig
        assert {**loaded.to_dict(), "_name_or_path": ""} == {**made.to_dict(), "_name_or_path": ""}
        assert loaded.variant == name


def test_the_table_is_complete():
    assert set(TABLE) == set(VARIANTS)


def test_variant_is_none_for_other_settings_and_ignores_how_all_layers_are_written():
    assert config(casa_layers=[0, 2]).variant is None
    assert config(casa_layers=[3, 1, 0, 2]).variant == "casa"
    assert config(casa_layers=[3, 1, 0, 2]).fusion_layers == (0, 1, 2, 3)
    assert config(casa_gate="tanh").variant is None
    assert config(num_gist_tokens=1, gist_token_ids=[20]).variant is None


def test_from_variant_takes_overrides_and_refuses_unknown_names():
    made = CasaConfig.from_variant("ca", text_config=TEXT, vision_config=VISION, casa_layers=[1], **TOKENS)
    assert (made.casa_keys, made.casa_layers) == ("image", [1])
    with pytest.raises(ValueError, match=r"variant 'casaa' is unknown; did you mean 'casa'\? Choose one of 'casa',"):
        CasaConfig.from_variant("casaa", text_config=TEXT, vision_config=VISION)


@pytest.mark.parametrize("field", CHOICES)
def test_unknown_values_are_named(field):
    with pytest.raises(ValueError, match=rf"{field}='nonsense' is unknown; .*hoose one of"):
        config(**{field: "nonsense"})


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"casa_keys": "context"}, "casa_keys='context' .* needs casa_share_projections=True"),
        (
            {"casa_keys": "context", "casa_share_projections": True, "casa_gate": "tanh"},
            "casa_keys='context' can't be gated",
        ),
        (
            {"casa_keys": "context", "casa_share_projections": True, "casa_placement": "before"},
            "needs casa_placement='parallel', got 'before'",
        ),
        (
            {"casa_placement": "replace", "casa_share_projections": True, "casa_text_windows": True},
            "'replace' has no self-attention to share with",
        ),
        (
            {"casa_placement": "replace", "casa_image_updates": "full", "casa_text_windows": True},
            "'replace' has no self-attention for casa_image_updates='full'",
        ),
        (
            {"casa_placement": "replace", "casa_gate": "tanh", "casa_text_windows": True},
            "'replace' can't be gated",
        ),
        ({"casa_placement": "replace", "casa_keys": "image"}, "leaves no attention between text"),
        ({"casa_placement": "replace", "casa_layers": [1]}, "set casa_text_windows=True"),
        (
            {"casa_image_norm": "none", "casa_image_updates": "full"},
            "casa_image_norm='none' is for fusion layers alone",
        ),
        (
            {"casa_image_norm": "none", "casa_share_projections": True, "casa_keys": "context"},
            "casa_image_norm='none' is for fusion layers alone",
        ),
        ({"casa_text_windows": True, "casa_keys": "image"}, "casa_text_windows=True is for casa_keys='window'"),
        (
            {"casa_layers": [0, 4]},
            r"casa_layers=\[0, 4\] names block 4; expected .* from 0 to 3, each once\.",
        ),
        ({"casa_layers": [-1]}, "from 0 to 3"),
        ({"casa_layers": [1, 1]}, "names a block twice"),
        ({"casa_layers": []}, "is empty"),
        ({"num_gist_tokens": -1}, "num_gist_tokens=-1 must not be negative"),
        ({"num_gist_tokens": 2}, "num_gist_tokens=2 needs as many distinct gist_token_ids, got None"),
        ({"num_gist_tokens": 2, "gist_token_ids": [20, 20]}, "distinct gist_token_ids"),
        ({"num_gist_tokens": 1, "gist_token_ids": [999]}, "gist_token_ids has 999, which is outside the vocabulary"),
        ({"num_gist_tokens": 1, "gist_token_ids": [11]}, "or an image's delimiter"),
        ({"image_token_id": 300}, "image_token_id=300 is outside the vocabulary of 300 tokens"),
        ({"vision_start_token_id": -5}, "vision_start_token_id=-5 is outside the vocabulary"),
    ],
)
def test_bad_combinations_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        config(**fields)


@pytest.mark.parametrize(
    "fields", [{"casa_share_projections": "yes"}, {"casa_layers": "all"}, {"casa_text_windows": 1.5}]
)
def test_types_are_checked(fields):
    with pytest.raises(Exception, match=next(iter(fields))):
        config(**fields)


def test_backbones_are_checked():
    with pytest.raises(ValueError, match=r"text_config\.model_type is 'mistral', which isn't supported"):
        CasaConfig(text_config=MistralConfig(), vision_config=VISION)
    with pytest.raises(ValueError, match=r"text_config\.model_type is 'no_such_model'"):
        CasaConfig(text_config={"model_type": "no_such_model"})
    with pytest.raises(ValueError, match=r"vision_config\.model_type is 'mistral'"):
        config_with_wrong_tower = MistralConfig()
        CasaConfig(text_config=TEXT, vision_config=config_with_wrong_tower, **TOKENS)
    with pytest.raises(ValueError, match="sliding-window attention switched on"):
        CasaConfig(
            text_config={**TEXT, "use_sliding_window": True, "max_window_layers": 2}, vision_config=VISION, **TOKENS
        )
    with pytest.raises(ValueError, match=r"out_hidden_size=48 must equal text_config.hidden_size=64"):
        CasaConfig(text_config=TEXT, vision_config={**VISION, "out_hidden_size": 48}, **TOKENS)
    with pytest.raises(ValueError, match="text_config must be a dict or a PreTrainedConfig, got str"):
        CasaConfig(text_config="qwen2_5_vl_text")


def test_defaults_make_a_whole_configuration():
    default = CasaConfig()
    assert default.variant == "casa"
    assert default.backbone.display_name == "Qwen2.5-VL"
    assert default.vision_config.out_hidden_size == default.text_config.hidden_size


def test_fields_of_newer_versions_survive(tmp_path):
    config().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "casa_invented_later": [1, 2]}))
    loaded = CasaConfig.from_pretrained(tmp_path)
    assert loaded.casa_invented_later == [1, 2]
    assert loaded.variant == "casa"


def test_from_source_maps_tokens_and_keeps_the_rest(tmp_path):
    source = source_config(tie_word_embeddings=True, dtype="bfloat16")
    source.save_pretrained(tmp_path)
    on_disk = json.loads((tmp_path / "config.json").read_text())
    for made in (
        CasaConfig.from_source(source, "ca-shared"),
        CasaConfig.from_source(on_disk, "ca-shared"),
        CasaConfig.from_pretrained(tmp_path, casa_variant="ca-shared"),
        CasaConfig.from_dict(on_disk, casa_variant="ca-shared"),
    ):
        assert made.variant == "ca-shared"
        # The image stands before <|vision_end|>; the source's placeholder is remembered, to be refused.
        assert (made.image_token_id, made.vision_start_token_id, made.vision_end_token_id) == (11, 10, 11)
        assert made.delimiter_token_ids == (10, 11)
        assert made.placeholder_token_ids == (12, 13)
        assert made.source_config["source_model_type"] == "qwen2_5_vl"
        assert (made.source_config["image_token_id"], made.source_config["video_token_id"]) == (12, 13)
        assert made.tie_word_embeddings
        assert made.dtype == torch.bfloat16
        assert made.text_config.to_dict() == source.text_config.to_dict()
        assert made.vision_config.to_dict() == source.vision_config.to_dict()


def test_a_converted_checkpoint_keeps_its_tensors(tmp_path):
    config().save_pretrained(tmp_path)
    assert CasaConfig.from_pretrained(tmp_path, casa_keys="image").variant == "ca"
    assert CasaConfig.from_pretrained(tmp_path, casa_share_projections=False).variant == "casa"
    for asked in ({"casa_share_projections": True}, {"casa_variant": "ca"}, {"casa_layers": [1]}):
        with pytest.raises(ValueError, match=f"{next(iter(asked))}=.* would change which tensors.*casa-hf convert"):
            CasaConfig.from_pretrained(tmp_path, **asked)


def test_layers_may_be_any_collection():
    assert config(casa_layers=(2, 0)).casa_layers == [0, 2]
    assert config(casa_layers=range(2)).casa_layers == [0, 1]


def test_old_flat_source_configurations_are_read():
    """Checkpoints on the Hub keep the language model's settings at the top level and give the tower the outer type."""
    flat = {"model_type": "qwen2_5_vl", **{k: v for k, v in TEXT.items() if k != "model_type"}}
    flat |= {"vision_config": {**VISION, "model_type": "qwen2_5_vl"}, "vision_start_token_id": 10}
    flat |= {"vision_end_token_id": 11, "image_token_id": 12, "video_token_id": 13}
    flat |= {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}, "rope_theta": 1000000.0}
    made = CasaConfig.from_source(flat)
    assert made.text_config.num_hidden_layers == 4
    assert made.text_config.rope_parameters["mrope_section"] == [2, 3, 3]
    assert made.vision_config.depth == 2


def test_unsupported_sources_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"'mistral' can't be converted to CASA .* Supported: Qwen2-VL .*, Qwen2\.5-VL"
    ):
        CasaConfig.from_source(MistralConfig())
    MistralConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_type 'mistral' can't be converted to CASA models"):
        CasaForConditionalGeneration.from_pretrained(tmp_path)


def test_settings_changed_after_loading_are_checked_when_a_model_is_built():
    changed = config()
    changed.casa_layers = [7]
    with pytest.raises(ValueError, match=r"casa_layers=\[7\] names block 7"):
        CasaForConditionalGeneration(changed)


def test_from_source_shares_nothing_with_the_source():
    source = source_config()
    source._attn_implementation = "sdpa"
    before = source.to_json_string(use_diff=False)
    casa = CasaConfig.from_source(source)
    CasaForConditionalGeneration._from_config(casa, attn_implementation="eager", dtype=torch.float64)
    casa.text_config.hidden_size = casa.vision_config.depth = 1
    assert source.to_json_string(use_diff=False) == before
    assert [c._attn_implementation for c in (source, source.text_config, source.vision_config)] == ["sdpa"] * 3
