"""M-BEIR on a small tree in the published layout: what is read, asked, ranked and told."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import mbeir_tree
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mbeir_tree import CANDIDATES, NAMES, QUERIES, SIDES, TASKS, WAYS, Oracle, did, edit, token_of, write_tree
from processes import finished, launch

from muco.data import judged as lines
from muco.data import lines as lines_of_files
from muco.data import mbeir_test as mbeir_data
from muco.data.mbeir_test import ALL, choose, format_string, number_of, open_pool
from muco.dialogue import Content
from muco.errors import DataError, ImageError, MucoError
from muco.evaluate import outcomes
from muco.evaluate import pool as pool_module
from muco.evaluate.benchmark import file_name
from muco.evaluate.mbeir import evaluate_mbeir, means

ALL_NAMES = [f"{NAMES[data_set]} t{task}" for data_set, task in TASKS]
NIGHTS = "mbeir_nights_task4"
GROUPS = [
    *("single to single global", "single to fused global", "fused to single global", "fused to fused global"),
    "overall global",
]
LOCAL = {"pools": ("local",), "tasks": ["NIGHTS t4"]}


@pytest.fixture(scope="session")
def shared_tree(tmp_path_factory) -> Path:
    return write_tree(tmp_path_factory.mktemp("mbeir") / "M-BEIR")


@pytest.fixture
def tree(shared_tree, tmp_path) -> Path:
    """A tree that may be changed."""
    return shutil.copytree(shared_tree, tmp_path / "M-BEIR")


@pytest.fixture(scope="session")
def whole(shared_tree, tmp_path_factory) -> tuple[dict, Oracle, Path, list[tuple[int, int]]]:
    """A run of all 16 tasks in both pools; must not be changed."""
    output, model, steps = tmp_path_factory.mktemp("mbeir") / "out", Oracle(), []
    result = evaluate_mbeir(
        model, shared_tree, output, command="muco …", model_path="m", progress=lambda *at: steps.append(at)
    )
    return result, model, output, steps


def run_file(output: Path, name: str) -> dict[str, list[str]]:
    """Query -> ids in their order."""
    found: dict[str, list[str]] = {}
    for line in (output / "runs" / f"{name.replace(' ', '_')}.trec").read_text().splitlines():
        query, zero, candidate, rank, _, _ = line.split()
        found.setdefault(query, []).append(candidate)
        assert (zero, int(rank)) == ("Q0", len(found[query]))
    return found


def plain(result: dict, *, data: bool = False) -> dict:
    """The tasks without what the order of lines in a file changes."""
    return {
        name: {key: value for key, value in task.items() if data or key != "data"}
        for name, task in result["tasks"].items()
    }


# ---------------------------------------------------------------- scores


def test_an_oracle_is_perfect_in_both_pools(whole):
    result, _, output, steps = whole
    assert list(result["tasks"]) == [f"{name} {pool}" for pool in ("local", "global") for name in ALL_NAMES]
    for name, task in result["tasks"].items():
        deep = name.startswith(("Fashion200K", "FashionIQ"))
        assert task["metric"] == ("hit@10" if deep else "hit@5")
        depths = (1, 5, 10, 20, 50) if deep else (1, 5, 10)
        assert set(task["scores"]) == {f"{kind}@{k}" for kind in ("hit", "recall") for k in depths}
        assert task["score"] == 1.0 and task["queries"] == QUERIES, name
        size = CANDIDATES * (len(TASKS) if name.endswith("global") else 1)
        assert task["candidates"] == (size, size)
        crossing = name.startswith(("OVEN", "InfoSeek"))
        lacks = int(crossing and name.endswith("local"))
        assert task["facts"]["positives that the pool lacks"] == lacks == task["facts"]["of those, of other data sets"]
        assert task["scores"]["recall@5"] == 1 - lacks / 2 / QUERIES
        assert task["facts"]["positives"] == 6 + crossing
        assert any("1 of 7 positives are not in the local pool" in line for line in task["warnings"]) == lacks
    assert result["overall"] == 1.0 and set(result["groups"].values()) == {1.0}
    assert set(GROUPS) < set(result["groups"]) and "overall local" in result["groups"]
    assert result["settings"]["overall"] == "mean of 16 tasks, global pool" and result["missing"] == []
    assert not [line for line in result["warnings"] if " global: " in line]
    for file in ("mbeir.json", "mbeir.csv", "mbeir.md", "mbeir.html", "tasks/MSCOCO+t0+local.json"):
        assert (output / file).is_file()
    assert json.loads((output / "mbeir.json").read_text())["tasks"].keys() == result["tasks"].keys()
    assert steps[-1] == (steps[-1][1],) * 2 and [done for done, _ in steps] == sorted(done for done, _ in steps)
    assert {total for _, total in steps} == {len(TASKS) * (CANDIDATES + 2 * QUERIES)}


def test_every_content_is_encoded_once_and_said_as_the_benchmark_says_it(whole, shared_tree):
    _, model, _, _ = whole
    assert len(model.seen) == len(TASKS) * (CANDIDATES + QUERIES)
    seen = {token_of(content): content for content in model.seen}
    assert len(seen) == len(model.seen)
    for token, content in seen.items():
        data_set, task, _ = map(int, token[1:].split("x"))
        query = token[0] == "q"
        modality = SIDES[task][not query]
        prompt = rf"({'|'.join(w.capitalize() for w in WAYS)}) look for what belongs to {NAMES[data_set]} {task}\."
        own = f"The tale of {token} and its lamp." if not query else rf" where does {token} shine\."
        expected = (prompt if query else "") + (own if "text" in modality else "")
        assert re.fullmatch(expected, content.text), content.text
        assert len(content.images) == ("image" in modality)
        if content.images:
            folder = Path(content.images[0]).parent.name
            assert folder == f"{'oven' if data_set == 6 else NAMES[data_set].lower()}_images"
            assert Path(content.images[0]).is_relative_to(shared_tree)


def test_hit_and_recall_differ_where_a_query_has_several_positives(shared_tree, tmp_path):
    class One(Oracle):
        def right(self, token: str) -> list[str]:
            return super().right(token)[:1]  # query 0 finds one of its three; the others tie with all the rest

    scores = evaluate_mbeir(One(), shared_tree, tmp_path, **LOCAL)["tasks"]["NIGHTS t4 local"]["scores"]
    assert (scores["hit@1"], scores["hit@5"]) == (1.0, 1.0)
    assert scores["recall@1"] == scores["recall@5"] == pytest.approx((1 / 3 + 3) / 4)
    assert scores["recall@10"] == 1.0  # 0, then 1 to 9 by their numbers


def test_published_rows_have_the_published_means():
    order = ["VisualNews t0", "MSCOCO t0", "Fashion200K t0", "WebQA t1", "EDIS t2", "WebQA t2", "VisualNews t3"]
    order += ["MSCOCO t3", "Fashion200K t3", "NIGHTS t4", "OVEN t6", "InfoSeek t6", "FashionIQ t7", "CIRR t7"]
    order += ["OVEN t8", "InfoSeek t8"]
    rows = {
        "42.6 77.9 17.8 84.7 59.4 78.8 42.8 92.3 17.9 32.0 39.2 24.0 24.3 43.9 60.2 44.6": "51.0 69.1 32.9 52.4 48.9",
        "41.3 75.4 28.7 85.8 62.5 81.0 39.3 90.4 30.4 32.1 48.7 48.4 33.1 50.5 70.0 60.0": "52.9 71.8 45.2 65.0 54.9",
    }
    for row, expected in rows.items():
        scores = dict(zip([f"{name} global" for name in order], map(float, row.split()), strict=True))
        found = means(scores, "global")
        assert list(found) == GROUPS
        # half a tenth rounds up in the papers, whichever side of it a float falls on
        assert [f"{value + 1e-9:.1f}" for value in found.values()] == expected.split()
        del scores["OVEN t8 global"]
        partly = means(scores, "global")
        assert partly["fused to fused global"] is None and partly["overall global"] is None
        assert partly["single to fused global"] is not None
        assert set(means(scores, "local").values()) == {None}


@pytest.mark.parametrize("pool", ["local", "global"])
def test_a_failure_shows_the_right_candidate_and_by_how_much_it_lost(shared_tree, tmp_path, monkeypatch, pool):
    monkeypatch.setattr(pool_module, "SHARD", 4)

    class Wrong(Oracle):
        def vector(self, token: str) -> np.ndarray:
            row = super().vector(token)
            if token == "q4x4x3":  # the right one is the last of 14, beyond what is ranked
                row[:] = 0
                row[self.axis["c4x4x3"]], row[self.axis["c4x4x13"]] = -0.6, 0.8
            if token == "q4x4x0":  # of three right ones the best is in another shard
                row[:] = 0
                for i, score in ((0, -0.6), (5, -0.3), (6, -0.5), (13, 0.8)):
                    row[self.axis[f"c4x4x{i}"]] = score
            if token == "q4x4x1":
                row[:] = 0
                row[self.axis["c4x4x1"]], row[self.axis["c4x4x2"]] = 0.6, 0.8
            return row

    name = f"NIGHTS t4 {pool}"
    task = evaluate_mbeir(Wrong(), shared_tree, tmp_path, tasks=["NIGHTS t4"], pools=(pool,))["tasks"][name]
    assert (task["scores"]["hit@1"], task["score"]) == (0.25, 0.5)
    kept = failures(tmp_path, name)
    assert [(f["query"]["id"], f["right"]["id"], f["found"][0][0]["id"]) for f in kept] == [
        ("4:404", "4:404", "4:414"),
        ("4:401", "4:406", "4:414"),
        ("4:402", "4:402", "4:403"),
    ]
    assert [f["margin"] for f in kept] == pytest.approx([1.4, 1.1, 0.2])
    assert kept[0]["right"]["images"][0].endswith("c4x4x3.png")
    lines_of = (tmp_path / "outcomes" / f"{file_name(name)}.jsonl").read_text().splitlines()
    outcomes = [json.loads(line) for line in lines_of]
    assert [(o["query"], o["value"], o["rank"]) for o in outcomes] == [
        ("4:401", 0.0, None), ("4:402", 1.0, 2), ("4:403", 1.0, 1), ("4:404", 0.0, None)]  # fmt: skip


def failures(output: Path, name: str) -> list[dict]:
    return json.loads((output / "tasks" / f"{file_name(name)}.json").read_text())["result"]["failures"]


def test_the_failures_of_largest_margin_are_kept(shared_tree, tmp_path, monkeypatch):
    monkeypatch.setattr(outcomes, "FAILURES", 1)
    scores = {"q4x4x1": {1: 0.6, 2: 0.8}, "q4x4x3": {3: 0.1, 12: 0.69, 13: 0.7}}

    class Wrong(Oracle):
        def vector(self, token: str) -> np.ndarray:
            row = super().vector(token)
            if token in scores:
                row[:] = 0
                for candidate, score in scores[token].items():
                    row[self.axis[f"c4x4x{candidate}"]] = score
            return row

    evaluate_mbeir(Wrong(), shared_tree, tmp_path, **LOCAL)
    assert [(f["query"]["id"], round(f["margin"], 4)) for f in failures(tmp_path, "NIGHTS t4 local")] == [
        ("4:404", 0.6)
    ]


# ---------------------------------------------------------------- ties, collapse, and what may not matter


class Two(Oracle):
    """Knows two kinds of candidates only, and asks for the one that holds the first seven."""

    def vector(self, token: str) -> np.ndarray:
        kind = int(token.split("x")[2]) // 7 if token[0] == "c" else 0
        return np.eye(2, dtype=np.float32)[kind]


def test_ties_are_decided_by_number_whatever_the_order_of_lines(tree, tmp_path):
    local = {"pools": ("local", "global"), "tasks": ["MSCOCO t0"]}
    first = evaluate_mbeir(Two(), tree, tmp_path / "a", **local)
    for pool in ("local", "global"):
        task = first["tasks"][f"MSCOCO t0 {pool}"]
        assert task["facts"]["queries whose best right candidate ties with a wrong one"] == (
            4 if pool == "local" else 0
        )
        assert any("4 queries whose best right candidate ties" in line for line in task["warnings"]) == (
            pool == "local"
        )
    numbers = [f"9:{n}" for n in range(1, 11)]  # 9:10 comes last as a number, second as a text
    assert set(map(tuple, run_file(tmp_path / "a", "MSCOCO t0 local").values())) == {tuple(numbers)}
    together = sorted((did(s, t, i) for s, t in TASKS for i in range(7)), key=number_of)[:10]
    assert set(map(tuple, run_file(tmp_path / "a", "MSCOCO t0 global").values())) == {tuple(together)}

    for path in sorted([*tree.glob("*/*/*.jsonl"), *tree.glob("qrels/test/*.txt")]):
        rows = path.read_text().splitlines()
        random.Random(0).shuffle(rows)
        path.write_text("\n".join(["", *rows, "", ""]))
    again = evaluate_mbeir(Two(), tree, tmp_path / "b", **local)
    assert plain(again) == plain(first)
    for pool in ("local", "global"):
        assert run_file(tmp_path / "b", f"MSCOCO t0 {pool}") == run_file(tmp_path / "a", f"MSCOCO t0 {pool}")


class Constant(Oracle):
    fingerprint = "constant"

    def __init__(self, value: float = 0.5, noise: float = 0.0) -> None:
        self.value, self.noise = value, noise

    def encode(self, contents: list[Content], *, batch_size: int) -> np.ndarray:
        noise = np.random.default_rng(0).normal(size=(len(contents), 4)) * self.noise
        return (self.value + noise).astype(np.float32)


@pytest.mark.parametrize(
    "model", [Constant(), Constant(noise=1e-5), Constant(float("nan"))], ids=["equal", "nearly equal", "nan"]
)
def test_a_collapsed_or_nan_model_scores_nothing_and_is_reported(model, shared_tree, tmp_path):
    result = evaluate_mbeir(model, shared_tree, tmp_path, tasks=["NIGHTS t4"])
    for pool in ("local", "global"):
        task = result["tasks"][f"NIGHTS t4 {pool}"]
        assert set(task["scores"].values()) == {0.0}, "the order of ids must not score"
        said = " ".join(task["warnings"])
        if np.isnan(model.value):
            assert "4 of 4 query vectors are not finite; they find nothing" in said
            assert f"{CANDIDATES} of {CANDIDATES} vectors of the pool of NIGHTS t4 are not finite" in said
        else:
            assert "all 4 query vectors are the same" in said
            assert f"all {CANDIDATES} vectors of the pool of NIGHTS t4 are the same: the model has collapsed" in said
        assert "is not above chance" in said
        assert failures(tmp_path, f"NIGHTS t4 {pool}") == []
    json.dumps(result, allow_nan=False)


def test_one_collapsed_pool_spoils_its_own_tasks_only(shared_tree, tmp_path):
    class Deaf(Oracle):
        def vector(self, token: str) -> np.ndarray:
            return super().vector("c4x4x0" if token.startswith("c4x4x") else token)

    result = evaluate_mbeir(Deaf(), shared_tree, tmp_path, tasks=["NIGHTS t4", "CIRR t7"])
    scores = {name: task["score"] for name, task in result["tasks"].items()}
    assert scores == {"NIGHTS t4 local": 0, "CIRR t7 local": 1, "NIGHTS t4 global": 0, "CIRR t7 global": 1}
    assert any("the pool of NIGHTS t4 are the same" in line for line in result["tasks"]["CIRR t7 global"]["warnings"])
    assert result["tasks"]["NIGHTS t4 global"]["facts"]["candidate vectors"]["collapsed"] == ["the pool of NIGHTS t4"]


# ---------------------------------------------------------------- prompts, samples


def asked(model: Oracle) -> dict[str, str]:
    return {token_of(c): c.text for c in model.seen if token_of(c)[0] == "q"}


def test_the_prompt_of_a_query_depends_on_seed_and_id_only(tree, tmp_path):
    def run(name: str, **options) -> dict[str, str]:
        model = Oracle()
        evaluate_mbeir(model, tree, tmp_path / name, pools=("local",), **options)
        return asked(model)

    first = run("a")
    assert len({text.split()[0] for text in first.values()}) == len(WAYS)
    for path in tree.glob("query/test/*.jsonl"):
        path.write_text("\n".join(reversed(path.read_text().splitlines())))
    one = run("b", tasks=["OVEN t8", "CIRR t7"], queries=3, batch_size=1)
    assert len(one) == 6 and one.items() <= first.items()
    assert run("c", seed=7) != first
    assert {text.split()[0] for text in run("d", prompts="first").values()} == {"Plainly"}


def test_the_choice_of_prompts_is_told(whole, shared_tree, tmp_path):
    facts = whole[0]["tasks"]["NIGHTS t4 local"]["facts"]
    counts = [0] * 4
    for i in range(QUERIES):
        counts[choose(4, f"4:{401 + i}", 2023)] += 1
    assert facts["times each prompt was taken"] == counts and sum(counts) == QUERIES
    assert (facts["prompts"], facts["seed"]) == ("random", 2023)
    result = evaluate_mbeir(Oracle(), shared_tree, tmp_path, prompts="first", **LOCAL)
    assert result["tasks"]["NIGHTS t4 local"]["facts"]["times each prompt was taken"] == [QUERIES, 0, 0, 0]
    assert result["settings"]["prompts"] == "first"
    taken = np.bincount([choose(4, f"5:{n}", 2023) for n in range(4000)])
    assert taken.min() > 900


def test_queries_are_sampled_by_seed_and_id(shared_tree, tmp_path):
    chosen = {}
    for seed in (1, 2, 3, 4):
        out = tmp_path / str(seed)
        result = evaluate_mbeir(Oracle(), shared_tree, out, queries=2, seed=seed, **LOCAL)
        task = result["tasks"]["NIGHTS t4 local"]
        chosen[seed] = tuple(run_file(out, "NIGHTS t4 local"))
        assert task["queries"] == 2 and task["facts"]["queries in the file"] == QUERIES
        assert f"only 2 of 4 queries were asked, drawn with seed {seed}" in task["warnings"]
    assert len(set(chosen.values())) > 1
    assert result["settings"]["queries"] == 2 and result["overall"] is None


# ---------------------------------------------------------------- positives that a pool lacks


def lose(tree: Path, lost: str, query: int = 2) -> str:
    """Makes a candidate that no pool has the only positive of a NIGHTS query; returns "file:line"."""
    path = tree / "qrels" / "test" / f"{NIGHTS}_test_qrels.txt"
    path.write_text(path.read_text().replace(f"4:40{query + 1} 0 4:40{query + 1} 1", f"4:40{query + 1} 0 {lost} 1"))
    return edit(
        tree / "query" / "test" / f"{NIGHTS}_test.jsonl", query + 1, lambda row: row | {"pos_cand_list": [lost]}
    )


def test_a_positive_that_no_pool_holds_is_counted_told_or_refused(tree, tmp_path):
    where = lose(tree, "4:777")
    result = evaluate_mbeir(Oracle(), tree, tmp_path / "a", tasks=["NIGHTS t4"])
    for pool in ("local", "global"):
        task = result["tasks"][f"NIGHTS t4 {pool}"]
        assert task["score"] == 0.75 == task["scores"]["recall@5"]
        assert task["facts"]["positives that the pool lacks"] == 1
        assert task["facts"]["of those, of other data sets"] == 0
        assert task["facts"]["queries without a positive in the pool"] == 1
        assert f"1 queries have no positive in the {pool} pool: nothing can be right for them" in task["warnings"]
    for pool in ("local", "global"):
        with pytest.raises(
            DataError, match=f"^{re.escape(where)}: the positive '4:777' of the query '4:403' is not in the {pool}"
        ):
            evaluate_mbeir(Oracle(), tree, tmp_path / "b", tasks=["NIGHTS t4"], pools=(pool,), strict=True)


def test_positives_of_other_data_sets_pass_strict_where_the_global_pool_holds_them(tree, tmp_path):
    tasks = ["OVEN t6", "InfoSeek t8"]
    assert evaluate_mbeir(Oracle(), tree, tmp_path / "a", tasks=tasks, strict=True)["groups"]["overall global"] is None
    lose(tree, "5:7777")
    evaluate_mbeir(Oracle(), tree, tmp_path / "b", strict=True, **LOCAL)  # of OVEN: not missed in a pool of NIGHTS
    with pytest.raises(DataError, match="'5:7777' of the query '4:403' is not in the global pool"):
        evaluate_mbeir(Oracle(), tree, tmp_path / "b", strict=True, tasks=["NIGHTS t4"], pools=("global",))


def test_a_cross_data_set_positive_counts_in_the_global_pool(shared_tree, tmp_path):
    class Other(Oracle):
        def right(self, token: str) -> list[str]:
            return super().right(token)[-1:]  # OVEN's query 3 finds the candidate of InfoSeek only

    result = evaluate_mbeir(Other(), shared_tree, tmp_path, tasks=["OVEN t6"])
    hits = {name: task["scores"]["hit@1"] for name, task in result["tasks"].items()}
    assert hits == {"OVEN t6 local": 0.75, "OVEN t6 global": 1.0}


def test_judgements_count_where_the_queries_say_something_else(tree, tmp_path):
    evaluate_mbeir(Oracle(), tree, tmp_path, **LOCAL)  # what is done counts only for what the files said then
    edit(tree / "query" / "test" / f"{NIGHTS}_test.jsonl", 3, lambda row: row | {"pos_cand_list": ["4:401"]})
    task = evaluate_mbeir(Oracle(), tree, tmp_path, **LOCAL)["tasks"]["NIGHTS t4 local"]
    assert task["score"] == 1.0
    assert "1 queries have another pos_cand_list than the judgements, which count" in task["warnings"]


# ---------------------------------------------------------------- going on, and noticing changes


class Stopped(Oracle):
    """Is killed after so many calls."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.left = calls

    def encode(self, contents: list[Content], *, batch_size: int) -> np.ndarray:
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        return super().encode(contents, batch_size=batch_size)


