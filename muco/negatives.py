"""Which candidate may be a negative of which turn. Boolean matrices, rows are turns, columns candidates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from muco.distributed import gather, rank, world_size


@dataclass(frozen=True)
class SampleIds:
    """What the loss needs to know about one sample of a batch, see :class:`TurnIds`."""

    sample_id: int
    target_rows: Sequence[int]  # for each turn, its vector among those of the sample's target dialogue
    target_ids: Sequence[int]
    hard_turns: Sequence[int]
    hard_ids: Sequence[int]
    vectors: int  # how many the target dialogue has
    source: int = 0  # the number of the source that the sample is from
    query_keys: Sequence[int] = ()  # equal for queries of the same text and images; empty: not known
    target_scores: Sequence[float] = ()  # a teacher's, for each turn; NaN where there is none. Empty: for no turn
    hard_scores: Sequence[float] = ()  # the same for each hard negative


@dataclass(frozen=True)
class TurnIds:
    """The index tensors of the loss, int64: where the vectors of the turns are, and what counts as the same.

    The ids of samples and contents are hashes, so batches of several processes can be put together. A pair trained by
    reconstruction is one turn of two vectors on either side, which follow one another.
    """

    sample_ids: Int[Tensor, " turns"]  # equal for turns whose targets are not negatives of one another
    target_rows: Int[Tensor, " turns"]  # the (first) vector of each turn on the target side
    hard_rows: Int[Tensor, " hard"]  # the vector of each hard negative, also on the target side
    hard_turns: Int[Tensor, " hard"]  # the turn that each hard negative belongs to
    hard_ids: Int[Tensor, " hard"]  # the target_ids of the hard negatives
    target_ids: Int[Tensor, " turns"] | None  # equal for identical targets; None if these are negatives of one another
    vectors: int  # how many the target side has
    sources: Int[Tensor, " turns"] | None = None  # the number of each turn's source
    query_keys: Int[Tensor, " turns"] | None = None  # equal for equal queries, and for equal targets, by which
    target_keys: Int[Tensor, " turns"] | None = None  # side data of contents is found
    target_scores: Float[Tensor, " turns"] | None = None  # a teacher's scores; NaN where there is none
    hard_scores: Float[Tensor, " hard"] | None = None

    def __len__(self) -> int:
        return len(self.sample_ids)

    @classmethod
    def of(cls, samples: Sequence[SampleIds], *, mask_identical_targets: bool = True) -> TurnIds:
        """The ids of a batch of samples, whose hard negatives come after the targets of all of them."""
        sample_ids, target_rows, target_ids, hard_turns, hard_ids, sources = ([] for _ in range(6))
        queries: list[int] = []
        scores: list[float] = []
        of_hard: list[float] = []
        vectors = 0
        for sample in samples:
            queries += sample.query_keys or [0] * len(sample.target_ids)
            scores += sample.target_scores or [math.nan] * len(sample.target_ids)
            of_hard += sample.hard_scores or [math.nan] * len(sample.hard_ids)
            target_rows += [vectors + row for row in sample.target_rows]
            hard_turns += [len(sample_ids) + turn for turn in sample.hard_turns]
            sample_ids += [sample.sample_id] * len(sample.target_ids)
            target_ids += sample.target_ids
            hard_ids += sample.hard_ids
            sources += [sample.source] * len(sample.target_ids)
            vectors += sample.vectors
        hard_rows = [vectors + number for number in range(len(hard_ids))]
        lists = (sample_ids, target_rows, hard_rows, hard_turns, hard_ids, target_ids, sources, queries)
        tensors = (torch.tensor(values, dtype=torch.long) for values in lists)
        own, targets, hard, turns, marks, alike, origins, asked = tensors
        return cls(
            sample_ids=own,
            target_rows=targets,
            hard_rows=hard,
            hard_turns=turns,
            hard_ids=marks,
            target_ids=alike if mask_identical_targets else None,
            vectors=vectors + len(hard_ids),
            sources=origins,
            query_keys=asked,
            target_keys=alike,
            target_scores=torch.tensor(scores, dtype=torch.float32),
            hard_scores=torch.tensor(of_hard, dtype=torch.float32),
        )

    @classmethod
    def join(cls, parts: Sequence[TurnIds]) -> TurnIds:
        """The ids of a batch that comes in parts, whose vectors are joined in the same order."""
        shifted = []
        turns = vectors = 0
        for part in parts:
            shifted.append(part._after(turns, vectors))
            turns, vectors = turns + len(part), vectors + part.vectors
        joined = {name: torch.cat([getattr(part, name) for part in shifted]) for name in parts[0]._tensors()}
        return replace(parts[0], vectors=vectors, **joined)

    def gather(self) -> TurnIds:
        """The ids of all processes, in their order, for vectors that are gathered too."""
        if world_size() == 1:
            return self
        counts = gather(torch.tensor([[len(self), self.vectors]], device=self.sample_ids.device))
        own = self._after(*counts[: rank()].sum(dim=0).tolist())
        gathered = {name: gather(tensor) for name, tensor in own._tensors().items()}
        return replace(own, vectors=int(counts[:, 1].sum()), **gathered)

    def to(self, device: torch.device | str) -> TurnIds:
        return replace(self, **{name: tensor.to(device) for name, tensor in self._tensors().items()})

    def _after(self, turns: int, vectors: int) -> TurnIds:
        """The same ids where this many turns and vectors come before."""
        rows = {"target_rows": self.target_rows + vectors, "hard_rows": self.hard_rows + vectors}
        return replace(self, hard_turns=self.hard_turns + turns, **rows)

    def _tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}


def allowed_negatives(
    sample_ids: Int[Tensor, " turns"],
    target_ids: Int[Tensor, " turns"] | None = None,
    rows: slice = slice(None),
    *,
    mask_same_image: bool = True,
) -> Bool[Tensor, "rows turns"]:
    """True where the target of turn j is a negative of turn i; ``rows`` selects some turns.

    Not allowed are targets of the same sample (the paper's logit mask: they answer other questions about the image, and
    may well fit this one; allowed without ``mask_same_image``, to show what the mask is for) and, with ``target_ids``,
    targets identical to the turn's own: "Ring" of another image is a right answer.
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
    """True where a hard negative is a negative of turn i: of its own turn, and of all turns of other samples, but with
    both ids not where it is identical to the turn's target. ``rows`` selects some turns.
    """
    turns = torch.arange(len(sample_ids), device=sample_ids.device)
    allowed = turns[rows, None] == hard_negative_turns[None, :]
    allowed = allowed | (sample_ids[rows, None] != sample_ids[hard_negative_turns][None, :])
    if target_ids is not None and hard_negative_ids is not None:
        allowed = allowed & (target_ids[rows, None] != hard_negative_ids[None, :])
    return allowed


@dataclass(frozen=True)
class Variety:
    """What a part of a batch holds of different things: enough to say whether any turn of the batch has a negative."""

    turns: int
    samples: frozenset[int]  # up to two different ids
    targets: frozenset[int] | None  # the same; None where identical targets are not marked
    hard: bool  # whether a turn has a hard negative that is not its own target

    @classmethod
    def of(cls, ids: TurnIds) -> Variety:
        """The variety of a part, whose ids are on the CPU."""
        targets, owners = ids.target_ids, ids.hard_turns
        hard = torch.ones(len(owners)) if targets is None else targets[owners] != ids.hard_ids
        two = None if targets is None else frozenset(targets.unique()[:2].tolist())
        return cls(len(ids), frozenset(ids.sample_ids.unique()[:2].tolist()), two, bool(hard.any()))


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
