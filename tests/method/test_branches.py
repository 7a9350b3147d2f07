"""Isolated turns through layers that keep a state: every branch continues the state of its trunk, and only that."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import steps
import torch
from families import Passes, alone, image, model, ragged, vectors

from muco.branches import ARGUMENT, Branches, recurrent_modules, state_bytes
from muco.dialogue import Content, Dialogue, Sample, Turn
from muco.model import Model, from_backbone
from muco.turns import sharing

RECURRENT = ("qwen3_5", "qwen3_5_moe", "minicpmv4_6")  # gated delta-net; LFM2-VL's short convolution needs torchvision
TOLERANCE = 1e-5
every_recurrent = pytest.mark.parametrize("family", RECURRENT)


def dialogues(found: Model) -> list[Dialogue]:
    """Ragged ones, with at most one image where the family takes no more."""
    if found.encoder.muco_processor.several_images:
        return ragged()
    return [
        Dialogue((image(84, 84, 3),), (Content("one"), Content("two words here"), Content(""), Content(" led")), True),
        Dialogue((), (Content("A ring"), Content("beside it", (image(57, 130, 2),)), Content("a longer text")), True),
        Dialogue((image(150, 64, 1),), (Content("one turn only"),), True),
    ]


def slow_branches(ids: list[list[int]], real: list[list[bool]]) -> tuple[list[list[int]], list[list[int]], list[int]]:
    """Columns of each trunk and of each branch, and its row, by counting."""
    trunks, branches, rows = [], [], []
    for row, (own, there) in enumerate(zip(ids, real, strict=True)):
        columns = [c for c in range(len(own)) if there[c]]
        trunks.append([c for c in columns if own[c] == 0])
        for number in range(1, max((own[c] for c in columns), default=0) + 1):
            branches.append([c for c in columns if own[c] == number])
            rows.append(row)
    return trunks, branches, rows


@pytest.mark.parametrize("side", ["right", "left"])
def test_trunks_and_branches_are_where_they_are_counted(side):
    rows = [[0, 0, 1, 1, 1, 2], [0, 0, 0], [0, 1, 2, 2, 3], [1, 1, 2]]
    width = max(map(len, rows))
    ids, real = [], []
    for row in rows:
        free = [0] * (width - len(row))
        ids.append([*free, *row] if side == "left" else [*row, *free])
        real.append(
            [False] * len(free) + [True] * len(row) if side == "left" else [True] * len(row) + [False] * len(free)
        )
    found = Branches.of(torch.tensor(ids), torch.tensor(real))
    trunks, branches, own = slow_branches(ids, real)
    longest = max(map(len, trunks))
    assert found.trunks.tolist() == [[-1] * (longest - len(t)) + t for t in trunks], "padded on the left"
    longest = max(map(len, branches))
    assert found.branches.tolist() == [b + [-1] * (longest - len(b)) for b in branches], "padded on the right"
    assert found.rows.tolist() == own


@pytest.mark.parametrize(("family", "side"), [*((family, "right") for family in RECURRENT), ("qwen3_5", "left")])
def test_values_and_gradients_are_those_of_single_turns(family, side, monkeypatch):
    found = copy.deepcopy(model(family))
    found.encoder.padding_side = side
    asked = dialogues(found)
    weights = [parameter for parameter in found.parameters() if parameter.requires_grad]
    singles = torch.cat([found.embed(found.encoder.collate([one])) for one in alone(asked)])
    tree = found.embed(found.encoder.collate(asked))
    assert (tree - singles).abs().max() < TOLERANCE
    toward = torch.randn(singles.shape, generator=torch.Generator().manual_seed(1))
    grads = [torch.autograd.grad((v * toward).sum(), weights, allow_unused=True) for v in (singles, tree)]
    flat = [
        torch.cat([torch.zeros(p.numel()) if g is None else g.flatten() for g, p in zip(own, weights, strict=True)])
        for own in grads
    ]
    assert (flat[0] - flat[1]).norm() < TOLERANCE * flat[0].norm()
    forward = type(found.encoder.model).forward

    def without(self, **inputs):
        inputs.pop(ARGUMENT, None)
        return forward(self, **inputs)

    monkeypatch.setattr(type(found.encoder.model), "forward", without)
    with torch.no_grad():
        assert (found.embed(found.encoder.collate(asked)) - singles).abs().max() > 0.01, "the mask alone does not do it"


@every_recurrent
def test_activations_are_computed_again_to_the_bit(family):
    samples = [Sample(image=image(84, 84, 3), turns=[Turn("what?", "a ring"), Turn("how many?", "3")])] * 2
    samples[1] = Sample(image=image(57, 130, 2), turns=[Turn("which one?", "the last"), Turn("", "a tall picture")])
    found = []
    for again in (False, True):
        copied = steps.to_train(model(family), "adapters")
        if again:
            copied.encoder.model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
        found.append(steps.plain(copied, steps.share(copied, samples, "isolated")))
    (value, grads), (other, others) = found
    assert value == other and all(torch.equal(grads[name], others[name]) for name in grads)


@every_recurrent
def test_encode_turns_keeps_the_states_of_the_image(family):
    found, queries = model(family), [f"question {number}: {'word ' * (number % 5)}" for number in range(60)]
    assert sharing(found.encoder) == "cache"
    with Passes(found) as passes:
        (got,) = found.encode_turns_batch([image(84, 84, 3)], [queries], token_budget=400)
    assert passes.images == 1 and len(passes.tokens) > 2
    assert max(rows * length for rows, length in passes.tokens) <= 400
    expected = vectors(found, [Dialogue((image(84, 84, 3),), (Content(query),)) for query in queries])
    assert np.abs(got - expected).max() < TOLERANCE


def test_a_copy_computes_by_its_own_weights():
    found = model("qwen3_5")
    other = from_backbone(copy.deepcopy(found.encoder.model), found.encoder.muco_processor, device="cpu")
    asked = [Dialogue((), (Content("a"), Content("b c")), True)]
    before = vectors(found, asked)
    for module, _ in recurrent_modules(other.encoder.model):
        module.out_proj.weight.data.zero_()
    assert np.array_equal(vectors(found, asked), before) and np.abs(vectors(other, asked) - before).max() > 1e-3


def test_the_bytes_of_a_state_are_what_a_state_takes():
    found = model("qwen3_5").encoder.model
    config = found.config.get_text_config()
    heads, keys, values = config.linear_num_value_heads, config.linear_key_head_dim, config.linear_value_head_dim
    mixed = 2 * config.linear_num_key_heads * keys + heads * values
    expected = 4 * (heads * keys * values + mixed * config.linear_conv_kernel_dim)
    recurrent = config.layer_types.count("linear_attention")
    assert state_bytes(found) == state_bytes(copy.deepcopy(found).to("meta")) == [expected] * recurrent
