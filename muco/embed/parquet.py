"""Embeds images of a folder, or rows of JSONL or Parquet, into one Parquet file; streams, and resumes after a kill.

::

    source.rows(start) ─threads: open images─▶ rows in order ─batches─▶ model.encode ─▶ <output>.parts/rows-….parquet
                                                                                           └─ merged ─▶ <output>

A part is written whole and records how many input rows it covers and which of them failed, so that the parts alone
say where the next run resumes. At most one part's vectors and a bounded number of images are in memory. The images
that a JSONL or Parquet file names are not part of its fingerprint: after changing one, start again with
``resume=False``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from muco.base.files import claimed, read_json, whole_file, write_json, writing
from muco.base.machine import VERSION
from muco.base.terminal import rows_bar
from muco.data.folders import told_passed_over
from muco.data.items import Columns, Row, open_items
from muco.embed.vectors import Encode, encode_rows, in_batches, opened_rows
from muco.errors import DataError, OutputError
from muco.sizes import checked_dimension

if TYPE_CHECKING:
    from muco.model import Model
    from muco.precision import Precision

RESTART = "start again with --no-resume (resume=False)"


def embed(
    input: str | Path,
    model: Model | str | Path,
    output: str | Path,
    *,
    batch_size: int = 32,
    dimension: int | None = None,
    resume: bool = True,
    text_column: str = "text",
    image_column: str = "image",
    id_column: str = "id",
    shard_rows: int = 2048,
    precision: Precision | None = None,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Writes one vector per input row to ``output``, in input order; rows that cannot be embedded are listed instead.

    Args:
        input: A folder of images (recursive, sorted by relative path, which is the id; without hidden files and linked
            folders), a JSONL file with ``text``, ``image`` (path relative to the file, or a list of paths; also
            ``images``) and ``id`` per line, or a Parquet file with such columns (an image may also be bytes, or a
            struct of ``bytes`` and ``path``). Other keys and columns are ignored. A row without an id gets its number,
            from 0.
        model: A model, or what :func:`muco.load` takes.
        output: A ``.parquet`` file with ``id``, ``embedding`` (fixed_size_list<float32>[d]), ``text`` and ``image``
            (path as in the input, relative to the metadata's ``muco.image_root``; several images as their list in
            JSON), null where the row has none. Failed rows are in ``<stem>.errors.jsonl`` beside it.
        batch_size: Rows per call of the model; changes the vectors by rounding alone.
        dimension: Cut vectors to their first N dimensions and normalise them again; for models trained with
            ``loss.dimensions``. None: whole vectors.
        resume: Resume an interrupted run. If false, the output of an earlier run is replaced.
        shard_rows: Rows per part, the most work that a kill can lose. May differ from run to run.
        precision: As for :func:`muco.load`, which gets it with a path.
        progress: True draws a bar on stderr, False keeps stderr empty; None draws it where stderr is a terminal.
    Returns:
        ``rows``, ``embedded``, ``failed`` of the whole output, ``passed_over`` (other files of a folder: their number
        by kind, as {".heic": 2}), ``resumed`` (rows found done), ``seconds`` and ``rows_per_second`` of this run,
        ``output``, ``errors`` (the list of failed rows, or None) and ``model``.
    Raises:
        DataError: If the input cannot be read, or no row of it can be embedded.
        MucoError: If the model's vectors are shorter than ``dimension``.
        OutputError: If ``output`` or its parts are of another model, dimension, input or columns.
    """
    if batch_size < 1 or shard_rows < 1:
        raise ValueError(f"batch_size and shard_rows must be at least 1, not {batch_size} and {shard_rows}")
    source = open_items(Path(input), Columns(text_column, image_column, id_column))
    parts = Parts(Path(output), Path(input))
    with claimed(parts.output, beside=True):
        from muco.model import loaded

        model = loaded(model, precision=precision)
        dimension = checked_dimension(dimension, model.get_embedding_dimension())
        run = {
            "model": model.fingerprint,
            "dimension": str(dimension),
            "input": source.fingerprint,
            "columns": "" if source.columns is None else "/".join(source.columns),
        }
        console = Console(stderr=True, quiet=progress is False)
        say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
        started = time.perf_counter()
        if source.passed_over:
            say(told_passed_over(source.root, source.passed_over))
        if finished := resume and parts.finished(run):
            say(f"{output} is complete ({parts.failed} rows failed); to replace it, {RESTART}")
        else:
            parts.begin(run, resume)
        if (resumed := parts.rows) and not finished:
            say(f"{output}: resuming after {resumed} rows")
        if not finished:
            encode = partial(model.encode, show_progress_bar=False, truncate_dim=dimension)
            opened = opened_rows(source.rows(resumed), 2 * batch_size, model.opened)
            with rows_bar(console, shown=console.is_terminal if progress is None else progress) as bar, closing(opened):
                task = bar.add_task("embed", total=source.total, completed=resumed)
                while part := _encode_part(encode, islice(opened, shard_rows), batch_size, partial(bar.advance, task)):
                    parts.add(part, dimension)
            parts.merge(run, dimension, source.root)
    seconds = time.perf_counter() - started
    return {
        "rows": parts.rows,
        "embedded": parts.rows - parts.failed,
        "failed": parts.failed,
        "passed_over": dict(source.passed_over.most_common()),
        "resumed": resumed,
        "seconds": round(seconds, 3),
        "rows_per_second": round((parts.rows - resumed) / seconds, 3),
        "output": str(parts.output),
        "errors": str(parts.errors) if parts.failed else None,
        "model": run["model"],
    }


