"""What every benchmark of many tasks leaves behind, and how an interrupted one resumes.

::

    <output>/
    ├── mmeb.json            scores of all tasks, their means, and all that tells where they come from
    ├── mmeb.csv .md .html   the same for other eyes
    ├── tasks/NAME.json      one task, written when it is done: a run that is started again does not repeat it
    ├── outcomes/NAME.jsonl  one line per query: what `muco evaluate compare` reads
    ├── left_out/NAME.jsonl  one line per query or candidate that could not be embedded, where there are any
    └── cache/               vectors

A finished task counts only for the same model, data and settings; everything else is done again.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus

from muco.base.files import make_folder, write_json, write_text, writing
from muco.data.left_out import Broken
from muco.dialogue import Content, ImageLike, Video
from muco.images import cover

FORMAT = 1  # raise when what a task file holds changes its meaning
FAILURES = 20  # kept per task for the page
FOUND = 5  # candidates kept per query
LONGEST_NAME = 200  # bytes of a file's name, without its ending; file systems allow 255 with it
OWN_PIXELS = "the model's own"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shown:
    """A query or candidate as a person sees it."""

    id: str
    text: str = ""
    images: tuple[str, ...] = ()  # paths of image files that can be opened from here; of a video, its first frame

    @classmethod
    def of(cls, id: str, content: Content) -> Shown:
        return cls(id, content.text, tuple(str(_shown(image)) for image in content.images))


def _shown(image: ImageLike) -> ImageLike:
    """A video whose frames are files is shown by the first of them; another one has its name alone."""
    frames = isinstance(image, Video) and (isinstance(image.source, tuple) or image.source.is_dir())
    return cover(image) if frames else image


@dataclass(frozen=True)
class Outcome:
    """What became of one query."""

    query: str  # its id, unique within the task
    value: float  # of the task's metric, 0 to 1
    rank: int | None  # of the best right candidate, from 1; None if it is beyond what was ranked
    found: tuple[tuple[str, float], ...]  # the best candidates, (id, score), best first, at most FOUND


@dataclass(frozen=True)
class Failure:
    """A query whose best candidate is wrong, for the page."""

    margin: float  # score of the best wrong candidate minus that of the best right one
    query: Shown
    right: Shown  # a right candidate
    found: tuple[tuple[Shown, float], ...]  # the best candidates with their scores, best first


@dataclass(frozen=True)
class TaskResult:
    """One task of a benchmark."""

    name: str  # as the benchmark spells it; with the pool where a benchmark has several ("NAME local")
    metric: str  # the one that counts: "hit@1", "hit@5", "ndcg@10"
    scores: Mapping[str, float]  # every metric by name, 0 to 1
    queries: int  # how many were asked
    candidates: tuple[int, int]  # smallest and largest number that a query chose from
    chance: float | None  # of the metric, 0 to 1, for a model that cannot tell candidates apart; None if unknown
    data: str  # fingerprint of queries, candidates and judgements
    facts: Mapping[str, Any] = field(default_factory=dict)  # anything else a reader must know
    warnings: tuple[str, ...] = ()  # sentences that nobody should overlook
    outcomes: tuple[Outcome, ...] = ()  # one per query
    failures: tuple[Failure, ...] = ()  # the worst ones, largest margin first, at most FAILURES
    left_out: Mapping[str, int] = field(default_factory=dict)  # muco.data.left_out.counts
    broken: tuple[Broken, ...] = ()  # what was left out, one by one

    @property
    def score(self) -> float:
        return self.scores[self.metric]

    def summary(self) -> dict[str, Any]:
        """What the files of the whole benchmark say of the task."""
        kept = ("metric", "scores", "queries", "candidates", "chance", "data", "facts", "left_out", "warnings")
        plain = asdict(self)
        return {"score": self.score, **{key: plain[key] for key in kept}}


class TaskFiles:
    """The tasks of a benchmark that are done, in its output folder.

    Args:
        output: The folder; made if it is not there.
        key: What the scores depend on besides a task's data: model fingerprint, settings, seeds. Plain values.
        partial: Whether a task counts as done from which something was left out.
    Raises:
        OutputError: If the folder cannot be made.
    """

    def __init__(self, output: Path, key: Mapping[str, Any], *, partial: bool = False) -> None:
        self.output, self.key, self.partial = Path(output), json.loads(json.dumps(key, sort_keys=True)), partial
        with writing(output):
            for name in ("tasks", "outcomes"):
                make_folder(self.output / name)

    def find(self, name: str, data: str) -> TaskResult | None:
        """A task that is done for this model, these settings and this data (fingerprint), without outcomes; or None."""
        file = self._file(name)
        if not file.is_file():
            return None
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            log.warning("%s is damaged; the task is done again", file)
            return None
        same = (found.get("format"), found.get("key"), found["result"]["data"]) == (FORMAT, self.key, data)
        return _result(found["result"]) if same and (self.partial or not found["result"].get("left_out")) else None

    def add(self, result: TaskResult) -> None:
        """Writes a task; its file appears whole, after its outcomes."""
        lines = (json.dumps(asdict(outcome), ensure_ascii=False) for outcome in result.outcomes)
        write_text(self.output / "outcomes" / f"{file_name(result.name)}.jsonl", "".join(line + "\n" for line in lines))
        lost = self.output / "left_out" / f"{file_name(result.name)}.jsonl"
        if result.broken:
            # ASCII, as a reason may quote half a character
            write_text(lost, "".join(json.dumps(asdict(one)) + "\n" for one in result.broken))
        else:
            lost.unlink(missing_ok=True)
        plain = asdict(result)
        del plain["outcomes"], plain["broken"]
        write_json(self._file(result.name), {"format": FORMAT, "key": self.key, "result": plain})

    def _file(self, name: str) -> Path:
        return self.output / "tasks" / f"{file_name(name)}.json"


def pixels_differ(used: str | None, trained: str | None) -> list[str]:
    """A warning if images are encoded in other sizes than the model was trained with, or nothing."""
    if not used or not trained or used in (trained, OWN_PIXELS):
        return []
    return [
        f"the model was trained on images of {trained} pixels and is scored on images of {used}; train with the limits "
        "of the evaluation (model.min_pixels, model.max_pixels), or score with the model's own"
    ]


def data_set_of(task: str) -> str:
    """The data set of a task of BEIR's format: "cqadupstack" of "cqadupstack/android"; most are one task themselves."""
    return task.partition("/")[0]


