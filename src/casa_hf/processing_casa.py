# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""`CasaProcessor`: conversations with images and videos become the inputs of a CASA model.

Images never enter the token sequence; `placeholders.py` says how they are written in a prompt. Pixels come from the
source's own image processor.
"""

# Transformers reads the annotations of typed dictionaries at run time, so they must not become strings here.

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import BatchFeature
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.auto.tokenization_auto import AutoTokenizer
from transformers.processing_utils import ImagesKwargs, MultiModalData, ProcessingKwargs, ProcessorMixin
from transformers.utils import logging

from .backbones import SOURCE_BACKBONES
from .chat_templates import plain_turns, wrap_chat_template
from .chat_text import ChatText, token_ids
from .checks import listed
from .design_space import check_gist_tokens
from .folder_files import read_json
from .frames_casa import Frames, check_sampling, measure_frames, read_frames
from .image_inputs import DELIMITER_TYPE, FRAME_TYPE, IMAGE_TYPE
from .media_casa import (
    MediaPolicy,
    elements_of,
    image_size,
    is_image,
    is_video,
    is_video_or_files,
    name_of,
    rgb_image,
    rgb_pixels,
)
from .patches_casa import level_patches
from .placeholders import VISION_END, VISION_START, DelimiterError, Notation, Prompt, delimiters_of
from .publishing_hook import PublishedByHook
from .temporal_patches import (
    ALL_FRAMES,
    check_frames_per_image,
    concatenate_patches,
    join_frames,
    num_temporal_patches,
)
from .timestamps_casa import ASSUMED_FPS, check_video_timestamps, num_common_last, timestamp_text
from .videos_casa import CasaVideosKwargs, Visual, video_metadata

logger = logging.get_logger(__name__)

MAX_PIXELS = 952 * 952
FRAME_MAX_PIXELS = 504 * 504

_LIMITS = ("size", "min_pixels", "max_pixels")
# Where a part of a message has its image.
_IMAGE_KEYS = ("image", "url", "path", "base64")
_SOURCE_FILES = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")


class CasaImagesKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """Options for images; see `CasaProcessor.__call__`."""

    uint8_pixels: bool | None


class CasaProcessorKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]
    """All options of a call: the tokenizer's, the image processor's, and those for videos."""

    images_kwargs: CasaImagesKwargs
    videos_kwargs: CasaVideosKwargs
    _defaults = {"text_kwargs": {"padding": True}}


class CasaProcessor(PublishedByHook, ProcessorMixin):
    """Tokenizer, image processor and chat template of a CASA model.

    Args:
        image_processor: image processor of the source, of either backend (torchvision or PIL).
        tokenizer: tokenizer of the source. It pads on the left unless its settings say otherwise.
        chat_template: Jinja template of conversations; None for the tokenizer's.
        frame_max_pixels: largest number of pixels of a video frame; None for the limit of images.
        source_config: contents of the source's processor files by file name, kept so that the model can be converted
            back; not used otherwise.
        image_token: token that an image stands before. **It is one ordinary token of the text, not a pad token that
            is repeated for each feature of an image.**
        num_gist_tokens: gist tokens `<|gist_0|>`, `<|gist_1|>`, ... that follow each image token.
        vision_start_token: token before an image; None for `<|vision_start|>` if `image_token` is `<|vision_end|>`,
            else for none.
        frames_per_image: number of video frames that make an image. 1: each is an image of its own. 2: neighbours
            share the two halves of what the vision tower takes at once, an odd one at the end is doubled; as many
            frames give half as many images and tokens. "all": a whole video is one image, for models with
            `casa_video_layout="native"` of Qwen2-VL or Qwen2.5-VL.
        video_timestamps: time of each video frame, written before it, for models that read it: None for none, "native"
            as the source writes it (`<0.5 seconds>`), "text" in plain text (`[0.5 seconds]`). Of frames that share an
            image it is the mean.

    Attributes:
        image_token_id: id of `image_token`.
        vision_start_token_id: id of `vision_start_token`; None without one.
        gist_token_ids: ids of the gist tokens, in order.
        new_tokens: ids, by token, of those that `from_source` or `from_text_source` has added to the source's
            vocabulary; of a loaded processor, the model's configuration knows them.
        media_policy: [`~media_casa.MediaPolicy`] that says whether URLs are fetched and paths are read, and how large
            images may be; it may be replaced at any time, and isn't saved with the processor.

    Raises:
        ValueError: if the tokenizer lacks one of these tokens, `num_gist_tokens` is out of range, an image can't have
            so many frames, or there are no such timestamps.
    """

    valid_processor_kwargs = CasaProcessorKwargs

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | dict[str, str] | None = None,
        frame_max_pixels: int | None = FRAME_MAX_PIXELS,
        source_config: dict[str, Any] | None = None,
        image_token: str = VISION_END,
        num_gist_tokens: int = 0,
        vision_start_token: str | None = None,
        frames_per_image: int | str = 1,
        video_timestamps: str | None = None,
    ):
        template = getattr(tokenizer, "chat_template", None) if chat_template is None else chat_template
        super().__init__(image_processor, tokenizer, chat_template=template)
        self.frame_max_pixels = frame_max_pixels
        self.source_config = source_config
        self.image_token = image_token
        self.num_gist_tokens = num_gist_tokens
        if vision_start_token is None and image_token == VISION_END:
            vision_start_token = VISION_START
        self.vision_start_token = vision_start_token
        self.frames_per_image = frames_per_image
        check_frames_per_image(frames_per_image, image_processor.temporal_patch_size)
        self.video_timestamps = video_timestamps
        check_video_timestamps(video_timestamps)
        gists = _gist_tokens(num_gist_tokens)
        self._notation = Notation(vision_start_token or "", image_token, "".join(gists))
        _check_delimiters(tokenizer, self._notation)
        _check_gist_tokens(tokenizer, gists)
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        self.vision_start_token_id = (
            None if vision_start_token is None else tokenizer.convert_tokens_to_ids(vision_start_token)
        )
        self.gist_token_ids = tokenizer.convert_tokens_to_ids(gists)
        self.new_tokens: dict[str, int] = {}
        self.media_policy = MediaPolicy()
        if "padding_side" not in tokenizer.init_kwargs:
            tokenizer.padding_side = "left"

    # ---------------------------------------------------------------- loading

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any
    ) -> "CasaProcessor":
        """Load a saved processor.

        Args:
            pretrained_model_name_or_path: folder or Hub id.
            *args, **kwargs: arguments as elsewhere in Transformers, and settings that hold from now on: `min_pixels`
                and `max_pixels` (or `size={"shortest_edge": ..., "longest_edge": ...}`, also in pixels) for images,
                `frame_max_pixels`, `frames_per_image` and `video_timestamps` for video frames, and `media_policy`, a
                [`~media_casa.MediaPolicy`] or a dictionary of its fields. Without one, any URL is fetched and any path
                is read, as by Transformers' processors; a server gives `{"network": False, "local_files": False}`.

        Raises:
            ValueError: if the limits don't fit together, the policy isn't valid, an image can't have so many frames,
                or there are no such timestamps.
        """
        media_policy = MediaPolicy.of(kwargs.pop("media_policy", None))
        limits = {name: kwargs.pop(name) for name in _LIMITS if name in kwargs}
        names = ("frame_max_pixels", "frames_per_image", "video_timestamps")
        of_frames = {name: kwargs.pop(name) for name in names if name in kwargs}
        processor = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        processor.image_processor = _with_limits(processor.image_processor, limits)
        processor.media_policy = media_policy
        if "frames_per_image" in of_frames:
            check_frames_per_image(of_frames["frames_per_image"], processor.image_processor.temporal_patch_size)
        check_video_timestamps(of_frames.get("video_timestamps"))
        for name, value in of_frames.items():
            setattr(processor, name, value)
        return processor

    @classmethod
    def from_source(
        cls,
        folder: str | os.PathLike,
        *,
        max_pixels: int | None = MAX_PIXELS,
        frame_max_pixels: int | None = FRAME_MAX_PIXELS,
        num_gist_tokens: int = 0,
        frames_per_image: int | str = 1,
    ) -> "CasaProcessor":
        """The processor for the CASA form of a token-insertion checkpoint.

        Args:
            folder: local folder of the source, with the files of its tokenizer and its image processor. If its
                config.json is that of a family that has timestamps, so has the processor.
            max_pixels: largest number of pixels of an image; None for the source's limit.
            frame_max_pixels: largest number of pixels of a video frame; None for the limit of images.
            num_gist_tokens: gist tokens after each image; they are added to the tokenizer. The model needs an
                embedding for each id below `len(processor.tokenizer)`.
            frames_per_image: number of video frames that make an image, as in the class.

        Raises:
            ValueError: if the tokenizer lacks the vision tokens, `max_pixels` is below the source's minimum,
                `num_gist_tokens` is out of range, or a processor file isn't JSON.
            OSError: if files are missing.
        """
        gists = _gist_tokens(num_gist_tokens)
        source_config = _read_source_files(folder)
        settings, _ = cls.get_processor_dict(folder)
        tokenizer, new_tokens = _load_tokenizer(folder, gists)
        processor = cls(
            image_processor=_load_image_processor(folder, max_pixels),
            tokenizer=tokenizer,
            chat_template=settings.get("chat_template"),
            frame_max_pixels=frame_max_pixels,
            source_config=source_config,
            num_gist_tokens=num_gist_tokens,
            frames_per_image=frames_per_image,
            video_timestamps=_timestamps_of(folder),
        )
        processor.new_tokens = new_tokens
        return processor

    @classmethod
    def from_text_source(
        cls,
        text_folder: str | os.PathLike,
        vision_folder: str | os.PathLike,
        *,
        image_delimiters: str | Sequence[str] = (VISION_START, VISION_END),
        max_pixels: int | None = MAX_PIXELS,
        frame_max_pixels: int | None = FRAME_MAX_PIXELS,
        num_gist_tokens: int = 0,
    ) -> "CasaProcessor":
        """The processor for the CASA form of a text-only checkpoint that is given another one's vision tower.

        Args:
            text_folder: local folder with the files of the tokenizer, to which those delimiters that it lacks and then
                the gist tokens are added. Its chat template is wrapped to take images and videos; a minimal one stands
                in for none.
            vision_folder: local folder with the files of the image processor; `source_config` holds these.
            image_delimiters: tokens around an image, the one before it and the one that it stands before; or the
                latter alone. A string has a comma between them.
            max_pixels, frame_max_pixels, num_gist_tokens: arguments of `from_source`.

        Raises:
            ValueError: if there is no tokenizer, these are no delimiters or such that texts or turns have already,
                `max_pixels` is below the vision checkpoint's minimum, `num_gist_tokens` is out of range, or a
                processor file isn't JSON.
            OSError: if other files are missing.
        """
        gists = _gist_tokens(num_gist_tokens)
        source_config = _read_source_files(vision_folder)
        image_processor = _load_image_processor(vision_folder, max_pixels)
        *start, end = delimiters = delimiters_of(image_delimiters)
        tokenizer, new_tokens = _load_tokenizer(text_folder, [*delimiters, *gists])
        if tokenizer.pad_token is None:  # padding is masked, so any token will do
            tokenizer.pad_token = tokenizer.eos_token
        processor = cls(
            image_processor=image_processor,
            tokenizer=tokenizer,
            frame_max_pixels=frame_max_pixels,
            source_config=source_config,
            image_token=end,
            num_gist_tokens=num_gist_tokens,
            vision_start_token="".join(start) or None,
        )

        def render(template: str, messages: list[dict[str, Any]]) -> str:
            return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)

        template = wrap_chat_template(
            tokenizer.chat_template, processor._notation.image, processor._notation.video, render
        )
        _check_unused(tokenizer, delimiters, plain_turns(template, render))
        processor.chat_template = tokenizer.chat_template = template
        processor.new_tokens = new_tokens
        return processor

    # ---------------------------------------------------------------- the call

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        videos: Any = None,
        audio: None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Inputs of the model for one or several prompts.

        Args:
            images: image, list of images in reading order over the batch, or list with one list per prompt, in which
                None stands for none.
                An image is a PIL image, an array or tensor (height, width, channels), (channels, height, width) or
                (height, width), a path, a URL, base64 or bytes; in all of these forms it is the same image, turned
                upright, on white where it isn't opaque: see [`~media_casa.rgb_image`].
            text: prompt or list of prompts. An image stands at each `<|vision_start|><|vision_end|>` or
                `<|vision_start|><|image_pad|><|vision_end|>`, a video at each
                `<|vision_start|><|video_pad|><|vision_end|>`; with other delimiters between these. With a single one,
                an image stands at each such token and a video at each `<|video|>`. Gist tokens needn't be written.
                None to process pixels only.
            videos: video, list of videos, or list of lists like `images`. A video is a path, a URL, base64, the bytes
                of a file, an array or tensor of frames, or a list of frames; see `casa_hf.video.load_frames`.
            audio: None; audio is not supported.
            **kwargs: options of the tokenizer (`padding`, `padding_side`, ...) and of the image processor
                (`min_pixels`, `max_pixels` or `size`, `input_data_format` of arrays, ...); `uint8_pixels`, whether
                `pixel_values` hold pixels from 0 to 255, which CASA models normalise themselves; for videos `fps` and
                `num_frames`, which count frames, `do_sample_frames`, `frame_max_pixels`, the pixels of each frame,
                `frames_per_image`, `video_timestamps`, and `video_metadata`, what is known of decoded frames: for each
                video a `VideoMetadata` of Transformers or a dictionary with `fps` and `frames_indices`, or None;
                `media_policy`, for this call alone; `return_tensors`.

        Returns:
            `input_ids`, `attention_mask` and `mm_token_type_ids` (1 at a token that an image precedes, 2 at one that a
            frame or several precede, 3 at the time of a frame, 0 elsewhere), each (batch, tokens); `pixel_values`
            (patches, patch dim) and `image_grid_thw` (images, 3) with images and frames in reading order over the
            batch. With `uint8_pixels=True`, `pixel_values` have the dtype uint8, and hold a frame once where no image
            has several: an eighth of the bytes, made several times faster. With `return_tensors`, both are empty
            where there are none, so that prompts with and without images have the same keys. With
            `frames_per_image="all"` also `second_per_grid_ts` (images,), the seconds from one temporal patch of a
            video to the next, 0 for images.

        Raises:
            ValueError: if placeholders and images or videos don't match, or an image, a video or an option can't be
                used.
        """
        if images is None and text is None and videos is None:
            raise ValueError("Nothing was given; pass at least one of text, images and videos.")
        if audio is not None:
            raise ValueError("CASA models take no audio; leave audio out.")
        texts = text if text is None or isinstance(text, (list, tuple)) else [text]
        call = self._read_call(texts, images, videos, kwargs)
        return_tensors = call.options["text_kwargs"].pop("return_tensors", None)
        rows = self._load(call)
        data: dict[str, Any] = {}
        if texts is not None:
            data.update(self._tokenize(texts, rows, call.options["text_kwargs"]))
        visuals = [visual for row in rows for visual in row]
        data.update(self._pixels(visuals, call))
        if not visuals and return_tensors is not None:
            data.update(self._no_pixels(call.uint8_pixels))
        return BatchFeature(data, tensor_type=return_tensors)

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """As in Transformers, which would fetch parts with audio, whatever the policy of this processor.

        A template writes all control tokens, so that the tokenizer adds none, as by its own `apply_chat_template`.

        Raises:
            ValueError: if there are such, or videos where no template sees them, or not one image in a part of type
                "image" that is to be tokenized; and as for a call.
        """
        _refuse_parts(conversation, bool(kwargs.get("tokenize")))
        if kwargs.get("load_audio_from_video"):
            raise ValueError("CASA models take no audio; leave load_audio_from_video out.")
        if kwargs.get("tokenize"):
            kwargs["processor_kwargs"] = {"add_special_tokens": False, **(kwargs.get("processor_kwargs") or {})}
        made = super().apply_chat_template(conversation, *args, **kwargs)
        if isinstance(made, BatchFeature) and {"assistant_masks", "mm_token_type_ids"} <= made.keys():
            made["assistant_masks"] = _without_times(made["assistant_masks"], made["mm_token_type_ids"])
        return made

    def frame_pixels(self, frame: Any, media_policy: MediaPolicy | Mapping[str, Any] | None = None) -> dict:
        """What a call with `uint8_pixels=True` gives for the pixels of one video frame; faster, and from any thread.

        Args:
            frame: image of any form.
            media_policy: limits of what may be read; None for the processor's.

        Returns:
            `pixel_values`, (patches, patch dim) of dtype uint8 with the frame once, and `image_grid_thw`, (1, 3).

        Raises:
            ValueError: if the frame can't be used, or the image processor normalises otherwise than models do.
        """
        pixels = rgb_pixels(frame, MediaPolicy.of(self.media_policy if media_policy is None else media_policy))
        size = self._sizes({"images_kwargs": {}, "videos_kwargs": {}}, with_videos=True)[FRAME_TYPE]
        height, width, _ = pixels.shape
        self._num_patches(size, height, width, frame)  # or says what is wrong with it
        [patches], grids = level_patches([pixels], size, self.image_processor)
        return {"pixel_values": patches, "image_grid_thw": grids}

    def timestamp_ids(self, seconds: float) -> list[int]:
        """Ids of the time that stands before a frame; none without timestamps.

        Args:
            seconds: time of the frame; of several in one image the mean.
        """
        return self._time_ids(timestamp_text(self.video_timestamps, seconds))

    def _time_ids(self, written: str) -> list[int]:
        """Ids of what stands between two images."""
        if not written:
            return []
        image = self._notation.image
        number = len(token_ids(self.tokenizer, image, {}))
        return token_ids(self.tokenizer, image + written + image, {})[number:-number]

    def measure(self, text: str, images: Any = None, videos: Any = None, **kwargs: Any) -> tuple[int, int]:
        """What a prompt will take, without making its pixels.

        Of image files only the header is read, of video files only the container; nothing is decoded.

        Args:
            text: prompt, written as for a call.
            images, videos, **kwargs: arguments of a call.

        Returns:
            The number of text tokens and the number of image tokens.

        Raises:
            ValueError: as for a call.
        """
        call = self._read_call([text], images, videos, kwargs)
        [visuals] = self._visuals(call, measure_frames)
        call.options["text_kwargs"].pop("return_tensors", None)
        input_ids = self._tokenize([text], [visuals], call.options["text_kwargs"])["input_ids"][0]
        patches = 0
        layout = call.options["images_kwargs"].get("input_data_format")
        for visual in visuals:
            sizes = [
                frame if isinstance(frame, tuple) else image_size(frame, call.policy, layout)
                for frame in visual.frames
            ]
            visual.check_sizes(sizes)
            for frames in visual.by_image:
                width, height = sizes[len(frames) - 1]
                sizes = sizes[len(frames) :]
                of_frame = self._num_patches(call.sizes[visual.type], height, width, frames[0])
                patches += of_frame * self._num_temporal_patches(len(frames))
        return len(input_ids), patches // self.image_processor.merge_size**2

    def _get_num_multimodal_tokens(
        self,
        image_sizes: Iterable[tuple[int, int]] | None = None,
        video_sizes: Iterable[tuple[int, int, int]] | None = None,
        **kwargs: Any,
    ) -> MultiModalData:
        """Numbers of image tokens by size, for engines that plan before there are images.

        None of these tokens stands in the text, where an image takes the tokens of its placeholder alone.

        Args:
            image_sizes: (height, width) of each image, in pixels.
            video_sizes: (frames, height, width) of each video, counted with the frames that are taken.
            **kwargs: options of a call.

        Returns:
            `num_image_tokens` and `num_image_patches`, one number per image, and `num_video_tokens`, one per video.
        """
        options = self._options(kwargs)
        sizes = self._sizes(options, with_videos=video_sizes is not None)
        together = self._frames_per_image(options) != 1
        merge = self.image_processor.merge_size**2
        numbers: dict[str, list[int]] = {}
        if image_sizes is not None:
            patches = [self._num_patches(sizes[IMAGE_TYPE], height, width) for height, width in image_sizes]
            numbers |= {"num_image_patches": patches, "num_image_tokens": [number // merge for number in patches]}
        if video_sizes is not None:
            numbers["num_video_tokens"] = [
                (self._num_temporal_patches(frames) if together else frames)
                * (self._num_patches(sizes[FRAME_TYPE], height, width) // merge)
                for frames, height, width in video_sizes
            ]
        return MultiModalData(**numbers)

    def _num_temporal_patches(self, num_frames: int) -> int:
        """How many temporal patches an image of so many frames has."""
        return num_temporal_patches(num_frames, self.image_processor.temporal_patch_size)

    def _num_patches(self, size: dict[str, int], height: int, width: int, image: Any = None) -> int:
        """How many patches an image of this height and width gives.

        Raises:
            ValueError: if the image processor takes none of this shape; it names the image.
        """
        limits = {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
        try:
            return self.image_processor.get_number_of_image_patches(height, width, limits)
        except ValueError as error:
            name = name_of((width, height) if image is None else image)
            raise ValueError(f"The image {name} can't be used: it has {width} x {height} pixels ({error}).") from error

    def count_placeholders(self, text: str) -> int:
        """Number of image and video placeholders in a prompt.

        Raises:
            ValueError: if `text` isn't a string, or has pad tokens outside of a placeholder.
        """
        return len(self._notation.types(text))

    @property
    def image_placeholder(self) -> str:
        """How an image is written in a prompt."""
        return self._notation.image

    @property
    def model_input_names(self) -> list[str]:
        """Names of everything that a call returns for the model."""
        of_videos = ["second_per_grid_ts"] if self.frames_per_image == ALL_FRAMES else []
        return [*super().model_input_names, "mm_token_type_ids", *of_videos]

    # ---------------------------------------------------------------- steps of the call

    def _read_call(self, texts: Sequence[str] | None, images: Any, videos: Any, kwargs: dict[str, Any]) -> "_Call":
        """What a call was given, checked; nothing is loaded."""
        given = kwargs.pop("media_policy", None)
        policy = MediaPolicy.of(self.media_policy if given is None else given)
        all_images = _collect("images", images, is_image, is_image)
        all_videos = _collect("videos", videos, is_video, is_video_or_files)
        if texts is None:
            types = [[IMAGE_TYPE] * len(all_images.items) + [FRAME_TYPE] * len(all_videos.items)]
        else:
            types = [self._notation.types(row) for row in texts]
            _check_counts("image", self._notation.image, [row.count(IMAGE_TYPE) for row in types], all_images)
            _check_counts("video", self._notation.video, [row.count(FRAME_TYPE) for row in types], all_videos)
        options = self._options(kwargs)
        return _Call(
            types=types,
            images=all_images.items,
            videos=all_videos.items,
            metadata=video_metadata(options["videos_kwargs"].get("video_metadata"), len(all_videos.items)),
            options=options,
            sizes=self._sizes(options, with_videos=bool(all_videos.items)),
            policy=policy,
            frames_per_image=self._frames_per_image(options),
            uint8_pixels=bool(options["images_kwargs"].pop("uint8_pixels", False)),
            timestamps=None if texts is None else self._timestamps(options),
        )

    def _options(self, kwargs: dict[str, Any]) -> dict[str, dict]:
        """The options of a call by what they are for."""
        return self._merge_kwargs(
            self.valid_processor_kwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs
        )

    def _sizes(self, options: dict[str, dict], with_videos: bool) -> dict[int, dict[str, int]]:
        """`size` for images and for video frames."""
        sizes = {IMAGE_TYPE: _size(self.image_processor, options["images_kwargs"])}
        sizes[FRAME_TYPE] = dict(sizes[IMAGE_TYPE])
        frame_max_pixels = options["videos_kwargs"].get("frame_max_pixels", self.frame_max_pixels)
        if with_videos and frame_max_pixels is not None:
            sizes[FRAME_TYPE]["longest_edge"] = frame_max_pixels
            _check_size(sizes[FRAME_TYPE], "frame_max_pixels")
        return sizes

    def _frames_per_image(self, options: dict[str, dict]) -> int | str:
        """Number of video frames of an image, with these options of a call."""
        given = options["videos_kwargs"].get("frames_per_image")
        number = self.frames_per_image if given is None else given
        check_frames_per_image(number, self.image_processor.temporal_patch_size)
        return number

    def _timestamps(self, options: dict[str, dict]) -> str | None:
        """Kind of timestamps, with these options of a call."""
        kind = options["videos_kwargs"].get("video_timestamps", self.video_timestamps)
        check_video_timestamps(kind)
        if kind is not None and self._frames_per_image(options) == ALL_FRAMES:
            raise ValueError(
                f"video_timestamps={kind!r} is for frames, but a whole video is one image here (frames_per_image="
                f"{ALL_FRAMES!r}), whose positions tell the times; pass video_timestamps=None, or frames_per_image=1."
            )
        return kind

    def _load(self, call: "_Call") -> list[list[Visual]]:
        """Load all images and frames of a call, by prompt and placeholder, as RGB images."""
        images_kwargs = call.options["images_kwargs"]
        layout = images_kwargs.pop("input_data_format", None)
        rows = self._visuals(call, read_frames)
        if images_kwargs.get("do_rescale") is False:
            _check_floating([frame for row in rows for visual in row for frame in visual.frames])
            del images_kwargs["do_rescale"]  # they are 8-bit pixels from here on

        read: Callable[..., Any] = rgb_pixels if call.uint8_pixels else rgb_image

        def loaded(visual: Visual) -> Visual:
            frames = [read(frame, call.policy, layout) for frame in visual.frames]
            sizes = [frame.shape[1::-1] if call.uint8_pixels else frame.size for frame in frames]
            for (width, height), given in zip(sizes, visual.frames, strict=True):
                self._num_patches(call.sizes[visual.type], height, width, given)  # or says what is wrong with it
            visual.check_sizes(sizes)
            return visual._replace(frames=frames)

        return [[loaded(visual) for visual in row] for row in rows]

    def _visuals(self, call: "_Call", frames_of: Callable[..., Frames]) -> list[list[Visual]]:
        """Distribute the images and videos of a call over prompts and placeholders; images stay as they were given."""
        videos_kwargs = call.options["videos_kwargs"]
        sampling: dict[str, Any] = {
            "fps": videos_kwargs.get("fps"),
            "num_frames": videos_kwargs.get("num_frames"),
            "sample": videos_kwargs.get("do_sample_frames") is not False,
        }
        check_sampling(**sampling)
        images, videos = iter(call.images), zip(call.videos, call.metadata, strict=True)

        def visual(type: int) -> Visual:
            if type == IMAGE_TYPE:
                return Visual(type, [next(images)], 1)
            video, metadata = next(videos)
            frames = frames_of(video, policy=call.policy, metadata=metadata, **sampling)
            if call.reads_times and not frames.timed:
                logger.warning_once(
                    f"Frames are given without their times, which this model reads ({call.reads_times}); they are "
                    f"taken for {ASSUMED_FPS:g} frames per second. Pass the file, or video_metadata with the `fps` "
                    "and the `frames_indices` of the frames."
                )
            return Visual(
                type, frames.images, call.frames_per_image, frames.seconds_apart, frames.times, call.timestamps
            )

        return [[visual(type) for type in types] for types in call.types]

    def _tokenize(self, texts: list[str], rows: list[list[Visual]], text_kwargs: dict) -> dict[str, Any]:
        text_kwargs.pop("return_text_replacement_offsets", None)  # offsets refer to the given text anyway
        with_types = text_kwargs.pop("return_mm_token_type_ids", True)
        prompts = [
            Prompt.write(text, [self._notation.written(*visual.written) for visual in row], self._notation)
            for text, row in zip(texts, rows, strict=True)
        ]
        encoding = self._encode(texts, [prompt.text for prompt in prompts], text_kwargs)
        types = [self._token_types(ids, row) for ids, row in zip(encoding["input_ids"], rows, strict=True)]
        if with_types or any(visual.type == FRAME_TYPE for row in rows for visual in row):
            # Frames without types would be taken for stills.
            encoding["mm_token_type_ids"] = types
        if "offset_mapping" in encoding:
            encoding["offset_mapping"] = [
                [prompt.origin(start, end) for start, end in offsets]
                for prompt, offsets in zip(prompts, encoding["offset_mapping"], strict=True)
            ]
        return encoding

    def _encode(self, texts: list[str], prompts: list[str], text_kwargs: dict) -> dict[str, Any]:
        """Ids and masks of prompts as they were written for `texts`."""
        if not any(isinstance(text, ChatText) for text in texts):
            return dict(self.tokenizer(prompts, **text_kwargs))
        # The template has written all control tokens, and what was typed has none.
        ids = [
            token_ids(self.tokenizer, prompt, text.typed if isinstance(text, ChatText) else {})
            for text, prompt in zip(texts, prompts, strict=True)
        ]
        names = ("padding", "padding_side", "max_length", "pad_to_multiple_of")
        options = {name: text_kwargs[name] for name in names if name in text_kwargs}
        return dict(self.tokenizer.pad({"input_ids": ids}, **{"padding": False, **options}))

    def _token_types(self, input_ids: list[int], visuals: list[Visual]) -> list[int]:
        # Token `image_token` ends a video too, where a further pair of delimiters stands around its frames.
        ends = [end for visual in visuals for end in visual.ends]
        number, others = len(ends) - ends.count(0), ends.count(0)
        kept = min([max(0, input_ids.count(self.image_token_id) - others), *map(input_ids.count, self.gist_token_ids)])
        if kept != number:
            raise ValueError(
                f"Truncation leaves {kept} of the {number} images and frames of a prompt; increase max_length, or "
                "shorten the prompt."
            )
        remaining = iter(ends)
        types = [next(remaining) if token == self.image_token_id else 0 for token in input_ids]
        self._mark_times(types, input_ids, visuals)
        return types

    def _mark_times(self, types: list[int], input_ids: list[int], visuals: list[Visual]) -> None:
        """Say in the types of ids which are the times of frames.

        What stands before the first frame of a video may share a token with the text before it, which is text then.
        """
        ends = (index for index, token in enumerate(input_ids) if token == self.image_token_id)
        begin = 0  # of what stands before the next image
        for visual in visuals:
            times = iter(visual.written[0])
            for number, (type, end) in enumerate(zip(visual.ends, islice(ends, len(visual.ends)), strict=True)):
                time = next(times, "")
                stop = end - 1 if self._notation.start else end
                if time:
                    length = stop - begin
                    if not number:
                        length = num_common_last(input_ids[begin:stop], self._time_ids(time))
                    types[stop - length : stop] = [DELIMITER_TYPE] * length
                begin = end + 1 + (len(self.gist_token_ids) if type else 0)

    def _pixels(self, visuals: list[Visual], call: "_Call") -> dict[str, torch.Tensor]:
        """Patches and grids of all images, in order."""
        options = call.options["images_kwargs"].items()
        others = {name: value for name, value in options if name not in (*_LIMITS, "return_tensors")}
        patches: list[torch.Tensor] = []
        grids = []
        for type, run in groupby(visuals, key=lambda visual: visual.type):
            images = [frames for visual in run for frames in visual.by_image]
            frames = [frame for of_image in images for frame in of_image]
            if call.uint8_pixels:
                of_frames, its_grids = level_patches(frames, call.sizes[type], self.image_processor, **others)
            else:
                made = self.image_processor(images=frames, size=call.sizes[type], return_tensors="pt", **others)
                its_grids = made["image_grid_thw"]
                of_frames = list(made["pixel_values"].split(its_grids.prod(-1).tolist()))
            joined, its_grids = self._joined(of_frames, its_grids, [len(of_image) for of_image in images])
            patches += joined
            grids.append(its_grids)
        data = {}
        if grids:
            data = {"pixel_values": concatenate_patches(patches), "image_grid_thw": torch.cat(grids)}
        if call.frames_per_image == ALL_FRAMES:
            frames_per_patch = self.image_processor.temporal_patch_size
            seconds = [frames_per_patch * visual.seconds_apart for visual in visuals]
            data["second_per_grid_ts"] = torch.tensor(seconds, dtype=torch.float32)
        return data

    def _joined(
        self, patches: list[torch.Tensor], grids: torch.Tensor, num_frames: list[int]
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Patches and grids of images of so many frames each, from those of the frames."""
        if len(num_frames) == len(grids):
            return patches, grids
        frames = iter(patches)
        size = self.image_processor.temporal_patch_size
        joined = [join_frames([next(frames) for _ in range(number)], size) for number in num_frames]
        ends = torch.tensor(num_frames).cumsum(0)
        grids = grids[ends - 1].clone()
        grids[:, 0] = torch.tensor([self._num_temporal_patches(number) for number in num_frames])
        return joined, grids

    def _no_pixels(self, uint8_pixels: bool) -> dict[str, torch.Tensor]:
        """Patches and grids of no image."""
        processor = self.image_processor
        width = 3 * processor.patch_size**2 * (1 if uint8_pixels else processor.temporal_patch_size)
        return {
            "pixel_values": torch.zeros(0, width, dtype=torch.uint8 if uint8_pixels else torch.float32),
            "image_grid_thw": torch.zeros(0, 3, dtype=torch.long),
        }


# -------------------------------------------------------------------- what is given


class _Given(NamedTuple):
    """Images or videos in reading order; `per_row` tells how many each prompt has, if the caller said so."""

    items: list[Any]
    per_row: list[int] | None


def _collect(name: str, given: Any, is_item: Callable[[Any], bool], is_item_of_row: Callable[[Any], bool]) -> _Given:
    if given is None:
        return _Given([], None)
    if is_item(given):
        return _Given([given], None)
    items = elements_of(given)
    if any(item is None for item in items):  # a prompt without any
        items = [[] if item is None else [item] if is_item(item) else item for item in items]
    if all(is_item(item) for item in items):
        return _Given(items, None)
    per_row = None
    if all(isinstance(item, (list, tuple)) for item in items):
        per_row = [len(row) for row in items]
        items = [item for row in items for item in row]
        is_item = is_item_of_row
    wrong = next((item for item in items if not is_item(item)), None)
    if wrong is None:
        return _Given(items, per_row)
    shape = f" of shape {tuple(wrong.shape)}" if hasattr(wrong, "shape") else ""
    raise ValueError(
        f"{name} has an element of type {type(wrong).__name__}{shape}; expected one, a list of {name}, or one list of "
        f"{name} per prompt. CasaProcessor.__call__ describes their forms."
    )


def _check_counts(kind: str, placeholder: str, expected: list[int], given: _Given) -> None:
    """Check that the prompts have as many placeholders for images or videos as there are."""
    per_row = given.per_row
    if per_row is not None and len(per_row) != len(expected):
        raise ValueError(
            f"{kind}s has {len(per_row)} lists for {len(expected)} prompts; give one list per prompt, or a flat list."
        )
    pairs = [("", sum(expected), len(given.items))]
    pairs += [(f" in prompt {row}", *pair) for row, pair in enumerate(zip(expected, per_row or expected, strict=True))]
    for where, number, available in pairs:
        if number != available:
            raise ValueError(
                f"The number of {kind}s{where} ({available}) must be the number of {kind} placeholders in the text "
                f"({number}); write {placeholder} once for each {kind}."
            )


# -------------------------------------------------------------------- the contents of a call


class _Call(NamedTuple):
    """What a call was given.

    Attributes:
        types: `IMAGE_TYPE` or `FRAME_TYPE` for each placeholder of each prompt.
        images: images in reading order.
        videos: videos in reading order.
        metadata: what is known of each video's decoded frames; None for nothing.
        options: options by what they are for, as Transformers merges them.
        sizes: limits of the image processor for images and for frames, by type.
        policy: limits of what may be read.
        frames_per_image: number of video frames of an image.
        uint8_pixels: whether patches hold pixels from 0 to 255.
        timestamps: kind of the times that are written before frames.
    """

    types: list[list[int]]
    images: list[Any]
    videos: list[Any]
    metadata: list[Any]
    options: dict[str, dict]
    sizes: dict[int, dict[str, int]]
    policy: MediaPolicy
    frames_per_image: int | str
    uint8_pixels: bool
    timestamps: str | None

    @property
    def reads_times(self) -> str:
        """The setting by which the times of frames matter to the model; empty if they don't."""
        if self.timestamps is not None:
            return f"video_timestamps={self.timestamps!r}"
        return f"frames_per_image={ALL_FRAMES!r}" if self.frames_per_image == ALL_FRAMES else ""


def _without_times(masks: Any, types: Any) -> Any:
    """Masks of what the assistant said, without the times of frames."""
    if hasattr(masks, "shape"):
        masks[types == DELIMITER_TYPE] = 0
        return masks
    return [
        [0 if type == DELIMITER_TYPE else said for said, type in zip(*row, strict=True)]
        for row in zip(masks, types, strict=True)
    ]


def _check_floating(images: list[Any]) -> None:
    for image in images:
        dtype = str(getattr(image, "dtype", type(image).__name__))
        if "float" not in dtype:
            raise ValueError(
                f"do_rescale=False needs floating-point values from 0 to 1, but an image has the type {dtype}; leave "
                "do_rescale out, since the type of an image tells what its values mean."
            )


def _refuse_parts(given: Any, tokenize: bool) -> None:
    """Refuse what CASA can't see among the parts of a conversation or a batch; other faults are found by who reads it.

    Messages and their parts may be dictionaries or objects, as Transformers takes them.
    """
    if isinstance(given, Sequence) and not isinstance(given, (str, bytes)):
        for element in given:
            _refuse_parts(element, tokenize)
        return
    field = given.get if isinstance(given, Mapping) else partial(getattr, given)
    kind = field("type", None)
    if kind in ("audio", "audio_url", "input_audio"):
        raise ValueError("A message has a part with audio, but CASA models take no audio; leave that part out.")
    if kind == "video_url":
        raise ValueError(
            "A message has a part of the type 'video_url', which chat templates ignore; write it as "
            '{"type": "video", "url": ...}.'
        )
    if kind == "image" and tokenize:
        named = [key for key in _IMAGE_KEYS if field(key, None) is not None]
        if len(named) != 1:
            raise ValueError(
                f"A message part of type 'image' has {listed(named) or 'no image'}; expected exactly one of "
                f"{', '.join(_IMAGE_KEYS)}. {'Keep' if named else 'Add'} one."
            )
    for name in ("messages", "content"):
        if (inner := field(name, None)) is not None:
            _refuse_parts(inner, tokenize)


def _read_source_files(folder: str | os.PathLike) -> dict[str, Any]:
    files = {name: Path(folder, name) for name in _SOURCE_FILES}
    return {name: read_json(path) for name, path in files.items() if path.is_file()}


def _timestamps_of(folder: str | os.PathLike) -> str | None:
    """The kind of timestamps of the family whose configuration is in a folder."""
    file = Path(folder, "config.json")
    family = SOURCE_BACKBONES.get(read_json(file).get("model_type", "")) if file.is_file() else None
    return None if family is None else family.default_timestamps


def _load_image_processor(folder: str | os.PathLike, max_pixels: int | None) -> Any:
    image_processor = AutoImageProcessor.from_pretrained(folder)
    return image_processor if max_pixels is None else _with_limits(image_processor, {"max_pixels": max_pixels})


def _load_tokenizer(folder: str | os.PathLike, tokens: list[str]) -> tuple[Any, dict[str, int]]:
    """The tokenizer of a source with these control tokens, and the ids of those that its vocabulary didn't have."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    vocabulary = tokenizer.get_vocab()
    if missing := [token for token in tokens if token not in tokenizer.get_added_vocab()]:
        tokenizer.add_special_tokens({"extra_special_tokens": missing}, replace_extra_special_tokens=False)
    return tokenizer, {token: tokenizer.convert_tokens_to_ids(token) for token in tokens if token not in vocabulary}


def _gist_tokens(number: int) -> list[str]:
    check_gist_tokens(number)
    return [f"<|gist_{index}|>" for index in range(number)]


def _missing(tokenizer: Any, tokens: Iterable[str]) -> str:
    added = tokenizer.get_added_vocab()
    return ", ".join(token for token in tokens if token not in added)


def _check_delimiters(tokenizer: Any, notation: Notation) -> None:
    if missing := _missing(tokenizer, filter(None, (notation.start, notation.end))):
        raise ValueError(
            f"The tokenizer has no {missing}, which are to stand around an image; use the tokenizer of a Qwen "
            "vision-language checkpoint, or add them as special tokens, as CasaProcessor.from_text_source does."
        )


def _check_unused(tokenizer: Any, delimiters: Sequence[str], turns: str) -> None:
    """Refuse delimiters that prompts without images have, which would then have placeholders."""
    named = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    if used := [token for token in delimiters if token in named or token in turns]:
        raise DelimiterError(
            f"image_delimiters={','.join(delimiters)!r} names {used[0]}, which prompts without images have too. Name "
            f"tokens that nothing uses, such as '{VISION_START},{VISION_END}', or new ones."
        )


def _check_gist_tokens(tokenizer: Any, gists: list[str]) -> None:
    if missing := _missing(tokenizer, gists):
        raise ValueError(
            f"num_gist_tokens={len(gists)}, but the tokenizer has no {missing}; add them as special tokens, as "
            "CasaProcessor.from_source(..., num_gist_tokens=...) does."
        )


def _size(image_processor: Any, options: dict[str, Any]) -> dict[str, int]:
    """The image processor's `size` with the limits among `options`: {"shortest_edge", "longest_edge"}, in pixels."""
    size = {edge: image_processor.size[edge] for edge in ("shortest_edge", "longest_edge")}
    given = dict(options.get("size") or {})
    if not given.keys() <= size.keys():
        raise ValueError(
            f"size={given} must have only the keys 'shortest_edge' and 'longest_edge', the smallest and the largest "
            "number of pixels of an image."
        )
    size |= given
    if options.get("min_pixels") is not None:
        size["shortest_edge"] = options["min_pixels"]
    if options.get("max_pixels") is not None:
        size["longest_edge"] = options["max_pixels"]
    _check_size(size, "max_pixels")
    return size


def _check_size(size: dict[str, int], upper: str) -> None:
    smallest, largest = size["shortest_edge"], size["longest_edge"]
    if smallest <= 0:
        raise ValueError(f"min_pixels={smallest} is not positive; expected 1 pixel or more. Raise it.")
    if largest < smallest:
        raise ValueError(
            f"{upper}={largest} is below min_pixels={smallest}; expected {smallest} or more. Raise it, or lower "
            "min_pixels."
        )


def _with_limits(image_processor: Any, limits: dict[str, Any]) -> Any:
    if not limits:
        return image_processor
    return type(image_processor).from_dict(image_processor.to_dict(), size=_size(image_processor, limits))


__all__ = ["FRAME_MAX_PIXELS", "MAX_PIXELS", "CasaProcessor", "CasaProcessorKwargs"]
