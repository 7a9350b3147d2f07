"""Encoding pictures with freed memory kept by the process, as the command line does, and handed back to the system.

    python benchmarks/freed_memory.py --model starter --output benchmarks/results

Two processes take turns, round by round, so that other work on the machine meets both. Writes freed-memory.json and
freed-memory.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from turns import heading, write

KEPT, GIVEN = "kept", "handed back"


def work(model_path: str, pictures: int, keep: bool) -> None:
    """Encodes the pictures once for each line of stdin, and answers with seconds, system seconds and peak bytes."""
    import resource
    import time

    from muco.base.machine import keep_freed_memory
    from muco.model import load

    if keep and not keep_freed_memory():
        raise SystemExit("this C library cannot keep freed memory")
    model, random = load(model_path, device="cpu"), np.random.default_rng(0)
    inputs = [Image.fromarray(random.integers(0, 256, (224, 224, 3), dtype=np.uint8)) for _ in range(pictures)]
    model.encode(inputs[:8])
    print("ready", flush=True)
    for _ in sys.stdin:
        before, begun = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        model.encode(inputs, batch_size=64, show_progress_bar=False)
        seconds, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_SELF)
        print(json.dumps([seconds, after.ru_stime - before.ru_stime, after.ru_maxrss * 1024]), flush=True)


def main() -> None:
    argv = sys.argv[1:]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="starter", help="a model's folder or name (default: %(default)s)")
    parser.add_argument("--pictures", type=int, default=128, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--worker", choices=(KEPT, GIVEN), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        work(args.model, args.pictures, args.worker == KEPT)
        return
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": clean}
    command = [sys.executable, __file__, *argv, "--worker"]
    workers = {name: subprocess.Popen([*command, name], **pipes) for name in (KEPT, GIVEN)}
    for worker in workers.values():
        assert worker.stdout.readline() == "ready\n", "a worker could not start; its error is above"
    measured: dict[str, list[list[float]]] = {name: [] for name in workers}
    for _ in range(args.rounds):
        for name, worker in workers.items():
            worker.stdin.write("go\n")
            worker.stdin.flush()
            measured[name].append(json.loads(worker.stdout.readline()))
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    report(args, argv, measured)


def report(args: argparse.Namespace, argv: list[str], measured: dict[str, list[list[float]]]) -> None:
    def middle(name: str, place: int) -> float:
        return statistics.median(one[place] for one in measured[name])

    ratios = [given[0] / kept[0] for kept, given in zip(measured[KEPT], measured[GIVEN], strict=True)]
    result = heading("freed_memory.py", argv, "cpu") | {"model": args.model, "pictures": args.pictures}
    result |= {"rounds": measured, "ratio": statistics.median(ratios), "ratios": ratios}
    on = result["machine"]
    rows = [
        f"| {name} | {1e3 * middle(name, 0) / args.pictures:.1f} | {1e3 * middle(name, 1) / args.pictures:.1f} "
        f"| {max(one[2] for one in measured[name]) / 2**20:.0f} |"
        for name in (KEPT, GIVEN)
    ]
    text = [
        "# Memory that is freed and kept",
        "",
        f"`{result['command']}`",
        "",
        f"{result['date']}; {on['cpu']}, {on['cores']} cores; {args.pictures} random pictures of 224 x 224, medians of "
        f"{args.rounds} rounds. Kept, a picture takes 1 / **{result['ratio']:.2f}** of the time.",
        "",
        "| freed memory | ms a picture | of these in the system | peak MiB |",
        "|---|---:|---:|---:|",
        *rows,
    ]
    write(args.output, "freed-memory", result, "\n".join(text) + "\n")


if __name__ == "__main__":
    main()
