"""The server under load: together against one at a time, short texts beside bulk, errors, memory, a stop in between.

    PYTHONPATH=. python benchmarks/serve.py --output benchmarks/results

Writes serve-cpu.json and .md. A tiny model is made and served by `muco serve` in a process of its own; this process
keeps connections open and sends the next request as soon as an answer is read, so both share the machine's cores.
Every request has one item: a scene's caption, or with `--images` for some of them its image and a question. A bulk
request has `--bulk` images with a question each.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
from turns import heading, say, write

from muco.data import open_data
from muco.data.scenes import write_scenes
from muco.model import from_backbone
from muco.sizes import TinyConfig
from muco.tiny import tiny_qwen2_vl
from muco.training.build import texts_of

HEAD = (
    b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
)


def made_model(folder: Path) -> tuple[Path, Path]:
    """A tiny model with random weights, and scenes to ask about."""
    scenes = write_scenes(folder / "scenes", train=64, dev=4, test=64)
    texts = texts_of([open_data(scenes / "train.jsonl")])
    from_backbone(*tiny_qwen2_vl(texts, TinyConfig()), device="cpu").save(str(folder / "model"))
    return folder / "model", scenes / "test.jsonl"


def made_requests(scenes: Path, images: float, items: int = 1) -> list[bytes]:
    """HTTP requests of ``items`` items each; a share of them, ``images`` (0 to 1), has an image."""
    rows, made = open_data(scenes), []
    for number in range(len(rows)):
        sample = rows[number]
        item: Any = sample.turns[-1].target[0].text
        if number % 100 < images * 100:
            data = base64.b64encode(Path(sample.images[0]).read_bytes()).decode()
            item = {"text": sample.turns[0].query[0].text, "image": f"data:image/png;base64,{data}"}
        made.append(item)
    requests = []
    for number in range(len(rows)):
        some = [made[(number + place) % len(made)] for place in range(items)]
        body = json.dumps({"input": some, "encoding_format": "base64"}).encode()
        requests.append(HEAD % len(body) + body)
    return requests


@dataclass
class Load:
    """What one load gave.

    Args:
        latencies: Seconds of each answered request.
        memory: The server's resident bytes, one per second.
        unanswered: When requests were sent that were never answered, seconds after the stop (negative: before it).
    """

    connections: int
    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    memory: list[int] = field(default_factory=list)
    unanswered: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        ordered = sorted(self.latencies)
        half = len(self.memory) // 2
        return {
            "connections": self.connections,
            "seconds": self.seconds,
            "requests": len(ordered),
            "per_second": len(ordered) / self.seconds,
            "statuses": {str(status): count for status, count in sorted(self.statuses.items())},
            "p50_ms": 1000 * ordered[len(ordered) // 2],
            "p99_ms": 1000 * ordered[int(len(ordered) * 0.99)],
            "memory_first_half": statistics.median(self.memory[:half] or [0]),
            "memory_second_half": statistics.median(self.memory[half:] or [0]),
            "unanswered": self.unanswered,
        }


@asynccontextmanager
async def serving(model: Path, threads: int, *options: str) -> AsyncIterator[tuple[str, subprocess.Popen]]:
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "muco", "serve", "--model", str(model), "--port", "0", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
    try:
        line = await asyncio.to_thread(process.stdout.readline)
        yield json.loads(line)["address"], process
    finally:
        process.terminate()
        process.wait(60)


async def load(address: str, process: subprocess.Popen, requests: Sequence[bytes], connections: int, seconds: float,
               *, stop: bool = False) -> Load:  # fmt: skip
    """Keeps so many connections busy for so long; with ``stop`` the server gets SIGTERM then, and the load goes on."""
    done, place = Load(connections), urlsplit(address)
    start, stopped = time.perf_counter(), asyncio.Event()
    end = start + seconds

    async def client(number: int) -> None:
        reader, writer = await asyncio.open_connection(place.hostname, place.port)
        turn = number
        while stop or time.perf_counter() < end:
            sent = time.perf_counter()
            try:
                writer.write(requests[turn % len(requests)])
                await writer.drain()
                status, last = await answer(reader)
            except (ConnectionError, asyncio.IncompleteReadError):
                done.unanswered.append(sent - end)
                return
            done.latencies.append(time.perf_counter() - sent)
            done.statuses[status] += 1
            turn += connections
            if last:
                return
        writer.close()

    async def watch() -> None:
        while not stopped.is_set():
            done.memory.append(resident(process.pid))
            await asyncio.sleep(1)

    async def terminate() -> None:
        await asyncio.sleep(seconds)
        nonlocal end
        end = time.perf_counter()
        process.send_signal(signal.SIGTERM)

    watcher = asyncio.create_task(watch())
    tasks = [client(number) for number in range(connections)] + ([terminate()] if stop else [])
    await asyncio.gather(*tasks)
    done.seconds = time.perf_counter() - start
    stopped.set()
    watcher.cancel()
    return done


async def answer(reader: asyncio.StreamReader) -> tuple[int, bool]:
    """Reads one answer: its status, and whether the server closes the connection after it."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    lines = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:] if b": " in line)
    await reader.readexactly(int(lines[b"content-length"]))
    return int(head.split(b" ", 2)[1]), lines.get(b"connection") == b"close"


