"""What ``muco embed`` and ``muco index`` read: images of a folder, or rows of JSONL or Parquet, from any row on."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from muco.base.json_text import type_of
from muco.data.folders import image_files, state_of_images, told_kinds
from muco.data.lines import check_texts, parsed, raw_lines, whole_text
from muco.data.parquet import batches, read_header
from muco.data.places import file_state
from muco.dialogue import Video, as_video
from muco.errors import DataError
from muco.images import image_suffixes, is_url

DIALOGUE = (
    "a dialogue (it has 'turns'), and only simple items with 'text' and/or 'image' are taken; write such a file, or "
    "score dialogues with `muco evaluate`"
)
JSONL, PARQUET = (".jsonl", ".ndjson"), (".parquet", ".pq")
PARQUET_ROWS = 32  # rows read from a Parquet file at once: with images inside, each may weigh megabytes


class Columns(NamedTuple):
    """The keys or columns that are embedded; all others are further ones."""

    text: str = "text"
    image: str = "image"
    id: str = "id"
    video: str = "video"

    @property
    def images(self) -> tuple[str, ...]:
        """Where images are: "images" is as good as "image", unless another name was given."""
        return ("image", "images") if self.image == "image" else (self.image,)

    @property
    def used(self) -> tuple[str, ...]:
        return (self.text, *self.images, self.video, self.id)


COLUMNS = Columns()


@dataclass(frozen=True)
class Row:
    """One input row. ``images`` are paths, bytes and videos as read, Pillow images once opened; ``error`` says why it
    failed.
    """

    number: int  # from 0, in input order
    id: str
    where: str
    text: str | None = None
    images: tuple[Any, ...] = ()
    image_path: str | None = None  # of the image or video, as the input gives it; of several, a list in JSON
    further: Mapping[str, Any] = field(default_factory=dict)  # of the columns that were asked for
    error: str | None = None
    vector: Any = None
    numbered: bool = False  # the input says no id, so that ``id`` is the number
    id_known: bool = True  # false if the row, or its id, cannot be read: ``id`` is then the number

    @property
    def content(self) -> dict[str, Any]:
        """What a model is given."""
        image = self.images[0] if len(self.images) == 1 else self.images or None
        return {key: value for key, value in (("text", self.text), ("image", image)) if value is not None}

    @property
    def decoded_bytes(self) -> int:
        return decoded_bytes(self.images)


def decoded_bytes(images: Iterable[Any]) -> int:
    """What images and videos take that are opened."""
    held = [picture for image in images for picture in getattr(image, "source", [image])]
    return sum(3 * picture.width * picture.height for picture in held if hasattr(picture, "width"))


@dataclass(frozen=True)
class Record:
    """One row as it is given; ``error`` says why it cannot be used, though its id may be known."""

    number: int  # from 0, in input order
    where: str
    values: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None


@dataclass(frozen=True)
class Items:
    """An input that yields its rows from any row number on.

    Args:
        root: What relative image paths are relative to.
        fingerprint: Changes whenever the rows may have.
        columns: Those that are embedded; None of a folder of images.
        records: Yields the rows from a number on, with these further columns (of JSONL, with all).
        passed_over: Other files of a folder of images, by kind, see :func:`image_files`.
    """

    root: Path
    fingerprint: str
    total: int
    columns: Columns | None
    records: Callable[[int, Sequence[str]], Iterator[Record]]
    passed_over: Counter[str] = field(default_factory=Counter)
    files: tuple[Path, ...] = ()  # that hold the rows; none of a folder of images

    def rows(self, start: int = 0, further: Sequence[str] = ()) -> Iterator[Row]:
        """Row ``start`` and those after it, with further columns; what is wrong with one is its ``error``."""
        for record in self.records(start, further):
            yield read_row(record, self.columns or COLUMNS, self.root, further)


def open_items(path: Path, columns: Columns = COLUMNS, *, shard: bool = False) -> Items:
    """Checks an input as a whole, but opens no image; a DataError if it is missing, unknown, empty or unreadable.

    A folder is one of images, or, without any, the rows of its JSONL or Parquet files in the order of their names. Such
    a ``shard`` may be empty.
    """
    if path.is_dir():
        state = state_of_images(path)
        if not state.total:
            shown = (file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
            if files := sorted(file for file in shown if file.suffix in (*JSONL, *PARQUET)):
                return _joined(path, files, columns)
            found = f", and found {told_kinds(state.passed_over)}" if state.passed_over else ""
            kinds = ", ".join((*sorted(image_suffixes()), *JSONL, *PARQUET))
            raise DataError(f"{path}: no images in this folder, nor files of rows (looked for {kinds}{found})")
        return Items(path, state.fingerprint, state.total, None, partial(_folder_records, path), state.passed_over)
    if not path.is_file():
        raise DataError(f"{path}: no such file or folder")
    if path.suffix in JSONL:
        digest = hashlib.sha256()
        total, records = sum(1 for _ in raw_lines(path, digest)), partial(_jsonl_records, path)
    elif path.suffix in PARQUET:
        names, total = read_header(path)
        _check_columns(path, names, columns)
        size, changed = file_state(path)
        digest, records = hashlib.sha256(f"{size} {changed}".encode()), partial(_parquet_records, path, columns)
    else:
        raise DataError(f"{path}: pass a folder of images, a .jsonl file or a .parquet file")
    if not total and not shard:
        raise DataError(f"{path}: the file has no rows")
    return Items(path.parent, digest.hexdigest(), total, columns, records, files=(path,))


def _joined(folder: Path, files: Sequence[Path], columns: Columns) -> Items:
    """The rows of several files of one kind as one input."""
    if len({file.suffix in PARQUET for file in files}) > 1:
        raise DataError(f"{folder}: has both JSONL and Parquet files; keep one kind, or name a file")
    parts = [open_items(file, columns, shard=True) for file in files]
    if not any(part.total for part in parts):
        raise DataError(f"{folder}: its {len(files)} files have no rows")
    digest = hashlib.sha256(json.dumps([[part.files[0].name, part.fingerprint] for part in parts]).encode())

    def records(start: int, further: Sequence[str]) -> Iterator[Record]:
        first = 0
        for part in parts:
            if start < first + part.total:
                for record in part.records(max(0, start - first), further):
                    yield replace(record, number=first + record.number)
            first += part.total

    return Items(folder, digest.hexdigest(), sum(p.total for p in parts), columns, records, files=tuple(files))


def _check_columns(path: Path, names: Sequence[str], columns: Columns) -> None:
    if missing := [name for name, usual in zip(columns, COLUMNS, strict=True) if name not in names and name != usual]:
        raise DataError(f"{path}: no column {missing[0]!r}; it has {', '.join(names)}")
    if not {columns.text, *columns.images, columns.video} & {*names}:
        has = ", ".join(names)
        raise DataError(f"{path}: no column for text, image or video; it has {has}; name them by --text-column …")
    if twice := [name for name in names if names.count(name) > 1]:
        raise DataError(f"{path}: the column {twice[0]!r} is there twice; rename one")


def _folder_records(folder: Path, start: int, further: Sequence[str]) -> Iterator[Record]:
    for number, (name, _) in islice(enumerate(image_files(folder)), start, None):
        where = os.fsencode(folder / name).decode("utf-8", "backslashreplace")
        error = None if where == str(folder / name) else "the name of the file is not UTF-8; rename it"
        yield Record(number, where, {} if error else {"image": name, "id": name}, error)


def _jsonl_records(path: Path, start: int, further: Sequence[str]) -> Iterator[Record]:
    for number, (_, line, line_number) in islice(enumerate(raw_lines(path)), start, None):
        where = f"{path.name}:{line_number}"
        try:
            values = parsed(line, where)
        except DataError as error:
            yield Record(number, where, error=re.sub(rf"^{re.escape(where)}(:\d+)?: ", "", str(error)))
            continue
        if not isinstance(values, dict):
            yield Record(number, where, error='not an object such as {"text": "a red mug"}')
        elif "turns" in values:
            yield Record(number, where, error=DIALOGUE)
        else:
            yield checked_record(number, where, values)


def checked_record(number: int, where: str, values: Mapping[str, Any]) -> Record:
    """A record, whose error is that a text in it, of whatever column, holds half a character."""
    try:
        check_texts(values)
    except DataError as error:
        return Record(number, where, values, str(error))
    return Record(number, where, values)


def _parquet_records(path: Path, columns: Columns, start: int, further: Sequence[str]) -> Iterator[Record]:
    names = read_header(path)[0]
    present = [name for name in (*columns.used, *further) if name in names]
    for first, batch in batches(path, present, start, most_rows=PARQUET_ROWS):
        for number in range(first, first + len(batch)):
            values, error = {}, None
            for name in present:
                try:
                    values[name] = batch.column(name)[number - first].as_py()
                except (ValueError, OverflowError) as found:  # not UTF-8, or a date that Python does not know
                    values, error = {}, f"{name!r} cannot be read ({found})"
                    break
            yield Record(number, f"{path.name} row {number}", values, error)


def read_row(record: Record, columns: Columns, root: Path, further: Sequence[str] = ()) -> Row:
    """The row of a record; what is wrong with it becomes its ``error``."""
    values, given = record.values, str(record.number)
    id_known = False
    try:
        id = values.get(columns.id)
        if isinstance(id, int) and not isinstance(id, bool):
            given = str(id)
        elif id is not None and not isinstance(id, str):
            raise DataError(f"{columns.id!r} must be a string or a whole number, not {id!r:.60}")
        else:
            given = _string(id, columns.id) or given
        id_known = bool(values) or record.error is None
        if record.error is not None:
            raise DataError(record.error)
        text = _string(values.get(columns.text), columns.text)
        found = {key: images for key in columns.images if (images := _images(values.get(key), key, root))}
        if len(found) > 1:
            raise DataError(f"both {' and '.join(map(repr, found))} have images; use one key for them")
        if video := _video(values.get(columns.video), columns.video, root):
            found[columns.video] = [video]
        if text is None and not found:
            names = f"{columns.text!r}, {columns.image!r} and {columns.video!r}"
            raise DataError(f"nothing to embed: none of {names} says anything")
    except DataError as error:
        return Row(record.number, given, record.where, error=str(error), id_known=id_known)
    images = [pair for pairs in found.values() for pair in pairs]
    paths = [path for _, path in images]
    path = paths[0] if len(paths) == 1 else json.dumps(paths, ensure_ascii=False) if any(paths) else None
    others = {name: values[name] for name in further if name in values}
    numbered = id is None or (isinstance(id, str) and not id.strip())
    shown = tuple(image for image, _ in images)
    return Row(record.number, given, record.where, text, shown, path, others, numbered=numbered)


def _string(value: Any, key: str) -> str | None:
    """The string, or None where it is missing or blank."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise DataError(f"{key!r} must be a string, not {type_of(value)}")
    return whole_text(value, key) if value.strip() else None


