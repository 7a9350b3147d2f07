"""The search: its route against the index itself, and its page as people use it, in a real browser."""

from __future__ import annotations

import shlex
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from servers import SOON, data_uri, picture, serving, until

from muco.search import Hit, Index
from muco.serve.app import Served
from muco.serve.batcher import BatchLimits
from muco.serve.engine import Engine
from muco.serve.images import ImageLimits
from muco.serve.look_ups import EXACT_LOOK_UPS
from muco.serve.schema import RequestLimits

CHROMIUM = Path("/usr/bin/chromium")
COLOURS = "red green blue white black orange purple yellow cyan gray".split()
NASTY = "<img src=x onerror=alert(1)> & 'quoted'"


@pytest.fixture(scope="module")
def index(tiny_model, tmp_path_factory) -> Index:
    from muco.model import load

    folder = tmp_path_factory.mktemp("searched")
    tiny_model.save(str(folder / "model"))
    index = Index.create(folder / "index", load(folder / "model", device="cpu"))
    rows: list[dict[str, Any]] = [
        {"id": f"image-{n}", "image": picture(colour), "colour": colour, "year": 2020 + n}
        for n, colour in enumerate(COLOURS)
    ]
    rows.append({"id": "both", "image": picture("pink"), "text": "a pink thing", "colour": "pink", "year": 2030})
    rows.append({"id": "text", "text": NASTY, "colour": "none", "year": 2031})
    index.add(rows)
    return index


@pytest.fixture(scope="module")
def served(index) -> Served:
    return Served(Engine(index.model, ImageLimits(), 2048), "little", index=index)


@pytest.fixture(scope="module")
def client(served) -> Iterator[httpx.Client]:
    with serving(served) as client:
        yield client


def search(client: httpx.Client, **body: Any) -> list[dict[str, Any]]:
    answer = client.post("/search", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["hits"]


# ---------------------------------------------------------------- POST /search


@pytest.mark.parametrize(
    ("body", "query"),
    [
        ({"text": "a red thing"}, {"text": "a red thing"}),
        ({"image": data_uri(picture("red"))}, {"image": picture("red")}),
        ({"text": "x", "image": data_uri(picture("blue")), "k": 3}, {"text": "x", "image": picture("blue"), "k": 3}),
        ({"like": "image-2", "k": 5}, {"like": "image-2", "k": 5}),
        ({"text": "x", "where": "year >= 2025", "exact": True}, {"text": "x", "where": "year >= 2025", "exact": True}),
    ],
)
def test_it_finds_what_the_index_finds(client, index, body, query):
    hits, expected = search(client, **body), index.search(**query)
    assert [hit["id"] for hit in hits] == [hit.id for hit in expected]
    assert np.allclose([hit["score"] for hit in hits], [hit.score for hit in expected], atol=1e-5)
    for hit, other in zip(hits, expected, strict=True):
        assert set(hit) == {"id", "score", "text", "thumbnail", "extra"}
        assert hit["extra"] == other.extra and hit["text"] == other.text
        assert (hit["thumbnail"] or "data:image/jpeg;base64,").startswith("data:image/jpeg;base64,")


def test_every_column_is_json(tmp_path, index):
    typed = Index.create(tmp_path / "index", index.model)
    noon = datetime(2020, 1, 2, 12, tzinfo=UTC)
    typed.add(
        [{"id": 0, "text": "a", "day": date(2020, 1, 2), "at": noon, "price": Decimal("1.50"), "x": float("inf")}]
    )
    served = Served(Engine(index.model, ImageLimits(), 2048), "little", index=typed)
    with serving(served) as client:
        hits = search(client, text="a", where="day >= date '2020-01-01' AND price = 1.5")
    said = {"day": "2020-01-02", "at": "2020-01-02T12:00:00Z", "price": "1.50", "x": None}
    assert [hit["id"] for hit in hits] == ["0"] and hits[0]["extra"] == said


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, "pass 'text', 'image', 'video' or several of them, or 'like'"),
        ({"text": "a", "like": "image-1"}, "or 'like'"),
        ({"like": "no such row"}, "no row has the id"),
        ({"text": "a", "k": 101}, "at most 100 hits"),
        ({"text": "a", "k": 0}, "greater than or equal to 1"),
        ({"text": "a", "where": "size > 3"}, "not a column"),
        ({"text": "a", "where": "starts_with(image, '/home/a')"}, "not a column"),  # paths are not told
        ({"text": "a", "where": "colour = 'red' year >= 2020"}, "(character 16): expected the end, AND or OR"),
        ({"like": "text", "where": "year = 2021) OR (year = 2022"}, "(character 12): expected the end, AND or OR"),
        ({"image": "/etc/passwd"}, "data:image/…;base64 URI"),
        ({"text": "a", "vector": [1]}, "unknown field"),
    ],
)
def test_what_is_wrong_is_named_without_a_path(client, index, body, says):
    answer = client.post("/search", json=body)
    assert answer.status_code == 400 and says in answer.json()["error"]["message"]
    assert str(index.path) not in answer.text


