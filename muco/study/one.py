"""One training of a study and its scores: ``python -m muco.study.one FOLDER``, which holds a ``job.json``.

A process of its own, so that runs share nothing and several can run side by side. After a kill it resumes from its last
checkpoint; ``result.json`` appears when all is done.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

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
from muco.training.mixture import open_sources
from muco.training.recipe import Recipe, from_dict
from muco.training.trainer import make_trainer, train


def run_job(folder: Path) -> dict[str, Any]:
    """Trains and scores what ``job.json`` says; returns and writes the result.

    The job holds ``recipe``; ``test`` and, where it is not jsonl, its ``format``; and names of ``probes``.
    """
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    recipe = from_dict(job["recipe"])
    whole = not (folder / "run" / "checkpoints").exists()  # else some of the training was done, and timed, before
    begun = time.perf_counter()
    model_folder = train(recipe)
    seconds = time.perf_counter() - begun
    model, test = load(model_folder), open_data(job["test"], job.get("format", "jsonl"))
    scores = evaluate_retrieval(model, test)
    add_blind_loss(scores, model, test, recipe)
    probed = {
        name: value for probe in job.get("probes", ()) for name, value in PROBES[probe](model, test, recipe).items()
    }
    run = json.loads((model_folder / RUN_FILE).read_text(encoding="utf-8"))
    result = {
        "job": job,
        "scores": flat_scores(scores) | {"loss": run["loss"][-1][1] if run["loss"] else None} | probed,
        "steps": run["steps"],
        "flops": flops_of(recipe),
        "loss": run["loss"],
        "seconds": round(seconds, 1) if whole else None,
        "threads": torch.get_num_threads(),
        "warnings": scores["warnings"],
        "versions": versions(),
    }
    write_json(folder / "result.json", result)
    return result


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


def flops_of(recipe: Recipe) -> int:
    """Floating-point operations of a run: those of its first step, forward and backward, times its steps."""
    sources = open_sources(recipe)
    model = build_model(recipe, sources)
    trainer = make_trainer(recipe, model, sources)
    return step_flops(model, trainer.batches[0], temperature=recipe.loss.temperature).total * trainer.args.max_steps


if __name__ == "__main__":
    run_job(Path(sys.argv[1]))
