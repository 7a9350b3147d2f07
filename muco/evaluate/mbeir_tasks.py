"""The tasks of M-BEIR, read and checked: what is asked, in which pool, and what a reader must know about it."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from muco.data.judged import Query
from muco.data.left_out import LeftOut
from muco.data.mbeir_test import (
    ALL,
    Key,
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
from muco.errors import DataError
from muco.evaluate import metrics
from muco.evaluate.driver import Benchmark
from muco.evaluate.outcomes import Pools
from muco.evaluate.ranked import JudgedQueries, RankedTask, chance_of_hit

PoolName = Literal["local", "global"]


@dataclass(frozen=True)
class Drawing:
    """Which prompts and queries are taken; the arguments of ``evaluate_mbeir``."""

    prompts: Prompts
    seed: int
    queries: int | None


def depths(task: MBEIRTask) -> tuple[int, ...]:
    return (1, 5, 10, 20, 50) if task.k == 10 else (1, 5, 10)


def open_tasks(
    run: Benchmark, todo: Sequence[tuple[MBEIRTask, PoolName]], drawing: Drawing, strict: bool
) -> list[RankedTask]:
    """Everything that is scored, read and checked; with ``strict`` a DataError for a positive that no pool holds."""
    instructions = read_instructions(instructions_file(run.data))
    tasks = dict.fromkeys(task for task, _ in todo)
    whole = any(pool == "global" for _, pool in todo)
    local = {task: open_pool(run.data, task, LeftOut(run.skip_broken)) for task in (ALL if whole else tasks)}
    asked = {task: _ask(run.data, task, instructions, drawing, LeftOut(run.skip_broken)) for task in tasks}
    together = Pools(list(local.values())) if whole else None
    opened = []
    for task, pool in todo:
        queries, facts = asked[task]
        pools = together if together and pool == "global" else Pools([local[task]])
        lost = _lost(queries.queries, pools)
        for query, id in lost if strict else ():
            if pool == "global" or data_set_of(id) == task.data_set_id:
                raise DataError(
                    f"{query.where}: the positive {id!r} of the query {query.id!r} is not in the {pool} pool; "
                    f"complete the pool, or score without strict"
                )
        opened.append(_ranked_task(run, task, pool, queries, pools, lost, facts))
    return opened


def _ask(
    data: Path, task: MBEIRTask, instructions: Mapping[Key, Sequence[str]], drawing: Drawing, left_out: LeftOut
) -> tuple[JudgedQueries, dict[str, Any]]:
    """The queries of a task, and facts about them."""
    if task.key not in instructions:
        number, query, candidate = task.key
        raise DataError(
            f"{instructions_file(data)}: no prompt for data set {number} ({task.data_set}), {query} to {candidate}"
        )
    lines, judgements = read_queries(data, task, left_out), read_judgements(task.files(data)["judgements"], task)
    total, seed = len(lines), drawing.seed
    if drawing.queries is not None and drawing.queries < total:
        drawn = sorted(lines, key=lambda line: (hash_of(seed, "query", line.id), line.id))[: drawing.queries]
        kept = {line.id for line in drawn}
        lines = [line for line in lines if line.id in kept]
    by_seed = seed if drawing.prompts == "random" else None
    queries, taken = as_queries(lines, judgements, instructions[task.key], by_seed)
    other = sum(set(query.relevant) != set(line.positives) for query, line in zip(queries, lines, strict=True))
    return JudgedQueries(queries, left_out), {
        "query": task.key[1],
        "candidate": task.key[2],
        "prompts": drawing.prompts,
        "seed": seed,
        "times each prompt was taken": taken,
        "queries in the file": total,
        "queries whose pos_cand_list is not what is judged relevant": other,
    }


def _lost(queries: Sequence[Query], pools: Pools) -> list[tuple[Query, str]]:
    """Queries with each of their positives that the pools lack."""
    return [
        (query, id)
        for query, rows in zip(queries, pools.relevant(queries), strict=True)
        for id, row in zip(query.relevant, rows, strict=True)
        if row < 0
    ]


def _ranked_task(
    run: Benchmark,
    task: MBEIRTask,
    pool: PoolName,
    queries: JudgedQueries,
    pools: Pools,
    lost: Sequence[tuple[Query, str]],
    facts: Mapping[str, Any],
) -> RankedTask:
    rows = pools.relevant(queries.queries)
    facts = {
        "pool": pool,
        **facts,
        "positives": sum(map(len, rows)),
        "positives that the pool lacks": len(lost),
        "of those, of other data sets": sum(data_set_of(id) != task.data_set_id for _, id in lost),
        "queries without a positive in the pool": sum(not (own >= 0).any() for own in rows),
    }
    name = f"{task.name} {pool}"
    hits = {f"hit@{k}": functools.partial(metrics.hit_at, k=k) for k in depths(task)}
    recalls = {f"recall@{k}": functools.partial(metrics.recall_at, k=k) for k in depths(task)}
    return RankedTask(
        name=name,
        queries=queries,
        pools=pools,
        metric=f"hit@{task.k}",
        measures=hits | recalls,
        depth=max(depths(task)),
        chance=functools.partial(chance_of_hit, k=task.k),
        facts=facts,
        warnings=_warnings(facts, len(queries)),
        cached_as=f"M-BEIR {task.name}",
        run_file=run.output / "runs" / f"{name.replace(' ', '_')}.trec",
    )


def _warnings(facts: Mapping[str, Any], asked: int) -> list[str]:
    lines = []
    if asked < (total := facts["queries in the file"]):
        lines.append(f"only {asked} of {total} queries were asked, drawn with seed {facts['seed']}")
    if lost := facts["positives that the pool lacks"]:
        lines.append(
            f"{lost} of {facts['positives']} positives are not in the {facts['pool']} pool, "
            f"{facts['of those, of other data sets']} of them of other data sets; recall@k counts them as not found"
        )
    if empty := facts["queries without a positive in the pool"]:
        lines.append(f"{empty} queries have no positive in the {facts['pool']} pool: nothing can be right for them")
    if other := facts["queries whose pos_cand_list is not what is judged relevant"]:
        lines.append(f"{other} queries have another pos_cand_list than the judgements, which count")
    return lines
