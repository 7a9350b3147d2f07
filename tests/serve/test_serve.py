"""The server: its shapes against the model itself, its limits, its security, its end; over real connections."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import site_server
from hypothesis import given, settings
from hypothesis import strategies as st
from servers import SOON, command, data_uri, picture, serving, until, vectors_of

from muco.base.fetch import FetchLimits
from muco.cli import main
from muco.cli.serve import TOKEN, _fetch_limits, _host, _origin, _token
from muco.errors import MucoError
from muco.serve.app import Served, _announce
from muco.serve.batcher import BatchLimits
from muco.serve.engine import Engine, Item
from muco.serve.fetching import Fetcher
from muco.serve.guard import STRUCTURE, check_form, host_name
from muco.serve.images import ImageLimits, check_source, decode
from muco.serve.look_ups import LOOK_UPS
from muco.serve.schema import RequestError, RequestLimits
from muco.serve.service import Service

ROOT = Path(__file__).parents[2]
RED, BLUE = data_uri(picture("red")), data_uri(picture("blue"))
USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": ""}
TINY = RequestLimits(
    body_bytes=200_000, depth=8, seconds=20, items=4, turns=3, images=2, characters=500, tokens=200,
    image=ImageLimits(max_bytes=20_000, max_pixels=10_000),
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory) -> Path:
    """The tiny model as training leaves one; trained for vectors of 16 and 32 numbers too."""
    folder = tmp_path_factory.mktemp("served") / "little"
    tiny_model.save(str(folder))
    (folder / "recipe.yaml").write_text("loss: {dimensions: [32, 16]}\n")
    return folder


@pytest.fixture(scope="module")
def engine(folder) -> Engine:
    from muco.model import load

    return Engine(load(folder, device="cpu"), ImageLimits(), 2048)


@pytest.fixture(scope="module")
def served(engine) -> Served:
    return Served(engine, "little", dimensions=(16, 32), instructions={"search_query": "Find this:"})


@pytest.fixture(scope="module")
def client(served) -> Iterator[httpx.Client]:
    with serving(served) as client:
        yield client


@pytest.fixture(scope="module")
def small(engine) -> Iterator[httpx.Client]:
    """A server that accepts little."""
    strict = Engine(engine.model, TINY.image, TINY.tokens)
    with serving(Served(strict, "little", limits=TINY)) as client:
        yield client


def embed(client: httpx.Client, **body: Any) -> np.ndarray:
    return vectors_of(client.post("/v1/embeddings", json=body))


def refusal(answer: httpx.Response, status: int = 400) -> dict[str, Any]:
    """The error object of an answer, which has exactly OpenAI's keys."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == ("invalid_request_error" if status < 500 else "server_error")
    assert answer.json()["message"] == error["message"] and "\n" not in error["message"]
    return error


def close_to(found: np.ndarray, expected: np.ndarray) -> bool:
    return found.shape == expected.shape and np.abs(found - expected).max() < 1e-5


# ---------------------------------------------------------------- POST /v1/embeddings


def test_texts_and_items_are_what_the_model_says(client, engine):
    model = engine.model
    assert close_to(embed(client, input="a red ring"), model.encode(["a red ring"]))
    assert close_to(embed(client, input=["a", "b b b", "c"], model="little"), model.encode(["a", "b b b", "c"]))
    items = [{"text": "What is it?", "image": RED}, "a", {"image": BLUE}, {"text": "both", "images": [RED, BLUE]}]
    red, blue = picture("red"), picture("blue")
    expected = [{"text": "What is it?", "image": red}, "a", blue, {"text": "both", "images": [red, blue]}]
    assert close_to(embed(client, input=items), model.encode(expected))
    assert close_to(embed(client, input=[{"text": "x", "image": RED, "images": [BLUE]}]),
                    model.encode([{"text": "x", "images": [red, blue]}]))  # fmt: skip


def test_a_video_is_a_list_of_frames(client, engine):
    video = {"source": [picture("red"), picture("blue")], "fps": 4.0}
    expected = engine.model.encode([{"text": "a", "video": video}, {"video": video["source"]}])
    items = [{"text": "a", "video": [RED, BLUE], "fps": 4}, {"video": [RED, BLUE]}]
    assert close_to(embed(client, input=items), expected)
    parts = [{"type": "text", "text": "a"}, {"type": "video", "video": [RED, BLUE], "fps": 4.0}]
    assert close_to(embed(client, messages=[{"role": "user", "content": parts}]), expected[:1])
    answer = client.post("/v2/embed", json={"inputs": [{"content": parts}]}).json()
    assert close_to(np.float32(answer["embeddings"]["float"]), expected[:1])
    assert answer["meta"]["billed_units"]["images"] == 2


def test_base64_holds_the_same_numbers(client):
    whole = embed(client, input=["a", "b"])
    answer = client.post("/v1/embeddings", json={"input": ["a", "b"], "encoding_format": "base64"}).json()
    found = [np.frombuffer(base64.b64decode(one["embedding"]), "<f4") for one in answer["data"]]
    assert close_to(np.array(found), whole)


def test_usage_counts_text_and_image_tokens(client, engine):
    answer = client.post("/v1/embeddings", json={"input": ["a", {"text": "b", "image": RED}]}).json()
    batches = [engine.model.encoder.preprocess([item]) for item in ("a", {"text": "b", "image": picture("red")})]
    images = int(batches[1]["image_tokens"].sum())
    total = sum(batch["input_ids"].shape[1] for batch in batches)
    assert images > 0
    assert answer["usage"] == {
        "prompt_tokens": total,
        "total_tokens": total,
        "prompt_tokens_details": {"text_tokens": total - images, "image_tokens": images},
    }
    assert (answer["object"], answer["model"]) == ("list", "little")


def test_conversations_give_one_vector_each(client, engine):
    what, it = ({"type": "text", "text": text} for text in ("What is ", "it?"))
    one = [{"role": "user", "content": [what, {"type": "image_url", "image_url": {"url": RED}}, it]}]
    other = [{"role": "system", "content": "Answer."}, {"role": "user", "content": "b"}]
    expected = engine.model.encode([{"text": "What is it?", "image": picture("red")}, "Answer.\nb"])
    assert close_to(embed(client, messages=one), expected[:1])
    assert close_to(embed(client, messages=[one, other]), expected)
    plain = [{"role": "user", "content": [{"type": "image_url", "image_url": RED}]}]
    assert close_to(embed(client, messages=plain), engine.model.encode([picture("red")]))


