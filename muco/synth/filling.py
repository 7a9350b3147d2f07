"""Pass one of ``muco synth``: looks at all pictures of a source, until the catalogue knows each of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

from muco.errors import MucoError
from muco.synth.catalogue import Catalogue
from muco.synth.pictures import UNREACHABLE, WORKERS, Filter, Look, look_at_all
from muco.synth.sources import Source

ADD = 256  # looks in one transaction
GONE = 100  # pictures in a row that cannot be reached stop the run


def fill(
    catalogue: Catalogue,
    source: Source,
    filter: Filter,
    store: Path | None,
    *,
    workers: int = WORKERS,
    ray: str | None = None,
    progress: Callable[[int, int | None], None] = lambda done, total: None,
) -> None:
    """Looks at all pictures that the catalogue does not know yet, until the source has no more.

    Args:
        store, workers, ray: As for :func:`muco.synth.pictures.look_at_all`.
        progress: Is told how many pictures are done, and of how many if that is known.
    Raises:
        MucoError: As ``look_at_all``; what was found so far is kept.
    """
    if catalogue.complete:
        return
    stored = store is not None and source.root is None  # otherwise the files are the user's own
    looks = look_at_all(source, filter, store, start=catalogue.looked, workers=workers, ray=ray)
    while chunk := list(islice(looks, ADD)):
        _check_reached(chunk, catalogue.looked)
        unused = catalogue.add(chunk)
        for file in unused if stored else ():
            (store / file).unlink(missing_ok=True)
        progress(catalogue.looked, source.total)
    if stored:
        _remove_unused(catalogue, store)
    catalogue.finish()


def _check_reached(chunk: Sequence[Look], before: int) -> None:
    """Stops where no server answers: then the network is gone, which must not be held against the pictures."""
    gone = all(look.reason == UNREACHABLE for look in chunk)
    if gone and (len(chunk) >= GONE or not before):
        raise MucoError(
            f"none of {len(chunk)} pictures in a row could be fetched, the last: {chunk[-1].note}. Fix the connection "
            "and run the same command again: it resumes where it stopped"
        )


def _remove_unused(catalogue: Catalogue, store: Path) -> None:
    """Removes what a killed run has left in the store: files of no kept picture, and unfinished ones."""
    own = re.compile(r"\.*([0-9a-f]{64})\.")
    for folder in sorted(store.glob("[0-9a-f][0-9a-f]")):
        for file in folder.iterdir():
            digest = own.match(file.name)
            if digest and (file.name.startswith(".") or catalogue.name_of(digest[1]) is None):
                file.unlink()
