"""One training of a study and its scores, or the cost of steps: ``python -m muco.study.one FOLDER`` with ``job.json``.

A process of its own, so that several can run side by side. After a kill it resumes from its last checkpoint;
``result.json`` appears at the end.
"""

from __future__ import annotations

import os
import shutil
import signal
import statistics
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback, set_seed

from muco.backbone import freeze_vision
from muco.base.files import read_json, write_json
from muco.base.machine import keep_freed_memory, machine, versions
from muco.data import open_data
from muco.evaluate.retrieval import evaluate_retrieval
from muco.model import load
from muco.seen import IMAGE_MEMORY
from muco.study.probes import PROBES
from muco.training.blind import add_blind_loss
from muco.training.build import build_model
from muco.training.callbacks import RetrievalEvaluator
from muco.training.flops import step_flops
from muco.training.folder import RUN_FILE
from muco.training.loop import MuCoTrainer
from muco.training.mixture import open_sources
from muco.training.recipe import from_dict
from muco.training.trainer import make_trainer, train


def run_job(folder: Path) -> dict[str, Any]:
    """Does the job in ``job.json``, writes the result to ``result.json`` and returns it."""
    job = read_json(folder / "job.json")
    result = calibrate(job["measure"], folder) if "measure" in job else train_and_score(job, folder)
    write_json(folder / "result.json", result)
    return result


