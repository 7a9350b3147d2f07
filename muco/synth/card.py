"""The data card, README.md of the output folder: what was made from what by what, and what was turned down and why."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from muco.base.files import whole_file
from muco.base.tables import markdown_table
from muco.base.text import escaped
from muco.synth.shards import METADATA, read_rejected, read_rows

SHEET = 60  # pictures on the contact sheet
FRONT = """---
configs:
- config_name: default
  data_files: M3T.parquet
tags: [multimodal-embedding, synthetic]
---"""  # as the hub reads it


@dataclass
class Words:
    """Counts of words: how many texts, their sum, the most."""

    texts: int = 0
    words: int = 0
    most: int = 0

    def add(self, text: str) -> None:
        count = len(text.split())
        self.texts, self.words, self.most = self.texts + 1, self.words + count, max(self.most, count)

    def __str__(self) -> str:
        return f"{self.words / self.texts:.1f} ({self.most})" if self.texts else "-"


@dataclass
class Summary:
    """What the shards hold.

    Args:
        questions, answers: Lengths by kind of turn.
        turns: Number of turns of a picture -> pictures.
        rejected: (what, reason) -> how many; see :func:`rejected_counts`.
    """

    pictures: int = 0
    questions: dict[str, Words] = field(default_factory=dict)
    answers: dict[str, Words] = field(default_factory=dict)
    turns: Counter[int] = field(default_factory=Counter)
    rejected: Counter[tuple[str, str]] = field(default_factory=Counter)

    @property
    def pairs(self) -> int:
        return sum(count * pictures for count, pictures in self.turns.items())

    def as_dict(self) -> dict[str, Any]:
        return {
            "pictures": self.pictures,
            "pairs": self.pairs,
            "kinds": {kind: words.texts for kind, words in self.questions.items()},
            "turns": {str(count): n for count, n in sorted(self.turns.items())},
            "rejected": [{"what": w, "reason": r, "count": n} for (w, r), n in self.rejected.most_common()],
        }


def summarise(shards: Sequence[Path]) -> Summary:
    """Goes through all shards once."""
    found = Summary()
    for row in read_rows(shards):
        found.pictures += 1
        found.turns[len(row["qry"])] += 1
        for kind, [question], answer in zip(row["kind"], row["qry"], row["pos_text"], strict=True):
            found.questions.setdefault(kind, Words()).add(question)
            found.answers.setdefault(kind, Words()).add(answer)
    found.rejected = rejected_counts(read_rejected(shards))
    return found


def rejected_counts(lines: Iterable[Mapping[str, Any]]) -> Counter[tuple[str, str]]:
    """(what, reason) of everything that was turned down.

    ``what`` is "picture"; "pair" for what is missing in the end; "answer" for every try, also if a later one was good.
    """
    counts: Counter[tuple[str, str]] = Counter()
    for line in lines:
        if line["what"] == "picture":
            counts["picture", line["reason"]] += 1
        elif line["what"] == "last answer":
            counts["pair", line["reason"]] += 1
        else:
            counts.update({("answer", reason): n for reason, n in line["counts"].items()})
    return counts


def write_card(output: Path, shards: Sequence[Path], looked: Mapping[str, int]) -> Summary:
    """Writes ``README.md``.

    Args:
        looked: Counts of the catalogue.
    """
    found = summarise(shards)
    with whole_file(output / "README.md") as unfinished:
        lines = _lines(output.name, found, looked, _facts(shards))
        unfinished.write_text(escaped("\n".join(lines)) + "\n", encoding="utf-8")
    return found


def write_sheet(output: Path) -> None:
    """Writes ``sheet.html``, some samples to look at."""
    from muco.data.show import show

    show(output / "train.jsonl", output / "sheet.html", limit=SHEET)


def _facts(shards: Sequence[Path]) -> list[dict[str, Any]]:
    """How the shards were made, each way once."""
    import pyarrow.parquet as pq

    told = (pq.read_schema(shard).metadata[METADATA] for shard in shards)
    return [json.loads(each) for each in dict.fromkeys(told)]


def _lines(name: str, found: Summary, looked: Mapping[str, int], facts: Sequence[Mapping[str, Any]]) -> Iterator[str]:
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
        ((kind, f"{words.texts:,}", words, found.answers[kind]) for kind, words in found.questions.items()),
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


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    return [*markdown_table(head, [[str(cell) for cell in row] for row in rows]), ""]
