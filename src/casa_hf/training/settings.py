# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Settings from a YAML file, typed as the fields of dataclasses are, the way a command line would be."""

from __future__ import annotations

import os
import re
from argparse import ArgumentTypeError
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from transformers.hf_argparser import string_to_bool

from ..checks import shown

_EXPECTED = {bool: "true or false", int: "an integer", float: "a number", str: "a string", list: "a list"}


class _Loader(yaml.SafeLoader):
    """Takes 1e-4 for a number, which YAML 1.1 does only with a point."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+$"), [*"+-0123456789"]
)


def read_yaml(text: str, name: str) -> Any:
    """What a YAML document holds.

    Args:
        text: of the document.
        name: what to call it in errors.

    Raises:
        ValueError: if it isn't YAML.
    """
    try:
        return yaml.load(text, _Loader)  # a safe loader
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # the last of a date that isn't one
        raise ValueError(f"{name} isn't valid YAML: {error}") from error


def read_yaml_file(file: str | os.PathLike) -> Any:
    """What a YAML file holds.

    Raises:
        ValueError: if it isn't YAML in UTF-8.
        OSError: if it can't be read.
    """
    try:
        text = Path(file).read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} isn't text in UTF-8: {error}") from error
    return read_yaml(text, str(file))


def check_name(name: Any, known: Iterable[str], refusal: str) -> None:
    """Refuse a name that isn't known, with the nearest one that is.

    Args:
        name: as it was given.
        known: all names.
        refusal: the beginning of the message.

    Raises:
        ValueError: with the refusal and a suggestion.
    """
    known = list(known)
    if name not in known:
        near = get_close_matches(str(name), known, n=1)
        raise ValueError(f"{refusal}; did you mean {near[0]!r}?" if near else f"{refusal}.")


def typed(name: str, value: Any, hint: Any) -> Any:
    """A value as the field of a dataclass takes it.

    A number in quotes is a number where one is wanted, 4e3 an integer, and "no" a truth value. Types that aren't
    numbers, truth values, strings, lists or mappings are left to the dataclass.

    Args:
        name: of the setting, as it stands in the file.
        value: as it was read.
        hint: the type of the field.

    Raises:
        ValueError: with name, value and what is expected, if the value is of another type.
    """
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    for read in (_as_it_is, _converted):
        for kind in kinds:
            try:
                return read(name, value, kind)
            except (TypeError, ArgumentTypeError):
                continue
    expected = [_expected(kind) for kind in kinds if kind is not NoneType]
    raise ValueError(f"{name}={shown(value)} must be {' or '.join(dict.fromkeys(expected))}.")


def _as_it_is(name: str, value: Any, kind: Any) -> Any:
    """The value, if it is of this kind already; raises TypeError otherwise."""
    origin = get_origin(kind) or kind
    if origin is Literal:
        fits = value in get_args(kind)
    elif origin in (bool, int, float):
        fits = isinstance(value, (int, float) if origin is float else origin) and isinstance(value, bool) == (
            origin is bool
        )
    elif origin is str:
        fits = isinstance(value, (str, os.PathLike))
        value = os.fspath(value) if fits else value
    elif origin in (list, tuple):
        fits = isinstance(value, (list, tuple))
        (item, *_) = get_args(kind) or (Any,)
        value = [typed(f"{name}[{index}]", each, item) for index, each in enumerate(value)] if fits else value
    elif origin in (dict, Mapping):
        fits = isinstance(value, Mapping)
    elif isinstance(origin, type) and issubclass(origin, Enum):
        fits = isinstance(value, (str, origin))
    else:
        fits = origin is Any or (isinstance(origin, type) and (origin is NoneType) == (value is None))
    if not fits:
        raise TypeError
    return value


def _converted(name: str, value: Any, kind: Any) -> Any:
    """A string, or a whole number written with a point, as this kind; raises TypeError or ArgumentTypeError."""
    if kind is bool and isinstance(value, str):
        return string_to_bool(value)
    if kind not in (int, float) or not isinstance(value, (str, float)):
        raise TypeError
    try:
        number = float(value)
    except ValueError:
        raise TypeError from None
    if kind is int and not number.is_integer():
        raise TypeError
    return kind(value if isinstance(value, str) and value.strip().lstrip("+-").isdecimal() else number)


def _expected(kind: Any) -> str:
    origin = get_origin(kind) or kind
    if origin is Literal:
        return f"one of {', '.join(map(repr, get_args(kind)))}"
    if isinstance(origin, type) and issubclass(origin, Enum):
        return "a string"
    return _EXPECTED.get(origin, "a list" if origin is tuple else "a mapping of names to values")
