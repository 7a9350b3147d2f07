"""What a study found: means over seeds with 95 % intervals, differences paired by seed, a plot and a page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from muco.study.design import Column, Study

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and half the width of its 95 % interval; NaN where there is one seed only."""

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

    def __str__(self) -> str:
        if math.isnan(self.half_width):
            return f"{self.mean:.1f}"
        return f"{self.mean:.1f} ± {self.half_width:.1f}"


def values_of(found: Mapping[str, Any], name: str, column: Column) -> tuple[float, ...]:
    """A column of a run, one value per seed, in % if it is a share."""
    results = [run["result"]["scores"] for run in found["runs"] if run["name"] == name]
    factor = 100.0 if column.percent else 1.0
    return tuple(factor * _mean(scores, column) for scores in results)


def _mean(scores: Mapping[str, float | None], column: Column) -> float:
    """NaN where a run was too short to say it."""
    return float(np.mean(np.array([scores[score] for score in column.scores], dtype=float)))


def table(study: Study, found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row per shown run: name, an :class:`Estimate` per column, operations in 10¹² and seconds (means)."""
    rows = []
    for run in (run for run in study.runs if run.shown):
        results = [entry["result"] for entry in found["runs"] if entry["name"] == run.name]
        seconds = [result["seconds"] for result in results if result["seconds"] is not None]
        rows.append(
            {
                "name": run.name,
                "columns": {c.title: Estimate(values_of(found, run.name, c)) for c in study.columns},
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
            "tflops": row["tflops"],
            "seconds": _known(row["seconds"]),
        }
        for row in table(study, found)
    ]


def _known(number: float) -> float | None:
    return None if math.isnan(number) else number


def differences(study: Study, found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each comparison and column a − b, paired by seed."""
    return [
        {
            "a": a,
            "b": b,
            "columns": {
                c.title: Estimate(
                    tuple(x - y for x, y in zip(values_of(found, a, c), values_of(found, b, c), strict=True))
                )
                for c in study.columns
            },
        }
        for a, b in study.compared
    ]


def write_report(study: Study, found: Mapping[str, Any], output: Path, command: str) -> Path:
    """Writes ``plot.svg`` and ``README.md`` and returns the latter."""
    (output / "plot.svg").write_text(plot(study, found), encoding="utf-8")
    page = output / "README.md"
    page.write_text(_page(study, found, command), encoding="utf-8")
    return page


def print_study(study: Study, found: Mapping[str, Any], console: Console) -> None:
    from rich.table import Table

    shown = Table(title=study.question, title_justify="left")
    shown.add_column("run")
    for column in study.columns:
        shown.add_column(column.title, justify="right")
    for row in table(study, found):
        shown.add_row(row["name"], *map(str, row["columns"].values()))
    console.print(shown)


def _page(study: Study, found: Mapping[str, Any], command: str) -> str:
    seeds, scale = found["asked"]["seeds"], found["asked"]["scale"]
    result = found["runs"][0]["result"]
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items() if number)
    titles = [column.title for column in study.columns]
    rows = [
        [r["name"], *map(str, r["columns"].values()), f"{r['tflops']:.1f}", f"{r['seconds']:.0f}"]
        for r in table(study, found)
    ]
    lines = [
        f"# {study.question}",
        "",
        f"Made by `{command}`; {seeds} seeds, {'all' if scale == 1 else f'{scale:g} ×'} data and steps. {versions}.",
        "",
        "hit@1 in % on held-out images, mean over seeds ± half of the 95 % interval (Student's t).",
        "",
        *_markdown(["run", *titles, "TFLOP", "seconds"], rows),
        "",
        "![The table as a plot](plot.svg)",
        "",
    ]
    if study.compared:
        rows = [[f"{d['a']} − {d['b']}", *map(str, d["columns"].values())] for d in differences(study, found)]
        lines += ["Differences in points, paired by seed:", "", *_markdown(["difference", *titles], rows), ""]
    lines += [f"- {note}" for note in study.notes]
    lines.append("- Seconds are of training, on the machine and beside whatever else it did; operations are counted.")
    return "\n".join(lines) + "\n"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(head)} |",
        f"|---|{'---:|' * (len(head) - 1)}",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


# ── the plot ─────────────────────────────────────────────────────────────────────────────────────────────────────────

ROW, HEAD, PANEL, GAP, EDGE = 30, 64, 210, 26, 14  # px
INKS = "text{fill:#1d2430}.soft{fill:#5c6675}.grid{stroke:#dde1e7}.mark{stroke:#2158c7;fill:#2158c7}"
DARK = "text{fill:#e6e9ee}.soft{fill:#9aa5b4}.grid{stroke:#343c48}.mark{stroke:#7ea6ff;fill:#7ea6ff}"


def plot(study: Study, found: Mapping[str, Any]) -> str:
    """An SVG: a panel per column, a line per run; a dot for the mean, a bar for the interval, faint dots for seeds."""
    rows = table(study, found)
    names = max(len(row["name"]) for row in rows) * 7.2 + EDGE + 12
    width, height = names + len(study.columns) * (PANEL + GAP) + EDGE, HEAD + ROW * len(rows) + 34
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" width="{width:.0f}" '
        f'height="{height}" role="img" font-family="system-ui, sans-serif" font-size="13">',
        f"<title>{escape(study.question)}</title>",
        f"<style>{INKS}@media(prefers-color-scheme:dark){{{DARK}}}</style>",
        f'<text x="{EDGE}" y="24" font-size="15" font-weight="600">{escape(study.question)}</text>',
    ]
    parts += [
        f'<text x="{names - 10:.0f}" y="{_y(place)}" dy="4" text-anchor="end">{escape(row["name"])}</text>'
        for place, row in enumerate(rows)
    ]
    for place, column in enumerate(study.columns):
        estimates = [row["columns"][column.title] for row in rows]
        parts += _panel(column, estimates, names + place * (PANEL + GAP), height)
    return "".join(parts) + "</svg>\n"


def _y(place: int) -> int:
    return HEAD + ROW * place + ROW // 2


def _panel(column: Column, estimates: Sequence[Estimate], left: float, height: int) -> list[str]:
    top = 100.0 if column.percent else max([0.0, *(v for e in estimates for v in e.values if v == v)]) * 1.05 or 1.0

    def x(value: float) -> float:
        return left + PANEL * min(max(value, 0.0), top) / top

    parts = [f'<text x="{left:.1f}" y="{HEAD - 10}" font-weight="600">{escape(column.title)}</text>']
    for tick in (0, 0.25, 0.5, 0.75, 1):
        at = f"{x(tick * top):.1f}"
        parts.append(f'<line class="grid" x1="{at}" x2="{at}" y1="{HEAD}" y2="{height - 26}"/>')
        parts.append(f'<text class="soft" x="{at}" y="{height - 10}" text-anchor="middle">{tick * top:.3g}</text>')
    for place, estimate in enumerate(estimates):
        if math.isnan(estimate.mean):
            continue
        y, half = _y(place), estimate.half_width
        parts += [f'<circle class="mark" opacity=".35" cx="{x(v):.1f}" cy="{y}" r="3"/>' for v in estimate.values]
        if not math.isnan(half):
            low, high = (f"{x(estimate.mean + side * half):.1f}" for side in (-1, 1))
            parts.append(f'<line class="mark" stroke-width="2" x1="{low}" x2="{high}" y1="{y}" y2="{y}"/>')
        parts.append(
            f'<circle class="mark" cx="{x(estimate.mean):.1f}" cy="{y}" r="4.5"><title>{estimate}</title></circle>'
        )
    return parts
