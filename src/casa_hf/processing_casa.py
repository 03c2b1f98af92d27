# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""`CasaProcessor`: conversations with images and videos become the inputs of a CASA model.

Images never enter the token sequence: an image stands between `<|vision_start|>` and `<|vision_end|>`, immediately
before the latter. Qwen's chat templates write a placeholder there, `<|image_pad|>` or `<|video_pad|>`. The processor
takes it out, and for a video repeats the empty pair once per frame, so that every frame is an image of its own. Pixels
come from the source's own image processor.

The tokenizer of a text-only source has no such pair. There an image stands before the one token `<|image|>`, and the
chat template writes `<|video|>`, which is no token, for a video. Gist tokens, where a model has any, follow the token
that an image precedes; the processor writes them.
"""

# Transformers reads the annotations of typed dictionaries at run time, so they must not become strings here.

import os
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import torch
from transformers import BatchFeature
from transformers.image_utils import is_valid_image
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.auto.tokenization_auto import AutoTokenizer
from transformers.processing_utils import MultiModalData, ProcessingKwargs, ProcessorMixin

from .chat_text import ChatText, token_ids
from .checks import check_text
from .folder_files import read_json
from .frames_casa import check_sampling, load_frames, measure_frames
from .image_inputs import FRAME_TYPE, IMAGE_TYPE
from .media_casa import MediaPolicy, elements_of, image_size, is_image, name_of, rgb_image
from .publishing_hook import PublishedByHook

VISION_START = "<|vision_start|>"
VISION_END = "<|vision_end|>"
IMAGE_PAD = "<|image_pad|>"
VIDEO_PAD = "<|video_pad|>"

# Where there are no delimiters: the token that an image precedes, and what stands for a video.
IMAGE_TOKEN = "<|image|>"
VIDEO_PLACEHOLDER = "<|video|>"

MAX_PIXELS = 952 * 952
FRAME_MAX_PIXELS = 504 * 504

# Transformers puts this character before a control token that a user typed (`sanitize_control_tokens`): it is text.
_NOT_TYPED = "(?<!\U000f0000)"
_PLACEHOLDER = re.compile(f"{_NOT_TYPED}(?:{re.escape(IMAGE_PAD)}|{re.escape(VIDEO_PAD)})")

_LIMITS = ("size", "min_pixels", "max_pixels")
# Forms that may hold an image or a video.
_FILES = (str, os.PathLike, bytes)
_SOURCE_FILES = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")

# Conversations with a text-only source: a line per turn, answers closed by the end-of-text token.
TEXT_CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {{- message.role | capitalize + ': ' -}}
    {%- if message.content is string -%}
        {{- message.content -}}
    {%- else -%}
        {%- for part in message.content -%}
            {%- if part.type == 'image' or 'image' in part or 'image_url' in part -%}
                {{- '<|image|>' -}}
            {%- elif part.type == 'video' or 'video' in part -%}
                {{- '<|video|>' -}}
            {%- elif 'text' in part -%}
                {{- part.text -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- eos_token if message.role == 'assistant' -}}
    {{- '\\n' -}}
{%- endfor -%}
{{- 'Assistant:' if add_generation_prompt -}}
"""


class CasaVideosKwargs(TypedDict, total=False):
    """Options for videos; see `CasaProcessor.__call__`."""

    fps: float | None
    num_frames: int | None
    do_sample_frames: bool | None
    frame_max_pixels: int | None


class CasaProcessorKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]
    """All options of a call: the tokenizer's, the image processor's, and those for videos."""

    videos_kwargs: CasaVideosKwargs
    _defaults = {"text_kwargs": {"padding": True}}


