"""Benchmarks of the ``mteb`` package, such as ViDoRe and MIEB: ``evaluate_mteb(model, named_tasks(…), output)``.

::

    <output>/mteb.json                                       scores of the last run, means, and where they come from
             results/NAME/FINGERPRINT/experiments/SETTINGS/  mteb's own files, one for each task

What is found done in the output folder is decided by :mod:`muco.evaluate.mteb_found`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from muco.base.files import write_json, writing
from muco.base.machine import installed, versions
from muco.errors import DataError, MucoError, did_you_mean
from muco.evaluate.benchmark import FORMAT, Progress, mean_of, pixels_differ
from muco.evaluate.cache import caveats
from muco.evaluate.mteb import INSTRUCTIONS, MODALITIES, MtebEncoder
from muco.evaluate.mteb_found import TaskRuns, versions_of
from muco.model import Model

try:
    import mteb
except ImportError as error:
    raise MucoError(f"the mteb package is not installed ({error}); run: pip install mteb") from error

from mteb.abstasks.abstask import AbsTask
from mteb.benchmarks.benchmark import Benchmark, BenchmarkAggregation
from mteb.get_tasks import TASK_LIST
from mteb.results import BenchmarkResults, ModelResult, TaskResult

RULES = {
    "scores": "mteb's own main score of each task, the mean over its splits and subsets (languages)",
    "instructions": INSTRUCTIONS,
    "empty": "a row without text and image is embedded as a blank",
}


@dataclass(frozen=True)
class TaskScore:
    """One task as ``mteb.json`` has it."""

    type: str  # as mteb names it: "DocumentUnderstanding"
    metric: str  # mteb's name of the main score: "ndcg_at_5"
    score: float  # 0 to 1; correlations -1 to 1
    parts: Mapping[str, Mapping[str, float]]  # split -> subset -> score
    data: str  # revision of the data
    mteb: tuple[str, ...]  # versions that computed it
    reused: bool  # found done in the output folder


def named_tasks(benchmark: str | None, tasks: Sequence[str] = ()) -> Benchmark | list[AbsTask]:
    """A benchmark of mteb ("ViDoRe(v2)"), or tasks of it by name; a MucoError if one is unknown or none is named."""
    if (benchmark is not None) == bool(tasks):
        raise MucoError("name one benchmark of mteb, or one or more of its tasks, and not both")
    if benchmark is None:
        return [_named_task(name) for name in dict.fromkeys(tasks)]
    try:
        return mteb.get_benchmark(benchmark)
    except KeyError as error:
        known = [name for one in mteb.get_benchmarks() for name in (one.name, *one.aliases)]
        raise MucoError(f"mteb has no benchmark {benchmark!r}{did_you_mean(benchmark, known)}") from error


def _named_task(name: str) -> AbsTask:
    try:
        return mteb.get_task(name)
    except KeyError as error:
        near = difflib.get_close_matches(name, [task.metadata.name for task in TASK_LIST], n=1)
        hint = did_you_mean(name, near) if near else "; mteb.get_tasks() in Python lists them"
        raise MucoError(f"mteb has no task {name!r}{hint}") from error


def evaluate_mteb(
    model: Model,
    tasks: Benchmark | Sequence[AbsTask],
    output: Path,
    *,
    batch_size: int = 64,
    instructions: bool = True,
    dimension: int | None = None,
    dimensions: Sequence[int] = (),
    allow_missing: bool = False,
    progress: Progress | None = None,
    command: str = "",
    model_path: str = "",
) -> dict[str, Any]:
    """Scores a model on tasks of mteb, each of which is done once for the same model, settings and data.

    Args:
        tasks: A benchmark, which brings its means, or tasks: "overall" is then their unweighted mean.
        output: Gets the files that the first lines of this module name.
        batch_size: Contents per forward pass; the scores do not depend on it.
        instructions, dimension, dimensions: See :class:`muco.evaluate.mteb.MtebEncoder`.
        allow_missing: Skip public tasks whose data cannot be loaded, too. Private ones are always skipped, as most
            people have no access to them. A mean that lacks a task is None.
        progress: Called with (tasks done, tasks in all).
        command, model_path: Recorded in the results; ``model_path`` also names the model in mteb's files.
    Returns:
        What ``mteb.json`` holds.
    Raises:
        DataError: If a task has other modalities than text and image, its data cannot be loaded, or one of its rows
            cannot be embedded; the message names it.
        MucoError: If the vectors are shorter than ``dimension``, or mteb does not know a task of the benchmark.
        OutputError: If the output folder cannot be made or ``mteb.json`` cannot be written.
    """
    _check(tasks)
    encoder = MtebEncoder(model, model_path, instructions=instructions, dimension=dimension, dimensions=dimensions)
    with writing(output):
        cache = mteb.ResultCache(output)
    runs = TaskRuns(encoder, cache, batch_size, allow_missing)
    found: dict[str, TaskResult] = {}
    scores: dict[str, TaskScore] = {}
    for number, task in enumerate(_list(tasks), start=1):
        if (done := runs.score(task)) is not None:
            found[task.metadata.name], scores[task.metadata.name] = done, _task_score(task, done, runs)
        if progress:
            progress(number, len(_list(tasks)))
    means = _means(tasks, found, scores, encoder)
    result = _result(tasks, encoder, scores, means, runs.warnings) | {
        "command": command,
        "model": {"path": model_path, "name": encoder.mteb_model_meta.name, "fingerprint": runs.fingerprint},
        "settings": {**encoder.mteb_model_meta.experiment_kwargs, "batch_size": batch_size, "rules": RULES},
    }
    write_json(Path(output) / "mteb.json", result)
    return result


def _result(
    tasks: Benchmark | Sequence[AbsTask],
    encoder: MtebEncoder,
    scores: Mapping[str, TaskScore],
    means: tuple[dict[str, float | None], float | None],
    warnings: Sequence[str],
) -> dict[str, Any]:
    """What ``mteb.json`` says of a run, as plain values."""
    return {
        "format": FORMAT,
        "benchmark": tasks.name if isinstance(tasks, Benchmark) else "mteb",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions() | {"mteb": installed("mteb")},
        "tasks": {name: asdict(score) for name, score in scores.items()},
        "groups": means[0],
        "overall": means[1],
        "missing": [task.metadata.name for task in _list(tasks) if task.metadata.name not in scores],
        "warnings": [*caveats(encoder.model), *_pixels(encoder), *warnings, *_mixed(scores)],
    }


def _list(tasks: Benchmark | Sequence[AbsTask]) -> Sequence[AbsTask]:
    return tasks.tasks if isinstance(tasks, Benchmark) else tasks


def _check(tasks: Benchmark | Sequence[AbsTask]) -> None:
    """Refuses what would only fail when other tasks are done."""
    if not _list(tasks):
        raise MucoError("name at least one task to score")
    for task in _list(tasks):
        name, others = task.metadata.name, sorted(set(task.metadata.modalities) - set(MODALITIES))
        if others:
            raise DataError(f"{name}: needs {' and '.join(others)}; the model reads text and images. Leave it out")
        if isinstance(tasks, Benchmark):
            _known(name, tasks.name)


def _known(task: str, benchmark: str) -> None:
    """mteb looks up the types of a benchmark's tasks by their names."""
    try:
        mteb.get_task(task)
    except KeyError as error:
        raise MucoError(
            f"{benchmark}: mteb.get_task does not know its task {task!r}; pass the tasks as a list for their mean"
        ) from error


