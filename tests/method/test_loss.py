"""The loss against a slow, obvious reference; its masks; its gradient."""

from __future__ import annotations

import inspect
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

import muco
from muco.info_nce import chance_level, multi_turn_info_nce
from muco.loss import MultiTurnLoss
from muco.negatives import TurnIds
from muco.weighting import EQUAL, Weighting


def slow_loss(
    query, target, sample_ids, temperature, target_ids=None, hard=(), hard_turns=(), hard_ids=(), weighting=EQUAL
):
    """Written from the definition, one exponential at a time, in float64."""
    query, target = query.double(), target.double()

    def counted(score, positive, hardness):
        margin = weighting.false_negative_margin
        if margin is not None and score > positive + margin:
            return 0.0
        return math.exp(hardness * score) * math.exp(score / temperature)

    total = 0.0
    for i in range(len(query)):
        own = float(query[i] @ target[i])
        positive = math.exp(own / temperature)
        others = 0.0
        for j in range(len(target)):
            same_sample = sample_ids[i] == sample_ids[j]
            same_target = target_ids is not None and target_ids[i] == target_ids[j]
            if not same_sample and not same_target:
                others += counted(float(query[i] @ target[j]), own, weighting.hardness)
        for h in range(len(hard)):
            own_turn, other_sample = hard_turns[h] == i, sample_ids[hard_turns[h]] != sample_ids[i]
            same_target = target_ids is not None and target_ids[i] == hard_ids[h]
            if (own_turn or other_sample) and not same_target:
                others += counted(float(query[i] @ hard[h].double()), own, weighting.hard_negative_hardness)
        total -= math.log(positive / (positive + others))
    return total / len(query)