class CasaProcessor(PublishedByHook, ProcessorMixin):
    """Tokenizer, image processor and chat template of a CASA model.

    Args:
        image_processor: the source's image processor, of either back end (torchvision or PIL).
        tokenizer: the source's tokenizer. It pads on the left unless its settings say otherwise.
        chat_template: Jinja template of conversations; None for the tokenizer's.
        frame_max_pixels: largest number of pixels of a video frame; None for the limit of images.
        source_config: contents of the source's processor files by file name, kept so that the model can be converted
            back; not used otherwise.
        image_token: the token that an image precedes. `<|vision_end|>` is the second of a pair of delimiters; any
            other stands alone.
        num_gist_tokens: gist tokens `<|gist_0|>`, `<|gist_1|>`, ... that follow each image token.

    Attributes:
        image_token_id: id of `image_token`.
        gist_token_ids: ids of the gist tokens, in order.
        media_policy: whether URLs are fetched and paths are read, and how large images may be; the
            [`~media_casa.MediaPolicy`] may be replaced at any time, and isn't saved with the processor.

    Raises:
        ValueError: if the tokenizer lacks one of these tokens, or `num_gist_tokens` is negative.
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
    ):
        template = getattr(tokenizer, "chat_template", None) if chat_template is None else chat_template
        super().__init__(image_processor, tokenizer, chat_template=template)
        self.frame_max_pixels = frame_max_pixels
        self.source_config = source_config
        self.image_token = image_token
        self.num_gist_tokens = num_gist_tokens
        gists = _gist_tokens(num_gist_tokens)
        _check_image_tokens(tokenizer, image_token)
        _check_gist_tokens(tokenizer, gists)
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        self.gist_token_ids = tokenizer.convert_tokens_to_ids(gists)
        self.media_policy = MediaPolicy()
        self._notation = _Notation.of(image_token, "".join(gists))
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
            *args, **kwargs: as elsewhere in Transformers; also the settings that hold from now on: `min_pixels` and
                `max_pixels` (or `size={"shortest_edge": ..., "longest_edge": ...}`, also in pixels) for images,
                `frame_max_pixels` for video frames, and `media_policy`, a [`~media_casa.MediaPolicy`] or a dictionary
                of its fields. Without one, any URL is fetched and any path is read, as by Transformers' processors;
                a server gives `{"network": False, "local_files": False}`.

        Raises:
            ValueError: if the limits don't fit together, or the policy is no such.
        """
        media_policy = MediaPolicy.of(kwargs.pop("media_policy", None))
        limits = {name: kwargs.pop(name) for name in _LIMITS if name in kwargs}
        has_frame_limit = "frame_max_pixels" in kwargs
        frame_max_pixels = kwargs.pop("frame_max_pixels", None)
        processor = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        processor.image_processor = _with_limits(processor.image_processor, limits)
        processor.media_policy = media_policy
        if has_frame_limit:
            processor.frame_max_pixels = frame_max_pixels
        return processor

    @classmethod
    def from_source(
        cls,
        folder: str | os.PathLike,
        *,
        max_pixels: int | None = MAX_PIXELS,
        frame_max_pixels: int | None = FRAME_MAX_PIXELS,
        num_gist_tokens: int = 0,
    ) -> "CasaProcessor":
        """The processor for the CASA form of a token-insertion checkpoint.

        Args:
            folder: local folder of the source, with the files of its tokenizer and its image processor.
            max_pixels: largest number of pixels of an image; None for the source's limit.
            frame_max_pixels: largest number of pixels of a video frame; None for the limit of images.
            num_gist_tokens: gist tokens after each image; they are added to the tokenizer. The model needs an
                embedding for each id below `len(processor.tokenizer)`.

        Raises:
            ValueError: if the tokenizer lacks the vision tokens, `max_pixels` is below the source's minimum,
                `num_gist_tokens` is negative, or a processor file isn't JSON.
            OSError: if files are missing.
        """
        gists = _gist_tokens(num_gist_tokens)
        source_config = _read_source_files(folder)
        settings, _ = cls.get_processor_dict(folder)
        return cls(
            image_processor=_load_image_processor(folder, max_pixels),
            tokenizer=_load_tokenizer(folder, gists),
            chat_template=settings.get("chat_template"),
            frame_max_pixels=frame_max_pixels,
            source_config=source_config,
            num_gist_tokens=num_gist_tokens,
        )

    @classmethod
    def from_text_source(
        cls,
        text_folder: str | os.PathLike,
        vision_folder: str | os.PathLike,
        *,
        max_pixels: int | None = MAX_PIXELS,
        frame_max_pixels: int | None = FRAME_MAX_PIXELS,
        num_gist_tokens: int = 0,
    ) -> "CasaProcessor":
        """The processor for the CASA form of a text-only checkpoint that is given another one's vision tower.

        Args:
            text_folder: local folder with the files of the tokenizer, to which `<|image|>` and then the gist tokens
                are added. Its chat template, if any, knows no images and is replaced by `TEXT_CHAT_TEMPLATE`.
            vision_folder: local folder with the files of the image processor; `source_config` holds these.
            max_pixels, frame_max_pixels, num_gist_tokens: see `from_source`.

        Raises:
            ValueError: if there is no tokenizer, `max_pixels` is below the vision checkpoint's minimum,
                `num_gist_tokens` is negative, or a processor file isn't JSON.
            OSError: if other files are missing.
        """
        gists = _gist_tokens(num_gist_tokens)
        source_config = _read_source_files(vision_folder)
        image_processor = _load_image_processor(vision_folder, max_pixels)
        tokenizer = _load_tokenizer(text_folder, [IMAGE_TOKEN, *gists])
        tokenizer.chat_template = TEXT_CHAT_TEMPLATE
        if tokenizer.pad_token is None:  # padding is masked, so any token will do
            tokenizer.pad_token = tokenizer.eos_token
        return cls(
            image_processor=image_processor,
            tokenizer=tokenizer,
            frame_max_pixels=frame_max_pixels,
            source_config=source_config,
            image_token=IMAGE_TOKEN,
            num_gist_tokens=num_gist_tokens,
        )

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
            images: an image, a list of them in reading order over the batch, or a list with one list per prompt, in
                which None stands for none.
                An image is a PIL image, an array or tensor (height, width, channels), (channels, height, width) or
                (height, width), a path, a URL, base64 or bytes; in all of these forms it is the same image, turned
                upright, on white where it isn't opaque: see [`~media_casa.rgb_image`].
            text: a prompt or a list of them. An image stands at each `<|vision_start|><|vision_end|>` or
                `<|vision_start|><|image_pad|><|vision_end|>`, a video at each
                `<|vision_start|><|video_pad|><|vision_end|>`; with another `image_token`, an image at each such
                token and a video at each `<|video|>`. Gist tokens needn't be written. None to process pixels only.
            videos: a video, a list, or a list of lists like `images`. A video is a path, a URL, base64, the bytes of a
                file, an array or tensor of frames, or a list of frames; see `casa_hf.video.load_frames`.
            audio: not supported; must be None.
            **kwargs: options of the tokenizer (`padding`, `padding_side`, ...) and of the image processor
                (`min_pixels`, `max_pixels` or `size`, `input_data_format` of arrays, ...); for videos `fps`,
                `num_frames`, `do_sample_frames` and `frame_max_pixels`; `media_policy`, for this call alone;
                `return_tensors`.

        Returns:
            `input_ids`, `attention_mask` and `mm_token_type_ids` (1 at a token that an image precedes, 2 at one that a
            video frame precedes, 0 elsewhere), each (batch, tokens); `pixel_values` (patches, patch dim) and
            `image_grid_thw` (images, 3) with images and frames in reading order over the batch. With `return_tensors`,
            both are empty where there are none, so that prompts with and without images have the same keys.

        Raises:
            ValueError: if marks and images or videos don't match, or an image, a video or an option is unusable.
        """
        if images is None and text is None and videos is None:
            raise ValueError("Give at least one of text, images and videos.")
        if audio is not None:
            raise ValueError("CASA models take no audio; leave it out.")
        policy = self._policy(kwargs)
        all_images = _collect("images", images, is_image, is_image)
        all_videos = _collect("videos", videos, _is_video, _is_video_or_files)
        texts = text if text is None or isinstance(text, (list, tuple)) else [text]
        if texts is None:
            marks_of_row = [[IMAGE_TYPE] * len(all_images.items) + [FRAME_TYPE] * len(all_videos.items)]
        else:
            marks_of_row = [_marks(row, self._notation) for row in texts]
            _check_counts("images", self._notation.image, IMAGE_TYPE, marks_of_row, all_images)
            _check_counts("videos", self._notation.video, FRAME_TYPE, marks_of_row, all_videos)

        options = self._merge_kwargs(
            self.valid_processor_kwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs
        )
        return_tensors = options["text_kwargs"].pop("return_tensors", None)
        sizes = self._sizes(options["images_kwargs"], options["videos_kwargs"], with_videos=bool(all_videos.items))
        rows = self._load(marks_of_row, all_images.items, all_videos.items, sizes, options, policy)

        data: dict[str, Any] = {}
        if texts is not None:
            data.update(self._tokenize(texts, rows, options["text_kwargs"]))
        visuals = [visual for row in rows for visual in row]
        data.update(self._pixels(visuals, sizes, options["images_kwargs"]))
        if not visuals and return_tensors is not None:
            data.update(self._no_pixels())
        return BatchFeature(data, tensor_type=return_tensors)

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """As in Transformers, which would fetch parts with audio, whatever the policy of this processor.

        Raises:
            ValueError: if there are such, or videos where no template sees them; and as for a call.
        """
        _refuse_parts(conversation)
        if kwargs.get("load_audio_from_video"):
            raise ValueError("CASA models take no audio; leave load_audio_from_video out.")
        return super().apply_chat_template(conversation, *args, **kwargs)

    def measure(self, text: str, images: Any = None, videos: Any = None, **kwargs: Any) -> tuple[int, int]:
        """What a prompt will take, without making its pixels.

        Of image files only the header is read, of video files only the container; nothing is decoded.

        Args:
            text: a prompt, written as for a call.
            images, videos, **kwargs: as for a call.

        Returns:
            The number of text tokens and the number of image tokens.

        Raises:
            ValueError: as for a call.
        """
        policy = self._policy(kwargs)
        all_images = _collect("images", images, is_image, is_image)
        all_videos = _collect("videos", videos, _is_video, _is_video_or_files)
        marks = _marks(text, self._notation)
        _check_counts("images", self._notation.image, IMAGE_TYPE, [marks], all_images)
        _check_counts("videos", self._notation.video, FRAME_TYPE, [marks], all_videos)
        options = self._merge_kwargs(
            self.valid_processor_kwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs
        )
        sizes = self._sizes(options["images_kwargs"], options["videos_kwargs"], with_videos=bool(all_videos.items))
        [visuals] = self._visuals(
            [marks], all_images.items, all_videos.items, options["videos_kwargs"], policy, frames_of=measure_frames
        )
        options["text_kwargs"].pop("return_tensors", None)
        input_ids = self._tokenize([text], [visuals], options["text_kwargs"])["input_ids"][0]
        patches = 0
        layout = options["images_kwargs"].get("input_data_format")
        for visual in visuals:
            for image in visual.images:
                width, height = image if isinstance(image, tuple) else image_size(image, policy, layout)
                patches += self._num_patches(sizes[visual.type], height, width, image)
        return len(input_ids), patches // self.image_processor.merge_size**2

    def _get_num_multimodal_tokens(
        self,
        image_sizes: Iterable[tuple[int, int]] | None = None,
        video_sizes: Iterable[tuple[int, int, int]] | None = None,
        **kwargs: Any,
    ) -> MultiModalData:
        """Numbers of image tokens by size, for engines that plan before there are images.

        None of these tokens stands in the text, where an image takes the tokens of its mark alone.

        Args:
            image_sizes: (height, width) of each image, in pixels.
            video_sizes: (frames, height, width) of each video, counted with the frames that are taken.
            **kwargs: options as for a call.

        Returns:
            `num_image_tokens` and `num_image_patches`, one number per image, and `num_video_tokens`, one per video.
        """
        options = self._merge_kwargs(
            self.valid_processor_kwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs
        )
        sizes = self._sizes(options["images_kwargs"], options["videos_kwargs"], with_videos=video_sizes is not None)
        merge = self.image_processor.merge_size**2
        numbers: dict[str, list[int]] = {}
        if image_sizes is not None:
            patches = [self._num_patches(sizes[IMAGE_TYPE], height, width) for height, width in image_sizes]
            numbers |= {"num_image_patches": patches, "num_image_tokens": [number // merge for number in patches]}
        if video_sizes is not None:
            numbers["num_video_tokens"] = [
                frames * self._num_patches(sizes[FRAME_TYPE], height, width) // merge
                for frames, height, width in video_sizes
            ]
        return MultiModalData(**numbers)

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
        """Number of images and videos that a prompt has marks for.

        Raises:
            ValueError: if `text` isn't a string, or has a placeholder outside of a mark.
        """
        return len(_marks(text, self._notation))

    @property
    def image_placeholder(self) -> str:
        """An image as it is written in a prompt."""
        return self._notation.image

    @property
    def model_input_names(self) -> list[str]:
        """Names of everything that a call returns for the model."""
        return [*super().model_input_names, "mm_token_type_ids"]

    # ---------------------------------------------------------------- steps of the call

    def _sizes(self, images_kwargs: dict, videos_kwargs: dict, with_videos: bool) -> dict[int, dict[str, int]]:
        """`size` for images and for video frames."""
        sizes = {IMAGE_TYPE: _size(self.image_processor, images_kwargs)}
        sizes[FRAME_TYPE] = dict(sizes[IMAGE_TYPE])
        frame_max_pixels = videos_kwargs.get("frame_max_pixels", self.frame_max_pixels)
        if with_videos and frame_max_pixels is not None:
            sizes[FRAME_TYPE]["longest_edge"] = frame_max_pixels
            _check_size(sizes[FRAME_TYPE], "frame_max_pixels")
        return sizes

    def _policy(self, kwargs: dict[str, Any]) -> MediaPolicy:
        """The policy among the options of a call, which loses it, or the processor's."""
        given = kwargs.pop("media_policy", None)
        return MediaPolicy.of(self.media_policy if given is None else given)

    def _load(
        self,
        marks_of_row: list[list[int]],
        images: list[Any],
        videos: list[Any],
        sizes: dict[int, dict[str, int]],
        options: dict[str, dict],
        policy: MediaPolicy,
    ) -> "list[list[_Visual]]":
        """What stands at each mark of each row, as RGB images."""
        images_kwargs = options["images_kwargs"]
        layout = images_kwargs.pop("input_data_format", None)
        rows = self._visuals(marks_of_row, images, videos, options["videos_kwargs"], policy)
        if images_kwargs.get("do_rescale") is False:
            _check_floating([image for row in rows for visual in row for image in visual.images])
            del images_kwargs["do_rescale"]  # they are 8-bit pixels from here on

        def seen(given: Any, kind: int) -> Any:
            image = rgb_image(given, policy, layout)
            self._num_patches(sizes[kind], image.height, image.width, given)  # or says what is wrong with it
            return image

        return [
            [_Visual(visual.type, [seen(image, visual.type) for image in visual.images]) for visual in row]
            for row in rows
        ]

    def _visuals(
        self,
        marks_of_row: list[list[int]],
        images: list[Any],
        videos: list[Any],
        videos_kwargs: dict,
        policy: MediaPolicy,
        frames_of: Callable[..., list[Any]] = load_frames,
    ) -> "list[list[_Visual]]":
        """What stands at each mark of each row, images as they were given."""
        fps, num_frames = videos_kwargs.get("fps"), videos_kwargs.get("num_frames")
        sample = videos_kwargs.get("do_sample_frames") is not False
        check_sampling(fps, num_frames, sample)
        next_image, next_video = iter(images), iter(videos)

        def visual(mark: int) -> _Visual:
            if mark == IMAGE_TYPE:
                return _Visual(mark, [next(next_image)])
            options = {"fps": fps, "num_frames": num_frames, "sample": sample, "policy": policy}
            return _Visual(mark, frames_of(next(next_video), **options))

        return [[visual(mark) for mark in marks] for marks in marks_of_row]

    def _tokenize(self, texts: list[str], rows: "list[list[_Visual]]", text_kwargs: dict) -> dict[str, Any]:
        text_kwargs.pop("return_text_replacement_offsets", None)  # offsets refer to the given text anyway
        with_types = text_kwargs.pop("return_mm_token_type_ids", True)
        prompts = [
            _Prompt.write(text, [len(visual.images) for visual in row], self._notation)
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

    def _token_types(self, input_ids: list[int], visuals: "list[_Visual]") -> list[int]:
        types = [visual.type for visual in visuals for _ in visual.images]
        kept = min(map(input_ids.count, (self.image_token_id, *self.gist_token_ids)))
        if kept != len(types):
            raise ValueError(
                f"Truncation leaves {kept} of the {len(types)} images and frames of a prompt; raise max_length, or "
                "shorten the prompt."
            )
        remaining = iter(types)
        return [next(remaining) if token == self.image_token_id else 0 for token in input_ids]

    def _pixels(
        self, visuals: "list[_Visual]", sizes: dict[int, dict[str, int]], images_kwargs: dict
    ) -> dict[str, torch.Tensor]:
        """Patches and grids of all images, in order."""
        others = {name: value for name, value in images_kwargs.items() if name not in (*_LIMITS, "return_tensors")}
        runs = []
        for kind, run in groupby(visuals, key=lambda visual: visual.type):
            images = [image for visual in run for image in visual.images]
            runs.append(self.image_processor(images=images, size=sizes[kind], return_tensors="pt", **others))
        return {name: torch.cat([run[name] for run in runs]) for name in ("pixel_values", "image_grid_thw") if runs}

    def _no_pixels(self) -> dict[str, torch.Tensor]:
        """Patches and grids of no image."""
        processor = self.image_processor
        patch_dim = 3 * processor.temporal_patch_size * processor.patch_size**2
        return {
            "pixel_values": torch.zeros(0, patch_dim),
            "image_grid_thw": torch.zeros(0, 3, dtype=torch.long),
        }


# -------------------------------------------------------------------- how images are written


class _Notation(NamedTuple):
    """How images and videos stand in a prompt.

    Attributes:
        image: an image, as a user writes it.
        video: a video, as a user writes it.
        pattern: matches either, with the gist tokens after it if the text has them (group `gists`). Group
            `placeholder` is what isn't a token of the prompt and gives way to the frames of a video.
        video_placeholder: the placeholder of a video.
        next_frame: what stands in the prompt from the image token of a frame, with it, to that of the next one.
        last_frame: the rest of the placeholder's place, up to what follows it in the text.
        gists: the gist tokens.
    """

    image: str
    video: str
    pattern: re.Pattern[str]
    video_placeholder: str
    next_frame: str
    last_frame: str
    gists: str

    @classmethod
    def of(cls, image_token: str, gists: str) -> "_Notation":
        """With delimiters if `image_token` is the second of them, else without."""
        token = _NOT_TYPED + re.escape(image_token)
        written_gists = f"(?P<gists>{re.escape(gists)})?"
        if image_token != VISION_END:
            return cls(
                image=image_token,
                video=VIDEO_PLACEHOLDER,
                pattern=re.compile(f"(?:(?P<placeholder>{re.escape(VIDEO_PLACEHOLDER)})|{token}){written_gists}"),
                video_placeholder=VIDEO_PLACEHOLDER,
                next_frame=image_token + gists,
                last_frame=image_token,
                gists=gists,
            )
        placeholders = f"{re.escape(IMAGE_PAD)}|{re.escape(VIDEO_PAD)}"
        opening = f"(?:{_NOT_TYPED}{re.escape(VISION_START)}(?P<placeholder>{placeholders}))?"
        return cls(
            image=VISION_START + VISION_END,
            video=VISION_START + VIDEO_PAD + VISION_END,
            pattern=re.compile(opening + token + written_gists),
            video_placeholder=VIDEO_PAD,
            next_frame=VISION_END + gists + VISION_START,
            last_frame="",
            gists=gists,
        )


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
        f"{name} must be one of them, a list, or a list of lists, one per prompt; got an element of type "
        f"{type(wrong).__name__}{shape}. See CasaProcessor.__call__ for what can be given."
    )


