"""Values as JSON: always JSON, whatever numbers and texts a result holds."""

from __future__ import annotations

import json
import math
from typing import Any

from muco.base.text import escaped

TYPES = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string"} | {
    list: "a list",
    dict: "an object",
}


def type_of(value: Any) -> str:
    """What JSON calls the type of a value ("a number"), for errors; of another value Python's word."""
    return TYPES.get(type(value), type(value).__name__)


def json_text(value: Any, *, ascii_only: bool = False) -> str:
    """One line of JSON. NaN and infinity, which JSON has no words for, are null; what it does not know is text.

    Half a character (in a file name that is not UTF-8, for example) is escaped, so that the line can be written.

    Args:
        ascii_only: Escape every other character too.
    """
    return escaped(json.dumps(finite(value), ensure_ascii=ascii_only, allow_nan=False, default=str))


def finite(value: Any) -> Any:
    """The value with None in place of every NaN and infinity in it, and numpy's numbers and arrays as Python's."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return finite(value.tolist()) if hasattr(value, "tolist") else value
