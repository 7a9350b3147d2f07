"""Which samples and turns make up step number n; :mod:`muco.train.batches` makes batches of them.

Everything is a function of (seed, step), so that a run does not depend on the number of workers and a resumed run
sees exactly what an uninterrupted one would have seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from muco.data import Data, open_data
from muco.errors import DataError, RecipeError
from muco.train.recipe import Recipe, TurnsRecipe

ROUND = 1000  # steps after which every source has had its share, where a step has one source


def open_sources(recipe: Recipe) -> list[Data]:
    """The training sets of a recipe, in its order; a DataError if one cannot be opened."""
    return [open_data(source.path, source.format, source.options) for source in recipe.data.train]


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
        one_source: Every batch comes from one source, and the shares are those of the batches.
    Each source is gone through in a new random order per epoch.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        weights: Sequence[float],
        batch_size: int,
        seed: int,
        *,
        one_source: bool = False,
    ) -> None:
        if not lengths or min(lengths) < 1:
            raise DataError("a training source is empty; every source needs at least one sample")
        self.lengths, self.batch_size, self.seed, self.one_source = tuple(lengths), batch_size, seed, one_source
        self._shares = np.cumsum(weights) / np.sum(weights)
        self._shares[-1] = 1.0
        if not one_source and batch_size * min(weights) < sum(weights):
            raise RecipeError(
                f"data.train: of {batch_size} samples per step the source of weight {min(weights)} gets less than one; "
                "raise its weight or batch.size"
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
        first, last = self._of_one_source(step) if self.one_source else map(self._positions, (step, step + 1))
        draws = []
        for source, length in enumerate(self.lengths):
            for position in range(first[source], last[source]):
                epoch, place = divmod(position, length)
                draws.append(Draw(source, int(self._order(source, epoch)[place]), position))
        return draws

    def _positions(self, step: int) -> list[int]:
        """Samples of each source before a step."""
        return self._shared(step * self.batch_size)

    def _shared(self, count: int) -> list[int]:
        """So many things shared among the sources; what is left of rounding goes to later ones."""
        ends = [int(np.floor(count * share + 1e-9)) for share in self._shares]
        return [end - start for end, start in zip(ends, [0, *ends[:-1]], strict=True)]

    def _steps(self, count: int) -> np.ndarray:
        """So many steps shared among the sources; what is left of rounding goes to the one of the largest share.

        Between multiples of a round no number falls: others get at most one step more than their share
        of it, and the largest share of so many steps is above their number.
        """
        shares = np.diff(self._shares, prepend=0.0)
        steps = np.floor(count * shares + 1e-9).astype(int)
        steps[shares.argmax()] += count - steps.sum()
        return steps

    def _of_one_source(self, step: int) -> tuple[list[int], list[int]]:
        """Samples of each source before and after a step, if a step has one source: steps are shuffled by rounds."""
        length = max(ROUND, len(self.lengths) ** 2)
        number, place = divmod(step, length)
        before, after = (self._steps(n * length) for n in (number, number + 1))
        order = np.random.default_rng([self.seed, 6, number]).permutation(
            np.repeat(np.arange(len(before)), after - before)
        )
        done = before + np.bincount(order[:place], minlength=len(before))
        now = done + (np.arange(len(before)) == order[place])
        return (done * self.batch_size).tolist(), (now * self.batch_size).tolist()

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