def _is_video(value: Any) -> bool:
    if isinstance(value, _FILES):
        return True
    if isinstance(value, (list, tuple)):
        return bool(value) and all(is_image(frame) and not isinstance(frame, _FILES) for frame in value)
    return is_valid_image(value) and hasattr(value, "shape") and value.ndim == 4 and 0 not in value.shape


def _is_video_or_files(value: Any) -> bool:
    """In a list of videos, a list of files would be several videos; within the list of a prompt it is one."""
    if isinstance(value, (list, tuple)):
        return bool(value) and all(is_image(frame) for frame in value)
    return _is_video(value)


def _marks(text: Any, notation: _Notation) -> list[int]:
    """Types of the images and videos that a prompt has marks for, in reading order."""
    if not isinstance(text, str):
        raise ValueError(f"text must be a string or a list of strings, got an element of type {type(text).__name__}.")
    check_text("text", text)
    marks = [match["placeholder"] for match in notation.pattern.finditer(text)]
    used = sum(mark in (IMAGE_PAD, VIDEO_PAD) for mark in marks)
    stray = len(_PLACEHOLDER.findall(text)) - used
    if stray:
        raise ValueError(
            f"The text has {stray} times {IMAGE_PAD} or {VIDEO_PAD} outside of a mark. Write an image "
            f"as {notation.image} and a video as {notation.video}; CASA repeats no placeholders."
        )
    return [FRAME_TYPE if mark == notation.video_placeholder else IMAGE_TYPE for mark in marks]


