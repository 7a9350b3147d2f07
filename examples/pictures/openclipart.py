"""Drawings of the Open Clip Art Library, all in the public domain, as multi-turn samples.

    python examples/pictures/openclipart.py --output runs/pictures/openclipart

Needs the Debian packages openclipart-png and openclipart-svg; nothing is downloaded. The pictures are the PNG files;
title, keywords and description are in the SVG of the same name, and the folder is the category.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from collection import Entry, distinct, parser, picture_id, script, small, turn, write_split, write_summary
from openclipart_titles import (
    PACKAGE,
    Metadata,
    base_title,
    clean_description,
    clean_keywords,
    read_metadata,
    title_of,
)
from packages import advice, installed, usable_pictures
from PIL import Image

from muco.errors import DataError

FOLDER = Path("usr/share/openclipart")
PICTURES = "openclipart-png"

# A model would learn nothing from these: folder, with those under it -> why it is left out.
LEFT_OUT = {
    "shapes/stars": "stars by number of points",
    "computer/icons": "theme icons",
    "computer/buttons": "buttons",
    "buttons": "buttons",
    "special/gradients": "gradients",
    "special/patterns": "patterns",
    "special": "templates",
    "recreation/games/cards/bordered": "playing cards",
    "recreation/games/cards/ornamental": "playing cards",
    "recreation/games/cards/simple": "playing cards",
    "recreation/games/cards/white": "playing cards",
}
THEMES = re.compile(r"theme|iconset", re.IGNORECASE)  # in a title or keyword
# Folders of near copies: nobody can name a flag that he never saw, and a map's symbol says little by its shape.
ONE_FAMILY = ("signs_and_symbols/flags", "signs_and_symbols/led", "recreation/games/cards", "shapes")


def candidates(root: Path, left_out: Counter[str]) -> Iterator[tuple[Path, Metadata]]:
    """Path under png/ and metadata of every drawing that may be used, in the order of paths; counts the others.

    Raises:
        DataError: If a package is missing.
    """
    png, svg = installed(root / FOLDER / "png", PICTURES), installed(root / FOLDER / "svg", PACKAGE)
    for file in sorted(png.rglob("*.png")):
        place = file.relative_to(png)
        drawing = svg / place.with_suffix(".svg")
        if file.is_symlink():
            left_out["a link to another picture"] += 1
        elif reason := left_out_folder(place.parent.as_posix()):
            left_out[reason] += 1
        elif not drawing.is_file():
            left_out["no SVG of the same name"] += 1
        else:
            try:
                yield place, read_metadata(drawing)
            except DataError:
                left_out["SVG cannot be read"] += 1


def left_out_folder(folder: str) -> str | None:
    return next((why for start, why in LEFT_OUT.items() if f"{folder}/".startswith(f"{start}/")), None)


def collect(root: Path, output: Path) -> tuple[list[Entry], list[Entry], Counter[str]]:
    """Writes ``images/*.png``.

    Returns:
        An entry per title, further entries with the same titles, and how many pictures were left out, by reason.

    Raises:
        DataError: If a package is missing, or no picture can be used.
    """
    left_out: Counter[str] = Counter()
    found = list(candidates(root, left_out))
    uses = Counter(meta.title.lower() for _, meta in found)
    (output / "images").mkdir(parents=True, exist_ok=True)
    entries: dict[str, Entry] = {}
    first: dict[str, str] = {}  # title -> id
    named = [(place, meta, title_of(meta, place.stem, uses[meta.title.lower()])) for place, meta in found]
    reasons = [unusable(meta, title) for _, meta, title in named]
    left_out.update(filter(None, reasons))
    wanted = [one for one, reason in zip(named, reasons, strict=True) if not reason]
    pictures = usable_pictures((root / FOLDER / "png" / place for place, *_ in wanted), left_out)
    for (place, meta, title), picture in zip(wanted, pictures, strict=True):
        if picture is None:
            continue
        entry = entry_of(picture_id(place, entries), place, meta, title, picture)
        picture.save(output / entry.image)
        entries[entry.id] = entry
        first.setdefault(title.lower(), entry.id)
    if not entries:
        raise DataError(f"{root / FOLDER}: no picture that can be used; {advice(PICTURES)} again")
    one_each = [entries.pop(id) for id in first.values()]
    return one_each, list(entries.values()), left_out


def unusable(meta: Metadata, title: str) -> str | None:
    """Why a drawing is left out, by what its metadata say."""
    if not meta.free:
        return "not said to be in the public domain"
    if THEMES.search(" ".join((meta.title, *meta.keywords))) and "icon" in " ".join(meta.keywords):
        return "theme icons"
    return None if title else "no title of its own"


def entry_of(id: str, place: Path, meta: Metadata, title: str, picture: Image.Image) -> Entry:
    folder = place.parent.as_posix()
    keywords, description = clean_keywords(meta, title), clean_description(meta, title)
    facts = {
        "title": title,
        "keywords": ", ".join(keywords),
        "description": description,
        "folder": folder,
        "creator": meta.creator,
    }
    turns = turns_of(title, keywords, description, folder)
    return Entry(id, small(picture), turns, keys_of(title, place, meta.creator), facts)


def turns_of(title: str, keywords: Sequence[str], description: str, folder: str) -> list[dict[str, Any]]:
    """What is asked about a drawing, as far as it is known; the title is the first answer to what it is called."""
    listed = ", ".join(keywords)
    sorts = [part.replace("_", " ") for part in folder.split("/") if part not in ("", ".", "unsorted")]
    turns = []
    if sorts:
        questions = ["What sort of thing is it?", "Name the category.", "Where does it belong?"]
        turns.append(turn("category", questions, distinct([", ".join(sorts), sorts[-1], sorts[0]])))
    if keywords:
        questions = ["Which words is it found by?", "List keywords.", "What could one search for?"]
        turns.append(turn("keywords", questions, distinct([listed, *keywords])))
    called = distinct([title, listed and f"{title}, {listed}", description])
    turns.append(turn("retrieval", ["What is it called?", "Name it.", "What does the picture show?"], called))
    return turns


def keys_of(title: str, place: Path, creator: str) -> tuple[tuple[str, ...], ...]:
    """What near copies have in common: base title; an author's series of files; some folders as a whole."""
    series = re.sub(r"[\W\d_]+", " ", place.stem.lower()).strip()
    folders = (start for start in ONE_FAMILY if f"{place.parent.as_posix()}/".startswith(f"{start}/"))
    return ("title", base_title(title)), ("series", creator.lower(), series), *(("folder", start) for start in folders)


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__, "openclipart")
    options.add_argument("--seed", type=int, default=0, help="of the split (default: %(default)s)")
    args = options.parse_args(argv)
    entries, more, left_out = collect(args.root, args.output)
    counts = write_split(args.output, entries, seed=args.seed, more=more)
    left_out["title of another picture, and like a held-out one"] = len(entries) + len(more) - counts["pictures"]
    write_summary(args.output, {"collection": "openclipart", "seed": args.seed, **counts}, +left_out)


if __name__ == "__main__":
    script(main)
