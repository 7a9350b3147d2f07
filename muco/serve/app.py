"""The ASGI application: routes, pages, and how errors are answered; and the process that serves it."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

from muco.base.machine import leave_out_of_collections
from muco.base.terminal import print_json
from muco.errors import MucoError
from muco.precision import Precision
from muco.search.index import Index
from muco.search.lance import is_local
from muco.serve import routes
from muco.serve.engine import Item
from muco.serve.guard import LOCAL_HOSTS, OPEN, ClientGone, Guard, error_answer
from muco.serve.process import ModelProcess
from muco.serve.schema import RequestError, RequestLimits, first_error
from muco.serve.service import Served, Service
from muco.training.recipe import trained_dimensions

PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data: blob:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
JSON = re.compile(r"application/([\w.-]+\+)?json *(;|$)", re.IGNORECASE)  # what FastAPI takes for it


def build_app(served: Served) -> ASGIApp:
    """The ASGI application."""
    service = Service(served)
    api = FastAPI(title="MuCo", version="1", lifespan=service.lifespan, docs_url=None, redoc_url=None)
    api.state.service = service
    for router in (routes.openai, routes.cohere, routes.about):
        api.include_router(router)
    _add_pages(api, searched=served.index is not None)
    if served.index is not None:
        api.include_router(routes.searching)
    _add_errors(api)
    if served.token is not None:
        _describe_token(api)
    guard = Guard(api, served.limits, service.metrics, token=served.token, hosts=served.hosts)
    if not served.origins:
        return guard
    # Around the guard: a browser asks first without the token, and reads the guard's refusals too.
    return CORSMiddleware(
        guard,
        served.origins,
        allow_methods=("GET", "POST"),
        allow_headers=("*",),
        allow_private_network=True,
        expose_headers=("Retry-After",),
    )


def _add_pages(api: FastAPI, *, searched: bool) -> None:
    page = "search.html" if searched else "offer.html"
    static = files("muco.serve") / "static"
    style = (files("muco.base") / "style.css").read_bytes() + (static / "style.css").read_bytes()
    for path, content, kind in (
        ("/", (static / page).read_bytes(), "text/html"),
        ("/static/search.js", (static / "search.js").read_bytes(), "text/javascript"),
        ("/static/style.css", style, "text/css"),
    ):
        headers = {"Content-Security-Policy": PAGE_POLICY}
        file = Response(content, media_type=f"{kind}; charset=utf-8", headers=headers)
        api.add_api_route(path, partial(_same, file), include_in_schema=False)


def _describe_token(api: FastAPI) -> None:
    """Says in /openapi.json which routes need the token."""
    description = api.openapi()  # FastAPI keeps it, and answers with it
    description["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    description["security"] = [{"token": []}]
    for path in description["paths"].keys() & {*OPEN}:
        for operation in description["paths"][path].values():
            operation["security"] = []


async def _same(response: Response) -> Response:
    return response


def _add_errors(api: FastAPI) -> None:
    async def invalid(request: Request, error: Any) -> Response:
        kind = request.headers.get("content-type", "")
        if not JSON.match(kind):
            given = f"not {kind[:80]!r}" if kind else "which this request lacks"
            return error_answer(RequestError(f"send the header Content-Type: application/json, {given}", status=415))
        return error_answer(first_error(error.errors()))

    async def http(_: Request, error: Any) -> Response:
        answer = error_answer(RequestError(str(error.detail), status=error.status_code))
        answer.headers.update(error.headers or {})
        return answer

    async def refused(_: Request, error: Exception) -> Response:
        return error_answer(error if isinstance(error, RequestError) else RequestError(str(error)))

    async def defect(_: Request, error: Exception) -> Response:
        return error_answer(RequestError("the server failed at this request; its log says why", status=500))

    async def gone(_: Request, error: Exception) -> Response:
        return Response(status_code=499)  # nobody reads it; it is counted

    handlers = {RequestValidationError: invalid, HTTPException: http, MucoError: refused, ClientGone: gone}
    for kind, handler in {**handlers, Exception: defect}.items():
        api.add_exception_handler(kind, handler)


# ── the process ──────────────────────────────────────────────────────────────────────────────────────────────────────


def run_server(
    path: str,
    *,
    host: str,
    port: int,
    device: str | None,
    precision: Precision | None,
    image_memory: float,
    index: str | None,
    limits: RequestLimits,
    allowed_hosts: Sequence[str],
    **offered: Any,
) -> None:
    """Listens, loads the model and serves it until the process is told to stop.

    Args:
        path, device, precision, image_memory: As for :func:`muco.load`.
        index: Folder or URL of an index to search in; None: there is no search.
        allowed_hosts: Names that clients may call the server by, besides those of this machine. Without any, a server
            that other machines reach takes every name.
        limits, offered: See :class:`muco.serve.service.Served`.

    Raises a MucoError if the address, the model or the index cannot be used, or if the model's process ends.
    """
    codes: list[int | None] = []  # of the model's process, if it ends by itself

    def gone(code: int | None) -> None:
        codes.append(code)
        os.kill(os.getpid(), signal.SIGTERM)

    local = host in LOCAL_HOSTS
    hosts = frozenset((*LOCAL_HOSTS, *map(str.lower, allowed_hosts))) if local or allowed_hosts else None
    with _bound(host, port) as listener:
        if index is not None and is_local(index) and not Path(index).is_dir():
            raise MucoError(f"{index}: no such index; make one with muco index")
        searched = index is not None
        engine = ModelProcess(
            path,
            device,
            limits.image,
            limits.tokens,
            precision=precision,
            image_memory=image_memory,
            fingerprint=searched,
            gone=gone,
        )
        with closing(engine):
            opened = None
            if index is not None:
                opened = Index.open(index)
                opened.check(engine.facts.fingerprint, path)
            dimensions = trained_dimensions(path)
            _run(Served(engine, limits=limits, dimensions=dimensions, index=opened, hosts=hosts, **offered), listener)
    if codes:
        raise MucoError(f"the model's process ended (exit code {codes[0]}); its last messages are above")


def _bound(host: str, port: int) -> socket.socket:
    """A socket at the address. It does not listen yet, so nobody connects before there is a model."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)  # without the protocol asyncio leaves Nagle's delay on: 40 ms
    except (OSError, UnicodeError) as error:  # UnicodeError: what cannot be a name, as "a..b"
        why = error.strerror if isinstance(error, OSError) else "not a name of a machine"
        raise MucoError(f"--host {host}: {why}; name an address of this machine") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise MucoError(f"cannot listen at {host} port {port}: {error.strerror}; choose another --port") from error
    return listener


