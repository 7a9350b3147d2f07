"""M3T: rows of a large Parquet file by number, which of their pictures are there, and what a row becomes."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from pathlib import Path

import m3t_tree as tree
import processes
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from muco.base.files import locked, whole_file
from muco.data import rows as rows_module
from muco.data.m3t import M3TData
from muco.data.parquet import require_columns
from muco.data.rows import Rows
from muco.dialogue import Sample
from muco.errors import DataError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(rows_module, "SHARD_ROWS", 10)


def opened(folder: Path, **options) -> M3TData:
    return M3TData(folder, images=folder / "images", **options)


def read_one(folder: Path, **changes) -> Sample:
    """The sample of a file of one row that differs from a good one."""
    tree.write_tree(folder, [tree.records(1, turns=2)[0] | changes])
    return opened(folder)[0]


# ---------------------------------------------------------------- what a row becomes


@pytest.mark.parametrize("turns", [1, 3, 7, 8])
@pytest.mark.parametrize("paraphrases", [0, 1, 4])
def test_every_row_is_read_to_the_letter(tmp_path, turns, paraphrases):
    made = tree.records(5, turns=turns, paraphrases=paraphrases)
    file = tree.write_tree(tmp_path, made)
    data = opened(tmp_path)
    assert len(data) == 5 and data.missing == 0
    for row in range(5):
        wanted = tree.expected(tmp_path / "images", file, row, turns=turns, paraphrases=paraphrases)
        assert data[row] == wanted
        assert data[row].where == wanted.where == data.where(row) == f"{file} row {row}"
    assert data[-1] == data[4]
    assert [turn.kind for turn in data[0].turns] == (tree.KINDS if turns == 7 else [None] * turns)
    for index in (5, -6):
        with pytest.raises(IndexError, match="of 5"):
            data[index]


def test_a_column_of_kinds_is_read(tmp_path):
    kinds = [["local", "retrieval"], None, ["global", None]]
    made = [record | {"kind": kind} for record, kind in zip(tree.records(3, turns=2), kinds, strict=True)]
    tree.write_tree(tmp_path, made)
    assert [[turn.kind for turn in opened(tmp_path)[n].turns] for n in range(3)] == [kinds[0], [None] * 2, kinds[2]]


@pytest.mark.parametrize("where", ["M3T_train/M3T.parquet", "M3T.parquet", "other.parquet"])
def test_the_file_is_found_in_a_folder_or_given(tmp_path, where):
    file = tmp_path / where
    tree.write_rows(file, tree.records(2))
    tree.write_image(tmp_path / "images/0000/picture 0.png")
    for path in (tmp_path, file):
        data = M3TData(path, images=tmp_path / "images")
        assert data.path == file and len(data) == 1


def test_columns_that_are_not_used_may_be_missing_and_the_image_column_may_be_another(tmp_path):
    kept = ("qry", "pos_text")
    made = [{key: record[key] for key in kept} | {"img": record["qry_image_path"]} for record in tree.records(2)]
    file = tree.write_rows(tmp_path / "M3T.parquet", made)
    tree.write_image(tmp_path / "images/0001/picture 1.png")
    assert opened(tmp_path, image_column="img")[0] == tree.expected(tmp_path / "images", file, 1)
    with pytest.raises(DataError, match=r"M3T.parquet: no column 'qry_image_path'.* found .*img"):
        opened(tmp_path)


def test_the_placeholder_goes_wherever_it_stands(tmp_path):
    texts = ["<|image_1|>\nName it.", "Name <|image_1|> it.", "Name it. <|image_1|>", "Name it."]
    sample = read_one(tmp_path, qry=[texts], pos_text=["<|image_1|>a ring"])
    assert [content.text for content in sample.turns[0].query] == ["Name it.", "Name it.", "Name it.", "Name it."]
    assert sample.turns[0].target[0].text == "a ring"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qry": [["a"], ["b"], ["c"]]}, "'qry' has 3 turns and 'pos_text' 2; each turn needs both"),
        ({"pos_text": ["a"]}, "'qry' has 2 turns and 'pos_text' 1; each turn needs both"),
        ({"qry": [], "pos_text": []}, "'qry' is an empty list; a row needs at least one turn"),
        ({"qry": None}, "'qry' must be a list with an element per turn, not null"),
        ({"qry": "one text"}, "'qry' must be a list with an element per turn, not a string"),
        ({"pos_text": [1, 2]}, "turn 0 of 'pos_text' must be a text or a list of texts, not a number"),
        ({"pos_text": ["a", None]}, "turn 1 of 'pos_text' must be a text or a list of texts, not null"),
        ({"qry": [["a"], None]}, "turn 1 of 'qry' must be a text or a list of texts, not null"),
        ({"qry": [["a"], ["b", None]]}, "turn 1 of 'qry' must be a text or a list of texts, not null"),
        ({"qry": [["a"], []]}, "turn 1 of 'qry' is an empty list; pass at least one wording"),
        ({"pos_text": ["a", " "]}, "turn 1 of 'pos_text' has an empty text"),
        ({"qry": [["a"], ["b", "<|image_1|>\n"]]}, "turn 1 of 'qry' has an empty text"),
        ({"kind": ["local"]}, "'kind' must have a word for each of the 2 turns, not ['local']"),
        ({"qry_image_path": ""}, "'qry_image_path' is ''; every row needs its image"),
        ({"qry_image_path": None}, "'qry_image_path' is None; every row needs its image"),
    ],
)
def test_a_bad_row_is_named(tmp_path, changes, message):
    with pytest.raises(DataError) as caught:
        read_one(tmp_path, **changes)
    assert str(caught.value).startswith(f"{tmp_path / 'M3T_train' / 'M3T.parquet'} row 0: {message}")


def test_a_path_must_not_leave_the_folder_of_images(tmp_path):
    tree.write_image(tmp_path / "secret.png")
    with pytest.raises(DataError, match=r"row 0: 'qry_image_path' is '../secret.png'; use the path of an image with"):
        read_one(tmp_path, qry_image_path="../secret.png")


def test_files_and_folders_that_are_not_there(tmp_path):
    with pytest.raises(DataError, match="images: no such folder; it must hold the images of M3T.parquet"):
        M3TData(tmp_path / "M3T.parquet", images=tmp_path / "images")
    (tmp_path / "images").mkdir()
    with pytest.raises(DataError, match="M3T.parquet: no such file"):
        M3TData(tmp_path / "M3T.parquet", images=tmp_path / "images")
    with pytest.raises(DataError, match=r"no M3T_train/M3T.parquet or M3T.parquet, and not exactly one .* \(none\)"):
        opened(tmp_path)
    for name in ("a", "b"):
        tree.write_rows(tmp_path / f"{name}.parquet", tree.records(1))
    with pytest.raises(DataError, match=r"\(a.parquet, b.parquet\); pass the file"):
        opened(tmp_path)


# ---------------------------------------------------------------- which images are there


def test_missing_images_are_counted_and_left_out(tmp_path, small_shards):
    made, gone = tree.records(25), (0, 9, 10, 24)
    file = tree.write_tree(tmp_path, made, missing=gone)
    (tmp_path / "images" / made[9]["qry_image_path"]).write_bytes(b"")  # a download that failed
    (tmp_path / "images" / made[10]["qry_image_path"]).mkdir()
    data = opened(tmp_path)
    assert (len(data), data.missing) == (21, 4)
    assert [data.where(i) for i in range(21)] == [f"{file} row {row}" for row in range(25) if row not in gone]
    assert data[8] == tree.expected(tmp_path / "images", file, 11)


def test_the_index_is_built_once_and_again_on_request(tmp_path, small_shards):
    made = tree.records(25)
    file = tree.write_tree(tmp_path, made, missing=[3])
    before = opened(tmp_path)
    tree.write_image(tmp_path / "images" / made[3]["qry_image_path"])
    (tmp_path / "images" / made[17]["qry_image_path"]).unlink()
    kept = opened(tmp_path)
    assert kept.where(3) == f"{file} row 4" and kept.fingerprint == before.fingerprint
    again = opened(tmp_path, rescan=True)
    assert again.missing == 1 and again.where(3) == f"{file} row 3" and again.where(17) == f"{file} row 18"
    assert again.fingerprint != before.fingerprint
    assert opened(tmp_path).fingerprint == again.fingerprint


def test_another_folder_of_images_has_an_index_of_its_own(tmp_path):
    tree.write_tree(tmp_path, tree.records(4), missing=[3])
    tree.write_image(tmp_path / "others/0000/picture 3.png")
    assert len(opened(tmp_path)) == 3
    others = M3TData(tmp_path, images=tmp_path / "others")
    assert len(others) == 1 and others[0].where.endswith("row 3")
    assert others.fingerprint != opened(tmp_path).fingerprint


def test_without_any_image_the_folder_is_probably_wrong(tmp_path):
    tree.write_tree(tmp_path, tree.records(4), missing=range(4))
    with pytest.raises(DataError, match=r"none of the images of 4 rows .* \(the first is '0000/picture 0.png'\)"):
        opened(tmp_path)


def test_a_damaged_index_is_an_error(tmp_path, small_shards):
    tree.write_tree(tmp_path, tree.records(25))
    opened(tmp_path)
    part = next(tmp_path.rglob("present-00001.npy"))
    whole = part.read_bytes()
    for damaged in (whole[:-2], b"", b"nonsense" * 40, next(tmp_path.rglob("present-00002.npy")).read_bytes()):
        part.write_bytes(damaged)
        with pytest.raises(DataError, match="the index of images is damaged .*; look again with rescan=True"):
            opened(tmp_path)
    assert len(opened(tmp_path, rescan=True)) == 25


# ---------------------------------------------------------------- the rows on disk

KILLED = """
import os, signal, sys
from muco.data import rows
from muco.data.m3t import M3TData
rows.SHARD_ROWS = 10
done, replace = 0, os.replace
def last(*paths):
    global done
    if done == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    done += 1
    replace(*paths)
