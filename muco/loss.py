"""The losses of a batch over the turns of all processes: modules around the functions of :mod:`muco.info_nce`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from muco.distributed import gather
from muco.info_nce import GuideVectors, multi_turn_info_nce, reconstruction_info_nce
from muco.negatives import TurnIds, Variety, why_no_negative
from muco.pooling import shortened
from muco.teacher import divergence
from muco.weighting import EQUAL, LEAST_TEMPERATURE, MOST_TEMPERATURE, Distillation, Guide, Weighting


class MultiTurnLoss(nn.Module):
    """The loss of a training batch: :func:`multi_turn_info_nce` over the turns of all processes.

    Called with the dialogues of both sides, it embeds them with ``model``; :meth:`of_vectors` takes vectors.

    Args:
        dimensions: The loss is the mean over vectors truncated to each of these dimensions and normalised again
            (Matryoshka, arXiv 2205.13147); empty: whole vectors only.
        mask_same_image, weighting: See :func:`multi_turn_info_nce`.
        guide, vectors_of: A guide, and what gives its vectors [n, guide] of contents by their ids [n]; without either,
            there is no guide.
        distillation: What turns with a teacher's scores learn from them; None: nothing.
        learnt: How many temperatures are learnt, from ``temperature`` on: none, one, or one per source of data. The
            parameter is log(1 / temperature) as in CLIP (arXiv 2103.00020), in float32; it is kept to
            LEAST_TEMPERATURE and MOST_TEMPERATURE.

    Attributes:
        counted: int64 [2], on this device: pairs of a turn and a negative since it was last set to None, and those
            left out by their score; over all dimensions and directions.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        temperature: float = 0.02,
        symmetric: bool = False,
        dimensions: Sequence[int] = (),
        mask_same_image: bool = True,
        weighting: Weighting = EQUAL,
        guide: Guide | None = None,
        vectors_of: Callable[[Tensor], Tensor] | None = None,
        distillation: Distillation | None = None,
        learnt: int = 0,
    ) -> None:
        super().__init__()
        self.model, self.dimensions = model, tuple(dimensions)
        self.log_scales = nn.Parameter(torch.full((learnt,), -math.log(temperature))) if learnt else None
        self.temperature, self.symmetric, self.mask_same_image = temperature, symmetric, mask_same_image
        self.weighting, self.distillation = weighting, distillation
        self.guide, self.vectors_of = guide, vectors_of
        self.counted: Tensor | None = None

    def forward(self, sides: Sequence[Mapping[str, Any]], ids: TurnIds) -> Tensor:
        query, target = (self.model.embed(side) for side in sides)
        return self.of_vectors(query, target, ids)

    def of_vectors(
        self, query: Float[Tensor, "queries dim"], vectors: Float[Tensor, "vectors dim"], ids: TurnIds
    ) -> Float[Tensor, ""]:
        """The loss over the turns of all processes, the same on each; only this process's vectors get a gradient.

        ``vectors`` are those of the target side: targets and hard negatives, as ``ids`` say.
        """
        query, vectors, ids = gather(query), gather(vectors), ids.gather()
        temperature = self._temperature(ids)
        parts = (*self.parts(query, vectors, ids), vectors[ids.hard_rows])
        sizes = self.dimensions or (None,)
        values = [self._value([shortened(part, size) for part in parts], ids, temperature) for size in sizes]
        return torch.stack(values).mean()

    def temperatures(self) -> list[float]:
        """Those in use: one, or one per source."""
        if self.log_scales is None:
            return [self.temperature]
        return self.log_scales.detach().neg().exp().clamp(LEAST_TEMPERATURE, MOST_TEMPERATURE).tolist()

    def _temperature(self, ids: TurnIds) -> float | Tensor:
        """Of every turn, with its graph where it is learnt."""
        if self.log_scales is None:
            return self.temperature
        with torch.no_grad():  # back to where it may be, so that it has a gradient there
            self.log_scales.clamp_(-math.log(MOST_TEMPERATURE), -math.log(LEAST_TEMPERATURE))
        own = self.log_scales[ids.sources] if len(self.log_scales) > 1 else self.log_scales.expand(len(ids))
        return own.neg().exp()

    def why_no_negative(self, parts: Sequence[Variety]) -> str:
        """Why this loss is 0 for a batch of these parts, whatever the model; "" where it is not."""
        return why_no_negative(parts, mask_same_image=self.mask_same_image)

    def parts(self, query: Tensor, vectors: Tensor, ids: TurnIds) -> tuple[Tensor, ...]:
        """The vectors that belong together, row by row: float32 [turns, dim] each."""
        return query, vectors[ids.target_rows]

    def _value(self, parts: Sequence[Tensor], ids: TurnIds, temperature: float | Tensor) -> Tensor:
        query, target, hard = parts
        taught, weights = self._taught(query, target, hard, ids, temperature)
        return taught + multi_turn_info_nce(
            query,
            target,
            ids.sample_ids,
            temperature=temperature,
            target_ids=ids.target_ids,
            symmetric=self.symmetric,
            hard_negatives=hard,
            hard_negative_turns=ids.hard_turns,
            hard_negative_ids=ids.hard_ids,
            mask_same_image=self.mask_same_image,
            weighting=self.weighting,
            guide=self._guided(ids),
            turn_weights=weights,
            count=self._count,
        )

    def _taught(
        self, query: Tensor, target: Tensor, hard: Tensor, ids: TurnIds, temperature: float | Tensor
    ) -> tuple[Tensor | float, Tensor | None]:
        """What turns with a teacher's scores add to the loss, and what the contrastive loss of each turn counts."""
        how = self.distillation
        if how is None or ids.target_scores is None or ids.hard_scores is None:
            return 0.0, None
        apart, has = divergence(
            query,
            target,
            hard,
            ids.hard_turns,
            ids.target_scores,
            ids.hard_scores,
            kind=how.kind,
            temperature=temperature if how.temperature is None else how.temperature,
            teacher_temperature=how.teacher_temperature,
        )
        share = how.weight * has.float()
        return (share * apart).sum() / len(query), 1 - share

    def _guided(self, ids: TurnIds) -> GuideVectors | None:
        if self.guide is None or self.vectors_of is None:
            return None
        vectors = (self.vectors_of(own) for own in (ids.query_keys, ids.target_keys, ids.hard_ids))
        return GuideVectors(*vectors, margin=self.guide.margin, relative=self.guide.relative)

    def _count(self, pairs: Tensor) -> None:
        self.counted = pairs if self.counted is None else self.counted + pairs


