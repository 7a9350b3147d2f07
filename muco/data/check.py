"""``muco data check``: what a data set holds and what is wrong with it, in one pass that continues after bad rows."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict, deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from muco.base.terminal import progress_bar
from muco.base.text import SPECIAL_TOKEN
from muco.data import open_data
from muco.data.check_report import Findings, Repeats, Report, TextLengths
from muco.data.images import image_problem, sample_images
from muco.data.source import Data
from muco.dialogue import Content, ImageLike, Sample
from muco.errors import CheckpointError, DataError, ImageError
from muco.images import image_digest

MOST_FREQUENT = 5
NO_KIND = "(no kind)"


def check(data_or_path: Data | str | Path, *, images: bool = True, tokenizer: Any = None) -> Report:
    """Reads every row, opens every image once, and reports. Memory: every distinct target text and image path.

    Args:
        data_or_path: A path for :func:`muco.data.open_data`, or any data.
        images: False counts the images without opening them; missing files are still found. Targets that are copies
            of one image file are then counted apart.
        tokenizer: A tokenizer, or the path or hub id of a model: lengths are then given in tokens too, and its
            special tokens are looked for besides everything of the form ``<|…|>``.
    Raises:
        DataError: If the data cannot be opened at all. Bad rows and images are in the report instead.
        CheckpointError: If there is no tokenizer at the path.
    """
    if isinstance(tokenizer, (str, Path)):
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        except (OSError, ValueError) as error:
            reason = str(error).strip().split("\n")[0]
            said = f"{tokenizer}: cannot load a tokenizer from it ({reason}); pass a model folder"
            raise CheckpointError(said) from error
    data = open_data(data_or_path) if isinstance(data_or_path, (str, Path)) else data_or_path
    report = Report(path=str(getattr(data, "path", type(data).__name__)), rows=len(data), images_opened=images)
    texts, targets, turns = _Texts(report.special_tokens, tokenizer), _Targets(read_images=images), Counter[int]()
    image_checks = _ImageChecks(report)
    with closing(image_checks), progress_bar("checking rows") as progress:
        for i in range(len(data)):
            progress(i, len(data))
            try:
                sample = data[i]
            except DataError as error:
                report.bad_rows.add(str(error))
                continue
            turns[len(sample.turns)] += 1
            texts.add(sample)
            targets.add(sample)
            image_checks.add(sample)
        image_checks.finish()
    report.samples = turns.total()
    report.turns = sum(length * count for length, count in turns.items())
    report.turns_per_sample = dict(sorted(turns.items()))
    report.words = _lengths(texts.words)
    report.tokens = None if tokenizer is None else _lengths(texts.tokens)
    report.kinds = targets.kinds()
    return report


class _ImageChecks:
    """Opens each image once in threads (Pillow decodes without the interpreter lock); results come in row order."""

    def __init__(self, report: Report) -> None:
        self._report, self._seen = report, set[str]()
        self._pending: deque[Future[tuple[bool, str] | None]] = deque()
        self._threads = min(8, os.cpu_count() or 1)
        self._pool = ThreadPoolExecutor(self._threads)

    def add(self, sample: Sample) -> None:
        for image in sample_images(sample):
            key = _file_name(image)
            if key in self._seen:
                continue
            self._seen.add(key)
            self._report.images += 1
            self._pending.append(self._pool.submit(image_problem, image, sample.place, self._report.images_opened))
            self.finish(8 * self._threads)

    def finish(self, left: int = 0) -> None:
        """Reports finished images, until at most this many are left in the queue."""
        while len(self._pending) > left:
            if problem := self._pending.popleft().result():
                missing, message = problem
                (self._report.missing_images if missing else self._report.broken_images).add(message)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def _file_name(image: ImageLike) -> str:
    return str(image) if isinstance(image, (str, Path)) else _digest(image)


def _digest(image: ImageLike) -> str:
    try:
        return image_digest(image)
    except ImageError as error:  # only a name is wanted here; opening the image reports it
        return str(error)


class _Texts:
    """Lengths of all wordings by side, and the special tokens in them."""

    def __init__(self, special_tokens: Findings, tokenizer: Any) -> None:
        self._special_tokens, self._tokenizer = special_tokens, tokenizer
        known = sorted(getattr(tokenizer, "all_special_tokens", ()), key=len, reverse=True)
        self._pattern = re.compile("|".join([SPECIAL_TOKEN.pattern, *map(re.escape, known)]))
        self.words: dict[str, Counter[int]] = {"query": Counter(), "target": Counter()}
        self.tokens: dict[str, Counter[int]] = {"query": Counter(), "target": Counter()}

    def add(self, sample: Sample) -> None:
        for side in ("query", "target"):
            texts = [content.text for turn in sample.turns for content in getattr(turn, side) if content.text]
            self.words[side].update(len(text.split()) for text in texts)
            if self._tokenizer is not None and texts:
                ids = self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
                self.tokens[side].update(map(len, ids))
        for number, turn in enumerate(sample.turns, start=1):
            for content in (*turn.query, *turn.target, *turn.negatives):
                if found := self._pattern.search(content.text):
                    message = f"the text contains the special token {found[0]!r}; take it out of the data"
                    self._special_tokens.add(f"{sample.place} turn {number}: {message}")
                    return  # one message a row


def _lengths(by_side: dict[str, Counter[int]]) -> dict[str, TextLengths]:
    found = {}
    for side, counts in by_side.items():
        lengths, texts = sorted(counts), counts.total()
        if not texts:
            found[side] = TextLengths()
            continue
        ends = np.cumsum([counts[length] for length in lengths])  # texts that are no longer
        median, p95 = (lengths[np.searchsorted(ends, share * texts)] for share in (0.5, 0.95))
        mean = sum(length * count for length, count in counts.items()) / texts
        found[side] = TextLengths(texts, mean, median, p95, lengths[-1])
    return found


class _Targets:
    """How often each target occurs by kind, in turns and in samples; with ``read_images`` copies of a file are one."""

    def __init__(self, *, read_images: bool) -> None:
        self._read_images = read_images
        self._shown: dict[str, str] = {}  # digest of an image -> the name of the first such file
        self._turns: Counter[str] = Counter()
        self._uses: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._samples: defaultdict[str, Counter[str]] = defaultdict(Counter)

    def add(self, sample: Sample) -> None:
        in_sample: defaultdict[str, set[str]] = defaultdict(set)
        for turn in sample.turns:
            kind = turn.kind or NO_KIND
            names = {self._name(content) for content in turn.target}
            self._turns[kind] += 1
            self._uses[kind].update(names)
            in_sample[kind] |= names
        for kind, names in in_sample.items():
            self._samples[kind].update(names)

    def _name(self, content: Content) -> str:
        """Text, and the images as "[image path]": equal for equal targets, and readable in the report."""
        names = [_file_name(image) for image in content.images]
        if self._read_images:
            pairs = zip(content.images, names, strict=True)
            names = [self._shown.setdefault(_digest(image), name) for image, name in pairs]
        return " ".join([*(f"[image {name}]" for name in names), content.text]).strip()

    def kinds(self) -> dict[str, Repeats]:
        """By number of turns, largest first."""
        found = {}
        for kind, turns in self._turns.most_common():
            uses, samples = self._uses[kind], self._samples[kind]
            repeated = Counter({name: count for name, count in uses.items() if samples[name] > 1})
            share = repeated.total() / uses.total()
            found[kind] = Repeats(turns, len(uses), share, repeated.most_common(MOST_FREQUENT))
        return found
