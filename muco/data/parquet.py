"""Reading Parquet files as a stream, from any row on and without holding a row group."""

from __future__ import annotations

import difflib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from muco.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_ROWS = 4096
BATCH_BYTES = 16 * 2**20  # encoded; larger rows come in smaller batches
BUFFER = 2**20  # bytes per column


def read_header(file: Path) -> tuple[list[str], int]:
    """Names of the columns and the number of rows of a Parquet file; a DataError if it cannot be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not file.is_file():
        raise DataError(f"{file}: no such file")
    try:
        with pq.ParquetFile(file) as opened:
            return opened.schema_arrow.names, opened.metadata.num_rows
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: not a readable Parquet file ({one_line(error)}); download it again") from error


def require_columns(file: Path, required: Sequence[str], optional: Sequence[str] = ()) -> tuple[str, ...]:
    """The required columns and the optional ones there are; a DataError if one is missing or there twice."""
    found = read_header(file)[0]
    for column in (*required, *optional):
        if found.count(column) > 1:
            raise DataError(f"{file}: the column {column!r} is there {found.count(column)} times; keep one")
    expected = ", ".join([*required, *(f"{name} (optional)" for name in optional)])
    others = [name for name in found if name not in required]
    for column in required:
        if column not in found:
            near = difflib.get_close_matches(column, others, n=1)
            hint = f"; is it {near[0]!r}?" if near else "."
            raise DataError(f"{file}: no column {column!r}{hint} Expected {expected}; found {', '.join(found)}")
    return (*required, *(name for name in optional if name in found))


def batches(
    file: Path, columns: Sequence[str], start: int = 0, *, most_rows: int = BATCH_ROWS
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """The rows from number ``start`` on, in batches, each with the number of its first row.

    Decoding begins with the row group that holds row ``start``. Memory: one decoded batch and ``BUFFER`` bytes per
    column.

    Args:
        columns: Those that are read, in the order of the batches; the file must have all of them.
        most_rows: Of one batch. A batch has fewer where rows are so large that ``BATCH_BYTES`` would be exceeded.
    Raises:
        DataError: If the file cannot be decoded; names the row after which it is broken.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = start
    try:
        # A buffer makes Arrow read the pages of a column one after another instead of the whole column first.
        with pq.ParquetFile(file, buffer_size=BUFFER, pre_buffer=False) as opened:
            ends = list(accumulate(opened.metadata.row_group(n).num_rows for n in range(opened.num_row_groups)))
            group = bisect_right(ends, start)
            first = ends[group - 1] if group else 0
            size = min(most_rows, _rows_in_batch_bytes(opened.metadata, columns))
            groups = range(group, len(ends))
            for batch in opened.iter_batches(size, row_groups=groups, columns=list(columns)):
                wanted = batch.slice(max(0, start - first))
                if len(wanted):
                    yield row, wanted.select(list(columns))
                    row += len(wanted)
                first += len(batch)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: broken after row {row} ({one_line(error)}); download it again") from error


def _rows_in_batch_bytes(metadata: Any, columns: Sequence[str]) -> int:
    """Rows of which the widest row group has some ``BATCH_BYTES`` in these columns."""
    widest = 1.0
    for group in (metadata.row_group(n) for n in range(metadata.num_row_groups)):
        chunks = [group.column(n) for n in range(group.num_columns)]
        size = sum(c.total_uncompressed_size for c in chunks if c.path_in_schema.split(".")[0] in columns)
        widest = max(widest, size / max(1, group.num_rows))
    return int(max(1, BATCH_BYTES // widest))


def one_line(error: Exception) -> str:
    """What a library says, which may be several lines, as one."""
    return " ".join(str(error).split())
