"""Planted overlaps are found and nothing else is; memory holds hashes, and the list of pairs is complete."""

from __future__ import annotations

import io
import json
import shutil
from array import array
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from muco.data import identity, leak, open_data
from muco.data.identity import normalised, words
from muco.data.jsonl import write_jsonl
from muco.data.leak import find_overlap, print_overlap
from muco.dialogue import Sample, Turn
from muco.errors import DataError, OutputError


def rows_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def row(target: str, image: Path | None = None, **turn) -> dict:
    return ({"image": str(image)} if image else {}) | {"turns": [{"query": "what is it?", "target": target, **turn}]}


def written(folder: Path, name: str, rows: list[dict]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / name, rows)
    return folder / name


def noise(path: Path, seed: int, size: int = 64) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)).save(path)
    return path


def template(pair: dict) -> bool:
    return pair["by"] == ["text"] and pair["text"].startswith("Where is the")


@pytest.fixture
def planted(scenes, tmp_path):
    """The scenes, with three of the test rows planted in a copy of the training rows, each in another way."""
    shutil.copytree(scenes, tmp_path / "train")
    train, test = scenes / "train.jsonl", scenes / "test.jsonl"
    rows, asked = rows_of(train), rows_of(test)
    same, again = asked[2]["image"], asked[5]["image"]
    shutil.copy(scenes / same, tmp_path / "train" / "same.png")  # the bytes
    with Image.open(scenes / again) as image:
        image.save(tmp_path / "train" / "again.bmp")  # the pixels
    caption = asked[9]["turns"][-1]["target"]
    assert len(caption.split()) > 8
    rows[4]["image"], rows[6]["image"] = "same.png", "again.bmp"
    rows[8]["turns"][-1]["target"] = f"  {caption.upper().replace(' ', '  ').rstrip('.')} !"
    return written(tmp_path / "train", "train.jsonl", rows), test


def test_planted_images_and_texts_are_found_with_both_places(planted, tmp_path):
    train, test = planted
    result = find_overlap([train], [test], output=tmp_path / "out")
    pairs = [pair for pair in rows_of(tmp_path / "out" / "overlap.jsonl") if not template(pair)]
    assert [(p["train"], p["evaluation"], p["by"]) for p in pairs] == [
        (f"{train}:5", f"{test}:3", ["image file", "image pixels"]),
        (f"{train}:7", f"{test}:6", ["image pixels"]),
        (f"{train}:9", f"{test}:10", ["text"]),
    ]
    assert [Path(p["image"]).name for p in pairs[:2]] == ["same.png", "again.bmp"] and "!" in pairs[2]["text"]
    every = rows_of(tmp_path / "out" / "overlap.jsonl")
    by_text = {pair["evaluation"] for pair in every if "text" in pair["by"]}
    assert result["affected"] == {
        "image": 2,
        "text": len(by_text),
        "either": len(by_text | {pair["evaluation"] for pair in pairs}),
    }
    assert result["shares"]["image"] == 2 / 16
    assert (result["samples"], result["pairs"], result["warnings"]) == (16, len(every), [])
    assert json.loads((tmp_path / "out" / "overlap.json").read_text()) == result


def test_scenes_share_no_image_and_no_caption_but_some_questions(scenes, tmp_path):
    """Their questions come from templates; those of eight words that few evaluation samples have are listed."""
    result = find_overlap([scenes / "train.jsonl"], [scenes / "test.jsonl", scenes / "dev.jsonl"], output=tmp_path)
    assert result["affected"]["image"] == 0 and result["short_texts"] > 32
    assert all(template(pair) for pair in rows_of(tmp_path / "overlap.jsonl"))
    assert result["common_texts"] == result["common_in_training"] > 0
    itself = find_overlap([scenes / "test.jsonl"], [scenes / "test.jsonl"])
    assert itself["affected"]["image"] == itself["affected"]["text"] == 16


def test_order_blocks_and_threads_do_not_change_what_is_found(planted, tmp_path, monkeypatch):
    train, test = planted
    before = find_overlap([train], [test])
    monkeypatch.setattr(identity, "BLOCK", 5)
    assert find_overlap(iter([train]), [test]) == before
    backwards = written(train.parent, "backwards.jsonl", rows_of(train)[::-1])
    again = find_overlap([backwards], [test])
    assert again["affected"] == before["affected"]
    assert again["train"][0]["fingerprint"] != before["train"][0]["fingerprint"]


