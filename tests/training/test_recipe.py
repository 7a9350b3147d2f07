"""Recipes: strict reading, overrides, and the round trip."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

import muco
from muco.base.yaml_text import parse_yaml
from muco.reading import Reading
from muco.training.checks import check_turns
from muco.training.recipe import TurnsRecipe, dump_recipe, from_dict, load_recipe

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


def test_a_group_takes_in_the_keys_of_another():
    found = parse_yaml("a: &x {b: 1}\nc: {<<: *x, d: 2e-1}", "here", muco.RecipeError)
    assert found == {"a": {"b": 1}, "c": {"b": 1, "d": 0.2}}


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
        (GOOD + "seed: 2024-13-45", ["month must be in 1..12"]),
        (GOOD + "seed: " + "[" * 2000, ["nested too deep"]),
        (GOOD + "trainer: {seed: 1}", ["trainer.seed"]),
        (GOOD + "model2: 3", ["model2", "model"]),
        ("output: x\nmodel: {}\ndata: {train: [{path: a}]}", ["exactly one"]),
        ("output: x\nmodel: {tiny: {}}\ndata: {train: [{path: a}]}", ["vision: trained"]),
        (
            "output: x\nmodel: {tiny: {}, vision: trained, connector: frozen}\ndata: {train: [{path: a}]}",
            ["vision: trained"],
        ),
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


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("loss.temperature=.nan", "loss.temperature must be a finite number, got nan"),
        ("trainer.learning_rate=.inf", "trainer.learning_rate must be a finite number, got inf"),
        ("trainer.lr_scheduler_kwargs={min_lr: [1, -.inf]}", r"trainer.lr_scheduler_kwargs.min_lr\[1\] must be a fin"),
        ("data.train=[{path: a, weight: .inf}]", r"data.train\[0\].weight must be a finite number"),
        ("data.train=[{path: a, options: {share: .nan}}]", r"data.train\[0\].options.share must be a finite"),
        ("data.train=[{path: a, weight: 0}]", r"data.train\[0\].weight must be positive, got 0"),
        ("data.max_broken=1.5", "data.max_broken must be a share"),
        ("trainer.learning_rate=-1e-5", "trainer.learning_rate must be at least 0, got -1e-05"),
        ("trainer.learning_rate='5e-5'", "trainer.learning_rate must be at least 0, got '5e-5'"),
        ("trainer.learning_rate=true", "trainer.learning_rate must be at least 0, got True"),
        ("trainer.num_train_epochs=0", "trainer.num_train_epochs must be positive"),
        ("trainer.num_train_epochs=-1", "trainer.num_train_epochs must be positive"),
        ("trainer.max_steps=0", "trainer.max_steps must be a positive whole number"),
        ("trainer.max_steps=1e3", "trainer.max_steps must be a positive whole number"),
        ("trainer.save_steps=0", "trainer.save_steps must be a positive number of steps, or a share"),
        ("trainer.save_steps=2.5", "trainer.save_steps must be a positive number of steps, or a share"),
        ("trainer.save_steps=null", "trainer.save_steps must be a positive number of steps"),
        ("trainer.save_total_limit=two", "trainer.save_total_limit must be a whole number, at least 0"),
        ("trainer.max_grad_norm=null", "trainer.max_grad_norm must be at least 0, got None"),
        ("trainer.neftune_noise_alpha=5", "trainer.neftune_noise_alpha is not supported"),
        ("trainer.warmup_steps=-1", "trainer.warmup_steps must be at least 0"),
        ("trainer.adam_beta2=1", "trainer.adam_beta2 must be at least 0 and below 1"),
        ("trainer.dataloader_num_workers=-1", "trainer.dataloader_num_workers must be a whole number"),
        ("model.adapter={rank: 0}", "model.adapter.rank must be a positive"),
        ("model.adapter={dropout: 1}", "model.adapter.dropout must be at least 0 and below 1"),
        ("model={path: a, min_pixels: 10, max_pixels: 9}", "model.min_pixels: 10 is more than model.max_pixels: 9"),
        ("model={tiny: {width: 30, heads: 4}, vision: trained}", "model.tiny.width: 30 is not a multiple of heads"),
        ("loss.dimensions=[8, 0]", r"loss.dimensions\[1\] must be positive"),
        ("seed=-1", "seed must be a whole number"),
        (
            "data.validation={path: v.jsonl, weight: 3}",
            "data.validation must be .* unknown key 'data.validation.weight'",
        ),
        ("data.validation={path: v.jsonl, limit: 0}", "data.validation.limit must be a positive whole number, got 0"),
        ("data.train=[{path: a, limit: 5}]", r"unknown key 'data.train\[0\].limit'"),
        ("trainer.torch_compile_backend=inductor", "trainer.torch_compile_backend is not supported"),
        ("trainer.accelerator_config={split_batches: true}", "trainer.accelerator_config is set by MuCo"),
        ("trainer.ddp_timeout=5", "trainer.ddp_timeout is set by MuCo"),
        ("trainer.dataloader_in_order=false", "trainer.dataloader_in_order has no effect here"),
    ],
)
def test_numbers_that_no_run_can_have_are_refused_wherever_they_are(tmp_path, override, words):
    with pytest.raises(muco.RecipeError, match=f"recipe.yaml: {words}"):
        load_recipe(write(tmp_path, GOOD), [override])


def test_a_group_of_older_versions_is_passed_over_where_it_did_nothing(tmp_path):
    written = GOOD + "\nwarm_up: {steps: %d, batch_size: 64, learning_rate: 0.001}\n"
    assert load_recipe(write(tmp_path, written % 0)) == load_recipe(write(tmp_path, GOOD))
    with pytest.raises(muco.RecipeError, match="recipe.yaml: warm_up is not supported any more"):
        load_recipe(write(tmp_path, written % 5))


def test_a_recipe_made_in_python_is_checked_like_a_file():
    with pytest.raises(muco.RecipeError, match="trainer.learning_rate must be a finite number"):
        dataclasses.replace(from_dict(yaml.safe_load(GOOD)), trainer={"learning_rate": float("nan")})


def test_shares_of_steps_and_an_unset_number_of_steps_are_taken(tmp_path):
    overrides = ["trainer.save_steps=0.25", "trainer.max_steps=-1", "trainer.warmup_steps=0.1", "trainer.eval_steps=2"]
    overrides += ["trainer.save_total_limit=null"]
    assert load_recipe(write(tmp_path, GOOD), overrides).trainer["save_steps"] == 0.25


def test_weights_are_those_that_are_given_or_none(tmp_path):
    def weights(sources: str) -> tuple[float, ...] | None:
        return load_recipe(write(tmp_path, GOOD), [f"data.train=[{sources}]"]).data.weights

    assert weights("{path: a}, {path: b}") is None
    assert weights("{path: a, weight: 4}, {path: b}") == (4, 1)


def test_a_missing_file_and_a_bad_override_are_named(tmp_path):
    with pytest.raises(muco.RecipeError, match="no such recipe"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(muco.RecipeError, match="key=value"):
        load_recipe(write(tmp_path, GOOD), ["loss.temperature"])


def test_recipes_of_qwen_models_state_both_limits_of_image_size():
    """The smallest size is that of the evaluation; a released embedding model keeps its own."""
    root = Path(__file__).parents[2]
    texts = {file.name: file.read_text(encoding="utf-8") for file in sorted((root / "recipes").glob("*.yaml"))}
    blocks = re.findall(r"```yaml\n(.*?)```", (root / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    texts |= {f"README.md {number}": block for number, block in enumerate(blocks)}
    models = {name: yaml.safe_load(text).get("model", {}) for name, text in texts.items() if "path: Qwen/" in text}
    assert len(models) >= 6
    for name, model in models.items():
        smallest = 4096 if "Embedding" in model["path"] else 256 * 28 * 28
        assert model["min_pixels"] == smallest and model["max_pixels"] > model["min_pixels"], name


def test_recipes_in_the_repository_are_valid():
    files = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
    assert files
    for file in files:
        recipe = load_recipe(file)
        assert from_dict(yaml.safe_load(dump_recipe(recipe))) == recipe


def test_only_isolated_turns_need_layers_that_can_be_masked():
    reading = Reading(("chunked_attention",), unknown=("chunked_attention",))
    check_turns(TurnsRecipe(mode="reconstruction"), reading)
    check_turns(TurnsRecipe(mode="compounded"), reading)
    with pytest.raises(muco.RecipeError, match="cannot mask: chunked_attention; set turns.mode: compounded"):
        check_turns(TurnsRecipe(), reading)
