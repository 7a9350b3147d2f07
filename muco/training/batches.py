"""From the samples of a step to what the model and the loss take: dialogues, tokens, pixels and index tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from muco.batch import Row, prepare, stack
from muco.data.images import SameImage
from muco.data.same import content_key, sample_key, target_key
from muco.data.source import Data
from muco.dialogue import Content, Positions, Sample, Turn, query_dialogue, target_dialogue
from muco.errors import DataError
from muco.processor import Processor
from muco.reconstruction import reconstruction_dialogues
from muco.training.mixture import Draw, Mixture, turn_order
from muco.training.recipe import TurnsRecipe

PART = 32  # samples that are prepared and sent to training together


class TrainingBatches(Dataset):
    """Item n is this process's share of the batch of step n; item (n, p) is part p of it.

    An item is that of :func:`batch_of`, and has ``skipped``, a dictionary for every sample that cannot be used, and
    ``left_out``, how many turns are left out as duplicates. A step comes in parts so that the images of a large batch
    never are in memory together.

    Args:
        skip_broken: Leave out samples that cannot be used, whatever is wrong with them, and say so in the item; one
            that is left with nothing has no dialogues.
        leave_out_duplicates: Train a target, or an image, that several samples of a step have with the first only.
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
        self._kept: tuple[int, tuple[dict[int, list[int]], int]] | None = None  # of the last step asked for

    @property
    def parts(self) -> int:
        """Parts per step."""
        return -(-len(range(self.rank, self.mixture.batch_size, self.world_size)) // PART)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any] | None:
        """The item; None for a part that duplicates leave with no sample at all."""
        step, part = key if isinstance(key, tuple) else (key, None)
        numbered = list(enumerate(self.mixture.draws(step)))
        kept, left_out = self._distinct_of(numbered, step) if self.leave_out_duplicates else (None, 0)
        if kept is not None:
            numbered = [(number, draw) for number, draw in numbered if kept[number]]
            self._enough(len(numbered), step)
        own = numbered[self.rank :: self.world_size]
        if part is not None:
            own = own[part * PART : (part + 1) * PART]
        if not own:
            return None
        prepared, skipped = [], []
        for number, draw in own:
            try:
                prepared.append(self._prepared(draw, number, step, None if kept is None else kept[number]))
            except DataError as error:
                if not self.skip_broken:
                    raise
                skipped.append({"step": step, "source": draw.source, "row": draw.index, "reason": str(error)})
        batch = batch_of(prepared, self.processor, target_ids=self.mask_identical_targets)
        if self.blind:
            for side in ("query", "target"):
                if "pixel_values" in batch.get(side, ()):
                    batch[side]["pixel_values"].fill_(-1.0)  # zero could mean padding to a family
        counted = self.rank == 0 and not part  # the same on every process and in every part
        return batch | {"skipped": skipped, "left_out": left_out if counted else 0}

    def _distinct_of(self, numbered: Sequence[tuple[int, Draw]], step: int) -> tuple[dict[int, list[int]], int]:
        """:meth:`_distinct`, found once for all parts of a step."""
        if self._kept is None or self._kept[0] != step:
            self._kept = step, self._distinct(numbered, step)
        return self._kept[1]

    def _distinct(self, numbered: Sequence[tuple[int, Draw]], step: int) -> tuple[dict[int, list[int]], int]:
        """Which turns of every sample of a step are trained if no image and no target is there twice.

        Every process finds the same; it reads the rows of the whole step, and images only where two have equally many
        bytes.

        Returns:
            Number of the sample -> its turns; and how many turns are left out.
        """
        kept: dict[int, list[int]] = {}
        keys, targets, left_out = set[Any](), set[Any](), 0
        for number, draw in numbered:
            try:
                sample, turns = self._chosen(draw, number, step)
                key = sample_key(sample, draw.source, draw.index, image_key=SameImage)
                own = [target_key(turn.target, sample.place, image_key=SameImage) for turn in turns]
                kept[number] = [] if key in keys else [turn for turn, target in enumerate(own) if target not in targets]
            except DataError:
                kept[number] = [0]  # whose it is finds the error, and raises or counts it
                continue
            left_out += len(turns) - len(kept[number])
            keys.add(key)
            targets.update(own[turn] for turn in kept[number])
        return kept, left_out

    def _enough(self, samples: int, step: int) -> None:
        if samples < self.world_size:
            raise DataError(
                f"step {step}: without duplicates {self.mixture.batch_size} samples leave {samples}, fewer than there "
                "are processes; set data.duplicates: mask"
            )

    def _prepared(self, draw: Draw, number: int, step: int, kept: Sequence[int] | None) -> Prepared:
        """A sample by itself, so that what is wrong with it concerns no other."""
        sample, turns = self._chosen(draw, number, step)
        turns = turns if kept is None else [turns[turn] for turn in kept]
        key = sample_key(sample, draw.source, draw.index)
        if self.turns.mode == "reconstruction":
            rng = np.random.default_rng([self.seed, 5, draw.source, draw.position])
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
        rng = np.random.default_rng([self.seed, 4, draw.source, draw.position])
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
        key: Equal for samples whose targets are no negatives of one another.
        target: One dialogue; isolated targets that occur twice in it are embedded once.
        hard: A dialogue per hard negative.
        target_rows: Which vector of ``target`` belongs to each turn.
        target_ids, hard_ids: Of each turn and each hard negative; equal for identical targets.
        hard_turns: The turn of each hard negative.
    """

    place: str
    key: int
    query: Row
    target: Row
    hard: list[Row]
    target_rows: list[int]
    target_ids: list[int]
    hard_turns: list[int]
    hard_ids: list[int]


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
        _hash(key),
        prepare(query_dialogue(sample, [turn.query for turn in turns], **seen), processor),
        prepare(target_dialogue(sample, unique, **seen), processor),
        target_rows=rows,
        target_ids=[_target_id(content, sample) for content in own],
        **_hard_negatives(sample, turns, processor, isolated=isolated),
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
        _hash(key),
        prepare(query, processor),
        prepare(target, processor),
        target_rows=[0, 1],
        target_ids=[_target_id(turn.target, sample)] * 2,
        **_hard_negatives(sample, [turn], processor, isolated=True),
    )


def _hard_negatives(sample: Sample, turns: Sequence[Chosen], processor: Processor, *, isolated: bool) -> dict[str, Any]:
    given = [(number, content) for number, turn in enumerate(turns) for content in turn.negatives]
    return {
        "hard": [prepare(target_dialogue(sample, [content], isolated=isolated), processor) for _, content in given],
        "hard_turns": [number for number, _ in given],
        "hard_ids": [_target_id(content, sample) for _, content in given],
    }


def batch_of(samples: Sequence[Prepared], processor: Processor, *, target_ids: bool) -> dict[str, Any]:
    """Both sides of some samples as batches, and the index tensors of the loss.

    Args:
        target_ids: Whether identical targets are marked.
    Returns:
        ``query`` and ``target``: DialogueBatch, not there without a sample. Hard negatives are behind the targets, one
        dialogue each.
        ``ids``: int64 tensors. ``sample_ids`` [T]; ``target_rows`` [T], which vector of the target side belongs to a
        turn; ``hard_negative_rows`` [H], which ones are hard negatives, ``hard_negative_turns`` [H] of which turn,
        and ``hard_negative_ids`` [H]; ``target_ids`` [T] if asked for. The ids of samples and contents are hashes, so
        that batches of several processes can be put together.
        ``places``: where the samples come from.
    """
    names = ("sample_ids", "target_rows", "hard_negative_turns", "hard_negative_ids")
    ids: dict[str, list[int]] = {name: [] for name in names}
    targets, embedded = [], 0
    for sample in samples:
        ids["target_rows"] += [embedded + row for row in sample.target_rows]
        ids["hard_negative_turns"] += [len(ids["sample_ids"]) + turn for turn in sample.hard_turns]
        ids["hard_negative_ids"] += sample.hard_ids
        ids["sample_ids"] += [sample.key] * len(sample.target_ids)
        targets += sample.target_ids
        embedded += len(sample.target.turns)
    hard = [row for sample in samples for row in sample.hard]
    ids["hard_negative_rows"] = [embedded + number for number in range(len(hard))]
    if target_ids:
        ids["target_ids"] = targets
    batch: dict[str, Any] = {
        "ids": {key: torch.tensor(values, dtype=torch.long) for key, values in ids.items()},
        "places": [sample.place for sample in samples],
    }
    if samples:
        batch["query"] = stack([sample.query for sample in samples], processor)
        batch["target"] = stack([*(sample.target for sample in samples), *hard], processor)
    return batch


def _target_id(content: Content, sample: Sample) -> int:
    return _hash(target_key(content, sample.place))


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
