"""``muco train --dry-run``: what it says is what the run then does, and what a GPU was seen to need."""

from __future__ import annotations

import copy
import json
import re
from functools import partial
from pathlib import Path

import families
import pytest
import torch
from PIL import Image

import muco
from muco.backbone import add_adapters, freeze_vision, meta_backbone
from muco.cli import main
from muco.data import open_data
from muco.masks import attention_bias
from muco.sizes import Adapter
from muco.training.build import build_model
from muco.training.look import open_known
from muco.training.meta_model import activation_bytes
from muco.training.mixture import validation_of
from muco.training.plan import plan
from muco.training.published import qwen2_vl_config
from muco.training.recipe import Recipe, ValidationRecipe, dump_recipe, from_dict, load_recipe
from muco.training.trainer import make_trainer

ROOT = Path(__file__).parents[2]
MIB = 1 << 20
TINY = {"width": 64, "feed_forward": 128, "vision_width": 32, "vision_depth": 1, "vocabulary": 512}


def recipe_of(scenes: Path, output: Path, **changes) -> Recipe:
    values = {
        "output": str(output),
        "model": {"tiny": TINY, "vision": "trained"},
        "data": {"train": [{"path": str(scenes / "train.jsonl")}], "validation": str(scenes / "dev.jsonl")},
        "batch": {"size": 8},
        "trainer": {"num_train_epochs": 2, "save_steps": 5, "report_to": []},
    }
    return from_dict(values | changes)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "size"), [("paper_finetune", "7b")])
