"""Many pieces of work under way at once, results in order."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from muco.synth.chat import BudgetSpent

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
        BudgetSpent: If a piece of work did; everything under way is finished first.
        Exception: The first one of any piece of work, or of ``items``; everything under way is cancelled.
    """
    loop, thread = asyncio.get_running_loop(), ThreadPoolExecutor(1)
    tasks: deque[asyncio.Task[Result]] = deque()
    drawing: asyncio.Future[Item] | None = None  # the next item
    more = True  # whether there may be one
    try:
        while more or tasks:
            if drawing is not None and drawing.done():
                item, drawing = drawing.result(), None
                more = item is not _END
                if more:
                    tasks.append(asyncio.create_task(work(item)))
            if drawing is None and more and len(tasks) < ahead:
                drawing = loop.run_in_executor(thread, next, items, _END)
            for task in tasks:
                error = task.exception() if task.done() else None
                if error is not None and not isinstance(error, BudgetSpent):  # which waits for the results before it
                    raise error
            if tasks and tasks[0].done():
                yield tasks.popleft().result()
                continue
            under_way = [future for future in (*tasks, drawing) if future is not None and not future.done()]
            if under_way:
                await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
    except BudgetSpent:
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await loop.run_in_executor(None, thread.shutdown)  # an iterator must not be closed while it runs
