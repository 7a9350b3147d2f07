"""M-BEIR on disk: its 16 test tasks, their files, queries, judgements, instructions and pools.

::

    <data>/query/test/mbeir_{set}_task{N}_test.jsonl             query_txt, query_img_path, pos_cand_list …
           qrels/test/mbeir_{set}_task{N}_test_qrels.txt         query 0 candidate grade task
           cand_pool/local/mbeir_{set}_task{N}_cand_pool.jsonl   txt, img_path, modality; of MSCOCO …_test_cand_pool
           instructions/query_instructions.tsv                   the prompts; no code holds them
           mbeir_images/…                                        paths in the files count from <data>

The global pool is the 16 local ones, one after another; ``cand_pool/global`` holds the same lines and is not read.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from muco.base.text import read_text
from muco.data.judged import LinePool, Query
from muco.data.left_out import LeftOut
from muco.data.lines import JsonObject, id_of, image_of, objects, text_of
from muco.dialogue import BLANK, Content
from muco.errors import DataError

Key = tuple[int, str, str]  # data set, modality of the query, modality of the candidates
Keys = tuple[str, str, str]  # of a line's modality, text and image

DATA_SETS = tuple("VisualNews Fashion200K WebQA EDIS NIGHTS OVEN InfoSeek FashionIQ CIRR MSCOCO".split())  # by number
MODALITIES = ("text", "image", "image,text")
TASKS = {  # number -> modality of queries, of candidates, data sets; there is no task 5
    0: ("text", "image", "VisualNews MSCOCO Fashion200K"),
    1: ("text", "text", "WebQA"),
    2: ("text", "image,text", "EDIS WebQA"),
    3: ("image", "text", "VisualNews MSCOCO Fashion200K"),
    4: ("image", "image", "NIGHTS"),
    6: ("image,text", "text", "OVEN InfoSeek"),
    7: ("image,text", "image", "FashionIQ CIRR"),
    8: ("image,text", "image,text", "OVEN InfoSeek"),
}
QUERY: Keys = ("query_modality", "query_txt", "query_img_path")
CANDIDATE: Keys = ("modality", "txt", "img_path")
NUMBERS = 10_000_000  # candidates that a data set may number
FORM = "M-BEIR 1"  # of a candidate's content, see ``format_string``

_ID = re.compile(r"(0|[1-9][0-9]{0,2}):(0|[1-9][0-9]{0,6})", re.ASCII)


@dataclass(frozen=True)
class MBEIRTask:
    """One of the 16 test tasks; its name is "MSCOCO t0"."""

    data_set: str
    number: int

    @property
    def name(self) -> str:
        return f"{self.data_set} t{self.number}"

    @property
    def data_set_id(self) -> int:
        return DATA_SETS.index(self.data_set)

    @property
    def k(self) -> int:
        """Depth of the hit rate that counts."""
        return 10 if self.data_set in ("Fashion200K", "FashionIQ") else 5

    @property
    def key(self) -> Key:
        return (self.data_set_id, *TASKS[self.number][:2])

    def files(self, data: Path) -> dict[str, Path]:
        """The files of "queries", "judgements" and "pool"."""
        stem = f"mbeir_{self.data_set.lower()}_task{self.number}"
        pool = f"{stem}_test_cand_pool" if self.data_set == "MSCOCO" else f"{stem}_cand_pool"
        return {
            "queries": data / "query" / "test" / f"{stem}_test.jsonl",
            "judgements": data / "qrels" / "test" / f"{stem}_test_qrels.txt",
            "pool": data / "cand_pool" / "local" / f"{pool}.jsonl",
        }


ALL = tuple(MBEIRTask(name, number) for number, (*_, names) in TASKS.items() for name in names.split())


def instructions_file(data: Path) -> Path:
    return data / "instructions" / "query_instructions.tsv"


def format_string(text: str | None) -> str:
    """A text as the benchmark puts it: no outer blanks or quotes, a large first letter, a full stop at the end."""
    text = (text or "").replace("\r", "").strip().strip('"')
    text = text[:1].upper() + text[1:]
    return text if not text or text[-1] in ".?!" else f"{text}."


def number_of(id: str) -> int:
    """The int64 of "d:n": d * 10,000,000 + n; a ValueError if it is not such an id."""
    match = _ID.fullmatch(id)
    if not match:
        raise ValueError(f"{id!r} is not an id of M-BEIR")
    return int(match[1]) * NUMBERS + int(match[2])


def data_set_of(id: str) -> int:
    return number_of(id) // NUMBERS


def open_pool(data: Path, task: MBEIRTask, left_out: LeftOut | None = None) -> LinePool:
    """The local pool of a task, as :class:`LinePool` reads it; a line of another modality is a DataError too."""
    return LinePool(
        task.files(data)["pool"],
        f"the pool of {task.name}",
        lambda row, where: checked_id(row, "did", where),
        lambda row, where: candidate_of(row, TASKS[task.number][1], data, where),
        form=FORM,
        numbers=lambda ids: np.array([number_of(id.decode()) for id in ids], dtype=np.int64),
        left_out=left_out,
    )


def candidate_of(row: JsonObject, modality: str, data: Path, where: str) -> Content:
    """The content of a line of a pool, which must be of that modality."""
    text, image = sides_of(row, CANDIDATE, modality, data, where)
    content = Content(format_string(text), (image,) if image else ())
    return BLANK if content.empty else content


def read_queries(
    data: Path, task: MBEIRTask, judgements: Mapping[str, Mapping[str, int]], left_out: LeftOut
) -> tuple[list[Query], set[str]]:
    """The queries of a task by number, without prompts, and the ids of those whose positives are not what is judged.

    ``left_out`` gets lines whose text or image cannot be used. Raises a DataError if the file cannot be read, an id
    occurs twice, or a line is malformed, of another task or without positive.
    """
    path = task.files(data)["queries"]
    queries: dict[str, Query] = {}
    other = set()
    for row, where in objects(path):
        content, error = Content(), None
        try:
            text, image = sides_of(row, QUERY, TASKS[task.number][0], data, where)
            content = Content(text or "", (image,) if image else ())
        except DataError as found:
            left_out.check(found)
            error = found
        id, positives = checked_id(row, "qid", where), positives_of(row, where)
        if row.get("task_id", task.number) != task.number:
            raise DataError(f"{where}: 'task_id' is {row['task_id']!r:.60}, in a file of task {task.number}")
        if id in queries:
            raise DataError(f"{where}: the query {id!r} is also at {queries[id].where}; ids must be unique")
        queries[id] = Query(id, content, judgements.get(id, {}), where, error)
        if set(queries[id].relevant) != set(positives):
            other.add(id)
    if not queries:
        raise DataError(f"{path}: the file holds no query")
    return [queries[id] for id in sorted(queries, key=number_of)], other


def positives_of(row: JsonObject, where: str) -> tuple[str, ...]:
    """The ids of a query's positives."""
    return candidate_ids(row, "pos_cand_list", where, at_least_one=True)


