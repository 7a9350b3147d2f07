"""Scores of ranked lists with graded judgements, and the files in which others keep both.

Letters: k is the depth. *Relevant* is what a judgement gives a grade above 0. A list that is shorter than k is as if
wrong candidates followed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from muco.base.files import write_text
from muco.base.text import read_text
from muco.errors import DataError

Run = Mapping[str, Sequence[tuple[str, float]]]  # query -> (candidate, score), best first
Qrels = Mapping[str, Mapping[str, int]]  # query -> candidate -> grade
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


def read_qrels(path: Path) -> dict[str, dict[str, int]]:
    """Judgements in TREC's form (``query 0 candidate grade``, a fifth column is ignored) or BEIR's (a TSV with header).

    Raises:
        DataError: If the file cannot be read, or a line has another form, a grade that is no number, or a pair that was
            judged before; names file and line.
    """
    qrels: dict[str, dict[str, int]] = {}
    lines = read_text(path).splitlines()
    beir = bool(lines) and lines[0].split() == ["query-id", "corpus-id", "score"]
    for number, line in enumerate(lines, start=1):
        if not line.strip() or (beir and number == 1):
            continue
        query, candidate, grade = _judgement(line, beir, f"{path}:{number}")
        own = qrels.setdefault(query, {})
        if candidate in own:
            raise DataError(f"{path}:{number}: {candidate!r} is judged twice for {query!r}; keep one of the lines")
        own[candidate] = grade
    return qrels


def _judgement(line: str, beir: bool, where: str) -> tuple[str, str, int]:
    cells = line.split("\t") if beir else line.split()
    if len(cells) != 3 if beir else len(cells) not in (4, 5):
        form = "query-id, corpus-id and score, separated by tabs" if beir else "query, 0, candidate, grade"
        raise DataError(f"{where}: {len(cells)} columns; a line of judgements has {form}")
    query, candidate, grade = cells if beir else (cells[0], cells[2], cells[3])
    try:
        return query, candidate, int(grade)
    except ValueError:
        raise DataError(f"{where}: the grade must be a whole number, not {grade!r}") from None


def write_trec_run(path: Path, run: Run, name: str) -> None:
    """Writes ``query Q0 candidate rank score name`` per line, queries in their order, ranks from 1.

    Raises:
        ValueError: If an id holds white space, which would make other columns of it.
        OutputError: If the file cannot be written.
    """
    lines = []
    for query, found in run.items():
        for rank, (candidate, score) in enumerate(found, start=1):
            cells = (query, "Q0", candidate, str(rank), f"{score:.9g}", name)
            if any(len(cell.split()) != 1 for cell in cells):
                raise ValueError(f"an id or name with white space cannot stand in a TREC run: {cells}")
            lines.append(" ".join(cells) + "\n")
    write_text(Path(path), "".join(lines))
