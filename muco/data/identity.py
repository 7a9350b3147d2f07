"""By what rows of data are known again: hashes of images and of normalised texts, read from any source.

Memory: one block of rows, and the names of a folder's images.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from muco.data import open_data
from muco.data.folders import image_files
from muco.data.items import open_items
from muco.data.source import Data
from muco.dialogue import Content, ImageLike, Video
from muco.errors import DataError, ImageError
from muco.images import image_digest, open_image, pictures

MIN_WORDS = 8  # shorter texts do not count by themselves: questions and labels repeat, captions do not
BLOCK = 256  # rows whose images are read together


def normalised(text: str) -> str:
    """Words of letters, marks, digits and symbols, case folded, with one blank between them."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(folded.translate(_CHARACTERS).split())


def words(text: str) -> int:
    """Words of a normalised text; in scripts without blanks, two wide characters count as one."""
    wide = 0 if text.isascii() else sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text.split()) + wide // 2


class _Characters(dict[int, str | None]):
    """For ``str.translate``: separators and punctuation become blanks, invisible marks go, the rest stays."""

    def __missing__(self, code: int) -> str | None:
        kind = unicodedata.category(chr(code))
        self[code] = None if kind == "Cf" else " " if kind[0] in "ZPC" else chr(code)
        return self[code]


_CHARACTERS = _Characters()


@dataclass(frozen=True)
class ImageKeys:
    name: str
    file: int | None = None  # None: there is no file, or it cannot be read
    pixels: int | None = None
    error: str | None = None


@dataclass(frozen=True)
class Keys:
    """What one row is known by."""

    images: tuple[ImageKeys, ...]
    texts: dict[int, str]  # hash -> the text as written, only of those that count
    short: int


def _number(digest: str) -> int:
    return int(digest[:16], 16)


def _text_key(text: str) -> int:
    return _number(hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest())


def image_keys(image: ImageLike) -> ImageKeys:
    found = ImageKeys(str(image) if isinstance(image, (str, Path, Video)) else "image in memory")
    try:
        if isinstance(image, (str, Path, bytes, Video)):
            found = replace(found, file=_number(image_digest(image)))
        opened = tuple(open_image(picture, small_side=0) for picture in pictures(image))
        seen = Video(opened, len(opened)) if isinstance(image, Video) else opened[0]
        return replace(found, pixels=_number(image_digest(seen)))
    except ImageError as error:
        return replace(found, error=str(error))


class ContentRows:
    """Rows of contents, whatever they come from; a folder without a JSONL file is a folder of images."""

    def __init__(self, source: Any) -> None:
        self.name = str(source if isinstance(source, (str, Path)) else getattr(source, "path", type(source).__name__))
        self.digest = hashlib.sha256()  # of all keys that were taken from it
        self.passed_over: Counter[str] = Counter()  # other files of a folder, by kind
        self._images: list[Path] = []
        self._data: Data | None = None
        if not isinstance(source, (str, Path)):
            self._data = source
        elif Path(source).is_dir() and not any(Path(source).glob("*.jsonl")):
            items = open_items(Path(source))
            if items.files:
                raise DataError(f"{source}: has no images but {items.files[0].name}; pass images, or data in JSONL")
            self.passed_over = items.passed_over
            self._images = [Path(source) / name for name, _ in image_files(Path(source))]
        else:
            self._data = open_data(source)

    def __len__(self) -> int:
        return len(self._images) if self._data is None else len(self._data)

    @property
    def origin(self) -> dict[str, str]:
        return {"source": self.name, "fingerprint": self.digest.hexdigest()}

    def where(self, i: int) -> str:
        if self._data is None:
            return str(self._images[i])
        named = getattr(self._data, "where", None)
        return named(i) if callable(named) else self._data[i].where or f"{self.name} sample {i + 1}"

    def contents(self, i: int, *, negatives: bool) -> list[Content]:
        if self._data is None:
            return [Content(images=(self._images[i],))]
        sample = self._data[i]
        sides = [content for turn in sample.turns for content in (*turn.query, *turn.target)]
        more = [content for turn in sample.turns for content in turn.negatives] if negatives else []
        return [Content(images=sample.images), *sides, *more]


def keys_of(
    source: ContentRows, look: Callable[[ImageLike], ImageKeys], threads: ThreadPoolExecutor, *, negatives: bool
) -> Iterator[Keys]:
    """Keys of every row in order.

    Args:
        look: :func:`image_keys`, or one that remembers; the threads call it for a block of rows at a time.
        negatives: Whether hard negatives belong to a row.
    """
    rows = iter(range(len(source)))
    while block := list(islice(rows, BLOCK)):
        contents = [source.contents(i, negatives=negatives) for i in block]
        images = [[image for content in row for image in content.images] for row in contents]
        found = threads.map(look, [image for row in images for image in row])
        for row, own in zip(contents, images, strict=True):
            texts = {key: content.text for content in row if (key := normalised(content.text))}
            counted = {_text_key(normal): text for normal, text in texts.items() if words(normal) >= MIN_WORDS}
            keys = Keys(tuple(islice(found, len(own))), counted, len(texts) - len(counted))
            source.digest.update(repr([[(k.file, k.pixels) for k in keys.images], *map(_text_key, texts)]).encode())
            yield keys
