"""Pools on disk: exact search whatever the blocks, resumable and shared embedding."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muco.data.judged import Candidate
from muco.data.left_out import LeftOut
from muco.dialogue import Content
from muco.errors import DataError, OutputError
from muco.evaluate import pool as module
from muco.evaluate.cache import encode_named
from muco.evaluate.pool import Vectors, embed_pool, search


def brute(queries: np.ndarray, pool: np.ndarray, order: np.ndarray, k: int) -> list[list[int]]:
    """Sorts everything: float64 products, not-finite ones left out, equal ones by order."""
    rows = []
    for query in queries.astype(np.float64):
        with np.errstate(invalid="ignore"):
            scores = np.array([np.float32((query * candidate).sum()) for candidate in pool.astype(np.float64)])
        usable = [i for i in range(len(pool)) if np.isfinite(scores[i])]
        rows.append(sorted(usable, key=lambda i: (-scores[i], order[i]))[:k])  # noqa: B023
    return rows


def stored(folder: Path, *parts: np.ndarray) -> Vectors:
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{n}.npy" for n in range(len(parts))]
    for file, part in zip(files, parts, strict=True):
        np.save(file, part.astype(np.float32))
    return Vectors(files, sum(map(len, parts)))


def unit(rng: np.random.Generator, n: int, d: int = 12) -> np.ndarray:
    rows = rng.normal(size=(n, d)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.sampled_from([1, 7, 64, 1 << 24]), st.booleans())
def test_search_is_a_full_sort(tmp_path_factory, seed, k, scores_at_a_time, duplicates):
    rng = np.random.default_rng(seed)
    pool = unit(rng, 60)
    if duplicates:  # equal vectors far apart, and whole groups of them at the border
        pool = pool[rng.integers(0, 6, 60)]
    pool[rng.integers(0, 60)] = np.nan
    queries = np.concatenate([unit(rng, 5), pool[:2]])
    queries[0, 0] = np.inf
    order = rng.permutation(60)
    cut = int(rng.integers(1, 59))
    folder = tmp_path_factory.mktemp("pool")
    stores = [stored(folder / "a", pool[:cut]), stored(folder / "b", pool[cut:])]
    before = module.SCORES
    module.SCORES = scores_at_a_time
    try:
        rows, scores = search(queries, stores, [order[:cut], order[cut:]], k)
    finally:
        module.SCORES = before
    expected = brute(queries, pool, order, k)
    assert [[r for r in row if r >= 0] for row in rows.tolist()] == expected
    assert (np.isneginf(scores) == (rows < 0)).all() and (np.diff(scores[1:].clip(-2), axis=1) <= 0).all()


def test_a_pool_smaller_than_k_is_found_whole(tmp_path):
    rng = np.random.default_rng(0)
    pool = unit(rng, 3)
    rows, scores = search(pool, [stored(tmp_path, pool)], [np.arange(3)], 5)
    assert (rows[:, 3:] == -1).all() and np.isneginf(scores[:, 3:]).all()
    assert sorted(rows[0, :3].tolist()) == [0, 1, 2] and rows[:, 0].tolist() == [0, 1, 2]
    rows, scores = search(pool[:0], [stored(tmp_path, pool)], [np.arange(3)], 2)
    assert rows.shape == scores.shape == (0, 2)


class Texts:
    """A pool of texts."""

    name = "texts"

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts
        self.fingerprint = hashlib.sha256("\n".join(texts).encode()).hexdigest()
        self.order = np.arange(len(texts))

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, row: int) -> Candidate:
        return Candidate(str(row), Content(self.texts[row]), f"pool.jsonl:{row + 1}")


class Letters:
    """Counts letters; stops after some calls, or at a text it does not take."""

    fingerprint = "letters"

    def __init__(self, calls: int = 10**9) -> None:
        self.left, self.encoded = calls, 0

    def encode(self, contents: list[Content], *, batch_size: int) -> np.ndarray:
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        self.encoded += len(contents)
        if any("<bad>" in content.text for content in contents):
            raise DataError("input 0: a text that it does not take")
        return np.array([[c.text.count(x) + 1e-3 for x in "abc"] for c in contents], dtype=np.float32)


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(module, "SHARD", 4)


def test_an_interrupted_pool_goes_on_at_its_shard(tmp_path, small_shards):
    pool = Texts(["a" * n + "b" for n in range(10)])
    with pytest.raises(KeyboardInterrupt):
        embed_pool(Letters(calls=2), pool, tmp_path)
    model, done = Letters(), []
    vectors = embed_pool(model, pool, tmp_path, progress=lambda *at: done.append(at))
    assert model.encoded == 2 and done == [(10, 10)] and len(vectors) == 10
    whole = embed_pool(Letters(), pool, tmp_path / "other")
    assert np.array_equal(np.concatenate([*vectors.blocks(3)]), np.concatenate([*whole.blocks(100)]))
    again = Letters(calls=0)
    embed_pool(again, pool, tmp_path)  # nothing is left to do


def test_a_changed_pool_or_model_is_embedded_anew(tmp_path, small_shards):
    embed_pool(Letters(), Texts(["a", "b"]), tmp_path)
    model = Letters()
    vectors = embed_pool(model, Texts(["a", "c"]), tmp_path)
    assert model.encoded == 2 and next(vectors.blocks(2))[1, 2] > 1
    other = Letters()
    other.fingerprint = "letters 2"
    embed_pool(other, Texts(["a", "b"]), tmp_path)
    assert other.encoded == 2


def test_a_candidate_that_the_model_refuses_is_named(tmp_path, small_shards):
    with pytest.raises(DataError, match=r"^pool\.jsonl:6: .*does not take"):
        embed_pool(Letters(), Texts(["a"] * 5 + ["<bad>"] + ["b"] * 2), tmp_path)


def test_what_the_model_refuses_is_left_out_if_that_is_allowed(tmp_path, small_shards):
    texts = ["a", "<bad>", "b", "ab", *["<bad>"] * 4, "c", "<bad>"]
    with pytest.raises(DataError, match=r"^pool\.jsonl:2: .*--skip-broken"):
        embed_pool(Letters(), Texts(texts), tmp_path)
    left_out = LeftOut(allowed=True)
    vectors = embed_pool(Letters(), Texts(texts), tmp_path, left_out=left_out)
    whole = np.concatenate([*vectors.blocks(100)])
    sound = [i for i, text in enumerate(texts) if text != "<bad>"]
    assert sorted(left_out.reasons) == [1, 4, 5, 6, 7, 9] and left_out.reasons[9].startswith("pool.jsonl:10: ")
    assert np.isnan(whole[sorted(left_out.reasons)]).all()
    expected = Letters().encode([Content(texts[i]) for i in sound], batch_size=1)
    assert np.array_equal(whole[sound], expected)
    health = vectors.health()
    assert (health.rows, health.non_finite, health.collapsed) == (4, 0, False)
    rows, _ = search(whole[sound], [vectors], [np.arange(10)], 10)
    assert {row for row in rows.ravel().tolist() if row >= 0} == set(sound)

    again, model = LeftOut(allowed=True), Letters(calls=0)
    embed_pool(model, Texts(texts), tmp_path, left_out=again)  # nothing is encoded again, all is still told
    assert again.reasons == left_out.reasons
    with pytest.raises(DataError, match=r"^pool\.jsonl:2: "):
        embed_pool(Letters(), Texts(texts), tmp_path)  # what is partial does not serve a run that wants all
    with pytest.raises(DataError, match=r"texts: none of its 2 candidates can be embedded; the first: pool\.jsonl:1: "):
        embed_pool(Letters(), Texts(["<bad>"] * 2), tmp_path, left_out=LeftOut(allowed=True))


@given(st.lists(st.booleans(), min_size=1, max_size=20))
def test_the_refused_are_found_by_halves(refused):
    contents = [Content("<bad>" if bad else "a" * n) for n, bad in enumerate(refused, 1)]
    places, found = [f"f:{n}" for n in range(len(refused))], {}
    vectors = encode_named(Letters(), contents, places, 2, found.__setitem__)
    assert sorted(found) == [n for n, bad in enumerate(refused) if bad]
    assert all(str(error).startswith(f"f:{n}: ") for n, error in found.items())
    assert [round(row[0]) for row in vectors] == [n for n, bad in enumerate(refused, 1) if not bad]


def test_an_empty_pool_and_a_folder_that_cannot_be_made_are_sentences(tmp_path):
    with pytest.raises(DataError, match="texts: the pool holds no candidate"):
        embed_pool(Letters(), Texts([]), tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="choose another folder"):
        embed_pool(Letters(), Texts(["a"]), tmp_path / "file")


def test_health_sees_collapse_and_what_is_not_finite(tmp_path):
    rng = np.random.default_rng(1)
    pool = unit(rng, 9)
    fine = stored(tmp_path / "fine", pool[:4], pool[4:]).health()
    assert (fine.rows, fine.non_finite, fine.collapsed) == (9, 0, False) and fine.spread > 0.5
    pool[3] = np.nan
    assert stored(tmp_path / "broken", pool[:4], pool[4:]).health().non_finite == 1
    same = np.repeat(pool[:1], 6, axis=0) + 1e-6
    assert stored(tmp_path / "same", same[:2], same[2:]).health().collapsed
    assert stored(tmp_path / "nan", np.full((2, 3), np.nan)).health().collapsed