@st.composite
def batches(draw):
    turns = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    sample_ids = torch.tensor([i for i, k in enumerate(turns) for _ in range(k)])
    count = len(sample_ids)
    target_ids = torch.tensor(draw(st.lists(st.integers(0, 5), min_size=count, max_size=count)))
    hard_turns = torch.tensor(draw(st.lists(st.integers(0, count - 1), max_size=4)), dtype=torch.long)
    hard_ids = torch.tensor(
        draw(st.lists(st.integers(0, 7), min_size=len(hard_turns), max_size=len(hard_turns))), dtype=torch.long
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    query, target = (normalize(torch.randn(count, 8, generator=generator), dim=1) for _ in range(2))
    hard = normalize(torch.randn(len(hard_turns), 8, generator=generator), dim=1)
    return query, target, sample_ids, target_ids, hard, hard_turns, hard_ids


@settings(max_examples=60, deadline=None)
@given(batches(), st.booleans(), st.booleans())
def test_value_equals_the_definition(batch, with_ids, with_hard):
    query, target, sample_ids, target_ids, hard, hard_turns, hard_ids = batch
    ids = target_ids if with_ids else None
    extra = {"hard_negatives": hard, "hard_negative_turns": hard_turns, "hard_negative_ids": hard_ids}
    value = multi_turn_info_nce(
        query, target, sample_ids, temperature=0.1, target_ids=ids, **(extra if with_hard else {})
    )
    slow = slow_loss(query, target, sample_ids, 0.1, ids, *((hard, hard_turns.tolist(), hard_ids) if with_hard else ()))
    assert value.item() == pytest.approx(slow, abs=1e-5)


weightings = st.builds(
    Weighting,
    false_negative_margin=st.none() | st.floats(0, 0.5),
    hardness=st.floats(0, 9),
    hard_negative_hardness=st.floats(0, 5),
)


def arguments(batch):
    query, target, sample_ids, target_ids, hard, hard_turns, hard_ids = batch
    more = {"hard_negatives": hard, "hard_negative_turns": hard_turns, "hard_negative_ids": hard_ids}
    return (query, target, sample_ids), {"temperature": 0.1, "target_ids": target_ids, **more}


@settings(max_examples=60, deadline=None)
@given(batches(), weightings)
def test_negatives_count_by_their_scores(batch, weighting):
    query, target, sample_ids, target_ids, hard, hard_turns, hard_ids = batch
    sides, how = arguments(batch)
    slow = slow_loss(*sides, 0.1, target_ids, hard, hard_turns.tolist(), hard_ids, weighting)
    assert multi_turn_info_nce(*sides, **how, weighting=weighting).item() == pytest.approx(slow, abs=1e-5)


@settings(max_examples=20, deadline=None)
@given(batches(), weightings, st.booleans())
def test_weights_of_negatives_have_no_gradient(batch, weighting, symmetric):
    (query, target, sample_ids), how = arguments(batch)
    leaves = [query.clone().requires_grad_(), target.clone().requires_grad_(), how["hard_negatives"].clone()]
    more = how | {"hard_negatives": leaves[2].requires_grad_()}
    multi_turn_info_nce(*leaves[:2], sample_ids, **more, symmetric=symmetric, weighting=weighting).backward()

    fixed = query @ torch.cat([target, how["hard_negatives"]]).T  # the same scores, as constants

    def written_out(vectors):
        query, target, hard = vectors
        ways = [(query, torch.cat([target, hard]), fixed), (target, query, fixed[:, : len(target)].T)]
        losses = []
        for anchors, candidates, constant in ways[: 1 + symmetric]:
            scores, rows = anchors @ candidates.T, []
            for i in range(len(anchors)):
                total = scores[i, i] / 0.1
                for j in range(len(candidates)):
                    in_batch = j < len(target)
                    turn = j if in_batch else int(how["hard_negative_turns"][j - len(target)])
                    mark = how["target_ids"][j] if in_batch else how["hard_negative_ids"][j - len(target)]
                    other = sample_ids[turn] != sample_ids[i] or (not in_batch and turn == i)
                    margin = weighting.false_negative_margin
                    known = margin is not None and constant[i, j] > constant[i, i] + margin
                    if other and mark != how["target_ids"][i] and not known:
                        strength = weighting.hardness if in_batch else weighting.hard_negative_hardness
                        total = torch.logaddexp(total, scores[i, j] / 0.1 + strength * constant[i, j])
                rows.append(total - scores[i, i] / 0.1)
            losses.append(torch.stack(rows).mean())
        return torch.stack(losses).mean()

    others = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    written_out(others).backward()
    for leaf, other in zip(leaves, others, strict=True):
        expected = torch.zeros_like(leaf) if other.grad is None else other.grad
        found = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        assert torch.allclose(found, expected, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(batches(), st.booleans())
def test_the_limits_of_weighting_are_the_plain_loss_to_the_bit_and_nothing(batch, symmetric):
    sides, how = arguments(batch)
    how |= {"symmetric": symmetric}
    plain, counts = multi_turn_info_nce(*sides, **how), []
    for weighting in (Weighting(), Weighting(false_negative_margin=2.5), Weighting(false_negative_margin=1e6)):
        assert torch.equal(multi_turn_info_nce(*sides, **how, weighting=weighting, count=counts.append), plain)
        assert counts[-1][1] == 0
    query = sides[0].clone().requires_grad_()
    nothing = Weighting(false_negative_margin=-2.5)  # no score is that low
    loss = multi_turn_info_nce(query, *sides[1:], **how, weighting=nothing, count=counts.append)
    loss.backward()
    assert loss == 0 and not query.grad.any()
    assert counts[-1][0] == counts[-1][1] == counts[0][0]


def test_equal_negatives_count_by_their_common_score():
    angle, count, strength = 0.3, 5, 9.0
    query = torch.tensor([[1.0, 0.0]]).repeat(count + 1, 1)
    target = torch.tensor([[math.cos(angle), math.sin(angle)]]).repeat(count + 1, 1)
    loss = multi_turn_info_nce(
        query, target, torch.arange(count + 1), temperature=0.5, weighting=Weighting(hardness=strength)
    )
    score = math.cos(angle)
    assert loss.item() == pytest.approx(math.log1p(count * math.exp(strength * score)), rel=1e-6)


@settings(max_examples=30, deadline=None)
@given(batches(), st.integers(0, 1000), st.booleans())
def test_a_temperature_per_turn_is_that_of_its_row(batch, seed, symmetric):
    (query, target, sample_ids), how = arguments(batch)
    how |= {"symmetric": symmetric}
    count = len(query)
    temperatures = torch.rand(count, generator=torch.Generator().manual_seed(seed)) / 2 + 0.05
    mixed = multi_turn_info_nce(query, target, sample_ids, **how | {"temperature": temperatures})
    rows = []
    for i in range(count):
        own = how | {"temperature": temperatures[i].item()}
        rows.append(row_loss(query, target, sample_ids, own, i))
    assert mixed.item() == pytest.approx(sum(rows) / count, abs=1e-5)
    same = multi_turn_info_nce(query, target, sample_ids, **how | {"temperature": torch.full((count,), 0.1)})
    assert same.item() == pytest.approx(multi_turn_info_nce(query, target, sample_ids, **how).item(), abs=1e-6)


def row_loss(query, target, sample_ids, how, row: int) -> float:
    """One row of the loss at one temperature, written from the definition."""
    slow = []
    for anchors, candidates, hard in ((query, target, True), (target, query, False))[: 1 + how["symmetric"]]:
        total = 0.0
        own = math.exp(float(anchors[row].double() @ candidates[row].double()) / how["temperature"])
        for j in range(len(candidates)):
            if sample_ids[j] != sample_ids[row] and how["target_ids"][j] != how["target_ids"][row]:
                total += math.exp(float(anchors[row].double() @ candidates[j].double()) / how["temperature"])
        for h, turn in enumerate(how["hard_negative_turns"].tolist() if hard else ()):
            other = sample_ids[turn] != sample_ids[row] or turn == row
            if other and how["hard_negative_ids"][h] != how["target_ids"][row]:
                vector = how["hard_negatives"][h].double()
                total += math.exp(float(anchors[row].double() @ vector) / how["temperature"])
        slow.append(-math.log(own / (own + total)))
    return sum(slow) / len(slow)


@pytest.mark.parametrize("learnt", [1, 2])
def test_learnt_temperatures_have_the_gradient_of_finite_differences(learnt):
    torch.manual_seed(0)
    query, target = (normalize(torch.randn(12, 8), dim=1) for _ in range(2))
    ids = replace(plain_ids(torch.arange(12) // 2), sources=torch.arange(12) // 2 % learnt)
    loss = MultiTurnLoss(torch.nn.Identity(), temperature=0.05, symmetric=True, dimensions=(4, 8), learnt=learnt)
    fixed = MultiTurnLoss(torch.nn.Identity(), temperature=0.05, symmetric=True, dimensions=(4, 8))
    value = loss.of_vectors(query, target, ids)
    assert value.item() == pytest.approx(fixed.of_vectors(query, target, ids).item(), rel=1e-6)
    value.backward()
    assert loss.temperatures() == pytest.approx([0.05] * learnt) and fixed.temperatures() == [0.05]
    for number in range(learnt):
        sides = []
        for step in (0.01, -0.01):
            with torch.no_grad():
                loss.log_scales[number] += step
                sides.append(loss.of_vectors(query, target, ids).item())
                loss.log_scales[number] -= step
        assert loss.log_scales.grad[number].item() == pytest.approx((sides[0] - sides[1]) / 0.02, rel=5e-3, abs=1e-4)


def test_a_learnt_temperature_stays_within_its_bounds_and_needs_differences():
    ids = plain_ids(torch.arange(6))
    same = normalize(torch.ones(6, 8), dim=1)
    loss = MultiTurnLoss(torch.nn.Identity(), temperature=0.1, learnt=1)
    loss.of_vectors(same, same, ids).backward()
    assert loss.log_scales.grad.abs().item() < 1e-5
    for value, bound in ((20.0, 0.005), (-3.0, 0.1)):
        with torch.no_grad():
            loss.log_scales.fill_(value)
        assert loss.temperatures() == pytest.approx([bound])
        loss.of_vectors(same, same, ids)
        assert loss.log_scales.item() == pytest.approx(-math.log(bound))


def test_blocks_change_neither_value_nor_gradient_nor_counts(monkeypatch):
    torch.manual_seed(0)
    sides = [normalize(torch.randn(24, 8), dim=1) for _ in range(2)]
    weighting = Weighting(false_negative_margin=0.05, hardness=3)
    found = []
    for block in (1 << 26, 24 * 5):
        monkeypatch.setattr("muco.info_nce.BLOCK", block)
        query, counts = sides[0].clone().requires_grad_(), []
        loss = multi_turn_info_nce(
            query, sides[1], torch.arange(24) // 2, symmetric=True, weighting=weighting, count=counts.append
        )
        loss.backward()
        found.append((loss.item(), query.grad, counts[0].tolist()))
    assert len(counts) == 1 and found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert torch.allclose(found[0][1], found[1][1], atol=1e-6) and found[0][2] == found[1][2]
    assert 0 < found[0][2][1] < found[0][2][0] == 2 * 24 * 22


@settings(max_examples=20, deadline=None)
@given(batches(), st.booleans())
def test_without_the_mask_other_turns_of_the_image_are_negatives(batch, with_ids):
    query, target, sample_ids, target_ids, *_ = batch
    ids = target_ids if with_ids else None
    value = multi_turn_info_nce(query, target, sample_ids, temperature=0.1, target_ids=ids, mask_same_image=False)
    every_turn_a_sample = torch.arange(len(sample_ids))
    assert value.item() == pytest.approx(slow_loss(query, target, every_turn_a_sample, 0.1, ids), abs=1e-5)


def plain_ids(sample_ids: torch.Tensor) -> TurnIds:
    """A target per turn, in order; no hard negatives, and no identical targets marked."""
    numbers, none = torch.arange(len(sample_ids)), torch.empty(0, dtype=torch.long)
    return TurnIds(sample_ids, numbers, none, none, none, None, vectors=len(numbers))


def test_the_module_passes_the_mask_on():
    torch.manual_seed(0)
    query, target = (normalize(torch.randn(6, 8), dim=1) for _ in range(2))
    ids = plain_ids(torch.arange(6) // 2)
    for symmetric in (False, True):
        values = [
            MultiTurnLoss(torch.nn.Identity(), symmetric=symmetric, mask_same_image=mask).of_vectors(query, target, ids)
            for mask in (True, False)
        ]
        own = [
            multi_turn_info_nce(query, target, ids.sample_ids, symmetric=symmetric, mask_same_image=mask)
            for mask in (True, False)
        ]
        assert values == own and values[1] > values[0] + 0.1  # more negatives, a higher loss


@settings(max_examples=20, deadline=None)
@given(batches())
def test_symmetric_is_the_mean_of_both_directions(batch):
    query, target, sample_ids, target_ids, *_ = batch
    both = multi_turn_info_nce(query, target, sample_ids, target_ids=target_ids, symmetric=True)
    there = multi_turn_info_nce(query, target, sample_ids, target_ids=target_ids)
    back = multi_turn_info_nce(target, query, sample_ids, target_ids=target_ids)
    assert both.item() == pytest.approx((there.item() + back.item()) / 2, abs=1e-5)


def test_gradient_equals_finite_differences_and_is_not_zero():
    generator = torch.Generator().manual_seed(0)
    query, target = (torch.randn(6, 4, generator=generator).mul(0.3).requires_grad_() for _ in range(2))
    sample_ids, target_ids = torch.tensor([0, 0, 1, 1, 1, 2]), torch.tensor([0, 1, 0, 2, 3, 4])
    loss = multi_turn_info_nce(query, target, sample_ids, temperature=0.5, target_ids=target_ids)
    loss.backward()
    for tensor in (query, target):
        for place in [(0, 0), (3, 2), (5, 3)]:
            step = torch.zeros_like(tensor)
            step[place] = 1e-3
            moved = [
                slow_loss(
                    *((a + sign * step if a is tensor else a).detach() for a in (query, target)),
                    sample_ids,
                    0.5,
                    target_ids,
                )
                for sign in (1, -1)
            ]
            assert tensor.grad[place].item() == pytest.approx((moved[0] - moved[1]) / 2e-3, abs=1e-4)
        assert tensor.grad.abs().max() > 1e-3


def test_equal_vectors_give_the_chance_level():
    vectors = torch.ones(5, 4) / 2
    sample_ids = torch.tensor([0, 0, 1, 1, 2])
    expected = sum(math.log(1 + n) for n in (3, 3, 3, 3, 4)) / 5
    assert multi_turn_info_nce(vectors, vectors, sample_ids).item() == pytest.approx(expected, abs=1e-6)
    assert chance_level(sample_ids) == pytest.approx(expected, abs=1e-6)


def test_masked_targets_receive_no_gradient():
    query = normalize(torch.randn(4, 8), dim=1)
    target = normalize(torch.randn(4, 8), dim=1).requires_grad_()
    # all targets are either of the same sample or identical: nothing to contrast, loss zero
    loss = multi_turn_info_nce(query, target, torch.tensor([0, 0, 1, 1]), target_ids=torch.tensor([5, 5, 5, 5]))
    loss.backward()
    assert loss.item() == 0 and target.grad.abs().max() == 0


def test_order_of_turns_does_not_matter():
    query, target = (normalize(torch.randn(9, 8), dim=1) for _ in range(2))
    sample_ids = torch.arange(9) // 2
    order = torch.randperm(9)
    plain = multi_turn_info_nce(query, target, sample_ids)
    assert multi_turn_info_nce(query[order], target[order], sample_ids[order]).item() == pytest.approx(
        plain.item(), abs=1e-5
    )


def test_scores_are_float32_for_half_precision_vectors_and_under_autocast():
    query, target = (normalize(torch.randn(4, 8), dim=1).bfloat16() for _ in range(2))
    plain = multi_turn_info_nce(query.float(), target.float(), torch.arange(4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = multi_turn_info_nce(query, target, torch.arange(4))
    assert cast.dtype == torch.float32 and cast.item() == plain.item()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"target": torch.ones(2, 4)}, "target"),
        ({"sample_ids": torch.arange(2)}, "sample_ids"),
        ({"target_ids": torch.arange(5)}, "target_ids"),
        ({"hard_negatives": torch.ones(1, 4)}, "hard_negative_turns"),
    ],
)
def test_wrong_arguments_are_named(arguments, word):
    values = {"query": torch.ones(3, 4), "target": torch.ones(3, 4), "sample_ids": torch.arange(3)} | arguments
    unchecked = inspect.unwrap(muco.multi_turn_info_nce)  # as users have it, without the shape checks of the tests
    with pytest.raises(ValueError, match=word):
        unchecked(values.pop("query"), values.pop("target"), values.pop("sample_ids"), **values)


def test_no_turn_is_an_error():
    with pytest.raises(ValueError, match="at least one turn"):
        multi_turn_info_nce(torch.ones(0, 4), torch.ones(0, 4), torch.arange(0))


@pytest.mark.parametrize("block", [1, 40, 100, 10**6])
@pytest.mark.parametrize("symmetric", [False, True])
def test_scores_taken_in_blocks_change_neither_value_nor_gradient(monkeypatch, block, symmetric):
    torch.manual_seed(0)
    query, target, hard = (torch.randn(n, 8, requires_grad=True) for n in (13, 13, 5))
    ids = {
        "sample_ids": torch.arange(13) // 3,
        "target_ids": torch.arange(13) % 4,
        "hard_negative_turns": torch.tensor([0, 0, 3, 7, 12]),
        "hard_negative_ids": torch.tensor([9, 1, 9, 9, 0]),
    }

    def taken() -> list[torch.Tensor]:
        loss = multi_turn_info_nce(query, target, temperature=0.5, symmetric=symmetric, hard_negatives=hard, **ids)
        return [loss.detach(), *torch.autograd.grad(loss, (query, target, hard))]

    whole = taken()
    monkeypatch.setattr("muco.info_nce.BLOCK", block)
    for one, other in zip(taken(), whole, strict=True):
        assert torch.allclose(one, other, atol=1e-6) and one.abs().max() > 0


def test_a_loss_over_parts_of_vectors_is_the_mean_over_the_parts():
    torch.manual_seed(0)
    query, target = (normalize(torch.randn(6, 8), dim=1) for _ in range(2))
    numbers = torch.arange(6)
    expected = [
        multi_turn_info_nce(*(normalize(side[:, :d], dim=1) for side in (query, target)), numbers, temperature=0.2)
        for d in (2, 5, 8)
    ]
    loss = MultiTurnLoss(torch.nn.Identity(), temperature=0.2, dimensions=(2, 5, 8))
    assert loss.of_vectors(query, target, plain_ids(numbers)).item() == pytest.approx(
        torch.stack(expected).mean().item(), rel=1e-6
    )
