"""The page of a study: a table, a plot, differences and notes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from muco.base.files import write_text
from muco.base.json_text import finite
from muco.base.machine import machine_in_words, versions_in_words
from muco.base.svg import EDGE, HEAD, LETTER, LINE, Mark, chart, element, figure, label, number, rising, ticks, wrapped
from muco.base.tables import markdown_table, print_whole, table_of_numbers
from muco.study.design import Column, Curve, Study
from muco.study.estimate import Estimate


def values_of(found: Mapping[str, Any], name: str, column: Column) -> tuple[float, ...]:
    """A column of a run, one value per seed, shares in %; NaN if there is none."""
    runs = [run["result"]["scores"] for run in found["runs"] if run["name"] == name]
    scores = np.array([[each.get(score) for score in column.scores] for each in runs], dtype=float)
    return tuple((scores.mean(axis=1) * (100.0 if column.percent else 1.0)).tolist())


def table(study: Study, found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row per shown run: name, an :class:`Estimate` per column, steps, operations in 10¹² and seconds (means)."""
    rows = []
    for name in (run.name for run in study.runs if run.shown):
        results = [entry["result"] for entry in found["runs"] if entry["name"] == name]
        seconds = [result["seconds"] for result in results if result["seconds"] is not None]
        rows.append(
            {
                "name": name,
                "columns": {c.title: Estimate(values_of(found, name, c)) for c in study.columns},
                "steps": float(np.mean([result["steps"] for result in results])),
                "tflops": float(np.mean([result["flops"] for result in results])) / 1e12,
                "seconds": float(np.mean(seconds)) if seconds else math.nan,
            }
        )
    return rows


