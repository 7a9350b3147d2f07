"""Does the training data hold what the evaluation asks for? Overlap by image and by text, as hashes in one stream.

=============== =============================== =====================================================================
key             equal when                      not found
=============== =============================== =====================================================================
image file      the bytes of the files are      anything that was saved anew
image pixels    size and decoded RGB pixels are resized, cropped or re-compressed copies (JPEG changes pixels)
text            the normalised texts are        paraphrases, and parts of longer texts
=============== =============================== =====================================================================

A text is normalised by NFKC and case folding; runs of blanks and punctuation become one blank. Short texts ("Yes" is
everywhere) and those that many evaluation samples share (instructions, class names) do not count; the report says how
many of the latter training has. Longer questions made by a template may still repeat by chance: look at the pairs. Hard
negatives count in training, where the model has seen them, and not in evaluation.
"""

from __future__ import annotations

import os
from array import array
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from muco.base.files import write_json
from muco.base.machine import versions
from muco.base.tables import clean, print_whole, table_of_numbers
from muco.base.terminal import progress_bar
from muco.data.check_report import Findings
from muco.data.folders import told_passed_over
from muco.data.identity import MIN_WORDS, ContentRows, ImageKeys, Keys, image_keys, keys_of
from muco.data.jsonl import write_jsonl
from muco.dialogue import ImageLike
from muco.errors import DataError

if TYPE_CHECKING:
    from rich.console import Console

COMMON = 3  # texts in more evaluation samples than this do not count
LISTED = 20  # pairs and messages in the report; all pairs are in the file
KINDS = ("image file", "image pixels", "text")
RULES = {
    "image": "equal file bytes, or equal size and RGB pixels; resized or re-compressed copies are not found",
    "text": f"NFKC, case folded, blanks and punctuation collapsed; at least {MIN_WORDS} words (two wide characters are "
    f"one), in at most {COMMON} evaluation samples; paraphrases are not found",
    "negatives": "hard negatives count in training, not in evaluation",
    "hashes": "the first 64 bits of SHA-256",
}


def find_overlap(train: Iterable[Any], evaluation: Sequence[Any], *, output: Path | None = None) -> dict[str, Any]:
    """Finds evaluation samples whose images or texts occur in the training data.

    Args:
        train, evaluation: Paths that :func:`muco.data.open_data` opens, folders of images, or anything with ``__len__``
            and ``__getitem__`` -> :class:`muco.dialogue.Sample`.
        output: Folder that gets ``overlap.json``, the report, and ``overlap.jsonl``, one line per pair of a training
            row and an evaluation sample; without it nothing is written.
    Returns:
        Plain values for JSON: "affected" and "shares" (evaluation samples by image, text, either), "sources" (the same
        per evaluation source), "pairs" (their number), "listed" (the first ones), "short_texts" and "common_texts" (of
        the evaluation, that did not count), "common_in_training", "unreadable", "warnings", and what was compared.
    Raises:
        DataError: If a source is missing or empty, or a row is bad. Images that cannot be read are warnings.
        OutputError: If the folder cannot be written.
    Memory: 16 bytes per image file, image and text of the evaluation data; of the training data one block of rows.
    """
    training, sources = (
        [ContentRows(source) for source in ([given] if isinstance(given, (str, Path)) else given)]
        for given in (train, evaluation)
    )
    for side, given in (("training", training), ("evaluation", sources)):
        if not sum(map(len, given)):
            raise DataError(f"no {side} data: pass at least one file or folder that contains some")
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        search = _Search(sources, threads)
        pairs = search.pairs(training)
        if output is None:
            deque(pairs, maxlen=0)
        else:
            write_jsonl(Path(output) / "overlap.jsonl", pairs)
    report = search.report(training)
    if output is not None:
        write_json(Path(output) / "overlap.json", report)
    return report


class _Index:
    """Hashes of one kind, sorted, and the evaluation sample of each."""

    def __init__(self, hashes: array[int], samples: array[int]) -> None:
        order = np.argsort(hashes, kind="stable")
        self.hashes, self.samples = np.array(hashes)[order], np.array(samples)[order]

    def drop_common(self) -> set[int]:
        """Forgets hashes of more than ``COMMON`` samples and returns them."""
        values, place, counts = np.unique(self.hashes, return_inverse=True, return_counts=True)
        kept = counts[place] <= COMMON
        self.hashes, self.samples = self.hashes[kept], self.samples[kept]
        return set(values[counts > COMMON].tolist())

    def find(self, key: int) -> list[int]:
        wanted = np.uint64(key)  # a Python integer would be compared as float64
        first, last = (np.searchsorted(self.hashes, wanted, side) for side in ("left", "right"))
        return self.samples[first:last].tolist()


