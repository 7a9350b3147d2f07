"""The parts of a study, and the recipes of its runs. No torch in this file."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
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
            ``{train}``, ``{dev}`` and ``{test}`` are its sets, or those of a user; ``{base}`` is the model that all
            start from; ``{start}`` is that of the run it starts from.
        equal: Sets its steps and, in proportion, its warm-up steps, instead of the recipe.
        fixed: Makes it once, with the first seed and no setting of the study's grid: a row that nothing can change.
    """

    name: str  # in the table
    recipe: Mapping[str, Any] = field(default_factory=dict)
    start: str | None = None  # the run whose model this one starts from; None: the recipe's model
    shown: bool = True  # whether the table has a row for it
    test: str | None = None  # its held-out set; None: the study's
    equal: Equal | None = None
    fixed: bool = False
    dev: str | None = None  # the set that its setting is chosen on; None: the grid's


@dataclass(frozen=True)
class Grid:
    """Settings of which every run takes its own best, by trainings with other seeds that are scored on the dev set.

    Args:
        settings: By name, differences from the recipe of a run.
        seeds: Trainings of every run and setting.
    """

    settings: Mapping[str, Mapping[str, Any]]
    seeds: int = 1
    dev: str = "{dev}"


@dataclass(frozen=True)
class Column:
    """A score of the table: the mean of some entries of a result."""

    title: str
    scores: tuple[str, ...]  # see :mod:`muco.study.one` and :mod:`muco.study.probes`
    percent: bool = True  # whether they are shares, shown in %
    digits: int = 1  # after the point


@dataclass(frozen=True)
class Curve:
    """A score along the training of every run.

    Args:
        score: Its name, see :func:`muco.study.one.flat_scores`.
        points: How often each run is scored, after equal numbers of steps; the last one is the end.
        reach: A score in %; the page says when each run reached it.
    """

    score: str
    points: int
    reach: float


@dataclass(frozen=True)
class Study:
    """Several trainings that differ in one thing each.

    The first column is the measure: if ``registered``, its intervals of differences hold together (Bonferroni), and are
    judged.
    """

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
    margin: float | None = None  # points within which two runs count as equal in the first column
    grid: Grid | None = None
    curve: Curve | None = None
    spread: float | None = None  # standard deviation of a difference in the first column, in points, from a pilot

    def __post_init__(self) -> None:
        names = [run.name for run in self.runs]
        assert len({slug(name) for name in names}) == len(names), f"{self.name}: two runs of one name"
        for place, run in enumerate(self.runs):
            assert run.start is None or run.start in names[:place], f"{run.name} starts from a run that is not there"
            assert run.equal is None or run.equal.to in names[:place], f"{run.name} equals a run that is not there"
        assert self.grid is None or not any(run.start for run in self.runs), "a grid has no runs for starts"
        assert all(name in names for pair in self.compared for name in pair), f"{self.name}: compares what is not run"

    def run(self, name: str) -> Run:
        return next(run for run in self.runs if run.name == name)

    @property
    def needs_scenes(self) -> bool:
        """Whether it trains or scores on files that only the scenes have."""
        return "{data}" in self._values

    @property
    def exactly(self) -> frozenset[str]:
        """Runs whose seconds must be known well: of equal cost, or with a curve over seconds. Others tell how long the
        study takes.
        """
        equal = {name for run in self.runs if run.equal for name in (run.name, run.equal.to)}
        return frozenset(run.name for run in self.runs if self.curve or run.name in equal)

    @property
    def needs(self) -> tuple[str, ...]:
        """What else of :class:`Sets` it needs."""
        return tuple(name for name, word in {"dev": "{dev}", "model": "{base}"}.items() if word in self._values)

    @property
    def _values(self) -> str:
        values = [self.base, self.test, *((run.recipe, run.test, run.dev) for run in self.runs)]
        return str([*values, self.grid.dev if self.grid else ""])

    @property
    def level(self) -> float:
        """The confidence of one interval of the first column's differences, so that all together have 95 %."""
        return 1 - 0.05 / max(1, len(self.compared)) if self.registered else 0.95

    @property
    def tuning(self) -> dict[str, Run]:
        """By name, each run with each setting of the grid."""
        if self.grid is None:
            return {}
        tried = [(run, *setting) for run in self.runs if not run.fixed for setting in self.grid.settings.items()]
        runs = (
            replace(
                run,
                name=with_setting(run.name, setting),
                recipe=merged(run.recipe, recipe),
                test=run.dev or self.grid.dev,
            )
            for run, setting, recipe in tried
        )
        return {run.name: run for run in runs}

    def settled(self, chosen: Mapping[str, str]) -> Study:
        """The study with the recipe of each run that has a chosen setting."""
        return replace(
            self,
            runs=tuple(
                replace(run, recipe=merged(run.recipe, self.grid.settings[chosen[run.name]]))
                if self.grid and run.name in chosen
                else run
                for run in self.runs
            ),
        )


