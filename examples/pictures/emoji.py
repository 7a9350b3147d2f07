"""Emoji of this machine as multi-turn samples: names from Unicode, keywords from CLDR, pictures from a colour font.

    python examples/pictures/emoji.py --output runs/pictures/emoji

Needs the Debian packages fonts-noto-color-emoji, unicode-data and unicode-cldr-core; nothing is downloaded.
"""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from collection import SMALL, families, few, parser, script, split, turn, write_summary
from emoji_data import (
    CANVAS,
    CLDR,
    FONT,
    NAMES,
    SELECTOR,
    Emoji,
    Pen,
    annotated,
    drawn,
    on_paper,
    read_emoji,
    read_keywords,
)
from packages import SIDE
from PIL import Image

from muco.data.jsonl import write_jsonl

PERSON, PEOPLE, SIGNS = 0x1F9D1, (0x1F468, 0x1F469, 0x1F385, 0x1F936), (0x200D, SELECTOR, 0x2640, 0x2642)
VARIANTS = frozenset(
    "man men woman women person people boy girl child baby old older mr mrs mx "
    "red orange yellow green blue purple brown black white grey gray pink light dark large medium small "
    "up down left right leftwards rightwards upwards downwards curving closed open raised lowered "
    "waxing waning new full first last quarter crescent gibbous europe africa americas asia australia "
    "one two three four five six seven eight nine ten eleven twelve 1st 2nd 3rd".split()
)
ONE_FAMILY = ("country-flag", "subdivision-flag", "keycap", "zodiac", "family")  # whole subgroups of near copies


# ---------------------------------------------------------------- near copies


def base_name(one: Emoji) -> str:
    """The name without what near copies differ in: sex, age, colour, size, direction, number; or its subgroup's."""
    if one.subgroup in ONE_FAMILY:
        return one.subgroup
    words = re.findall(r"[\w’]+", one.name.lower())
    return " ".join(word for word in words if word not in VARIANTS) or "person"


def base_codes(one: Emoji) -> tuple[int, ...]:
    """The code points without joiners and signs of sex, man and woman as person: who runs is a running person."""
    return tuple(PERSON if code in PEOPLE else code for code in one.codes if code not in SIGNS)


def near_copies(glyphs: Mapping[Emoji, Image.Image]) -> list[list[Emoji]]:
    """Families of emoji with the same base name or base codes, or with pictures that are alike."""
    pictures = np.stack([np.asarray(on_paper(glyph, SMALL), dtype=np.float32) for glyph in glyphs.values()])
    return families(list(glyphs), lambda one: (base_name(one), base_codes(one)), pictures)


# ---------------------------------------------------------------- rows


def turns(one: Emoji) -> list[dict[str, Any]]:
    """What is asked about an emoji; of a list of texts training draws one each time, and evaluation takes the first."""
    words = ", ".join(one.keywords)
    return [
        turn("group", ["Which group does it belong to?", "Name the group.", "What sort of thing is it?"], one.group),
        turn(
            "subgroup",
            ["Which subgroup does it belong to?", "Name the subgroup.", "What is it, more closely?"],
            one.subgroup,
        ),
        turn(
            "keywords",
            ["Which words is it found by?", "List keywords.", "What could one search for?"],
            [words, *one.keywords],
        ),
        turn("retrieval", ["What is it called?", "Name it.", "What does the picture show?"], [one.name, words]),
    ]


def search_row(one: Emoji, image: str) -> dict[str, Any]:
    """Keywords alone as a query, the picture as its target: evaluation's task "text_to_image"."""
    turn = {"query": ", ".join(one.keywords), "target": {"image": image}, "kind": "meaning"}
    return {"turns": [turn], "id": f"{one.id}-meaning"}


def collect(limit: int | None = None, root: Path = Path("/")) -> tuple[dict[Emoji, Image.Image], Counter[str]]:
    """All emoji that can be drawn, with their glyphs, and what was left out; with a limit every n-th of them."""
    font, names, *cldr = (root / file.relative_to("/") for file in (FONT, NAMES, *CLDR))
    emoji = read_emoji(names)
    step = 1 if limit is None else max(1, len(emoji) // limit)
    return drawn(annotated(emoji, read_keywords(cldr))[::step], Pen(font))


def write_data(
    folder: Path, *, seed: int, views: int, side: int, limit: int | None = None, root: Path = Path("/")
) -> dict[str, Any]:
    """Writes ``images/*.png``, ``train.jsonl``, ``dev.jsonl``, ``test.jsonl`` and ``index.jsonl``.

    Args:
        views: Pictures of a training emoji: one as it is, the others turned, shrunk and moved. Held-out emoji have one.
        side: Pixels.
        limit: About so many emoji; None for all.
        root: Where the packages are installed or unpacked.
    Returns:
        Counts: ``emoji``, ``sequences`` among them, ``families``, ``parts`` (emoji), ``left_out`` (reason -> emoji).
    """
    glyphs, left_out = collect(limit, root)
    groups = near_copies(glyphs)
    part, chosen = split(groups, seed), few(groups, seed)
    family = {one: group[0].id for group in groups for one in group}
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for one, glyph in glyphs.items():
        here = part[one]
        for view in range(views if here == "train" and one in chosen else 1):
            image = f"images/{one.id}-{view}.png"
            dice = random.Random(f"{seed} {one.id} {view}") if view else None
            on_paper(glyph, side, dice).save(folder / image)
            if one in chosen:
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
        "parts": dict(Counter(part[one] for one in chosen)),
        "left_out": dict(left_out),
        "sequences": sum(len(one.codes) > 1 + (SELECTOR in one.codes) for one in glyphs),
    }


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__, "emoji")
    options.add_argument("--seed", type=int, default=0, help="of the split (default: %(default)s)")
    options.add_argument("--views", type=int, default=1, help="pictures of a training emoji (default: %(default)s)")
    options.add_argument("--side", type=int, default=CANVAS, help=f"pixels, at most {SIDE} (default: %(default)s)")
    args = options.parse_args(argv)
    if args.views < 1:
        options.error(f"--views must be at least 1, not {args.views}")
    if not SMALL <= args.side <= SIDE:
        options.error(f"--side must be {SMALL} to {SIDE}, not {args.side}")
    counts = write_data(args.output, seed=args.seed, views=args.views, side=args.side, root=args.root)
    left_out = Counter(counts.pop("left_out"))
    counts = {"collection": "emoji", "seed": args.seed, "pictures": counts.pop("emoji"), **counts}
    write_summary(args.output, counts, left_out)


if __name__ == "__main__":
    script(main)
