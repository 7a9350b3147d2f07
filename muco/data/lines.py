"""What every row of a file is checked by: line, JSON, text, id and images. No torch in this file."""

from __future__ import annotations

import ast
import io
import json
import os
import re
import tokenize
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any

from muco.base.json_text import type_of
from muco.base.text import LONE_SURROGATE
from muco.errors import DataError
from muco.images import is_url

HASHED = 50_000  # rows up to which the bytes of all images are read for a fingerprint
MARK = b"\xef\xbb\xbf"  # of byte order, as Windows programs write it first
LONGEST_LINE = 1 << 26  # bytes; a file of one huge line is not JSONL, and must not be read whole to find that out
LONGEST_LITERAL = 1 << 20  # characters of a list that is written as a string
DEEPEST = 100  # brackets within brackets; what reads or writes JSON gives up at some 900, depending on who calls

JsonObject = dict[str, Any]

TOKEN = "<|image_1|>"  # where data of others has an image in its texts
_TOKEN = re.compile(r"\A<\|image_1\|>[\n ]?| <\|image_1\|>|<\|image_1\|> ?")


def raw_lines(path: Path, digest: Any = None) -> Iterator[tuple[int, bytes, int]]:
    """Byte offset, bytes and number (from 1) of every line that is not blank; ``digest`` gets all bytes.

    A byte-order mark is skipped. A DataError if the file cannot be read or a line is longer than ``LONGEST_LINE``.
    """
    try:
        with path.open("rb") as file:
            offset = number = 0
            while line := file.readline(LONGEST_LINE + 1):
                number += 1
                if len(line) > LONGEST_LINE:
                    raise DataError(
                        f"{path}:{number}: the line is longer than {LONGEST_LINE >> 20} MiB; write one row a line"
                    )
                if digest is not None:
                    digest.update(line)
                if number == 1 and line.startswith(MARK):
                    offset, line = len(MARK), line.removeprefix(MARK)
                if line and not line.isspace():
                    yield offset, line, number
                offset += len(line)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def objects(path: Path) -> Iterator[tuple[JsonObject, str]]:
    """The JSON object and "file:line" of every line that is not blank."""
    for _, line, number in raw_lines(path):
        where = f"{path}:{number}"
        yield as_object(line, where), where


def as_object(line: bytes, where: str, *, constants: bool = False) -> JsonObject:
    """The JSON object of a line, see :func:`parsed`; another value is a DataError."""
    value = parsed(line, where, constants=constants)
    if not isinstance(value, dict):
        raise DataError(f"{where}: the line must be a JSON object, not {type_of(value)}")
    return value


def parsed(line: bytes, where: str, *, constants: bool = False) -> Any:
    """The JSON value that UTF-8 bytes hold; a byte-order mark before it is skipped.

    Args:
        where: Starts every error message ("file:line").
        constants: Take NaN and Infinity, which are not JSON, as Python does.
    Raises:
        DataError: If they are not UTF-8 or not JSON, an object has a key twice, or values are nested more than
            ``DEEPEST`` levels deep.
    """
    constant = float if constants else _no_constant
    try:
        value = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_unique, parse_constant=constant)
    except json.JSONDecodeError as error:
        column = f":{error.colno}" if where.rpartition(":")[2].isdigit() else ""  # of "file:line"
        raise DataError(f"{where}{column}: malformed JSON: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 at byte {error.start + 1} of the row; save the file as UTF-8") from error
    except RecursionError as error:
        raise DataError(f"{where}: malformed JSON: nested too deep") from error
    except ValueError as error:  # ours from the hooks below, or a number of more than 4300 digits
        raise DataError(f"{where}: {error}") from error
    if line.count(b"[") + line.count(b"{") > DEEPEST and _depth(value) > DEEPEST:
        raise DataError(f"{where}: malformed JSON: nested too deep")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> JsonObject:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise DataError(f"the key {twice!r} occurs twice in one object; keep one")
    return result


def _no_constant(name: str) -> Any:
    raise DataError(f"malformed JSON: {name} is not JSON")


def _depth(value: Any) -> int:
    """Levels of lists and objects."""
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, dict | list)]:
        depth += 1
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]
    return depth


def whole_text(text: str, key: str) -> str:
    """The text; a DataError if it holds half a character, which JSON can spell and no tokenizer or file takes."""
    if LONE_SURROGATE.search(text):
        raise DataError(f"{key!r} holds half a character (a lone surrogate such as \\ud800); repair the text")
    return text


