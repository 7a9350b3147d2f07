"""Computing in another precision: what changes, what stays, and who decides."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import muco
from muco.cli import main
from muco.model import loaded
from muco.precision import WORTH, Choice, quicker
from muco.search import Index
from muco.training.precision import stated_autocast
from muco.training.recipe import from_dict

INPUTS = [
    "a red star",
    {"image": Image.new("RGB", (84, 56), (200, 30, 30))},
    {"text": "what is it?", "image": Image.new("RGB", (56, 56))},
]


def cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return (one * other).sum(axis=1)


@pytest.fixture(scope="module")
def half_path(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = muco.load(tiny_path, device="cpu", dtype="bfloat16")
    model.save(str(folder := tmp_path_factory.mktemp("half") / "model"))
    return folder


def test_bfloat16_computes_by_autocast_and_leaves_weights_and_vectors_in_float32(tiny_path):
    plain, quick = muco.load(tiny_path, device="cpu"), muco.load(tiny_path, device="cpu", precision="bfloat16")
    assert (plain.precision, quick.precision) == (None, "bfloat16")
    assert {p.dtype for p in quick.parameters()} == {torch.float32}
    expected, found = plain.encode(INPUTS), quick.encode(INPUTS)
    assert found.dtype == np.float32 and not np.array_equal(found, expected)
    assert cosines(found, expected).min() > 0.999
    with torch.autocast("cpu", torch.bfloat16):  # as torch's own, around a model that was not told
        np.testing.assert_array_equal(found, plain.encode(INPUTS))
    assert quick.fingerprint == plain.fingerprint  # an index may be made on one machine and asked on another


def test_turns_in_bfloat16_are_those_of_single_calls(tiny_path):
    model = muco.load(tiny_path, device="cpu", precision="bfloat16")
    image, texts = INPUTS[1]["image"], ["What is it?", "Which colour?", "Where?"]
    single = model.encode([{"text": text, "image": image} for text in texts])
    assert cosines(model.encode_turns(image, texts), single).min() > 0.999


def test_float32_is_exact_for_weights_that_are_stored_in_half(half_path):
    exact = muco.load(half_path, device="cpu", precision="float32")
    assert {p.dtype for p in exact.parameters()} == {torch.float32} and exact.precision == "float32"
    as_stored = muco.load(half_path, device="cpu", precision="auto")
    assert as_stored.precision is None and as_stored.encoder.model.dtype == torch.bfloat16
    np.testing.assert_array_equal(
        exact.encode(INPUTS), muco.load(half_path, device="cpu", dtype="float32").encode(INPUTS)
    )


def test_auto_takes_what_it_measures_to_be_quicker_and_says_so(tiny_path, caplog):
    with caplog.at_level(logging.WARNING, "muco.model"):
        model = muco.load(tiny_path, device="cpu", precision="auto")
    assert model.precision in ("float32", "bfloat16")
    [line] = [record.getMessage() for record in caplog.records if record.name == "muco.model"]
    assert line.startswith(f"computes in {model.precision}, measured: ")
    same = muco.load(tiny_path, device="cpu", precision=model.precision)
    np.testing.assert_array_equal(model.encode(INPUTS), same.encode(INPUTS))


@pytest.mark.parametrize("slow", [True, False])
def test_the_quicker_of_two_is_the_one_that_takes_less_time(slow):
    def work(bfloat16: bool) -> None:
        product = torch.ones(200, 200)
        for _ in range(200 if bfloat16 == slow else 1):
            product = product @ product / 200

    choice = quicker(work, torch.device("cpu"))
    assert choice.bfloat16 is not slow and choice.seconds[str(choice).partition(",")[0]] == min(choice.seconds.values())


def test_a_choice_says_which_and_why():
    seconds = {"float32": 3.21, "bfloat16": 1.5}
    assert str(Choice(True, seconds)) == "bfloat16, measured: 1.5 s a pass; float32 takes 3.2 s"


def test_a_precision_that_is_not_there_is_an_error(tiny_path, half_path):
    with pytest.raises(muco.MucoError, match=r"one of auto, float32, bfloat16, not 'fp16'"):
        muco.load(tiny_path, device="cpu", precision="fp16")
    assert muco.load(half_path, device="cpu", precision="bfloat16").precision is None
    with pytest.raises(muco.MucoError, match=r"held in float16; .* load them with dtype='float32'"):
        muco.load(half_path, device="cpu", dtype="float16", precision="bfloat16")


def test_a_loaded_model_is_not_asked_for_a_precision(tiny_model):
    with pytest.raises(muco.MucoError, match=r"loaded already; pass precision='auto' to muco\.load"):
        loaded(tiny_model, precision="auto")


def test_embed_and_index_compute_in_what_is_asked_for(tiny_path, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"id": text, "text": text}) + "\n" for text in ("a star", "a ring")))
    expected = muco.load(tiny_path, device="cpu", precision="bfloat16").encode(["a star", "a ring"])
    asked = ["--model", str(tiny_path), "--precision", "bfloat16"]
    assert main(["embed", str(rows), "--output", str(tmp_path / "v.parquet"), *asked]) == 0
    stored = pq.read_table(tmp_path / "v.parquet").column("embedding").to_pylist()
    np.testing.assert_array_equal(np.float32(stored), expected)
    assert main(["index", str(rows), "--index", str(tmp_path / "i"), *asked]) == 0
    found = Index.open(tmp_path / "i", muco.load(tiny_path, device="cpu", precision="bfloat16"))
    assert [hit.score for hit in found.search("a star", k=1)] == pytest.approx([1.0], abs=1e-6)


# ── training ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def recipe_of(scenes: Path, output: Path, **changes) -> muco.Recipe:
    tiny = {"width": 64, "feed_forward": 128, "vision_width": 32, "vision_depth": 1, "vocabulary": 512}
    values = {
        "output": str(output),
        "model": {"tiny": tiny, "vision": "trained"},
        "data": {"train": [{"path": str(scenes / "train.jsonl")}]},
        "batch": {"size": 8},
        "trainer": {"max_steps": 4, "save_steps": 2, "learning_rate": 1e-3, "report_to": []},
    }
    return from_dict(values | changes)


@pytest.mark.slow
def test_a_run_that_measures_is_the_run_of_what_it_chose_also_when_it_resumes(scenes, tmp_path):
    measured = recipe_of(scenes, tmp_path / "auto", precision="auto")
    weights = load_file(muco.train(measured) / "model.safetensors")
    file = tmp_path / "auto" / "precision.json"
    chosen = json.loads(file.read_text())
    seconds = chosen["seconds_of_a_step"]
    assert (chosen["precision"] == "bfloat16") == (seconds["bfloat16"] <= WORTH * seconds["float32"])
    runs = {
        precision: load_file(
            muco.train(recipe_of(scenes, tmp_path / precision, precision=precision)) / "model.safetensors"
        )
        for precision in ("float32", "bfloat16")
    }
    assert all(torch.equal(weights[name], runs[chosen["precision"]][name]) for name in weights)
    assert not all(torch.equal(runs["float32"][name], runs["bfloat16"][name]) for name in weights)

    # a run that was begun on a machine where the other was quicker
    other = "float32" if chosen["precision"] == "bfloat16" else "bfloat16"
    (tmp_path / "moved").mkdir()
    moved = replace(measured, output=str(tmp_path / "moved"))
    (tmp_path / "moved" / "run.json").write_text((tmp_path / "auto" / "run.json").read_text())
    (tmp_path / "moved" / "precision.json").write_text(json.dumps(chosen | {"precision": other}))
    weights = load_file(muco.train(moved) / "model.safetensors")
    assert all(torch.equal(weights[name], runs[other][name]) for name in weights)


@pytest.mark.parametrize(
    ("precision", "adapter", "dtype", "trained_alone", "expected"),
    [
        (None, None, torch.float32, False, False),
        (None, None, torch.bfloat16, False, True),
        (None, {"rank": 4, "alpha": 4}, torch.bfloat16, False, False),
        ("bfloat16", None, torch.float32, False, True),
        ("float32", None, torch.float32, False, False),
        ("float32", None, torch.bfloat16, True, False),
        ("auto", None, torch.float32, False, None),
        ("auto", None, torch.bfloat16, True, None),
        ("auto", None, torch.bfloat16, False, True),
        ("auto", {"rank": 4, "alpha": 4}, torch.bfloat16, False, False),
    ],
)
def test_what_a_recipe_states(scenes, tmp_path, precision, adapter, dtype, trained_alone, expected):
    """``trained_alone``: no weight is frozen, so all are held in float32 though they came in half precision."""
    model = {"path": "any", "adapter": adapter and {"kind": "lora", **adapter}}
    recipe = recipe_of(scenes, tmp_path, model=model, precision=precision)
    backbone = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    backbone.config = type("Config", (), {"dtype": dtype})
    backbone[0].to(torch.float32 if trained_alone else dtype)
    assert stated_autocast(recipe, backbone) is expected


def test_a_precision_that_cannot_be_had_is_refused(scenes, tmp_path):
    with pytest.raises(muco.RecipeError, match=r"precision: auto measures whole models.*ask for bfloat16"):
        recipe_of(scenes, tmp_path, batch={"size": 8, "sharding": "fsdp"}, precision="auto")
    with pytest.raises(muco.RecipeError, match=r"trainer\.bf16 is set by MuCo; use the recipe's own 'precision'"):
        recipe_of(scenes, tmp_path, trainer={"bf16": True})
