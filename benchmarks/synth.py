"""muco synth: how much of a model server's rate it uses, and whether its memory stays flat over many pictures.

    PYTHONPATH=. python benchmarks/synth.py --output benchmarks/results                      the rate, 3 minutes
    PYTHONPATH=. python benchmarks/synth.py --output benchmarks/results --pictures 100000 --name synth-memory-cpu

Writes NAME.json and .md. The server is a process of its own that answers every request after a fixed time with
the same good caption or pairs; ideal is what its answers allow with so many requests in flight, (in flight) / latency.
Server and client share the machine's cores. Pictures are small PNG files, drawn here, each different from the others.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image
from serve import resident
from turns import heading, say, write

SHARD = 500  # pictures
CAPTION = "A silver ring with a square-cut stone lies on a dark wooden table beside a folded letter in soft light."
PAIRS = {
    "query_cls": "What is the main subject?",
    "answer_cls": "ring",
    "negative_answer_cls": "bracelet",
    "query_vqa_global1": "How do the parts of the scene differ in tone?",
    "answer_vqa_global1": "bright metal against dark wood",
    "query_vqa_global2": "Which mood does it have?",
    "answer_vqa_global2": "quiet and a little sad",
    "query_vqa_local1": "Which shape has the stone?",
    "answer_vqa_local1": "square",
    "query_vqa_local2": "What else is on the table?",
    "answer_vqa_local2": "a folded letter",
    "query_vqa_creative": "What may have happened before?",
    "answer_vqa_creative": "Somebody said goodbye and left everything behind.",
    "query_retrieval": "Describe the whole picture.",
}


async def serve(latency: float) -> None:
    """A chat endpoint that answers everything well after ``latency`` seconds; prints its port."""

    def completion(text: str) -> bytes:
        message = {"role": "assistant", "content": text}
        value: dict[str, Any] = {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
        value |= {"usage": {"prompt_tokens": 100, "completion_tokens": 50}}
        return response(json.dumps(value).encode())

    def response(body: bytes) -> bytes:
        head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        return head.encode() + body

    caption, pairs = completion(CAPTION), completion(json.dumps(PAIRS))
    models = response(json.dumps({"data": [{"id": "m"}]}).encode())

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                if head.startswith(b"get"):
                    writer.write(models)
                    continue
                body = await reader.readexactly(int(head.split(b"content-length:")[1].split(b"\r\n")[0]))
                await asyncio.sleep(latency)
                writer.write(caption if b"image_url" in body else pairs)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0, limit=1 << 24, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def draw(folder: Path, count: int) -> None:
    """Pictures of 64 x 64 pixels in folders of a thousand, blurred noise, all different."""
    for number in range(count):
        place = folder / f"{number // 1000:03}" / f"{number:06}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((64, 64), Image.Resampling.BILINEAR).save(place, compress_level=1)


def watched(command: Sequence[str], shards: Path) -> tuple[dict[str, Any], list[int], list[int]]:
    """What a command prints as JSON; and each second its resident bytes, and how many shards are finished."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    memory, finished = [], []
    while process.poll() is None:
        memory.append(resident(process.pid))
        finished.append(len(list(shards.glob("*.parquet"))))
        time.sleep(1)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return json.loads(process.stdout.read()), memory, finished


def run(pictures: Path, output: Path, port: int, in_flight: int, workers: int) -> dict[str, Any]:
    """Both passes of the command, one after the other."""
    url = f"http://127.0.0.1:{port}/v1"
    command = [sys.executable, "-m", "muco", "synth", str(pictures), "--captioner", url, "--writer", url, "--json"]
    command += ["--min-side", "64", "--near", "-1", "--concurrency", str(in_flight // 2), "--output", str(output)]
    command += ["--workers", str(workers), "--shard-size", str(SHARD)]
    begun = time.perf_counter()
    looked, memory_of_looking, _ = watched([*command, "--dry-run"], output / "shards")
    looking = time.perf_counter() - begun
    found, memory, finished = watched(command, output / "shards")
    first = next(second for second, count in enumerate(finished) if count)
    last = next(second for second, count in enumerate(finished) if count == finished[-1])
    return {
        "workers": workers,
        "pictures": looked["pictures"],
        "rows": found["rows"],
        "seconds": {"pass one": looking, "both": time.perf_counter() - begun},
        "requests_per_second": (finished[-1] - finished[first]) * SHARD * 2 / max(1, last - first),
        "usage": found["usage"],
        "memory": {"pass one": memory_of_looking, "pass two": memory},
    }


def table(result: dict[str, Any]) -> str:
    on, settings = result["machine"], result["settings"]
    ideal = settings["in_flight"] / settings["latency"]
    lines = [
        "# muco synth against a server that answers after a fixed time",
        "",
        f"`{result['command']}`",
        "",
        f"{result['date']}; {on['cpu']}, {on['cores']} cores, server and client on the same ones. "
        f"{1000 * settings['latency']:.0f} ms per answer, {settings['in_flight']} requests in flight, two per picture; "
        f"the rate between the first and the last finished shard. Ideal: {ideal:,.0f} per second. Memory is of the "
        "first process, medians of the second and of the last tenth of each pass.",
        "",
        "| processes that ask | pictures | requests / s | of the ideal | MiB, pass one | MiB, pass two |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for one in result["runs"]:
        rate, memory = one["requests_per_second"], [_two(one["memory"][name]) for name in ("pass one", "pass two")]
        lines.append(
            f"| {one['workers']} | {one['rows']:,} | {rate:,.0f} | {rate / ideal:.0%} | {memory[0]} | {memory[1]} |"
        )
    return "\n".join(lines) + "\n"


def _two(memory: Sequence[int]) -> str:
    part = max(1, len(memory) // 10)
    early, late = (median(values) / 2**20 for values in (memory[part : 2 * part] or memory, memory[-part:]))
    return f"{early:.0f}, {late:.0f}"


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="folder of the results")
    parser.add_argument("--pictures", type=int, nargs="+", default=[6000, 6000], help="with 1, 2 … processes")
    parser.add_argument("--name", default="synth-cpu", help="of the result")
    parser.add_argument("--latency", type=float, default=0.05, help="seconds of an answer")
    parser.add_argument("--in-flight", type=int, default=64)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.serve:
        asyncio.run(serve(args.latency))
        return
    if args.output is None:
        parser.error("--output is missing")
    result = heading("synth.py", argv, "cpu")
    result["settings"] = {k: v for k, v in vars(args).items() if k not in ("output", "serve", "name")}
    command = [sys.executable, __file__, "--serve", "--latency", str(args.latency)]
    result["runs"] = []
    with ExitStack() as ends:
        server = ends.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ))
        ends.callback(server.terminate)
        folder = ends.enter_context(tempfile.TemporaryDirectory())
        port = int(server.stdout.readline())
        for workers, count in enumerate(args.pictures, 1):
            draw(Path(folder) / str(count), count)
            say(f"{count:,} pictures are drawn")
            found = run(Path(folder) / str(count), Path(folder) / f"out{workers}", port, args.in_flight, workers)
            result["runs"].append(found)
            say(f"{workers} process(es): {found['requests_per_second']:.0f} requests per second")
    write(args.output, args.name, result, table(result))


if __name__ == "__main__":
    main(sys.argv[1:])
