# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The key/value cache of fusion layers, as a group of vLLM's own: blocks of the pool that belong to one request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from vllm.config import VllmConfig
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm.v1.kv_cache_spec_registry import register_kv_cache_spec
from vllm.v1.request import Request

from .windows import RequestWindows


class FusionManager(SingleTypeKVCacheManager):
    """Gives each request the blocks that its windows take, step by step; a request without images gets none.

    Blocks are kept until the request ends or is preempted: as many as its largest step so far has needed. None are
    shared between requests, so that no picture is ever seen by another one.

    Attributes:
        requests: the scheduler's windows by request; set by the scheduler.
    """

    supports_fine_grained_hash_lookup: ClassVar[bool] = False

    def __init__(self, kv_cache_spec: Any, *args: Any, **kwargs: Any):
        super().__init__(kv_cache_spec, *args, **kwargs)
        self._record_new_block_ids = False
        self.requests: Mapping[str, RequestWindows] = {}
        self._starts: dict[str, int] = {}

    @property
    def has_positionally_stable_blocks(self) -> bool:
        return False

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        *args: Any,
        apply_admission_cap: bool = False,
        **kwargs: Any,
    ) -> int:
        if apply_admission_cap:  # whether the whole request can be served at all, in as many steps as it takes
            windows = self.requests.get(request_id)
            needed = 0 if windows is None else windows.largest(num_tokens, self.block_size)
        else:
            self._starts[request_id] = total_computed_tokens
            needed = self._needed(request_id, num_tokens)
        return max(needed - len(self.req_to_blocks.get(request_id, ())), 0)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any) -> list[KVCacheBlock]:
        blocks = self.req_to_blocks[request_id]
        missing = self._needed(request_id, num_tokens) - len(blocks)
        if missing <= 0:
            return []
        new = self.block_pool.get_new_blocks(missing)
        blocks.extend(new)
        return new

    def _needed(self, request_id: str, num_tokens: int) -> int:
        windows = self.requests.get(request_id)
        if windows is None:
            return 0
        return windows.num_blocks(self._starts.get(request_id, 0), num_tokens, self.block_size)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        self._starts.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)

    # None of this is shared, or outlives the request.

    def add_local_computed_blocks(self, *args: Any, **kwargs: Any) -> None:
        return

    def allocate_external_computed_blocks(self, *args: Any, **kwargs: Any) -> None:
        return

    def cache_blocks(self, request: Request, *args: Any, **kwargs: Any) -> None:
        return

    def remove_skipped_blocks(self, *args: Any, **kwargs: Any) -> None:
        return

    def get_num_skipped_tokens(self, num_computed_tokens: int) -> int:
        return 0

    def get_num_common_prefix_blocks(self, running_request_id: str) -> int:
        return 0

    @classmethod
    def find_longest_cache_hit(
        cls, block_hashes: Any, max_length: int, kv_cache_group_ids: list[int], *args: Any, **kwargs: Any
    ) -> Any:
        return tuple([] for _ in kv_cache_group_ids), 0


@register_kv_cache_spec(manager_class=FusionManager)
@dataclass(frozen=True, kw_only=True)
class FusionSpec(AttentionSpec):
    """Keys and values of a fusion layer.

    Attributes:
        max_image_tokens: largest number of image tokens of a window; see `support.max_image_tokens`.
    """

    max_image_tokens: int

    @property
    def prefix_cacheable(self) -> bool:
        return False

    @property
    def uses_slot_mapping(self) -> bool:
        return False

    def max_num_blocks_per_req(self, vllm_config: VllmConfig, max_len: int) -> int:
        """Number of blocks of the largest window: its images, and all text that a request can have."""
        return -(-self.max_image_tokens // self.block_size) + -(-max_len // self.block_size) + 1

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        max_len = vllm_config.model_config.max_model_len
        return self.max_num_blocks_per_req(vllm_config, max_len) * self.page_size_bytes
