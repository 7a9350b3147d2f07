"""A batch knows where its turns and images stand, who may attend to whom, and how to cut itself."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from families import QWEN, alone, image, model, ragged, vectors
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_mask

from muco.backbone import use_flex_attention
from muco.batch import (
    OWNERS,
    DialogueBatch,
    _below_one_another,
    chunks_of,
    collate,
    join,
    split,
    to,
)
from muco.dialogue import Content, Dialogue
from muco.errors import DataError, ImageError
from muco.layout import rotary_positions
from muco.masks import attention_bias, masks_of, tree_mask
from muco.processor import Grid

BOTH_KINDS = ("qwen2_vl", "idefics3")  # flattened patches with a grid; tiles with a mask
SIDES = ("right", "left")
quick = settings(max_examples=100, deadline=None)
both_kinds = pytest.mark.parametrize("family", BOTH_KINDS)
both_sides = pytest.mark.parametrize("side", SIDES)


def batch_of(family: str, dialogues: list[Dialogue], side: str = "right") -> DialogueBatch:
    return collate(dialogues, model(family).encoder.muco_processor, padding_side=side)


def mixed() -> list[Dialogue]:
    """Trees and lines, rows with several images, one and none."""
    return [*ragged()[:5], *ragged(isolated=False)[:3], *ragged()[5:]]


def tensors_of(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for part in parts for tensor in tensors_of(part)]


def same(batch: Any, other: Any) -> bool:
    pairs = zip(tensors_of(batch), tensors_of(other), strict=True)
    return batch.keys() == other.keys() and all(torch.equal(one, another) for one, another in pairs)


def embed(family: str, batch: DialogueBatch) -> np.ndarray:
    with torch.inference_mode():
        return model(family)(dict(batch))["sentence_embedding"].numpy()


# What stands where


@both_kinds
@both_sides
def test_every_turn_is_read_at_its_own_emb(family, side):
    dialogues = mixed()
    batch, processor = batch_of(family, dialogues, side), model(family).encoder.muco_processor
    assert batch["turn_rows"].tolist() == [b for b, d in enumerate(dialogues) for _ in d.turns]
    assert (batch["input_ids"][batch["turn_rows"], batch["turn_columns"]] == processor.read_id).all()
    assert len(set(zip(batch["turn_rows"].tolist(), batch["turn_columns"].tolist(), strict=True))) == len(
        batch["turn_rows"]
    )
    assert (batch["input_ids"] == processor.read_id).sum() == len(batch["turn_rows"])


@both_kinds
def test_images_stand_in_the_order_of_their_placeholders(family):
    dialogues, processor = mixed(), model(family).encoder.muco_processor
    batch = batch_of(family, dialogues)
    assert batch["image_rows"].tolist() == [b for b, d in enumerate(dialogues) for _ in d.images]
    encoded = [processor.encode_image(picture) for d in dialogues for picture in d.images]
    assert batch["image_tokens"].tolist() == [e.tokens for e in encoded]
    for found, one in zip(batch["images"], encoded, strict=True):
        assert found.keys() == one.tensors.keys()
        assert all(torch.equal(found[name], one.tensors[name]) for name in found)
    storages = {name: {image[name].untyped_storage().data_ptr() for image in batch["images"]} for name in found}
    assert all(len(own) == 1 for own in storages.values()), "a process hands over a file per storage"


@both_kinds
def test_text_only_batches_have_no_image_tensors(family):
    batch = batch_of(family, [Dialogue((), (Content("a"),)), Dialogue((), (Content("b c d"),))])
    assert set(batch) == {"input_ids", "attention_mask", "position_ids", "turn_rows", "turn_columns"}


@both_kinds
@pytest.mark.parametrize("isolated", [True, False])
def test_a_turn_reads_as_many_tokens_as_the_context_has_and_no_more(family, isolated):
    """Isolated turns read what they share and themselves, others all before; padding and other rows do not count."""
    (dialogue,) = (replace(d, where="rows.jsonl:7") for d in ragged(isolated=isolated)[:1])
    processor = copy.copy(model(family).encoder.muco_processor)
    batch = collate(alone([dialogue]) if isolated else [dialogue], processor)
    lengths = batch["attention_mask"].sum(dim=1) if isolated else batch["turn_columns"] + 1
    longest, turn = int(lengths.max()), int(lengths.argmax()) + 1
    processor.max_tokens = longest
    whole = collate([*ragged()[4:5], dialogue], processor)
    assert torch.equal(whole["input_ids"], batch_of(family, [*ragged()[4:5], dialogue])["input_ids"])
    processor.max_tokens = longest - 1
    said = rf"^rows\.jsonl:7 turn {turn}: {longest} tokens .* reads at most {longest - 1}; shorten the text"
    with pytest.raises(DataError, match=said):
        collate([*ragged()[4:5], dialogue], processor)
    with pytest.raises(DataError, match=said):
        collate([dialogue], model(family).encoder.muco_processor, max_tokens=longest - 1)


@both_kinds
@both_sides
def test_texts_are_cut_turn_by_turn_and_images_and_endings_never(family, side):
    processor = model(family).encoder.muco_processor
    dialogue = replace(ragged()[0], turns=(*ragged()[0].turns, Content("one two three four five six seven eight")))
    bare = collate([replace(dialogue, turns=(Content(""),))], processor)["input_ids"].shape[1]
    settings = {"truncate": "END", "max_tokens": bare + 4, "padding_side": side}
    tree, singles = (collate(dialogues, processor, **settings) for dialogues in ([dialogue], alone([dialogue])))
    assert tree["cut_turns"].tolist() == singles["cut_turns"].tolist() != []
    assert int(singles["attention_mask"].sum(dim=1).max()) == bare + 4
    assert (tree["input_ids"][tree["turn_rows"], tree["turn_columns"]] == processor.read_id).all()
    whole = collate([dialogue], processor)
    assert torch.equal(tree["image_tokens"], whole["image_tokens"])
    assert np.abs(embed(family, tree) - embed(family, singles)).max() < 1e-5
    assert "cut_turns" not in collate([dialogue], processor, truncate="END")
    with pytest.raises(DataError, match=r"turn 1: \d+ tokens"):
        collate([dialogue], processor, truncate="END", max_tokens=bare - 1)
    with pytest.raises(DataError, match=r"turn \d: \d+ tokens"):  # where a turn sees others, which text to cut is open
        collate([replace(dialogue, isolated=False)], processor, **settings)


@both_kinds
def test_branches_start_where_the_trunk_ends(family):
    batch = batch_of(family, ragged()[:1])
    positions, branches = batch["position_ids"][:, 0], batch["branch_ids"][0]
    assert branches.unique().tolist() == [0, 1, 2, 3, 4, 5]
    after = positions[:, branches == 0].max() + 1
    for number in range(1, 6):
        own = positions[:, branches == number]
        assert torch.equal(own, (after + torch.arange(own.shape[1])).expand_as(own))


@both_kinds
def test_isolated_turns_can_run_on(family):
    usual, other = (batch_of(family, [replace(d, positions=p) for d in ragged()[:2]]) for p in (None, "run_on"))
    assert same(usual | {"position_ids": other["position_ids"]}, other)
    positions, branches = other["position_ids"][:, 0], other["branch_ids"][0]
    after = positions[:, branches == 0].max() + 1
    own = positions[:, branches > 0]
    assert torch.equal(own, (after + torch.arange(own.shape[1])).expand_as(own))


@both_kinds
def test_compounded_turns_can_restart_where_isolated_ones_do(family):
    (dialogue,) = ragged(isolated=False)[1:2]
    usual, other = (batch_of(family, [replace(dialogue, positions=p)]) for p in (None, "restart"))
    assert same(usual | {"position_ids": other["position_ids"]}, other)
    tree = batch_of(family, ragged()[1:2])
    after = int(tree["position_ids"][:, 0][:, tree["branch_ids"][0] == 0].max()) + 1
    ends = (other["turn_columns"] + 1).tolist()
    assert torch.equal(other["position_ids"][..., : ends[0]], usual["position_ids"][..., : ends[0]])
    for begin, end in itertools.pairwise(ends):
        own = other["position_ids"][:, 0, begin:end]
        assert torch.equal(own, (after + torch.arange(end - begin)).expand_as(own))


@both_kinds
def test_compounded_turns_that_restart_still_see_the_turns_before(family):
    """A library might take positions that begin anew for another sequence packed into the row."""
    dialogues = [
        Dialogue((), tuple(map(Content, turns)), False, positions="restart") for turns in (("a", "c"), ("b", "c"))
    ]
    first, second = embed(family, batch_of(family, dialogues)).reshape(2, 2, -1)
    assert np.abs(first[1] - second[1]).max() > 1e-3


@both_kinds
@both_sides
def test_padding_is_masked_and_the_rows_are_those_of_one_by_one(family, side):
    dialogues = mixed()
    batch, processor = batch_of(family, dialogues, side), model(family).encoder.muco_processor
    assert (batch["input_ids"][batch["attention_mask"] == 0] == processor.pad_id).all()
    for row, dialogue in enumerate(dialogues):
        single, real = batch_of(family, [dialogue]), batch["attention_mask"][row].bool()
        assert torch.equal(batch["input_ids"][row, real], single["input_ids"][0])
        assert torch.equal(batch["position_ids"][:, row, real], single["position_ids"][:, 0])
        padding = slice(int(real.sum()), None) if side == "right" else slice(0, len(real) - int(real.sum()))
        assert not real[padding].any()


def test_a_broken_image_is_named_by_its_row():
    dialogues = [Dialogue((), (Content("a"),)), Dialogue((), (Content("", (b"no image",)),), where="rows.jsonl:2")]
    with pytest.raises(ImageError, match="rows.jsonl:2: image bytes"):
        batch_of("qwen2_vl", dialogues)


def test_tiles_of_different_sizes_are_padded_with_zeros():
    tall, wide = torch.rand(1, 3, 6, 2) + 1, torch.rand(2, 3, 4, 5) + 1
    stacked = _below_one_another([tall, wide])
    assert stacked.shape == (3, 3, 6, 5)
    assert torch.equal(stacked[:1, :, :6, :2], tall) and torch.equal(stacked[1:, :, :4, :5], wide)
    assert stacked.count_nonzero() == tall.numel() + wide.numel()


# Positions

grids = st.tuples(st.just(1), st.integers(1, 5), st.integers(1, 5))


@pytest.mark.parametrize("family", QWEN)
@quick
@given(st.lists(st.tuples(grids, st.integers(1, 4)), min_size=1, max_size=4), st.integers(0, 5), st.integers(0, 1000))
def test_rotary_positions_are_the_models_own(family, pictures, opening, start):
    backbone = model(family).encoder.model
    segments: list[int | Grid] = [opening]
    kinds = [0] * opening
    for grid, text in pictures:
        segments += [Grid(*grid), text]
        kinds += [1] * (grid[1] * grid[2]) + [0] * text
    expected, _ = backbone.get_rope_index(
        torch.zeros(1, len(kinds), dtype=torch.long),
        mm_token_type_ids=torch.tensor([kinds]),
        image_grid_thw=torch.tensor([(time, 2 * height, 2 * width) for (time, height, width), _ in pictures]),
    )
    assert torch.equal(torch.from_numpy(rotary_positions(segments)), expected[:, 0])
    assert np.array_equal(rotary_positions(segments, start), rotary_positions(segments) + start)


# Who attends to whom


def slow_mask(batch: DialogueBatch) -> torch.Tensor:
    rows, length = batch["branch_ids"].shape
    allowed = torch.zeros(rows, 1, length, length, dtype=torch.bool)
    for row in range(rows):
        branch, real = batch["branch_ids"][row].tolist(), batch["attention_mask"][row].tolist()
        for query in range(length):
            for key in range(query):
                sees = branch[key] == 0 or branch[key] == branch[query]
                allowed[row, 0, query, key] = bool(real[key]) and sees
            allowed[row, 0, query, query] = True
    return allowed


@st.composite
def trees(draw: st.DrawFn) -> DialogueBatch:
    """Rows of a trunk and branches of any lengths, padded on either side."""
    rows = draw(st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=5), min_size=1, max_size=3))
    left = draw(st.booleans())
    branches = [[number for number, length in enumerate(row) for _ in range(length)] or [0] for row in rows]
    longest = max(map(len, branches)) + draw(st.integers(0, 2))
    padded = [([0] * (longest - len(row)), row) for row in branches]
    ids = [pad + row if left else row + pad for pad, row in padded]
    real = [pad + [1] * len(row) if left else [1] * len(row) + pad for pad, row in padded]
    return {"branch_ids": torch.tensor(ids), "attention_mask": torch.tensor(real)}  # type: ignore[typeddict-item]


@quick
@given(trees())
def test_the_tree_mask_is_the_slow_definition(batch):
    assert torch.equal(tree_mask(batch), slow_mask(batch))


@both_kinds
@both_sides
def test_the_tree_mask_of_real_dialogues(family, side):
    batch = batch_of(family, mixed(), side)
    mask = tree_mask(batch)
    assert torch.equal(mask, slow_mask(batch))
    assert mask.any(dim=-1).all(), "a row of the softmax would be empty"


@both_kinds
def test_lines_need_no_tree_mask(family):
    lines = [*ragged(isolated=False), Dialogue((), (Content("one isolated turn"),))]
    assert tree_mask(batch_of(family, lines)) is None


# Cutting a batch


def rows_in_order(batch: DialogueBatch, budget: int) -> list[int]:
    """The slow, obvious rule: nothing is moved if all fits; else longest first, equal ones as they stood."""
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    if len(lengths) * max(lengths) <= budget:
        return list(range(len(lengths)))
    return sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))


@both_kinds
@both_sides
def test_chunks_cover_the_rows_within_the_budget(family, side):
    batch = batch_of(family, mixed(), side)
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    budgets = (1, min(lengths), max(lengths), 2 * max(lengths), sum(lengths) // 2, 10**6)
    for budget in budgets:
        left = rows_in_order(batch, budget)
        for chunk, turns in split(batch, budget):
            rows, width = chunk["input_ids"].shape
            own, left = left[:rows], left[rows:]
            assert rows == 1 or rows * width <= budget
            assert width == max(lengths[row] for row in own), "cut to the longest row"
            real, before = chunk["attention_mask"].bool(), batch["attention_mask"][own].bool()
            assert torch.equal(chunk["input_ids"][real], batch["input_ids"][own][before])
            assert [own[row] for row in chunk["turn_rows"]] == batch["turn_rows"][turns].tolist()
        assert not left
    assert len(split(batch, 1)) == len(lengths) and len(split(batch, 10**6)) == 1
    assert len({len(split(batch, budget)) for budget in budgets}) > 3, "budgets that divide, do not divide, exceed"


@both_kinds
@both_sides
def test_a_whole_batch_is_its_own_only_chunk(family, side):
    batch = batch_of(family, mixed(), side)
    ((chunk, turns),) = split(batch, 10**6)
    assert same(chunk, batch) and turns.tolist() == list(range(len(turns)))


@both_kinds
@both_sides
def test_vectors_of_chunks_are_those_of_the_batch(family, side):
    batch = batch_of(family, mixed(), side)
    expected = vectors(model(family), mixed())
    longest = batch["input_ids"].shape[1]
    for budget in (1, longest, 2 * longest + 7, 10**6):
        together = np.full_like(expected, np.nan)
        for chunk, turns in split(batch, budget):
            together[turns] = embed(family, chunk)
        assert np.abs(together - expected).max() < 1e-5


@both_kinds
@both_sides
def test_batches_below_one_another_are_the_batch_of_all(family, side):
    dialogues = mixed()
    expected = vectors(model(family), dialogues)
    for cut in (1, 2, len(dialogues) - 1):
        joined = join([batch_of(family, part, side) for part in (dialogues[:cut], dialogues[cut:])])
        assert np.abs(embed(family, joined) - expected).max() < 1e-5
        assert joined["turn_rows"].tolist() == batch_of(family, dialogues, side)["turn_rows"].tolist()


@both_kinds
def test_images_go_with_their_rows(family):
    dialogues = mixed()
    batch = batch_of(family, dialogues)
    for (chunk, _), row in zip(split(batch, 1), rows_in_order(batch, 1), strict=True):
        single = batch_of(family, [dialogues[row]])
        assert ("images" in chunk) == bool(dialogues[row].images)
        assert single.keys() <= chunk.keys()
        assert same({key: chunk[key] for key in single}, single)


@both_kinds
def test_features_computed_before_take_the_place_of_pixels(family):
    encoder, batch = model(family).encoder, batch_of(family, mixed())
    with torch.no_grad():
        features = encoder.image_features(batch)
    assert len(features) == len(batch["image_rows"]) > 1
    seen = {key: value for key, value in batch.items() if key != "images"} | {"image_features": features}
    expected = embed(family, batch)
    assert np.array_equal(embed(family, seen), expected)
    together = np.full_like(expected, np.nan)
    for chunk, turns in split(seen, 1):
        together[turns] = embed(family, chunk)
    assert np.abs(together - expected).max() < 1e-5


def test_every_tensor_of_a_batch_has_an_owner():
    assert DialogueBatch.__annotations__.keys() - {"cut_turns"} == OWNERS.keys()


@both_kinds
def test_a_batch_moves_to_a_device_with_all_that_is_in_it(family):
    encoder, batch, kept = model(family).encoder, batch_of(family, mixed()), object()
    features = [tuple(torch.zeros(1) for _ in range(2)) for _ in batch["image_rows"]]
    moved = to({**batch, "image_features": features, "past_key_values": kept}, "meta")
    assert moved["past_key_values"] is kept and len(moved["image_features"]) == len(features)
    assert {tensor.device.type for tensor in tensors_of(moved)} == {"meta"}
    assert {tensor.device for tensor in tensors_of(batch)} == {encoder.device}, "the batch itself stays where it is"


def every_cut(rows: list[int]) -> Iterator[list[list[int]]]:
    """All ways to cut a list into runs."""
    if not rows:
        yield []
    for first in range(1, len(rows) + 1):
        for rest in every_cut(rows[first:]):
            yield [rows[:first], *rest]


@quick
@given(st.lists(st.integers(1, 9), min_size=1, max_size=7), st.integers(1, 40), st.integers(0, 12), st.booleans())
def test_no_other_cut_passes_fewer_tokens(lengths, budget, price, left):
    width = max(lengths)
    mask = [[0] * (width - n) + [1] * n if left else [1] * n + [0] * (width - n) for n in lengths]
    table = torch.tensor(mask)
    batch: DialogueBatch = {
        "input_ids": table * torch.arange(1, len(lengths) + 1)[:, None],
        "attention_mask": table,
        "position_ids": table[None],
        "turn_rows": torch.arange(len(lengths)),
        "turn_columns": torch.tensor([width - 1 if left else n - 1 for n in lengths]),
    }
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("muco.batch.PASS", price)
        chunks = [chunk for chunk, _ in split(batch, budget)]
        again = [chunk.tolist() for chunk in chunks_of(torch.tensor(lengths), budget)]
    order = [[int(row.max()) - 1 for row in chunk["input_ids"]] for chunk in chunks]
    assert order == again and sorted(sum(order, [])) == list(range(len(lengths)))
    passed = [chunk["input_ids"].numel() for chunk in chunks]
    assert all(tokens <= budget or len(rows) == 1 for tokens, rows in zip(passed, order, strict=True))
    costs = [
        sum(len(run) * run[0] + price for run in cut)
        for cut in every_cut(sorted(lengths, reverse=True))
        if all(len(run) * run[0] <= budget or len(run) == 1 for run in cut)
    ]
    assert sum(passed) + price * len(chunks) == min(costs)
    for chunk in chunks:
        assert (chunk["attention_mask"][chunk["turn_rows"], chunk["turn_columns"]] == 1).all()


@pytest.mark.parametrize("budget", [0, -1])
def test_a_budget_must_be_positive(budget):
    with pytest.raises(ValueError, match="token_budget must be positive"):
        split(batch_of("qwen2_vl", [Dialogue((), (Content("a"),))]), budget)


def test_an_image_of_one_row_is_not_seen_by_another():
    first, second = Dialogue((image(84, 84, 1),), (Content("a"),)), Dialogue((image(84, 84, 2),), (Content("a"),))
    changed = Dialogue((image(84, 84, 3),), (Content("a"),))
    before, after = (vectors(model("qwen2_vl"), [first, other]) for other in (second, changed))
    assert np.abs(before[0] - after[0]).max() < 1e-5 < np.abs(before[1] - after[1]).max()


@both_kinds
@both_sides
def test_flex_attention_follows_the_same_rule_as_the_matrix(family, side):
    batch = batch_of(family, mixed(), side)
    rows, length = batch["input_ids"].shape
    encoder = model(family).encoder
    image_id = encoder.muco_processor.family.image_id
    rule = masks_of(batch, encoder.reading, image_id, torch.float32, flex=True)["full_attention"]
    dense = create_mask(rule.mask_mod, rows, 1, length, length, device="cpu")
    assert torch.equal(dense, tree_mask(batch)) and not dense.all()
    flat = {key: value for key, value in batch.items() if key != "branch_ids"}
    assert masks_of(flat, encoder.reading, image_id, torch.float32, flex=True) is None is tree_mask(flat)


@both_kinds
@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")  # torch.compile's own imports
@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile")
def test_flex_attention_gives_the_same_vectors(family):
    """On the CPU uncompiled and forward only: that is all FlexAttention can do there."""
    built, batch = copy.deepcopy(model(family)), batch_of(family, mixed())
    expected = embed(family, batch)
    use_flex_attention(built.encoder.model)
    assert built.encoder.uses_flex_attention and not model(family).encoder.uses_flex_attention
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        found = built.embed(batch).numpy()
    assert np.abs(found - expected).max() < 1e-5


@pytest.mark.parametrize("length", [1, 16, 37])
def test_a_bias_is_the_mask_and_lies_as_kernels_want_it(length):
    mask = torch.rand(2, 1, length, length) > 0.5
    mask |= torch.eye(length, dtype=torch.bool)
    bias = attention_bias(mask, torch.bfloat16)
    assert bias.shape == mask.shape and bias.dtype == torch.bfloat16
    assert torch.equal(bias == 0, mask) and torch.isneginf(bias[~mask]).all()
    assert all(stride % 16 == 0 for stride in bias.stride()[:-1]) and bias.stride()[-1] == 1
