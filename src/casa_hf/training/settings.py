# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Settings from YAML, typed by the fields of the dataclasses that they are for.

Transformers' own parser types strings alone, and takes no list where a string is possible too.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from huggingface_hub.dataclasses import type_validator

from ..checks import is_number, one_line, shown

_EXPECTED: dict[Any, str] = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
    list: "a list",
    list[str]: "a list of strings",
    dict: "a mapping of names to values",
}


class _Loader(yaml.SafeLoader):
    """Takes 1e-4 for a number, which YAML 1.1 does only with a point."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+$"), [*"+-0123456789"]
)


def read_yaml(text: str, name: str) -> Any:
    """Read a YAML document.

    Args:
        text: YAML.
        name: name of it in errors.

    Raises:
        ValueError: if it isn't valid YAML.
    """
    try:
        return yaml.load(text, _Loader)  # a safe loader
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # the last of a date that isn't one
        place, problem = "", one_line(error)
        if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None and error.problem:
            mark, problem = error.problem_mark, error.problem
            for jargon, words in (("the node content", "a value"), ("'<stream end>'", "the end of the file")):
                problem = problem.replace(jargon, words)
            place = f", line {mark.line + 1}, column {mark.column + 1}"
        raise ValueError(f"{name}{place} isn't valid YAML: {problem}. Correct it.") from error


def read_yaml_file(file: str | os.PathLike) -> Any:
    """Read a YAML file.

    Raises:
        ValueError: if it isn't valid YAML in UTF-8.
        OSError: if it can't be read.
    """
    try:
        text = Path(file).read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} isn't UTF-8 text: {error}. Save it as UTF-8.") from error
    return read_yaml(text, str(file))


def check_name(name: Any, known: Iterable[str], refusal: str) -> None:
    """Refuse an unknown name, and suggest the nearest known one.

    Args:
        name: name to look for.
        known: all valid names.
        refusal: beginning of the message.

    Raises:
        ValueError: if the name isn't among them.
    """
    known = list(known)
    if name not in known:
        near = get_close_matches(str(name), known, n=1)
        raise ValueError(f"{refusal}; {f'did you mean {near[0]!r}?' if near else 'check its spelling.'}")


def typed(name: str, value: Any, hint: Any) -> Any:
    """Convert a value to the type of a setting.

    Quotes make no difference: "3" is a number and "no" a truth value where one is expected. Whole numbers such as 4e3
    are integers.

    Args:
        name: name of the setting, as in the file.
        value: value as it was read.
        hint: type of the setting.

    Raises:
        ValueError: if the value can't be converted; the message says what is expected.
    """
    for reading in _readings(value):
        try:
            type_validator(name, reading, hint)
        except TypeError:
            continue
        return reading
    raise ValueError(f"{name}={shown(value)} must be {_expected(hint)}.")


def _readings(value: Any) -> Iterator[Any]:
    """The value as it is, then what else it can be read as."""
    yield value
    if isinstance(value, os.PathLike):
        yield os.fspath(value)
    if isinstance(value, list | tuple):
        yield list(value)
        yield [tuple(item) if isinstance(item, list) else _scalar(item) for item in value]
    scalar = _scalar(value)
    yield scalar
    if is_number(scalar):
        yield float(scalar)
        if float(scalar).is_integer():
            yield int(scalar)


def _scalar(value: Any) -> Any:
    """The number or truth value in a string, as YAML has it without quotes; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        read = yaml.load(value, _Loader)
    except (yaml.YAMLError, RecursionError, ValueError):
        return value
    return read if isinstance(read, bool | int | float) else value


def _expected(hint: Any) -> str:
    """The values of a type, in words."""
    origin, arguments = get_origin(hint) or hint, get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(_expected(kind) for kind in arguments if kind is not NoneType))
    if origin is Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    return _EXPECTED.get(hint) or _EXPECTED.get(origin) or f"of the type {getattr(origin, '__name__', origin)}"
