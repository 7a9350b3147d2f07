"""Reads the captions of images that ``muco data caption`` wrote, and adds them to data."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from muco.base.journal import read_lines
from muco.data.fingerprint import file_digest
from muco.dialogue import Content, ImageLike, Sample
from muco.errors import DataError, ImageError
from muco.images import image_digest

if TYPE_CHECKING:
    from muco.data.source import Data


def sides_of(sample: Sample) -> Iterator[tuple[str, Content]]:
    """("query" or "target", content) of all wordings of all turns."""
    for turn in sample.turns:
        yield from (("query", content) for content in turn.query)
        yield from (("target", content) for content in turn.target)


def uncaptioned(sample: Sample, side: tuple[str, Content]) -> tuple[ImageLike, ...]:
    """The images that the caption of a content is about, if it has none yet."""
    name, content = side
    if content.caption:
        return ()
    return (*sample.images, *content.images) if name == "query" else content.images


def known_digests(path: Path) -> dict[bytes, bool]:
    """Digest of every image that has a line -> whether it got a caption; of two lines the later one counts."""
    return {digest: captioned for _, digest, captioned in _lines(path)}


class Captions:
    """The captions of a file by the digest of the image, 16 bytes each in memory; a DataError if a line is invalid."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise DataError(f"{path}: no such file of captions; `muco data caption` makes it")
        places = {digest: start for start, digest, _ in _lines(path)}  # the later line counts
        keys = np.array([int.from_bytes(digest[:8]) for digest in places], dtype=np.uint64)
        order = np.argsort(keys, kind="stable")
        self._keys, self._starts = keys[order], np.fromiter(places.values(), np.int64, len(places))[order]

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, digest: str) -> str:
        """The caption of an image, "" if there was none to be had; a DataError if the file says nothing about it."""
        key = np.uint64(int(digest[:16], 16))
        first, end = (int(np.searchsorted(self._keys, key, side=side)) for side in ("left", "right"))
        with self.path.open("rb") as file:
            for start in self._starts[first:end].tolist():
                file.seek(start)
                line = json.loads(file.readline())
                if line["image"] == digest:
                    return line.get("caption", "")
        raise DataError(f"{self.path}: nothing about the image {digest[:12]}…; run `muco data caption` again")


class CaptionedData:
    """Data with the captions of a file, as ``muco data caption`` writes it, where a content has images and no caption.

    A sample with an image that the file says nothing about is an error on access; one whose caption failed stays
    without. Anything else is asked of the data itself.
    """

    def __init__(self, data: Data, path: str | Path) -> None:
        self._data, self._captions = data, Captions(Path(path))

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Sample:
        sample = self._data[index]
        known: dict[int, str] = {}  # by the image as an object: many turns share one

        def told(image: ImageLike) -> str:
            if id(image) not in known:
                try:
                    known[id(image)] = self._captions[image_digest(image, where=sample.where)]
                except ImageError:  # said where the image itself is read
                    known[id(image)] = ""
                except DataError as error:
                    raise DataError(f"{sample.place}: {error}") from error
            return known[id(image)]

        def captioned(name: str, content: Content) -> Content:
            captions = filter(None, map(told, uncaptioned(sample, (name, content))))
            return replace(content, caption=content.caption or "; ".join(captions))

        turns = [
            replace(turn, **{name: [captioned(name, c) for c in getattr(turn, name)] for name in ("query", "target")})
            for turn in sample.turns
        ]
        return sample.with_turns(turns)

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the data's fingerprint and the bytes of the file of captions."""
        return self._with(self._data.fingerprint)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # before the data is there, as while unpickling
            raise AttributeError(name)
        value = getattr(self._data, name)
        return self._with(value) if name == "readable_fingerprint" else value

    def _with(self, fingerprint: str) -> str:
        return hashlib.sha256(f"{fingerprint} {file_digest(self._captions.path)}".encode()).hexdigest()


def _lines(path: Path) -> Iterator[tuple[int, bytes, bool]]:
    """(Byte where it begins, digest of the image, whether it has a caption) of every line."""
    for start, line in read_lines(path):
        image = line.get("image")
        if not isinstance(line.get("caption", line.get("error")), str):
            raise DataError(f"{path}: a line of {image!r} has neither a caption nor an error")
        if not re.fullmatch("[0-9a-f]{64}", str(image), re.IGNORECASE):
            raise DataError(f"{path}: 'image' must be the SHA-256 of an image, not {image!r}")
        yield start, bytes.fromhex(image), "caption" in line
