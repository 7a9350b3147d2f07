"""Many queries about one image: what they share passes once, and every vector is the one of a call of its own."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, Passes, build, checkpoint, image, model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import muco
from muco import encoder, turns
from muco.backbone import add_adapters, load_backbone, use_flex_attention
from muco.dialogue import Content, Dialogue
from muco.errors import DataError, MucoError
from muco.model import Model, from_backbone
from muco.reading import stated_reading
from muco.sizes import Adapter
from muco.turns import sharing

TOLERANCE = 1e-5  # float32
PICTURES = [image(150, 64, 1), image(57, 130, 2), image(84, 84, 3)]
QUERIES = ["", "What is it?", " led by a space", "\n\nled by newlines", "3", "how many shapes do you see? 12, or more?"]

every_family = pytest.mark.parametrize("family", FAMILIES)


def close(got: np.ndarray, expected: np.ndarray, tolerance: float = TOLERANCE) -> bool:
    return got.shape == expected.shape and float(np.abs(got - expected).max()) < tolerance


def one_by_one(model: Model, images: Any, queries: list[Any]) -> np.ndarray:
    """The slow reference: a call of ``encode`` for every query."""

    def content(query: Any) -> dict[str, Any]:
        own = query if isinstance(query, dict) else {"text": query}
        return {"text": own["text"], "images": [*(images or []), *own.get("images", [])]}

    return np.stack([model.encode(content(query)) for query in queries])


# Equal to single calls


@every_family
@pytest.mark.parametrize("side", ["right", "left"])
def test_ragged_dialogues_are_single_calls(family, side, monkeypatch):
    encoder = model(family).encoder
    images = [PICTURES[0], None, PICTURES[1:], PICTURES[2], []]
    own = {"text": "beside it", "images": [PICTURES[2], PICTURES[0]]}
    queries = [QUERIES, ["a ring"], [*QUERIES[1:3], own, "after it"], ["one"], QUERIES[1:]]
    monkeypatch.setattr(encoder, "padding_side", side)
    with Passes(model(family)) as passes:
        got = model(family).encode_turns_batch(images, queries)
    assert passes.kept, "keys were kept and read"
    for some, pictures, asked in zip(got, images, queries, strict=True):
        listed = [pictures] if pictures in PICTURES else pictures
        assert some.dtype == np.float32 and close(some, one_by_one(model(family), listed, asked))


drawn = st.lists(
    st.tuples(
        st.lists(st.integers(0, 2), max_size=2),
        st.lists(st.text(" ab\n.7é中", max_size=40), min_size=1, max_size=7),
    ),
    min_size=1,
    max_size=4,
)


@every_family
@settings(max_examples=6, suppress_health_check=[HealthCheck.too_slow])
@given(dialogues=drawn, pack=st.integers(1, 60), budget=st.integers(1, 400), size=st.integers(1, 4))
def test_any_dialogues_cut_in_any_way_are_single_calls(family, dialogues, pack, budget, size):
    images = [[PICTURES[i] for i in numbers] for numbers, _ in dialogues]
    queries = [texts if numbers else [text or "x" for text in texts] for numbers, texts in dialogues]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(turns, "PACK", pack)
        got = model(family).encode_turns_batch(images, queries, batch_size=size, token_budget=budget)
    flat = [{"text": q, "images": i} for i, asked in zip(images, queries, strict=True) for q in asked]
    assert [len(some) for some in got] == [len(asked) for asked in queries]
    assert close(np.concatenate(got), model(family).encode(flat))


@every_family
def test_more_queries_than_pass_at_once(family):
    """A pass stays within the budget however many queries there are, and the image passes once."""
    queries = [f"question {number}: {'word ' * (number % 7)}" for number in range(150)]
    with Passes(model(family)) as passes:
        (got,) = model(family).encode_turns_batch([PICTURES[0]], [queries], token_budget=1500)
    assert passes.images == 1 and passes.kept > 2
    assert max(rows * length for rows, length in passes.tokens) <= 1500
    assert close(got, model(family).encode([{"text": query, "images": [PICTURES[0]]} for query in queries]))


@every_family
def test_a_thousand_queries_pass_in_bounded_memory(family, monkeypatch):
    queries = [f"what about {number}?" for number in range(1000)]
    masks: list[int] = []
    real = encoder.masks_of

    def noted(batch: Any, *args: Any, **kwargs: Any) -> Any:
        masks.append(batch["input_ids"].numel())
        return real(batch, *args, **kwargs)

    monkeypatch.setattr(encoder, "masks_of", noted)
    got = model(family).encode_turns(PICTURES[0], queries)
    assert got.shape == (1000, 64) and max(masks) < 16384
    some = [0, 1, 499, 998, 999]
    assert close(got[some], one_by_one(model(family), [PICTURES[0]], [queries[i] for i in some]))


@every_family
def test_the_image_passes_once_for_all_its_queries(family):
    with Passes(model(family)) as passes:
        model(family).encode_turns(PICTURES[0], QUERIES)
    trunk, *branches = passes.tokens
    assert passes.images == passes.kept == len(branches) == 1
    singles = model(family).encoder.collate([Dialogue((PICTURES[0],), (muco.Content(q),)) for q in QUERIES])
    assert trunk[1] + branches[0][1] < singles["attention_mask"].sum() / 2
    assert trunk[0] == branches[0][0] == 1, "nothing is padded"


@every_family
def test_a_single_query_is_one_plain_pass(family):
    with Passes(model(family)) as passes:
        got = model(family).encode_turns(PICTURES[0], ["what is it?"])
    assert len(passes.tokens) == 1 and not passes.kept
    assert close(got, one_by_one(model(family), [PICTURES[0]], ["what is it?"]))


@every_family
def test_the_order_of_queries_and_dialogues_does_not_matter(family):
    got = model(family).encode_turns_batch([PICTURES[0], PICTURES[1]], [QUERIES, QUERIES[:2]])
    turned = model(family).encode_turns_batch([PICTURES[1], PICTURES[0]], [QUERIES[1::-1], QUERIES[::-1]])
    assert close(turned[1][::-1], got[0]) and close(turned[0][::-1], got[1])


@every_family
def test_kept_keys_are_not_changed_by_those_who_read_them(family, monkeypatch):
    """Many passes over one trunk: the last query's vector is that of the first pass."""
    monkeypatch.setattr(turns, "PACK", 1)
    (got,) = model(family).encode_turns_batch([PICTURES[0]], [["same"] * 12], token_budget=1)
    assert np.abs(got - got[0]).max() < 1e-6


