"""What is asked of what: the judged queries of a task, and the pools that they search as one."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from muco.data.judged import Candidate, Query
from muco.data.left_out import LeftOut
from muco.errors import DataError
from muco.evaluate.benchmark import Progress
from muco.evaluate.cache import Book, embed
from muco.evaluate.driver import Benchmark

if TYPE_CHECKING:
    from muco.data.judged import LinePool


class JudgedQueries:
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

    def embed(self, run: Benchmark, cached_as: str, progress: Progress) -> np.ndarray:
        """The vectors of all queries, float32 [queries, D]; a row of NaN for one that was left out.

        Args:
            cached_as: Names the folder of these vectors in the cache.
        """
        distinct = self.book.in_order(self.book.contents.keys())
        encode = functools.partial(self.book.encode, run.model, run.batch_size)
        cache = run.cache(cached_as)
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

    def split(self, row: int) -> tuple[LinePool, int]:
        """The pool that holds a row, and the row there."""
        number = int(self.numbers(row))
        return self.pools[number], int(row - self.first[number])
