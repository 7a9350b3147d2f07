"""Pairs from files of any kind: which column is what, random access, images, negatives, and every error."""

from __future__ import annotations

import csv
import json
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from muco.data import lines
from muco.data.pairs import PairsData
from muco.dialogue import Content, Sample
from muco.errors import DataError, ImageError

KINDS = ("csv", "tsv", "jsonl", "parquet")
Record = dict[str, Any]


def write(folder: Path, kind: str, rows: list[Record]) -> Path:
    """Rows, all with the keys of the first one, as a file of a kind."""
    path = folder / f"pairs.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


def square(folder: Path, name: str, level: int = 90) -> str:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (level, 20, 30)).save(folder / name)
    return name


def both(sample: Sample) -> tuple[Content, Content]:
    (turn,) = sample.turns
    (query,), (target,) = turn.query, turn.target
    return query, target


def everything(data: PairsData) -> list[Sample]:
    return [data[i] for i in range(len(data))]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same_pairs(tmp_path: Path, kind: str) -> None:
    rows = [
        {"query": 'a "red" mug,\nhalf full\tof tea', "target": "Größe\r\nzwei"},
        {"query": "second", "target": "ein, zwei"},
        {"query": "third\n\n", "target": "😀"},
    ]
    data = PairsData(write(tmp_path, kind, rows))
    assert [both(sample) for sample in everything(data)] == [(Content(r["query"]), Content(r["target"])) for r in rows]
    assert data[-1] == data[2]
    place = {"csv": ":5", "tsv": ":5", "jsonl": ":2", "parquet": " row 1"}
    assert data[1].where == f"{data.path}{place[kind]}"
    with pytest.raises(IndexError, match="row 3 of 3"):
        data[3]


@pytest.mark.parametrize("kind", KINDS)
def test_it_can_be_pickled_and_reads_on(tmp_path: Path, kind: str) -> None:
    data = PairsData(write(tmp_path, kind, [{"query": f"q{i}", "target": f"t{i}"} for i in range(9)]))
    first = everything(data)
    again = pickle.loads(pickle.dumps(data))
    assert everything(again) == first and again.fingerprint == data.fingerprint


CELL = st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), min_size=1, max_size=12).map("x".__add__)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.tuples(CELL, CELL), min_size=1, max_size=8),
    ending=st.sampled_from(["\n", "\r\n"]),
    mark=st.booleans(),
)
def test_csv_rows_are_found_whatever_is_in_their_cells(tmp_path: Path, rows: list, ending: str, mark: bool) -> None:
    path = tmp_path / "any.csv"
    with path.open("w", encoding="utf-8-sig" if mark else "utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator=ending)
        writer.writerows([("query", "target"), *rows])
    data = PairsData(path)
    found = [tuple(content.text for content in both(data[i])) for i in reversed(range(len(data)))]
    assert found[::-1] == [(q.replace("<|image_1|>", ""), t) for q, t in rows]


# ── which column is what ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "names, expected",
    [
        (["query", "target"], (Content("query 0"), Content("target 0"))),
        (["target", "id", "query"], (Content("query 0"), Content("target 0"))),
        (["image", "caption"], ("image", Content("caption 0"))),
        (["text", "image"], ("image", Content("text 0"))),
        (["query_text", "target_image"], (Content("query_text 0"), "target_image")),
        (["query_text", "query_image", "target_text"], ("query_image", Content("target_text 0"))),
    ],
)
def test_usual_names_are_known(tmp_path: Path, names: list[str], expected: tuple) -> None:
    square(tmp_path, "0.png")
    row = {name: "0.png" if "image" in name else f"{name} 0" for name in names}
    for content, want in zip(both(PairsData(write(tmp_path, "jsonl", [row]))[0]), expected, strict=True):
        if isinstance(want, Content):
            assert content == want
        else:
            assert content.images == (str(tmp_path / "0.png"),)