def test_the_papers_recipes_can_be_tried_without_weights(scenes, capfd, stage, size):
    recipe = ROOT / "recipes" / f"{stage}_qwen2_vl_{size}.yaml"
    data = f"data.train=[{{path: {scenes / 'train.jsonl'}}}]"
    assert main(["train", str(recipe), "--dry-run", "--devices", "8", "--set", data, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    parts, text = found["model"]["parts"], qwen2_vl_config(size.upper()).text_config
    kv = text.hidden_size // text.num_attention_heads * text.num_key_value_heads
    one_layer = 64 * (3 * (text.hidden_size + text.intermediate_size) + 2 * (text.hidden_size + kv))
    attention_out = 64 * 2 * text.hidden_size  # q and o are square
    assert parts["adapters"] == text.num_hidden_layers * (one_layer + 2 * attention_out)
    assert parts["token embeddings"] == 2 * text.hidden_size
    assert found["model"]["trained"] == parts["adapters"] + parts["token embeddings"]
    assert 0.6e9 < parts["vision"] < 0.7e9 and round(parts["language"] / 1e9, 1) == (1.5 if size == "2b" else 7.1)
    assert found["step"]["samples"] == 1024 and found["step"]["samples_per_device"] == 128
    step = found["step"]
    assert (step["pflop_made"] > step["pflop"] > 0) == step["cached"] and step["pflop_made"] >= step["pflop"]
    assert 2 < found["memory"]["weights"] < found["memory"]["total"] < 80
    assert not found["problems"] and any("sizes as published" in note for note in found["notes"])


@pytest.mark.parametrize("size", ["2b", "7b"])
@pytest.mark.parametrize("stage", ["paper_pretrain", "paper_finetune"])
def test_the_papers_recipes_have_its_settings(stage, size):
    settings = load_recipe(ROOT / "recipes" / f"{stage}_qwen2_vl_{size}.yaml")
    assert settings.batch.size == 1024 and settings.loss.temperature == 0.02
    assert settings.trainer["learning_rate"] == 5e-5 and settings.precision == "bfloat16"
    assert settings.model.adapter == Adapter("lora", 64, 64)


def test_a_plan_is_what_the_run_does(scenes, tmp_path):
    recipe = recipe_of(scenes, tmp_path / "run", batch={"size": 8, "token_budget": 300})
    found = plan(recipe)
    assert not (tmp_path / "run").exists(), "a dry run writes nothing"
    sources = [open_data(scenes / "train.jsonl")]
    trainer = make_trainer(recipe, build_model(recipe, sources), sources)
    counts = [p.numel() for p in trainer.model.parameters()]
    assert found["model"]["parameters"] == found["model"]["trained"] == sum(counts)
    assert found["run"]["steps"] == trainer.args.max_steps == 16 and found["run"]["steps_per_epoch"] == 8
    assert found["run"]["checkpoints"] == 4  # after 5, 10, 15 and all 16 steps
    batches = [trainer.batches[step] for step in range(8)]  # one epoch: every sample once, as all were looked at
    tokens = sum(int(batch[side]["attention_mask"].sum()) for batch in batches for side in ("query", "target"))
    assert found["data"]["looked_at"] == 64 and found["step"]["tokens"] == pytest.approx(tokens / 8, abs=1)
    turns = sum(len(batch["ids"]) for batch in batches)
    assert found["step"]["turns"] == turns // 8 == 56
    report = trainer.step([batches[0]])
    assert abs(report.chunks - found["step"]["passes_per_device"]) <= 2
    assert report.padding == pytest.approx(found["step"]["padding"], abs=0.05)


def test_what_stands_in_the_way_is_said_and_fails_the_check(scenes, tmp_path, capfd):
    rows = (scenes / "train.jsonl").read_text().splitlines()[:3]
    broken = json.loads(rows[1]) | {"image": "images/none.png"}
    data = scenes / "broken.jsonl"
    data.write_text("\n".join([rows[0], json.dumps(broken), "{", rows[2]]) + "\n")
    changes = {"batch": {"size": 8, "token_budget": 20}}
    values = {"train": [{"path": str(data)}, {"path": "nowhere.jsonl"}]}
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(recipe_of(scenes, tmp_path / "run", data=values, **changes)))
    assert main(["train", str(file), "--dry-run"]) == 3
    out = capfd.readouterr().out
    for word in ("nowhere.jsonl: no such file", "broken.jsonl:2", "none.png", "broken.jsonl:3"):
        assert word in out
    assert "batch.token_budget: 20 tokens are fewer than the" in out and "raise it to at least" in out
    data.unlink()


def test_rows_that_a_run_leaves_out_do_not_stop_it(scenes, tmp_path):
    rows = (scenes / "train.jsonl").read_text().splitlines()[:3]
    data = scenes / "skipped.jsonl"
    data.write_text("\n".join([*rows[:2], json.dumps(json.loads(rows[2]) | {"image": "images/none.png"}), "{"]) + "\n")
    values = {"train": [{"path": str(data)}], "broken_images": "skip"}
    found = plan(recipe_of(scenes, tmp_path / "run", data=values, batch={"size": 2}))
    assert not found["problems"]
    assert sum("skipped.jsonl:3" in note or "skipped.jsonl:4" in note for note in found["notes"]) == 2
    data.unlink()


@pytest.mark.slow
def test_without_any_data_shapes_are_assumed_and_said_to_be(scenes, tmp_path, capfd):
    file = tmp_path / "recipe.yaml"
    changes = {"model": {"path": "Qwen/Qwen2-VL-2B-Instruct"}, "data": {"train": [{"path": "nowhere.jsonl"}]}}
    file.write_text(dump_recipe(recipe_of(scenes, tmp_path / "run", **changes)))
    assert main(["train", str(file), "--dry-run"]) == 3
    out = capfd.readouterr().out
    assert "952 × 644 px and 7 turns" in out and "image tokens per sample  782 to 782" in out
    assert re.search(r"steps per epoch +–\n +steps +–", out)


def test_a_plan_of_another_family_stops_at_what_it_knows(scenes, tmp_path):
    model = {"path": str(families.checkpoint("idefics3")), "adapter": {"rank": 4, "alpha": 4}}
    found = plan(recipe_of(scenes, tmp_path / "run", model=model))
    assert found["model"]["trained"] > 0 and found["step"]["tokens"] > 0 and "pflop" not in found["step"]
    assert set(found["memory"]) == {"weights", "gradients", "optimizer", "activations", "features", "loss", "total"}
    assert any("not for idefics3" in note for note in found["notes"]) and not found["problems"]


@pytest.mark.parametrize(
    ("changes", "devices", "sentence"),
    [
        ({"batch": {"size": 4}}, 8, "batch.size: 4 samples are fewer than the 8 processes"),
        ({"batch": {"size": 8, "sharding": "fsdp"}}, 1, "needs several processes"),
        ({"trainer": {"learning_rat": 1}}, 1, "learning_rat"),
        (
            {"trainer": {"eval_strategy": "steps"}, "data": {"train": [{"path": "none.jsonl"}]}},
            1,
            "set data.validation",
        ),
        ({"loss": {"dimensions": [32, 128]}}, 1, "loss.dimensions: 128 is more than the 64 dimensions"),
        (
            {"model": {"path": "Qwen/Qwen2-VL-2B-Instruct"}, "loss": {"dimensions": [2048]}},
            1,
            "than the 1536 dimensions",
        ),
        ({"model": {"path": "no/such folder"}}, 1, "no/such folder"),
    ],
)
def test_contradictions_are_errors(scenes, tmp_path, changes, devices, sentence):
    with pytest.raises(muco.MucoError, match=sentence):
        plan(recipe_of(scenes, tmp_path / "run", **changes), devices=devices)


def test_a_row_beyond_the_context_is_a_problem_here_and_an_error_there_and_named(tmp_path):
    config = families.build("qwen2_vl", tmp_path / "model") / "config.json"
    values = json.loads(config.read_text())
    values["text_config"]["max_position_embeddings"] = 200
    config.write_text(json.dumps(values))
    rows = [{"turns": [{"query": f"question {i}", "target": "word " * (900 if i == 5 else 9)}]} for i in range(8)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"path": str(tmp_path / "train.jsonl")}
    settings = {"model": {"path": str(tmp_path / "model")}, "data": {"train": [source]}}
    recipe = recipe_of(tmp_path, tmp_path / "run", **settings)
    said = r"train\.jsonl:6 turn 1: \d,?\d\d\d tokens.*at most 200; shorten the text"
    (problem,) = plan(recipe)["problems"]
    assert re.search(said, problem)
    with pytest.raises(muco.DataError, match=said):
        muco.train(recipe)


@pytest.mark.slow
def test_what_is_trained_is_counted_in_float32_and_computed_in_bfloat16_and_sharding_spreads_it(scenes, tmp_path):
    """All weights of a bfloat16 model: float32 weights, gradients and moments, and the copies of autocast."""
    model = {"path": "Qwen/Qwen2-VL-2B-Instruct", "vision": "frozen", "dtype": "bfloat16"}
    found, sharded = (
        plan(recipe_of(scenes, tmp_path, model=model, batch={"size": 8, "sharding": sharding}), devices=4)
        for sharding in ("none", "fsdp")
    )
    trained, frozen = found["model"]["trained"], found["model"]["frozen"]
    assert found["run"]["precision"] == "bfloat16 autocast"
    expected = {"weights": (4 + 2) * trained + 2 * frozen, "gradients": 4 * trained, "optimizer": 8 * trained}
    for part, size in expected.items():
        assert found["memory"][part] == pytest.approx(size / 2**30, rel=0.01)
    with pytest.raises(muco.RecipeError, match=r"precision: float32: frozen weights"):
        plan(recipe_of(scenes, tmp_path, model=model, precision="float32"))
    alone, spread = found["memory"], sharded["memory"]
    towers = 2 * 675_759_104 / 2**30  # whole on every device; of the true tower at 2B a little less
    assert spread["optimizer"] == pytest.approx(alone["optimizer"] / 4, abs=0.02)
    assert spread["weights"] == pytest.approx((alone["weights"] - towers) / 4 + towers, rel=0.02)
    assert spread["activations"] == alone["activations"]


def test_a_budget_below_one_dialogue_is_refused_before_training(scenes, tmp_path):
    recipe = recipe_of(scenes, tmp_path / "run", batch={"size": 8, "token_budget": 20})
    with pytest.raises(muco.RecipeError, match=r"budget: 20 tokens are fewer .*train\.jsonl:\d+; raise it to at l"):
        muco.train(recipe)
    muco.train(recipe_of(scenes, tmp_path / "run", batch={"size": 8}, trainer={"max_steps": 1, "report_to": []}))


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": {"dimensions": [32, 128]}},
        {"trainer": {"learning_rat": 1}},
        {"trainer": {"eval_strategy": "steps"}, "data": {"train": [{"path": "none.jsonl"}]}},
        {"batch": {"size": 8, "sharding": "fsdp"}},
        {"trainer": {"lr_scheduler_type": "cosine_with_min_lr"}},
        {"trainer": {"lr_scheduler_kwargs": {"bogus": 1}}},
        {"trainer": {"report_to": "bogus"}},
        {"trainer": {"save_strategy": "best"}},
        {"trainer": {"save_strategy": "epoch"}},
        {"trainer": {"full_determinism": "false"}},
    ],
)
def test_training_refuses_what_the_dry_run_refuses_in_the_same_words_before_any_work(scenes, tmp_path, changes):
    recipe = recipe_of(scenes, tmp_path / "run", **changes)
    sentences = []
    for tried in (plan, muco.train):
        with pytest.raises(muco.RecipeError) as error:
            tried(recipe)
        sentences.append(str(error.value))
    assert sentences[0] == sentences[1] and not (tmp_path / "run").exists()