def _encode_part(encode: Encode, rows: Iterable[Row], batch_size: int, advance: Callable[[int], None]) -> list[Row]:
    """Each row with its vector or its error, without its image."""
    part: list[Row] = []
    for batch in in_batches(rows, batch_size):
        part += encode_rows(encode, batch)
        advance(len(batch))
    return part


# ── the parts on disk ────────────────────────────────────────────────────────────────────────────────────────────────


class Parts:
    """The folder ``<output>.parts``: ``run.json`` (what makes the vectors) and one Parquet file per finished part.

    A folder without ``run.json`` is ignored: the file is written first and removed first. ``rows`` and ``failed`` count
    the finished rows. Raises an OutputError if the output is not a ``.parquet`` file, or would replace the input.
    """

    def __init__(self, output: Path, input: Path) -> None:
        self.output = output
        self.errors = output.with_name(output.stem + ".errors.jsonl")
        self.folder = output.with_name(output.name + ".parts")
        self.manifest = self.folder / "run.json"
        self.rows = self.failed = 0
        if output.suffix != ".parquet" or output.is_dir():
            raise OutputError(f"{output}: the output is one file; choose a name that ends in .parquet")
        if input.resolve() in (output.resolve(), self.errors.resolve()):
            raise OutputError(f"{output}: writing it would replace the input {input}; choose another name")

    def finished(self, run: dict[str, str]) -> bool:
        """Whether the output is complete and of this run; unfinished parts are there to replace it."""
        if self.manifest.exists() or not self.output.exists():
            return False
        found = _metadata(self.output)
        if found is None or "muco.model" not in found:
            raise OutputError(f"{self.output} exists and is not of `muco embed`; choose another output, or {RESTART}")
        self._compare(self.output, {key: found[f"muco.{key}"] for key in run}, run)
        self.rows, self.failed = int(found["muco.rows"]), int(found["muco.failed"])
        return True

    def begin(self, run: dict[str, str], resume: bool) -> None:
        """Makes the folder, or counts the finished rows in it."""
        if resume and self.manifest.exists():
            self._compare(self.folder, read_json(self.manifest), run)
            for path in self._paths():
                self._count(path)
            return
        self.clear()
        write_json(self.manifest, run)

    def add(self, part: list[Row], dimension: int) -> None:
        """Writes the next part; its metadata holds its place, its number of input rows and its failed rows."""
        good = [row for row in part if row.error is None]
        bad = [row for row in part if row.error is not None]
        failed = [{"row": row.number, "id": row.id, "where": row.where, "reason": row.error} for row in bad]
        columns = {
            "id": [row.id for row in good],
            "embedding": [row.vector for row in good],
            "text": [row.text for row in good],
            "image": [row.image_path for row in good],
        }
        facts = {"start": self.rows, "rows": len(part), "errors": json.dumps(failed)}
        path = self.folder / f"rows-{self.rows:012}.parquet"
        with writing(path, again=True), whole_file(path) as unfinished:
            pq.write_table(pa.table(columns, schema=_schema(dimension, facts)), unfinished)
        self._count(path)

    def merge(self, run: dict[str, str], dimension: int, image_root: Path) -> None:
        """Joins the parts into the output, writes the list of failed rows beside it, and removes the folder.

        Raises a DataError if all rows failed; the list of them is written nevertheless.
        """
        self.rows = self.failed = 0
        with writing(self.errors, again=True):
            with whole_file(self.errors) as unfinished, unfinished.open("w", encoding="utf-8") as file:
                for path in self._paths():
                    file.writelines(json.dumps(error) + "\n" for error in self._count(path))
            if not self.failed:
                self.errors.unlink()
        if self.failed == self.rows:
            self.clear()  # so that the next run tries again
            with self.errors.open(encoding="utf-8") as file:
                first = json.loads(next(file))
            reason = f"{first['where']}: {first['reason']}"
            raise DataError(f"none of the {self.rows} rows can be embedded; the first: {reason}; all: {self.errors}")
        facts = {**run, "version": VERSION, "rows": self.rows, "failed": self.failed}
        facts["image_root"] = image_root.resolve()
        schema = _schema(dimension, {f"muco.{name}": fact for name, fact in facts.items()})
        with (
            writing(self.output, again=True),
            whole_file(self.output) as unfinished,
            pq.ParquetWriter(unfinished, schema) as writer,
        ):
            for path in self._paths():
                with pq.ParquetFile(path) as part:
                    for batch in part.iter_batches():
                        writer.write_batch(batch)
        self.clear()

    def clear(self) -> None:
        """Removes the folder with the files that this class wrote, and no others."""
        if not self.folder.exists():
            return
        self.manifest.unlink(missing_ok=True)
        for path in [*self._paths(), *self.folder.glob("*.tmp")]:
            path.unlink()
        try:
            self.folder.rmdir()
        except OSError as error:
            raise OutputError(f"{self.folder} holds other files; move them, or choose another output") from error

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("rows-*.parquet"))

    def _count(self, path: Path) -> list[dict[str, Any]]:
        """Adds a part to the counts; returns its failed rows."""
        found = _metadata(path)
        if found is None or int(found["start"]) != self.rows:
            raise OutputError(f"{self.folder}: the part from row {self.rows} on is missing or broken; {RESTART}")
        errors = json.loads(found["errors"])
        self.rows += int(found["rows"])
        self.failed += len(errors)
        return errors

    def _compare(self, place: Path, found: dict[str, str], run: dict[str, str]) -> None:
        shown = {key: (found[key], run[key]) if key == "columns" else (found[key][:12], run[key][:12]) for key in run}
        differ = [f"{key} ({then} then, {now} now)" for key, (then, now) in shown.items() if found[key] != run[key]]
        if differ:
            what = f"{place} is of a run that differs in {', '.join(differ)}"
            raise OutputError(f"{what}; go back to it, choose another output, or {RESTART}")


def _schema(dimension: int, facts: dict[str, Any]) -> pa.Schema:
    text, vector = pa.string(), pa.list_(pa.float32(), dimension)
    metadata = {key: str(value).encode(errors="replace") for key, value in facts.items()}
    return pa.schema({"id": text, "embedding": vector, "text": text, "image": text}, metadata=metadata)


def _metadata(path: Path) -> dict[str, str] | None:
    """The facts that ``_schema`` put into a Parquet file; None if it is not one, or broken."""
    try:
        found = pq.read_metadata(path).metadata or {}
    except (pa.ArrowInvalid, OSError):
        return None
    return {key.decode(errors="replace"): value.decode(errors="replace") for key, value in found.items()}
