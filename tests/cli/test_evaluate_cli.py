"""Benchmarks from the command line, end to end: a real tiny model on generated trees, one process and two."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mbeir_tree
import mmeb_train_tree
import mmeb_tree
import mmeb_v2_tree
import pytest
from processes import finished, launch

import muco
from muco.cli import main
from muco.data import open_data
from muco.training.build import build_model
from muco.training.recipe import from_dict

SETS = ("ImageNet-1K", "OK-VQA", "VisDial", "RefCOCO-Matching")
PARTS = ("tasks", "groups", "overall", "missing", "model")


@pytest.fixture(scope="module")
def model(tiny_path) -> Path:
    return tiny_path


@pytest.fixture(scope="module")
def mmeb(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mmeb")
    mmeb_tree.write_tree(folder, "split", names=SETS)
    return folder


@pytest.fixture(scope="module")
def mbeir(tmp_path_factory) -> Path:
    return mbeir_tree.write_tree(tmp_path_factory.mktemp("mbeir"))


def run(capfd: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> dict:
    assert main([str(a) for a in arguments]) == code
    out = capfd.readouterr()
    return json.loads(out.out) if code in (0, 3) else {"said": out.err}


def forms(folder: Path, name: str) -> list[str]:
    return sorted(file.suffix for file in folder.glob(f"{name}.*"))


def test_mmeb(model, mmeb, tmp_path, capfd):
    wanted = ["evaluate", "mmeb", "-m", model, "-d", mmeb, "-o", tmp_path / "own", "--own-pixels"]
    said = run(capfd, *wanted, code=1)["said"]
    assert "32 of 36 data sets of MMEB are missing" in said and "CIRR" in said
    found = run(capfd, *wanted, "--allow-missing", "--json")
    assert set(found["tasks"]) == set(SETS) and found["overall"] is None and len(found["missing"]) == 32
    assert found["command"].startswith("muco evaluate mmeb") and found["settings"]["pixels"] == "the model's own"
    assert forms(tmp_path / "own", "mmeb") == [".csv", ".html", ".json", ".md"]
    assert main([*map(str, wanted), "--allow-missing"]) == 0  # found done; a table for people
    table = capfd.readouterr().out
    assert all(name in table for name in SETS)

    small = [*wanted[:-3], "-o", tmp_path / "large", "--task", "OK-VQA", "--queries", "2", "--json"]
    assert main([*map(str, small)]) == 0
    out, err = capfd.readouterr()
    large, said = (
        json.loads(out),
        "trained on images of 784 to 7056 pixels and is scored on images of 200704 to 1003520",
    )
    assert large["settings"]["trained_pixels"] == found["settings"]["trained_pixels"] == "784 to 7056"
    assert said in err and any(said in line for line in large["warnings"])
    assert not any("trained on" in line for line in found["warnings"])
    assert large["settings"]["pixels"] == "200704 to 1003520" and large["tasks"]["OK-VQA"]["queries"] == 2
    assert large["model"]["fingerprint"] != found["model"]["fingerprint"], "other pixels are another model"

    official = run(capfd, *small, "--official")
    assert "official names" in official["settings"]["rules"]["identity"]
    assert official["model"]["fingerprint"] != large["model"]["fingerprint"], "images are opened otherwise"

    compared = run(capfd, "evaluate", "compare", tmp_path / "own", tmp_path / "own", "--json")
    assert "OK-VQA" in json.dumps(compared) and run(capfd, "evaluate", "compare", mmeb, mmeb, code=1)["said"]


def test_mmeb_of_version_2(model, tmp_path, capfd):
    tree = mmeb_v2_tree.write_pages(tmp_path / "data", "ViDoSeek-doc", "VisRAG_PlotQA")
    wanted = ["evaluate", "mmeb", "-m", model, "-d", tree.root, "-o", tmp_path / "out", "--own-pixels"]
    said = run(capfd, *wanted, "--only", "visdoc", code=2)["said"]
    assert "--only belongs to version 2; add --version 2" in words(said)
    two = [*wanted, "--version", 2, "--only", "visdoc,video"]
    assert "40 of 42 data sets of MMEB-V2 are missing" in run(capfd, *two, code=1)["said"]
    assert "MMEB-V2 has no modality 'pages'" in run(capfd, *wanted, "--version", 2, "--only", "pages", code=1)["said"]
    assert "write it as NAME=FOLDER" in words(run(capfd, *two, "--media", "x", code=2)["said"])
    found = run(capfd, *two, "--allow-missing", "--prompts", "qwen", "--json")
    assert set(found["tasks"]) == {"ViDoSeek-doc", "VisRAG_PlotQA"} and found["overall"] is None
    assert found["settings"]["prompts"] == "qwen" and "64 frames" in found["settings"]["rules"]["prompts"]
    assert {task["metric"] for task in found["tasks"].values()} == {"ndcg@5"}
    assert forms(tmp_path / "out", "mmeb_v2") == [".csv", ".html", ".json", ".md"]
    page = (tmp_path / "out" / "mmeb_v2.html").read_text()
    assert "instructions of its system turn are put in front of the text" in page and "uncertain" in page
    pages = f"ViDoSeek-doc={tree.root / 'visdoc-tasks' / 'ViDoSeek-doc'}"
    assert main([*map(str, two), "--task", "ViDoSeek-doc", "--media", pages]) == 0
    assert "MMEB-V2" in capfd.readouterr().out


def words(said: str) -> str:
    """What was said in a frame, as one line."""
    return " ".join(said.replace("│", " ").split())


def test_the_help_of_mmeb_names_both_versions(capfd):
    assert main(["evaluate", "mmeb", "--help"]) == 0
    told = words(capfd.readouterr().out)
    for part in ("--version", "36 data sets of images; 2: also 18 of videos", "--only", "some of image,video,visdoc",
                 "--prompts", "--media", "NAME=FOLDER", "--version 2 --only video,visdoc --prompts qwen"):  # fmt: skip
        assert part in told, part


def test_mbeir_and_beir(model, mbeir, tmp_path, capfd):
    wanted = ["evaluate", "mbeir", "-m", model, "-d", mbeir, "-o", tmp_path / "mbeir", "--own-pixels", "--json"]
    found = run(capfd, *wanted)
    assert len(found["tasks"]) == 32 and found["overall"] is not None and not found["missing"]
    assert len([*(tmp_path / "mbeir" / "runs").iterdir()]) == 32
    local = run(capfd, *wanted[:6], "-o", tmp_path / "local", "--own-pixels", "--json", "--pool", "local")
    assert len(local["tasks"]) == 16 and local["tasks"].items() <= found["tasks"].items()

    folder = tmp_path / "set"
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text(
        "".join(json.dumps({"_id": f"d{i}", "text": f"word {i}"}) + "\n" for i in "123")
    )
    (folder / "queries.jsonl").write_text(json.dumps({"_id": "q", "text": "word 1"}) + "\n")
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\td1\t2\n")
    graded = run(capfd, "evaluate", "beir", "-m", model, "-d", folder, "-o", tmp_path / "beir", "-k", "2", "--json")
    (task,) = graded["tasks"].values()
    assert task["metric"] == "ndcg@2" and task["score"] == 1.0  # the same text has the same vector


def test_what_the_model_refuses_stops_or_is_skipped(model, tmp_path, capfd):
    data = mmeb_tree.write_texts(tmp_path / "data", [("word", ["a", "b <|emb|>"]), ("word", ["a", "b"])])
    wanted = ["evaluate", "mmeb", "-m", model, "-d", data, "-o", tmp_path / "out", "--task", "VisualNews_i2t"]
    assert "special token '<|emb|>'" in (said := run(capfd, *wanted, code=1)["said"]) and "--skip-broken" in said
    assert main([*map(str, wanted), "--skip-broken"]) == 0
    table = capfd.readouterr().out
    assert "left out" in table and "0 q + 1 c" in table
    found = json.loads((tmp_path / "out" / "mmeb.json").read_text())
    assert found["tasks"]["VisualNews_i2t"]["left_out"] == {"queries": 0, "candidates": 1, "missed": 1}


def test_the_pixels_of_training_stay_with_the_model(scenes, tmp_path):
    settings = {"tiny": {}, "vision": "trained", "min_pixels": 3136, "max_pixels": 12544}
    data = scenes / "train.jsonl"
    recipe = from_dict({"output": "x", "model": settings, "data": {"train": [{"path": str(data)}]}})
    build_model(recipe, [open_data(data)]).save(str(tmp_path / "a"))
    loaded = muco.load(tmp_path / "a", device="cpu")
    loaded.encoder.muco_processor.set_pixels(28 * 28, 56 * 56)
    loaded.save(str(tmp_path / "b"))
    again = muco.load(tmp_path / "b", device="cpu").encoder.muco_processor
    assert (again.pixels, again.trained_pixels) == ((28 * 28, 56 * 56), (3136, 12544))
    file = tmp_path / "b" / "muco.json"
    older = json.loads(file.read_text())
    del older["pixels"]
    file.write_text(json.dumps(older))
    assert muco.load(tmp_path / "b", device="cpu").encoder.muco_processor.trained_pixels == (28 * 28, 56 * 56)
    file.write_text(json.dumps(older | {"pixels": "all"}))
    with pytest.raises(muco.CheckpointError, match=r"muco\.json: written by another version"):
        muco.load(tmp_path / "b", device="cpu")


def test_leaks_are_found_and_fail_the_check(scenes, tmp_path, capfd):
    mixed = scenes / "mixed.jsonl"
    mixed.write_text((scenes / "train.jsonl").read_text() + (scenes / "test.jsonl").read_text().splitlines()[0] + "\n")
    assert main(["data", "leak", str(scenes / "test.jsonl"), "-t", str(mixed), "-o", str(tmp_path), "--json"]) == 3
    assert json.loads(capfd.readouterr().out)["affected"]["image"] == 1
    pairs = (tmp_path / "overlap.jsonl").read_text()
    assert "test.jsonl:1" in pairs and "mixed.jsonl:65" in pairs
    dev, train = str(scenes / "dev.jsonl"), str(scenes / "train.jsonl")
    assert main(["data", "leak", dev, "-t", train]) in (0, 3)  # captions may be equal by chance
    assert "by image" in capfd.readouterr().out
    mixed.unlink()


def test_leaks_are_found_in_training_data_of_any_format(scenes, tmp_path, capfd):
    folder = mmeb_train_tree.write_tree(tmp_path / "MMEB-train", ["OK-VQA"])
    image = folder / mmeb_train_tree.pairs("OK-VQA")[1].record["qry_image_path"]
    image.parent.mkdir(parents=True)
    shutil.copy(scenes / "images/test/00003.png", image)
    asked = ["data", "leak", scenes / "test.jsonl", "--train", folder, "--json"]
    found = run(capfd, *asked, "--format", "mmeb", "--option", "split=diverse_instruction", code=3)
    assert found["affected"] == {"image": 1, "text": 0, "either": 1}
    assert found["train"][0]["source"] == str(folder) and found["train"][0]["samples"] == 3
    [pair] = found["listed"]
    assert "diverse_instruction-00000-of-00001.parquet row 1" in pair["train"] and "test.jsonl:4" in pair["evaluation"]
    said = run(capfd, *asked, "--option", "split=original", code=1)["said"]
    assert "unknown option 'split'" in said, "options count for JSONL too"


def by_two(*arguments: object) -> dict:
    said = finished(launch("-m", "muco", *arguments))
    (line,) = [line for line in said.splitlines() if line.startswith("{")]
    return json.loads(line)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mmeb", "mbeir"])
def test_two_processes_give_the_numbers_of_one(model, mmeb, mbeir, tmp_path, capfd, monkeypatch, name):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    data = {"mmeb": mmeb, "mbeir": mbeir}[name]
    wanted = ["evaluate", name, "-m", model, "-d", data, "--own-pixels", "--allow-missing", "--json", "-o"]
    alone, both = run(capfd, *wanted, tmp_path / "one"), by_two(*wanted, tmp_path / "two")
    assert {part: alone[part] for part in PARTS} == {part: both[part] for part in PARTS}
    for folder in ("tasks", "outcomes"):
        one, two = (sorted((tmp_path / way / folder).iterdir()) for way in ("one", "two"))
        assert [file.name for file in one] == [file.name for file in two] and one
    for file, other in zip(one, two, strict=True):
        for line, same in zip(*(map(json.loads, f.read_text().splitlines()) for f in (file, other)), strict=True):
            assert [line[key] for key in ("query", "value", "rank")] == [
                same[key] for key in ("query", "value", "rank")
            ]
            scores = ([score for _, score in found["found"]] for found in (line, same))
            assert next(scores) == pytest.approx(next(scores), abs=1e-5)  # other numbers of threads round differently
