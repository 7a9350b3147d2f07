"""The words and values of a filter, and what kinds of values there are."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from decimal import Decimal

import pyarrow as pa
import pyarrow.types as types

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
    exact: bool = False  # a column of whole numbers or decimals, which LanceDB does not compare with 1.5
    fraction: bool = False  # a number such as 1.5 or 1e3
    literal: bool = False

    def as_decimal(self) -> Value:
        number = Decimal(self.sql)
        _, digits, exponent = number.as_tuple()
        scale = max(0, -int(exponent))
        precision = max(1, scale, len(digits) + int(exponent) + scale)
        if precision > 38:
            return self
        return replace(self, sql=f"CAST('{number:f}' AS DECIMAL({precision}, {scale}))")


def next_token(text: str, place: int) -> Token:
    """The token at a place or after blanks there; of kind "unknown" if nothing there can be read."""
    found = _TOKEN.match(text, place)
    assert found is not None, "the last alternative fits anything"
    kind = found.lastgroup or ""
    return Token(kind, found[kind], found.end("blank"), found.end())


def kind_of(type: pa.DataType) -> tuple[str, bool]:
    """What values of a column are, and whether they are exact numbers."""
    exact = types.is_integer(type) or types.is_decimal(type)
    kinds = {
        NUMBER: exact or types.is_floating(type),
        CONDITION: types.is_boolean(type),
        TEXT: types.is_string(type) or types.is_large_string(type),
        DAY: types.is_date(type) or types.is_timestamp(type),
    }
    return next((kind for kind, fits in kinds.items() if fits), str(type)), exact
