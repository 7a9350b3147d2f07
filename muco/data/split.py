"""``muco data split``: holds out a part of a data set, by images, so that none is on both sides."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from muco.data.jsonl import sample_to_row, write_jsonl
from muco.data.source import Data
from muco.dialogue import Sample
from muco.errors import DataError, MucoError
from muco.images import image_digest


def split(data: Data, output: Path, held_out: float = 0.1) -> dict[str, int]:
    """Writes ``train.jsonl`` and ``dev.jsonl``; what is there is replaced.

    Samples that share an image, of a query or a target, are on the same side, and so are samples without one that share
    the id, or without an id the first target. Hard negatives do not count. Which side depends on these alone: the order
    of rows and other names of files change nothing. Memory: some hundred bytes per sample.

    Args:
        held_out: The share of such groups that goes into ``dev.jsonl``, between 0 and 1; two groups at least.
    Returns:
        The numbers of samples, "train" and "dev".
    Raises:
        DataError: If a row cannot be read, an image is not a file, or there is too little to hold some out.
        OutputError: If the files cannot be written.
    """
    if not 0 < held_out < 1:
        raise MucoError(f"the share that is held out must be between 0 and 1, not {held_out:g}")
    groups = _Groups()
    for number in range(len(data)):
        sample = data[number]
        sample_to_row(sample, output)  # what cannot be written is said before anything is
        groups.join(number, _keys(sample))
    names = groups.names()
    distinct = sorted(set(names))  # digests: as good as drawn, and the same each time
    count = max(2, round(held_out * len(distinct)))
    if count >= len(distinct):
        raise DataError(f"{len(distinct)} samples that share no image are too few to hold {count} out; give more")
    chosen = {*distinct[:count]}

    def rows(held: bool) -> Iterator[dict[str, Any]]:
        for number, name in enumerate(names):
            if (name in chosen) == held:
                yield sample_to_row(data[number], output)

    return {name: write_jsonl(output / f"{name}.jsonl", rows(held)) for name, held in (("train", False), ("dev", True))}


class _Groups:
    """Samples that share a key, or share one with a sample that shares one, and so on."""

    def __init__(self) -> None:
        self.parent: list[int] = []
        self.smallest: list[bytes] = []  # key of a group, at its first sample
        self.first: dict[bytes, int] = {}  # key -> the first sample that has it

    def join(self, number: int, keys: Sequence[bytes]) -> None:
        self.parent.append(number)
        self.smallest.append(min(keys))
        for key in keys:
            one, other = sorted((self._root(self.first.setdefault(key, number)), self._root(number)))
            self.parent[other] = one
            self.smallest[one] = min(self.smallest[one], self.smallest[other])

    def names(self) -> list[bytes]:
        """The smallest key of each sample's group."""
        return [self.smallest[self._root(number)] for number in range(len(self.parent))]

    def _root(self, number: int) -> int:
        while self.parent[number] != number:
            self.parent[number] = number = self.parent[self.parent[number]]
        return number


def _keys(sample: Sample) -> list[bytes]:
    contents = (content for turn in sample.turns for content in (*turn.query, *turn.target))
    images = (*sample.images, *(image for content in contents for image in content.images))
    said = [image_digest(image, where=sample.place) for image in images] or [
        sample.id if sample.id is not None else sample.turns[0].target[0].text
    ]
    return [hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest() for text in said]
