"""muco search: exact equals a plain loop, filters only filter, and what the command prints."""

from __future__ import annotations

import base64
import io
import json
import math
import operator
import re
import sqlite3
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.cells import cell_len
from rich.console import Console

from muco.base.terminal import finish
from muco.cli import main
from muco.cli import search as cli
from muco.errors import MucoError
from muco.search import Hit, Index
from muco.search.filter import DEEPEST, LONGEST, checked_filter, quoted
from muco.search.index import ORDERED
from muco.search.lance import PROBES
from muco.search.storage import STORAGES, scores
from muco.search.table import HASHES
from muco.search.terminal import picture, protocol, show_hits

ROOT = Path(__file__).parents[2]
DIMENSION = 32


class Generated:
    """Stands for the model that made the vectors of a test; nothing here is encoded."""

    fingerprint = "generated"
    encoder = SimpleNamespace(muco_processor=SimpleNamespace(settings=lambda: {"template": "generated"}))

    def get_embedding_dimension(self) -> int:
        return DIMENSION


def unit(rng: np.random.Generator, count: int) -> np.ndarray:
    centres = rng.standard_normal((40, DIMENSION))
    vectors = centres[rng.integers(0, 40, count)] + 0.7 * rng.standard_normal((count, DIMENSION))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def filled(folder: Path, storage: str, vectors: np.ndarray, ids: list[str] | None = None) -> Index:
    index = Index.create(folder, Generated(), storage=storage)
    index.table.add_columns([pa.field("n", pa.int64()), pa.field("a word", pa.string())])
    append(index, vectors, ids or [f"r{i:05}" for i in range(len(vectors))])
    return index


def append(index: Index, vectors: np.ndarray, ids: list[str]) -> None:
    values = {"id": ids, "text": ids, "content_hash": ids, "row_hash": ids, "n": list(range(len(ids)))}
    values["a word"] = [("even", "odd")[i % 2] for i in range(len(ids))]
    values |= dict(zip(index.storage.columns, index.storage.arrays(vectors), strict=True))
    schema = index.table.schema
    columns = [values.get(name, pa.nulls(len(ids), schema.field(name).type)) for name in schema.names]
    index.write(pa.table([*columns], schema=schema))


def cosines(index: Index, vectors: np.ndarray, query: np.ndarray) -> np.ndarray:
    """What the stored vectors of each way of storing give, straight from its definition."""
    if index.storage.name == "binary":
        vectors = np.where(vectors > 0, 1.0, -1.0)
    elif index.storage.name == "float16":
        vectors = vectors.astype(np.float16).astype(np.float32)
    return vectors @ query / np.linalg.norm(vectors, axis=1)


@pytest.fixture(scope="module", params=STORAGES)
def some(request, tmp_path_factory) -> tuple[Index, np.ndarray]:
    vectors = unit(np.random.default_rng(0), 500)
    return filled(tmp_path_factory.mktemp("some") / "index", request.param, vectors), vectors


# ── what is found ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("where", [None, "`a word` = 'odd' AND n >= 100"])
def test_exact_equals_a_plain_loop(some, where: str | None) -> None:
    index, vectors = some
    for query in unit(np.random.default_rng(1), 10):
        scores = cosines(index, vectors, query)
        allowed = [i for i in range(500) if where is None or (i % 2 == 1 and i >= 100)]
        best = sorted(allowed, key=lambda i: (-round(float(scores[i]), 6), i))[:7]
        hits = index.search(vector=3 * query, k=7, where=where, exact=True)
        np.testing.assert_allclose([hit.score for hit in hits], scores[best], atol=1e-5)
        assert {hit.id for hit in hits} == {f"r{i:05}" for i in best}
        assert all(hit.extra["n"] == int(hit.id[1:]) and hit.text == hit.id for hit in hits)


def test_like_finds_others(some) -> None:
    index, vectors = some
    for exact in (True, False):
        hits = index.search(like="r00007", k=500, exact=exact)
        assert len(hits) == 499 or not exact and len(hits) > 300
        assert (
            "r00007" not in {hit.id for hit in hits}
            and [h.score for h in hits] == sorted([h.score for h in hits])[::-1]
        )
    query = index.storage.vectors(index.rows_where("id", ["r00007"], index.storage.columns), DIMENSION)[0]
    by_vector = index.search(vector=query, k=4, where="id != 'r00007'", exact=True)
    assert [hit.id for hit in by_vector] == [hit.id for hit in index.search(like="r00007", k=4, exact=True)]


