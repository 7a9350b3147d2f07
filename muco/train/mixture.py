"""Which samples, turns and paraphrases make up step number n.

Everything is a function of (seed, step), so that a run does not depend on the number of workers and a resumed run
sees exactly what an uninterrupted one would have seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from muco.batch import DialogueBatch, collate
from muco.dialogue import Content, Sample, Turn, query_dialogue, target_dialogue
from muco.errors import DataError, ImageError, RecipeError
from muco.processor import Processor
from muco.train.recipe import TurnsRecipe


class Data(Protocol):
    """A training or evaluation set."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Sample: ...
    @property
    def fingerprint(self) -> str: ...


@dataclass(frozen=True)
class Draw:
    """One sample of a batch: where it comes from and the key of its random choices."""

    source: int
    index: int
    position: int  # in the endless stream of its source


class Mixture:
    """An endless, seeded stream of batches from several sources.

    Args:
        lengths: Samples per source.
        weights: Share of each source in every batch; the rounding is carried, so long-run shares are exact.
        batch_size: Samples per step.
    Each source is gone through in a new random order per epoch.
    """

    def __init__(self, lengths: Sequence[int], weights: Sequence[float], batch_size: int, seed: int) -> None:
        if not lengths or min(lengths) < 1:
            raise DataError("a training source is empty; every source needs at least one sample")
        self.lengths, self.batch_size, self.seed = tuple(lengths), batch_size, seed
        self._shares = np.cumsum(weights) / np.sum(weights)
        self._shares[-1] = 1.0
        if batch_size * min(weights) < sum(weights):
            raise RecipeError(
                f"data.train: of {batch_size} samples per step the source of weight {min(weights)} gets less than one; "
                "raise its weight or trainer.per_device_train_batch_size"
            )
        self._order = lru_cache(maxsize=2 * len(lengths))(self._permutation)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_order"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._order = lru_cache(maxsize=2 * len(self.lengths))(self._permutation)

    def _permutation(self, source: int, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, 1, source, epoch]).permutation(self.lengths[source])

    def draws(self, step: int) -> list[Draw]:
        """The samples of a step, sources one after another."""
        first, last = (self._positions(n) for n in (step, step + 1))
        draws = []
        for source, length in enumerate(self.lengths):
            for position in range(first[source], last[source]):
                epoch, place = divmod(position, length)
                draws.append(Draw(source, int(self._order(source, epoch)[place]), position))
        return draws

    def _positions(self, step: int) -> list[int]:
        ends = [int(np.floor(step * self.batch_size * share + 1e-9)) for share in self._shares]
        return [end - start for end, start in zip(ends, [0, *ends[:-1]], strict=True)]

    @property
    def steps_per_epoch(self) -> int:
        return -(-sum(self.lengths) // self.batch_size)


def turn_order(count: int, draw: Draw, row: int, step: int, turns: TurnsRecipe, seed: int) -> list[int]:
    """Which turns of a sample are used in this step, and in which order (the same for query and target)."""
    own = np.random.default_rng([seed, 2, draw.source, draw.position])
    chosen = np.arange(count) if turns.limit is None else own.permutation(count)[: turns.limit]
    if turns.order == "sample":
        return own.permutation(chosen).tolist()
    group = row % turns.order if isinstance(turns.order, int) else 0
    # one random rank per turn number, shared by the group; samples with fewer turns use the first ranks
    ranks = np.random.default_rng([seed, 3, step, group]).permutation(max(64, count))
    return sorted(chosen.tolist(), key=lambda turn: ranks[turn])


class TrainingBatches(Dataset):
    """Item n is the whole batch of step n: ``query`` and ``target`` dialogues and the index tensors of the loss."""

    def __init__(
        self,
        sources: Sequence[Data],
        mixture: Mixture,
        processor: Processor,
        turns: TurnsRecipe,
        *,
        seed: int = 0,
        mask_identical_targets: bool = True,
        skip_broken_images: bool = False,
        blind: bool = False,
    ) -> None:
        self.sources, self.mixture, self.processor, self.turns = sources, mixture, processor, turns
        self.seed, self.mask_identical_targets = seed, mask_identical_targets
        self.skip_broken_images, self.blind = skip_broken_images, blind

    def __getitem__(self, step: int) -> dict[str, Any]:
        draws = self.mixture.draws(step)
        rows = [(draw, self._sample(draw)) for draw in draws]
        skipped = 0
        if self.skip_broken_images:
            usable = [(draw, sample) for draw, sample in rows if self._usable(sample)]
            skipped, rows = len(rows) - len(usable), usable
            if not rows:
                raise ImageError(f"step {step}: every image of the batch is missing or broken")
        pairs = [self._chosen(draw, sample, row, step) for row, (draw, sample) in enumerate(rows)]
        keys = [sample.id if sample.id is not None else (draw.source, draw.index) for draw, sample in rows]
        batch = training_batch(
            pairs, keys, self.processor, isolated=self.turns.mode == "isolated", target_ids=self.mask_identical_targets
        )
        if self.blind:
            for side in ("query", "target"):
                if "pixel_values" in batch[side]:
                    batch[side]["pixel_values"].fill_(-1.0)  # zero could mean padding to a family
        if self.skip_broken_images:
            batch["skipped"] = torch.tensor(skipped)
        return batch

    def _sample(self, draw: Draw) -> Sample:
        sample = self.sources[draw.source][draw.index]
        return with_image_turn(sample, self.turns.image_turn) if self.turns.image_turn else sample

    def _usable(self, sample: Sample) -> bool:
        images = [
            *sample.images,
            *(i for t in sample.turns for c in (*t.query, *t.target, *t.negatives) for i in c.images),
        ]
        try:
            self.processor.encode_images(images, sample.place)
        except ImageError:
            return False
        return True

    def _chosen(self, draw: Draw, sample: Sample, row: int, step: int) -> tuple[Sample, list[Chosen]]:
        order = turn_order(len(sample.turns), draw, row, step, self.turns, self.seed)
        rng = np.random.default_rng([self.seed, 4, draw.source, draw.position])
        return sample, [Chosen.of(sample.turns[turn], rng) for turn in order]


def with_image_turn(sample: Sample, kind: str) -> Sample:
    """Adds the turn (image alone, target of the turn of this kind); samples without image or kind stay as they are."""
    described = next((turn for turn in sample.turns if turn.kind == kind), None)
    if described is None or not sample.images:
        return sample
    return sample.with_turns([*sample.turns, Turn(query="", target=described.target, kind="image")])


@dataclass(frozen=True)
class Chosen:
    """A turn with its paraphrases drawn."""

    query: Content
    target: Content
    negatives: tuple[Content, ...]

    @classmethod
    def of(cls, turn: Turn, rng: np.random.Generator) -> Chosen:
        query = turn.query[rng.integers(len(turn.query))]
        return cls(query, turn.target[rng.integers(len(turn.target))], turn.negatives)


def training_batch(
    pairs: Sequence[tuple[Sample, Sequence[Chosen]]],
    keys: Sequence[Any],
    processor: Processor,
    *,
    isolated: bool,
    target_ids: bool,
) -> dict[str, Any]:
    """Both sides of some samples as batches, and the index tensors of the loss.

    Args:
        keys: One per sample; samples with equal keys are the same image and no negatives of one another.
        target_ids: Whether identical targets are marked.
    Returns:
        ``query`` and ``target``: DialogueBatch. Isolated targets that stand twice in a sample are embedded once; hard
        negatives stand behind the targets, one dialogue each.
        ``ids``: ``sample_ids`` [T], ``target_rows`` [T] (which target vector belongs to a turn), and as needed
        ``target_ids`` [T], ``hard_negative_turns`` [H], ``hard_negative_ids`` [H].
    """
    queries, targets, hard = [], [], []
    sample_ids, contents, target_rows, hard_turns = [], [], [], []
    numbers: dict[Any, int] = {}
    embedded = 0
    for (sample, turns), key in zip(pairs, keys, strict=True):
        own = [turn.target for turn in turns]
        places: dict[Any, int] = {}  # of distinct targets; compounded turns see those before them, so all are distinct
        own_rows = [places.setdefault(_exactly(c) if isolated else j, len(places)) for j, c in enumerate(own)]
        unique = [own[own_rows.index(place)] for place in range(len(places))]
        queries.append(query_dialogue(sample, [turn.query for turn in turns], isolated=isolated))
        targets.append(target_dialogue(sample, unique, isolated=isolated))
        target_rows += [embedded + row for row in own_rows]
        embedded += len(unique)
        contents += own
        for turn in turns:
            hard += [target_dialogue(sample, [content], isolated=isolated) for content in turn.negatives]
            hard_turns += [len(sample_ids)] * len(turn.negatives)
            sample_ids.append(numbers.setdefault(key, len(numbers)))
    ids: dict[str, Tensor] = {"sample_ids": torch.tensor(sample_ids), "target_rows": torch.tensor(target_rows)}
    known: dict[Any, int] = {}
    if target_ids:
        ids["target_ids"] = torch.tensor([known.setdefault(_identity(c), len(known)) for c in contents])
    if hard:
        ids["hard_negative_turns"] = torch.tensor(hard_turns)
        negatives = [dialogue.turns[0] for dialogue in hard]
        ids["hard_negative_ids"] = torch.tensor([known.setdefault(_identity(c), len(known)) for c in negatives])
    query: DialogueBatch = collate(queries, processor)
    return {"query": query, "target": collate([*targets, *hard], processor), "ids": ids}


def _exactly(content: Content) -> Any:
    # Pillow images have no name, so each object is its own; files and bytes compare by value
    images = tuple(i if isinstance(i, bytes) else str(i) if not hasattr(i, "mode") else id(i) for i in content.images)
    return content.text, images


def _identity(content: Content) -> Any:
    text, images = _exactly(content)
    return text.strip(), images


class StepSampler(Sampler[list[int]]):
    """Batches of one item, the step number, in order: what a DataLoader can skip without loading it."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __iter__(self) -> Iterator[list[int]]:
        return iter([step] for step in range(self.steps))

    def __len__(self) -> int:
        return self.steps
