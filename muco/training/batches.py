"""From the samples of a step to what the model and the loss take: dialogues, tokens, pixels and index tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import islice
from typing import Any, NotRequired, TypedDict

import numpy as np
from torch.utils.data import DataLoader, Dataset, Sampler

from muco.batch import DialogueBatch, stack
from muco.data.images import SameImage
from muco.data.same import content_key, sample_key, target_key
from muco.data.source import Data
from muco.dialogue import Content, Positions, Sample, Turn, query_dialogue, target_dialogue
from muco.errors import DataError
from muco.layout import Row, prepare
from muco.negatives import SampleIds, TurnIds
from muco.processor import Processor
from muco.reconstruction import reconstruction_dialogues
from muco.training.mixture import Draw, Mixture, Purpose, generator, turn_order
from muco.training.recipe import TurnsRecipe

PART = 32  # samples that are prepared and sent to training together


class TrainingBatch(TypedDict):
    """What a training step takes.

    ``query`` and ``target`` are missing if no sample can be used. Hard negatives come behind the targets, one dialogue
    each.
    """

    query: NotRequired[DialogueBatch]
    target: NotRequired[DialogueBatch]
    ids: TurnIds
    places: list[str]  # where the samples come from
    skipped: NotRequired[list[dict[str, Any]]]  # "step", "source", "row" and "reason" of what cannot be used
    left_out: NotRequired[int]  # turns left out of the whole step as duplicates; 0 but in one part


@dataclass(frozen=True)
class Numbered:
    """A sample of a step and its number there, with those of its chosen turns that are trained; None: all of them."""

    number: int
    draw: Draw
    turns: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Share:
    """One process's samples of a step, and how many turns of the whole step are left out as duplicates."""

    samples: Sequence[Numbered]
    left_out: int


