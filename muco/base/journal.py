"""A file of JSON lines that only grows, and that a kill at any moment leaves whole but for the line being written."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from muco.base.files import make_folder, take_lock, whole_file, writing
from muco.errors import DataError, OutputError


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(Byte where it begins, object) of every whole line; a DataError if a line is not a JSON object."""
    start = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                value = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}:{number}: not a line of JSON ({error}); remove the line") from error
            if not isinstance(value, dict):
                raise DataError(f"{path}:{number}: not an object; remove the line")
            yield start, value
            start += len(line)


class Journal:
    """Appends to such a file, made with its folder if missing, and removes the rest of a line that a kill cut off.

    Raises an OutputError if another process writes to the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with writing(path):
            make_folder(path.parent)
            self._file = _open(path)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, value: dict[str, Any]) -> None:
        """Appends one line; once this has returned, a kill of the process cannot lose it."""
        line = (json.dumps(value, ensure_ascii=False) + "\n").encode("utf-8", "replace")
        with writing(self.path, again=True):
            while line:
                line = line[os.write(self._file, line) :]

    def replace(self, values: Iterable[dict[str, Any]]) -> None:
        """Has these lines instead of those so far, all at once."""
        with whole_file(self.path) as unfinished:
            new = Journal(unfinished)
            for value in values:
                new.add(value)
        os.close(self._file)
        self._file = new._file  # and with it the lock

    def close(self) -> None:
        os.fsync(self._file)
        os.close(self._file)


def _open(path: Path) -> int:
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o666)
    try:
        if not take_lock(file, path):
            raise OutputError(f"{path}: another process is writing to it; wait for it, or name another output")
        end = size = os.fstat(file).st_size
        while end:  # back to the last whole line
            start = max(0, end - (1 << 16))
            os.lseek(file, start, os.SEEK_SET)
            newline = os.read(file, end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end < size:
            os.ftruncate(file, end)
    except BaseException:
        os.close(file)
        raise
    return file
