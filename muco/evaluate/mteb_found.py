"""Tasks of mteb, each scored once: what is found in a folder of results, and when it is scored again.

mteb reuses the file of a finished task whatever its data or version. Here a file counts only if it is of the same data
revision and of the same main version of mteb (2.x); otherwise the task is scored again, and a log line names the file.
Files of an earlier 2.x count, as mteb has a new version nearly every week; results name the versions, with a warning.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

from muco.base.machine import installed
from muco.errors import DataError, MucoError
from muco.evaluate.mteb import MtebEncoder

try:
    import mteb
    from datasets import Dataset
except ImportError as error:
    raise MucoError(f"the mteb package is not installed ({error}); run: pip install mteb") from error

from mteb.abstasks.abstask import AbsTask
from mteb.abstasks.aggregated_task import AbsTaskAggregate
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.results import TaskResult
from mteb.types import PromptType

log = logging.getLogger(__name__)


@dataclass
class TaskRuns:
    """Scores tasks one by one.

    Args:
        cache: The folder of results.
        batch_size: Contents per forward pass.
        allow_missing: Skip public tasks whose data cannot be loaded; private ones are always skipped.

    Attributes:
        reused: Names of the tasks that were found done.
        warnings: Sentences that nobody should overlook.
    """

    encoder: MtebEncoder
    cache: mteb.ResultCache
    batch_size: int
    allow_missing: bool
    reused: set[str] = field(default_factory=set)
    warnings: list[str] = field(default_factory=list)

    @property
    def fingerprint(self) -> str:
        return self.encoder.mteb_model_meta.revision

    def score(self, task: AbsTask) -> TaskResult | None:
        """The result of a task, found or new, of its own splits and subsets: a file may hold more of them.

        Returns:
            None if the data cannot be loaded and the task may be skipped.
        Raises:
            DataError: If the data cannot be loaded, lack a text, or a row cannot be embedded.
            OSError: If mteb cannot write the result.
        """
        done = self._score_parts(task) if isinstance(task, AbsTaskAggregate) else self._score_one(task)
        return done and done.validate_and_filter_scores(task)

    def _score_one(self, task: AbsTask) -> TaskResult | None:
        found, again = self._find(task)
        self._tell_of_folder(task)
        if found is not None and not again and not found.get_missing_evaluations(task):
            self.reused.add(task.metadata.name)
            return found
        kept = task.data_loaded
        if not self._load(task):
            return None
        try:
            _check_texts(task)
            done = mteb.evaluate(
                self.encoder,
                task,
                co2_tracker=False,
                encode_kwargs={"batch_size": self.batch_size, "show_progress_bar": False},
                cache=self.cache,
                overwrite_strategy="always" if again else "only-missing",
                show_progress_bar=False,
            )
        finally:
            if not kept:
                task.unload_data()
        return done.task_results[0]

    def _score_parts(self, task: AbsTaskAggregate) -> TaskResult | None:
        """A task whose score is made of those of others (VisualSTS17Eng of MIEB): these are scored, then joined."""
        results = [self.score(part) for part in task.metadata.tasks]
        if any(result is None for result in results):
            return None
        joined = task.combine_task_results(results)
        if all(part.metadata.name in self.reused for part in task.metadata.tasks):
            self.reused.add(task.metadata.name)
        self.cache.save_to_cache(joined, self.encoder.mteb_model_meta)
        return joined

    def _find(self, task: AbsTask) -> tuple[TaskResult | None, bool]:
        """What the folder holds of a task, and whether it must be scored anew all the same, which is then logged."""
        path = self.cache.get_task_result_path(task.metadata.name, self.encoder.mteb_model_meta)
        if not path.is_file():
            return None, False
        try:
            found = TaskResult.from_disk(path)
        except (ValueError, KeyError) as error:
            log.warning("%s is damaged (%s); the task is scored again", path, type(error).__name__)
            return None, True
        revision, now = task.metadata.revision, _main(installed("mteb"))
        if found.dataset_revision != revision:
            log.warning(
                "%s is of data revision %s, now %s; the task is scored again", path, found.dataset_revision, revision
            )
            return found, True
        if other := [version for version in versions_of(found) if _main(version) != now]:
            log.warning("%s was scored by mteb %s, now %s.x; the task is scored again", path, other[0], now)
            return found, True
        return found, False

    def _load(self, task: AbsTask) -> bool:
        """Loads the data of a task; False if that fails and the task may be skipped."""
        if task.data_loaded:
            return True
        try:
            task.load_data()
        except (OSError, ValueError) as error:  # nothing there, no access, a hub that cannot be reached; another layout
            name, where, reason = task.metadata.name, task.metadata.dataset["path"], str(error).split("\n")[0]
            if task.metadata.is_public and not self.allow_missing:
                raise DataError(
                    f"{name}: its data cannot be loaded from {where!r} ({reason}); log in, or load them where there is "
                    "a network, or skip such tasks (--allow-missing)"
                ) from error
            kind = "public" if task.metadata.is_public else "private"
            self.warnings.append(f"{name}: skipped, its data ({kind}) cannot be loaded from {where!r} ({reason})")
            return False
        return True

    def _tell_of_folder(self, task: AbsTask) -> None:
        """A folder here that has the name of a task's data on the hub is read in its place, of any revision."""
        where = task.metadata.dataset["path"]
        if Path(where).is_dir():
            self.warnings.append(
                f"{task.metadata.name}: the folder {where!r} is read in place of the hub; nothing checks that it holds "
                f"revision {task.metadata.revision}, nor that it is as it was for a result that was found done"
            )


def _check_texts(task: AbsTask) -> None:
    """Refuses a retrieval set that lacks texts where mteb would fail before our encoder sees them; names the row.

    A missing text of a query reaches the encoder, which refuses it.
    """
    if not isinstance(task, AbsTaskRetrieval):
        return
    task.convert_v1_dataset_format_to_v2(num_proc=None)  # as mteb itself does next
    for subset, splits in task.dataset.items():
        for split, data in splits.items():
            where = f"{task.metadata.name}, {split}, {subset}"
            for side, prompt_type in (("queries", PromptType.query), ("corpus", PromptType.document)):
                columns = data[side].column_names
                if "text" in task.metadata.get_modalities(prompt_type) and "text" not in columns:
                    raise DataError(
                        f"{where}: the column 'text' of the {side} is missing; there are {', '.join(columns)}"
                    )
            if "text" in task.metadata.get_modalities(PromptType.document):
                _check_cells(data["corpus"], where)


def _check_cells(corpus: Dataset, where: str) -> None:
    for name in ("text", "title"):
        if name in corpus.column_names and None in (values := list(corpus[name])):
            row = values.index(None)
            raise DataError(
                f"{where}: row {row} of the corpus has nothing in its column {name!r}; repair the task's data"
            )


def versions_of(result: TaskResult) -> tuple[str, ...]:
    """The versions of mteb that computed the parts of a result, sorted."""
    found = {score.get("mteb_version") for scores in result.scores.values() for score in scores}
    return tuple(sorted(version or "unknown" for version in found))


def _main(version: str | None) -> str:
    return (version or "").split(".")[0]
