"""The routes: what is asked becomes items for the batcher, what it gives becomes an answer in the asker's shape."""

from __future__ import annotations

import asyncio
import base64
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from http import HTTPStatus
from importlib.resources import files
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic_core import to_json
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

from muco.errors import MucoError, StorageError
from muco.search.columns import in_json
from muco.serve.batcher import Batcher, BatchLimits, QueueFull, ShuttingDown
from muco.serve.engine import Embedded, Engine, Item
from muco.serve.guard import ClientGone, Guard, error_answer
from muco.serve.images import Fetcher
from muco.serve.metrics import Metrics
from muco.serve.process import ModelProcess
from muco.serve.schema import (
    EmbeddingsRequest,
    EmbedRequest,
    Limits,
    Reader,
    RequestError,
    SearchRequest,
    first_error,
)

if TYPE_CHECKING:
    from muco.search import Hit, Index

PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data: blob:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
REFUSALS = {
    status: {"description": HTTPStatus(status).phrase, "content": {"application/json": {}}}
    for status in (400, 401, 404, 408, 413, 415, 421, 500, 503)
}
JSON = re.compile(r"application/([\w.-]+\+)?json *(;|$)", re.IGNORECASE)  # what FastAPI takes for it
Answer = TypeVar("Answer")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Served:
    """What a server offers.

    Args:
        name: Of the model, as clients call it.
        dimensions: To which vectors may be cut, beside their whole length.
        index: To search in; None: there is no search.
        instructions: input_type -> instruction.
        token, hosts: See :class:`muco.serve.guard.Guard`.
        origins: Of pages elsewhere whose scripts may ask and read answers, "https://example.com"; "*": of any page.
    """

    engine: Engine | ModelProcess
    name: str
    limits: Limits = field(default_factory=Limits)
    batches: BatchLimits = field(default_factory=BatchLimits)
    dimensions: tuple[int, ...] = ()
    index: Index | None = None
    instructions: Mapping[str, str] = field(default_factory=dict)
    token: str | None = None
    hosts: frozenset[str] | None = None
    origins: tuple[str, ...] = ()


def build_app(served: Served) -> ASGIApp:
    """The ASGI application."""
    service = _Service(served)
    api = FastAPI(title="MuCo", version="1", lifespan=service.lifespan, docs_url=None, redoc_url=None)
    api.state.service = service
    _add_routes(api, service)
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


