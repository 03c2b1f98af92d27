# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The attention of fusion layers in vLLM.

A run of tokens that see the same images is to vLLM's attention kernels what a sequence is: its queries are the last
tokens of its keys, which lie in blocks. So the kernel that vLLM has chosen for self-attention computes fusion too,
prefill and decoding alike; only which blocks and lengths it is given is decided here.

The whole layer is one operator, at which vLLM splits compiled graphs (`support.FUSION_OP`): what it does depends on
the step.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    CommonAttentionMetadata,
    subclass_attention_backend_with_overrides,
)

from .memory import FusionSpec
from .steps import NewImage, Step, TextPlaces, WindowMemory
from .support import max_image_tokens


class FusionMetadata:
    """What a step's fusion layers share: the runner's view of their blocks, and once it is planned, the step.

    Attributes:
        step: plan of the step; None until it is made.
        kernel: metadata of the kernel for it.
        images: (num_image_tokens, features) of new images, their (axes, num_image_tokens) positions and, for LoRA, the
            (num_image_tokens,) text tokens that they precede; None without images.
    """

    def __init__(self, builder: Any, common: CommonAttentionMetadata):
        self.builder = builder
        self.common = common
        self.step: Step | None = None
        self.kernel: Any = None
        self.images: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None = None

    def plan(
        self,
        memory: WindowMemory,
        text: TextPlaces,
        input_ids: torch.Tensor,
        images: list[NewImage],
    ) -> None:
        """Plan the step; arguments as in `WindowMemory.plan`."""
        common = self.common
        self.step = step = memory.plan(
            text, common.block_table_tensor, self.builder.kv_cache_spec.block_size, input_ids, images
        )
        number = int(step.query_start_host[-1])
        self.kernel = self.builder.build_kernel(
            CommonAttentionMetadata(
                query_start_loc=step.query_start,
                query_start_loc_cpu=step.query_start_host,
                seq_lens=step.lengths,
                num_reqs=len(step.lengths),
                num_actual_tokens=number,
                max_query_len=step.max_queries,
                max_seq_len=step.max_keys,
                block_table_tensor=step.block_table,
                slot_mapping=step.block_table.new_full((number,), -1, dtype=torch.long),
                causal=memory.rules.with_text,
            )
        )


class _PlannedOutside:
    """Builders of metadata for steps that are planned outside of CUDA graphs."""

    supports_update_block_table = False

    @classmethod
    def get_cudagraph_support(cls, *args: Any, **kwargs: Any) -> AttentionCGSupport:
        return AttentionCGSupport.NEVER


def _with_builder(name: str, backend: Any, builder: type) -> type[AttentionBackend]:
    """A backend with another builder of metadata."""
    return subclass_attention_backend_with_overrides(name, backend, {"get_builder_cls": staticmethod(lambda: builder)})


@cache
def fusion_backend(backend: Any) -> type[AttentionBackend]:
    """The backend of fusion layers: that of self-attention, whose metadata is built once the step is planned."""
    builder_class: Any = backend.get_builder_cls()

    class FusionMetadataBuilder(_PlannedOutside, builder_class):
        def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> FusionMetadata:
            return FusionMetadata(self, common_attn_metadata)

        def build_kernel(self, common: CommonAttentionMetadata) -> Any:
            return super().build(0, common)

    return _with_builder("CasaFusion", backend, FusionMetadataBuilder)


@cache
def text_backend(backend: Any) -> type[AttentionBackend]:
    """A backend of self-attention whose metadata tells where the text lies: `casa_text`, a `TextPlaces`."""
    builder_class: Any = backend.get_builder_cls()

    class TextMetadataBuilder(_PlannedOutside, builder_class):
        def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
            metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
            common = common_attn_metadata
            metadata.casa_text = TextPlaces(
                block_table=common.block_table_tensor,
                slots=common.slot_mapping[: common.num_actual_tokens],
                query_start=common.query_start_loc,
                query_start_host=common.query_start_loc_cpu,
                lengths=common.seq_lens,
                block_size=self.kv_cache_spec.block_size,
            )
            return metadata

    return _with_builder("CasaText", backend, TextMetadataBuilder)


class FusionAttention(Attention):
    """One softmax over the images of a token's window and, with text keys, the window's text up to the token.

    Attributes:
        owner: the fusion layer, which makes keys and values of image states; set by it.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.attn_backend.forward_includes_kv_cache_update:
            raise ValueError(
                f"CASA models can't be served with the attention backend {self.attn_backend.get_name()}, which writes "
                "keys while it attends; choose another one by --attention-backend, such as FLASH_ATTN."
            )
        self.attn_backend: Any = fusion_backend(self.attn_backend)
        self.owner: list[Any] = []  # not a submodule

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> FusionSpec:
        return FusionSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            dtype=self.kv_cache_torch_dtype,
            max_image_tokens=max_image_tokens(vllm_config),
        )

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """(num_tokens, heads * head_dim) of queries, keys and values of the text; 0 where a token sees nothing."""
        output = torch.empty_like(query)
        torch.ops.vllm.casa_fusion(query, key, value, output, self.layer_name)
        return output

    def fuse(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output: torch.Tensor) -> None:
        """Write the attention of a step into `output`."""
        all_metadata = get_forward_context().attn_metadata
        metadata = all_metadata.get(self.layer_name) if isinstance(all_metadata, dict) else None
        if metadata is None or metadata.step is None:
            output.zero_()
            return
        step, cache = metadata.step, self.kv_cache
        if step.moved_from is not None:
            cache[step.moved_to] = cache[step.moved_from]
        if step.image_slots is not None:
            image_key, image_value = self.owner[0].image_keys(*metadata.images)
            self._write(image_key, image_value, step.image_slots)
        heads = (-1, self.num_kv_heads, self.head_size)
        key, value = key.view(heads), value.view(heads)
        if step.text_slots is not None:
            number = len(step.text_slots)
            self._write(key[:number], value[:number], step.text_slots)
        query = query.view(-1, self.num_heads, self.head_size)
        output = output.view_as(query)
        if step.queries is None:
            number = len(step.sees)
            self._attend(query[:number], key[:number], value[:number], metadata.kernel, output[:number])
            output[:number].masked_fill_(~step.sees[:, None, None], 0)
            output[number:].zero_()
            return
        output.zero_()
        if len(step.queries):
            chosen = query[step.queries]
            attended = torch.zeros_like(chosen)
            self._attend(chosen, key[step.queries], value[step.queries], metadata.kernel, attended)
            output[step.queries] = attended

    def _write(self, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
        self.impl.do_kv_cache_update(self, key.contiguous(), value.contiguous(), self.kv_cache, slots)

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, metadata: Any, output: torch.Tensor
    ) -> None:
        self.impl.forward(self, query, key, value, self.kv_cache, metadata, output=output)


def casa_fusion(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output: torch.Tensor, layer_name: str
) -> None:
    """The operator of `FusionAttention`."""
    get_forward_context().no_compile_layers[layer_name].fuse(query, key, value, output)


def _casa_fusion_fake(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output: torch.Tensor, layer_name: str
) -> None:
    return


direct_register_custom_op(
    op_name="casa_fusion", op_func=casa_fusion, mutates_args=["output"], fake_impl=_casa_fusion_fake
)
