"""Which candidate may be a negative of which turn. Boolean matrices, rows are turns, columns candidates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Variety:
    """What a part of a batch holds of different things: enough to say whether any turn of the batch has a negative.

    Args:
        samples, targets: Up to two different ids; ``targets`` is None where identical targets are not marked.
        hard: Whether a turn has a hard negative that is not its own target.
    """

    turns: int
    samples: frozenset[int]
    targets: frozenset[int] | None
    hard: bool

    @classmethod
    def of(cls, ids: Mapping[str, Tensor]) -> Variety:
        """Of the ``ids`` of :func:`muco.training.batches.batch_of`, on the CPU."""
        targets, owners = ids.get("target_ids"), ids["hard_negative_turns"]
        hard = torch.ones(len(owners)) if targets is None else targets[owners] != ids["hard_negative_ids"]
        two = None if targets is None else frozenset(targets.unique()[:2].tolist())
        return cls(len(ids["sample_ids"]), frozenset(ids["sample_ids"].unique()[:2].tolist()), two, bool(hard.any()))


def why_no_negative(parts: Sequence[Variety], *, mask_same_image: bool = True) -> str:
    """Why no turn of a batch has a negative, so that the loss is 0 whatever the model; "" where one has, or no turn is.

    Two turns that differ in sample and in target are enough, and they exist where both differ at all.
    """
    turns = sum(part.turns for part in parts)
    if not turns or any(part.hard for part in parts):
        return ""
    if turns == 1:
        return "there is only one turn"
    if mask_same_image and len(frozenset().union(*(part.samples for part in parts))) == 1:
        return "all turns belong to one sample or one image"
    targets = [part.targets for part in parts if part.targets is not None]
    return "all turns have the same target" if len(frozenset().union(*targets)) == 1 else ""
