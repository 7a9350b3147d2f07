"""Samples -> retrieval tasks: which queries are asked, what they choose from, and which candidates are right."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from muco.dialogue import Content, ImageLike, Sample, Video
from muco.evaluate import metrics
from muco.evaluate.cache import Book
from muco.images import open_image, opened_image

RETRIEVAL = "retrieval"  # the kind of the turn whose target is the caption


@dataclass(frozen=True)
class TurnKeys:
    """One turn as evaluation sees it. ``query`` (images of the sample + question), ``target`` and ``image`` (the
    images of the sample alone, None without) are keys of the book; ``sample`` is the sample's index."""

    sample: int
    kind: str
    query: str
    target: str
    image: str | None


def read_turns(book: Book, index: int, sample: Sample) -> list[TurnKeys]:
    """Enters the first paraphrase of every turn of a sample in the book."""
    image = book.add(Content(images=sample.images), sample.place) if sample.images else None
    turns = []
    for turn in sample.turns:
        question = turn.query[0]
        query = book.add(Content(question.text, sample.images + question.images), sample.place)
        turns.append(TurnKeys(index, turn.kind or "(none)", query, book.add(turn.target[0], sample.place), image))
    return turns


@dataclass(frozen=True)
class RetrievalTask:
    """Queries, and the pool in which each has its right target."""

    name: str
    kind: str | None
    queries: list[str]  # keys of what is encoded, Q of them
    pool: list[str]  # distinct keys, sorted
    positives: np.ndarray  # int64 [Q], the place of the right target in the pool
    relevant: list[list[int]]  # for each query the places of all targets that the data calls right for it
    lists: np.ndarray | None = None  # int64 [Q, C], places in the pool, see metrics.ranks_in_lists; None: all of it

    @property
    def label(self) -> str:
        return self.name if self.kind is None else f"{self.name}/{self.kind}"

    @property
    def candidates(self) -> np.ndarray:
        """int64 [Q]: the right target and its rivals."""
        if self.lists is not None:
            return 1 + (self.lists != self.lists[:, :1]).sum(axis=1)
        return np.array([len(self.pool) - len(right) + 1 for right in self.relevant])