def test_equal_scores_stand_by_id(tmp_path: Path) -> None:
    vectors = np.repeat(unit(np.random.default_rng(0), 1), 30, axis=0)
    for storage in STORAGES:
        index = filled(tmp_path / storage, storage, vectors)
        assert [hit.id for hit in index.search(vector=vectors[0], k=30)] == [f"r{i:05}" for i in range(30)]


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("storage", STORAGES)
def test_which_of_many_equal_rows_are_found_does_not_depend_on_k(storage: str, exact: bool, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    vectors = unit(random, 3)[random.integers(0, 3, 900)]
    ids = [f"r{i:05}" for i in random.permutation(900)]
    index = filled(tmp_path / "index", storage, vectors, ids)
    all_of_them = sorted(index.search(vector=vectors[0], k=900, exact=True), key=lambda hit: (-hit.score, hit.id))
    for k in (1, 6, 10, 50, 400, 900):
        hits = index.search(vector=vectors[0], k=k, exact=exact)
        assert [hit.id for hit in hits] == [hit.id for hit in all_of_them[:k]]


def test_more_equal_rows_than_are_ordered_are_the_same_for_every_k(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    vectors = np.repeat(unit(random, 1), 1500, axis=0)
    index = filled(tmp_path / "index", "float32", vectors, [f"r{i:05}" for i in random.permutation(1500)])
    hits = index.search(vector=vectors[0], k=ORDERED - 1)
    for k in (1, 10, 300):
        assert index.search(vector=vectors[0], k=k) == hits[:k]


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ({}, "pass one query"),
        ({"text": "a", "like": "r00001"}, "pass one query"),
        ({"like": "nobody"}, "no row has the id 'nobody'"),
        ({"like": "caf\udce9.png"}, "'id' holds half a character"),
        ({"text": "a", "where": "id = '\ud800'"}, "'where' holds half a character"),
        ({"vector": [1.0, 2.0]}, "32 finite values"),
        ({"vector": [0.0] * 32}, "not all zero"),
        ({"vector": [float("nan")] * 32}, "finite"),
        ({"like": "r00001", "k": 0}, "k must be"),
        ({"like": "r00001", "k": 10**9}, "k must be"),
        ({"like": "r00001", "k": 1.5}, "k must be"),
        ({"like": "r00001", "k": "3"}, "k must be"),
        ({"vector": ["a"] * 32}, "32 dimensions"),
        ({"vector": torch.ones(32, requires_grad=True)}, "32 dimensions"),
        ({"text": "a"}, "does not say where its model is"),
    ],
)
def test_queries_that_cannot_be(some, query: dict, says: str) -> None:
    index = Index.open(some[0].path)
    with pytest.raises(MucoError, match=says):
        index.search(**query)


@pytest.mark.parametrize("storage", ["float32", "float16"])
def test_an_index_of_vectors_is_built_finds_and_is_kept_fresh(storage: str, tmp_path: Path) -> None:
    vectors = unit(np.random.default_rng(0), 12_000)
    index = filled(tmp_path / "index", storage, vectors[:11_000])
    index.optimize()
    (name,) = [found.name for found in index.table.list_indices() if found.name.startswith("ann_")]
    assert name == "ann_11000"
    append(index, vectors[11_000:], [f"r{i:05}" for i in range(11_000, 12_000)])
    assert index.search(vector=vectors[11_500], k=1)[0].id == "r11500"  # before it is in the index
    index.optimize()
    assert index.table.index_stats(name).num_unindexed_rows == 0
    queries = unit(np.random.default_rng(0), 12_040)[12_000:]
    reader = Index.open(tmp_path / "index")
    found = [{hit.id for hit in reader.search(vector=query)} for query in queries]
    right = [{f"r{i:05}" for i in np.argsort(-(vectors @ query))[:10]} for query in queries]
    recall = sum(len(one & other) for one, other in zip(found, right, strict=True)) / 400
    assert recall >= 0.95
    few = reader.search(vector=queries[0], where="n in (3, 5, 70)", k=10)
    assert {hit.extra["n"] for hit in few} == {3, 5, 70}  # a narrow filter loses nothing
    assert reader.search(vector=queries[0], where="n < 0") == []


