"""Queries with graded judgements, asked of pools: embedding, searching, scoring.

M-BEIR, BEIR-like sets and the pools of MMEB-V2 differ in their files only; from here on they are the same::

    queries ─JudgedQueries─▶ vectors ┐
    pools ───embed_pool────▶ shards ─┴─search─▶ rows, scores ─outcomes.py─▶ measures, outcomes, failures, warnings
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from muco import distributed
from muco.data.judged import Pool, Query
from muco.data.left_out import Broken, LeftOut, counts
from muco.data.left_out import warnings as left_out_warnings
from muco.evaluate import metrics
from muco.evaluate.benchmark import Progress, TaskResult, gate, write_trec_run
from muco.evaluate.cache import Book
from muco.evaluate.driver import Benchmark
from muco.evaluate.outcomes import Measure, Pools, Searched, Ties, score_queries
from muco.evaluate.pool import Vectors, embed_pool, search

# The score of a random order, from the queries, the judgements of each that the pool holds, and the pool's size.
Chance = Callable[[Sequence[Query], Sequence[Mapping[str, int]], int], float]

log = logging.getLogger(__name__)


class JudgedQueries:
    """The queries of a task with the keys of their contents; image files are read once, for the keys.

    ``left_out`` gets the keys of queries that cannot be embedded; unless that is allowed, a DataError names the line.
    """

    def __init__(self, queries: Sequence[Query], left_out: LeftOut) -> None:
        self.queries, self.book, self.left_out = list(queries), Book(left_out), left_out
        self.keys = [
            self.book.lose(query.error) if query.error else self.book.add(query.content, query.where)
            for query in self.queries
        ]

    def __len__(self) -> int:
        return len(self.queries)

    def embed(self, run: Benchmark, cached_as: str, progress: Progress) -> np.ndarray:
        """The vectors of all queries, float32 [queries, D]; a row of NaN for one that was left out."""
        how = {"cache": run.cache(cached_as), "shared": True, "progress": progress}
        vectors, row_of = self.book.vectors(run.model, run.batch_size, self.book.contents, **how)
        nothing = np.full_like(vectors[0], np.nan)
        return np.stack([vectors[row_of[key]] if key in row_of else nothing for key in self.keys])


@dataclass(frozen=True)
class RankedTask:
    """One task: queries, the pools that they search, and how the found lists are scored."""

    name: str
    queries: JudgedQueries
    pools: Pools
    metric: str  # the measure that counts
    measures: Mapping[str, Measure]
    depth: int  # candidates that are ranked per query; no measure looks further
    chance: Chance
    facts: Mapping[str, Any]  # what else a reader must know; they are part of the fingerprint
    warnings: Sequence[str]  # about the data
    cached_as: str  # names the folder of the queries' vectors
    run_file: Path | None = None  # gets the ranked lists in TREC's form
    ties: Ties = "by id"

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over name, facts, pools, and the queries' ids, contents with the bytes of images, and judgements."""
        parts = (self.name, json.dumps(self.facts), *(pool.fingerprint for pool in self.pools.pools))
        digest = hashlib.sha256(json.dumps(parts).encode())
        for query, key in zip(self.queries.queries, self.queries.keys, strict=True):
            digest.update(json.dumps([query.id, key, sorted(query.grades.items())]).encode())
        return digest.hexdigest()

    def score(
        self, run: Benchmark, stored: Callable[[Pool], tuple[Vectors, metrics.Health]], steps: Steps
    ) -> TaskResult:
        """Embeds, searches and scores; of several processes each does a part, and all get everything."""
        log.info("%s: %d queries, %d candidates", self.name, len(self.queries), len(self.pools))
        vectors = self.queries.embed(run, self.cached_as, steps.part)
        vectors_of, health = zip(*map(stored, self.pools.pools), strict=True)
        # of several processes each searches for a part of the queries
        share = np.array_split(vectors, distributed.world_size())[distributed.rank()]
        found = search(share, vectors_of, [pool.order for pool in self.pools.pools], self.depth)
        rows, scores = map(np.concatenate, zip(*distributed.gather_objects(found), strict=True))
        searched = Searched(self.pools, vectors_of, health, vectors, rows, scores)
        scored = score_queries(self.queries.queries, searched, self.measures, self.metric, self.ties)
        if self.run_file is not None:
            distributed.first_only(functools.partial(write_trec_run, self.run_file, scored.run, "muco"))

        # of the distinct queries that could be embedded: equal ones have equal vectors
        distinct = {key: row for row, key in enumerate(self.queries.keys) if key not in self.queries.left_out}
        of_queries = metrics.embedding_health(vectors[list(distinct.values())])
        broken, missed = self._left_out()
        lost = self.pools.left_out
        size = len(self.pools) - len(lost)
        chance = self.chance(self.queries.queries, self._held(lost), size)
        warnings = [
            *self.warnings,
            *left_out_warnings(broken, missed),
            *searched.warnings(of_queries),
            *scored.warnings,
            *gate(scored.scores[self.metric], chance, len(self.queries)),
        ]
        return TaskResult(
            name=self.name,
            metric=self.metric,
            scores=scored.scores,
            queries=len(self.queries),
            candidates=(size, size),
            chance=chance,
            data=self.fingerprint,
            facts={**self.facts, **scored.facts, **searched.facts(of_queries)},
            warnings=tuple(warnings),
            outcomes=scored.outcomes,
            failures=scored.failures,
            left_out=counts(broken, missed),
            broken=broken,
        )

    def _held(self, lost: Mapping[int, str]) -> list[dict[str, int]]:
        """Of each query, the judgements of candidates that are in the pools and could be embedded."""
        held = []
        for query in self.queries.queries:
            rows = self.pools.find(list(query.grades)).tolist()
            judged = zip(query.grades.items(), rows, strict=True)
            held.append({id: grade for (id, grade), row in judged if row >= 0 and row not in lost})
        return held

    def _left_out(self) -> tuple[tuple[Broken, ...], int]:
        """What could not be embedded, and how many queries are missed because of it."""
        lost, missed = self.pools.left_out, 0
        broken = []
        for key, rows in zip(self.queries.keys, self.pools.relevant(self.queries.queries), strict=True):
            right = set(rows[rows >= 0].tolist())
            if key in self.queries.left_out:
                broken.append(Broken("query", self.queries.left_out.reasons[key]))
                missed += 1
            elif right and right <= lost.keys():
                missed += 1
        return (*broken, *(Broken("candidate", reason) for reason in lost.values())), missed


