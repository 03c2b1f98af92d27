# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The package as it is shipped: metadata, dependencies, the wheel, and an import without side effects."""

from __future__ import annotations

import ast
import configparser
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import casa_hf
from casa_hf.hub.card_text import CITATION
from tools.release import try_wheel

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "casa_hf"
COMMAND = ROOT / "src" / "casa_hf_command.py"


@pytest.fixture(scope="module")
def metadata() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    assert parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("build")
    tree = tmp_path_factory.mktemp("tree")
    shutil.copytree(PACKAGE.parent, tree / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("setup.cfg", "pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, tree)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tree / "dist"), str(tree)]
    subprocess.run(build, check=True, capture_output=True)
    (built,) = (tree / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def citation() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))


def requirements(lines: str) -> list[Requirement]:
    return [Requirement(line) for line in lines.splitlines() if line and not line.startswith("#")]


def test_one_version_everywhere(citation: dict[str, Any], wheel: Path) -> None:
    version = casa_hf.__version__
    assert wheel.name == f"casa_hf-{version}-py3-none-any.whl"
    assert str(citation["version"]) == version
    newest = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M)
    assert newest and newest[1] in (version, "Unreleased")


def test_the_citation_is_that_of_the_model_cards(citation: dict[str, Any]) -> None:
    bibtex = CITATION
    for letter, written in {"ö": '{\\"o}', "é": "{\\'e}"}.items():
        bibtex = bibtex.replace(written, letter)
    paper = citation["preferred-citation"]
    names = (f"{author['given-names']} {author['family-names']}" for author in paper["authors"])
    assert f"author = {{{' and '.join(names)}}}," in bibtex
    assert f"title = {{{paper['title'].replace('CASA', '{CASA}')}}}," in bibtex
    assert f"year = {{{paper['year']}}}," in bibtex
    (identifier,) = paper["identifiers"]
    assert f"eprint = {{{identifier['value'].removeprefix('arXiv:')}}}," in bibtex


def test_constraints_pin_a_set_that_setup_cfg_allows(metadata: configparser.ConfigParser) -> None:
    lines = (ROOT / "constraints.txt").read_text("utf-8")
    pins = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in requirements(lines)}
    wanted = requirements(metadata["options"]["install_requires"])
    wanted += requirements(metadata["options.extras_require"]["dev"])
    for requirement in wanted:
        pinned = pins.get(canonicalize_name(requirement.name))
        assert pinned is not None, f"{requirement.name} is not pinned"
        assert requirement.specifier.contains(pinned), f"{requirement} doesn't allow the pinned {pinned}"


def test_every_import_is_a_declared_dependency_or_comes_with_transformers(
    metadata: configparser.ConfigParser,
) -> None:
    declared = requirements(metadata["options"]["install_requires"])
    for lines in metadata["options.extras_require"].values():
        declared += requirements(lines)
    with_transformers = [Requirement(line) for line in importlib.metadata.requires("transformers") or ()]
    declared += [requirement for requirement in with_transformers if requirement.marker is None]
    allowed = {canonicalize_name(requirement.name) for requirement in declared}
    distributions = importlib.metadata.packages_distributions()

    undeclared = {}
    for file in (*PACKAGE.rglob("*.py"), COMMAND):
        for name in top_level_imports(file) - sys.stdlib_module_names - {"casa_hf"}:
            owners = {canonicalize_name(owner) for owner in distributions.get(name, [name])}
            if not owners & allowed:
                undeclared[name] = file.name
    assert not undeclared


def top_level_imports(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.partition(".")[0])
    return names


# Reports what an import does besides importing. The watch begins when the stock model is there: torch sets an
# environment variable and makes a folder while Transformers loads it.
WATCHED_IMPORT = """
import json, os, random, sys
import numpy, torch
import transformers.models.qwen2_5_vl.modeling_qwen2_5_vl
seen = []
def watch(event, args):
    writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    changes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.putenv", "os.chdir", "shutil.copyfile")
    if writes or changes or event.startswith(("socket.connect", "socket.getaddrinfo", "subprocess.", "os.system")):
        seen.append(f"{event} {args[0]!r}")
def states():
    return [torch.get_rng_state().tolist(), repr(random.getstate()), repr(numpy.random.get_state()),
            torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), dict(os.environ)]
before = states()
sys.addaudithook(watch)
import casa_hf
report = {"seen": seen, "cuda": torch.cuda.is_initialized(), "changed": states() != before}
print(json.dumps(report))
"""


def test_import_has_no_side_effects() -> None:
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", WATCHED_IMPORT], check=True, capture_output=True, text=True, env=environment
    )
    assert json.loads(done.stdout) == {"seen": [], "cuda": False, "changed": False}
    assert done.stderr == ""


def test_import_registers_with_the_auto_classes() -> None:
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    assert isinstance(AutoConfig.for_model("casa"), casa_hf.CasaConfig)
    assert AutoModel._model_mapping[casa_hf.CasaConfig] is casa_hf.CasaModel
    mapping = AutoModelForImageTextToText._model_mapping
    assert mapping[casa_hf.CasaConfig] is casa_hf.CasaForConditionalGeneration
    assert PROCESSOR_MAPPING[casa_hf.CasaConfig] is casa_hf.CasaProcessor


def test_wheel_holds_the_whole_package_and_nothing_else(wheel: Path) -> None:
    files = {file.relative_to(PACKAGE.parent).as_posix() for file in PACKAGE.rglob("*") if file.is_file()}
    files.add("casa_hf_command.py")
    with zipfile.ZipFile(wheel) as archive:
        shipped = {name for name in archive.namelist() if ".dist-info/" not in name}
        described = set(archive.namelist()) - shipped
        information = {name.partition("/")[2]: archive.read(name).decode() for name in described}
    assert shipped == {file for file in files if "__pycache__" not in file}
    assert "casa_hf/py.typed" in shipped
    assert "casa-hf = casa_hf_command:main" in information["entry_points.txt"]
    assert "Requires-Python: <3.14,>=3.11" in information["METADATA"]
    assert "Apache License" in information["licenses/LICENSE"]


@pytest.mark.slow
def test_wheel_installs_in_a_clean_environment(wheel: Path) -> None:
    try_wheel(ROOT, wheel)


@pytest.mark.parametrize("document", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_the_documents_list_the_modules_that_are_there(document: str) -> None:
    """Every file and folder of the package, and none that is gone."""
    root = Path(__file__).parents[1]
    text = (root / document).read_text("utf-8")
    start, end = (
        ("## Files", "A file imports") if document.startswith("docs") else ("src/casa_hf/\n", "src/casa_hf_command")
    )
    section = text.partition(start)[2].partition(end)[0]
    listed = set(re.findall(r"(?:`|^  |, )([\w]+\.py|\w+/)(?=`|\s|,|$)", section, re.MULTILINE))
    package = root / "src" / "casa_hf"
    there = {f"{path.name}/" if path.is_dir() else path.name for path in package.iterdir() if path.name[:3] != "__i"}
    assert listed == there - {"__pycache__/", "py.typed"}
