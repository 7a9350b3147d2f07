"""The contrastive losses over turns and over reconstructions: pure functions of embeddings and index tensors.

Letters: T turns of all samples of the batch · H hard negatives · D embedding dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from muco.negatives import allowed_hard_negatives, allowed_negatives
from muco.weighting import EQUAL, Weighting


@dataclass(frozen=True)
class GuideVectors:
    """A guide's unit vectors of what is scored, and its rule for false negatives: :class:`muco.weighting.Guide`."""

    query: Float[Tensor, "turns guide"]
    target: Float[Tensor, "turns guide"]
    hard_negatives: Float[Tensor, "hard guide"]
    margin: float = 0.0
    relative: bool = False

    def keeps(self, scores: Tensor, positive: Tensor) -> Tensor:
        """Whether each negative stays, by the guide's cosines [rows, candidates] and those of the pairs, [rows]."""
        margin = self.margin * positive.abs() if self.relative else self.margin
        return ~(scores > (positive - margin)[:, None])  # one that is not a number stays, and is found in the loss


def multi_turn_info_nce(
    query: Float[Tensor, "turns dim"],
    target: Float[Tensor, "turns dim"],
    sample_ids: Int[Tensor, " turns"],
    *,
    temperature: float | Float[Tensor, " turns"] = 0.02,
    target_ids: Int[Tensor, " turns"] | None = None,
    symmetric: bool = False,
    hard_negatives: Float[Tensor, "hard dim"] | None = None,
    hard_negative_turns: Int[Tensor, " hard"] | None = None,
    hard_negative_ids: Int[Tensor, " hard"] | None = None,
    mask_same_image: bool = True,
    weighting: Weighting = EQUAL,
    guide: GuideVectors | None = None,
    turn_weights: Float[Tensor, " turns"] | None = None,
    count: Callable[[Tensor], None] | None = None,
) -> Float[Tensor, ""]:
    """Mean InfoNCE of each query turn against every target of other samples, in nats.

    Args:
        query: One vector per turn, L2-normalised; scores are taken in float32.
        target: Row i belongs to row i of ``query``.
        sample_ids: Equal for turns of one sample; its other turns are not negatives ("logit masking").
        temperature: Divides the scores of a turn; one for all, or one per turn.
        target_ids: Equal for identical targets, which are then not negatives of one another. None: only the
            sample masks.
        symmetric: Average with the same loss of each target against every query. The paper has query to target only.
        hard_negatives: Further candidates, one vector each.
        hard_negative_turns: The turn of each hard negative. It is also a negative of every turn of other samples, but
            of no other turn of its own sample.
        hard_negative_ids: The ``target_ids`` of the hard negatives; required with ``target_ids``.
        mask_same_image: False makes the targets of a sample's other turns negatives, to show what the mask is for.
            Hard negatives are masked as before.
        weighting: What negatives count by their scores; by default all the same.
        guide: Leaves out what it takes for right answers, in both directions.
        turn_weights: Multiply the loss of each turn, in both directions; the mean is over all turns still.
        count: Takes int64 [2]: how many pairs of a turn and a negative there are, and how many of them are left out by
            ``weighting`` and ``guide``.
    Returns:
        Scalar; log(1 + number of allowed negatives), averaged over turns, when all vectors are equal.
    Raises:
        ValueError: If a number ``temperature`` is not positive, the lengths differ, or there is no turn.
    Memory: blocks of a [turns, turns + hard] float32 matrix, of 256 MiB each.
    Source: arXiv 2602.06393, the MuCo loss and Figure 3 (logit masking).
    """
    _check(query, target, sample_ids, temperature, target_ids)
    if hard_negatives is None:
        hard_negatives, hard_negative_turns, hard_negative_ids = target[:0], sample_ids[:0], sample_ids[:0]
    if hard_negative_turns is None or (target_ids is not None and hard_negative_ids is None):
        raise ValueError("hard_negatives need hard_negative_turns, and hard_negative_ids where target_ids are given")
    candidates = torch.cat([target, hard_negatives.to(target.dtype)])

    def backward_negatives(rows: slice) -> Tensor:
        return allowed_negatives(sample_ids, target_ids, rows, mask_same_image=mask_same_image)

    def forward_negatives(rows: slice) -> Tensor:
        hard = allowed_hard_negatives(sample_ids, hard_negative_turns, target_ids, hard_negative_ids, rows)
        return torch.cat([backward_negatives(rows), hard], dim=1)

    how = {"temperature": temperature, "weighting": weighting, "weights": turn_weights}
    there = guide and (guide.query, torch.cat([guide.target, guide.hard_negatives]), guide)
    loss, pairs = _info_nce(query, candidates, forward_negatives, hard=len(hard_negatives), guided=there, **how)
    if symmetric:
        back = guide and (guide.target, guide.query, guide)
        backward, others = _info_nce(target, query, backward_negatives, guided=back, **how)
        loss, pairs = (loss + backward) / 2, pairs + others
    if count is not None:
        count(pairs)
    return loss


