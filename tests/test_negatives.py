"""The masks, entry by entry (Figure 3 of the paper, and identical targets)."""

from __future__ import annotations

import torch

from muco.negatives import allowed_hard_negatives, allowed_negatives


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
