"""What one picture is: read once, measured, hashed, and stored where its source does not keep it as a file.

Files of strangers are opened here, by the thousands at once: on this machine in threads, or by Daft on a Ray cluster.
Only the small results come back, in the order of the source.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import cache
from itertools import islice
from operator import attrgetter
from pathlib import Path
from typing import Any
from uuid import uuid4

from muco.base.daft import daft_on
from muco.base.fetch import FetchError, UnreachableError
from muco.base.files import whole_file
from muco.errors import ImageError, MucoError, OutputError
from muco.images import FORMATS, MAX_PIXELS, image_digest, open_image
from muco.synth.sources import Picture, Source

UNREADABLE, UNREACHABLE, NOT_FETCHED = "unreadable", "unreachable", "not fetched"
TOO_SMALL, ASPECT = "too small", "aspect"
DUPLICATE, NEAR_DUPLICATE = "duplicate", "near duplicate"  # which the catalogue decides
SUFFIXES = {"PNG": "png", "JPEG": "jpg", "MPO": "jpg", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif"}
MOST_NEAR = 16  # bits; from there on nearly everything would be compared with everything
WORKERS = 16  # threads
CHUNK = 256  # pictures that are sent to a worker together
LANES = 4  # chunks under way at once: a slow picture holds up its own only
RAY_CHUNKS = 64  # that a cluster gets in one query, as Daft has one query at a time there
MAX_NOTE = 300  # characters


@dataclass(frozen=True)
class Filter:
    """Which pictures are kept; MucoError if a value makes no sense."""

    min_side: int = 512  # px that the shorter side must have
    max_aspect: float = 3.0  # longer side by shorter side, at most
    near: int = 4  # bits of 64 by which the hash of a near duplicate may differ; -1 turns this off
    max_pixels: int = MAX_PIXELS  # of more, it is not decoded; a worker holds one picture, 3 bytes per pixel and more

    def __post_init__(self) -> None:
        if self.min_side < 1 or not self.max_aspect >= 1 or self.max_pixels < 1:
            raise MucoError("min_side, max_aspect and max_pixels must be at least 1")
        if not -1 <= self.near <= MOST_NEAR:
            raise MucoError(f"near must be -1 (off) or 0 to {MOST_NEAR} bits, not {self.near}")


@dataclass(frozen=True)
class Look:
    """What one look at a picture has found."""

    number: int
    name: str
    ref: str
    digest: str = ""  # SHA-256 (hex) of the file's bytes, if there are any
    phash: int = 0  # perceptual hash, 64 bits
    width: int = 0  # px, upright
    height: int = 0
    reason: str = ""  # why it is not kept
    note: str = ""  # the sentence of the error
    file: str = ""  # relative to the source's root, or to the store; "" if it is not kept


def look(source: Source, picture: Picture, filter: Filter, store: Path | None) -> Look:
    """Reads, measures and hashes a picture, and stores its file under its digest if the source has no folder of files.

    Args:
        store: Folder; ``<first two letters>/<digest>.<kind>`` appears in it, whole. Needed if ``source.root`` is None.
    Raises:
        MucoError: If it cannot be stored, or the source has changed.
    """
    own = {"number": picture.number, "name": picture.name, "ref": picture.ref}
    try:
        data = source.read(picture.ref)
        own["digest"] = image_digest(data)
        image = open_image(data, max_pixels=filter.max_pixels, small_side=0, where=picture.name)
    except ImageError as error:
        return Look(**own, reason=UNREADABLE, note=str(error)[:MAX_NOTE])
    except FetchError as error:
        reason = UNREACHABLE if isinstance(error, UnreachableError) else NOT_FETCHED
        return Look(**own, reason=reason, note=str(error)[:MAX_NOTE])
    own |= {"width": image.width, "height": image.height}
    short, long = sorted(image.size)
    if short < filter.min_side or long > filter.max_aspect * short:
        reason = TOO_SMALL if short < filter.min_side else ASPECT
        return Look(**own, reason=reason, note=f"{image.width} x {image.height}")
    if source.root is not None:
        file = picture.ref
    elif store is not None:
        file = _store(data, own["digest"], store)
    else:
        raise ValueError("pictures of this source need a store")
    return Look(**own, phash=perceptual_hash(image), file=file)


def perceptual_hash(image: Any) -> int:
    """64 bits of a Pillow image's coarse structure in grey: 8 x 8 low frequencies, each above or below their median."""
    import imagehash

    return int(str(imagehash.phash(image)), 16)