@pytest.mark.parametrize(("storage", "dimension"), [("float32", 32), ("float32", 256), ("float16", 32), ("binary", 32)])
def test_an_index_of_many_partitions_finds_what_is_far_from_the_query(
    storage: str, dimension: int, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setitem(globals(), "DIMENSION", dimension)  # 256: its index of vectors is of another kind
    for place in ("muco.search.lance.ANN_ROWS", "muco.search.index.ANN_ROWS"):
        monkeypatch.setattr(place, 1000)
    monkeypatch.setattr("muco.search.lance.PARTITION_ROWS", 100)
    rng, clusters, each = np.random.default_rng(0), 60, 100
    centres = np.repeat(rng.standard_normal((clusters, dimension)), each, axis=0)  # "n" tells the cluster of a row
    vectors = (centres + 0.2 * rng.standard_normal(centres.shape)).astype(np.float32)
    index = filled(tmp_path / "index", storage, vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    index.optimize()
    (name,) = [found.name for found in index.table.list_indices() if found.name.startswith("ann_")]
    assert index.table.index_stats(name).num_indexed_rows == 6000 > 2 * PROBES * 100
    query = index.storage.vectors(index.rows_where("id", ["r00000"], index.storage.columns), dimension)[0]
    for cluster in range(0, clusters, 6):
        where = f"n >= {each * cluster} AND n < {each * (cluster + 1)}"
        found, right = (index.search(vector=query, k=each + 1, where=where, exact=exact) for exact in (False, True))
        assert len(right) == each and [hit.id for hit in found] == [hit.id for hit in right]
        assert len(index.search(vector=query, k=10, where=where)) == 10
    for where in ("n IN (5, 3005, 5805)", "n = 5990", "n > 5996 OR n = 0"):
        found, right = (index.search(vector=query, where=where, exact=exact) for exact in (False, True))
        assert found == right and found
    assert len({hit.id for hit in index.search(vector=query, k=5990)}) == 5990  # more than the nearest partitions hold
    assert index.search(vector=query, where="n < 0") == []


def test_an_index_is_trained_anew_when_it_has_grown(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("muco.search.lance.ANN_ROWS", 300)
    vectors = unit(np.random.default_rng(0), 1300)
    index = filled(tmp_path / "index", "float32", vectors[:300])
    index.optimize()
    append(index, vectors[300:], [f"r{i:05}" for i in range(300, 1300)])
    index.optimize()
    assert [i.name for i in index.table.list_indices() if i.name.startswith("ann_")] == ["ann_1300"]


def test_many_threads_read_while_one_writes(tmp_path: Path) -> None:
    vectors = unit(np.random.default_rng(0), 600)
    index = filled(tmp_path / "index", "float32", vectors[:300])
    reader = Index.open(tmp_path / "index")

    def ask(number: int) -> bool:
        return reader.search(vector=vectors[number], k=1)[0].id == f"r{number:05}"

    with ThreadPoolExecutor(8) as pool:
        asked = pool.map(ask, [i % 300 for i in range(200)])
        for start in range(300, 600, 60):
            append(index, vectors[start : start + 60], [f"r{i:05}" for i in range(start, start + 60)])
            index.optimize()
        assert all(asked)


def test_a_small_index_of_bits_compares_every_row(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(globals(), "DIMENSION", 384)  # of which bits find few candidates
    vectors, queries = np.split(np.random.default_rng(0).standard_normal((9010, DIMENSION)), [9000])
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    index = filled(tmp_path / "index", "binary", vectors.astype(np.float32))
    for query in queries:
        found = [(hit.id, hit.score) for hit in index.search(vector=query, k=10)]
        assert found == [(hit.id, hit.score) for hit in index.search(vector=query, k=10, exact=True)]
        signs = np.where(vectors > 0, 1, -1) / math.sqrt(DIMENSION)
        assert [score for _, score in found] == pytest.approx(np.sort(signs @ query)[::-1][:10], abs=1e-5)


# ── filters ──────────────────────────────────────────────────────────────────────────────────────────────────────────

COLUMNS = {
    "id": pa.string(),
    "n": pa.int64(),
    "a word": pa.string(),
    "Year": pa.date32(),
    "price": pa.decimal128(5, 2),
    "ok": pa.bool_(),
    "date": pa.date32(),
    "and": pa.int64(),
    "x": pa.float64(),
    "X": pa.float64(),
}


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("n = 1", "`n` = 1"),
        ("  ", None),
        ("n=-15 or YEAR is not null", "`n` = -15 OR `Year` IS NOT NULL"),
        ("`a word` LIKE 'it''s%' and not (n in (1, 2))", "`a word` LIKE 'it''s%' AND NOT ((`n` IN (1, 2)))"),
        ("Lower(id) = 'x' and year > date '2020-01-01'", "lower(`id`) = 'x' AND `Year` > DATE '2020-01-01'"),
        ("n == 1 or n = 2 and ok", "`n` = 1 OR `n` = 2 AND `ok`"),
        ("(n = 1 or n = 2) and not ok is true", "(`n` = 1 OR `n` = 2) AND NOT (`ok` IS TRUE)"),
        ("date = date '2020-01-01' and and > 1", "`date` = DATE '2020-01-01' AND `and` > 1"),
        (
            "n not between -.5 and 3 and x > 1.5e3",
            "`n` NOT BETWEEN CAST('-0.5' AS DECIMAL(1, 1)) AND 3 AND `x` > 1.5e3",
        ),
        ("n = 1.5e3 or n = 5e-2", "`n` = CAST('1500' AS DECIMAL(4, 0)) OR `n` = CAST('0.05' AS DECIMAL(2, 2))"),
        ("1.50 <= price and x > 0.5", "CAST('1.50' AS DECIMAL(3, 2)) <= `price` AND `x` > 0.5"),
        ("coalesce(ok, false) and starts_with(id, 'a')", "coalesce(`ok`, FALSE) AND starts_with(`id`, 'a')"),
    ],
)
def test_filters_that_pass(where: str, expected: str | None) -> None:
    assert checked_filter(where, COLUMNS) == expected


@pytest.mark.parametrize(
    "where",
    [
        "n = 1; drop table rows",
        "n = 1 -- comment",
        "n = 1 /* comment */",
        "n = 1 limit 5",
        "id in (select id from rows)",
        "exists(select 1)",
        "length(repeat('x', 1000000000)) > 1",
        "array_length(array_repeat(1, 1000000000)) > 0",
        "read_csv('/etc/passwd')",
        "random() < 0.5",
        "version() = 'x'",
        "n + 1 > 0",
        "nothing = 1",
        "n = 'open",
        'id = "r1"',
        "`id = 1",
        "n = 0x1F",
        "n = 1" + " or n = 1" * LONGEST,
        "lower = 1",
        "content_hash = 'x'",
        "()",
        "not " * 400 + "ok",
        "(" * 900 + "ok" + ")" * 900,
        "lower(" * 300 + "id" + ")" * 300 + " = 'x'",
        "lower(id, id) = 'x'",
        "1 2",
        "id = '\ud800'",
    ],
)
def test_filters_that_do_not(where: str) -> None:
    with pytest.raises(MucoError, match="filter"):
        checked_filter(where, COLUMNS)


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ("id = 'red' n >= 2020", "'n >= 2020' (character 12): expected the end, AND or OR"),
        ("id = 'red', n >= 2020", "', n >= 2020' (character 11): expected the end, AND or OR"),
        ("id = 'red') AND (n >= 2020", "') AND (n >= 2020' (character 11): expected the end"),
        ("(id = 'red')) AND n >= 2020", "') AND n >= 2020' (character 13): expected the end"),
        ("((id = 'red') AND n >= 2020", "the end: expected )"),
        ("n between 1 or 2", "'or 2' (character 13): expected AND"),
        ("n = 1 = 2", "'= 2' (character 7): expected the end"),
        ("n = ", "the end: expected a column, text or a number"),
        ("n not = 1", "'= 1' (character 7): expected IN, BETWEEN, LIKE or ILIKE"),
        ("n in (1, n)", "'n)' (character 10): expected text, a number, TRUE"),
        ("ok is 1", "'1' (character 7): expected NULL, TRUE or FALSE"),
        ("n = 'x'", "\"'x'\" (character 5): text cannot be compared with a number"),
        ("n = id", "'id' (character 5): text cannot be compared with a number"),
        ("n in (1, '2')", "(character 10): text cannot be compared with a number"),
        ("n", "'n' (character 1): expected a condition, not a number"),
        ("ok and id", "'id' (character 8): expected a condition, not text"),
        ("n like '1%'", "\"n like '1%'\" (character 1): expected text, not a number"),
        ("year > '2020-01-01'", "text cannot be compared with a date; write DATE '2020-01-31'"),
        ("id >= date '2024-05-01'", "a date cannot be compared with text; `id` is text: write '2024-05-01' alone"),
        ("(timestamp '2024-05-01 12:00:00.5') < id", "`id` is text: write '2024-05-01 12:00:00.5' alone"),
        ("date '2024-05-01' in ('2024-05-01')", "text cannot be compared with a date; write DATE '2020-01-31'"),
        ("id = year", "a date cannot be compared with text; an example"),
        ("lower(n) = 'x'", "expected text, not a number"),
        ("lower(id, id) = 'x'", "'lower' (character 1): takes 1 values, not 2"),
        ("repeat(id) = 'x'", "'repeat' (character 1): not a function that may be used; functions: abs"),
        ("nothing = 1", "'nothing' (character 1): not a column; columns: X, Year"),
        ("ÿ = 1 and `nothing` = 1", "'ÿ' (character 1): not a column"),
    ],
)
def test_a_refused_filter_says_where_and_why(where: str, says: str) -> None:
    with pytest.raises(MucoError, match=re.escape(says)):
        checked_filter(where, COLUMNS)


