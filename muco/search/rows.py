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
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from muco.data.items import PARQUET, Columns, Items, Row, open_items
from muco.data.parquet import batches
from muco.errors import DataError
from muco.images import image_digest
from muco.search.columns import add_kinds, check_names, column_type, common, conform

HASHERS = 4  # threads that read image files
CHUNK_ROWS, CHUNK_BYTES = 256, 256 << 20  # looked up in the table together
PARQUET_ROWS = 256  # looked at together for columns without a value


@dataclass(frozen=True)
class Entry:
    """A row on its way into the table; ``row.vector`` and ``thumbnail`` come with encoding."""

    row: Row
    extra: dict[str, Any] = field(default_factory=dict)
    content_hash: str = ""
    row_hash: str = ""
    thumbnail: bytes | None = None


def open_input(
    path: Path, columns: Columns, reserved: Sequence[str]
) -> tuple[Items, dict[str, pa.DataType], frozenset[str]]:
    """A file or folder, checked as a whole; names and types of its further columns; and those without any value.

    Raises a DataError if it cannot be read, or a further column has a reserved name or one that a table cannot have.
    """
    extra: dict[str, pa.DataType] = {}
    source, empty = open_items(path, columns), frozenset[str]()
    if any(file.suffix in PARQUET for file in source.files):
        extra, empty = _types_of(source.files, columns)
    elif source.columns is not None:
        for record in source.records(0, ()):
            if record.error is None:
                add_kinds(extra, {name: value for name, value in record.values.items() if name not in columns.used})
        extra = dict(sorted(extra.items()))
    check_names(extra, str(path), reserved)
    return source, extra, empty


def _types_of(files: Sequence[Path], columns: Columns) -> tuple[dict[str, pa.DataType], frozenset[str]]:
    """As :func:`_parquet_types`, of several files; a DataError if a column has values that no type can hold."""
    found: dict[str, tuple[pa.DataType, Path]] = {}
    valued: set[str] = set()
    for file in files:
        kinds, empty = _parquet_types(file, columns)
        for name, kind in kinds.items():
            if name not in valued:
                found[name] = kind, file  # whatever type others have without a value
            elif name not in empty:
                known, first = found[name]
                both = common(known, kind)
                if both is None:
                    raise DataError(f"{file}: the column {name!r} is {kind}, and {known} in {first}; give it one type")
                found[name] = both, first
            valued |= {name} - empty
    return {name: kind for name, (kind, _) in found.items()}, frozenset(found.keys() - valued)


def _parquet_types(path: Path, columns: Columns) -> tuple[dict[str, pa.DataType], frozenset[str]]:
    """Types of all further columns but those of bytes, which are left out; and the columns without any value."""
    kinds = {field.name: column_type(field.type) for field in pq.read_schema(path) if field.name not in columns.used}
    kinds = {name: kind for name, kind in kinds.items() if kind is not None}
    empty = sorted(kinds)
    for _, batch in batches(path, empty, most_rows=PARQUET_ROWS) if empty else ():
        empty = [name for name in empty if pc.all(pc.is_null(batch.column(name), nan_is_null=True)).as_py()]
        if not empty:
            break
    return kinds, frozenset(empty)


def entry_of(row: Row, values: Mapping[str, Any], kinds: Mapping[str, pa.DataType]) -> Entry:
    """A row with its further columns; what does not fit one of them becomes its error."""
    try:
        return Entry(row, conform(values, kinds))
    except DataError as error:
        return Entry(replace(row, error=row.error or str(error)))


# ── hashes ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def hashed(entries: Iterator[Entry]) -> Iterator[list[Entry]]:
    """Entries with their hashes, in order, as chunks that are looked up together; files are read by threads."""
    chunk, size = [], 0
    with ThreadPoolExecutor(HASHERS) as pool:
        for entry in chain(entries, (None,)):
            if entry is not None:
                chunk.append(entry)
                size += sum(len(image) for image in entry.row.images if isinstance(image, bytes))
            if chunk and (entry is None or len(chunk) == CHUNK_ROWS or size > CHUNK_BYTES):
                yield list(pool.map(_hash, chunk))
                chunk, size = [], 0


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _hash(entry: Entry) -> Entry:
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
