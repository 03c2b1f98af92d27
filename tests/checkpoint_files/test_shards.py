# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Byte ranges of safetensors files: read, renamed, cast, split, and refused when broken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from casa_hf import CheckpointError
from casa_hf.checkpoint_files import shards
from casa_hf.checkpoint_files.shards import (
    DTYPE_CODES,
    ComputedTensor,
    PlannedTensor,
    read_checkpoint,
    row_statistics,
    shard_bytes,
    split_files,
    write_checkpoint,
)
from tests.conversion.helpers import INDEX, assert_same, load_weights, stored_names

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def random_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"half": (3, 5), "matrix": (40, 50), "scalar": (), "empty": (0, 4), "double": (7,), "brain": (2, 3, 5)}
    dtypes = {"half": torch.float16, "double": torch.float64, "brain": torch.bfloat16}
    return {
        name: torch.randn(shape, generator=generator).to(dtypes.get(name, torch.float32))
        for name, shape in shapes.items()
    }


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    save_file(random_tensors(), folder / "model.safetensors")
    return folder


def write(source, folder, names=None, dtype=None, max_shard_size="5GB", progress=None):
    """Copy a checkpoint, `names` giving (new name, old name) pairs."""
    stored = read_checkpoint(source)
    pairs = names or [(name, name) for name in stored]
    planned = [
        PlannedTensor(new, (stored[old],), stored[old].dtype if dtype is None else DTYPE_CODES[dtype])
        for new, old in pairs
    ]
    folder.mkdir()
    write_checkpoint(folder, split_files(planned, max_shard_size), progress)
    return folder


@pytest.mark.parametrize("chunk_bytes", [16, 2**24])
def test_copies_and_renames(source, tmp_path, monkeypatch, chunk_bytes):
    monkeypatch.setattr(shards, "_CHUNK_BYTES", chunk_bytes)
    tensors = random_tensors()
    pairs = [(f"new.{name}", name) for name in tensors] + [("twice.matrix", "matrix")]
    folder = write(source, tmp_path / "copy", pairs)
    assert_same(load_weights(folder), {new: tensors[old] for new, old in pairs})


def test_file_is_as_strict_readers_want_it(source, tmp_path):
    file = write(source, tmp_path / "copy") / "model.safetensors"
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    content = file.read_bytes()
    header_bytes = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + header_bytes])
    del header["__metadata__"]
    assert header_bytes % 8 == 0
    itemsize = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
    # 15 bfloat16 numbers lie before or behind float32 ones: each tensor must still start at a multiple of its size.
    assert all(entry["data_offsets"][0] % itemsize[entry["dtype"]] == 0 for entry in header.values())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk_bytes", [16, 2**24])
def test_casts_as_torch_does(source, tmp_path, monkeypatch, dtype, chunk_bytes):
    monkeypatch.setattr(shards, "_CHUNK_BYTES", chunk_bytes)
    folder = write(source, tmp_path / "cast", dtype=dtype)
    assert_same(load_weights(folder), {name: tensor.to(dtype) for name, tensor in random_tensors().items()})


