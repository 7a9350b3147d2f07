"""Charts as SVG: lines with intervals, and a falling curve. Colours follow the light or dark theme of the reader."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

HEAD, EDGE = 64, 14  # px above a chart, and beside its title
LETTER = 7.2  # px, a wide guess
LINE = 20  # px, of the title
WIDE, TALL, MARGIN, FOOT = 620, 340, 66, 56  # px, of a chart of lines
LEFT, RIGHT, TOP, BOTTOM = 30, 12, 34, 50  # px around a falling curve
INK = "text{{fill:{0}}}.soft{{fill:{1}}}.grid{{stroke:{2}}}.zero{{stroke:{1}}}.mark{{stroke:{3};fill:{3}}}"
LIGHT = INK.format("#1d2430", "#5c6675", "#dde1e7", "#2158c7")
DARK = INK.format("#e6e9ee", "#9aa5b4", "#343c48", "#7ea6ff")
SERIES = ("#4f7fe0", "#d9622b", "#2f9e56", "#a35be0", "#c2a01c", "#8a8f98")  # readable on white and on black
Place = Callable[[float], float]  # a value -> px


def element(name: str, content: str = "", **attributes: str | float | None) -> str:
    """One element of SVG.

    Args:
        content: SVG within it.
        attributes: "_" in a name becomes "-", one at its end goes (``class_``). Floats get one decimal; None: left out.
    """
    said = name
    for key, value in attributes.items():
        if value is not None:
            said += f' {key.rstrip("_").replace("_", "-")}="{f"{value:.1f}" if isinstance(value, float) else value}"'
    return f"<{said}>{content}</{name}>" if content else f"<{said}/>"


def label(words: str, **attributes: str | float | None) -> str:
    """Plain text; see :func:`element`."""
    return element("text", escape(words), **attributes)


def rising(kind: str, x: float, low: float, high: float) -> str:
    """A vertical line."""
    return element("line", class_=kind, x1=x, x2=x, y1=low, y2=high)


def level(kind: str, y: float, left: float, right: float) -> str:
    """A horizontal line."""
    return element("line", class_=kind, x1=left, x2=right, y1=y, y2=y)


def figure(title: str, lines: Sequence[str], width: float, height: float) -> list[str]:
    """The beginning of a figure of its own file, with its title in lines; it ends with ``</svg>``."""
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'height="{height:.0f}" role="img" font-family="system-ui, sans-serif" font-size="13">',
        f"<title>{escape(title)}</title>",
        f"<style>{LIGHT}@media(prefers-color-scheme:dark){{{DARK}}}</style>",
        *(label(line, x=EDGE, y=24 + LINE * n, font_size="15", font_weight="600") for n, line in enumerate(lines)),
    ]


def wrapped(title: str, width: float) -> list[str]:
    """A title in lines that fit."""
    lines = [""]
    for word in title.split():
        if lines[-1] and (len(lines[-1]) + 1 + len(word)) * LETTER * 1.15 > width - 2 * EDGE:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def number(value: float) -> str:
    """Three digits, with a true minus."""
    return f"{value:.3g}".replace("-", "−")


def step_between(span: float, most: int) -> float:
    """The smallest round step that divides a span into at most ``most`` parts."""
    power = 10.0 ** math.floor(math.log10(span / most))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= span / most * (1 - 1e-9))


def ticks(low: float, high: float, most: int = 8) -> list[float]:
    """Round numbers from low to high, about ``most`` of them at most."""
    step = step_between(high - low, most)
    return [place * step for place in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def ticks_beyond(top: float, most: int = 6) -> list[float]:
    """Round numbers from 0 to the first one that is at least ``top``, at most ``most`` + 1 of them."""
    step = step_between(top, most)
    return [round(step * place, 10) for place in range(math.ceil(top / step - 1e-9) + 1)]


@dataclass(frozen=True)
class Mark:
    """A point of a line, with half of its interval (NaN: unknown), and the values that it is the mean of, if shown."""

    x: float
    y: float
    half: float = math.nan
    values: tuple[float, ...] = ()


def chart(title: str, lines: Mapping[str, Sequence[Mark]], *, across: str, upwards: str) -> str:
    """An SVG of lines with their names beside; ``across`` and ``upwards`` name the axes; the y axis holds zero.

    When every colour is used, further lines are dashed, with square marks.
    """
    lines = {name: [mark for mark in marks if not math.isnan(mark.y)] for name, marks in lines.items()}
    marks = [mark for own in lines.values() for mark in own] or [Mark(1, 0)]
    names = max(map(len, lines)) * LETTER + 60
    width = MARGIN + WIDE + names
    heading = wrapped(title, width)
    top = HEAD + LINE * (len(heading) - 1)
    low, high = min(mark.x for mark in marks), max(mark.x for mark in marks)
    pad = 0.06 * (high - low or 1.0)
    left_end, right_end = low - pad, high + pad
    least, most = _upwards(marks)
    right, bottom = MARGIN + WIDE, top + TALL

    def x(value: float) -> float:
        return MARGIN + WIDE * (value - left_end) / (right_end - left_end)

    def y(value: float) -> float:
        return top + TALL * (most - min(max(value, least), most)) / (most - least)

    parts = figure(title, heading, width, bottom + FOOT)
    for value in ticks(least, most):
        parts.append(level("zero" if abs(value) < 1e-9 else "grid", y(value), MARGIN, right))
        parts.append(label(number(value), class_="soft", x=MARGIN - 8, y=y(value), dy="4", text_anchor="end"))
    for value in ticks(left_end, right_end):
        parts.append(rising("grid", x(value), top, bottom))
        parts.append(label(number(value), class_="soft", x=x(value), y=bottom + 18, text_anchor="middle"))
    parts.append(label(upwards, class_="soft", x=MARGIN, y=top - 12))
    parts.append(label(across, class_="soft", x=MARGIN + WIDE // 2, y=bottom + FOOT - 14, text_anchor="middle"))
    for place, (name, own) in enumerate(lines.items()):
        ink, square, at = SERIES[place % len(SERIES)], place // len(SERIES) % 2 == 1, top + 10 + place * 24
        parts += _line(name, sorted(own, key=lambda mark: mark.x), x, y, ink, square)
        parts.append(_dot(right + 26, at, square, fill=ink))
        parts.append(label(name, x=right + 38, y=at, dy="4"))
    return "".join(parts) + "</svg>\n"


def _dot(x: float, y: float, square: bool, content: str = "", **attributes: str | float | None) -> str:
    if square:
        return element("rect", content, **attributes, x=x - 4.5, y=y - 4.5, width=9, height=9)
    return element("circle", content, **attributes, cx=x, cy=y, r=4.5)


def _line(name: str, marks: Sequence[Mark], x: Place, y: Place, ink: str, square: bool) -> list[str]:
    path = " ".join(f"{x(mark.x):.1f},{y(mark.y):.1f}" for mark in marks)
    dashes = "6 4" if square else None
    drawn = {"stroke": ink, "stroke_width": "1.5", "stroke_dasharray": dashes, "opacity": ".6"}
    parts = [element("polyline", fill="none", **drawn, points=path)]
    for mark in marks:
        at, half = x(mark.x), 0.0 if math.isnan(mark.half) else mark.half
        low, high = y(mark.y - half), y(mark.y + half)
        parts.append(element("line", stroke=ink, stroke_width=2, x1=at, x2=at, y1=low, y2=high))
        parts += [element("circle", fill=ink, opacity=".3", cx=at, cy=y(value), r=2.5) for value in mark.values]
        said = f"{name}, {number(mark.x)}: {mark.y:.1f}" + (f" ± {half:.1f}" if half else "")
        parts.append(_dot(at, y(mark.y), square, f"<title>{escape(said)}</title>", fill=ink))
    return parts


def _upwards(marks: Sequence[Mark]) -> tuple[float, float]:
    """The range of the picture: zero, all values, and their intervals up to a width that says something.

    Below zero only where a value is.
    """
    ends = [0.0]
    for mark in marks:
        half = 0.0 if math.isnan(mark.half) else min(mark.half, 40.0)
        ends += [mark.y - half, mark.y + half]
    low = min(ends) if any(mark.y < 0 for mark in marks) else 0.0
    pad = max(0.06 * (max(ends) - low), 1e-6)
    return low - (pad if low < 0 else 0), max(ends) + pad


def loss_curve(
    points: Sequence[tuple[int, float]], steps: int, chance: float, *, width: int = 880, height: int = 340
) -> str:
    """An ``<svg>`` of (step, loss in nats) for a page; colours and fonts are those of the page's style.

    Args:
        points: In the order of the steps; may be empty.
        steps: Steps in all, the right end of the axis.
        chance: Loss in nats of a model that cannot tell its candidates apart.
        width, height: Size in px at which the text has its natural size.
    """
    y_ticks = ticks_beyond(max([chance, *(loss for _, loss in points)]))
    right, bottom = width - RIGHT, height - BOTTOM

    def x(step: float) -> float:
        return LEFT + step / steps * (right - LEFT)

    def y(loss: float) -> float:
        return bottom - loss / y_ticks[-1] * (bottom - TOP)

    parts = [label("nats", x=0, y=14, text_anchor="start")]
    parts.append(label("training steps", x=right, y=height - 4, text_anchor="end"))
    for tick in y_ticks:
        parts.append(level("grid", y(tick), LEFT, right))
        parts.append(label(f"{tick:g}", x=LEFT - 9, y=y(tick) + 4.5, text_anchor="end"))
    for tick in ticks_beyond(steps, most=width // 110):
        if tick <= steps:
            parts.append(rising("axis", x(tick), y(0), y(0) + 6))
            parts.append(label(f"{tick:g}", x=x(tick), y=y(0) + 23, text_anchor="middle"))
    parts.append(level("axis", y(0), LEFT, right))
    line = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in points)
    if points:
        first, last = points[0][0], points[-1][0]
        corners = f"{x(first):.1f},{y(0):.1f} {line} {x(last):.1f},{y(0):.1f}"
        parts.append(element("polygon", class_="area", points=corners))
    parts.append(level("chance", y(chance), LEFT, right))
    parts.append(label(f"chance {chance:.2f}", class_="strong", x=right, y=y(chance) - 8, text_anchor="end"))
    if points:
        last, end = points[-1]
        parts.append(element("polyline", class_="loss", points=line))
        for step, loss in points:
            said = f"<title>step {step}: {loss:.3f} nats</title>"
            parts.append(element("circle", said, class_="point", cx=x(step), cy=y(loss), r=5))
        parts.append(element("circle", class_="dot", cx=x(last), cy=y(end), r=5))
        parts.append(label(f"{end:.2f}", class_="strong", x=x(last), y=y(end) - 13, text_anchor="end"))
    said = f"Loss over {steps} training steps; chance is {chance:.2f} nats."
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{said}">{"".join(parts)}</svg>'
