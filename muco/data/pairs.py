"""Any set of pairs in a CSV, TSV, JSONL or Parquet file: columns for text and image on either side, one pair a row.

::

    pairs.csv      query,target_image            PairsData("pairs.csv")
    pairs.jsonl    {"image": …, "caption": …}    PairsData("pairs.jsonl")
    pairs.parquet  question, photo, answer       PairsData(…, query_text="question", query_image="photo",
                                                           target_text="answer")

Without names the columns ``query_text``, ``query_image``, ``target_text`` and ``target_image`` are taken; or ``query``
and ``target``; or ``image`` with one of ``text`` and ``caption``. Anything else has to be named.
"""

from __future__ import annotations

import ast
import csv
import difflib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from muco.data.fingerprint import Fingerprinted
from muco.data.lines import (
    LONGEST_LINE,
    Row,
    as_object,
    file_state,
    image_cell,
    open_unchanged,
    position,
    raw_lines,
    text_of,
    without_token,
)
from muco.data.parquet import read_header
from muco.data.rows import Rows
from muco.dialogue import Content, Sample, Turn
from muco.errors import DataError

LOOKED_AT = 1000  # rows of a JSONL file whose keys are its columns
LONGEST_LITERAL = 1 << 20  # characters of a list that is written as a string

_NAMED = ("query_text", "query_image", "target_text", "target_image")
_COMMON = (
    {"query_text": "query", "target_text": "target"},
    {"query_image": "image", "target_text": "text"},
    {"query_image": "image", "target_text": "caption"},
)


@dataclass(frozen=True)
class Columns:
    """Which column says what; None where a side has no text or no image."""

    query_text: str | None = None
    query_image: str | None = None
    target_text: str | None = None
    target_image: str | None = None
    negatives: str | None = None

    @property
    def used(self) -> list[str]:
        return list(dict.fromkeys(name for name in asdict(self).values() if name is not None))