def test_a_stopped_run_goes_on_without_encoding_anything_twice(whole, shared_tree, tmp_path):
    seen = []
    for calls in (5, 4, 1, 100):
        model = Stopped(calls)
        if calls < 100:
            with pytest.raises(KeyboardInterrupt):
                evaluate_mbeir(model, shared_tree, tmp_path)
        else:
            result = evaluate_mbeir(model, shared_tree, tmp_path)
        seen += map(token_of, model.seen)
    assert len(seen) == len(set(seen)) == len(TASKS) * (CANDIDATES + QUERIES)
    assert plain(result, data=True) == plain(whole[0], data=True)
    shutil.rmtree(tmp_path / "cache")
    again = evaluate_mbeir(Stopped(0), shared_tree, tmp_path)  # a task that is done needs no vectors
    assert json.loads(json.dumps(again["tasks"])) == json.loads(json.dumps(result["tasks"]))
    assert evaluate_mbeir(Stopped(0), shared_tree, tmp_path, batch_size=3)["overall"] == 1.0


@pytest.mark.parametrize("hashed", [lines.HASHED, CANDIDATES - 1], ids=["bytes", "times"])
def test_a_changed_candidate_is_embedded_again(tree, tmp_path, monkeypatch, hashed):
    monkeypatch.setattr(lines, "HASHED", hashed)

    def encoded(**options) -> set[str]:
        model = Oracle()
        evaluate_mbeir(model, tree, tmp_path / "out", tasks=["NIGHTS t4", "WebQA t2"], pools=("local",), **options)
        return {token_of(content)[:-1].rstrip("0123456789") for content in model.seen}

    assert encoded() == {"c4x4x", "q4x4x", "c2x2x", "q2x2x"}
    assert encoded() == set()
    edit(tree / "cand_pool" / "local" / "mbeir_webqa_task2_cand_pool.jsonl", 4, lambda r: r | {"txt": "c2x2x3 is new"})
    assert encoded() == {"c2x2x"}
    path = tree / "mbeir_images" / "nights_images" / "c4x4x3.png"
    before = path.stat()
    path.write_bytes((tree / "mbeir_images" / "nights_images" / "c4x4x5.png").read_bytes())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert encoded() == {"c4x4x"}
    (tree / "mbeir_images" / "nights_images" / "q4x4x3.png").write_bytes(path.read_bytes())
    assert encoded() == {"q4x4x"}
    assert encoded(seed=5) <= {"q4x4x", "q2x2x"}