def check_texts(row: Mapping[str, Any]) -> None:
    """Looks at every text of a row, however deep; a DataError as :func:`whole_text`, which names the key."""
    for key, value in row.items():
        whole_text(key, key)
        for text in _texts(value):
            whole_text(text, key)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for inner in chain.from_iterable(value.items()) if isinstance(value, dict) else value:
            yield from _texts(inner)


@contextmanager
def errors_at(where: str) -> Iterator[None]:
    """Begins every DataError of the block with the place, unless it does so already."""
    try:
        yield
    except DataError as error:
        message = str(error)
        raise DataError(message if message.startswith(where) else f"{where}: {message}") from error


def text_of(row: Mapping[str, Any], key: str, where: str) -> str | None:
    """A string of a row, None where it is null or not there; a DataError if it is another value or no whole text."""
    value = row.get(key)
    if value is None:
        return None
    if not isinstance(value, str):
        raise DataError(f"{where}: {key!r} must be a string or null, not {value!r:.60}")
    with errors_at(where):
        return whole_text(value, key)


def id_of(row: Mapping[str, Any], key: str, where: str) -> str:
    """An id: a string that is not empty and holds no control character."""
    value = text_of(row, key, where)
    if not value or not value.isprintable():
        raise DataError(f"{where}: {key!r} must be an id, not {value!r:.60}")
    return value


def image_folder(path: Path, images: str | Path | None) -> Path:
    """The folder that image paths in a file count from, by default the file's own; a DataError if it is not there."""
    folder = path.parent if images is None else Path(images)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; it must hold the images of {path}")
    return folder


def image_of(row: Mapping[str, Any], key: str, folder: Path, where: str) -> str | None:
    """The path of a row's image, None where it is null; a DataError if it is a URL or leaves ``folder`` (links may)."""
    value = text_of(row, key, where)
    if value is None:
        return None
    if is_url(value):
        raise DataError(f"{where}: {key!r} is a URL ({value[:60]}); URLs are not fetched, download the image")
    inside = os.path.normpath(value) if value else ""
    if not inside or "\0" in value or os.path.isabs(value) or inside.split(os.sep)[0] in ("..", "."):
        raise DataError(f"{where}: {key!r} is {value!r:.120}; use the path of an image within {folder}")
    return os.path.join(folder, inside)


def without_token(text: str, *, has_image: bool) -> str:
    """The text without ``<|image_1|>``.

    With an image, the newline or blank after a token at the start goes too, for the model's prompt has one; elsewhere
    one neighbouring blank does. Without an image only the token goes: such queries begin with their lone newline.
    """
    return _TOKEN.sub("", text) if has_image else text.replace(TOKEN, "")


def image_cell(row: Mapping[str, Any], column: str, folder: Path, where: str) -> str | bytes | None:
    """The image of a cell: a path as in :func:`image_of`, bytes, a mapping of both (bytes go first), or None."""
    value = row.get(column)
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value or None
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    return image_of({column: value}, column, folder, where)


def literal_list(text: str, name: str) -> list[Any]:
    """A list that a text spells as Python or JSON does; nothing is run.

    Raises a DataError, which begins with ``name``, if it is longer than ``LONGEST_LITERAL`` or not one such list.
    """
    text = text.strip()
    if len(text) > LONGEST_LITERAL:
        raise DataError(f"{name} is a list of {len(text):,} characters; at most {LONGEST_LITERAL:,} are read")
    with suppress(ValueError, RecursionError):
        if isinstance(value := json.loads(text, parse_constant=_no_constant), list):
            return value
    try:
        value = ast.literal_eval(text)
        # Python joins strings without a comma between them into one, as numpy writes its arrays: never what was meant.
        strings = sum(token.type == tokenize.STRING for token in tokenize.generate_tokens(io.StringIO(text).readline))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError, tokenize.TokenError) as error:
        raise DataError(f"{name} looks like a list but is not valid: {text[:60]!r}; fix the row") from error
    if not isinstance(value, list):
        raise DataError(f"{name} must be one list, not {text[:60]!r}")
    if strings != sum(1 for _ in _texts(value)):
        raise DataError(f"{name} is a list without commas: {text[:60]!r}; write it as Python or JSON does")
    return value
