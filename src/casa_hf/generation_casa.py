# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Images in Transformers' `generate`.

`generate` is Transformers' own, and also takes the cache by both of its names. These hooks resolve, once and from the
prompt alone, before which token each image stands, hand every forward the images that belong to the tokens it is fed
and the types of these tokens, and forget both after the prefill. What is generated later, or proposed by an assistant,
is text even where it looks like an image placeholder.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import wraps
from typing import Any, cast

import torch
from transformers import GenerationConfig, GenerationMixin, ProcessorMixin
from transformers.cache_utils import Cache, QuantizedCache, StaticLayer
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.utils import (
    GENERATION_MODES_MAPPING,
    GenerateBeamDecoderOnlyOutput,
    GenerateDecoderOnlyOutput,
)

from .attention_backends import is_varlen
from .cache_casa import require_decoder_cache
from .configuration_casa import CasaConfig
from .foreign_arguments import refuse_foreign
from .image_inputs import (
    IMAGE_TYPE,
    check_seconds,
    check_timestamps,
    image_placeholders,
    refuse_expanded_placeholders,
    warn_of_untyped_frames,
    without_images,
)
from .text_inputs import NewText, cached_length
from .transformers_versions import (
    CACHE,
    CacheByBothNames,
    InputsByBothNames,
    is_older_than,
    takes_cache,
    with_one_cache_name,
)

IMAGE_INPUTS = ("pixel_values", "image_embeds", "image_grid_thw", "image_positions", "second_per_grid_ts")


@dataclass
class CasaGenerateOutput(CacheByBothNames, GenerateDecoderOnlyOutput):
    """What `generate` returns with `return_dict_in_generate=True`, by greedy search, sampling or with an assistant."""


@dataclass
class CasaGenerateBeamOutput(CacheByBothNames, GenerateBeamDecoderOnlyOutput):
    """What `generate` returns with `return_dict_in_generate=True`, by beam search."""


_BY_BOTH_NAMES: dict[type, type] = {
    GenerateDecoderOnlyOutput: CasaGenerateOutput,
    GenerateBeamDecoderOnlyOutput: CasaGenerateBeamOutput,
}