class ReconstructionLoss(MultiTurnLoss):
    """The mean of the four terms of :func:`reconstruction_info_nce` over the pairs of all processes.

    Vectors come in twos on either side: that of the content itself, then that of its reconstruction.

    Args:
        joint, mask_counterpart: See there.
    """

    def __init__(self, model: nn.Module, *, joint: bool = False, mask_counterpart: bool = True, **kwargs: Any) -> None:
        super().__init__(model, **kwargs)
        self.joint, self.mask_counterpart = joint, mask_counterpart

    def why_no_negative(self, parts: Sequence[Variety]) -> str:
        return "" if self.joint and not self.mask_counterpart else super().why_no_negative(parts)

    def parts(self, query: Tensor, vectors: Tensor, ids: TurnIds) -> tuple[Tensor, ...]:
        return query[0::2], query[1::2], vectors[ids.target_rows], vectors[ids.target_rows + 1]

    def _value(self, parts: Sequence[Tensor], ids: TurnIds, temperature: float | Tensor) -> Tensor:
        *sides, hard = parts
        terms = reconstruction_info_nce(
            *sides,
            hard_negatives=hard,
            temperature=temperature,
            joint=self.joint,
            sample_ids=ids.sample_ids,
            target_ids=ids.target_ids,
            hard_negative_pairs=ids.hard_turns,
            hard_negative_ids=ids.hard_ids,
            mask_counterpart=self.mask_counterpart,
            weighting=self.weighting,
            guide=self._guided(ids),
            count=self._count,
        )
        return torch.stack([*terms.values()]).mean()
