"""Whole training runs: what they leave behind, that they resume exactly, and the blind control."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import m3t_tree
import mmeb_train_tree
import numpy as np
import processes
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback, set_seed

import muco
from muco.base.files import locked
from muco.cli import main
from muco.data import open_data
from muco.data.source import InMemory
from muco.dialogue import Sample, Turn
from muco.errors import OutputError
from muco.training import checkpoint
from muco.training.blind import blind_loss
from muco.training.build import build_model
from muco.training.callbacks import TokenBudget
from muco.training.folder import model_card
from muco.training.mixture import open_sources
from muco.training.plan import plan
from muco.training.recipe import (
    ModelRecipe,
    dump_recipe,
    from_dict,
    load_recipe,
    recorded,
    saved_recipe,
    to_dict,
    trained_dimensions,
)
from muco.training.trainer import make_trainer

SMALL = {"width": 64, "feed_forward": 128, "vision_width": 32, "vision_depth": 1, "vocabulary": 512}


def recipe_of(scenes: Path, output: Path, **changes) -> muco.Recipe:
    trainer = {
        "max_steps": 6,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_steps": 2,
        "warmup_steps": 2,
    }
    values = {
        "output": str(output),
        "model": {"tiny": SMALL, "vision": "trained"},
        "data": {"train": [{"path": str(scenes / "train.jsonl")}]},
        "turns": {"image_turn": "retrieval"},
        "batch": {"size": 8},
        **{key: value for key, value in changes.items() if key != "trainer"},
        "trainer": {**trainer, **changes.get("trainer", {})},
    }
    return from_dict(values)


@pytest.fixture(scope="module")
def finished(scenes, tmp_path_factory) -> tuple[muco.Recipe, Path]:
    recipe = recipe_of(scenes, tmp_path_factory.mktemp("runs") / "run")
    return recipe, muco.train(recipe)


def losses(model: Path) -> list[float]:
    return [loss for _, loss in json.loads((model / "run.json").read_text())["loss"]]


def test_a_run_leaves_a_whole_model(finished, scenes):
    recipe, folder = finished
    assert load_recipe(folder / "recipe.yaml") == recipe
    facts = json.loads((folder / "run.json").read_text())
    assert facts["data"][0]["fingerprint"] == open_data(scenes / "train.jsonl").fingerprint
    assert facts["steps"] == 6 and len(facts["loss"]) == 6 and "torch" in facts["versions"]
    model = muco.load(folder, device="cpu")
    assert model.fingerprint == facts["model_fingerprint"]
    vectors = model.encode(["a red circle", scenes / "images" / "test" / "00000.png"])
    assert vectors.dtype == np.float32 and np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    card = (folder / "README.md").read_text()
    assert "6 steps" in card and facts["data"][0]["fingerprint"][:16] in card
    assert list(Path(recipe.output).glob("logs/events*")), "no TensorBoard file"
    assert not any(file.suffix in (".bin", ".pkl", ".pt") for file in folder.rglob("*"))


def test_a_finished_run_is_not_run_again_and_says_so(finished, capsys):
    recipe, folder = finished
    stamp = (folder / "run.json").stat().st_mtime_ns
    assert muco.train(recipe) == folder and (folder / "run.json").stat().st_mtime_ns == stamp
    assert f"{folder} is trained already" in capsys.readouterr().err
    with pytest.raises(muco.OutputError, match="already holds this run"):
        muco.train(recipe, resume=False)


def test_a_run_of_an_older_version_is_the_same_run(finished):
    recipe, folder = finished
    file = Path(recipe.output) / "run.json"
    now = file.read_text()
    facts = json.loads(now)
    facts["recipe"]["data"]["train"][0]["weight"] = 1.0  # as it was written when it was the default
    facts["recipe"]["warm_up"] = {"steps": 0, "batch_size": 64, "learning_rate": 0.001}  # as every recipe had it
    del facts["recipe"]["data"]["epoch"], facts["recipe"]["data"]["one_source"], facts["recipe"]["model"]["save_dtype"]
    try:
        file.write_text(json.dumps(facts))
        assert muco.train(recipe) == folder
    finally:
        file.write_text(now)


def test_the_epochs_of_an_older_version_are_other_ones_where_rows_have_weights(scenes, tmp_path):
    source = {"path": str(scenes / "train.jsonl"), "weight": 1.0}
    output = tmp_path / "run"
    (output / "checkpoints" / "checkpoint-2").mkdir(parents=True)

    def claim(epoch: str, **trainer) -> None:
        data = {"train": [source, source | {"weight": 2.0}], "epoch": epoch}
        recipe = recipe_of(scenes, output, data=data, trainer={"max_steps": -1, **trainer})
        facts = checkpoint.run_facts(recipe, [open_data(scenes / "train.jsonl")] * 2)
        old = json.loads(json.dumps(facts))
        del old["recipe"]["data"]["epoch"]
        (output / "run.json").write_text(json.dumps(old))
        assert checkpoint.claim_output(output, facts, resume=True) is None

    claim("row_count")
    claim("every_row", max_steps=6)
    with pytest.raises(muco.OutputError, match=r"another run \(data.epoch differs\)"):
        claim("every_row", num_train_epochs=1)


def test_a_run_resumes_with_other_settings_that_no_step_depends_on(finished, scenes, tmp_path, caplog):
    """After memory ran out, a broken row or a full disk, say; the losses and weights stay the same."""
    _, whole = finished
    changed = {
        "batch": {"size": 8, "token_budget": 2000},
        "data": {"train": [{"path": str(scenes / "train.jsonl")}], "broken_images": "skip", "max_broken": 0.5},
        "trainer": {"save_steps": 3, "logging_steps": 2, "dataloader_num_workers": 1, "report_to": []},
    }
    output = tmp_path / "run"
    muco.train(recipe_of(scenes, output, batch={"size": 8, "token_budget": 4000}, trainer={"save_total_limit": 9}))
    shutil.rmtree(output / "model")
    for step in (4, 6):
        shutil.rmtree(output / "checkpoints" / f"checkpoint-{step}")
    changed["data"]["validation"] = str(scenes / "dev.jsonl")
    again = muco.train(recipe_of(scenes, output, **changed))
    assert "with another data.broken_images" in caplog.text, "of which fingerprints differ"
    made = [int(folder.name.removeprefix("checkpoint-")) for folder in (output / "checkpoints").glob("checkpoint-*")]
    assert sorted(made) == [3, 6], "checkpoints come as the recipe says now"
    assert [step for step, _ in json.loads((again / "run.json").read_text())["scores"]] == [2, 3, 6]
    state = json.loads((output / "checkpoints/checkpoint-6/trainer_state.json").read_text())
    assert state["stateful_callbacks"]["TokenBudget"] == {"args": {"tokens": 2000}, "attributes": {"tokens": 2000}}
    assert json.loads((output / "run.json").read_text())["recipe"]["batch"]["token_budget"] == 2000
    one, other = (load_file(folder / "model.safetensors") for folder in (again, whole))
    assert max(float((one[name] - other[name]).abs().max()) for name in one) < 1e-3
    shutil.rmtree(output / "model")
    with pytest.raises(muco.OutputError, match=r"batch\.size differs"):
        muco.train(recipe_of(scenes, output, batch={"size": 4}))


def test_a_checkpoint_of_an_older_version_keeps_its_smaller_budget():
    for asked, kept, used in ((16384, 4096, 4096), (2048, 4096, 2048), (4096, None, 4096), (None, 4096, 4096)):
        budget = TokenBudget(asked)
        budget.resume({"args": {"tokens": kept}, "attributes": {}})
        assert budget.tokens == used


def test_what_differs_is_named_for_runs_of_other_versions_too(finished, scenes):
    recipe, _ = finished
    facts = json.loads(json.dumps(checkpoint.run_facts(recipe, [open_data(scenes / "train.jsonl")])))
    for change, said in (
        ({"warm_up": {"steps": 10}}, "warm_up"),  # a group that recipes do not have any more
        ({"warm_up": {"steps": 0}}, ""),
        ({"batch": facts["recipe"]["batch"] | {"new_key": 1}}, "batch.new_key"),
        ({"trainer": facts["recipe"]["trainer"] | {"disable_tqdm": None}}, "trainer.disable_tqdm"),
        ({"trainer": facts["recipe"]["trainer"] | {"greater_is_better": True, "log_level": "info"}}, ""),
    ):
        assert checkpoint._differing(facts | {"recipe": facts["recipe"] | change}, facts) == said
    scored = facts["recipe"]["trainer"] | {"lr_scheduler_type": "reduce_lr_on_plateau"}
    other = facts["recipe"]["data"] | {"validation": "other.jsonl"}
    runs = [facts | {"recipe": facts["recipe"] | {"trainer": scored} | more} for more in ({}, {"data": other})]
    assert checkpoint._differing(*runs) == "data.validation", "whose scores set the learning rate"


def test_the_card_names_the_base_model_if_it_is_on_the_hub(finished):
    run = json.loads((finished[1] / "run.json").read_text())
    assert run["base_model"] is None and "base_model" not in (finished[1] / "README.md").read_text()
    front = model_card(run | {"base_model": "Someone/Base-2B"}, 64).split("---")[1]
    assert '\nbase_model: "Someone/Base-2B"\n' in front
    facts = checkpoint.run_facts(replace(finished[0], model=ModelRecipe(path="Someone/Base-2B")), [])
    assert facts["base_model"] == "Someone/Base-2B"


def test_an_older_run_scored_all_of_its_validation_set(finished):
    settings = to_dict(finished[0])
    source = {"path": "dev.jsonl", "format": "jsonl", "options": {}}
    for written in ("dev.jsonl", source | {"weight": None}, source | {"weight": 2.0}):
        old = settings | {"data": settings["data"] | {"validation": written}}
        assert to_dict(recorded(old))["data"]["validation"] == source | {"limit": None}
    asked = from_dict(settings | {"data": settings["data"] | {"validation": "dev.jsonl"}})
    assert to_dict(asked)["data"]["validation"] == source | {"limit": 500}
    assert recorded(to_dict(asked)) == asked


def test_an_older_runs_keys_without_effect_are_passed_over(finished, scenes):
    recipe, folder = finished
    facts = checkpoint.run_facts(recipe, [open_data(scenes / "train.jsonl")])
    old = json.loads(json.dumps(facts))
    old["recipe"]["trainer"] |= {"dataloader_persistent_workers": True, "accelerator_config": None}
    assert not checkpoint._differing(old, facts)
    values = to_dict(recipe) | {"trainer": old["recipe"]["trainer"]}
    assert recorded(values) == recipe
    with pytest.raises(muco.RecipeError, match="dataloader_persistent_workers"):
        from_dict(values)


def test_a_recipe_of_another_program_is_no_recipe_of_a_model(tmp_path):
    (tmp_path / "recipe.yaml").write_text("default_stage: {}\n")
    assert saved_recipe(tmp_path) is None and trained_dimensions(tmp_path) == ()


def test_an_output_folder_of_something_else_is_refused(finished, scenes, tmp_path):
    recipe, _ = finished
    with pytest.raises(muco.OutputError, match=r"loss\.temperature"):
        muco.train(recipe_of(scenes, Path(recipe.output), loss={"temperature": 0.1}))
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(muco.OutputError, match="not empty"):
        muco.train(recipe_of(scenes, tmp_path))
    assert [f.name for f in tmp_path.iterdir()] == ["letter.txt"]


def test_a_run_that_was_begun_with_other_fingerprints_resumes_and_says_so(scenes, tmp_path, caplog):
    recipe, output = recipe_of(scenes, tmp_path / "run"), tmp_path / "run"
    facts = checkpoint.run_facts(recipe, [open_data(scenes / "train.jsonl")])
    assert checkpoint.claim_output(output, facts, resume=True) is None
    (output / "checkpoints" / "checkpoint-2").mkdir(parents=True)

    def began(**changes) -> None:
        old = {key: value for key, value in facts.items() if key != "fingerprint_rule"}
        old["data"] = [facts["data"][0] | {"fingerprint": "of all images"} | changes]
        (output / "run.json").write_text(json.dumps(old))

    began()
    for said in (True, False):
        caplog.clear()
        assert checkpoint.claim_output(output, facts, resume=True) is None
        assert ("begun by another version" in caplog.text) == said
    began(samples=63)
    with pytest.raises(muco.OutputError, match="the training data differs"):
        checkpoint.claim_output(output, facts, resume=True)


def test_a_run_is_a_mapping_or_a_file_too_and_is_scored_on_data_of_any_format(scenes, tmp_path):
    (tmp_path / "pairs.csv").write_text("query,target\n" + "".join(f"q{n},t{n}\n" for n in range(8)))
    recipe = to_dict(recipe_of(scenes, tmp_path / "run", trainer={"max_steps": 1, "report_to": []}))
    recipe["data"]["validation"] = {"path": str(tmp_path / "pairs.csv"), "format": "pairs"}
    assert not plan(from_dict(recipe))["problems"]
    folder = muco.train(recipe)
    assert [scores["text_to_text"] for _, scores in json.loads((folder / "run.json").read_text())["scores"]]
    with pytest.raises(muco.RecipeError, match="no such recipe file"):
        muco.train(tmp_path / "none.yaml")


def test_a_copy_of_a_checkpoint_is_left_alone(tmp_path):
    for name in ("checkpoint-3-keep", "checkpoint-x", "checkpoint-4"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert checkpoint.last_complete(tmp_path) is None
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"checkpoint-3-keep", "checkpoint-x"}


def test_a_run_killed_at_any_moment_ends_with_the_same_losses_and_weights(finished, scenes, tmp_path):
    _, whole = finished
    recipe = recipe_of(scenes, tmp_path / "run")
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(recipe))
    state = tmp_path / "run" / "checkpoints" / "checkpoint-2" / "trainer_state.json"
    program = "import sys; from muco.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "train", str(file)]
    with processes.Popen(command, stderr=processes.DEVNULL, stdout=processes.DEVNULL) as process:
        deadline = time.monotonic() + 300
        while not state.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    assert state.exists() and not (tmp_path / "run" / "model").exists()
    half = tmp_path / "run" / "checkpoints" / "checkpoint-5"
    half.mkdir()  # as a kill in the middle of writing leaves it
    resumed = muco.train(recipe)
    assert not half.exists()
    assert losses(resumed) == losses(whole)
    one, other = (load_file(folder / "model.safetensors") for folder in (whole, resumed))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_second_run_into_the_same_folder_is_refused_at_its_start(scenes, tmp_path):
    with locked(tmp_path / "run"), pytest.raises(OutputError, match=f"in use by process {os.getpid()} on .*; wait"):
        muco.train(recipe_of(scenes, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "name", ["trained.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
)
def test_a_checkpoint_of_which_a_file_was_cut_or_is_gone_is_not_taken_for_whole(finished, tmp_path, caplog, name):
    recipe, _ = finished
    shutil.copytree(Path(recipe.output) / "checkpoints", tmp_path / "checkpoints")
    last = tmp_path / "checkpoints" / "checkpoint-6"
    assert checkpoint.last_complete(tmp_path) == last
    (last / name).write_bytes((last / name).read_bytes()[:-20])
    assert checkpoint.last_complete(tmp_path) == tmp_path / "checkpoints" / "checkpoint-4"
    assert name in caplog.text and not last.exists()
    (tmp_path / "checkpoints" / "checkpoint-4" / name).unlink()
    assert checkpoint.last_complete(tmp_path) is None


def test_a_full_disk_ends_a_run_in_a_sentence_and_the_run_resumes(finished, scenes, tmp_path):
    whole, model = finished
    last = Path(whole.output) / "checkpoints" / "checkpoint-6"
    room = sum(file.stat().st_size for file in last.iterdir())
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={3 * room // 2}", "tmpfs", small]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user may not mount")
    try:
        recipe = recipe_of(scenes, small / "run")
        said = (
            r"step 4: .*checkpoint-4: cannot be written \(.*No space left on device.*; make room, .* checkpoint is .*-2"
        )
        with pytest.raises(OutputError, match=said):
            muco.train(recipe)
        subprocess.run(["mount", "-o", f"remount,size={9 * room}", small], check=True)
        assert losses(muco.train(recipe)) == losses(model)
    finally:
        subprocess.run(["umount", "--lazy", small], check=True)


@pytest.mark.slow
def test_adapters_with_dropout_resume_exactly_and_are_merged(finished, scenes, tmp_path):
    _, base = finished
    adapter = {"kind": "dora", "rank": 4, "alpha": 4, "dropout": 0.2}
    changes = {"model": {"path": str(base), "adapter": adapter, "vision": "frozen"}}
    whole = muco.train(recipe_of(scenes, tmp_path / "whole", **changes))

    # the first two steps by hand, up to a checkpoint; then muco.train goes on
    recipe, sources = recipe_of(scenes, tmp_path / "part", **changes), [open_data(scenes / "train.jsonl")]
    checkpoint.claim_output(tmp_path / "part", checkpoint.run_facts(recipe, sources), resume=True)
    set_seed(recipe.seed)
    model = build_model(recipe, sources)
    assert not any("visual" in name for name, p in model.named_parameters() if p.requires_grad)
    trainer = make_trainer(recipe, model, sources)
    trainer.add_callback(StopAtFirstSave())
    trainer.train()
    resumed = muco.train(recipe)

    assert losses(resumed) == losses(whole)
    one, other, start = (load_file(folder / "model.safetensors") for folder in (whole, resumed, base))
    assert one.keys() == other.keys() == start.keys()  # adapters are folded in
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not all(torch.equal(one[name], start[name]) for name in one)


class StopAtFirstSave(TrainerCallback):
    def on_save(self, args, state, control, **kwargs):
        control.should_training_stop = True


@pytest.fixture(scope="module")
def half(finished, tmp_path_factory) -> Path:
    """The finished model in bfloat16, as large models are published."""
    folder = tmp_path_factory.mktemp("half") / "model"
    muco.load(finished[1], device="cpu").bfloat16().save(str(folder))
    return folder


def of_half(half: Path, scenes: Path, output: Path, trainer: dict | None = None, **model) -> muco.Recipe:
    steps = {"max_steps": 12, "learning_rate": 5e-5, "warmup_steps": 0, "save_strategy": "no", "report_to": []}
    return recipe_of(scenes, output, model={"path": str(half), **model}, trainer=steps | (trainer or {}))


@pytest.mark.slow
def test_all_weights_of_a_bfloat16_checkpoint_are_trained_as_those_of_a_float32_one(half, scenes, tmp_path):
    """Held in bfloat16, half of them would not move at this learning rate, and the loss would fall less."""
    runs = {
        name: muco.train(of_half(half, scenes, tmp_path / name, save_dtype="float32", **model))
        for name, model in (("auto", {}), ("exact", {"dtype": "float32"}))
    }
    start, auto, exact = (load_file(folder / "model.safetensors") for folder in (half, *runs.values()))
    language = [name for name in start if "visual" not in name and "embed_tokens" not in name]  # not all words occur
    still = sum(int((auto[name] == start[name].float()).sum()) for name in language)
    assert still < 0.01 * sum(start[name].numel() for name in language)
    moved = [torch.cat([(run[name] - start[name].float()).flatten() for name in language]) for run in (auto, exact)]
    assert torch.nn.functional.cosine_similarity(*moved, dim=0) > 0.9
    one, other = (losses(folder) for folder in runs.values())
    assert one == pytest.approx(other, abs=0.02) and other[0] - other[-1] > 0.05
    assert {weight.dtype for weight in (*auto.values(), *exact.values())} == {torch.float32}
    assert all(torch.equal(auto[name], start[name].float()) for name in start if "visual" in name)


@pytest.mark.slow
def test_a_model_is_saved_in_the_precision_it_came_in_unless_asked_otherwise(half, scenes, tmp_path):
    kinds = {"whole": {}, "adapters": {"adapter": {"rank": 4, "alpha": 4}}, "float16": {"dtype": "float16"}}
    for name, model in kinds.items():
        recipe = of_half(half, scenes, tmp_path / name, {"max_steps": 1, "eval_steps": 1}, **model)
        folder = muco.train(replace(recipe, data=replace(recipe.data, validation=str(scenes / "dev.jsonl"))))
        dtype = torch.float16 if name == "float16" else torch.bfloat16
        assert {weight.dtype for weight in load_file(folder / "model.safetensors").values()} == {dtype}
        assert muco.load(folder, device="cpu").encoder.model.dtype == dtype


def test_two_precisions_without_autocast_are_refused(half, scenes, tmp_path):
    with pytest.raises(muco.RecipeError, match=r"precision: float32.*held in bfloat16.*set model\.dtype: float32"):
        muco.train(replace(of_half(half, scenes, tmp_path / "run"), precision="float32"))


def test_workers_do_not_change_a_run_and_their_memory_is_told(finished, scenes, tmp_path, capfd):
    _, folder = finished
    recipe = recipe_of(scenes, tmp_path / "run", trainer={"dataloader_num_workers": 2})
    assert losses(muco.train(recipe)) == losses(folder)
    step, screen = tmp_path / "run/checkpoints/checkpoint-6/trainer_state.json", capfd.readouterr().err
    for entry in json.loads(step.read_text())["log_history"]:
        alone, together = entry["peak_memory_gib"], entry["host_memory_gib"]
        assert (0 < alone < together < 16) or torch.cuda.is_available()
        assert f"step {entry['step']}/6  loss" in screen and f"  {together:.1f} GiB of host memory" in screen


def test_validation_runs_during_training(scenes, tmp_path, caplog):
    data = {"train": [{"path": str(scenes / "train.jsonl")}], "validation": str(scenes / "dev.jsonl")}
    trainer = {"max_steps": 3, "eval_steps": 2, "per_device_eval_batch_size": 5}
    recipe = recipe_of(scenes, tmp_path / "run", data=data, trainer=trainer)
    sources, apart = open_sources(recipe), replace(recipe, output=str(tmp_path / "apart"))
    apart = replace(apart, trainer={**apart.trainer, "dataloader_num_workers": 1})
    apart.trainer["dataloader_multiprocessing_context"] = "spawn"
    trainer = make_trainer(apart, build_model(recipe, sources), sources, sources[0])
    assert trainer.evaluator.scoring.batch_size == 5
    assert trainer.get_train_dataloader().loader.multiprocessing_context.get_start_method() == "spawn"
    muco.train(recipe)
    assert "None" not in caplog.text
    saved = [folder.name for folder in (tmp_path / "run" / "checkpoints").glob("checkpoint-*")]
    assert sorted(saved) == ["checkpoint-2", "checkpoint-3"] and plan(recipe)["run"]["checkpoints"] == 2
    state = json.loads((tmp_path / "run" / "checkpoints" / "checkpoint-2" / "trainer_state.json").read_text())
    start, entry = (entry for entry in state["log_history"] if "eval_image_to_caption_hit@1" in entry)
    (zero, _), (step, scores), _ = json.loads((tmp_path / "run" / "model" / "run.json").read_text())["scores"]
    assert start["step"] == zero == 0, "the start has scores too"
    assert step == entry["step"] and scores["image_to_caption"] == entry["eval_image_to_caption_hit@1"]
    assert scores["answer@10"] == entry["eval_answer_hit@10"] and "collapsed" not in scores


@pytest.mark.parametrize("mode", ["isolated", "compounded"])
@pytest.mark.parametrize("targets", [None, "isolated", "compounded"])
def test_each_side_is_read_in_its_own_mode(scenes, tmp_path, tiny_model, mode, targets):
    """Turns that are read by themselves have the vectors of single inputs; others, but the first, have not."""
    recipe = recipe_of(scenes, tmp_path / "run", turns={"mode": mode, "targets": targets})
    sources = open_sources(recipe)
    batches = make_trainer(recipe, tiny_model, sources).batches
    sample, turns = batches._chosen(batches.mixture.draws(0)[0], 0, 0)
    singles = {
        "query": [{"text": turn.query.text, "image": sample.images[0]} for turn in turns],
        "target": [turn.target for turn in turns],
    }
    for side, alone in (("query", mode == "isolated"), ("target", (targets or mode) == "isolated")):
        found = tiny_model.embed(batches[0][side]).detach().numpy()[: len(turns)]
        apart = np.abs(found - tiny_model.encode(singles[side])).max(axis=1)
        assert apart[0] < 1e-5 and (apart[1:] < 1e-5).all() == alone and (apart[1:] > 1e-3).all() != alone


def test_chance_of_the_blind_control_is_less_where_answers_are_equal(scenes, tiny_model):
    pictures = sorted((scenes / "images/train").iterdir())
    answers = ["yes", "no"] * 16 + ["yes", "no", "perhaps", "never"] * 8
    asked = zip(pictures, answers, strict=True)
    data = InMemory([Sample(picture, [Turn("Is it?", answer)]) for picture, answer in asked])
    control = blind_loss(tiny_model, data, recipe_of(scenes, Path("unused"), turns={}))
    assert control["samples"] == 32 and control["chance"] < math.log(32)
    assert math.log(17) <= control["chance"] <= math.log(25), "of a batch in which each answer has 16 to 24 others"
    assert not control["leaks"]
    hard = InMemory(
        [Sample(s.images[0], [Turn("Is it?", s.turns[0].target, negatives=["a cat", "a dog"])]) for s in data]
    )
    assert blind_loss(tiny_model, hard, recipe_of(scenes, Path("unused"), turns={})) == control, "chance counts none"


def test_a_special_token_in_the_data_stops_the_run_and_names_the_row(tmp_path):
    data = tmp_path / "train.jsonl"
    rows = [{"turns": [{"query": f"q{i}", "target": f"p{i}"}]} for i in range(8)]
    rows[5]["turns"][0]["target"] = "an <|emb|> here"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {"data": {"train": [{"path": str(data)}]}}
    with pytest.raises(muco.DataError, match=r"train\.jsonl:6 turn 1.*<\|emb\|>"):
        muco.train(recipe_of(tmp_path, tmp_path / "run", **values))


@pytest.mark.parametrize(
    ("trainer", "word"),
    [
        ({"learning_rat": 1}, "learning_rat"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps"),
        ({"save_only_model": True}, "a run could not resume"),
        ({"torch_empty_cache_steps": 4}, "trainer.torch_empty_cache_steps has no effect here"),
        ({"logging_strategy": "epoch"}, "set trainer.logging_steps"),
    ],
)
def test_trainer_arguments_are_checked(scenes, tmp_path, trainer, word):
    with pytest.raises(muco.RecipeError, match=word):
        muco.train(recipe_of(scenes, tmp_path / "run", trainer=trainer))


def poison_weight(model) -> None:
    with torch.no_grad():
        next(model.parameters())[:] = float("nan")


def poison_gradient(model) -> None:
    next(model.parameters()).register_hook(lambda gradient: gradient * float("inf"))


class At(TrainerCallback):
    """Does something to the model when a step begins."""

    def __init__(self, step: int, action) -> None:
        self.step, self.action = step, action

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 == self.step:
            self.action(model)


@pytest.mark.parametrize("budget", [None, 300])
@pytest.mark.parametrize(
    ("action", "found"),
    [
        (poison_weight, r"the loss is nan; vectors are not finite for .*train\.jsonl:\d+.*and \d+ more"),
        (poison_gradient, "the gradient is (nan|inf)"),
    ],
)
def test_what_is_no_number_stops_the_run_and_names_the_last_good_checkpoint(scenes, tmp_path, budget, action, found):
    recipe = recipe_of(scenes, tmp_path / "run", batch={"size": 8, "token_budget": budget})
    sources = [open_data(scenes / "train.jsonl")]
    checkpoint.claim_output(tmp_path / "run", checkpoint.run_facts(recipe, sources), resume=True)
    for step, last in ((2, "there is no checkpoint yet"), (4, r"the last good checkpoint is .*checkpoint-2$")):
        trainer = make_trainer(recipe, build_model(recipe, sources), sources)
        trainer.add_callback(At(step, action))
        with pytest.raises(muco.TrainingError, match=rf"^step {step}: {found}.*; {last}"):
            trainer.train()


def test_a_checkpoint_never_holds_weights_that_are_no_numbers(scenes, tmp_path):
    recipe = recipe_of(scenes, tmp_path / "run")
    sources = [open_data(scenes / "train.jsonl")]
    trainer = make_trainer(recipe, build_model(recipe, sources), sources)
    poison_weight(trainer.model)
    with pytest.raises(muco.TrainingError, match="is not finite; there is no checkpoint yet"):
        trainer.save_model(str(tmp_path / "run" / "checkpoints" / "checkpoint-1"))
    assert not [*tmp_path.rglob("*.safetensors")]


PAPER = Path(__file__).parents[2] / "recipes"


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_the_papers_recipes_run_unchanged_on_the_published_layouts(tmp_path, monkeypatch, capfd, stage):
    """But for the model, sizes and what a CPU cannot do: the data, the turns and the loss are the recipe's own."""
    monkeypatch.chdir(tmp_path)
    m3t_tree.write_tree(tmp_path / "data" / "M3T", m3t_tree.records(10), missing=[3])
    for name in ("CIRR", "HatefulMemes", "WebQA"):
        records = [mmeb_train_tree.captioned(name, row) for row in range(4)]
        mmeb_train_tree.write_rows(tmp_path / f"data/M3T/MMEB_train/{name}/{name}_generated_sentence.parquet", records)
        for record in records:
            for path in filter(None, (record["qry_image_path"], record["pos_image_path"])):
                m3t_tree.write_image(tmp_path / "data" / "MMEB-train" / path)
    sizes = [f"model={{tiny: {json.dumps(SMALL)}, vision: trained}}", "batch.size=4", "batch.token_budget=600"]
    trainer = [f"trainer.{item}" for item in ("dataloader_num_workers=0", "report_to=[]")]
    settings = [word for change in ["precision=float32", *sizes, *trainer] for word in ("--set", change)]
    small, large = (load_recipe(PAPER / f"paper_{stage}_qwen2_vl_{size}.yaml") for size in ("2b", "7b"))
    assert (small.data, small.turns, small.loss) == (large.data, large.turns, large.loss)
    file = str(PAPER / f"paper_{stage}_qwen2_vl_2b.yaml")
    assert main(["train", file, "--dry-run", "--json", *settings]) == 0
    planned = json.loads(capfd.readouterr().out)
    rows = 9 if stage == "pretrain" else 12
    assert [*planned["data"]["rows"].values()] == [rows] and not planned["problems"]
    assert planned["data"]["turns_per_sample"]["mean"] == (7 if stage == "pretrain" else 2)
    assert main(["train", file, *settings]) == 0
    facts = json.loads((Path(small.output) / "model" / "run.json").read_text())
    assert facts["steps"] == planned["run"]["steps"] == 3 and facts["record"]["skipped"] == 0
    assert all(math.isfinite(loss) for _, loss in facts["loss"])