def score_ranked(
    run: Benchmark, tasks: Sequence[RankedTask], key: Mapping[str, Any], progress: Progress | None
) -> list[TaskResult]:
    """The results of tasks, each found done or scored; a pool that several tasks search is embedded once."""
    pools = dict.fromkeys(pool for task in tasks for pool in task.pools.pools)
    steps = Steps(sum(map(len, pools)) + sum(len(task.queries) for task in tasks), progress)

    @functools.cache
    def stored(pool: Pool) -> tuple[Vectors, metrics.Health]:
        folder, batch_size = run.output / "cache" / "pools", run.batch_size
        left_out, progress = pool.left_out, steps.part
        store = embed_pool(run.model, pool, folder, batch_size=batch_size, left_out=left_out, progress=progress)
        steps.done(len(pool))
        return store, distributed.first_only(store.health)

    def counted() -> Iterator[RankedTask]:
        for task in tasks:
            yield task
            steps.done(len(task.queries))

    # Paths of images are on the page, so results found again must be of this folder.
    key = {"data": str(run.data.resolve()), **key}
    results = run.score(counted(), lambda task: task.score(run, stored, steps), key)
    steps.finish()
    return results


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
        """Skips to the end: cached or shared work was not counted."""
        self.done(self.total - self.before)


def chance_of_hit(queries: Sequence[Query], held: Sequence[Mapping[str, int]], pool: int, k: int) -> float:
    """hit@k of a random order: the mean of 1 - (N-R)/N · (N-R-1)/(N-1) · …, k factors; R of N candidates are right."""

    @functools.cache
    def one(right: int) -> float:
        miss = 1.0
        for drawn in range(min(k, pool)):
            miss *= max(0, pool - right - drawn) / (pool - drawn)
        return 1.0 - miss

    return float(np.mean([one(sum(grade > 0 for grade in own.values())) for own in held]))


def chance_of_ndcg(queries: Sequence[Query], held: Sequence[Mapping[str, int]], pool: int, k: int) -> float:
    """nDCG@k (linear gain) of a random order: every rank gains the mean grade of the pool."""
    discounts = metrics.discounted([1] * min(k, pool))
    values = []
    for query, own in zip(queries, held, strict=True):
        ideal = metrics.ideal_gain(query.grades, k)
        gained = sum(max(0, grade) for grade in own.values()) / pool * discounts
        values.append(gained / ideal if ideal else 0.0)
    return float(np.mean(values))