def table_as_json(study: Study, found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """:func:`table` for JSON; None: unknown."""

    def plain(each: Estimate) -> dict[str, Any]:
        return {"mean": each.mean, "half_width": each.half_width, "values": list(each.values)}

    rows = table(study, found)
    return finite([row | {"columns": {title: plain(e) for title, e in row["columns"].items()}} for row in rows])


def _difference(found: Mapping[str, Any], a: str, b: str, column: Column, level: float) -> Estimate:
    pairs = zip(values_of(found, a, column), values_of(found, b, column), strict=True)
    return Estimate(tuple(x - y for x, y in pairs), level)


def differences(study: Study, found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each comparison and column a − b, paired by seed; the first column's at the study's level."""
    levels = [study.level, *[0.95] * (len(study.columns) - 1)]
    columns = [
        {c.title: _difference(found, *pair, c, level) for c, level in zip(study.columns, levels, strict=True)}
        for pair in study.compared
    ]
    return [{"a": a, "b": b, "columns": each} for (a, b), each in zip(study.compared, columns, strict=True)]


def curves(study: Study, found: Mapping[str, Any]) -> dict[str, list[Mark]]:
    """By shown run, its score in % along the seconds of its training, as a step was measured before the runs."""
    lines: dict[str, list[Mark]] = {}
    for run in (run for run in study.runs if run.shown and not run.fixed):
        each = _curves_of(found, run.name)
        marks = lines.setdefault(run.name, [])
        for points in zip(*each, strict=True):
            estimate = Estimate(tuple(score for _, score in points))
            marks.append(Mark(points[0][0], estimate.mean, estimate.half_width, values=estimate.values))
    return lines


def _curves_of(found: Mapping[str, Any], name: str) -> list[list[tuple[float, float]]]:
    """Of each seed of a run: seconds and scores in %."""
    seconds = found["costs"][name]["seconds"]
    results = [entry["result"] for entry in found["runs"] if entry["name"] == name]
    return [[(step * seconds, 100 * score) for step, score in result["curve"]] for result in results]


def reached(points: Sequence[tuple[float, float]], score: float) -> float:
    """The seconds at which a curve first reaches a score, straight between its points; NaN: never.

    A run that is there at its first point took at most as long as that.
    """
    before = points[0]
    for seconds, found in points:
        if found >= score:
            rise = found - before[1]
            return before[0] + (seconds - before[0]) * ((score - before[1]) / rise if rise else 1.0)
        before = seconds, found
    return math.nan


ROW, PANEL, GAP = 30, 210, 26  # px
BAND, BETWEEN = 4, 34  # panels in a row; px between two rows of them
SCALES = {20: 5, 50: 10, 100: 25}  # the end of an axis of shares, in %, and what is between its lines


def plot(study: Study, found: Mapping[str, Any]) -> str:
    """A study's plot as SVG, a panel per column, ``BAND`` in a row.

    A panel has a line per run: a dot for the mean, a bar for the interval, faint dots for seeds.
    """
    rows = table(study, found)
    bands = [study.columns[first : first + BAND] for first in range(0, len(study.columns), BAND)]
    names = max(len(row["name"]) for row in rows) * LETTER + EDGE + 12
    width = names + len(bands[0]) * (PANEL + GAP) + EDGE
    title = wrapped(study.question, width)
    shares = [row["columns"][column.title] for row in rows for column in study.columns if column.percent]
    end = next((end for end in SCALES if all(share.highest <= end for share in shares)), 100)
    first, band = HEAD + LINE * (len(title) - 1), ROW * len(rows) + 34
    parts = figure(study.question, title, width, first + len(bands) * (band + BETWEEN) - BETWEEN)
    for place, columns in enumerate(bands):
        top = first + place * (band + BETWEEN)
        for row, line in enumerate(rows):
            y = top + ROW * row + ROW // 2
            parts.append(label(line["name"], x=f"{names - 10:.0f}", y=y, dy="4", text_anchor="end"))
        for column, shown in enumerate(columns):
            estimates = [row["columns"][shown.title] for row in rows]
            parts += _panel(shown, estimates, names + column * (PANEL + GAP), top, top + band, end)
    return "".join(parts) + "</svg>\n"


def _panel(
    column: Column, estimates: Sequence[Estimate], left: float, top: float, height: float, end: int
) -> list[str]:
    low, high = 0.0, float(end)  # of shares, the same in all panels
    if not column.percent:
        values = [0.0, *(v for e in estimates for v in e.values if not math.isnan(v))]
        low, high = (min(values) * 1.05, max(values) * 1.05) if any(values) else (0.0, 1.0)

    def x(value: float) -> float:
        return left + PANEL * (min(max(value, low), high) - low) / (high - low)

    parts = [label(column.title, x=left, y=top - 10, font_weight="600")]
    for value in range(0, end + 1, SCALES[end]) if column.percent else ticks(low, high, 4):
        parts.append(rising("grid", x(value), top, height - 26))
        parts.append(label(number(value), class_="soft", x=x(value), y=height - 10, text_anchor="middle"))
    for place, estimate in enumerate(estimates):
        if math.isnan(estimate.mean):
            continue
        y, half = top + ROW * place + ROW // 2, estimate.half_width
        parts += [element("circle", class_="mark", opacity=".35", cx=x(v), cy=y, r=3) for v in estimate.values]
        if not math.isnan(half):
            ends = {"x1": x(estimate.mean - half), "x2": x(estimate.mean + half)}
            parts.append(element("line", class_="mark", stroke_width=2, **ends, y1=y, y2=y))
        said = f"<title>{escape(estimate.text(column.digits))}</title>"
        parts.append(element("circle", said, class_="mark", cx=x(estimate.mean), cy=y, r="4.5"))
    return parts


def write_report(study: Study, found: Mapping[str, Any], output: Path, command: str) -> Path:
    """Writes ``plot.svg``, ``curves.svg`` if the study has curves, and ``README.md``, and returns the latter."""
    write_text(output / "plot.svg", plot(study, found))
    if study.curve:
        lines = curves(study, found)
        upwards = f"{study.columns[0].title}, %: mean, 95 % interval and every seed"
        write_text(output / "curves.svg", chart(study.question, lines, across="seconds of training", upwards=upwards))
    page = output / "README.md"
    write_text(page, _page(study, found, command))
    return page


def print_study(study: Study, found: Mapping[str, Any], console: Console) -> None:
    shown = table_of_numbers(study.question, ["run", *(column.title for column in study.columns)])
    for row in table(study, found):
        shown.add_row(row["name"], *_cells(study, row["columns"]))
    print_whole(shown, console)


def _cells(study: Study, estimates: Mapping[str, Estimate]) -> list[str]:
    return [estimates[column.title].text(column.digits) for column in study.columns]


def _page(study: Study, found: Mapping[str, Any], command: str) -> str:
    titles = [column.title for column in study.columns]
    rows = [
        [r["name"], *_cells(study, r["columns"]), f"{r['steps']:.0f}", f"{r['tflops']:.1f}", f"{r['seconds']:.0f}"]
        for r in table(study, found)
    ]
    lines = [f"# {study.question}", "", _made(found, command), ""]
    if study.registered:
        lines += ["Written down before the runs:", "", *(f"- {line}" for line in study.registered), ""]
    lines += [
        "hit@1 in %, or what a column says, on held-out images: mean over seeds ± half of the 95 % interval "
        "(Student's t).",
        "",
        *markdown_table(["run", *titles, "steps", "TFLOP", "seconds"], rows),
        "",
        "![The table as a plot](plot.svg)",
        "",
    ]
    if study.curve:
        lines += [*_reached(study, found, study.curve), "", "![The scores along the training](curves.svg)", ""]
    if study.compared:
        lines += [*_compared(study, found), ""]
    if study.grid:
        lines += [*_tuned(study, found), ""]
    if costs := {name: cost for name, cost in found.get("costs", {}).items() if name in study.exactly}:
        lines += [*_costs(costs), ""]
    lines += [f"- {note}" for note in study.notes]
    scored = ", with the scores on the way" if study.curve else ""
    lines.append(f"- Seconds are those of training{scored}, whatever else the machine did; operations are counted.")
    return "\n".join(lines) + "\n"


def _compared(study: Study, found: Mapping[str, Any]) -> list[str]:
    measure = study.columns[0].title
    titles = ["difference", *(column.title for column in study.columns)]
    judged = bool(study.registered)
    rows = []
    for d in differences(study, found):
        said = [d["columns"][measure].verdict(study.margin)] if judged else []
        rows.append([f"{d['a']} − {d['b']}", *_cells(study, d["columns"]), *said])
    how = ""
    if judged:
        how = (
            f" The intervals of '{measure}' hold together with 95 % ({len(study.compared)} comparisons, Bonferroni: "
            f"{study.level:.2%} each)"
        )
        how += f"; equal: within ± {study.margin:g} points." if study.margin is not None else "."
    head = [*titles, "shown"] if judged else titles
    return [f"Differences in points, paired by seed.{how}", "", *markdown_table(head, rows)]


def _reached(study: Study, found: Mapping[str, Any], curve: Curve) -> list[str]:
    rows = []
    for run in (run for run in study.runs if run.shown and not run.fixed):
        seconds = [reached(points, curve.reach) for points in _curves_of(found, run.name)]
        there = tuple(value for value in seconds if not math.isnan(value))
        rows.append([run.name, f"{len(there)} of {len(seconds)}", str(Estimate(there))])
    title = f"Seconds to {curve.reach:g} % of '{study.columns[0].title}', of the seeds that reached it:"
    return [title, "", *markdown_table(["run", "seeds", "seconds"], rows)]


def _tuned(study: Study, found: Mapping[str, Any]) -> list[str]:
    settings = list(study.grid.settings)
    rows = []
    for name, own in found["tuning"].items():
        rows.append([name, *(f"{100 * float(np.mean(own[one])):.1f}" for one in settings), found["chosen"][name]])
    seeds = f"{study.grid.seeds} seed{'s' if study.grid.seeds > 1 else ''}"
    title = f"Chosen for each run on the dev set, by '{study.columns[0].title}' of trainings with {seeds} of their own:"
    return [title, "", *markdown_table(["run", *settings, "chosen"], rows)]


def _made(found: Mapping[str, Any], command: str) -> str:
    asked = found["asked"]
    seeds, first, scale = asked["seeds"], asked.get("first_seed", 0), asked["scale"]
    results = [run["result"] for run in found["runs"]]
    on = ""
    if machines := [result["machine"] for result in results if "machine" in result]:  # not of before 2026-11-30
        threads = " or ".join(map(str, sorted({machine["threads"] for machine in machines})))
        on = f" On {machine_in_words(machines[0])}, threads of a run: {threads}."
    which = f"{seeds} seed{'s' if seeds > 1 else ''}" + (f", from {first} on" if first else "")
    data = f" of `{asked['data']}`, tested on `{asked['test']}`" if asked.get("data") else ""
    how_much = "all data and steps" if scale == 1 else f"{scale:g} × {'the steps' if data else 'data and steps'}"
    return f"Made by `{command}`; {which}, {how_much}{data}.{on} {versions_in_words(results[0]['versions'])}."


def _costs(costs: Mapping[str, Mapping[str, float]]) -> list[str]:
    rows = [
        [name, f"{cost['pairs']:.0f}", f"{cost['flops'] / 1e9:.1f}", f"{cost['seconds']:.3f}", f"{cost['spread']:.0%}"]
        for name, cost in costs.items()
    ]
    said = (
        "One step of each run, measured alone before the runs; it sets the number of steps of runs of equal cost. The "
        "same steps were timed in three rounds, and the fastest time of each step counts. The spread is how much "
        "longer the slowest round took than the fastest, because of other work on the machine. The seconds in the "
        "table above show how equal the trainings became:"
    )
    return [said, "", *markdown_table(["run", "pairs", "GFLOP", "seconds", "spread"], rows)]
