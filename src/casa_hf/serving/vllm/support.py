# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""What vLLM serves of CASA's design space and of its own options; all else is refused by name."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from vllm import ModelRegistry
from vllm.config import VllmConfig
from vllm.config.compilation import CompilationConfig
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
from vllm.platforms import current_platform

from casa_hf.configuration_casa import CasaConfig

from .windows import FusionRules, PlacedImage, RequestWindows

ARCHITECTURE = "CasaForConditionalGeneration"
FUSION_OP = "vllm::casa_fusion"

# The key of `additional_config` for the image tokens that a window may have, and its default.
MAX_IMAGE_TOKENS = "casa_max_image_tokens"
_DEFAULT_IMAGE_TOKENS = 8192

_AS_SOURCE = (
    "Serve it as its source: `casa-hf convert CHECKPOINT OUTPUT --to-source` gives a stock checkpoint of the same "
    "weights, which vLLM knows"
)
_RUNNER = "VLLM_USE_V2_MODEL_RUNNER"
_SCHEDULER = "casa_hf.serving.vllm.scheduler.make_scheduler"


def register_model() -> None:
    """Register the model and what its configuration needs; may be called several times."""
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, "casa_hf.serving.vllm.model:CasaForConditionalGeneration")
    MODELS_CONFIG_MAP[ARCHITECTURE] = CasaServing
    if FUSION_OP not in CompilationConfig._attention_ops:
        CompilationConfig._attention_ops.append(FUSION_OP)


def fusion_rules(config: CasaConfig) -> FusionRules:
    """What windows hold, by a configuration."""
    return FusionRules(
        with_text=config.casa_keys != "image",
        image_history=config.casa_image_history,
        video_history=config.casa_video_history,
        delimiters=frozenset(config.delimiter_token_ids),
        gists=frozenset(config.gist_token_ids or ()),
    )


def max_image_tokens(vllm_config: VllmConfig) -> int:
    """The largest number of image tokens that a window may have.

    Raises:
        ValueError: if the setting isn't a positive integer.
    """
    given = (vllm_config.additional_config or {}).get(MAX_IMAGE_TOKENS, _DEFAULT_IMAGE_TOKENS)
    if not isinstance(given, int) or given < 1:
        raise ValueError(
            f"{MAX_IMAGE_TOKENS}={given!r} in additional_config must be a positive integer: the image tokens that the "
            "largest window has, such as 4624 for four images of 952 x 952 pixels."
        )
    return given


def grids_of(modality: str, item: Any) -> torch.Tensor:
    """(images, 3) patches in time, height and width of an image, or of the frames of a video, in a request."""
    return item["video_grid_thw" if modality == "video" else "image_grid_thw"].data.reshape(-1, 3)


def check_windows(config: CasaConfig, images: Sequence[PlacedImage], tokens: Sequence[int]) -> None:
    """Refuse a prompt that has a window with more images than are served.

    Args:
        config: the model's configuration.
        images: images of the prompt, in reading order.
        tokens: ids of the prompt.

    Raises:
        ValueError: with the numbers.
    """
    rules = fusion_rules(config)
    largest = config.casa_max_image_tokens
    for window in RequestWindows(images, lambda start, end: tokens[start:end], rules).windows:
        number = sum(image.num_tokens for image in window.images)
        if number > largest:
            raise ValueError(
                f"The prompt has {len(window.images)} images with {number} image tokens in one window, which may have "
                f"{largest}. Make the images smaller or fewer, or start the server with --additional-config "
                f"'{{\"{MAX_IMAGE_TOKENS}\": {number}}}'."
            )
        if rules.gists and rules.with_text and len(window.images) > 1:
            raise ValueError(
                f"The prompt has {len(window.images)} images without text between them. vLLM serves such prompts for "
                "models with gist tokens only if these have casa_image_history='latest'; put text between the images."
            )


class CasaServing(VerifyAndUpdateConfig):
    """What vLLM's configuration must be for CASA models."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Refuse what isn't served, and choose the scheduler that knows windows.

        Raises:
            ValueError: naming what isn't served and the way out.
        """
        config = vllm_config.model_config.hf_config
        check_design(config)
        check_options(vllm_config)
        config.casa_max_image_tokens = max_image_tokens(vllm_config)  # for the processor, which has no more than this
        vllm_config.scheduler_config.scheduler_cls = _SCHEDULER
        os.environ[_RUNNER] = "0"