@dataclass(frozen=True)
class Sets:
    """A user's training and held-out sets, instead of the scenes; ``format`` as in recipes.

    ``dev`` and ``model`` are for studies that choose settings and start from a model.
    """

    train: str
    test: str
    format: str = "jsonl"
    dev: str | None = None
    model: str | None = None

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(path for path in (self.train, self.test, self.dev) if path is not None)


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

    ``scale``: of steps and warm-up steps, at least one step; ``costs``: of a step, if the run equals another one.
    """
    start = None if run.start is None else folder_of(folder, run.start, seed) / "run" / MODEL
    values = filled(merged(study.base, run.recipe), folder, sets, start)
    values |= {"output": str(folder_of(folder, run.name, seed) / "run"), "seed": seed}
    steps, warm = steps_of(study, run, scale, costs or {})
    values["trainer"] |= {"max_steps": steps, "warmup_steps": warm}
    if study.curve:
        every = math.ceil(steps / study.curve.points)
        values["trainer"] |= {"eval_strategy": "steps", "eval_steps": every, "eval_on_start": False}
        values["data"] |= {"validation": {"path": filled(run.test or study.test, folder, sets), "limit": None}}
    if start is not None:
        model = {key: value for key, value in values["model"].items() if key != "tiny"}
        values["model"] = model | {"path": str(start)}
    return values


def steps_of(study: Study, run: Run, scale: float, costs: Costs) -> tuple[int, int]:
    """Steps and warm-up steps of a run; at least one step."""
    if run.equal is None:
        trainer = merged(study.base, run.recipe)["trainer"]
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
    """Values with paths for what is in braces, see :class:`Run`; a user's set gets its format too."""
    if isinstance(value, Mapping):
        inner = {key: filled(item, folder, sets, start) for key, item in value.items()}
        foreign = sets is not None and value.get("path") == "{train}"
        return inner | {"format": sets.format} if foreign else inner
    if isinstance(value, (list, tuple)):
        return [filled(item, folder, sets, start) for item in value]
    if not isinstance(value, str):
        return value
    data = folder / "data"
    words = {"data": str(data), "start": str(start), "base": str(data / "start")}
    words |= {name: str(data / f"{name}.jsonl") for name in ("train", "dev", "test")}
    if sets:
        words |= {"train": sets.train, "dev": str(sets.dev), "test": sets.test, "base": str(sets.model)}
    for name, word in words.items():
        value = value.replace(f"{{{name}}}", word)
    return value


def with_setting(name: str, setting: str) -> str:
    """The name of a run with a setting of the grid."""
    return f"{name}, {setting}"


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe with changes, mapping by mapping."""
    result = copy.deepcopy(dict(base))
    for key, value in changes.items():
        inner = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merged(result[key], value) if inner else copy.deepcopy(value)
    return result
