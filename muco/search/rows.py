"""Rows of the input with their further columns and their hashes.

``content_hash`` is of what a model would be given (text, the image file's bytes): rows that share it share a vector.
``row_hash`` is of all that the table keeps, so that a row is written again only if something of it changed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import date, datetime, time
from itertools import islice, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from muco.data.items import Columns, Row, open_source
from muco.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

HASHERS = 4  # threads that read image files
CHUNK_ROWS, CHUNK_BYTES = 256, 256 << 20  # looked up in the table together
PARQUET_ROWS = 32  # read at once
SCALARS = (str, int, float, bool, date, time)


@dataclass(frozen=True)
class Entry:
    """A row on its way into the table; ``row.vector`` and ``thumbnail`` come with encoding."""

    row: Row
    extra: dict[str, Any] = field(default_factory=dict)
    content_hash: str = ""
    row_hash: str = ""
    thumbnail: bytes | None = None


@dataclass(frozen=True)
class Input:
    """``extra``: names and types of the further columns; ``entries`` yields all rows, without hashes."""

    total: int
    extra: dict[str, pa.DataType]
    entries: Callable[[], Iterator[Entry]]


def open_input(path: Path, columns: Columns, reserved: Sequence[str]) -> Input:
    """Checks the input as a whole, and finds its further columns.

    Raises:
        DataError: If it cannot be read, or a further column has a reserved name or one that a table cannot have.
    """
    source = open_source(path, columns)
    extra: dict[str, pa.DataType] = {}
    further: Callable[[], Iterator[dict[str, Any]]] = lambda: repeat({})  # noqa: E731
    if path.suffix in (".jsonl", ".ndjson"):
        extra, further = _jsonl_types(path, columns), lambda: _jsonl_extra(path, columns)
    elif path.suffix in (".parquet", ".pq"):
        extra = _parquet_types(path, columns)
        names = [*extra]
        further = lambda: _parquet_extra(path, names)  # noqa: E731
    check_names(extra, str(path), reserved)

    def entries() -> Iterator[Entry]:
        for row, values in zip(source.rows(0), further(), strict=False):
            yield Entry(row, conform(values, extra))

    return Input(source.total, extra, entries)


def check_names(names: Mapping[str, Any], where: str, reserved: Sequence[str]) -> None:
    for name in names:
        if name in reserved or name.startswith("_"):
            raise DataError(f"{where}: the index has a column {name!r} of its own; give the input's another name")
        if not name or set(name) & set(".`\0"):
            raise DataError(f"{where}: a column cannot be called {name!r} (no '.' and no '`'); give it another name")


def type_of(value: Any, before: pa.DataType | None = None) -> pa.DataType | None:
    """The type of a column that held ``before`` and now also holds the value: unlike values become text."""
    import pyarrow as pa

    if value is None:
        return before
    kinds = ((bool, pa.bool_()), (int, pa.int64()), (float, pa.float64()), (datetime, pa.timestamp("us")))
    new = next((kind for python, kind in kinds if isinstance(value, python)), pa.string())
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        new = pa.string()
    if before is None or before == new:
        return new
    numbers = {pa.int64(), pa.float64()}
    return pa.float64() if {before, new} == numbers else pa.string()


def conform(values: Mapping[str, Any], types: Mapping[str, pa.DataType]) -> dict[str, Any]:
    """The values as the columns hold them: what is neither number, text nor time is text in JSON."""
    return {name: _conform(values.get(name), kind) for name, kind in types.items()}


def _conform(value: Any, kind: pa.DataType) -> Any:
    import pyarrow as pa

    if value is None:
        return None
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return float(value) if pa.types.is_floating(kind) else value


def _jsonl_records(path: Path) -> Iterator[dict[str, Any]]:
    """One mapping per row of the file; an empty one where the line is not right, which the row itself says."""
    with path.open("rb") as file:
        for line in file:
            if line.isspace():
                continue
            try:
                record = json.loads(line.decode("utf-8-sig"))
            except ValueError:
                record = {}
            yield record if isinstance(record, dict) else {}


def _jsonl_types(path: Path, columns: Columns) -> dict[str, pa.DataType]:
    types: dict[str, pa.DataType] = {}
    for record in _jsonl_records(path):
        for name in record.keys() - {*columns}:
            if (kind := type_of(record[name], types.get(name))) is not None:
                types[name] = kind
    return dict(sorted(types.items()))


def _jsonl_extra(path: Path, columns: Columns) -> Iterator[dict[str, Any]]:
    for record in _jsonl_records(path):
        yield {name: value for name, value in record.items() if name not in columns}


def _parquet_types(path: Path, columns: Columns) -> dict[str, pa.DataType]:
    """Columns of numbers, text and times as they are, others as text; columns of bytes are left out."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    types: dict[str, pa.DataType] = {}
    for column in pq.read_schema(path):
        kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
        if column.name in columns or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            continue
        plain = pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind)
        types[column.name] = kind if plain or pa.types.is_temporal(kind) else pa.string()
    return types


def _parquet_extra(path: Path, names: list[str]) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
        if not names:
            yield from repeat({}, file.metadata.num_rows)
            return
        for batch in file.iter_batches(PARQUET_ROWS, columns=names):
            yield from batch.to_pylist()


# ── hashes ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def hashed(entries: Iterator[Entry]) -> Iterator[list[Entry]]:
    """Entries with their hashes, in order, as chunks that are looked up together; files are read by threads."""
    with ThreadPoolExecutor(HASHERS) as pool:
        while chunk := _chunk(entries):
            yield list(pool.map(_hash, chunk))


def _chunk(entries: Iterator[Entry]) -> list[Entry]:
    chunk, size = [], 0
    for entry in islice(entries, CHUNK_ROWS):
        chunk.append(entry)
        size += len(entry.row.image) if isinstance(entry.row.image, bytes) else 0
        if size > CHUNK_BYTES:
            break
    return chunk


def _hash(entry: Entry) -> Entry:
    from muco.data.images import image_digest

    row = entry.row
    if row.error is not None:
        return entry
    try:
        image = None if row.image is None else image_digest(row.image)
    except DataError as error:
        return replace(entry, row=replace(row, error=str(error)))
    content = _digest([row.text, image])
    said = {name: value for name, value in entry.extra.items() if value is not None}  # a new column changes no old row
    return replace(entry, content_hash=content, row_hash=_digest([content, row.image_path, said]))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
