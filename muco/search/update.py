"""``muco index``: makes the table hold what the input says, and encodes only what is new.

A row is known by its id, its content by a hash. Rows are written some thousands at a time, each time whole or not at
all, so that a killed run leaves a table of finished rows and the same command resumes from there. Memory holds a chunk
of rows and the vectors of one write; the ids that the input has shown are on disk.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from rich.console import Console

from muco.base.terminal import rows_bar
from muco.data.folders import told_passed_over
from muco.data.items import Columns, Items
from muco.errors import DataError, MucoError
from muco.search.columns import add_kinds, check_names
from muco.search.encode import RowEncoder, encoded, on_daft
from muco.search.given import as_given, records
from muco.search.lance import is_local
from muco.search.notes import Notes, check_list
from muco.search.rows import CHUNK_ROWS, Entry, entry_of, hashed, open_input
from muco.search.storage import BITS, VECTOR, Name
from muco.search.table import FORMER, OWN, WIDER, Table
from muco.search.widening import fit_columns

if TYPE_CHECKING:
    from muco.model import Model
    from muco.precision import Precision

WRITE_ROWS, WRITE_SECONDS = 2048, 15  # a kill loses no more than this, and an interrupt nothing that is encoded
OPTIMIZE_WRITES = 32  # then after twice, four times … as many: looking rows up stays quick, copying rare
DAFT_CHUNKS = 256  # chunks that Daft gets together, as its processes load the model for each
RESERVED = (*OWN, VECTOR, BITS)

log = logging.getLogger(__name__)


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
    precision: Precision | None = None,
    errors: str | Path | None = None,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Adds an input to an index, which is made if it is not there.

    Args:
        input: As :func:`muco.embed.embed` takes it. Further columns are kept: numbers, text, times; others as JSON.
        path: Folder of the index, or the URL of one in object storage.
        model: A model, or what :func:`muco.load` takes; None: the one that made the index.
        storage, dimension: Of a new index, see storage.py (float32, whole vectors); an existing one must have the same.
        delete_missing: Delete every row of the index whose id the input does not have. Nothing is written if the index
            has rows, but none of the input: it may be another one.
        workers, ray: More than one process, or a Ray cluster: see encode.py. ``model`` must then be a path.
        precision: As for :func:`muco.load`, which gets it with a path.
        errors: JSONL file of the rows that could not be used; by default ``errors.jsonl`` in a local index.
        progress: As for ``embed``.
    Returns:
        ``rows`` of the input, ``encoded``, ``reused`` (vectors of the same content), ``unchanged``, ``deleted``,
        ``failed``, ``passed_over`` (other files of a folder: how many by kind), ``errors`` (file or None), ``total``
        rows of the index now, ``seconds``, ``index``, ``model``.
    Raises:
        DataError: If the input cannot be read, no row of it can be used, or it may be another one (``delete_missing``).
        MucoError: If the index is of another model, dimension or storage.
    """
    from muco.model import loaded

    if errors is None and is_local(path):
        errors = Path(path) / "errors.jsonl"
    failed_rows = None if errors is None else Path(errors)
    if failed_rows is not None:
        check_list(failed_rows)
    source, extra, empty = open_input(Path(input), Columns(text_column, image_column, id_column), RESERVED)
    if source.passed_over and progress is not False:
        print(told_passed_over(source.root, source.passed_over), file=sys.stderr)
    model_path = str(model) if isinstance(model, (str, Path)) else ""
    if model is None:
        table = Table.open(path)
        model_path, model = table.model_path, table.checked_model(table.model_path, precision=precision)
    else:
        model = loaded(model, precision=precision)
    if (workers > 1 or ray) and not model_path:
        raise MucoError("several workers load the model themselves; pass its path")
    table = Table.create(path, model, model_path=model_path, storage=storage, dimension=dimension)
    encode: RowEncoder
    chunks, encode = 1, partial(encoded, model, table.dimension, batch_size)
    if workers > 1 or ray:
        encode = on_daft(model_path, table.fingerprint, table.dimension, batch_size, workers, ray, model.precision)
        chunks = DAFT_CHUNKS
    if delete_missing and len(table) and not _shares_rows(table, source):  # before any of its rows is there
        raise DataError(
            f"{input}: nothing was changed: the index {path} has none of its rows, neither by id nor by content, so "
            "one of the two may be the wrong one; name another, or to replace all rows make a new index"
        )
    fit_columns(table, extra, empty, str(input))
    kinds = table.extra_columns
    entries = (entry_of(row, row.further, kinds) for row in source.rows(0, [*extra]))
    with closing(Notes()) as notes:
        found = _update(table, entries, source.total, encode, notes, chunks=chunks, progress=progress)
        found |= {"passed_over": dict(source.passed_over.most_common())}
        found |= {"errors": notes.list_failed(failed_rows, found["rows"])}
        if delete_missing:
            found |= {"deleted": _delete_missing(table, notes), "total": len(table)}
        return found


