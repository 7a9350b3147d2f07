"""Dialogues about an image, as LLaVA and VisDial publish them: every question with its answer becomes a turn.

::

    LLaVA     [{"id": "7", "image": "a/7.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                                                                 {"from": "gpt", "value": "A ring."}]}, …]
              or the same objects one a line (.jsonl)
    VisDial   {"data": {"questions": ["is it old", …], "answers": ["yes", …],
                        "dialogs": [{"image_id": 7, "caption": "a ring", "dialog": [{"question": 0, "answer": 0}]}]}}

Such files are single JSON values of hundreds of megabytes. They are read once, a piece at a time, to note where every
entry stands: opening takes a few megabytes of memory plus 16 bytes per entry, question and answer, never the file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from muco.data.fingerprint import Fingerprinted
from muco.data.json_places import ArrayPlaces, Scanner, checked_object, value_at
from muco.data.lines import JsonObject, image_folder, image_of, parsed, text_of
from muco.data.places import LinePlaces, file_state, open_unchanged, position
from muco.dialogue import Sample, Turn
from muco.errors import DataError

KIND = "dialogue"  # of every turn
PATTERNS = (  # of the images of VisDial 1.0, whose training images are COCO's
    "VisualDialog_{split}/VisualDialog_{split}_{image_id:012d}.jpg",
    "train2014/COCO_train2014_{image_id:012d}.jpg",
    "val2014/COCO_val2014_{image_id:012d}.jpg",
)

_PLACEHOLDER = re.compile(r"\A\s*<image>[\n ]?|[\n ]<image>|<image>[\n ]?")
_ASKS, _ANSWERS = ("human", "user"), ("gpt", "assistant")


class LlavaData(Fingerprinted):
    """Conversations about an image, one sample each; read from disk when asked for.

    The placeholder ``<image>`` is taken out of the questions; a question that was nothing else asks for the image
    itself. Entries without an image are dialogues in text.

    Args:
        path: A ``.json`` file of one array, or a ``.jsonl`` file.
        images: What image paths count from, the file's folder by default. No path may leave it.
    Raises:
        DataError: If the file cannot be read, is not in this format or has no entries. Entries are checked on access.
    """

    def __init__(self, path: str | Path, *, images: str | Path | None = None) -> None:
        self.path, self.images = Path(path), image_folder(Path(path), images)
        if self.path.suffix in (".jsonl", ".ndjson"):
            self._places: LinePlaces | ArrayPlaces = LinePlaces(self.path)
            for _ in self._places.scan():
                pass
        elif self.path.suffix == ".json":
            self._places = ArrayPlaces(self.path)
        else:
            raise DataError(f"{self.path}: unknown kind of conversations; pass a .json or .jsonl file")
        if not len(self):
            raise DataError(f"{self.path}: the file holds no conversation")

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Sample:
        """Raises IndexError if there is no such entry, DataError if it is not valid."""
        i = position(index, len(self), self.path)
        where = self._places.where(i)
        entry = parsed(self._places.read(i), where, constants=True)
        entry = checked_object(entry, "the entry", where)
        given = entry.get("image")
        named = [item for item in (given if isinstance(given, list) else [given]) if item not in ("", None)]
        images = [image_of({"image": item}, "image", self.images, where) or "" for item in named]
        id = entry.get("id")
        id = str(id) if isinstance(id, int) else text_of(entry, "id", where)
        return Sample(images, _exchanges(entry, bool(images), where), id=id, where=where)

    def _read_from(self) -> tuple[list[Path], Any]:
        return [self.path], "LLaVA 1"


class VisDialData(Fingerprinted):
    """Dialogues of VisDial 1.0, one sample each; read from disk when asked for. Texts are left as they are.

    Args:
        path: ``visdial_1.0_train.json`` or ``…_val.json``.
        images: The folder of the images.
        pattern: Names of image files within it, with ``{image_id}`` and ``{split}``; of several the first that exists.
        caption: What the caption answers ("Describe the image."): the first turn, where it is given.
    Raises:
        DataError: If the file cannot be read, is not in this format or has no dialogues, or a pattern cannot be used.
            Dialogues are checked on access.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        images: str | Path | None = None,
        pattern: str | Sequence[str] = PATTERNS,
        caption: str | None = None,
    ) -> None:
        self.path, self.images = Path(path), image_folder(Path(path), images)
        self.patterns = (pattern,) if isinstance(pattern, str) else tuple(pattern)
        self.caption = caption
        self._state = file_state(self.path)
        with open_unchanged(self.path, self._state) as file:
            self.split, self._places = _visdial_places(file, self.path)
        for name in ("questions", "answers", "dialogs"):
            if name not in self._places:
                raise DataError(
                    f"{self.path}: no list data.{name}; it must be a file of VisDial 1.0, with data.questions, "
                    f"data.answers and data.dialogs; found {', '.join(self._places) or 'none of them'}"
                )
        if not len(self):
            raise DataError(f"{self.path}: the file holds no dialogue")
        for given in self.patterns:
            self._file_name(given, 0)

    def __len__(self) -> int:
        return len(self._places["dialogs"])

    def __getitem__(self, index: int) -> Sample:
        """Raises IndexError if there is no such dialogue, DataError if it is not valid."""
        i = position(index, len(self), self.path)
        where = f"{self.path} row {i}"
        with open_unchanged(self.path, self._state) as file:
            entry = checked_object(value_at(file, self._places["dialogs"][i], where), "the dialogue", where)
            rounds = entry.get("dialog")
            if not isinstance(rounds, list) or not rounds:
                raise DataError(f"{where}: 'dialog' must be a list of at least one question, not {rounds!r:.60}")
            turns = [self._turn(file, item, f"{where} turn {n}") for n, item in enumerate(rounds, start=1)]
        if self.caption is not None:
            turns.insert(0, Turn(self.caption, _text(entry, "caption", where), kind="caption"))
        image_id = entry.get("image_id")
        if not isinstance(image_id, int) or isinstance(image_id, bool) or image_id < 0:
            raise DataError(f"{where}: 'image_id' must be a number, not {image_id!r:.60}")
        return Sample(self._image_file(image_id, where), turns, id=str(image_id), where=where)

    def _read_from(self) -> tuple[list[Path], Any]:
        return [self.path], ["VisDial 1", self.caption]

    def _turn(self, file: BinaryIO, item: Any, where: str) -> Turn:
        item = checked_object(item, "the turn", where)
        texts = []
        for side in ("question", "answer"):
            places, number = self._places[f"{side}s"], item.get(side)
            if number is None:
                raise DataError(f"{where}: no {side!r}; a turn needs a question and an answer (test files lack some)")
            if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < len(places):
                raise DataError(f"{where}: {side!r} is {number!r:.60}; it must be a number below {len(places)}, "
                                f"of data.{side}s")  # fmt: skip
            texts.append(_text({side: value_at(file, places[number], where)}, side, where))
        return Turn(*texts, kind=KIND)

    def _image_file(self, image_id: int, where: str) -> str:
        names = [self._file_name(pattern, image_id) for pattern in self.patterns]
        paths = [image_of({"image": name}, "image", self.images, where) or "" for name in names]
        there = [path for path in paths if os.path.isfile(path)] if len(paths) > 1 else paths
        if not there:
            raise DataError(f"{where}: no image of {image_id} in {self.images}, looked for {' and '.join(names)}; "
                            "pass the folder as 'images' and the names as 'pattern'")  # fmt: skip
        return there[0]

    def _file_name(self, pattern: str, image_id: int) -> str:
        try:
            return pattern.format(image_id=image_id, split=self.split)
        except (LookupError, ValueError, AttributeError, TypeError) as error:
            raise DataError(f"{self.path}: the pattern {pattern!r} cannot be used ({error!r}); write {{image_id}} or "
                            "{image_id:012d}, and {split}")  from error  # fmt: skip