class CasaGenerationMixin(GenerationMixin):
    """Generation hooks of [`CasaForConditionalGeneration`].

    `generate` takes what Transformers' own takes, the cache as `cache` or `past_key_values`, the tokenizer of
    `stop_strings` also as a processor that has it, and raises TypeError for a cache by another name or of another
    kind, ValueError for both names at once and for videos in another model's form, and NotImplementedError for ways to
    generate that don't work with windows of images.
    """

    @cast(Any, wraps(GenerationMixin.generate))
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        kwargs = with_one_cache_name(kwargs, CACHE)
        refuse_foreign({name: value for name, value in kwargs.items() if name != CACHE})
        if kwargs.get(CACHE) is not None:
            require_decoder_cache(kwargs[CACHE])
        if isinstance(kwargs.get("tokenizer"), ProcessorMixin):  # from `transformers serve`, for `stop_strings`
            kwargs["tokenizer"] = kwargs["tokenizer"].tokenizer
        output = super().generate(*args, **kwargs)
        by_both_names = _BY_BOTH_NAMES.get(type(output))
        return by_both_names(**vars(output)) if by_both_names is not None else output

    def _prepare_model_inputs(self, inputs: Any, bos_token_id: Any, model_kwargs: dict[str, Any]) -> Any:
        # The batch size of embedded prompts is read off the first tensor found, which must not be an image.
        first = {k: model_kwargs[k] for k in ("inputs_embeds",) if k in model_kwargs}
        return super()._prepare_model_inputs(inputs, bos_token_id, {**first, **model_kwargs})

    def _prepare_position_ids_for_generation(self, inputs_tensor: torch.Tensor, model_kwargs: dict[str, Any]) -> None:
        """Positions come from the mask and the cache in every forward, so none are prepared."""
        return None

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Any = None,
        **model_kwargs: Any,
    ) -> tuple[Any, dict[str, Any]]:
        """Expand text as usual; find the images' places, counted from the end of the prompt, and keep the images
        themselves for `_prepare_cache_for_generation`, which knows what is cached."""
        images = {name: value for name in IMAGE_INPUTS if (value := model_kwargs.pop(name, None)) is not None}
        embeds = model_kwargs.get("inputs_embeds")
        past = cached_length(model_kwargs.get(CACHE))
        prompt_length = (input_ids if embeds is None else embeds).shape[1]
        first_new = past if past < prompt_length else 0
        has_content = _check_image_inputs(images, past)
        # Sizes and places are chosen from and counted, which a device would have to be asked for each time.
        for name in ("image_grid_thw", "image_positions", "second_per_grid_ts"):
            if name in images:
                images[name] = torch.as_tensor(images[name]).cpu()
        places = images.pop("image_positions", None)
        types = model_kwargs.get("mm_token_type_ids")
        types_read: torch.Tensor | None = None
        if types is not None and not past and types.shape[1] != prompt_length:
            raise ValueError(
                f"mm_token_type_ids has shape {tuple(types.shape)}; expected one entry for each of the prompt's "
                f"{prompt_length} tokens (0 where no image is)."
            )
        if places is None and (images or embeds is None):
            ids = input_ids if input_ids is not None and input_ids.shape[1] == prompt_length else None
            text = NewText(ids, embeds, self.get_input_embeddings(), model_kwargs.get("attention_mask"))
            text, (types_read,) = text.on_host([(self.config.image_token_id,)], types)
            found = image_placeholders(self.config, text, types_read)
            if has_content and text.ids is not None:
                expanded = text.ids[:, first_new:] if types is None else text.ids[found]
                refuse_expanded_placeholders(self.config, expanded)
            places = found.nonzero()
            if not has_content:
                num_places = int((places[:, 1] >= first_new).sum())
                _check_left_over(self.config, images, num_places, prompt_length - first_new, past)
                images = {}
        if images and types is None:
            warn_of_untyped_frames(self.config, places.tolist())
        if images:
            check_timestamps(self.config, types if types_read is None else types_read)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        if images:
            images["image_positions"] = places - torch.tensor([0, prompt_length])
        return input_ids, {**model_kwargs, **images}

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        """Prepare the cache, then bring images and their places into the form that every forward selects from."""
        result = super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
        cache = model_kwargs.get(CACHE)
        static = (layer for layer in getattr(cache, "layers", ()) if isinstance(layer, StaticLayer))
        room = next((layer.max_cache_len for layer in static), None)
        if room is not None and room < max_cache_length:
            raise ValueError(
                f"The static cache has room for {room} tokens, but {max_cache_length} may have to be kept (max_length "
                "or max_new_tokens, less one). Make it with a larger max_cache_len, or generate fewer tokens."
            )
        past = cached_length(cache)
        mask = model_kwargs.get("attention_mask")
        # `generate` drops a mask of ones and remembers its length.
        total = generation_config._mask_length if mask is None else mask.shape[1]
        if total <= past:
            raise ValueError(
                f"attention_mask covers {total} tokens, but the cache holds {past} already. Pass an attention_mask "
                "for all tokens, the cached ones and the new ones, or start with a new cache."
            )
        _check_generation(generation_config, model_kwargs, generation_mode, past)
        if generation_mode == GenerationMode.ASSISTED_GENERATION and generation_config.output_attentions:
            self._check_attentions()
        if generation_mode == GenerationMode.ASSISTED_GENERATION and past:
            model_kwargs["num_cached_ids"] = past
        if (types := model_kwargs.get("mm_token_type_ids")) is not None and types.shape[1] < total:
            model_kwargs["mm_token_type_ids"] = torch.nn.functional.pad(types, (total - types.shape[1], 0))
        if model_kwargs.get("image_positions") is None:
            return result
        if generation_config.is_assistant:
            self._hide_last_image(model_kwargs)
            if model_kwargs.get("image_positions") is None:
                return result
        places = model_kwargs["image_positions"] + torch.tensor([0, total])
        grids = model_kwargs.get("image_grid_thw")
        num_images = 0 if grids is None else len(grids)
        new = places[:, 1] >= past
        if num_images != len(places):
            if num_images != int(new.sum()):
                raise ValueError(
                    f"The prompt has {len(places)} image placeholders, {int(new.sum())} of them after the {past} "
                    f"cached tokens, but {num_images} images were given. Pass the new images, or those of the whole "
                    "prompt; image_positions says where they stand if the model itself has written placeholders."
                )
            places = places[new]
        model_kwargs["image_positions"] = places

        copies = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        if copies > 1 or generation_config.prefill_chunk_size is not None:
            self._encode_images(model_kwargs)
        if copies > 1:
            self._repeat_images(model_kwargs, copies)
        return result

    def _check_attentions(self) -> None:
        """Refuse to return attention weights with an assistant where Transformers, which cuts every block's into those
        of single tokens, wouldn't find any."""
        implementation = self.config.text_config._attn_implementation
        if implementation == "sdpa" or is_varlen(implementation):
            raise ValueError(
                f"output_attentions=True needs attention weights, which {implementation!r} doesn't return. "
                'Call model.set_attn_implementation("eager"), or leave output_attentions out.'
            )
        if self.config.casa_placement == "replace":
            raise NotImplementedError(
                "Assisted decoding can't return the attentions of a model in which some blocks have no self-attention "
                '(casa_placement="replace"). Leave output_attentions out, or decode without an assistant.'
            )

    def _hide_last_image(self, model_kwargs: dict[str, Any]) -> None:
        """Leave out an image before the prompt's last token: an assistant takes that token back after its first
        proposals, and an image can't be taken back. What it proposes without the image is checked all the same."""
        kept = (model_kwargs["image_positions"][:, 1] < -1).nonzero()[:, 0]
        if len(kept) == 0:
            for name in IMAGE_INPUTS:
                model_kwargs.pop(name, None)
        elif len(kept) < len(model_kwargs["image_positions"]):
            model_kwargs["image_positions"] = model_kwargs["image_positions"][kept]
            self._select_images(model_kwargs, kept)

    def _encode_images(self, model_kwargs: dict[str, Any]) -> None:
        """Replace pixels by features, one tensor per image."""
        grids = model_kwargs["image_grid_thw"]
        if (pixels := model_kwargs.pop("pixel_values", None)) is not None:
            features = self.get_image_features(pixels.to(self.device), grids, return_dict=True)
            model_kwargs["image_embeds"] = features.pooler_output
        elif isinstance(model_kwargs["image_embeds"], torch.Tensor):
            model_kwargs["image_embeds"] = model_kwargs["image_embeds"].split(self._tokens_per_image(grids))

    def _repeat_images(self, model_kwargs: dict[str, Any], copies: int) -> None:
        """Give each of the `copies` rows that a prompt was expanded to its images, in reading order."""
        places = model_kwargs["image_positions"]
        rows = (places[:, :1] * copies + torch.arange(copies)).flatten()
        source = torch.arange(len(places)).repeat_interleave(copies)
        order = torch.argsort(rows, stable=True)
        rows, source = rows[order], source[order]
        model_kwargs["image_positions"] = torch.stack([rows, places[source, 1]], dim=1)
        self._select_images(model_kwargs, source)

    def _select_images(self, model_kwargs: dict[str, Any], indices: torch.Tensor) -> None:
        """Keep the images with these indices, which may repeat."""
        grids, wanted = model_kwargs["image_grid_thw"], indices.tolist()
        if (pixels := model_kwargs.get("pixel_values")) is not None:
            parts = pixels.split(grids.prod(-1).tolist())
            model_kwargs["pixel_values"] = torch.cat([parts[i] for i in wanted])
        if (features := model_kwargs.get("image_embeds")) is not None:
            if isinstance(features, torch.Tensor):
                features = features.split(self._tokens_per_image(grids))
            model_kwargs["image_embeds"] = tuple(features[i] for i in wanted)
        if (seconds := model_kwargs.get("second_per_grid_ts")) is not None:
            model_kwargs["second_per_grid_ts"] = seconds[indices]
        model_kwargs["image_grid_thw"] = grids[indices]

    def _tokens_per_image(self, grids: torch.Tensor) -> list[int]:
        return (grids.prod(-1) // self.config.vision_config.spatial_merge_size**2).tolist()

    @takes_cache
    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        cache: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Inputs of one forward: the images that stand before the tokens fed, and the tokens' own validity."""
        images = {name: value for name in IMAGE_INPUTS if (value := kwargs.pop(name, None)) is not None}
        types = kwargs.pop("mm_token_type_ids", None)
        num_cached_ids = kwargs.pop("num_cached_ids", 0)
        if num_cached_ids and is_first_iteration and next_sequence_length is None:
            # Assisted decoding starts with the whole prompt even where a part of it is cached.
            next_sequence_length = input_ids.shape[1] - num_cached_ids
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **{CACHE: cache},
            **kwargs,
        )
        fed = model_inputs.get("inputs_embeds")
        fed = model_inputs["input_ids"] if fed is None else fed
        num_tokens = fed.shape[1]
        prepared = model_inputs.get("attention_mask")
        if attention_mask is not None and not (isinstance(prepared, torch.Tensor) and prepared.ndim == 2):
            # A static cache turns the mask into a 4-D one, from which padding can't be read any more.
            model_inputs["token_mask"] = attention_mask[:, -num_tokens:].bool().to(fed.device)
        if not images:
            return InputsByBothNames(model_inputs)
        start = cached_length(cache)
        end = start + num_tokens
        if types is not None:
            # Of all tokens so far: the time of a frame may stand in an earlier chunk.
            types = torch.nn.functional.pad(types, (0, max(0, end - types.shape[1])))
            model_inputs["mm_token_type_ids"] = types[:, :end]
        model_inputs |= self._images_between(images, types, start, end, fed)
        return InputsByBothNames(model_inputs)

    def _images_between(
        self, images: dict[str, Any], types: torch.Tensor | None, start: int, end: int, fed: torch.Tensor
    ) -> dict[str, Any]:
        """The images before the tokens [start, end), with positions relative to `start`; and types without any."""
        indices = images["image_positions"][:, 1]
        inside = ((indices >= start) & (indices < end)).nonzero()[:, 0]
        if not len(inside):
            return {}
        if len(inside) < len(indices):
            self._select_images(images, inside)
        positions = images["image_positions"][inside] - torch.tensor([0, start])
        if isinstance(pixels := images.get("pixel_values"), torch.Tensor):
            images["pixel_values"] = pixels.to(fed.device)
        if types is not None:
            return {**images, "image_positions": positions}
        # They also say how many tokens these positions count: forward notices a prompt that an adapter adds.
        types = torch.zeros(fed.shape[0], end - start, dtype=torch.long)
        types[positions[:, 0], positions[:, 1]] = IMAGE_TYPE
        return {**images, "image_positions": positions, "mm_token_type_ids": types}

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        if model_kwargs.get("use_cache", True):
            for name in (*IMAGE_INPUTS, "mm_token_type_ids", "num_cached_ids"):
                model_kwargs.pop(name, None)
        return model_kwargs

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        """An assistant that isn't a CASA model reads the text alone: a CASA prompt has no placeholders in it."""
        hidden = {"num_cached_ids"}
        if not isinstance(kwargs.get("assistant_model"), CasaGenerationMixin):
            hidden |= {*IMAGE_INPUTS, "mm_token_type_ids"}
        model_kwargs = {name: value for name, value in kwargs["model_kwargs"].items() if name not in hidden}
        return super()._get_candidate_generator(*args, **{**kwargs, "model_kwargs": model_kwargs})

    # ---------------------------------------------------------------- what is refused, by name

    def _validate_generation_mode(
        self, generation_mode: Any, generation_config: GenerationConfig, generation_mode_kwargs: dict[str, Any]
    ) -> None:
        """As in Transformers; and before anything has been computed, assisted decoding is refused where there is a
        recurrent state, from which rejected tokens can't be taken back."""
        models: list[tuple[str, Any]] = []
        if generation_mode == GenerationMode.ASSISTED_GENERATION:
            models = [("this model", self), ("the assistant", generation_mode_kwargs.get("assistant_model"))]
        elif generation_config.is_assistant:  # of a model that may not be a CASA model
            models = [("the assistant", self)]
        for name, model in models:
            if isinstance(model, CasaGenerationMixin) and model._is_stateful:
                raise NotImplementedError(
                    f"Assisted decoding and prompt lookup aren't possible, because {name} has blocks of linear "
                    f"attention ({model.config.backbone.display_name}): rejected tokens can't be taken back from "
                    "their recurrent state. Leave assistant_model, prompt_lookup_num_tokens and assistant_early_exit "
                    "out."
                )
        super()._validate_generation_mode(generation_mode, generation_config, generation_mode_kwargs)

    def _valid_auto_compile_criteria(self, model_kwargs: dict[str, Any], generation_config: GenerationConfig) -> bool:
        """As in Transformers, which compiles decoding on a static cache, except with chunked prefill: its chunks would
        be compiled too, each with other images."""
        if generation_config.prefill_chunk_size is not None:
            if generation_config.compile_config is not None:
                raise NotImplementedError(
                    "compile_config and prefill_chunk_size can't be combined: chunks with different images "
                    "can't be compiled once for all. Leave one of them out."
                )
            return False
        compiles = super()._valid_auto_compile_criteria(model_kwargs, generation_config)
        if compiles and not self.training:
            cast(Any, self).fuse_projections()
        return compiles

    def _get_deprecated_gen_repo(self, generation_mode: Any, *args: Any, **kwargs: Any) -> None:
        custom = kwargs.get("custom_generate", args[1] if len(args) > 1 else None)
        if custom is None and "/" in GENERATION_MODES_MAPPING[generation_mode]:
            raise NotImplementedError(
                f"Generation mode {generation_mode.value!r} isn't supported by CASA models: it loads code from "
                "the Hub that doesn't know CASA's windows. Use greedy search, sampling, beam search or "
                "assisted decoding."
            )

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            "Continuous batching (generate_batch, cache_implementation='paged') isn't supported by CASA "
            "models: its cache has no place for their images. Call generate with a padded batch."
        )

    generate_batch = init_continuous_batching
    continuous_batching_context_manager = init_continuous_batching


