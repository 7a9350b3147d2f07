"""Webdataset shards: plain ``.tar`` files in which the members of a sample share a name, read in any order.

::

    shard-00000.tar    000001.jpg  000001.txt      a caption
                       000002.png  000002.json     {"caption": "…"}, or a sample as in our own format, without an image:
                                                   {"turns": [{"query": "What is it?", "target": "a ring"}]}

Each shard is gone through once, header by header. Where its samples lie is kept in one file per shard::

    <folder of the shard>/.muco-shards/<name of the shard>-<key>.npz

The key identifies the shard's size and modification time. An index appears when it is whole, so going through a
thousand shards resumes after a stop.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import tarfile
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal

import numpy as np

from muco.base.files import whole_file
from muco.base.terminal import progress_bar
from muco.data.json_places import bytes_at
from muco.data.jsonl import sample_from_row
from muco.data.lines import as_object, text_of, without_token
from muco.data.places import file_state, open_unchanged, position
from muco.data.rows import cannot_write
from muco.dialogue import Content, Sample, Turn
from muco.errors import DataError
from muco.images import MAX_BYTES

Direction = Literal["text-to-image", "image-to-text"]

FORM = 1  # raise when the content of an index changes
IMAGES = frozenset("jpg jpeg png webp gif bmp tif tiff ppm".split())
TEXTS = ("txt", "json")
MAX_TEXT_BYTES = 16 * 2**20
MAX_HEADER_BYTES = 2**14  # of the records that extend a header; the time to parse them grows with the square
END = bytes(tarfile.BLOCKSIZE)  # a block of zeros ends an archive

Places = dict[str, np.ndarray]  # "places": int64 [n, 4], of image and text first byte and bytes; "json", "keys": [n]

log = logging.getLogger(__name__)


class ShardsData:
    """The samples of webdataset shards, in the order of their names; images are the bytes of their members.

    A sample has one image and a ``.txt`` (which goes first) or ``.json``. A caption becomes one turn in the direction
    asked for; an object with "turns" is a sample in our own format about the image. Other members (``.cls`` …) are
    not read. Members that are links, devices, too large, or named outside of the archive, and samples without an
    image or a text, are left out and reported once per shard. Memory: 40 bytes and the name of every sample.

    Args:
        path: A ``.tar`` file, a folder of them, or a list of files.
        direction: "text-to-image" asks for the image with the caption, "image-to-text" the other way round.
        caption: The key of a ``.json`` that holds the caption.
        cache: Folder for the indexes, where it is not one beside each shard.
    Attributes:
        skipped: Why something was left out, and how often.
    Raises:
        DataError: If there is no shard, one is not a whole plain tar archive or holds a name twice, or nothing is left.
            Texts are checked on access.
    """

    def __init__(
        self,
        path: str | Path | Sequence[str | Path],
        *,
        direction: Direction = "text-to-image",
        caption: str = "caption",
        cache: str | Path | None = None,
    ) -> None:
        if direction not in ("text-to-image", "image-to-text"):
            raise DataError(f"unknown direction {direction!r}; pass 'text-to-image' or 'image-to-text'")
        self.shards, self.direction, self.caption = shard_files(path), direction, caption
        self.path = Path(path) if isinstance(path, str | Path) else self.shards[0].parent
        self.skipped: Counter[str] = Counter()
        self._states = [file_state(shard) for shard in self.shards]
        self._indexes: list[Places] = []
        with progress_bar("indexing shards") as progress:
            for number, shard in enumerate(self.shards):
                places, skipped = _index(shard, self._states[number], None if cache is None else Path(cache))
                self._indexes.append(places)
                self.skipped.update(skipped)
                progress(number + 1, len(self.shards))
        self._ends = np.cumsum([len(places["places"]) for places in self._indexes])
        if not len(self):
            reasons = ", ".join(f"{reason}: {count}" for reason, count in sorted(self.skipped.items())) or "no members"
            raise DataError(f"{self.shards[0]}: no sample with an image and a .txt or .json in {len(self.shards)} "
                            f"shards ({reasons})")  # fmt: skip

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Sample:
        """Raises IndexError if there is no such sample, DataError if its text is not valid."""
        i = position(index, len(self), self.shards[0])
        shard = int(np.searchsorted(self._ends, i, side="right"))
        row = i - (int(self._ends[shard - 1]) if shard else 0)
        places = self._indexes[shard]
        key = bytes(places["keys"][row]).decode()
        where = f"{self.shards[shard]} row {row} ({key})"
        with open_unchanged(self.shards[shard], self._states[shard]) as file:
            image, data = (bytes_at(file, place) for place in places["places"][row].reshape(2, 2))
        id = f"{self.shards[shard].name}/{key}"
        if places["json"][row]:
            value = as_object(data, where, constants=True)  # downloaders write NaN for what they do not know
            if "turns" in value:
                if named := _names_images(value):  # a path would be read from this machine, whoever made the archive
                    said = "in a shard the image is a member, and nothing else is read; leave the key out"
                    raise DataError(f"{where}: {named!r} in the .json; {said}")
                sample = sample_from_row(value | {"image": "member"}, Path(), where)
                return Sample(image, sample.turns, sample.id if sample.id is not None else id, sample.where)
            if self.caption not in value:
                raise DataError(f"{where}: no {self.caption!r} in the .json; found {', '.join(value) or 'nothing'}; "
                                "pass the key of the caption")  # fmt: skip
            text = text_of(value, self.caption, where) or ""
        else:
            try:
                text = data.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise DataError(f"{where}: the .txt is not UTF-8 ({error.reason}); fix the sample") from error
        asks_text = self.direction == "image-to-text"
        text = without_token(text, has_image=asks_text).strip()
        if not text:
            raise DataError(f"{where}: the caption is empty; fix the sample or leave it out")
        turn = Turn("", text) if asks_text else Turn(text, Content(images=(image,)))
        return Sample(image if asks_text else None, [replace(turn, kind=self.direction)], id=id, where=where)

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of names, sizes and modification times of the shards, and the options.

        Shards hold terabytes, so their bytes do not count: copies must keep the times.
        """
        shards = [[shard.name, *state] for shard, state in zip(self.shards, self._states, strict=True)]
        return hashlib.sha256(json.dumps([FORM, self.direction, self.caption, shards]).encode()).hexdigest()


