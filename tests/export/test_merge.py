"""muco merge: several models of a kind become one; the limits give back what went in, to the bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import muco
from muco import CheckpointError, MucoError, OutputError
from muco.cli.app import main
from muco.export.merge import merge, slerp
from muco.training.recipe import from_dict, trained_dimensions


@pytest.fixture(scope="module")
def models(tiny_path, tmp_path_factory) -> dict[str, Path]:
    """Three models that differ in all their weights."""
    root, found = tmp_path_factory.mktemp("models"), {}
    for number, name in enumerate(("one", "two", "start")):
        found[name] = root / name
        shutil.copytree(tiny_path, found[name])
        weights, generator = load_file(found[name] / "model.safetensors"), torch.Generator().manual_seed(number)
        changed = {n: w + 0.02 * torch.randn(w.shape, generator=generator).to(w.dtype) for n, w in weights.items()}
        save_file(changed, found[name] / "model.safetensors", metadata={"format": "pt"})
    return found


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return muco.load(folder, device="cpu").state_dict()


def assert_equal(folder: Path, expected: dict[str, torch.Tensor], tolerance: float = 0.0) -> None:
    found = weights_of(folder)
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        assert torch.allclose(weight.double(), expected[name].double(), rtol=0, atol=tolerance), name


@pytest.mark.parametrize(
    ("names", "how", "expected"),
    [
        (["one", "two"], {"weights": [1, 0]}, "one"),
        (["one", "two"], {"weights": [0, 5]}, "two"),
        (["one", "one", "one"], {}, "one"),
        (["one", "two"], {"method": "slerp", "weights": [1, 0]}, "one"),
        (["one", "two"], {"method": "slerp", "weights": [0, 1]}, "two"),
        (["two", "two"], {"method": "slerp"}, "two"),
        (["one"], {"method": "task-arithmetic", "base": "start", "weights": [1]}, "one"),
        (["one", "two"], {"method": "task-arithmetic", "base": "start", "weights": [0, 0]}, "start"),
    ],
)
def test_limits_give_back_a_model_to_the_bit(models, tmp_path, names, how, expected):
    base = {"base": str(models[how["base"]])} if "base" in how else {}
    merge([str(models[name]) for name in names], tmp_path / "out", **{**how, **base})
    assert_equal(tmp_path / "out", weights_of(models[expected]))


def test_every_method_is_its_formula(models, tmp_path):
    one, two, start = (weights_of(models[name]) for name in ("one", "two", "start"))
    both = [str(models["one"]), str(models["two"])]
    merge(both, tmp_path / "mean", weights=[3, 1])
    assert_equal(tmp_path / "mean", {n: 0.75 * one[n].double() + 0.25 * two[n].double() for n in one}, 1e-7)
    merge(both[::-1], tmp_path / "turned", weights=[1, 3])
    assert_equal(tmp_path / "turned", weights_of(tmp_path / "mean"))
    merge(both, tmp_path / "arc", weights=[3, 1], method="slerp")
    expected = {}
    for name in one:
        a, b = one[name].double().flatten(), two[name].double().flatten()
        arc = torch.acos(torch.dot(a, b) / a.norm() / b.norm())
        mixed = (torch.sin(0.75 * arc) * a + torch.sin(0.25 * arc) * b) / torch.sin(arc)
        expected[name] = mixed.view(one[name].shape)
    assert_equal(tmp_path / "arc", expected, 1e-6)
    found = merge(both, tmp_path / "tasks", weights=[1, 0.5], method="task-arithmetic", base=str(models["start"]))
    learnt = {n: start[n] + (one[n] - start[n]) + 0.5 * (two[n] - start[n]) for n in one}
    assert_equal(tmp_path / "tasks", learnt, 1e-6)
    record = json.loads((tmp_path / "tasks" / "merge.json").read_text())
    assert record == {key: value for key, value in found.items() if key != "output"}
    assert found["fingerprint"] == muco.load(tmp_path / "tasks", device="cpu").fingerprint
    assert "1 of one, 0.5 of two" in (tmp_path / "tasks" / "README.md").read_text()


@settings(max_examples=30, deadline=None)
@given(st.floats(0, 1), st.floats(0.5, 4), st.integers(0, 100))
def test_between_scaled_copies_the_norm_is_linear(share, scale, seed):
    one = torch.randn(3, 5, generator=torch.Generator().manual_seed(seed)).double()
    assert torch.allclose(slerp(one, scale * one, share), (1 + share * (scale - 1)) * one)
    other = torch.randn(3, 5, generator=torch.Generator().manual_seed(seed + 1)).double()
    other = other * one.norm() / other.norm()
    assert slerp(one, other, share).norm().item() == pytest.approx(one.norm().item())
    assert torch.equal(slerp(one, torch.zeros_like(one), share), (1 - share) * one)


@pytest.fixture(scope="module")
def run(models, scenes, tmp_path_factory) -> Path:
    """A short run of adapters, whose checkpoint still has them."""
    output = tmp_path_factory.mktemp("runs") / "run"
    recipe = {
        "output": str(output),
        "model": {"path": str(models["start"]), "adapter": {"kind": "lora", "rank": 4, "alpha": 64}},
        "data": {"train": [{"path": str(scenes / "train.jsonl")}]},
        "batch": {"size": 4},
        "trainer": {"max_steps": 2, "save_steps": 2, "learning_rate": 0.05, "report_to": []},
    }
    muco.train(from_dict(recipe))
    return output


def test_the_adapters_of_a_checkpoint_are_folded_in(models, run, tmp_path):
    checkpoint = str(run / "checkpoints" / "checkpoint-2")
    merge([str(run / "model"), checkpoint], tmp_path / "same")
    assert_equal(tmp_path / "same", weights_of(run / "model"), 1e-7)
    merge([checkpoint, str(models["one"])], tmp_path / "mixed", weights=[1, 1])
    trained, one = weights_of(run / "model"), weights_of(models["one"])
    assert_equal(tmp_path / "mixed", {name: (trained[name] + one[name]) / 2 for name in one}, 1e-6)


def changed_json(folder: Path, file: str, change) -> None:
    values = json.loads((folder / file).read_text())
    change(values)
    (folder / file).write_text(json.dumps(values))


def test_vectors_may_be_cut_to_the_lengths_that_all_sources_share(models, tmp_path):
    for name, lengths in (("one", [8, 16, 32]), ("two", [32, 4, 16]), ("three", [4])):
        shutil.copytree(models["two" if name == "three" else name], tmp_path / name)
        said = {"is_matryoshka": True, "matryoshka_dimensions": lengths}
        changed_json(tmp_path / name, "config.json", lambda values, said=said: values.update(said))
    merge([str(tmp_path / "one"), str(tmp_path / "two")], tmp_path / "mean")
    assert trained_dimensions(tmp_path / "mean") == (16, 32)
    assert "may be cut to 16, 32 dimensions" in (tmp_path / "mean" / "README.md").read_text(encoding="utf-8")
    merge([str(tmp_path / "one")], tmp_path / "tasks", method="task-arithmetic", base=str(models["start"]))
    assert trained_dimensions(tmp_path / "tasks") == (8, 16, 32)  # the base need not be trained for any
    for other in (tmp_path / "three", models["two"]):
        merge([str(tmp_path / "one"), str(other)], tmp_path / f"none-{other.name}")
        assert trained_dimensions(tmp_path / f"none-{other.name}") == ()
        assert "cut" not in (tmp_path / f"none-{other.name}" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("file", "change", "named"),
    [
        ("tokenizer.json", lambda v: v["added_tokens"].pop(), "their tokenizers"),
        ("muco.json", lambda v: v.update(pixels=[784, 1568]), "their pixels in training"),
        ("muco.json", lambda v: v["template"].update(newline_at_end=True), "their template"),
        ("config.json", lambda v: v["text_config"].update(rms_norm_eps=1e-3), r"their config\.text_config"),
    ],
)
def test_models_of_different_kinds_are_refused(models, tmp_path, file, change, named):
    other = tmp_path / "other"
    shutil.copytree(models["two"], other)
    changed_json(other, file, change)
    with pytest.raises((CheckpointError, MucoError), match=named):
        merge([str(models["one"]), str(other)], tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("names", "how", "said"),
    [
        (["one"], {}, "mean takes more models, got 1"),
        (["one", "two", "start"], {"method": "slerp"}, "slerp takes two models, got 3"),
        (["one", "two"], {"method": "median"}, "method must be one of mean, slerp, task-arithmetic"),
        (["one", "two"], {"weights": [1]}, "a finite number for each of 2 models"),
        (["one", "two"], {"weights": [1, float("nan")]}, "a finite number for each"),
        (["one", "two"], {"weights": [2, -1]}, "at least 0"),
        (["one", "two"], {"weights": [0, 0]}, "not all 0"),
        (["one", "two"], {"method": "task-arithmetic"}, "needs the base"),
        (["one", "two"], {"base": "x"}, "the other methods have none"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_loaded(names, how, said, tmp_path):
    with pytest.raises(MucoError, match=said):
        merge(names, tmp_path / "out", **how)


def test_the_command_merges_and_refuses_a_folder_that_exists(models, tmp_path, capsys):
    command = ["merge", str(models["one"]), str(models["two"]), "--weights", "0.7,0.3", "-o", str(tmp_path / "out")]
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["weights"] == [0.7, 0.3]
    assert main(command) == 1 and "already exists" in capsys.readouterr().err
    assert main([*command[:-1], str(tmp_path / "b"), "--weights", "a,b"]) == 2
    with pytest.raises(OutputError):
        merge([str(models["one"])] * 2, tmp_path / "out")
