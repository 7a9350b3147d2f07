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

from muco.batch import collate
from muco.data import Data
from muco.dialogue import Content, ImageLike, Positions, Sample, Turn, query_dialogue, target_dialogue
from muco.errors import DataError, ImageError
from muco.processor import Processor
from muco.reconstruction import reconstruction_dialogues
from muco.train.mixture import Draw, Mixture, turn_order
from muco.train.recipe import TurnsRecipe

PART = 32  # samples that are prepared and sent to training together


class TrainingBatches(Dataset):
    """Item n is this process's share of the batch of step n; item (n, p) is part p of it.

    An item holds ``query`` and ``target`` dialogues and the index tensors of the loss, see :func:`training_batch`. A
    step comes in parts so that the images of a large batch never are in memory together.

    Args:
        skip_broken: Leave out rows and images that cannot be used, and say so in the item.
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
        """The item; None for a part that is left with nothing where duplicates are left out."""
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
        chosen, skipped = [], []
        for number, draw in own:
            try:
                sample, turns = self._chosen(draw, number, step)
                if self.skip_broken:
                    self._decode_images(sample)
            except DataError as error:
                if not self.skip_broken:
                    raise
                skipped.append({"step": step, "source": draw.source, "row": draw.index, "reason": str(error)})
                continue
            chosen.append(((sample, turns if kept is None else [turns[turn] for turn in kept[number]]), draw))
        if not chosen:
            raise ImageError(f"step {step}: none of {len(own)} samples can be used, e.g. {skipped[0]['reason']}")
        batch = self._batch(chosen)
        if self.blind:
            for side in ("query", "target"):
                if "pixel_values" in batch[side]:
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

        Every process finds the same; it reads the rows of the whole step, but no image.

        Returns:
            Number of the sample -> its turns; and how many turns are left out.
        """
        kept: dict[int, list[int]] = {}
        keys, targets, left_out = set[Any](), set[Any](), 0
        for number, draw in numbered:
            try:
                sample, turns = self._chosen(draw, number, step)
            except DataError:
                kept[number] = [0]  # whose it is finds the error, and raises or counts it
                continue
            key, own = _key(sample, draw), [_identity(turn.target) for turn in turns]
            kept[number] = [] if key in keys else [turn for turn, target in enumerate(own) if target not in targets]
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

    def _batch(self, chosen: Sequence[tuple[tuple[Sample, list[Chosen]], Draw]]) -> dict[str, Any]:
        keys = [_key(sample, draw) for (sample, _), draw in chosen]
        masked = self.mask_identical_targets
        if self.turns.mode != "reconstruction":
            isolated, pairs = self.turns.mode == "isolated", [pair for pair, _ in chosen]
            positions = self.turns.positions
            return training_batch(
                pairs, keys, self.processor, isolated=isolated, positions=positions, target_ids=masked
            )
        pairs = [
            (sample, turns[0], np.random.default_rng([self.seed, 5, draw.source, draw.position]))
            for (sample, turns), draw in chosen
        ]
        requests = self.turns.requests
        return reconstruction_batch(pairs, keys, self.processor, target_ids=masked, requests=requests)

    def _sample(self, draw: Draw) -> Sample:
        sample = self.sources[draw.source][draw.index]
        return with_image_turn(sample, self.turns.image_turn) if self.turns.image_turn else sample

    def _decode_images(self, sample: Sample) -> None:
        images = [
            *sample.images,
            *(i for t in sample.turns for c in (*t.query, *t.target, *t.negatives) for i in c.images),
        ]
        self.processor.encode_images(images, sample.place)

    def _chosen(self, draw: Draw, row: int, step: int) -> tuple[Sample, list[Chosen]]:
        sample = self._sample(draw)
        order = turn_order(len(sample.turns), draw, row, step, self.turns, self.seed)
        if self.turns.mode == "reconstruction":
            order = order[:1]
        rng = np.random.default_rng([self.seed, 4, draw.source, draw.position])
        return sample, [Chosen.of(sample.turns[turn], rng, self.turns.negatives) for turn in order]


def _key(sample: Sample, draw: Draw) -> Any:
    """Equal for samples that are no negatives of one another: of one id, or without ids of the same image."""
    if sample.id is not None:
        return sample.id
    return _exactly(Content(images=sample.images)) if sample.images else (draw.source, draw.index)


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
        """Draws by ``rng``; of more hard negatives than ``negatives`` so many are drawn."""
        query, target = (side[rng.integers(len(side))] for side in (turn.query, turn.target))
        if negatives is None or len(turn.negatives) <= negatives:
            return cls(query, target, turn.negatives)
        drawn = rng.permutation(len(turn.negatives))[:negatives]
        return cls(query, target, tuple(turn.negatives[number] for number in drawn))


