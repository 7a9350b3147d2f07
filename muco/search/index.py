"""The index: a table of vectors (table.py), opened for searching.

A search takes candidates from the table and scores them again from their stored vectors, so that every score is a
cosine, whatever found the row. In a small table all rows are candidates; in a large one, those that its index of
vectors finds. LanceDB itself scores candidates by their vectors and reads the rest of the best alone; bits it can only
count, so their candidates are scored here, and the best are read by id.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pyarrow as pa

from muco.data.lines import whole_text
from muco.errors import MucoError
from muco.search.columns import checked_id
from muco.search.filter import checked_filter, quoted
from muco.search.lance import ANN_ROWS, ENOUGH_BITS, PROBES
from muco.search.storage import scores
from muco.search.table import Table
from muco.search.update import add_rows

if TYPE_CHECKING:
    from muco.model import Model

CANDIDATES = 10  # rows per hit that an index of vectors finds, and whose stored vectors are compared
CANDIDATES_BY_BITS = 30  # the same for an index of bits, which tell less
FEWEST = 10  # hits whose candidates are looked at, even if fewer are asked for
ORDERED = 1000  # the first hits are found by thousands where the last ones score the same, to order them by id
LARGEST_K = 10_000


@dataclass(frozen=True)
class Hit:
    """One found row. ``score`` is a cosine; ``thumbnail`` a small JPEG; ``extra`` holds the input's further columns."""

    id: str
    score: float
    text: str | None = None
    image: str | None = None
    thumbnail: bytes | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def columns(self) -> dict[str, Any]:
        """Every column with a name that a filter knows."""
        return {"id": self.id, "text": self.text, "image": self.image} | self.extra


