"""The guard before every route: who may ask, how much may come, what every answer says to browsers, what is counted."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import time
from collections.abc import Callable, Collection, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from pydantic_core import to_json
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from muco.serve.schema import RequestError, RequestLimits

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Metrics:
    """Counters for Prometheus; one registry per server, so that several can live in one process."""

    def __init__(self, unfinished: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        own = {"registry": self.registry}
        self.requests = Counter("muco_requests", "Requests answered, by route and status", ("route", "status"), **own)
        self.seconds = Histogram("muco_request_seconds", "Seconds of a request", ("route",), buckets=SECONDS, **own)
        self.vectors = Counter("muco_vectors", "Vectors computed", **own)
        self.tokens = Counter("muco_tokens", "Tokens embedded, by kind", ("kind",), **own)
        self.items = Histogram("muco_batch_items", "Items of a forward pass", buckets=SIZES, **own)
        self.padded = Counter("muco_padded_tokens", "Tokens passed, padding included", **own)
        Gauge("muco_unfinished_items", "Items accepted and not yet answered", **own).set_function(unfinished)

    def batch(self, items: int, padded_tokens: int) -> None:
        self.items.observe(items)
        self.padded.inc(padded_tokens)


HEALTH = "/health"  # asked under any name: a probe calls the server by its address, and learns only that it answers
OPEN = ("/", HEALTH, "/static/search.js", "/static/style.css")  # no token: they show nothing of anybody
LOCAL_HOSTS = frozenset(("localhost", "127.0.0.1", "::1"))
BODIES = 4  # of the largest size, held at once by all requests together
STRUCTURE = 2**20  # bytes of JSON outside of strings: what a parser makes many objects of

# A string that does not end reaches to the end of the text: tried again from every quote in it, it would cost a square.
STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)
BRACKET = re.compile(rb"[\[\]{}]")

HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}


class ClientGone(Exception):
    """The client has hung up; nobody reads an answer."""


def error_answer(error: RequestError) -> Response:
    """OpenAI's error object; beside it is ``message``, for clients of Cohere."""
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    message = str(error)[:500]
    content = {"message": message, "type": kind, "param": error.param, "code": error.code}
    headers = {413: {"Connection": "close"}, 503: {"Retry-After": "1"}, 401: {"WWW-Authenticate": "Bearer"}}
    return Response(
        to_json({"error": content, "message": message}),
        error.status,
        headers.get(error.status),
        media_type="application/json",
    )


class Guard:
    """An ASGI application around another one.

    Args:
        token: That every request but those for OPEN must bring; None: anyone may ask.
        hosts: Names by which this server may be called but for HEALTH, so that no page of another site reaches it under
            a name that suddenly leads here (DNS rebinding); None: any. A request without a name is of no browser, so it
            may pass.
    """

    def __init__(
        self, app: ASGIApp, limits: RequestLimits, metrics: Metrics, *, token: str | None, hosts: Collection[str] | None
    ) -> None:
        self.app, self.limits, self.metrics, self.hosts = app, limits, metrics, hosts
        self._token = None if token is None else _digest(token.encode())
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started, status, held = time.perf_counter(), 499, [0]

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                present = {name.lower() for name, _ in message["headers"]}
                missing = ((k.lower().encode(), v.encode()) for k, v in HEADERS.items())
                message["headers"] = [*message["headers"], *(h for h in missing if h[0] not in present)]
            await send(message)

        try:
            headers = dict(scope["headers"])
            self._check_head(scope["path"], headers)
            if scope["method"] == "POST":
                receive = await self._read(headers, receive, held)
            await self.app(scope, receive, answer)
        except RequestError as error:
            await error_answer(error)(scope, receive, answer)
        except ClientGone:
            return
        finally:
            self._held -= held[0]
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(route, status).inc()
            self.metrics.seconds.labels(route).observe(time.perf_counter() - started)

    def _check_head(self, path: str, headers: Mapping[bytes, bytes]) -> None:
        host = None if path == HEALTH else headers.get(b"host")
        if self.hosts is not None and host is not None and host_name(host) not in self.hosts:
            raise RequestError("this server is not called by that name; see --allow-host", status=421)
        if self._token is None or path in OPEN:
            return
        kind, _, given = headers.get(b"authorization", b"").partition(b" ")
        # Digests are compared, so that the time tells neither the token's length nor where it differs.
        if not hmac.compare_digest(_digest(given.strip()), self._token) or kind.lower() != b"bearer":
            raise RequestError("send the server's token as Authorization: Bearer …", status=401, code="unauthorized")

    async def _read(self, headers: Mapping[bytes, bytes], receive: Receive, held: list[int]) -> Receive:
        """Reads the whole body and checks its form; returns what the application receives it by."""
        coding = headers.get(b"content-encoding", b"identity").decode("latin-1")
        if coding.lower() != "identity":
            raise RequestError(f"send the body as it is, without Content-Encoding: {coding[:40]}", status=415)
        try:
            async with asyncio.timeout(self.limits.seconds):
                body = await self._body(headers.get(b"content-length", b"0"), receive, held)
        except TimeoutError:
            raise RequestError("the body did not come in time", status=408) from None
        check_form(body, self.limits.depth)
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        return replay

    async def _body(self, announced: bytes, receive: Receive, held: list[int]) -> bytes:
        most = self.limits.body_bytes
        too_large = RequestError(f"the body has more than {most:,} bytes", status=413, code="body_too_large")
        if not announced.isdigit() or int(announced[:20]) > most:
            raise too_large
        parts = []
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            part = message.get("body", b"")
            parts.append(part)
            held[0] += len(part)
            self._held += len(part)
            if held[0] > most:
                raise too_large
            if self._held > BODIES * most:
                raise RequestError("the server is busy; try again", status=503, code="busy")
            if not message.get("more_body"):
                return b"".join(parts)


def check_form(body: bytes, depth: int) -> None:
    """Refuses JSON that is nested deeply or made of too many parts, before a parser sees it.

    Raises a RequestError if it is, or is not UTF-8.
    """
    try:
        body.decode()
    except UnicodeDecodeError as error:
        raise RequestError(f"the body is not UTF-8 (byte {error.start}); encode the JSON as UTF-8") from None
    if b"\0" in body:
        raise RequestError("the body is not valid JSON in UTF-8")
    skeleton = STRING.sub(b"", body)
    if len(skeleton) > STRUCTURE:
        raise RequestError(f"the body has more than {STRUCTURE:,} bytes of JSON outside of strings", status=413)
    level = 0
    for bracket in BRACKET.finditer(skeleton):
        level += 1 if bracket[0] in b"[{" else -1
        if level > depth:
            raise RequestError(f"the body's JSON is nested deeper than {depth}", code="too_deep")


def host_name(header: bytes) -> str:
    """The name in a Host header, without port, and an IPv6 address without brackets."""
    name = header.decode("latin-1").lower()
    return name[1:].split("]")[0] if name.startswith("[") else name.split(":")[0].rstrip(".")


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()