def test_a_pool_that_changes_while_it_is_used_is_refused(tree):
    pool = open_pool(tree, ALL[9])
    assert pool[3].id == pool.id(3) == "4:404" and pool[3].where.endswith("cand_pool.jsonl:4")
    assert pool.find(["4:414", "4:4", "5:401", "4:401"]).tolist() == [13, -1, -1, 0]
    with pytest.raises(IndexError):
        pool[CANDIDATES]
    with pool.path.open("a") as file:
        file.write("\n")
    with pytest.raises(DataError, match="the file changed since it was opened"):
        pool[3]
    pool.path.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        pool[3]


# ---------------------------------------------------------------- bad input


def test_all_missing_files_are_named_at_once(tree, tmp_path):
    gone = [
        tree / "cand_pool" / "local" / "mbeir_mscoco_task3_test_cand_pool.jsonl",
        tree / "query" / "test" / "mbeir_cirr_task7_test.jsonl",
        tree / "qrels" / "test" / "mbeir_oven_task8_test_qrels.txt",
    ]
    for path in gone:
        path.unlink()
    with pytest.raises(DataError, match="these files of M-BEIR are missing") as error:
        evaluate_mbeir(Oracle(), tree, tmp_path / "a")
    assert all(str(path) in str(error.value) for path in gone) and "or allow missing ones" in str(error.value)
    result = evaluate_mbeir(Oracle(), tree, tmp_path / "a", allow_missing=True)
    lost = ["MSCOCO t3 local", "CIRR t7 local", "OVEN t8 local"]
    assert set(result["missing"]) == {*lost, *(f"{name} global" for name in ALL_NAMES)}
    assert len(result["tasks"]) == 13 and result["overall"] is None and result["groups"]["overall local"] is None
    assert result["groups"]["single to fused local"] == 1.0 and result["groups"]["single to fused global"] is None
    assert "nothing was searched in the global pool: 1 of its 16 parts are missing" in result["warnings"]
    assert all(f"the file {path} is missing" in result["warnings"] for path in gone)
    with pytest.raises(DataError, match=re.escape(str(gone[1]))):  # nothing is left to do
        evaluate_mbeir(Oracle(), tree, tmp_path / "b", tasks=["CIRR t7"], allow_missing=True)
    mbeir_data.instructions_file(tree).unlink()
    for allowed in (True, False):  # without instructions nothing can be asked
        with pytest.raises(DataError, match="query_instructions.tsv") as error:
            evaluate_mbeir(Oracle(), tree, tmp_path / "b", allow_missing=allowed)
        assert "or allow missing ones" not in str(error.value)
    with pytest.raises(DataError, match="no such folder"):
        evaluate_mbeir(Oracle(), tree / "nowhere", tmp_path / "b")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tasks": ["MSCOCO t1"]}, "M-BEIR has no task 'MSCOCO t1'; did you mean 'MSCOCO t"),
        ({"tasks": []}, "no task of M-BEIR is named"),
        ({"pools": ()}, "pools must be 'local', 'global' or both"),
        ({"pools": ("union",)}, r"not \['union'\]"),
        ({"prompts": "best"}, "prompts must be 'random' or 'first', not 'best'"),
        ({"queries": 0}, "queries is 0"),
    ],
)
def test_bad_arguments_are_refused(shared_tree, tmp_path, options, said):
    with pytest.raises(MucoError, match=said):
        evaluate_mbeir(Oracle(), shared_tree, tmp_path, **options)


