"""What a study is. No torch in this file."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from muco.errors import MucoError


@dataclass(frozen=True)
class Run:
    """One training of a study, made once per seed.

    Args:
        name: As the table shows it.
        recipe: What differs from the study's base recipe. ``{data}`` in a path is the study's data folder.
        start: The run whose model this one goes on from; None: from what the recipe says.
        shown: Whether the table has a row for it.
        test: Its held-out set, where it is not the study's.
    """

    name: str
    recipe: Mapping[str, Any] = field(default_factory=dict)
    start: str | None = None
    shown: bool = True
    test: str | None = None


@dataclass(frozen=True)
class Column:
    """A score of the table: the mean of some entries of a result.

    Args:
        scores: Their names, see :func:`muco.study.one.flat_scores`.
        percent: Whether they are shares, which are shown in %.
    """

    title: str
    scores: tuple[str, ...]
    percent: bool = True


@dataclass(frozen=True)
class Study:
    """Several trainings that differ in one thing each.

    Args:
        question: A sentence for the top of the page.
        base: The recipe that all runs share.
        prepare: Writes the data into a folder, given the scale: 1.0 for all of it.
        test: The held-out set, ``{data}`` being that folder.
        compared: Pairs of runs (a, b) of which the page gives a − b, paired by seed.
        notes: What a reader has to know to read the table.
    """

    name: str
    question: str
    base: Mapping[str, Any]
    runs: tuple[Run, ...]
    columns: tuple[Column, ...]
    prepare: Callable[[Path, float], None]
    test: str = "{data}/test.jsonl"
    compared: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = [run.name for run in self.runs]
        assert len(set(names)) == len(names), f"{self.name}: two runs of one name"
        for place, run in enumerate(self.runs):
            assert run.start is None or run.start in names[:place], f"{run.name} starts from a run that is not there"
        assert all(name in names for pair in self.compared for name in pair), f"{self.name}: compares what is not run"


def recipe_of(study: Study, run: Run, seed: int, scale: float, folder: Path) -> dict[str, Any]:
    """The recipe of a run as plain values; the model that it starts from comes from :func:`folder_of` that run.

    Args:
        scale: Of the number of steps and of warm-up steps; every run makes at least one step.
        folder: The study's.
    """
    values = _merged(study.base, run.recipe)
    values = _filled(values, str(folder / "data"))
    values |= {"output": str(folder_of(folder, run.name, seed) / "run"), "seed": seed}
    trainer = values["trainer"]
    for key, least in (("max_steps", 1), ("warmup_steps", 0)):
        trainer[key] = max(least, round(trainer.get(key, 0) * scale))
    if run.start is not None:
        model = {key: value for key, value in values["model"].items() if key != "tiny"}
        values["model"] = model | {"path": str(folder_of(folder, run.start, seed) / "run" / "model")}
    return values


def folder_of(folder: Path, name: str, seed: int) -> Path:
    """Where a run of a study lies."""
    return folder / "runs" / f"{'-'.join(name.replace(',', '').replace('=', ' ').split())}-seed{seed}"


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    result = copy.deepcopy(dict(base))
    for key, value in changes.items():
        inner = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = _merged(result[key], value) if inner else copy.deepcopy(value)
    return result


def _filled(value: Any, data: str) -> Any:
    if isinstance(value, Mapping):
        return {key: _filled(item, data) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_filled(item, data) for item in value]
    return value.replace("{data}", data) if isinstance(value, str) else value


def checked_scale(scale: float) -> float:
    if not 0 < scale <= 100:
        raise MucoError(f"--scale is {scale:g}; give more than 0, e.g. 0.1 for a tenth of the steps and of the data")
    return scale
