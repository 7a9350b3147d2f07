"""Pools, and what queries found in them: scores, outcomes, failures, and what may make a score worthless.

Candidates of equal score are ordered by their ids; or, where a task says that ties are lost, right ones come after
wrong ones that score as much, give or take rounding. If a pool has collapsed, all its scores are equal, and that order
alone would decide who is found: its candidates then never count as right. A model that gives one vector to everything
scores 0, not what a lucky order gives it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np

from muco.data.judged import Candidate, Pool, Query
from muco.errors import DataError
from muco.evaluate.benchmark import FAILURES, FOUND, Failure, Outcome, Shown
from muco.evaluate.metrics import TIE, Health, losing_ties
from muco.evaluate.pool import Vectors

TIES = 0.01  # share of queries decided by a tie from which on that is a warning
TIED = "queries whose best right candidate ties with a wrong one"

Ties = Literal["by id", "lost"]
Measure = Callable[[Sequence[str], Mapping[str, int]], float]  # (ids found, grades) -> 0 to 1


class Pools:
    """Pools that are searched as one, rows counted one after another; a DataError if two hold the same candidate."""

    def __init__(self, pools: Sequence[Pool]) -> None:
        self.pools = list(pools)
        self.first = np.cumsum([0, *map(len, self.pools)])  # row of each pool's first candidate; then their number
        if len(self.pools) > 1:
            order = np.concatenate([pool.order for pool in self.pools])
            sorting = np.argsort(order, kind="stable")
            twice = np.flatnonzero(np.diff(order[sorting]) == 0)
            if len(twice):
                one, two = (self.split(row) for row in sorting[twice[0] : twice[0] + 2])
                raise DataError(
                    f"{two[0].where(two[1])}: the id {two[0].id(two[1])!r} is also at {one[0].where(one[1])}; "
                    f"ids must be unique over all pools"
                )

    def __len__(self) -> int:
        return int(self.first[-1])

    def __getitem__(self, row: int) -> Candidate:
        pool, own = self.split(row)
        return pool[own]

    def numbers(self, rows: np.ndarray) -> np.ndarray:
        """Which pool holds each row: places in ``pools``, int64 [n]."""
        return np.searchsorted(self.first, rows, side="right") - 1

    def ids(self, rows: np.ndarray) -> list[str]:
        return [self.pools[n].id(row - self.first[n]) for n, row in zip(self.numbers(rows), rows, strict=True)]

    def find(self, ids: Sequence[str]) -> np.ndarray:
        """Rows of ids, int64 [n]; -1 for one that no pool holds."""
        rows = np.full(len(ids), -1, dtype=np.int64)
        for first, pool in zip(self.first, self.pools, strict=False):
            own = pool.find(ids)
            rows = np.where(own >= 0, own + first, rows)
        return rows

    def relevant(self, queries: Sequence[Query]) -> list[np.ndarray]:
        """For each query the rows of its relevant candidates in the order of their ids; -1 for one that is not here."""
        ids = [query.relevant for query in queries]
        rows = self.find([id for own in ids for id in own])
        return np.split(rows, np.cumsum([len(own) for own in ids])[:-1])

    @property
    def left_out(self) -> dict[int, str]:
        """Rows that cannot be embedded, and why; complete when the pools have been."""
        return {
            int(first) + row: reason
            for first, pool in zip(self.first, self.pools, strict=False)
            for row, reason in sorted(pool.left_out.reasons.items())
        }

    def split(self, row: int) -> tuple[Pool, int]:
        """The pool that holds a row, and the row there."""
        number = int(self.numbers(row))
        return self.pools[number], int(row - self.first[number])


@dataclass(frozen=True)
class Searched:
    """What queries found in pools."""

    pools: Pools
    stored: Sequence[Vectors]  # of each pool
    health: Sequence[Health]
    vectors: np.ndarray  # float32 [Q, D], of the queries
    rows: np.ndarray  # int64 [Q, depth], best first; -1 beyond the end
    scores: np.ndarray  # float32 [Q, depth]

    @cached_property
    def collapsed(self) -> set[int]:
        """Places of the pools whose vectors are all the same."""
        return {place for place, health in enumerate(self.health) if health.collapsed}

    def found(self, query: int) -> tuple[list[str], list[str], np.ndarray]:
        """What one query found, best first: ids, the ids that count, and scores, float32 [n].

        In place of the id of a candidate of a collapsed pool counts "": it is never right.
        """
        rows = self.rows[query][self.rows[query] >= 0]
        ids, places = self.pools.ids(rows), self.pools.numbers(rows).tolist()
        counted = ["" if place in self.collapsed else id for place, id in zip(places, ids, strict=True)]
        return ids, counted, self.scores[query, : len(rows)]

    def score(self, query: int, row: int) -> float:
        """The score of any candidate, ranked or not, as the search rounds it."""
        pool, own = self.pools.split(row)
        vector = self.stored[self.pools.pools.index(pool)].row(own)
        return float(np.float32(np.dot(self.vectors[query].astype(np.float64), vector.astype(np.float64))))

    def facts(self, of_queries: Health) -> dict[str, Any]:
        return {
            "query vectors": asdict(of_queries),
            "candidate vectors": {
                "rows": len(self.pools),
                "non_finite": sum(health.non_finite for health in self.health),
                "collapsed": [self.pools.pools[place].name for place in sorted(self.collapsed)],
            },
        }

    def warnings(self, of_queries: Health) -> list[str]:
        """Sentences about vectors that are not finite, or all the same."""
        fault = of_queries.fault("query")
        lines = [f"{fault}; they find nothing" if of_queries.non_finite else fault] if fault else []
        for pool, health in zip(self.pools.pools, self.health, strict=True):
            if health.non_finite:
                lines.append(
                    f"{health.non_finite} of {health.rows} vectors of {pool.name} are not finite and never found"
                )
            if health.collapsed and health.non_finite < health.rows:
                lines.append(
                    f"all {health.rows} vectors of {pool.name} are the same: the model has collapsed, and no candidate "
                    f"of that pool counts as right, because only the order of ids tells them apart"
                )
        return lines


@dataclass(frozen=True)
class Scored:
    """The results of the queries of a task: for a TaskResult, and ``run`` for ``write_trec_run``."""

    scores: dict[str, float]  # the mean of each measure over the queries
    outcomes: tuple[Outcome, ...]
    failures: tuple[Failure, ...]
    warnings: tuple[str, ...]
    facts: dict[str, Any]
    run: dict[str, list[tuple[str, float]]] = field(repr=False)


def score_queries(
    queries: Sequence[Query], searched: Searched, measures: Mapping[str, Measure], metric: str, ties: Ties = "by id"
) -> Scored:
    """Scores what the queries found: the mean of each measure, and the outcomes in ``metric``, one of the measures.

    Lost ties move a right candidate within what was ranked: rank more candidates than a query has right ones.
    """
    values: dict[str, list[float]] = {name: [] for name in measures}
    outcomes, run, tied = [], {}, 0
    for number, query in enumerate(queries):
        ids, counted, found = searched.found(number)
        right = np.array([query.grades.get(id, 0) > 0 for id in counted], dtype=bool)
        if ties == "lost":
            order = losing_ties(right, found)
            ids, counted, found, right = (
                [ids[i] for i in order],
                [counted[i] for i in order],
                found[order],
                right[order],
            )
        for name, measure in measures.items():
            values[name].append(measure(counted, query.grades))
        rank = None
        if right.any():
            rank = int(right.argmax()) + 1
            near = np.abs(found - found[rank - 1]) <= (TIE if ties == "lost" else 0)
            tied += not right[near].all()  # does a wrong one tie with the best right one?
        run[query.id] = list(zip(ids, found.tolist(), strict=True))
        outcomes.append(Outcome(query.id, values[metric][-1], rank, tuple(run[query.id][:FOUND])))
    many = tied > TIES * len(queries)
    decided = "the right one is behind" if ties == "lost" else "the order of ids decides"
    return Scored(
        scores={name: float(np.mean(each)) for name, each in values.items()},
        outcomes=tuple(outcomes),
        failures=() if searched.collapsed else tuple(worst_failures(queries, searched)),
        warnings=(f"{tied} {TIED}: {decided}; are there candidates twice?",) if many else (),
        facts={TIED: tied},
        run=run,
    )


def worst_failures(queries: Sequence[Query], searched: Searched) -> list[Failure]:
    """The failed queries of largest margin, largest first.

    A right candidate that was not ranked scores at most what the last ranked one does, so a margin is known from below
    without its vector. Queries are chosen by that; the vectors are read for the chosen ones only.
    """
    rights = [rows[rows >= 0] for rows in searched.pools.relevant(queries)]
    margins = {number: _least_margin(searched, number, right) for number, right in enumerate(rights)}
    failed = [number for number, margin in margins.items() if margin is not None]
    failed.sort(key=lambda number: -margins[number])
    failures = [_failure(queries[number], number, rights[number], searched) for number in failed[:FAILURES]]
    finite = [failure for failure in failures if math.isfinite(failure.margin)]
    return sorted(finite, key=lambda failure: -failure.margin)


def _least_margin(searched: Searched, number: int, right: np.ndarray) -> float | None:
    """By how much at least the first candidate beats the best right one; None where the query did not fail."""
    rows, scores = searched.rows[number], searched.scores[number]
    if rows[0] < 0 or not len(right) or rows[0] in right:
        return None
    ranked = np.flatnonzero(np.isin(rows, right))
    last = np.flatnonzero(rows >= 0)[-1]
    return float(scores[0] - scores[ranked[0] if len(ranked) else last])


def _failure(query: Query, number: int, right: np.ndarray, searched: Searched) -> Failure:
    of_right = [searched.score(number, row) for row in right]
    best = int(np.argmax(np.nan_to_num(of_right, nan=-np.inf)))
    scores = searched.scores[number, :FOUND]

    def shown(of: Query | Candidate) -> Shown:
        return Shown.of(of.id, of.content)

    ranked = zip(searched.rows[number, :FOUND], scores, strict=True)
    found = tuple((shown(searched.pools[row]), float(score)) for row, score in ranked if row >= 0)
    margin = float(scores[0]) - of_right[best]
    return Failure(margin, shown(query), shown(searched.pools[right[best]]), found)
