"""What a study found, in numbers: means over seeds with 95 % intervals, differences paired by seed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from muco.study.design import Column, Study


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and half the width of its 95 % interval; NaN where there is one seed only, or no value."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))

    @property
    def half_width(self) -> float:
        from scipy.stats import t

        count = len(self.values)
        if count < 2:
            return math.nan
        return float(t.ppf(0.975, count - 1) * np.std(self.values, ddof=1) / math.sqrt(count))

    def text(self, digits: int = 1) -> str:
        if math.isnan(self.mean):
            return "–"
        if math.isnan(self.half_width):
            return f"{self.mean:.{digits}f}"
        return f"{self.mean:.{digits}f} ± {self.half_width:.{digits}f}"

    def __str__(self) -> str:
        return self.text()


def values_of(found: Mapping[str, Any], name: str, column: Column) -> tuple[float, ...]:
    """A column of a run, one value per seed, in % if it is a share; NaN where it was not or could not be taken."""
    results = [run["result"]["scores"] for run in found["runs"] if run["name"] == name]
    factor = 100.0 if column.percent else 1.0
    return tuple(factor * _mean(scores, column) for scores in results)


def _mean(scores: Mapping[str, float | None], column: Column) -> float:
    return float(np.mean(np.array([scores.get(score) for score in column.scores], dtype=float)))


def table(study: Study, found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row per shown run: name, an :class:`Estimate` per column, steps, operations in 10¹² and seconds (means)."""
    rows = []
    for run in (run for run in study.runs if run.shown):
        results = [entry["result"] for entry in found["runs"] if entry["name"] == run.name]
        seconds = [result["seconds"] for result in results if result["seconds"] is not None]
        rows.append(
            {
                "name": run.name,
                "columns": {c.title: Estimate(values_of(found, run.name, c)) for c in study.columns},
                "steps": float(np.mean([result["steps"] for result in results])),
                "tflops": float(np.mean([result["flops"] for result in results])) / 1e12,
                "seconds": float(np.mean(seconds)) if seconds else math.nan,
            }
        )
    return rows


def table_as_json(study: Study, found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """:func:`table` as JSON can hold it; None for what is unknown."""
    return [
        {
            "name": row["name"],
            "columns": {
                title: {
                    "mean": _known(estimate.mean),
                    "half_width": _known(estimate.half_width),
                    "values": [_known(value) for value in estimate.values],
                }
                for title, estimate in row["columns"].items()
            },
            "steps": row["steps"],
            "tflops": row["tflops"],
            "seconds": _known(row["seconds"]),
        }
        for row in table(study, found)
    ]


def _known(number: float) -> float | None:
    return None if math.isnan(number) else number


def difference(found: Mapping[str, Any], a: str, b: str, column: Column) -> Estimate:
    """a − b, paired by seed."""
    pairs = zip(values_of(found, a, column), values_of(found, b, column), strict=True)
    return Estimate(tuple(x - y for x, y in pairs))


def differences(study: Study, found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each comparison and column a − b, paired by seed."""
    return [
        {"a": a, "b": b, "columns": {c.title: difference(found, a, b, c) for c in study.columns}}
        for a, b in study.compared
    ]


def point_values(study: Study, found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each point of a study: series, label, ratio of seconds per step, and difference in the first column."""
    seconds = {name: cost["seconds"] for name, cost in found["costs"].items()}
    return [
        {
            "series": point.series,
            "label": point.label,
            "ratio": seconds[point.a] / seconds[point.b],
            "difference": difference(found, point.a, point.b, study.columns[0]),
        }
        for point in study.points
    ]
