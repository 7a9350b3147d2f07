"""Further columns: the Arrow type for what a user passes, and values as a column of that type holds them.

Numbers, truth values, text, decimals, dates and times stay what they are; times with a zone are kept in UTC. UUIDs and
paths become text, lists and mappings JSON. Missing is None, NaN, NaT and pandas' NA. A column widens where all values
still fit without loss; a number never becomes text, unless a new column has text from the start.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable, Mapping, Sequence, Set
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from pathlib import PurePath
from typing import Any
from uuid import UUID

import numpy as np
import pyarrow as pa
import pyarrow.types as types

from muco.base.text import LONE_SURROGATE
from muco.data.lines import whole_text
from muco.errors import DataError

NESTED = (Mapping, list, tuple, Set, np.ndarray)
PLAIN = (str, int, float, bool)
LARGEST_BITS = 252  # of a whole number; decimals of Arrow have up to 76 digits
DIGITS = 20  # of the largest whole number of 64 bits


def check_names(names: Iterable[Any], where: str, reserved: Sequence[str]) -> None:
    """Raises: DataError: If the index has a column of this name itself, or no column can have it."""
    for name in names:
        if not isinstance(name, str):
            raise DataError(f"{where}: the name of a column must be text, not {name!r}; rename it")
        if name in reserved or name.startswith("_"):
            raise DataError(f"{where}: the index has a column {name!r} of its own; rename that of the input")
        if not name or set(name) & set(".`\0") or LONE_SURROGATE.search(name):
            raise DataError(f"{where}: a column cannot be called {name!r} (no '.' and no '`'); rename it")


def as_id(value: Any, where: str) -> str:
    """An id as the table holds it: of text, a whole number (5 is "5") or a UUID, also those of numpy and pandas.

    Raises a DataError, which begins with ``where``, if it is missing, or something else.
    """
    found = plain_if_known(value)
    if found is None or (isinstance(found, str) and not found.strip()):
        raise DataError(f"{where}: 'id' is missing")
    if not isinstance(found, (str, int)) or isinstance(found, bool):
        raise DataError(f"{where}: 'id' must be text, a whole number or a UUID, not {found!r}; convert it")
    return str(found)


def checked_id(id: Any) -> str:
    """The id of a row to look for."""
    return whole_text(id if isinstance(id, str) else as_id(id, "the id"), "id")


def plain(value: Any) -> Any:
    """The value in plain Python: values of numpy, pandas and Arrow converted, missing as None, nested ones as they are.

    Raises a DataError if no column can hold it.
    """
    if isinstance(value, int) and value.bit_length() > LARGEST_BITS:
        raise DataError("a number of more than 76 digits cannot be kept; pass it as text")
    if value is None or type(value) in PLAIN:
        return None if value != value else value
    if isinstance(value, NESTED):
        return value
    if isinstance(value, (UUID, PurePath)):
        return str(value)
    try:
        if isinstance(value, np.generic):
            found = value.item()
            if isinstance(found, np.generic):  # Python has no number of this type
                raise TypeError
            in_nanoseconds = isinstance(found, int) and value.dtype.kind in "mM"
            return plain(pa.scalar(value).as_py() if in_nanoseconds else found)
        scalar = pa.scalar(value, from_pandas=True)  # knows what pandas calls missing
        if not scalar.is_valid:
            return None
        if isinstance(value, (datetime, date, time, timedelta, Decimal)):
            return value  # as it is: Arrow would cut nanoseconds
        value = scalar.as_py()
    except (pa.ArrowException, OverflowError, TypeError, ValueError) as error:
        raise DataError(f"a column cannot hold a value of type {type(value).__name__}; convert it") from error
    if type(value) not in PLAIN:
        raise DataError(f"a column cannot hold a value of type {type(value).__name__}; convert or leave it out")
    return value


def plain_if_known(value: Any) -> Any:
    """As plain, but what it refuses as it is: for a sentence that names the field."""
    try:
        return plain(value)
    except DataError:
        return value


def kind_of(value: Any) -> pa.DataType | None:
    """The type of a column for a plain value; None of a missing one."""
    match value:
        case None:
            return None
        case int() if not isinstance(value, bool):
            return pa.int64() if in_64_bits(value) else pa.scalar(Decimal(value)).type
        case datetime():
            unit = "ns" if getattr(value, "nanosecond", 0) else "us"
            return pa.timestamp(unit, None if value.tzinfo is None else "UTC")
        case timedelta():
            return pa.duration("ns" if getattr(value, "nanoseconds", 0) else "us")
        case bool() | float() | Decimal() | date() | time():
            return pa.scalar(value).type
    return pa.string()


def in_64_bits(value: int) -> bool:
    return -(2**63) <= value < 2**63


def column_type(given: pa.DataType) -> pa.DataType | None:
    """The type of a column for values of an Arrow type; None of bytes, which are left out, and of nothing but nulls."""
    if types.is_dictionary(given) or types.is_run_end_encoded(given):
        return column_type(given.value_type)
    left_out = (types.is_null, types.is_binary, types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary)
    if any(is_kind(given) for is_kind in left_out):
        return None
    if types.is_date(given):
        return pa.date32()
    if types.is_timestamp(given):
        return pa.timestamp(given.unit, None if given.tz is None else "UTC")
    if types.is_decimal(given):
        return decimal_type(given.precision, given.scale)
    number = types.is_boolean(given) or types.is_integer(given) or types.is_floating(given)
    return given if number or types.is_time(given) or types.is_duration(given) else pa.string()


def decimal_type(precision: int, scale: int) -> pa.DataType:
    return (pa.decimal128 if precision <= 38 else pa.decimal256)(precision, scale)


def common(one: pa.DataType | None, other: pa.DataType | None) -> pa.DataType | None:
    """The type that holds the values of both; None if there is none, as for a number and text."""
    if one is None or other is None or one == other:
        return one if other is None else other
    if _is_text(one) and _is_text(other):
        return one
    if types.is_date(one) and types.is_timestamp(other) or types.is_timestamp(one) and types.is_date(other):
        time = one if types.is_timestamp(one) else other
        return time if time.tz is None else None
    if types.is_timestamp(one) and types.is_timestamp(other):
        if (one.tz is None) != (other.tz is None):
            return None
        other = pa.timestamp(other.unit, one.tz)
    if types.is_decimal(one) and types.is_integer(other) or types.is_integer(one) and types.is_decimal(other):
        exact = one if types.is_decimal(one) else other
        return decimal_type(max(exact.precision - exact.scale, DIGITS) + exact.scale, exact.scale)
    fields = (pa.schema([pa.field("x", kind)]) for kind in (one, other))
    try:
        return pa.unify_schemas([*fields], promote_options="permissive").field("x").type
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return None


def _is_text(kind: pa.DataType) -> bool:
    return types.is_string(kind) or types.is_large_string(kind)


def add_kinds(kinds: dict[str, pa.DataType], values: Mapping[str, Any]) -> None:
    """Widens the types of new columns so that they hold the values too: unlike ones, as 1 and "one", become text."""
    for name, value in values.items():
        try:
            kind = kind_of(plain(value))
        except DataError:
            continue  # conform says it of the row
        if kind is not None:
            kinds[name] = common(kinds.get(name), kind) or pa.string()


def conform(values: Mapping[str, Any], kinds: Mapping[str, pa.DataType]) -> dict[str, Any]:
    """The values as columns hold them, None where one is missing; a DataError where one does not fit without loss."""
    found: dict[str, Any] = dict.fromkeys(kinds)
    for name, value in values.items():
        try:
            value = plain(value)
            if name in kinds:
                found[name] = _fitted(value, kinds[name])
        except DataError as error:
            raise DataError(f"{name!r}: {error}") from error
        except RecursionError as error:
            raise DataError(f"{name!r}: nested too deep, or within itself; convert it") from error
    return found


def _fitted(value: Any, kind: pa.DataType) -> Any:
    if value is None:
        return None
    if _is_text(kind):
        text = in_json(value)
        text = text if isinstance(text, str) else json.dumps(text, ensure_ascii=False)
        if LONE_SURROGATE.search(text):
            raise DataError("half of a character (a lone surrogate) cannot be kept; correct the text")
        return text
    whole = type(value) is int and types.is_int64(kind) and in_64_bits(value)
    if whole or (type(value) is float and types.is_float64(kind)):
        return value  # nearly all values; to ask Arrow takes ten times as long
    if types.is_timestamp(kind) and isinstance(value, date) and not isinstance(value, datetime):
        value = datetime.combine(value, time())
    if types.is_floating(kind) and isinstance(value, Decimal) and Decimal(repr(float(value))) == value:
        return float(value)
    try:
        if pa.scalar(value, kind).as_py() == value:
            return value
    except (pa.ArrowException, OverflowError, TypeError, ValueError):
        pass
    raise DataError(f"{str(value)[:60]!r} does not fit a column of {kind} without loss; convert it")


def in_json(value: Any) -> Any:
    """What JSON has for a value of a column: dates and times in ISO 8601, decimals as text, durations in seconds.

    A number that is not finite is null, as JSON has none; bytes are base64.
    """
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, Mapping):
        return {str(key): in_json(item) for key, item in value.items()}
    if isinstance(value, Set):
        return sorted(map(in_json, value), key=repr)  # the same in every process
    if isinstance(value, NESTED):
        return [in_json(item) for item in value]
    match plain(value):
        case float() as number:
            return number if math.isfinite(number) else None
        case (datetime() | date() | time()) as when:
            return when.isoformat().replace("+00:00", "Z")
        case timedelta() as duration:
            return duration.total_seconds()
        case Decimal() as number:
            return str(number)
        case other:
            return other
