"""What all collections of pictures share: near copies, the split, and what is written.

    Entry ─families─▶ near copies together ─split─▶ train, dev, test ─write_split─▶ *.jsonl, summary.json

Near copies must not stand on both sides of the split, or memory would pass for understanding.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Container, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from packages import ink
from PIL import Image

import muco
from muco.base.files import write_json
from muco.base.machine import keep_freed_memory
from muco.data.jsonl import write_jsonl

PARTS = {"test": 0.15, "dev": 0.10}  # shares of all pictures; the rest is for training
# Pictures. A larger family is always for training, for it would be most of a held-out part; and no more of a family are
# trained on, or every fifth picture would be a flag.
LARGEST = 20
ALIKE = 6.0  # mean difference of two pictures, 0 to 255, under which they are near copies
SMALL = 24  # pixels of a side on which two pictures are compared

Item = TypeVar("Item", bound=Hashable)


# ---------------------------------------------------------------- near copies and the split


def small(picture: Image.Image) -> np.ndarray:
    """float32 [24, 24, 3] of an RGB picture: what is not white at its edges, stretched to a square."""
    box = ink(picture) or (0, 0, *picture.size)
    return np.asarray(picture.resize((SMALL, SMALL), Image.Resampling.BOX, box), dtype=np.float32)


def alike(pictures: np.ndarray) -> Iterator[tuple[int, int]]:
    """Pairs (i, j) with j < i of pictures [N, 24, 24, 3] that differ by less than ALIKE, on average over pixels."""
    coarse = pictures.reshape(-1, 6, 4, 6, 4, 3).mean(axis=(2, 4))  # differs at most as much: sorts most out quickly
    for i in range(len(pictures)):
        near = np.flatnonzero(np.abs(coarse[:i] - coarse[i]).mean(axis=(1, 2, 3)) < ALIKE)
        for j in near[np.abs(pictures[near] - pictures[i]).mean(axis=(1, 2, 3)) < ALIKE]:
            yield i, int(j)


def families(
    items: Sequence[Item], keys: Callable[[Item], Iterable[Hashable]], pictures: np.ndarray
) -> list[list[Item]]:
    """Items that are near copies of one another, each in one family, in their order.

    Two are near copies if they have a key in common, or if their pictures [N, 24, 24, 3] differ by less than ALIKE;
    and so on from copy to copy.
    """
    parent = list(range(len(items)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    first: dict[Hashable, int] = {}
    for i, one in enumerate(items):
        for key in keys(one):
            parent[root(i)] = root(first.setdefault(key, i))
    for i, j in alike(pictures):
        parent[root(i)] = root(j)
    found: dict[int, list[Item]] = defaultdict(list)
    for i, one in enumerate(items):
        found[root(i)].append(one)
    return list(found.values())


def split(families: Sequence[Sequence[Item]], seed: int) -> dict[Item, str]:
    """Puts whole families into "train", "dev" or "test" by a seeded shuffle; larger ones than LARGEST into "train"."""
    part = {one: "train" for family in families for one in family}
    order = [family for family in families if len(family) <= LARGEST]
    random.Random(seed).shuffle(order)
    for name, share in PARTS.items():
        room = round(share * len(part))
        while order and room > 0:
            family = order.pop()
            part |= dict.fromkeys(family, name)
            room -= len(family)
    return part


def few(families: Sequence[Sequence[Item]], seed: int) -> set[Item]:
    """At most LARGEST of each family, drawn by the seed."""
    draw = random.Random(seed)
    return {one for family in families for one in draw.sample(family, min(LARGEST, len(family)))}


# ---------------------------------------------------------------- what is written


@dataclass(frozen=True)
class Entry:
    """One picture of a collection, written already as ``images/<id>.png``.

    Attributes:
        small: float32 [24, 24, 3] as :func:`small` makes it; what pictures are compared by.
        turns: As in a line of JSONL.
        keys: Pictures that have one in common are near copies.
        facts: Its columns in ``index.jsonl``.
    """

    id: str
    small: np.ndarray
    turns: list[dict[str, Any]]
    keys: tuple[Hashable, ...]
    facts: Mapping[str, Any]

    @property
    def image(self) -> str:
        return f"images/{self.id}.png"

    def row(self) -> dict[str, Any]:
        return {"image": self.image, "turns": self.turns, "id": self.id}

    def index_row(self, **facts: Any) -> dict[str, Any]:
        """For ``muco index``: the picture and its columns."""
        return {"id": self.id, "image": self.image, **facts, **self.facts}


def turn(kind: str, query: Sequence[str], target: str | Sequence[str]) -> dict[str, Any]:
    """Of a list of texts training draws one each time, and evaluation takes the first."""
    return {"query": list(query), "target": target, "kind": kind}


def distinct(texts: Iterable[str]) -> list[str]:
    """The texts in their order, each once, without empty ones."""
    return list(dict.fromkeys(filter(None, texts)))


def picture_id(place: Path, taken: Container[str]) -> str:
    """A name for the picture of a path, of a-z, 0-9 and "-" only; numbered where it is taken."""
    name = "-".join(re.findall(r"[a-z0-9]+", place.with_suffix("").as_posix().lower())) or "picture"
    number, free = 1, name
    while free in taken:
        number += 1
        free = f"{name}-{number}"
    return free


def write_split(folder: Path, entries: Sequence[Entry], *, seed: int, more: Sequence[Entry] = ()) -> dict[str, Any]:
    """Writes ``train.jsonl``, ``dev.jsonl``, ``test.jsonl`` and ``index.jsonl``.

    Args:
        more: Pictures for training alone. Those with a near copy in another part are deleted.
    Returns:
        Counts: ``pictures``, ``families``, ``largest`` (pictures of the largest families), ``parts`` (part ->
        pictures), ``turns`` (kind -> pictures).
    """
    known = {entry.id: entry for entry in (*entries, *more)}
    groups = _near(entries)
    part = split(groups, seed)
    family = {id: group[0] for group in groups for id in group}
    for group in _near(known.values()) if more else ():
        first = next((id for id in group if id in family), group[0])
        if all(part.get(id, "train") == "train" for id in group):
            part |= dict.fromkeys(group, "train")
            family |= {id: family.get(first, first) for id in group if id not in family}
    members: dict[str, list[str]] = defaultdict(list)
    for id in known:
        if id in part:
            members[family[id]].append(id)
        else:
            (folder / known[id].image).unlink()
    chosen = few(list(members.values()), seed)
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "dev": [], "test": [], "index": []}
    for id in (id for id in known if id in part):
        if id in chosen:
            rows[part[id]].append(known[id].row())
        rows["index"].append(known[id].index_row(part=part[id], family=family[id]))
    for name, written in rows.items():
        write_jsonl(folder / f"{name}.jsonl", written)
    return {
        "pictures": len(part),
        "families": len(members),
        "largest": sorted(map(len, members.values()), reverse=True)[:5],
        "parts": {name: len(rows[name]) for name in ("train", "dev", "test")},
        "turns": dict(Counter(turn["kind"] for id in part for turn in known[id].turns)),
    }


def _near(entries: Collection[Entry]) -> list[list[str]]:
    """Ids of near copies."""
    known = {entry.id: entry for entry in entries}
    return families(list(known), lambda id: known[id].keys, np.stack([entry.small for entry in entries]))


def write_summary(folder: Path, counts: Mapping[str, Any], left_out: Counter[str]) -> None:
    """Writes ``summary.json`` and says in one sentence what is there."""
    write_json(folder / "summary.json", {**counts, "left_out": dict(left_out.most_common())})
    print(f"{counts['pictures']} pictures in {folder}, {left_out.total()} left out; summary.json counts why")


# ---------------------------------------------------------------- the script


def parser(description: str, collection: str) -> argparse.ArgumentParser:
    """With the options that all collections have."""
    found = argparse.ArgumentParser(description=description.partition("\n")[0])
    folder = Path("runs/pictures", collection)
    found.add_argument("--output", type=Path, default=folder, help="a folder (default: %(default)s)")
    found.add_argument(
        "--root", type=Path, default=Path("/"), help="where the packages are unpacked (default: %(default)s)"
    )
    return found


def script(main: Callable[[], None]) -> None:
    """Runs a script; an error that a user can fix is one sentence and exit code 1."""
    keep_freed_memory()
    try:
        main()
    except (muco.MucoError, OSError) as error:
        sys.exit(f"error: {error}")
