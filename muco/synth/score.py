"""A teacher's scores of training data: from a reranker, or from a model that is asked for yes or no; for distillation.

::

    turns with negatives ─▶ (query, target), (query, negative) … ─▶ server ─▶ <output>.journal ─▶ <output>, with scores

The journal has a line per turn, written at once, so that a killed run resumes:
``{"turn": "<digest>", "scores": [of the target, of each negative], "model": "…"}``, or ``"error"`` for ``"scores"``. A
turn is asked about once, however often it occurs. The output appears when all turns were asked about.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from muco.base.files import claimed
from muco.base.journal import Journal, read_lines
from muco.data.jsonl import sample_to_row, write_jsonl
from muco.data.same import content_key
from muco.data.source import Data
from muco.dialogue import Content, Sample, Turn
from muco.errors import DataError, ImageError, MucoError, OutputError
from muco.synth.caption import MAX_PIXELS, Progress
from muco.synth.chat import Answer, Message, Passing, Unanswered, image_parts, user
from muco.synth.endpoint import Endpoint
from muco.synth.flow import done_within_budget

QUESTION = "Does the candidate answer the query? Say yes or no, and nothing else."
SAMPLING = {"temperature": 0.0, "max_tokens": 1, "logprobs": True, "top_logprobs": 20}  # of a question for yes or no
YES, NO = "yes", "no"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Asked:
    """A turn with what its query is about, to be scored."""

    digest: str
    query: Content  # with the sample's images
    candidates: tuple[Content, ...]


async def score(
    data: Data,
    endpoint: Endpoint,
    output: Path,
    *,
    by: Literal["rerank", "chat"] = "rerank",
    question: str = QUESTION,
    max_pixels: int = MAX_PIXELS,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Writes the data as JSONL with a teacher's scores beside the negatives of each turn.

    Of paraphrases the first is scored. Turns without negatives, and those with scores, stay as they are; so do turns
    that the server refuses.

    Args:
        endpoint: For "chat", one whose requests ask for :data:`SAMPLING`.
        output: It must not exist. ``<output>.journal`` holds the scores from which the same call resumes.
        by: "rerank": the scores of a rerank endpoint (Cohere's form, as vLLM and SGLang serve it). "chat": the
            probability of yes against no as the first token of an answer, 0 to 1.
        question: Put after the query and the candidate, with "chat".
        max_pixels: Images of more pixels are sent smaller.
    Returns:
        ``turns`` that need scores; how many of these were ``found`` in the journal, ``scored``, ``failed`` for good, or
        ``unanswered`` for now; ``stopped``, why the output was not written, or None; ``output``; ``usage``.
    Raises:
        DataError: If a row of the data cannot be read, or names images that are not files.
        EndpointError: If the server or the model is missing, or its answers are useless.
        OutputError: If the output exists, or another process writes it.
    """
    if by not in ("rerank", "chat"):
        raise MucoError(f"by must be 'rerank' or 'chat', not {by!r}")
    counts: Counter[str] = Counter(turns=0, found=0, scored=0, failed=0, unanswered=0)
    how = [by, endpoint.model, question if by == "chat" else ""]
    with claimed(output, beside=True):
        if output.exists():
            raise OutputError(f"{output} exists; choose another output file or delete it")
        image = _has_image(data)
        await (endpoint.check_ranking(image=image) if by == "rerank" else endpoint.check(image=image))
        how[1] = endpoint.model
        file = output.with_name(f"{output.name}.journal")
        known = {line["turn"]: line.get("scores") for _, line in read_lines(file)} if file.exists() else {}

        async def one(asked: _Asked) -> None:
            line = await _line(asked, endpoint, by, question, max_pixels)
            if line is None:
                counts["unanswered"] += 1
                return
            known[asked.digest] = line.get("scores")
            if "scores" in line:
                counts["scored"] += 1
                journal.succeed(line)
            else:
                counts["failed"] += 1
                journal.hold(line)

        with Journal(file) as journal, closing(_asked(data, how, dict(known), counts, progress)) as turns:
            stopped = await done_within_budget(turns, one, ahead=2 * endpoint.limits.concurrency)
            lost = journal.settle(counts["scored"] + counts["found"] > 0)
        if lost and stopped is None:
            stopped = f"no turn got scores, the last: {lost['error']}; correct that, and run the same command again"
        if stopped is None and counts["unanswered"]:
            stopped = f"{counts['unanswered']} turns got no answer for now; run the same command again"
        if stopped is None:
            write_jsonl(output, _rows(data, how, known, output.absolute().parent))
    usage = vars(endpoint.usage).copy()
    return {**counts, "stopped": stopped, "output": None if stopped else str(output), "usage": usage}


