"""The trainer's callbacks: the record of samples, progress on the screen, TensorBoard, the token budget, and scores."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from sentence_transformers.base.evaluation import BaseEvaluator
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import ExportableState

from muco import distributed
from muco.base.files import write_text, writing
from muco.base.text import escaped
from muco.data.source import Data
from muco.errors import TrainingError
from muco.evaluate.retrieval import Scoring, score_tasks
from muco.model import Model

FEW = 10  # samples that cannot be used never stop a run, whatever their share


class Record(TrainerCallback, ExportableState):
    """Counts samples, those that could not be used, and turns left out as duplicates; checkpoints keep the counts.

    Args:
        output: The run's folder; every sample that is left out gets a line in its ``skipped-<process>.jsonl``.
        max_broken: The share of samples that may be left out.
    """

    def __init__(self, output: Path, max_broken: float) -> None:
        self.file, self.max_broken = output / f"skipped-{distributed.rank()}.jsonl", max_broken
        self.own = {"samples": 0, "skipped": 0, "left_out_turns": 0}  # of this process since it began
        self.before = dict(self.own)  # of all processes, in the checkpoint that was resumed
        self.total = dict(self.own)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Removes what a killed run listed after its last checkpoint: those steps are made again."""
        if self.file.exists():
            lines = self.file.read_text(encoding="utf-8").splitlines()
            write_text(self.file, "".join(f"{line}\n" for line in lines if _step(line) < state.global_step))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Has the last step logged, so that a short run has a loss too."""
        control.should_log = control.should_log or state.global_step >= state.max_steps

    def add(self, part: Mapping[str, Any]) -> None:
        """Counts an item of ``TrainingBatches``; a TrainingError if more than ``FEW`` and than the share is broken."""
        skipped = part["skipped"]
        self.own["samples"] += len(part["places"]) + len(skipped)
        self.own["skipped"] += len(skipped)
        self.own["left_out_turns"] += part["left_out"]
        if not skipped:
            return
        with writing(self.file), self.file.open("a", encoding="utf-8") as file:
            file.writelines(escaped(json.dumps(row, ensure_ascii=False)) + "\n" for row in skipped)
        broken, samples = self.own["skipped"], self.own["samples"]
        if broken > max(FEW, self.max_broken * samples):
            raise TrainingError(
                f"{broken} of {samples} samples could not be used, more than data.max_broken: {self.max_broken:g} "
                f"allows; they are listed in {self.file}, the last one: {skipped[-1]['reason']}"
            )

    def gather(self) -> dict[str, int]:
        """The counts of all processes; all must call it."""
        shares = distributed.gather_objects(self.own)
        self.total = {key: before + sum(share[key] for share in shares) for key, before in self.before.items()}
        return self.total

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": self.total}

    def resume(self, counts: Mapping[str, int]) -> None:
        """Continues from the counts of a checkpoint."""
        self.before = {key: counts[key] for key in self.own}


def _step(line: str) -> float:
    """The step of a line; infinity for a line that a kill cut off."""
    try:
        return json.loads(line)["step"]
    except json.JSONDecodeError:
        return math.inf


class ScreenProgress(TrainerCallback):
    """Shows a rich bar on a terminal; elsewhere prints one line per log step. Always on stderr."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.console = Console(stderr=True)
        self.bar: Progress | None = None
        self.started, self.first = 0.0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started, self.first = time.monotonic(), state.global_step
        if not self.console.is_terminal:
            return
        columns = (BarColumn(), MofNCompleteColumn(), "{task.fields[status]}", TimeRemainingColumn())
        self.bar = Progress("training", *columns, console=self.console)
        self.task = self.bar.add_task("training", total=state.max_steps, completed=state.global_step, status="")
        self.bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar:
            self.bar.update(self.task, completed=state.global_step)
        elif self.first + 1 == state.global_step < state.max_steps:  # the first log may be minutes away
            seconds, left = time.monotonic() - self.started, state.max_steps - state.global_step
            rest = timedelta(seconds=round(seconds * left))
            self.console.print(
                f"step {state.global_step}/{state.max_steps}  {seconds:.2f} s; about {rest} left", highlight=False
            )

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        status = self._status(state, logs or {})
        if status and self.bar:
            self.bar.update(self.task, status=status)
        elif status:
            self.console.print(f"step {state.global_step}/{state.max_steps}  {status}", highlight=False)

    def _status(self, state: Any, logs: dict[str, Any]) -> str:
        if "loss" in logs:
            speed = (time.monotonic() - self.started) / max(1, state.global_step - self.first)
            text = f"loss {float(logs['loss']):.3f}  lr {float(logs['learning_rate']):.1e}  {speed:.2f} s/step"
            if torch.cuda.is_available():
                text += f"  {logs['peak_memory_gib']:.1f} GiB on the GPU"
            text += f"  {logs['host_memory_gib']:.1f} GiB of host memory"
            skipped = self.record.own["skipped"]
            return text + (f"  {skipped} samples skipped" if skipped else "")
        scores = [f"{k.removeprefix('eval_')} {v:.3f}" for k, v in logs.items() if k.endswith("hit@1")]
        return "  ".join(scores[:4])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar:
            self.bar.stop()
            self.bar = None