def _store(data: bytes, digest: str, store: Path) -> str:
    from PIL import Image

    kind = Image.open(io.BytesIO(data), formats=FORMATS).format  # the header of what has just been decoded
    file = f"{digest[:2]}/{digest}.{SUFFIXES.get(kind or '', 'ppm')}"
    path = store / file
    try:
        if path.exists():
            return file
        with whole_file(path) as unfinished:  # several threads may store the same picture at the same time
            unfinished.write_bytes(data)
    except OSError as error:
        raise OutputError(f"{store}: a picture cannot be stored ({error.strerror or error}); make room") from error
    return file


def look_at_all(
    source: Source,
    filter: Filter,
    store: Path | None,
    *,
    start: int = 0,
    workers: int = WORKERS,
    ray: str | None = None,
) -> Iterator[Look]:
    """A look at every picture from number ``start`` on, in the order of the source.

    Args:
        store: As for :func:`look`; on a cluster, a folder that all of its machines see.
        workers: Threads that look at pictures, on each machine. Each holds one picture, decoded.
        ray: Address of a Ray cluster whose machines see the same paths; None: this machine.
    Raises:
        MucoError: If pictures cannot be stored, or the source is broken or has changed.
    """
    run = uuid4().hex
    look_at = _on_daft(source, filter, store, workers, ray, run)
    pictures = source.pictures(start)
    lanes, size = (LANES, CHUNK) if ray is None else (1, CHUNK * RAY_CHUNKS)
    pool = ThreadPoolExecutor(lanes, thread_name_prefix="muco-look")
    under_way: deque[Future[list[Look]]] = deque()
    try:
        while chunk := list(islice(pictures, size)):
            under_way.append(pool.submit(look_at, chunk))
            if len(under_way) == lanes:
                yield from under_way.popleft().result()
        while under_way:
            yield from under_way.popleft().result()
    finally:
        _ended.add(run)
        pool.shutdown(cancel_futures=True)


_ended: set[str] = set()  # runs that were broken off: what is left of their chunks is not looked at


@cache
def _threads(workers: int) -> ThreadPoolExecutor:
    """The threads of this process, which all chunks share: where one waits for a slow picture, others go on."""
    return ThreadPoolExecutor(workers, thread_name_prefix="muco-picture")


def _on_daft(source: Source, filter: Filter, store: Path | None, workers: int, ray: str | None, run: str) -> Any:
    """A function that looks at a list of pictures by a query of Daft."""
    daft = daft_on(ray, "synth")
    kinds = {"int": daft.DataType.int64(), "str": daft.DataType.string()}
    result = daft.DataType.struct({key: kinds[kind] for key, kind in _SENT.items()})

    class LookAt:
        def __init__(self, *given: Any) -> None:
            self.given = given

        @daft.method.batch(return_dtype=result, batch_size=CHUNK)
        def __call__(self, number: Any, name: Any, ref: Any) -> list[dict[str, Any]]:
            columns = (number.to_pylist(), name.to_pylist(), ref.to_pylist())
            return look_at_some([Picture(*values) for values in zip(*columns, strict=True)], *self.given)

    look_at = daft.cls(LookAt, use_process=False)(source, filter, store, workers, run)

    def query(pictures: list[Picture]) -> list[Look]:
        names = ("number", "name", "ref")
        frame = daft.from_pylist([asdict(picture) for picture in pictures])
        if ray is not None:
            frame = frame.into_partitions(-(-len(pictures) // CHUNK))
        frame = frame.select(look_at(*(daft.col(key) for key in names)).alias("look"))
        records = [record["look"] for record in frame.iter_rows()]
        if failed := next((record["failed"] for record in records if record["failed"]), None):
            raise MucoError(failed)
        return sorted(map(_received, records), key=attrgetter("number"))

    return query


def look_at_some(
    pictures: list[Picture], source: Source, filter: Filter, store: Path | None, workers: int, run: str
) -> list[dict[str, Any]]:
    """Runs in a worker: the fields of each look, and ``failed``, the sentence of an error that stops the run."""

    def one(picture: Picture) -> dict[str, Any]:
        try:
            if run in _ended:
                raise MucoError("broken off")
            found, failed = look(source, picture, filter, store), ""
        except MucoError as error:  # from a cluster Daft would send its words within many of its own
            found, failed = Look(picture.number, picture.name, picture.ref), str(error)
        return asdict(found) | {"phash": f"{found.phash:x}", "failed": failed}

    return list(_threads(workers).map(one, pictures))


# "phash" goes in hex: where a column's first values are small, Daft makes floats of those beyond 2**63.
_SENT = {f.name: str(f.type) for f in fields(Look)} | {"phash": "str", "failed": "str"}


def _received(record: dict[str, Any]) -> Look:
    found = {key: value for key, value in record.items() if key != "failed"}
    return Look(**found | {"phash": int(found["phash"], 16)})
