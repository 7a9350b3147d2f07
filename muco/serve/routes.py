"""The routes: a request becomes items to embed, and their vectors an answer in the client's shape.

One router per shape. Every route finds the server by :func:`muco.serve.service.service_of`. Answers are written here,
for speed; a ``response_model`` only describes them, since FastAPI leaves a Response as it is.
"""

from __future__ import annotations

import base64
import logging
import uuid
from collections.abc import Mapping
from functools import partial
from http import HTTPStatus
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from prometheus_client import generate_latest
from pydantic_core import to_json
from starlette.responses import Response

from muco.errors import MucoError, StorageError
from muco.search.columns import in_json
from muco.search.index import Hit
from muco.serve.answers import (
    EmbedAnswer,
    EmbeddingsAnswer,
    EmbedFirstAnswer,
    ErrorAnswer,
    HealthAnswer,
    ModelFacts,
    ModelsAnswer,
    SearchAnswer,
)
from muco.serve.schema import EmbeddingsRequest, EmbedRequest, RequestError, SearchRequest
from muco.serve.service import Service, service_of, shortened, usage

REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"description": HTTPStatus(status).phrase, "model": ErrorAnswer}
    for status in (400, 401, 404, 408, 413, 415, 421, 500, 503)
}
REFUSALS["default"] = {"description": "Any other refusal", "model": ErrorAnswer}
TEXT: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}

openai, cohere, about, searching = APIRouter(), APIRouter(), APIRouter(), APIRouter()

HIDDEN = ("image",)  # paths on this machine: clients learn them neither from hits nor by filters

log = logging.getLogger(__name__)


@openai.post("/v1/embeddings", response_model=EmbeddingsAnswer, responses=REFUSALS)
async def embeddings(body: EmbeddingsRequest, request: Request) -> Response:
    """Embeds texts, items or conversations: OpenAI's and vLLM's shape."""
    service = service_of(request)
    service.check_model(body.model)
    dimension = service.dimension(body.dimensions, "dimensions")
    items = service.reader.embeddings(body)
    results = await service.answered(request, service.embedded(items))
    vectors = shortened(results, dimension)
    values = _as_type(vectors, body.encoding_format)
    tokens = usage(results)
    total = sum(tokens.values())
    details = {"text_tokens": tokens["text"], "image_tokens": tokens["image"]}
    return _json(
        {
            "object": "list",
            "data": [{"object": "embedding", "index": n, "embedding": value} for n, value in enumerate(values)],
            "model": service.served.name,
            "usage": {"prompt_tokens": total, "total_tokens": total, "prompt_tokens_details": details},
        }
    )


@cohere.post("/v2/embed", response_model=EmbedAnswer, responses=REFUSALS)
async def embed(body: EmbedRequest, request: Request) -> Response:
    """Embeds texts, images or both fused: Cohere's shape."""
    return _json(await _by_type(body, request, "2"))


@cohere.post("/v1/embed", response_model=EmbedFirstAnswer, responses=REFUSALS)
async def embed_v1(body: EmbedRequest, request: Request) -> Response:
    """The same in the first version of Cohere's shape: without ``embedding_types`` there is one list of vectors."""
    answer = await _by_type(body, request, "1")
    if "embedding_types" not in body.model_fields_set:
        answer |= {"embeddings": answer["embeddings"]["float"], "response_type": "embeddings_floats"}
    return _json(answer)


async def _by_type(body: EmbedRequest, request: Request, version: str) -> dict[str, Any]:
    service = service_of(request)
    service.check_model(body.model)
    dimension = service.dimension(body.output_dimension, "output_dimension")
    if dimension % 8 and {"binary", "ubinary"} & set(body.embedding_types):
        raise RequestError(f"{dimension} dimensions do not fill whole bytes; request float", "embedding_types")
    items = service.reader.embed(body)
    results = await service.answered(request, service.embedded(items))
    vectors = shortened(results, dimension)
    units = {"input_tokens": sum(usage(results).values()), "images": sum(len(item.pictures) for item in items)}
    return {
        "id": str(uuid.uuid4()),
        "embeddings": {name: _as_type(vectors, name) for name in dict.fromkeys(body.embedding_types)},
        "texts": body.texts or [],
        "meta": {"api_version": {"version": version}, "billed_units": units},
        "response_type": "embeddings_by_type",
    }


