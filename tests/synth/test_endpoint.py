"""The client of a model server, against a real server that fails in every way."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import socket
import time
from collections.abc import Awaitable, Callable
from email.utils import formatdate
from typing import Any

import pytest
from chat_server import REFUSAL, ChatServer, Fault
from PIL import Image

from muco.errors import MucoError
from muco.synth import endpoint as endpoint_module
from muco.synth.chat import Budget, BudgetSpent, Limits, Unanswered, image_part, read_answer, retry_after, user
from muco.synth.endpoint import Endpoint, EndpointError

QUICK = Limits(backoff=0.01, retries=3, timeout=120)
SCHEMA = {"type": "object", "properties": {"answer_cls": {"type": "string"}}, "required": ["answer_cls"]}


def ask(server: ChatServer | str, question: str = "hello", model: str = "seer", **options: Any) -> Any:
    """One answer; what an endpoint raises is raised."""

    async def go(endpoint: Endpoint) -> Any:
        return await endpoint.ask([user(question)])

    return with_endpoint(server, go, model, **options)


def with_endpoint(
    server: ChatServer | str, go: Callable[[Endpoint], Awaitable[Any]], model: str = "seer", **options: Any
) -> Any:
    async def inside() -> Any:
        url = server if isinstance(server, str) else server.url
        async with Endpoint(url, model, **{"limits": QUICK} | options) as endpoint:
            return await go(endpoint)

    return asyncio.run(inside())


# ── a question and its answer ────────────────────────────────────────────────────────────────────────────────────────


def test_a_request_says_all_that_was_asked_for():
    with ChatServer() as server:
        server.keep_bodies = True

        async def go(endpoint: Endpoint) -> None:
            answer = await endpoint.ask(
                [{"role": "system", "content": "be brief"}, user("hello")], schema=SCHEMA, seed=7
            )
            assert (answer.text, answer.finish) == ("Yes.", "stop")
            assert vars(endpoint.usage) == {
                "requests": 1,
                "retries": 0,
                "answers": 1,
                "unanswered": 0,
                "prompt_tokens": 100,
                "completion_tokens": 10,
                "estimated": 0,
            }

        with_endpoint(server, go, sampling={"temperature": 0.5, "top_k": 20, "max_tokens": None})
    (body,) = server.bodies
    assert body == {
        "model": "seer",
        "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}],
        "temperature": 0.5,
        "top_k": 20,
        "seed": 7,
        "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": SCHEMA}},
    }


def test_an_image_is_upright_within_the_budget_and_without_metadata(tmp_path):
    photo = Image.new("RGB", (400, 300), "red")
    photo.paste("blue", (0, 0, 200, 300))  # left half
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees: left becomes top
    exif[0x010E] = "a secret description"
    photo.save(tmp_path / "photo.jpg", exif=exif)
    url = image_part(tmp_path / "photo.jpg", 30_000)["image_url"]["url"]
    start, data = url.split(",")
    assert start == "data:image/jpeg;base64"
    raw = base64.b64decode(data)
    assert b"secret" not in raw
    sent = Image.open(io.BytesIO(raw))
    assert sent.width * sent.height <= 30_000 < 1.1 * sent.width * sent.height
    assert sent.width / sent.height == pytest.approx(3 / 4, abs=0.01)
    assert [max(range(3), key=sent.getpixel((75, y)).__getitem__) for y in (10, 190)] == [2, 0]  # blue above red


def test_the_server_recognises_what_is_sent(scenes):
    with ChatServer(scenes) as server:

        async def go(endpoint: Endpoint) -> list[str]:
            parts = [image_part(scenes / f"images/dev/{n:05}.png", 1 << 20) for n in range(3)]
            return [(await endpoint.ask([user(part, "Describe it.")])).text for part in parts]

        told = with_endpoint(server, go)
    lines = (scenes / "dev.jsonl").read_text().splitlines()
    assert told == [json.loads(line)["turns"][-1]["target"] for line in lines[:3]]


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ({"content": "a ring"}, "a ring"),
        ({"content": "<think>\nhm, {a}\n</think>\n\na ring"}, "a ring"),
        ({"content": None}, ""),
        ({}, ""),
        ({"content": None, "refusal": "I will not."}, "I will not."),
    ],
)
def test_what_is_read_of_an_answer(raw, text):
    answer, usage = read_answer(json.dumps({"choices": [{"message": raw}]}).encode())
    assert (answer.text, usage) == (text, None)


def test_tokens_that_the_server_does_not_count_are_estimated():
    with ChatServer(counts=False) as server:

        async def go(endpoint: Endpoint) -> None:
            await endpoint.ask([user("x" * 400)])
            assert (endpoint.usage.prompt_tokens, endpoint.usage.completion_tokens) == (100, 1)
            assert endpoint.usage.estimated == 1 and endpoint.budget.used_tokens == 101

        with_endpoint(server, go)


# ── what passes ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["429", "500", "cut", "html", "slow"])
def test_what_passes_is_asked_again(kind):
    with ChatServer(faults=[Fault(kind, times=2, seconds=2 if kind == "slow" else 0)]) as server:

        async def go(endpoint: Endpoint) -> None:
            assert (await endpoint.ask([user("hello")])).text == "Yes."
            assert (endpoint.usage.requests, endpoint.usage.retries, endpoint.usage.unanswered) == (3, 2, 0)

        with_endpoint(server, go, limits=Limits(backoff=0.01, timeout=1 if kind == "slow" else 120))


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("500", "HTTP 500"),
        ("429", "slow down"),
        ("cut", "no connection"),
        ("html", "not an answer of a chat endpoint: <html>"),
        ("slow", "no answer within 0.05 s"),
    ],
)
def test_what_does_not_pass_is_said(kind, says):
    with ChatServer(faults=[Fault(kind, seconds=0.3 if kind == "slow" else 0)]) as server:
        limits = Limits(backoff=0.01, retries=1, timeout=0.05 if kind == "slow" else 120)
        with pytest.raises(Unanswered, match=says):
            ask(server, limits=limits)
    assert server.asked() <= 2 * endpoint_module.ROUNDS


def test_a_question_that_alone_fails_gives_way_to_others():
    """Where the server answers others, one round of retries is enough."""
    with ChatServer(faults=[Fault("500", every=2)]) as server:

        async def go(endpoint: Endpoint) -> list[Any]:
            return await asyncio.gather(
                *(endpoint.ask([user(f"question {n}")]) for n in range(20)), return_exceptions=True
            )

        results = with_endpoint(server, go, limits=Limits(backoff=0.01, retries=2, concurrency=2, max_failures=50))
    failed = [r for r in results if isinstance(r, Unanswered)]
    assert 3 < len(failed) < 17 and all(r.text == "Yes." for r in results if not isinstance(r, Unanswered))
    assert server.asked(status=500) <= 3 * (len(failed) + 4)  # the first and the last may find no answer beside them


def test_a_refused_question_is_not_asked_again():
    with ChatServer(faults=[Fault("400")]) as server, pytest.raises(Unanswered, match="HTTP 400.*out of order"):
        ask(server)
    assert server.asked() == 1


def test_retry_after_is_honoured_by_all():
    with ChatServer(faults=[Fault("429", times=1, seconds=0.6)]) as server:

        async def go(endpoint: Endpoint) -> float:
            start = time.monotonic()
            await endpoint.ask([user("first")])
            return time.monotonic() - start

        assert 0.6 <= with_endpoint(server, go) < 5


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("2.5", 2.5),
        ("-3", 0.0),
        ("nan", 0.0),
        ("1e9", 3600.0),
        ("soon", None),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0),
    ],
)
def test_forms_of_retry_after(value, seconds):
    assert retry_after({"retry-after": value}) == seconds
    assert retry_after({}) is None
    soon = formatdate(time.time() + 1000, usegmt=True)
    assert retry_after({"retry-after": soon}) == pytest.approx(1000, abs=100)


def test_a_hundred_at_once_where_ten_are_too_many():
    with ChatServer(capacity=10, latency=0.01) as server:

        async def go(endpoint: Endpoint) -> None:
            answers = await asyncio.gather(*(endpoint.ask([user(f"question {n}")]) for n in range(100)))
            assert {answer.text for answer in answers} == {"Yes."}
            assert endpoint.usage.answers == 100 and endpoint.usage.requests == 100 + endpoint.usage.retries

        limits = Limits(backoff=0.05, retries=30, concurrency=100)
        with_endpoint(server, go, limits=limits)
    assert server.asked(status=429) > 0 and server.asked(status=200) == 100


def test_no_more_at_once_than_allowed():
    with ChatServer(latency=0.02) as server:

        async def go(endpoint: Endpoint) -> None:
            await asyncio.gather(*(endpoint.ask([user(f"question {n}")]) for n in range(40)))

        with_endpoint(server, go, limits=Limits(concurrency=7))
    assert server.most_at_once == 7


def test_requests_per_minute():
    with ChatServer() as server:

        async def go(endpoint: Endpoint) -> float:
            start = time.monotonic()
            await asyncio.gather(*(endpoint.ask([user(f"question {n}")]) for n in range(11)))
            return time.monotonic() - start

        assert with_endpoint(server, go, limits=Limits(requests_per_minute=1200)) >= 10 * 60 / 1200


# ── what stops a run ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_budget_of_requests_counts_retries_and_is_shared():
    with ChatServer(faults=[Fault("500", times=1)]) as server:

        async def go(endpoint: Endpoint) -> None:
            other = Endpoint(server.url, "scribe", limits=QUICK, budget=endpoint.budget)
            await endpoint.ask([user("first")])
            await other.ask([user("second")])
            with pytest.raises(BudgetSpent, match="5 requests"):
                await endpoint.ask([user("third")])
            await other._client.close()

        with_endpoint(server, go, budget=Budget(requests=5))
    assert server.asked() == 5


def test_a_budget_of_tokens():
    with ChatServer() as server:

        async def go(endpoint: Endpoint) -> None:
            for n in range(3):
                await endpoint.ask([user(f"question {n}")])
            with pytest.raises(BudgetSpent, match="300 tokens"):
                await endpoint.ask([user("one more")])

        with_endpoint(server, go, budget=Budget(tokens=300))
    assert server.asked() == 3


def test_failures_in_a_row_stop_with_an_example():
    with ChatServer(faults=[Fault("html")]) as server:

        async def go(endpoint: Endpoint) -> None:
            await asyncio.gather(*(endpoint.ask([user(f"question {n}")]) for n in range(9)))

        with pytest.raises(EndpointError, match=r"4 answers of 'seer' in a row.*<h1>502 Bad Gateway"):
            with_endpoint(server, go, limits=Limits(retries=0, max_failures=4))


def test_a_useful_answer_ends_the_row():
    endpoint = Endpoint("http://localhost:1", "m", limits=Limits(max_failures=3))
    for _ in range(4):
        endpoint.useless("one")
        endpoint.useless("two")
        endpoint.useful()
    endpoint.useless("three")
    endpoint.useless("four")
    with pytest.raises(EndpointError, match="3 answers .*; the last: five"):
        endpoint.useless("five")


# ── before any work ──────────────────────────────────────────────────────────────────────────────────────────────────


def check(server: ChatServer | str, model: str = "seer", *, image: bool = False, schema: Any = None, **options: Any):
    async def go(endpoint: Endpoint) -> Endpoint:
        await endpoint.check(image=image, schema=schema)
        return endpoint

    return with_endpoint(server, go, model, **options)


@pytest.mark.parametrize("lists_models", [True, False])
def test_a_sound_server_passes(lists_models):
    with ChatServer(lists_models=lists_models) as server:
        assert check(server, image=True, schema=SCHEMA).structured
    assert server.log == [("trial", server.log[0][1], 200)]


def test_nobody_there():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(EndpointError, match=rf"{url}/v1: cannot be reached \(.+\); start the server"):
            check(url)


def test_a_wrong_model_is_named_with_the_nearest():
    with ChatServer(models=["seer-7b", "scribe", "llama:latest"]) as server:
        with pytest.raises(EndpointError, match="no model 'ser-7b'; did you mean 'seer-7b'.*It serves seer-7b, scribe"):
            check(server, "ser-7b")
        assert not server.log
        assert check(server, "llama:latest")
    with (
        ChatServer(lists_models=False) as server,
        pytest.raises(EndpointError, match="'nobody' refuses a first question: HTTP 404: .*does not exist"),
    ):
        check(server, "nobody")


def test_a_model_that_is_blind():
    with ChatServer(sees=False) as server:
        with pytest.raises(EndpointError, match="'seer' refuses a first question with an image: .*takes no images"):
            check(server, image=True)
        check(server)


def test_no_structured_answers_is_logged_and_recorded(caplog):
    with ChatServer(structured=False) as server, caplog.at_level(logging.WARNING):
        server.keep_bodies = True

        async def go(endpoint: Endpoint) -> None:
            await endpoint.check(schema=SCHEMA)
            assert endpoint.structured is False
            await endpoint.ask([user("hello")], schema=SCHEMA)

        with_endpoint(server, go)
    assert "response_format is not supported" in caplog.text
    assert [("response_format" in body) for body in server.bodies] == [True, False, False]


@pytest.mark.parametrize("fault", ["500", "html"])
def test_a_server_that_is_out_of_order(fault):
    with ChatServer(faults=[Fault(fault)]) as server, pytest.raises(EndpointError, match="first question"):
        check(server, schema=SCHEMA, limits=Limits(retries=1, backoff=0.01))


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://a/v1", "", "http://", "http://u:p@host/v1", "http://host/v1?key=1"]
)
def test_urls_that_are_none(url):
    with pytest.raises(EndpointError) as caught:
        Endpoint(url, "m")
    assert "key=1" not in str(caught.value) and "u:p" not in str(caught.value)


def test_the_path_of_a_url():
    urls = ["http://a:1", "http://a:1/", "https://a/v1/", "http://a/api/v3"]
    assert [Endpoint(url, "m").url for url in urls] == [
        "http://a:1/v1",
        "http://a:1/v1",
        "https://a/v1",
        "http://a/api/v3",
    ]


def test_fields_that_are_ours():
    with pytest.raises(EndpointError, match="'stream' is set by muco"):
        Endpoint("http://a", "m", sampling={"stream": True})


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "openai", None)
    with pytest.raises(MucoError, match=r"pip install 'muco\[synth\]'"):
        Endpoint("http://a", "m")


# ── the key ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_key_goes_to_the_server_and_nowhere_else(monkeypatch, caplog):
    secret = "sk-0123456789"
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-somebody-else")
    with ChatServer(key=secret, lists_models=False) as server, caplog.at_level(logging.DEBUG):
        with pytest.raises(EndpointError, match="environment variable MUCO_API_KEY.*Bearer none"):
            check(server)
        monkeypatch.setenv("MUCO_API_KEY", secret)
        assert ask(server).text == "Yes."
        server.key = "another"
        with pytest.raises(EndpointError) as caught:
            ask(server)
        assert "the API key is refused" in str(caught.value) and "Bearer …" in str(caught.value)
    assert secret not in str(caught.value) and secret not in caplog.text
    assert "somebody" not in caplog.text


def test_a_refusal_is_not_hidden():
    with ChatServer(faults=[Fault("refusal")]) as server:
        assert ask(server).text == REFUSAL