class Index(Table):
    """An open index. Many threads and processes may search and write at once; writers take turns."""

    @classmethod
    def open(cls, path: str | Path, model: Model | str | Path | None = None) -> Self:
        """Opens an index that is there.

        Args:
            path: A folder, or the URL of one in object storage (``s3://…``; LanceDB reads the usual variables).
            model: Encodes queries; must have made the index. None: that of ``model_path``, loaded when first needed.
        Raises:
            MucoError: If there is no index, or it is of another model.
        """
        index = super().open(path)
        if model is not None:
            index._model = index.checked_model(model)
        return index

    @property
    def model(self) -> Model:
        """The model that encodes queries; loaded when it is first needed."""
        with self._encoding:
            if self._model is None:
                self._model = self.checked_model(self.model_path)
            return self._model

    def add(self, rows: Iterable[Mapping[str, Any]] | Any, *, batch_size: int = 32) -> dict[str, Any]:
        """Encodes rows and writes them; a row whose id is there is replaced, one that is there as it is costs nothing.

        Args:
            rows: Mappings with ``id`` (text, a whole number or a UUID), ``text`` and/or ``image`` (path, bytes or
                Pillow), and further columns, see :mod:`muco.search.columns`: a list, a generator, a DataFrame of pandas
                or polars, a table of Arrow, or a dataset of Hugging Face. None, NaN, NaT, NA and an absent key are
                missing. All rows are held in memory, with Pillow images as PNG; files are read as they are needed.
        Returns:
            As :func:`muco.search.update.build`.
        Raises:
            DataError: If these are not rows, an id is missing or of another type, or a column of the index cannot take
                the values. Anything else that is wrong with a row is in ``errors``.
        """
        return add_rows(self, rows, self.model, batch_size=batch_size)

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
        hidden: Collection[str] = (),
    ) -> list[Hit]:
        """The k nearest rows, best first; equal scores by id (without ``exact``, in each thousand of hits).

        Args:
            text, image: What to look for, either or both (image: path, bytes or Pillow).
            like: The id of a row, as :meth:`add` takes it; finds others like it.
            vector: float [dimension], made by the index's model; any length.
            where: A filter on the columns, see :func:`muco.search.filter.checked_filter`.
            exact: Compare with every row, by the score itself.
            hidden: Columns that the filter may not name, because whoever wrote it must not learn what they hold.
        Raises:
            MucoError: If not exactly one of (text and/or image), like, vector is given, there is no such row, the
                filter is refused, or k is not 1 to LARGEST_K.
        """
        if isinstance(k, bool) or not isinstance(k, Integral) or not 1 <= k <= LARGEST_K:
            raise MucoError(f"k must be 1 to {LARGEST_K:,}, not {k!r}")
        given = [text is not None or image is not None, like is not None, vector is not None]
        if sum(given) != 1:
            raise MucoError(
                "pass one query: a text, an image or both; or the id of a row (like); or in Python a vector"
            )
        schema = self.table.schema  # once: LanceDB asks another thread for it
        extra = self.extra_of(schema)
        columns = {name: schema.field(name).type for name in ("id", "text", "image")} | extra
        known = {name: kind for name, kind in columns.items() if name not in hidden}
        condition = checked_filter(where and whole_text(where, "where"), known)
        if like is not None:
            like = checked_id(like)
            row = self.rows_where("id", [like], self.storage.columns)
            if not len(row):
                raise MucoError(f"{self.path}: no row has the id {like!r}")
            query, others = self._unit(self.storage.vectors(row, self.dimension)[0]), f"id != {quoted(like)}"
            condition = f"({condition}) AND {others}" if condition else others
        elif vector is not None:
            query = self._unit(vector)
        else:
            query = self.encode({k: v for k, v in (("text", text), ("image", image)) if v is not None})
        return self._nearest(query, k, condition, exact, [*extra])

    def encode(self, content: Mapping[str, Any]) -> np.ndarray:
        """The vector of a query, float32 [dimension]; one thread at a time."""
        model = self.model
        with self._encoding:
            return model.encode([dict(content)], show_progress_bar=False, truncate_dim=self.dimension)[0]

    def _unit(self, vector: Sequence[float] | np.ndarray) -> np.ndarray:
        try:
            array = np.asarray(vector, dtype=np.float32)
        except (RuntimeError, TypeError, ValueError) as error:  # as of texts, or tensors of types that numpy lacks
            raise MucoError(f"a vector must have {self.dimension} dimensions of float32 ({error})") from error
        length = np.linalg.norm(array)
        if array.shape != (self.dimension,) or not np.isfinite(length) or not length:
            raise MucoError(
                f"a vector must have {self.dimension} finite values, not all zero; this one has shape {array.shape}"
            )
        return array / length

    def _nearest(self, query: np.ndarray, k: int, where: str | None, exact: bool, extra: Sequence[str]) -> list[Hit]:
        shown, own = ["id", "text", "image", "thumbnail", *extra], ["id", *self.storage.columns]
        scored = self.storage.metric == "cosine"  # LanceDB orders by the score itself, so its first rows are the hits
        if not scored and (exact or len(self) < ANN_ROWS):
            best, found = self._best_of_all(query, k, where), None
        else:
            columns = [*own, *shown[1:]] if scored else own
            best, found, tied = self._candidates(query, k, max(k, FEWEST), where, exact, columns)
            if tied and exact:
                best, found = self._best_of_all(query, k, where), None
            elif tied:
                best, found, _ = self._candidates(query, k, (k // ORDERED + 1) * ORDERED, where, exact, own)
        if found is None or "text" not in found.column_names:
            found = self.rows_where("id", [id for id, _ in best], shown)
        rows = {row["id"]: row for row in found.select(shown).to_pylist()}
        hits = []
        for id, score in best:
            if row := rows.get(id):  # else deleted meanwhile
                further = {name: row[name] for name in extra}
                hits.append(Hit(id, score, row["text"], row["image"], row["thumbnail"], further))
        return hits

    def _candidates(
        self, query: np.ndarray, k: int, hits: int, where: str | None, exact: bool, columns: Sequence[str]
    ) -> tuple[list[tuple[str, float]], pa.Table, bool]:
        """The k best of the candidates for a number of hits, the candidates, and whether others may score the same."""
        search = self.table.search(self.storage.query(query), vector_column_name=self.storage.searched)
        search = search.distance_type(self.storage.metric)
        if self.storage.metric == "hamming":  # the fewer bits find them, the more candidates
            limit = round(CANDIDATES_BY_BITS * max(1.0, ENOUGH_BITS / self.dimension)) * hits
        else:
            limit = hits + 1
            search = search.bypass_vector_index() if exact else search.refine_factor(CANDIDATES)
        # No maximum (0): while a filter leaves too few candidates, or many are asked for, more partitions are searched,
        # so that fewer rows than the limit are all there are.
        search = search.minimum_nprobes(PROBES).maximum_nprobes(0)
        found = self.found(search.limit(limit), where, [*columns, "_distance"])
        best = self._best(found, query, k)
        if len(found) < limit:
            return best, found, False
        far = found.column("_distance").to_numpy()
        last = found.filter(pa.array(far == far.max())).column("id").to_pylist()
        return best, found, not {id for id, _ in best}.isdisjoint(last)

    def _best_of_all(self, query: np.ndarray, k: int, where: str | None) -> list[tuple[str, float]]:
        best: list[tuple[str, float]] = []
        for batch in self.batches(where, ["id", *self.storage.columns]):
            best = sorted(best + self._best(batch, query, k), key=_order)[:k]
        return best

    def _best(self, rows: pa.Table | pa.RecordBatch, query: np.ndarray, k: int) -> list[tuple[str, float]]:
        if not len(rows):
            return []
        found = scores(self.storage.vectors(rows, self.dimension), query)
        return sorted(zip(rows.column("id").to_pylist(), found.tolist(), strict=True), key=_order)[:k]


def _order(found: tuple[str, float]) -> tuple[float, str]:
    return -found[1], found[0]
