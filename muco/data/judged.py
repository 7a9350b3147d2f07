"""Judged retrieval data: queries, pools of candidates, and judgements.

A :class:`LinePool` is a JSONL file of any length: one pass checks every line, and a line is read again when it is asked
for. Of a million candidates ids, numbers and the places of lines are in memory, some 40 MB, and nothing else. A
:class:`ListPool` holds its candidates in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from muco.base.text import read_text
from muco.data.left_out import LeftOut
from muco.data.lines import HASHED, JsonObject, as_object
from muco.data.places import LinePlaces
from muco.dialogue import Content, ImageLike
from muco.errors import DataError, ImageError
from muco.images import image_digest

# Bytes. DBPedia's ids are <dbpedia:TITLE>, with titles of 255 bytes and more where signs are escaped. There is a limit
# because every id takes the memory of the longest.
LONGEST_ID = 512


class Pool(ABC):
    """Candidates by row and by id.

    Attributes:
        name: What errors and warnings call it.
        order: int64 [N], unique: candidates of equal score come in this order.
        fingerprint: SHA-256 (hex) over ids, texts and images.
        left_out: Rows that cannot be embedded.
    """

    name: str
    order: np.ndarray
    fingerprint: str
    left_out: LeftOut

    def _index(self, ids: Sequence[bytes]) -> None:
        self._ids = np.array(ids, dtype=bytes)
        self._by_id = np.argsort(self._ids, kind="stable")
        first, second = self._by_id[:-1], self._by_id[1:]
        again = np.flatnonzero(self._ids[first] == self._ids[second])
        if len(again):
            row = again[np.argmin(second[again])]  # the one that comes first in the file
            raise DataError(
                f"{self.where(second[row])}: the id {self.id(second[row])!r} is also that of "
                f"{self._other(first[row])}; ids must be unique within a pool"
            )

    def __len__(self) -> int:
        return len(self._ids)

    @abstractmethod
    def __getitem__(self, row: int) -> Candidate: ...

    @abstractmethod
    def where(self, row: int) -> str:
        """Names a row in errors ("file:line")."""

    def _other(self, row: int) -> str:
        return self.where(row)

    def id(self, row: int) -> str:
        """The id of a row, without reading its content."""
        return self._ids[row].decode()

    def find(self, ids: Sequence[str]) -> np.ndarray:
        """The rows of ids, int64 [n]; -1 for one that the pool does not hold."""
        wanted = np.array([id.encode() for id in ids], dtype=bytes)
        place = np.searchsorted(self._ids, wanted, sorter=self._by_id)
        rows = self._by_id[np.minimum(place, len(self) - 1)]
        return np.where(self._ids[rows] == wanted, rows, -1).astype(np.int64)

    def _digest(self, row: int, image: ImageLike) -> str:
        try:
            return image_digest(image, where=self.where(row))
        except ImageError as error:
            self.left_out.add(row, error)
            return ""


class ListPool(Pool):
    """Candidates in memory, some ten thousand at most; equal scores are ordered by ids.

    Args:
        form: Names how contents are made of files; raise it when they change.
        left_out: Gets the rows whose image is missing, if that is allowed.
    Raises:
        DataError: If there is no candidate, an id occurs twice, or a content cannot be used and may not be left out.
    """

    def __init__(
        self, name: str, candidates: Sequence[Candidate], *, form: str, left_out: LeftOut | None = None
    ) -> None:
        self.name, self._candidates = name, list(candidates)
        self.left_out = LeftOut() if left_out is None else left_out
        if not candidates:
            raise DataError(f"{name}: the pool holds no candidate")
        self._index([candidate.id.encode() for candidate in candidates])
        self.order = np.argsort(self._by_id, kind="stable")
        digest = hashlib.sha256(form.encode())
        for row, candidate in enumerate(candidates):
            looks = [self._digest(row, image) for image in candidate.content.images]
            said = [candidate.id, candidate.content.text, looks, row in self.left_out]
            digest.update(json.dumps(said).encode())
        self.fingerprint = digest.hexdigest()

    def __getitem__(self, row: int) -> Candidate:
        return self._candidates[row]

    def where(self, row: int) -> str:
        return self._candidates[row].where


class LinePool(Pool):
    """The candidates of a JSONL file, in its order.

    Its fingerprint is made of the file's bytes and, where the pool has at most ``HASHED`` candidates, of the bytes of
    every image. Reading a million images twice would take hours: of larger pools the sizes and modification times of
    the images count instead, so a copy of the images that does not keep the times is embedded anew.

    Args:
        identify: The id of a line, from its object and "file:line"; a DataError where it has none.
        read: Its content; a DataError where that is not valid.
        form: Names what ``read`` does; raise it when the content of a candidate changes.
        numbers: From all ids, as numpy bytes, to int64 [N]: the ``order`` of the pool.
        left_out: Gets the rows whose content cannot be read or whose image is missing, if that is allowed.
    Raises:
        DataError: If the file cannot be read, a line is not JSON or has no id, an id occurs twice, or a content cannot
            be used and may not be left out.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        identify: Callable[[JsonObject, str], str],
        read: Callable[[JsonObject, str], Content],
        *,
        form: str,
        numbers: Callable[[np.ndarray], np.ndarray],
        left_out: LeftOut | None = None,
    ) -> None:
        self.path, self.name, self._read = Path(path), name, read
        self.left_out = LeftOut() if left_out is None else left_out
        ids: list[bytes] = []
        images: list[tuple[int, str]] = []  # row and path of those whose bytes may count
        digest, times = hashlib.sha256(), hashlib.sha256()
        self._places = LinePlaces(self.path)
        for row, (line, where) in enumerate(self._places.scan(digest)):
            value = as_object(line, where)
            ids.append(identify(value, where).encode())
            if len(ids[-1]) > LONGEST_ID:
                raise DataError(f"{where}: an id of {len(ids[-1])} bytes; at most {LONGEST_ID} are allowed")
            try:
                paths = [str(image) for image in read(value, where).images]
                for image in paths:
                    times.update(_size_and_time(image, where))
            except DataError as error:
                self.left_out.add(row, error)
                continue
            if row < HASHED:
                images += [(row, image) for image in paths]
        if not ids:
            raise DataError(f"{self.path}: the file holds no candidate")
        self._index(ids)
        self.order = numbers(self._ids)
        looks = times.hexdigest() if len(self) > HASHED else [self._digest(*image) for image in images]
        lost = [sorted(self.left_out.reasons)] if self.left_out else []
        parts = json.dumps([form, digest.hexdigest(), looks, *lost])
        self.fingerprint = hashlib.sha256(parts.encode()).hexdigest()

    def __getitem__(self, row: int) -> Candidate:
        """Raises IndexError if there is no such row, DataError if the file changed since it was opened."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)} in {self.path}")
        where = self.where(row)
        return Candidate(self.id(row), self._read(as_object(self._places.read(row), where), where), where)

    def where(self, row: int) -> str:
        return self._places.where(row)

    def _other(self, row: int) -> str:
        return f"line {self._places.line(row)}"


def _size_and_time(image: str, where: str) -> bytes:
    try:
        status = os.stat(image)
    except OSError as error:
        raise ImageError(f"{where}: image {image} cannot be read ({error.strerror}); repair the row") from error
    return f"{status.st_size} {status.st_mtime_ns}\n".encode()


@dataclass(frozen=True)
class Candidate:
    """One candidate; ``where`` ("file:line") names it in errors."""

    id: str
    content: Content
    where: str


@dataclass(frozen=True)
class Query:
    """A query and its judgements: candidate id -> grade; above 0 is relevant. With an ``error`` it has no content."""

    id: str
    content: Content
    grades: Mapping[str, int]
    where: str
    error: DataError | None = None

    @property
    def relevant(self) -> list[str]:
        return sorted(id for id, grade in self.grades.items() if grade > 0)


def read_qrels(path: Path) -> dict[str, dict[str, int]]:
    """Judgements in TREC's form (``query 0 candidate grade``, a fifth column is ignored) or BEIR's (a TSV with header).

    Raises a DataError that names a line of another form, with an invalid grade, or a pair that was judged before.
    """
    qrels: dict[str, dict[str, int]] = {}
    lines = read_text(path).splitlines()
    beir = bool(lines) and lines[0].split() == ["query-id", "corpus-id", "score"]
    for number, line in enumerate(lines, start=1):
        if not line.strip() or (beir and number == 1):
            continue
        where, cells = f"{path}:{number}", line.split("\t") if beir else line.split()
        if len(cells) != 3 if beir else len(cells) not in (4, 5):
            form = "query-id, corpus-id and score, separated by tabs" if beir else "query, 0, candidate, grade"
            raise DataError(f"{where}: {len(cells)} columns; a line of judgements has {form}")
        query, candidate, grade = cells if beir else (cells[0], cells[2], cells[3])
        own = qrels.setdefault(query, {})
        if candidate in own:
            raise DataError(f"{where}: {candidate!r} is judged twice for {query!r}; keep one of the lines")
        try:
            own[candidate] = int(grade)
        except ValueError:
            raise DataError(f"{where}: the grade must be a whole number, not {grade!r}") from None
    return qrels
