"""M-BEIR: ``evaluate_mbeir(model, data, output)`` on its 16 tasks, in the local pool of each and in the global one.

    files ─read, all of them─▶ queries, pools ─embed─▶ vectors ─search─▶ hit@k and recall@k ─▶ mbeir.json, runs/, page

Everything is read and checked before anything is encoded. A pool is embedded once, also for the global pool, which is
the 16 local ones searched as one. What the benchmark calls Recall@k is hit@k here; recall@k is what it says.
"""

from __future__ import annotations

import difflib
import functools
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from muco import distributed
from muco.data.judged import Query
from muco.data.left_out import LeftOut, counts
from muco.data.mbeir_test import (
    ALL,
    MBEIRTask,
    Prompts,
    as_queries,
    data_set_of,
    hash_of,
    instructions_file,
    open_pool,
    read_instructions,
    read_judgements,
    read_queries,
)
from muco.errors import DataError, MucoError
from muco.evaluate import ranking
from muco.evaluate.benchmark import Progress, TaskFiles, TaskResult, benchmark_result, gate, mean_of
from muco.evaluate.cache import EmbeddingCache
from muco.evaluate.ranked import Asked, Measure, Pools, Steps, Stores, ask, chance_of_hit

if TYPE_CHECKING:
    from muco.evaluate.cache import Embedder

PoolName = Literal["local", "global"]

GROUPS = {  # name -> numbers of its tasks
    "single to single": (0, 1, 3, 4),
    "single to fused": (2,),
    "fused to single": (6, 7),
    "fused to fused": (8,),
}
RULES = {
    "hit@k": "1 if a relevant candidate is among the first k: the benchmark's Recall@k",
    "recall@k": "share of all relevant candidates among the first k, those counted in that no pool holds",
    "order": "float32 dot product, exact; ties by number of the candidate's id; a collapsed pool is never right",
    "chance": "mean over queries of 1 - (N-R)/N · (N-R-1)/(N-1) · …, k factors; R right ones of the N in the pool",
    "groups": "unweighted means of tasks",
    "random": "prompt by hash of (seed, query id)",
}

log = logging.getLogger(__name__)