def without(key: str) -> Callable[[dict], dict]:
    return lambda row: {k: v for k, v in row.items() if k != key}


POOL, QUERY = f"cand_pool/local/{NIGHTS}_cand_pool.jsonl", f"query/test/{NIGHTS}_test.jsonl"
TEXTS = "cand_pool/local/mbeir_webqa_task1_cand_pool.jsonl"
BAD_LINES = [
    (POOL, lambda row: '{"did": "4:1"', "malformed JSON"),
    (POOL, lambda row: "[1]", "must be a JSON object, not a list"),
    (POOL, lambda row: row | {"modality": "video"}, "unknown modality 'video'; known are 'text', 'image'"),
    (POOL, lambda row: row | {"modality": ["image"]}, "unknown modality"),
    (POOL, lambda row: row | {"modality": "text"}, "modality is 'text', in a file where it must be 'image'"),
    (POOL, lambda row: row | {"did": "4:401"}, "the id '4:401' is also that of line 1; ids must be unique"),
    (POOL, lambda row: row | {"did": "4:01"}, "'did' must be two numbers"),
    (POOL, lambda row: row | {"did": "4:10000000"}, "the second below 10"),
    (POOL, lambda row: row | {"did": None}, "'did' must be an id, not None"),
    (POOL, lambda row: row | {"did": 4}, "'did' must be a string or null, not 4"),
    (POOL, lambda row: row | {"img_path": None}, "'img_path' is missing, but 'modality' is 'image'"),
    (POOL, lambda row: row | {"txt": "a caption"}, "'txt' is there, but 'modality' is 'image'"),
    (POOL, lambda row: row | {"img_path": "../other/1.png"}, "use the path of an image within"),
    (POOL, lambda row: row | {"img_path": "mbeir_images/../../1.png"}, "use the path of an image within"),
    (POOL, lambda row: row | {"img_path": "/etc/passwd"}, "use the path of an image within"),
    (POOL, lambda row: row | {"img_path": ""}, "use the path of an image within"),
    (POOL, lambda row: row | {"img_path": "mbeir_images/none.png"}, "none.png cannot be read"),
    (TEXTS, lambda row: row | {"txt": None}, "'txt' is missing, but 'modality' is 'text'"),
    (TEXTS, lambda row: row | {"txt": "half a \ud83d smile"}, "'txt' holds half a character"),
    (TEXTS, lambda row: row | {"txt": ["a"]}, "'txt' must be a string or null"),
    (QUERY, lambda row: "not JSON", "malformed JSON"),
    (QUERY, lambda row: row | {"query_modality": "image, text"}, "unknown query_modality 'image, text'"),
    (QUERY, lambda row: row | {"query_modality": "text"}, "query_modality is 'text'"),
    (QUERY, lambda row: row | {"qid": "4:401"}, "the query '4:401' is also at"),
    (QUERY, without("qid"), "'qid' must be an id"),
    (QUERY, lambda row: row | {"pos_cand_list": []}, "'pos_cand_list' must be a list of at least one candidate"),
    (QUERY, without("pos_cand_list"), "'pos_cand_list' must be a list of at least one candidate"),
    (QUERY, lambda row: row | {"pos_cand_list": [{"id": "4:1"}]}, "'did' must be an id, not None"),
    (QUERY, lambda row: row | {"task_id": 3}, "'task_id' is 3, in a file of task 4"),
    (QUERY, lambda row: row | {"query_img_path": "../q.png"}, "use the path of an image within"),
    (QUERY, lambda row: row | {"query_img_path": "mbeir_images/none.png"}, "none.png: no such image file"),
    (QUERY, lambda row: row | {"qid": "4:499"}, "nothing is judged relevant for the query '4:499'"),
]


