"""What was made, on disk: one Parquet file per shard, whole or not there; and the two files that training reads.

::

    <output>/shards/00000.parquet            the columns of M3T, and of ours: kind, picture (SHA-256), name; metadata of
                                             the schema say how its rows were made
    <output>/shards/00000.rejected.jsonl     every picture and pair that is not used, with the reason
    <output>/M3T.parquet, train.jsonl        all shards in one, in M3T's form and in our own
    <output>/README.md, sheet.html           the data card: what was made from what by what, and what was turned down
                                             and why; and some samples to look at

All but the shards is written anew, whole, from the shards; it may be deleted at any time.
"""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from muco.base.files import whole_file
from muco.base.tables import markdown_table
from muco.base.text import escaped
from muco.errors import DataError
from muco.synth.writing import Made

METADATA = b"muco.synth"  # key in the schema's metadata; its value is JSON
SHEET = 60  # pictures on the contact sheet
FRONT = """---
configs:
- config_name: default
  data_files: M3T.parquet
tags: [multimodal-embedding, synthetic]
---"""  # as the hub reads it


def schema(facts: Mapping[str, Any]) -> pa.Schema:
    """The columns of a shard; ``facts`` say how its rows were made."""
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


def write_shard(folder: Path, number: int, made: Sequence[Made], facts: Mapping[str, Any]) -> None:
    """Writes what became of the pictures of a shard; its Parquet file comes last and says that all is there."""
    path = shard_file(folder, number)
    with whole_file(_rejected_file(path)) as unfinished, unfinished.open("w", encoding="utf-8") as file:
        file.writelines(escaped(json.dumps(line, ensure_ascii=False)) + "\n" for one in made for line in _rejected(one))
    rows = [_row(one) for one in made if not one.reason]
    with whole_file(path) as unfinished:
        pq.write_table(pa.Table.from_pylist(rows, schema=schema(facts)), unfinished, compression="zstd")


def _rejected_file(shard: Path) -> Path:
    return shard.with_suffix(".rejected.jsonl")


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
        yield about | {"what": "last answer", **asdict(rejected)}
    if made.reasons:
        yield about | {"what": "all answers", "counts": dict(sorted(made.reasons.items()))}


@dataclass
class Summary:
    """What the shards hold.

    ``rejected`` counts (what, reason). ``what`` is "picture"; "pair" for what is missing in the end; "answer" for every
    try, also if a later one was good.
    """

    pictures: int = 0
    questions: dict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))  # by kind and words
    answers: dict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    turns: Counter[int] = field(default_factory=Counter)  # number of turns of a picture -> pictures
    rejected: Counter[tuple[str, str]] = field(default_factory=Counter)

    @property
    def pairs(self) -> int:
        return sum(count * pictures for count, pictures in self.turns.items())

    def add_row(self, row: Mapping[str, Any]) -> None:
        self.pictures += 1
        self.turns[len(row["qry"])] += 1
        for kind, [question], answer in zip(row["kind"], row["qry"], row["pos_text"], strict=True):
            self.questions[kind][len(question.split())] += 1
            self.answers[kind][len(answer.split())] += 1

    def add_rejected(self, line: Mapping[str, Any]) -> None:
        if line["what"] == "all answers":
            self.rejected.update({("answer", reason): n for reason, n in line["counts"].items()})
        else:
            self.rejected["picture" if line["what"] == "picture" else "pair", line["reason"]] += 1


def write_whole(
    output: Path, root: Path, shards: Sequence[Path], facts: Mapping[str, Any], looked: Mapping[str, int]
) -> Summary:
    """Writes ``M3T.parquet``, ``train.jsonl`` and ``README.md`` of all shards.

    Args:
        root: The folder that paths of pictures are relative to.
        looked: Counts of the catalogue.
    Raises:
        DataError: If a shard cannot be read.
    """
    columns, found, folder = schema(facts), Summary(), _relative(root, output)
    made_by: dict[bytes, None] = {}  # how the shards were made, each way once
    with (
        whole_file(output / "M3T.parquet") as table,
        whole_file(output / "train.jsonl") as lines,
        pq.ParquetWriter(table, columns, compression="zstd") as writer,
        lines.open("w", encoding="utf-8") as file,
    ):
        for shard in shards:
            try:
                read = pq.read_table(shard, partitioning=None)
            except (pa.ArrowException, OSError) as error:
                message = f"{shard}: cannot be read ({error}); delete it, and the next run makes it again"
                raise DataError(message) from error
            made_by[read.schema.metadata[METADATA]] = None
            for row in (rows := read.to_pylist()):
                found.add_row(row)
                file.write(json.dumps(_sample(row, folder), ensure_ascii=False) + "\n")
            writer.write_table(pa.Table.from_pylist(rows, schema=columns))
            with _rejected_file(shard).open(encoding="utf-8") as rejected:
                for line in rejected:
                    found.add_rejected(json.loads(line))
    with whole_file(output / "README.md") as unfinished:
        card = _card(output.name, found, looked, map(json.loads, made_by))
        unfinished.write_text(escaped("\n".join(card)) + "\n", encoding="utf-8")
    return found


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


def write_sheet(output: Path) -> None:
    """Writes ``sheet.html``, some samples to look at."""
    from muco.data.show import show

    show(output / "train.jsonl", output / "sheet.html", limit=SHEET)


def _card(name: str, found: Summary, looked: Mapping[str, int], facts: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    yield FRONT
    yield f"# {name}"
    yield ""
    yield (
        f"{found.pictures:,} pictures with {found.pairs:,} pairs of a question and an answer, written by models that "
        "saw the picture or a description of it. Nobody has read them all: they hold mistakes. `sheet.html` shows some."
    )
    yield ""
    yield "`M3T.parquet` is in the layout of M3T, `train.jsonl` in MuCo's own; both hold the same, from `shards/`."
    yield ""
    for each in facts:
        yield from _made_by(each)
    yield from _table(
        ("kind", "pairs", "words of the question: mean (most)", "words of the answer"),
        ((k, f"{words.total():,}", _mean(words), _mean(found.answers[k])) for k, words in found.questions.items()),
    )
    yield from _table(("turns of a picture", "pictures"), ((n, f"{p:,}") for n, p in sorted(found.turns.items())))
    yield "## Pictures"
    yield ""
    yield from _table(("", "pictures"), ((what, f"{n:,}") for what, n in looked.items() if what != "pictures"))
    yield "## Turned down"
    yield ""
    yield "A *pair* is missing in the end; an *answer* is every try, also where a later one was good."
    yield ""
    counts = ((w, r, f"{n:,}") for (w, r), n in found.rejected.most_common())
    yield from _table(("what", "reason", "count"), counts) if found.rejected else ["Nothing."]


def _made_by(facts: Mapping[str, Any]) -> Iterator[str]:
    for role in ("captioner", "writer"):
        sampling = ", ".join(f"{key} {value}" for key, value in facts[role]["sampling"].items()) or "the server's"
        yield f"- {role}: {facts[role]['model']}, sampling: {sampling}"
    yield f"- prompts: {facts['prompt']}"
    yield f"- filter: {', '.join(f'{key} {value}' for key, value in facts['filter'].items())}"
    yield f"- settings: {', '.join(f'{key} {value}' for key, value in facts['setting'].items())}"
    yield f"- source: {facts['source']}; muco {facts['muco']}"
    yield ""


def _mean(words: Counter[int]) -> str:
    return f"{sum(length * texts for length, texts in words.items()) / words.total():.1f} ({max(words)})"


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    return [*markdown_table(head, [[str(cell) for cell in row] for row in rows]), ""]