def test_conversations_as_vllm_documents_them(client, engine):
    """The messages of its example for Qwen3-VL-Embedding, and its further fields with values that change nothing."""
    system = {"role": "system", "content": [{"type": "text", "text": "Represent it."}]}
    assistant = {"role": "assistant", "content": [{"type": "text", "text": ""}]}
    image = {"type": "image_url", "image_url": {"url": RED}}
    text, empty = {"type": "text", "text": "a"}, {"type": "text", "text": ""}
    picture_alone = {"text": "Represent it.", "image": picture("red")}
    both = {"text": "Represent it.\na", "image": picture("red")}
    ends = {"encoding_format": "float", "continue_final_message": True, "add_special_tokens": True}
    for parts, same in (([text], "Represent it.\na"), ([image, empty], picture_alone), ([image, text], both)):
        messages = [system, {"role": "user", "content": parts}, assistant]
        assert close_to(embed(client, messages=messages, **ends), engine.model.encode([same]))
    whole = engine.model.encode(["a"])
    assert close_to(embed(client, messages=[USER], add_generation_prompt=True), whole)
    assert close_to(embed(client, messages=[USER, {"role": "assistant", "content": None}]), whole)
    neutral = {"use_activation": True, "padding": "do_not_pad", "embed_dtype": "float32", "endianness": "native",
               "priority": 0, "request_id": "r", "cache_salt": "s", "add_special_tokens": False}  # fmt: skip
    assert close_to(embed(client, input="a", **neutral), whole)


@pytest.mark.parametrize("nothing", [None, []])
def test_null_and_an_empty_list_mean_not_given(client, engine, nothing):
    names = "model messages turns encoding_format dimensions instruction input_type user priority".split()
    assert close_to(embed(client, input="a", **dict.fromkeys(names, nothing)), engine.model.encode(["a"]))
    item = {"text": nothing, "image": RED, "images": nothing}
    red = engine.model.encode([picture("red")])
    assert close_to(embed(client, input=[item]), red)
    names = "model texts inputs input_type embedding_types output_dimension truncate".split()
    answer = client.post("/v2/embed", json={"images": [RED], **dict.fromkeys(names, nothing)})
    assert close_to(np.float32(answer.json()["embeddings"]["float"]), red)


@pytest.mark.parametrize("mode", ["isolated", "compounded"])
def test_turns_give_a_vector_each(client, engine, mode):
    def conversation(uri: str, *texts: str) -> list[dict[str, Any]]:
        first = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": texts[0]}]
        return [{"role": "user", "content": first}, *({"role": "user", "content": text} for text in texts[1:])]

    found = embed(client, messages=[conversation(RED, "", "What?", "Why?"), conversation(BLUE, "Who?")], turns=mode)
    red = engine.model.encode_turns(picture("red"), ["", "What?", "Why?"], mode=mode)
    blue = engine.model.encode_turns(picture("blue"), ["Who?"], mode=mode)
    assert close_to(found, np.concatenate([red, blue]))
    if mode == "isolated":
        single = [{"text": text, "image": picture("red")} for text in ("", "What?", "Why?")]
        assert close_to(found[:3], engine.model.encode(single))


def test_an_instruction_stands_before_the_text(client, engine):
    expected = engine.model.encode(["Find this:\na", {"text": "Find this:", "image": picture("red")}])
    items = ["a", {"image": RED}]
    assert close_to(embed(client, input=items, instruction="Find this:"), expected)
    assert close_to(embed(client, input=items, input_type="search_query"), expected)
    assert close_to(embed(client, input=["a"], input_type="search_document"), engine.model.encode(["a"]))


@pytest.mark.parametrize("dimension", [16, 32, 64])
def test_a_matryoshka_model_gives_shorter_vectors(client, engine, dimension):
    found = embed(client, input=["a", "b"], dimensions=dimension)
    assert close_to(found, engine.model.encode(["a", "b"], truncate_dim=dimension))
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"input": [1, 2, 3]}, "input", "token ids are not accepted"),
        ({"input": [[1, 2], [3]]}, "input", "token ids are not accepted"),
        ({"input": 3}, "input", "list"),
        ({"input": [["a", "b"]]}, "input", "a list in the list"),
        ({"input": [[]]}, "input", "a list in the list"),
        ({"input": []}, "input", "an empty list counts as not given"),
        ({"input": ""}, "input[0]", "nothing to embed"),
        ({"input": ["a", {}]}, "input[1]", "nothing to embed"),
        ({"input": ["a", {"text": "b", "picture": RED}]}, "input[1].picture", "unknown field"),
        ({"input": ["a", 3]}, "input[1]", "valid object"),
        ({"input": "a", "prompt": "b"}, "prompt", "unknown field"),
        ({}, "input", "either 'input' or 'messages'"),
        ({"input": "a", "messages": [{"role": "user", "content": "b"}]}, "input", "either"),
        ({"input": "a", "turns": "isolated"}, "turns", "messages"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format", "float"),
        ({"input": "a", "dimensions": 0}, "dimensions", "greater"),
        ({"input": "a", "dimensions": 8}, "dimensions", "16, 32, 64"),
        ({"input": "a", "dimensions": "16"}, "dimensions", "integer"),
        ({"input": "a", "dimensions": True}, "dimensions", "integer"),
        ({"input": "a", "input_type": "other"}, "input_type", "known are classification"),
        ({"input": "a", "input_type": "image", "instruction": "b"}, "input_type", "either"),
        ({"input": "x <|emb|>"}, None, "special token"),
        ({"input": "half \ud83d"}, None, "half of a character"),
        ({"input": [{"image": "cat.png"}]}, "input[0]", "data:image/…;base64 URI"),
        ({"input": [{"image": "file:///etc/passwd"}]}, "input[0]", "data:image/…;base64 URI"),
        ({"input": [{"image": "http://example.com/a.png"}]}, "input[0]", "fetches no URLs"),
        ({"input": [{"image": "data:text/html;base64,AAAA"}]}, "input[0]", "data:image/…;base64 URI"),
        ({"input": [{"image": "data:image/png;base64,????"}]}, None, "not valid base64"),
        ({"input": [{"image": "data:image/png;base64,AA-_"}]}, None, "URL-safe base64"),
        ({"input": [{"image": "data:image/png;base64,AA%3D%3D"}]}, None, "percent-encoded"),
        ({"input": [{"image": "data:image/png,%89PNG"}]}, "input[0]", "is not base64"),
        ({"input": [{"image": "iVBORw0KGgo="}]}, "input[0]", "data:image/…;base64 URI"),
        ({"input": [{"image": "data:image/png;base64,"}]}, None, "empty"),
        ({"input": [{"image": "data:image/png;base64,AAAA"}]}, None, "not an image that can be read"),
        ({"input": [{"image": data_uri(b"<svg/>", "svg+xml")}]}, None, "not an image"),
        ({"input": [{"image": data_uri(picture()[:-30])}]}, None, "truncated or broken"),
        ({"input": "a", "chat_template": "x"}, "chat_template", "laid out as the model was trained"),
        ({"input": "a", "truncate_prompt_tokens": 9}, "truncate_prompt_tokens", "too long is refused"),
        ({"input": "a", "use_activation": False}, "use_activation", "True"),
        ({"input": "a", "continue_final_message": True}, "continue_final_message", "belongs to 'messages'"),
        ({"messages": []}, "input", "an empty list counts as not given"),
        ({"messages": [[]]}, "messages[0]", "at least 1"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role", "'user' or 'assistant'"),
        ({"messages": [USER, {"role": "assistant", "content": "b"}]}, "messages[0]", "assistant message is empty"),
        ({"messages": [ASSISTANT, USER]}, "messages[0]", "follows a user message"),
        ({"messages": [ASSISTANT]}, "messages[0]", "follows a user message"),
        ({"messages": [USER], "continue_final_message": True}, "continue_final_message", "must be an empty one"),
        ({"messages": [USER, ASSISTANT], "add_generation_prompt": True}, "add_generation_prompt", "already"),
        ({"messages": [{"role": "user", "content": "a"}] * 2}, "messages[0]", "set 'turns'"),
        ({"messages": [{"role": "system", "content": "a"}]}, "messages[0]", "no user message"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]},
         "messages[0]", "beginning"),
        ({"messages": [{"role": "user", "content": ""}, {"role": "user", "content": "b"}], "turns": "isolated"},
         "messages[0]", "means the image, but there is no image"),
        ({"messages": [{"role": "user", "content": [{"type": "audio", "audio": "x"}]}]},
         "messages[0].content[0]", "audio"),
        ({"messages": [{"role": "user", "content": [{"type": "video", "video": "x"}]}]},
         "messages[0].content[0].video.video", "list"),
        ({"messages": [{"role": "user", "content": 2 * [{"type": "video", "video": [RED]}]}]},
         "messages[0]", "several videos; send one"),
        ({"input": [{"text": "a", "fps": 2}]}, "input[0]", "'fps' belongs to a video"),
        ({"input": [{"video": [RED], "fps": 0}]}, "input[0].fps", "greater than 0"),
        ({"input": [{"video": [RED, "clip.mp4"]}]}, "input[0]", "data:image"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(client, body, param, says):
    error = refusal(
        client.post("/v1/embeddings", content=json.dumps(body), headers={"Content-Type": "application/json"})
    )
    assert says in error["message"] and error["param"] == param, error


def test_images_of_later_turns_are_refused(client):
    turns = [{"role": "user", "content": "a"}, {"role": "user", "content": [{"type": "image_url", "image_url": RED}]}]
    assert (
        "first user message"
        in refusal(client.post("/v1/embeddings", json={"messages": turns, "turns": "isolated"}))["message"]
    )


def test_an_unknown_model_is_404(client):
    error = refusal(client.post("/v1/embeddings", json={"input": "a", "model": "other"}), 404)
    assert error["code"] == "model_not_found" and "'little'" in error["message"]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b'"a"', b"\xff\xfe", b'{"input": "a"} x', b'{"input": \x00"a"}']
)
def test_what_is_no_json_object_is_400(client, content):
    error = refusal(client.post("/v1/embeddings", content=content, headers={"Content-Type": "application/json"}))
    assert "object to extract" not in error["message"]


