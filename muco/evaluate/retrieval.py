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

Pools hold each identity once, in the order of their digests. Neither the order of the samples nor the batch size
changes a draw. ``RULES`` has the rest.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from muco.base.files import write_json
from muco.base.machine import versions
from muco.data.source import Data
from muco.errors import DataError, MucoError
from muco.evaluate import metrics
from muco.evaluate.benchmark import Outcome, TaskFiles, TaskResult
from muco.evaluate.cache import Book, Embedder, EmbeddingCache, caveats, known_by
from muco.evaluate.metrics import Storage
from muco.evaluate.report import task_warnings
from muco.evaluate.tasks import Builder, RetrievalTask, read_turns
from muco.sizes import checked_dimension

CONTROLS = ("answer_text_only", "blind")  # tasks that show what is known without the image
AT = (1, 5, 10)
RESULT = "retrieval"  # the name of the files
RULES = {
    "storage": "int8: codes of the library with the ranges of all vectors; binary: signs; both sides, no rescoring",
    "metric": "hit@k and MRR of the right target by float32 dot product; ties are lost; hit@k: null if k >= candidates",
    "identity": "text and image bytes; the first paraphrase; any target the data calls right for a query is no rival",
    "draw": "the targets of the same kind with the smallest hash of (seed, query, target)",
}


@dataclass(frozen=True)
class Ranked:
    """The rank of each query's right target in a task, from 1, and the task's scores."""

    ranks: np.ndarray  # int64 [Q]
    scores: Mapping[str, Any]


Ranks = dict[str, Ranked]  # by task, with its kind


@dataclass(frozen=True)
class Scoring:
    """How tasks are made and scored; a MucoError if ``candidates`` or ``limit`` is too small."""

    batch_size: int = 64  # contents per forward pass; the scores do not depend on it
    candidates: int = 100  # size of the drawn lists of "answer", the right target included; fewer where fewer exist
    seed: int = 0  # of the draw
    limit: int | None = None  # only the first N samples of the data
    # See muco.evaluate.metrics.reduced. The cache holds whole vectors, so that further values cost no encoding.
    dimension: int | None = None
    storage: Storage = "float32"

    def __post_init__(self) -> None:
        if self.candidates < 2:
            raise MucoError(f"candidates is {self.candidates}; it counts the right target too, so pass at least 2")
        if self.limit is not None and self.limit < 1:
            raise MucoError(f"limit is {self.limit}; pass at least 1 sample, or leave it out")


def evaluate_retrieval(
    model: Embedder,
    data: Data,
    *,
    output: Path | None = None,
    cache: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    **scoring: Any,
) -> dict[str, Any]:
    """Scores a model on every task that the data allows.

    Args:
        model: Encodes contents to float32 [n, d], L2-normalised, and has a fingerprint.
        data: Samples with a fingerprint.
        output: Folder that gets ``retrieval.json``, or with a dimension and storage ``retrieval-64-int8.json``, and
            in a folder of that name the outcome of each query, for ``muco evaluate compare``. None: nothing is written.
        cache: Folder of encoded vectors, used again only for the same model and data.
        progress: Called with (contents encoded, contents in all).
        scoring: Of :class:`Scoring`.
    Returns:
        A dictionary that JSON can hold: "tasks" (name -> scores, or for both "answer" tasks {"kinds", "mean"}),
        "skipped" (task -> reason), "warnings", "collapsed", "non_finite", and all that tells where the scores come
        from. Shares are 0 to 1.
    Raises:
        DataError: If the data allows no task at all, or a content cannot be read.
        MucoError: If a number of ``scoring`` is too small or too large.
        OutputError: If the output or cache folder cannot be written.
    """
    start = time.perf_counter()
    chosen = Scoring(**scoring)
    origin = {"model": known_by(model), "data": data.fingerprint}
    store = None if cache is None else EmbeddingCache(cache, **origin)
    ranks: Ranks = {}
    result = score_tasks(model, data, chosen, cache=store, progress=progress, ranks=ranks)
    result |= origin | {
        "warnings": [*caveats(model), *result["warnings"]],
        "rules": RULES,
        **{name: getattr(chosen, name) for name in ("candidates", "seed", "limit", "batch_size")},
        "versions": versions(),
        "seconds": round(time.perf_counter() - start, 3),
    }
    if output is not None:
        write_outcomes(output, origin, chosen, ranks)
        write_result(output, result, chosen.dimension, chosen.storage)
    return result


def write_result(
    output: Path, result: Mapping[str, Any], dimension: int | None = None, storage: Storage = "float32"
) -> None:
    """Writes a result as ``retrieval.json``, or with what was asked for in its name, as ``retrieval-64-int8.json``."""
    write_json(Path(output) / f"{result_name(dimension, storage)}.json", result)


def result_name(dimension: int | None = None, storage: Storage = "float32") -> str:
    """The name of a result without its ending: "retrieval", "retrieval-64-int8"."""
    asked = (dimension and str(dimension), storage if storage != "float32" else None)
    return "-".join([RESULT, *filter(None, asked)])


