"""The 18 video sets of MMEB-V2: finding their rows and frames, and reading them as queries and candidates.

::

    <data>/video-tasks/<name>/…        copies of the hub data sets, or in data/<name>; see muco.data.hub_rows
                       frames/…        one folder of images a video; see muco.data.mmeb_v2_sets
                       labels/<name>.txt   all labels of K700, HMDB51 or UCF101, one a line
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from muco.base.text import read_text
from muco.data.hub_rows import count_rows, find_configs, find_split, looked_for, read_rows
from muco.data.judged import Candidate, Query
from muco.data.left_out import LeftOut
from muco.data.mmeb_fields import Fields
from muco.data.mmeb_lists import Question
from muco.data.mmeb_prompts import Style
from muco.data.mmeb_shared import JudgedSet, differences, facts_of
from muco.data.mmeb_v2_sets import BREAKFAST, LABELS, Published
from muco.data.mmeb_video_rows import READERS, Asked, Place
from muco.dialogue import Content
from muco.errors import DataError, ImageError

FIRST = {"SmthSmthV2": 1000}  # sets of which only the first rows are asked, and how many
CONFIGURED = ("MVBench",)  # sets of which every configuration is a part


def find_videos(data: Path, data_set: Published) -> dict[str, list[Path]]:
    """The files of a set's rows by configuration; {} where there are none."""
    folders = _folders(data, data_set)
    if data_set.name in CONFIGURED:
        return find_configs(folders, data_set.split)
    files = find_split(folders, data_set.config, data_set.split)
    return {data_set.config: files} if files else {}


def videos_looked_for(data: Path, data_set: Published) -> str:
    """What :func:`find_videos` looks for, as part of a sentence."""
    config = "<config>" if data_set.name in CONFIGURED else data_set.config
    return looked_for(_folders(data, data_set), config, data_set.split)


def _folders(data: Path, data_set: Published) -> list[Path]:
    return [data / "video-tasks" / below / name for name in data_set.rows for below in ("", "data")]


@dataclass(frozen=True)
class VideoSet:
    """A video set, opened; a ListSource where its candidates are local.

    Args:
        files: Of its rows, by configuration; row numbers count through all of them.
        frames: The folder of its frames.
        official: Cut options as the official code does by mistake, see ``bare_option``.
    Raises:
        DataError: When rows are read and one cannot be used; names file, row and field.
    """

    data_set: Published
    files: Mapping[str, Sequence[Path]]
    frames: Path
    data: Path
    style: Style
    official: bool = False
    rivals_by_name = True  # which of equal ones it takes is left to chance: here none is a hit, as ties are lost

    @property
    def name(self) -> str:
        return self.data_set.name

    @cached_property
    def rows(self) -> int:
        found = count_rows([file for files in self.files.values() for file in files])
        if not found:
            raise DataError(f"{next(iter(self.files.values()))[0]}: the file has no rows")
        return min(found, FIRST.get(self.name, found))

    @property
    def facts(self) -> dict[str, Any]:
        return facts_of(self.data_set, self.style)

    def questions(self, chosen: Collection[int], left_out: LeftOut) -> Iterator[Question]:
        """The rows with these numbers; of one whose clips are missing and may be, an error in place of all contents."""
        for number, row, place in self._fields():
            if number not in chosen:
                continue
            try:
                asked = READERS[self.name].read(row, place)
            except ImageError as error:
                left_out.check(error)
                wrong = DataError(f"{error} (wrong clips)")
                yield Question(number, row.where, error, (error, wrong), ("", " "))
                continue
            names, contents = zip(*asked.right, *asked.wrong, strict=True)
            yield Question(number, row.where, asked.query, contents, names, len(asked.right))

    def warnings(self, sizes: Sequence[int]) -> list[str]:
        return differences(self.data_set, self.rows, sizes)

    def judged(self, chosen: Collection[int]) -> JudgedSet:
        """The queries with these row numbers, and the candidates of all rows, equal names as one."""
        queries, found, facts = list[Query](), dict[str, Candidate](), dict[str, Any]()
        known, source = self._labels()
        for label in known:
            found[label] = Candidate(label, Content(label), source)
        for number, row, place in self._fields():
            asked: Asked = READERS[self.name].read(row, place)
            (name, content) = asked.right[0]
            if known and name not in found:
                raise DataError(f"{row.where}: 'pos_text', {name!r:.60}, is not in {source}; add it, or repair the row")
            found.setdefault(name, Candidate(name, content, row.where))
            if number in chosen:
                queries.append(Query(str(number), asked.query, {name: 1}, row.where))
        warnings, expected = differences(self.data_set, self.rows, ()), LABELS.get(self.name)
        if expected is None:
            warnings += differences(self.data_set, None, (len(found),))
        else:
            facts["labels from"] = source or "the rows"
            if len(found) != expected:
                warnings.append(
                    f"{len(found)} labels were found in {source or 'the rows'}, of {expected}; the score is not that "
                    f"of the benchmark; put all labels into {self._label_file}, one a line"
                )
        return JudgedSet(queries, [found[name] for name in sorted(found)], facts, tuple(warnings))

    def _fields(self) -> Iterator[tuple[int, Fields, Place]]:
        reader, number, wording = READERS[self.name], 0, self.style.wording(self.data_set)
        for config, files in self.files.items():
            place = Place(self.frames, self.style, wording, config, official=self.official)
            for file in files:
                for values, where in read_rows(file, reader.columns.split(), reader.optional.split()):
                    if number >= self.rows:
                        return
                    yield number, Fields(values, where), place
                    number += 1

    @property
    def _label_file(self) -> Path:
        return self.data / "video-tasks" / "labels" / f"{self.name}.txt"

    def _labels(self) -> tuple[list[str], str]:
        """All labels of the set and where they are written down; nothing where that is unknown."""
        if self.name not in LABELS:
            return [], ""
        if self._label_file.is_file():
            lines = [line.strip() for line in read_text(self._label_file).splitlines()]
            if not any(lines):
                raise DataError(f"{self._label_file}: the file holds no label; write one a line")
            return [line for line in lines if line], str(self._label_file)
        return (BREAKFAST, "the list of the benchmark") if self.name == "Breakfast" else ([], "")
