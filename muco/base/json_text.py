"""Values as valid JSON, whatever numbers and texts a result holds."""

from __future__ import annotations

import json
import math
from typing import Any

from muco.base.text import escaped

TYPES = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}


def type_of(value: Any) -> str:
    """The JSON name of the type of a value ("a number"), for errors; Python's name of any other type."""
    return "null" if value is None else TYPES.get(type(value), type(value).__name__)


def json_text(value: Any, *, ascii_only: bool = False) -> str:
    """One line of JSON: NaN and infinity as null, unknown types as text, half characters (or all but ASCII) escaped."""
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
