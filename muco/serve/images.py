"""Images of strangers: from a data URI, or over http(s) where that is allowed, to an RGB image within limits."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from dataclasses import dataclass

from PIL.Image import Image

from muco.base.fetch import FetchLimits
from muco.errors import ImageError
from muco.images import open_image

HEAD = 200  # characters before the comma of a data URI, at most
FETCHED = ("http://", "https://")


@dataclass(frozen=True)
class ImageLimits:
    """Of one image."""

    max_bytes: int = 20 * 2**20  # as a file
    max_pixels: int = 16_000_000  # known from the header before a pixel is decoded
    fetch: FetchLimits | None = None  # how http(s) URLs are fetched; None: not at all


def is_url(source: str | bytes) -> bool:
    """Whether an image is to be fetched; else it is a data URI, or there."""
    return isinstance(source, str) and source[:8].lower().startswith(FETCHED)


def check_source(source: str, limits: ImageLimits, where: str) -> None:
    """Refuses what cannot be an image, before anything is decoded or fetched.

    Raises an ImageError if the source is neither a base64 data URI of an image nor a URL that may be fetched.
    """
    if is_url(source):
        if limits.fetch is None:
            raise ImageError(f"{where}: this server fetches no URLs; send the image as a data:image/…;base64 URI")
        return
    head, comma, _ = source[:HEAD].partition(",")
    kind, *parameters = (part.strip() for part in head.lower().split(";"))
    if not comma or not kind.startswith("data:image/"):
        accepted = "a data:image/…;base64 URI" + (" or an http(s) URL" if limits.fetch else "")
        raise ImageError(f"{where}: an image must be {accepted}")
    if "base64" not in parameters:
        raise ImageError(f"{where}: the data URI is not base64; encode the image as data:image/…;base64,…")


def decode(source: str | bytes, limits: ImageLimits, where: str, opened: Callable[..., Image] = open_image) -> Image:
    """The RGB image of a data URI or of bytes that were fetched, opened by :func:`muco.images.open_image` or as it is.

    White space in the base64 of a data URI and missing padding do not matter. Raises an ImageError if the data URI is
    not valid base64, or the image is too large or broken.
    """
    data = source
    if isinstance(source, str):
        encoded = source.partition(",")[2].encode("ascii", "replace").translate(None, b" \t\n\f\r")
        try:
            data = base64.b64decode(encoded + b"=" * (-len(encoded) % 4), validate=True)
        except binascii.Error:
            kind = ", but percent-encoded; send it as it was before" if b"%" in encoded else ""
            if b"-" in encoded or b"_" in encoded:
                kind = ", but URL-safe base64; write + for - and / for _"
            raise ImageError(f"{where}: the data URI is not valid base64{kind}") from None
    if len(data) > limits.max_bytes:
        raise ImageError(f"{where}: the image has more than the {limits.max_bytes:,} bytes that are accepted")
    return opened(data, max_pixels=limits.max_pixels, where=where)
