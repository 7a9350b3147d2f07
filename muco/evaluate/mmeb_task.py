"""One data set of MMEB with lists of candidates: its rows as distinct contents, their vectors, what became of each."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from muco.data.left_out import Broken, LeftOut, counts
from muco.data.left_out import warnings as left_out_warnings
from muco.data.mmeb_lists import ListSource
from muco.dialogue import Content
from muco.errors import DataError
from muco.evaluate import metrics
from muco.evaluate.benchmark import FAILURES, FOUND, Failure, Outcome, Progress, Shown, TaskResult, gate
from muco.evaluate.cache import Book
from muco.evaluate.driver import Benchmark

log = logging.getLogger(__name__)

METRIC = "hit@1"


@dataclass(frozen=True)
class ListQuery:
    """One query by keys of the book."""

    number: int
    query: str
    candidates: tuple[str, ...]  # all of its list, right ones first, repeated ones too
    lost: Collection[str] = ()  # keys that cannot be embedded
    right: int = 1  # how many of the list are right

    @functools.cached_property
    def places(self) -> dict[str, int]:
        """Distinct candidates that are left, right ones first, and where each is in the list for the first time."""
        places: dict[str, int] = {}
        for place, key in enumerate(self.candidates):
            if key not in self.lost:
                places.setdefault(key, place)
        return places

    @functools.cached_property
    def rights(self) -> int:
        """How many of ``places`` are right."""
        return len(self.places.keys() & set(self.candidates[: self.right]))

    @property
    def missed(self) -> bool:
        """Whether too little is left to answer the query: it, all that is right or all others are lost."""
        return self.query in self.lost or not 0 < self.rights < len(self.places)

    @property
    def repeated(self) -> bool:
        """Whether a right candidate is among the wrong ones again."""
        return not set(self.candidates[: self.right]).isdisjoint(self.candidates[self.right :])

    @property
    def size(self) -> int:
        """How many distinct candidates the query chooses from; of one that is missed, how many it names."""
        return len(set(self.candidates)) if self.missed else len(self.places)


@dataclass(frozen=True)
class Judged:
    """A query's outcome."""

    outcome: Outcome
    rank: int  # from 1, beyond the list where a score is not finite
    margin: float | None = None  # score of the best rival minus that of the best right one; None if not finite
    tied: bool = False  # nothing but a tie was lost


