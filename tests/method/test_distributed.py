"""Several real processes (gloo) against one: gradients, whole runs, and a run that is killed."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import families
import psutil
import pytest
import steps
import torch
from processes import finished, launch
from safetensors.torch import load_file

import muco
from muco.base.files import locked
from muco.data.jsonl import write_jsonl
from muco.precision import WORTH
from muco.training.recipe import dump_recipe, from_dict, load_recipe


@pytest.fixture(scope="module")
def found(tiny_path, scenes, tmp_path_factory) -> Path:
    """What two processes found for every case."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "model").symlink_to(tiny_path)
    (folder / "recurrent").symlink_to(families.checkpoint("qwen3_5"))
    (folder / "scenes").symlink_to(scenes)
    finished(launch(steps.__file__, folder))
    return folder


def test_no_thread_of_the_group_outlives_it(found):
    """One that did aborted a process at its exit, now and then."""
    for rank in (0, 1):
        threads = json.loads((found / f"threads-{rank}.json").read_text())
        assert not [name for name in threads if "gloo" in name]


@pytest.mark.parametrize("case", steps.CASES)
def test_two_processes_find_the_gradient_of_one(tiny_model, scenes, found, case):
    shares, mode, trained, _, _ = steps.CASES[case]
    samples = steps.ragged_samples(scenes)
    order = sum(steps.SHARES[shares], [])
    model = steps.to_train(families.model("qwen3_5") if "recurrent" in case else tiny_model, trained)
    expected = steps.plain(model, steps.share(model, [samples[i] for i in order], mode), mode=mode)
    for rank in (0, 1):
        value = json.loads((found / f"values-{rank}.json").read_text())[case]
        steps.assert_same((value, load_file(found / f"{case}-{rank}.safetensors")), expected)


def test_memory_that_one_process_lacks_costs_it_no_more_than_it_must(tiny_model, scenes, found):
    """The other process holds a single short turn, which says nothing about how much there is room for."""
    budgets = [json.loads((found / f"budgets-{rank}.json").read_text())["short of memory"] for rank in (0, 1)]
    assert budgets[0] == budgets[1] and steps.MEMORY / 2 <= budgets[0] <= steps.MEMORY


CLAIM = """
import sys
from muco import distributed
distributed.start()
try:
    with distributed.claimed(sys.argv[1]):
        print("claimed", flush=True)
except distributed.MucoError as error:
    print(error, flush=True)
"""


def test_all_processes_learn_that_a_folder_is_in_use(tmp_path):
    (tmp_path / "claim.py").write_text(CLAIM)
    command = [str(tmp_path / "claim.py"), str(tmp_path / "run")]
    with locked(tmp_path / "run"):
        said = finished(launch(*command))
    assert said.count(f"in use by process {os.getpid()}") == 2 and "claimed" not in said
    assert finished(launch(*command)) == "claimed\n" * 2


@pytest.fixture(scope="module")
def base(scenes, tmp_path_factory) -> Path:
    """A small trained model, from which the runs below start."""
    tiny = {"width": 64, "feed_forward": 128, "vision_width": 32, "vision_depth": 1, "vocabulary": 512}
    values = {
        "output": str(tmp_path_factory.mktemp("base") / "run"),
        "model": {"tiny": tiny, "vision": "trained"},
        "data": {"train": [{"path": str(scenes / "train.jsonl")}]},
        "batch": {"size": 8},
        "trainer": {"max_steps": 4, "learning_rate": 1e-3, "save_strategy": "no", "report_to": []},
    }
    return muco.train(from_dict(values))