async def _line(asked: _Asked, endpoint: Endpoint, by: str, question: str, max_pixels: int) -> dict[str, Any] | None:
    """The line of a turn; None if the server did not answer, so that the next run asks again."""
    made = {"turn": asked.digest, "model": endpoint.model}
    try:
        query, *candidates = await asyncio.to_thread(
            lambda: [_parts(content, max_pixels) for content in (asked.query, *asked.candidates)]
        )
        if by == "rerank":
            return made | {"scores": await endpoint.rank(_ranked(query), [_ranked(parts) for parts in candidates])}
        scores = []
        for parts in candidates:
            message = user("Query:", *query, "Candidate:", *parts, question)
            answer = await endpoint.ask([message])
            probability = yes_against_no(answer)
            if probability is None:
                endpoint.useless(f"no log-probability of yes or no: {answer.text[:200]}")
                return made | {"error": f"no log-probability of yes or no: {answer.text[:200]}"}
            endpoint.useful()
            scores.append(probability)
    except Passing as error:
        log.warning("no scores for now: %s", error)
        return None
    except (ImageError, Unanswered) as error:
        return made | {"error": str(error)}
    return made | {"scores": scores}


def yes_against_no(answer: Answer) -> float | None:
    """The probability of yes, of yes and no together, as the first token; None if the server names neither."""
    shares = {YES: 0.0, NO: 0.0}
    for token, probability in answer.first.items():
        word = token.strip().casefold()
        if word in shares:
            shares[word] += math.exp(probability)
    return shares[YES] / sum(shares.values()) if sum(shares.values()) else None


def _parts(content: Content, max_pixels: int) -> list[str | Message]:
    images: list[str | Message] = [part for image in content.images for part in image_parts(image, max_pixels)]
    return [*images, content.text] if content.text else images


def _ranked(parts: list[str | Message]) -> Message | str:
    """What a rerank endpoint takes: a text, or an object of parts."""
    if len(parts) == 1 and isinstance(parts[0], str):
        return parts[0]
    return {"content": [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]}


def _asked(
    data: Data,
    how: list[str],
    known: Mapping[str, list[float] | None],
    counts: Counter[str],
    progress: Progress | None,
) -> Iterator[_Asked]:
    """Every turn that has no line yet, each once."""
    seen: set[str] = set()
    for number in range(len(data)):
        sample = data[number]
        for turn in filter(_needs_scores, sample.turns):
            asked = _one(sample, turn, how)
            new = asked.digest not in seen
            seen.add(asked.digest)
            counts["turns"] += new
            if new and asked.digest in known:
                counts["failed" if known[asked.digest] is None else "found"] += 1
            elif new:
                yield asked
        if progress is not None:
            progress(number + 1, len(data))


def _needs_scores(turn: Turn) -> bool:
    return bool(turn.negatives) and not turn.scores


def _one(sample: Sample, turn: Turn, how: list[str]) -> _Asked:
    """Raises a DataError if an image cannot be read."""
    query = Content(turn.query[0].text, (*sample.images, *turn.query[0].images))
    candidates = (turn.target[0], *turn.negatives)
    keys = [content_key(content, sample.place) for content in (query, *candidates)]
    return _Asked(hashlib.sha256(json.dumps([how, keys]).encode()).hexdigest(), query, candidates)


def _has_image(data: Data) -> bool:
    """Whether anything that is to be scored has one."""
    for number in range(len(data)):
        sample = data[number]
        for turn in filter(_needs_scores, sample.turns):
            if sample.images or any(content.images for content in (turn.query[0], turn.target[0], *turn.negatives)):
                return True
    return False


def _rows(
    data: Data, how: list[str], known: Mapping[str, list[float] | None], folder: Path
) -> Iterator[dict[str, Any]]:
    for number in range(len(data)):
        sample = data[number]
        turns = [
            Turn(turn.query, turn.target, turn.kind, turn.negatives, known.get(_one(sample, turn, how).digest) or ())
            if _needs_scores(turn)
            else turn
            for turn in sample.turns
        ]
        try:
            yield sample_to_row(sample.with_turns(turns), folder)
        except DataError as error:
            raise DataError(f"{error}; scores are written as JSONL, which names images by their files") from error