@pytest.mark.parametrize(("file", "change", "said"), BAD_LINES, ids=[said[:40] for _, _, said in BAD_LINES])
def test_a_bad_line_is_named(tree, tmp_path, file, change, said):
    where = edit(tree / file, 3, change)
    model = Stopped(0)  # all is read before anything is encoded
    with pytest.raises(DataError, match=re.escape(said)) as error:
        evaluate_mbeir(model, tree, tmp_path / "out", pools=("local",), tasks=["NIGHTS t4", "WebQA t1"])
    assert str(error.value).startswith(f"{where}:")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("4:403 0 4:403 1", "4 columns; a line has query, 0, candidate, grade and task"),
        ("4:403 0 4:403 yes 4", "the grade must be a whole number, not 'yes'"),
        ("4:403 0 d403 1 4", "an id must be two numbers such as"),
        ("4:403 0 4:403 1 7", "task '7', in a file of task 4"),
        ("4:401 0 4:401 0 4", "'4:401' has another grade for '4:401' before; keep one of them"),
        ("4:403 0 4:403 1 \udcff", "not UTF-8"),
    ],
)
def test_a_bad_judgement_is_named(tree, tmp_path, line, said):
    path = tree / "qrels" / "test" / f"{NIGHTS}_test_qrels.txt"
    rows = path.read_text().splitlines()
    rows[4] = line
    path.write_bytes("\n".join(rows).encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}:5: {re.escape(said)}"):
        evaluate_mbeir(Oracle(), tree, tmp_path / "out", **LOCAL)


