"""What a chat endpoint sends back: an answer, a wish to wait, or nothing of use."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from time import time
from typing import Any

LONGEST_RETRY_AFTER = 3600.0  # s


class Unanswered(Exception):
    """One question got no answer; ``str`` says why."""

    passing = False  # whether asking later may help


class Passing(Unanswered):
    """No answer for now; asking later may help."""

    passing = True


@dataclass(frozen=True)
class Answer:
    """What a model said; ``finish`` is the server's word for why it stopped ("stop", "length", "content_filter")."""

    text: str
    finish: str = "stop"


def read_answer(raw: bytes) -> tuple[Answer, Any]:
    """The answer in the body of a chat completion, and the ``usage`` that the server tells, if it does.

    Raises:
        ValueError: If the body is something else.
    """
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
    return Answer(_without_thoughts(text) if isinstance(text, str) else "", finish), usage


def _without_thoughts(text: str) -> str:
    """What a reasoning model says after it has thought, where the server leaves the thoughts in."""
    return re.sub(r"\A\s*<think>.*?</think>", "", text, flags=re.DOTALL).strip()


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks us to wait, at most an hour; None if it does not say."""
    value = headers.get("retry-after")
    if value is None:
        return None
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
