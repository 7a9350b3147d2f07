"""Our own format: one JSON object per line, one sample per object; docs and examples in the README.

::

    {"image": "images/1.jpg", "turns": [{"query": "What is it?", "target": "a ring", "kind": "classification"}]}
    {"turns": [{"query": ["a red mug", "red mug"], "target": {"image": "images/7.png"}, "negatives": ["a blue mug"]}]}
    {"video": {"source": "clips/3", "frames": 16}, "turns": [{"query": "What happens?", "target": "a mug falls"}]}

The reader is strict: an unknown key, a wrong type or a missing side is an error with file, line and turn, because a
typo that is silently skipped costs a training run. ``null`` means that an optional key is absent. Image paths are
relative to the file's folder; absolute ones and ``..`` are allowed, since the file is the user's own. URLs are not.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from muco.base.files import whole_file, writing
from muco.base.json_text import type_of
from muco.base.text import escaped
from muco.data.fingerprint import Fingerprinted
from muco.data.lines import errors_at, parsed, whole_text
from muco.data.places import LinePlaces, position
from muco.dialogue import Content, ImageLike, Sample, Turn, Video, as_content, as_video
from muco.errors import DataError, did_you_mean
from muco.images import is_url

_SAMPLE_KEYS = ("image", "images", "video", "turns", "id")
_NAMES = {"image": "an image", "images": "an image", "video": "a video, or those of its frames"}
_TURN_KEYS = ("query", "target", "kind", "negatives", "scores")


class JsonlData(Fingerprinted):
    """The samples of a JSONL file, parsed when asked for; only the offsets of the lines are kept in memory.

    Blank lines and a byte-order mark are skipped. Raises a DataError if the file is missing, has no rows, or a line is
    longer than 64 MiB. Rows are checked on access.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        self.folder = self.path.parent
        self._places = LinePlaces(self.path, shown=str(path))  # errors name the file as the user did
        for _ in self._places.scan():
            pass
        if not len(self):
            raise DataError(f"{path}: the file holds no rows")

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Sample:
        """Sample ``index``; its images are absolute paths and its ``where`` is "file:line".

        Raises an IndexError if there is no such row, a DataError if it is not valid, or the file changed since
        it was opened.
        """
        where = self.where(index)
        line = self._places.read(position(index, len(self), self.path))
        return sample_from_row(parsed(line, where), self.folder, where)

    def where(self, index: int) -> str:
        """ "file:line" of a row, also of one that cannot be read."""
        return self._places.where(position(index, len(self), self.path))

    def _read_from(self) -> tuple[list[Path], str]:
        self._places.check()
        return [self.path], "jsonl"


def sample_from_row(row: Any, folder: Path, where: str) -> Sample:
    """The sample that one parsed JSON object describes.

    Relative image paths are relative to ``folder``. Every error begins with ``where`` ("file:line"): a DataError if a
    key is unknown, a type is wrong, or a turn lacks its query or target.
    """
    with errors_at(where):
        row = _object(row, _SAMPLE_KEYS, "a row")
        images = _images(row, folder)
        sample_id = _optional_string(row, "id")
        turns = row.get("turns")
        if not isinstance(turns, list) or not turns:
            given = "an empty list" if turns == [] else type_of(turns)
            raise DataError(f"'turns' must be a list of at least one turn, not {given}")
    read = []
    for number, turn in enumerate(turns, start=1):
        with errors_at(f"{where} turn {number}"):
            read.append(_turn(turn, folder))
    return Sample(image=images, turns=read, id=sample_id, where=where)


def sample_to_row(sample: Sample, folder: Path) -> dict[str, Any]:
    """The inverse of :func:`sample_from_row`; a DataError if an image is not a path.

    Paths in ``folder`` become relative, others absolute. Relative paths of a sample count from the working directory.
    """
    row: dict[str, Any] = _images_to_row(sample.images, folder, sample.place)
    if sample.id is not None:
        row["id"] = sample.id
    row["turns"] = [_turn_to_row(turn, folder, sample.place) for turn in sample.turns]
    return row