class MmebTask:
    """One data set, read: its queries and their distinct contents.

    ``fingerprint`` covers the numbers of the rows that are asked, their texts and the bytes of their images.

    Args:
        queries, seed: See :func:`sample`.
        official: A candidate is the first content of its official name among the rows that are asked; where the source
            says so, equal contents of two names are two candidates.
        skip_broken: Leave out what cannot be embedded.
    Raises:
        DataError: If a row or an image cannot be used and may not be left out; names file and row.
    """

    def __init__(
        self, source: ListSource, queries: int | None, seed: int, *, official: bool = False, skip_broken: bool = False
    ) -> None:
        self.left_out = LeftOut(skip_broken)
        self.source, self.book = source, Book(self.left_out)
        self.name, self.queries = source.name, list[ListQuery]()
        keys: dict[Content, str] = {}  # lists share most of their candidates
        named: dict[str, str] = {}  # official name -> key of the first content
        self.content_of: dict[str, str] = {}  # digest of an official name -> the same, where names make rivals
        digest = hashlib.sha256(source.name.encode())

        def key_of(content: Content | DataError, where: str) -> str:
            if isinstance(content, DataError):
                return self.book.lose(content)
            if content not in keys:
                keys[content] = self.book.add(content, where)
            return keys[content]

        def known_as(name: str, key: str) -> str:
            first = named.setdefault(name, key)
            if not source.rivals_by_name:
                return first
            candidate = hashlib.sha256(name.encode()).hexdigest()
            self.content_of[candidate] = first
            return candidate

        for question in source.questions(set(sample(source.rows, queries, seed)), self.left_out):
            query = key_of(question.query, question.where)
            candidates = [key_of(candidate, question.where) for candidate in question.candidates]
            if official:
                candidates = [known_as(*pair) for pair in zip(question.names, candidates, strict=True)]
            asked = ListQuery(question.number, query, tuple(candidates), right=question.right)
            if asked.rights == len(asked.places):
                raise DataError(f"{question.where}: all candidates are the same; a query needs a wrong one too")
            self.queries.append(asked)
            several = [asked.right] if asked.right > 1 else []
            digest.update(json.dumps([asked.number, asked.query, asked.candidates, *several]).encode())
        if self.content_of:
            digest.update(json.dumps(self.content_of).encode())
        self.fingerprint = digest.hexdigest()

    def content(self, candidate: str) -> str:
        """The key of a candidate's content."""
        return self.content_of.get(candidate, candidate)

    @property
    def needed(self) -> set[str]:
        """Keys of all contents that are asked or ranked, and can be read."""
        ranked = {self.content(key) for asked in self.queries for key in asked.candidates}
        return ({asked.query for asked in self.queries} | ranked) & self.book.contents.keys()

    def score(self, run: Benchmark, progress: Progress | None) -> TaskResult:
        """Encodes what the cache lacks and ranks every list; call it on every process alike."""
        log.info("%s: %d queries, %d contents", self.name, len(self.queries), len(self.needed))
        how = {"cache": run.cache(self.fingerprint), "shared": True, "progress": progress}
        vectors, row_of = self.book.vectors(run.model, run.batch_size, self.needed, **how)
        lost = {*self.left_out.reasons, *(name for name, key in self.content_of.items() if key in self.left_out)}
        self.queries = [replace(asked, lost=lost) for asked in self.queries]
        pool = sorted({row_of[self.content(key)] for asked in self.queries for key in asked.places})
        queries = sorted({row_of[asked.query] for asked in self.queries if asked.query not in lost})
        health = {
            "query": metrics.embedding_health(vectors[queries]),
            "candidate": metrics.embedding_health(vectors[pool]),
        }
        # What is left of the differences in a collapsed pool is rounding: let all of them tie, and so be lost.
        candidates = np.zeros_like(vectors) if health["candidate"].collapsed else vectors
        judged = []
        for asked in self.queries:
            if asked.missed:
                # no candidate is found, and what is right is behind all
                judged.append(Judged(Outcome(str(asked.number), 0.0, None, ()), asked.size + 1))
                continue
            rows = [row_of[self.content(key)] for key in asked.places]
            with np.errstate(invalid="ignore", over="ignore"):  # NaN is wanted in the scores, not as a warning
                scores = candidates[rows] @ vectors[row_of[asked.query]]
            judged.append(judge(asked, scores))
        return self._result(judged, health, vectors.shape)

    def _result(
        self, judged: Sequence[Judged], health: Mapping[str, metrics.Health], encoded: tuple[int, int]
    ) -> TaskResult:
        source, asked = self.source, self.queries
        sizes = np.array([question.size for question in asked])
        ranks = np.array([one.rank for one in judged])
        # hit@5 says nothing where everyone hits five of five.
        hits = {f"hit@{k}": metrics.hit_rate(ranks, k) for k in (1, 5) if k < sizes.min()}
        ties, repeated = sum(one.tied for one in judged), sum(one.repeated for one in asked)
        chance = metrics.chance_hit(1, sizes / np.array([max(1, one.rights) for one in asked]))
        facts = {
            **source.facts,
            "rows": source.rows,
            "sampled": len(asked) < source.rows,
            "encoded": encoded[0],
            "dimension": encoded[1],
            "ties": ties,
            "repeated_truth": repeated,
        }
        reasons = self.left_out.reasons
        lost = [("query", one.query) for one in asked]
        lost += [
            ("candidate", key) for key in dict.fromkeys(self.content(key) for one in asked for key in one.candidates)
        ]
        broken = tuple(Broken(kind, reasons[key]) for kind, key in lost if key in reasons)
        gone = sum(question.missed for question in asked)
        of_health = filter(None, (of.fault(side) for side, of in health.items()))
        warnings = [*left_out_warnings(broken, gone), *of_health, *gate(hits[METRIC], chance, len(asked))]
        if ties:
            warnings.append(f"queries lost to a tie with a wrong candidate: {ties}")
        if repeated:
            warnings.append(f"queries that list their ground truth again: {repeated}; its copies are not rivals")
        warnings += source.warnings(sizes.tolist())
        return TaskResult(
            self.name,
            METRIC,
            # math.fsum: a sum that the order of rows does not change
            hits | {"mrr": math.fsum(1 / rank for rank in ranks.tolist()) / len(ranks)},
            queries=len(asked),
            candidates=(int(sizes.min()), int(sizes.max())),
            chance=chance,
            data=self.fingerprint,
            facts=facts,
            warnings=tuple(warnings),
            outcomes=tuple(one.outcome for one in judged),
            failures=self._failures(judged),
            left_out=counts(broken, gone),
            broken=broken,
        )

    def _failures(self, judged: Sequence[Judged]) -> tuple[Failure, ...]:
        lost = [
            (one.margin, asked, one.outcome.found)
            for asked, one in zip(self.queries, judged, strict=True)
            if one.rank > 1 and one.margin is not None
        ]
        lost.sort(key=lambda item: (-item[0], item[1].number))
        failures, contents = [], self.book.contents
        for margin, asked, found in lost[:FAILURES]:
            best = tuple(
                (Shown.of(place, contents[self.content(asked.candidates[int(place)])]), score) for place, score in found
            )
            right, place = next(iter(asked.places.items()))
            shown = (
                Shown.of(str(asked.number), contents[asked.query]),
                Shown.of(str(place), contents[self.content(right)]),
            )
            failures.append(Failure(margin, *shown, best))
        return tuple(failures)


def sample(rows: int, queries: int | None, seed: int) -> list[int]:
    """Numbers of the rows that are asked, ascending: those with the smallest hash of (seed, number)."""
    order = sorted(range(rows), key=lambda row: hashlib.sha256(f"{seed} {row}".encode()).digest())
    return sorted(order[:queries])


def judge(asked: ListQuery, scores: np.ndarray) -> Judged:
    """What became of a query; ``scores``, float32 [C], are of ``asked.places``, right candidates first."""
    columns = np.arange(len(scores))
    right = columns < asked.rights
    best = int(np.argmax(scores[: asked.rights]))
    positive, identities = np.array([best]), np.where(right, best, columns)
    rank = int(metrics.ranks(scores[None], positive, identities)[0])
    name = str(asked.number)
    if not np.isfinite(scores).all():
        return Judged(Outcome(name, 0.0, None, ()), rank)
    order = metrics.losing_ties(right, scores)[:FOUND]  # the best right one is where its rank says
    places = list(asked.places.values())
    found = tuple((str(places[column]), float(scores[column])) for column in order)
    margin = float(scores[~right].max() - scores[best])
    tied = rank > 1 and margin <= metrics.TIE
    return Judged(Outcome(name, float(rank == 1), rank, found), rank, margin, tied)