@pytest.fixture(scope="module")
def taught(scenes, tmp_path_factory) -> list[dict]:
    """Two sources whose first turns have hard negatives and a teacher's scores."""
    folder = tmp_path_factory.mktemp("taught")
    rows = [json.loads(line) for line in (scenes / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    for number, row in enumerate(rows):
        row["image"] = str(scenes / row["image"])
        row["turns"][0] |= {"negatives": ["a purple cloud", "nothing at all"], "scores": [3.0, number % 4, -1.0]}
    for name, own in (("one", rows[::2]), ("two", rows[1::2])):
        write_jsonl(folder / f"{name}.jsonl", own)
    return [{"path": str(folder / f"{name}.jsonl"), "weight": 1.0} for name in ("one", "two")]


def every_signal(base: Path, sources: list[dict]) -> tuple[str, ...]:
    """Changes of a recipe that switch on all that it may add to the loss and to the order of samples."""
    changes = {
        "data.train": sources,
        "batch.size": 9,  # 5 samples on one process, 4 on the other
        "batch.group": 3,
        "loss.symmetric": True,
        "loss.dimensions": [16, 64],
        "loss.learn_temperature": "per_source",
        "loss.weighting": {"false_negative_margin": 0.05, "hardness": 2.0, "hard_negative_hardness": 1.0},
        "loss.guide": {"model": str(base), "margin": 0.01},
        "loss.distillation": {"kind": "symmetric_kl", "weight": 0.5},
    }
    return tuple(f"{key}={json.dumps(value)}" for key, value in changes.items())


def write_recipe(base: Path, scenes: Path, output: Path, dropout: float = 0.0, changes=(), **batch) -> Path:
    values = {
        "output": str(output),
        "model": {
            "path": str(base),
            "adapter": {"kind": "lora", "rank": 4, "alpha": 4, "dropout": dropout},
            "activation_checkpointing": True,
        },
        "data": {"train": [{"path": str(scenes / "train.jsonl")}]},
        "turns": {"image_turn": "retrieval"},
        "loss": {"temperature": 0.1},
        "batch": {"size": 7, "token_budget": 700, **batch},  # 4 samples on one process, 3 on the other
        "trainer": {
            "max_steps": 6,  # of 10 in an epoch
            "learning_rate": 1e-3,
            "warmup_steps": 2,
            "logging_steps": 1,
            "save_steps": 2,
            "dataloader_num_workers": 1,
            "report_to": [],
        },
    }
    file = output.with_suffix(".yaml")
    file.write_text(dump_recipe(from_dict(values)))
    file.write_text(dump_recipe(load_recipe(file, changes)))
    return file


def losses(model: Path) -> list[float]:
    return [loss for _, loss in json.loads((model / "run.json").read_text())["loss"]]


def train(recipe: Path, *options: str, accelerate: bool = False) -> list:
    return launch("-m", "muco", "train", recipe, *options, accelerate=accelerate)


@pytest.mark.slow
@pytest.mark.parametrize(("sharding", "accelerate"), [("none", True), ("fsdp", False)])
def test_a_run_of_two_processes_is_the_run_of_one(base, scenes, taught, tmp_path, sharding, accelerate):
    """With every signal. The launcher of accelerate is that of torch, with further variables."""
    signals = every_signal(base, taught)
    alone = muco.train(load_recipe(write_recipe(base, scenes, tmp_path / "alone", changes=signals)))
    recipe = write_recipe(base, scenes, tmp_path / "both", changes=signals, sharding=sharding)
    dev = tmp_path / "dev.jsonl"  # 129 contents: shared out, one process has a pass more than the other
    write_jsonl(dev, [{"turns": [{"query": f"number {n}", "target": f"{max(1, n)}"}]} for n in range(65)])
    out = finished(train(recipe, "--set", f"data.validation={dev}", accelerate=accelerate))
    both = tmp_path / "both" / "model"
    assert [json.loads(line) for line in out.splitlines()] == [{"model": str(both)}], "one process speaks"
    assert len([*(tmp_path / "both/checkpoints/checkpoint-6").glob("rng_state_*.pth")]) == 2
    assert losses(both) == pytest.approx(losses(alone), rel=1e-4) and len(losses(both)) == 6
    one, other, start = (load_file(folder / "model.safetensors") for folder in (alone, both, base))
    assert one.keys() == other.keys()
    moved = max(float((one[name] - start[name]).abs().max()) for name in one)
    assert moved > 1e-3
    # Adam divides by the gradient's size, so where that is next to nothing rounding shows
    assert max(float((one[name] - other[name]).abs().mean()) for name in one) < 0.01 * moved
    state = json.loads((tmp_path / "both/checkpoints/checkpoint-6/trainer_state.json").read_text())
    logged = state["log_history"]
    assert any("eval_text_to_text_hit@1" in entry for entry in logged)
    told = {"peak_memory_gib", "padding", "false_negatives", "temperature_0", "temperature_1"}
    assert all(told <= entry.keys() for entry in logged if "loss" in entry), [*logged[0]]


@pytest.mark.slow
def test_two_processes_measure_the_precision_together_and_train_in_it(base, scenes, tmp_path):
    recipe = write_recipe(base, scenes, tmp_path / "both", changes=["precision=auto", "trainer.max_steps=2"])
    finished(train(recipe))
    chosen = json.loads((tmp_path / "both" / "precision.json").read_text())
    seconds = chosen["seconds_of_a_step"]
    assert [*seconds] == ["float32", "bfloat16"]
    assert (chosen["precision"] == "bfloat16") == (seconds["bfloat16"] <= WORTH * seconds["float32"])
    changes = [f"precision={chosen['precision']}", "trainer.max_steps=2"]
    alone = muco.train(load_recipe(write_recipe(base, scenes, tmp_path / "alone", changes=changes)))
    assert losses(tmp_path / "both" / "model") == pytest.approx(losses(alone), rel=1e-2)


@pytest.mark.slow
def test_all_weights_of_a_bfloat16_model_are_trained_sharded_as_on_one_process(base, scenes, tmp_path):
    muco.load(base, device="cpu").bfloat16().save(str(tmp_path / "half"))
    changes = (f"model.path={tmp_path / 'half'}", "model.adapter=null", "model.save_dtype=float32")
    changes += ("trainer.learning_rate=5e-5", "trainer.warmup_steps=0")
    alone = muco.train(load_recipe(write_recipe(base, scenes, tmp_path / "alone"), changes))
    recipe = write_recipe(base, scenes, tmp_path / "both", sharding="fsdp")
    finished(train(recipe, *(word for change in changes for word in ("--set", change))))
    both = tmp_path / "both" / "model"
    assert losses(both) == pytest.approx(losses(alone), abs=0.02)
    one, other, start = (load_file(folder / "model.safetensors") for folder in (alone, both, tmp_path / "half"))
    language = [name for name in start if "visual" not in name and "embed_tokens" not in name]  # not all words occur
    for weights in (one, other):
        still = sum(int((weights[name] == start[name].float()).sum()) for name in language)
        assert still < 0.01 * sum(start[name].numel() for name in language)
    moved = [torch.cat([(run[name] - start[name].float()).flatten() for name in language]) for run in (one, other)]
    assert torch.nn.functional.cosine_similarity(*moved, dim=0) > 0.9


@pytest.mark.slow
def test_adapters_of_a_bfloat16_model_are_trained_sharded_as_on_one_process(base, scenes, tmp_path):
    muco.load(base, device="cpu").bfloat16().save(str(tmp_path / "half"))
    change = f"model.path={tmp_path / 'half'}"
    alone = muco.train(load_recipe(write_recipe(base, scenes, tmp_path / "alone"), [change]))
    finished(train(write_recipe(base, scenes, tmp_path / "both", sharding="fsdp"), "--set", change))
    both = tmp_path / "both" / "model"
    assert losses(both) == pytest.approx(losses(alone), abs=0.05)  # activations are bfloat16
    trained = load_file(tmp_path / "both" / "checkpoints" / "checkpoint-6" / "trained.safetensors")
    assert {weights.dtype for weights in trained.values()} == {torch.float32}
    assert all(weights.abs().max() > 0 for name, weights in trained.items() if "lora_B" in name)  # zero at the start


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "fsdp"])
def test_two_killed_processes_go_on_where_they_were(base, scenes, taught, tmp_path, sharding):
    """SIGKILL in the middle of an epoch, with every signal, dropout, workers and the gradient cache: the same losses
    and weights.
    """
    how = {"dropout": 0.2, "changes": every_signal(base, taught), "sharding": sharding}
    recipe = write_recipe(base, scenes, tmp_path / "killed", **how)
    both = train(recipe)
    state = tmp_path / "killed" / "checkpoints" / "checkpoint-2" / "trainer_state.json"
    deadline = time.monotonic() + 300
    while not state.exists() and both[0].poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    workers = [worker for one in both for worker in psutil.Process(one.pid).children(recursive=True)]
    for one in [*both, *workers]:
        one.kill()
    for one in both:
        one.communicate()
    assert state.exists() and not (tmp_path / "killed" / "model").exists()
    alone = r"needs several processes" if sharding == "fsdp" else r"written by 2 processes.*not with 1"
    with pytest.raises(muco.MucoError, match=alone):
        muco.train(load_recipe(recipe))
    finished(train(recipe))
    finished(train(write_recipe(base, scenes, tmp_path / "whole", **how)))
    resumed, whole = (tmp_path / name / "model" for name in ("killed", "whole"))
    assert losses(resumed) == losses(whole)
    one, other = (load_file(folder / "model.safetensors") for folder in (resumed, whole))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"size": 1}, "1 samples are fewer than the 2 processes"),
        ({"sharding": "fsdp", "vision": "trained"}, "needs vision and connector frozen"),
    ],
)
def test_what_processes_cannot_share_is_refused_at_start(base, scenes, tmp_path, monkeypatch, change, sentence):
    monkeypatch.setenv("WORLD_SIZE", "2")
    vision = change.pop("vision", "frozen")
    recipe = load_recipe(write_recipe(base, scenes, tmp_path / "run", **change), [f"model.vision={vision}"])
    with pytest.raises(muco.RecipeError, match=sentence):
        muco.train(recipe)


def test_settings_of_a_launcher_that_we_do_not_know_are_refused(base, scenes, tmp_path, monkeypatch):
    alone = load_recipe(write_recipe(base, scenes, tmp_path / "run"))
    with pytest.raises(muco.RecipeError, match="fsdp needs several processes"):
        muco.train(load_recipe(tmp_path / "run.yaml", ["batch.sharding=fsdp"]))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(muco.MucoError, match="WORLD_SIZE is 2, but MASTER_ADDR is not set; start with torchrun"):
        muco.train(alone)
    for name in ("FSDP", "DEEPSPEED"):
        monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
        with pytest.raises(muco.RecipeError, match="batch.sharding: fsdp"):
            muco.train(alone)
        monkeypatch.delenv(f"ACCELERATE_USE_{name}")
