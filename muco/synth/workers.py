"""Pass two in several processes, on this machine or a Ray cluster: each makes whole shards, by Daft.

The head sends the names of a shard's pictures and gets counts back; pictures are read, models asked and shards written
where the work is done, in folders that all machines see.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

from muco.base.daft import daft_on
from muco.errors import MucoError
from muco.synth.catalogue import Kept
from muco.synth.pipeline import Job, Server, make


def make_in_workers(
    job: Job,
    shards: Iterator[list[Kept]],
    workers: int,
    ray: str | None,
    done: Callable[[int, dict[str, Any]], None],
) -> int:
    """Makes the turns of all pictures.

    Args:
        shards: The pictures of each shard.
        workers: Processes; each asks a server ``limits.concurrency / workers`` questions at once, at most.
        ray: Address of a Ray cluster; None: this machine.
        done: Called after each shard with its number of pictures and what its worker has used.
    Returns:
        How many pictures a server did not answer for now.
    Raises:
        MucoError: With the sentence of the first worker that failed; shards that were finished stay.
    """
    daft = daft_on(ray, "synth")
    result = daft.DataType.string()
    share = replace(job, captioner=_share(job.captioner, workers), writer=_share(job.writer, workers))

    class Make:
        def __init__(self, job: Job) -> None:
            self.job = job

        @daft.method.batch(return_dtype=result, batch_size=1)
        def __call__(self, pictures: Any) -> list[str]:
            return [json.dumps(made_shard(self.job, json.loads(shard))) for shard in pictures.to_pylist()]

    makes = daft.cls(Make, use_process=True, max_concurrency=workers)(share)
    later, failed, stop = 0, "", _stop_file(job)
    stop.unlink(missing_ok=True)
    while group := list(islice(shards, 4 * workers)):
        frame = daft.from_pydict({"pictures": [json.dumps([asdict(kept) for kept in shard]) for shard in group]})
        if ray is not None:  # the native runner hands out single rows by itself
            frame = frame.into_partitions(len(group))
        for record in frame.select(makes(daft.col("pictures")).alias("made")).iter_rows():
            found = json.loads(record["made"])
            later += found["later"]
            done(found["pictures"], found["usage"])
            if found["failed"] and not failed:
                failed = found["failed"]
                stop.touch()
        if failed:  # not before: a query of Daft that is broken off takes the whole process with it
            stop.unlink()
            raise MucoError(failed)
    return later


def made_shard(job: Job, pictures: list[dict[str, Any]]) -> dict[str, Any]:
    """Runs in a worker: what came of a shard; ``failed`` is the sentence of an error that stops the run."""
    if _stop_file(job).exists():
        return {"failed": "", "later": 0, "pictures": 0, "usage": {}}
    kept = [Kept(**values) for values in pictures]

    async def run() -> dict[str, Any]:
        async with job.captioner.open() as captioner, job.writer.open() as writer:
            found = {"failed": "", "later": 0, "pictures": len(kept), "usage": {}}
            try:
                found["later"] = await make(job, kept, {kept[0].place // job.shard: len(kept)}, captioner, writer)
            except MucoError as error:  # of another process Daft would send its words within many others
                found["failed"] = str(error)
            found["usage"] = {"captioner": captioner.usage.as_dict(), "writer": writer.usage.as_dict()}
            return found

    return asyncio.run(run())


def _stop_file(job: Job) -> Path:
    """Is there while a run ends because of a worker's error: others do not begin another shard then."""
    return job.output / "stop"


def _share(server: Server, workers: int) -> Server:
    limits = server.limits
    pace = limits.requests_per_minute and limits.requests_per_minute / workers
    at_once = max(1, limits.concurrency // workers)
    return replace(server, limits=replace(limits, concurrency=at_once, requests_per_minute=pace))