def test_resized_and_recompressed_copies_are_not_found_as_the_rules_say(tmp_path):
    image = noise(tmp_path / "a.png", 0)
    (tmp_path / "train").mkdir()
    with Image.open(image) as opened:
        opened.save(tmp_path / "train" / "a.jpg")
        opened.resize((32, 32)).save(tmp_path / "train" / "b.png")
    result = find_overlap([tmp_path / "train"], [written(tmp_path, "e.jsonl", [row("x", image)])])
    assert result["affected"]["image"] == 0 and "re-compressed copies are not found" in result["rules"]["image"]


def test_sources_are_files_folders_of_images_and_objects(tmp_path):
    images = [noise(tmp_path / "train" / name, i) for i, name in enumerate(("b.png", "sub/a.png", "c.png"))]
    shutil.copytree(tmp_path / "train", tmp_path / "evaluation")
    (tmp_path / "train" / "phone.heic").write_bytes(b"not read")
    with Image.open(images[2]) as opened:
        held = Sample(image=opened.convert("RGB"), turns=[Turn("", "a text of more words than are asked for")])
    named = Sample(turns=[Turn("q", "A text, of more words than ARE asked for!")], where="mine:1")
    result = find_overlap([tmp_path / "train", [named]], [tmp_path / "evaluation", [held, named]])
    [warning] = result["warnings"]
    assert warning.startswith(f"{tmp_path / 'train'}: files of other kinds are passed over: 1 .heic")
    assert [(s["source"], s["affected"]["either"]) for s in result["sources"]] == [
        (str(tmp_path / "evaluation"), 3),
        ("list", 2),
    ]
    places = [(pair["train"], pair["evaluation"]) for pair in result["listed"]]
    assert places == [
        (str(tmp_path / "train" / "b.png"), str(tmp_path / "evaluation" / "b.png")),
        (str(tmp_path / "train" / "c.png"), str(tmp_path / "evaluation" / "c.png")),
        (str(tmp_path / "train" / "c.png"), "list sample 1"),
        (str(tmp_path / "train" / "sub" / "a.png"), str(tmp_path / "evaluation" / "sub" / "a.png")),
        ("mine:1", "list sample 1"),
        ("mine:1", "mine:1"),
    ]
    assert result["listed"][2]["by"] == ["image pixels"], "a picture in memory has no file"


def test_hard_negatives_count_in_training_only(tmp_path):
    text = "seven green bottles hang on the old wall"
    asked = written(tmp_path, "asked.jsonl", [row(text)])
    assert find_overlap([written(tmp_path, "a.jsonl", [row("x", negatives=[text])])], [asked])["affected"]["text"] == 1
    with_negative = written(tmp_path, "b.jsonl", [row("x", negatives=[text])])
    assert find_overlap([asked], [with_negative])["affected"]["text"] == 0


def test_short_and_common_texts_do_not_count(tmp_path):
    long, shared = "a long text that only one of the samples has", "an instruction that many of the samples share today"
    asked = [row(long), row("Yes"), *[row(shared) for _ in range(leak.COMMON + 1)]]
    evaluation = written(tmp_path, "e.jsonl", asked)
    train = written(tmp_path, "t.jsonl", [row("yes!"), row(shared), row(long)])
    result = find_overlap([train], [evaluation])
    assert [(p["train"], p["evaluation"]) for p in result["listed"]] == [(f"{train}:3", f"{evaluation}:1")]
    assert (result["common_texts"], result["common_in_training"]) == (1, 1)
    assert result["short_texts"] == len(asked) + 1, "the question is short in every row"
    fewer = find_overlap([train], [written(tmp_path, "f.jsonl", asked[:-1])])
    assert fewer["affected"]["text"] == 1 + leak.COMMON


def test_all_pairs_are_in_the_file_and_the_first_ones_in_the_report(tmp_path):
    image = noise(tmp_path / "a.png", 0)
    train = written(tmp_path, "t.jsonl", [row("x", image)] * 15)
    evaluation = written(tmp_path, "e.jsonl", [row("y", image)] * 4)
    result = find_overlap([train], [evaluation], output=tmp_path)
    assert (result["pairs"], len(result["listed"])) == (60, leak.LISTED)
    assert len(rows_of(tmp_path / "overlap.jsonl")) == 60


