"""MMEB on disk: both layouts to the letter, and every bad row by its name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mmeb_tree as tree
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from muco.data.lines import without_token
from muco.data.mmeb_test import MMEBSet, Question, find_files, open_set, read_questions
from muco.dialogue import Content, single_turn
from muco.errors import DataError, ImageError
from muco.evaluate.mmeb import evaluate_mmeb
from muco.template import QWEN_VL


def opened(folder: Path, name: str) -> MMEBSet:
    return open_set(folder, name, find_files(folder)[0][name])


def questions(folder: Path, name: str) -> list[Question]:
    return list(read_questions(opened(folder, name)))


@pytest.mark.parametrize("layout", ["v1", "split"])
def test_every_set_is_read_to_the_letter(tmp_path, layout):
    folder, expected = tmp_path, tree.write_tree(tmp_path, layout)
    for name in tree.ALL:
        found = questions(folder, name)
        assert [(q.query, q.candidates) for q in found] == [(e.query, e.candidates) for e in expected[name]], name
        assert [q.number for q in found] == list(range(6))
    last = {"v1": "test-00000-of-00001.parquet row 5", "split": "test-00001-of-00002.parquet row 2"}[layout]
    assert questions(folder, "GQA")[-1].where == f"GQA/{last}"


# ---------------------------------------------------------------- texts and images


@pytest.mark.parametrize(
    ("text", "with_image", "without"),
    [
        ("<|image_1|>\nName it.\n", "Name it.\n", "\nName it.\n"),
        ("<|image_1|> Name it.\n", "Name it.\n", " Name it.\n"),
        ("<|image_1|>\n\nName it.", "\nName it.", "\n\nName it."),
        ("Name <|image_1|> now.\n", "Name now.\n", "Name  now.\n"),
        ("Name it: <|image_1|>", "Name it:", "Name it: "),
        ("Name it: <|image_1|>\nNow.", "Name it:\nNow.", "Name it: \nNow."),
        ("Line\n<|image_1|> end", "Line\nend", "Line\n end"),
        ("<|image_1|>\nOne <|image_1|> two", "One two", "\nOne  two"),
        ("Name it. \n", "Name it. \n", "Name it. \n"),
    ],
)
def test_the_image_token_is_taken_out(text, with_image, without):
    assert without_token(text, has_image=True) == with_image
    assert without_token(text, has_image=False) == without


@pytest.mark.parametrize("layout", ["v1", "split"])
@pytest.mark.parametrize(
    ("name", "row", "user"),
    [
        ("ImageNet-1K", 0, "{image}Tell what this ImageNet-1K picture is about\n"),
        ("DocVQA", 1, "{image}Tell what this DocVQA picture is about, and: number 1 of DocVQA \n"),
        ("WebQA", 0, "\nWhich page tells this: number 0 of WebQA\n"),
        ("VisDial", 0, "Which picture do they speak of: Q:is it 0\nA:no\nQ:why\nA:0\n"),
    ],
)
def test_prompts_are_those_of_the_released_models(tmp_path, layout, name, row, user):
    tree.write_tree(tmp_path, layout, [name])
    released = replace(QWEN_VL, newline_at_end=True)
    prompt = released.prompt(single_turn(questions(tmp_path, name)[row].query))
    pieces = (*prompt.trunk, *prompt.branches[0])
    said = "".join(piece if isinstance(piece, str) else "<|image_pad|>" for piece in pieces)
    image = "<|vision_start|><|image_pad|><|vision_end|>\n"
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    asked = f"<|im_start|>user\n{user.format(image=image)}<|im_end|>\n<|im_start|>assistant\n<|emb|>"
    assert said == system + asked


def test_wordings_of_the_split_layout(tmp_path):
    rows = tree.records("DocVQA", "split", rows=2)
    rows[0] |= {"qry_inst": "  <|image_1|> Read \n", "qry_text": "what \nis it? ", "tgt_inst": None}
    rows[1] |= {"qry_inst": "<|image_1|>\nRead", "qry_text": None}
    tree.write_set(tmp_path, "DocVQA", rows, "split")
    assert [q.query.text for q in questions(tmp_path, "DocVQA")] == ["Read what\nis it? \n", "Read\n"]
    rows = tree.records("EDIS", "split", rows=2)
    rows[0] |= {"tgt_inst": "<|image_1|>\nSee:", "tgt_text": ['"a"', " "], "qry_text": "why\n"}
    tree.write_set(tmp_path, "EDIS", rows, "split")
    question = questions(tmp_path, "EDIS")[0]
    assert question.query == Content("\nWhich page tells this: why\n")
    assert [c.text for c in question.candidates] == ['See: "a"\n', "See:\n"]


def test_one_empty_string_for_all_texts_and_null_for_no_image_are_accepted(tmp_path):
    rows = tree.records("NIGHTS", rows=3)
    for row in rows:
        row["tgt_text"] = ""
    tree.write_set(tmp_path, "NIGHTS", rows)
    assert [c.text for q in questions(tmp_path, "NIGHTS") for c in q.candidates] == [""] * 9
    assert all(len(c.images) == 1 for q in questions(tmp_path, "NIGHTS") for c in q.candidates)
    rows = tree.records("VizWiz", rows=3)
    for row in rows:
        row |= {"qry_img_path": None, "tgt_img_path": [None] * 3}
    tree.write_set(tmp_path, "VizWiz", rows)
    assert not any(c.images for q in questions(tmp_path, "VizWiz") for c in (q.query, *q.candidates))


def test_candidates_are_not_stripped(tmp_path):
    folder = tree.write_texts(tmp_path, [("q", ["a", "a ", " a", "a\n", ""]), ("r", ["a ", "b", "c", "d", "e"])])
    assert [c.text for c in questions(folder, "VisualNews_i2t")[0].candidates] == ["a", "a ", " a", "a\n", " "]
    result = evaluate_mmeb(tree.Own(), folder, tmp_path / "out", tasks=["VisualNews_i2t"])
    assert result["tasks"]["VisualNews_i2t"]["candidates"] == (5, 5)


def test_images_elsewhere(tmp_path):
    expected = tree.write_tree(tmp_path, "v1", ["CIRR"])
    model = tree.Oracle(expected)
    (tmp_path / "eval_images").rename(tmp_path / "pictures")
    with pytest.raises(DataError, match=r"eval_images: no such folder; it must hold the images of CIRR"):
        opened(tmp_path, "CIRR")
    result = evaluate_mmeb(model, tmp_path, tmp_path / "out", images=tmp_path / "pictures", tasks=["CIRR"])
    assert result["tasks"]["CIRR"]["score"] == 1.0


# ---------------------------------------------------------------- bad rows and files


def without(column: str, name: str | None = None) -> Callable[[list[dict]], None]:
    def change(rows: list[dict]) -> None:
        for row in rows:
            value = row.pop(column)
            row |= {name: value} if name else {}

    return change


def put(row: int, column: str, value) -> Callable[[list[dict]], None]:
    def change(rows: list[dict]) -> None:
        rows[row][column] = value

    return change


WRONG = {
    "ragged": (put(3, "tgt_img_path", ["CIRR/found 0.png"] * 4), "row 3: 'tgt_text' holds 5 candidates and .* 4;"),
    "one candidate": (put(1, "tgt_text", ["a"]), "row 1: 'tgt_text' holds 1 candidates and 'tgt_img_path' 5"),
    "no column": (without("tgt_img_path"), "no column 'tgt_img_path'. Expected qry_text, .*; found "),
    "near column": (without("qry_img_path", "qry_image_path"), "no column 'qry_img_path'; is it 'qry_image_path'"),
    "outside": (put(2, "qry_img_path", "CIRR/../../x.png"), r"row 2: the image path 'CIRR/\.\./\.\./x.png' leaves"),
    "back": (put(2, "qry_img_path", "CIRR\\..\\x.png"), r"row 2: the image path .* leaves the folder of images"),
    "absolute": (put(4, "qry_img_path", "/etc/hostname"), "row 4: the image path '/etc/hostname' leaves"),
    "nul": (put(4, "qry_img_path", "a\0b"), "row 4: the image path .* leaves"),
    "null text": (put(0, "qry_text", None), "row 0: 'qry_text' must be a string, not null"),
    "null list": (put(5, "tgt_text", None), "row 5: 'tgt_text' must be a list of strings, one per cand.*, not null"),
    "null candidate": (put(5, "tgt_text", ["a", None, *"cde"]), "row 5: candidate 1 in 'tgt_text' must be .* not null"),
    "all alike": (
        lambda rows: rows[2].update(tgt_text=["x", "x"], tgt_img_path=["CIRR/found 0.png"] * 2),
        "row 2: all candidates are the same",
    ),
    "empty query": (lambda rows: rows[1].update(qry_text="<|image_1|>", qry_img_path=""), "row 1: the query is empty"),
    "empty truth": (
        lambda rows: rows[1].update(tgt_text=["", "b"], tgt_img_path=["", ""]),
        "row 1: the ground truth, the first candidate, is empty",
    ),
    "one of one": (
        lambda rows: rows[1].update(tgt_text=["b"], tgt_img_path=[""]),
        "row 1: the number of candidates is 1; a query chooses from at least 2",
    ),
    "other type": (
        lambda rows: [row.update(tgt_text=1) for row in rows],
        "row 0: 'tgt_text' must be a list of strings, one per candidate, not a number",
    ),
    "some text": (
        lambda rows: [row.update(tgt_text="a") for row in rows],
        "row 0: 'tgt_text' must be a list of strings, one per candidate, not a string",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_bad_row_is_named(tmp_path, name):
    change, said = WRONG[name]
    rows = tree.records("CIRR")
    tree.write_set(tmp_path, "CIRR", rows)
    change(rows)
    tree.write_rows(tmp_path, "CIRR", rows)
    model = tree.Oracle({})
    with pytest.raises(DataError, match=said) as caught:
        evaluate_mmeb(model, tmp_path, tmp_path / "out", tasks=["CIRR"])
    assert "CIRR/test-00000-of-00001.parquet" in str(caught.value) and model.calls == 0


def test_a_missing_image_is_named_with_its_row(tmp_path):
    tree.write_set(tmp_path, "CIRR", tree.records("CIRR"))
    (tmp_path / "eval_images" / "CIRR" / "asked 4.png").unlink()
    with pytest.raises(ImageError, match=r"CIRR/test-00000-of-00001.parquet row 4: .*asked 4.png: no such image file"):
        evaluate_mmeb(tree.Own(), tmp_path, tmp_path / "out", tasks=["CIRR"])


def test_a_text_that_the_model_refuses_is_named_with_its_row(tiny_model, tmp_path):
    folder = tree.write_texts(tmp_path / "data", [("q", ["a", "b"]), ("r", ["a", "it is <|emb|>"])])
    with pytest.raises(DataError, match=r"VisualNews_i2t/test-.* row 1: .*special token '<\|emb\|>'"):
        evaluate_mmeb(tiny_model, folder, tmp_path / "out", tasks=["VisualNews_i2t"])


def test_files_that_are_no_tables_are_named(tmp_path):
    tree.write_set(tmp_path, "CIRR", tree.records("CIRR"))
    file = tmp_path / "CIRR" / "test-00000-of-00001.parquet"
    payload = file.read_bytes()
    file.write_bytes(b"not at all")
    with pytest.raises(DataError, match=r"CIRR/test-.*: not a readable Parquet file .*; download it again"):
        opened(tmp_path, "CIRR")
    file.write_bytes(payload[:8] + bytes(200) + payload[208:])
    with pytest.raises(DataError, match=r"CIRR/test-.*: broken after row 0 .*; download it again"):
        questions(tmp_path, "CIRR")
    pq.write_table(pa.Table.from_pylist(tree.records("CIRR")).slice(0, 0), file)
    with pytest.raises(DataError, match=r"CIRR/test-.*: the file has no rows"):
        opened(tmp_path, "CIRR")
    tree.write_set(tmp_path, "CIRR", tree.records("CIRR"))
    pq.write_table(pa.Table.from_pylist(tree.records("CIRR", "split")), tmp_path / "CIRR" / "test-more.parquet")
    with pytest.raises(DataError, match=r"CIRR: files of both layouts, test-00000-of-00001.parquet is v1; keep one"):
        opened(tmp_path, "CIRR")


def test_a_column_that_is_there_twice_is_named(tmp_path):
    tree.write_set(tmp_path, "CIRR", tree.records("CIRR"))
    table = pa.Table.from_pylist(tree.records("CIRR"))
    twice = pa.Table.from_arrays([*table.columns, table["qry_text"]], names=[*table.column_names, "qry_text"])
    pq.write_table(twice, tmp_path / "CIRR" / "test-00000-of-00001.parquet")
    with pytest.raises(DataError, match=r"CIRR/test-.*: the column 'qry_text' is there 2 times; keep one"):
        opened(tmp_path, "CIRR")


def test_a_text_that_is_not_utf8_is_named(tmp_path):
    tree.write_set(tmp_path, "CIRR", tree.records("CIRR"))
    file = tmp_path / "CIRR" / "test-00000-of-00001.parquet"
    table = pq.read_table(file)
    broken = pa.array([b"fine"] * 3 + [b"\xff\xfe"] + [b"fine"] * 2).view(pa.string())
    pq.write_table(table.set_column(table.schema.get_field_index("qry_text"), "qry_text", broken), file)
    with pytest.raises(DataError, match=r"CIRR/test-00000-of-00001.parquet row 3: a text is not UTF-8"):
        questions(tmp_path, "CIRR")


def test_a_misspelt_instruction_is_not_taken_for_the_other_layout(tmp_path):
    rows = tree.records("CIRR", "split")
    for row in rows:
        row["qry_instr"] = row.pop("qry_inst")
        row["tgt_instr"] = row.pop("tgt_inst")
    tree.write_set(tmp_path, "CIRR", rows, "split")
    with pytest.raises(DataError, match=r"no column 'qry_inst'; is it 'qry_instr'\? Expected qry_inst, .*; found .*"):
        opened(tmp_path, "CIRR")
