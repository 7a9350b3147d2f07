"""Makes what a study lacks, several processes at a time.

::

    <output>/
    ├── study.json         what was asked for; at the end every run with its scores
    ├── data/              the scenes, appears whole; not there where a user gave data
    ├── calibration.json   what a step of a run costs, where runs shall cost the same; taken once
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from muco.base.files import claimed, earlier_record, read_json, write_json, writing
from muco.base.machine import VERSION, usable_cores
from muco.base.terminal import progress_bar
from muco.data import open_data
from muco.errors import MucoError, OutputError
from muco.study.design import Costs, Sets, Study, filled, folder_of, recipe_of, root_of

POLL = 0.2  # seconds
ROUNDS = 3  # in which the runs take turns to have their steps timed
UNSTEADY = 0.2  # the rounds of a quiet machine lie closer together
TAIL = 2000  # characters of a failed run's log that are shown


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
    """Trains and scores all runs of a study, but for those that are there.

    Args:
        scale: Of data and steps; 0.1 is a tenth of both, to try it out.
        jobs: Runs at a time; they share the cores.
    Returns:
        What ``study.json`` holds: ``asked``, ``runs``, each with name, seed and result, and ``costs`` of a step by run
        where some runs equal others.
    Raises:
        OutputError: If the folder holds another study, or anything else.
        MucoError: If the study needs scenes and ``sets`` are given, or a run fails; what it last said is in the
            message, and the whole in its ``log.txt``.
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
        settings = {"scale": scale, "sets": sets}
        costs = _costs(study, output, first_seed, jobs, **settings)
        todo = [(run.name, seed) for seed in range(first_seed, first_seed + seeds) for run in study.runs]
        _Runs(study, output, [*todo], jobs, costs, **settings).make()
        results = [
            {"name": name, "seed": seed, "result": _result(folder_of(output, name, seed)) or {}} for name, seed in todo
        ]
        found = {"asked": asked | {"seeds": seeds, "first_seed": first_seed}, "runs": results}
        found |= {"costs": costs} if costs else {}
        write_json(output / "study.json", found)
        return found


def _costs(study: Study, output: Path, seed: int, jobs: int, *, scale: float, sets: Sets | None) -> Costs:
    """The cost of a step by run; what ``calibration.json`` lacks is measured, with nothing beside, and kept there."""
    file, folder = output / "calibration.json", output / "calibration"
    known = read_json(file) if file.is_file() else {}
    if missing := [name for name in study.measured if name not in known]:
        any_steps = {name: {"pairs": 1.0, "flops": 1.0, "seconds": 1.0} for name in study.measured}
        settings = {"costs": any_steps, "sets": sets}
        runs = {
            name: {
                "recipe": recipe_of(study, study.run(name), seed, scale, output, **settings),
                "root": recipe_of(study, root_of(study, study.run(name)), seed, scale, output, **settings),
            }
            for name in missing
        }
        known |= _measured(study, folder, runs, jobs)
        write_json(file, known)
    return {name: known[name] for name in study.measured}


def _measured(study: Study, folder: Path, runs: dict[str, Any], jobs: int) -> dict[str, Any]:
    process = _start(folder, {"rounds": ROUNDS, "runs": runs}, jobs)
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
            f"({', '.join(unsteady)}); the machine does something else. Each step's quickest try counts; to measure "
            f"again, stop, delete {folder}.json and the folder runs beside it, and begin when nothing else runs.",
            file=sys.stderr,
        )
    return found


Key = tuple[str, int]  # name of a run, and seed


@dataclass
class _Runs:
    """Runs of a study, each made in a process of its own, at most ``jobs`` at a time.

    A run starts when the one it builds on is done.
    """

    study: Study
    output: Path
    waiting: list[Key]
    jobs: int
    costs: Costs
    scale: float
    sets: Sets | None
    going: dict[Key, subprocess.Popen] = field(default_factory=dict)

    def make(self) -> None:
        """Makes all of them; the first one that fails stops all."""
        total = len(self.waiting)
        with progress_bar(self.study.name) as progress:
            try:
                while self.waiting or self.going:
                    for key in [key for key, process in self.going.items() if process.poll() is not None]:
                        _check(folder_of(self.output, *key), self.going.pop(key))
                    for key in self.ready()[: self.jobs - len(self.going)]:
                        self.start(key)
                    progress(total - len(self.waiting) - len(self.going), total)
                    time.sleep(POLL)
            finally:
                _stop([*self.going.values()])

    def ready(self) -> list[Key]:
        """Those that wait for no other run."""
        undone = {*self.waiting, *self.going}
        return [(name, seed) for name, seed in self.waiting if (self.study.run(name).start, seed) not in undone]

    def start(self, key: Key) -> None:
        """Starts a run, unless its result is there."""
        self.waiting.remove(key)
        run, study, folder = self.study.run(key[0]), self.study, folder_of(self.output, *key)
        job: dict[str, Any] = {
            "recipe": recipe_of(study, run, key[1], self.scale, self.output, costs=self.costs, sets=self.sets),
            "test": filled(run.test or study.test, self.output, self.sets),
        }
        if self.sets:
            job["format"] = self.sets.format
        if study.probes:
            job["probes"] = [*study.probes]
        known = _result(folder)
        if known is None:
            self.going[key] = _start(folder, job, self.jobs)
        elif known["job"] != job:
            raise OutputError(f"{folder} is a run of another recipe; choose another output folder, or delete it")


def _start(folder: Path, job: dict[str, Any], jobs: int) -> subprocess.Popen:
    """A process of its share of the cores that does what ``job.json`` in its folder says."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "job.json", job)
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, usable_cores() // jobs))}
    with (folder / "log.txt").open("a", encoding="utf-8") as log:
        command = [sys.executable, "-m", "muco.study.one", str(folder)]
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL)


def _stop(processes: Sequence[subprocess.Popen]) -> None:
    for process in processes:
        if process.poll() is None:
            process.terminate()
    for process in processes:
        process.wait()


def _result(folder: Path) -> dict[str, Any] | None:
    file = folder / "result.json"
    return read_json(file) if file.is_file() else None


def _check(folder: Path, process: subprocess.Popen) -> None:
    if process.returncode:
        said = (folder / "log.txt").read_text(encoding="utf-8", errors="replace")[-TAIL:]
        raise MucoError(f"the run {folder.name} failed (exit code {process.returncode}), see its log.txt: {said}")
