# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""How a run says where it is: a bar on the terminal, and its logs for whoever asks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import ProgressCallback, TrainerCallback


class StepsProgress(ProgressCallback):
    """The bar of steps with the time left; a run that is resumed begins where it was. Logs are said by others."""

    training_bar: Any
    prediction_bar: Any

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """As in Transformers, from the step on that the run goes on from."""
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            bar = self.training_bar
            bar.initial = bar.n = bar.last_print_n = self.current_step = state.global_step
            bar.refresh()

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Nothing."""

    def close(self) -> None:
        """End the line of each bar, of a run that failed too."""
        for bar in (self.training_bar, self.prediction_bar):
            if bar is not None:
                bar.close()
        self.training_bar = self.prediction_bar = None


class LogCallback(TrainerCallback):
    """Hands losses, rates and metrics on as they come, in the first process.

    Args:
        on_log: receives them; None for nobody.
    """

    def __init__(self, on_log: Callable[[dict[str, float]], None] | None):
        self._on_log = on_log

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """See the class."""
        if self._on_log is not None and state.is_world_process_zero:
            self._on_log(logs)
