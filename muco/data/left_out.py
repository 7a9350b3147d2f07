"""What an evaluation does with a query or candidate that cannot be embedded: stop, or leave it out and say so.

Such are texts with a special token, half a character or too many tokens, and images that are missing or broken. A row
without an id, or that is not a row at all, always stops the evaluation: nobody could say what was left out.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

from muco.base.tables import clean
from muco.errors import DataError

NAMED = 3  # in a warning; the file names all


class LeftOut:
    """Why contents were left out, by the key of a content or the row of a pool.

    Unless that is ``allowed``, the first content that cannot be embedded is an error that names the option.
    """

    def __init__(self, allowed: bool = False) -> None:
        self.allowed = allowed
        self.reasons: dict[Hashable, str] = {}

    def __contains__(self, key: object) -> bool:
        return key in self.reasons

    def __len__(self) -> int:
        return len(self.reasons)

    def check(self, error: DataError) -> None:
        """Raises the error, with the option in its sentence, unless contents may be left out."""
        if not self.allowed:
            raise type(error)(f"{error}; or leave out what cannot be embedded: --skip-broken, skip_broken=True")

    def add(self, key: Hashable, error: DataError) -> None:
        self.check(error)
        self.reasons[key] = str(error)


@dataclass(frozen=True)
class Broken:
    """A query or candidate that was left out. ``reason`` begins with its place ("file:line")."""

    side: Literal["query", "candidate"]
    reason: str


def counts(broken: Sequence[Broken], missed: int) -> dict[str, int]:
    """What a result says: "queries" and "candidates" that were left out, "missed" queries; empty if none were.

    Queries count as missed because they or all that is right for them cannot be embedded.
    """
    sides = [one.side for one in broken]
    told = {"queries": sides.count("query"), "candidates": sides.count("candidate"), "missed": missed}
    return told if broken else {}


def warnings(broken: Sequence[Broken], missed: int) -> list[str]:
    """One sentence that counts them and names the first, or none."""
    if not broken:
        return []
    told, some = counts(broken, missed), "; ".join(clean(one.reason) for one in broken[:NAMED])
    more = "; …" if len(broken) > NAMED else ""
    return [
        f"left out, because they cannot be embedded: {told['queries']:,} queries and {told['candidates']:,} "
        f"candidates; {missed:,} queries count as missed ({some}{more})"
    ]
