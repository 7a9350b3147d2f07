"""Photographs and drawings of Tux Paint's stamps, each with a sentence in up to 77 languages: for testing only.

    python examples/pictures/tuxpaint.py --output runs/pictures/tuxpaint --against runs/pictures/openclipart

Needs the Debian package tuxpaint-stamps-default; nothing is downloaded. The stamps are under the GPL, so that we never
train on them: there is no train.jsonl. ``test.jsonl`` has all, ``photographs.jsonl`` and ``drawings.jsonl`` the two
kinds, and ``languages/<language>.jsonl`` the sentences in other languages. Some drawings of Tux Paint are those of Open
Clip Art: ``--against`` leaves out what another collection has, for what was trained on cannot be tested.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from collection import SMALL, Entry, distinct, parser, picture_id, script, small, turn, write_summary
from packages import advice, ink, installed, read_bytes, usable_pictures
from PIL import Image

from muco.data.jsonl import write_jsonl
from muco.errors import DataError
from muco.images import open_image

FOLDER = Path("usr/share/tuxpaint/stamps")
PACKAGE = "tuxpaint-stamps-default"
NO_SORTS = ("cartoon", "toys", "plastic")  # folders that tell how a thing is shown, and not what it is
LEFT_OUT = "symbols"  # the folder of letters, digits, notes, coins and chess pieces: no names, or many near copies
FLAT = 0.3  # share of neighbours of exactly the same colour from which on a picture is a drawing
SAME = 0.96  # correlation of two shapes from which on they are one drawing; by eye all above are, nearly none below
SAME_ASPECT = 0.25  # difference of the logarithms of width over height, at most
MAX_PIXELS = 20_000_000  # the largest stamp has a tenth of it


@dataclass(frozen=True)
class Stamp:
    """One stamp: its picture, its sentence in English, and by language ("de", "pt_BR", "sr@latin")."""

    entry: Entry
    drawing: bool  # or a photograph
    sentence: str
    translations: dict[str, str]


def read_sentences(file: Path) -> tuple[str, dict[str, str]]:
    """English and translations of a stamp: the first line, and lines such as "de.utf8=Ein Hund."

    Raises:
        DataError: If the file is too large, not UTF-8, or its first line is no sentence.
    """
    try:
        lines = [line.strip() for line in read_bytes(file, PACKAGE).decode("utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8; {advice(PACKAGE)} again") from error
    if not lines or not re.search(r"\w", lines[0]) or ".utf8=" in lines[0]:
        raise DataError(f"{file}: the first line is no sentence")
    found = (re.fullmatch(r"([A-Za-z]{2,3}(?:[_@]\w+)*)\.utf8=\s*(.*\w.*)", line) for line in lines[1:])
    return lines[0], {match[1]: match[2] for match in found if match}


def is_drawing(file: Path) -> bool:
    """Whether a stamp is a drawing and not a photograph.

    It is if it lies in a folder "cartoon", if an SVG lies beside it, or if FLAT of its opaque neighbours, left and
    right, have the very same colour, since a camera's noise makes nearly all of them differ.
    """
    if file.parent.name == "cartoon" or file.with_suffix(".svg").is_file():
        return True
    with Image.open(file, formats=("PNG",)) as opened:
        pixels = np.asarray(opened.convert("RGBA"))
    solid = (pixels[:, 1:, 3] > 250) & (pixels[:, :-1, 3] > 250)
    same = (pixels[:, 1:, :3] == pixels[:, :-1, :3]).all(axis=2)
    return not solid.any() or float(same[solid].mean()) >= FLAT


# ---------------------------------------------------------------- samples


def collect(root: Path, output: Path) -> tuple[list[Stamp], Counter[str]]:
    """Writes ``images/*.png``; the stamps in the order of their paths, and how many were left out, by reason.

    Raises:
        DataError: If the package is missing, or no stamp can be used.
    """
    folder = installed(root / FOLDER, PACKAGE)
    (output / "images").mkdir(parents=True, exist_ok=True)
    left_out: Counter[str] = Counter()
    wanted: list[tuple[Path, str, dict[str, str]]] = []
    for file in sorted(folder.rglob("*.png")):
        place = file.relative_to(folder)
        if place.parts[0] == LEFT_OUT:
            left_out["letters, digits and signs"] += 1
            continue
        if not file.with_suffix(".txt").is_file():
            left_out["no sentence (another side of a stamp)"] += 1
            continue
        try:
            sentence, translations = read_sentences(file.with_suffix(".txt"))
        except DataError:
            left_out["sentence cannot be read"] += 1
            continue
        wanted.append((file, sentence, translations))
    found: dict[str, Stamp] = {}
    seen: set[str] = set()
    pictures = usable_pictures((file for file, *_ in wanted), left_out, max_pixels=MAX_PIXELS)
    for (file, sentence, translations), picture in zip(wanted, pictures, strict=True):
        if picture is None:
            continue
        if sentence.lower() in seen:
            left_out["sentence of another picture"] += 1
        else:
            seen.add(sentence.lower())
            drawing, place = is_drawing(file), file.relative_to(folder)
            entry = entry_of(picture_id(place, found), place, sentence, drawing, picture)
            picture.save(output / entry.image)
            found[entry.id] = Stamp(entry, drawing, sentence, translations)
    left_out["SVG without a PNG"] = sum(not file.with_suffix(".png").exists() for file in folder.rglob("*.svg"))
    if not found:
        raise DataError(f"{folder}: no stamp that can be used; {advice(PACKAGE)} again")
    return list(found.values()), +left_out


def entry_of(id: str, place: Path, sentence: str, drawing: bool, picture: Image.Image) -> Entry:
    sorts = [part for part in place.parent.parts if part not in NO_SORTS]
    turns = [turn("retrieval", ["What does the picture show?", "Describe it.", "What is it?"], sentence)]
    if sorts:
        questions = ["What sort of thing is it?", "Name the category.", "Where does it belong?"]
        turns.insert(0, turn("category", questions, distinct([", ".join(sorts), sorts[-1], sorts[0]])))
    medium = "drawing" if drawing else "photograph"
    facts = {"part": "test", "sentence": sentence, "folder": place.parent.as_posix(), "medium": medium}
    return Entry(id, small(picture), turns, (), facts)


def write_parts(folder: Path, stamps: Sequence[Stamp]) -> dict[str, Any]:
    """Writes all JSONL files.

    Returns:
        Counts of pictures: ``pictures``, ``photographs``, ``drawings``, ``languages`` (language -> pictures).
    """
    drawings = [stamp.entry for stamp in stamps if stamp.drawing]
    photographs = [stamp.entry for stamp in stamps if not stamp.drawing]
    for name, entries in {"drawings": drawings, "photographs": photographs}.items():
        write_jsonl(folder / f"{name}.jsonl", (entry.row() for entry in entries))
    write_jsonl(folder / "test.jsonl", (stamp.entry.row() for stamp in stamps))
    write_jsonl(folder / "index.jsonl", (stamp.entry.index_row() for stamp in stamps))

    languages: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for stamp in stamps:
        for language, sentence in stamp.translations.items():
            asked = turn("retrieval", ["What does the picture show?"], sentence)
            # The pictures lie beside the folder of languages.
            row = {"image": f"../{stamp.entry.image}", "turns": [asked], "id": stamp.entry.id}
            languages[language].append(row)
    (folder / "languages").mkdir(exist_ok=True)
    for language, rows in languages.items():
        write_jsonl(folder / "languages" / f"{language}.jsonl", rows)
    return {
        "pictures": len(stamps),
        "photographs": len(photographs),
        "drawings": len(drawings),
        "languages": {language: len(rows) for language, rows in sorted(languages.items())},
    }


# ---------------------------------------------------------------- what another collection has too


def shape(picture: Image.Image) -> np.ndarray:
    """float32 [1729] of an RGB picture: what is drawn, without pale shadows, as 24 x 24 pixels of mean 0 and length 1.

    The last number is the logarithm of width over height.
    """
    box = ink(picture, more_than=40) or (0, 0, *picture.size)
    pixels = np.asarray(picture.resize((SMALL, SMALL), Image.Resampling.BOX, box), dtype=np.float32).ravel()
    pixels = pixels - pixels.mean()
    return np.append(pixels / max(float(np.linalg.norm(pixels)), 1e-6), np.log((box[2] - box[0]) / (box[3] - box[1])))


def same_pictures(stamps: Sequence[Stamp], folder: Path, other: Path) -> dict[str, str]:
    """Stamps whose picture another collection has too: id -> the name of its picture.

    Stamps were taken from it, with other margins and shadows, so that shapes are compared: see SAME.

    Args:
        folder: Where ``images/`` of the stamps are.
        other: The same of the other collection.
    Raises:
        DataError: If the other collection has no pictures there.
    """
    files = sorted((other / "images").glob("*.png"))
    if not files:
        raise DataError(f"{other}: no images/*.png there; write that collection first")
    known = np.stack([shape(open_image(file, small_side=0)) for file in files])
    found = {}
    for stamp in stamps:
        own = shape(open_image(folder / stamp.entry.image, small_side=0))
        likeness = known[:, :-1] @ own[:-1]
        likeness[np.abs(known[:, -1] - own[-1]) > SAME_ASPECT] = -1
        best = int(likeness.argmax())
        if likeness[best] >= SAME:
            found[stamp.entry.id] = files[best].stem
    return found


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__, "tuxpaint")
    options.add_argument("--against", type=Path, help="what another script wrote: leaves out pictures that are in both")
    args = options.parse_args(argv)
    stamps, left_out = collect(args.root, args.output)
    same = same_pictures(stamps, args.output, args.against) if args.against else {}
    for stamp in stamps:
        if stamp.entry.id in same:
            (args.output / stamp.entry.image).unlink()
    left_out["in the other collection too"] = len(same)
    counts = write_parts(args.output, [stamp for stamp in stamps if stamp.entry.id not in same])
    write_summary(args.output, {"collection": "tuxpaint", **counts, "same": same}, +left_out)


if __name__ == "__main__":
    script(main)
