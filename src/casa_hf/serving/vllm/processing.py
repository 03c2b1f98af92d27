# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Prompts and pictures for vLLM: of an image, the sequence holds its delimiters alone.

vLLM tokenizes a prompt with the pads that chat templates write; here each image's pair of delimiters takes the place
of pair and pad. The embedding that the closing one is said to have is the whole image: see `scheduler.ImageRange`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
    PromptUpdateDetails,
)

from casa_hf.configuration_casa import CasaConfig
from casa_hf.placeholders import IMAGE_PAD
from casa_hf.processing_casa import CasaProcessor

from .support import check_windows, grids_of
from .windows import PlacedImage


class CasaProcessingInfo(BaseProcessingInfo):
    """What is known of a model before there are prompts."""

    def get_hf_config(self) -> CasaConfig:
        """The model's configuration."""
        return self.ctx.get_hf_config(CasaConfig)

    def get_hf_processor(self, **kwargs: object) -> CasaProcessor:
        """The model's processor."""
        return self.ctx.get_hf_processor(CasaProcessor, **kwargs)

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """How many images a prompt may have: any number."""
        return {"image": None}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        """How many rows the encoder gives for the largest image."""
        width, height = self.largest_image()
        processor = self.get_hf_processor()
        tokens = processor._get_num_multimodal_tokens(image_sizes=[(height, width)])
        return {"image": tokens["num_image_tokens"][0] + 1}

    def largest_image(self) -> tuple[int, int]:
        """Width and height of the largest image, as the image processor leaves it."""
        processor = self.get_hf_processor().image_processor
        pixels = self.ctx.get_merged_mm_kwargs({}).get("max_pixels") or processor.size["longest_edge"]
        unit = processor.patch_size * processor.merge_size
        edge = max(int(pixels**0.5) // unit, 1) * unit
        return edge, edge


class CasaDummyInputs(BaseDummyInputsBuilder[CasaProcessingInfo]):
    """Inputs by which vLLM measures memory."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        """A prompt with so many images."""
        return self.info.get_hf_processor().image_placeholder * mm_counts.get("image", 0)

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> dict[str, Any]:
        """So many images of the largest size."""
        width, height = self.info.largest_image()
        images = self._get_dummy_images(
            width=width, height=height, num_images=mm_counts.get("image", 0), overrides=mm_options.get("image")
        )
        return {"image": images}


class CasaMultiModalProcessor(BaseMultiModalProcessor[CasaProcessingInfo]):
    """Makes pixels, and puts delimiters where prompts have images."""

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """As in vLLM.

        Raises:
            ValueError: for a prompt that has a window with more images than are served.
        """
        made = super().apply(inputs, timing_ctx)
        config, images = self.info.get_hf_config(), []
        for modality, places in made["mm_placeholders"].items():
            for place, item in zip(places, made["mm_kwargs"][modality], strict=True):
                # The engine, which has seen the item before, knows its size; it ends a request that has no room.
                grids = torch.zeros(1, 3, dtype=torch.long) if item is None else grids_of(modality, item)
                numbers = grids.prod(-1) // config.vision_config.spatial_merge_size**2
                indices = place.offset + place.is_embed.nonzero()[:, 0]
                images += [
                    PlacedImage(index, number, modality == "video")
                    for index, number in zip(indices.tolist(), numbers.expand(len(indices)).tolist(), strict=True)
                ]
        check_windows(config, sorted(images, key=lambda image: image.index), made["prompt_token_ids"])
        return made

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]) -> Mapping[str, Any]:
        grids = hf_inputs.get("image_grid_thw", torch.empty((0, 3), dtype=torch.long))
        return {
            "pixel_values": MultiModalFieldConfig.flat_from_sizes("image", grids.prod(-1)),
            "image_grid_thw": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
        }

    def _delimiters(self) -> tuple[list[int], int | None]:
        """Ids of an image's delimiters, and of the pad between them that chat templates write, if there is one."""
        processor, tokenizer = self.info.get_hf_processor(), self.info.get_tokenizer()
        start = processor.vision_start_token_id
        ids = ([] if start is None else [start]) + [processor.image_token_id]
        return ids, tokenizer.get_vocab().get(IMAGE_PAD) if start is not None else None

    def _postprocess_prompt(self, prompt: list[int]) -> list[int]:
        """The prompt with a pad in each pair of delimiters that has none, and without gist tokens."""
        ids, pad = self._delimiters()
        gists = self.info.get_hf_processor().gist_token_ids
        written: list[int] = []
        after = 0  # gist tokens that may follow
        for token in prompt:
            if after and token == gists[len(gists) - after]:
                after -= 1
                continue
            after = 0
            if token == ids[-1]:
                after = len(gists)
                if pad is not None and written and written[-1] == ids[0]:
                    written.append(pad)
            written.append(token)
        return written

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[Any]:
        ids, pad = self._delimiters()
        gists = self.info.get_hf_processor().gist_token_ids
        target = ids if pad is None else [ids[0], pad, ids[1]]
        return [
            PromptReplacement(
                modality="image",
                target=target,
                replacement=PromptUpdateDetails.select_token_id([*ids, *gists], ids[-1]),
            )
        ]
