"""Means over seeds with their intervals, and what can be said of a difference."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


def half_width(spread: float, count: int, level: float = 0.95) -> float:
    """Half of Student's interval of a mean of ``count`` values with this standard deviation."""
    from scipy.stats import t

    return float(t.ppf((1 + level) / 2, count - 1) * spread / math.sqrt(count))


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and half the width of its interval; NaN for a single seed, or without a value."""

    values: tuple[float, ...]
    level: float = 0.95

    @property
    def mean(self) -> float:
        return float(np.mean(self.values)) if self.values else math.nan

    @property
    def half_width(self) -> float:
        count = len(self.values)
        return half_width(float(np.std(self.values, ddof=1)), count, self.level) if count > 1 else math.nan

    @property
    def highest(self) -> float:
        """Where a plot of the values and the interval ends; 0 without a value."""
        ends = (*self.values, self.mean + self.half_width)
        return max((end for end in ends if not math.isnan(end)), default=0.0)

    def text(self, digits: int = 1) -> str:
        if math.isnan(self.mean):
            return "–"
        interval = "" if math.isnan(self.half_width) else f" ± {self.half_width:.{digits}f}"
        return f"{self.mean:.{digits}f}{interval}"

    def verdict(self, margin: float | None = None) -> str:
        """What the interval of a difference shows; ``margin``: within which both count as equal."""
        low, high = self.mean - self.half_width, self.mean + self.half_width
        if math.isnan(low):
            return "not shown"
        equal = margin is not None and -margin < low and high < margin
        if low > 0 or high < 0:
            return ("more" if low > 0 else "less") + (", within the margin" if equal else "")
        return "equal within the margin" if equal else "not shown"

    def __str__(self) -> str:
        return self.text()
