# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""What differs between the versions of Transformers that this package supports, and what it uses that may change in
the next one (`INTERNALS`).

A decoder's cache is called `cache` from 5.24 on and `past_key_values` before. CASA models say `cache`, accept both
names with every version, and pass each function of Transformers the one that it knows, which is `CACHE`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, TypeVar

import transformers
from transformers.masking_utils import create_causal_mask
from transformers.utils import logging

logger = logging.get_logger(__name__)

_Result = TypeVar("_Result")

# Versions of Transformers that the tests have passed with, and major and minor version of the newest.
TESTED = ("5.17.0", "5.24.0")
NEWEST_TESTED = tuple(map(int, TESTED[-1].split(".")[:2]))

_OLD_NAME = "past_key_values"
CACHE_NAMES = ("cache", _OLD_NAME)

_INSTALLED = tuple(map(int, transformers.__version__.split(".")[:2]))

# The name of a decoder's cache in this version of Transformers.
CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else _OLD_NAME


def with_one_cache_name(arguments: Mapping[str, Any], name: str = "cache") -> dict[str, Any]:
    """Keyword arguments whose cache, given by either name, goes by one.

    Args:
        arguments: keyword arguments of a function that takes a cache, by default None.
        name: name to go by, "cache" or "past_key_values".

    Raises:
        ValueError: if both names hold a cache.
    """
    caches = [arguments[key] for key in CACHE_NAMES if arguments.get(key) is not None]
    if len(caches) > 1:
        raise ValueError(
            f"cache and {_OLD_NAME} were both given, but are two names of the same argument. Pass one of them."
        )
    others = {key: value for key, value in arguments.items() if key not in CACHE_NAMES}
    return {**others, name: caches[0]} if caches else others


def takes_cache(function: Callable[..., _Result]) -> Callable[..., _Result]:
    """Let a function with a parameter `cache` be called with `past_key_values` too.

    Its signature shows the name that this version of Transformers looks for.
    """

    @wraps(function)
    def either(*args: Any, **kwargs: Any) -> _Result:
        return function(*args, **(with_one_cache_name(kwargs) if _OLD_NAME in kwargs else kwargs))

    own = inspect.signature(function)
    parameters = [
        parameter.replace(name=CACHE) if parameter.name == "cache" else parameter
        for parameter in own.parameters.values()
    ]
    either.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    return either


class _KeysByBothNames:
    """A dictionary whose cache is an entry by either name."""

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(_known(key))  # type: ignore[misc]

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(_known(key), value)  # type: ignore[misc]

    def __contains__(self, key: Any) -> bool:
        return super().__contains__(_known(key))  # type: ignore[misc]

    def get(self, key: Any, default: Any = None) -> Any:
        return super().get(_known(key), default)  # type: ignore[misc]


def _known(key: Any) -> Any:
    return CACHE if key in CACHE_NAMES else key


class InputsByBothNames(_KeysByBothNames, dict[str, Any]):
    """Inputs of a forward whose cache is read and replaced by either name.

    PEFT's prompt learning looks for `past_key_values` in what `prepare_inputs_for_generation` returns, and puts the
    prefix that it has learned there; up to PEFT 0.21 it does so with Transformers 5.24 too.
    """


class CacheByBothNames(_KeysByBothNames):
    """An output that answers to both names of its cache: outputs of Transformers do so from 5.24 on."""

    if CACHE == _OLD_NAME:

        @property
        def cache(self) -> Any:
            return self.past_key_values

        @cache.setter
        def cache(self, value: Any) -> None:
            self.past_key_values = value


def is_older_than(major: int, minor: int) -> bool:
    """Whether the installed Transformers is older than this version."""
    return (major, minor) > _INSTALLED


def warn_if_untested() -> None:
    """Say once if the installed Transformers is newer than the newest one that this package was tested with."""
    if _INSTALLED > NEWEST_TESTED:
        newest = ".".join(map(str, NEWEST_TESTED))
        logger.warning_once(
            f"casa_hf was tested with Transformers up to {newest}; Transformers {transformers.__version__} is "
            "installed. If something fails or answers look wrong, update casa_hf (or the code that came with the "
            "checkpoint), or install "
            f'"transformers<{NEWEST_TESTED[0]}.{NEWEST_TESTED[1] + 1}".'
        )