@pytest.mark.slow
def test_the_gradient_cache_does_not_change_a_run_and_resumes_exactly(finished, scenes, tmp_path):
    _, whole = finished
    batch = {"size": 8, "token_budget": 300}
    cached = muco.train(recipe_of(scenes, tmp_path / "cached", batch=batch))
    assert losses(cached) == pytest.approx(losses(whole), rel=1e-4)

    recipe, sources = recipe_of(scenes, tmp_path / "part", batch=batch), [open_data(scenes / "train.jsonl")]
    checkpoint.claim_output(tmp_path / "part", checkpoint.run_facts(recipe, sources), resume=True)
    set_seed(recipe.seed)
    trainer = make_trainer(recipe, build_model(recipe, sources), sources)
    trainer.add_callback(StopAtFirstSave())
    trainer.train()
    assert losses(muco.train(recipe)) == losses(cached)


def test_a_budget_that_memory_made_smaller_is_kept_by_a_checkpoint(scenes, tmp_path):
    recipe = recipe_of(scenes, tmp_path / "run", batch={"size": 8, "token_budget": 10_000})
    sources = [open_data(scenes / "train.jsonl")]
    checkpoint.claim_output(tmp_path / "run", checkpoint.run_facts(recipe, sources), resume=True)

    def no_memory(module, args, kwargs) -> None:
        if kwargs["input_ids"].numel() > 500:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    trainer = make_trainer(recipe, build_model(recipe, sources), sources)
    trainer.model.encoder.model.register_forward_pre_hook(no_memory, with_kwargs=True)
    trainer.add_callback(StopAtFirstSave())
    trainer.train()
    assert 200 < trainer.budget.tokens <= 500
    again = make_trainer(recipe, build_model(recipe, sources), sources)
    again.add_callback(StopAtFirstSave())
    again.train(resume_from_checkpoint=str(checkpoint.last_complete(tmp_path / "run")))
    assert again.step.token_budget == trainer.budget.tokens


