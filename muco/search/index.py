"""The index: a table of vectors (table.py), opened for searching.

A search takes candidates from the table and scores them again from their stored vectors, so that every score is a
cosine, whatever found the row. In a small table all rows are candidates; in a large one, those that its index of
vectors finds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
from muco.search.lance import ENOUGH_BITS, PROBES
from muco.search.storage import scores
from muco.search.table import Table
from muco.search.update import add_rows

if TYPE_CHECKING:
    from muco.model import Model

CANDIDATES = {"cosine": 10, "hamming": 30}  # scored again per hit, by the metric that finds them
FEWEST = 10  # hits whose candidates are looked at, even if fewer are asked for
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
                missing.
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
            raise MucoError(
                "pass one query: a text, an image or both; or the id of a row (like); or in Python a vector"
            )
        own = {name: self.table.schema.field(name).type for name in ("id", "text", "image")}
        condition = checked_filter(where and whole_text(where, "where"), own | self.extra_columns)
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
        return self._hits(self._candidates(query, k, condition, exact))

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

    def _candidates(self, query: np.ndarray, k: int, where: str | None, exact: bool) -> list[tuple[str, float]]:
        columns = ["id", *self.storage.columns]
        best: list[tuple[str, float]] = []
        if exact and self.storage.metric == "hamming":
            for batch in self.batches(where, columns):
                best = sorted(best + self._best(batch, query, k), key=_order)[:k]
            return best
        search = self.table.search(self.storage.query(query), vector_column_name=self.storage.searched)
        search = search.distance_type(self.storage.metric)
        if exact:
            search = search.bypass_vector_index().limit(k + 1)  # one more, so that equal scores fall as in a sort
        else:  # the fewer bits find them, the more candidates
            few = 1.0 if self.storage.metric == "cosine" else max(1.0, ENOUGH_BITS / self.dimension)
            per_hit = round(CANDIDATES[self.storage.metric] * few)
            search = search.nprobes(PROBES).limit(per_hit * max(k, FEWEST))
        return self._best(self.found(search, where, [*columns, "_distance"]), query, k)

    def _best(self, rows: pa.Table | pa.RecordBatch, query: np.ndarray, k: int) -> list[tuple[str, float]]:
        if not len(rows):
            return []
        found = scores(self.storage.vectors(rows, self.dimension), query)
        return sorted(zip(rows.column("id").to_pylist(), found.tolist(), strict=True), key=_order)[:k]

    def _hits(self, best: list[tuple[str, float]]) -> list[Hit]:
        """Fetched by id, because row numbers would mean other rows after a writer's compaction."""
        extra = [*self.extra_columns]
        found = self.rows_where("id", [id for id, _ in best], ["id", "text", "image", "thumbnail", *extra])
        rows = {row["id"]: row for row in found.to_pylist()}
        hits = []
        for id, score in best:
            if row := rows.get(id):  # else deleted meanwhile
                further = {name: row[name] for name in extra}
                hits.append(Hit(id, score, row["text"], row["image"], row["thumbnail"], further))
        return hits


def _order(found: tuple[str, float]) -> tuple[float, str]:
    return -found[1], found[0]