def training_batch(
    pairs: Sequence[tuple[Sample, Sequence[Chosen]]],
    keys: Sequence[Any],
    processor: Processor,
    *,
    isolated: bool,
    positions: Positions | None = None,
    target_ids: bool,
) -> dict[str, Any]:
    """Both sides of some samples as batches, and the index tensors of the loss.

    Args:
        keys: One per sample; samples with equal keys are the same image and no negatives of one another.
        positions: See :class:`muco.dialogue.Dialogue`.
        target_ids: Whether identical targets are marked.
    Returns:
        ``query`` and ``target``: DialogueBatch. Isolated targets that stand twice in a sample are embedded once; hard
        negatives stand behind the targets, one dialogue each.
        ``ids``: int64 tensors. ``sample_ids`` [T]; ``target_rows`` [T], which vector of the target side belongs to a
        turn; ``hard_negative_rows`` [H], which ones are hard negatives, ``hard_negative_turns`` [H] of which turn,
        and ``hard_negative_ids`` [H]; ``target_ids`` [T] if asked for. The ids of samples and contents are hashes, so
        that batches of several processes can be put together.
        ``places``: where the samples come from.
    """
    queries, targets, hard = [], [], []
    sample_ids, contents, target_rows, hard_turns = [], [], [], []
    embedded = 0
    for (sample, turns), key in zip(pairs, keys, strict=True):
        own = [turn.target for turn in turns]
        places: dict[Any, int] = {}  # of distinct targets; compounded turns see those before them, so all are distinct
        own_rows = [places.setdefault(_exactly(c) if isolated else j, len(places)) for j, c in enumerate(own)]
        unique = [own[own_rows.index(place)] for place in range(len(places))]
        seen = {"isolated": isolated, "positions": positions}
        queries.append(query_dialogue(sample, [turn.query for turn in turns], **seen))
        targets.append(target_dialogue(sample, unique, **seen))
        target_rows += [embedded + row for row in own_rows]
        embedded += len(unique)
        contents += own
        for turn in turns:
            hard += [target_dialogue(sample, [content], isolated=isolated) for content in turn.negatives]
            hard_turns += [len(sample_ids)] * len(turn.negatives)
            sample_ids.append(_hash(key))
    ids = {
        "sample_ids": sample_ids,
        "target_rows": target_rows,
        "hard_negative_rows": [embedded + row for row in range(len(hard))],
        "hard_negative_turns": hard_turns,
        "hard_negative_ids": [_hash(_identity(dialogue.turns[0])) for dialogue in hard],
    }
    if target_ids:
        ids["target_ids"] = [_hash(_identity(content)) for content in contents]
    return {
        "query": collate(queries, processor),
        "target": collate([*targets, *hard], processor),
        "ids": {key: torch.tensor(values, dtype=torch.long) for key, values in ids.items()},
        "places": [sample.place for sample, _ in pairs],
    }


def reconstruction_batch(
    pairs: Sequence[tuple[Sample, Chosen, np.random.Generator]],
    keys: Sequence[Any],
    processor: Processor,
    *,
    target_ids: bool,
    requests: Sequence[str] = (),
) -> dict[str, Any]:
    """Pairs as dialogues of two turns each, see :mod:`muco.reconstruction`; otherwise as :func:`training_batch`.

    Args:
        pairs: Each with what decides on its masks.
        requests: See :func:`muco.reconstruction.reconstruction_dialogues`.
    Returns:
        Two turns per pair in ``query``, ``target`` and ``ids``: the pair itself and its reconstruction. Hard negatives
        belong to the first.
    """
    made = [reconstruction_dialogues(sample, turn.query, turn.target, rng, requests) for sample, turn, rng in pairs]
    hard = [
        (2 * number, target_dialogue(sample, [content], isolated=True))
        for number, (sample, turn, _) in enumerate(pairs)
        for content in turn.negatives
    ]
    turns = range(2 * len(pairs))
    ids = {
        "sample_ids": [_hash(keys[turn // 2]) for turn in turns],
        "target_rows": [*turns],
        "hard_negative_rows": [len(turns) + row for row in range(len(hard))],
        "hard_negative_turns": [turn for turn, _ in hard],
        "hard_negative_ids": [_hash(_identity(dialogue.turns[0])) for _, dialogue in hard],
    }
    if target_ids:
        ids["target_ids"] = [_hash(_identity(pairs[turn // 2][1].target)) for turn in turns]
    return {
        "query": collate([query for query, _ in made], processor),
        "target": collate([*(target for _, target in made), *(dialogue for _, dialogue in hard)], processor),
        "ids": {key: torch.tensor(values, dtype=torch.long) for key, values in ids.items()},
        "places": [sample.place for sample, _, _ in pairs],
    }


def _hash(value: Any) -> int:
    """63 bits that are the same for equal values in every process."""
    return int.from_bytes(blake2b(repr(value).encode(), digest_size=8).digest()) >> 1


def _exactly(content: Content) -> Any:
    return content.text, tuple(map(_image_key, content.images))


def _image_key(image: ImageLike) -> Any:
    if hasattr(image, "tobytes"):  # a Pillow image has no name; its pixels are what it is
        return image.mode, image.size, blake2b(image.tobytes()).hexdigest()
    return blake2b(image).hexdigest() if isinstance(image, bytes) else str(image)


def _identity(content: Content) -> Any:
    text, images = _exactly(content)
    return text.strip(), images


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