@pytest.mark.slow
def test_parts_of_a_vector_are_trained_as_vectors(scenes, tmp_path):
    """Matryoshka: cut to 8 numbers, vectors of a model that was trained so are better than of one that was not."""
    held_out, scores = open_data(scenes / "train.jsonl"), {}
    for dimensions in ((), (8, 64)):
        trainer = {"max_steps": 50, "save_strategy": "no", "learning_rate": 2e-3}
        loss = {"temperature": 0.1, "dimensions": list(dimensions)}
        recipe = recipe_of(scenes, tmp_path / str(len(dimensions)), loss=loss, trainer=trainer)
        model = muco.load(muco.train(recipe), device="cpu")
        samples = [held_out[i] for i in range(64)]
        images, captions = [s.images[0] for s in samples], [s.turns[-1].target[0] for s in samples]
        one, other = (model.encode(x, truncate_dim=8, normalize_embeddings=True) for x in (images, captions))
        numbers = torch.arange(len(samples))
        one, other = torch.from_numpy(one), torch.from_numpy(other)
        scores[dimensions] = muco.multi_turn_info_nce(one, other, numbers, temperature=0.1).item()
    assert scores[8, 64] < scores[()] - 0.1


@pytest.mark.parametrize(("margin", "shares", "told"), [(2.0, (0, 0), "none"), (0.0, (0.2, 0.8), "many")])
def test_negatives_left_out_by_their_score_are_logged_and_told_if_none_or_many(
    scenes, tmp_path, caplog, margin, shares, told
):
    loss = {"weighting": {"false_negative_margin": margin, "hardness": 3.0}}
    muco.train(recipe_of(scenes, tmp_path / "run", loss=loss, trainer={"max_steps": 2}))
    state = json.loads((tmp_path / "run/checkpoints/checkpoint-2/trainer_state.json").read_text())
    found = [entry["false_negatives"] for entry in state["log_history"] if "loss" in entry]
    assert len(found) == 2 and all(shares[0] <= share <= shares[1] for share in found)
    said = [record.message for record in caplog.records if "false_negative_margin" in record.message]
    assert len(said) == 1 and f"{found[0]:.1%} of all negatives are left out, which is {told}" in said[0]


