"""The output on disk: one Parquet file per shard, which appears whole, and the two files that training reads.

::

    <output>/shards/00000.parquet            the columns of M3T, and kind, picture (SHA-256) and name; the schema's
                                             metadata tell how its rows were made
    <output>/shards/00000.rejected.jsonl     every unused picture and pair, with the reason
    <output>/M3T.parquet, train.jsonl        all shards in one, in M3T's format and ours
    <output>/README.md, sheet.html           the data card, with models, settings and rejections; some samples

Everything but the shards is made again from them, whole, and may be deleted at any time.
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
REJECTED = ".rejected.jsonl"  # of the file beside a shard
FRONT = """---
configs:
- config_name: default
  data_files: M3T.parquet
tags: [multimodal-embedding, synthetic]
---"""  # as the hub reads it


def schema(facts: Mapping[str, Any]) -> pa.Schema:
    """The columns of a shard; ``facts`` tell how its rows were made."""
    text = pa.string()
    texts = pa.list_(text)
    columns = {
        "qry": pa.list_(texts),  # the wordings of each turn
        "qry_image_path": text,
        "qry_sentence": texts,  # the caption, for each turn
        "pos_text": texts,
        "pos_image_path": text,
        "pos_sentence": texts,
        "neg_text": texts,
        "kind": texts,
        "picture": text,
        "name": text,
    }
    told = json.dumps(facts, ensure_ascii=False, sort_keys=True).encode()
    return pa.schema(list(columns.items()), metadata={METADATA: told})


def shard_file(folder: Path, number: int) -> Path:
    return folder / f"{number:05}.parquet"


def shard_files(folder: Path) -> list[Path]:
    """The finished shards in order."""
    return sorted(file for file in folder.glob("*.parquet") if file.stem.isdigit())


def write_shard(folder: Path, number: int, made: Sequence[Made], facts: Mapping[str, Any]) -> None:
    """Writes the results of a shard's pictures; its Parquet file comes last, so that it marks a finished shard."""
    path = shard_file(folder, number)
    with whole_file(path.with_suffix(REJECTED)) as unfinished, unfinished.open("w", encoding="utf-8") as file:
        file.writelines(escaped(json.dumps(line, ensure_ascii=False)) + "\n" for one in made for line in _rejected(one))
    rows = [_row(one) for one in made if not one.reason]
    with whole_file(path) as unfinished:
        pq.write_table(pa.Table.from_pylist(rows, schema=schema(facts)), unfinished, compression="zstd")


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
    """A line for the picture if it is rejected, one for each unused pair, one with the counts of all bad answers."""
    about = {"picture": made.picture.digest, "name": made.picture.name}
    if made.reason:
        yield about | {"what": "picture", "kind": "", "reason": made.reason, "text": ""}
    for rejected in made.rejected:
        yield about | {"what": "last answer", **asdict(rejected)}
    if made.reasons:
        yield about | {"what": "all answers", "counts": dict(sorted(made.reasons.items()))}


@dataclass
class Summary:
    """The content of the shards.

    ``rejected`` counts (what, reason): "picture", "pair" (missing at the end) or "answer" (every bad attempt).
    """

    pictures: int = 0
    questions: dict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))  # by kind and words
    answers: dict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    turns: Counter[int] = field(default_factory=Counter)  # turns of a picture -> pictures
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
    columns, found = schema(facts), Summary()
    try:
        folder = Path(os.path.relpath(root, output)).as_posix()
    except ValueError:  # another drive of Windows
        folder = root.absolute().as_posix()
    made_by: dict[bytes, None] = {}  # facts of the shards, each once
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
            with shard.with_suffix(REJECTED).open(encoding="utf-8") as rejected:
                for line in rejected:
                    found.add_rejected(json.loads(line))
    with whole_file(output / "README.md") as unfinished:
        card = _card(output.name, found, looked, map(json.loads, made_by))
        unfinished.write_text(escaped("\n\n".join(card)) + "\n", encoding="utf-8")
    return found


def _sample(row: Mapping[str, Any], folder: str) -> dict[str, Any]:
    turns = []
    for [query], target, kind, negative in zip(row["qry"], row["pos_text"], row["kind"], row["neg_text"], strict=True):
        turn = {"query": query, "target": target, "kind": kind}
        turns.append(turn | {"negatives": [negative]} if negative else turn)
    path = row["qry_image_path"]
    return {"image": path if folder == "." else f"{folder}/{path}", "turns": turns, "id": row["picture"][:20]}


def _card(name: str, found: Summary, looked: Mapping[str, int], facts: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    yield f"{FRONT}\n# {name}"
    yield (
        f"{found.pictures:,} pictures with {found.pairs:,} pairs of a question and an answer, written by models that "
        "saw the picture or a description of it. Nobody has checked them all: some are wrong. `sheet.html` shows a few."
    )
    yield "`M3T.parquet` is in the format of M3T, `train.jsonl` in MuCo's; both have the same content, from `shards/`."
    yield from map(_made_by, facts)
    yield _table(
        ("kind", "pairs", "words of the question: mean (most)", "words of the answer"),
        ((k, f"{words.total():,}", _mean(words), _mean(found.answers[k])) for k, words in found.questions.items()),
    )
    yield _table(("turns of a picture", "pictures"), ((n, f"{p:,}") for n, p in sorted(found.turns.items())))
    yield "## Pictures"
    yield _table(("", "pictures"), ((what, f"{n:,}") for what, n in looked.items() if what != "pictures"))
    yield "## Turned down"
    yield "A *pair* is missing at the end; an *answer* is any bad attempt, even if a later one was good."
    counts = ((w, r, f"{n:,}") for (w, r), n in found.rejected.most_common())
    yield f"{_table(('what', 'reason', 'count'), counts)}\n" if found.rejected else "Nothing."


def _made_by(facts: Mapping[str, Any]) -> str:
    usual = "the server's"
    models = [(role, facts[role]["model"], _listed(facts[role]["sampling"])) for role in ("captioner", "writer")]
    told = "\n".join(f"- {role}: {model}, sampling: {values or usual}" for role, model, values in models)
    return f"""{told}
- prompts: {facts["prompt"]}
- filter: {_listed(facts["filter"])}
- settings: {_listed(facts["setting"])}
- source: {facts["source"]}; muco {facts["muco"]}"""


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _mean(words: Counter[int]) -> str:
    return f"{sum(length * texts for length, texts in words.items()) / words.total():.1f} ({max(words)})"


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    return "\n".join(markdown_table(head, [[str(cell) for cell in row] for row in rows]))
