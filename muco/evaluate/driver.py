"""How every benchmark runs: one task after another, each done once, and then the files of the whole.

::

    tasks ─found done?─▶ TaskResult ◀─work─ the task      tasks/NAME.json, outcomes/NAME.jsonl
      └──────────── all TaskResults ─▶ benchmark_result ─▶ <benchmark>.json .csv .md .html

A benchmark brings its tasks, the work that scores one of them, and the means over them. Of several processes all run
alike: the first one reads and writes the files.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from muco import distributed
from muco.errors import MucoError
from muco.evaluate.benchmark import TaskFiles, TaskResult, benchmark_result
from muco.evaluate.cache import Embedder, EmbeddingCache
from muco.evaluate.page import write_reports


class NamedTask(Protocol):
    """A task, read and checked. ``fingerprint`` is of its queries, candidates and judgements."""

    @property
    def name(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...


AnyTask = TypeVar("AnyTask", bound=NamedTask)


@dataclass(frozen=True)
class Benchmark:
    """A run of a benchmark: what is scored, and where the results go. The arguments are those of ``evaluate_mmeb``.

    Args:
        name: "mmeb", "mbeir" or "beir"; the files are named after it.
    """

    name: str
    model: Embedder
    data: Path
    output: Path
    batch_size: int
    skip_broken: bool
    pixels: str
    trained_pixels: str
    command: str
    model_path: str

    @functools.cached_property
    def fingerprint(self) -> str:
        """The model's, taken once: of a large model that takes a while."""
        return self.model.fingerprint

    @property
    def settings(self) -> dict[str, Any]:
        """What the results of every benchmark say of their settings."""
        return {
            "skip_broken": self.skip_broken,
            "pixels": self.pixels,
            "trained_pixels": self.trained_pixels,
            "data": str(self.data),
        }

    def cache(self, data: str) -> EmbeddingCache:
        """The vectors of some data, named by a fingerprint or otherwise."""
        return EmbeddingCache(self.output / "cache", model=self.fingerprint, data=data)

    def score(
        self, tasks: Iterable[AnyTask], work: Callable[[AnyTask], TaskResult], key: Mapping[str, Any]
    ) -> list[TaskResult]:
        """The results of all tasks; ``work`` is done for those that the output folder does not hold already.

        Args:
            tasks: Each is taken when the one before it is done.
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

    def write(
        self,
        results: Sequence[TaskResult],
        *,
        settings: Mapping[str, Any],
        groups: Mapping[str, float | None],
        overall: float | None,
        missing: Sequence[str] = (),
        warnings: Iterable[str] = (),
    ) -> dict[str, Any]:
        """Writes the files of the whole benchmark, and returns what its JSON file holds.

        Args:
            settings, groups, overall, missing, warnings: See :func:`muco.evaluate.benchmark.benchmark_result`.
        """
        model = {"path": self.model_path, "fingerprint": self.fingerprint}
        result = benchmark_result(
            self.name,
            results,
            groups,
            overall=overall,
            model=model,
            settings=settings,
            command=self.command,
            missing=missing,
            warnings=warnings,
        )
        distributed.first_only(functools.partial(write_reports, self.output, result, results))
        return result


def check_queries(queries: int | None) -> None:
    """Refuses a number of queries per task that is less than 1, with a MucoError; None asks all."""
    if queries is not None and queries < 1:
        raise MucoError(f"queries is {queries}; pass at least 1 per task, or leave it out")
