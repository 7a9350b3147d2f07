"""The emoji of examples/pictures: samples are true, near copies on one side, pictures drawn, figures right."""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.dom import minidom

import numpy as np
import pytest
from picture_packages import example
from PIL import Image

import muco
from muco.data import open_data

collection, emoji_data, emoji_rows = example("collection"), example("emoji_data"), example("emoji")
MISSING = [f"{package} ({file})" for file, package in emoji_data.PACKAGES.items() if not file.is_file()]
installed = pytest.mark.skipif(bool(MISSING), reason=f"not installed here: {', '.join(MISSING)}")


@pytest.fixture(scope="module")
def glyphs() -> dict[Any, Image.Image]:
    found, left_out = emoji_rows.collect()
    assert len(found) + sum(left_out.values()) == len(emoji_data.read_emoji())
    return found


@pytest.fixture(scope="module")
def groups(glyphs) -> list[list[Any]]:
    return emoji_rows.near_copies(glyphs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("emoji")
    emoji_rows.write_data(folder, seed=0, views=3, side=56, limit=200)
    return folder


# ---------------------------------------------------------------- names and keywords


@installed
def test_names_and_groups_are_those_of_unicode():
    emoji = {one.text: one for one in emoji_data.read_emoji()}
    crab, waving, family = emoji["\N{CRAB}"], emoji["\N{WAVING HAND SIGN}"], emoji["\U0001f468‍\U0001f469‍\U0001f466"]
    assert (crab.name, crab.group, crab.subgroup, crab.id) == ("crab", "Food & Drink", "food-marine", "1f980")
    assert (waving.name, waving.group, waving.subgroup) == ("waving hand", "People & Body", "hand-fingers-open")
    assert (family.name, family.subgroup) == ("family: man, woman, boy", "family")
    assert not any("FITZPATRICK" in unicodedata.name(char, "") for text in emoji for char in text)
    # ED-27 of UTS #51, read without our parser: every line of this status, less those that hold a skin tone
    text = emoji_data.NAMES.read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if "; fully-qualified" in line]
    assert len(emoji) == len([line for line in rows if " skin tone" not in line]) > 1500
    assert {one.group for one in emoji.values()} <= {
        line[9:] for line in text.splitlines() if line.startswith("# group")
    }


@installed
def test_most_single_code_points_are_named_as_in_the_character_database():
    singles = [one for one in emoji_data.read_emoji() if len(one.codes) == 1]
    shared = [set(unicodedata.name(one.text, "").lower().split()) & set(one.name.lower().split()) for one in singles]
    assert sum(map(bool, shared)) > 0.75 * len(singles)


@installed
def test_keywords_are_those_of_cldr_without_the_name():
    keywords = emoji_data.read_keywords()
    own, names = {}, {}
    for file in emoji_data.CLDR:
        for node in minidom.parse(str(file)).getElementsByTagName("annotation"):
            target = names if node.getAttribute("type") else own
            target[node.getAttribute("cp")] = node.firstChild.data
    assert keywords["\N{CRAB}"] == ("Cancer", "zodiac")
    for one in emoji_data.annotated(emoji_data.read_emoji(), keywords):
        text = one.text.replace("\ufe0f", "")
        if text not in own:
            assert one.keywords == ()
            continue
        listed = {word.strip() for word in own[text].split("|")}
        assert {word.lower() for word in listed - set(one.keywords)} <= {names[text].lower()}
        assert set(one.keywords) <= listed and names[text] not in one.keywords


@installed
def test_turns_tell_of_their_emoji(glyphs):
    crab = next(one for one in glyphs if one.name == "crab")
    targets = {turn["kind"]: turn["target"] for turn in emoji_rows.turns(crab)}
    assert targets == {
        "group": "Food & Drink",
        "subgroup": "food-marine",
        "keywords": ["Cancer, zodiac", "Cancer", "zodiac"],
        "retrieval": ["crab", "Cancer, zodiac"],
    }
    asked = [query for turn in emoji_rows.turns(crab) for query in turn["query"]]
    assert len(set(asked)) == len(asked) >= 8


# ---------------------------------------------------------------- pictures


@installed
def test_pictures_are_distinct_square_and_not_blank(glyphs):
    seen = {}
    for one, glyph in glyphs.items():
        picture = emoji_data.on_paper(glyph)
        pixels = np.asarray(picture)
        assert picture.mode == "RGB" and picture.size == (84, 84)
        ink = (pixels != 255).any(axis=2)
        assert 0.01 < ink.mean() < 0.97, one.name
        assert seen.setdefault(picture.tobytes(), one) is one


