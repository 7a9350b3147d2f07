"""What goes to a model server, what comes back, and what may be used."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from time import time
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from muco.errors import MucoError

if TYPE_CHECKING:
    from muco.dialogue import ImageLike

# ── what may be used ──────────────────────────────────────────────────────────────────────────────────────────────────

KEY_VARIABLE = "MUCO_API_KEY"  # not OPENAI_API_KEY: a key must not go to a server that it was not made for


class BudgetSpent(Exception):
    """The requests or tokens allowed are used up; what is under way is finished first."""


class EndpointError(MucoError):
    """An endpoint is unreachable, lacks the model, refuses the key, or answers nothing that is of use."""


@dataclass(frozen=True)
class Limits:
    """How an endpoint is asked."""

    concurrency: int = 16  # requests under way at once
    requests_per_minute: float | None = None  # None: as fast as it goes
    timeout: float = 120.0  # seconds for one request, from the first byte sent to the last one read
    retries: int = 6  # three times as many while nothing else is answered either
    max_failures: int = 20  # useless answers in a row that stop the run
    backoff: float = 0.5  # seconds before the first retry; doubled for each further one, up to a minute


@dataclass
class Usage:
    """What was asked of an endpoint in this run. Of ``estimated`` answers the server did not count the tokens."""

    requests: int = 0
    retries: int = 0
    answers: int = 0
    unanswered: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    estimated: int = 0


@dataclass
class Budget:
    """Requests and tokens that a run may use, over all of its endpoints; None means no limit.

    Tokens are known when an answer is there, so that the requests then under way may go beyond the budget.
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
    """The URL of an API, with "/v1" where it has no path; EndpointError if it cannot be one."""
    parts = urlsplit(url.strip())
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise EndpointError(f"{url!r} is not the URL of an endpoint; pass one such as http://localhost:8000/v1")
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        where = f"{parts.scheme}://{parts.hostname}"  # the rest may be a secret
        raise EndpointError(f"{where}: a URL of an endpoint ends with its path; a key belongs into {KEY_VARIABLE}")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/') or '/v1'}"


# ── answers ───────────────────────────────────────────────────────────────────────────────────────────────────────────

LONGEST_RETRY_AFTER = 3600.0  # s


class Unanswered(Exception):
    """One question got no answer; ``str`` says why."""


class Passing(Unanswered):
    """No answer for now; asking later may help."""


@dataclass(frozen=True)
class Answer:
    """What a model said; ``finish`` is the server's word for why it stopped ("stop", "length", "content_filter")."""

    text: str
    finish: str = "stop"


def read_answer(raw: bytes) -> tuple[Answer, Any]:
    """The answer in the body of a chat completion, and the ``usage`` if told; ValueError for any other body."""
    try:
        value = json.loads(raw)
        choice = value["choices"][0]
        message = choice["message"]
        text, refusal = message.get("content"), message.get("refusal")
        finish, usage = str(choice.get("finish_reason") or "stop"), value.get("usage")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError("not a chat completion") from error
    if refusal and not text:
        return Answer(str(refusal), "refusal"), usage
    text = text if isinstance(text, str) else ""
    thoughtless = re.sub(r"\A\s*<think>.*?</think>", "", text, flags=re.DOTALL)  # where the server leaves them in
    return Answer(thoughtless.strip(), finish), usage


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks us to wait, at most an hour; None if it does not say."""
    value = headers.get("retry-after")
    if value is None:
        return None
    from email.utils import parsedate_to_datetime

    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time()
        except ValueError:
            return None
    return min(seconds, LONGEST_RETRY_AFTER) if seconds > 0 else 0.0  # NaN becomes 0


def cause_of(error: BaseException) -> str:
    """The innermost reason, which says more than "Connection error"."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split()) or type(error).__name__


def seed_of(*parts: object) -> int:
    """A seed of 31 bits that the parts alone determine, for sampling that a later run repeats."""
    return int(hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()[:8], 16) >> 1


# ── messages ──────────────────────────────────────────────────────────────────────────────────────────────────────────

QUALITY = 92  # of the JPEG that is sent
IMAGE_LENGTH = 4000  # characters that an image counts as, where a server does not count tokens

Message = dict[str, Any]


def user(*parts: str | Message) -> Message:
    """A user's message of texts and of images as :func:`image_part` makes them."""
    if len(parts) == 1 and isinstance(parts[0], str):
        return {"role": "user", "content": parts[0]}  # the form that every server knows
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return {"role": "user", "content": content}


def image_part(image: ImageLike, max_pixels: int) -> Message:
    """An image as a data URI: upright RGB, at most ``max_pixels`` pixels, JPEG; may raise ImageError."""
    from muco.images import open_image, resize_to_budget

    buffer = io.BytesIO()
    resize_to_budget(open_image(image), max_pixels).save(buffer, "JPEG", quality=QUALITY, subsampling=0)
    encoded = base64.b64encode(buffer.getvalue()).decode("ascii")
    return {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{encoded}"}}


def trial(image: bool) -> Message:
    """A first question, which any model can answer, with an image or without."""
    if not image:
        return user("This is a test. Answer with a few words, as JSON where that is asked of you.")
    from PIL import Image

    return user(image_part(Image.new("RGB", (64, 64), "gray"), 64 * 64), "This is a test. Which colour is it?")


def response_format(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The field of a request that holds the answer to a JSON schema."""
    return {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": dict(schema)}}


def length(message: Message) -> int:
    """Characters of a message."""
    content = message["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return sum(len(part["text"]) if part["type"] == "text" else IMAGE_LENGTH for part in parts)
