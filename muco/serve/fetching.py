"""Images by URL: some are fetched at a time over all requests, and no more bytes are held than bodies may have."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace

from muco.base.fetch import fetch
from muco.errors import MucoError
from muco.serve.engine import Item
from muco.serve.guard import BODIES
from muco.serve.images import is_url
from muco.serve.schema import RequestError, RequestLimits

FETCHES = 8  # at once
OF_A_REQUEST = 4  # at once, so that one whose hosts are slow leaves threads for others


class Fetcher:
    """Puts bytes in the place of URLs."""

    def __init__(self, limits: RequestLimits) -> None:
        self.limits = limits
        self._held = 0  # bytes, of all requests together
        self._threads = ThreadPoolExecutor(FETCHES, "muco-fetch")

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    @asynccontextmanager
    async def fetched(self, items: Sequence[Item]) -> AsyncIterator[list[Item]]:
        """The items of a request with their images, whose bytes count as held until the block ends.

        Raises a RequestError if an image cannot be fetched, those of the request have more bytes than a body may have,
        or those of all requests more than the server holds.
        """
        loop, limits, most = asyncio.get_running_loop(), self.limits.image.fetch, self.limits.body_bytes
        own, turn = 0, asyncio.Semaphore(OF_A_REQUEST)

        async def one(item: Item, source: str | bytes) -> str | bytes:
            nonlocal own
            if limits is None or not isinstance(source, str) or not is_url(source):
                return source
            try:
                async with turn:
                    data = await loop.run_in_executor(self._threads, fetch, source, limits)
            except MucoError as error:
                raise RequestError(f"{item.where}: {error}", item.where) from None
            own, self._held = own + len(data), self._held + len(data)
            if own > most:
                raise RequestError(f"the images of the URLs have more than {most:,} bytes", status=413)
            if self._held > BODIES * most:
                raise RequestError("the server is busy; try again", status=503, code="busy")
            return data

        try:
            try:
                async with asyncio.TaskGroup() as group:  # the first error cancels the rest
                    tasks = [[group.create_task(one(item, source)) for source in item.pictures] for item in items]
            except ExceptionGroup as errors:
                raise errors.exceptions[0] from None
            found = (tuple(task.result() for task in of_item) for of_item in tasks)
            yield [_with(item, pictures) for item, pictures in zip(items, found, strict=True)]
        finally:
            self._held -= own


def _with(item: Item, pictures: tuple[str | bytes, ...]) -> Item:
    images = len(item.images)
    return replace(item, images=pictures[:images], video=pictures[images:])
