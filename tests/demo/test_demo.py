"""The demo: seven stages from data to a page, which go on after a kill and are not done twice."""

from __future__ import annotations

import copy
import io
import json
import math
import re
import shutil
import signal
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pytest
from hypothesis import given
from hypothesis import strategies as st

from muco.base.svg import loss_curve, ticks_beyond
from muco.cli import main
from muco.demo.page import STAGES, _differing, page
from muco.demo.search import TEXT_QUERIES, _ranks
from muco.demo.stages import Stages, demo_recipe
from muco.errors import OutputError, RecipeError
from muco.training.recipe import load_recipe

ROOT = Path(__file__).parents[2]
SIZE = ["--steps", "2", "--train", "40", "--test", "12"]


# ---------------------------------------------------------------- the recipe


def test_what_the_demo_trains_is_that_recipe():
    assert demo_recipe(Path("runs/demo")) == load_recipe(ROOT / "recipes/demo.yaml")


def test_output_and_steps_change_paths_and_steps_only():
    usual, recipe = demo_recipe(Path("runs/demo")), demo_recipe(Path("/tmp/other"), 20)
    assert recipe.output == "/tmp/other/run"
    assert recipe.data.train[0].path == "/tmp/other/scenes/train.jsonl"
    assert recipe.trainer["max_steps"] == 20
    assert 0 <= recipe.trainer["warmup_steps"] < 20
    changed = {key for key in usual.trainer if usual.trainer[key] != recipe.trainer[key]}
    assert changed == {"max_steps", "warmup_steps"}
    assert (recipe.model, recipe.turns, recipe.loss, recipe.seed) == (usual.model, usual.turns, usual.loss, usual.seed)


def test_no_steps_are_refused():
    with pytest.raises(RecipeError, match="steps is 0"):
        demo_recipe(Path("runs/demo"), 0)


# ---------------------------------------------------------------- from data to page


class Made:
    """A finished demo: its folder, and what the command printed."""

    def __init__(self, folder: Path, out: str, err: str) -> None:
        self.folder, self.out, self.err = folder, out, err

    @property
    def record(self) -> dict[str, Any]:
        return json.loads((self.folder / "demo.json").read_text(encoding="utf-8"))

    @property
    def page(self) -> str:
        return (self.folder / "report.html").read_text(encoding="utf-8")


