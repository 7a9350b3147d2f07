"""Scores of ranked lists with graded judgements, and the files in which others keep both.

Letters: k is the depth. *Relevant* is what a judgement gives a grade above 0. A list that is shorter than k is as if
wrong candidates followed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

Gain = Literal["linear", "exponential"]


def hit_at(found: Sequence[str], grades: Mapping[str, int], k: int) -> float:
    """1.0 if a relevant candidate is among the first k, else 0.0: what M-BEIR calls Recall@k, others Success@k."""
    return float(any(grades.get(candidate, 0) > 0 for candidate in found[:k]))


def recall_at(found: Sequence[str], grades: Mapping[str, int], k: int) -> float:
    """Share of all relevant candidates that are among the first k; 0.0 where none is relevant."""
    relevant = {candidate for candidate, grade in grades.items() if grade > 0}
    return len(relevant.intersection(found[:k])) / len(relevant) if relevant else 0.0


def ndcg_at(found: Sequence[str], grades: Mapping[str, int], k: int, *, gain: Gain = "linear") -> float:
    """Discounted gain of the first k over that of the best possible list; 0.0 where nothing is relevant.

    Args:
        gain: "linear" (trec_eval, BEIR): the grade; "exponential": 2 ^ grade - 1. Negative grades count as 0.
    Source: Järvelin and Kekäläinen, 2002; the discount is log2(rank + 1).
    """
    gained = [_gain(grades.get(candidate, 0), gain) for candidate in found[:k]]
    best = sorted((_gain(grade, gain) for grade in grades.values()), reverse=True)[:k]
    ideal = _discounted(best)
    return _discounted(gained) / ideal if ideal else 0.0


def _gain(grade: int, gain: Gain) -> float:
    return float(max(0, grade)) if gain == "linear" else 2.0 ** max(0, grade) - 1


def _discounted(gains: Sequence[float]) -> float:
    return sum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains, start=1))


def reciprocal_rank(found: Sequence[str], grades: Mapping[str, int], k: int) -> float:
    """1 / rank of the first relevant candidate, 0.0 if it is not among the first k."""
    ranks = (rank for rank, candidate in enumerate(found[:k], start=1) if grades.get(candidate, 0) > 0)
    first = next(ranks, None)
    return 1 / first if first else 0.0
