"""The index: a LanceDB table with one row per id, opened for searching or for writing.

Its columns: ``id``, the vector (see storage.py), ``text``, ``image`` (path as given), ``thumbnail`` (JPEG),
``content_hash`` (of what was encoded), ``row_hash`` (of everything the input says), and the input's further columns.
What makes its vectors (model, dimension, prompt, storage) stands in the table's metadata.

A search takes candidates from the table and scores them again from their stored vectors, so that every score is a
cosine, whatever index found the row. Candidates are all rows up to ANN_ROWS; beyond, those that an IVF index
(benchmarks/index.py says why this one) gives.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from muco.base.files import claimed
from muco.base.machine import VERSION
from muco.data.lines import whole_text
from muco.errors import DataError, MucoError, OutputError, StorageError
from muco.search.columns import as_id
from muco.search.filter import checked_filter, quoted
from muco.search.lance import lance_calls
from muco.search.storage import STORAGES, Name, Storage, scores
from muco.sizes import checked_dimension

if TYPE_CHECKING:
    import pyarrow as pa

    from muco.model import Model

TABLE = "rows"
HASHES = ("content_hash", "row_hash")
OWN = ("id", "text", "image", "thumbnail", *HASHES)  # besides those of the storage
WIDER, FORMER = "_wider", "_former"  # a column that is being given another type
ANN_ROWS = 10_000  # from here on an index of vectors pays, and one of ids and hashes
ANN_NAME = "ann_"  # and the number of rows when it was trained
RETRAIN = 4  # times so many rows, and it is trained anew
PARTITION_ROWS = 4096
PROBES = 20  # partitions searched
CANDIDATES = {"cosine": 10, "hamming": 30}  # scored again per hit, by the metric that finds them
ENOUGH_BITS = 256  # numbers of a vector from which on one bit of each finds good candidates
FEWEST = 10  # hits whose candidates are looked at, where fewer are asked for
LARGEST_K = 10_000
STALE = timedelta(seconds=5)  # how far a reader may lag behind a writer
OLD = timedelta(minutes=1)  # no reader can still use a version so much older
IDS = 1000  # per delete statement
WAIT = 3600.0  # seconds for the writer before, which may be building an index of vectors

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Hit:
    """One found row. ``score`` is a cosine; ``thumbnail`` a small JPEG; ``extra`` holds the input's further columns."""

    id: str
    score: float
    text: str | None = None
    image: str | None = None
    thumbnail: bytes | None = None
    extra: dict[str, Any] = field(default_factory=dict)


