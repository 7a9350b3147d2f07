"""M-BEIR's training files: every query, its prompts, positives and hard negatives, and every error."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
from pathlib import Path

import pytest
from mbeir_train_tree import ABSENT, CANDIDATES, QUERIES, WITH_NEGATIVES, train_file, union_pool, write_train_tree
from mbeir_tree import NAMES, SIDES, TASKS, WAYS, edit, token_of, write_lines

from muco.data.mbeir import MAX_TARGETS, MBEIRTrainData
from muco.dialogue import Sample
from muco.errors import DataError


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_train_tree(tmp_path_factory.mktemp("mbeir") / "M-BEIR")


@pytest.fixture
def tree(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "M-BEIR"))


def by_token(data: MBEIRTrainData) -> dict[str, Sample]:
    return {token_of(sample.turns[0].query[0]): sample for sample in (data[i] for i in range(len(data)))}


def tokens(contents: tuple) -> list[str]:
    return [token_of(content) for content in contents]


def test_every_query_of_every_data_set_is_a_sample(made: Path) -> None:
    data = MBEIRTrainData(made)
    samples = by_token(data)
    assert set(samples) == {f"q{s}x{t}x{i}" for s, t in TASKS for i in range(QUERIES)}
    assert len(data) == len(TASKS) * QUERIES and data.left_out == 0
    for (data_set, task), i in ((pair, i) for pair in TASKS for i in range(QUERIES)):
        sample = samples[f"q{data_set}x{task}x{i}"]
        (turn,) = sample.turns
        assert turn.kind == NAMES[data_set] and sample.id == f"{data_set}:{task * 100 + i + 1}"
        assert tokens(turn.target) == [f"c{data_set}x{task}x{n}" for n in ((0, 5, 6) if i == 0 else (i,))]
        for contents, modality in ((turn.query, SIDES[task][0]), (turn.target, SIDES[task][1])):
            for content in contents:
                assert len(content.images) == ("image" in modality), "an image where the modality names one"
                assert all(Path(image).is_file() for image in content.images)


def test_prompts_are_wordings_of_the_query_and_candidates_have_none(made: Path) -> None:
    samples = by_token(MBEIRTrainData(made))
    (turn,) = samples["q0x0x1"].turns
    ways = [way[0].upper() + way[1:] for way in WAYS]
    asks = "look for what belongs to VisualNews 0."
    assert [c.text for c in turn.query] == [f"{way} {asks} where does q0x0x1 shine." for way in ways]
    (turn,) = samples["q4x4x1"].turns
    assert turn.query[0].text == "Plainly look for what belongs to NIGHTS 4." and len(turn.query[0].images) == 1
    assert len(turn.query) == 4 and turn.target[0].text == ""
    assert samples["q2x1x0"].turns[0].target[0].text == "The tale of c2x1x0 and its lamp."


def test_hard_negatives_may_be_of_another_modality(made: Path) -> None:
    samples = by_token(MBEIRTrainData(made))
    for data_set, task in TASKS:
        negatives = tokens(samples[f"q{data_set}x{task}x1"].turns[0].negatives)
        others = [f"c{s}x{t}x1" for s, t in TASKS if s == data_set and t != task]
        expected = [f"c{data_set}x{task}x2", *others] if data_set in WITH_NEGATIVES else []
        assert negatives == expected
    text, both = samples["q2x1x1"].turns[0].negatives
    assert not text.images and both.images and both.text


def test_positives_of_other_data_sets_are_neither_targets_nor_negatives(made: Path) -> None:
    samples = by_token(MBEIRTrainData(made))
    for data_set, task in ((5, 6), (6, 6), (5, 8), (6, 8)):
        (turn,) = samples[f"q{data_set}x{task}x2"].turns
        assert tokens(turn.target) == [f"c{data_set}x{task}x2"]
        assert f"c{11 - data_set}x{task}x2" not in tokens(turn.negatives)


@pytest.mark.parametrize("limit, count", [(0, 0), (1, 1), (9, 2), (None, 2)])
def test_the_number_of_hard_negatives_has_a_limit(made: Path, limit: int | None, count: int) -> None:
    data = MBEIRTrainData(made, sets=["WebQA"], negatives=limit)
    assert {len(data[i].turns[0].negatives) for i in range(len(data))} == {count}
    with pytest.raises(DataError, match="negatives is -1; it must be 0 or more"):
        MBEIRTrainData(made, negatives=-1)


def test_targets_are_of_the_modality_of_the_first_and_not_too_many(tree: Path) -> None:
    def change(row: dict) -> dict:
        return row | {"pos_cand_list": ["2:202", *(f"2:{101 + n}" for n in range(8))]}

    edit(train_file(tree, "WebQA"), 1, change)  # the first line is a query of task 1, text to text
    edit(train_file(tree, "MSCOCO"), 4, lambda row: row | {"pos_cand_list": [f"9:{301 + n}" for n in range(8)] * 2})
    (turn,) = MBEIRTrainData(tree, sets=["WebQA"])[0].turns
    assert tokens(turn.target) == ["c2x2x1"]
    (turn,) = MBEIRTrainData(tree, sets=["MSCOCO"])[3].turns
    assert tokens(turn.target) == [f"c9x3x{n}" for n in range(CANDIDATES)][:MAX_TARGETS]


def test_what_no_pool_holds_is_counted_and_left_out(tree: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = MBEIRTrainData(tree, sets=["mscoco"])
    assert (data.missing_positives, data.left_out, len(data)) == (1, 0, 2 * QUERIES)
    edit(train_file(tree, "MSCOCO"), 3, lambda row: row | {"pos_cand_list": [ABSENT], "neg_cand_list": ["9:900001"]})
    with caplog.at_level(logging.WARNING):
        data = MBEIRTrainData(tree, sets=["mscoco"])
    assert (data.missing_positives, data.missing_negatives, data.left_out) == (1, 1, 1)
    assert "1 of 6 queries are left out" in caplog.text
    assert [data[i].id for i in range(len(data))] == ["9:1", "9:2", "9:301", "9:302", "9:303"]
    assert data.where(2) == f"{train_file(tree, 'MSCOCO')}:4" == data[-3].where
    write_lines(train_file(tree, "MSCOCO"), [json.loads(train_file(tree, "MSCOCO").read_text().splitlines()[2])])
    with pytest.raises(DataError, match="of 1 queries of MSCOCO none has a positive of its own data set in"):
        MBEIRTrainData(tree, sets=["MSCOCO"])


def test_a_query_with_positives_of_other_data_sets_only_is_left_out(tree: Path) -> None:
    edit(train_file(tree, "OVEN"), 3, lambda row: row | {"pos_cand_list": row["pos_cand_list"][:1]})
    data = MBEIRTrainData(tree, sets=["OVEN"])
    assert (len(data), data.left_out, data.missing_positives) == (2 * QUERIES - 1, 1, 0)
    assert "5:603" not in [data[i].id for i in range(len(data))]


def test_the_union_of_queries_repeats_and_can_be_narrowed(made: Path) -> None:
    assert len(MBEIRTrainData(made, queries="union_train")) == 2 * len(TASKS) * QUERIES
    data = MBEIRTrainData(made, queries="union_train", sets=["CIRR"])
    assert [data[i].id for i in range(len(data))] == [f"8:{700 + n}" for n in (1, 1, 2, 2, 3, 3)]


def test_local_pools_serve_where_the_union_is_not_there(tree: Path) -> None:
    whole = MBEIRTrainData(tree, sets=["EDIS", "OVEN"])
    expected, fingerprint = [whole[i] for i in range(len(whole))], whole.fingerprint
    union_pool(tree).unlink()
    data = MBEIRTrainData(tree, sets=["EDIS", "OVEN"])
    assert [data[i] for i in range(len(data))] == expected
    assert data.missing_positives == 2, "those of InfoSeek, whose pools were not asked for"
    assert data.fingerprint != fingerprint
    shutil.rmtree(tree / "cand_pool" / "local")
    with pytest.raises(DataError, match="no such file, and .*local holds no pool of EDIS; download one of them"):
        MBEIRTrainData(tree, sets=["EDIS"])


def test_a_subset_of_the_files_is_enough_unless_one_is_named(tree: Path) -> None:
    train_file(tree, "CIRR").unlink()
    assert len(MBEIRTrainData(tree)) == (len(TASKS) - 1) * QUERIES
    with pytest.raises(DataError, match="mbeir_cirr_train.jsonl: no such file; .* or take 'union_train', which is"):
        MBEIRTrainData(tree, sets=["EDIS", "CIRR"])
    (tree / "query" / "union_train" / "mbeir_union_up_train.jsonl").unlink()
    with pytest.raises(DataError, match="mbeir_union_up_train.jsonl: no such file; download it, or take the files"):
        MBEIRTrainData(tree, queries="union_train")
    with pytest.raises(DataError, match="mbeir_cirr_train.jsonl: no such file; download it, or name other data sets$"):
        MBEIRTrainData(tree, sets=["CIRR"])


def test_pickled_it_is_the_same_and_small(made: Path) -> None:
    data = MBEIRTrainData(made, sets=["CIRR"])
    stored = pickle.dumps(data)
    again = pickle.loads(stored)
    assert [again[i] for i in range(len(again))] == [data[i] for i in range(len(data))]
    assert b"lamp" not in stored, "no text of a candidate is kept in memory"


def test_the_fingerprint_changes_with_what_is_read(tree: Path) -> None:
    first = MBEIRTrainData(tree, sets=["CIRR"]).fingerprint
    assert first == MBEIRTrainData(tree, sets=["CIRR"]).fingerprint and len(first) == 64
    assert first != MBEIRTrainData(tree, sets=["CIRR"], negatives=1).fingerprint
    for file in (train_file(tree, "CIRR"), union_pool(tree), tree / "instructions" / "query_instructions.tsv"):
        file.write_text(file.read_text() + "\n")
        assert first != (first := MBEIRTrainData(tree, sets=["CIRR"]).fingerprint)


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda row: "{", "malformed JSON"),
        (lambda row: "[]", "the line must be a JSON object, not a list"),
        (lambda row: row | {"qid": 7}, "'qid' must be a string or null, not 7"),
        (lambda row: row | {"qid": "8-1"}, "'qid' must be two numbers such as"),
        (lambda row: row | {"qid": "12:1"}, "the query '12:1' is of data set 12; M-BEIR has 0 to 9"),
        (lambda row: row | {"pos_cand_list": []}, "'pos_cand_list' must be a list of at least one candidate"),
        (lambda row: row | {"neg_cand_list": "8:1"}, "'neg_cand_list' must be a list of candidates, not '8:1'"),
        (lambda row: row | {"neg_cand_list": ["eight"]}, "'did' must be two numbers such as"),
    ],
)
def test_a_bad_line_is_named_on_opening(tree: Path, change, sentence: str) -> None:
    where = edit(train_file(tree, "CIRR"), 2, change)
    with pytest.raises(DataError) as error:
        MBEIRTrainData(tree, sets=["CIRR"])
    assert str(error.value).startswith(f"{where}:") and f": {sentence}" in str(error.value)


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda row: row | {"query_modality": "image+text"}, "unknown query_modality 'image+text'; known are"),
        (lambda row: row | {"query_txt": None}, "'query_txt' is missing, but 'query_modality' is 'image,text'"),
        (lambda row: row | {"query_img_path": "../x.png"}, "'query_img_path' is '../x.png'; use the path of an image"),
        (lambda row: row | {"query_modality": "text", "query_img_path": None}, "no prompt for CIRR (data set 8), text"),
    ],
)
def test_a_bad_line_is_named_when_it_is_used(tree: Path, change, sentence: str) -> None:
    where = edit(train_file(tree, "CIRR"), 2, change)
    data = MBEIRTrainData(tree, sets=["CIRR"])
    assert data[0].id == "8:701"
    with pytest.raises(DataError) as error:
        data[1]
    assert str(error.value).startswith(f"{where}: {sentence}")


def test_a_bad_candidate_is_named_when_it_is_used(tree: Path) -> None:
    line = 1 + [json.loads(line)["did"] for line in union_pool(tree).read_text().splitlines()].index("8:702")
    where = edit(union_pool(tree), line, lambda row: row | {"img_path": "/etc/passwd"})
    data = MBEIRTrainData(tree, sets=["CIRR"])
    with pytest.raises(DataError, match="'img_path' is '/etc/passwd'; use the path of an image within") as error:
        data[1]
    assert str(error.value).startswith(where)


def test_an_id_twice_in_the_pools_is_refused(tree: Path) -> None:
    edit(union_pool(tree), 5, lambda row: row | {"did": "9:301"})
    with pytest.raises(DataError, match=r"jsonl:\d+: the id '9:301' is also at .*jsonl:5; ids must be unique"):
        MBEIRTrainData(tree)
    union_pool(tree).write_text("\n")
    with pytest.raises(DataError, match="the file holds no candidate"):
        MBEIRTrainData(tree)


def test_a_file_that_changes_while_it_is_open_is_refused(tree: Path) -> None:
    data = MBEIRTrainData(tree, sets=["CIRR"])
    with union_pool(tree).open("a") as file:
        file.write("\n")
    with pytest.raises(DataError, match="the file changed since it was opened; start again"):
        data[0]


def test_wrong_arguments_are_explained(made: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="unknown data set 'visual_news' of M-BEIR; did you mean 'VisualNews'"):
        MBEIRTrainData(made, sets=["visual_news"])
    with pytest.raises(DataError, match="no data set is named"):
        MBEIRTrainData(made, sets=[])
    with pytest.raises(DataError, match="unknown queries 'val' of M-BEIR; pass 'train' or 'union_train'"):
        MBEIRTrainData(made, queries="val")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="no such folder; it must hold M-BEIR"):
        MBEIRTrainData(tmp_path / "nowhere")
    data = MBEIRTrainData(made, sets="cirr")
    assert data.sets == ("CIRR",) and data.path == made
    with pytest.raises(IndexError, match="row 3 of 3"):
        data[3]
