"""MMEB: both layouts read alike, ranking that no trick passes, means as published, runs that go on."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

import mmeb_tree as tree
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from processes import finished, launch
from rich.console import Console

from muco.data.mmeb_test import DATA_SETS, NAMES, official_name
from muco.dialogue import Content
from muco.errors import DataError, MucoError, OutputError
from muco.evaluate import cache as cache_module
from muco.evaluate.benchmark import Outcome
from muco.evaluate.mmeb import aggregates, evaluate_mmeb
from muco.evaluate.mmeb_task import ListQuery, judge, sample
from muco.evaluate.report import print_benchmark

LAYOUTS = ("v1", "split")


class Constant:
    """A collapsed model: one point, give or take some noise."""

    fingerprint = "constant"

    def __init__(self, value: float, noise: float = 0.0) -> None:
        self.value, self.noise = value, noise

    def encode(self, contents: list[Content], *, batch_size: int) -> np.ndarray:
        noise = np.random.default_rng(0).normal(size=(len(contents), 8)) * self.noise
        return (self.value + noise).astype(np.float32)


class Told:
    """Vectors as a test says, by text and name of the image; all others are orthogonal to them."""

    fingerprint = "told"

    def __init__(self, vectors: dict[str, list[float]]) -> None:
        self.vectors = vectors

    def encode(self, contents: list[Content], *, batch_size: int) -> np.ndarray:
        names = [c.text + "".join(f"@{image.name}" for image in c.images) for c in contents]
        return np.array([self.vectors[name] for name in names], np.float32)


def read_outcomes(output: Path, name: str) -> list[Outcome]:
    lines = (output / "outcomes" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [Outcome(**json.loads(line)) for line in lines]


def plain(value: dict) -> dict:
    """As JSON gives it back."""
    return json.loads(json.dumps(value, allow_nan=False))


def scores(result: dict) -> dict[str, float]:
    return {name: task["score"] for name, task in result["tasks"].items()}


# ---------------------------------------------------------------- the 36


def test_the_benchmark_has_36_data_sets():
    assert list(NAMES) == tree.ALL and len(set(NAMES)) == 36
    assert sum(d.in_distribution for d in DATA_SETS) == 20
    metas = {"classification": tree.CLASSIFICATION, "vqa": tree.VQA, "retrieval": tree.RETRIEVAL}
    metas["grounding"] = tree.GROUNDING
    assert {meta: [d.name for d in DATA_SETS if d.meta == meta] for meta in metas} == metas
    outside = "Place365 ImageNet-A ImageNet-R ObjectNet Country211 ScienceQA VizWiz GQA TextVQA OVEN FashionIQ EDIS "
    outside += "Wiki-SS-NQ RefCOCO RefCOCO-Matching Visual7W-Pointing"
    assert [d.name for d in DATA_SETS if not d.in_distribution] == sorted(outside.split(), key=NAMES.index)
    assert {d.name for d in DATA_SETS if not d.finds_images} == tree.TEXT_TARGETS


@pytest.fixture(scope="module")
def trees(tmp_path_factory) -> dict[str, tuple[Path, dict[str, list[tree.Expected]]]]:
    made = {}
    for layout in LAYOUTS:
        folder = tmp_path_factory.mktemp(layout)
        made[layout] = folder, tree.write_tree(folder, layout)
    tree.write_set(made["v1"][0], "CIFAR-100", tree.records("VOC2007"))  # published too, and no part of the benchmark
    return made


def test_both_layouts_give_the_same_contents_and_an_oracle_is_perfect(trees, tmp_path):
    results = {}
    for layout, (folder, expected) in trees.items():
        model = tree.Oracle(expected)
        results[layout] = evaluate_mmeb(model, folder, tmp_path / layout, command="muco evaluate", model_path="here")
        assert len(model.seen) == sum(t["facts"]["encoded"] for t in results[layout]["tasks"].values())
    v1, split = results["v1"], results["split"]
    assert list(v1["tasks"]) == tree.ALL and set(scores(v1).values()) == {1.0}
    assert v1["overall"] == 1.0 and set(v1["groups"].values()) == {1.0} and len(v1["groups"]) == 6
    for name, task in v1["tasks"].items():
        other = split["tasks"][name]
        assert task["data"] == other["data"], "texts and image bytes of both layouts"
        assert task["scores"] == other["scores"] and (task["facts"]["layout"], other["facts"]["layout"]) == LAYOUTS
    assert json.loads((tmp_path / "v1" / "mmeb.json").read_text()) == plain(v1)
    assert all((tmp_path / "v1" / f"mmeb.{suffix}").stat().st_size for suffix in ("csv", "md", "html"))
    assert (v1["command"], v1["model"]) == ("muco evaluate", {"path": "here", "fingerprint": "oracle"})
    assert v1["tasks"]["HatefulMemes"]["candidates"] == (2, 2) and v1["tasks"]["HatefulMemes"]["chance"] == 0.5
    assert "hit@5" not in v1["tasks"]["GQA"]["scores"], "of five candidates everyone hits five"
    assert v1["tasks"]["OK-VQA"]["candidates"] == (5, 6), "a blank candidate is one"
    matching = v1["tasks"]["RefCOCO-Matching"]
    assert matching["candidates"] == (5, 5) and matching["facts"]["repeated_truth"] == 1
    assert any("list their ground truth again: 1;" in line for line in matching["warnings"])
    assert any("the data has 6 queries; the published data set has 1000" in line for line in matching["warnings"])


@pytest.mark.parametrize(
    "model", [Constant(0.35), Constant(0.35, 1e-5), Constant(float("nan"))], ids=["equal", "nearly equal", "nan"]
)
def test_a_collapsed_or_nan_model_scores_nothing_anywhere(trees, tmp_path, model):
    result = evaluate_mmeb(model, trees["v1"][0], tmp_path)
    assert set(scores(result).values()) == {0.0} and result["overall"] == 0.0
    said = "query vectors are not finite" if np.isnan(model.value) else "the model has collapsed"
    for name in tree.ALL:
        assert any(line.startswith(f"{name}: ") and said in line for line in result["warnings"]), name
        assert any(line.startswith(f"{name}: the score of 0.0% is not above chance") for line in result["warnings"])
        assert not any(result["tasks"][name]["scores"].get(k) for k in ("hit@1", "hit@5"))
    assert plain(result)["overall"] == 0
    for file in (tmp_path / "outcomes").iterdir():
        assert "NaN" not in file.read_text()


# ---------------------------------------------------------------- ranking


def told(tmp_path: Path, rows: list[tuple[str, list[str]]], vectors: dict[str, list[float]]) -> dict:
    folder = tree.write_texts(tmp_path / "data", rows)
    return evaluate_mmeb(Told(vectors), folder, tmp_path / "out", tasks=["VisualNews_i2t"])["tasks"]["VisualNews_i2t"]


def test_ties_are_lost_and_told(tmp_path):
    vectors = {"q": [1, 0, 0], "r": [0, 1, 0], "a": [0.6, 0.8, 0], "b": [0.6, 0, 0.8], "c": [0, 0, 1]}
    task = told(tmp_path, [("q", ["a", "b", "c"]), ("r", ["a", "b", "c"]), ("q", ["c", "b"])], vectors)
    assert task["score"] == pytest.approx(1 / 3) and task["facts"]["ties"] == 1
    assert any("lost to a tie with a wrong candidate: 1" in line for line in task["warnings"])
    outcomes = read_outcomes(tmp_path / "out", "VisualNews_i2t")
    assert [(o.query, o.value, o.rank) for o in outcomes] == [("0", 0.0, 2), ("1", 1.0, 1), ("2", 0.0, 2)]
    assert [[name for name, _ in o.found] for o in outcomes] == [["1", "0", "2"], ["0", "1", "2"], ["1", "0"]]
    assert task["scores"]["mrr"] == pytest.approx((1 / 2 + 1 + 1 / 2) / 3)
    assert task["chance"] == pytest.approx((1 / 3 + 1 / 3 + 1 / 2) / 3) and task["candidates"] == (2, 3)


def test_copies_of_the_ground_truth_are_no_rivals(tmp_path):
    vectors = {"q": [1, 0], "a": [0.8, 0.6], "b": [0.6, 0.8]}
    task = told(tmp_path, [("q", ["a", "b", "a", "b", "a"]), ("q", ["b", "a"])], vectors)
    assert [o.rank for o in read_outcomes(tmp_path / "out", "VisualNews_i2t")] == [1, 2]
    assert task["facts"]["repeated_truth"] == 1 and task["facts"]["ties"] == 0 and task["candidates"] == (2, 2)


@pytest.mark.parametrize("best", ["right", "caption", "image", "copy"])
def test_a_candidate_is_its_text_and_its_image(tmp_path, best):
    row = {
        "qry_text": "<|image_1|>\nFind\n",
        "qry_img_path": "q.png",
        "tgt_text": ["<|image_1|>\nred", "<|image_1|>\nblue", "<|image_1|>\nred", "<|image_1|>\nred"],
        "tgt_img_path": ["x.png", "x.png", "y.png", "x copy.png"],
    }
    tree.write_set(tmp_path, "RefCOCO-Matching", [row])
    (tmp_path / "eval_images" / "x copy.png").write_bytes((tmp_path / "eval_images" / "x.png").read_bytes())
    names = {"right": "red@x.png", "caption": "blue@x.png", "image": "red@y.png", "copy": "red@x copy.png"}
    vectors = {name: [1.0, 0.0] if key == best else [0.6, 0.8] for key, name in names.items()}
    model = Told({"Find\n@q.png": [1.0, 0.0], **vectors})
    result = evaluate_mmeb(model, tmp_path, tmp_path / "out", tasks=["RefCOCO-Matching"])
    task = result["tasks"]["RefCOCO-Matching"]
    assert task["candidates"] == (3, 3) and task["facts"]["repeated_truth"] == 1, "equal bytes are the same image"
    # The copy is never asked about: its content is that of the right candidate, so its vector is too.
    assert task["score"] == (1.0 if best == "right" else 0.0)
    assert task["facts"]["encoded"] == 4


@given(
    st.lists(st.sampled_from([-0.5, 0.0, 0.25, 0.5, 0.5 - 1e-7, 0.5 + 1e-7, 0.75, float("nan")]), min_size=2),
)
def test_a_rank_is_one_and_the_rivals_that_are_not_beaten(values):
    values = np.array(values, np.float32)
    judged = judge(ListQuery(3, "q", tuple(str(i) for i in range(len(values)))), values)
    if np.isnan(values).any():
        assert (judged.rank, judged.margin) == (len(values) + 1, None)
        assert (judged.outcome.rank, judged.outcome.value, judged.outcome.found) == (None, 0.0, ())
        return
    not_beaten = [v for v in values[1:] if v >= values[0] - 1e-6]
    assert judged.rank == judged.outcome.rank == 1 + len(not_beaten)
    assert judged.outcome.value == (not not_beaten)
    assert judged.margin == pytest.approx(max(values[1:]) - values[0])
    assert judged.tied == (bool(not_beaten) and all(abs(v - values[0]) < 1e-6 for v in not_beaten))
    found = [int(name) for name, _ in judged.outcome.found]
    assert len(found) == min(5, len(values)) == len(set(found))
    assert (0 in found) == (judged.rank <= 5) and (0 not in found or found.index(0) == judged.rank - 1)
    rivals = [i for i in found if i]
    assert rivals == sorted(range(1, len(values)), key=lambda i: (-values[i], i))[: len(rivals)]


def test_failures_are_the_worst_and_can_be_seen(trees, tmp_path):
    folder, expected = trees["split"]
    evaluate_mmeb(tree.Own(), folder, tmp_path, tasks=["CIRR", "DocVQA"])
    told = json.loads((tmp_path / "tasks" / "CIRR.json").read_text())["result"]
    lost = [o for o in read_outcomes(tmp_path, "CIRR") if o.rank > 1]
    assert 1 < len(told["failures"]) == len(lost) <= 6, "a model that knows nothing fails"
    margins = [failure["margin"] for failure in told["failures"]]
    assert margins == sorted(margins, reverse=True) and margins[-1] > 0
    for failure in told["failures"]:
        row = expected["CIRR"][int(failure["query"]["id"])]
        assert failure["query"]["text"] == row.query.text
        assert failure["query"]["images"] == [str(row.query.images[0])]
        assert failure["right"]["images"] == [str(row.candidates[0].images[0])] and failure["right"]["id"] == "0"
        assert len(failure["found"]) == 5
        for shown, _ in failure["found"]:
            assert shown["images"] == [str(row.candidates[int(shown["id"])].images[0])]


# ---------------------------------------------------------------- what cannot be embedded


class Picky(Told):
    """Refuses some texts."""

    def encode(self, contents: list[Content], *, batch_size: int) -> np.ndarray:
        for number, content in enumerate(contents):
            if "<bad>" in content.text:
                raise DataError(f"input {number}: not this")
        return super().encode(contents, batch_size=batch_size)


def test_what_cannot_be_embedded_stops_the_evaluation_or_is_left_out_and_told(tmp_path):
    rows = [
        ("q", ["a", "b", "<bad>1"]),  # a wrong candidate: the right one is still found
        ("q", ["<bad>1", "a", "b"]),  # the right one: missed
        ("<bad>q", ["a", "b"]),  # the query: missed
        ("r", ["b", "<bad>1"]),  # nothing to choose from: missed
        ("r", ["b", "a"]),
    ]
    data = tree.write_texts(tmp_path / "data", rows)
    model = Picky({"q": [1, 0], "r": [0, 1], "a": [0.8, 0.6], "b": [0.6, 0.8]})
    wanted = {"tasks": ["VisualNews_i2t"]}
    with pytest.raises(DataError, match=r"row \d: input 0: not this; .*--skip-broken"):
        evaluate_mmeb(model, data, tmp_path / "out", **wanted)
    result = evaluate_mmeb(model, data, tmp_path / "out", skip_broken=True, **wanted)
    task = result["tasks"]["VisualNews_i2t"]
    assert task["score"] == pytest.approx(2 / 5) and task["queries"] == 5
    assert task["left_out"] == {"queries": 1, "candidates": 1, "missed": 3} and result["settings"]["skip_broken"]
    outcomes = read_outcomes(tmp_path / "out", "VisualNews_i2t")
    assert [(o.value, o.rank) for o in outcomes] == [(1, 1), (0, None), (0, None), (0, None), (1, 1)]
    lines = (tmp_path / "out" / "left_out" / "VisualNews_i2t.jsonl").read_text().splitlines()
    assert [json.loads(line)["side"] for line in lines] == ["query", "candidate"]
    assert all("row" in json.loads(line)["reason"] and "not this" in json.loads(line)["reason"] for line in lines)
    assert any("left out, because they cannot be embedded: 1 queries and 1 candidates; 3 queries" in line
               for line in result["warnings"])  # fmt: skip
    said = io.StringIO()
    print_benchmark(result, Console(file=said, width=120))
    for form in (said.getvalue(), *((tmp_path / "out" / f"mmeb.{kind}").read_text() for kind in ("md", "html", "csv"))):
        assert "left out" in form and ("1 q + 1 c" in form or '""missed"": 3' in form)

    again = evaluate_mmeb(model, data, tmp_path / "out", skip_broken=True, **wanted)
    assert plain(again["tasks"]) == plain(result["tasks"])
    with pytest.raises(DataError, match="--skip-broken"):
        evaluate_mmeb(model, data, tmp_path / "out", **wanted)  # a partial result does not count as done


@pytest.mark.parametrize("lost", ["missing", "torn"])
def test_broken_images_are_left_out(tiny_model, tmp_path, lost):
    tree.write_tree(tmp_path, "v1", ["CIRR"])
    whole = evaluate_mmeb(tiny_model, tmp_path, tmp_path / "whole", tasks=["CIRR"])
    for name in ("asked 2", "found 4"):
        file = tmp_path / "eval_images" / "CIRR" / f"{name}.png"
        file.unlink() if lost == "missing" else file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(DataError, match=r"CIRR.*row \d: .*png.*--skip-broken"):
        evaluate_mmeb(tiny_model, tmp_path, tmp_path / "out", tasks=["CIRR"])
    part = evaluate_mmeb(tiny_model, tmp_path, tmp_path / "out", tasks=["CIRR"], skip_broken=True)
    task = part["tasks"]["CIRR"]
    assert task["left_out"] == {"queries": 1, "candidates": 1, "missed": 2} and task["queries"] == 6
    assert task["data"] != whole["tasks"]["CIRR"]["data"] and not any("finite" in line for line in task["warnings"])
    missed = [o.query for o in read_outcomes(tmp_path / "out", "CIRR") if o.rank is None]
    assert missed == ["2", "4"]


def test_a_text_that_is_not_utf8_is_left_out(tmp_path):
    names = pa.array([b"q", b"q"]).cast(pa.binary())
    texts = pa.array([[b"a", b"b", b"\xff"], [b"b", b"a", b"c"]], pa.list_(pa.binary()))
    table = pa.table({
        "qry_text": pa.Array.from_buffers(pa.string(), 2, names.buffers()),
        "qry_img_path": ["", ""],
        "tgt_text": pa.ListArray.from_arrays(
            texts.offsets, pa.Array.from_buffers(pa.string(), 6, texts.values.buffers())
        ),
        "tgt_img_path": [[""] * 3] * 2,
    })  # fmt: skip
    (tmp_path / "GQA").mkdir()
    (tmp_path / "eval_images").mkdir()
    pq.write_table(table, tmp_path / "GQA" / "test-0.parquet")
    model = Told({"q": [1, 0, 0], "a": [0.8, 0.6, 0], "b": [0.6, 0.8, 0], "c": [0, 0, 1]})
    with pytest.raises(DataError, match=r"row 0: a text is not UTF-8 .*--skip-broken"):
        evaluate_mmeb(model, tmp_path, tmp_path / "out", tasks=["GQA"])
    task = evaluate_mmeb(model, tmp_path, tmp_path / "out", tasks=["GQA"], skip_broken=True)["tasks"]["GQA"]
    assert task["score"] == 0.5 and task["left_out"] == {"queries": 0, "candidates": 1, "missed": 0}


# ---------------------------------------------------------------- as the official code has it


def test_official_keys_are_names_of_which_the_first_content_counts(tmp_path):
    def row(query: str, *targets: tuple[str, str]) -> dict:
        text = "<|image_1|>\nRepresent the picture with its text: {}\n"
        return {
            "qry_text": f"<|image_1|>\n{query}\n",
            "qry_img_path": "",
            "tgt_text": [text.format(caption) for caption, _ in targets],
            "tgt_img_path": [path for _, path in targets],
        }

    # in the second row the right candidate is the image of the first with another caption
    tree.write_set(
        tmp_path, "EDIS", [row("p", ("old", "x.png"), ("w", "y.png")), row("q", ("new", "x.png"), ("w", "y.png"))]
    )
    told = {"old@x.png": [1.0, 0.0], "new@x.png": [0.0, 1.0], "w@y.png": [0.6, 0.8]}
    prompt = "Represent the picture with its text: {}\n@{}"
    vectors = {prompt.format(*name.split("@")): vector for name, vector in told.items()}
    model = Told({"\np\n": [1.0, 0.0], "\nq\n": [0.0, 1.0], **vectors})
    ours = evaluate_mmeb(model, tmp_path, tmp_path / "out", tasks=["EDIS"])
    theirs = evaluate_mmeb(model, tmp_path, tmp_path / "out", tasks=["EDIS"], official=True)
    assert ours["tasks"]["EDIS"]["score"] == 1.0
    assert theirs["tasks"]["EDIS"]["score"] == 0.5, "the caption that was seen first is embedded for both"
    assert theirs["tasks"]["EDIS"]["facts"]["encoded"] == 4 < ours["tasks"]["EDIS"]["facts"]["encoded"]
    assert "official names" in theirs["settings"]["rules"]["identity"]


@pytest.mark.parametrize(
    ("name", "text", "path", "official"),
    [
        ("GQA", "an answer ", "", "an answer "),
        ("WebQA", "<|image_1|>\nWith: words\n", "a/b.png", "a/b.png"),
        ("OVEN", '<|image_1|>\nWith: "words"\n', "a/b.png", 'a/b.png:<|image_1|>\nWith: "words'),
        ("RefCOCO", "<|image_1|>\nTake it", "a.png", "a.png:<|image_1|>\nTake it"),
    ],
)
def test_official_names(name, text, path, official):
    (data_set,) = (data_set for data_set in DATA_SETS if data_set.name == name)
    assert official_name(data_set, text, path) == official


# ---------------------------------------------------------------- what may not matter


def test_files_and_the_order_of_rows_move_no_score(tmp_path):
    made = tree.records("FashionIQ", rows=40, candidates=7)
    moved = random.Random(0).sample(made, len(made))
    results = []
    for name, rows, files in (("one", made, 1), ("three", made, 3), ("moved", moved, 2)):
        tree.write_set(tmp_path / name, "FashionIQ", rows, files=files)
        results.append(evaluate_mmeb(tree.Own(), tmp_path / name, tmp_path / name / "out", tasks=["FashionIQ"]))
    one, three, other = (result["tasks"]["FashionIQ"] for result in results)
    assert 0 < one["score"] < 1
    assert one == three
    assert one["data"] != other["data"] and one["scores"] == other["scores"]


def test_the_seed_draws_by_row_number_alone(trees, tmp_path):
    assert sample(100, None, 0) == sample(100, 100, 3) == list(range(100))
    some = sample(100, 10, 0)
    assert some == sorted(set(some)) and len(some) == 10 and some != sample(100, 10, 1) and some != list(range(10))
    assert set(sample(100, 5, 0)) < set(some)
    assert [row for row in sample(200, 20, 0) if row < 100] == [row for row in some if row in sample(200, 20, 0)]

    folder, expected = trees["split"]
    names = ["GQA", "OVEN"]
    model = tree.Oracle(expected)
    result = evaluate_mmeb(model, folder, tmp_path, tasks=names, queries=3, seed=7)
    assert [o.query for o in read_outcomes(tmp_path, "GQA")] == [str(row) for row in sample(6, 3, 7)]
    assert result["settings"] | {"queries": 3, "seed": 7, "tasks": names} == result["settings"]
    assert "scored on samples of 3 queries (seed 7): 2;" in result["warnings"][0]
    assert result["tasks"]["GQA"]["queries"] == 3 and result["tasks"]["GQA"]["facts"]["sampled"]
    calls = model.calls
    evaluate_mmeb(model, folder, tmp_path, tasks=names, queries=3, seed=7)
    assert model.calls == calls
    evaluate_mmeb(model, folder, tmp_path, tasks=names, queries=3, seed=8)
    assert model.calls > calls, "other rows are other work"
    whole = evaluate_mmeb(model, folder, tmp_path, tasks=names, queries=1000)
    assert not whole["tasks"]["GQA"]["facts"]["sampled"] and not any("samples" in line for line in whole["warnings"])


def test_sampled_runs_of_all_sets_have_an_overall_score_that_says_so(trees, tmp_path):
    result = evaluate_mmeb(tree.Oracle(trees["v1"][1]), trees["v1"][0], tmp_path, queries=2)
    assert result["overall"] == 1.0 and "scored on samples of 2 queries (seed 0): 36;" in result["warnings"][0]


def test_the_real_model_gives_the_same_scores_at_any_batch_size(tiny_model, tmp_path):
    names = ["HatefulMemes", "OK-VQA", "CIRR", "WebQA"]  # OK-VQA has an empty candidate
    tree.write_tree(tmp_path, "split", names, rows=4, candidates=4)
    found = []
    for batch_size in (1, 5, 64):
        output = tmp_path / f"out{batch_size}"
        result = evaluate_mmeb(tiny_model, tmp_path, output, tasks=names, batch_size=batch_size)
        found.append((scores(result), [o.rank for name in names for o in read_outcomes(output, name)]))
        assert result["model"]["fingerprint"] == tiny_model.fingerprint
        assert not any("finite" in line or "collapsed" in line for line in result["warnings"])
    assert found[0] == found[1] == found[2]
    assert len(set(found[0][1])) > 1, "the ranks say something"
    assert result["groups"]["vqa"] is None and result["overall"] is None


def test_two_processes_give_the_numbers_of_one(tmp_path):
    names = ["CIRR", "GQA", "WebQA"]
    for name in names:
        tree.write_set(tmp_path, name, tree.records(name, "split", rows=80, candidates=9), "split")
    one = evaluate_mmeb(tree.Own(), tmp_path, tmp_path / "one", tasks=names)
    finished(launch(tree.__file__, tmp_path, tmp_path / "two"))
    two = json.loads((tmp_path / "two" / "mmeb.json").read_text())
    assert two["tasks"] == plain(one["tasks"]) and 0 < two["tasks"]["CIRR"]["score"] < 1
    for name in names:
        assert read_outcomes(tmp_path / "one", name) == read_outcomes(tmp_path / "two", name)
    assert len(list((tmp_path / "two" / "cache").rglob("*.npy"))) == 3


# ---------------------------------------------------------------- going on


def test_a_stopped_run_goes_on_with_the_next_task(trees, tmp_path):
    folder, expected = trees["v1"]
    names = ["DocVQA", "CIRR", "MSCOCO", "ImageNet-1K"]
    first = tree.Oracle(expected, fails_after=2)
    with pytest.raises(RuntimeError, match="power"):
        evaluate_mmeb(first, folder, tmp_path, tasks=names)
    assert sorted(p.stem for p in (tmp_path / "tasks").iterdir()) == ["DocVQA", "ImageNet-1K"]
    assert not (tmp_path / "mmeb.json").exists()
    second, whole = tree.Oracle(expected), tree.Oracle(expected)
    result = evaluate_mmeb(second, folder, tmp_path, tasks=names)
    straight = evaluate_mmeb(whole, folder, tmp_path / "straight", tasks=names)
    assert second.calls == 2 and sorted(first.seen + second.seen) == sorted(whole.seen)
    assert plain(result["tasks"]) == plain(straight["tasks"])
    other = tree.Oracle(expected)
    other.fingerprint = "another"
    evaluate_mmeb(other, folder, tmp_path, tasks=names)
    assert sorted(other.seen) == sorted(whole.seen), "another model finds nothing done"


def test_a_stopped_task_goes_on_at_its_shard(trees, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "SHARD", 4)
    folder, expected = trees["v1"]
    first, second = tree.Oracle(expected, fails_after=2), tree.Oracle(expected)
    with pytest.raises(RuntimeError):
        evaluate_mmeb(first, folder, tmp_path, tasks=["CIRR"])
    done = []
    evaluate_mmeb(second, folder, tmp_path, tasks=["CIRR"], progress=lambda *at: done.append(at))
    assert len(first.seen) == 8 and len(second.seen) == 4 and not set(first.seen) & set(second.seen)
    assert done == [(12, 12)]


@pytest.mark.parametrize("changed", ["image", "text"])
def test_what_changed_is_never_served_from_an_earlier_run(tmp_path, changed):
    rows = tree.records("CIRR")
    tree.write_set(tmp_path, "CIRR", rows)
    model = tree.Oracle({"CIRR": tree.expected(tmp_path, "CIRR")})
    before = evaluate_mmeb(model, tmp_path, tmp_path / "out", tasks=["CIRR"])
    calls = model.calls
    again = evaluate_mmeb(model, tmp_path, tmp_path / "out", tasks=["CIRR"])
    assert plain(again["tasks"]) == plain(before["tasks"])
    assert model.calls == calls, "nothing changed"
    if changed == "image":
        (tmp_path / "eval_images" / "CIRR" / "asked 2.png").write_bytes(tree.png("another"))
    else:
        rows[2]["qry_text"] = rows[2]["qry_text"].replace("number", "figure")
        tree.write_set(tmp_path, "CIRR", rows)
    after = evaluate_mmeb(model, tmp_path, tmp_path / "out", tasks=["CIRR"])
    assert after["tasks"]["CIRR"]["data"] != before["tasks"]["CIRR"]["data"]
    ranks = [o.rank for o in read_outcomes(tmp_path / "out", "CIRR")]
    assert ranks[:2] + ranks[3:] == [1] * 5 and ranks[2] > 1, "the model does not know this query"
    fresh = evaluate_mmeb(model, tmp_path, tmp_path / "fresh", tasks=["CIRR"])
    assert fresh["tasks"] == after["tasks"]


def test_images_that_moved_are_shown_where_they_are(tmp_path):
    expected = tree.write_tree(tmp_path, "v1", ["CIRR"])
    model = tree.Oracle({"CIRR": expected["CIRR"][:3]})
    evaluate_mmeb(model, tmp_path, tmp_path / "out", tasks=["CIRR"])
    calls = model.calls
    moved = (tmp_path / "eval_images").rename(tmp_path / "moved")
    evaluate_mmeb(model, tmp_path, tmp_path / "out", images=moved, tasks=["CIRR"])
    told = json.loads((tmp_path / "out" / "tasks" / "CIRR.json").read_text())["result"]
    assert model.calls == calls and told["failures"]
    assert all(Path(failure["query"]["images"][0]).is_relative_to(moved) for failure in told["failures"])


# ---------------------------------------------------------------- what is missing or wrong


def test_all_missing_sets_are_named_before_anything_is_done(tmp_path):
    expected = tree.write_tree(tmp_path / "data", "v1", ["GQA", "CIRR"])
    (tmp_path / "data" / "OVEN").mkdir()
    (tmp_path / "data" / "OVEN" / "latest-train.parquet").touch()
    model = tree.Oracle(expected)
    with pytest.raises(DataError) as caught:
        evaluate_mmeb(model, tmp_path / "data", tmp_path / "out")
    said = str(caught.value)
    assert said.startswith("34 of 36 data sets of MMEB are missing")
    for name in set(tree.ALL) - {"GQA", "CIRR"}:
        assert f"{name}: no {tmp_path / 'data' / name / 'test-*.parquet'}" in said
    assert model.calls == 0 and not (tmp_path / "out").exists()
    result = evaluate_mmeb(model, tmp_path / "data", tmp_path / "out", allow_missing=True)
    assert scores(result) == {"GQA": 1.0, "CIRR": 1.0} and result["overall"] is None
    assert set(result["groups"].values()) == {None} and set(result["missing"]) == set(tree.ALL) - {"GQA", "CIRR"}
    assert "data sets that were not found: 34;" in result["warnings"][0]
    with pytest.raises(DataError, match=r"1 of 1 data sets of MMEB are missing; get them, or name another folder"):
        evaluate_mmeb(model, tmp_path / "data", tmp_path / "out", tasks=["EDIS"], allow_missing=True)
    with pytest.raises(DataError, match=r"nowhere: no such folder; it must hold one folder per MMEB data set"):
        evaluate_mmeb(model, tmp_path / "nowhere", tmp_path / "out")


def test_wrong_arguments_are_named(trees, tmp_path):
    folder, expected = trees["v1"]

    def run(**options) -> dict:
        return evaluate_mmeb(tree.Oracle(expected), folder, tmp_path, **options)

    with pytest.raises(DataError, match=r"MMEB has no task 'ImageNet_1K'; did you mean 'ImageNet-1K'\?"):
        run(tasks=["CIRR", "ImageNet_1K"])
    with pytest.raises(DataError, match=r"MMEB has no task 'CIFAR-100'"):
        run(tasks=["CIFAR-100"])
    with pytest.raises(DataError, match="no task of MMEB is named"):
        run(tasks=[])
    with pytest.raises(MucoError, match="queries is 0; pass at least 1"):
        run(queries=0)
    assert list(run(tasks=["MSCOCO", "GQA", "GQA"])["tasks"]) == ["GQA", "MSCOCO"], "the order is the benchmark's"
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="choose another output folder"):
        evaluate_mmeb(tree.Oracle(expected), folder, tmp_path / "file", tasks=["GQA"])


# ---------------------------------------------------------------- means as published


VLM2VEC_7B = """ImageNet-1K 80.2 N24News 79.5 HatefulMemes 70.3 VOC2007 80.6 SUN397 77.3 Place365 37.2 ImageNet-A 57.6
ImageNet-R 74.2 ObjectNet 40.5 Country211 30.2 OK-VQA 56.8 A-OKVQA 47.5 DocVQA 88.8 InfographicsVQA 59.0 ChartQA 56.6
Visual7W 52.7 ScienceQA 38.2 VizWiz 39.6 GQA 54.4 TextVQA 71.6 VisDial 81.6 CIRR 51.4 VisualNews_t2i 80.3
VisualNews_i2t 81.2 MSCOCO_t2i 77.5 MSCOCO_i2t 73.6 NIGHTS 67.5 WebQA 88.3 FashionIQ 16.8 Wiki-SS-NQ 62.1 OVEN 66.6
EDIS 85.9 MSCOCO 75.4 RefCOCO 87.1 RefCOCO-Matching 84.4 Visual7W-Pointing 80.7"""
MUCO_7B = """ImageNet-1K 82.9 N24News 82.0 HatefulMemes 73.4 VOC2007 86.5 SUN397 80.7 Place365 46.0 ImageNet-A 61.8
ImageNet-R 91.9 ObjectNet 49.9 Country211 28.3 OK-VQA 72.7 A-OKVQA 60.4 DocVQA 95.4 InfographicsVQA 78.0 ChartQA 68.2
Visual7W 64.1 ScienceQA 57.3 VizWiz 55.0 GQA 81.4 TextVQA 86.4"""


def row(text: str) -> dict[str, float]:
    cells = text.split()
    return {name: float(value) for name, value in zip(cells[::2], cells[1::2], strict=True)}


def test_means_are_those_that_were_published():
    groups, overall = aggregates(row(VLM2VEC_7B))
    rounded = {name: round(value, 1) for name, value in groups.items()}
    assert rounded == {
        "classification": 62.8,
        "vqa": 56.5,
        "retrieval": 69.4,
        "grounding": 81.9,
        "in-distribution": 71.3,
        "out-of-distribution": 57.9,
    }
    assert round(overall, 1) == 65.4
    groups, overall = aggregates(row(MUCO_7B))
    assert (round(groups["classification"], 1), round(groups["vqa"], 1)) == (68.3, 71.9)
    assert overall is None and groups["retrieval"] is None and groups["in-distribution"] is None


def test_the_overall_score_is_the_mean_of_data_sets_and_not_of_groups():
    means = {"classification": 66.2, "vqa": 65.6, "retrieval": 70.1, "grounding": 85.8}  # published, of the 2B model
    groups, overall = aggregates({d.name: means[d.meta] for d in DATA_SETS})
    assert round(overall, 1) == 69.5 != round(sum(means.values()) / 4, 1)
    assert {name: groups[name] for name in means} == pytest.approx(means)
