# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""What a run shows: a bar on the terminal, and its logs for whoever asks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback


@contextmanager
def shown_progress(trainer: Trainer, on_log: Callable[[dict[str, float]], None] | None) -> Iterator[None]:
    """Show the steps of a trainer as a bar, and pass its logs on, instead of printing both.

    Args:
        trainer: trainer of the run; `disable_tqdm` of its arguments leaves out the bar.
        on_log: function that receives the logs in the first process; None for nobody.
    """
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    bar = StepsProgress()
    if not trainer.args.disable_tqdm:
        trainer.add_callback(bar)
    trainer.add_callback(LogCallback(on_log))
    try:
        yield
    finally:
        bar.close()


class StepsProgress(ProgressCallback):
    """Bar of the steps with the time left; that of a resumed run begins where the run was. It shows no logs."""

    training_bar: Any
    prediction_bar: Any

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """As in Transformers, from the step on at which the run is resumed."""
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            bar = self.training_bar
            bar.initial = bar.n = bar.last_print_n = self.current_step = state.global_step
            bar.refresh()

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Nothing."""

    def close(self) -> None:
        """End the line of each bar, also after an error."""
        for bar in (self.training_bar, self.prediction_bar):
            if bar is not None:
                bar.close()
        self.training_bar = self.prediction_bar = None


class LogCallback(TrainerCallback):
    """Passes losses, rates and metrics on as they come, in the first process.

    Args:
        on_log: function that receives them; None for nobody.
    """

    def __init__(self, on_log: Callable[[dict[str, float]], None] | None):
        self._on_log = on_log

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """See the class."""
        if self._on_log is not None and state.is_world_process_zero:
            self._on_log(logs)