def _read(rows: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    try:
        yield from rows
    except OSError as error:  # of what is copied, not of the file that is written
        raise DataError(f"{error.filename or 'the data'}: cannot be read ({error.strerror or error})") from error


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Writes one object per line and returns their number. The file appears whole or, on an error, not at all."""
    path = Path(path)
    count = 0
    with writing(path), whole_file(path) as unfinished, unfinished.open("w", encoding="utf-8", newline="\n") as file:
        for row in _read(rows):
            file.write(escaped(json.dumps(row, ensure_ascii=False, allow_nan=False)) + "\n")
            count += 1
    return count


def _turn(value: Any, folder: Path) -> Turn:
    value = _object(value, _TURN_KEYS, "a turn")
    sides = {}
    for side in ("query", "target"):
        given = value.get(side)
        if given is None:
            raise DataError(f"the turn has no {side!r}; every turn needs a query and a target")
        sides[side] = [_content(item, folder, side) for item in (given if isinstance(given, list) else [given])]
    negatives = value.get("negatives")
    if not isinstance(negatives, list | None):
        raise DataError(f"'negatives' must be a list, not {type_of(negatives)}")
    negatives = [_content(item, folder, "negatives") for item in negatives or ()]
    scores = value.get("scores")
    if not isinstance(scores, list | None) or any(type(score) not in (int, float) for score in scores or ()):
        raise DataError("'scores' must be a list of numbers: of the target, then of each negative")
    return Turn(**sides, kind=_optional_string(value, "kind"), negatives=negatives, scores=scores or ())


def _content(value: Any, folder: Path, key: str) -> Content:
    """What :func:`as_content` reads, with images as paths from ``folder``, and texts that are not only blanks."""
    if isinstance(value, dict):
        value = value | {"image": None, "video": None, "images": _images(value, folder)}
    elif not isinstance(value, str):
        raise DataError(f"{key!r} must be text or an object with 'text' and/or 'image', not {type_of(value)}")
    content = as_content(value, repr(key))
    for text in (content.text, content.caption):
        whole_text(text, key)
    if content.text and not content.text.strip() and not content.images:
        raise DataError(f"{key!r} is only blanks; write text or leave it out")
    return content


def _images(value: dict[str, Any], folder: Path) -> tuple[ImageLike, ...]:
    """The images and the video of a sample or a content, under "image" (a path, or a list), "images" and "video"."""
    paths: list[ImageLike] = []
    for key in ("image", "images"):
        given = value.get(key)
        paths += (_path(item, key, folder) for item in _listed(given))
    return (*paths, *_video(value.get("video"), folder))


def _video(value: Any, folder: Path) -> tuple[Video, ...]:
    source = value.get("source") if isinstance(value, dict) else value
    found = [_path(item, "video", folder) for item in _listed(source)]
    given = found if isinstance(source, list) else found[0] if found else None
    return as_video(value | {"source": given} if isinstance(value, dict) else given)


def _listed(value: Any) -> list[Any]:
    return [] if value is None else [*value] if isinstance(value, (list, tuple)) else [value]


def _path(item: Any, key: str, folder: Path) -> Path:
    if not isinstance(item, str):
        raise DataError(f"{key!r} must be the path of {_NAMES[key]}, not {type_of(item)}")
    if not item or "\0" in item:
        raise DataError(f"{key!r} is not a path: {item!r}; leave the key out if there is no {key.removesuffix('s')}")
    if is_url(item):
        raise DataError(f"{key!r} is a URL ({item[:60]}); URLs are not fetched, download the {key.removesuffix('s')}")
    return folder.absolute() / whole_text(item, key)


def _optional_string(value: dict[str, Any], key: str) -> str | None:
    text = value.get(key)
    if text is not None and not isinstance(text, str):
        raise DataError(f"{key!r} must be a string, not {type_of(text)}")
    return None if text is None else whole_text(text, key)


def _object(value: Any, keys: tuple[str, ...], name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{name} must be an object, not {type_of(value)}")
    for key in value:
        if key not in keys:
            raise DataError(f"unknown key {key!r} in {name}{did_you_mean(key, keys)}")
    return value


def _turn_to_row(turn: Turn, folder: Path, place: str) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for key, contents in (("query", turn.query), ("target", turn.target)):
        values = [_content_to_row(content, folder, place) for content in contents]
        row[key] = values[0] if len(values) == 1 else values
    if turn.kind is not None:
        row["kind"] = turn.kind
    if turn.negatives:
        row["negatives"] = [_content_to_row(content, folder, place) for content in turn.negatives]
    if turn.scores:
        row["scores"] = [*turn.scores]
    return row


def _content_to_row(content: Content, folder: Path, place: str) -> str | dict[str, Any]:
    if not content.images and not content.caption:
        return content.text
    texts = {"text": content.text, "caption": content.caption}
    images = _images_to_row(content.images, folder, place)
    return {key: text for key, text in texts.items() if text} | images


def _images_to_row(images: tuple[ImageLike, ...], folder: Path, place: str) -> dict[str, Any]:
    videos = [image for image in images if isinstance(image, Video)]
    paths = [_path_to_row(image, folder.absolute(), place) for image in images if not isinstance(image, Video)]
    if len(videos) > 1 or (videos and isinstance(images[0], Video) and paths):
        raise DataError(f"{place}: a row holds one video, behind its images; this has {len(videos)} and other images")
    row: dict[str, Any] = {"image": paths[0]} if len(paths) == 1 else {"images": paths} if paths else {}
    for video in videos:
        frames = [_path_to_row(frame, folder.absolute(), place) for frame in _listed(video.source)]
        source = frames if isinstance(video.source, tuple) else frames[0]
        said = {"frames": video.frames, "fps": video.fps}
        how = {key: number for key, number in said.items() if number != getattr(Video, key)}
        row["video"] = {"source": source} | how if how else source
    return row


def _path_to_row(image: ImageLike, folder: Path, place: str) -> str:
    if not isinstance(image, (str, Path)):
        raise DataError(f"{place}: an image is {type(image).__name__}, not a path; save it to a file first")
    path = Path(image).absolute()  # the readers' relative paths count from the working directory
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.as_posix()