def add_rows(table: Table, rows: Any, model: Model, *, batch_size: int = 32) -> dict[str, Any]:
    """See :meth:`muco.search.Index.add`; ``model`` made the table."""
    given = [as_given(number, row) for number, row in enumerate(records(rows))]
    extra: dict[str, pa.DataType] = {}
    for _, own in given:
        check_names(own, "rows", RESERVED)
        add_kinds(extra, own)
    fit_columns(table, extra, frozenset(), "rows")
    encode, kinds = partial(encoded, model, table.dimension, batch_size), table.extra_columns
    entries = (entry_of(row, own, kinds) for row, own in given)
    with closing(Notes()) as notes:
        found = _update(table, entries, len(given), encode, notes, chunks=1, progress=False)
        return found | {"errors": [*notes.failed()]}


def _update(
    table: Table,
    entries: Iterator[Entry],
    total: int,
    encode: RowEncoder,
    notes: Notes,
    *,
    chunks: int,
    progress: bool | None,
) -> dict[str, Any]:
    """Takes all rows into the table; returns the counts."""
    started = time.perf_counter()
    with table.writing():
        pass  # repairs it and looks at its newest version, before any row is taken for unchanged
    console = Console(stderr=True, quiet=progress is False)
    with rows_bar(console, shown=console.is_terminal if progress is None else progress) as bar:
        task = bar.add_task("index", total=total)
        update = _Update(table, encode, notes, partial(bar.advance, task))
        parts = hashed(entries)
        try:
            while part := [entry for chunk in islice(parts, chunks) for entry in chunk]:
                update.take(part)
        except KeyboardInterrupt:
            update.write()
            raise
    update.close()
    return {
        "rows": total,
        **update.counts,
        "deleted": 0,
        "total": len(table),
        "seconds": round(time.perf_counter() - started, 3),
        "index": table.path,
        "model": table.fingerprint,
    }