def resident(pid: int) -> int:
    """Bytes that a process and those that it has started hold; what they share counts for each."""
    held = 0
    with suppress(psutil.NoSuchProcess):  # the first has ended
        process = psutil.Process(pid)
        for one in (process, *process.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                held += one.memory_info().rss
    return held


def seconds_by_part(process: subprocess.Popen) -> dict[str, float]:
    """Processor seconds so far of HTTP (the server's first thread), preparing (its others), and the model's process."""
    server = psutil.Process(process.pid)
    threads = {thread.id: thread.user_time + thread.system_time for thread in server.threads()}
    model = sum(sum(child.cpu_times()[:2]) for child in server.children(recursive=True))
    http = threads.pop(process.pid)
    return {"http": http, "preparing": sum(threads.values()), "model": model}


async def measure(model: Path, scenes: Path, args: argparse.Namespace) -> dict[str, Any]:
    requests, texts = made_requests(scenes, args.images), made_requests(scenes, 0.0)
    bulk = made_requests(scenes, 1.0, args.bulk)
    alone = ("--batch-tokens", "1", "--batch-milliseconds", "0")
    loads: dict[str, Any] = {}
    async with serving(model, args.threads, *alone) as (address, process):
        await load(address, process, requests, 4, 1)
        loads["one at a time"] = (await load(address, process, requests, 1, args.short)).summary()
        say(f"one at a time: {loads['one at a time']['per_second']:.0f}/s")
        loads["no batches"] = (await load(address, process, requests, args.connections, args.short)).summary()
        say(f"no batches: {loads['no batches']['per_second']:.0f}/s")
    async with serving(model, args.threads) as (address, process):
        await load(address, process, requests, 4, 1)
        before = seconds_by_part(process)
        loads["batches"] = (await load(address, process, requests, args.connections, args.seconds)).summary()
        loads["batches"]["parts"] = {name: value - before[name] for name, value in seconds_by_part(process).items()}
        say(f"batches: {loads['batches']['per_second']:.0f}/s")
        loads["text alone"] = (await load(address, process, texts, 1, args.short)).summary()
        beside = load(address, process, bulk, 4, args.short)
        text = load(address, process, texts, 1, args.short)
        loads["bulk"], loads["text beside bulk"] = (one.summary() for one in await asyncio.gather(beside, text))
        loads["bulk alone"] = (await load(address, process, bulk, 4, args.short)).summary()
        say(f"a text's p99: {loads['text alone']['p99_ms']:.0f} and {loads['text beside bulk']['p99_ms']:.0f} ms")
        stopped = await load(address, process, requests, args.connections, args.short / 2, stop=True)
        loads["stopped"] = stopped.summary() | {"exit": process.wait(60)}
    return loads


def table(result: dict[str, Any]) -> str:
    on, loads, settings = result["machine"], result["loads"], result["settings"]
    titles = {
        "one at a time": "1 connection, each item passes alone",
        "no batches": f"{settings['connections']} connections, each item passes alone",
        "batches": f"{settings['connections']} connections, requests share passes",
        "text alone": "1 connection, texts alone",
        "text beside bulk": f"1 connection, texts beside 4 connections with {settings['bulk']} images a request",
        "bulk": f"those 4 connections, {settings['bulk']} images a request",
        "bulk alone": "the same without the texts",
    }
    lines = [
        f"# muco serve under load: {on['device']}",
        "",
        f"`{result['command']}`",
        "",
        f"{result['date']}; {on['cpu']}, {on['cores']} cores, client and server on the same ones, torch with "
        f"{settings['threads']} thread; torch {on['torch']}. A tiny Qwen2-VL with random weights; one item per "
        f"request, {settings['images']:.0%} of them with an image.",
        "",
        "| | requests / s | × one at a time | p50 ms | p99 ms | errors |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    base = loads["one at a time"]["per_second"]
    for name, title in titles.items():
        one = loads[name]
        errors = one["requests"] - one["statuses"].get("200", 0) + len(one["unanswered"])
        lines.append(
            f"| {title} | {one['per_second']:.0f} | {one['per_second'] / base:.2f} | {one['p50_ms']:.1f} "
            f"| {one['p99_ms']:.1f} | {errors} of {one['requests']:,} |"
        )
    long, stopped = loads["batches"], loads["stopped"]
    parts, total = long["parts"], sum(long["parts"].values())
    ratio = loads["text beside bulk"]["p99_ms"] / loads["text alone"]["p99_ms"]
    lines += [
        "",
        f"A text's p99 beside bulk is **{ratio:.1f} ×** its p99 alone.",
        "",
        f"Processor time of the server with {settings['connections']} connections, for 1,000 requests: "
        + ", ".join(
            f"{name} {1000 * value / long['requests']:.1f} s ({value / total:.0%})" for name, value in parts.items()
        )
        + ".",
    ]
    before = sum(sent < 0 for sent in stopped["unanswered"])
    after = len(stopped["unanswered"]) - before
    lines += [
        "",
        f"Memory of the server's processes over {long['seconds']:.0f} s, median of the first and of the second half: "
        f"{long['memory_first_half'] / 2**20:.0f} and {long['memory_second_half'] / 2**20:.0f} MiB.",
        "",
        f"SIGTERM under that load: {stopped['statuses'].get('200', 0):,} requests answered 200, "
        f"{stopped['requests'] - stopped['statuses'].get('200', 0)} otherwise. Without an answer stayed {before} that "
        f"were sent before the signal, and {after} that were sent after it, when the server accepted nothing more. "
        f"Exit code {stopped['exit']}.",
    ]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--seconds", type=float, default=60, help="of the long load")
    parser.add_argument("--short", type=float, default=15, help="of the others")
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--images", type=float, default=0.25, help="share of requests with an image")
    parser.add_argument("--bulk", type=int, default=64, help="images of a large request")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    result = heading("serve.py", argv, "cpu")
    result["settings"] = {k: v for k, v in vars(args).items() if k != "output"}
    with tempfile.TemporaryDirectory() as folder:
        model, scenes = made_model(Path(folder))
        result["loads"] = asyncio.run(measure(model, scenes, args))
    write(args.output, "serve-cpu", result, table(result))


if __name__ == "__main__":
    main(sys.argv[1:])
