# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Conversion from folder to folder: every tensor and file, and what failures leave behind."""

from __future__ import annotations

import filecmp
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    GenerationConfig,
    Qwen2_5_VLConfig,
)

from casa_hf import CasaConfig, CasaForConditionalGeneration, CasaProcessor, CheckpointError
from casa_hf.conversion import convert_checkpoint
from casa_hf.conversion.processor import processor_limits
from casa_hf.design_space import VARIANTS
from examples.tiny_source import build_tiny_source
from tests.conversion.helpers import (
    INDEX,
    altered,
    assert_refused,
    assert_same,
    converted,
    in_memory_layout,
    load_weights,
    stored_names,
)

LAYERS = [0, 1, 2]
BLOCK = "model.language_model.layers"


@pytest.fixture(scope="module")
def tied_source(tmp_path_factory):
    return build_tiny_source(tmp_path_factory.mktemp("tied") / "source", tie_word_embeddings=True)


# -------------------------------------------------------------------- weights


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layout", ["hub", "memory"])
@pytest.mark.parametrize("shards", [False, True])
def test_every_tensor_has_its_name_and_values(source_folder, tied_source, tmp_path, tied, layout, shards):
    source = tied_source if tied else source_folder
    tensors = load_weights(source)
    assert ("lm_head.weight" in tensors) is not tied
    assert "visual.patch_embed.proj.weight" in tensors
    if layout == "memory":
        source = altered(source, tmp_path / "source", weights=in_memory_layout)
    if shards:
        source = split(source, tmp_path / "sharded")
    report = convert_checkpoint(source, tmp_path / "casa", max_shard_size=300_000 if shards else "5GB")

    expected = converted(tensors, LAYERS)
    assert_same(load_weights(tmp_path / "casa"), expected)
    files = sorted(file.name for file in (tmp_path / "casa").glob("*.safetensors"))
    assert (len(files) > 2) is shards and (tmp_path / "casa" / INDEX).exists() is shards
    assert shards or files == ["model.safetensors"]
    assert report.added.keys() == expected.keys() - in_memory_layout(tensors).keys()
    for new, original in report.added.items():
        assert torch.equal(expected[new], expected[original])
    assert report.source_parameters == sum(tensor.numel() for tensor in tensors.values())
    assert report.added_parameters == sum(expected[name].numel() for name in report.added)
    assert report.num_bytes == sum(tensor.nbytes for tensor in expected.values())
    assert report.output == tmp_path / "casa"
    assert report.dropped == {}


def split(source: Path, folder: Path) -> Path:
    """A copy with weights in three shards, dealt out so that no block is in one file."""
    shutil.copytree(source, folder)
    tensors = load_weights(source)
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number in range(3):
        file = f"model-0000{number + 1}-of-00003.safetensors"
        names = list(tensors)[number::3]
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def test_result_doesnt_depend_on_the_sources_layout(source_folder, casa_folder, tmp_path):
    renamed = altered(source_folder, tmp_path / "renamed", weights=in_memory_layout)
    for number, source in enumerate((renamed, split(source_folder, tmp_path / "sharded"))):
        output = convert_checkpoint(source, tmp_path / str(number)).output
        assert filecmp.cmp(output / "model.safetensors", casa_folder / "model.safetensors", shallow=False)


def test_copies_lie_beside_their_originals(casa_folder):
    names = stored_names(casa_folder / "model.safetensors")
    original = "model.language_model.layers.1.self_attn.q_proj.weight"
    assert names[names.index(original) + 1] == original.replace("self_attn", "casa_attn")


@pytest.mark.parametrize("variant", VARIANTS)
def test_loads_completely(source_folder, tmp_path, variant):
    convert_checkpoint(source_folder, tmp_path / "casa", variant)
    model, info = CasaForConditionalGeneration.from_pretrained(tmp_path / "casa", output_loading_info=True)
    assert not any(info.values()), info
    assert model.config.variant == variant


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_loading_the_source_itself(source_folder, tmp_path, variant):
    convert_checkpoint(source_folder, tmp_path / "casa", variant)
    model = CasaForConditionalGeneration.from_pretrained(tmp_path / "casa")
    config = CasaConfig.from_source(Qwen2_5_VLConfig.from_pretrained(source_folder), variant)
    direct = CasaForConditionalGeneration.from_pretrained(source_folder, config=config)
    assert_same(model.state_dict(), direct.state_dict())


