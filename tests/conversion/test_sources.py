# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Sources that can't be converted: each gets one line that says what to do, and nothing is written."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch

from casa_hf import CheckpointError
from casa_hf.conversion import convert_checkpoint, convert_to_source
from examples.tiny_source import build_tiny_helium
from tests.conversion.helpers import altered, assert_refused

NORM = "model.norm.weight"


@pytest.fixture
def source(source_folder, tmp_path):
    """A copy that a test may break."""
    return altered(source_folder, tmp_path / "source")


def set_config(folder: Path, **fields: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize("model_type", ["gemma", "phi3", None])
def test_other_models(source, tmp_path, model_type):
    set_config(source, model_type=model_type)
    assert_refused(source, tmp_path / "casa", f"model_type {model_type!r}", "Qwen2.5-VL (model_type 'qwen2_5_vl')")


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "CASA_Qwen2_5_VL_3B"},
        {"architectures": ["CASAForCausalLM"]},
        {"model_type": "other", "auto_map": {"AutoModel": "modeling_casa.Model"}},
    ],
)
def test_checkpoints_of_the_authors(source, tmp_path, fields):
    """By any of these names they are read by rules (test_authors.py); this one has Qwen's tensors alone."""
    set_config(source, **fields)
    assert_refused(source, tmp_path / "casa", "doesn't tell all of its design", "casa_keys", "pre_image_tokens")
    text = build_tiny_helium(tmp_path / "text")
    assert_refused(text, tmp_path / "casa", "of the method's authors", "Convert it first", vision_from=source)


@pytest.mark.parametrize("part", [None, "text_config"])
def test_quantized(source, tmp_path, part):
    settings = {"quantization_config": {"quant_method": "awq", "bits": 4}}
    content = json.loads((source / "config.json").read_text())
    set_config(source, **(settings if part is None else {part: content[part] | settings}))
    assert_refused(source, tmp_path / "casa", "quantized", "unquantized original")


def test_sliding_window(source, tmp_path):
    content = json.loads((source / "config.json").read_text())
    text = content["text_config"] | {"use_sliding_window": True, "sliding_window": 64, "layer_types": None}
    set_config(source, text_config=text)
    with pytest.raises(ValueError, match="sliding-window"):
        assert_refused(source, tmp_path / "casa")


def test_no_such_folder(source_folder, tmp_path):
    assert_refused(tmp_path / "nowhere", tmp_path / "casa", "nowhere is not a folder", "Hub id")
    assert_refused(source_folder / "config.json", tmp_path / "casa", "config.json is not a folder")
    assert_refused("", tmp_path / "casa", "is not a folder")
    assert_refused(source_folder, tmp_path / "casa", "revision='main'", "local folder", revision="main")


def test_missing_files(source, tmp_path):
    for name, words in (
        ("preprocessor_config.json", ("no image processor", "preprocessor_config.json")),
        ("tokenizer.json", ("no tokenizer", "merges.txt")),
        ("config.json", ("no config.json", "complete")),
    ):
        (source / name).unlink()
        assert_refused(source, tmp_path / "casa", *words)


@pytest.mark.parametrize("content", ["{", "[1]", '{"model_type": "qwen2_5_vl", "text_config": 3}', "\xff"])
def test_broken_configuration(source, tmp_path, content):
    (source / "config.json").write_text(content, encoding="latin-1")
    assert_refused(source, tmp_path / "casa", "config.json")


@pytest.mark.parametrize("name", ["tokenizer.json", "preprocessor_config.json"])
def test_broken_processor(source, tmp_path, name):
    (source / name).write_text('{"image_processor_type": "Unheard"}')
    assert_refused(source, tmp_path / "casa", "tokenizer or image processor", str(source))


def test_too_few_pixels(source_folder, casa_folder, tmp_path):
    """The option is to blame, not the files; from a source and from a CASA checkpoint."""
    for folder in (source_folder, casa_folder):
        message = assert_refused(folder, tmp_path / "casa", "max_pixels=10", "3136", max_pixels=10)
        assert "unusable" not in message


