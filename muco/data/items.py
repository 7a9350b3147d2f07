"""What ``muco embed`` reads: a folder of images, a JSONL or a Parquet file, as rows from any row number on."""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, islice
from operator import itemgetter
from pathlib import Path
from typing import Any

from muco.errors import DataError

IMAGE_SUFFIXES = frozenset(".jpg .jpeg .jfif .png .webp .gif .bmp .tif .tiff .ppm".split())
PARQUET_ROWS = 32  # rows read from a Parquet file at once: with images inside, each may weigh megabytes


@dataclass(frozen=True)
class Row:
    """One input row. ``image`` is a path or bytes as read, a Pillow image once opened; ``error`` says why it failed."""

    number: int  # from 0, in input order
    id: str
    where: str
    text: str | None = None
    image: Any = None
    image_path: str | None = None  # as the input gives it
    error: str | None = None
    vector: Any = None

    @property
    def decoded_bytes(self) -> int:
        return 3 * self.image.width * self.image.height if hasattr(self.image, "width") else 0


@dataclass(frozen=True)
class Source:
    """An input that yields its rows from any row number on. ``fingerprint`` changes whenever its rows may have."""

    root: Path  # what relative image paths are relative to
    fingerprint: str
    total: int
    columns: str  # the names that were given, joined
    rows: Callable[[int], Iterator[Row]]


Columns = tuple[str, str, str]
COLUMNS: Columns = ("text", "image", "id")


def open_source(path: Path, columns: Columns) -> Source:
    """Checks the input as a whole, without opening images.

    Raises:
        DataError: If it is missing, of no accepted kind, empty or unreadable.
    """
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file or folder")
    if path.suffix in (".jsonl", ".ndjson"):
        return _jsonl(path, columns)
    if path.suffix in (".parquet", ".pq"):
        return _parquet(path, columns)
    raise DataError(f"{path}: give a folder of images, a .jsonl file or a .parquet file")


def _folder(path: Path) -> Source:
    digest, total = state_of_images(path)
    if not total:
        hint = next((f"; did you mean {p}?" for p in sorted(path.iterdir()) if p.suffix in (".jsonl", ".parquet")), "")
        raise DataError(f"{path}: no images in this folder (looked for {', '.join(sorted(IMAGE_SUFFIXES))}){hint}")
    return Source(path, digest, total, "", partial(_folder_rows, path))


def state_of_images(folder: Path) -> tuple[str, int]:
    """SHA-256 (hex) of names, sizes and times of the images in a folder and those below; and how many there are.

    Raises:
        DataError: If a folder cannot be listed.
    """
    digest, total = hashlib.sha256(), 0
    try:
        for name, entry in image_files(folder):
            status = entry.stat(follow_symlinks=entry.is_file())  # of a broken link, its own
            digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
            total += 1
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed: {error}") from error
    return digest.hexdigest(), total


def image_files(folder: Path, prefix: str = "") -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Relative names ("a/b.png") and entries in the order of the names, one folder's listing in memory at a time."""
    with os.scandir(folder) as scan:
        entries = [(e.name + "/" * e.is_dir(follow_symlinks=False), e) for e in scan if not e.name.startswith(".")]
    for name, entry in sorted(entries, key=itemgetter(0)):  # "a.png" before "a/", as in whole names
        if name.endswith("/"):
            yield from image_files(Path(entry.path), prefix + name)
        elif os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not (entry.is_symlink() and entry.is_dir()):
            yield prefix + name, entry


def _folder_rows(folder: Path, start: int) -> Iterator[Row]:
    for number, (name, _) in islice(enumerate(image_files(folder)), start, None):
        yield read_row(number, str(folder / name), {"image": name, "id": name}, COLUMNS, folder)


def _jsonl(path: Path, columns: Columns) -> Source:
    digest, total = hashlib.sha256(), 0
    with path.open("rb") as file:
        for line in file:
            digest.update(line)
            total += not line.isspace()
    if not total:
        raise DataError(f"{path}: the file has no rows")
    return Source(path.parent, digest.hexdigest(), total, "/".join(columns), partial(_jsonl_rows, path, columns))


