"""Pictures on a page that must stay small: thumbnails as data URIs, until the room for them is used up."""

from __future__ import annotations

from pathlib import Path

from muco.base.html import data_uri, text
from muco.errors import ImageError
from muco.images import open_image

SIDE = 160  # px


class Thumbnails:
    """Small JPEGs as data URIs until the room is used up.

    Args:
        room: Characters that all of them may take together.
    """

    def __init__(self, room: int) -> None:
        self.room, self.full, self.left_out = room, False, 0
        self._made: dict[str, str | None] = {}  # path -> data URI; None if it cannot be shown

    def html(self, image: str) -> str:
        """The image, or its name where it cannot be read or does not fit any more."""
        name = text(Path(image).name)
        if not self.full and image not in self._made:
            self._made[image] = _thumbnail(image)
        if image in self._made and (uri := self._made[image]) is None:
            return f'<span class="gone">{name}: the image is missing or cannot be read</span>'
        if self.full or len(uri) > self.room:
            self.full, self.left_out = True, self.left_out + 1
            return f'<span class="gone">{name}: left out</span>'
        self.room -= len(uri)
        return f'<img src="{uri}" alt="{name}" title="{name}" loading="lazy">'


def _thumbnail(image: str) -> str | None:
    try:
        picture = open_image(image, small_side=0)
    except ImageError:
        return None
    picture.thumbnail((SIDE, SIDE))
    return data_uri(picture, "JPEG", quality=72)