def _pixels(encoder: MtebEncoder) -> list[str]:
    processor = encoder.model.encoder.muco_processor
    limits = (processor.pixels, processor.trained_pixels)
    return pixels_differ(*("{} to {}".format(*pixels) if pixels else None for pixels in limits))


def _task_score(task: AbsTask, result: TaskResult, runs: TaskRuns) -> TaskScore:
    return TaskScore(
        type=task.metadata.type,
        metric=task.metadata.main_score,
        score=float(result.get_score()),
        parts={
            split: {score["hf_subset"]: float(score["main_score"]) for score in scores}
            for split, scores in result.scores.items()
        },
        data=result.dataset_revision,
        mteb=versions_of(result),
        reused=task.metadata.name in runs.reused,
    )


def _mixed(scores: Mapping[str, TaskScore]) -> list[str]:
    """A warning if not all tasks were scored by the installed mteb."""
    others = {name: score.mteb for name, score in scores.items() if set(score.mteb) != {installed("mteb")}}
    if not others:
        return []
    said = ", ".join(f"{name} by {' and '.join(of)}" for name, of in others.items())
    return [f"found done, scored by another version of mteb than {installed('mteb')}: {said}"]


def _means(
    tasks: Benchmark | Sequence[AbsTask],
    found: Mapping[str, TaskResult],
    scores: Mapping[str, TaskScore],
    encoder: MtebEncoder,
) -> tuple[dict[str, float | None], float | None]:
    """The means of a benchmark by mteb's names, and the one that it ranks models by."""
    if not isinstance(tasks, Benchmark):
        return {}, mean_of({name: score.score for name, score in scores.items()}, [t.metadata.name for t in tasks])
    meta, lacking = encoder.mteb_model_meta, [task for task in tasks.tasks if task.metadata.name not in found]
    if lacking:
        return _means_without(tasks, lacking, list(found.values())), None
    own = ModelResult(model_name=meta.name, model_revision=meta.revision, task_results=list(found.values()))
    means = tasks.get_score(BenchmarkResults(model_results=[own]), raise_error=True)[meta.name]
    del means["Rank"]  # among one model
    return means, means[_ranked_by(tasks, means)]


def _means_without(
    benchmark: Benchmark, lacking: Sequence[AbsTask], found: list[TaskResult]
) -> dict[str, float | None]:
    """Means that need none of the tasks that are lacking: those of ViDoRe's public tasks without its private ones."""
    if BenchmarkAggregation.PUBLIC_PRIVATE not in benchmark.aggregations:
        return {}
    means = BenchmarkAggregation.PUBLIC_PRIVATE.aggregate(found)
    gaps = {"Mean(Public)" if task.metadata.is_public else "Mean(Private)" for task in lacking}
    return {name: None if name in gaps else mean for name, mean in means.items()}


def _ranked_by(benchmark: Benchmark, means: Mapping[str, float | None]) -> str:
    """The name of the mean by which a benchmark's table is sorted, the first one where it names none."""
    column = benchmark.summary_sort_column
    name = column if isinstance(column, str) else column[0] if column else ""
    return name.replace(" (", "(") or next(iter(means))
