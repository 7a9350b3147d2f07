"""Pools of candidates that do not fit into memory: embedded shard by shard, searched exactly in one stream.

::

    pool ─rows─▶ encode ─▶ <folder>/<key>/shard-000000000.npy …      a kill loses at most the shard at work
    queries, shards ─blocks─▶ scores ─▶ the k best so far            never more than a block of scores in memory

The folder's key holds the model's and the pool's fingerprints: a changed pool is another folder. Several processes
share the work, shard by shard, through the file system.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from muco import distributed
from muco.base.files import make_folder, write_bytes, writing
from muco.data.judged import Pool
from muco.data.left_out import LeftOut
from muco.dialogue import Content
from muco.errors import DataError
from muco.evaluate import metrics
from muco.evaluate.cache import Embedder, encode_named, known_by

SHARD = 4096  # candidates per file
QUERIES = 4096  # that pass over the pool together
SCORES = 1 << 24  # scores in memory at a time: 64 MiB
PAIRS = 2048  # that are scored in float64 at a time
LAYOUT = 1  # raise when the meaning of a shard changes

log = logging.getLogger(__name__)


class Vectors:
    """The vectors of a pool on disk, float32 [N, D], read block by block."""

    def __init__(self, files: Sequence[Path], rows: int, left_out: int = 0) -> None:
        self.files, self._rows = list(files), rows
        self._left_out = left_out  # rows that are NaN because their candidates cannot be embedded

    def __len__(self) -> int:
        return self._rows

    def blocks(self, rows: int) -> Iterator[np.ndarray]:
        """All vectors in order, at most ``rows`` at a time; no block reaches over the end of a file."""
        for file in self.files:
            shard = np.load(file, mmap_mode="r", allow_pickle=False)
            for start in range(0, len(shard), rows):
                yield np.asarray(shard[start : start + rows])  # read when used; nothing of it is kept

    def row(self, number: int) -> np.ndarray:
        """One vector, float32 [D]; an IndexError if there is no such row."""
        first = 0
        for file in self.files:
            shard = np.load(file, mmap_mode="r", allow_pickle=False)
            if number < first + len(shard):
                return np.array(shard[number - first])
            first += len(shard)
        raise IndexError(f"row {number} of {first}")

    def health(self) -> metrics.Health:
        """Whether the pool as a whole holds NaN or has collapsed; what was left out does not count."""
        return metrics.health_of(self.blocks(SHARD), self._left_out)


def embed_pool(
    model: Embedder,
    pool: Pool,
    folder: Path,
    *,
    batch_size: int = 64,
    left_out: LeftOut | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Vectors:
    """The vectors of all candidates of a pool, encoding only what no earlier run has left.

    Beside a shard with rows of NaN, for candidates that were left out, is a ``.json`` file that says which and why.

    Args:
        folder: Of all pools; made if it does not exist. Of several processes each encodes its shards: call it on all of
            them with the same folder.
        left_out: Rows that cannot be embedded; afterwards also those that the model refused. None: it may refuse none.
        progress: Called with (done, total) candidates after every shard.
    Raises:
        DataError: If the pool is empty, or a candidate cannot be embedded and may not be left out; names it.
        OutputError: If the folder cannot be written.
    """
    if not len(pool):
        raise DataError(f"{pool.name}: the pool holds no candidate")
    key = hashlib.sha256(json.dumps([LAYOUT, SHARD, known_by(model), pool.fingerprint]).encode()).hexdigest()
    own = Path(folder) / key
    with writing(folder, "choose another folder"):
        make_folder(own)
    left_out = LeftOut() if left_out is None else left_out
    starts = range(0, len(pool), SHARD)
    files = [own / f"shard-{start:09}.npy" for start in starts]
    if not left_out.allowed and distributed.rank() == 0:
        for file in files:  # in which an earlier run left something out
            if _note(file).is_file():
                file.unlink(missing_ok=True)
                _note(file).unlink()
    distributed.wait_for_all()
    missing = [(start, file) for start, file in zip(starts, files, strict=True) if not _whole(file, pool, start)]
    distributed.wait_for_all()  # all must have seen the same shards missing before one appears
    for number, (start, file) in enumerate(missing):
        if number % distributed.world_size() == distributed.rank():
            _encode_shard(model, pool, start, file, batch_size, left_out)
        if progress:
            progress(min(len(pool), len(pool) - len(missing) * SHARD + (number + 1) * SHARD), len(pool))
    distributed.wait_for_all()
    for note in filter(Path.is_file, map(_note, files)):
        left_out.reasons.update({int(row): reason for row, reason in json.loads(note.read_text("ascii")).items()})
    if len(left_out) == len(pool):
        first = next(iter(left_out.reasons.values()))
        raise DataError(f"{pool.name}: none of its {len(pool)} candidates can be embedded; the first: {first}")
    return Vectors(files, len(pool), len(left_out))


def _note(shard: Path) -> Path:
    """What says which rows of a shard were left out; there only if some were."""
    return shard.with_suffix(".json")


def _whole(file: Path, pool: Pool, start: int) -> bool:
    """Whether a shard exists with all its rows; its name appears when it is complete."""
    if not file.is_file():
        return False
    try:
        rows = len(np.load(file, mmap_mode="r", allow_pickle=False))
    except (OSError, ValueError, EOFError) as error:
        log.warning("%s: the vectors are damaged (%s); they are computed again", file, error)
        return False
    return rows == min(SHARD, len(pool) - start)


def _encode_shard(model: Embedder, pool: Pool, start: int, file: Path, batch_size: int, left_out: LeftOut) -> None:
    rows = range(start, min(start + SHARD, len(pool)))
    usable = [row for row in rows if row not in left_out]
    candidates = [pool[row] for row in usable]
    vectors = encode_named(
        model,
        [candidate.content for candidate in candidates],
        [candidate.where for candidate in candidates],
        batch_size,
        lambda place, error: left_out.add(usable[place], error),
    )
    reasons = {row: left_out.reasons[row] for row in rows if row in left_out}
    if reasons:
        # a shard of which nothing is left still has the dimension of the others
        dimension = vectors.shape[1] or model.encode([Content("a")], batch_size=1).shape[1]
        known, vectors = vectors, np.full((len(rows), dimension), np.nan, dtype=np.float32)
        if len(known):
            vectors[[row not in reasons for row in rows]] = known
        write_bytes(_note(file), json.dumps(reasons).encode("ascii"))
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(vectors, dtype=np.float32), allow_pickle=False)
    write_bytes(file, buffer.getvalue())


def search(
    queries: np.ndarray, stores: Sequence[Vectors], orders: Sequence[np.ndarray], k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The k best candidates of every query by dot product, exactly.

    A matrix product rounds equal scores apart, depending on their place. So it only picks who may be among the
    best; their scores are taken again in float64, pair by pair, and rounded to float32: equal vectors have equal
    scores, in whatever blocks they came. Equal scores are ordered by ``orders``.

    Args:
        queries: float32 [Q, D].
        stores: Pools that are searched as one.
        orders: Of each pool, int64 [N]; unique over all of them.
    Returns:
        Rows, int64 [Q, k], counted over the pools one after another, and scores, float32 [Q, k], best first; -1 and
        minus infinity beyond the end. What is not finite is never found, and finds nothing.
    Memory: a block of scores (64 MiB) and of vectors, besides queries and results.
    """
    queries = np.asarray(queries, dtype=np.float32)
    order = np.concatenate([np.asarray(part, dtype=np.int64) for part in orders])
    best = [_Best(queries[start : start + QUERIES], k, order) for start in range(0, max(1, len(queries)), QUERIES)]
    rows = max(1, SCORES // max(1, min(len(queries), QUERIES)))
    first = 0
    for store in stores:
        for block in store.blocks(rows):
            for part in best:
                part.add(block, first)
            first += len(block)
    return np.concatenate([part.rows for part in best]), np.concatenate([part.scores for part in best])


class _Best:
    """The k best candidates so far of some queries, in order."""

    def __init__(self, queries: np.ndarray, k: int, order: np.ndarray) -> None:
        self.queries, self.k, self.order = queries, k, order
        self.rows = np.full((len(queries), k), -1, dtype=np.int64)
        self.scores = np.full((len(queries), k), -np.inf, dtype=np.float32)

    def add(self, block: np.ndarray, first: int) -> None:
        """Lets the best candidates of a block in; ``first`` is the row of its first one."""
        with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is put aside below
            rough = self.queries @ block.T
        if not (finite := np.isfinite(rough)).all():
            rough[~finite] = -np.inf
        query, column = np.nonzero(rough >= self._least(rough)[:, None])
        if len(query):
            self._merge(query, column + first, _exact(self.queries, block, query, column))

    def _least(self, rough: np.ndarray) -> np.ndarray:
        """The rough score with which a candidate may be among the best of its query, float32 [queries]."""
        worst = self.scores[:, -1].copy()
        if rough.shape[1] > self.k:
            filling = np.flatnonzero(np.isneginf(worst))  # else all of the first block would come in
            worst[filling] = np.partition(rough[filling], -self.k, axis=1)[:, -self.k]
        # minus infinity never comes in, because it is not above the smallest number
        return np.maximum(worst - metrics.TIE, np.finfo(np.float32).min)

    def _merge(self, query: np.ndarray, rows: np.ndarray, scores: np.ndarray) -> None:
        """Puts (query, row, score) triples, queries ascending, among the best of their queries."""
        changed, entering = np.unique(query, return_inverse=True)
        # the former best of the changed queries, then what enters: place of the query, row, score
        place = np.concatenate([np.repeat(np.arange(len(changed)), self.k), entering])
        rows = np.concatenate([self.rows[changed].ravel(), rows])
        scores = np.concatenate([self.scores[changed].ravel(), scores])
        order = np.where(rows >= 0, self.order[rows], np.iinfo(np.int64).max)
        sorting = np.lexsort((order, -scores, place))  # query by query, best first
        starts = np.searchsorted(place[sorting], np.arange(len(changed)))
        kept = sorting[starts[:, None] + np.arange(self.k)]  # every query has at least its former k
        self.rows[changed], self.scores[changed] = rows[kept], scores[kept]


def _exact(queries: np.ndarray, block: np.ndarray, query: np.ndarray, column: np.ndarray) -> np.ndarray:
    """Dot products of pairs in float64, rounded to float32; no pair's depends on the others."""
    scores = np.empty(len(query), dtype=np.float32)
    for start in range(0, len(query), PAIRS):
        part = slice(start, start + PAIRS)
        left, right = queries[query[part]].astype(np.float64), block[column[part]].astype(np.float64)
        scores[part] = np.einsum("nd,nd->n", left, right)
    return scores
