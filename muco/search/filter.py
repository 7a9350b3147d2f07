"""Filters: an expression of SQL that a stranger may have written, let through only if it can do nothing but compare.

LanceDB evaluates an expression, never a statement: it can neither write nor read files. But it knows hundreds of
functions, of which some fill the memory (``repeat``), it forgets what stands after the expression, and thousands of
operators in a row overflow the stack of its parser. So an expression is read here word by word first, and only what
is listed passes.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from muco.errors import MucoError

KEYWORDS = frozenset("and or not in is null like ilike between true false date timestamp".split())
FUNCTIONS = frozenset("lower upper length starts_with ends_with contains coalesce abs".split())
LONGEST = 2000  # characters

_TOKEN = re.compile(
    r"""(?P<blank>\s+)
      | (?P<string>'(?:[^']|'')*')
      | (?P<number>-?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?(?![\w.]))
      | `(?P<quoted>[^`]+)`
      | (?P<word>[^\W\d]\w*)
      | (?P<operator><=|>=|!=|<>|[=<>(),])""",
    re.VERBOSE,
)


def quoted(text: str) -> str:
    """The text as a literal of SQL."""
    return "'" + text.replace("'", "''") + "'"


def checked_filter(where: str | None, columns: Collection[str]) -> str | None:
    """The filter as LanceDB reads it, or None if it is blank.

    Args:
        where: Columns (a name with other characters than letters, digits and "_" in backquotes), literals, comparisons,
            AND, OR, NOT, IN, LIKE, ILIKE, BETWEEN, IS NULL, parentheses, and the functions of FUNCTIONS.
        columns: Names that may be compared.
    Raises:
        MucoError: If anything else stands in it, or it is longer than LONGEST characters.
    """
    if where is None or not where.strip():
        return None
    if len(where) > LONGEST:
        raise MucoError(f"the filter has {len(where):,} characters; at most {LONGEST:,} are read")
    names = {name.lower(): name for name in columns}
    words, place = [], 0
    while place < len(where):
        token = _TOKEN.match(where, place)
        if token is None:
            raise _refused(where[place : place + 20], "cannot be read; strings stand in 'single quotes'", names)
        words.append(_checked(token, where[token.end() :].lstrip().startswith("("), columns, names))
        place = token.end()
    return "".join(words)


def _checked(token: re.Match[str], called: bool, columns: Collection[str], names: dict[str, str]) -> str:
    word = token["quoted"] or token["word"]
    if word is None:
        return token[0]
    if word in columns:
        return f"`{word}`"
    if token["word"] and called and word.lower() in FUNCTIONS:
        return word.lower()
    if token["word"] and word.lower() in KEYWORDS:
        return word
    if token["word"] and word.lower() in names:
        return f"`{names[word.lower()]}`"
    raise _refused(word, "is no function that may be used" if called else "is no column", names)


def _refused(what: str, why: str, names: dict[str, str]) -> MucoError:
    return MucoError(
        f"the filter: {what!r} {why}; columns: {', '.join(sorted(names.values()))}; functions: "
        f"{', '.join(sorted(FUNCTIONS))}; an example: label = 'cat' AND year >= 2020"
    )