class Index:
    """An open index. Many threads and processes may search and write at once; writers take turns."""

    def __init__(self, path: str, table: Any, model: Model | str | Path | None = None) -> None:
        self.path, self.table = path, table
        facts = {k.decode(): v.decode() for k, v in (table.schema.metadata or {}).items()}
        if "muco.model" not in facts or facts.get("muco.storage") not in STORAGES:
            raise MucoError(f"{path}: its table {TABLE!r} was not made by `muco index` of this version")
        self.fingerprint, self.model_path = facts["muco.model"], facts["muco.model_path"]
        self.dimension, self.version, self.prompt = (
            int(facts["muco.dimension"]),
            facts["muco.version"],
            facts["muco.prompt"],
        )
        self.storage: Storage = STORAGES[facts["muco.storage"]]
        self._model, self._encoding = None, threading.Lock()
        self._repaired = False  # whether each id is known to be there once
        if model is not None:
            self._model = self._checked(model)

    @classmethod
    def open(cls, path: str | Path, model: Model | str | Path | None = None) -> Index:
        """Opens an index that is there.

        Args:
            path: A folder, or the URL of one in object storage (``s3://…``; LanceDB reads the usual variables).
            model: What encodes queries; must be the one that made the index. None: that of ``model_path``, loaded when
                it is first needed.
        Raises:
            MucoError: If there is no index, or it is of another model.
        """
        table = _open_table(_connect(path, create=False), path)
        if table is None:
            raise MucoError(f"{path}: no index there; make one with `muco index INPUT --model MODEL --index {path}`")
        return cls(str(path), table, model)

    @classmethod
    def create(
        cls,
        path: str | Path,
        model: Model,
        *,
        model_path: str | Path = "",
        storage: Name | None = None,
        dimension: int | None = None,
    ) -> Index:
        """Opens an index for adding rows, and makes it if it is not there.

        Args:
            model_path: Where the model can be loaded from; kept, for searching.
            storage, dimension: None: what the index has; of a new one, float32 and whole vectors.

        Raises:
            MucoError: If it is there and of another model, dimension or storage.
            StorageError: If its files are missing or cannot be written.
        """
        import pyarrow as pa

        length = checked_dimension(dimension, model.get_embedding_dimension())
        database = _connect(path, create=True)
        if (table := _open_table(database, path)) is not None:
            index = cls(str(path), table, model)
            for name, there, wanted in (
                ("dimension", index.dimension, dimension),
                ("storage", index.storage.name, storage),
            ):
                if wanted not in (None, there):
                    raise OutputError(f"{path}: the index has {name} {there}, not {wanted}; keep it, or name another")
            return index
        storage = storage or "float32"
        if storage not in STORAGES:
            raise MucoError(f"storage must be one of {', '.join(STORAGES)}, not {storage!r}")
        folder = Path(model_path) if model_path else None
        facts = {
            "muco.model": model.fingerprint,
            "muco.model_path": str(folder.resolve() if folder is not None and folder.exists() else model_path),
            "muco.dimension": str(length),
            "muco.storage": storage,
            "muco.version": VERSION,
            "muco.prompt": json.dumps(model.encoder.muco_processor.settings()["template"], ensure_ascii=False),
        }
        text, binary = pa.string(), pa.binary()
        own = [pa.field(name, binary if name == "thumbnail" else text) for name in OWN]
        schema = pa.schema([*own, *STORAGES[storage].fields(length)], metadata=facts)
        with _lock(path):
            if _open_table(database, path) is None:
                with lance_calls(path):
                    database.create_table(TABLE, schema=schema)
        # Another process may have made it: then of its own model and storage.
        return cls.create(path, model, model_path=model_path, storage=storage, dimension=dimension)

    def __len__(self) -> int:
        with lance_calls(self.path):
            return self.table.count_rows()

    @property
    def extra_columns(self) -> dict[str, pa.DataType]:
        """The columns that came with the input."""
        own = (*OWN, *self.storage.columns, WIDER, FORMER)
        return {field.name: field.type for field in self.table.schema if field.name not in own}

    @property
    def compared_columns(self) -> dict[str, pa.DataType]:
        """The columns that a filter may name."""
        own = {name: self.table.schema.field(name).type for name in ("id", "text", "image")}
        return own | self.extra_columns

    @property
    def model(self) -> Model:
        """What encodes queries; loaded when it is first needed."""
        with self._encoding:
            if self._model is None:
                self._model = self._checked(self.model_path)
            return self._model

    def _checked(self, given: Model | str | Path) -> Model:
        name = str(given) if isinstance(given, (str, Path)) else "the given model"
        if isinstance(given, (str, Path)):
            if not str(given):
                raise MucoError(f"{self.path}: the index does not say where its model is; name it (--model)")
            from muco.model import load

            given = load(given)
        self.check(given.fingerprint, name)
        return given

    def check(self, fingerprint: str, name: str) -> None:
        """Whether vectors of a model may be searched for here.

        Args:
            fingerprint: The model's, see ``Model.fingerprint``.
            name: For the message.
        Raises:
            MucoError: If another model made the index.
        """
        if fingerprint != self.fingerprint:
            raise MucoError(
                f"{self.path}: the index was made with the model {self.model_path or '(no path)'} "
                f"({self.fingerprint[:12]}), not with {name} ({fingerprint[:12]}), and vectors of two models do "
                "not compare; use the former, or make another index"
            )

    # ── searching ────────────────────────────────────────────────────────────────────────────────────────────────────

    def search(
        self,
        text: str | None = None,
        *,
        image: Any = None,
        like: Any = None,
        vector: Sequence[float] | np.ndarray | None = None,
        k: int = 10,
        where: str | None = None,
        exact: bool = False,
    ) -> list[Hit]:
        """The k nearest rows, best first; equal scores by id.

        Args:
            text, image: What to look for, either or both (image: path, bytes or Pillow).
            like: The id of a row, as :meth:`add` takes it; finds others like it.
            vector: float [dimension], made by the index's model; any length.
            where: A filter on the columns, see :func:`muco.search.filter.checked_filter`.
            exact: Compare with every row, by the score itself.
        Raises:
            MucoError: If not exactly one of (text and/or image), like, vector is given, there is no such row, the
                filter is refused, or k is not 1 to LARGEST_K.
        """
        if not isinstance(k, Integral) or not 1 <= k <= LARGEST_K:
            raise MucoError(f"k must be 1 to {LARGEST_K:,}, not {k!r}")
        given = [text is not None or image is not None, like is not None, vector is not None]
        if sum(given) != 1:
            raise MucoError("give one query: text and/or image, or like (the id of a row), or vector")
        condition = checked_filter(where and whole_text(where, "where"), self.compared_columns)
        if like is not None:
            like = _asked_id(like)
            query, others = self._vector_of(like), f"id != {quoted(like)}"
            condition = f"({condition}) AND {others}" if condition else others
        elif vector is not None:
            query = self._unit(vector)
        else:
            query = self.encode({k: v for k, v in (("text", text), ("image", image)) if v is not None})
        if exact and self.storage.metric == "hamming":
            best = self._scan(query, k, condition)
        else:
            best = self._candidates(query, k, condition, exact)
        return self._hits(best)

    def encode(self, content: Mapping[str, Any]) -> np.ndarray:
        """The vector of a query, float32 [dimension]; one thread at a time."""
        model = self.model
        short = {"truncate_dim": self.dimension} if self.dimension < model.get_embedding_dimension() else {}
        with self._encoding:
            return model.encode([dict(content)], show_progress_bar=False, **short)[0]

    def _unit(self, vector: Sequence[float] | np.ndarray) -> np.ndarray:
        try:
            array = np.asarray(vector, dtype=np.float32)
        except (RuntimeError, TypeError, ValueError) as error:  # as of texts, or tensors of types that numpy lacks
            raise MucoError(f"a vector must be {self.dimension} numbers of float32 ({error})") from error
        length = np.linalg.norm(array)
        if array.shape != (self.dimension,) or not np.isfinite(length) or not length:
            raise MucoError(f"a vector must be {self.dimension} finite numbers, not all zero, not {array.shape}")
        return array / length

    def _vector_of(self, id: str) -> np.ndarray:
        found = self.rows_by_id([id], self.storage.columns)
        if not len(found):
            raise MucoError(f"{self.path}: no row has the id {id!r}")
        return self._unit(self.storage.vectors(found, self.dimension)[0])

    def _candidates(self, query: np.ndarray, k: int, where: str | None, exact: bool) -> list[tuple[str, float]]:
        search = self.table.search(self.storage.query(query), vector_column_name=self.storage.searched)
        search = search.distance_type(self.storage.metric)
        if exact:
            search = search.bypass_vector_index().limit(k + 1)  # one more, so that equal scores fall as in a sort
        else:
            search = search.nprobes(PROBES).limit(self._looked_at * max(k, FEWEST))
        return self._best(self._read(search, where, ["id", *self.storage.columns, "_distance"]), query, k)

    @property
    def _looked_at(self) -> int:
        """Candidates per hit; the fewer bits find them, the more."""
        few = 1.0 if self.storage.metric == "cosine" else max(1.0, ENOUGH_BITS / self.dimension)
        return round(CANDIDATES[self.storage.metric] * few)

    def _scan(self, query: np.ndarray, k: int, where: str | None) -> list[tuple[str, float]]:
        best: list[tuple[str, float]] = []
        for batch in self._batches(where, ["id", *self.storage.columns]):
            best = sorted(best + self._best(batch, query, k), key=_order)[:k]
        return best

    def _best(self, rows: pa.Table | pa.RecordBatch, query: np.ndarray, k: int) -> list[tuple[str, float]]:
        if not len(rows):
            return []
        found = scores(self.storage.vectors(rows, self.dimension), query)
        return sorted(zip(rows.column("id").to_pylist(), found.tolist(), strict=True), key=_order)[:k]

    def _hits(self, best: list[tuple[str, float]]) -> list[Hit]:
        """Fetched by id, for row numbers would mean other rows after a writer's compaction."""
        extra = [*self.extra_columns]
        found = self.rows_by_id([id for id, _ in best], ["id", "text", "image", "thumbnail", *extra])
        rows = {row["id"]: row for row in found.to_pylist()}
        return [
            Hit(id, score, row["text"], row["image"], row["thumbnail"], {name: row[name] for name in extra})
            for id, score in best
            if (row := rows.get(id))
        ]

    # ── rows ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def rows_by_id(self, ids: Sequence[str], columns: Sequence[str]) -> pa.Table:
        """Rows that have one of the ids, in any order."""
        return self.rows_where("id", ids, columns)

    def rows_where(self, column: str, values: Sequence[str], columns: Sequence[str]) -> pa.Table:
        if not values:
            return self.table.schema.empty_table().select(list(columns))
        return self._read(self.table.search(), f"{column} IN ({', '.join(map(quoted, values))})", columns)

    def _read(self, search: Any, where: str | None, columns: Sequence[str]) -> pa.Table:
        with lance_calls(self.path, where):
            return _query(search, where, columns).read_all()

    def _batches(self, where: str | None, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        with lance_calls(self.path, where):
            yield from _query(self.table.search(), where, columns)

    def vectors_of(self, contents: Sequence[str]) -> Iterator[tuple[str, np.ndarray, bytes | None]]:
        """Content hash, vector and thumbnail of what the table holds of these contents."""
        found = self.rows_where("content_hash", contents, ["content_hash", "thumbnail", *self.storage.columns])
        if not len(found):
            return
        names = (found.column(name).to_pylist() for name in ("content_hash", "thumbnail"))
        for content, picture, vector in zip(*names, self.storage.vectors(found, self.dimension), strict=True):
            yield content, vector, picture

    def ids(self) -> Iterator[list[str]]:
        """All ids, some thousands at a time."""
        for batch in self._batches(None, ["id"]):
            yield batch.column("id").to_pylist()

    def add(self, rows: Iterable[Mapping[str, Any]] | Any, *, batch_size: int = 32) -> dict[str, Any]:
        """Encodes rows and writes them; a row whose id is there is replaced, one that is there as it is costs nothing.

        Args:
            rows: Mappings with ``id``, ``text`` and/or ``image`` (path, bytes or Pillow), and further columns: a list,
                a generator, a DataFrame of pandas or polars, a table of Arrow, or a dataset of Hugging Face. An id is
                text, a whole number (5 is "5") or a UUID. None, NaN, NaT, NA and an absent key are missing. What a
                further column holds: see :mod:`muco.search.columns`.
        Returns:
            As :func:`muco.search.update.build`.
        Raises:
            DataError: If these are not rows, an id is missing or of another type, or a column of the index cannot take
                the values. What is wrong with one row otherwise is in ``errors``.
        """
        from muco.search.update import add_rows

        return add_rows(self, rows, batch_size=batch_size)

    # ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def delete(self, ids: Iterable[Any]) -> int:
        """Removes rows; returns how many there were.

        Args:
            ids: As :meth:`add` takes them: a list, a column of a table, a generator.
        """
        if isinstance(ids, (str, bytes, Mapping)) or not isinstance(ids, Iterable):
            raise DataError(f"give a list of ids, not one {type(ids).__name__}")
        ids = [_asked_id(id) for id in ids]
        with self._writing():
            before = len(self)
            for start in range(0, len(ids), IDS):
                self.table.delete(f"id IN ({', '.join(map(quoted, ids[start : start + IDS]))})")
            return before - len(self)

    def write(self, rows: pa.Table) -> None:
        """Adds rows of this table's schema, replacing those of the same ids, at once or not at all.

        Columns that another writer has added meanwhile are null in them; those it has widened hold their values.
        """
        import pyarrow as pa

        with self._writing():
            for field in self.table.schema:
                if field.name not in rows.column_names:
                    rows = rows.append_column(field, pa.nulls(len(rows), field.type))
            writing = self.table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
            writing.execute(rows.select(self.table.schema.names).cast(self.table.schema))

    def add_columns(self, fields: Sequence[pa.Field]) -> None:
        """Adds columns, null in every row, but for those that are there."""
        with self._writing():
            if new := [field for field in fields if field.name not in self.table.schema.names]:
                self.table.add_columns(new)

    def repair(self) -> None:
        """Sees to it that each id is there once, and that the newest version of the table is looked at."""
        with self._writing():
            pass

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """One writer at a time, on the newest version of the table. Readers never wait.

        Each write takes the lock for itself, so that two runs into one index take turns; an id that both have is
        there once, as the later one wrote it.
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
        for batch in self._batches(None, ["id", "_rowid"]):
            for id, row in zip(batch.column("id").to_pylist(), batch.column("_rowid").to_pylist(), strict=True):
                if hash(id) in doubled:
                    rows.setdefault(id, []).append(row)
        older = [row for found in rows.values() for row in sorted(found)[:-1]]
        for start in range(0, len(older), IDS):
            self.table.delete(f"_rowid IN ({', '.join(map(str, older[start : start + IDS]))})")
        log.warning(
            "%s: %d ids were there more than once, as two writers at a time left them; of each the row that was "
            "written last is kept",
            self.path,
            sum(len(found) > 1 for found in rows.values()),
        )

    def drop_unfinished(self) -> None:
        """Drops what a run left that was killed while it widened a column; the column itself is whole."""
        with self._writing():  # else another run may still be widening it
            if left := [name for name in (WIDER, FORMER) if name in self.table.schema.names]:
                self.table.drop_columns(left)

    def fits(self, column: str, kind: pa.DataType) -> bool:
        """Whether all values of a further column fit another type without loss."""
        import pyarrow as pa
        import pyarrow.types as types

        if types.is_decimal(self.extra_columns[column]) and types.is_floating(kind):
            return False
        try:
            for batch in self._batches(None, [column]):
                batch.column(0).cast(kind)
        except pa.ArrowInvalid:
            return False
        return True

    def widen(self, column: str, kind: pa.DataType) -> None:
        """Gives a further column another type, which its values fit."""
        with self._writing():
            self._widen(column, kind)

    def _widen(self, column: str, kind: pa.DataType) -> None:
        import pyarrow.types as types

        if not types.is_integer(self.extra_columns[column]) or types.is_integer(kind):
            self.table.alter_columns({"path": column, "data_type": kind})
            return
        # LanceDB alters no whole numbers to others, but it casts them: a new column takes the name of the old one
        name = f"DECIMAL({kind.precision}, {kind.scale})" if types.is_decimal(kind) else "DOUBLE"
        self.table.add_columns({WIDER: f"CAST(`{column}` AS {name})"})
        self.table.alter_columns({"path": column, "rename": FORMER}, {"path": WIDER, "rename": column})
        self.table.drop_columns([FORMER])

    def optimize(self) -> None:
        """Joins small files, takes new rows into the indices, and builds indices that now pay."""
        with self._writing():
            self._optimize()

    def _optimize(self) -> None:
        from lancedb.index import BTree, IvfFlat, IvfRq

        self.table.optimize(cleanup_older_than=OLD)
        rows = len(self)
        if rows < ANN_ROWS:
            return
        indices = {index.name: index for index in self.table.list_indices()}
        for column in ("id", "content_hash"):
            if not any(index.columns == [column] for index in indices.values()):
                self.table.create_index(column, config=BTree())
        trained = [int(name.removeprefix(ANN_NAME)) for name in indices if name.startswith(ANN_NAME)]
        if trained and rows < RETRAIN * max(trained):
            return
        flat = self.storage.metric == "hamming" or self.dimension < ENOUGH_BITS or self.dimension % 8
        kind = IvfFlat if flat else IvfRq
        config = kind(distance_type=self.storage.metric, num_partitions=max(1, rows // PARTITION_ROWS))
        self.table.create_index(self.storage.searched, config=config, name=f"{ANN_NAME}{rows}", replace=True)
        for old in trained:
            self.table.drop_index(f"{ANN_NAME}{old}")


def _asked_id(id: Any) -> str:
    """The id of a row to look for."""
    return whole_text(id if isinstance(id, str) else as_id(id, "the id"), "id")


def _order(found: tuple[str, float]) -> tuple[float, str]:
    return -found[1], found[0]


def _query(search: Any, where: str | None, columns: Sequence[str]) -> pa.RecordBatchReader:
    return (search.where(where) if where else search).select([*columns]).to_batches()


def _lock(path: str | Path) -> AbstractContextManager[None]:
    """One writer at a time; object storage has no locks."""
    return nullcontext() if "://" in str(path) else claimed(path, wait=WAIT)


def _connect(path: str | Path, *, create: bool) -> Any:
    try:
        import lancedb
    except ImportError as error:
        raise MucoError("the index needs LanceDB: pip install 'muco[search]'") from error
    local = "://" not in str(path)
    if local and not create and not Path(path).is_dir():
        raise MucoError(f"{path}: no such folder; make an index with `muco index INPUT --model MODEL --index {path}`")
    if local and create and Path(path).exists() and not Path(path).is_dir():
        raise OutputError(f"{path}: an index is a folder, and this is a file; name another")
    with lance_calls(path):
        return lancedb.connect(str(path), read_consistency_interval=STALE if not create else timedelta(0))


def _open_table(database: Any, path: str | Path) -> Any:
    """The table, or None; also None of one whose making was interrupted, which can be made again."""
    with lance_calls(path):
        try:
            return database.open_table(TABLE)
        except ValueError as error:
            if "was not found" not in str(error):
                raise
    if "://" not in str(path) and any(Path(path).glob(f"{TABLE}.lance/data/*")):
        raise StorageError(f"{path}: rows are there, but not what tells of them; copy the index again, or delete it")
    return None
