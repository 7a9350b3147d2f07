"""Loading is strict, saving is whole, and adapters train what they should and nothing else."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from families import FAMILIES, build, checkpoint, image, model, ragged, vectors
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

import muco
from muco.backbone import (
    add_adapters,
    freeze_vision,
    hold_trained_in_float32,
    language_linears,
    load_backbone,
    merge_adapters,
)
from muco.dialogue import Content, Dialogue
from muco.errors import CheckpointError
from muco.model import Model, from_backbone
from muco.processor import EVALUATION_PIXELS, SETTINGS_FILE
from muco.sizes import Adapter
from muco.template import EMB, MASK, QWEN_VL, SPECIAL_TOKENS

every_family = pytest.mark.parametrize("family", FAMILIES)
Weights = dict[str, torch.Tensor]


def load(folder: Path, **kwargs: Any) -> Model:
    return muco.load(folder, device="cpu", local_files_only=True, **kwargs)


def close(vectors: np.ndarray, others: np.ndarray) -> bool:
    return vectors.shape == others.shape and float(np.abs(vectors - others).max()) < 1e-6


def change(folder: Path, edit: Callable[[Weights], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[str], Path]:
    def copy(family: str = "qwen2_vl") -> Path:
        return Path(shutil.copytree(checkpoint(family), tmp_path / family))

    return copy


def inputs() -> list[Any]:
    return ["a ring", image(90, 60, 1), {"text": "what is it?", "image": image(60, 90, 2)}]


# What is loaded


@every_family
def test_loading_twice_gives_the_same_vectors(family):
    again = load(checkpoint(family))
    assert close(again.encode(inputs()), model(family).encode(inputs()))
    assert again.fingerprint == model(family).fingerprint


@every_family
def test_where_a_text_is_read_starts_as_its_end(family, tmp_path):
    """Only where the token is new: what a saved model has learnt stays."""
    found = load(checkpoint(family))
    tokenizer, rows = found.encoder.tokenizer, found.encoder.model.get_input_embeddings().weight
    read, mask = (tokenizer.convert_tokens_to_ids(token) for token in (EMB, MASK))
    assert torch.equal(rows[read], rows[tokenizer.eos_token_id]) and not torch.equal(rows[mask], rows[read])
    with torch.no_grad():
        rows[read] += 1
    found.save(str(tmp_path / "saved"))
    again = load(tmp_path / "saved").encoder.model.get_input_embeddings().weight
    with torch.no_grad():
        assert torch.equal(again[read], rows[read])
        rows[read] -= 1


@every_family
def test_saving_and_loading_changes_nothing(family, tmp_path):
    before = model(family).encode(inputs())
    model(family).save(str(tmp_path / "saved"))
    saved = load(tmp_path / "saved")
    assert close(saved.encode(inputs()), before)
    assert close(vectors(saved, ragged()), vectors(model(family), ragged()))
    assert saved.encoder.muco_processor.template == model(family).encoder.muco_processor.template
    assert saved.fingerprint == model(family).fingerprint
    assert saved.tokenizer.chat_template.endswith(saved.encoder.muco_processor.template.jinja())


@every_family
def test_shorter_vectors_are_unit_vectors_wherever_they_are_asked_for(family, tmp_path):
    short, whole = load(checkpoint(family), truncate_dim=8), model(family)
    expected = whole.encode(inputs())[:, :8]
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert close(short.encode(inputs()), expected) and close(whole.encode(inputs(), truncate_dim=8), expected)
    assert close(short.encode(inputs(), truncate_dim=None), expected), "None is the model's own"
    dimension = whole.get_embedding_dimension()
    assert close(short.encode(inputs(), truncate_dim=dimension), whole.encode(inputs())), "all can be asked for"
    for mode in ("isolated", "compounded"):
        long = whole.encode_turns(image(90, 60, 1), ["a", "b"], mode=mode)[:, :8]
        turns = short.encode_turns(image(90, 60, 1), ["a", "b"], mode=mode)
        assert close(turns, long / np.linalg.norm(long, axis=1, keepdims=True))
    assert short.fingerprint == whole.fingerprint
    short.save(str(tmp_path / "saved"))
    assert close(load(tmp_path / "saved").encode(inputs()), whole.encode(inputs())), "weights are saved whole"
    with pytest.raises(muco.MucoError, match=r"cannot be shortened to 4096; pass 1 to \d+"):
        load(checkpoint(family), truncate_dim=4096)


@every_family
def test_the_context_is_that_of_the_configuration_or_of_the_tokenizer_if_smaller(family, copied):
    folder = copied(family)
    config, tokenizer = folder / "config.json", folder / "tokenizer_config.json"
    values = json.loads(config.read_text())
    values["text_config"]["max_position_embeddings"] = 300
    config.write_text(json.dumps(values))
    assert load(folder).max_seq_length == 300
    tokenizer.write_text(json.dumps({**json.loads(tokenizer.read_text()), "model_max_length": 200}))
    short, long = load(folder), "ring " * 400
    assert short.max_seq_length == 200
    for encode in (lambda: short.encode(["a", {"text": long}]), lambda: short.encode_turns(None, ["a", long])):
        with pytest.raises(muco.DataError, match=r"^(input 1 turn 1|encode_turns turn 2): \d+ tokens.*at most 200"):
            encode()


@every_family
def test_max_seq_length_cuts_texts_with_a_warning_that_counts(family):
    fresh, long, picture = load(checkpoint(family)), "a narrow silver ring " * 30, image(60, 90, 2)
    context, whole, fingerprint = fresh.max_seq_length, fresh.encode(["a ring"]), fresh.fingerprint
    fresh.max_seq_length = fresh.encoder.collate([Dialogue((picture,), (Content("a ring"),))])["input_ids"].shape[1]
    assert fresh.fingerprint != fingerprint
    with pytest.warns(UserWarning, match=r"^2 texts were cut at the end, to max_seq_length = \d+ tokens") as told:
        one, short, both = fresh.encode([long + "one", "a ring", {"text": long, "image": picture}], batch_size=1)
    assert len(told) == 1 and close(short, whole[0])
    with pytest.warns(UserWarning, match="^1 text was cut"):
        assert close(fresh.encode(long + "two"), one)
    with pytest.warns(UserWarning, match="^2 texts were cut"):
        assert np.abs(fresh.encode_turns([picture], [long, "a", long + "two"])[::2] - both).max() < 1e-5
    with pytest.raises(muco.DataError, match=r"encode_turns turn 1: \d+ tokens"):
        fresh.encode_turns(picture, [long, "a"], mode="compounded")
    fresh.max_seq_length = None
    assert fresh.max_seq_length == context and fresh.fingerprint == fingerprint
    for wrong in (0, 3, True, 8.5, context + 1):
        with pytest.raises(muco.MucoError, match=r"from \d+ \(the prompt has \d+\) to the model's context"):
            fresh.max_seq_length = wrong


def test_encode_says_what_it_takes():
    qwen, expected = model("qwen2_vl"), model("qwen2_vl").encode(["a", "b"])
    column = pandas.DataFrame({"text": ["a", "b"]}).text
    for inputs in (column, (text for text in "ab"), ("a", "b"), np.array(["a", "b"]), {"a": 1, "b": 2}.keys()):
        assert close(qwen.encode(inputs), expected)
    for inputs, said in (
        ([("a", "b")], "input 0 is of type tuple, of texts; for each vector pass a text, an image"),
        (["a", ["a.png"]], "input 1 is of type list, of texts"),
        (["a", float("nan")], "input 1 is of type float; for each vector"),
        (3, "input 0 is of type int"),
        (column.to_frame(), "not a DataFrame; pass one column"),
        (np.zeros((8, 8, 3)), "not a ndarray.*pixels as a Pillow image"),
        ({"a", "b"}, "not a set.*in an order"),
    ):
        with pytest.raises(muco.DataError, match=said):
            qwen.encode(inputs)
    with pytest.raises(muco.DataError, match="encode_turns is of type tuple, of texts"):
        qwen.encode_turns(image(90, 60), [("a", "b")])


@pytest.mark.parametrize("dimension", [0, -1, 65, 8.0, True])
def test_a_length_that_vectors_cannot_have_is_refused(dimension):
    qwen = load(checkpoint("qwen2_vl"))
    with pytest.raises(muco.MucoError, match="cannot be shortened to"):
        qwen.encode(["a"], truncate_dim=dimension)
    qwen.truncate_dim = dimension
    for encode in (lambda: qwen.encode([]), lambda: qwen.encode_turns(None, ["a"])):
        with pytest.raises(muco.MucoError, match="cannot be shortened to"):
            encode()
    assert qwen.encode([], truncate_dim=np.int64(8)).shape == (0, 8)


@every_family
def test_the_prompt_outlives_a_library_that_does_not_know_our_file(family, tmp_path):
    """The stock library saves a model again without ``muco.json``; the chat template brings the settings along."""
    backbone, processor = load_backbone(checkpoint(family), local_files_only=True)
    processor.template = replace(
        processor.template, newline_at_end=True, image_end=" {#- '#' -#} \n", next_turn="{% %}"
    )
    changed = from_backbone(backbone, processor, device="cpu")
    changed.save(str(tmp_path / "saved"))
    (tmp_path / "saved" / SETTINGS_FILE).unlink()
    saved = load(tmp_path / "saved")
    assert saved.encoder.muco_processor.template == processor.template
    assert saved.fingerprint == changed.fingerprint
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a\n\nring"}]}]
    plain = processor.tokenizer.apply_chat_template(chat, chat_template=processor.template.jinja(), tokenize=False)
    assert saved.tokenizer.apply_chat_template(chat, tokenize=False) == plain


@every_family
def test_the_pixel_budget_is_saved(family, tmp_path):
    fresh = load(checkpoint(family))
    fresh.encoder.muco_processor.set_pixels(None, 32 * 32)
    fresh.save(str(tmp_path / "saved"))
    picture = image(112, 80)
    smaller = fresh.encode(picture)
    assert close(load(tmp_path / "saved").encode(picture), smaller)
    assert np.abs(smaller - model(family).encode(picture)).max() > 1e-3
    assert fresh.fingerprint != model(family).fingerprint


def test_the_fingerprint_knows_prompt_and_weights():
    fresh = load(checkpoint("qwen2_vl"))
    with torch.no_grad():
        fresh.encoder.model.visual.merger.mlp[0].bias[0] += 1e-3
    assert fresh.fingerprint != model("qwen2_vl").fingerprint
    backbone, processor = load_backbone(checkpoint("qwen2_vl"))
    processor.template = replace(QWEN_VL, newline_at_end=True)
    assert from_backbone(backbone, processor, device="cpu").fingerprint != model("qwen2_vl").fingerprint


@every_family
def test_half_precision_is_close(family):
    half = load(checkpoint(family), dtype="bfloat16").encode(inputs())
    assert half.dtype == np.float32
    assert (half * model(family).encode(inputs())).sum(axis=1).min() > 0.99


@every_family
def test_an_untied_head_is_dropped(family, tmp_path):
    folder = build(family, tmp_path / "untied", tied=False)
    assert "lm_head.weight" in load_file(folder / "model.safetensors")
    untied = load(folder)
    untied.save(str(tmp_path / "saved"))
    assert "lm_head.weight" not in load_file(tmp_path / "saved" / "model.safetensors")
    assert close(load(tmp_path / "saved").encode(inputs()), untied.encode(inputs()))
    change(folder, lambda weights: weights.pop("lm_head.weight"))
    assert close(load(folder).encode(inputs()), untied.encode(inputs()))


# The layout of transformers 4.52, in which the paper's checkpoints were saved


def save_as_4_52(source: Path, folder: Path) -> Path:
    """The source's weights and files under the names, and with the nested configs, that transformers 4.52 wrote."""
    from transformers import AutoModelForImageTextToText

    shutil.copytree(source, folder)
    wrapper = AutoModelForImageTextToText.from_pretrained(source)
    weights = {name: weight.clone() for name, weight in wrapper.state_dict().items()}
    assert {name.split(".")[1] for name in weights if name != "lm_head.weight"} == {"visual", "language_model"}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text = config["text_config"] | {"model_type": "qwen2_vl", "rope_theta": 10000.0}
    rope = text.pop("rope_parameters")
    text["rope_scaling"] = {"mrope_section": rope["mrope_section"], "rope_type": "default", "type": "default"}
    flat = {key: text[key] for key in ("hidden_size", "num_hidden_layers", "rope_scaling", "rope_theta", "vocab_size")}
    config |= flat | {"text_config": text, "vision_config": config["vision_config"] | {"model_type": "qwen2_vl"}}
    config |= {"transformers_version": "4.52.3", "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_a_4_52_checkpoint_gives_the_true_vectors(tmp_path):
    old = load(save_as_4_52(checkpoint("qwen2_vl"), tmp_path / "old"))
    assert close(old.encode(inputs()), model("qwen2_vl").encode(inputs()))


def test_automodel_would_have_lost_the_vision_tower(tmp_path):
    """Why loading goes through the image-text-to-text class; if this fails, the library has mended it."""
    from transformers import AutoModel

    lost = AutoModel.from_pretrained(save_as_4_52(checkpoint("qwen2_vl"), tmp_path / "old")).state_dict()
    true = model("qwen2_vl").encoder.model.state_dict()
    assert not torch.equal(lost["visual.patch_embed.proj.weight"], true["visual.patch_embed.proj.weight"])


@pytest.mark.parametrize("old", [True, False])
def test_a_released_checkpoint_gets_its_newline_rule_and_pixels(tmp_path, old):
    folder = build("qwen2_vl", tmp_path / "released", tokens=SPECIAL_TOKENS)
    folder = save_as_4_52(folder, tmp_path / "old") if old else folder
    released = load(folder)
    processor = released.encoder.muco_processor
    assert processor.template == replace(QWEN_VL, newline_at_end=True)
    assert dict(processor.image_processor.size) == dict(
        zip(("shortest_edge", "longest_edge"), EVALUATION_PIXELS, strict=True)
    )
    assert len(processor.encode_image(image(60, 60)).ids) == 256
    assert close(released.encode("a\n\n\nring\n"), released.encode("a\nring"))
    released.save(str(tmp_path / "saved"))
    saved = load(tmp_path / "saved")
    assert saved.encoder.muco_processor.template == processor.template
    assert close(saved.encode(inputs()[:2]), released.encode(inputs()[:2]))


def test_a_plain_checkpoint_has_neither():
    processor = model("qwen2_vl").encoder.muco_processor
    assert processor.template == QWEN_VL
    assert dict(processor.image_processor.size) == {"shortest_edge": 28 * 28, "longest_edge": 112 * 112}


CHAT = """\
{%- for message in messages -%}{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- else -%}{{- part['text'] -}}{%- endif -%}
{%- endfor -%}{{- '<|im_end|>\\n' -}}{%- endfor -%}"""


def test_a_model_that_was_not_trained_for_vectors_is_told_where_it_is_taken_for_one(copied, tmp_path, caplog):
    text = model("qwen2_vl").encode("a ring")
    plain, library = copied(), copied("qwen3_vl")
    (library / "modules.json").write_text(json.dumps([POOLING]), encoding="utf-8")
    (library / "1_Pooling").mkdir()
    (library / "1_Pooling" / "config.json").write_text('{"pooling_mode_lasttoken": true}', encoding="utf-8")
    (library / "chat_template.jinja").write_text(CHAT, encoding="utf-8")
    model("qwen2_vl").save(str(tmp_path / "ours"))
    released = build("qwen2_vl", tmp_path / "released", tokens=SPECIAL_TOKENS)
    caplog.clear()
    for trained in (library, tmp_path / "ours", released):
        assert load(trained).caveat == ""
    load_backbone(plain)  # as training does
    assert not caplog.text
    loaded = load(plain)
    assert close(loaded.encode("a ring"), text)
    assert f"{plain}: the model was not trained for vectors" in caplog.text and loaded.caveat in caplog.text


# What is refused


@every_family
@pytest.mark.parametrize("part", ["vision", "language"])
def test_a_missing_weight_is_named(copied, family, part):
    folder = copied(family)
    name = weight_of(folder, part)
    change(folder, lambda weights: weights.pop(name))
    refused(folder, "lacks weights", name.removeprefix("model."))


@every_family
def test_an_unexpected_weight_is_named(copied, family):
    folder = copied(family)
    name = weight_of(folder, "vision").replace("layers.0", "layers.9").replace("blocks.0", "blocks.9")
    change(folder, lambda weights: weights.update({name: torch.zeros(2)}))
    refused(folder, "has unexpected weights", name.removeprefix("model."))


@every_family
@pytest.mark.parametrize("part", ["vision", "language"])
def test_a_weight_of_another_shape_is_named(copied, family, part):
    folder = copied(family)
    name = weight_of(folder, part)
    change(folder, lambda weights: weights.update({name: torch.zeros(2, 3)}))
    refused(folder, "has wrongly shaped weights", name.removeprefix("model."), "(2, 3) instead of (")


def test_many_missing_weights_are_counted(copied):
    folder = copied("qwen2_vl")
    change(folder, lambda weights: [weights.pop(name) for name in list(weights) if "visual" in name])
    refused(folder, "lacks weights: model.visual.blocks.0.attn.proj.bias, ", "more; the checkpoint is incomplete")


def weight_of(folder: Path, part: str) -> str:
    names = load_file(folder / "model.safetensors")
    found = [
        name
        for name in names
        if name.endswith(".weight") and ("visual" in name or "vision" in name) == (part == "vision")
    ]
    return next(name for name in found if ".0." in name and "norm" not in name)


def refused(folder: Path | str, *parts: str) -> None:
    with pytest.raises(CheckpointError) as error:
        load(folder)  # type: ignore[arg-type]
    assert all(part in str(error.value) for part in parts), str(error.value)
    assert "\n" not in str(error.value), "one sentence"


def test_pickled_weights_are_not_read(copied):
    folder = copied("qwen2_vl")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    refused(folder, "cannot load a model from", "model.safetensors")


@every_family
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "preprocessor_config.json", "model.safetensors"])
def test_a_missing_or_broken_file_is_a_sentence(copied, family, name):
    folder = copied(family)
    data = (folder / name).read_bytes()
    (folder / name).unlink()
    refused(folder, str(folder))
    for broken in (b"{nonsense", data[: len(data) // 2]):
        (folder / name).write_bytes(broken)
        refused(folder, str(folder))


def test_what_is_no_model_is_a_sentence(tmp_path):
    refused(tmp_path / "nowhere", "nowhere", "no such folder")
    refused("nobody/nothing", "'nobody/nothing'", "no such folder, and from the hub")
    refused(tmp_path, str(tmp_path))
    (tmp_path / "file.txt").write_text("hello", encoding="utf-8")
    refused(tmp_path / "file.txt", "file.txt")


def test_a_text_only_model_is_a_sentence(tmp_path):
    from transformers import BertConfig, BertModel, Qwen2Config, Qwen2ForCausalLM

    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "vocab_size": 9,
    }
    Qwen2ForCausalLM(Qwen2Config(**sizes, num_key_value_heads=1)).save_pretrained(tmp_path / "qwen2")
    refused(tmp_path / "qwen2", "is a qwen2 model; MuCo needs one that reads images and text")
    BertModel(BertConfig(**sizes)).save_pretrained(tmp_path / "bert")
    refused(tmp_path / "bert", "is a bert model")


POOLING = {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}


@pytest.mark.parametrize(
    ("modules", "pooling", "said"),
    [
        ([POOLING], {"pooling_mode_mean_tokens": True}, "its vectors are not the states of the last token"),
        ([POOLING | {"path": "../elsewhere"}], {}, r"modules.json: \.\./elsewhere is not a folder of the model"),
        ([POOLING, {"type": "sentence_transformers.models.Dense", "path": "2_Dense"}], {}, "pass through Dense"),
    ],
)
def test_embedding_models_that_read_another_vector_are_refused(copied, modules, pooling, said):
    folder = copied("qwen3_vl")
    (folder / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling), encoding="utf-8")
    with pytest.raises(CheckpointError, match=said):
        load(folder)


