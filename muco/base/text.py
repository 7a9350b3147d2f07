"""Text from files of others and to streams of any encoding: a sentence or an escape, never a traceback."""

from __future__ import annotations

import codecs
import re
import sys
from pathlib import Path
from typing import TextIO

from muco.errors import DataError, MucoError

SPECIAL_TOKEN = re.compile(r"<\|[^<>|\s]{1,40}\|>")  # <|emb|>, <|image_pad|>, <|im_end|> …, whatever the model
LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # half a character: JSON can spell it, UTF-8 cannot


def read_text(path: Path, error: type[MucoError] = DataError) -> str:
    """The text of a UTF-8 file, with or without a byte order mark; else raises ``error`` with the file and line."""
    try:
        data = Path(path).read_bytes()
    except OSError as problem:
        raise error(f"{path}: cannot be read ({problem.strerror or problem})") from problem
    refuse_utf16(data, path, error)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        line = data.count(b"\n", 0, problem.start) + 1
        raise error(f"{path}:{line}: not UTF-8 (byte 0x{data[problem.start]:02x}); save the file as UTF-8") from problem


def refuse_utf16(data: bytes, path: Path, error: type[MucoError] = DataError) -> None:
    """Raises an error that names the file if its first bytes say that it is UTF-16."""
    if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        raise error(f"{path}: the file is UTF-16; save it as UTF-8")


def first_line(error: Exception) -> str:
    """What went wrong, without the advice that libraries append to it."""
    said = str(error).strip()
    return said.splitlines()[0].split(". Check out")[0] if said else type(error).__name__


def escaped(text: str) -> str:
    r"""Text as valid UTF-8: half characters (of JSON, or file names) become escapes that JSON and YAML read back."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def writes_utf8(stream: TextIO | None) -> bool:
    """Whether a stream takes every character; None, a stream that is closed, takes none."""
    try:
        return codecs.lookup(getattr(stream, "encoding", None) or "ascii").name == "utf-8"
    except LookupError:
        return False


def escape_what_streams_cannot_write() -> None:
    """Makes stdout and stderr write an escape for a character that their encoding lacks, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a stream that a caller has put there may be no file
            stream.reconfigure(errors="backslashreplace")
