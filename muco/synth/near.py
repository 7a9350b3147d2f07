"""Perceptual hashes of kept pictures, and which of them is the first one near to another hash.

It is found exactly. Cut 64 bits into one band more than bits may differ: two hashes that are near are equal in at least
one band. Per band the pictures lie sorted in memory, 8 bytes for the hash and 4 for each band: 28 MB for a million of
them with the default of 4 bits.
"""

from __future__ import annotations

import math

import numpy as np

HASH_BITS, KEY_BITS = 64, 16  # of a hash; of a band, so many bits are looked up at most


class Near:
    """The hashes of the kept pictures, and which of them is the first one near to another hash.

    The first ``_sorted`` of them are sorted by each band; those after are compared one by one, and sorted in when they
    are so many that this would take longer.
    """

    def __init__(self, near: int, hashes: np.ndarray) -> None:
        self.near, self._count = near, len(hashes)
        self._hashes = np.concatenate([hashes, np.zeros(1024, dtype=np.uint64)])
        cuts = [HASH_BITS * n // (near + 1) for n in range(near + 2)] if near >= 0 else []
        self._bands = [(cut, min(end - cut, KEY_BITS)) for cut, end in zip(cuts, cuts[1:], strict=False)]
        self._sort()

    def __len__(self) -> int:
        return self._count

    def are_near(self, some: np.ndarray, others: np.ndarray) -> np.ndarray:
        return np.bitwise_count(some ^ others) <= self.near  # with -1, none

    def extend(self, hashes: np.ndarray) -> None:
        end = self._count + len(hashes)
        if end > len(self._hashes):
            self._hashes = np.concatenate([self._hashes, np.zeros(end, dtype=np.uint64)])
        self._hashes[self._count : end] = hashes
        self._count = end
        if end - self._sorted > max(4096, 16 * math.isqrt(end)):
            self._sort()

    def cut(self, count: int) -> None:
        """Forgets all but the first ``count``."""
        self._count = count
        if self._sorted > count:
            self._sort()

    def first_near(self, hashes: np.ndarray) -> np.ndarray:
        """For each hash the place of the first kept picture that is near; -1 if none is."""
        none = np.iinfo(np.int64).max
        places = np.full(len(hashes), none)
        if self.near < 0:
            return places * 0 - 1
        tail = self._hashes[self._sorted : self._count]
        if len(tail):
            near = self.are_near(hashes[:, None], tail[None, :])
            places = np.where(near.any(axis=1), self._sorted + near.argmax(axis=1), none)
        for band, (order, starts) in zip(self._bands, self._order, strict=True):
            keys = _keys(hashes, *band)
            counts = starts[keys + 1] - starts[keys]
            asking = np.repeat(np.arange(len(hashes)), counts)
            offsets = np.arange(len(asking)) - np.repeat(np.cumsum(counts) - counts, counts)
            found = order[np.repeat(starts[keys], counts) + offsets]
            near = self.are_near(hashes[asking], self._hashes[found])
            np.minimum.at(places, asking[near], found[near])
        return np.where(places == none, -1, places)

    def _sort(self) -> None:
        self._sorted = self._count
        self._order = []
        for band in self._bands:
            keys = _keys(self._hashes[: self._count], *band)
            starts = np.searchsorted(np.sort(keys), np.arange((1 << band[1]) + 1))
            self._order.append((np.argsort(keys, kind="stable").astype(np.uint32), starts))


def _keys(hashes: np.ndarray, shift: int, bits: int) -> np.ndarray:
    return ((hashes >> np.uint64(shift)) & np.uint64((1 << bits) - 1)).astype(np.int32)
