"""What a server offers, and the work that every route shares: items become vectors, within limits and time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from fastapi import FastAPI, Request

from muco.search.index import Index
from muco.serve.batcher import Batcher, BatchLimits, QueueFull, ShuttingDown
from muco.serve.engine import Embedded, Engine, Item
from muco.serve.fetching import Fetcher
from muco.serve.guard import ClientGone, Metrics
from muco.serve.look_ups import EXACT_LOOK_UPS, LOOK_UPS, LookUps
from muco.serve.process import ModelProcess
from muco.serve.reader import Reader
from muco.serve.schema import RequestError, RequestLimits

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Served:
    """What a server offers; see :class:`muco.serve.guard.Guard` for ``token`` and ``hosts``."""

    engine: Engine | ModelProcess
    name: str  # of the model, as clients call it
    limits: RequestLimits = field(default_factory=RequestLimits)
    batches: BatchLimits = field(default_factory=BatchLimits)
    dimensions: tuple[int, ...] = ()  # to which vectors may be cut, besides their whole length
    index: Index | None = None  # None: there is no search
    instructions: Mapping[str, str] = field(default_factory=dict)  # by input_type
    token: str | None = None
    hosts: frozenset[str] | None = None
    origins: tuple[str, ...] = ()  # of pages elsewhere whose scripts may ask: "https://example.com"; "*": of any page


class Service:
    """A server at work; every route finds it by :func:`service_of`."""

    def __init__(self, served: Served) -> None:
        self.served, self.started = served, int(time.time())
        self.reader = Reader(served.limits, served.instructions)
        self.batcher: Batcher[Item, Any, Embedded] = Batcher(
            served.engine.prepare, served.engine.run, served.batches, observe=lambda *sizes: self.metrics.batch(*sizes)
        )
        self.metrics = Metrics(lambda: self.batcher.unfinished)
        self.fetcher = Fetcher(served.limits)
        waiting = served.batches.queue
        self.look_ups, self.exact = LookUps(LOOK_UPS, waiting), LookUps(EXACT_LOOK_UPS, waiting)

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        await self.batcher.start()
        try:
            yield
        finally:
            await self.batcher.close()
            self.fetcher.close()
            self.look_ups.close()
            self.exact.close()

    async def embedded(self, items: Sequence[Item]) -> list[Embedded]:
        try:
            async with self.fetcher.fetched(items) as ready:
                results = await self.batcher.submit(ready)
        except QueueFull:
            raise RequestError("too many requests wait; try again", status=503, code="queue_full") from None
        except ShuttingDown:
            raise RequestError("the server is shutting down", status=503, code="shutting_down") from None
        self.metrics.vectors.inc(sum(len(result.vectors) for result in results))
        for kind, count in usage(results).items():
            self.metrics.tokens.labels(kind).inc(count)
        return results

    async def looked_up(self, look_up: Callable[[], Answer], *, exact: bool = False) -> Answer:
        """The result of a search in the index, in a thread of its own kind."""
        return await (self.exact if exact else self.look_ups).result(look_up)

    async def answered(self, request: Request, work: Awaitable[Answer]) -> Answer:
        """The result of the work, which is cancelled when the client hangs up or the time is over."""
        task = asyncio.ensure_future(work)
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait({task, gone}, timeout=self.served.limits.seconds, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            if gone.done():
                raise ClientGone
            seconds = self.served.limits.seconds
            raise RequestError(f"not answered within {seconds:g} s; try again", status=503, code="timeout")
        finally:
            for each in (task, gone):
                each.cancel()
            await asyncio.gather(task, gone, return_exceptions=True)

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.served.name:
            message = f"unknown model; this server has {self.served.name!r}"
            raise RequestError(message, "model", status=404, code="model_not_found")

    def dimension(self, asked: int | None, param: str) -> int:
        full = self.served.engine.dimension
        if asked is None or asked == full:
            return full
        if asked in self.served.dimensions:
            return asked
        accepted = ", ".join(map(str, sorted({*self.served.dimensions, full})))
        why = f"the model's vectors have {full} dimensions; it was not trained for fewer"
        raise RequestError(f"the model was trained for {accepted}" if self.served.dimensions else why, param)


def service_of(request: Request) -> Service:
    """The service of the application that got the request."""
    return request.app.state.service


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        continue


def usage(results: Sequence[Embedded]) -> dict[str, int]:
    """Tokens of texts and of images."""
    images = sum(result.image_tokens for result in results)
    return {"text": sum(result.tokens for result in results) - images, "image": images}


def shortened(results: Sequence[Embedded], dimension: int) -> np.ndarray:
    """All vectors, float32 [n, dimension], of length 1."""
    vectors = np.concatenate([result.vectors for result in results])
    if dimension == vectors.shape[1]:
        return vectors
    cut = vectors[:, :dimension]
    return cut / np.maximum(np.linalg.norm(cut, axis=1, keepdims=True), 1e-12)