def test_a_cast_never_overflows_silently(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    save_file({"fine": torch.ones(4), "large": torch.tensor([1.0, -70000.0])}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"large holds 70000, .*float16.*bfloat16"):
        write(folder, tmp_path / "cast", dtype=torch.float16)
    # Infinities that were there before are the source's own.
    save_file({"large": torch.tensor([1.0, torch.inf])}, folder / "model.safetensors")
    assert load_weights(write(folder, tmp_path / "kept", dtype=torch.float16))["large"][1] == torch.inf


def test_shards_and_index(source, tmp_path):
    tensors = random_tensors()
    folder = write(source, tmp_path / "shards", max_shard_size=8100)
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    assert files == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = json.loads((folder / INDEX).read_text())
    assert index["weight_map"] == {name: file for file in files for name in load_file(folder / file)}
    assert index["metadata"] == {
        "total_parameters": sum(tensor.numel() for tensor in tensors.values()),
        "total_size": sum(tensor.nbytes for tensor in tensors.values()),
    }
    assert_same(load_weights(folder), tensors)
    # A sharded source reads back like a single file.
    assert_same(load_weights(write(folder, tmp_path / "single")), tensors)


def test_order_is_kept(source, tmp_path):
    pairs = [("z", "matrix"), ("b", "matrix"), ("k", "matrix")]
    folder = write(source, tmp_path / "copy", pairs, max_shard_size=16000)
    assert stored_names(folder / "model-00001-of-00002.safetensors") == ["z", "b"]
    assert stored_names(folder / "model-00002-of-00002.safetensors") == ["k"]


def test_progress_counts_bytes_to_the_end(source, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_CHUNK_BYTES", 1000)
    calls: list[tuple[int, int]] = []
    write(source, tmp_path / "copy", dtype=torch.float64, progress=lambda *call: calls.append(call))
    total = 8 * sum(tensor.numel() for tensor in random_tensors().values())
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})
    assert len(calls) > 8 and calls[-1] == (total, total)


@pytest.mark.parametrize("size", [0, -1])
def test_shard_size_must_be_positive(source, size):
    with pytest.raises(CheckpointError, match=rf"max_shard_size={size}"):
        split_files([PlannedTensor("a", (read_checkpoint(source)["matrix"],), "F32")], size)


@pytest.mark.parametrize(
    ("size", "number"), [(8100, 8100), ("8100", 8100), ("5GB", 5 * 10**9), (" 1.5 kb ", 1500), ("2TB", 2 * 10**12)]
)
def test_shard_sizes(size, number):
    assert shard_bytes(size) == number


# -------------------------------------------------------------------- broken sources


def refused(folder, *words):
    with pytest.raises(CheckpointError) as error:
        read_checkpoint(folder)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.fixture
def sharded(source, tmp_path):
    return write(source, tmp_path / "sharded", max_shard_size=8100)


def test_truncated_shard(sharded):
    file = sharded / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    refused(sharded, str(file), "not a complete safetensors file", "Download it again")


def test_truncated_header(source):
    file = source / "model.safetensors"
    for length in (0, 4, 20):
        file.write_bytes(file.read_bytes()[:length])
        refused(source, str(file), "Download it again")


