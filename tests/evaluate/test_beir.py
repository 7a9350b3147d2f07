"""Retrieval sets in BEIR's folders: graded judgements, corpora of texts and of images."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from muco.dialogue import Content
from muco.errors import DataError, MucoError
from muco.evaluate.beir import evaluate_beir
from muco.evaluate.compare import compare
from muco.evaluate.ranked import chance_of_hit, chance_of_ndcg

WORDS = ["lamp", "kettle", "boot", "drum", "fern", "anvil", "cup", "rope", "bell", "sieve", "oar", "quilt"]


def write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_qrels(path: Path, rows: list[tuple[str, str, int]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["query-id\tcorpus-id\tscore", *("\t".join(map(str, row)) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture
def texts(tmp_path) -> Path:
    """Twelve documents, one word each; "a drum" has graded answers, "a boot" one, "nothing" none."""
    folder = tmp_path / "words"
    write_lines(folder / "corpus.jsonl", [{"_id": f"d{i}", "title": "", "text": word} for i, word in enumerate(WORDS)])
    write_lines(
        folder / "queries.jsonl",
        [{"_id": f"q{i}", "text": text} for i, text in enumerate(["drum cup rope", "boot", "unjudged"])],
    )
    write_qrels(folder / "qrels" / "test.tsv", [("q0", "d3", 1), ("q0", "d6", 3), ("q0", "d7", 2), ("q0", "d5", 0),
                                                ("q1", "d2", 1)])  # fmt: skip
    return folder


class Bag:
    """One axis per word; of a query the first word weighs most. An image is its colour's axis."""

    fingerprint = "bag"

    def __init__(self) -> None:
        self.seen: list[Content] = []

    def encode(self, contents: list[Content], *, batch_size: int) -> np.ndarray:
        self.seen += contents
        return np.stack([self.vector(content) for content in contents])

    def vector(self, content: Content) -> np.ndarray:
        words = content.text.lower().split()
        words += [WORDS[Image.open(path).getpixel((0, 0))[0] // 20] for path in content.images]
        row = np.full(len(WORDS) + 1, 1e-3, np.float32)
        for place, word in enumerate(words):
            row[WORDS.index(word) if word in WORDS else -1] += 1 / (1 + place)
        return row / np.linalg.norm(row)


def test_what_a_model_says_of_itself_is_among_the_warnings(texts, tmp_path):
    bag = Bag()
    before = evaluate_beir(bag, texts, tmp_path / "out")["warnings"]
    bag.caveat = "it was not trained for vectors"
    assert evaluate_beir(bag, texts, tmp_path / "out")["warnings"] == [bag.caveat, *before]


def test_graded_judgements_give_the_ndcg_of_a_hand(texts, tmp_path):
    result = evaluate_beir(Bag(), texts, tmp_path / "out", command="muco …", model_path="m")
    task = result["tasks"]["words"]
    # q0 finds drum (1), cup (3), rope (2); best would be 3, 2, 1. q1 finds boot (1).
    dcg = 1 / math.log2(2) + 3 / math.log2(3) + 2 / math.log2(4)
    ideal = 3 / math.log2(2) + 2 / math.log2(3) + 1 / math.log2(4)
    assert 0.5 < dcg / ideal < 0.9
    assert task["metric"] == "ndcg@10" and task["score"] == pytest.approx((dcg / ideal + 1) / 2)
    assert task["scores"] == {"ndcg@10": task["score"], "hit@1": 1.0, "recall@10": 1.0, "mrr@10": 1.0}
    assert (task["queries"], task["candidates"]) == (2, (12, 12))
    assert task["facts"]["queries without judgements, left out"] == 1
    assert result["overall"] == task["score"] and result["benchmark"] == "beir"
    for file in ("beir.json", "beir.csv", "beir.md", "beir.html"):
        assert (tmp_path / "out" / file).is_file()
    at_1 = evaluate_beir(Bag(), texts, tmp_path / "out", k=1)["tasks"]["words"]
    assert at_1["scores"] == {
        "ndcg@1": pytest.approx((1 / 3 + 1) / 2),
        "hit@1": 1,
        "recall@1": pytest.approx(2 / 3),
        "mrr@1": 1,
    }


def test_title_and_text_and_instruction_are_put_together(texts, tmp_path):
    write_lines(
        texts / "corpus.jsonl",
        [
            {"_id": "d2", "title": "boot", "text": " lamp ", "metadata": {"url": "x"}},
            {"_id": "d3", "title": "drum"},
            {"_id": "d6", "text": "cup"},
        ],
    )
    model = Bag()
    result = evaluate_beir(model, texts, tmp_path / "out", instruction="Find it:")
    assert {content.text for content in model.seen} == {
        "boot lamp", "drum", "cup", "Find it: drum cup rope", "Find it: boot"}  # fmt: skip
    assert result["settings"]["instruction"] == "Find it:"
    lacks = "judged candidates that the corpus lacks"
    assert result["tasks"]["words"]["facts"][lacks] == 2  # d7, and d5 of grade 0
    assert f"2 {lacks}: they are never found" in result["tasks"]["words"]["warnings"]
    assert result["tasks"]["words"]["scores"]["recall@10"] == pytest.approx((2 / 3 + 1) / 2)


def test_a_corpus_of_images(tmp_path):
    folder = tmp_path / "pages"
    for i in range(len(WORDS)):
        (folder / "images").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (30, 40), (i * 20, 0, 0)).save(folder / "images" / f"{i}.png")
    write_lines(folder / "corpus.jsonl", [{"_id": str(i), "image": f"images/{i}.png"} for i in range(len(WORDS))])
    write_lines(
        folder / "queries.jsonl",
        [{"_id": str(i), "text": word} for i, word in enumerate(WORDS[:9])]
        + [{"_id": "like", "image": "images/10.png"}, {"_id": "both", "text": "quilt", "image": "images/11.png"}],
    )
    rows = [(str(i), str(i), 1) for i in range(9)] + [("like", "10", 2), ("both", "11", 1)]
    write_qrels(folder / "qrels" / "test.tsv", rows)
    result = evaluate_beir(Bag(), folder, tmp_path / "out")
    task = result["tasks"]["pages"]
    assert task["score"] == 1.0 and task["warnings"] == () and result["warnings"] == []
    assert task["facts"]["queries that have the id of a candidate"] == 9
    # an image that changes is embedded again, and so is its pool
    Image.new("RGB", (30, 40), (220, 0, 0)).save(folder / "images" / "3.png")
    assert evaluate_beir(Bag(), folder, tmp_path / "out")["tasks"]["pages"]["scores"]["hit@1"] < 1.0


def test_several_sets_below_a_folder_are_tasks_of_their_own(texts, tmp_path):
    both = tmp_path / "both"
    for name, word in (("b", "fern"), ("a", "anvil")):
        write_lines(both / name / "corpus.jsonl", [{"_id": w, "text": w} for w in WORDS])
        write_lines(both / name / "queries.jsonl", [{"_id": "1", "text": word}])
        write_qrels(both / name / "qrels" / "dev.tsv", [("1", "fern", 1)])
    (both / "notes").mkdir()
    steps = []
    result = evaluate_beir(Bag(), both, tmp_path / "out", split="dev", progress=lambda *at: steps.append(at))
    assert list(result["tasks"]) == ["a", "b"]
    scores = {name: task["score"] for name, task in result["tasks"].items()}
    # to "anvil" all others are equal: anvil, then bell, boot, cup, drum, fern in the order of their ids
    assert scores == {"a": pytest.approx(1 / math.log2(7)), "b": 1.0}
    assert result["overall"] == pytest.approx(np.mean(list(scores.values())))
    assert steps[-1] == (26, 26)
    model = Bag()
    assert evaluate_beir(model, both, tmp_path / "out", split="dev")["tasks"] == json_like(result["tasks"])
    assert model.seen == []
    with pytest.raises(DataError, match=r"these files are missing:\n.*a/qrels/test.tsv\n.*b/qrels/test.tsv\n"):
        evaluate_beir(Bag(), both, tmp_path / "out")


def test_a_set_without_a_file_is_refused_and_not_left_out(texts, tmp_path):
    """Whichever is missing; a folder without any of them is no set."""
    for missing in ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv"):
        both = tmp_path / missing.partition(".")[0] / "both"
        for name in ("a", "b"):
            shutil.copytree(texts, both / name)
        (both / "images").mkdir()
        (both / "b" / missing).unlink()
        for folder in (both, both / "b"):
            with pytest.raises(DataError) as caught:
                evaluate_beir(Bag(), folder, tmp_path / "out")
            assert str(caught.value).splitlines()[1:-1] == [f"  {both / 'b' / missing}"]


def test_sets_of_a_folder_in_the_folder_count_as_one_data_set(texts, tmp_path):
    """As BEIR's CQADupStack, which is published as folders of twelve forums."""
    every = tmp_path / "every"
    for name, query in (("fiqa", "drum"), ("cqadupstack/android", "cup"), ("cqadupstack/tex", "fern"), ("zz", "boot")):
        write_lines(every / name / "corpus.jsonl", [{"_id": w, "text": w} for w in WORDS])
        write_lines(every / name / "queries.jsonl", [{"_id": "1", "text": query}])
        write_qrels(every / name / "qrels" / "test.tsv", [("1", "fern" if name == "fiqa" else query, 1)])
    write_qrels(every / "cqadupstack" / "tex" / "qrels" / "test.tsv", [("1", "anvil", 1)])
    for hidden in (".trash", "__MACOSX"):
        shutil.copytree(every / "zz", every / hidden / "zz")
    result = evaluate_beir(Bag(), every, tmp_path / "out")
    assert list(result["tasks"]) == ["cqadupstack/android", "cqadupstack/tex", "fiqa", "zz"]
    android, tex, fiqa, zz = (task["score"] for task in result["tasks"].values())
    assert 0 < tex < android == zz == 1 and 0 < fiqa < 1
    assert result["groups"] == {"cqadupstack": pytest.approx((android + tex) / 2)}
    assert result["overall"] == pytest.approx(((android + tex) / 2 + fiqa + zz) / 3)
    assert "cqadupstack/tex" in (tmp_path / "out" / "beir.html").read_text()
    model = Bag()
    assert evaluate_beir(model, every, tmp_path / "out")["overall"] == result["overall"] and model.seen == []

    class Other(Bag):
        fingerprint = "other"

        def vector(self, content: Content) -> np.ndarray:
            return super().vector(Content("boot" if content.text == "cup" else content.text))

    changed = evaluate_beir(Other(), every, tmp_path / "changed")["overall"]
    (mean,) = compare(tmp_path / "out", tmp_path / "changed")["means"].values()
    assert (mean["a"], mean["b"]) == (pytest.approx(result["overall"]), pytest.approx(changed)) and changed != mean["a"]
    assert mean["interval"] == [pytest.approx(mean["difference"])] * 2  # of one query nothing else can be drawn
    alone = evaluate_beir(Bag(), every / "cqadupstack", tmp_path / "alone")
    assert list(alone["tasks"]) == ["android", "tex"] and alone["overall"] == result["groups"]["cqadupstack"]


def json_like(tasks: dict) -> dict:
    """A task that was found again holds lists where a new one holds tuples of its own."""
    return {name: {**task, "facts": json.loads(json.dumps(task["facts"]))} for name, task in tasks.items()}


def test_the_order_of_lines_moves_nothing(texts, tmp_path):
    class Same(Bag):
        def vector(self, content: Content) -> np.ndarray:
            return np.eye(2, dtype=np.float32)[int(content.text in WORDS[6:])]

    first = evaluate_beir(Same(), texts, tmp_path / "a")["tasks"]["words"]
    for name in ("corpus.jsonl", "queries.jsonl"):
        (texts / name).write_text("\n".join(reversed((texts / name).read_text().splitlines())))
    again = evaluate_beir(Same(), texts, tmp_path / "b")["tasks"]["words"]
    assert again["scores"] == first["scores"] and 0 < first["score"] < 1
    kept = [(tmp_path / out / "outcomes" / "words.jsonl").read_text() for out in "ab"]
    assert kept[0] == kept[1]
    assert [found[0] for found in json.loads(kept[0].splitlines()[0])["found"]] == ["d0", "d1", "d2", "d3", "d4"]


def test_a_stopped_run_goes_on_where_it_was(texts, tmp_path):
    class Stopped(Bag):
        def encode(self, contents: list[Content], *, batch_size: int) -> np.ndarray:
            if self.seen:
                raise KeyboardInterrupt
            return super().encode(contents, batch_size=batch_size)

    stopped, model = Stopped(), Bag()
    with pytest.raises(KeyboardInterrupt):
        evaluate_beir(stopped, texts, tmp_path / "out")
    evaluate_beir(model, texts, tmp_path / "out")
    assert len(stopped.seen) == 2 and len(model.seen) == 12
    model.seen.clear()
    rows = [json.loads(line) for line in (texts / "corpus.jsonl").read_text().splitlines()]
    write_lines(texts / "corpus.jsonl", [*rows[:-1], rows[-1] | {"text": "oar oar"}])
    evaluate_beir(model, texts, tmp_path / "out")
    assert len(model.seen) == 12


def test_a_collapsed_model_scores_nothing(texts, tmp_path):
    class Constant(Bag):
        def vector(self, content: Content) -> np.ndarray:
            return np.full(4, 0.5, np.float32)

    task = evaluate_beir(Constant(), texts, tmp_path / "out")["tasks"]["words"]
    assert set(task["scores"].values()) == {0.0}
    assert any("all 12 vectors of the corpus of words are the same" in line for line in task["warnings"])
    assert any("is not above chance" in line for line in task["warnings"])


def test_what_the_judgements_get_wrong_is_counted(texts, tmp_path):
    write_qrels(texts / "qrels" / "test.tsv", [("q1", "d2", 1), ("q0", "d1", 0), ("q9", "d1", 1)])
    task = evaluate_beir(Bag(), texts, tmp_path / "out")["tasks"]["words"]
    assert task["score"] == 0.5
    assert "1 judged queries that queries.jsonl lacks: they were not asked" in task["warnings"]
    assert "1 queries for which nothing is relevant: they score 0" in task["warnings"]
    write_qrels(texts / "qrels" / "test.tsv", [("q9", "d1", 1)])
    with pytest.raises(DataError, match=r"qrels/test.tsv: judges none of the 3 queries of .*queries.jsonl"):
        evaluate_beir(Bag(), texts, tmp_path / "out")


def test_queries_of_other_splits_stop_nothing(texts, tmp_path):
    """They have no content, half a character, or a text that is there twice; only their ids are read."""
    rows = [json.loads(line) for line in (texts / "queries.jsonl").read_text().splitlines()]
    before = evaluate_beir(Bag(), texts, tmp_path / "before")["tasks"]["words"]
    others = [
        {"_id": "q7", "text": ""},
        {"_id": "q8", "text": "\ud83d"},
        {"_id": "q9", "text": 5},
        {"_id": "q2", "text": ""},
    ]
    write_lines(texts / "queries.jsonl", [*others, *rows])
    task = evaluate_beir(Bag(), texts, tmp_path / "out")["tasks"]["words"]
    assert task["scores"] == before["scores"] and task["queries"] == 2
    assert task["facts"]["queries without judgements, left out"] == 5


def test_ids_may_be_as_long_as_those_of_dbpedia(texts, tmp_path):
    """<dbpedia:TITLE>, of a title of 255 bytes and signs that are escaped."""
    rows = [json.loads(line) for line in (texts / "corpus.jsonl").read_text().splitlines()]
    for length, fits in ((512, True), (513, False)):
        long = f"<dbpedia:{'%22' * 30}{'é' * 120}".ljust(length - 121, "_") + ">"
        assert len(long.encode()) == length
        write_lines(texts / "corpus.jsonl", [*rows, {"_id": long, "text": "quilt quilt"}])
        if fits:
            assert evaluate_beir(Bag(), texts, tmp_path / "out")["tasks"]["words"]["candidates"] == (13, 13)
        else:
            with pytest.raises(DataError, match="an id of 513 bytes; at most 512 are allowed"):
                evaluate_beir(Bag(), texts, tmp_path / "out")


@pytest.mark.parametrize(
    ("file", "row", "said"),
    [
        ("corpus.jsonl", {"_id": "d1", "text": "x"}, "the id 'd1' is also that of line 2"),
        ("corpus.jsonl", {"text": "x"}, "'_id' must be an id, not None"),
        ("corpus.jsonl", {"_id": "", "text": "x"}, "'_id' must be an id, not ''"),
        ("corpus.jsonl", {"_id": "d\t9", "text": "x"}, "'_id' must be an id"),
        ("corpus.jsonl", {"_id": "d9", "text": " "}, "neither text nor image; add one of title, text, image"),
        ("corpus.jsonl", {"_id": "d9", "text": 5}, "'text' must be a string or null, not 5"),
        ("corpus.jsonl", {"_id": "d9", "image": "../1.png"}, "'image' is '../1.png'; use the path of an image within"),
        ("corpus.jsonl", {"_id": "d9", "image": "1.png"}, "1.png cannot be read"),
        ("queries.jsonl", {"_id": "q0", "text": "x"}, "the query 'q0' is also at"),
        ("queries.jsonl", {"_id": "q9"}, "neither text nor image; add one of text, image"),
    ],
)
def test_a_bad_line_is_named(texts, tmp_path, file, row, said):
    rows = (texts / file).read_text().splitlines()
    (texts / file).write_text("\n".join([*rows, json.dumps(row)]))
    with (texts / "qrels" / "test.tsv").open("a") as judgements:
        judgements.write("q9\td0\t1\n")
    with pytest.raises(DataError, match=f"^{re.escape(str(texts / file))}:{len(rows) + 1}: .*{re.escape(said)}"):
        evaluate_beir(Bag(), texts, tmp_path / "out")


def test_bad_arguments_and_folders_are_refused(texts, tmp_path):
    with pytest.raises(MucoError, match="k is 0"):
        evaluate_beir(Bag(), texts, tmp_path / "out", k=0)
    with pytest.raises(DataError, match="no such folder"):
        evaluate_beir(Bag(), tmp_path / "none", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"corpus.jsonl\n.*queries.jsonl\n.*qrels/test.tsv\nadd them"):
        evaluate_beir(Bag(), tmp_path / "empty", tmp_path / "out")


def test_a_query_that_is_also_a_candidate_stays_one(texts, tmp_path):
    rows = [json.loads(line) for line in (texts / "queries.jsonl").read_text().splitlines()]
    write_lines(texts / "queries.jsonl", [*rows, {"_id": "d2", "text": "boot"}])
    with (texts / "qrels" / "test.tsv").open("a") as file:
        file.write("d2\td2\t1\n")
    task = evaluate_beir(Bag(), texts, tmp_path / "out")["tasks"]["words"]
    assert task["facts"]["queries that have the id of a candidate"] == 1 and task["scores"]["hit@1"] == 1.0


# ---------------------------------------------------------------- what cannot be embedded


def test_what_cannot_be_embedded_is_left_out_and_missed(tiny_model, texts, tmp_path):
    corpus = [json.loads(line) for line in (texts / "corpus.jsonl").read_text().splitlines()]
    corpus[2]["text"] = "boot <|emb|>"  # all that is right for q1
    corpus[3]["text"] = "half \ud83d"  # right for q0, as are two others
    corpus[4] = {"_id": "d4", "image": "nowhere.png"}
    corpus[5] = {"_id": "d5"}
    write_lines(texts / "corpus.jsonl", corpus)
    queries = [json.loads(line) for line in (texts / "queries.jsonl").read_text().splitlines()]
    write_lines(texts / "queries.jsonl", [*queries, {"_id": "q7", "text": "\udc00"}, {"_id": "q8", "text": "<|mask|>"}])
    with (texts / "qrels" / "test.tsv").open("a") as file:
        file.write("q7\td0\t1\nq8\td1\t1\n")
    with pytest.raises(DataError, match=r"queries\.jsonl:4: .*half a character.*--skip-broken"):
        evaluate_beir(tiny_model, texts, tmp_path / "out")
    result = evaluate_beir(tiny_model, texts, tmp_path / "out", skip_broken=True)
    task = result["tasks"]["words"]
    assert task["left_out"] == {"queries": 2, "candidates": 4, "missed": 3} and task["queries"] == 4
    outcomes = [json.loads(line) for line in (tmp_path / "out/outcomes/words.jsonl").read_text().splitlines()]
    assert {o["query"]: o["value"] for o in outcomes if o["query"] != "q0"} == {"q1": 0, "q7": 0, "q8": 0}
    assert task["score"] == pytest.approx(np.mean([o["value"] for o in outcomes]))
    told = [json.loads(line) for line in (tmp_path / "out/left_out/words.jsonl").read_text().splitlines()]
    named = [(one["side"], re.search(r"(\w+)\.jsonl:(\d+): ", one["reason"]).groups()) for one in told]
    assert sorted(named) == [("candidate", ("corpus", n)) for n in "3456"] + [("query", ("queries", n)) for n in "45"]
    assert task["facts"]["query vectors"]["non_finite"] == task["facts"]["candidate vectors"]["non_finite"] == 0
    assert "left out" in (tmp_path / "out" / "beir.html").read_text()


# ---------------------------------------------------------------- chance


@pytest.mark.parametrize(("pool", "k"), [(14, 5), (30, 10), (4, 10), (1, 1)])
def test_chance_is_what_random_orders_score(pool, k):
    rng = np.random.default_rng(0)
    relevant = [0, 1, min(3, pool)]
    hits = [
        np.mean([(rng.permutation(pool)[:k] < right).any() for _ in range(4000)]) if right else 0 for right in relevant
    ]
    held = [dict.fromkeys(map(str, range(right)), 1) for right in relevant]
    assert chance_of_hit([], held, pool, k) == pytest.approx(np.mean(hits), abs=0.015)


def test_chance_of_ndcg_is_what_random_orders_score(texts, tmp_path):
    from muco.evaluate.beir import read_judged
    from muco.evaluate.metrics import ndcg_at

    queries, _ = read_judged(texts, "test", "")
    ids, rng = [f"d{i}" for i in range(12)], np.random.default_rng(0)
    found = [ndcg_at(rng.permutation(ids), q.grades, 4) for q in queries for _ in range(4000)]
    assert chance_of_ndcg(queries, [q.grades for q in queries], 12, 4) == pytest.approx(np.mean(found), abs=0.01)
    assert chance_of_ndcg(queries, [{}, {}], 12, 4) == 0.0


def test_a_real_model_on_texts(tiny_model, texts, tmp_path):
    result = evaluate_beir(tiny_model, texts, tmp_path / "out", batch_size=3)
    assert set(result["tasks"]["words"]["scores"]) == {"ndcg@10", "hit@1", "recall@10", "mrr@10"}
    assert result["model"]["fingerprint"] == tiny_model.fingerprint
