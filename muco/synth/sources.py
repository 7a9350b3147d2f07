"""Sources of pictures: a folder, URLs in Parquet files, or webdataset shards.

A source lists its pictures in a fixed order, from any number on, and holds none of their bytes. It can be sent to
another process, which reads pictures by their ``ref``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from muco.base.fetch import FetchError, FetchLimits, fetch, without_query
from muco.data.folders import image_files, state_of_images, told_passed_over
from muco.data.parquet import batches, read_header, require_columns
from muco.data.places import file_state, open_unchanged
from muco.data.shards import key_and_kind, members
from muco.errors import DataError, ImageError
from muco.images import image_suffixes, read_bytes

URL_COLUMNS = ("url", "URL")  # in published lists of pictures
SHARD_KINDS = ("jpg", "jpeg", "png", "webp")
LONGEST_NAME = 300  # characters

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Picture:
    """One picture of a source."""

    number: int  # from 0, in the order of the source
    name: str  # for people: a relative path, a URL without its query, "shard.tar/0001.jpg", or from a column
    ref: str  # by which the source reads it


@dataclass(frozen=True)
class Source(ABC):
    """A list of pictures."""

    path: Path
    fingerprint: str  # SHA-256 (hex) of names, sizes and times of the files
    total: int | None  # the number of pictures; None: unknown without reading everything
    root: Path | None  # the folder of the pictures, whose refs are their paths in it; None: they must be stored

    @abstractmethod
    def pictures(self, start: int = 0) -> Iterator[Picture]:
        """The pictures from number ``start`` on; DataError if the list is broken."""

    @abstractmethod
    def read(self, ref: str) -> bytes:
        """The bytes of the picture's file, not checked to be a picture.

        Raises:
            ImageError: If there is no such file, or it is empty or too large.
            FetchError: If a URL could not be fetched.
            DataError: If the list has changed since it was opened.
        """


def open_source(
    path: str | Path, *, url_column: str | None = None, name_column: str | None = None, fetch: FetchLimits | None = None
) -> Source:
    """Opens a source of pictures.

    Args:
        path: A folder with images in it or below; a ``.parquet`` file or a folder of them; a ``.tar`` shard or a folder
            of them. A Parquet file with the name of a shard or folder beside it, as downloaders write it, is not read.
        url_column: Of the Parquet files; None: "url" or "URL".
        name_column: Of the Parquet files, with names for people; None: the URLs without their queries.
        fetch: Limits; None: those of muco/base/fetch.py.
    Raises:
        DataError: If there is nothing, more than one kind, an unreadable file, or no such column.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    try:
        files = [path] if path.is_file() else sorted(f for f in path.iterdir() if not f.name.startswith("."))
        image = path.is_dir() and next(image_files(path), None) is not None
    except OSError as error:
        raise DataError(f"{path}: cannot be listed: {error}") from error
    shards = [file for file in files if file.suffix == ".tar"]
    described = {shard.with_suffix("") for shard in shards} | {file for file in files if file.is_dir()}
    tables = [file for file in files if file.suffix in (".parquet", ".pq") and file.with_suffix("") not in described]
    if path.is_file() and not shards and not tables:
        raise DataError(f"{path}: pass a folder of images, a .parquet file of URLs, or a plain .tar shard")
    kinds = [what for what, there in (("images", image), (".parquet files", tables), (".tar shards", shards)) if there]
    if len(kinds) > 1:
        raise DataError(f"{path}: both {' and '.join(kinds)}; name a folder or file that has one kind of them only")
    if not kinds:
        looked = f"images ({', '.join(sorted(image_suffixes()))}; also in folders below), .parquet files, .tar shards"
        raise DataError(f"{path}: no pictures here; looked for {looked}")
    if not tables and (url_column or name_column):
        raise DataError(f"{path}: no .parquet files here, so there is no column {url_column or name_column!r}")
    if tables:
        return _open_urls(path, tables, url_column, name_column, fetch or FetchLimits())
    if shards:
        return _open_shards(path, shards)
    state = state_of_images(path)
    if state.passed_over:
        log.warning("%s", told_passed_over(path, state.passed_over))
    return FolderSource(path, state.fingerprint, state.total, path)


