"""Captions of the images of training data: made once by a model that the user serves, kept in a file, read by training.

::

    {"image": "<SHA-256 of the image>", "caption": "a ring with …", "model": "…", "prompt": "muco-1 (…)"}
    {"image": "<SHA-256 of the image>", "error": "refusal: …", "model": "…", "prompt": "muco-1 (…)"}

Fine-tuning by reconstruction hides a caption in the place of an image (:mod:`muco.reconstruction`). Each image is asked
about once, however often it stands in the data; a line is written when its answer is there, so that a killed run goes
on with what is left. To ask about an image again, remove its line. Of two lines about an image the later one counts.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import aclosing, closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from muco.data.fingerprint import file_digest
from muco.data.images import image_digest
from muco.dialogue import Content, ImageLike, Sample
from muco.errors import DataError, ImageError

if TYPE_CHECKING:
    from muco.data import Data
    from muco.synth.endpoint import Endpoint
    from muco.synth.prompts import Prompts

MAX_PIXELS = 1 << 20  # of an image as it is sent
ATTEMPTS = 3  # to get a caption that can be used

Progress = Callable[[int, int], None]  # samples gone through, and all of them

log = logging.getLogger(__name__)


async def caption(
    data: Data,
    endpoint: Endpoint,
    output: Path,
    *,
    prompts: Prompts,
    max_pixels: int = MAX_PIXELS,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Asks for a caption of every image of the data that has none, and appends it to ``output``.

    Images of hard negatives are left out: nothing is reconstructed from them.

    Args:
        data: Captions of its own stand.
        endpoint: Of a model that sees. It is checked before any work.
        output: May hold captions of other data or by other models; they are kept.
        max_pixels: Larger images are sent smaller.
    Returns:
        ``images`` of the data; how many of them were ``found`` in the file, ``captioned`` or ``failed``; ``stopped``,
        the reason if the budget ended the run; ``output``; ``usage`` of the endpoint.
    Raises:
        DataError: If a row of the data or a line of the file cannot be read.
        EndpointError: If the server or the model is missing, or nothing that it says is of use.
        OutputError: If another process writes to ``output``.
    """
    from muco.synth.flow import in_order
    from muco.synth.journal import Journal
    from muco.synth.limits import BudgetSpent

    await endpoint.check(image=True)
    counts: Counter[str] = Counter(images=0, found=0, captioned=0, failed=0)
    held: list[dict[str, Any]] = []  # failures, until something succeeds: a server out of order must not be blamed on
    stopped = None  # images

    async def one(image: tuple[ImageLike, str]) -> None:
        line = await _line(*image, endpoint, prompts, max_pixels)
        if line is None or "error" in line:
            counts["failed"] += 1
            held.extend([line] if line else [])
            return
        counts["captioned"] += 1
        for made in (line, *held):
            journal.add(made)
        held.clear()

    with Journal(output) as journal, closing(_images(data, _digests(output), counts, progress)) as images:
        async with aclosing(in_order(images, one, ahead=2 * endpoint.limits.concurrency)) as lines:
            try:
                async for _ in lines:
                    pass
            except BudgetSpent as error:
                stopped = str(error)
        for line in held:
            journal.add(line)
    counts["failed"] += counts.pop("missing", 0)
    return {**counts, "stopped": stopped, "output": str(output), "usage": endpoint.usage.as_dict()}


async def _line(
    image: ImageLike, digest: str, endpoint: Endpoint, prompts: Prompts, max_pixels: int
) -> dict[str, Any] | None:
    """The line of an image; None if the server did not answer, so that the next run asks again."""
    from muco.synth.checks import caption_problem
    from muco.synth.endpoint import Unanswered, seed_of
    from muco.synth.messages import image_part, user

    made = {"model": endpoint.model, "prompt": prompts.name}
    reason = ""
    try:
        message = user(await asyncio.to_thread(image_part, image, max_pixels), prompts.filled(prompts.picture))
        for attempt in range(ATTEMPTS):
            answer = await endpoint.ask([message], seed=seed_of(digest, "picture", attempt))
            problem = caption_problem(answer, prompts)
            if problem is None:
                endpoint.useful()
                return {"image": digest, "caption": " ".join(answer.text.split()), **made}
            reason = f"{problem}: {answer.text[:200]}"
            endpoint.useless(reason)
    except ImageError as error:
        reason = str(error)
    except Unanswered as error:
        if error.passing:
            log.warning("no caption for now: %s", error)
            return None
        reason = str(error)
    return {"image": digest, "error": reason, **made}


