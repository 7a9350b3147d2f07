"""MMEB on disk: its 36 data sets, and rows of both published layouts as the same queries and candidates.

========= ================================================ ===========================================================
layout    files and columns                                images
========= ================================================ ===========================================================
v1        ``<data>/<name>/test-*.parquet``:                ``<data>/eval_images/<path>``
          qry_text, qry_img_path, tgt_text, tgt_img_path
split     ``<data>/<name>/…test….parquet``:                ``<data>/image-tasks/<path>``
          the same four, qry_inst and tgt_inst
========= ================================================ ===========================================================

Every row is a query with its own list of candidates, of which the first is right. In v1 the texts hold everything; in
the split layout the instructions are separate and are put in front again, which gives the text of v1. A content is then
that text without ``<|image_1|>``, and the image: models put an image and a newline in front of a text by themselves.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

from muco.base.json_text import type_of
from muco.data.left_out import LeftOut
from muco.data.lines import TOKEN, errors_at, without_token
from muco.data.mmeb_lists import Question
from muco.data.mmeb_sets import DATA_SETS, NAMES, DataSet
from muco.data.parquet import batches, read_header, require_columns
from muco.dialogue import BLANK, Content
from muco.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

Layout = Literal["v1", "split"]
Pair = tuple[str, str]  # text as in v1, image path; "" where there is none

COLUMNS = {
    "v1": ("qry_text", "qry_img_path", "tgt_text", "tgt_img_path"),
    "split": ("qry_inst", "qry_text", "qry_img_path", "tgt_inst", "tgt_text", "tgt_img_path"),
}
IMAGES = {"v1": "eval_images", "split": "image-tasks"}
BATCH_ROWS = 16  # read at once: each has a list of some thousand candidates
ROWS = 1000  # queries of every published data set

_TEST = re.compile(r"(?<![a-z])test(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True)
class MMEBSet:
    """The files of a data set, in the order of their names; row numbers count through all of them.

    ``root`` is what names of files in errors are relative to, ``images`` the folder of its images.
    """

    data_set: DataSet
    layout: Layout
    files: tuple[Path, ...]
    rows: int
    root: Path
    images: Path
    rivals_by_name = False  # it takes the first of equal ones, which is the right one

    @property
    def name(self) -> str:
        return self.data_set.name

    @property
    def facts(self) -> dict[str, Any]:
        data_set = self.data_set
        return {"meta": data_set.meta, "in_distribution": data_set.in_distribution, "layout": self.layout}

    def questions(self, chosen: Collection[int], left_out: LeftOut) -> Iterator[Question]:
        return read_questions(self, chosen, left_out)

    def warnings(self, sizes: Sequence[int]) -> list[str]:
        if self.rows == ROWS:
            return []
        return [f"the data has {self.rows} queries; the published data set has {ROWS}"]


def find_files(data: Path, names: Collection[str] = NAMES) -> tuple[dict[str, list[Path]], dict[str, str]]:
    """The files of each data set below a folder (a DataError without it), and for each missing one its pattern."""
    data = Path(data)
    if not data.is_dir():
        raise DataError(f"{data}: no such folder; it must hold one folder per MMEB data set")
    found, missing = {}, {}
    for name in (name for name in NAMES if name in names):
        folder = data / name
        files = [p for p in folder.rglob("*.parquet") if _TEST.search(p.relative_to(folder).as_posix())]
        if files:
            found[name] = sorted(files, key=lambda p: p.as_posix())
        else:
            missing[name] = str(folder / "test-*.parquet")
    return found, missing


def open_set(data: Path, name: str, files: Sequence[Path], images: Path | None = None) -> MMEBSet:
    """A data set of those files below ``data``, its layout recognised by their columns.

    Args:
        images: The folder of all images, where it is not the usual one of the layout.
    Raises:
        DataError: If a file cannot be read, a column is missing, or there is no folder of images.
    """
    data_set = next(data_set for data_set in DATA_SETS if data_set.name == name)
    layouts, rows = [], 0
    for file in files:
        columns, count = read_header(file)
        # Whatever speaks of an instruction is the split layout, even if it is misspelt.
        layouts.append("split" if any("inst" in column for column in columns) else "v1")
        require_columns(file, COLUMNS[layouts[-1]])
        rows += count
    if len(set(layouts)) > 1:
        raise DataError(f"{data / name}: files of both layouts, {files[0].name} is {layouts[0]}; keep one")
    if not rows:
        raise DataError(f"{files[0]}: the file has no rows")
    folder = Path(images) if images is not None else data / IMAGES[layouts[0]]
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; it must hold the images of {name}, or name another folder")
    return MMEBSet(data_set, layouts[0], tuple(files), rows, data, folder)


def read_questions(
    source: MMEBSet, chosen: Collection[int] | None = None, left_out: LeftOut | None = None
) -> Iterator[Question]:
    """The rows of a data set in order, or those whose numbers are ``chosen``.

    Args:
        left_out: Whether a query or candidate may have a text that is not UTF-8 or an image outside of the folder of
            images, and a query or ground truth be empty.
    Raises:
        DataError: If a row cannot be read, names no list of at least two candidates with a text and a path each, or
            has a content that cannot be used and may not be left out; names file and row.
    """
    left_out = LeftOut() if left_out is None else left_out
    content = functools.cache(functools.partial(_content, source.images))  # lists of one set hold the same candidates

    def usable(where: str, said: str, *pair: str) -> Content | DataError:
        try:
            found = content(*pair)
            if found is BLANK and said:
                raise DataError(said)
            return found
        except DataError as error:
            named = DataError(f"{where}: {error}")
            left_out.check(named)
            return named

    for number, where, record in _records(source, chosen, left_out):
        with errors_at(where):
            query, pairs = _pairs(record, source)
        right, *wrong = pairs
        yield Question(
            number,
            where,
            usable(where, "the query is empty, it has neither text nor an image", *query),
            (
                usable(where, "the ground truth, the first candidate, is empty", *right),
                *(usable(where, "", *pair) for pair in wrong),
            ),
            tuple(official_name(source.data_set, *pair) for pair in pairs),
        )


def official_name(data_set: DataSet, text: str, path: str) -> str:
    """What the paper's evaluation code tells a candidate by; of candidates with one name it embeds the first.

    Args:
        text, path: The candidate as in v1.
    Source: ``generate_cand_dataset`` of that code (arXiv 2602.06393); the instruction, which it has not in the name, is
        the same for all candidates of a data set.
    """
    if not data_set.finds_images:
        return text
    caption = text.removesuffix(data_set.target_end).strip('"')
    return path if data_set.group == "t2i" else f"{path}:{caption}"


def _records(
    source: MMEBSet, chosen: Collection[int] | None, left_out: LeftOut
) -> Iterator[tuple[int, str, dict[str, Any]]]:
    first = 0  # number of the file's first row
    for file in source.files:
        for row, batch in batches(file, COLUMNS[source.layout], most_rows=BATCH_ROWS):
            for i in range(len(batch)):
                if chosen is None or first + row + i in chosen:
                    where = f"{file.relative_to(source.root).as_posix()} row {row + i}"
                    yield first + row + i, where, _plain(batch.slice(i, 1), where, left_out)
        first += read_header(file)[1]


def _plain(record: pa.RecordBatch, where: str, left_out: LeftOut) -> dict[str, Any]:
    try:
        return record.to_pylist()[0]
    except UnicodeDecodeError as error:
        left_out.check(DataError(f"{where}: a text is not UTF-8 ({error.reason}); repair the file"))
        columns = zip(record.schema.names, record.columns, strict=True)
        return {name: _decoded(column.cast(_bytes(column.type)).to_pylist()[0]) for name, column in columns}


def _bytes(type: pa.DataType) -> pa.DataType:
    """The type of the same values as bytes, which are not checked."""
    import pyarrow as pa

    if pa.types.is_list(type) or pa.types.is_large_list(type):
        return pa.list_(_bytes(type.value_type))
    return pa.binary() if pa.types.is_string(type) or pa.types.is_large_string(type) else type


def _decoded(value: Any) -> Any:
    """Text whose bytes are not UTF-8 has half characters in their place, and is found by them."""
    if isinstance(value, list):
        return [_decoded(each) for each in value]
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value


def _string(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{name} must be a string, not {type_of(value)}")
    return value


def _pairs(record: Mapping[str, Any], source: MMEBSet) -> tuple[Pair, list[Pair]]:
    """The query and its candidates, (text of v1, image path)."""
    columns: dict[str, list[str]] = {}
    for column in ("tgt_img_path", "tgt_text"):
        values = record[column]
        if column == "tgt_text" and values == "":  # some files have it where no candidate has a text
            values = [""] * len(columns["tgt_img_path"])
        if not isinstance(values, list):
            raise DataError(f"{column!r} must be a list of strings, one per candidate, not {type_of(values)}")
        if column == "tgt_img_path":
            values = [value or "" for value in values]
        columns[column] = [_string(value, f"candidate {n} in {column!r}") for n, value in enumerate(values)]
    paths, texts = columns.values()
    if len(texts) != len(paths):
        raise DataError(f"'tgt_text' holds {len(texts)} candidates and 'tgt_img_path' {len(paths)}; each needs both")
    if len(texts) < 2:
        raise DataError(f"the number of candidates is {len(texts)}; a query chooses from at least 2")
    names = [name for name in COLUMNS[source.layout] if name not in columns]
    required = "qry_text" if source.layout == "v1" else None  # of the others null is as good as ""
    given = {
        name: "" if record[name] is None and name != required else _string(record[name], repr(name)) for name in names
    }
    text = given["qry_text"]
    if source.layout == "split":
        text = query_text(source.data_set, given["qry_inst"], text)
        if source.data_set.finds_images:  # else candidates are bare texts
            end = source.data_set.target_end
            texts = [_after_image(given["tgt_inst"], own if own.strip() else "") + end for own in texts]
    return (text, given["qry_img_path"]), list(zip(texts, paths, strict=True))


def query_text(data_set: DataSet, instruction: str, text: str) -> str:
    """The query's text in v1, from the two columns of the split layout.

    A text after an image loses blanks before its inner newlines, as in the published evaluation; and whatever newlines
    the columns end with, the result ends as v1 does.
    """
    if data_set.group == "t2i":
        return _joined(instruction.rstrip(), text).rstrip("\n") + data_set.query_end
    return _after_image(instruction, text) + data_set.query_end


def _after_image(instruction: str, text: str) -> str:
    body = _joined(instruction.replace(TOKEN, "").strip(), text)
    return f"{TOKEN}\n" + body.replace(" \n", "\n").rstrip("\n")


def _joined(instruction: str, text: str) -> str:
    return " ".join(part for part in (instruction, text) if part)


def _content(folder: Path, text: str, path: str) -> Content:
    # Backslashes too: on Windows they separate, and no published path has any.
    absolute = PurePosixPath(path).is_absolute() or Path(path).is_absolute()
    if absolute or "\0" in path or ".." in re.split(r"[/\\]", path):
        raise DataError(f"the image path {path!r} leaves the folder of images {folder}; use a path inside it")
    text = without_token(text, has_image=bool(path))
    return Content(text, (folder / path,)) if path else Content(text) if text else BLANK
