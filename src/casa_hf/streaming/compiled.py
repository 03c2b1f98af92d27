# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""How a stream decodes on an accelerator: a static cache, and one compiled step for every token that is read alone.

Everything that a step reads keeps its shape: there is room for the text that the stream may hold and for images up to
the processor's limit of pixels, also before the first image. So one graph serves all tokens, windows, sizes of images,
evictions and streams of the same room. Frames and questions, whose shapes differ, aren't compiled.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from transformers import CompileConfig, GenerationConfig
from transformers.cache_utils import StaticCache
from transformers.utils.generic import is_flash_attention_requested

from ..cache_casa import cache_state, home_layer
from ..transformers_versions import CACHE
from ..window_state import in_doublings
from .state import filled_cache

if TYPE_CHECKING:
    from ..modeling_casa import CasaForConditionalGeneration
    from ..processing_casa import CasaProcessor
    from .settings import StreamSettings

# Room for the text of a forward beyond `max_text_tokens`, to which older text is evicted only before the next one.
_SPARE_TOKENS = 64
# Room for text that isn't bounded, at first.
_FIRST_TOKENS = 2048


class CompiledSteps:
    """A static cache's size, and the compiled step on it.

    Args:
        model: model of the stream.
        config: how the step is compiled.
        num_text_tokens: number of text tokens that there is room for at first.
        num_image_tokens: number of image tokens.

    Attributes:
        step: the model's call, compiled.
        options: the configuration as arguments of `torch.compile`.
    """

    def __init__(
        self, model: CasaForConditionalGeneration, config: CompileConfig, num_text_tokens: int, num_image_tokens: int
    ):
        self._model = model
        self._num_text_tokens = num_text_tokens
        self._num_image_tokens = num_image_tokens
        self.step: Any = model.get_compiled_call(config)
        self.options: dict[str, Any] = config.to_dict()

    @classmethod
    def of(
        cls, model: CasaForConditionalGeneration, processor: CasaProcessor, settings: StreamSettings
    ) -> CompiledSteps | None:
        """The steps of a stream with these settings; None if they aren't to be compiled.

        Raises:
            ValueError: if they are to be and can't.
        """
        if settings.compile is False:
            return None
        wanted = settings.compile is True
        obstacle = _obstacle(model)
        if obstacle is not None and wanted:
            raise ValueError(f"compile=True isn't possible: {obstacle}")
        config = model.generation_config.compile_config or CompileConfig()
        if config.dynamic is None:  # shapes change so rarely that each is worth a graph of its own
            config = replace(config, dynamic=False)
        if obstacle is not None or not _is_valid(model, config, on_any_device=wanted):
            if wanted:
                raise ValueError(
                    "compile=True isn't possible with this model: its quantization can't be compiled, parts of it are "
                    "offloaded, or its generation_config says disable_compile. Leave compile out, or load the model "
                    "otherwise."
                )
            return None
        limit = settings.max_text_tokens
        num_text_tokens = _FIRST_TOKENS if limit is None else limit + _SPARE_TOKENS
        return cls(model, config, num_text_tokens, max_image_tokens(processor))

    def new_cache(self, num_tokens: int = 0) -> StaticCache:
        """An empty cache with room for so many text tokens, at least for as many as any has at first."""
        room = in_doublings(num_tokens, self._num_text_tokens)
        return self._model.get_decoder().static_cache(room, self._num_image_tokens)

    def with_room(self, cache: Any, num_tokens: int) -> Any:
        """The cache if it has room for so many text tokens in all; else a larger one that holds the same, for which
        the step is compiled again."""
        if num_tokens <= home_layer(cache).max_cache_len:
            return cache
        larger = self.new_cache(num_tokens)
        rules = self._model.get_decoder().window_rules
        return filled_cache(larger, cache_state(cache, rules), self._model)


def max_image_tokens(processor: CasaProcessor) -> int:
    """Number of image tokens that a frame has at most, by the processor's limit of pixels."""
    image_processor = processor.image_processor
    limit = processor.frame_max_pixels
    pixels = image_processor.size["longest_edge"] if limit is None else limit
    side = image_processor.patch_size * image_processor.merge_size
    return max(1, pixels // side**2)


def _obstacle(model: CasaForConditionalGeneration) -> str | None:
    """Why the steps of a model can't be compiled, or don't gain by it; None if they may be."""
    implementation = model.config.get_text_config()._attn_implementation
    if is_flash_attention_requested(requested_attention_implementation=implementation):
        return (
            f"attn_implementation={implementation!r} finds the filled part of a static cache again in every block, so "
            'that steps wait for the device. Load the model with "sdpa", or leave compile out.'
        )
    return None


def _is_valid(model: Any, config: CompileConfig, on_any_device: bool) -> bool:
    """Whether `generate` would compile the steps of this model."""
    config = copy.copy(config)
    config._compile_all_devices = on_any_device
    like: Any = model.generation_config
    given = GenerationConfig(disable_compile=like.disable_compile, compile_config=config if on_any_device else None)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=1)
    return bool(model._valid_auto_compile_criteria({CACHE: cache}, given))
