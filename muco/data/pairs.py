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

from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from muco.data.fingerprint import Fingerprinted
from muco.data.lines import JsonObject, image_cell, image_folder, literal_list, text_of, without_token
from muco.data.pair_files import CsvTable, ParquetTable, open_table
from muco.data.places import position
from muco.dialogue import Content, Sample, Turn
from muco.errors import DataError, did_you_mean

_NAMED = ("query_text", "query_image", "target_text", "target_image")
_COMMON = (
    {"query_text": "query", "target_text": "target"},
    {"query_image": "image", "target_text": "text"},
    {"query_image": "image", "target_text": "caption"},
)


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
        self.path, self.images = Path(path), image_folder(Path(path), images)
        given = dict(zip(_NAMED, (query_text, query_image, target_text, target_image), strict=True))
        given["negatives"] = negatives
        self._table = open_table(self.path, cache)
        self.columns = find_columns(self.path, self._table.names, given)  # what it says -> the column
        if isinstance(self._table, ParquetTable):
            self._table.prepare(list(dict.fromkeys(self.columns.values())))
        if not len(self._table):
            raise DataError(f"{self.path}: the file has no rows")

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> Sample:
        """Raises IndexError if there is no such row, DataError with file and row if it is not valid."""
        i = position(index, len(self), self.path)
        where = self._table.where(i)
        row = self._table.row(i)
        sides = []
        for side in ("query", "target"):
            columns = self.columns.get(f"{side}_text"), self.columns.get(f"{side}_image")
            sides.append(self._content(row, *columns, where))
            if sides[-1].empty:
                names = " and ".join(map(repr, filter(None, columns)))
                raise DataError(f"{where}: no {side}, {names} is empty; fix the row")
        return Sample(turns=[Turn(*sides, negatives=self._negatives(row, where))], where=where)

    def _read_from(self) -> tuple[list[Path], Any]:
        return [self.path], {key: self.columns.get(key) for key in (*_NAMED, "negatives")}

    def _content(self, row: JsonObject, text_column: str | None, image_column: str | None, where: str) -> Content:
        image = image_cell(row, image_column, self.images, where) if image_column else None
        text = (text_of(row, text_column, where) if text_column else None) or ""
        text = without_token(text, has_image=image is not None)
        return Content(text if text.strip() else "", () if image is None else (image,))

    def _negatives(self, row: JsonObject, where: str) -> list[Content]:
        name = self.columns.get("negatives")
        value = row.get(name) if name else None
        if value is None or (isinstance(value, str) and not value.strip()):
            return []
        if isinstance(self._table, CsvTable) and value.strip()[0] == "[" and value.strip()[-1] == "]":
            value = literal_list(value, f"{where}: {name!r}")
        plain = "text" if "target_text" in self.columns else "image"
        contents = []
        for number, item in enumerate(value if isinstance(value, list) else [value]):
            place, cell = f"{where}: negative {number}", item if isinstance(item, dict) else {plain: item}
            if unknown := [key for key in cell if key not in ("text", "image")]:
                raise DataError(f"{place} has {unknown[0]!r}; accepted are 'text' and 'image'")
            contents.append(self._content(cell, "text", "image", place))
            if contents[-1].empty:
                raise DataError(f"{place} is empty; leave it out of {name!r}")
        return contents


def find_columns(path: Path, names: Sequence[str], given: Mapping[str, str | None]) -> dict[str, str]:
    """The columns that are used: those given, or the usual ones where the file has just one set of them.

    Raises a DataError if a given column is missing, or it is not clear which one is the query or the target.
    """
    wanted = {key: name for key, name in given.items() if name is not None}
    for key, name in wanted.items():
        if name not in names:
            raise DataError(f"{path}: no column {name!r} (given as {key}){did_you_mean(name, names)}")
    chosen = wanted if wanted.keys() - {"negatives"} else _usual_columns(names) | wanted
    for side in ("query", "target"):
        if not any(key.startswith(side) for key in chosen):
            raise DataError(
                f"{path}: which column is the {side}? Name it by {side}_text or {side}_image; found "
                f"{', '.join(names)}; known by themselves are {', '.join(_NAMED)}, query with target, and image with "
                "text or caption"
            )
    return chosen


def _usual_columns(names: Sequence[str]) -> dict[str, str]:
    """The set of usual names that the file has, if it has no usual name besides."""
    usual = {*_NAMED, *chain.from_iterable(common.values() for common in _COMMON)}.intersection(names)
    sets = ({key: key for key in _NAMED if key in names}, *_COMMON)
    return next((candidate for candidate in sets if set(candidate.values()) == usual), {})
