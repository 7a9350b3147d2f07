"""Ranks, hit@k, nDCG, vectors as codes, and the health of vectors.

Scores are float32 dot products of normalised rows.
A score is only believed when it beats every rival: ties are lost, and vectors that are not finite come last. So a
model that maps everything to one point, or to NaN, scores 0 instead of passing by luck.

Letters: Q queries, C candidates, D dimension.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Literal

import numpy as np

TIE = 1e-6  # Closer than this is a tie: BLAS may round the dot products of equal vectors some 1e-7 apart, by position.
COLLAPSED = 1e-3  # Distance of unit vectors within which all are "the same" (a cosine of 1 - 5e-7).
BLOCK = 1 << 22  # Floats of temporary memory per block (16 MiB).


Choose = Callable[[str, Set[str]], Collection[str]]  # (query, its right targets) -> their rivals; all are keys


def ranks(scores: np.ndarray, positives: np.ndarray, identities: np.ndarray) -> np.ndarray:
    """Rank of the right candidate of each row, counting from 1; ties, scores within ``TIE``, are lost.

    Args:
        scores: float [Q, C].
        positives: int [Q], the column of the right candidate.
        identities: [C] or [Q, C], equal keys mark the same candidate, which is not a rival of the right one.
    Returns:
        int64 [Q]: 1 + the rivals that score at least as much; C + 1 where a score of the row is not finite.
    Raises:
        ValueError: If the shapes disagree or a positive is not a column.
    """
    scores = np.asarray(scores, dtype=np.float32)
    positives = np.asarray(positives, dtype=np.int64)
    if scores.ndim != 2 or positives.shape != scores.shape[:1]:
        raise ValueError(f"scores must be [Q, C] and positives [Q], not {scores.shape} and {positives.shape}")
    if ((positives < 0) | (positives >= scores.shape[1])).any():
        raise ValueError(f"a positive is not among the {scores.shape[1]} candidates")
    identities = np.broadcast_to(np.asarray(identities), scores.shape)
    rows = np.arange(len(scores))
    own = scores[rows, positives][:, None]
    rival = identities != identities[rows, positives][:, None]
    result = 1 + (rival & (scores >= own - np.float32(TIE))).sum(axis=1)
    result[~np.isfinite(scores).all(axis=1)] = scores.shape[1] + 1
    return result


def losing_ties(right: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Places of candidates, best first, where a right one must beat wrong ones by more than rounding.

    Args:
        right: bool [C].
        scores: float32 [C].
    """
    return np.lexsort((right, -(scores - right * np.float32(TIE))))


def ranks_in_pool(
    queries: np.ndarray, pool: np.ndarray, positives: np.ndarray, relevant: Sequence[Sequence[int]]
) -> np.ndarray:
    """Ranks of ``positives`` among the whole pool, in blocks of queries.

    Args:
        queries: float32 [Q, D].
        pool: float32 [C, D], one row per distinct candidate.
        positives: int [Q], the row of the right candidate.
        relevant: For each query all rows that are right for it; those are not rivals.
    Returns:
        int64 [Q].
    Memory: about 16 MiB of scores at a time, never [Q, C].
    """
    result = np.empty(len(queries), dtype=np.int64)
    for block in _blocks(len(queries), len(pool)):
        scores = _dot(queries[block], pool.T)
        identities = np.tile(np.arange(len(pool)), (len(scores), 1))
        for row, right, positive in zip(identities, relevant[block], positives[block], strict=True):
            row[list(right)] = positive
        result[block] = ranks(scores, positives[block], identities)
    return result


def ranks_in_lists(queries: np.ndarray, pool: np.ndarray, lists: np.ndarray) -> np.ndarray:
    """Ranks within one list of candidates per query.

    Args:
        queries: float32 [Q, D].
        pool: float32 [P, D].
        lists: int [Q, C], rows of ``pool``: the right candidate first, then its rivals; shorter lists are filled up
            with the right candidate, which is not its own rival.
    Returns:
        int64 [Q].
    """
    result = np.empty(len(queries), dtype=np.int64)
    for block in _blocks(len(queries), lists.shape[1] * pool.shape[1]):
        scores = _dot(pool[lists[block]], queries[block][:, :, None])[:, :, 0]
        result[block] = ranks(scores, np.zeros(len(scores), dtype=np.int64), lists[block])
    return result


def drawing(pool: Set[str], count: int, seed: int) -> Choose:
    """Draws ``count`` rivals from a pool (all, if there are fewer) by the smallest hash of (seed, query, candidate).

    Keys are hexadecimal SHA-256. Nothing else enters, least of all an order. Cost: one vectorised hash of the pool
    per query.
    """
    keys = sorted(pool)
    place = {key: i for i, key in enumerate(keys)}
    hashes = np.array([int(key[:16], 16) for key in keys], dtype=np.uint64)

    def choose(query: str, right: Set[str]) -> list[str]:
        salt = hashlib.sha256(f"{seed} {query}".encode()).hexdigest()[:16]
        order = _mix(hashes ^ np.uint64(int(salt, 16)))
        others = np.delete(np.arange(len(keys)), [place[key] for key in right])
        if len(others) > count:
            others = others[np.argpartition(order[others], count)[:count]]
        return [keys[i] for i in others]

    return choose


