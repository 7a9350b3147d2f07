"""Comparison of two results: the interval covers, equals a slow bootstrap, mirrors, and never pairs what differs."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from muco.errors import DataError, MucoError
from muco.evaluate import compare as module
from muco.evaluate.benchmark import LONGEST_NAME, Outcome, TaskFiles, TaskResult, file_name
from muco.evaluate.compare import bootstrap, compare, interval, print_comparison


def folder(path: Path, tasks: Mapping[str, Mapping[str, float]], *, metric="hit@1", data="d" * 64, **key) -> Path:
    """An output folder with these values: task -> query -> value."""
    files = TaskFiles(path, {"model": path.name, "seed": 0} | key)
    for name, values in tasks.items():
        outcomes = tuple(Outcome(query, value, 1, (("c", 0.5),)) for query, value in values.items())
        scores = {metric: sum(values.values()) / max(1, len(values))}
        files.add(TaskResult(name, metric, scores, len(values), (2, 2), 0.5, data, outcomes=outcomes))
    return path


def hits(generator: np.random.Generator, n: int, share: float) -> dict[str, float]:
    return {f"q{i}": float(hit) for i, hit in enumerate(generator.random(n) < share)}


@pytest.fixture
def pair(tmp_path):
    generator = np.random.default_rng(3)
    names = {"GQA": 80, "Visual 7W": 50}
    return tuple(
        folder(tmp_path / side, {name: hits(generator, n, share) for name, n in names.items()})
        for side, share in (("a", 0.4), ("b", 0.6))
    )


# ── the numbers ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_means_differences_and_shares_are_those_of_pairs(tmp_path):
    a = folder(tmp_path / "a", {"GQA": {"x": 1.0, "y": 0.0, "z": 0.0, "w": 0.5}})
    b = folder(tmp_path / "b", {"GQA": {"w": 0.5, "z": 1.0, "y": 0.25, "x": 0.0}})
    result = compare(a, b)
    task = result["tasks"]["GQA"]
    assert (task["queries"], task["a"], task["b"], task["difference"]) == (4, 0.375, 0.4375, 0.0625)
    assert (task["won"], task["lost"], task["equal"]) == (0.5, 0.25, 0.25)
    assert not task["excludes_zero"] and task["interval"][0] < 0 < task["interval"][1]
    assert result["settings"] == {"model": ["a", "b"]}
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize("graded", [False, True])
def test_the_interval_agrees_with_a_slow_bootstrap(graded):
    generator = np.random.default_rng(5)
    differences = generator.normal(0.1, 1, 60) if graded else generator.choice([-1.0, 0.0, 1.0], 60, p=[0.2, 0.4, 0.4])
    slow = np.random.default_rng(6)
    means = []
    for _ in range(20_000):
        drawn = [differences[i] for i in slow.integers(len(differences), size=len(differences))]
        means.append(sum(drawn) / len(drawn))
    fast = bootstrap(differences, 20_000, np.random.default_rng(7))
    assert fast.mean() == pytest.approx(differences.mean(), abs=0.005)
    assert fast.std() == pytest.approx(np.std(means), rel=0.03)
    for level in (0.5, 0.9, 0.95):
        tails = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
        assert interval(fast, level) == pytest.approx(tails, abs=0.02)
        assert interval(fast, level)[0] < interval(fast, level)[1]


def test_the_interval_covers_the_true_difference_as_often_as_it_says():
    generator = np.random.default_rng(11)
    trials, covered = 400, 0
    for _ in range(trials):
        hard = generator.random(200)  # what both models share
        a, b = (hard + generator.normal(0, 0.2, 200) < 0.5), (hard + generator.normal(0, 0.2, 200) < 0.6)
        low, high = interval(bootstrap(b.astype(float) - a, 1000, generator), 0.9)
        covered += low <= TRUE_DIFFERENCE <= high
    assert 0.86 < covered / trials < 0.94


def _true_difference() -> float:
    generator = np.random.default_rng(0)
    hard, noise = generator.random(2_000_000), generator.normal(0, 0.2, 2_000_000)
    return float(((hard + noise) < 0.6).mean() - ((hard + noise) < 0.5).mean())


TRUE_DIFFERENCE = _true_difference()


def test_identical_folders_give_exactly_zero(pair):
    result = compare(pair[0], pair[0])
    for task in [*result["tasks"].values(), result["means"]["overall"]]:
        assert (task["difference"], task["interval"], task["excludes_zero"]) == (0.0, [0.0, 0.0], False)
    assert all(task["equal"] == 1.0 for task in result["tasks"].values())
    assert result["settings"] == {}


def test_swapped_folders_give_the_mirrored_interval(pair):
    one, other = compare(*pair), compare(*reversed(pair))
    for first, second in [(one["tasks"][n], other["tasks"][n]) for n in one["tasks"]] + [
        (one["means"]["overall"], other["means"]["overall"])
    ]:
        assert first["interval"] == [-second["interval"][1], -second["interval"][0]]
        assert first["difference"] == -second["difference"] != 0
        assert first.get("won") == second.get("lost")


def test_symmetric_differences_mirror_too():
    differences = np.array([1.0, -1.0, 0.0, 0.5, -0.5])
    first = bootstrap(differences, 1000, np.random.default_rng(0))
    second = bootstrap(-differences, 1000, np.random.default_rng(0))
    assert (first == -second).all() and interval(first, 0.9) == tuple(-x for x in reversed(interval(second, 0.9)))


def test_neither_the_order_of_lines_nor_blocks_nor_other_tasks_change_anything(pair, tmp_path, monkeypatch):
    before = compare(*pair)
    for side in pair:
        for file in (side / "outcomes").iterdir():
            file.write_text("".join(f"{line}\n" for line in reversed(file.read_text().splitlines())))
    assert compare(*pair) == before
    monkeypatch.setattr(module, "BLOCK", 3000)
    assert compare(*pair)["tasks"]["GQA"]["interval"] == pytest.approx(before["tasks"]["GQA"]["interval"], abs=0.02)
    monkeypatch.undo()
    (pair[1] / "tasks" / "Visual+7W.json").unlink()
    alone = compare(*pair)
    assert alone["tasks"]["GQA"] == before["tasks"]["GQA"] and alone["means"]["overall"]["tasks"] == 1
    assert alone["means"]["overall"]["interval"] == alone["tasks"]["GQA"]["interval"]


ALIKE = ["how many?", "how many!", "how_many_", "how+many?", "how%20many", "a b", "a_b", "a/b", "a%2Fb", "é?", "\ud83d"]
LONG = ["x" * 300, "x" * 301, "字" * 100, "字" * 99 + "子", "?" * 200]


def test_tasks_that_differ_only_in_signs_have_files_of_their_own(tmp_path):
    sides = [
        folder(tmp_path / side, {name: {"q": value + n / 100} for n, name in enumerate(ALIKE + LONG)})
        for side, value in (("a", 0.0), ("b", 0.5))
    ]
    tasks = compare(*sides, samples=100)["tasks"]
    assert {name: task["a"] for name, task in tasks.items()} == {name: n / 100 for n, name in enumerate(ALIKE + LONG)}
    assert file_name("MSCOCO t0 local") == "MSCOCO+t0+local" and file_name("VisualNews_t2i") == "VisualNews_t2i"


@given(st.lists(st.text(max_size=40) | st.sampled_from(ALIKE + LONG), unique=True))
def test_no_two_tasks_share_a_file(names):
    files = [file_name(name) for name in names]
    assert len({*files}) == len(files)
    assert all(len(file.encode()) <= LONGEST_NAME and not {*'/\\:*?"<>| '} & {*file} for file in files)


@pytest.mark.parametrize("former", ["Visual_7W", "0"])
def test_of_two_files_of_one_task_the_one_with_its_name_counts(pair, former):
    """As an output folder has that began with another version, which named them otherwise."""
    known, file = compare(*pair)["tasks"], pair[0] / "tasks" / "Visual+7W.json"
    older = json.loads(file.read_text())
    older["result"]["data"] = "other"
    (file.parent / f"{former}.json").write_text(json.dumps(older))
    assert compare(*pair)["tasks"] == known


def test_the_seed_and_level_count(pair):
    intervals = [compare(*pair, seed=seed, level=level)["tasks"]["GQA"]["interval"] for seed, level in PAIRS]
    assert intervals[0] == pytest.approx(intervals[1], abs=0.03)
    overall = [compare(*pair, seed=seed)["means"]["overall"]["interval"] for seed in (0, 1)]
    assert overall[0] != overall[1]
    assert intervals[2][0] < intervals[0][0] < intervals[0][1] < intervals[2][1]


PAIRS = ((0, 0.9), (1, 0.9), (0, 0.99))


def test_overall_resamples_queries_within_each_task(pair):
    result = compare(*pair)
    overall, tasks = result["means"]["overall"], result["tasks"].values()
    assert overall["difference"] == pytest.approx(sum(t["difference"] for t in tasks) / 2)
    # tasks are independent: the variance of the mean is a quarter of the sum of the variances
    width = [(high - low) / 2 for low, high in (t["interval"] for t in tasks)]
    low, high = overall["interval"]
    assert (high - low) / 2 == pytest.approx(0.5 * (width[0] ** 2 + width[1] ** 2) ** 0.5, rel=0.1)


def test_pools_have_means_of_their_own_since_they_share_queries(tmp_path):
    generator = np.random.default_rng(1)
    names = ["OVEN t6 local", "OVEN t6 global", "CIRR t7 global"]
    a, b = (folder(tmp_path / side, {name: hits(generator, 40, 0.5) for name in names}) for side in "ab")
    result = compare(a, b)
    assert {label: mean["tasks"] for label, mean in result["means"].items()} == {
        "overall global": 2,
        "overall local": 1,
    }
    assert result["means"]["overall local"]["interval"] == result["tasks"]["OVEN t6 local"]["interval"]
    stream = io.StringIO()
    print_comparison(result, Console(file=stream, width=160))
    assert "overall global, 2 tasks" in stream.getvalue() and "overall local, 1 task " in stream.getvalue()


# ── what cannot be compared ──────────────────────────────────────────────────────────────────────────────────────────


def test_tasks_that_do_not_match_are_listed_with_the_reason(tmp_path):
    values = {"q1": 1.0, "q2": 0.0}
    a = folder(tmp_path / "a", {"same": values, "only a": values, "apart": {"x": 1.0}, "lost": values})
    b = folder(tmp_path / "b", {"same": values, "apart": {"y": 1.0}, "lost": values})
    for side, metric, data in ((a, "hit@1", "1" * 64), (b, "ndcg@10", "2" * 64)):
        folder(side, {"metric": values}, metric=metric)
        folder(side, {"data": values}, data=data)
    (b / "outcomes" / "lost.jsonl").unlink()
    result = compare(a, b)
    assert list(result["tasks"]) == ["same"]
    assert result["not_comparable"] == {
        "apart": "the two have no query in common",
        "data": "the data differ: 111111111111 in A, 222222222222 in B",
        "lost": f"B has no outcomes per query ({b / 'outcomes' / 'lost.jsonl'})",
        "metric": "the metrics differ: hit@1 in A, ndcg@10 in B",
        "only a": "only A has it",
    }


def test_queries_of_one_side_only_are_left_out_and_said(tmp_path):
    a = folder(tmp_path / "a", {"GQA": {"x": 1.0, "y": 0.0, "gone": 1.0}})
    b = folder(tmp_path / "b", {"GQA": {"x": 1.0, "y": 1.0}})
    result = compare(a, b)
    assert result["warnings"] == ["GQA: 1 queries are in one of the two only and are not compared"]
    assert (result["tasks"]["GQA"]["queries"], result["tasks"]["GQA"]["a"]) == (2, 0.5)


def test_a_partial_result_is_not_compared_with_a_whole_one_without_a_word(tmp_path):
    a, b = (folder(tmp_path / side, {"GQA": {"x": 1.0, "y": 0.0}}) for side in "ab")
    assert compare(a, b)["warnings"] == []
    part = TaskResult(
        "GQA",
        "hit@1",
        {"hit@1": 0.5},
        2,
        (2, 2),
        0.5,
        "d" * 64,
        outcomes=(Outcome("x", 1.0, 1, ()), Outcome("y", 0.0, None, ())),
        left_out={"queries": 1, "candidates": 3, "missed": 1},
    )
    TaskFiles(b, {"model": "b", "seed": 0}, partial=True).add(part)
    (line,) = compare(a, b)["warnings"]
    assert line.startswith("GQA: A left out 0 queries and 0 candidates, B left out 1 queries and 3 candidates")


def test_folders_without_results_or_a_common_task_are_errors(tmp_path, pair):
    for empty in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(DataError, match=r"holds no results \(tasks/\*\.json\); pass the output folder"):
            compare(pair[0], empty)
    mixed = folder(tmp_path / "mixed", {"GQA": {"q": 1.0}})
    task = json.loads((mixed / "tasks/GQA.json").read_text())
    task["key"]["model"], task["result"]["name"] = "another", "OK-VQA"
    (mixed / "tasks/OK-VQA.json").write_text(json.dumps(task))
    with pytest.raises(DataError, match=r"mixed: holds results of two models, mixed \(GQA\) and another \(OK-VQA\)"):
        compare(pair[0], mixed)
    other = folder(tmp_path / "other", {"OVEN local": {"q": 1.0}})
    with pytest.raises(DataError, match=r"no task that can be compared \(GQA: only A has it; OVEN local: only B"):
        compare(pair[0], other)


@pytest.mark.parametrize(
    "line, reason",
    [
        ("{", r"is not an outcome \(JSONDecodeError"),
        ('{"query": "q"}', r"is not an outcome \(KeyError\('value'\)\)"),
        ('{"query": "q", "value": null}', r"is not an outcome \(TypeError"),
        ('{"query": 7, "value": 1}', "the query is 7, not a string"),
        ('{"query": "q", "value": NaN}', "the value is nan, not a number"),
        ('{"query": "q0", "value": 1}', "the query 'q0' occurs twice"),
        (b"\xff", r"is not an outcome \(UnicodeDecodeError"),
    ],
)
def test_a_damaged_line_is_named(pair, line, reason):
    file = pair[1] / "outcomes" / "GQA.jsonl"
    file.write_bytes(file.read_bytes() + (line if isinstance(line, bytes) else line.encode()) + b"\n")
    with pytest.raises(DataError, match=rf"outcomes/GQA\.jsonl:81: {reason}.*run the evaluation again"):
        compare(*pair)


def test_a_damaged_or_older_task_file_is_named(pair):
    file = pair[0] / "tasks" / "GQA.json"
    plain = json.loads(file.read_text())
    file.write_text(json.dumps(plain | {"format": 99}))
    with pytest.raises(DataError, match=r"GQA\.json: has format 99, not 1; run the evaluation again"):
        compare(*pair)
    for text in ("{", "[]", '{"result": {}}'):
        file.write_text(text)
        with pytest.raises(DataError, match=r"GQA\.json: is not a result of a task .* run the evaluation again"):
            compare(*pair)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"samples": 99}, "samples must be at least 100, not 99"),
        ({"level": 1.0}, r"level must be between 0 and 1, not 1\.0; 0\.95 is usual"),
        ({"seed": -1}, "seed must not be negative, not -1"),
    ],
)
def test_options_out_of_range(pair, options, message):
    with pytest.raises(MucoError, match=message):
        compare(*pair, **options)


# ── showing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_table_shows_data_as_text_and_mark_what_is_sure(tmp_path):
    n = 50
    names = {"[red]a|b": 1.0, "even": 0.0}
    a = folder(tmp_path / "a", {name: {f"q{i}": 0.0 for i in range(n)} for name in names}, prompts="first")
    b = folder(tmp_path / "b", {name: {f"q{i}": v for i in range(n)} for name, v in names.items()}, prompts="random")
    result = compare(a, b)
    assert [task["excludes_zero"] for task in result["tasks"].values()] == [True, False]
    stream = io.StringIO()
    print_comparison(result, Console(file=stream, width=160))
    text = stream.getvalue()
    assert "[red]a|b" in text and "+100.00 to +100.00" in text and "1 of 2 intervals exclude 0" in text
    assert "differs: prompts: 'first' in A, 'random' in B" in text
    assert "10,000 samples, 95% percentile intervals, seed 0" in text
