"""A chat endpoint that speaks OpenAI's protocol (vLLM, SGLang, Ollama, a vendor's), asked for weeks without harm.

::

    ask ─▶ a free place (concurrency) ─▶ pace (requests per minute) ─▶ budget ─▶ POST /chat/completions ─▶ Answer
             ▲                                                                       │
             └── Retry-After, or twice as long as the last time, with jitter ◀── 408 425 429 5xx, cut, slow, nonsense

There are three kinds of failure: a question without an answer (:class:`Unanswered`), for the caller to record; a server
that refuses the key or sends too many useless answers in a row (:class:`EndpointError`) and a spent budget
(:class:`BudgetSpent`), which stop the run.
"""

from __future__ import annotations

import asyncio
import difflib
import json
import logging
import os
import random
from collections.abc import Mapping, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any

from muco.errors import MucoError
from muco.synth import chat
from muco.synth.chat import Answer, Budget, EndpointError, Limits, Message, Passing, Unanswered, Usage

if TYPE_CHECKING:
    import openai

CHAT, RERANK = "chat/completions", "rerank"  # kinds of questions, by their place under the URL
OWN_FIELDS = frozenset({"model", "messages", "response_format", "seed", "stream", "n", "tools", "query", "documents"})
RETRIED = frozenset({408, 409, 425, 429})  # and from 500 on
ROUNDS = 3  # of retries, while the server answers no question
LONGEST_WAIT = 60.0  # s, between two retries
EXAMPLE = 300  # characters shown of a server's text

log = logging.getLogger(__name__)