os.replace = last
M3TData(sys.argv[1], images=sys.argv[1] + "/images")
"""


@pytest.mark.parametrize("after", [2, 7])  # of 5 shards and 5 parts of the index
@pytest.mark.parametrize("row_group", [None, 7])
def test_what_was_killed_goes_on(tmp_path, small_shards, after, row_group):
    file = tree.write_tree(tmp_path, tree.records(45), missing=[44], row_group=row_group)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), str(after)], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "M3T_train" / ".muco-rows").rglob("*[0-9].*[wy]")}
    assert len(done) == after and len(list(tmp_path.rglob(".*.tmp"))) == 1
    data = opened(tmp_path)
    assert [data[row] for row in range(44)] == [tree.expected(tmp_path / "images", file, row) for row in range(44)]
    assert data.missing == 1
    assert {path: path.stat().st_mtime_ns for path in done} == done, "finished parts are not made again"
    if after < 5:
        assert not list(tmp_path.rglob(".shard*.tmp"))


def test_one_process_copies_and_others_wait(tmp_path):
    file = tree.write_rows(tmp_path / "a.parquet", tree.records(3))
    folder = Rows(file, ("qry",)).folder
    shard = folder / "shard-00000.arrow"
    shard.unlink()
    other = threading.Thread(target=Rows, args=(file, ("qry",)))
    with locked(folder):
        other.start()
        other.join(0.3)
        assert other.is_alive() and not shard.exists()
        shard.write_bytes(b"made by another")
    other.join(300)
    assert not other.is_alive() and shard.read_bytes() == b"made by another"


def test_an_interrupted_copy_leaves_the_same_shards(tmp_path, small_shards):
    file = tree.write_rows(tmp_path / "a.parquet", tree.records(45), row_group=7)
    folder = Rows(file, ("qry",)).folder
    whole = {path.name: path.read_bytes() for path in sorted(folder.glob("shard*"))}
    assert len(whole) == 5
    for first in range(5):
        for path in sorted(folder.glob("shard*"))[first:]:
            path.unlink()
        Rows(file, ("qry",))
        assert {path.name: path.read_bytes() for path in sorted(folder.glob("shard*"))} == whole


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(count=st.integers(1, 60), shard=st.integers(1, 25), batch=st.integers(1, 25), group=st.integers(1, 60))
def test_rows_are_those_of_the_file_however_they_are_cut(tmp_path_factory, monkeypatch, count, shard, batch, group):
    monkeypatch.setattr(rows_module, "SHARD_ROWS", shard)
    monkeypatch.setattr(rows_module, "BATCH_ROWS", batch)
    monkeypatch.setattr(rows_module, "READS", 7)  # memory is handed back in the middle
    folder = tmp_path_factory.mktemp("rows")
    made = [{"b": [f"x{row}"] * (row % 3), "a": None if row % 5 == 0 else f"y{row}", "c": row} for row in range(count)]
    file = tree.write_rows(folder / "a.parquet", made, row_group=group)
    rows = Rows(file, ("a", "b"))
    assert len(rows) == count and rows.shards == -(-count // shard)
    assert [rows[i] for i in range(count)] == [{"a": record["a"], "b": record["b"]} for record in made]
    assert rows[-1] == rows[count - 1]
    for index in (-count - 1, count):
        with pytest.raises(IndexError):
            rows[index]


def test_a_file_that_changed_is_copied_anew(tmp_path):
    file = tree.write_tree(tmp_path, tree.records(3))
    before = opened(tmp_path)
    assert before.fingerprint == opened(tmp_path).fingerprint
    made = tree.records(3)
    made[1]["pos_text"][0] = "Answer 0 of 1"  # the same size
    tree.write_rows(file, made)
    os.utime(file, ns=(1, 2))
    after = opened(tmp_path)
    assert after[1].turns[0].target[0].text == "Answer 0 of 1"
    assert after.fingerprint != before.fingerprint
    assert before[1].turns[0].target[0].text == "answer 0 of 1", "what was opened before stays what it was"


def test_the_fingerprint_needs_the_file_that_was_opened(tmp_path):
    file = tree.write_tree(tmp_path, tree.records(3))
    data = opened(tmp_path)
    os.utime(file, ns=(1, 2))
    with pytest.raises(DataError, match="the file changed since it was opened; start again"):
        _ = data.fingerprint
    file.unlink()
    with pytest.raises(DataError, match="M3T.parquet: cannot be read"):
        _ = data.fingerprint


def test_the_fingerprint_does_not_depend_on_the_place(tmp_path):
    tree.write_tree(tmp_path / "a", tree.records(3), missing=[1])
    tree.write_tree(tmp_path / "b", tree.records(3), missing=[1])
    tree.write_tree(tmp_path / "c", tree.records(3), missing=[2])
    a, b, c = (opened(tmp_path / name).fingerprint for name in "abc")
    assert a == b != c


def test_a_changed_working_directory_does_not_matter(tmp_path, monkeypatch):
    tree.write_tree(tmp_path / "a", tree.records(3))
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path)
    data = M3TData("a", images="a/images", cache="cache")
    monkeypatch.chdir(tmp_path / "b")
    assert data[2].where == "a/M3T_train/M3T.parquet row 2" and Path(data[2].images[0]).is_file() and data.fingerprint


def test_the_cache_may_be_elsewhere(tmp_path, small_shards):
    for name in "ab":  # the same name, size and time: only the place tells them apart
        file = tree.write_tree(tmp_path / name, tree.records(12))
        os.utime(file, ns=(1, 2))
    folders = [opened(tmp_path / name, cache=tmp_path / "cache")._rows.folder for name in "ab"]
    assert folders[0] != folders[1] and {folder.parent for folder in folders} == {tmp_path / "cache"}
    assert not list((tmp_path / "a").rglob(".muco-rows"))


def test_a_cache_that_cannot_be_written(tmp_path):
    tree.write_tree(tmp_path, tree.records(3))
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(DataError, match="cannot write the cache .*; pass another folder as 'cache'"):
        opened(tmp_path, cache=tmp_path / "taken")


def test_a_damaged_shard_is_an_error(tmp_path, small_shards):
    tree.write_tree(tmp_path, tree.records(25))
    opened(tmp_path)
    shard = next(tmp_path.rglob("shard-00001.arrow"))
    for damaged in (shard.read_bytes()[:100], b""):
        shard.write_bytes(damaged)
        with pytest.raises(
            DataError, match="part of the cache is gone or damaged .*; delete the folder .* start again"
        ):
            opened(tmp_path)[12]
    shard.unlink()
    assert opened(tmp_path)[12].where.endswith("row 12"), "a shard that is gone is made again"


def test_a_broken_file(tmp_path):
    file = tree.write_tree(tmp_path, tree.records(3))
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    with pytest.raises(DataError, match="M3T.parquet: not a readable Parquet file .*; download it again"):
        opened(tmp_path)
    file.write_bytes(whole[:100] + bytes(200) + whole[300:])
    with pytest.raises(DataError, match="M3T.parquet: broken after row 0 .*; download it again"):
        opened(tmp_path)
    assert not list(tmp_path.rglob("*.arrow")) and not list(tmp_path.rglob("*.tmp"))


def test_columns_are_checked(tmp_path):
    made = [{"qry": ["a"], "pos_txt": ["b"], "qry_image_path": "c"}]
    file = tree.write_rows(tmp_path / "M3T.parquet", made)
    (tmp_path / "images").mkdir()
    with pytest.raises(DataError) as caught:
        opened(tmp_path)
    assert str(caught.value) == (
        f"{file}: no column 'pos_text'; is it 'pos_txt'? Expected qry, pos_text, qry_image_path, "
        "kind (optional); found qry, pos_txt, qry_image_path"
    )
    twice = pa.table([["a"], ["b"]], names=["qry", "qry"])
    pq.write_table(twice, file)
    with pytest.raises(DataError, match="the column 'qry' is there 2 times; keep one"):
        require_columns(file, ("qry",))
    tree.write_rows(file, tree.records(1))
    pq.write_table(pq.read_table(file).slice(0, 0), file)
    with pytest.raises(DataError, match="the file has no rows"):
        opened(tmp_path)


def test_a_text_that_is_not_utf8_is_named(tmp_path):
    file = tree.write_tree(tmp_path, tree.records(3, paraphrases=0))
    table = pq.read_table(file)
    bad = pa.array([b"0000/picture 0.png", b"\xff\xfe", b"0002/picture 2.png"], pa.binary()).view(pa.string())
    number = table.schema.get_field_index("qry_image_path")
    pq.write_table(table.set_column(number, "qry_image_path", bad), file)
    with pytest.raises(DataError, match=r"row 0 or one of the \d+ after it: 'qry_image_path' is not UTF-8"):
        opened(tmp_path)
    with pytest.raises(DataError, match="row 1: a text is not UTF-8 .*; repair the file"):
        Rows(file, ("qry_image_path",))[1]


def test_categories_of_other_programs_are_texts(tmp_path, monkeypatch):
    monkeypatch.setattr(rows_module, "BATCH_ROWS", 2)  # each batch comes with categories of its own
    table = pa.table({"a": pa.array(list("abcdef")).dictionary_encode()})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    rows = Rows(tmp_path / "a.parquet", ("a",))
    assert [rows[i]["a"] for i in range(6)] == list("abcdef") and rows.batches(0)[0].schema.types == [pa.string()]


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    def fail():
        with whole_file(tmp_path / "a") as unfinished:
            unfinished.write_text("half")
            raise RuntimeError("the power is gone")

    with pytest.raises(RuntimeError):
        fail()
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- workers


class Places(Dataset):
    def __init__(self, data: M3TData) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> str:
        return f"{self.data[index].where} {self.data[index].turns[0].query[0].text}"


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_read_the_same(tmp_path, small_shards, method):
    tree.write_tree(tmp_path, tree.records(25), missing=[7])
    places = Places(opened(tmp_path))
    here = [places[index] for index in range(24)]  # the parent has its shards open
    loader = DataLoader(places, batch_size=4, num_workers=1 if method == "spawn" else 2, multiprocessing_context=method)
    assert [place for batch in loader for place in batch] == here


def test_the_pickle_is_small_and_reads_without_the_index(tmp_path, small_shards):
    tree.write_tree(tmp_path, tree.records(25), missing=[7])
    data = opened(tmp_path)
    fresh = pickle.dumps(data)
    wanted, fingerprint = [data[i] for i in range(24)], data.fingerprint
    state = pickle.dumps(data)
    assert len(state) < len(fresh) + 100, "what was read is not sent along"
    for part in tmp_path.rglob("present-*.npy"):
        part.unlink()
    copy = pickle.loads(state)
    assert [copy[i] for i in range(24)] == wanted and copy.fingerprint == fingerprint


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "benchmarks/m3t_rows.py", "--quick", "--output", str(tmp_path), "--row-group", "300"]
    processes.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    result = json.loads((tmp_path / "m3t-rows.json").read_text())
    assert result["rows"] == 500 and result["sizes"]["row_groups"] == 2 and result["checked"] > 50
    assert result["parts"]["opened first"]["missing"] == 50
    assert all(part["peak"] >= part["resting"] > 0 for part in result["parts"].values())
    assert "random samples a second" in (tmp_path / "m3t-rows.md").read_text()
