"""A saved folder in the hands of the stock sentence-transformers library, in an environment that cannot import muco.

That environment has torchvision (``make test`` makes it, see make_stock_environment.sh). With it the library resizes
images by another implementation of the same filter, which differs by a grey level here and there. So the vectors are
equal within TIGHT for text and for images that need no resizing, within LOOSE otherwise, and within TIGHT again when
the library is told to use Pillow.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import families
import family_checks
import numpy as np
import pytest
import torch

import muco
from muco.backbone import add_adapters, load_backbone
from muco.encoder import STOCK_TRANSFORMER
from muco.export import export
from muco.model import Model, from_backbone
from muco.sizes import Adapter
from muco.stock import write_json

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-stock" / "bin" / "python"
TIGHT, LOOSE = 1e-6, 5e-3  # largest difference of a coordinate of unit vectors; measured: 3e-7 and 2e-3

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-stock; 'make test' makes it (make_stock_environment.sh)"),
    # peft 0.21 asks for it by the name that transformers 5.23 deprecates
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


def with_adapters() -> Model:
    """Trained in the way of the recipes: adapters, and the rows of the new tokens."""
    backbone, processor = load_backbone(families.checkpoint("qwen2_vl"), local_files_only=True)
    backbone = add_adapters(backbone, Adapter("dora", rank=4, alpha=8), [processor.read_id])
    generator = torch.Generator().manual_seed(0)
    for parameter in backbone.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return from_backbone(backbone, processor, device="cpu")


def of_the_paper() -> Model:
    """With the prompt of the paper's releases, whose texts end with one newline, and a pixel budget of its own."""
    backbone, processor = load_backbone(families.checkpoint("qwen2_vl"), local_files_only=True)
    processor.template = replace(processor.template, newline_at_end=True)
    processor.set_pixels(28 * 28, 84 * 84)
    return from_backbone(backbone, processor, device="cpu")


