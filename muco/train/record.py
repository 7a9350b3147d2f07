"""What a run used of its data and what it left out: counted, named in a file, and too much of it stops the run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from muco import distributed
from muco.base.files import write_text, writing
from muco.base.text import escaped
from muco.errors import TrainingError

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
        self.before = dict(self.own)  # of all processes, in the checkpoint that was gone on from
        self.total = dict(self.own)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forgets what a killed run listed after its last checkpoint: those steps are made again."""
        if self.file.exists():
            lines = [
                line for line in self.file.read_text(encoding="utf-8").splitlines() if _step(line) < state.global_step
            ]
            write_text(self.file, "".join(f"{line}\n" for line in lines))

    def add(self, part: Mapping[str, Any]) -> None:
        """Counts an item of :class:`muco.train.batches.TrainingBatches`.

        Raises:
            TrainingError: If more than ``FEW`` samples and more than the stated share could not be used.
        """
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

    def go_on(self, counts: Mapping[str, int]) -> None:
        """From the counts of a checkpoint."""
        self.before = {key: counts[key] for key in self.own}


def _step(line: str) -> float:
    """The step of a line; that of one which was cut off by a kill is never reached."""
    try:
        return json.loads(line)["step"]
    except json.JSONDecodeError:
        return math.inf
