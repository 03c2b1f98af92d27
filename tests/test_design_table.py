# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""What is written about the design space by hand says what its table says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer.main

from casa_hf import CasaConfig
from casa_hf.cli.app import app
from casa_hf.design_space import CHOICES, FIELDS, SETTINGS, VARIANTS, Setting

ROOT = Path(__file__).parents[1]
ENTRIES = dict(re.findall(r"^        (\w+) \(.*?\):\n((?: {12}.*\n)+)", CasaConfig.__doc__ or "", re.MULTILINE))


def rows(setting: Setting) -> list[str]:
    """Lines of the table in docs/architecture.md."""
    default = getattr(CasaConfig, setting.field)
    name = f"`{setting.field}`, `{setting.option}`"
    if not setting.choices:
        return [f"| {name} | default: `{default}` | {setting.meaning} |"]
    values = [
        f"| | `{value}`{' (default)' if value == default else ''} | {meaning} |"
        for value, meaning in setting.choices.items()
    ]
    return [f"| {name} | | {setting.meaning} |", *values]


def test_architecture_has_the_table() -> None:
    table = "\n".join(["| setting | value | meaning |", "|---|---|---|", *(row for s in SETTINGS for row in rows(s))])
    assert f"\n\n{table}\n\n" in (ROOT / "docs" / "architecture.md").read_text("utf-8"), f"\n{table}"


@pytest.mark.parametrize("field", FIELDS)
def test_the_configuration_documents_a_setting_and_its_values(field: str) -> None:
    named = re.findall(r'"(\w+)"', ENTRIES[field])
    if field in CHOICES:
        assert set(named) == set(CHOICES[field]) - {None}
        assert getattr(CasaConfig, field) in CHOICES[field]


def test_convert_has_an_option_for_every_setting() -> None:
    options = {
        option: parameter
        for parameter in typer.main.get_command(app).commands["convert"].params
        for option in parameter.opts
    }
    for setting in SETTINGS:
        parameter = options[setting.option]
        assert (parameter.name, parameter.help) == (setting.parameter, setting.meaning)
        if setting.choices:
            assert parameter.metavar == "|".join(value or "none" for value in setting.choices)


def test_readme_describes_every_variant() -> None:
    section = (ROOT / "README.md").read_text("utf-8").partition("\n## Variants\n")[2].partition("\n## ")[0]
    named = [
        name for row in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE) for name in re.findall(r"`([\w-]+)`", row)
    ]
    assert sorted(set(named) - {"variant"}) == sorted(VARIANTS) and len(set(named)) == len(named)