@pytest.mark.slow
def test_blind_turns_cannot_be_matched_unless_their_order_leaks(scenes, tmp_path):
    """All pixels equal: chance for a model that knows the kind of a question is ln(samples)."""
    chance, held_out = math.log(4), open_data(scenes / "test.jsonl")
    model = {"tiny": SMALL | {"max_pixels": 28 * 28}, "vision": "trained"}  # an image of one token

    def blind_run(name: str, steps: int = 60, **turns) -> tuple[float, dict]:
        data = {"train": [{"path": str(scenes / "train.jsonl")}], "blind": True}
        trainer = {"max_steps": steps, "save_strategy": "no", "learning_rate": 2e-3}
        recipe = recipe_of(
            scenes, tmp_path / name, model=model, data=data, batch={"size": 4}, trainer=trainer, turns=turns
        )
        folder = muco.train(recipe)
        return float(np.mean(losses(folder)[-10:])), blind_loss(muco.load(folder, device="cpu"), held_out, recipe)

    for name, turns in (("isolated", {}), ("batch", {"mode": "compounded", "order": "batch"})):
        loss, control = blind_run(name, **turns)
        assert loss > 0.9 * chance and not control["leaks"]
    loss, control = blind_run("sample", steps=100, mode="compounded", order="sample")
    assert loss < 0.5 * chance and control["leaks"]  # evaluation sees it on held-out samples too
    assert control["chance"] == pytest.approx(math.log(16)) and control["loss"] < 0.75 * control["chance"]