class _Service:
    def __init__(self, served: Served) -> None:
        self.served, self.started = served, int(time.time())
        self.reader = Reader(served.limits, served.instructions)
        self.batcher: Batcher[Item, Any, Embedded] = Batcher(
            served.engine.prepare, served.engine.run, served.batches, observe=lambda *sizes: self.metrics.batch(*sizes)
        )
        self.metrics = Metrics(lambda: self.batcher.unfinished)
        fetch = served.limits.image.fetch
        self.fetcher = None if fetch is None else Fetcher(fetch)

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        await self.batcher.start()
        try:
            yield
        finally:
            await self.batcher.close()
            if self.fetcher is not None:
                self.fetcher.close()

    # ------------------------------------------------------------ work

    async def embedded(self, items: Sequence[Item]) -> list[Embedded]:
        try:
            if self.fetcher is not None and any(item.images for item in items):
                items = await asyncio.gather(*map(self._with_images, items))
            results = await self.batcher.submit(items)
        except QueueFull:
            raise RequestError("too many requests wait; try again", status=503, code="queue_full") from None
        except ShuttingDown:
            raise RequestError("the server is shutting down", status=503, code="shutting_down") from None
        self.metrics.vectors.inc(sum(len(result.vectors) for result in results))
        for kind, count in _usage(results).items():
            self.metrics.tokens.labels(kind).inc(count)
        return results

    async def _with_images(self, item: Item) -> Item:
        assert self.fetcher is not None
        try:
            return replace(item, images=tuple(await self.fetcher.replace(item.images)))
        except MucoError as error:
            raise RequestError(f"{item.where}: {error}", item.where) from None

    async def answered(self, request: Request, work: Awaitable[Answer]) -> Answer:
        """The result of the work, which is cancelled when the client hangs up or the time is over."""
        task = asyncio.ensure_future(work)
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait({task, gone}, timeout=self.served.limits.seconds, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            if gone.done():
                raise ClientGone
            seconds = self.served.limits.seconds
            raise RequestError(f"not answered within {seconds:g} s; try again", status=503, code="timeout")
        finally:
            for each in (task, gone):
                each.cancel()
            await asyncio.gather(task, gone, return_exceptions=True)

    async def hits(self, request: SearchRequest) -> list[Hit]:
        index = self.served.index
        assert index is not None
        item = self.reader.search(request)
        by: dict[str, Any] = {"like": request.like}
        if item is not None:
            [result] = await self.embedded([item])
            by = {"vector": _shortened([result], index.dimension)[0]}
        search = partial(index.search, **by, k=request.k, where=request.where, exact=request.exact)
        try:
            return await run_in_threadpool(search)
        except StorageError as error:
            log.error("%s", error)
            raise RequestError("the index cannot be read; the server's log says why", status=500) from error
        except MucoError as error:  # it may name the index's folder, which is no business of the client's
            raise RequestError(str(error).removeprefix(f"{index.path}: ")) from error

    # ------------------------------------------------------------ checks

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.served.name:
            message = f"there is no such model here; this server has {self.served.name!r}"
            raise RequestError(message, "model", status=404, code="model_not_found")

    def dimension(self, asked: int | None, param: str) -> int:
        full = self.served.engine.dimension
        if asked is None or asked == full:
            return full
        if asked in self.served.dimensions:
            return asked
        if not self.served.dimensions:
            raise RequestError(f"the model's vectors have {full} numbers; it was not trained for fewer", param)
        accepted = ", ".join(map(str, sorted({*self.served.dimensions, full})))
        raise RequestError(f"the model was trained for {accepted}", param)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        continue


# ---------------------------------------------------------------- routes


def _add_routes(api: FastAPI, service: _Service) -> None:
    served = service.served

    @api.post("/v1/embeddings", responses=REFUSALS)
    async def embeddings(body: EmbeddingsRequest, request: Request) -> Response:
        """Embeds texts, items or conversations: OpenAI's and vLLM's shape."""
        service.check_model(body.model)
        dimension = service.dimension(body.dimensions, "dimensions")
        items = service.reader.embeddings(body)
        results = await service.answered(request, service.embedded(items))
        vectors = _shortened(results, dimension)
        values: list[Any] = _base64(vectors) if body.encoding_format == "base64" else vectors.tolist()
        usage = _usage(results)
        total = sum(usage.values())
        details = {"text_tokens": usage["text"], "image_tokens": usage["image"]}
        return _json(
            {
                "object": "list",
                "data": [{"object": "embedding", "index": n, "embedding": value} for n, value in enumerate(values)],
                "model": served.name,
                "usage": {"prompt_tokens": total, "total_tokens": total, "prompt_tokens_details": details},
            }
        )

    @api.post("/v2/embed", responses=REFUSALS)
    async def embed(body: EmbedRequest, request: Request) -> Response:
        """Embeds texts, images or both fused: Cohere's shape."""
        return _json(await by_type(body, request, "2"))

    @api.post("/v1/embed", responses=REFUSALS)
    async def embed_v1(body: EmbedRequest, request: Request) -> Response:
        """The same in the first version of Cohere's shape: without ``embedding_types`` there is one list of vectors."""
        answer = await by_type(body, request, "1")
        if "embedding_types" not in body.model_fields_set:
            answer |= {"embeddings": answer["embeddings"]["float"], "response_type": "embeddings_floats"}
        return _json(answer)

    async def by_type(body: EmbedRequest, request: Request, version: str) -> dict[str, Any]:
        service.check_model(body.model)
        dimension = service.dimension(body.output_dimension, "output_dimension")
        if dimension % 8 and {"binary", "ubinary"} & set(body.embedding_types):
            raise RequestError(f"{dimension} numbers do not fill whole bytes; ask for float", "embedding_types")
        items = service.reader.embed(body)
        results = await service.answered(request, service.embedded(items))
        vectors = _shortened(results, dimension)
        units = {"input_tokens": sum(_usage(results).values()), "images": sum(len(item.images) for item in items)}
        return {
            "id": str(uuid.uuid4()),
            "embeddings": {name: as_type(vectors, name) for name in dict.fromkeys(body.embedding_types)},
            "texts": body.texts or [],
            "meta": {"api_version": {"version": version}, "billed_units": units},
            "response_type": "embeddings_by_type",
        }

    @api.get("/v1/models", responses=REFUSALS)
    async def models() -> Response:
        """The model, how long its vectors are and may be, and its limits."""
        return _json({"object": "list", "data": [described()]})

    @api.get("/v1/models/{name:path}", responses=REFUSALS)
    async def model(name: str) -> Response:
        """The same of the model of that name."""
        service.check_model(name)
        return _json(described())

    def described() -> dict[str, Any]:
        return {
            "id": served.name,
            "object": "model",
            "created": service.started,
            "owned_by": "muco",
            "dimension": served.engine.dimension,
            "dimensions": sorted({*served.dimensions, served.engine.dimension}),
            "input_types": sorted(served.instructions),
            "max_tokens": served.engine.max_tokens,
            "max_items": served.limits.items,
        }

    @api.head("/health", include_in_schema=False)
    @api.get("/health", responses=REFUSALS)
    async def health() -> Response:
        """Whether the server answers."""
        return _json({"status": "ok"})

    @api.get("/metrics", responses={**REFUSALS, 200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Counters for Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    page = "search.html" if served.index is not None else "offer.html"
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

    if served.index is None:
        return

    @api.post("/search", responses=REFUSALS)
    async def search(body: SearchRequest, request: Request) -> Response:
        """Finds the rows of the index nearest to a text, an image, both, or another row."""
        return _json({"hits": [_hit(hit) for hit in await service.answered(request, service.hits(body))]})


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


# ---------------------------------------------------------------- answers


def _json(content: Mapping[str, Any]) -> Response:
    """JSON of anything that a column may hold: bytes as base64, what is no finite number as null."""
    body = to_json(content, bytes_mode="base64", inf_nan_mode="null", fallback=str)
    return Response(body, media_type="application/json")


def _usage(results: Sequence[Embedded]) -> dict[str, int]:
    images = sum(result.image_tokens for result in results)
    return {"text": sum(result.tokens for result in results) - images, "image": images}


def _shortened(results: Sequence[Embedded], dimension: int) -> np.ndarray:
    """All vectors, float32 [n, dimension], of length 1."""
    vectors = np.concatenate([result.vectors for result in results])
    if dimension == vectors.shape[1]:
        return vectors
    cut = vectors[:, :dimension]
    return cut / np.maximum(np.linalg.norm(cut, axis=1, keepdims=True), 1e-12)


def _base64(vectors: np.ndarray) -> list[str]:
    return [base64.b64encode(vector.astype("<f4").tobytes()).decode() for vector in vectors]


def as_type(vectors: np.ndarray, name: str) -> list[Any]:
    """Vectors in one of Cohere's types.

    - "int8": each vector scaled so that its largest number is 127 or -127, which leaves its direction, so compare by
      cosine. "ubinary": one bit per number, 1 where it is positive, eight to a byte. "binary": that minus 128.
    """
    if name == "float":
        return vectors.tolist()
    if name == "base64":
        return _base64(vectors)
    if name == "int8":
        largest = np.maximum(np.abs(vectors).max(axis=1, keepdims=True), 1e-12)
        return np.rint(vectors / largest * 127).astype(np.int8).tolist()
    bits = np.packbits(vectors > 0, axis=1)
    return bits.tolist() if name == "ubinary" else (bits.astype(np.int16) - 128).tolist()


def _hit(hit: Hit) -> dict[str, Any]:
    """A hit without the path of its image, which is this machine's own business."""
    thumbnail = None
    if hit.thumbnail is not None:
        thumbnail = "data:image/jpeg;base64," + base64.b64encode(hit.thumbnail).decode()
    extra = in_json(hit.extra)
    return {"id": hit.id, "score": float(hit.score), "text": hit.text, "thumbnail": thumbnail, "extra": extra}