def candidate_ids(row: JsonObject, key: str, where: str, *, at_least_one: bool = False) -> tuple[str, ...]:
    """The ids in a list of ids or of objects with one; None counts as an empty list."""
    given = row.get(key)
    if given is None and not at_least_one:
        return ()
    if not isinstance(given, list) or (at_least_one and not given):
        wanted = "at least one candidate" if at_least_one else "candidates"
        raise DataError(f"{where}: {key!r} must be a list of {wanted}, not {given!r:.60}")
    return tuple(checked_id(item if isinstance(item, dict) else {"did": item}, "did", where) for item in given)


def sides_of(row: JsonObject, keys: Keys, wanted: str, data: Path, where: str) -> tuple[str | None, str | None]:
    """Text and image of a line of modality ``wanted``; what that names must be there, anything else must not."""
    modality = row.get(keys[0])
    if modality not in MODALITIES:
        raise DataError(f"{where}: unknown {keys[0]} {modality!r:.60}; known are {', '.join(map(repr, MODALITIES))}")
    if modality != wanted:
        raise DataError(f"{where}: {keys[0]} is {modality!r}, in a file where it must be {wanted!r}")
    text, image = text_of(row, keys[1], where), image_of(row, keys[2], data, where)
    named = modality.split(",")
    for kind, key, there, needed in (
        ("text", keys[1], bool(text and text.strip()), text is None),
        ("image", keys[2], image is not None, image is None),
    ):
        if (kind in named and needed) or (kind not in named and there):
            said = "is missing" if needed else "is there"
            raise DataError(f"{where}: {key!r} {said}, but {keys[0]!r} is {modality!r}; repair one of them")
    return (text if "text" in named else None), image