class TensorBoardLog(TensorBoardCallback):
    """transformers' own, in a folder of ours; a log that cannot be written is an OutputError."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.logging_dir = str(folder)

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


class TokenBudget(TrainerCallback, ExportableState):
    """The token budget in use; where memory ran out it is smaller than the recipe's, and checkpoints keep it so."""

    def __init__(self, tokens: int | None) -> None:
        self.asked = self.tokens = tokens

    def state(self) -> dict[str, Any]:
        return {"args": {"tokens": self.asked}, "attributes": {"tokens": self.tokens}}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Takes the budget of a checkpoint, unless the recipe asks for another one now."""
        asked, own = state["args"]["tokens"], state["attributes"].get("tokens")
        if "tokens" not in state["attributes"]:  # of an older version, which kept the smaller budget alone
            self.tokens = asked if self.asked is None or (asked or self.asked) < self.asked else self.asked
        elif asked == self.asked:
            self.tokens = own

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Lets a resumed run log, save and evaluate as its recipe says now, not as the checkpoint does."""
        state.compute_steps(args, state.max_steps)


class RetrievalEvaluator(BaseEvaluator):
    """Scores the model on a few samples; the trainer logs the scores as ``eval_image_to_caption_hit@1`` and so on.

    It caches nothing, because the weights change between calls. It draws no random number and writes no file, so that
    training continues as if uninterrupted.

    Args:
        data: Samples that are not trained on.
        options: Of :class:`muco.evaluate.retrieval.Scoring`.
    """

    def __init__(self, data: Data, **options: Any) -> None:
        super().__init__()
        self.data, self.scoring = data, Scoring(**options)

    def __call__(
        self, model: Model, output_path: str | None = None, epoch: float = -1, steps: int = -1
    ) -> dict[str, float]:
        """hit@1, hit@10 and MRR of every task (0 to 1), but for those that any model reaches; ``collapsed``: 1 if the
        vectors are one point or not finite.

        The primary metric is hit@1 of image_to_caption, else of answer, else of the first task that the data has.
        """
        result = score_tasks(model, self.data, self.scoring)
        metrics = {"collapsed": float(result["collapsed"])}
        for name, scores in result["tasks"].items():
            scores = scores.get("mean", scores)
            found = {f"{name}_{metric}": scores[metric] for metric in ("hit@1", "hit@10", "mrr")}
            metrics |= {metric: score for metric, score in found.items() if score is not None}
        first = next(name for name in ("image_to_caption", "answer", *result["tasks"]) if name in result["tasks"])
        self.primary_metric = f"{first}_hit@1"
        self.store_metrics_in_model_card_data(model, metrics, epoch, steps)
        return metrics