def of_type(folder: Path, **columns: pa.Array) -> Index:
    """An index of rows with these further columns; ids are r0, r1, …"""
    index = Index.create(folder, Generated())
    index.table.add_columns([pa.field(name, values.type) for name, values in columns.items()])
    count, schema = len(next(iter(columns.values()))), index.table.schema
    values = columns | dict.fromkeys(("id", *HASHES), [f"r{i}" for i in range(count)])
    vectors = index.storage.arrays(unit(np.random.default_rng(0), count))
    values |= dict(zip(index.storage.columns, vectors, strict=True))
    index.write(pa.table([values.get(f.name, pa.nulls(count, f.type)) for f in schema], schema=schema))
    return index


def rows_where(index: Index, where: str) -> list[int]:
    return sorted(int(hit.id[1:]) for hit in index.search(vector=[1.0] * DIMENSION, where=where, k=50, exact=True))


EXACT = {
    "i8": (pa.int8(), [-(2**7), -1, 0, 5, 2**7 - 1]),
    "u8": (pa.uint8(), [0, 1, 5, 254, 2**8 - 1]),
    "i32": (pa.int32(), [-(2**31), -1, 0, 5, 2**31 - 1]),
    "i64": (pa.int64(), [-(2**63), -1, 0, 5, 2**63 - 1]),
    "u64": (pa.uint64(), [0, 1, 5, 2**63, 2**64 - 1]),
    "d": (pa.decimal128(5, 2), [Decimal(n) for n in ("-999.99", "-0.01", "0.00", "5.00", "999.99")]),
}


@pytest.fixture(scope="module")
def exact_columns(tmp_path_factory) -> Index:
    columns = {name: pa.array(values, kind) for name, (kind, values) in EXACT.items()}
    return of_type(tmp_path_factory.mktemp("exact") / "index", **columns)


@pytest.mark.parametrize("name", EXACT)
def test_numbers_of_any_size_are_compared_with_every_exact_column(exact_columns: Index, name: str) -> None:
    values = EXACT[name][1]
    numbers = (
        "0 -1 5 5.0 1.5 1000 -1000 9223372036854775807 9223372036854775808 18446744073709551616 0.005 -0.005 1e30 "
        "-9223372036854775808 1e-25 0.1000000000000000055511151231257827 1e-19 1e37 1e-37 "
    )
    numbers += "-1e30 1e50 -1e50 1e-50 -1e-50 0e-400 1e400 99999999999999999999999999999999999999999 5." + "0" * 50
    for text in numbers.split():
        number = Decimal(text)
        for sign, turned, holds in (("<", ">", operator.lt), ("=", "=", operator.eq)):
            expected = [row for row, value in enumerate(values) if holds(value, number)]
            assert rows_where(exact_columns, f"{name} {sign} {text} and ({text}) {turned} {name}") == expected, text
        expected = [row for row, value in enumerate(values) if value in (number, 5)]
        assert rows_where(exact_columns, f"{name} in ({text}, 5)") == expected
        expected = [row for row, value in enumerate(values) if number <= value <= 300]
        assert rows_where(exact_columns, f"{name} between {text} and 300") == expected
    with pytest.raises(MucoError, match="a number of too large an exponent"):
        rows_where(exact_columns, f"{name} < 1e99999999999999999999")


