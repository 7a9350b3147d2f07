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


class JsonlTable(LinePlaces):
    """Objects one a line, whose keys are the columns."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        names: dict[str, None] = {}
        for text, where in self.scan():
            if len(self) <= LOOKED_AT:
                names |= dict.fromkeys(as_object(text, where))
        self.names = list(names)

    def row(self, i: int) -> JsonObject:
        return as_object(self.read(i), self.where(i))


class CsvTable(LinePlaces):
    """Rows below a header. A row is read by the parser that found its end, as quoted cells may hold newlines."""

    def __init__(self, path: Path, delimiter: str) -> None:
        super().__init__(path)
        self.path, self.delimiter = path, delimiter
        self.names: list[str] = []
        with self.open() as file:
            for start, line, cells in _csv_rows(file, path, delimiter):
                if self.names:
                    self.add(start, line)
                else:
                    self.names = cells
                    _refuse_twice(cells, f"{path}:{line}")

    def row(self, i: int) -> JsonObject:
        with self.open(i) as file:
            _, _, cells = next(_csv_rows(file, self.path, self.delimiter, self.line(i)))
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
        """To be called once, with the columns that will be asked for."""
        self._rows = Rows(self.path, columns, cache=self.cache)

    def __len__(self) -> int:
        return len(self._rows)

    def where(self, i: int) -> str:
        return self._rows.where(i)

    def row(self, i: int) -> JsonObject:
        return self._rows[i]


Table = JsonlTable | CsvTable | ParquetTable


def open_table(path: Path, cache: str | Path | None) -> Table:
    """The table of a file, by the ending of its name, ``cache`` as of :class:`Rows`; a DataError if it is invalid."""
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


def _csv_rows(file: BinaryIO, path: Path, delimiter: str, line: int = 1) -> Iterator[tuple[int, int, list[str]]]:
    """First byte, first line and cells of every row that is not blank, from the position of the file, at ``line``."""
    start, first = file.tell(), line

    def texts() -> Iterator[str]:
        nonlocal line
        while raw := file.readline(LONGEST_LINE + 1):
            if len(raw) > LONGEST_LINE:
                raise DataError(f"{path}:{line}: the line is longer than {LONGEST_LINE >> 20} MiB")
            try:
                text = raw.decode("utf-8-sig" if file.tell() == len(raw) else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"{path}:{line}: not UTF-8 ({error}); save the file as UTF-8") from error
            line += 1
            yield text

    csv.field_size_limit(LONGEST_LINE)  # of this process; the module's own is 128 KiB
    reader = csv.reader(texts(), delimiter=delimiter, strict=True)
    while True:
        try:
            cells = next(reader, None)  # takes no more lines than the row has
        except csv.Error as error:
            raise DataError(f"{path}:{first}: not a valid CSV row ({error}); fix its quotes") from error
        if cells is None:
            return
        if cells:
            yield start, first, cells
        start, first = file.tell(), line