def test_a_judgement_twice_counts_once(tree, tmp_path):
    path = tree / "qrels" / "test" / f"{NIGHTS}_test_qrels.txt"
    path.write_text(path.read_text() * 2)
    task = evaluate_mbeir(Oracle(), tree, tmp_path / "out", **LOCAL)["tasks"]["NIGHTS t4 local"]
    assert task["scores"]["recall@5"] == 1.0 and task["facts"]["positives"] == 6


@pytest.mark.parametrize(
    ("number", "line", "said"),
    [
        (1, "image\timage\tNIGHTS\t4\tFind it", "the first line must be a header"),
        (2, "image\timage\tNIGHTS\t4\t \t", "no prompt; columns are"),
        (2, "image\timage\tNIGHTS", "no prompt; columns are"),
        (2, "image\tsound\tNIGHTS\t4\tFind it", "unknown modality 'sound'"),
        (2, "image\timage\tNIGHTS\tfour\tFind it", "dataset_id must be a number, not 'four'"),
        (3, "text\timage\tVisualNews\t0\tFind it", "a second line for data set 0, text to image; keep one"),
    ],
)
def test_a_bad_instruction_is_named(tree, tmp_path, number, line, said):
    path = mbeir_data.instructions_file(tree)
    rows = path.read_text().splitlines()
    rows[number - 1] = line
    path.write_text("\n".join(rows))
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}:{number}: {re.escape(said)}"):
        evaluate_mbeir(Oracle(), tree, tmp_path / "out", **LOCAL)


