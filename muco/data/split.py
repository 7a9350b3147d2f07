"""``muco data split``: holds out a part of a data set, by images, so that none is on both sides."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from muco.data.images import sample_images
from muco.data.jsonl import sample_to_row, write_jsonl
from muco.data.source import Data
from muco.dialogue import Sample
from muco.errors import DataError, MucoError
from muco.images import image_digest


def split(data: Data, output: Path, held_out: float = 0.1) -> dict[str, int]:
    """Writes ``train.jsonl`` and ``dev.jsonl``; what is there is replaced.

    Samples with the same images are on the same side; of those without an image, samples with the same id, or without
    one the same first target. Which side depends on these alone: the order of rows and other names of files change
    nothing. Memory: 32 bytes per sample.

    Args:
        held_out: The share that goes into ``dev.jsonl``, between 0 and 1.
    Returns:
        The numbers of samples, "train" and "dev".
    Raises:
        DataError: If a row cannot be read, an image is not a file, or there is too little to hold some out.
        OutputError: If the files cannot be written.
    """
    if not 0 < held_out < 1:
        raise MucoError(f"the share that is held out must be between 0 and 1, not {held_out:g}")
    keys = [_key(data[number]) for number in range(len(data))]
    groups = sorted(set(keys))  # by digest: as good as drawn, and the same each time
    count = max(1, round(held_out * len(groups)))
    if count >= len(groups):
        raise DataError(f"{len(groups)} different images are too few to hold {count} out; give more, or hold out less")
    last = groups[count - 1]

    def rows(held: bool) -> Iterator[dict[str, Any]]:
        for number, key in enumerate(keys):
            if (key <= last) == held:
                yield sample_to_row(data[number], output)

    return {name: write_jsonl(output / f"{name}.jsonl", rows(held)) for name, held in (("train", False), ("dev", True))}


def _key(sample: Sample) -> bytes:
    images = [image_digest(image, where=sample.place) for image in sample_images(sample)]
    said = "".join(images) or sample.id or sample.turns[0].target[0].text
    return hashlib.sha256(said.encode("utf-8", "surrogatepass")).digest()
