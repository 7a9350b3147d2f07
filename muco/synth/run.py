"""A whole run of ``muco synth``: checks, pass one, the estimate, pass two, and what is written at the end."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from muco.base.files import claimed, writing
from muco.base.terminal import progress_bar
from muco.synth.card import write_card, write_sheet
from muco.synth.catalogue import Catalogue, Kept
from muco.synth.endpoint import Endpoint
from muco.synth.limits import Budget, BudgetSpent
from muco.synth.pictures import WORKERS
from muco.synth.pipeline import Job, check, claim, kept_pictures, look, make, shard_sizes, unfinished
from muco.synth.prompts import Prompts
from muco.synth.shards import shard_files, write_whole
from muco.synth.workers import make_in_workers

FIRST = 64  # pictures after which a run says how long the rest will take
CHARACTERS = 4  # of a token, roughly
CAPTION_TOKENS, PAIRS_TOKENS = 200, 400  # of an answer, roughly
VISUAL_PIXELS = 28 * 28  # of a visual token in the Qwen-VL families; others are of that order

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Price:
    """Of a million tokens, in any currency."""

    read: float = 0.0
    written: float = 0.0


@dataclass(frozen=True)
class Need:
    """Requests and tokens of one model for the pictures that are left, where every first answer is good."""

    requests: int
    read: int
    written: int
    price: Price = Price()  # noqa: RUF009

    @property
    def cost(self) -> float:
        return (self.read * self.price.read + self.written * self.price.written) / 1e6

    def as_dict(self) -> dict[str, Any]:
        return {"requests": self.requests, "read": self.read, "written": self.written, "cost": round(self.cost, 2)}


def estimate(
    prompts: Prompts, pictures: int, pixels: float, prices: tuple[Price, Price] = (Price(), Price())
) -> dict[str, Need]:
    """What the models will be asked, from the lengths of the prompts and the usual ones of answers.

    Args:
        pixels: Mean of a picture as it is sent.
        prices: Of the captioner and the writer.
    """
    caption = len(prompts.filled(prompts.caption)) / CHARACTERS + pixels / VISUAL_PIXELS
    keys = sum(map(len, prompts.keys.values()))
    pairs = (len(prompts.filled(prompts.pairs)) + keys) / CHARACTERS + CAPTION_TOKENS
    return {
        "captioner": Need(pictures, round(caption * pictures), CAPTION_TOKENS * pictures, prices[0]),
        "writer": Need(pictures, round(pairs * pictures), PAIRS_TOKENS * pictures, prices[1]),
    }


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
    """Makes training data of the pictures of a source; an interrupted run resumes when it is called again.

    Args:
        budget: Of this run; with one process only.
        threads: That look at pictures in pass one, on each machine.
        workers: Processes of pass two.
        ray: Address of a Ray cluster for both passes; None: this machine.
        dry_run: Stop before pass two.
        say: Gets sentences for the user while the run is under way.
    Returns:
        ``pictures`` by what became of them, ``estimate`` (of each model, and ``seconds``), and after pass two
        ``shards``, ``finished`` of them, ``rows``, ``pairs``, ``kinds``, ``rejected``, ``unanswered`` pictures,
        ``stopped`` (why it ended early, or None), ``usage`` of both servers in this run, ``output``.
    Raises:
        MucoError: See pipeline.py; everything that was finished is kept.
    """
    with claimed(job.output):
        job, pace = asyncio.run(check(job))
        claim(job)
        with progress_bar("pictures") as progress:
            looked = look(job, workers=threads, ray=ray, progress=progress)
        with job.open_catalogue() as catalogue:
            parts = unfinished(job, catalogue.kept_count)
            left = sum(map(len, parts))
            needs = estimate(job.setting.prompts, left, _mean_pixels(job, catalogue, parts), prices)
            result: dict[str, Any] = {
                "pictures": looked,
                "estimate": {role: need.as_dict() for role, need in needs.items()},
            }
            result["estimate"]["seconds"] = round(pace * left, 1)
            say(f"{_told(looked, left, needs)}; at least {_duration(pace * left)} at the pace of a first question")
            if dry_run:
                return result
            making = _Making(left, say)
            if workers > 1 or ray is not None:
                later = _in_workers(job, catalogue, parts, making, workers, ray)
            else:
                later = asyncio.run(_here(job, catalogue, parts, making, budget or Budget()))
        shards = shard_files(job.shards)
        with writing(job.output, again=True):
            rows = write_whole(job.output, job.root, shards, job.facts())
            summary = write_card(job.output, shards, looked)
        if rows:
            write_sheet(job.output)
        found = summary.as_dict()
        return result | {
            "shards": -(-looked["kept"] // job.shard),
            "finished": len(shards),
            "rows": rows,
            **{key: found[key] for key in ("pairs", "kinds", "rejected")},
            "unanswered": later,
            "stopped": making.stopped,
            "usage": making.usage,
            "output": str(job.output),
        }


@dataclass
class _Making:
    """Pass two as the user follows it."""

    left: int
    say: Callable[[str], None]
    done: int = 0
    fresh: int = 0
    stopped: str | None = None
    usage: dict[str, dict[str, int]] = field(default_factory=dict)
    begun: float = field(default_factory=time.monotonic)
    move: Callable[[int, int], None] = lambda done, total: None

    def picture(self, fresh: bool) -> None:
        self.done += 1
        self.move(self.done, self.left)
        if not fresh:
            self.begun = time.monotonic()  # what an earlier run has paid for takes no time
            return
        self.fresh += 1
        if self.fresh == FIRST and self.done < self.left:
            seconds = (time.monotonic() - self.begun) / FIRST * (self.left - self.done)
            self.say(f"the first {FIRST} pictures are through; at this pace the rest takes {_duration(seconds)}")

    def shard(self, pictures: int, usage: dict[str, Any]) -> None:
        self.done += pictures
        self.move(self.done, self.left)
        self.use(usage)

    def use(self, usage: dict[str, Any]) -> None:
        for role, counts in usage.items():
            known = self.usage.setdefault(role, dict.fromkeys(counts, 0))
            self.usage[role] = {name: known[name] + count for name, count in counts.items()}


async def _here(job: Job, catalogue: Catalogue, parts: Sequence[range], making: _Making, budget: Budget) -> int:
    async with job.captioner.open(budget) as captioner, job.writer.open(budget) as writer:
        with progress_bar("turns") as move:
            making.move = move
            try:
                pictures = kept_pictures(catalogue, parts)
                return await make(job, pictures, shard_sizes(job, parts), captioner, writer, making.picture)
            except BudgetSpent as error:
                making.stopped = str(error)
                return 0
            finally:
                making.use(_usage(captioner, writer))


def _usage(captioner: Endpoint, writer: Endpoint) -> dict[str, dict[str, int]]:
    return {"captioner": captioner.usage.as_dict(), "writer": writer.usage.as_dict()}


def _in_workers(
    job: Job, catalogue: Catalogue, parts: Sequence[range], making: _Making, workers: int, ray: str | None
) -> int:
    shards: Any = (catalogue.kept(part.start, len(part)) for part in parts)
    with progress_bar("turns") as move:
        making.move = move
        return make_in_workers(job, shards, workers, ray, making.shard)


def _mean_pixels(job: Job, catalogue: Catalogue, parts: Sequence[range]) -> float:
    """Of the first pictures that are left, as they are sent."""
    some: list[Kept] = catalogue.kept(parts[0].start, FIRST) if parts else []
    pixels = [min(picture.width * picture.height, job.setting.max_pixels) for picture in some]
    return sum(pixels) / len(pixels) if pixels else 0.0


def _told(looked: dict[str, int], left: int, needs: dict[str, Need]) -> str:
    requests, read, written = (
        sum(getattr(need, name) for need in needs.values()) for name in ("requests", "read", "written")
    )
    cost = sum(need.cost for need in needs.values())
    priced = f", which costs {cost:,.2f}" if cost else ""
    return (
        f"{looked['kept']:,} of {looked['pictures']:,} pictures are kept, {left:,} of them not finished: about "
        f"{requests:,} requests, {read / 1e6:,.2f} M tokens read and {written / 1e6:,.2f} M written{priced}, and more "
        "where answers have to be asked for again"
    )


def _duration(seconds: float) -> str:
    for unit, length, most in (("s", 1, 120), ("min", 60, 120), ("h", 3600, 48)):
        if seconds < most * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds / 86400:.1f} days"