class _Update:
    """Takes chunks of rows into the table, and counts what becomes of them.

    A chunk passes through four steps: each settles some of its rows, and returns those that are left.
    """

    def __init__(self, table: Table, encode: RowEncoder, notes: Notes, advance: Callable[[int], None]) -> None:
        self.table, self.encode, self.notes, self.advance = table, encode, notes, advance
        self.waiting: list[Entry] = []  # written together
        self.writes, self.optimize_at, self.last = 0, OPTIMIZE_WRITES, time.monotonic()
        self.counts = dict.fromkeys(("encoded", "reused", "unchanged", "failed"), 0)
        self.renumbered = 0  # rows without an id that replace others of the same number

    def take(self, entries: list[Entry]) -> None:
        """Brings a chunk of rows into the table."""
        changed = self._without_unchanged(self._without_failed(entries))
        by_content: dict[str, list[Entry]] = {}  # a content is encoded once
        for entry in changed:
            by_content.setdefault(entry.content_hash, []).append(entry)
        self._encode(self._without_known(by_content))

    def _without_failed(self, entries: list[Entry]) -> list[Entry]:
        good = []
        for entry in entries:
            row, reason = entry.row, entry.row.error
            if not row.id_known:
                self.notes.unread = self.notes.unread or row
            if row.id_known and not self.notes.first(row.id) and reason is None:
                reason = f"the id {row.id!r} is also that of an earlier row; give each row its own"
            if reason is None:
                good.append(entry)
            else:
                self._fail(entry, reason)
        return good

    def _without_unchanged(self, entries: list[Entry]) -> list[Entry]:
        found = self.table.rows_where("id", [entry.row.id for entry in entries], ["id", "row_hash"])
        before = {row["id"]: row["row_hash"] for row in found.to_pylist()}
        changed = [entry for entry in entries if before.get(entry.row.id) != entry.row_hash]
        self.renumbered += sum(entry.row.numbered and entry.row.id in before for entry in changed)
        self._count("unchanged", len(entries) - len(changed))
        return changed

    def _without_known(self, by_content: dict[str, list[Entry]]) -> dict[str, list[Entry]]:
        left = dict(by_content)
        for known in self.waiting[:]:  # not in the table yet
            for entry in left.pop(known.content_hash, []):
                self._keep(entry, known.row.vector, known.thumbnail, "reused")
        for content, vector, picture in self.table.vectors_of([*left]):
            for entry in left.pop(content, []):
                self._keep(entry, vector, picture, "reused")
        return left

    def _encode(self, by_content: dict[str, list[Entry]]) -> None:
        alike = {entries[0].row.number: entries for entries in by_content.values()}
        for row, picture in self.encode(entries[0].row for entries in alike.values()):
            for place, entry in enumerate(alike[row.number]):
                if row.error is not None:
                    self._fail(entry, row.error)
                else:
                    self._keep(entry, row.vector, picture, "reused" if place else "encoded")

    def _keep(self, entry: Entry, vector: Any, picture: bytes | None, outcome: str) -> None:
        row = replace(entry.row, images=(), vector=vector)
        self.waiting.append(replace(entry, row=row, thumbnail=picture))
        self._count(outcome)
        if len(self.waiting) >= WRITE_ROWS or time.monotonic() - self.last > WRITE_SECONDS:
            self.write()
            if self.writes == self.optimize_at:
                self.table.optimize()
                self.optimize_at *= 2

    def _fail(self, entry: Entry, reason: str) -> None:
        self.notes.fail(entry.row, reason)
        self._count("failed")

    def _count(self, outcome: str, rows: int = 1) -> None:
        self.counts[outcome] += rows
        self.advance(rows)

    def close(self) -> None:
        """Writes the rows that are left."""
        self.write()
        if self.renumbered:
            log.warning(
                "%d rows without an id have replaced rows of the same number; if those were of another input, give "
                "rows ids, and index both again",
                self.renumbered,
            )
        if self.writes or len(self.table):  # also what a killed run has left
            self.table.optimize()

    def write(self) -> None:
        """Writes the rows that have a vector."""
        if self.waiting:
            self.table.write(_table(self.table, self.waiting))
            self.waiting, self.writes, self.last = [], self.writes + 1, time.monotonic()


def _table(table: Table, entries: list[Entry]) -> pa.Table:
    """The rows in the table's columns, but for one that another writer is still making."""
    vectors = np.stack([entry.row.vector for entry in entries]).astype(np.float32)
    apart = (WIDER, FORMER, *table.storage.columns)
    schema = pa.schema([field for field in table.table.schema if field.name not in apart])
    values = [
        entry.extra
        | {"id": entry.row.id, "text": entry.row.text, "image": entry.row.image_path, "thumbnail": entry.thumbnail}
        | {"content_hash": entry.content_hash, "row_hash": entry.row_hash}
        for entry in entries
    ]
    rows = pa.Table.from_pylist(values, schema)
    for name, column in zip(table.storage.columns, table.storage.arrays(vectors), strict=True):
        rows = rows.append_column(name, column)
    return rows


def _shares_rows(table: Table, source: Items) -> bool:
    """Whether the table has a row of the input, by id or, which takes longer to say, by content."""
    rows = (row for row in source.rows(0, ()) if row.id_known)
    while ids := [row.id for row in islice(rows, CHUNK_ROWS)]:
        if len(table.rows_where("id", ids, ["id"])):
            return True
    for entries in hashed(map(Entry, source.rows(0, ()))):
        contents = [entry.content_hash for entry in entries if entry.row.error is None]
        if len(table.rows_where("content_hash", contents, ["id"])):
            return True
    return False


def _delete_missing(table: Table, notes: Notes) -> int:
    if (row := notes.unread) is not None:
        raise DataError(
            f"{row.where}: {row.error}; which id this row has is not known, so nothing was deleted: correct it and run "
            "the same command again (all other rows are indexed)"
        )
    missing = [id for ids in table.ids() for id in ids if not notes.has(id)]
    if deleted := table.delete(missing):
        table.optimize()
    return deleted
