"""How vectors are stored in the table: whole, as half-precision numbers, or as one bit per component.

LanceDB indexes float columns by cosine, and bits by the number of bits that differ.

============  ==================================  ==============================  =============================
storage       bytes per vector of d dimensions     candidates by                   score
============  ==================================  ==============================  =============================
``float32``   4 d                                 cosine                          cosine
``float16``   2 d                                 cosine                          cosine of the rounded vector
``binary``    d / 8                               bits that differ                query times signs, see below
============  ==================================  ==============================  =============================

A binary score is the cosine of the query, whole, with the vector of signs. It ranks better than counting bits, and it
is lower than the true cosine: about 0.8 where that is 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa

Name = Literal["float32", "float16", "binary"]
VECTOR, BITS = "vector", "bits"


@dataclass(frozen=True)
class Storage:
    """One way of keeping vectors; ``columns`` are its column names, ``metric`` is LanceDB's for ``searched``."""

    name: Name
    columns: tuple[str, ...]
    searched: str
    metric: Literal["cosine", "hamming"]
    encode: Callable[[np.ndarray], dict[str, np.ndarray]]  # float32 [n, d] unit vectors -> values of the columns
    decode: Callable[
        [dict[str, np.ndarray], int], np.ndarray
    ]  # back to float32 [n, d]; encoding it again changes nothing

    def fields(self, dimension: int) -> list[pa.Field]:
        arrays = self.arrays(np.zeros((1, dimension), dtype=np.float32))
        return [pa.field(column, array.type) for column, array in zip(self.columns, arrays, strict=True)]

    def arrays(self, vectors: np.ndarray) -> list[pa.Array]:
        values = self.encode(vectors)
        return [pa.FixedSizeListArray.from_arrays(values[c].reshape(-1), values[c].shape[1]) for c in self.columns]

    def vectors(self, table: pa.Table | pa.RecordBatch, dimension: int) -> np.ndarray:
        """float32 [n, d] of the rows of a table that has the columns."""
        return self.decode({column: _numbers(table, column) for column in self.columns}, dimension)

    def query(self, vector: np.ndarray) -> np.ndarray:
        """What LanceDB compares the searched column with."""
        return self.encode(vector[None])[self.searched][0]


def scores(vectors: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Cosines, -1 to 1, of decoded vectors, float32 [n, d], with a unit vector, float32 [d].

    Equal vectors have equal scores: a product of matrices rounds its last rows in another order on some processors.
    """
    lengths = np.maximum(np.linalg.norm(vectors, axis=1), np.finfo(np.float32).tiny)
    return np.clip(np.einsum("nd,d->n", vectors, query) / lengths, -1, 1)  # rounding alone would lead to 1.0000001


def _numbers(table: pa.Table | pa.RecordBatch, column: str) -> np.ndarray:
    array = table.column(column)
    array = array.combine_chunks() if hasattr(array, "combine_chunks") else array
    return array.flatten().to_numpy(zero_copy_only=False).reshape(len(array), array.type.list_size)


def _half(vectors: np.ndarray) -> dict[str, np.ndarray]:
    return {VECTOR: vectors.astype(np.float16)}


def _signs(values: dict[str, np.ndarray], dimension: int) -> np.ndarray:
    bits = np.unpackbits(values[BITS], axis=1, count=dimension)
    return (2 * bits.astype(np.float32) - 1) / math.sqrt(dimension)


STORAGES: dict[str, Storage] = {
    storage.name: storage
    for storage in (
        Storage("float32", (VECTOR,), VECTOR, "cosine", lambda whole: {VECTOR: whole}, lambda kept, _: kept[VECTOR]),
        Storage("float16", (VECTOR,), VECTOR, "cosine", _half, lambda kept, _: kept[VECTOR].astype(np.float32)),
        Storage("binary", (BITS,), BITS, "hamming", lambda vectors: {BITS: np.packbits(vectors > 0, axis=1)}, _signs),
    )
}