def _check_counts(name: str, written: str, mark: int, marks_of_row: list[list[int]], given: _Given) -> None:
    expected = [marks.count(mark) for marks in marks_of_row]
    if given.per_row is not None and len(given.per_row) != len(expected):
        raise ValueError(
            f"{name} has {len(given.per_row)} lists for {len(expected)} prompts; give one list per prompt, or a flat "
            "list."
        )
    if sum(expected) != len(given.items):
        raise ValueError(
            f"The text has {sum(expected)} marks for {name} ({written}) but {len(given.items)} {name} were given."
        )
    for row, (marks, items) in enumerate(zip(expected, given.per_row or expected, strict=True)):
        if marks != items:
            raise ValueError(
                f"Prompt {row} has {marks} marks for {name} ({written}) but {items} {name} were given for it."
            )


# -------------------------------------------------------------------- what goes in


class _Visual(NamedTuple):
    """What stands at a mark: an image, or the frames of a video."""

    type: int
    images: list[Any]


def _check_floating(images: list[Any]) -> None:
    for image in images:
        dtype = str(getattr(image, "dtype", type(image).__name__))
        if "float" not in dtype:
            raise ValueError(
                f"do_rescale=False is for floating values from 0 to 1, but an image is of the type {dtype}; leave "
                "do_rescale out: what the values of an image mean is told by their type."
            )


