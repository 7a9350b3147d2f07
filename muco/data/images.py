"""Reading images: whatever a user hands in becomes an upright RGB image of sane size, or an ImageError that names it.

Files of strangers are read here, so the order matters: size in bytes, then format and size in pixels from the header,
and only then the pixels. Nothing is fetched, nothing is guessed, and a truncated file is never filled up with grey.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

from PIL import Image

from muco.dialogue import ImageLike, Sample
from muco.images import _name, _status, image_digest


class SameImage:
    """Equal for the same image (:func:`image_digest`); a file is only read where another one has as many bytes.

    Raises:
        ImageError: If the file is missing or too large; when it is compared, also if it cannot be read.
    """

    def __init__(self, image: ImageLike, *, where: str = "") -> None:
        self._image, self._where = image, where
        if isinstance(image, Image.Image):
            self._size = image.width * image.height * 3
        else:
            self._size = len(image) if isinstance(image, bytes) else _status(image, _name(image, where)).st_size

    @cached_property
    def _digest(self) -> str:
        return image_digest(self._image, where=self._where)

    def __hash__(self) -> int:
        return hash(self._size)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SameImage) and self._size == other._size and self._digest == other._digest


def sample_images(sample: Sample) -> Iterator[ImageLike]:
    """Every image a sample mentions: its own, then those of its turns (query, target, negatives)."""
    yield from sample.images
    for turn in sample.turns:
        for content in (*turn.query, *turn.target, *turn.negatives):
            yield from content.images