def test_other_rotary_positions_are_refused(monkeypatch):
    """A model that counts them in another way would get vectors that are quietly wrong."""
    kind = type(model("qwen2_vl").encoder.model)
    own = kind.get_rope_index
    monkeypatch.setattr(
        kind, "get_rope_index", lambda *a, **k: (own(*a, **k)[0] * torch.tensor([[[1]], [[1]], [[2]]]), 0)
    )
    refused(checkpoint("qwen2_vl"), "is a qwen2_vl model, whose multimodal rotary positions MuCo does not know")


@every_family
def test_a_tokenizer_of_another_model_is_refused(copied, family):
    folder = copied(family)
    other = build(family, folder.parent / "other", tokens=("<|another|>",))
    tokenizer = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    for token in tokenizer["added_tokens"]:
        token["id"] += 1  # as if one more token had been learnt
    tokenizer["model"]["vocab"]["one more"] = len(tokenizer["model"]["vocab"])
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    refused(folder, "the tokenizer is not this model's or lacks a file")


def test_a_tokenizer_that_cannot_be_cut_is_refused(copied):
    """One that marks the first word of whatever it is given would mark the first word of every part of a prompt."""
    folder = copied("idefics3")
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["pre_tokenizer"] = {"type": "Metaspace", "replacement": "_", "prepend_scheme": "first", "split": True}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    refused(folder, "reads a prompt in parts differently than as a whole")


