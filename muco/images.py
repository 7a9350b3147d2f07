"""Reading images: whatever a user hands in becomes an upright RGB image of sane size, or an ImageError that names it.

Files of strangers are read here, so the order matters: size in bytes, then format and size in pixels from the header,
and only then the pixels. Nothing is fetched, nothing is guessed, and a truncated file is never filled up with grey.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
import stat
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from muco.dialogue import ImageLike, Video
from muco.errors import ImageError
from muco.video import MAX_BYTES as MAX_VIDEO_BYTES
from muco.video import frames_of

# Raster formats only: none that runs or reads others, and none whose decoder takes much more than the pixels take. JPEG
# 2000 is left out, as a file of 57 kB and a million pixels can take 1.7 GB (measured, with precincts of two pixels).
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
JPEGS = ("JPEG", "MPO")  # as Pillow calls files of one picture, and of several as cameras write them

MAX_PIXELS = 89_478_485  # 268 MB as RGB; from here on Pillow warns of decompression bombs
MAX_BYTES = 256 * 2**20
MAX_ASPECT = 200  # the limit of Qwen2-VL's image processor
SMALL_SIDE = 28  # one visual token of Qwen2-VL; an image with a shorter side becomes SMALL_SIZE (docs/paper.md, prompt)
SMALL_SIZE = (56, 56)
# Of a JPEG; real files have about ten scans, one or two segments of EXIF, and a few thousand segments in all at most.
MOST_SCANS = MOST_EXIFS = 100
MOST_SEGMENTS = 10_000
MOST_STRAY = 2**20  # bytes between the segments before the first scan
SETTLED = 2 * 10**9  # nanoseconds; the times of a file that was written just now may be those of its next version too
_URL = re.compile(r"^([a-z][a-z0-9+.-]+://|(http|https|data|file):)", re.IGNORECASE)  # not "C:\x.png"
# Of a JPEG: no stuffed byte, fill byte or restart marker. Those of _BARE have no length after them.
_MARKER = re.compile(rb"\xff([^\x00\x01\xff\xd0-\xd7])")
_BARE = frozenset([*range(2, 0xC0), 0xC8, 0xD8, 0xD9, *range(0xF0, 0xFE)])
_SCAN, _END, _APP1 = 0xDA, 0xD9, 0xE1
_TILE_SIDES = (322, 323)  # the tags of a TIFF
_warning_filters = threading.Lock()  # the filters belong to the process; two threads must not swap them at once


Reduction = Callable[[int, int], int]  # width and height of a JPEG -> 1, 2, 4 or 8: by what it is divided in decoding


def open_image(
    image: ImageLike,
    *,
    max_pixels: int = MAX_PIXELS,
    small_side: int = SMALL_SIDE,
    as_stored: bool = False,
    reduction: Reduction | None = None,
    where: str = "",
) -> Image.Image:
    """An upright RGB image of its own (the input is never changed): EXIF orientation applied, transparency onto white.

    Args:
        image: A path, the bytes of an image file, or a Pillow image. Of an animation the first frame is taken.
        max_pixels: More pixels than this are refused before they are decoded. Pillow's own limit
            (``PIL.Image.MAX_IMAGE_PIXELS``) holds besides, so a larger value alone allows no more.
        small_side: An image with a side under this many pixels is stretched to 56 x 56; 0 leaves it as it is.
        as_stored: Convert to RGB as Pillow alone does: orientation is ignored, transparency dropped, and pixels of more
            than 8 bits clipped.
        reduction: Says how much smaller a JPEG may be, which is decoded several times as fast then; None: not at all.
            What is opened already is taken as it is.
        where: Names the row ("file:line") in errors.
    Raises:
        ImageError: If the image is missing, too large, truncated, broken, of another format, longer than 200 : 1, or
            made so that decoding it takes far more time or memory than its pixels do.
    """
    name = shown_name(image, where)
    opened = image if isinstance(image, Image.Image) else _read_header(read_bytes(image, name), max_pixels, name)
    _check_size(opened.size, max_pixels, name)
    try:
        if reduction and opened is not image and opened.format in JPEGS and (factor := reduction(*opened.size)) > 1:
            opened.draft(None, (opened.width // factor, opened.height // factor))
        opened.load()
        rgb = opened.convert("RGB") if as_stored else _to_rgb(ImageOps.exif_transpose(opened), name)
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # decoders of broken files raise nearly anything: OSError, SyntaxError, struct.error …
        raise ImageError(f"{name}: the image is truncated or broken ({_reason(error)}); replace the file") from error
    rgb.info = {}
    if min(rgb.size) < small_side:
        rgb = rgb.resize(SMALL_SIZE, Image.Resampling.BICUBIC)
    return rgb


def pictures(image: ImageLike, *, where: str = "") -> tuple[ImageLike, ...]:
    """The frames of a video, which need not have been opened; of anything else, itself."""
    return frames_of(image, where=where).images if isinstance(image, Video) else (image,)


def opened_image(image: ImageLike, *, where: str = "", **how: Any) -> Image.Image | Video:
    """An opened image, or a video of opened frames, as :func:`open_image` opens them, which takes ``how``.

    Raises an ImageError also if the frames of a video differ in size.
    """
    if not isinstance(image, Video):
        return open_image(image, where=where, **how)
    found = frames_of(image, where=where)
    frames = tuple(open_image(frame, where=where, **how) for frame in found.images)
    if len(sizes := {f"{frame.width} x {frame.height}" for frame in frames}) > 1:
        listed = " and ".join(sorted(sizes)[:2])
        raise ImageError(f"{shown_name(image, where)}: its frames differ in size ({listed}); make them alike")
    return Video(frames, len(frames), 1 / found.apart if found.apart else None)


def cover(image: ImageLike, *, where: str = "") -> ImageLike:
    """What is shown of an image: the first frame of a video, else itself."""
    return pictures(replace(image, frames=1), where=where)[0] if isinstance(image, Video) else image


@cache
def image_suffixes() -> frozenset[str]:
    """Endings of the names of files that :func:`open_image` reads (".jpg"), in lower case, as Pillow knows them."""
    formats = (*FORMATS, "MPO", "DIB")  # what cameras and Windows call files of JPEG and BMP
    return frozenset(suffix for suffix, format in Image.registered_extensions().items() if format in formats)


def resize_to_budget(image: Image.Image, max_pixels: int) -> Image.Image:
    """The image itself if it has at most ``max_pixels`` pixels, else a smaller one of the same aspect.

    The model's own processor makes the final size; this only keeps what data loading workers hold and send small.
    """
    if max_pixels < 1:
        raise ValueError(f"max_pixels must be at least 1, not {max_pixels}")
    width, height = image.size
    if width * height <= max_pixels:
        return image
    scale = math.sqrt(max_pixels / (width * height))
    # A thin image may shrink to less than one pixel: then that side stays 1 and the other takes the whole budget.
    new_width = min(max(1, int(width * scale)), max_pixels)
    new_height = max(1, min(int(height * scale), max_pixels // new_width))
    return image.resize((new_width, new_height), Image.Resampling.LANCZOS, reducing_gap=3.0)


def image_digest(image: ImageLike, *, where: str = "") -> str:
    """The digest by which MuCo tells images apart: SHA-256 (hex), 64 characters.

    Of a file or its bytes, the digest of these bytes: a copy under another name is the same image. Of a Pillow image,
    that of its size and RGB pixels as :func:`open_image` returns them, which never equals that of a file. Of a video,
    that of its file, or of the digests of the frames that are read, with their number and rate. Digests of files are
    cached until size or time of the file changes.

    Raises:
        ImageError: If the file is missing or too large, or the Pillow image cannot be read.
    """
    if isinstance(image, Video):
        return _video_digest(image, where)
    if isinstance(image, Image.Image):
        rgb = open_image(image, small_side=0, where=where)
        digest = hashlib.sha256(f"{rgb.width}x{rgb.height} RGB\n".encode())
        digest.update(rgb.tobytes())
        return digest.hexdigest()
    name = shown_name(image, where)
    status = None if isinstance(image, bytes) else file_status(image, name)
    if status is None or time.time_ns() - status.st_mtime_ns < SETTLED:
        return hashlib.sha256(read_bytes(image, name)).hexdigest()
    return _remembered(image, status, where)


def _video_digest(video: Video, where: str) -> str:
    source = video.source
    if isinstance(source, Path) and not source.is_dir():
        status = file_status(source, shown_name(video, where), MAX_VIDEO_BYTES)
        settled = time.time_ns() - status.st_mtime_ns >= SETTLED
        seen = [_remembered(source, status, where) if settled else _streamed(str(source)), video.frames]
    else:
        seen = [image_digest(frame, where=where) for frame in pictures(video, where=where)]
    return hashlib.sha256(f"video {json.dumps([seen, video.fps])}".encode()).hexdigest()


def _remembered(path: str | Path, status: os.stat_result, where: str) -> str:
    try:
        return _file_digest(str(path), status.st_ino, status.st_size, status.st_mtime_ns)
    except ImageError as error:
        raise ImageError(f"{where}: {error}" if where else str(error)) from error


@lru_cache(1 << 14)
def _file_digest(path: str, *state: int) -> str:
    return _streamed(path) if state[1] > MAX_BYTES else hashlib.sha256(read_bytes(path, path)).hexdigest()


def _streamed(path: str) -> str:
    """The digest of a file that may be larger than memory."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ImageError(f"{path}: cannot be read ({error.strerror or error})") from error