def _images(
    data: Data, kept: set[bytes], counts: Counter[str], progress: Progress | None
) -> Iterator[tuple[ImageLike, str]]:
    """(Image, digest) of every image that has no line yet, each once."""
    seen: set[bytes] = set()
    for number in range(len(data)):
        sample = data[number]
        for image in (image for content in _contents(sample) for image in _uncaptioned(sample, content)):
            try:
                digest = image_digest(image, where=sample.where)
            except ImageError as error:
                log.warning("%s", error)
                counts["missing"] += 1  # apart from the failed: those are counted on another thread
                continue
            key = bytes.fromhex(digest)
            if key in seen:
                continue
            seen.add(key)
            counts["images"] += 1
            if key in kept:
                counts["found"] += 1
            else:
                yield image, digest
        if progress is not None:
            progress(number + 1, len(data))


def _contents(sample: Sample) -> Iterator[tuple[str, Content]]:
    """("query" or "target", content) of all wordings of all turns."""
    for turn in sample.turns:
        yield from (("query", content) for content in turn.query)
        yield from (("target", content) for content in turn.target)


def _uncaptioned(sample: Sample, side: tuple[str, Content]) -> tuple[ImageLike, ...]:
    """The images that the caption of a content is about, if it has none yet."""
    name, content = side
    if content.caption:
        return ()
    return (*sample.images, *content.images) if name == "query" else content.images


def _digests(path: Path) -> set[bytes]:
    return {_digest(path, line) for _, line in _lines(path)}


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def with_captions(data: Data, path: str | Path) -> Data:
    """The data with the captions of a file on all contents that have images and no caption.

    Args:
        path: As ``muco data caption`` writes it.
    Raises:
        DataError: If the file is missing or a line of it cannot be read. A sample with an image that the file says
            nothing about is an error on access; one whose caption failed stays without.
    """
    return CaptionedData(data, Captions(Path(path)))


class Captions:
    """The captions of a file by the digest of the image. In memory are 16 bytes for each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise DataError(f"{path}: no such file of captions; `muco data caption` makes it")
        places = {_digest(path, line): start for start, line in _lines(path)}  # the later line counts
        keys = np.array([int.from_bytes(digest[:8]) for digest in places], dtype=np.uint64)
        order = np.argsort(keys, kind="stable")
        self._keys, self._starts = keys[order], np.fromiter(places.values(), np.int64, len(places))[order]

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, digest: str) -> str:
        """The caption of an image, "" if there was none to be had.

        Raises:
            DataError: If the file says nothing about it.
        """
        key = np.uint64(int(digest[:16], 16))
        first, end = (int(np.searchsorted(self._keys, key, side=side)) for side in ("left", "right"))
        with self.path.open("rb") as file:
            for start in self._starts[first:end].tolist():
                file.seek(start)
                line = json.loads(file.readline())
                if line["image"] == digest:
                    return line.get("caption", "")
        raise DataError(f"{self.path}: nothing about the image {digest[:12]}…; run `muco data caption` again")

    @property
    def fingerprint(self) -> str:
        return file_digest(self.path)


class CaptionedData:
    """Data with captions; anything else is asked of the data itself."""

    def __init__(self, data: Data, captions: Captions) -> None:
        self._data, self._captions = data, captions

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Sample:
        sample = self._data[index]
        known: dict[int, str] = {}  # by the image as an object: one stands in many turns

        def told(image: ImageLike) -> str:
            if id(image) not in known:
                try:
                    known[id(image)] = self._captions[image_digest(image, where=sample.where)]
                except ImageError:  # said where the image itself is read
                    known[id(image)] = ""
                except DataError as error:
                    raise DataError(f"{sample.place}: {error}") from error
            return known[id(image)]

        def captioned(name: str, content: Content) -> Content:
            captions = filter(None, map(told, _uncaptioned(sample, (name, content))))
            return replace(content, caption=content.caption or "; ".join(captions))

        turns = [
            replace(turn, **{name: [captioned(name, c) for c in getattr(turn, name)] for name in ("query", "target")})
            for turn in sample.turns
        ]
        return sample.with_turns(turns)

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the data's fingerprint and the bytes of the file of captions."""
        return self._with(self._data.fingerprint)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # before the data is there, as while unpickling
            raise AttributeError(name)
        value = getattr(self._data, name)
        return self._with(value) if name == "readable_fingerprint" else value

    def _with(self, fingerprint: str) -> str:
        return hashlib.sha256(f"{fingerprint} {self._captions.fingerprint}".encode()).hexdigest()


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    from muco.synth.journal import read_lines

    for start, line in read_lines(path):
        if not isinstance(line.get("caption", line.get("error")), str):
            raise DataError(f"{path}: a line of {line.get('image')!r} has neither a caption nor an error")
        yield start, line


def _digest(path: Path, line: dict[str, Any]) -> bytes:
    try:
        digest = bytes.fromhex(line["image"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: 'image' must be the SHA-256 of an image, not {line.get('image')!r}") from error
    if len(digest) != 32:
        raise DataError(f"{path}: 'image' must be the SHA-256 of an image, not {line['image']!r}")
    return digest