def test_a_task_without_instructions_and_files_without_rows_are_named(tree, tmp_path):
    path = mbeir_data.instructions_file(tree)
    text = path.read_text()
    path.write_text("".join(line + "\n" for line in text.splitlines() if "NIGHTS" not in line))
    with pytest.raises(DataError, match=r"no prompt for data set 4 \(NIGHTS\), image to image"):
        evaluate_mbeir(Oracle(), tree, tmp_path / "out", **LOCAL)
    path.write_text(text)
    for file, said in ((QUERY, "the file holds no query"), (POOL, "the file holds no candidate")):
        before = (tree / file).read_bytes()
        (tree / file).write_text("\n")
        with pytest.raises(DataError, match=said):
            evaluate_mbeir(Oracle(), tree, tmp_path / "out", **LOCAL)
        (tree / file).write_bytes(before)


def test_a_candidate_in_two_pools_is_refused_in_the_global_one(tree, tmp_path):
    where = edit(tree / POOL, 2, lambda row: row | {"did": "8:701"})
    path = tree / "cand_pool" / "local" / "mbeir_cirr_task7_cand_pool.jsonl"
    with pytest.raises(DataError, match="the id '8:701' is also at") as error:
        evaluate_mbeir(Oracle(), tree, tmp_path / "out", tasks=["CIRR t7"])
    assert where in str(error.value) and f"{path}:1" in str(error.value)


def test_a_content_that_the_model_refuses_is_named(shared_tree, tmp_path):
    class Picky(Oracle):
        def encode(self, contents: list[Content], *, batch_size: int) -> np.ndarray:
            if any(token_of(content) == "q4x4x2" for content in contents):
                raise ImageError("input 2: too thin")
            return super().encode(contents, batch_size=batch_size)

    with pytest.raises(ImageError, match=rf"{NIGHTS}_test.jsonl:3: input 2: too thin"):
        evaluate_mbeir(Picky(), shared_tree, tmp_path, **LOCAL)