def checked_id(row: JsonObject, key: str, where: str) -> str:
    """An id of the benchmark's form; a DataError if it is another."""
    value = id_of(row, key, where)
    if not _ID.fullmatch(value):
        raise DataError(f'{where}: {key!r} must be two numbers such as "9:1234", the second below 10^7, not {value!r}')
    return value


def read_instructions(path: Path) -> dict[Key, tuple[str, ...]]:
    """The prompts for each data set and pair of modalities; a DataError names a line that is invalid or repeated."""
    prompts: dict[Key, tuple[str, ...]] = {}
    for where, line in _text_lines(path):
        cells = [cell.strip() for cell in line.split("\t")]
        if where == f"{path}:1":
            if len(cells) > 3 and cells[3].isdigit():
                raise DataError(f"{where}: the first line must be a header, with the names of the columns")
            continue
        given = tuple(cell for cell in cells[4:] if cell)
        if not given:
            raise DataError(f"{where}: no prompt; columns are query_modality, cand_modality, dataset_name, dataset_id, "
                            "prompt_1 …, separated by tabs")  # fmt: skip
        for cell in cells[:2]:
            if cell not in MODALITIES:
                raise DataError(f"{where}: unknown modality {cell!r}; known are {', '.join(map(repr, MODALITIES))}")
        if not re.fullmatch("[0-9]{1,3}", cells[3], re.ASCII):
            raise DataError(f"{where}: dataset_id must be a number, not {cells[3]!r}")
        key = (int(cells[3]), cells[0], cells[1])
        if key in prompts:
            raise DataError(f"{where}: a second line for data set {key[0]}, {key[1]} to {key[2]}; keep one")
        prompts[key] = given
    return prompts


def _text_lines(path: Path) -> Iterator[tuple[str, str]]:
    """ "file:line" and text of every line that is not blank."""
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", line


def choose(count: int, query: str, seed: int) -> int:
    """Which of ``count`` prompts a query gets: a function of seed and query alone."""
    return hash_of(seed, "prompt", query) % count


def hash_of(seed: int, purpose: str, id: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {purpose} {id}".encode()).digest()[:8], "big")


def with_prompt(prompt: str, text: str) -> str:
    return format_string(f"{format_string(prompt)} {text}")


def read_judgements(path: Path, task: MBEIRTask) -> dict[str, dict[str, int]]:
    """Query -> candidate -> grade of the five columns ``query 0 candidate grade task``; a line twice counts once.

    Raises a DataError that names a line with other columns, an invalid id or grade, another task or another grade.
    """
    qrels: dict[str, dict[str, int]] = {}
    for where, line in _text_lines(path):
        cells = line.split()
        if len(cells) != 5:
            raise DataError(f"{where}: {len(cells)} columns; a line has query, 0, candidate, grade and task")
        query, _, candidate, grade, of_task = cells
        for id in (query, candidate):
            if not _ID.fullmatch(id):
                raise DataError(f'{where}: an id must be two numbers such as "9:1234", not {id!r}')
        if not re.fullmatch("-?[0-9]{1,9}", grade, re.ASCII):
            raise DataError(f"{where}: the grade must be a whole number, not {grade!r}")
        if of_task != str(task.number):
            raise DataError(f"{where}: task {of_task!r}, in a file of task {task.number}")
        if qrels.setdefault(query, {}).setdefault(candidate, int(grade)) != int(grade):
            raise DataError(f"{where}: {candidate!r} has another grade for {query!r} before; keep one of them")
    return qrels


def prompted(queries: Sequence[Query], prompts: Sequence[str], seed: int | None) -> tuple[list[Query], list[int]]:
    """Queries with their prompt in front, and how often each prompt was taken; without a ``seed``, always the first.

    Raises a DataError that names the line of a query for which nothing is judged relevant.
    """
    asked, taken = [], [0] * len(prompts)
    for query in queries:
        if not query.relevant:
            raise DataError(f"{query.where}: nothing is judged relevant for the query {query.id!r}; add a judgement")
        chosen = 0 if seed is None else choose(len(prompts), query.id, seed)
        taken[chosen] += 1
        text = with_prompt(prompts[chosen], query.content.text)
        asked.append(replace(query, content=Content(text, query.content.images)))
    return asked, taken
