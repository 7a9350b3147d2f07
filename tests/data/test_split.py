"""A split keeps every row, parts no image, and is the same for any order of rows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from muco.cli import main
from muco.data import open_data
from muco.data.jsonl import write_jsonl
from muco.data.source import InMemory
from muco.data.split import split
from muco.dialogue import Sample, Turn
from muco.errors import DataError, MucoError


def rows_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_the_split_keeps_every_row_and_parts_no_image(scenes: Path, tmp_path: Path) -> None:
    rows = rows_of(scenes / "train.jsonl")
    for row in rows:
        row["image"] = str(scenes / row["image"])
    copy = tmp_path / "copy.png"
    shutil.copy(rows[0]["image"], copy)  # the same picture under another name
    rows += [row | {"id": f"again {i}"} for i, row in enumerate(rows[:20])] + [
        rows[0] | {"image": str(copy), "id": "copy"}
    ]
    write_jsonl(tmp_path / "all.jsonl", rows)
    assert split(open_data(tmp_path / "all.jsonl"), tmp_path / "out")["dev"] >= 6
    parts = {name: open_data(tmp_path / f"out/{name}.jsonl") for name in ("train", "dev")}
    samples = {name: [part[i] for i in range(len(part))] for name, part in parts.items()}
    pictures = {name: {sample.images[0].read_bytes() for sample in part} for name, part in samples.items()}
    assert len(pictures["dev"]) == 6 and len(pictures["train"]) == 58
    assert not pictures["train"] & pictures["dev"]
    by_id = {sample.id: sample.turns for part in samples.values() for sample in part}
    whole = open_data(tmp_path / "all.jsonl")
    assert by_id == {whole[i].id: whole[i].turns for i in range(len(whole))}
    write_jsonl(tmp_path / "turned.jsonl", rows[::-1])
    split(open_data(tmp_path / "turned.jsonl"), tmp_path / "turned")
    held_out = rows_of(tmp_path / "turned/dev.jsonl")
    assert {row["id"] for row in held_out} == {sample.id for sample in samples["dev"]}


def test_samples_that_share_any_image_are_together_and_negatives_do_not_count(scenes: Path, tmp_path: Path) -> None:
    pictures = sorted(str(path) for path in (scenes / "images/train").iterdir())[:24]
    turn = {"query": "q", "target": "t"}
    chains = [{"image": [pictures[n], pictures[n + 1]], "turns": [turn]} for n in (0, 1, 2, 6, 7)]
    shown = [{"turns": [{"query": "q", "target": {"image": pictures[n]}}]} for n in (3, 10, 10)]
    apart = [
        {"image": pictures[n], "turns": [turn | {"negatives": [{"image": pictures[n - 1]}, {"image": pictures[0]}]}]}
        for n in range(12, 24)
    ]
    write_jsonl(tmp_path / "rows.jsonl", [*chains, *shown, *apart])
    for share in (0.2, 0.5):
        split(open_data(tmp_path / "rows.jsonl"), tmp_path / str(share), share)
        sides = []
        for name in ("train", "dev"):
            part = open_data(tmp_path / str(share) / f"{name}.jsonl")
            samples = [part[number] for number in range(len(part))]
            own = {image for sample in samples for image in sample.images}
            sides.append(own | {image for sample in samples for image in sample.turns[0].target[0].images})
        assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 4 + 3 + 1 + 12
        dev = rows_of(tmp_path / str(share) / "dev.jsonl")
        groups = {json.dumps(row.get("image", row["turns"][0]["target"])) for row in dev}
        assert groups, "15 groups: two chains, one picture twice, twelve alone"


def test_samples_without_images_go_by_id_or_target(tmp_path: Path) -> None:
    turns = [{"query": "q", "target": f"t{n % 20}"} for n in range(60)]
    rows = [{"turns": [turn]} | ({"id": f"i{n % 10}"} if n < 30 else {}) for n, turn in enumerate(turns)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert split(open_data(tmp_path / "rows.jsonl"), tmp_path, 0.2)["dev"] > 0
    train, dev = (rows_of(tmp_path / f"{name}.jsonl") for name in ("train", "dev"))
    keys = [{row.get("id") or row["turns"][0]["target"] for row in part} for part in (train, dev)]
    assert len(train) + len(dev) == 60 and not keys[0] & keys[1] and len(keys[1]) == round(0.2 * 30)


def test_the_command_takes_any_format_and_replaces_nothing(tmp_path: Path, capsys) -> None:
    (tmp_path / "pairs.csv").write_text("query,target\n" + "".join(f"q{n},t{n}\n" for n in range(10)))
    asked = ["data", "split", str(tmp_path / "pairs.csv"), "--format", "pairs", "-o", str(tmp_path / "out"), "--json"]
    assert main(asked) == 0 and json.loads(capsys.readouterr().out) == {"train": 8, "dev": 2}
    assert main(asked) == 1 and "train.jsonl exists; choose another folder" in capsys.readouterr().err


def test_images_of_a_source_with_a_relative_path_are_found_again(tmp_path: Path, monkeypatch) -> None:
    """From any folder: those below the output by relative paths, as they may move with it, others by absolute ones."""
    places = [f"{'data' if n < 5 else 'photos'}/{n}.png" for n in range(10)]
    for n, place in enumerate(places):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        Image.new("RGB", (30, 30), (n * 20, 0, 0)).save(tmp_path / place)
    (tmp_path / "pairs.csv").write_text("image,caption\n" + "".join(f"{place},c\n" for place in places))
    monkeypatch.chdir(tmp_path)
    assert main(["data", "split", "pairs.csv", "--format", "pairs", "--output", "data"]) == 0
    written = {
        row["turns"][0]["query"]["image"] for name in ("train", "dev") for row in rows_of(Path(f"data/{name}.jsonl"))
    }
    assert written == {Path(place).name for place in places[:5]} | {str(tmp_path / place) for place in places[5:]}
    monkeypatch.chdir("/")
    parts = [open_data(tmp_path / f"data/{name}.jsonl") for name in ("train", "dev")]
    found = [part[n].turns[0].query[0].images[0] for part in parts for n in range(len(part))]
    assert len(found) == 10 and all(Path(image).is_file() for image in found)


@pytest.mark.parametrize("share", [0, 1, 1.5, -0.1])
def test_what_cannot_be_split(tmp_path: Path, share: float) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{"turns": [{"query": "q", "target": "t"}]}])
    data = open_data(tmp_path / "rows.jsonl")
    with pytest.raises(MucoError, match="between 0 and 1"):
        split(data, tmp_path / "out", share)
    with pytest.raises(DataError, match="1 samples that share no image are too few to hold 2 out; give more"):
        split(data, tmp_path / "out")
    picture = Image.new("RGB", (30, 30))
    with pytest.raises(DataError, match="save it to a file first"):
        split(InMemory([Sample(picture, [Turn("q", f"t{n}")]) for n in range(4)]), tmp_path / "out")
    assert not (tmp_path / "out").exists()
