"""How well a model finds the right target: ``evaluate_retrieval(model, data)`` on any data of samples and turns.

    data ─read─▶ turns ─Builder─▶ tasks ─embed─▶ vectors ─score─▶ scores per task and kind ─▶ retrieval.json

=================== ======================================= ========================================================
task                query                                   candidates
=================== ======================================= ========================================================
answer              image + question, per kind              the right target and drawn other targets of that kind
answer_text_only    the same question without the image     the same (what the question alone gives away)
image_to_caption    image + question of kind "retrieval"    all captions of the set
caption_to_image    the caption                             all images of the set
within              image + question, every kind            the targets of the same sample: is the question read?
blind               as image_to_caption, all pixels black   all captions; above chance means that something leaks
text_to_image, …    a query of a sample without image       all targets of such turns, by what both sides are made of
=================== ======================================= ========================================================

The identity of a content is its text and the bytes of its images. Pools hold each identity once, in the order of their
digests, and every target that the data calls right for a query is no rival of the right one. The draw depends on (seed,
query, candidate) only: neither the order of the samples nor the batch size changes it.
"""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from muco.dialogue import Content, Sample
from muco.errors import DataError, MucoError
from muco.evaluate import metrics
from muco.evaluate.cache import Book, EmbeddingCache, embed
from muco.evaluate.report import versions, warnings, write_json

if TYPE_CHECKING:
    from muco.data import Data

RETRIEVAL = "retrieval"  # the kind of the turn whose target is the caption
CONTROLS = ("answer_text_only", "blind")  # tasks that show what is known without the image
AT = (1, 5, 10)
RULES = {
    "metric": "hit@k and MRR of the right target by float32 dot product; ties are lost; hit@k: null if k >= candidates",
    "identity": "text and image bytes; the first paraphrase; any target the data calls right for a query is no rival",
    "draw": "the targets of the same kind with the smallest hash of (seed, query, target)",
}


class Embedder(Protocol):
    """What evaluates: anything that maps contents to unit vectors."""

    def encode(self, contents: list[Content], /, *, batch_size: int) -> np.ndarray: ...
    @property
    def fingerprint(self) -> str: ...


