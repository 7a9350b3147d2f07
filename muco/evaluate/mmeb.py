"""MMEB: 36 data sets of images and texts, ``evaluate_mmeb(model, data, output)``.

::

    data sets ─read_questions─▶ rows ─Task─▶ distinct contents ─embed─▶ vectors ─judge─▶ hit@1 per data set ─▶ means

Every query ranks its own list, and the right candidate must beat all others: it is listed first, so a rule that lets it
win ties would give full marks to a model that maps everything to one point. Each distinct content of a data set is
embedded once, in an order that the order of rows does not change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from muco.data.mmeb_sets import DATA_SETS, METAS, NAMES
from muco.data.mmeb_test import find_files, open_set
from muco.dialogue import BLANK
from muco.evaluate.benchmark import Progress, TaskResult, mean_of
from muco.evaluate.cache import Embedder
from muco.evaluate.driver import Benchmark, check_queries, chosen_tasks, refuse_missing
from muco.evaluate.mmeb_task import MmebTask

RULES = {
    "ranking": "each query ranks its own list; scores are float32 dot products; ties are lost",
    "identity": "text and image bytes; copies of the ground truth are no rivals",
    "text": f"as in MMEB V1, the image token taken out; an empty candidate is {BLANK.text!r}",
    "overall": "the mean of 36 data sets",
}

OFFICIAL = {
    "identity": "official names: the text; the image's path; or, where queries have images, path and caption; of "
    "candidates with one name the first content counts; copies of the ground truth are no rivals"
}


def evaluate_mmeb(
    model: Embedder,
    data: Path,
    output: Path,
    *,
    images: Path | None = None,
    tasks: Sequence[str] | None = None,
    queries: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
    allow_missing: bool = False,
    skip_broken: bool = False,
    official: bool = False,
    progress: Progress | None = None,
    **recorded: str,
) -> dict[str, Any]:
    """Scores a model on MMEB, or on some of its data sets.

    Args:
        model, output, batch_size, skip_broken, recorded: See :class:`muco.evaluate.driver.Benchmark`.
        data: A folder with one folder per data set, see :mod:`muco.data.mmeb_test`.
        images: The folder of all images; None: ``eval_images`` or ``image-tasks`` in ``data``, by the layout.
        tasks: Names of data sets; None: all 36.
        queries: How many of each data set to ask, drawn by ``seed``; None: all.
        allow_missing: Score what is available, instead of refusing to start if a data set is missing.
        official: Tell candidates apart as the paper's code does, see :func:`muco.data.mmeb_test.official_name`.
            How images are opened is the model's own: set ``images_as_stored`` of its processor too.
        progress: Called with (contents encoded, contents in all) of one data set after another.
    Returns:
        What ``mmeb.json`` holds; shares are 0 to 1, and "overall" is None unless all 36 were scored.
    Raises:
        DataError: If a data set is unknown or missing, or a row cannot be used.
        MucoError: If ``queries`` is less than 1.
    """
    check_queries(queries)
    chosen = chosen_tasks(tasks, NAMES, "MMEB")
    found, missing = find_files(data, chosen)
    refuse_missing(missing, found, "MMEB", allowed=allow_missing)
    sources = [open_set(Path(data), name, paths, images) for name, paths in found.items()]
    run = Benchmark("mmeb", model, Path(data), Path(output), batch_size, skip_broken, **recorded)
    rules = RULES | (OFFICIAL if official else {})
    # Paths of images are on the page, so results found again must be of this folder. The draw is in the fingerprint.
    places = sorted({str(source.images.resolve()) for source in sources})
    opened = (MmebTask(source, queries, seed, official=official, skip_broken=skip_broken) for source in sources)
    results = run.score(opened, partial(MmebTask.score, run=run, progress=progress), {"rules": rules, "images": places})
    groups, overall = aggregates({result.name: result.score for result in results})
    settings = {
        "tasks": "all" if chosen == NAMES else list(chosen),
        "queries": queries,
        "seed": seed,
        "batch_size": batch_size,
        **run.settings,
        "rules": rules,
    }
    warnings = told_of_sets(results, missing, seed)
    return run.write(results, settings=settings, groups=groups, overall=overall, missing=[*missing], warnings=warnings)


def aggregates(scores: Mapping[str, float]) -> tuple[dict[str, float | None], float | None]:
    """Means of the groups and of all 36 data sets, from scores by name; None where a data set has no score."""
    groups = {meta: mean_of(scores, [d.name for d in DATA_SETS if d.meta == meta]) for meta in METAS}
    for name, inside in (("in-distribution", True), ("out-of-distribution", False)):
        groups[name] = mean_of(scores, [d.name for d in DATA_SETS if d.in_distribution == inside])
    return groups, mean_of(scores, NAMES)


def told_of_sets(results: Sequence[TaskResult], missing: Mapping[str, str], seed: int) -> list[str]:
    """Warnings about samples in place of all queries, and data sets that were not found."""
    lines = []
    if sampled := [result.queries for result in results if result.facts["sampled"]]:
        lines.append(
            f"data sets scored on samples of {min(sampled)} queries (seed {seed}): {len(sampled)}; "
            "these scores are not those of the benchmark"
        )
    if missing:
        lines.append(f"data sets that were not found: {len(missing)}; so there is no overall score")
    return lines
