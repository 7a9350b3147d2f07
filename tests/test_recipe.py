"""Recipes: strict reading, overrides, and the round trip."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import muco
from muco.train.recipe import dump_recipe, from_dict, load_recipe

GOOD = "output: runs/x\nmodel: {path: some/model}\ndata: {train: [{path: a.jsonl}]}\n"


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    return file


def test_numbers_in_scientific_notation_are_numbers(tmp_path):
    recipe = load_recipe(write(tmp_path, GOOD + "trainer: {learning_rate: 2e-5, adam_epsilon: 1.e-8, tag: 2e5x}"))
    assert recipe.trainer == {"learning_rate": 2e-5, "adam_epsilon": 1e-8, "tag": "2e5x"}


def test_what_is_written_is_read_back(tmp_path):
    recipe = load_recipe(
        write(tmp_path, GOOD), ["turns.order=4", "loss.temperature=5e-2", "model.adapter={kind: dora}"]
    )
    assert recipe.turns.order == 4 and recipe.loss.temperature == 0.05 and recipe.model.adapter.kind == "dora"
    assert load_recipe(write(tmp_path, dump_recipe(recipe))) == recipe


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (GOOD + "los: {}", ["los", "did you mean 'loss'"]),
        (GOOD + "loss: {temperatur: 1}", ["loss.temperatur", "temperature"]),
        (GOOD + "loss: {temperature: hot}", ["loss.temperature", "float"]),
        (GOOD + "loss: {temperature: -1}", ["loss.temperature", "positive"]),
        (GOOD + "loss: {symmetric: 1}", ["loss.symmetric", "bool"]),
        (GOOD + "turns: {mode: both}", ["turns.mode", "isolated"]),
        (GOOD + "turns: {order: 0}", ["turns.order", "positive"]),
        (GOOD + "turns: {order: true}", ["turns.order"]),
        (GOOD + "output: again", ["output", "twice"]),
        (GOOD + "seed: [1", ["not YAML"]),
        (GOOD + "trainer: {seed: 1}", ["trainer.seed"]),
        (GOOD + "model2: 3", ["model2", "model"]),
        ("output: x\nmodel: {}\ndata: {train: [{path: a}]}", ["exactly one"]),
        ("output: x\nmodel: {tiny: {}}\ndata: {train: [{path: a}]}", ["vision: trained"]),
        ("output: x\nmodel: {path: a}", ["data.train"]),
        ("output: x\nmodel: {path: a}\ndata: {train: [{weight: 1}]}", ["data.train[0].path", "missing"]),
        ("model: {path: a}\ndata: {train: [{path: a}]}", ["output", "missing"]),
        ("- a", ["mapping"]),
    ],
)
def test_mistakes_name_the_key_and_the_file(tmp_path, text, words):
    with pytest.raises(muco.RecipeError) as error:
        load_recipe(write(tmp_path, text))
    for word in [*words, "recipe.yaml"]:
        assert word in str(error.value)


def test_a_missing_file_and_a_bad_override_are_named(tmp_path):
    with pytest.raises(muco.RecipeError, match="no such recipe"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(muco.RecipeError, match="key=value"):
        load_recipe(write(tmp_path, GOOD), ["loss.temperature"])


def test_recipes_of_qwen_models_state_both_limits_of_image_size():
    root = Path(__file__).parents[1]
    texts = {file.name: file.read_text(encoding="utf-8") for file in sorted((root / "recipes").glob("*.yaml"))}
    blocks = re.findall(r"```yaml\n(.*?)```", (root / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    texts |= {f"README.md {number}": block for number, block in enumerate(blocks)}
    models = {name: yaml.safe_load(text).get("model", {}) for name, text in texts.items() if "path: Qwen/" in text}
    assert len(models) >= 6
    for name, model in models.items():
        assert model["min_pixels"] == 256 * 28 * 28 and model["max_pixels"] > model["min_pixels"], name


def test_recipes_in_the_repository_are_valid():
    files = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
    assert files
    for file in files:
        recipe = load_recipe(file)
        assert from_dict(yaml.safe_load(dump_recipe(recipe))) == recipe