@pytest.mark.parametrize(("variant", "blocks"), [("ca", [0, 1, 2]), ("ca-shared", []), ("casa-replace", [1])])
def test_blocks_with_projections_of_their_own(source_folder, tmp_path, variant, blocks):
    report = convert_checkpoint(source_folder, tmp_path / "casa", variant)
    expected = converted(load_weights(source_folder), blocks)
    if variant == "casa-replace":
        expected = {name: t for name, t in expected.items() if not name.startswith(f"{BLOCK}.1.self_attn")}
    assert_same(load_weights(tmp_path / "casa"), expected)
    assert {int(name.split(".")[3]) for name in report.added} == set(blocks)
    assert report.config.variant == variant


def test_tied_head_stays_tied(tied_source, tmp_path):
    convert_checkpoint(tied_source, tmp_path / "casa")
    model = CasaForConditionalGeneration.from_pretrained(tmp_path / "casa")
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, load_weights(tied_source)["model.embed_tokens.weight"])


def test_superfluous_tensors_are_dropped_with_a_reason(tied_source, tmp_path):
    def add(tensors):
        extra = {
            "lm_head.weight": tensors["model.embed_tokens.weight"].clone(),
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        }
        return tensors | extra

    source = altered(tied_source, tmp_path / "source", weights=add)
    report = convert_checkpoint(source, tmp_path / "casa")
    assert_same(load_weights(tmp_path / "casa"), converted(load_weights(tied_source), LAYERS))
    assert report.dropped.keys() == {"lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"}


def test_a_tied_head_with_other_values_is_not_lost(tied_source, tmp_path):
    def add(tensors):
        head = tensors["model.embed_tokens.weight"].clone()
        head[-1, -1] += 1
        return tensors | {"lm_head.weight": head}

    source = altered(tied_source, tmp_path / "source", weights=add)
    assert_refused(source, tmp_path / "casa", "lm_head.weight", "Set tie_word_embeddings to false")
    # The way out that the message gives.
    altered(source, tmp_path / "untied", config=untie)
    convert_checkpoint(tmp_path / "untied", tmp_path / "casa")
    assert_same(load_weights(tmp_path / "casa"), converted(load_weights(source), LAYERS))


def untie(config):
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False


# -------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16, "float64"])
def test_cast(source_folder, tmp_path, dtype):
    target = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    convert_checkpoint(source_folder, tmp_path / "casa", dtype=dtype)
    expected = {name: tensor.to(target) for name, tensor in converted(load_weights(source_folder), LAYERS).items()}
    assert_same(load_weights(tmp_path / "casa"), expected)
    assert CasaForConditionalGeneration.from_pretrained(tmp_path / "casa").dtype == target


