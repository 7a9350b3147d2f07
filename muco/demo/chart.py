"""The loss curve as inline SVG: axes with ticks, and the level of chance as a line to measure it by."""

from __future__ import annotations

import math
from collections.abc import Sequence

LEFT, RIGHT, TOP, BOTTOM = 30, 12, 34, 50  # px around the plot


def loss_curve(
    points: Sequence[tuple[int, float]], steps: int, chance: float, *, width: int = 880, height: int = 340
) -> str:
    """An ``<svg>`` of (step, loss in nats); colours and fonts are those of the page's style.

    Args:
        points: In the order of the steps; may be empty.
        steps: Steps in all, the right end of the axis.
        chance: Loss in nats of a model that cannot tell its candidates apart.
        width, height: Size in px at which the text has its natural size.
    """
    y_ticks = ticks(max([chance, *(loss for _, loss in points)]))
    right, bottom = width - RIGHT, height - BOTTOM

    def x(step: float) -> str:
        return f"{LEFT + step / steps * (right - LEFT):.1f}"

    def y(loss: float, up: float = 0) -> str:
        return f"{bottom - loss / y_ticks[-1] * (bottom - TOP) - up:.1f}"

    parts = [_text(0, 14, "nats", "start"), _text(right, height - 4, "training steps", "end")]
    for tick in y_ticks:
        parts.append(_line("grid", LEFT, right, y(tick), y(tick)))
        parts.append(_text(LEFT - 9, y(tick, -4.5), f"{tick:g}", "end"))
    for tick in ticks(steps, most=width // 110):
        if tick <= steps:
            parts.append(_line("axis", x(tick), x(tick), y(0), y(0, -6)))
            parts.append(_text(x(tick), y(0, -23), f"{tick:g}", "middle"))
    parts.append(_line("axis", LEFT, right, y(0), y(0)))
    if points:
        (first, _), (last, end) = points[0], points[-1]
        line = " ".join(f"{x(step)},{y(loss)}" for step, loss in points)
        parts.append(f'<polygon class="area" points="{x(first)},{y(0)} {line} {x(last)},{y(0)}"/>')
    parts.append(_line("chance", LEFT, right, y(chance), y(chance)))
    parts.append(_text(right, y(chance, 8), f"chance {chance:.2f}", "end", "strong"))
    if points:
        parts.append(f'<polyline class="loss" points="{line}"/>')
        parts += [_point(x(step), y(loss), f"step {step}: {loss:.3f} nats") for step, loss in points]
        parts.append(f'<circle class="dot" cx="{x(last)}" cy="{y(end)}" r="5"/>')
        parts.append(_text(x(last), y(end, 13), f"{end:.2f}", "end", "strong"))
    label = f"Loss over {steps} training steps; chance is {chance:.2f} nats."
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _line(kind: str, x1: object, x2: object, y1: object, y2: object) -> str:
    return f'<line class="{kind}" x1="{x1}" x2="{x2}" y1="{y1}" y2="{y2}"/>'


def _text(x: object, y: object, text: str, anchor: str, kind: str = "") -> str:
    return f'<text class="{kind}" x="{x}" y="{y}" text-anchor="{anchor}">{text}</text>'


def _point(x: str, y: str, title: str) -> str:
    return f'<circle class="point" cx="{x}" cy="{y}" r="5"><title>{title}</title></circle>'


def ticks(top: float, most: int = 6) -> list[float]:
    """Round numbers from 0 to the first one that is at least ``top``, at most ``most`` + 1 of them."""
    raw = top / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * (1 - 1e-9))
    return [round(step * i, 10) for i in range(math.ceil(top / step - 1e-9) + 1)]