def test_a_number_for_which_a_wide_decimal_leaves_no_room_is_refused(tmp_path: Path) -> None:
    values = [Decimal("-99999999999999999999.999999999999999999"), Decimal("1.5"), Decimal("99999999999999999999")]
    index = of_type(tmp_path / "index", price=pa.array(values, pa.decimal128(38, 18)))
    for number in ("0", "1.5", "-1.5", "99999999999999999999", "0.333333333333333333", "-99999999999999999999.5"):
        assert rows_where(index, f"price < {number}") == [row for row in range(3) if values[row] < Decimal(number)]
    for number in ("1e30", "100000000000000000000", "1e-19", "0.3333333333333333333333333333", "1e50"):
        with pytest.raises(MucoError, match="more digits than there are beside those of the column, 20 before"):
            rows_where(index, f"price < {number}")


def test_a_time_is_compared_as_it_is_or_refused(tmp_path: Path) -> None:
    noon = datetime(2020, 1, 31, 12)
    columns = {unit: pa.array([noon], pa.timestamp(unit)) for unit in ("s", "ms", "us", "ns")}
    columns["zoned"] = pa.array([noon.replace(tzinfo=UTC)], pa.timestamp("ms", "UTC"))
    columns["exactly"] = pa.array([10**9 + 1], pa.timestamp("ns"))
    columns |= {"day": pa.array([noon.date()]), "old": pa.array([date(1503, 1, 1)])}
    index = of_type(tmp_path / "index", **columns)
    for where in (
        "us < timestamp '9999-12-31 00:00:00'",
        "us > date '0001-01-01' and ms > date '1500-01-01'",
        "ms = timestamp '2020-01-31 12:00:00.000' and ms > timestamp '2020-01-31'",
        "zoned = timestamp '2020-01-31T13:00:00.000+01:00'",
        "ns = timestamp '2020-01-31 12:00:00.000000000' and ns < timestamp '2020-01-31 12:00:00.000000001'",
        "exactly = timestamp '1970-01-01 00:00:01.000000001' and exactly > timestamp '1970-01-01 00:00:01'",
        "exactly not in (timestamp '1970-01-01T00:00:01Z')",
        "ns > timestamp '1677-09-22 00:00:00' and ns < date '2262-04-11'",
        "coalesce(ns, timestamp '2020-01-31 12:00:00') = ns",
        "day < timestamp '9999-12-31 00:00:00' and day in (timestamp '2020-01-31 00:00:00', date '1500-01-01')",
        "old < date '1503-01-02' and old < timestamp '2020-06-01 00:00:00'",
    ):
        assert rows_where(index, where) == [0], where
        assert rows_where(index, f"not ({where})") == [], where
    for where, says in (
        ("s = timestamp '2020-01-31 12:00:00.5'", "finer than the times of the column, which are whole seconds"),
        ("ms = timestamp '2020-01-31 12:00:00.0005'", "whole milliseconds"),
        ("zoned in (timestamp '2020-01-31T12:00:00.0005Z')", "whole milliseconds"),
        ("us between timestamp '2020-01-31 12:00:00.000000001' and date '2021-01-01'", "whole microseconds"),
        ("coalesce(ms, ms) = timestamp '2020-01-31 12:00:00.0005'", "whole milliseconds"),
        ("ns < timestamp '9999-12-31 00:00:00'", "of 1677-09-22 to 2262-04-11"),
        ("date '1500-01-01' < ns", "of 1677-09-22 to 2262-04-11"),
        ("us = ns", "times of whole microseconds cannot be compared with those of whole nanoseconds"),
        ("coalesce(us, s) = timestamp '2020-01-31 12:00:00'", "whole microseconds cannot be compared"),
        ("day < us", "a column of dates cannot be compared with one of times"),
        ("day < timestamp '2020-01-31 12:00:00'", "but the column holds dates; write DATE"),
        ("us = timestamp '2020-01-31 25:00:00'", "expected a timestamp"),
        ("us = timestamp '2020-01-31 12:00:00.0000000001'", "expected a timestamp"),
        ("us = date '2020-02-30'", "expected a date"),
        ("us = date '2020-01-31 12:00:00'", "expected a date"),
    ):
        with pytest.raises(MucoError, match=re.escape(says)):
            rows_where(index, where)


def test_dates_as_json_has_them_are_compared_as_text(tmp_path: Path) -> None:
    index = of_type(tmp_path / "index", added=pa.array(["2024-04-30T23:00:00Z", "2024-05-01", "2024-05-01T08:00:00Z"]))
    assert rows_where(index, "added >= '2024-05-01'") == [1, 2]


