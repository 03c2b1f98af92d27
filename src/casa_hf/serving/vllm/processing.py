# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Prompts and pictures for vLLM: of an image, the sequence holds its delimiters alone.

vLLM tokenizes a prompt with the pads that chat templates write; here each image's pair of delimiters takes the place
of pair and pad. The embedding that the closing one is said to have is the whole image: see `scheduler.ImageRange`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import MultiModalDataParser
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
    PromptUpdateDetails,
)

from casa_hf.configuration_casa import CasaConfig
from casa_hf.image_inputs import FRAME_TYPE
from casa_hf.placeholders import IMAGE_PAD, VIDEO_PAD
from casa_hf.processing_casa import CasaProcessor

from .support import check_windows, grids_of
from .windows import PlacedImage

# A video is encoded as a whole, so memory is set aside for the longest one.
MAX_FRAMES = 32


class CasaProcessingInfo(BaseProcessingInfo):
    """What is known of a model before there are prompts."""

    def get_hf_config(self) -> CasaConfig:
        """The model's configuration."""
        return self.ctx.get_hf_config(CasaConfig)

    def get_hf_processor(self, **kwargs: object) -> CasaProcessor:
        """The model's processor."""
        return self.ctx.get_hf_processor(CasaProcessor, **kwargs)

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """How many images and videos a prompt may have: any number."""
        return {"image": None, "video": None} if self.video_pad() is not None else {"image": None}

    def video_pad(self) -> int | None:
        """Id of the token by which prompts name a video; None where none is in the vocabulary."""
        has_start = self.get_hf_processor().vision_start_token_id is not None
        return self.get_tokenizer().get_vocab().get(VIDEO_PAD) if has_start else None

    def get_data_parser(self) -> MultiModalDataParser:
        """What reads the visuals of a request: videos with the times of their frames, if the model reads them."""
        return MultiModalDataParser(video_needs_metadata=self.get_hf_config().video_timestamps is not None)

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        """How many rows the encoder gives for the largest image, and for the longest video."""
        width, height = self.largest_image()
        processor = self.get_hf_processor()
        tokens = processor._get_num_multimodal_tokens([(height, width)], [(1, height, width)])
        of_frame = tokens["num_video_tokens"][0] + 1
        return {"image": tokens["num_image_tokens"][0] + 1, "video": MAX_FRAMES * of_frame}

    def largest_image(self) -> tuple[int, int]:
        """Width and height of the largest image that is served, as the image processor leaves it."""
        processor = self.get_hf_processor().image_processor
        pixels = self.ctx.get_merged_mm_kwargs({}).get("max_pixels") or processor.size["longest_edge"]
        unit = processor.patch_size * processor.merge_size
        edge = min(int(pixels**0.5) // unit, int(self.get_hf_config().casa_max_image_tokens ** 0.5))
        return max(edge, 1) * unit, max(edge, 1) * unit


class CasaDummyInputs(BaseDummyInputsBuilder[CasaProcessingInfo]):
    """Inputs by which vLLM measures memory."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        """A prompt with so many images and videos."""
        processor = self.info.get_hf_processor()
        videos = processor._notation.video * mm_counts.get("video", 0)
        return processor.image_placeholder * mm_counts.get("image", 0) + videos

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> dict[str, Any]:
        """So many images and videos of the largest size."""
        width, height = self.info.largest_image()
        images = self._get_dummy_images(
            width=width, height=height, num_images=mm_counts.get("image", 0), overrides=mm_options.get("image")
        )
        number = mm_counts.get("video", 0)
        frames = np.zeros((MAX_FRAMES, height, width, 3), dtype=np.uint8)
        known = {"fps": 1.0, "frames_indices": list(range(MAX_FRAMES)), "total_num_frames": MAX_FRAMES}
        return {"image": images, "video": [(frames, dict(known)) for _ in range(number)]}


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

    def _call_hf_processor(self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, object]) -> Any:
        """Pixels of images and of each video, with the ids of what stands for it in a prompt."""
        given = dict(hf_data)
        videos = given.pop("videos", [])
        made = super()._call_hf_processor(given, hf_kwargs) if given else BatchFeature()
        if not videos:
            return made
        processor = self.info.get_hf_processor(**hf_kwargs)
        parts = []
        for video in videos:
            frames, known = video if isinstance(video, tuple) else (video, None)
            if len(frames) > MAX_FRAMES:
                raise ValueError(
                    f"The video has {len(frames)} frames; at most {MAX_FRAMES} are served. Take fewer of them, as by "
                    f'--media-io-kwargs \'{{"video": {{"num_frames": {MAX_FRAMES}}}}}\', or send it frame by frame.'
                )
            options = {"do_sample_frames": False, "video_metadata": [_known(known)], "return_tensors": "pt"}
            given = {"text": processor._notation.video, "videos": [np.asarray(frames)]}
            parts.append(self.info.ctx.call_hf_processor(processor, given, {**hf_kwargs, **options}))
        made["pixel_values_videos"] = torch.cat([part["pixel_values"] for part in parts])
        made["video_grid_thw"] = torch.cat([part["image_grid_thw"] for part in parts])
        made["num_frames"] = torch.tensor([len(part["image_grid_thw"]) for part in parts])
        made["video_ids"] = [part["input_ids"][0] for part in parts]
        made["video_is_frame"] = [part["mm_token_type_ids"][0] == FRAME_TYPE for part in parts]
        return made

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]) -> Mapping[str, Any]:
        none = torch.empty((0, 3), dtype=torch.long)
        grids, of_frames = hf_inputs.get("image_grid_thw", none), hf_inputs.get("video_grid_thw", none)
        numbers = hf_inputs.get("num_frames", none[:, 0])
        patches = (
            torch.stack([part.prod(-1).sum() for part in of_frames.split(numbers.tolist())])
            if len(numbers)
            else numbers
        )
        fields = {
            "pixel_values": MultiModalFieldConfig.flat_from_sizes("image", grids.prod(-1)),
            "image_grid_thw": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
            "pixel_values_videos": MultiModalFieldConfig.flat_from_sizes("video", patches),
            "video_grid_thw": MultiModalFieldConfig.flat_from_sizes("video", numbers, keep_on_cpu=True),
        }
        for name in ("num_frames", "video_ids", "video_is_frame"):
            fields[name] = MultiModalFieldConfig.batched("video", keep_on_cpu=True)
        return fields

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
        image = PromptReplacement(
            modality="image",
            target=target,
            replacement=PromptUpdateDetails.select_token_id([*ids, *gists], ids[-1]),
        )
        video_pad = self.info.video_pad()
        if video_pad is None:
            return [image]

        def frames(index: int) -> Any:
            item = out_mm_kwargs["video"][index]
            is_frame = item["video_is_frame"].data
            return PromptUpdateDetails(full=item["video_ids"].data.tolist(), is_embed=lambda *_: is_frame)

        video = PromptReplacement(modality="video", target=[ids[0], video_pad, ids[1]], replacement=frames)
        return [image, video]


def _known(metadata: Any) -> dict[str, Any] | None:
    """What is known of a video's frames, in the form in which `CasaProcessor` takes it."""
    if not metadata or not metadata.get("fps"):
        return None
    return {"fps": metadata["fps"], "frames_indices": metadata.get("frames_indices")}