def _names_images(value: Any) -> str | None:
    """The first key that names images or videos, however deep."""
    left = [value]
    while left:  # no recursion: how deep it goes is up to the archive
        value = left.pop()
        if isinstance(value, dict):
            if named := next((key for key in ("image", "images", "video") if key in value), None):
                return named
            value = list(value.values())
        left += value if isinstance(value, list) else []
    return None


def shard_files(given: str | Path | Sequence[str | Path]) -> tuple[Path, ...]:
    if not isinstance(given, str | Path):
        files = tuple(map(Path, given))
    elif Path(given).is_dir():
        files = tuple(sorted(Path(given).glob("*.tar")))
    else:
        files = (Path(given),)
    if not files:
        raise DataError(f"{given if isinstance(given, str | Path) else 'shards'}: no .tar file")
    for file in files:
        if file.suffix != ".tar":
            raise DataError(f"{file}: a shard must be a plain .tar file; unpack a compressed one, and name it .tar")
    return files


def _index(shard: Path, state: tuple[int, int], cache: Path | None) -> tuple[Places, Counter[str]]:
    """Where the samples of a shard lie, and what was left out; from an earlier run where there is one."""
    place = "" if cache is None else str(shard.absolute())
    key = hashlib.sha256(json.dumps([FORM, state, place]).encode()).hexdigest()[:16]
    folder = shard.parent / ".muco-shards" if cache is None else cache
    kept = folder / f"{shard.name}-{key}.npz"
    if kept.exists():
        try:
            with kept.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in ("places", "json", "keys", "skipped")}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(f"{kept}: damaged ({error}); remove it, it is made anew") from error
        return arrays, Counter(json.loads(arrays.pop("skipped").tobytes()))
    with open_unchanged(shard, state) as file:
        places, skipped = _go_through(file, shard)
    try:
        with whole_file(kept) as unfinished, unfinished.open("wb") as file:
            np.savez(file, **places, skipped=np.frombuffer(json.dumps(skipped).encode(), dtype=np.uint8))
    except OSError as error:
        raise cannot_write(folder, error) from error
    if skipped:
        reasons = "; ".join(f"{reason}: {count}" for reason, count in sorted(skipped.items()))
        log.warning("%s: left out %s", shard, reasons)
    return places, skipped


