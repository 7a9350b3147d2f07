"""muco index: the table says what the input says, whatever was there before, was killed, renamed or broken."""

from __future__ import annotations

import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray_cluster import on_ray

import muco
from muco.dialogue import Content
from muco.errors import DataError, MucoError, OutputError
from muco.search import Index, build
from muco.search.storage import STORAGES, scores

ROOT = Path(__file__).parent.parent


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
def model_path(tiny_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "model"
    tiny_model.save(str(folder))
    return folder


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
    run(photos, tmp_path / "index", model_path, dimension=16, storage="int8")
    index = Index.open(tmp_path / "index")
    assert (index.fingerprint, index.version, index.dimension) == (tiny_model.fingerprint, muco.__version__, 16)
    assert index.model_path == str(model_path.resolve()) and index.storage.name == "int8"
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
    with pytest.raises(DataError, match="another name"):
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


def test_equal_contents_are_encoded_once(tmp_path: Path, tiny_model) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", [{"text": f"text {i % 4}"} for i in range(600)])
    found = run(source, tmp_path / "index", tiny_model)
    assert (found["encoded"] + found["reused"], found["total"]) == (600, 600) and found["encoded"] <= 12
    _, vectors = contents(tmp_path / "index")
    assert len(np.unique(vectors.round(5), axis=0)) == 4


@pytest.mark.parametrize("storage", ["int8", "binary"])
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


def test_bad_lines_and_ids_given_twice(tmp_path: Path, tiny_model) -> None:
    lines = [{"id": "a", "text": "one"}, "not json", {"id": "a", "text": "two"}, {"text": "<|emb|>"}, {"id": 9}]
    source = write_jsonl(tmp_path / "rows.jsonl", lines)
    found = run(source, tmp_path / "index", tiny_model)
    assert (found["encoded"], found["failed"]) == (1, 4)
    notes = [json.loads(line) for line in (tmp_path / "index/errors.jsonl").read_text("utf-8").splitlines()]
    assert {note["row"] for note in notes} == {1, 2, 3, 4}
    assert "also that of an earlier row" in next(note["reason"] for note in notes if note["row"] == 2)
    with pytest.raises(DataError, match="nothing was deleted"):
        run(source, tmp_path / "index", tiny_model, delete_missing=True)
    with pytest.raises(DataError, match="none of the 1 rows"):
        run(write_jsonl(tmp_path / "bad.jsonl", ["x"]), tmp_path / "other", tiny_model)


def test_another_model_dimension_or_storage_is_refused(photos: Path, scenes: Path, tmp_path: Path, tiny_model) -> None:
    from muco.backbone import tiny_qwen2_vl
    from muco.encoder import from_backbone
    from muco.sizes import TinyConfig

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


def open_with(folder: Path) -> Index:
    return Index.open(folder / "index", folder / "other")


def test_what_is_no_index(photos: Path, tmp_path: Path, tiny_model) -> None:
    import lancedb

    with pytest.raises(MucoError, match="no such folder"):
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


def test_a_killed_run_goes_on_to_the_same_table(tmp_path: Path, model_path: Path) -> None:
    source = write_jsonl(
        tmp_path / "rows.jsonl", [{"id": f"r{i}", "text": f"row number {i}", "n": i} for i in range(900)]
    )
    command = [sys.executable, "-c", KILLED, str(source), str(tmp_path / "index"), str(model_path)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    limit = time.monotonic() + 120
    while not [*(tmp_path / "index/rows.lance/_versions").glob("*.manifest")] or not len(
        Index.open(tmp_path / "index")
    ):
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
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


@pytest.mark.slow
def test_a_ray_cluster_gives_the_same_table(photos: Path, tmp_path: Path, model_path: Path) -> None:
    line = ["index", str(photos), "--model", str(model_path), "--index", str(tmp_path / "ray")]
    found = json.loads(on_ray([*line, "--workers", "2", "--batch-size", "4", "--json"]))
    assert (found["encoded"], found["failed"]) == (16, 0)
    run(photos, tmp_path / "plain", model_path)
    same(tmp_path / "ray", tmp_path / "plain")


def test_workers_need_a_path(photos: Path, tmp_path: Path, tiny_model) -> None:
    with pytest.raises(MucoError, match="give its path"):
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
    tolerance = 0.01 if name == "int8" else 1e-6
    np.testing.assert_allclose(scores(back, vectors[0]), expected, atol=tolerance)


def test_an_image_and_a_text_beside_it_are_one_content(photos: Path, tmp_path: Path, tiny_model) -> None:
    file = sorted(photos.iterdir())[0]
    rows = [{"id": "both", "text": "what is it?", "image": f"photos/{file.name}"}]
    run(write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "index", tiny_model)
    _, vectors = contents(tmp_path / "index")
    np.testing.assert_allclose(vectors[0], tiny_model.encode(Content("what is it?", (file,))), atol=1e-6)
