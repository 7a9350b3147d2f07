"""Any retrieval set in folders as BEIR has them, of texts or images: ``evaluate_beir(model, data, output)``.

::

    <data>/corpus.jsonl        {"_id": "d1", "title": "…", "text": "…", "image": "pages/1.png"}
           queries.jsonl       {"_id": "q1", "text": "…", "image": "…"}
           qrels/<split>.tsv   query-id  corpus-id  score, with a header; grades above 0 are relevant

Title, text and image may each be missing, but not all of them. Image paths are relative to the set's folder. ``data``
is such a folder, or holds several: then each is a task of its own. A folder in it may again hold several, as BEIR's
cqadupstack: their tasks are named "cqadupstack/android" and so on, and their mean counts as one data set.

The tool of BEIR leaves a candidate out that has the id of the query (ArguAna and Quora ask with documents of the
corpus). Here it stays, because in other sets equal ids mean nothing. A fact of the task says how many queries have one.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from muco.data.judged import LinePool, Query, read_qrels
from muco.data.left_out import LeftOut
from muco.data.lines import JsonObject, id_of, image_of, objects, text_of
from muco.dialogue import Content
from muco.errors import DataError, MucoError
from muco.evaluate import metrics
from muco.evaluate.benchmark import Progress, data_set_of
from muco.evaluate.cache import Embedder
from muco.evaluate.driver import Benchmark
from muco.evaluate.outcomes import Pools
from muco.evaluate.ranked import JudgedQueries, RankedTask, chance_of_ndcg, score_ranked

FILES = ("corpus.jsonl", "queries.jsonl")  # of a set, beside qrels/
FORM = "BEIR 1"  # of a candidate's content: the title, a blank and the text
RULES = {
    "ndcg@k": "linear gain, log2(rank + 1) discount, over the best list of all judged candidates, as trec_eval has it",
    "recall@k": "share of all relevant candidates among the first k, those counted in that the corpus lacks",
    "order": "float32 dot product, exact; ties by id; a collapsed corpus is never right",
    "chance": "of nDCG: every rank gains the mean grade of the corpus",
    "overall": "unweighted mean of data sets; the tasks of a folder of sets, as cqadupstack/android, are one together",
}


def evaluate_beir(
    model: Embedder,
    data: Path,
    output: Path,
    *,
    split: str = "test",
    k: int = 10,
    batch_size: int = 64,
    instruction: str = "",
    skip_broken: bool = False,
    progress: Progress | None = None,
    **recorded: str,
) -> dict[str, Any]:
    """Scores a model on a retrieval set, or on every one that is below a folder.

    Args:
        model, output, batch_size, skip_broken, recorded: See :class:`muco.evaluate.driver.Benchmark`.
        split: Names the judgements. Queries that they do not name are left out and counted.
        k: Depth of nDCG (the metric), recall and MRR; hit@1 is scored besides.
        instruction: Put before every query, with a space between; candidates get none.
        progress: Called with (contents embedded, contents in all).
    Returns:
        What ``beir.json`` holds; shares are 0 to 1, "groups" has the mean of each folder of sets, and "overall" is the
        mean of data sets.
    Raises:
        DataError: If a file is missing (all are listed) or a line cannot be used, or no query is judged.
        MucoError: If ``k`` is less than 1.
    """
    if k < 1:
        raise MucoError(f"k is {k}; pass at least 1")
    data = Path(data)
    run = Benchmark("beir", model, data, Path(output), batch_size, skip_broken, **recorded)
    settings = {"split": split, "k": k, "instruction": instruction, "rules": RULES}
    sets = [_open_set(name, at, split, k, instruction, skip_broken) for name, at in _folders(data, split).items()]
    results = score_ranked(run, sets, settings, progress)
    groups, overall = _means({result.name: result.score for result in results})
    settings |= {"batch_size": batch_size, **run.settings}
    return run.write(results, settings=settings, groups=groups, overall=overall)


def _means(scores: Mapping[str, float]) -> tuple[dict[str, float], float]:
    """Means of the folders of sets, and over all data sets, of which such a folder is one."""
    own: dict[str, list[float]] = {}
    for name, score in scores.items():
        own.setdefault(data_set_of(name), []).append(score)
    means = {name: fmean(of_tasks) for name, of_tasks in own.items()}
    return {name: mean for name, mean in means.items() if name not in scores}, fmean(means.values())


def _folders(data: Path, split: str) -> dict[str, Path]:
    """The sets in a folder, by name; a DataError that lists what all of them lack."""
    if not data.is_dir():
        raise DataError(f"{data}: no such folder; pass one with corpus.jsonl, queries.jsonl and qrels/{split}.tsv")
    itself = {Path(os.path.abspath(data)).name: data}  # of ".", too
    folders = itself if _is_set(data) else _below(data) or itself
    needed = [at / name for at in folders.values() for name in (*FILES, f"qrels/{split}.tsv")]
    if absent := [path for path in needed if not path.is_file()]:
        listed = "\n".join(f"  {path}" for path in absent)
        raise DataError(f"{data}: these files are missing:\n{listed}\nadd them, or name another folder or split")
    return folders


def _below(data: Path) -> dict[str, Path]:
    """The sets directly below a folder, and one level deeper in those that are none."""
    sets = {}
    for folder in sorted(path for path in data.iterdir() if not path.name.startswith((".", "__"))):
        own = [folder] if _is_set(folder) else filter(_is_set, sorted(folder.glob("*")))
        sets |= {path.relative_to(data).as_posix(): path for path in own}
    return sets


def _is_set(folder: Path) -> bool:
    """Whether it has any file of a set: one that lacks another is not overlooked, but refused."""
    return any(os.path.exists(folder / name) for name in (*FILES, "qrels"))


def _content(row: JsonObject, keys: Sequence[str], folder: Path, where: str, instruction: str = "") -> Content:
    parts = [text for key in keys if (text := (text_of(row, key, where) or "").strip())]
    image = image_of(row, "image", folder, where)
    if not parts and image is None:
        raise DataError(f"{where}: neither text nor image; add one of {', '.join([*keys, 'image'])}")
    return Content(" ".join([*([instruction] if instruction else []), *parts]), (image,) if image else ())


def read_judged(
    folder: Path, split: str, instruction: str, left_out: LeftOut | None = None
) -> tuple[list[Query], dict[str, int]]:
    """The judged queries of a set in the order of their ids, and how many others there are."""
    left_out = LeftOut() if left_out is None else left_out
    path, judgements = folder / "queries.jsonl", read_qrels(folder / "qrels" / f"{split}.tsv")
    queries: dict[str, Query] = {}
    others = 0
    for row, where in objects(path):
        query = id_of(row, "_id", where)
        if query not in judgements:  # of another split, so nothing else about it matters
            others += 1
            continue
        if query in queries:
            raise DataError(f"{where}: the query {query!r} is also at {queries[query].where}; ids must be unique")
        content, error = Content(), None
        try:
            content = _content(row, ("text",), folder, where, instruction)
        except DataError as found:
            left_out.check(found)
            error = found
        queries[query] = Query(query, content, judgements[query], where, error)
    if not queries:
        raise DataError(f"{folder / 'qrels' / f'{split}.tsv'}: judges none of the {others} queries of {path}")
    return [queries[id] for id in sorted(queries)], {
        "queries without judgements, left out": others,
        "judged queries that queries.jsonl lacks": len(judgements.keys() - queries.keys()),
    }


WARNED = {  # fact -> what follows from it
    "judged queries that queries.jsonl lacks": "they were not asked",
    "queries for which nothing is relevant": "they score 0",
    "judged candidates that the corpus lacks": "they are never found",
}


def _open_set(name: str, folder: Path, split: str, k: int, instruction: str, skip_broken: bool) -> RankedTask:
    """One set as a task, read and checked."""
    left_out = LeftOut(skip_broken)
    queries, others = read_judged(folder, split, instruction, left_out)
    asked = JudgedQueries(queries, left_out)
    pool = LinePool(
        folder / "corpus.jsonl",
        f"the corpus of {name}",
        lambda row, where: id_of(row, "_id", where),
        lambda row, where: _content(row, ("title", "text"), folder, where),
        form=FORM,
        numbers=lambda ids: np.argsort(np.argsort(ids, kind="stable")),  # equal scores are ordered by ids
        left_out=LeftOut(skip_broken),
    )
    judged = [id for query in queries for id in query.grades]
    facts = {
        "split": split,
        "instruction": instruction,
        **others,
        "queries for which nothing is relevant": sum(not query.relevant for query in queries),
        "judged candidates that the corpus lacks": int((pool.find(judged) < 0).sum()),
        "queries that have the id of a candidate": int((pool.find([q.id for q in queries]) >= 0).sum()),
    }
    return RankedTask(
        name=name,
        queries=asked,
        pools=Pools([pool]),
        metric=f"ndcg@{k}",
        measures={
            f"ndcg@{k}": functools.partial(metrics.ndcg_at, k=k),
            "hit@1": functools.partial(metrics.hit_at, k=1),
            f"recall@{k}": functools.partial(metrics.recall_at, k=k),
            f"mrr@{k}": functools.partial(metrics.reciprocal_rank, k=k),
        },
        depth=k,
        chance=functools.partial(chance_of_ndcg, k=k),
        facts=facts,
        warnings=[f"{facts[fact]} {fact}: {said}" for fact, said in WARNED.items() if facts[fact]],
        cached_as=f"BEIR {name}",
    )
