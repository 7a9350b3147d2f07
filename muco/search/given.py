"""Rows that Python users hand in: lists, generators, and tables of pandas, polars and Arrow."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from muco.data.items import COLUMNS, Row, checked_record, read_row
from muco.dialogue import Video
from muco.errors import DataError
from muco.images import open_image
from muco.search.columns import as_id, plain_if_known


def records(rows: Any) -> Iterable[Any]:
    """The rows of whatever has rows; a DataError if it has none, as one mapping, text, or a single column."""
    if isinstance(rows, (Mapping, str, bytes, PurePath)):
        raise DataError(f'pass a list of rows, [{{"id": "1", "text": "a"}}], not one {type(rows).__name__}')
    if hasattr(rows, "to_dict") and hasattr(rows, "iterrows"):  # as pandas has them, whatever its columns hold
        names, found = [*rows.columns], partial(rows.to_dict, "records")
    elif hasattr(rows, "__arrow_c_stream__") or hasattr(rows, "__arrow_c_array__"):
        try:
            table = pa.table(rows)
        except (pa.ArrowException, TypeError, ValueError) as error:
            said = f"{type(rows).__name__} is not a table with columns; pass one, or a list of rows"
            raise DataError(said) from error
        names, found = table.column_names, table.to_pylist
    elif hasattr(rows, "__iter__"):
        return rows
    else:
        raise DataError(f"pass a list of rows, a DataFrame or a table of Arrow, not {type(rows).__name__}")
    if twice := [name for name in names if names.count(name) > 1]:
        raise DataError(f"two columns are called {twice[0]!r}; rename one")
    return found()


def as_given(number: int, row: Any) -> tuple[Row, dict[str, Any]]:
    """One row, read, and its further columns; what is wrong with its text or image becomes its error.

    Raises a DataError if it is not a mapping, or has no id.
    """
    where = f"row {number}"
    if not hasattr(row, "keys"):
        raise DataError(f'{where}: must be a mapping such as {{"id": "1", "text": "a"}}, not {type(row).__name__}')
    extra = dict(row)
    given = {name: extra.pop(name, None) for name in COLUMNS.used}
    values = {"id": as_id(given["id"], where)}
    try:
        values["text"] = plain_if_known(given["text"])
        for name in COLUMNS.images:
            value = given[name]
            several = isinstance(value, (list, tuple, np.ndarray))
            values[name] = [_image(image) for image in value] if several else _image(value)
        values[COLUMNS.video] = _video(given[COLUMNS.video])
    except DataError as error:
        return Row(number, values["id"], where, error=str(error)), extra
    return read_row(checked_record(number, where, values), COLUMNS, Path()), extra


def _video(value: Any) -> Any:
    """What a row of a file may say of a video, with frames as :func:`_image` makes them."""
    if isinstance(value, Video):
        value = {"source": value.source, "frames": value.frames, "fps": value.fps}
    if isinstance(value, Mapping):
        return {name: _video(item) if name == "source" else plain_if_known(item) for name, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_image(frame) for frame in value]
    return plain_if_known(value)


def _image(value: Any) -> Any:
    """What a row of a file may say of an image: a path, bytes, or a mapping of both; None if it is missing."""
    if isinstance(value, Image.Image):
        stream = io.BytesIO()
        open_image(value, small_side=0).save(stream, "PNG", compress_level=1)
        return stream.getvalue()
    return plain_if_known(value)