def _fingerprint(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class FolderSource(Source):
    """Images in a folder and those below, in the order of their names."""

    def pictures(self, start: int = 0) -> Iterator[Picture]:
        for number, (name, _) in islice(enumerate(image_files(self.path)), start, None):
            shown = os.fsencode(name).decode("utf-8", "replace")  # a name that is not UTF-8 cannot be in a data set
            yield Picture(number, shown, shown)

    def read(self, ref: str) -> bytes:
        return read_bytes(self.path / ref, ref)


@dataclass(frozen=True)
class UrlSource(Source):
    """Pictures at the URLs in Parquet files, row by row."""

    files: tuple[Path, ...]
    rows: tuple[int, ...]  # of each file
    columns: tuple[str, ...]  # of the URL, and of the name if any
    limits: FetchLimits

    def pictures(self, start: int = 0) -> Iterator[Picture]:
        for file, rows, end in zip(self.files, self.rows, accumulate(self.rows), strict=True):
            if start < end:
                yield from self._pictures_of(file, end - rows, max(0, start - end + rows))

    def read(self, ref: str) -> bytes:
        if not ref:
            raise FetchError("the row has no URL")
        return fetch(ref, self.limits)

    def _pictures_of(self, file: Path, first: int, start: int) -> Iterator[Picture]:
        for number, batch in batches(file, self.columns, start):
            try:
                urls, names = batch.column(0).to_pylist(), batch.column(-1).to_pylist()
            except UnicodeDecodeError as error:
                reason = f"text that is not UTF-8 after row {number} ({error.reason})"
                raise DataError(f"{file}: {reason}; repair the file") from error
            for row, (url, name) in enumerate(zip(urls, names, strict=True), start=number):
                url = (url or "").strip()
                name = without_query(url) if name is None or len(self.columns) == 1 else str(name)
                yield Picture(first + row, name[:LONGEST_NAME] or f"{file.name} row {row}", url)


def _open_urls(path: Path, files: list[Path], url: str | None, name: str | None, limits: FetchLimits) -> Source:
    found = read_header(files[0])[0]
    if url is None:
        url = next((column for column in URL_COLUMNS if column in found), None)
    if url is None:
        wanted = " or ".join(map(repr, URL_COLUMNS))
        raise DataError(f"{files[0]}: no column {wanted}; it has {', '.join(found)}; name the one that holds the URLs")
    columns = (url,) if name is None else (url, name)
    for file in files:
        require_columns(file, columns)
        kind = pq.read_schema(file).field(url).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise DataError(f"{file}: the column {url!r} must hold URLs as strings, not {kind}")
    rows = tuple(read_header(file)[1] for file in files)
    if not sum(rows):
        raise DataError(f"{path}: no rows")
    states = [[file.name, *file_state(file)] for file in files]
    return UrlSource(path, _fingerprint(columns, states), sum(rows), None, tuple(files), rows, columns, limits)


@dataclass(frozen=True)
class ShardSource(Source):
    """Images in webdataset shards, in their order there; other members are skipped.

    Resuming in the middle reads the headers of the earlier shards again.
    """

    files: tuple[Path, ...]
    states: tuple[tuple[int, int], ...]

    def pictures(self, start: int = 0) -> Iterator[Picture]:
        first = 0
        for shard, file in enumerate(self.files):
            with open_unchanged(file, self.states[shard]) as opened:
                found = [
                    (member.name.removeprefix("./"), f"{shard}:{member.offset_data}:{member.size}")
                    for member in members(opened, file, Counter())
                    if key_and_kind(member.name)[1] in SHARD_KINDS
                ]  # of the whole shard: a damaged one yields no picture
            for number, (name, ref) in enumerate(found, first):
                if number >= start:
                    yield Picture(number, f"{file.name}/{name}"[:LONGEST_NAME], ref)
            first += len(found)

    def read(self, ref: str) -> bytes:
        shard, place, size = map(int, ref.split(":"))
        with open_unchanged(self.files[shard], self.states[shard]) as file:
            file.seek(place)
            data = file.read(size)
        if not data:
            raise ImageError(f"{self.files[shard].name}: the image at byte {place} is empty (0 bytes)")
        return data


def _open_shards(path: Path, files: list[Path]) -> Source:
    states = tuple(map(file_state, files))
    for file in files:  # a broken download is found now, not after days: an archive ends with zeros
        try:
            with file.open("rb") as opened:
                size = opened.seek(0, os.SEEK_END)
                opened.seek(max(0, size - 512))
                whole = opened.read() == bytes(512) and size % 512 == 0
        except OSError as error:
            raise DataError(f"{file}: cannot be read ({error.strerror or error})") from error
        if not whole:
            raise DataError(f"{file}: not a whole plain tar archive (no end); download it again")
    named = [[file.name, *state] for file, state in zip(files, states, strict=True)]
    return ShardSource(path, _fingerprint(named), None, None, tuple(files), states)
