# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""CASA vision-language models for Transformers: load, convert, generate, train.

Importing the package makes its classes known to Transformers, see `registration`.
"""

from .cache_casa import cache_nbytes
from .chat import Conversation
from .configuration_casa import CasaConfig
from .conversion import (
    convert_checkpoint,
    convert_to_source,
    inspect_checkpoint,
    plan_conversion,
    plan_to_source,
)
from .folder_files import CheckpointError
from .hub.push import push_checkpoint
from .hub.remote_code import add_code
from .media_casa import MediaPolicy
from .modeling_casa import CasaForConditionalGeneration, CasaModel
from .processing_casa import CasaProcessor
from .registration import register
from .streaming import CaptionEvent, CasaStream, CasaStreamBatch, StreamSettings
from .version import __version__ as __version__

register()

__all__ = [
    "CaptionEvent",
    "CasaConfig",
    "CasaForConditionalGeneration",
    "CasaModel",
    "CasaProcessor",
    "CasaStream",
    "CasaStreamBatch",
    "CheckpointError",
    "Conversation",
    "MediaPolicy",
    "StreamSettings",
    "add_code",
    "cache_nbytes",
    "convert_checkpoint",
    "convert_to_source",
    "inspect_checkpoint",
    "plan_conversion",
    "plan_to_source",
    "push_checkpoint",
]
