# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""What the plugin uses of vLLM, compared with sources that are made here."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.vllm_names import Call, problems

ENGINE = """
class Base:
    def step(self, request, budget, limit=None): ...
    def free(self, request): ...
class Engine(Base):
    @staticmethod
    def make(size, *, name): ...
def run(engine, steps=1): ...
"""
SETTINGS = """
@dataclass
class Common:
    size: int
@dataclass
class Settings(Common):
    depth: int
    name: str = ""
"""
PLUGIN = """
from vllm import Engine
from vllm.settings import Settings

class Own(Engine):
    def step(self, request, budget, *others): ...
    def free(self, request): ...
"""
CALLS = {
    "vllm.engine:run": Call(1),
    "vllm:Engine.make": Call(1, ("name",)),
    "vllm.settings:Settings": Call(0, ("size", "depth")),
}
REPLACED = {"vllm.engine:Engine.free": {"request"}}


def compare(folder: Path, engine: str = ENGINE, settings: str = SETTINGS, plugin: str = PLUGIN) -> list[str]:
    """What is found with these files."""
    package = folder / "vllm"
    package.mkdir(exist_ok=True)
    (package / "__init__.py").write_text("if TYPE_CHECKING:\n    from .engine import Engine\n", "utf-8")
    (package / "engine.py").write_text(engine, "utf-8")
    (package / "settings.py").write_text(settings, "utf-8")
    (folder / "plugin.py").write_text(plugin, "utf-8")
    return problems(folder, [folder / "plugin.py"], CALLS, REPLACED)


def test_what_fits_is_passed(tmp_path: Path) -> None:
    assert compare(tmp_path) == []


@pytest.mark.parametrize(
    ("before", "after", "problem"),
    [
        ("class Engine", "class Motor", "vllm has no Engine"),
        ("def step(self, request, budget", "def step(self, request, tokens", "Own.step needs budget"),
        ("def free(self, request)", "def free(self, request, delay=0)", "Own.free doesn't take delay"),
        ("def free(self, request)", "def free(self, request, delay=0)", "is replaced without its delay"),
        ("def run(engine", "def run(engine, clock", "vllm.engine:run needs clock"),
        ("make(size, *, name)", "make(size, *, label)", "vllm:Engine.make needs label"),
        ("make(size, *, name)", "make(*, size, name)", "vllm:Engine.make needs size"),
        ("def run(", "def walk(", "vllm.engine:run isn't there"),
        ("    depth: int", "    depth: int\n    width: int", "vllm.settings:Settings needs width"),
        ("    size: int", "    length: int = 0", "vllm.settings:Settings doesn't take size"),
    ],
)
def test_what_has_changed_is_named(before: str, after: str, problem: str, tmp_path: Path) -> None:
    assert before in ENGINE + SETTINGS
    found = compare(tmp_path, ENGINE.replace(before, after), SETTINGS.replace(before, after))
    assert any(problem in each for each in found), found
