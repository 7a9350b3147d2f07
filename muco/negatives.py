"""Which candidate may be a negative of which turn. Boolean matrices, rows are turns, columns candidates."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def allowed_negatives(
    sample_ids: Int[Tensor, " turns"],
    target_ids: Int[Tensor, " turns"] | None = None,
    rows: slice = slice(None),
    *,
    mask_same_image: bool = True,
) -> Bool[Tensor, "rows turns"]:
    """True where the target of turn j is a negative of turn i.

    Not allowed are targets of the same sample (the paper's logit mask: they answer other questions about the same
    image, and may well fit this one) and, with ``target_ids``, targets identical to the turn's own: "Ring" of another
    image is the right answer, not a wrong one. ``rows`` asks for some turns only. Without
    ``mask_same_image`` the other targets of the sample are allowed, only to show what the mask is for.
    """
    owners = sample_ids if mask_same_image else torch.arange(len(sample_ids), device=sample_ids.device)
    allowed = owners[rows, None] != owners[None, :]
    if target_ids is not None:
        allowed = allowed & (target_ids[rows, None] != target_ids[None, :])
    return allowed


def allowed_hard_negatives(
    sample_ids: Int[Tensor, " turns"],
    hard_negative_turns: Int[Tensor, " hard"],
    target_ids: Int[Tensor, " turns"] | None = None,
    hard_negative_ids: Int[Tensor, " hard"] | None = None,
    rows: slice = slice(None),
) -> Bool[Tensor, "rows hard"]:
    """True where a hard negative is a negative of turn i: of its own turn, and of all turns of other samples.

    With both ids, one that is identical to the turn's target is no negative of it. ``rows`` asks for some turns only.
    """
    turns = torch.arange(len(sample_ids), device=sample_ids.device)
    allowed = turns[rows, None] == hard_negative_turns[None, :]
    allowed = allowed | (sample_ids[rows, None] != sample_ids[hard_negative_turns][None, :])
    if target_ids is not None and hard_negative_ids is not None:
        allowed = allowed & (target_ids[rows, None] != hard_negative_ids[None, :])
    return allowed