def test_fewer_embeddings_than_tokens_are_refused(tmp_path):
    folder = build("qwen2_vl", tmp_path / "released", tokens=(EMB,))
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    last = tokenizer["added_tokens"][-1]
    tokenizer["added_tokens"].append(last | {"id": last["id"] + 1, "content": MASK})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    refused(folder, f"has {last['id'] + 2} tokens and the model embeds only {last['id'] + 1}")


@pytest.mark.parametrize("text", ["{nonsense", "[]", "{}", '{"format": 1}', '{"format": 2, "template": {}}'])
def test_settings_of_another_version_are_refused(copied, text):
    folder = copied("qwen2_vl")
    (folder / SETTINGS_FILE).write_text(text, encoding="utf-8")
    refused(folder, SETTINGS_FILE)


# Adapters

ADAPTED = ("qwen2_vl", "idefics3")
adapted_families = pytest.mark.parametrize("family", ADAPTED)
kinds = pytest.mark.parametrize("kind", ["lora", "dora"])


def adapted(family: str, kind: Any) -> Model:
    backbone, processor = load_backbone(checkpoint(family), local_files_only=True)
    tokens = processor.tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    return from_backbone(add_adapters(backbone, Adapter(kind, rank=4, alpha=8), tokens), processor, device="cpu")


def tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)


@adapted_families
@kinds
def test_only_adapters_and_the_two_tokens_get_gradients(family, kind):
    trained, seen = adapted(family, kind), []
    backbone = trained.encoder.model
    tower = next(module for name, module in backbone.named_modules() if name.endswith(("visual", "vision_model")))
    tower.register_forward_hook(lambda module, args, output: seen.extend(tensors(output)))
    trained.train()
    out = trained(trained.encoder.collate(ragged()))["sentence_embedding"]
    (out * torch.linspace(-1, 1, out.shape[1])).sum().backward()
    assert seen and not any(tensor.requires_grad for tensor in seen), "no autograd graph through the vision tower"
    got = {name: parameter.grad for name, parameter in backbone.named_parameters() if parameter.grad is not None}
    assert got.keys() == {name for name, parameter in backbone.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or "trainable_tokens_delta" in name for name in got)
    assert not any("visual" in name or "vision" in name or "connector" in name for name in got)
    assert sum("lora_B" in name for name in got) == len(language_linears(merge_adapters(backbone))) == 2 * 7
    assert all(grad.abs().max() > 0 for name, grad in got.items() if "lora_B" in name)
    (tokens,) = (grad for name, grad in got.items() if "trainable_tokens_delta" in name)
    assert tokens.shape == (2, trained.get_embedding_dimension())
    assert tokens[0].abs().max() > 0 and tokens[1].abs().max() == 0, "<|emb|> is in every prompt, <|mask|> in none"


