"""examples/pictures: collections of generated packages become samples; what is left out is counted by its reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from picture_packages import example, noise, png_header, write_clipart, write_stamps
from PIL import Image

import muco
from muco.data.check import check

packages, collection, titles = example("packages"), example("collection"), example("openclipart_titles")
openclipart, tuxpaint, emoji = example("openclipart"), example("tuxpaint"), example("emoji")


@pytest.fixture(scope="module")
def clipart(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("clipart")
    write_clipart(root)
    return root


@pytest.fixture(scope="module")
def drawings(clipart, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("out") / "openclipart"
    openclipart.main(["--root", str(clipart), "--output", str(output)])
    return output


@pytest.fixture(scope="module")
def stamps(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("stamps")
    write_stamps(root)
    return root


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


# ---------------------------------------------------------------- openclipart


def test_drawings_are_counted_and_what_is_left_out_has_its_reason(drawings):
    found = summary(drawings)
    lion = next(row for row in rows(drawings / "index.jsonl") if row["title"] == "Lion")
    pictures = 12 if lion["part"] == "train" else 11  # a second lion is trained on, or left out beside a held-out one
    assert found["pictures"] == pictures == sum(found["parts"].values()) == len(list((drawings / "images").iterdir()))
    assert found["left_out"] == {
        "no title of its own": 3,  # xq_03 is no word
        "SVG cannot be read": 2,
        **({"title of another picture, and like a held-out one": 1} if pictures == 11 else {}),
        "not said to be in the public domain": 1,
        "too many pixels": 1,
        "PNG cannot be read": 1,
        "nothing to be seen on white": 1,
        "theme icons": 2,
        "stars by number of points": 1,
        "patterns": 1,
        "buttons": 1,
        "no SVG of the same name": 1,
        "a link to another picture": 1,
    }
    assert found["turns"] == {"category": pictures - 1, "keywords": 10, "retrieval": pictures}


def test_titles_and_keywords_are_clean(drawings):
    found = {row["title"]: row for row in rows(drawings / "index.jsonl")}
    wanted = "Lion,Owl,pesce,Red Apple,Green Apple,Pear,Quince,no entry,round about,exit,Rose"
    assert set(found) - {"LION"} == set(wanted.split(","))
    assert found["Lion"]["keywords"] == "cat, big cat" and found["Lion"]["creator"] == "Ann Lee"
    assert found["Lion"]["folder"] == "animals/mammals/big_cats"
    assert found["Owl"]["description"] == "An owl on a branch."


def test_turns_ask_for_category_keywords_and_title(drawings):
    known = {row["id"]: row for part in ("train", "dev", "test") for row in rows(drawings / f"{part}.jsonl")}
    lion = {turn["kind"]: turn["target"] for turn in known["animals-mammals-big-cats-lion-ann-lee-01"]["turns"]}
    assert lion == {
        "category": ["animals, mammals, big cats", "big cats", "animals"],
        "keywords": ["cat, big cat", "cat", "big cat"],
        "retrieval": ["Lion", "Lion, cat, big cat"],
    }
    owl = {turn["kind"]: turn["target"] for turn in known["animals-birds-owl"]["turns"]}
    assert owl["retrieval"] == ["Owl", "Owl, bird", "An owl on a branch."]
    rose = {turn["kind"]: turn["target"] for turn in known["unsorted-rose"]["turns"]}
    assert rose == {"retrieval": ["Rose"]}


def test_near_copies_are_on_one_side_whatever_the_seed(clipart, drawings, tmp_path):
    family = {row["title"]: row["family"] for row in rows(drawings / "index.jsonl")}
    assert family["Red Apple"] == family["Green Apple"] and family["Pear"] == family["Quince"]
    assert len(set(family.values())) == 9
    entries, _, _ = openclipart.collect(clipart, tmp_path)
    for seed in range(8):
        collection.write_split(tmp_path, entries, seed=seed)
        part = {row["title"]: row["part"] for row in rows(tmp_path / "index.jsonl")}
        assert part["Red Apple"] == part["Green Apple"] and part["Pear"] == part["Quince"]
        assert set(part.values()) == {"train", "dev", "test"}


def test_a_second_picture_of_a_title_is_trained_on_unless_the_first_is_held_out(clipart, tmp_path):
    parts = set()
    for seed in range(8):
        entries, more, _ = openclipart.collect(clipart, tmp_path)
        assert [entry.id for entry in more] == ["food-again"]
        collection.write_split(tmp_path, entries, seed=seed, more=more)
        part = {row["id"]: row["part"] for row in rows(tmp_path / "index.jsonl")}
        first = part["animals-mammals-big-cats-lion-ann-lee-01"]
        assert part.get("food-again") == ("train" if first == "train" else None)
        assert (tmp_path / more[0].image).exists() == (first == "train")
        family = {row["id"]: row["family"] for row in rows(tmp_path / "index.jsonl")}
        assert first != "train" or family["food-again"] == family["animals-mammals-big-cats-lion-ann-lee-01"]
        parts.add(first)
    assert len(parts) > 1


def test_of_a_large_family_a_few_are_trained_on(tmp_path):
    (tmp_path / "images").mkdir()
    picture = np.zeros((collection.SMALL, collection.SMALL, 3), dtype=np.float32)
    families = {"flags": collection.LARGEST + 5} | {f"own-{number}": 1 for number in range(20)}
    entries = [
        collection.Entry(f"{name}-{n}", picture + 12 * place, [collection.turn("a", "b", "c")], (name,), {})
        for place, (name, size) in enumerate(families.items())
        for n in range(size)
    ]
    counts = collection.write_split(tmp_path, entries, seed=0)
    train = [row["id"] for row in rows(tmp_path / "train.jsonl")]
    assert sum(id.startswith("flags") for id in train) == collection.LARGEST
    assert len(train) == counts["parts"]["train"] and counts["pictures"] == len(entries)
    flags = [row for row in rows(tmp_path / "index.jsonl") if row["id"].startswith("flags")]
    assert len(flags) == collection.LARGEST + 5 and {row["part"] for row in flags} == {"train"}


def test_a_folder_of_near_copies_is_one_family_for_training():
    keys = openclipart.keys_of("Italy", Path("signs_and_symbols/flags/europe/italy.png"), "A")
    assert ("folder", "signs_and_symbols/flags") in keys
    assert not any(key[0] == "folder" for key in openclipart.keys_of("Flagship", Path("shapes2/a.png"), "A"))
    large = [list(range(collection.LARGEST + 1)), *([number] for number in range(100, 120))]
    for seed in range(8):
        part = collection.split(large, seed)
        assert {part[number] for number in large[0]} == {"train"} and set(part.values()) == {"train", "dev", "test"}


@pytest.mark.parametrize("part", ["train", "dev", "test"])
def test_the_data_pass_the_check(drawings, part):
    report = check(drawings / f"{part}.jsonl")
    assert report.ok and report.samples > 0


def test_a_second_run_writes_the_same_bytes(clipart, drawings, tmp_path):
    openclipart.main(["--root", str(clipart), "--output", str(tmp_path)])
    assert contents(tmp_path) == contents(drawings)


def test_pictures_are_small_rgb_on_white_and_their_margin_is_cut(clipart, drawings):
    for file in (drawings / "images").iterdir():
        with Image.open(file) as picture:
            assert picture.mode == "RGB" and max(picture.size) <= packages.SIDE
    wide = Image.new("RGBA", (900, 900))
    wide.paste((200, 0, 0, 255), (100, 100, 250, 200))
    file = clipart / "wide.png"
    wide.save(file)
    picture = packages.read_picture(file)
    assert picture.width / picture.height == pytest.approx(1.4, abs=0.1) and picture.width >= 150
    assert np.asarray(picture)[0, 0].tolist() == [255, 255, 255]
    assert (np.asarray(picture) == (200, 0, 0)).all(axis=2).mean() > 0.45  # of the whole it has 0.02


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_pictures_of_any_mode_are_read(tmp_path, mode):
    grey = Image.new("L", (300, 200), 255)
    grey.paste(40, (0, 0, 300, 120))
    if mode == "I;16":
        picture = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    else:
        picture = grey.convert("RGBA").convert("P") if mode == "P" else grey.convert(mode, dither=Image.Dither.NONE)
    picture.save(tmp_path / "picture.png")
    found = np.asarray(packages.read_picture(tmp_path / "picture.png"))
    assert found.shape[2] == 3 and found[10, 10].max() <= 45 and found.shape[1] == packages.SIDE


def test_the_pixel_limit_of_pillow_is_as_before(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 12_345)
    (tmp_path / "huge.png").write_bytes(png_header(20_000, 20_000))
    with pytest.raises(packages.TooLarge, match=r"20000 x 20000 pixels; at most 180,000,000 are read"):
        packages.read_picture(tmp_path / "huge.png")
    assert Image.MAX_IMAGE_PIXELS == 12_345


@pytest.mark.parametrize(
    ("title", "stem", "uses", "wanted"),
    [
        ("architetto -- bicchiere 01", "bicchiere_01", 1, "bicchiere"),
        ("AfricanDrum1", "africandrum", 1, "African Drum"),
        ("magnolia-white", "magnolia-white", 1, "magnolia white"),
        ("Hamburger (B and W)", "hamburger_bw", 2, "Hamburger"),
        ("Clipart by Ann Lee - jigsaw_red_10", "jigsaw_green_07", 48, "jigsaw green"),
        ("AIGA_Symbol_Signs", "aiga_escalator_down1", 122, "escalator down"),
        ("stick man", "sm_016", 23, ""),
        ("Candy", "candy_21", 8, "Candy"),
        ("Architetto", "x", 1, ""),
        ("8.5", "x", 1, ""),
        ("01 nomoon", "nomoon", 1, "nomoon"),
        ("", "a_horse", 47, ""),
    ],
)
def test_what_a_drawing_is_called(title, stem, uses, wanted):
    meta = titles.Metadata(title, (), "", "Architetto Ann Lee", True)
    assert titles.title_of(meta, stem, uses) == wanted


def test_names_of_pictures_are_safe_and_never_taken_twice():
    assert collection.picture_id(Path("a/../B c_é.png"), {}) == "a-b-c"
    assert collection.picture_id(Path("a_b.png"), {"a-b", "a-b-2"}) == "a-b-3"
    assert collection.picture_id(Path("é.png"), {}) == "picture"


# ---------------------------------------------------------------- tuxpaint


def test_stamps_are_for_testing_only(stamps, drawings, tmp_path):
    tuxpaint.main(["--root", str(stamps), "--output", str(tmp_path)])
    found = summary(tmp_path)
    assert (found["pictures"], found["photographs"], found["drawings"]) == (5, 2, 3)
    assert found["languages"] == {"de": 3, "sr@latin": 1}
    assert found["left_out"] == {
        "letters, digits and signs": 1,
        "no sentence (another side of a stamp)": 1,
        "sentence of another picture": 1,
        "nothing to be seen on white": 1,
        "sentence cannot be read": 2,
        "PNG cannot be read": 1,
        "too many pixels": 1,
        "SVG without a PNG": 1,
    }
    assert not (tmp_path / "train.jsonl").exists() and not (tmp_path / "dev.jsonl").exists()
    medium = {row["sentence"]: row["medium"] for row in rows(tmp_path / "index.jsonl")}
    drawn = {"A happy duck!", "A hat.", "A car."}
    assert medium == {**dict.fromkeys(drawn, "drawing"), "A crow.": "photograph", "An owl.": "photograph"}
    files = ["test", "photographs", "drawings", "languages/de", "languages/sr@latin"]
    for name in files:
        assert check(tmp_path / f"{name}.jsonl").ok, name
    crow = rows(tmp_path / "photographs.jsonl")[0]
    assert [turn["target"] for turn in crow["turns"]] == [["animals, birds", "birds", "animals"], "A crow."]
    german = {row["id"]: row["turns"][0]["target"] for row in rows(tmp_path / "languages/de.jsonl")}
    assert german["animals-birds-crow"] == "Eine Krähe."


def test_a_stamp_that_another_collection_has_is_left_out(stamps, tmp_path):
    other, output = tmp_path / "other", tmp_path / "out"
    (other / "images").mkdir(parents=True)
    car = packages.read_picture(stamps / "usr/share/tuxpaint/stamps/vehicles/car.png")
    wide = Image.new("RGB", (300, 200), "white")
    wide.paste((235, 235, 235), (0, 150, 300, 190))  # a shadow
    wide.paste(car.resize((2 * car.width, 2 * car.height)), (120, 40))
    wide.save(other / "images/auto.png")
    noise(80).save(other / "images/else.png")
    tuxpaint.main(["--root", str(stamps), "--output", str(output), "--against", str(other)])
    found = summary(output)
    assert found["same"] == {"vehicles-car": "auto"} and found["left_out"]["in the other collection too"] == 1
    assert found["pictures"] == 4 == len(rows(output / "test.jsonl")) == len(list((output / "images").iterdir()))
    with pytest.raises(muco.DataError, match="write that collection first"):
        tuxpaint.main(["--root", str(stamps), "--output", str(output), "--against", str(tmp_path)])


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("script", "package"),
    [(openclipart, "openclipart-png"), (tuxpaint, "tuxpaint-stamps-default"), (emoji, "unicode-data")],
)
def test_a_missing_package_is_one_sentence_with_its_name(script, package, tmp_path):
    with pytest.raises(SystemExit) as stop:
        collection.script(lambda: script.main(["--root", str(tmp_path), "--output", str(tmp_path / "out")]))
    assert stop.value.code.startswith("error: ") and "\n" not in stop.value.code  # exit code 1, the text on stderr
    assert f"install the Debian package {package} (apt install {package})" in stop.value.code
    assert not (tmp_path / "out").exists()


def test_packages_without_a_picture_of_use_are_one_sentence(tmp_path):
    for place in ("openclipart/png", "openclipart/svg", "tuxpaint/stamps"):
        (tmp_path / "usr/share" / place).mkdir(parents=True)
    for script in (openclipart, tuxpaint):
        with pytest.raises(muco.DataError, match=r"that can be used; install the Debian package"):
            script.main(["--root", str(tmp_path), "--output", str(tmp_path / "out")])


@pytest.mark.parametrize(
    "text", ['<!DOCTYPE s [<!ENTITY a "b">]><s>&a;</s>', "<s>", "<?xml version='1.0' encoding='no'?><s/>"]
)
def test_hostile_xml_is_refused(tmp_path, text):
    for encoding in ("utf-8", "utf-16"):
        (tmp_path / "a.svg").write_text(text, encoding=encoding)
        with pytest.raises(muco.DataError, match=r"a\.svg: (it defines XML entities|not XML)"):
            packages.read_xml(tmp_path / "a.svg")
