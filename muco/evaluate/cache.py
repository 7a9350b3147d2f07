"""Vectors on disk, so that an evaluation that was stopped, or is run again, encodes nothing twice.

One folder per (model, data, kind of prompt); in it shards, each an ``.npy`` file named by the SHA-256 of its own bytes.
A shard holds rows (content key, vector). A shard whose bytes do not give its name is damaged: it is removed with a
message and its rows are encoded again. A run that is killed loses at most the shard it was working on.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from muco import distributed
from muco.base.files import write_bytes
from muco.dialogue import Content, ImageLike
from muco.errors import DataError, ImageError, OutputError

SHARD = 256  # rows; small enough that a killed run loses little, large enough for the encoder to sort by length
LAYOUT = 1  # raise when the meaning of a row changes

log = logging.getLogger(__name__)


class Embedder(Protocol):
    """What evaluates: anything that maps contents to unit vectors."""

    def encode(self, contents: list[Content], /, *, batch_size: int) -> np.ndarray: ...
    @property
    def fingerprint(self) -> str: ...


class Book:
    """Every content once, under a key made of its text and the bytes of its images."""

    def __init__(self) -> None:
        self.contents: dict[str, Content] = {}
        self.places: dict[str, str] = {}  # key -> "file:line" of the first row that holds it
        self._order: dict[str, tuple[tuple[str, ...], str]] = {}
        self._files: dict[str, str] = {}  # path -> digest: a file is read once

    def add(self, content: Content, where: str = "") -> str:
        """Key of a content, 64 hexadecimal characters; an image that cannot be read is an ImageError."""
        images = tuple(self._digest(image, where) for image in content.images)
        key = hashlib.sha256(json.dumps([content.text, images]).encode()).hexdigest()
        if key not in self.contents:
            self.contents[key], self.places[key], self._order[key] = content, where, (images, content.text)
        return key

    def encode(self, model: Embedder, batch_size: int, keys: Sequence[str]) -> np.ndarray:
        """Vectors of the contents with these keys; what the model refuses is named by its row."""
        return encode_named(model, [self.contents[k] for k in keys], [self.places[k] for k in keys], batch_size)

    def in_order(self, keys: Iterable[str]) -> list[str]:
        """Keys in an order of their own (contents of one image side by side): that of the rows moves no digit."""
        return sorted(keys, key=self._order.__getitem__)

    def _digest(self, image: ImageLike, where: str) -> str:
        if isinstance(image, bytes):
            return hashlib.sha256(image).hexdigest()
        if not isinstance(image, (str, Path)):
            from muco.data.images import open_image

            pixels = open_image(image, small_side=0, where=where)
            return hashlib.sha256(f"{pixels.size} ".encode() + pixels.tobytes()).hexdigest()
        path = str(image)
        if path not in self._files:
            try:
                self._files[path] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
            except OSError as error:
                raise ImageError(
                    f"{where}: image {path} cannot be read ({error.strerror or error}); mend the row"
                ) from error
        return self._files[path]


def encode_named(model: Embedder, contents: Sequence[Content], places: Sequence[str], batch_size: int) -> np.ndarray:
    """Vectors of contents, float32 [n, d]; if the model refuses one, the DataError begins with its place ("file:line").

    The model knows no rows, so the one that it refuses is looked for one by one.
    """
    try:
        return model.encode(list(contents), batch_size=batch_size)
    except DataError:
        for content, place in zip(contents, places, strict=True):
            try:
                model.encode([content], batch_size=1)
            except DataError as error:
                raise type(error)(f"{place}: {error}") from error
        raise


class EmbeddingCache:
    """The vectors that one model gave to the contents of one data set.

    Args:
        root: Folder of all caches; made if it is not there.
        model: The model's fingerprint.
        data: The data's fingerprint.
        prompt: How contents were put to the model; vectors of other prompts are other vectors.
    Raises:
        OutputError: If the folder cannot be made.
    """

    def __init__(self, root: Path, *, model: str, data: str, prompt: str = "single-turn") -> None:
        name = hashlib.sha256(json.dumps([LAYOUT, model, data, prompt]).encode()).hexdigest()
        self.folder = Path(root) / name
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{root}: cannot hold cached vectors ({error}); choose another cache folder") from error

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
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """One vector per key, encoding only what the cache lacks, in shards.

    Args:
        keys: Distinct content keys (64 hexadecimal characters each).
        encode: Vectors of some of the keys, float32 [m, d] in their order.
        shared: Of several processes each encodes some shards. All must call it, with the same keys and cache; during
            training only one process evaluates.
        progress: Called with (done, total) after every shard.
    Returns:
        float32 [len(keys), d].
    """
    rows = cache.load() if cache else {}
    missing = [key for key in keys if key not in rows]
    processes, own = (distributed.world_size(), distributed.rank()) if shared else (1, 0)
    if shared:
        distributed.wait_for_all()  # all must have seen the same keys missing before one is added
    made: dict[str, np.ndarray] = {}
    for number, start in enumerate(range(0, len(missing), SHARD)):
        shard = missing[start : start + SHARD]
        if number % processes == own:
            vectors = np.asarray(encode(shard), dtype=np.float32)
            assert vectors.ndim == 2 and len(vectors) == len(shard), f"{vectors.shape} vectors, {len(shard)} contents"
            if cache:
                cache.add(shard, vectors)
            made.update(zip(shard, vectors, strict=True))
        if progress:
            progress(len(keys) - len(missing) + start + len(shard), len(keys))
    for part in distributed.gather_objects(made) if shared else [made]:
        rows.update(part)
    return np.stack([rows[key] for key in keys])
