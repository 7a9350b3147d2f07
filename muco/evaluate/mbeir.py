"""M-BEIR: ``evaluate_mbeir(model, data, output)`` on its 16 tasks, in the local pool of each and in the global one.

    files ─read, all of them─▶ queries, pools ─embed─▶ vectors ─search─▶ hit@k and recall@k ─▶ mbeir.json, runs/, page

Everything is read and checked before anything is encoded. A pool is embedded once, also for the global pool, which is
the 16 local ones searched as one. What the benchmark calls Recall@k is hit@k here; recall@k is what it says.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from muco.data import mbeir_test
from muco.data.left_out import LeftOut
from muco.data.mbeir_test import ALL, Key, MBEIRTask, data_set_of
from muco.errors import DataError, MucoError
from muco.evaluate import metrics
from muco.evaluate.benchmark import Progress, mean_of
from muco.evaluate.cache import Embedder
from muco.evaluate.driver import Benchmark, check_queries, chosen_tasks
from muco.evaluate.outcomes import Pools
from muco.evaluate.ranked import JudgedQueries, RankedTask, chance_of_hit, score_ranked

PoolName = Literal["local", "global"]
Prompts = Literal["random", "first"]
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
    progress: Progress | None = None,
    **recorded: str,
) -> dict[str, Any]:
    """Scores a model on M-BEIR, or on some of its tasks.

    Args:
        model, output, batch_size, skip_broken, recorded: See :class:`muco.evaluate.driver.Benchmark`.
        data: Folder in the published layout, see :mod:`muco.data.mbeir_test`.
        pools: "local", "global" or both. The global one needs the pools of all 16 tasks.
        tasks: Names such as "MSCOCO t0"; None: all 16.
        prompts: "random": one of a task's prompts for each query, by ``seed`` and the query's id; "first".
        queries: How many of each task to ask, drawn by ``seed`` and the query's id; None: all.
        strict: Refuse positives that should be in the searched pool and are not. A local pool should hold those of its
            own data set: OVEN and InfoSeek name candidates of each other, which count in the global pool.
        allow_missing: Score what is available, instead of refusing to start if a file is missing.
        progress: Called with (contents embedded, contents in all).
    Returns:
        What ``mbeir.json`` holds; shares are 0 to 1. Tasks and groups have the pool in their names; "overall" is the
        mean of 16 in the global pool if that was asked for, else in the local ones; None unless all 16 were scored.
    Raises:
        DataError: If a file is missing (all are listed) or a line cannot be used.
        MucoError: If another argument cannot be used.
    """
    named, data = chosen_tasks(tasks, [task.name for task in ALL], "M-BEIR"), Path(data)
    chosen = [task for task in ALL if task.name in named]
    if not pools or set(pools) - {"local", "global"}:
        raise MucoError(f"pools must be 'local', 'global' or both, not {list(pools)!r}")
    if prompts not in ("random", "first"):
        raise MucoError(f"prompts must be 'random' or 'first', not {prompts!r}")
    pools = sorted(set(pools), reverse=True)  # local first
    check_queries(queries)
    todo, missing, warnings = _plan(data, chosen, pools, allow_missing)
    run = Benchmark("mbeir", model, data, Path(output), batch_size, skip_broken, **recorded)
    drawing = Drawing(prompts, seed, queries)
    settings = {**asdict(drawing), "rules": RULES}
    opened = _open_tasks(run, todo, drawing, strict)
    results = score_ranked(run, opened, settings, progress)
    scores = {result.name: result.score for result in results}
    groups = {name: score for pool in pools for name, score in means(scores, pool).items()}
    counted = "global" if "global" in pools else "local"
    said = {"pools": pools, "overall": f"mean of 16 tasks, {counted} pool", "tasks": list(named)}
    settings = said | settings | {"batch_size": batch_size, "strict": strict} | run.settings
    overall = groups[f"overall {counted}"]
    return run.write(results, settings=settings, groups=groups, overall=overall, missing=missing, warnings=warnings)


def check_folder(data: Path) -> None:
    """Raises a DataError if the data is not a folder."""
    if not Path(data).is_dir():
        raise DataError(f"{data}: no such folder; pass the one that holds query, qrels, cand_pool and instructions")


def means(scores: Mapping[str, float], pool: PoolName) -> dict[str, float | None]:
    """The four groups and all tasks in one pool, unweighted; None where a task ("MSCOCO t0 global") is missing."""
    named = {name: [task for task in ALL if task.number in numbers] for name, numbers in GROUPS.items()}
    return {
        f"{name} {pool}": mean_of(scores, [f"{task.name} {pool}" for task in own])
        for name, own in {**named, "overall": list(ALL)}.items()
    }


def _plan(
    data: Path, chosen: Sequence[MBEIRTask], pools: Sequence[PoolName], allow_missing: bool
) -> tuple[list[tuple[MBEIRTask, PoolName]], list[str], list[str]]:
    """What can be scored, the names of what cannot, and warnings; a DataError lists missing files that may not be."""
    check_folder(data)
    lost_pools = _absent([task.files(data)["pool"] for task in ALL])
    lost = _absent([mbeir_test.instructions_file(data)])
    readable = not lost  # no task can do without the instructions
    todo, missing = [], []
    for pool in pools:
        for task in chosen:
            own = task.files(data)
            absent = _absent([own["queries"], own["judgements"]])
            absent += lost_pools if pool == "global" else _absent([own["pool"]])
            lost += absent
            (missing if absent else todo).append((task, pool))
    lost = list(dict.fromkeys(lost))
    possible = readable and bool(todo)
    if lost and not (allow_missing and possible):
        listed = "\n".join(f"  {path}" for path in lost)
        remedy = "add them, or allow missing ones" if possible else "add them"
        raise DataError(f"{data}: these files of M-BEIR are missing:\n{listed}\n{remedy}")
    warnings = [f"the file {path} is missing" for path in lost]
    if "global" in pools and lost_pools:
        warnings.append(f"nothing was searched in the global pool: {len(lost_pools)} of its 16 parts are missing")
    return todo, [f"{task.name} {pool}" for task, pool in missing], warnings


def _absent(files: Sequence[Path]) -> list[Path]:
    return [file for file in files if not file.is_file()]


@dataclass(frozen=True)
class Drawing:
    """Which prompts and queries are taken; the arguments of ``evaluate_mbeir``."""

    prompts: Prompts
    seed: int
    queries: int | None


def _open_tasks(
    run: Benchmark, todo: Sequence[tuple[MBEIRTask, PoolName]], drawing: Drawing, strict: bool
) -> list[RankedTask]:
    """Everything that is scored, read and checked; with ``strict`` a DataError for a positive that no pool holds."""
    instructions = mbeir_test.read_instructions(mbeir_test.instructions_file(run.data))
    tasks = dict.fromkeys(task for task, _ in todo)
    whole = any(pool == "global" for _, pool in todo)
    local = {task: mbeir_test.open_pool(run.data, task, LeftOut(run.skip_broken)) for task in (ALL if whole else tasks)}
    asked = {task: _ask(run.data, task, instructions, drawing, LeftOut(run.skip_broken)) for task in tasks}
    together = Pools(list(local.values())) if whole else None
    opened = []
    for task, pool in todo:
        queries, facts = asked[task]
        pools = together if together and pool == "global" else Pools([local[task]])
        opened.append(_ranked_task(run, task, pool, queries, pools, facts, strict))
    return opened


def _ask(
    data: Path, task: MBEIRTask, instructions: Mapping[Key, Sequence[str]], drawing: Drawing, left_out: LeftOut
) -> tuple[JudgedQueries, dict[str, Any]]:
    """The queries of a task, and facts about them."""
    if task.key not in instructions:
        file, (number, query, candidate) = mbeir_test.instructions_file(data), task.key
        raise DataError(f"{file}: no prompt for data set {number} ({task.data_set}), {query} to {candidate}")
    judgements, seed = mbeir_test.read_judgements(task.files(data)["judgements"], task), drawing.seed
    found, differing = mbeir_test.read_queries(data, task, judgements, left_out)
    drawn = sorted(found, key=lambda query: (mbeir_test.hash_of(seed, "query", query.id), query.id))[: drawing.queries]
    drawn.sort(key=lambda query: mbeir_test.number_of(query.id))
    queries, taken = mbeir_test.prompted(drawn, instructions[task.key], seed if drawing.prompts == "random" else None)
    return JudgedQueries(queries, left_out), {
        "query": task.key[1],
        "candidate": task.key[2],
        "prompts": drawing.prompts,
        "seed": seed,
        "times each prompt was taken": taken,
        "queries in the file": len(found),
        "queries whose pos_cand_list is not what is judged relevant": sum(query.id in differing for query in queries),
    }


def _ranked_task(
    run: Benchmark,
    task: MBEIRTask,
    pool: PoolName,
    queries: JudgedQueries,
    pools: Pools,
    facts: Mapping[str, Any],
    strict: bool,
) -> RankedTask:
    rows = pools.relevant(queries.queries)
    asked = zip(queries.queries, rows, strict=True)
    lost = [(query, id) for query, own in asked for id, row in zip(query.relevant, own, strict=True) if row < 0]
    for query, id in lost if strict else ():
        if pool == "global" or data_set_of(id) == task.data_set_id:
            raise DataError(
                f"{query.where}: the positive {id!r} of the query {query.id!r} is not in the {pool} pool; "
                f"complete the pool, or score without strict"
            )
    facts = {
        "pool": pool,
        **facts,
        "positives": sum(map(len, rows)),
        "positives that the pool lacks": len(lost),
        "of those, of other data sets": sum(data_set_of(id) != task.data_set_id for _, id in lost),
        "queries without a positive in the pool": sum(not (own >= 0).any() for own in rows),
    }
    name = f"{task.name} {pool}"
    depths = (1, 5, 10, 20, 50) if task.k == 10 else (1, 5, 10)
    hits = {f"hit@{k}": functools.partial(metrics.hit_at, k=k) for k in depths}
    recalls = {f"recall@{k}": functools.partial(metrics.recall_at, k=k) for k in depths}
    return RankedTask(
        name=name,
        queries=queries,
        pools=pools,
        metric=f"hit@{task.k}",
        measures=hits | recalls,
        depth=max(depths),
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
