"""Queries with graded judgements, asked of pools: embedding, searching, scoring, and what may make a score worthless.

M-BEIR and BEIR-like sets differ in their files only; from here on they are the same::

    queries ─Asked─▶ vectors ┐
    pools ──Stores──▶ shards ┴─found─▶ rows, scores ─scored─▶ measures, outcomes, failures, warnings

Equal scores stand in the order of the candidates' ids. If a pool has collapsed all its scores are equal, and that order
alone would decide who is found: its candidates are then never counted as right. A model that gives one vector to all
scores 0, not what a lucky order gives it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from muco import distributed
from muco.data.judged import Candidate, Query
from muco.data.left_out import Broken, LeftOut
from muco.data.left_out import warnings as left_out_warnings
from muco.errors import DataError
from muco.evaluate import metrics
from muco.evaluate.benchmark import FAILURES, FOUND, Failure, Outcome, Progress, Shown
from muco.evaluate.cache import Book, EmbeddingCache, embed
from muco.evaluate.pool import Vectors, embed_pool, search

if TYPE_CHECKING:
    from muco.data.judged import LinePool
    from muco.evaluate.cache import Embedder

TIES = 0.01  # share of queries decided by a tie from which on that is a warning

Measure = Callable[[Sequence[str], Mapping[str, int]], float]  # (ids found, grades) -> 0 to 1


class Asked:
    """The queries of a task with the keys of their contents; image files are read once, for the keys.

    Args:
        left_out: Gets the keys of queries that cannot be embedded, if that is allowed.
    Raises:
        DataError: If a query cannot be read and may not be left out; names the query's line.
    """

    def __init__(self, queries: Sequence[Query], left_out: LeftOut) -> None:
        self.queries, self.book, self.left_out = list(queries), Book(left_out), left_out
        self.keys = [
            self.book.lose(query.error) if query.error else self.book.add(query.content, query.where)
            for query in self.queries
        ]

    def __len__(self) -> int:
        return len(self.queries)

    def fingerprint(self, *others: str) -> str:
        """SHA-256 over ids, contents with the bytes of images, judgements, and ``others``."""
        digest = hashlib.sha256(json.dumps(others).encode())
        for query, key in zip(self.queries, self.keys, strict=True):
            digest.update(json.dumps([query.id, key, sorted(query.grades.items())]).encode())
        return digest.hexdigest()

    def embed(
        self, model: Embedder, cache: EmbeddingCache, batch_size: int, progress: Progress | None = None
    ) -> np.ndarray:
        """float32 [queries, D]; of equal contents one is encoded. A row of NaN for what was left out."""
        distinct = self.book.in_order(self.book.contents.keys())
        encode = functools.partial(self.book.encode, model, batch_size)
        vectors = embed(distinct, encode, cache=cache, shared=True, left_out=self.left_out, progress=progress)
        row_of = {key: row for row, key in enumerate(distinct)}
        nothing = np.full_like(vectors[0], np.nan)
        return np.stack([vectors[row_of[key]] if key in row_of else nothing for key in self.keys])


class Pools:
    """Pools that are searched as one; rows count over them one after another.

    Raises:
        DataError: If two of them hold the same candidate.
    """

    def __init__(self, pools: Sequence[LinePool]) -> None:
        self.pools = list(pools)
        self.first = np.cumsum([0, *map(len, self.pools)])  # row of each pool's first candidate; then their number
        if len(self.pools) > 1:
            order = np.concatenate([pool.order for pool in self.pools])
            sorting = np.argsort(order, kind="stable")
            twice = np.flatnonzero(np.diff(order[sorting]) == 0)
            if len(twice):
                one, two = (self._split(row) for row in sorting[twice[0] : twice[0] + 2])
                raise DataError(
                    f"{two[0].where(two[1])}: the id {two[0].id(two[1])!r} is also at {one[0].where(one[1])}; "
                    f"ids must be unique over all pools"
                )

    def __len__(self) -> int:
        return int(self.first[-1])

    def __getitem__(self, row: int) -> Candidate:
        pool, own = self._split(row)
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

    def _split(self, row: int) -> tuple[LinePool, int]:
        number = int(self.numbers(row))
        return self.pools[number], int(row - self.first[number])


class Stores:
    """The vectors of pools, each embedded when first asked for, and once."""

    def __init__(self, model: Embedder, folder: Path, batch_size: int, progress: Steps) -> None:
        self.model, self.folder, self.batch_size, self.progress = model, folder, batch_size, progress
        self._known: dict[str, tuple[Vectors, metrics.Health]] = {}

    def of(self, pool: LinePool) -> tuple[Vectors, metrics.Health]:
        if pool.fingerprint not in self._known:
            part = self.progress.part
            store = embed_pool(
                self.model, pool, self.folder, batch_size=self.batch_size, left_out=pool.left_out, progress=part
            )
            self._known[pool.fingerprint] = store, distributed.first_only(store.health)
            self.progress.done(len(pool))
        return self._known[pool.fingerprint]


class Steps:
    """Progress over several pieces of work whose sizes are known."""

    def __init__(self, total: int, say: Progress | None) -> None:
        self.total, self.say, self.before = total, say, 0

    def part(self, done: int, _: int) -> None:
        if self.say:
            self.say(min(self.before + done, self.total), self.total)

    def done(self, size: int) -> None:
        self.before += size
        self.part(0, 0)

    def finish(self) -> None:
        """What was found done, or is the same as something else, was never counted."""
        self.done(self.total - self.before)


@dataclass(frozen=True)
class Scored:
    """What became of the queries of a task; ``run`` is for ``ranking.write_trec_run``, the rest for a TaskResult."""

    scores: dict[str, float]
    outcomes: tuple[Outcome, ...]
    failures: tuple[Failure, ...]
    warnings: tuple[str, ...]
    facts: dict[str, Any]
    broken: tuple[Broken, ...]
    missed: int
    run: dict[str, list[tuple[str, float]]] = field(repr=False)


def ask(
    asked: Asked,
    vectors: np.ndarray,
    pools: Pools,
    stores: Stores,
    measures: Mapping[str, Measure],
    metric: str,
    depth: int,
) -> Scored:
    """Searches and scores; of several processes each searches for a part of the queries, and all get everything.

    Args:
        vectors: float32 [Q, D], of the queries.
        stores: Embeds the pools, as far as they are not.
        measures: By name; each is averaged over the queries.
        metric: The measure that outcomes hold.
        depth: Candidates that are ranked per query; measures must not look further.
    """
    stored, of_pools = zip(*map(stores.of, pools.pools), strict=True)
    rows, scores = _search(vectors, stored, [pool.order for pool in pools.pools], depth)
    collapsed = {number for number, health in enumerate(of_pools) if health.collapsed}
    values: dict[str, list[float]] = {name: [] for name in measures}
    outcomes, run, ties = [], {}, 0
    for query, own, at in zip(asked.queries, rows, scores, strict=True):
        own = own[own >= 0]
        ids = pools.ids(own)
        counted = ["" if n in collapsed else id for n, id in zip(pools.numbers(own).tolist(), ids, strict=True)]
        for name, measure in measures.items():
            values[name].append(measure(counted, query.grades))
        right = [query.grades.get(id, 0) > 0 for id in counted]
        rank = right.index(True) + 1 if any(right) else None
        run[query.id] = list(zip(ids, map(float, at), strict=False))
        outcomes.append(Outcome(query.id, values[metric][-1], rank, tuple(run[query.id][:FOUND])))
        ties += rank is not None and not all(r for r, score in zip(right, at, strict=False) if score == at[rank - 1])
    of_queries = _distinct_health(asked, vectors)
    told = "queries whose best right candidate ties with a wrong one"
    broken, missed = _left_out(asked, pools)
    warnings = [*left_out_warnings(broken, missed), *_health_warnings(pools, of_queries, of_pools)]
    if ties > TIES * len(asked):
        warnings.append(f"{ties} {told}: the order of ids decides; are there candidates twice?")
    return Scored(
        {name: float(np.mean(each)) for name, each in values.items()},
        tuple(outcomes),
        () if collapsed else tuple(_failures(asked.queries, vectors, pools, stored, rows, scores)),
        tuple(warnings),
        {
            told: ties,
            "query vectors": asdict(of_queries),
            "candidate vectors": {
                "rows": len(pools),
                "non_finite": sum(health.non_finite for health in of_pools),
                "collapsed": [pools.pools[number].name for number in sorted(collapsed)],
            },
        },
        broken,
        missed,
        run,
    )


def _left_out(asked: Asked, pools: Pools) -> tuple[tuple[Broken, ...], int]:
    """What could not be embedded, and how many queries are missed for it."""
    lost = pools.left_out
    gone = [key in asked.left_out for key in asked.keys]
    rights = (right[right >= 0].tolist() for right in pools.relevant(asked.queries))
    missed = sum(out or bool(right and lost.keys() >= set(right)) for out, right in zip(gone, rights, strict=True))
    queries = [Broken("query", asked.left_out.reasons[key]) for key in asked.keys if key in asked.left_out]
    return (*queries, *(Broken("candidate", reason) for reason in lost.values())), missed


def _search(
    vectors: np.ndarray, stores: Sequence[Vectors], orders: Sequence[np.ndarray], depth: int
) -> tuple[np.ndarray, np.ndarray]:
    share = np.array_split(vectors, distributed.world_size())[distributed.rank()]
    parts = distributed.gather_objects(search(share, stores, orders, depth))
    return np.concatenate([rows for rows, _ in parts]), np.concatenate([scores for _, scores in parts])


def _distinct_health(asked: Asked, vectors: np.ndarray) -> metrics.Health:
    first = {key: row for row, key in reversed(list(enumerate(asked.keys)))}  # equal queries have equal vectors
    return metrics.embedding_health(vectors[sorted(row for key, row in first.items() if key not in asked.left_out)])


def _health_warnings(pools: Pools, queries: metrics.Health, own: Sequence[metrics.Health]) -> list[str]:
    lines = []
    if queries.non_finite:
        lines.append(f"{queries.non_finite} of {queries.rows} query vectors are not finite; they find nothing")
    elif queries.collapsed:
        lines.append(f"all {queries.rows} query vectors are the same; the model has collapsed")
    for pool, health in zip(pools.pools, own, strict=True):
        if health.non_finite:
            lines.append(f"{health.non_finite} of {health.rows} vectors of {pool.name} are not finite and never found")
        if health.collapsed and health.non_finite < health.rows:
            lines.append(
                f"all {health.rows} vectors of {pool.name} are the same: the model has collapsed, and no candidate of "
                f"that pool counts as right, for only the order of ids tells them apart"
            )
    return lines


def _failures(
    queries: Sequence[Query],
    vectors: np.ndarray,
    pools: Pools,
    stores: Sequence[Vectors],
    rows: np.ndarray,
    scores: np.ndarray,
) -> list[Failure]:
    """The failed queries of largest margin.

    The score of a right candidate that was not ranked is at most that of the last one ranked. Queries are chosen by the
    margin that this leaves at least; only for those that are chosen the true one is taken from the vectors.
    """
    least = []
    for i, (own, at, right) in enumerate(zip(rows, scores, pools.relevant(queries), strict=True)):
        right = right[right >= 0]
        if own[0] < 0 or not len(right) or own[0] in right:
            continue
        ranked = at[np.isin(own, right)]
        least.append((float(at[0] - (ranked[0] if len(ranked) else at[np.flatnonzero(own >= 0)[-1]])), i, right))
    least.sort(key=lambda entry: (-entry[0], entry[1]))
    found = []
    for _, i, right in least[:FAILURES]:
        of_right = [_score(vectors[i], _vector(pools, stores, row)) for row in right]
        best = int(np.argmax(np.nan_to_num(of_right, nan=-np.inf)))
        margin = float(scores[i, 0]) - of_right[best]
        if math.isfinite(margin):
            shown = tuple(
                (show(pools[row]), float(score))
                for row, score in zip(rows[i, :FOUND], scores[i, :FOUND], strict=True)
                if row >= 0
            )
            found.append(Failure(margin, show(queries[i]), show(pools[right[best]]), shown))
    return sorted(found, key=lambda failure: -failure.margin)


def show(of: Query | Candidate) -> Shown:
    return Shown(of.id, of.content.text, tuple(map(str, of.content.images)))


def _score(query: np.ndarray, candidate: np.ndarray) -> float:
    return float(np.float32(np.dot(query.astype(np.float64), candidate.astype(np.float64))))


def _vector(pools: Pools, stores: Sequence[Vectors], row: int) -> np.ndarray:
    number = int(pools.numbers(row))
    row = int(row - pools.first[number])
    for file in stores[number].files:
        shard = np.load(file, mmap_mode="r", allow_pickle=False)
        if row < len(shard):
            return np.array(shard[row])
        row -= len(shard)
    raise IndexError(f"{pools.pools[number].name} has no such row")


def chance_of_hit(relevant: Sequence[int], pool: int, k: int) -> float:
    """hit@k of a random order: the mean over queries of 1 - (N-R)/N · (N-R-1)/(N-1) · …, k factors.

    Args:
        relevant: R of each query, how many right candidates are among the N of the pool.
    """

    @functools.cache
    def one(right: int) -> float:
        miss = 1.0
        for drawn in range(min(k, pool)):
            miss *= max(0, pool - right - drawn) / (pool - drawn)
        return 1.0 - miss

    return float(np.mean([one(int(right)) for right in relevant]))


def chance_of_ndcg(queries: Sequence[Query], held: Sequence[Mapping[str, int]], pool: int, k: int) -> float:
    """nDCG@k (linear gain) of a random order: every rank gains the mean grade of the pool.

    Args:
        held: Of each query, the judgements of candidates that are in the pool.
        pool: N candidates.
    """
    discounts = sum(1 / math.log2(rank + 1) for rank in range(1, min(k, pool) + 1))
    values = []
    for query, own in zip(queries, held, strict=True):
        best = sorted((max(0, grade) for grade in query.grades.values()), reverse=True)[:k]
        ideal = sum(grade / math.log2(rank + 1) for rank, grade in enumerate(best, start=1))
        gained = sum(max(0, grade) for grade in own.values()) / pool * discounts
        values.append(gained / ideal if ideal else 0.0)
    return float(np.mean(values))
