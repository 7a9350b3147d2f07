"""The plots of the studies, as SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from muco.base.svg import EDGE, HEAD, LETTER, LINE, Mark, chart, element, figure, label, number, rising, ticks, wrapped
from muco.study.design import Column, Study
from muco.study.results import Estimate, point_values, table

ROW, PANEL, GAP = 30, 210, 26  # px
BAND, BETWEEN = 4, 34  # panels in a row; px between two rows of them


def plot(study: Study, found: Mapping[str, Any]) -> str:
    """A study's plot: differences over the ratio of costs where it has points, else a panel per column."""
    return plot_points(study, found) if study.points else plot_table(study, found)


# ── a panel per column ───────────────────────────────────────────────────────────────────────────────────────────────


def plot_table(study: Study, found: Mapping[str, Any]) -> str:
    """A line per run; in each column a dot for the mean, a bar for the interval, faint dots for seeds.

    More columns than ``BAND`` are in further bands below.
    """
    rows = table(study, found)
    bands = [study.columns[first : first + BAND] for first in range(0, len(study.columns), BAND)]
    names = max(len(row["name"]) for row in rows) * LETTER + EDGE + 12
    width = names + len(bands[0]) * (PANEL + GAP) + EDGE
    title = wrapped(study.question, width)
    first, band = HEAD + LINE * (len(title) - 1), ROW * len(rows) + 34
    parts = figure(study.question, title, width, first + len(bands) * (band + BETWEEN) - BETWEEN)
    for place, columns in enumerate(bands):
        top = first + place * (band + BETWEEN)
        for row, line in enumerate(rows):
            parts.append(label(line["name"], x=f"{names - 10:.0f}", y=_y(row, top), dy="4", text_anchor="end"))
        for column, shown in enumerate(columns):
            estimates = [row["columns"][shown.title] for row in rows]
            parts += _panel(shown, estimates, names + column * (PANEL + GAP), top, top + band)
    return "".join(parts) + "</svg>\n"


def _y(place: int, top: float) -> float:
    return top + ROW * place + ROW // 2


def _range(column: Column, estimates: Sequence[Estimate]) -> tuple[float, float]:
    if column.percent:
        return 0.0, 100.0
    values = [v for e in estimates for v in e.values if not math.isnan(v)]
    low, high = min([0.0, *values]) * 1.05, max([0.0, *values]) * 1.05
    return (low, high) if high > low else (0.0, 1.0)


def _panel(column: Column, estimates: Sequence[Estimate], left: float, top: float, height: float) -> list[str]:
    low, high = _range(column, estimates)

    def x(value: float) -> float:
        return left + PANEL * (min(max(value, low), high) - low) / (high - low)

    parts = [label(column.title, x=left, y=top - 10, font_weight="600")]
    for value in (0, 25, 50, 75, 100) if column.percent else ticks(low, high, 4):
        parts.append(rising("grid", x(value), top, height - 26))
        parts.append(label(number(value), class_="soft", x=x(value), y=height - 10, text_anchor="middle"))
    for place, estimate in enumerate(estimates):
        if math.isnan(estimate.mean):
            continue
        y, half = _y(place, top), estimate.half_width
        for value in estimate.values:
            parts.append(element("circle", class_="mark", opacity=".35", cx=x(value), cy=y, r=3))
        if not math.isnan(half):
            ends = {"x1": x(estimate.mean - half), "x2": x(estimate.mean + half)}
            parts.append(element("line", class_="mark", stroke_width=2, **ends, y1=y, y2=y))
        said = f"<title>{escape(estimate.text(column.digits))}</title>"
        parts.append(element("circle", said, class_="mark", cx=x(estimate.mean), cy=y, r="4.5"))
    return parts


# ── lines ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def plot_points(study: Study, found: Mapping[str, Any]) -> str:
    """The ratio of seconds per step to the right, the difference in points upwards; a line per series."""
    lines: dict[str, list[Mark]] = {}
    for point in point_values(study, found):
        estimate = point["difference"]
        mark = Mark(point["ratio"], estimate.mean, estimate.half_width, point["label"])
        lines.setdefault(point["series"], []).append(mark)
    return chart(
        study.question,
        lines,
        across="seconds of a step with seven turns, over those of a step with one",
        upwards=f"{study.columns[0].title}: difference in points, 95 % interval; above 0 seven turns are better",
        times=True,
    )
