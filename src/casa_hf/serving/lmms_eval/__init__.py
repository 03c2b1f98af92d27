# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""CASA models, and the models that they were converted from, in lmms-eval: `pip install casa_hf[lmms-eval]`.

| module | what it does | needs lmms-eval |
|---|---|---|
| `model` | the model `casa_hf`, which lmms-eval finds by its entry point | yes |
| `generation` | what lmms-eval asks of `generate`, in Transformers' words | no |
| `task`, `paper` | the benchmarks of the paper with the settings of its authors | yes |
| `answers` | questions and answers of these, as the authors write and read them | no |
| `figures`, `results` | the authors' figures, and a table of results beside them | no |
| `__main__` | `python -m casa_hf.serving.lmms_eval CHECKPOINT`: all of it | yes |
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

# By this name lmms-eval knows the model: `--model casa_hf`.
MODEL_ID = "casa_hf"

# The folder of the benchmarks' settings, for `--include_path`.
PAPER_TASKS = Path(__file__).parent / "paper"


def manifest() -> Any:
    """What lmms-eval reads at the entry point of the group `lmms_eval.models`.

    Returns:
        The `ModelManifest` of the model.
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(MODEL_ID, chat_class_path=f"{__name__}.model.CasaLmms")


__all__ = ["MODEL_ID", "PAPER_TASKS", "manifest"]
