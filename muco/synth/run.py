"""A whole run of ``muco synth``: checks, pass one, the estimate, pass two, and what is written at the end."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import Any

from muco.base.files import claimed, writing
from muco.base.terminal import progress_bar
from muco.errors import MucoError
from muco.synth.catalogue import Kept
from muco.synth.chat import Budget, BudgetSpent
from muco.synth.flow import by_daft
from muco.synth.pictures import WORKERS
from muco.synth.pipeline import Job, Server, check, claim, look, make, unfinished
from muco.synth.prompts import Prompts
from muco.synth.shards import shard_files, write_whole

STOP = "stop"  # a file that exists after a worker's error: the others then begin no new shard
FIRST = 64  # pictures after which a run says how long the rest will take
SHEET = 60  # pictures on the contact sheet
CHARACTERS = 4  # per token, roughly
CAPTION_TOKENS, PAIRS_TOKENS = 200, 400  # per answer, roughly
VISUAL_PIXELS = 28 * 28  # per visual token in the Qwen-VL families; others are similar

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Price:
    """Per million tokens, in any currency."""

    read: float = 0.0
    written: float = 0.0


@dataclass(frozen=True)
class Need:
    """Requests and tokens of one model for the remaining pictures if every first answer is good."""

    requests: int
    read: int
    written: int
    cost: float


def estimate(
    prompts: Prompts, pictures: int, pixels: float, prices: tuple[Price, Price] = (Price(), Price())
) -> dict[str, Need]:
    """The needs of both models, from the lengths of the prompts and typical lengths of answers.

    ``pixels``: mean per picture as sent; ``prices``: of the captioner and the writer.
    """
    caption = len(prompts.filled(prompts.caption)) / CHARACTERS + pixels / VISUAL_PIXELS
    keys = sum(map(len, prompts.keys.values()))
    pairs = (len(prompts.filled(prompts.pairs)) + keys) / CHARACTERS + CAPTION_TOKENS

    def need(read: float, written: int, price: Price) -> Need:
        tokens = round(read * pictures), written * pictures
        return Need(pictures, *tokens, (tokens[0] * price.read + tokens[1] * price.written) / 1e6)

    return {"captioner": need(caption, CAPTION_TOKENS, prices[0]), "writer": need(pairs, PAIRS_TOKENS, prices[1])}


def synth(
    job: Job,
    *,
    budget: Budget | None = None,
    prices: tuple[Price, Price] = (Price(), Price()),
    threads: int = WORKERS,
    workers: int = 1,
    ray: str | None = None,
    dry_run: bool = False,
    say: Callable[[str], None] = log.info,
) -> dict[str, Any]:
    """Makes training data from the pictures of a source; call it again to resume an interrupted run.

    Args:
        budget: Of this run; only with one process.
        threads: Threads that look at pictures in pass one, on each machine.
        workers: Processes of pass two.
        ray: Address of a Ray cluster for both passes; None: this machine.
        say: Receives messages for the user during the run.
    Returns:
        ``pictures`` by outcome, ``estimate`` (of each model, and ``seconds``), and after pass two ``shards``,
        ``finished`` of them, ``rows``, ``pairs``, ``kinds``, ``rejected``, ``unanswered`` pictures, ``stopped`` (why
        it ended early, or None), ``usage`` of both servers in this run, ``output``.
    Raises:
        MucoError: See pipeline.py; everything finished is kept.
    """
    with claimed(job.output):
        job, pace = asyncio.run(check(job))
        claim(job)
        with progress_bar("pictures") as progress:
            looked = look(job, workers=threads, ray=ray, progress=progress)
        with job.open_catalogue() as catalogue:
            parts = unfinished(job, catalogue.kept_count)
            left = sum(map(len, parts))
            some = catalogue.kept(parts[0].start, FIRST) if parts else []
            pixels = [min(picture.width * picture.height, job.setting.max_pixels) for picture in some]
            needs = estimate(job.setting.prompts, left, sum(pixels) / max(1, len(pixels)), prices)
            rounded = {role: vars(need) | {"cost": round(need.cost, 2)} for role, need in needs.items()}
            result = {"pictures": looked, "estimate": {**rounded, "seconds": round(pace * left, 1)}}
            rows = [vars(need).values() for need in needs.values()]
            requests, read, written, cost = map(sum, zip(*rows, strict=True))
            priced = f", which costs {cost:,.2f}" if cost else ""
            say(
                f"{looked['kept']:,} of {looked['pictures']:,} pictures are kept, {left:,} of them not finished: about "
                f"{requests:,} requests, {read / 1e6:,.2f} M tokens read and {written / 1e6:,.2f} M written{priced}, "
                "and more where answers have to be asked for again; at least "
                f"{_duration(pace * left)} at the pace of a first question"
            )
            if dry_run:
                return result
            shards_left = (catalogue.kept(part.start, len(part)) for part in parts)
            with progress_bar("turns") as move:
                making, stopped = _Making(left, say, move), None
                if workers > 1 or ray is not None:
                    later = make_in_workers(job, shards_left, workers, ray, making.shard)
                else:
                    later, stopped, usage = asyncio.run(_made(job, shards_left, budget or Budget(), making.picture))
                    making.shard(0, usage)
        shards = shard_files(job.shards)
        with writing(job.output, again=True):
            found = write_whole(job.output, job.root, shards, job.facts(), looked)
        if found.pictures:
            from muco.data.show import show

            show(job.output / "train.jsonl", job.output / "sheet.html", limit=SHEET)
        return result | {
            "shards": -(-looked["kept"] // job.shard),
            "finished": len(shards),
            "rows": found.pictures,
            "pairs": found.pairs,
            "kinds": {kind: words.total() for kind, words in found.questions.items()},
            "rejected": [{"what": w, "reason": r, "count": n} for (w, r), n in found.rejected.most_common()],
            "unanswered": later,
            "stopped": stopped,
            "usage": {role: dict(counts) for role, counts in making.usage.items()},
            "output": str(job.output),
        }


@dataclass
class _Making:
    """The progress of pass two."""

    left: int
    say: Callable[[str], None]
    move: Callable[[int, int], None]
    done: int = 0
    fresh: int = 0
    usage: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    begun: float = field(default_factory=time.monotonic)

    def picture(self, fresh: bool) -> None:
        self.done += 1
        self.move(self.done, self.left)
        if not fresh:
            self.begun = time.monotonic()  # answers of an earlier run take no time
            return
        self.fresh += 1
        if self.fresh == FIRST and self.done < self.left:
            seconds = (time.monotonic() - self.begun) / FIRST * (self.left - self.done)
            self.say(f"the first {FIRST} pictures are through; at this pace the rest takes {_duration(seconds)}")

    def shard(self, pictures: int, usage: Mapping[str, Mapping[str, int]]) -> None:
        self.done += pictures
        self.move(self.done, self.left)
        for role, counts in usage.items():
            self.usage[role].update(counts)


async def _made(
    job: Job,
    shards: Iterable[Sequence[Kept]],
    budget: Budget | None = None,
    done: Callable[[bool], None] = lambda fresh: None,
) -> tuple[int, str | None, dict[str, dict[str, int]]]:
    """Pass two: pictures left for later, why it stopped early (or None), and the usage of both models."""
    later, stopped = 0, None
    async with job.captioner.open(budget) as captioner, job.writer.open(budget) as writer:
        try:
            later = await make(job, shards, captioner, writer, done)
        except BudgetSpent as error:
            stopped = str(error)
    return later, stopped, {"captioner": asdict(captioner.usage), "writer": asdict(writer.usage)}


def _duration(seconds: float) -> str:
    for unit, length, most in (("s", 1, 120), ("min", 60, 120), ("h", 3600, 48)):
        if seconds < most * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds / 86400:.1f} days"


def make_in_workers(
    job: Job, shards: Iterator[list[Kept]], workers: int, ray: str | None, done: Callable[[int, Any], None]
) -> int:
    """Pass two in ``workers`` processes, on this machine or a Ray cluster: each makes whole shards, by Daft.

    Workers read pictures, ask models and write shards in folders that all machines see, and share the limits of the
    servers. ``done`` is called after each shard with its number of pictures and the usage of its worker. Returns the
    number of pictures left for later; a MucoError has the message of the first worker that failed.
    """
    share = replace(job, captioner=_share(job.captioner, workers), writer=_share(job.writer, workers))

    def work(shards: list[Any]) -> list[Any]:
        return [_made_shard(share, pictures) for pictures in shards]

    query = by_daft(work, 1, ray, use_process=True, max_concurrency=workers)
    later, failed, stop = 0, "", job.output / STOP
    stop.unlink(missing_ok=True)
    while group := list(islice(shards, 4 * workers)):
        for error, pictures, unanswered, usage in query([asdict(kept) for kept in shard] for shard in group):
            later += unanswered
            done(pictures, usage)
            if error and not failed:
                failed = error
                stop.touch()
        if failed:  # not before: ending a query of Daft early ends the whole process
            stop.unlink()
            raise MucoError(failed)
    return later


def _made_shard(job: Job, pictures: list[dict[str, Any]]) -> tuple[str, int, int, dict[str, Any]]:
    """Runs in a worker: an error that stops the run or "", pictures done, pictures left for later, and usage."""
    if (job.output / STOP).exists():
        return "", 0, 0, {}
    try:
        later, _, usage = asyncio.run(_made(job, [[Kept(**values) for values in pictures]]))
    except MucoError as error:  # raised in another process, Daft would bury it in a message of its own
        return str(error), len(pictures), 0, {}
    return "", len(pictures), later, usage


def _share(server: Server, workers: int) -> Server:
    limits = server.limits
    pace = limits.requests_per_minute and limits.requests_per_minute / workers
    at_once = max(1, limits.concurrency // workers)
    return replace(server, limits=replace(limits, concurrency=at_once, requests_per_minute=pace))