def test_tokenizer_without_vision_tokens(source, tmp_path):
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [t for t in tokenizer["added_tokens"] if "vision_end" not in t["content"]]
    del tokenizer["model"]["vocab"]["<|vision_end|>"]
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings.pop("extra_special_tokens", None)
    settings.pop("added_tokens_decoder", None)
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    assert_refused(source, tmp_path / "casa", "<|vision_end|>")


def test_truncated_weights(source, tmp_path):
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert_refused(source, tmp_path / "casa", str(file), "Download it again")


def test_weights_that_dont_fit(source_folder, tmp_path):
    def drop(tensors):
        return {name: tensor for name, tensor in tensors.items() if name != NORM}

    def add(tensors):
        return tensors | {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 2)}

    def widen(tensors):
        return tensors | {NORM: torch.ones(65)}

    def repeat(tensors):
        return tensors | {"model.language_model.norm.weight": torch.ones(64)}

    for number, (change, *words) in enumerate(
        [
            (drop, "model.language_model.norm.weight", "lacks 1 tensors"),
            (add, "model.layers.0.self_attn.q_proj.lora_A.weight", "adapters merged"),
            (widen, f"{NORM} is [65], expected [64]"),
            (repeat, NORM, "under two names"),
        ]
    ):
        source = altered(source_folder, tmp_path / f"source{number}", weights=change)
        assert_refused(source, tmp_path / "casa", *words)


def test_weights_of_another_size(source_folder, tmp_path):
    def deepen(config):
        config["text_config"]["num_hidden_layers"] = 4
        config["text_config"]["layer_types"] = None

    source = altered(source_folder, tmp_path / "source", config=deepen)
    assert_refused(source, tmp_path / "casa", "lacks 12 tensors", "model.language_model.layers.3.")


class Bomb:
    """Unpickling this makes a file."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_pickles_are_never_loaded(source, tmp_path):
    exploded = tmp_path / "exploded"
    weights = source / "pytorch_model.bin"
    weights.write_bytes(pickle.dumps(Bomb(exploded)))
    pickle.loads(weights.read_bytes())
    assert exploded.exists()
    exploded.unlink()
    (source / "model.safetensors").unlink()
    assert_refused(source, tmp_path / "casa", "pytorch_model.bin", "never loaded", "save_pretrained")
    assert not exploded.exists()


# -------------------------------------------------------------------- files of others, files that change


@pytest.mark.parametrize("name", ["LICENSE", "README.md", "config.json", "tokenizer.json", "generation_config.json"])
def test_a_link_out_of_the_folder(source, tmp_path, name):
    """Neither copied nor read."""
    if (source / name).exists():
        (source / name).rename(tmp_path / "secret")
    else:
        (tmp_path / "secret").write_text("secret")
    (source / name).symlink_to(tmp_path / "secret")
    assert_refused(source, tmp_path / "casa", f"{name!r} leads out of {source}", str(tmp_path / "secret"), "copy")
    # Inside it may have any name.
    (source / name).unlink()
    (source / "files").mkdir()
    (tmp_path / "secret").rename(source / "files" / "any")
    (source / name).symlink_to("files/any")
    convert_checkpoint(source, tmp_path / "casa")
    assert not (tmp_path / "casa" / name).is_symlink()


CHANGES = {
    "tokenizer.json": lambda file: file.write_text(file.read_text() + " "),
    "chat_template.jinja": lambda file: file.unlink(),
    "LICENSE": lambda file: file.write_text("mine"),
    "config.json": lambda file: file.replace(file.with_name("other")) and file.write_text("{}"),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("back", [False, True])
def test_small_files_that_change(source_folder, casa_folder, tmp_path, name, back):
    """In time: some of them are read before the weights are copied, others behind them."""
    folder = altered(casa_folder if back else source_folder, tmp_path / "source")
    convert = convert_to_source if back else convert_checkpoint
    changes = [CHANGES[name]]

    def change(done, total):
        if changes:
            changes.pop()(folder / name)

    with pytest.raises(CheckpointError, match=f"^{folder / name} was changed while it was read"):
        convert(folder, tmp_path / "output", progress=change)
    assert not (tmp_path / "output").exists() and not list(tmp_path.glob("*incomplete*"))
