"""How every benchmark runs: one task after another, each done once, and then the files of the whole.

::

    tasks ─found done?─▶ TaskResult ◀─work─ the task      tasks/NAME.json, outcomes/NAME.jsonl
      └──────────── all TaskResults ─▶ <benchmark>.json .csv .md .html

A benchmark brings its tasks, the work that scores one of them, and the means over them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from muco import distributed
from muco.base.machine import versions
from muco.errors import DataError, MucoError, did_you_mean
from muco.evaluate.benchmark import FORMAT, TaskFiles, TaskResult, pixels_differ
from muco.evaluate.cache import Embedder, EmbeddingCache, caveats, known_by
from muco.evaluate.page import write_reports


@dataclass(frozen=True)
class Benchmark:
    """A run of a benchmark: what is scored, and where the results go.

    A task that ``output`` holds for this model, these settings and this data is not repeated, and vectors of an
    interrupted run are reused. All processes run alike; the first one writes.

    Args:
        name: "mmeb", "mmeb_v2", "mbeir" or "beir"; the files are named after it.
        model: Encodes contents to float32 [n, d], L2-normalised, and has a fingerprint.
        output: Gets the files of :mod:`muco.evaluate.benchmark`, else an OutputError.
        batch_size: Contents per forward pass; the scores do not depend on it.
        skip_broken: Leave out what cannot be embedded, instead of stopping; see :mod:`muco.data.left_out`.
        pixels, trained_pixels: The limits of image size, here and in training, as "3136 to 1003520". Recorded in the
            results, with a warning if they differ.
        command, model_path: Recorded in the results.
    """

    name: str
    model: Embedder
    data: Path
    output: Path
    batch_size: int
    skip_broken: bool
    pixels: str = ""
    trained_pixels: str = ""
    command: str = ""
    model_path: str = ""

    @functools.cached_property
    def fingerprint(self) -> str:
        """The model's, see :func:`known_by`, taken once: of a large model that takes a while."""
        return known_by(self.model)

    @property
    def settings(self) -> dict[str, Any]:
        """What the results of every benchmark say of their settings."""
        names = ("skip_broken", "pixels", "trained_pixels", "data")
        return {name: getattr(self, name) for name in names} | {"data": str(self.data)}

    def cache(self, data: str) -> EmbeddingCache:
        """The vectors of some data, named by a fingerprint or otherwise."""
        return EmbeddingCache(self.output / "cache", model=self.fingerprint, data=data)

    def score(
        self, tasks: Iterable[Any], work: Callable[[Any], TaskResult], key: Mapping[str, Any]
    ) -> list[TaskResult]:
        """The results of all tasks; ``work`` is done for those that the output folder does not hold already.

        Args:
            tasks: Each has a name, and a fingerprint of its queries, candidates and judgements; it is taken when the
                one before it is done.
            key: What the scores depend on besides the benchmark, the model and a task's data. Plain values.
        Returns:
            The results without their outcomes: those are in files, and many.
        """
        key = {"benchmark": self.name, "model": self.fingerprint, **key}
        files = TaskFiles(self.output, key, partial=self.skip_broken)
        results = []
        for task in tasks:
            result = distributed.first_only(functools.partial(files.find, task.name, task.fingerprint))
            if result is None:
                result = work(task)
                distributed.first_only(functools.partial(files.add, result))
            results.append(replace(result, outcomes=()))
        return results

    def write(self, results: Sequence[TaskResult], **said: Any) -> dict[str, Any]:
        """Writes the files of the whole benchmark, and returns :meth:`result`."""
        result = self.result(results, **said)
        distributed.first_only(functools.partial(write_reports, self.output, result, results))
        return result

    def result(
        self,
        results: Sequence[TaskResult],
        *,
        settings: Mapping[str, Any],
        groups: Mapping[str, float | None],
        overall: float | None,
        missing: Sequence[str] = (),
        warnings: Iterable[str] = (),
    ) -> dict[str, Any]:
        """The whole benchmark as plain values for JSON.

        Args:
            groups: Means over tasks by name, 0 to 1; None where one of their tasks was not scored.
            overall: None if a task is missing or was left out.
            missing: Tasks whose data was not found.
            warnings: Of the benchmark as a whole; those of tasks are added.
        """
        own = [f"{result.name}: {line}" for result in results for line in result.warnings]
        return {
            "format": FORMAT,
            "benchmark": self.name,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": self.command,
            "model": {"path": self.model_path, "fingerprint": self.fingerprint},
            "versions": versions(),
            "settings": dict(settings),
            "tasks": {result.name: result.summary() for result in results},
            "groups": dict(groups),
            "overall": overall,
            "missing": list(missing),
            "warnings": [*caveats(self.model), *pixels_differ(self.pixels, self.trained_pixels), *warnings, *own],
        }


def chosen_tasks(named: Sequence[str] | None, known: Sequence[str], benchmark: str) -> tuple[str, ...]:
    """The named tasks in the order of the benchmark, None names all; a DataError if one is unknown or none is named."""
    for name in named or ():
        if name not in known:
            raise DataError(f"{benchmark} has no task {name!r}{did_you_mean(name, known)}")
    if named is not None and not named:
        raise DataError(f"no task of {benchmark} is named; name some, or leave the option out for all {len(known)}")
    return tuple(name for name in known if named is None or name in named)


def refuse_missing(missing: Mapping[str, str], found: Collection[str], benchmark: str, *, allowed: bool) -> None:
    """A DataError that lists the data sets that were not found, by what was looked for; none if some may be missing."""
    if not missing or (allowed and found):
        return
    listed = "; ".join(f"{name}: no {expected}" for name, expected in missing.items())
    remedy = "or score the others alone by allowing missing ones" if found else "or name another folder"
    count = f"{len(missing)} of {len(missing) + len(found)}"
    raise DataError(f"{count} data sets of {benchmark} are missing; get them, {remedy}. {listed}")


def check_queries(queries: int | None) -> None:
    """Refuses a number of queries per task that is less than 1, with a MucoError; None asks all."""
    if queries is not None and queries < 1:
        raise MucoError(f"queries is {queries}; pass at least 1 per task, or leave it out")
