"""Images of strangers: from a data URI, or over http(s) where that is allowed, to an RGB image within limits."""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from muco.errors import ImageError
from muco.fetch import FetchLimits, fetch

if TYPE_CHECKING:
    from PIL.Image import Image

DATA_URI = re.compile(r"data:image/[a-z0-9.+-]{1,40};base64,", re.IGNORECASE)
FETCHED = ("http://", "https://")
FETCHES = 8  # at once


@dataclass(frozen=True)
class ImageLimits:
    """Of one image.

    Args:
        max_bytes: As a file.
        max_pixels: Decoded; known from the header before a pixel is.
        fetch: How http(s) URLs are fetched; None: not at all.
    """

    max_bytes: int = 20 * 2**20
    max_pixels: int = 16_000_000
    fetch: FetchLimits | None = None


def check_source(source: str, limits: ImageLimits, where: str) -> None:
    """Refuses what cannot be an image, before anything is decoded or fetched.

    Raises:
        ImageError: If the source is neither a data URI nor a URL that may be fetched, or too large.
    """
    if source[:8].lower().startswith(FETCHED):
        if limits.fetch is None:
            raise ImageError(f"{where}: this server fetches no URLs; send the image as a data:image/…;base64 URI")
        return
    if not (head := DATA_URI.match(source)):
        accepted = "a data:image/…;base64 URI" + (" or an http(s) URL" if limits.fetch else "")
        raise ImageError(f"{where}: an image must be {accepted}")
    if (len(source) - head.end()) // 4 * 3 > limits.max_bytes + 2:
        raise ImageError(f"{where}: the image has more than the {limits.max_bytes:,} bytes that are accepted")


def decode(source: str | bytes, limits: ImageLimits, where: str) -> Image:
    """The RGB image of a data URI or of bytes that were fetched.

    Raises:
        ImageError: If it is no sound image within the limits.
    """
    from muco.data.images import open_image

    data = source if isinstance(source, bytes) else _bytes(source, where)
    return open_image(data, max_pixels=limits.max_pixels, where=where)


def _bytes(source: str, where: str) -> bytes:
    try:
        return base64.b64decode(source[source.index(",") + 1 :], validate=True)
    except (binascii.Error, ValueError):
        raise ImageError(f"{where}: the data URI is not valid base64") from None


class Fetcher:
    """Fetches a request's images, some at a time over all requests."""

    def __init__(self, limits: FetchLimits) -> None:
        self._limits = limits
        self._threads = ThreadPoolExecutor(FETCHES, "muco-fetch")

    async def replace(self, sources: Sequence[str]) -> list[str | bytes]:
        """Data URIs as they are, and the bytes behind URLs.

        Raises:
            FetchError: If a URL cannot be fetched.
        """
        loop = asyncio.get_running_loop()

        async def one(source: str) -> str | bytes:
            if not source[:8].lower().startswith(FETCHED):
                return source
            return await loop.run_in_executor(self._threads, fetch, source, self._limits)

        return list(await asyncio.gather(*map(one, sources)))

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
