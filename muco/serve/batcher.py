"""Requests that arrive together share a forward pass; each gets its own result, or its own error.

::

    submit ─▶ waiting ─prepare, in threads─▶ ready ─run, in one thread─▶ results
              (``queue`` limits both)            (at most two batches)

Requests take turns, in both queues: a pass takes one item of each request, then a second one of each, and so on, while
there is room and time. Time is short where a pass takes several items of a request: it would not hold up the others
for the sake of one. Light items, texts, and others, with images, have passes of their own, which take turns. So a short
request is in the next pass of its kind, which begins soon, however many items the others have. Nor do their items keep
it out: of each request no more count against the limit than the new one has itself.

Nothing here knows of models or HTTP: what is prepared has ``tokens``, and ``run`` returns one result per prepared item.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any, Generic, Protocol, TypeVar

PACE = 1e-4  # seconds of a token, until a pass has shown how long they take
LIGHT = 16  # items without images that one thread prepares at once: a thread per short text costs more than the text


class HasLight(Protocol):
    """What is submitted."""

    @property
    def light(self) -> bool:
        """Whether it is cheap to prepare."""


Given = TypeVar("Given", bound=HasLight)
Ready = TypeVar("Ready")  # has ``tokens``
Result = TypeVar("Result")


class QueueFull(Exception):
    """No more items may wait; come back later."""


class ShuttingDown(Exception):
    """What was accepted is finished, nothing new is accepted."""


@dataclass(frozen=True)
class BatchLimits:
    """How requests are put together.

    Args:
        queue: Items accepted and not yet finished, where of each request no more count than the newest one has. (In
            all they are at most queue × (1 + ln queue): the second largest request has half of it at most, and so on.)
    """

    tokens: int = 8192  # of one forward pass, padding included; a longer item passes alone
    milliseconds: float = 5.0  # that a ready item waits for others while the model is idle
    share_milliseconds: float = 30.0  # that a pass may take, as far as is known, to have several items of a request
    queue: int = 512


@dataclass(eq=False)
class _Job:
    given: Any
    request: object  # the same one for all jobs of a call
    future: asyncio.Future[Any]
    light: bool  # asked once, by the caller: an exception is the caller's own, and no task dies of it
    prepared: Any = None
    ready_at: float = 0.0


class _Queue:
    """Jobs by request, so that requests can take turns. Any job can leave."""

    def __init__(self) -> None:
        self._requests: dict[object, dict[_Job, None]] = {}
        self._led: object = None  # the request whose jobs were taken first the last time

    def __len__(self) -> int:
        return sum(map(len, self._requests.values()))

    def __iter__(self) -> Iterator[_Job]:
        return chain.from_iterable(self._requests.values())

    def __contains__(self, request: object) -> bool:
        return request in self._requests

    def add(self, job: _Job) -> None:
        self._requests.setdefault(job.request, {})[job] = None

    def discard(self, job: _Job) -> None:
        if (rest := self._requests.get(job.request)) is not None:
            rest.pop(job, None)
            if not rest:
                del self._requests[job.request]

    def in_turn(self) -> Iterator[_Job]:
        """The jobs, request by request; the request that led comes last."""
        if self._led in self._requests:
            self._requests[self._led] = self._requests.pop(self._led)
        return iter(self)

    def in_rounds(self, light: bool) -> Iterator[tuple[int, _Job]]:
        """The jobs that are light, or those that are not, by rounds, each of one such job of every request, with the
        number of the round; the order is that of :meth:`in_turn`.
        """
        self.in_turn()
        own = ([job for job in jobs if job.light == light] for jobs in self._requests.values())
        for number, jobs in enumerate(zip_longest(*own)):
            yield from ((number, job) for job in jobs if job is not None)

    def take(self, jobs: Sequence[_Job]) -> None:
        """Removes jobs that come from :meth:`in_turn`."""
        self._led = jobs[0].request if jobs else self._led
        for job in jobs:
            self.discard(job)


class _Pace:
    """How long passes take by their padded tokens, for those with an image and those without."""

    def __init__(self) -> None:
        self._seconds: dict[bool, float] = {}  # of a token, by whether all items are light

    def learn(self, light: bool, tokens: int, seconds: float) -> None:
        found, before = seconds / max(1, tokens), self._seconds.get(light)
        self._seconds[light] = found if before is None else 0.7 * before + 0.3 * found

    def seconds(self, light: bool, tokens: int) -> float:
        """Of a pass."""
        return self._seconds.get(light, PACE) * tokens


class Batcher(Generic[Given, Ready, Result]):
    """Makes batches of what is submitted.

    Args:
        prepare: Turns one item into what ``run`` takes; its exception is the item's own. Called in threads.
        run: Results of several prepared items, in their order. Called in one thread. Where it fails for a batch, each
            item is tried alone, so that only the one that cannot be computed fails.
        observe: Called after each batch with its items and padded tokens.
    """

    def __init__(
        self,
        prepare: Callable[[Given], Ready],
        run: Callable[[Sequence[Ready]], Sequence[Result]],
        limits: BatchLimits = BatchLimits(),
        *,
        observe: Callable[[int, int], None] = lambda items, tokens: None,
    ) -> None:
        self.limits = limits
        self._prepare, self._run, self._observe = prepare, run, observe
        self._waiting, self._ready, self._pace = _Queue(), _Queue(), _Pace()
        self._unfinished: Counter[object] = Counter()  # items by request
        self._closing, self._light = False, False  # whether the items of the last pass were light
        self._changed = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._threads: list[ThreadPoolExecutor] = []

    @property
    def unfinished(self) -> int:
        """Items accepted and not yet answered."""
        return self._unfinished.total()

    async def start(self) -> None:
        workers = max(2, min(4, (os.cpu_count() or 2) - 1))  # two: a text does not wait for a picture to be decoded
        prepare, run = ThreadPoolExecutor(workers, "muco-prepare"), ThreadPoolExecutor(1, "muco-model")
        self._threads = [prepare, run]
        self._tasks = [asyncio.create_task(self._prepare_all(prepare)) for _ in range(workers)]
        self._tasks.append(asyncio.create_task(self._run_all(run)))

    async def close(self) -> None:
        """Finishes what was accepted, accepts nothing more, and ends."""
        self._closing = True
        while self._unfinished:
            await self._next_change()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for threads in self._threads:
            threads.shutdown()

    async def submit(self, items: Sequence[Given]) -> list[Result]:
        """The results of the items in their order. If the caller is cancelled, its items leave the queue.

        Raises:
            QueueFull: If there is no room for all of them; none is accepted then.
            ShuttingDown: After :meth:`close`.
            Exception: What ``prepare`` or ``run`` raised for one of the items; the others of this call are dropped.
        """
        if self._closing:
            raise ShuttingDown
        if len(items) + sum(min(own, len(items)) for own in self._unfinished.values()) > self.limits.queue:
            raise QueueFull
        loop = asyncio.get_running_loop()
        request = object()
        jobs = [_Job(item, request, loop.create_future(), item.light) for item in items]
        for job in jobs:
            self._unfinished[request] += 1
            job.future.add_done_callback(lambda _, job=job: self._forget(job))
            self._waiting.add(job)
        self._changed.set()
        try:
            return await asyncio.gather(*(job.future for job in jobs))
        finally:
            for job in jobs:
                job.future.cancel()

    def _forget(self, job: _Job) -> None:
        self._unfinished[job.request] -= 1
        if not self._unfinished[job.request]:
            del self._unfinished[job.request]
        self._waiting.discard(job)
        self._ready.discard(job)
        self._changed.set()

    async def _next_change(self, seconds: float | None = None) -> None:
        # The event is cleared by whoever waits; all waiters of this moment have already been woken then.
        self._changed.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()

    async def _prepare_all(self, threads: ThreadPoolExecutor) -> None:
        loop = asyncio.get_running_loop()
        while True:
            while not (jobs := self._next_to_prepare()):
                await self._next_change()
            outcomes = await loop.run_in_executor(threads, _attempt_all, self._prepare, [job.given for job in jobs])
            for job, prepared in _good(jobs, outcomes):
                job.prepared, job.ready_at = prepared, loop.time()
                self._ready.add(job)
            self._changed.set()

    def _next_to_prepare(self) -> list[_Job]:
        """One item, or some light ones; those of a request that has nothing ready first.

        While two batches are ready, only of a request that has nothing ready, so that it is in the next pass; while two
        batches with images are, no image, because prepared images are large.
        """
        full = self._padded(self._ready) >= 2 * self.limits.tokens
        no_image = self._padded([job for job in self._ready if not job.light]) >= 2 * self.limits.tokens
        jobs: list[_Job] = []
        for job in sorted(self._waiting.in_turn(), key=lambda job: job.request in self._ready):
            if (full and job.request in self._ready) or (no_image and not job.light):
                continue
            if jobs and not (job.light and jobs[0].light and len(jobs) < LIGHT):
                break
            jobs.append(job)
        self._waiting.take(jobs)
        return jobs

    async def _run_all(self, thread: ThreadPoolExecutor) -> None:
        loop = asyncio.get_running_loop()
        while True:
            while not self._ready:
                await self._next_change()
            until = min(job.ready_at for job in self._ready) + self.limits.milliseconds / 1000
            while self._ready and (remaining := until - loop.time()) > 0:
                if self._padded(self._ready) >= self.limits.tokens:
                    break
                await self._next_change(remaining)
            if not (jobs := self._next_batch()):
                continue
            self._changed.set()  # there is room for the next to be prepared
            prepared, tokens, begun = [job.prepared for job in jobs], self._padded(jobs), loop.time()
            outcomes = await loop.run_in_executor(thread, self._results, prepared)
            self._pace.learn(self._light, tokens, loop.time() - begun)
            self._observe(len(jobs), tokens)
            for job, result in _good(jobs, outcomes):
                job.future.set_result(result)

    def _next_batch(self) -> list[_Job]:
        """Ready items that fit together, one of each request first; at least one.

        All are light or none is, so that a text does not wait for the pictures of its own pass; if there are both, the
        passes take turns.
        """
        jobs: list[_Job] = []
        kinds, longest = {job.light for job in self._ready}, 0
        if kinds:
            self._light = not self._light if len(kinds) > 1 else kinds.pop()
        for number, job in self._ready.in_rounds(self._light):
            longest = max(longest, job.prepared.tokens)
            tokens = longest * (len(jobs) + 1)
            if jobs and tokens > self.limits.tokens:
                break
            if number and self._pace.seconds(self._light, tokens) > self.limits.share_milliseconds / 1000:
                break
            jobs.append(job)
        self._ready.take(jobs)
        return jobs

    def _results(self, prepared: Sequence[Ready]) -> Sequence[Result | Exception]:
        try:
            return self._run(prepared)
        except Exception as error:
            if len(prepared) == 1:
                return [error]
        return _attempt_all(lambda item: self._run([item])[0], prepared)

    @staticmethod
    def _padded(jobs: Any) -> int:
        return len(jobs) * max((job.prepared.tokens for job in jobs), default=0)


def _good(jobs: Sequence[_Job], outcomes: Sequence[Any]) -> Iterator[tuple[_Job, Any]]:
    """Jobs that went well, with what came out. The others fail here; cancelled ones are left out."""
    for job, outcome in zip(jobs, outcomes, strict=True):
        if job.future.done():  # cancelled meanwhile
            continue
        if isinstance(outcome, Exception):
            job.future.set_exception(outcome)
        else:
            yield job, outcome


def _attempt_all(action: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """For each item the result, or the exception as a value: only outside the thread is it known whose it is."""
    outcomes: list[Any] = []
    for item in items:
        try:
            outcomes.append(action(item))
        except Exception as error:
            outcomes.append(error)
    return outcomes
