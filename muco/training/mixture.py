"""Which samples and turns make up step number n; :mod:`muco.training.batches` makes batches of them.

Everything is a function of (seed, step), so that a run does not depend on the number of workers and a resumed run
sees exactly what an uninterrupted one would have seen.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from muco.data import open_data
from muco.data.source import Data, InMemory
from muco.errors import DataError, RecipeError
from muco.training.recipe import Recipe, SourceRecipe, TurnsRecipe, ValidationRecipe

ROUND = 1000  # groups after which every source has had its share, where samples come in groups of one source


class Purpose:
    """What random numbers are drawn for: each purpose has its own stream, so a draw for one never shifts another."""

    ROWS = 1  # the order of a source's rows in a pass
    TURNS = 2  # which turns of a sample, and their order
    SHARED_ORDER = 3  # an order of turns that samples share
    WORDING = 4  # paraphrases and hard negatives
    MASKS = 5  # what reconstruction hides
    SOURCES = 6  # the order of the sources of groups


def generator(seed: int, purpose: int, *key: int) -> np.random.Generator:
    """Random numbers for a purpose; the same ones for the same key, whatever was drawn before."""
    return np.random.default_rng([seed, purpose, *key])


def open_sources(recipe: Recipe) -> list[Data]:
    """The training sets of a recipe, in its order; a DataError if one cannot be opened."""
    return [data_of(source) for source in recipe.data.train]


def data_of(source: SourceRecipe) -> Data:
    return open_data(source.path, source.format, source.options)


def validation_of(source: ValidationRecipe) -> tuple[Data, str]:
    """The samples that are scored during training, and a sentence about those that are not; "" if all are.

    Raises a DataError if the set cannot be opened, or one of these samples cannot be read.
    """
    data = open_data(source.path, source.format, source.options)
    total, limit = len(data), source.limit
    if limit is None or total <= limit:
        return data, ""
    scored = InMemory(data[number * total // limit] for number in range(limit))  # a file may be in an order of kinds
    return scored, (
        f"data.validation: {limit:,} of {total:,} samples are scored, spread evenly over the set; "
        "data.validation.limit sets another number, and null scores all"
    )


@dataclass(frozen=True)
class Draw:
    """One sample of a batch: where it comes from and the key of its random choices."""

    source: int
    index: int
    position: int  # in the endless stream of its source, or of all sources


class Mixture:
    """An endless, seeded stream of batches from several sources.

    Args:
        lengths: Samples per source.
        weights: Share of each source in every batch; the rounding is carried, so long-run shares are exact. None: the
            sources are one, of all their samples.
        batch_size: Samples per step.
        group: A batch is made of groups of this many samples of one source each, and the shares are those of groups;
            ``batch_size`` must be a multiple of it. None: sources are mixed in every batch.
        epoch: What an epoch is, see :class:`muco.training.recipe.DataRecipe`.
    Each source is gone through in a new random order per pass.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        weights: Sequence[float] | None,
        batch_size: int,
        seed: int,
        *,
        group: int | None = None,
        epoch: str = "every_row",
    ) -> None:
        if not lengths or min(lengths) < 1:
            raise DataError("a training source is empty; every source needs at least one sample")
        self.lengths, self.batch_size, self.seed = tuple(lengths), batch_size, seed
        self.grouped, self.epoch, self.weighted = group is not None, epoch, weights is not None
        self._unit = group or batch_size  # samples that are shared out at a time
        self._units = batch_size // self._unit  # per step
        self._ends = list(accumulate(lengths))
        self._streams = self.lengths if self.weighted or self.grouped else (self._ends[-1],)
        if weights is not None and not self.grouped and batch_size * min(weights) < sum(weights):
            raise RecipeError(
                f"data.train: of {batch_size} samples per step the source of weight {min(weights)} gets less than one; "
                "raise its weight or batch.size"
            )
        weights = self._streams if weights is None else weights
        self._shares = np.cumsum(weights) / np.sum(weights)
        self._shares[-1] = 1.0
        self._orders: dict[int, tuple[int, np.ndarray]] = {}  # stream -> a pass and its order; the last one used
        self._round = -1, np.zeros(0)  # a round and, int64, the source of each of its steps; the last one used

    @classmethod
    def of(cls, recipe: Recipe, lengths: Sequence[int]) -> Mixture:
        """The mixture of a recipe whose sources have these lengths."""
        group = recipe.batch.size if recipe.data.one_source else recipe.batch.group
        if group == 1 < recipe.batch.size:
            group = None  # which mixes sources too, and evenly in every batch
        how = {"group": group, "epoch": recipe.data.epoch}
        return cls(lengths, recipe.data.weights, recipe.batch.size, recipe.seed, **how)

    def _order(self, stream: int, epoch: int) -> np.ndarray:
        if stream not in self._orders or self._orders[stream][0] != epoch:
            drawn = generator(self.seed, Purpose.ROWS, stream, epoch).permutation(self._streams[stream])
            self._orders[stream] = epoch, drawn
        return self._orders[stream][1]

    def draws(self, step: int) -> list[Draw]:
        """The samples of a step."""
        units = range(step * self._units, (step + 1) * self._units)
        return [draw for unit in units for draw in self._unit_draws(unit)]

    def _unit_draws(self, unit: int) -> list[Draw]:
        first, last = self._before(unit), self._before(unit + 1)
        draws = []
        for stream, length in enumerate(self._streams):
            for position in range(first[stream], last[stream]):
                epoch, place = divmod(position, length)
                source, index = self._place(stream, int(self._order(stream, epoch)[place]))
                draws.append(Draw(source, index, position))
        return draws

    def _place(self, stream: int, number: int) -> tuple[int, int]:
        """Source and index of a sample of a stream."""
        if len(self._streams) == len(self.lengths):
            return stream, number
        source = bisect_right(self._ends, number)
        return source, number - (self._ends[source - 1] if source else 0)

    def _before(self, unit: int) -> list[int]:
        """Samples of each stream before a unit: a step, or a group."""
        if not self.grouped:
            return self._shared(unit * self._unit)
        number, place = divmod(unit, self._round_units)
        if number != self._round[0]:
            sources = np.repeat(np.arange(len(self.lengths)), self._groups(number + 1) - self._groups(number))
            self._round = number, generator(self.seed, Purpose.SOURCES, number).permutation(sources)
        groups = self._groups(number) + np.bincount(self._round[1][:place], minlength=len(self._streams))
        return (groups * self._unit).tolist()

    def _shared(self, count: int) -> list[int]:
        """Shares a number of samples among the streams; what is left of rounding goes to later ones."""
        ends = [int(np.floor(count * share + 1e-9)) for share in self._shares]
        return [end - start for end, start in zip(ends, [0, *ends[:-1]], strict=True)]

    @property
    def _round_units(self) -> int:
        """The groups after which every source has had its share."""
        return max(ROUND, len(self.lengths) ** 2) if self.weighted else sum(self._filled)

    @property
    def _filled(self) -> list[int]:
        """Groups that the samples of each source fill, the last one perhaps in part."""
        return [-(-length // self._unit) for length in self.lengths]

    def _groups(self, rounds: int) -> np.ndarray:
        """Groups of each source in the first rounds; what is left of rounding goes to the one of the largest share."""
        # From one round to the next no number falls: others get at most one group more than their share of it, and the
        # largest share of the groups of a round is above their number.
        if not self.weighted:
            return rounds * np.array(self._filled)
        count, shares = rounds * self._round_units, np.diff(self._shares, prepend=0.0)
        groups = np.floor(count * shares + 1e-9).astype(int)
        groups[shares.argmax()] += count - groups.sum()
        return groups

    @property
    def steps_per_epoch(self) -> int:
        if self.epoch == "row_count" or len(self._streams) == 1:
            return -(-self._ends[-1] // self.batch_size)
        enough = 1
        while not self._all_seen(enough):
            enough *= 2
        return bisect_left(range(enough), True, key=self._all_seen)

    def _all_seen(self, steps: int) -> bool:
        seen = self._before(steps * self._units)
        return all(count >= length for count, length in zip(seen, self._streams, strict=True))

    def passes(self, steps: int) -> list[float]:
        """How often the samples of each source are seen in the first ``steps`` steps, on average."""
        seen = self._before(steps * self._units)
        if len(seen) < len(self.lengths):
            whole, rest = divmod(steps * self.batch_size, self._ends[-1])
            of_rest = np.searchsorted(self._ends, self._order(0, whole)[:rest], side="right")
            seen = whole * np.array(self.lengths) + np.bincount(of_rest, minlength=len(self.lengths))
        return [float(count / length) for count, length in zip(seen, self.lengths, strict=True)]


def turn_order(count: int, draw: Draw, row: int, step: int, turns: TurnsRecipe, seed: int) -> list[int]:
    """Which turns of a sample are used in this step, and in which order (the same for query and target)."""
    own = generator(seed, Purpose.TURNS, draw.source, draw.position)
    chosen = np.arange(count) if turns.limit is None else own.permutation(count)[: turns.limit]
    if turns.order == "sample":
        return own.permutation(chosen).tolist()
    group = row % turns.order if isinstance(turns.order, int) else 0
    # one random rank per turn number, shared by the group: the first are the same for any number of turns
    ranks = generator(seed, Purpose.SHARED_ORDER, step, group).random(count)
    return sorted(chosen.tolist(), key=lambda turn: ranks[turn])
