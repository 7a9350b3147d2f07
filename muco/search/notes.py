"""Notes of a run about every row. They are on disk, in SQLite, because an input may have more ids than memory holds."""

from __future__ import annotations

import json
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from muco.base.files import whole_file, writing
from muco.base.text import escaped
from muco.data.items import Row
from muco.errors import DataError, OutputError

LONGEST = 1 << 20  # characters of a line of a list
REMEDY = "name another file by --errors"


def check_list(path: Path) -> None:
    """Raises an OutputError if a list of the rows that failed would replace a file that is not such a list."""
    if not path.exists():
        return
    try:
        with path.open(encoding="utf-8") as file:
            first = json.loads(file.readline(LONGEST) or "{}")
    except OSError as error:
        raise OutputError(f"{path}: cannot be read ({error.strerror}); {REMEDY}") from error
    except ValueError:  # also what is not UTF-8
        first = None
    if not isinstance(first, dict) or (first and set(first) != {"row", "id", "where", "reason"}):
        raise OutputError(f"{path}: this file is not a list of rows that failed, and would be lost; {REMEDY}")


class Notes:
    """The ids that a run has seen, and the rows that failed. They live as long as the run."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._database = sqlite3.connect(Path(self._folder.name) / "notes.db", isolation_level=None)
        self._database.execute("PRAGMA journal_mode = OFF")
        self._database.execute("PRAGMA synchronous = OFF")
        self._database.execute("CREATE TABLE seen (id TEXT PRIMARY KEY) WITHOUT ROWID")
        self._database.execute("CREATE TABLE failed (note TEXT)")
        self.unread: Row | None = None  # the first whose id is not known

    def first(self, id: str) -> bool:
        """Notes an id; false if it was noted before."""
        return self._write("INSERT OR IGNORE INTO seen VALUES (?)", id).rowcount == 1

    def has(self, id: str) -> bool:
        return self._database.execute("SELECT 1 FROM seen WHERE id = ?", (id,)).fetchone() is not None

    def fail(self, row: Row, reason: str) -> None:
        note = {"row": row.number, "id": row.id, "where": row.where, "reason": reason}
        self._write("INSERT INTO failed VALUES (?)", json.dumps(note))

    def _write(self, statement: str, value: str) -> sqlite3.Cursor:
        with writing(self._folder.name, "let TMPDIR name another folder"):
            return self._database.execute(statement, (value,))

    def failed(self) -> Iterator[dict[str, Any]]:
        for (note,) in self._database.execute("SELECT note FROM failed ORDER BY rowid"):
            yield json.loads(note)

    def list_failed(self, path: Path | None, rows: int) -> str | None:
        """Writes a file of the rows that failed, or removes that of an earlier run; returns its path, if there is one.

        Without a ``path``, no file is written. Raises a DataError if all ``rows``, the number in the input, failed.
        """
        first, failed = next(self.failed(), None), sum(1 for _ in self.failed())
        if path is not None:
            with writing(path, REMEDY):
                path.unlink(missing_ok=True)
                if first is not None:
                    with whole_file(path) as unfinished, unfinished.open("w", encoding="utf-8") as file:
                        file.writelines(escaped(json.dumps(note, ensure_ascii=False)) + "\n" for note in self.failed())
        if first is None:
            return None
        if failed == rows:
            place = "name a file for the list by --errors" if path is None else f"all: {path}"
            raise DataError(
                f"none of the {rows} rows can be indexed; the first: {first['where']}: {first['reason']}; {place}"
            )
        return None if path is None else str(path)

    def close(self) -> None:
        self._database.close()
        self._folder.cleanup()
