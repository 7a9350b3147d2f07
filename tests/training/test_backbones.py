"""Whole runs on other families: what is trained beside adapters, what single turns need, and the recipes for them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import families
import numpy as np
import pytest
import torch
from families import checkpoint, image
from safetensors.torch import load_file
from torch import nn

import muco
from muco.cli import main
from muco.errors import CheckpointError, RecipeError
from muco.export import export
from muco.model import from_backbone
from muco.training.plan import plan
from muco.training.recipe import from_dict

ROOT = Path(__file__).parents[2]


def recipe_of(scenes: Path, output: Path, family: str, model: dict, **changes) -> muco.Recipe:
    values = {
        "output": str(output),
        "model": {"path": str(checkpoint(family)), **model},
        "data": {"train": [{"path": str(scenes / "train.jsonl")}]},
        "batch": {"size": 4, "token_budget": 400},
        "trainer": {"max_steps": 2, "learning_rate": 1e-2, "save_steps": 1, "report_to": [], "use_cpu": True},
    }
    return from_dict(values | changes)


def parts(names: set[str]) -> set[str]:
    """The first two words of the names of weights."""
    return {".".join(name.removeprefix("model.").split(".")[:2]) for name in names}


CONNECTORS = {
    "qwen3_vl": {"visual.merger", "visual.deepstack_merger_list"},
    "llava": {"multi_modal_projector.linear_1", "multi_modal_projector.linear_2"},
}


@pytest.mark.slow
@pytest.mark.parametrize(("family", "trained"), [("qwen3_vl", "connector"), ("llava", "vision")])
def test_vision_is_trained_beside_adapters_and_kept(family, trained, scenes, tmp_path):
    lora = {"adapter": {"kind": "lora", "rank": 4, "alpha": 4}}
    recipe = recipe_of(scenes, tmp_path / "run", family, lora | {trained: "trained"})
    folder = muco.train(recipe)
    start, end = load_file(checkpoint(family) / "model.safetensors"), load_file(folder / "model.safetensors")
    start, end = ({n.removeprefix("model."): w for n, w in weights.items()} for weights in (start, end))
    same = {name for name in end if end[name].shape == start[name].shape}  # not the embeddings, which have new rows
    moved = {name for name in same if not torch.equal(end[name], start[name])}
    beside = {name for name in moved if not name.startswith("language_model")}
    assert any(name.startswith("language_model") for name in moved)
    if trained == "connector":
        assert parts(beside) == CONNECTORS[family]
    else:
        assert parts(beside) > CONNECTORS[family]
    shown = plan(recipe)
    assert shown["recipe"]["connector"] == "trained" and shown["memory"] is None
    part = shutil.copytree(tmp_path / "run" / "checkpoints" / "checkpoint-1", tmp_path / "run/checkpoints/checkpoint-9")
    assert export(part, tmp_path / "merged")["ok"] and export(part, tmp_path / "apart", adapters="separate")["ok"]
    for other, said in ((part, "a checkpoint of a run, not a model"), (tmp_path / "apart", "does not add adapters")):
        with pytest.raises(CheckpointError, match=said):
            muco.load(other)


def test_a_run_with_a_trained_connector_resumes_exactly(scenes, tmp_path):
    model = {"adapter": {"kind": "lora", "rank": 4, "alpha": 4, "dropout": 0.1}, "connector": "trained"}
    whole = muco.train(recipe_of(scenes, tmp_path / "whole", "llava", model))
    output = tmp_path / "cut"
    muco.train(recipe_of(scenes, output, "llava", model))
    shutil.rmtree(output / "model")
    shutil.rmtree(output / "checkpoints" / "checkpoint-2")
    again = muco.train(recipe_of(scenes, output, "llava", model))
    one, other = (load_file(folder / "model.safetensors") for folder in (whole, again))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    batch = {"size": 4, "token_budget": 400, "seen_memory": 0.5}
    kept = load_file(
        muco.train(recipe_of(scenes, tmp_path / "kept", "llava", model, batch=batch)) / "model.safetensors"
    )
    assert all(torch.allclose(one[name], kept[name], atol=1e-5) for name in one)


def test_what_a_tower_saw_is_kept_only_where_it_cannot_change(scenes, tmp_path):
    batch, lora = {"size": 4, "seen_memory": 1}, {"adapter": {"kind": "lora", "rank": 4}}
    recipe = recipe_of(scenes, tmp_path / "run", "qwen3_vl", lora | {"connector": "trained"}, batch=batch)
    for refuses in (plan, muco.train):
        with pytest.raises(RecipeError, match="the connector of this model is inside its vision tower"):
            refuses(recipe)
    for changes in ({"vision": "trained"}, {"adapter": None}):
        with pytest.raises(RecipeError, match=r"batch\.seen_memory: what a tower saw is kept only with vision frozen"):
            recipe_of(scenes, tmp_path / "run", "llava", lora | changes | {"vision": "trained"}, batch=batch)


def test_a_family_whose_connector_cannot_be_told_says_so():
    backbone, _ = muco.backbone.load_backbone(checkpoint("llava"), local_files_only=True)
    backbone.multi_modal_projector = None
    with pytest.raises(CheckpointError, match="LlavaModel has no connector apart from its vision tower"):
        muco.backbone.freeze_vision(backbone, connector=False)


def test_a_model_that_looks_ahead_trains_single_turns_only(scenes, tmp_path):
    lora = {"adapter": {"kind": "lora", "rank": 4, "alpha": 4}}
    for turns, said in (({}, "turns.limit"), ({"limit": 1, "mode": "reconstruction"}, "turns.mode: reconstruction")):
        recipe = recipe_of(scenes, tmp_path / "run", "paligemma", lora, turns=turns)
        for start in (plan, muco.train):
            with pytest.raises(RecipeError, match=f"{said}: in this model a later token changes"):
                start(recipe)
    assert (
        muco.train(recipe_of(scenes, tmp_path / "single", "paligemma", lora, turns={"limit": 1})) / "muco.json"
    ).exists()


@pytest.mark.parametrize("family", ["gemma3", "qwen3_5"])
def test_a_plan_counts_what_any_family_trains(family, scenes, tmp_path):
    recipe = recipe_of(scenes, tmp_path / "run", family, {"adapter": {"kind": "lora", "rank": 4, "alpha": 4}})
    found, model = plan(recipe), families.model(family).encoder.model
    counted = found["model"]["parts"]
    added = 2 * families.WIDTH  # the rows of the new tokens, which the plan counts as a part of its own
    assert counted["vision"] + counted["language"] == sum(p.numel() for p in model.parameters()) - added
    assert ("states" in found["memory"]) == (family == "qwen3_5") and found["memory"]["total"] >= 0


class Normed(nn.Module):
    """A tower's last layer with statistics of its batches and a counter without dimension, as EfficientNet has them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.norm(states.transpose(1, 2)).transpose(1, 2)


