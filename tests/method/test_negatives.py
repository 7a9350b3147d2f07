"""The masks, entry by entry (Figure 3 of the paper, and identical targets)."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from muco.negatives import SampleIds, TurnIds, Variety, allowed_hard_negatives, allowed_negatives, why_no_negative


def test_turns_of_one_sample_are_no_negatives():
    allowed = allowed_negatives(torch.tensor([0, 0, 1]))
    assert allowed.tolist() == [[False, False, True], [False, False, True], [True, True, False]]


def test_without_the_mask_only_the_own_target_is_no_negative():
    ids = torch.tensor([0, 0, 1])
    allowed = allowed_negatives(ids, mask_same_image=False)
    assert allowed.tolist() == [[False, True, True], [True, False, True], [True, True, False]]
    assert torch.equal(allowed_negatives(ids, rows=slice(1, 3), mask_same_image=False), allowed[1:])
    # identical targets of one sample stay masked
    same = allowed_negatives(ids, torch.tensor([7, 7, 8]), mask_same_image=False)
    assert same.tolist() == [[False, False, True], [False, False, True], [True, True, False]]


def test_identical_targets_of_other_samples_are_no_negatives():
    allowed = allowed_negatives(torch.tensor([0, 1, 2]), torch.tensor([7, 7, 8]))
    assert allowed.tolist() == [[False, False, True], [False, False, True], [True, True, False]]


def test_a_hard_negative_serves_its_own_turn_and_other_samples_only():
    sample_ids, turns = torch.tensor([0, 0, 1]), torch.tensor([0])
    assert allowed_hard_negatives(sample_ids, turns).tolist() == [[True], [False], [True]]
    # the third turn's own target is identical to the hard negative
    ids = {"target_ids": torch.tensor([1, 2, 9]), "hard_negative_ids": torch.tensor([9])}
    assert allowed_hard_negatives(sample_ids, turns, **ids).tolist() == [[True], [False], [False]]


small = st.integers(0, 2)


@given(
    st.lists(st.tuples(small, small), max_size=5),
    st.lists(st.tuples(st.integers(0, 9), small), max_size=2),
    st.integers(0, 5),
    st.booleans(),
    st.booleans(),
)
def test_why_no_turn_has_a_negative_is_what_the_masks_say(turns, hard, cut, marked, mask_same_image):
    samples, targets = (torch.tensor([turn[i] for turn in turns], dtype=torch.long) for i in (0, 1))
    hard = [(turn, target) for turn, target in hard if turn < len(turns)]
    owners, hard_ids = (torch.tensor([each[i] for each in hard], dtype=torch.long) for i in (0, 1))
    kinds = (targets, hard_ids) if marked else (None, None)
    allowed = allowed_negatives(samples, kinds[0], mask_same_image=mask_same_image).any()
    allowed |= allowed_hard_negatives(samples, owners, *kinds).any()

    def variety(own: slice) -> Variety:
        first, mine = own.start or 0, [i for i, (turn, _) in enumerate(hard) if turn in range(len(turns))[own]]
        of_hard = {"hard_rows": owners[mine], "hard_turns": owners[mine] - first, "hard_ids": hard_ids[mine]}
        of_turns = {"target_rows": samples[own], "target_ids": targets[own] if marked else None}
        return Variety.of(TurnIds(samples[own], **of_turns, **of_hard, vectors=0))

    reason = why_no_negative([variety(slice(0, cut)), variety(slice(cut, None))], mask_same_image=mask_same_image)
    assert bool(reason) == (len(turns) > 0 and not allowed)


def test_the_ids_of_a_batch_are_those_of_its_samples_one_after_another():
    one = SampleIds(7, target_rows=[0, 1, 0], target_ids=[4, 5, 4], hard_turns=[0, 2], hard_ids=[8, 9], vectors=2)
    two = SampleIds(6, target_rows=[0], target_ids=[5], hard_turns=[0], hard_ids=[4], vectors=1)
    ids = TurnIds.of([one, two])
    assert len(ids) == 4 and ids.vectors == 6
    assert ids.sample_ids.tolist() == [7, 7, 7, 6] and ids.target_ids.tolist() == [4, 5, 4, 5]
    assert ids.target_rows.tolist() == [0, 1, 0, 2] and ids.hard_rows.tolist() == [3, 4, 5], "behind all targets"
    assert ids.hard_turns.tolist() == [0, 2, 3] and ids.hard_ids.tolist() == [8, 9, 4]
    assert TurnIds.of([one, two], mask_identical_targets=False).target_ids is None


def test_ids_of_parts_point_into_the_vectors_of_the_parts_one_after_another():
    one = SampleIds(7, target_rows=[0, 0], target_ids=[4, 4], hard_turns=[1], hard_ids=[8], vectors=1)
    two = SampleIds(6, target_rows=[0, 1], target_ids=[5, 6], hard_turns=[0], hard_ids=[9], vectors=2)
    parts = [TurnIds.of(samples) for samples in ([one, two], [], [two], [one])]
    joined = TurnIds.join(parts)
    vectors = [torch.arange(part.vectors) + 10 * number for number, part in enumerate(parts)]
    turns = [torch.arange(len(part)) + 10 * number for number, part in enumerate(parts)]
    assert joined.vectors == sum(part.vectors for part in parts) and len(joined) == 8
    for rows, values in (("target_rows", vectors), ("hard_rows", vectors), ("hard_turns", turns)):
        expected = torch.cat([value[getattr(part, rows)] for part, value in zip(parts, values, strict=True)])
        assert torch.equal(torch.cat(values)[getattr(joined, rows)], expected)
    assert joined.hard_ids.tolist() == [8, 9, 9, 8] and joined.target_ids.tolist() == [4, 4, 5, 6, 5, 6, 4, 4]
    assert TurnIds.join([TurnIds.of([one], mask_identical_targets=False)] * 2).target_ids is None