# Precision, length, adapters, mode


@every_family
def test_half_precision_is_close_and_shorter_vectors_are_unit_vectors(family):
    half = muco.load(checkpoint(family), device="cpu", local_files_only=True, dtype="bfloat16", truncate_dim=16)
    got = half.encode_turns(PICTURES[0], QUERIES)
    assert got.dtype == np.float32 and got.shape == (len(QUERIES), 16)
    assert np.allclose(np.linalg.norm(got, axis=1), 1, atol=1e-3)
    whole = model(family).encode_turns(PICTURES[0], QUERIES)[:, :16]
    whole /= np.linalg.norm(whole, axis=1, keepdims=True)
    assert (got * whole).sum(axis=1).min() > 0.98
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model(family).encode_turns(PICTURES[0], QUERIES)
    assert (mixed * model(family).encode_turns(PICTURES[0], QUERIES)).sum(axis=1).min() > 0.98


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@every_family
def test_a_model_with_adapters_in_the_middle_of_training(family):
    backbone, processor = load_backbone(checkpoint(family), local_files_only=True)
    backbone = add_adapters(backbone, Adapter(rank=4, alpha=8, dropout=0.5), [processor.read_id])
    for name, parameter in backbone.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    adapted = from_backbone(backbone, processor, device="cpu").train()
    got = adapted.encode_turns(PICTURES[0], QUERIES)
    assert close(got, one_by_one(adapted, [PICTURES[0]], QUERIES))
    assert np.abs(got - model(family).encode_turns(PICTURES[0], QUERIES)).max() > 0.01


@every_family
def test_compounded_turns_of_many_images_are_those_of_one(family):
    images, queries = [PICTURES[0], PICTURES[1], None], [QUERIES, QUERIES[:1], QUERIES[1:4]]
    got = model(family).encode_turns_batch(images, queries, mode="compounded", token_budget=200)
    for some, picture, asked in zip(got, images, queries, strict=True):
        assert close(some, model(family).encode_turns(picture, asked, mode="compounded"))
    prefix = model(family).encode_turns(PICTURES[0], QUERIES[:3], mode="compounded")
    assert close(got[0][:3], prefix) and np.abs(got[0] - model(family).encode_turns(PICTURES[0], QUERIES)).max() > 0.01


# Where keys cannot be kept


def windowed(tmp_path: Any, window: int) -> Model:
    """A Qwen2-VL whose second layer attends to the last ``window`` tokens only."""
    folder = build("qwen2_vl", tmp_path / str(window))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["text_config"] |= {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 1}
    config["text_config"]["layer_types"] = ["full_attention", "sliding_attention"]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return muco.load(folder, device="cpu", local_files_only=True)