def _jsonl_rows(path: Path, columns: Columns, start: int) -> Iterator[Row]:
    with path.open("rb") as file:
        lines = ((n, line) for n, line in enumerate(file, 1) if not line.isspace())
        for number, (n, line) in islice(enumerate(lines), start, None):
            where = f"{path.name}:{n}"
            try:
                record = json.loads(line.decode("utf-8-sig"))
            except ValueError as error:  # of JSON or of UTF-8
                yield Row(number, str(number), where, error=f"not a line of JSON: {error}")
                continue
            if not isinstance(record, dict):
                yield Row(number, str(number), where, error='not an object such as {"text": "a red mug"}')
                continue
            if "turns" in record:
                raise DataError(
                    f"{where}: a dialogue (it has 'turns'), and embed takes simple items with 'text' and/or 'image'; "
                    "write such a file, or score dialogues with `muco evaluate`"
                )
            yield read_row(number, where, record, columns, path.parent)


def _parquet(path: Path, columns: Columns) -> Source:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names, total = file.schema_arrow.names, file.metadata.num_rows
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {error}") from error
    if missing := [name for name, usual in zip(columns, COLUMNS, strict=True) if name not in names and name != usual]:
        raise DataError(f"{path}: no column {missing[0]!r}; it has {', '.join(names)}")
    if not {*columns[:2]} & {*names}:
        raise DataError(f"{path}: no column for text or image; it has {', '.join(names)}; name them by --text-column …")
    if not total:
        raise DataError(f"{path}: the file has no rows")
    stat = path.stat()
    fingerprint = hashlib.sha256(f"{stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()
    return Source(path.parent, fingerprint, total, "/".join(columns), partial(_parquet_rows, path, columns))


def _parquet_rows(path: Path, columns: Columns, start: int) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    # A buffered reader without pre-buffering holds some pages, not a row group, which may be gigabytes of images.
    with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
        present = [name for name in columns if name in file.schema_arrow.names]
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        first = bisect_right(list(accumulate(sizes)), start)  # the row group of row `start`; those before stay unread
        number = sum(sizes[:first])
        try:
            for batch in file.iter_batches(PARQUET_ROWS, row_groups=range(first, len(sizes)), columns=present):
                for record in batch.to_pylist():
                    if number >= start:
                        yield read_row(number, f"{path.name} row {number}", record, columns, path.parent)
                    number += 1
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{path}: broken after row {number}: {error}") from error


def read_row(number: int, where: str, record: dict[str, Any], columns: Columns, root: Path) -> Row:
    """The row of a record; what is wrong with it becomes its ``error``."""
    text_column, image_column, id_column = columns
    given = str(number)
    try:
        given = _id(record.get(id_column), given)
        text = _string(record.get(text_column), text_column)
        image, image_path = _image(record.get(image_column), image_column, root)
        if text is None and image is None:
            raise DataError(f"nothing to embed: neither {text_column!r} nor {image_column!r} says anything")
    except DataError as error:
        return Row(number, given, where, error=str(error))
    return Row(number, given, where, text, image, image_path)


def _id(value: Any, number: str) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return _string(value, "id") or number


def _string(value: Any, key: str) -> str | None:
    """The string, or None where it is missing or blank."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise DataError(f"{key!r} must be a string, not {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{key!r} is not valid Unicode: {error.reason}") from error
    return value if value.strip() else None


def _image(value: Any, key: str, root: Path) -> tuple[Path | bytes | None, str | None]:
    """What :func:`open_image` takes, and the path as given, from a path, bytes, or the struct of Hugging Face data."""
    from muco.data.images import is_url

    data = None
    if isinstance(value, dict):
        data, value = value.get("bytes"), value.get("path")
    elif isinstance(value, bytes):
        data, value = value, None
    if not (value is None or isinstance(value, str)):
        raise DataError(f"{key!r} must be one path (or in Parquet also bytes), not {type(value).__name__}")
    path = _string(value, key)
    if data is not None:
        return data, path
    if path is None:
        return None, None
    return path if is_url(path) else root / path, path  # a URL as it is, for the error that names it