class TrainingBatches(Dataset):
    """Item n is this process's share of the batch of step n; item (n, p) is part p of it.

    A step comes in parts so that the images of a large batch never are in memory together.

    Args:
        skip_broken: Leave out samples that cannot be used, whatever is wrong with them, and say so in the item.
        leave_out_duplicates: Train a duplicated target or image only once per step.
        blind: Replace every pixel by a constant.
        rank, world_size: Of several processes each takes every ``world_size``-th sample.
    """

    def __init__(
        self,
        sources: Sequence[Data],
        mixture: Mixture,
        processor: Processor,
        turns: TurnsRecipe,
        *,
        seed: int = 0,
        mask_identical_targets: bool = True,
        skip_broken: bool = False,
        leave_out_duplicates: bool = False,
        blind: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.sources, self.mixture, self.processor, self.turns = sources, mixture, processor, turns
        self.seed, self.mask_identical_targets = seed, mask_identical_targets
        self.skip_broken, self.leave_out_duplicates, self.blind = skip_broken, leave_out_duplicates, blind
        self.rank, self.world_size = rank, world_size
        self._share: tuple[int, Share] | None = None  # of the last step asked for

    @property
    def parts(self) -> int:
        """Parts per step."""
        return -(-len(range(self.rank, self.mixture.batch_size, self.world_size)) // PART)

    def __getitem__(self, key: int | tuple[int, int]) -> TrainingBatch | None:
        """The item; None for a part that duplicates leave with no sample at all."""
        step, part = key if isinstance(key, tuple) else (key, None)
        share = self.share(step)
        own = share.samples if part is None else share.samples[part * PART : (part + 1) * PART]
        if not own:
            return None
        batch = self._batch(own, step)
        if self.rank == 0 and not part:  # the same on every process and in every part, so counted once
            batch["left_out"] = share.left_out
        return batch

    def share(self, step: int) -> Share:
        """The samples of a step that this process prepares; found once for all parts of a step."""
        if self._share is None or self._share[0] != step:
            self._share = step, self._found(step)
        return self._share[1]

    def _found(self, step: int) -> Share:
        draws = [Numbered(number, draw) for number, draw in enumerate(self.mixture.draws(step))]
        left_out = 0
        if self.leave_out_duplicates:
            draws, left_out = self._distinct(draws, step)
            self._enough(len(draws), step)
        return Share(draws[self.rank :: self.world_size], left_out)

    def _batch(self, own: Sequence[Numbered], step: int) -> TrainingBatch:
        prepared, skipped = [], []
        for one in own:
            try:
                prepared.append(self._prepared(one, step))
            except DataError as error:
                if not self.skip_broken:
                    raise
                row = {"source": one.draw.source, "row": one.draw.index}
                skipped.append({"step": step, **row, "reason": str(error)})
        batch = batch_of(prepared, self.processor, target_ids=self.mask_identical_targets)
        if self.blind:
            hide_pixels(batch)
        return batch | {"skipped": skipped, "left_out": 0}

    def _distinct(self, numbered: Sequence[Numbered], step: int) -> tuple[list[Numbered], int]:
        """The samples of a step, with those of their turns that are trained if no image and no target comes twice.

        Every process finds the same. This reads the rows of the whole step, and images only where two have equally
        many bytes.

        Returns:
            Samples with at least one turn; and how many turns are left out.
        """
        distinct: list[Numbered] = []
        keys, targets, left_out = set[Any](), set[Any](), 0
        for one in numbered:
            try:
                sample, turns = self._chosen(one.draw, one.number, step)
                key = sample_key(sample, one.draw.source, one.draw.index, image_key=SameImage)
                own = [target_key(turn.target, sample.place, image_key=SameImage) for turn in turns]
                new = [] if key in keys else [turn for turn, target in enumerate(own) if target not in targets]
            except DataError:
                distinct.append(replace(one, turns=(0,)))  # the process that owns the sample reports the error
                continue
            left_out += len(turns) - len(new)
            keys.add(key)
            targets.update(own[turn] for turn in new)
            if new:
                distinct.append(replace(one, turns=tuple(new)))
        return distinct, left_out

    def _enough(self, samples: int, step: int) -> None:
        if samples < self.world_size:
            raise DataError(
                f"step {step}: without duplicates {self.mixture.batch_size} samples leave {samples}, fewer than there "
                "are processes; set data.duplicates: mask"
            )

    def _prepared(self, one: Numbered, step: int) -> Prepared:
        """A sample by itself, so that what is wrong with it concerns no other."""
        draw = one.draw
        sample, turns = self._chosen(draw, one.number, step)
        if one.turns is not None:
            turns = [turns[turn] for turn in one.turns]
        key = sample_key(sample, draw.source, draw.index)
        if self.turns.mode == "reconstruction":
            rng = generator(self.seed, Purpose.MASKS, draw.source, draw.position)
            return prepare_pair(sample, turns[0], rng, key, self.processor, requests=self.turns.requests)
        isolated = self.turns.mode == "isolated"
        return prepare_turns(sample, turns, key, self.processor, isolated=isolated, positions=self.turns.positions)

    def _sample(self, draw: Draw) -> Sample:
        sample = self.sources[draw.source][draw.index]
        return with_image_turn(sample, self.turns.image_turn) if self.turns.image_turn else sample

    def _chosen(self, draw: Draw, row: int, step: int) -> tuple[Sample, list[Chosen]]:
        sample = self._sample(draw)
        order = turn_order(len(sample.turns), draw, row, step, self.turns, self.seed)
        if self.turns.mode == "reconstruction":
            order = order[:1]
        rng = generator(self.seed, Purpose.WORDING, draw.source, draw.position)
        return sample, [Chosen.of(sample.turns[turn], rng, self.turns.negatives) for turn in order]


def with_image_turn(sample: Sample, kind: str) -> Sample:
    """Adds the turn (image alone, target of the turn of this kind); samples without image or kind stay as they are."""
    described = next((turn for turn in sample.turns if turn.kind == kind), None)
    if described is None or not sample.images:
        return sample
    return sample.with_turns([*sample.turns, Turn(query="", target=described.target, kind="image")])


@dataclass(frozen=True)
class Chosen:
    """A turn with its paraphrases and hard negatives drawn."""

    query: Content
    target: Content
    negatives: tuple[Content, ...]

    @classmethod
    def of(cls, turn: Turn, rng: np.random.Generator, negatives: int | None = None) -> Chosen:
        """Draws by ``rng``; at most ``negatives`` hard negatives, all if None."""
        query, target = (side[rng.integers(len(side))] for side in (turn.query, turn.target))
        if negatives is None or len(turn.negatives) <= negatives:
            return cls(query, target, turn.negatives)
        drawn = rng.permutation(len(turn.negatives))[:negatives]
        return cls(query, target, tuple(turn.negatives[number] for number in drawn))


@dataclass(frozen=True)
class Prepared:
    """A sample as rows of tokens and pixels, and what the loss has to know of its turns.

    Args:
        target: One dialogue; isolated targets that occur twice in it are embedded once.
        hard: A dialogue per hard negative.
    """

    place: str
    query: Row
    target: Row
    hard: list[Row]
    ids: SampleIds


def prepare_turns(
    sample: Sample,
    turns: Sequence[Chosen],
    key: Any,
    processor: Processor,
    *,
    isolated: bool,
    positions: Positions | None = None,
) -> Prepared:
    """A sample with these turns.

    Args:
        key: Of any kind; see :func:`muco.data.same.sample_key`.
        positions: See :class:`muco.dialogue.Dialogue`.
    Raises:
        DataError: If a text or an image cannot be used.
    """
    own = [turn.target for turn in turns]
    places: dict[Any, int] = {}  # of distinct targets; compounded turns see those before them, so all are distinct
    keys = [content_key(content, sample.place) if isolated else turn for turn, content in enumerate(own)]
    rows = [places.setdefault(content, len(places)) for content in keys]
    unique = [own[rows.index(place)] for place in range(len(places))]
    seen = {"isolated": isolated, "positions": positions}
    return Prepared(
        sample.place,
        prepare(query_dialogue(sample, [turn.query for turn in turns], **seen), processor),
        prepare(target_dialogue(sample, unique, **seen), processor),
        _hard_negatives(sample, turns, processor, isolated=isolated),
        _ids(sample, turns, key, rows, vectors=len(unique)),
    )


def prepare_pair(
    sample: Sample,
    turn: Chosen,
    rng: np.random.Generator,
    key: Any,
    processor: Processor,
    *,
    requests: Sequence[str] = (),
) -> Prepared:
    """A pair as dialogues of two turns, itself and its reconstruction, see :mod:`muco.reconstruction`.

    Args:
        rng: Decides on the masks.
        requests: See :func:`muco.reconstruction.reconstruction_dialogues`.
    """
    query, target = reconstruction_dialogues(sample, turn.query, turn.target, rng, requests)
    return Prepared(
        sample.place,
        prepare(query, processor),
        prepare(target, processor),
        _hard_negatives(sample, [turn], processor, isolated=True),
        _ids(sample, [turn], key, [0], vectors=2),
    )


def _hard_negatives(sample: Sample, turns: Sequence[Chosen], processor: Processor, *, isolated: bool) -> list[Row]:
    given = [content for turn in turns for content in turn.negatives]
    return [prepare(target_dialogue(sample, [content], isolated=isolated), processor) for content in given]


def _ids(sample: Sample, turns: Sequence[Chosen], key: Any, target_rows: Sequence[int], vectors: int) -> SampleIds:
    def target_id(content: Content) -> int:
        return _hash(target_key(content, sample.place))

    return SampleIds(
        _hash(key),
        target_rows,
        target_ids=[target_id(turn.target) for turn in turns],
        hard_turns=[number for number, turn in enumerate(turns) for _ in turn.negatives],
        hard_ids=[target_id(content) for turn in turns for content in turn.negatives],
        vectors=vectors,
    )


def batch_of(samples: Sequence[Prepared], processor: Processor, *, target_ids: bool) -> TrainingBatch:
    """Both sides of some samples as batches, and the index tensors of the loss.

    Args:
        target_ids: Whether identical targets are marked.
    """
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
    for side in ("query", "target"):
        if "pixel_values" in batch.get(side, ()):
            batch[side]["pixel_values"].fill_(-1.0)  # zero could mean padding to a family


def _hash(value: Any) -> int:
    """63 bits that are the same for equal values in every process."""
    return int.from_bytes(blake2b(repr(value).encode(), digest_size=8).digest()) >> 1


class PartSampler(Sampler[list[tuple[int, int]]]):
    """The keys of all parts of all steps, in order, from the step that ``first`` gives when it is asked."""

    def __init__(self, steps: int, parts: int, first: Callable[[], int]) -> None:
        self.steps, self.parts, self.first = steps, parts, first

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter([(step, part)] for step in range(self.first(), self.steps) for part in range(self.parts))

    def __len__(self) -> int:
        return self.steps * self.parts


class StepLoader:
    """Iterates over steps; each is {"parts": an iterator over its parts}, which must be used up before the next."""

    def __init__(self, parts: DataLoader) -> None:
        self.loader = parts
        self.sampler: PartSampler = parts.batch_sampler

    def __iter__(self) -> Iterator[dict[str, Any]]:
        parts = iter(self.loader)
        for _ in range(self.sampler.first(), self.sampler.steps):
            yield {"parts": islice(parts, self.sampler.parts)}

    def __len__(self) -> int:
        return self.sampler.steps
