"""The words and values of a filter, and how LanceDB compares a literal with a column."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from decimal import ROUND_FLOOR, Decimal, localcontext

import pyarrow as pa
import pyarrow.types as types

from muco.search.columns import DIGITS

TEXT, NUMBER, CONDITION, DAY, ANY = "text", "a number", "a condition", "a date", "null"

_TOKEN = re.compile(
    r"""(?P<blank>\s*)(?:(?P<text>'(?:[^']|'')*')
      | (?P<number>-?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?(?![\w.]))
      | `(?P<quoted>[^`]+)`
      | (?P<word>[^\W\d]\w*)
      | (?P<sign><=|>=|==|!=|<>|[=<>(),])
      | (?P<end>$)
      | (?P<unknown>.))""",
    re.VERBOSE | re.DOTALL,
)

_MOMENT = re.compile(
    r"""'(?P<day>\d{4}-\d\d-\d\d)(?:[T ](?P<clock>\d\d:\d\d:\d\d)(?:\.(?P<fraction>\d{1,9}))?
      \s*(?P<zone>Z|[+-]\d\d(?::?\d\d)?)?)?'""",
    re.VERBOSE | re.IGNORECASE | re.ASCII,
)
MOST_DIGITS = 38  # of a decimal literal of LanceDB
UNITS = {"s": 10**9, "ms": 10**6, "us": 1000, "ns": 1}  # of time, in nanoseconds
NAMES = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}
DAY_LONG = 86_400 * 10**9  # nanoseconds


@dataclass(frozen=True)
class Token:
    kind: str
    text: str
    place: int  # of its first character
    end: int  # the place after it


@dataclass(frozen=True)
class Value:
    """A part that was read: its SQL, and what it is."""

    sql: str
    kind: str
    place: int
    type: pa.DataType | None = None  # of a column
    number: Decimal | None = None  # of a literal, also in parentheses
    moment: Moment | None = None  # of a literal, also in parentheses
    literal: bool = False

    def beside(self, columns: Sequence[pa.DataType], *, compared: bool = True) -> Value:
        """The value, so that LanceDB compares it rightly with columns of these types, or takes it for one of them.

        LanceDB refuses a number that a column of whole numbers or decimals cannot hold, but compares all with decimals.
        """
        exact = [column for column in columns if is_exact(column)]
        if self.number is not None and exact:
            whole = self.sql.strip("(-)").isdecimal()
            if whole and (not compared or all(_holds(column, self.number) for column in exact)):
                return self
            return self.as_decimal() or (_compared(self.number, exact, self) if compared else self)
        if self.moment is not None and self.moment.day and any(types.is_timestamp(column) for column in columns):
            return replace(
                self, sql=f"TIMESTAMP '{date(1970, 1, 1) + timedelta(self.moment.since // DAY_LONG)} 00:00:00'"
            )
        return self

    def as_decimal(self) -> Value | None:
        """A number as a decimal; None if it has more digits than those of LanceDB."""
        assert self.number is not None
        _, digits, exponent = self.number.as_tuple()
        scale = max(0, -int(exponent))
        precision = max(1, scale, len(digits) + int(exponent) + scale)
        if precision > MOST_DIGITS:
            return None
        return replace(self, sql=f"CAST('{self.number:f}' AS DECIMAL({precision}, {scale}))")


@dataclass(frozen=True)
class Moment:
    """A date or a time of SQL."""

    since: int  # nanoseconds since 1970, in UTC
    day: bool  # whether it is a date

    def misfit(self, column: pa.DataType) -> str:
        """Why LanceDB would compare another time with a column; "" if it does not."""
        if not types.is_timestamp(column):
            return ""
        if self.since % UNITS[column.unit]:
            return f"finer than the times of the column, which are whole {NAMES[column.unit]}"
        if column.unit == "ns" and not -(2**63) < self.since < 2**63:
            return "the times of the column are of 1677-09-22 to 2262-04-11; take one of these"
        return ""


def moment(word: str, text: str) -> Moment | None:
    """The literal of a DATE or a TIMESTAMP, in quotes; None if it is no such time."""
    found = _MOMENT.fullmatch(text)
    if found is None or (word == "date" and found["clock"]):
        return None
    zone = found["zone"] or ""
    try:
        whole = datetime.fromisoformat(f"{found['day']}T{found['clock'] or '00:00:00'}{zone.upper()}")
        since = (whole if zone else whole.replace(tzinfo=UTC)) - datetime(1970, 1, 1, tzinfo=UTC)
    except (OverflowError, ValueError):
        return None
    nanoseconds = int((found["fraction"] or "").ljust(9, "0"))
    return Moment(since // timedelta(seconds=1) * 10**9 + nanoseconds, word == "date")


def _holds(column: pa.DataType, number: Decimal) -> bool:
    """Whether a column of exact numbers can hold a whole number."""
    if types.is_decimal(column):
        return number.adjusted() < column.precision - column.scale
    bits = column.bit_width - types.is_signed_integer(column)
    return (-(2**bits) if types.is_signed_integer(column) else 0) <= number < 2**bits


def _compared(number: Decimal, columns: Sequence[pa.DataType], value: Value) -> Value:
    """The value of too many digits as one of fewer that compares the same with everything the columns can hold.

    Those are a number beyond all values, and one between two neighbours.
    """
    decimals = [column for column in columns if types.is_decimal(column)]
    scale = max([0, *(column.scale for column in decimals)])
    whole = max([DIGITS, *(column.precision - column.scale for column in decimals)])
    if number.adjusted() >= whole:
        fewer = Decimal(1).scaleb(whole).copy_sign(number)
    else:
        with localcontext(prec=2 * MOST_DIGITS + 2):
            fewer = number.quantize(Decimal(1).scaleb(-scale), ROUND_FLOOR)
            fewer += 0 if fewer == number else Decimal(5).scaleb(-scale - 1)
    return replace(value, number=fewer).as_decimal() or value


def next_token(text: str, place: int) -> Token:
    """The token at a place or after blanks there; of kind "unknown" if nothing there can be read."""
    found = _TOKEN.match(text, place)
    assert found is not None, "the last alternative fits anything"
    kind = found.lastgroup or ""
    return Token(kind, found[kind], found.end("blank"), found.end())


def is_exact(type: pa.DataType) -> bool:
    """Whether a column holds whole numbers or decimals."""
    return types.is_integer(type) or types.is_decimal(type)


def kind_of(type: pa.DataType) -> str:
    """What values of a column are."""
    kinds = {
        NUMBER: is_exact(type) or types.is_floating(type),
        CONDITION: types.is_boolean(type),
        TEXT: types.is_string(type) or types.is_large_string(type),
        DAY: types.is_date(type) or types.is_timestamp(type),
    }
    return next((kind for kind, fits in kinds.items() if fits), str(type))
