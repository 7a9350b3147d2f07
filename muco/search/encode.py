"""From rows to vectors and thumbnails: in this process, or by Daft in several, on this machine or a Ray cluster.

Both ways run :func:`encoded` on batches of rows, so they give the same vectors. Daft starts the model once per process
and part of the input, which is why it is worth while for large inputs only, and on one machine only where one process
leaves devices or cores idle.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from muco.base.daft import daft_on
from muco.data.items import Row
from muco.embed.vectors import DECODERS, encode_rows, in_batches, opened_rows
from muco.errors import MucoError

if TYPE_CHECKING:
    from muco.model import Model

SIDE = 160  # px: a thumbnail has at most the pixels of such a square
QUALITY = 80
Encoded = tuple[Row, bytes | None]  # the row with its vector or error and without its image; the thumbnail
Encoder = Callable[[Iterable[Row]], Iterator[Encoded]]  # in any order


def thumbnail(image: Any) -> bytes:
    """A small JPEG of a Pillow image."""
    from muco.images import resize_to_budget

    stream = io.BytesIO()
    resize_to_budget(image, SIDE * SIDE).save(stream, "JPEG", quality=QUALITY)
    return stream.getvalue()


def encoded(model: Model, dimension: int, batch_size: int, rows: Iterable[Row]) -> Iterator[Encoded]:
    """Each row with its vector or its error, and the thumbnail of its image."""
    short = {"truncate_dim": dimension} if dimension < model.get_embedding_dimension() else {}
    encode = partial(model.encode, show_progress_bar=False, **short)
    with ThreadPoolExecutor(DECODERS) as pool, closing(opened_rows(rows, ahead=2 * batch_size)) as opened:
        for batch in in_batches(opened, batch_size):
            small = pool.map(lambda row: thumbnail(row.images[0]) if row.images else None, batch)
            yield from zip(encode_rows(encode, batch), small, strict=True)


def on_daft(
    model_path: str, fingerprint: str, dimension: int, batch_size: int, workers: int, ray: str | None
) -> Encoder:
    """An encoder of ``workers`` processes that hold a model each.

    Args:
        model_path: Folder or hub id, readable by every process.
        fingerprint: Of the model that it must be.
        ray: Address of a Ray cluster whose machines see the same paths; None: this machine.
    """
    daft = daft_on(ray, "search")
    result = daft.DataType.struct(
        {
            "number": daft.DataType.int64(),
            "vector": daft.DataType.embedding(daft.DataType.float32(), dimension),
            "thumbnail": daft.DataType.binary(),
            "error": daft.DataType.string(),
        }
    )

    class Embed:
        def __init__(self, path: str, wanted: str) -> None:
            from muco.model import load

            self.model = load(path)
            if self.model.fingerprint != wanted:
                raise MucoError(f"{path}: the model changed, or is another one where a worker runs")

        @daft.method.batch(return_dtype=result, batch_size=8 * batch_size)
        def __call__(self, number: Any, text: Any, paths: Any, data: Any) -> list[dict[str, Any]]:
            columns = (number.to_pylist(), text.to_pylist(), paths.to_pylist(), data.to_pylist())
            rows = [
                Row(n, "", "", t, tuple(Path(path) if path else read for path, read in zip(p, d, strict=True)))
                for n, t, p, d in zip(*columns, strict=True)
            ]
            return [
                {"number": row.number, "vector": row.vector, "thumbnail": picture, "error": row.error}
                for row, picture in encoded(self.model, dimension, batch_size, rows)
            ]

    embed = daft.cls(Embed, use_process=True, max_concurrency=workers, gpus=_gpus())(model_path, fingerprint)

    def encode(rows: Iterable[Row]) -> Iterator[Encoded]:
        by_number = {row.number: row for row in rows}
        if not by_number:
            return
        images = [row.images for row in by_number.values()]
        frame = daft.from_pydict(
            {
                "number": [*by_number],
                "text": [row.text for row in by_number.values()],
                "paths": [[str(image) if isinstance(image, (str, Path)) else None for image in own] for own in images],
                "data": [[image if isinstance(image, bytes) else None for image in own] for own in images],
            }
        )
        frame = frame.select(embed(*(daft.col(name) for name in ("number", "text", "paths", "data"))).alias("result"))
        for record in frame.iter_rows():
            found = record["result"]
            outcome = {"error": found["error"]} if found["error"] else {"vector": np.float32(found["vector"])}
            yield replace(by_number[found["number"]], images=(), **outcome), found["thumbnail"]

    return encode


def _gpus() -> int:
    import torch

    return int(torch.cuda.is_available())