def test_not_a_safetensors_file(source):
    # What git leaves where large files weren't fetched.
    (source / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    refused(source, "not a complete safetensors file")


def test_missing_shard(sharded):
    (sharded / "model-00001-of-00002.safetensors").unlink()
    refused(sharded, INDEX, "model-00001-of-00002.safetensors", "Download")


def test_index_and_shards_disagree(sharded):
    index = json.loads((sharded / INDEX).read_text())
    places = index["weight_map"]
    for wrong, name in (
        ({name: file for name, file in places.items() if name != "double"}, "double"),
        (places | {"ghost": places["matrix"]}, "ghost"),
        (places | {"brain": places["matrix"], "matrix": places["brain"]}, "brain, matrix"),
    ):
        (sharded / INDEX).write_text(json.dumps(index | {"weight_map": wrong}))
        refused(sharded, name, "of the same version")


BROKEN_INDEXES = {
    "cut": "{",
    "list": "[]",
    "empty": "{}",
    "map": '{"weight_map": 3}',
    "names": '{"weight_map": {"matrix": ["a.safetensors"]}}',
    "no name": '{"weight_map": {"matrix": ""}}',
    "null character": '{"weight_map": {"matrix": "a\\u0000.safetensors"}}',
    "half a character": '{"weight_map": {"matrix": "\\ud83d.safetensors"}}',
    "deep": '{"weight_map": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "rather deep": '{"weight_map": ' + "[" * 300 + "]" * 300 + "}",
    "long number": '{"weight_map": ' + "1" * 10_000 + "}",
    "latin": '{"weight_map": "é"}'.encode("latin-1"),
    "utf-16": '{"weight_map": {}}'.encode("utf-16"),
    "mark": b"\xef\xbb\xbf{}",
}


@pytest.mark.parametrize("kind", BROKEN_INDEXES)
def test_broken_index(sharded, kind):
    content = BROKEN_INDEXES[kind]
    (sharded / INDEX).write_bytes(content if isinstance(content, bytes) else content.encode())
    again = "without one" if kind == "mark" else "again"
    refused(sharded, str(sharded) if "character" in kind else INDEX, again)


def test_an_index_that_can_not_be_read(sharded):
    (sharded / INDEX).unlink()
    (sharded / INDEX).mkdir()
    refused(sharded, INDEX)


@pytest.mark.parametrize("name", ["../outside.safetensors", "absolute", "sub/../../outside.safetensors"])
def test_shards_outside_the_folder(sharded, tmp_path, name):
    (sharded / "sub").mkdir()
    outside = (sharded / "model-00001-of-00002.safetensors").rename(tmp_path / "outside.safetensors")
    name = str(outside) if name == "absolute" else name
    index = (sharded / INDEX).read_text()
    (sharded / INDEX).write_text(index.replace("model-00001-of-00002.safetensors", name))
    refused(sharded, name, str(outside), "copy it into the folder")
    (sharded / INDEX).write_text(index)
    (sharded / "model-00001-of-00002.safetensors").symlink_to(outside)
    refused(sharded, "model-00001-of-00002.safetensors", str(outside), "copy it into the folder")


def test_links_inside_the_folder_and_into_the_download_cache(sharded, tmp_path):
    first, second = (sharded / f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
    (sharded / "sub").mkdir()
    first.symlink_to(first.rename(sharded / "sub" / "file"))
    blobs = tmp_path / "models--me--casa" / "blobs"
    blobs.mkdir(parents=True)
    second.symlink_to(second.rename(blobs / "0123"))
    assert read_checkpoint(sharded).keys() == random_tensors().keys()
    link = tmp_path / "link"
    link.symlink_to(sharded)
    assert read_checkpoint(link).keys() == random_tensors().keys()


# -------------------------------------------------------------------- headers


def with_header(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()


BROKEN_FILES = {
    "long header": with_header(entry(), bytes(4), length=2**63),
    "no JSON": with_header(b"x" * 16),
    "list": with_header(b"[]"),
    "deep": with_header(b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}"),
    "entry": with_header(b'{"a": 3}'),
    "no offsets": with_header(b'{"a": {"dtype": "F32", "shape": [1]}}', bytes(4)),
    "dtype": with_header(entry(dtype=7), bytes(4)),
    "shape": with_header(entry(shape=["1"]), bytes(4)),
    "negative shape": with_header(entry(shape=[-1]), bytes(4)),
    "other shape": with_header(entry(shape=[2]), bytes(4)),
    "gap": with_header(entry(offsets=[4, 8]), bytes(8)),
    "before": with_header(entry(offsets=[-4, 0]), bytes(4)),
    "backwards": with_header(entry(offsets=[4, 0]), bytes(4)),
    "short": with_header(entry(), bytes(3)),
    "long": with_header(entry(), bytes(5)),
    "twice": with_header(
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, ' + entry(offsets=[4, 8])[1:], bytes(8)
    ),
}


@pytest.mark.parametrize("kind", BROKEN_FILES)
def test_broken_files(source, kind):
    """As the library finds them, without mapping the file."""
    file = source / "model.safetensors"
    file.write_bytes(BROKEN_FILES[kind])
    refused(source, str(file), "not a complete safetensors file")
    with pytest.raises(SafetensorError):
        load_file(file)


# -------------------------------------------------------------------- sources that change


def cut(file):
    with open(file, "r+b") as stream:
        stream.truncate(file.stat().st_size - 100)


def overwrite(file):
    with open(file, "r+b") as stream:
        stream.seek(-100, 2)
        stream.write(bytes(100))


def exchange(file):
    save_file(random_tensors(), file.with_name("new"))
    file.with_name("new").replace(file)


@pytest.mark.parametrize("change", [cut, overwrite, exchange, lambda file: file.unlink()])
@pytest.mark.parametrize("when", ["before", "while", "after"])
def test_a_file_that_changes(source, tmp_path, monkeypatch, change, when):
    """In time, or there would be a bus error, zeros, or tensors of two versions."""
    monkeypatch.setattr(shards, "_CHUNK_BYTES", 1000)
    file = source / "model.safetensors"
    stored = read_checkpoint(source)
    planned = [PlannedTensor(name, (tensor,), tensor.dtype) for name, tensor in stored.items()]
    calls = []

    def progress(done, total):
        calls.append(done)
        if (len(calls) == 2 and when == "while") or (done == total and when == "after"):
            change(file)

    if when == "before":
        change(file)
    (tmp_path / "copy").mkdir()
    with pytest.raises(CheckpointError, match=f"^{file} (was changed while|can't be read)"):
        write_checkpoint(tmp_path / "copy", split_files(planned, "5GB"), progress)
    if when == "before":
        with pytest.raises(CheckpointError, match=f"^{file} (was changed while|can't be read)"):
            row_statistics(stored["matrix"])


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux shows what is mapped")
def test_no_source_is_mapped(source, tmp_path):
    seen = []
    write(source, tmp_path / "copy", progress=lambda *_: seen.append(Path("/proc/self/maps").read_text()))
    assert seen and not any(str(source) in maps for maps in seen)


def test_quantized_tensors(source):
    save_file({"a": torch.ones(4), "b": torch.ones(4).to(torch.float8_e4m3fn)}, source / "model.safetensors")
    refused(source, "b (F8_E4M3)", "original checkpoint")


def test_no_weights_and_pickled_weights(tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    refused(folder, "model.safetensors", "has no safetensors weights")
    (folder / "pytorch_model.bin").write_bytes(b"")
    refused(folder, "pytorch_model.bin", "never loaded", "save_pretrained")


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_tensors_put_together(source, tmp_path, dtype):
    """Rows of two stored matrices of different dtypes, and computed ones in between."""
    stored, tensors = read_checkpoint(source), random_tensors()
    new = torch.linspace(0, 1, 10, dtype=torch.float64).view(2, 5)
    parts = (stored["half"].rows(1, 3), ComputedTensor((2, 5), lambda: new), stored["half"].rows(0, 1))
    planned = [
        PlannedTensor("a", parts, dtype),
        PlannedTensor("b", (stored["matrix"],), dtype),
        PlannedTensor("c", (ComputedTensor((1,), lambda: torch.zeros(1)),), "F64"),
    ]
    assert planned[0].shape == (5, 5) and planned[0].numel == 25
    (tmp_path / "new").mkdir()
    seen = []
    write_checkpoint(tmp_path / "new", split_files(planned, "5GB"), lambda done, total: seen.append((done, total)))
    target = torch.float32 if dtype == "F32" else torch.bfloat16
    assert_same(
        load_weights(tmp_path / "new"),
        {
            "a": torch.cat([tensors["half"][1:].to(target), new.to(target), tensors["half"][:1].to(target)]),
            "b": tensors["matrix"].to(target),
            "c": torch.zeros(1, dtype=torch.float64),
        },
    )
    assert seen[-1] == (sum(tensor.nbytes for tensor in planned),) * 2


@pytest.mark.parametrize("chunk_bytes", [16, 500, 2**24])
def test_mean_of_rows(source, monkeypatch, chunk_bytes):
    monkeypatch.setattr(shards, "_CHUNK_BYTES", chunk_bytes)
    stored, tensors = read_checkpoint(source), random_tensors()
    for name in ("half", "matrix"):
        expected = tensors[name].double().mean(0)
        mean, spread = row_statistics(stored[name])
        torch.testing.assert_close(mean, expected, rtol=0, atol=1e-14)
        assert spread == pytest.approx((tensors[name].double() - expected).square().mean().sqrt().item(), rel=1e-9)
