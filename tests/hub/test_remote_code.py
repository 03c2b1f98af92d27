# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints that carry their code: which modules, and that Transformers loads them where casa_hf is not."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers.dynamic_module_utils import get_imports

from casa_hf import CasaForConditionalGeneration, CasaProcessor, add_code, convert_checkpoint, push_checkpoint
from casa_hf.hub.remote_code import AUTO_MAP, has_code, modelling_files
from tests.hub.conftest import process_environment
from tests.hub.helpers import fine_tuned, logits
from tests.hub.loopback import Hub

ROOT = Path(__file__).parents[2]

# Loads a checkpoint where casa_hf can't be imported, answers, saves the logits, and saves model and processor again.
STRANGER = """
import sys
sys.modules["casa_hf"] = None
import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

checkpoint, output = sys.argv[1:]
processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(checkpoint, trust_remote_code=True).eval()
assert AutoConfig.from_pretrained(checkpoint, trust_remote_code=True).model_type == "casa"
assert type(AutoModel.from_pretrained(checkpoint, trust_remote_code=True)).__name__ == "CasaModel"
image = Image.new("RGB", (84, 56), (200, 30, 30))
question = [{"type": "image", "image": image}, {"type": "text", "text": "Colour?"}]
messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "red"}]
inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
with torch.no_grad():
    torch.save(model(**inputs).logits, output + ".pt")
produced, ids = model.generate(**inputs, max_new_tokens=3, do_sample=False, eos_token_id=-1), inputs["input_ids"]
with torch.no_grad():
    for _ in range(3):
        images = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
        token = model(input_ids=ids, **images, use_cache=False).logits[:, -1].argmax(-1)
        ids = torch.cat([ids, token[:, None]], dim=1)
assert torch.equal(produced, ids), "what is cached is used"
assert {type(each.publishing_hook).__name__ for each in (model, processor)} == {"PublishingHook"}
model.save_pretrained(output)
processor.save_pretrained(output)
"""


def run_stranger(checkpoint: str, output: Path, python: str | Path = sys.executable, **environment: str) -> None:
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_ENDPOINT")}
    done = subprocess.run(
        [python, "-c", STRANGER, checkpoint, output],
        env=inherited | environment,
        cwd=output.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- which modules


def test_the_modules_are_closed_under_their_imports() -> None:
    names = {file.stem for file in modelling_files()}
    assert {reference.split(".")[0] for reference in AUTO_MAP.values()} <= names
    for file in modelling_files():
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.module in names
    assert not names & {"hub", "cli", "conversion", "chat", "training"}


def test_what_transformers_looks_for_is_there() -> None:
    """Before it runs code from the Hub it wants every package installed that is imported outside a `try`."""
    wanted = {name for file in modelling_files() for name in get_imports(str(file))}
    come_with_transformers = {"huggingface_hub", "numpy", "safetensors", "tokenizers"}
    assert wanted - sys.stdlib_module_names <= {"PIL", "torch", "transformers"} | come_with_transformers
    assert "av" in {
        alias.name
        for file in modelling_files()
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.Import)
        for alias in node.names
    }


def package(folder: Path, **imports: str) -> Path:
    for reference in AUTO_MAP.values():
        (folder / f"{reference.split('.')[0]}.py").write_text("import torch\n")
    for name, text in imports.items():
        (folder / f"{name}.py").write_text(text)
    return folder


def test_a_new_module_is_found_by_its_import(tmp_path: Path) -> None:
    package(
        tmp_path,
        modeling_casa="from .new import (\n    x,\n)\n",
        new="def f():\n    from .inner import y\n    from .modeling_casa import z\n",
        inner="import os\n",
        unused="from .inner import y\n",
    )
    names = {file.stem for file in modelling_files(tmp_path)}
    assert names == {"configuration_casa", "inner", "modeling_casa", "new", "processing_casa"}


@pytest.mark.parametrize(
    "statement", ["from . import new", "from ..casa_hf import new", "from .new.inner import x", "import casa_hf.new"]
)
def test_an_import_that_cannot_be_exported_is_refused(tmp_path: Path, statement: str) -> None:
    package(tmp_path, modeling_casa=f"import os\n\n{statement}\n")
    with pytest.raises(ValueError, match=rf"modeling_casa.py, line 3: `{re.escape(statement)}`.*`from .module import"):
        modelling_files(tmp_path)


# ---------------------------------------------------------------- a folder


