"""Every format of training data by its name: in recipes, on the command line, mixed in one run."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import m3t_tree
import mbeir_train_tree
import mmeb_train_tree
import pytest
from mmeb_tree import png

import muco
from muco.cli import main
from muco.data import FORMATS, open_data
from muco.training.recipe import from_dict


@pytest.fixture(scope="module")
def sources(tmp_path_factory, scenes) -> dict[str, tuple[Path, dict]]:
    """A small set of every format: format -> (path, options)."""
    root = tmp_path_factory.mktemp("sources")
    m3t_tree.write_tree(root / "m3t", m3t_tree.records(6))
    mmeb_train_tree.write_tree(root / "mmeb", rows=2)
    written = open_data(root / "mmeb", "mmeb")
    for sample in (written[i] for i in range(len(written))):
        for image in (*sample.images, *(i for t in sample.turns for c in (*t.target, *t.negatives) for i in c.images)):
            m3t_tree.write_image(Path(image))
    mbeir_train_tree.write_train_tree(root / "mbeir")
    (root / "pictures").mkdir()
    for number in range(3):
        (root / "pictures" / f"{number}.png").write_bytes(png(str(number)))
    (root / "pairs.csv").write_text(
        "query,target,image\n" + "".join(f'"word {n}, two",answer {n},{n}.png\n' for n in "012")
    )
    talk = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A square."}]
    entries = [{"id": str(n), "image": f"{n}.png", "conversations": talk * 2} for n in range(3)]
    (root / "llava.json").write_text(json.dumps(entries))
    dialog = [{"question": 0, "answer": 1}, {"question": 1, "answer": 0}]
    data = {"questions": ["is it red", "is it big"], "answers": ["yes", "no"]}
    data |= {"dialogs": [{"image_id": n, "caption": f"a square {n}", "dialog": dialog} for n in range(3)]}
    (root / "visdial.json").write_text(json.dumps({"version": "1.0", "split": "train", "data": data}))
    with tarfile.open(root / "shard.tar", "w") as tar:
        for number in range(3):
            tar.add(root / "pictures" / f"{number}.png", f"{number}.png")
            (root / "text.txt").write_text(f"a square, number {number}")
            tar.add(root / "text.txt", f"{number}.txt")
    pictures = {"images": str(root / "pictures")}
    return {
        "jsonl": (scenes / "train.jsonl", {}),
        "m3t": (root / "m3t", {"images": str(root / "m3t" / "images")}),
        "mmeb": (root / "mmeb", {}),
        "mbeir": (root / "mbeir", {}),
        "pairs": (
            root / "pairs.csv",
            {"query_text": "query", "query_image": "image", "target_text": "target", **pictures},
        ),
        "llava": (root / "llava.json", pictures),
        "visdial": (root / "visdial.json", {"pattern": "{image_id}.png", "caption": "Describe it.", **pictures}),
        "webdataset": (root / "shard.tar", {}),
    }


def test_every_format_is_here(sources):
    assert set(sources) == set(FORMATS)


@pytest.mark.parametrize("format", FORMATS)
def test_data_is_checked_and_shown_by_its_format(sources, tmp_path, capfd, format):
    path, options = sources[format]
    words = [word for key, value in options.items() for word in ("--option", f"{key}={json.dumps(value)}")]
    assert main(["data", "check", str(path), "--format", format, *words, "--json"]) == 0, capfd.readouterr().out
    found = json.loads(capfd.readouterr().out)
    data = open_data(path, format, options)
    assert found["ok"] and found["samples"] == len(data) > 2 and found["images"] > 0
    assert len(data.fingerprint) == 64 == len(open_data(path, format, options).fingerprint)
    assert main(["data", "show", str(path), "--format", format, *words, "-o", str(tmp_path / "sheet.html")]) == 0


@pytest.mark.slow
def test_all_formats_train_one_model(sources, tmp_path):
    def run(name: str, mode: str, workers: int) -> list[float]:
        train = [{"path": str(path), "format": kind, "options": o} for kind, (path, o) in sources.items()]
        values = {
            "output": str(tmp_path / name),
            "model": {
                "tiny": {"width": 64, "feed_forward": 128, "vision_width": 32, "vision_depth": 1},
                "vision": "trained",
            },
            "data": {"train": train},
            "turns": {"mode": mode},
            "batch": {"size": 16, "token_budget": 800},
            "trainer": {"max_steps": 3, "logging_steps": 1, "dataloader_num_workers": workers, "report_to": []},
        }
        folder = muco.train(from_dict(values))
        return [loss for _, loss in json.loads((folder / "run.json").read_text())["loss"]]

    assert run("alone", "isolated", 0) == run("workers", "isolated", 2)
    assert len(run("pairs", "reconstruction", 0)) == 3


@pytest.mark.parametrize(
    ("format", "options", "sentence"),
    [
        ("m3", {}, "unknown format 'm3'; did you mean 'm3t'?"),
        ("m3t", {"image": "x"}, "unknown option 'image' of the format 'm3t'; did you mean 'images'?"),
        ("m3t", {}, "options of the format 'm3t': .*images"),
        ("jsonl", {"images": "x"}, "unknown option 'images' of the format 'jsonl'; accepted are none"),
    ],
)
def test_unknown_formats_and_options_are_named(sources, format, options, sentence):
    with pytest.raises(muco.DataError, match=sentence):
        open_data(sources["m3t"][0], format, options)


def test_a_mistyped_option_is_a_sentence(sources, capfd):
    assert main(["data", "check", str(sources["m3t"][0]), "--format", "m3t", "--option", "images"]) == 1
    assert "--option 'images': write it as key=value, e.g. --option images=photos" in capfd.readouterr().err