def test_dtypes_stay_as_they_are_by_default(source_folder, tmp_path):
    def mix(tensors):
        return {name: t.bfloat16() if name.startswith("model.") else t for name, t in tensors.items()}

    def forget(config):
        del config["dtype"]

    source = altered(source_folder, tmp_path / "source", weights=mix, config=forget)
    report = convert_checkpoint(source, tmp_path / "casa")
    assert_same(load_weights(tmp_path / "casa"), converted(load_weights(source), LAYERS))
    # Not stated by the source: the one of most weights.
    assert report.config.dtype == torch.bfloat16
    assert json.loads((tmp_path / "casa" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("dtype", ["int8", "fp7", torch.int32, "nn"])
def test_unknown_dtype(source_folder, tmp_path, dtype):
    assert_refused(source_folder, tmp_path / "casa", f"dtype={dtype!r}", "bfloat16", dtype=dtype)


def test_overflowing_cast(source_folder, tmp_path):
    def enlarge(tensors):
        return tensors | {"model.norm.weight": tensors["model.norm.weight"] * 1e6}

    source = altered(source_folder, tmp_path / "source", weights=enlarge)
    assert_refused(source, tmp_path / "casa", "model.language_model.norm.weight", "float16", dtype="float16")


# -------------------------------------------------------------------- the other files


def test_configuration(source_folder, casa_folder):
    source = Qwen2_5_VLConfig.from_pretrained(source_folder)
    content = json.loads((casa_folder / "config.json").read_text())
    assert content["architectures"] == ["CasaForConditionalGeneration"]
    assert content["model_type"] == "casa" and content["dtype"] == "float32"
    config = CasaConfig.from_pretrained(casa_folder)
    assert config.text_config.to_dict() == source.text_config.to_dict()
    assert config.vision_config.to_dict() == source.vision_config.to_dict()
    # What CASA doesn't use, for the way back.
    assert config.source_config["source_model_type"] == "qwen2_5_vl"
    assert config.source_config["video_token_id"] == source.video_token_id
    for auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
        assert isinstance(auto.from_pretrained(casa_folder), CasaForConditionalGeneration)


@pytest.mark.parametrize("tied", [False, True])
def test_configuration_in_the_layout_of_the_hub(source_folder, tied_source, tmp_path, tied):
    """Checkpoints from before Transformers 5 have the language model's settings at the top."""

    def flatten(config):
        text = config.pop("text_config")
        rope = text.pop("rope_parameters")
        del text["layer_types"], text["model_type"], config["transformers_version"]
        config |= text | {"torch_dtype": config.pop("dtype"), "rope_theta": rope["rope_theta"]}
        config["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
        config["vision_config"]["model_type"] = "qwen2_5_vl"
        config["vision_config"]["in_chans"] = config["vision_config"].pop("in_channels")

    nested = tied_source if tied else source_folder
    flat = altered(nested, tmp_path / "source", config=flatten)
    configs = [convert_checkpoint(source, tmp_path / source.parent.name).config for source in (nested, flat)]
    assert configs[0].tie_word_embeddings is configs[1].tie_word_embeddings is tied
    assert configs[0].dtype == configs[1].dtype == torch.float32
    ids = torch.arange(20)[None]
    texts = [CasaForConditionalGeneration.from_pretrained(tmp_path / s.parent.name)(ids) for s in (nested, flat)]
    assert torch.equal(texts[0].logits, texts[1].logits)


@pytest.mark.parametrize(
    "name", ["generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
)
def test_taken_over_byte_for_byte(source_folder, casa_folder, name):
    assert filecmp.cmp(source_folder / name, casa_folder / name, shallow=False)


def test_files_of_older_checkpoints_are_taken_over(source_folder, tmp_path):
    """Hub checkpoints also have the vocabulary in two files, and the template in a JSON file."""
    source = altered(source_folder, tmp_path / "source")
    template = (source / "chat_template.jinja").read_text()
    (source / "chat_template.jinja").unlink()
    (source / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    tokenizer = json.loads((source / "tokenizer.json").read_text())["model"]
    (source / "vocab.json").write_text(json.dumps(tokenizer["vocab"]))
    (source / "merges.txt").write_text("\n".join(" ".join(merge) for merge in tokenizer["merges"]))
    for name in ("LICENSE", "NOTICE.txt"):
        (source / name).write_text(name)
    output = convert_checkpoint(source, tmp_path / "casa").output
    for name in ("chat_template.json", "vocab.json", "merges.txt", "LICENSE", "NOTICE.txt"):
        assert filecmp.cmp(source / name, output / name, shallow=False)
    assert AutoProcessor.from_pretrained(output).chat_template == template


def test_generation_settings_are_derived_if_there_are_none(source_folder, tmp_path):
    source = altered(source_folder, tmp_path / "source")
    (source / "generation_config.json").unlink()
    output = convert_checkpoint(source, tmp_path / "casa").output
    settings = GenerationConfig.from_pretrained(output)
    assert settings.eos_token_id == Qwen2_5_VLConfig.from_pretrained(source).text_config.eos_token_id is not None


def test_processor(source_folder, casa_folder):
    processor = AutoProcessor.from_pretrained(casa_folder)
    assert isinstance(processor, CasaProcessor)
    assert processor.image_processor.size["longest_edge"] == 952 * 952
    assert processor.frame_max_pixels == 504 * 504
    kept = processor.source_config["preprocessor_config.json"]
    assert kept == json.loads((source_folder / "preprocessor_config.json").read_text())


@pytest.mark.parametrize(("variant", "keeps"), [("casa", False), ("exact", True), ("insertion", True)])
def test_variants_that_equal_the_source_keep_its_image_sizes(source_folder, variant, keeps):
    config = CasaConfig.from_source(Qwen2_5_VLConfig.from_pretrained(source_folder), variant)
    processor = CasaProcessor.from_source(source_folder, **processor_limits(config))
    assert (processor.image_processor.size["longest_edge"] == 12845056) is keeps
    assert (processor.frame_max_pixels is None) is keeps


# -------------------------------------------------------------------- the destination


def test_output_has_ordinary_permissions_and_new_parents(source_folder, tmp_path):
    (tmp_path / "ordinary").mkdir()
    output = convert_checkpoint(source_folder, tmp_path / "new" / "parents" / "casa").output
    assert output.stat().st_mode == (tmp_path / "ordinary").stat().st_mode
    assert [file.name for file in output.parent.iterdir()] == ["casa"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["new", "ordinary"]


def test_existing_output_needs_overwrite(source_folder, casa_folder, tmp_path):
    output = tmp_path / "casa"
    shutil.copytree(casa_folder, output)
    assert_refused(source_folder, output, str(output), "overwrite=True", variant="ca-shared")
    assert CasaConfig.from_pretrained(output).variant == "casa"

    def old_is_there(done, total):
        assert CasaConfig.from_pretrained(output).variant == "casa"

    convert_checkpoint(source_folder, output, "ca-shared", overwrite=True, progress=old_is_there)
    assert CasaConfig.from_pretrained(output).variant == "ca-shared"
    assert list(tmp_path.iterdir()) == [output]


def test_only_checkpoints_are_overwritten(source_folder, tmp_path):
    holiday = tmp_path / "photographs"
    holiday.mkdir()
    (holiday / "beach.jpg").write_bytes(b"x")
    (holiday / "config.json").write_text("{}")
    assert_refused(source_folder, holiday, "not a checkpoint folder", overwrite=True)
    assert "overwrite" not in assert_refused(source_folder, holiday, "not a checkpoint folder")
    for overwrite in (False, True):
        refusal = assert_refused(source_folder, holiday / "beach.jpg", "is a file", overwrite=overwrite)
        assert "overwrite" not in refusal
    assert (holiday / "beach.jpg").read_bytes() == b"x"
    (tmp_path / "empty").mkdir()
    assert_refused(source_folder, tmp_path / "empty", "exists", "add overwrite=True")
    convert_checkpoint(source_folder, tmp_path / "empty", overwrite=True)


def test_output_below_a_file(source_folder, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ValueError, match=r"file is not a folder"):
        convert_checkpoint(source_folder, tmp_path / "file" / "deep" / "casa")


def test_source_is_never_the_output(source_folder, tmp_path, monkeypatch):
    source = altered(source_folder, tmp_path / "above" / "source")
    (tmp_path / "link").symlink_to(source)
    monkeypatch.chdir(source)
    for output in (source, tmp_path / "above", tmp_path / "link", Path()):
        with pytest.raises(ValueError, match="would replace the source"):
            convert_checkpoint(source, output, overwrite=True)
    assert_same(load_weights(source), load_weights(source_folder))


def test_too_little_space(source_folder, tmp_path):
    """A sparse source that claims more bytes than any disk here has."""
    vocabulary = 2**33

    def enlarge(config):
        config["text_config"]["vocab_size"] = vocabulary

    source = altered(source_folder, tmp_path / "source", config=enlarge)
    content = (source / "model.safetensors").read_bytes()
    header_bytes = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + header_bytes])
    end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    shift = 0
    for name in sorted(set(header) - {"__metadata__"}, key=lambda name: header[name]["data_offsets"]):
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            shift_after = shift + (vocabulary - header[name]["shape"][0]) * 64 * 4
            header[name]["shape"][0] = vocabulary
        else:
            shift_after = shift
        start, stop = header[name]["data_offsets"]
        header[name]["data_offsets"] = [start + shift, stop + shift_after]
        shift = shift_after
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(source / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        try:
            file.truncate(8 + len(text) + end + shift)
        except OSError:
            pytest.skip("this file system has no sparse files of this size")
    assert_refused(source, tmp_path / "casa", "GB left", "another disk")


# -------------------------------------------------------------------- failures in the middle


def listing(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*"))


def interrupt(done, total):
    if done > total / 2:
        raise KeyboardInterrupt


def test_an_interrupted_run_leaves_nothing(source_folder, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(source_folder, tmp_path / "parents" / "casa", progress=interrupt)
    assert listing(tmp_path) == []


def test_an_interrupted_run_leaves_the_old_checkpoint(source_folder, casa_folder, tmp_path):
    shutil.copytree(casa_folder, tmp_path / "casa")
    before = listing(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(source_folder, tmp_path / "casa", "ca-shared", overwrite=True, progress=interrupt)
    assert listing(tmp_path) == before
    assert filecmp.cmp(tmp_path / "casa" / "model.safetensors", casa_folder / "model.safetensors", shallow=False)


@pytest.mark.parametrize(
    ("move", "when", "variant"), [(1, "after", "casa"), (2, "before", "casa"), (2, "after", "ca")]
)
def test_an_interrupted_move_leaves_one_complete_checkpoint(
    source_folder, casa_folder, tmp_path, monkeypatch, move, when, variant
):
    """The old folder moves away, then the new one comes; Ctrl-C may come around either."""
    shutil.copytree(casa_folder, tmp_path / "casa")
    rename, moves = os.rename, []

    def interrupted(old, new):
        moves.append(new)
        if len(moves) == move and when == "before":
            raise KeyboardInterrupt
        rename(old, new)
        if len(moves) == move:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(source_folder, tmp_path / "casa", "ca", overwrite=True)
    assert [file.name for file in tmp_path.iterdir()] == ["casa"]
    assert CasaConfig.from_pretrained(tmp_path / "casa").variant == variant
    assert (tmp_path / "casa" / "model.safetensors").is_file()


def test_a_failed_write_leaves_nothing(source_folder, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=f"{tmp_path / 'casa'} can't be written: the disk is full"):
            convert_checkpoint(source_folder, tmp_path / "casa")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert listing(tmp_path) == []


@pytest.mark.integration
def test_a_killed_run_leaves_no_output_and_the_next_one_succeeds(source_folder, casa_folder, tmp_path):
    program = (
        "import os, signal, sys\n"
        "from casa_hf.conversion import convert_checkpoint\n"
        "def kill(done, total):\n"
        "    if done > total / 2:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "convert_checkpoint(sys.argv[1], sys.argv[2], progress=kill)\n"
    )
    output = tmp_path / "casa"
    source_code = str(Path(sys.modules["casa_hf"].__file__ or "").parents[1])
    killed = subprocess.run(
        [sys.executable, "-c", program, source_folder, output],
        env=os.environ | {"PYTHONPATH": source_code},
        capture_output=True,
        text=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = [file.name for file in tmp_path.iterdir()]
    assert len(left) == 1 and left[0].startswith("casa.incomplete-")
    convert_checkpoint(source_folder, output)
    assert [file.name for file in tmp_path.iterdir()] == ["casa"]
    assert filecmp.cmp(output / "model.safetensors", casa_folder / "model.safetensors", shallow=False)


def test_bad_options_stop_before_anything_is_written(source_folder, tmp_path):
    with pytest.raises(ValueError, match="'casino' is unknown"):
        convert_checkpoint(source_folder, tmp_path / "casa", "casino")
    for size in ("5 apples", "5XB", "GB", "0", "0GB", "0.0000001KB", "-5GB", "infGB", "nanGB", "", None, True, 2.5):
        assert_refused(source_folder, tmp_path / "casa", f"max_shard_size={size!r}", "'5GB'", max_shard_size=size)
    for number in (-1, 1025, 10**12, 2.0):
        with pytest.raises(ValueError, match=f"num_gist_tokens={number} is out of range; expected an integer from 0"):
            convert_checkpoint(source_folder, tmp_path / "casa", num_gist_tokens=number)
    assert listing(tmp_path) == []
