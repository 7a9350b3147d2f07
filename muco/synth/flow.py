"""Many pieces of work under way at once, results in order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from muco.synth.limits import BudgetSpent

Item = TypeVar("Item")
Result = TypeVar("Result")

_END: Any = object()


async def in_order(
    items: Iterator[Item], work: Callable[[Item], Coroutine[Any, Any, Result]], *, ahead: int
) -> AsyncIterator[Result]:
    """Yields the result of the work on every item, in the order of the items.

    Args:
        items: Drawn on a thread of their own, so that they may take their time.
        ahead: Items that may be drawn and not yet yielded. This bounds memory; a slow piece of work holds up the others
            only when they are this far ahead of it.
    Raises:
        BudgetSpent: If a piece of work did; what was under way is brought to its end first.
        Exception: The first one of any piece of work, or of ``items``; what is under way is cancelled.
    """
    window: asyncio.Queue[Any] = asyncio.Queue()
    room, tasks = asyncio.Semaphore(ahead), set[asyncio.Task[Result]]()
    failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def finished(task: asyncio.Task[Result]) -> None:
        tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, BudgetSpent) and not failed.done():
            failed.set_exception(error)

    async def draw() -> None:
        loop, thread = asyncio.get_running_loop(), ThreadPoolExecutor(1)
        try:
            while True:
                await room.acquire()
                item = await loop.run_in_executor(thread, next, items, _END)
                if item is _END:
                    window.put_nowait(_END)
                    return
                task = asyncio.create_task(work(item))
                tasks.add(task)
                task.add_done_callback(finished)
                window.put_nowait(task)
        finally:
            await loop.run_in_executor(None, thread.shutdown)  # an iterator must not be closed while it runs

    drawing = asyncio.create_task(draw())
    try:
        while (task := await _unless(window.get(), failed, drawing)) is not _END:
            yield await _unless(task, failed, drawing)
            room.release()
    except BudgetSpent:
        drawing.cancel()
        await asyncio.gather(drawing, *tasks, return_exceptions=True)
        raise
    finally:
        for task in (drawing, *tasks):
            task.cancel()
        await asyncio.gather(drawing, *tasks, return_exceptions=True)
        if failed.done():
            failed.exception()  # seen: asyncio would complain of one that nobody looks at


async def _unless(wanted: Awaitable[Any], *failing: asyncio.Future[None]) -> Any:
    """What is wanted, or the error of one of the others if that comes first."""
    wanted = asyncio.ensure_future(wanted)
    while not wanted.done():
        waiting = [other for other in failing if not other.done()]
        await asyncio.wait([wanted, *waiting], return_when=asyncio.FIRST_COMPLETED)
        for other in failing:
            if other.done() and other.exception() is not None:
                wanted.cancel()
                other.result()
    return wanted.result()
