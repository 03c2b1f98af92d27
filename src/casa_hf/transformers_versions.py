# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""What differs between the versions of Transformers that this package supports.

A decoder's cache is called `cache` from 5.24 on and `past_key_values` before. CASA models say `cache`, take both names
on every version, and hand each function of Transformers the one that it knows, which is `CACHE`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, TypeVar

import transformers
from transformers.masking_utils import create_causal_mask
from transformers.utils import logging

logger = logging.get_logger(__name__)

_Result = TypeVar("_Result")

# Major and minor version of the newest Transformers that the tests have passed with.
NEWEST_TESTED = (5, 24)

_OLD_NAME = "past_key_values"
CACHE_NAMES = ("cache", _OLD_NAME)

_INSTALLED = tuple(map(int, transformers.__version__.split(".")[:2]))

# The name of a decoder's cache in this version of Transformers.
CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else _OLD_NAME


def with_one_cache_name(arguments: Mapping[str, Any], name: str = "cache") -> dict[str, Any]:
    """Keyword arguments whose cache, given by either name, goes by one.

    Args:
        arguments: of a function that takes a cache, by default None.
        name: the one to go by, "cache" or "past_key_values".

    Raises:
        ValueError: if both names hold a cache.
    """
    caches = [arguments[key] for key in CACHE_NAMES if arguments.get(key) is not None]
    if len(caches) > 1:
        raise ValueError(
            f"Both cache and {_OLD_NAME} were given; they are two names of the same argument. Pass one of them."
        )
    others = {key: value for key, value in arguments.items() if key not in CACHE_NAMES}
    return {**others, name: caches[0]} if caches else others


def takes_cache(function: Callable[..., _Result]) -> Callable[..., _Result]:
    """Let a function with a parameter `cache` be called with `past_key_values` too.

    Its signature shows the name that this version of Transformers looks for.
    """

    @wraps(function)
    def either(*args: Any, **kwargs: Any) -> _Result:
        return function(*args, **(with_one_cache_name(kwargs) if _OLD_NAME in kwargs else kwargs))

    own = inspect.signature(function)
    parameters = [
        parameter.replace(name=CACHE) if parameter.name == "cache" else parameter
        for parameter in own.parameters.values()
    ]
    either.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    return either


class _KeysByBothNames:
    """A dictionary whose cache is an entry by either name."""

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(_known(key))  # type: ignore[misc]

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(_known(key), value)  # type: ignore[misc]

    def __contains__(self, key: Any) -> bool:
        return super().__contains__(_known(key))  # type: ignore[misc]

    def get(self, key: Any, default: Any = None) -> Any:
        return super().get(_known(key), default)  # type: ignore[misc]


def _known(key: Any) -> Any:
    return CACHE if key in CACHE_NAMES else key


class InputsByBothNames(_KeysByBothNames, dict[str, Any]):
    """Inputs of a forward whose cache is read and replaced by either name.

    PEFT's prompt learning looks for `past_key_values` in what `prepare_inputs_for_generation` returns, and puts the
    prefix that it has learned there; up to PEFT 0.21 it does so with Transformers 5.24 too.
    """


class CacheByBothNames(_KeysByBothNames):
    """An output that answers to both names of its cache: outputs of Transformers do so from 5.24 on."""

    if CACHE == _OLD_NAME:

        @property
        def cache(self) -> Any:
            return self.past_key_values

        @cache.setter
        def cache(self, value: Any) -> None:
            self.past_key_values = value


def is_older_than(major: int, minor: int) -> bool:
    """Whether the installed Transformers is older than this version."""
    return (major, minor) > _INSTALLED


def warn_if_untested() -> None:
    """Say once if the installed Transformers is newer than the newest one that this package was tested with."""
    if _INSTALLED > NEWEST_TESTED:
        newest = ".".join(map(str, NEWEST_TESTED))
        logger.warning_once(
            f"casa_hf was tested with Transformers up to {newest}; Transformers {transformers.__version__} is "
            "installed. If something fails or answers look wrong, update casa_hf (or the code that came with the "
            "checkpoint), or install "
            f'"transformers<{NEWEST_TESTED[0]}.{NEWEST_TESTED[1] + 1}".'
        )
