"""Rows of images and texts become vectors, in bounded memory."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np

from muco.data.items import Row, decoded_bytes
from muco.dialogue import ImageLike
from muco.errors import DataError

DECODERS = 4  # threads that open images while the model encodes
ROW_BYTES = 1 << 30  # opened images of one row
DECODED_BYTES = 256 << 20  # opened images that wait for the model, and that are in one batch, at most

Encode = Callable[..., "np.ndarray"]  # the model's: contents -> float32 [n, dimension]


def opened_rows(
    rows: Iterable[Row], ahead: int, opened: Callable[[ImageLike], Any], *, threads: int = DECODERS
) -> Iterator[Row]:
    """The rows in order; threads open their images up to ``ahead`` rows in advance, each by ``opened``.

    Fewer rows, down to one per thread, if that many images of the largest size so far take over ``DECODED_BYTES``.
    """
    window: deque[Future[Row]] = deque()
    allowed, largest = threads, 0
    with ThreadPoolExecutor(threads) as pool:
        try:
            for row in chain(rows, (None,)):
                if row is not None:
                    window.append(pool.submit(open_row, row, opened))
                while len(window) > (0 if row is None else allowed):
                    ready = window.popleft().result()
                    largest = max(largest, ready.decoded_bytes)
                    if largest:
                        allowed = max(threads, min(ahead, DECODED_BYTES // largest))
                    yield ready
        finally:
            for future in window:
                future.cancel()


def open_row(row: Row, opened: Callable[[ImageLike], Any]) -> Row:
    """The row with its images opened, or with the reason why one cannot be."""
    if not row.images:
        return row
    try:
        return replace(row, images=open_images(row.images, opened, "the row"))
    except DataError as error:
        return replace(row, images=(), error=str(error))


def open_images(images: Iterable[Any], opened: Callable[[Any], Any], owner: str) -> tuple[Any, ...]:
    """The images of one input, each by ``opened``; a DataError that names the owner if they take over ``ROW_BYTES``."""
    held: list[Any] = []
    for image in images:
        held.append(opened(image))
        if decoded_bytes(held) > ROW_BYTES:
            raise DataError(f"the images of {owner} take over {ROW_BYTES >> 20} MiB; use fewer or smaller ones")
    return tuple(held)


def in_batches(rows: Iterable[Row], batch_size: int) -> Iterator[list[Row]]:
    """Batches of rows with opened images; smaller ones where images are large."""
    batch: list[Row] = []
    for row in rows:
        batch.append(row)
        if len(batch) == batch_size or sum(row.decoded_bytes for row in batch) > DECODED_BYTES:
            yield batch
            batch = []
    if batch:
        yield batch


def encode_rows(encode: Encode, rows: list[Row]) -> list[Row]:
    """Each row with its vector or its error, without its images; rows that have an error already are not encoded."""
    results = iter(_encode(encode, [row for row in rows if row.error is None]))
    encoded = []
    for row in rows:
        result = next(results) if row.error is None else row.error
        outcome = {"error": result} if isinstance(result, str) else {"vector": result}
        encoded.append(replace(row, images=(), **outcome))
    return encoded


def _encode(encode: Encode, rows: list[Row]) -> list[np.ndarray | str]:
    """A vector or a reason per row. If a row of a batch is bad, the rows are encoded one by one, so only it fails."""
    if not rows:
        return []
    contents = [row.content for row in rows]
    try:
        vectors = encode(contents, batch_size=len(rows))
    except DataError as error:
        if len(rows) > 1:
            return [_encode(encode, [row])[0] for row in rows]
        return [re.sub(r"^input 0( turn 1)?: ", "", str(error))]  # the place in this call says nothing to the user
    return [vector if np.isfinite(vector).all() else "the model's vector is not finite" for vector in vectors]