def broken_scenes(scenes: Path, folder: Path, broken: int) -> Path:
    """The scenes, of which so many rows have a missing image, no image, no sense, or a special token, one by one."""
    lines = (scenes / "train.jsonl").read_text().splitlines()
    folder.mkdir()
    (folder / "images").symlink_to(scenes / "images")
    (folder / "text.png").write_text("no image")
    for row in range(broken):
        special = {"turns": [{"query": "what?", "target": "an <|emb|> here"}]}
        change = ({"image": "text.png"}, {"image": "none.png"}, {"turns": "none"}, special)[row % 4]
        lines[row] = json.dumps(json.loads(lines[row]) | change)
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_rows_that_cannot_be_used_are_named_counted_and_kept_count_of_when_resumed(scenes, tmp_path):
    data = {"train": [{"path": str(broken_scenes(scenes, tmp_path / "data", 9) / "train.jsonl")}]}
    with pytest.raises(muco.DataError, match=r"train\.jsonl:\d+"):
        muco.train(recipe_of(scenes, tmp_path / "strict", data=data))
    recipe = recipe_of(scenes, tmp_path / "run", data=data | {"broken_images": "skip", "max_broken": 0.5})
    model = muco.train(recipe)
    record = json.loads((model / "run.json").read_text())["record"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "skipped-0.jsonl").read_text().splitlines()]
    assert record["samples"] == 6 * 8 and record["skipped"] == len(lines) > 4 and record["left_out_turns"] == 0
    assert {line["row"] for line in lines} <= set(range(9)) and all("train.jsonl" in line["reason"] for line in lines)
    state = json.loads((tmp_path / "run" / "checkpoints" / "checkpoint-4" / "trainer_state.json").read_text())
    before = sum(line["step"] < 4 for line in lines)
    folder = tmp_path / "run" / "checkpoints"
    shutil.rmtree(tmp_path / "run" / "model")
    shutil.rmtree(folder / "checkpoint-6")  # as if killed after step 5, and in the middle of a line
    with (tmp_path / "run" / "skipped-0.jsonl").open("a") as file:
        file.write('{"step": 5, "source": 0, "row": 1, "reason": "of a step that is made again"}\n{"step": 5, "sou')
    again = json.loads((muco.train(recipe) / "run.json").read_text())["record"]
    listed = [json.loads(line) for line in (tmp_path / "run" / "skipped-0.jsonl").read_text().splitlines()]
    assert again == record and listed == lines
    assert state["stateful_callbacks"]["Record"]["attributes"] == {
        "samples": 32,
        "skipped": before,
        "left_out_turns": 0,
    }


