"""Our JSONL format: rows and samples are inverse to each other, and every bad row is named by file, line and turn."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from muco.data import fingerprint, open_data
from muco.data import lines as lines_of_files
from muco.data.jsonl import JsonlData, sample_from_row, sample_to_row, write_jsonl
from muco.dialogue import Content, Sample, Turn
from muco.errors import DataError, ImageError, MucoError

FOLDER = Path("/data/set")
ROW = {"image": "a.png", "turns": [{"query": "What is it?", "target": "a ring"}]}


def lines(path, *texts):
    path.write_bytes(b"".join(text if isinstance(text, bytes) else text.encode() for text in texts))
    return path


def dumped(row):
    return json.dumps(row) + "\n"


def turn_row(**changes):
    """ROW with other keys in its turn; None takes a key away."""
    turn = {key: value for key, value in (ROW["turns"][0] | changes).items() if value is not None}
    return ROW | {"turns": [turn]}


@pytest.fixture
def dataset(tmp_path):
    """Three rows and three images, one of them used twice."""
    for i in range(3):
        Image.new("RGB", (30, 30), (i, 0, 0)).save(tmp_path / f"{i}.png")
    rows = [{"image": f"{i}.png", "turns": [{"query": "q", "target": f"t{i}"}], "id": str(i)} for i in range(2)]
    rows.append({"turns": [{"query": "a", "target": {"image": "2.png"}, "negatives": [{"image": "0.png"}, "n"]}]})
    write_jsonl(tmp_path / "train.jsonl", rows)
    return tmp_path / "train.jsonl"


# ── round trip ───────────────────────────────────────────────────────────────────────────────────────────────────────

texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(lambda text: text.strip())
names = st.text(st.characters(codec="utf-8", exclude_characters="\0:/."), min_size=1, max_size=8)
paths = st.one_of(
    names.map(lambda name: FOLDER / "images" / f"{name}.png"),
    names.map(lambda name: Path("/elsewhere") / name),
    names.map(lambda name: FOLDER / ".." / name),
)
captions = st.just("") | texts
contents = st.builds(Content, texts, st.lists(paths, max_size=3).map(tuple), captions) | st.builds(
    Content, st.just(""), st.lists(paths, min_size=1, max_size=3).map(tuple), captions
)
sides = st.lists(contents, min_size=1, max_size=3).map(tuple)
turns = st.builds(Turn, sides, sides, st.none() | texts, st.lists(contents, max_size=2).map(tuple))
pictured = st.builds(
    Sample,
    st.lists(paths, min_size=1, max_size=3),
    st.lists(st.one_of(turns, st.builds(Turn, st.just(""), sides)), min_size=1, max_size=3),
    st.none() | texts,
)
samples = pictured | st.builds(Sample, st.none(), st.lists(turns, min_size=1, max_size=3), st.none() | texts)


@given(samples)
@settings(max_examples=40)
def test_sample_to_row_to_sample(sample):
    row = json.loads(json.dumps(sample_to_row(sample, FOLDER)))
    back = sample_from_row(row, FOLDER, "x:1")
    assert back == sample
    for turn, other in zip(back.turns, sample.turns, strict=True):  # captions are no part of equality
        assert [c.caption for c in (*turn.query, *turn.target)] == [c.caption for c in (*other.query, *other.target)]
    assert sample_to_row(sample_from_row(row, FOLDER, "x:1"), FOLDER) == row


@given(st.lists(samples, min_size=1, max_size=3))
@settings(max_examples=20)
def test_written_files_read_back(tmp_path_factory, written):
    folder = tmp_path_factory.mktemp("set")
    count = write_jsonl(folder / "data.jsonl", (sample_to_row(sample, folder) for sample in written))
    data = open_data(folder)
    assert count == len(data) == len(written)
    # Paths were made for FOLDER, so they are outside of this folder and come back as they were.
    assert list(data) == written
    assert [sample.where for sample in data] == [f"{folder}/data.jsonl:{i + 1}" for i in range(count)]


def test_image_paths_are_relative_to_the_files_folder(dataset, monkeypatch):
    monkeypatch.chdir(dataset.parent)
    data = JsonlData("train.jsonl")
    monkeypatch.chdir("/")
    assert data[0].images == (dataset.parent / "0.png",)
    assert data[0].where == "train.jsonl:1"  # as the user wrote it
    assert data.path == dataset
    row = {"images": ["../b.png", "/c.png"], "turns": ROW["turns"]}
    assert sample_from_row(row, FOLDER, "").images == (FOLDER / "../b.png", Path("/c.png"))


def test_all_ways_to_write_a_side():
    def read(**changes):
        return sample_from_row(turn_row(**changes), FOLDER, "").turns[0]

    assert read(query="") == Turn("", "a ring")
    assert read(query=["a", {"text": "b"}]).query == (Content("a"), Content("b"))
    assert read(target={"image": "b.png"}).target == (Content("", (FOLDER / "b.png",)),)
    both = read(target={"text": "t", "images": ["b.png", "c.png"]}).target[0]
    assert both == Content("t", (FOLDER / "b.png", FOLDER / "c.png"))
    assert read(target={"image": ["b.png"], "text": None}, kind=None) == read(target={"image": "b.png"})
    assert sample_from_row(ROW | {"id": None, "images": None}, FOLDER, "") == sample_from_row(ROW, FOLDER, "")


def test_images_in_memory_have_no_row():
    for image in (b"bytes", Image.new("RGB", (4, 4))):
        with pytest.raises(DataError, match=r"x:1: an image is (bytes|Image), not a path; save it"):
            sample_to_row(Sample(image, [Turn("q", "t")], where="x:1"), FOLDER)


# ── access ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@given(
    st.lists(st.sampled_from(["row", "", " ", "\t"]), max_size=12).filter(lambda kinds: "row" in kinds),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
    st.booleans(),
)
def test_the_index_finds_what_splitting_the_file_finds(tmp_path_factory, kinds, newline, mark, closed):
    text = [dumped(ROW | {"id": f"é{n}"}).strip() if kind == "row" else kind for n, kind in enumerate(kinds, 1)]
    body = newline.join(text) + (newline if closed else "")
    path = lines(tmp_path_factory.mktemp("set") / "a.jsonl", b"\xef\xbb\xbf" if mark else b"", body)
    data = JsonlData(path)
    numbers = [n for n, kind in enumerate(kinds, 1) if kind == "row"]
    assert [sample.id for sample in data] == [f"é{n}" for n in numbers]
    assert [data.where(i) for i in range(len(data))] == [f"{path}:{n}" for n in numbers]


def test_indices(dataset):
    data = JsonlData(dataset)
    assert data[-1] == data[2] and data[np.int64(-3)] == data[0]
    for index in (3, -4):
        with pytest.raises(IndexError, match=f"row {index} of 3"):
            data[index]
    with pytest.raises(TypeError):
        data["0"]
    with pytest.raises(TypeError):
        data[0:1]


def test_pickled_copies_work_in_other_processes(dataset):
    data = JsonlData(dataset)
    fingerprint = data.fingerprint
    copy = pickle.loads(pickle.dumps(data))
    assert list(copy) == list(data) and copy.fingerprint == fingerprint
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        assert list(pool.map(list, [data, copy])) == [list(data)] * 2


def test_memory_is_an_index_not_the_file(tmp_path):
    long = {"turns": [{"query": "q" * 10_000, "target": "t"}]}
    write_jsonl(tmp_path / "a.jsonl", [long] * 200)
    assert len(pickle.dumps(JsonlData(tmp_path / "a.jsonl"))) < 200 * 16 + 2_000


def test_a_file_that_changes_is_refused(dataset):
    data = JsonlData(dataset)
    data[0]
    lines(dataset, "\n", dumped(ROW))
    for read in (lambda: data[0], lambda: data.fingerprint):
        with pytest.raises(DataError, match=r"train.jsonl: the file changed since it was opened; start again"):
            read()
    dataset.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        data[0]


# ── fingerprint ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_fingerprint_is_the_same_when_nothing_changes(dataset, tmp_path_factory):
    first = JsonlData(dataset).fingerprint
    assert re.fullmatch("[0-9a-f]{64}", first)
    assert JsonlData(str(dataset)).fingerprint == first
    moved = tmp_path_factory.mktemp("moved") / "set"
    shutil.copytree(dataset.parent, moved)
    assert JsonlData(moved / "train.jsonl").fingerprint == first
    (moved / "unused.png").write_bytes(b"x")
    assert JsonlData(moved / "train.jsonl").fingerprint == first


@pytest.mark.parametrize("name", ["0.png", "1.png", "2.png", "train.jsonl"])  # sample, target and negative images
def test_fingerprint_changes_with_any_byte(dataset, name):
    before = JsonlData(dataset).fingerprint
    file = dataset.parent / name
    data = bytearray(file.read_bytes())
    data[-1] ^= 1 if name != "train.jsonl" else ord("\n") ^ ord(" ")
    file.write_bytes(data)
    assert JsonlData(dataset).fingerprint != before


def test_fingerprint_changes_when_images_are_swapped(dataset):
    before = JsonlData(dataset).fingerprint
    one, two = dataset.parent / "0.png", dataset.parent / "1.png"
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    assert JsonlData(dataset).fingerprint != before


def test_of_much_data_the_fingerprint_reads_every_row_and_some_images(tmp_path, monkeypatch):
    """All rows by the bytes of the file; images of rows from the first to the last, in the same way for a copy."""
    monkeypatch.setattr(fingerprint, "LOOKED", 4)
    for number in range(10):
        (tmp_path / f"{number}.png").write_bytes(bytes([number]))
    row = {"turns": [{"query": "q", "target": "t"}]}
    write_jsonl(tmp_path / "a.jsonl", [row | {"image": f"{number}.png"} for number in range(10)])
    first, changed = JsonlData(tmp_path / "a.jsonl").fingerprint, []
    for number in range(10):
        (tmp_path / f"{number}.png").write_bytes(b"other")
        changed.append(JsonlData(tmp_path / "a.jsonl").fingerprint != first)
        (tmp_path / f"{number}.png").write_bytes(bytes([number]))
    assert [number for number, other in enumerate(changed) if other] == [0, 2, 5, 7]
    lines = (tmp_path / "a.jsonl").read_text()
    (tmp_path / "a.jsonl").write_text(lines.replace("9.png", "8.png"))
    assert JsonlData(tmp_path / "a.jsonl").fingerprint != first


def test_a_file_that_stays_as_it_is_is_read_once_also_by_the_next_process(tmp_path, monkeypatch):
    file, memory = tmp_path / "rows.jsonl", tmp_path / "digests.json"
    monkeypatch.setattr(fingerprint, "_known", {})
    read, real = [], hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *given: read.append(1) or real(*given))
    file.write_bytes(b"one")
    one = fingerprint.file_digest(file)
    assert fingerprint.file_digest(file) == one == hashlib.sha256(b"one").hexdigest()
    assert len(read) == 2, "written just now: it may be written again within the same tick of the clock"
    os.utime(file, ns=(10**18, 10**18))
    assert fingerprint.file_digest(file) == fingerprint.file_digest(file) == one and len(read) == 3
    fingerprint.remember(memory)
    fingerprint._known.clear()
    for damaged in (b"{", b"[]", b'{"a": 1, "b": [1e999, 2, "x"], "c": [1, 2, {}]}'):
        (tmp_path / "damaged.json").write_bytes(damaged)
        fingerprint.recall(tmp_path / "damaged.json")
    assert not fingerprint._known
    fingerprint.recall(memory)
    assert fingerprint.file_digest(file) == one and len(read) == 3
    file.write_bytes(b"two")
    os.utime(file, ns=(10**18 + 1, 10**18 + 1))
    assert fingerprint.file_digest(file) == hashlib.sha256(b"two").hexdigest()


def test_fingerprint_is_cached_and_names_missing_images(dataset):
    data = JsonlData(dataset)
    before = data.fingerprint
    (dataset.parent / "1.png").unlink()
    assert data.fingerprint == before
    with pytest.raises(ImageError, match=r"train.jsonl:2: .*1.png: no such image file"):
        _ = JsonlData(dataset).fingerprint


# ── bad rows ─────────────────────────────────────────────────────────────────────────────────────────────────────────

BAD_ROWS = [
    ([], "x:5: a row must be an object, not a list"),
    (None, "x:5: a row must be an object, not null"),
    (ROW | {"imgae": "b.png"}, "x:5: unknown key 'imgae' in a row; did you mean 'image'?"),
    (ROW | {"zzz": 1}, "x:5: unknown key 'zzz' in a row; accepted are image, images, video, turns, id"),
    (ROW | {"id": 7}, "x:5: 'id' must be a string, not a number"),
    (ROW | {"image": 7}, "x:5: 'image' must be the path of an image, not a number"),
    (ROW | {"image": [None]}, "x:5: 'image' must be the path of an image, not null"),
    (ROW | {"images": {"path": "a.png"}}, "x:5: 'images' must be the path of an image, not an object"),
    (ROW | {"image": ""}, "x:5: 'image' is not a path: ''"),
    (ROW | {"image": "a\0b"}, "x:5: 'image' is not a path"),
    (ROW | {"image": "http://a/b.png"}, "x:5: 'image' is a URL (http://a/b.png); URLs are not fetched"),
    (ROW | {"image": "data:image/png;base64,AA=="}, "x:5: 'image' is a URL (data:image"),
    (ROW | {"image": "file:///b.png"}, "x:5: 'image' is a URL"),
    ({"image": "a.png"}, "x:5: 'turns' must be a list of at least one turn, not null"),
    (ROW | {"turns": []}, "x:5: 'turns' must be a list of at least one turn, not an empty list"),
    (ROW | {"turns": {}}, "x:5: 'turns' must be a list of at least one turn, not an object"),
    (ROW | {"turns": ROW["turns"] + ["b"]}, "x:5 turn 2: a turn must be an object, not a string"),
    (ROW | {"turns": ROW["turns"] * 2 + [{"query": "q"}]}, "x:5 turn 3: the turn has no 'target'"),
    (turn_row(query=None), "x:5 turn 1: the turn has no 'query'"),
    (turn_row(traget="x"), "x:5 turn 1: unknown key 'traget' in a turn; did you mean 'target'?"),
    (turn_row(kind=1.5), "x:5 turn 1: 'kind' must be a string, not a number"),
    (turn_row(negatives="b"), "x:5 turn 1: 'negatives' must be a list, not a string"),
    (turn_row(negatives=["b", ""]), "x:5 turn 1: 'negatives' is empty"),
    (turn_row(negatives=[["b"]]), "x:5 turn 1: 'negatives' must be text or an object"),
    (turn_row(negatives=["b"], scores=[1, "2"]), "x:5 turn 1: 'scores' must be a list of numbers"),
    (turn_row(negatives=["b"], scores=[1, True]), "x:5 turn 1: 'scores' must be a list of numbers"),
    (
        turn_row(negatives=["b"], scores=[1]),
        "x:5 turn 1: 'scores' are one for the target and one for each negative, 2 of",
    ),
    (
        turn_row(scores=[1]),
        "x:5 turn 1: 'scores' are one for the target and one for each negative, 1 of them; got 1, and there are no",
    ),
    (turn_row(query=True), "x:5 turn 1: 'query' must be text or an object with 'text' and/or 'image', not a boolean"),
    (turn_row(query=["a", ["b"]]), "x:5 turn 1: 'query' must be text or an object"),
    (turn_row(query=[]), "x:5 turn 1: 'query' is an empty list"),
    (turn_row(query="  \n"), "x:5 turn 1: 'query' is only blanks"),
    (turn_row(target=""), "x:5 turn 1: 'target' is empty"),
    (turn_row(target=["a", {}]), "x:5 turn 1: 'target' is empty"),
    (turn_row(target={"text": 3}), "x:5 turn 1: 'text' must be a string, not a number"),
    (turn_row(target={"txt": "a"}), "x:5 turn 1: unknown key 'txt' in 'target'; did you mean 'text'?"),
    (turn_row(target={"image": "https://a/b"}), "x:5 turn 1: 'image' is a URL"),
    (turn_row(target="half \ud800"), "x:5 turn 1: 'target' holds half a character"),
    ({"turns": [{"query": "", "target": "t"}]}, "x:5 turn 1: 'query' is empty; pass text, an image"),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS)
def test_bad_rows(row, message):
    with pytest.raises(DataError) as caught:
        sample_from_row(row, FOLDER, "x:5")
    assert str(caught.value).startswith(message)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["image", "images", "turns", "id", "query", "target", "kind", "negatives", "text", "x"]),
            inner,
        )
    ),
    max_leaves=12,
)


@given(json_values)
def test_any_json_is_a_sample_or_a_data_error(value):
    try:
        assert sample_from_row(value, FOLDER, "x:5").turns
    except DataError as error:
        assert str(error).startswith("x:5")


BAD_LINES = [
    ('{"turns": [}', r"a.jsonl:3:12: malformed JSON: Expecting value"),
    ('{"turns": [], "turns": []}', r"a.jsonl:3: the key 'turns' occurs twice in one object"),
    ('{"turns": [{"query": "q", "target": "a", "query": "b"}]}', r"a.jsonl:3: the key 'query' occurs twice"),
    ('{"id": NaN}', r"a.jsonl:3: malformed JSON: NaN is not JSON"),
    ('{"id": -Infinity}', r"a.jsonl:3: malformed JSON: -Infinity is not JSON"),
    (b'{"id": "\xff"}', r"a.jsonl:3: not UTF-8 at byte 9 of the row"),
    ("[" * 100_000, r"a.jsonl:3: malformed JSON: nested too deep"),
    ('{"id": ' + "9" * 5_000 + "}", r"a.jsonl:3: .*4300"),
    ('{"id": "a"} {"id": "b"}', r"a.jsonl:3:13: malformed JSON: Extra data"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES, ids=range(len(BAD_LINES)))
def test_bad_lines(tmp_path, line, message):
    data = JsonlData(lines(tmp_path / "a.jsonl", dumped(ROW), "\n", line, "\n", dumped(ROW)))
    with pytest.raises(DataError, match=message):
        data[1]
    assert data[0].turns == data[2].turns  # the rows around it can still be read
    assert data[2].where.endswith("a.jsonl:4")


def test_endless_lines_are_not_read_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(lines_of_files, "LONGEST_LINE", 100)
    with pytest.raises(DataError, match=r"a.jsonl:2: the line is longer"):
        JsonlData(lines(tmp_path / "a.jsonl", dumped(ROW), "[" + "1, " * 1000))


# ── opening and writing ──────────────────────────────────────────────────────────────────────────────────────────────


def test_open_data(dataset):
    folder = dataset.parent
    assert list(open_data(folder)) == list(open_data(str(dataset))) == list(JsonlData(dataset))
    for path, message in [
        (folder / "none.jsonl", r"none.jsonl: no such file or folder"),
        (folder / "0.png", r"0.png: unknown kind of data; pass a .jsonl file"),
        (lines(folder / "empty.jsonl", "\n \n"), r"empty.jsonl: the file holds no rows"),
        (folder, r"holds 2 .jsonl files \(empty.jsonl, train.jsonl\); pass one of them"),
    ]:
        with pytest.raises(DataError, match=message):
            open_data(path)
    (folder / "inner").mkdir()
    with pytest.raises(DataError, match="holds no .jsonl file"):
        open_data(folder / "inner")
    with pytest.raises(MucoError, match="none.jsonl: cannot be read"):
        JsonlData(folder / "none.jsonl")


def test_write_is_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "a.jsonl"
    assert write_jsonl(path, [{"text": "ünï\n"}, {}]) == 2
    assert path.read_text(encoding="utf-8") == '{"text": "ünï\\n"}\n{}\n'

    def failing():
        yield {"id": "new"}
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        write_jsonl(path, failing())
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_jsonl(path, [{"score": float("nan")}])
    assert path.read_text(encoding="utf-8").endswith("{}\n")
    assert [file.name for file in path.parent.iterdir()] == ["a.jsonl"]
