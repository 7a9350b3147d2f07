"""Makes the runs that a study lacks, several processes at a time.

::

    <output>/
    ├── study.json         the arguments; at the end every run with its scores
    ├── data/              the scenes, appears whole; absent if the user gave data
    ├── calibration.json   the cost of a step, for runs of equal cost; measured once
    ├── runs/<run>-seed<n>/{job.json, run/, result.json, log.txt}
    └── plot.svg, README.md   see report.py
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

from muco.base.files import claimed, earlier_record, read_json, write_json, writing
from muco.base.machine import VERSION, usable_cores
from muco.base.terminal import progress_bar
from muco.data import open_data
from muco.errors import MucoError, OutputError
from muco.study.design import Costs, Run, Sets, Study, filled, folder_of, recipe_of, root_of

POLL = 0.2  # seconds
ROUNDS, TIMED = 3, 12  # of every run, and steps of a round that are timed
UNSTEADY = 0.2  # spread of rounds that a quiet machine stays below
TAIL = 2000  # characters shown of a failed run's log


def run_study(
    study: Study,
    output: Path,
    *,
    seeds: int = 3,
    first_seed: int = 0,
    scale: float = 1.0,
    jobs: int = 1,
    sets: Sets | None = None,
) -> dict[str, Any]:
    """Trains and scores the runs of a study that have no result yet.

    Args:
        scale: Of data and steps; 0.1 is a tenth of both, to try it out.
        jobs: Runs at a time; they share the cores.
    Returns:
        The content of ``study.json``: ``asked``, ``runs``, each with name, seed and result, and ``costs`` of a step by
        run if some runs have equal costs.
    Raises:
        OutputError: If the folder holds another study, or anything else.
        MucoError: If the study needs scenes and ``sets`` are given, or a run fails: the message ends with the end of
            its ``log.txt``.
    """
    if seeds < 1 or jobs < 1 or first_seed < 0:
        raise MucoError(
            f"--seeds is {seeds}, --first-seed {first_seed} and --jobs {jobs}; pass at least 1 seed, a first seed of 0 "
            "or more, and at least 1 job"
        )
    if not 0 < scale <= 100:
        raise MucoError(f"--scale is {scale:g}; pass more than 0, e.g. 0.1 for a tenth of the steps and of the data")
    asked = {"study": study.name, "scale": scale, "muco": VERSION}
    asked |= {"data": sets.train, "test": sets.test, "format": sets.format} if sets else {"data": None}
    with claimed(output):
        if sets is not None:
            if study.needs_scenes:
                raise MucoError(f"the study {study.name} is made of the scenes' structure; leave out --data and --test")
            for path in (sets.train, sets.test):
                open_data(path, sets.format)
        if not earlier_record(output / "study.json", asked, "study"):
            write_json(output / "study.json", {"asked": asked, "runs": []})
        if sets is None:
            final, part = output / "data", output / "data.part"
            if not final.exists():
                shutil.rmtree(part, ignore_errors=True)
                with writing(final):
                    study.prepare(part, scale)
                    os.replace(part, final)
        costs = _costs(study, output, first_seed, jobs, scale, sets)
        todo = [(run.name, seed) for seed in range(first_seed, first_seed + seeds) for run in study.runs]
        _make(study, output, todo, jobs, costs, scale, sets)
        results = [{"name": key[0], "seed": key[1], "result": _result(folder_of(output, *key)) or {}} for key in todo]
        found = {"asked": asked | {"seeds": seeds, "first_seed": first_seed}, "runs": results}
        found |= {"costs": costs} if costs else {}
        write_json(output / "study.json", found)
        return found


def _costs(study: Study, output: Path, seed: int, jobs: int, scale: float, sets: Sets | None) -> Costs:
    """The cost of a step by run; what ``calibration.json`` lacks is measured, with no run beside, and added to it."""
    file, folder = output / "calibration.json", output / "calibration"
    known = read_json(file) if file.is_file() else {}
    if missing := [study.run(name) for name in study.measured if name not in known]:
        any_steps = {name: {"pairs": 1.0, "flops": 1.0, "seconds": 1.0} for name in study.measured}

        def recipe(run: Run) -> dict[str, Any]:
            return recipe_of(study, run, seed, scale, output, costs=any_steps, sets=sets)

        runs = {run.name: {"recipe": recipe(run), "root": recipe(root_of(study, run))} for run in missing}
        known |= _measured(study, folder, runs, jobs)
        write_json(file, known)
    return {name: known[name] for name in study.measured}


def _measured(study: Study, folder: Path, runs: dict[str, Any], jobs: int) -> dict[str, Any]:
    process = _start(folder, {"rounds": ROUNDS, "steps": TIMED, "runs": runs}, jobs)
    with progress_bar(f"{study.name}, cost of a step") as progress:
        try:
            while process.poll() is None:
                rounds = json.loads(steps.read_text()) if (steps := folder / "steps.json").is_file() else {}
                progress(sum(map(len, rounds.values())), len(runs) * ROUNDS)
                time.sleep(POLL)
        finally:
            _stop([process])
    _check(folder, process)
    found = _result(folder) or {}
    unsteady = {name: cost["spread"] for name, cost in found.items() if cost["spread"] > UNSTEADY}
    if unsteady:
        print(
            f"{study.name}: the same steps took up to {max(unsteady.values()):.0%} longer in one round than in another "
            f"({', '.join(unsteady)}); the machine is busy. The fastest time of each step counts; to measure again, "
            f"stop, delete {folder}.json and the folder runs beside it, and start when nothing else runs.",
            file=sys.stderr,
        )
    return found


def _make(
    study: Study,
    output: Path,
    todo: Sequence[tuple[str, int]],  # name of a run, and seed
    jobs: int,
    costs: Costs,
    scale: float,
    sets: Sets | None,
) -> None:
    """Makes the runs without a result, each in its own process after the run it starts from; ends at a failure."""
    waiting, going = [*todo], {}
    with progress_bar(study.name) as progress:
        try:
            while waiting or going:
                for key in [key for key, process in going.items() if process.poll() is not None]:
                    _check(folder_of(output, *key), going.pop(key))
                undone = {*waiting, *going}
                ready = [key for key in waiting if (study.run(key[0]).start, key[1]) not in undone]
                for name, seed in ready[: jobs - len(going)]:
                    waiting.remove((name, seed))
                    run, folder = study.run(name), folder_of(output, name, seed)
                    job: dict[str, Any] = {
                        "recipe": recipe_of(study, run, seed, scale, output, costs=costs, sets=sets),
                        "test": filled(run.test or study.test, output, sets),
                        **({"format": sets.format} if sets else {}),
                        **({"probes": [*study.probes]} if study.probes else {}),
                    }
                    known = _result(folder)
                    if known is None:
                        going[name, seed] = _start(folder, job, jobs)
                    elif known["job"] != job:
                        raise OutputError(
                            f"{folder} is a run of another recipe; choose another output folder, or delete it"
                        )
                progress(len(todo) - len(waiting) - len(going), len(todo))
                time.sleep(POLL)
        finally:
            _stop([*going.values()])


def _start(folder: Path, job: dict[str, Any], jobs: int) -> subprocess.Popen:
    """A process with its share of the cores that does the job in ``job.json`` in its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "job.json", job)
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, usable_cores() // jobs))}
    with (folder / "log.txt").open("a", encoding="utf-8") as log:
        command = [sys.executable, "-m", "muco.study.one", str(folder)]
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, stdin=subprocess.PIPE)


def _stop(processes: Sequence[subprocess.Popen]) -> None:
    for process in processes:
        if process.poll() is None:
            process.terminate()
    for process in processes:
        process.communicate()  # waits, and closes the pipe


def _result(folder: Path) -> dict[str, Any] | None:
    file = folder / "result.json"
    return read_json(file) if file.is_file() else None


def _check(folder: Path, process: subprocess.Popen) -> None:
    process.communicate()  # it has ended; this closes the pipe
    if process.returncode:
        said = (folder / "log.txt").read_text(encoding="utf-8", errors="replace")[-TAIL:]
        raise MucoError(f"the run {folder.name} failed (exit code {process.returncode}), see its log.txt: {said}")
