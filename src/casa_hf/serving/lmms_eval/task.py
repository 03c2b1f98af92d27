# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""A task of lmms-eval with other settings: the base class of those in `paper`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lmms_eval.tasks
from lmms_eval.api.task import ConfigurableMessagesTask
from lmms_eval.utils import load_yaml_config


class PaperTask(ConfigurableMessagesTask):
    """A task whose configuration states only what differs from that of another one.

    lmms-eval's own `include` finds files beside a task alone, so the other task is named by `extends`.

    Args:
        config: configuration, with `extends`: the file of the other task, absolute or relative to the tasks of
            lmms-eval. What is null in the configuration is unset.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config=_extended(config))


def _extended(config: dict[str, Any]) -> dict[str, Any]:
    """The whole configuration."""
    config = {name: value for name, value in config.items() if name != "class"}
    base = config.pop("extends", None)
    if base is None:
        return config
    file = Path(lmms_eval.tasks.__file__).parent / base  # an absolute path stays as it is
    return {**_extended(load_yaml_config(str(file), mode="full")), **config}


__all__ = ["PaperTask"]
