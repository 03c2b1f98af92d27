# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""vLLM's schedulers, told of windows: when a step has to end, and what an image costs."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from transformers.utils import logging
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from .memory import FusionManager, FusionSpec
from .support import MAX_IMAGE_TOKENS, fusion_rules, grids_of
from .windows import PlacedImage, RequestWindows

logger = logging.get_logger(__name__)

# The encoder gives a row with the size of an image before those of its tokens.
ROWS_BESIDE_TOKENS = 1


@dataclass(frozen=True, eq=False)
class ImageRange(PlaceholderRange):
    """Where an image, or the frames of a video, stand in a prompt; it counts the rows that the encoder gives.

    Attributes:
        rows: number of rows for each True of `is_embed`.
        is_video: whether these are frames.
    """

    rows: tuple[int, ...] = ()
    is_video: bool = False

    @cached_property
    def embeds_cumsum(self) -> list[int] | None:
        rows, total, sums = iter(self.rows), 0, []
        for is_embed in self.is_embed.tolist():
            total += next(rows) if is_embed else 0
            sums.append(total)
        return sums

    @property
    def images(self) -> list[PlacedImage]:
        """The images by the tokens that they precede."""
        places = self.is_embed.nonzero()[:, 0].tolist()
        return [
            PlacedImage(self.offset + place, number - ROWS_BESIDE_TOKENS, self.is_video)
            for place, number in zip(places, self.rows, strict=True)
        ]


def image_range(feature: MultiModalFeatureSpec, merge_size: int) -> ImageRange:
    """The placeholder range of a feature, with the numbers of its rows."""
    given = feature.mm_position
    if isinstance(given, ImageRange):
        return given
    assert feature.data is not None, "the sizes of images come with each request"
    is_video = feature.modality == "video"
    grids = grids_of(feature.modality, feature.data)
    numbers = (grids.prod(-1) // merge_size**2 + ROWS_BESIDE_TOKENS).tolist()
    known = {field.name: getattr(given, field.name) for field in fields(PlaceholderRange)}
    return ImageRange(**known, rows=tuple(numbers), is_video=is_video)


class CasaScheduling(Scheduler):
    """What both schedulers do otherwise than vLLM's."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        config = self.vllm_config.model_config.hf_config
        self._rules = fusion_rules(config)
        self._merge_size = config.vision_config.spatial_merge_size
        self._windows: dict[str, RequestWindows] = {}
        [self._fusion] = [
            manager
            for manager in self.kv_cache_manager.coordinator.single_type_managers
            if isinstance(manager, FusionManager)
        ]
        self._fusion.requests = self._windows
        spec = self._fusion.kv_cache_spec
        assert isinstance(spec, FusionSpec)
        self._most_image_tokens = spec.max_image_tokens
        self._capacity = spec.max_num_blocks_per_req(self.vllm_config, self.max_model_len)
        lookup = self.kv_cache_manager.get_computed_blocks
        # What fusion layers know of a prefix isn't shared, so that none is taken over from the first image on.
        self.kv_cache_manager.get_computed_blocks = lambda request, *limits: self._before_images(
            request, lookup(request, *limits)
        )

    def add_request(self, request: Request) -> None:
        for feature in request.mm_features:
            feature.mm_position = image_range(feature, self._merge_size)
        super().add_request(request)

    def _windows_of(self, request: Request) -> RequestWindows:
        """The windows of a request; computed again when a streaming session has received more images."""
        known = self._windows.get(request.request_id)
        images = [image for feature in request.mm_features for image in feature.mm_position.images]
        if known is None or len(known.images) != len(images):
            known = RequestWindows(images, lambda start, end: request.all_token_ids[start:end], self._rules)
            self._windows[request.request_id] = known
        return known

    def _before_images(self, request: Request, found: tuple[Any, ...]) -> tuple[Any, ...]:
        """A prefix that the cache has, up to the first image."""
        blocks, number, *rest = found
        if not request.has_encoder_inputs:
            return found
        first = self._windows_of(request).first_image
        size = self.block_size
        if first is None or number <= first // size * size:
            return found
        number = first // size * size
        kept = tuple(group[: number // size] for group in blocks.blocks)
        return self.kv_cache_manager.create_kv_cache_blocks(kept), number, *(0 for _ in rest)

    def _try_schedule_encoder_inputs(
        self,
        request: Request,
        num_computed_tokens: int,
        num_new_tokens: int,
        encoder_compute_budget: int,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        windows = self._windows_of(request)
        if windows.most_image_tokens > self._most_image_tokens:
            logger.error(
                "Request %s has a window with %d image tokens, which may have %d (%s in additional_config); it ends "
                "with an error.",
                request.request_id,
                windows.most_image_tokens,
                self._most_image_tokens,
                MAX_IMAGE_TOKENS,
            )
            self.encoder_cache_mismatch_reqs.add(request.request_id)
            num_new_tokens = 0
        elif num_new_tokens > 0:
            start, end = num_computed_tokens, num_computed_tokens + num_new_tokens
            num_new_tokens = windows.end_of_step(start, end, self._capacity, self._fusion.block_size) - start
        return super()._try_schedule_encoder_inputs(
            request, num_computed_tokens, num_new_tokens, encoder_compute_budget, *args, **kwargs
        )

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        self._windows.pop(request.request_id, None)
        return super()._free_request(request, *args, **kwargs)


class CasaScheduler(CasaScheduling):
    """The scheduler that waits for each step."""


class CasaAsyncScheduler(CasaScheduling, AsyncScheduler):
    """The scheduler that is a step ahead."""


def make_scheduler(vllm_config: Any, **kwargs: Any) -> Scheduler:
    """The scheduler for a configuration; `SchedulerConfig.scheduler_cls` names this function."""
    scheduler = CasaAsyncScheduler if vllm_config.scheduler_config.async_scheduling else CasaScheduler
    return scheduler(vllm_config=vllm_config, **kwargs)
