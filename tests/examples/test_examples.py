"""The short examples, each run as a user runs it: what they print and write, and what they say of bad input."""

from __future__ import annotations

import base64
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pytest
from servers import serving

from muco.data import open_data
from muco.data.jsonl import write_jsonl
from muco.evaluate.retrieval import evaluate_retrieval
from muco.search import Index, build
from muco.serve.app import Served
from muco.serve.engine import Engine
from muco.serve.images import ImageLimits

FOLDER = Path(__file__).parents[2] / "examples"
SHORT = ("search_photos", "openai_client", "langchain_retriever", "train_your_jsonl", "evaluate_hub_model")


def run(name: str, *arguments: Any, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs an example as a user does, in a folder."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200", "HF_HUB_OFFLINE": "1"}
    line = [sys.executable, str(FOLDER / f"{name}.py"), *map(str, arguments)]
    done = processes.run(line, capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., Any]:
    """Runs an example as the main program of this process, where the libraries are loaded; gives what it printed."""

    def call(name: str, *arguments: Any) -> Any:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
        return capsys.readouterr()

    return call


@pytest.fixture
def refusal(call: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> Callable[..., str]:
    """Runs an example in the test's folder, where it must stop with one sentence and print nothing; gives that."""

    def refusal(name: str, *arguments: Any) -> str:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as stop:
            call(name, *arguments)
        sentence = stop.value.code  # Python prints it on stderr and exits with 1
        assert isinstance(sentence, str) and sentence.startswith("error: ") and "\n" not in sentence
        assert capsys.readouterr().out == ""
        return sentence

    return refusal


def loaded(name: str) -> dict[str, Any]:
    """The names that an example defines."""
    return runpy.run_path(str(FOLDER / f"{name}.py"))


@pytest.fixture(scope="module")
def model(tiny_path) -> Path:
    return tiny_path


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


# ── all of them ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", SHORT)
def test_an_example_is_short_says_how_to_run_it_and_is_listed(name: str) -> None:
    text = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 64
    docstring = text.split('"""')[1]
    assert f"python examples/{name}.py " in docstring and len(docstring.splitlines()) <= 7
    assert f"[{name}.py]({name}.py)" in (FOLDER / "README.md").read_text(encoding="utf-8")


def test_every_example_is_listed() -> None:
    listed = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in FOLDER.glob("*.py") if path.name not in listed] == []


# ── search_photos ────────────────────────────────────────────────────────────────────────────────────────────────────


def found(stdout: str) -> list[tuple[str, float]]:
    return [(row[2], float(row[1])) for row in re.findall(r"│ +(\d+) +│ +(\S+) +│ +(\S+) +│", stdout)]


@pytest.mark.slow
def test_photos_are_found_by_words(scenes: Path, model: Path, tiny_model, tmp_path: Path) -> None:
    photos = Path(shutil.copytree(scenes / "images/test", tmp_path / "photos"))
    names = sorted(path.name for path in photos.iterdir())
    done = run("search_photos", "photos", "a <b>red</b> star", "--model", model, "-k", 3, folder=tmp_path)
    assert "16 encoded, 0 deleted, 0 failed" in done.stderr
    scores = tiny_model.encode([photos / name for name in names]) @ tiny_model.encode("a <b>red</b> star")
    best = [names[i] for i in np.argsort(-scores)[:3]]
    assert [name for name, _ in found(done.stdout)] == best
    page = (tmp_path / "found.html").read_text(encoding="utf-8")
    assert re.findall(r"<figcaption>(\S+)</figcaption>", page) == best
    assert "a &lt;b&gt;red&lt;/b&gt; star" in page and "<b>" not in page
    pictures = [base64.b64decode(data) for data in re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)]
    assert len(pictures) == 3 and all(picture.startswith(b"\xff\xd8\xff") for picture in pictures)
    assert Index.open(f"{photos}.index").model_path == str(model)  # so `muco search` needs no --model


def test_a_search_by_picture_takes_in_what_changed(scenes: Path, model: Path, tmp_path: Path, call) -> None:
    photos = Path(shutil.copytree(scenes / "images/test", tmp_path / "photos"))
    build(photos, f"{photos}.index", model)
    shutil.copy(scenes / "images/dev/00000.png", photos / "new.png")
    (photos / "00000.png").unlink()
    (photos / "broken.png").write_bytes(b"no picture")
    page = tmp_path / "by.html"
    told = call("search_photos", photos, photos / "new.png", "--model", model, "--page", page)
    assert "1 encoded, 1 deleted, 1 failed" in told.err
    hits = found(told.out)
    assert hits[0] == ("new.png", pytest.approx(1, abs=1e-3)) and len(hits) == 12
    assert "new.png" in page.read_text(encoding="utf-8") and "00000.png" not in page.read_text(encoding="utf-8")


