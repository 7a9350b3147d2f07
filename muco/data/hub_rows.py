"""Copies of hub data sets on disk: finding the files of a configuration and a split, and reading their rows.

::

    <folder>/<split>*.parquet                        where the data set has one configuration; or in data/ or default/
    <folder>/<config>/<split>*.parquet               or in data/<config>/
    <folder>/<config>.parquet

``.jsonl`` and ``.json`` (a list of objects) are read too, where there is no Parquet file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from muco.data.lines import objects, parsed
from muco.data.parquet import batches, one_line, read_header, require_columns
from muco.errors import DataError

ENDINGS = (".parquet", ".jsonl", ".json")
BATCH_ROWS = 256

JsonRow = dict[str, Any]


def find_split(folders: Sequence[Path], config: str, split: str) -> list[Path]:
    """The files of a split in the first of the folders that has some, by name; [] if none has."""
    for folder in folders:
        below = [folder / config, folder / "data" / config] if config else [folder / "data", folder / "default"]
        for place in below if config else [folder, *below]:
            if found := _named(place, split):
                return found
        if config and (found := _named(folder, config)):
            return found
    return []


def find_configs(folders: Sequence[Path], split: str) -> dict[str, list[Path]]:
    """The configurations in the first of the folders that has some, by name, and the files of each."""
    for folder in (place for own in folders for place in (own, own / "data") if place.is_dir()):
        named = {path.name for path in folder.iterdir() if path.is_dir()}
        named |= {path.stem for path in folder.iterdir() if path.suffix in ENDINGS}
        files = {config: find_split([folder], config, split) for config in sorted(named)}
        if found := {config: own for config, own in files.items() if own}:
            return found
    return {}


def looked_for(folders: Sequence[Path], config: str, split: str) -> str:
    """What :func:`find_split` looks for, as part of a sentence."""
    below = f"{config}/" if config else ""
    return " or ".join(str(folder / f"{below}{split}*.parquet") for folder in folders)


def _named(folder: Path, name: str) -> list[Path]:
    """Files whose name is ``name``, or begins with it and "-" or "."; those of the first ending that has some."""
    if not folder.is_dir():
        return []
    named = re.compile(rf"{re.escape(name)}([-.].*)?")
    files = [path for path in sorted(folder.iterdir()) if named.fullmatch(path.stem) and path.is_file()]
    return next((own for ending in ENDINGS if (own := [path for path in files if path.suffix == ending])), [])


def count_rows(files: Sequence[Path]) -> int:
    """Rows of files together; a DataError if one cannot be read."""
    return sum(read_header(file)[1] if file.suffix == ".parquet" else sum(1 for _ in _json(file)) for file in files)


def read_rows(file: Path, columns: Sequence[str], optional: Sequence[str] = ()) -> Iterator[tuple[JsonRow, str]]:
    """The rows of a file with these columns, and where each is ("file row 3", "file:4").

    Raises:
        DataError: If the file cannot be read, or a column that is not optional is missing; names the row.
    """
    if file.suffix != ".parquet":
        for row, where in _json(file):
            for column in columns:
                if column not in row:
                    raise DataError(f"{where}: no {column!r}; found {', '.join(map(str, row))}")
            yield row, where
        return
    for first, batch in batches(file, require_columns(file, columns, optional), most_rows=BATCH_ROWS):
        for number in range(len(batch)):
            where = f"{file} row {first + number}"
            try:
                yield batch.slice(number, 1).to_pylist()[0], where
            except UnicodeDecodeError as error:
                raise DataError(f"{where}: a text is not UTF-8 ({one_line(error)}); repair the file") from error


def _json(file: Path) -> Iterator[tuple[JsonRow, str]]:
    if file.suffix == ".jsonl":
        yield from objects(file)
        return
    try:
        rows = parsed(file.read_bytes(), str(file))
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror or error})") from error
    if not isinstance(rows, list):
        raise DataError(f"{file}: must be a list of objects, one for each row")
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{file} item {number}: must be an object")
        yield row, f"{file} item {number}"
