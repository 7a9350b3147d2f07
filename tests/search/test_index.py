"""muco index: the table says what the input says, whatever was there before, was killed, renamed or broken."""

from __future__ import annotations

import datetime
import decimal
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from zoneinfo import ZoneInfo

import datasets
import numpy as np
import pandas as pd
import polars as pl
import processes
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import muco
from muco.base.files import locked
from muco.cli import main
from muco.data.items import Row, open_items
from muco.dialogue import Content
from muco.errors import DataError, MucoError, OutputError, StorageError
from muco.search import Index, build
from muco.search.columns import add_kinds, conform, in_json
from muco.search.encode import taken_place
from muco.search.lance import connect
from muco.search.rows import Entry
from muco.search.storage import STORAGES, scores
from muco.search.update import _table

ROOT = Path(__file__).parents[2]


def run(source: Path, folder: Path, model, **kwargs) -> dict:
    return build(source, folder, model, **{"progress": False, **kwargs})


def write_jsonl(path: Path, rows: list) -> Path:
    lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    return path


def contents(folder: Path) -> tuple[list[dict], np.ndarray]:
    """Rows by id without their vectors; the vectors, decoded."""
    index = Index.open(folder)
    table = index.table.to_arrow().sort_by("id")
    vectors = index.storage.vectors(table, index.dimension)
    return table.drop_columns([*index.storage.columns]).to_pylist(), vectors


def same(one: Path, other: Path) -> None:
    (rows, vectors), (expected_rows, expected) = contents(one), contents(other)
    assert rows == expected_rows
    np.testing.assert_allclose(vectors, expected, atol=1e-6)


@pytest.fixture
def photos(scenes: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(scenes / "images/test", tmp_path / "photos"))


@pytest.fixture(scope="module")
def model_path(tiny_path) -> Path:
    return tiny_path


# ── what is in the table ─────────────────────────────────────────────────────────────────────────────────────────────


def test_a_folder_of_images(photos: Path, tmp_path: Path, tiny_model, capsys: pytest.CaptureFixture[str]) -> None:
    (photos / "phone.HEIC").write_bytes(b"not read")
    found = run(photos, tmp_path / "index", tiny_model)
    assert (found["rows"], found["encoded"], found["failed"], found["total"], found["errors"]) == (16, 16, 0, 16, None)
    assert found["passed_over"] == {".heic": 1} and not capsys.readouterr().err
    rows, vectors = contents(tmp_path / "index")
    names = sorted(p.name for p in photos.glob("*.png"))
    assert [row["id"] for row in rows] == [row["image"] for row in rows] == names
    assert all(row["text"] is None and len(row["content_hash"]) == 64 for row in rows)
    np.testing.assert_allclose(vectors, tiny_model.encode([photos / name for name in names]), atol=1e-6)
    assert all(row["thumbnail"].startswith(b"\xff\xd8") and len(row["thumbnail"]) < 20_000 for row in rows)


def test_what_the_metadata_say(photos: Path, tmp_path: Path, tiny_model, model_path: Path) -> None:
    run(photos, tmp_path / "index", model_path, dimension=16, storage="float16")
    index = Index.open(tmp_path / "index")
    assert (index.fingerprint, index.version, index.dimension) == (tiny_model.fingerprint, muco.__version__, 16)
    assert index.model_path == str(model_path.resolve()) and index.storage.name == "float16"
    assert json.loads(index.prompt) == tiny_model.encoder.muco_processor.settings()["template"]
    assert index.model.fingerprint == tiny_model.fingerprint and len(index) == 16


RECORDS = [
    {"id": "a", "text": "a red star", "year": 2020, "tags": ["x", "y"], "size": 1, "ok": True, "mixed": 1},
    {"id": "b'\"`", "text": "a blue ring", "year": None, "size": 2.5, "mixed": "two"},
    {"id": "ü", "text": "nothing", "year": 1999, "ok": False, "note": "näh"},
]
EXTRA = [
    {"mixed": "1", "note": None, "ok": True, "size": 1.0, "tags": '["x", "y"]', "year": 2020},
    {"mixed": "two", "note": None, "ok": None, "size": 2.5, "tags": None, "year": None},
    {"mixed": None, "note": "näh", "ok": False, "size": None, "tags": None, "year": 1999},
]


def test_further_columns_of_jsonl(tmp_path: Path, tiny_model) -> None:
    run(write_jsonl(tmp_path / "rows.jsonl", RECORDS), tmp_path / "index", tiny_model)
    index = Index.open(tmp_path / "index", tiny_model)
    hits = index.search(text="a red star")
    assert {hit.id: hit.extra for hit in hits} == dict(zip(["a", "b'\"`", "ü"], EXTRA, strict=True))
    assert hits[0].id == "a" and hits[0].text == "a red star" and hits[0].score == pytest.approx(1, abs=1e-6)