@pytest.fixture(scope="module")
def exported(casa_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with its code; read only."""
    folder = tmp_path_factory.mktemp("exported") / "casa"
    shutil.copytree(casa_folder, folder)
    add_code(folder)
    return folder


def test_add_code_changes_nothing_else(casa_folder: Path, exported: Path, tmp_path: Path) -> None:
    code = {file.name for file in modelling_files()}
    assert {file.name for file in exported.iterdir()} == {file.name for file in casa_folder.iterdir()} | code
    for file in casa_folder.iterdir():
        if file.name in ("config.json", "processor_config.json"):
            after = json.loads((exported / file.name).read_text())
            auto_map = after.pop("auto_map")
            assert after == json.loads(file.read_text())
            assert auto_map == {name: AUTO_MAP[name] for name in auto_map} and "AutoProcessor" in auto_map
        else:
            assert (exported / file.name).read_bytes() == file.read_bytes()
    shutil.copytree(exported, tmp_path / "again")
    add_code(tmp_path / "again")
    for file in exported.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def test_convert_with_code(source_folder: Path, exported: Path, tmp_path: Path) -> None:
    output = convert_checkpoint(source_folder, tmp_path / "casa", with_code=True).output
    for file in exported.iterdir():
        if file.name != "README.md":
            assert (output / file.name).read_bytes() == file.read_bytes()
    card = (output / "README.md").read_text()
    assert f"{output} --variant casa --with-code\n" in card and "trust_remote_code=True" in card
    assert "trust_remote_code" not in (exported / "README.md").read_text()


def test_add_code_fails_in_one_piece(casa_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"has no config\.json and no processor_config\.json"):
        add_code(tmp_path)
    shutil.copytree(casa_folder, tmp_path / "casa")
    replaced: list[Path] = []
    replace = os.replace

    def full(old: Path, new: Path) -> None:
        if len(replaced) == 3:
            raise OSError(28, "No space left on device")
        replaced.append(new)
        replace(old, new)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        add_code(tmp_path / "casa")
    assert not list((tmp_path / "casa").glob(".*"))
    assert (tmp_path / "casa" / "config.json").read_bytes() == (casa_folder / "config.json").read_bytes()
    CasaForConditionalGeneration.from_pretrained(tmp_path / "casa")


def test_with_casa_hf_installed_the_installed_code_is_used(exported: Path, casa_folder: Path) -> None:
    """No question about trust, and both ways of loading agree."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(exported)
    processor = AutoProcessor.from_pretrained(exported)
    assert type(model) is CasaForConditionalGeneration and type(processor) is CasaProcessor
    plain = CasaForConditionalGeneration.from_pretrained(casa_folder)
    assert torch.equal(logits(model, processor), logits(plain, processor))


def test_code_that_is_not_there_is_not_promised(hub: Hub, exported: Path, tmp_path: Path) -> None:
    """What the installed classes save of a checkpoint with code neither holds the code nor names it."""
    fine_tuned(exported, tmp_path / "trained", steps=1)
    saved = json.loads((tmp_path / "trained" / "config.json").read_text())
    assert "auto_map" not in saved and not has_code(tmp_path / "trained")
    # As an earlier version has saved it.
    (tmp_path / "trained" / "config.json").write_text(json.dumps(saved | {"auto_map": AUTO_MAP}))
    push_checkpoint(tmp_path / "trained", "me/plain")
    files = hub.files("me/plain")
    assert "auto_map" not in json.loads(files["config.json"]) and "modeling_casa.py" not in files
    assert "auto_map" not in json.loads(files["processor_config.json"])
    assert "trust_remote_code" not in files["README.md"].decode()
    push_checkpoint(tmp_path / "trained", "me/with-code", with_code=True)
    assert json.loads(hub.files("me/with-code")["config.json"])["auto_map"] == AUTO_MAP


# ---------------------------------------------------------------- elsewhere


@pytest.mark.integration
def test_it_loads_from_the_hub_where_casa_hf_is_not(hub: Hub, exported: Path, tmp_path: Path) -> None:
    """From an empty cache, in a process of its own; what that saves carries the code on."""
    push_checkpoint(exported, "me/with-code")
    assert hub.files("me/with-code").keys() == {file.name for file in exported.iterdir()} | {".gitattributes"}
    run_stranger("me/with-code", tmp_path / "saved", **process_environment(hub, tmp_path / "home"))
    model, processor = CasaForConditionalGeneration.from_pretrained(exported), CasaProcessor.from_pretrained(exported)
    assert torch.equal(torch.load(tmp_path / "saved.pt"), logits(model, processor))
    assert has_code(tmp_path / "saved")
    push_checkpoint(tmp_path / "saved", "me/again")
    assert {f"{name}.py" for name in (file.stem for file in modelling_files())} <= hub.files("me/again").keys()


@pytest.mark.slow
@pytest.mark.parametrize("version", ["5.17.0", "5.24.0"])
def test_it_loads_in_a_clean_environment(hub: Hub, exported: Path, tmp_path: Path, version: str) -> None:
    """Transformers, torch and Pillow, and what these need; from a folder and from the Hub."""
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "clean")], check=True)
    python = tmp_path / "clean" / "bin" / "python"
    pins = [
        line
        for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines()
        if not line.startswith(("transformers==", "huggingface_hub=="))
    ]
    (tmp_path / "pins.txt").write_text("\n".join(pins))
    install = [python, "-m", "pip", "install", "--quiet", "--constraint", tmp_path / "pins.txt"]
    subprocess.run([*install, f"transformers=={version}", "torch", "pillow"], check=True)
    (tmp_path / "elsewhere").mkdir()
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    # The second round loads what the first has saved.
    for source, output in ((exported, "first"), (tmp_path / "elsewhere" / "first", "second")):
        run_stranger(str(source), tmp_path / "elsewhere" / output, python, **environment)
    push_checkpoint(exported, "me/with-code")
    from_hub = process_environment(hub, tmp_path / "hub")
    run_stranger("me/with-code", tmp_path / "elsewhere" / "third", python, **from_hub)
    model, processor = CasaForConditionalGeneration.from_pretrained(exported), CasaProcessor.from_pretrained(exported)
    for output in ("first", "second", "third"):
        found = torch.load(tmp_path / "elsewhere" / f"{output}.pt")
        torch.testing.assert_close(found, logits(model, processor), atol=1e-5, rtol=1e-5)


def test_every_module_has_its_auto_class() -> None:
    """The map names classes that exist."""
    import importlib

    for reference in AUTO_MAP.values():
        module, name = reference.split(".")
        assert hasattr(importlib.import_module(f"casa_hf.{module}"), name)