class SlowIndex(Index):
    """An index whose exact searches wait for a signal."""

    go: threading.Event

    def search(self, *args: Any, exact: bool = False, **kwargs: Any) -> list[Hit]:
        assert not exact or self.go.wait(SOON)
        return super().search(*args, exact=exact, **kwargs)


def test_exact_searches_leave_others_their_threads_and_too_many_are_refused(index):
    slow = SlowIndex.open(index.path)
    slow.go = threading.Event()
    limits, batches = RequestLimits(seconds=1), BatchLimits(queue=12)
    served = Served(Engine(index.model, ImageLimits(), 2048), "little", limits, batches, index=slow)
    body = {"like": "image-2", "exact": True}
    with serving(served) as client, ThreadPoolExecutor(20) as pool, ExitStack() as stack:
        stack.callback(slow.go.set)  # also where the test fails
        exact = [pool.submit(client.post, "/search", json=body) for _ in range(20)]
        refused = [one.result() for one in exact]  # those that run or wait, when the time is over
        assert {answer.status_code for answer in refused} == {503}
        codes = [answer.json()["error"]["code"] for answer in refused]
        assert codes.count("timeout") == EXACT_LOOK_UPS + 12 and codes.count("queue_full") == 20 - 12 - EXACT_LOOK_UPS
        assert all("retry-after" in answer.headers for answer in refused)
        assert len(search(client, like="image-2")) == 10  # although the first one still runs
        slow.go.set()
        until(lambda: client.post("/search", json=body).status_code == 200)  # nothing of the others is left


def test_an_index_that_is_damaged_is_500_without_a_path(tmp_path, index, caplog):
    damaged = Index.create(tmp_path / "index", index.model)
    damaged.add([{"id": "a", "text": "a"}])
    with serving(Served(Engine(index.model, ImageLimits(), 2048), "little", index=damaged)) as client:
        assert [hit["id"] for hit in search(client, text="a")] == ["a"]
        for file in (Path(damaged.path) / "rows.lance" / "data").iterdir():
            file.write_bytes(b"")
        answer = client.post("/search", json={"text": "a"})
    assert answer.status_code == 500 and "the server's log says why" in answer.json()["error"]["message"]
    assert str(tmp_path) not in answer.text and damaged.path in caplog.text


def test_an_index_of_another_model_is_refused(index, scenes, tmp_path, capsys, forked):
    from muco.cli import main
    from muco.model import from_backbone
    from muco.sizes import TinyConfig
    from muco.tiny import tiny_qwen2_vl

    sizes = TinyConfig(width=32, heads=2, kv_heads=1, layers=1, feed_forward=32, vision_width=32, vision_depth=1)
    from_backbone(*tiny_qwen2_vl(["other words"], sizes), device="cpu").save(str(tmp_path))
    assert main(["serve", "--model", str(tmp_path), "--index", str(index.path), "--port", "0"]) == 1
    assert "was made with the model" in capsys.readouterr().err


