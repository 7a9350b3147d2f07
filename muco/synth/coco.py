"""Turns from an annotated data set in COCO's format, by the rules in coco_rules.py; no model is asked.

::

    {"images": [{"id": 7, "file_name": "7.jpg", "width": 640, "height": 480}, …],
     "categories": [{"id": 1, "name": "dog", "supercategory": "animal"}, …],
     "annotations": [{"id": 3, "image_id": 7, "category_id": 1, "bbox": [x, y, w, h], "iscrowd": 0}, …]}

Files of captions have ``image_id`` and ``caption`` in their annotations. LVIS is read too: ``coco_url`` instead of a
file name, ``neg_category_ids`` (known to be absent) and ``not_exhaustive_category_ids`` (may lack boxes).
"""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from muco.base.text import SPECIAL_TOKEN
from muco.data.json_places import Scanner, checked_object, value_at
from muco.data.jsonl import sample_to_row, write_jsonl
from muco.data.lines import JsonObject, image_of, text_of
from muco.data.places import file_state, open_unchanged
from muco.dialogue import Sample
from muco.errors import DataError
from muco.synth.coco_rules import Picture, Thing, turns_of

MAX_BYTES = 2 << 30  # of a JSON file; boxes take about 200 bytes of memory each, masks none
MAX_SIDE = 1_000_000  # px
NAMED = 10  # missing images named in the log
COUNTED = (
    *("samples", "turns", "classification", "global", "local", "retrieval"),
    *("too_few_turns", "missing_images", "empty_boxes", "blank_captions"),
)

log = logging.getLogger(__name__)


@dataclass
class Annotated:
    """The content of annotation files: pictures in the order of ids, and categories with their supercategory or ""."""

    pictures: list[Picture]
    kinds: dict[str, str]
    empty_boxes: int = 0
    blank_captions: int = 0