# What this package uses or overrides of Transformers that isn't public, tried with the versions `TESTED`: the module
# of casa_hf, the owner in Transformers, the names. tests/test_transformers_internals.py compares this with both.
INTERNALS: dict[str, dict[str, tuple[str, ...]]] = {
    "attention": {"transformers": ("initialization",)},
    "attention_backends": {
        "transformers.PreTrainedConfig": ("_attn_implementation",),
        "transformers.modeling_utils": ("ALL_ATTENTION_FUNCTIONS",),
        "transformers.models.llama.modeling_llama": ("eager_attention_forward",),
        "transformers.utils.generic": ("is_flash_attention_requested",),
    },
    "backbone_experts": {
        "transformers": ("initialization",),
        "transformers.core_model_loading": ("Concatenate", "MergeModulelist", "Transpose", "WeightConverter"),
    },
    "cache_casa": {
        "transformers.cache_utils": ("LinearAttentionLayer",),
        "transformers.cache_utils.Cache": ("layer_class_to_replicate",),
        "transformers.cache_utils.CacheLayerMixin": ("is_initialized",),
        "transformers.cache_utils.DynamicLayer": ("is_sliding",),
        "transformers.cache_utils.LinearAttentionLayer": ("conv_states", "recurrent_states"),
        "transformers.cache_utils.StaticLayer": ("max_cache_len",),
    },
    "cache_layers": {
        "transformers.cache_utils.CacheLayerMixin": ("is_initialized", "lazy_initialization"),
        "transformers.cache_utils.DynamicLayer": ("is_croppable", "is_sliding"),
        "transformers.cache_utils.StaticLayer": ("cumulative_length", "max_cache_len"),
    },
    "cache_recurrent": {
        "transformers.cache_utils": ("LinearAttentionLayer",),
        "transformers.cache_utils.LinearAttentionLayer": (
            "activate_past_recording",
            "conv_kernel_size",
            "conv_states",
            "has_previous_state",
            "is_conv_states_initialized",
            "is_recurrent_states_initialized",
            "recurrent_states",
            "update_conv_state",
            "update_recurrent_state",
        ),
    },
    "backbone_qwen3_5": {
        "transformers": ("initialization",),
        "transformers.models.qwen3_5.modeling_qwen3_5": (
            "causal_conv1d_fn",
            "torch_chunk_gated_delta_rule",
            "torch_recurrent_gated_delta_rule",
        ),
        "transformers.models.qwen3_5.modeling_qwen3_5.Qwen3_5GatedDeltaNet": (
            "A_log",
            "activation",
            "conv1d",
            "conv_kernel_size",
            "dt_bias",
            "head_k_dim",
            "head_v_dim",
            "in_proj_a",
            "in_proj_b",
            "in_proj_qkv",
            "in_proj_z",
            "key_dim",
            "norm",
            "num_k_heads",
            "num_v_heads",
            "out_proj",
            "value_dim",
        ),
    },
    "streaming.compiled": {
        "transformers.CompileConfig": ("_compile_all_devices",),
        "transformers.GenerationMixin": ("_valid_auto_compile_criteria",),
        "transformers.PreTrainedConfig": ("_attn_implementation",),
        "transformers.utils.generic": ("is_flash_attention_requested",),
    },
    "streaming.tower": {"transformers.PreTrainedConfig": ("_attn_implementation",)},
    "cli.loading": {"transformers.modeling_utils": ("ALL_ATTENTION_FUNCTIONS",)},
    "cli.terminal": {"transformers.utils.logging": ("disable_progress_bar",)},
    "configuration_casa": {"transformers.PreTrainedConfig": ("_auto_class",)},
    "conversion.mapping": {"transformers.PreTrainedModel": ("_from_config",)},
    "foreign_arguments": {
        "transformers.generation.continuous_batching.cache": ("PagedAttentionCache",),
        "transformers.loss.loss_utils": ("ForCausalLMLoss",),
        "transformers.modeling_flash_attention_utils": ("_flash_attention_forward",),
        "transformers.modeling_utils": ("ALL_ATTENTION_FUNCTIONS",),
        "transformers.utils": ("TransformersKwargs",),
        "transformers.utils.generic": ("is_flash_attention_requested",),
    },
    "generation_casa": {
        "transformers.GenerationConfig": ("_mask_length",),
        "transformers.GenerationMixin": (
            "_expand_inputs_for_generation",
            "_get_candidate_generator",
            "_get_deprecated_gen_repo",
            "_prepare_cache_for_generation",
            "_prepare_model_inputs",
            "_prepare_position_ids_for_generation",
            "_update_model_kwargs_for_generation",
            "_valid_auto_compile_criteria",
            "_validate_generation_mode",
        ),
        "transformers.PreTrainedConfig": ("_attn_implementation",),
        "transformers.PreTrainedModel": ("_is_stateful",),
        "transformers.generation.configuration_utils": ("GenerationMode",),
        "transformers.generation.utils": (
            "GENERATION_MODES_MAPPING",
            "GenerateBeamDecoderOnlyOutput",
            "GenerateDecoderOnlyOutput",
        ),
    },
    "hub.hooks": {"transformers.PreTrainedModel": ("_hf_peft_config_loaded",)},
    "loading_casa": {
        "transformers.PreTrainedModel": (
            "_finalize_model_loading",
            "_keys_to_ignore_on_load_unexpected",
            "_load_pretrained_model",
        ),
        "transformers.conversion_mapping": ("register_checkpoint_conversion_mapping",),
        "transformers.core_model_loading": ("WeightConverter", "WeightRenaming"),
        "transformers.quantizers.auto": ("AutoQuantizationConfig",),
    },
    "loss_casa": {"transformers.loss.loss_utils": ("ForCausalLMLoss",)},
    "media_casa": {
        "transformers.image_utils": ("ChannelDimension", "infer_channel_dimension_format", "is_valid_image"),
    },
    "modeling_casa": {
        "transformers": ("initialization",),
        "transformers.PreTrainedConfig": ("_attn_implementation", "_attn_implementation_internal"),
        "transformers.PreTrainedModel": (
            "_can_compile_fullgraph",
            "_can_record_outputs",
            "_can_set_experts_implementation",
            "_flex_attn_can_dispatch",
            "_from_config",
            "_init_weights",
            "_is_stateful",
            "_no_split_modules",
            "_skip_keys_device_placement",
            "_supports_attention_backend",
            "_supports_flash_attn",
            "_supports_sdpa",
            "_tied_weights_keys",
            "_tp_plan",
        ),
        "transformers.core_model_loading": ("_is_hf_initialized",),
        "transformers.loss.loss_utils": ("ForCausalLMLoss",),
        "transformers.masking_utils": ("create_causal_mask", "packed_sequence_mask_function"),
        "transformers.modeling_outputs": (
            "BaseModelOutputWithPastAndCrossAttentions",
            "BaseModelOutputWithPooling",
            "CausalLMOutputWithCrossAttentions",
        ),
        "transformers.utils": ("ModelOutput", "can_return_tuple"),
        "transformers.utils.generic": ("merge_with_config_defaults",),
        "transformers.utils.output_capturing": ("OutputRecorder", "capture_outputs"),
    },
    "own_copies": {"transformers.integrations.deepspeed": ("deepspeed_config",)},
    "patches_casa": {"transformers.models.qwen2_vl.image_processing_pil_qwen2_vl": ("smart_resize",)},
    "processing_casa": {
        "transformers.ProcessorMixin": ("_merge_kwargs",),
        "transformers.processing_utils": ("MultiModalData",),
    },
    "publishing_hook": {
        "transformers.utils": ("PushToHubMixin",),
        "transformers.utils.PushToHubMixin": ("_upload_modified_files",),
    },
    "tower_attention": {
        "transformers.integrations.sdpa_attention": ("sdpa_attention_forward",),
        "transformers.masking_utils": ("flash_attention_mask",),
        "transformers.vision_utils": ("get_vision_window_index",),
    },
    "torch_varlen": {
        "transformers.integrations.sdpa_attention": ("sdpa_attention_forward",),
        "transformers.masking_utils": ("flash_attention_mask",),
        "transformers.modeling_flash_attention_utils": ("_pad_input", "_unpad_input", "_upad_input"),
    },
    "serving.transformers_serve": {
        "transformers.cli.serving.chat_completion": ("ChatCompletionHandler",),
        "transformers.cli.serving.completion": ("CompletionHandler",),
        "transformers.cli.serving.model_manager": ("ModelManager",),
        "transformers.cli.serving.response": ("ResponseHandler",),
        "transformers.cli.serving.server": ("build_server",),
        "transformers.cli.serving.utils": ("GenerationState", "Modality", "get_response_template"),
        "transformers.utils.import_utils": ("is_serve_available",),
    },
    "training.arguments": {
        "transformers.integrations": ("get_available_reporting_integrations",),
        "transformers.integrations.integration_utils": ("INTEGRATION_TO_CALLBACK",),
        "transformers.utils": ("is_torch_bf16_gpu_available",),
    },
    "training.publishing": {
        "transformers.Trainer": ("_finish_current_push", "_push_from_checkpoint"),
        "transformers.trainer_utils": ("HubStrategy",),
    },
    "training.trainer": {
        "transformers.Trainer": (
            "_get_grad_norm",
            "_init_training_state",
            "_load_optimizer_and_scheduler",
            "_set_signature_columns_if_needed",
            "_signature_columns",
        ),
        "transformers.trainer": ("TRAINER_STATE_NAME",),
        "transformers.trainer_utils": (
            "EvalLoopOutput",
            "TrainOutput",
            "get_last_checkpoint",
            "has_length",
        ),
    },
    "transformers_versions": {"transformers.masking_utils": ("create_causal_mask",)},
    "vision_tower": {
        "transformers.PreTrainedConfig": ("_attn_implementation",),
        "transformers.utils.generic": ("get_max_seqlen", "is_flash_attention_requested"),
        "transformers.vision_utils": (
            "get_vision_cu_seqlens",
            "get_vision_interpolation_indices_and_weights",
            "get_vision_position_ids",
            "get_vision_window_index",
        ),
    },
}

# Names among them that only newer versions have.
ADDED_IN = {"_mask_length": (5, 18)}
