"""Random rows of a file like M3T's, whose row groups do not fit into memory: rows per second and peak memory.

    PYTHONPATH=. python benchmarks/m3t_rows.py --output benchmarks/results

Writes m3t-rows.json and .md. The file is made here: seven turns of random letters, two wordings per question, and
columns that are not read, in row groups of as many rows as asked (default: one for all). A tenth of the pictures is
missing. Each part runs in a process of its own; its memory is what was resident before it, and at the peak.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from cells import mib, peak_of_this_process, reset_peak
from turns import heading, in_own_processes, say, write

from muco.data.m3t import M3TData
from muco.dialogue import Sample

TURNS, WORDINGS = 7, 2
BATCH = 8192
MISSING = 10  # every so many rows one has no picture
COLUMNS = ["qry", "pos_text", "qry_image_path"]
CHECKED = 64  # rows compared with what Arrow reads


def texts(rng: np.random.Generator, count: int, shortest: int, longest: int) -> pa.Array:
    """Random letters and blanks, some 5 bits of information each, so that they compress no better than real text."""
    ends = np.cumsum(rng.integers(shortest, longest + 1, count), dtype=np.int64)
    letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz     ?", dtype=np.uint8)
    data = letters[rng.integers(0, 32, ends[-1], dtype=np.uint8)]
    offsets = np.concatenate([[0], ends]).astype(np.int32)
    data[offsets[:-1]] = letters[0]  # none is only blanks
    return pa.StringArray.from_buffers(count, pa.py_buffer(offsets), pa.py_buffer(data))


def lists(values: pa.Array, size: int) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(range(0, len(values) + 1, size), pa.int32()), values)


def picture(row: int) -> str:
    return f"{row % 1000:03}/{row:08}.png"


def batch_of(rng: np.random.Generator, first: int, rows: int) -> pa.RecordBatch:
    columns = {
        "qry": lists(lists(texts(rng, rows * TURNS * WORDINGS, 30, 90), WORDINGS), TURNS),
        "qry_image_path": pa.array([picture(row) for row in range(first, first + rows)]),
        "qry_sentence": texts(rng, rows, 100, 300),
        "pos_text": lists(texts(rng, rows * TURNS, 5, 75), TURNS),
        "pos_image_path": pa.array([""] * rows),
        "url": texts(rng, rows, 60, 120),
    }
    return pa.RecordBatch.from_pydict(columns)


def make_file(file: Path, rows: int, row_group: int) -> None:
    rng = np.random.default_rng(0)
    with pq.ParquetWriter(file, batch_of(rng, 0, 1).schema, use_dictionary=False) as writer:
        for group in range(0, rows, row_group):
            end = min(rows, group + row_group)
            batches = [batch_of(rng, first, min(BATCH, end - first)) for first in range(group, end, BATCH)]
            writer.write_table(pa.Table.from_batches(batches), row_group_size=row_group)


def make_pictures(folder: Path, rows: int) -> None:
    """Links to one file: as many names to look for as there are rows, without their room on the disk."""
    folder.mkdir()
    (folder / "picture.png").write_bytes(b"a picture")
    for number in range(min(1000, rows)):
        (folder / f"{number:03}").mkdir()
    for row in range(rows):
        if row % MISSING:
            (folder / picture(row)).symlink_to("../picture.png")


def measured(part: Callable[[Path], dict[str, Any]], folder: Path) -> dict[str, Any]:
    """What a part returns, its seconds, and bytes resident before it and at the peak."""
    resting = reset_peak()
    start = time.perf_counter()
    result = part(folder)
    return {"seconds": time.perf_counter() - start, "resting": resting, "peak": peak_of_this_process()} | result


def open_data(folder: Path) -> M3TData:
    return M3TData(folder, images=folder / "images")


def opening(folder: Path) -> dict[str, Any]:
    data = open_data(folder)
    return {"samples": len(data), "missing": data.missing}


def reading(folder: Path, reads: int) -> dict[str, Any]:
    """Samples in random order; ``seconds`` is of them alone, ``first_seconds`` of the first that touches the index."""
    data = open_data(folder)
    chosen = np.random.default_rng(1).integers(0, len(data), reads).tolist()
    start = time.perf_counter()
    first = data[chosen[0]]
    between = time.perf_counter()
    turns = sum(len(data[index].turns) for index in chosen)
    seconds = time.perf_counter() - between
    if turns != reads * TURNS or not first.images:
        raise RuntimeError("a row has other turns than were written")
    return {"seconds": seconds, "first_seconds": between - start, "reads": reads, "rate": reads / seconds}


def plain_reading(folder: Path) -> dict[str, Any]:
    """What one random row costs without a copy: its row group, the same columns of it."""
    with pq.ParquetFile(folder / "M3T.parquet") as file:
        table = file.read_row_group(0, columns=COLUMNS)
    return {"rows": table.num_rows, "bytes": table.nbytes}


def check(folder: Path, rows: int) -> int:
    """Compares samples from all over the first row group with the rows that Arrow reads; returns their number."""
    data = open_data(folder)
    with pq.ParquetFile(folder / "M3T.parquet") as file:
        table = file.read_row_group(0, columns=COLUMNS)
    numbers = [row for row in np.linspace(0, table.num_rows - 1, CHECKED).astype(int).tolist() if row % MISSING]
    for row in numbers:
        sample = data[row - row // MISSING - 1]
        if as_row(sample, folder) != table.slice(row, 1).to_pylist()[0]:
            raise RuntimeError(f"{sample.place} is not row {row} of the file")
    return len(numbers)


def as_row(sample: Sample, folder: Path) -> dict[str, Any]:
    return {
        "qry": [[content.text for content in turn.query] for turn in sample.turns],
        "pos_text": [turn.target[0].text for turn in sample.turns],
        "qry_image_path": str(Path(sample.images[0]).relative_to(folder / "images")),
    }


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a function in a fresh process."""
    [result] = in_own_processes(function, [arguments])
    return result