def write_outcomes(output: Path, origin: Mapping[str, str], scoring: Scoring, ranks: Ranks) -> None:
    """Writes what became of each query of each task but the controls, for a comparison query by query."""
    drawn = {name: getattr(scoring, name) for name in ("candidates", "seed", "limit")}
    asked = hashlib.sha256(json.dumps([origin["data"], drawn]).encode()).hexdigest()  # the same queries and rivals
    settings = drawn | {"dimension": scoring.dimension, "storage": scoring.storage}
    folder = Path(output) / result_name(scoring.dimension, scoring.storage)
    for old in (*folder.glob("tasks/*.json"), *folder.glob("outcomes/*.jsonl")):  # of another model or other data
        old.unlink()
    files = TaskFiles(folder, {"benchmark": RESULT, "model": origin["model"], **settings})
    for task, own in ranks.items():
        outcomes = tuple(Outcome(str(n), float(rank == 1), int(rank), ()) for n, rank in enumerate(own.ranks))
        scores = {name: value for name, value in own.scores.items() if name.startswith("hit@") or name == "mrr"}
        files.add(
            TaskResult(
                task,
                "hit@1",
                {name: value for name, value in scores.items() if value is not None},
                len(outcomes),
                (own.scores["candidates_min"], own.scores["candidates_max"]),
                own.scores["chance@1"],
                asked,
                outcomes=outcomes,
            )
        )


def score_tasks(
    model: Embedder,
    data: Data,
    scoring: Scoring,
    *,
    cache: EmbeddingCache | None = None,
    progress: Callable[[int, int], None] | None = None,
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """The scores of :func:`evaluate_retrieval` without their origin: takes no fingerprint and writes no file.

    ``ranks`` is filled, for each task but the controls.
    """
    storage = scoring.storage
    book, builder = tasks_of(data, scoring)
    keys = {key for task in builder.tasks for key in (*task.queries, *task.pool)}
    vectors, row_of = book.vectors(model, scoring.batch_size, keys, cache=cache, progress=progress)
    vectors = metrics.truncated(vectors, checked_dimension(scoring.dimension, vectors.shape[1]))
    codes = metrics.reduced(vectors, storage)
    ranked = [(task, score(task, vectors, codes, row_of)) for task in builder.tasks]
    scored = [(task, own.scores) for task, own in ranked]
    if ranks is not None:
        ranks.update({task.label: own for task, own in ranked if task.name not in CONTROLS})
    health = metrics.embedding_health(vectors)
    warnings, collapsed = [], health.collapsed
    for task, scores in scored:
        control = task.name in CONTROLS
        warnings += task_warnings(task.label, scores, control=task.name if control else None)
        for side in ("pool",) if control else ("queries", "pool"):  # without the image, queries may be equal
            collapsed = collapsed or scores["health"][side]["collapsed"]
    return {
        "tasks": _by_task(scored),
        "skipped": builder.skipped,
        "warnings": warnings,
        "collapsed": collapsed,
        "non_finite": health.non_finite,
        "samples": _samples(data, scoring),
        "turns": len(builder.turns),
        "encoded": len(keys),
        "dimension": vectors.shape[1],
        "storage": storage,
    }


def tasks_of(data: Data, scoring: Scoring) -> tuple[Book, Builder]:
    """All contents and tasks of the data; a DataError if it allows no task, or a content cannot be read."""
    book, samples = Book(), _samples(data, scoring)
    turns = [turn for i in range(samples) for turn in read_turns(book, i, data[i])]
    builder = Builder(book, turns, scoring.candidates, scoring.seed)
    if not builder.tasks:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in builder.skipped.items())
        raise DataError(f"nothing to evaluate in {samples} samples ({reasons}); see what `muco data check` says")
    return book, builder


def _samples(data: Data, scoring: Scoring) -> int:
    return len(data) if scoring.limit is None else min(scoring.limit, len(data))


def score(task: RetrievalTask, vectors: np.ndarray, codes: np.ndarray, row_of: Mapping[str, int]) -> Ranked:
    """Ranks and scores of a task by dot products of ``codes``, and the health of ``vectors``; float32 [n, d] both."""
    queries = codes[[row_of[key] for key in task.queries]]
    rows = [row_of[key] for key in task.pool]
    pool = codes[rows]
    query_health = metrics.embedding_health(vectors[[row_of[key] for key in sorted(set(task.queries))]])
    pool_health = metrics.embedding_health(vectors[rows])
    if pool_health.collapsed:
        pool = np.zeros_like(pool)  # what is left of the differences is rounding: let all of them tie, and so be lost
    if task.lists is None:
        ranks = metrics.ranks_in_pool(queries, pool, task.positives, task.relevant)
    else:
        ranks = metrics.ranks_in_lists(queries, pool, task.lists)
    candidates = task.candidates
    reached = [k for k in AT if k < candidates.min()]  # with k candidates or fewer, everyone hits
    _, counts = np.unique(task.positives, return_counts=True)
    scores = {
        "queries": len(ranks),
        "pool": len(task.pool),
        "candidates_min": int(candidates.min()),
        "candidates_max": int(candidates.max()),
        **{f"hit@{k}": metrics.hit_rate(ranks, k) if k in reached else None for k in AT},
        "mrr": metrics.mrr(ranks),
        **{f"chance@{k}": metrics.chance_hit(k, candidates) for k in AT},
        "most_common": float(counts.max() / len(ranks)),  # hit@1 of always giving the same answer
        "health": {"queries": asdict(query_health), "pool": asdict(pool_health)},
    }
    return Ranked(ranks, scores)


def _by_task(scored: Sequence[tuple[RetrievalTask, Mapping[str, Any]]]) -> dict[str, Any]:
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
