"""The contrastive loss over turns: a pure function of embeddings and index tensors, and a thin module around it.

Letters: T turns of all samples of the batch · H hard negatives · D embedding dimension.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from muco.negatives import allowed_hard_negatives, allowed_negatives


def multi_turn_info_nce(
    query: Float[Tensor, "turns dim"],
    target: Float[Tensor, "turns dim"],
    sample_ids: Int[Tensor, " turns"],
    *,
    temperature: float = 0.02,
    target_ids: Int[Tensor, " turns"] | None = None,
    symmetric: bool = False,
    hard_negatives: Float[Tensor, "hard dim"] | None = None,
    hard_negative_turns: Int[Tensor, " hard"] | None = None,
    hard_negative_ids: Int[Tensor, " hard"] | None = None,
) -> Float[Tensor, ""]:
    """Mean InfoNCE of each query turn against every target of other samples, in nats.

    Args:
        query: One vector per turn, L2-normalised; scores are taken in float32.
        target: Row i belongs to row i of ``query``.
        sample_ids: Equal for turns of one sample; its other turns are no negatives ("logit masking").
        temperature: Divides the scores.
        target_ids: Equal for identical targets, which are then no negatives of one another. None: only the sample
            masks.
        symmetric: Average with the same loss of each target against every query. The paper has query to target only.
        hard_negatives: Further candidates, one vector each.
        hard_negative_turns: The turn that each hard negative was given for. It is also a negative of every turn of
            other samples, but of no other turn of its own sample.
        hard_negative_ids: The ``target_ids`` of the hard negatives; needed where ``target_ids`` are given.
    Returns:
        Scalar; log(1 + number of allowed negatives), averaged over turns, when all vectors are equal.
    Raises:
        ValueError: If ``temperature`` is not positive, the lengths differ, or there is no turn.
    Memory: one [turns, turns + hard] float32 matrix.
    Source: arXiv 2602.06393, the MuCo loss and Figure 3 (logit masking).
    """
    _check(query, target, sample_ids, temperature, target_ids)
    scores = _scores(query, target, temperature)  # [T, T]
    allowed = allowed_negatives(sample_ids, target_ids)
    labels = torch.arange(len(query), device=query.device)
    forward_scores, forward_allowed = scores, allowed
    if hard_negatives is not None and len(hard_negatives):
        if hard_negative_turns is None or (target_ids is not None and hard_negative_ids is None):
            raise ValueError(
                "hard_negatives need hard_negative_turns, and hard_negative_ids where target_ids are given"
            )
        hard_allowed = allowed_hard_negatives(sample_ids, hard_negative_turns, target_ids, hard_negative_ids)
        forward_scores = torch.cat([scores, _scores(query, hard_negatives, temperature)], dim=1)
        forward_allowed = torch.cat([allowed, hard_allowed], dim=1)
    loss = _masked_cross_entropy(forward_scores, forward_allowed, labels)
    if symmetric:
        loss = (loss + _masked_cross_entropy(scores.T, allowed.T, labels)) / 2
    return loss


def _scores(query: Tensor, candidates: Tensor, temperature: float) -> Tensor:
    device = query.device.type
    known = torch.amp.is_autocast_available(device)  # not on the meta device
    with torch.autocast(device, enabled=False) if known else nullcontext():  # it would take the product in bfloat16
        return query.float() @ candidates.float().T / temperature


def _masked_cross_entropy(scores: Tensor, allowed: Tensor, labels: Tensor) -> Tensor:
    keep = allowed.clone()
    keep[labels, labels] = True  # the pair itself is the numerator
    return cross_entropy(scores.masked_fill(~keep, float("-inf")), labels)


def chance_level(sample_ids: Int[Tensor, " turns"], target_ids: Int[Tensor, " turns"] | None = None) -> float:
    """The loss in nats of a model that cannot tell its candidates apart: mean of log(1 + allowed negatives)."""
    allowed = allowed_negatives(sample_ids, target_ids).sum(dim=1)
    return torch.log1p(allowed.float()).mean().item()


def _check(query: Tensor, target: Tensor, sample_ids: Tensor, temperature: float, target_ids: Tensor | None) -> None:
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if query.shape != target.shape or query.ndim != 2:
        raise ValueError(f"query and target must both be [turns, dim], got {[*query.shape]} and {[*target.shape]}")
    if not len(query):
        raise ValueError("a loss needs at least one turn, got none")
    for name, ids in (("sample_ids", sample_ids), ("target_ids", target_ids)):
        if ids is not None and len(ids) != len(query):
            raise ValueError(f"{name} must have one entry per turn: {len(query)} turns, {len(ids)} entries")


class MultiTurnLoss(nn.Module):
    """Embeds a training batch with ``model`` and applies :func:`multi_turn_info_nce`.

    The model is called twice, once per side; each call yields one vector per turn in batch order.
    """

    def __init__(self, model: nn.Module, *, temperature: float = 0.02, symmetric: bool = False) -> None:
        super().__init__()
        self.model = model
        self.temperature = temperature
        self.symmetric = symmetric

    def forward(self, sides: list[dict[str, Tensor]], ids: dict[str, Tensor]) -> Tensor:
        query, vectors = (self.model(side)["sentence_embedding"] for side in sides)
        # hard negatives stand behind the targets, each a dialogue of its own
        targets = len(vectors) - len(ids.get("hard_negative_turns", ()))
        return multi_turn_info_nce(
            query,
            vectors[:targets][ids["target_rows"]],
            ids["sample_ids"],
            temperature=self.temperature,
            target_ids=ids.get("target_ids"),
            symmetric=self.symmetric,
            hard_negatives=vectors[targets:],
            hard_negative_turns=ids.get("hard_negative_turns"),
            hard_negative_ids=ids.get("hard_negative_ids"),
        )