class Builder:
    """Makes all tasks that the turns allow (``tasks``) and says why the others are missing (``skipped``)."""

    def __init__(self, book: Book, turns: Sequence[TurnKeys], candidates: int, seed: int) -> None:
        self.book, self.turns = book, turns
        self.tasks: list[RetrievalTask] = []
        self.skipped: dict[str, str] = {}
        self.rights: dict[str, set[str]] = defaultdict(set)
        for turn in turns:
            self.rights[turn.query].add(turn.target)
        self.answers(candidates, seed)
        self.captions()
        self.within()
        self.others()

    def add(
        self,
        name: str,
        kind: str | None,
        pairs: Sequence[tuple[str, str]],
        *,
        pool: Iterable[str] = (),
        rights: Mapping[str, set[str]] | None = None,
        choose: metrics.Choose | None = None,
    ) -> RetrievalTask | None:
        """Adds a task of (query, right target) pairs; the pool is at least their targets.

        A query whose target has no rival is left out, and a task without queries is skipped.
        """
        rights = self.rights if rights is None else rights
        pool = sorted({*pool, *(target for _, target in pairs)})
        place = {key: i for i, key in enumerate(pool)}
        queries, positives, relevant, rivals = [], [], [], []
        for query, target in pairs:
            right = rights[query] & place.keys()
            others = pool[len(right) :] if choose is None else choose(query, right)  # of the whole pool, only how many
            if others:
                queries.append(query)
                positives.append(place[target])
                relevant.append(sorted(place[key] for key in right))
                rivals.append([place[key] for key in others] if choose else [])
        lists = None
        if choose is not None and queries:
            lists = np.repeat(np.array(positives)[:, None], 1 + max(map(len, rivals)), axis=1)
            for row, others in zip(lists, rivals, strict=True):
                row[1 : 1 + len(others)] = others
        task = RetrievalTask(name, kind, queries, pool, np.array(positives, dtype=np.int64), relevant, lists)
        if not queries:
            self.skipped[task.label] = "no query has two different targets to choose from" if pairs else "no such turns"
            return None
        self.tasks.append(task)
        return task

    def answers(self, candidates: int, seed: int) -> None:
        by_kind: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for turn in self.turns:
            if turn.image and turn.kind != RETRIEVAL:
                by_kind[turn.kind].append((turn.query, turn.target))
        if not by_kind:
            self.skipped["answer"] = self.skipped["answer_text_only"] = "no such turns"
        for kind, pairs in sorted(by_kind.items()):
            choose = metrics.drawing({target for _, target in pairs}, candidates - 1, seed)
            task = self.add("answer", kind, pairs, choose=choose)
            if task is None:
                continue
            if all(self.book.contents[query].text for query in task.queries):
                unseen = [self.book.add(Content(self.book.contents[query].text)) for query in task.queries]
                self.tasks.append(replace(task, name="answer_text_only", queries=unseen))
            else:
                self.skipped[f"answer_text_only/{kind}"] = "a question has no text"

    def captions(self) -> None:
        asked = [turn for turn in self.turns if turn.image and turn.kind == RETRIEVAL]
        task = self.add("image_to_caption", None, [(turn.query, turn.target) for turn in asked])
        texts = [turn for turn in asked if not self.book.contents[turn.target].images]
        rights: dict[str, set[str]] = defaultdict(set)
        for turn in texts:
            rights[turn.target].add(turn.image)
        images = {turn.image for turn in self.turns if turn.image} if texts else ()
        self.add("caption_to_image", None, [(t.target, t.image) for t in texts], pool=images, rights=rights)
        if task:
            black = blackening(self.book)
            self.tasks.append(replace(task, name="blind", queries=[black(query) for query in task.queries]))
        else:
            self.skipped["blind"] = self.skipped["image_to_caption"]

    def within(self) -> None:
        asked = [turn for turn in self.turns if turn.image]
        targets: dict[int, set[str]] = defaultdict(set)
        for turn in asked:
            targets[turn.sample].add(turn.target)
        # Keyed by query: two samples with the same image and question offer the targets of both.
        offered: dict[str, set[str]] = defaultdict(set)
        for turn in asked:
            offered[turn.query] |= targets[turn.sample]
        pairs = [(turn.query, turn.target) for turn in asked]
        self.add("within", None, pairs, choose=lambda query, right: offered[query] - right)

    def others(self) -> None:
        by_name: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for turn in self.turns:
            if not turn.image:
                sides = []
                for content in (self.book.contents[turn.query], self.book.contents[turn.target]):
                    parts = {"image": content.images, "text": content.text}
                    sides.append("+".join(name for name, part in parts.items() if part))
                by_name["_to_".join(sides)].append((turn.query, turn.target))
        for name, pairs in sorted(by_name.items()):
            self.add(name, None, pairs)


def blackening(book: Book) -> Callable[[str], str]:
    """Key of a query -> key of the same query with black images of the same sizes."""

    @functools.cache
    def black(text: str, shapes: tuple[Shape, ...]) -> str:
        return book.add(Content(text, tuple(map(_blackened, shapes))))

    def blacken(query: str) -> str:
        content, where = book.contents[query], book.places[query]
        return black(content.text, tuple(_shape(image, where) for image in content.images))

    return blacken


Shape = tuple[tuple[int, int], int, float | None]  # width and height; frames, 0 of a picture; frames per second


def _shape(image: ImageLike, where: str) -> Shape:
    if not isinstance(image, Video):
        return open_image(image, small_side=0, where=where).size, 0, None
    opened = opened_image(image)
    return opened.source[0].size, opened.frames, opened.fps


def _blackened(shape: Shape) -> ImageLike:
    size, frames, fps = shape
    picture = Image.new("RGB", size)
    return Video((picture,) * frames, frames, fps) if frames else picture