@pytest.mark.parametrize(
    "names",
    [["query", "target", "image"], ["image", "text", "caption"], ["image"], ["query"], ["text", "caption"], ["a", "b"],
     ["query_text", "target"], ["query_text", "query_image"]],
)  # fmt: skip
def test_unclear_names_are_an_error_that_lists_the_columns(tmp_path: Path, names: list[str]) -> None:
    path = write(tmp_path, "csv", [dict.fromkeys(names, "x")])
    with pytest.raises(DataError) as error:
        PairsData(path)
    assert f"{path}: which column is the " in str(error.value) and f"found {', '.join(names)};" in str(error.value)


def test_named_columns_are_used_and_no_others(tmp_path: Path) -> None:
    row = {"query": "q", "target": "t", "question": "why", "answer": "because", "image": "0.png"}
    path = write(tmp_path, "parquet", [row])
    assert both(PairsData(path, query_text="question", target_text="answer")[0]) == (Content("why"), Content("because"))
    square(tmp_path, "0.png")
    data = PairsData(path, query_text="question", query_image="image", target_text="answer")
    assert both(data[0])[0] == Content("why", (str(tmp_path / "0.png"),))
    with pytest.raises(DataError, match="which column is the target\\? Name it by target_text or target_image; found"):
        PairsData(path, query_text="question")
    with pytest.raises(DataError, match="no column 'quesion' \\(given as query_text\\); did you mean 'question'\\?"):
        PairsData(path, query_text="quesion", target_text="answer")


def test_keys_that_come_late_in_a_jsonl_file_are_columns_too(tmp_path: Path) -> None:
    square(tmp_path, "0.png")
    rows = [{"query_text": "a", "target_text": "b"}, {"query_image": "0.png", "target_text": "c"}]
    data = PairsData(write(tmp_path, "jsonl", rows))
    assert [bool(both(sample)[0].images) for sample in everything(data)] == [False, True]


# ── images ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_images_count_from_the_file_or_a_named_folder_and_cannot_leave_it(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    path = write(tmp_path, "csv", [{"image": "a/0.png", "text": "t"}])
    assert both(PairsData(path)[0])[0].images == (str(tmp_path / "a/0.png"),)
    assert both(PairsData(path, images=tmp_path / "pictures")[0])[0].images == (str(tmp_path / "pictures/a/0.png"),)
    with pytest.raises(DataError, match="nowhere: no such folder; it must hold the images of"):
        PairsData(path, images=tmp_path / "nowhere")
    for bad in ("../0.png", "/etc/passwd", "a/../../0.png", "."):
        path = write(tmp_path, "csv", [{"image": bad, "text": "t"}])
        with pytest.raises(DataError, match="use the path of an image within") as error:
            PairsData(path)[0]
        assert str(error.value).startswith(f"{path}:2: 'image' is ")
    path = write(tmp_path, "csv", [{"image": "https://example.org/0.png", "text": "t"}])
    with pytest.raises(DataError, match=":2: 'image' is a URL .* URLs are not fetched"):
        PairsData(path)[0]


def test_parquet_holds_images_as_bytes_or_structs(tmp_path: Path) -> None:
    content = (tmp_path / square(tmp_path, "0.png")).read_bytes()
    rows = [
        {"image": {"bytes": content, "path": "gone.png"}, "text": "t"},
        {"image": {"bytes": None, "path": "0.png"}, "text": "u"},
    ]
    data = PairsData(write(tmp_path, "parquet", rows))
    assert [both(s)[0].images for s in everything(data)] == [(content,), (str(tmp_path / "0.png"),)]
    data = PairsData(write(tmp_path, "parquet", [{"image": content, "text": "t"}]))
    assert both(data[0])[0] == Content(images=(content,))