def test_a_column_that_may_be_two_is_refused() -> None:
    assert checked_filter("x = 1 and X = 2", COLUMNS) == "`x` = 1 AND `X` = 2"
    columns = {"Ab": pa.int64(), "aB": pa.int64()}
    with pytest.raises(MucoError, match="'ab' .*may be Ab or aB"):
        checked_filter("ab = 1", columns)


@pytest.mark.parametrize("where", ["`a word` > date 'x'", "n = date '2020-01-01'"])
def test_what_lancedb_refuses_is_one_short_sentence(some, where: str) -> None:
    with pytest.raises(MucoError, match="the filter") as error:
        some[0].search(like="r00001", where=where)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300 and ".rs" not in str(error.value)


@pytest.mark.parametrize(("start", "end", "levels"), [("(", ")", 1), ("not ", "", 1), ("not (", ")", 2)])
def test_the_deepest_filter_takes_no_time(some, start: str, end: str, levels: int) -> None:
    deep = DEEPEST // levels
    started = time.perf_counter()
    some[0].search(like="r00000", where=start * deep + "n = 1" + end * deep)
    assert time.perf_counter() - started < 10
    with pytest.raises(MucoError, match=f"more than {DEEPEST} parentheses"):
        some[0].search(like="r00000", where=start * (deep + 1) + "n = 1" + end * (deep + 1))