def measured_reading(folder: Path, reads: int) -> dict[str, Any]:
    return measured(lambda inner: reading(inner, reads), folder)


def measure(folder: Path, rows: int, row_group: int, reads: int) -> dict[str, Any]:
    file = folder / "M3T.parquet"
    apart(make_file, file, rows, row_group)
    say("file written")
    make_pictures(folder / "images", rows)
    say("pictures linked")
    with pq.ParquetFile(file) as opened:
        groups = [opened.metadata.row_group(n) for n in range(opened.num_row_groups)]
        sizes = {"file": file.stat().st_size, "row_groups": len(groups), "row_group": groups[0].total_byte_size}
    result: dict[str, Any] = {"rows": rows, "sizes": sizes}
    for name, function, arguments in (
        ("opened first", measured, (opening, folder)),
        ("opened again", measured, (opening, folder)),
        ("random samples", measured_reading, (folder, reads)),
        ("random samples, again", measured_reading, (folder, reads)),
        ("one row group at once, for comparison", measured, (plain_reading, folder)),
    ):
        result.setdefault("parts", {})[name] = apart(function, *arguments)
        say(f"{name}: {result['parts'][name]}")
    sizes["shards"] = sum(path.stat().st_size for path in folder.rglob("shard-*.arrow"))
    return result | {"checked": apart(check, folder, rows)}


def table(result: dict[str, Any]) -> str:
    on, sizes = result["machine"], result["sizes"]
    reads = result["parts"]["random samples"]
    first = result["parts"]["opened first"]
    lines = [
        "# Random rows of a file like M3T's",
        "",
        f"`{result['command']}`",
        "",
        f"{result['date']}; {on['cpu']}, {on['cores']} cores. {result['rows']:,} rows of {TURNS} turns; row "
        f"groups: {sizes['row_groups']}, the first of {mib(sizes['row_group'])} MiB uncompressed; file of "
        f"{mib(sizes['file'])} MiB, shards of {mib(sizes['shards'])} MiB. Of {first['samples'] + first['missing']:,} "
        f"pictures {first['missing']:,} are missing. The files are in the system's cache. {result['checked']} samples "
        "from all over the first row group equal what Arrow reads.",
        "",
        f"**{reads['rate']:,.0f} random samples a second** in one process.",
        "",
        "| part | s | resident before MiB | peak MiB | more MiB |",
        "|---|---|---|---|---|",
    ]
    for name, part in result["parts"].items():
        more = part["peak"] - part["resting"]
        lines.append(
            f"| {name} | {part['seconds']:.2f} | {mib(part['resting'])} | {mib(part['peak'])} | **{mib(more)}** |"
        )
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--quick", action="store_true", help="a toy, to see that everything runs")
    parser.add_argument("--rows", type=int, help="of the file; default a million")
    parser.add_argument("--row-group", type=int, help="rows of a row group; default all")
    parser.add_argument("--reads", type=int, help="random samples; default 100,000")
    parser.add_argument("--scratch", type=Path, help="folder for the file; default the system's for temporary files")
    args = parser.parse_args(argv)
    rows = args.rows or (500 if args.quick else 1_000_000)
    result = heading("m3t_rows.py", argv, "cpu")
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        reads = args.reads or (200 if args.quick else 100_000)
        result |= measure(Path(folder), rows, args.row_group or rows, reads)
    write(args.output, "m3t-rows", result, table(result))


if __name__ == "__main__":
    main(sys.argv[1:])
