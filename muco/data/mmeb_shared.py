"""What the video and the visual-document sets of MMEB-V2 share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from muco.data.judged import Candidate, Query
from muco.data.mmeb_prompts import Style
from muco.data.mmeb_v2_sets import Published
from muco.errors import DataError


@dataclass(frozen=True)
class JudgedSet:
    """A data set whose candidates are one pool: queries by the number of their rows, and facts about both."""

    queries: list[Query]
    candidates: list[Candidate]
    facts: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def folder_of(
    data_set: Published, data: Path, named: Path | None, holds: Callable[[Path], bool] = lambda _: True
) -> Path:
    """The folder of a set's frames or pages: the named one, or the first of the usual ones that is there and ``holds``.

    Raises a DataError that lists where it was looked for.
    """
    places = [named] if named is not None else [data / folder for folder in data_set.media]
    for place in places:
        if place.is_dir() and (named is not None or holds(place)):
            return place
    listed = " or ".join(map(str, places))
    kind = "frames" if data_set.modality == "video" else "pages"
    raise DataError(f"{data_set.name}: no folder of its {kind}; looked for {listed}; name it by --media NAME=FOLDER")


def facts_of(data_set: Published, style: Style) -> dict[str, Any]:
    """What a reader of a score must know of its data set and texts."""
    told = {"modality": data_set.modality, "meta": data_set.meta, "pool": data_set.pool, "prompts": style.name}
    if data_set.modality == "video":
        told["frames"] = style.frames
    return told | ({"frames of a clip": style.clip_frames} if data_set.meta == "V-MR" else {})


def differences(data_set: Published, rows: int | None, sizes: Sequence[int]) -> list[str]:
    """Sentences where numbers of queries and candidates are not those that were published."""
    lines = []
    if rows is not None and rows != data_set.queries:
        lines.append(f"the data has {rows} queries; the published data set has {data_set.queries}")
    if sizes and data_set.candidates is not None:
        low, high = data_set.candidates
        if min(sizes) < low or max(sizes) > high:
            found, wanted = (f"{a}" if a == b else f"{a} to {b}" for a, b in ((min(sizes), max(sizes)), (low, high)))
            lines.append(f"a query chooses from {found} candidates; in the published data set from {wanted}")
    return lines