@adapted_families
@kinds
def test_merged_and_saved_adapters_give_the_same_vectors(family, kind, tmp_path):
    trained = adapted(family, kind)
    assert np.abs(vectors(trained, ragged()) - vectors(model(family), ragged())).max() < 1e-5, (
        "adapters begin as nothing"
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trained.encoder.model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    changed = vectors(trained, ragged())
    assert np.abs(changed - vectors(model(family), ragged())).max() > 0.01
    trained.save(str(tmp_path / "saved"))
    assert np.abs(vectors(load(tmp_path / "saved"), ragged()) - changed).max() < 1e-5
    assert not list(tmp_path.rglob("adapter*")), "plain weights"
    assert close(vectors(trained, ragged()), changed)
    assert any("lora_" in name for name, _ in trained.encoder.model.named_parameters()), "saving keeps the adapters"
    merged = merge_adapters(trained.encoder.model)
    assert type(merged) is type(model(family).encoder.model)
    plain = from_backbone(merged, trained.encoder.muco_processor, device="cpu")
    assert np.abs(vectors(plain, ragged()) - changed).max() < 1e-5
    assert merge_adapters(merged) is merged


@adapted_families
@kinds
def test_adapters_are_merged_in_float32_and_rounded_once(family, kind):
    """Changes of a tenth of the last bit of a bfloat16 weight: none is lost in float32, and none is rounded twice."""
    half, processor = load_backbone(checkpoint(family), dtype="bfloat16", local_files_only=True)
    plain = copy.deepcopy(half).float()
    half, exact = (add_adapters(b, Adapter(kind, rank=4, alpha=8), [processor.read_id]) for b in (half, plain))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter, same in zip(half.parameters(), exact.parameters(), strict=True):
            if parameter.requires_grad:
                parameter += 0.003 * torch.randn(parameter.shape, generator=generator)
                same.copy_(parameter)
    kept, rounded = (merge_adapters(copy.deepcopy(half), dtype) for dtype in (torch.float32, None))
    expected = merge_adapters(exact)
    weights, start = dict(kept.named_parameters()), dict(load(checkpoint(family)).encoder.model.named_parameters())
    for name, weight in expected.named_parameters():
        assert torch.equal(weights[name], weight), name
        assert torch.equal(rounded.get_parameter(name), weight.bfloat16()), name
    changed = [name for name in weights if not torch.equal(weights[name], start[name].bfloat16().float())]
    assert len(changed) == 2 * 7 + 1, "linear layers of the language model and its embeddings"


@every_family
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_vectors_of_half_precision_are_float32_of_length_1_wherever_they_leave(family, dtype):
    half = load(checkpoint(family), dtype=dtype)
    assert half.encoder.model.dtype == getattr(torch, dtype)
    pictures, queries = [image(90, 60, 1), None], [["", "a", "what is it?"], ["b"]]
    found = {
        "encode": half.encode(inputs() * 3),
        "tensors": half.encode(inputs(), convert_to_tensor=True).numpy(),
        "shorter": half.encode(inputs(), truncate_dim=8),
        "batch": half.embed(half.encoder.collate(ragged())).detach().numpy(),
        "isolated": np.concatenate(half.encode_turns_batch(pictures, queries)),
        "compounded": half.encode_turns(*pictures[:1], queries[0], mode="compounded"),
    }
    for name, some in found.items():
        assert some.dtype == np.float32, name
        assert np.abs(np.linalg.norm(some.astype(np.float64), axis=1) - 1).max() < 1e-6, name


@every_family
def test_frozen_weights_in_half_precision_and_trained_ones_in_float32_compute_together(family):
    mixed = load(checkpoint(family), dtype="bfloat16")
    freeze_vision(mixed.encoder.model)
    hold_trained_in_float32(mixed.encoder.model)
    held = {parameter.requires_grad: parameter.dtype for parameter in mixed.encoder.model.parameters()}
    assert held == {True: torch.float32, False: torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16):
        found = vectors(mixed, ragged())
    assert found.dtype == np.float32 and ((found * vectors(model(family), ragged())).sum(axis=1) > 0.99).all()


@every_family
def test_the_vision_tower_is_frozen_and_nothing_else(family):
    backbone, _ = load_backbone(checkpoint(family), local_files_only=True)
    freeze_vision(backbone)
    frozen = {name for name, parameter in backbone.named_parameters() if not parameter.requires_grad}
    beside = ("visual.", "vision_model.", "connector.")
    assert frozen == {name for name, _ in backbone.named_parameters() if name.startswith(beside)} != set()


@every_family
def test_a_connector_is_trained_or_frozen_by_itself(family):
    backbone, _ = load_backbone(checkpoint(family), local_files_only=True)
    freeze_vision(backbone, connector=False)
    trained = {n for n, p in backbone.named_parameters() if p.requires_grad and not n.startswith(("language", "text"))}
    bridge = {"idefics3": ("connector.",), "qwen3_vl": ("visual.merger.", "visual.deepstack_merger_list.")}
    assert trained and all(name.startswith(bridge.get(family, ("visual.merger.",))) for name in trained)
    backbone.requires_grad_(True)
    freeze_vision(backbone, vision=False)
    assert {n for n, p in backbone.named_parameters() if not p.requires_grad} == trained


@every_family
def test_language_linears_leave_vision_and_connector_alone(family):
    names = language_linears(model(family).encoder.model)
    assert len(names) == 2 * 7 and all(
        ".layers." in name and name.startswith(("language_model", "text_model")) for name in names
    )


def test_a_language_model_that_would_add_the_mask_is_refused(monkeypatch):
    monkeypatch.setattr("muco.backbone.AutoModelForImageTextToText", Eager)
    with pytest.raises(CheckpointError, match="computes attention as 'eager'; MuCo needs sdpa"):
        load(checkpoint("qwen2_vl"))


class Eager:
    """As a library that takes no notice of what attention is asked for."""

    @staticmethod
    def from_pretrained(path: str, attn_implementation: Any, **options: Any) -> Any:
        return AutoModelForImageTextToText.from_pretrained(path, attn_implementation="eager", **options)


def test_the_folder_of_a_run_is_not_its_model_and_a_name_that_is_nearly_the_starters_is_told(tmp_path):
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"run is the folder of a run; its model is .*run/model$"):
        muco.load(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"startr: no such folder; did you mean 'starter'\?"):
        muco.load("startr")