def train_and_score(job: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Trains and scores one run.

    Args:
        job: ``recipe``, ``test`` and its ``format``, names of ``probes``, and the score of the ``curve``.
    """
    recipe = from_dict(job["recipe"])
    whole = not (folder / "run" / "checkpoints").exists()  # else earlier seconds of the training are unknown
    begun = time.perf_counter()
    model_folder = train(recipe)
    seconds = time.perf_counter() - begun
    model, test = load(model_folder, image_memory=IMAGE_MEMORY), open_data(job["test"], job.get("format", "jsonl"))
    scores = evaluate_retrieval(model, test)
    add_blind_loss(scores, model, test, recipe)
    probed: dict[str, float] = {}
    for probe in job.get("probes", ()):
        probed |= PROBES[probe](model, test, recipe)
    run = read_json(model_folder / RUN_FILE)
    flat, curve = flat_scores(scores), []
    if name := job.get("curve"):
        on_the_way = [[step, each[name]] for step, each in run["scores"] if step < run["steps"]]
        curve = [*on_the_way, [run["steps"], flat[name]]]
        flat |= of_curve(curve)
    sources = open_sources(recipe)
    unscored = replace(recipe, trainer={**recipe.trainer, "eval_strategy": "no"})
    trainer = make_trainer(unscored, build_model(recipe, sources), sources)
    step = step_flops(trainer.model, trainer.batches[0], temperature=recipe.loss.temperature)  # the first
    return {
        "job": job,
        "scores": flat | {"loss": run["loss"][-1][1] if run["loss"] else None} | probed,
        "curve": curve,
        "steps": run["steps"],
        "flops": step.total * trainer.args.max_steps,
        "loss": run["loss"],
        "seconds": round(seconds, 1) if whole else None,
        "warnings": scores["warnings"],
        "machine": machine(),
        "versions": versions(),
    }


def flat_scores(result: Mapping[str, Any]) -> dict[str, float]:
    """hit@1 by name: ``task``, or the mean of its kinds, and ``task/kind``; hit@10 as ``task@10``; ``blind_loss``."""
    scores: dict[str, float] = {}
    for task, found in result["tasks"].items():
        scores |= {f"{task}/{kind}": values["hit@1"] for kind, values in found.get("kinds", {}).items()}
        scores[task], scores[f"{task}@10"] = (found.get("mean", found)[f"hit@{k}"] for k in (1, 10))
    if result.get("blind_loss"):
        scores["blind_loss"] = result["blind_loss"]["loss"]
    return scores


def of_curve(curve: Sequence[tuple[int, float]]) -> dict[str, float]:
    """``quarter``: the score after a quarter of the steps; ``plateau``: its mean over the last quarter; ``rise``:
    by how much that is above the mean over the quarter before.

    ``curve``: steps and scores, from the first score to the end; between them it is straight.
    """
    steps, scores = np.array(curve, dtype=float).T
    third, last = (
        np.interp(steps[-1] * np.linspace(start, start + 0.25, 26), steps, scores).mean() for start in (0.5, 0.75)
    )
    quarter = np.interp(steps[-1] / 4, steps, scores)
    return {"quarter": float(quarter), "plateau": float(last), "rise": float(last - third)}


LONG = 20.0  # seconds after which a round has enough steps
LEAST = 3  # timed steps of a round, however long they are


class _Clock(TrainerCallback):
    """Records the time at the end of every step; stops after ``steps`` timed ones, or by itself where they are long.

    The first ``untimed`` steps do not count.
    """

    def __init__(self, untimed: int, steps: int | None) -> None:
        self.ends: list[float] = []
        self.untimed, self.steps = untimed, steps

    @property
    def taken(self) -> list[float]:
        """Seconds of each timed step."""
        return [after - before for before, after in pairwise(self.ends[self.untimed - 1 :])]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():  # so far it has only queued the step's work
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        timed = len(self.ends) - self.untimed
        long = timed >= LEAST and self.ends[-1] - self.ends[self.untimed - 1] > LONG
        control.should_training_stop |= long if self.steps is None else timed >= self.steps


def calibrate(runs: Mapping[str, Mapping[str, Any]], folder: Path) -> dict[str, Any]:
    """Measures the cost of a step of every run.

    Makes a few real steps of each, with nothing beside. Other work of the machine only adds to a step's time, and comes
    and goes. So the runs take turns for several rounds, and the fastest time of each step counts. ``steps.json`` in the
    folder has the seconds of all steps by run and round as they come.

    Args:
        runs: By name the ``recipe``, that of the ``root`` with a model of its shape, and the ``test`` set; the number
            of ``rounds`` and the timed ``steps`` of each, of which as many are made as fit in :data:`LONG` seconds,
            after ``untimed`` ones.
    Returns:
        By run: mean ``pairs`` of a step; ``flops`` of the first one, forward and backward, where there are several
        rounds; ``threads`` of torch;
        ``seconds`` and ``spread``, see :func:`seconds_of`, from the end of one step, batch and optimizer included, to
        that of the next; the seconds of ``scoring`` once.
    """
    trainers = {name: _trainer(run, folder) for name, run in runs.items()}
    taken: dict[str, list[list[float]]] = {name: [] for name in runs}
    for number in range(max(run["rounds"] for run in runs.values())):
        for name, trainer in trainers.items():
            if number < runs[name]["rounds"]:
                clock = _Clock(runs[name]["untimed"], len(taken[name][0]) if number else None)
                trainer.add_callback(clock)
                trainer.train()
                trainer.remove_callback(clock)
                taken[name].append(clock.taken)
                write_json(folder / "steps.json", taken)
    shutil.rmtree(folder / "run", ignore_errors=True)
    result, scoring = {}, dict[str, float]()  # by held-out set
    for name, trainer in trainers.items():
        batches, temperature = trainer.batches, from_dict(runs[name]["recipe"]).loss.temperature
        exact = runs[name]["rounds"] > 1
        if (test := runs[name]["test"]) not in scoring:
            scoring[test] = _seconds_of_scoring(trainer, runs[name])
        result[name] = {
            "pairs": statistics.mean(len(batches[step]["ids"]) for step in range(runs[name]["untimed"])),
            "flops": step_flops(trainer.model, batches[0], temperature=temperature).total if exact else None,
            "threads": torch.get_num_threads(),
            **seconds_of(taken[name]),
            "scoring": scoring[test],
        }
    return result


def seconds_of(rounds: Sequence[Sequence[float]]) -> dict[str, float]:
    """``seconds``: the mean over the steps, which all rounds have in common, of the fastest time of each.

    ``spread`` is how much longer the slowest round took than the fastest, as a share: near 0 on an idle machine.
    """
    quickest, means = [min(tries) for tries in zip(*rounds, strict=True)], [statistics.mean(each) for each in rounds]
    return {"seconds": statistics.mean(quickest), "spread": max(means) / min(means) - 1}


def _trainer(run: Mapping[str, Any], folder: Path) -> MuCoTrainer:
    """A trainer for a few steps that saves nothing, with a model of the right shape; its weights do not matter."""
    values = run["recipe"]
    steps = {
        "max_steps": run["untimed"] + run["steps"],
        "warmup_steps": run["untimed"],
        "save_strategy": "no",
        "eval_strategy": "no",
    }
    recipe = from_dict({**values, "output": str(folder / "run"), "trainer": {**values["trainer"], **steps}})
    root = from_dict(run["root"])
    set_seed(recipe.seed)
    model = build_model(root, open_sources(root))  # the model that the run starts from may not exist yet
    if recipe.model.vision == "frozen":
        freeze_vision(model.encoder.model)
    return make_trainer(recipe, model, open_sources(recipe))


def _seconds_of_scoring(trainer: MuCoTrainer, run: Mapping[str, Any]) -> float:
    test = open_data(run["test"], run.get("format", "jsonl"))
    begun = time.perf_counter()
    RetrievalEvaluator(test)(trainer.model.eval())
    return time.perf_counter() - begun


def _end_with_the_command() -> None:
    """Ends this process once the command that started it has ended, even by SIGKILL: its pipe closes then."""
    os.read(0, 1)  # not sys.stdin, which the end of the interpreter waits for
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    keep_freed_memory()
    threading.Thread(target=_end_with_the_command, daemon=True).start()
    run_job(Path(sys.argv[1]))
