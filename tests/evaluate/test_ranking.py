"""Graded metrics against an independent implementation, and the files of judgements and runs."""

from __future__ import annotations

import math

import pytest
import pytrec_eval
from hypothesis import given
from hypothesis import strategies as st

from muco.data.judged import read_qrels
from muco.errors import DataError
from muco.evaluate.benchmark import write_trec_run
from muco.evaluate.metrics import hit_at, ndcg_at, recall_at, reciprocal_rank

GRADES = {"a": 2, "b": 1, "c": 0, "d": 3, "e": -1}


def test_metrics_by_hand():
    found = ["c", "b", "x", "d"]
    assert [hit_at(found, GRADES, k) for k in (1, 2, 4)] == [0.0, 1.0, 1.0]
    assert [recall_at(found, GRADES, k) for k in (1, 2, 4)] == [0.0, 1 / 3, 2 / 3]
    assert reciprocal_rank(found, GRADES, 4) == 1 / 2 and reciprocal_rank(found, GRADES, 1) == 0.0
    ideal = 3 + 2 / math.log2(3) + 1 / 2
    assert ndcg_at(found, GRADES, 4) == pytest.approx((1 / math.log2(3) + 3 / math.log2(5)) / ideal)
    ideal = 7 + 3 / math.log2(3)
    for metric in (hit_at, recall_at, ndcg_at, reciprocal_rank):
        assert metric([], GRADES, 5) == 0.0 and metric(found, {}, 5) == 0.0 and metric(found, {"c": 0}, 5) == 0.0
        assert metric(["d", "a", "b"], GRADES, 3) == 1.0


@st.composite
def judged_runs(draw):
    candidates = [f"d{n}" for n in range(8)]
    queries = [f"q{n}" for n in range(draw(st.integers(1, 4)))]
    grades = st.dictionaries(st.sampled_from(candidates), st.integers(0, 3), min_size=1)
    qrels = {query: draw(grades) for query in queries}
    scores = st.dictionaries(st.sampled_from(candidates), st.sampled_from([0.0, 0.5, 1.0]), min_size=1)  # many ties
    return qrels, {query: draw(scores) for query in queries}


@given(judged_runs(), st.integers(1, 9))
def test_metrics_agree_with_an_independent_implementation(problem, k):
    """trec_eval's own code, with ties, lists shorter and longer than k, grades of 0, and queries without any relevant.

    It puts the larger id first among equal scores.
    """
    qrels, scored = problem
    run = {
        query: sorted(sorted(scores, reverse=True), key=lambda c: -scores[c])  # noqa: B023
        for query, scores in scored.items()
    }
    names = {"success": hit_at, "recall": recall_at, "ndcg_cut": ndcg_at}
    others = pytrec_eval.RelevanceEvaluator(qrels, {f"{name}.{k}" for name in names} | {"recip_rank"}).evaluate(scored)
    for query, found in run.items():
        for name, metric in names.items():
            assert metric(found, qrels[query], k) == pytest.approx(others[query][f"{name}_{k}"], abs=1e-6), name
        assert reciprocal_rank(found, qrels[query], 8) == pytest.approx(others[query]["recip_rank"], abs=1e-6)


def test_judgements_are_read_in_both_forms(tmp_path):
    (tmp_path / "trec.txt").write_text("q1 0 d1 1 3\nq1 0 d2 0 3\n\nq2 0 d1 2 3\n")
    (tmp_path / "beir.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t1\nq1\td2\t0\nq2\td1\t2\n")
    expected = {"q1": {"d1": 1, "d2": 0}, "q2": {"d1": 2}}
    assert read_qrels(tmp_path / "trec.txt") == read_qrels(tmp_path / "beir.tsv") == expected


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("q1 0 d1 1\nq1 d1 1\n", "qrels.txt:2: 3 columns"),
        ("q1 0 d1 one\n", "qrels.txt:1: the grade must be a whole number, not 'one'"),
        ("q1 0 d1 1\nq1 0 d1 0\n", "qrels.txt:2: 'd1' is judged twice for 'q1'"),
        ("query-id\tcorpus-id\tscore\nq1\td1\n", "qrels.txt:2: 2 columns.*tabs"),
    ],
)
def test_bad_judgements_name_file_and_line(tmp_path, text, sentence):
    (tmp_path / "qrels.txt").write_text(text)
    with pytest.raises(DataError, match=sentence):
        read_qrels(tmp_path / "qrels.txt")


def test_missing_judgements_are_a_sentence(tmp_path):
    with pytest.raises(DataError, match="none.txt: cannot be read"):
        read_qrels(tmp_path / "none.txt")


def test_a_run_is_written_for_other_tools(tmp_path):
    write_trec_run(tmp_path / "runs/x.txt", {"q1": [("d2", 0.5), ("d1", 0.25)], "q2": []}, "muco")
    assert (tmp_path / "runs/x.txt").read_text() == "q1 Q0 d2 1 0.5 muco\nq1 Q0 d1 2 0.25 muco\n"
    with pytest.raises(ValueError, match="white space"):
        write_trec_run(tmp_path / "y.txt", {"q 1": [("d", 1.0)]}, "muco")
