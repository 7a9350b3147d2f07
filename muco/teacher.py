"""A teacher's scores: how far the model's distribution over a turn's own candidates is from the teacher's."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def divergence(
    query: Float[Tensor, "turns dim"],
    target: Float[Tensor, "turns dim"],
    hard_negatives: Float[Tensor, "hard dim"],
    hard_negative_turns: Int[Tensor, " hard"],
    target_scores: Float[Tensor, " turns"],
    hard_scores: Float[Tensor, " hard"],
    *,
    kind: Literal["kl", "symmetric_kl", "margin_mse"] = "kl",
    temperature: float | Float[Tensor, " turns"] = 0.02,
    teacher_temperature: float = 1.0,
) -> tuple[Float[Tensor, " turns"], Bool[Tensor, " turns"]]:
    """The divergence of each turn, and which turns have one.

    With P the softmax of the teacher's scores over the target and the turn's own hard negatives, divided by
    ``teacher_temperature``, and Q that of the model's cosines s, divided by ``temperature``: "kl" is KL(P || Q),
    "symmetric_kl" the mean of KL(P || Q) and KL(Q || P), in nats. "margin_mse" is the mean over the negatives k of
    ((s_0 - s_k) - (t_0 - t_k) / teacher_temperature)².

    Args:
        query, target: One vector per turn, L2-normalised.
        hard_negatives: Further candidates, each of the turn that ``hard_negative_turns`` names.
        target_scores, hard_scores: The teacher's; NaN where there is none.
    Returns:
        0 and False for a turn without a hard negative, or where one of its scores is missing.
    Source: Hinton et al., arXiv 1503.02531; the kinds, see :class:`muco.weighting.Distillation`.
    """
    turns, groups = len(query), torch.cat([torch.arange(len(query), device=query.device), hard_negative_turns])
    own = (query.float() * target.float()).sum(1)
    others = (query.float()[hard_negative_turns] * hard_negatives.float()).sum(1)
    taught = torch.cat([target_scores, hard_scores]).float()
    negatives = torch.zeros(turns, device=query.device).index_add(0, hard_negative_turns, torch.ones_like(others))
    missing = torch.zeros_like(negatives).index_add(0, groups, (~taught.isfinite()).float())
    has = (negatives > 0) & (missing == 0)
    taught = torch.where(has[groups], taught, 0.0) / teacher_temperature  # a NaN that is multiplied by 0 is one still
    if kind == "margin_mse":
        lead = own[hard_negative_turns] - others - (taught[:turns][hard_negative_turns] - taught[turns:])
        total = torch.zeros_like(own).index_add(0, hard_negative_turns, lead**2)
        return torch.where(has, total / negatives.clamp(min=1), 0.0), has
    if isinstance(temperature, Tensor):
        temperature = temperature[groups]
    log_q = _log_softmax(torch.cat([own, others]) / temperature, groups, turns)
    log_p = _log_softmax(taught, groups, turns)
    difference = log_p.exp() * (log_p - log_q)
    if kind == "symmetric_kl":
        difference = (difference + log_q.exp() * (log_q - log_p)) / 2
    return torch.where(has, torch.zeros_like(own).index_add(0, groups, difference), 0.0), has


def _log_softmax(values: Tensor, groups: Tensor, count: int) -> Tensor:
    """Of values within their groups, 0 to ``count`` - 1; stable however far values are apart."""
    most = torch.full((count,), float("-inf"), device=values.device).scatter_reduce(0, groups, values.detach(), "amax")
    shifted = values - most[groups]
    total = torch.zeros(count, device=values.device).index_add(0, groups, shifted.exp())
    return shifted - total.log()[groups]