def test_a_step_in_which_nothing_can_be_used_is_left_out_and_said(scenes, tmp_path, caplog):
    lines = (broken_scenes(scenes, tmp_path / "data", 5) / "train.jsonl").read_text().splitlines()[:8]
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(lines) + "\n")
    data = {"train": [{"path": str(tmp_path / "data" / "train.jsonl")}], "broken_images": "skip"}
    recipe = recipe_of(scenes, tmp_path / "run", data=data, batch={"size": 2})
    model = muco.train(recipe)
    said = [record.message for record in caplog.records if "the step is left out" in record.message]
    logged = [step for step, _ in json.loads((model / "run.json").read_text())["loss"]]
    assert said and len(said) == 6 - len(logged) and logged
    assert not any(message.startswith(tuple(f"step {step}:" for step in logged)) for message in said)
    together = replace(recipe, output=str(tmp_path / "once"), trainer={**recipe.trainer, "logging_steps": 6})
    assert losses(muco.train(together)) == [pytest.approx(np.mean(losses(model)), rel=1e-5)]
    shutil.rmtree(tmp_path / "run" / "model")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint-6")
    again = muco.train(recipe)
    assert losses(again) == losses(model)


TURNS = [{"query": "What?", "target": "a ring"}, {"query": "Why?", "target": "a gift"}]
ROW = {"image": "images/train/00000.png", "turns": TURNS}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([ROW], "its only sample gives no turn a negative .all turns belong to one sample or one image"),
        ([{"turns": TURNS[:1]}] * 8, "step 1: no turn has a negative .all turns have the same target"),
        ([ROW] * 8, "step 1: no turn has a negative .all turns belong to one sample or one image"),
        ([{"turns": [TURNS[0] | {"negatives": ["a pin"]}]}], None),
    ],
)
def test_a_run_that_can_learn_nothing_says_why(scenes, tmp_path, caplog, rows, said):
    (tmp_path / "images").symlink_to(scenes / "images")
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": [{"path": str(tmp_path / "train.jsonl")}]}
    recipe = recipe_of(scenes, tmp_path / "run", data=data, turns={}, trainer={"max_steps": 2, "save_strategy": "no"})
    problems = [line for line in plan(recipe)["problems"] if "negative" in line]
    assert bool(problems) == bool(said)
    if len(rows) == 1 and said:
        with pytest.raises(muco.DataError, match=said):
            muco.train(recipe)
        return
    values = losses(muco.train(recipe))
    told = [record.message for record in caplog.records if "negative" in record.message]
    assert len(told) == bool(said) and (not said or re.search(said, told[0]) and values == [0.0, 0.0])


