# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""JSON that can't be used is refused in one line with the file's name, whoever reads it."""

from __future__ import annotations

import shutil

import pytest

from casa_hf import CheckpointError
from casa_hf.conversion import inspect_checkpoint, plan_conversion, plan_to_source
from casa_hf.folder_files import read_json
from casa_hf.hub.push import check_checkpoint
from tests.conversion.helpers import altered

CONTENTS = {
    "cut": (b'{"a":', "is not valid JSON"),
    "empty": (b"", "is not valid JSON"),
    "list": (b"[]", "must hold a JSON object, but holds a list"),
    "deep": (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested deeper"),
    "rather deep": (b'{"a":' + b"[" * 300 + b"]" * 300 + b"}", "nested deeper"),
    "latin": ('{"a": "é"}'.encode("latin-1"), "is not UTF-8"),
    "utf-16": ('{"a": 1}'.encode("utf-16"), "is not UTF-8"),
    "byte-order mark": (b"\xef\xbb\xbf{}", "byte-order mark"),
    "long number": (b'{"a": ' + b"1" * 10_000 + b"}", "is not valid JSON"),
}
NAMES = ("config.json", "generation_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json")


@pytest.mark.parametrize("kind", CONTENTS)
def test_kinds(tmp_path, kind):
    content, said = CONTENTS[kind]
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"^{tmp_path / 'a.json'} .*{said}") as error:
        read_json(tmp_path / "a.json")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"{}", b'{"a": [[{"b": 1}]]}', '{"é": "\\ud83d"}'.encode()])
def test_what_can_be_used(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    assert isinstance(read_json(tmp_path / "a.json"), dict)


@pytest.mark.parametrize("kind", ["rather deep", "latin"])
@pytest.mark.parametrize("name", NAMES)
def test_readers(source_folder, casa_folder, tmp_path, name, kind):
    casa, source = (shutil.copytree(folder, tmp_path / folder.name) for folder in (casa_folder, source_folder))
    readers = [(check_checkpoint, casa), (plan_to_source, casa), (plan_conversion, casa)]
    readers += [(inspect_checkpoint, casa)] if name in ("config.json", "processor_config.json") else []
    readers += [(plan_conversion, source)] if (source / name).is_file() else []
    for read, folder in readers:
        (folder / name).write_bytes(CONTENTS[kind][0])
        expected = f"^{folder / name} .*{CONTENTS[kind][1]}"
        with pytest.raises((CheckpointError, CheckpointError), match=expected) as error:
            read(folder)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("part", "setting", "value"),
    [
        ("text_config", "rope_parameters", {"rope_type": "unheard of", "rope_theta": 1e4}),
        ("text_config", "model_type", {}),
        ("text_config", "hidden_size", "many"),
        ("vision_config", "hidden_act", "unheard of"),
    ],
)
def test_configurations_of_no_model(source_folder, casa_folder, tmp_path, part, setting, value):
    for folder, readers in (
        (casa_folder, (check_checkpoint, plan_to_source, plan_conversion)),
        (source_folder, (plan_conversion,)),
    ):
        copy = altered(folder, tmp_path / folder.name, config=lambda content: content[part].update({setting: value}))
        for read in readers:
            with pytest.raises((CheckpointError, CheckpointError), match=r"config\.json") as error:
                read(copy)
            assert "\n" not in str(error.value)
