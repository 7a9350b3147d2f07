"""MMEB-train on disk: 20 configurations of (query, target) pairs, texts and images, some with hard negatives.

::

    <data>/<configuration>/original-00000-of-00001.parquet              also train-…, as older copies are called
                           diverse_instruction-00000-of-00001.parquet   the same rows, instructions in other words
                           …_generated_sentence.parquet                 with captions of the images; in other folders
           images/<configuration>/…                                     paths in the files begin with "images/"

Columns are qry, qry_image_path, pos_text and pos_image_path, and where the file has them neg_text, neg_image_path and
the captions qry_sentence and pos_sentence. "" and null mean that there is none.
"""

from __future__ import annotations

import hashlib
import json
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from muco.base.json_text import type_of
from muco.data.lines import TOKEN, errors_at, image_of, literal_list, text_of, without_token
from muco.data.mmeb_files import SPLITS, Split, config_of, find_files
from muco.data.parquet import require_columns
from muco.data.places import position
from muco.data.rows import Rows
from muco.dialogue import Content, Sample, Turn
from muco.errors import DataError, did_you_mean

if TYPE_CHECKING:
    import pyarrow as pa

QUERY = ("qry", "qry_image_path", "qry_sentence")  # columns of text, image and caption
TARGET = ("pos_text", "pos_image_path", "pos_sentence")
NEGATIVES = ("neg_text", "neg_image_path")
FORM = 1  # raise when the samples made of a row change

_LIST = re.compile(r"\s*\[\s*(['\"]|\]\s*\Z)")  # how a list of strings begins; an answer such as "[0.5, Red]" is a text


class MMEBTrainData:
    """The pairs of MMEB-train as samples of one turn, whose kind is the name of the configuration.

    The image of a query is the sample's image, that of a target is the target's. The placeholder ``<|image_1|>`` is
    taken out of texts, for models put images in front by themselves. Rows of which the query or the target has neither
    text nor image are left out; ``skipped`` counts them by reason. Hard negatives are texts or images, and in lists an
    element without either is none. The first opening copies the rows, see :class:`muco.data.rows.Rows`.

    Args:
        path: The folder of the configurations, or one of their files.
        configs: Names of configurations; None for all that are there. Not with a file.
        split: Which instructions; captioned files are ``original`` unless their names say otherwise. One file is read
            whatever its split is.
        images: The folder that paths of images are relative to, where it is not the folder of the configurations.
        cache: The folder for what is kept, where it is not beside the files.
        rows_per_config: The most rows of each configuration, drawn at random, always the same ones; None for all.
    Raises:
        DataError: If a configuration is unknown or not there, a column is missing, or a file cannot be read. Whether
            a row has both sides is found out on opening, all else about it on access.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        configs: Sequence[str] | None = None,
        split: Split = "original",
        images: str | Path | None = None,
        cache: str | Path | None = None,
        rows_per_config: int | None = None,
    ) -> None:
        self.path, self.split, self.rows_per_config = Path(path), split, rows_per_config
        if rows_per_config is not None and (type(rows_per_config) is not int or rows_per_config < 1):
            raise DataError(f"{path}: rows_per_config must be a positive whole number, not {rows_per_config!r}")
        if split not in SPLITS:
            raise DataError(f"{path}: unknown split {split!r}{did_you_mean(split, SPLITS)}")
        if self.path.is_dir():
            root, files = self.path, find_files(self.path, configs, split)
        elif configs is not None:
            raise DataError(f"{path}: configs can be chosen from a folder; this is one file")
        else:
            root, files = self.path.absolute().parent.parent, {config_of(self.path): [self.path]}
        self.images = (root if images is None else Path(images)).absolute()
        if not self.images.is_dir():
            raise DataError(f"{self.images}: no such folder; it must hold what the paths of images are relative to")
        self._parts = [_Part(config, file, cache) for config, found in files.items() for file in found]
        if rows_per_config is not None:
            for config in {part.config for part in self._parts}:
                _cap([part for part in self._parts if part.config == config], rows_per_config)
        self._ends = list(accumulate(len(part.numbers) for part in self._parts))
        if not len(self):
            reasons = ", ".join(f"{count} rows: {reason}" for reason, count in self.skipped.items())
            raise DataError(f"{path}: no row has a query and a target ({reasons})")

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Sample:
        """Sample ``index``; ``where`` is "file row N" with the number in the file, from 0.

        Raises an IndexError if there is no such sample. Raises a DataError if a value has another type, an image's path
        leads out of the folder of images, or negatives are a broken list or not as many texts as images.
        """
        part, number = self._place(index)
        where = part.rows.where(number)
        with errors_at(where):
            row = part.rows[number]
            query, target = (_content(row, names, self.images, where) for names in (QUERY, TARGET))
            negatives = [
                _content(dict(zip(NEGATIVES, pair, strict=True)), NEGATIVES, self.images, where)
                for pair in negatives_of(row)
            ]
            turn = Turn(Content(query.text, caption=query.caption), target, part.config, negatives)
            return Sample(image=query.images, turns=[turn], where=where)

    def where(self, index: int) -> str:
        """ "file row N" of a sample, also of one that cannot be read."""
        part, number = self._place(index)
        return part.rows.where(number)

    @property
    def has_captions(self) -> bool:
        """Whether every file has captions; then the contents of the samples have them where there is an image."""
        return all(part.has_captions for part in self._parts)

    @property
    def skipped(self) -> dict[str, int]:
        """Reason -> rows that were left out for it."""
        return dict(sum((Counter(part.skipped) for part in self._parts), Counter()))

    @property
    def configs(self) -> dict[str, int]:
        """Configuration -> samples, in the order of the samples."""
        counts: Counter[str] = Counter()
        for part in self._parts:
            counts[part.config] += len(part.numbers)
        return dict(counts)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the configurations' names, the bytes of their files (kept on disk) and ``rows_per_config``.

        The bytes of the images, more than a million files, do not count, nor where files and images lie.
        """
        parts = [FORM, [(part.config, part.rows.digest) for part in self._parts]]
        parts += [] if self.rows_per_config is None else [self.rows_per_config]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _place(self, index: int) -> tuple[_Part, int]:
        i = position(index, len(self), self.path)
        number = bisect_right(self._ends, i)
        return self._parts[number], int(self._parts[number].numbers[i - (self._ends[number - 1] if number else 0)])


