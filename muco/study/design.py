"""The parts of a study, and the recipes of its runs. No torch in this file."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from muco.training.folder import MODEL

Costs = Mapping[str, Mapping[str, float]]  # name of a run -> "pairs", "flops" and "seconds" of one of its steps


@dataclass(frozen=True)
class Equal:
    """A run makes the number of steps that costs as much as another run."""

    to: str  # that run's name
    by: Literal["pairs", "flops", "seconds"]  # the cost that is equal; seconds are measured before the runs


@dataclass(frozen=True)
class Run:
    """One training of a study, made once per seed.

    Args:
        recipe: The differences from the study's base recipe. In paths, ``{data}`` is the study's data folder,
            ``{train}`` and ``{test}`` are its sets, or those of a user; ``{start}`` is the model it starts from.
        equal: Sets its steps and, in proportion, its warm-up steps, instead of the recipe.
    """

    name: str  # in the table
    recipe: Mapping[str, Any] = field(default_factory=dict)
    start: str | None = None  # the run whose model this one starts from; None: the recipe's model
    shown: bool = True  # whether the table has a row for it
    test: str | None = None  # its held-out set; None: the study's
    equal: Equal | None = None


@dataclass(frozen=True)
class Column:
    """A score of the table: the mean of some entries of a result."""

    title: str
    scores: tuple[str, ...]  # see :func:`muco.study.one.flat_scores` and :mod:`muco.study.probes`
    percent: bool = True  # whether they are shares, shown in %
    digits: int = 1  # after the point


@dataclass(frozen=True)
class Point:
    """A point of a plot: the difference of runs ``a`` − ``b``, over the ratio of the costs of their steps."""

    series: str  # points of one are joined by a line
    a: str
    b: str
    label: str = ""  # shown at the point


@dataclass(frozen=True)
class Study:
    """Several trainings that differ in one thing each."""

    name: str
    question: str  # at the top of the page
    base: Mapping[str, Any]  # the recipe that all runs share
    runs: tuple[Run, ...]
    columns: tuple[Column, ...]
    prepare: Callable[[Path, float], None]  # writes the data into a folder, at a scale: 1.0 for all of it
    test: str = "{test}"  # the held-out set
    compared: tuple[tuple[str, str], ...] = ()  # runs (a, b): the page shows a − b, paired by seed
    notes: tuple[str, ...] = ()  # for readers of the table
    probes: tuple[str, ...] = ()  # of :data:`muco.study.probes.PROBES`, for further scores of every run
    seeds: int = 3  # by default
    registered: tuple[str, ...] = ()  # expectations and criteria written down before the runs
    points: tuple[Point, ...] = ()  # of a plot of the first column over the ratio of seconds per step

    def __post_init__(self) -> None:
        names = [run.name for run in self.runs]
        assert len({slug(name) for name in names}) == len(names), f"{self.name}: two runs of one name"
        for place, run in enumerate(self.runs):
            assert run.start is None or run.start in names[:place], f"{run.name} starts from a run that is not there"
            assert run.equal is None or run.equal.to in names[:place], f"{run.name} equals a run that is not there"
        pairs = [*self.compared, *((point.a, point.b) for point in self.points)]
        assert all(name in names for pair in pairs for name in pair), f"{self.name}: compares what is not run"

    def run(self, name: str) -> Run:
        return next(run for run in self.runs if run.name == name)

    @property
    def needs_scenes(self) -> bool:
        """Whether it trains or scores on files that only the scenes have."""
        values = [self.base, self.test, *((run.recipe, run.test) for run in self.runs)]
        return "{data}" in str(values)

    @property
    def measured(self) -> tuple[str, ...]:
        """Runs whose cost of a step must be known before the runs."""
        pairs = [(point.a, point.b) for point in self.points]
        pairs += [(run.name, run.equal.to) for run in self.runs if run.equal is not None]
        return tuple(run.name for run in self.runs if any(run.name in pair for pair in pairs))


@dataclass(frozen=True)
class Sets:
    """A user's training and held-out sets, instead of the scenes; ``format`` as in recipes."""

    train: str
    test: str
    format: str = "jsonl"


def recipe_of(
    study: Study,
    run: Run,
    seed: int,
    scale: float,
    folder: Path,
    *,
    costs: Costs | None = None,
    sets: Sets | None = None,
) -> dict[str, Any]:
    """The recipe of a run as plain values; a model to start from is that in :func:`folder_of` the run.

    ``scale``: of steps, warm-up steps and those of a language warm-up, at least one step; ``costs``: of a step, if the
    run equals another one.
    """
    start = None if run.start is None else folder_of(folder, run.start, seed) / "run" / MODEL
    values = filled(_merged(study.base, run.recipe), folder, sets, start)
    values |= {"output": str(folder_of(folder, run.name, seed) / "run"), "seed": seed}
    steps, warm = steps_of(study, run, scale, costs or {})
    values["trainer"] |= {"max_steps": steps, "warmup_steps": warm}
    if warm_up := values.get("warm_up", {}).get("steps"):
        values["warm_up"]["steps"] = max(1, round(warm_up * scale))
    if start is not None:
        model = {key: value for key, value in values["model"].items() if key != "tiny"}
        values["model"] = model | {"path": str(start)}
    return values


def steps_of(study: Study, run: Run, scale: float, costs: Costs) -> tuple[int, int]:
    """Steps and warm-up steps of a run; at least one step."""
    if run.equal is None:
        trainer = _merged(study.base, run.recipe)["trainer"]
        return max(1, round(trainer.get("max_steps", 0) * scale)), round(trainer.get("warmup_steps", 0) * scale)
    steps, warm = steps_of(study, study.run(run.equal.to), scale, costs)
    ratio = costs[run.equal.to][run.equal.by] / costs[run.name][run.equal.by]
    return max(1, round(steps * ratio)), round(warm * ratio)


def root_of(study: Study, run: Run) -> Run:
    """The first run of the chain of starts that leads to a run."""
    return run if run.start is None else root_of(study, study.run(run.start))


def folder_of(folder: Path, name: str, seed: int) -> Path:
    """The folder of a run."""
    return folder / "runs" / f"{slug(name)}-seed{seed}"


def slug(name: str) -> str:
    """A run's name for a folder."""
    return re.sub(r"[^\w.]+", "-", name).strip("-")


def filled(value: Any, folder: Path, sets: Sets | None = None, start: Path | None = None) -> Any:
    """Values with paths for ``{data}``, ``{train}``, ``{test}`` and ``{start}``; a user's set gets its format too."""
    if isinstance(value, Mapping):
        inner = {key: filled(item, folder, sets, start) for key, item in value.items()}
        foreign = sets is not None and value.get("path") == "{train}"
        return inner | {"format": sets.format} if foreign else inner
    if isinstance(value, (list, tuple)):
        return [filled(item, folder, sets, start) for item in value]
    if not isinstance(value, str):
        return value
    data = folder / "data"
    value = value.replace("{data}", str(data)).replace("{start}", str(start))
    value = value.replace("{train}", sets.train if sets else str(data / "train.jsonl"))
    return value.replace("{test}", sets.test if sets else str(data / "test.jsonl"))


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    result = copy.deepcopy(dict(base))
    for key, value in changes.items():
        inner = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = _merged(result[key], value) if inner else copy.deepcopy(value)
    return result