def command(folder: Path, *more: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the demo in this process."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        code = main(["demo", "--output", str(folder), *(more or SIZE)])
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    folder = tmp_path_factory.mktemp("demo") / "a <b> & 'c'"
    code, out, err = command(folder)
    assert code == 0, err
    return Made(folder, out, err)


def results(record: dict[str, Any]) -> dict[str, Any]:
    """What was found, without when it was and how long it took."""
    found = copy.deepcopy({name: stage["result"] for name, stage in record["stages"].items()})
    for name in ("before", "after"):
        del found[name]["seconds"]
    del found["train"]["finished"]
    for key in ("seconds", "rows_per_second", "resumed"):
        del found["embed"][key]
    return found


def files(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_the_table_and_the_path_are_on_stdout_and_the_stages_on_stderr(made):
    assert made.out.splitlines()[-1] == str(made.folder / "report.html")
    assert "hit@1" in made.out
    for number, title in enumerate(STAGES.values(), start=1):
        assert re.search(rf"^\[{number}/7\] {title}: [\d.]+ s$", made.err, flags=re.MULTILINE)


@pytest.mark.slow
def test_the_record_holds_all_numbers_and_the_models_are_the_right_ones(made):
    record = made.record
    found = {name: stage["result"] for name, stage in record["stages"].items()}
    assert list(found) == list(STAGES)
    assert all(stage["seconds"] >= 0 and not stage["interrupted"] for stage in record["stages"].values())
    trained = json.loads((made.folder / "run/model/run.json").read_text())
    assert found["after"]["model"] == trained["model_fingerprint"] != found["before"]["model"]
    assert found["train"]["steps"] == 2
    assert found["scenes"] == {"train": 40, "dev": 12, "test": 12}
    assert found["before"]["samples"] == found["after"]["samples"] == 12
    assert found["before"]["data"] == found["after"]["data"]
    assert found["before"]["pairs_per_step"] == 32 * 8  # seven turns, and the image alone
    assert 0 < found["before"]["chance_loss"] <= math.log(1 + 31 * 8)
    assert found["embed"]["embedded"] == 12
    assert {"answer", "answer_text_only", "image_to_caption", "caption_to_image", "within", "blind"} <= set(
        found["after"]["tasks"]
    )


@pytest.mark.slow
def test_the_untrained_model_is_the_one_that_training_starts_from(made):
    from muco.data import open_data
    from muco.training.build import build_model

    recipe = demo_recipe(made.folder, 2)
    model = build_model(recipe, [open_data(source.path) for source in recipe.data.train])
    assert made.record["stages"]["before"]["result"]["model"] == model.fingerprint


@pytest.mark.slow
def test_searches_are_those_of_the_saved_model(made):
    import muco

    found = made.record["stages"]["search"]["result"]
    model = muco.load(made.folder / "run/model")
    images = sorted((made.folder / "scenes/images/test").iterdir())
    vectors = model.encode(images)
    for query, shown in zip(TEXT_QUERIES, found["texts"], strict=True):
        scores = vectors @ model.encode(query.text)
        assert [item["score"] for item in shown["found"]] == pytest.approx(sorted(scores)[::-1][:5], abs=1e-5)
        best = {path.name: score for path, score in zip(images, scores, strict=True)}
        for item in shown["found"]:
            assert best[Path(item["image"]).name] == pytest.approx(item["score"], abs=1e-5)
            assert item["facts"] == {fact: fact in item["caption"].lower() for fact in query.facts}
    rows = [json.loads(line) for line in (made.folder / "scenes/test.jsonl").read_text().splitlines()]
    assert not {query.text for query in TEXT_QUERIES} & {turn["target"] for row in rows for turn in row["turns"]}
    for item in found["answers"] + found["missed_answers"]:
        row = next(row for row in rows if row["image"] == item["image"])
        assert any(t["query"][0] == item["question"] and t["target"] == item["right"] for t in row["turns"])
        assert (item["rank"] == 1) == (item["found"][0]["text"] == item["right"])
    captions = found["missed_images"]
    hits = made.record["stages"]["after"]["result"]["tasks"]["caption_to_image"]["hit@1"]
    assert captions["of"] - captions["count"] == round(hits * captions["of"])
    assert all(item["found"] != item["right"] and item["rank"] > 1 for item in captions["shown"])


@pytest.mark.slow
def test_the_second_call_computes_nothing(made):
    before, record = files(made.folder), made.record
    code, out, err = command(made.folder)
    assert code == 0
    assert out.splitlines()[-1] == made.out.splitlines()[-1]
    assert "step " not in err
    after = files(made.folder)
    changed = {name for name in after if before.get(name) != after[name]}
    assert changed == {str(made.folder / name) for name in ("demo.json", "report.html")}
    assert set(before) == set(after)
    assert results(made.record) == results(record)
    for name in ("scenes", "train"):
        assert made.record["stages"][name] == record["stages"][name], "the seconds of the call that made it"


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["scenes", "before", "train", "after", "embed", "search", "page"])
def test_killed_in_any_stage_it_goes_on_to_the_same_results(made, stage):
    known = made.record
    cut = copy.deepcopy(known)
    stages = cut["stages"]
    for name in list(STAGES)[list(STAGES).index(stage) + 1 :]:
        del stages[name]
    stages[stage] = {"begun": stages[stage]["begun"]}
    remains = {  # what a kill in the stage leaves, or what it has not made yet
        "scenes": ["scenes", "run", "test-images.parquet", "cache", "report.html"],
        "train": ["run/model", "test-images.parquet", "report.html"],
        "embed": ["test-images.parquet", "report.html"],
    }
    for name in remains.get(stage, ["report.html"]):
        path = made.folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if stage == "scenes":
        (made.folder / ".scenes-half/scenes").mkdir(parents=True)
    (made.folder / "demo.json").write_text(json.dumps(cut))

    code, out, _ = command(made.folder)
    assert code == 0
    assert out.splitlines()[-1] == str(made.folder / "report.html")
    assert results(made.record) == results(known)
    assert made.record["stages"][stage]["interrupted"]
    assert ("after an interruption" in made.page) == (stage != "page")
    assert not list(made.folder.glob(".scenes-*"))
    for name in STAGES:  # as it was, for the next case
        known["stages"][name]["interrupted"] = False
    (made.folder / "demo.json").write_text(json.dumps(known))


@pytest.mark.slow
def test_vectors_of_another_model_are_replaced(made):
    known = made.record
    stale = copy.deepcopy(known)
    stale["stages"]["after"]["result"]["model"] = "another model"
    (made.folder / "demo.json").write_text(json.dumps(stale))
    written = (made.folder / "test-images.parquet").stat().st_mtime_ns
    code, _, _ = command(made.folder)
    assert code == 0
    assert (made.folder / "test-images.parquet").stat().st_mtime_ns > written
    assert results(made.record) == results(known)


@pytest.mark.slow
def test_a_real_kill_in_training_is_survived(tmp_path):
    folder = tmp_path / "demo"
    run = "import sys; from muco.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = [sys.executable, "-c", run, "demo", "--output", str(folder), *SIZE]
    process = processes.Popen(arguments, cwd=ROOT, stdout=processes.DEVNULL, stderr=processes.DEVNULL)
    while not (folder / "run/run.json").exists() and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (folder / "run/model").exists()
    code, out, err = command(folder)
    assert code == 0
    assert out.splitlines()[-1] == str(folder / "report.html")
    stages = json.loads((folder / "demo.json").read_text())["stages"]
    assert [name for name, stage in stages.items() if stage["interrupted"]] == ["train"]


# ---------------------------------------------------------------- other work in the folder


@pytest.mark.slow
def test_a_demo_with_other_arguments_is_refused(made, tmp_path):
    before = files(made.folder)
    code, out, err = command(made.folder, "--steps", "3", *SIZE[2:])
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    assert "another recipe" in err
    code, _, err = command(made.folder, *SIZE[:4], "--test", "13")
    assert code == 1
    assert "test 12, now 13" in err
    assert files(made.folder) == before


def test_a_folder_with_other_work_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    code, out, err = command(tmp_path)
    assert (code, out) == (1, "")
    assert "is not empty and holds no demo" in err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_file_is_no_folder(tmp_path):
    file = tmp_path / "report.html"
    file.write_text("x")
    with pytest.raises(OutputError, match="choose another"):
        Stages(file / "demo.json", {"test": 1})


# ---------------------------------------------------------------- seconds


def test_what_is_made_is_timed_once(tmp_path):
    stages, made = Stages(tmp_path / "demo/demo.json", {"test": 1}), tmp_path / "demo/made"
    assert stages.run("scenes", made.mkdir, made) is None
    first = stages.record["stages"]["scenes"]
    again = Stages(tmp_path / "demo/demo.json", {"test": 1})
    assert again.run("scenes", lambda: None, made) is None
    assert again.record["stages"]["scenes"] == first
    made.rmdir()
    again.run("scenes", lambda: (time.sleep(0.05), made.mkdir())[1], made)
    assert again.record["stages"]["scenes"]["seconds"] >= 0.05 and not again.record["stages"]["scenes"]["interrupted"]


def test_a_stage_that_fails_counts_as_interrupted(tmp_path):
    stages = Stages(tmp_path / "demo/demo.json", {})
    with pytest.raises(ZeroDivisionError):
        stages.run("before", lambda: 1 // 0)
    again = Stages(tmp_path / "demo/demo.json", {})
    assert again.run("before", lambda: 7) == 7
    assert again.record["stages"]["before"]["interrupted"]


# ---------------------------------------------------------------- the page


class Tags(HTMLParser):
    """All tags of a page in order; checks that each is closed where it should be."""

    VOID = {"meta", "img"}  # the others of ours are written as closed

    def __init__(self, page: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    @property
    def names(self) -> list[str]:
        return [tag for tag, _ in self.seen]


@pytest.mark.slow
def test_the_page_needs_nothing_else(made):
    markup = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", made.page)
    assert not re.search(r"https?:|//\w|@import|url\(|\bon\w+=", markup)
    tags = Tags(made.page)
    assert tags.names.count("h1") == 1
    assert not {"script", "link", "iframe", "object", "base"} & set(tags.names)
    sources = [attributes[key] for _, attributes in tags.seen for key in ("src", "href") if key in attributes]
    assert len(sources) > 20
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert all(attributes["alt"] for tag, attributes in tags.seen if tag == "img")
    policy = next(a["content"] for t, a in tags.seen if t == "meta" and a.get("http-equiv"))
    assert "default-src 'none'" in policy
    assert "prefers-color-scheme: dark" in made.page
    assert "width=device-width" in made.page


@pytest.mark.slow
def test_the_page_says_what_was_found_and_run(made):
    found = made.record["stages"]
    after = found["after"]["result"]["tasks"]
    for name in ("image_to_caption", "caption_to_image", "within", "blind"):
        assert f">{100 * after[name]['hit@1']:.1f}<" in made.page
    text = re.sub(r"<[^>]+>", " ", made.page)
    for query in TEXT_QUERIES:
        assert query.text in text
    assert "muco demo --output" in text
    assert found["train"]["result"]["versions"]["torch"] in text
    assert "Mistakes" in text
    assert "question alone" in text


@pytest.mark.slow
def test_no_text_of_the_record_becomes_markup(made):
    evil = '<i title="x">&amp;\'" <script>'

    def spoil(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: spoil(item) for key, item in value.items()}
        if isinstance(value, list):
            return [spoil(item) for item in value]
        return value + evil if isinstance(value, str) and not value.startswith("images/") else value

    record = made.record
    assert "a <b>" not in made.page
    spoiled = page(spoil(record), made.folder / "scenes")
    usual = Tags(page(record, made.folder / "scenes"))
    tags = Tags(spoiled)
    assert [name for name in tags.names if name != "mark"] == [name for name in usual.names if name != "mark"]
    assert "&lt;script&gt;" in spoiled


# ---------------------------------------------------------------- its parts


def test_the_curve_has_axes_a_line_and_the_level_of_chance():
    points = [(10, 5.0), (20, 2.5), (30, 1.25)]
    svg = loss_curve(points, 30, 5.5, width=500, height=300)
    tags = Tags(svg)
    line = next(a["points"] for t, a in tags.seen if a.get("class") == "loss")
    xs, ys = zip(*(map(float, pair.split(",")) for pair in line.split()), strict=True)
    assert list(np.diff(xs)) == pytest.approx([xs[1] - xs[0]] * 2, abs=0.2)
    assert (ys[1] - ys[0]) == pytest.approx(2 * (ys[2] - ys[1]), abs=0.2)  # a halving loss; y grows downwards
    assert ys[0] < ys[1] < ys[2]
    chance = next(float(a["y1"]) for t, a in tags.seen if a.get("class") == "chance")
    assert chance < ys[0]
    assert "chance 5.50" in svg
    assert ">1.25<" in svg
    assert all(0 <= x <= 500 for x in xs) and all(0 <= y <= 300 for y in ys)


def test_a_run_too_short_for_a_curve_still_has_axes():
    svg = loss_curve([], 2, 5.5)
    assert "loss" not in [a.get("class") for _, a in Tags(svg).seen]
    assert "chance 5.50" in svg


@given(st.floats(1e-3, 1e6), st.integers(2, 10))
def test_ticks_are_round_and_reach_the_top(top, most):
    found = ticks_beyond(top, most)
    assert found[0] == 0
    assert found[-2] < top * (1 + 1e-6) and found[-1] >= top * (1 - 1e-6)
    assert len(found) <= most + 1
    assert np.allclose(np.diff(found), found[1])
    assert found[1] / 10 ** math.floor(math.log10(found[1]) + 1e-9) == pytest.approx(
        min((1, 2, 2.5, 5), key=lambda f: abs(f - found[1] / 10 ** math.floor(math.log10(found[1]) + 1e-9)))
    )


def test_differing_words_are_marked_by_place():
    own, other = "A small red star and a large blue ring.", "A large red star and a small blue ring, too <."
    assert _differing(own, own) == own
    marked = re.findall("<mark>(.*?)</mark>", _differing(own, other))
    assert marked == ["small", "large"]
    assert _differing("a <b>", "a c") == "a <mark>&lt;b&gt;</mark>"


def test_ties_and_numbers_that_are_none_lose():
    scores = np.array([[0.5, 0.5, 0.1], [0.9, 0.2, 0.3], [np.nan, np.nan, np.nan]], dtype=np.float32)
    assert _ranks(scores, [0, 0, 0]).tolist() == [2, 1, 4]