def _content(row: Mapping[str, Any], names: Sequence[str], folder: Path, where: str) -> Content:
    """What the columns of a text, an image and, where there are any, a caption hold."""
    text, *caption = (text_of(row, name, where) or "" for name in (names[0], *names[2:]))
    image = image_of(row, names[1], folder, where) if row[names[1]] != "" else None
    text = without_token(text, has_image=image is not None)
    if image is None:
        return Content(text)
    return Content(text if text.strip() else "", (image,), without_token("".join(caption), has_image=False))


class _Part:
    """One file: which of its rows are used (int32 numbers), and how many are empty, by reason."""

    def __init__(self, config: str, file: Path, cache: str | Path | None) -> None:
        columns = require_columns(file, (*QUERY[:2], *TARGET[:2]), (*NEGATIVES, QUERY[2], TARGET[2]))
        self.config, self.rows = config, Rows(file, columns, cache=cache)
        self.has_captions = {QUERY[2], TARGET[2]} <= set(columns)
        batches = [batch for shard in range(self.rows.shards) for batch in self.rows.batches(shard)]
        no_query, no_target = (
            np.concatenate([_is_empty(batch, *names[:2], file) for batch in batches]) for names in (QUERY, TARGET)
        )
        self.rows.forget()
        self.numbers = np.flatnonzero(~(no_query | no_target)).astype(np.int32)
        self.skipped = {
            "query and target are empty": int((no_query & no_target).sum()),
            "the query is empty": int((no_query & ~no_target).sum()),
            "the target is empty": int((no_target & ~no_query).sum()),
        }


def _cap(parts: Sequence[_Part], limit: int) -> None:
    """Leaves a configuration, of one file or several, as many rows; which ones depends on its rows alone."""
    total = sum(len(part.numbers) for part in parts)
    if total <= limit:
        return
    kept = np.zeros(total, dtype=bool)
    kept[np.random.default_rng(0).choice(total, limit, replace=False)] = True
    for part, own in zip(parts, np.split(kept, np.cumsum([len(part.numbers) for part in parts[:-1]])), strict=True):
        part.numbers = part.numbers[own]


def _is_empty(batch: pa.RecordBatch, text: str, image: str, file: Path) -> np.ndarray:
    """bool [rows]: whether a side has neither text nor the path of an image."""
    import pyarrow as pa
    import pyarrow.compute as pc

    empty = []
    for name in (text, image):
        column = batch.column(name)
        if not any(test(column.type) for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_null)):
            raise DataError(f"{file}: the column {name!r} must hold strings, not {column.type}")
        column = pc.fill_null(column.cast(pa.large_string()), "")
        try:
            if name == text:
                column = pc.utf8_trim_whitespace(pc.replace_substring(column, TOKEN, ""))
        except pa.ArrowInvalid as error:
            raise DataError(f"{file}: a text in the column {name!r} is not UTF-8; repair the file") from error
        empty.append(pc.equal(column, ""))
    return pc.and_(*empty).to_numpy(zero_copy_only=False)


def negatives_of(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The hard negatives of a row as (text, path of an image), of which at least one is not ""."""
    texts, images = (_strings(row.get(column), column) for column in NEGATIVES)
    if texts and images and len(texts) != len(images):
        raise DataError(f"'neg_text' holds {len(texts)} negatives and 'neg_image_path' {len(images)}; fix one of them")
    size = max(len(texts), len(images))
    pairs = zip(texts or [""] * size, images or [""] * size, strict=True)
    return [(text, image) for text, image in pairs if image or text.replace(TOKEN, "").strip()]


def _strings(value: Any, column: str) -> list[str]:
    """Nothing, a string, a list, or a list written as a string."""
    if value is None or value == "":
        return []
    if isinstance(value, str):
        value = literal_list(value, repr(column)) if _LIST.match(value) else [value]
    if not isinstance(value, list):
        raise DataError(f"{column!r} must be a string or a list of strings, not {type_of(value)}")
    for number, item in enumerate(value):
        if not isinstance(item, str | None):
            raise DataError(f"negative {number} in {column!r} must be a string, not {type_of(item)}")
    return [item or "" for item in value]