QWEN3_CHAT = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\n' -}}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part['type'] == 'text' -%}{{- part['text'] -}}{%- endif -%}
{%- endfor -%}
{{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\nEND' -}}{%- endif -%}"""


def released(folder: Path, end: str) -> Model:
    """An embedding model as another trainer releases it, in the layout of the stock library; writes the folder first.

    Its prompt begins with an instruction as system message, and ends with the beginning of an answer and ``end``.
    """
    shutil.copytree(families.checkpoint("qwen3_vl"), folder)
    config = {
        "modules.json": [
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
            {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
        ],
        "1_Pooling/config.json": {"word_embedding_dimension": families.WIDTH, "pooling_mode_lasttoken": True},
        "config_sentence_transformers.json": {
            "prompts": {"query": "Retrieve what the user asks for.", "document": "Represent the user's input."},
            "default_prompt_name": "document",
        },
        "sentence_bert_config.json": {
            **STOCK_TRANSFORMER,
            "processing_kwargs": {"chat_template": {"add_generation_prompt": True}},
        },
    }
    for name, value in config.items():
        write_json(folder / name, value)
    (folder / "chat_template.jinja").write_text(QWEN3_CHAT.replace("END", end), encoding="utf-8")
    return muco.load(folder, device="cpu", local_files_only=True)


EXPORTED = "exported"  # written by muco export, as any other by its save
RELEASED = {"released": "", "released, own token": "<|endoftext|>"}  # written by another trainer; by what it ends with

MODELS: dict[str, Callable[[], Model]] = {
    **{family: lambda family=family: families.model(family) for family in families.FAMILIES},
    "adapters": with_adapters,
    "paper": of_the_paper,
    EXPORTED: of_the_paper,
    **{name: lambda: families.model("qwen3_vl") for name in RELEASED},
}
OF_QWEN3 = ("qwen3_vl", *RELEASED)  # whose visual tokens are 32 pixels wide
TEXTS = ("A ring", " led by a space,\n\nin two lines\n", "\nIt's the user's question: 12?")
RESIZED = ("resized", "resized+text")


def inputs(folder: Path, unit: int) -> dict[str, dict[str, Any]]:
    """One input per name; those in RESIZED need resizing, the others fit a grid of visual tokens of ``unit`` pixels."""
    sizes = {"square": (3 * unit, 3 * unit), "wide": (4 * unit, 2 * unit), "odd": (150, 64), "tall": (57, 130)}
    files = {name: str(folder / f"{name}{unit}.png") for name in sizes}
    for seed, (name, size) in enumerate(sizes.items()):
        families.image(*size, seed).save(files[name])
    square, wide, odd, tall = files.values()
    return {
        **{f"text {number}": {"text": text} for number, text in enumerate(TEXTS)},
        "image": {"image": square},
        "image, empty text": {"image": square, "text": ""},
        "image+text": {"image": wide, "text": "What is it?"},
        "text+image": {"text": "What is it?", "image": wide},
        "two": {"text": "Which?", "image": [square, wide]},
        "two, reversed": {"image": [wide, square], "text": "Which?"},
        "resized": {"image": odd},
        "resized+text": {"image": tall, "text": "What is it?\n\nAnd where?"},
    }


@dataclass(frozen=True)
class Runs:
    """The vectors of every input by model: of muco here, of the stock library there, and of muco there."""

    models: dict[str, Model]
    here: dict[str, dict[str, np.ndarray]]
    stock: dict[str, dict[str, np.ndarray]]
    muco: dict[str, dict[str, np.ndarray]]
    facts: dict[str, dict[str, Any]]  # of the modes "stock" and "muco"
    folder: Path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("stock")
    models = {name: make() for name, make in MODELS.items()}
    models |= {name: released(folder / name, end) for name, end in RELEASED.items()}
    values = {name: inputs(folder, 32 if name in OF_QWEN3 else 28) for name in MODELS}
    for name, model in models.items():
        if name in RELEASED:
            continue
        saved = folder / ("source" if name == EXPORTED else name)
        model.save(str(saved), create_model_card=False)
        if name == EXPORTED:
            assert export(str(saved), folder / name)["ok"]
    job = {
        "root": str(ROOT),
        "output": str(folder),
        "models": {name: str(folder / name) for name in MODELS},
        "families": family_checks.NEED_TORCHVISION,
        "inputs": {name: list(parts.values()) for name, parts in values.items()},
    }
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    command = [PYTHON, "-I", ROOT / "tests" / "support" / "stock_environment.py", folder / "job.json"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr[-4000:]
    here = {name: named(values[name], encode(models[name], values[name])) for name in MODELS}
    vectors, facts = {}, {}
    for mode in ("stock", "muco"):
        facts[mode] = json.loads((folder / f"{mode}.json").read_text(encoding="utf-8"))
        with np.load(folder / f"{mode}.npz") as arrays:
            vectors[mode] = {key: named(values[key.split("/")[0]], arrays[key]) for key in arrays}
    return Runs(models, here, vectors["stock"], vectors["muco"], facts, folder)


def encode(model: Model, values: dict[str, Any]) -> np.ndarray:
    return model.encode(list(values.values()), batch_size=4)


def named(values: dict[str, Any], vectors: np.ndarray) -> dict[str, np.ndarray]:
    return dict(zip(values, vectors, strict=True))


def differences(some: dict[str, np.ndarray], others: dict[str, np.ndarray], name: str) -> dict[str, float]:
    """Of each input; other trainers' prompts keep a text before an image, where ours begin with images."""
    left_out = ("text+image", "two") if name in RELEASED else ()
    return {what: float(np.abs(some[what] - others[what]).max()) for what in some if what not in left_out}


def test_the_other_environment_is_what_it_is_for(runs: Runs) -> None:
    assert not runs.facts["stock"]["muco_importable"]
    for facts in runs.facts.values():
        assert facts["torchvision"].startswith("0.")
    for name, facts in runs.facts["stock"]["models"].items():
        assert "TorchvisionBackend" in facts["image_processor"], name
        assert facts["model"].endswith("Model") and facts["pooling"] == "lasttoken"
        assert facts["warnings"] == []


@pytest.mark.parametrize("family", family_checks.NEED_TORCHVISION)
def test_families_that_need_torchvision_do_what_their_rows_say(runs: Runs, family: str) -> None:
    needs, *row = family_checks.documented()[family_checks.ROWS[family]]
    assert needs == "torchvision" and json.loads((runs.folder / "families.json").read_text())[family] == row


def test_a_released_embedding_model_keeps_its_prompt_and_its_token(runs: Runs) -> None:
    read = {name: runs.models[name].encoder.muco_processor.template for name in RELEASED}
    assert all("Represent the user's input." in template.head for template in read.values())
    assert {name: template.read for name, template in read.items()} == {
        "released": "\n",
        "released, own token": "<|endoftext|>",
    }


def test_the_pooling_is_written_for_old_readers_too(runs: Runs) -> None:
    """Readers such as vLLM know the modules by their old names, and take the first true value for the mode."""
    folder = runs.folder / "qwen2_vl"
    modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
    assert [module["type"].split(".") for module in modules] == [
        ["sentence_transformers", "models", name] for name in ("Transformer", "Pooling", "Normalize")
    ]
    assert all((folder / module["path"]).is_dir() for module in modules)
    pooling = json.loads((folder / modules[1]["path"] / "config.json").read_text(encoding="utf-8"))
    assert next(key for key, value in pooling.items() if value is True) == "pooling_mode_lasttoken"
    assert pooling["word_embedding_dimension"] == runs.models["qwen2_vl"].get_embedding_dimension()


def test_inputs_differ(runs: Runs) -> None:
    """Guards the tests below: an encoder blind to images, their order or texts would pass them."""
    for vectors in runs.here.values():
        same = ("image", "image, empty text"), ("image+text", "text+image")
        for one, other in combinations(vectors, 2):
            assert np.abs(vectors[one] - vectors[other]).max() > 5 * LOOSE or (one, other) in same, (one, other)


@pytest.mark.parametrize("name", MODELS)
def test_stock_library_gives_the_same_vectors(runs: Runs, name: str) -> None:
    for what, difference in differences(runs.here[name], runs.stock[name], name).items():
        always_resized = name == "idefics3" and not what.startswith("text ")
        assert difference <= (LOOSE if what in RESIZED or always_resized else TIGHT), what


@pytest.mark.parametrize("name", MODELS)
def test_stock_library_with_pillow_gives_the_same_vectors_resized_or_not(runs: Runs, name: str) -> None:
    for what, difference in differences(runs.here[name], runs.stock[f"{name}/pil"], name).items():
        assert difference <= TIGHT, what


@pytest.mark.parametrize("name", [name for name in MODELS if name not in RELEASED])
def test_order_of_keys_does_not_matter_to_the_stock_library(runs: Runs, name: str) -> None:
    vectors = runs.stock[name]
    assert np.abs(vectors["image+text"] - vectors["text+image"]).max() <= TIGHT
    assert np.abs(vectors["image"] - vectors["image, empty text"]).max() <= TIGHT


@pytest.mark.parametrize("name", MODELS)
def test_torchvision_changes_nothing_for_muco(runs: Runs, name: str) -> None:
    assert "PilBackend" in runs.facts["muco"]["models"][name]["image_processor"]
    for what, difference in differences(runs.here[name], runs.muco[name], name).items():
        assert difference <= TIGHT, what


@pytest.mark.parametrize("name", MODELS)
def test_saved_again_by_the_stock_library(runs: Runs, name: str) -> None:
    """Its folder has no muco.json; the prompt and the pixel budget are still those of the model."""
    folder = runs.folder / "saved" / name
    assert not (folder / "muco.json").exists()
    model = muco.load(folder, device="cpu", local_files_only=True)
    assert model.encoder.muco_processor.template == runs.models[name].encoder.muco_processor.template
    values = inputs(runs.folder, 32 if name in OF_QWEN3 else 28)
    for what, difference in differences(runs.here[name], named(values, encode(model, values)), name).items():
        assert difference <= TIGHT, what
