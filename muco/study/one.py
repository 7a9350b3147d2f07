"""One training of a study and its scores, or the cost of steps: ``python -m muco.study.one FOLDER`` with ``job.json``.

A process of its own, so that runs share nothing and several can run side by side. After a kill it resumes from its last
checkpoint; ``result.json`` appears when all is done.
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
from muco.base.machine import versions
from muco.data import open_data
from muco.evaluate.retrieval import evaluate_retrieval
from muco.model import load
from muco.study.probes import PROBES
from muco.training.blind import add_blind_loss
from muco.training.build import build_model
from muco.training.flops import step_flops
from muco.training.folder import RUN_FILE
from muco.training.loop import MuCoTrainer
from muco.training.mixture import open_sources
from muco.training.recipe import from_dict
from muco.training.trainer import make_trainer, train


def run_job(folder: Path) -> dict[str, Any]:
    """Does what ``job.json`` says, returns the result and writes it to ``result.json``."""
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    result = calibrate(job, folder) if "rounds" in job else train_and_score(job, folder)
    write_json(folder / "result.json", result)
    return result


def train_and_score(job: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Trains and scores one run.

    Args:
        job: ``recipe``; ``test`` and, where it is not jsonl, its ``format``; and names of ``probes``.
    """
    recipe = from_dict(job["recipe"])
    whole = not (folder / "run" / "checkpoints").exists()  # else some of the training was done, and timed, before
    begun = time.perf_counter()
    model_folder = train(recipe)
    seconds = time.perf_counter() - begun
    model, test = load(model_folder), open_data(job["test"], job.get("format", "jsonl"))
    scores = evaluate_retrieval(model, test)
    add_blind_loss(scores, model, test, recipe)
    probed: dict[str, float] = {}
    for probe in job.get("probes", ()):
        probed |= PROBES[probe](model, test, recipe)
    run = json.loads((model_folder / RUN_FILE).read_text(encoding="utf-8"))
    sources = open_sources(recipe)
    trainer = make_trainer(recipe, build_model(recipe, sources), sources)
    step = step_flops(trainer.model, trainer.batches[0], temperature=recipe.loss.temperature)  # the first
    return {
        "job": job,
        "scores": flat_scores(scores) | {"loss": run["loss"][-1][1] if run["loss"] else None} | probed,
        "steps": run["steps"],
        "flops": step.total * trainer.args.max_steps,
        "loss": run["loss"],
        "seconds": round(seconds, 1) if whole else None,
        "threads": torch.get_num_threads(),
        "warnings": scores["warnings"],
        "versions": versions(),
    }


def flat_scores(result: Mapping[str, Any]) -> dict[str, float]:
    """hit@1 by name: ``task``, also the mean of its kinds, and ``task/kind``; and ``blind_loss`` in nats."""
    scores: dict[str, float] = {}
    for task, found in result["tasks"].items():
        if "kinds" in found:
            scores |= {f"{task}/{kind}": values["hit@1"] for kind, values in found["kinds"].items()}
            scores[task] = found["mean"]["hit@1"]
        else:
            scores[task] = found["hit@1"]
    if result.get("blind_loss"):
        scores["blind_loss"] = result["blind_loss"]["loss"]
    return scores


# ── the cost of a step ────────────────────────────────────────────────────────────────────────────────────────────────

UNTIMED, TIMED = 3, 12  # steps of a round


class _Clock(TrainerCallback):
    """Takes the time at the end of every step."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():  # which has the step's work queued only
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def calibrate(job: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Takes the cost of a step of every run, for runs of equal cost, which need to know it before they begin.

    A few real steps of each are made, with nothing beside. Other work of the machine only adds to a step's time, and
    comes and goes. So the runs take turns, several times over, and each step's quickest try counts.

    Args:
        job: ``rounds``, and by name the ``runs``: the ``recipe``, and that of the ``root`` whose model's shape it has.
        folder: Gets ``steps.json``, the seconds of all steps by run and round as they come.
    Returns:
        By run: ``pairs`` of a step, the mean over the steps; ``flops`` of the first one, forward and backward;
        ``seconds`` and ``spread``, see :func:`seconds_of`, from the end of a step to the end of the next, so that
        making the batch and the optimizer count; ``threads`` of torch.
    """
    runs = job["runs"]
    trainers = {name: _trainer(run, folder) for name, run in runs.items()}
    taken: dict[str, list[list[float]]] = {name: [] for name in runs}
    for _ in range(job["rounds"]):
        for name, trainer in trainers.items():
            taken[name].append(_seconds(trainer))
            write_json(folder / "steps.json", taken)
    shutil.rmtree(folder / "run", ignore_errors=True)
    result = {}
    for name, trainer in trainers.items():
        batches, temperature = trainer.batches, from_dict(runs[name]["recipe"]).loss.temperature
        result[name] = {
            "pairs": statistics.mean(len(batches[step]["ids"]) for step in range(UNTIMED)),
            "flops": step_flops(trainer.model, batches[0], temperature=temperature).total,
            "threads": torch.get_num_threads(),
            **seconds_of(taken[name]),
        }
    return result


def seconds_of(rounds: Sequence[Sequence[float]]) -> dict[str, float]:
    """A step's ``seconds``: the mean over the steps of the quickest of a step's tries; every round has the same steps.

    ``spread`` is how much longer the slowest round took than the quickest, as a share of that: near 0 on a machine that
    does nothing else.
    """
    quickest, means = [min(tries) for tries in zip(*rounds, strict=True)], [statistics.mean(each) for each in rounds]
    return {"seconds": statistics.mean(quickest), "spread": max(means) / min(means) - 1}


def _trainer(run: Mapping[str, Any], folder: Path) -> MuCoTrainer:
    """Of a few steps that leave nothing behind, from a model of the right shape: weights cost no time."""
    values = run["recipe"]
    steps = {"max_steps": UNTIMED + TIMED, "warmup_steps": UNTIMED, "save_strategy": "no"}
    recipe = from_dict({**values, "output": str(folder / "run"), "trainer": {**values["trainer"], **steps}})
    root = from_dict(run["root"])
    set_seed(recipe.seed)
    model = build_model(root, open_sources(root))  # the one that the run starts from need not be there yet
    if recipe.model.vision == "frozen":
        freeze_vision(model.encoder.model)
    return make_trainer(recipe, model, open_sources(recipe))


def _seconds(trainer: MuCoTrainer) -> list[float]:
    """Of each timed step of a training from its beginning."""
    clock = _Clock()
    trainer.add_callback(clock)
    trainer.train()
    trainer.remove_callback(clock)
    ends = clock.ends[UNTIMED - 1 :]
    return [b - a for a, b in zip(ends, ends[1:], strict=False)]


if __name__ == "__main__":
    run_job(Path(sys.argv[1]))
