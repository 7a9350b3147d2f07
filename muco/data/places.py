"""Where rows lie in files, which must not change as long as their rows are read."""

from __future__ import annotations

import operator
import os
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from muco.data.lines import raw_lines
from muco.errors import DataError


def position(index: int, length: int, path: Path | str) -> int:
    """An index from 0; counts from the end where it is negative. IndexError if there is none."""
    i = operator.index(index)
    if not -length <= i < length:
        raise IndexError(f"row {i} of {length} in {path}")
    return i % length


def file_state(file: Path | int) -> tuple[int, int]:
    """Size in bytes and modification time in nanoseconds of a file, or of one that is open; else a DataError."""
    try:
        status = os.stat(file)
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from error
    return status.st_size, status.st_mtime_ns


def check_unchanged(path: Path | str, state: tuple[int, int], file: Path | int | None = None) -> None:
    """Raises a DataError that names ``path`` unless it, or ``file`` instead, is as it was when its rows were found."""
    if file_state(Path(path) if file is None else file) != state:
        raise DataError(f"{path}: the file changed since it was opened; start again")


@contextmanager
def open_unchanged(path: Path, state: tuple[int, int], shown: Path | str | None = None) -> Iterator[BinaryIO]:
    """A file that is as it was when its rows were found; otherwise a DataError, which names it as ``shown``."""
    shown = path if shown is None else shown
    try:
        with path.open("rb") as file:
            check_unchanged(shown, state, file.fileno())
            yield file
    except OSError as error:
        raise DataError(f"{shown}: cannot be read ({error.strerror or error})") from error


class LinePlaces:
    """Where the rows of text files begin, found once; a row is read from its file when asked for.

    A file is opened anew for every row, so that threads, forked workers and pickled copies share no handle. Errors call
    a single file ``shown``, where that is given. Memory: 17 bytes a row.
    """

    def __init__(self, *paths: Path, shown: str = "") -> None:
        self.paths, self._shown = paths, [shown] if shown else [*map(str, paths)]
        self._states = [file_state(Path(name)) for name in self._shown]
        self._files, self._starts, self._lines = array("B"), array("q"), array("q")

    def add(self, start: int, line: int, file: int = 0) -> None:
        """Notes the first byte and the line number of the next row."""
        self._files.append(file)
        self._starts.append(start)
        self._lines.append(line)

    def scan(self, digest: Any = None) -> Iterator[tuple[bytes, str]]:
        """Notes every line that is not blank, and yields it with its "file:line"; see :func:`raw_lines`."""
        for number, name in enumerate(self._shown):
            for start, text, line in raw_lines(Path(name), digest):
                self.add(start, line, number)
                yield text, f"{name}:{line}"

    def __len__(self) -> int:
        return len(self._starts)

    def line(self, row: int) -> int:
        """The line number of a row, from 1."""
        return self._lines[row]

    def where(self, row: int) -> str:
        """ "file:line" of a row, also of one that cannot be read."""
        return f"{self._shown[self._files[row]]}:{self._lines[row]}"

    @contextmanager
    def open(self, row: int | None = None) -> Iterator[BinaryIO]:
        """The file of a row, to be read from there, or the first file; a DataError if it has changed."""
        number, start = (0, 0) if row is None else (self._files[row], self._starts[row])
        with open_unchanged(self.paths[number], self._states[number], self._shown[number]) as file:
            file.seek(start)
            yield file

    def read(self, row: int) -> bytes:
        """The line of a row; a DataError if the file has changed."""
        with self.open(row) as file:
            return file.readline()

    def check(self) -> None:
        """Raises a DataError if a file has changed."""
        for path, state, shown in zip(self.paths, self._states, self._shown, strict=True):
            check_unchanged(shown, state, path)
