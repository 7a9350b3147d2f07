"""Folders of images: the images in them and below, in the order of their names, and the files that are passed over."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

from muco.errors import DataError
from muco.images import image_suffixes

SHOWN_KINDS = 10  # of files passed over, in a sentence


class ImageFolder(NamedTuple):
    """What a folder holds: a SHA-256 (hex) of names, sizes and times of the images, their number, and other files."""

    fingerprint: str
    total: int
    passed_over: Counter[str]  # by kind, see :func:`image_files`


def state_of_images(folder: Path) -> ImageFolder:
    """Of the images in a folder and those below; a DataError if a folder cannot be listed."""
    digest, total, passed_over = hashlib.sha256(), 0, Counter[str]()
    try:
        for name, entry in image_files(folder, passed_over):
            status = entry.stat(follow_symlinks=entry.is_file())  # of a broken link, its own
            digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
            total += 1
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed: {error}") from error
    return ImageFolder(digest.hexdigest(), total, passed_over)


def image_files(folder: Path, passed_over: Counter[str] | None = None) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Relative names ("a/b.png") and entries of the images in a folder and those below, in the order of the names.

    Hidden files and linked folders are left out. One folder's listing is in memory at a time. ``passed_over`` counts
    the other files by kind: the ending of their names (".heic"), or "other".
    """
    suffixes = image_suffixes()
    with os.scandir(folder) as scan:
        seen = [entry for entry in scan if not entry.name.startswith(".")]
    entries = [(f"{e.name}/" if e.is_dir(follow_symlinks=False) else e.name, e) for e in seen]
    for name, entry in sorted(entries, key=itemgetter(0)):  # "a.png" before "a/", as in whole names
        suffix = os.path.splitext(name)[1].lower()
        if name.endswith("/"):
            yield from ((name + inner, found) for inner, found in image_files(Path(entry.path), passed_over))
        elif entry.is_symlink() and entry.is_dir():
            continue
        elif suffix in suffixes:
            yield name, entry
        elif passed_over is not None:
            passed_over[suffix if re.fullmatch(r"\.[a-z][a-z0-9]{0,9}", suffix) else "other"] += 1


def told_kinds(passed_over: Counter[str]) -> str:
    """ "12 .heic, 3 .avif", the most frequent first."""
    shown = passed_over.most_common(SHOWN_KINDS)
    left = passed_over.total() - sum(count for _, count in shown)
    told = [f"{count:,} {kind}" for kind, count in shown]
    return ", ".join([*told, f"{left:,} of further kinds"] if left else told)


def told_passed_over(folder: Path, passed_over: Counter[str]) -> str:
    """The sentence that tells what of a folder is not read; "" if nothing was passed over."""
    if not passed_over:
        return ""
    return (
        f"{folder}: files of other kinds are passed over: {told_kinds(passed_over)}; to take photographs among them, "
        "convert them to JPEG or PNG"
    )
