"""M-BEIR's training queries as it is published, each with its prompts, positives and hard negatives.

::

    <data>/query/train/mbeir_{set}_train.jsonl                        one file per data set, or
           query/union_train/mbeir_union_up_train.jsonl               all of them, small sets repeated
           cand_pool/global/mbeir_union_train_cand_pool.jsonl         the candidates, or, where that is not there,
           cand_pool/local/mbeir_{set}_task{N}_cand_pool.jsonl        the local pools of the sets that are read
           instructions/query_instructions.tsv                        the prompts; no code holds them
           mbeir_images/…                                             paths in the files count from <data>
"""

from __future__ import annotations

import hashlib
import logging
from array import array
from collections.abc import Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np

from muco.data import mbeir_test
from muco.data.fingerprint import file_digest
from muco.data.lines import JsonObject, as_object
from muco.data.mbeir_test import DATA_SETS, NUMBERS, QUERY, checked_id, data_set_of, number_of
from muco.data.places import LinePlaces, file_state, position
from muco.dialogue import Content, Sample, Turn
from muco.errors import DataError, did_you_mean

MAX_TARGETS = 8  # positives of a query that become wordings of its target

log = logging.getLogger(__name__)


class MBEIRTrainData:
    """The training queries of M-BEIR, one sample of one turn each, read from disk when asked for.

    A turn's query has one wording per prompt of the instructions, each with the query's image. Its target is the first
    positive of the query's own data set that a pool holds; up to ``MAX_TARGETS`` positives of that set and of the same
    modality become wordings. Its hard negatives may be of any modality; what is a positive, also of another data set,
    is none. The ``kind`` is the name of the data set, the ``id`` that of the query.

    Opening reads all queries and candidates once (a million lines in some 20 s) and keeps some 30 bytes of each.

    Args:
        data: The benchmark's folder.
        sets: One or several names of data sets ("MSCOCO", in any case); None takes every one whose file is there.
        queries: "train", the files of the single sets, or "union_train", the one in which small sets are repeated.
        negatives: Hard negatives per query at most, the first ones of its list; None takes all.
    Attributes:
        left_out: Queries without a positive of their own data set in the pools; they are not samples.
        missing_positives, missing_negatives: Mentions of candidates that no pool holds.
    Raises:
        DataError: If a file is missing or cannot be read, a data set is unknown, a line has no valid id or list of
            candidates, an id is twice in the pools, or no query is left. The rest of a line is checked on access.
    """

    def __init__(
        self,
        data: str | Path,
        *,
        sets: str | Sequence[str] | None = None,
        queries: Literal["train", "union_train"] = "train",
        negatives: int | None = None,
    ) -> None:
        if negatives is not None and negatives < 0:
            raise DataError(f"negatives is {negatives}; it must be 0 or more, or left out to take all")
        self.data = self.path = Path(data)
        self.max_negatives = negatives
        named = [sets] if isinstance(sets, str) else DATA_SETS if sets is None else sets
        known = {name.lower(): name for name in DATA_SETS}
        if unknown := [name for name in named if name.lower() not in known]:
            raise DataError(f"unknown data set {unknown[0]!r} of M-BEIR{did_you_mean(unknown[0], DATA_SETS)}")
        self.sets = tuple(dict.fromkeys(known[name.lower()] for name in named))
        self.files = _query_files(self.data, self.sets, queries, named=sets is not None)
        self.prompts = mbeir_test.read_instructions(mbeir_test.instructions_file(self.data))
        self.pool = TrainPool(self.data, _pool_files(self.data, self.sets))
        self._places = LinePlaces(*self.files)
        self._index()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        """Raises IndexError if there is no such query, DataError if its line or a candidate's is not valid."""
        number = self._rows[position(index, len(self), self.data)]
        where = self._places.where(number)
        row = as_object(self._places.read(number), where)
        modality = row.get("query_modality")
        text, image = mbeir_test.sides_of(row, QUERY, modality, self.data, where)
        qid, positives = checked_id(row, "qid", where), mbeir_test.positives_of(row, where)
        targets, target_modality = self._targets(qid, positives)
        key = (data_set_of(qid), modality, target_modality)
        if key not in self.prompts:
            raise DataError(
                f"{where}: no prompt for {DATA_SETS[key[0]]} (data set {key[0]}), {modality} to {key[2]}, in "
                f"{mbeir_test.instructions_file(self.data)}; add a line for it"
            )
        images = (image,) if image else ()
        turn = Turn(
            query=[Content(mbeir_test.with_prompt(prompt, text or ""), images) for prompt in self.prompts[key]],
            target=targets,
            kind=DATA_SETS[key[0]],
            negatives=self._negatives(row, positives, where),
        )
        return Sample(turns=[turn], id=qid, where=where)

    def where(self, index: int) -> str:
        """ "file:line" of a query, also of one that cannot be used."""
        return self._places.where(self._rows[position(index, len(self), self.data)])

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over the bytes of all files that are read, except images, and the options.

        Images count by their paths: there are millions of them, published as one archive.
        """
        digest = hashlib.sha256(f"M-BEIR train 1 {self.sets} {self.max_negatives}\n".encode())
        for file in (*self.files, *self.pool.files, mbeir_test.instructions_file(self.data)):
            digest.update(f"{file.relative_to(self.data).as_posix()} {file_state(file)[0]}\n".encode())
            digest.update(bytes.fromhex(file_digest(file)))
        return digest.hexdigest()

    def _index(self) -> None:
        """Finds the usable queries, and counts the others."""
        wanted, queries = {DATA_SETS.index(name) for name in self.sets}, 0
        own, owner, others, negatives = array("q"), array("q"), array("q"), array("q")
        for number, (line, where) in enumerate(self._places.scan()):
            row = as_object(line, where)
            qid = checked_id(row, "qid", where)
            data_set = data_set_of(qid)
            if data_set >= len(DATA_SETS):
                last = len(DATA_SETS) - 1
                raise DataError(f"{where}: the query {qid!r} is of data set {data_set}; M-BEIR has 0 to {last}")
            if data_set not in wanted:
                continue
            queries += 1
            for positive in map(number_of, mbeir_test.positives_of(row, where)):
                if positive // NUMBERS == data_set:
                    own.append(positive)
                    owner.append(number)
                else:
                    others.append(positive)
            negatives.extend(map(number_of, mbeir_test.candidate_ids(row, "neg_cand_list", where)))
        held = self.pool.find(own) >= 0
        self._rows = np.unique(np.array(owner, dtype=np.int64)[held])
        self.left_out = queries - len(self)
        self.missing_positives = int((~held).sum()) + int((self.pool.find(others) < 0).sum())
        self.missing_negatives = int((self.pool.find(negatives) < 0).sum())
        if not len(self):
            raise DataError(
                f"{self.files[0]}: of {queries} queries of {', '.join(self.sets)} none has a positive of its own "
                f"data set in {self.pool.files[0]}; pass the pool that belongs to the queries"
            )
        if self.left_out:
            said = "%s: %d of %d queries are left out, no pool holds a positive of theirs"
            log.warning(said, self.data, self.left_out, queries)

    def _targets(self, qid: str, positives: Sequence[str]) -> tuple[list[Content], str]:
        """The positives of the query's own data set, of the modality of the first; never none, for it was indexed."""
        rows = self.pool.find([number_of(id) for id in positives if data_set_of(id) == data_set_of(qid)])
        candidates = [self.pool[row] for row in dict.fromkeys(rows[rows >= 0][:MAX_TARGETS].tolist())]
        modality = candidates[0][1]
        return [content for content, its_own in candidates if its_own == modality], modality

    def _negatives(self, row: JsonObject, positives: Sequence[str], where: str) -> list[Content]:
        given = dict.fromkeys(mbeir_test.candidate_ids(row, "neg_cand_list", where))
        rows = self.pool.find([number_of(id) for id in given if id not in positives])
        return [self.pool[row][0] for row in rows[rows >= 0][: self.max_negatives]]