def test_further_columns_of_parquet_and_images_as_bytes(photos: Path, tmp_path: Path, tiny_model) -> None:
    files = sorted(photos.iterdir())[:3]
    table = pa.table(
        {
            "key": [5, 6, 7],
            "picture": [file.read_bytes() for file in files],
            "day": [datetime.date(2020, 1, n) for n in (1, 2, 3)],
            "kind": pa.array(["x", "y", "x"]).dictionary_encode(),
            "nested": [{"a": 1}, None, {"a": 2}],
            "raw": [b"1", b"2", b"3"],
        }
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    run(tmp_path / "rows.parquet", tmp_path / "index", tiny_model, image_column="picture", id_column="key")
    index = Index.open(tmp_path / "index", tiny_model)
    hits = {hit.id: hit for hit in index.search(image=files[0], where="day < date '2020-01-03' and kind = 'x'")}
    assert hits.keys() == {"5"} and hits["5"].score == pytest.approx(1, abs=1e-6) and hits["5"].thumbnail
    assert hits["5"].extra == {"day": datetime.date(2020, 1, 1), "kind": "x", "nested": '{"a": 1}'}


def test_images_of_a_row_are_part_of_its_vector(photos: Path, tmp_path: Path, tiny_model) -> None:
    one, two, *_ = (str(path) for path in sorted(photos.iterdir()))
    rows = [
        {"id": "one", "text": "a ring", "images": [one]},
        {"id": "two", "text": "a ring", "image": [one, two]},
        {"id": "other order", "text": "a ring", "images": [two, one]},
        {"id": "same", "text": "a ring", "image": one},
        {"id": "text", "text": "a ring"},
    ]
    found = run(write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "index", tiny_model)
    assert (found["encoded"], found["reused"], found["failed"]) == (4, 1, 0)
    index = Index.open(tmp_path / "index", tiny_model)
    assert "images" not in index.extra_columns
    expected = tiny_model.encode(
        [{"text": "a ring", "images": images} for images in ([one], [one, two], [two, one], [one], [])]
    )
    table = index.table.to_arrow()
    at = {id: i for i, id in enumerate(table.column("id").to_pylist())}
    vectors = index.storage.vectors(table, index.dimension)[[at[row["id"]] for row in rows]]
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    assert index.search(like="two")[0].thumbnail
    assert run(tmp_path / "rows.jsonl", tmp_path / "index", tiny_model)["unchanged"] == 5


def test_a_row_may_be_a_video(photos: Path, tmp_path: Path, tiny_model) -> None:
    for name, side in (("1.png", 40), ("2.png", 50), ("10.png", 60)):  # in natural order
        Image.new("RGB", (40, 60), (side, 2 * side, 0)).save(_made(tmp_path / "clip") / name)
    frames = [str(tmp_path / "clip" / f"{number}.png") for number in (1, 2, 10)]
    photo = str(next(photos.iterdir()))
    rows = [
        {"id": "folder", "video": "clip"},
        {"id": "list", "video": frames},
        {"id": "two", "text": "a ring", "image": photo, "video": {"source": frames, "frames": 2, "fps": 4}},
        {"id": "missing", "video": "none"},
        {"id": "image", "image": frames[0]},
    ]
    found = run(write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "index", tiny_model)
    assert (found["encoded"], found["reused"], found["failed"]) == (3, 1, 1)
    index = Index.open(tmp_path / "index", tiny_model)
    table = index.table.to_arrow()
    vectors = dict(zip(table["id"].to_pylist(), index.storage.vectors(table, index.dimension), strict=True))
    both = {"text": "a ring", "images": [photo], "video": {"source": [frames[0], frames[2]], "fps": 2}}
    expected = tiny_model.encode([{"video": frames}, {"video": frames}, both, {"image": frames[0]}])
    np.testing.assert_allclose([vectors[id] for id in ("folder", "list", "two", "image")], expected, atol=1e-5)
    assert index.search(like="folder")[0].thumbnail
    given = [
        {"id": "given", "video": {"source": [Image.open(frame) for frame in frames]}},
        {"id": "g", "video": frames},
    ]
    index.add(given)
    assert {hit.id for hit in index.search(like="folder", k=4)} >= {"list", "given", "g"}


def _made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


def test_a_row_that_cannot_be_stored_stops_no_other(tmp_path: Path, tiny_model) -> None:
    lines = [
        {"id": "a", "text": "a", "note": "fine"},
        '{"id": "half", "text": "b", "note": ["\\ud800"]}',
        '{"id": "name", "text": "c", "no\\udfffte": 1}',
        '{"id": "nan", "text": "d", "note": NaN}',
        '{"text": "e", "note": ' + "[" * 100_000 + "]" * 100_000 + "}",
        {"id": "turns", "turns": [{"query": "q", "target": "t"}]},
        {"id": "z", "text": "z"},
    ]
    found = run(write_jsonl(tmp_path / "rows.jsonl", lines), tmp_path / "index", tiny_model)
    assert (found["encoded"], found["failed"]) == (2, 5)
    notes = [json.loads(line) for line in Path(found["errors"]).read_text("utf-8").splitlines()]
    says = {note["where"]: (note["id"], note["reason"]) for note in notes}
    assert says["rows.jsonl:2"][0] == "half" and says["rows.jsonl:2"][1].startswith("'note' holds half a character")
    assert says["rows.jsonl:3"][1].endswith("repair the text") and "NaN is not JSON" in says["rows.jsonl:4"][1]
    assert "nested too deep" in says["rows.jsonl:5"][1] and says["rows.jsonl:6"][1].startswith("a dialogue")
    index = Index.open(tmp_path / "index", tiny_model)
    assert list(index.extra_columns) == ["note"]
    added = index.add([{"id": "b", "text": "b", "note": "\ud800"}, {"id": "c", "text": "c", "images": []}])
    assert (added["encoded"], added["failed"]) == (1, 1) and "half" in added["errors"][0]["reason"]


@pytest.mark.parametrize("name", ["vector", "thumbnail", "_distance", "a.b", "a`b", ""])
def test_a_column_that_cannot_be_is_refused(name: str, tmp_path: Path, tiny_model) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", [{"text": "a", name: 1}])
    with pytest.raises(DataError, match="; rename"):
        run(source, tmp_path / "index", tiny_model)
    assert not (tmp_path / "index").exists()


# ── again ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_again_costs_nothing_and_only_what_is_new_is_encoded(photos: Path, tmp_path: Path, tiny_model) -> None:
    index = tmp_path / "index"
    run(photos, index, tiny_model)
    before = contents(index)[0]
    version = Index.open(index).table.version
    again = run(photos, index, tiny_model)
    assert (again["encoded"], again["unchanged"]) == (0, 16) and contents(index)[0] == before
    assert Index.open(index).table.version == version  # and nothing was written

    first, second, third, *_ = sorted(photos.iterdir())
    shutil.copy(third, first)  # changed, to what another row has
    second.rename(photos / "renamed.png")
    (photos / "new.png").write_bytes(_png(7))
    third.unlink()
    again = run(photos, index, tiny_model)
    assert (again["rows"], again["encoded"], again["reused"], again["unchanged"]) == (16, 1, 2, 13)
    assert (again["total"], again["deleted"]) == (18, 0)  # the renamed and the deleted one are still there
    found = run(photos, index, tiny_model, delete_missing=True)
    assert (found["deleted"], found["total"]) == (2, len(Index.open(index, model=tiny_model)))
    run(photos, tmp_path / "whole", tiny_model)
    same(index, tmp_path / "whole")


def _png(seed: int) -> bytes:
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_changed_column_is_written_without_encoding(tmp_path: Path, tiny_model) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", RECORDS)
    run(source, tmp_path / "index", tiny_model)
    write_jsonl(source, [RECORDS[0] | {"year": 2021, "colour": "red"}, *RECORDS[1:]])
    found = run(source, tmp_path / "index", tiny_model)
    assert (found["encoded"], found["reused"], found["unchanged"]) == (0, 1, 2)
    rows = {row["id"]: row for row in contents(tmp_path / "index")[0]}
    assert (rows["a"]["year"], rows["a"]["colour"], rows["ü"]["colour"]) == (2021, "red", None)
    write_jsonl(source, [{"id": "a", "text": "a", "year": "twenty"}])
    with pytest.raises(DataError, match=r"'year' is string, and int64 in the index"):
        run(source, tmp_path / "index", tiny_model)


def test_rows_without_an_id_that_replace_others_are_said(tmp_path: Path, tiny_model, caplog) -> None:
    """Their numbers are those of another file's rows, perhaps."""
    first = write_jsonl(tmp_path / "first.jsonl", [{"text": "one"}, {"text": "two"}, {"id": "x", "text": "three"}])
    run(first, tmp_path / "index", tiny_model)
    run(first, tmp_path / "index", tiny_model)
    assert "without an id" not in caplog.text
    run(
        write_jsonl(tmp_path / "other.jsonl", [{"text": "1", "id": " "}, {"text": "two"}]),
        tmp_path / "index",
        tiny_model,
    )
    assert "1 rows without an id have replaced rows of the same number" in caplog.text
    caplog.clear()
    run(write_jsonl(tmp_path / "ids.jsonl", [{"id": 0, "text": "2"}]), tmp_path / "index", tiny_model)
    assert "without an id" not in caplog.text


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_folder_of_shards_is_one_input(kind: str, photos: Path, tmp_path: Path, tiny_model) -> None:
    names = sorted(path.name for path in photos.iterdir())
    rows = [{"image": f"photos/{name}", "text": f"t{n}", "n": n} for n, name in enumerate(names)]
    folder = tmp_path / "shards"
    folder.mkdir()
    for number, part in enumerate((rows[:5], rows[5:6], rows[6:])):
        absolute = [row | {"image": str(tmp_path / row["image"])} for row in part]
        file = folder / f"part-{number}.{kind}"
        if kind == "jsonl":
            write_jsonl(file, absolute)
        else:
            last = {} if number != 1 else {"n": None}  # no value, so no type either
            pq.write_table(pa.Table.from_pylist([row | last for row in absolute]), file)
    found = run(folder, tmp_path / "index", tiny_model)
    assert (found["rows"], found["encoded"], found["failed"]) == (16, 16, 0)
    kept, _ = contents(tmp_path / "index")
    expected = {str(n): None if kind == "parquet" and n == 5 else n for n in range(16)}
    assert {row["id"]: row["n"] for row in kept} == expected
    assert run(folder, tmp_path / "index", tiny_model, delete_missing=True)["unchanged"] == 16
    items = open_items(folder)
    assert [row.number for row in items.rows(4)] == [*range(4, 16)]
    assert [row.where for row in items.rows(5)][0].startswith(f"part-1.{kind}")
    before = items.fingerprint
    (folder / f"part-2.{kind}").rename(folder / f"part-9.{kind}")
    assert open_items(folder).fingerprint != before


def test_shards_that_do_not_fit_are_refused(tmp_path: Path, tiny_model) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": "a", "n": 1}])
    pq.write_table(pa.table({"text": ["a"], "n": [1]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match="has both JSONL and Parquet files; keep one kind"):
        run(tmp_path, tmp_path / "index", tiny_model)
    (tmp_path / "a.jsonl").unlink()
    pq.write_table(pa.table({"text": ["a"], "n": ["1"]}), tmp_path / "c.parquet")
    with pytest.raises(DataError, match=r"c\.parquet: the column 'n' is string, and int64 in .*b\.parquet"):
        run(tmp_path, tmp_path / "index", tiny_model)
    (tmp_path / "b.parquet").unlink()
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "c.parquet")
    with pytest.raises(DataError, match="its 1 files have no rows"):
        run(tmp_path, tmp_path / "index", tiny_model)


def test_shards_as_other_programs_leave_them_are_read(tmp_path: Path, tiny_model) -> None:
    pq.write_table(pa.table({"text": ["a"], "n": pa.array([1], pa.int32())}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": pa.array([], pa.string()), "n": pa.array([], pa.int8())}), tmp_path / "b.parquet")
    pq.write_table(pa.table({"text": ["c"], "n": [0.5]}), tmp_path / "c.parquet")
    (tmp_path / "._a.parquet").write_bytes(b"of another system")
    (tmp_path / "d.parquet").mkdir()
    run(tmp_path, tmp_path / "index", tiny_model)
    rows, _ = contents(tmp_path / "index")
    assert [(row["id"], row["n"]) for row in rows] == [("0", 1.0), ("1", 0.5)]


def test_equal_contents_are_encoded_once(tmp_path: Path, tiny_model) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", [{"text": f"text {i % 4}"} for i in range(600)])
    found = run(source, tmp_path / "index", tiny_model)
    assert (found["encoded"], found["reused"], found["total"]) == (4, 596, 600)
    _, vectors = contents(tmp_path / "index")
    assert len(np.unique(vectors.round(5), axis=0)) == 4


def test_an_interrupted_run_keeps_what_it_has_encoded(tmp_path: Path, tiny_model, monkeypatch) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", [{"text": f"text {i}"} for i in range(80)])
    encode, calls = tiny_model.encode, []

    def interrupted(*given, **named):
        calls.append(given)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(*given, **named)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(tiny_model, "encode", interrupted)
        run(source, tmp_path / "index", tiny_model)
    again = run(source, tmp_path / "index", tiny_model)
    assert (again["unchanged"], again["encoded"], again["total"]) == (64, 16, 80)


@pytest.mark.parametrize("storage", ["float16", "binary"])
def test_a_stored_vector_is_stored_the_same_again(storage: str, photos: Path, tmp_path: Path, tiny_model) -> None:
    run(photos, tmp_path / "index", tiny_model, storage=storage)
    before = contents(tmp_path / "index")[1]
    for file in photos.iterdir():
        file.rename(photos / f"x{file.name}")
    assert run(photos, tmp_path / "index", tiny_model, delete_missing=True)["reused"] == 16
    np.testing.assert_array_equal(contents(tmp_path / "index")[1], before)


def test_rows_are_deleted_by_id(tmp_path: Path, tiny_model) -> None:
    run(write_jsonl(tmp_path / "rows.jsonl", RECORDS), tmp_path / "index", tiny_model)
    index = Index.open(tmp_path / "index")
    assert index.delete(["b'\"`", "not there"]) == 1
    assert [row["id"] for row in contents(tmp_path / "index")[0]] == ["a", "ü"]


def test_the_command_names_ids_that_it_cannot_delete(tmp_path: Path, tiny_model, capsys) -> None:
    run(write_jsonl(tmp_path / "rows.jsonl", RECORDS), tmp_path / "index", tiny_model)
    assert main(["index", "--index", str(tmp_path / "index"), "--delete", "a", "--delete", "not there", "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["deleted"] == 1 and said.err == f"{tmp_path / 'index'}: no row has the id 'not there'\n"


def test_ids_to_delete_or_to_be_like_are_those_that_add_takes(tmp_path: Path, tiny_model) -> None:
    index = Index.create(tmp_path / "index", tiny_model)
    index.add([{"id": id, "text": f"row {id}"} for id in (0, 1, 2, 10, uuid.UUID(int=3))])
    assert {hit.id for hit in index.search(like=0)} == {"1", "2", "10", str(uuid.UUID(int=3))}
    assert index.search(like=uuid.UUID(int=3), k=1)[0].id != str(uuid.UUID(int=3))
    assert index.delete(id for id in (0, uuid.UUID(int=3))) == 2
    assert index.delete(np.array([1])) == 1
    with pytest.raises(DataError, match="pass a list of ids, not one str"):
        index.delete("10")  # else rows 1 and 0
    for id, says in ((None, "'id' is missing"), (1.5, "'id' must be text"), ("\ud800", "half a character")):
        with pytest.raises(DataError, match=says):
            index.delete([id])
    with pytest.raises(DataError, match="half a character"):
        index.search(like="\ud800")
    assert len(index) == 2


def test_rows_are_added_in_python(photos: Path, tmp_path: Path, tiny_model) -> None:
    index = Index.create(tmp_path / "index", tiny_model)
    image = sorted(photos.iterdir())[0]
    rows = [{"id": "a", "text": "a red star", "year": 1}, {"id": "b", "image": image.read_bytes()}, {"id": "c"}]
    found = index.add(rows)
    assert (found["encoded"], found["failed"], found["total"]) == (2, 1, 2) and found["errors"][0]["id"] == "c"
    assert index.add(rows[:2])["unchanged"] == 2
    assert index.search(image=image, k=1)[0].id == "b" and index.search(like="b")[0].extra == {"year": 1}
    with pytest.raises(DataError, match="row 0: 'id' is missing"):
        index.add([{"text": "no id"}])


# ── types of further columns ─────────────────────────────────────────────────────────────────────────────────────────

BERLIN = ZoneInfo("Europe/Berlin")
NOON = datetime.datetime(2020, 1, 2, 12, 30)
TYPED = {  # what is given, what comes back, and what JSON says
    "whole": (np.int64(2020), 2020, 2020),
    "float": (np.float32(0.5), 0.5, 0.5),
    "truth": (np.bool_(True), True, True),
    "day": (datetime.date(2020, 1, 2), datetime.date(2020, 1, 2), "2020-01-02"),
    "naive": (NOON, NOON, "2020-01-02T12:30:00"),
    "zoned": (NOON.replace(tzinfo=BERLIN), NOON.replace(hour=11, tzinfo=datetime.UTC), "2020-01-02T11:30:00Z"),
    "numpy_day": (np.datetime64("2020-01-02"), datetime.date(2020, 1, 2), "2020-01-02"),
    "numpy_time": (np.datetime64(NOON, "ns"), NOON, "2020-01-02T12:30:00"),
    "pandas": (pd.Timestamp(NOON), NOON, "2020-01-02T12:30:00"),
    "clock": (datetime.time(12, 30), datetime.time(12, 30), "12:30:00"),
    "long": (datetime.timedelta(minutes=1), datetime.timedelta(minutes=1), 60.0),
    "price": (decimal.Decimal("1.50"), decimal.Decimal("1.50"), "1.50"),
    "large": (2**64, decimal.Decimal(2**64), str(2**64)),
    "uuid": (uuid.UUID(int=1), str(uuid.UUID(int=1)), str(uuid.UUID(int=1))),
    "path": (Path("a/b"), "a/b", "a/b"),
    "text": (np.str_("ä"), "ä", "ä"),
    "list": ([np.int64(1), NOON, None], '[1, "2020-01-02T12:30:00", null]', '[1, "2020-01-02T12:30:00", null]'),
    "array": (np.arange(2), "[0, 1]", "[0, 1]"),
    "infinite": (float("inf"), float("inf"), None),
    "nan": (float("nan"), None, None),
}


def test_what_is_given_stays_what_it_is_and_can_be_compared(tmp_path: Path, tiny_model) -> None:
    index = Index.create(tmp_path / "index", tiny_model)
    given = {name.replace("text", "words"): value for name, (value, _, _) in TYPED.items()}
    row = {"id": "1", "text": "a", **given}
    assert index.add([row, {"id": "2", "text": "b"}])["errors"] == []
    assert index.add([row])["unchanged"] == 1
    extra = index.search("a", k=1)[0].extra
    for name, (_, back, said) in TYPED.items():
        name = name.replace("text", "words")
        assert extra.get(name) == back and type(extra.get(name)) is type(back), name
        assert in_json(extra.get(name)) == said
    json.dumps(in_json(extra), allow_nan=False)
    for where in (
        "whole >= 2000",
        "whole > 2019.5",
        "float = 0.5",
        "truth",
        "day >= date '2020-01-01' and day < date '2020-02-01'",
        "naive > timestamp '2020-01-02 12:00:00'",
        "zoned = timestamp '2020-01-02T12:30:00+01:00'",
        "zoned = timestamp '2020-01-02 11:30:00'",
        "price = 1.5 and price > 1.499 and price in (1.5, 2) and 2 > price",
        "large > 18446744073709551615.5",
        "uuid = '00000000-0000-0000-0000-000000000001'",
    ):
        assert [hit.id for hit in index.search("a", where=where)] == ["1"], where
        assert index.search("a", where=f"not ({where})") == []


def test_types_of_parquet_stay(tmp_path: Path, tiny_model) -> None:
    columns = {
        "small": (pa.array([7], pa.int16()), 7),
        "price": (pa.array([decimal.Decimal("1.50")]), decimal.Decimal("1.50")),
        "zoned": (pa.array([NOON.replace(tzinfo=BERLIN)], pa.timestamp("ms", "Europe/Berlin")), TYPED["zoned"][1]),
        "nano": (pa.array([NOON], pa.timestamp("ns")), NOON),
        "day": (pa.array([datetime.date(2020, 1, 2)], pa.date64()), datetime.date(2020, 1, 2)),
        "uuid": (pa.array([uuid.UUID(int=1).bytes], pa.uuid()), str(uuid.UUID(int=1))),
        "large": (pa.array(["a"], pa.large_string()), "a"),
        "kind": (pa.array(["x"]).dictionary_encode(), "x"),
        "nan": (pa.array([float("nan")]), None),
        "null": (pa.nulls(1, pa.string()), None),
    }
    left_out = {"nothing": pa.nulls(1), "bytes": pa.array([b"ab"]), "two bytes": pa.array([b"ab"], pa.binary(2))}
    table = pa.table({"text": ["a"]} | left_out | {name: array for name, (array, _) in columns.items()})
    pq.write_table(table, tmp_path / "rows.parquet")
    run(tmp_path / "rows.parquet", tmp_path / "index", tiny_model)
    index = Index.open(tmp_path / "index", tiny_model)
    assert index.search("a", where="zoned = timestamp '2020-01-02T12:30:00+01:00'")[0].extra == {
        name: back for name, (_, back) in columns.items()
    }
    for where in ("zoned = timestamp 'x'", "zoned > date '2020-13-01'"):
        with pytest.raises(MucoError, match="the filter: .* expected a (date|timestamp) from the year 1 to 9999"):
            index.search("a", where=where)
    assert run(tmp_path / "rows.parquet", tmp_path / "index", tiny_model)["unchanged"] == 1


def test_what_python_has_no_value_for_is_said_and_a_set_has_an_order() -> None:
    with pytest.raises(DataError, match="'x': a column cannot hold a value of type longdouble"):
        conform({"x": np.longdouble(1.5)}, {})
    circle: list = []
    circle.append(circle)
    with pytest.raises(DataError, match="'x': nested too deep"):
        conform({"x": circle}, {"x": pa.string()})
    assert in_json({"x": frozenset("hasty")}) == {"x": ["a", "h", "s", "t", "y"]}  # in every process


DAY = datetime.date(2020, 1, 2)
MIDNIGHT = datetime.datetime(2020, 1, 2)


@pytest.mark.parametrize(
    ("first", "then", "back"),
    [
        (pa.array([2020]), pa.array([7], pa.int32()), [2020, 7]),
        (pa.array([7], pa.int32()), pa.array([2**40]), [7, 2**40]),
        (pa.array([2020]), pa.array([2.5]), [2020, 2.5]),
        (pa.array([2.5]), pa.array([2020]), [2.5, 2020]),
        (pa.array([0.5], pa.float32()), pa.array([0.1]), [0.5, 0.1]),
        (pa.array([2]), pa.array([decimal.Decimal("2.5")]), [2, decimal.Decimal("2.5")]),
        (pa.array([decimal.Decimal("2.5")]), pa.array([decimal.Decimal("100.25")]), [decimal.Decimal("2.5"), 100.25]),
        (pa.array([DAY]), pa.array([NOON]), [MIDNIGHT, NOON]),
        (pa.array([NOON]), pa.array([DAY]), [NOON, MIDNIGHT]),
        (pa.array([NOON], pa.timestamp("ms")), pa.array([NOON]), [NOON, NOON]),
        (pa.array([2020]), pa.nulls(1), [2020, None]),
        (pa.array([2020]), pa.array([float("nan")]), [2020, None]),
        (pa.array(["a"]), pa.nulls(1, pa.float64()), ["a", None]),
        (pa.array(["a"]), pa.array(["b"], pa.large_string()), ["a", "b"]),
    ],
    ids=lambda value: str(value.type) if isinstance(value, pa.Array) else "",
)
def test_a_later_file_whose_values_fit_is_taken(first, then, back: list, tmp_path: Path, tiny_model) -> None:
    for number, values in enumerate((first, then)):
        pq.write_table(pa.table({"id": [str(number)], "text": ["a"], "my x": values}), tmp_path / "rows.parquet")
        assert run(tmp_path / "rows.parquet", tmp_path / "index", tiny_model)["failed"] == 0
    index = Index.open(tmp_path / "index", tiny_model)
    assert [hit.extra["my x"] for hit in index.search("a")] == back
    assert all(not name.startswith("_") for name in index.table.schema.names)


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (1, "one"),
        ("one", 1),
        ("one", DAY),
        (True, 1),
        (2**53 + 1, 0.5),
        (decimal.Decimal("0.1"), 0.5),
        (NOON, NOON.replace(tzinfo=BERLIN)),
        (DAY, 1),
    ],
)
def test_what_does_not_fit_a_column_is_refused(first, then, tmp_path: Path, tiny_model) -> None:
    index = Index.create(tmp_path / "index", tiny_model)
    index.add([{"id": "1", "text": "a", "x": first}])
    with pytest.raises(DataError, match="'x' is .*, and .* in the index; convert or rename it, or make a new index"):
        index.add([{"id": "2", "text": "b", "x": then}])
    assert len(index) == 1 and index.search("a")[0].extra == {"x": first}


def test_a_row_that_does_not_fit_is_listed(tmp_path: Path, tiny_model) -> None:
    index = Index.create(tmp_path / "index", tiny_model)
    rows = [
        {"text": "a", "x": 0.5},
        {"text": "b", "x": 2**53 + 1},
        {"text": "c", "y": object()},
        {"text": "d", "z": b"x"},
    ]
    rows += [
        {"text": "e", "s": "half \ud800"},
        {"text": "f", "x": 10**80},
        {"text": "g", "x": decimal.Decimal("0.1")},
    ]
    found = index.add([{"id": f"r{n}"} | row for n, row in enumerate(rows)])
    assert (found["encoded"], found["failed"]) == (2, 5)
    reasons = {error["id"]: error["reason"] for error in found["errors"]}
    assert reasons["r1"] == "'x': '9007199254740993' does not fit a column of double without loss; convert it"
    assert reasons["r2"].startswith("'y': a column cannot hold a value of type object")
    assert "bytes" in reasons["r3"] and "half of a character" in reasons["r4"] and "76 digits" in reasons["r5"]


@pytest.mark.parametrize("name", ["_wider", "_former"])
def test_a_table_left_by_a_kill_while_a_column_was_widened(name: str, tmp_path: Path, tiny_model) -> None:
    index = Index.create(tmp_path / "index", tiny_model)
    index.add([{"id": "1", "text": "a", "x": 1}])
    index.table.add_columns({name: "CAST(x AS DOUBLE)"})
    row = Row(0, "3", "", "c", vector=np.ones(index.dimension))
    index.write(_table(index, [Entry(row, {"x": 3}, "c", "c")]))  # as another writer does that was there before
    index = Index.open(tmp_path / "index", tiny_model)
    assert index.search("a", where="x = 1")[0].extra == {"x": 1}
    index.add([{"id": "2", "text": "b", "x": 2.5}])
    assert sorted(hit.extra["x"] for hit in index.search("a")) == [1, 2.5, 3]
    assert {"_wider", "_former"}.isdisjoint(index.table.schema.names)


NUMBERS = st.one_of(
    st.integers(-(2**70), 2**70), st.floats(), st.decimals(allow_nan=False, allow_infinity=False, places=3)
)


@given(st.lists(NUMBERS, min_size=1, max_size=5))
def test_numbers_are_kept_exactly_or_refused(values: list) -> None:
    kinds: dict[str, pa.DataType] = {}
    for value in values:
        add_kinds(kinds, {"x": value})
    assert all(not pa.types.is_string(kind) for kind in kinds.values())
    for value in values if kinds else []:
        try:
            kept = pa.array([conform({"x": value}, kinds)["x"]], kinds["x"])[0].as_py()
        except DataError as error:
            assert "without loss" in str(error)
        else:
            exact = kept == value or (isinstance(value, decimal.Decimal) and decimal.Decimal(repr(kept)) == value)
            assert exact or (kept is None and value != value)


# ── what Index.add takes ─────────────────────────────────────────────────────────────────────────────────────────────

FRAME = {"id": ["1", "2"], "text": ["a", "b"], "year": [2020, None]}


@pytest.mark.parametrize(
    "rows",
    [
        pd.DataFrame(FRAME),
        pd.DataFrame(FRAME, index=["x", "y"]).astype({"year": "Int64"}),
        pl.DataFrame(FRAME),
        pa.table(FRAME),
        pa.table(FRAME).to_reader(),
        pa.RecordBatch.from_pydict(FRAME),
        datasets.Dataset.from_dict(FRAME),
        [{"id": "1", "text": "a", "year": 2020}, {"id": "2", "text": "b", "year": pd.NA}],
        ({"id": n, "text": t, "year": 2020 if n == 1 else float("nan")} for n, t in ((1, "a"), (2, "b"))),
        [row for _, row in pd.DataFrame(FRAME).iterrows()],
    ],
    ids=lambda rows: type(rows).__name__,
)
def test_rows_of_every_make(rows, tmp_path: Path, tiny_model) -> None:
    index = Index.create(tmp_path / "index", tiny_model)
    found = index.add(rows)
    assert (found["rows"], found["encoded"], found["errors"]) == (2, 2, [])
    assert {hit.id: hit.extra["year"] for hit in index.search("a")} == {"1": 2020, "2": None}


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ({"id": "1", "text": "a"}, "pass a list of rows"),
        ("rows.jsonl", "pass a list of rows"),
        (None, "a DataFrame or a table of Arrow, not NoneType"),
        (pd.Series(["a"]), "not a table with columns"),
        ([["1", "a"]], "row 0: must be a mapping"),
        ([{"id": "1", "text": "a"}, {"text": "b"}], "row 1: 'id' is missing"),
        ([{"id": float("nan"), "text": "b"}], "row 0: 'id' is missing"),
        ([{"id": " ", "text": "b"}], "row 0: 'id' is missing"),
        ([{"id": True, "text": "b"}], "row 0: 'id' must be text, a whole number or a UUID, not True"),
        ([{"id": 1.0, "text": "b"}], "row 0: 'id' must be text, a whole number or a UUID, not 1.0"),
        ([{"id": ["1"], "text": "b"}], "row 0: 'id' must be text"),
        ([{"id": b"1", "text": "b"}], "row 0: 'id' must be text"),
        ([{"id": "1", "text": "a", 5: 1}], "the name of a column must be text, not 5"),
        ([{"id": "1", "text": "a", "\ud800": 1}], "a column cannot be called"),
        (pd.DataFrame([["1", "a", 1, 2]], columns=["id", "text", "x", "x"]), "two columns are called 'x'"),
        (pa.table([["1"], ["a"], [1], [2]], names=["id", "text", "x", "x"]), "two columns are called 'x'"),
    ],
)
def test_what_are_not_rows_is_refused(rows, says: str, tmp_path: Path, tiny_model) -> None:
    index = Index.create(tmp_path / "index", tiny_model)
    with pytest.raises(DataError, match=re.escape(says)):
        index.add(rows)
    assert len(index) == 0


def test_ids_and_images_as_python_has_them(photos: Path, tmp_path: Path, tiny_model) -> None:
    index = Index.create(tmp_path / "index", tiny_model)
    file = sorted(photos.iterdir())[0]
    with Image.open(file) as picture:
        picture.load()
    rows = [{"id": 0, "image": file}, {"id": np.int64(5), "image": file.read_bytes(), "text": float("nan")}]
    rows += [{"id": uuid.UUID(int=1), "image": picture}, {"id": np.str_("x"), "text": np.str_("a"), "image": pd.NA}]
    rows += [{"id": "none", "text": pd.NaT, "image": None}, {"id": "number", "text": 5}]
    found = index.add(rows)
    assert (found["encoded"] + found["reused"], found["failed"]) == (4, 2)
    assert [error["id"] for error in found["errors"]] == ["none", "number"]
    vectors = {hit.id: hit.score for hit in index.search(image=file)}
    assert vectors.keys() == {"0", "5", str(uuid.UUID(int=1)), "x"}
    assert [vectors[id] for id in ("0", "5", str(uuid.UUID(int=1)))] == pytest.approx([1, 1, 1], abs=1e-5)
    assert index.search(like="5", where="id = '0'")[0].image == str(file)


# ── what goes wrong ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_rows_that_cannot_be_used_are_listed(photos: Path, tmp_path: Path, tiny_model) -> None:
    first, second, *_ = sorted(photos.iterdir())
    first.write_bytes(b"no image")
    second.write_bytes(second.read_bytes()[:300])
    found = run(photos, tmp_path / "index", tiny_model)
    assert (found["encoded"], found["failed"], found["total"]) == (14, 2, 14)
    listed = [json.loads(line) for line in Path(found["errors"]).read_text("utf-8").splitlines()]
    assert [note["id"] for note in listed] == [first.name, second.name] and "broken" in listed[1]["reason"]
    first.write_bytes(_png(1))
    second.write_bytes(_png(2))
    found = run(photos, tmp_path / "index", tiny_model)
    assert (found["encoded"], found["unchanged"], found["errors"]) == (2, 14, None)
    assert not (tmp_path / "index/errors.jsonl").exists()


def test_a_list_of_rows_that_failed_replaces_no_other_file(tmp_path: Path, tiny_model) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", [{"text": "one"}])
    picture = tmp_path / "picture.png"
    picture.write_bytes(_png(1))
    with pytest.raises(OutputError, match=r"cannot be read \(Is a directory\); name another file by --errors"):
        run(source, tmp_path / "index", tiny_model, errors=tmp_path)
    for file in (source, picture):
        with pytest.raises(OutputError, match=rf"{file.name}: this file is not a list .*; name another"):
            run(source, tmp_path / "index", tiny_model, errors=file)
    assert source.read_text() and not (tmp_path / "index").exists()
    errors = tmp_path / "errors.jsonl"
    for row in ("not json", {"id": 7}):
        write_jsonl(source, [{"id": "a", "text": "one"}, row])
        assert run(source, tmp_path / "index", tiny_model, errors=errors)["errors"] == str(errors)
        assert len(errors.read_text("utf-8").splitlines()) == 1


def test_bad_lines_and_ids_given_twice(tmp_path: Path, tiny_model) -> None:
    lines = [{"id": "a", "text": "one"}, "not json", {"id": "a", "text": "two"}, {"text": "<|emb|>"}, {"id": 9}]
    source = write_jsonl(tmp_path / "rows.jsonl", lines)
    found = run(source, tmp_path / "index", tiny_model)
    assert (found["encoded"], found["failed"]) == (1, 4)
    notes = [json.loads(line) for line in (tmp_path / "index/errors.jsonl").read_text("utf-8").splitlines()]
    assert {note["row"] for note in notes} == {1, 2, 3, 4}
    assert "also that of an earlier row" in next(note["reason"] for note in notes if note["row"] == 2)
    with pytest.raises(DataError, match=r"rows\.jsonl:2: malformed JSON.* nothing was deleted"):
        run(source, tmp_path / "index", tiny_model, delete_missing=True)
    with pytest.raises(DataError, match="none of the 1 rows"):
        run(write_jsonl(tmp_path / "bad.jsonl", ["x"]), tmp_path / "other", tiny_model)


def test_another_input_deletes_nothing(photos: Path, tmp_path: Path, tiny_model) -> None:
    """As where the disk with the pictures is gone, and other files are left."""
    folder = tmp_path / "mine"
    shutil.copytree(photos, folder)
    run(folder, tmp_path / "index", tiny_model)
    shutil.rmtree(folder)
    folder.mkdir()
    write_jsonl(folder / "labels.jsonl", [{"text": "a"}, {"text": "b"}])
    before = Index.open(tmp_path / "index").table.version
    for _ in range(2):  # as by a clock: the first run must not make the second pass
        with pytest.raises(DataError, match=r"mine: nothing was changed: the index .* has none of its rows"):
            run(folder, tmp_path / "index", tiny_model, delete_missing=True)
    index = Index.open(tmp_path / "index")
    assert len(index) == 16 and index.table.version == before


def test_a_row_that_cannot_be_read_takes_no_others_id(tmp_path: Path, tiny_model) -> None:
    rows = ["not json", {"id": 5, "text": "five"}, {"id": 0, "text": "zero"}]
    found = run(write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "index", tiny_model)
    assert (found["encoded"], found["failed"]) == (2, 1) and ids_of(tmp_path / "index") == ["0", "5"]


def test_a_failed_row_with_a_known_id_keeps_its_former_version_and_others_are_deleted(
    tmp_path: Path, tiny_model
) -> None:
    source = write_jsonl(
        tmp_path / "rows.jsonl", [{"id": 0, "text": "a"}, {"id": 1, "text": "b"}, {"id": 2, "text": "c"}]
    )
    run(source, tmp_path / "index", tiny_model)
    write_jsonl(source, [{"id": 0, "text": "0"}, {"id": 1, "image": "gone.png"}])
    found = run(source, tmp_path / "index", tiny_model, delete_missing=True)
    assert (found["failed"], found["deleted"], found["total"]) == (1, 1, 2)
    assert "gone.png" in (tmp_path / "index/errors.jsonl").read_text("utf-8")
    write_jsonl(source, [{"id": 0, "text": "0"}, {"id": 1.5, "text": "b"}])
    with pytest.raises(DataError, match=r"rows\.jsonl:2: 'id' must be .* not 1\.5; which id this row has"):
        run(source, tmp_path / "index", tiny_model, delete_missing=True)
    assert "1.5" in (tmp_path / "index/errors.jsonl").read_text("utf-8"), (
        "the list is written before anything is refused"
    )


@pytest.mark.parametrize("name", ["~", "photos:2020", "p:1", "a b", "é%20#?"])
def test_a_folder_of_any_name_is_taken_literally(name: str, tmp_path: Path, tiny_model, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    run(write_jsonl(tmp_path / "rows.jsonl", [{"text": "one"}]), Path(name), tiny_model)
    assert len(Index.open(name)) == 1 and (tmp_path / name / "rows.lance").is_dir()
    assert not (tmp_path / "home").exists()


def test_another_model_dimension_or_storage_is_refused(photos: Path, scenes: Path, tmp_path: Path, tiny_model) -> None:
    from muco.model import from_backbone
    from muco.sizes import TinyConfig
    from muco.tiny import tiny_qwen2_vl

    run(photos, tmp_path / "index", tiny_model)
    sizes = TinyConfig(width=32, layers=1, heads=2, kv_heads=1, feed_forward=32, vision_width=32, vision_depth=1)
    other = from_backbone(*tiny_qwen2_vl(["a", "b"], sizes), device="cpu")
    other.save(str(tmp_path / "other"))
    for use in (lambda: run(photos, tmp_path / "index", tmp_path / "other"), lambda: open_with(tmp_path)):
        with pytest.raises(MucoError) as error:
            use()
        assert tiny_model.fingerprint[:12] in str(error.value) and other.fingerprint[:12] in str(error.value)
        assert "not with " + str(tmp_path / "other") in str(error.value) or "the given model" in str(error.value)
    for wanted in ({"dimension": 16}, {"storage": "binary"}):
        with pytest.raises(OutputError, match=next(iter(wanted))):
            run(photos, tmp_path / "index", tiny_model, **wanted)
    with pytest.raises(MucoError, match="storage must be one of float32, float16, binary, not 'int4'"):
        Index.create(tmp_path / "new", tiny_model, storage="int4")


def open_with(folder: Path) -> Index:
    return Index.open(folder / "index", folder / "other")


def test_what_is_no_index(photos: Path, tmp_path: Path, tiny_model) -> None:
    import lancedb

    with pytest.raises(MucoError, match="no such index; make one with"):
        Index.open(tmp_path / "nothing")
    with pytest.raises(MucoError, match="no index there"):
        Index.open(photos)
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="this is a file"):
        run(photos, tmp_path / "file", tiny_model)
    lancedb.connect(str(tmp_path / "foreign")).create_table("rows", pa.table({"id": ["a"]}))
    with pytest.raises(MucoError, match="was not made by `muco index`"):
        Index.open(tmp_path / "foreign")


def test_a_url_names_an_index(photos: Path, tmp_path: Path, tiny_model) -> None:
    url = (tmp_path / "index").as_uri()
    found = run(photos, url, tiny_model)
    assert found["total"] == 16 and found["errors"] is None
    assert len(Index.open(url, tiny_model).search(like="00001.png", k=3)) == 3


# ── kills, and other ways to the same table ──────────────────────────────────────────────────────────────────────────

KILLED = """
import sys
import muco.search.update as update
update.WRITE_ROWS = 40
update.OPTIMIZE_WRITES = 2
update.build(sys.argv[1], sys.argv[2], sys.argv[3], batch_size=4, progress=False)
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_table(tmp_path: Path, model_path: Path) -> None:
    source = write_jsonl(
        tmp_path / "rows.jsonl", [{"id": f"r{i}", "text": f"row number {i}", "n": i} for i in range(900)]
    )
    Index.create(tmp_path / "loaded", muco.load(model_path, device="cpu"))  # so that the first look below is quick
    command = [sys.executable, "-c", KILLED, str(source), str(tmp_path / "index"), str(model_path)]
    process = processes.Popen(command, cwd=ROOT, stderr=processes.DEVNULL)
    limit = time.monotonic() + 300
    while not [*(tmp_path / "index/rows.lance/_versions").glob("*.manifest")] or not len(
        Index.open(tmp_path / "index")
    ):
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    left = len(Index.open(tmp_path / "index"))
    assert 0 < left < 900 and left % 40 == 0
    found = run(source, tmp_path / "index", model_path)
    assert (found["unchanged"], found["encoded"], found["total"]) == (left, 900 - left, 900)
    run(source, tmp_path / "whole", model_path)
    same(tmp_path / "index", tmp_path / "whole")


def test_leftovers_of_a_kill_while_the_table_was_made(photos: Path, tmp_path: Path, tiny_model) -> None:
    (tmp_path / "index/rows.lance/_versions").mkdir(parents=True)
    assert run(photos, tmp_path / "index", tiny_model)["total"] == 16


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Daft leaves its workers' pipes open
def test_daft_gives_the_same_table(photos: Path, tmp_path: Path, model_path: Path) -> None:
    sorted(photos.iterdir())[3].write_bytes(b"no image")
    files = sorted(photos.iterdir())
    rows = [{"id": str(i), "text": f"text {i}"} for i in range(40)]
    rows += [{"id": file.name, "image": f"photos/{file.name}", "text": "what is it?"} for file in files]
    rows += [{"id": "special", "text": "<|emb|>"}]
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    found = run(source, tmp_path / "daft", model_path, workers=2, batch_size=4)
    assert (found["encoded"], found["failed"]) == (55, 2)
    run(source, tmp_path / "plain", model_path)
    same(tmp_path / "daft", tmp_path / "plain")


def test_each_worker_of_a_machine_takes_a_place_of_its_own(tmp_path: Path) -> None:
    with ThreadPoolExecutor(16) as threads:
        taken = [*threads.map(lambda _: taken_place(tmp_path / "new" / "places"), range(16))]
    assert sorted(taken) == [*range(16)]


def test_workers_need_a_path(photos: Path, tmp_path: Path, tiny_model) -> None:
    with pytest.raises(MucoError, match="pass its path"):
        run(photos, tmp_path / "index", tiny_model, workers=2)


# ── storage ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dimension", [8, 13, 64])
@pytest.mark.parametrize("name", STORAGES)
def test_storage_keeps_cosines(name: str, dimension: int) -> None:
    storage = STORAGES[name]
    vectors = np.random.default_rng(0).standard_normal((50, dimension)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    arrays = storage.arrays(vectors)
    assert [array.type for array in arrays] == [field.type for field in storage.fields(dimension)]
    back = storage.vectors(pa.table(dict(zip(storage.columns, arrays, strict=True))), dimension)
    again = storage.encode(back)
    assert all(np.array_equal(again[c], value) for c, value in storage.encode(vectors).items())
    expected = vectors @ vectors[0]
    if name == "binary":
        expected = np.where(vectors > 0, 1, -1) @ vectors[0] / np.sqrt(dimension)
    tolerance = 1e-3 if name == "float16" else 1e-6
    np.testing.assert_allclose(scores(back, vectors[0]), expected, atol=tolerance)


def test_an_image_and_a_text_beside_it_are_one_content(photos: Path, tmp_path: Path, tiny_model) -> None:
    file = sorted(photos.iterdir())[0]
    rows = [{"id": "both", "text": "what is it?", "image": f"photos/{file.name}"}]
    run(write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "index", tiny_model)
    _, vectors = contents(tmp_path / "index")
    np.testing.assert_allclose(vectors[0], tiny_model.encode(Content("what is it?", (file,))), atol=1e-6)


# ── several writers, and broken files ────────────────────────────────────────────────────────────────────────────────

WRITER = """
import sys
import numpy as np
import pyarrow as pa
from muco.search import Index
index = Index.open(sys.argv[1])
for start in range(0, 40, 4):
    ids = [f"r{i}" for i in range(start, start + 4)]
    columns = {name: ids for name in ("id", "text", "content_hash", "row_hash")}
    columns |= dict(zip(index.storage.columns, index.storage.arrays(np.eye(4, index.dimension, dtype=np.float32))))
    schema = index.table.schema
    arrays = [pa.array(columns[f.name], f.type) if f.name in columns else pa.nulls(4, f.type) for f in schema]
    index.write(pa.table(arrays, schema=schema))
    print("written", flush=True)
index.optimize()
"""


def ids_of(folder: Path) -> list[str]:
    return sorted(id for ids in Index.open(folder).ids() for id in ids)


@pytest.mark.slow
def test_processes_that_write_the_same_rows_at_once(tmp_path: Path, tiny_model) -> None:
    """One of them is killed in the middle; what it has locked is free again."""
    Index.create(tmp_path / "index", tiny_model)
    command = [sys.executable, "-c", WRITER, tmp_path / "index"]
    writers = [processes.Popen(command, stdout=processes.PIPE, cwd=ROOT) for _ in range(3)]
    assert writers[0].stdout.readline() == "written\n"
    writers[0].kill()
    for process in writers:
        process.communicate(timeout=300)
    assert [process.returncode for process in writers] == [-signal.SIGKILL, 0, 0]
    assert ids_of(tmp_path / "index") == sorted(f"r{i}" for i in range(40))


def test_threads_that_add_the_same_rows_at_once(tmp_path: Path, tiny_model) -> None:
    rows = [{"id": f"r{i}", "text": f"text {i}", f"column_{i % 3}": i} for i in range(12)]
    indices = [Index.create(tmp_path / "index", tiny_model) for _ in range(3)]
    with ThreadPoolExecutor(3) as threads:
        orders = [rows, rows[::-1], rows[6:] + rows[:6]]
        list(threads.map(lambda index, order: index.add(order, batch_size=4), indices, orders))
    assert ids_of(tmp_path / "index") == sorted(row["id"] for row in rows)
    hits = Index.open(tmp_path / "index", tiny_model).search("text 5", k=12)
    assert hits[0].id == "r5" and {hit.id: hit.extra[f"column_{int(hit.id[1:]) % 3}"] for hit in hits} == {
        row["id"]: int(row["id"][1:]) for row in rows
    }


def test_two_runs_into_a_new_folder_both_end_well(photos: Path, tmp_path: Path, tiny_model) -> None:
    barrier = threading.Barrier(2)

    def work(_: int) -> dict:
        barrier.wait()
        return run(photos, tmp_path / "index", tiny_model)

    with ThreadPoolExecutor(2) as threads:
        assert [found["total"] for found in threads.map(work, range(2))] == [16, 16]
    run(photos, tmp_path / "other", tiny_model)
    same(tmp_path / "index", tmp_path / "other")


def test_runs_that_create_a_folder_at_the_same_moment_never_take_it_for_a_file(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as threads:
        for i in range(200):
            list(threads.map(partial(connect, create=True), [tmp_path / f"index{i}"] * 4))


def test_a_writer_waits_for_the_one_before_and_readers_do_not(tmp_path: Path, tiny_model) -> None:
    index = Index.create(tmp_path / "index", tiny_model)
    index.add([{"id": "a", "text": "a"}])
    with ThreadPoolExecutor(1) as threads:
        with locked(tmp_path / "index"):
            writing = threads.submit(index.add, [{"id": "b", "text": "b"}])
            assert [hit.id for hit in Index.open(tmp_path / "index", tiny_model).search("a")] == ["a"]
            with pytest.raises(TimeoutError):
                writing.result(0.3)
        assert writing.result(300)["total"] == 2


def test_the_next_writer_repairs_ids_that_are_there_twice(tmp_path: Path, tiny_model, caplog) -> None:
    index = Index.create(tmp_path / "index", tiny_model)
    rows = [{"id": f"r{i}", "text": f"text {i}"} for i in range(6)]
    index.add(rows)
    index.table.add(index.table.to_arrow().slice(0, 4))  # as two writers did that knew no lock
    index.table.update(where="id = 'r1'", values={"text": "the row that was written last", "row_hash": "another"})
    index.table.add(index.table.search().where("id = 'r1'").limit(1).to_arrow())
    assert len(index) == 11
    with caplog.at_level("WARNING"):
        found = Index.create(tmp_path / "index", tiny_model).add([rows[5]])
    assert "4 ids were there more than once" in caplog.text and found["total"] == 6
    texts = {row["id"]: row["text"] for row in contents(tmp_path / "index")[0]}
    assert texts == {row["id"]: row["text"] for row in rows} | {"r1": "the row that was written last"}
    caplog.clear()
    Index.create(tmp_path / "index", tiny_model).add(rows)
    assert not caplog.text and contents(tmp_path / "index")[0][1]["text"] == "text 1"


def cut(folder: Path, size: int) -> None:
    for file in folder.iterdir():
        file.write_bytes(file.read_bytes()[:size])


@pytest.mark.parametrize(
    "harm",
    [
        lambda table: shutil.rmtree(table / "data"),
        lambda table: cut(table / "data", 40),
        lambda table: cut(table / "data", -30),
        lambda table: shutil.rmtree(table / "_versions"),
        lambda table: cut(table / "_versions", 20),
    ],
    ids=["data gone", "data cut", "data cut at the end", "versions gone", "versions cut"],
)
def test_files_of_an_index_that_are_missing_or_cut(harm, tmp_path: Path, tiny_model) -> None:
    Index.create(tmp_path / "index", tiny_model).add([{"id": "a", "text": "a"}, {"id": "b", "text": "b"}])
    harm(tmp_path / "index" / "rows.lance")
    for use in (
        lambda: Index.open(tmp_path / "index", tiny_model).search("a"),
        lambda: Index.open(tmp_path / "index", tiny_model).search("a", where="id = 'a'"),
        lambda: Index.open(tmp_path / "index", tiny_model).search(like="a", exact=True),
        lambda: list(Index.open(tmp_path / "index").ids()),
        lambda: Index.create(tmp_path / "index", tiny_model).add([{"id": "c", "text": "c"}]),
        lambda: Index.create(tmp_path / "index", tiny_model).optimize(),
    ):
        with pytest.raises(StorageError, match=r"index: .*copy (it|the index) again"):
            use()


def test_an_index_on_a_full_disk(tmp_path: Path, tiny_model) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("this user may not mount")
    try:
        index = Index.create(small / "index", tiny_model)
        index.add([{"id": "a", "text": "a"}])
        with pytest.raises(OSError), (small / "filling").open("wb") as file:
            while True:
                file.write(bytes(1024))
        with pytest.raises(StorageError, match=r"cannot be written \(No space left on device\); make room"):
            index.add([{"id": f"r{i}", "text": "b" * 9000} for i in range(9)])
        (small / "filling").unlink()
        assert index.add([{"id": "b", "text": "b"}])["total"] == 2
    finally:
        subprocess.run(["umount", small], check=True)
