"""Many pieces of work under way at once: on the event loop with results in order, or by Daft."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any, TypeVar

from muco.base.daft import daft_on
from muco.synth.chat import BudgetSpent

Item = TypeVar("Item")
Result = TypeVar("Result")

_END: Any = object()


async def in_order(
    items: Iterator[Item], work: Callable[[Item], Coroutine[Any, Any, Result]], *, ahead: int
) -> AsyncIterator[Result]:
    """Yields the result of the work on every item, in the order of the items.

    Items are drawn on a thread of their own, at most ``ahead`` before their results are yielded: this bounds memory,
    and a slow piece of work holds up the others only when they are this far ahead of it.

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


async def done_within_budget(
    items: Iterator[Item], work: Callable[[Item], Coroutine[Any, Any, Any]], *, ahead: int
) -> str | None:
    """Does the work on every item, as :func:`in_order`; returns why a budget ended it early, or None."""
    async with aclosing(in_order(items, work, ahead=ahead)) as results:
        try:
            async for _ in results:
                pass
        except BudgetSpent as error:
            return str(error)
    return None


def by_daft(
    work: Callable[[list[Any]], list[Any]], size: int, ray: str | None, **options: Any
) -> Callable[[Iterable[Any]], Iterator[Any]]:
    """A function that passes JSON values through ``work``, ``size`` at a time, and yields the results.

    ``ray``: address of a Ray cluster, or None for this machine; ``options``: of ``daft.cls``.
    """
    daft = daft_on(ray, "synth")

    class Worker:
        def __init__(self, work: Any) -> None:
            self.work = work

        @daft.method.batch(return_dtype=daft.DataType.string(), batch_size=size)
        def __call__(self, values: Any) -> list[str]:
            return [json.dumps(made) for made in self.work([json.loads(value) for value in values.to_pylist()])]

    worker = daft.cls(Worker, **options)(work)

    def run(values: Iterable[Any]) -> Iterator[Any]:
        texts = [json.dumps(value) for value in values]
        frame = daft.from_pydict({"value": texts})
        if ray is not None:  # the native runner hands out rows by itself
            frame = frame.into_partitions(-(-len(texts) // size))
        for row in frame.select(worker(daft.col("value")).alias("made")).iter_rows():
            yield json.loads(row["made"])

    return run
