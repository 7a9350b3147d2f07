"""Searches in the index: some run at a time, some wait, and more are refused."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from muco.serve.schema import RequestError

Answer = TypeVar("Answer")
LOOK_UPS = 8  # at once: a look-up ends only when it is done, whether its client waits or not
EXACT_LOOK_UPS = 1  # at once, besides: they compare every row, and in a large index would soon have all threads


class LookUps:
    """Threads for the searches of one kind."""

    def __init__(self, at_once: int, waiting: int) -> None:
        self._threads = ThreadPoolExecutor(at_once, "muco-look-up")
        self._room = threading.Semaphore(at_once + waiting)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def result(self, look_up: Callable[[], Answer]) -> Answer:
        """The result of a search. Cancelled while it waits, it leaves the queue; while it runs, it runs to its end.

        Raises a RequestError if too many wait.
        """
        if not self._room.acquire(blocking=False):
            raise RequestError("too many searches wait; try again", status=503, code="queue_full")
        future = self._threads.submit(look_up)
        future.add_done_callback(lambda _: self._room.release())
        return await asyncio.wrap_future(future)
