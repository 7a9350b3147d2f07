"""Items -> vectors: what runs in the batcher's threads. The only file of the server that knows the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from muco.batch import DialogueBatch, collate, join
from muco.dialogue import Content, Dialogue, Video
from muco.embed.vectors import open_images
from muco.errors import DataError
from muco.layout import Truncate
from muco.processor import Processor
from muco.serve.images import ImageLimits, decode

if TYPE_CHECKING:
    from muco.model import Model


@dataclass(frozen=True)
class Item:
    """One text, an image or both: one vector; or several texts about the same images: one vector each."""

    texts: tuple[str, ...]  # an empty one means the images themselves
    images: tuple[str | bytes, ...] = ()  # data URIs, or bytes that were fetched
    mode: Literal["isolated", "compounded"] | None = None  # as in ``Model.encode_turns``; None: there is one text
    truncate: Truncate = "NONE"  # which end of a text is cut where the item is too long
    where: str = "input 0"  # names the item in errors
    video: tuple[str | bytes, ...] = ()  # as images, of the frames of a video, which comes behind them
    fps: float | None = None  # of the video

    @property
    def light(self) -> bool:
        return not self.pictures

    @property
    def pictures(self) -> tuple[str | bytes, ...]:
        """Of the images and of the frames."""
        return self.images + self.video


@dataclass(frozen=True)
class Prepared:
    """An item as the model reads it: a batch of one row, or images and texts for ``Model.encode_turns_batch``."""

    item: Item
    images: tuple[Any, ...]
    batch: DialogueBatch | None
    tokens: int
    image_tokens: int


@dataclass(frozen=True)
class Embedded:
    """The vectors of an item, float32 [k, dim], L2-normalised, and the tokens they took."""

    vectors: np.ndarray
    tokens: int
    image_tokens: int


@dataclass(frozen=True)
class Facts:
    """What there is to know of a model without having it."""

    processor: Processor
    padding_side: Literal["left", "right"]
    dimension: int  # of a vector
    device: str  # as torch calls it
    fingerprint: str = ""  # where somebody asked for it

    @classmethod
    def of(cls, model: Model, fingerprint: str = "") -> Facts:
        encoder, dimension = model.encoder, model.get_embedding_dimension()
        return cls(encoder.muco_processor, encoder.padding_side, dimension, str(model.device), fingerprint)


class Preparation:
    """The first of the two functions that a batcher takes, which needs no model.

    ``max_tokens`` is for one item, image tokens included; at most the model's context.
    """

    def __init__(self, facts: Facts, images: ImageLimits, max_tokens: int) -> None:
        self.processor, self.facts, self.image_limits = facts.processor, facts, images
        self.max_tokens = min(max_tokens, self.processor.max_tokens or max_tokens)

    @property
    def dimension(self) -> int:
        return self.facts.dimension

    def prepare(self, item: Item) -> Prepared:
        """Opens the images and counts the tokens.

        Raises a DataError if a text holds a special token, an image is broken, or the item is too long or too large.
        """
        opened = partial(decode, limits=self.image_limits, where=item.where, opened=self.processor.opened)
        images = open_images(item.pictures, opened, item.where)
        if item.video:
            frames = images[len(item.images) :]
            images = (*images[: len(item.images)], Video(frames, len(frames), item.fps))
        dialogue = Dialogue(images, tuple(map(Content, item.texts)), item.mode != "compounded", item.where)
        cut = item.truncate if item.mode is None else "NONE"
        most = None if cut == "NONE" else self.max_tokens
        side = self.facts.padding_side
        batch = collate([dialogue], self.processor, padding_side=side, truncate=cut, max_tokens=most)
        tokens = batch["input_ids"].shape[1]
        if tokens > self.max_tokens:
            raise DataError(
                f"{item.where}: {tokens:,} tokens; this server takes at most {self.max_tokens:,} of one item"
            )
        image_tokens = int(batch["image_tokens"].sum()) if "image_tokens" in batch else 0
        alone = item.mode is None
        return Prepared(item, () if alone else images, batch if alone else None, tokens, image_tokens)


class Engine(Preparation):
    """A loaded model as the two functions that a batcher takes."""

    def __init__(self, model: Model, images: ImageLimits, max_tokens: int) -> None:
        super().__init__(Facts.of(model), images, max_tokens)
        self.model = model.eval()

    @torch.inference_mode()
    def run(self, prepared: Sequence[Prepared]) -> list[Embedded]:
        """One forward pass of all single items, one for the turns of each mode; results in the order given."""
        vectors: dict[int, np.ndarray] = {}
        for mode in (None, "isolated", "compounded"):
            chosen = {number: one for number, one in enumerate(prepared) if one.item.mode == mode}
            if not chosen:
                continue
            if mode is None:
                found = self.model.embed(join([one.batch for one in chosen.values()])).cpu().numpy()[:, None]
            else:
                images, texts = zip(*((one.images, one.item.texts) for one in chosen.values()), strict=True)
                found = self.model.encode_turns_batch(images, texts, mode=mode)
            vectors |= dict(zip(chosen, found, strict=True))
        return [Embedded(vectors[n], one.tokens, one.image_tokens) for n, one in enumerate(prepared)]
