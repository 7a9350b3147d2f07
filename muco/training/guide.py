"""A guide's vectors of all that a run trains on, computed once, by which the loss tells false negatives.

::

    sources ─every query, target and hard negative, once─▶ guide ─▶ <output>/guide ─▶ vectors by the ids of a batch
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from sentence_transformers import SentenceTransformer
from torch import Tensor
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from muco.base.terminal import progress_bar
from muco.base.text import first_line
from muco.data.fingerprint import fingerprint_for
from muco.data.left_out import LeftOut
from muco.data.source import Data
from muco.dialogue import Content
from muco.errors import CheckpointError, DataError, TrainingError
from muco.evaluate.cache import Book, Embedder, EmbeddingCache
from muco.model import add_weights, load
from muco.starter import located
from muco.training.batches import with_image_turn
from muco.training.folder import GUIDE
from muco.training.prepared import query_keys, target_id
from muco.training.recipe import Recipe

BATCH = 32  # contents per pass

log = logging.getLogger(__name__)


class VectorsById:
    """Vectors of contents by the ids that :class:`muco.negatives.TurnIds` has of them.

    Args:
        ids: One per row of ``vectors``, float32 [n, dim].
    """

    def __init__(self, ids: Sequence[int], vectors: np.ndarray) -> None:
        order = np.argsort(np.asarray(ids, dtype=np.int64), kind="stable")
        self._ids, self._vectors = np.asarray(ids, dtype=np.int64)[order], vectors[order]

    def __call__(self, ids: Int[Tensor, " n"]) -> Float[Tensor, "n dim"]:
        """Their vectors, on the device of ``ids``; a TrainingError if one is not known."""
        wanted = ids.cpu().numpy()
        rows = np.searchsorted(self._ids, wanted).clip(max=len(self._ids) - 1)
        if not np.array_equal(self._ids[rows], wanted):
            raise TrainingError(
                "the guide has no vector of a content of this step: it could not read it, which was said at the start, "
                "or the data have changed since"
            )
        return torch.from_numpy(self._vectors[rows]).to(ids.device)


class TextGuide:
    """A stock sentence-transformers model, for contents without images."""

    def __init__(self, path: str) -> None:
        self.model = SentenceTransformer(path)

    def encode(self, contents: list[Content], /, *, batch_size: int) -> np.ndarray:
        texts = [content.text for content in contents]
        how: dict[str, Any] = {"normalize_embeddings": True, "show_progress_bar": False}
        return np.asarray(self.model.encode(texts, batch_size=batch_size, **how), dtype=np.float32)

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        add_weights(digest, self.model)
        return digest.hexdigest()


def check_guide(path: str) -> bool:
    """Whether a guide reads images; a CheckpointError if there is no such model."""
    if (Path(path) / "modules.json").is_file() and not (Path(path) / "config.json").is_file():
        return False  # a stock model that is none of transformers, such as one of static embeddings
    try:
        config = AutoConfig.from_pretrained(located(path))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"loss.guide.model: {path}: {first_line(error)}") from error
    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def guide_vectors(recipe: Recipe, sources: Sequence[Data]) -> VectorsById | None:
    """The vectors of the guide of a recipe; None if it has none. All processes call it, and share the work.

    Raises:
        CheckpointError: If the guide cannot be loaded.
        DataError: If a row cannot be read, unless such rows are skipped, or has an image that the guide cannot read.
    """
    if recipe.loss.guide is None:
        return None
    path = recipe.loss.guide.model
    reads_images = check_guide(path)
    skip = recipe.data.broken_images == "skip"
    left_out = LeftOut(allowed=True) if skip else None
    book, keys = Book(left_out), dict[int, str]()
    for source in sources:
        for index in range(len(source)):
            try:
                keys |= _contents(source, index, recipe.turns.image_turn, book)
            except DataError:
                if not skip:
                    raise
    for key, content in book.contents.items() if not reads_images else ():
        if content.images:
            why = f"the guide {path} reads texts, and this has an image; take one that reads images"
            raise DataError(f"{book.places[key]}: {why}")
    guide: Embedder = load(path) if reads_images else TextGuide(path)
    prints = [fingerprint_for(source, skip_broken=skip) for source in sources]
    data = hashlib.sha256(json.dumps(prints).encode()).hexdigest()
    cache = EmbeddingCache(Path(recipe.output) / GUIDE, model=guide.fingerprint, data=data)
    with progress_bar("guide") as progress:
        how: dict[str, Any] = {"cache": cache, "shared": True, "progress": progress}
        vectors, row_of = book.vectors(guide, BATCH, {key for key in keys.values() if key in book.contents}, **how)
    if left_out:
        log.warning(
            "the guide has no vector of %d contents, the first: %s", len(left_out), [*left_out.reasons.values()][0]
        )
        keys = {id: key for id, key in keys.items() if key not in left_out}
    return VectorsById([*keys], vectors[[row_of[key] for key in keys.values()]])


def _contents(source: Data, index: int, image_turn: str | None, book: Book) -> dict[int, str]:
    """The book's keys of what a sample has, by id."""
    sample = source[index]
    if image_turn:
        sample = with_image_turn(sample, image_turn)
    keys: dict[int, str] = {}
    for turn in sample.turns:
        for query, key in zip(turn.query, query_keys(sample, turn.query), strict=True):
            keys[key] = book.add(Content(query.text, (*sample.images, *query.images)), sample.place)
        for target in (*turn.target, *turn.negatives):
            keys[target_id(sample, target)] = book.add(target, sample.place)
    return keys