def is_url(path: str) -> bool:
    """True for http:, https:, data:, file: and anything with ``scheme://``. MuCo fetches no images."""
    return _URL.match(path) is not None


def shown_name(image: ImageLike, where: str) -> str:
    if isinstance(image, str) and is_url(image):
        shown = image if len(image) <= 80 else image[:77] + "…"  # a data: URL may be megabytes long
    elif isinstance(image, (str, Path, Video)):
        shown = str(image)
    elif isinstance(image, bytes):
        shown = "image bytes"
    else:
        shown = "Pillow image" if isinstance(image, Image.Image) else "image"
    return f"{where}: {shown}" if where else shown


def read_bytes(image: str | Path | bytes, name: str) -> bytes:
    """The bytes of an image file, at most ``MAX_BYTES``; nothing says yet whether they are an image."""
    data = image
    if not isinstance(image, bytes):
        file_status(image, name)
        try:
            data = Path(image).read_bytes()
        except OSError as error:
            raise ImageError(f"{name}: cannot be read ({error.strerror or error})") from error
    if not data:
        raise ImageError(f"{name}: the image is empty (0 bytes)")
    if len(data) > MAX_BYTES:
        raise ImageError(f"{name}: {len(data):,} bytes; at most {MAX_BYTES:,} are read")
    return data


