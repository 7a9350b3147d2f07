"""What a person sees during training: a bar with loss, learning rate and speed, or plain lines in a log file."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback


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