@pytest.mark.parametrize("window", [12, 4096])
def test_a_window_of_attention_is_respected(tmp_path, window):
    narrow = windowed(tmp_path, window)
    assert sharing(narrow.encoder) == "cache"
    got = narrow.encode_turns(PICTURES[0], QUERIES)
    assert close(got, one_by_one(narrow, [PICTURES[0]], QUERIES))
    tree = narrow.encoder.collate([Dialogue((PICTURES[0],), tuple(Content(query) for query in QUERIES), True)])
    assert close(narrow.embed(tree).detach().numpy(), got), "as training passes them"
    changed = np.abs(got - model("qwen2_vl").encode_turns(PICTURES[0], QUERIES)).max() > 1e-3
    assert changed == (window == 12), "a short window changes vectors"


@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")  # torch.compile's own imports
@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")  # torch.compile's own imports
@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile")
@pytest.mark.parametrize("family", ["qwen2_vl", "idefics3"])
def test_flex_attention_takes_the_tree_in_one_pass(family):
    flex = muco.load(checkpoint(family), device="cpu", local_files_only=True)
    use_flex_attention(flex.encoder.model)
    assert sharing(flex.encoder) == "tree" and sharing(model(family).encoder) == "cache"
    with Passes(flex) as passes, torch.compiler.set_stance("force_eager"):
        got = flex.encode_turns(PICTURES[0], QUERIES)
    assert len(passes.tokens) == 1 and not passes.kept
    assert close(got, one_by_one(model(family), [PICTURES[0]], QUERIES))


CHUNKS = {"layer_types": ["full_attention", "chunked_attention"], "attention_chunk_size": 8}


@pytest.mark.parametrize(
    ("change", "reason"), [(CHUNKS, "chunked_attention"), ({"is_causal": False}, "later")], ids=str
)
def test_layers_of_another_kind_share_nothing(change, reason):
    other = muco.load(checkpoint("qwen2_vl"), device="cpu", local_files_only=True)
    config = other.encoder.model.config.get_text_config()
    for key, value in change.items():
        setattr(config, key, value)
    other.encoder.reading = stated_reading(other.encoder.model)
    assert sharing(other.encoder) == "none"
    with pytest.raises(MucoError, match=reason):
        other.embed(other.encoder.collate([Dialogue((PICTURES[0],), (Content("a"), Content("b")), True)]))


def test_a_prompt_that_shares_nothing_passes_alone(monkeypatch):
    """Without special tokens before the user's text there is no trunk where there is no image."""
    from dataclasses import replace

    bare = muco.load(checkpoint("qwen2_vl"), device="cpu", local_files_only=True)
    processor = bare.encoder.muco_processor
    processor.template = replace(processor.template, head="", shared_opening=False)
    got = bare.encode_turns_batch([None, PICTURES[0]], [QUERIES[1:], QUERIES])
    assert close(got[0], one_by_one(bare, None, QUERIES[1:]))
    assert close(got[1], one_by_one(bare, [PICTURES[0]], QUERIES))


# What is refused


def test_what_cannot_be_asked_is_refused_by_its_place():
    ask = model("qwen2_vl").encode_turns_batch
    assert ask([], []) == []
    with pytest.raises(ValueError, match="2 images but 1 lists of queries"):
        ask([None, None], [["a"]])
    for queries in ([], [""]):
        with pytest.raises(DataError, match="dialogue 1: pass at least one query, and an image where"):
            ask([PICTURES[0], None], [["a"], queries])
    with pytest.raises(DataError, match="dialogue 0: queries must be a list, not one str"):
        ask([PICTURES[0]], ["what is it?"])
    with pytest.raises(DataError, match="dialogue 1: an image must be a path, bytes or a Pillow image, not int"):
        ask([None, 5], [["a"], ["b"]])
    with pytest.raises(DataError, match="dialogue 0: queries must be a list, not one NoneType"):
        ask([PICTURES[0]], [None])
    with pytest.raises(DataError, match="encode_turns: queries must be a list, not one str"):
        model("qwen2_vl").encode_turns(PICTURES[0], "what is it?")
    with pytest.raises(DataError, match="dialogue 1 turn 2: the text contains the special token"):
        ask([None, None], [["a"], ["b", "c<|emb|>"]])
    with pytest.raises(ValueError, match="token_budget must be positive, got 0"):
        ask([PICTURES[0]], [["a", "b"]], token_budget=0)