@pytest.mark.parametrize(
    ("headers", "content", "status", "says"),
    [
        ({"Content-Type": "application/x-www-form-urlencoded"}, b'{"input": "a"}', 415, "not 'application/x-www"),
        ({}, b'{"input": "a"}', 415, "which this request lacks"),
        ({}, b"", 415, "Content-Type: application/json"),
        ({"Content-Type": "text/plain"}, b'{"input": "a"}', 415, "not 'text/plain'"),
        ({"Content-Type": "application/json"}, '{"input": "\u00e9"}'.encode("latin-1"), 400, "not UTF-8 (byte 11)"),
        ({"Content-Type": "application/json"}, '{"input": "a"}'.encode("utf-16"), 400, "not UTF-8"),
        (
            {"Content-Type": "application/json", "Content-Encoding": "gzip"},
            gzip.compress(b'{"input": "a"}', mtime=0),
            415,
            "without Content-Encoding: gzip",
        ),
        ({"Content-Type": "application/json; charset=utf-8"}, b'{"input": "a"}', 200, ""),
        ({"Content-Type": "application/vnd.api+json"}, b'{"input": "a"}', 200, ""),
        ({"Content-Type": "application/json", "Content-Encoding": "identity"}, b'{"input": "a"}', 200, ""),
        ({"Content-Type": "application/json"}, b'\xef\xbb\xbf{"input": "a"}', 200, ""),
    ],
)
def test_what_a_body_is_sent_as_is_named(client, headers, content, status, says):
    answer = client.post("/v1/embeddings", content=content, headers=headers)
    if status == 200:
        assert vectors_of(answer).shape == (1, 64)
    else:
        assert says in refusal(answer, status)["message"]


def test_a_model_that_was_not_trained_for_it_gives_whole_vectors_only(small):
    error = refusal(small.post("/v1/embeddings", json={"input": "a", "dimensions": 16}))
    assert "not trained for fewer" in error["message"]
    assert embed(small, input="a", dimensions=64).shape == (1, 64)


# ---------------------------------------------------------------- data URIs


