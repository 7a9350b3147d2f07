"""Search in an index of many generated vectors: time, recall against exact, how long it takes to build, and its size.

    PYTHONPATH=. python benchmarks/index.py --output benchmarks/results

Writes index.json and .md. The vectors have the structure that an index lives from and real ones have: a mixture of
Gaussians in 64 dimensions (one centre per 200 rows, a spread of half the distance of the centres from the origin),
mapped linearly to the full dimension, plus noise in all directions, made unit vectors. Queries are further draws.
Every search goes through ``Index.search``, the rows themselves included. All indices are built first.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
from cells import peak_of_this_process
from turns import heading, say, write

from muco.search import Index
from muco.search.storage import STORAGES

LATENT, SPREAD, NOISE, PER_CENTRE = 64, 0.5, 0.3, 200
BLOCK = 50_000  # rows generated, and written, at once
WARM = 50  # searches before the clock runs


class Mixture:
    """Unit vectors, float32; the same for the same numbers, block by block."""

    def __init__(self, rows: int, dimension: int) -> None:
        rng = np.random.default_rng(0)
        self.rows, self.dimension = rows, dimension
        self.centres = rng.standard_normal((max(10, rows // PER_CENTRE), LATENT), dtype=np.float32)
        self.map = rng.standard_normal((LATENT, dimension), dtype=np.float32) / np.sqrt(np.float32(LATENT))

    def draw(self, count: int, seed: int) -> np.ndarray:
        rng = np.random.default_rng(seed)
        latent = self.centres[rng.integers(0, len(self.centres), count)]
        latent = latent + SPREAD * rng.standard_normal((count, LATENT), dtype=np.float32)
        vectors = latent @ self.map + NOISE * rng.standard_normal((count, self.dimension), dtype=np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        for start in range(0, self.rows, BLOCK):
            yield start, self.draw(min(BLOCK, self.rows - start), 10 + start)


class Generated:
    """Stands for the model that made the vectors; it encodes nothing."""

    fingerprint = "generated"
    encoder = SimpleNamespace(muco_processor=SimpleNamespace(settings=lambda: {"template": "generated"}))

    def __init__(self, dimension: int) -> None:
        self.dimension = dimension

    def get_embedding_dimension(self) -> int:
        return self.dimension


def fill(index: Index, mixture: Mixture, queries: np.ndarray, k: int) -> np.ndarray:
    """Writes all rows; returns the true neighbours of the queries, int64 [queries, k]."""
    best, rows = np.full((len(queries), k), -np.inf, np.float32), np.zeros((len(queries), k), np.int64)
    for start, vectors in mixture.blocks():
        names = [f"row-{start + i:09}" for i in range(len(vectors))]
        values = {"id": names, "content_hash": names, "row_hash": names}
        values |= dict(zip(index.storage.columns, index.storage.arrays(vectors), strict=True))
        schema = index.table.schema
        columns = [values.get(name, pa.nulls(len(vectors), schema.field(name).type)) for name in schema.names]
        index.table.add(pa.table(columns, schema=schema))
        scores = np.concatenate([best, queries @ vectors.T], 1)
        numbers = np.concatenate([rows, np.broadcast_to(np.arange(len(vectors)) + start, scores[:, k:].shape)], 1)
        kept = np.argpartition(-scores, k - 1, axis=1)[:, :k]
        best, rows = np.take_along_axis(scores, kept, 1), np.take_along_axis(numbers, kept, 1)
        say(f"{start + len(vectors):,} rows written")
    return rows


def searched(folder: Path, queries: np.ndarray, truth: np.ndarray, *, exact: bool = False) -> dict[str, float]:
    """Seconds per search of an index that is opened here, and recall@k."""
    index, k = Index.open(folder), truth.shape[1]
    seconds, found = [], 0
    for number, (query, right) in enumerate(zip(queries, truth, strict=True)):
        start = time.perf_counter()
        hits = index.search(vector=query, k=k, exact=exact)
        if exact or number >= WARM:
            seconds.append(time.perf_counter() - start)
            found += len({int(hit.id[4:]) for hit in hits} & {*right.tolist()})
    p50, p99 = np.quantile(seconds, [0.5, 0.99]).tolist()
    return {"p50": p50, "p99": p99, "recall": found / (len(seconds) * k), "searches": len(seconds)}


def remove_old_versions(index: Index) -> None:
    """So that the size is that of the table as it is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that others may be reading: none is
        index.table.optimize(cleanup_older_than=timedelta(0))