def test_a_long_filter_is_no_danger(some) -> None:
    where = " or ".join(["n = 1"] * (LONGEST // 9))
    assert [hit.extra["n"] for hit in some[0].search(like="r00000", where=where)] == [1]


class Table:
    """Rows in an index, and in SQLite, whose parser and evaluation are the reference: it reads all or none."""

    def __init__(self, folder: Path) -> None:
        rows = [
            {"n": n, "f": f, "s": s, "ok": ok}
            for n, f, s, ok in zip(
                [None, -1, 0, 1, 2, 3, 1, 2, None, 5, 2, 1],
                [0.5, None, 1.0, 1.5, 2.0, -0.5, 2.0, None, 1.5, 0.0, 2.5, 1.0],
                ["a", "b", None, "ab", "B", "", "a%", "ba", "A", None, "a", "and"],
                [True, False, None] * 4,
                strict=True,
            )
        ]
        kinds = {"n": pa.int64(), "f": pa.float64(), "s": pa.string(), "ok": pa.bool_()}
        columns = {name: pa.array([row[name] for row in rows], kind) for name, kind in kinds.items()}
        self.index, ids = of_type(folder, **columns), [f"r{i}" for i in range(len(rows))]
        self.database = sqlite3.connect(":memory:")
        self.database.execute("PRAGMA case_sensitive_like = ON")
        self.database.execute("CREATE TABLE t (id TEXT, text TEXT, image TEXT, n INTEGER, f REAL, s TEXT, ok INTEGER)")
        for id, row in zip(ids, rows, strict=True):
            self.database.execute("INSERT INTO t VALUES (?, NULL, NULL, ?, ?, ?, ?)", (id, *row.values()))

    def found(self, where: str) -> set[str]:
        return {hit.id for hit in self.index.search(vector=[1.0] * DIMENSION, where=where, k=50, exact=True)}

    def expected(self, where: str) -> set[str]:
        return {id for (id,) in self.database.execute(f"SELECT id FROM t WHERE {where}")}


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Table:
    return Table(tmp_path_factory.mktemp("table") / "index")


NUMBERS = st.sampled_from("n f n f -1 0 1 2 1.5 .5 2. 1e0 abs(n) coalesce(n,2) (f) null".split())
TEXTS = st.sampled_from("s s S `s` 'a' 'ab' 'A' '' 'it''s' lower(s) upper(s) coalesce(s,'a') null".split())
COMPARED = st.sampled_from(["=", "!=", "<>", "<", "<=", ">", ">=", "=="])
NOT = st.sampled_from(["", "not "])


def comparisons(values: st.SearchStrategy[str], literals: list[str]) -> st.SearchStrategy[str]:
    return st.one_of(
        st.builds("{} {} {}".format, values, COMPARED, values),
        st.builds("{} {}in ({}, {})".format, values, NOT, *2 * [st.sampled_from(literals)]),
        st.builds("{} {}between {} and {}".format, values, NOT, values, values),
        st.builds("{} is {}null".format, values, NOT),
    )


EXPRESSIONS = st.recursive(
    st.one_of(
        comparisons(NUMBERS, ["-1", "1", "2", "1.5", "3"]),
        comparisons(TEXTS, ["'a'", "'ab'", "''"]),
        st.builds("{} {}like {}".format, TEXTS, NOT, st.sampled_from(["'a%'", "'_'", "'%b%'", "s"])),
        st.sampled_from(["ok", "ok = true", "ok is not false", "true", "not ok", "(n > 1) is true"]),
    ),
    lambda part: st.one_of(
        st.builds("{} AND {}".format, part, part),
        st.builds("{} or {}".format, part, part),
        st.builds("not {}".format, part),
        st.builds("({})".format, part),
    ),
    max_leaves=6,
)


@settings(max_examples=80)
@given(EXPRESSIONS)
def test_a_filter_finds_what_a_reference_finds(table: Table, where: str) -> None:
    assert table.found(where) == table.expected(where)


PIECES = st.sampled_from(
    [" ", ",", "(", ")", "and", "or", "not", "=", "1", "'a'", "n", "s", "in", "null", "--", ";", "is"]
)


@st.composite
def spoiled(draw: st.DrawFn) -> str:
    """An expression with a part cut out or something put in."""
    where = draw(EXPRESSIONS)
    start, end = sorted(draw(st.tuples(st.integers(0, len(where)), st.integers(0, len(where)))))
    if draw(st.booleans()):
        return where[:start] + where[end:]
    return f"{where[:start]} {draw(PIECES)} {where[start:]}"


@settings(max_examples=150)
@given(spoiled())
def test_a_spoiled_filter_finds_what_all_of_it_says_or_is_refused(table: Table, where: str) -> None:
    try:
        found = table.found(where)
    except MucoError as error:
        assert "the filter" in str(error)
    else:
        assert not where.strip() or found == table.expected(where)


WORDS = st.sampled_from("n id `a` ( ) = < and or not in like is null 'x' 1 -2.5 , lower( between ; -- + select".split())


@pytest.mark.slow
@settings(max_examples=60)
@given(st.one_of(st.text(max_size=40), st.lists(WORDS, max_size=12).map(" ".join)))
def test_any_filter_gives_rows_or_one_sentence(plain: Index, where: str) -> None:
    try:
        hits = plain.search(like="r00000", where=where, k=3)
    except MucoError as error:
        assert "filter" in str(error)
    else:
        assert all(isinstance(hit, Hit) for hit in hits)
    assert len(plain) == 20


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Index:
    return filled(tmp_path_factory.mktemp("plain") / "index", "float32", unit(np.random.default_rng(0), 20))


IDS = st.text(
    st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("'\"`\\%_;-\n\0")), min_size=1, max_size=12
)


@settings(max_examples=10)
@given(st.lists(IDS, min_size=2, max_size=6, unique=True))
def test_any_id_is_found_and_deleted_and_no_other(folders, ids: list[str]) -> None:
    index = filled(folders.mktemp("ids") / "index", "float32", unit(np.random.default_rng(0), len(ids)), ids)
    for id in ids:
        assert [row["id"] for row in index.rows_where("id", [id], ["id"]).to_pylist()] == [id]
        assert {hit.id for hit in index.search(like=id)} == {*ids} - {id}
        assert [hit.id for hit in index.search(like=ids[0], where=f"id = {quoted(id)}")] == [id] * (id != ids[0])
    assert index.delete(ids[:1]) == 1
    assert {id for part in index.ids() for id in part} == {*ids[1:]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tmp_path_factory


# ── the commands ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_from_files_to_hits(scenes: Path, tiny_path: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    images, index = scenes / "images/test", tmp_path / "index"
    monkeypatch.setenv("COLUMNS", "200")

    def here(*arguments: str | Path, code: int = 0) -> tuple[str, str]:
        assert main([*map(str, arguments)]) == code
        return capsys.readouterr()

    found = json.loads(here("index", images, "--model", tiny_path, "--index", index, "--json")[0])
    assert (found["encoded"], found["total"]) == (16, 16)
    image = images / "00003.png"
    out, _ = here("search", "--index", index, "--image", image, "-k", "3", "--exact", "--json")
    hits = [json.loads(line) for line in out.splitlines()]
    assert len(hits) == 3 and hits[0]["id"] == "00003.png" and hits[0]["score"] == pytest.approx(1, abs=1e-6)
    assert here("index", "--index", index, "--delete", "00003.png", "--json")[0] == '{"deleted": 1, "total": 15}\n'
    table, _ = here("search", "-i", index, "--image", image, "--text", "what is it?", "--where", "id < '00003'")
    assert "00002.png" in table and "00003.png" not in table and "score" in table
    out, bad = here("search", "-i", index, "--text", "x", "--where", "id = 1; drop", code=1)
    assert bad.splitlines()[-1].startswith("muco: the filter: ';") and not out
    assert "no index there" in here("search", "-i", images, "--text", "x", code=1)[1]
    assert "pass an INPUT" in here("index", "-i", index, code=2)[1]


JPEG = io.BytesIO()
Image.new("RGB", (20, 10), "red").save(JPEG, "JPEG")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM_PROGRAM": "iTerm.app"}, "iterm2"),
        ({"LC_TERMINAL": "iTerm2"}, "iterm2"),
        ({"TERM": "xterm-kitty", "TMUX": "/tmp/x"}, None),
        ({"TERM": "screen.xterm", "TERM_PROGRAM": "WezTerm"}, None),
        ({"TERM": "xterm-256color"}, None),
        ({}, None),
    ],
)
def test_which_terminal_shows_pictures(environment: dict, expected: str | None) -> None:
    assert protocol(environment, SimpleNamespace(isatty=lambda: True)) == expected
    assert protocol(environment, io.StringIO()) is None


def test_pictures_are_whole() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (100, 100, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, "JPEG")
    parts = picture(stream.getvalue(), "kitty").split("\x1b\\")[:-1]
    heads, data = zip(*(part.removeprefix("\x1b_G").split(";") for part in parts), strict=True)
    assert heads[0].startswith("a=T,f=100") and [head[-1] for head in heads] == ["1"] * (len(heads) - 1) + ["0"]
    with Image.open(io.BytesIO(base64.b64decode("".join(data)))) as image:
        assert image.size == (100, 100) and len(heads) > 1
    assert base64.b64decode(picture(JPEG.getvalue(), "iterm2").rsplit(":", 1)[1][:-1]) == JPEG.getvalue()