@given(
    st.sampled_from(["data:image/png;base64,", "DATA:Image/PNG;BASE64,", "data:image/png;charset=utf-8;base64,",
                     "data:image/png;name=a.png; base64,", "data:image/jpg;base64, "]),
    st.lists(st.tuples(st.integers(0, 200), st.sampled_from([" ", "\n", "\r\n", "\t"])), max_size=5),
    st.booleans(),
    st.integers(0, 2),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_data_uris_are_read_as_people_make_them(head, blanks, padded, further):
    image = picture("red", (30, 31)) + bytes(further)  # so that there are no, one or two signs of padding
    text = base64.encodebytes(image).decode()  # lines of 76 characters, and a line break at the end
    for place, blank in blanks:
        text = text[:place] + blank + text[place:]
    source = head + (text if padded else text.replace("=", ""))
    check_source(source, ImageLimits(), "here")
    assert np.array_equal(decode(source, ImageLimits(), "here"), decode(image, ImageLimits(), "here"))


def test_blanks_around_a_source_do_not_matter(client, engine):
    found = embed(client, input=[{"image": f" {RED}\n"}, {"images": [f"\n{RED}"]}])
    assert close_to(found, engine.model.encode([picture("red")] * 2))


# ---------------------------------------------------------------- POST /v2/embed


def test_coheres_shape(client, engine):
    model = engine.model
    texts = client.post("/v2/embed", json={"model": "little", "texts": ["a", "b"], "input_type": "search_query"}).json()
    assert close_to(np.float32(texts["embeddings"]["float"]), model.encode(["Find this:\na", "Find this:\nb"]))
    assert texts["texts"] == ["a", "b"] and texts["response_type"] == "embeddings_by_type" and texts["id"]
    assert texts["meta"]["billed_units"]["input_tokens"] > 2
    images = client.post("/v2/embed", json={"images": [RED], "input_type": "image"}).json()
    assert close_to(np.float32(images["embeddings"]["float"]), model.encode([picture("red")]))
    assert images["meta"]["billed_units"]["images"] == 1
    parts = [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": RED}}]
    fused = client.post("/v2/embed", json={"inputs": [{"content": parts}], "output_dimension": 16}).json()
    expected = model.encode([{"text": "x", "image": picture("red")}], truncate_dim=16)
    assert close_to(np.float32(fused["embeddings"]["float"]), expected)


def test_bodies_as_clients_send_them(client, engine):
    """Recorded from openai 3.57, cohere 5.21, langchain-cohere 0.6 and llama-index-embeddings-cohere 0.9."""
    vectors = engine.model.encode(["Find this:\na", "Find this:\nb"])
    body = {"texts": ["a", "b"], "model": "little", "input_type": "search_query"}
    first = client.post("/v1/embed", json=body).json()
    assert close_to(np.float32(first["embeddings"]), vectors) and first["response_type"] == "embeddings_floats"
    langchain = {**body, "embedding_types": ["float"], "truncate": None}
    typed = client.post("/v1/embed", json=langchain).json()
    assert (
        close_to(np.float32(typed["embeddings"]["float"]), vectors) and typed["meta"]["api_version"]["version"] == "1"
    )
    llama = {**body, "embedding_types": ["float"], "truncate": "END"}
    assert close_to(np.float32(client.post("/v2/embed", json=llama).json()["embeddings"]["float"]), vectors)
    image = {"content": [{"type": "image_url", "image_url": {"url": RED}}]}
    llama = {
        "model": "little",
        "input_type": "image",
        "inputs": [image],
        "embedding_types": ["float"],
        "truncate": "END",
    }
    red = engine.model.encode([picture("red")])
    assert close_to(np.float32(client.post("/v2/embed", json=llama).json()["embeddings"]["float"]), red)
    images = {"images": [RED], "model": "little", "input_type": "image", "embedding_types": ["float"]}
    assert close_to(np.float32(client.post("/v1/embed", json=images).json()["embeddings"]["float"]), red)
    openai = {"model": "little", "input": ["a"], "user": "me", "dimensions": 32, "encoding_format": "float"}
    assert embed(client, **openai).shape == (1, 32)


def test_coheres_types(client, engine):
    types = ["float", "int8", "binary", "ubinary", "base64"]
    found = client.post("/v2/embed", json={"texts": ["a", "b"], "embedding_types": types}).json()["embeddings"]
    assert [*found] == types
    vectors = engine.model.encode(["a", "b"])
    small = np.array(found["int8"])
    assert np.abs(small).max(axis=1).tolist() == [127, 127]
    cosines = (small * vectors).sum(1) / np.linalg.norm(small, axis=1)
    assert (cosines > 0.9999).all(), "the direction stays"
    bits = np.unpackbits(np.array(found["ubinary"], dtype=np.uint8), axis=1)
    assert (bits == (np.float32(found["float"]) > 0)).all()
    assert (np.array(found["binary"]) + 128 == np.array(found["ubinary"])).all()
    assert close_to(np.array([np.frombuffer(base64.b64decode(v), "<f4") for v in found["base64"]]), vectors)


def test_coheres_truncation(small):
    long = "word " * 90 + "end"
    ask = {"texts": [long]}
    assert small.post("/v2/embed", json=ask).status_code == 200
    start = small.post("/v2/embed", json={**ask, "truncate": "START"}).json()["embeddings"]["float"]
    assert start != small.post("/v2/embed", json=ask).json()["embeddings"]["float"]
    assert "at most 200" in refusal(small.post("/v2/embed", json={**ask, "truncate": "NONE"}))["message"]
    assert "at most 200" in refusal(small.post("/v1/embeddings", json={"input": long}))["message"]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, "exactly one"),
        ({"texts": ["a"], "images": [RED]}, "exactly one"),
        ({"texts": ["a"], "embedding_types": ["uint8"]}, "embedding_types[0]"),
        ({"texts": ["a"], "output_dimension": 7}, "16, 32, 64"),
        ({"texts": ["a"], "input_type": "nonsense"}, "unknown input_type"),
        ({"texts": ["a", ""]}, "texts[1]: nothing to embed"),
        ({"images": ["http://127.0.0.1/"]}, "fetches no URLs"),
        ({"texts": [1]}, "texts[0]"),
    ],
)
def test_what_is_wrong_in_coheres_shape_is_named(client, body, says):
    assert says in refusal(client.post("/v2/embed", json=body))["message"]


def test_bits_fill_whole_bytes(engine):
    with serving(Served(engine, "little", dimensions=(12,))) as client:
        body = {"texts": ["a"], "output_dimension": 12}
        assert client.post("/v2/embed", json=body).status_code == 200
        error = refusal(client.post("/v2/embed", json={**body, "embedding_types": ["binary"]}))
        assert "whole bytes" in error["message"]


# ---------------------------------------------------------------- the other routes


def test_models_health_metrics_and_the_page_without_an_index(client):
    [model] = client.get("/v1/models").json()["data"]
    assert (model["id"], model["object"], model["dimension"], model["dimensions"]) == (
        "little",
        "model",
        64,
        [16, 32, 64],
    )
    assert client.get("/v1/models/little").json() == model
    assert refusal(client.get("/v1/models/org/other"), 404)["code"] == "model_not_found"
    assert client.get("/health").json() == {"status": "ok"} and client.head("/health").status_code == 200
    embed(client, input=["a", {"image": RED}])
    refusal(client.get("/nothing"), 404)
    metrics = client.get("/metrics").text
    assert re.search(r'muco_requests_total\{route="/v1/embeddings",status="200"\} [1-9]', metrics)
    assert 'muco_requests_total{route="other",status="404"}' in metrics
    assert re.search(r'muco_tokens_total\{kind="image"\} [1-9]', metrics)
    assert "muco_unfinished_items 0.0" in metrics and "muco_batch_items_bucket" in metrics
    page = client.get("/")
    assert "This server embeds" in page.text and page.headers["content-type"] == "text/html; charset=utf-8"
    refusal(client.post("/search", json={"text": "a"}), 404)
    refusal(client.get("/v1/embeddings"), 405)