def size(folder: Path, *, of_indices: bool) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file() and ("_indices" in f.parts) == of_indices)


def build(folder: Path, storage: str, mixture: Mixture, queries: np.ndarray, k: int) -> tuple[dict[str, Any], Any]:
    """Writes and indexes all rows; what that took, and the true neighbours of the queries."""
    index = Index.create(folder, Generated(mixture.dimension), storage=storage)
    start = time.perf_counter()
    truth = fill(index, mixture, queries, k)
    written = time.perf_counter()
    index.optimize()
    built = time.perf_counter()
    remove_old_versions(index)
    say(f"{storage}: index built in {built - written:.0f} s")
    found = {
        "storage": storage,
        "write_seconds": written - start,
        "build_seconds": built - written,
        "table_bytes": size(folder, of_indices=False),
        "index_bytes": size(folder, of_indices=True),
        "index_types": [str(found.index_type) for found in index.table.list_indices()],
        "peak_bytes": peak_of_this_process(),
    }
    return found, truth


def in_a_process(work: Callable[..., Any], *given: Any, **named: Any) -> Any:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(work, *given, **named).result()


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All indices first; then searches in rounds that take turns, each in a process of its own."""
    mixture = Mixture(args.rows, args.dimension)
    queries = mixture.draw(WARM + args.queries, 1)
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        folders = {storage: Path(scratch) / storage for storage in args.storage}
        built = {
            storage: in_a_process(build, folder, storage, mixture, queries, args.k)
            for storage, folder in folders.items()
        }
        results = {storage: found | {"rounds": []} for storage, (found, _) in built.items()}
        for number in range(args.rounds):
            for storage, folder in folders.items():
                found = in_a_process(searched, folder, queries, built[storage][1])
                results[storage]["rounds"].append(found)
                say(f"round {number + 1} of {args.rounds}, {storage}: {found}")
        for storage, folder in folders.items():
            result, few = results[storage], slice(WARM, WARM + args.exact)
            result["approximate"] = {
                name: statistics.median(one[name] for one in result["rounds"]) for name in result["rounds"][0]
            }
            result["exact"] = in_a_process(searched, folder, queries[few], built[storage][1][few], exact=True)
    return [*results.values()]


def table(result: dict[str, Any]) -> str:
    on = result["machine"]
    lines = [
        f"# Search in an index: {result['rows']:,} generated vectors of {result['dimension']} numbers, {on['device']}",
        "",
        f"`{result['command']}`",
        "",
        f"{result['date']}; {on['cpu']}, {on['cores']} cores; lancedb {result['lancedb']}.",
        "",
        f"k = {result['k']}, one search at a time; medians of {result['rounds']} rounds that take turns, each of "
        f"{result['storages'][0]['approximate']['searches']} searches after {WARM} others, in a process of its own. "
        "Recall is against the cosines of the whole vectors. *Build* joins small files and makes the index of vectors "
        "and those of ids and hashes. Peak is the memory of the process that writes, generation included.",
        "",
        "| storage | build s | table MiB | indices MiB | p50 ms | p99 ms | recall@k | exact p50 ms | exact recall@k "
        "| peak MiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["storages"]:
        near, exact = row["approximate"], row["exact"]
        lines.append(
            f"| {row['storage']} | {row['build_seconds']:.0f} | {row['table_bytes'] / 2**20:.0f} "
            f"| {row['index_bytes'] / 2**20:.0f} | **{1000 * near['p50']:.1f}** | {1000 * near['p99']:.1f} "
            f"| **{near['recall']:.3f}** | {1000 * exact['p50']:.0f} | {exact['recall']:.3f} "
            f"| {row['peak_bytes'] / 2**20:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str]) -> None:
    import lancedb

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dimension", type=int, default=1536)
    parser.add_argument("--storage", nargs="+", choices=tuple(STORAGES), default=["float32"])
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5, help="of the searches (default: %(default)s)")
    parser.add_argument("--exact", type=int, default=10, help="searches that compare with every row")
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--scratch", type=Path, help="folder for the index; default the system's for temporary files")
    args = parser.parse_args(argv)
    result = heading("index.py", argv, "cpu")
    result |= {"rows": args.rows, "dimension": args.dimension, "k": args.k, "lancedb": lancedb.__version__}
    result |= {"rounds": args.rounds, "storages": measure(args)}
    write(args.output, "index", result, table(result))


if __name__ == "__main__":
    main(sys.argv[1:])
