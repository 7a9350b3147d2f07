"""Makes the runs that a study lacks, several processes at a time.

::

    <output>/
    ├── study.json         the arguments; at the end every run with its scores
    ├── data/              the scenes, appears whole; absent if the user gave data
    ├── calibration.json   the cost of a step, for runs of equal cost; measured once
    ├── runs/<run>-seed<n>/{job.json, run/, result.json, log.txt}
    └── plot.svg, curves.svg, README.md   see report.py
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

from muco.base.files import claimed, earlier_record, read_json, write_json, writing
from muco.base.machine import VERSION, usable_cores
from muco.base.terminal import progress_bar
from muco.data import open_data
from muco.errors import MucoError, OutputError
from muco.study.design import Costs, Run, Sets, Study, filled, folder_of, recipe_of, root_of, steps_of, with_setting
from muco.study.estimate import half_width

POLL = 0.2  # seconds
ROUNDS, TIMED, UNTIMED = 3, 12, 3  # of a run whose seconds must be known well; timed steps of a round, and those before
SHARE = 20  # of another run, one step in 20 is timed, in one round
UNSTEADY = 0.2  # spread of rounds that a quiet machine stays below
TUNING_SEED = 1000  # the first of those that settings are chosen with
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
        The content of ``study.json``: ``asked``, ``runs``, each with name, seed and result, ``costs`` of a step by run,
        and, if the study has a grid, ``tuning``: the dev scores of each run by setting, and ``chosen``: its best one.
    Raises:
        OutputError: If the folder holds another study, or anything else.
        MucoError: If the study needs scenes and ``sets`` are given, these lack what it needs or have what it does not
            take, or a run fails: the message ends with the end of its ``log.txt``.
    """
    if seeds < 1 or jobs < 1 or first_seed < 0:
        raise MucoError(
            f"--seeds is {seeds}, --first-seed {first_seed} and --jobs {jobs}; pass at least 1 seed, a first seed of 0 "
            "or more, and at least 1 job"
        )
    if not 0 < scale <= 100:
        raise MucoError(f"--scale is {scale:g}; pass more than 0, e.g. 0.1 for a tenth of the steps and of the data")
    asked = {"study": study.name, "scale": scale, "muco": VERSION}
    asked |= {"data": sets.train, **{k: v for k, v in asdict(sets).items() if k != "train"}} if sets else {"data": None}
    with claimed(output):
        if sets is not None:
            if study.needs_scenes:
                raise MucoError(f"the study {study.name} is made of the scenes' structure; leave out --data and --test")
            if missing := [f"--{name}" for name in study.needs if getattr(sets, name) is None]:
                raise MucoError(f"the study {study.name} needs {' and '.join(missing)} beside --data and --test")
            if idle := [f"--{name}" for name in ("dev", "model") if getattr(sets, name) and name not in study.needs]:
                raise MucoError(f"the study {study.name} makes no use of {' and '.join(idle)}; run it without")
            if study.curve and sets.format != "jsonl":
                raise MucoError(
                    f"the study {study.name} scores while it trains, which takes JSONL; see muco data convert"
                )
            for path in sets.files:
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
        own = [(run.name, seed) for run in study.runs for seed in range(first_seed, first_seed + seeds)]
        own = [(name, seed) for name, seed in own if seed == first_seed or not study.run(name).fixed]
        own.sort(key=itemgetter(1))  # a seed is whole before the next begins; the order of runs stays
        settings = study.grid.settings if study.grid else ()
        all_costs = costs | {with_setting(name, one): cost for name, cost in costs.items() for one in settings}
        tuning = _tuning(study)
        everything = replace(study, runs=(*study.runs, *study.tuning.values()))
        seconds = [_seconds(everything, everything.run(name), scale, all_costs) for name, _ in own + tuning]
        print(forecast(study, seeds, len(own) + len(tuning), sum(seconds) / jobs), file=sys.stderr)
        found: dict[str, Any] = {"asked": asked | {"seeds": seeds, "first_seed": first_seed}}
        made = partial(_make, jobs=jobs, costs=all_costs, scale=scale, sets=sets)
        if study.grid:
            made(everything, output, tuning)
            found |= choose(study, {key: _result(folder_of(output, *key)) or {} for key in tuning})
        made(study.settled(found.get("chosen", {})), output, own)
        results = [{"name": key[0], "seed": key[1], "result": _result(folder_of(output, *key)) or {}} for key in own]
        found |= {"runs": results, "costs": costs}
        write_json(output / "study.json", found)
        return found