def test_every_answer_has_security_headers(client, small):
    for answer in (
        client.get("/health"),
        client.get("/"),
        client.get("/static/search.js"),
        client.get("/nothing"),
        client.post("/v1/embeddings", json={"input": 3}),
        small.post("/v1/embeddings", content=b"x" * 300_000),
    ):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "unsafe" not in answer.headers["content-security-policy"]
        assert "server" not in answer.headers and "access-control-allow-origin" not in answer.headers
    assert "script-src 'self'" in client.get("/").headers["content-security-policy"]


def test_metrics_have_no_route_of_a_strangers_choosing(client):
    for number in range(5):
        client.get(f"/nothing/{number}")
    assert "/nothing" not in client.get("/metrics").text


# ---------------------------------------------------------------- limits


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"input": ["a"] * 5}, "5 items; at most 4"),
        ({"input": ["a"] * 5000}, "at most 4096"),
        ({"input": [{"image": RED}] * 3}, "3 images; at most 2"),
        ({"input": [{"images": [RED] * 3}]}, "3 images; at most 2"),
        ({"messages": [{"role": "user", "content": "a"}] * 4, "turns": "isolated"},
         "4 turns of a conversation; at most 3"),
        ({"messages": [[{"role": "user", "content": "a"}] * 3] * 2, "turns": "isolated"}, "6 items; at most 4"),
        ({"input": "a" * 501}, "more than 500 characters"),
        ({"input": "1 2 3 " * 60}, "at most 200 of one item"),
        ({"input": [{"image": data_uri(picture(size=(120, 100)))}]}, "over the limit of 10,000 pixels"),
        ({"input": [{"image": data_uri(picture(size=(99, 99), format="BMP"))}]}, "more than the 20,000 bytes"),
    ],
)  # fmt: skip
def test_more_than_the_limits_is_400(small, body, says):
    assert says in refusal(small.post("/v1/embeddings", json=body))["message"]


def test_a_decompression_bomb_is_refused_before_it_grows(client):
    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    side = 60_000  # 10 GB of pixels in 10 kB
    head = side.to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    bomb = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(10**7))) + chunk(b"IEND", b"")
    )
    start = time.monotonic()
    error = refusal(client.post("/v1/embeddings", json={"input": [{"image": data_uri(bomb)}]}))
    assert "pixels" in error["message"] and time.monotonic() - start < 10


