"""The demo's searches: text queries over the held-out images, questions about images, and mistakes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from muco.data.source import Data
from muco.dialogue import Content
from muco.evaluate import cache as vector_cache
from muco.evaluate import metrics
from muco.evaluate.tasks import RETRIEVAL
from muco.model import Model

TOP_IMAGES, TOP_ANSWERS = 5, 3
IMAGE_MISTAKES = 4


@dataclass(frozen=True)
class TextQuery:
    """A query that differs from all captions of the set, and the phrases that a fitting caption has."""

    text: str
    facts: tuple[str, ...]


# Worded like captions: a model trained on whole captions reads nothing shorter.
TEXT_QUERIES = (
    TextQuery(
        "A large red star at center and a small blue circle at bottom left, on a striped azure background.",
        ("red star", "blue circle", "striped", "azure"),
    ),
    TextQuery(
        "A small yellow ring at top left and a large purple square at bottom right, on a plain rose background.",
        ("yellow ring", "purple square", "plain", "rose"),
    ),
    TextQuery(
        "A medium black triangle at top center and a large orange heart at middle left, on a checkered mint "
        "background.",
        ("black triangle", "orange heart", "checkered", "mint"),
    ),
    TextQuery(
        "A large green circle at top right, a small pink star at center and a medium blue square at bottom left, "
        "on a dotted lilac background.",
        ("green circle", "pink star", "blue square", "dotted", "lilac"),
    ),
)
SHOWN_TURNS = (3, 0, 5, 2)  # one of each of the first scenes: local, classification, creative, global


def search(model: Model, data: Data, parquet: Path, cache: Path) -> dict[str, Any]:
    """Answers the demo's queries over the held-out scenes.

    Args:
        parquet: The vectors of their images, from :func:`muco.embed.embed`.
        cache: Folder with the vectors that evaluation has computed.
    Returns:
        ``texts``, ``missed_images`` and the result of :func:`answer_questions`; image paths are relative to the data,
        and a tie ranks the right candidate last.
    """
    encode = CachedEncoder(model, vector_cache.EmbeddingCache(cache, model=model.fingerprint, data=data.fingerprint))
    scenes = Scenes(data, parquet)
    return {
        "texts": [answer_text(query, scenes, encode([Content(query.text)])[0]) for query in TEXT_QUERIES],
        **answer_questions(scenes, encode),
        "missed_images": missed_images(scenes, encode),
    }


class CachedEncoder:
    """Embeds contents, or takes their vectors from the cache of the evaluation."""

    def __init__(self, model: Model, cache: vector_cache.EmbeddingCache) -> None:
        self.model, self.cache, self.book = model, cache, vector_cache.Book()

    def __call__(self, contents: Sequence[Content]) -> np.ndarray:
        """float32 [n, d] in the order of the contents."""
        keys = [self.book.add(content) for content in contents]
        vectors, row_of = self.book.vectors(self.model, 64, set(keys), cache=self.cache)
        return vectors[[row_of[key] for key in keys]]


class Scenes:
    """The held-out scenes: per scene its image's name, its caption, its turns and the vector of its image."""

    def __init__(self, data: Data, parquet: Path) -> None:
        self.samples = [data[i] for i in range(len(data))]
        self.paths = [Path(sample.images[0]) for sample in self.samples]
        self.names = [f"images/test/{path.name}" for path in self.paths]
        self.captions = [next(t.target[0].text for t in s.turns if t.kind == RETRIEVAL) for s in self.samples]
        table = pq.read_table(parquet, columns=["id", "embedding"]).to_pydict()
        vectors = dict(zip(table["id"], table["embedding"], strict=True))
        self.vectors = np.array([vectors[path.name] for path in self.paths], dtype=np.float32)


def answer_text(query: TextQuery, scenes: Scenes, vector: np.ndarray) -> dict[str, Any]:
    """The images nearest to a text, and which of its facts each shows."""
    scores = scenes.vectors @ vector
    shown = [[fact in caption.lower() for fact in query.facts] for caption in scenes.captions]
    found = [
        {
            "image": scenes.names[i],
            "caption": scenes.captions[i],
            "score": float(scores[i]),
            "facts": dict(zip(query.facts, shown[i], strict=True)),
        }
        for i in np.argsort(-scores, kind="stable")[:TOP_IMAGES]
    ]
    return {"query": query.text, "fitting": sum(map(all, shown)), "of": len(shown), "found": found}


def answer_questions(scenes: Scenes, encode: CachedEncoder) -> dict[str, Any]:
    """Every question about every image, answered among all answers of the set but captions.

    Returns:
        ``answers``: the turns SHOWN_TURNS of the first scenes, one each, right or wrong. ``missed_answers``: the first
        wrong answer to each turn number after these scenes, each about another scene. ``asked``, ``right``,
        ``candidates``: how many there are.
    """
    turns = {
        (scene, number): turn
        for scene, sample in enumerate(scenes.samples)
        for number, turn in enumerate(sample.turns)
        if turn.kind != RETRIEVAL
    }
    answers = [turn.target[0].text for turn in turns.values()]
    candidates = sorted(set(answers))
    place = {text: i for i, text in enumerate(candidates)}
    queries = encode([Content(t.query[0].text, scenes.samples[scene].images) for (scene, _), t in turns.items()])
    scores = queries @ encode([Content(text) for text in candidates]).T
    ranks = _ranks(scores, [place[text] for text in answers])
    rows = {key: row for row, key in enumerate(turns)}

    def shown(key: tuple[int, int]) -> dict[str, Any]:
        row, turn = rows[key], turns[key]
        best = np.argsort(-scores[row], kind="stable")[:TOP_ANSWERS]
        return {
            "image": scenes.names[key[0]],
            "kind": turn.kind,
            "question": turn.query[0].text,
            "right": turn.target[0].text,
            "rank": int(ranks[row]),
            "found": [{"text": candidates[i], "score": float(scores[row, i])} for i in best],
        }

    missed: dict[int, int] = {}  # turn number -> scene
    for (scene, number), row in rows.items():
        new = scene >= len(SHOWN_TURNS) and scene not in missed.values() and number not in missed
        if ranks[row] > 1 and new:
            missed[number] = scene
    return {
        "answers": [shown(key) for key in enumerate(SHOWN_TURNS) if key in turns],
        "missed_answers": [shown((scene, number)) for number, scene in sorted(missed.items())],
        "asked": len(turns),
        "right": int((ranks == 1).sum()),
        "candidates": len(candidates),
    }


def missed_images(scenes: Scenes, encode: CachedEncoder) -> dict[str, Any]:
    """Captions that find another image before their own: the first ones of the set, and their number."""
    scores = encode([Content(caption) for caption in scenes.captions]) @ scenes.vectors.T
    ranks = _ranks(scores, range(len(scenes.captions)))
    missed = np.flatnonzero(ranks > 1)
    np.fill_diagonal(scores, -np.inf)  # leaves the rivals
    shown = [
        {
            "caption": scenes.captions[own],
            "right": scenes.names[own],
            "found": scenes.names[best],
            "found_caption": scenes.captions[best],
            "rank": int(ranks[own]),
        }
        for own, best in zip(missed, scores[missed[:IMAGE_MISTAKES]].argmax(axis=1), strict=False)
    ]
    return {"count": len(missed), "of": len(ranks), "shown": shown}


def _ranks(scores: np.ndarray, right: Sequence[int]) -> np.ndarray:
    """The rank of the right candidate of each row, int [n]; ties are lost."""
    return metrics.ranks(scores, np.array(right), np.arange(scores.shape[1]))
