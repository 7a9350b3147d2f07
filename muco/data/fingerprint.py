"""What tells one state of data from another: found in seconds however much there is, and the same for a copy elsewhere.

A fingerprint is the SHA-256 (hex) of how the data is read, of the bytes of its files, and of the bytes of the images
that ``LOOKED`` rows name, which are spread evenly over the data; of all rows if there are fewer. So any change of
a row shows, and so do other images, but for a few among very many. Names of folders and times of files do not count.
"""

from __future__ import annotations

import hashlib
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

from muco.base.files import write_json
from muco.data.images import sample_images
from muco.data.places import file_state
from muco.dialogue import ImageLike
from muco.errors import DataError, ImageError
from muco.images import SETTLED, image_digest

RULE = 2  # raise when equal data gets another fingerprint than before
LOOKED = 1024  # rows
THREADS = 16  # they wait for the disk

_known: dict[str, list[Any]] = {}  # absolute path -> size, modification time in ns, SHA-256 (hex) of a file


class Fingerprinted(ABC):
    """Gives data its fingerprints, which are found when first asked for and then kept."""

    @abstractmethod
    def _read_from(self) -> tuple[Sequence[Path], Any]:
        """The files that hold the rows, and the options by which they are read, as JSON can hold them."""

    @cached_property
    def fingerprint(self) -> str:
        """See the module; a DataError if a row that is looked at cannot be used, or one of its images is missing."""
        return fingerprint_of(self, *self._read_from())

    @cached_property
    def readable_fingerprint(self) -> str:
        """The same where nothing is wrong; what cannot be read counts as missing, for runs that skip it."""
        return fingerprint_of(self, *self._read_from(), skip_broken=True)


def fingerprint_for(data: Any, *, skip_broken: bool) -> str:
    """The fingerprint of any data; with ``skip_broken`` the one that broken rows do not stop, where there is one."""
    kind = "readable_fingerprint" if skip_broken and hasattr(data, "readable_fingerprint") else "fingerprint"
    return getattr(data, kind)


def fingerprint_of(data: Any, files: Sequence[Path], options: Any, *, skip_broken: bool = False) -> str:
    """The fingerprint of data that is read from these files; :class:`Fingerprinted` has the errors."""
    digests = [file_digest(file) for file in files]
    images = _looked_at(data, skip_broken=skip_broken)

    def look(image: ImageLike, where: str) -> str:
        try:
            return image_digest(image, where=where)
        except ImageError:
            if not skip_broken:
                raise
            return "missing"

    with ThreadPoolExecutor(THREADS) as threads:
        seen = [*threads.map(look, images, images.values())]
    return hashlib.sha256(json.dumps([RULE, options, digests, seen], sort_keys=True).encode()).hexdigest()


def _looked_at(data: Any, *, skip_broken: bool) -> dict[ImageLike, str]:
    """The images of some rows, each with the first row that has it; images that are bytes come out of the files."""
    found: dict[ImageLike, str] = {}
    count = min(len(data), LOOKED)
    for row in range(count):
        try:
            sample = data[row * len(data) // count]
        except DataError:
            if not skip_broken:
                raise
            continue
        for image in sample_images(sample):
            if not isinstance(image, bytes):
                found.setdefault(image, sample.where)
    return found


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of a file, remembered while size and time stay; a DataError if it cannot be read or changes."""
    place = str(path.absolute())
    before = file_state(path)
    known = _known.get(place)
    if known is not None and tuple(known[:2]) == before:
        return known[2]
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    after = file_state(path)
    if after != before:
        raise DataError(f"{path}: the file changed while it was read; start again when it is complete")
    if time.time_ns() - after[1] > SETTLED:
        _known[place] = [*after, digest]
    return digest


def recall(file: Path) -> None:
    """Takes up the digests of files that :func:`remember` left; one that is damaged is forgotten."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if isinstance(found, dict):
        whole = {place: entry for place, entry in found.items() if isinstance(entry, list)}
        _known.update({place: entry for place, entry in whole.items() if [*map(type, entry)] == [int, int, str]})


def remember(file: Path) -> None:
    """Leaves the digests of all files that were read for another process."""
    write_json(file, _known)
