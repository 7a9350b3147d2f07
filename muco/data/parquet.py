"""Rows of large Parquet files by their numbers, without ever holding the file.

A Parquet file can only be decoded from the beginning of a row group, and row groups of published data are near 2 GB. So
the columns that are needed are copied once, in batches of at most ``BATCH_ROWS`` rows, into shards of ``SHARD_ROWS``
rows that can be mapped into memory; from then on a row costs the pages it lies on.

::

    <folder of the file>/.muco-rows/<file name>-<key>/shard-00000.arrow …

The key stands for the file's size and modification time and for the columns: another file, or other columns, get a
folder of their own. A shard appears under its name when it is whole, so copying goes on where it was stopped.

Memory of the copying: one batch, decoded, and a buffer of ``BUFFER`` bytes per column; no row group and no column of
one. Memory of the reading: pages of the shards that were touched since they were last handed back, which happens
after every ``READS`` rows.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import mmap
import operator
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from muco.base.files import locked, whole_file
from muco.base.terminal import progress_bar
from muco.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

FORM = 1  # raise when the content of a shard changes
SHARD_ROWS = 65_536  # of a new cache
BATCH_ROWS = 4096
BATCH_BYTES = 16 * 2**20  # encoded; larger rows come in smaller batches
BUFFER = 2**20
READS = 128  # a row may lie on ten places, of each of which the system maps 64 KiB or more


class Rows:
    """The rows of a Parquet file as dictionaries of plain values.

    Opening makes the shards, which takes as long as decoding the columns once and as much room on disk as they have
    uncompressed. Several processes may open the same file; one of them copies and the others wait. Shards of a file
    that has changed stay where they are, their folder may be deleted at any time.

    Args:
        file: The file; errors name it as it is given.
        columns: Those that are read; all must exist, see :func:`read_header`.
        cache: The folder for the shards, where it is not ``.muco-rows`` beside the file.
    Raises:
        DataError: If the file cannot be read, has no rows, or the shards cannot be written.
    """

    def __init__(self, file: str | Path, columns: Sequence[str], *, cache: str | Path | None = None) -> None:
        self.file, self.columns, self.shard_rows = Path(file), tuple(columns), SHARD_ROWS
        self._place, self._state = self.file.absolute(), _file_state(self.file)
        self._length = read_header(self.file)[1]
        if not self._length:
            raise DataError(f"{self.file}: the file has no rows")
        # Beside the file, moving both keeps the shards; in a folder for many files, names may be those of others.
        place = "" if cache is None else str(self._place)
        key = json.dumps([FORM, self.shard_rows, self._state, self.columns, place])
        parent = self._place.parent / ".muco-rows" if cache is None else Path(cache).absolute()
        self.folder = parent / f"{self.file.name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        self._open_shards: dict[int, _Shard] = {}
        self._process, self._reads = os.getpid(), 0
        self._copy()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Row ``index`` as column -> plain value.

        Raises:
            IndexError: If there is no such row.
            DataError: If a text is not UTF-8, or the shards were deleted or damaged.
        """
        i = operator.index(index)
        if not 0 <= i < self._length:
            raise IndexError(f"row {i} of {self._length} in {self.file}")
        self._reads += 1
        if self._reads % READS == 0:
            self.forget()
        number, row = divmod(i, self.shard_rows)
        try:
            return self._shard(number).row(row)
        except UnicodeDecodeError as error:
            raise DataError(f"{self.where(i)}: a text is not UTF-8 ({error.reason}); repair the file") from error

    def where(self, index: int) -> str:
        """ "file row N", counted from 0 through the whole file."""
        return f"{self.file} row {index}"

    @property
    def shards(self) -> int:
        return -(-self._length // self.shard_rows)

    def batches(self, shard: int) -> list[pa.RecordBatch]:
        """The rows ``shard`` * ``shard_rows`` … of one shard, in order; mapped, not loaded."""
        return self._shard(shard).batches

    def forget(self) -> None:
        """Hands back the memory of all pages read so far; what is read again comes from the disk's cache."""
        for shard in self._open_shards.values():
            shard.forget()

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the bytes of the file; read once, then kept beside the shards.

        Raises:
            DataError: If the file is gone or has changed since it was opened.
        """
        kept = self.folder / "sha256"
        if kept.exists():
            return kept.read_text(encoding="ascii")
        self._unchanged()
        try:
            with self._place.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise DataError(f"{self.file}: cannot be read ({error.strerror})") from error
        self._unchanged()
        try:
            with whole_file(kept) as unfinished:
                unfinished.write_text(digest, encoding="ascii")
        except OSError as error:
            raise cannot_write(self.folder, error) from error
        return digest

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open_shards": {}}

    def _shard(self, number: int) -> _Shard:
        if self._process != os.getpid():  # after a fork: memory maps are safe to share, but what is open is not ours
            self._open_shards, self._process = {}, os.getpid()
        shard = self._open_shards.get(number)
        if shard is None:
            shard = self._open_shards[number] = _Shard(self._shard_file(number))
        return shard

    def _shard_file(self, number: int) -> Path:
        return self.folder / f"shard-{number:05}.arrow"

    def _unchanged(self) -> None:
        if _file_state(self._place) != self._state:
            raise DataError(f"{self.file}: the file changed since it was opened; open it again")

    # ── copying ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _copy(self) -> None:
        """Makes the shards that are missing."""
        if self._whole_shards() == self.shards:
            return
        try:
            with locked(self.folder, wait=math.inf), progress_bar(f"copying rows of {self.file.name}") as progress:
                for left in self.folder.glob(".shard-*.tmp"):  # of a process that was killed
                    left.unlink()
                first = self._whole_shards()  # another process may have made them meanwhile
                batches = self._stream(first * self.shard_rows)
                for number, parts in groupby(_cut(batches, first, self.shard_rows), key=lambda part: part[0]):
                    self._write(number, (batch for _, batch in parts))
                    progress(min((number + 1) * self.shard_rows, self._length), self._length)
        except OSError as error:
            raise cannot_write(self.folder, error) from error
        self._unchanged()

    def _whole_shards(self) -> int:
        """How many shards there are before the first that is missing."""
        return next((n for n in range(self.shards) if not self._shard_file(n).exists()), self.shards)

    def _write(self, number: int, batches: Iterable[pa.RecordBatch]) -> None:
        import pyarrow as pa

        batches = iter(batches)
        first = next(batches)
        file = self._shard_file(number)
        with whole_file(file) as unfinished, pa.ipc.new_file(str(unfinished), first.schema) as writer:
            for batch in chain([first], batches):
                writer.write_batch(batch)

    def _stream(self, first: int) -> Iterator[pa.RecordBatch]:
        """The batches from row ``first`` on; decoding starts with the row group that holds it."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        if first >= self._length:
            return
        row = first
        try:
            # A buffer makes Arrow read the pages of a column one after another instead of the whole column first.
            with pq.ParquetFile(self.file, buffer_size=BUFFER, pre_buffer=False) as opened:
                ends = np.cumsum([opened.metadata.row_group(n).num_rows for n in range(opened.num_row_groups)])
                group = int(np.searchsorted(ends, first, side="right"))
                skip = first - (int(ends[group - 1]) if group else 0)
                groups = list(range(group, opened.num_row_groups))
                size = _batch_rows(opened.metadata, self.columns)
                for batch in opened.iter_batches(size, row_groups=groups, columns=list(self.columns)):
                    skipped = min(skip, len(batch))
                    skip -= skipped
                    if batch := batch.slice(skipped):
                        yield _plain(batch.select(list(self.columns)))
                        row += len(batch)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{self.file}: broken after row {row} ({_reason(error)}); download it again") from error


class _Shard:
    """The batches of one shard, in memory that is mapped from its file."""

    def __init__(self, file: Path) -> None:
        import pyarrow as pa

        try:
            with file.open("rb") as opened:
                self._map = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
            reader = pa.ipc.open_file(pa.BufferReader(pa.py_buffer(self._map)))
            self.batches = [reader.get_batch(n) for n in range(reader.num_record_batches)]
        except (pa.ArrowException, OSError, ValueError) as error:
            what = f"{file}: a part of the cache is gone or damaged ({_reason(error)})"
            raise DataError(f"{what}; delete the folder {file.parent} and start again") from error
        self._ends = np.cumsum([len(batch) for batch in self.batches])
        self._advise("MADV_RANDOM")  # rows are asked for in random order: reading ahead would be for nothing

    def row(self, row: int) -> dict[str, Any]:
        number = int(np.searchsorted(self._ends, row, side="right"))
        batch = self.batches[number]
        return batch.slice(row - int(self._ends[number]) + len(batch), 1).to_pylist()[0]

    def forget(self) -> None:
        self._advise("MADV_DONTNEED")  # of pages of a file this loses nothing, they are mapped again when touched

    def _advise(self, name: str) -> None:
        if hasattr(mmap, name):  # not on Windows
            self._map.madvise(getattr(mmap, name))


def _cut(batches: Iterable[pa.RecordBatch], shard: int, size: int) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Batches, of which the first begins with that shard, cut where shards end, with the number of their shard."""
    left = size  # rows that the shard still lacks
    for batch in batches:
        while len(batch):
            part = batch.slice(0, left)
            yield shard, part
            batch, left = batch.slice(len(part)), left - len(part)
            if not left:
                shard, left = shard + 1, size


def _batch_rows(metadata: Any, columns: Sequence[str]) -> int:
    """Rows of which the widest row group has some ``BATCH_BYTES`` in these columns."""
    widest = 1.0
    for group in (metadata.row_group(n) for n in range(metadata.num_row_groups)):
        chunks = [group.column(n) for n in range(group.num_columns)]
        size = sum(c.total_uncompressed_size for c in chunks if c.path_in_schema.split(".")[0] in columns)
        widest = max(widest, size / max(1, group.num_rows))
    return int(min(max(1, BATCH_BYTES // widest), BATCH_ROWS))


def _plain(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Without dictionaries, as categories of other programs have them: a shard holds one of each at most."""
    import pyarrow as pa

    columns = [c.dictionary_decode() if pa.types.is_dictionary(c.type) else c for c in batch.columns]
    return pa.RecordBatch.from_arrays(columns, names=batch.schema.names)


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def read_header(file: Path) -> tuple[list[str], int]:
    """Names of the columns and the number of rows of a Parquet file.

    Raises:
        DataError: If it cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not file.is_file():
        raise DataError(f"{file}: no such file")
    try:
        with pq.ParquetFile(file) as opened:
            return opened.schema_arrow.names, opened.metadata.num_rows
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: not a readable Parquet file ({_reason(error)}); download it again") from error


def choose_columns(file: Path, required: Sequence[str], optional: Sequence[str] = ()) -> tuple[str, ...]:
    """The required columns and those of the optional ones that the file has.

    Raises:
        DataError: If a required column is missing (with the nearest match), or one of them is there twice.
    """
    found = read_header(file)[0]
    expected = ", ".join([*required, *(f"{name} (optional)" for name in optional)])
    for column in (*required, *optional):
        if found.count(column) > 1:
            raise DataError(f"{file}: the column {column!r} is there {found.count(column)} times; keep one")
        if column in required and column not in found:
            near = difflib.get_close_matches(column, [name for name in found if name not in required], n=1)
            hint = f"; is it {near[0]!r}?" if near else "."
            raise DataError(f"{file}: no column {column!r}{hint} Expected {expected}; found {', '.join(found)}")
    return (*required, *(name for name in optional if name in found))


def cannot_write(folder: Path, error: OSError) -> DataError:
    return DataError(f"{folder}: the cache cannot be written ({_reason(error)}); give another folder as 'cache'")


def _file_state(file: Path) -> tuple[int, int]:
    try:
        status = os.stat(file)
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from error
    return status.st_size, status.st_mtime_ns


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())