def _as_type(vectors: np.ndarray, name: str) -> list[Any]:
    """Vectors in one of Cohere's types.

    - "int8": each vector scaled so that its largest component is ±127. Its direction stays: compare by cosine.
    - "ubinary": one bit per component, 1 where it is positive, eight to a byte. "binary": that minus 128.
    """
    if name == "float":
        return vectors.tolist()
    if name == "base64":
        return [base64.b64encode(vector.astype("<f4").tobytes()).decode() for vector in vectors]
    if name == "int8":
        largest = np.maximum(np.abs(vectors).max(axis=1, keepdims=True), 1e-12)
        return np.rint(vectors / largest * 127).astype(np.int8).tolist()
    bits = np.packbits(vectors > 0, axis=1)
    return bits.tolist() if name == "ubinary" else (bits.astype(np.int16) - 128).tolist()


@about.get("/v1/models", response_model=ModelsAnswer, responses=REFUSALS)
async def models(request: Request) -> Response:
    """The model, how long its vectors are and may be, and its limits."""
    return _json({"object": "list", "data": [_described(service_of(request))]})


@about.get("/v1/models/{name:path}", response_model=ModelFacts, responses=REFUSALS)
async def model(name: str, request: Request) -> Response:
    """The same of the model of that name."""
    service = service_of(request)
    service.check_model(name)
    return _json(_described(service))


def _described(service: Service) -> dict[str, Any]:
    served = service.served
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


@about.head("/health", include_in_schema=False)
@about.get("/health", response_model=HealthAnswer, responses=REFUSALS)
async def health() -> Response:
    """Whether the server answers."""
    return _json({"status": "ok"})


@about.get("/metrics", response_class=Response, responses={**REFUSALS, **TEXT})
async def metrics(request: Request) -> Response:
    """Counters for Prometheus."""
    text = generate_latest(service_of(request).metrics.registry)
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


@searching.post("/search", response_model=SearchAnswer, responses=REFUSALS)
async def search(body: SearchRequest, request: Request) -> Response:
    """Finds the rows of the index nearest to a text, an image, both, or another row."""
    service = service_of(request)
    hits = await service.answered(request, _hits(service, body))
    return _json({"hits": [_as_json(hit) for hit in hits]})


async def _hits(service: Service, request: SearchRequest) -> list[Hit]:
    index = service.served.index
    assert index is not None
    item = service.reader.search(request)
    by: dict[str, Any] = {"like": request.like}
    if item is not None:
        results = await service.embedded([item])
        by = {"vector": shortened(results, index.dimension)[0]}
    asked = {"k": request.k, "where": request.where, "exact": request.exact}
    look_up = partial(index.search, **by, **asked, hidden=HIDDEN)
    try:
        return await service.looked_up(look_up, exact=request.exact)
    except RequestError:
        raise
    except StorageError as error:
        log.error("%s", error)
        raise RequestError("the index cannot be read; the server's log says why", status=500) from error
    except MucoError as error:  # it may name the index's folder, which a client must not learn
        raise RequestError(str(error).removeprefix(f"{index.path}: ")) from error


def _as_json(hit: Hit) -> dict[str, Any]:
    """A hit without the path of its image."""
    shown = {"id": hit.id, "score": float(hit.score), "text": hit.text, "thumbnail": None, "extra": in_json(hit.extra)}
    if hit.thumbnail is not None:
        shown["thumbnail"] = "data:image/jpeg;base64," + base64.b64encode(hit.thumbnail).decode()
    return shown


def _json(content: Mapping[str, Any]) -> Response:
    """JSON of anything that a column may hold: bytes as base64, NaN and infinity as null."""
    body = to_json(content, bytes_mode="base64", inf_nan_mode="null", fallback=str)
    return Response(body, media_type="application/json")
