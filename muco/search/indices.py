"""The indices of a table that has become large: of vectors, so that not every row is compared, and of ids and hashes.

benchmarks/index.py says why the vectors have an IVF index.
"""

from __future__ import annotations

from typing import Any

from muco.search.storage import Storage

ANN_ROWS = 10_000  # from this many rows on, indices of vectors, ids and hashes pay
ANN_NAME = "ann_"  # and the number of rows when it was trained
RETRAIN = 4  # the index of vectors is trained again when the rows have grown by this factor
PARTITION_ROWS = 4096
PROBES = 20  # partitions searched
ENOUGH_BITS = 256  # dimensions from which on one bit of each finds good candidates


def build_indices(table: Any, storage: Storage, dimension: int) -> None:
    """Builds the indices that pay and are not there yet.

    Args:
        table: LanceDB's, which nobody else writes to meanwhile.
        dimension: Of its vectors.
    """
    from lancedb.index import BTree

    rows = table.count_rows()
    if rows < ANN_ROWS:
        return
    indices = list(table.list_indices())
    for column in ("id", "content_hash"):
        if not any(index.columns == [column] for index in indices):
            table.create_index(column, config=BTree())
    trained = [int(index.name.removeprefix(ANN_NAME)) for index in indices if index.name.startswith(ANN_NAME)]
    if trained and rows < RETRAIN * max(trained):
        return
    config = _of_vectors(storage, dimension, partitions=max(1, rows // PARTITION_ROWS))
    table.create_index(storage.searched, config=config, name=f"{ANN_NAME}{rows}", replace=True)
    for old in trained:
        table.drop_index(f"{ANN_NAME}{old}")


def _of_vectors(storage: Storage, dimension: int, partitions: int) -> Any:
    from lancedb.index import IvfFlat, IvfRq

    whole = storage.metric == "hamming" or dimension < ENOUGH_BITS or dimension % 8
    kind = IvfFlat if whole else IvfRq
    return kind(distance_type=storage.metric, num_partitions=partitions)