# ---------------------------------------------------------------- the page


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not shutil.which(str(CHROMIUM)):
        pytest.skip(f"there is no {CHROMIUM} to open the page in")
    sync = pytest.importorskip("playwright.sync_api")
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=[(1200, 900), (390, 844)], ids=["desktop", "phone"])
def page(browser, client, request) -> Iterator[Any]:
    width, height = request.param
    page = browser.new_page(viewport={"width": width, "height": height})
    page.set_default_timeout(300_000)
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda sent: problems.append(sent.url) if not sent.url.startswith(
        (str(client.base_url), "data:", "blob:")) else None)  # fmt: skip
    page.goto(str(client.base_url))
    yield page
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing sticks out"
    assert problems == [], "no script failed, and nothing was asked of anyone else"
    page.close()


def hits(page: Any, count: int = 12) -> list[Any]:
    page.locator(".hit").nth(count - 1).wait_for()
    return page.locator(".hit").all()


def test_words_then_more_like_one_then_back(page):
    page.get_by_label("Words").fill("a red thing")
    page.keyboard.press("Enter")
    assert len(hits(page)) == 12
    assert page.get_by_role("heading", level=2).inner_text() == "“a red thing”"
    assert page.get_by_role("status").inner_text() == "12 results"
    assert "alert(1)" in page.locator("#results").inner_text(), "what looks like HTML is text"
    page.get_by_role("button", name="More like a pink thing").click()
    page.get_by_role("heading", name="More like “a pink thing”").wait_for()
    assert len(hits(page, 11)) == 11 and "pink" not in page.locator(".hit dd").all_inner_texts()
    page.go_back()
    page.get_by_role("heading", name="“a red thing”", exact=True).wait_for()
    assert len(hits(page)) == 12


def test_back_after_a_reload_shows_nothing_of_another_search(page):
    for words in ("red", "blue"):
        if words == "blue":
            page.reload()
        page.get_by_label("Words").fill(words)
        page.keyboard.press("Enter")
        page.get_by_role("heading", name=f"“{words}”").wait_for()
        hits(page)
    page.go_back()  # to "red", which the page has forgotten
    page.locator("#heading:empty").wait_for(state="attached", timeout=10_000)
    assert page.locator(".hit").count() == 0
    page.go_forward()
    page.get_by_role("heading", name="“blue”").wait_for()


def test_back_ends_a_running_search(page):
    page.get_by_label("Words").fill("red")
    page.keyboard.press("Enter")
    hits(page)
    page.route("**/search", lambda route: None)  # which never answers
    page.get_by_label("Words").fill("blue")
    page.keyboard.press("Enter")
    page.get_by_text("Searching…").wait_for()
    page.go_back()
    page.locator("#results[aria-busy=false]").wait_for(state="attached", timeout=10_000)
    assert page.get_by_role("status").inner_text() == ""


def test_an_image_alone_and_with_words(page):
    file = {"name": "red.png", "mimeType": "image/png", "buffer": picture("red")}
    page.set_input_files("#file", file)
    page.locator("#preview").wait_for()
    page.get_by_role("button", name="Search").click()
    first = hits(page)[0].inner_text()
    assert "image-0" in first and "1.000" in first and "red" in first
    assert page.get_by_role("heading", level=2).inner_text() == "Your image"
    page.get_by_label("Words").fill("thing")
    page.get_by_role("button", name="Search").click()
    page.get_by_role("heading", name="Your image and “thing”").wait_for()
    page.get_by_role("button", name="Remove the image").click()
    assert not page.locator("#preview").is_visible() and page.locator("#pick").is_visible()


@pytest.mark.parametrize("way", ["drop", "paste"])
def test_an_image_can_be_dropped_and_pasted(page, way):
    page.evaluate(
        """([way, text]) => {
            const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
            const data = new DataTransfer();
            data.items.add(new File([bytes], "red.png", { type: "image/png" }));
            const event = way === "drop"
                ? new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true })
                : new ClipboardEvent("paste", { clipboardData: data, bubbles: true, cancelable: true });
            document.body.dispatchEvent(event);
        }""",
        [way, data_uri(picture("red")).partition(",")[2]],
    )
    page.locator("#preview").wait_for()
    page.get_by_role("button", name="Search").click()
    assert "image-0" in hits(page)[0].inner_text()


