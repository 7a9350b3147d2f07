"""Videos: frames at even distances from a list, a folder or a file. No torch in this file.

Files are decoded by PyAV, which ``pip install av`` (or ``muco[video]``) brings; frames that are images need nothing.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from muco.dialogue import ImageLike, Video
from muco.errors import ImageError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")  # of the frames in a folder, in any case
FPS = 2.0  # of frames that say nothing of time, as Qwen's own code takes them
MAX_BYTES = 2 << 30  # of a file
MAX_FRAME_PIXELS = 8192 * 8192
_NUMBERS = re.compile(r"(\d+)")


@dataclass(frozen=True)
class Frames:
    """The chosen frames of a video in order, and the seconds from one to the next."""

    images: tuple[ImageLike, ...]
    apart: float

    @property
    def seconds(self) -> tuple[float, ...]:
        """When each is shown, from the first on; to the microsecond, so that rounding of ``apart`` does not show."""
        return tuple(round(number * self.apart, 6) for number in range(len(self.images)))


def frames_of(video: Video, *, where: str = "") -> Frames:
    """At most ``video.frames`` frames at even distances, the first and the last among them.

    Returns:
        Images as they were given, paths of a folder's files, or RGB Pillow images out of a file.
    Raises:
        ImageError: If there is no frame, the file cannot be read, or PyAV is needed and not installed; names the
            source and the row.
    """
    if isinstance(video.source, Path) and not video.source.is_dir():
        return _decoded(video, f"{where}: {video}" if where else str(video))
    images = frame_files(video.source, where=where) if isinstance(video.source, Path) else video.source
    places = spaced(len(images), video.frames)
    return Frames(tuple(images[place] for place in places), _apart((len(images) - 1) / (video.fps or FPS), places))


def _apart(whole: float, places: list[int]) -> float:
    """The seconds between frames at even distances, of which the first and the last are ``whole`` seconds apart."""
    return whole / (len(places) - 1) if len(places) > 1 else 0.0


def frame_files(folder: Path, *, where: str = "") -> list[Path]:
    """The frames of a folder in the natural order of their names ("2.jpg" before "10.jpg"); other files are ignored.

    Raises an ImageError if there is none.
    """
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if entry.name.lower().endswith(SUFFIXES) and entry.is_file()]
    except OSError as error:
        raise ImageError(f"{_at(where)}{folder}: cannot be read ({error.strerror or error})") from error
    if not names:
        raise ImageError(f"{_at(where)}{folder}: no frames in this folder; looked for {', '.join(SUFFIXES)}")
    return [Path(folder) / name for name in sorted(names, key=_natural)]


def spaced(count: int, wanted: int) -> list[int]:
    """``wanted`` of ``count`` places at even distances, rounded down; all of them if there are not more."""
    return np.linspace(0, count - 1, min(count, wanted)).astype(int).tolist()


def _natural(name: str) -> tuple[Any, ...]:
    parts = _NUMBERS.split(name.lower())  # text and digits by turns
    return (*((int(part), part) if place % 2 else part for place, part in enumerate(parts)), name)


def _at(where: str) -> str:
    return f"{where}: " if where else ""


def _decoded(video: Video, name: str) -> Frames:
    file = Path(str(video.source))
    if not file.is_file():
        raise ImageError(f"{name}: no such video file or folder of frames")
    if (size := file.stat().st_size) > MAX_BYTES:
        raise ImageError(f"{name}: {size:,} bytes; at most {MAX_BYTES:,} are read")
    try:
        import av
    except ImportError as error:
        message = f"{name}: a video file needs the package av: pip install 'muco[video]', or pass its frames as images"
        raise ImageError(message) from error
    try:
        with av.open(str(file), metadata_errors="ignore") as container:
            return _chosen(container, video, name)
    except (av.FFmpegError, ValueError) as error:
        raise ImageError(f"{name}: not a video that can be read ({error}); replace the file") from error


def _chosen(container: Any, video: Video, name: str) -> Frames:
    if not container.streams.video:
        raise ImageError(f"{name}: the file has no pictures, only sound or text")
    stream = container.streams.video[0]
    if stream.width * stream.height > MAX_FRAME_PIXELS:
        raise ImageError(f"{name}: frames of {stream.width} x {stream.height} pixels are too large; make it smaller")
    stamps = sorted(packet.pts for packet in container.demux(stream) if packet.pts is not None)
    if not stamps:
        raise ImageError(f"{name}: the video has no frames")
    images, places = [], spaced(len(stamps), video.frames)
    for place in places:
        container.seek(stamps[place], stream=stream)  # to the last whole frame before it, from which others follow
        frame = next((frame for frame in container.decode(stream) if frame.pts >= stamps[place]), None)
        if frame is None:
            raise ImageError(f"{name}: the video ends before frame {place + 1} of {len(stamps)}; replace the file")
        images.append(frame.to_image())
    whole = (len(stamps) - 1) / video.fps if video.fps else float((stamps[-1] - stamps[0]) * stream.time_base)
    return Frames(tuple(images), _apart(whole, places))
