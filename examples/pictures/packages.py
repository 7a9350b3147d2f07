"""Files of installed Debian packages, read safely: bytes, XML, and pictures of nearly any size.

A package may also be unpacked elsewhere (``dpkg -x FILE.deb DIR``); then DIR takes the place of ``/``.
"""

from __future__ import annotations

import os
import xml.etree.ElementTree as ElementTree
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

from PIL import Image, ImageChops

from muco.errors import DataError, ImageError
from muco.images import open_image

SIDE = 224  # pixels of the longer side of a written picture, at most
KEPT = 0.85  # of a side; if what is not white takes less than this, the margin is cut
MARGIN = 0.04  # of the longer side; the margin that is left then
AHEAD = 16  # pictures that are read before they are asked for
MAX_BYTES = 16 << 20  # of a text file or an SVG
MAX_PIXELS = 180_000_000  # of an installed picture: 0.7 GB as RGBA; Pillow alone stops at half of it


class TooLarge(ImageError):
    """A picture has more pixels than are read."""


def read_bytes(file: Path, package: str | None = None, limit: int = MAX_BYTES) -> bytes:
    """The bytes of an installed file.

    Raises:
        DataError: If it is missing, and says which Debian package has it; or if it has more than ``limit`` bytes.
    """
    if not file.is_file():
        raise DataError(f"{file}: no such file; {advice(package)}")
    size = file.stat().st_size
    if size > limit:
        raise DataError(f"{file}: {size:,} bytes; at most {limit:,} are read")
    return file.read_bytes()


def installed(folder: Path, package: str) -> Path:
    """The folder of a package; a DataError names the package if it is missing."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; {advice(package)}")
    return folder


def advice(package: str | None) -> str:
    return f"install the Debian package {package} (apt install {package})" if package else "check the path"


def read_xml(file: Path, package: str | None = None, limit: int = MAX_BYTES) -> ElementTree.Element:
    """The root of an XML file.

    A DOCTYPE that only names its DTD is allowed, as nearly half of the drawings have one; it is never fetched.

    Raises:
        DataError: If the file is missing, too large, no XML, or has entities or an encoding that could hide them.
    """
    content = read_bytes(file, package, limit)
    if b"<!ENTITY" in content or b"\0" in content:
        raise DataError(f"{file}: it defines XML entities or is UTF-16, and is not read")
    try:
        return ElementTree.fromstring(content)
    except (ElementTree.ParseError, LookupError, ValueError) as error:  # the last two: an unknown encoding
        raise DataError(f"{file}: not XML ({error}); {advice(package)} again") from error


# ---------------------------------------------------------------- pictures


def read_picture(file: Path, side: int = SIDE, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """RGB on white, the longer side at most ``side`` pixels, without most of a white or transparent margin.

    It is made small before it is put on white: some installed drawings have 169 million pixels, which are 0.7 GB, and
    three times as much if each step keeps the whole.

    Raises:
        ImageError: If it is broken or no PNG; :class:`TooLarge` if it has more than ``max_pixels``.
    """
    with pixels_counted_here():
        try:
            with Image.open(file, formats=("PNG",)) as opened:
                if opened.width * opened.height > max_pixels:
                    size = f"{opened.width} x {opened.height}"
                    raise TooLarge(f"{file}: {size} pixels; at most {max_pixels:,} are read")
                whole = opened.convert("RGBA") if opened.mode in ("P", "LA", "1") else opened
                picture = shrunk(whole, (0, 0, *whole.size), side, file)
                box = ink(picture)
                if box and (box[2] - box[0] < KEPT * picture.width or box[3] - box[1] < KEPT * picture.height):
                    picture = shrunk(whole, with_margin(box, whole.width / picture.width, whole.size), side, file)
                return picture
        except (ImageError, MemoryError):
            raise
        except Exception as error:  # decoders of broken files raise nearly anything: OSError, SyntaxError, struct.error
            raise ImageError(f"{file}: the picture is broken ({error or type(error).__name__})") from error


def usable_pictures(
    files: Iterable[Path], left_out: Counter[str], max_pixels: int = MAX_PIXELS
) -> Iterator[Image.Image | None]:
    """:func:`read_picture` of each file in order, by threads; None where the reason is counted in ``left_out``."""
    reads: deque[Future[Image.Image | str]] = deque()
    # entered here once, as Pillow's limit is one for all threads
    with pixels_counted_here(), ThreadPoolExecutor(os.cpu_count()) as threads:
        for file in chain(files, (None,) * AHEAD):
            if file is not None:
                reads.append(threads.submit(_usable, file, max_pixels))
            if reads and (file is None or len(reads) > AHEAD):
                found = reads.popleft().result()
                if isinstance(found, str):
                    left_out[found] += 1
                yield None if isinstance(found, str) else found


def _usable(file: Path, max_pixels: int) -> Image.Image | str:
    """A picture, or why it is left out."""
    try:
        picture = read_picture(file, max_pixels=max_pixels)
    except TooLarge:
        return "too many pixels"
    except ImageError:
        return "PNG cannot be read"
    return "nothing to be seen on white" if blank(picture) else picture


def shrunk(whole: Image.Image, box: tuple[float, ...], side: int, file: Path) -> Image.Image:
    """The box of a picture, (left, top, right, bottom) in pixels, as RGB on white; never enlarged."""
    width, height = box[2] - box[0], box[3] - box[1]
    scale = min(1.0, side / max(width, height))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = whole.resize(size, Image.Resampling.LANCZOS, box, reducing_gap=3.0)
    return open_image(small, small_side=0, where=str(file))


def ink(picture: Image.Image, more_than: int = 0) -> tuple[int, int, int, int] | None:
    """The box (left, top, right, bottom) of what differs from white in an RGB picture; None if nothing does.

    Args:
        more_than: Of 255; smaller differences, such as those of a pale shadow, do not count.
    """
    difference = ImageChops.difference(picture, Image.new("RGB", picture.size, "white"))
    if more_than:
        difference = difference.convert("L").point([255 * (level > more_than) for level in range(256)])
    return difference.getbbox()


def blank(picture: Image.Image) -> bool:
    """Whether nothing can be seen: no pixel differs from white by more than 5 of 255."""
    return picture.convert("L").getextrema()[0] >= 250


def with_margin(box: Sequence[int], scale: float, size: tuple[int, int]) -> tuple[float, ...]:
    """The box times ``scale``, with a margin of MARGIN of its longer side, within a picture of ``size``."""
    margin = MARGIN * max(box[2] - box[0], box[3] - box[1]) + 1
    moved = (box[0] - margin, box[1] - margin, box[2] + margin, box[3] + margin)
    return tuple(min(max(0.0, place * scale), end) for place, end in zip(moved, size * 2, strict=True))


@contextmanager
def pixels_counted_here() -> Iterator[None]:
    """Without Pillow's own limit, which is for the files of strangers: :func:`read_picture` has a stated one."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before