@installed
@pytest.mark.parametrize(
    ("name", "colour"),
    [
        ("red heart", 0),
        ("green heart", 1),
        ("blue heart", 2),
        ("red circle", 0),
        ("blue circle", 2),
        ("green apple", 1),
    ],
)
def test_colours_are_those_of_the_name(glyphs, name, colour):
    one = next(one for one in glyphs if one.name == name)
    red_green_blue = np.asarray(glyphs[one])[..., :3][np.asarray(glyphs[one])[..., 3] > 128].mean(axis=0)
    assert red_green_blue.argmax() == colour


@installed
def test_without_raqm_only_single_code_points_are_drawn():
    pen, full = emoji_data.Pen(raqm=False), emoji_data.Pen()
    kinds = {one.name: one for one in emoji_data.read_emoji()}
    for name in ("crab", "red heart"):
        assert np.array_equal(pen.draw(kinds[name]), full.draw(kinds[name])), name
    for name in ("flag: France", "flag: England", "keycap: 1", "woman artist"):
        assert pen.draw(kinds[name]) is None, name


@installed
def test_what_the_font_lacks_or_does_not_join_is_left_out():
    pen = emoji_data.Pen()
    lacking = emoji_data.Emoji((0xE000,), "private", "g", "s", ("w",))
    apart = emoji_data.Emoji((0x1F980, 0x1F355), "crab and pizza", "g", "s", ("w",))
    crab = replace(apart, codes=(0x1F980,), name="crab of long name")
    twin = replace(crab, name="crab")
    assert pen.draw(lacking) is None and pen.draw(apart) is None
    glyphs, left_out = emoji_data.drawn([lacking, apart, crab, twin, replace(crab, keywords=())], pen)
    assert list(glyphs) == [twin]
    assert left_out == {"no single glyph": 2, "same picture as another": 1, "no keywords besides the name": 1}


@installed
def test_views_differ_and_the_same_seed_gives_the_same_files(folder, tmp_path):
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    pictures = {(folder / row["image"]).read_bytes() for row in rows}
    assert len(pictures) == len(rows) and {row["id"][-2:] for row in rows} == {"-0", "-1", "-2"}
    for name, seed in (("own", 0), ("same", 0), ("other", 1)):
        emoji_rows.write_data(tmp_path / name, seed=seed, views=2, side=56, limit=40)
    for part in ("train", "dev", "test"):
        own, same, other = (
            open_data(tmp_path / name / f"{part}.jsonl").fingerprint for name in ("own", "same", "other")
        )
        assert own == same != other


# ---------------------------------------------------------------- the split


@installed
def test_what_near_copies_have_in_common(glyphs):
    emoji = {one.name: one for one in glyphs}
    names = {name: emoji_rows.base_name(emoji[name]) for name in ("woman dancing", "green heart", "flag: Japan", "man")}
    assert names == {"woman dancing": "dancing", "green heart": "heart", "flag: Japan": "country-flag", "man": "person"}
    assert emoji_rows.base_codes(emoji["woman running"]) == (0x1F3C3,)
    assert emoji_rows.base_codes(emoji["man artist"]) == (0x1F9D1, 0x1F3A8)


@installed
def test_near_copies_are_in_one_family(groups):
    family = {one.name: i for i, group in enumerate(groups) for one in group}
    together = (
        ("artist", "man artist", "woman artist"),
        ("person running", "man running", "woman running"),
        ("man dancing", "woman dancing"),
        ("merperson", "merman", "mermaid"),
        ("red heart", "green heart", "black heart"),
        ("one o’clock", "seven o’clock", "seven-thirty"),
        ("keycap: 1", "keycap: #"),
        ("flag: France", "flag: Japan", "flag: Brazil"),
        ("up arrow", "left arrow"),
        ("family: man, woman, boy", "family: woman, girl"),
        ("new moon", "full moon", "waxing gibbous moon"),
    )
    for names in together:
        assert len({family[name] for name in names}) == 1, names
    for names in (("crab", "pizza"), ("cat", "dog"), ("artist", "firefighter"), ("violin", "trumpet")):
        assert len({family[name] for name in names}) == len(names), names


@installed
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_family_is_on_two_sides_and_parts_have_their_size(groups, seed):
    part = collection.split(groups, seed)
    assert all(len({part[one] for one in group}) == 1 for group in groups)
    assert all(part[one] == "train" for group in groups if len(group) > collection.LARGEST for one in group)
    count = {name: sum(value == name for value in part.values()) / len(part) for name in ("train", "dev", "test")}
    for name, share in collection.PARTS.items():
        assert share - 1 / len(part) <= count[name] < share + collection.LARGEST / len(part)
    assert sum(count.values()) == pytest.approx(1) and count["train"] > 0.7