def test_a_large_image_is_made_smaller_before_it_is_sent(page):
    file = {"name": "large.png", "mimeType": "image/png", "buffer": picture("red", (5000, 4000))}
    page.set_input_files("#file", file)
    page.locator("#preview").wait_for()
    assert page.evaluate("document.getElementById('preview').naturalWidth") == 1536
    page.get_by_role("button", name="Search").click()
    hits(page)


def test_people_see_what_is_wrong(page):
    error = page.get_by_role("alert")
    page.get_by_role("button", name="Search").click()
    error.wait_for()
    assert error.inner_text() == "Type some words, or choose an image."
    page.set_input_files("#file", {"name": "a.txt", "mimeType": "text/plain", "buffer": b"words"})
    page.get_by_text("“a.txt” is not an image.").wait_for()
    page.set_input_files("#file", {"name": "b.png", "mimeType": "image/png", "buffer": b"words"})
    page.get_by_text("“b.png” cannot be read").wait_for()
    page.get_by_label("Words").fill("red")
    page.get_by_text("Filter, number of results").click()
    page.get_by_label("Filter on columns").fill("size > 3")
    page.get_by_role("button", name="Search").click()
    page.get_by_text("not a column").wait_for()
    page.get_by_label("Filter on columns").fill("year < 2022")
    page.get_by_role("button", name="Search").click()
    assert len(hits(page, 2)) == 2 and not error.is_visible()


def test_the_keyboard_is_enough(page):
    page.get_by_label("Words").focus()
    page.keyboard.type("red")
    page.keyboard.press("Enter")
    hits(page)
    for _ in range(12):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.className") == "more":
            break
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="More like").wait_for()
    assert page.evaluate("document.activeElement.id") == "heading"


def test_everything_has_a_name(page):
    page.get_by_label("Words").fill("red")
    page.keyboard.press("Enter")
    hits(page)
    for element in page.locator("input, select, button").all():
        name = element.evaluate(
            "e => e.getAttribute('aria-label') || e.textContent || e.labels?.[0]?.textContent || ''"
        )
        assert name.strip(), element.evaluate("e => e.outerHTML")
    assert all(image.get_attribute("alt") for image in page.locator("img").all())
    assert page.locator("html").get_attribute("lang") == "en"


def test_a_token_is_asked_for_and_sent(browser, served):
    from dataclasses import replace

    with serving(replace(served, token="secret")) as client:
        page = browser.new_page()
        page.goto(str(client.base_url))
        page.get_by_label("Words").fill("red")
        page.keyboard.press("Enter")
        page.get_by_text("asks for a token").wait_for()
        page.get_by_label("Access token").fill("secret")
        page.get_by_role("button", name="Search").click()
        hits(page)
        page.close()


def test_a_server_that_is_gone_is_said(browser, served):
    with serving(served) as client:
        page = browser.new_page()
        page.goto(str(client.base_url))
    page.get_by_label("Words").fill("red")
    page.keyboard.press("Enter")
    page.get_by_text("The server cannot be reached").wait_for()
    page.close()


# ---------------------------------------------------------------- the documentation


def test_the_requests_of_the_documentation_are_answered(client):
    text = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("curl ")]
    assert len(lines) >= 9
    image = data_uri(picture("red"))
    for line in lines:
        [word, *arguments] = shlex.split(line.replace("'$IMAGE'", image).replace("$SERVER", str(client.base_url)))
        assert (word, arguments[0], arguments[2], arguments[4]) == ("curl", "-s", "-H", "-d")
        body = arguments[5].replace("2019/ring.jpg", "image-1")
        answer = client.post(arguments[1], content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 200, (line, answer.text)


def test_the_commands_of_the_documentation_parse():
    import typer

    from muco.cli.app import app

    text = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("muco ")]
    assert len(lines) == 3
    serve = typer.main.get_command(app).commands["serve"]
    for line in lines:
        serve.make_context("serve", shlex.split(line, comments=True)[2:])