def file_status(path: str | Path, name: str, most: int = MAX_BYTES) -> os.stat_result:
    """Of a file that may be read: no URL, folder or pipe, and not too large."""
    if not isinstance(path, (str, Path)):
        raise ImageError(f"{name}: an image must be a path, bytes or a Pillow image, not {type(path).__name__}")
    if isinstance(path, str) and is_url(path):
        raise ImageError(f"{name}: URLs are not fetched; download the image and pass its path")
    try:
        status = Path(path).stat()
    except FileNotFoundError as error:
        raise ImageError(f"{name}: no such image file") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL byte or a lone surrogate in the path
        raise ImageError(f"{name!r}: cannot be read ({error})") from error
    if not stat.S_ISREG(status.st_mode):  # a folder, or a pipe that would block for ever
        raise ImageError(f"{name}: not a file")
    if status.st_size > most:
        raise ImageError(f"{name}: {status.st_size:,} bytes; at most {most:,} are read")
    return status


def _read_header(data: bytes, max_pixels: int, name: str) -> Image.Image:
    _check_parts(data, name)
    try:
        with _warning_filters, warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            opened = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ImageError(f"{name}: too many pixels, perhaps a decompression bomb ({error}); make it smaller") from error
    except UnidentifiedImageError as error:
        accepted = ", ".join(FORMATS[:-1]) + " or " + FORMATS[-1]
        raise ImageError(f"{name}: not an image that can be read; it must be a sound {accepted}") from error
    except Exception as error:  # as in open_image
        raise ImageError(f"{name}: the image is truncated or broken ({_reason(error)}); replace the file") from error
    if isinstance(opened, TiffImageFile):
        width, height = (opened.tag_v2.get(tag, 0) for tag in _TILE_SIDES)  # a tile is decoded whole, whatever the size
        if not isinstance(width, int) or not isinstance(height, int) or width * height > max_pixels:
            raise ImageError(f"{name}: its tiles are {width} x {height}, over the limit of {max_pixels:,} pixels")
    return opened