def _refuse_parts(given: Any) -> None:
    """Refuse what CASA can't see among the parts of a conversation or a batch; other faults are found by who reads it.

    Messages and their parts may be dictionaries or objects, as Transformers takes them.
    """
    if isinstance(given, Sequence) and not isinstance(given, (str, bytes)):
        for element in given:
            _refuse_parts(element)
        return
    field = given.get if isinstance(given, Mapping) else partial(getattr, given)
    kind = field("type", None)
    if kind in ("audio", "audio_url", "input_audio"):
        raise ValueError("A message has a part with audio, but CASA models take no audio; leave it out.")
    if kind == "video_url":
        raise ValueError(
            "A message has a part of the type 'video_url', which chat templates pass over; write it as "
            '{"type": "video", "url": ...}.'
        )
    for name in ("messages", "content"):
        if (inner := field(name, None)) is not None:
            _refuse_parts(inner)


class _Prompt(NamedTuple):
    """A prompt as it is tokenized, and where its pieces come from.

    Attributes:
        text: the prompt without placeholders, the mark of a video repeated once per frame, with gist tokens.
        starts: where each piece starts in `text`.
        spans: the piece's (start, end) in the given text.
        copied: whether the piece is what the given text has there.
    """

    text: str
    starts: list[int]
    spans: list[tuple[int, int]]
    copied: list[bool]

    @classmethod
    def write(cls, text: str, counts: list[int], notation: _Notation) -> "_Prompt":
        """Rewrite `text`, whose marks stand for this many images each."""
        pieces, end = [], 0
        for match, count in zip(notation.pattern.finditer(text), counts, strict=True):
            if match["placeholder"] is not None:
                start, stop = match.span("placeholder")
                frames = notation.next_frame * (count - 1) + notation.last_frame
                pieces += [(text[end:start], end, start), (frames, start, stop)]
                end = stop
            if not match["gists"]:
                # They refer to the last character of the mark: a span without any would seem to begin what follows.
                pieces += [(text[end : match.end()], end, match.end()), (notation.gists, match.end() - 1, match.end())]
                end = match.end()
        pieces.append((text[end:], end, len(text)))
        starts = list(accumulate((len(piece) for piece, _, _ in pieces), initial=0))[:-1]
        return cls(
            text="".join(piece for piece, _, _ in pieces),
            starts=starts,
            spans=[(start, stop) for _, start, stop in pieces],
            copied=[piece == text[start:stop] for piece, start, stop in pieces],
        )

    def origin(self, start: int, end: int) -> tuple[int, int]:
        """The span in the given text of a span in `text`; what was written anew has that of what it stands for."""
        if end == 0:  # padding, and what the tokenizer adds
            return 0, 0
        first, last = (bisect_right(self.starts, place) - 1 for place in (start, max(start, end - 1)))
        begin, stop = self.spans[first][0], self.spans[last][1]
        if self.copied[first]:
            begin += start - self.starts[first]
        if self.copied[last]:
            stop = self.spans[last][0] + end - self.starts[last]
        return begin, stop


