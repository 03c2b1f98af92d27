# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""From source checkpoints to CASA checkpoints, from one design to another, and back."""

from .authors import names_report
from .convert import ConversionReport, convert_checkpoint, plan_conversion
from .inspection import CheckpointSummary, inspect_checkpoint
from .plan import ConversionPlan
from .to_source import convert_to_source, plan_to_source

__all__ = [
    "CheckpointSummary",
    "ConversionPlan",
    "ConversionReport",
    "convert_checkpoint",
    "convert_to_source",
    "inspect_checkpoint",
    "names_report",
    "plan_conversion",
    "plan_to_source",
]