def test_images_that_cannot_be_read_are_counted_and_named(tmp_path):
    (tmp_path / "cut.png").write_bytes(noise(tmp_path / "a.png", 0).read_bytes()[:200])
    shutil.copy(tmp_path / "cut.png", tmp_path / "copy.png")
    train = written(tmp_path, "t.jsonl", [row("x", tmp_path / "cut.png"), row("x", tmp_path / "gone.png")])
    evaluation = written(tmp_path, "e.jsonl", [row("x", tmp_path / "copy.png")])
    result = find_overlap([train], [evaluation])
    assert result["unreadable"] == {"training": 2, "evaluation": 1}
    assert result["listed"][0]["by"] == ["image file"], "bytes are equal even where pixels cannot be had"
    assert result["warnings"][0].startswith("training data: 2 images cannot be read and are not compared: ")
    assert f"{train}:2: {tmp_path / 'gone.png'}: no such image file" in result["warnings"][0]
    assert f"{evaluation}:1" in result["warnings"][1]


def test_bad_sources_rows_and_outputs_are_errors(tmp_path, scenes):
    good = scenes / "dev.jsonl"
    with pytest.raises(DataError, match="no training data: pass at least one file or folder"):
        find_overlap([], [good])
    with pytest.raises(DataError, match="no evaluation data: pass at least one"):
        find_overlap([good], [])
    with pytest.raises(DataError, match=r"nowhere: no such file or folder"):
        find_overlap([tmp_path / "nowhere"], [good])
    (tmp_path / "empty").mkdir()
    (tmp_path / "rows").mkdir()
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "rows" / "a.parquet")
    with pytest.raises(DataError, match=r"rows: has no images but a\.parquet; pass images, or data in JSONL"):
        find_overlap([tmp_path / "rows"], [good])
    with pytest.raises(DataError, match="no images in this folder"):
        find_overlap([good], [tmp_path / "empty"])
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps(row("x")) + "\n{}\n")
    with pytest.raises(DataError, match=r"bad\.jsonl:2: 'turns' must be a list"):
        find_overlap([bad], [good], output=tmp_path / "out")
    assert not list((tmp_path / "out").iterdir()), "nothing half-written"
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"overlap.jsonl: cannot be written \(Not a directory\); choose another"):
        find_overlap([good], [good], output=tmp_path / "file")


# ── texts ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "text, expected",
    [
        ("  The CAT,\n\tsat -- on it! ", "the cat sat on it"),
        ("Straße ﬁne Ｆｕｌｌ", "strasse fine full"),
        ("soft\u00adhyphen zero\u200bwidth", "softhyphen zerowidth"),
        ("“quoted” don’t", "quoted don t"),
        ("3 + 4 = $7", "3 + 4 = $7"),
        ("हिन्दी में", "हिन्दी में"),
        ("...", ""),
        ("half \ud800", "half"),
    ],
)
def test_texts_are_normalised(text, expected):
    assert normalised(text) == expected


@given(st.text())
def test_normalising_twice_changes_nothing_more(text):
    once = normalised(text)
    assert normalised(once) == once and once == once.strip() and "  " not in once


def test_words_are_counted_in_scripts_without_blanks_too():
    assert words(normalised("one two, three")) == 3 and words("") == 0
    assert words("一只白猫坐在红色的屋顶上看着月亮") >= identity.MIN_WORDS > words("白猫")


# ── showing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_terminal_shows_counts_pairs_and_warnings_as_text(tmp_path):
    text = "[red]a long text[/red] that both of the sides have"
    evaluation = written(tmp_path, "e.jsonl", [row(text), row("other", tmp_path / "gone.png")])
    result = find_overlap([written(tmp_path, "t.jsonl", [row(text)] * 25)], [evaluation])
    stream = io.StringIO()
    print_overlap(result, Console(file=stream, width=400))
    shown = stream.getvalue()
    assert "1 (50.0%)" in shown and "0 (0.0%)" in shown and "together" in shown
    assert f"t.jsonl:1 and {evaluation}:1 share text: {text}" in shown
    assert "… and 5 more pairs" in shown and "Warning: evaluation data: 1 images cannot be read" in shown
    assert "re-compressed copies are not found" in shown


def test_a_large_key_is_looked_up_exactly():
    """Hashes differ in bits that float64 does not hold."""
    big = 2**63 + 5
    index = leak._Index(array("Q", [big, big + 1, 3]), array("Q", [0, 1, 2]))
    assert (index.find(big), index.find(big + 1), index.find(big + 2), index.find(3)) == ([0], [1], [], [2])


def test_data_and_paths_give_the_same(planted):
    train, test = planted
    by_path, by_data = find_overlap([train], [test]), find_overlap([open_data(train)], [open_data(test)])
    assert by_path == by_data