@pytest.mark.parametrize(
    "text, with_image, without",
    [
        ("<|image_1|>\nWhat is it?", "What is it?", "\nWhat is it?"),
        ("What is <|image_1|> there?", "What is there?", "What is  there?"),
        ("<|image_1|>", "", None),
    ],
)
def test_placeholders_are_taken_out_of_text(tmp_path: Path, text: str, with_image: str, without: str | None) -> None:
    square(tmp_path, "0.png")
    rows = [{"query_text": text, "query_image": "0.png", "target_text": "t"}]
    rows.append(rows[0] | {"query_image": ""})
    data = PairsData(write(tmp_path, "csv", rows))
    assert both(data[0])[0].text == with_image
    if without is None:
        with pytest.raises(DataError, match="no query, 'query_text' and 'query_image' is empty; fix the row"):
            data[1]
    else:
        assert both(data[1])[0].text == without


# ── hard negatives ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "kind, cell, expected",
    [
        ("csv", "", []),
        ("csv", "one", ["one"]),
        ("csv", "['one', \"it's\"]", ["one", "it's"]),
        ("csv", "[sic] one", ["[sic] one"]),
        ("csv", json.dumps(["😀 cat", "it's"]), ["😀 cat", "it's"]),
        ("csv", '["1\\/2", "b"]', ["1/2", "b"]),
        ("jsonl", None, []),
        ("jsonl", "[one]", ["[one]"]),
        ("jsonl", ["one", {"text": "two"}], ["one", "two"]),
        ("parquet", ["one", "two"], ["one", "two"]),
    ],
)
def test_negatives_are_one_or_several(tmp_path: Path, kind: str, cell: Any, expected: list[str]) -> None:
    path = write(tmp_path, kind, [{"query": "q", "target": "t", "wrong": cell}])
    (turn,) = PairsData(path, query_text="query", target_text="target", negatives="wrong")[0].turns
    assert turn.negatives == tuple(map(Content, expected))


def test_negatives_of_targets_that_are_images_are_images(tmp_path: Path) -> None:
    path = write(tmp_path, "jsonl", [{"query_text": "q", "target_image": "0.png", "wrong": ["1.png", {"text": "b"}]}])
    (turn,) = PairsData(path, negatives="wrong")[0].turns
    assert turn.negatives == (Content(images=(str(tmp_path / "1.png"),)), Content("b"))


@pytest.mark.parametrize(
    "kind, cell, sentence",
    [
        ("csv", "[1 +]", "'wrong' looks like a list but is not valid: '[1 +]'"),
        ("csv", "[__import__('os').getcwd()]", "'wrong' looks like a list but is not valid: "),
        ("csv", "[1], [2]", "'wrong' must be one list, not '[1], [2]'"),
        ("csv", "[1]", "negative 0: 'text' must be a string or null, not 1"),
        ("csv", "['']", "negative 0 is empty; leave it out of 'wrong'"),
        ("csv", '["x", null]', "negative 1 is empty; leave it out of 'wrong'"),
        ("csv", '["x", NaN]', "'wrong' looks like a list but is not valid: "),
        ("jsonl", ["a", {"txt": "b"}], "negative 1 has 'txt'; accepted are 'text' and 'image'"),
        ("jsonl", ["a", {"image": "../b.png"}], "negative 1: 'image' is '../b.png'; use the path of an image within"),
        ("jsonl", 5, "negative 0: 'text' must be a string or null, not 5"),
    ],
)
def test_bad_negatives_are_named(tmp_path: Path, kind: str, cell: Any, sentence: str) -> None:
    path = write(tmp_path, kind, [{"query": "q", "target": "t", "wrong": cell}])
    with pytest.raises(DataError) as error:
        PairsData(path, negatives="wrong")[0]
    assert str(error.value).startswith(f"{path}:{2 if kind == 'csv' else 1}: {sentence}")


def test_a_list_that_is_too_long_is_not_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "LONGEST_LITERAL", 8)
    path = write(tmp_path, "csv", [{"query": "q", "target": "t", "wrong": "['a', 'b']"}])
    with pytest.raises(DataError, match=":2: 'wrong' is a list of 10 characters; at most 8 are read"):
        PairsData(path, negatives="wrong")[0]


def test_a_cell_may_be_as_long_as_a_line(tmp_path: Path) -> None:
    text = "word " * 40_000
    path = write(tmp_path, "csv", [{"query": "q", "target": text.strip()}])
    assert PairsData(path)[0].turns[0].target[0].text == text.strip()