def _tuning(study: Study) -> list[tuple[str, int]]:
    seeds = range(TUNING_SEED, TUNING_SEED + study.grid.seeds) if study.grid else ()
    return [(name, seed) for seed in seeds for name in study.tuning]


def choose(study: Study, results: Mapping[tuple[str, int], Mapping[str, Any]]) -> dict[str, Any]:
    """``tuning``: by run and setting, the first column's dev scores by seed; ``chosen``: each run's best mean."""
    scores: dict[str, dict[str, list[float]]] = {}
    for run in (run for run in study.runs if not run.fixed):
        scores[run.name] = {
            setting: [
                statistics.mean(results[name, seed]["scores"][score] for score in study.columns[0].scores)
                for name, seed in results
                if name == with_setting(run.name, setting)
            ]
            for setting in study.grid.settings
        }
    best = {name: max(own, key=lambda setting, own=own: statistics.mean(own[setting])) for name, own in scores.items()}
    return {"tuning": scores, "chosen": best}


def _seconds(study: Study, run: Run, scale: float, costs: Costs) -> float:
    """Of a training and its scores, with nothing beside it but other runs on their own cores."""
    if run.fixed:
        return 0.0
    cost = costs[run.name]
    scorings = study.curve.points if study.curve else 1
    return steps_of(study, run, scale, costs)[0] * cost["seconds"] + scorings * cost["scoring"]


def forecast(study: Study, seeds: int, runs: int, seconds: float) -> str:
    """How long a study will take, and what it will be able to see."""
    said = f"{study.name}: {runs} trainings, about {timedelta(seconds=round(seconds))} here"
    if study.spread is None or seeds < 2 or not study.compared:
        return said
    half = half_width(study.spread, seeds, study.level)
    return (
        f"{said}; differences in '{study.columns[0].title}' will be known to about ± {half:.1f} points "
        f"({seeds} seeds, pilot: ± {study.spread:g} from seed to seed)"
    )


def _costs(study: Study, output: Path, seed: int, jobs: int, scale: float, sets: Sets | None) -> Costs:
    """The cost of a step and of scoring by run, without those that are fixed.

    What ``calibration.json`` lacks is measured, with no run beside, and added to it.
    """
    file, folder = output / "calibration.json", output / "calibration"
    known = read_json(file) if file.is_file() else {}
    measured = [run.name for run in study.runs if not run.fixed]
    if missing := [study.run(name) for name in measured if name not in known]:
        any_steps = {name: {"pairs": 1.0, "flops": 1.0, "seconds": 1.0} for name in measured}

        def recipe(run: Run) -> dict[str, Any]:
            return recipe_of(study, run, seed, scale, output, costs=any_steps, sets=sets)

        def how_often(run: Run) -> dict[str, int]:
            if run.name in study.exactly:
                return {"rounds": ROUNDS, "steps": TIMED, "untimed": UNTIMED}
            steps, _ = steps_of(study, run, scale, any_steps)
            return {"rounds": 1, "steps": min(TIMED, -(-steps // SHARE)), "untimed": 1}

        runs = {
            run.name: {
                "recipe": recipe(run),
                "root": recipe(root_of(study, run)),
                "test": filled(run.test or study.test, output, sets),
                **({"format": sets.format} if sets else {}),
                **how_often(run),
            }
            for run in missing
        }
        known |= _measured(study, folder, runs, jobs)
        write_json(file, known)
    return {name: known[name] for name in measured}


def _measured(study: Study, folder: Path, runs: dict[str, Any], jobs: int) -> dict[str, Any]:
    process = _start(folder, {"measure": runs}, jobs)
    with progress_bar(f"{study.name}, cost of a step") as progress:
        try:
            while process.poll() is None:
                rounds = json.loads(steps.read_text()) if (steps := folder / "steps.json").is_file() else {}
                progress(sum(map(len, rounds.values())), sum(run["rounds"] for run in runs.values()))
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
    *,
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
                        **({"curve": study.curve.score} if study.curve else {}),
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
