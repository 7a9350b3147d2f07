"""What a small job costs: processor time of `muco index`, `search`, `embed` and `serve`, and what of it is imports.

    python benchmarks/startup.py --output benchmarks/results

150 pictures and the starter. Each command is a process of its own, in rounds that take turns; `serve` ends after one
request. *Imports* is a process that imports what the command does, *loading* one that loads the model too; the rest is
work. With ``--against DIR``, a checkout of another version runs the same commands. Writes startup.json and startup.md.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from turns import heading, say, write

COUNT = 150
IMPORTS = {
    "index": "import muco.model, lancedb",
    "search": "import muco.model, lancedb",
    "embed": "import muco.model, pyarrow.parquet",
    "serve": "import muco.model, fastapi, uvicorn",
}
LOADING = "; import muco; muco.load('starter', device='cpu')"


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """Processor seconds of the processes that ``work`` starts and waits for, and seconds by the clock."""
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    work()
    after, taken = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - begun
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, taken


def commands(folder: Path, version: str, checkout: Path) -> dict[str, Callable[[], None]]:
    """Each command on the pictures in ``folder``, run by the code in ``checkout``; and its imports and loading."""
    environment = os.environ | {"PYTHONPATH": str(checkout)}

    def python(*words: str) -> None:
        subprocess.run([sys.executable, *words], check=True, env=environment, capture_output=True, cwd=folder)

    def index() -> None:
        shutil.rmtree(folder / "new", ignore_errors=True)
        python("-m", "muco", "index", "pictures", "--model", "starter", "--index", "new")

    def embed() -> None:
        (folder / "new.parquet").unlink(missing_ok=True)
        python("-m", "muco", "embed", "pictures", "--model", "starter", "--output", "new.parquet")

    def serve() -> None:
        command = [sys.executable, "-m", "muco", "serve", "--model", "starter", "--port", "0"]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment, cwd=folder
        ) as server:
            try:
                address = json.loads(server.stdout.readline())["address"]
                body = json.dumps({"input": ["a red ring"]}).encode()
                head = {"Content-Type": "application/json"}
                urllib.request.urlopen(urllib.request.Request(f"{address}/v1/embeddings", body, head)).read()
            finally:
                server.terminate()

    index()  # which search needs, and which makes the starter at first use
    shutil.copytree(folder / "new", folder / f"index-{version}")
    search = ("-m", "muco", "search", "--index", f"index-{version}", "--text", "a red ring")
    works: dict[str, Callable[[], None]] = {"index": index, "search": lambda: python(*search), "embed": embed}
    works["serve"] = serve
    for name, line in IMPORTS.items():
        works[f"{name}, imports"] = lambda line=line: python("-c", line)
        works[f"{name}, loading"] = lambda line=line: python("-c", line + LOADING)
    return works


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--against", type=Path, nargs="*", default=[], help="checkouts, in folders named by version")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    args = parser.parse_args(argv)
    checkouts = {"this": Path.cwd(), **{path.resolve().name: path.resolve() for path in args.against}}
    if len(checkouts) <= len(args.against):
        parser.error("give checkouts in folders of different names, none of which is 'this'")
    taken: dict[str, dict[str, list[tuple[float, float]]]] = {name: {} for name in checkouts}
    with tempfile.TemporaryDirectory() as name:
        folder, random = Path(name), np.random.default_rng(0)
        (folder / "pictures").mkdir()
        for number in range(COUNT):
            pixels = random.integers(0, 256, (224, 224, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "pictures" / f"{number:03}.png")
        works = {version: commands(folder, version, checkout) for version, checkout in checkouts.items()}
        for number in range(args.rounds):
            for what in works["this"]:
                for version, own in works.items():
                    taken[version].setdefault(what, []).append(seconds(own[what]))
            say(f"round {number + 1} of {args.rounds}")
    result = heading("startup.py", argv, "cpu") | {"pictures": COUNT, "seconds": taken}
    write(args.output, "startup", result, page(result, taken))


def page(result: dict[str, Any], taken: dict[str, dict[str, list[tuple[float, float]]]]) -> str:
    on, rounds = result["machine"], len(next(iter(taken["this"].values())))
    lines = ["# What a small job costs", "", f"`{result['command']}`", ""]
    lines += [
        f"{result['date']}; {on['cpu']}, {on['cores']} cores; {COUNT} pictures, the starter; medians of {rounds}.",
        "",
    ]
    lines += [
        "| version | command | processor s | imports | loading | work | s by the clock |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for version, own in taken.items():
        for name in IMPORTS:
            whole, imports, loaded = (
                statistics.median(processor for processor, _ in own[what])
                for what in (name, f"{name}, imports", f"{name}, loading")
            )
            clock = statistics.median(seconds for _, seconds in own[name])
            parts = f"{imports:.1f} | {loaded - imports:.1f} | {whole - loaded:.1f}"
            lines.append(f"| {version} | {name} | **{whole:.1f}** | {parts} | {clock:.1f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(sys.argv[1:])