def mean_of(scores: Mapping[str, float], names: Sequence[str]) -> float | None:
    """The unweighted mean of the named tasks; None if one of them has no score."""
    if not names or any(name not in scores for name in names):
        return None
    return sum(scores[name] for name in names) / len(names)


def gate(score: float, chance: float | None, queries: int) -> list[str]:
    """A warning where a score (0 to 1) is not clearly above chance: three standard deviations of guessing."""
    if chance is None or score > above_guessing(chance, queries):
        return []
    return [f"the score of {score:.1%} is not above chance ({chance:.1%} with {queries} queries)"]


def above_guessing(share: float, n: int) -> float:
    """What n guesses with this chance of success stay below, nearly always: three standard deviations above it."""
    return share + 3 * (share * (1 - share) / max(1, n)) ** 0.5


def file_name(task: str) -> str:
    """The name of a task's files without their ending, of its own, so that no two tasks share one; 200 bytes at most.

    A space is a plus sign, other signs but ``-._~`` are escaped as in a query of a URL.
    """
    name = "".join(c if c.isalnum() else quote_plus(c, errors="surrogatepass") for c in task)
    if len(name.encode()) <= LONGEST_NAME:
        return name
    digest = hashlib.sha256(task.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    # "=" is in no other name
    return f"{name.encode()[: LONGEST_NAME - len(digest) - 1].decode(errors='ignore')}={digest}"


def _result(plain: Mapping[str, Any]) -> TaskResult:
    def shown(value: Mapping[str, Any]) -> Shown:
        return Shown(value["id"], value["text"], tuple(value["images"]))

    failures = tuple(
        Failure(f["margin"], shown(f["query"]), shown(f["right"]), tuple((shown(c), s) for c, s in f["found"]))
        for f in plain["failures"]
    )
    lists = {"candidates": tuple(plain["candidates"]), "warnings": tuple(plain["warnings"]), "failures": failures}
    return TaskResult(**{**plain, **lists})


Progress = Callable[[int, int], None]  # (done, total), of contents encoded
Run = Mapping[str, Sequence[tuple[str, float]]]  # query -> (candidate, score), best first


def write_trec_run(path: Path, run: Run, name: str) -> None:
    """Writes ``query Q0 candidate rank score name`` lines, ranks from 1; a ValueError if an id holds white space."""
    lines = []
    for query, found in run.items():
        for rank, (candidate, score) in enumerate(found, start=1):
            cells = (query, "Q0", candidate, str(rank), f"{score:.9g}", name)
            if any(len(cell.split()) != 1 for cell in cells):
                raise ValueError(f"an id or name with white space cannot be in a TREC run: {cells}")
            lines.append(" ".join(cells) + "\n")
    write_text(Path(path), "".join(lines))
