"""A sample with the turns chosen for a step -> rows of tokens and pixels and their ids, and of these a batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, NotRequired, TypedDict

import numpy as np

from muco.batch import DialogueBatch, stack
from muco.data.same import content_key, target_key
from muco.dialogue import Content, Positions, Sample, Turn, query_dialogue, target_dialogue
from muco.layout import TokenRow, prepare
from muco.negatives import SampleIds, TurnIds
from muco.processor import Processor
from muco.reconstruction import reconstruction_dialogues


class TrainingBatch(TypedDict):
    """The input of a training step, without sides if no sample can be used; hard negatives come behind the targets."""

    query: NotRequired[DialogueBatch]
    target: NotRequired[DialogueBatch]  # a hard negative is a dialogue by itself
    ids: TurnIds
    places: list[str]  # where the samples come from
    skipped: NotRequired[list[dict[str, Any]]]  # "step", "source", "row" and "reason" of what cannot be used
    left_out: NotRequired[int]  # turns left out of the whole step as duplicates; 0 but in one part


@dataclass(frozen=True)
class Chosen:
    """A turn with its paraphrases and hard negatives drawn."""

    query: Content
    target: Content
    negatives: tuple[Content, ...]
    scores: tuple[float, ...] = ()  # a teacher's, of the target and of each negative; empty: none

    @classmethod
    def of(cls, turn: Turn, rng: np.random.Generator, negatives: int | None = None) -> Chosen:
        """Draws by ``rng``; at most ``negatives`` hard negatives, all if None."""
        query, target = (side[rng.integers(len(side))] for side in (turn.query, turn.target))
        if negatives is None or len(turn.negatives) <= negatives:
            return cls(query, target, turn.negatives, turn.scores)
        drawn = rng.permutation(len(turn.negatives))[:negatives]
        own = [turn.scores[number] for number in (0, *(drawn + 1))] if turn.scores and negatives else []
        return cls(query, target, tuple(turn.negatives[number] for number in drawn), tuple(own))


@dataclass(frozen=True)
class Prepared:
    """A sample as rows of tokens and pixels, and what the loss has to know of its turns."""

    place: str
    query: TokenRow
    target: TokenRow  # one dialogue; isolated targets that occur twice in it are embedded once
    hard: list[TokenRow]  # a dialogue per hard negative
    ids: SampleIds


def prepare_turns(
    sample: Sample,
    turns: Sequence[Chosen],
    key: Any,
    processor: Processor,
    *,
    isolated: bool,
    isolated_targets: bool | None = None,
    positions: Positions | None = None,
    source: int = 0,
    guided: bool = False,
) -> Prepared:
    """A sample with these turns; a DataError if a text or an image cannot be used.

    Args:
        isolated_targets: None: as the queries.
        key: From :func:`muco.data.same.sample_key`.
        source: The number of its source.
        guided: Whether a guide will be asked about the queries, by their keys.
        positions: See :class:`muco.dialogue.Dialogue`.
    """
    alone = isolated if isolated_targets is None else isolated_targets
    own = [turn.target for turn in turns]
    places: dict[Any, int] = {}  # of distinct targets; compounded turns see those before them, so all are distinct
    keys = [content_key(content, sample.place) if alone else turn for turn, content in enumerate(own)]
    rows = [places.setdefault(content, len(places)) for content in keys]
    unique = [own[rows.index(place)] for place in range(len(places))]
    return Prepared(
        sample.place,
        prepare(
            query_dialogue(sample, [turn.query for turn in turns], isolated=isolated, positions=positions), processor
        ),
        prepare(target_dialogue(sample, unique, isolated=alone, positions=positions), processor),
        _hard_negatives(sample, turns, processor, isolated=alone),
        _ids(sample, turns, key, rows, vectors=len(unique), source=source, guided=guided),
    )


def prepare_pair(
    sample: Sample,
    turn: Chosen,
    rng: np.random.Generator,
    key: Any,
    processor: Processor,
    *,
    requests: Sequence[str] = (),
    source: int = 0,
    guided: bool = False,
) -> Prepared:
    """A pair as dialogues of two turns, see :func:`muco.reconstruction.reconstruction_dialogues`."""
    query, target = reconstruction_dialogues(sample, turn.query, turn.target, rng, requests)
    return Prepared(
        sample.place,
        prepare(query, processor),
        prepare(target, processor),
        _hard_negatives(sample, [turn], processor, isolated=True),
        _ids(sample, [turn], key, [0], vectors=2, source=source, guided=guided),
    )


def _hard_negatives(sample: Sample, turns: Sequence[Chosen], processor: Processor, *, isolated: bool) -> list[TokenRow]:
    dialogues = (target_dialogue(sample, [own], isolated=isolated) for turn in turns for own in turn.negatives)
    return [prepare(dialogue, processor) for dialogue in dialogues]


def query_keys(sample: Sample, queries: Sequence[Content]) -> list[int]:
    """Equal for queries of the same text about the same images; those of the sample are read once."""
    _, about = content_key(Content("", sample.images), sample.place)
    own = (content_key(query, sample.place) for query in queries)
    return [_hash((text, (*about, *images))) for text, images in own]


def target_id(sample: Sample, target: Content) -> int:
    """Equal for targets that are right or wrong together."""
    return _hash(target_key(target, sample.place))


def _ids(
    sample: Sample,
    turns: Sequence[Chosen],
    key: Any,
    target_rows: Sequence[int],
    *,
    vectors: int,
    source: int,
    guided: bool,
) -> SampleIds:
    return SampleIds(
        _hash(key),
        target_rows,
        target_ids=[target_id(sample, turn.target) for turn in turns],
        hard_turns=[number for number, turn in enumerate(turns) for _ in turn.negatives],
        hard_ids=[target_id(sample, content) for turn in turns for content in turn.negatives],
        vectors=vectors,
        source=source,
        query_keys=query_keys(sample, [turn.query for turn in turns]) if guided else (),
        target_scores=[turn.scores[0] if turn.scores else math.nan for turn in turns],
        hard_scores=[s for turn in turns for s in turn.scores[1:] or [math.nan] * len(turn.negatives)],
    )


def batch_of(samples: Sequence[Prepared], processor: Processor, *, target_ids: bool) -> TrainingBatch:
    """Both sides of some samples as batches, and the loss's index tensors; ``target_ids`` marks identical targets."""
    batch: TrainingBatch = {
        "ids": TurnIds.of([sample.ids for sample in samples], mask_identical_targets=target_ids),
        "places": [sample.place for sample in samples],
    }
    if samples:
        hard = [row for sample in samples for row in sample.hard]
        batch["query"] = stack([sample.query for sample in samples], processor)
        batch["target"] = stack([*(sample.target for sample in samples), *hard], processor)
    return batch


def hide_pixels(batch: TrainingBatch) -> None:
    """Replaces every pixel of a batch by a constant, in place."""
    sides = [batch["query"], batch["target"]] if "query" in batch else []
    tensors = (tensor for side in sides for image in side.get("images", ()) for tensor in image.values())
    for tensor in tensors:
        if tensor.is_floating_point():  # the others are sizes and masks
            tensor.fill_(-1.0)  # zero could mean padding to a family


def _hash(value: Any) -> int:
    """63 bits that are the same for equal values in every process."""
    return int.from_bytes(blake2b(repr(value).encode(), digest_size=8).digest()) >> 1
