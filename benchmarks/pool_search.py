"""Exact search in a pool that does not fit into memory, against the bare matrix products; and encoding by modality.

    PYTHONPATH=. python benchmarks/pool_search.py --output benchmarks/results

Writes pool-search.json and .md. The vectors are random unit vectors in shards on disk, as `muco evaluate mbeir` leaves
them; every way reads the same files. benchmarks/README.md says what is measured.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cells import peak_of_this_process, reset_peak
from turns import SIZES, Bench, Settings, heading, say, write

from muco.dialogue import Content
from muco.evaluate.pool import QUERIES, SCORES, SHARD, Vectors, search


def random_pool(folder: Path, rows: int, dimension: int) -> Vectors:
    rng = np.random.default_rng(0)
    files = []
    for start in range(0, rows, SHARD):
        vectors = rng.standard_normal((min(SHARD, rows - start), dimension), dtype=np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        files.append(folder / f"shard-{start:09}.npy")
        np.save(files[-1], vectors)
    return Vectors(files, rows)


def random_queries(count: int, dimension: int) -> np.ndarray:
    queries = np.random.default_rng(1).standard_normal((count, dimension), dtype=np.float32)
    return queries / np.linalg.norm(queries, axis=1, keepdims=True)


def products(pool: Vectors, queries: np.ndarray) -> float:
    """Seconds of all matrix products in the blocks of the search, and nothing else; reading included."""
    start = time.perf_counter()
    for block in pool.blocks(max(1, SCORES // min(len(queries), QUERIES))):
        for first in range(0, len(queries), QUERIES):
            queries[first : first + QUERIES] @ block.T
    return time.perf_counter() - start


def searched(pool: Vectors, queries: np.ndarray, k: int) -> float:
    start = time.perf_counter()
    search(queries, [pool], [np.arange(len(pool))], k)
    return time.perf_counter() - start


def peak_of_search(files: Sequence[Path], rows: int, count: int, k: int) -> dict[str, int]:
    """Bytes resident in a process that does nothing but search: before it, and at the peak."""
    pool = Vectors(files, rows)
    queries = random_queries(count, len(pool.row(0)))
    resting = reset_peak()
    search(queries, [pool], [np.arange(rows)], k)
    return {"resting": resting, "peak": peak_of_this_process()}


def check_exact(pool: Vectors, queries: np.ndarray, k: int) -> bool:
    """Whether some queries find what a sort of all their float64 products gives."""
    scores = np.concatenate(
        [queries.astype(np.float64) @ block.T.astype(np.float64) for block in pool.blocks(SHARD)], 1
    )
    rows, _ = search(queries, [pool], [np.arange(len(pool))], k)
    return bool((rows == np.argsort(-scores, axis=1, kind="stable")[:, :k]).all())


def encoding(size: str, threads: int, items: int) -> dict[str, float]:
    """Items per second by modality, of a model with random weights; images of 952 x 644 px."""
    settings = Settings(
        model=SIZES[size], image=(952, 644), images=items, query_tokens=30, target_tokens=20, turns=(1,), rounds=1,
        device="cpu", dtype="float32", lora=0, train_vision=False, threads=threads,
    )  # fmt: skip
    bench = Bench(settings)
    samples = bench.samples["isolated"]
    texts = [sample.turns[0].target[0].text for sample in samples]
    ways: dict[str, list[Any]] = {
        "text": texts,
        "image": [Content(images=sample.images) for sample in samples],
        "image and text": [Content(text, s.images) for text, s in zip(texts, samples, strict=True)],
    }
    return {name: items / seconds(lambda inputs=inputs: bench.model.encode(inputs)) for name, inputs in ways.items()}


def seconds(action: Callable[[], Any], rounds: int = 3) -> float:
    action()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def table(result: dict[str, Any]) -> str:
    on, found = result["machine"], result["search"]
    ratios = [a / b for a, b in zip(found["search_seconds"], found["product_seconds"], strict=True)]
    memory = found["memory"]
    lines = [
        f"# Search in a pool on disk: {on['device']}",
        "",
        f"`{result['command']}`",
        "",
        f"{result['date']}; {on['cpu']}, {on['cores']} cores; numpy {np.__version__}, torch {on['torch']}.",
        "",
        f"{found['queries']} queries in {found['rows']:,} vectors of {found['dimension']} numbers (float32, "
        f"{found['rows'] * found['dimension'] * 4 / 2**30:.1f} GiB on disk), k = {found['k']}. *Products*: the same "
        "blocks read and multiplied, nothing kept. × is the median of the ratios within a round. Memory is what was "
        "resident in a process of its own. "
        + ("Equal to a full sort of float64 scores" if found["exact"] else "NOT equal to a full sort")
        + f" for {found['checked']} queries.",
        "",
        "| products s | search s | × | resting MiB | peak MiB |",
        "|---|---|---|---|---|",
        f"| {statistics.median(found['product_seconds']):.1f} | {statistics.median(found['search_seconds']):.1f} "
        f"| **{statistics.median(ratios):.2f}** | {memory['resting'] / 2**20:.0f} | **{memory['peak'] / 2**20:.0f}** |",
        "",
        f"## Encoding: the {result['encoding']['size']} model of turns.py, random weights, float32",
        "",
        "| modality | items / s |",
        "|---|---|",
    ]
    lines += [f"| {name} | {rate:.3g} |" for name, rate in result["encoding"]["rates"].items()]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dimension", type=int, default=1536)
    parser.add_argument("--queries", type=int, default=2000)
    parser.add_argument("--k", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--size", choices=tuple(SIZES), default="small", help="of the model that encodes")
    parser.add_argument("--items", type=int, default=16, help="encoded per modality")
    parser.add_argument("--scratch", type=Path, help="folder for the vectors; default the system's for temporary files")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args(argv)
    result = heading("pool_search.py", argv, "cpu")
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        pool = random_pool(Path(folder), args.rows, args.dimension)
        queries = random_queries(args.queries, args.dimension)
        say("pool written")
        times: dict[str, list[float]] = {"product_seconds": [], "search_seconds": []}
        for number in range(args.rounds):
            times["product_seconds"].append(products(pool, queries))
            times["search_seconds"].append(searched(pool, queries, args.k))
            say(f"round {number + 1}/{args.rounds}")
        with multiprocessing.get_context("spawn").Pool(1) as process:
            memory = process.apply(peak_of_search, (pool.files, args.rows, args.queries, args.k))
        checked = min(8, args.queries)
        result["search"] = {
            "rows": args.rows,
            "dimension": args.dimension,
            "queries": args.queries,
            "k": args.k,
            **times,
            "memory": memory,
            "checked": checked,
            "exact": check_exact(pool, queries[:checked], args.k),
        }
    result["encoding"] = {"size": args.size, "rates": encoding(args.size, args.threads, args.items)}
    write(args.output, "pool-search", result, table(result))


if __name__ == "__main__":
    main(sys.argv[1:])
