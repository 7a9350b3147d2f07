"""A teacher's scores: the divergence against its definition, its limits, and its place in the loss."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from muco import Content, DataError, RecipeError, Turn
from muco.info_nce import multi_turn_info_nce
from muco.loss import MultiTurnLoss
from muco.negatives import SampleIds, TurnIds
from muco.teacher import divergence
from muco.training.prepared import Chosen
from muco.training.recipe import from_dict
from muco.weighting import Distillation

KINDS = ("kl", "symmetric_kl", "margin_mse")
NAN = math.nan


def slow(query, target, hard, turns, taught, of_hard, kind, temperature, teacher_temperature):
    """Turn by turn, in float64."""
    found = []
    for i in range(len(query)):
        own = [h for h in range(len(hard)) if turns[h] == i]
        t = [float(taught[i]), *(float(of_hard[h]) for h in own)]
        if not own or any(map(math.isnan, t)):
            found.append(None)
            continue
        s = [float(query[i].double() @ v.double()) for v in (target[i], *(hard[h] for h in own))]
        if kind == "margin_mse":
            leads = [((s[0] - a) - (t[0] - b) / teacher_temperature) ** 2 for a, b in zip(s[1:], t[1:], strict=True)]
            found.append(sum(leads) / len(leads))
            continue
        p, q = (
            [math.exp(x) / sum(map(math.exp, v)) for x in v]
            for v in ([x / teacher_temperature for x in t], [x / temperature for x in s])
        )
        there = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        back = sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))
        found.append(there if kind == "kl" else (there + back) / 2)
    return found


@st.composite
def scored(draw):
    """Vectors of some turns, their hard negatives in any order, and scores of which some are missing."""
    count, hard = draw(st.integers(1, 5)), draw(st.integers(0, 8))
    turns = torch.tensor(draw(st.lists(st.integers(0, count - 1), min_size=hard, max_size=hard)), dtype=torch.long)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    query, target = (normalize(torch.randn(count, 8, generator=generator), dim=1) for _ in range(2))
    negatives = normalize(torch.randn(hard, 8, generator=generator), dim=1)
    values = st.floats(-3, 3) | st.just(NAN)
    taught, of_hard = (
        torch.tensor(draw(st.lists(values, min_size=n, max_size=n)), dtype=torch.float32) for n in (count, hard)
    )
    return query, target, negatives, turns, taught, of_hard


@settings(max_examples=60, deadline=None)
@given(scored(), st.sampled_from(KINDS), st.floats(0.1, 1), st.floats(0.3, 3))
def test_it_is_the_definition(batch, kind, temperature, teacher_temperature):
    how = {"kind": kind, "temperature": temperature, "teacher_temperature": teacher_temperature}
    found, has = divergence(*batch, **how)
    expected = slow(*batch, *how.values())
    assert has.tolist() == [value is not None for value in expected]
    assert found.tolist() == pytest.approx([value or 0.0 for value in expected], abs=1e-4)


def example(scale: float = 1.0):
    """Three turns, of which the second has no negative, and the teacher's scores as the model's own times a scale."""
    torch.manual_seed(0)
    query, target = (normalize(torch.randn(3, 8), dim=1) for _ in range(2))
    hard, turns = normalize(torch.randn(5, 8), dim=1), torch.tensor([2, 0, 0, 2, 0])
    taught, of_hard = (query * target).sum(1) * scale, (query[turns] * hard).sum(1) * scale
    return query, target, hard, turns, taught, of_hard


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_that_agrees_teaches_nothing(kind):
    query, *others = example(scale=2.0 / 0.1 if kind != "margin_mse" else 2.0)
    query = query.clone().requires_grad_()
    found, has = divergence(query, *others, kind=kind, temperature=0.1, teacher_temperature=2.0)
    found.sum().backward()
    assert has.tolist() == [True, False, True] and found.abs().max() < 1e-6 and query.grad.abs().max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_neither_a_constant_nor_the_order_of_negatives_matters(kind):
    query, target, hard, turns, _, _ = example()
    taught, of_hard = torch.tensor([2.0, 1.0, -1.0]), torch.tensor([0.5, 1.0, -2.0, 0.0, 3.0])
    plain, _ = divergence(query, target, hard, turns, taught, of_hard, kind=kind)
    shifted, _ = divergence(query, target, hard, turns, taught + 7, of_hard + 7, kind=kind)
    order = torch.tensor([3, 1, 4, 0, 2])
    other, _ = divergence(query, target, hard[order], turns[order], taught, of_hard[order], kind=kind)
    assert torch.allclose(plain, shifted, atol=1e-4) and torch.allclose(plain, other, atol=1e-4)


def test_a_certain_teacher_is_the_contrastive_loss_over_the_own_candidates():
    query, target, hard, turns, _, _ = example()
    taught, of_hard = torch.ones(3), torch.zeros(5)
    found, has = divergence(query, target, hard, turns, taught, of_hard, temperature=0.1, teacher_temperature=1e-3)
    for turn in has.nonzero().flatten().tolist():
        own = {"hard_negatives": hard[turns == turn], "hard_negative_turns": torch.zeros(int((turns == turn).sum()))}
        own["hard_negative_turns"] = own["hard_negative_turns"].long()
        alone = multi_turn_info_nce(
            query[[turn]], target[[turn]], torch.zeros(1, dtype=torch.long), temperature=0.1, **own
        )
        assert found[turn].item() == pytest.approx(alone.item(), abs=1e-5)


def test_scores_far_apart_give_neither_nan_nor_a_gradient_of_nothing():
    query, target, hard, turns, _, _ = example()
    query = query.clone().requires_grad_()
    taught, of_hard = torch.tensor([0.0, 0.0, 500.0]), torch.tensor([-500.0, 500.0, 0.0, 400.0, 0.0])
    found, _ = divergence(query, target, hard, turns, taught, of_hard, kind="kl", temperature=0.02)
    found.sum().backward()
    assert torch.isfinite(found).all() and query.grad[0].abs().max() > 0.1


def ids_of(turns: torch.Tensor, taught: torch.Tensor, of_hard: torch.Tensor) -> TurnIds:
    count, hard = len(taught), len(of_hard)
    rows = torch.arange(count + hard)
    marks = torch.arange(hard) + 100
    scores = {"sources": torch.zeros(count, dtype=torch.long), "target_scores": taught, "hard_scores": of_hard}
    return TurnIds(rows[:count], rows[:count], rows[count:], turns, marks, rows[:count], count + hard, **scores)


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_turns_with_scores_share_the_loss_and_the_others_keep_theirs(weight):
    query, target, hard, turns, _, _ = example()
    taught, of_hard = torch.tensor([1.0, NAN, 2.0]), torch.tensor([0.0, 1.0, 2.0, 1.5, 0.5])
    ids, vectors = ids_of(turns, taught, of_hard), torch.cat([target, hard])
    loss = MultiTurnLoss(torch.nn.Identity(), temperature=0.1, symmetric=True, distillation=Distillation("kl", weight))
    plain = MultiTurnLoss(torch.nn.Identity(), temperature=0.1, symmetric=True)
    found = loss.of_vectors(query, vectors, ids)
    apart, has = divergence(query, target, hard, turns, taught, of_hard, temperature=0.1)
    rows = []
    for turn in range(3):
        alone = multi_turn_info_nce(
            query,
            target,
            ids.sample_ids,
            temperature=0.1,
            target_ids=ids.target_ids,
            symmetric=True,
            hard_negatives=hard,
            hard_negative_turns=turns,
            hard_negative_ids=ids.hard_ids,
            turn_weights=torch.eye(3)[turn],
        )
        rows.append(3 * alone.item())
    assert sum(rows) / 3 == pytest.approx(plain.of_vectors(query, vectors, ids).item(), abs=1e-5)
    shares = [weight if one else 0.0 for one in has.tolist()]
    expected = sum(w * d + (1 - w) * row for w, d, row in zip(shares, apart.tolist(), rows, strict=True)) / 3
    assert found.item() == pytest.approx(expected, abs=1e-5)
    without = ids_of(turns, torch.full((3,), NAN), of_hard)
    assert torch.equal(loss.of_vectors(query, vectors, without), plain.of_vectors(query, vectors, without))


def test_scores_follow_the_negatives_that_are_drawn():
    turn = Turn("q", "t", None, [str(number) for number in range(6)], [9, 0, 1, 2, 3, 4, 5])
    for seed in range(20):
        for count in (None, 6, 3, 1):
            chosen = Chosen.of(turn, np.random.default_rng(seed), count)
            assert chosen.scores == (9, *(float(content.text) for content in chosen.negatives))
    assert Chosen.of(turn, np.random.default_rng(0), 0) == Chosen(Content("q"), Content("t"), ())
    ids = TurnIds.of(
        [
            SampleIds(1, [0], [5], [0, 0], [6, 7], 1, target_scores=[9.0], hard_scores=[1.0, 2.0]),
            SampleIds(2, [0], [8], [], [], 1),
        ]
    )
    assert ids.target_scores.tolist()[0] == 9 and ids.target_scores[1].isnan() and ids.hard_scores.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("negatives", "scores", "said"),
    [
        (["a"], [1], "one for the target and one for each negative, 2 of them; got 1"),
        ([], [1], "no negatives to compare with"),
        (["a"], [1, NAN], "finite numbers"),
    ],
)
def test_scores_that_do_not_fit_are_refused(negatives, scores, said):
    with pytest.raises(DataError, match=said):
        Turn("q", "t", None, negatives, scores)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"loss": {"distillation": {"kind": "js"}}}, r"loss\.distillation\.kind must be one of 'kl'"),
        ({"loss": {"distillation": {"weight": 1.5}}}, r"loss\.distillation\.weight must be a share"),
        ({"loss": {"distillation": {"temperature": 0}}}, r"loss\.distillation\.temperature must be positive"),
        ({"loss": {"distillation": {}}, "turns": {"mode": "reconstruction"}}, "does not take a teacher's scores"),
    ],
)
def test_recipes_that_do_not_fit_are_refused(changes, said):
    values = {"output": "run", "model": {"path": "model"}, "data": {"train": [{"path": "a"}]}}
    with pytest.raises(RecipeError, match=said):
        from_dict(values | changes)
