"""The 24 visual-document sets of MMEB-V2: queries, pages and graded judgements.

::

    <data>/visdoc-tasks/<repository>/   copies of the configurations queries, corpus and qrels; or in data/<repository>
                        <name>/         the pages; or in images/<name>/, see muco.data.mmeb_v2_sets

A page is ``<corpus-id>.png``. Ids of VisRAG are names of files: there a page is the first 50 characters of that name,
"_", eight digits of its MD5, and its ending. The images inside a corpus are not read.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from muco.data.hub_rows import find_split, looked_for, read_rows
from muco.data.judged import Candidate, Query
from muco.data.mmeb_fields import Fields
from muco.data.mmeb_prompts import Style
from muco.data.mmeb_shared import JudgedSet, differences, folder_of
from muco.data.mmeb_v2_sets import Published
from muco.data.mmeb_video_rows import joined
from muco.dialogue import Content
from muco.errors import DataError

CONFIGS = ("queries", "corpus", "qrels")
NAME, DIGITS = 50, 8  # of a page of VisRAG: characters of its name, digits of the MD5
LOOKED_AT = 100  # pages, of which one tells that a folder is that of the pages

Judgements = Mapping[str, Mapping[str, int]]  # query -> page -> grade, in the order of the file


def find_pages(data: Path, data_set: Published) -> tuple[dict[str, list[Path]], list[str]]:
    """The files of each configuration, and what was looked for in vain."""
    folders = _folders(data, data_set)
    found = {config: find_split(folders, config, data_set.split) for config in CONFIGS}
    missing = [looked_for(folders, config, data_set.split) for config, files in found.items() if not files]
    return found, missing


def _folders(data: Path, data_set: Published) -> list[Path]:
    return [data / "visdoc-tasks" / below / name for name in data_set.rows for below in ("", "data")]


def page_file(data_set: Published, id: str) -> str:
    """The name of a page's file."""
    if data_set.meta != "VisRAG":
        return f"{id}.png"
    stem, ending = os.path.splitext(id)
    return f"{stem[:NAME]}_{hashlib.md5(id.encode(), usedforsecurity=False).hexdigest()[:DIGITS]}{ending}"


@dataclass(frozen=True)
class VisdocSet:
    """A visual-document set, found.

    Args:
        files: Of each configuration.
        pages: The folder of its pages; None: the first of the usual ones that has one of the first pages of the corpus.
        official: Give grades to pages as the official code does by mistake, see :func:`misplaced`.
    """

    data_set: Published
    files: Mapping[str, list[Path]]
    data: Path
    style: Style
    pages: Path | None = None
    official: bool = False

    @property
    def name(self) -> str:
        return self.data_set.name

    def query_rows(self) -> list[Fields]:
        return list(self._rows("queries", "query-id query"))

    def judged(self, rows: list[Fields], chosen: Collection[int]) -> JudgedSet:
        """Of all ``rows`` of queries those with the chosen numbers, and all pages.

        Raises:
            DataError: If a row cannot be used, an id occurs twice, nothing is judged relevant for a query, or no folder
                of pages is there; names file, row and field.
        """
        judgements, wording = self._judgements(), self.style.wording(self.data_set)
        queries: dict[str, Query] = {}
        for row in rows:
            id, text = row.name("query-id"), joined(wording.query, row.text("query"))
            if id in queries:
                raise DataError(f"{row.where}: the query {id!r} is also at {queries[id].where}; ids must be unique")
            if not judgements.get(id):
                raise DataError(f"{row.where}: no page has a score above 0 for the query {id!r}; add it to qrels")
            queries[id] = Query(id, Content(text), judgements[id], row.where)
        pages = self._pages(wording.target)
        known, judged = {page.id for page in pages}, [id for own in judgements.values() for id in own]
        lacking = sum(id not in known for id in judged)
        warnings = differences(self.data_set, len(rows), (len(pages),))
        if lacking:
            warnings.append(f"{lacking} of {len(judged)} judged pages are not in the corpus: they are never found")
        facts = {
            "judged pages": len(judged),
            "judged queries that the queries lack": len(judgements.keys() - queries.keys()),
            "largest grade": max(grade for own in judgements.values() for grade in own.values()),
        }
        asked = [query for number, query in enumerate(queries.values()) if number in chosen]
        return JudgedSet(asked, pages, facts, tuple(warnings))

    def _rows(self, config: str, columns: str) -> list[Fields]:
        files = self.files[config]
        rows = [Fields(*row) for file in files for row in read_rows(file, columns.split())]
        if not rows:
            raise DataError(f"{files[0]}: the file has no rows")
        return rows

    def _pages(self, target: str) -> list[Candidate]:
        rows = self._rows("corpus", "corpus-id")
        ids = [row.name("corpus-id") for row in rows]
        first = [(row, page_file(self.data_set, id)) for row, id in zip(rows[:LOOKED_AT], ids, strict=False)]

        def holds(place: Path) -> bool:  # rows may be in a folder of the same name
            return any(row.inside(place, name).is_file() for row, name in first)

        folder = folder_of(self.data_set, self.data, self.pages, holds)

        def page(row: Fields, id: str) -> Candidate:
            return Candidate(id, Content(target, (row.inside(folder, page_file(self.data_set, id)),)), row.where)

        return list(map(page, rows, ids))

    def _judgements(self) -> Judgements:
        judged: dict[str, dict[str, int]] = {}
        for row in self._rows("qrels", "query-id corpus-id score"):
            query, page, grade = row.name("query-id"), row.name("corpus-id"), _grade(row)
            if grade > 0:
                own = judged.setdefault(query, {})
                own[page] = max(grade, own.get(page, 0))
        return {query: misplaced(own) for query, own in judged.items()} if self.official else judged


def _grade(row: Fields) -> int:
    value: Any = row.values["score"]
    if isinstance(value, bool) or not isinstance(value, int | float) or not float(value).is_integer():
        raise row.wrong("score", "a whole number")
    return int(value)


def misplaced(grades: Mapping[str, int]) -> dict[str, int]:
    """The grades in the order of the judgements, given to the pages in the order of their ids.

    The official code puts the ids of right pages through a set before it pairs them with their grades, so their order
    depends on a hash that changes from run to run. Sorted ids are one such order, the same in every run.
    """
    return dict(zip(sorted(grades), grades.values(), strict=True))
