"""MMEB-V2: 36 data sets of images, 18 of videos and 24 of pages, ``evaluate_mmeb_v2(model, data, output)``.

::

    image           ─MmebTask─▶   lists, hit@1    (as MMEB)
    video, local    ─MmebTask─▶   lists, hit@1           ─▶ means: meta tasks, modalities, all 78
    video, global   ─RankedTask─▶ a pool, hit@1
    visdoc, global  ─RankedTask─▶ a pool, nDCG@5

Data sets are read and scored one after another; each is done once, see :mod:`muco.evaluate.driver`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from muco.data import mmeb_test
from muco.data.judged import ListPool
from muco.data.left_out import LeftOut
from muco.data.mmeb_lists import ListSource
from muco.data.mmeb_prompts import Style, load_style
from muco.data.mmeb_shared import JudgedSet, facts_of, folder_of
from muco.data.mmeb_test import MMEBSet
from muco.data.mmeb_v2_sets import BY_NAME, METAS, MODALITIES, NAMES, NAMES_OF, Modality
from muco.data.mmeb_video import VideoSet, find_videos, videos_looked_for
from muco.data.mmeb_visdoc import VisdocSet, find_pages
from muco.errors import DataError, did_you_mean
from muco.evaluate import metrics, mmeb
from muco.evaluate.benchmark import Progress, TaskResult, mean_of
from muco.evaluate.cache import Embedder
from muco.evaluate.driver import Benchmark, check_queries, chosen_tasks, refuse_missing
from muco.evaluate.mmeb_task import MmebTask, sample
from muco.evaluate.outcomes import Measure, Pools
from muco.evaluate.ranked import JudgedQueries, RankedTask, chance_of_hit, chance_of_ndcg, score_ranked

FORM = "MMEB-V2 1"  # of a candidate's content: the target's instruction, and a video, a page or a label
K = 5  # depth of nDCG
DEPTH = 10  # candidates that are ranked: a tie is seen within these

RULES = {
    "image": "; ".join(mmeb.RULES[key] for key in ("ranking", "identity", "text")),
    "video": "hit@1: 1 if the best candidate is one of the right ones; ties are lost; lists of a query: text and the "
    "bytes of frames tell candidates apart, copies of a right one are not rivals; pools: names tell them apart, and "
    "the first content of a name counts",
    "visdoc": f"ndcg@{K}: linear gain, log2(rank + 1) discount, grades by id, ties by id; a collapsed pool is never "
    "right; ndcg_exp@5 (2^grade - 1) is only reported",
    "frames": "evenly spaced, int(linspace(0, n - 1, k)); all, none twice, where there are fewer than k",
    "overall": f"unweighted mean of {len(NAMES)} data sets, not of groups",
}
OFFICIAL: dict[str, str] = {
    "image": mmeb.OFFICIAL["identity"],
    "video": "an option without '. ' is cut to its last character, unless the prompts are guarded; clips, which the "
    "official code lists in no order, are in the order of their names; names tell candidates apart, so a copy of a "
    "right clip under another name ties with it, and the query is lost",
    "visdoc": "grades in the order of the judgements go to the right pages in the order of their ids, one of "
    "the orders that the official code may give them",
}

Source = MMEBSet | VideoSet | VisdocSet


def evaluate_mmeb_v2(
    model: Embedder,
    data: Path,
    output: Path,
    *,
    only: Sequence[str] | None = None,
    tasks: Sequence[str] | None = None,
    prompts: str = "vlm2vec",
    images: Path | None = None,
    media: Mapping[str, Path] | None = None,
    queries: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
    allow_missing: bool = False,
    skip_broken: bool = False,
    official: bool = False,
    progress: Progress | None = None,
    **recorded: str,
) -> dict[str, Any]:
    """Scores a model on MMEB-V2, or on some of its data sets.

    Args:
        model, output, batch_size, skip_broken, recorded: See :class:`muco.evaluate.driver.Benchmark`.
        data: A folder in the published layout, see :mod:`muco.data.mmeb_video`, :mod:`muco.data.mmeb_visdoc` and, for
            the images, :mod:`muco.data.mmeb_test`.
        only: "image", "video", "visdoc"; None: all three.
        tasks: Names of data sets; None: all of ``only``.
        prompts: "vlm2vec", "qwen" or a YAML file, see :mod:`muco.data.mmeb_prompts`.
        images: The folder of the images, as for MMEB.
        media: The folder of a data set's frames or pages, by its name, where it is not a usual one.
        queries: How many of each data set to ask, drawn by ``seed`` from the numbers of rows; pools stay whole.
        allow_missing: Score what is available, instead of refusing to start if a data set is missing.
        official: Repeat mistakes of the official code, see ``OFFICIAL``.
        progress: Called with (contents encoded, contents in all) of one data set after another.
    Returns:
        What ``mmeb_v2.json`` holds; shares are 0 to 1, and "overall" is None unless all 78 were scored.
    Raises:
        DataError: If a data set is unknown or missing, prompts cannot be read, or a row cannot be used.
        MucoError: If ``queries`` is less than 1.
    """
    check_queries(queries)
    data, chosen, style = Path(data), chosen_sets(only, tasks), load_style(prompts)
    found, missing = find_sets(data, chosen)
    refuse_missing(missing, found, "MMEB-V2", allowed=allow_missing)
    opening = Opening(data, images, _known(media or {}), style, official)
    sources = [opening.open(name, files) for name, files in found.items()]
    run = Benchmark("mmeb_v2", model, data, Path(output), batch_size, skip_broken, **recorded)
    scoring = Scoring(run, style, official, queries, seed, progress)
    results = [scoring.score(source) for source in sources]
    groups, overall = aggregates({result.name: result.score for result in results})
    settings = {"tasks": "all" if chosen == NAMES else list(chosen), **scoring.settings}
    warnings = mmeb.told_of_sets(results, missing, seed)
    return run.write(results, settings=settings, groups=groups, overall=overall, missing=[*missing], warnings=warnings)


def chosen_sets(only: Sequence[str] | None, tasks: Sequence[str] | None) -> tuple[str, ...]:
    """Names of data sets in the order of the benchmark; a DataError if one is unknown or not of these modalities."""
    for modality in only or ():
        if modality not in MODALITIES:
            raise DataError(
                f"MMEB-V2 has no modality {modality!r}{did_you_mean(modality, MODALITIES)}; it has "
                f"{', '.join(MODALITIES)}"
            )
    known = [name for modality in MODALITIES if only is None or modality in only for name in NAMES_OF[modality]]
    benchmark = "MMEB-V2" if only is None else f"MMEB-V2 ({', '.join(only)})"
    return chosen_tasks(tasks, known, benchmark)


def find_sets(data: Path, names: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """The files of each data set below a folder, and what was looked for of each that is missing."""
    if not data.is_dir():
        raise DataError(f"{data}: no such folder; it must hold MMEB-V2 as published, see docs/evaluation.md")
    images, absent = mmeb_test.find_files(data, names)
    found, missing = dict[str, Any](), dict[str, str]()
    for name in names:
        if name not in BY_NAME:
            files, expected = images.get(name), absent.get(name, "")
        elif BY_NAME[name].modality == "video":
            files, expected = find_videos(data, BY_NAME[name]), videos_looked_for(data, BY_NAME[name])
        else:
            pages, lacking = find_pages(data, BY_NAME[name])
            files, expected = None if lacking else pages, ", nor ".join(lacking)
        if files:
            found[name] = files
        else:
            missing[name] = expected
    return found, missing


def aggregates(scores: Mapping[str, float]) -> tuple[dict[str, float | None], float | None]:
    """Means of modalities and meta tasks, and of all 78 data sets, from scores by name; None where one is missing."""
    groups = {name: mean_of(scores, names) for name, names in (NAMES_OF | METAS).items()}
    return groups, mean_of(scores, NAMES)


def _known(media: Mapping[str, Path]) -> dict[str, Path]:
    for name, folder in media.items():
        if name not in BY_NAME:
            raise DataError(f"no data set of videos or pages is called {name!r}{did_you_mean(name, [*BY_NAME])}")
        if not Path(folder).is_dir():
            raise DataError(f"{folder}: no such folder; it must hold the frames or pages of {name}")
    return {name: Path(folder) for name, folder in media.items()}


@dataclass(frozen=True)
class Opening:
    """What opening a data set needs."""

    data: Path
    images: Path | None
    media: Mapping[str, Path]
    style: Style
    official: bool

    def open(self, name: str, files: Any) -> Source:
        """A data set whose files were found; a DataError if they, or its images, frames or pages, cannot be used."""
        if name not in BY_NAME:
            return mmeb_test.open_set(self.data, name, files, self.images)
        data_set, how = BY_NAME[name], (self.data, self.style)
        if data_set.modality == "visdoc":
            return VisdocSet(data_set, files, *how, pages=self.media.get(name), official=self.official)
        frames = folder_of(data_set, self.data, self.media.get(name))
        return VideoSet(data_set, files, frames, *how, official=self.official)


@dataclass(frozen=True)
class Scoring:
    """What scoring a data set needs."""

    run: Benchmark
    style: Style
    official: bool
    queries: int | None
    seed: int
    progress: Progress | None

    @property
    def settings(self) -> dict[str, Any]:
        """What results say of how they came about."""
        return {
            "prompts": self.style.name,
            "frames": self.style.frames,
            "official": self.official,
            "queries": self.queries,
            "seed": self.seed,
            "batch_size": self.run.batch_size,
            **self.run.settings,
            "rules": {**RULES, "prompts": self.style.told, **(_official() if self.official else {})},
        }

    def score(self, source: Source) -> TaskResult:
        """The result of one data set, found done or scored; call it on every process alike."""
        if isinstance(source, MMEBSet):
            return self._lists(source, "image", source.images)
        if isinstance(source, VideoSet) and source.data_set.pool == "local":
            return self._lists(source, "video", source.frames)
        if isinstance(source, VideoSet):
            return self._pool(source, source.judged(self._drawn(source.rows)), source.rows, source.frames)
        rows = source.query_rows()
        return self._pool(source, source.judged(rows, self._drawn(len(rows))), len(rows), source.pages)

    def _drawn(self, rows: int) -> set[int]:
        return set(sample(rows, self.queries, self.seed))

    def _lists(self, source: ListSource, modality: Modality, folder: Path) -> TaskResult:
        task = MmebTask(source, self.queries, self.seed, official=self.official, skip_broken=self.run.skip_broken)
        work = partial(MmebTask.score, run=self.run, progress=self.progress)
        key = {"rules": self._rules(modality), "images": str(folder.resolve())}
        return self.run.score([task], work, key)[0]

    def _pool(self, source: VideoSet | VisdocSet, judged: JudgedSet, rows: int, folder: Path | None) -> TaskResult:
        skip_broken, name, data_set = self.run.skip_broken, source.name, source.data_set
        asked = JudgedQueries(judged.queries, LeftOut(skip_broken))
        pool = ListPool(f"the candidates of {name}", judged.candidates, form=FORM, left_out=LeftOut(skip_broken))
        facts = facts_of(data_set, self.style) | {"rows": rows, "sampled": len(asked) < rows} | dict(judged.facts)
        video = data_set.modality == "video"
        task = RankedTask(
            name=name,
            queries=asked,
            pools=Pools([pool]),
            metric="hit@1" if video else f"ndcg@{K}",
            measures=HITS if video else GRADED,
            depth=DEPTH,
            chance=partial(chance_of_hit, k=1) if video else partial(chance_of_ndcg, k=K),
            facts=facts,
            warnings=judged.warnings,
            cached_as=f"MMEB-V2 {name}",
            ties="lost" if video else "by id",
        )
        # Paths of images are on the page, so results found again must be of this folder.
        key = {"rules": self._rules(data_set.modality), "images": str(folder.resolve()) if folder else ""}
        return score_ranked(self.run, [task], key, self.progress)[0]

    def _rules(self, modality: Modality) -> dict[str, str]:
        """What the scores of a modality depend on besides the data."""
        texts = {} if modality == "image" else {"prompts": self.style.told, "frames": RULES["frames"]}
        return {"score": RULES[modality], **texts, **(_official(modality) if self.official else {})}


def _official(*modalities: Modality) -> dict[str, str]:
    return {f"official, {modality}": OFFICIAL[modality] for modality in modalities or MODALITIES}


def exponential_ndcg(found: Sequence[str], grades: Mapping[str, int], k: int) -> float:
    """nDCG@k with gains of 2^grade - 1; equal to the linear one for grades of 0 and 1."""
    return metrics.ndcg_at(found, {id: 2 ** max(0, grade) - 1 for id, grade in grades.items()}, k)


HITS: dict[str, Measure] = {f"hit@{k}": partial(metrics.hit_at, k=k) for k in (1, 5)}
GRADED: dict[str, Measure] = {
    f"ndcg@{K}": partial(metrics.ndcg_at, k=K),
    f"ndcg_exp@{K}": partial(exponential_ndcg, k=K),
    "hit@1": partial(metrics.hit_at, k=1),
    f"recall@{K}": partial(metrics.recall_at, k=K),
}
