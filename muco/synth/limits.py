"""How a model server is asked, what that has used so far, and what it may use."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from urllib.parse import urlsplit

from muco.errors import MucoError

KEY_VARIABLE = "MUCO_API_KEY"  # not OPENAI_API_KEY: a key must not go to a server that it was not made for


class BudgetSpent(Exception):
    """The requests or tokens allowed are used up; what is under way is finished first."""


class EndpointError(MucoError):
    """An endpoint is unreachable, lacks the model, refuses the key, or answers nothing that is of use."""


@dataclass(frozen=True)
class Limits:
    """How an endpoint is asked.

    Args:
        concurrency: Requests under way at once.
        requests_per_minute: None means as fast as it goes.
        timeout: Seconds for one request, from the first byte sent to the last one read.
        retries: How often a request is sent again; three times as often while nothing else is answered either.
        max_failures: This many useless answers in a row stop the run.
        backoff: Seconds before the first retry; doubled for each further one, up to a minute.
    """

    concurrency: int = 16
    requests_per_minute: float | None = None
    timeout: float = 120.0
    retries: int = 6
    max_failures: int = 20
    backoff: float = 0.5


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

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


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
        """Counts one request.

        Raises:
            BudgetSpent: If there is nothing left.
        """
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
