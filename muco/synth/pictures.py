"""One look at every picture: read once, measured, hashed, and stored if its source does not keep it as a file.

Files of strangers are opened here, thousands at a time: in threads of this machine, or by Daft on a Ray cluster. Only
the small results come back, in the order of the source.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from itertools import islice
from operator import attrgetter
from pathlib import Path
from typing import Any
from uuid import uuid4

from muco.base.fetch import FetchError, UnreachableError
from muco.base.files import whole_file
from muco.errors import ImageError, MucoError, OutputError
from muco.images import FORMATS, MAX_PIXELS, image_digest, open_image
from muco.synth.flow import by_daft
from muco.synth.sources import Picture, Source

UNREADABLE, UNREACHABLE, NOT_FETCHED = "unreadable", "unreachable", "not fetched"
TOO_SMALL, ASPECT = "too small", "aspect"
DUPLICATE, NEAR_DUPLICATE = "duplicate", "near duplicate"  # decided by the catalogue
SUFFIXES = {"PNG": "png", "JPEG": "jpg", "MPO": "jpg", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif"}
MOST_NEAR = 16  # bits; above that nearly all pictures would be near duplicates
WORKERS = 16  # threads
CHUNK = 256  # pictures sent to a worker together
LANES = 4  # chunks under way at once: a slow picture holds up only its own
RAY_CHUNKS = 64  # chunks in one query to a cluster, where Daft runs one query at a time
MAX_NOTE = 300  # characters


@dataclass(frozen=True)
class Filter:
    """Which pictures are kept; MucoError if a value is out of range."""

    min_side: int = 512  # px of the shorter side, at least
    max_aspect: float = 3.0  # longer side / shorter side, at most
    near: int = 4  # bits of 64 by which the hash of a near duplicate may differ; -1 turns this off
    max_pixels: int = MAX_PIXELS  # larger pictures are not decoded; a worker holds one, 3 bytes per pixel or more

    def __post_init__(self) -> None:
        if self.min_side < 1 or not self.max_aspect >= 1 or self.max_pixels < 1:
            raise MucoError("min_side, max_aspect and max_pixels must be at least 1")
        if not -1 <= self.near <= MOST_NEAR:
            raise MucoError(f"near must be -1 (off) or 0 to {MOST_NEAR} bits, not {self.near}")


@dataclass(frozen=True)
class Look:
    """The result of one look at a picture."""

    number: int
    name: str
    ref: str
    digest: str = ""  # SHA-256 (hex) of the file's bytes, if there are any
    phash: int = 0  # perceptual hash, 64 bits
    width: int = 0  # px, upright
    height: int = 0
    reason: str = ""  # why it is not kept
    note: str = ""  # the error message
    file: str = ""  # relative to the source's root or the store; "" if it is not kept


def look(source: Source, picture: Picture, filter: Filter, store: Path | None) -> Look:
    """Reads, measures and hashes a picture, and stores its file if the source has no folder of files.

    It is stored whole as ``<first two letters>/<digest>.<kind>`` in the folder ``store``, needed if ``source.root`` is
    None. Raises a MucoError if that fails, or the source has changed.
    """
    own = asdict(picture)
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
    """64 bits of a Pillow image in grey: whether each of 8 x 8 low frequencies is above their median."""
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
        store: As for :func:`look`; on a cluster, a folder that all its machines see.
        workers: Threads on each machine, each with one decoded picture.
        ray: Address of a Ray cluster whose machines see the same paths; None: this machine.
    Raises:
        MucoError: If pictures cannot be stored, or the source is broken or has changed.
    """
    run = uuid4().hex

    def work(chunk: list[Any]) -> list[Any]:
        return look_at_some([Picture(**values) for values in chunk], source, filter, store, workers, run)

    query = by_daft(work, CHUNK, ray, use_process=False)

    def look_at(pictures: list[Picture]) -> list[Look]:
        records = list(query(map(asdict, pictures)))
        if failed := [message for record in records if (message := record.pop("failed"))]:
            raise MucoError(failed[0])
        return sorted((Look(**record) for record in records), key=attrgetter("number"))

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


_ended: set[str] = set()  # runs that were closed: workers skip the rest of their chunks


@cache
def _threads(workers: int) -> ThreadPoolExecutor:
    """The threads of this process, shared by all chunks: while one waits for a slow picture, others work."""
    return ThreadPoolExecutor(workers, thread_name_prefix="muco-picture")


def look_at_some(
    pictures: list[Picture], source: Source, filter: Filter, store: Path | None, workers: int, run: str
) -> list[dict[str, Any]]:
    """Runs in a worker: the fields of each look, and ``failed``, the message of an error that stops the run."""

    def one(picture: Picture) -> dict[str, Any]:
        try:
            if run in _ended:
                raise MucoError("broken off")
            found, failed = look(source, picture, filter, store), ""
        except MucoError as error:  # raised on a cluster, Daft would bury it in a message of its own
            found, failed = Look(**asdict(picture)), str(error)
        return asdict(found) | {"failed": failed}

    return list(_threads(workers).map(one, pictures))