def test_the_statistics_of_a_frozen_tower_stay_and_belong_to_the_fingerprint():
    backbone, processor = muco.backbone.load_backbone(checkpoint("llava"), local_files_only=True)
    projector, width = backbone.multi_modal_projector, backbone.config.vision_config.hidden_size
    backbone.multi_modal_projector = nn.Sequential(Normed(width), projector)
    found = from_backbone(backbone, processor, device="cpu")
    first = found.fingerprint
    muco.backbone.freeze_vision(backbone)
    found.train()
    batch = found.encoder.collate([muco.dialogue.single_turn(image(84, 84, 3))])
    before = found.embed(batch).detach()
    assert torch.equal(found.embed(batch).detach(), before) and found.fingerprint == first
    backbone.multi_modal_projector.requires_grad_(True)
    found.train()
    found.embed(batch)
    assert found.fingerprint != first
    assert np.isfinite(found.eval().encode([image(84, 84, 3)])).all()


def test_a_package_that_is_missing_is_named(tmp_path):
    config = {
        "model_type": "perception_lm",
        "vision_config": {"model_type": "timm_wrapper", "architecture": "resnet18"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shutil.copy(checkpoint("llava") / "model.safetensors", tmp_path)
    with pytest.raises(CheckpointError, match="timm"):
        muco.load(tmp_path, device="cpu", local_files_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_5_2b", "qwen3_vl_embedding_2b"])
def test_recipes_of_other_families_can_be_tried_without_weights(scenes, capfd, name):
    data = [f"data.train=[{{path: {scenes / 'train.jsonl'}}}]", f"data.validation={scenes / 'dev.jsonl'}"]
    options = [word for value in data for word in ("--set", value)]
    assert main(["train", str(ROOT / "recipes" / f"{name}.yaml"), "--dry-run", *options, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert 2.0e9 < found["model"]["frozen"] < 2.3e9 and 0.3e9 < found["model"]["parts"]["vision"] < 0.45e9
    assert found["memory"]["total"] < 80 and ("states" in found["memory"]) == (name == "qwen3_5_2b")
    assert not found["problems"] and any("sizes as published" in note for note in found["notes"])
