"""Positions of values in a JSON file of hundreds of megabytes, and the values one at a time."""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from muco.base.json_text import type_of
from muco.base.text import refuse_utf16
from muco.data.lines import MARK, JsonObject, parsed
from muco.data.places import file_state, open_unchanged
from muco.errors import DataError

PIECE = 1 << 20  # bytes read at once
LONGEST_VALUE = 1 << 26  # bytes of one entry
_BLANKS = re.compile(r"[ \t\r\n]*")


def checked_object(value: Any, name: str, where: str) -> JsonObject:
    """The value, if it is a JSON object; ``name`` says what it should be."""
    if not isinstance(value, dict):
        raise DataError(f"{where}: {name} must be a JSON object, not {type_of(value)}")
    return value


def value_at(file: BinaryIO, place: Sequence[int], where: str) -> Any:
    """The JSON value at a place, (first byte, bytes)."""
    return parsed(bytes_at(file, place), where, constants=True)  # as the scanner: who needs a number looks at it


def bytes_at(file: BinaryIO, place: Sequence[int]) -> bytes:
    start, length = map(int, place)
    file.seek(start)
    return file.read(length)


class ArrayPlaces:
    """The elements of a JSON file's one array (else a DataError), read when asked for. Memory: 16 bytes an element."""

    def __init__(self, path: Path) -> None:
        self.path, self._state = path, file_state(path)
        with open_unchanged(path, self._state) as file:
            scanner = Scanner(file, path)
            if scanner.peek() != "[":
                raise DataError(f"{path}: the file must hold a JSON array; name it .jsonl if it has one entry a line")
            self._places = scanner.elements()  # int64 [n, 2]
            scanner.end()

    def __len__(self) -> int:
        return len(self._places)

    def where(self, index: int) -> str:
        """ "file row N", counted from 0."""
        return f"{self.path} row {index}"

    def read(self, index: int) -> bytes:
        """The JSON of an element; a DataError if the file has changed."""
        with open_unchanged(self.path, self._state) as file:
            return bytes_at(file, self._places[index])


class Scanner:
    """Walks through one JSON value of any size, a piece of the file at a time.

    Bytes are taken for Latin-1, so that characters are bytes; a value is parsed again, as UTF-8, when it is used.
    """

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path = file, path
        self._decoder = json.JSONDecoder()
        head = file.read(3)
        refuse_utf16(head, path)
        file.seek(3 if head == MARK else 0)
        self._text, self._first, self._at, self._ended = "", file.tell(), 0, False  # _text begins at byte _first

    @property
    def offset(self) -> int:
        return self._first + self._at

    def peek(self) -> str:
        """The next character that is not blank, "" at the end of the file."""
        while True:
            self._at = _BLANKS.match(self._text, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more(PIECE):
                return ""

    def take(self, wanted: str) -> str:
        found = self.peek()
        if not found or found not in wanted:
            what = repr(found) if found else "the end of the file"
            raise DataError(f"{self.path}: not JSON, {what} at byte {self.offset} where {' or '.join(wanted)} must be; "
                            "download the file again")  # fmt: skip
        self._at += 1
        return found

    def value(self) -> tuple[int, int]:
        """Steps over the next value; its first byte and its bytes."""
        self.peek()
        while True:
            try:
                _, end = self._decoder.raw_decode(self._text, self._at)
            except (ValueError, RecursionError) as error:
                left = len(self._text) - self._at
                if isinstance(error, RecursionError) or left > LONGEST_VALUE or not self._more(max(PIECE, left)):
                    said = getattr(error, "msg", "nested too deep")
                    raise DataError(f"{self.path}: not JSON at byte {self.offset} ({said}); download the file "
                                    "again")  from error  # fmt: skip
                continue
            if len(self._text) - end < 3 and not self._ended:  # a number may continue, as with ".5" or "e+5"
                self._more(PIECE)
                continue
            place = self.offset, end - self._at
            self._at = end
            return place

    def elements(self) -> np.ndarray:
        """Steps over an array; the places of its elements."""
        places = array("q")
        for _ in self._parts("[]"):
            places.extend(self.value())
        return np.array(places, dtype=np.int64).reshape(-1, 2)

    def members(self) -> Iterator[str]:
        """Steps over an object; stops after each name, for the caller to step over the value."""
        for _ in self._parts("{}"):
            if self.peek() != '"':
                self.take('"')
            start, length = self.value()
            name = self._text[start - self._first : start - self._first + length]
            self.take(":")
            yield json.loads(name)

    def _parts(self, brackets: str) -> Iterator[None]:
        """Steps over an array or object; stops before each part, for the caller to step over it."""
        first, last = brackets
        self.take(first)
        if self.peek() == last:
            self.take(last)
            return
        yield
        while self.take(f",{last}") == ",":
            yield

    def end(self) -> None:
        """Raises a DataError if anything comes after the values that were stepped over."""
        if self.peek():
            raise DataError(f"{self.path}: there is more after the JSON value, at byte {self.offset}; fix the file")

    def _more(self, size: int) -> bool:
        """Reads on; what has been stepped over is dropped."""
        piece = b"" if self._ended else self.file.read(size)
        self._ended = not piece
        self._first += self._at
        self._text, self._at = self._text[self._at :] + piece.decode("latin-1"), 0
        return bool(piece)
