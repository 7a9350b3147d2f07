"""examples/pictures: from collections to a starter that is packed and scored, and to a search over all of them."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from picture_packages import blot, example
from PIL import Image
from safetensors.torch import load_file
from starter_wheels import NAMES, Wheels

import muco
from muco.data import open_data
from muco.starter import trained
from muco.study.design import recipe_of
from muco.training.recipe import from_dict, load_recipe

collection, compare, debian, looks = (example(name) for name in ("collection", "compare", "debian", "looks"))
pictures, scores, starter = example("pictures"), example("scores"), example("starter")
COLUMNS = {"openclipart": "title", "emoji": "name", "tuxpaint": "sentence"}
WORDS = "red green blue teal pink grey lime navy gold plum".split()


@pytest.fixture(scope="module")
def wheels(tmp_path_factory) -> Iterator[Wheels]:
    place = tmp_path_factory.mktemp("wheels")
    with Wheels(place).published() as found, pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(place / "cache"))
        yield found


@pytest.fixture(scope="module")
def collected(tmp_path_factory) -> Path:
    """Three small collections as their scripts write them."""
    folder = tmp_path_factory.mktemp("pictures")
    for first, (name, column) in enumerate(COLUMNS.items()):
        rows: dict[str, list[dict[str, object]]] = {"train": [], "test": [], "photographs": [], "drawings": []}
        index = []
        (folder / name / "images").mkdir(parents=True)
        for number, word in enumerate(WORDS):
            image, called = f"images/{number}.png", f"a {word} {name}"
            blot(100 * first + number).save(folder / name / image)
            turns = [
                collection.turn("category", ["Which sort?"], ["light", "dark"][number % 2]),
                collection.turn("retrieval", ["What is it called?"], [called, word]),
            ]
            part = "train" if number < 6 and name != "tuxpaint" else "test"
            files = (part,) if name != "tuxpaint" else (("photographs", "drawings")[number % 2],)
            for file in files:
                rows[file].append({"image": image, "turns": turns, "id": str(number)})
            index.append({"id": str(number), "image": image, "part": part, "family": "0", column: called})
        if name == "emoji":
            asked = {"query": "light", "target": {"image": "images/8.png"}, "kind": "meaning"}
            rows["test"].append({"turns": [asked], "id": "8-meaning"})
        for file, found in {**rows, "index": index}.items():
            (folder / name / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
        (folder / name / "summary.json").write_text("{}")
    return folder


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_the_likely_classes_become_a_turn_before_the_last_and_categories_go(collected, wheels, tmp_path):
    output = tmp_path / "train-looks.jsonl"
    looks.add_looks(collected / "openclipart" / "train.jsonl", output, wheels.folder)
    tower, classifier = looks.vision_half(looks.packages.unpacked(looks.packages.VISION, wheels.folder))
    for before, after in zip(lines(collected / "openclipart" / "train.jsonl"), lines(output), strict=True):
        assert [turn["kind"] for turn in before["turns"]] == ["category", "retrieval"]
        assert [turn["kind"] for turn in after["turns"]] == ["looks", "retrieval"]
        assert before["turns"][1] == after["turns"][1]
        with Image.open(collected / "openclipart" / before["image"]) as picture:
            levels = np.asarray(picture.convert("RGB").resize((224, 224), Image.Resampling.BICUBIC), dtype=np.float32)
        features = tower(looks.torch.tensor((levels - 127) / 128).permute(2, 0, 1)[None]).last_hidden_state
        shares = (features.mean((2, 3))[0] @ classifier["weight"].T + classifier["bias"]).softmax(-1)
        order = shares.argsort(descending=True)[:3].tolist()
        likely = [NAMES[n] for n in order if shares[n] >= 0.05] or [NAMES[order[0]]]
        assert after["turns"][0]["target"] == list(dict.fromkeys([", ".join(likely), likely[0]]))


@pytest.mark.slow
def test_from_nothing_to_weights_scores_and_a_search(collected, wheels, tmp_path, capsys):
    output = tmp_path / "starter"
    arguments = ["--output", output, "--pictures", collected, "--from", wheels.folder, "--layers", 2]
    changes = ["--set", "trainer.max_steps=2", "--set", "batch.size=3", "--set", "model.adapter.rank=4"]
    starter.main([*map(str, arguments), *changes])
    weights, model = output / "weights", output / "run" / "model"

    joined = trained.trained(weights, source=wheels.folder)
    inputs = ["a red star", collected / "emoji" / "images" / "3.png"]
    expected, found = (muco.load(path, device="cpu").encode(inputs) for path in (model, joined))
    assert (expected * found).sum(1).min() > 1 - 1e-5

    recorded = json.loads((output / "scores.json").read_text())
    assert [*recorded["scores"]] == [*scores.PARTS]
    emoji = recorded["scores"]["emoji/test"]["text -> image"]
    assert emoji["queries"] == 4 and emoji["chance@1"] == 0.25 and emoji["chance@10"] == 1
    assert recorded["scores"]["emoji/test"]["keywords -> image"]["queries"] == 1
    card = " ".join((weights / "README.md").read_text().split())
    assert f"| emoji/test, 4 | {100 * emoji['hit@10']:.1f} (" in card and "python examples/pictures/starter.py" in card
    assert "it saw 12 drawings and emoji" in card and "2 steps of 3 pictures" in card and "--layers 2" in card

    capsys.readouterr()
    pictures.main(["--output", str(collected), "--root", "/", "--model", str(model), "--no-serve"])
    page = (collected / "found.html").read_text(encoding="utf-8")
    assert capsys.readouterr().out.splitlines()[-1] == str(collected / "found.html")
    held_out = {f"a {word} {name}" for name in COLUMNS for word in WORDS[6 * (name != "tuxpaint") :]}
    asked = pictures.QUERIES.read_text().splitlines()
    assert re.findall("<h2>(.*?)</h2>", page) == asked
    assert set(re.findall("<figcaption>(.*?)</figcaption>", page)) <= held_out
    assert {row["title"] for row in lines(collected / "held-out.jsonl")} == held_out


def test_a_comparison_of_halves_and_turns(collected, wheels, tmp_path, monkeypatch):
    study = compare.halves(collected, wheels.folder)
    monkeypatch.setattr(compare, "HALVES", {"one": (True, False), "other": (False, True)})
    monkeypatch.setattr(compare, "LAYERS", 2)
    data = tmp_path / "data"
    study.prepare(data, 1.0)
    samples = open_data(data / "train.jsonl")
    assert len(samples) == 12 and {sample.turns[-2].kind for sample in samples} == {"looks"}
    assert open_data(data / "openclipart" / "test.jsonl")[0].images[0].is_file()
    pretrained = load_file(data / "base" / "model.safetensors")
    for language, tower in compare.HALVES.values():
        weights = load_file(data / compare.base_name(language, tower) / "model.safetensors")
        for part, kept in (("language_model.layers", language), ("vision_tower.encoder", tower)):
            own = [name for name in weights if part in name and weights[name].ndim > 1 and "squeeze" not in name]
            assert own and all(torch.equal(weights[name], pretrained[name]) == kept for name in own)
        assert np.isfinite(muco.load(data / compare.base_name(language, tower), device="cpu").encode("a ring")).all()
    costs = {run.name: {"seconds": 1.0} for run in study.runs}
    for run in study.runs:
        recipe = from_dict(recipe_of(study, run, 0, 1.0, tmp_path, costs=costs))
        assert recipe.trainer["max_steps"] == compare.STEPS and recipe.model.path.startswith(str(data))


def test_the_start_of_the_comparison_of_turns_learns_on_other_pictures_by_its_connector_alone(
    collected, wheels, tmp_path, monkeypatch
):
    monkeypatch.setattr(compare, "LAYERS", 2)
    study, data, pictures = (
        compare.turns(tmp_path / "pictures", wheels.folder),
        tmp_path / "data",
        tmp_path / "pictures",
    )
    shutil.copytree(collected, pictures)
    shutil.copy(pictures / "openclipart" / "test.jsonl", pictures / "openclipart" / "dev.jsonl")
    study.prepare(data, 0.01)
    seen = [{sample.images[0] for sample in open_data(data / f"{name}.jsonl")} for name in ("train", "others")]
    assert len(seen[0]) == len(seen[1]) == 6 and not seen[0] & seen[1]
    before, after = (load_file(data / name / "model.safetensors") for name in ("base", "start"))
    changed = {name for name, weight in before.items() if not torch.equal(weight, after[name])}
    assert changed and all("multi_modal_projector" in name for name in changed)
    costs = {run.name: {"seconds": 1.0} for run in study.runs}
    tuned = replace(study, runs=(*study.runs, *study.tuning.values()))
    for run in tuned.runs:
        recipe = from_dict(recipe_of(tuned, run, 0, 1.0, tmp_path, costs=costs | {run.name: {"seconds": 1.0}}))
        assert recipe.model.path == str(data / "start") and recipe.model.connector == "trained"
        assert recipe.trainer["max_steps"] == (1 if run.fixed else compare.REAL_STEPS)
    assert np.isfinite(muco.load(data / "start", device="cpu").encode("a ring")).all()


def test_a_comparison_of_the_demos_model_with_the_starters_base(wheels, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "LAYERS", 2)
    study = compare.demo(tmp_path, wheels.folder)
    study.prepare(tmp_path / "data", 0.001)
    assert len(open_data(tmp_path / "data" / "test.jsonl")) == 32
    costs = {compare.TINY: {"seconds": 1.0}, compare.PRE_TRAINED: {"seconds": 10.0}}
    tiny, base = (from_dict(recipe_of(study, run, 0, 1.0, tmp_path, costs=costs)) for run in study.runs)
    assert tiny.model.tiny and base.model.path == str(tmp_path / "data" / "base") and base.model.adapter.rank == 32
    assert (tiny.trainer["max_steps"], base.trainer["max_steps"]) == (650, 65)
    own = load_recipe(compare.RECIPE_OF_DEMO)
    assert (tiny.turns, tiny.loss, tiny.model) == (own.turns, own.loss, own.model)


def test_ranks_are_counted_by_hand_and_equal_titles_are_no_rivals():
    pool = np.eye(4, dtype=np.float32)
    queries = np.array([[1, 0, 0, 0], [0.9, 0.3, 0, 0], [0, 0, 1, 1], [0, 0, 1, 0.1]], dtype=np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    alone, own = [[i] for i in range(4)], np.arange(4)
    found = scores.with_intervals(queries, pool, own, alone, ["a", "b", "c", "d"])
    assert found["queries"] == 4 and found["hit@1"] == 0.25 and found["chance@1"] == 0.25  # the tie is lost
    low, high = found["interval@1"]
    assert low == 0 and 0.25 < high <= 1
    twins = [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert scores.with_intervals(queries, pool, own, twins, list("aabb"))["hit@1"] == 1
    assert scores.with_intervals(queries, pool, own, twins, list("aabb"))["interval@1"] == (1, 1)
    two = scores.with_intervals(queries[1::2], pool, own[1::2], [[1, 0], [3]], list("aabb"))
    assert (two["queries"], two["candidates"], two["hit@1"], two["chance@1"]) == (2, 4, 0.5, 0.25)
    assert scores.alike(["a", "b", "a"]) == [[0, 2], [1], [0, 2]]


# ---------------------------------------------------------------- Debian's packages


@pytest.fixture
def tools(tmp_path, monkeypatch) -> Path:
    """apt-get, dpkg and dpkg-query that are scripts; ``known`` lists what is installed."""
    folder = tmp_path / "bin"
    folder.mkdir()
    scripts = {
        "apt-get": 'shift; for name in "$@"; do [ "$name" = none ] && echo "E: Unable to locate package none" >&2 '
        '&& exit 100; echo "$name" > "${name}_1_all.deb"; done',
        "dpkg": 'mkdir -p "$3/usr/share"; cp "$2" "$3/usr/share/"',
        "dpkg-query": f'grep -qx "$3" {tmp_path}/known && printf installed',
    }
    for name, body in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    (tmp_path / "known").write_text("")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return tmp_path


def test_packages_are_unpacked_beside_it_all(tools):
    folder = tools / "debian"
    (folder / "packages").mkdir(parents=True)  # of a call that was killed
    assert debian.root(folder, ("one", "two")) == folder
    assert {file.name for file in (folder / "usr/share").iterdir()} == {"one_1_all.deb", "two_1_all.deb"}
    assert not (folder / "packages").exists()
    (tools / "bin" / "apt-get").unlink()
    assert debian.root(folder, ("one", "two")) == folder  # it is there


def test_installed_packages_are_not_downloaded(tools):
    (tools / "known").write_text("one\ntwo\n")
    assert debian.root(tools / "debian", ("one", "two")) == Path("/")
    assert not (tools / "debian").exists()


def test_a_package_that_apt_does_not_know(tools):
    with pytest.raises(muco.DataError, match="package none; perhaps `apt update` first, or by hand: apt"):
        debian.root(tools / "debian", ("one", "none"))


def test_another_system(tools, monkeypatch):
    monkeypatch.setenv("PATH", str(tools / "nowhere"))
    with pytest.raises(muco.DataError, match="there is no apt-get here; on Debian or Ubuntu: apt install one"):
        debian.root(tools / "debian", ("one",))