def _mix(x: np.ndarray) -> np.ndarray:
    """The splitmix64 finaliser: uint64 to uint64, one to one, wrapping."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hit_rate(ranks: np.ndarray, k: int) -> float:
    """Share of queries whose right candidate is among the first k, 0 to 1."""
    return float(np.mean(np.asarray(ranks) <= k))


def mrr(ranks: np.ndarray) -> float:
    """Mean of 1 / rank, 0 to 1."""
    return float(np.mean(1.0 / np.asarray(ranks)))


def chance_hit(k: int, candidates: int | np.ndarray) -> float:
    """hit@k of random scores: the mean of min(1, k / candidates) over the queries."""
    return float(np.mean(np.minimum(1.0, k / np.asarray(candidates))))


# k is the depth. *Relevant* is a candidate of a grade above 0. A list shorter than k counts as if wrong ones followed.


def hit_at(found: Sequence[str], grades: Mapping[str, int], k: int) -> float:
    """1.0 if a relevant candidate is among the first k, else 0.0: what M-BEIR calls Recall@k, others Success@k."""
    return float(any(grades.get(candidate, 0) > 0 for candidate in found[:k]))


def recall_at(found: Sequence[str], grades: Mapping[str, int], k: int) -> float:
    """Share of all relevant candidates that are among the first k; 0.0 where none is relevant."""
    relevant = {candidate for candidate, grade in grades.items() if grade > 0}
    return len(relevant.intersection(found[:k])) / len(relevant) if relevant else 0.0


def ndcg_at(found: Sequence[str], grades: Mapping[str, int], k: int) -> float:
    """Discounted grades of the first k over those of the best possible list; 0.0 where nothing is relevant.

    Negative grades count as 0. Source: Järvelin and Kekäläinen, 2002; the discount is log2(rank + 1).
    """
    gained = [max(0, grades.get(candidate, 0)) for candidate in found[:k]]
    ideal = ideal_gain(grades, k)
    return discounted(gained) / ideal if ideal else 0.0


def ideal_gain(grades: Mapping[str, int], k: int) -> float:
    """The discounted grades of the best possible list."""
    return discounted(sorted((max(0, grade) for grade in grades.values()), reverse=True)[:k])


def discounted(gains: Iterable[float]) -> float:
    return sum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains, start=1))


def reciprocal_rank(found: Sequence[str], grades: Mapping[str, int], k: int) -> float:
    """1 / rank of the first relevant candidate, 0.0 if it is not among the first k."""
    ranks = (rank for rank, candidate in enumerate(found[:k], start=1) if grades.get(candidate, 0) > 0)
    first = next(ranks, None)
    return 1 / first if first else 0.0


Storage = Literal["float32", "int8", "binary"]


def truncated(vectors: np.ndarray, dimension: int) -> np.ndarray:
    """The first ``dimension`` dimensions of float32 [n, D], L2-normalised again; whole vectors as they are."""
    if dimension == vectors.shape[1]:
        return vectors
    part = vectors[:, :dimension]
    return part / np.maximum(np.linalg.norm(part, axis=1, keepdims=True), np.finfo(np.float32).tiny)


def reduced(vectors: np.ndarray, storage: Storage) -> np.ndarray:
    """Vectors whose dot products order candidates as an index that stores them so does, without rescoring.

    The codes are those of ``sentence_transformers.quantize_embeddings``: int8 with the ranges of these vectors;
    binary as signs, -1 or 1, whose dot products order candidates by Hamming distance.

    Args:
        vectors: float32 [n, D].
    Returns:
        float32 [n, D]; rows that are not finite stay so.
    """
    finite = np.isfinite(vectors).all(axis=1)
    if storage == "float32" or not finite.any():
        return vectors
    from sentence_transformers import quantize_embeddings

    codes = np.full_like(vectors, np.nan)
    if storage == "int8":
        known = vectors[finite]
        codes[finite] = quantize_embeddings(known, "int8", ranges=np.stack([known.min(axis=0), known.max(axis=0)]))
    else:
        bits = np.unpackbits(quantize_embeddings(vectors[finite], "ubinary"), axis=1, count=vectors.shape[1])
        codes[finite] = 2.0 * bits - 1.0
    return codes


@dataclass(frozen=True)
class Health:
    """What a set of vectors of *distinct* contents looks like."""

    rows: int
    non_finite: int  # rows that hold NaN or infinity
    spread: float  # largest distance of a finite row from the first finite one; 0 to 2 for unit vectors
    collapsed: bool  # no two of several rows can be told apart, or no row is finite

    def fault(self, what: str) -> str:
        """What is wrong with these ``what`` vectors; "" if nothing."""
        if self.non_finite:
            return f"{self.non_finite} of {self.rows} {what} vectors are not finite"
        return f"all {self.rows} {what} vectors are the same; the model has collapsed" if self.collapsed else ""


def embedding_health(vectors: np.ndarray) -> Health:
    """Looks for NaN and collapse in float32 [n, D]; one row alone cannot collapse."""
    return health_of(vectors[block] for block in _blocks(len(vectors), vectors.shape[1]))


def health_of(blocks: Iterable[np.ndarray], left_out: int = 0) -> Health:
    """The same of vectors that come in blocks; ``left_out`` rows of NaN do not count."""
    first, spread, rows, broken = None, 0.0, -left_out, -left_out
    for block in blocks:
        finite = block[np.isfinite(block).all(axis=1)]
        rows, broken = rows + len(block), broken + len(block) - len(finite)
        if len(finite):
            first = finite[0].copy() if first is None else first
            spread = max(spread, float(np.linalg.norm(finite - first, axis=1).max()))
    return Health(rows, broken, spread, spread <= COLLAPSED if rows > 1 else rows == 1 and first is None)


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", over="ignore"):  # NaN and infinity are wanted in the scores, not as warnings
        return np.matmul(a, b, dtype=np.float32)


def _blocks(rows: int, floats_per_row: int) -> Iterator[slice]:
    step = max(1, BLOCK // max(1, floats_per_row))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))