def _check_image_inputs(images: dict[str, Any], past: int) -> bool:
    """Whether there are images; a part of what describes them is refused before anything is expanded or encoded.

    Beside a filled cache, grids may be left over from the prompt.
    """
    content = [name for name in ("pixel_values", "image_embeds") if name in images]
    if content and "image_grid_thw" not in images:
        raise ValueError(
            f"{content[0]} was given without image_grid_thw; pass it as the processor returned it, of shape "
            "(num_images, 3)."
        )
    if content and len(images[content[0]]) and not len(images["image_grid_thw"]):
        raise ValueError(
            f"{content[0]} has images, but image_grid_thw is empty; pass both as the processor returned them."
        )
    if not content and (
        len(images.get("image_positions", ())) or (len(images.get("image_grid_thw", ())) and not past)
    ):
        raise without_images(" and ".join(images))
    if content:
        check_seconds(images.get("second_per_grid_ts"), len(images["image_grid_thw"]))
    return bool(content) and len(images["image_grid_thw"]) > 0


def _check_left_over(config: CasaConfig, images: dict[str, Any], num_places: int, num_new: int, past: int) -> None:
    """Refuse text that announces images which aren't given. On a filled cache a placeholder is text, since the model
    may have written it, unless grids say that there are images."""
    if not num_places:
        return
    if past and num_new > 1 and len(images.get("image_grid_thw", ())):
        raise without_images("image_grid_thw")
    if not past:
        raise ValueError(
            f"The prompt has {num_places} image placeholders (token {config.image_token_id}) but 0 images were "
            "given. Pass pixel_values and image_grid_thw from CasaProcessor, or remove the placeholders."
        )


