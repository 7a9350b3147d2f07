"""Hard negatives from a model: for every turn, targets of other images that the model takes for right, or nearly so.

    data ─▶ every query and target once ─embed─▶ vectors ─cosine─▶ ranked candidates ─▶ data with ``negatives``

Ranks and margins are those of sentence-transformers' ``mine_hard_negatives``, which takes no vectors. A target of the
same image, which answers another question about it, or one that equals a right target is never a negative.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from sentence_transformers.util import cos_sim

from muco.base.files import claimed, write_json
from muco.base.machine import versions
from muco.data.jsonl import sample_to_row, write_jsonl
from muco.data.same import sample_key, target_key
from muco.data.source import Data
from muco.dialogue import Content, Sample, Turn
from muco.errors import DataError, MucoError, OutputError
from muco.evaluate.cache import Book, Embedder, EmbeddingCache, known_by

SCORES = 1 << 28  # similarities in memory at a time, 4 bytes each
QUERIES = 4096  # most queries that are mined at a time


@dataclass(frozen=True)
class Mining:
    """Which candidates become hard negatives."""

    negatives: int = 3  # per turn; fewer where fewer qualify
    # The first ranks are left out, where false negatives are most likely. Rank 0 is the candidate most similar to the
    # query, without the query's own targets.
    skip: int = 0
    depth: int = 100  # ranks from here on are left out as too easy
    margin: float | None = None  # the cosine by which a negative must score below the right target
    relative_margin: float | None = None  # as a share of the right target's score; 0.05 takes at most 95 % of it
    max_score: float | None = None  # bounds of a negative's cosine
    min_score: float | None = None
    sample: Literal["top", "random"] = "top"  # "top" takes the first that qualify, "random" draws among all of them
    seed: int = 0  # of that draw

    def __post_init__(self) -> None:
        if self.negatives < 1 or self.skip < 0:
            raise MucoError(f"mining: {self.negatives} negatives, skip {self.skip}; set at least 1 and at least 0")
        if self.depth < self.skip + self.negatives:
            raise MucoError(
                f"mining: ranks {self.skip} to {self.depth} do not hold {self.negatives} negatives; raise depth"
            )
        if self.sample not in ("top", "random"):
            raise MucoError(f"mining: sample is {self.sample!r}; set 'top' or 'random'")
        for name in ("margin", "relative_margin"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise MucoError(f"mining: {name} is {value}; set 0 or more")

    def takes(self, score: float, right: float) -> bool:
        """Whether a candidate qualifies by its cosine; ``right`` is that of the right target, the lowest of several."""
        return (
            (self.margin is None or score + self.margin <= right)
            and (self.relative_margin is None or score <= right - abs(right) * self.relative_margin)
            and (self.max_score is None or score <= self.max_score)
            and (self.min_score is None or score >= self.min_score)
        )


def mine(
    data: Data,
    model: Embedder,
    output: Path,
    mining: Mining = Mining(),  # noqa: B008 - frozen
    *,
    batch_size: int = 64,
    cache: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Writes the data as JSONL with mined negatives behind those it has; ``<output>.json`` says how they were made.

    Of paraphrases the first is embedded. Candidates are the targets of the data, texts and images. Memory: all vectors.

    Args:
        cache: Folder of encoded vectors, from which an interrupted call resumes; it may be deleted afterwards.
        progress: Called with (contents encoded or queries mined, their total number).
    Returns:
        Counts: ``turns``, ``queries``, ``candidates``, ``mined``, ``turns_with_fewer``, and ``output``.
    Raises:
        DataError: If the data cannot be read, or has images that are not files (its copy could not name them).
        OutputError: If the output exists, or another process writes it.
    """
    with claimed(output, beside=True):
        if output.exists():
            raise OutputError(f"{output} exists; choose another output file or delete it")
        pairs = _Pairs(data)
        fingerprints = {"model": known_by(model), "data": data.fingerprint}
        store = None if cache is None else EmbeddingCache(cache, **fingerprints)
        keys = {*pairs.candidates, *pairs.right}
        vectors, row_of = pairs.book.vectors(model, batch_size, keys, cache=store, progress=progress)
        mined = _mine(pairs, {key: vectors[row] for key, row in row_of.items()}, mining, progress)
        write_jsonl(output, _rows(data, pairs, mined, output.absolute().parent))
        found = [len(mined.get(query, ())) for queries in pairs.turns for query in queries]
        counts = {
            "turns": len(found),
            "queries": len(pairs.right),
            "candidates": len(pairs.candidates),
            "mined": sum(found),
            "turns_with_fewer": sum(count < mining.negatives for count in found),
        }
        made = {"mining": asdict(mining), **fingerprints, "versions": versions(), "counts": counts}
        write_json(output.with_name(f"{output.name}.json"), made)
        return counts | {"output": str(output)}


