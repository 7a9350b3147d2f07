"""Limits and budgets of a model server, its answers, and the messages to it."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from time import time
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from muco.errors import MucoError

if TYPE_CHECKING:
    from muco.dialogue import ImageLike

KEY_VARIABLE = "MUCO_API_KEY"  # not OPENAI_API_KEY: a key must only go to the server it was made for


class BudgetSpent(Exception):
    """The requests or tokens allowed are used up; what is under way is finished first."""


class EndpointError(MucoError):
    """An endpoint is unreachable, lacks the model, refuses the key, or sends no useful answers."""


@dataclass(frozen=True)
class Limits:
    """How fast and how often an endpoint is asked."""

    concurrency: int = 16  # requests under way at once
    requests_per_minute: float | None = None  # None: no limit
    timeout: float = 120.0  # seconds per request, from the first byte sent to the last one read
    retries: int = 6  # three times as many while nothing else is answered either
    max_failures: int = 20  # useless answers in a row that stop the run
    backoff: float = 0.5  # seconds before the first retry; doubles each time, up to a minute


@dataclass
class Usage:
    """Requests to an endpoint in this run; the server did not count the tokens of ``estimated`` answers."""

    requests: int = 0
    retries: int = 0
    answers: int = 0
    unanswered: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    estimated: int = 0


@dataclass
class Budget:
    """Requests and tokens that a run may use over all its endpoints; None: no limit.

    Tokens are counted when an answer arrives, so requests then under way may exceed the budget.
    """

    requests: int | None = None
    tokens: int | None = None
    used_requests: int = field(default=0, init=False)
    used_tokens: int = field(default=0, init=False)

    def take(self) -> None:
        """Counts one request; BudgetSpent if there is nothing left."""
        if self.requests is not None and self.used_requests >= self.requests:
            raise BudgetSpent(f"the budget of {self.requests:,} requests is spent")
        if self.tokens is not None and self.used_tokens >= self.tokens:
            raise BudgetSpent(f"the budget of {self.tokens:,} tokens is spent")
        self.used_requests += 1


def base_url(url: str) -> str:
    """The URL of an API, with "/v1" if it has no path; EndpointError if it is invalid."""
    parts = urlsplit(url.strip())
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise EndpointError(f"{url!r} is not the URL of an endpoint; pass one such as http://localhost:8000/v1")
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        where = f"{parts.scheme}://{parts.hostname}"  # the rest may be a secret
        raise EndpointError(f"{where}: a URL of an endpoint ends with its path; a key belongs in {KEY_VARIABLE}")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/') or '/v1'}"


LONGEST_RETRY_AFTER = 3600.0  # s


class Unanswered(Exception):
    """A question got no answer; ``str`` says why."""


class Passing(Unanswered):
    """No answer for now; asking later may help."""


@dataclass(frozen=True)
class Answer:
    """A model's answer.

    Attributes:
        finish: The server's reason why it ended ("stop", "length", "content_filter").
        first: The likeliest first tokens and their log-probabilities, if the request asked for ``logprobs``.
    """

    text: str
    finish: str = "stop"
    first: Mapping[str, float] = field(default_factory=dict)


def read_answer(raw: bytes) -> tuple[Answer, Any]:
    """The answer in the body of a chat completion, and its ``usage`` or None; ValueError for any other body."""
    try:
        value = json.loads(raw)
        choice = value["choices"][0]
        message = choice["message"]
        text, refusal = message.get("content"), message.get("refusal")
        finish, usage = str(choice.get("finish_reason") or "stop"), value.get("usage")
        tokens = (choice.get("logprobs") or {}).get("content") or [{}]
        first = {str(one["token"]): float(one["logprob"]) for one in tokens[0].get("top_logprobs") or ()}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError("not a chat completion") from error
    if refusal and not text:
        return Answer(str(refusal), "refusal"), usage
    text = text if isinstance(text, str) else ""
    said = re.sub(r"\A\s*<think>.*?</think>", "", text, flags=re.DOTALL)  # thoughts, if the server leaves them in
    return Answer(said.strip(), finish, first), usage


def read_ranking(raw: bytes, count: int) -> tuple[list[float], Any]:
    """The scores of ``count`` documents, in their order, in the answer of a rerank endpoint, and its ``usage`` or None.

    A ValueError for any other body, or if a score is missing or not finite.
    """
    try:
        value = json.loads(raw)
        found = {int(one["index"]): float(one["relevance_score"]) for one in value["results"]}
        scores = [found[number] for number in range(count)]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError("not a ranking of all documents") from error
    if not all(map(math.isfinite, scores)):
        raise ValueError("a score is not finite")
    return scores, value.get("usage")


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks us to wait, at most an hour; None if it does not say."""
    value = headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time()
        except ValueError:
            return None
    return min(seconds, LONGEST_RETRY_AFTER) if seconds > 0 else 0.0  # NaN becomes 0


def cause_of(error: BaseException) -> str:
    """The innermost reason, more telling than "Connection error"."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split()) or type(error).__name__


def seed_of(*parts: object) -> int:
    """A seed of 31 bits determined by the parts, so that a later run repeats the sampling."""
    return int(hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()[:8], 16) >> 1


QUALITY = 92  # of JPEGs sent
IMAGE_LENGTH = 4000  # characters per image, for servers that do not count tokens

Message = dict[str, Any]


def user(*parts: str | Message) -> Message:
    """A user's message of texts and of images from :func:`image_part`."""
    if len(parts) == 1 and isinstance(parts[0], str):
        return {"role": "user", "content": parts[0]}  # the form that every server knows
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return {"role": "user", "content": content}


def image_parts(image: ImageLike, max_pixels: int) -> list[Message]:
    """An image, or the frames of a video, each as :func:`image_part` makes it."""
    from muco.images import pictures

    return [image_part(picture, max_pixels) for picture in pictures(image)]


def image_part(image: ImageLike, max_pixels: int) -> Message:
    """An image as a data URI: upright RGB, at most ``max_pixels`` pixels, JPEG; ImageError if it cannot be read."""
    from muco.images import open_image, resize_to_budget

    buffer = io.BytesIO()
    resize_to_budget(open_image(image), max_pixels).save(buffer, "JPEG", quality=QUALITY, subsampling=0)
    encoded = base64.b64encode(buffer.getvalue()).decode("ascii")
    return {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{encoded}"}}


def trial(image: bool) -> Message:
    """A first question that any model can answer, with or without an image."""
    if not image:
        return user("This is a test. Answer with a few words, as JSON where that is asked of you.")
    from PIL import Image

    return user(image_part(Image.new("RGB", (64, 64), "gray"), 64 * 64), "This is a test. Which colour is it?")


def response_format(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The field of a request that constrains the answer to a JSON schema."""
    return {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": dict(schema)}}


def length(message: Message | str) -> int:
    """Characters of a message, or of what is ranked."""
    content = message if isinstance(message, str) else message["content"]
    if isinstance(content, str):
        return len(content)
    return sum(len(part["text"]) if part["type"] == "text" else IMAGE_LENGTH for part in content)
