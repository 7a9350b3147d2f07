"""muco export: what others read is the model itself; a folder that gives other vectors gets no name."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from families import FAMILIES, checkpoint, image
from hub_server import HubServer
from safetensors.torch import load_file, save_file

import muco
from muco import CheckpointError, MucoError, OutputError, RecipeError
from muco.backbone import add_adapters, load_backbone
from muco.export import export
from muco.export.parity import Parity, compare, examples, stock_vectors
from muco.model import from_backbone
from muco.sizes import Adapter
from muco.template import EMB
from muco.training.folder import hub_id
from muco.training.recipe import from_dict, saved_recipe, trained_dimensions

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
INPUTS = ["a ring", {"text": "What is it?", "image": image(150, 64, 1)}]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, str]:
    """Every family as a saved embedding model."""
    root = tmp_path_factory.mktemp("saved")
    for family in FAMILIES:
        muco.load(checkpoint(family), device="cpu", local_files_only=True).save(str(root / family))
    return {family: str(root / family) for family in FAMILIES}


@pytest.fixture(scope="module")
def run(saved, scenes, tmp_path_factory) -> Path:
    """A short run of LoRA adapters whose checkpoint still has them."""
    output = tmp_path_factory.mktemp("runs") / "run"
    recipe = {
        "output": str(output),
        "model": {"path": saved["qwen2_vl"], "adapter": {"kind": "lora", "rank": 4, "alpha": 64}},
        "data": {"train": [{"path": str(scenes / "train.jsonl")}]},
        "loss": {"dimensions": [16]},
        "batch": {"size": 4},
        "trainer": {"max_steps": 3, "save_steps": 3, "learning_rate": 0.05, "report_to": []},
    }
    muco.train(from_dict(recipe))
    return output


def vectors(path: Path | str) -> np.ndarray:
    return muco.load(str(path), device="cpu").encode(INPUTS)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("format", ["sentence-transformers", "vllm"])
def test_every_family_keeps_its_vectors_in_both_forms(family, format, saved, tmp_path):
    found = export(saved[family], tmp_path / "out", format=format)
    assert found["ok"] and 0.99 < found["cosine_in_bfloat16"] < 1  # of the same folder, by autocast
    assert found["cosine"] > 0.999999 and found["examples"] == len(examples(several_images=True))
    assert not list(tmp_path.glob("*.part"))
    pooling = json.loads((tmp_path / "out" / "1_Pooling" / "config.json").read_text())
    assert pooling["pooling_mode"] == "lasttoken" and pooling["pooling_mode_lasttoken"] is True
    assert (tmp_path / "out" / "chat_template.jinja").read_text().rstrip().endswith((EMB, "}", "-%}"))
    assert np.allclose(vectors(tmp_path / "out"), vectors(saved[family]), atol=1e-5)


def test_vllm_gets_the_names_of_the_whole_class_and_its_command(run, tmp_path):
    export(str(run / "model"), tmp_path / "out", format="vllm")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["Qwen2VLForConditionalGeneration"]
    assert config["is_matryoshka"] is True and config["matryoshka_dimensions"] == [16]
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert not any("lora" in name for name in names)
    assert any(name.startswith(("model.visual.", "visual.")) for name in names)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "vllm serve . --runner pooling" in card and "chat_template.jinja" in card and "16" in card


@pytest.mark.parametrize("format", ["sentence-transformers", "vllm"])
def test_the_shorter_lengths_are_known_of_the_exported_model_and_of_its_own_export(format, run, saved, tmp_path):
    export(str(run / "checkpoints" / "checkpoint-3"), tmp_path / "one", format=format)
    export(str(tmp_path / "one"), tmp_path / "two", format="sentence-transformers")
    for name in ("one", "two"):
        assert trained_dimensions(tmp_path / name) == (16,), name
        assert " 16" in (tmp_path / name / "README.md").read_text(encoding="utf-8")
    assert trained_dimensions(saved["qwen2_vl"]) == ()
    (tmp_path / "two" / "recipe.yaml").unlink()  # as in a folder of an older version, or of a merged model
    assert trained_dimensions(tmp_path / "two") == (16,)
    config = json.loads((tmp_path / "two" / "config.json").read_text())
    (tmp_path / "two" / "config.json").write_text(json.dumps(config | {"matryoshka_dimensions": ["a"]}))
    with pytest.raises(RecipeError, match=r"config\.json: the shorter lengths of its vectors cannot be read"):
        trained_dimensions(tmp_path / "two")


def test_an_exported_model_says_where_it_comes_from(run, saved, tmp_path):
    base, run = "Someone/Base-2B", Path(shutil.copytree(run, tmp_path / "first"))
    for file in (run / "run.json", run / "model" / "run.json"):
        assert json.loads(file.read_text())["base_model"] is None, "a folder"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model": base}))  # as of a hub's model
    steps = run / "checkpoints" / "checkpoint-3"
    names = {
        run / "model": "exported from the run first by",
        steps: "exported from checkpoint-3 of the run first by",
    }
    for number, (source, said) in enumerate(names.items()):
        out = tmp_path / str(number)
        export(str(source), out)
        card = (out / "README.md").read_text()
        assert said in card and f'base_model: "{base}"' in card.split("---")[1] and "`recipe.yaml`" in card
        assert replace(saved_recipe(out), output="") == replace(saved_recipe(run / "model"), output="")
        facts = json.loads((out / "run.json").read_text())
        assert facts["data"][0]["fingerprint"] and ("loss" in facts) == (source.name == "model")
    export(str(tmp_path / "0"), tmp_path / "again")
    assert (tmp_path / "again" / "run.json").read_bytes() == (run / "model" / "run.json").read_bytes()
    other = Path(shutil.copytree(saved["qwen2_vl"], tmp_path / "other"))
    for name in ("recipe.yaml", "run.json"):  # of another program
        (other / name).write_text('{"cake": 1}')
    export(str(other), tmp_path / "plain")
    card = (tmp_path / "plain" / "README.md").read_text()
    assert "exported from other by" in card and "base_model" not in card and "recipe.yaml" not in card
    assert not (tmp_path / "plain" / "recipe.yaml").exists() and not (tmp_path / "plain" / "run.json").exists()


def test_only_a_model_of_the_hub_is_the_base_of_a_card(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    ids = {
        "Qwen/Qwen2-VL-2B-Instruct": True,
        "models/mine": False,
        "starter": False,
        "/data/qwen": False,
        "../a/b": False,
    }
    assert {path: hub_id(path) for path in ids} == {path: path if known else None for path, known in ids.items()}
    assert hub_id(None) is None


@pytest.mark.parametrize("format", ["sentence-transformers", "vllm"])
def test_adapters_are_merged_or_separate_with_the_same_vectors(format, run, tmp_path):
    checkpoint_folder = str(run / "checkpoints" / "checkpoint-3")
    merged = export(checkpoint_folder, tmp_path / "merged", format=format)
    separate = export(checkpoint_folder, tmp_path / "separate", format=format, adapters="separate")
    assert merged["ok"] and separate["ok"]
    assert np.allclose(vectors(tmp_path / "merged"), vectors(run / "model"), atol=1e-5)
    adapter = load_file(tmp_path / "separate" / "adapter" / "adapter_model.safetensors")
    assert adapter and all("lora_" in name for name in adapter)
    plain, adapted = (
        stock_vectors(tmp_path / "separate", examples(several_images=True), generation=format == "vllm", adapter=path)
        for path in (None, tmp_path / "separate" / "adapter")
    )
    assert compare(plain, adapted, "float32").cosine < 0.9999, "the adapter does nothing: nothing was compared"


def test_another_precision_is_said_and_checked(saved, tmp_path):
    found = export(saved["qwen2_vl"], tmp_path / "half", dtype="bfloat16")
    assert found["ok"] and found["dtype"] == "bfloat16" and 0.99 < found["cosine_to_source"] < 1
    weights = load_file(tmp_path / "half" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}


def test_a_folder_that_gives_other_vectors_gets_no_name(saved, tmp_path, monkeypatch):
    module = import_module("muco.export.export")

    write = module._write

    def spoilt(model, folder, format, *, separate):
        write(model, folder, format, separate=separate)
        weights = load_file(folder / "model.safetensors")
        name = next(name for name in weights if "layers.0" in name and "q_proj.weight" in name)
        weights[name] = -weights[name]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(module, "_write", spoilt)
    found = export(saved["qwen2_vl"], tmp_path / "out")
    assert not found["ok"] and found["worst"] in examples(several_images=True) and found["cosine"] < 0.999999
    assert not (tmp_path / "out").exists() and Path(found["part"]).is_dir()


def test_a_missing_weight_and_a_missing_pooling_are_errors(saved, tmp_path):
    export(saved["qwen2_vl"], tmp_path / "out")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    lost = sorted(weights)[0]
    save_file({k: w for k, w in weights.items() if k != lost}, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="missing or unexpected weights"):
        stock_vectors(tmp_path / "out", examples(several_images=True), generation=False)


def test_parity_takes_no_number_for_no_equality():
    one = {"a": np.array([1.0, 0.0], dtype=np.float32)}
    assert compare(one, one, "float32").ok
    assert not compare(one, {"a": np.array([np.nan, 0.0], dtype=np.float32)}, "float32").ok
    assert not Parity("float32", 1, 1.0, 1e-3, "a").ok and not Parity("float32", 1, 0.99, 1e-5, "a").ok
    assert Parity("bfloat16", 1, 0.9995, 1e-3, "a").ok


def test_what_cannot_be_exported_is_said(saved, run, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    (tmp_path / "there").mkdir()
    with pytest.raises(OutputError, match="already exists"):
        export(saved["qwen2_vl"], tmp_path / "there")
    with pytest.raises(CheckpointError, match="no adapters of its own"):
        export(saved["qwen2_vl"], tmp_path / "out", adapters="separate")
    with pytest.raises(MucoError, match="dtype must be one of"):
        export(saved["qwen2_vl"], tmp_path / "out", dtype="int8")
    with pytest.raises(MucoError, match="needs a token"):
        export(saved["qwen2_vl"], tmp_path / "out", push="me/rings")
    with pytest.raises(MucoError, match="NAMESPACE/NAME"):
        export(saved["qwen2_vl"], tmp_path / "out", push="rings")
    assert not list(tmp_path.glob("out*"))


def test_dora_is_not_for_vllm_unmerged(tmp_path):
    from muco.export.export import _check_separable

    backbone, processor = load_backbone(checkpoint("qwen2_vl"), local_files_only=True)
    model = from_backbone(add_adapters(backbone, Adapter("dora", rank=2), [processor.read_id]), processor, device="cpu")
    with pytest.raises(MucoError, match="but not DoRA"):
        _check_separable("run", model, "vllm")


PUSH = """
import importlib, sys
import huggingface_hub.constants
importlib.reload(huggingface_hub.constants)  # the hub in the environment, which is read when this is imported
from muco.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_what_is_pushed_is_the_folder(saved, tmp_path):
    line = [sys.executable, "-c", PUSH, "export", saved["qwen2_vl"], "--output", str(tmp_path / "out"), "--json"]
    with HubServer() as hub:
        environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_mine", "HF_HUB_OFFLINE": "0"}
        environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
        done = processes.run([*line, "--push", "me/rings"], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["url"] == f"{hub.url}/me/rings/commit/1"
        assert hub.private == {"me/rings": True} and "Bearer hf_mine" in hub.tokens
    files = {str(file.relative_to(tmp_path / "out")): file for file in (tmp_path / "out").rglob("*") if file.is_file()}
    assert "model.safetensors" in files and "1_Pooling/config.json" in files
    assert hub.files["me/rings"] == {name: file.read_bytes() for name, file in files.items()}
    assert "hf_mine" not in done.stdout + done.stderr


@pytest.mark.slow
def test_the_command_line(saved, tmp_path):
    command = [sys.executable, "-m", "muco", "export", saved["qwen2_vl"], "--output", str(tmp_path / "out"), "--json"]
    done = processes.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["output"] == str(tmp_path / "out")
    again = processes.run(command, capture_output=True, text=True)
    assert again.returncode == 1 and "already exists" in again.stderr and not again.stdout