class _Pairs:
    """The queries and targets of data under their keys, and what must not be a negative of what."""

    def __init__(self, data: Data) -> None:
        self.book = Book()
        self.candidates: dict[str, None] = {}  # in order of first mention
        self.right: dict[str, dict[str, None]] = {}  # query -> its targets
        self.turns: list[list[str]] = []  # per sample, the query of each turn
        self._identities: dict[str, Hashable] = {}  # of targets
        self._images: dict[str, set[Hashable]] = defaultdict(set)  # query -> identities of the images it is about
        self._answers: dict[Hashable, set[Hashable]] = defaultdict(set)  # such an identity -> those of its targets
        for index in range(len(data)):
            sample = data[index]
            image = sample_key(sample, 0, index)
            self.turns.append([self._add(sample, turn, image) for turn in sample.turns])

    def _add(self, sample: Sample, turn: Turn, image: Hashable) -> str:
        asked = turn.query[0]
        query = self.book.add(Content(asked.text, (*sample.images, *asked.images)), sample.place)
        target = self.book.add(turn.target[0], sample.place)
        self.candidates[target] = None
        self.right.setdefault(query, {})[target] = None
        self._images[query].add(image)
        self._answers[image].update(target_key(content, sample.place) for content in turn.target)
        self._identities[target] = target_key(turn.target[0], sample.place)
        return query

    def allowed(self, query: str, target: str) -> bool:
        """Whether a target answers no turn of the query's images."""
        return not any(self._identities[target] in self._answers[image] for image in self._images[query])


def _mine(
    pairs: _Pairs, vectors: Mapping[str, np.ndarray], mining: Mining, progress: Callable[[int, int], None] | None
) -> dict[str, list[str]]:
    """Query -> its hard negatives, most similar first."""
    candidates, queries = list(pairs.candidates), list(pairs.right)
    corpus = np.stack([vectors[candidate] for candidate in candidates])
    numbers = {candidate: number for number, candidate in enumerate(candidates)}
    at_once = max(1, min(QUERIES, SCORES // len(candidates)))
    mined: dict[str, list[str]] = {}
    for start in range(0, len(queries), at_once):
        part = queries[start : start + at_once]
        similarities = cos_sim(np.stack([vectors[query] for query in part]), corpus)
        for query, scores in zip(part, similarities, strict=True):
            targets = [numbers[target] for target in pairs.right[query]]
            right = float(scores[targets].min())
            scores[targets] = -math.inf  # of no rank
            ranked = scores.topk(min(mining.depth, len(candidates) - len(targets))).indices[mining.skip :]
            fit = [candidates[number] for number in ranked.tolist() if mining.takes(float(scores[number]), right)]
            usable = [candidate for candidate in fit if pairs.allowed(query, candidate)]
            if mining.sample == "random" and len(usable) > mining.negatives:
                rng = np.random.default_rng([mining.seed, int(query[:16], 16)])  # of nothing else
                usable = [usable[i] for i in sorted(rng.permutation(len(usable))[: mining.negatives])]
            mined[query] = usable[: mining.negatives]
        if progress:
            progress(start + len(part), len(queries))
    return mined


def _rows(data: Data, pairs: _Pairs, mined: Mapping[str, list[str]], folder: Path) -> Iterator[dict[str, Any]]:
    for index in range(len(data)):
        sample = data[index]
        if any(turn.scores for turn in sample.turns):
            raise DataError(f"{sample.place}: has a teacher's scores, which mined negatives would not have; mine first")
        found = [[pairs.book.contents[k] for k in mined.get(key, ())] for key in pairs.turns[index]]
        turns = [
            Turn(turn.query, turn.target, turn.kind, tuple(dict.fromkeys((*turn.negatives, *added))))
            for turn, added in zip(sample.turns, found, strict=True)
        ]
        try:
            yield sample_to_row(sample.with_turns(turns), folder)
        except DataError as error:
            raise DataError(f"{error}; mining writes JSONL, which names images by their files") from error