def test_a_long_line_and_a_long_id_are_refused(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(lines_of_files, "LONGEST_LINE", 100)
    with pytest.raises(DataError, match="jsonl:1: the line is longer than 0 MiB"):
        open_pool(tree, ALL[9])
    monkeypatch.undo()
    monkeypatch.setattr(lines, "LONGEST_ID", 4)
    with pytest.raises(DataError, match="jsonl:1: an id of 5 bytes; at most 4 are allowed"):
        open_pool(tree, ALL[9])


# ---------------------------------------------------------------- texts and numbers


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, ""),
        ("", ""),
        ('  "" \r', ""),
        ("a ring", "A ring."),
        ("Is it?", "Is it?"),
        ("stop!\r\n", "Stop!"),
        ('"said" she', 'Said" she.'),
        ("éclair", "Éclair."),
        ('" two"', " two."),
        ("A. b.", "A. b."),
    ],
)
def test_format_string(text, expected):
    assert format_string(text) == expected


@given(st.text())
def test_format_string_ends_a_sentence_and_starts_large(text):
    found = format_string(text)
    assert "\r" not in found and not found.startswith('"')
    assert found == "" or found[-1] in ".?!"
    assert found[:1] == found[:1].upper() or len(found[:1].upper()) > 1
    core = text.replace("\r", "").strip().strip('"')
    assert found[1:].startswith(core[1:]) or core[:1].upper() != found[:1]


def test_a_blank_text_is_a_blank_and_no_error(tree, tmp_path):
    edit(tree / TEXTS, 9, lambda row: row | {"txt": ' "" '})
    assert open_pool(tree, ALL[3])[8].content == Content(" ")


def test_tasks_are_those_of_the_modalities():
    assert all(task.key[1:] == SIDES[task.number] for task in ALL)
    assert [task.name for task in ALL] == ALL_NAMES


@given(st.integers(0, 99), st.integers(0, 9_999_999))
def test_numbers_of_ids(data_set, number):
    assert number_of(f"{data_set}:{number}") == data_set * 10_000_000 + number


@pytest.mark.parametrize("id", ["", "9", "9:", ":9", "9:-1", "09:1", "9:1 ", "9:١", "9:10000000"])
def test_what_is_no_id_has_no_number(id):
    with pytest.raises(ValueError, match="is not an id of M-BEIR"):
        number_of(id)


# ---------------------------------------------------------------- several processes, a real model


def test_two_processes_share_the_work_and_find_the_same(shared_tree, tmp_path):
    finished(launch(mbeir_tree.__file__, shared_tree, tmp_path / "two"))
    model = Oracle()
    result = evaluate_mbeir(model, shared_tree, tmp_path / "one", tasks=["OVEN t6", "CIRR t7"])
    told = [json.loads((tmp_path / "two" / f"process-{rank}.json").read_text()) for rank in (0, 1)]
    assert told[0]["tasks"] == told[1]["tasks"] == json.loads(json.dumps(result["tasks"]))
    for name in result["tasks"]:
        assert run_file(tmp_path / "two", name) == run_file(tmp_path / "one", name)
    seen = [token for process in told for token in process["seen"]]
    assert sorted(seen) == sorted(map(token_of, model.seen)), "nothing is encoded by both"


def test_what_cannot_be_embedded_is_left_out_of_both_pools(tree, tmp_path):
    class Picky(Oracle):
        def encode(self, contents: list[Content], *, batch_size: int) -> np.ndarray:
            if any(token_of(content) == "c8x7x2" for content in contents):
                raise DataError("input 0: not this")
            return super().encode(contents, batch_size=batch_size)

    edit(tree / "query/test/mbeir_cirr_task7_test.jsonl", 1, lambda row: row | {"query_txt": "half \ud83d"})
    (tree / "mbeir_images/cirr_images/c8x7x1.png").unlink()
    wanted = {"tasks": ["CIRR t7"]}
    with pytest.raises(DataError, match=r"cand_pool.jsonl:2: .*c8x7x1\.png cannot be read .*--skip-broken"):
        evaluate_mbeir(Picky(), tree, tmp_path / "out", **wanted)
    result = evaluate_mbeir(Picky(), tree, tmp_path / "out", skip_broken=True, **wanted)
    for pool in ("local", "global"):
        task = result["tasks"][f"CIRR t7 {pool}"]
        assert task["left_out"] == {"queries": 1, "candidates": 2, "missed": 3}
        assert (task["score"], task["queries"]) == (0.25, QUERIES), "of 4 queries one still finds what is right"
        told = (tmp_path / "out" / "left_out" / f"CIRR+t7+{pool}.jsonl").read_text()
        assert all(name in told for name in ("c8x7x1.png", "cand_pool.jsonl:3: input 0: not this", "_test.jsonl:1"))
    again = evaluate_mbeir(Oracle(), tree, tmp_path / "out", skip_broken=True, **wanted)
    assert again["tasks"]["CIRR t7 local"]["left_out"] == task["left_out"], "found done"


def test_a_real_model_from_files_to_page(tiny_model, shared_tree, tmp_path):
    tasks = ["WebQA t1", "NIGHTS t4", "InfoSeek t8"]
    results = [
        evaluate_mbeir(tiny_model, shared_tree, tmp_path / str(size), tasks=tasks, pools=("local",), batch_size=size)
        for size in (2, 16)
    ]
    assert set(results[0]["tasks"]) == {f"{name} local" for name in tasks}
    for name in results[0]["tasks"]:
        assert results[0]["tasks"][name]["scores"] == results[1]["tasks"][name]["scores"]
        assert all(len(found) == 10 for found in run_file(tmp_path / "2", name).values())
    assert "InfoSeek t8 local" in (tmp_path / "2" / "mbeir.html").read_text(encoding="utf-8")
