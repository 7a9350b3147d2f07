"""The contrastive loss over turns: a pure function of embeddings and index tensors, and a thin module around it.

Letters: T turns of all samples of the batch · H hard negatives · D embedding dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from muco.distributed import gather, rank
from muco.negatives import allowed_hard_negatives, allowed_negatives
from muco.pooling import shortened


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
    Memory: blocks of a [turns, turns + hard] float32 matrix, of 256 MiB each.
    Source: arXiv 2602.06393, the MuCo loss and Figure 3 (logit masking).
    """
    _check(query, target, sample_ids, temperature, target_ids)
    if hard_negatives is not None and (
        hard_negative_turns is None or (target_ids is not None and hard_negative_ids is None)
    ):
        raise ValueError("hard_negatives need hard_negative_turns, and hard_negative_ids where target_ids are given")
    candidates = target if hard_negatives is None else torch.cat([target, hard_negatives.to(target.dtype)])

    def forward_negatives(rows: slice) -> Tensor:
        allowed = allowed_negatives(sample_ids, target_ids, rows)
        if hard_negatives is None:
            return allowed
        hard = allowed_hard_negatives(sample_ids, hard_negative_turns, target_ids, hard_negative_ids, rows)
        return torch.cat([allowed, hard], dim=1)

    def backward_negatives(rows: slice) -> Tensor:
        return allowed_negatives(sample_ids, target_ids, rows)

    loss = _info_nce(query, candidates, forward_negatives, temperature)
    if symmetric:
        loss = (loss + _info_nce(target, query, backward_negatives, temperature)) / 2
    return loss


BLOCK = 1 << 26  # scores that are held at a time: 256 MiB


def _info_nce(anchors: Tensor, candidates: Tensor, negatives: Callable[[slice], Tensor], temperature: float) -> Tensor:
    """Mean cross-entropy of anchor i against candidate i and its allowed negatives, in blocks of anchors."""
    size = max(1, BLOCK // len(candidates))

    def block(rows: slice) -> Tensor:
        own = torch.arange(rows.start, rows.stop, device=anchors.device)
        keep = negatives(rows)
        keep[own - rows.start, own] = True  # the pair itself is the numerator
        scores = _scores(anchors[rows], candidates, temperature).masked_fill(~keep, float("-inf"))
        return cross_entropy(scores, own, reduction="sum")

    blocks = [slice(start, min(start + size, len(anchors))) for start in range(0, len(anchors), size)]
    if len(blocks) == 1:
        return block(blocks[0]) / len(anchors)
    # the scores of a block are computed again in backward, so that one block at a time is all that is ever held
    return sum(checkpoint(block, rows, use_reentrant=False) for rows in blocks) / len(anchors)


def _scores(query: Tensor, candidates: Tensor, temperature: float) -> Tensor:
    device = query.device.type
    known = torch.amp.is_autocast_available(device)  # not on the meta device
    with torch.autocast(device, enabled=False) if known else nullcontext():  # it would take the product in bfloat16
        return query.float() @ candidates.float().T / temperature


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
    """The loss of a training batch: :func:`multi_turn_info_nce` over the turns of all processes.

    Called with dialogues it embeds them with ``model``, twice, once per side; :meth:`of_vectors` takes vectors.

    Args:
        dimensions: The loss is the mean over vectors cut to their first so many numbers and normalised again
            (Matryoshka, arXiv 2205.13147); empty for whole vectors only.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        temperature: float = 0.02,
        symmetric: bool = False,
        dimensions: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.model = model
        self.temperature = temperature
        self.symmetric = symmetric
        self.dimensions = tuple(dimensions)

    def forward(self, sides: list[dict[str, Tensor]], ids: dict[str, Tensor]) -> Tensor:
        query, target = (self.model(side)["sentence_embedding"] for side in sides)
        return self.of_vectors(query, target, ids)

    def of_vectors(
        self, query: Float[Tensor, "turns dim"], vectors: Float[Tensor, "vectors dim"], ids: dict[str, Tensor]
    ) -> Float[Tensor, ""]:
        """The loss over the turns of all processes, the same value on each; only the own vectors get a gradient.

        Args:
            query: One vector per turn of this process.
            vectors: All vectors of the target side: targets and hard negatives, as ``ids`` say.
            ids: From :func:`muco.train.mixture.training_batch`.
        """
        own_turns = torch.tensor([len(query)], device=query.device)
        first = int(gather(own_turns)[: rank()].sum())  # turns of the processes before this one
        query, target = gather(query), gather(vectors[ids["target_rows"]])
        sample_ids = gather(ids["sample_ids"])
        target_ids = gather(ids["target_ids"]) if "target_ids" in ids else None
        hard = gather(vectors[ids["hard_negative_rows"]])
        hard_turns, hard_ids = gather(ids["hard_negative_turns"] + first), gather(ids["hard_negative_ids"])
        some = len(hard) > 0
        losses = [
            multi_turn_info_nce(
                shortened(query, dimension),
                shortened(target, dimension),
                sample_ids,
                temperature=self.temperature,
                target_ids=target_ids,
                symmetric=self.symmetric,
                hard_negatives=shortened(hard, dimension) if some else None,
                hard_negative_turns=hard_turns if some else None,
                hard_negative_ids=hard_ids if some else None,
            )
            for dimension in self.dimensions or (None,)
        ]
        return torch.stack(losses).mean()
