"""What training and evaluation ask of data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from muco.dialogue import Sample


class InMemory(list[Sample]):
    """Samples in memory, as a source."""

    fingerprint = ""  # nothing is stored under it


class Data(Protocol):
    """What every source offers, and all that training and evaluation ask of one."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...

    def __iter__(self) -> Iterator[Sample]: ...  # Python's own, by index, where a source has no other

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) that tells one state of the data from another, see :mod:`muco.data.fingerprint`."""
