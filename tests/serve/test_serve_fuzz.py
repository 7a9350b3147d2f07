"""Whatever comes, no answer is a 500: requests made from our own OpenAPI description, and images of any bytes."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from PIL import Image
from servers import data_uri, picture, serving

from muco.search import Index
from muco.serve.app import Served
from muco.serve.batcher import BatchLimits
from muco.serve.engine import Engine
from muco.serve.images import ImageLimits
from muco.serve.schema import RequestLimits

SMALL = RequestLimits(body_bytes=2**20, seconds=60, tokens=256, image=ImageLimits(max_pixels=40_000))
ROUTES = (
    *("/v1/embeddings", "/v2/embed", "/search", "/v1/embed"),
    *("/v1/models", "/v1/models/{name}", "/health", "/metrics"),
)
ALLOWED = {200, 400, 404, 405, 413, 415}


@pytest.fixture(scope="module")
def client(tiny_model, tmp_path_factory) -> Iterator[httpx.Client]:
    from muco.model import load

    folder: Path = tmp_path_factory.mktemp("fuzz")
    tiny_model.save(str(folder / "model"))
    model = load(folder / "model", device="cpu")
    index = Index.create(folder / "index", model)
    rows = [
        {"id": f"r{n}", "image": picture(colour), "group": "g"} for n, colour in enumerate(("red", "green", "blue"))
    ]
    index.add(rows)
    served = Served(Engine(model, SMALL.image, SMALL.tokens), "m", SMALL, BatchLimits(milliseconds=0), index=index)
    with serving(served) as client:
        yield client


@pytest.fixture(scope="module")
def schema(client) -> Any:
    return schemathesis.openapi.from_url(f"{client.base_url}/openapi.json")


def check(answer: httpx.Response) -> None:
    assert answer.status_code in ALLOWED, (answer.status_code, answer.text)
    if answer.status_code != 200:
        error = answer.json()["error"]
        assert error["message"] and "Traceback" not in answer.text and "/work" not in answer.text


def test_the_description_names_every_route(client):
    assert set(client.get("/openapi.json").json()["paths"]) == set(ROUTES)


@pytest.mark.slow
@pytest.mark.parametrize("route", ROUTES)
def test_no_request_of_our_own_description_is_a_500(client, schema, route):
    [operation] = [found.ok() for found in schema.get_all_operations() if found.ok().path == route]

    @given(case=operation.as_strategy())
    @settings(max_examples=60 if operation.method.upper() == "POST" else 5, suppress_health_check=list(HealthCheck))
    @seed(7)
    def ask(case: Any) -> None:
        body = case.body if isinstance(case.body, dict | list | str | int | float | bool | None) else None
        check(client.request(operation.method, route, json=body))

    ask()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    "input messages turns dimensions encoding_format instruction input_type texts images inputs embedding_types "
    "truncate text image like k where exact model user continue_final_message add_special_tokens priority".split()
)
VALUES = JSON | st.sampled_from(
    ["a", ["a"], "isolated", [{"role": "user", "content": "a"}], 3, "id = 'r1'", "r1", "float"]
)


@given(st.sampled_from(ROUTES[:4]), st.dictionaries(FIELDS, VALUES, max_size=4))
@settings(max_examples=150, suppress_health_check=list(HealthCheck))
def test_no_json_is_a_500(client, route, body):
    content = json.dumps(body)  # also halves of characters, which httpx's own encoding would refuse
    check(client.post(route, content=content.encode(), headers={"Content-Type": "application/json"}))


@given(st.sampled_from(ROUTES[:4]), st.binary(max_size=200))
@settings(max_examples=50, suppress_health_check=list(HealthCheck))
def test_no_bytes_are_a_500(client, route, body):
    check(client.post(route, content=body, headers={"Content-Type": "application/json"}))


def encoded(format: str, mode: str, side: int) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(side).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(file, format)
    return file.getvalue()


WHOLE = [encoded(*kind) for kind in (("PNG", "RGB", 40), ("JPEG", "RGB", 40), ("GIF", "P", 30), ("WEBP", "RGB", 30),
                                     ("TIFF", "L", 20), ("BMP", "RGB", 20), ("PPM", "RGB", 10))]  # fmt: skip


@st.composite
def broken(draw: st.DrawFn) -> bytes:
    """A sound image with some bytes changed, and cut perhaps."""
    data = bytearray(draw(st.sampled_from(WHOLE)))
    for _ in range(draw(st.integers(0, 6))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data[: draw(st.integers(1, len(data)))])


@given(broken() | st.binary(max_size=100))
@settings(max_examples=120, suppress_health_check=list(HealthCheck))
def test_no_image_is_a_500(client, image):
    check(client.post("/v1/embeddings", json={"input": [{"image": data_uri(image)}]}))


@pytest.mark.parametrize("like", ["", "'", "r1' OR '1'='1", "\0", "\ud800", "r" * 5000, "`", "../../etc/passwd"])
def test_no_id_is_a_500(client, like):
    content = json.dumps({"like": like}).encode()
    answer = client.post("/search", content=content, headers={"Content-Type": "application/json"})
    check(answer)
    assert answer.status_code == 400


FILTERS = ["id = 'r1'", "1", "id", "(", "id = 'r1'; DROP TABLE rows", "repeat('a', 99999999) = 'a'", "a" * 3000]


@pytest.mark.parametrize("where", [*FILTERS, "id IN ('r1'", "NOT NOT NOT id = 'x'", "\ud800", "id = '\0'"])
def test_no_filter_is_a_500(client, where):
    content = json.dumps({"text": "a", "where": where}).encode()
    check(client.post("/search", content=content, headers={"Content-Type": "application/json"}))
