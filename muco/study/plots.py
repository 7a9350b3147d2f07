"""The plots of the studies, as SVG that follows the reader's light or dark theme."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from muco.study.design import Column, Study
from muco.study.results import Estimate, point_values, table

ROW, HEAD, PANEL, GAP, EDGE = 30, 64, 210, 26, 14  # px
BAND, BETWEEN = 4, 34  # panels in a row; px between two rows of them
LETTER = 7.2  # px, a wide guess
INK = (
    "text{{fill:{0}}}.soft{{fill:{1}}}.grid{{stroke:{2}}}.zero{{stroke:{1}}}"
    ".hollow{{fill:none;stroke:{1}}}.mark{{stroke:{3};fill:{3}}}"
)
LIGHT = INK.format("#1d2430", "#5c6675", "#dde1e7", "#2158c7")
DARK = INK.format("#e6e9ee", "#9aa5b4", "#343c48", "#7ea6ff")
SERIES = ("#4f7fe0", "#d9622b", "#2f9e56", "#a35be0", "#c2a01c", "#8a8f98")  # readable on white and on black
LINE = 20  # px, of the title
Place = Callable[[float], float]


def plot(study: Study, found: Mapping[str, Any]) -> str:
    """A study's plot: differences over the ratio of costs where it has points, else a panel per column."""
    return plot_points(study, found) if study.points else plot_table(study, found)


# ── a panel per column ───────────────────────────────────────────────────────────────────────────────────────────────


def plot_table(study: Study, found: Mapping[str, Any]) -> str:
    """A line per run; in each column a dot for the mean, a bar for the interval, faint dots for seeds.

    More columns than ``BAND`` stand in further bands below.
    """
    rows = table(study, found)
    bands = [study.columns[first : first + BAND] for first in range(0, len(study.columns), BAND)]
    names = max(len(row["name"]) for row in rows) * LETTER + EDGE + 12
    width = names + len(bands[0]) * (PANEL + GAP) + EDGE
    title = _title(study.question, width)
    first, band = HEAD + LINE * (len(title) - 1), ROW * len(rows) + 34
    parts = _begin(study.question, title, width, first + len(bands) * (band + BETWEEN) - BETWEEN)
    for number, columns in enumerate(bands):
        top = first + number * (band + BETWEEN)
        parts += [
            f'<text x="{names - 10:.0f}" y="{_y(place, top)}" dy="4" text-anchor="end">{escape(row["name"])}</text>'
            for place, row in enumerate(rows)
        ]
        for place, column in enumerate(columns):
            estimates = [row["columns"][column.title] for row in rows]
            parts += _panel(column, estimates, names + place * (PANEL + GAP), top, top + band)
    return "".join(parts) + "</svg>\n"


def _begin(question: str, title: Sequence[str], width: float, height: float) -> list[str]:
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'height="{height:.0f}" role="img" font-family="system-ui, sans-serif" font-size="13">',
        f"<title>{escape(question)}</title>",
        f"<style>{LIGHT}@media(prefers-color-scheme:dark){{{DARK}}}</style>",
        *(
            f'<text x="{EDGE}" y="{24 + LINE * number}" font-size="15" font-weight="600">{escape(line)}</text>'
            for number, line in enumerate(title)
        ),
    ]


def _title(question: str, width: float) -> list[str]:
    """The question in lines that fit."""
    lines = [""]
    for word in question.split():
        if lines[-1] and (len(lines[-1]) + 1 + len(word)) * LETTER * 1.15 > width - 2 * EDGE:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


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

    parts = [f'<text x="{left:.1f}" y="{top - 10}" font-weight="600">{escape(column.title)}</text>']
    for value in (0, 25, 50, 75, 100) if column.percent else _ticks(low, high, 4):
        at = f"{x(value):.1f}"
        parts.append(f'<line class="grid" x1="{at}" x2="{at}" y1="{top}" y2="{height - 26}"/>')
        parts.append(f'<text class="soft" x="{at}" y="{height - 10}" text-anchor="middle">{_number(value)}</text>')
    for place, estimate in enumerate(estimates):
        if math.isnan(estimate.mean):
            continue
        y, half = _y(place, top), estimate.half_width
        parts += [f'<circle class="mark" opacity=".35" cx="{x(v):.1f}" cy="{y}" r="3"/>' for v in estimate.values]
        if not math.isnan(half):
            ends = (f"{x(estimate.mean + side * half):.1f}" for side in (-1, 1))
            parts.append('<line class="mark" stroke-width="2" x1="{}" x2="{}" y1="{y}" y2="{y}"/>'.format(*ends, y=y))
        said = escape(estimate.text(column.digits))
        parts.append(
            f'<circle class="mark" cx="{x(estimate.mean):.1f}" cy="{y}" r="4.5"><title>{said}</title></circle>'
        )
    return parts


def _number(value: float) -> str:
    return f"{value:.3g}".replace("-", "−")


# ── lines ────────────────────────────────────────────────────────────────────────────────────────────────────────────

WIDE, TALL, MARGIN, FOOT = 620, 340, 66, 56  # px


@dataclass(frozen=True)
class Mark:
    """A point of a line, with half of its interval (NaN: unknown); points of one label have one shape."""

    x: float
    y: float
    half: float = math.nan
    label: str = ""


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