def _go_through(file: BinaryIO, shard: Path) -> tuple[Places, Counter[str]]:
    """Reads all headers of a shard; members are stepped over."""
    samples: defaultdict[str, dict[str, tuple[int, int]]] = defaultdict(dict)
    skipped: Counter[str] = Counter()
    for member in members(file, shard, skipped):
        key, kind = key_and_kind(member.name)
        if kind not in IMAGES and kind not in TEXTS:
            continue
        if kind in samples[key]:
            raise DataError(f"{shard}: the member {member.name!r} is there twice; keep one")
        samples[key][kind] = member.offset_data, member.size
    places, json_texts, keys = [], [], []
    for key, parts in samples.items():
        images = [parts[kind] for kind in parts if kind in IMAGES]
        text = parts.get("txt") or parts.get("json")
        if len(images) != 1:
            skipped["samples with several images" if images else "samples without an image"] += 1
        elif text is None:
            skipped["samples without a .txt or .json"] += 1
        else:
            places.append((*images[0], *text))
            json_texts.append("txt" not in parts)
            keys.append(key.encode("utf-8", "replace"))
    arrays = {
        "places": np.array(places, dtype=np.int64).reshape(-1, 4),
        "json": np.array(json_texts, dtype=bool),
        "keys": np.array(keys, dtype=bytes),
    }
    return arrays, skipped


def members(file: BinaryIO, shard: Path, skipped: Counter[str]) -> Iterator[tarfile.TarInfo]:
    """The plain files of an archive that may be read, in its order; counts those that may not, by reason.

    Raises a DataError if it is not a whole plain tar archive, when the place is reached that says so.
    """
    try:
        with tarfile.open(fileobj=_Headers(file), mode="r:") as archive:
            for member in archive:
                archive.members = []  # type: ignore[misc]  # or all of them would be kept
                if archive.offset <= member.offset:
                    raise tarfile.ReadError(f"{member.name!r} has a size below 0")  # would be read again and again
                name, path, kind = member.name, PurePosixPath(member.name), key_and_kind(member.name)[1]
                largest = MAX_BYTES if kind in IMAGES else MAX_TEXT_BYTES if kind in TEXTS else math.inf
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    skipped["links, devices and other special members"] += 1
                elif path.is_absolute() or ".." in path.parts or "\\" in name or not name.isprintable():
                    skipped["members with names outside of the archive or with control characters"] += 1
                elif member.size > largest:
                    skipped["members that are too large"] += 1
                else:
                    yield member
            # The reader of headers stops at a damaged one as at the end; only a block of zeros is an end.
            file.seek(archive.offset)
            if file.read(len(END)) != END:
                raise tarfile.ReadError(f"no end at byte {archive.offset}")
    except (tarfile.TarError, EOFError, OverflowError, RecursionError, ValueError) as error:
        raise DataError(f"{shard}: not a whole plain tar archive ({error}); download it again") from error


def key_and_kind(name: str) -> tuple[str, str]:
    """ "a/b.jpg" is the jpg of "a/b"; the first dot of the last part counts, so "b.seg.png" is the "seg.png" of "b"."""
    folder, slash, last = name.removeprefix("./").rpartition("/")
    key, _, kind = last.partition(".")
    return folder + slash + key, kind.lower()


class _Headers:
    """A file of which only headers are read: a header that claims to be huge is refused before it is read."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.name, self.mode = file, getattr(file, "name", ""), "rb"
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self.file.read(size)