def _read_source_files(folder: str | os.PathLike) -> dict[str, Any]:
    files = {name: Path(folder, name) for name in _SOURCE_FILES}
    return {name: read_json(path) for name, path in files.items() if path.is_file()}


def _load_image_processor(folder: str | os.PathLike, max_pixels: int | None) -> Any:
    image_processor = AutoImageProcessor.from_pretrained(folder)
    return image_processor if max_pixels is None else _with_limits(image_processor, {"max_pixels": max_pixels})


def _load_tokenizer(folder: str | os.PathLike, new_tokens: list[str]) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if new_tokens:
        tokenizer.add_special_tokens({"extra_special_tokens": new_tokens}, replace_extra_special_tokens=False)
    return tokenizer


def _gist_tokens(number: int) -> list[str]:
    if number < 0:
        raise ValueError(f"num_gist_tokens={number} must not be negative; use 0 for none.")
    return [f"<|gist_{index}|>" for index in range(number)]


def _missing(tokenizer: Any, tokens: Iterable[str]) -> str:
    added = tokenizer.get_added_vocab()
    return ", ".join(token for token in tokens if token not in added)


def _check_image_tokens(tokenizer: Any, image_token: str) -> None:
    if image_token != VISION_END:
        if _missing(tokenizer, [image_token]):
            raise ValueError(
                f"The tokenizer has no {image_token}, the token that an image is to precede. Add it as a special "
                "token, as CasaProcessor.from_text_source does."
            )
    elif missing := _missing(tokenizer, (VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD)):
        raise ValueError(
            f"The tokenizer has no {missing}. Use the tokenizer of a Qwen vision-language checkpoint, or add them as "
            "special tokens."
        )


