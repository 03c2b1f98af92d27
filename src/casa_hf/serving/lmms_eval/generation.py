# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""What a task of lmms-eval asks of `generate`, in the words of Transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

MAX_NEW_TOKENS = 128

# lmms-eval adds the delimiter of its few-shot examples to what a task stops at. It isn't meant for chats, where it
# would cut every answer of several paragraphs.
_FEWSHOT_DELIMITER = "\n\n"

# Of sampling; a greedy run has none of them, whatever the checkpoint's generation_config.json says.
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p")


class Generation(NamedTuple):
    """How answers are generated.

    Attributes:
        options: arguments of `generate`.
        stops: strings at which an answer ends; they aren't part of it.
        unknown: names that the task gives and `generate` doesn't know.
    """

    options: dict[str, Any]
    stops: tuple[str, ...]
    unknown: tuple[str, ...]

    def ended(self, answer: str) -> str:
        """The answer up to the first of the strings at which it ends."""
        return answer[: min((place for stop in self.stops if (place := answer.find(stop)) >= 0), default=len(answer))]


def read_generation(given: Mapping[str, Any]) -> Generation:
    """How a task wants its answers generated.

    Args:
        given: `generation_kwargs` of the task. A temperature of 0 means greedy decoding, a positive one sampling,
            unless `do_sample` says it. Where neither is given, the checkpoint's generation_config.json decides.

    Raises:
        ValueError: if `until` isn't a string or a list of strings.
    """
    from transformers import GenerationConfig

    asked = {name: value for name, value in given.items() if value is not None}
    stops = _stops(asked.pop("until", ()))
    if "max_gen_toks" in asked:
        asked.setdefault("max_new_tokens", asked.pop("max_gen_toks"))
    asked.setdefault("max_new_tokens", MAX_NEW_TOKENS)
    if "temperature" in asked:
        asked.setdefault("do_sample", asked["temperature"] > 0)
    if asked.get("do_sample") is False or asked.get("temperature") == 0:
        asked |= {"do_sample": False} | dict.fromkeys(_SAMPLING)
    known = set(GenerationConfig().to_dict())
    unknown = tuple(sorted(asked.keys() - known))
    return Generation({name: value for name, value in asked.items() if name in known}, stops, unknown)


def _stops(until: str | Sequence[str]) -> tuple[str, ...]:
    stops = [until] if isinstance(until, str) else list(until)
    if not all(isinstance(stop, str) for stop in stops):
        raise ValueError(f"until={until!r} must be a string or a list of strings.")
    return tuple(stop for stop in stops if stop and stop != _FEWSHOT_DELIMITER)


__all__ = ["MAX_NEW_TOKENS", "Generation", "read_generation"]