Image = tuple[Path | bytes | str | Video, str | None]  # what is opened, and the path as given


def _video(value: Any, key: str, root: Path) -> Image | None:
    """A video from a path, frames, or a mapping of ``source``, ``frames`` and ``fps``."""
    given = value if isinstance(value, dict) else {"source": value}
    source = given.get("source")
    if isinstance(source, (list, tuple)):
        frames = _images(source, key, root)
        first = next((path for _, path in frames if path), None)
        return as_video({**given, "source": [frame for frame, _ in frames]})[0], first
    path = _string(source, key)
    if path is None:
        return None
    if is_url(path):
        raise DataError(f"{key!r} is a URL ({path[:60]}); URLs are not fetched, download the video")
    return as_video({**given, "source": root / path})[0], path


def _images(value: Any, key: str, root: Path) -> list[Image]:
    """The images under a key, in its order; a DataError if one is not a path, bytes, or a struct of both."""
    several = isinstance(value, list | tuple)
    images = [_image(item, key, root) for item in (value if several else [value])]
    if several and None in images:
        raise DataError(f"{key!r} has an item that is null or blank; leave it out")
    return [image for image in images if image is not None]


def _image(value: Any, key: str, root: Path) -> Image | None:
    """One image from a path, bytes, or the struct of Hugging Face data; None where it says nothing."""
    data = None
    if isinstance(value, dict):
        if unknown := [name for name in value if name not in ("bytes", "path")]:
            raise DataError(f"unknown key {unknown[0]!r} in {key!r}; accepted are 'bytes' and 'path'")
        data, value = value.get("bytes"), value.get("path")
    elif isinstance(value, bytes):
        data, value = value, None
    for given, kind in ((data, bytes), (value, str)):
        if not (given is None or isinstance(given, kind)):
            accepted = "a path or a list of paths (in Parquet also bytes)"
            raise DataError(f"{key!r} must be {accepted}, not {type_of(given)}")
    path = _string(value, key)
    if data is not None:
        return data, path
    if path is None:
        return None
    return (path if is_url(path) else root / path), path  # a URL as it is, for the error that names it
