"""Vectors on disk, so that an evaluation that was stopped, or is run again, encodes nothing twice.

One folder per (model, data); in it shards, each an ``.npy`` file named by the SHA-256 of its own bytes.
A shard holds rows (content key, vector). A shard whose bytes do not match its name is damaged: it is removed with a
message and its rows are encoded again. A run that is killed loses at most the shard it was working on.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from muco import distributed
from muco.base.files import make_folder, write_bytes, writing
from muco.data.left_out import LeftOut
from muco.dialogue import Content, ImageLike, Video
from muco.errors import DataError, ImageError
from muco.images import image_digest

SHARD = 256  # rows; small enough that a killed run loses little, large enough for the encoder to sort by length
LAYOUT = 1  # raise when the meaning of a row changes

log = logging.getLogger(__name__)


class Embedder(Protocol):
    """What is evaluated: anything that maps contents to unit vectors, float32 [n, d] in their order.

    Two attributes are read where a model has them: ``caveat``, a sentence for the warnings of a result, and
    ``truncate_dim``, the length to which it cuts its vectors.
    """

    def encode(self, contents: list[Content], /, *, batch_size: int) -> np.ndarray: ...
    @property
    def fingerprint(self) -> str: ...


def known_by(model: Embedder) -> str:
    """What results and vectors of a model are found again by: its fingerprint, and the length of vectors it cuts."""
    cut = getattr(model, "truncate_dim", None)
    return model.fingerprint if cut is None else f"{model.fingerprint}-{cut}"


def caveats(model: Embedder) -> list[str]:
    """The warning that a model brings along, for those of a result."""
    return [said] if (said := getattr(model, "caveat", "")) else []


class Book:
    """Contents by a key of text and image bytes; what cannot be embedded goes to ``left_out`` or is an error."""

    def __init__(self, left_out: LeftOut | None = None) -> None:
        self.left_out = left_out
        self.contents: dict[str, Content] = {}
        self.places: dict[str, str] = {}  # key -> "file:line" of the first row that holds it
        self._order: dict[str, tuple[tuple[str, ...], str]] = {}
        self._files: dict[str | Video, str] = {}  # path or video -> digest: a file is read once

    def add(self, content: Content, where: str = "") -> str:
        """Key of a content, 64 hexadecimal digits; a DataError if it cannot be read and nothing may be left out."""
        try:
            images = tuple(self._digest(image, where) for image in content.images)
            content.text.encode()
        except UnicodeEncodeError:
            return self.lose(DataError(f"{where}: the text holds half a character (a lone surrogate); repair it"))
        except ImageError as error:
            return self.lose(error)
        key = hashlib.sha256(json.dumps([content.text, images]).encode()).hexdigest()
        if key not in self.contents:
            self.contents[key], self.places[key], self._order[key] = content, where, (images, content.text)
        return key

    def lose(self, error: DataError) -> str:
        """A key for what cannot even be read; raises the error unless it may be left out."""
        key = hashlib.sha256(json.dumps(["left out", str(error)]).encode()).hexdigest()
        self._refuse(key, error)
        return key

    def vectors(
        self, model: Embedder, batch_size: int, keys: Iterable[str], **how: Any
    ) -> tuple[np.ndarray, dict[str, int]]:
        """Vectors of the contents with these keys, and the row of each; ``how`` is for :func:`embed`.

        They have an order of their own (contents of one image side by side): that of the keys moves no digit.
        """
        ordered = sorted(keys, key=self._order.__getitem__)

        def encode(part: Sequence[str]) -> np.ndarray:
            contents, places = ([known[key] for key in part] for known in (self.contents, self.places))
            return encode_named(model, contents, places, batch_size, lambda row, error: self._refuse(part[row], error))

        vectors = embed(ordered, encode, left_out=self.left_out, **how)
        return vectors, {key: row for row, key in enumerate(ordered)}

    def _refuse(self, key: str, error: DataError) -> None:
        if self.left_out is None:
            raise error
        self.left_out.add(key, error)

    def _digest(self, image: ImageLike, where: str) -> str:
        if not isinstance(image, (str, Path, Video)):
            return image_digest(image, where=where)
        name = image if isinstance(image, Video) else str(image)
        if name not in self._files:
            self._files[name] = image_digest(name, where=where)
        return self._files[name]


def encode_named(
    model: Embedder,
    contents: Sequence[Content],
    places: Sequence[str],
    batch_size: int,
    refused: Callable[[int, DataError], None],
) -> np.ndarray:
    """Vectors of contents in their order, float32 [n, d], less those that the model refuses and ``refused`` allows.

    The model knows no rows, so what it refuses is looked for by halves. [0, 0] if nothing is left.

    Args:
        refused: Called with the place of a content in ``contents`` and a DataError that begins with the content's
            place ("file:line"); it may raise it.
    """
    vectors, parts = [], [range(len(contents))]
    while parts:
        rows = parts.pop()
        if not rows:
            continue
        try:
            vectors.append(model.encode([contents[row] for row in rows], batch_size=batch_size))
        except DataError as error:
            if len(rows) == 1:
                refused(rows[0], type(error)(f"{places[rows[0]]}: {error}"))
            else:
                half = len(rows) // 2
                parts += [rows[half:], rows[:half]]
    return np.concatenate(vectors) if vectors else np.zeros((0, 0), dtype=np.float32)


class EmbeddingCache:
    """The vectors of one model for one data set, by their fingerprints, below ``root``; made, else an OutputError."""

    def __init__(self, root: Path, *, model: str, data: str) -> None:
        name = hashlib.sha256(json.dumps([LAYOUT, model, data, "single-turn"]).encode()).hexdigest()
        self.folder = Path(root) / name
        with writing(root, "choose another cache folder"):
            make_folder(self.folder)

    def load(self) -> dict[str, np.ndarray]:
        """All intact rows, content key -> float32 [d]; damaged shards are removed with a message."""
        rows: dict[str, np.ndarray] = {}
        for path in sorted(self.folder.glob("*.npy")):
            payload = path.read_bytes()
            if hashlib.sha256(payload).hexdigest() != path.stem:
                log.warning("%s: the cached vectors are damaged; they are removed and computed again", path)
                path.unlink(missing_ok=True)  # another process may have been quicker
                continue
            shard = np.load(io.BytesIO(payload), allow_pickle=False)
            rows.update(zip((key.decode() for key in shard["key"]), shard["vector"], strict=True))
        return rows

    def add(self, keys: Sequence[str], vectors: np.ndarray) -> None:
        """Writes one shard; it appears under its name whole or not at all."""
        shard = np.empty(len(keys), dtype=[("key", "S64"), ("vector", "<f4", (vectors.shape[1],))])
        shard["key"], shard["vector"] = [key.encode() for key in keys], vectors
        buffer = io.BytesIO()
        np.save(buffer, shard, allow_pickle=False)
        name = hashlib.sha256(buffer.getvalue()).hexdigest()
        write_bytes(self.folder / f"{name}.npy", buffer.getvalue())


def embed(
    keys: Sequence[str],
    encode: Callable[[Sequence[str]], np.ndarray],
    *,
    cache: EmbeddingCache | None = None,
    shared: bool = False,
    left_out: LeftOut | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """One vector per key, encoding only what the cache lacks, in shards.

    Args:
        keys: Distinct content keys (64 hexadecimal characters each).
        encode: Vectors of some of the keys, float32 [m, d] in their order, less those that it adds to ``left_out``.
        shared: Of several processes each encodes some shards. All must call it, with the same keys and cache; during
            training only one process evaluates.
        left_out: Keys that cannot be embedded. What it holds is not encoded; afterwards it holds those of all
            processes.
        progress: Called with (done, total) after every shard.
    Returns:
        float32 [len(keys), d]; rows of NaN for keys that were left out, a DataError if all were.
    """
    rows = cache.load() if cache else {}
    left_out = LeftOut() if left_out is None else left_out
    missing = [key for key in keys if key not in rows and key not in left_out]
    processes, own = (distributed.world_size(), distributed.rank()) if shared else (1, 0)
    if shared:
        distributed.wait_for_all()  # all must have seen the same keys missing before one is added
    made: dict[str, np.ndarray] = {}
    for number, start in enumerate(range(0, len(missing), SHARD)):
        shard = missing[start : start + SHARD]
        if number % processes == own:
            vectors = np.asarray(encode(shard), dtype=np.float32)
            taken = [key for key in shard if key not in left_out]
            assert vectors.ndim == 2 and len(vectors) == len(taken), f"{vectors.shape} vectors, {len(taken)} contents"
            if cache and taken:
                cache.add(taken, vectors)
            made.update(zip(taken, vectors, strict=True))
        if progress:
            progress(len(keys) - len(missing) + start + len(shard), len(keys))
    for part, reasons in distributed.gather_objects((made, left_out.reasons)) if shared else [(made, {})]:
        rows.update(part)
        left_out.reasons.update(reasons)
    known = next((rows[key] for key in keys if key not in left_out), None)
    if known is None:
        raise DataError(f"nothing can be embedded; the first: {next(iter(left_out.reasons.values()), '')}")
    nothing = np.full_like(known, np.nan)
    return np.stack([nothing if key in left_out else rows[key] for key in keys])
