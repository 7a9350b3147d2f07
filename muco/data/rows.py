"""Rows of large Parquet files by their numbers, without ever holding the file.

A Parquet file can only be decoded from the beginning of a row group, and row groups of published data are near 2 GB. So
the columns that are needed are copied once into shards that can be mapped into memory; from then on a row costs the
pages it lies on.

::

    <folder of the file>/.muco-rows/<file name>-<key>/shard-00000.arrow …

The key identifies the file's size and modification time and the columns. A shard appears under its name when it is
whole, so copying resumes where it was stopped.

Memory of the copying: that of :func:`muco.data.parquet.batches`. Memory of the reading: pages of the shards that were
touched since they were last handed back, which happens after every ``READS`` rows.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from muco.base.files import locked, whole_file
from muco.base.terminal import progress_bar
from muco.data.fingerprint import file_digest
from muco.data.parquet import BATCH_ROWS, batches, one_line, read_header
from muco.data.places import check_unchanged, file_state, position
from muco.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

FORM = 1  # raise when the content of a shard changes
SHARD_ROWS = 65_536  # of a new cache
READS = 128  # a row may lie on ten places, of each of which the system maps 64 KiB or more


class Rows:
    """The rows of a Parquet file as dictionaries of plain values.

    Opening makes the shards, which takes as long as decoding the columns once and as much room on disk as they have
    uncompressed. Several processes may open the same file; one of them copies and the others wait. Shards of a file
    that has changed stay where they are, their folder may be deleted at any time.

    Args:
        file: The file; errors name it as it is given.
        columns: Those that are read; all must exist, see :func:`muco.data.parquet.read_header`.
        cache: The folder for the shards, where it is not ``.muco-rows`` beside the file.
    Raises:
        DataError: If the file cannot be read, has no rows, or the shards cannot be written.
    """

    def __init__(self, file: str | Path, columns: Sequence[str], *, cache: str | Path | None = None) -> None:
        self.file, self.columns, self.shard_rows = Path(file), tuple(columns), SHARD_ROWS
        self._place, self._state = self.file.absolute(), file_state(self.file)
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
        """Row ``index``, column -> plain value; an IndexError if there is none, a DataError if it cannot be read."""
        i = position(index, self._length, self.file)
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
        """SHA-256 (hex) of the bytes of the file, kept beside the shards; a DataError if it is gone or has changed."""
        kept = self.folder / "sha256"
        if kept.exists():
            return kept.read_text(encoding="ascii")
        digest = file_digest(self._place)
        check_unchanged(self.file, self._state, self._place)
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
        if number not in self._open_shards:
            self._open_shards[number] = _Shard(self._shard_file(number))
        return self._open_shards[number]

    def _shard_file(self, number: int) -> Path:
        return self.folder / f"shard-{number:05}.arrow"

    def _copy(self) -> None:
        """Makes the shards that are missing."""
        import pyarrow as pa

        if self._whole_shards() == self.shards:
            return
        try:
            with locked(self.folder, wait=math.inf), progress_bar(f"copying rows of {self.file.name}") as progress:
                for left in self.folder.glob(".shard-*.tmp"):  # of a process that was killed
                    left.unlink()
                start = self._whole_shards()  # another process may have made them meanwhile
                stream = batches(self.file, self.columns, start * self.shard_rows, most_rows=BATCH_ROWS)
                parts = _cut((_plain(batch) for _, batch in stream), start, self.shard_rows)
                for number, own in groupby(parts, key=itemgetter(0)):
                    file, mine = self._shard_file(number), (batch for _, batch in own)
                    first = next(mine)
                    with whole_file(file) as unfinished, pa.ipc.new_file(str(unfinished), first.schema) as writer:
                        for batch in chain([first], mine):
                            writer.write_batch(batch)
                    progress(min((number + 1) * self.shard_rows, self._length), self._length)
        except OSError as error:
            raise cannot_write(self.folder, error) from error
        check_unchanged(self.file, self._state, self._place)

    def _whole_shards(self) -> int:
        """How many shards there are before the first that is missing."""
        return next((n for n in range(self.shards) if not self._shard_file(n).exists()), self.shards)


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
            what = f"{file}: a part of the cache is gone or damaged ({one_line(error)})"
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


def _plain(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Without dictionaries, as categories of other programs have them: a shard holds one of each at most."""
    import pyarrow as pa

    columns = [c.dictionary_decode() if pa.types.is_dictionary(c.type) else c for c in batch.columns]
    return pa.RecordBatch.from_arrays(columns, names=batch.schema.names)


def cannot_write(folder: Path, error: OSError) -> DataError:
    return DataError(f"{folder}: cannot write the cache ({one_line(error)}); pass another folder as 'cache'")
