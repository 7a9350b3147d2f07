"""The rows of an index on disk: a LanceDB table with one row per id.

Its columns: ``id``, the vector (see storage.py), ``text``, ``image`` (path as given), ``thumbnail`` (JPEG),
``content_hash`` (of what was encoded), ``row_hash`` (of everything the input says), and the input's further columns.
The table's metadata says what makes its vectors: model, dimension, prompt, storage.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pyarrow as pa

from muco.base.files import claimed
from muco.base.machine import VERSION
from muco.errors import DataError, MucoError, OutputError
from muco.search.columns import checked_id
from muco.search.filter import quoted
from muco.search.lance import TABLE, build_indices, connect, is_local, lance_calls, open_rows, read
from muco.search.storage import STORAGES, Name, Storage
from muco.sizes import checked_dimension

if TYPE_CHECKING:
    from muco.model import Model
    from muco.precision import Precision

HASHES = ("content_hash", "row_hash")
OWN = ("id", "text", "image", "thumbnail", *HASHES)  # besides those of the storage
WIDER, FORMER = "_wider", "_former"  # a column whose type is being changed, see widening.py
OLD = timedelta(minutes=1)  # no reader can still use a version this much older
IDS = 1000  # per delete statement
WAIT = 3600.0  # seconds for the writer before, which may be building an index of vectors

log = logging.getLogger(__name__)


class Table:
    """The rows of an index. Many threads and processes may read and write at once; writers take turns."""

    def __init__(self, path: str, table: Any) -> None:
        self.path, self.table = path, table
        facts = {k.decode(): v.decode() for k, v in (table.schema.metadata or {}).items()}
        if "muco.model" not in facts or facts.get("muco.storage") not in STORAGES:
            raise MucoError(f"{path}: its table {TABLE!r} was not made by `muco index` of this version")
        self.fingerprint, self.model_path = facts["muco.model"], facts["muco.model_path"]
        self.dimension = int(facts["muco.dimension"])
        self.version, self.prompt = facts["muco.version"], facts["muco.prompt"]
        self.storage: Storage = STORAGES[facts["muco.storage"]]
        self._repaired = False  # whether each id is known to be there once
        self._model: Model | None = None  # encodes queries, one thread at a time
        self._encoding = threading.Lock()

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Opens a table that is there; a MucoError if there is none."""
        table = open_rows(connect(path, create=False), path)
        if table is None:
            raise MucoError(f"{path}: no index there; make one with `muco index INPUT --model MODEL --index {path}`")
        return cls(str(path), table)

    @classmethod
    def create(
        cls,
        path: str | Path,
        model: Model,
        *,
        model_path: str | Path = "",
        storage: Name | None = None,
        dimension: int | None = None,
    ) -> Self:
        """Opens a table for adding rows, and makes it if it is not there; ``model`` encodes them, and queries.

        Args:
            model_path: Where the model can be loaded from; kept, for searching.
            storage, dimension: None: those of the table; for a new one, float32 and whole vectors.
        Raises:
            MucoError: If it is there and of another model, dimension or storage.
            StorageError: If its files are missing or cannot be written.
        """
        length = checked_dimension(dimension, model.get_embedding_dimension())
        if storage is not None and storage not in STORAGES:
            raise MucoError(f"storage must be one of {', '.join(STORAGES)}, not {storage!r}")
        database = connect(path, create=True)
        if open_rows(database, path) is None:
            schema = _schema(model, model_path, storage or "float32", length)
            with _lock(path):
                if open_rows(database, path) is None:  # another process may have made it meanwhile
                    with lance_calls(path):
                        database.create_table(TABLE, schema=schema)
        opened = cls(str(path), open_rows(database, path))
        opened._model = opened.checked_model(model)
        there = {"dimension": opened.dimension, "storage": opened.storage.name}
        for name, wanted in (("dimension", dimension), ("storage", storage)):
            if wanted not in (None, there[name]):
                raise OutputError(f"{path}: the index has {name} {there[name]}, not {wanted}; keep it, or name another")
        return opened

    def __len__(self) -> int:
        with lance_calls(self.path):
            return self.table.count_rows()

    @property
    def extra_columns(self) -> dict[str, pa.DataType]:
        """The columns that came with the input."""
        return self.extra_of(self.table.schema)

    def extra_of(self, schema: pa.Schema) -> dict[str, pa.DataType]:
        """The same, from the given schema."""
        own = (*OWN, *self.storage.columns, WIDER, FORMER)
        return {field.name: field.type for field in schema if field.name not in own}

    def check(self, fingerprint: str, name: str) -> None:
        """Raises a MucoError unless the model of that fingerprint made the table; ``name`` is what it says."""
        if fingerprint != self.fingerprint:
            raise MucoError(
                f"{self.path}: the index was made with the model {self.model_path or '(no path)'} "
                f"({self.fingerprint[:12]}), not with {name} ({fingerprint[:12]}), and vectors of two models do "
                "not compare; use the former, or make another index"
            )

    def checked_model(self, model: Model | str | Path, *, precision: Precision | None = None) -> Model:
        """The model, loaded if a path is given; a MucoError if it cannot be loaded, or did not make the table."""
        name = str(model) if isinstance(model, (str, Path)) else "the given model"
        if isinstance(model, (str, Path)) and not str(model):
            raise MucoError(f"{self.path}: the index does not say where its model is; name it (--model)")
        from muco.model import loaded

        model = loaded(model, precision=precision)
        self.check(model.fingerprint, name)
        return model

    # ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def vectors_of(self, contents: Sequence[str]) -> Iterator[tuple[str, np.ndarray, bytes | None]]:
        """Content hash, vector (float32 [dimension]) and thumbnail of each row that has one of these contents."""
        found = self.rows_where("content_hash", contents, ["content_hash", "thumbnail", *self.storage.columns])
        if not len(found):
            return
        names = (found.column(name).to_pylist() for name in ("content_hash", "thumbnail"))
        for content, picture, vector in zip(*names, self.storage.vectors(found, self.dimension), strict=True):
            yield content, vector, picture

    def ids(self) -> Iterator[list[str]]:
        """All ids, some thousands at a time."""
        for batch in self.batches(None, ["id"]):
            yield batch.column("id").to_pylist()

    def batches(self, where: str | None, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """All rows that a filter lets through, some thousands at a time."""
        with lance_calls(self.path, where):
            yield from read(self.table.search(), where, columns)

    def rows_where(self, column: str, values: Sequence[str], columns: Sequence[str]) -> pa.Table:
        """Rows that have one of the values in a column, in any order."""
        if not values:
            return self.table.schema.empty_table().select(list(columns))
        return self.found(self.table.search(), f"{column} IN ({', '.join(map(quoted, values))})", columns)

    def found(self, search: Any, where: str | None, columns: Sequence[str]) -> pa.Table:
        """All that a search of LanceDB finds."""
        with lance_calls(self.path, where):
            return read(search, where, columns).read_all()

    # ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def delete(self, ids: Iterable[Any]) -> int:
        """Removes the rows of ids, as :meth:`muco.search.Index.add` takes them; returns how many there were."""
        if isinstance(ids, (str, bytes, Mapping)) or not isinstance(ids, Iterable):
            raise DataError(f"pass a list of ids, not one {type(ids).__name__}")
        ids = [checked_id(id) for id in ids]
        with self.writing():
            before = len(self)
            for start in range(0, len(ids), IDS):
                self.table.delete(f"id IN ({', '.join(map(quoted, ids[start : start + IDS]))})")
            return before - len(self)

    def write(self, rows: pa.Table) -> None:
        """Adds rows of this table's schema, replacing those of the same ids, at once or not at all.

        Columns that another writer has added meanwhile are null in them; those it has widened hold their values.
        """
        with self.writing():
            for field in self.table.schema:
                if field.name not in rows.column_names:
                    rows = rows.append_column(field, pa.nulls(len(rows), field.type))
            merge = self.table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
            merge.execute(rows.select(self.table.schema.names).cast(self.table.schema))

    @contextmanager
    def writing(self) -> Iterator[None]:
        """One writer at a time, on the newest version of the table and with each id there once. Readers never wait.

        Each write takes the lock for itself, so two runs take turns; an id that both have is as the later one wrote it.
        """
        with _lock(self.path), lance_calls(self.path):
            self.table.checkout_latest()
            if not self._repaired:
                self._repair()
                self._repaired = True
            yield

    def _repair(self) -> None:
        """Leaves one row per id, where writers that knew no lock left several: the one that was written last."""
        hashes = [np.fromiter(map(hash, ids), np.int64, len(ids)) for ids in self.ids()]
        values, counts = np.unique(np.concatenate([np.empty(0, np.int64), *hashes]), return_counts=True)
        doubled = set(values[counts > 1].tolist())
        if not doubled:
            return
        rows: dict[str, list[int]] = {}
        for batch in self.batches(None, ["id", "_rowid"]):
            for id, row in zip(batch.column("id").to_pylist(), batch.column("_rowid").to_pylist(), strict=True):
                if hash(id) in doubled:
                    rows.setdefault(id, []).append(row)
        older = [row for found in rows.values() for row in sorted(found)[:-1]]
        for start in range(0, len(older), IDS):
            self.table.delete(f"_rowid IN ({', '.join(map(str, older[start : start + IDS]))})")
        told = (
            "%s: %d ids were there more than once, left by two writers at a time; of each, the last written row is kept"
        )
        log.warning(told, self.path, sum(len(found) > 1 for found in rows.values()))

    def optimize(self) -> None:
        """Joins small files, takes new rows into the indices, and builds indices that now pay."""
        with self.writing():
            self.table.optimize(cleanup_older_than=OLD)
            build_indices(self.table, self.storage, self.dimension)


def _schema(model: Model, model_path: str | Path, storage: Name, dimension: int) -> pa.Schema:
    prompt = model.encoder.muco_processor.settings()["template"]
    is_file = bool(model_path) and Path(model_path).exists()
    facts = {
        "muco.model": model.fingerprint,
        "muco.model_path": str(Path(model_path).resolve() if is_file else model_path),
        "muco.dimension": str(dimension),
        "muco.storage": storage,
        "muco.version": VERSION,
        "muco.prompt": json.dumps(prompt, ensure_ascii=False),
    }
    own = [pa.field(name, pa.binary() if name == "thumbnail" else pa.string()) for name in OWN]
    return pa.schema([*own, *STORAGES[storage].fields(dimension)], metadata=facts)


def _lock(path: str | Path) -> AbstractContextManager[None]:
    """One writer at a time; object storage has no locks."""
    return claimed(path, wait=WAIT) if is_local(path) else nullcontext()