def _check_generation(config: GenerationConfig, model_kwargs: dict[str, Any], generation_mode: Any, past: int) -> None:
    """Refuse by name what Transformers can't do with this cache or prompt."""
    if getattr(model_kwargs.get(CACHE), "offloading", False):
        raise NotImplementedError(
            "Offloaded caches aren't supported: the keys and values of images would stay on the device. Use a "
            "DynamicCache or StaticCache without offloading."
        )
    if config.assistant_early_exit is not None:
        raise NotImplementedError(
            "assistant_early_exit isn't supported by CASA models; use assistant_model or prompt lookup."
        )
    if config.prefill_chunk_size is not None:
        if model_kwargs.get("inputs_embeds") is not None:
            raise NotImplementedError(
                "prefill_chunk_size can't be combined with inputs_embeds, since only input_ids are split into "
                "chunks; leave it out."
            )
        if past and is_older_than(5, 21):
            raise NotImplementedError(
                "prefill_chunk_size with a filled cache needs Transformers 5.21 or newer; leave it out, or feed the "
                "chunks to the model."
            )
    if generation_mode == GenerationMode.ASSISTED_GENERATION:
        if model_kwargs.get(CACHE) is None:
            raise ValueError("Assisted decoding needs a cache; set use_cache=True, or leave the assistant out.")
        if isinstance(model_kwargs[CACHE], QuantizedCache):
            raise NotImplementedError(
                "Assisted decoding isn't possible with a quantized cache, from which rejected tokens can't be "
                "removed; use a DynamicCache."
            )
