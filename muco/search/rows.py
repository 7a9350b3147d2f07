"""Rows of the input with their further columns and their hashes.

``content_hash`` is of what a model would be given (text, the image file's bytes): rows that share it share a vector.
``row_hash`` is of all that the table keeps, so that a row is written again only if something of it changed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import date, datetime, time
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from muco.data.items import Columns, Row, Source, open_source
from muco.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

HASHERS = 4  # threads that read image files
CHUNK_ROWS, CHUNK_BYTES = 256, 256 << 20  # looked up in the table together
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

    source: Source
    extra: dict[str, pa.DataType]

    def entries(self) -> Iterator[Entry]:
        for row in self.source.rows(0, [*self.extra]):
            yield Entry(row, conform(row.further, self.extra))


def open_input(path: Path, columns: Columns, reserved: Sequence[str]) -> Input:
    """Checks the input as a whole, and finds its further columns.

    Raises:
        DataError: If it cannot be read, or a further column has a reserved name or one that a table cannot have.
    """
    source = open_source(path, columns)
    extra = _parquet_types(path, columns) if path.suffix in (".parquet", ".pq") else _types_of(source)
    check_names(extra, str(path), reserved)
    return Input(source, extra)


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


def _types_of(source: Source) -> dict[str, pa.DataType]:
    """Of the further columns of a JSONL file, by looking at every row; a folder has none."""
    types: dict[str, pa.DataType] = {}
    if source.columns is None:
        return types
    for record in source.records(0, ()):
        if record.error is not None:
            continue
        for name in record.values.keys() - {*source.columns.used}:
            if (kind := type_of(record.values[name], types.get(name))) is not None:
                types[name] = kind
    return dict(sorted(types.items()))


def _parquet_types(path: Path, columns: Columns) -> dict[str, pa.DataType]:
    """Columns of numbers, text and times as they are, others as text; columns of bytes are left out."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    types: dict[str, pa.DataType] = {}
    for column in pq.read_schema(path):
        kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
        if column.name in columns.used or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            continue
        plain = pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind)
        types[column.name] = kind if plain or pa.types.is_temporal(kind) else pa.string()
    return types


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
        size += sum(len(image) for image in entry.row.images if isinstance(image, bytes))
        if size > CHUNK_BYTES:
            break
    return chunk


def _hash(entry: Entry) -> Entry:
    from muco.data.images import image_digest

    row = entry.row
    if row.error is not None:
        return entry
    try:
        images = [image_digest(image) for image in row.images]
    except DataError as error:
        return replace(entry, row=replace(row, error=str(error)))
    content = _digest([row.text, images if len(images) > 1 else next(iter(images), None)])
    said = {name: value for name, value in entry.extra.items() if value is not None}  # a new column changes no old row
    return replace(entry, content_hash=content, row_hash=_digest([content, row.image_path, said]))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
