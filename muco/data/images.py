"""Images of a data set: those of a sample, whether one can be used, and whether two are the same."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from PIL import Image

from muco.dialogue import ImageLike, Sample, Video
from muco.errors import ImageError
from muco.images import file_status, image_digest, opened_image, shown_name


class SameImage:
    """Equal for the same image (:func:`image_digest`); a file is only read where another one has as many bytes.

    Raises an ImageError if the file is missing or too large; when it is compared, also if it cannot be read.
    """

    def __init__(self, image: ImageLike, *, where: str = "") -> None:
        self._image, self._where, name = image, where, shown_name(image, where)
        if isinstance(image, Video):
            self._size = -1  # of no picture; videos are told apart by their digests
        elif isinstance(image, Image.Image):
            self._size = image.width * image.height * 3
        else:
            self._size = len(image) if isinstance(image, bytes) else file_status(image, name).st_size

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


def image_problem(image: ImageLike, where: str, opened: bool) -> tuple[bool, str] | None:
    """(Is the file missing?, message), or None for an image that can be used; opens it only if ``opened``."""
    source = image.source if isinstance(image, Video) else image
    if isinstance(source, (str, Path)) and not os.path.exists(source):
        return True, f"{where}: {source}: no such {'video' if source is not image else 'image'} file"
    try:
        if opened:
            opened_image(image, where=where)
    except ImageError as error:
        return False, str(error)
    return None
