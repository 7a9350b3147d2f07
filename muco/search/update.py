"""``muco index``: brings the table to what the input says, and encodes only what the table does not hold yet.

A row is known by its id, its content by a hash. Rows are written some thousands at a time, each time whole or not at
all, so that a killed run leaves a table of finished rows and the same command goes on from there. In memory are a
chunk of rows, the vectors of one write and, on disk, the ids that the input has shown.
"""

from __future__ import annotations

import json
import sqlite3
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Set
from contextlib import AbstractContextManager, closing
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from muco.base.files import whole_file, writing
from muco.base.terminal import rows_bar
from muco.base.text import escaped
from muco.data.folders import told_passed_over
from muco.data.items import Columns, Row
from muco.errors import DataError, MucoError
from muco.search.columns import add_kinds, check_names, common
from muco.search.encode import Encoder, encoded, on_daft
from muco.search.given import as_given, records
from muco.search.index import FORMER, OWN, WIDER, Index
from muco.search.rows import Entry, entry_of, hashed, open_input
from muco.search.storage import BITS, VECTOR, Name

if TYPE_CHECKING:
    import pyarrow as pa

    from muco.model import Model

WRITE_ROWS, WRITE_SECONDS = 2048, 60  # a kill loses at most so much
OPTIMIZE_WRITES = 32  # after so many, and twice, four times … so many: looking rows up stays quick, copying rare
DAFT_CHUNKS = 256  # chunks that Daft gets together, as its processes load the model for each
RESERVED = (*OWN, VECTOR, BITS)


