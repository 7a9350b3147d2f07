"""What a step of a run costs: ``python -m muco.study.calibrate FOLDER``, which holds a ``job.json``.

Runs that shall cost the same need to know it before they begin. So the study makes a few true steps of each of them,
one run after the other with nothing beside, and keeps the numbers: a study that goes on uses those it began with.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, set_seed

from muco.backbone import freeze_vision
from muco.encoder import Model
from muco.evaluate.report import write_json
from muco.train.flops import step_flops
from muco.train.mixture import open_sources
from muco.train.recipe import Recipe, from_dict
from muco.train.trainer import build_model, make_trainer

UNTIMED, TIMED = 4, 16  # steps


class _Clock(TrainerCallback):
    """Takes the time at the end of every step."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())


def calibrate(folder: Path) -> dict[str, Any]:
    """Takes the cost of a step of what ``job.json`` says: ``recipe``, and ``root``, whose model it has the shape of.

    Returns and writes (``result.json``):
        ``pairs`` of a step, the mean over the steps; ``flops`` of the first one, forward and backward; ``seconds``, the
        median over ``TIMED`` steps, from the end of one to the end of the next, so that making the batch and the
        optimizer count; ``spread``, the range of the middle half of them over the median; ``threads`` of torch.
    """
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    recipe = from_dict(_short(job["recipe"], folder))
    sources = open_sources(recipe)
    set_seed(recipe.seed)
    trainer = make_trainer(recipe, _model_of(recipe, from_dict(job["root"])), sources)
    batches = trainer.batches
    clock = _Clock()
    trainer.add_callback(clock)
    trainer.train()
    ends = clock.ends[UNTIMED:]
    taken = [b - a for a, b in zip(ends, ends[1:], strict=False)]
    low, middle, high = statistics.quantiles(taken, n=4)
    result = {
        "pairs": statistics.mean(len(batches[step]["ids"]["sample_ids"]) for step in range(UNTIMED)),
        "flops": step_flops(trainer.model, batches[0], temperature=recipe.loss.temperature).total,
        "seconds": middle,
        "spread": (high - low) / middle,
        "threads": torch.get_num_threads(),
    }
    shutil.rmtree(folder / "run", ignore_errors=True)
    write_json(folder / "result.json", result)
    return result


def _short(values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The recipe for a few steps that leave nothing behind."""
    steps = {"max_steps": UNTIMED + TIMED + 1, "warmup_steps": UNTIMED, "save_strategy": "no"}
    return {**values, "output": str(folder / "run"), "trainer": {**values["trainer"], **steps}}


def _model_of(recipe: Recipe, root: Recipe) -> Model:
    """A model of the right shape; the one that a run starts from need not be there yet, and weights cost no time."""
    model = build_model(root, open_sources(root))
    if recipe.model.vision == "frozen":
        freeze_vision(model.encoder.model)
    return model


if __name__ == "__main__":
    calibrate(Path(sys.argv[1]))