def _exchanges(entry: JsonObject, has_image: bool, where: str) -> list[Turn]:
    """The turns of a LLaVA entry, whose sides take turns and the human begins."""
    messages = entry.get("conversations")
    if not isinstance(messages, list) or not messages:
        raise DataError(
            f"{where}: 'conversations' must be a list of at least two messages, not {messages!r:.60}; the entry has "
            f"{', '.join(entry):.100}"
        )
    texts = []
    for number, message in enumerate(messages):
        place = f"{where} message {number}"
        role = checked_object(message, "the message", place).get("from")
        if role not in (*_ASKS, *_ANSWERS):
            raise DataError(f"{place}: 'from' is {role!r:.60}; it must be 'human' or 'gpt'")
        wanted = _ANSWERS if number % 2 else _ASKS
        if role not in wanted:
            raise DataError(f"{place}: 'from' is {role!r}, where {wanted[0]!r} must be; a human's and a gpt's message "
                            "take turns, the human begins")  # fmt: skip
        texts.append(_text(message, "value", place) if number % 2 else _question(message, has_image, place))
    if len(texts) % 2:
        raise DataError(f"{where}: the last message, {len(texts) - 1}, has no answer; every question needs one")
    return [Turn(query, target, kind=KIND) for query, target in zip(texts[::2], texts[1::2], strict=True)]


def _question(message: JsonObject, has_image: bool, where: str) -> str:
    text = text_of(message, "value", where)
    if text is None:
        raise DataError(f"{where}: no 'value'; a message says something")
    text = _PLACEHOLDER.sub("", text) if has_image else text.replace("<image>", "")
    if not text.strip() and not has_image:
        raise DataError(f"{where}: 'value' is empty and the entry has no image; fix the entry")
    return text if text.strip() else ""


def _text(row: Mapping[str, Any], key: str, where: str) -> str:
    text = text_of(row, key, where)
    if text is None or not text.strip():
        raise DataError(f"{where}: {key!r} is empty; fix the entry")
    return text


def _visdial_places(file: BinaryIO, path: Path) -> tuple[str, dict[str, np.ndarray]]:
    """The split, and the places of the elements of every list in "data"."""
    scanner, split, places = Scanner(file, path), "", {}
    if scanner.peek() != "{":
        raise DataError(f"{path}: the file must hold a JSON object, as those of VisDial 1.0 do")
    for key in scanner.members():
        if key == "data" and scanner.peek() == "{":
            for name in scanner.members():
                if scanner.peek() == "[":
                    places[name] = scanner.elements()
                else:
                    scanner.value()
            continue
        place = scanner.value()
        if key == "split":
            here = file.tell()
            split = str(value_at(file, place, str(path)))
            file.seek(here)
    return split, places
