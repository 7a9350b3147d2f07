from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from muco.evaluate import metrics


def slow_rank(scores: list[float], positive: int, identities: list[int]) -> int:
    if not all(math.isfinite(score) for score in scores):
        return len(scores) + 1
    rivals = [s for s, identity in zip(scores, identities, strict=True) if identity != identities[positive]]
    return 1 + sum(score >= scores[positive] for score in rivals)


@st.composite
def ranking_problems(draw):
    shape = draw(st.tuples(st.integers(1, 6), st.integers(1, 8)))
    values = st.sampled_from([-1.0, 0.0, 0.25, 0.5, 1.0]) | st.sampled_from([math.nan, math.inf, -math.inf])
    scores = draw(hnp.arrays(np.float32, shape, elements=values))
    positives = draw(hnp.arrays(np.int64, shape[0], elements=st.integers(0, shape[1] - 1)))
    return scores, positives, draw(hnp.arrays(np.int64, shape, elements=st.integers(0, 3)))


def unit(rng: np.random.Generator, n: int, d: int = 8) -> np.ndarray:
    rows = rng.normal(size=(n, d)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@given(ranking_problems())
def test_ranks_equal_a_loop(problem):
    scores, positives, identities = problem
    expected = [slow_rank(list(s), p, list(i)) for s, p, i in zip(scores, positives, identities, strict=True)]
    assert metrics.ranks(scores, positives, identities).tolist() == expected
    one_row = [slow_rank(list(s), p, list(identities[0])) for s, p in zip(scores, positives, strict=True)]
    assert metrics.ranks(scores, positives, identities[0]).tolist() == one_row


@given(ranking_problems(), st.randoms(use_true_random=False))
def test_the_order_of_candidates_does_not_matter(problem, random):
    scores, positives, identities = problem
    order = random.sample(range(scores.shape[1]), scores.shape[1])
    moved = np.array([order.index(p) for p in positives])
    expected = metrics.ranks(scores, positives, identities)
    assert metrics.ranks(scores[:, order], moved, identities[:, order]).tolist() == expected.tolist()


def test_ties_lose_and_the_same_candidate_is_no_rival():
    scores = np.array([[0.5, 0.5, 0.5, 0.1]])
    assert metrics.ranks(scores, [0], [0, 1, 2, 3]) == [3]
    assert metrics.ranks(scores, [0], [0, 0, 2, 3]) == [2]
    assert metrics.ranks(scores, [0], [7, 7, 7, 3]) == [1]
    assert metrics.ranks([[0.5, 0.5 - 0.9 * metrics.TIE]], [0], [0, 1]) == [2]


@pytest.mark.parametrize("positives", [[2], [-1], [0, 0]])
def test_a_positive_must_be_a_column(positives):
    with pytest.raises(ValueError, match="positive"):
        metrics.ranks(np.zeros((1, 2)), positives, [0, 1])


@pytest.mark.parametrize("block", [1, 50, 1 << 22])
def test_pool_and_lists_equal_the_whole_matrix_in_any_block(block, monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK", block)
    rng = np.random.default_rng(0)
    queries, pool = unit(rng, 23), unit(rng, 17)
    positives = rng.integers(0, 17, 23)
    relevant = [sorted({int(p), int(rng.integers(17))}) for p in positives]
    expected = [
        1 + sum(pool[c] @ q >= pool[p] @ q for c in range(17) if c not in right)
        for q, p, right in zip(queries, positives, relevant, strict=True)
    ]
    assert len(set(expected)) > 5
    assert metrics.ranks_in_pool(queries, pool, positives, relevant).tolist() == expected
    rivals = [[c for c in range(17) if c not in right] for right in relevant]
    lists = np.array([[p, *r, *[p] * (16 - len(r))] for p, r in zip(positives, rivals, strict=True)])
    assert metrics.ranks_in_lists(queries, pool, lists).tolist() == expected


@pytest.mark.parametrize("n", [2, 5, 257, 1001])
def test_equal_vectors_tie_wherever_they_stand(n):
    vector = unit(np.random.default_rng(n), 1, 96)
    pool = np.repeat(vector, n, axis=0)
    everyone = [[i] for i in range(n)]
    assert set(metrics.ranks_in_pool(pool, pool, np.arange(n), everyone)) == {n}
    lists = np.array([np.roll(np.arange(n), i) for i in range(n)])
    assert set(metrics.ranks_in_lists(pool, pool, lists)) == {n}


def test_hit_mrr_and_chance():
    found = np.array([1, 2, 4, 11])
    assert [metrics.hit_rate(found, k) for k in (1, 2, 10, 11)] == [0.25, 0.5, 0.75, 1.0]
    assert metrics.mrr(found) == pytest.approx((1 + 1 / 2 + 1 / 4 + 1 / 11) / 4)
    assert metrics.chance_hit(5, 100) == 0.05
    assert metrics.chance_hit(5, np.array([2, 10])) == 0.75


def test_chance_is_what_random_vectors_reach():
    rng = np.random.default_rng(3)
    found = metrics.ranks_in_pool(unit(rng, 4000), unit(rng, 20), rng.integers(0, 20, 4000), [[]] * 4000)
    assert metrics.hit_rate(found, 5) == pytest.approx(metrics.chance_hit(5, 20), abs=0.03)


def test_health():
    rng = np.random.default_rng(1)
    vectors = unit(rng, 50)
    health = metrics.embedding_health(vectors)
    assert (health.rows, health.non_finite, health.collapsed) == (50, 0, False)
    assert health.spread == pytest.approx(np.linalg.norm(vectors - vectors[0], axis=1).max(), abs=1e-6)

    noise = vectors[:1] + 1e-6 * rng.normal(size=(50, 8)).astype(np.float32)
    assert metrics.embedding_health(noise).collapsed
    noise[3] = np.nan
    assert metrics.embedding_health(noise) == metrics.Health(50, 1, metrics.embedding_health(noise).spread, True)
    assert metrics.embedding_health(np.full((4, 8), np.nan)) == metrics.Health(4, 4, 0.0, True)
    assert not metrics.embedding_health(vectors[:1]).collapsed
    assert metrics.embedding_health(vectors[:1] * np.inf).collapsed


KEYS = st.integers(0, 2**64 - 1).map(lambda n: f"{n:016x}".ljust(64, "0"))


@given(st.sets(KEYS, min_size=3, max_size=12), KEYS, KEYS, st.integers(1, 6), st.integers(0, 3))
def test_a_draw_depends_on_seed_query_and_candidate_only(pool, extra, query, count, seed):
    right = {min(pool)}
    drawn = set(metrics.drawing(pool, count, seed)(query, right))
    assert len(drawn) == min(count, len(pool) - 1)
    assert not drawn & right and drawn <= pool
    more = set(metrics.drawing(pool | {extra}, count, seed)(query, right))
    assert more <= drawn | {extra}  # a newcomer displaces at most one, and nobody else moves


def test_draws_are_even_and_differ_by_query_and_seed():
    pool = {f"{i:016x}".ljust(64, "0") for i in range(40)}  # close hashes: the mixing has to spread them
    draws = [frozenset(metrics.drawing(pool, 10, seed)(f"{q}", set())) for seed in (0, 1) for q in range(400)]
    assert len(set(draws)) == 800
    counts = [sum(key in drawn for drawn in draws) for key in pool]
    assert min(counts) > 150 and max(counts) < 250  # 200 expected, standard deviation 12


@pytest.mark.parametrize("dimension", [1, 5, 8])
def test_codes_order_candidates_as_an_index_of_them_does(dimension):
    rng = np.random.default_rng(0)
    whole = unit(rng, 40)
    vectors = metrics.truncated(whole, dimension)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert np.allclose(vectors * np.linalg.norm(whole[:, :dimension], axis=1, keepdims=True), whole[:, :dimension])
    queries, pool = vectors[:8], vectors[8:]

    signs = metrics.reduced(vectors, "binary")
    assert set(np.unique(signs)) <= {-1.0, 1.0}
    hamming = ((queries[:, None] > 0) != (pool[None] > 0)).sum(axis=2)
    assert np.array_equal(signs[:8] @ signs[8:].T, dimension - 2 * hamming)

    codes = metrics.reduced(vectors, "int8")
    low, high = vectors.min(axis=0), vectors.max(axis=0)
    expected = np.clip(np.floor((vectors - low) / ((high - low) / 255)), 0, 255) - 128
    assert np.abs(codes - expected).max() <= 1  # rounding may tip a number over the edge of its bucket
    assert codes.min() == -128 and codes.max() >= 126 and np.array_equal(codes, np.round(codes))
    assert metrics.reduced(vectors, "float32") is vectors


@pytest.mark.parametrize("storage", ["int8", "binary"])
def test_no_storage_hides_what_is_not_finite(storage):
    vectors = unit(np.random.default_rng(1), 6)
    vectors[2, 3] = np.nan
    codes = metrics.reduced(vectors, storage)
    assert np.isnan(codes[2]).all() and np.isfinite(np.delete(codes, 2, axis=0)).all()
    assert np.isnan(metrics.reduced(vectors[2:3], storage)).any()
