"""The ASGI application: routes, pages, and how errors are answered."""

from __future__ import annotations

import re
from functools import partial
from importlib.resources import files

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

from muco.errors import MucoError
from muco.serve import routes
from muco.serve.guard import ClientGone, Guard, error_answer
from muco.serve.schema import RequestError, first_error
from muco.serve.service import Served, Service

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


async def _same(response: Response) -> Response:
    return response


def _add_errors(api: FastAPI) -> None:
    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        kind = request.headers.get("content-type", "")
        if not JSON.match(kind):
            given = f"not {kind[:80]!r}" if kind else "which this request lacks"
            return error_answer(RequestError(f"send the header Content-Type: application/json, {given}", status=415))
        return error_answer(first_error(error.errors()))

    async def http(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        answer = error_answer(RequestError(str(error.detail), status=error.status_code))
        answer.headers.update(error.headers or {})
        return answer

    async def refused(_: Request, error: Exception) -> Response:
        return error_answer(error if isinstance(error, RequestError) else RequestError(str(error)))

    async def defect(_: Request, error: Exception) -> Response:
        return error_answer(RequestError("the server failed at this request; its log says why", status=500))

    async def gone(_: Request, error: Exception) -> Response:
        return Response(status_code=499)  # nobody reads it; it is counted

    api.add_exception_handler(RequestValidationError, invalid)
    api.add_exception_handler(HTTPException, http)
    api.add_exception_handler(MucoError, refused)
    api.add_exception_handler(ClientGone, gone)
    api.add_exception_handler(Exception, defect)
