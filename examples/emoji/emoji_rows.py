"""Emoji as multi-turn samples, split so that near copies are on one side.

    glyphs ─families─▶ near copies together ─split─▶ train, dev, test ─write_data─▶ images/*.png, *.jsonl

Near copies must not stand on both sides of the split, or memory would pass for understanding. :func:`families` says
which emoji are near copies of one another.
"""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from emoji_data import SELECTOR, Emoji, Pen, annotated, drawn, on_paper, read_emoji, read_keywords
from PIL import Image

from muco.data.jsonl import write_jsonl

PARTS = {"test": 0.15, "dev": 0.10}  # shares of all emoji; the rest is for training
LARGEST = 20  # emoji; a larger family is always for training, for it would be most of a held-out part
ALIKE = 6.0  # mean difference of two pictures, 0 to 255, under which they are near copies
PERSON, PEOPLE, SIGNS = 0x1F9D1, (0x1F468, 0x1F469, 0x1F385, 0x1F936), (0x200D, SELECTOR, 0x2640, 0x2642)
VARIANTS = frozenset(
    "man men woman women person people boy girl child baby old older mr mrs mx "
    "red orange yellow green blue purple brown black white grey gray pink light dark large medium small "
    "up down left right leftwards rightwards upwards downwards curving closed open raised lowered "
    "waxing waning new full first last quarter crescent gibbous europe africa americas asia australia "
    "one two three four five six seven eight nine ten eleven twelve 1st 2nd 3rd".split()
)
ONE_FAMILY = ("country-flag", "subdivision-flag", "keycap", "zodiac", "family")  # whole subgroups of near copies


# ---------------------------------------------------------------- near copies and the split


def base_name(one: Emoji) -> str:
    """The name without what near copies differ in: sex, age, colour, size, direction, number; or its subgroup's."""
    if one.subgroup in ONE_FAMILY:
        return one.subgroup
    words = re.findall(r"[\w’]+", one.name.lower())
    return " ".join(word for word in words if word not in VARIANTS) or "person"


def base_codes(one: Emoji) -> tuple[int, ...]:
    """The code points without joiners and signs of sex, man and woman as person: who runs is a running person."""
    return tuple(PERSON if code in PEOPLE else code for code in one.codes if code not in SIGNS)


def families(glyphs: Mapping[Emoji, Image.Image]) -> list[list[Emoji]]:
    """Emoji that are near copies of one another, each in one family, in their order.

    Two are near copies if base name or base codes are the same, or if their pictures differ by less than ALIKE;
    and so on from copy to copy.
    """
    emoji = list(glyphs)
    parent = list(range(len(emoji)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    first: dict[Any, int] = {}
    for i, one in enumerate(emoji):
        for key in (base_name(one), base_codes(one)):
            parent[root(i)] = root(first.setdefault(key, i))
    for i, j in alike(list(glyphs.values())):
        parent[root(i)] = root(j)
    found: dict[int, list[Emoji]] = defaultdict(list)
    for i, one in enumerate(emoji):
        found[root(i)].append(one)
    return list(found.values())


def alike(glyphs: Sequence[Image.Image]) -> Iterator[tuple[int, int]]:
    """Pairs (i, j) with j < i of glyphs that differ by less than ALIKE on 24 x 24 pixels, on average over pixels."""
    small = np.stack([np.asarray(on_paper(glyph, 24), dtype=np.float32) for glyph in glyphs])
    coarse = small.reshape(-1, 6, 4, 6, 4, 3).mean(axis=(2, 4))  # differs at most as much: sorts most pairs out quickly
    for i in range(len(small)):
        near = np.flatnonzero(np.abs(coarse[:i] - coarse[i]).mean(axis=(1, 2, 3)) < ALIKE)
        for j in near[np.abs(small[near] - small[i]).mean(axis=(1, 2, 3)) < ALIKE]:
            yield i, int(j)


def split(families: Sequence[Sequence[Emoji]], seed: int) -> dict[Emoji, str]:
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


# ---------------------------------------------------------------- rows


def turns(one: Emoji) -> list[dict[str, Any]]:
    """What is asked about an emoji; of a list of texts training draws one each time, and evaluation takes the first."""
    words = ", ".join(one.keywords)
    asked = [
        ("group", ["Which group does it belong to?", "Name the group.", "What sort of thing is it?"], one.group),
        (
            "subgroup",
            ["Which subgroup does it belong to?", "Name the subgroup.", "What is it, more closely?"],
            one.subgroup,
        ),
        (
            "keywords",
            ["Which words is it found by?", "List keywords.", "What could one search for?"],
            [words, *one.keywords],
        ),
        ("retrieval", ["What is it called?", "Name it.", "What does the picture show?"], [one.name, words]),
    ]
    return [{"query": query, "target": target, "kind": kind} for kind, query, target in asked]


def search_row(one: Emoji, image: str) -> dict[str, Any]:
    """Keywords alone as a query, the picture as its target: evaluation's task "text_to_image"."""
    turn = {"query": ", ".join(one.keywords), "target": {"image": image}, "kind": "meaning"}
    return {"turns": [turn], "id": f"{one.id}-meaning"}


def collect(limit: int | None = None) -> tuple[dict[Emoji, Image.Image], Counter[str]]:
    """All emoji that can be drawn, with their glyphs, and what was left out; with a limit every n-th of them."""
    emoji = read_emoji()
    step = 1 if limit is None else max(1, len(emoji) // limit)
    return drawn(annotated(emoji, read_keywords())[::step], Pen())


def write_data(folder: Path, *, seed: int, views: int, side: int, limit: int | None = None) -> dict[str, Any]:
    """Writes ``images/*.png``, ``train.jsonl``, ``dev.jsonl``, ``test.jsonl`` and ``index.jsonl``.

    Args:
        views: Pictures of a training emoji: one as it is, the others turned, shrunk and moved. Held-out emoji have one.
        side: Pixels.
        limit: About so many emoji; None for all.
    Returns:
        Counts: ``emoji``, ``sequences`` among them, ``families``, ``parts`` (emoji), ``left_out`` (reason -> emoji).
    """
    glyphs, left_out = collect(limit)
    groups = families(glyphs)
    part = split(groups, seed)
    family = {one: group[0].id for group in groups for one in group}
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for one, glyph in glyphs.items():
        here = part[one]
        for view in range(views if here == "train" else 1):
            image = f"images/{one.id}-{view}.png"
            dice = random.Random(f"{seed} {one.id} {view}") if view else None
            on_paper(glyph, side, dice).save(folder / image)
            rows[here].append({"image": image, "turns": turns(one), "id": f"{one.id}-{view}"})
        first = f"images/{one.id}-0.png"
        if here != "train":
            rows[here].append(search_row(one, first))
        facts = {
            "family": family[one],
            "name": one.name,
            "group": one.group,
            "subgroup": one.subgroup,
            "keywords": ", ".join(one.keywords),
        }
        rows["index"].append({"id": one.id, "image": first, "part": here, **facts})
    for name in ("train", "dev", "test", "index"):
        write_jsonl(folder / f"{name}.jsonl", rows[name])
    return {
        "emoji": len(glyphs),
        "families": len(groups),
        "parts": dict(Counter(part.values())),
        "left_out": dict(left_out),
        "sequences": sum(len(one.codes) > 1 + (SELECTOR in one.codes) for one in glyphs),
    }