def check_design(config: CasaConfig) -> None:
    """Refuse models that vLLM doesn't serve.

    Raises:
        ValueError: naming the field, its value and the way out.
    """
    from .families import TEXT_MODELS, TOWERS

    if config.casa_keys == "context":
        raise ValueError(f"vLLM doesn't serve CASA models with casa_keys='context' (exact, insertion). {_AS_SOURCE}.")
    served: list[tuple[str, tuple[Any, ...]]] = [
        ("casa_placement", ("parallel",)),
        ("casa_image_updates", ("none",)),
        ("casa_text_windows", (False,)),
        ("casa_video_layout", (None,)),
    ]
    for field, values in served:
        if getattr(config, field) not in values:
            raise ValueError(
                f"vLLM doesn't serve CASA models with {field}={getattr(config, field)!r}; served: "
                f"{', '.join(map(repr, values))}. Use Transformers."
            )
    histories = (config.casa_image_history, config.casa_video_history)
    if "all" in histories and len(set(histories)) > 1:
        raise ValueError(
            f"vLLM doesn't serve casa_image_history={histories[0]!r} with casa_video_history={histories[1]!r}: with "
            "'all' both must be. Set the other to 'all' too if the model gets no such visuals, or use Transformers."
        )
    if config.casa_video_history == "group" and config.video_timestamps is not None:
        raise ValueError(
            "vLLM doesn't serve casa_video_history='group' with timestamps, which stand between frames; set "
            "video_timestamps to None, or use Transformers."
        )
    text, tower = config.text_config.model_type, config.vision_config.model_type
    if text not in TEXT_MODELS:
        raise ValueError(
            f"vLLM doesn't serve CASA models of {config.backbone.display_name} (text model_type {text!r}); served: "
            f"{', '.join(TEXT_MODELS)}. Use Transformers."
        )
    if tower not in TOWERS:
        raise ValueError(
            f"vLLM doesn't serve CASA models with the vision tower {tower!r}; served: {', '.join(TOWERS)}. Use "
            "Transformers."
        )
    if config.needs_projector:
        raise ValueError(
            "vLLM doesn't serve CASA models with a projector between a tower and a text model of different widths. "
            "Use Transformers."
        )
    if config.casa_positions == "insertion" and not config.backbone.multimodal_rope:
        raise ValueError(
            "vLLM doesn't serve casa_positions='insertion' with one-dimensional positions. Use Transformers."
        )
    if getattr(config.text_config, "attention_bias", False):
        raise ValueError("vLLM doesn't serve CASA models whose attention outputs have a bias. Use Transformers.")


def check_options(vllm_config: VllmConfig) -> None:
    """Refuse options of vLLM that fusion layers don't work with.

    Raises:
        ValueError: naming the option and the way out.
    """
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    multimodal, lora = vllm_config.model_config.multimodal_config, vllm_config.lora_config
    refused = {
        "LoRA adapters of the vision tower (enable_tower_connector_lora)": getattr(
            lora, "enable_tower_connector_lora", False
        ),
        "sharded LoRA adapters (fully_sharded_loras)": getattr(lora, "fully_sharded_loras", False),
        "speculative decoding (speculative_config)": vllm_config.speculative_config is not None,
        "pipeline parallelism (pipeline_parallel_size)": parallel.pipeline_parallel_size > 1,
        "context parallelism": getattr(parallel, "decode_context_parallel_size", 1) > 1
        or getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "KV transfer (kv_transfer_config)": vllm_config.kv_transfer_config is not None,
        "encoder transfer (ec_transfer_config)": getattr(vllm_config, "ec_transfer_config", None) is not None,
        f"kv_cache_dtype={cache.cache_dtype!r}": cache.cache_dtype not in ("auto", "float16", "bfloat16", "float32"),
        "disable_hybrid_kv_cache_manager": bool(vllm_config.scheduler_config.disable_hybrid_kv_cache_manager),
        "a scheduler of another class (scheduler_cls)": vllm_config.scheduler_config.scheduler_cls
        not in (None, _SCHEDULER),
        "mm_processor_cache_type='shm'": getattr(multimodal, "mm_processor_cache_type", None) == "shm",
        "precomputed image embeddings (enable_mm_embeds)": bool(getattr(multimodal, "enable_mm_embeds", False)),
        f"the second model runner ({_RUNNER}=1)": os.environ.get(_RUNNER) == "1",
    }
    for option, given in refused.items():
        if given:
            raise ValueError(f"CASA models can't be served by vLLM with {option}; leave it out.")
    if current_platform.is_cpu() and vllm_config.model_config.dtype == torch.float32 and 4 in _bits(vllm_config):
        raise ValueError("vLLM's kernels for CPUs don't take weights of 4 bits with float32; use --dtype bfloat16.")


def _bits(vllm_config: VllmConfig) -> set[int | None]:
    """Numbers of bits of quantised weights."""
    given = getattr(vllm_config.model_config.hf_config, "quantization_config", None) or {}
    groups = given.get("config_groups", {}).values()
    return {given.get("bits"), *((group.get("weights") or {}).get("num_bits") for group in groups)}
