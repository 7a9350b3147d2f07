"""Makes what a study lacks, several processes at a time.

::

    <output>/
    ├── study.json     what was asked for; at the end every run with its scores
    ├── data/          appears whole
    ├── runs/<run>-seed<n>/{job.json, run/, result.json, log.txt}
    └── table.md, plot.svg, README.md      see report.py
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import muco
from muco.errors import MucoError, OutputError
from muco.evaluate.report import write_json
from muco.progress import progress_bar
from muco.study.design import Study, checked_scale, folder_of, recipe_of

POLL = 0.2  # seconds
TAIL = 2000  # characters of a failed run's log that are shown


def run_study(study: Study, output: Path, *, seeds: int = 3, scale: float = 1.0, jobs: int = 1) -> dict[str, Any]:
    """Trains and scores all runs of a study, but for those that are there.

    Args:
        seeds: How many, from 0 on.
        scale: Of data and steps; 0.1 is a tenth of both, to try it out.
        jobs: Runs at a time; they share the cores.
    Returns:
        What ``study.json`` holds: ``asked`` and ``runs``, each with name, seed and result.
    Raises:
        OutputError: If the folder holds another study, or anything else.
        MucoError: If a run fails; what it last said is in the message, and the whole in its ``log.txt``.
    """
    if seeds < 1 or jobs < 1:
        raise MucoError(f"--seeds is {seeds} and --jobs {jobs}; give at least 1 of both")
    asked = {"study": study.name, "scale": checked_scale(scale), "muco": muco.__version__}
    _claim(output, asked)
    _make_data(study, output, scale)
    todo = [(run.name, seed) for seed in range(seeds) for run in study.runs]
    _make_runs(study, output, scale, todo, jobs)
    results = [
        {"name": name, "seed": seed, "result": _result(folder_of(output, name, seed)) or {}} for name, seed in todo
    ]
    found = {"asked": asked | {"seeds": seeds}, "runs": results}
    write_json(output / "study.json", found)
    return found


def _claim(output: Path, asked: dict[str, Any]) -> None:
    file = output / "study.json"
    if file.is_file():
        known = json.loads(file.read_text(encoding="utf-8"))["asked"]
        differing = [f"{key} {known.get(key)}, now {value}" for key, value in asked.items() if known.get(key) != value]
        if differing:
            raise OutputError(f"{output} holds another study ({', '.join(differing)}); choose another output folder")
        return
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise OutputError(f"{output} is not empty and holds no study; choose another output folder")
    output.mkdir(parents=True, exist_ok=True)
    write_json(file, {"asked": asked, "runs": []})


def _make_data(study: Study, output: Path, scale: float) -> None:
    final, part = output / "data", output / "data.part"
    if final.exists():
        return
    shutil.rmtree(part, ignore_errors=True)
    study.prepare(part, scale)
    os.replace(part, final)


def _make_runs(study: Study, output: Path, scale: float, todo: Sequence[tuple[str, int]], jobs: int) -> None:
    """Starts a run as soon as the one it goes on from is done and there is room; the first that fails stops all."""
    by_name = {run.name: run for run in study.runs}
    waiting, going = list(todo), dict[tuple[str, int], subprocess.Popen]()
    with progress_bar(study.name) as progress:
        try:
            while waiting or going:
                for key in [key for key, process in going.items() if process.poll() is not None]:
                    _check(folder_of(output, *key), going.pop(key))
                undone = {*waiting, *going}
                ready = [key for key in waiting if (by_name[key[0]].start, key[1]) not in undone]
                for name, seed in ready[: jobs - len(going)]:
                    waiting.remove((name, seed))
                    run = by_name[name]
                    test = (run.test or study.test).replace("{data}", str(output / "data"))
                    job = {"recipe": recipe_of(study, run, seed, scale, output), "test": test}
                    if process := _start(folder_of(output, name, seed), job, jobs):
                        going[name, seed] = process
                progress(len(todo) - len(waiting) - len(going), len(todo))
                time.sleep(POLL)
        finally:
            for process in going.values():
                process.terminate()
            for process in going.values():
                process.wait()


def _start(folder: Path, job: dict[str, Any], jobs: int) -> subprocess.Popen | None:
    """The process of a run; None if its result is there."""
    known = _result(folder)
    if known is not None and known["job"] == job:
        return None
    if known is not None:
        raise OutputError(f"{folder} is a run of another recipe; choose another output folder, or delete it")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "job.json", job)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, cores // jobs))}
    with (folder / "log.txt").open("a", encoding="utf-8") as log:
        command = [sys.executable, "-m", "muco.study.one", str(folder)]
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL)


def _result(folder: Path) -> dict[str, Any] | None:
    file = folder / "result.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def _check(folder: Path, process: subprocess.Popen) -> None:
    if process.returncode:
        said = (folder / "log.txt").read_text(encoding="utf-8", errors="replace")[-TAIL:]
        raise MucoError(f"the run {folder.name} failed (exit code {process.returncode}), see its log.txt: {said}")