def test_a_run_stops_when_more_than_the_stated_share_is_broken(scenes, tmp_path):
    data = {"train": [{"path": str(broken_scenes(scenes, tmp_path / "data", 40) / "train.jsonl")}]}
    recipe = recipe_of(scenes, tmp_path / "run", data=data | {"broken_images": "skip", "max_broken": 0.25})
    with pytest.raises(muco.TrainingError, match=r"samples could not be used.*max_broken: 0\.25.*skipped-0\.jsonl"):
        muco.train(recipe)


def test_a_run_without_duplicates_goes_on_after_a_checkpoint_and_counts_them(scenes, tmp_path):
    rows = [json.loads(line) for line in (scenes / "train.jsonl").read_text().splitlines()]
    for row in rows:
        row["turns"] = [t | {"target": t["target"].split()[-1]} for t in row["turns"] if t["kind"] == "classification"]
    (tmp_path / "images").symlink_to(scenes / "images")
    (tmp_path / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": [{"path": str(tmp_path / "words.jsonl")}], "duplicates": "leave_out"}
    whole = muco.train(recipe_of(scenes, tmp_path / "whole", data=data, turns={}))
    record = json.loads((whole / "run.json").read_text())["record"]
    assert record["left_out_turns"] > 6 and record["samples"] <= 48
    shutil.rmtree(tmp_path / "whole" / "model")
    shutil.rmtree(tmp_path / "whole" / "checkpoints" / "checkpoint-6")
    again = muco.train(recipe_of(scenes, tmp_path / "whole", data=data, turns={}))
    assert json.loads((again / "run.json").read_text())["record"] == record