def chart(title: str, lines: Mapping[str, Sequence[Mark]], *, across: str, upwards: str, times: bool = False) -> str:
    """An SVG of some lines with their names beside; the y axis holds zero.

    Args:
        across, upwards: What the axes say.
        times: The x axis holds ratios, from 1 on, and the y axis differences, with their signs.
    """
    lines = {name: [mark for mark in marks if not math.isnan(mark.y)] for name, marks in lines.items()}
    marks = [mark for own in lines.values() for mark in own] or [Mark(1, 0)]
    labels = list(dict.fromkeys(mark.label for mark in marks))
    names = max(map(len, [*lines, *labels])) * LETTER + 60
    width = MARGIN + WIDE + names
    heading = _title(title, width)
    top = HEAD + LINE * (len(heading) - 1)
    left_end, right_end = _across(marks, times)
    least, most = _upwards(marks)

    def x(value: float) -> float:
        return MARGIN + WIDE * (value - left_end) / (right_end - left_end)

    def y(value: float) -> float:
        return top + TALL * (most - min(max(value, least), most)) / (most - least)

    parts = [*_begin(title, heading, width, top + TALL + FOOT)]
    for value in _ticks(least, most):
        kind, at, said = "zero" if abs(value) < 1e-9 else "grid", f"{y(value):.1f}", _number(value)
        parts.append(f'<line class="{kind}" x1="{MARGIN}" x2="{MARGIN + WIDE}" y1="{at}" y2="{at}"/>')
        said = f"+{said}" if times and value > 1e-9 else said
        parts.append(f'<text class="soft" x="{MARGIN - 8}" y="{at}" dy="4" text-anchor="end">{said}</text>')
    for value in _ticks(left_end, right_end):
        at, said = f"{x(value):.1f}", f"{_number(value)}{' ×' if times else ''}"
        parts.append(f'<line class="grid" x1="{at}" x2="{at}" y1="{top}" y2="{top + TALL}"/>')
        parts.append(f'<text class="soft" x="{at}" y="{top + TALL + 18}" text-anchor="middle">{said}</text>')
    middle, foot = MARGIN + WIDE // 2, top + TALL + FOOT - 14
    parts.append(f'<text class="soft" x="{MARGIN}" y="{top - 12}">{escape(upwards)}</text>')
    parts.append(f'<text class="soft" x="{middle}" y="{foot}" text-anchor="middle">{escape(across)}</text>')
    for number, (name, own) in enumerate(lines.items()):
        ink, at = SERIES[number % len(SERIES)], top + 10 + number * 24
        parts += _line(name, sorted(own, key=lambda mark: mark.x), labels, x, y, ink)
        parts.append(f'<circle fill="{ink}" cx="{MARGIN + WIDE + 26}" cy="{at}" r="5"/>')
        parts.append(f'<text x="{MARGIN + WIDE + 38}" y="{at}" dy="4">{escape(name)}</text>')
    for number, label in enumerate(labels if len(labels) > 1 else []):
        at = top + 10 + (len(lines) + number + 1) * 24
        parts.append(_sign(number, MARGIN + WIDE + 26, at, 'class="hollow"'))
        parts.append(f'<text x="{MARGIN + WIDE + 38}" y="{at}" dy="4">{escape(label)}</text>')
    return "".join(parts) + "</svg>\n"


def _sign(number: int, x: float, y: float, ink: str, said: str = "") -> str:
    """A dot, a square or a diamond, by the place of a label among all of them."""
    title = f"<title>{said}</title>" if said else ""
    if number % 3 == 0:
        return f'<circle {ink} cx="{x:.1f}" cy="{y:.1f}" r="5">{title}</circle>'
    turn = f' transform="rotate(45 {x:.1f} {y:.1f})"' if number % 3 == 2 else ""
    return f'<rect {ink} x="{x - 4.5:.1f}" y="{y - 4.5:.1f}" width="9" height="9"{turn}>{title}</rect>'


def _line(name: str, marks: Sequence[Mark], labels: Sequence[str], x: Place, y: Place, ink: str) -> list[str]:
    path = " ".join(f"{x(mark.x):.1f},{y(mark.y):.1f}" for mark in marks)
    parts = [f'<polyline fill="none" stroke="{ink}" stroke-width="1.5" opacity=".6" points="{path}"/>']
    for mark in marks:
        at, half = f"{x(mark.x):.1f}", 0.0 if math.isnan(mark.half) else mark.half
        low, high = f"{y(mark.y - half):.1f}", f"{y(mark.y + half):.1f}"
        parts.append(f'<line stroke="{ink}" stroke-width="2" x1="{at}" x2="{at}" y1="{low}" y2="{high}"/>')
        said = escape(f"{name}, {mark.label or mark.x}: {mark.y:.1f}" + (f" ± {half:.1f}" if half else ""))
        parts.append(_sign(labels.index(mark.label), x(mark.x), y(mark.y), f'fill="{ink}"', said))
    return parts


def _across(marks: Sequence[Mark], times: bool) -> tuple[float, float]:
    low, high = min(mark.x for mark in marks), max(mark.x for mark in marks)
    low = min(low, 1.0) if times else low
    pad = 0.06 * (high - low or 1.0)
    return low - pad, high + pad


def _upwards(marks: Sequence[Mark]) -> tuple[float, float]:
    """What has to be in the picture: zero, all values, and their intervals as far as they say something."""
    ends = [0.0]
    for mark in marks:
        half = 0.0 if math.isnan(mark.half) else min(mark.half, 40.0)
        ends += [mark.y - half, mark.y + half]
    pad = max(0.06 * (max(ends) - min(ends)), 1e-6)
    return min(ends) - (pad if min(ends) < 0 else 0), max(ends) + pad


def _ticks(low: float, high: float, most: int = 8) -> list[float]:
    """Round numbers within, about so many at most."""
    size = 10 ** math.floor(math.log10((high - low) / most))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if (high - low) / (size * factor) <= most)
    return [number * step for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