def rows_of(file: Path, targets: list[str], **more) -> Path:
    rows = [{"turns": [{"query": f"number {n}", "target": target}]} | more for n, target in enumerate(targets)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_a_dialogue_beyond_the_budget_passes_alone_in_the_dry_run_and_in_training(scenes, tmp_path, caplog):
    file = rows_of(tmp_path / "rows.jsonl", [*(f"short {n}" for n in range(7)), "long " * 80])
    data = {"train": [{"path": str(file)}]}
    trainer = {"max_steps": 1, "report_to": [], "save_strategy": "no"}
    recipe = recipe_of(scenes, tmp_path / "run", data=data, batch={"size": 8, "token_budget": 60}, trainer=trainer)
    found = plan(recipe)
    said = r"batch\.token_budget: 60 tokens are fewer than the \d+ of the target side of .*rows\.jsonl:8; raise it"
    assert not found["problems"] and any(re.match(f"1 of 8 samples pass alone.*{said}", n) for n in found["notes"])
    assert muco.train(recipe).is_dir() and re.search(f"{said}.*passes alone", caplog.text)


def test_settings_that_nothing_in_the_data_answers_to_are_said(scenes, tmp_path, caplog):
    recipe = recipe_of(
        scenes,
        tmp_path / "run",
        turns={"image_turn": "retreival"},
        loss={"distillation": {}},
        trainer={"max_steps": 1, "report_to": [], "save_strategy": "no"},
        data={"train": [{"path": str(scenes / "train.jsonl")}]},
    )
    notes = plan(recipe)["notes"]
    said = [note for note in notes if "may change nothing: none of the 64 samples that were read has" in note]
    assert len(said) == 2 and "did you mean 'retrieval'?" in said[0]
    muco.train(recipe)
    assert all(note in caplog.text for note in said)


@pytest.mark.parametrize("fault", ["row", "image", "nothing to evaluate"])
def test_a_validation_set_that_cannot_be_scored_is_said_before_the_first_step(scenes, tmp_path, capsys, fault):
    file = rows_of(tmp_path / "dev.jsonl", ["one"] if fault == "nothing to evaluate" else ["one", "two", "three"])
    if fault == "row":
        file.write_text(file.read_text() + '{"turns": [{"query": "q", "tarket": "t"}]}\n')
    elif fault == "image":
        (tmp_path / "cut.png").write_bytes((scenes / "images/dev/00000.png").read_bytes()[:200])
        rows_of(file, ["one", "two", "three"], image="cut.png")
    data = {"train": [{"path": str(scenes / "train.jsonl")}], "validation": str(file)}
    recipe = recipe_of(scenes, tmp_path / "run", data=data)
    [problem] = plan(recipe)["problems"]
    with pytest.raises(muco.DataError) as error:
        muco.train(recipe)
    said = {"row": "dev.jsonl:4", "image": "cut.png"}.get(fault, fault)
    assert said in problem and said in str(error.value)
    assert not [*(tmp_path / "run").glob("checkpoints/checkpoint-*")] and "step 1/" not in capsys.readouterr().err


def test_of_a_large_validation_set_some_samples_are_read_and_scored_from_all_over_it(scenes, tmp_path, caplog):
    file, limited = tmp_path / "dev.jsonl", {"path": str(tmp_path / "dev.jsonl"), "limit": 4}
    answers = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
    rows_of(file, answers)
    assert [sample.turns[0].target[0].text for sample in validation_of(ValidationRecipe(**limited))[0]] == answers[::2]
    lines = file.read_text().splitlines(keepends=True)
    (tmp_path / "cut.png").write_bytes((scenes / "images/dev/00000.png").read_bytes()[:200])
    unread = [
        '{"turns": [{"query": "q", "tarket": "t"}]}\n',
        '{"image": "cut.png", "turns": [{"query": "", "target": "t"}]}\n',
    ]
    file.write_text(lines[0] + unread[0] + lines[2] + unread[1] + "".join(lines[4:]))
    train = [{"path": str(scenes / "train.jsonl")}]
    trainer = {"max_steps": 1, "report_to": []}
    recipe = recipe_of(scenes, tmp_path / "run", data={"train": train, "validation": limited}, trainer=trainer)
    found, said = plan(recipe), "data.validation: 4 of 8 samples are scored, spread evenly over the set"
    assert not found["problems"] and any(said in note for note in found["notes"])
    run = json.loads((muco.train(recipe) / "run.json").read_text())
    assert said in caplog.text and [step for step, _ in run["scores"]] == [0, 1]
    assert run["recipe"]["data"]["validation"]["limit"] == 4
    for limit in (None, 5):  # 0, 1, 3, 4, 6: a bad row is read
        data = {"train": train, "validation": limited | {"limit": limit}}
        [problem] = plan(recipe_of(scenes, tmp_path / "all", data=data))["problems"]
        assert "dev.jsonl:2" in problem


def test_a_dry_run_opens_every_image_of_the_validation_set_once(scenes, tmp_path, monkeypatch):
    opened, usual = [], Image.open
    monkeypatch.setattr(Image, "open", lambda *args, **how: opened.append(args) or usual(*args, **how))
    problems: list[str] = []
    open_known(recipe_of(scenes, tmp_path / "run").data, problems, [])
    assert len(opened) == 2 * 16 and not problems, "once, and once for the size of the black image in its place"


def test_a_mistyped_training_argument_is_named_with_the_nearest_one(scenes, tmp_path):
    recipe = recipe_of(scenes, tmp_path / "run", trainer={"learing_rate": 1e-4})
    with pytest.raises(muco.RecipeError, match=r"unknown key 'trainer\.learing_rate'; did you mean 'learning_rate'\?"):
        plan(recipe)


def test_a_share_of_the_steps_is_a_number_of_checkpoints_and_a_long_warm_up_is_said(scenes, tmp_path):
    trainer = {"num_train_epochs": 2, "save_steps": 0.25, "warmup_steps": 16, "report_to": []}
    found = plan(recipe_of(scenes, tmp_path / "run", trainer=trainer))
    assert found["run"]["steps"] == 16 and found["run"]["checkpoints"] == 4
    assert "trainer.warmup_steps: the run of 16 steps ends before the learning rate is reached" in found["notes"]
    few = plan(recipe_of(scenes, tmp_path / "run", trainer={"num_train_epochs": 0.01, "report_to": []}))
    assert few["run"]["steps"] == 1


@pytest.mark.slow
def test_a_plan_says_how_often_the_rows_of_each_source_are_seen(scenes, tmp_path):
    lines = (scenes / "train.jsonl").read_text().splitlines(keepends=True)[:16]
    few = scenes / "few.jsonl"
    few.write_text("".join(lines))
    paths, output = [str(scenes / "train.jsonl"), str(few), str(few)], tmp_path / "run"
    model = {"path": str(families.checkpoint("idefics3")), "vision": "trained"}  # nothing else is estimated for it

    def run_of(*weights: float | None, **data) -> dict:
        sources = [{"path": path, "weight": weight} for path, weight in zip(paths, weights, strict=False)]
        trainer = {"num_train_epochs": 2, "report_to": []}
        return plan(recipe_of(scenes, output, model=model, data={"train": sources, **data}, trainer=trainer))["run"]

    once = run_of(None, None)
    assert once["rows_seen_per_epoch"] == {paths[0]: 1.0, paths[1]: 1.0} and once["steps_per_epoch"] == 10
    weighted = run_of(1, 1)
    assert weighted["rows_seen_per_epoch"] == {paths[0]: 1.0, paths[1]: 4.0} and weighted["steps_per_epoch"] == 16
    assert weighted["rows_seen_in_the_run"] == {paths[0]: 2.0, paths[1]: 8.0}
    counted = run_of(1, 1, epoch="row_count")
    assert counted["rows_seen_per_epoch"] == {paths[0]: 0.62, paths[1]: 2.5} and counted["steps_per_epoch"] == 10
    assert list(run_of(None, None, None)["rows_seen_per_epoch"]) == [paths[0], f"{few} (2)", f"{few} (3)"]
    with pytest.raises(muco.RecipeError, match="of 8 samples per step the source of weight 0.01 gets less than one"):
        run_of(1, 0.01)
    few.unlink()


def test_dimensions_that_the_vectors_lack_are_refused(scenes, tmp_path):
    with pytest.raises(muco.RecipeError, match="loss.dimensions: 128 is more than the 64 dimensions"):
        muco.train(recipe_of(scenes, tmp_path / "run", loss={"dimensions": [32, 128]}))


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "idefics3"])
@pytest.mark.parametrize(("lora", "masked"), [(0, False), (4, True)])
def test_what_is_saved_on_the_meta_device_is_what_is_saved(family, lora, masked):
    """The same layers with real numbers and torch's own fused attention save as much, but for its masks."""
    model = copy.deepcopy(families.model(family).encoder.model).requires_grad_(True)
    freeze_vision(model)
    model = add_adapters(model, Adapter(rank=lora, alpha=lora), [0]) if lora else model
    language = model.get_decoder().train()
    length, config = 150, language.config
    mask = attention_bias(torch.ones(1, 1, length, length).tril().bool(), torch.float32) if masked else None
    weights = {parameter.untyped_storage().data_ptr() for parameter in language.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}  # by address; held, so that no address is used again

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage
        return tensor

    embeds = torch.randn(1, length, config.hidden_size, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        language(inputs_embeds=embeds, attention_mask=mask, use_cache=False)
    real = sum(storage.nbytes() for storage in saved.values()) - (mask.nbytes if masked else 0)
    counted = activation_bytes(model.to("meta"), length, torch.float32, masked=masked, checkpointing=False)
    widest, masks = 3 * length * max(config.intermediate_size, config.hidden_size) * 4, 5 * length**2 * masked
    assert counted - widest - masks == pytest.approx(real, rel=0.1) and real > MIB // 2
    assert activation_bytes(model, length, torch.float32, masked=masked, checkpointing=True) < counted


def test_the_memory_of_a_trained_vision_tower_is_not_estimated(scenes, tmp_path):
    found = plan(recipe_of(scenes, tmp_path / "run"))
    assert (
        found["memory"] is None
        and "memory is estimated only where vision tower and connector are frozen" in found["notes"]
    )


@pytest.mark.slow
@pytest.mark.parametrize("turns", [1, 7])
def test_activations_are_near_what_a_gpu_was_seen_to_need(turns):
    """The committed measurement: Qwen2-VL-2B's layers, all trained, float32 weights under bfloat16 autocast."""
    measured = json.loads((ROOT / "benchmarks/results/turns-cuda.json").read_text())
    cell = next(c for c in measured["cells"] if c["mode"] == "isolated" and c["turns"] == turns)
    images, lengths = measured["settings"]["images"], (cell["tokens"]["query"], cell["tokens"]["target"])
    model = meta_backbone(qwen2_vl_config("2B"))
    freeze_vision(model)
    layers = sum(p.numel() for p in model.language_model.layers.parameters())
    row = partial(activation_bytes, model, dtype=torch.bfloat16, masked=turns > 1, checkpointing=False)
    kept = sum(images * row(n) for n in lengths)
    expected = kept + layers * (4 + 2)  # gradients, and the copies that autocast makes
    assert expected == pytest.approx(cell["memory"]["peak"] - cell["memory"]["resting"], rel=0.1)