def _check_parts(data: bytes, name: str) -> None:
    """Refuses a JPEG that takes far more time than its pixels do.

    Each scan is decoded at full size, and Pillow reads what is before the first slowly, in a lock (see _read_header):
    each segment and each byte between them by itself, and all EXIF again with each segment of it. Markers are followed
    as the decoder does, to the end of the first picture, because thumbnails within segments and videos behind the
    picture (as phones write them) have bytes that look like markers.
    """
    if not data.startswith(b"\xff\xd8\xff"):
        return
    scans = exifs = segments = stray = place = 0
    while True:
        found = _MARKER.search(data, place)
        start, marker, after = (found.start(), found[1][0], found.end()) if found else (len(data), _END, len(data))
        stray += 0 if scans else start - place
        segments += 1
        scans += marker == _SCAN
        exifs += marker == _APP1 and data.startswith(b"Exif\0\0", after + 2)
        if scans > MOST_SCANS or exifs > MOST_EXIFS or segments > MOST_SEGMENTS or stray > MOST_STRAY:
            raise ImageError(
                f"{name}: a JPEG of too many parts ({segments} segments, {scans} scans and {exifs} segments of EXIF so "
                f"far, {stray:,} bytes outside them); save it again by an image program"
            )
        if found is None or (marker == _END and scans):
            return
        place = after + (0 if marker in _BARE else max(2, int.from_bytes(data[after : after + 2], "big")))


def _check_size(size: tuple[int, int], max_pixels: int, name: str) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(f"{name}: {width} x {height} has no pixels")
    if width * height > max_pixels:
        raise ImageError(f"{name}: {width} x {height} is over the limit of {max_pixels:,} pixels; make it smaller")
    if max(size) > MAX_ASPECT * min(size):
        raise ImageError(f"{name}: {width} x {height} is longer than {MAX_ASPECT} : 1; crop it")


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """A new RGB image. Pillow alone would clip 16-bit and float pixels to white or black."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError(f"{name}: pixels of mode {image.mode} outside 0 … 65535; save it with 8 bits per channel")
        levels = (values + 128) // 257
        if isinstance(key := image.info.get("transparency"), int):  # the one grey value that a PNG calls transparent
            levels[values == key] = 255
        return Image.fromarray(levels.astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        values = np.asarray(image)
        if not (values.min() >= 0 and values.max() <= 1):  # written so that NaN is refused too
            raise ImageError(f"{name}: float pixels outside 0 … 1; save it with 8 bits per channel")
        return Image.fromarray((values * 255 + 0.5).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        if image.mode == "La":  # premultiplied grey: Pillow knows no way from it but to LA
            image = image.convert("LA")
        rgba = image.convert("RGBA")
        rgb = Image.new("RGB", image.size, "white")
        rgb.paste(rgba, mask=rgba.getchannel("A"))
        return rgb
    return image.convert("RGB")


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__
