"""Files of any pairs as tables: the names of their columns, and their rows as dictionaries of plain values."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from muco.data.lines import LONGEST_LINE, JsonObject, as_object
from muco.data.parquet import read_header
from muco.data.places import LinePlaces
from muco.data.rows import Rows
from muco.errors import DataError

LOOKED_AT = 1000  # rows of a JSONL file whose keys are its columns


class _TextTable:
    """Rows by the places where they begin."""

    names: list[str]
    _places: LinePlaces

    def prepare(self, columns: Sequence[str]) -> None:
        """Called once, with the columns that will be asked for."""

    def __len__(self) -> int:
        return len(self._places)

    def where(self, i: int) -> str:
        return self._places.where(i)


class JsonlTable(_TextTable):
    """Objects one a line, whose keys are the columns."""

    def __init__(self, path: Path) -> None:
        self._places = LinePlaces(path)
        names: dict[str, None] = {}
        for text, where in self._places.scan():
            if len(self._places) <= LOOKED_AT:
                names |= dict.fromkeys(as_object(text, where))
        self.names = list(names)

    def row(self, i: int) -> JsonObject:
        return as_object(self._places.read(i), self.where(i))


class CsvTable(_TextTable):
    """Rows below a header. A row is read by the parser that found its end, as quoted cells may hold newlines."""

    def __init__(self, path: Path, delimiter: str) -> None:
        self.path, self.delimiter = path, delimiter
        self._places = LinePlaces(path)
        self.names = []
        with self._places.open() as file:
            for start, line, cells in _csv_rows(file, path, delimiter):
                if self.names:
                    self._places.add(start, line)
                else:
                    self.names = cells
                    _refuse_twice(cells, f"{path}:{line}")

    def row(self, i: int) -> JsonObject:
        with self._places.open(i) as file:
            _, _, cells = next(_csv_rows(file, self.path, self.delimiter, self._places.line(i)))
        if len(cells) != len(self.names):
            raise DataError(f"{self.where(i)}: {len(cells)} cells, and the header has {len(self.names)}; fix the row")
        return {name: cell or None for name, cell in zip(self.names, cells, strict=True)}


class ParquetTable:
    """Rows of a Parquet file, copied once, see :class:`muco.data.rows.Rows`."""

    def __init__(self, path: Path, cache: str | Path | None) -> None:
        self.path, self.cache = path, cache
        self.names = read_header(path)[0]
        _refuse_twice(self.names, str(path))

    def prepare(self, columns: Sequence[str]) -> None:
        self._rows = Rows(self.path, columns, cache=self.cache)

    def __len__(self) -> int:
        return len(self._rows)

    def where(self, i: int) -> str:
        return self._rows.where(i)

    def row(self, i: int) -> JsonObject:
        return self._rows[i]


Table = JsonlTable | CsvTable | ParquetTable


def open_table(path: Path, cache: str | Path | None) -> Table:
    """The table of a file, by the ending of its name.

    Args:
        cache: The folder for the copied columns of a Parquet file, where it is not one beside the file.
    Raises:
        DataError: If the ending is another one, the file cannot be read, or a column is there twice.
    """
    if path.suffix in (".csv", ".tsv"):
        return CsvTable(path, "\t" if path.suffix == ".tsv" else ",")
    if path.suffix in (".jsonl", ".ndjson"):
        return JsonlTable(path)
    if path.suffix in (".parquet", ".pq"):
        return ParquetTable(path, cache)
    raise DataError(f"{path}: unknown kind of pairs; pass a .csv, .tsv, .jsonl or .parquet file")


def _refuse_twice(names: Sequence[str], where: str) -> None:
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"{where}: the column {name!r} is there twice; found {', '.join(names)}")


# ── CSV ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _csv_rows(file: BinaryIO, path: Path, delimiter: str, line: int = 1) -> Iterator[tuple[int, int, list[str]]]:
    """First byte, first line and cells of every row that is not blank, from where the file stands, at ``line``."""
    lines = _TextLines(file, path, line)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        start, first = lines.offset, lines.number
        try:
            cells = next(reader, None)  # takes no more lines than the row has
        except csv.Error as error:
            raise DataError(f"{path}:{first}: not a row of CSV ({error}); fix its quotes") from error
        if cells is None:
            return
        if cells:
            yield start, first, cells


class _TextLines:
    """The lines of a file as text, with the place and number of the next one."""

    def __init__(self, file: BinaryIO, path: Path, number: int) -> None:
        self.file, self.path, self.number, self.offset = file, path, number, file.tell()

    def __iter__(self) -> _TextLines:
        return self

    def __next__(self) -> str:
        line = self.file.readline(LONGEST_LINE + 1)
        if not line:
            raise StopIteration
        if len(line) > LONGEST_LINE:
            raise DataError(f"{self.path}:{self.number}: the line is longer than {LONGEST_LINE >> 20} MiB")
        try:
            text = line.decode("utf-8" if self.offset else "utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"{self.path}:{self.number}: not UTF-8 ({error}); save the file as UTF-8") from error
        self.offset += len(line)
        self.number += 1
        return text
