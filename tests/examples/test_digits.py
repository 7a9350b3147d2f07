"""examples/digits.py: what it writes, what it trains, and that its figures are those of the saved models."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import processes
import pytest
from PIL import Image
from sklearn.datasets import load_digits

import muco
from muco.data import open_data
from muco.data.source import Data

SCRIPT = Path(__file__).parents[2] / "examples/digits.py"


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("digits_example", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


digits = _load()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    digits.write_data(folder)
    return folder


def samples(data: Data) -> list[muco.Sample]:
    return [data[i] for i in range(len(data))]


# ---------------------------------------------------------------- turns


def answers(digit: int) -> dict[str, Any]:
    return {turn["kind"]: turn["target"] for turn in digits.turns(digit)}


def test_answers_of_some_digits():
    assert {kind: target for kind, target in answers(8).items() if kind != "retrieval"} == {
        "digit": "8",
        "word": "eight",
        "parity": "even",
        "size": "yes",
        "holes": "two holes",
        "neighbours": "seven and nine",
    }
    assert answers(8)["retrieval"] == ["a handwritten eight, even, with two holes", "a handwritten eight", "eight"]
    assert answers(5)["size"] == "no"
    assert answers(0)["neighbours"] == "nothing and one"
    assert answers(9)["neighbours"] == "eight and nothing"


def test_holes_and_parity_of_all_digits():
    holes = {"no hole": [1, 2, 3, 4, 5, 7], "one hole": [0, 6, 9], "two holes": [8]}
    assert {text: [d for d in range(10) if answers(d)["holes"] == text] for text in holes} == holes
    assert [d for d in range(10) if answers(d)["parity"] == "odd"] == [1, 3, 5, 7, 9]
    assert [d for d in range(10) if answers(d)["size"] == "yes"] == [6, 7, 8, 9]


@pytest.mark.parametrize("kind", ["digit", "word", "neighbours"])
def test_these_answers_tell_all_digits_apart(kind):
    assert len({answers(d)[kind] for d in range(10)}) == 10


def test_no_question_is_asked_for_two_kinds():
    asked = [query for turn in digits.turns(3) for query in turn["query"]]
    assert len(set(asked)) == len(asked)


# ---------------------------------------------------------------- data


def test_both_parts_are_all_digits_once_in_the_same_shares(folder):
    parts = {name: samples(open_data(folder / f"{name}.jsonl")) for name in ("train", "test")}
    numbers = {name: [int(sample.id) for sample in part] for name, part in parts.items()}
    assert sorted(numbers["train"] + numbers["test"]) == list(range(1797))
    assert (len(numbers["train"]), len(numbers["test"])) == (1437, 360)
    everywhere = Counter(load_digits().target.tolist())
    for count, part in zip((1437, 360), numbers.values(), strict=True):
        here = Counter(load_digits().target[part].tolist())
        assert all(abs(here[d] - everywhere[d] * count / 1797) <= 1 for d in range(10))


def test_no_held_out_picture_was_trained_on(folder):
    parts = [
        {sample.images[0].read_bytes() for sample in samples(open_data(folder / f"{name}.jsonl"))}
        for name in ("train", "test")
    ]
    assert not parts[0] & parts[1]


def test_every_row_tells_of_its_own_picture(folder):
    source = load_digits()
    for sample in samples(open_data(folder / "test.jsonl")):
        number = int(sample.id)
        assert [turn.target[0].text for turn in sample.turns] == [
            target if isinstance(target, str) else target[0] for target in answers(source.target[number]).values()
        ]
        with Image.open(sample.images[0]) as image:
            assert (image.size, image.mode) == ((56, 56), "L")
            back = np.asarray(image.resize((8, 8), Image.Resampling.BOX), dtype=float) * 16 / 255
        assert np.corrcoef(back.ravel(), source.images[number].ravel())[0, 1] > 0.97


def test_the_same_seed_gives_the_same_files_and_another_seed_another_split(tmp_path):
    for name, seed in (("own", 0), ("same", 0), ("other", 1)):
        digits.write_data(tmp_path / name, train=40, test=20, seed=seed)
    for part in ("train.jsonl", "test.jsonl"):
        own, same, other = (open_data(tmp_path / name / part).fingerprint for name in ("own", "same", "other"))
        assert own == same != other


# ---------------------------------------------------------------- training and scores


def test_the_two_runs_differ_in_the_mask_only():
    masked, unmasked = (digits.recipe(Path("d"), Path("o"), mask=mask, steps=10, seed=3) for mask in (True, False))
    assert masked.loss.mask_identical_targets and not unmasked.loss.mask_identical_targets
    assert (masked.model, masked.data, masked.turns, masked.trainer, masked.seed) == (
        unmasked.model,
        unmasked.data,
        unmasked.turns,
        unmasked.trainer,
        unmasked.seed,
    )
    assert masked.loss.symmetric and masked.loss.temperature == unmasked.loss.temperature


class Oracle:
    """Knows the digit of every picture; ``shift`` makes it wrong by so much."""

    def __init__(self, data: Data, shift: int = 0) -> None:
        self.digit = {s.images[0]: int(s.turns[0].target[0].text) for s in samples(data)}
        self.shift = shift

    def encode(self, inputs: list[str | Path]) -> np.ndarray:
        digit = [digits.WORDS.index(i) if isinstance(i, str) else self.digit[i] + self.shift for i in inputs]
        return np.eye(10, dtype=np.float32)[np.array(digit) % 10]


@pytest.mark.parametrize(("shift", "precision", "frame"), [(0, 1.0, "seagreen"), (1, 0.0, "red")])
def test_search_counts_and_frames_what_is_right(folder, tmp_path, shift, precision, frame):
    data = open_data(folder / "test.jsonl")
    assert digits.search(Oracle(data, shift), data, tmp_path / "search.png") == precision
    with Image.open(tmp_path / "search.png") as sheet:
        assert sheet.size == (64 * 11, 64 * 10)
        expected = Image.new("RGB", (1, 1), frame).getpixel((0, 0))
        assert all(sheet.getpixel((64 * (1 + x), 64 * y)) == expected for x in range(10) for y in range(10))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("run") / "digits"
    digits.main(["--output", str(output), "--quick"])
    return output


def record(output: Path) -> dict[str, Any]:
    return json.loads((output / "digits.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_a_quick_run_writes_everything(made):
    found = record(made)
    assert found["command"].startswith("python examples/digits.py --output ") and found["command"].endswith(" --quick")
    assert found["steps"] == 2 and found["versions"]["torch"] and found["machine"]["cores"] >= 1
    assert list(found["results"]) == ["masked", "unmasked"]
    for name, result in found["results"].items():
        assert result["train_seconds"] > 0
        assert 0 <= result["search_precision"] <= 1
        assert result["tasks"]["answer"]["kinds"]["digit"]["candidates_max"] == 10
        assert (made / f"search-{name}.png").is_file()
        assert (made / name / "retrieval.json").is_file()
    assert found["results"]["masked"]["tasks"] != found["results"]["unmasked"]["tasks"]


@pytest.mark.slow
def test_the_table_shows_the_recorded_figures(made):
    results = record(made)["results"]
    columns = [list(column.cells) for column in digits.table(results).columns]
    rows = {cells[0]: cells[1:] for cells in zip(*columns, strict=True)}
    tasks = [result["tasks"] for result in results.values()]

    def per_cent(*shares: float) -> tuple[str, ...]:
        return tuple(f"{100 * share:.1f}" for share in shares)

    unseen = tasks[0]["answer_text_only"]["kinds"]["digit"]["hit@1"]
    assert rows["digit"] == per_cent(*(task["answer"]["kinds"]["digit"]["hit@1"] for task in tasks), unseen)
    captions = (task["image_to_caption"]["hit@1"] for task in tasks)
    assert rows["image to caption"] == per_cent(*captions, tasks[0]["blind"]["hit@1"])
    assert rows["within"][:2] == per_cent(*(task["within"]["hit@1"] for task in tasks))
    assert rows["text search, precision@10"][:2] == per_cent(*(r["search_precision"] for r in results.values()))
    assert len(rows) == 6 + 4


@pytest.mark.slow
def test_which_digit_is_the_share_that_beat_all_nine_others(made):
    data = samples(open_data(made / "data-0-quick/test.jsonl"))
    model = muco.load(made / "masked/model")
    names = model.encode([str(d) for d in range(10)])
    hits = 0
    for sample in data:
        scores = names @ model.encode({"text": "Which digit is it?", "image": sample.images[0]})
        own = scores[int(sample.turns[0].target[0].text)]
        hits += (scores >= own - 1e-6).sum() == 1
    figure = record(made)["results"]["masked"]["tasks"]["answer"]["kinds"]["digit"]
    assert figure["hit@1"] == pytest.approx(hits / len(data))
    assert figure["queries"] == len(data) == 40


@pytest.mark.slow
def test_a_finished_run_is_not_trained_again_and_another_is_refused(made):
    before = record(made)["results"]
    weights = made / "masked/model/model.safetensors"
    written = weights.stat().st_mtime_ns
    digits.main(["--output", str(made), "--quick"])
    after = record(made)["results"]
    assert weights.stat().st_mtime_ns == written
    assert [result["train_seconds"] for result in after.values()] == [None, None]
    assert after["masked"]["tasks"] == before["masked"]["tasks"]
    with pytest.raises(muco.OutputError, match="another run"):
        digits.main(["--output", str(made), "--quick", "--seed", "1"])
    assert record(made)["results"] == after


# ---------------------------------------------------------------- bad input


def test_no_steps_are_a_usage_error(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        digits.main(["--output", str(tmp_path / "out"), "--steps", "0"])
    assert stop.value.code == 2
    assert "--steps must be at least 1" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_an_output_that_is_a_file_is_one_sentence(tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    done = processes.run([sys.executable, SCRIPT, "--output", file, "--quick"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and str(file) in done.stderr and "Traceback" not in done.stderr
    assert file.read_text() == "mine"
