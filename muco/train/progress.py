"""What a person sees during training: a bar with loss, learning rate and speed, or plain lines in a log file.

And TensorBoard's log, whose thread must not print what the run's own error says.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from muco.base.files import writing


class ScreenProgress(TrainerCallback):
    """Shows a rich bar on a terminal; elsewhere prints one line per log step. Always on stderr."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.console = Console(stderr=True)
        self.bar: Progress | None = None
        self.started = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started, self.first = time.monotonic(), state.global_step
        if not self.console.is_terminal:
            return
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[status]}"), TimeRemainingColumn())
        self.bar = Progress(TextColumn("training"), *columns, console=self.console)
        self.task = self.bar.add_task("training", total=state.max_steps, completed=state.global_step, status="")
        self.bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        status = self._status(state, logs or {})
        if not status:
            return
        if self.bar:
            self.bar.update(self.task, status=status)
        else:
            self.console.print(f"step {state.global_step}/{state.max_steps}  {status}", highlight=False)

    def _status(self, state: Any, logs: dict[str, Any]) -> str:
        if "loss" in logs:
            speed = (time.monotonic() - self.started) / max(1, state.global_step - self.first)
            text = f"loss {float(logs['loss']):.3f}  lr {float(logs['learning_rate']):.1e}  {speed:.2f} s/step"
            skipped = self.trainer.record.own["skipped"]
            return text + (f"  {skipped} samples skipped" if skipped else "")
        scores = [f"{k.removeprefix('eval_')} {v:.3f}" for k, v in logs.items() if "hit@1" in k]
        return "  ".join(scores[:4])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar:
            self.bar.stop()
            self.bar = None


class TensorBoardLog(TensorBoardCallback):
    """transformers' own; a log that cannot be written is an OutputError."""

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        with writing(self.logging_dir):
            super().on_train_begin(*args, **kwargs)

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        with writing(self.logging_dir):
            super().on_log(*args, **kwargs)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        with writing(self.logging_dir):
            super().on_train_end(*args, **kwargs)


@contextmanager
def told_once() -> Iterator[None]:
    """Keeps TensorBoard's thread from printing the error that the run ends with."""
    usual = threading.excepthook

    def hook(args: Any) -> None:
        if type(args.thread).__module__.partition(".")[0] != "tensorboard":
            usual(args)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = usual
