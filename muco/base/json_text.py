"""JSON for other programs: always JSON, whatever numbers and texts a result holds."""

from __future__ import annotations

import json
import math
from typing import Any


def json_text(value: Any, *, ascii: bool = False) -> str:
    """One line of JSON, of ASCII alone if asked for.

    NaN and infinity, which JSON has no words for, are null; what it does not know is text.

    Half a character (in a file name that is not UTF-8, for example) is escaped, so that the line can be written.
    """
    plain = _plain(value)
    text = json.dumps(plain, ensure_ascii=ascii, allow_nan=False, default=str)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(plain, allow_nan=False, default=str)
    return text


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value
