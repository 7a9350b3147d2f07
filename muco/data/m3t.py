"""M3T on disk: pictures with several questions and answers each, in one Parquet file of millions of rows.

::

    <folder>/M3T_train/M3T.parquet
        qry              list with a question per turn, each a string or a list of paraphrases
        pos_text         list with an answer per turn
        qry_image_path   path of the picture below the folder of images; another column may be named
        kind             where there is one, as `muco synth` writes it: list with the kind of each turn
        …                anything else is not read

The pictures are not published with it and have to be downloaded one by one, so that some are always missing. Which rows
have their picture is found out once, shard by shard, and kept beside the rows (see :mod:`muco.data.rows`).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from muco.base.files import locked, whole_file
from muco.base.json_text import type_of
from muco.base.terminal import progress_bar
from muco.data.lines import errors_at, image_of, without_token
from muco.data.parquet import require_columns
from muco.data.places import position
from muco.data.rows import Rows, cannot_write
from muco.dialogue import Content, Sample, Turn
from muco.errors import DataError

KINDS = ("classification", "global", "global", "local", "local", "creative", "retrieval")  # of seven turns, in order
FORM = 1  # raise when the samples made of a row change
THREADS = 16  # that ask for files at once: on a network's disk each answer takes a millisecond

_FILES = ("M3T_train/M3T.parquet", "M3T.parquet")


class M3TData:
    """The rows of M3T whose picture is there, as samples with all turns of a row.

    The first opening copies the columns (see :class:`muco.data.rows.Rows`) and looks for every picture once per
    shard; an interrupted opening resumes. Later openings use what was found then.

    The placeholder ``<|image_1|>`` is taken out of texts, for models put the picture in front by themselves. Rows of
    exactly seven turns get the kinds of M3T by position, others none, but where a column ``kind`` says them.

    Args:
        path: The Parquet file, or a folder with ``M3T_train/M3T.parquet``, ``M3T.parquet`` or one other Parquet file.
        images: The folder that the paths of pictures are relative to.
        image_column: The column of these paths.
        cache: The folder for what is kept, where it is not beside the file.
        rescan: Look for all pictures again, as some were added or removed.
    Raises:
        DataError: If a file or folder is missing or cannot be read or written, a column is missing, or no row has its
            picture. Rows are checked on access.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        images: str | Path,
        image_column: str = "qry_image_path",
        cache: str | Path | None = None,
        rescan: bool = False,
    ) -> None:
        self.path = _find(Path(path))
        self.images, self.image_column = Path(images).absolute(), image_column
        if not self.images.is_dir():
            raise DataError(f"{self.images}: no such folder; it must hold the images of {self.path.name}")
        columns = require_columns(self.path, ("qry", "pos_text", image_column), ("kind",))
        self._rows = Rows(self.path, columns, cache=cache)
        # Packed, 0.6 MB for 5 million rows: this travels to every worker, the numbers of the rows are made there.
        self._present = np.packbits(_present(self._rows, self.images, image_column, rescan=rescan))
        self.missing = len(self._rows) - int(np.bitwise_count(self._present).sum())
        self._numbers: np.ndarray | None = None  # int32 [n], rows of the file
        if not len(self):
            raise DataError(
                f"{self.path}: none of the images of {self.missing:,} rows is in {self.images} (the first is "
                f"{self._rows[0][image_column]!r}); name the folder that the paths are relative to and look again "
                "with rescan=True"
            )

    def __len__(self) -> int:
        return len(self._rows) - self.missing

    def __getitem__(self, index: int) -> Sample:
        """Sample ``index``; ``where`` is "file row N" with the number in the file, from 0.

        Raises an IndexError if there is no such sample. Raises a DataError if the row has no turns, not as many
        questions as answers, an empty text, something else than texts, or no path of an image within the folder.
        """
        number = self._row(index)
        where = self._rows.where(number)
        with errors_at(where):
            row = self._rows[number]
            queries, targets = _turns(row, "qry"), _turns(row, "pos_text")
            count = len(queries)
            if len(targets) != count:
                raise DataError(f"'qry' has {count} turns and 'pos_text' {len(targets)}; each turn needs both")
            if not row[self.image_column]:
                raise DataError(f"{self.image_column!r} is {row[self.image_column]!r}; every row needs its image")
            image = image_of(row, self.image_column, self.images, where)
            kinds: Sequence[Any] = KINDS if count == len(KINDS) else (None,) * count
            if row.get("kind") is not None:
                kinds = _turns(row, "kind")
                if len(kinds) != count or not all(kind is None or isinstance(kind, str) for kind in kinds):
                    raise DataError(f"'kind' must have a word for each of the {count} turns, not {kinds!r:.80}")
            asked = [_wordings(query, "qry", n, has_image=True) for n, query in enumerate(queries)]
            answers = [_wordings(target, "pos_text", n, has_image=False) for n, target in enumerate(targets)]
            return Sample(image=image, turns=map(Turn, asked, answers, kinds), where=where)

    def where(self, index: int) -> str:
        """ "file row N" of a sample, also of one that cannot be read."""
        return self._rows.where(self._row(index))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the file's bytes, the name of the image column and which rows have a picture; kept on disk.

        The bytes of the pictures, millions of files, do not count, nor where the file and the pictures lie.
        """
        parts = [FORM, self._rows.digest, self.image_column, hashlib.sha256(self._present.tobytes()).hexdigest()]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_numbers": None}

    def _row(self, index: int) -> int:
        i = position(index, len(self), self.path)
        if self._numbers is None:
            bits = np.unpackbits(self._present, count=len(self._rows))
            self._numbers = np.flatnonzero(bits).astype(np.int32)
        return int(self._numbers[i])


def _find(path: Path) -> Path:
    if not path.is_dir():
        return path  # whether there is such a file is seen when it is opened
    for name in _FILES:
        if (path / name).is_file():
            return path / name
    found = sorted(path.glob("*.parquet"))
    if len(found) == 1:
        return found[0]
    what = ", ".join(file.name for file in found[:5]) if found else "none"
    raise DataError(f"{path}: no {' or '.join(_FILES)}, and not exactly one Parquet file ({what}); pass the file")


def _turns(row: dict[str, Any], column: str) -> list[Any]:
    value = row[column]
    if not isinstance(value, list):
        raise DataError(f"{column!r} must be a list with an element per turn, not {type_of(value)}")
    if not value:
        raise DataError(f"{column!r} is an empty list; a row needs at least one turn")
    return value


def _wordings(value: Any, column: str, turn: int, *, has_image: bool) -> list[Content]:
    """The paraphrases of one element, which is a text or a list of texts."""
    if value == []:
        raise DataError(f"turn {turn} of {column!r} is an empty list; pass at least one wording")
    texts = []
    for text in value if isinstance(value, list) else [value]:
        if not isinstance(text, str):
            raise DataError(f"turn {turn} of {column!r} must be a text or a list of texts, not {type_of(text)}")
        text = without_token(text, has_image=has_image)
        if not text.strip():
            raise DataError(f"turn {turn} of {column!r} has an empty text; every turn needs a query and a target")
        texts.append(Content(text))
    return texts


def _present(rows: Rows, images: Path, column: str, *, rescan: bool) -> np.ndarray:
    """bool [rows]: whether the image of a row is there. Made shard by shard, each part kept when it is known.

    Rows without a path count as present: asked for, they say what is wrong with them.
    """
    key = hashlib.sha256(json.dumps([FORM, str(images), column]).encode()).hexdigest()[:16]
    folder = rows.folder / f"images-{key}"
    files = [folder / f"present-{number:05}.npy" for number in range(rows.shards)]
    wanting = rescan or not all(file.exists() for file in files)
    try:
        with locked(folder, wait=math.inf) if wanting else nullcontext():
            if wanting:
                _look(rows, images, column, files, rescan=rescan)
            present = np.concatenate([np.load(file, allow_pickle=False) for file in files])
        if len(present) != len(rows):
            raise ValueError(f"{len(present)} answers for {len(rows)} rows")
    except OSError as error:
        raise cannot_write(folder, error) from error
    except (ValueError, EOFError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{folder}: the index of images is damaged ({error}); look again with rescan=True") from error
    return present


def _look(rows: Rows, images: Path, column: str, files: Sequence[Path], *, rescan: bool) -> None:
    if rescan:
        for file in files:
            file.unlink(missing_ok=True)
    with progress_bar("looking for images") as progress, ThreadPoolExecutor(THREADS) as threads:
        for number, file in enumerate(files):
            if not file.exists():
                present = _present_in(rows, number, images, column, threads)
                with whole_file(file) as unfinished, unfinished.open("wb") as opened:
                    np.save(opened, present)
                rows.forget()
            progress(min((number + 1) * rows.shard_rows, len(rows)), len(rows))


def _present_in(rows: Rows, shard: int, images: Path, column: str, threads: ThreadPoolExecutor) -> np.ndarray:
    try:
        paths = list(chain.from_iterable(batch.column(column).to_pylist() for batch in rows.batches(shard)))
    except UnicodeDecodeError as error:
        place = f"{rows.where(shard * rows.shard_rows)} or one of the {rows.shard_rows - 1} after it"
        raise DataError(f"{place}: {column!r} is not UTF-8 ({error.reason}); repair the file") from error
    distinct = sorted({path for path in paths if isinstance(path, str) and path})
    pieces = [distinct[n :: 4 * THREADS] for n in range(4 * THREADS)]
    answers = threads.map(lambda piece: [path for path in piece if _is_image_file(images, path)], pieces)
    there = set(chain.from_iterable(answers))
    known = (not isinstance(path, str) or not path or path in there for path in paths)
    return np.fromiter(known, dtype=bool, count=len(paths))


def _is_image_file(images: Path, path: str) -> bool:
    """Whether a file with something in it is there; an empty one is what a download that failed leaves behind."""
    try:
        status = os.stat(os.path.join(images, path))
    except (OSError, ValueError):  # also a name that is too long for a file, or that holds a NUL byte
        return False
    return stat.S_ISREG(status.st_mode) and status.st_size > 0