def test_a_large_body_is_not_read(small):
    refusal(small.post("/v1/embeddings", content=b" " * 200_001), 413)

    def unannounced() -> Iterator[bytes]:
        for _ in range(100):
            yield b" " * 10_000

    error = refusal(small.post("/v1/embeddings", content=unannounced()), 413)
    assert error["code"] == "body_too_large"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"[" * 9, "deeper than 8"),
        (b'{"input": ' * 9, "deeper than 8"),
        (b"[" * 100_000, "deeper than 8"),
        (b'["' + b"[" * 100, None),
        (b'"' + rb"\"[" * 1000, None),
        (b'["\\\\"' + b"[" * 8, "deeper than 8"),
        (b"[[[[[[[[]]]]]]]]", None),
        (b'{"a\\"[[[[[[[[[[[[[[": [[[]]]}', None),
        (b"[]" * (STRUCTURE // 2), None),
        (b"[]" * (STRUCTURE // 2) + b" ", "outside of strings"),
        (b'"' * (STRUCTURE * 3), None),
        (b'"' + b'\\"' * 3_000_000, None),
        (b'"' + b'\\"' * 3_000_000 + b"\\", None),
    ],
    ids=range(13),
)  # fmt: skip
def test_the_form_of_json_is_checked_in_linear_time(body, says):
    start = time.monotonic()
    if says is None:
        check_form(body, 8)
    else:
        with pytest.raises(RequestError, match=says):
            check_form(body, 8)
    assert time.monotonic() - start < 10


def test_deep_json_is_400_at_the_server(small):
    body = b'{"input": ' + b"[" * 50_000 + b"]" * 50_000 + b"}"
    error = refusal(small.post("/v1/embeddings", content=body, headers={"Content-Type": "application/json"}))
    assert error["code"] == "too_deep"


def test_a_body_that_does_not_come_is_408(engine):
    limits = replace(TINY, seconds=0.3)
    with serving(Served(engine, "little", limits=limits)) as client:
        head = b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n{"
        with socket.create_connection((client.base_url.host, client.base_url.port), timeout=SOON) as connection:
            connection.sendall(head)
            assert connection.recv(65536).startswith(b"HTTP/1.1 408 ")
        assert client.get("/health").status_code == 200


# ---------------------------------------------------------------- together, full, gone


class SlowEngine(Engine):
    """An engine whose passes wait until they may go on."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine.model, engine.image_limits, engine.max_tokens)
        self.go, self.sizes = threading.Event(), []

    def run(self, prepared: Any) -> Any:
        self.sizes.append(len(prepared))
        assert self.go.wait(SOON)
        return super().run(prepared)


@pytest.fixture
def slow(engine) -> SlowEngine:
    return SlowEngine(engine)


def unfinished(client: httpx.Client) -> int:
    return int(float(re.search(r"(?m)^muco_unfinished_items (\S+)", client.get("/metrics").text)[1]))


def test_requests_share_passes_and_keep_their_own_answers(slow):
    texts = [f"number {n}" for n in range(24)]
    with serving(Served(slow, "little")) as client, ThreadPoolExecutor(24) as pool:
        answers = [pool.submit(embed, client, input=[text, text + "!"]) for text in texts]
        until(lambda: unfinished(client) == 48)
        slow.go.set()
        found = np.stack([answer.result() for answer in answers])
    expected = slow.model.encode([text + end for text in texts for end in ("", "!")]).reshape(24, 2, -1)
    assert close_to(found, expected)
    assert len(slow.sizes) < 8 and sum(slow.sizes) == 48, "not one pass per request"


def test_a_full_queue_is_503_with_retry_after(slow):
    served = Served(slow, "little", limits=replace(TINY, seconds=60), batches=BatchLimits(queue=4))
    with serving(served) as client, ThreadPoolExecutor(4) as pool:
        accepted = [pool.submit(embed, client, input="a") for _ in range(3)]
        until(lambda: unfinished(client) == 3)
        answer = client.post("/v1/embeddings", json={"input": ["b", "c"]})
        assert refusal(answer, 503)["code"] == "queue_full" and answer.headers["retry-after"] == "1"
        assert unfinished(client) == 3
        slow.go.set()
        assert all(len(one.result()) == 1 for one in accepted)
        assert len(embed(client, input=["b", "c"])) == 2


def test_who_hangs_up_leaves_the_queue(slow):
    with serving(Served(slow, "little")) as client, ThreadPoolExecutor(2) as pool:
        first = pool.submit(embed, client, input="a")
        until(lambda: slow.sizes == [1])
        body = json.dumps({"input": ["b"] * 200}).encode()
        head = "POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
        with socket.create_connection((client.base_url.host, client.base_url.port)) as connection:
            connection.sendall(f"{head}{len(body)}\r\n\r\n".encode() + body)
            until(lambda: unfinished(client) == 201)
        until(lambda: unfinished(client) == 1)
        slow.go.set()
        assert len(first.result()) == 1 and len(embed(client, input="c")) == 1
        assert sum(slow.sizes) == 2, "nothing of the one who hung up was computed"
        until(lambda: 'route="/v1/embeddings",status="499"' in client.get("/metrics").text)


def test_what_takes_too_long_is_503(slow):
    with serving(Served(slow, "little", limits=replace(TINY, seconds=0.3))) as client:
        assert refusal(client.post("/v1/embeddings", json={"input": "a"}), 503)["code"] == "timeout"
        slow.go.set()
        until(lambda: unfinished(client) == 0)


class BrokenEngine(Engine):
    """An engine that cannot compute one text."""

    def run(self, prepared: Any) -> Any:
        if any("poison" in one.item.texts[0] for one in prepared):
            raise RuntimeError("a secret at /root/weights")
        return super().run(prepared)


def test_a_failing_model_fails_one_request_without_telling_why(engine):
    broken = BrokenEngine(engine.model, engine.image_limits, engine.max_tokens)
    with (
        serving(Served(broken, "little", batches=BatchLimits(milliseconds=300))) as client,
        ThreadPoolExecutor(3) as pool,
    ):
        asked = [pool.submit(client.post, "/v1/embeddings", json={"input": text}) for text in ("a", "poison", "b")]
        good, bad, other = [one.result() for one in asked]
        assert close_to(vectors_of(good), engine.model.encode(["a"]))
        assert close_to(vectors_of(other), engine.model.encode(["b"]))
        error = refusal(bad, 500)
        assert "secret" not in bad.text and "Traceback" not in bad.text and "log" in error["message"]
        assert bad.headers["x-content-type-options"] == "nosniff"


# ---------------------------------------------------------------- token, host, fetching


def test_the_token_is_asked_for_everywhere_but_at_the_door(engine):
    with serving(Served(engine, "little", token="correct horse")) as client:
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "Bearer correct horse battery"},
            {"Authorization": "Bearer"},
            {"Authorization": "Basic correct horse"},
            {"Authorization": "correct horse"},
            {"Authorization": b"Bearer \xff\xfe"},
        ):
            for method, path in (("POST", "/v1/embeddings"), ("POST", "/v2/embed"), ("GET", "/v1/models"),
                                 ("GET", "/metrics"), ("GET", "/openapi.json"), ("GET", "/nothing")):  # fmt: skip
                answer = client.request(method, path, headers=headers)
                assert refusal(answer, 401)["code"] == "unauthorized" and answer.headers["www-authenticate"] == "Bearer"
                assert "horse" not in answer.text
        for path in ("/", "/health", "/static/search.js", "/static/style.css"):
            assert client.get(path).status_code == 200
        client.headers["Authorization"] = "bearer correct horse"
        assert len(embed(client, input="a")) == 1 and client.get("/metrics").status_code == 200


def test_a_name_that_leads_here_by_a_trick_is_refused(engine):
    with serving(Served(engine, "little", hosts=frozenset(("localhost", "127.0.0.1", "::1")))) as client:
        assert client.get("/v1/models").status_code == 200
        for host in ("localhost", "localhost:8000", "LOCALHOST.", "[::1]:8000"):
            assert client.get("/v1/models", headers={"Host": host}).status_code == 200
        for host in ("evil.test", "localhost.evil.test", "evil.test:8000", ""):
            for path in ("/v1/models", "/", "/metrics", "/health/", "/nothing"):
                assert client.get(path, headers={"Host": host}).status_code in (400, 421)


def test_a_probe_that_calls_the_server_by_its_address_is_answered(engine):
    """As Kubernetes and load balancers ask."""
    with serving(Served(engine, "little", hosts=frozenset(("embed.example.com",)), token="secret")) as client:
        for method in ("GET", "HEAD"):
            assert client.request(method, "/health", headers={"Host": "10.0.0.7:8000"}).status_code == 200
        refusal(client.get("/metrics", headers={"Host": "10.0.0.7:8000", "Authorization": "Bearer secret"}), 421)


def test_a_probe_without_a_host_name_is_answered(engine):
    """As a load balancer asks by HTTP/1.0; no browser does."""
    with serving(Served(engine, "little", hosts=frozenset(("localhost",)), token="secret")) as client:
        for path, status in (("/health", b"200"), ("/v1/models", b"401")):
            with socket.create_connection((client.base_url.host, client.base_url.port), timeout=SOON) as connection:
                connection.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
                assert connection.recv(65536).split()[1] == status


def test_pages_of_allowed_origins_may_ask(engine):
    page, other = "https://app.example.com", "https://evil.test"
    ask = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    with serving(Served(engine, "little", token="secret", origins=(page,))) as client:
        preflight = client.options("/v1/embeddings", headers={"Origin": page, **ask})
        assert preflight.status_code == 200 and preflight.headers["access-control-allow-origin"] == page
        assert "authorization" in preflight.headers["access-control-allow-headers"]
        assert (
            "access-control-allow-origin"
            not in client.options("/v1/embeddings", headers={"Origin": other, **ask}).headers
        )
        token = {"Authorization": "Bearer secret"}
        found = client.post("/v1/embeddings", json={"input": "a"}, headers={"Origin": page, **token})
        assert vectors_of(found).shape == (1, 64) and found.headers["access-control-allow-origin"] == page
        refused = client.post("/v1/embeddings", json={"input": "a"}, headers={"Origin": page})
        assert refusal(refused, 401) and refused.headers["access-control-allow-origin"] == page, "readable by the page"
        unknown = client.get("/health", headers={"Origin": other})
        assert "access-control-allow-origin" not in unknown.headers
    with serving(Served(engine, "little", origins=("*",))) as client:
        assert client.get("/health", headers={"Origin": other}).headers["access-control-allow-origin"] == "*"


@pytest.mark.parametrize(
    ("given", "origin"),
    [
        ("HTTPS://App.Example.com:443/", "https://app.example.com"),
        ("http://localhost:3000", "http://localhost:3000"),
        ("http://[::1]:80", "http://[::1]"),
        ("*", "*"),
    ],
)
def test_an_origin_is_compared_as_browsers_write_it(given, origin):
    assert _origin(given) == origin


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("Proxy.Example.com:8080", "proxy.example.com"),
        ("[fd00::7]:80", "fd00::7"),
        ("fd00::7", "fd00::7"),
        ("a_b.", "a_b"),
        ("bücher.example", "xn--bcher-kva.example"),  # as browsers send it
    ],
)
def test_an_allowed_host_is_compared_as_the_server_reads_names(given, name):
    assert _host(given) == name == host_name((f"[{name}]:80" if ":" in name else f"{name}:80").encode())


@pytest.mark.parametrize(
    ("options", "hosts"),
    [
        ({}, "no fetching"),
        ({"allow_fetch": True}, None),
        ({"addresses": ("10.0.0.7:9000", "[FD00:0::7]:80")}, ("10.0.0.7", "fd00::7")),
        ({"addresses": ("10.0.0.7:9000",), "allow_fetch": True}, None),
        ({"addresses": ("10.0.0.7:9000",), "hosts": ("*.Example.com",)}, ("*.example.com", "10.0.0.7")),
        ({"hosts": ("bücher.example", "FD00:0::7"), "allow_fetch": True}, ("xn--bcher-kva.example", "fd00::7")),
    ],
)
def test_an_exception_for_one_address_opens_no_other_host(options, hosts):
    fetch = _fetch_limits(**{"allow_fetch": False, "hosts": (), "addresses": (), **options})
    assert (fetch.hosts if fetch else "no fetching") == hosts
    if fetch and fetch.allowed_addresses:
        assert fetch.allowed_addresses[0] == "10.0.0.7:9000" and fetch.allowed_addresses[1:] in ((), ("[fd00::7]:80",))


def test_images_are_fetched_only_as_allowed(engine):
    with site_server.serving() as site:
        site.pages["/red.png"] = (200, {}, picture("red"))
        site.pages["/broken.png"] = (200, {}, b"nonsense")
        site.redirect("/inside", "http://127.0.0.1:1/")
        image = ImageLimits(fetch=FetchLimits(allowed_addresses=site.limits.allowed_addresses))
        with serving(Served(Engine(engine.model, image, 2048), "little", limits=RequestLimits(image=image))) as client:
            found = embed(client, input=[{"text": "x", "images": [f"{site.url}/red.png", BLUE]}, "a"])
            expected = engine.model.encode([{"text": "x", "images": [picture("red"), picture("blue")]}, "a"])
            assert close_to(found, expected)
            for url, says in (
                ("/broken.png", "not an image that can be read"),
                ("/gone.png", "the server answered 404"),
                ("/inside", "not on the public internet"),
            ):
                error = refusal(client.post("/v1/embeddings", json={"input": [{"image": site.url + url}]}))
                assert says in error["message"] and "input[0]" in error["message"]
            for url in ("http://169.254.169.254/latest", "http://localhost/", "http://[::1]/", "http://10.0.0.1/"):
                error = refusal(client.post("/v1/embeddings", json={"input": [{"image": url}]}))
                assert "not on the public internet" in error["message"]
            assert (
                "an http(s) URL"
                in refusal(client.post("/v1/embeddings", json={"input": [{"image": "file:///x"}]}))["message"]
            )


def test_fetched_bytes_are_bounded_for_a_request_and_for_all(engine):
    red = picture("red")
    with site_server.serving() as site, ExitStack() as held:
        site.pages["/red.png"] = (200, {}, red)
        url = f"{site.url}/red.png"
        listener = held.enter_context(socket.create_server(("127.0.0.1", 0)))
        silent = f"127.0.0.1:{listener.getsockname()[1]}"  # takes connections, and answers none
        addresses = (*site.limits.allowed_addresses, silent)
        image = ImageLimits(fetch=FetchLimits(seconds=3, allowed_addresses=addresses))
        limits = RequestLimits(body_bytes=2 * len(red) + 1, image=image)

        async def hold(fetcher: Fetcher, count: int, others: int = 0) -> int:
            """Bytes held by requests of two images, and then by one of ``count``."""
            async with AsyncExitStack() as held:
                for images in [2] * others + [count]:
                    item = Item(("a",), (url,) * images, video=(RED,), where="input[0]")
                    [found] = await held.enter_async_context(fetcher.fetched([item]))
                    assert found.images == (red,) * images and found.video == (RED,)
                return fetcher._held

        with closing(Fetcher(limits)) as fetcher:
            assert asyncio.run(hold(fetcher, 2)) == 2 * len(red)
            assert asyncio.run(hold(fetcher, 2, others=3)) == 8 * len(red)
            for gone in (True, False):  # the client leaves while an image comes, or one cannot be had
                item = Item(("a",), (url, f"http://{silent}/" if gone else f"{site.url}/gone.png"))

                async def leave(item: Item = item, gone: bool = gone) -> None:
                    async with asyncio.timeout(0.5 if gone else SOON), fetcher.fetched([item]):
                        pass

                with pytest.raises(TimeoutError if gone else RequestError):
                    asyncio.run(leave())
                assert fetcher._held == 0
            for count, others, status in ((3, 0, 413), (9, 1, 413), (2, 4, 503)):
                with pytest.raises(RequestError) as error:
                    asyncio.run(hold(fetcher, count, others))
                assert error.value.status == status and fetcher._held == 0
        with serving(Served(Engine(engine.model, image, 2048), "little", limits=limits)) as client:
            for images, status in (([url] * 2, 200), ([url] * 9, 413), ([f"{site.url}/gone.png", url], 400)):
                answer = client.post("/v1/embeddings", json={"input": [{"images": images}]})
                assert answer.status_code == status, answer.text


def test_a_request_to_slow_hosts_leaves_others_their_images():
    red = picture("red")
    with site_server.serving() as site, socket.create_server(("127.0.0.1", 0)) as listener:
        site.pages["/red.png"] = (200, {}, red)
        silent = f"127.0.0.1:{listener.getsockname()[1]}"  # takes connections, and answers none
        fetch = FetchLimits(seconds=2, allowed_addresses=(*site.limits.allowed_addresses, silent))
        limits = RequestLimits(image=ImageLimits(fetch=fetch))

        async def beside(fetcher: Fetcher) -> bool:
            """Whether an image comes while 16 others are waited for."""

            async def get(url: str, images: int) -> None:
                async with fetcher.fetched([Item(("a",), (url,) * images, where="input[0]")]):
                    pass

            slow = asyncio.create_task(get(f"http://{silent}/", 16))
            await asyncio.sleep(0.1)
            await get(f"{site.url}/red.png", 1)
            first = not slow.done()
            slow.cancel()
            return first

        with closing(Fetcher(limits)) as fetcher:
            assert asyncio.run(beside(fetcher))


def test_look_ups_whose_clients_have_left_are_bounded(served):
    async def leave() -> int:
        service = Service(served)
        asked = [asyncio.create_task(service.looked_up(partial(time.sleep, 0.3))) for _ in range(60)]
        await asyncio.sleep(0.05)
        for one in asked:
            one.cancel()
        running = sum(thread.name.startswith("muco-look-up") for thread in threading.enumerate())
        service.look_ups.close()
        return running

    assert asyncio.run(leave()) == LOOK_UPS


def test_opened_images_of_an_item_are_bounded(engine, monkeypatch):
    monkeypatch.setattr("muco.embed.vectors.ROW_BYTES", 3 * 4 * 84 * 84)
    item = Item(("x",), tuple(data_uri(picture("red", (84, 84))) for _ in range(5)), where="input[3]")
    assert engine.prepare(replace(item, images=item.images[:4])).tokens
    for large in (item, replace(item, images=item.images[:2], video=item.images[2:])):
        with pytest.raises(MucoError, match=r"the images of input\[3\] take over 0 MiB; use fewer or smaller ones"):
            engine.prepare(large)


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def process(folder):
    """A server that waits long before it makes a batch."""
    options = ("--name", "mine", "--max-items", "7", "--batch-milliseconds", "1500")
    with command(folder, *options, token="secret") as running:
        yield running


@pytest.mark.slow
def test_the_stock_openai_client_works_unchanged(process, engine):
    from openai import BadRequestError, NotFoundError, OpenAI

    with OpenAI(base_url=f"{process.address}/v1", api_key="secret", max_retries=0) as client:
        found = client.embeddings.create(model="mine", input=["a red ring", "b"])  # base64 by default
        assert close_to(np.float32([one.embedding for one in found.data]), engine.model.encode(["a red ring", "b"]))
        assert found.usage.total_tokens > 4 and found.model == "mine"
        found = client.embeddings.create(model="mine", input="a", encoding_format="float", dimensions=16)
        assert len(found.data[0].embedding) == 16
        items: Any = [{"text": "What is it?", "image": RED}]
        found = client.embeddings.create(model="mine", input=items)
        expected = engine.model.encode([{"text": "What is it?", "image": picture("red")}])
        assert close_to(np.float32([found.data[0].embedding]), expected)
        assert [model.id for model in client.models.list()] == ["mine"]
        with pytest.raises(BadRequestError, match="token ids are not accepted"):
            client.embeddings.create(model="mine", input=[1, 2])
        with pytest.raises(NotFoundError, match="unknown model"):
            client.embeddings.create(model="text-embedding-3-small", input="a")
        from openai.types import CreateEmbeddingResponse

        messages = [{"role": "user", "content": "a"}]
        found = client.post("/embeddings", body={"messages": messages}, cast_to=CreateEmbeddingResponse)
        assert len(found.data) == 1


@pytest.mark.slow
def test_it_says_what_it_offers_and_sigterm_finishes_what_was_accepted(process):
    """As its window is long, requests are surely accepted and not finished when the signal comes, at the very end."""
    running = process
    with ThreadPoolExecutor(16) as pool:
        assert running.facts == {"address": running.address, "model": "mine", "dimension": 64}
        started = [word for one in psutil.Process(running.process.pid).children() for word in one.cmdline()]
        assert any("spawn_main" in word for word in started), (
            "a model that is forked from a server with threads may hang"
        )
        assert httpx.get(f"{running.address}/v1/models").status_code == 401
        headers = {"Authorization": "Bearer secret"}
        with httpx.Client(base_url=running.address, timeout=SOON, headers=headers) as client:
            accepted = [pool.submit(embed, client, input=[f"{n}", "x"]) for n in range(16)]
            until(lambda: unfinished(client) == 32)
            running.process.send_signal(signal.SIGTERM)
            assert all(one.result().shape == (2, 64) for one in accepted)
        out, err = running.process.communicate(timeout=SOON)
        assert running.process.returncode == 0
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{running.address}/health")
    assert out == "" and "vectors of 64 dimensions" in err and "7 items" in err and running.address in err
    assert "secret" not in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--index", "{}/nothing"], "no such index"),
        (["--host", "no.such.host.invalid"], "--host no.such.host.invalid"),
        (["--host", "203.0.113.1"], "cannot listen"),
        (["--host", "a..b"], "--host a..b: not a name of a machine; name an address"),
        (["--host", "a" * 64], "not a name of a machine"),
        (["--queue", "5"], "--max-items"),
        (["--instruction", "query"], "INPUT_TYPE=TEXT"),
        (["--allow-origin", "app.example.com"], "https://app.example.com"),
        (["--allow-origin", "https://app.example.com/page"], "scheme, host and perhaps port"),
        (["--token-file", "{}/nothing"], "No such file"),
        (["--token-file", "{}/empty"], "one word"),
        (["--allow-host", "https://search.example.com"], "write a name, as search.example.com"),
        (["--fetch-host", "https://cdn.example.com"], "write a name as example.com"),
        (["--fetch-host", "cafe:8080"], "write a name as example.com"),
        (["--fetch-address", "10.0.0.7"], "write address and port, such as 10.0.0.7:9000"),
        (["--instruction", "query=Find <|emb|>"], "--instruction query turn 1: the text contains the special token"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_served(folder, tmp_path, capsys, forked, options, says):
    (tmp_path / "empty").write_text("\n")
    given = [option.format(tmp_path) for option in options]
    assert main(["serve", "--model", str(folder), "--port", "0", *given]) == 1
    out, err = capsys.readouterr()
    assert not out and err.splitlines()[-1].startswith("muco: ") and says in err.splitlines()[-1]


def test_the_limit_that_is_told_is_the_one_that_holds(engine, capsys):
    small = Engine(engine.model, engine.image_limits, 300)  # as of a model whose context is that
    with socket.create_server(("127.0.0.1", 0)) as listener:
        _announce(Served(small, "little"), listener)
    assert "one item: 300 tokens" in capsys.readouterr().err


@pytest.mark.parametrize("token", ["two words", "sécret", os.fsdecode(b"s\xe9cret")])
def test_a_token_that_no_client_can_send_is_refused(monkeypatch, tmp_path, token):
    monkeypatch.setenv(TOKEN, token)
    (tmp_path / "token").write_bytes(os.fsencode(token))
    for file, says in ((None, f"{TOKEN}: a token is one word"), (tmp_path / "token", "token")):
        with pytest.raises(MucoError, match=says):
            _token(file)
    monkeypatch.setenv(TOKEN, " \n")
    assert _token(None) is None


def test_a_port_in_use_is_said_before_the_model_is_loaded(capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["serve", "--model", "there is none", "--port", str(port)]) == 1
    assert f"cannot listen at 127.0.0.1 port {port}: Address already in use" in capsys.readouterr().err


def test_a_missing_model_is_1(tmp_path, capsys, forked):
    assert main(["serve", "--model", str(tmp_path / "none"), "--port", "0"]) == 1
    assert "none" in capsys.readouterr().err


def test_help_imports_no_server(capsys):
    code = (
        "import sys; from muco.cli import main; main(['serve', '--help'])\n"
        "print([n for n in ('torch', 'fastapi', 'uvicorn', 'lancedb') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