BLOCK = 1 << 26  # scores that are held at a time: 256 MiB


def _info_nce(
    anchors: Tensor,
    candidates: Tensor,
    allowed: Callable[[slice], Tensor],
    *,
    temperature: float | Tensor,
    weighting: Weighting,
    weights: Tensor | None = None,
    guided: tuple[Tensor, Tensor, GuideVectors] | None = None,
    hard: int = 0,
    first: int = 0,
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of anchor i against candidate ``first`` + i and its allowed negatives, in blocks.

    Args:
        allowed: Whether each candidate is a negative of some anchors, bool [rows, candidates].
        guided: A guide's vectors of the anchors and of the candidates, and its rule.
        hard: How many of the candidates, the last ones, are hard negatives.
    Returns:
        The mean, and int64 [2]: pairs of an anchor and an allowed negative, and those left out by their score.
    """
    size = max(1, BLOCK // len(candidates))

    def block(rows: slice) -> tuple[Tensor, Tensor]:
        own = torch.arange(rows.start, rows.stop, device=anchors.device)
        keep, place = allowed(rows), (own - rows.start, first + own)
        keep[place] = False
        there = keep.sum()
        scores = _scores(anchors[rows], candidates)
        logits = scores / (temperature[rows, None] if isinstance(temperature, Tensor) else temperature)
        if guided is not None:
            known = _scores(guided[0][rows], guided[1])
            keep = keep & guided[2].keeps(known, known[place])
        if weighting != EQUAL:
            keep, extra = _weighed(scores.detach(), scores.detach()[place], keep, weighting, hard)
            logits = logits + extra
        del scores  # one copy less in memory
        left_out = there - keep.sum()
        keep[place] = True  # the pair itself is the numerator
        logits = logits.masked_fill(~keep, float("-inf"))
        if weights is None:
            loss = cross_entropy(logits, first + own, reduction="sum")
        else:
            loss = (cross_entropy(logits, first + own, reduction="none") * weights[rows]).sum()
        return loss, torch.stack([there, left_out])

    blocks = [slice(start, min(start + size, len(anchors))) for start in range(0, len(anchors), size)]
    if len(blocks) == 1:
        loss, pairs = block(blocks[0])
        return loss / len(anchors), pairs
    # the scores of a block are computed again in backward, so that one block at a time is all that is ever held
    losses, counts = zip(*(checkpoint(block, rows, use_reentrant=False) for rows in blocks), strict=True)
    return sum(losses) / len(anchors), sum(counts)


def _weighed(scores: Tensor, positive: Tensor, keep: Tensor, weighting: Weighting, hard: int) -> tuple[Tensor, Tensor]:
    """The negatives that are kept of those allowed, bool [rows, candidates], and what is added to all logits."""
    if weighting.false_negative_margin is not None:
        keep = keep & ~(scores > positive[:, None] + weighting.false_negative_margin)  # as in GuideVectors.keeps
    strength = scores.new_full((scores.shape[1],), weighting.hardness)
    strength[scores.shape[1] - hard :] = weighting.hard_negative_hardness
    return keep, torch.where(keep, scores * strength, 0.0)


def _scores(query: Tensor, candidates: Tensor) -> Tensor:
    device = query.device.type
    known = torch.amp.is_autocast_available(device)  # not on the meta device
    with torch.autocast(device, enabled=False) if known else nullcontext():  # it would take the product in bfloat16
        return query.float() @ candidates.float().T


def reconstruction_info_nce(
    q: Float[Tensor, "pairs dim"],
    q2: Float[Tensor, "pairs dim"],
    p: Float[Tensor, "pairs dim"],
    p2: Float[Tensor, "pairs dim"],
    *,
    hard_negatives: Float[Tensor, "hard dim"] | None = None,
    temperature: float | Float[Tensor, " pairs"] = 0.02,
    joint: bool = False,
    sample_ids: Int[Tensor, " pairs"] | None = None,
    target_ids: Int[Tensor, " pairs"] | None = None,
    hard_negative_pairs: Int[Tensor, " hard"] | None = None,
    hard_negative_ids: Int[Tensor, " hard"] | None = None,
    mask_counterpart: bool = True,
    weighting: Weighting = EQUAL,
    guide: GuideVectors | None = None,
    count: Callable[[Tensor], None] | None = None,
) -> dict[str, Float[Tensor, ""]]:
    """InfoNCE of (q, p), (q, p2), (q2, p) and (q2, p2), each a mean over pairs in nats.

    Negatives of any of them are the p and p2 of other samples, never those of its own sample.

    Args:
        q, q2: Vectors of the query side after the first turn and after the reconstruction; L2-normalised.
        p, p2: The same of the target side; row i of all four belongs together.
        hard_negatives: Further candidates of every term.
        joint: Every term chooses among all p and p2 (the paper); else among those of its own kind (the released code).
        sample_ids, target_ids, hard_negative_ids: See :func:`multi_turn_info_nce`. No sample_ids: each pair is one.
        hard_negative_pairs: The pair of each hard negative; None: each is a negative of every pair.
        mask_counterpart: False, with ``joint``, makes the counterpart of its own pair a negative, to show what the mask
            is for.
        weighting, guide, count: See :func:`multi_turn_info_nce`.
    Returns:
        The four terms by name: "qp", "qp2", "q2p", "q2p2". The training loss is their mean.
    Raises:
        ValueError: If a number ``temperature`` is not positive or the shapes differ.
    Memory: blocks of a float32 matrix, [pairs, pairs + hard] or [pairs, 2 pairs + hard], of 256 MiB each.
    Source: arXiv 2602.06393, fine-tuning by reconstruction.
    """
    ids = torch.arange(len(q), device=q.device) if sample_ids is None else sample_ids
    for name, side in (("q2", q2), ("p", p), ("p2", p2)):
        if side.shape != q.shape:
            raise ValueError(f"q and {name} must have the same shape, got {[*q.shape]} and {[*side.shape]}")
    _check(q, p, ids, temperature, target_ids)
    if hard_negatives is None:
        hard_negatives, hard_negative_ids = p[:0], ids[:0]
    if target_ids is not None and hard_negative_ids is None:
        raise ValueError("hard_negatives need hard_negative_ids where target_ids are given")

    def hard_allowed(rows: slice) -> Tensor:
        if hard_negative_pairs is not None:
            return allowed_hard_negatives(ids, hard_negative_pairs, target_ids, hard_negative_ids, rows)
        every = torch.ones(len(ids[rows]), len(hard_negatives), dtype=torch.bool, device=q.device)
        return every if target_ids is None else target_ids[rows, None] != hard_negative_ids[None, :]

    def allowed(rows: slice) -> Tensor:
        own = allowed_negatives(ids, target_ids, rows)
        if joint and not mask_counterpart:
            pairs = torch.arange(len(ids), device=q.device)
            own = own | (pairs[rows, None] == pairs[None, :])
        return torch.cat([*[own] * (2 if joint else 1), hard_allowed(rows)], dim=1)

    terms, pairs = {}, 0
    how = {"temperature": temperature, "weighting": weighting, "hard": len(hard_negatives)}
    if guide is not None:
        known = [guide.target] * (2 if joint else 1)
        how["guided"] = guide.query, torch.cat([*known, guide.hard_negatives]), guide
    for query_name, query in (("q", q), ("q2", q2)):
        for target_name, target, first in (("p", p, 0), ("p2", p2, len(p) if joint else 0)):
            candidates = torch.cat([p, p2, hard_negatives] if joint else [target, hard_negatives])
            terms[query_name + target_name], own = _info_nce(query, candidates, allowed, first=first, **how)
            pairs = pairs + own
    if count is not None:
        count(pairs)
    return terms


def chance_level(sample_ids: Int[Tensor, " turns"], target_ids: Int[Tensor, " turns"] | None = None) -> float:
    """The loss in nats of a model that cannot tell its candidates apart: mean of log(1 + allowed negatives)."""
    return torch.log1p(allowed_negatives(sample_ids, target_ids).sum(dim=1).float()).mean().item()


def _check(
    query: Tensor, target: Tensor, sample_ids: Tensor, temperature: float | Tensor, target_ids: Tensor | None
) -> None:
    if not isinstance(temperature, Tensor) and temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if query.shape != target.shape or query.ndim != 2:
        raise ValueError(f"query and target must both be [turns, dim], got {[*query.shape]} and {[*target.shape]}")
    if not len(query):
        raise ValueError("a loss needs at least one turn, got none")
    per_turn = temperature if isinstance(temperature, Tensor) else None
    for name, ids in (("sample_ids", sample_ids), ("target_ids", target_ids), ("temperature", per_turn)):
        if ids is not None and len(ids) != len(query):
            raise ValueError(f"{name} must have one entry per turn: {len(query)} turns, {len(ids)} entries")
