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
            shorter = compared and not _fits(self.number, exact)
            number = _compared(self.number, exact) if shorter else self.number
            return replace(self, number=number).as_decimal() or self
        if self.moment is not None and self.moment.since % DAY_LONG == 0:
            day = date(1970, 1, 1) + timedelta(self.moment.since // DAY_LONG)
            if any(types.is_timestamp(column) for column in columns):
                return replace(self, sql=f"TIMESTAMP '{day} 00:00:00'") if self.moment.day else self
            return replace(self, sql=f"DATE '{day}'") if columns else self
        return self

    def misfit(self, columns: Sequence[pa.DataType]) -> str:
        """Why LanceDB would compare something else with columns of these types, or fail; "" if it does neither."""
        if self.moment is not None:
            return next(filter(None, map(self.moment.misfit, columns)), "")
        if self.type is not None:
            return next(filter(None, (_apart(self.type, column) for column in columns)), "")
        exact = [column for column in columns if is_exact(column)]
        if self.number is None or not exact:
            return ""
        if _fits(self.number, exact) or _fits(_compared(self.number, exact), exact):
            return ""
        places = f"{max(map(_whole, exact))} before the point and {max(map(_scale, exact))} after it"
        return f"needs more digits than there are beside those of the column, {places}"

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
        if types.is_date(column) and self.since % DAY_LONG:
            return "a time of the day, but the column holds dates; write DATE '2020-01-31'"
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
    """Whether a column of exact numbers can hold a whole number, as LanceDB reads it: from 64 bits on as a float."""
    if types.is_decimal(column):
        return number.adjusted() < _whole(column) and abs(number) < 2**63
    bits = column.bit_width - types.is_signed_integer(column)
    return (-(2**bits) if types.is_signed_integer(column) else -1) < number < 2**bits


def _fits(number: Decimal, columns: Sequence[pa.DataType]) -> bool:
    """Whether LanceDB has room for all digits of the number and of the columns, which it compares as one decimal."""
    whole, scale = max(map(_whole, columns)), max(map(_scale, columns))
    room = MOST_DIGITS if whole + scale <= MOST_DIGITS else 2 * MOST_DIGITS
    places = max(0, -int(number.as_tuple().exponent))
    own = max(0, number.adjusted() + 1)
    return own + places <= MOST_DIGITS and max(whole, own) + max(scale, places) <= room


def _whole(column: pa.DataType) -> int:
    """The digits before the point that a column of exact numbers has room for, as LanceDB counts them."""
    return column.precision - column.scale if types.is_decimal(column) else DIGITS


def _scale(column: pa.DataType) -> int:
    return column.scale if types.is_decimal(column) else 0


def _compared(number: Decimal, columns: Sequence[pa.DataType]) -> Decimal:
    """The number of fewest digits that compares the same with everything the columns can hold.

    Of a number beyond all values that is one beyond them; of one between two neighbours, one between them.
    """
    scale, whole = max(map(_scale, columns)), max(map(_whole, columns))
    if number and number.adjusted() >= whole:
        return Decimal(1).scaleb(whole).copy_sign(number)
    with localcontext(prec=4 * MOST_DIGITS):
        fewer = number.quantize(Decimal(1).scaleb(-scale), ROUND_FLOOR)
        fewer += 0 if fewer == number else Decimal(5).scaleb(-scale - 1)
        return fewer.normalize()


def _apart(one: pa.DataType, other: pa.DataType) -> str:
    """Why LanceDB would not compare two columns of times as they are; "" if it does."""
    if types.is_timestamp(one) and types.is_timestamp(other) and one.unit != other.unit:
        return f"times of whole {NAMES[one.unit]} cannot be compared with those of whole {NAMES[other.unit]}"
    if types.is_date(one) and types.is_timestamp(other):
        return "a column of dates cannot be compared with one of times"
    return ""


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
