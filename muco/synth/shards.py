"""What was made, on disk: one Parquet file per shard, whole or not there; and the two files that training reads.

::

    <output>/shards/00000.parquet            the columns of M3T, and of ours: kind, picture (SHA-256), name; metadata of
                                             the schema say how its rows were made
    <output>/shards/00000.rejected.jsonl     every picture and pair that is not used, with the reason
    <output>/M3T.parquet, train.jsonl        all shards in one, in M3T's form and in our own

``M3T.parquet`` and ``train.jsonl`` are written anew, whole, from the shards; they may be deleted at any time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from muco.base.files import whole_file
from muco.base.text import escaped
from muco.errors import DataError
from muco.synth.writing import Made

if TYPE_CHECKING:
    import pyarrow as pa

METADATA = b"muco.synth"  # key in the schema's metadata; its value is JSON
READ_ROWS = 1024


def schema(facts: Mapping[str, Any]) -> pa.Schema:
    """The columns of a shard; ``facts`` say how its rows were made."""
    import pyarrow as pa

    texts = pa.list_(pa.string())
    columns = {
        "qry": pa.list_(texts),  # of each turn its wordings
        "qry_image_path": pa.string(),
        "qry_sentence": texts,  # the caption, for each turn
        "pos_text": texts,
        "pos_image_path": pa.string(),
        "pos_sentence": texts,
        "neg_text": texts,
        "kind": texts,
        "picture": pa.string(),
        "name": pa.string(),
    }
    told = json.dumps(facts, ensure_ascii=False, sort_keys=True).encode()
    return pa.schema([pa.field(name, kind) for name, kind in columns.items()], metadata={METADATA: told})


def shard_file(folder: Path, number: int) -> Path:
    return folder / f"{number:05}.parquet"


def shard_files(folder: Path) -> list[Path]:
    """The finished shards in order."""
    return sorted(file for file in folder.glob("*.parquet") if file.stem.isdigit())


def rejected_file(shard: Path) -> Path:
    return shard.with_suffix(".rejected.jsonl")


def write_shard(folder: Path, number: int, made: Sequence[Made], facts: Mapping[str, Any]) -> Path:
    """Writes what became of the pictures of a shard; its Parquet file comes last and says that all is there."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = shard_file(folder, number)
    with whole_file(rejected_file(path)) as unfinished, unfinished.open("w", encoding="utf-8") as file:
        file.writelines(escaped(json.dumps(line, ensure_ascii=False)) + "\n" for one in made for line in _rejected(one))
    rows = [_row(one) for one in made if not one.reason]
    with whole_file(path) as unfinished:
        pq.write_table(pa.Table.from_pylist(rows, schema=schema(facts)), unfinished, compression="zstd")
    return path


def _row(made: Made) -> dict[str, Any]:
    return {
        "qry": [[pair.query] for _, pair in made.turns],
        "qry_image_path": made.picture.file,
        "qry_sentence": [made.caption] * len(made.turns),
        "pos_text": [pair.answer for _, pair in made.turns],
        "pos_image_path": "",
        "pos_sentence": [""] * len(made.turns),
        "neg_text": [pair.negative for _, pair in made.turns],
        "kind": [kind for kind, _ in made.turns],
        "picture": made.picture.digest,
        "name": made.picture.name,
    }


def _rejected(made: Made) -> Iterator[dict[str, Any]]:
    """A line for each pair that is not used, one for the picture if it is not, one for answers that came good later."""
    about = {"picture": made.picture.digest, "name": made.picture.name}
    if made.reason:
        yield about | {"what": "picture", "kind": "", "reason": made.reason, "text": ""}
    for rejected in made.rejected:
        yield about | {"what": "last answer", **rejected.as_dict()}
    if made.reasons:
        yield about | {"what": "all answers", "counts": dict(sorted(made.reasons.items()))}


def read_rows(shards: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """The rows of shards one after the other; some hundreds of them are in memory.

    Raises:
        DataError: If a shard cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    for shard in shards:
        try:
            with pq.ParquetFile(shard) as file:
                for batch in file.iter_batches(READ_ROWS):
                    yield from batch.to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{shard}: cannot be read ({error}); delete it, and the next run makes it again") from error


def read_rejected(shards: Sequence[Path]) -> Iterator[dict[str, Any]]:
    for shard in shards:
        with rejected_file(shard).open(encoding="utf-8") as file:
            yield from map(json.loads, file)


def write_whole(output: Path, root: Path, shards: Sequence[Path], facts: Mapping[str, Any]) -> int:
    """Writes ``M3T.parquet`` and ``train.jsonl`` of all rows; returns how many there are.

    Args:
        root: The folder that paths of pictures are relative to.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns, count = schema(facts), 0
    with (
        whole_file(output / "M3T.parquet") as table,
        whole_file(output / "train.jsonl") as lines,
        pq.ParquetWriter(table, columns, compression="zstd") as writer,
        lines.open("w", encoding="utf-8") as file,
    ):
        folder = _relative(root, output)
        for shard in shards:
            rows = list(read_rows([shard]))
            writer.write_table(pa.Table.from_pylist(rows, schema=columns))
            file.writelines(json.dumps(_sample(row, folder), ensure_ascii=False) + "\n" for row in rows)
            count += len(rows)
    return count


def _relative(root: Path, output: Path) -> str:
    try:
        return Path(os.path.relpath(root, output)).as_posix()
    except ValueError:  # another drive of Windows
        return root.absolute().as_posix()


def _sample(row: Mapping[str, Any], folder: str) -> dict[str, Any]:
    turns = []
    for [query], target, kind, negative in zip(row["qry"], row["pos_text"], row["kind"], row["neg_text"], strict=True):
        turn = {"query": query, "target": target, "kind": kind}
        turns.append(turn | {"negatives": [negative]} if negative else turn)
    path = row["qry_image_path"]
    return {"image": path if folder == "." else f"{folder}/{path}", "turns": turns, "id": row["picture"][:20]}
