"""A file of JSON lines that only grows, and that a kill at any moment leaves whole but for the line being written."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from muco.base.files import make_folder, take_lock, writing
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
        self._held: dict[str, list[dict[str, Any]]] = {}
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

    def hold(self, value: dict[str, Any], by: str = "") -> None:
        """Keeps a failure back until something succeeds: a broken server is not the fault of what it was asked about.

        Args:
            by: Who failed, of several servers.
        """
        self._held.setdefault(by, []).append(value)

    def succeed(self, value: dict[str, Any], by: str = "") -> None:
        """Appends a success, then the failures that were kept back."""
        self.add(value)
        self.release(by)

    def release(self, *by: str) -> None:
        """Appends the failures that were kept back, of everyone or only ``by`` some."""
        for name in by or [*self._held]:
            for value in self._held.pop(name, []):
                self.add(value)

    def settle(self, succeeded: bool) -> dict[str, Any] | None:
        """At the end of a run: :meth:`release` if anything ``succeeded``, in this run or an earlier one.

        Else nothing is written, so that the next run asks again.

        Returns:
            The last failure that is still kept back, or None.
        """
        if succeeded:
            self.release()
        return next((values[-1] for values in reversed(self._held.values())), None)

    def close(self) -> None:
        """Closes the file; what is still kept back is not written."""
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
