"""Captions of the images of training data: made once by a model that the user serves, kept in a file for training.

::

    {"image": "<SHA-256 of the image>", "caption": "a ring with …", "model": "…", "prompt": "muco-1 (…)"}
    {"image": "<SHA-256 of the image>", "error": "refusal: …", "model": "…", "prompt": "muco-1 (…)"}

Fine-tuning by reconstruction hides a caption instead of an image (:mod:`muco.reconstruction`). Each image is asked
about once, however often it occurs in the data, and its line is written at once, so that a killed run resumes. To ask
about an image again, remove its line. Of two lines about an image the later one counts.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from muco.base.journal import Journal
from muco.data.captions import known_digests, sides_of, uncaptioned
from muco.data.source import Data
from muco.dialogue import ImageLike
from muco.errors import ImageError
from muco.images import image_digest
from muco.synth.chat import Passing, Unanswered, image_parts, seed_of, user
from muco.synth.endpoint import Endpoint
from muco.synth.flow import done_within_budget
from muco.synth.pairs import caption_problem
from muco.synth.prompts import Prompts

MAX_PIXELS = 1 << 20  # of an image as sent
ATTEMPTS = 3  # for a usable caption

Progress = Callable[[int, int], None]  # samples done, and all of them
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

    Images of hard negatives are left out, as nothing is reconstructed from them. Captions in the data, and those in
    ``output`` of other data or models, are kept. Images of more than ``max_pixels`` are sent smaller.

    Returns:
        ``images`` of the data; how many of them were ``found`` in the file, ``captioned`` or ``failed``; ``stopped``,
        the reason if the budget ended the run, or if no image ever got a caption: then no failure is written, and the
        next run asks again; ``output``; ``usage`` of the endpoint.
    Raises:
        DataError: If a row of the data or a line of the file cannot be read.
        EndpointError: If the server or the model is missing, or its answers are useless.
        OutputError: If another process writes to ``output``.
    """
    await endpoint.check(image=True)
    counts: Counter[str] = Counter(images=0, found=0, captioned=0, failed=0)

    async def one(image: tuple[ImageLike, str]) -> None:
        line = await _line(*image, endpoint, prompts, max_pixels)
        if line is not None and "caption" in line:
            counts["captioned"] += 1
            journal.succeed(line)
            return
        counts["failed"] += 1
        if line is not None:
            journal.hold(line)

    with Journal(output) as journal:
        known = known_digests(output)
        with closing(_images(data, known.keys(), counts, progress)) as images:
            stopped = await done_within_budget(images, one, ahead=2 * endpoint.limits.concurrency)
        lost = journal.settle(counts["captioned"] > 0 or any(known.values()))
    if lost and stopped is None:
        stopped = f"no image got a caption, the last: {lost['error']}; correct that, and run the same command again"
    counts["failed"] += counts.pop("missing", 0)
    return {**counts, "stopped": stopped, "output": str(output), "usage": vars(endpoint.usage).copy()}


async def _line(
    image: ImageLike, digest: str, endpoint: Endpoint, prompts: Prompts, max_pixels: int
) -> dict[str, Any] | None:
    """The line of an image; None if the server did not answer, so that the next run asks again."""
    made, reason = {"model": endpoint.model, "prompt": prompts.name}, ""
    try:
        message = user(*await asyncio.to_thread(image_parts, image, max_pixels), prompts.filled(prompts.picture))
        for attempt in range(ATTEMPTS):
            answer = await endpoint.ask([message], seed=seed_of(digest, "picture", attempt))
            problem = caption_problem(answer, prompts)
            if problem is None:
                endpoint.useful()
                return {"image": digest, "caption": " ".join(answer.text.split()), **made}
            reason = f"{problem}: {answer.text[:200]}"
            endpoint.useless(reason)
    except Passing as error:
        log.warning("no caption for now: %s", error)
        return None
    except (ImageError, Unanswered) as error:
        reason = str(error)
    return {"image": digest, "error": reason, **made}


def _images(
    data: Data, kept: Collection[bytes], counts: Counter[str], progress: Progress | None
) -> Iterator[tuple[ImageLike, str]]:
    """(Image, digest) of every image that has no line yet, each once."""
    seen: set[bytes] = set()
    for number in range(len(data)):
        sample = data[number]
        for image in (image for content in sides_of(sample) for image in uncaptioned(sample, content)):
            try:
                digest = image_digest(image, where=sample.where)
            except ImageError as error:
                log.warning("%s", error)
                counts["missing"] += 1  # not "failed", which another thread counts
                continue
            key = bytes.fromhex(digest)
            new = key not in seen
            seen.add(key)
            counts["images"] += new
            counts["found"] += new and key in kept
            if new and key not in kept:
                yield image, digest
        if progress is not None:
            progress(number + 1, len(data))