def build(
    input: str | Path,
    path: str | Path,
    model: Model | str | Path | None = None,
    *,
    storage: Name | None = None,
    dimension: int | None = None,
    text_column: str = "text",
    image_column: str = "image",
    id_column: str = "id",
    delete_missing: bool = False,
    batch_size: int = 32,
    workers: int = 1,
    ray: str | None = None,
    errors: str | Path | None = None,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Adds an input to an index, which is made if it is not there.

    Args:
        input: As :func:`muco.embed.embed` takes it. Further columns are kept: numbers, text, times; others as JSON.
        path: Folder of the index, or the URL of one in object storage.
        model: A model, or what :func:`muco.load` takes; None: the one that made the index.
        storage, dimension: Of a new index, see storage.py (float32, whole vectors); one that is there must have them.
        delete_missing: Delete every row of the index whose id the input does not have.
        workers, ray: More than one process, or a Ray cluster: see encode.py. ``model`` must then be a path.
        errors: JSONL file of the rows that could not be used; by default ``errors.jsonl`` in a local index.
        progress: As for ``embed``.
    Returns:
        ``rows`` of the input, ``encoded``, ``reused`` (vectors of the same content), ``unchanged``, ``deleted``,
        ``failed``, ``passed_over`` (other files of a folder: how many by kind), ``errors`` (file or None), ``total``
        rows of the index now, ``seconds``, ``index``, ``model``.
    Raises:
        DataError: If the input cannot be read, or no row of it can be used.
        MucoError: If the index is of another model, dimension or storage.
    """
    from muco.model import load

    opened = open_input(Path(input), Columns(text_column, image_column, id_column), RESERVED)
    source = opened.source
    if source.passed_over and progress is not False:
        print(told_passed_over(source.root, source.passed_over), file=sys.stderr)
    model_path = str(model) if isinstance(model, (str, Path)) else ""
    if model is None:
        index = Index.open(path)
        model_path, model = index.model_path, index.model
    elif model_path:
        model = load(model)
    if (workers > 1 or ray) and not model_path:
        raise MucoError("several workers load the model themselves; give its path")
    index = Index.create(path, model, model_path=model_path, storage=storage, dimension=dimension)
    chunks = 1
    encode: Encoder = partial(encoded, model, index.dimension, batch_size)
    if workers > 1 or ray:
        encode = on_daft(model_path, index.fingerprint, index.dimension, batch_size, workers, ray)
        chunks = DAFT_CHUNKS
    if errors is None and "://" not in str(path):
        errors = Path(path) / "errors.jsonl"
    add_columns(index, opened.extra, opened.empty, str(input))
    with closing(Notes()) as notes:
        entries = opened.entries(index.extra_columns)
        found = _update(index, entries, source.total, encode, notes, chunks=chunks, progress=progress)
        found |= {"passed_over": dict(source.passed_over.most_common())}
        if delete_missing:
            found |= {"deleted": _delete_missing(index, notes), "total": len(index)}
        return found | {"errors": _list_failed(notes, found, errors)}


def add_rows(index: Index, rows: Any, *, batch_size: int = 32) -> dict[str, Any]:
    """See :meth:`Index.add`."""
    given = [as_given(number, row) for number, row in enumerate(records(rows))]
    extra: dict[str, pa.DataType] = {}
    for row in given:
        check_names(row.extra, "rows", RESERVED)
        add_kinds(extra, row.extra)
    add_columns(index, extra, frozenset(), "rows")
    encode = partial(encoded, index.model, index.dimension, batch_size)
    kinds = index.extra_columns
    entries = (entry_of(row.row, row.extra, kinds) for row in given)
    with closing(Notes()) as notes:
        found = _update(index, entries, len(given), encode, notes, chunks=1, progress=False)
        return found | {"errors": [*notes.failed()]}


def add_columns(index: Index, extra: Mapping[str, pa.DataType], empty: Set[str], where: str) -> None:
    """Makes the table hold the columns, and widens those it has where the values of both fit without loss.

    Args:
        empty: Columns without a value, which fit any.
    Raises:
        DataError: If a column of the table cannot take the values.
    """
    import pyarrow as pa

    index.drop_unfinished()
    there = index.extra_columns
    wider = {name: common(there[name], kind) for name, kind in extra.items() if name in there and name not in empty}
    for name, kind in wider.items():
        if kind is None or (kind != there[name] and not index.fits(name, kind)):
            raise DataError(
                f"{where}: the column {name!r} is {extra[name]}, and {there[name]} in the index; convert or rename it, "
                "or make the index anew, in another folder"
            )
    for name, kind in wider.items():
        if kind is not None and kind != there[name]:
            index.widen(name, kind)
    if new := [pa.field(name, kind) for name, kind in extra.items() if name not in there]:
        index.add_columns(new)


class Notes:
    """What a run must remember of every row, on disk: the ids it has seen, and the rows that failed."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._database = sqlite3.connect(Path(self._folder.name) / "notes.db", isolation_level=None)
        self._database.execute("PRAGMA journal_mode = OFF")
        self._database.execute("PRAGMA synchronous = OFF")
        self._database.execute("CREATE TABLE seen (id TEXT PRIMARY KEY) WITHOUT ROWID")
        self._database.execute("CREATE TABLE failed (note TEXT)")
        self.unread = 0  # failed rows whose own id may not be known

    def first(self, id: str) -> bool:
        """Notes an id; false if it was noted before."""
        with self._writing():
            return self._database.execute("INSERT OR IGNORE INTO seen VALUES (?)", (id,)).rowcount == 1

    def has(self, id: str) -> bool:
        return self._database.execute("SELECT 1 FROM seen WHERE id = ?", (id,)).fetchone() is not None

    def fail(self, row: Row, reason: str) -> None:
        note = {"row": row.number, "id": row.id, "where": row.where, "reason": reason}
        with self._writing():
            self._database.execute("INSERT INTO failed VALUES (?)", (json.dumps(note),))

    def failed(self) -> Iterator[dict[str, Any]]:
        for (note,) in self._database.execute("SELECT note FROM failed ORDER BY rowid"):
            yield json.loads(note)

    def _writing(self) -> AbstractContextManager[None]:
        return writing(self._folder.name, "let TMPDIR name another folder")

    def close(self) -> None:
        self._database.close()
        self._folder.cleanup()


def _update(
    index: Index,
    entries: Iterator[Entry],
    total: int,
    encode: Encoder,
    notes: Notes,
    *,
    chunks: int,
    progress: bool | None,
) -> dict[str, Any]:
    """Takes all rows into the table; returns the counts."""
    from rich.console import Console

    started = time.perf_counter()
    index.repair()  # before any row is taken for unchanged
    counts = dict.fromkeys(("encoded", "reused", "unchanged", "failed"), 0)
    writer = Writer(index)
    console = Console(stderr=True, quiet=progress is False)
    with rows_bar(console, shown=console.is_terminal if progress is None else progress) as bar:
        task = bar.add_task("index", total=total)
        parts = hashed(entries)
        while part := [entry for chunk in islice(parts, chunks) for entry in chunk]:
            for entry, outcome in _settled(index, part, encode, notes):
                counts[outcome] += 1
                bar.advance(task)
                if outcome in ("encoded", "reused"):
                    writer.add(entry)
    writer.close()
    return {
        "rows": total,
        **counts,
        "deleted": 0,
        "total": len(index),
        "seconds": round(time.perf_counter() - started, 3),
        "index": index.path,
        "model": index.fingerprint,
    }


def _settled(index: Index, part: list[Entry], encode: Encoder, notes: Notes) -> Iterator[tuple[Entry, str]]:
    """Each entry once, with what became of it; those to be written have a vector."""
    good: list[Entry] = []
    for entry in part:
        reason = entry.row.error
        if reason is not None and entry.row.id == str(entry.row.number):
            notes.unread += 1
        if not notes.first(entry.row.id) and reason is None:
            reason = f"the id {entry.row.id!r} is also that of an earlier row; give each row its own"
        if reason is None:
            good.append(entry)
        else:
            notes.fail(entry.row, reason)
            yield entry, "failed"
    known = index.rows_by_id([entry.row.id for entry in good], ["id", "row_hash"]).to_pylist()
    before = {row["id"]: row["row_hash"] for row in known}
    new: dict[str, list[Entry]] = {}  # by content, which is encoded once
    for entry in good:
        if before.get(entry.row.id) == entry.row_hash:
            yield entry, "unchanged"
        else:
            new.setdefault(entry.content_hash, []).append(entry)
    for content, vector, picture in index.vectors_of([*new]):
        for entry in new.pop(content, []):
            yield _done(entry, vector, picture), "reused"
    numbers = {entries[0].row.number: content for content, entries in new.items()}
    for row, picture in encode(entries[0].row for entries in new.values()):
        for number, entry in enumerate(new[numbers[row.number]]):
            if row.error is None:
                yield _done(entry, row.vector, picture), "reused" if number else "encoded"
            else:
                notes.fail(entry.row, row.error)
                yield entry, "failed"


def _done(entry: Entry, vector: Any, picture: bytes | None) -> Entry:
    return replace(entry, row=replace(entry.row, images=(), vector=vector), thumbnail=picture)


class Writer:
    """Collects rows and writes them together."""

    def __init__(self, index: Index) -> None:
        self.index, self.waiting, self.last = index, [], time.monotonic()
        self.writes, self.optimize_at = 0, OPTIMIZE_WRITES

    def add(self, entry: Entry) -> None:
        self.waiting.append(entry)
        if len(self.waiting) >= WRITE_ROWS or time.monotonic() - self.last > WRITE_SECONDS:
            self._write()
            if self.writes == self.optimize_at:
                self.index.optimize()
                self.optimize_at *= 2

    def close(self) -> None:
        if self.waiting:
            self._write()
        if self.writes or len(self.index):  # also what a killed run has left
            self.index.optimize()

    def _write(self) -> None:
        self.index.write(_table(self.index, self.waiting))
        self.waiting, self.writes, self.last = [], self.writes + 1, time.monotonic()


def _table(index: Index, entries: list[Entry]) -> pa.Table:
    """The rows in the table's columns, but for one that another writer is only making."""
    import numpy as np
    import pyarrow as pa

    vectors = np.stack([entry.row.vector for entry in entries]).astype(np.float32)
    own: dict[str, Any] = {
        "id": [entry.row.id for entry in entries],
        "text": [entry.row.text for entry in entries],
        "image": [entry.row.image_path for entry in entries],
        "thumbnail": [entry.thumbnail for entry in entries],
        "content_hash": [entry.content_hash for entry in entries],
        "row_hash": [entry.row_hash for entry in entries],
    }
    arrays = dict(zip(index.storage.columns, index.storage.arrays(vectors), strict=True))
    fields = [field for field in index.table.schema if field.name not in (WIDER, FORMER)]
    for field in fields:
        if field.name not in arrays:
            values = own[field.name] if field.name in own else [entry.extra.get(field.name) for entry in entries]
            arrays[field.name] = pa.array(values, field.type)
    return pa.table([arrays[field.name].cast(field.type) for field in fields], schema=pa.schema(fields))


def _delete_missing(index: Index, notes: Notes) -> int:
    if notes.unread:
        raise DataError(
            f"nothing was deleted: {notes.unread} rows of the input cannot be read, and which these are is not known; "
            "correct them first (all others are indexed)"
        )
    missing = [id for ids in index.ids() for id in ids if not notes.has(id)]
    deleted = index.delete(missing)
    if deleted:
        index.optimize()
    return deleted


def _list_failed(notes: Notes, found: Mapping[str, Any], path: str | Path | None) -> str | None:
    """Writes the rows that failed, and removes the list of an earlier run.

    Raises:
        DataError: If all rows failed.
    """
    if path is None:
        first = next(notes.failed(), None)
        place = "name a file for the list by --errors"
    else:
        path = Path(path)
        with writing(path, "name another file by --errors"):
            path.unlink(missing_ok=True)
            if found["failed"]:
                with whole_file(path) as unfinished, unfinished.open("w", encoding="utf-8") as file:
                    file.writelines(escaped(json.dumps(note, ensure_ascii=False)) + "\n" for note in notes.failed())
        first, place = next(notes.failed(), None), f"all: {path}"
    if found["failed"] == found["rows"] and first is not None:
        raise DataError(
            f"none of the {found['rows']} rows can be indexed; the first: {first['where']}: {first['reason']}; {place}"
        )
    return str(path) if path is not None and found["failed"] else None
