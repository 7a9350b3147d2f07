"""Data sets of which every query has a list of candidates of its own."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from muco.data.left_out import LeftOut
from muco.dialogue import Content
from muco.errors import DataError


@dataclass(frozen=True)
class Question:
    """One row of a data set, by its number from 0 through all files.

    What is right comes first among the candidates: the first ``right`` of them. In place of a content that cannot be
    used is its error. By ``names`` the official code tells candidates apart, see ``official_name``.
    """

    number: int
    where: str
    query: Content | DataError
    candidates: tuple[Content | DataError, ...]
    names: tuple[str, ...]
    right: int = 1


class ListSource(Protocol):
    """A data set whose queries bring their own lists of candidates."""

    @property
    def name(self) -> str: ...
    @property
    def rows(self) -> int: ...
    @property
    def rivals_by_name(self) -> bool:
        """Whether the official code lets contents that are the same compete under two names."""

    @property
    def facts(self) -> dict[str, Any]:
        """What a reader of the scores must know of the data set."""

    def questions(self, chosen: Collection[int], left_out: LeftOut) -> Iterator[Question]:
        """The rows with these numbers, in order."""

    def warnings(self, sizes: Sequence[int]) -> list[str]:
        """Where the data differs from what was published; ``sizes`` are those of the lists that were ranked."""
