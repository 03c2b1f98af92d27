# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""A conversation of several turns on one cache.

Every turn feeds the model what it hasn't seen yet: the new message and the pixels of its images and videos. What was
said before stays in the cache, token for token as it was generated; it is never decoded and tokenised again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from .cache_casa import cache_snapshot, home_layer
from .chat_text import SAID, ChatText, check_template_kwargs, message, render_chat
from .checks import check_asks
from .generation_casa import IMAGE_INPUTS
from .media_casa import images_of, videos_of
from .transformers_versions import CACHE, CACHE_NAMES
from .videos_casa import take_video_options

if TYPE_CHECKING:
    from .modeling_casa import CasaForConditionalGeneration
    from .processing_casa import CasaProcessor

# What the conversation itself gives to `generate`.
_OWN = (
    *CACHE_NAMES,
    "inputs",
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    "mm_token_type_ids",
    "return_dict_in_generate",
    *IMAGE_INPUTS,
)


class Conversation:
    """Turns of a user and a model.

    Args:
        model: model that answers.
        processor: processor of the model.
        sanitize_control_tokens: whether control tokens and image placeholders in messages are text like any other.
            False lets them count.
        chat_template_kwargs: variables of the chat template, by the names that it has for them, such as
            `{"enable_thinking": False}`.

    Raises:
        NotImplementedError: for a model with a prompt that PEFT has learned, which it puts before every turn again.
        ValueError: for variables that the chat template doesn't have.
    """

    def __init__(
        self,
        model: CasaForConditionalGeneration,
        processor: CasaProcessor,
        *,
        sanitize_control_tokens: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ):
        learned = getattr(model, "active_peft_config", None)
        if getattr(learned, "is_prompt_learning", False):
            raise NotImplementedError(
                f"A conversation isn't possible with {type(learned).__name__}: PEFT inserts the learned prompt "
                "again before every turn, so that later turns would be answered differently than in one call. "
                "Use LoRA, or call model.generate with the whole conversation."
            )
        self.model = model
        self.processor = processor
        self.sanitize_control_tokens = sanitize_control_tokens
        check_template_kwargs(processor, chat_template_kwargs)
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self.reset()

    def reset(self) -> None:
        """Forget everything that was said and free the cache."""
        self._ids = torch.empty((1, 0), dtype=torch.long, device=self.model.device)
        self._cache: Any = None

    def ask(self, text: str, images: Any = (), videos: Any = (), **options: Any) -> str:
        """Send one message and return the answer.

        Whatever is raised, also by a `streamer` or Ctrl-C, leaves the conversation as it was. Where the cache that
        `generate` ends with isn't that of the answer, as after a beam search, the turn is read once more.

        Args:
            text: message of the user; its images come before it, and its videos after these.
            images: new images only: one, in any form that the processor takes (a PIL image, a path, a URL, base64,
                bytes, an array), or a list of such.
            videos: new videos only: one, in any form that the processor takes (a path, a URL, base64, bytes, an array
                of frames, a list of images), or a list of such, in which a list of paths is one video: its frames.
            **options: arguments for `generate`, such as `max_new_tokens`, `num_beams` or `streamer`; and for the
                processor, of this message's videos: `fps`, `num_frames`, `do_sample_frames`, `frame_max_pixels`,
                `frames_per_image`, `video_timestamps` and `video_metadata`.

        Raises:
            TypeError: for arguments that the conversation gives itself: a cache, ids, masks, images by another name.
            ValueError: if the message is blank without an image or a video, if the processor refuses it, or for
                settings that a conversation can't have: no cache, one that doesn't grow, several answers.
        """
        of_videos = take_video_options(options)
        self._check_settings(options)
        images, videos = images_of(images), videos_of(videos)
        check_asks("text", text, bool(images or videos))
        inputs = self.processor(
            text=[self._new_text(message("user", text, len(images), len(videos)))],
            images=images or None,
            videos=[videos] if videos else None,
            **of_videos,
            add_special_tokens=False,
            return_tensors="pt",
        )
        ids = torch.cat([self._ids, inputs["input_ids"].to(self.model.device)], dim=1)
        shown = self._image_inputs(inputs)
        before, cache = self._cache, self._cache
        if cache is not None:
            before = cache_snapshot(cache)
            if (copies := _setting("num_beams", options, self.model) or 1) > 1:
                cache = cache_snapshot(cache)
                cache.batch_repeat_interleave(copies)
        try:
            output = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                return_dict_in_generate=True,
                **{"use_cache": True, CACHE: cache},
                **shown,
                **options,
            )
            answer_ids = self._without_end(output.sequences[0, ids.shape[1] :])
            answer = self.processor.decode(answer_ids, skip_special_tokens=True)
            cache, everything = output.cache, torch.cat([ids, answer_ids[None]], dim=1)
            if not _holds_one_row(cache) or cache.get_seq_length() != output.sequences.shape[1] - 1:
                cache = self._read(everything, shown, before)
        except BaseException:
            self._cache = before
            raise
        self._cache, self._ids = cache, everything
        return answer

    def _check_settings(self, given: Mapping[str, Any]) -> None:
        """Refuse settings of `generate` that a conversation can't have."""
        if own := [name for name in _OWN if name in given]:
            what = "a cache" if own[0] in CACHE_NAMES else own[0]
            raise TypeError(
                f"{own[0]} can't be given to a conversation, which has {what} of its own; leave it out, or call "
                "model.generate."
            )
        if given.get("use_cache") is False or getattr(given.get("generation_config"), "use_cache", None) is False:
            raise ValueError(
                "use_cache=False isn't possible in a conversation, which keeps its text and images in a "
                "cache. Leave it out, or call model.generate with the whole conversation."
            )
        if (kind := _setting("cache_implementation", given, self.model)) is not None:
            raise ValueError(
                f"cache_implementation={kind!r} isn't possible in a conversation, which has a cache of its own "
                "that grows with each turn. Leave it out, or set it to None in model.generation_config; "
                "model.generate takes any."
            )
        if (number := _setting("num_return_sequences", given, self.model) or 1) > 1:
            raise ValueError(
                f"num_return_sequences={number} isn't possible in a conversation, which continues from one "
                "answer. Leave it out, or call model.generate."
            )

    @torch.no_grad()
    def _read(self, ids: torch.Tensor, images: Mapping[str, torch.Tensor], cache: Any) -> Any:
        """A cache that holds these ids: the one of the turns before, and what is new with its images."""
        if cache is None:
            cache = DynamicCache(config=self.model.config.get_text_config())
        cache = cache_snapshot(cache)
        past = cache.get_seq_length()
        inputs = dict(images)
        if (types := inputs.get("mm_token_type_ids")) is not None:
            inputs["mm_token_type_ids"] = torch.nn.functional.pad(types, (0, ids.shape[1] - types.shape[1]))
        self.model(input_ids=ids[:, past:], logits_to_keep=1, **{"use_cache": True, CACHE: cache}, **inputs)
        return cache

    def _image_inputs(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The new images and frames, and where they stand; a placeholder that the model has written itself is text."""
        if not len(inputs["image_grid_thw"]):
            return {}
        shown = {
            "pixel_values": inputs["pixel_values"].to(self.model.device),
            "image_grid_thw": inputs["image_grid_thw"],  # looked at on the host, as the types and seconds are
            "mm_token_type_ids": torch.nn.functional.pad(inputs["mm_token_type_ids"], (self._ids.shape[1], 0)),
        }
        seconds = inputs.get("second_per_grid_ts")
        return shown if seconds is None else {**shown, "second_per_grid_ts": seconds}

    def _new_text(self, new: dict[str, Any]) -> ChatText:
        """What the chat template puts after the last answer, up to where the next one begins."""
        messages = [new, message("assistant", SAID), new] if self._ids.shape[1] else [new]
        return render_chat(
            self.processor,
            messages,
            sanitize_control_tokens=self.sanitize_control_tokens,
            chat_template_kwargs=self.chat_template_kwargs,
        )

    def _without_end(self, ids: torch.Tensor) -> torch.Tensor:
        # The template repeats the token that ended the answer. It is the last one, so the cache doesn't hold it yet.
        ends = self.model.generation_config.eos_token_id
        ends = [] if ends is None else [ends] if isinstance(ends, int) else ends
        return ids[:-1] if len(ids) and ids[-1].item() in ends else ids


def _setting(name: str, given: Mapping[str, Any], model: Any) -> Any:
    """What `generate` takes for a setting: that of the call, of its generation_config, or of the model's."""
    values = (given.get(name), getattr(given.get("generation_config"), name, None))
    return next((value for value in values if value is not None), getattr(model.generation_config, name, None))


def _holds_one_row(cache: Any) -> bool:
    home = None if cache is None else home_layer(cache)
    return home is not None and home.window_state is not None and home.window_state.batch_size == 1