def evaluate_mbeir(
    model: Embedder,
    data: Path,
    output: Path,
    *,
    pools: Sequence[PoolName] = ("local", "global"),
    tasks: Sequence[str] | None = None,
    prompts: Prompts = "random",
    seed: int = 2023,
    queries: int | None = None,
    batch_size: int = 64,
    strict: bool = False,
    allow_missing: bool = False,
    skip_broken: bool = False,
    pixels: str = "",
    trained_pixels: str = "",
    command: str = "",
    model_path: str = "",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Scores a model on M-BEIR, or on some of its tasks.

    A task that ``output`` holds for this model, these settings and this data is not done again; vectors of a run that
    was stopped are used. Call it on every process alike; the first one writes.

    Args:
        model: Encodes contents to float32 [n, d], L2-normalised, and has a fingerprint.
        data: Folder in the published layout, see :mod:`muco.data.mbeir_test`.
        output: Gets ``mbeir.json`` and its other forms, a file per task, ``runs/`` in TREC's form, and the vectors.
        pools: "local", "global" or both. The global one needs the pools of all 16 tasks.
        tasks: Names such as "MSCOCO t0"; None: all 16.
        prompts: "random": one of a task's prompts for each query, by ``seed`` and the query's id; "first".
        queries: So many of each task, drawn by ``seed`` and the query's id; None: all.
        batch_size: Contents per forward pass; the scores do not depend on it.
        strict: Refuse positives that should be in the searched pool and are not. A local pool should hold those of its
            own data set: OVEN and InfoSeek name candidates of each other, which count in the global pool.
        allow_missing: Score what is there, instead of refusing to start where a file is missing.
        skip_broken: Leave out what cannot be embedded, instead of stopping; see :mod:`muco.data.left_out`.
        pixels, trained_pixels: The limits of image size, here and in training, as "3136 to 1003520". Told in the
            results, with a warning if they differ.
        command, model_path: Told in the results.
        progress: Called with (contents embedded, contents in all).
    Returns:
        What ``mbeir.json`` holds; shares are 0 to 1. Tasks and groups have the pool in their names; "overall" is the
        mean of 16 in the global pool if that was asked for, else in the local ones; None unless all 16 were scored.
    Raises:
        DataError: If a file is missing (all are listed) or a line cannot be used.
        MucoError: If an argument is none of those above.
        OutputError: If the output cannot be written.
    """
    chosen, data, output = _chosen(tasks), Path(data), Path(output)
    _check(pools, prompts, queries)
    plan = _plan(data, chosen, pools, allow_missing)
    fingerprint = model.fingerprint
    settings = {"prompts": prompts, "seed": seed, "queries": queries, "rules": RULES}
    sources = _Sources(data, plan, settings, strict, skip_broken)
    # paths of images are on the page, so results found again must be of this folder
    key = {"benchmark": "mbeir", "model": fingerprint, "data": str(data.resolve()), **settings}
    files = TaskFiles(output, key, partial=skip_broken)
    steps = Steps(sources.size, progress)
    stores = Stores(model, output / "cache" / "pools", batch_size, steps)
    results = []
    for source in sources:
        done = distributed.first_only(functools.partial(files.find, source.name, source.fingerprint))
        if done is None:
            log.info("%s: %d queries, %d candidates", source.name, len(source.asked), len(source.pools))
            cache = EmbeddingCache(output / "cache", model=fingerprint, data=f"M-BEIR {source.task.name}")
            vectors = source.asked.embed(model, cache, batch_size, steps.part)
            done = source.result(vectors, stores, output)
            distributed.first_only(functools.partial(files.add, done))
        steps.done(len(source.asked))
        results.append(replace(done, outcomes=()))  # they are in files, and many
    steps.finish()
    scores = {result.name: result.score for result in results}
    counted: PoolName = "global" if "global" in pools else "local"
    groups = functools.reduce(dict.__or__, (means(scores, pool) for pool in ("local", "global") if pool in pools))
    result = benchmark_result(
        "mbeir",
        results,
        groups,
        overall=groups[f"overall {counted}"],
        model={"path": model_path, "fingerprint": fingerprint},
        settings={
            "pools": sorted(pools, reverse=True),
            "overall": f"mean of 16 tasks, {counted} pool",
            "tasks": [task.name for task in chosen],
            **settings,
            "batch_size": batch_size,
            "strict": strict,
            "skip_broken": skip_broken,
            "pixels": pixels,
            "trained_pixels": trained_pixels,
            "data": str(data),
        },
        command=command,
        missing=plan.missing,
        warnings=plan.warnings,
    )
    distributed.first_only(functools.partial(_write, output, result, results))
    return result


def check_folder(data: Path) -> None:
    """Refuses what is no folder at all, with a DataError."""
    if not Path(data).is_dir():
        raise DataError(f"{data}: no such folder; give the one that holds query, qrels, cand_pool and instructions")


def means(scores: Mapping[str, float], pool: PoolName) -> dict[str, float | None]:
    """The four groups and the whole benchmark in one pool, unweighted; None where a task is missing.

    Args:
        scores: By name with the pool, "MSCOCO t0 global"; in any unit.
    """
    named = {name: [task for task in ALL if task.number in numbers] for name, numbers in GROUPS.items()}
    return {
        f"{name} {pool}": mean_of(scores, [f"{task.name} {pool}" for task in own])
        for name, own in {**named, "overall": list(ALL)}.items()
    }


def depths(task: MBEIRTask) -> tuple[int, ...]:
    return (1, 5, 10, 20, 50) if task.k == 10 else (1, 5, 10)


def measures(task: MBEIRTask) -> dict[str, Measure]:
    """hit@k and recall@k of a task, by name."""

    def at(k: int, measure: Callable[..., float]) -> Measure:
        return lambda found, grades: measure(found, grades, k)

    named = {"hit": ranking.hit_at, "recall": ranking.recall_at}
    return {f"{name}@{k}": at(k, measure) for name, measure in named.items() for k in depths(task)}


# ── what is asked, and what is there ─────────────────────────────────────────────────────────────────────────────────


def _chosen(names: Sequence[str] | None) -> tuple[MBEIRTask, ...]:
    if names is None:
        return ALL
    known = {task.name: task for task in ALL}
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise MucoError(f"M-BEIR has no task {name!r}; {hint}its tasks are {', '.join(known)}")
    if not names:
        raise MucoError("no task of M-BEIR is named; name some, or leave the option out for all 16")
    return tuple(task for task in ALL if task.name in names)


def _check(pools: Sequence[str], prompts: str, queries: int | None) -> None:
    if not pools or set(pools) - {"local", "global"}:
        raise MucoError(f"pools must be 'local', 'global' or both, not {list(pools)!r}")
    if prompts not in ("random", "first"):
        raise MucoError(f"prompts must be 'random' or 'first', not {prompts!r}")
    if queries is not None and queries < 1:
        raise MucoError(f"queries is {queries}; give at least 1 per task, or leave it out")


@dataclass(frozen=True)
class _Plan:
    todo: tuple[tuple[MBEIRTask, PoolName], ...]
    missing: tuple[str, ...]
    warnings: tuple[str, ...]


def _plan(data: Path, chosen: Sequence[MBEIRTask], pools: Sequence[PoolName], allow_missing: bool) -> _Plan:
    """What can be scored; a DataError that lists all missing files unless they are allowed to be."""
    check_folder(data)
    todo, missing, lost = [], [], []
    lost_pools = [task.files(data)["pool"] for task in ALL if not task.files(data)["pool"].is_file()]
    for pool in ("local", "global"):
        for task in chosen if pool in pools else ():
            own = task.files(data)
            needed = [own["queries"], own["judgements"], *([own["pool"]] if pool == "local" else lost_pools)]
            absent = [path for path in needed if not path.is_file()]
            (missing if absent else todo).append((task, pool))
            lost += absent
    possible = bool(todo) and instructions_file(data).is_file()  # no task can do without the instructions
    if not instructions_file(data).is_file():
        lost.insert(0, instructions_file(data))
    listed = "\n".join(f"  {path}" for path in dict.fromkeys(lost))
    if lost and not (allow_missing and possible):
        raise DataError(
            f"{data}: these files of M-BEIR are missing:\n{listed}\nadd them"
            + (", or allow missing ones" if possible else "")
        )
    warnings = [f"the file {path} is missing" for path in dict.fromkeys(lost)]
    if "global" in pools and lost_pools:
        warnings.append(f"nothing was searched in the global pool: {len(lost_pools)} of its 16 parts are missing")
    return _Plan(tuple(todo), tuple(f"{task.name} {pool}" for task, pool in missing), tuple(warnings))


class _Sources:
    """Everything that is scored, read and checked."""

    def __init__(self, data: Path, plan: _Plan, settings: Mapping[str, Any], strict: bool, skip_broken: bool) -> None:
        instructions = read_instructions(instructions_file(data))
        together = any(pool == "global" for _, pool in plan.todo)
        tasks = dict.fromkeys(task for task, _ in plan.todo)
        self._opened = {task: open_pool(data, task, LeftOut(skip_broken)) for task in (ALL if together else tasks)}
        asked = {task: _ask(data, task, instructions, settings, LeftOut(skip_broken)) for task in tasks}
        whole = Pools(list(self._opened.values())) if together else None
        self._all = [
            _Source(task, pool, *asked[task], whole if whole and pool == "global" else Pools([self._opened[task]]))
            for task, pool in plan.todo
        ]
        if strict:
            for source in self._all:
                source.refuse_lost()

    def __iter__(self) -> Iterator[_Source]:
        return iter(self._all)

    @property
    def size(self) -> int:
        """Contents that are embedded at most."""
        return sum(map(len, self._opened.values())) + sum(len(source.asked) for source in self._all)


def _ask(
    data: Path, task: MBEIRTask, instructions: Mapping, settings: Mapping[str, Any], left_out: LeftOut
) -> tuple[Asked, dict[str, Any]]:
    """The queries of a task, and facts about them."""
    if task.key not in instructions:
        number, query, candidate = task.key
        raise DataError(
            f"{instructions_file(data)}: no prompt for data set {number} ({task.data_set}), {query} to {candidate}"
        )
    lines, judgements = read_queries(data, task, left_out), read_judgements(task.files(data)["judgements"], task)
    total, seed = len(lines), settings["seed"]
    if settings["queries"] is not None and settings["queries"] < total:
        drawn = sorted(lines, key=lambda line: (hash_of(seed, "query", line.id), line.id))[: settings["queries"]]
        kept = {line.id for line in drawn}
        lines = [line for line in lines if line.id in kept]
    prompts = instructions[task.key]
    queries, taken = as_queries(lines, judgements, prompts, seed if settings["prompts"] == "random" else None)
    other = sum(set(query.relevant) != set(line.positives) for query, line in zip(queries, lines, strict=True))
    return Asked(queries, left_out), {
        "query": task.key[1],
        "candidate": task.key[2],
        "prompts": settings["prompts"],
        "seed": seed,
        "times each prompt was taken": taken,
        "queries in the file": total,
        "queries whose pos_cand_list is not what is judged relevant": other,
    }


class _Source:
    """A task in a pool."""

    def __init__(self, task: MBEIRTask, pool: PoolName, asked: Asked, facts: Mapping[str, Any], pools: Pools) -> None:
        self.task, self.pool, self.asked, self.pools = task, pool, asked, pools
        self.name = f"{task.name} {pool}"
        self._rows = pools.relevant(asked.queries)
        lost = list(self._lost())
        self.facts = {
            "pool": pool,
            **facts,
            "positives": sum(map(len, self._rows)),
            "positives that the pool lacks": len(lost),
            "of those, of other data sets": sum(data_set_of(id) != task.data_set_id for _, id in lost),
            "queries without a positive in the pool": sum(not (rows >= 0).any() for rows in self._rows),
        }
        parts = (self.name, json.dumps(self.facts), *(each.fingerprint for each in pools.pools))
        self.fingerprint = asked.fingerprint(*parts)

    def _lost(self) -> Iterator[tuple[Query, str]]:
        """Queries with each of their positives that the pool lacks."""
        for query, rows in zip(self.asked.queries, self._rows, strict=True):
            yield from ((query, id) for id, row in zip(query.relevant, rows, strict=True) if row < 0)

    def refuse_lost(self) -> None:
        """DataError for a positive that should be in the pool."""
        for query, id in self._lost():
            if self.pool == "global" or data_set_of(id) == self.task.data_set_id:
                raise DataError(
                    f"{query.where}: the positive {id!r} of the query {query.id!r} is not in the {self.pool} pool; "
                    f"complete the pool, or score without strict"
                )

    def result(self, vectors: np.ndarray, stores: Stores, output: Path) -> TaskResult:
        """Searches, scores, and writes the run."""
        metric, at = f"hit@{self.task.k}", measures(self.task)
        scored = ask(self.asked, vectors, self.pools, stores, at, metric, max(depths(self.task)))
        path = output / "runs" / f"{self.name.replace(' ', '_')}.trec"
        distributed.first_only(functools.partial(ranking.write_trec_run, path, scored.run, "muco"))
        lost = self.pools.left_out
        size = len(self.pools) - len(lost)
        held = [sum(row >= 0 and row not in lost for row in rows.tolist()) for rows in self._rows]
        chance = chance_of_hit(held, size, self.task.k)
        return TaskResult(
            name=self.name,
            metric=metric,
            scores=scored.scores,
            queries=len(self.asked),
            candidates=(size, size),
            chance=chance,
            data=self.fingerprint,
            facts={**self.facts, **scored.facts},
            warnings=(*self._warnings(), *scored.warnings, *gate(scored.scores[metric], chance, len(self.asked))),
            outcomes=scored.outcomes,
            failures=scored.failures,
            left_out=counts(scored.broken, scored.missed),
            broken=scored.broken,
        )

    def _warnings(self) -> list[str]:
        facts, lines = self.facts, []
        if len(self.asked) < facts["queries in the file"]:
            total, seed = facts["queries in the file"], facts["seed"]
            lines.append(f"only {len(self.asked)} of {total} queries were asked, drawn with seed {seed}")
        if lost := facts["positives that the pool lacks"]:
            lines.append(
                f"{lost} of {facts['positives']} positives are not in the {self.pool} pool, "
                f"{facts['of those, of other data sets']} of them of other data sets; recall@k counts them as not found"
            )
        if empty := facts["queries without a positive in the pool"]:
            lines.append(f"{empty} queries have no positive in the {self.pool} pool: nothing can be right for them")
        if other := facts["queries whose pos_cand_list is not what is judged relevant"]:
            lines.append(f"{other} queries have another pos_cand_list than the judgements, which count")
        return lines


def _write(output: Path, result: dict[str, Any], results: Sequence[TaskResult]) -> None:
    from muco.evaluate.page import write_reports

    write_reports(output, result, results)