def convert_coco(
    annotations: str | Path,
    images: str | Path,
    output: str | Path,
    *,
    captions: str | Path | None = None,
    min_area: float = 0.01,
    min_turns: int = 2,
    seed: int = 0,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Writes one JSON line per image, in the order of image ids; the same content gives the same bytes.

    Args:
        annotations, captions: Files in COCO's format.
        images: The folder that every ``file_name`` is relative to.
        output: Our JSONL file, written whole; an existing one is replaced.
        min_area: Least share of the picture for a box to be asked about.
        min_turns: Images with fewer turns are left out.
        limit: Maximum samples.
        progress: Called with (images done, images in all).
    Returns:
        Counts: ``samples``, ``turns``, turns of each kind, ``too_few_turns``, ``missing_images``, ``empty_boxes`` and
        ``blank_captions``, all left out; and ``output``.
    Raises:
        DataError: If a file is invalid (file, id and field are named), a number is out of range, all images are
            missing, or no image has enough turns. Then nothing is written.
    """
    if not 0 <= min_area <= 1:
        raise DataError(f"coco: min_area is {min_area}; pass a share from 0 to 1")
    for name, value in (("min_turns", min_turns), ("limit", 1 if limit is None else limit)):
        if value < 1:
            raise DataError(f"coco: {name} is {value}; pass 1 or more")
    if not Path(images).is_dir():
        raise DataError(f"{images}: no such folder; it must hold the images of {annotations}")
    found = read_coco(annotations, images, captions)
    counts: Counter[str] = Counter()
    missing: list[str] = []

    def rows() -> Iterator[dict[str, Any]]:
        for done, picture in enumerate(found.pictures, start=1):
            if counts["samples"] == limit:
                break
            if progress:
                progress(done, len(found.pictures))
            if not os.path.isfile(picture.file):  # also where the name is too long for a file
                missing.append(picture.file)
                continue
            turns = turns_of(picture, found.kinds, min_area=min_area, seed=seed)
            if len(turns) < min_turns:
                counts["too_few_turns"] += 1
                continue
            counts.update(["samples", *(str(turn.kind) for turn in turns)], turns=len(turns))
            sample = Sample(Path(picture.file).absolute(), turns, id=str(picture.id))
            yield sample_to_row(sample, Path(output).absolute().parent)
        if missing and not counts["samples"] and not counts["too_few_turns"]:
            where = f"none of its {len(missing):,} images is in {images} (the first is {missing[0]})"
            raise DataError(f"{annotations}: {where}; pass the folder that file names are relative to")
        if not counts["samples"]:
            raise DataError(f"{annotations}: no image has {min_turns} turns; lower min_turns or min_area")

    write_jsonl(output, rows())
    if missing:
        named = [*missing[:NAMED], *(["…"] if len(missing) > NAMED else [])]
        log.warning("%d images are missing and left out: %s", len(missing), ", ".join(named))
    counts.update(missing_images=len(missing), empty_boxes=found.empty_boxes, blank_captions=found.blank_captions)
    return {name: counts[name] for name in COUNTED} | {"output": str(output)}


def read_coco(annotations: str | Path, images: str | Path, captions: str | Path | None = None) -> Annotated:
    """Reads files in COCO's format, a piece at a time; masks and other keys are skipped.

    Boxes that leave the image by up to 1 px are cut. Empty boxes and blank captions are left out and counted.

    Raises:
        DataError: If a file cannot be read, is larger than 2 GiB or not JSON, a key is missing or of the wrong type, an
            id is unknown or there twice, a box leaves the image by more than 1 px, a file name leaves the folder, or a
            text has a model's token. Messages name the file, the id and the field.
    """
    path = Path(annotations)
    with _opened(path, ("categories", "images", "annotations")) as entries:
        names, kinds = _categories(entries("categories"))
        pictures = _pictures(entries("images"), Path(images), names)
        taken: set[int] = set()
        empty = sum(_add_box(pictures, names, taken, *entry) for entry in entries("annotations"))
    found = Annotated([pictures[key] for key in sorted(pictures)], kinds, empty)
    if captions is not None:
        with _opened(Path(captions), ("annotations",)) as entries:
            for entry, where in entries("annotations"):
                picture, order = _known(entry, "image_id", pictures, where), entry.get("id", 0)
                if text := _words(entry, "caption", where, name=False):
                    picture.captions.append((order if isinstance(order, int) else 0, text))
                else:
                    found.blank_captions += 1
    return found


Entries = Iterator[tuple[JsonObject, str]]  # objects of a list, and their names in errors


@contextmanager
def _opened(path: Path, needed: tuple[str, ...]) -> Iterator[Callable[[str], Entries]]:
    """Yields a function from the name of a list to its entries, with one at a time in memory."""
    state = file_state(path)
    if state[0] > MAX_BYTES:
        raise DataError(f"{path}: {state[0]:,} bytes; at most {MAX_BYTES:,} are read, split the file by images")
    with open_unchanged(path, state) as file:
        scanner = Scanner(file, path)
        if scanner.peek() != "{":
            raise DataError(f"{path}: the file must hold one JSON object with the lists {', '.join(needed)}")
        places: dict[str, Any] = {}
        for key in scanner.members():
            if key not in needed:
                scanner.value()
            elif scanner.peek() != "[" or key in places:
                raise DataError(f"{path}: {key!r} must be one list; fix the file")
            else:
                places[key] = scanner.elements()
        scanner.end()
        if lacking := [key for key in needed if key not in places]:
            form = f"COCO's form has {', '.join(needed)} (captions in a file of their own)"
            raise DataError(f"{path}: no list {lacking[0]!r}; {form}")

        def entries(key: str) -> Entries:
            one = {"categories": "category", "images": "image", "annotations": "annotation"}[key]
            for number, place in enumerate(places[key]):
                where = f"{path} {key}[{number}]"
                entry = checked_object(value_at(file, place, where), f"the {one}", where)
                yield entry, f"{path} {one} {entry['id']}" if isinstance(entry.get("id"), int) else where

        yield entries


def _categories(entries: Entries) -> tuple[dict[int, str], dict[str, str]]:
    """Names by category id, and the supercategory by name. Categories of the same name are one."""
    given: dict[int, tuple[str, str]] = {}
    for entry, where in entries:
        key = _new_id(entry, given, where)
        kind = _words(entry, "supercategory", where) if entry.get("supercategory") is not None else ""
        name = _words(entry, "name", where)
        if not name:
            raise DataError(f"{where}: 'name' is blank; name the category")
        given[key] = name, kind
    short = {name: re.sub(r"\s*\([^()]*\)$", "", name) or name for name in {name for name, _ in given.values()}}
    often = Counter(short.values())  # "bow (weapon)" keeps its note where there is another bow
    names = {key: short[name] if often[short[name]] == 1 else name for key, (name, _) in given.items()}
    return names, {names[key]: given[key][1] for key in sorted(given, reverse=True)}  # the lowest id wins


def _pictures(entries: Entries, folder: Path, names: Mapping[int, str]) -> dict[int, Picture]:
    pictures: dict[int, Picture] = {}
    for entry, where in entries:
        key = _new_id(entry, pictures, where)
        if "file_name" not in entry and (url := text_of(entry, "coco_url", where)):
            entry["file_name"] = "/".join(url.split("/")[-2:])  # as LVIS names its images, by folder and file
        file = image_of(entry, "file_name", folder, where)
        if file is None:
            raise DataError(f"{where}: no 'file_name'; name the file within {folder}")
        width, height = (_number(entry.get(side), side, where) for side in ("width", "height"))
        if width <= 0 or height <= 0:
            size = f"'width' and 'height' are {width:g} and {height:g}"
            raise DataError(f"{where}: {size}; they must be the image's size in px")
        unsure = _names(entry, "not_exhaustive_category_ids", names, where) or frozenset()
        absent = _names(entry, "neg_category_ids", names, where)
        pictures[key] = Picture(key, file, width, height, unsure=unsure, absent=absent)
    return pictures


def _add_box(
    pictures: Mapping[int, Picture], names: Mapping[int, str], taken: set[int], entry: JsonObject, where: str
) -> bool:
    """Adds a box to its picture, unless it is empty; returns whether it is."""
    taken.add(_new_id(entry, taken, where))
    picture = _known(entry, "image_id", pictures, where)
    name = _known(entry, "category_id", names, where)
    crowd = entry.get("iscrowd", 0)
    if crowd not in (0, 1):
        raise DataError(f"{where}: 'iscrowd' is {crowd!r:.60}; it must be 0 or 1")
    box = entry.get("bbox")
    if not isinstance(box, list) or len(box) != 4:
        raise DataError(f"{where}: 'bbox' must be [x, y, width, height], not {box!r:.60}")
    x, y, w, h = (_number(value, "bbox", where) for value in box)
    if w < 0 or h < 0 or min(x, y) < -1 or x + w > picture.width + 1 or y + h > picture.height + 1:
        image = f"its image of {picture.width:g} x {picture.height:g} px (image {picture.id})"
        raise DataError(f"{where}: 'bbox' is {box}, which is not within {image}; fix the annotation")
    left, top, right, bottom = max(x, 0), max(y, 0), min(x + w, picture.width), min(y + h, picture.height)
    empty = right <= left or bottom <= top
    if not empty:
        picture.things.append(Thing(name, left, top, right, bottom, bool(crowd)))
    return empty


def _new_id(entry: JsonObject, taken: Container[int], where: str) -> int:
    key = _id(entry.get("id"), "id", where)
    if key in taken:
        raise DataError(f"{where}: the id {key} is there twice; ids must be unique")
    return key


def _known(entry: JsonObject, key: str, known: Mapping[int, Any], where: str) -> Any:
    value = _id(entry.get(key), key, where)
    if value not in known:
        what = {"image_id": "images", "category_id": "categories"}[key]
        raise DataError(f"{where}: {key!r} is {value}, which is not among the {len(known):,} {what}; fix the file")
    return known[value]


def _names(entry: JsonObject, key: str, names: Mapping[int, str], where: str) -> frozenset[str] | None:
    ids = entry.get(key)
    if ids is None:
        return None
    if not isinstance(ids, list) or not all(isinstance(value, int) and value in names for value in ids):
        raise DataError(f"{where}: {key!r} must be a list of category ids, not {ids!r:.60}")
    return frozenset(names[value] for value in ids)


def _id(value: Any, key: str, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise DataError(f"{where}: {key!r} must be a whole number, not {value!r:.60}")
    return value


def _number(value: Any, key: str, where: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not -MAX_SIDE <= value <= MAX_SIDE:
        raise DataError(f"{where}: {key!r} holds {value!r:.60}, where a number of px must be")
    return value


def _words(entry: JsonObject, key: str, where: str, *, name: bool = True) -> str:
    """A text with single blanks; names in lower case and without underscores."""
    text = text_of(entry, key, where)
    if text is None:
        raise DataError(f"{where}: no {key!r}; it must be a text")
    if found := SPECIAL_TOKEN.search(text):
        raise DataError(f"{where}: {key!r} holds {found[0]}, a token of models; take it out")
    return " ".join((text.replace("_", " ").lower() if name else text).split())
