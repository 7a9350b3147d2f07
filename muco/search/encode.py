"""From rows to vectors and thumbnails: in this process, or by Daft in several, on this machine or a Ray cluster.

Both ways run :func:`encoded` on batches of rows, so the vectors are the same. Daft starts the model once per process
and part of the input. So it pays for large inputs only, and on one machine only where one process leaves devices or
cores idle.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from muco.base.daft import daft_on
from muco.base.machine import keep_freed_memory
from muco.data.items import Row
from muco.dialogue import Video
from muco.embed.vectors import DECODERS, encode_rows, in_batches, opened_rows
from muco.errors import MucoError
from muco.images import cover, resize_to_budget

if TYPE_CHECKING:
    from muco.model import Model
    from muco.precision import Precision

SIDE = 160  # px: a thumbnail has at most the pixels of such a square
QUALITY = 80
Encoded = tuple[Row, bytes | None]  # the row with its vector or error and without its image; the thumbnail
RowEncoder = Callable[[Iterable[Row]], Iterator[Encoded]]  # in any order


def thumbnail(image: Any) -> bytes:
    """A small JPEG of a Pillow image."""
    stream = io.BytesIO()
    resize_to_budget(image, SIDE * SIDE).save(stream, "JPEG", quality=QUALITY)
    return stream.getvalue()


def encoded(model: Model, dimension: int, batch_size: int, rows: Iterable[Row]) -> Iterator[Encoded]:
    """Each row with its vector or its error, and the thumbnail of its image."""
    encode = partial(model.encode, show_progress_bar=False, truncate_dim=dimension)
    opening = opened_rows(rows, 2 * batch_size, model.opened)
    with ThreadPoolExecutor(DECODERS) as pool, closing(opening) as opened:
        for batch in in_batches(opened, batch_size):
            small = pool.map(lambda row: thumbnail(cover(row.images[0])) if row.images else None, batch)
            yield from zip(encode_rows(encode, batch), small, strict=True)


def _without_video(images: tuple[Any, ...]) -> tuple[tuple[Any, ...], str]:
    """The images of a row with the sources of its video, which is the last one, behind them; and the rest in JSON."""
    video = images[-1] if images else None
    if not isinstance(video, Video):
        return images, ""
    listed = isinstance(video.source, tuple)
    sources = video.source if listed else (video.source,)
    return (*images[:-1], *sources), json.dumps([len(sources), listed, video.frames, video.fps])


def _with_video(images: tuple[Any, ...], told: str) -> tuple[Any, ...]:
    """The inverse of :func:`_without_video`."""
    if not told:
        return images
    count, listed, frames, fps = json.loads(told)
    sources = images[-count:]
    return (*images[:-count], Video(sources if listed else sources[0], frames, fps))


def taken_place(folder: Path) -> int:
    """A number that no other worker of this machine has: 0, 1, …"""
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    while True:
        try:
            (folder / str(number)).touch(exist_ok=False)
            return number
        except FileExistsError:
            number += 1


class _Worker:
    """The model in a process of Daft."""

    def __init__(
        self, path: str, fingerprint: str, dimension: int, batch_size: int, precision: Precision | None, places: str
    ) -> None:
        import torch

        from muco.model import load

        keep_freed_memory()
        gpus = torch.cuda.device_count()
        device = f"cuda:{taken_place(Path(places)) % gpus}" if gpus else None  # Ray shows a worker its own alone
        self.model, self.dimension, self.batch_size = (
            load(path, device=device, precision=precision),
            dimension,
            batch_size,
        )
        if self.model.fingerprint != fingerprint:
            raise MucoError(f"{path}: the model changed, or is another one where a worker runs")

    def encode(self, *columns: Any) -> list[dict[str, Any]]:
        """The ``result`` of each row; ``columns`` are those that :func:`on_daft` sends."""
        rows = []
        for number, text, paths, data, video in zip(*(column.to_pylist() for column in columns), strict=True):
            images = tuple(Path(path) if path else read for path, read in zip(paths, data, strict=True))
            rows.append(Row(number, "", "", text, _with_video(images, video)))
        return [
            {"number": row.number, "vector": row.vector, "thumbnail": picture, "error": row.error}
            for row, picture in encoded(self.model, self.dimension, self.batch_size, rows)
        ]


def on_daft(
    model_path: str,
    fingerprint: str,
    dimension: int,
    batch_size: int,
    workers: int,
    ray: str | None,
    precision: Precision | None = None,
) -> RowEncoder:
    """An encoder of ``workers`` processes that each load the model of this ``fingerprint`` from ``model_path``.

    They run on this machine, or on the Ray cluster at the address ``ray``, whose machines see the same paths.
    """
    import torch

    daft = daft_on(ray, "search")
    result = daft.DataType.struct(
        {
            "number": daft.DataType.int64(),
            "vector": daft.DataType.embedding(daft.DataType.float32(), dimension),
            "thumbnail": daft.DataType.binary(),
            "error": daft.DataType.string(),
        }
    )

    class Worker(_Worker):  # here, because only here is Daft imported
        @daft.method.batch(return_dtype=result, batch_size=8 * batch_size)
        def __call__(self, number: Any, text: Any, paths: Any, data: Any, video: Any) -> list[dict[str, Any]]:
            return self.encode(number, text, paths, data, video)

    gpus, places = int(torch.cuda.is_available()), TemporaryDirectory(prefix="muco-workers-")
    worker = daft.cls(Worker, use_process=True, max_concurrency=workers, gpus=gpus)(
        model_path, fingerprint, dimension, batch_size, precision, places.name
    )

    def encode(rows: Iterable[Row], _: Any = places) -> Iterator[Encoded]:  # the folder lives as long as this does
        by_number = {row.number: row for row in rows}
        if not by_number:
            return
        images, videos = zip(*(_without_video(row.images) for row in by_number.values()), strict=True)
        sent = {  # each image is a path or bytes, and None in the other column
            "number": [*by_number],
            "text": [row.text for row in by_number.values()],
            "paths": [[str(image) if isinstance(image, (str, Path)) else None for image in own] for own in images],
            "data": [[image if isinstance(image, bytes) else None for image in own] for own in images],
            "video": [*videos],
        }
        frame = daft.from_pydict(sent).select(worker(*map(daft.col, sent)).alias("result"))
        for record in frame.iter_rows():
            found = record["result"]
            outcome = {"error": found["error"]} if found["error"] else {"vector": np.float32(found["vector"])}
            yield replace(by_number[found["number"]], images=(), **outcome), found["thumbnail"]

    return encode