class PairsData(Fingerprinted):
    """The pairs of a file, one sample of one turn each; rows are read from disk when asked for.

    Cells that are null, empty or blank say nothing; each side must have something. An image is a path, or in Parquet
    also bytes or a struct of ``bytes`` and ``path``. Text loses the placeholder ``<|image_1|>``.

    Of CSV and JSONL the places of the rows are kept in memory. Of a Parquet file the columns that are used are copied
    once, see :class:`muco.data.rows.Rows`.

    Args:
        path: A ``.csv``, ``.tsv``, ``.jsonl`` or ``.parquet`` file. CSV has a header; quoted cells may hold newlines.
        query_text, query_image, target_text, target_image: Names of columns. If one is given, the others are not
            guessed.
        negatives: Column of hard negatives: one, or a list of them, which in CSV is written ``['a', 'b']``. A string
            is a text, or an image's path if the target has no text column; an object has ``text`` and/or ``image``.
        images: What relative image paths count from, the file's folder by default. No path may leave it.
        cache: Folder for the copied columns of a Parquet file, where it is not one beside the file.
    Raises:
        DataError: If the file cannot be read or has no rows, a column is missing, unclear or there twice, or the copy
            cannot be written.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        query_text: str | None = None,
        query_image: str | None = None,
        target_text: str | None = None,
        target_image: str | None = None,
        negatives: str | None = None,
        images: str | Path | None = None,
        cache: str | Path | None = None,
    ) -> None:
        self.path = Path(path)
        self.images = Path(images) if images is not None else self.path.parent
        if not self.images.is_dir():
            raise DataError(f"{self.images}: no such folder; it must hold the images of {self.path}")
        given = Columns(query_text, query_image, target_text, target_image, negatives)
        if self.path.suffix in (".csv", ".tsv"):
            self._table: _Table = _Csv(self.path, "\t" if self.path.suffix == ".tsv" else ",")
        elif self.path.suffix in (".jsonl", ".ndjson"):
            self._table = _Jsonl(self.path)
        elif self.path.suffix in (".parquet", ".pq"):
            self._table = _Parquet(self.path, cache)
        else:
            raise DataError(f"{self.path}: unknown kind of pairs; give a .csv, .tsv, .jsonl or .parquet file")
        self.columns = choose_columns(self.path, self._table.names, given)
        self._table.prepare(self.columns.used)
        if not len(self._table):
            raise DataError(f"{self.path}: the file has no rows")

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> Sample:
        """Raises IndexError if there is no such row, DataError with file and row if it is not as it must be."""
        i = position(index, len(self), self.path)
        where = self._table.where(i)
        row = self._table.row(i)
        query = self._content(row, self.columns.query_text, self.columns.query_image, where)
        target = self._content(row, self.columns.target_text, self.columns.target_image, where)
        for side, content in (("query", query), ("target", target)):
            if content.empty:
                names = [name for key, name in asdict(self.columns).items() if name and key.startswith(side)]
                raise DataError(f"{where}: no {side}, {' and '.join(map(repr, names))} says nothing; mend the row")
        return Sample(turns=[Turn(query, target, negatives=self._negatives(row, where))], where=where)

    def _read_from(self) -> tuple[list[Path], Any]:
        return [self.path], asdict(self.columns)

    def _content(self, row: Row, text_column: str | None, image_column: str | None, where: str) -> Content:
        image = image_cell(row, image_column, self.images, where) if image_column else None
        text = (text_of(row, text_column, where) if text_column else None) or ""
        text = without_token(text, has_image=image is not None)
        return Content(text if text.strip() else "", () if image is None else (image,))

    def _negatives(self, row: Row, where: str) -> list[Content]:
        name = self.columns.negatives
        value = row.get(name) if name else None
        if value is None or (isinstance(value, str) and not value.strip()):
            return []
        if isinstance(value, str) and value.strip()[0] + value.strip()[-1] == "[]" and isinstance(self._table, _Csv):
            value = _literal_list(value.strip(), f"{where}: {name!r}")
        plain = "text" if self.columns.target_text else "image"
        contents = []
        for number, item in enumerate(value if isinstance(value, list) else [value]):
            cell = item if isinstance(item, dict) else {plain: item}
            if unknown := [key for key in cell if key not in ("text", "image")]:
                raise DataError(f"{where}: negative {number} has {unknown[0]!r}; accepted are 'text' and 'image'")
            content = self._content(cell, "text", "image", f"{where}: negative {number}")
            if content.empty:
                raise DataError(f"{where}: negative {number} is empty; leave it out of {name!r}")
            contents.append(content)
        return contents


def _literal_list(text: str, where: str) -> list[Any]:
    if len(text) > LONGEST_LITERAL:
        raise DataError(f"{where} is a list of {len(text)} characters; at most {LONGEST_LITERAL} are read")
    try:
        value = ast.literal_eval(text)  # reads constants only; nothing is run
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise DataError(f"{where} looks like a list and is none ({type(error).__name__}): {text:.60}") from error
    if not isinstance(value, list):
        raise DataError(f"{where} must be one list, not {text:.60}")
    return value


# ── columns ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def choose_columns(path: Path, names: Sequence[str], given: Columns) -> Columns:
    """The columns that are used: those given, or the usual ones where that is unambiguous."""
    found = f"found {', '.join(names)}"
    for key, name in asdict(given).items():
        if name is not None and name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise DataError(f"{path}: no column {name!r} (given as {key}); {hint}{found}")
    chosen = {key: name for key, name in asdict(given).items() if name is not None and key != "negatives"}
    if not chosen:
        usual = [{key: key for key in _NAMED if key in names}, *_COMMON]
        known = {name for option in usual for name in option.values() if name in names}
        fitting = [option for option in usual if option and set(option.values()) == known]
        chosen = fitting[0] if fitting else {}
    for side in ("query", "target"):
        if not any(key.startswith(side) for key in chosen):
            raise DataError(
                f"{path}: which column is the {side}? Name it by {side}_text or {side}_image; {found}; known by "
                f"themselves are {', '.join(_NAMED)}, query with target, and image with text or caption"
            )
    return Columns(**chosen, negatives=given.negatives)


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Table(Protocol):
    names: list[str]

    def prepare(self, columns: list[str]) -> None:
        """Called once, with the columns that will be asked for."""

    def __len__(self) -> int: ...
    def row(self, i: int) -> Row: ...
    def where(self, i: int) -> str: ...


class _Jsonl:
    def __init__(self, path: Path) -> None:
        self.path, self._state = path, file_state(path)
        starts, lines = array("q"), array("q")
        names: dict[str, None] = {}
        for start, line, number in raw_lines(path):
            if len(starts) < LOOKED_AT:
                names |= dict.fromkeys(as_object(line, f"{path}:{number}"))
            starts.append(start)
            lines.append(number)
        self.names = list(names)
        self._starts, self._lines = np.array(starts, dtype=np.int64), np.array(lines, dtype=np.int64)

    def prepare(self, columns: list[str]) -> None:
        pass

    def __len__(self) -> int:
        return len(self._starts)

    def row(self, i: int) -> Row:
        with open_unchanged(self.path, self._state) as file:
            file.seek(int(self._starts[i]))
            line = file.readline()
        return as_object(line, self.where(i))

    def where(self, i: int) -> str:
        return f"{self.path}:{self._lines[i]}"


class _Csv:
    """Rows by the place of their first byte. A row is read by the parser that found its end."""

    def __init__(self, path: Path, delimiter: str) -> None:
        self.path, self.delimiter, self._state = path, delimiter, file_state(path)
        starts, lines = array("q"), array("q")
        self.names: list[str] = []
        with open_unchanged(path, self._state) as file:
            for start, line, cells in _csv_rows(file, path, delimiter):
                if self.names:
                    starts.append(start)
                    lines.append(line)
                    continue
                self.names = cells
                if twice := [name for name in cells if cells.count(name) > 1]:
                    raise DataError(f"{path}:{line}: the column {twice[0]!r} is there twice; found {', '.join(cells)}")
        self._starts, self._lines = np.array(starts, dtype=np.int64), np.array(lines, dtype=np.int64)

    def prepare(self, columns: list[str]) -> None:
        pass

    def __len__(self) -> int:
        return len(self._starts)

    def row(self, i: int) -> Row:
        with open_unchanged(self.path, self._state) as file:
            file.seek(int(self._starts[i]))
            _, _, cells = next(_csv_rows(file, self.path, self.delimiter, int(self._lines[i])))
        if len(cells) != len(self.names):
            raise DataError(f"{self.where(i)}: {len(cells)} cells, and the header has {len(self.names)}; mend the row")
        return {name: cell or None for name, cell in zip(self.names, cells, strict=True)}

    def where(self, i: int) -> str:
        return f"{self.path}:{self._lines[i]}"


def _csv_rows(file: BinaryIO, path: Path, delimiter: str, line: int = 1) -> Iterator[tuple[int, int, list[str]]]:
    """First byte, first line and cells of every row that is not blank, from where the file stands, at ``line``."""
    lines = _TextLines(file, path, line)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        start, first = lines.offset, lines.number
        try:
            cells = next(reader, None)  # takes no more lines than the row has
        except csv.Error as error:
            raise DataError(f"{path}:{first}: not a row of CSV ({error}); mend its quotes") from error
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


class _Parquet:
    def __init__(self, path: Path, cache: str | Path | None) -> None:
        self.path, self.cache = path, cache
        self.names = read_header(path)[0]
        if twice := [name for name in self.names if self.names.count(name) > 1]:
            raise DataError(f"{path}: the column {twice[0]!r} is there twice; found {', '.join(self.names)}")

    def prepare(self, columns: list[str]) -> None:
        self._rows = Rows(self.path, columns, cache=self.cache)

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, i: int) -> Row:
        return self._rows[i]

    def where(self, i: int) -> str:
        return f"{self.path} row {i}"