# ── bad files and rows ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "content, sentence",
    [
        (b"query,target\na,b,c\n", ":2: 3 cells, and the header has 2; fix the row"),
        (b"query,target\n\n\na\n", ":4: 1 cells, and the header has 2; fix the row"),
        (b"query,target\na,\n", ":2: no target, 'target' is empty; fix the row"),
        (b"query,target\n  ,b\n", ":2: no query, 'query' is empty; fix the row"),
        (b'query,target\na,"b\nc\n', ":2: not a valid CSV row (unexpected end of data); fix its quotes"),
        (b'query,target\na,"b"c\n', ":2: not a valid CSV row ("),
        (b"query,target\na,b\n\xff,d\n", ":3: not UTF-8 ("),
        (b"query,target,query\na,b,c\n", ":1: the column 'query' is there twice; found query, target, query"),
        (b"query,target\n", ": the file has no rows"),
        (b"", ": which column is the query? Name it by"),
    ],
)
def test_bad_csv_is_named_by_line(tmp_path: Path, content: bytes, sentence: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        everything(PairsData(path))
    assert str(error.value).startswith(f"{path}{sentence}")


@pytest.mark.parametrize(
    "content, sentence",
    [
        ('{"query": "a", "target": "b"}\n{\n', ":2:1: malformed JSON"),
        ('{"query": "a", "target": "b"}\n[1]\n', ":2: the line must be a JSON object, not a list"),
        ('{"query": 3, "target": "b"}\n', ":1: 'query' must be a string or null, not 3"),
        ('{"query": "\\ud800", "target": "b"}\n', ":1: 'query' holds half a character"),
    ],
)
def test_bad_jsonl_is_named_by_line(tmp_path: Path, content: str, sentence: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(DataError) as error:
        everything(PairsData(path))
    assert str(error.value).startswith(f"{path}{sentence}")


def test_bad_parquet_is_named_by_row(tmp_path: Path) -> None:
    path = write(tmp_path, "parquet", [{"query": "a", "target": "b"}, {"query": None, "target": "c"}])
    with pytest.raises(DataError, match=r"pairs.parquet row 1: no query, 'query' is empty; fix the row"):
        everything(PairsData(path))
    pq.write_table(pa.table([["a"], ["b"]], names=["query", "query"]), path)
    with pytest.raises(DataError, match="the column 'query' is there twice; found query, query"):
        PairsData(path)
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match="not a readable Parquet file"):
        PairsData(path)


def test_a_file_of_another_kind_or_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="unknown kind of pairs; pass a .csv, .tsv, .jsonl or .parquet file"):
        PairsData(tmp_path / "pairs.xlsx")
    for kind in KINDS:
        with pytest.raises(DataError, match=f"gone.{kind}: .*[Nn]o such file"):
            PairsData(tmp_path / f"gone.{kind}")


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_file_that_changes_while_it_is_open_is_refused(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, kind, [{"query": "a", "target": "b"}])
    data = PairsData(path)
    with path.open("a") as file:
        file.write("\n")
    with pytest.raises(DataError, match="the file changed since it was opened; start again"):
        data[0]


# ── the fingerprint ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_fingerprint_changes_with_rows_images_and_columns(tmp_path: Path) -> None:
    square(tmp_path, "0.png")
    row = {"image": "0.png", "a": "one", "b": "two"}
    path = write(tmp_path, "csv", [row, row])

    def made(column: str = "a") -> str:
        return PairsData(path, query_image="image", target_text=column).fingerprint

    first = made()
    assert first == made() and len(first) == 64
    assert first != made("b")
    square(tmp_path, "0.png", 200)
    assert first != (second := made())
    write(tmp_path, "csv", [row])
    assert second != made()
    (tmp_path / "0.png").unlink()
    with pytest.raises(ImageError, match=f"{path}:2: "):
        made()
    readable = PairsData(path, query_image="image", target_text="a").readable_fingerprint
    assert readable not in (first, second) and len(readable) == 64