class _Search:
    def __init__(self, sources: list[ContentRows], threads: ThreadPoolExecutor) -> None:
        self.sources, self.threads = sources, threads
        self.starts = np.cumsum([0, *map(len, sources)])  # of each source's samples among all
        self.remembered = lru_cache(1 << 14)(image_keys)
        self.unreadable = {"training": Findings(), "evaluation": Findings()}
        self.listed: list[dict[str, Any]] = []
        self.total = 0
        self.affected = {kind: np.zeros(int(self.starts[-1]), dtype=bool) for kind in ("image", "text")}
        self.short = 0
        self._read_evaluation()

    def _keys(self, sources: list[ContentRows], side: str) -> Iterator[tuple[ContentRows, int, Keys]]:
        def look(image: ImageLike) -> ImageKeys:
            # Samples share images, so those of paths are remembered for a while; Pillow images cannot be looked up.
            return self.remembered(image) if isinstance(image, (str, Path)) else image_keys(image)

        total, done = sum(map(len, sources)), 0
        with progress_bar(f"{side} data") as progress:
            for source in sources:
                rows = keys_of(source, look, self.threads, negatives=side == "training")
                for i, keys in enumerate(rows):
                    for error in (image.error for image in keys.images if image.error is not None):
                        self.unreadable[side].add(f"{source.where(i)}: {error}")
                    yield source, i, keys
                    done += 1
                    progress(done, total)

    def _read_evaluation(self) -> None:
        hashes, samples = {kind: array("Q") for kind in KINDS}, {kind: array("Q") for kind in KINDS}
        for number, (_, _, keys) in enumerate(self._keys(self.sources, "evaluation")):
            self.short += keys.short
            for kind, found in _by_kind(keys).items():
                hashes[kind].extend(found)
                samples[kind].extend([number] * len(found))
        self.index = {kind: _Index(hashes[kind], samples[kind]) for kind in KINDS}
        self.common = self.index["text"].drop_common()
        self.common_in_training: set[int] = set()

    def pairs(self, training: list[ContentRows]) -> Iterator[dict[str, Any]]:
        """One line per training row and evaluation sample that share something, in the order of the training data."""
        for source, i, keys in self._keys(training, "training"):
            self.common_in_training |= self.common & keys.texts.keys()
            found: defaultdict[int, dict[str, str]] = defaultdict(dict)  # sample -> kind -> what is shared
            for kind, shared in _by_kind(keys).items():
                for key, what in shared.items():
                    for sample in self.index[kind].find(key):
                        found[sample].setdefault(kind, what)
            for sample, by in sorted(found.items()):
                owner = int(np.searchsorted(self.starts, sample, "right")) - 1
                where = self.sources[owner].where(sample - int(self.starts[owner]))
                pair: dict[str, Any] = {"train": source.where(i), "evaluation": where}
                pair["by"] = [kind for kind in KINDS if kind in by]
                if image := by.get("image file") or by.get("image pixels"):
                    pair["image"] = image
                    self.affected["image"][sample] = True
                if "text" in by:
                    pair["text"] = clean(by["text"][:200])
                    self.affected["text"][sample] = True
                self.total += 1
                if len(self.listed) < LISTED:
                    self.listed.append(pair)
                yield pair

    def report(self, training: list[ContentRows]) -> dict[str, Any]:
        spans = zip(self.sources, self.starts[:-1], self.starts[1:], strict=True)
        told = (told_passed_over(Path(source.name), source.passed_over) for source in (*training, *self.sources))
        warnings = [line for line in told if line]
        for side, failed in self.unreadable.items():
            if failed.total:
                shown = "; ".join([*failed.listed[:5], *(["…"] if failed.total > 5 else [])])
                warnings.append(f"{side} data: {failed.total:,} images cannot be read and are not compared: {shown}")
        return {
            **self._counts(0, int(self.starts[-1])),
            "sources": [source.origin | self._counts(int(a), int(b)) for source, a, b in spans],
            "train": [source.origin | {"samples": len(source)} for source in training],
            "pairs": self.total,
            "listed": self.listed,
            "short_texts": self.short,
            "common_texts": len(self.common),
            "common_in_training": len(self.common_in_training),
            "unreadable": {side: failed.total for side, failed in self.unreadable.items()},
            "warnings": warnings,
            "rules": RULES,
            "versions": versions(),
        }

    def _counts(self, start: int, stop: int) -> dict[str, Any]:
        image, text = self.affected["image"][start:stop], self.affected["text"][start:stop]
        affected = {"image": int(image.sum()), "text": int(text.sum()), "either": int((image | text).sum())}
        shares = {name: count / max(1, stop - start) for name, count in affected.items()}
        return {"samples": stop - start, "affected": affected, "shares": shares}


def _by_kind(keys: Keys) -> dict[str, dict[int, str]]:
    """Kind -> hash -> the image or text."""
    return {
        "image file": {k.file: k.name for k in keys.images if k.file is not None},
        "image pixels": {k.pixels: k.name for k in keys.images if k.pixels is not None},
        "text": keys.texts,
    }


def print_overlap(result: dict[str, Any], console: Console) -> None:
    """Prints how many evaluation samples are affected, the first pairs, and every warning."""
    from rich.text import Text

    columns = ("evaluation data", "samples", "by image", "by text", "by either")
    table = table_of_numbers("Also in the training data", columns)
    for source in [*result["sources"], {"source": "together", **result}]:
        cells = (f"{source['affected'][n]:,} ({source['shares'][n]:.1%})" for n in ("image", "text", "either"))
        table.add_row(*map(Text, (source["source"], f"{source['samples']:,}", *cells)))
    print_whole(table, console)
    for pair in result["listed"]:
        shared = " · ".join(pair[key] for key in ("image", "text") if key in pair)
        console.print(Text(f"{pair['train']} and {pair['evaluation']} share {', '.join(pair['by'])}: {shared}"))
    if (left := result["pairs"] - len(result["listed"])) > 0:
        console.print(Text(f"… and {left:,} more pairs"))
    for line in result["warnings"]:
        console.print(Text(f"Warning: {line}", style="bold red"))
    if result["common_texts"]:
        console.print(
            f"{result['common_texts']:,} texts are shared by more than {COMMON} evaluation samples and do not count; "
            f"training has {result['common_in_training']:,} of them"
        )
    console.print(Text("\n".join(f"{name}: {rule}" for name, rule in result["rules"].items()), style="dim"))
