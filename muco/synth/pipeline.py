"""``muco synth``: from pictures to multi-turn training data, in two passes that both resume where they stopped.

::

    pictures ─▶ look at each once ─▶ catalogue.py: which are kept                          pass one, no model
    kept pictures ─▶ caption ─▶ pairs (writing.py) ─▶ shards.py, as soon as one is whole   pass two, asks the models
    shards ─▶ M3T.parquet, train.jsonl, README.md, sheet.html                              shards.py

    <output>/synth.json       the arguments, which must be the same in later runs into this folder
             pictures.db      pass one
             images/          pictures from URLs or tar files
             answers/         the models' answers for unfinished shards
             shards/          finished shards

Between the passes the number of pictures is known, so requests and tokens are estimated before they are spent.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from muco.base.files import is_empty, read_json, write_json, writing
from muco.base.machine import VERSION
from muco.errors import DataError, OutputError
from muco.synth.catalogue import Catalogue, Kept, fill
from muco.synth.chat import KEY_VARIABLE, Budget, BudgetSpent, Limits
from muco.synth.endpoint import Endpoint
from muco.synth.flow import in_order
from muco.synth.pictures import WORKERS, Filter
from muco.synth.shards import shard_file, write_shard
from muco.synth.sources import Source
from muco.synth.writing import PAIRS_SCHEMA, Answers, Made, Setting, make_turns

SHARD = 1000  # pictures
FIXED = ("prompt", "captioner", "writer", "filter", "setting", "shard")  # facts that later runs must share


@dataclass(frozen=True)
class Server:
    """The arguments of a :class:`muco.synth.endpoint.Endpoint`, which :func:`check` completes."""

    url: str
    model: str
    sampling: Mapping[str, Any] = field(default_factory=dict)
    limits: Limits = Limits()  # noqa: RUF009
    key_variable: str = KEY_VARIABLE
    structured: bool = True

    def open(self, budget: Budget | None = None) -> Endpoint:
        return Endpoint(budget=budget, **vars(self))


@dataclass(frozen=True)
class Job:
    """Everything that the turns depend on, and the output folder; ``shard`` is the number of pictures in one."""

    source: Source
    output: Path
    captioner: Server
    writer: Server
    filter: Filter = Filter()  # noqa: RUF009
    setting: Setting = Setting()  # noqa: RUF009
    shard: int = SHARD

    @property
    def root(self) -> Path:
        """The folder that the pictures' files are relative to."""
        return self.source.root or self.output / "images"

    @property
    def shards(self) -> Path:
        return self.output / "shards"

    def facts(self) -> dict[str, Any]:
        """The content of ``synth.json`` and of the metadata of every shard."""
        return {
            "prompt": self.setting.prompts.name,
            "captioner": {"model": self.captioner.model, "sampling": dict(self.captioner.sampling)},
            "writer": {"model": self.writer.model, "sampling": dict(self.writer.sampling)},
            "filter": asdict(self.filter),
            "setting": {name: getattr(self.setting, name) for name in ("attempts", "min_turns", "max_pixels")},
            "shard": self.shard,
            "source": str(self.source.path),
            "muco": VERSION,
        }

    def open_catalogue(self) -> Catalogue:
        return Catalogue(self.output / "pictures.db", self.source.fingerprint, self.filter)


async def check(job: Job) -> tuple[Job, float]:
    """Asks both servers a first question; EndpointError if one cannot be reached or lacks the model.

    Returns:
        The job with the names of the models and their support of schemas, and the seconds per picture of the slower
        server at the pace of this question and the highest concurrency and rate allowed.
    """
    async with job.captioner.open() as captioner, job.writer.open() as writer:
        begun = time.monotonic()
        await captioner.check(image=True)
        seen = time.monotonic()
        await writer.check(schema=PAIRS_SCHEMA)
        taken = ((job.captioner.limits, seen - begun), (job.writer.limits, time.monotonic() - seen))
    paces = [seconds / limits.concurrency for limits, seconds in taken]
    paces += [60 / limits.requests_per_minute for limits, _ in taken if limits.requests_per_minute]
    models = replace(job.captioner, model=captioner.model), replace(job.writer, model=writer.model)
    return replace(job, captioner=models[0], writer=replace(models[1], structured=writer.structured)), max(paces)