class TrainPool:
    """Candidates of one or several JSONL files, found by the number of their id; only places are in memory.

    :class:`muco.data.judged.LinePool` looks at every image when it opens; of training candidates only a few per step
    are ever read, so here a line is checked, and its image looked for, when it is used. Raises a DataError if a file
    cannot be read, a line has no valid id, an id occurs twice or there is none.
    """

    def __init__(self, data: Path, files: Sequence[Path]) -> None:
        self.data, self.files, self._places = data, tuple(files), LinePlaces(*files)
        numbers = array("q")
        for line, where in self._places.scan():
            numbers.append(number_of(checked_id(as_object(line, where), "did", where)))
        if not numbers:
            raise DataError(f"{self.files[0]}: the file holds no candidate")
        self._order = np.argsort(numbers, kind="stable")
        self._numbers = np.array(numbers)[self._order]
        again = np.flatnonzero(self._numbers[1:] == self._numbers[:-1])
        if len(again):
            first, second = map(self._places.where, self._order[again[0] : again[0] + 2])
            data_set, number = divmod(int(self._numbers[again[0]]), NUMBERS)
            raise DataError(f"{second}: the id '{data_set}:{number}' is also at {first}; ids must be unique")

    def __getitem__(self, row: int) -> tuple[Content, str]:
        """A candidate's content and modality; a DataError if its line is not valid, or its file changed."""
        where = self._places.where(row)
        line = as_object(self._places.read(row), where)
        modality = line.get("modality")
        return mbeir_test.candidate_of(line, modality, self.data, where), modality

    def find(self, numbers: Sequence[int]) -> np.ndarray:
        """Rows of ids' numbers, int64 [n]; -1 for one that no file holds."""
        wanted = np.array(numbers, dtype=np.int64)
        places = np.minimum(np.searchsorted(self._numbers, wanted), len(self._numbers) - 1)
        return np.where(self._numbers[places] == wanted, self._order[places], -1)


