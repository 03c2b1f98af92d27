# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""What is compiled for one shape at a time and shared by all streams of a model: one-token forwards of several rows on
a static cache, for example."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from types import FunctionType
from typing import TYPE_CHECKING, Any, Self

import torch

from ..cache_casa import home_layer

if TYPE_CHECKING:
    from transformers import StaticCache

    from ..modeling_casa import CasaForConditionalGeneration

# Shapes of caches that one-token forwards stay compiled for.
_MAX_SHAPES = 16


def compiled(function: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    """The function, compiled as a whole for the shapes that it is called with.

    It gets code of its own: a compiler keeps what it has made, and counts it, by code.

    Args:
        function: function that is defined in Python.
        options: arguments of `torch.compile`, but for how shapes are treated.
    """
    assert isinstance(function, FunctionType)
    own = FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    return torch.compile(own, **{**options, "fullgraph": True, "dynamic": False})


class GraphsOfModel:
    """Base of what is compiled for a model. Streams in several threads may use it at once.

    Args:
        model: model that runs.
        options: arguments of `torch.compile`; None to compile nothing.
    """

    def __init__(self, model: CasaForConditionalGeneration, options: dict[str, Any] | None = None):
        self._model, self._options = model, options
        self._lock = threading.Lock()  # for what is kept

    @classmethod
    def of(cls, model: CasaForConditionalGeneration, options: dict[str, Any] | None) -> Self:
        """That of a model, which all its streams share, those that are made later too, if anything is compiled."""
        if options is None:
            return cls(model)
        name = f"_{cls.__name__}"
        shared: Self | None = getattr(model, name, None)
        if shared is None or shared._options != options:
            shared = cls(model, options)
            setattr(model, name, shared)
        return shared

    def __reduce__(self) -> Any:
        # A copy of the model, or its file, has nothing that was compiled for this one.
        return type(self), (self._model, self._options)


class StepsByShape(GraphsOfModel):
    """Forwards of one token per row, compiled for each shape of the cache: as many rows, and as much room for text and
    images.

    Caches of one shape have the same step, those of several batches for example; CUDA graphs are recorded for each.

    Args:
        model: model that runs them.
        options: arguments of `torch.compile`.
    """

    def __init__(self, model: CasaForConditionalGeneration, options: dict[str, Any] | None = None):
        super().__init__(model, options)
        self._steps: dict[tuple[int, int, int], Callable[..., torch.Tensor]] = {}

    def __call__(self, ids: torch.Tensor, mask: torch.Tensor, cache: StaticCache) -> torch.Tensor:
        """(rows, vocabulary) logits of the next tokens; on a GPU, until the next call.

        Args:
            ids: (rows, 1) new tokens, on the model's device.
            mask: (rows, 1) 0 for rows without one, on the model's device.
            cache: static cache of so many rows.
        """
        home = home_layer(cache)
        if not home.window_state.padded:  # as behind a frame or an eviction without padding; not a graph of its own
            home.window_state = replace(home.window_state, padded=True)
        shape = len(ids), home.max_cache_len, home.window_state.image_columns
        with self._lock:
            step = self._steps.pop(shape, None) or compiled(_step_of(self._model), self._options or {})
            self._steps[shape] = step  # the last one used is the last one to go
            if len(self._steps) > _MAX_SHAPES:
                del self._steps[next(iter(self._steps))]
        return step(ids, mask, cache)


def _step_of(model: Any) -> Callable[..., torch.Tensor]:
    def step(ids: torch.Tensor, mask: torch.Tensor, cache: StaticCache) -> torch.Tensor:
        return model(input_ids=ids, attention_mask=mask, cache=cache, use_cache=True, logits_to_keep=1).logits[:, -1]

    return step
