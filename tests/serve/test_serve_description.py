"""What /openapi.json says of answers, against the answers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import pytest
from servers import data_uri, picture, serving

from muco.search import Index
from muco.serve.app import Served
from muco.serve.engine import Engine
from muco.serve.images import ImageLimits

RED = data_uri(picture("red"))
TYPES = ["float", "int8", "binary", "ubinary", "base64"]
ANSWERED: list[tuple[str, str, Any]] = [
    ("/v1/embeddings", "/v1/embeddings", {"input": ["a", {"text": "b", "image": RED}]}),
    ("/v1/embeddings", "/v1/embeddings", {"input": "a", "encoding_format": "base64"}),
    ("/v2/embed", "/v2/embed", {"texts": ["a"]}),
    ("/v2/embed", "/v2/embed", {"images": [RED], "embedding_types": TYPES}),
    ("/v1/embed", "/v1/embed", {"texts": ["a"]}),
    ("/v1/embed", "/v1/embed", {"texts": ["a"], "embedding_types": TYPES}),
    ("/search", "/search", {"text": "a"}),
    ("/search", "/search", {"like": "both", "exact": True}),
    ("/v1/models", "/v1/models", None),
    ("/v1/models/{name}", "/v1/models/little", None),
    ("/health", "/health", None),
    ("/metrics", "/metrics", None),
]
REFUSED: list[tuple[str, str, Any, int]] = [
    ("/v1/embeddings", "/v1/embeddings", {"input": 3}, 400),
    ("/v2/embed", "/v2/embed", {}, 400),
    ("/search", "/search", {"like": "nobody"}, 400),
    ("/v1/models/{name}", "/v1/models/other", None, 404),
    ("/v1/embeddings", "/v1/embeddings", None, 405),
]


@pytest.fixture(scope="module")
def client(tiny_model, tmp_path_factory) -> Iterator[httpx.Client]:
    from muco.model import load

    folder = tmp_path_factory.mktemp("described")
    tiny_model.save(str(folder / "model"))
    model = load(folder / "model", device="cpu")
    index = Index.create(folder / "index", model)
    index.add([{"id": "both", "image": picture("red"), "text": "a", "year": 2020}, {"id": "text", "text": "b"}])
    served = Served(Engine(model, ImageLimits(), 2048), "little", index=index, token="secret")
    with serving(served) as client:
        client.headers["Authorization"] = "Bearer secret"
        yield client


@pytest.fixture(scope="module")
def description(client) -> dict[str, Any]:
    return client.get("/openapi.json").json()


def closed(schema: Any) -> Any:
    """The schema, by which an object has no other fields than the described ones."""
    if isinstance(schema, list):
        return [*map(closed, schema)]
    if not isinstance(schema, dict):
        return schema
    inner = {key: closed(value) for key, value in schema.items()}
    return inner | {"additionalProperties": False} if "properties" in inner else inner


def check(description: dict[str, Any], route: str, answer: httpx.Response) -> None:
    """The answer is of the media type and the shape that the description gives it."""
    kind = answer.headers["content-type"].partition(";")[0]
    [operation] = description["paths"][route].values()
    responses = operation["responses"]
    content = responses.get(str(answer.status_code), responses.get("default"))["content"]
    assert [*content] == [kind] and content[kind]["schema"], "described, and as nothing else"
    components = {"schemas": closed(description["components"]["schemas"])}
    value = answer.json() if kind == "application/json" else answer.text
    jsonschema.Draft202012Validator({**content[kind]["schema"], "components": components}).validate(value)


@pytest.mark.parametrize(("route", "path", "body"), ANSWERED)
def test_an_answer_is_as_described(client, description, route: str, path: str, body: Any) -> None:
    answer = client.get(path) if body is None else client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    check(description, route, answer)


def test_every_route_is_compared(description) -> None:
    assert {route for route, _, _ in ANSWERED} == set(description["paths"])


@pytest.mark.parametrize(("route", "path", "body", "status"), REFUSED)
def test_a_refusal_is_as_described(client, description, route: str, path: str, body: Any, status: int) -> None:
    answer = client.get(path) if body is None else client.post(path, json=body)
    assert answer.status_code == status, answer.text
    check(description, route, answer)


def test_no_status_is_described_that_never_comes(description) -> None:
    operations = [operation for path in description["paths"].values() for operation in path.values()]
    assert operations and all("422" not in operation["responses"] for operation in operations)


def test_the_token_is_described_where_it_is_asked_for(client, description) -> None:
    assert description["components"]["securitySchemes"] == {"token": {"type": "http", "scheme": "bearer"}}
    for route, path, body in ANSWERED:
        for method, operation in description["paths"][route].items():
            asked = bool(operation.get("security", description["security"]))
            answer = client.request(method, path, json=body, headers={"Authorization": ""})
            assert (answer.status_code == 401) == asked, route
            if asked:
                check(description, route, answer)