def _query_files(data: Path, sets: Sequence[str], queries: str, *, named: bool) -> tuple[Path, ...]:
    if not data.is_dir():
        raise DataError(f"{data}: no such folder; it must hold M-BEIR, with the folders query and cand_pool")
    if not sets:
        raise DataError(f"{data}: no data set is named; name some of {', '.join(DATA_SETS)}")
    union = data / "query" / "union_train" / "mbeir_union_up_train.jsonl"
    if queries == "union_train":
        if not union.is_file():
            raise DataError(f"{union}: no such file; download it, or take the files in query/train")
        return (union,)
    if queries != "train":
        raise DataError(f"unknown queries {queries!r} of M-BEIR; pass 'train' or 'union_train'")
    files = [data / "query" / "train" / f"mbeir_{name.lower()}_train.jsonl" for name in sets]
    there = tuple(file for file in files if file.is_file())
    if not there or (named and len(there) < len(files)):
        absent = next(file for file in files if file not in there)
        hint = "; or take 'union_train', which is there" if union.is_file() else ""
        raise DataError(f"{absent}: no such file; download it, or name other data sets{hint}")
    return there


def _pool_files(data: Path, sets: Sequence[str]) -> tuple[Path, ...]:
    union = data / "cand_pool" / "global" / "mbeir_union_train_cand_pool.jsonl"
    if union.is_file():
        return (union,)
    local = data / "cand_pool" / "local"
    files = tuple(chain.from_iterable(sorted(local.glob(f"mbeir_{name.lower()}_task?_cand_pool.jsonl"))
                                      for name in sets))  # fmt: skip
    if not files:
        raise DataError(f"{union}: no such file, and {local} holds no pool of {', '.join(sets)}; download one of them")
    return files