def test_a_strangers_text_does_not_steer_the_terminal() -> None:
    hits = [Hit("a\x1b[2J", 0.5, "one\ntwo\x07\u202e [bold]x[/bold]", None, JPEG.getvalue(), {"k\x1b": "\x9b31m"})]
    stream = io.StringIO()
    show_hits(hits, Console(file=stream, width=200))
    assert not {"\x1b", "\x07", "\x9b", "\u202e"} & {*stream.getvalue()}
    assert "one two" in stream.getvalue() and "[bold]x[/bold]" in stream.getvalue()
    show_hits(hits, Console(file=stream, width=200), "kitty")
    assert "\x1b_Ga=T" in stream.getvalue()


@pytest.mark.parametrize("width", [20, 200])
def test_the_name_of_a_column_is_no_markup(width: int) -> None:
    stream = io.StringIO()
    show_hits([Hit("a", 0.5, "text", None, None, {"[/red]": 1, "[bold]": 2})], Console(file=stream, width=width))
    assert "[/red]" in stream.getvalue() and "[bold]" in stream.getvalue()


@pytest.mark.parametrize("width", [20, 40, 60, 80, 120, 240])
@pytest.mark.parametrize("columns", [0, 1, 12])
def test_names_and_numbers_are_whole_however_narrow_the_terminal_is(width: int, columns: int) -> None:
    extra = {f"column{c}": 123_000 + c for c in range(columns)} | {"word": "unbreakable-word", "empty": None}
    texts = ("a red ring on a wooden table, seen from above", "blue")
    hits = [Hit(f"photo-{i}", 0.91 - i / 10, text, f"images/2020/{i}.jpg", None, extra) for i, text in enumerate(texts)]
    stream = io.StringIO()
    show_hits(hits, Console(file=stream, width=width))
    lines = stream.getvalue().splitlines()
    words = "photo-0 photo-1 0.9100 0.8100 images/2020/1.jpg score id text word unbreakable-word above blue"
    for word in [*words.split(), *(word for name in extra if name != "empty" for word in (name, str(extra[name])))]:
        assert any(re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", line) for line in lines), word
    assert "empty" not in stream.getvalue() and "…" not in stream.getvalue()
    if "┃" in stream.getvalue():
        assert max(map(cell_len, lines)) <= width
    assert ("┃" in stream.getvalue()) == (width >= {0: 120, 1: 120, 12: 240}[columns])


# ── for programs ─────────────────────────────────────────────────────────────────────────────────────────────────────


@given(st.integers(1, 40), st.integers(1, 200), st.integers(0, 1000))
def test_a_cosine_is_at_most_one(rows: int, dimension: int, seed: int) -> None:
    vectors = np.random.default_rng(seed).standard_normal((rows, dimension)).astype(np.float32)
    for query in (*vectors, *-vectors):
        query = query / np.linalg.norm(query)
        exact = vectors.astype(np.float64) @ query / np.linalg.norm(vectors.astype(np.float64), axis=1)
        found = scores(vectors, query)
        assert abs(found).max() <= 1
        np.testing.assert_allclose(found, exact, rtol=0, atol=1e-6)


def test_what_is_printed_for_programs_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    nan, infinity = float("nan"), float("-inf")
    result = {
        "score": nan,
        "list": [1.5, infinity, (nan,)],
        "of": {"x": nan},
        "numpy": [np.float32(0.5), np.int64(3), np.array([1.0, nan])],
        "day": date(2020, 1, 2),
        "name": "ü\udcff",
    }
    finish(result, True, lambda *_: None)
    printed = capsys.readouterr().out
    printed.encode()
    plain = {"score": None, "list": [1.5, None, [None]], "of": {"x": None}, "numpy": [0.5, 3, [1.0, None]]}
    plain |= {"day": "2020-01-02", "name": "ü\udcff"}
    assert json.loads(printed, parse_constant=pytest.fail) == plain and printed.count("\n") == 1


def test_a_closed_stdout_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)  # as Python has it after ``>&-``
    finish({"name": "ü"}, True, lambda *_: None)


@given(st.integers(1, 40), st.integers(1, 200), st.integers(0, 1000))
def test_equal_vectors_have_equal_scores(rows: int, dimension: int, seed: int) -> None:
    one, query = np.random.default_rng(seed).standard_normal((2, dimension)).astype(np.float32)
    assert len(np.unique(scores(np.repeat(one[None], rows, axis=0), query))) == 1


def test_hits_as_json_say_null_for_nan(
    tmp_path: Path, tiny_model, tiny_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = Index.create(tmp_path / "index", tiny_model, model_path=tiny_path)
    index.add([{"id": str(n), "text": "a red ring", "n": value} for n, value in enumerate((float("nan"), 1.5, None))])
    query = {"text": "a red ring", "image": None, "like": None, "k": 10, "where": None, "exact": False, "model": None}
    cli.search(str(tmp_path / "index"), **query, as_json=True)
    hits = [json.loads(line, parse_constant=pytest.fail) for line in capsys.readouterr().out.splitlines()]
    assert [hit["extra"]["n"] for hit in hits] == [None, 1.5, None] and max(hit["score"] for hit in hits) <= 1