def claim(job: Job) -> None:
    """Writes the arguments to the output folder; OutputError if it holds others, or anything else."""
    file, facts = job.output / "synth.json", job.facts()
    if file.is_file():
        known = read_json(file)
        if differing := [key for key in FIXED if known.get(key) != facts[key]]:
            key = differing[0]
            raise OutputError(
                f"{job.output}: was begun with {key} {known.get(key)!r}, not {facts[key]!r}; pass the same again, or "
                "name another output folder"
            )
        return
    if job.output.exists() and (not job.output.is_dir() or not is_empty(job.output)):
        raise OutputError(f"{job.output}: is not empty and was not made by muco synth; name another output folder")
    job.output.mkdir(parents=True, exist_ok=True)
    write_json(file, facts)


def look(
    job: Job, *, workers: int = WORKERS, ray: str | None = None, progress: Callable[[int, int | None], None]
) -> dict[str, int]:
    """Pass one, see :func:`muco.synth.catalogue.fill`; returns the catalogue's counts, DataError if nothing is kept."""
    store = None if job.source.root else job.root
    with job.open_catalogue() as catalogue:
        fill(catalogue, job.source, job.filter, store, workers=workers, ray=ray, progress=progress)
        counts = catalogue.counts()
    if not counts["kept"]:
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in counts.items() if reason not in ("pictures", "kept"))
        raise DataError(
            f"{job.source.path}: none of the {counts['pictures']:,} pictures is kept ({reasons}); see --min-side, "
            "--max-aspect and --near"
        )
    return counts


def unfinished(job: Job, kept: int) -> list[range]:
    """The places among the ``kept`` pictures of every shard that does not exist yet."""
    places = [range(start, min(kept, start + job.shard)) for start in range(0, kept, job.shard)]
    return [part for number, part in enumerate(places) if not shard_file(job.shards, number).exists()]


@dataclass
class _Shard:
    """A shard under way."""

    size: int
    answers: Answers
    made: list[Made] = field(default_factory=list)


async def make(
    job: Job,
    shards: Iterable[Sequence[Kept]],
    captioner: Endpoint,
    writer: Endpoint,
    done: Callable[[bool], None] = lambda fresh: None,
) -> int:
    """Makes the turns of pictures and writes each shard when all its pictures are done.

    Args:
        shards: The pictures of each, in order, so that few shards are under way at a time.
        done: Called after each picture with whether a model was asked about it in this run.
    Returns:
        The number of pictures that a server did not answer for now; their shards are left for a later run.
    Raises:
        BudgetSpent, EndpointError: See endpoint.py; answers are kept.
    """
    under_way: dict[int, _Shard] = {}
    later = 0

    def pictures() -> Iterator[Kept]:
        for shard in shards:
            number = shard[0].place // job.shard
            under_way[number] = _Shard(len(shard), Answers(job.output / "answers" / f"{number:05}.jsonl"))
            yield from shard

    async def work(picture: Kept) -> Made:
        answers = under_way[picture.place // job.shard].answers
        fresh = answers.find((picture.digest, "caption", 0)) is None
        made = await make_turns(picture, job.root, captioner, writer, job.setting, answers)
        done(fresh)
        return made

    ahead = 2 * (captioner.limits.concurrency + writer.limits.concurrency)
    try:
        async with aclosing(in_order(pictures(), work, ahead=ahead)) as results:
            async for made in results:
                number = made.picture.place // job.shard
                shard = under_way[number]
                shard.made.append(made)
                if len(shard.made) == shard.size:
                    later += await asyncio.to_thread(_finish, job, number, under_way.pop(number))
    except BudgetSpent:
        for shard in under_way.values():
            shard.answers.settle()
        raise
    finally:
        for shard in under_way.values():
            shard.answers.close()
    return later


def _finish(job: Job, number: int, shard: _Shard) -> int:
    """Writes a shard, unless some of its pictures are left for later; returns their number."""
    later = sum(made.later for made in shard.made)
    if later:
        shard.answers.settle()
    else:
        with writing(job.shards, again=True):
            write_shard(job.shards, number, shard.made, job.facts())
    shard.answers.close(delete=not later)
    return later