def test_a_search_in_no_folder_is_one_sentence(tmp_path: Path, refusal) -> None:
    assert "nowhere: no such folder" in refusal("search_photos", "nowhere", "x")
    assert [*tmp_path.iterdir()] == []


# ── openai_client ────────────────────────────────────────────────────────────────────────────────────────────────────

TEXTS = ("a red ring", "a small blue star at the top left", "nothing at all")


@pytest.fixture(scope="module")
def server(tiny_model):
    with serving(Served(Engine(tiny_model, ImageLimits(), 2048), "little", token="correct horse")) as client:
        yield f"{str(client.base_url).rstrip('/')}/v1"


@pytest.mark.parametrize("question", ["", "Which colour is it?"])
def test_the_stock_client_ranks_texts_for_an_image(
    server: str, scenes: Path, tiny_model, question: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MUCO_SERVE_TOKEN", "correct horse")
    image = scenes / "images/test/00000.png"
    options = ("--question", question, "--base-url", server)
    done = run("openai_client", "images/test/00000.png", *TEXTS, *options, folder=scenes)
    scores = tiny_model.encode([*TEXTS]) @ tiny_model.encode({"image": image, "text": question})
    order = np.argsort(-scores)
    lines = [line.split("  ") for line in done.stdout.splitlines()]
    assert [text for _, text in lines] == [TEXTS[i] for i in order]
    np.testing.assert_allclose([float(score) for score, _ in lines], scores[order], atol=1e-4)
    assert re.findall(r"(\d) vectors as (\w+), [1-9]\d* tokens", done.stderr) == [("3", "base64"), ("1", "float")]


def test_what_a_client_cannot_do_is_one_sentence(
    server: str, scenes: Path, tmp_path: Path, refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = scenes / "images/test/00000.png"
    assert "401" in refusal("openai_client", image, "a", "--base-url", server)
    monkeypatch.setenv("MUCO_SERVE_TOKEN", "correct horse")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    assert "none.png" in refusal("openai_client", "none.png", "a", "--base-url", server)
    broken = refusal("openai_client", "broken.png", "a", "--base-url", server)
    assert f"{server}/embeddings" in broken and "400" in broken and "image" in broken
    nobody = refusal("openai_client", image, "a", "--base-url", "http://127.0.0.1:9/v1")
    assert "http://127.0.0.1:9/v1" in nobody and "Connection error" in nobody


# ── langchain_retriever ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def index(scenes: Path, model: Path, tmp_path_factory) -> Path:
    """The captions of the 16 test scenes with their images and a year each."""
    folder = tmp_path_factory.mktemp("index")
    rows = []
    for i, row in enumerate(rows_of(scenes / "test.jsonl")):
        caption = next(turn["target"] for turn in row["turns"] if turn["kind"] == "retrieval")
        text = caption if isinstance(caption, str) else caption[0]
        rows.append({"id": f"r{i:02}", "text": text, "image": str(scenes / row["image"]), "year": 2010 + i})
    write_jsonl(folder / "rows.jsonl", rows)
    build(folder / "rows.jsonl", folder / "rows.index", model)
    return folder / "rows.index"


@pytest.mark.slow
def test_a_chain_prints_what_the_index_finds(index: Path) -> None:
    where = "year >= 2020"
    done = run("langchain_retriever", "rows.index", "a red star", "-k", 2, "--where", where, folder=index.parent)
    hits = Index.open(index).search("a red star", k=2, where=where)
    assert [line[:5] for line in done.stdout.splitlines()] == [f"[{hit.id}]" for hit in hits]
    for hit, line in zip(hits, done.stdout.splitlines(), strict=True):
        assert hit.text in line and f"'year': {hit.extra['year']}" in line and hit.extra["year"] >= 2020
        assert f"'score': {hit.score:.4f}"[:-1] in line and str(hit.image) in line


def test_the_retriever_is_a_runnable(index: Path, tiny_model) -> None:
    opened = Index.open(index, tiny_model)
    retriever = loaded("langchain_retriever")["MucoRetriever"](index=opened, k=3)
    one, other = retriever.batch(["a red star", "a blue ring"])
    for documents, query in ((one, "a red star"), (other, "a blue ring")):
        hits = opened.search(query, k=3)
        assert [(d.id, d.page_content, d.metadata["score"]) for d in documents] == [
            (h.id, h.text, h.score) for h in hits
        ]
    (only,) = retriever.invoke("a red star", k=1, where="year = 2013")
    assert only.id == "r03" and only.metadata["year"] == 2013


def test_what_an_index_cannot_do_is_one_sentence(index: Path, refusal) -> None:
    assert "nothing" in refusal("langchain_retriever", "nothing", "a")
    wrong = refusal("langchain_retriever", index, "a", "--where", "yeer > 1")
    assert "'yeer'" in wrong and "year" in wrong


# ── train_your_jsonl ─────────────────────────────────────────────────────────────────────────────────────────────────


def scores_of(stdout: str) -> dict[str, tuple[str, str, str]]:
    rows = re.findall(r"^(\w+) +hit@1 +(\S+)% +chance +(\S+)% +(\d+) queries$", stdout, re.MULTILINE)
    return {name: cells for name, *cells in rows}


@pytest.mark.slow
def test_training_prints_held_out_scores_against_chance(scenes: Path, model: Path, tmp_path: Path) -> None:
    given = ("--output", "mine", "--steps", 2, "--model", model)
    done = run("train_your_jsonl", scenes / "train.jsonl", *given, folder=tmp_path)
    assert (tmp_path / "mine/run/model/model.safetensors").is_file()
    written = json.loads((tmp_path / "mine/retrieval.json").read_text())
    assert written["samples"] == 6
    expected = {name: task.get("mean", task) for name, task in written["tasks"].items()}
    assert "image_to_caption" in expected and "blind" in expected
    assert scores_of(done.stdout) == {
        name: [f"{100 * task['hit@1']:.1f}", f"{100 * task['chance@1']:.1f}", str(task["queries"])]
        for name, task in expected.items()
    }


def test_training_starts_from_a_model_and_is_not_done_twice(scenes: Path, model: Path, tmp_path: Path, call) -> None:
    arguments = (scenes / "dev.jsonl", "--output", tmp_path / "mine", "--steps", 1, "--model", model)
    first = scores_of(call("train_your_jsonl", *arguments).out)
    weights = tmp_path / "mine/run/model/model.safetensors"
    made = weights.stat().st_mtime_ns
    assert first and scores_of(call("train_your_jsonl", *arguments).out) == first and weights.stat().st_mtime_ns == made


def test_texts_alone_train_too(model: Path, tmp_path: Path, call) -> None:
    rows = [{"turns": [{"query": f"what is {i}?", "target": f"it is {i}"}]} for i in range(30)]
    write_jsonl(tmp_path / "texts.jsonl", rows)
    given = ("--output", tmp_path / "mine", "--steps", 1, "--model", model)
    done = call("train_your_jsonl", tmp_path / "texts.jsonl", *given)
    assert scores_of(done.out)["text_to_text"][1:] == ["33.3", "3"]


def test_data_that_cannot_be_used_is_one_sentence_before_training(scenes: Path, tmp_path: Path, refusal) -> None:
    rows = rows_of(scenes / "train.jsonl")[:2]
    write_jsonl(tmp_path / "bad.jsonl", [*rows, {"image": "none.png", "turns": [{"query": "what?", "target": "a"}]}])
    bad = refusal("train_your_jsonl", "bad.jsonl", "--output", "mine")
    assert "bad.jsonl:1" in bad and "no such image file" in bad and "muco data check" in bad
    write_jsonl(tmp_path / "few.jsonl", [{"turns": [{"query": "what?", "target": "a"}]}])
    few = refusal("train_your_jsonl", "few.jsonl", "--output", "mine")
    assert "1 samples that share no image are too few" in few
    assert not (tmp_path / "mine").exists()


# ── evaluate_hub_model ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """A stock model of texts and images: CLIP with random weights, one letter a token."""
    import torch
    from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    letters = list("abcdefghijklmnopqrstuvwxyz0123456789?.,")
    names = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = small | {"vocab_size": len(names), "bos_token_id": len(names) - 2, "eos_token_id": len(names) - 1}
    config = CLIPConfig(text_config=text, vision_config=small | {"image_size": 32, "patch_size": 8}, projection_dim=16)
    tokenizer = CLIPTokenizer(vocab={name: i for i, name in enumerate(names)}, merges=[], model_max_length=77)
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    folder = tmp_path_factory.mktemp("clip") / "clip"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CLIPModel(config).save_pretrained(folder)
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def liked_best(scores: np.ndarray, seed: int) -> dict[int, int]:
    """Some columns and a row for each, such that in this part every row's best score is that of its own column."""
    chosen: dict[int, int] = {}
    draw = np.random.default_rng(seed).permutation
    for column, row in product(draw(scores.shape[1]), draw(scores.shape[0])):
        tried = chosen | {column: row}
        part = scores[np.ix_([*tried.values()], [*tried])]
        rivals = np.where(np.eye(len(tried), dtype=bool), -np.inf, part).max(axis=1)
        if len({*tried.values()}) > len(chosen) and (part.diagonal() > rivals + 1e-4).all():
            chosen = tried
    return chosen


@pytest.fixture(scope="module")
def easy(scenes: Path, tiny_model, tmp_path_factory) -> Path:
    """Captions given to images so that the tiny model is always right."""
    rows = rows_of(scenes / "train.jsonl")
    turns = [next(turn for turn in row["turns"] if turn["kind"] == "retrieval") for row in rows]
    texts = [turn["target"] if isinstance(turn["target"], str) else turn["target"][0] for turn in turns]
    queries = [turn["query"] if isinstance(turn["query"], str) else turn["query"][0] for turn in turns]
    images = [scenes / row["image"] for row in rows]
    asked = [{"text": query, "image": image} for query, image in zip(queries, images, strict=True)]
    scores = tiny_model.encode(asked) @ tiny_model.encode(texts).T
    chosen = max((liked_best(scores, seed) for seed in range(10)), key=len)
    assert len(chosen) >= 4
    file = tmp_path_factory.mktemp("easy") / "easy.jsonl"
    turn = lambda text, i: {"query": queries[i], "target": texts[text], "kind": "retrieval"}  # noqa: E731
    write_jsonl(file, ({"image": str(images[i]), "turns": [turn(text, i)]} for text, i in chosen.items()))
    return file


def hit_at_1(stdout: str, task: str) -> list[float]:
    return [float(cell) for cell in re.findall(rf"(?m)^ {task} +\d+ +\d+ +(\S+) ", stdout)]


@pytest.mark.slow
def test_the_better_of_a_stock_and_a_muco_model_is_named(easy: Path, clip: Path, model: Path, tmp_path: Path) -> None:
    done = run("evaluate_hub_model", easy, f"stock:{clip}", model, folder=tmp_path)
    first, second = hit_at_1(done.stdout, "image_to_caption")
    assert second == 100 > first and len(hit_at_1(done.stdout, "blind")) == 2
    difference, low, high = map(float, re.search(r"B - A: (\S+), 95 % interval (\S+) to (\S+)", done.stdout).groups())
    assert difference == pytest.approx((second - first) / 100, abs=1e-3)
    assert 0 < low <= difference <= high <= 1 and done.stdout.endswith("B is better.\n")


def test_a_model_is_not_better_than_itself(scenes: Path, model: Path, call) -> None:
    out = call("evaluate_hub_model", scenes / "test.jsonl", model, model).out
    assert "B - A: +0.000, 95 % interval +0.000 to +0.000\nThe difference may be chance.\n" in out


def test_caption_hits_are_those_of_the_table(scenes: Path, clip: Path, tiny_model) -> None:
    example = loaded("evaluate_hub_model")
    for name in ("dev", "test"):
        data = open_data(scenes / f"{name}.jsonl")
        for one in (tiny_model, example["Stock"](str(clip))):
            expected = evaluate_retrieval(one, data)["tasks"]["image_to_caption"]["hit@1"]
            assert example["caption_hits"](one, data).mean() == pytest.approx(expected)


def test_a_stock_model_adds_the_vectors_of_image_and_text(scenes: Path, clip: Path) -> None:
    from PIL import Image
    from sentence_transformers import SentenceTransformer

    from muco import Content, DataError

    path = scenes / "images/test/00000.png"
    plain, stock = SentenceTransformer(str(clip)), loaded("evaluate_hub_model")["Stock"](str(clip))
    text = plain.encode(["what is it?"], normalize_embeddings=True)[0]
    with Image.open(path) as image:
        seen = plain.encode([image.convert("RGB")], normalize_embeddings=True)[0]
    both = (text + seen) / np.linalg.norm(text + seen)
    contents = [Content("what is it?"), Content("what is it?", (path,)), Content("", (path,))]
    np.testing.assert_allclose(stock.encode(contents, batch_size=2), [text, both, seen], atol=1e-5)
    with pytest.raises(DataError, match="one image per input"):
        stock.encode([Content("", (path, path))], batch_size=2)


def test_what_cannot_be_evaluated_is_one_sentence(
    scenes: Path, model: Path, clip: Path, tmp_path: Path, call, refusal
) -> None:
    assert "no.jsonl" in refusal("evaluate_hub_model", "no.jsonl", model, model)
    assert "clip" in refusal("evaluate_hub_model", scenes / "test.jsonl", clip, model)
    write_jsonl(tmp_path / "few.jsonl", [{"turns": [{"query": f"what {t}?", "target": t}]} for t in ("a", "b", "c")])
    with pytest.raises(SystemExit, match="no turn about an image"):  # after the table of the first model
        call("evaluate_hub_model", tmp_path / "few.jsonl", model, model)
    with pytest.raises(SystemExit, match="python examples/evaluate_hub_model.py test.jsonl"):
        call("evaluate_hub_model", model)
