"""What a step of each run costs: ``python -m muco.study.calibrate FOLDER``, which holds a ``job.json``.

Runs of equal cost need to know it before they begin. So the study makes a few real steps of each of them, with nothing
beside, and keeps the numbers: a study that is resumed uses those it began with. Other work of the machine only adds to
a step's time, and comes and goes. So the runs take turns, several times over, and each step's quickest try counts.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, set_seed

from muco.backbone import freeze_vision
from muco.base.files import write_json
from muco.model import Model
from muco.training.build import build_model
from muco.training.flops import step_flops
from muco.training.loop import MuCoTrainer
from muco.training.mixture import open_sources
from muco.training.recipe import Recipe, from_dict
from muco.training.trainer import make_trainer

UNTIMED, TIMED = 3, 12  # steps of a round


class _Clock(TrainerCallback):
    """Takes the time at the end of every step."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():  # which has the step's work queued only
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def calibrate(folder: Path) -> dict[str, Any]:
    """Takes the cost of a step of every run.

    ``job.json`` holds ``rounds``, and by name the ``runs``: the ``recipe``, and that of the ``root`` whose model's
    shape it has. ``steps.json`` gets the seconds of all steps by run and round as they come, ``result.json`` what is
    returned.

    Returns:
        By run: ``pairs`` of a step, the mean over the steps; ``flops`` of the first one, forward and backward;
        ``seconds`` and ``spread``, see :func:`seconds_of`, from the end of a step to the end of the next, so that
        making the batch and the optimizer count; ``threads`` of torch.
    """
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    runs = job["runs"]
    trainers = {name: _trainer(run, folder) for name, run in runs.items()}
    taken: dict[str, list[list[float]]] = {name: [] for name in runs}
    for _ in range(job["rounds"]):
        for name, trainer in trainers.items():
            taken[name].append(_seconds(trainer))
            write_json(folder / "steps.json", taken)
    result = {name: _pairs_and_flops(trainers[name], run) | seconds_of(taken[name]) for name, run in runs.items()}
    shutil.rmtree(folder / "run", ignore_errors=True)
    write_json(folder / "result.json", result)
    return result


def seconds_of(rounds: Sequence[Sequence[float]]) -> dict[str, float]:
    """A step's ``seconds``: the mean over the steps of the quickest of a step's tries; every round has the same steps.

    ``spread`` is how much longer the slowest round took than the quickest, as a share of that: near 0 on a machine that
    does nothing else.
    """
    quickest, means = [min(tries) for tries in zip(*rounds, strict=True)], [statistics.mean(each) for each in rounds]
    return {"seconds": statistics.mean(quickest), "spread": max(means) / min(means) - 1}


def _trainer(run: Mapping[str, Any], folder: Path) -> MuCoTrainer:
    recipe = from_dict(_short(run["recipe"], folder))
    set_seed(recipe.seed)
    return make_trainer(recipe, _model_of(recipe, from_dict(run["root"])), open_sources(recipe))


def _seconds(trainer: MuCoTrainer) -> list[float]:
    """Of each timed step of a training from its beginning."""
    clock = _Clock()
    trainer.add_callback(clock)
    trainer.train()
    trainer.remove_callback(clock)
    ends = clock.ends[UNTIMED - 1 :]
    return [b - a for a, b in zip(ends, ends[1:], strict=False)]


def _pairs_and_flops(trainer: MuCoTrainer, run: Mapping[str, Any]) -> dict[str, Any]:
    batches, temperature = trainer.batches, from_dict(run["recipe"]).loss.temperature
    return {
        "pairs": statistics.mean(len(batches[step]["ids"]) for step in range(UNTIMED)),
        "flops": step_flops(trainer.model, batches[0], temperature=temperature).total,
        "threads": torch.get_num_threads(),
    }


def _short(values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The recipe for a few steps that leave nothing behind."""
    steps = {"max_steps": UNTIMED + TIMED, "warmup_steps": UNTIMED, "save_strategy": "no"}
    return {**values, "output": str(folder / "run"), "trainer": {**values["trainer"], **steps}}


def _model_of(recipe: Recipe, root: Recipe) -> Model:
    """A model of the right shape; the one that a run starts from need not be there yet, and weights cost no time."""
    model = build_model(root, open_sources(root))
    if recipe.model.vision == "frozen":
        freeze_vision(model.encoder.model)
    return model


if __name__ == "__main__":
    calibrate(Path(sys.argv[1]))