def evaluate_retrieval(
    model: Embedder,
    data: Data,
    *,
    output: Path | None = None,
    batch_size: int = 64,
    candidates: int = 100,
    seed: int = 0,
    limit: int | None = None,
    cache: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Scores a model on every task that the data can give.

    Args:
        model: Encodes contents to float32 [n, d], L2-normalised, and has a fingerprint.
        data: Samples with a fingerprint.
        output: Folder that gets ``retrieval.json``; nothing is written without it.
        batch_size: Contents per forward pass; the scores do not depend on it.
        candidates: Size of the drawn lists of "answer", the right target included; fewer where fewer exist.
        seed: Of the draw.
        limit: Only the first so many samples of the data.
        cache: Folder of encoded vectors, used again only for the same model and data.
        progress: Called with (contents encoded, contents in all).
    Returns:
        A dictionary that JSON can hold: "tasks" (name -> scores, or for both "answer" tasks {"kinds", "mean"}),
        "skipped" (task -> reason), "warnings", "collapsed", "non_finite", and all that tells where the scores come
        from. Shares are 0 to 1.
    Raises:
        DataError: If the data gives no task at all, or a content cannot be read.
        MucoError: If ``candidates`` or ``limit`` is too small.
        OutputError: If the output or cache folder cannot be written.
    """
    start = time.perf_counter()
    origin = {"model": model.fingerprint, "data": data.fingerprint}
    store = None if cache is None else EmbeddingCache(cache, **origin)
    result = score_tasks(
        model,
        data,
        batch_size=batch_size,
        candidates=candidates,
        seed=seed,
        limit=limit,
        cache=store,
        progress=progress,
    )
    result |= origin | {
        "rules": RULES,
        "candidates": candidates,
        "seed": seed,
        "limit": limit,
        "batch_size": batch_size,
        "versions": versions(),
        "seconds": round(time.perf_counter() - start, 3),
    }
    if output is not None:
        write_json(Path(output) / "retrieval.json", result)
    return result


def score_tasks(
    model: Embedder,
    data: Data,
    *,
    batch_size: int = 64,
    candidates: int = 100,
    seed: int = 0,
    limit: int | None = None,
    cache: EmbeddingCache | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """The scores of :func:`evaluate_retrieval` without their origin: takes no fingerprint and writes no file."""
    if candidates < 2:
        raise MucoError(f"candidates is {candidates}; it counts the right target too, so give at least 2")
    if limit is not None and limit < 1:
        raise MucoError(f"limit is {limit}; give at least 1 sample, or leave it out")
    book = Book()
    samples = len(data) if limit is None else min(limit, len(data))
    turns = [turn for i in range(samples) for turn in read_turns(book, i, data[i])]
    builder = Builder(book, turns)
    builder.build(candidates, seed)
    if not builder.tasks:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in builder.skipped.items())
        raise DataError(
            f"nothing to evaluate in {samples} samples ({reasons}); see `muco data check` for what is there"
        )

    keys = book.in_order({key for task in builder.tasks for key in (*task.queries, *task.pool)})
    vectors = embed(keys, functools.partial(_encode, model, book, batch_size), cache=cache, progress=progress)
    row_of = {key: row for row, key in enumerate(keys)}
    scored = [(task, score(task, vectors, row_of)) for task in builder.tasks]
    health = metrics.embedding_health(vectors)
    return {
        "tasks": _by_task(scored),
        "skipped": builder.skipped,
        "warnings": [
            line
            for task, scores in scored
            for line in warnings(task.label, scores, control=task.name if task.name in CONTROLS else None)
        ],
        "collapsed": health.collapsed or any(_collapsed(task, scores) for task, scores in scored),
        "non_finite": health.non_finite,
        "samples": samples,
        "turns": len(turns),
        "encoded": len(keys),
        "dimension": vectors.shape[1],
    }


# ---------------------------------------------------------------- turns


@dataclass(frozen=True)
class Asked:
    """One turn as evaluation sees it. ``query`` (images of the sample + question), ``target`` and ``image`` (the
    images of the sample alone, None without) are keys of the book; ``sample`` is the sample's index."""

    sample: int
    kind: str
    query: str
    target: str
    image: str | None


def read_turns(book: Book, index: int, sample: Sample) -> list[Asked]:
    """Enters the first paraphrase of every turn of a sample in the book."""
    image = book.add(Content(images=sample.images), sample.place) if sample.images else None
    turns = []
    for turn in sample.turns:
        question = turn.query[0]
        query = book.add(Content(question.text, sample.images + question.images), sample.place)
        turns.append(Asked(index, turn.kind or "(none)", query, book.add(turn.target[0], sample.place), image))
    return turns


# ---------------------------------------------------------------- tasks


@dataclass(frozen=True)
class Task:
    """Queries, and the pool in which each has its right target.

    Args:
        queries: Keys of what is encoded, Q of them.
        pool: Distinct keys, sorted.
        positives: int64 [Q], the place of the right target in the pool.
        relevant: For each query the places of all targets that the data calls right for it.
        lists: int64 [Q, C], places in the pool, the right one first (see ``metrics.ranks_in_lists``); None: all of it.
    """

    name: str
    kind: str | None
    queries: list[str]
    pool: list[str]
    positives: np.ndarray
    relevant: list[list[int]]
    lists: np.ndarray | None = None

    @property
    def label(self) -> str:
        return self.name if self.kind is None else f"{self.name}/{self.kind}"

    @property
    def candidates(self) -> np.ndarray:
        """int64 [Q]: the right target and its rivals."""
        if self.lists is not None:
            return 1 + (self.lists != self.lists[:, :1]).sum(axis=1)
        return np.array([len(self.pool) - len(right) + 1 for right in self.relevant])


class Builder:
    """Makes all tasks that the turns can give (``tasks``) and says why the others cannot be (``skipped``)."""

    def __init__(self, book: Book, turns: Sequence[Asked]) -> None:
        self.book, self.turns = book, turns
        self.tasks: list[Task] = []
        self.skipped: dict[str, str] = {}
        self.rights: dict[str, set[str]] = defaultdict(set)
        for turn in turns:
            self.rights[turn.query].add(turn.target)

    def build(self, candidates: int, seed: int) -> None:
        self.answers(candidates, seed)
        self.captions()
        self.within()
        self.others()

    def add(
        self,
        name: str,
        kind: str | None,
        pairs: Sequence[tuple[str, str]],
        *,
        pool: Iterable[str] = (),
        rights: Mapping[str, set[str]] | None = None,
        choose: metrics.Choose | None = None,
    ) -> Task | None:
        """Adds a task of (query, right target) pairs; the pool is at least their targets.

        A query whose target has no rival is left out, and a task without queries is skipped.
        """
        rights = self.rights if rights is None else rights
        pool = sorted({*pool, *(target for _, target in pairs)})
        place = {key: i for i, key in enumerate(pool)}
        queries, positives, relevant, rivals = [], [], [], []
        for query, target in pairs:
            right = rights[query] & place.keys()
            others = pool[len(right) :] if choose is None else choose(query, right)  # of the whole pool, only how many
            if others:
                queries.append(query)
                positives.append(place[target])
                relevant.append(sorted(place[key] for key in right))
                rivals.append([place[key] for key in others])
        lists = None if choose is None or not queries else _table(positives, rivals)
        task = Task(name, kind, queries, pool, np.array(positives, dtype=np.int64), relevant, lists)
        if not queries:
            self.skipped[task.label] = "no query has two different targets to choose from" if pairs else "no such turns"
            return None
        self.tasks.append(task)
        return task

    def answers(self, candidates: int, seed: int) -> None:
        by_kind: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for turn in self.turns:
            if turn.image and turn.kind != RETRIEVAL:
                by_kind[turn.kind].append((turn.query, turn.target))
        if not by_kind:
            self.skipped["answer"] = self.skipped["answer_text_only"] = "no such turns"
        for kind, pairs in sorted(by_kind.items()):
            choose = metrics.drawing({target for _, target in pairs}, candidates - 1, seed)
            task = self.add("answer", kind, pairs, choose=choose)
            if task is None:
                continue
            if all(self.book.contents[query].text for query in task.queries):
                unseen = [self.book.add(Content(self.book.contents[query].text)) for query in task.queries]
                self.tasks.append(replace(task, name="answer_text_only", queries=unseen))
            else:
                self.skipped[f"answer_text_only/{kind}"] = "a question has no text"

    def captions(self) -> None:
        asked = [turn for turn in self.turns if turn.image and turn.kind == RETRIEVAL]
        task = self.add("image_to_caption", None, [(turn.query, turn.target) for turn in asked])
        texts = [turn for turn in asked if not self.book.contents[turn.target].images]
        rights: dict[str, set[str]] = defaultdict(set)
        for turn in texts:
            rights[turn.target].add(turn.image)
        images = {turn.image for turn in self.turns if turn.image} if texts else ()
        self.add("caption_to_image", None, [(t.target, t.image) for t in texts], pool=images, rights=rights)
        if task:
            black = blackening(self.book)
            self.tasks.append(replace(task, name="blind", queries=[black(query) for query in task.queries]))
        else:
            self.skipped["blind"] = self.skipped["image_to_caption"]

    def within(self) -> None:
        asked = [turn for turn in self.turns if turn.image]
        targets: dict[int, set[str]] = defaultdict(set)
        for turn in asked:
            targets[turn.sample].add(turn.target)
        # Keyed by query: two samples with the same image and question offer the targets of both.
        offered: dict[str, set[str]] = defaultdict(set)
        for turn in asked:
            offered[turn.query] |= targets[turn.sample]
        pairs = [(turn.query, turn.target) for turn in asked]
        self.add("within", None, pairs, choose=lambda query, right: offered[query] - right)

    def others(self) -> None:
        by_name: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for turn in self.turns:
            if not turn.image:
                sides = (self.book.contents[key] for key in (turn.query, turn.target))
                by_name["_to_".join(map(_made_of, sides))].append((turn.query, turn.target))
        for name, pairs in sorted(by_name.items()):
            self.add(name, None, pairs)


def _table(positives: list[int], rivals: list[list[int]]) -> np.ndarray:
    table = np.repeat(np.array(positives)[:, None], 1 + max(map(len, rivals)), axis=1)
    for row, others in zip(table, rivals, strict=True):
        row[1 : 1 + len(others)] = others
    return table


def _made_of(content: Content) -> str:
    return "+".join(["image"] * bool(content.images) + ["text"] * bool(content.text))


def blackening(book: Book) -> Callable[[str], str]:
    """Key of a query -> key of the same query with black images of the same sizes."""
    from PIL import Image

    from muco.data.images import open_image

    @functools.cache
    def black(text: str, sizes: tuple[tuple[int, int], ...]) -> str:
        return book.add(Content(text, tuple(Image.new("RGB", size) for size in sizes)))

    def blacken(query: str) -> str:
        content, where = book.contents[query], book.places[query]
        return black(content.text, tuple(open_image(i, small_side=0, where=where).size for i in content.images))

    return blacken


# ---------------------------------------------------------------- scores


def _encode(model: Embedder, book: Book, batch_size: int, keys: Sequence[str]) -> np.ndarray:
    try:
        return model.encode([book.contents[key] for key in keys], batch_size=batch_size)
    except DataError:
        for key in keys:  # the model knows no rows: find the one that it refuses, and name it
            try:
                model.encode([book.contents[key]], batch_size=1)
            except DataError as error:
                raise type(error)(f"{book.places[key]}: {error}") from error
        raise


def score(task: Task, vectors: np.ndarray, row_of: Mapping[str, int]) -> dict[str, Any]:
    """Scores of one task; ``vectors`` is float32 [n, d] and ``row_of`` finds the row of a key."""
    queries = vectors[[row_of[key] for key in task.queries]]
    pool = vectors[[row_of[key] for key in task.pool]]
    query_health = metrics.embedding_health(vectors[[row_of[key] for key in sorted(set(task.queries))]])
    pool_health = metrics.embedding_health(pool)
    if pool_health.collapsed:
        pool = np.zeros_like(pool)  # what is left of the differences is rounding: let all of them tie, and so be lost
    if task.lists is None:
        ranks = metrics.ranks_in_pool(queries, pool, task.positives, task.relevant)
    else:
        ranks = metrics.ranks_in_lists(queries, pool, task.lists)
    candidates = task.candidates
    reached = [k for k in AT if k < candidates.min()]  # with k candidates or fewer, everyone hits
    _, counts = np.unique(task.positives, return_counts=True)
    return {
        "queries": len(queries),
        "pool": len(pool),
        "candidates_min": int(candidates.min()),
        "candidates_max": int(candidates.max()),
        **{f"hit@{k}": metrics.hit_at(ranks, k) if k in reached else None for k in AT},
        "mrr": metrics.mrr(ranks),
        **{f"chance@{k}": metrics.chance_hit(k, candidates) for k in AT},
        "most_common": float(counts.max() / len(queries)),  # hit@1 of always giving the same answer
        "health": {"queries": asdict(query_health), "pool": asdict(pool_health)},
    }


def _by_task(scored: Sequence[tuple[Task, dict[str, Any]]]) -> dict[str, Any]:
    tasks: dict[str, Any] = {}
    for task, scores in scored:
        if task.kind is None:
            tasks[task.name] = scores
        else:
            tasks.setdefault(task.name, {"kinds": {}})["kinds"][task.kind] = scores
    for group in tasks.values():
        if "kinds" in group:
            group["mean"] = _mean(list(group["kinds"].values()))
    return tasks


def _mean(kinds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Every kind counts alike; a value that one kind lacks has no mean."""
    names = [name for name in kinds[0] if name.startswith(("hit@", "chance@")) or name == "mrr"]
    columns = {name: [kind[name] for kind in kinds] for name in names}
    return {
        "queries": sum(kind["queries"] for kind in kinds),
        "candidates_min": min(kind["candidates_min"] for kind in kinds),
        "candidates_max": max(kind["candidates_max"] for kind in kinds),
        **{name: None if None in column else float(np.mean(column)) for name, column in columns.items()},
    }


def _collapsed(task: Task, scores: Mapping[str, Any]) -> bool:
    # Without the image, equal queries are as it should be.
    sides = ("pool",) if task.name in CONTROLS else ("queries", "pool")
    return any(scores["health"][side]["collapsed"] for side in sides)