class Endpoint:
    """One model behind one URL.

    Args:
        url: Base of the API; "/v1" is added if it has no path.
        model: The model's name at that server; "": :meth:`check` takes the only one.
        sampling: Further fields of every request (temperature, max_tokens, top_p …).
        budget: May be shared with other endpoints.
        key_variable: Environment variable with the API key, if any. The key is in no message, log or file.
        structured: Whether ``response_format`` with a JSON schema is used; :meth:`check` finds out.
    Raises:
        EndpointError: If the URL, or a field of ``sampling``, cannot be used.
        MucoError: If the package openai is missing.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        sampling: Mapping[str, Any] | None = None,
        limits: Limits = Limits(),  # noqa: B008
        budget: Budget | None = None,
        key_variable: str = chat.KEY_VARIABLE,
        structured: bool = True,
    ) -> None:
        self.url, self.model, self.limits = chat.base_url(url), model, limits
        self.sampling = {name: value for name, value in (sampling or {}).items() if value is not None}
        if own := OWN_FIELDS & self.sampling.keys():
            raise EndpointError(f"sampling: {sorted(own)[0]!r} is set by muco; leave it out")
        self.budget, self.usage, self.structured = budget or Budget(), Usage(), structured
        self.key_variable = key_variable
        self._key = os.environ.get(key_variable, "")
        try:
            import openai
        except ImportError as error:
            raise MucoError("asking a model server needs the package openai: pip install 'muco[synth]'") from error
        # Retries are ours: counted, paced and within the budget.
        self._client = openai.AsyncOpenAI(
            base_url=self.url,
            api_key=self._key or "none",
            max_retries=0,
            timeout=limits.timeout,
            http_client=openai.DefaultAioHttpClient(timeout=limits.timeout),  # quicker than httpx, the default
        )
        self._places = asyncio.Semaphore(limits.concurrency)
        self._next_at = self._paused_until = 0.0  # of the loop's clock
        self._useless = 0  # answers in a row

    async def __aenter__(self) -> Endpoint:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()

    async def ask(
        self, messages: Sequence[Message], *, schema: Mapping[str, Any] | None = None, seed: int | None = None
    ) -> Answer:
        """The model's answer, which the caller then reports as :meth:`useful` or :meth:`useless`.

        ``schema`` (JSON) and ``seed`` are for servers that support them.

        Raises:
            Unanswered: If the server refuses this question, or answers others but not this one.
            BudgetSpent: If the budget is used up.
            EndpointError: If the key is refused, or too many answers in a row were useless.
        """
        body: dict[str, Any] = {"model": self.model, "messages": list(messages), **self.sampling}
        if seed is not None:
            body["seed"] = seed
        if schema is not None and self.structured:
            body["response_format"] = chat.response_format(schema)
        return await self._persist(body, CHAT)

    async def rank(self, query: Message | str, documents: Sequence[Message | str]) -> list[float]:
        """A reranker's score of each document for the query, in their order.

        Args:
            query, documents: Texts, or ``{"content": [parts]}`` as in a message.
        Raises:
            Unanswered, BudgetSpent, EndpointError: As :meth:`ask`.
        """
        body = {"model": self.model, "query": query, "documents": list(documents), **self.sampling}
        scores: list[float] = await self._persist(body, RERANK)
        self.useful()
        return scores

    async def _persist(self, body: dict[str, Any], kind: str) -> Any:
        for round in count(1):
            answered = self.usage.answers
            try:
                return await self._ask(body, kind)
            except Unanswered as error:
                self.usage.unanswered += 1
                self.useless(str(error))
                if not isinstance(error, Passing) or self.usage.answers > answered or round == ROUNDS:
                    raise

    def useful(self) -> None:
        """The last answer could be used."""
        self._useless = 0

    def useless(self, example: str) -> None:
        """An answer could not be used; EndpointError, with the example, after too many in a row."""
        self._useless += 1
        if self._useless >= self.limits.max_failures:
            raise EndpointError(
                f"{self.url}: {self.limits.max_failures} answers of {self.model!r} in a row were of no use; the last: "
                f"{self._shown(example)}. Fix it and run the same command again: it resumes where it stopped"
            )

    async def check(self, *, image: bool = False, schema: Mapping[str, Any] | None = None) -> None:
        """Checks before any work whether the server is up, has the model, sees images and keeps to schemas.

        Asks for the list of models, if there is one, and one small question. If the server refuses ``response_format``,
        logs that, sets :attr:`structured` to False and no longer sends it. EndpointError if it cannot be reached, the
        model or the key is wrong, or the question fails; BudgetSpent if the budget is used up.
        """
        await self._find_model()
        body: dict[str, Any] = {"model": self.model, "messages": [chat.trial(image)], **self.sampling}
        if schema is not None:
            try:
                await self._ask(body | {"response_format": chat.response_format(schema)}, CHAT)
                return
            except Unanswered as error:
                if isinstance(error, Passing):
                    raise EndpointError(f"{self.url}: a first question failed: {error}") from error
                refusal = error
        await self._first(body, CHAT, " with an image" if image else "")
        if schema is not None:
            self.structured = False
            log.warning("%s refuses response_format, so its answers keep to no schema: %s", self.url, refusal)

    async def check_ranking(self, *, image: bool = False) -> None:
        """Checks the same of a rerank endpoint."""
        await self._find_model()
        seen = [{"content": chat.trial(True)["content"]}] if image else ["Another test."]
        body = {"model": self.model, "query": "A test?", "documents": ["This is a test.", *seen], **self.sampling}
        await self._first(body, RERANK, " with an image" if image else "")

    async def _first(self, body: Mapping[str, Any], kind: str, about: str) -> None:
        try:
            await self._ask(body, kind)
        except Unanswered as error:
            raise EndpointError(f"{self.url}: {self.model!r} refuses a first question{about}: {error}") from error

    async def _find_model(self) -> None:
        """Takes the only model if none was named; an EndpointError if the one that was named is not there."""
        names = await self._models()
        serves = "has no list of its models"
        if names is not None:
            serves = f"serves {', '.join(names[:10]) or 'no model'}" + (" …" if len(names) > 10 else "")
        if not self.model:
            if names is None or len(names) != 1:
                raise EndpointError(f"{self.url}: {serves}; name the one to ask")
            self.model = names[0]
        if names is not None and self.model not in names and f"{self.model}:latest" not in names:  # as Ollama has them
            near = difflib.get_close_matches(self.model, names, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise EndpointError(f"{self.url}: no model {self.model!r}; {hint}It {serves}")

    async def _ask(self, body: Mapping[str, Any], kind: str) -> Any:
        for attempt in count():
            try:
                answer = await self._send(body, kind)
            except Passing as error:
                if attempt == self.limits.retries:
                    raise
                self.usage.retries += 1
                log.debug("%s: %s; trying again", self.url, error)
                longest = min(self.limits.backoff * 2**attempt, LONGEST_WAIT)
                await asyncio.sleep(longest * random.uniform(0.5, 1))
            else:
                self.usage.answers += 1
                return answer

    async def _send(self, body: Mapping[str, Any], kind: str) -> Any:
        import openai

        async with self._places:
            clock = asyncio.get_running_loop().time
            while (left := self._paused_until - clock()) > 0:
                await asyncio.sleep(left * random.uniform(1, 1.1))  # not all at the same moment
            if self.limits.requests_per_minute:
                at = max(self._next_at, clock())
                self._next_at = at + 60 / self.limits.requests_per_minute
                await asyncio.sleep(at - clock())
            self.budget.take()
            self.usage.requests += 1
            try:
                async with asyncio.timeout(self.limits.timeout):
                    raw = await self._client.post(f"/{kind}", body=body, cast_to=bytes)
            except openai.APIStatusError as error:
                raise self._refused(error) from error
            except (TimeoutError, openai.APITimeoutError) as error:
                raise Passing(f"no answer within {self.limits.timeout:g} s") from error
            except openai.APIConnectionError as error:
                raise Passing(f"no connection ({chat.cause_of(error)})") from error
        ranked = kind == RERANK
        try:
            answer, usage = chat.read_ranking(raw, len(body["documents"])) if ranked else chat.read_answer(raw)
        except ValueError as error:
            said = self._shown(raw[: 4 * EXAMPLE].decode("utf-8", "replace"))
            raise Passing(f"not an answer of a {'rerank' if ranked else 'chat'} endpoint: {said}") from error
        sent = [body["query"], *body["documents"]] if ranked else body["messages"]
        self._count(usage, sum(map(chat.length, sent)), 0 if ranked else len(answer.text))
        return answer

    def _refused(self, error: openai.APIStatusError) -> Unanswered:
        said = self._shown(f"HTTP {error.status_code}: {error.response.text}")
        if error.status_code == 401:
            raise EndpointError(
                f"{self.url}: the API key is refused; put a right one into the environment variable "
                f"{self.key_variable} ({said})"
            ) from error
        if error.status_code not in RETRIED and error.status_code < 500:
            return Unanswered(said)
        if (seconds := chat.retry_after(error.response.headers)) is not None:
            until = asyncio.get_running_loop().time() + seconds
            self._paused_until = max(self._paused_until, until)  # for all: one is answered for all of them
        return Passing(said)

    def _count(self, usage: Any, sent: int, written: int) -> None:
        """Counts the tokens of an answer; as estimated by the characters where the server does not say."""
        known = usage if isinstance(usage, dict) else {}
        if "completion_tokens" not in known and not written:  # a ranking
            known = {"prompt_tokens": known.get("prompt_tokens", known.get("total_tokens")), "completion_tokens": 0}
        counts = [known.get(f"{part}_tokens") for part in ("prompt", "completion")]
        if not all(isinstance(count, int) and count >= 0 for count in counts):
            self.usage.estimated += 1
            counts = [sent // 4, written // 4]
        self.usage.prompt_tokens += counts[0]
        self.usage.completion_tokens += counts[1]
        self.budget.used_tokens += sum(counts)

    async def _models(self) -> list[str] | None:
        """The names of the models; None if the server has no list."""
        import openai

        try:
            async with asyncio.timeout(self.limits.timeout):
                raw = await self._client.get("/models", cast_to=bytes)
        except openai.APIStatusError as error:
            if error.status_code == 401:
                raise self._refused(error) from error
            return None
        except (openai.APIConnectionError, TimeoutError) as error:
            reason = f"cannot be reached ({chat.cause_of(error)}); start the server, or fix the URL"
            raise EndpointError(f"{self.url}: {reason}") from error
        try:
            return [str(model["id"]) for model in json.loads(raw)["data"]]
        except (ValueError, LookupError, TypeError):
            return None

    def _shown(self, text: str) -> str:
        """The beginning of a server's text, in one line, without the key."""
        text = " ".join(text.split())
        if self._key:
            text = text.replace(self._key, "…")
        return text if len(text) <= EXAMPLE else text[:EXAMPLE] + " …"