def _check_gist_tokens(tokenizer: Any, gists: list[str]) -> None:
    if missing := _missing(tokenizer, gists):
        raise ValueError(
            f"num_gist_tokens={len(gists)}, but the tokenizer has no {missing}. Add them as special tokens, as "
            "CasaProcessor.from_source(..., num_gist_tokens=...) does."
        )


def _size(image_processor: Any, options: dict[str, Any]) -> dict[str, int]:
    """The image processor's `size` with the limits among `options`: {"shortest_edge", "longest_edge"}, in pixels."""
    size = {edge: image_processor.size[edge] for edge in ("shortest_edge", "longest_edge")}
    given = dict(options.get("size") or {})
    if not given.keys() <= size.keys():
        raise ValueError(
            f"size={given} must be given as 'shortest_edge' and 'longest_edge', the smallest and the largest number "
            "of pixels of an image."
        )
    size |= given
    if options.get("min_pixels") is not None:
        size["shortest_edge"] = options["min_pixels"]
    if options.get("max_pixels") is not None:
        size["longest_edge"] = options["max_pixels"]
    _check_size(size, "max_pixels (longest_edge)")
    return size


def _check_size(size: dict[str, int], upper: str) -> None:
    if not 0 < size["shortest_edge"] <= size["longest_edge"]:
        raise ValueError(
            f"min_pixels (shortest_edge) is {size['shortest_edge']} and {upper} is {size['longest_edge']}; the first "
            "must be positive and not larger than the second."
        )


def _with_limits(image_processor: Any, limits: dict[str, Any]) -> Any:
    if not limits:
        return image_processor
    return type(image_processor).from_dict(image_processor.to_dict(), size=_size(image_processor, limits))


__all__ = ["FRAME_MAX_PIXELS", "MAX_PIXELS", "CasaProcessor", "CasaProcessorKwargs"]