def _run(served: Served, listener: socket.socket) -> None:
    class Server(uvicorn.Server):
        async def startup(self, sockets: Sequence[socket.socket] | None = None) -> None:
            await super().startup(list(sockets or ()))
            _announce(served, listener)

    for name, text in served.instructions.items():  # better refused here than for every client that asks for it
        served.engine.prepare(Item((text or "ready?",), where=f"--instruction {name}"))
    served.engine.run([served.engine.prepare(Item(("ready?",)))])  # whatever a first pass sets up is set up now
    leave_out_of_collections()
    quiet = {"log_level": "warning", "access_log": False, "server_header": False}
    config = uvicorn.Config(build_app(served), lifespan="on", timeout_keep_alive=30, **quiet)
    # uvicorn ends after SIGTERM by raising it again, but a stop that was asked for and went well is not a failure.
    signal.signal(signal.SIGTERM, lambda *_: None)
    Server(config).run(sockets=[listener])


def _announce(served: Served, listener: socket.socket) -> None:
    host, port = listener.getsockname()[:2]
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    limits, batches, engine = served.limits, served.batches, served.engine
    lines = [
        f"{address}  model {served.name}, vectors of {engine.dimension} dimensions, on {engine.facts.device}",
        f"one request: {limits.items} items, {limits.images} images, {limits.body_bytes >> 20} MiB, "
        f"{limits.seconds:g} s; one item: {engine.max_tokens:,} tokens; one image: {limits.image.max_pixels:,} pixels",
        f"one pass: {batches.tokens:,} tokens, {batches.milliseconds:g} ms; queue: {batches.queue}",
        "search page at /" if served.index is not None else "no index, so no search",
    ]
    if host not in LOCAL_HOSTS and served.token is None:
        lines.append("anyone who can reach this address may use it: no token is set")
    print("\n".join(f"muco serve: {line}" for line in lines), file=sys.stderr)
    print_json({"address": address, "model": served.name, "dimension": engine.dimension})
