"""LanceDB: how a table is opened, read and indexed, and its errors as sentences, which only their words tell apart."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa

from muco.errors import MucoError, OutputError, StorageError
from muco.search.storage import Storage

TABLE = "rows"  # the one table of an index
STALE = timedelta(seconds=5)  # how far a reader may lag behind a writer
ANN_ROWS = 10_000  # from this many rows on, indices of vectors, ids and hashes pay
ANN_NAME = "ann_"  # and the number of rows when it was trained
RETRAIN = 4  # the index of vectors is trained again when the rows have grown by this factor
PARTITION_ROWS = 4096
PROBES = 20  # partitions searched at least, the nearest first
ENOUGH_BITS = 256  # dimensions from which on one bit of each finds good candidates
FILES = ("LanceError(IO)", "LanceError(Arrow)", "Not found", "os error", "panicked", "Lance file")  # in errors of files
FILTER = "sql filter"  # in errors of a filter, whatever else they say


def is_local(path: str | Path) -> bool:
    """Whether an index is a folder, and not the URL of one in object storage."""
    return "://" not in str(path)


def connect(path: str | Path, *, create: bool) -> Any:
    """The database in a folder or in object storage.

    Raises an OutputError if a new index is asked for where a file is; a MucoError if LanceDB is not installed, or there
    is no such folder and ``create`` is false.
    """
    try:
        import lancedb
    except ImportError as error:
        raise MucoError("the index needs LanceDB: pip install 'muco[search]'") from error
    if is_local(path) and create and Path(path).is_file():
        raise OutputError(f"{path}: an index is a folder, and this is a file; name another")
    if is_local(path) and not create and not Path(path).is_dir():
        raise MucoError(f"{path}: no such index; make one with `muco index INPUT --model MODEL --index {path}`")
    with lance_calls(path):
        place = Path(path).absolute() if is_local(path) else path  # LanceDB expands "~" and takes "a:b" for a URL
        return lancedb.connect(str(place), read_consistency_interval=timedelta(0) if create else STALE)


def open_rows(database: Any, path: str | Path) -> Any:
    """The table of rows, or None if it was never finished and can be made again.

    Raises a StorageError if the files that describe the table are missing, but its rows are there.
    """
    with lance_calls(path):
        try:
            return database.open_table(TABLE)
        except ValueError as error:
            if "was not found" not in str(error):
                raise
    if is_local(path) and any(Path(path).glob(f"{TABLE}.lance/data/*")):
        raise StorageError(
            f"{path}: the rows are there, but not the files that describe them; copy the index again, or delete it"
        )
    return None


def read(search: Any, where: str | None, columns: Sequence[str]) -> pa.RecordBatchReader:
    """The rows that a search finds, batch by batch."""
    return (search.where(where) if where else search).select([*columns]).to_batches()


def build_indices(table: Any, storage: Storage, dimension: int) -> None:
    """Builds the indices that pay and are not there yet: of vectors (benchmarks/index.py says why IVF), ids and hashes.

    ``table`` is LanceDB's, which nobody else writes to meanwhile; ``dimension`` that of its vectors.
    """
    from lancedb.index import BTree, IvfFlat, IvfRq

    rows = table.count_rows()
    if rows < ANN_ROWS:
        return
    indices = list(table.list_indices())
    for column in ("id", "content_hash"):
        if not any(index.columns == [column] for index in indices):
            table.create_index(column, config=BTree())
    trained = [int(index.name.removeprefix(ANN_NAME)) for index in indices if index.name.startswith(ANN_NAME)]
    if trained and rows < RETRAIN * max(trained):
        return
    whole = storage.metric == "hamming" or dimension < ENOUGH_BITS or dimension % 8
    partitions = max(1, rows // PARTITION_ROWS)
    config = (IvfFlat if whole else IvfRq)(distance_type=storage.metric, num_partitions=partitions)
    table.create_index(storage.searched, config=config, name=f"{ANN_NAME}{rows}", replace=True)
    for old in trained:
        table.drop_index(f"{ANN_NAME}{old}")


@contextmanager
def lance_calls(path: str | Path, where: str | None = None) -> Iterator[None]:
    """Turns what LanceDB raises into MuCo's errors. Also put reading its results into this block.

    Raises a StorageError if files of the index at ``path`` are missing or were cut, or cannot be written; a MucoError
    if LanceDB refuses the user's filter, ``where``.
    """
    try:
        yield
    except MucoError:
        raise
    except (RuntimeError, ValueError, OSError, pa.ArrowException) as error:
        said = str(error)
        text = " ".join(said.split()).removeprefix("Invalid input, ").removeprefix("lance error: ")
        short = re.split(r", /(?:rustc|root)/", text, maxsplit=1)[0][:200]  # without what it says about its own source
        of_files = isinstance(error, OSError) or (FILTER not in said and any(words in said for words in FILES))
        if where and not of_files:
            raise MucoError(f"the filter cannot be used: {short}") from error
        if refused := re.search(r"([^:()]+) \(os error \d+\)", said):
            told = f"the index cannot be written ({refused[1].strip()}); make room or change that, and start again"
        elif isinstance(error, OSError) and error.errno:
            told = f"the index cannot be used ({os.strerror(error.errno)}); change that, or name another"
        else:
            told = (
                f"the index cannot be read ({short}); files of it are missing, damaged or cut: copy it again, or "
                "delete it and make a new one"
            )
        raise StorageError(f"{path}: {told}") from error
