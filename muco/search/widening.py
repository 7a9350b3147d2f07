"""Further columns that come to a table, or need another type there."""

from __future__ import annotations

from collections.abc import Mapping, Set

import pyarrow as pa
import pyarrow.types as types

from muco.errors import DataError
from muco.search.columns import common
from muco.search.table import FORMER, WIDER, Table


def fit_columns(table: Table, extra: Mapping[str, pa.DataType], empty: Set[str], where: str) -> None:
    """Adds the columns that the table lacks, and widens those it has where the values of both fit without loss.

    ``extra`` holds the input's further columns; those in ``empty`` have no value, which fits any type. Raises a
    DataError, which begins with ``where``, if a column of the table cannot take the values.
    """
    with table.writing():  # else another run may still be widening a column
        # A run that was killed while it widened one has left it; the column itself is whole.
        if left := [name for name in (WIDER, FORMER) if name in table.table.schema.names]:
            table.table.drop_columns(left)
    there = table.extra_columns
    wider = {name: common(there[name], kind) for name, kind in extra.items() if name in there and name not in empty}
    wider = {name: kind for name, kind in wider.items() if kind != there[name]}
    for name, kind in wider.items():
        if kind is None or not _fits(table, name, kind):
            raise DataError(
                f"{where}: the column {name!r} is {extra[name]}, and {there[name]} in the index; convert or rename it, "
                "or make a new index, in another folder"
            )
    for name, kind in wider.items():
        with table.writing():
            _widen(table, name, kind)
    if extra.keys() - there.keys():
        with table.writing():  # another run may have added some of them meanwhile
            new = [pa.field(name, kind) for name, kind in extra.items() if name not in table.table.schema.names]
            if new:
                table.table.add_columns(new)


def _fits(table: Table, column: str, kind: pa.DataType) -> bool:
    """Whether all values of a further column fit another type without loss."""
    if types.is_decimal(table.extra_columns[column]) and types.is_floating(kind):
        return False
    try:
        for batch in table.batches(None, [column]):
            batch.column(0).cast(kind)
    except pa.ArrowInvalid:
        return False
    return True


def _widen(table: Table, column: str, kind: pa.DataType) -> None:
    """Changes the type of a further column to one that its values fit."""
    rows = table.table
    if not types.is_integer(table.extra_columns[column]) or types.is_integer(kind):
        rows.alter_columns({"path": column, "data_type": kind})
        return
    # LanceDB cannot alter whole numbers to others, but it casts them: a new column takes the name of the old one
    name = f"DECIMAL({kind.precision}, {kind.scale})" if types.is_decimal(kind) else "DOUBLE"
    rows.add_columns({WIDER: f"CAST(`{column}` AS {name})"})
    rows.alter_columns({"path": column, "rename": FORMER}, {"path": WIDER, "rename": column})
    rows.drop_columns([FORMER])