@installed
def test_no_held_out_picture_or_its_near_copy_was_trained_on(glyphs, groups):
    part = collection.split(groups, 0)
    small = {one: np.asarray(emoji_data.on_paper(glyph, 24), dtype=np.float32) for one, glyph in glyphs.items()}
    train = np.stack([pixels for one, pixels in small.items() if part[one] == "train"])
    for one, pixels in small.items():
        if part[one] == "test":
            assert np.abs(train - pixels).mean(axis=(1, 2, 3)).min() >= collection.ALIKE - 1e-4, one.name


@installed
def test_files_of_the_parts_share_no_emoji_and_the_index_has_all(folder):
    rows = {
        name: [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        for name in ("train", "dev", "test", "index")
    }
    ids = {name: {row["id"].rpartition("-")[0] for row in rows[name]} for name in ("train", "dev", "test")}
    assert not (ids["train"] & ids["test"] or ids["train"] & ids["dev"] or ids["dev"] & ids["test"])
    assert {row["id"] for row in rows["index"]} >= ids["train"] | ids["dev"] | ids["test"]
    family = Counter(row["family"] for row in rows["index"])
    for row in rows["index"]:
        assert row["id"] in ids[row["part"]] or (row["part"] == "train" and family[row["family"]] > collection.LARGEST)
        assert row["name"] and row["keywords"]
    assert len(open_data(folder / "test.jsonl")) == 2 * len(ids["test"])


# ---------------------------------------------------------------- bad input


def test_a_missing_file_names_the_package(tmp_path):
    said = r"gone\.ttf: no such file; install the Debian package fonts-noto-color-emoji"
    with pytest.raises(muco.DataError, match=said):
        emoji_data.Pen(tmp_path / "gone.ttf")
    for package in emoji_data.PACKAGES.values():
        assert package.replace("-", "").isalpha()


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    file = tmp_path / "names.txt"
    with file.open("wb") as hole:
        hole.truncate((16 << 20) + 1)
    with pytest.raises(muco.DataError, match=r"names\.txt: 16,777,217 bytes; at most 16,777,216 are read"):
        emoji_data.read_emoji(file)


@pytest.mark.parametrize(
    "line",
    [
        "1F600 fully-qualified # x E1.0 face",
        "1F600 ; fully-qualified # x 1.0 face",
        "ZZ ; fully-qualified # x E1.0 face",
        "110000 ; fully-qualified # x E1.0 face",
    ],
)
def test_a_line_of_another_form_is_named(tmp_path, line):
    file = tmp_path / "names.txt"
    file.write_text(f"# group: G\n# subgroup: s\n1F600 ; fully-qualified # x E1.0 face\n{line}\n", encoding="utf-8")
    with pytest.raises(muco.DataError, match=r"names\.txt:4: "):
        emoji_data.read_emoji(file)


def test_an_emoji_before_any_group_and_a_file_without_any_are_errors(tmp_path):
    file = tmp_path / "names.txt"
    file.write_text("1F600 ; fully-qualified # x E1.0 face\n", encoding="utf-8")
    with pytest.raises(muco.DataError, match=r"names\.txt:1: .* under a group"):
        emoji_data.read_emoji(file)
    file.write_text("# group: G\n", encoding="utf-8")
    with pytest.raises(muco.DataError, match="no fully-qualified emoji"):
        emoji_data.read_emoji(file)


def test_xml_that_is_broken_or_defines_entities_is_refused(tmp_path):
    file = tmp_path / "en.xml"
    file.write_text(
        '<!DOCTYPE l [<!ENTITY a SYSTEM "file:///etc/hostname">]><l><annotation cp="x">&a;</annotation></l>'
    )
    with pytest.raises(muco.DataError, match=r"en\.xml: it defines XML entities"):
        emoji_data.read_keywords([file])
    file.write_text("<l><annotation>")
    with pytest.raises(muco.DataError, match=r"en\.xml: not XML"):
        emoji_data.read_keywords([file])


def test_a_font_that_is_none_is_one_sentence(tmp_path):
    file = tmp_path / "font.ttf"
    file.write_bytes(b"not a font")
    with pytest.raises(muco.DataError, match=r"font\.ttf: no font with bitmaps of 109 pixels"):
        emoji_data.Pen(file)
