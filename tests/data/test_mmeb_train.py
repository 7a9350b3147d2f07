"""MMEB-train: every configuration and split to the letter, hard negatives in every form, and bad rows by name."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import mmeb_train_tree as tree
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from muco.data import rows as rows_module
from muco.data.lines import LONGEST_LITERAL
from muco.data.mmeb import MMEBTrainData, negatives_of
from muco.data.mmeb_files import CONFIGS
from muco.data.mmeb_test import DATA_SETS
from muco.dialogue import Content, Sample
from muco.errors import DataError

WITHOUT_NEGATIVES = tree.pairs("NIGHTS")[0].record


def samples(data: MMEBTrainData) -> list[Sample]:
    return [data[i] for i in range(len(data))]


def one(folder: Path, config: str = "DocVQA", **changes) -> MMEBTrainData:
    """A data set of one row, which differs from a good one."""
    record = tree.pairs(config)[0].record | changes
    tree.write_rows(tree.file_of(folder, config), [record])
    return MMEBTrainData(folder)


# ---------------------------------------------------------------- the published layout


def test_the_configurations_are_those_that_evaluation_knows():
    in_distribution = {data_set.name.replace("ImageNet-1K", "ImageNet_1K") for data_set in DATA_SETS}
    assert set(CONFIGS) == set(tree.ALL) <= in_distribution and len(CONFIGS) == len(tree.ALL) == 20


@pytest.mark.parametrize("split", tree.SPLITS)
def test_every_configuration_is_read_to_the_letter(tmp_path, split):
    data = MMEBTrainData(tree.write_tree(tmp_path), split=split)
    assert data.configs == dict.fromkeys(CONFIGS, 3) and len(data) == 60 and data.skipped == {}
    wanted = [
        sample
        for name in CONFIGS
        for sample in tree.expected(tmp_path, tree.file_of(tmp_path, name, split), name, split)
    ]
    assert samples(data) == wanted
    assert [sample.where for sample in samples(data)] == [data.where(i) for i in range(60)]
    assert [sample.where for sample in samples(data)] == [sample.where for sample in wanted]
    assert data[-1] == wanted[-1] and {sample.turns[0].kind for sample in wanted} == set(CONFIGS)
    for index in (60, -61):
        with pytest.raises(IndexError, match="of 60"):
            data[index]


@pytest.mark.parametrize("name", ["original-00000-of-00001.parquet", "train-00000-of-00001.parquet"])
def test_one_file_of_the_layout(tmp_path, name):
    file = tree.write_rows(tmp_path / "CIRR" / name, [pair.record for pair in tree.pairs("CIRR")])
    wanted = tree.expected(tmp_path, file, "CIRR")
    assert samples(MMEBTrainData(file)) == samples(MMEBTrainData(tmp_path)) == wanted


def test_a_file_of_another_place_has_its_own_name_as_kind(tmp_path):
    file = tree.write_rows(tmp_path / "mine.parquet", [tree.pairs("CIRR")[0].record])
    data = MMEBTrainData(file, images=tmp_path)
    assert data[0].turns[0].kind == "mine" and data[0].images[0] == str(tmp_path / "images/CIRR/Train/asked 0.jpg")


def test_older_names_are_read_where_there_are_no_others(tmp_path):
    for number in (0, 1):  # also in two files
        made = [pair.record for pair in tree.pairs("SUN397", rows=4)][2 * number : 2 * number + 2]
        tree.write_rows(tmp_path / f"SUN397/train-{number:05}-of-00002.parquet", made)
    data = MMEBTrainData(tmp_path)
    assert [sample.turns[0].target[0].text for sample in samples(data)] == [f"answer {n} of SUN397" for n in range(4)]
    assert data.where(3).endswith("train-00001-of-00002.parquet row 1")
    with pytest.raises(DataError, match="no <configuration>/diverse_instruction-"):
        MMEBTrainData(tmp_path, split="diverse_instruction")
    tree.write_tree(tmp_path, ["SUN397"])
    assert MMEBTrainData(tmp_path).where(0).endswith("original-00000-of-00001.parquet row 0")


def test_configurations_can_be_chosen(tmp_path):
    tree.write_tree(tmp_path, ["CIRR", "NIGHTS", "WebQA"])
    assert list(MMEBTrainData(tmp_path, configs=["WebQA", "CIRR"]).configs) == ["WebQA", "CIRR"]
    for configs, message in (
        (["ImageNet-1K"], "unknown configuration 'ImageNet-1K'; did you mean 'ImageNet_1K'"),
        (["zzz"], "unknown configuration 'zzz'; accepted are ImageNet_1K, "),
        (["MSCOCO"], r"MSCOCO: no original-\*.parquet and no \*_generated_sentence.parquet; download the files"),
        (["CIRR", "CIRR"], "and each once"),
        ([], "at least one configuration"),
        ("CIRR", "must be a list of names, not the text 'CIRR'"),
    ):
        with pytest.raises(DataError, match=message):
            MMEBTrainData(tmp_path, configs=configs)
    with pytest.raises(DataError, match="configs can be chosen from a folder; this is one file"):
        MMEBTrainData(tree.file_of(tmp_path, "CIRR"), configs=["CIRR"])


def test_a_cap_takes_the_same_rows_of_each_configuration_every_time(tmp_path):
    root = tree.write_tree(tmp_path, ["CIRR", "NIGHTS"], rows=3)
    tree.write_rows(root / "CIRR" / "original-00001-of-00002.parquet", [p.record for p in tree.pairs("CIRR", rows=40)])
    whole, capped = MMEBTrainData(root), MMEBTrainData(root, rows_per_config=20)
    assert whole.configs == {"CIRR": 43, "NIGHTS": 3} and capped.configs == {"CIRR": 20, "NIGHTS": 3}
    assert len(capped) == 23 and samples(capped) == samples(MMEBTrainData(root, rows_per_config=20))
    places = [capped.where(i) for i in range(23)]
    assert [sample.where for sample in samples(capped)] == places and len(set(places)) == 23
    assert places == sorted(places, key=[whole.where(i) for i in range(46)].index), "in the order of the files"
    assert samples(MMEBTrainData(root, configs=["CIRR"], rows_per_config=20)) == samples(capped)[:20]
    assert len({d.fingerprint for d in (whole, capped, MMEBTrainData(root, rows_per_config=19))}) == 3
    assert samples(MMEBTrainData(root, rows_per_config=43)) == samples(whole)
    for wrong in (0, -1, 2.5, True, "20"):
        with pytest.raises(DataError, match="rows_per_config must be a positive whole number"):
            MMEBTrainData(root, rows_per_config=wrong)


def test_what_is_not_there_or_has_another_name(tmp_path):
    with pytest.raises(DataError, match="nothing.parquet: no such file|cannot be read"):
        MMEBTrainData(tmp_path / "nothing.parquet")
    with pytest.raises(DataError, match="no <configuration>/original-.*; configurations are ImageNet_1K, N24News"):
        MMEBTrainData(tmp_path)
    with pytest.raises(DataError, match="unknown split 'diverse_instructions'; did you mean 'diverse_instruction'"):
        MMEBTrainData(tmp_path, split="diverse_instructions")
    tree.write_tree(tmp_path, ["CIRR"])
    with pytest.raises(DataError, match="pictures: no such folder; it must hold what the paths of images"):
        MMEBTrainData(tmp_path, images=tmp_path / "pictures")
    tree.write_rows(tree.file_of(tmp_path, "Visual7w"), [WITHOUT_NEGATIVES])
    with pytest.raises(DataError, match="Visual7w: unknown configuration 'Visual7w'; did you mean 'Visual7W'"):
        MMEBTrainData(tmp_path)


def test_columns_are_checked(tmp_path):
    record = {key.replace("pos_text", "pos_txt"): value for key, value in WITHOUT_NEGATIVES.items()}
    file = tree.write_rows(tree.file_of(tmp_path, "NIGHTS"), [record])
    with pytest.raises(DataError) as caught:
        MMEBTrainData(tmp_path)
    assert str(caught.value).startswith(f"{file}: no column 'pos_text'; is it 'pos_txt'? Expected qry, qry_image_path,")
    assert str(caught.value).endswith("found qry, qry_image_path, pos_txt, pos_image_path")
    with pytest.raises(DataError, match="the column 'qry' must hold strings, not list"):
        one(tmp_path, "NIGHTS", qry=["a"])


# ---------------------------------------------------------------- texts, images and empty sides


@pytest.mark.parametrize(
    ("text", "with_image", "without"),
    [
        ("<|image_1|>\nName it.\n", "Name it.\n", "\nName it.\n"),
        ("<|image_1|> Name it.", "Name it.", " Name it."),
        ("Name <|image_1|> it.", "Name it.", "Name  it."),
        ("Name it.", "Name it.", "Name it."),
        ("<|image_1|>\n", "", None),
        ("", "", None),
    ],
)
@pytest.mark.parametrize("side", ["qry", "pos"])
def test_the_placeholder_goes_wherever_it_stands(tmp_path, text, with_image, without, side):
    columns = {"qry": ("qry", "qry_image_path"), "pos": ("pos_text", "pos_image_path")}[side]
    sample = one(tmp_path / "with", **dict(zip(columns, (text, "images/a.jpg"), strict=True)))[0]
    image = (str(tmp_path / "with" / "images/a.jpg"),)
    if side == "qry":
        assert sample.images == image and sample.turns[0].query == (Content(with_image),)
    else:
        assert sample.turns[0].target == (Content(with_image, image),)
    if without is None:
        with pytest.raises(DataError, match=f"no row has a query and a target .1 rows: the {_side(side)} is empty"):
            one(tmp_path / "without", **dict.fromkeys(columns, ""))
        return
    sample = one(tmp_path / "without", **dict(zip(columns, (text, ""), strict=True)))[0]
    assert getattr(sample.turns[0], _side(side)) == (Content(without),)


def _side(side: str) -> str:
    return {"qry": "query", "pos": "target"}[side]


def test_rows_with_an_empty_side_are_left_out_and_counted(tmp_path):
    good = tree.pairs("OK-VQA")[0].record
    no_query, no_target = {"qry": "<|image_1|>\n ", "qry_image_path": ""}, {"pos_text": " \n"}
    nothing = no_query | {"pos_text": None, "pos_image_path": None}
    made = [good | no_query, good, good | no_target, good | nothing, good | no_target, good]
    tree.write_rows(tree.file_of(tmp_path, "OK-VQA"), made)
    tree.write_rows(tree.file_of(tmp_path, "CIRR"), [tree.pairs("CIRR")[0].record])
    data = MMEBTrainData(tmp_path)
    assert data.skipped == {"query and target are empty": 1, "the query is empty": 1, "the target is empty": 2}
    assert [data.where(i).split()[-1] for i in range(3)] == ["1", "5", "0"]
    assert [data[i].where for i in range(3)] == [data.where(i) for i in range(3)]
    assert data.configs == {"OK-VQA": 2, "CIRR": 1}


def test_null_is_absent(tmp_path):
    sample = one(tmp_path, qry_image_path=None, neg_text=None, neg_image_path=None, pos_image_path=None)[0]
    assert sample.images == () and sample.turns[0].negatives == () and sample.turns[0].target[0].images == ()


@pytest.mark.parametrize("column", ["qry_image_path", "pos_image_path", "neg_image_path"])
@pytest.mark.parametrize("path", ["../a.jpg", "/a.jpg", "images/../../a.jpg", "a\0b.jpg"])
def test_a_path_must_not_leave_the_folder_of_images(tmp_path, column, path):
    data = one(tmp_path, **{column: path})
    with pytest.raises(DataError, match=f"parquet row 0: '{column}' is .*; use the path of an image within"):
        data[0]


# ---------------------------------------------------------------- hard negatives


@pytest.mark.parametrize(
    ("text", "image", "wanted"),
    [
        ("", "", []),
        (None, None, []),
        ("wrong", "", [("wrong", "")]),
        ("", "a.jpg", [("", "a.jpg")]),
        ("wrong", "a.jpg", [("wrong", "a.jpg")]),
        (["a", "b"], None, [("a", ""), ("b", "")]),
        (["a", "b"], "", [("a", ""), ("b", "")]),
        (["a", ""], ["", "b.jpg"], [("a", ""), ("", "b.jpg")]),
        (["a", "", None], ["", "", ""], [("a", "")]),
        ([], [], []),
        ("", ["a.jpg", "b.jpg"], [("", "a.jpg"), ("", "b.jpg")]),
        ("['a', \"it's\"]", "['', '']", [("a", ""), ("it's", "")]),
        ('["a", "b"]', "[]", [("a", ""), ("b", "")]),
        ("['', '']", "['a.jpg', 'b.jpg']", [("", "a.jpg"), ("", "b.jpg")]),
        ("['a', None]", "", [("a", "")]),
        ("[]", "[]", []),
        ("[0.57, DarkOrange]", "", [("[0.57, DarkOrange]", "")]),  # answers about charts
        ("[14, 15]", "", [("[14, 15]", "")]),
        ("[sic] wrong", "", [("[sic] wrong", "")]),
        ("<|image_1|>\n", "a.jpg", [("<|image_1|>\n", "a.jpg")]),
        ("<|image_1|>\n", "", []),
    ],
)
def test_negatives_in_every_form(tmp_path, text, image, wanted):
    assert negatives_of({"neg_text": text, "neg_image_path": image}) == wanted
    negatives = one(tmp_path, neg_text=text, neg_image_path=image)[0].turns[0].negatives
    assert negatives == tuple(
        Content(text.replace("<|image_1|>\n", ""), (str(tmp_path / image),) if image else ()) for text, image in wanted
    )


@given(st.lists(st.text()))
def test_a_list_written_as_a_string_is_the_list(texts):
    assert negatives_of({"neg_text": str(texts)}) == negatives_of({"neg_text": texts})


@pytest.mark.parametrize(
    ("text", "image", "message"),
    [
        (["a", "b"], ["a.jpg"], "'neg_text' holds 2 negatives and 'neg_image_path' 1; fix one of them"),
        ("a", "['a.jpg', 'b.jpg']", "'neg_text' holds 1 negatives and 'neg_image_path' 2; fix one of them"),
        ("['a', 'b'", "", "'neg_text' looks like a list but is not valid: "),
        ("['a', open('x')]", "", "'neg_text' looks like a list but is not valid: "),
        ("['a'] + ['b']", "", "'neg_text' looks like a list but is not valid: "),
        ("['a' 'b']", "", "'neg_text' is a list without commas: "),
        ("['a', 'b'\n 'c']", "", "'neg_text' is a list without commas: "),
        ("['a', 1]", "", "negative 1 in 'neg_text' must be a string, not a number"),
        ("['a'], 'b'", "", "'neg_text' must be one list, not "),
        ("['" + "a" * LONGEST_LITERAL + "']", "", "'neg_text' is a list of 1,048,580 characters; at most 1,048,576"),
        ("['a', " + "[" * 500, "", "'neg_text' looks like a list but is not valid: "),
        (["a"], [["b"]], "negative 0 in 'neg_image_path' must be a string, not a list"),
    ],
)
def test_bad_negatives_are_named(tmp_path, text, image, message):
    data = one(tmp_path, neg_text=text, neg_image_path=image)
    with pytest.raises(DataError) as caught:
        data[0]
    assert str(caught.value).startswith(f"{tree.file_of(tmp_path, 'DocVQA')} row 0: {message}")


def test_nothing_in_the_data_is_executed(tmp_path):
    call = f"['a', __import__('pathlib').Path({str(tmp_path / 'ran')!r}).touch()]"
    data = one(tmp_path, neg_text=call)
    with pytest.raises(DataError, match="looks like a list but is not valid"):
        data[0]
    assert not (tmp_path / "ran").exists()


# ---------------------------------------------------------------- captions


@pytest.mark.parametrize("as_string", [False, True])
def test_captioned_files(tmp_path, as_string):
    made = [tree.captioned("CIRR", row) for row in range(2)]
    if as_string:
        made = [record | {key: str(record[key]) for key in ("neg_text", "neg_image_path")} for record in made]
    made[1] |= {"qry_sentence": None, "pos_sentence": "<|image_1|>a square"}
    file = tree.write_rows(tmp_path / "CIRR" / "CIRR_generated_sentence.parquet", made)
    data = MMEBTrainData(tmp_path)
    assert data.has_captions and captions(data[0]) == ("what is asked about in 0", "what is found in 0")
    assert captions(data[-1]) == ("", "a square")
    assert data[0].turns[0].negatives == tuple(Content(f"wrong {n}") for n in range(3))
    assert data[0].turns[0].target == tree.expected(tmp_path, file, "CIRR")[0].turns[0].target
    assert samples(MMEBTrainData(file)) == samples(data)
    with pytest.raises(DataError, match="no <configuration>/diverse_instruction-"):
        MMEBTrainData(tmp_path, split="diverse_instruction")
    tree.write_tree(tmp_path, ["CIRR"])
    with pytest.raises(DataError, match="both original-.* and CIRR_gen.* hold its original pairs; move one of them"):
        MMEBTrainData(tmp_path)
    assert len(MMEBTrainData(tmp_path, split="diverse_instruction")) == 3


def test_a_caption_without_an_image_is_none(tmp_path):
    made = [tree.captioned("WebQA", 0), tree.captioned("DocVQA", 0)]  # images of the target, of the query
    data = MMEBTrainData(tree.write_rows(tmp_path / "WebQA" / "a_generated_sentence.parquet", made))
    assert captions(data[0]) == ("", "what is found in 0") and captions(data[1]) == ("what is asked about in 0", "")


def test_files_without_captions_have_none(tmp_path):
    data = MMEBTrainData(tree.write_tree(tmp_path, ["CIRR"]))
    assert not data.has_captions and captions(data[1]) == ("", "")


def captions(sample: Sample) -> tuple[str, str]:
    return sample.turns[0].query[0].caption, sample.turns[0].target[0].caption


# ---------------------------------------------------------------- fingerprint, workers


def test_the_fingerprint_says_what_is_trained_on(tmp_path):
    first = tree.write_tree(tmp_path / "a", ["CIRR", "NIGHTS"])
    second = tree.write_tree(tmp_path / "b", ["CIRR", "NIGHTS"])
    base = MMEBTrainData(first).fingerprint
    assert base == MMEBTrainData(second).fingerprint == MMEBTrainData(first).fingerprint
    others = [
        MMEBTrainData(first, split="diverse_instruction").fingerprint,
        MMEBTrainData(first, configs=["CIRR"]).fingerprint,
        MMEBTrainData(first, configs=["NIGHTS", "CIRR"]).fingerprint,
    ]
    made = [pair.record for pair in tree.pairs("CIRR")]
    made[2]["neg_text"] = "wrong"
    file = tree.write_rows(tree.file_of(second, "CIRR"), made)
    os.utime(file, ns=(1, 2))
    others.append(MMEBTrainData(second).fingerprint)
    assert len({base, *others}) == 5
    assert MMEBTrainData(second)[2].turns[0].negatives == (Content("wrong"),)


def test_a_text_that_is_not_utf8_is_named(tmp_path):
    file = tree.write_rows(tree.file_of(tmp_path, "CIRR"), [pair.record for pair in tree.pairs("CIRR", rows=2)])
    table = pq.read_table(file)
    for column, message in (("qry", "a text in the column 'qry' is not UTF-8; repair"), ("neg_text", "row 1: a text")):
        bad = pa.array([b"a", b"\xff\xfe"], pa.binary()).view(pa.string())
        pq.write_table(table.set_column(table.schema.get_field_index(column), column, bad), file)
        with pytest.raises(DataError, match=message):
            MMEBTrainData(tmp_path)[1]


class Places(Dataset):
    def __init__(self, data: MMEBTrainData) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> str:
        return f"{self.data[index].where} {self.data[index].turns[0].query[0].text}"


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_read_the_same(tmp_path, monkeypatch, method):
    monkeypatch.setattr(rows_module, "SHARD_ROWS", 2)
    places = Places(MMEBTrainData(tree.write_tree(tmp_path, ["CIRR", "WebQA"], rows=5)))
    here = [places[index] for index in range(10)]
    loader = DataLoader(places, batch_size=3, num_workers=1 if method == "spawn" else 2, multiprocessing_context=method)
    assert [place for batch in loader for place in batch] == here


def test_a_copy_reads_the_same(tmp_path):
    data = MMEBTrainData(tree.write_tree(tmp_path))
    wanted = samples(data)
    copy = pickle.loads(pickle.dumps(data))
    assert samples(copy) == wanted and copy.fingerprint == data.fingerprint
