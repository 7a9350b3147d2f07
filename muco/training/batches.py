"""Which samples and turns each process prepares for a step, and the loader that hands them to training in parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader, Dataset, Sampler

from muco.data.images import SameImage
from muco.data.same import sample_key, target_key
from muco.data.source import Data
from muco.dialogue import Sample, Turn
from muco.errors import DataError
from muco.processor import Processor
from muco.training.mixture import Draw, Mixture, Purpose, generator, turn_order
from muco.training.prepared import Chosen, Prepared, TrainingBatch, batch_of, hide_pixels, prepare_pair, prepare_turns
from muco.training.recipe import TurnsRecipe

PART = 32  # samples that are prepared and sent to training together


@dataclass(frozen=True)
class Numbered:
    """A sample of a step and its number there, with those of its chosen turns that are trained; None: all of them."""

    number: int
    draw: Draw
    turns: tuple[int, ...] | None = None


class TrainingBatches(Dataset):
    """Item n is this process's share of the batch of step n; item (n, p) is part p of it.

    Parts keep the images of a large batch from being in memory together.

    Args:
        skip_broken: Leave out samples that cannot be used, and list them in the item.
        leave_out_duplicates: Train a duplicated target or image only once per step.
        blind: Replace every pixel by a constant.
        guided: Whether a guide will be asked about the queries.
        rank, world_size: Each process takes every ``world_size``-th sample.
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
        guided: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.sources, self.mixture, self.processor, self.turns = sources, mixture, processor, turns
        self.seed, self.mask_identical_targets = seed, mask_identical_targets
        self.skip_broken, self.leave_out_duplicates, self.blind = skip_broken, leave_out_duplicates, blind
        self.guided, self.rank, self.world_size = guided, rank, world_size
        self._share: tuple[int, list[Numbered], int] | None = None  # the last step and its share, for all its parts

    @property
    def parts(self) -> int:
        """Parts per step."""
        return -(-len(range(self.rank, self.mixture.batch_size, self.world_size)) // PART)

    def __getitem__(self, key: int | tuple[int, int]) -> TrainingBatch | None:
        """The item; None for a part that duplicates leave with no sample at all."""
        step, part = key if isinstance(key, tuple) else (key, None)
        samples, left_out = self.share(step)
        own = samples if part is None else samples[part * PART : (part + 1) * PART]
        if not own:
            return None
        batch = self._batch(own, step)
        if self.rank == 0 and not part:  # the same on every process and in every part, so counted once
            batch["left_out"] = left_out
        return batch

    def share(self, step: int) -> tuple[list[Numbered], int]:
        """The samples of a step that this process prepares, and the number of duplicate turns in the whole step."""
        if self._share is not None and self._share[0] == step:
            return self._share[1:]
        draws = [Numbered(number, draw) for number, draw in enumerate(self.mixture.draws(step))]
        left_out = 0
        if self.leave_out_duplicates:
            draws, left_out = self._distinct(draws, step)
            if len(draws) < self.world_size:
                raise DataError(
                    f"step {step}: without duplicates {self.mixture.batch_size} samples leave {len(draws)}, fewer "
                    "than there are processes; set data.duplicates: mask"
                )
        self._share = step, draws[self.rank :: self.world_size], left_out
        return self._share[1:]

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
        """Samples with those of their turns that make no image and no target come twice, and how many are left out."""
        # Every process finds the same. Images are read only where two have equally many bytes.
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

    def _prepared(self, one: Numbered, step: int) -> Prepared:
        """A sample by itself, so that what is wrong with it concerns no other."""
        draw = one.draw
        sample, turns = self._chosen(draw, one.number, step)
        if one.turns is not None:
            turns = [turns[turn] for turn in one.turns]
        key = sample_key(sample, draw.source, draw.index)
        if self.turns.mode == "reconstruction":
            rng = generator(self.seed, Purpose.MASKS, draw.source, draw.position)
            how = {"requests": self.turns.requests, "source": draw.source, "guided": self.guided}
            return prepare_pair(sample, turns[0], rng, key, self.processor, **how)
        return prepare_turns(
            sample,
            turns,
            key,
            self.processor,
            isolated=self.turns.mode == "isolated",
            isolated_targets=self.turns.of_targets == "isolated",
            positions=self.turns.positions,
            source=draw.source,
            guided=self.guided,
        )

    def _chosen(self, draw: Draw, row: int, step: int) -> tuple[Sample, list[Chosen]]:
        sample = self.sources[draw.source][draw.index]
        if self.turns.image_turn:
            sample = with_image_turn(sample, self.turns.image_turn)
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


class PartSampler(Sampler[list[tuple[int, int]]]):
    """The keys of all parts of all steps, in order, from the step that ``first`` returns when iteration begins."""

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
