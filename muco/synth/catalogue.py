"""Which pictures there are and which of them are kept: an SQLite file that a kill at any moment leaves whole.

Pictures come in the order of the source, some hundreds per transaction, and each is decided on as if it came alone: a
duplicate or near duplicate of a kept one, or kept itself. So the decisions depend neither on the size of the
transactions nor on how often the run was stopped. Every new picture is compared with the perceptual hashes of all kept
ones, which are in memory, 8 bytes each.
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import numpy as np

from muco.errors import MucoError, OutputError
from muco.synth.pictures import DUPLICATE, NEAR_DUPLICATE, UNREACHABLE, WORKERS, Filter, Look, look_at_all
from muco.synth.sources import Source

BLOCK, COMPARED = 256, 512  # new and kept pictures compared at once: both fit into a processor's cache

_TABLES = """
CREATE TABLE about (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE pictures (
    number INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    file TEXT NOT NULL,
    digest BLOB NOT NULL,
    phash INTEGER NOT NULL, -- signed: SQLite has no unsigned integers
    width INTEGER NOT NULL,
    height INTEGER NOT NULL,
    reason TEXT NOT NULL,
    note TEXT NOT NULL,
    place INTEGER -- among the kept ones; NULL if it is not kept
);
CREATE UNIQUE INDEX kept ON pictures (place) WHERE place IS NOT NULL;
CREATE UNIQUE INDEX kept_digest ON pictures (digest) WHERE place IS NOT NULL;
CREATE INDEX left_out ON pictures (reason) WHERE place IS NULL;
"""


@dataclass(frozen=True)
class Kept:
    """A kept picture; ``place`` counts these from 0, ``number`` all pictures of the source."""

    place: int
    number: int
    name: str
    file: str
    digest: str
    width: int
    height: int


class Catalogue:
    """The pictures of one source under one filter; open in one process at a time.

    Attributes:
        looked: Number of pictures looked at, which is the number of the next one.
    Raises:
        OutputError: If the file is of another source or filter, in use by another process, or not a catalogue.
    """

    def __init__(self, path: str | Path, source_fingerprint: str, filter: Filter) -> None:
        self.path = Path(path)
        self._database = _opened(self.path)
        try:
            about = {"source": source_fingerprint, "filter": json.dumps(asdict(filter))}
            found = dict(self._database.execute("SELECT key, value FROM about WHERE key IN ('source', 'filter')"))
            if not found:
                with self._database:
                    self._database.execute("BEGIN IMMEDIATE")
                    self._database.executemany("INSERT INTO about VALUES (?, ?)", about.items())
            wrong = {"source": "other pictures, or their files have changed", "filter": "another filter"}
            if differing := [wrong[key] for key in wrong if found and found[key] != about[key]]:
                raise OutputError(
                    f"{self.path}: made from {differing[0]}; name another output folder, or remove this one"
                )
            (self.looked,) = self._one("SELECT ifnull(max(number) + 1, 0) FROM pictures")
            phashes = self._database.execute("SELECT phash FROM pictures WHERE place >= 0 ORDER BY place")
            self._phashes = np.array([signed for (signed,) in phashes], dtype=np.int64).view(np.uint64)
            self._near = filter.near
        except BaseException:
            self._database.close()
            raise

    def __enter__(self) -> Catalogue:
        return self

    def __exit__(self, *_: object) -> None:
        self._database.close()

    @property
    def kept_count(self) -> int:
        return len(self._phashes)

    @property
    def complete(self) -> bool:
        """Whether the source has no further pictures."""
        return self._one("SELECT count(*) FROM about WHERE key = 'complete'") == (1,)

    def finish(self) -> None:
        """Records that the source has no further pictures."""
        self._database.execute("INSERT OR IGNORE INTO about VALUES ('complete', '')")

    def add(self, looks: Sequence[Look]) -> list[str]:
        """Decides on the next pictures and records the looks, all or none; OutputError if the file cannot be written.

        Returns the files of near duplicates, which need not be stored. ValueError if they are not the next pictures.
        """
        if [look.number for look in looks] != [*range(self.looked, self.looked + len(looks))]:
            raise ValueError(f"looks must be those of the pictures from {self.looked} on, in order")
        before, unused = self._phashes, []
        try:
            with self._database:
                self._database.execute("BEGIN IMMEDIATE")
                for start in range(0, len(looks), BLOCK):
                    unused += self._add_block(looks[start : start + BLOCK])
        except BaseException as error:
            self._phashes = before
            if isinstance(error, sqlite3.Error):
                raise OutputError(f"{self.path}: cannot be written ({error})") from error
            raise
        self.looked += len(looks)
        return unused

    def counts(self) -> dict[str, int]:
        """``pictures`` looked at, ``kept``, and how many were left out for each reason."""
        rows = self._database.execute("SELECT reason, count(*) FROM pictures WHERE place IS NULL GROUP BY reason")
        return {"pictures": self.looked, "kept": self.kept_count, **dict(rows)}

    def kept(self, start: int, count: int) -> list[Kept]:
        """The kept pictures from place ``start`` on, at most ``count``."""
        columns = "place, number, name, file, lower(hex(digest)), width, height"
        query = f"SELECT {columns} FROM pictures WHERE place >= ? ORDER BY place LIMIT ?"
        return [Kept(*row) for row in self._database.execute(query, (start, count))]

    def name_of(self, digest: str) -> str | None:
        """The name of the kept picture whose file has this digest."""
        query = "SELECT name FROM pictures WHERE digest = ? AND place IS NOT NULL"
        found = self._one(query, (bytes.fromhex(digest),))
        return found[0] if found else None

    def _add_block(self, looks: Sequence[Look]) -> list[str]:
        hashes = np.array([look.phash for look in looks], dtype=np.uint64)
        nearest = first_near(hashes, self._phashes, self._near).tolist()
        signed = hashes.view(np.int64).tolist()  # as SQLite stores 64 bits
        kept, unused, rows = [], [], []
        for n, look in enumerate(looks):
            reason, note = self._decide(look, nearest[n], kept)
            place = None if reason else self.kept_count + len(kept)
            if reason == NEAR_DUPLICATE:
                unused.append(look.file)
            elif not reason:
                kept.append(look)
            found = (look.number, look.name, look.file, bytes.fromhex(look.digest), signed[n], look.width, look.height)
            rows.append((*found, reason, note, place))
        self._database.executemany("INSERT INTO pictures VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)
        self._phashes = np.append(self._phashes, np.array([look.phash for look in kept], dtype=np.uint64))
        return unused

    def _decide(self, look: Look, nearest: int, block: Sequence[Look]) -> tuple[str, str]:
        """Why a picture is not kept, and a note about it; two empty strings if it is kept.

        ``nearest``: place of its first near duplicate in the file, or -1; ``block``: kept, but not in the file yet.
        """
        if look.reason:
            return look.reason, look.note
        same = [other.name for other in block if other.digest == look.digest] or [self.name_of(look.digest)]
        if same[0] is not None:
            return DUPLICATE, f"same file as {same[0]}"
        if nearest >= 0:
            near = self._one("SELECT name FROM pictures WHERE place = ?", (nearest,))
        else:
            near = [other.name for other in block if (other.phash ^ look.phash).bit_count() <= self._near]
        return (NEAR_DUPLICATE, f"nearly the same as {near[0]}") if near else ("", "")

    def _one(self, query: str, values: tuple = ()) -> Any:
        return self._database.execute(query, values).fetchone()


def first_near(hashes: np.ndarray, kept: np.ndarray, near: int) -> np.ndarray:
    """The place (int64 [n]) of the first of the kept hashes (uint64 [m]) within ``near`` bits of each, or -1."""
    places = np.full(len(hashes), -1)
    for start in range(0, len(kept), COMPARED):
        close = np.bitwise_count(hashes[:, None] ^ kept[start : start + COMPARED]) <= near
        found = (places < 0) & close.any(axis=1)
        places[found] = start + close[found].argmax(axis=1)
    return places


def _opened(path: Path) -> sqlite3.Connection:
    database = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        database = sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False)
        database.execute("PRAGMA locking_mode = EXCLUSIVE")  # ends with the process, however that ends
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = NORMAL")
        database.execute("PRAGMA wal_autocheckpoint = 16384")  # pages of 4 KiB: digests come in random order
        database.execute("PRAGMA cache_size = -65536")  # KiB
        with database:
            database.execute("BEGIN IMMEDIATE")
            if database.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,):
                for statement in _TABLES.split(";\n")[:-1]:
                    database.execute(statement)
            database.execute("SELECT key FROM about, pictures LIMIT 1")
    except (sqlite3.Error, OSError) as error:
        if database is not None:
            database.close()
        if getattr(error, "sqlite_errorcode", None) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            what = "another process is writing to it; wait for it, or name another output folder"
            raise OutputError(f"{path}: {what}") from error
        raise OutputError(f"{path}: cannot be used ({error}); name another output folder") from error
    return database


ADD = 256  # looks per transaction
GONE = 100  # unreachable pictures in a row stop the run


def fill(
    catalogue: Catalogue,
    source: Source,
    filter: Filter,
    store: Path | None,
    *,
    workers: int = WORKERS,
    ray: str | None = None,
    progress: Callable[[int, int | None], None] = lambda done, total: None,
) -> None:
    """Pass one: looks at all pictures that the catalogue lacks, see ``look_at_all``, and adds them.

    ``progress`` is called with the pictures done and the total, if known.
    """
    if catalogue.complete:
        return
    stored = store is not None and source.root is None  # otherwise the files are the user's own
    looks = look_at_all(source, filter, store, start=catalogue.looked, workers=workers, ray=ray)

    def add(chunk: list[Look]) -> None:
        unused = catalogue.add(chunk)
        for name in unused if stored else ():
            (store / name).unlink(missing_ok=True)
        progress(catalogue.looked, source.total)

    gone: list[Look] = []  # the unreachable ones at the end: perhaps the network's fault, and then not added
    while chunk := list(islice(looks, ADD)):
        chunk = [*gone, *chunk]
        gone = [*takewhile(lambda look: look.reason == UNREACHABLE, reversed(chunk))][::-1]
        add(chunk[: len(chunk) - len(gone)])
        if len(gone) >= GONE or (gone and not catalogue.looked):
            raise MucoError(
                f"none of {len(gone)} pictures in a row could be fetched, the last: {gone[-1].note}. Fix the "
                "connection and run the same command again: it resumes where it stopped"
            )
    add(gone)
    # what killed runs left in the store: files of pictures that are not kept, and unfinished ones
    for file in store.glob("[0-9a-f][0-9a-f]/*") if stored else ():
        digest = re.match(r"\.*([0-9a-f]{64})\.", file.name)
        if digest and (file.name.startswith(".") or catalogue.name_of(digest[1]) is None):
            file.unlink()
    catalogue.finish()
